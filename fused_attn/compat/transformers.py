"""Transformers' attention interface: after `register()`, any model takes attn_implementation="fused_attn".

A mask that is handed over says everything: causality, window and padding. Without one, causality and
the sliding window, if any, are intervals here.

Its other path, attn_implementation="flash_attention_2", takes the padding out of a batch instead of masking it. There
is no interface to put functions into that path, so `register_flash_attention_2()` replaces, in
`transformers.modeling_flash_attention_utils`, what finds flash-attn and what asks whether it can be had.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..api import attention
from . import bert_padding, flash_attn

NAME = "fused_attn"
FLASH = "flash_attention_2"

_lock = threading.Lock()
_replaced: dict[str, Any] | None = None  # what Transformers had before, while ours is in


def register() -> None:
    """Make attn_implementation="fused_attn" known to Transformers, masks included. Again is no change.

    >>> import fused_attn.compat.transformers
    >>> fused_attn.compat.transformers.register()
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    # An implementation without masks of its own is given none, and padding is dropped in silence.
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query (B, Hq, M, D), key and value (B, Hkv, N, D), not repeated -> ((B, M, Hq, Dv), None).

    attention_mask: bool (True = may attend) or float (added). Of the options, sliding_window, softcap, s_aux (sinks,
    (Hq,)) and position_bias (added) change the result; a paged cache is refused, and served by flash_attention_2.
    """
    if options.get("cache") is not None:
        raise NotImplementedError(
            'cache: continuous batching takes its pages to attn_implementation="flash_attention_2"; see'
            " register_flash_attention_2"
        )
    if options.get("output_attentions"):
        warnings.warn(
            'output_attentions: fused attention forms no weights; use attn_implementation="eager"', stacklevel=2
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = attention_mask is None and bool(is_causal)
    mask, bias = None, options.get("position_bias")
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        mask = attention_mask
    elif attention_mask is not None:
        bias = attention_mask if bias is None else bias + attention_mask
    window, size = None, options.get("sliding_window")
    if attention_mask is None and size is not None:
        # A window of that many keys, the row's own included; on both sides where the call is not causal.
        window = (size - 1, size - 1)
    out: Any = attention(
        # Learned queries come with batch 1.
        query.expand(key.shape[0], -1, -1, -1),
        key,
        value,
        scale=scaling,
        mask=mask,
        causal=causal,
        window=window,
        # A single query is the last of its sequence, and causal or not it sees all; several start where the keys do.
        alignment="bottom_right" if query.shape[2] == 1 else "top_left",
        bias=bias,
        softcap=options.get("softcap"),
        sink=options.get("s_aux"),
        dropout_p=dropout,
    )
    return out.transpose(1, 2).contiguous(), None


# ------------------------------------------------------------------------------------------------- flash_attention_2


def register_flash_attention_2() -> None:
    """Point attn_implementation="flash_attention_2" at `compat.flash_attn`, on every device. Again is no change.

    Replaced, until `unregister_flash_attention_2`, in `transformers.modeling_flash_attention_utils`: `_lazy_imports`,
    for this one implementation, and in the entry 2 of FLASH_ATTENTION_COMPATIBILITY_MATRIX the check that the package
    is there and the list of devices, which gains the CPU. Models made before follow at their next call. It is one
    switch for the process. Transformers goes on to log that the CPU and float32 are unusual there; both are meant here.

    >>> import fused_attn.compat.transformers as door
    >>> door.register_flash_attention_2()
    >>> door.unregister_flash_attention_2()
    """
    global _replaced
    with _lock:
        if _replaced is not None:
            return
        room, entry = _flash_room()
        _replaced = {"_lazy_imports": room._lazy_imports, **entry}
        room._lazy_imports = _finding_ours(room._lazy_imports)
        entry["general_availability_check"] = _always
        entry["supported_devices"] = (*entry["supported_devices"], (_always, "cpu"))
        room._loaded_implementation = None  # look again


def unregister_flash_attention_2() -> None:
    """Undo `register_flash_attention_2`."""
    global _replaced
    with _lock:
        if _replaced is None:
            return
        room, entry = _flash_room()
        room._lazy_imports = _replaced.pop("_lazy_imports")
        entry.update(_replaced)
        room._loaded_implementation = None
        _replaced = None


@contextlib.contextmanager
def flash_attention_2() -> Iterator[None]:
    """`register_flash_attention_2` for a block, unless it is in force already.

    >>> import fused_attn.compat.transformers as door
    >>> with door.flash_attention_2():
    ...     pass
    """
    outer = _replaced is not None
    register_flash_attention_2()
    try:
        yield
    finally:
        if not outer:
            unregister_flash_attention_2()


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


def _flash_room() -> tuple[Any, dict[str, Any]]:
    """Where Transformers looks for flash-attn, and what it knows of version 2."""
    import transformers
    from transformers import modeling_flash_attention_utils as room

    entry = getattr(room, "FLASH_ATTENTION_COMPATIBILITY_MATRIX", {}).get(2, {})
    if not hasattr(room, "_lazy_imports") or not {"general_availability_check", "supported_devices"} <= entry.keys():
        raise NotImplementedError(
            f"Transformers {transformers.__version__} looks for flash-attn in a way that is not known here;"
            ' attn_implementation="fused_attn" needs nothing of it'
        )
    return room, entry


def _finding_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    def lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation != FLASH:
            return original(implementation, *args, **kwargs)
        return (
            flash_attn.flash_attn_func,
            flash_attn.flash_attn_varlen_func,
            flash_attn.flash_attn_with_kvcache,
            bert_padding.pad_input,
            bert_padding.unpad_input,
        )

    return lazy_imports
