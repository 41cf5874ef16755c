"""MultiheadAttention inside torch.nn's Transformer layers, which make nested tensors."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import transformer
from torch.testing._internal.common_modules import module_db

import fused_attn
from fused_attn.modules import MultiheadAttention, multihead
from tests.modules.layers import (
    NESTED,
    B,
    E,
    H,
    N,
    agree,
    batch,
    causal,
    few_and_many_keys,  # noqa: F401
    judge,
    outputs_and_gradients,
    padding,
    pair,
    randomised,
    run,
)
from tests.parity import randn, within_budget


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


def test_compiled_encoder() -> None:
    torch._dynamo.reset()
    ours, _ = encoders(2)
    x, mask = randn(B, N, E), padding(10, 4, 1)
    expected = ours(x, src_key_padding_mask=mask)
    got = torch.compile(ours, fullgraph=True, backend="aot_eager")(x, src_key_padding_mask=mask)
    assert torch.equal(got, expected)


@pytest.mark.usefixtures("few_and_many_keys")
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


# --- torch.jit


def test_trace() -> None:
    """With gradients enabled too, torch.jit.trace agrees with itself and records a layer that can be trained."""
    ours, theirs = pair(batch_first=True)
    x = randn(B, N, E)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes become constants, and torch says so of each
        traced = torch.jit.trace(ours, (x, x, x))
    leaves = {"argument 2": x.requires_grad_()} | dict(ours.named_parameters())
    call = theirs, (x, x, x), {}
    judge(outputs_and_gradients(traced(x, x, x), leaves), (run(call, torch.float32), run(call, torch.float64)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize(
    "make",
    (lambda: MultiheadAttention(E, H), lambda: fused_attn.modules.AdditiveAttention(4, 4, 4)),
    ids=("MHA", "add"),
)
def test_script_is_refused(make: Any) -> None:
    layer = make()
    for module in (layer, nn.Sequential(layer)):
        with pytest.raises(
            NotImplementedError, match=rf"torch.jit.script cannot .*{type(layer).__name__}; torch.compile"
        ):
            torch.jit.script(module)


# --- what torch's tests expect of a wrong argument


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"key": randn(4, 4)}, AssertionError),
        ({"value": randn(4, 4)}, AssertionError),
        ({"query": randn(4, 4)}, AssertionError),
        ({"query": randn(4)}, AssertionError),
        ({"query": randn(4, 4, 6)}, AssertionError),
        ({"key": randn(5, 4, 4)}, AssertionError),
        ({"key_padding_mask": randn(4) > 0}, AssertionError),
        ({"key_padding_mask": randn(4, 4).long()}, AssertionError),
        ({"attn_mask": randn(4) > 0}, AssertionError),
        ({"attn_mask": randn(4, 4).long()}, AssertionError),
        ({"attn_mask": randn(3, 4) > 0}, RuntimeError),
        ({"attn_mask": randn(5, 4, 4) > 0}, RuntimeError),
        ({"is_causal": True}, RuntimeError),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else x.__name__,
)
def test_exceptions_have_torchs_types(wrong: dict[str, Any], error: type[Exception]) -> None:
    """Ours are ValueError or TypeError, and what torch raises for the same."""
    given = {"query": randn(4, 4, 4), "key": randn(4, 4, 4), "value": randn(4, 4, 4)} | wrong
    for layer in (nn.MultiheadAttention(4, 4), MultiheadAttention(4, 4)):
        with pytest.raises(error) as refusal:
            layer(**given)
    assert isinstance(refusal.value, (ValueError, TypeError))


def test_indivisible_heads() -> None:
    for make in (nn.MultiheadAttention, MultiheadAttention):
        with pytest.raises(AssertionError):
            make(8, 3)


@pytest.mark.parametrize("options", ({}, {"kdim": 6, "vdim": 5}), ids=("one width", "three widths"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.float64))
def test_bias_of_another_dtype(dtype: torch.dtype, options: dict) -> None:
    ours, theirs = pair(batch_first=True, **options)
    for layer in (ours, theirs):
        layer.in_proj_bias = nn.Parameter(layer.in_proj_bias.to(dtype))
    args = batch(batch_first=True, **options)
    plain = theirs(*args)[0].detach()
    with torch.no_grad():
        theirs.in_proj_bias.data = ours.in_proj_bias.double()
        oracle = theirs.double()(*(x.double() for x in args))[0]
    within_budget("out", ours(*args)[0].detach(), oracle, plain)
