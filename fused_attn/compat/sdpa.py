"""Replaces `torch.nn.functional.scaled_dot_product_attention` by fused_attn's function, for every caller of it.

    fused_attn.compat.sdpa.enable()            # until disable()
    with fused_attn.compat.sdpa.scope(): ...   # inside the block

nn.MultiheadAttention and the Transformer layers call the function too; their fused inference path, which does not, is
off meanwhile. Not replaced: MultiheadAttention with need_weights=True, which does not call the function; code compiled
by torch.jit.script; and code that holds its own reference, from
`from torch.nn.functional import scaled_dot_product_attention`.

- The switch is global: it changes an attribute of torch for all threads.
- Functions of torch.compile are traced again when the switch has changed. The switch itself cannot be compiled: inside
  a compiled function `enable`, `disable` and `scope` break the graph, and with fullgraph=True they raise. Enter the
  scope around the call, or decorate the compiled function: `scope()(torch.compile(function, fullgraph=True))`.
- A call that fused_attn cannot run goes to torch's function, with one warning for each reason. If FUSED_ATTN_BACKEND
  names a backend, the error is raised instead.
- torch.nn.attention.sdpa_kernel selects among torch's kernels and does not affect fused_attn.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.backends.mha
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..api.sdpa import scaled_dot_product_attention as fused
from ..runtime import environment

_lock = threading.Lock()
_enabled = False
_scopes = 0
_replaced: tuple[Callable[..., Tensor], bool] | None = None  # torch's function and its fast-path flag, while replaced
_torch_sdpa: Callable[..., Tensor] = F.scaled_dot_product_attention
_warned: set[str] = set()


def enable() -> None:
    """Replace torch's function. A second call has no effect."""
    _switch(enabled=True)


def disable() -> None:
    """Undo `enable`. Inside a `scope`, torch's function stays replaced until the scope ends."""
    _switch(enabled=False)


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Replace torch's function inside a block or a decorated function. Scopes nest, in any order and across threads.

    Enter it around a function compiled with fullgraph=True, not inside.

    >>> import torch, fused_attn
    >>> x = torch.randn(2, 8, 128, 64)
    >>> with fused_attn.compat.sdpa.scope():
    ...     out = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    """
    _switch(scopes=1)
    try:
        yield
    finally:
        _switch(scopes=-1)


# Compiled, this would write the counts seen while tracing and undo the scopes of other threads.
@torch.compiler.disable(reason="use fused_attn.compat.sdpa's scope() or enable() around the call, not inside")
def _switch(*, enabled: bool | None = None, scopes: int = 0) -> None:
    """Set `_enabled`, count entered and left scopes, and apply the result."""
    global _enabled, _scopes
    with _lock:
        _enabled = _enabled if enabled is None else enabled
        _scopes += scopes
        _apply()


def _apply() -> None:
    """Make torch's attribute agree with `_enabled` and `_scopes`. The caller holds the lock."""
    global _replaced, _torch_sdpa
    wanted = _enabled or _scopes > 0
    if wanted and _replaced is None:
        _torch_sdpa = F.scaled_dot_product_attention
        _replaced = _torch_sdpa, torch.backends.mha.get_fastpath_enabled()
        F.scaled_dot_product_attention = scaled_dot_product_attention
        torch.backends.mha.set_fastpath_enabled(False)
    elif not wanted and _replaced is not None:
        original, fastpath = _replaced
        _replaced = None
        # A replacement made after this one is kept.
        if F.scaled_dot_product_attention is scaled_dot_product_attention:
            F.scaled_dot_product_attention = original
        torch.backends.mha.set_fastpath_enabled(fastpath)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """fused_attn's function by torch's signature; torch's own if fused_attn cannot run it or under torch.jit.script."""
    if torch.jit.is_scripting():
        return _torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    else:  # torch.jit.script does not compile this branch
        return _fused_or_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _fused_or_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    if has_torch_function_variadic(query, key, value):
        # As in torch, modes and subclasses that override the function are asked first.
        return handle_torch_function(
            scaled_dot_product_attention, (query, key, value), query, key, value, attn_mask, dropout_p, is_causal,
            scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
    try:
        return _fused(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    except (ValueError, TypeError, NotImplementedError) as error:
        if environment.backend:
            raise
        _warn_once(str(error))
    if isinstance(attn_mask, CausalBias):
        # CausalBias recognizes torch's function by the attribute that is replaced now, so the mask is built here.
        attn_mask = _allowed(attn_mask, query.device)
    return _torch_sdpa(
        query, key, value, attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    window = None
    if isinstance(attn_mask, CausalBias):
        if is_causal:
            raise ValueError("attn_mask: a CausalBias cannot be combined with is_causal")
        m, n = attn_mask.seq_len_q, attn_mask.seq_len_kv
        if (m, n) != (query.shape[-2], key.shape[-2]):
            lengths = query.shape[-2], key.shape[-2]
            raise ValueError(f"attn_mask: a CausalBias for lengths {(m, n)} does not fit query and key of {lengths}")
        # A window from the top-left diagonal is cheaper than a mask tensor, which only M > N needs.
        if attn_mask.variant == CausalVariant.UPPER_LEFT or m == n:
            attn_mask, is_causal = None, True
        elif m < n:
            attn_mask, window = None, (None, n - m)
        else:
            attn_mask = _allowed(attn_mask, query.device)
    return fused(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window=window)


def _allowed(bias: CausalBias, device: torch.device) -> Tensor:
    """The bias as a bool mask (M, N), True = may attend."""
    m, n = bias.seq_len_q, bias.seq_len_kv
    diagonal = 0 if bias.variant == CausalVariant.UPPER_LEFT else n - m
    return torch.ones(m, n, dtype=torch.bool, device=device).tril(diagonal)


@torch.compiler.assume_constant_result
def _warn_once(reason: str) -> None:
    with _lock:
        if reason in _warned:
            return
        _warned.add(reason)
    warnings.warn(f"fused_attn leaves a call to torch: {reason}", UserWarning, stacklevel=3)
