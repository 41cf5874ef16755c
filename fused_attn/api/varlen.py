"""Attention over packed sequences of different lengths, without padding."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from ..runtime import call_cache
from ..runtime.autocast import autocast, no_autocast
from ..spec.checks import as_int, as_starts, check_choice, check_starts, readable
from ..spec.options import Options
from ..spec.problem import ALIGNMENTS, Mask, Problem, Ragged
from . import keywords
from .bind import bind, check_qkv


@keywords.closed
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *extra: NoReturn,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
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
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of B packed sequences: the queries of sequence b attend to the keys of sequence b only.

    Args:
        q: (Tq, Hq, D): the queries of all sequences. k: (Tk, Hkv, D), v: (Tk, Hkv, Dv). Dtypes as in `attention`.
        cu_seqlens_q: integers (B + 1,), ascending from 0 to Tq, on q's device: sequence b has the rows from
            cu_seqlens_q[b] to cu_seqlens_q[b + 1]. cu_seqlens_k: the same for keys. Lengths of queries and keys may
            differ, and may be 0 (rows without keys give zeros and lse -inf). Values are checked on the CPU, and on a
            GPU inside `fused_attn.debug()`, because reading them synchronizes with the device.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths. Required on a GPU with bias, with a tensor mask, and
            with a mask that bounds each row (`Mask.lengths`, `prefix`, `segments`, `blocks`, sinks). Checked like
            cu_seqlens.
        mask, bias: for padded sequences, broadcastable to (B, Hq, max_seqlen_q, max_seqlen_k); a shorter sequence uses
            the first rows and columns.
        alignment: "top_left" or "bottom_right", relative to each sequence's own lengths. Required with causal, window
            or alibi_slopes, unless cu_seqlens_q is cu_seqlens_k.
        alibi_slopes: (Hq,), or (B, Hq). The other keywords are those of `attention`. The dropout mask is that of the
            padded batch (B, Hq, max_seqlen_q, max_seqlen_k).
        backend: "triton", "sdpa" (on a CPU), "tiled" or "reference"; None takes the first that can run the call.
            `triton` never synchronizes; the others read cu_seqlens, and run one sequence after another.

    Returns:
        out (Tq, Hq, Dv) in q's dtype, or (out, lse) with lse (Tq, Hq) as in `attention`.

    Raises:
        TypeError, ValueError: an invalid argument, by name. BackendError: the chosen backend cannot run the call.

    >>> import torch, fused_attn
    >>> q, k, v = (torch.randn(7, 4, 16) for _ in range(3))
    >>> starts = torch.tensor([0, 5, 5, 7], dtype=torch.int32)  # sequences of 5, 0 and 2 tokens
    >>> out = fused_attn.attention_varlen(q, k, v, starts, starts, causal=True)
    >>> first = fused_attn.attention(*(x[None, :5] for x in (q, k, v)), causal=True, layout="bshd")
    >>> torch.testing.assert_close(out[:5], first[0])
    """
    if extra or unknown:
        keywords.check(attention_varlen, unknown, extra)
    options = Options(
        bias, alibi_slopes, sink, mask, score, scale, causal, window, alignment, softcap, dropout_p, seed, normalizer,
        return_lse, deterministic,
    )  # fmt: skip
    return attend_packed(q, k, v, options, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, backend)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, options: Options, starts_q: Any, starts_k: Any, max_q: int | None,
    max_k: int | None, backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`attention_varlen` with `Options`."""
    out, lse = _attend(q, k, v, options, "packed", backend, (starts_q, starts_k), (max_q, max_k))
    out = out[0].transpose(0, 1)
    return (out, lse[0].T) if options.return_lse else out  # type: ignore[index]


def bind_packed(
    q: Tensor, k: Tensor, v: Tensor, options: Options, starts_q: Any, starts_k: Any, max_q: int | None,
    max_k: int | None,
) -> Problem:  # fmt: skip
    """A Problem from packed tensors (T, H, D), the starts of the sequences, and their longest lengths if known."""
    heads = _heads_first(q, k, v, options.score)
    ragged = _ragged(heads[0], heads[1], starts_q, starts_k, max_q, max_k, options.alignment)
    with no_autocast(q):
        p = bind(*heads, options, ragged)
    _check_longest(p, ragged, max_q, max_k)
    return p


def _bind(
    q: Tensor, k: Tensor, v: Tensor, options: Options, layout: str, starts: tuple[Any, Any],
    longest: tuple[int | None, int | None],
) -> Problem:  # fmt: skip
    return bind_packed(q, k, v, options, *starts, *longest)


_attend = call_cache.cached(_bind)


def _heads_first(q: Tensor, k: Tensor, v: Tensor, score: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Packed tensors checked, in autocast's dtype, as (1, H, T, dim) views."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if isinstance(x, Tensor) and not x.is_nested and x.ndim != 3:
            raise ValueError(f"{name}: expected packed (T, H, D), got shape {tuple(x.shape)}")
    q, k, v = autocast(q, k, v)
    q, k, v = (x.transpose(0, 1)[None] if isinstance(x, Tensor) and not x.is_nested else x for x in (q, k, v))
    check_qkv(q, k, v, "packed", score)
    return q, k, v


def _ragged(
    q: Tensor, k: Tensor, starts_q: Any, starts_k: Any, max_q: int | None, max_k: int | None, alignment: str | None
) -> Ragged:
    """Starts, checked if `readable`, and longest lengths: max_seqlen, else the value read, else the total."""
    if alignment is not None:
        check_choice("alignment", alignment, ALIGNMENTS, "None or one of")
    starts_q, starts_k = as_starts(starts_q, starts_k)
    longest: list[int] = []
    for name, starts, x, most in (("q", starts_q, q, max_q), ("k", starts_k, k, max_k)):
        total = x.shape[2]
        most = None if most is None else as_int(f"max_seqlen_{name}", most, "None or an int >= 0")
        if most is not None and most < 0:
            raise ValueError(f"max_seqlen_{name}: expected None or an int >= 0, got {most}")
        read = check_starts(name, starts, total, q.device, most)
        longest.append(next(x for x in (most, read, total) if x is not None))
    if len(starts_q) != len(starts_k):
        shapes = tuple(starts_q.shape), tuple(starts_k.shape)
        raise ValueError(f"cu_seqlens_k: expected cu_seqlens_q's shape {shapes[0]}, got {shapes[1]}")
    return Ragged(starts_q, starts_k, longest[0], longest[1], alignment, starts_q is starts_k)


def _check_longest(p: Problem, ragged: Ragged, max_q: int | None, max_k: int | None) -> None:
    """Options with an entry per pair or row have the padded shape, so the longest lengths must be known."""
    by_row = (p.mask, p.span.lo, p.span.hi, p.pattern, p.span.sinks or None)
    option = "bias" if p.bias is not None else "mask" if any(x is not None for x in by_row) else None
    for name, most in (("max_seqlen_q", max_q), ("max_seqlen_k", max_k)):
        if option and most is None and not readable(ragged.q):
            raise ValueError(f"{name}: {option} needs it, got None")
