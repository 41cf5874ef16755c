"""The weights that attention gave to its values, with a derivative.

Values that are columns of the identity come out as weights: that is `attention` itself, with all that it knows of
dropout and derivatives, once for every few columns. Where keys are many, `attention_map` is faster, which has neither:
then dropout is applied here, and the columns are left to a backward, which few callers ever ask for, and to transforms
of torch.
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

COLUMNS = 128  # of the identity in one pass, and the most keys for which that pass is taken
WIDE = 512  # the same where each pass keeps its M x N scores, to be differentiated again; the widest that kernels take
ROWS = 128  # of a head's weights that dropout is drawn for at once


def attention_weights(q: Tensor, k: Tensor, *, average: bool, score: Any = "dot", **options: Any) -> Tensor:
    """(B, Hq, M, N), or their mean over heads (B, M, N), in q's dtype: what `attention` averages values by.

    q, k: (B, H, length, D); options: those of `attention`, with a pinned seed where there is dropout, which the weights
    then show. Memory beside the answer is linear in length.
    """
    if k.shape[2] <= COLUMNS or torch.compiler.is_compiling():
        return _of_values(q, k, average, score=score, **options)
    given = {"q": q, "k": k, "parameter": getattr(score, "parameter", None), **options}
    tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
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
    found = q.new_zeros(b, *(() if average else (heads,)), m, n, dtype=torch.promote_types(q.dtype, torch.float32))
    for head in range(heads):
        part = weights_of(q, k, Options(**options), heads=[head])[:, 0]
        if dropout_p:
            _drop(part, heads, head, dropout_p, seed)
        if average:
            found += part / heads
        else:
            found[:, head] = part
    return found.to(q.dtype)


def _drop(weights: Tensor, heads: int, head: int, p: float, seed: Tensor) -> None:
    """Apply the dropout of one of the heads to its weights (B, M, N), in place."""
    b, m, n = weights.shape
    dropout = Dropout(p, torch.stack((seed, torch.zeros_like(seed))))
    which, keys = (torch.arange(x, device=weights.device) for x in (b, n))
    for start in range(0, m, ROWS):
        rows = torch.arange(start, min(start + ROWS, m), device=weights.device)
        weights[:, rows] *= dropout.materialize(which * heads + head, rows, keys) * dropout.rescale


class _Weights(torch.autograd.Function):
    """`_of_map`, and the derivative of `_of_values`."""

    @staticmethod
    def forward(
        ctx: Any, average: bool, score: Any, others: dict[str, Any], names: tuple[str, ...], *tensors: Tensor
    ) -> Tensor:
        ctx.how = average, score, others, names
        ctx.save_for_backward(*tensors)
        return _of_map(**_given(tensors, *ctx.how))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        columns = WIDE if torch.is_grad_enabled() else COLUMNS

        def weights(*tensors: Tensor) -> tuple[Tensor]:
            return (_of_values(**_given(tensors, *ctx.how), columns=columns),)

        needs = ctx.needs_input_grad[len(ctx.how) :]
        return *[None] * len(ctx.how), *vjp(weights, ctx.saved_tensors, needs, (grad,))


def _given(tensors: Any, average: bool, score: Any, others: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of which these are the tensors; one of them may be the score's parameter."""
    given = dict(zip(names, tensors, strict=True))
    parameter = given.pop("parameter", None)
    return {"average": average, "score": score if parameter is None else score.replace(parameter), **others, **given}
