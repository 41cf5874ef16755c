"""flash-attn's passes without autograd: `_flash_attn_forward`, `_flash_attn_backward`, and both for packed sequences.

Other libraries use them to run attention over a part of the keys, merge the results of several parts, and run each
part's backward with the merged out and log-sum-exp. A backward therefore uses the arguments out and softmax_lse: with
w = exp(own lse - softmax_lse), the gradient of the weights exp(s - softmax_lse) is that of

    sum(w * (dO . O_own)) - w * delta,   delta = dO . out

which is differentiated through `fused_attn.attention`, at the cost of another forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..api.attention import attention
from ..api.varlen import attention_varlen
from ..runtime.no_derivative import without_derivative
from ..spec.checks import as_int, as_starts, describe
from ..spec.ragged import locate
from . import flash_arguments as arguments
from .flash_errors import as_flash_attn
from .flash_pages import over_pages
from .flash_probabilities import dense_weights, packed_weights

ROUND = 128  # flash-attn pads its row sums to a multiple of this
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
    options = arguments.scores(softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes)
    seed = arguments.seed(dropout_p, q)
    with torch.no_grad():
        out, lse = attention(
            q, k, v, layout="bshd", alignment="bottom_right", dropout_p=dropout_p, seed=seed, return_lse=True, **options
        )
        weights = q.new_empty(0)
        if return_softmax:
            weights = dense_weights(q, k, arguments.dropout(dropout_p, seed), options)
    message = NO_DERIVATIVE.format("_flash_attn_forward", "flash_attn_func")
    return (*without_derivative(message, (out, lse, weights), q, k, v, *options.values()), _state(seed, q))


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

    leftpad_k, seqused_k: int32 (B,); only keys leftpad_k <= j < seqused_k of a sequence exist.
    zero_tensors has no effect: every row is written. num_splits: 0 or 1, as in 2.8.4.
    """
    if as_int("num_splits", num_splits) > 1:
        raise ValueError(f"num_splits: num_splits > 1 is not supported for packed queries, got {num_splits}")
    options = arguments.scores(softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes)
    seed, sources = arguments.seed(dropout_p, q), (q, k, v, *options.values())
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
                options,
                leftpad_k,
                seqused_k,
            )
        else:
            longest = as_int("max_seqlen_q", max_seqlen_q), as_int("max_seqlen_k", max_seqlen_k)
            if leftpad_k is not None or seqused_k is not None:
                k, v, cu_seqlens_k = _used(k, v, cu_seqlens_k, longest[1], leftpad_k, seqused_k)
            out, lse = attention_varlen(
                q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=longest[0], max_seqlen_k=longest[1],
                alignment="bottom_right", dropout_p=dropout_p, seed=seed, return_lse=True, **options,
            )  # fmt: skip
            if return_softmax:
                dropout = arguments.dropout(dropout_p, seed)
                weights = packed_weights(q, k, cu_seqlens_q, cu_seqlens_k, longest, dropout, options)
    message = NO_DERIVATIVE.format("_flash_attn_varlen_forward", "flash_attn_varlen_func")
    return (*without_derivative(message, (out, lse.T, weights), *sources), _state(seed, q))


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
    """Write the gradients into dq, dk and dv unless they are None; return dO . O, float32 (B, Hq, Sq padded to 128).

    out, softmax_lse (B, Hq, Sq): over all keys of the rows; k and v may hold a part of them. rng_state: that of the
    forward; required with dropout.
    """
    options = arguments.scores(softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes)
    seed = _seed(dropout_p, rng_state)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        result: Any = attention(
            q, k, v, layout="bshd", alignment="bottom_right", dropout_p=dropout_p, seed=seed,
            deterministic=deterministic, return_lse=True, **options,
        )  # fmt: skip
        return result[0], result[1].transpose(1, 2)

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
    """`backward` for packed sequences, softmax_lse (Hq, Tq); returns dO . O, float32 (Hq, Tq + 128 B).

    Row i of sequence b is at cu_seqlens_q[b] + 128 b + i. zero_tensors has no effect: every row is written.
    """
    options = arguments.scores(softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes)
    seed = _seed(dropout_p, rng_state)
    cu_seqlens_q, cu_seqlens_k = as_starts(cu_seqlens_q, cu_seqlens_k)
    max_q = arguments.longest("max_seqlen_q", max_seqlen_q)
    max_k = arguments.longest("max_seqlen_k", max_seqlen_k)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        result: Any = attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=max_q, max_seqlen_k=max_k, alignment="bottom_right",
            dropout_p=dropout_p, seed=seed, deterministic=deterministic, return_lse=True, **options,
        )  # fmt: skip
        return result

    delta = _differentiate(run, (q, k, v), (dq, dk, dv), dout, out, softmax_lse.T)
    sequence, _ = locate(cu_seqlens_q, q.shape[0])
    rows = torch.arange(q.shape[0], device=q.device) + ROUND * sequence
    return delta.new_zeros(q.shape[1], q.shape[0] + ROUND * (len(cu_seqlens_q) - 1)).index_copy(1, rows, delta.T)


def _differentiate(
    run: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...],
    dout: Tensor, out: Tensor, lse: Tensor,
) -> Tensor:  # fmt: skip
    """Fill the gradients that are not None and return delta, float32. lse: in the layout that run returns."""
    with torch.enable_grad():
        own = [x.detach().requires_grad_(into is not None) for x, into in zip(inputs, gradients, strict=True)]
        own_out, own_lse = run(*own)
    wide = lse.dtype
    delta = (dout.to(wide) * out).sum(-1)
    with torch.no_grad():
        share = torch.where(own_lse == -torch.inf, 0.0, torch.exp(own_lse - lse))
        d_own_out = (share[..., None] * dout).to(own_out.dtype)
        dlse = share * ((dout.to(wide) * own_out).sum(-1) - delta)
    wanted = [(x, into) for x, into in zip(own, gradients, strict=True) if into is not None]
    if wanted:
        grads = torch.autograd.grad((own_out, own_lse), [x for x, _ in wanted], (d_own_out, dlse))
        for (_, into), grad in zip(wanted, grads, strict=True):
            into.copy_(grad)
    return delta


def _used(
    k: Tensor, v: Tensor, starts: Tensor, longest: int, leftpad: Tensor | None, used: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys and values that exist, and the starts of their sequences. Synchronizes a device."""
    lengths = arguments.lengths("k", starts, k.shape[0], longest, k.device)
    first = torch.zeros_like(lengths) if leftpad is None else arguments.each("leftpad_k", leftpad, lengths)
    end = lengths if used is None else arguments.each("seqused_k", used, lengths)
    b, i = locate(starts, k.shape[0])
    exists = (first[b] <= i) & (i < end[b])
    left = (end - first).clamp_min(0).cumsum(0, dtype=torch.int32)
    return k[exists], v[exists], F.pad(left, (1, 0))


def _state(seed: Tensor | None, q: Tensor) -> Tensor:
    """Seed and offset of the dropout; zeros without dropout."""
    return torch.zeros(2, dtype=torch.int64, device=q.device) if seed is None else F.pad(seed[None], (0, 1))


def _seed(dropout_p: float, state: Tensor | None) -> Tensor | None:
    if not dropout_p > 0:
        return None
    if not isinstance(state, Tensor) or state.dtype != torch.int64 or state.shape != (2,):
        raise ValueError(f"rng_state: with dropout expected the int64 (2,) of the forward, got {describe(state)}")
    return state[0]
