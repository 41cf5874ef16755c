"""scaled_dot_product_attention takes every shape that torch's takes, with the same values and gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attn import scaled_dot_product_attention
from tests.parity import randn, within_budget

LEADING = ((), (1,), (3,), (2, 3), (2, 3, 2), (1, 2, 1, 2), (0,), (0, 3), (2, 0), (2, 0, 3))
SIZES = (
    (5, 7, 8, 6),
    (0, 7, 8, 8),
    (5, 0, 8, 8),
    (5, 7, 0, 4),
    (5, 7, 8, 0),
    (5, 7, 0, 0),
    (0, 0, 0, 0),
)  # M, N, D, Dv


def run(call: Any, tensors: list[Tensor], dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """out and the gradients of query, key and value."""
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    if isinstance(mask := options.get("attn_mask"), Tensor) and mask.is_floating_point():
        options["attn_mask"] = mask.to(dtype)
    out = call(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def agree(*tensors: Tensor, backend: str | None = None, **options: Any) -> None:
    given = list(tensors)
    ours = run(scaled_dot_product_attention, given, torch.float32, backend=backend, **options)
    plain = run(F.scaled_dot_product_attention, given, torch.float32, **options)
    exact = run(F.scaled_dot_product_attention, given, torch.float64, **options)
    for name, got, oracle, theirs in zip(("out", "dq", "dk", "dv"), ours, exact, plain, strict=True):
        assert got.shape == theirs.shape
        within_budget(name, got, oracle, theirs)


@pytest.mark.parametrize("lead", LEADING, ids=str)
def test_leading_dims_and_sizes_of_zero(lead: tuple[int, ...]) -> None:
    for m, n, d, dv in SIZES:
        agree(randn(*lead, m, d), randn(*lead, n, d), randn(*lead, n, dv))


@pytest.mark.parametrize(
    "options",
    [{"is_causal": True}, {"scale": 0.5}, {"attn_mask": torch.ones(5, 7).tril() > 0}, {"attn_mask": randn(5, 7)},
     {"enable_gqa": True}],
    ids=lambda x: next(iter(x)),
)  # fmt: skip
@pytest.mark.parametrize(("d", "dv"), ((0, 4), (8, 0)))
def test_head_dim_of_zero(d: int, dv: int, options: dict) -> None:
    heads = 1 if options.get("enable_gqa") else 2
    agree(randn(2, 2, 5, d), randn(2, heads, 7, d), randn(2, heads, 7, dv), **options)


@pytest.mark.parametrize("lead", LEADING[:5], ids=str)
def test_masks_of_every_rank(lead: tuple[int, ...]) -> None:
    """Each dim whole or of size 1, of as many of the last dims as there may be."""
    tensors = randn(*lead, 5, 8), randn(*lead, 7, 8), randn(*lead, 7, 8)
    full = (*lead, 5, 7)
    for rank in range(2, len(full) + 1):
        for whole in itertools.product((True, False), repeat=rank):
            shape = tuple(n if x else 1 for n, x in zip(full[-rank:], whole, strict=True))
            agree(*tensors, attn_mask=randn(*shape))
            agree(*tensors, attn_mask=randn(*shape) > -1)
    for mask in (randn(7), randn(7) > 0, randn(1), randn()):  # torch refuses some of these
        wide = mask.expand(1, max(mask.numel(), 1))
        assert torch.equal(*(scaled_dot_product_attention(*tensors, x) for x in (mask, wide)))
    with pytest.raises(ValueError, match=r"attn_mask: .*does not broadcast"):
        scaled_dot_product_attention(*tensors, randn(1, *full))


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 1, 5, 8), (1, 3, 7, 8), (7, 8)),
        ((2, 3, 5, 8), (3, 7, 8), (7, 6)),
        ((5, 8), (3, 7, 8), (2, 1, 7, 8)),
    ],
    ids=str,
)
def test_leading_dims_that_broadcast(shapes: tuple) -> None:
    agree(*(randn(*shape, seed=i) for i, shape in enumerate(shapes)))


@pytest.mark.parametrize(
    "shapes",
    [
        ((4, 5, 8), (2, 7, 8), (2, 7, 8)),
        ((3, 2, 4, 5, 8), (3, 2, 2, 7, 8), (3, 2, 2, 7, 8)),
        ((2, 6, 5, 8), (2, 3, 7, 8), (2, 2, 7, 8)),
        ((2, 4, 5, 8), (2, 1, 7, 8), (2, 4, 7, 8)),
    ],
    ids=str,
)
def test_groups_of_heads(shapes: tuple) -> None:
    """key and value may have different numbers of heads, on every backend."""
    for backend in (None, "tiled", "reference"):
        agree(*(randn(*shape, seed=i) for i, shape in enumerate(shapes)), enable_gqa=True, backend=backend)


@pytest.mark.parametrize("options", ({}, {"is_causal": True}, {"attn_mask": randn(7, 18)[:, ::2] > -1}), ids=str)
def test_strides(options: dict) -> None:
    """Whatever lies in memory between the elements of the last dim; a kernel that reads past them returns garbage."""
    q, k, v = randn(2, 4, 7, 8), randn(2, 4, 9, 8), randn(2, 4, 9, 8)
    for strided in (
        (q, k, randn(2, 4, 9, 16)[..., ::2]),
        (q, randn(8, 9, 4, 2).permute(3, 2, 1, 0), v),
        (randn(2, 4, 8, 7).mT, k, v),
        (q, k, randn(2, 4, 9, 1).expand(2, 4, 9, 8)),
    ):
        plain = [x.contiguous() for x in strided]
        oracle, theirs = (
            F.scaled_dot_product_attention(*(x.to(dtype) for x in plain), **options)
            for dtype in (torch.float64, torch.float32)
        )
        for _ in range(4):  # some of which may be replayed
            within_budget("out", scaled_dot_product_attention(*strided, **options), oracle, theirs)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_strides_after_repeated_calls() -> None:
    """A call that may be replayed is compared with the next one, whose tensors may be of any layout."""
    x = randn(2, 2, 3, 8)
    for _ in range(6):
        scaled_dot_product_attention(x, x, x)
    nested = torch.nested.nested_tensor([randn(2, 3, 8), randn(2, 5, 8)], layout=torch.strided)
    with pytest.raises(TypeError, match=r"query: expected a nested tensor of layout torch.jagged"):
        scaled_dot_product_attention(nested, nested, nested)


@pytest.mark.parametrize("shapes", (((5, 8), (1, 7, 8)), ((1, 5, 8), (1, 1, 7, 8)), ((1, 1, 5, 8), (7, 8))), ids=str)
def test_repeated_calls_have_the_rank_of_the_first(shapes: tuple[tuple[int, ...], ...]) -> None:
    q, k = (torch.randn(x) for x in shapes)
    wanted = F.scaled_dot_product_attention(q, k, k).shape
    assert all(scaled_dot_product_attention(q, k, k).shape == wanted for _ in range(5))
