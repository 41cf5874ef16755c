"""Layers with a learned score against their formulas."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_attn.modules import AdditiveAttention, BilinearAttention, CosineAttention
from tests.modules.layers import (
    NESTED,
    B,
    M,
    N,
    agree,
    autocast_agrees,
    few_and_many_keys,  # noqa: F401
    judge,
    outputs,
    outputs_and_gradients,
    padding,
    randomised,
    run,
)
from tests.parity import Largest, randn, within_budget

SCORED: dict[str, Callable[..., nn.Module]] = {
    "additive": lambda **options: AdditiveAttention(5, 6, 8, **options),
    "bilinear": lambda **options: BilinearAttention(5, 6, **options),
    "cosine": lambda **options: CosineAttention(5, 6, 8, **options),
}


def by_definition(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Head by head, with every score in memory, from the formulas in the docstrings."""
    value = key if value is None else value
    contexts, weights = [], []
    for head, part in enumerate(value.chunk(layer.num_heads, -1)):
        if isinstance(layer, BilinearAttention):
            scores = torch.einsum("...md,de,...ne->...mn", query, layer.weight[head], key) / 5**0.5
        else:
            projected = layer.query_proj(query), layer.key_proj(key)
            q, k = (x.chunk(layer.num_heads, -1)[head] for x in projected)
            if isinstance(layer, AdditiveAttention):
                scores = torch.tanh(q[..., :, None, :] + k[..., None, :, :]) @ layer.weight[head]
            else:
                q, k = (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (q, k))
                scores = layer.temperature[head] * (q @ k.mT)
        if key_padding_mask is not None:
            mask = key_padding_mask[..., None, :]
            scores = scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        weights.append(scores.softmax(-1))
        contexts.append(weights[-1] @ part)
    return torch.cat(contexts, -1), torch.stack(weights).mean(0) if need_weights else None


def scored(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A layer, and the same by definition."""
    ours = randomised(SCORED[name](**options))
    theirs = copy.deepcopy(ours)
    theirs.forward = functools.partial(by_definition, theirs)  # type: ignore[method-assign]
    return ours, theirs


@pytest.mark.usefixtures("few_and_many_keys")
@pytest.mark.parametrize("masks", ("none", "bool", "float"))
@pytest.mark.parametrize("heads", (1, 2))
@pytest.mark.parametrize("name", SCORED)
def test_scores_agree_with_their_definition(name: str, heads: int, masks: str) -> None:
    ours, theirs = scored(name, num_heads=heads)
    mask = {"none": None, "bool": padding(10, 4, 1), "float": randn(B, N)}[masks]
    query, key, value = randn(B, M, 5), randn(B, N, 6), randn(B, N, 4)
    options = {"key_padding_mask": mask, "need_weights": True}
    agree(ours, theirs, (query, key, value), options, others=6)
    got = agree(ours, theirs, (query, key), options | {"need_weights": False}, others=6)
    assert "output 1" not in got
    options["key_padding_mask"] = None if mask is None else mask[1]
    agree(ours, theirs, (query[0], key[0]), options, others=6)


@pytest.mark.parametrize("name", SCORED)
def test_scores_of_one_query_and_of_none(name: str) -> None:
    """A decoder's one state; a sample whose keys are all padding; sizes of zero."""
    ours, theirs = scored(name, num_heads=2)
    agree(ours, theirs, (randn(B, 1, 5), randn(B, N, 6)), {"need_weights": True}, others=2)
    query, key = randn(B, M, 5).requires_grad_(), randn(B, N, 6).requires_grad_()
    context, weights = ours(query, key, key_padding_mask=padding(10, 0, 3), need_weights=True)
    assert not context[1].any() and not weights[1].any() and context[0].any()
    grads = torch.autograd.grad(context.sum(), (query, key, *ours.parameters()))
    assert all(g.isfinite().all() for g in grads) and not grads[0][1].any() and not grads[1][1].any()
    for b, m, n in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        context, weights = ours(torch.zeros(b, m, 5), torch.zeros(b, n, 6), need_weights=True)
        assert context.shape == (b, m, 6) and weights.shape == (b, m, n) and not context.any()


@pytest.mark.usefixtures("few_and_many_keys")
@pytest.mark.parametrize("name", SCORED)
def test_scores_in_other_types(name: str) -> None:
    """A layer in half precision, and one under autocast."""
    ours, theirs = scored(name, num_heads=2)
    query, key, mask = randn(B, M, 5), randn(B, N, 6), padding(10, 4, 1)
    for dtype in (torch.float16, torch.bfloat16):
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        args = query.to(dtype), key.to(dtype)
        with torch.no_grad():
            got, plain = (x(*args, key_padding_mask=mask, need_weights=True) for x in (ours, theirs))
            oracle = copy.deepcopy(theirs).double()(
                *(x.double() for x in args), key_padding_mask=mask, need_weights=True
            )
        for i, (x, y, z) in enumerate(zip(got, oracle, plain, strict=True)):
            assert x.dtype == dtype
            within_budget(str(i), x, y, z)
    ours, theirs = scored(name, num_heads=2)
    autocast_agrees(ours, theirs, (query, key), {"key_padding_mask": mask, "need_weights": True})


@pytest.mark.parametrize("name", SCORED)
def test_scored_layers_are_modules(name: str) -> None:
    """They start as documented, say their sizes, and are copied, pickled and loaded."""
    layer = SCORED[name](num_heads=2, dtype=torch.float64)
    assert "5, 6" in repr(layer) and "num_heads=2" in repr(layer)
    assert {x.dtype for x in layer.parameters()} == {torch.float64}
    assert {x.device.type for x in SCORED[name](device="meta").parameters()} == {"meta"}
    args = randn(B, M, 5).double(), randn(B, N, 6).double()
    expected = layer(*args)[0]
    other = SCORED[name](num_heads=2, dtype=torch.float64)
    assert not torch.equal(other(*args)[0], expected)
    other.load_state_dict(layer.state_dict())
    for copied in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(*args)[0], expected)
    layer.reset_parameters()
    assert not torch.equal(layer(*args)[0], expected)


PARAMETERS = {
    "additive": {"weight", "query_proj.weight", "query_proj.bias", "key_proj.weight"},
    "bilinear": {"weight"},
    "cosine": {"temperature", "query_proj.weight", "query_proj.bias", "key_proj.weight", "key_proj.bias"},
}


@pytest.mark.parametrize("name", SCORED)
def test_first_parameters(name: str) -> None:
    """Each by its name, Xavier's bound for matrices and for the rows that are one for each head."""
    torch.manual_seed(0)
    layer = SCORED[name](num_heads=8)
    assert {key for key, _ in layer.named_parameters()} == PARAMETERS[name]
    for key, parameter in layer.named_parameters():
        if key.endswith("bias"):
            assert not parameter.any()
        elif key == "temperature":
            assert torch.equal(parameter, torch.full((8,), 10.0))
        else:
            fan_out = 1 if (name, key) == ("additive", "weight") else parameter.shape[-2]
            bound = (6 / (parameter.shape[-1] + fan_out)) ** 0.5
            assert 0.7 * bound < parameter.abs().max() <= bound, key
    assert torch.equal(CosineAttention(5, 6, 8, temperature=3).temperature, torch.tensor([3.0]))
    assert {key for key, _ in AdditiveAttention(5, 6, 8, bias=False).named_parameters()} == {
        "weight", "query_proj.weight", "key_proj.weight"
    }  # fmt: skip


@pytest.mark.parametrize("name", SCORED)
def test_scores_start_near_one(name: str) -> None:
    """Scores of normalised inputs vary neither much nor little, whatever the sizes."""
    torch.manual_seed(0)
    make = {"additive": AdditiveAttention, "cosine": CosineAttention}.get(name)
    for sizes in ((16, 16), (256, 64)):
        layer = make(*sizes, 64, 2) if make else BilinearAttention(*sizes, 2)
        q, k = layer.project(torch.randn(1, 64, sizes[0]), torch.randn(1, 64, sizes[1]))
        score = layer.score()
        spread = (score.materialize(q, k, torch.float32) * score.default_scale(q.shape[-1])).std()
        assert 0.3 < spread < 3


@pytest.mark.parametrize("name", SCORED)
def test_compiled_scores(name: str) -> None:
    torch._dynamo.reset()
    ours, theirs = scored(name, num_heads=2)
    args, options = (randn(B, M, 5), randn(B, N, 6)), {"key_padding_mask": padding(10, 4, 1), "need_weights": True}
    call = theirs, args, options
    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")
    leaves = {f"argument {i}": x.requires_grad_() for i, x in enumerate(args)} | dict(ours.named_parameters())
    plain, oracle = run(call, torch.float32), run(call, torch.float64)
    judge(outputs_and_gradients(compiled(ours, *args, **options), leaves), (plain, oracle))


def test_additive_memory_is_linear() -> None:
    n, layer = 512, AdditiveAttention(16, 16, 64)
    x = randn(1, n, 16).requires_grad_()
    with Largest() as seen:
        layer(x, x)[0].sum().backward()
    assert seen.elements < n * n * 64 / 8  # the eager version's, for which one tile at a time stands in


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"query": randn(B, M, 6)}, ValueError, r"query: expected \(B, length, 5\), got shape \(3, 7, 6\)"),
        ({"query": randn(B, 5)}, ValueError, r"query: .*got shape \(3, 5\); a length axis is query\[:, None\]"),
        ({"key": randn(B, N, 5)}, ValueError, r"key: expected \(B, length, 6\).*\(3, 10, 5\)"),
        ({"key": randn(N, 6)}, ValueError, r"key: .*dimensions as query's, got shape \(10, 6\)"),
        ({"key": None}, TypeError, "key: expected a tensor, got NoneType"),
        ({"value": randn(B, M, 6)}, ValueError, r"value: expected key's batch and length \(3, 10\), got"),
        ({"value": randn(B, N, 5)}, ValueError, "value: its width must be divisible by num_heads = 2, got 5"),
        ({"key_padding_mask": padding(3)[0]}, ValueError, r"key_padding_mask: expected shape \(3, 10\), got \(10,\)"),
        ({"key_padding_mask": randn(B, N).double()}, TypeError, "key_padding_mask: expected bool, float32 or"),
        ({"key": torch.nested.as_nested_tensor([randn(4, 6)], layout=torch.jagged)}, NotImplementedError, "nested"),
    ],
)
@pytest.mark.filterwarnings(NESTED)
def test_unsupported_arguments_are_refused(given: dict, error: type[Exception], words: str) -> None:
    layer = AdditiveAttention(5, 6, 8, num_heads=2)
    with pytest.raises(error, match=words):
        layer(**({"query": randn(B, M, 5), "key": randn(B, N, 6)} | given))


def test_wrong_sizes_of_scored_layers() -> None:
    for make, words in (
        (lambda: AdditiveAttention(0, 6, 8), "query_dim: must be at least 1, got 0"),
        (lambda: AdditiveAttention(5, 6, 8.0), "hidden_dim: expected an int, got float 8.0"),
        (lambda: AdditiveAttention(5, 6, 8, num_heads=3), "hidden_dim: must be divisible by num_heads = 3, got 8"),
        (lambda: CosineAttention(5, 6, 8, temperature="hot"), "temperature: expected a float, got str 'hot'"),
        (lambda: AdditiveAttention(5, 6, 8, bias="false"), "bias: expected a bool, got str 'false'"),
        (lambda: CosineAttention(5, 6, 8, bias="false"), "bias: expected a bool, got str 'false'"),
        (lambda: CosineAttention(5, -1, 8), "key_dim: must be at least 1, got -1"),
        (lambda: BilinearAttention(5, 6, num_heads=True), "num_heads: expected an int, got bool True"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            make()
