"""torch.library operators of the linear-memory backends: `forward`, `backward`, `statistics` and `weights`.

They take a Problem as flat arguments; only `flatten` and `rebuild` know the order. Besides out and lse, forward returns
two numbers per row for backward. lse is their sum, which in one float32 would lose the second where the first is large:

    peak     the row's largest score; 0 for a fully masked row. The Triton kernels write the largest product instead
             where they fold the scale into the exponential (`folds` in kernels/types.py), and lse is then
             peak * scale + log_sum
    log_sum  the natural log of sum exp(score - largest score), including the sink

Importing this file needs torch alone; `dispatch` imports the modules of all backends. Compilers see an opaque operator.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..spec.checks import check_starts
from ..spec.dropout import Dropout
from ..spec.problem import DIFFERENTIABLE, Pattern, Problem, Ragged, Span, Statistics
from ..spec.torch_internals import is_fake

BACKEND_MODULES = {
    "hopper": "fused_attn.backends.triton.hopper",
    "triton": "fused_attn.backends.triton.portable",
    "sdpa": "fused_attn.backends.sdpa",
    "tiled": "fused_attn.backends.tiled.attention",
}
STATISTICS = {
    "triton": "fused_attn.backends.triton.statistics",
    "tiled": "fused_attn.backends.tiled.statistics",
}

PROBLEM = (
    "Tensor q, Tensor k, Tensor v, Tensor? scale, Tensor? softcap, Tensor? bias, Tensor? slopes, Tensor? sink, "
    "Tensor? w, Tensor? row_terms, Tensor? key_terms, Tensor? mask, Tensor? lo, Tensor? hi, "
    "Tensor? q_ids, Tensor? kv_ids, Tensor? blocks, Tensor? rng, Tensor? q_starts, Tensor? k_starts, "
    "float scale_value, float? softcap_value, float dropout_p, SymInt? left, SymInt? right, SymInt sinks, "
    "SymInt height, SymInt width, SymInt offset, SymInt max_q, SymInt max_k, "
    "bool bottom_right, bool deterministic, str normalizer, str backend"
)
# The tensors of PROBLEM, in order. "scale" and "softcap" are None where they are numbers.
NAMES = (
    "q", "k", "v", "scale", "softcap", "bias", "slopes", "sink", "w", "row_terms", "key_terms", "mask", "lo", "hi",
    "q_ids", "kv_ids", "blocks", "rng", "q_starts", "k_starts",
)  # fmt: skip
TENSOR_COUNT = len(NAMES)

_library = torch.library.Library("fused_attn", "DEF")
_library.define(f"forward({PROBLEM}) -> (Tensor out, Tensor lse, Tensor peak, Tensor log_sum)")
_library.define(
    f"backward({PROBLEM}, Tensor out, Tensor peak, Tensor log_sum, Tensor dout, Tensor? dlse, bool[] needs) -> "
    f"({', '.join(['Tensor'] * len(DIFFERENTIABLE))})"
)
_library.define(
    f"statistics({PROBLEM}, bool wants_mass, bool wants_entropy, bool wants_max, SymInt top_k) -> "
    f"({', '.join(f'Tensor {name}' for name in Statistics._fields)})"
)
_library.define(f"weights({PROBLEM}, SymInt[] rows, SymInt[] heads) -> Tensor")

_loaded: dict[str, ModuleType] = {}


def backend_module(backend: str) -> ModuleType:
    """The module that computes forward and backward for a backend."""
    return _module(BACKEND_MODULES[backend])


def _module(name: str) -> ModuleType:
    if name not in _loaded:
        _loaded[name] = importlib.import_module(name)
    return _loaded[name]


def flatten(p: Problem, backend: str) -> tuple[Any, ...]:
    """A Problem as the operators' arguments."""
    scale_is_tensor, cap_is_tensor = isinstance(p.scale, Tensor), isinstance(p.softcap, Tensor)
    span, pattern, dropout, ragged = p.span, p.pattern or Pattern(), p.dropout, p.ragged
    starts: tuple[Tensor | None, ...] = (None, None)
    longest = (0, 0, False)
    if ragged is not None:
        starts, longest = (ragged.q, ragged.k), (ragged.max_q, ragged.max_k, ragged.bottom_right)
    return (
        p.q, p.k, p.v, p.scale if scale_is_tensor else None, p.softcap if cap_is_tensor else None,
        p.bias, p.slopes, p.sink, p.w, p.row_terms, p.key_terms, p.mask, span.lo, span.hi,
        pattern.q_ids, pattern.kv_ids, pattern.blocks, None if dropout is None else dropout.rng,
        *starts, 1.0 if scale_is_tensor else p.scale, None if cap_is_tensor else p.softcap,
        0.0 if dropout is None else dropout.p, span.left, span.right, span.sinks, pattern.height, pattern.width,
        p.offset, *longest, p.deterministic, p.normalizer, backend,
    )  # fmt: skip


def rebuild(args: tuple[Any, ...]) -> tuple[Problem, str]:
    """The inverse of flatten."""
    (
        q, k, v, scale, cap, bias, slopes, sink, w, row_terms, key_terms, mask, lo, hi, q_ids, kv_ids, blocks, rng,
        q_starts, k_starts,
    ) = args[:TENSOR_COUNT]  # fmt: skip
    scale_value, cap_value, dropout_p, left, right, sinks, height, width, *rest, backend = args[TENSOR_COUNT:]
    offset, max_q, max_k, bottom_right, deterministic, normalizer = rest
    alignment = "bottom_right" if bottom_right else "top_left"
    problem = Problem(
        q, k, v, scale_value if scale is None else scale, cap_value if cap is None else cap,
        bias, slopes, sink, w, row_terms, key_terms, mask,
        None if q_ids is None and blocks is None else Pattern(q_ids, kv_ids, blocks, height, width), offset,
        None if rng is None else Dropout(dropout_p, rng), normalizer != "sigmoid", deterministic, normalizer,
        span=Span(left, right, lo, hi, sinks),
        ragged=None if q_starts is None else Ragged(q_starts, k_starts, max_q, max_k, alignment),
    )  # fmt: skip
    return problem, backend


def serving(p: Problem, backend: str) -> ModuleType:
    """The module that computes p for a backend."""
    # Without scores there is nothing to launch; `tiled` loops over no tiles and gives every backend's result.
    return backend_module("tiled" if p.empty else backend)


def _check_ragged(p: Problem) -> None:
    """Check the starts of sequences when the operator runs: under a compiler they were not readable before.

    Rows that belong to no sequence would be left uninitialized.
    """
    if p.ragged is not None:
        check_starts("q", p.ragged.q, p.q.shape[2], p.q.device, p.ragged.max_q)
        check_starts("k", p.ragged.k, p.k.shape[2], p.q.device, p.ragged.max_k)


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, backend = rebuild(args)
    _check_ragged(p)
    return serving(p, backend).forward(p)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    *problem, out, peak, log_sum, dout, dlse, needs = args
    p, backend = rebuild(tuple(problem))
    wanted = frozenset(name for name, need in zip(DIFFERENTIABLE, needs, strict=True) if need)
    # backward() may be called under autocast, which would change the dtypes of products.
    with torch.autocast(p.q.device.type, enabled=False):
        grads = serving(p, backend).backward(p, out, peak, log_sum, dout, dlse, wanted)
    return tuple(grads[name] if name in wanted else p.q.new_empty(0) for name in DIFFERENTIABLE)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, _ = rebuild(args)
    return p.empty_out(), p.empty_lse(), p.empty_lse(), p.empty_lse()


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    *problem, _, _, _, _, _, needs = args
    p, _ = rebuild(tuple(problem))
    tensors = p.tensors()
    return tuple(
        torch.empty_like(tensors[name]) if need else p.q.new_empty(0)
        for name, need in zip(DIFFERENTIABLE, needs, strict=True)
    )


def _statistics_module(p: Problem, backend: str) -> ModuleType:
    return _module(STATISTICS["tiled" if p.empty else backend])


def _as_tensors(p: Problem, statistics: Statistics) -> tuple[Tensor, ...]:
    return tuple(p.q.new_empty(0) if x is None else x for x in statistics)


def _statistics(*args: Any) -> tuple[Tensor, ...]:
    p, backend = rebuild(args[:-4])
    _check_ragged(p)
    return _as_tensors(p, _statistics_module(p, backend).statistics(p, *args[-4:]))


def _statistics_fake(*args: Any) -> tuple[Tensor, ...]:
    p, _ = rebuild(args[:-4])
    return _as_tensors(p, Statistics.fully_masked(p, *args[-4:]))


def _weights(*args: Any) -> Tensor:
    *problem, rows, heads = args
    p, backend = rebuild(tuple(problem))
    return _statistics_module(p, backend).weights(p, rows, heads)


def _weights_fake(*args: Any) -> Tensor:
    *problem, rows, heads = args
    p, _ = rebuild(tuple(problem))
    return p.q.new_empty((p.shape[0], len(heads), len(rows), p.shape[3]), dtype=p.lse_dtype)


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fused_attn::forward", _forward_fake)
torch.library.register_fake("fused_attn::backward", _backward_fake)
_library.impl("statistics", _statistics, "CompositeExplicitAutograd")
_library.impl("weights", _weights, "CompositeExplicitAutograd")
torch.library.register_fake("fused_attn::statistics", _statistics_fake)
torch.library.register_fake("fused_attn::weights", _weights_fake)


def _scores(p: Problem) -> int:
    """The number of scores without masking; fake sequences count as if all had the longest length."""
    b, heads, m, n = p.shape
    if p.ragged is None or is_fake(p.ragged.q) or p.ragged.q.is_meta:
        return b * heads * m * n
    return heads * int((p.ragged.q.diff().long() * p.ragged.k.diff()).sum())


@register_flop_formula(torch.ops.fused_attn.forward, get_raw=True)
def _forward_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Two products per score, as torch counts its own attention."""
    p, _ = rebuild(args)
    return 2 * _scores(p) * (p.q.shape[3] + p.v.shape[3])


@register_flop_formula(torch.ops.fused_attn.backward, get_raw=True)
def _backward_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Five products per score."""
    p, _ = rebuild(args[:-6])
    return 2 * _scores(p) * (3 * p.q.shape[3] + 2 * p.v.shape[3])
