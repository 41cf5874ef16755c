"""MultiheadAttention against torch.nn's: constructor, parameters, values, gradients and masks."""

from __future__ import annotations

import copy
import doctest
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attn import modules
from fused_attn.modules import MultiheadAttention, inputs, multihead, scored
from fused_attn.modules import weights as weights_module
from tests.modules.layers import (
    B,
    E,
    H,
    M,
    N,
    agree,
    autocast_agrees,
    batch,
    causal,
    few_and_many_keys,  # noqa: F401
    judge,
    outputs,
    outputs_and_gradients,
    padding,
    pair,
    randomised,
    run,
)
from tests.parity import Largest, randn, within_budget

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "widths": {"kdim": 5, "vdim": 6, "batch_first": True},
    "widths_no_bias": {"kdim": 5, "bias": False},
    "bias_kv": {"add_bias_kv": True, "batch_first": True},
    "zero_attn": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
    "one_head": {"num_heads": 1},
}


def holes(*shape: int) -> Tensor:
    """Nowhere a row without a key."""
    mask = randn(*shape) > 0.8
    mask[..., 0] = False
    return mask


def as_float(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


MASKS: dict[str, Callable[[int], dict[str, Any]]] = {
    "none": lambda h: {},
    "bool_2d": lambda h: {"attn_mask": causal(M, N)},
    "bool_3d": lambda h: {"attn_mask": holes(B * h, M, N)},
    "float_2d": lambda h: {"attn_mask": randn(M, N)},
    "float_3d": lambda h: {"attn_mask": randn(B * h, M, N)},
    "float_infinite": lambda h: {"attn_mask": as_float(causal(M, N))},
    "bool_padding": lambda h: {"key_padding_mask": padding(10, 4, 1)},
    "float_padding": lambda h: {"key_padding_mask": randn(B, N)},
    "bool_both": lambda h: {"attn_mask": causal(M, N), "key_padding_mask": padding(10, 4, 1)},
    "float_both": lambda h: {"attn_mask": randn(B * h, M, N), "key_padding_mask": as_float(padding(10, 4, 1))},
    "hint": lambda h: {"attn_mask": causal(M, N), "is_causal": True},
    "hint_and_padding": lambda h: MASKS["bool_both"](h) | {"is_causal": True},
}

WEIGHTS = ("each", "mean", "none")


# Every kind with every mask, and either with each way to ask for weights.
COMBINATIONS = [(kind, masks, WEIGHTS[(i + j) % 3]) for i, kind in enumerate(KINDS) for j, masks in enumerate(MASKS)]


@pytest.mark.parametrize(("kind", "masks", "weights"), COMBINATIONS)
def test_agrees_with_torch(kind: str, masks: str, weights: str) -> None:
    ours, theirs = pair(**KINDS[kind])
    options = MASKS[masks](ours.num_heads) | {
        "need_weights": weights != "none",
        "average_attn_weights": weights == "mean",
    }
    got = agree(ours, theirs, batch(**KINDS[kind]), options)
    assert ("output 1" in got) == (weights != "none")


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("masks", ["none", "bool_3d", "float_2d", "padding", "hint"])
@pytest.mark.parametrize("kind", ["plain", "batch_first", "widths", "both"])
def test_without_a_batch(kind: str, masks: str, weights: str) -> None:
    ours, theirs = pair(**KINDS[kind])
    options: dict[str, Any] = {
        "none": {},
        "bool_3d": {"attn_mask": holes(H, M, N)},
        "float_2d": {"attn_mask": randn(M, N)},
        "padding": {"key_padding_mask": padding(6)[0]},
        "hint": {"attn_mask": causal(M, N), "is_causal": True},
    }[masks]
    options |= {"need_weights": weights != "none", "average_attn_weights": weights == "mean"}
    agree(ours, theirs, tuple(x[0] for x in batch(**KINDS[kind] | {"batch_first": True})), options)


@pytest.mark.parametrize("batch_first", (False, True))
@pytest.mark.parametrize("same", ("self", "memory", "query_is_value", "query_is_key"))
def test_one_tensor_in_several_roles(same: str, batch_first: bool) -> None:
    """Projected in one product or not, values and gradients are the same."""
    ours, theirs = pair(batch_first=batch_first)
    x, y = randn(5, 5, E), randn(5, 5, E, seed=1)
    args = {"self": (x, x, x), "memory": (x, y, y), "query_is_value": (x, y, x), "query_is_key": (x, x, y)}[same]
    agree(ours, theirs, args, {"need_weights": False})


@pytest.mark.parametrize("options", ({}, {"need_weights": False, "key_padding_mask": padding(10, 4, 1)}), ids=str)
def test_wrong_is_causal_hint(options: dict) -> None:
    """Where torch reads the mask all the same, so do we."""
    ours, theirs = pair(batch_first=True)
    agree(ours, theirs, batch(batch_first=True), {"attn_mask": holes(M, N), "is_causal": True} | options)


def test_zero_sizes() -> None:
    ours, theirs = pair(batch_first=True)
    for b, m, n in ((0, 3, 4), (2, 0, 4), (0, 0, 4)):
        query, key = torch.zeros(b, m, E), torch.zeros(b, n, E)
        for masks in ({}, {"attn_mask": torch.zeros(b * H, m, n, dtype=torch.bool)}):
            expected = theirs(query, key, key, **masks)
            for x, y in zip(ours(query, key, key, **masks), expected, strict=True):
                assert x.shape == y.shape
    out, weights = ours(torch.zeros(2, 3, E), torch.zeros(2, 0, E), torch.zeros(2, 0, E))
    assert torch.equal(out, ours.out_proj.bias.expand(2, 3, E)) and weights.shape == (2, 3, 0)


@pytest.mark.parametrize("average", (True, False))
@pytest.mark.parametrize("masks", MASKS)
def test_weights_of_many_keys(masks: str, average: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "COLUMNS", 3)
    ours, theirs = pair(**KINDS["both"])
    agree(ours, theirs, batch(**KINDS["both"]), MASKS[masks](H) | {"average_attn_weights": average})


def test_weights_of_more_keys_than_one_pass() -> None:
    """The threshold as it is: on both sides of it, the weights and their derivative are what torch's are."""
    ours, theirs = pair(batch_first=True)
    for n in (weights_module.COLUMNS, weights_module.COLUMNS + 1):
        agree(ours, theirs, (randn(1, 3, E), randn(1, n, E), randn(1, n, E, seed=1)), {"attn_mask": randn(3, n)})


@pytest.mark.usefixtures("few_and_many_keys")
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    ours, theirs = (x.to(dtype) for x in pair(batch_first=True))
    args = tuple(x.to(dtype) for x in batch(batch_first=True))
    options = {"attn_mask": causal(M, N), "key_padding_mask": padding(10, 4, 1)}
    with torch.no_grad():
        got, plain = (x(*args, **options) for x in (ours, theirs.train()))
        oracle = copy.deepcopy(theirs).double()(*(x.double() for x in args), **options)
        wide = ours(*args, attn_mask=as_float(causal(M, N)), key_padding_mask=padding(10, 4, 1))
    for i, (x, y, z) in enumerate(zip(got, oracle, plain, strict=True)):
        assert x.dtype == dtype
        within_budget(str(i), x, y, z)
    assert all(map(torch.equal, got, wide))  # float32 beside half, and float beside bool


def test_float64() -> None:
    ours, theirs = (x.double() for x in pair())
    args = tuple(x.double() for x in batch())
    for got, oracle, plain in zip(ours(*args), theirs(*args), copy.deepcopy(theirs).float()(*batch()), strict=True):
        within_budget("output", got.detach(), oracle.detach(), plain.detach())


def test_fully_masked_rows() -> None:
    """Weights and gradients are zeros, and the output is the projection's bias, with the weights and without them."""
    ours, _ = pair(batch_first=True)
    args = tuple(x.requires_grad_() for x in batch(batch_first=True))
    for masks in ({"key_padding_mask": padding(10, 0, 3)}, {"key_padding_mask": as_float(padding(10, 0, 3))}):
        for need_weights in (True, False):
            out, weights = ours(*args, need_weights=need_weights, **masks)
            assert torch.equal(out[1], ours.out_proj.bias.expand(M, E)) and out.isfinite().all()
            assert weights is None or (not weights[1].any() and bool((weights[0].sum(-1) > 0.99).all()))
            grads = torch.autograd.grad(out.square().sum(), args)
            assert all(g.isfinite().all() and g[0].any() and not g[1].any() for g in grads)


@pytest.mark.usefixtures("few_and_many_keys")
@pytest.mark.parametrize("average", (True, False))
def test_dropout(average: bool) -> None:
    """In training the weights returned are those that averaged the values: dropped, or scaled up by 1 / (1 - p)."""
    ours, theirs = pair(batch_first=True, dropout=0.25)
    x = randn(2, 40, E)
    _, plain = theirs.eval()(x, x, x, average_attn_weights=False)
    _, oracle = copy.deepcopy(theirs).double()(*[x.double()] * 3, average_attn_weights=False)
    torch.manual_seed(3)
    out, weights = ours(x, x, x, average_attn_weights=False)
    kept = weights != 0
    within_budget("weights", weights, kept * oracle / 0.75, kept * plain / 0.75)
    assert abs(kept.sum() - 0.75 * kept.numel()) < 5 * (0.75 * 0.25 * kept.numel()) ** 0.5

    def expected(dtype: torch.dtype) -> Tensor:
        layer = copy.deepcopy(theirs).to(dtype)
        values = F.linear(x.to(dtype), layer.in_proj_weight[2 * E :], layer.in_proj_bias[2 * E :])
        heads = weights.detach().to(dtype) @ values.unflatten(2, (H, E // H)).transpose(1, 2)
        return layer.out_proj(heads.transpose(1, 2).flatten(2))

    within_budget("out", out, expected(torch.float64), expected(torch.float32))
    torch.manual_seed(3)
    again = ours(x, x, x, average_attn_weights=average)
    assert torch.equal(again[0], out) and torch.equal(again[1], weights.mean(1) if average else weights)
    assert not torch.equal(ours(x, x, x)[0], out)  # drawn anew
    assert torch.equal(ours.eval()(x, x, x)[0], ours(x, x, x, need_weights=False)[0])
    ours.train().dropout = 1.0
    assert torch.equal(ours(x, x, x)[0], ours.out_proj.bias.expand_as(x))


def test_is_a_subclass_of_torchs_layer(tmp_path: Any) -> None:
    """The same signatures, names and initial parameters; state_dicts load either way, and from disk."""
    for name in ("__init__", "forward"):
        ours, theirs = (inspect.signature(getattr(x, name)) for x in (MultiheadAttention, nn.MultiheadAttention))
        assert [(x.name, x.default, x.kind) for x in ours.parameters.values()] == [
            (x.name, x.default, x.kind) for x in theirs.parameters.values()
        ]
    for kind, options in KINDS.items():
        torch.manual_seed(7)
        theirs = nn.MultiheadAttention(**{"embed_dim": E, "num_heads": H} | options)
        torch.manual_seed(7)
        ours = MultiheadAttention(**{"embed_dim": E, "num_heads": H} | options)
        assert isinstance(ours, nn.MultiheadAttention) and repr(ours) == repr(theirs)
        states = ours.state_dict(), theirs.state_dict()
        assert list(states[0]) == list(states[1]), kind
        assert all(map(torch.equal, states[0].values(), states[1].values()))
        torch.save(states[0], tmp_path / "state.pt")
        theirs.load_state_dict(torch.load(tmp_path / "state.pt"), strict=True)
        ours.load_state_dict(randomised(theirs).state_dict(), strict=True)
    assert MultiheadAttention(E, H, device="meta", dtype=torch.bfloat16).in_proj_weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("masks", "need_weights"), [("float_both", True), ("bool_both", False), ("hint", False)])
def test_compiled(masks: str, need_weights: bool) -> None:
    """As one graph, with gradients, in training with dropout too."""
    torch._dynamo.reset()
    ours, theirs = pair(batch_first=True, dropout=0.3)
    args, options = batch(batch_first=True), MASKS[masks](H) | {"need_weights": need_weights}
    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")
    call = theirs.eval(), args, options
    plain, oracle = run(call, torch.float32), run(call, torch.float64)
    leaves = {f"argument {i}": x.requires_grad_() for i, x in enumerate(args)}
    judge(outputs_and_gradients(compiled(ours.eval(), *args, **options), leaves), (plain, oracle))
    if need_weights:
        dropped, again = (compiled(ours.train(), *args, **options) for _ in range(2))
        assert dropped[0].isfinite().all() and not torch.equal(dropped[0], again[0])


def test_exported() -> None:
    ours, _ = pair(batch_first=True)
    args = batch(batch_first=True)
    program = torch.export.export(ours.eval(), args, {"key_padding_mask": padding(10, 4, 1)})
    for x, y in zip(program.module()(*args, key_padding_mask=padding(9, 3, 2)),
                    ours(*args, key_padding_mask=padding(9, 3, 2)), strict=True):  # fmt: skip
        assert torch.equal(x, y)


@pytest.mark.usefixtures("few_and_many_keys")
@pytest.mark.parametrize("kind", ("batch_first", "both"))
def test_autocast(kind: str) -> None:
    """bfloat16 inside, of torch's types outside; float32 masks as they are; gradients after the context is left."""
    ours, theirs = pair(**KINDS[kind])
    options = {"attn_mask": randn(M, N), "key_padding_mask": randn(B, N)}
    autocast_agrees(ours, theirs, batch(**KINDS[kind]), options)
    autocast_agrees(ours, theirs, batch(**KINDS[kind]), options | {"need_weights": False})


@pytest.mark.parametrize("masks", ("none", "padding", "bool_3d", "hint"))
def test_memory_is_linear(masks: str) -> None:
    """Nothing is as large as all scores, not even where a mask for each head was broadcast, or weights are averaged."""
    n, heads = 1024, 4
    ours = MultiheadAttention(16, heads, batch_first=True)
    x = randn(1, n, 16).requires_grad_()
    options: dict[str, Any] = {
        "none": {},
        "padding": {"key_padding_mask": torch.arange(n)[None] > 900},
        "bool_3d": {"attn_mask": causal(n, n).expand(heads, n, n)},
        "hint": {"attn_mask": causal(n, n), "is_causal": True},
    }[masks]
    for need_weights in (False, True):
        with Largest() as seen:
            ours(x, x, x, need_weights=need_weights, **options)[0].sum().backward()
        # The weights are that large, and so is the mask turned around.
        assert seen.elements <= (n * n if need_weights or masks == "bool_3d" else n * n // 4)


def arguments(**changed: Any) -> dict[str, Any]:
    query, key, value = batch(batch_first=True)
    return {"query": query, "key": key, "value": value} | changed


REFUSED = [
    ("query", randn(E), ValueError, r"query: expected .* got shape \(8,\)"),
    ("query", randn(M, E), ValueError, r"query: .* got shape \(7, 8\); a length axis is query\[:, None\]"),
    ("key", randn(N, E), ValueError, r"key: expected \(B, length, 8\), dimensions as query's, got shape \(10, 8\)"),
    ("query", randn(B, M, E + 1), ValueError, r"query: .*length, 8.*\(3, 7, 9\)"),
    ("query", [1.0], TypeError, r"query: expected a tensor, got list"),
    ("key", randn(B + 1, N, E), ValueError, r"key: expected query's batch size 3, got shape \(4, 10, 8\)"),
    ("value", randn(B, N + 1, E), ValueError, r"value: expected key's .* \(3, 10\), got shape \(3, 11, 8\)"),
    ("attn_mask", randn(N, M), ValueError, r"attn_mask: expected shape \(7, 10\) or \(6, 7, 10\), got \(10, 7\)"),
    ("attn_mask", randn(B, M, N), ValueError, r"attn_mask: expected shape .*got \(3, 7, 10\)"),
    ("attn_mask", randn(M, N).long(), TypeError, r"attn_mask: expected a bool or float tensor, got torch.int64"),
    ("attn_mask", randn(M, N).double(), TypeError, r"attn_mask: expected bool, float32 or query's torch.float32, got"),
    ("attn_mask", randn(M, N).to("meta"), ValueError, r"attn_mask: expected query's device cpu, got meta"),
    ("key_padding_mask", randn(N), ValueError, r"key_padding_mask: expected shape \(3, 10\), got \(10,\)"),
    ("key_padding_mask", [True] * N, TypeError, r"key_padding_mask: expected a bool or float tensor, got list"),
    ("need_weights", "no", TypeError, "need_weights: expected a bool, got str 'no'"),
    ("average_attn_weights", "no", TypeError, "average_attn_weights: expected a bool, got str 'no'"),
    ("average_attn_weights", 2, TypeError, "average_attn_weights: expected a bool, got int 2"),
    ("is_causal", "false", TypeError, "is_causal: expected a bool, got str 'false'"),
    ("is_causal", True, ValueError, r"attn_mask: must be given with the hint is_causal, got None"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "words"), REFUSED)
def test_a_wrong_argument(name: str, value: Any, error: type[Exception], words: str) -> None:
    ours, _ = pair(batch_first=True)
    with pytest.raises(error, match=words):
        ours(**arguments(**{name: value}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"embed_dim": 0}, "embed_dim: must be at least 1, got 0"),
        ({"num_heads": -1}, "num_heads: must be at least 1, got -1"),
        ({"num_heads": 3}, "embed_dim: must be divisible by num_heads = 3, got 8"),
        ({"dropout": 1.5}, r"dropout: must lie in \[0, 1\], got 1.5"),
        ({"kdim": 0}, "kdim: must be at least 1, got 0"),
    ],
)
def test_a_wrong_layer(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MultiheadAttention(**{"embed_dim": E, "num_heads": H} | options)


FLAGS = ("bias", "add_bias_kv", "add_zero_attn", "batch_first")


@pytest.mark.parametrize("name", FLAGS)
def test_a_wrong_flag_of_a_layer(name: str) -> None:
    for wrong, said in (("false", "str 'false'"), (None, "NoneType None"), (2, "int 2")):
        with pytest.raises(TypeError, match=f"{name}: expected a bool, got {said}"):
            MultiheadAttention(E, H, **{name: wrong})


@pytest.mark.parametrize(("yes", "no"), ((1, 0), (np.True_, np.False_), (torch.tensor(True), torch.tensor(False))))
def test_flags_as_torch_takes_them(yes: Any, no: Any) -> None:
    """0 and 1, and numpy's bools, which configurations hold."""
    torch.manual_seed(0)
    layer = MultiheadAttention(E, H, bias=no, add_zero_attn=yes, batch_first=yes)
    assert layer.in_proj_bias is None and layer.add_zero_attn is True and layer.batch_first is True
    out, weights = layer(**arguments(), need_weights=yes, average_attn_weights=no, is_causal=no)
    assert out.shape == (B, M, E) and weights.shape == (B, H, M, N + 1)
    assert layer(**arguments(), need_weights=no)[1] is None


@pytest.mark.parametrize(
    "module", (modules, inputs, multihead, scored, weights_module), ids=lambda module: module.__name__
)
def test_examples(module: Any) -> None:
    """What the docstrings show is what comes out."""
    assert doctest.testmod(module, raise_on_error=True).attempted >= {modules: 4, multihead: 6, scored: 10}.get(
        module, 0
    )
