"""What the named cases are made of: values, masks, score parameters, and memory that punishes carelessness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..scores import Additive, Bilinear, Cosine, Distance, Score
from ..spec.problem import Mask

Case = Any  # one of `cases`, which are made of what stands here

# ---------------------------------------------------------------------------------------------------------- values

Draw = Callable[..., Tensor]  # (*shape) -> float64 Gaussian, from a generator on the CPU


def _leaning(size: float) -> Callable:
    """q leans to +size and k to -size in their first channel, so that every logit is far below zero."""

    def fill(q: Tensor, k: Tensor, v: Tensor) -> None:
        q[..., 0] = size
        k[..., 0] = -size

    return fill


def _put(name: str, value: float) -> Callable:
    """One bad number, in the middle of one tensor."""

    def fill(**x: Tensor) -> None:
        t = x[name]
        t[0, -1, t.shape[2] // 2, t.shape[3] // 2] = value

    return fill


def _small_integers(**x: Tensor) -> None:
    for t in x.values():
        t.copy_(torch.where(t.abs() > 1.0, t.mul(1.5).round(), 0.0))


def _one_hot(**x: Tensor) -> None:
    for t in x.values():
        t.copy_(4.0 * (t == t.amax(-1, keepdim=True)))


def _ramps(**x: Tensor) -> None:
    for t in x.values():
        rows = torch.linspace(-1, 1, t.shape[2], dtype=t.dtype)[:, None]
        t.copy_((rows + torch.linspace(-1, 1, t.shape[3], dtype=t.dtype)).expand_as(t))


def _zero_rows(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Every fifth query and key is zero, and the next one is tiny."""
    for t in (q, k):
        t[:, :, ::5] = 0.0
        t[:, :, 1::5] *= 1e-9


def _huge_rows(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Vectors whose squares overflow float32."""
    for t in (q, k):
        t[:, :, ::3] *= 1e25


def _cancelling(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Large features of opposite sign: each saturates alone, and together they do not."""
    q[:, :, ::2] += 15.0
    k[:, :, ::3] -= 15.0


def _edge(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Features at the last size at which exponentials of two of them may share a reciprocal."""
    for t in (q, k):
        t.copy_(torch.where(t.abs() > 0.7, 11.0 * t.sign(), t))


def _constant(value: float) -> Callable:
    return lambda **x: [t.fill_(value) for t in x.values()]


VALUES: dict[str, Callable] = {
    "gaussian": lambda **x: None,
    "small_integers": _small_integers,
    "one_hot": _one_hot,
    "zero_rows": _zero_rows,
    "huge_rows": _huge_rows,
    "cancelling": _cancelling,
    "edge": _edge,
    "constant": _constant(0.75),
    "ramps": _ramps,
    "huge_equal": _constant(133120.0),
    "negative": _leaning(32.0),
    "very_negative": _leaning(640.0),
    "nan_q": _put("q", torch.nan),
    "nan_k": _put("k", torch.nan),
    "nan_v": _put("v", torch.nan),
    "inf_q": _put("q", torch.inf),
}


# ----------------------------------------------------------------------------------------------------------- masks


def _lengths(c: Case, total: int) -> Tensor:
    """Uneven lengths; every third batch, if there is one, is empty."""
    return torch.tensor([(total * 5 // 6, total // 2, 0)[b % 3] for b in range(c.b)], dtype=torch.int32)


def _ids(c: Case, total: int, *cuts: float) -> Tensor:
    """(B, total) segment ids that step up at each cut, a little later in each batch."""
    place = torch.arange(total) - torch.arange(c.b)[:, None] * 3
    return torch.stack([place >= int(cut * total) for cut in cuts]).int().sum(0, dtype=torch.int32)


def _padding(letters: str) -> Callable:
    """The first keys of each sequence: all of them in the first one, a fifth in the last."""

    def make(c: Case, draw: Draw, dev: Any) -> Tensor:
        at = torch.arange(c.sizes()["n"]) < _fills(c)[:, None]
        return at[:, None, None].expand(c.shape(letters)).contiguous().to(dev)

    return make


def _fills(c: Case) -> Tensor:
    return (c.sizes()["n"] * torch.linspace(1.0, 0.2, c.b)).int()


def _random(letters: str) -> Callable:
    return lambda c, draw, dev: (draw(*c.shape(letters)) > -0.4).to(dev)


def _some_rows(c: Case, draw: Draw, dev: Any) -> Tensor:
    """Row 0, every fifth row, and all of the rows from 64 to 96 see nothing."""
    allowed = draw(*c.shape("bhmn")) > -0.4
    allowed[:, :, ::5] = False
    allowed[:, :, 64:97] = False
    return allowed.to(dev)


def _after(first: int) -> Callable:
    """No row sees a key before `first`: one whole tile of keys and more is masked."""
    return lambda c, draw, dev: (torch.arange(c.sizes()["n"]) >= first)[None, None, None].to(dev)


def _runs(c: Case, total: int, *runs: tuple[float, int]) -> Tensor:
    """(B, total) ids in runs that come back: each run is the share at which it ends and its id."""
    place = torch.arange(total) - torch.arange(c.b)[:, None] * 3
    ids = torch.full_like(place, runs[-1][1])
    for end, name in runs[::-1]:
        ids = torch.where(place < int(end * total), name, ids)
    return ids


def _speckled(c: Case, total: int) -> Tensor:
    """(B, total) ids without runs, far apart, negative ones among them."""
    place = torch.arange(total) + torch.arange(c.b)[:, None] * 7
    return (place * place % 5 - 2) * 1000003


def _blocks(height: int, width: int, letters: str) -> Callable:
    """Random blocks. The second row of them is empty, where there is one."""

    def make(c: Case, draw: Draw, dev: Any) -> Mask:
        sizes = c.sizes()
        blocks = draw(*c.shape(letters), -(-sizes["m"] // height), -(-sizes["n"] // width)) > -0.4
        blocks[..., 1:2, :] = False
        return Mask.blocks(blocks.to(dev), (height, width))

    return make


MASK_SHAPES = ("bhmn", "1hmn", "11mn", "b11n", "h1n", "bhm1", "n")
MASKS: dict[str, Callable[[Case, Draw, Any], Mask | Tensor]] = {
    "lengths": lambda c, draw, dev: Mask.lengths(_lengths(c, c.sizes()["n"]).to(dev)),
    "lengths_q": lambda c, draw, dev: Mask.lengths(
        _lengths(c, c.sizes()["n"]).to(dev), _lengths(c, c.m).flip(0).to(dev)
    ),
    "lengths_60": lambda c, draw, dev: Mask.lengths(_fills(c).to(dev)),
    "padding_b11n": _padding("b11n"),
    "padding_b1mn": _padding("b1mn"),
    "prefix": lambda c, draw, dev: Mask.prefix(_lengths(c, c.sizes()["n"] // 2).to(dev), c.alignment),
    "segments": lambda c, draw, dev: Mask.segments(_ids(c, c.m, 0.2, 0.3, 0.7).to(dev), sorted=True),
    # Query segments 0 and 2 have no keys, and keys of segment 4 have no query.
    "segments_cross": lambda c, draw, dev: Mask.segments(
        _ids(c, c.m, 0.2, 0.5, 0.8).to(dev), (_ids(c, c.sizes()["n"], 0.6, 0.6, 0.9) + 1).to(dev), sorted=True
    ),
    # Keys of segment 1, which no query has, lie between those that a tile of rows does see.
    "segments_gap": lambda c, draw, dev: Mask.segments(
        (2 * _ids(c, c.m, 0.5)).to(dev), _ids(c, c.sizes()["n"], 0.3, 0.6).to(dev), sorted=True
    ),
    "runs": lambda c, draw, dev: Mask.segments(_runs(c, c.m, (0.15, 3), (0.2, 1), (0.85, 2), (0.9, 3), (1, 1)).to(dev)),
    # Query segment 9 has no keys, and keys of segment 0 have no query.
    "runs_cross": lambda c, draw, dev: Mask.segments(
        _runs(c, c.m, (0.1, 1), (0.6, 2), (0.7, 9), (1, 1)).to(dev),
        _runs(c, c.sizes()["n"], (0.3, 2), (0.4, 0), (0.8, 1), (1, 2)).to(dev),
    ),
    "speckled": lambda c, draw, dev: Mask.segments(
        _speckled(c, c.m).int().to(dev), _speckled(c, c.sizes()["n"])[0].int().to(dev), sorted=False
    ),
    # Of the interpreter's tiles, 64 x 32, or of tiles that they are not.
    "blocks": _blocks(64, 32, ""),
    "blocks_heads": _blocks(7, 13, "h"),
    "blocks_batch": _blocks(64, 48, "b1"),
    "causal": lambda c, draw, dev: Mask.causal(c.alignment),
    "window": lambda c, draw, dev: Mask.window(40, 7, c.alignment),
    "window_sinks": lambda c, draw, dev: Mask.window(20, 0, c.alignment, sinks=4),
    "window_many_sinks": lambda c, draw, dev: Mask.window(9, 7, c.alignment, sinks=40),
    "some_rows": _some_rows,
    "nothing": lambda c, draw, dev: torch.zeros(c.shape("11mn"), dtype=torch.bool, device=dev),
    "after_70": _after(70),
    **{f"random_{x}": _random(x) for x in MASK_SHAPES},
}


# ---------------------------------------------------------------------------------------------------------- memory

# order of the dims in memory, elements of gap after each row, inner step, first element, stride of size-1 dims
MEMORIES: dict[str, tuple[tuple[int, ...], int, int, int, int]] = {
    "gaps": ((0, 1, 2, 3), 8, 1, 0, 48),
    "corrupt": ((0, 1, 2, 3), 8, 1, 0, 2**33 + 3),
    "unaligned": ((0, 1, 2, 3), 3, 1, 1, 3),
    "odd_rows": ((0, 1, 2, 3), 3, 1, 0, 3),  # an aligned base, and rows that are not
    "strided": ((0, 1, 2, 3), 1, 2, 0, 3),
    "bshd": ((0, 2, 1, 3), 8, 1, 0, 48),
    "transposed": ((0, 1, 3, 2), 8, 1, 0, 48),
    "expanded_heads": ((0, 1, 2, 3), 8, 1, 0, 48),
    "expanded_batch": ((0, 1, 2, 3), 8, 1, 0, 48),
}


def place(x: Tensor, memory: str, buffers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """x's values in the midst of a larger buffer of NaN (True, for a mask), with the recipe's strides."""
    if memory.startswith("expanded"):
        dim = int(memory == "expanded_heads")
        return place(x.narrow(dim, 0, min(1, x.shape[dim])), "gaps", buffers).expand(x.shape)
    if x.ndim == 0 or memory == "dense":
        return x.clone()
    order, gap, step, first, odd = MEMORIES[memory]
    order = order[: x.ndim] if x.ndim == 4 else tuple(range(x.ndim))
    sizes = [x.shape[i] for i in order]
    padded = [n + (2 if i else 0) for i, n in enumerate(sizes)]
    padded[-1] = (sizes[-1] + gap) * step
    total = first + torch.Size(padded).numel()
    buffer = x.new_full((total,), 1.0 if x.dtype == torch.bool else torch.nan)
    home = buffer[first:].view(padded)
    for dim, n in enumerate(sizes):
        home = home[(slice(None),) * dim + (slice(0, n * step, step) if dim == x.ndim - 1 else slice(0, n),)]
    home = home.permute([order.index(d) for d in range(x.ndim)])
    home.copy_(x)
    buffers.append((buffer, buffer.clone()))
    stride = [odd if n == 1 else s for n, s in zip(home.shape, home.stride(), strict=True)]
    return home.as_strided(home.shape, stride)


# ---------------------------------------------------------------------------------------------------------- scores

SCORES: dict[str, type[Score]] = {"bilinear": Bilinear, "cosine": Cosine, "distance": Distance, "additive": Additive}


def parameter(c: Case, draw: Draw) -> Tensor:
    """Of the case's score, in the shape that it names, in float64: temperatures and bandwidths far from zero."""
    shape = c.shape(str(c.parameter))
    if c.score == "additive":
        return draw(*shape)
    if c.score == "bilinear":
        return draw(*shape) * shape[-1] ** -0.5
    return (4.0 if c.score == "cosine" else c.d**0.5) * (1 + 0.25 * draw(*shape).abs())
