"""torch.nn.functional.scaled_dot_product_attention becomes ours, for every caller that looks it up there.

    fused_attn.compat.sdpa.enable()            # from now on
    with fused_attn.compat.sdpa.scope(): ...   # for a while

nn.MultiheadAttention and the Transformer layers are among those callers; their fused inference path, which never calls
the function, is off meanwhile. Three things stay torch's: MultiheadAttention with need_weights=True, which does not
call the function either; what torch.jit.script compiles; and code that has its own reference to the function, by
`from torch.nn.functional import scaled_dot_product_attention`.

The switch is one for the process: it changes an attribute of torch for every thread. What torch.compile made is traced
again when the switch has changed. The switch itself cannot be compiled: inside a compiled function `enable`, `disable`
and `scope` break the graph, and with fullgraph=True they raise. Enter the scope around the call, or decorate the
compiled function: `scope()(torch.compile(function, fullgraph=True))`. A call that we refuse goes to
torch's function, with one warning for each reason; where FUSED_ATTN_BACKEND names a backend, the refusal is raised
instead. torch.nn.attention.sdpa_kernel chooses among torch's kernels; it does not change what ours returns.
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
_replaced: tuple[Callable[..., Tensor], bool] | None = None  # torch's function and its fast-path flag, while ours is in
_torch_sdpa: Callable[..., Tensor] = F.scaled_dot_product_attention
_warned: set[str] = set()


def enable() -> None:
    """Put ours in; again is no change."""
    _switch(enabled=True)


def disable() -> None:
    """Undo `enable`. Inside a `scope`, ours stays until the scope is left."""
    _switch(enabled=False)


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Ours inside the block, or inside a function that this decorates. Scopes nest, in any order and over threads.

    Not inside a function that is compiled with fullgraph=True: enter it around the call.

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


# A compiled function would write the counts it was traced with, and undo the scopes of other threads.
@torch.compiler.disable(reason="use fused_attn.compat.sdpa's scope() or enable() around the call, not inside")
def _switch(*, enabled: bool | None = None, scopes: int = 0) -> None:
    """Turn `enable` on or off, and count scopes that are entered and left."""
    global _enabled, _scopes
    with _lock:
        _enabled = _enabled if enabled is None else enabled
        _scopes += scopes
        _apply()


def _apply() -> None:
    """Make torch's attribute what `_enabled` and `_scopes` say. The lock is held."""
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
        # Somebody who replaced it after us keeps their replacement.
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
    """torch's signature and meaning; ours where we can, torch's where we refuse and under torch.jit.script."""
    if torch.jit.is_scripting():
        return _torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    else:  # the compiler reads no branch that it cannot take
        return _ours_or_torchs(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _ours_or_torchs(
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
        # A mode, or a subclass that overrides the function, is asked first, as by torch's own functions.
        return handle_torch_function(
            scaled_dot_product_attention, (query, key, value), query, key, value, attn_mask, dropout_p, is_causal,
            scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
    try:
        return _fused(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    except (ValueError, TypeError, NotImplementedError) as refusal:
        if environment.backend:
            raise
        _warn_once(str(refusal))
    if isinstance(attn_mask, CausalBias):
        # It recognises torch's function by its place, where ours stands now, so it is spelled out here.
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
            raise ValueError("attn_mask: a CausalBias and is_causal exclude each other")
        m, n = attn_mask.seq_len_q, attn_mask.seq_len_kv
        if (m, n) != (query.shape[-2], key.shape[-2]):
            lengths = query.shape[-2], key.shape[-2]
            raise ValueError(f"attn_mask: a CausalBias for lengths {(m, n)} does not fit query and key of {lengths}")
        # As a window from the top-left diagonal it stays an interval of keys; only M > N needs the grid.
        if attn_mask.variant == CausalVariant.UPPER_LEFT or m == n:
            attn_mask, is_causal = None, True
        elif m < n:
            attn_mask, window = None, (None, n - m)
        else:
            attn_mask = _allowed(attn_mask, query.device)
    return fused(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window=window)


def _allowed(bias: CausalBias, device: torch.device) -> Tensor:
    """bool (M, N), True where the bias lets a row attend."""
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
