"""`attention_stats` and `attention_map`: statistics of the attention weights, and weights of chosen rows and heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..backends import reference
from ..runtime import dispatch, ops
from ..runtime.autocast import no_autocast
from ..runtime.no_derivative import without_derivative
from ..spec.checks import as_bool, as_int, check_dense, describe
from ..spec.options import Options
from ..spec.problem import Mask, Problem, Statistics
from . import keywords
from .bind import bind, heads_first
from .varlen import bind_packed


@keywords.closed
def attention_stats(
    q: Tensor,
    k: Tensor,
    *extra: NoReturn,
    key_mass: bool = False,
    entropy: bool = False,
    max_logit: bool = False,
    top_k: int = 0,
    score: Any = "dot",
    scale: float | Tensor | None = None,
    mask: Tensor | Mask | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    alignment: str | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | Tensor | None = None,
    sink: Tensor | None = None,
    normalizer: str = "softmax",
    layout: str = "bhsd",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Statistics:
    """Statistics of the attention weights, in linear memory: no (M, N) matrix is materialized.

    With s_ij the scores of `attention` and P_ij its weights before dropout, P_ij = exp(s_ij) / (sum_j exp(s_ij) +
    exp(sink)), or sigmoid(s_ij), and 0 wherever s_ij is -inf:

        key_mass_j   = sum_i P_ij
        entropy_i    = -sum_j P_ij log P_ij, in nats, over the keys, without the share of a sink or softmax1
        max_logit_i  = max_j s_ij
        top_k        = the top_k largest s_ij of each row, in descending order, ties by ascending key

    Args:
        q: (B, Hq, M, D); with layout "bshd" (B, M, Hq, D). k: (B, Hkv, N, D). As in `attention`.
        key_mass, entropy, max_logit: which statistics to compute. entropy is refused with normalizer "sigmoid", whose
            weights are no distribution.
        top_k: the number of keys per row, at most N; 0 for none.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: q (Tq, Hq, D) and k (Tk, Hkv, D) are packed sequences,
            as in `attention_varlen`. Results then have (T, Hq) instead of (B, Hq, M) or (B, Hq, N), and indices count
            from the start of the sequence.
        The other keywords are those of `attention`. Dropout does not apply.
        backend: "triton", "tiled" or "reference"; None takes the first that can run the call.

    Returns:
        A named tuple of float32 tensors, computed in float64 where q is float64; None for statistics not requested.
        key_mass (B, Hq, N), entropy (B, Hq, M), max_logit (B, Hq, M), top_k_indices (int64) and top_k_weights
        (B, Hq, M, top_k). A row with fewer than top_k visible keys has index -1 and weight 0 in the remaining entries;
        a fully masked row has entropy 0 and max_logit -inf. A NaN score makes its row's max_logit, entropy and weights
        NaN, and the mass of every key that the row attends to; it ranks above every number.

    Raises:
        TypeError, ValueError: an invalid argument, by name; BackendError as in `attention`. There are no derivatives:
        backward through a result raises NotImplementedError.

    >>> import torch, fused_attn
    >>> q, k = torch.randn(2, 8, 128, 64), torch.randn(2, 2, 128, 64)
    >>> stats = fused_attn.attention_stats(q, k, causal=True, entropy=True, top_k=3)
    >>> stats.entropy.shape, stats.top_k_indices[0, 0, 0].tolist()
    (torch.Size([2, 8, 128]), [0, -1, -1])
    """
    if extra or unknown:
        keywords.check(attention_stats, unknown, extra)
    packed = None
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        packed = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    elif max_seqlen_q is not None or max_seqlen_k is not None:
        raise ValueError("max_seqlen_q, max_seqlen_k: only with cu_seqlens_q and cu_seqlens_k, got None for both")
    top_k = _checked_top_k(top_k, k, layout if packed is None else "packed")
    entropy = as_bool("entropy", entropy)
    if entropy and normalizer == "sigmoid":
        raise ValueError('entropy: normalizer "sigmoid" has none, because its weights are no distribution')
    requested = (as_bool("key_mass", key_mass), entropy, as_bool("max_logit", max_logit), top_k)

    def compute(name: str, p: Problem) -> tuple[Tensor | None, ...]:
        if name == "reference":
            return reference.statistics(p, *requested)
        tensors = torch.ops.fused_attn.statistics(*ops.flatten(p, name), *requested)
        return tuple(x if wanted else None for x, wanted in zip(tensors, (*requested, top_k), strict=True))

    options = Options(
        bias, alibi_slopes, sink, mask, score, scale, causal, window, alignment, softcap, normalizer=normalizer
    )
    results = _run("attention_stats", compute, q, k, options, layout, backend, packed)
    results = [x.float() if x is not None and x.is_floating_point() else x for x in results]
    if packed is not None:
        results = [None if x is None else x[0].transpose(0, 1) for x in results]
    return Statistics(*results)


@keywords.closed
def attention_map(
    q: Tensor,
    k: Tensor,
    *extra: NoReturn,
    rows: Sequence[int] | Tensor | None = None,
    heads: Sequence[int] | Tensor | None = None,
    score: Any = "dot",
    scale: float | Tensor | None = None,
    mask: Tensor | Mask | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    alignment: str | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | Tensor | None = None,
    sink: Tensor | None = None,
    normalizer: str = "softmax",
    layout: str = "bhsd",
    backend: str | None = None,
    **unknown: NoReturn,
) -> Tensor:
    """The attention weights of chosen rows and heads, in memory for these rows and heads alone.

    Args:
        q: (B, Hq, M, D); with layout "bshd" (B, M, Hq, D). k: (B, Hkv, N, D). As in `attention`.
        rows, heads: the indices of queries and of query heads, in any order: ints or a 1-d tensor, from -M to M - 1
            (-Hq to Hq - 1), negative ones counted from the end. None means all.
        The other keywords are those of `attention`. The weights are those before dropout.
        backend: "triton", "tiled" or "reference"; None takes the first that can run the call.

    Returns:
        (B, len(heads), len(rows), N) float32, computed in float64 where q is float64; heads-first in every layout.
        A row sums to 1, or to less with a sink or softmax1; a fully masked row is zeros. A NaN score makes the visible
        keys of its row NaN.

    Raises:
        TypeError, ValueError: an invalid argument, by name; BackendError as in `attention`. There is no derivative:
        backward through the result raises NotImplementedError.

    >>> import torch, fused_attn
    >>> q, k = torch.randn(2, 8, 128, 64), torch.randn(2, 2, 128, 64)
    >>> weights = fused_attn.attention_map(q, k, rows=[0, -1], heads=[5], causal=True)
    >>> weights.shape, weights[0, 0, 0, :3].tolist()
    (torch.Size([2, 1, 2, 128]), [1.0, 0.0, 0.0])
    """
    if extra or unknown:
        keywords.check(attention_map, unknown, extra)
    options = Options(
        bias, alibi_slopes, sink, mask, score, scale, causal, window, alignment, softcap, normalizer=normalizer
    )
    return weights_of(q, k, options, rows, heads, layout, backend).float()


def weights_of(
    q: Tensor, k: Tensor, options: Options, rows: Any = None, heads: Any = None, layout: str = "bhsd",
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """`attention_map` without the cast to float32: float64 where q is float64."""

    def compute(name: str, p: Problem) -> tuple[Tensor]:
        chosen = _choice("rows", rows, p.shape[2]), _choice("heads", heads, p.shape[1])
        if name == "reference":
            return (reference.weights(p, *chosen),)
        return (torch.ops.fused_attn.weights(*ops.flatten(p, name), *chosen),)

    (weights,) = _run("attention_map", compute, q, k, options, layout, backend)
    return weights


def _run(
    caller: str,
    compute: Any,
    q: Tensor,
    k: Tensor,
    options: Options,
    layout: str,
    backend: str | None,
    packed: Any = None,
) -> Any:
    """The results of `compute` for the chosen backend, without a derivative.

    packed: cu_seqlens and max_seqlen of queries and keys.
    """
    v = k[..., :1] if isinstance(k, Tensor) and k.ndim and not k.is_nested else k  # values are not used
    if packed is None:
        heads = heads_first(q, k, v, layout, options.score)
        with no_autocast(q):
            p = bind(*heads, options)
    else:
        p = bind_packed(q, k, v, options, *packed)
    with torch.no_grad(), no_autocast(q):
        name, form = dispatch.choose(p, backend, task="statistics")
        results = compute(name, form)
    message = f"{caller}: its results have no derivative; detach() them, or call it on q.detach()"
    return without_derivative(message, results, *p.tensors().values())


def _checked_top_k(top_k: Any, k: Any, layout: str) -> int:
    top_k = as_int("top_k", top_k)
    if top_k < 0:
        raise ValueError(f"top_k: must be >= 0, got {top_k}")
    rank, dim = (3, 0) if layout == "packed" else (4, 1) if layout == "bshd" else (4, 2)
    n = k.shape[dim] if isinstance(k, Tensor) and k.ndim == rank else top_k
    if top_k > n:
        raise ValueError(f"top_k: expected at most the {n} keys, got {top_k}")
    return top_k


def _choice(name: str, chosen: Any, count: int) -> list[int]:
    """Indices from 0 to count - 1, in the order chosen."""
    if chosen is None:
        return list(range(count))
    if isinstance(chosen, Tensor):
        if chosen.ndim != 1 or chosen.dtype == torch.bool or chosen.is_floating_point() or chosen.is_complex():
            raise TypeError(f"{name}: expected a 1-d integer tensor, got {describe(chosen)}")
        check_dense(name, chosen)
        chosen = chosen.tolist()
    if isinstance(chosen, str) or not isinstance(chosen, Iterable):
        raise TypeError(f"{name}: expected a sequence of ints or a tensor, got {describe(chosen)}")
    chosen = [as_int(name, x, "a sequence of ints") for x in chosen]
    for x in chosen:
        if not -count <= x < count:
            raise ValueError(f"{name}: expected indices from {-count} to {count - 1}, got {x}")
    return [x + count if x < 0 else x for x in chosen]
