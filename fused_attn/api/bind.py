"""Binding: the words of `attention`, checked one by one and made into a Problem.

Every error names the argument, what it was and what is allowed.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from ..scores import Bilinear, Distance, Score
from ..spec.checks import as_bool, as_float, as_int, check_choice, is_integers
from ..spec.dropout import Dropout
from ..spec.problem import (
    ALIGNMENTS,
    DTYPES,
    NORMALIZERS,
    Mask,
    Problem,
    Ragged,
    check_broadcastable,
    check_parameter,
    check_window,
    describe,
    diagonal_offset,
)
from ..spec.torch_internals import any_autocast

SCORES = "Additive(w), Bilinear(w), Cosine(t) or Distance(h)"
LARGEST = torch.finfo(torch.float32).max
NAMES = {"sdpa": ("query", "key", "value")}
HEADS = {"bshd": 2}
# torch.use_deterministic_algorithms overrides deterministic=False. Checks that only want its NaN fill clear this.
FOLLOW_TORCH = True


def check_qkv(q: Any, k: Any, v: Any, layout: str = "bhsd", score: Any = "dot") -> None:
    """Types, devices and shapes of q, k and v; layout "sdpa" has any rank and only the last dims are judged."""
    names = NAMES.get(layout, ("q", "k", "v"))
    for name, x in zip(names, (q, k, v), strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {describe(x)}")
        if x.is_nested:
            raise NotImplementedError(f"{name}: nested tensors are built for attention and the SDPA door alone")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: expected one of {', '.join(map(str, DTYPES))}, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected {names[0]}'s {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected {names[0]}'s device {q.device}, got {x.device}")
        if x.ndim != 4 if layout != "sdpa" else x.ndim < 2:
            allowed = "4 dimensions" if layout != "sdpa" else "at least 2 dimensions"
            raise ValueError(f"{name}: expected {allowed}, got shape {tuple(x.shape)}{_rank_advice(name, x, layout)}")
        if x.shape[-1] == 0 and layout != "sdpa":
            raise ValueError(f"{name}: the head dim must be at least 1, got shape {tuple(x.shape)}")
    if k.shape[-1] != q.shape[-1] and not isinstance(score, Bilinear):
        raise ValueError(f"{names[1]}: expected {names[0]}'s head dim {q.shape[-1]}, got shape {tuple(k.shape)}")
    if layout == "sdpa":
        if v.shape[-2] != k.shape[-2]:
            raise ValueError(f"{names[2]}: expected {names[1]}'s length {k.shape[-2]}, got shape {tuple(v.shape)}")
        return
    for name, x in (("k", k), ("v", v)):
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name}: expected q's batch size {q.shape[0]}, got shape {tuple(x.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected k's batch, heads and length, got {tuple(v.shape)} beside k {tuple(k.shape)}")
    at = HEADS.get(layout, 1)
    heads, kv_heads = q.shape[at], k.shape[at]
    if heads and (kv_heads == 0 or heads % kv_heads):
        advice = _layout_advice(q, k, layout)
        raise ValueError(f"k: {kv_heads} key-value heads do not divide the {heads} query heads{advice}")


def _rank_advice(name: str, x: Tensor, layout: str) -> str:
    """How to make 4 dimensions of a q, k or v of another rank."""
    if layout == "sdpa" or x.ndim < 2:
        return ""
    alone = "[None, :, None]" if layout == "bshd" else "[None, None]"
    advice = f"; pass {name}" + {2: alone, 3: "[None]"}.get(x.ndim, ".flatten(0, -4)")
    if layout == "bshd":  # scaled_dot_product_attention would take its rows for heads
        return advice
    return f"{advice}, or call scaled_dot_product_attention, which takes any leading dimensions"


def _layout_advice(q: Tensor, k: Tensor, layout: str) -> str:
    """Names the other layout where the heads would divide in it."""
    other = {"bhsd": "bshd", "bshd": "bhsd"}.get(layout)
    at = 1 if other == "bhsd" else 2
    if other is None or not k.shape[at] or q.shape[at] % k.shape[at]:
        return ""
    return f'; if dim {at} counts heads, pass layout="{other}"'


def bind(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score: Any = "dot",
    scale: float | Tensor | None = None,
    mask: Tensor | Mask | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    alignment: str | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    normalizer: str = "softmax",
    return_lse: bool = False,
    deterministic: bool | None = None,
    ragged: Ragged | None = None,
) -> Problem:
    """Heads-first tensors that `check_qkv` has passed and the words of `attention`, checked and made into a Problem.

    ragged: the batch is one of sequences, whose alignment it has already.
    """
    heads = q.shape[1]
    shape = (*q.shape[:3], k.shape[2]) if ragged is None else (ragged.batch, heads, ragged.max_q, ragged.max_k)

    if alignment is not None:
        check_choice("alignment", alignment, ALIGNMENTS, "None or one of")
    offset = 0
    if alibi_slopes is not None:
        if not isinstance(alibi_slopes, Tensor):
            raise TypeError(f"alibi_slopes: expected a tensor, got {describe(alibi_slopes)}")
        check_parameter("alibi_slopes", alibi_slopes, q, (heads,), (shape[0], heads))
        offset = diagonal_offset(alignment, shape[2], shape[3], "alibi_slopes", ragged)

    if mask is None:
        mask = Mask()
    elif isinstance(mask, Tensor):
        mask = Mask.tensor(mask)
    elif not isinstance(mask, Mask):
        raise TypeError(f"mask: expected a bool tensor or a fused_attn.Mask, got {describe(mask)}")
    if as_bool("causal", causal):
        mask = mask & Mask.causal(alignment)
    if window is not None:
        mask = mask & Mask.window(*check_window(window), alignment)
    span, pattern, allowed = mask.resolve(shape, q.device, ragged)
    said = (span.lo, span.hi, *(() if pattern is None else (pattern.q_ids, pattern.kv_ids, pattern.blocks)))
    for x in (allowed, *said):
        if x is not None and x.device != q.device:
            raise ValueError(f"mask: expected q's device {q.device}, got {x.device}")

    score = _score(score, q, k)
    if isinstance(scale, Tensor):
        check_parameter("scale", scale, q, (), (heads,))
    elif scale is not None:
        scale = as_float("scale", scale, "a float or a tensor")
        if isinstance(scale, float) and LARGEST < abs(scale) < math.inf and q.dtype != torch.float64:
            raise ValueError(f"scale: must fit float32, got {scale}")
    else:
        scale = q.shape[3] ** -0.5 if score is None else score.default_scale(q.shape[3])
    if isinstance(softcap, Tensor):
        check_parameter("softcap", softcap, q, ())
    elif softcap is not None:
        softcap = as_float("softcap", softcap, "a float or a tensor")
        if not softcap > 0:
            raise ValueError(f"softcap: must be > 0, got {softcap}")
    if softcap is not None and isinstance(score, Distance):
        raise ValueError("softcap: scores.Distance has none, got both")
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"bias: expected a tensor, got {describe(bias)}")
        bias = check_broadcastable("bias", check_parameter("bias", bias, q), shape)
    if sink is not None:
        if not isinstance(sink, Tensor):
            raise TypeError(f"sink: expected a tensor, got {describe(sink)}")
        check_parameter("sink", sink, q, (heads,))

    return_lse = as_bool("return_lse", return_lse)
    _check_normalizer(normalizer, sink is not None, return_lse)

    return Problem(
        q, k, v, scale, softcap, bias, alibi_slopes, sink, mask=allowed, span=span, pattern=pattern,
        offset=offset, dropout=_dropout(dropout_p, seed, q), return_lse=return_lse,
        deterministic=_deterministic(deterministic), normalizer=normalizer, score=score, ragged=ragged,
    )  # fmt: skip


def _score(score: Any, q: Tensor, k: Tensor) -> Score | None:
    """None for the dot product."""
    if isinstance(score, Score):
        score.check(q, k)
        return score
    if not isinstance(score, str) or score != "dot":
        raise ValueError(f'score: expected "dot" or one of fused_attn.scores, {SCORES}, got {describe(score)}')
    return None


def _check_normalizer(normalizer: Any, sink: bool, return_lse: bool) -> None:
    check_choice("normalizer", normalizer, NORMALIZERS)
    if sink and normalizer != "softmax":
        raise ValueError(f'sink: normalizer "{normalizer}" takes none, got both')
    if return_lse and normalizer == "sigmoid":
        raise ValueError('return_lse: normalizer "sigmoid" has no log-sum-exp')


def _dropout(p: float, seed: int | Tensor | None, q: Tensor) -> Dropout | None:
    p = as_float("dropout_p", p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p: must lie in [0, 1], got {p}")
    if isinstance(seed, Tensor):
        if not is_integers(seed) or seed.ndim != 0:
            raise TypeError(f"seed: expected None, an int or a 0-d integer tensor, got {describe(seed)}")
        seed = seed.to(q.device, torch.int64)
    elif seed is not None:
        seed = as_int("seed", seed, "None, an int or a 0-d integer tensor")
    if p == 0.0:
        return None
    if isinstance(seed, Tensor):
        return Dropout(p, torch.stack((seed, torch.zeros_like(seed))))
    if seed is None:
        # From the device's default generator, without a synchronisation, so that manual_seed and checkpoints hold.
        return Dropout(p, torch.randint(2**63 - 1, (2,), device=q.device))
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: must fit int64, got {seed}")
    return Dropout(p, torch.tensor((seed, 0), device=q.device))


def _deterministic(asked: bool | None) -> bool:
    wanted = asked is None or as_bool("deterministic", asked, "None or a bool")
    return wanted or (FOLLOW_TORCH and torch.are_deterministic_algorithms_enabled())


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device. Those that have none, such as meta, raise when they are asked."""
    if not any_autocast():
        return False
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Under autocast, q, k and v in its dtype, as torch's own ops take them."""
    device = next((x.device.type for x in tensors if isinstance(x, Tensor)), None)
    if device is None or not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    castable = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in castable else x for x in tensors)


def no_autocast(q: Tensor) -> contextlib.AbstractContextManager:
    """Autocast has done its work on the inputs; inside, it would change the types of the products."""
    if autocasts(q.device.type):
        return torch.autocast(q.device.type, enabled=False)
    return contextlib.nullcontext()


LAYOUTS = ("bhsd", "bshd")


def heads_first(q: Tensor, k: Tensor, v: Tensor, layout: str, score: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v checked, in autocast's dtype, as (B, H, length, dim) views."""
    check_choice("layout", layout, LAYOUTS)
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v, layout, score)
    return (q, k, v) if layout == "bhsd" else (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
