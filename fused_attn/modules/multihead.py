"""`torch.nn.MultiheadAttention` with fused attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..api.attention import attention
from ..spec.checks import as_float
from ..spec.masks import Mask
from .inputs import InputError, as_flag, check_inputs, check_mask, checked_sizes, mask_and_bias, not_scriptable
from .weights import attention_weights


def _no_fast_path(module: nn.Module, args: Any) -> None:
    """A hook without an effect of its own.

    The fast path of torch.nn.TransformerEncoderLayer computes attention without calling `self_attn`, unless that module
    has a hook.
    """


_here = _no_fast_path  # its name in modules that were saved before it was renamed


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with fused attention: the same constructor, parameters and forward.

    It is a subclass: parameters have the same names, shapes and initial values, and a state_dict loads either way. With
    E = embed_dim, H = num_heads and D = E / H, head h computes softmax(D^-1/2 (query Wq_h)(key Wk_h)^T + masks)(value
    Wv_h), and `out_proj` maps the concatenated heads to the output. Vaswani et al., "Attention is all you need", 2017.

    Args: as in torch.
        embed_dim, num_heads: E and H.
        dropout: probability of dropping a weight, in training.
        bias: whether the projections have biases.
        add_bias_kv: append one learned key and value.
        add_zero_attn: append one key and value of zeros.
        kdim, vdim: widths of key and value; None: embed_dim.
        batch_first: (B, L, E) in and out instead of (L, B, E).
        device, dtype: of the parameters.

    Differences from torch:

    - Memory is linear in the lengths; need_weights=True adds only the weights themselves.
    - A fully masked query has weights of zero and attention of zero, so its output is the bias of out_proj; torch gives
      NaN wherever it returns weights.
    - Float masks may be float32 with half-precision inputs, and a bool mask may be combined with a float one.
    - With the hint is_causal, added keys (add_bias_kv, add_zero_attn) stay visible to every query.
    - Nested tensors (layout torch.strided, no masks) may require gradients, and key may differ from query.
    - torch.nn.TransformerEncoderLayer calls this module in evaluation too: a forward pre-hook without an effect of its
      own turns the layer's fast path off, and TransformerEncoder passes nested tensors.
    - Flags are bools (numpy's too), 0 or 1; torch takes a string such as "false" for True.
    - A wrong argument raises ValueError or TypeError, which are also the AssertionError or RuntimeError of torch.
    - torch.jit.script raises an error; torch.jit.trace, torch.compile and torch.export work.

    >>> import torch, fused_attn
    >>> layer = fused_attn.modules.MultiheadAttention(64, 8, batch_first=True)
    >>> layer.load_state_dict(torch.nn.MultiheadAttention(64, 8).state_dict())
    <All keys matched successfully>
    >>> x = torch.randn(2, 128, 64)
    >>> padding = torch.arange(128) >= torch.tensor([[128], [100]])
    >>> out, weights = layer(x, x, x, key_padding_mask=padding)
    >>> out.shape, weights.shape
    (torch.Size([2, 128, 64]), torch.Size([2, 128, 128]))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        embed_dim, num_heads = checked_sizes(embed_dim=embed_dim, num_heads=num_heads)
        checked_sizes(**{name: x for name, x in (("kdim", kdim), ("vdim", vdim)) if x is not None})
        dropout = as_float("dropout", dropout)
        bias, batch_first = as_flag("bias", bias), as_flag("batch_first", batch_first)
        add_bias_kv, add_zero_attn = as_flag("add_bias_kv", add_bias_kv), as_flag("add_zero_attn", add_zero_attn)
        if embed_dim % num_heads:
            raise InputError(f"embed_dim: must be divisible by num_heads = {num_heads}, got {embed_dim}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: must lie in [0, 1], got {dropout}")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.register_forward_pre_hook(_no_fast_path)

    __prepare_scriptable__ = not_scriptable

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output, weights); weights is None unless need_weights.

        Args:
            query: (M, B, E), with batch_first (B, M, E), or (M, E) without a batch.
            key: (N, B, kdim), (B, N, kdim) or (N, kdim).
            value: (N, B, vdim), (B, N, vdim) or (N, vdim).
            key_padding_mask: (B, N), or (N,) without a batch; bool, True = ignored, or float, added to the scores.
            need_weights: also return the weights, which takes another pass and M x N memory. Their derivative takes one
                pass for every 128 keys.
            attn_mask: (M, N) or (B * H, M, N), bool, True = ignored, or float, added to the scores. A float mask that
                requires a gradient gets one.
            average_attn_weights: average the weights over heads.
            is_causal: a hint that attn_mask, which is required then, is the causal mask: row i attends to keys j <= i.
                Without key_padding_mask and need_weights, as in torch, attn_mask is not read.

        Returns:
            output: query's shape, with width embed_dim. weights: (B, M, N), or (B, H, M, N) if not averaged; without B
            for unbatched inputs. N includes added keys. In training dropout has been applied to them, as in torch.

        Raises:
            ValueError, TypeError: a wrong argument; the message names it.
        """
        need_weights, is_causal = as_flag("need_weights", need_weights), as_flag("is_causal", is_causal)
        average_attn_weights = as_flag("average_attn_weights", average_attn_weights)
        if is_causal and attn_mask is None:
            raise InputError("attn_mask: must be given with the hint is_causal, got None")
        nested = [isinstance(x, Tensor) and x.is_nested for x in (query, key, value)]
        if any(nested):
            if not all(nested) or key_padding_mask is not None or attn_mask is not None:
                raise InputError("query, key, value: all or none must be nested, and those that are take no mask")
            return self._nested(query, key, value, need_weights, average_attn_weights)
        b, m, n = check_inputs(query, key, value, (self.embed_dim, self.kdim, self.vdim), self.batch_first)
        check_mask("key_padding_mask", key_padding_mask, query, (n,) if query.ndim == 2 else (b, n))
        check_mask("attn_mask", attn_mask, query, (m, n), (b * self.num_heads, m, n))

        q, k, v = self._project(query, key, value)
        batched = query.ndim == 3
        if not batched:
            q, k, v = (x[None] for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        k, v, added = self._add_keys(k, v)

        causal = is_causal and key_padding_mask is None and not need_weights and not added
        masks = {}
        if attn_mask is not None and not causal:
            folded = attn_mask.ndim == 3
            masks["attn_mask"] = attn_mask.unflatten(0, (b, self.num_heads)) if folded else attn_mask[None, None]
        if key_padding_mask is not None:
            masks["key_padding_mask"] = key_padding_mask[:, None, None]
        mask, bias = mask_and_bias(q, masks, added)
        out, weights = self._attend(
            q, k, v, need_weights, average_attn_weights, mask=mask, bias=bias, causal=causal, alignment="top_left"
        )
        if not batched:
            out, weights = out[0], None if weights is None else weights[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return self.out_proj(out), weights

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, need_weights: bool, average: bool, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The heads' outputs side by side, (B, M, E), and the weights; projected q, k and v are (B, length, E)."""
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        if self.training and self.dropout > 0.0:
            # One seed, so that the weights returned are those that were used.
            options |= {"dropout_p": self.dropout, "seed": torch.randint(2**63 - 1, (), device=q.device)}
        out: Any = attention(q, k, v, **options)
        weights = (
            attention_weights(q.to(out.dtype), k.to(out.dtype), average=average, **options) if need_weights else None
        )
        return out.transpose(1, 2).flatten(2), weights

    def _nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Nested tensors (B, length of each, E), padded and masked by length. The weights stay padded."""
        lengths: dict[str, list[int]] = {}
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.layout != torch.strided:
                raise NotImplementedError(f"{name}: nested tensors of layout {x.layout} are not supported yet")
            if x.ndim != 3 or not self.batch_first:
                raise InputError(f"{name}: a nested tensor needs 3 dimensions and batch_first, got {x.ndim} dimensions")
            lengths[name] = [row.shape[0] for row in x.unbind()]
        if lengths["value"] != lengths["key"] or len(lengths["key"]) != len(lengths["query"]):
            raise InputError(f"key, value: lengths must agree, and their number with query's, got {lengths}")
        if self.bias_k is not None or self.add_zero_attn:
            raise NotImplementedError("query: nested tensors with add_bias_kv or add_zero_attn are not supported yet")

        padded = {id(x): x.to_padded_tensor(0.0) for x in (query, key, value)}
        q, k, v = self._project(*(padded[id(x)] for x in (query, key, value)))
        counts = {name: torch.tensor(x, dtype=torch.int32, device=q.device) for name, x in lengths.items()}
        mask = Mask.lengths(counts["key"], counts["query"])
        out, weights = self._attend(q, k, v, need_weights, average, mask=mask)
        rows = [row[:n] for row, n in zip(self.out_proj(out).unbind(), lengths["query"], strict=True)]
        return torch.nested.as_nested_tensor(rows), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k and v of width embed_dim. Self-attention takes one matrix product."""
        bias: Tensor | None = self.in_proj_bias
        if bias is not None:  # its dtype may differ, as in torch
            bias = bias.to((self.in_proj_weight if self._qkv_same_embed_dim else self.q_proj_weight).dtype)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        weights: tuple[Tensor, ...]
        if not self._qkv_same_embed_dim:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        elif query is key and key is value:
            return F.linear(query, self.in_proj_weight, bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        return q, k, v

    def _add_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """k and v (B, N, E) followed by the learned key and the key of zeros, and the number of added keys."""
        extra_k, extra_v = [], []
        if self.bias_k is not None and self.bias_v is not None:
            extra_k.append(self.bias_k)
            extra_v.append(self.bias_v)
        if self.add_zero_attn:
            extra_k.append(k.new_zeros(1, 1, self.embed_dim))
            extra_v.append(v.new_zeros(1, 1, self.embed_dim))
        if not extra_k:
            return k, v, 0
        k, v = (torch.cat([x, *(y.expand(x.shape[0], 1, -1) for y in z)], 1) for x, z in ((k, extra_k), (v, extra_v)))
        return k, v, len(extra_k)
