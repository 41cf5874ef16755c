"""Backend for Transformers: after `register()`, models accept attn_implementation="fused_attn".

- A model class that computes attention itself raises ValueError; see `register`.
- A mask passed by the model includes causality, window and padding. Without one, the module's causality and sliding
  window are used. A fully masked row gives zeros; eager attention gives the mean of all values.
- `model(..., output_attentions=True)` returns no weights: `attentions` is an empty tuple. A warning is given if the
  model passes the argument on; some, such as GPT-2, do not. attn_implementation="eager" returns weights.

The other path, attn_implementation="flash_attention_2", packs a padded batch instead of masking it. Transformers has no
interface to register functions for it, so `register_flash_attention_2()` replaces its lookup of flash-attn.
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
_replaced: list[tuple[dict[str, Any], str, Any]] | None = None  # (owner, name, original value), while registered


def register() -> None:
    """Register attn_implementation="fused_attn" with its masks in Transformers. A second call has no effect.

    A model class accepts it if its modeling file reads Transformers' AttentionInterface, or if it declares
    `_supports_attention_backend`. Any other class computes attention itself and would add a boolean mask to its scores:
    from_config and from_pretrained then raise ValueError, naming the class. `set_attn_implementation` on such a model
    is Transformers' own: it logs that the class cannot change, and changes nothing.

    Replaces `PreTrainedModel.get_correct_attn_implementation` by one that checks the class first.

    >>> import fused_attn.compat.transformers
    >>> fused_attn.compat.transformers.register()
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    AttentionInterface.register(NAME, attention_forward)
    # Without a mask function, Transformers passes no mask, and padding would silently be attended to.
    AttentionMaskInterface.register(NAME, attention_mask)
    with _lock:
        original = getattr(PreTrainedModel, "get_correct_attn_implementation", None)
        if original is None or not hasattr(PreTrainedModel, "_can_set_attn_implementation"):
            raise NotImplementedError(_unknown("checks attention implementations"))
        if not hasattr(original, "__wrapped__"):
            PreTrainedModel.get_correct_attn_implementation = _with_class_check(original)


def _with_class_check(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def get_correct_attn_implementation(self: Any, requested_attention: str | None, is_init_check: bool = False) -> str:
        if requested_attention == NAME:
            _check_class(self, is_init_check)
        return original(self, requested_attention, is_init_check)

    return get_correct_attn_implementation


def _check_class(model: Any, is_init_check: bool) -> None:
    """Raise ValueError for a class that does not call `attention_forward`; otherwise record the kind of its masks."""
    from transformers import PreTrainedModel

    cls, config = type(model), model.config
    # A user's class may inherit its attention from another file.
    bases: list[Any] = [
        base for base in cls.__mro__ if issubclass(base, PreTrainedModel) and base is not PreTrainedModel
    ]
    files = [vars(sys.modules[base.__module__]) for base in bases if base.__module__ in sys.modules]
    declared = cls.is_backend_compatible()
    # Some files choose an attention class by name, for parts of a model that may have another implementation.
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


# Model types whose masks differ from sdpa's, which are None for plain causality. "float": those of eager, for models
# that also add the mask to scores of their own, or append floats to it. "always": those of sdpa, but never None, for
# models that keep only the last queries, or that pass None for bidirectional attention.
_masks: dict[str | None, str] = {
    "deepseek_v4": "float",
    "gemma4_text": "always",
    "gemma4_unified_text": "always",
    "mllama_text_model": "always",
    "mllama_vision_model": "always",
}


def attention_mask(*args: Any, config: Any = None, **options: Any) -> Tensor | None:
    """A model's mask, from `transformers.masking_utils`: bool (True = may attend), float, or None."""
    from transformers.masking_utils import eager_mask, sdpa_mask

    kind = _kind(config)
    if kind == "float":
        return eager_mask(*args, config=config, **options)
    # PaliGemma's masks are causal where its layers declare bidirectional attention.
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

    attention_mask: bool (True = may attend) or float (added).
    options: these change the result; others are ignored.
        sliding_window; softcap; position_bias (added).
        s_aux: a sink for each head (Hq,). sinks: one for each row (B, Hq, M, 1).
        indices (B, M, K), block_indices (B, H, M, K): the keys, or blocks of keys, selected by the model's indexer;
            -1: none.
    A paged cache raises NotImplementedError; attn_implementation="flash_attention_2" supports it.
    """
    if options.get("cache") is not None:
        raise NotImplementedError(
            'cache: a paged cache needs attn_implementation="flash_attention_2"; see register_flash_attention_2'
        )
    if options.get("output_attentions"):
        warnings.warn(
            'output_attentions: fused attention returns no weights; use attn_implementation="eager"', stacklevel=2
        )
    # Without a mask, causality and window are the module's, except for models whose causal mask is never None.
    bare = attention_mask is None and _kind(getattr(module, "config", None)) is None
    if is_causal is None:
        is_causal = bare and getattr(module, "is_causal", True)
    causal = attention_mask is None and bool(is_causal)
    mask, bias = _selected_keys(module, query.shape[1], key.shape[2], options), options.get("position_bias")
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        mask = attention_mask if mask is None else attention_mask & mask
    elif attention_mask is not None:
        bias = attention_mask if bias is None else bias + attention_mask
    window, size = None, options.get("sliding_window")
    if bare and size is not None:
        # The window counts the row's own key; it is two-sided if the call is not causal.
        window = (size - 1, size - 1)
    sinks = options.get("sinks")
    out: Any = attention(
        # Learned queries have batch size 1.
        query.expand(key.shape[0], -1, -1, -1),
        key,
        value,
        scale=scaling,
        mask=mask,
        causal=causal,
        window=window,
        # A single query is the last of its sequence; several queries start at the first key.
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


def _selected_keys(module: Any, heads: int, n: int, options: dict[str, Any]) -> Tensor | None:
    """The mask of the keys selected by a sparse model's indexer. Transformers builds it only for "eager" and "sdpa"."""
    indices, blocks = options.get("indices"), options.get("block_indices")
    if indices is not None:
        return _marked(indices, n).unsqueeze(1)
    if blocks is not None:
        size = module.indexer.block_size
        keys = _marked(blocks, -(-n // size)).repeat_interleave(size, -1)[..., :n]
        return keys.repeat_interleave(heads // keys.shape[1], 1)
    return None


def _marked(indices: Tensor, n: int) -> Tensor:
    """indices (..., K), -1: none -> bool (..., n), True at the indices."""
    marks = indices.new_zeros((*indices.shape[:-1], n + 1), dtype=torch.bool)
    return marks.scatter(-1, indices.long().masked_fill(indices < 0, n), True)[..., :n]


# ------------------------------------------------------------------------------------------------- flash_attention_2


def register_flash_attention_2() -> None:
    """Use `compat.flash_attn` for attn_implementation="flash_attention_2", on every device. Repeating has no effect.

    Replaced until `unregister_flash_attention_2`:

    - in `transformers.modeling_flash_attention_utils`: `_lazy_imports`, for this implementation only;
      `is_flash_attn_available`; and, in entry 2 of FLASH_ATTENTION_COMPATIBILITY_MATRIX, the check for the package and
      the list of devices, which gains the CPU;
    - in `transformers.integrations.flash_attention`: `get_target_dtype`, for layers without an nn.Linear (GPT-2).

    The modeling files of Bark, Falcon, GPT-J and GPT-Neo import the functions only if flash-attn is installed; the
    functions are added to them and stay. (As with flash-attn, GPT-Neo's class for this path ignores its local windows.)
    Existing models use the functions from their next call on. The switch is global. Transformers still logs that the
    CPU and float32 are unusual; both work here.

    >>> import fused_attn.compat.transformers as wrapper
    >>> wrapper.register_flash_attention_2()
    >>> wrapper.unregister_flash_attention_2()
    """
    global _replaced
    with _lock:
        if _replaced is not None:
            return
        flash_utils, integration, entry = _flash_modules()
        _replaced = []
        devices = (*entry["supported_devices"], (_always, "cpu"))
        _replace(entry, general_availability_check=_always, supported_devices=devices)
        _replace(vars(flash_utils), _lazy_imports=_with_our_functions(flash_utils._lazy_imports))
        _replace(vars(integration), get_target_dtype=_target_dtype(integration.get_target_dtype))
        available = flash_utils.is_flash_attn_available
        if not available(kernels_fallback_ok=True):
            _replace(vars(flash_utils), is_flash_attn_available=_always)
            for file in _files_with(available):
                file.setdefault("_flash_attention_forward", flash_utils._flash_attention_forward)
                file.setdefault("get_target_dtype", integration.get_target_dtype)
        flash_utils._loaded_implementation = None  # load again now: some models use whatever is loaded
        flash_utils.lazy_import_flash_attention(FLASH)


def unregister_flash_attention_2() -> None:
    """Undo `register_flash_attention_2`. A model made in between raises at its next call."""
    global _replaced
    with _lock:
        if _replaced is None:
            return
        flash_utils = _flash_modules()[0]
        for owner, name, value in reversed(_replaced):
            owner[name] = value
        for file in _files_with(_always):
            file["is_flash_attn_available"] = flash_utils.is_flash_attn_available
        flash_utils._loaded_implementation = None
        _replaced = None


def _replace(owner: dict[str, Any], **values: Any) -> None:
    assert _replaced is not None
    for name, value in values.items():
        _replaced.append((owner, name, owner[name]))
        owner[name] = value


def _files_with(available: Callable[..., bool]) -> list[dict[str, Any]]:
    """The namespaces of the imported modeling files that use `available` to check for flash-attn."""
    files = [vars(module) for name, module in [*sys.modules.items()] if name.startswith("transformers.models.")]
    return [file for file in files if file.get("is_flash_attn_available") is available]


@contextlib.contextmanager
def flash_attention_2() -> Iterator[None]:
    """`register_flash_attention_2` for a block, unless it is registered already.

    >>> import fused_attn.compat.transformers as wrapper
    >>> with wrapper.flash_attention_2():
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

    return f"Transformers {transformers.__version__} {verb} in a way that fused_attn does not support"


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


def _flash_modules() -> tuple[Any, Any, dict[str, Any]]:
    """Transformers' modules that look up and call flash-attn, and its compatibility entry for version 2."""
    from transformers import modeling_flash_attention_utils as flash_utils
    from transformers.integrations import flash_attention as integration

    entry = getattr(flash_utils, "FLASH_ATTENTION_COMPATIBILITY_MATRIX", {}).get(2, {})
    names = {"_lazy_imports", "lazy_import_flash_attention", "is_flash_attn_available", "_flash_attention_forward"}
    if (
        not names <= vars(flash_utils).keys()
        or not {"general_availability_check", "supported_devices"} <= entry.keys()
        or not hasattr(integration, "get_target_dtype")
    ):
        raise NotImplementedError(
            _unknown("looks for flash-attn") + f'; attn_implementation="{NAME}" does not depend on it'
        )
    return flash_utils, integration, entry


def _target_dtype(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_target_dtype(query: Tensor, module: nn.Module) -> Any:
        try:
            return original(query, module)
        except StopIteration:  # the module has no nn.Linear
            return next((x.dtype for x in module.parameters() if x.ndim > 1), None)

    return get_target_dtype


def _with_our_functions(original: Callable[..., Any]) -> Callable[..., Any]:
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
