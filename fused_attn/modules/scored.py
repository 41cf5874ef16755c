"""Attention layers with learned scores: additive, bilinear and cosine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..api.attention import attention
from ..scores import Additive, Bilinear, Cosine, Score
from ..spec.checks import as_bool, as_float
from .inputs import check_inputs, check_mask, checked_sizes, mask_and_bias, not_scriptable
from .weights import attention_weights


class ScoredAttention(nn.Module):
    """Base class: projections of query and key are compared by a learned score; values are not projected."""

    num_heads: int
    query_dim: int
    key_dim: int

    __prepare_scriptable__ = not_scriptable

    def score(self) -> Score:
        """The score of `fused_attn.scores` with this layer's parameters."""
        raise NotImplementedError

    def project(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Map query (B, M, query_dim) and key (B, N, key_dim) to vectors (B, num_heads, length, D) for the score."""
        raise NotImplementedError

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (context, weights); weights is None unless need_weights.

        Args:
            query: (B, M, query_dim), or (M, query_dim) without a batch.
            key: (B, N, key_dim) or (N, key_dim).
            value: (B, N, V) or (N, V), with V divisible by num_heads; None: key. Head h averages the h-th part of V.
            key_padding_mask: (B, N), or (N,) without a batch; bool, True = ignored, or float, added to the scores.
            need_weights: also return the weights, which takes another pass and M x N memory. Their derivative takes one
                pass for every 128 keys.

        Returns:
            context: (B, M, V) or (M, V). weights: (B, M, N) or (M, N), the mean over heads. Both are zero for a fully
            masked query.

        Raises:
            ValueError, TypeError: a wrong argument; the message names it.
        """
        need_weights = as_bool("need_weights", need_weights)
        value = key if value is None else value
        if any(isinstance(x, Tensor) and x.is_nested for x in (query, key, value)):
            raise NotImplementedError("query, key, value: nested tensors are not supported yet")
        b, _, n = check_inputs(query, key, value, (self.query_dim, self.key_dim, None))
        check_mask("key_padding_mask", key_padding_mask, query, (n,) if query.ndim == 2 else (b, n))
        if value.shape[-1] % self.num_heads:
            raise ValueError(
                f"value: its width must be divisible by num_heads = {self.num_heads}, got {value.shape[-1]}"
            )

        batched = query.ndim == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
        q, k = self.project(query, key)
        v = value.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        masks = {} if key_padding_mask is None else {"key_padding_mask": key_padding_mask.view(b, 1, 1, n)}
        mask, bias = mask_and_bias(q, masks)
        options: dict[str, Any] = {"score": self.score(), "mask": mask, "bias": bias}
        out: Any = attention(q, k, v, **options)
        context = out.transpose(1, 2).flatten(2)
        weights = attention_weights(q.to(out.dtype), k.to(out.dtype), average=True, **options) if need_weights else None
        return (context, weights) if batched else (context[0], None if weights is None else weights[0])

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class ProjectedAttention(ScoredAttention):
    """Base class: query and key are projected to hidden_dim, which is split among the heads."""

    def __init__(
        self, query_dim: int, key_dim: int, hidden_dim: int, num_heads: int, biases: tuple[bool, bool], **factory: Any
    ) -> None:
        super().__init__()
        query_dim, key_dim, hidden_dim, num_heads = checked_sizes(
            query_dim=query_dim, key_dim=key_dim, hidden_dim=hidden_dim, num_heads=num_heads
        )
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim: must be divisible by num_heads = {num_heads}, got {hidden_dim}")
        self.query_dim, self.key_dim, self.hidden_dim, self.num_heads = query_dim, key_dim, hidden_dim, num_heads
        self.query_proj = nn.Linear(query_dim, hidden_dim, bias=biases[0], **factory)
        self.key_proj = nn.Linear(key_dim, hidden_dim, bias=biases[1], **factory)

    def reset_parameters(self) -> None:
        """Initialize projections by Xavier's uniform rule and their biases with 0."""
        for projection in (self.query_proj, self.key_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def project(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.query_proj(query)), self._heads(self.key_proj(key))

    def extra_repr(self) -> str:
        return f"{self.query_dim}, {self.key_dim}, {self.hidden_dim}, num_heads={self.num_heads}"


class AdditiveAttention(ProjectedAttention):
    """Additive scores weight_h . tanh(W query + b + U key).

    W, b is `query_proj` and U is `key_proj`, of width hidden_dim, split among the heads; weight is
    (num_heads, hidden_dim / num_heads). Memory is linear in M and N. Bahdanau et al., "Neural machine translation by
    jointly learning to align and translate", 2015.

    Args:
        query_dim, key_dim: widths of query and key. hidden_dim: width of the projections, all heads together.
        num_heads: must divide hidden_dim and the width of the values.
        bias: whether b exists; a bias of U would be redundant.
        device, dtype: of the parameters.

    W, U and each head's weight are initialized by Xavier's uniform rule, so that scores of normalized inputs have a
    standard deviation of about 1; b is 0.

    >>> import torch, fused_attn
    >>> layer = fused_attn.modules.AdditiveAttention(48, 64, 32)
    >>> state, encoded = torch.randn(2, 1, 48), torch.randn(2, 30, 64)
    >>> context, weights = layer(state, encoded, need_weights=True)
    >>> context.shape, weights.shape
    (torch.Size([2, 1, 64]), torch.Size([2, 1, 30]))
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        hidden_dim: int,
        num_heads: int = 1,
        *,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            query_dim, key_dim, hidden_dim, num_heads, (as_bool("bias", bias), False), device=device, dtype=dtype
        )
        self.weight = nn.Parameter(torch.empty(num_heads, hidden_dim // num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for head in range(self.num_heads):
            nn.init.xavier_uniform_(self.weight[head, None])

    def score(self) -> Score:
        return Additive(self.weight)


class CosineAttention(ProjectedAttention):
    """Cosine scores temperature_h cos(W query + b, U key + c), independent of the vectors' lengths.

    W, b is `query_proj` and U, c is `key_proj`, of width hidden_dim, split among the heads; temperature (num_heads,) is
    learned and multiplies: scores lie between -temperature and temperature. Henry et al., "Query-key
    normalization for Transformers", 2020.

    Args:
        query_dim, key_dim: widths of query and key. hidden_dim: width of the projections, all heads together.
        num_heads: must divide hidden_dim and the width of the values.
        temperature: initial value of every head.
        bias: whether b and c exist.
        device, dtype: of the parameters.

    W and U are initialized by Xavier's uniform rule; b and c are 0.

    >>> import torch, fused_attn
    >>> layer = fused_attn.modules.CosineAttention(48, 64, 32, num_heads=4)
    >>> context, _ = layer(torch.randn(2, 7, 48), torch.randn(2, 30, 64))
    >>> context.shape
    torch.Size([2, 7, 64])
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        hidden_dim: int,
        num_heads: int = 1,
        *,
        temperature: float = 10.0,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        bias = as_bool("bias", bias)
        super().__init__(query_dim, key_dim, hidden_dim, num_heads, (bias, bias), device=device, dtype=dtype)
        self.initial_temperature = as_float("temperature", temperature)
        self.temperature = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.temperature, self.initial_temperature)

    def score(self) -> Score:
        return Cosine(self.temperature)


class BilinearAttention(ScoredAttention):
    """Bilinear scores query . weight_h . key / sqrt(query_dim).

    weight is (num_heads, query_dim, key_dim): every head compares the whole query and key. This is the "general" score
    of Luong et al., "Effective approaches to attention-based neural machine translation", 2015.

    Args:
        query_dim, key_dim: widths of query and key.
        num_heads: must divide the width of the values.
        device, dtype: of the parameters.

    Each head's weight is initialized by Xavier's uniform rule, so that scores of normalized inputs have a standard
    deviation of about 1.

    >>> import torch, fused_attn
    >>> layer = fused_attn.modules.BilinearAttention(48, 64, num_heads=2)
    >>> query, key, value = torch.randn(2, 7, 48), torch.randn(2, 30, 64), torch.randn(2, 30, 96)
    >>> context, _ = layer(query, key, value, key_padding_mask=torch.arange(30) >= torch.tensor([[30], [21]]))
    >>> context.shape
    torch.Size([2, 7, 96])
    """

    def __init__(
        self, query_dim: int, key_dim: int, num_heads: int = 1, *, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        query_dim, key_dim, num_heads = checked_sizes(query_dim=query_dim, key_dim=key_dim, num_heads=num_heads)
        self.query_dim, self.key_dim, self.num_heads = query_dim, key_dim, num_heads
        self.weight = nn.Parameter(torch.empty(num_heads, query_dim, key_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for head in range(self.num_heads):
            nn.init.xavier_uniform_(self.weight[head])

    def project(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (x[:, None].expand(-1, self.num_heads, -1, -1) for x in (query, key))
        return q, k

    def score(self) -> Score:
        return Bilinear(self.weight)

    def extra_repr(self) -> str:
        return f"{self.query_dim}, {self.key_dim}, num_heads={self.num_heads}"
