"""Calls that differ from a recorded one in what matters are not replayed."""

from __future__ import annotations

import contextlib
import mmap
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs

import fused_attn
from fused_attn import tuning
from fused_attn.backends.triton import launch_cache, launcher, portable, settings
from fused_attn.runtime import call_cache
from fused_attn.tuning import Config
from tests.backends.launches.stub import LAUNCHES, Machine, attention, block_of, launched, replays, tensors, warm


def far(x: Tensor) -> Tensor:
    """As x, its batches more than 2**31 elements apart, in memory that is committed only where it is touched."""
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python does not name
    size = 2 * (2**31 + 8 + x[0].numel())
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(pages, dtype=x.dtype).as_strided(x.shape, (2**31 + 8, *x.stride()[1:]))


CHANGES: dict[str, Callable[[list[Tensor]], tuple[list[Tensor], dict[str, Any]]]] = {
    "a length": lambda x: ([x[0], x[1][:, :, :-1], x[2][:, :, :-1]], {}),
    "a stride": lambda x: ([x[0].mT.contiguous().mT, *x[1:]], {}),
    "a far stride": lambda x: ([far(x[0]), *x[1:]], {}),
    "an address": lambda x: ([torch.zeros(x[0].numel() + 4, dtype=x[0].dtype)[4:].view(x[0].shape), *x[1:]], {}),
    "heads": lambda x: ([x[0], x[1][:, :1], x[2][:, :1]], {}),
    "dtype": lambda x: ([y.half() for y in x], {}),
    "scale": lambda x: (x, {"scale": 1.0}),
    "causal": lambda x: (x, {"causal": True}),
    "window": lambda x: (x, {"window": (16, 0)}),
    "softcap": lambda x: (x, {"softcap": 1.0}),
    "layout": lambda x: ([y.transpose(1, 2) for y in x], {"layout": "bshd"}),
    "mask": lambda x: (x, {"mask": torch.ones(1, 1, 48, 48, dtype=torch.bool)}),
    "bias": lambda x: (x, {"bias": torch.zeros(1, 1, 48, 48)}),
    "sink": lambda x: (x, {"sink": torch.zeros(4)}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_call_is_not_replayed(name: str) -> None:
    """After a call has been recorded, one that differs launches what it launches with empty caches."""
    changed, options = CHANGES[name](warm())
    after = [launched(lambda: attention(*changed, **options), *changed) for _ in range(5)]
    for cache in (launch_cache._compiled, call_cache._calls):
        cache.clear()
    expected = launched(lambda: attention(*changed, **options), *changed)
    assert all(x == expected for x in after)


@pytest.mark.parametrize("option", [{"window": (1, True)}, {"window": [1, 1.0]}, {"softcap": True}, {"scale": True}])
def test_equal_options_of_another_type_are_refused(option: dict[str, Any]) -> None:
    """1, 1.0 and True are equal in Python; a refused type stays refused after a call with an equal value was cached."""
    twin = {name: (1, 1) if name == "window" else 1.0 for name in option}
    x = warm(**twin)
    with pytest.raises(TypeError, match=next(iter(option))):
        attention(*x, **option)


def test_configuration_override_is_scoped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scope counts for calls recorded outside of it, and leaves nothing behind; backward keeps forward's."""
    x = warm(grad=True)
    replayed = replays(monkeypatch)
    usual = launched(lambda: attention(*x), *x)
    with tuning.override(forward=Config(16, 32, 1, 1), dq=Config(16, 16, 1, 1)):
        scoped = [launched(lambda: attention(*x), *x) for _ in range(3)]
        out = attention(*x)
    LAUNCHES.clear()
    torch.autograd.grad(out, x, torch.ones_like(out), retain_graph=True)
    assert block_of("dq_kernel") == 16
    assert scoped[0] != usual and scoped[1:] == scoped[:-1]
    assert launched(lambda: attention(*x), *x) == usual
    assert replayed == [True, False, False, False, False, True]


def test_backward_in_another_thread_uses_the_forward_override() -> None:
    x = warm(grad=True)
    for _ in range(3):
        out = attention(*x)
        torch.autograd.grad(out, x, torch.ones_like(out))
    with tuning.override(dq=Config(16, 16, 1, 1)):
        out = attention(*x)
    LAUNCHES.clear()
    thread = threading.Thread(target=lambda: torch.autograd.grad(out, x, torch.ones_like(out)))
    thread.start()
    thread.join()
    assert block_of("dq_kernel") == 16


def test_environment_variable_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tensors()
    monkeypatch.setenv("FUSED_ATTN_BACKEND", "triton")
    for _ in range(4):
        assert launched(lambda: attention(*x, backend=None))
    monkeypatch.setenv("FUSED_ATTN_BACKEND", "tiled")
    assert not launched(lambda: attention(*x, backend=None))


def test_grad_modes_are_part_of_the_key() -> None:
    x = warm(grad=True)
    assert attention(*x).grad_fn is not None
    with torch.no_grad():
        for _ in range(4):
            assert attention(*x, causal=True).grad_fn is None
    assert attention(*x, causal=True).grad_fn is not None
    x = warm()
    assert attention(*x).grad_fn is None
    for y in x:
        y.requires_grad_()
    assert attention(*x).grad_fn is not None
    with torch.no_grad():
        assert attention(*x).grad_fn is None
    with torch.inference_mode():
        assert attention(*x).is_inference()
    assert not attention(*x).is_inference()


def test_autocast_is_part_of_the_key() -> None:
    x = [y.float() for y in tensors()]
    for _ in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert attention(*x).dtype == torch.bfloat16
        assert attention(*x).dtype == torch.float32


def test_stream_is_read_at_each_launch(machine: Machine) -> None:
    x = warm()
    for machine.stream in (3, 4):
        (launch,) = launched(lambda: attention(*x))
        assert launch[2] == machine.stream


def test_kernels_are_compiled_per_device(machine: Machine) -> None:
    x = warm()
    (first,) = launched(lambda: attention(*x))
    machine.device = 1
    kernels = [launched(lambda: attention(*x))[0][0] for _ in range(4)]
    assert first[0] not in kernels and len(set(kernels)) == 1


def test_tensors_on_a_device_that_is_not_current(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch is on the tensors' device and on a stream of that device."""

    @contextlib.contextmanager
    def there(_: Tensor) -> Iterator[None]:
        before, machine.device = machine.device, 1
        yield
        machine.device = before

    monkeypatch.setattr(settings, "device_of", there)
    x = tensors()
    launches = [launched(lambda: attention(*x))[0] for _ in range(5)]
    assert {y[2] for y in launches} == {100} and len({y[0] for y in launches}) == 1


@pytest.mark.parametrize("grad", [False, True])
def test_launch_hooks_see_every_launch(grad: bool) -> None:
    x = warm(grad=grad)
    seen: list[Any] = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        attention(*x)
        assert len(seen) == 1 and seen[0].get()["name"] == "forward_kernel"
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    attention(*x)
    assert len(seen) == 1


def test_pre_run_hooks_see_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = warm()
    seen: list[Any] = []
    hooks = [lambda *args, **options: seen.append(options["BLOCK_M"])]
    monkeypatch.setattr(portable._device_code().forward, "pre_run_hooks", hooks)
    assert len(launched(lambda: attention(*x))) == len(seen) == 1


def test_debug_mode_compiles_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x = warm()
    (usual,) = launched(lambda: attention(*x))
    monkeypatch.setattr(knobs.runtime, "debug", True)
    (debugged,) = launched(lambda: attention(*x))
    assert debugged[0] is not usual[0]


def test_replaced_launch_function_sees_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = warm()
    seen = []
    monkeypatch.setattr(launcher, "launch", lambda kernel, *args, **options: seen.append(kernel))
    assert not launched(lambda: attention(*x))
    assert len(seen) == 1


def test_saved_tensor_hooks_may_change_strides() -> None:
    """Saved tensors that hooks returned with other strides are read with these."""
    x = warm(grad=True)
    for _ in range(4):
        out = attention(*x)
        torch.autograd.grad(out, x, torch.ones_like(out))

    def unpack(y: Tensor) -> Tensor:
        return y.mT.contiguous().mT if y.ndim == 4 else y

    with torch.autograd.graph.saved_tensors_hooks(lambda y: y, unpack):
        out = attention(*x)
    moved = launched(lambda: torch.autograd.grad(out, x, torch.ones_like(out)), *x)
    (q, *_) = next(launch[-1] for launch in moved if launch[0].name == "dq_kernel")
    assert q[0][3] == unpack(x[0]).stride()


def test_lazily_negated_tensors_are_resolved() -> None:
    """A tensor with torch's lazy negation bit is not replayed: torch negates it first."""
    q, k, v = tensors(dtype=torch.float32)
    negated = torch.zeros(q.shape, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    for x in [torch.zeros(q.shape, dtype=torch.complex64).imag] * 4 + [negated] * 4:
        LAUNCHES.clear()
        attention(x, k, v)
        launched_on = LAUNCHES[0].args[0][0]
        assert not launched_on.is_neg() and (launched_on.data_ptr() == x.data_ptr()) == (x is not negated)
    # The same of a cotangent.
    leaves = warm(grad=True)
    leaves = [y.float().detach().requires_grad_() for y in leaves]
    for dout in [torch.zeros(q.shape, dtype=torch.complex64).imag] * 4 + [negated] * 4:
        out = attention(*leaves)
        LAUNCHES.clear()
        torch.autograd.grad(out, leaves, dout)
        launched_on = next(x for x in LAUNCHES if x.kernel.name == "dq_kernel").args[3][0]
        assert not launched_on.is_neg() and (launched_on.data_ptr() == dout.data_ptr()) == (dout is not negated)


def test_cached_calls_refuse_second_derivatives() -> None:
    x = warm(grad=True)
    for _ in range(3):
        out = attention(*x)
        (dq,) = torch.autograd.grad(out, x[:1], torch.ones_like(out), create_graph=True)
        with pytest.raises(fused_attn.TransformError, match="double backward"):
            dq.sum().backward()


def test_caches_keep_no_tensor_alive() -> None:
    x = warm(grad=True)
    out = attention(*x)
    torch.autograd.grad(out, x, torch.ones_like(out))
    LAUNCHES.clear()
    kept = [weakref.ref(y) for y in (*x, out)]
    del x, out
    assert all(y() is None for y in kept)


def test_caches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_cache, "LIMIT", 3)
    monkeypatch.setattr(launch_cache, "LIMIT", 3)
    for n in range(1, 12):
        for _ in range(4):
            attention(*tensors(n=n, d=16 * n))
        assert len(call_cache._calls) <= 3 and len(launch_cache._compiled) <= 3


def test_keys_are_equal_only_for_equal_calls() -> None:
    """Calls have one key if and only if all that matters is the same; a tensor kept with its sign turned has none."""
    draw = random.Random(0)
    kinds = {
        "rows": (4, 8), "batch": (1, 2), "dtype": (torch.float32, torch.bfloat16), "start": (0, 8, 2), "turned": (0, 1),
        "negative": (0, 1), "parameter": (0, 1), "grad": (0, 1),
        "around": (contextlib.nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")),
    }  # fmt: skip

    def key(
        batch: int,
        rows: int,
        dtype: Any,
        start: int,
        turned: int,
        negative: int,
        parameter: int,
        grad: int,
        around: Any,
    ) -> Any:
        x = torch.zeros(1024, dtype=dtype)[start : start + batch * 2 * rows * 8].view(batch, 2, rows, 8)
        x = x.mT if turned else x
        x = torch._neg_view(x) if negative else x
        x = torch.nn.Parameter(x, requires_grad=False) if parameter else x
        x = x.requires_grad_() if grad else x
        with around():
            return call_cache._key((x,), ())

    alike = 0
    for _ in range(3000):
        one = {name: draw.choice(values) if draw.random() < 0.3 else values[0] for name, values in kinds.items()}
        other = {name: draw.choice(values) if draw.random() < 0.1 else one[name] for name, values in kinds.items()}
        first, second = key(**one), key(**other)
        assert [first is None, second is None] == [bool(x["negative"]) for x in (one, other)]
        if first is None or second is None:
            continue
        # Addresses count in 16 bytes, and a parameter is a tensor.
        same = all(one[x] == other[x] for x in kinds if x not in ("start", "parameter")) and (
            (one["start"] == 2) == (other["start"] == 2)
        )
        assert (first == second) == same
        alike += same
    assert 500 < alike < 2500
