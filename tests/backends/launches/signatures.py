"""The launch cache's signature beside the key of Triton's binder."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import triton.compiler
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.language import constexpr
from triton.runtime import jit
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_attn import testing
from fused_attn.backends.triton import launch_cache, launcher, portable
from tests.backends.launches.stub import Machine

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
def test_equal_signatures_have_equal_triton_keys(target: GPUTarget, machine: Machine) -> None:
    """Random arguments for every kernel: no two of one signature have two keys in Triton."""
    machine.get_current_target = lambda: target  # type: ignore[method-assign]
    draw = Draw(0)
    originals = launches_of_everything()
    assert len({kernel.fn.__name__ for kernel, _, _ in originals}) == 5
    keys: dict[Any, str] = {}
    compared = unknown = 0
    for kernel, args, options in originals:
        binder = kernel.device_caches[0][4]
        for _ in range(250):
            where = draw.random.choices(range(len(args)), k=draw.random.choice((1, 1, 2)))
            changed = tuple(draw.like(x) if i in where else x for i, x in enumerate(args))
            changed_options = {
                n: draw.random.choice((x, 1, True, 16)) if draw.random.random() < 0.05 else x
                for n, x in options.items()
            }
            ours = launch_cache.signature(kernel, changed, changed_options, 0)
            if ours is None:
                unknown += 1
                continue
            _, specialization, rest = binder(*changed, **changed_options, debug=False, instrumentation_mode="")
            theirs = jit.compute_cache_key({}, specialization, rest)
            assert keys.setdefault(ours, theirs) == theirs, f"{kernel.fn.__name__}: {ours}"
            compared += 1
    assert unknown < 0.02 * compared
    # Not vacuous: many had a signature that others had; nor much finer than need be.
    binders = len(set(keys.values()))
    assert len(keys) < 0.75 * compared, (len(keys), compared)
    assert len(keys) < 1.1 * binders, (len(keys), binders)


@pytest.mark.parametrize("target", [GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)], ids=["cuda", "hip"])
def test_argument_classes_agree_with_triton(target: GPUTarget) -> None:
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
