"""attn_implementation="flash_attention_2" by compat.flash_attn, against the models' eager attention."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.compat import flash_attn
from tests.compat.test_sdpa import TORCH, randn
from tests.parity import within_budget

transformers = pytest.importorskip("transformers")
import fused_attn.compat.transformers as models  # noqa: E402
from tests.compat.test_transformers import GROUPED, PADDING, build, run_model  # noqa: E402


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


def test_flash_attention_2_scopes_nest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scopes and calls nest, and all is as it was afterwards."""
    from transformers import modeling_flash_attention_utils as flash_utils
    from transformers.integrations import flash_attention as integration

    entry = flash_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    falcon = transformers.models.falcon.modeling_falcon

    def state() -> tuple:
        names = flash_utils._lazy_imports, flash_utils.is_flash_attn_available, falcon.is_flash_attn_available
        return *names, integration.get_target_dtype, dict(entry)

    before = state()
    with models.flash_attention_2():
        models.register_flash_attention_2()
        with models.flash_attention_2():
            pass
        assert flash_utils.lazy_import_flash_attention(models.FLASH)[0][0] is flash_attn.flash_attn_func
        assert not any(x == y for x, y in zip(state(), before, strict=True) if x is not falcon.is_flash_attn_available)
    models.unregister_flash_attention_2()
    assert state() == before
    with pytest.raises(ImportError, match="FlashAttention2"):
        build("bert").set_attn_implementation(models.FLASH)
    monkeypatch.delattr(flash_utils, "_lazy_imports")
    with pytest.raises(NotImplementedError, match="looks for flash-attn in a way that fused_attn does not support"):
        models.register_flash_attention_2()


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
NAMED = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 50}
GUARDED = {
    "falcon": lambda: transformers.FalconConfig(**SIZES),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, vocab_size=50, attention_types=[[["global"], 2]]
    ),
    "gptj": lambda: transformers.GPTJConfig(**NAMED, rotary_dim=4),
}


def logits_of(config: Any, implementation: str, dtype: torch.dtype, tokens: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in model.parameters():
            if x.ndim > 1:
                x.copy_(torch.randn(x.shape, generator=generator) * 0.2)
        return model(**tokens).logits[tokens["attention_mask"].bool()]


@pytest.mark.parametrize("name", GUARDED)
def test_modules_that_check_for_flash_attn_at_import(
    name: str, flash: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own flash class, in float32, where its file was imported before the switch, and where after."""
    file = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    config = GUARDED[name]()
    tokens = {"input_ids": torch.randint(1, 50, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    tokens["attention_mask"][1, 6:] = 0
    oracle = logits_of(config, "eager", torch.float64, tokens)
    plain = logits_of(config, "eager", torch.float32, tokens)
    for imported in ("before", "after"):
        models.unregister_flash_attention_2()
        monkeypatch.delitem(vars(file), "_flash_attention_forward", raising=False)
        with monkeypatch.context() as patch:
            if imported == "after":
                patch.delitem(sys.modules, file.__name__)
            models.register_flash_attention_2()
        if imported == "after":
            importlib.reload(file)
        within_budget("logits", logits_of(config, models.FLASH, torch.float32, tokens), oracle, plain)
    assert flash == ["attention_varlen"] * 4


def test_models_without_a_linear_layer(flash: list[str]) -> None:
    """GPT-2's are Conv1D; Transformers looks for the dtype of the first nn.Linear."""
    config = transformers.GPT2Config(**NAMED)
    tokens = {"input_ids": torch.randint(1, 50, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    oracle = logits_of(config, "eager", torch.float64, tokens)
    plain = logits_of(config, "eager", torch.float32, tokens)
    within_budget("logits", logits_of(config, models.FLASH, torch.float32, tokens), oracle, plain)
    assert flash == ["attention"] * 2


def test_bark(flash: list[str]) -> None:
    config = transformers.BarkSemanticConfig(
        input_vocab_size=50, output_vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, block_size=32
    )
    cls = transformers.models.bark.modeling_bark.BarkSemanticModel

    def logits(implementation: str, dtype: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        model = cls._from_config(copy.deepcopy(config), attn_implementation=implementation).to(dtype).eval()
        with torch.no_grad():
            return model(torch.arange(1, 8)[None]).logits

    within_budget(
        "logits", logits(models.FLASH, torch.float32), logits("eager", torch.float64), logits("eager", torch.float32)
    )
    assert flash == ["attention"] * 2
