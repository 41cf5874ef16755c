"""Transformers' attention interface: after `register()`, any model takes attn_implementation="fused_attn".

A mask that is handed over says everything: causality, window and padding. Without one, causality and
the sliding window, if any, are intervals here.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..api import attention

NAME = "fused_attn"


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
    (Hq,)) and position_bias (added) change the result; a paged cache is refused.
    """
    if options.get("cache") is not None:
        raise NotImplementedError("cache: continuous batching over a paged cache is not built yet")
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
