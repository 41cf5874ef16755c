"""The options of an attention call, as the one value that every layer above `Problem` passes on."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .masks import Mask


class Options(NamedTuple):
    """The keywords of `fused_attn.attention` that define the result; its docstring describes them.

    The first `TENSOR_COUNT` fields hold tensors or None (mask may be a `Mask`); the others hold numbers, strings and
    learned parameters.
    """

    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sink: Tensor | None = None
    mask: Tensor | Mask | None = None
    score: Any = "dot"
    scale: float | Tensor | None = None
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    alignment: str | None = None
    softcap: float | Tensor | None = None
    dropout_p: float = 0.0
    seed: int | Tensor | None = None
    normalizer: str = "softmax"
    return_lse: bool = False
    deterministic: bool | None = None


TENSOR_COUNT = 4
