"""Named attention problems, and inputs that punish carelessness. The public door to both is `fused_attn.testing`.

Tensors live inside larger buffers filled with NaN, so that whoever reads a stride gap, a padded tail or a key that
nobody may see, shows it; the buffers are compared afterwards, so that whoever writes there shows it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .bind import bind
from .spec import DIFFERENTIABLE, Mask, Problem

PARAMETERS = frozenset(DIFFERENTIABLE) - {"q", "k", "v"}


@dataclass(frozen=True)
class Case:
    """A problem by name: sizes, options, where its tensors live, what they hold, and which need a gradient.

    Shapes are spelled in letters: "bhmn" is (B, Hq, M, N), "h1n" is (Hq, 1, N), "" is ().
    """

    name: str
    tags: frozenset[str] = frozenset()
    # sizes; hkv, n and dv follow hq, m and d unless given
    b: int = 1
    hq: int = 2
    hkv: int | None = None
    m: int = 113
    n: int | None = None
    d: int = 32
    dv: int | None = None
    # options of `attention`
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    alignment: str | None = None
    masks: tuple[str, ...] = ()  # keys of MASKS, intersected
    bias: str | None = None
    bias_mask: str | None = None  # a key of MASKS: the bias is -inf where it forbids
    alibi: str | None = None
    softcap: float | None = None
    softcap_tensor: bool = False
    scale: float | None = None
    scale_tensor: str | None = None
    sink: bool = False
    dropout_p: float = 0.0
    layout: str = "bhsd"
    return_lse: bool = False
    deterministic: bool | None = None
    # inputs
    memory: str = "gaps"  # a key of MEMORIES, "packed", or "dense": what a benchmark draws, on the device, without gaps
    values: str = "gaussian"  # a key of VALUES
    unseen_nan: bool = False  # keys outside every row's interval hold NaN
    float32_parameters: bool = False
    # outputs
    dout: str | None = "gaps"  # a key of MEMORIES, "ones" (stride 0), or None: only the LSE has a gradient
    needs: tuple[str, ...] = DIFFERENTIABLE
    backward: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

    def sizes(self) -> dict[str, int]:
        """B, Hq, Hkv, M, N, D and Dv by letter; g is Hkv and e is Dv."""
        hkv, n, dv = (
            default if own is None else own
            for own, default in ((self.hkv, self.hq), (self.n, self.m), (self.dv, self.d))
        )
        return {"b": self.b, "h": self.hq, "g": hkv, "m": self.m, "n": n, "d": self.d, "e": dv, "1": 1}

    def shape(self, letters: str) -> tuple[int, ...]:
        sizes = self.sizes()
        return tuple(sizes[x] for x in letters)


@dataclass(frozen=True, eq=False)
class Inputs:
    """Tensors and keywords ready for `fused_attn.attention`, in the case's layout, and the cotangents."""

    case: Case
    tensors: dict[str, Tensor]  # by the names of DIFFERENTIABLE; q, k, v heads-first
    options: dict[str, Any]
    clean: dict[str, Tensor]  # the same values, dense, and numbers where unseen keys hold NaN
    dout: Tensor | None
    dlse: Tensor | None
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # what the tensors live in, and its copy

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as the case's layout shows them."""
        q, k, v = (self.tensors[x].transpose(1, 2) if self.case.layout == "bshd" else self.tensors[x] for x in "qkv")
        return q, k, v

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keywords of `attention`."""
        return self._keywords(self.tensors) | {"layout": self.case.layout, "return_lse": self.case.return_lse}

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
        named = {"alibi_slopes" if x == "slopes" else x: t for x, t in tensors.items() if x in PARAMETERS}
        return self.options | named

    def _bind(self, tensors: dict[str, Tensor]) -> Problem:
        keywords = self._keywords(tensors) | {"return_lse": self.case.return_lse}
        return bind(*(tensors[x] for x in "qkv"), **keywords)


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


def _constant(value: float) -> Callable:
    return lambda **x: [t.fill_(value) for t in x.values()]


VALUES: dict[str, Callable] = {
    "gaussian": lambda **x: None,
    "small_integers": _small_integers,
    "one_hot": _one_hot,
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
    """Uneven lengths; the third batch, if there is one, is empty."""
    return torch.tensor([total * 5 // 6, total // 2, 0][: c.b], dtype=torch.int32)


def _ids(c: Case, total: int, *cuts: float) -> Tensor:
    """(B, total) segment ids that step up at each cut, a little later in each batch."""
    place = torch.arange(total) - torch.arange(c.b)[:, None] * 3
    return torch.stack([place >= int(cut * total) for cut in cuts]).int().sum(0, dtype=torch.int32)


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


MASK_SHAPES = ("bhmn", "1hmn", "11mn", "b11n", "h1n", "bhm1", "n")
MASKS: dict[str, Callable[[Case, Draw, Any], Mask | Tensor]] = {
    "lengths": lambda c, draw, dev: Mask.lengths(_lengths(c, c.sizes()["n"]).to(dev)),
    "lengths_q": lambda c, draw, dev: Mask.lengths(
        _lengths(c, c.sizes()["n"]).to(dev), _lengths(c, c.m).flip(0).to(dev)
    ),
    "prefix": lambda c, draw, dev: Mask.prefix(_lengths(c, c.sizes()["n"] // 2).to(dev), c.alignment),
    "segments": lambda c, draw, dev: Mask.segments(_ids(c, c.m, 0.2, 0.3, 0.7).to(dev)),
    # Query segments 0 and 2 have no keys, and keys of segment 4 have no query.
    "segments_cross": lambda c, draw, dev: Mask.segments(
        _ids(c, c.m, 0.2, 0.5, 0.8).to(dev), (_ids(c, c.sizes()["n"], 0.6, 0.6, 0.9) + 1).to(dev)
    ),
    # Keys of segment 1, which no query has, lie between those that a tile of rows does see.
    "segments_gap": lambda c, draw, dev: Mask.segments(
        (2 * _ids(c, c.m, 0.5)).to(dev), _ids(c, c.sizes()["n"], 0.3, 0.6).to(dev)
    ),
    "causal": lambda c, draw, dev: Mask.causal(c.alignment),
    "window": lambda c, draw, dev: Mask.window(40, 7, c.alignment),
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


def _place(x: Tensor, memory: str, buffers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """x's values in the midst of a larger buffer of NaN (True, for a mask), with the recipe's strides."""
    if memory.startswith("expanded"):
        dim = int(memory == "expanded_heads")
        return _place(x.narrow(dim, 0, min(1, x.shape[dim])), "gaps", buffers).expand(x.shape)
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


def _place_packed(x: dict[str, Tensor], buffers: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """q, k and v as views of one (B, S, Hq + 2 Hkv, D) projection."""
    together = _place(torch.cat([x[name] for name in "qkv"], 1), "bshd", buffers)
    return dict(zip("qkv", together.split([x[name].shape[1] for name in "qkv"], 1), strict=True))


def make_inputs(case: Case | str, dtype: torch.dtype = torch.float32, device: Any = "cpu", seed: int = 0) -> Inputs:
    """The tensors and keywords of a case. The numbers do not depend on the device, unless the memory is dense."""
    c = CASES[case] if isinstance(case, str) else case
    source, around = (device, "dense") if c.memory == "dense" else ("cpu", "gaps")
    generator = torch.Generator(source).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=source)

    x = {"q": draw(*c.shape("bhmd")), "k": draw(*c.shape("bgnd")), "v": draw(*c.shape("bgne"))}
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
            homes[name] = _place(t, around if name in PARAMETERS or expanded else c.memory, buffers)
    tensors = {name: t.detach().requires_grad_(c.backward and name in c.needs) for name, t in homes.items()}
    dout = dlse = None
    if c.dout == "ones":
        dout = torch.ones((), dtype=dtype, device=device).expand(c.shape("bhme"))
    elif c.dout is not None:
        dout = _place(draw(*c.shape("bhme")).to(device, dtype), "dense" if around == "dense" else c.dout, buffers)
    if c.return_lse:
        dlse = draw(*c.shape("bhm")).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    inputs = Inputs(c, tensors, options, clean, dout, dlse, buffers)
    if c.unseen_nan:
        _poison_unseen(inputs)
    return inputs


def _options(c: Case, draw: Draw, device: Any, seed: int) -> dict[str, Any]:
    options: dict[str, Any] = {"causal": c.causal, "window": c.window, "alignment": c.alignment}
    options["deterministic"] = c.deterministic
    mask = None
    for kind in c.masks:
        part = MASKS[kind](c, draw, device)
        if not isinstance(part, Mask):
            part = _place(part, "dense" if c.memory == "dense" else "gaps" if part.ndim == 4 else "unaligned", [])
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
            made["bias"] = made["bias"].masked_fill(~allowed, -torch.inf)
    if c.alibi is not None:
        made["slopes"] = draw(*c.shape(c.alibi)).abs() * 0.05
    if c.softcap_tensor:
        made["softcap"] = torch.tensor(c.softcap, dtype=torch.float64)
    if c.scale_tensor is not None:
        base = c.d**-0.5 if c.scale is None else c.scale
        made["scale"] = base * (1 + 0.25 * draw(*c.shape(c.scale_tensor)))
    if c.sink:
        made["sink"] = draw(c.hq)
    return made


def _poison_unseen(inputs: Inputs) -> None:
    """NaN into the keys outside every row's interval; the clean copy keeps its numbers, which do not matter."""
    p = inputs.problem()
    i, j = (torch.arange(n, device=p.q.device) for n in p.shape[2:])
    seen = p.span.materialize(i, j, p.shape[3]).any(-2)
    for name in "kv":
        home = inputs.tensors[name].detach()
        home.copy_(torch.where(seen[..., None], home, torch.nan))
    for n, (buffer, _) in enumerate(inputs.buffers):
        inputs.buffers[n] = (buffer, buffer.clone())


# ------------------------------------------------------------------------------------------------------------ cases


def _table(*cases: Case) -> dict[str, Case]:
    table = {c.name: c for c in cases}
    assert len(table) == len(cases), "two cases share a name"
    return table


def _tags(words: str) -> frozenset[str]:
    return frozenset(words.split())


def _case(name: str, tags: str = "", **fields: Any) -> Case:
    return Case(name, _tags(tags), **fields)


def _family(prefix: str, field_name: str, values: Iterable[Any], tags: str = "", **fields: Any) -> list[Case]:
    """One case for each value of one field, named by it."""
    return [_case(f"{prefix}_{value}", tags, **{field_name: value}, **fields) for value in values]


BIAS_SHAPES = ("bhmn", "1hmn", "b1mn", "11mn", "b11n", "h1n", "bhm1", "1h11", "1111", "n")
EVERYTHING: dict[str, Any] = {
    "b": 2, "hq": 4, "hkv": 2, "m": 63, "n": 113, "d": 40, "dv": 24, "causal": True, "window": (60, None),
    "alignment": "bottom_right", "masks": ("random_b11n",), "bias": "1hmn", "alibi": "h", "softcap": 4.0, "sink": True,
    "dropout_p": 0.2, "return_lse": True,
}  # fmt: skip
FLOAT_ONLY = (torch.float32, torch.float64)

# Tags: "core" is the subset for a second version of the toolchain and for a quick look, "half" the cases that also run
# in float16 and bfloat16, "large" those too slow for the interpreter.
CASES: dict[str, Case] = _table(
    # sizes
    _case("plain", "core half", b=2),
    _case("one_by_one", m=1, n=1, d=16),
    _case("one_query", "core", m=1, n=203),
    _case("one_key", m=63, n=1),
    _case("tile_exact", m=128, n=128, hq=1),
    _case("tall", "half", m=203, n=63, hq=1),
    _case("wide", m=63, n=203, hq=1),
    _case("gqa_3", "core half", hq=3, hkv=1, m=63),
    _case("gqa_5", hq=5, hkv=1, m=33, n=65),
    _case("gqa_8", hq=8, hkv=1, m=33, n=65),
    _case("gqa_3_of_2", b=2, hq=6, hkv=2, m=33, n=65, causal=True, alignment="bottom_right"),
    _case("dv_smaller", "half", d=40, dv=16, m=63),
    _case("dv_larger", "core", d=16, dv=80, m=63),
    *_family("head_dim", "d", (1, 5, 40, 72, 80, 96, 160, 512), "half", hq=1, m=33, n=65),
    _case("empty_batch", b=0, m=7),
    _case("empty_heads", hq=0, m=7),
    _case("empty_queries", m=0, n=7, sink=True, bias="1hmn"),
    _case("empty_keys", m=7, n=0, return_lse=True, bias="1hmn"),
    _case("empty_keys_sink", "core", m=7, n=0, sink=True, return_lse=True),
    _case("many_heads", "large", b=2, hq=32771, m=3, n=5, d=4),
    # intervals
    _case("causal", "core half", causal=True),
    _case("causal_203", m=203, hq=1, causal=True),
    *(
        _case(f"causal_{shape}_{side}", "core" if shape == "tall" else "", causal=True, alignment=side, hq=1, m=m, n=n,
              unseen_nan=True, return_lse=True)
        for side in ("top_left", "bottom_right")
        for shape, m, n in (("tall", 113, 63), ("wide", 63, 113), ("far", 33, 203))
    ),
    _case("causal_one_query", m=1, n=113, causal=True, alignment="bottom_right"),
    _case("window", "half", hq=1, m=203, window=(31, 8)),
    _case("window_left", m=113, hq=1, window=(17, None)),
    _case("window_right", m=113, hq=1, window=(None, 9)),
    _case("window_0_0", m=113, hq=1, window=(0, 0)),
    _case("window_causal", "core", m=203, hq=1, window=(40, None), causal=True),
    _case("window_top_left_wide", hq=1, m=63, n=203, window=(9, 20), alignment="top_left", unseen_nan=True),
    _case("window_bottom_right_wide", hq=1, m=63, n=203, window=(9, 2), alignment="bottom_right", unseen_nan=True),
    _case("window_top_left_tall", hq=1, m=203, n=63, window=(9, 2), alignment="top_left", return_lse=True),
    _case("lengths", "core half", b=2, hq=1, masks=("lengths",), unseen_nan=True),
    _case("lengths_q", b=3, hq=1, m=97, masks=("lengths_q",), unseen_nan=True, return_lse=True),
    _case("lengths_causal", b=2, hq=1, masks=("lengths", "causal"), unseen_nan=True),
    _case("prefix", b=2, hq=1, masks=("prefix",)),
    _case("prefix_wide", b=2, hq=1, m=63, n=113, masks=("prefix",), alignment="bottom_right"),
    _case("segments", "core", b=2, hq=1, masks=("segments",)),
    _case("segments_cross", b=2, hq=1, m=113, n=97, masks=("segments_cross",), return_lse=True, unseen_nan=True),
    _case("segments_gap", b=2, hq=1, masks=("segments_gap",), unseen_nan=True),
    _case("segments_causal", b=2, hq=1, masks=("segments", "causal")),
    _case("segments_window_tensor", b=2, hq=1, masks=("segments", "window", "random_bhmn")),
    _case("lengths_tensor", b=2, hq=1, masks=("random_n", "lengths"), unseen_nan=True),
    # tensor masks
    *(_case(f"mask_{x}", b=2, m=63, n=97, masks=(f"random_{x}",)) for x in MASK_SHAPES),
    _case("mask_causal", "core half", masks=("random_11mn",), causal=True, hq=1),
    _case("masked_rows", "core half", masks=("some_rows",), return_lse=True),
    _case("masked_rows_bias", hq=1, bias="bhmn", bias_mask="some_rows", return_lse=True),
    _case("masked_everywhere", m=63, masks=("nothing",), return_lse=True, bias="1hmn", softcap=5.0),
    _case("first_tile_masked", "core", hq=1, masks=("after_70",)),
    _case("first_tile_masked_bias", hq=1, bias="1hmn", bias_mask="after_70"),
    _case("first_tile_masked_negative", hq=1, masks=("after_70",), values="negative"),
    # modifiers
    *(_case(f"bias_{x}", "core half" if x in ("bhmn", "b11n") else "", b=2, m=63, n=97, bias=x) for x in BIAS_SHAPES),
    _case("bias_float32", "half", b=2, m=63, bias="1hmn", float32_parameters=True,
          dtypes=(torch.float16, torch.bfloat16, torch.float32)),
    _case("bias_gqa_causal", b=2, hq=4, hkv=2, m=63, n=97, bias="11mn", causal=True, alignment="bottom_right"),
    _case("bias_rows_lse", b=2, m=63, bias="bhm1", masks=("some_rows",), return_lse=True),
    _case("bias_rows_sink", b=2, m=63, bias="1h11", masks=("some_rows",), sink=True, return_lse=True),
    _case("bias_columns_gqa", b=2, hq=4, hkv=2, m=63, n=97, bias="1h1n", masks=("lengths",), unseen_nan=True),
    _case("bias_dense_window", b=1, hq=2, m=113, bias="1hmn", window=(9, 4)),
    _case("alibi_h", "core half", alibi="h"),
    _case("alibi_bh", b=2, hq=2, m=63, alibi="bh", causal=True),
    _case("alibi_bottom_right", hq=1, m=63, n=113, alibi="h", alignment="bottom_right"),
    _case("alibi_top_left", hq=1, m=113, n=63, alibi="h", alignment="top_left"),
    _case("softcap", "core half", softcap=2.0),
    _case("softcap_tensor", "half", softcap=2.0, softcap_tensor=True, hq=1),
    _case("softcap_small", softcap=0.3, hq=1),
    _case("softcap_bias_causal", softcap=2.0, bias="1hmn", causal=True),
    _case("softcap_masked", softcap=2.0, masks=("random_11mn",), hq=1),
    _case("softcap_scale_tensor", softcap=2.0, softcap_tensor=True, scale_tensor="h"),
    _case("scale", scale=0.3, hq=1),
    _case("scale_tensor", "half", scale_tensor=""),
    _case("scale_heads", "core", scale_tensor="h", scale=-0.2, hq=3, m=63),
    _case("scale_zero", scale=0.0, hq=1),
    _case("scale_tensor_zero", scale_tensor="", scale=0.0, hq=1, m=63),
    _case("scale_negative", scale=-0.4, hq=1),
    _case("scale_inf", scale=torch.inf, hq=1, m=63, dtypes=FLOAT_ONLY),
    _case("sink", "core half", sink=True),
    _case("sink_lse", sink=True, return_lse=True, hq=4, hkv=2, m=63),
    _case("sink_masked_rows", sink=True, masks=("some_rows",), return_lse=True),
    _case("sink_causal_tall", sink=True, causal=True, alignment="bottom_right", m=113, n=63, return_lse=True),
    _case("unordered", "half", deterministic=False, hq=4, hkv=2, m=97, n=113, causal=True, alignment="bottom_right"),
    _case("lse", "core half", return_lse=True),
    _case("lse_only", return_lse=True, dout=None),
    _case("lse_only_sink", return_lse=True, dout=None, sink=True, hq=3, m=63),
    _case("dropout", "core half", b=2, hq=3, m=63, n=97, dropout_p=0.3),
    _case("dropout_one", dropout_p=1.0, hq=1, m=63, return_lse=True),
    _case("dropout_gqa_causal", hq=4, hkv=2, dropout_p=0.6, causal=True),
    _case("everything", "core half", **EVERYTHING),
    _case("everything_tensor", softcap_tensor=True, scale_tensor="h", **EVERYTHING),
    # memory
    _case("layout_bshd", "core half", b=2, layout="bshd", memory="bshd", m=63),
    _case("layout_bshd_gaps", b=2, layout="bshd", m=63, n=97, hq=4, hkv=2),
    *_family("memory", "memory", ("bshd", "unaligned", "odd_rows", "strided", "transposed", "packed"), "half",
             b=2, m=63),
    _case("memory_corrupt", b=1, hq=1, m=63, memory="corrupt"),
    _case("memory_corrupt_ones", "core", b=1, hq=1, m=1, n=65, memory="corrupt", bias="1hmn", masks=("random_1hmn",)),
    _case("memory_expanded_heads", b=2, memory="expanded_heads", m=63, n=97),
    _case("memory_expanded_batch", b=2, memory="expanded_batch", m=63, n=97, bias="b11n"),
    _case("unaligned_40", "half", hq=1, d=40, memory="unaligned", m=63),
    _case("dout_ones", "core half", dout="ones", m=63),
    *_family("dout", "dout", ("transposed", "bshd", "strided", "unaligned"), b=2, m=63),
    # numbers
    *_family("values", "values", ("small_integers", "one_hot", "constant", "ramps"), "half", scale=0.25, m=97, hq=1),
    _case("values_huge_equal", "half", values="huge_equal", m=97, hq=1, d=16, backward=False,
          dtypes=(torch.bfloat16, *FLOAT_ONLY)),
    # At such logits one rounding of a float32 LSE is as large as a probability, so these two are about the forward.
    _case("values_very_negative", "core", values="very_negative", m=97, hq=1, backward=False, return_lse=True),
    *_family("values", "values", ("nan_q", "nan_k", "nan_v", "inf_q"), m=97, return_lse=True),
    # who needs a gradient
    *(_case(f"only_{x}", needs=(x,), b=2, m=63, bias="b11n", sink=True, softcap=3.0, softcap_tensor=True,
            scale_tensor="h", alibi="h") for x in DIFFERENTIABLE),
    _case("no_gradient", needs=(), m=63),
)  # fmt: skip
