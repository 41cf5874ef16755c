"""Small random models of Transformers' classes: reduced configs and inputs with padding."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

HEADS = "(.*_)?(heads?|n_heads?|num_heads|nhead|attention_heads)"
KEYS = "(.*_)?(key_value_heads|kv_heads|n_head_kv|num_kv_heads)"
# The first rule that matches the whole name of an integer gives its value.
RULES = [
    ("(qk_rope_head_dim|rope_dim|rotary_dim|coordinate_size)", 8),
    ("index_topk", 6),
    ("mamba_d_head", 32),
    ("shape_size", 16),
    ("(index_block_size|index_topk_blocks)", 2),
    ("(.*_)?(head_dim|d_kv|kv_channels|attention_head_size|size_per_head|dim_head|d_head)", 16),
    (KEYS, 2),
    (HEADS, 4),
    ("(num_|n_|moe_num_)?(.*_)?experts", 4),
    ("(num_experts_per_(tok|token)|moe_(topk|k|top_k)|top_k|top_k_experts|experts_per_token)", 2),
    ("(n_groups?|topk_group|num_expert_groups?|mamba_n_groups)", 1),
    ("(.*_)?rank", 16),
    (".*vocab_size.*", 64),
    ("(.*_)?(layers?|n_layers?|depth|num_blocks|hidden_layers)", 2),
    ("(.*_)?(ffn_dim|d_ff|n_inner|(ffn_hidden|intermediate|ffn|inner|shared_expert)(_size|_dim)|mlp_dim|ff_dim)(_mlp)?",
     96),
    ("(.*_)?(hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|word_embed_proj_dim|emb_dim|proj_dim"
     "|intra_bottleneck_size)(_per_layer_input)?", 64),
    ("(max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions)", 128),
    ("image_size|img_size", 32),
    ("patch_size", 8),
    ("sliding_window(_size)?|attention_chunk_size|local_attention|window_size", 4),
    ("attention_window|block_size", 4),
    ("num_mel_bins", 128),
]  # fmt: skip
UNSET = {"head_dim": 16, "vocab_size": 64, "num_key_value_heads": 4, "num_experts_per_tok": 2, "n_routed_experts": 4}
KEPT = {"num_feature_levels", "num_nextn_predict_layers", "num_labels", "num_channels"}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXTRA: dict[str, dict[str, Any]] = {  # by the type of a config or of a part of one
    "dots1": {"n_shared_experts": 1},
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 3},
    "gemma3n_text": {**SHARED, "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": SHARED,
    "gemma4_unified_text": {**SHARED, "num_kv_shared_layers": 0},
    "mobilebert": {"embedding_size": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "reformer": {"axial_pos_shape": (4, 4), "axial_pos_embds_dim": (32, 32)},
    "xmod": {"default_language": "en_XX"},
}
LENGTH, ANSWER = 12, 7


def cut(values: dict[str, Any], heads: int) -> dict[str, Any]:
    """The config's values, each made small by its name; kinds of layers stay as many as the layers allow."""
    names = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    layers = next((values[x] for x in names if values.get(x)), None)
    found: dict[str, Any] = {}
    for name, value in values.items():
        found[name] = value
        if name in TOKENS and value is not None:
            found[name] = TOKENS[name]
        elif value is None:
            found[name] = UNSET.get(name)
        elif name == "per_layer_config":
            found[name] = {}
        elif isinstance(value, dict) and ("config" in name or "model_type" in value):
            found[name] = cut(value, heads)
        elif re.fullmatch(".*token_(id|index)", name) and isinstance(value, int):
            found[name] = 3 + sum(map(ord, name)) % 8
        elif isinstance(value, (list, tuple)) and layers is not None and len(value) == layers:
            kinds = list(dict.fromkeys(value)) if all(isinstance(x, str) for x in value) else list(value)
            found[name] = type(value)((kinds * 2)[:2])
        elif isinstance(value, int) and not isinstance(value, bool) and name not in KEPT:
            found[name] = heads if re.fullmatch(KEYS, name) else _small(name, value)
    if "qk_rope_head_dim" in found and "head_dim" in found:
        found["head_dim"] = found["qk_rope_head_dim"]
    if {"qk_head_dim", "qk_nope_head_dim"} <= found.keys():
        found["qk_head_dim"] = found["qk_nope_head_dim"] + found["qk_rope_head_dim"]
    return found | EXTRA.get(values.get("model_type", ""), {})


def _small(name: str, value: int) -> int:
    return next((x for pattern, x in RULES if re.fullmatch(pattern, name)), value)


def configs(cls: Any) -> Iterator[Any]:
    """Tiny configs of a model class, the most telling one first: grouped heads, then as many as query heads."""
    try:
        values = cls.config_class().to_dict()
    except Exception:  # its defaults do not agree with one another
        return
    if "mrope_section" in inspect.getsource(sys.modules[cls.__module__]):
        for part in (values, *(x for x in values.values() if isinstance(x, dict))):
            if isinstance(rope := part.get("rope_parameters"), dict):
                half = int(8 * rope.get("partial_rotary_factor", 1.0))
                part["rope_parameters"] = {**rope, "mrope_section": [half // 2, half // 4, half // 4]}
    taken = inspect.signature(cls.config_class.__init__).parameters
    for heads in (2, 4):
        small = cut(values, heads)
        for name in ("architectures", "transformers_version", "model_type", "_name_or_path", "dtype", "torch_dtype"):
            small.pop(name, None)
        for chosen in (small, {name: value for name, value in small.items() if name in taken}):
            with contextlib.suppress(Exception):
                yield cls.config_class(**chosen)
                break


def draw(model: nn.Module) -> nn.Module:
    """Weights large enough for the scores to differ; zeros, such as sinks and biases, become small numbers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.ndim > 1:
                x.copy_(torch.randn(x.shape, generator=generator) * min(0.6, 1.3 / math.sqrt(max(x[0].numel(), 1))))
            elif name.endswith("sinks"):
                x.copy_(torch.randn(x.shape, generator=generator))
            elif not x.any():
                x.copy_(torch.randn(x.shape, generator=generator) * 0.1)
    return model


def inputs(model: Any, images: bool = False) -> dict[str, Any]:
    """Two sequences, the second with padding inside and at its end; an image or a sound for what has no tokens."""
    names, config, main = inspect.signature(model.forward).parameters, model.config, model.main_input_name
    generator = torch.Generator().manual_seed(1)
    found: dict[str, Any] = {}
    if main == "input_ids" and main in names:
        found[main] = torch.randint(11, 50, (2, LENGTH), generator=generator)
        if "attention_mask" in names:
            found["attention_mask"] = _padded(LENGTH, [3, 4, 10, 11])
        if "bbox" in names:
            found["bbox"] = torch.tensor([0, 1, 2, 3]).expand(2, LENGTH, 4).contiguous()
    if main == "pixel_values" or (images and "pixel_values" in names):
        vision = getattr(config, "vision_config", None) or config
        size = getattr(vision, "image_size", 32) or 32
        height, width = (size, size) if isinstance(size, int) else size[:2]
        channels = getattr(vision, "num_channels", 3) or 3
        found["pixel_values"] = torch.randn(2, channels, height, width, generator=generator)
    elif main == "input_values":
        found[main] = torch.randn(2, 2000, generator=generator)
    elif main == "input_features":
        found[main] = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        found["decoder_input_ids"] = torch.randint(11, 50, (2, ANSWER), generator=generator)
        if "decoder_attention_mask" in names:
            found["decoder_attention_mask"] = _padded(ANSWER, [2, 3])
    if "use_cache" in names:
        found["use_cache"] = False
    return found


def unpadded(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in given.items() if not name.endswith("attention_mask")}


def outputs(answer: Any, given: dict[str, Any], path: str = "") -> dict[str, Tensor]:
    """The floats of a model's answer by their places in it, without attention weights and the rows of padding."""
    if isinstance(answer, Tensor):
        if not answer.is_floating_point():
            return {}
        for name, length in (("attention_mask", LENGTH), ("decoder_attention_mask", ANSWER)):
            if name in given and answer.shape[:2] == (2, length):
                answer = answer[given[name].bool()]
        return {path: answer}
    pairs = (
        answer.items() if isinstance(answer, dict) else enumerate(answer if isinstance(answer, (list, tuple)) else ())
    )
    found: dict[str, Tensor] = {}
    for name, part in pairs:
        if "attentions" not in str(name):
            found |= outputs(part, given, f"{path}.{name}")
    return found


def _padded(length: int, gaps: list[int]) -> Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, gaps] = 0
    return mask
