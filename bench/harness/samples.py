"""Problems at benchmark sizes: the named cases of `fused_attn.testing`, drawn anew, counted and judged.

By the field's convention the forward of B, H, M, N, D takes 4 B H M N D floating-point operations, half of them when
causal, and the backward 2.5 times as many. Of other intervals the scores are counted one by one; a tensor mask or a
bias saves none. Every score is counted as the dot product that it stands for. Packed sequences have the scores of each
by itself.
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
from fused_attn.testing import CASES, Case, Inputs

GRID = ("plain", "causal")  # timed at every length and head dim
# Timed at one length. Their names are those of testing.CASES, and so is what they have.
MODIFIED = (
    "window_causal", "window_sinks", "segments_causal", "runs", "blocks", "lengths", "prefix", "gqa_8", "mask_11mn",
    "bias_1hmn", "bias_11mn", "alibi_h", "softcap", "scale_heads", "sink", "lse", "dropout", "softmax1", "sigmoid",
    "bilinear", "cosine", "distance",
)  # fmt: skip
ADDITIVE = ("additive",)  # timed at one size of their own: written down as they are, they take M x N x D numbers

# What torch's own function computes too, at the sizes of everyday calls on a CPU. Of a padded sequence a fifth to all
# is there.
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
WINDOW = 256  # keys that a row of a window sees
WORK = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}
SCORES = {"cpu": 2**23, "cuda": 2**28}  # as many are judged at once: some twenty float64 matrices of them must fit


def sized(case: Case | str, batch: int, heads: int, length: int, dim: int) -> Case:
    """A named case at another size, in memory as torch lays it out. Its group of query heads stays what it was."""
    case = CASES[case] if isinstance(case, str) else case
    sizes = case.sizes()
    group = sizes["h"] // sizes["g"]
    window = None if case.window is None else (WINDOW - 1, None if case.causal else WINDOW)
    return replace(
        case, b=batch, hq=max(heads, group), hkv=max(heads, group) // group, m=length, n=length, d=dim, dv=dim, dk=dim,
        window=window, memory="dense", dout="dense", unseen_nan=False,
    )  # fmt: skip


def everyday(name: str, shrink: int = 1) -> Case:
    """One of EVERYDAY, as torch lays it out in memory; shrink divides its lengths, for a rehearsal."""
    words = dict(EVERYDAY[name][0])
    for side in ("m", "n"):
        if side in words:
            words[side] = max(1, words[side] // shrink)
    return Case(name, **words, memory="dense", dout="dense")


def heavy_tail(batch: int, longest: int, fill: float, seed: int = 0) -> list[int]:
    """Lengths of a log-normal distribution, cut at `longest`, whose sum is about `fill` of batch * longest.

    The same for every seed. Its median is moved until the sum is right.
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
    """One problem on the device, with fresh random tensors, and how many of its scores are judged at once."""

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
        """Which intervals of keys the rows see: "full", "causal", or "other"."""
        span = self.problem.span
        if self.problem.unbounded:
            return "full"
        if self.problem.tabled:
            return "other"
        return "causal" if span.lo is None and span.hi is None and (span.left, span.right) == (None, 0) else "other"

    @functools.cached_property
    def visible(self) -> float:
        """The share of all scores that intervals and patterns leave."""
        if self.span != "other":
            return 1.0 if self.span == "full" else 0.5
        if self.case.lengths:
            raise NotImplementedError("operations of packed sequences are counted in full, or causal")
        p, (m, n) = self.problem, self.problem.shape[2:]
        rows, cols = (torch.arange(x, device=p.q.device) for x in (m, n))
        if p.tabled:
            return p.visible(rows, cols).float().mean().item()
        lo, hi = p.span.bounds(rows, n)
        return (hi - lo).clamp(min=0).double().mean().item() / n

    def flops(self, direction: str) -> float:
        widths = self.problem.q.shape[3] + self.problem.v.shape[3]
        return 2.0 * self.problem.shape[1] * pairs(self.case) * widths * self.visible * WORK[direction]

    def bytes(self, direction: str) -> int:
        """What must be moved at the least: every tensor read once, every result written once."""
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
        """Hold out or (out, lse), and gradients in the order of `leaves`, to the tolerance rule: what each used of it.

        More scores than `scores` are judged by one key-value head of every batch, then of one batch; the gradient of
        a parameter that other heads or batches add to is then left out.
        """
        got = dict(zip(("out", "lse"), result if isinstance(result, tuple) else (result,), strict=False))
        got |= dict(zip(self.inputs.leaves, grads, strict=False))
        part = self.excerpt
        got = {name: part.take(name, x.detach()) for name, x in got.items() if part.holds(name)}
        rows = testing.compare(part, got, self.expected, self.case.name)
        return {name: asdict(row) for name, row in rows.items()}

    def error(self, out: Tensor) -> float:
        """How far what would be judged of an output is from float64's, at most."""
        return (self.excerpt.take("out", out.detach()).double() - self.expected.oracle["out"]).abs().max().item()


@dataclass(frozen=True, eq=False)
class Excerpt(Inputs):
    """Some batches and heads of a problem, as the tolerance rule reads it."""

    batches: slice = field(kw_only=True)
    heads: slice = field(kw_only=True)
    kv_heads: slice = field(kw_only=True)

    def take(self, name: str, x: Tensor) -> Tensor:
        """What belongs here of a result or an operand."""
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
        """Whether the score's parameter has a part for each query head."""
        return str(self.case.parameter).startswith("h")

    def holds(self, name: str) -> bool:
        """Whether all that adds to a gradient is here."""
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
    """The same numbers, a token's heads beside each other, as (T, H, D) lies in memory."""

    def laid(x: Tensor | None) -> Any:
        return None if x is None else x.detach().transpose(1, 2).contiguous().transpose(1, 2)

    tensors = {n: laid(x).requires_grad_(x.requires_grad) if n in "qkv" else x for n, x in inputs.tensors.items()}
    return replace(inputs, tensors=tensors, dout=laid(inputs.dout))


def pairs(case: Case) -> int:
    """Of rows and keys, in all batches."""
    b, m, n = case.shape("bmn")
    return sum(x * y for x, y in case.lengths) if case.lengths else b * m * n


def excerpt(inputs: Inputs, p: Problem, scores: int) -> Excerpt:
    """As many batches and heads as have so many scores, one key-value head of one batch at the least.

    The last ones, where offsets are largest; with dropout the first ones, because its mask counts heads from there.
    """
    b, h = p.q.shape[:2]  # packed sequences are one batch
    features = p.q.shape[3] if isinstance(p.score, Additive) else 1  # defined, additive scores have a number for each
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
