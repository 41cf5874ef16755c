"""Binding: the arguments of `attention` are checked and converted to a Problem.

Every error names the argument, its value and what is allowed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..runtime.autocast import autocast
from ..scores import Bilinear, Distance, Score
from ..spec.checks import as_bool, as_float, as_int, check_choice, check_dense, is_integers
from ..spec.conditions import Condition, Window
from ..spec.dropout import Dropout
from ..spec.masks import resolve
from ..spec.options import Options
from ..spec.patterns import Pattern
from ..spec.problem import (
    ALIGNMENTS,
    DTYPES,
    NORMALIZERS,
    Mask,
    Problem,
    Ragged,
    Span,
    check_broadcastable,
    check_parameter,
    check_window,
    describe,
    diagonal_offset,
)

SCORES = "Additive(w), Bilinear(w), Cosine(t) or Distance(h)"
LARGEST = torch.finfo(torch.float32).max
NAMES = {"sdpa": ("query", "key", "value")}
HEADS = {"bshd": 2}
# torch.use_deterministic_algorithms overrides deterministic=False. bench/evidence clears this, to have torch fill new
# memory with NaN and nothing else.
FOLLOW_TORCH = True
CAUSAL = {x: Window(None, 0, x) for x in (None, *ALIGNMENTS)}
UNMASKED: tuple[Span, Pattern | None, Tensor | None] = (Span(), None, None)


def check_qkv(q: Any, k: Any, v: Any, layout: str = "bhsd", score: Any = "dot") -> None:
    """Check types, devices and shapes of q, k and v; layout "sdpa" allows any rank and checks only the last dims."""
    names = NAMES.get(layout, ("q", "k", "v"))
    for name, x in zip(names, (q, k, v), strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {describe(x)}")
        if x.is_nested:
            if x.layout != torch.jagged:
                raise TypeError(f"{name}: expected a nested tensor of layout torch.jagged, got {x.layout}")
            raise NotImplementedError(f"{name}: only attention and scaled_dot_product_attention take jagged tensors")
        check_dense(name, x)
        dtype, shape = x.dtype, x.shape
        if dtype not in DTYPES:
            raise TypeError(f"{name}: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
        if dtype != q.dtype:
            raise TypeError(f"{name}: expected {names[0]}'s {q.dtype}, got {dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected {names[0]}'s device {q.device}, got {x.device}")
        if len(shape) != 4 if layout != "sdpa" else len(shape) < 2:
            allowed = "4 dimensions" if layout != "sdpa" else "at least 2 dimensions"
            raise ValueError(f"{name}: expected {allowed}, got shape {tuple(shape)}{_rank_advice(name, x, layout)}")
        if shape[-1] == 0 and layout != "sdpa":
            raise ValueError(f"{name}: the head dim must be at least 1, got shape {tuple(shape)}")
    of_q, of_k, of_v = q.shape, k.shape, v.shape
    if of_k[-1] != of_q[-1] and not isinstance(score, Bilinear):
        raise ValueError(f"{names[1]}: expected {names[0]}'s head dim {of_q[-1]}, got shape {tuple(of_k)}")
    if layout == "sdpa":
        if of_v[-2] != of_k[-2]:
            raise ValueError(f"{names[2]}: expected {names[1]}'s length {of_k[-2]}, got shape {tuple(of_v)}")
        return
    for name, shape in (("k", of_k), ("v", of_v)):
        if shape[0] != of_q[0]:
            raise ValueError(f"{name}: expected q's batch size {of_q[0]}, got shape {tuple(shape)}")
    if of_v[:3] != of_k[:3]:
        raise ValueError(f"v: expected k's batch, heads and length, got {tuple(of_v)} beside k {tuple(of_k)}")
    at = HEADS.get(layout, 1)
    heads, kv_heads = of_q[at], of_k[at]
    if heads and (kv_heads == 0 or heads % kv_heads):
        advice = _layout_advice(q, k, layout)
        raise ValueError(f"k: {kv_heads} key-value heads do not divide the {heads} query heads{advice}")


def _rank_advice(name: str, x: Tensor, layout: str) -> str:
    """A hint for the error message: how to make q, k or v 4-dimensional."""
    if layout == "sdpa" or x.ndim < 2:
        return ""
    alone = "[None, :, None]" if layout == "bshd" else "[None, None]"
    advice = f"; pass {name}" + {2: alone, 3: "[None]"}.get(x.ndim, ".flatten(0, -4)")
    if layout == "bshd":  # scaled_dot_product_attention would treat its rows as heads
        return advice
    return f"{advice}, or call scaled_dot_product_attention, which takes any leading dimensions"


def _layout_advice(q: Tensor, k: Tensor, layout: str) -> str:
    """A hint for the error message: the other layout, if the heads divide in it."""
    other = {"bhsd": "bshd", "bshd": "bhsd"}.get(layout)
    at = 1 if other == "bhsd" else 2
    if other is None or not k.shape[at] or q.shape[at] % k.shape[at]:
        return ""
    return f'; if dim {at} counts heads, pass layout="{other}"'


def bind(q: Tensor, k: Tensor, v: Tensor, options: Options, ragged: Ragged | None = None) -> Problem:
    """A Problem from heads-first tensors, checked by `check_qkv`, and from options, which are checked here.

    ragged: the sequences of a packed batch, with their alignment.
    """
    (
        bias, slopes, sink, mask, score, scale, causal, window, alignment, softcap, dropout_p, seed, normalizer,
        return_lse, deterministic,
    ) = options  # fmt: skip
    heads = q.shape[1]
    shape = (*q.shape[:3], k.shape[2]) if ragged is None else (ragged.batch, heads, ragged.max_q, ragged.max_k)

    if alignment is not None:
        check_choice("alignment", alignment, ALIGNMENTS, "None or one of")
    offset = 0
    if slopes is not None:
        _check_parameter("alibi_slopes", slopes, q, (heads,), (shape[0], heads))
        offset = diagonal_offset(alignment, shape[2], shape[3], "alibi_slopes", ragged)
    conditions = _conditions(mask, as_bool("causal", causal), window, alignment)
    if alignment is None and (causal or window is not None):
        diagonal_offset(None, shape[2], shape[3], "causal or window", ragged)
    span, pattern, allowed = resolve(conditions, shape, q.device, ragged) if conditions else UNMASKED
    if mask is not None:
        _check_device(span, pattern, allowed, q.device)
    score = _score(score, q, k)
    if bias is not None:
        _check_parameter("bias", bias, q)
        bias = check_broadcastable("bias", bias, shape)
    if sink is not None:
        _check_parameter("sink", sink, q, (heads,))
    return_lse = as_bool("return_lse", return_lse)
    _check_normalizer(normalizer, sink is not None, return_lse)
    return Problem(
        q, k, v, _scale(scale, score, q), _softcap(softcap, score, q), bias, slopes, sink,
        mask=allowed, span=span, pattern=pattern, offset=offset,
        dropout=_dropout(dropout_p, seed, q), return_lse=return_lse, deterministic=_deterministic(deterministic),
        normalizer=normalizer, score=score, ragged=ragged,
    )  # fmt: skip


def _check_parameter(name: str, x: Any, q: Tensor, *shapes: tuple[int, ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(x)}")
    check_parameter(name, x, q, *shapes)


def _conditions(mask: Any, causal: bool, window: Any, alignment: str | None) -> tuple[Condition, ...]:
    """The conditions of the mask, causal and window."""
    conditions: tuple[Condition, ...] = ()
    if isinstance(mask, Tensor):
        mask = Mask.tensor(mask)
    if isinstance(mask, Mask):
        conditions = mask.parts
    elif mask is not None:
        raise TypeError(f"mask: expected a bool tensor or a fused_attn.Mask, got {describe(mask)}")
    if causal:
        conditions = (*conditions, CAUSAL[alignment])
    if window is not None:
        conditions = (*conditions, Window(*check_window(window), alignment))
    return conditions


def _check_device(span: Span, pattern: Pattern | None, allowed: Tensor | None, device: torch.device) -> None:
    """Check that a mask's tensors are on q's device."""
    ids_and_blocks = () if pattern is None else (pattern.q_ids, pattern.kv_ids, pattern.blocks)
    for x in (allowed, span.lo, span.hi, *ids_and_blocks):
        if x is not None and x.device != device:
            raise ValueError(f"mask: expected q's device {device}, got {x.device}")


def _scale(scale: Any, score: Score | None, q: Tensor) -> float | Tensor:
    if scale is None:
        return q.shape[3] ** -0.5 if score is None else score.default_scale(q.shape[3])
    if isinstance(scale, Tensor):
        check_parameter("scale", scale, q, (), (q.shape[1],))
        return scale
    scale = as_float("scale", scale, "a float or a tensor")
    if isinstance(scale, float) and LARGEST < abs(scale) < math.inf and q.dtype != torch.float64:
        raise ValueError(f"scale: must fit float32, got {scale}")
    return scale


def _softcap(softcap: Any, score: Score | None, q: Tensor) -> float | Tensor | None:
    if softcap is None:
        return None
    if isinstance(softcap, Tensor):
        check_parameter("softcap", softcap, q, ())
    else:
        softcap = as_float("softcap", softcap, "a float or a tensor")
        if not softcap > 0:
            raise ValueError(f"softcap: must be None (off) or > 0, got {softcap}")
    if isinstance(score, Distance):
        raise ValueError("softcap: scores.Distance has none, got both")
    return softcap


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
    if type(p) is float and p == 0.0 and seed is None:
        return None
    p = as_float("dropout_p", p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p: must lie in [0, 1], got {p}")
    if isinstance(seed, Tensor):
        if not is_integers(seed) or seed.ndim != 0:
            raise TypeError(f"seed: expected None, an int or a 0-d integer tensor, got {describe(seed)}")
        check_dense("seed", seed)
        seed = seed.to(q.device, torch.int64)
    elif seed is not None:
        seed = as_int("seed", seed, "None, an int or a 0-d integer tensor")
    if p == 0.0:
        return None
    if isinstance(seed, Tensor):
        return Dropout(p, torch.stack((seed, torch.zeros_like(seed))))
    if seed is None:
        # From the device's default generator, without synchronization: manual_seed and checkpoints apply.
        return Dropout(p, torch.randint(2**63 - 1, (2,), device=q.device))
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: must fit int64, got {seed}")
    return Dropout(p, torch.tensor((seed, 0), device=q.device))


def _deterministic(asked: bool | None) -> bool:
    wanted = asked is None or as_bool("deterministic", asked, "None or a bool")
    return wanted or (FOLLOW_TORCH and torch.are_deterministic_algorithms_enabled())


LAYOUTS = ("bhsd", "bshd")


def heads_first(q: Tensor, k: Tensor, v: Tensor, layout: str, score: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, checked and in autocast's dtype, as (B, H, length, dim) views."""
    check_choice("layout", layout, LAYOUTS)
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v, layout, score)
    return (q, k, v) if layout == "bhsd" else (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
