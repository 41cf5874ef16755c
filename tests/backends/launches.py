"""The arguments of the driver's launch call, under a compiled triton and a stand-in for the device.

Run by test_launches.py in a process of its own for each version of triton, because interpreted and compiled kernels
cannot share one. Nothing is compiled: a kernel is an empty box for each key of Triton's own, so a launch by the wrong
kernel is a launch by another box.
"""

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
import triton.compiler
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.experimental.gluon import language as gl
from triton.language import constexpr
from triton.runtime import driver, jit
from triton.tools.tensor_descriptor import TensorDescriptor

import fused_attn
from bench import host
from fused_attn import Mask, testing, tuning
from fused_attn.api import varlen
from fused_attn.backends.triton import hopper, launch_cache, launcher, portable, recording, settings
from fused_attn.runtime import call_cache
from fused_attn.spec import checks, decoding
from fused_attn.tuning import Config

LAUNCHES: list[Launch] = []


class Launch:
    """One launch as the driver sees it."""

    def __init__(self, box: Any, grid: tuple[int, ...], stream: int, args: tuple[Any, ...]) -> None:
        self.box, self.grid, self.stream, self.args = box, grid, stream, args

    def facts(self, own: dict[int, str]) -> Any:
        """All of it, with pointers as names: of `own`, or of memory made meanwhile, by its metadata."""

        def seen(x: Any) -> Any:
            if isinstance(x, Tensor):
                name, aligned = own.get(x.data_ptr()), x.data_ptr() % 16 == 0
                return (name, x.dtype, aligned) if name else ("made", x.dtype, x.shape, x.stride(), aligned)
            if isinstance(x, tuple):
                return tuple(map(seen, x))
            if isinstance(x, launch_cache.DESCRIPTORS):
                return seen(x.base), x.shape, x.strides, x.block_shape, x.padding
            return x.value if isinstance(x, constexpr) else x

        return self.box, self.grid, self.stream, seen(self.args)


def compiled(source: Any, target: Any = None, options: Any = None, **_: Any) -> CompiledKernel:
    if knobs.compilation.listener is not None:
        knobs.compilation.listener(src=source)
    box = object.__new__(CompiledKernel)
    box.src, box.module, box.function, box.packed_metadata = source, object(), object(), (4, 1, 0)
    box.name = source.fn.fn.__name__
    box.metadata, box.hash = None, ""

    def run(x: int, y: int, z: int, stream: int, function: Any, metadata: Any, *rest: Any) -> None:
        if isinstance(driver.active, host.Driver):
            return  # which takes no notes
        launched, enter, _, *args = rest
        assert (function, metadata) == (box.function, box.packed_metadata)
        if enter is not None:
            enter(launched)
        LAUNCHES.append(Launch(box, (x, y, z), stream, tuple(args)))

    box._run = run
    return box


class Machine:
    """A driver of one device."""

    def __init__(self) -> None:
        self.device = self.stream = 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + 100 * device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setattr(triton.compiler, "compile", compiled)
    monkeypatch.setattr(settings, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(settings, "interpreted", lambda: True)
    monkeypatch.setattr(hopper, "_machine", lambda device: [])
    monkeypatch.setattr(hopper, "_multiprocessors", lambda device: 132)
    found = Machine()
    driver.set_active(found)
    for kernels in (*vars(portable._device_code()).values(), *vars(hopper._device_code()).values()):
        if isinstance(kernels, jit.JITFunction):
            kernels.device_caches.clear()
    for remembered in (launch_cache._compiled, call_cache._calls, call_cache._replays, LAUNCHES):
        remembered.clear()
    yield found


def tensors(b: int = 2, h: int = 4, g: int = 2, m: int = 48, n: int = 48, d: int = 32, **how: Any) -> list[Tensor]:
    shapes = ((b, h, m, d), (b, g, n, d), (b, g, n, d))
    return [
        torch.zeros(x, dtype=how.get("dtype", torch.bfloat16), requires_grad=how.get("grad", False)) for x in shapes
    ]


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    return fused_attn.attention(q, k, v, **({"backend": "triton"} | options))


def launched(work: Callable[[], Any], *known: Tensor | None) -> list[Any]:
    """The facts of what work launches."""
    LAUNCHES.clear()
    kept = work()
    own = {x.data_ptr(): f"known {i}" for i, x in enumerate(known) if x is not None}
    facts = [x.facts(own) for x in LAUNCHES]
    LAUNCHES.clear()
    del kept
    return facts


def replays(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each replay that was asked for took place, from now on."""
    asked: list[bool] = []
    real = recording.Replay.__call__

    def call(self: Any, given: Any) -> Any:
        found = real(self, given)
        asked.append(found is not None)
        return found

    monkeypatch.setattr(recording.Replay, "__call__", call)
    return asked


# Options by name, as functions of B, Hq, M, N; tensors of their own are made anew for each call.
VARIANTS: dict[str, Callable[..., dict[str, Any]]] = {
    "plain": lambda b, h, m, n: {},
    "causal": lambda b, h, m, n: {"causal": True, "alignment": "bottom_right"},
    "window": lambda b, h, m, n: {"window": (7, 3), "alignment": "top_left", "return_lse": True},
    "left": lambda b, h, m, n: {"window": (7, None), "alignment": "bottom_right"},
    "scale": lambda b, h, m, n: {"scale": 0.5, "softcap": 3.0},
    "mask": lambda b, h, m, n: {"mask": torch.ones(b, 1, m, n, dtype=torch.bool)},
    "bias": lambda b, h, m, n: {"bias": torch.zeros(1, h, m, n, requires_grad=True)},
    "full bias": lambda b, h, m, n: {"bias": torch.zeros(b, h, m, n, requires_grad=True)},
    "column bias": lambda b, h, m, n: {"bias": torch.zeros(b, 1, 1, n, requires_grad=True)},
    "alibi": lambda b, h, m, n: {"alibi_slopes": torch.zeros(h, requires_grad=True), "alignment": "top_left"},
    "sink": lambda b, h, m, n: {"sink": torch.zeros(h, requires_grad=True), "return_lse": True},
    "lengths": lambda b, h, m, n: {"mask": fused_attn.Mask.lengths(torch.full((b,), n))},
    "learned scale": lambda b, h, m, n: {"scale": torch.ones(h, requires_grad=True)},
    "dropout": lambda b, h, m, n: {"dropout_p": 0.5, "seed": 1},
    "nondeterministic": lambda b, h, m, n: {"deterministic": False},
}
RECORDED = {"plain", "causal", "window", "left", "scale", "mask", "bias", "full bias", "nondeterministic"}
FORWARD_ONLY = {"column bias", "alibi", "sink"}  # the backward adds up in torch


SIZES: tuple[dict[str, Any], ...] = (
    {}, {"m": 7, "n": 130}, {"d": 40, "dtype": torch.float16}, {"dtype": torch.float32}, {"d": 256},
    {"d": 64, "backend": "hopper"},
)  # fmt: skip
LACKING = {"mask", "lengths", "dropout"}  # of the Hopper kernels


@pytest.mark.parametrize(
    ("name", "sizes"), [(x, sizes) for x in VARIANTS for sizes in SIZES if not ("backend" in sizes and x in LACKING)]
)
def test_a_replay_launches_what_the_long_way_does(
    name: str, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, on new tensors each time: the same boxes, grids, numbers and pointers."""
    asked = replays(monkeypatch)
    found = []
    for _ in range(5):
        q, k, v = tensors(**sizes, grad=True)
        options = VARIANTS[name](q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        options["backend"] = sizes.get("backend", "triton")
        own = [q, k, v, *(x for x in options.values() if isinstance(x, Tensor))]

        def work(q: Tensor = q, k: Tensor = k, v: Tensor = v, options: dict[str, Any] = options) -> Any:
            result = attention(q, k, v, **options)
            out, lse = result if isinstance(result, tuple) else (result, None)
            wanted = [x for x in (q, k, v, *options.values()) if isinstance(x, Tensor) and x.requires_grad]
            given = [(x, torch.ones_like(x)) for x in (out, lse) if x is not None]
            grads = torch.autograd.grad([x for x, _ in given], wanted, [g for _, g in given])
            for x, g in zip(wanted, grads, strict=True):
                assert (g.shape, g.dtype, g.stride()) == (x.shape, x.dtype, torch.empty_like(x).stride())
            return result, grads, given

        found.append(launched(work, *own))
    assert len(found[0]) >= 3
    assert all(x == found[0] for x in found)
    if options.keys() & {"mask", "bias"} and k.shape[2] == 130:
        assert not any(asked)  # rows that are not aligned are copied first
    elif name in RECORDED:
        assert asked == [True, True] * 2  # forward and backward of the last two
    elif name in FORWARD_ONLY:
        assert asked == [True, False] * 2
    else:
        assert not asked


def test_keys_come_by_descriptors_where_tma_can_copy_them() -> None:
    """On sm_90, head dim 256; elsewhere by pointers, with a configuration that has registers for them."""
    q, k, _ = tensors(d=256)
    odd = torch.zeros(k.numel() + 4, dtype=k.dtype)[4:].view(k.shape)
    roomy = tensors(n=64, d=256)[1][:, :, :48]
    copied = {"dense": k, "bshd": k.transpose(1, 2).contiguous().transpose(1, 2), "roomy": roomy}
    refused = {"one head for all": k[:, :1].expand(k.shape), "odd": odd, "columns": k.mT.contiguous().mT}
    for name, x in (copied | refused).items():
        LAUNCHES.clear()
        attention(q, x, x)
        words = dict(zip(LAUNCHES[0].box.src.fn.arg_names, LAUNCHES[0].args, strict=True))
        chosen = tuning.config("forward", "sm_90", q.dtype, 256, 256, with_modifiers=name in refused)
        assert chosen.descriptors is (name in copied)
        assert (words["BLOCK_N"], words["OVERLAP"]) == (chosen.BLOCK_N, chosen.overlap)
        for box in (words["k_desc"], words["v_desc"]):
            if name in refused:
                assert box is None
            else:
                assert box.base is x and box.shape == [2, 2, 48, 256] and box.strides == [*x.stride()]
                assert box.block_shape == [1, 1, chosen.BLOCK_N, 256]


@pytest.mark.parametrize("words", [{}, {"is_causal": True}, {"enable_gqa": True}, {"attn_mask": torch.bool},
                                   {"attn_mask": torch.float32}, {"scale": 0.5, "window": (3, 4)}])  # fmt: skip
def test_the_door_of_torch_replays(words: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replays(monkeypatch)
    found = []
    for _ in range(5):
        q, k, v = tensors(g=2 if words.get("enable_gqa") else 4)
        options = {n: torch.ones(2, 1, 48, 48, dtype=x) if n == "attn_mask" else x for n, x in words.items()}
        call = lambda: fused_attn.scaled_dot_product_attention(q, k, v, **options, backend="triton")  # noqa: B023, E731
        found.append(launched(call, q, k, v, options.get("attn_mask")))
    assert len(found[0]) == 1 and all(x == found[0] for x in found)
    assert asked == [True, True]


def test_one_tensor_thrice_is_not_three_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = replays(monkeypatch)
    x = torch.zeros(1, 2, 32, 32)
    for _ in range(4):
        attention(x, x, x)
    q, k, v = (torch.zeros(1, 2, 32, 32) for _ in range(3))
    (facts,) = launched(lambda: attention(q, k, v), q, k, v)
    assert asked == [True, True]
    assert [facts[-1][i][0][0] for i in range(3)] == ["known 0", "known 1", "known 2"]


def warm(**options: Any) -> list[Tensor]:
    """Tensors with which a call has been made until it is replayed."""
    found = tensors(grad=options.pop("grad", False))
    for _ in range(4):
        attention(*found, **options)
    return found


def block_of(kernel: str) -> int:
    """BLOCK_M of the last launch of a kernel."""
    last = [x for x in LAUNCHES if x.box.name == kernel][-1]
    return last.args[last.box.src.fn.arg_names.index("BLOCK_M")]


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
def test_a_changed_call_is_another_call(name: str) -> None:
    """After a call has been recorded, one that differs launches what it launches where nothing is remembered."""
    changed, options = CHANGES[name](warm())
    after = [launched(lambda: attention(*changed, **options), *changed) for _ in range(5)]
    for remembered in (launch_cache._compiled, call_cache._calls):
        remembered.clear()
    expected = launched(lambda: attention(*changed, **options), *changed)
    assert all(x == expected for x in after)


@pytest.mark.parametrize("option", [{"window": (1, True)}, {"window": [1, 1.0]}, {"softcap": True}, {"scale": True}])
def test_what_equals_is_not_what_is_meant(option: dict[str, Any]) -> None:
    """1, 1.0 and True are one to Python; what is refused stays refused beside what is remembered."""
    twin = {name: (1, 1) if name == "window" else 1.0 for name in option}
    x = warm(**twin)
    with pytest.raises(TypeError, match=next(iter(option))):
        attention(*x, **option)


def test_configurations_are_scoped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scope counts for calls recorded outside of it, and leaves nothing behind; backward keeps forward's."""
    x = warm(grad=True)
    asked = replays(monkeypatch)
    usual = launched(lambda: attention(*x), *x)
    with tuning.override(forward=Config(16, 32, 1, 1), dq=Config(16, 16, 1, 1)):
        scoped = [launched(lambda: attention(*x), *x) for _ in range(3)]
        out = attention(*x)
    LAUNCHES.clear()
    torch.autograd.grad(out, x, torch.ones_like(out), retain_graph=True)
    assert block_of("dq_kernel") == 16
    assert scoped[0] != usual and scoped[1:] == scoped[:-1]
    assert launched(lambda: attention(*x), *x) == usual
    assert asked == [True, False, False, False, False, True]


def test_a_thread_of_its_own_differentiates_in_the_scope_of_the_forward() -> None:
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


def test_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tensors()
    monkeypatch.setenv("FUSED_ATTN_BACKEND", "triton")
    for _ in range(4):
        assert launched(lambda: attention(*x, backend=None))
    monkeypatch.setenv("FUSED_ATTN_BACKEND", "tiled")
    assert not launched(lambda: attention(*x, backend=None))


def test_gradients_are_had_where_they_are_wanted() -> None:
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


def test_autocast_casts() -> None:
    x = [y.float() for y in tensors()]
    for _ in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert attention(*x).dtype == torch.bfloat16
        assert attention(*x).dtype == torch.float32


def test_the_stream_is_asked_for_at_each_call(machine: Machine) -> None:
    x = warm()
    for machine.stream in (3, 4):
        (facts,) = launched(lambda: attention(*x))
        assert facts[2] == machine.stream


def test_another_device_has_kernels_of_its_own(machine: Machine) -> None:
    x = warm()
    (first,) = launched(lambda: attention(*x))
    machine.device = 1
    boxes = [launched(lambda: attention(*x))[0][0] for _ in range(4)]
    assert first[0] not in boxes and len(set(boxes)) == 1


def test_tensors_of_a_device_that_is_not_the_current_one(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch is on the tensors' device and on a stream of that device."""

    @contextlib.contextmanager
    def there(_: Tensor) -> Iterator[None]:
        before, machine.device = machine.device, 1
        yield
        machine.device = before

    monkeypatch.setattr(settings, "device_of", there)
    x = tensors()
    facts = [launched(lambda: attention(*x))[0] for _ in range(5)]
    assert {y[2] for y in facts} == {100} and len({y[0] for y in facts}) == 1


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


def test_hooks_of_a_kernel_see_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = warm()
    seen: list[Any] = []
    hooks = [lambda *args, **options: seen.append(options["BLOCK_M"])]
    monkeypatch.setattr(portable._device_code().forward, "pre_run_hooks", hooks)
    assert len(launched(lambda: attention(*x))) == len(seen) == 1


def test_debugging_compiles_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    x = warm()
    (usual,) = launched(lambda: attention(*x))
    monkeypatch.setattr(knobs.runtime, "debug", True)
    (debugged,) = launched(lambda: attention(*x))
    assert debugged[0] is not usual[0]


def test_who_replaces_the_launcher_sees_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = warm()
    seen = []
    monkeypatch.setattr(launcher, "launch", lambda kernel, *args, **options: seen.append(kernel))
    assert not launched(lambda: attention(*x))
    assert len(seen) == 1


def test_hooks_on_saved_tensors_may_change_their_strides() -> None:
    """What backward is given need not lie where forward's tensors lay."""
    x = warm(grad=True)
    for _ in range(4):
        out = attention(*x)
        torch.autograd.grad(out, x, torch.ones_like(out))

    def unpack(y: Tensor) -> Tensor:
        return y.mT.contiguous().mT if y.ndim == 4 else y

    with torch.autograd.graph.saved_tensors_hooks(lambda y: y, unpack):
        out = attention(*x)
    moved = launched(lambda: torch.autograd.grad(out, x, torch.ones_like(out)), *x)
    (q, *_) = next(facts[-1] for facts in moved if facts[0].name == "dq_kernel")
    assert q[0][3] == unpack(x[0]).stride()


def test_signs_that_are_kept_aside_are_not_lost() -> None:
    """A view whose numbers are to be read with the other sign takes the long way, where torch turns them."""
    q, k, v = tensors(dtype=torch.float32)
    turned = torch.zeros(q.shape, dtype=torch.complex64).conj().imag
    assert turned.is_neg()
    for x in [torch.zeros(q.shape, dtype=torch.complex64).imag] * 4 + [turned] * 4:
        LAUNCHES.clear()
        attention(x, k, v)
        seen = LAUNCHES[0].args[0][0]
        assert not seen.is_neg() and (seen.data_ptr() == x.data_ptr()) == (x is not turned)
    # The same of a cotangent.
    leaves = warm(grad=True)
    leaves = [y.float().detach().requires_grad_() for y in leaves]
    for dout in [torch.zeros(q.shape, dtype=torch.complex64).imag] * 4 + [turned] * 4:
        out = attention(*leaves)
        LAUNCHES.clear()
        torch.autograd.grad(out, leaves, dout)
        seen = next(x for x in LAUNCHES if x.box.name == "dq_kernel").args[3][0]
        assert not seen.is_neg() and (seen.data_ptr() == dout.data_ptr()) == (dout is not turned)


def test_second_derivatives_are_still_refused() -> None:
    x = warm(grad=True)
    for _ in range(3):
        out = attention(*x)
        (dq,) = torch.autograd.grad(out, x[:1], torch.ones_like(out), create_graph=True)
        with pytest.raises(fused_attn.TransformError, match="double backward"):
            dq.sum().backward()


def test_nothing_stays_alive() -> None:
    x = warm(grad=True)
    out = attention(*x)
    torch.autograd.grad(out, x, torch.ones_like(out))
    LAUNCHES.clear()
    kept = [weakref.ref(y) for y in (*x, out)]
    del x, out
    assert all(y() is None for y in kept)


def test_the_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_cache, "LIMIT", 3)
    monkeypatch.setattr(launch_cache, "LIMIT", 3)
    for n in range(1, 12):
        for _ in range(4):
            attention(*tensors(n=n, d=16 * n))
        assert len(call_cache._calls) <= 3 and len(launch_cache._compiled) <= 3


def test_what_differs_has_another_key() -> None:
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


# --- the key beside the binder's

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int8, torch.bool)
NUMBERS = (
    0, 1, -1, 2, 3, 7, 15, 16, 17, 32, 48, -16, -17, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1, 2**32,
    2**40 + 16, 2**62, 2**63 - 1, 2**63, 2**63 + 16, 2**64 - 1, -(2**63),
)  # fmt: skip


class Draw:
    """Arguments of kernels, at random: from few enough kinds that many are alike to the binder."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.memory = {x: torch.empty(64, dtype=x) for x in DTYPES}
        self.far = torch.empty(2**31 + 64, dtype=torch.int8)  # never touched

    def number(self) -> int:
        return self.random.choice(NUMBERS) if self.random.random() < 0.7 else self.random.randrange(-(2**34), 2**34)

    def tensor(self) -> Tensor:
        start = self.random.choice((0, 0, 0, 1, 2, 4, 8, 16))
        if self.random.random() < 0.1:
            return self.far[start:]
        x = self.memory[self.random.choice(DTYPES)][start:]
        return torch.nn.Parameter(x, requires_grad=False) if self.random.random() < 0.1 else x

    def option(self, x: Any) -> Any:
        return self.random.choice((1, True, 16)) if self.random.random() < 0.02 else x

    def constant(self) -> constexpr:
        return constexpr(self.random.choice((0, 1, 2, 8, True, False, None)))

    def like(self, x: Any, depth: int = 0) -> Any:
        """Something that could stand where x does, or x."""
        r = self.random
        if isinstance(x, tuple):
            made = [self.like(y, depth + 1) if r.random() < 0.25 else y for y in x]
            return None if depth and r.random() < 0.05 else type(x)(*made) if hasattr(x, "_fields") else tuple(made)
        if r.random() < 0.15:
            return r.choice((None, 0.5, 1.0, True, self.number(), self.tensor(), self.constant(), (self.number(), 0.5)))
        if isinstance(x, Tensor):
            return self.tensor()
        if isinstance(x, constexpr):
            return self.constant()
        if isinstance(x, bool) or x is None or isinstance(x, float):
            return r.choice((x, 0.25))
        return self.number()


def launches_of_everything() -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Each kernel of the package with the arguments of real calls."""
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "launch", lambda kernel, grid, *args, **options: seen.append((kernel, args, options)))
        for name in ("everything", "bias_1hmn", "dropout", "lengths", "gqa_window"):
            if name in testing.CASES:
                p = testing.make_inputs(name, torch.float16).problem()
                out, lse, *normaliser = portable.forward(p)
                portable.backward(p, out, *normaliser, torch.empty_like(out), lse, frozenset(p.tensors()))
    return seen


@pytest.mark.parametrize("target", [GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)], ids=["cuda", "hip"])
def test_equal_signatures_are_equal_to_the_binder(target: GPUTarget, machine: Machine) -> None:
    """Random arguments for every kernel: no two of one signature have two keys in Triton."""
    machine.get_current_target = lambda: target  # type: ignore[method-assign]
    draw = Draw(0)
    originals = launches_of_everything()
    assert len({kernel.fn.__name__ for kernel, _, _ in originals}) == 5
    keys: dict[Any, str] = {}
    asked = unknown = 0
    for kernel, args, options in originals:
        binder = kernel.device_caches[0][4]
        for _ in range(250):
            where = draw.random.choices(range(len(args)), k=draw.random.choice((1, 1, 2)))
            changed = tuple(draw.like(x) if i in where else x for i, x in enumerate(args))
            words = {
                n: draw.random.choice((x, 1, True, 16)) if draw.random.random() < 0.05 else x
                for n, x in options.items()
            }
            ours = launch_cache.signature(kernel, changed, words, 0)
            if ours is None:
                unknown += 1
                continue
            _, specialization, rest = binder(*changed, **words, debug=False, instrumentation_mode="")
            theirs = jit.compute_cache_key({}, specialization, rest)
            assert keys.setdefault(ours, theirs) == theirs, f"{kernel.fn.__name__}: {ours}"
            asked += 1
    assert unknown < 0.02 * asked
    # Not vacuous: many had a signature that others had; nor much finer than need be.
    binders = len(set(keys.values()))
    assert len(keys) < 0.75 * asked, (len(keys), asked)
    assert len(keys) < 1.1 * binders, (len(keys), binders)


@pytest.mark.parametrize("target", [GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)], ids=["cuda", "hip"])
def test_every_kind_of_argument_against_the_binder(target: GPUTarget) -> None:
    """One argument at a time: what two arguments share in our eyes, they share in the binder's."""
    backend = triton.compiler.make_backend(target)
    draw = Draw(1)
    values: list[Any] = [*NUMBERS, *range(-70, 70), 0.0, 0.5, 1.0, None]
    values += [constexpr(x) for x in (0, 1, True, False, None, 8, "x", 0.5)]
    values += [x[i:] for x in (*draw.memory.values(), draw.far) for i in range(20)]
    values += [(x, y) for x in values[::7] for y in values[::11]]
    values += [
        TensorDescriptor(x, [n, 16], [16, 1], [rows, columns], padding)
        for x in draw.memory.values() for n in (3, 4) for rows in (1, 16) for columns in (16, 32)
        for padding in (("zero", "nan") if x.is_floating_point() else ("zero",))
    ]  # fmt: skip
    values += [
        launch_cache.GluonDescriptor(
            x, [n, 16], [16, 1], [rows, 16], gl.NVMMASharedLayout(swizzle, 8 * x.element_size(), 2)
        )
        for x in draw.memory.values() if x.element_size() > 1 for n in (3, 4) for rows in (8, 16)
        for swizzle in (0, 32)
    ]  # fmt: skip
    classes: dict[Any, Any] = {}
    for x in values:
        theirs = str(jit.native_specialize_impl(backend, x, False, True, True))
        assert classes.setdefault(launch_cache.classify(x, target.backend == "hip"), theirs) == theirs, x
    with pytest.raises(launch_cache.Unknown):
        launch_cache.classify((1, object()))


def test_unknown_arguments_go_to_the_binder() -> None:
    """Triton launches them each time, and nothing is recorded."""

    class Strange:
        pass

    kernel = portable._device_code().delta
    assert launch_cache.signature(kernel, (Strange(),), {"DV": 1, "BLOCK_DV": 1, "BLOCK_M": 1}, 0) is None
    recorder = recording.Recorder((), ())
    with pytest.raises(recording.NotRecordable):
        recorder.launched(None, kernel, 1, (Strange(),), {})


def test_work_that_a_replay_could_not_repeat_is_not_kept() -> None:
    q, _, _ = tensors()

    def works() -> Iterator[Callable[[Tensor], tuple[Tensor, ...]]]:
        yield lambda x: (torch.empty_like(x).add_(1),)  # writes
        yield lambda x: (x.new_empty(2).fill_(x[0, 0, 0, 0].item()),)
        yield lambda x: (x.new_full((2,), x.sum().item()),)  # reads a value
        yield lambda x: (x.nonzero(),)  # its shape depends on values
        yield lambda x: (torch.rand_like(x),)
        yield lambda x: (q,)  # not an argument

    for work in works():
        _, kept = recording.record(work, (q,))
        assert kept is not None and kept((q,)) is None


def test_operators_are_replayed_on_the_tensors_of_each_call() -> None:
    q, k, _ = tensors()

    def work(x: Tensor) -> tuple[Tensor, ...]:
        x.transpose(1, 2) * 2  # used by nothing
        made = x.new_empty_strided((3, 2), (1, 3))
        ranked = x.float().sort(descending=True)
        return made, torch.zeros_like(x), x[:1].exp(), ranked.values, torch.cat([ranked.indices, ranked.indices])

    results, kept = recording.record(work, (q,))
    for x in (q, k):
        assert kept is not None
        first, *found = kept((x,))
        made, *expected = work(x)
        assert all(map(torch.equal, found, expected)) and len(found) == 4
        assert (first.shape, first.stride(), first.dtype) == (made.shape, made.stride(), made.dtype)
        assert first.data_ptr() != results[0].data_ptr()


# --- calls whose index tensors are not read


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, index tensors are not read."""
    for module in (checks, decoding, varlen):
        monkeypatch.setattr(module, "readable", lambda x: False)


DECODED: dict[str, dict[str, Any]] = {
    "lengths": {},
    "a length": {"cache_seqlens": 17},
    "pages": {"page_table": torch.arange(8, dtype=torch.int64).view(2, 4)},
    "rotary": {"rotary": (torch.zeros(64, 16), torch.zeros(64, 16), False)},
    "splits": {"num_splits": 4, "window": (9, 0)},
    "sink": {"sink": torch.zeros(4), "softcap": 3.0},
    "no new keys": {"k_new": None, "v_new": None},
}


def decoded(name: str) -> tuple[dict[str, Any], list[Tensor]]:
    """Fresh arguments of a step of decoding, and its tensors."""
    k, v = torch.zeros(2, *((8, 16) if name == "pages" else (2, 64)), 2, 64, dtype=torch.bfloat16)
    call = {
        "q": torch.zeros(2, 1, 4, 64, dtype=torch.bfloat16), "k_cache": k, "v_cache": v, "causal": True,
        "cache_seqlens": torch.full((2,), 17, dtype=torch.int32), "backend": "triton",
        **{n: torch.zeros(2, 1, 2, 64, dtype=torch.bfloat16) for n in ("k_new", "v_new")}, **DECODED[name],
    }  # fmt: skip
    rotary: tuple[Any, ...] = call.get("rotary", ())
    return call, [x for x in (*call.values(), *rotary) if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", DECODED)
def test_a_replayed_step_of_decoding_launches_what_the_first_does(
    name: str, monkeypatch: pytest.MonkeyPatch, unread: None
) -> None:
    asked, found = replays(monkeypatch), []
    for _ in range(5):
        call, own = decoded(name)
        found.append(launched(lambda call=call: fused_attn.attention_decode(**call), *own))
    assert found[0] and all(x == found[0] for x in found)
    assert asked == [True] * (0 if name == "a length" else 3)


@pytest.mark.parametrize("other", ("capacity", "causal", "softcap", "lengths"))
def test_a_step_that_differs_is_not_replayed(other: str, monkeypatch: pytest.MonkeyPatch, unread: None) -> None:
    for _ in range(3):
        fused_attn.attention_decode(**decoded("lengths")[0])
    asked = replays(monkeypatch)
    call, _ = decoded("lengths")
    call |= {
        "capacity": {x: call[x][:, :40] for x in ("k_cache", "v_cache")}, "causal": {"causal": False},
        "softcap": {"softcap": 1.0}, "lengths": {"cache_seqlens": 1},
    }[other]  # fmt: skip
    fused_attn.attention_decode(**call)
    assert not asked


def test_caches_that_overlap_are_refused_whatever_was_replayed(unread: None) -> None:
    for _ in range(3):
        fused_attn.attention_decode(**decoded("lengths")[0])
    call, _ = decoded("lengths")
    with pytest.raises(ValueError, match="v_cache"):
        fused_attn.attention_decode(**call | {"v_cache": call["k_cache"]})


@pytest.mark.parametrize(
    "options", ({}, {"causal": True}, {"mask": Mask.window(5, 0, sinks=2)}, {"softcap": 2.0}), ids=str
)
@pytest.mark.parametrize("grad", (False, True))
def test_a_replayed_packed_batch_launches_what_the_first_does(
    options: dict[str, Any], grad: bool, monkeypatch: pytest.MonkeyPatch, unread: None
) -> None:
    asked, found = replays(monkeypatch), []
    for n in range(5):
        q, k, v = (torch.zeros(90, 4, 64, dtype=torch.bfloat16, requires_grad=grad) for _ in range(3))
        starts = torch.tensor([0, 40 + n, 90], dtype=torch.int32)

        def work(q: Tensor = q, k: Tensor = k, v: Tensor = v, starts: Tensor = starts) -> Any:
            out: Any = fused_attn.attention_varlen(
                q, k, v, starts, starts, max_seqlen_q=64, max_seqlen_k=64, backend="triton", **options
            )
            return out, torch.autograd.grad(out, (q, k, v), torch.ones_like(out)) if grad else None

        found.append(launched(work, q, k, v, starts))
    assert found[0] and all(x == found[0] for x in found)
    assert any(asked) or "mask" in options


# --- what it is for


def test_unseen_lengths_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's own report of what it was asked to compile, whoever asked; replays included."""
    asked = replays(monkeypatch)
    monkeypatch.setattr(knobs.compilation, "listener", None)
    found = host.compilations(12)["kinds"]
    assert {name: x["unseen lengths"] for name, x in found.items()} == dict.fromkeys(host.KINDS, 0)
    assert all(x["warm-up"] >= 1 for x in found.values())
    assert sum(asked) >= 12 * len(host.KINDS)


# An idle machine measures 2.4, 3.9 and 5.1. On a busy one another run may be better.
LIMITS = {"inference": 3.0, "autograd forward": 4.7, "backward": 6.5}


def test_host_time_of_a_call() -> None:
    """As a ratio to an empty operator with the same outputs, the launch itself dropped."""
    least = dict.fromkeys(LIMITS, float("inf"))
    for _ in range(4):
        ratios = host.overhead(1200)["ratios"]
        least = {name: min(x, ratios[name]) for name, x in least.items()}
        if all(least[name] <= limit for name, limit in LIMITS.items()):
            return
    pytest.fail(f"{least} where {LIMITS} are allowed")
