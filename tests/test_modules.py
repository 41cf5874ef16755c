"""The layers: torch.nn.MultiheadAttention's constructor, parameters and results, in every way that torch calls it."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import transformer
from torch.testing._internal.common_modules import module_db
from torch.utils._python_dispatch import TorchDispatchMode

import fused_attn
from fused_attn import testing
from fused_attn.modules import (
    AdditiveAttention,
    BilinearAttention,
    CosineAttention,
    MultiheadAttention,
    multihead,
)
from fused_attn.modules import weights as weights_room

NESTED = "ignore:The PyTorch API of nested tensors"
B, M, N, E, H = 3, 7, 10, 8, 2

Results = dict[str, Tensor]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(31**i * n for i, n in enumerate(shape)))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def within_budget(name: str, ours: Tensor, oracle: Tensor, plain: Tensor) -> None:
    """The tolerance rule, with the answer's own size as the size of its terms."""
    absolute = oracle.abs().amax().expand_as(oracle) if oracle.numel() else oracle
    testing.assert_within_budget(name, ours, oracle, plain, absolute, ours.dtype)


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter drawn anew, biases too, which start as zeros."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=i, dtype=parameter.dtype) * 0.5)
    return module


def pair(**options: Any) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Ours and torch's with the same parameters."""
    theirs = randomised(nn.MultiheadAttention(**{"embed_dim": E, "num_heads": H} | options))
    ours = MultiheadAttention(**{"embed_dim": E, "num_heads": H} | options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


Call = tuple[nn.Module, tuple[Tensor, ...], dict[str, Any]]  # a module, what it is given by place, and by name


def floats(call: Call) -> dict[str, Tensor]:
    """Every float input and every parameter, by name; an input that has two places is named by the later."""
    module, args, options = call
    given = {f"argument {i}": x for i, x in enumerate(args)} | options
    given = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return {name: x for x, name in {x: name for name, x in given.items()}.items()} | dict(module.named_parameters())


def nearby(call: Call, seed: int) -> Call:
    """A copy with every number moved by a rounding, up or down."""
    call = copy.deepcopy(call)
    for i, x in enumerate(floats(call).values()):
        x.data *= 1 + torch.finfo(x.dtype).eps * randn(*x.shape, seed=100 * seed + i).sign()
    return call


def run(call: Call, dtype: torch.dtype) -> Results:
    """In dtype: the outputs, and the gradients of every float input and every parameter."""
    module, args, options = call = copy.deepcopy(call)
    for x in floats(call).values():
        x.data = x.data.to(dtype)
        x.requires_grad_()
    found = module(*args, **options)
    return outputs_and_gradients(
        [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None], floats(call)
    )


def outputs_and_gradients(outputs: list[Tensor], leaves: dict[str, Tensor]) -> Results:
    """The gradients of one sum over the outputs, the same in every dtype."""
    cotangents = [torch.arange(x.numel()).view(x.shape).cos().to(x.dtype) for x in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, retain_graph=True, allow_unused=True)
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    return found | {
        name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), grads, strict=True)
    }


def judge(got: Results, *others: tuple[Results, Results], dtype: torch.dtype | None = None) -> Results:
    """By the tolerance rule; others: torch's in float32 and in float64, for these inputs and for nearby ones.

    E is the largest error of all of torch's runs, because a single one may be lucky. Returns what was judged.
    """
    oracle = others[0][1]
    for name, x in got.items():
        error = max((plain[name] - exact[name]).abs().max() for plain, exact in others)
        plain = oracle[name] + error
        testing.assert_within_budget(name, x, oracle[name], plain, plain.abs().amax().expand_as(x), dtype or x.dtype)
    return got


def agree(
    ours: nn.Module, theirs: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any], others: int = 1
) -> Results:
    """Ours against torch's in float64, values and gradients. Returns ours."""
    got = run((ours, args, options), torch.float32)
    # torch's hint would hide the keys that it adds from everybody; the mask itself says the same of the others.
    call = theirs, args, {name: x for name, x in options.items() if name != "is_causal"}
    calls = [call, *(nearby(call, seed) for seed in range(others))]
    found = [(run(x, torch.float32), run(x, torch.float64)) for x in calls]
    assert got.keys() == found[0][0].keys()
    return judge(got, *found)


# --- against torch's own, forward and backward

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


def causal(m: int, n: int) -> Tensor:
    return torch.ones(m, n, dtype=torch.bool).triu(1)


def holes(*shape: int) -> Tensor:
    """Nowhere a row without a key."""
    mask = randn(*shape) > 0.8
    mask[..., 0] = False
    return mask


def padding(*lengths: int) -> Tensor:
    return torch.arange(N) >= torch.tensor(lengths)[:, None]


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


def batch(batch_first: bool = False, kdim: int = E, vdim: int = E, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = randn(B, M, E), randn(B, N, kdim), randn(B, N, vdim, seed=1)
    return (query, key, value) if batch_first else tuple(x.transpose(0, 1) for x in (query, key, value))


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
def test_a_hint_that_is_wrong(options: dict) -> None:
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


@pytest.fixture(params=("few_keys", "many_keys"))
def keys(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to come by weights; with many keys the second, and its derivative in several passes."""
    if request.param == "many_keys":
        monkeypatch.setattr(weights_room, "COLUMNS", 3)


@pytest.mark.parametrize("average", (True, False))
@pytest.mark.parametrize("masks", MASKS)
def test_weights_of_many_keys(masks: str, average: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_room, "COLUMNS", 3)
    ours, theirs = pair(**KINDS["both"])
    agree(ours, theirs, batch(**KINDS["both"]), MASKS[masks](H) | {"average_attn_weights": average})


def test_weights_of_more_keys_than_one_pass() -> None:
    """The threshold as it is: on both sides of it, the weights and their derivative are what torch's are."""
    ours, theirs = pair(batch_first=True)
    for n in (weights_room.COLUMNS, weights_room.COLUMNS + 1):
        agree(ours, theirs, (randn(1, 3, E), randn(1, n, E), randn(1, n, E, seed=1)), {"attn_mask": randn(3, n)})


@pytest.mark.usefixtures("keys")
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


def test_a_query_that_sees_nothing() -> None:
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


# --- torch's own samples of modules


@contextlib.contextmanager
def ours_in_transformers() -> Iterator[None]:
    """torch's Transformer layers build our attention into themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "MultiheadAttention", MultiheadAttention)
        yield


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", NESTED)
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize(
    "name",
    ("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer", "TransformerEncoder", "Transformer"),
)
def test_torch_samples(name: str, training: bool) -> None:
    """torch's inputs for its own module tests: values and gradients, and in evaluation without a gradient too."""
    torch.manual_seed(1)
    (info,) = (x for x in module_db if x.module_cls is getattr(nn, name))

    def built() -> tuple[list[Any], list[nn.Module]]:
        samples = info.module_inputs_func(info, "cpu", torch.float32, requires_grad=False, training=training)
        make = MultiheadAttention if name == "MultiheadAttention" and patched else info.module_cls
        return samples, [make(*x.constructor_input.args, **x.constructor_input.kwargs).train(training) for x in samples]

    patched = False
    samples, theirs = built()
    patched = True
    with ours_in_transformers():
        _, ours = built()
    for sample, our, their in zip(samples, ours, theirs, strict=True):
        our.load_state_dict(randomised(their).state_dict())
        assert sum(type(x) is MultiheadAttention for x in our.modules()) == sum(
            type(x) is nn.MultiheadAttention for x in their.modules()
        )
        args, options = sample.forward_input.args, sample.forward_input.kwargs
        if training and name in ("MultiheadAttention", "TransformerEncoderLayer"):  # the others hold these
            # Inputs up to 9 saturate a softmax; a gradient is then what is left of large terms, and E a matter of luck.
            agree(our, their, tuple(x / 8 for x in args), options, others=4)
        if sample.reference_fn is not None:  # with a batch of one, or by torch's fast path
            with torch.no_grad():
                found = [sample.reference_fn(x, *args, **options) for x in (our, their)]
                wide = [x.double() for x in args]
                found.append(sample.reference_fn(their.double(), *wide, **options))
            for got, plain, oracle in zip(*(x if isinstance(x, tuple) else (x,) for x in found), strict=True):
                within_budget("reference", got, oracle, plain)
    assert len(samples) >= 16


# --- the encoder's fast path


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The query shapes of the calls that reach `fused_attn.attention`."""
    found: list[tuple[int, ...]] = []

    def counted(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(tuple(q.shape))
        return fused_attn.attention(q, *args, **kwargs)

    monkeypatch.setattr(multihead, "attention", counted)
    return found


def encoders(layers: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Two encoders, or two layers of one, with the same parameters, in evaluation; the first with our attention."""

    def built() -> nn.Module:
        layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True)
        return nn.TransformerEncoder(layer, layers, **options) if layers else layer

    theirs = randomised(built())
    with ours_in_transformers():
        ours = built()
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


@pytest.mark.filterwarnings(NESTED)
@pytest.mark.parametrize("grad", (torch.inference_mode, torch.no_grad, torch.enable_grad))
@pytest.mark.parametrize("options", ({}, {"enable_nested_tensor": False}), ids=("nested", "dense"))
@pytest.mark.parametrize("masks", ("none", "padding", "padding_inside", "causal"))
@pytest.mark.parametrize("layers", (0, 2))
def test_encoder(masks: str, layers: int, options: dict, grad: Any, arrivals: list) -> None:
    """In evaluation, with a gradient and without: every layer calls us, and means the same as torch's."""
    ours, theirs = encoders(layers, **options if layers else {})
    x = randn(B, N, E)
    inside = padding(10, 4, 1).roll(2, 1)
    given: dict[str, Any] = {
        "none": {},
        "padding": {"src_key_padding_mask": padding(10, 4, 1)},
        "padding_inside": {"src_key_padding_mask": inside},
        "causal": {"src_mask" if not layers else "mask": causal(N, N)},
    }[masks]
    with grad():
        got = ours(x, **given).detach()
        assert len(arrivals) == max(layers, 1)
        plain = theirs(x, **given).detach()
    oracle = theirs.double().train()
    for module in oracle.modules():
        if isinstance(module, (nn.Dropout, nn.MultiheadAttention)):
            module.eval()  # nothing is dropped, and torch takes the path that it has for training
    oracle = oracle(x.double(), **given).detach()
    if masks == "padding" and layers:
        # torch makes nested tensors of these, and rows of padding come back as zeros.
        nested = not options and grad is not torch.enable_grad
        assert bool(got[1, 4:].any()) != nested and bool(plain[1, 4:].any()) != nested
    shown = got != 0
    within_budget("out", got * shown, oracle * shown, plain * shown)


@pytest.mark.usefixtures("keys")
@pytest.mark.filterwarnings(NESTED)
def test_nested() -> None:
    """Values and gradients of nested tensors are those of padded ones; the weights of padding are zeros."""
    ours, theirs = pair(batch_first=True)
    rows, memory = ([randn(n, E, seed=i).requires_grad_() for i, n in enumerate(x)] for x in ((5, 0, 3), (7, 2, 4)))
    for keys in (rows, memory):
        query = torch.nested.as_nested_tensor(rows)
        key = query if keys is rows else torch.nested.as_nested_tensor(keys)
        out, weights = ours(query, key, key, average_attn_weights=False)
        assert out.is_nested and weights.shape == (3, H, 5, max(x.shape[0] for x in keys))
        for i, (x, y, got) in enumerate(zip(rows, keys, out.unbind(), strict=True)):
            m, n = x.shape[0], y.shape[0]
            assert got.shape == (m, E) and not weights[i, :, m:].any() and not weights[i, :, :, n:].any()
            if m:
                found = outputs_and_gradients([got, weights[i, :, :m, :n]], {"argument 2": y})
                call = theirs, (x, y, y), {"average_attn_weights": False}
                judge(found, (run(call, torch.float32), run(call, torch.float64)))
    with torch.no_grad():  # torch has a nested path for inference
        x = torch.nested.as_nested_tensor(rows)
        (out, weights), (its, its_weights) = ours(x, x, x), theirs.eval()(x, x, x)
    assert [x.shape for x in out.unbind()] == [x.shape for x in its.unbind()] and weights.shape == its_weights.shape


@pytest.mark.filterwarnings(NESTED)
def test_nested_that_are_refused() -> None:
    ours, _ = pair(batch_first=True)
    x = torch.nested.as_nested_tensor([randn(5, E), randn(3, E)])
    y = torch.nested.as_nested_tensor([randn(5, E), randn(4, E)])
    jagged = torch.nested.as_nested_tensor([randn(5, E), randn(3, E)], layout=torch.jagged)
    for args, options, error, words in (
        ((x, x, randn(2, 5, E)), {}, ValueError, "all or none must be nested"),
        ((x, x, x), {"key_padding_mask": padding(5, 3)}, ValueError, "take no mask"),
        ((x, x, y), {}, ValueError, r"lengths must agree.*\[5, 4\]"),
        ((jagged, jagged, jagged), {}, NotImplementedError, "query: nested tensors of layout torch.jagged"),
    ):
        with pytest.raises(error, match=words):
            ours(*args, **options)
    with pytest.raises(ValueError, match="batch_first"):
        pair()[0](x, x, x)
    with pytest.raises(NotImplementedError, match="add_zero_attn"):
        pair(batch_first=True, add_zero_attn=True)[0](x, x, x)


# --- dropout


@pytest.mark.usefixtures("keys")
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


# --- a torch.nn.Module like others


def test_is_torchs(tmp_path: Any) -> None:
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


@pytest.mark.filterwarnings(NESTED)
def test_copies(arrivals: list) -> None:
    """Copied, pickled and saved whole, it computes the same, and the encoder's layers still call it."""
    ours, _ = encoders(0)
    x = randn(B, N, E)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        expected = ours(x)
        for i, module in enumerate(copies):
            assert torch.equal(module(x), expected)
            assert len(arrivals) == i + 2


def outputs(layer: nn.Module, *args: Tensor, **options: Any) -> list[Tensor]:
    return [x for x in layer(*args, **options) if x is not None]


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


def test_compiled_encoder() -> None:
    torch._dynamo.reset()
    ours, _ = encoders(2)
    x, mask = randn(B, N, E), padding(10, 4, 1)
    expected = ours(x, src_key_padding_mask=mask)
    got = torch.compile(ours, fullgraph=True, backend="aot_eager")(x, src_key_padding_mask=mask)
    assert torch.equal(got, expected)


def test_exported() -> None:
    ours, _ = pair(batch_first=True)
    args = batch(batch_first=True)
    program = torch.export.export(ours.eval(), args, {"key_padding_mask": padding(10, 4, 1)})
    for x, y in zip(program.module()(*args, key_padding_mask=padding(9, 3, 2)),
                    ours(*args, key_padding_mask=padding(9, 3, 2)), strict=True):  # fmt: skip
        assert torch.equal(x, y)


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("kind", ("batch_first", "both"))
def test_autocast(kind: str) -> None:
    """bfloat16 inside, of torch's types outside; float32 masks as they are; gradients after the context is left."""
    ours, theirs = pair(**KINDS[kind])
    options = {"attn_mask": randn(M, N), "key_padding_mask": randn(B, N)}
    autocast_agrees(ours, theirs, batch(**KINDS[kind]), options)
    autocast_agrees(ours, theirs, batch(**KINDS[kind]), options | {"need_weights": False})


def autocast_agrees(ours: nn.Module, theirs: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    found = []
    for layer in (ours, theirs):
        leaves = {name: x.requires_grad_() for name, x in floats((layer, args, options)).items()}
        with torch.autocast("cpu", torch.bfloat16):
            got = outputs(layer, *args, **options)
        assert [x.dtype for x in got] == [torch.bfloat16] * len(got)
        found.append(outputs_and_gradients(got, leaves))
    judge(found[0], (found[1], run((theirs, args, options), torch.float64)), dtype=torch.bfloat16)


# --- memory


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() >= x.numel() * x.element_size():
                self.elements = max(self.elements, x.numel())
        return result


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


# --- what is refused


def arguments(**changed: Any) -> dict[str, Any]:
    query, key, value = batch(batch_first=True)
    return {"query": query, "key": key, "value": value} | changed


REFUSED = [
    ("query", randn(E), ValueError, r"query: expected .* got shape \(8,\)"),
    ("query", randn(M, E), ValueError, r"key: expected .* as many as query, got shape \(3, 10, 8\)"),
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
    ],
)
def test_a_wrong_layer(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MultiheadAttention(**{"embed_dim": E, "num_heads": H} | options)


# --- learned scores

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


@pytest.mark.usefixtures("keys")
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


@pytest.mark.usefixtures("keys")
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
        ({"query": randn(B, M, 6)}, ValueError, r"query: expected \(length, 5\).*\(3, 7, 6\)"),
        ({"key": randn(B, N, 5)}, ValueError, r"key: expected \(length, 6\).*\(3, 10, 5\)"),
        ({"key": randn(N, 6)}, ValueError, r"key: .*as many as query, got shape \(10, 6\)"),
        ({"key": None}, TypeError, "key: expected a tensor, got NoneType"),
        ({"value": randn(B, M, 6)}, ValueError, r"value: expected key's batch and length \(3, 10\), got"),
        ({"value": randn(B, N, 5)}, ValueError, "value: its width must be divisible by num_heads = 2, got 5"),
        ({"key_padding_mask": padding(3)[0]}, ValueError, r"key_padding_mask: expected shape \(3, 10\), got \(10,\)"),
        ({"key_padding_mask": randn(B, N).double()}, TypeError, "key_padding_mask: expected bool, float32 or"),
        ({"key": torch.nested.as_nested_tensor([randn(4, 6)], layout=torch.jagged)}, NotImplementedError, "nested"),
    ],
)
@pytest.mark.filterwarnings(NESTED)
def test_what_scored_layers_refuse(given: dict, error: type[Exception], words: str) -> None:
    layer = AdditiveAttention(5, 6, 8, num_heads=2)
    with pytest.raises(error, match=words):
        layer(**({"query": randn(B, M, 5), "key": randn(B, N, 6)} | given))


def test_wrong_sizes_of_scored_layers() -> None:
    for make, words in (
        (lambda: AdditiveAttention(0, 6, 8), "query_dim: must be at least 1, got 0"),
        (lambda: AdditiveAttention(5, 6, 8.0), "hidden_dim: expected an int, got float 8.0"),
        (lambda: AdditiveAttention(5, 6, 8, num_heads=3), "hidden_dim: must be divisible by num_heads = 3, got 8"),
        (lambda: CosineAttention(5, -1, 8), "key_dim: must be at least 1, got -1"),
        (lambda: BilinearAttention(5, 6, num_heads=True), "num_heads: expected an int, got bool True"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            make()
