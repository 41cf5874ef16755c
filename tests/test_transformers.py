"""Transformers' doors: small random models through ours, by both of its paths, against their own eager attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_attn
from tests.test_compat import TORCH, randn, within_budget

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


# --- flash_attention_2


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


def test_continuous_batching(flash: list[str]) -> None:
    """Prompts of several lengths over one paged cache of Transformers': the tokens that each gives alone."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**GROUPED)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=models.FLASH).eval()
    prompts = [[1, 5, 7, 9], [1, 4], [1, 8, 8, 2, 3, 4]]
    greedy = transformers.GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=49, pad_token_id=0)
    small = ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=32)
    found = model.generate_batch(prompts, greedy, small, warmup=False)
    assert set(flash) == {"attention_varlen"}
    model.set_attn_implementation("eager")
    for answer, prompt in zip(found.values(), prompts, strict=True):
        alone = model.generate(torch.tensor([prompt]), generation_config=greedy)[0, len(prompt) :]
        assert answer.generated_tokens == alone.tolist()


def test_a_step_over_pages(flash: list[str]) -> None:
    """What continuous batching calls on a GPU: a new token of each sequence is written to its page, and sees all."""
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    lengths, table = [5, 2], torch.tensor([[3, 0], [2, 1]], dtype=torch.int32)
    q, k, v = randn(1, 2, 4, 8), randn(1, 2, 2, 8), randn(1, 2, 2, 8)
    pages = [randn(4, 4, 2, 8) for _ in range(2)]
    before = [x.clone() for x in pages]
    ends = torch.tensor([0, *[n + 1 for n in lengths]]).cumsum(0).int()
    out = _flash_attention_forward(
        q, k, v, None, query_length=1, is_causal=True, cu_seq_lens_k=ends, max_length_q=1, max_length_k=6,
        block_table=table, k_cache=pages[0], v_cache=pages[1], attn_implementation=models.FLASH,
    )  # fmt: skip
    assert flash == ["attention_decode"]
    for b, n in enumerate(lengths):
        keys, values = (
            torch.cat((x[table[b].long()].flatten(0, 1)[:n], new[0, b : b + 1])).transpose(0, 1)[None]
            for x, new in zip(before, (k, v), strict=True)
        )
        row = q[:, b : b + 1].transpose(1, 2)
        exact = TORCH(row.double(), keys.double(), values.double(), enable_gqa=True)[0, :, 0]
        within_budget("out", out[0, b], exact, TORCH(row, keys, values, enable_gqa=True)[0, :, 0])
        assert torch.equal(pages[0][table[b, n // 4], n % 4], k[0, b])


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
