"""The tensors and keywords of a case: values, masks, score parameters, and their memory layout.

Tensors are views of larger buffers filled with NaN, so that reading a stride gap or a padded tail changes the result.
`Inputs.check_untouched` compares the buffers with copies, which detects writes.
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
from ..spec.visibility import visibility
from .cases import MASK_SHAPES, PARAMETERS, Case, named

# ---------------------------------------------------------------------------------------------------------- values

Draw = Callable[..., Tensor]  # (*shape) -> float64 Gaussian, from a generator on the CPU


def _opposite(size: float) -> Callable:
    """The first channel is +size in q and -size in k, so that every logit is far below zero."""

    def fill(q: Tensor, k: Tensor, v: Tensor) -> None:
        q[..., 0] = size
        k[..., 0] = -size

    return fill


def _put(name: str, value: float) -> Callable:
    """One NaN or Inf in the middle of one tensor."""

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
    """Every fifth query and key is zero, and the one after it is tiny."""
    for t in (q, k):
        t[:, :, ::5] = 0.0
        t[:, :, 1::5] *= 1e-9


def _huge_rows(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Vectors whose squares overflow float32."""
    for t in (q, k):
        t[:, :, ::3] *= 1e25


def _cancelling(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Large features of opposite sign: tanh(q) and tanh(k) saturate, tanh(q + k) does not."""
    q[:, :, ::2] += 15.0
    k[:, :, ::3] -= 15.0


def _edge(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Features of the largest magnitude, 11, for which the kernel computes two tanh with one reciprocal."""
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
    "negative": _opposite(32.0),
    "very_negative": _opposite(640.0),
    "nan_q": _put("q", torch.nan),
    "nan_k": _put("k", torch.nan),
    "nan_v": _put("v", torch.nan),
    "inf_q": _put("q", torch.inf),
}


# ----------------------------------------------------------------------------------------------------------- masks


def _lengths(c: Case, total: int) -> Tensor:
    """Uneven lengths; every third batch is empty."""
    return torch.tensor([(total * 5 // 6, total // 2, 0)[b % 3] for b in range(c.b)], dtype=torch.int32)


def _ids(c: Case, total: int, *cuts: float) -> Tensor:
    """(B, total) segment ids that increase at each cut, a little later in each batch."""
    positions = torch.arange(total) - torch.arange(c.b)[:, None] * 3
    return torch.stack([positions >= int(cut * total) for cut in cuts]).int().sum(0, dtype=torch.int32)


def _padding(letters: str) -> Callable:
    """True at the first keys of each sequence: all of them in the first, a fifth in the last."""

    def make(c: Case, draw: Draw, dev: Any) -> Tensor:
        visible = torch.arange(c.sizes()["n"]) < _decreasing_lengths(c)[:, None]
        return visible[:, None, None].expand(c.shape(letters)).contiguous().to(dev)

    return make


def _decreasing_lengths(c: Case) -> Tensor:
    return (c.sizes()["n"] * torch.linspace(1.0, 0.2, c.b)).int()


def _random(letters: str) -> Callable:
    return lambda c, draw, dev: (draw(*c.shape(letters)) > -0.4).to(dev)


def _some_rows(c: Case, draw: Draw, dev: Any) -> Tensor:
    """Rows 0, 5, 10, ... and 64 to 96 are fully masked."""
    allowed = draw(*c.shape("bhmn")) > -0.4
    allowed[:, :, ::5] = False
    allowed[:, :, 64:97] = False
    return allowed.to(dev)


def _after(first: int) -> Callable:
    """Keys before `first` are masked for every row; that is more than one tile of keys."""
    return lambda c, draw, dev: (torch.arange(c.sizes()["n"]) >= first)[None, None, None].to(dev)


def _runs(c: Case, total: int, *runs: tuple[float, int]) -> Tensor:
    """(B, total) ids in runs, where an id may recur; each run is (fraction of total at which it ends, id)."""
    positions = torch.arange(total) - torch.arange(c.b)[:, None] * 3
    ids = torch.full_like(positions, runs[-1][1])
    for end, own in runs[::-1]:
        ids = torch.where(positions < int(end * total), own, ids)
    return ids


def _speckled(c: Case, total: int) -> Tensor:
    """(B, total) ids without runs, with large and negative values."""
    positions = torch.arange(total) + torch.arange(c.b)[:, None] * 7
    return (positions * positions % 5 - 2) * 1000003


def _blocks(height: int, width: int, letters: str) -> Callable:
    """Random blocks; the second row of blocks is empty."""

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
    "lengths_60": lambda c, draw, dev: Mask.lengths(_decreasing_lengths(c).to(dev)),
    "padding_b11n": _padding("b11n"),
    "padding_b1mn": _padding("b1mn"),
    "prefix": lambda c, draw, dev: Mask.prefix(_lengths(c, c.sizes()["n"] // 2).to(dev), c.alignment),
    "segments": lambda c, draw, dev: Mask.segments(_ids(c, c.m, 0.2, 0.3, 0.7).to(dev), sorted=True),
    # Query segments 0 and 2 have no key, and key segment 4 has no query.
    "segments_cross": lambda c, draw, dev: Mask.segments(
        _ids(c, c.m, 0.2, 0.5, 0.8).to(dev), (_ids(c, c.sizes()["n"], 0.6, 0.6, 0.9) + 1).to(dev), sorted=True
    ),
    # Key segment 1 has no query, and lies between keys that a tile of rows sees.
    "segments_gap": lambda c, draw, dev: Mask.segments(
        (2 * _ids(c, c.m, 0.5)).to(dev), _ids(c, c.sizes()["n"], 0.3, 0.6).to(dev), sorted=True
    ),
    "runs": lambda c, draw, dev: Mask.segments(_runs(c, c.m, (0.15, 3), (0.2, 1), (0.85, 2), (0.9, 3), (1, 1)).to(dev)),
    # Query segment 9 has no key, and key segment 0 has no query.
    "runs_cross": lambda c, draw, dev: Mask.segments(
        _runs(c, c.m, (0.1, 1), (0.6, 2), (0.7, 9), (1, 1)).to(dev),
        _runs(c, c.sizes()["n"], (0.3, 2), (0.4, 0), (0.8, 1), (1, 2)).to(dev),
    ),
    "speckled": lambda c, draw, dev: Mask.segments(
        _speckled(c, c.m).int().to(dev), _speckled(c, c.sizes()["n"])[0].int().to(dev), sorted=False
    ),
    # "blocks" has the interpreter's tile size, 64 x 32; the others do not.
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

# (order of dims in memory, gap after each row in elements, innermost stride, offset, stride of dims of size 1)
MEMORIES: dict[str, tuple[tuple[int, ...], int, int, int, int]] = {
    "gaps": ((0, 1, 2, 3), 8, 1, 0, 48),
    "corrupt": ((0, 1, 2, 3), 8, 1, 0, 2**33 + 3),
    "unaligned": ((0, 1, 2, 3), 3, 1, 1, 3),
    "odd_rows": ((0, 1, 2, 3), 3, 1, 0, 3),  # an aligned base with unaligned rows
    "strided": ((0, 1, 2, 3), 1, 2, 0, 3),
    "bshd": ((0, 2, 1, 3), 8, 1, 0, 48),
    "transposed": ((0, 1, 3, 2), 8, 1, 0, 48),
    "expanded_heads": ((0, 1, 2, 3), 8, 1, 0, 48),
    "expanded_batch": ((0, 1, 2, 3), 8, 1, 0, 48),
}


def place(x: Tensor, memory: str, buffers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """A view with x's values and the strides of `memory`, in a larger buffer filled with NaN (True for a mask)."""
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
    view = buffer[first:].view(padded)
    for dim, n in enumerate(sizes):
        view = view[(slice(None),) * dim + (slice(0, n * step, step) if dim == x.ndim - 1 else slice(0, n),)]
    view = view.permute([order.index(d) for d in range(x.ndim)])
    view.copy_(x)
    buffers.append((buffer, buffer.clone()))
    stride = [odd if n == 1 else s for n, s in zip(view.shape, view.stride(), strict=True)]
    return view.as_strided(view.shape, stride)


# ---------------------------------------------------------------------------------------------------------- scores

SCORES: dict[str, type[Score]] = {"bilinear": Bilinear, "cosine": Cosine, "distance": Distance, "additive": Additive}


def parameter(c: Case, draw: Draw) -> Tensor:
    """The score's parameter in float64, of the case's shape; temperatures and bandwidths are far from zero."""
    shape = c.shape(str(c.parameter))
    if c.score == "additive":
        return draw(*shape)
    if c.score == "bilinear":
        return draw(*shape) * shape[-1] ** -0.5
    return (4.0 if c.score == "cosine" else c.d**0.5) * (1 + 0.25 * draw(*shape).abs())


# ---------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of a case: arguments of `fused_attn.attention` or `attention_varlen`, and cotangents."""

    case: Case
    tensors: dict[str, Tensor]  # by the names of LEAVES; q, k, v heads-first
    options: dict[str, Any]  # keywords that are not in tensors
    clean: dict[str, Tensor]  # the same values without gaps, and finite at keys where tensors hold NaN
    dout: Tensor | None
    dlse: Tensor | None
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (buffer of a tensor, its initial copy)
    ragged: Ragged | None = None

    @property
    def qkv(self) -> tuple[Tensor, ...]:
        """q, k and v in the case's layout; for packed sequences also cu_seqlens_q and cu_seqlens_k."""
        if self.ragged is not None:
            q, k, v = (self.tensors[x][0].transpose(0, 1) for x in "qkv")
            return q, k, v, self.ragged.q, self.ragged.k
        q, k, v = (self.tensors[x].transpose(1, 2) if self.case.layout == "bshd" else self.tensors[x] for x in "qkv")
        return q, k, v

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keywords of `attention` or `attention_varlen`."""
        layout = {"layout": self.case.layout} if self.ragged is None else {}
        return self._keywords(self.tensors) | {"return_lse": self.case.return_lse} | layout

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors that require grad."""
        return {name: x for name, x in self.tensors.items() if x.requires_grad}

    def problem(self) -> Problem:
        """The inputs as a `Problem`."""
        return self._bind(self.tensors)

    def clean_problem(self, dtype: torch.dtype) -> Problem:
        """The problem with new leaves in dtype, without gaps or NaN, for the oracle."""
        leaves = {
            name: x.detach().to(dtype, copy=True).requires_grad_(self.tensors[name].requires_grad)
            for name, x in self.clean.items()
        }
        return self._bind(leaves)

    def check_untouched(self) -> None:
        """Raise AssertionError if an input or the buffer around it was written to."""
        for buffer, copy in self.buffers:
            if not torch.equal(buffer.view(torch.uint8), copy.view(torch.uint8)):
                raise AssertionError(f"{self.case.name}: an input, or the memory around it, was written to")

    def _keywords(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        own: dict[str, Any] = {"alibi_slopes" if x == "slopes" else x: t for x, t in tensors.items() if x in PARAMETERS}
        if self.case.score is not None:
            own["score"] = SCORES[self.case.score](own.pop("parameter", self.case.parameter))  # type: ignore[call-arg]
        return self.options | own

    def _bind(self, tensors: dict[str, Tensor]) -> Problem:
        options = Options(**self._keywords(tensors), return_lse=self.case.return_lse)
        return bind(tensors["q"], tensors["k"], tensors["v"], options, self.ragged)


def _place_packed(x: dict[str, Tensor], buffers: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """q, k and v as views of one (B, S, Hq + 2 Hkv, D) projection."""
    qkv = place(torch.cat([x[name] for name in "qkv"], 1), "bshd", buffers)
    return dict(zip("qkv", qkv.split([x[name].shape[1] for name in "qkv"], 1), strict=True))


def make_inputs(case: Case | str, dtype: torch.dtype = torch.float32, device: Any = "cpu", seed: int = 0) -> Inputs:
    """The tensors and keywords of a case; case is a key of `CASES` or a `Case`.

    Values depend on the seed only, not on the device, unless the case's memory is "dense".

    >>> from fused_attn import attention, testing
    >>> inputs = testing.make_inputs("causal")
    >>> attention(*inputs.qkv, **inputs.kwargs).shape
    torch.Size([1, 2, 113, 32])
    """
    c = named(case)
    source, default = (device, "dense") if c.memory == "dense" else ("cpu", "gaps")
    generator = torch.Generator(source).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=source)

    x = {"q": draw(*c.held("bhmd")), "k": draw(*c.held("bgnc")), "v": draw(*c.held("bgne"))}
    if 0 not in c.shape("bhmn"):
        VALUES[c.values](**x)
    if c.memory.startswith("expanded"):
        for name in "kv":
            first = x[name][:, :1] if c.memory == "expanded_heads" else x[name][:1]
            x[name] = first.expand_as(x[name])
    options = _options(c, draw, device, seed)
    x |= _parameters(c, draw)

    parameter_dtype = torch.float32 if c.float32_parameters else dtype
    clean = {name: t.to(device, parameter_dtype if name in PARAMETERS else dtype) for name, t in x.items()}
    buffers: list[tuple[Tensor, Tensor]] = []
    views = _place_packed(clean, buffers) if c.memory == "packed" else {}
    for name, t in clean.items():
        if name not in views:
            expanded = c.memory.startswith("expanded") and name not in "kv"
            views[name] = place(t, default if name in PARAMETERS or expanded else c.memory, buffers)
    tensors = {name: t.detach().requires_grad_(c.backward and name in c.needs) for name, t in views.items()}
    dout = dlse = None
    if c.dout == "ones":
        dout = torch.ones((), dtype=dtype, device=device).expand(c.held("bhme"))
    elif c.dout is not None:
        dout = place(draw(*c.held("bhme")).to(device, dtype), "dense" if default == "dense" else c.dout, buffers)
    if c.return_lse:
        dlse = draw(*c.held("bhm")).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    inputs = Inputs(c, tensors, options, clean, dout, dlse, buffers, _ragged(c, device))
    if c.unseen_nan:
        _fill_unseen_with_nan(inputs)
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
    result: dict[str, Tensor] = {}
    if c.bias is not None:
        result["bias"] = draw(*c.shape(c.bias))
        if c.bias_mask is not None:
            allowed: Any = MASKS[c.bias_mask](c, draw, result["bias"].device)
            result["bias"] = result["bias"].masked_fill(~allowed, c.bias_low)
    if c.alibi is not None:
        result["slopes"] = draw(*c.shape(c.alibi)).abs() * 0.05
    if c.softcap_tensor:
        result["softcap"] = torch.tensor(c.softcap, dtype=torch.float64)
    if c.scale_tensor is not None:
        base = c.d**-0.5 if c.scale is None else c.scale
        result["scale"] = base * (1 + 0.25 * draw(*c.shape(c.scale_tensor)))
    if c.sink:
        result["sink"] = draw(c.hq)
    if c.score is not None and isinstance(c.parameter, str):
        result["parameter"] = parameter(c, draw)
    return result


def _fill_unseen_with_nan(inputs: Inputs) -> None:
    """Set k and v to NaN at keys that no row sees by span or pattern; `Inputs.clean` stays finite."""
    p = inputs.problem()
    visible = p.visible_keys()[..., None] if p.ragged is None else visibility(p)[1]
    for name in "kv":
        x = inputs.tensors[name].detach()
        x.copy_(torch.where(visible, x, torch.nan))
    for n, (buffer, _) in enumerate(inputs.buffers):
        inputs.buffers[n] = (buffer, buffer.clone())
