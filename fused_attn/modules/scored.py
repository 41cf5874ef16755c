"""Attention whose score is learned: additive, bilinear, and the cosine of an angle."""

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
    """What these layers share: query and key become vectors of each head, a learned score compares them, and the
    weights average the values, which are not projected."""

    num_heads: int
    query_dim: int
    key_dim: int

    __prepare_scriptable__ = not_scriptable

    def score(self) -> Score:
        """The score with this layer's parameters, as `fused_attn.attention` takes it."""
        raise NotImplementedError

    def project(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """query (B, M, query_dim) and key (B, N, key_dim) as what the score compares, (B, num_heads, length, D)."""
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
        """(context, weights), the weights None unless need_weights.

        Args:
            query: (B, M, query_dim), or (M, query_dim) without a batch.
            key: (B, N, key_dim) or (N, key_dim).
            value: (B, N, V) or (N, V), with V divisible by num_heads, or None, and then it is key. Head h averages the
                h-th part of its width.
            key_padding_mask: (B, N), or (N,) without a batch; bool, True = ignored, or float, added to the scores.
            need_weights: also return the weights. That is another pass, and memory for M x N of them; to differentiate
                them takes one more for every 128 keys.

        Returns:
            context: (B, M, V) or (M, V). weights: (B, M, N) or (M, N), their mean over heads. A query that may see
            nothing has zeros in both.

        Raises: ValueError, TypeError: a wrong argument, by name.
        """
        need_weights = as_bool("need_weights", need_weights)
        value = key if value is None else value
        if any(isinstance(x, Tensor) and x.is_nested for x in (query, key, value)):
            raise NotImplementedError("query, key, value: nested tensors are not built yet")
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
    """Query and key are projected into one space, hidden_dim wide, which the heads share out among them."""

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
        """Projections by Xavier's uniform rule, their biases 0."""
        for projection in (self.query_proj, self.key_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def project(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.query_proj(query)), self._heads(self.key_proj(key))

    def extra_repr(self) -> str:
        return f"{self.query_dim}, {self.key_dim}, {self.hidden_dim}, num_heads={self.num_heads}"


class AdditiveAttention(ProjectedAttention):
    """weight_h . tanh(W query + b + U key): how Bahdanau et al. let a decoder's state choose among an encoder's.

    W, b is `query_proj` and U is `key_proj`, both hidden_dim wide and shared out among the heads; weight is
    (num_heads, hidden_dim / num_heads). Memory is linear in M and N. "Neural machine translation by jointly learning to
    align and translate", 2015.

    Args:
        query_dim, key_dim: widths of query and key. hidden_dim: of the space in which they meet, all heads together.
        num_heads: divides hidden_dim, and the width of the values.
        bias: whether there is a b; a second one, beside U, would add to the same.
        device, dtype: of the parameters.

    At first W, U and each head's weight are drawn by Xavier's uniform rule, so that scores of normalised inputs vary by
    about 1, and b is 0.

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
    """temperature_h cos(W query + b, U key + c): scores that the length of no vector decides.

    W, b is `query_proj` and U, c is `key_proj`, both hidden_dim wide and shared out among the heads; temperature is
    (num_heads,), learned, and multiplies: scores lie between -temperature and temperature. Henry et al., "Query-key
    normalization for Transformers", 2020.

    Args:
        query_dim, key_dim: widths of query and key. hidden_dim: of the space in which they meet, all heads together.
        num_heads: divides hidden_dim, and the width of the values.
        temperature: what every head begins with.
        bias: whether there are b and c.
        device, dtype: of the parameters.

    At first W and U are drawn by Xavier's uniform rule, and b and c are 0.

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
    """query . weight_h . key / sqrt(query_dim): the "general" score of Luong et al., "Effective approaches to
    attention-based neural machine translation", 2015.

    weight is (num_heads, query_dim, key_dim): every head compares the whole query and key.

    Args:
        query_dim, key_dim: widths of query and key.
        num_heads: divides the width of the values.
        device, dtype: of the parameters.

    At first each head's weight is drawn by Xavier's uniform rule, so that scores of normalised inputs vary by about 1.

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
