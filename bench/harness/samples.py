"""The named cases of `fused_attn.testing` at benchmark sizes: random tensors, operation counts, and checks.

By convention a forward takes 4 B H M N D floating-point operations, half of them if causal, and a backward 2.5 times as
many. For other intervals the visible scores are counted; tensor masks and biases count as dense. Every score counts as
a dot product. Packed sequences count the scores of each sequence.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fused_attn import testing
from fused_attn.scores import Additive
from fused_attn.spec.problem import Problem
from fused_attn.testing import Case, Inputs
from fused_attn.testing.cases import named

GRID = ("plain", "causal")  # timed at every length and head dim
# Timed at one length: names and features of testing.CASES.
MODIFIED = (
    "window_causal", "window_sinks", "segments_causal", "runs", "blocks", "lengths", "prefix", "gqa_8", "mask_11mn",
    "bias_1hmn", "bias_11mn", "alibi_h", "softcap", "scale_heads", "sink", "lse", "dropout", "softmax1", "sigmoid",
    "bilinear", "cosine", "distance",
)  # fmt: skip
ADDITIVE = ("additive",)  # timed at a smaller size: the eager form takes M x N x D numbers

# Calls that SDPA also computes, at common CPU sizes. Padded sequences have 20 to 100 % valid keys.
_SENTENCES = {"b": 6, "hq": 12, "m": 192, "d": 32}
_QUERY = {"b": 6, "hq": 12, "m": 1, "n": 300, "d": 64}
_PAGE = {"b": 2, "hq": 8, "m": 512, "d": 64}
_NO_BIAS = {"needs": ("q", "k", "v")}
EVERYDAY: dict[str, tuple[dict[str, Any], str]] = {
    "padding_bool_b11n": (_SENTENCES | {"masks": ("padding_b11n",)}, "float32"),
    "padding_bool_b1mn": (_SENTENCES | {"masks": ("padding_b1mn",)}, "float32"),
    "padding_float_b11n": (_SENTENCES | {"bias": "b11n", "bias_mask": "padding_b11n"} | _NO_BIAS, "float32"),
    "padding_float_b1mn": (_SENTENCES | {"bias": "b1mn", "bias_mask": "padding_b1mn"} | _NO_BIAS, "float32"),
    "lengths_60": (_SENTENCES | {"masks": ("lengths_60",)}, "float32"),
    "random_bool_11mn": (_SENTENCES | {"masks": ("random_11mn",)}, "float32"),
    "random_bool_bhmn": (_SENTENCES | {"masks": ("random_bhmn",)}, "float32"),
    "bias_given_1hmn": (_SENTENCES | {"bias": "1hmn"} | _NO_BIAS, "float32"),
    "plain_384": ({"b": 4, "hq": 8, "m": 384, "d": 64}, "float32"),
    "plain_1536": ({"hq": 8, "m": 1536, "d": 64}, "float32"),
    "causal_512": (_PAGE | {"causal": True}, "float32"),
    "gqa_512": (_PAGE | {"hkv": 2}, "float32"),
    "cross_100_400": ({"b": 2, "hq": 8, "m": 100, "n": 400, "d": 64}, "float32"),
    "one_query_300": (_QUERY, "float32"),
    "one_query_padding_300": (_QUERY | {"masks": ("padding_b11n",)}, "float32"),
    "one_query_gqa_4096": ({"b": 2, "hq": 8, "hkv": 2, "m": 1, "n": 4096, "d": 64}, "float32"),
    "plain_512_bf16": (_PAGE, "bfloat16"),
    "plain_512_fp16": (_PAGE, "float16"),
    "padding_bf16_b11n": (_SENTENCES | {"masks": ("padding_b11n",)}, "bfloat16"),
}
WINDOW = 256  # visible keys of a window
WORK = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}
SCORES = {
    "cpu": 2**23,
    "cuda": 2**28,
}  # scores checked at once: about twenty float64 matrices of them must fit in memory


def sized(case: Case | str, batch: int, heads: int, length: int, dim: int) -> Case:
    """A named case at another size, contiguous. The number of query heads per KV head is kept."""
    case = named(case)
    sizes = case.sizes()
    group = sizes["h"] // sizes["g"]
    window = None if case.window is None else (WINDOW - 1, None if case.causal else WINDOW)
    return replace(
        case, b=batch, hq=max(heads, group), hkv=max(heads, group) // group, m=length, n=length, d=dim, dv=dim, dk=dim,
        window=window, memory="dense", dout="dense", unseen_nan=False,
    )  # fmt: skip


def everyday(name: str, shrink: int = 1) -> Case:
    """A case of EVERYDAY, contiguous; shrink divides its lengths."""
    words = dict(EVERYDAY[name][0])
    for side in ("m", "n"):
        if side in words:
            words[side] = max(1, words[side] // shrink)
    return Case(name, **words, memory="dense", dout="dense")


def heavy_tail(batch: int, longest: int, fill: float, seed: int = 0) -> list[int]:
    """Log-normal lengths, clipped to `longest`, whose sum is about `fill` of batch * longest.

    The median is found by bisection. Deterministic for a seed.
    """
    draws = torch.randn(batch, generator=torch.Generator().manual_seed(seed))
    low, high = 0.0, 2.0 * longest
    for _ in range(50):
        median = (low + high) / 2
        lengths = (median * draws.exp()).round().clamp(1, longest)
        low, high = (median, high) if lengths.mean() < fill * longest else (low, median)
    return [int(x) for x in lengths]


@dataclass(frozen=True, eq=False)
class Sample:
    """One problem with random tensors on the device. scores: how many scores are checked at once."""

    inputs: Inputs
    scores: int

    @classmethod
    def draw(cls, case: Case, dtype: torch.dtype, device: str, scores: int | None = None) -> Sample:
        inputs = testing.make_inputs(case, dtype, device, seed=random.getrandbits(31))
        inputs = packed(inputs) if case.lengths else inputs
        return cls(inputs, SCORES[device] if scores is None else scores)

    @property
    def case(self) -> Case:
        return self.inputs.case

    @property
    def leaves(self) -> list[Tensor]:
        return list(self.inputs.leaves.values())

    @property
    def cotangents(self) -> list[Tensor]:
        return [x for x in (self.inputs.dout, self.inputs.dlse) if x is not None]

    @functools.cached_property
    def problem(self) -> Problem:
        return self.inputs.problem()

    @property
    def span(self) -> str:
        """The intervals of visible keys: "full", "causal", or "other"."""
        span = self.problem.span
        if self.problem.unbounded:
            return "full"
        if self.problem.needs_block_mask:
            return "other"
        return "causal" if span.lo is None and span.hi is None and (span.left, span.right) == (None, 0) else "other"

    @functools.cached_property
    def visible(self) -> float:
        """The share of scores that intervals and patterns leave visible."""
        if self.span != "other":
            return 1.0 if self.span == "full" else 0.5
        if self.case.lengths:
            raise NotImplementedError("operations of packed sequences are counted for full and causal masks only")
        p, (m, n) = self.problem, self.problem.shape[2:]
        rows, cols = (torch.arange(x, device=p.q.device) for x in (m, n))
        if p.needs_block_mask:
            return p.visible(rows, cols).float().mean().item()
        lo, hi = p.span.bounds(rows, n)
        return (hi - lo).clamp(min=0).double().mean().item() / n

    def flops(self, direction: str) -> float:
        widths = self.problem.q.shape[3] + self.problem.v.shape[3]
        return 2.0 * self.problem.shape[1] * pairs(self.case) * widths * self.visible * WORK[direction]

    def bytes(self, direction: str) -> int:
        """Minimum memory traffic: every tensor read once, every result written once."""
        p, case = self.problem, self.case
        given = [p.q, p.k, p.v, *(x for x in (p.bias, p.mask, p.parameter) if isinstance(x, Tensor))]
        read = sum(x.numel() * x.element_size() for x in given)
        out = p.q.element_size() * torch.Size(case.held("bhme")).numel()
        grads = sum(x.numel() * x.element_size() for x in self.leaves)
        forward, backward = read + out, read + 2 * out + grads
        return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[direction]

    @functools.cached_property
    def excerpt(self) -> Excerpt:
        return excerpt(self.inputs, self.problem, self.scores)

    @functools.cached_property
    def expected(self) -> testing.Expected:
        return testing.expect(self.excerpt)

    def judge(self, result: Any, grads: Sequence[Tensor]) -> dict[str, dict[str, float]]:
        """Check out or (out, lse), and gradients in the order of `leaves`, against the tolerance rule.

        If there are more scores than `scores`, one KV head of every batch is checked, or of one batch; gradients of
        parameters shared with other heads or batches are then left out. Returns the rows of the tolerance rule.
        """
        got = dict(zip(("out", "lse"), result if isinstance(result, tuple) else (result,), strict=False))
        got |= dict(zip(self.inputs.leaves, grads, strict=False))
        part = self.excerpt
        got = {name: part.take(name, x.detach()) for name, x in got.items() if part.holds(name)}
        rows = testing.compare(part, got, self.expected, self.case.name)
        return {name: asdict(row) for name, row in rows.items()}

    def error(self, out: Tensor) -> float:
        """The largest error of the checked part of an output against float64."""
        return (self.excerpt.take("out", out.detach()).double() - self.expected.oracle["out"]).abs().max().item()


@dataclass(frozen=True, eq=False)
class Excerpt(Inputs):
    """Some batches and heads of a problem, for the tolerance rule."""

    batches: slice = field(kw_only=True)
    heads: slice = field(kw_only=True)
    kv_heads: slice = field(kw_only=True)

    def take(self, name: str, x: Tensor) -> Tensor:
        """The part of a result or operand for these batches and heads."""
        if name == "parameter":
            return x[self.heads] if self._for_each_head else x
        x = x[(None,) * (4 - x.ndim)] if name == "bias" else x
        if x.ndim == 4:
            heads = self.kv_heads if name in ("k", "v") else self.heads
            return x[self.batches if x.shape[0] > 1 else slice(None), heads if x.shape[1] > 1 else slice(None)]
        if name == "lse" or x.ndim == 2:
            return x[self.batches, self.heads]
        return x[self.heads] if x.ndim == 1 else x

    @property
    def _for_each_head(self) -> bool:
        """True if the score's parameter has a query-head dimension."""
        return str(self.case.parameter).startswith("h")

    def holds(self, name: str) -> bool:
        """True if no other batch or head contributes to a gradient."""
        if name in ("q", "k", "v", "out", "lse"):
            return True
        if name == "parameter":
            sizes = (1, self.case.hq if self._for_each_head else 1)
        else:
            shape = self.tensors[name].shape
            rank = 4 if name == "bias" else 2
            sizes = (*[1] * (rank - len(shape)), *shape)[:2]
        return all(n > 1 or s == slice(None) for n, s in zip(sizes, (self.batches, self.heads), strict=True))

    def clean_problem(self, dtype: torch.dtype) -> Problem:
        p = super().clean_problem(dtype)
        if isinstance(p.parameter, Tensor):
            p = p.replace(score=p.score.replace(self.take("parameter", p.parameter)))
        names = ("q", "k", "v", "scale", "bias", "slopes", "sink", "mask")
        parts = {x: self.take(x, t) for x in names if isinstance(t := getattr(p, x), Tensor)}
        lo, hi = (x if x is None or x.shape[0] == 1 else x[self.batches] for x in (p.span.lo, p.span.hi))
        pattern = None if p.pattern is None else p.pattern.part(self.batches, self.heads)
        return p.replace(**parts, span=replace(p.span, lo=lo, hi=hi), pattern=pattern)


def packed(inputs: Inputs) -> Inputs:
    """The same values, laid out as (T, H, D) in memory."""

    def laid(x: Tensor | None) -> Any:
        return None if x is None else x.detach().transpose(1, 2).contiguous().transpose(1, 2)

    tensors = {n: laid(x).requires_grad_(x.requires_grad) if n in "qkv" else x for n, x in inputs.tensors.items()}
    return replace(inputs, tensors=tensors, dout=laid(inputs.dout))


def pairs(case: Case) -> int:
    """Number of (query, key) pairs in all batches."""
    b, m, n = case.shape("bmn")
    return sum(x * y for x, y in case.lengths) if case.lengths else b * m * n


def excerpt(inputs: Inputs, p: Problem, scores: int) -> Excerpt:
    """Batches and heads with at most `scores` scores, but at least one KV head of one batch.

    The last ones, where offsets are largest; with dropout the first ones, because its mask depends on the head index.
    """
    b, h = p.q.shape[:2]  # packed sequences are one batch
    features = p.q.shape[3] if isinstance(p.score, Additive) else 1  # additive scores expand by D
    each = pairs(inputs.case) // max(1, b) * features
    everything = slice(None)
    one, group = (slice(-1, None), slice(-p.group, None)) if p.dropout is None else (slice(0, 1), slice(0, p.group))
    batches, heads, kv_heads = one, group, one
    if b == 1 or (b * p.group * each <= scores and p.dropout is None):
        batches = everything
    if h == p.group:
        heads = kv_heads = everything
    if b * h * each <= scores:
        batches = heads = kv_heads = everything
    part = Excerpt(
        inputs.case, inputs.tensors, inputs.options, inputs.clean, None, None, ragged=inputs.ragged,
        batches=batches, heads=heads, kv_heads=kv_heads,
    )  # fmt: skip
    dout, dlse = (None if x is None else part.take(name, x) for name, x in (("out", inputs.dout), ("lse", inputs.dlse)))
    return replace(part, dout=dout, dlse=dlse)
