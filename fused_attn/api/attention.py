"""`attention`, `explain`, `merge_states` and `warmup`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..runtime import call_cache, dispatch
from ..runtime.autocast import no_autocast
from ..spec import state
from ..spec.checks import as_bool, check_choice, check_dense
from ..spec.options import Options
from ..spec.problem import Mask, Problem, describe
from . import keywords, nested
from .bind import LAYOUTS, bind, heads_first
from .varlen import bind_packed


@keywords.closed
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *extra: NoReturn,
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
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    normalizer: str = "softmax",
    layout: str = "bhsd",
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in one pass over the keys: softmax(score(q, k)) averages v.

    With P_ij = exp(s_ij) / (sum_j exp(s_ij) + exp(sink)), out_i = sum_j P_ij v_j and lse_i is the natural log of the
    denominator. The score is, in this order,
    s_ij = softcap(scale * score(q_i, k_j)) + bias_ij - slope * |i + offset - j|, and -inf where the mask forbids.
    Vaswani et al., "Attention is all you need", 2017; Dao, "FlashAttention-2", 2023.

    Args:
        q: (B, Hq, M, D); with layout "bshd" (B, M, Hq, D). float16, bfloat16, float32; float64 on `tiled` and
            `reference`. Any strides. Jagged nested tensors are supported: q is (B, Hq, j, D), as torch has it, k and v
            have equal lengths, alignment applies to each sequence (None only if q has the same lengths), and tensor
            masks and bias are refused.
        k: (B, Hkv, N, D); Hkv divides Hq, and query head h reads head h // (Hq // Hkv). A bilinear score lets D differ.
        v: (B, Hkv, N, Dv).
        score: the similarity of q_i and k_j: "dot" is q_i . k_j; or `scores.Bilinear(w)`, `scores.Cosine(t)`,
            `scores.Distance(h)`, `scores.Additive(w)`, whose parameters may require grad.
        scale: multiplies the score; when None, D ** -0.5 for "dot" and Bilinear and 1 for the others. A float, or a
            tensor () or (Hq,) that may require grad.
        mask: bool, True = may attend, broadcastable to (B, Hq, M, N); or a `Mask`.
        causal: row i attends to keys j <= i + offset.
        window: (left, right), the numbers of keys before and after the diagonal; None is unbounded.
        alignment: the offset of the diagonal j = i + offset: "top_left" is 0, "bottom_right" is N - M. Required if
            M != N and causal, window or alibi_slopes is used.
        bias: added to the scores, broadcastable to (B, Hq, M, N). Its gradient has the same shape as the bias.
        alibi_slopes: (Hq,) or (B, Hq). Press et al., "Train short, test long", 2022.
        softcap: c > 0 makes a score c * tanh(s / c); a float or a 0-d tensor. Not with Distance.
        sink: (Hq,) logits added to each row's denominator, without a value. Xiao et al., "Efficient streaming language
            models with attention sinks", 2024.
        dropout_p: probability that a weight is dropped, in [0, 1]; survivors are scaled by 1 / (1 - p).
        seed: fixes the dropout mask: an int or a 0-d integer tensor. None draws one from the device's generator.
        normalizer: "softmax"; "softmax1", which adds 1 to the denominator (a sink of 0), so that all weights of a row
            can be near 0; or "sigmoid", P_ij = 1 / (1 + exp(-s_ij)), without a denominator. Miller, "Attention is off
            by one", 2023; Ramapuram et al., "Theory, analysis, and best practices for sigmoid self-attention", 2024.
        layout: of q, k, v and out: "bhsd" or "bshd". mask, bias and lse are heads-first in both.
        return_lse: also return lse (B, Hq, M), float32 (float64 for float64), differentiable. Not with "sigmoid".
        deterministic: None and True give the same bits run to run; False allows a faster unordered backward.
        backend: "hopper", "triton", "sdpa", "tiled" or "reference"; None takes the first that can run the call. An
            explicit choice never falls back. The environment variable FUSED_ATTN_BACKEND is an explicit choice too; it
            is read at each call, and compiled functions are retraced if it changes. If torch.nn.attention.sdpa_kernel
            disables torch's linear-memory kernels, "sdpa" is skipped on CUDA; it has no other effect.

    Returns:
        out (B, Hq, M, Dv) (or bshd) in q's dtype and memory order; or (out, lse). A fully masked row gives zeros and
        lse -inf. For jagged inputs, out is jagged with q's offsets, and lse is (B, Hq, j). Both may be changed in place
        (out += residual): backward needs out, and recomputes it if it was changed.

    Derivatives: `tiled` and `reference` support derivatives of any order, forward and backward mode, and torch.func.
    `triton`, `hopper` and `sdpa` have first derivatives, `sdpa` on a CPU also higher ones in backward mode. Others
    raise TransformError (`sdpa` on CUDA may raise torch's own error).

    Raises:
        TypeError, ValueError: an invalid argument, by name. BackendError: the chosen backend cannot run the call, with
        every reason. NotImplementedError: not supported yet.

    >>> import torch, fused_attn
    >>> q, k, v = (torch.randn(2, 8, 128, 64) for _ in range(3))
    >>> fused_attn.attention(q, k, v, causal=True, softcap=30.0).shape
    torch.Size([2, 8, 128, 64])
    """
    if extra or unknown:
        keywords.check(attention, unknown, extra)
    options = Options(
        bias, alibi_slopes, sink, mask, score, scale, causal, window, alignment, softcap, dropout_p, seed, normalizer,
        return_lse, deterministic,
    )  # fmt: skip
    if nested.is_nested(q, k, v):
        return nested.attention(q, k, v, options, layout, backend)
    lse: Any
    out, lse = _attend(q, k, v, options, layout, backend)
    out = out.transpose(1, 2) if layout == "bshd" else out
    return (out, lse) if return_lse else out


def _bind(q: Tensor, k: Tensor, v: Tensor, options: Options, layout: str) -> Problem:
    heads = heads_first(q, k, v, layout, options.score)
    with no_autocast(q):
        return bind(*heads, options)


_attend = call_cache.cached(_bind)


def explain(
    q: Tensor, k: Tensor, v: Tensor, *, layout: str = "bhsd", backend: str | None = None, **options: Any
) -> dispatch.Explanation:
    """The backend that `attention` would use for this call, and every reason against the backends before it.

    Takes the arguments of `attention` or, with cu_seqlens_q, those of `attention_varlen`. Computes no attention and
    draws no random number.

    >>> import torch, fused_attn
    >>> x = torch.randn(1, 2, 16, 8)
    >>> fused_attn.explain(x, x, x, sink=torch.zeros(2)).backend
    'tiled'
    """
    packed = [options.pop(x, None) for x in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")]
    keywords.check(attention, options, caller="explain")
    if options.get("seed") is None:
        options["seed"] = 0  # no random number is drawn
    checked = Options(**options)
    if any(x is not None for x in packed):
        return dispatch.explain(bind_packed(q, k, v, checked, *packed), backend)
    return dispatch.explain(bind(*heads_first(q, k, v, layout, checked.score), checked), backend)


def merge_states(outs: list[Tensor], lses: list[Tensor], *, layout: str = "bhsd") -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint sets of keys: (out, lse) of attention over all keys at once. Differentiable.

    With lse = log(sum exp(lse_i)), out = sum exp(lse_i - lse) * out_i. outs: tensors (B, H, M, Dv), or (B, M, H, Dv)
    with layout "bshd"; lses: as many tensors (B, H, M), natural logs, computed without a sink. The error of a share is
    that of its lse: a float32 lse of 1e6 has a rounding error of 0.03.

    >>> import torch, fused_attn
    >>> q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
    >>> halves = [fused_attn.attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(8), slice(8, 16))]
    >>> out, lse = fused_attn.merge_states([h[0] for h in halves], [h[1] for h in halves])
    >>> torch.testing.assert_close(out, fused_attn.attention(q, k, v))
    """
    check_choice("layout", layout, LAYOUTS)
    for name, tensors in (("outs", outs), ("lses", lses)):
        if not isinstance(tensors, (list, tuple)) or not all(isinstance(x, Tensor) for x in tensors):
            raise TypeError(f"{name}: expected a list of tensors, got {describe(tensors)}")
        for i, x in enumerate(tensors):
            check_dense(f"{name}[{i}]", x)
    if not outs or len(outs) != len(lses):
        raise ValueError(f"lses: expected one for each of the {len(outs)} outs (at least one), got {len(lses)}")
    swap = layout == "bshd"
    heads_first = [x.transpose(1, 2) if swap else x for x in outs]
    for i, (x, lse) in enumerate(zip(heads_first, lses, strict=True)):
        if x.shape != heads_first[0].shape or lse.shape != x.shape[:-1]:
            raise ValueError(f"outs[{i}], lses[{i}]: shapes {tuple(outs[i].shape)}, {tuple(lse.shape)} do not fit")
    out, lse = state.merge(heads_first, list(lses))
    return (out.transpose(1, 2) if swap else out), lse


def warmup(
    shapes: Iterable[tuple[int, ...]],
    *,
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    device: torch.device | str = "cuda",
    backward: bool = True,
    backend: str | None = None,
    **options: Any,
) -> None:
    """Compile kernels before the first real call, by running the given shapes once on random inputs.

    shapes: tuples (B, Hq, Hkv, M, N, D) or (B, Hq, Hkv, M, N, D, Dv). Kernels do not depend on lengths, so one small
    length is enough. options: keywords of `attention`, the same for every shape (causal, window, ...).

    >>> import torch, fused_attn
    >>> fused_attn.warmup([(1, 8, 2, 64, 64, 32)], dtypes=[torch.float32], device="cpu", causal=True)
    """
    backward = as_bool("backward", backward)
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device: torch has no {device} here: {str(error).splitlines()[0]}") from None
    for shape in shapes:
        if not isinstance(shape, (list, tuple)) or len(shape) not in (6, 7):
            raise ValueError(f"shapes: expected (B, Hq, Hkv, M, N, D) or (..., D, Dv), got {describe(shape)}")
        b, heads, kv_heads, m, n, d, dv = (*shape, shape[5])[:7]
        for dtype in dtypes:
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"dtypes: expected torch's dtypes, got {describe(dtype)}")
            q, k, v = (
                torch.randn(size, dtype=dtype, device=device, requires_grad=backward)
                for size in ((b, heads, m, d), (b, kv_heads, n, d), (b, kv_heads, n, dv))
            )
            result = attention(q, k, v, backend=backend, **options)
            if backward:
                (result[0] if isinstance(result, tuple) else result).sum().backward()
