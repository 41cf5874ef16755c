"""flash-attn's passes without autograd: `_flash_attn_forward`, `_flash_attn_backward`, and both of packed sequences.

What other libraries build on: they run a pass over part of the keys, merge what it finds, and go back with the merged
out and log-sum-exp. So a backward uses the ones that it is given: with w = exp(own lse - given lse), the gradient of
the weights exp(s - given lse) is that of

    sum(w * (dO . O_own)) - w * delta,   delta = dO . O_given

which is differentiated through `fused_attn.attention`. It costs another forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..api.attention import attention
from ..api.varlen import attention_varlen
from ..runtime.no_derivative import underived
from ..spec.checks import as_int, as_starts, describe
from ..spec.ragged import places
from . import flash_arguments as arguments
from .flash_errors import as_flash_attn
from .flash_pages import over_pages
from .flash_probabilities import dense_weights, packed_weights

ROUND = 128  # flash-attn's row sums have room for a multiple of so many rows
NO_DERIVATIVE = "{}: its results have no derivative; call {}, or the backward of this pass"


@as_flash_attn
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`flash_attn_func` without a derivative -> (out, lse (B, Hq, Sq), S_dmask, rng_state int64 (2,)).

    S_dmask is (B, Hq, Sq, Sk) with return_softmax, else (0,). rng_state replays the dropout in `backward`.
    """
    words = arguments.scores(softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes)
    seed = arguments.seed(dropout_p, q)
    with torch.no_grad():
        out, lse = attention(
            q, k, v, layout="bshd", alignment="bottom_right", dropout_p=dropout_p, seed=seed, return_lse=True, **words
        )
        weights = q.new_empty(0)
        if return_softmax:
            weights = dense_weights(q, k, arguments.dropout(dropout_p, seed), words)
    message = NO_DERIVATIVE.format("_flash_attn_forward", "flash_attn_func")
    return (*underived(message, (out, lse, weights), q, k, v, *words.values()), _state(seed, q))


@as_flash_attn
def varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`flash_attn_varlen_func` without a derivative -> (out, lse (Hq, Tq), S_dmask, rng_state int64 (2,)).

    leftpad_k, seqused_k: int32 (B,); of each sequence's keys, those from leftpad_k up to seqused_k are there.
    zero_tensors changes nothing: every row is written. num_splits: 0 or 1, as in 2.8.4.
    """
    if as_int("num_splits", num_splits) > 1:
        raise ValueError(f"num_splits: num_splits > 1 is not supported for packed queries, got {num_splits}")
    words = arguments.scores(softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes)
    seed, sources = arguments.seed(dropout_p, q), (q, k, v, *words.values())
    cu_seqlens_q, cu_seqlens_k = as_starts(cu_seqlens_q, cu_seqlens_k)
    weights = q.new_empty(0)
    with torch.no_grad():
        if block_table is not None:
            arguments.no_dropout(dropout_p)
            out, lse = over_pages(
                q,
                k,
                v,
                cu_seqlens_q,
                cu_seqlens_k,
                max_seqlen_q,
                max_seqlen_k,
                block_table,
                words,
                leftpad_k,
                seqused_k,
            )
        else:
            longest = as_int("max_seqlen_q", max_seqlen_q), as_int("max_seqlen_k", max_seqlen_k)
            if leftpad_k is not None or seqused_k is not None:
                k, v, cu_seqlens_k = _used(k, v, cu_seqlens_k, longest[1], leftpad_k, seqused_k)
            out, lse = attention_varlen(
                q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=longest[0], max_seqlen_k=longest[1],
                alignment="bottom_right", dropout_p=dropout_p, seed=seed, return_lse=True, **words,
            )  # fmt: skip
            if return_softmax:
                dropout = arguments.dropout(dropout_p, seed)
                weights = packed_weights(q, k, cu_seqlens_q, cu_seqlens_k, longest, dropout, words)
    message = NO_DERIVATIVE.format("_flash_attn_varlen_forward", "flash_attn_varlen_func")
    return (*underived(message, (out, lse.T, weights), *sources), _state(seed, q))


@as_flash_attn
def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes the gradients into dq, dk and dv, those that are no None -> dO . O, float32 (B, Hq, Sq rounded up to 128).

    out, softmax_lse (B, Hq, Sq): over all keys that the rows see, of which k and v may be a part. rng_state: that of
    the forward, needed with dropout.
    """
    words = arguments.scores(softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes)
    seed = _seed(dropout_p, rng_state)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found: Any = attention(
            q, k, v, layout="bshd", alignment="bottom_right", dropout_p=dropout_p, seed=seed,
            deterministic=deterministic, return_lse=True, **words,
        )  # fmt: skip
        return found[0], found[1].transpose(1, 2)

    delta = _differentiate(run, (q, k, v), (dq, dk, dv), dout, out, softmax_lse.transpose(1, 2)).transpose(1, 2)
    return F.pad(delta, (0, -q.shape[1] % ROUND))


@as_flash_attn
def varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """`backward` of packed sequences, softmax_lse (Hq, Tq) -> dO . O, float32 (Hq, Tq + 128 B).

    Row i of sequence b is at cu_seqlens_q[b] + 128 b + i. zero_tensors changes nothing: every row is written.
    """
    words = arguments.scores(softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes)
    seed = _seed(dropout_p, rng_state)
    cu_seqlens_q, cu_seqlens_k = as_starts(cu_seqlens_q, cu_seqlens_k)
    max_q = arguments.longest("max_seqlen_q", max_seqlen_q)
    max_k = arguments.longest("max_seqlen_k", max_seqlen_k)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found: Any = attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=max_q, max_seqlen_k=max_k, alignment="bottom_right",
            dropout_p=dropout_p, seed=seed, deterministic=deterministic, return_lse=True, **words,
        )  # fmt: skip
        return found

    delta = _differentiate(run, (q, k, v), (dq, dk, dv), dout, out, softmax_lse.T)
    sequence, _ = places(cu_seqlens_q, q.shape[0])
    rows = torch.arange(q.shape[0], device=q.device) + ROUND * sequence
    return delta.new_zeros(q.shape[1], q.shape[0] + ROUND * (len(cu_seqlens_q) - 1)).index_copy(1, rows, delta.T)


def _differentiate(
    run: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...],
    dout: Tensor, out: Tensor, lse: Tensor,
) -> Tensor:  # fmt: skip
    """Fill the gradients that are wanted, and return delta, float32; lse as run returns it, a number for each row."""
    with torch.enable_grad():
        own = [x.detach().requires_grad_(into is not None) for x, into in zip(inputs, gradients, strict=True)]
        found, found_lse = run(*own)
    wide = lse.dtype
    delta = (dout.to(wide) * out).sum(-1)
    with torch.no_grad():
        share = torch.where(found_lse == -torch.inf, 0.0, torch.exp(found_lse - lse))
        dfound = (share[..., None] * dout).to(found.dtype)
        dlse = share * ((dout.to(wide) * found).sum(-1) - delta)
    wanted = [(x, into) for x, into in zip(own, gradients, strict=True) if into is not None]
    if wanted:
        grads = torch.autograd.grad((found, found_lse), [x for x, _ in wanted], (dfound, dlse))
        for (_, into), grad in zip(wanted, grads, strict=True):
            into.copy_(grad)
    return delta


def _used(
    k: Tensor, v: Tensor, starts: Tensor, longest: int, leftpad: Tensor | None, used: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys and values that are there, and where those of each sequence begin. Waits for a device."""
    lengths = arguments.lengths("k", starts, k.shape[0], longest, k.device)
    first = torch.zeros_like(lengths) if leftpad is None else arguments.each("leftpad_k", leftpad, lengths)
    end = lengths if used is None else arguments.each("seqused_k", used, lengths)
    b, i = places(starts, k.shape[0])
    there = (first[b] <= i) & (i < end[b])
    left = (end - first).clamp_min(0).cumsum(0, dtype=torch.int32)
    return k[there], v[there], F.pad(left, (1, 0))


def _state(seed: Tensor | None, q: Tensor) -> Tensor:
    """seed and offset of a dropout; zeros without."""
    return torch.zeros(2, dtype=torch.int64, device=q.device) if seed is None else F.pad(seed[None], (0, 1))


def _seed(dropout_p: float, state: Tensor | None) -> Tensor | None:
    if not dropout_p > 0:
        return None
    if not isinstance(state, Tensor) or state.dtype != torch.int64 or state.shape != (2,):
        raise ValueError(f"rng_state: with dropout expected the int64 (2,) of the forward, got {describe(state)}")
    return state[0]
