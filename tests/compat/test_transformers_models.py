"""Every class of Transformers that builds small equals its eager attention, or is refused by name."""

from __future__ import annotations

import collections
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compat import tiny_models
from tests.parity import within_budget

transformers = pytest.importorskip("transformers")
import fused_attn.compat.transformers as models  # noqa: E402

MAPPINGS = ("", "_FOR_CAUSAL_LM", "_FOR_MASKED_LM", "_FOR_SEQ_TO_SEQ_CAUSAL_LM", "_FOR_TEXT_ENCODING")
# Cross attention, biases, sinks, sparse selections, windows, masks of their own beside ours: what a mask may meet.
SAMPLE = (
    "BartForConditionalGeneration",
    "BigBirdPegasusModel",
    "BridgeTowerModel",
    "DeepseekV32ForCausalLM",
    "DeepseekV4ForCausalLM",
    "Gemma4ForCausalLM",
    "GPT2LMHeadModel",
    "Inkling2ForCausalLM",
    "MiniMaxM3VLForCausalLM",
    "PaliGemmaModel",
    "SplinterModel",
    "T5ForConditionalGeneration",
    "ViTModel",
)
GRADIENTS = {"BartForConditionalGeneration", "BigBirdPegasusModel", "DeepseekV32ForCausalLM", "DeepseekV4ForCausalLM",
             "Inkling2ForCausalLM", "MiniMaxM3VLForCausalLM", "T5ForConditionalGeneration"}  # fmt: skip
REFUSED = (
    "BloomForCausalLM",
    "CodeGenModel",
    "FalconModel",
    "GPTJModel",
    "GitModel",
    "LEDModel",
    "LukeModel",
    "MPNetModel",
    "MptForCausalLM",
    "SamModel",
)
SLOW = {"YolosModel"}  # resizes large embeddings of positions
LARGEST = 8_000_000  # parameters


def make(cls: Any, config: Any, implementation: str) -> nn.Module:
    torch.manual_seed(0)
    model = cls._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the default has no float64
    return model


def build(cls: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A small model with eager attention that runs, and its inputs; else RuntimeError with the last reason."""
    reason: Exception = RuntimeError("no small config")
    for config in tiny_models.configs(cls):
        for images in (False, True):
            try:
                with torch.device("meta"):
                    size = sum(x.numel() for x in make(cls, config, "eager").parameters())
                if size > LARGEST:
                    raise RuntimeError(f"{size} parameters")
                model = tiny_models.draw(make(cls, config, "eager"))
                given = tiny_models.inputs(model, images)
                answer(model, given, torch.float32)
                return model, given
            except Exception as error:
                reason = error
    raise RuntimeError(f"{cls.__name__}: {type(reason).__name__}: {reason}")


def answer(model: nn.Module, given: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    floats = {name: x.to(dtype) for name, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return tiny_models.outputs(model.to(dtype)(**given | floats), given)


def gradients(model: nn.Module, given: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradients of a weighted sum of what the model answers."""
    model.zero_grad()
    found = [x for x in answer(model, given, dtype).values() if x.requires_grad]
    sum((x * torch.arange(x.numel()).view(x.shape).to(dtype).cos()).sum() for x in found).backward()
    # Those of biases of keys are zero but for rounding.
    return {
        name: x.grad.clone()
        for name, x in model.named_parameters()
        if x.grad is not None and (x.ndim > 1 or name.endswith("sinks"))
    }


def check(cls: Any, *, differentiated: bool) -> None:
    """With padding and without: what our model answers, by the budget of eager attention's own float32."""
    eager, given = build(cls)
    ours = make(cls, eager.config, models.NAME)
    ours.load_state_dict(eager.state_dict())
    for asked in (given, tiny_models.unpadded(given)):
        for ask in (answer, gradients) if differentiated else (answer,):
            with torch.set_grad_enabled(ask is gradients):
                plain, got = ask(eager, asked, torch.float32), ask(ours, asked, torch.float32)
                try:
                    oracle = ask(copy.deepcopy(eager), asked, torch.float64)
                except RuntimeError:  # a few compute some of it in float32 by name
                    oracle = {}
                # In float64 eager attention makes NaN of rows that see nothing.
                if not oracle or any(x.isnan().any() for x in oracle.values()):
                    oracle = {name: x.double() for name, x in plain.items()}
            assert plain.keys() == got.keys()
            for name, exact in oracle.items():
                within_budget(f"{cls.__name__} {ask.__name__} {name}", got[name], exact, plain[name])


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name: str) -> None:
    models.register()
    check(getattr(transformers, name), differentiated=name in GRADIENTS)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    "name", ["DeepseekV32ForCausalLM", "Gemma4ForCausalLM", "MiniMaxM3VLForCausalLM", "MistralForCausalLM"]
)
def test_generate(name: str, cache: str) -> None:
    """Logits of a few steps: of a batch with padding inside; without padding, of the last 3 tokens of each step."""
    models.register()
    eager, given = build(getattr(transformers, name))
    ours = make(type(eager), eager.config, models.NAME)
    ours.load_state_dict(eager.state_dict())
    tokens = given["input_ids"]
    padded = torch.ones_like(tokens)
    padded[1, 3:5] = 0  # in float64 eager attention makes NaN of rows that see nothing

    def logits(model: Any, dtype: torch.dtype, **options: Any) -> Tensor:
        if cache == "static":
            options["cache_implementation"] = "static"
        steps = model.to(dtype).generate(
            tokens, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0, disable_compile=True,
            return_dict_in_generate=True, output_logits=True, **options,
        ).logits  # fmt: skip
        return torch.stack(steps)

    for options in ({"attention_mask": padded}, {"attention_mask": torch.ones_like(tokens), "logits_to_keep": 3}):
        plain = logits(eager, torch.float32, **options)
        got = logits(ours, torch.float32, **options)
        within_budget("logits", got, logits(copy.deepcopy(eager), torch.float64, **options), plain)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """Before anything is computed, as "sdpa" is, and by the name of the class."""
    models.register()
    cls = getattr(transformers, name)
    with pytest.raises(ValueError, match=f"{name} does not support an attention implementation through fused_attn"):
        cls._from_config(cls.config_class(), attn_implementation=models.NAME)


def test_subclasses_of_refused_models_are_refused() -> None:
    class Mine(transformers.BloomForCausalLM):
        pass

    models.register()
    with pytest.raises(ValueError, match="Mine does not support"):
        Mine._from_config(transformers.BloomConfig(), attn_implementation=models.NAME)


def test_composite_models_with_an_eager_part() -> None:
    """The parts of a composite model, where one of them computes attention itself."""
    models.register()
    parts = {"": models.NAME, "vision_config": "eager", "mask_decoder_config": models.NAME}
    config = next(tiny_models.configs(transformers.SamModel))
    model = transformers.SamModel._from_config(config, attn_implementation=parts)
    assert model.config.vision_config._attn_implementation == "eager"
    assert model.config._attn_implementation == model.config.mask_decoder_config._attn_implementation == models.NAME


def test_models_without_support_stay_unchanged(caplog: pytest.LogCaptureFixture) -> None:
    models.register()
    model, given = build(transformers.BloomModel)
    before = answer(model, given, torch.float32)
    model.set_attn_implementation(models.NAME)
    assert model.config._attn_implementation == "eager"
    for name, x in answer(model, given, torch.float32).items():
        assert torch.equal(x, before[name])


# Classes that read tokens and were not compared, by the reason.
NOT_BUILT = {
    "more than LARGEST": """
        AlignModel BltForCausalLM BltModel Dots3NoteForCausalLM Dots3NoteTextModel Florence2Model JanusModel
        PeAudioModel SeamlessM4TModel SeamlessM4Tv2Model VibeVoiceAsrForConditionalGeneration
        VibeVoiceAsrModel VibeVoiceForConditionalGeneration
    """,
    "inputs beside tokens are needed": """
        Blip2QFormerModel ChameleonModel ClapModel CohereCompassVisionModel DiaModel Emu3Model
        Ernie4_5_VLMoeModel Exaone4_5_VisionModel Gemma4VisionModel Glm46VModel Glm4vMoeVisionModel
        Glm4vVisionModel Glm5NextVisionModel GlmOcrVisionModel IdeficsModel Kimi_K25VisionModel
        KyutaiSpeechToTextModel Lfm3VlVisionModel MusicgenForCausalLM MusicgenMelodyForCausalLM
        MusicgenMelodyModel MusicgenModel Qwen2_5OmniThinkerModel Qwen2_5_VisionTransformerPretrainedModel
        Qwen3OmniMoeThinkerModel Qwen3VLMoeVisionModel Qwen3VLVisionModel Qwen3_5MoeVisionModel
        Qwen3_5VisionModel Qwen4ExpVisionModel Step3p7Model VoxtralRealtimeForConditionalGeneration
        VoxtralRealtimeModel XCLIPModel
    """,
    "a package is needed that is not among the development ones": """
        Gemma3nForConditionalGeneration Gemma3nModel LayoutLMv2Model PeAudioVideoModel PeVideoModel
        PerceptionLMModel
    """,
    "the rules make no config of it that runs": """
        CohereCompassForCausalLM CohereCompassModel CohereCompassTextModel CsmForConditionalGeneration
        DbrxForCausalLM DbrxModel DiffusionGemmaModel Dots3NoteModel FalconH1ForCausalLM FalconH1Model
        FastVlmModel FunAsrNanoModel Gemma4AssistantForCausalLM Gemma4UnifiedAssistantForCausalLM
        Glm5NextModel Glm5NextTextModel GlmImageVQVAE Granite4VisionModel GraniteMoeHybridForCausalLM
        Mamba2ForCausalLM Mamba2Model Mistral4Model Molmo2Model NeoMMEForMaskedLM NeoMMEModel
        Qwen4ExpForCausalLM Qwen4ExpModel Qwen4ExpTextModel Siglip2Model SiglipModel T5Gemma2Encoder
        T5GemmaEncoderModel Tipsv2Model VisionTextDualEncoderModel Zamba2ForCausalLM Zamba2Model
        ZambaForCausalLM ZambaModel ZayaForCausalLM ZayaModel
    """,
}


def names() -> list[str]:
    from transformers.models.auto import modeling_auto

    found: set[str] = set()
    for mapping in MAPPINGS:
        for value in getattr(modeling_auto, f"MODEL{mapping}_MAPPING_NAMES").values():
            found |= set(value) if isinstance(value, (list, tuple)) else {value}
    return sorted(found)


def judge(name: str) -> str:
    """equal, refused, not built, or how ours differs."""
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        return "no model"
    for config in tiny_models.configs(cls):
        try:
            with torch.device("meta"):
                make(cls, config, models.NAME)
        except Exception as error:
            if "through fused_attn" in str(error):
                return "refused"
    try:
        build(cls)
    except Exception as error:
        return f"not built: {error}"
    try:
        check(cls, differentiated=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "equal"


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(8))
def test_every_class(part: int) -> None:
    """What reads tokens is equal, refused or listed; what reads images or sound is equal or refused where it builds."""
    models.register()
    found = {name: judge(name) for name in names()[part::8] if name not in SLOW}
    print(collections.Counter(x.split(":")[0] for x in found.values()))
    wrong = {name: x for name, x in found.items() if not x.startswith(("equal", "refused", "not built", "no model"))}
    assert not wrong, wrong
    tokens = {name for name, x in found.items() if x.startswith("not built")
              and getattr(transformers, name).main_input_name == "input_ids"}  # fmt: skip
    listed = {name for reason in NOT_BUILT.values() for name in reason.split()}
    assert tokens <= listed, {name: found[name] for name in tokens - listed}
