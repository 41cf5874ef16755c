"""attn_implementation="fused_attn": small random models against their own eager attention."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_attn
from tests.compat.test_sdpa import TORCH, randn
from tests.parity import within_budget

transformers = pytest.importorskip("transformers")
import fused_attn.compat.transformers as models  # noqa: E402

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


def test_causality_from_module_and_arguments() -> None:
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


def test_unsupported_arguments_are_reported() -> None:
    q = randn(1, 2, 6, 8)
    with pytest.raises(NotImplementedError, match="cache"):
        models.attention_forward(Layer(), q, q, q, None, cache=object())
    with pytest.warns(UserWarning, match="output_attentions"):
        models.attention_forward(Layer(), q, q, q, None, output_attentions=True)


def test_sentence_encoder_warns_nothing() -> None:
    """Registering twice changes nothing, and a model built on the name warns of nothing."""
    models.register()
    models.register()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = transformers.AutoModel.from_config(CONFIGS["bert"](), attn_implementation=models.NAME).eval()
        model(torch.randint(1, 50, (1, 7)))
    assert model.config._attn_implementation == models.NAME


def test_weights_are_not_returned() -> None:
    models.register()
    model = transformers.AutoModel.from_config(CONFIGS["llama"](), attn_implementation=models.NAME).eval()
    with pytest.warns(UserWarning, match="output_attentions: fused attention returns no weights"):
        assert model(torch.randint(1, 50, (1, 7)), output_attentions=True).attentions == ()


def test_no_mask_means_full_attention_in_models_that_always_pass_causal_masks() -> None:
    """Some modules that see everything say nothing of causality, or say that they are causal."""
    q, k = randn(1, 2, 4, 8), randn(1, 2, 6, 8)
    module = Layer()
    module.config = transformers.MllamaConfig().text_config
    found = models.attention_forward(module, q, k, k, None, sliding_window=2)[0]
    exact = TORCH(q.double(), k.double(), k.double()).transpose(1, 2)
    within_budget("out", found, exact, TORCH(q, k, k).transpose(1, 2))


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_sparse_blocks_of_keys(mask: str) -> None:
    """-1 names no block, the last block may be cut, and heads share what is chosen for their group."""
    q, k = randn(1, 4, 5, 8), randn(1, 2, 5, 8)
    blocks = torch.tensor([[[[0, -1]] * 5, [[0, 2]] * 5]])
    module = Layer()
    module.indexer = nn.Module()
    module.indexer.block_size = 2
    allowed = torch.ones(5, 5).tril().bool()
    given = {"none": None, "bool": allowed[None, None], "float": torch.zeros(1, 1, 5, 5).masked_fill(~allowed, -1e30)}
    found = models.attention_forward(module, q, k, k, given[mask], block_indices=blocks)[0]
    keep = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 1]]).bool().repeat_interleave(2, 0)[None, :, None] & allowed
    exact = TORCH(q.double(), k.double(), k.double(), attn_mask=keep, enable_gqa=True).transpose(1, 2)
    within_budget("out", found, exact, TORCH(q, k, k, attn_mask=keep, enable_gqa=True).transpose(1, 2))


def test_sinks_per_row() -> None:
    q, k, sinks = randn(1, 2, 5, 8), randn(1, 2, 5, 8), randn(1, 2, 5, 1)

    def eager(dtype: torch.dtype) -> Tensor:
        scores = (q.to(dtype) @ k.to(dtype).mT * 8**-0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        weights = torch.cat([scores, sinks.to(dtype)], -1).softmax(-1)[..., :-1]
        return (weights @ k.to(dtype)).transpose(1, 2)

    found = models.attention_forward(Layer(), q, k, k, None, sinks=sinks)[0]
    within_budget("out", found, eager(torch.float64), eager(torch.float32))


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    spec = importlib.util.spec_from_file_location("fused_attn.compat.again", models.__file__)
    with pytest.raises(ImportError, match="needs transformers: pip install 'transformers>=5'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
