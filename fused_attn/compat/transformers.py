"""Transformers' attention interface: after `register()`, models take attn_implementation="fused_attn".

- A model class that computes attention itself is refused by name; see `register`.
- A mask that is handed over says everything: causality, window and padding. Without one, causality and the sliding
  window, if any, are intervals. A row that may see nothing gives zeros; by eager attention, the mean of all values.
- `model(..., output_attentions=True)` returns no weights: `attentions` is then an empty tuple. A warning says so where
  the model passes the argument on; some, such as GPT-2, do not. attn_implementation="eager" has the weights.

The other path, attn_implementation="flash_attention_2", takes the padding out of a batch instead of masking it. It has
no interface for functions, so `register_flash_attention_2()` replaces what looks for flash-attn in Transformers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..api.attention import attention
from . import bert_padding, flash_attn

if importlib.util.find_spec("transformers") is None:
    raise ImportError(f"{__name__} needs transformers: pip install 'transformers>=5'")

NAME = "fused_attn"
FLASH = "flash_attention_2"

_lock = threading.Lock()
_replaced: list[tuple[dict[str, Any], str, Any]] | None = None  # owner, name, and what was there, while ours is in


def register() -> None:
    """Make attn_implementation="fused_attn" known to Transformers, masks included. A second call changes nothing.

    A model class takes the name where its modeling file reads Transformers' AttentionInterface, or where it declares
    `_supports_attention_backend`. Any other class computes attention itself and would add a boolean mask to its scores:
    from_config and from_pretrained raise ValueError and name the class. `set_attn_implementation` on such a model is
    Transformers' own: it logs that the class cannot change, and leaves it as it was.

    Replaced in Transformers: `PreTrainedModel.get_correct_attn_implementation`, which asks the class first.

    >>> import fused_attn.compat.transformers
    >>> fused_attn.compat.transformers.register()
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    AttentionInterface.register(NAME, attention_forward)
    # An implementation without masks of its own is given none, and padding is dropped in silence.
    AttentionMaskInterface.register(NAME, attention_mask)
    with _lock:
        original = getattr(PreTrainedModel, "get_correct_attn_implementation", None)
        if original is None or not hasattr(PreTrainedModel, "_can_set_attn_implementation"):
            raise NotImplementedError(_unknown("checks attention implementations"))
        if not hasattr(original, "__wrapped__"):
            PreTrainedModel.get_correct_attn_implementation = _admitting(original)


def _admitting(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def get_correct_attn_implementation(self: Any, requested_attention: str | None, is_init_check: bool = False) -> str:
        if requested_attention == NAME:
            _admit(self, is_init_check)
        return original(self, requested_attention, is_init_check)

    return get_correct_attn_implementation


def _admit(model: Any, is_init_check: bool) -> None:
    """Raise ValueError for a class that does not call `attention_forward`; note which masks one that does needs."""
    from transformers import PreTrainedModel

    cls, config = type(model), model.config
    # A class of the user's own inherits attention from another file.
    bases: list[Any] = [
        base for base in cls.__mro__ if issubclass(base, PreTrainedModel) and base is not PreTrainedModel
    ]
    files = [vars(sys.modules[base.__module__]) for base in bases if base.__module__ in sys.modules]
    declared = cls.is_backend_compatible()
    # Some files choose an attention class by name, maybe for a part of the model that was given another name.
    tables = [table for file in files for name, table in file.items() if name.endswith("ATTENTION_CLASSES")]
    parts = [getattr(config, key) for key in config.sub_configs] if is_init_check else []
    chosen = any(NAME not in x for x in tables) and all(x is None or x._attn_implementation == NAME for x in parts)
    if chosen or not (declared or all(base._can_set_attn_implementation() for base in bases)):
        raise ValueError(
            f"{cls.__name__} does not support an attention implementation through {NAME}: it computes"
            ' attention itself and does not read AttentionInterface. Use attn_implementation="eager", for one part of'
            f" a composite model by a dict: {{'text_config': '{NAME}', 'vision_config': 'eager'}}. A class whose"
            " attention does read it declares _supports_attention_backend = True"
        )
    if not (declared or cls._supports_sdpa):
        _masks.setdefault(config.model_type, "float")


# The types of models whose masks are not sdpa's, which are None for plain causality. "float": eager's, for a model that
# adds the mask to scores of its own beside ours, or extends it by floats. "always": sdpa's, but never None, for a model
# that cuts its queries to the last few, or that hands None over for attention to everything.
_masks: dict[str | None, str] = {
    "deepseek_v4": "float",
    "gemma4_text": "always",
    "gemma4_unified_text": "always",
    "mllama_text_model": "always",
    "mllama_vision_model": "always",
}


def attention_mask(*args: Any, config: Any = None, **options: Any) -> Tensor | None:
    """The mask for a model of config, by `transformers.masking_utils`: bool (True = may attend), float, or None."""
    from transformers.masking_utils import eager_mask, sdpa_mask

    kind = _kind(config)
    if kind == "float":
        return eager_mask(*args, config=config, **options)
    # PaliGemma masks causally what its layers hold for bidirectional.
    if kind == "always" or getattr(config, "use_bidirectional_attention", False):
        options["allow_is_causal_skip"] = False
    return sdpa_mask(*args, config=config, **options)


def _kind(config: Any) -> str | None:
    return _masks.get(getattr(config, "model_type", None))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query (B, Hq, M, D), key and value (B, Hkv, N, D), not repeated -> ((B, M, Hq, Dv), None).

    attention_mask: bool (True = may attend) or float (added). Of the options, these change the result: sliding_window;
    softcap; s_aux, a sink for each head (Hq,); sinks, one for each row (B, Hq, M, 1); position_bias (added); indices
    (B, M, K) and block_indices (B, H, M, K), the keys, or blocks of keys, that the model's indexer chose (-1 is none).
    A paged cache is refused, and served by flash_attention_2.
    """
    if options.get("cache") is not None:
        raise NotImplementedError(
            'cache: continuous batching takes its pages to attn_implementation="flash_attention_2"; see'
            " register_flash_attention_2"
        )
    if options.get("output_attentions"):
        warnings.warn(
            'output_attentions: fused attention forms no weights; use attn_implementation="eager"', stacklevel=2
        )
    # Without a mask, causality and the window are the module's, but where a causal mask is never None.
    bare = attention_mask is None and _kind(getattr(module, "config", None)) is None
    if is_causal is None:
        is_causal = bare and getattr(module, "is_causal", True)
    causal = attention_mask is None and bool(is_causal)
    mask, bias = _chosen(module, query.shape[1], key.shape[2], options), options.get("position_bias")
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        mask = attention_mask if mask is None else attention_mask & mask
    elif attention_mask is not None:
        bias = attention_mask if bias is None else bias + attention_mask
    window, size = None, options.get("sliding_window")
    if bare and size is not None:
        # A window of that many keys, the row's own included; on both sides where the call is not causal.
        window = (size - 1, size - 1)
    sinks = options.get("sinks")
    out: Any = attention(
        # Learned queries come with batch 1.
        query.expand(key.shape[0], -1, -1, -1),
        key,
        value,
        scale=scaling,
        mask=mask,
        causal=causal,
        window=window,
        # A single query is the last of its sequence, and causal or not it sees all; several start where the keys do.
        alignment="bottom_right" if query.shape[2] == 1 else "top_left",
        bias=bias,
        softcap=options.get("softcap"),
        sink=options.get("s_aux"),
        dropout_p=dropout,
        return_lse=sinks is not None,
    )
    if sinks is not None:
        out, lse = out
        out = out * torch.sigmoid(lse.unsqueeze(-1) - sinks).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _chosen(module: Any, heads: int, n: int, options: dict[str, Any]) -> Tensor | None:
    """The keys that a sparse model's indexer chose, as a mask. Transformers builds it for "eager" and "sdpa" alone."""
    indices, blocks = options.get("indices"), options.get("block_indices")
    if indices is not None:
        return _marked(indices, n).unsqueeze(1)
    if blocks is not None:
        size = module.indexer.block_size
        keys = _marked(blocks, -(-n // size)).repeat_interleave(size, -1)[..., :n]
        return keys.repeat_interleave(heads // keys.shape[1], 1)
    return None


def _marked(indices: Tensor, n: int) -> Tensor:
    """indices (..., K), -1 is none -> bool (..., n), True where named."""
    found = indices.new_zeros((*indices.shape[:-1], n + 1), dtype=torch.bool)
    return found.scatter(-1, indices.long().masked_fill(indices < 0, n), True)[..., :n]


# ------------------------------------------------------------------------------------------------- flash_attention_2


def register_flash_attention_2() -> None:
    """Point attn_implementation="flash_attention_2" at `compat.flash_attn`, on every device. Again is no change.

    Replaced, until `unregister_flash_attention_2`:

    - in `transformers.modeling_flash_attention_utils`: `_lazy_imports`, for this one implementation;
      `is_flash_attn_available`; and in the entry 2 of FLASH_ATTENTION_COMPATIBILITY_MATRIX the check that the package
      is there and the list of devices, which gains the CPU;
    - in `transformers.integrations.flash_attention`: `get_target_dtype`, for layers without an nn.Linear (GPT-2).

    The modeling files of Bark, Falcon, GPT-J and GPT-Neo import the functions only where there is flash-attn; they are
    given them, and keep them. (GPT-Neo's own class for this path leaves out its local windows, as it does with
    flash-attn.) Models made before follow at their next call. It is one switch for the process. Transformers goes on to
    log that the CPU and float32 are unusual there; both are meant here.

    >>> import fused_attn.compat.transformers as door
    >>> door.register_flash_attention_2()
    >>> door.unregister_flash_attention_2()
    """
    global _replaced
    with _lock:
        if _replaced is not None:
            return
        room, integration, entry = _flash_room()
        _replaced = []
        devices = (*entry["supported_devices"], (_always, "cpu"))
        _replace(entry, general_availability_check=_always, supported_devices=devices)
        _replace(vars(room), _lazy_imports=_finding_ours(room._lazy_imports))
        _replace(vars(integration), get_target_dtype=_target_dtype(integration.get_target_dtype))
        available = room.is_flash_attn_available
        if not available(kernels_fallback_ok=True):
            _replace(vars(room), is_flash_attn_available=_always)
            for file in _files_with(available):
                file.setdefault("_flash_attention_forward", room._flash_attention_forward)
                file.setdefault("get_target_dtype", integration.get_target_dtype)
        room._loaded_implementation = None  # look again, and now: some models take whatever was found
        room.lazy_import_flash_attention(FLASH)


def unregister_flash_attention_2() -> None:
    """Undo `register_flash_attention_2`. A model that was made in between raises at its next call."""
    global _replaced
    with _lock:
        if _replaced is None:
            return
        room = _flash_room()[0]
        for owner, name, value in reversed(_replaced):
            owner[name] = value
        for file in _files_with(_always):
            file["is_flash_attn_available"] = room.is_flash_attn_available
        room._loaded_implementation = None
        _replaced = None


def _replace(owner: dict[str, Any], **values: Any) -> None:
    assert _replaced is not None
    for name, value in values.items():
        _replaced.append((owner, name, owner[name]))
        owner[name] = value


def _files_with(available: Callable[..., bool]) -> list[dict[str, Any]]:
    """The names in each modeling file, of those imported so far, that asks `available` whether there is flash-attn."""
    files = [vars(module) for name, module in [*sys.modules.items()] if name.startswith("transformers.models.")]
    return [file for file in files if file.get("is_flash_attn_available") is available]


@contextlib.contextmanager
def flash_attention_2() -> Iterator[None]:
    """`register_flash_attention_2` for a block, unless it is in force already.

    >>> import fused_attn.compat.transformers as door
    >>> with door.flash_attention_2():
    ...     pass
    """
    outer = _replaced is not None
    register_flash_attention_2()
    try:
        yield
    finally:
        if not outer:
            unregister_flash_attention_2()


def _unknown(verb: str) -> str:
    import transformers

    return f"Transformers {transformers.__version__} {verb} in a way that is not known here"


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


def _flash_room() -> tuple[Any, Any, dict[str, Any]]:
    """Where Transformers looks for flash-attn, where it calls it, and what it knows of version 2."""
    from transformers import modeling_flash_attention_utils as room
    from transformers.integrations import flash_attention as integration

    entry = getattr(room, "FLASH_ATTENTION_COMPATIBILITY_MATRIX", {}).get(2, {})
    names = {"_lazy_imports", "lazy_import_flash_attention", "is_flash_attn_available", "_flash_attention_forward"}
    if (
        not names <= vars(room).keys()
        or not {"general_availability_check", "supported_devices"} <= entry.keys()
        or not hasattr(integration, "get_target_dtype")
    ):
        raise NotImplementedError(_unknown("looks for flash-attn") + f'; attn_implementation="{NAME}" needs none of it')
    return room, integration, entry


def _target_dtype(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_target_dtype(query: Tensor, module: nn.Module) -> Any:
        try:
            return original(query, module)
        except StopIteration:  # no nn.Linear among its layers
            return next((x.dtype for x in module.parameters() if x.ndim > 1), None)

    return get_target_dtype


def _finding_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    def lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation != FLASH:
            return original(implementation, *args, **kwargs)
        return (
            flash_attn.flash_attn_func,
            flash_attn.flash_attn_varlen_func,
            flash_attn.flash_attn_with_kvcache,
            bert_padding.pad_input,
            bert_padding.unpad_input,
        )

    return lazy_imports
