"""The doors: F.scaled_dot_product_attention and Transformers reach ours, mean the same, and leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left

import fused_attn
import fused_attn.compat.sdpa as door
from fused_attn import testing

TORCH = F.scaled_dot_product_attention


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The query shapes of the calls that reach ours; afterwards torch must be as it was."""
    found: list[tuple[int, ...]] = []

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(tuple(query.shape))
        return fused_attn.scaled_dot_product_attention(query, *args, **kwargs)

    monkeypatch.setattr(door, "fused", counted)
    monkeypatch.setattr(door, "_warned", set())
    yield found
    assert F.scaled_dot_product_attention is TORCH
    assert torch.backends.mha.get_fastpath_enabled()


def within_budget(name: str, ours: Tensor, oracle: Tensor, plain: Tensor) -> None:
    """The tolerance rule, with the answer's own size as the size of its terms."""
    testing.assert_within_budget(name, ours, oracle, plain, oracle.abs().amax().expand_as(oracle), torch.float32)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32)


def test_doors_open_by_name() -> None:
    """Without an import of their own."""
    script = """
import sys, fused_attn
assert "fused_attn.compat.sdpa" not in sys.modules and "transformers" not in sys.modules
assert fused_attn.compat.sdpa.scope and fused_attn.compat.transformers.register
assert "transformers" not in sys.modules
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    assert fused_attn.compat.flash_attn.flash_attn_func and fused_attn.compat.bert_padding.unpad_input
    assert not hasattr(fused_attn.compat, "nonsense")


# --- F.scaled_dot_product_attention


def causal_by_flag(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True, scale=0.3)


def float_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.arange(q.shape[2] * k.shape[2], dtype=q.dtype).view(q.shape[2], k.shape[2]).sin()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def upper_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, causal_upper_left(q.shape[2], k.shape[2]))


def lower_right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, causal_lower_right(q.shape[2], k.shape[2]))


@pytest.mark.parametrize("lengths", [(11, 11), (7, 19)], ids=str)
@pytest.mark.parametrize("call", [causal_by_flag, grouped, float_mask, upper_left, lower_right])
def test_functional(arrivals: list, call: Callable, lengths: tuple[int, int]) -> None:
    q, k, v = (randn(2, 4, n, 8).requires_grad_() for n in (lengths[0], lengths[1], lengths[1]))
    dout = randn(2, 4, lengths[0], 8)

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = call(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

    plain, oracle = run(torch.float32), run(torch.float64)
    with door.scope():
        ours = run(torch.float32)
    assert arrivals == [(2, 4, lengths[0], 8)]
    for name, got, exact, theirs in zip(("out", "dq", "dk", "dv"), ours, oracle, plain, strict=True):
        within_budget(name, got, exact, theirs)


def test_causal_bias_with_more_queries_than_keys(arrivals: list) -> None:
    """The first rows see nothing: zeros, and the others as if they stood alone."""
    q, k, v = randn(1, 2, 9, 8), randn(1, 2, 4, 8), randn(1, 2, 4, 8)
    with pytest.warns(UserWarning, match="NaNs"):
        bias = causal_lower_right(9, 4)
    with door.scope():
        out = F.scaled_dot_product_attention(q, k, v, bias)
        tail = F.scaled_dot_product_attention(q[:, :, 5:], k, v, is_causal=True)
    assert len(arrivals) == 2
    assert torch.equal(out[:, :, :5], torch.zeros(1, 2, 5, 8))
    within_budget("tail", out[:, :, 5:], TORCH(*(x.double() for x in (q[:, :, 5:], k, v)), is_causal=True), tail)


def test_compiled(arrivals: list) -> None:
    q, k, v = (randn(1, 2, 13, 8) for _ in range(3))
    eager = TORCH(q, k, v, is_causal=True)
    with door.scope():
        out = torch.compile(causal_by_flag, fullgraph=True, backend="aot_eager")(q, k, v)
    assert arrivals
    within_budget("out", out, TORCH(q.double(), k.double(), v.double(), is_causal=True), eager)


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(arrivals: list, training: bool) -> None:
    """With masks, in training and in evaluation, where torch has a fused path that asks nobody."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, batch_first=True).train(training)
    x = randn(2, 9, 16)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True

    def run(dtype: torch.dtype) -> Tensor:
        layer.to(dtype)
        with torch.set_grad_enabled(training):
            return layer(*(x.to(dtype),) * 3, key_padding_mask=padding, need_weights=False)[0].detach()

    plain, oracle = run(torch.float32), run(torch.float64)
    with door.scope():
        ours = run(torch.float32)
    assert arrivals == [(2, 4, 9, 4)]
    within_budget("out", ours, oracle, plain)


def test_transformer_layer(arrivals: list) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    x = randn(2, 9, 16)
    with torch.inference_mode():
        plain = layer(x)
        with door.scope():
            ours = layer(x)
        oracle = layer.double()(x.double())
    assert arrivals == [(2, 4, 9, 4)]
    within_budget("out", ours, oracle, plain)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_refused_calls_go_to_torch_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_warned", set())
    nested = torch.nested.nested_tensor([randn(2, 5, 8), randn(2, 3, 8)], layout=torch.strided)
    expected = TORCH(nested, nested, nested).values()
    with door.scope():
        with pytest.warns(UserWarning, match="leaves a call to torch: query: expected a nested tensor of layout"):
            out = F.scaled_dot_product_attention(nested, nested, nested)
        again = F.scaled_dot_product_attention(nested, nested, nested)  # a second warning would be an error
    assert torch.equal(out.values(), expected)
    assert torch.equal(again.values(), expected)


def test_refused_causal_bias_is_spelled_out_for_torch(arrivals: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch recognises the object by its function, which stands elsewhere now."""

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("not today")

    monkeypatch.setattr(door, "fused", refuse)
    q, k = randn(1, 2, 4, 8), randn(1, 2, 9, 8)
    expected = TORCH(q, k, k, attn_mask=torch.ones(4, 9, dtype=torch.bool).tril(5))
    with door.scope(), pytest.warns(UserWarning, match="not today"):
        out = F.scaled_dot_product_attention(q, k, k, causal_lower_right(4, 9))
    assert torch.equal(out, expected)


def test_what_torch_makes_of_a_wrong_call(arrivals: list) -> None:
    """It takes a mask together with is_causal; a bias of other lengths is wrong for it too."""
    q = randn(1, 2, 4, 8)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    expected = TORCH(q, q, q, mask, is_causal=True)
    with door.scope(), pytest.warns(UserWarning, match="attn_mask: must be None when is_causal"):
        assert torch.equal(F.scaled_dot_product_attention(q, q, q, mask, is_causal=True), expected)
    bias: CausalBias = causal_upper_left(4, 5)
    with door.scope(), pytest.warns(UserWarning, match="lengths"), pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(q, q, q, bias)


def test_a_named_backend_never_falls_back(arrivals: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_ATTN_BACKEND", "hopper")
    q = randn(1, 2, 4, 8)
    with door.scope(), pytest.raises(fused_attn.BackendError, match="hopper"):
        F.scaled_dot_product_attention(q, q, q)


def test_switch(arrivals: list) -> None:
    """enable and disable are idempotent, scopes nest, an exception leaves one, and the fast path comes back."""
    ours = door.scaled_dot_product_attention
    door.enable()
    door.enable()
    assert F.scaled_dot_product_attention is ours
    assert not torch.backends.mha.get_fastpath_enabled()
    with door.scope():
        pass
    assert F.scaled_dot_product_attention is ours
    door.disable()
    door.disable()
    assert F.scaled_dot_product_attention is TORCH
    with door.scope():
        with pytest.raises(KeyError), door.scope():
            raise KeyError
        door.disable()
        assert F.scaled_dot_product_attention is ours
    assert F.scaled_dot_product_attention is TORCH


def test_a_later_replacement_is_kept(arrivals: list, monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(*args: Any, **kwargs: Any) -> Tensor:
        return TORCH(*args, **kwargs)

    with door.scope():
        F.scaled_dot_product_attention = theirs
    try:
        assert F.scaled_dot_product_attention is theirs
    finally:
        F.scaled_dot_product_attention = TORCH


def test_scopes_of_many_threads(arrivals: list) -> None:
    """However they overlap, inside a scope the function is ours; when the last is left, torch's."""
    q = randn(1, 1, 3, 4)
    barrier, wrong = threading.Barrier(8), []

    def work() -> None:
        barrier.wait()
        for _ in range(50):
            with door.scope():
                if F.scaled_dot_product_attention is not door.scaled_dot_product_attention:
                    wrong.append("not ours")
                F.scaled_dot_product_attention(q, q, q)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(arrivals) == 400


# --- Transformers

transformers = pytest.importorskip("transformers")
import fused_attn.compat.transformers as models  # noqa: E402
from fused_attn.compat import flash_attn  # noqa: E402

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,  # so that the scores are large enough for a cap, a sink or a mask to matter
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(**SMALL),
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=5),
    "gemma2": lambda: transformers.Gemma2Config(
        **GROUPED, sliding_window=5, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **GROUPED, sliding_window=5, num_local_experts=2, num_experts_per_tok=1
    ),
}
PADDING = {"none": slice(0, 0), "right": slice(9, None), "inside": slice(3, 6)}
Tokens = dict[str, Tensor]


def build(name: str) -> nn.Module:
    models.register()
    torch.manual_seed(1)
    model = transformers.AutoModel.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # the default has no float64
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            nn.init.normal_(parameter)
    return model


def run_model(
    model: nn.Module, implementation: str, dtype: torch.dtype, tokens: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The hidden states, and the gradients of their weighted sum, for a model in dtype."""
    model.set_attn_implementation(implementation)
    model.to(dtype).zero_grad()
    hidden = model(**tokens, use_cache=False).last_hidden_state[tokens["attention_mask"].bool()]
    weight = torch.arange(hidden.numel()).view(hidden.shape).to(dtype).cos()
    (hidden * weight).sum().backward()
    found = {"hidden": hidden.detach()}
    for name, parameter in model.named_parameters():
        if name.endswith(("sinks", "0.self_attn.k_proj.weight", "0.attention.self.key.weight")):
            found[name] = parameter.grad.clone()
    assert len(found) > 1
    return found


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", CONFIGS)
def test_model(name: str, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states and gradients of small random models, against their own eager attention in float64."""
    calls: list[dict[str, Any]] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return fused_attn.attention(*args, **kwargs)

    monkeypatch.setattr(models, "attention", counted)
    model = build(name)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, PADDING[padding]] = 0
    tokens = {"input_ids": torch.randint(1, 50, (2, 13)), "attention_mask": mask}
    oracle = run_model(model, "eager", torch.float64, tokens)
    plain = run_model(model, "eager", torch.float32, tokens)
    ours = run_model(model, models.NAME, torch.float32, tokens)
    assert len(calls) == 2
    for key in oracle:
        within_budget(key, ours[key], oracle[key], plain[key])


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_on_the_left(name: str) -> None:
    """The first rows see nothing at all, and change nothing: as if the sequence had come alone.

    Eager attention is no oracle for the padded batch: in float64 its empty rows are NaN, which reach every row.
    """
    model = build(name)
    alone = {"input_ids": torch.randint(1, 50, (1, 9)), "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    alone["position_ids"] = torch.arange(4, 13)[None]
    padded = {key: F.pad(x, (4, 0)) for key, x in alone.items()}
    oracle = run_model(model, "eager", torch.float64, alone)
    plain = run_model(model, "eager", torch.float32, alone)
    ours = run_model(model, models.NAME, torch.float32, padded)
    for key in oracle:
        within_budget(key, ours[key], oracle[key], plain[key])


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "bert"])
def test_model_with_a_cache(name: str) -> None:
    """A prompt, then one token at a time, past the window: as if the whole sequence had been seen at once."""
    model = build(name)
    tokens = torch.randint(1, 50, (2, 13))

    def run(implementation: str, dtype: torch.dtype) -> Tensor:
        model.set_attn_implementation(implementation)
        model.to(dtype)
        with torch.inference_mode():
            answer = model(tokens[:, :6], use_cache=True)
            found = [answer.last_hidden_state]
            for i in range(6, 13):
                answer = model(tokens[:, i : i + 1], past_key_values=answer.past_key_values, use_cache=True)
                found.append(answer.last_hidden_state)
        return torch.cat(found, 1)

    within_budget("hidden", run(models.NAME, torch.float32), run("eager", torch.float64), run("eager", torch.float32))


class Layer(nn.Module):
    """What Transformers hands over as the module: a decoder's attention."""

    is_causal = True


@pytest.mark.parametrize("m", [1, 6])
def test_window_without_a_mask(m: int) -> None:
    """sliding_window counts the row's own key; a single query stands at the end of its keys."""
    q, k, v = randn(1, 2, m, 8), randn(1, 2, 6, 8), randn(1, 2, 6, 8)
    out, weights = models.attention_forward(Layer(), q, k, v, None, sliding_window=3)
    allowed = (torch.ones(6, 6).tril() * torch.ones(6, 6).triu(-2)).bool()[6 - m :]
    expected = TORCH(q.double(), k.double(), v.double(), attn_mask=allowed).transpose(1, 2)
    assert weights is None
    within_budget("out", out, expected, TORCH(q, k, v, attn_mask=allowed).transpose(1, 2))


def test_who_decides_causality() -> None:
    """The argument, else the module, else causal; never with a mask, nor for a single query."""
    q, k = randn(1, 2, 6, 8), randn(1, 2, 6, 8)
    encoder = Layer()
    encoder.is_causal = False
    first_key = k[:, :, :1].transpose(1, 2)

    def first_row(module: nn.Module, **options: Any) -> Tensor:
        return models.attention_forward(module, q, k, k, options.pop("mask", None), **options)[0][:, :1]

    everything = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    assert torch.equal(first_row(Layer()), first_key)
    assert torch.equal(first_row(nn.Module()), first_key)
    assert torch.equal(first_row(encoder, is_causal=True), first_key)
    for full in (first_row(encoder), first_row(Layer(), is_causal=False), first_row(Layer(), mask=everything)):
        within_budget("row", full, TORCH(q.double(), k.double(), k.double()).transpose(1, 2)[:, :1],
                      TORCH(q, k, k).transpose(1, 2)[:, :1])  # fmt: skip


def test_position_bias_and_float_mask_add_up() -> None:
    q, k, bias, mask = randn(1, 2, 6, 8), randn(1, 2, 6, 8), randn(1, 2, 6, 6), randn(1, 1, 6, 6)
    out, _ = models.attention_forward(Layer(), q, k, k, mask, position_bias=bias, scaling=0.5)
    plain = TORCH(q, k, k, attn_mask=mask + bias, scale=0.5).transpose(1, 2)
    exact = TORCH(q.double(), k.double(), k.double(), attn_mask=mask.double() + bias.double(), scale=0.5).transpose(
        1, 2
    )
    within_budget("out", out, exact, plain)


def test_dropout_reaches_the_weights() -> None:
    q, k = randn(1, 2, 6, 8), randn(1, 2, 6, 8)
    torch.manual_seed(3)
    out, _ = models.attention_forward(Layer(), q, k, k, None, dropout=0.5)
    torch.manual_seed(3)
    expected = fused_attn.attention(q, k, k, causal=True, dropout_p=0.5).transpose(1, 2)
    assert torch.equal(out, expected)
    assert not torch.equal(out, models.attention_forward(Layer(), q, k, k, None)[0])


def test_what_is_refused_or_absent_is_said() -> None:
    q = randn(1, 2, 6, 8)
    with pytest.raises(NotImplementedError, match="cache"):
        models.attention_forward(Layer(), q, q, q, None, cache=object())
    with pytest.warns(UserWarning, match="output_attentions"):
        models.attention_forward(Layer(), q, q, q, None, output_attentions=True)


def test_sentence_encoder_is_quiet() -> None:
    """Registering twice changes nothing, and a model built on the name warns of nothing."""
    models.register()
    models.register()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = transformers.AutoModel.from_config(CONFIGS["bert"](), attn_implementation=models.NAME).eval()
        model(torch.randint(1, 50, (1, 7)))
    assert model.config._attn_implementation == models.NAME


# --- Transformers' flash_attention_2


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The path pointed at ours; the names of what it calls."""
    called: list[str] = []

    def counted(name: str) -> Callable:
        original = getattr(flash_attn, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return original(*args, **kwargs)

        return call

    for name in ("attention", "attention_varlen", "attention_decode"):
        monkeypatch.setattr(flash_attn, name, counted(name))
    with models.flash_attention_2():
        yield called


# Taking tokens out of the middle moves the others closer together, which a window sees.
UNPADDED = [(name, padding) for name in ("bert", "llama", "mistral", "gemma2") for padding in PADDING
            if padding != "inside" or name in ("bert", "llama")]  # fmt: skip


@pytest.mark.parametrize(("name", "padding"), UNPADDED)
def test_flash_attention_2(name: str, padding: str, flash: list[str]) -> None:
    """Hidden states and gradients as by eager attention in float64, without padding among the tokens."""
    model = build(name)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, PADDING[padding]] = 0
    tokens = {"input_ids": torch.randint(1, 50, (2, 13)), "attention_mask": mask}
    oracle = run_model(model, "eager", torch.float64, tokens)
    plain = run_model(model, "eager", torch.float32, tokens)
    assert not flash
    ours = run_model(model, models.FLASH, torch.float32, tokens)
    assert flash == ["attention" if padding == "none" else "attention_varlen"] * 2
    for key in oracle:
        within_budget(key, ours[key], oracle[key], plain[key])


@pytest.mark.parametrize("pad", [0, 4])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_flash_attention_2_with_a_cache(name: str, pad: int, flash: list[str]) -> None:
    """A prompt of a batch, one sequence padded on the left, then token by token: as if each had come alone, at once."""
    model = build(name)
    tokens = torch.randint(1, 50, (2, 13))
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, :pad] = 0

    def alone(dtype: torch.dtype) -> Tensor:
        model.set_attn_implementation("eager")
        model.to(dtype)
        with torch.inference_mode():
            found = [model(tokens[b : b + 1, first:]).last_hidden_state[0] for b, first in ((0, 0), (1, pad))]
        return torch.cat(found)

    def ours() -> Tensor:
        model.set_attn_implementation(models.FLASH)
        model.to(torch.float32)
        places, cache, found = (mask.cumsum(1) - 1).clamp_min(0), None, []
        with torch.inference_mode():
            for i, end in zip([0, *range(7, 13)], range(7, 14), strict=True):
                answer = model(tokens[:, i:end], attention_mask=mask[:, :end], position_ids=places[:, i:end],
                               past_key_values=cache, use_cache=True)  # fmt: skip
                cache = answer.past_key_values
                found.append(answer.last_hidden_state)
        return torch.cat(found, 1)[mask.bool()]

    within_budget("hidden", ours(), alone(torch.float64), alone(torch.float32))
    assert ("attention_varlen" in flash) == (pad > 0)
    assert "attention" in flash or (pad and name == "llama")  # once a window has left the padding behind


def test_flash_attention_2_of_packed_sequences(flash: list[str]) -> None:
    """Positions that begin again are sequences of their own."""
    model = build("llama")
    tokens, cuts = torch.randint(1, 50, (1, 11)), [slice(0, 4), slice(4, 11)]
    places = torch.cat([torch.arange(4), torch.arange(7)])[None]

    def alone(dtype: torch.dtype) -> Tensor:
        model.set_attn_implementation("eager")
        model.to(dtype)
        return torch.cat([model(tokens[:, cut]).last_hidden_state for cut in cuts], 1)

    with torch.no_grad():
        oracle, plain = alone(torch.float64), alone(torch.float32)
        model.set_attn_implementation(models.FLASH)
        within_budget("hidden", model(tokens, position_ids=places, use_cache=False).last_hidden_state, oracle, plain)
    assert flash == ["attention_varlen"] * 2


def test_flash_attention_2_is_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scopes and calls nest, and all is as it was afterwards."""
    from transformers import modeling_flash_attention_utils as room

    entry = room.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    before = room._lazy_imports, dict(entry)
    with models.flash_attention_2():
        models.register_flash_attention_2()
        with models.flash_attention_2():
            pass
        assert room.lazy_import_flash_attention(models.FLASH)[0][0] is flash_attn.flash_attn_func
        assert (room._lazy_imports, entry) != before
    models.unregister_flash_attention_2()
    assert (room._lazy_imports, entry) == before
    with pytest.raises(ImportError, match="FlashAttention2"):
        build("bert").set_attn_implementation(models.FLASH)
    monkeypatch.delattr(room, "_lazy_imports")
    with pytest.raises(NotImplementedError, match="looks for flash-attn in a way that is not known"):
        models.register_flash_attention_2()
