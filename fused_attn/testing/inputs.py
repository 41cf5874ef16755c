"""Tensors and keywords for the named cases of `cases`: values, masks, score parameters, and their memory.

Tensors live inside larger buffers filled with NaN, so a read of a stride gap, a padded tail or an unseen key shows in
the result; the buffers are compared afterwards, so a write there shows too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..api.bind import bind
from ..scores import Additive, Bilinear, Cosine, Distance, Score
from ..spec.options import Options
from ..spec.problem import Mask, Problem, Ragged
from ..spec.reach import reached
from .cases import CASES, MASK_SHAPES, PARAMETERS, Case

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


# ---------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True, eq=False)
class Inputs:
    """Tensors and keywords ready for `fused_attn.attention`, or `attention_varlen`, and the cotangents."""

    case: Case
    tensors: dict[str, Tensor]  # by the names of LEAVES; q, k, v heads-first
    options: dict[str, Any]
    clean: dict[str, Tensor]  # the same values, dense, and numbers where unseen keys hold NaN
    dout: Tensor | None
    dlse: Tensor | None
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # what the tensors live in, and its copy
    ragged: Ragged | None = None

    @property
    def qkv(self) -> tuple[Tensor, ...]:
        """q, k, v as the case's layout shows them, and where ragged sequences begin."""
        if self.ragged is not None:
            q, k, v = (self.tensors[x][0].transpose(0, 1) for x in "qkv")
            return q, k, v, self.ragged.q, self.ragged.k
        q, k, v = (self.tensors[x].transpose(1, 2) if self.case.layout == "bshd" else self.tensors[x] for x in "qkv")
        return q, k, v

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keywords of `attention`."""
        said = {"layout": self.case.layout} if self.ragged is None else {}
        return self._keywords(self.tensors) | {"return_lse": self.case.return_lse} | said

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors whose gradient is asked for."""
        return {name: x for name, x in self.tensors.items() if x.requires_grad}

    def problem(self) -> Problem:
        """What a backend is handed."""
        return self._bind(self.tensors)

    def clean_problem(self, dtype: torch.dtype) -> Problem:
        """The same problem from fresh leaves in dtype, without gaps or NaN padding: for the oracle."""
        fresh = {
            name: x.detach().to(dtype, copy=True).requires_grad_(self.tensors[name].requires_grad)
            for name, x in self.clean.items()
        }
        return self._bind(fresh)

    def check_untouched(self) -> None:
        """Nobody wrote into an input or around it."""
        for buffer, copy in self.buffers:
            if not torch.equal(buffer.view(torch.uint8), copy.view(torch.uint8)):
                raise AssertionError(f"{self.case.name}: an input, or the memory around it, was written to")

    def _keywords(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        named: dict[str, Any] = {
            "alibi_slopes" if x == "slopes" else x: t for x, t in tensors.items() if x in PARAMETERS
        }
        if self.case.score is not None:
            named["score"] = SCORES[self.case.score](named.pop("parameter", self.case.parameter))  # type: ignore[call-arg]
        return self.options | named

    def _bind(self, tensors: dict[str, Tensor]) -> Problem:
        options = Options(**self._keywords(tensors), return_lse=self.case.return_lse)
        return bind(tensors["q"], tensors["k"], tensors["v"], options, self.ragged)


def _place_packed(x: dict[str, Tensor], buffers: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """q, k and v as views of one (B, S, Hq + 2 Hkv, D) projection."""
    together = place(torch.cat([x[name] for name in "qkv"], 1), "bshd", buffers)
    return dict(zip("qkv", together.split([x[name].shape[1] for name in "qkv"], 1), strict=True))


def make_inputs(case: Case | str, dtype: torch.dtype = torch.float32, device: Any = "cpu", seed: int = 0) -> Inputs:
    """The tensors and keywords of a case. The numbers do not depend on the device, unless the memory is dense."""
    c = CASES[case] if isinstance(case, str) else case
    source, around = (device, "dense") if c.memory == "dense" else ("cpu", "gaps")
    generator = torch.Generator(source).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=source)

    x = {"q": draw(*c.held("bhmd")), "k": draw(*c.held("bgnc")), "v": draw(*c.held("bgne"))}
    if 0 not in c.shape("bhmn"):
        VALUES[c.values](**x)
    if c.memory.startswith("expanded"):
        for name in "kv":
            one = x[name][:, :1] if c.memory == "expanded_heads" else x[name][:1]
            x[name] = one.expand_as(x[name])
    options = _options(c, draw, device, seed)
    x |= _parameters(c, draw)

    parameter_dtype = torch.float32 if c.float32_parameters else dtype
    clean = {name: t.to(device, parameter_dtype if name in PARAMETERS else dtype) for name, t in x.items()}
    buffers: list[tuple[Tensor, Tensor]] = []
    homes = _place_packed(clean, buffers) if c.memory == "packed" else {}
    for name, t in clean.items():
        if name not in homes:
            expanded = c.memory.startswith("expanded") and name not in "kv"
            homes[name] = place(t, around if name in PARAMETERS or expanded else c.memory, buffers)
    tensors = {name: t.detach().requires_grad_(c.backward and name in c.needs) for name, t in homes.items()}
    dout = dlse = None
    if c.dout == "ones":
        dout = torch.ones((), dtype=dtype, device=device).expand(c.held("bhme"))
    elif c.dout is not None:
        dout = place(draw(*c.held("bhme")).to(device, dtype), "dense" if around == "dense" else c.dout, buffers)
    if c.return_lse:
        dlse = draw(*c.held("bhm")).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    inputs = Inputs(c, tensors, options, clean, dout, dlse, buffers, _ragged(c, device))
    if c.unseen_nan:
        _poison_unseen(inputs)
    return inputs


def _ragged(c: Case, device: Any) -> Ragged | None:
    if not c.lengths:
        return None
    q, k = (torch.tensor([0, *x]).cumsum(0).to(device, torch.int32) for x in zip(*c.lengths, strict=True))
    m, n = c.shape("mn")
    return Ragged(q, k, m, n, c.alignment)


def _options(c: Case, draw: Draw, device: Any, seed: int) -> dict[str, Any]:
    options: dict[str, Any] = {"causal": c.causal, "window": c.window, "alignment": c.alignment}
    options |= {"deterministic": c.deterministic, "normalizer": c.normalizer}
    mask = None
    for kind in c.masks:
        part = MASKS[kind](c, draw, device)
        if not isinstance(part, Mask):
            part = place(part, "dense" if c.memory == "dense" else "gaps" if part.ndim == 4 else "unaligned", [])
        mask = part if mask is None else mask & part if isinstance(mask, Mask) else Mask.tensor(mask) & part
    options["mask"] = mask
    options |= {} if c.softcap_tensor else {"softcap": c.softcap}
    options |= {} if c.scale_tensor is not None else {"scale": c.scale}
    return options | ({"dropout_p": c.dropout_p, "seed": 1234 + seed} if c.dropout_p else {})


def _parameters(c: Case, draw: Draw) -> dict[str, Tensor]:
    """The differentiable parameters of a case, by name, in float64."""
    made: dict[str, Tensor] = {}
    if c.bias is not None:
        made["bias"] = draw(*c.shape(c.bias))
        if c.bias_mask is not None:
            allowed: Any = MASKS[c.bias_mask](c, draw, made["bias"].device)
            made["bias"] = made["bias"].masked_fill(~allowed, c.bias_low)
    if c.alibi is not None:
        made["slopes"] = draw(*c.shape(c.alibi)).abs() * 0.05
    if c.softcap_tensor:
        made["softcap"] = torch.tensor(c.softcap, dtype=torch.float64)
    if c.scale_tensor is not None:
        base = c.d**-0.5 if c.scale is None else c.scale
        made["scale"] = base * (1 + 0.25 * draw(*c.shape(c.scale_tensor)))
    if c.sink:
        made["sink"] = draw(c.hq)
    if c.score is not None and isinstance(c.parameter, str):
        made["parameter"] = parameter(c, draw)
    return made


def _poison_unseen(inputs: Inputs) -> None:
    """NaN into the keys that by `Problem.reached` never matter; the clean copy keeps its numbers."""
    p = inputs.problem()
    seen = p.reached()[..., None] if p.ragged is None else reached(p)[1]
    for name in "kv":
        home = inputs.tensors[name].detach()
        home.copy_(torch.where(seen, home, torch.nan))
    for n, (buffer, _) in enumerate(inputs.buffers):
        inputs.buffers[n] = (buffer, buffer.clone())
