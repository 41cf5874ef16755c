"""Attention weights with a derivative.

Two methods. `_of_values` runs `attention` with columns of the identity as values, a few at a time; it has dropout and
derivatives. `_of_map` runs `attention_map`, which is faster for many keys but has neither: dropout is applied here, and
a backward and torch's transforms go through `_of_values`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..api.attention import attention
from ..api.statistics import weights_of
from ..spec.dropout import Dropout
from ..spec.options import Options
from ..spec.transforms import transform_of, vjp

COLUMNS = 128  # columns of the identity per pass; at most this many keys take one pass, without `_of_map`
WIDE = 512  # columns per pass where a pass keeps its M x N scores for another derivative; kernels take no wider values
ROWS = 128  # rows of a head's weights per block of dropout


def attention_weights(q: Tensor, k: Tensor, *, average: bool, score: Any = "dot", **options: Any) -> Tensor:
    """The weights of `attention`, (B, Hq, M, N), or their mean over heads (B, M, N), in q's dtype.

    q, k: (B, H, length, D). options: those of `attention`; with dropout, which is applied to the weights, a fixed seed.
    Memory besides the result is linear in the lengths.
    """
    if k.shape[2] <= COLUMNS or torch.compiler.is_compiling():
        return _of_values(q, k, average, score=score, **options)
    args = {"q": q, "k": k, "parameter": getattr(score, "parameter", None), **options}
    tensors = {name: x for name, x in args.items() if isinstance(x, Tensor)}
    if transform_of(tensors.values()):
        return _of_values(q, k, average, WIDE, score=score, **options)
    others = {name: x for name, x in options.items() if name not in tensors}
    return _Weights.apply(average, score, others, tuple(tensors), *tensors.values())


def _of_values(q: Tensor, k: Tensor, average: bool, columns: int = COLUMNS, **options: Any) -> Tensor:
    n = k.shape[2]
    parts = []
    for start in range(0, n, columns):
        values = torch.eye(n, min(columns, n - start), dtype=q.dtype, device=q.device).roll(start, 0)
        part: Any = attention(q, k, values.expand(*k.shape[:2], -1, -1), **options)
        parts.append(part.mean(1) if average else part)
    if not parts:
        return q.new_empty(q.shape[0], *(() if average else q.shape[1:2]), q.shape[2], 0)
    return torch.cat(parts, -1)


def _of_map(q: Tensor, k: Tensor, average: bool, dropout_p: float = 0.0, seed: Any = None, **options: Any) -> Tensor:
    b, heads, m, n = *q.shape[:3], k.shape[2]
    result = q.new_zeros(b, *(() if average else (heads,)), m, n, dtype=torch.promote_types(q.dtype, torch.float32))
    for head in range(heads):
        part = weights_of(q, k, Options(**options), heads=[head])[:, 0]
        if dropout_p:
            _drop(part, heads, head, dropout_p, seed)
        if average:
            result += part / heads
        else:
            result[:, head] = part
    return result.to(q.dtype)


def _drop(weights: Tensor, heads: int, head: int, p: float, seed: Tensor) -> None:
    """Apply one head's dropout to its weights (B, M, N), in place."""
    b, m, n = weights.shape
    dropout = Dropout(p, torch.stack((seed, torch.zeros_like(seed))))
    batches, keys = (torch.arange(x, device=weights.device) for x in (b, n))
    for start in range(0, m, ROWS):
        rows = torch.arange(start, min(start + ROWS, m), device=weights.device)
        weights[:, rows] *= dropout.materialize(batches * heads + head, rows, keys) * dropout.rescale


class _Weights(torch.autograd.Function):
    """Forward by `_of_map`, backward by `_of_values`."""

    @staticmethod
    def forward(
        ctx: Any, average: bool, score: Any, others: dict[str, Any], names: tuple[str, ...], *tensors: Tensor
    ) -> Tensor:
        ctx.settings = average, score, others, names
        ctx.save_for_backward(*tensors)
        return _of_map(**_arguments(tensors, *ctx.settings))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        columns = WIDE if torch.is_grad_enabled() else COLUMNS

        def weights(*tensors: Tensor) -> tuple[Tensor]:
            return (_of_values(**_arguments(tensors, *ctx.settings), columns=columns),)

        needs = ctx.needs_input_grad[len(ctx.settings) :]
        return *[None] * len(ctx.settings), *vjp(weights, ctx.saved_tensors, needs, (grad,))


def _arguments(
    tensors: Any, average: bool, score: Any, others: dict[str, Any], names: tuple[str, ...]
) -> dict[str, Any]:
    """The arguments with these tensors by name; "parameter" is that of the score."""
    args = dict(zip(names, tensors, strict=True))
    parameter = args.pop("parameter", None)
    return {"average": average, "score": score if parameter is None else score.replace(parameter), **others, **args}
