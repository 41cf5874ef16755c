"""Named attention problems for tests and benchmarks of every backend; `make_inputs` creates their tensors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

PARAMETERS = frozenset({"scale", "softcap", "bias", "slopes", "sink", "parameter"})
LEAVES = ("q", "k", "v", *sorted(PARAMETERS))


@dataclass(frozen=True)
class Case:
    """A named problem: its sizes and options, the memory layout and values of its tensors, and their gradients.

    Shapes are strings with a letter per dim: "bhmn" is (B, Hq, M, N), "h1n" is (Hq, 1, N), "" is ().

    >>> import dataclasses
    >>> from fused_attn import testing
    >>> case = dataclasses.replace(testing.CASES["causal"], name="causal_long", m=300)
    >>> case.shape("bhmd")
    (1, 2, 300, 32)
    """

    name: str
    tags: frozenset[str] = frozenset()
    # sizes; hkv, n, dv and dk default to hq, m, d and d
    b: int = 1
    hq: int = 2
    hkv: int | None = None
    m: int = 113
    n: int | None = None
    d: int = 32
    dv: int | None = None
    dk: int | None = None  # k's head dim, for a bilinear score
    lengths: tuple[tuple[int, int], ...] = ()  # (M, N) of packed sequences; sets b, m and n
    # options of `attention`
    score: str | None = None  # a key of SCORES
    parameter: str | float = ""  # of the score: its shape, or a float
    normalizer: str = "softmax"
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    alignment: str | None = None
    masks: tuple[str, ...] = ()  # keys of MASKS, intersected
    bias: str | None = None
    bias_mask: str | None = None  # a key of MASKS: where it is False, the bias is `bias_low`
    bias_low: float = -float("inf")
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
    memory: str = "gaps"  # a key of MEMORIES, "packed", or "dense": drawn on the device, without gaps, for benchmarks
    values: str = "gaussian"  # a key of VALUES
    unseen_nan: bool = False  # NaN in k and v at keys that no row sees by interval or pattern
    float32_parameters: bool = False
    # outputs
    dout: str | None = "gaps"  # a key of MEMORIES, "ones" (stride 0), or None: only the LSE has a cotangent
    needs: tuple[str, ...] = LEAVES  # tensors that require grad
    backward: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

    def __post_init__(self) -> None:
        if self.lengths:
            longest = (max(x) for x in zip(*self.lengths, strict=True))
            for name, size in zip("bmn", (len(self.lengths), *longest), strict=True):
                object.__setattr__(self, name, size)

    def sizes(self) -> dict[str, int]:
        """Sizes by letter: b, h (Hq), g (Hkv), m, n, d, e (Dv), c (head dim of k) and 1."""
        hkv, n, dv, dk = (
            default if own is None else own
            for own, default in ((self.hkv, self.hq), (self.n, self.m), (self.dv, self.d), (self.dk, self.d))
        )
        return {"b": self.b, "h": self.hq, "g": hkv, "m": self.m, "n": n, "d": self.d, "e": dv, "c": dk, "1": 1}

    def held(self, letters: str) -> tuple[int, ...]:
        """As `shape`, but with the sequences of a ragged case packed: B = 1, and M and N are their total lengths."""
        if not self.lengths:
            return self.shape(letters)
        rows, keys = (sum(x) for x in zip(*self.lengths, strict=True))
        sizes = self.sizes() | {"b": 1, "m": rows, "n": keys}
        return tuple(sizes[x] for x in letters)

    def shape(self, letters: str) -> tuple[int, ...]:
        """The shape spelled by letters, such as "bhmd"."""
        sizes = self.sizes()
        return tuple(sizes[x] for x in letters)


# ------------------------------------------------------------------------------------------------------------ cases


def _table(*cases: Case) -> dict[str, Case]:
    table = {c.name: c for c in cases}
    assert len(table) == len(cases), "two cases share a name"
    return table


def _case(name: str, tags: str = "", **fields: Any) -> Case:
    return Case(name, frozenset(tags.split()), **fields)


def _family(prefix: str, field_name: str, values: Iterable[Any], tags: str = "", **fields: Any) -> list[Case]:
    """One case per value of a field, named after the value."""
    return [_case(f"{prefix}_{value}", tags, **{field_name: value}, **fields) for value in values]


MASK_SHAPES = ("bhmn", "1hmn", "11mn", "b11n", "h1n", "bhm1", "n")
BIAS_SHAPES = ("bhmn", "1hmn", "b1mn", "11mn", "b11n", "h1n", "bhm1", "1h11", "1111", "n")
EVERYTHING: dict[str, Any] = {
    "b": 2, "hq": 4, "hkv": 2, "m": 63, "n": 113, "d": 40, "dv": 24, "causal": True, "window": (60, None),
    "alignment": "bottom_right", "masks": ("random_b11n",), "bias": "1hmn", "alibi": "h", "softcap": 4.0, "sink": True,
    "dropout_p": 0.2, "return_lse": True,
}  # fmt: skip
# (M, N) of packed sequences: empty ones, 1, and more and less than a tile.
RAGGED = ((33, 20), (0, 9), (5, 0), (1, 1), (97, 140), (20, 3))
SELF = tuple((n, n) for n in (17, 0, 1, 90, 33))
SHORT = ((9, 20), (0, 3), (33, 40), (2, 0), (17, 1))
FLOAT_ONLY = (torch.float32, torch.float64)
SCORE_CASES: dict[str, dict[str, Any]] = {
    "bilinear": {"parameter": "hdc", "dk": 24},
    "cosine": {"parameter": "h"},
    "distance": {"parameter": "h"},
    "additive": {"parameter": "hd", "d": 10},
}

# Tags: "core" is a subset for quick checks and for other toolchain versions; "half" also runs in float16 and bfloat16;
# "large" is too slow for the interpreter.
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
    # masks that are not intervals
    _case("runs", "core", b=2, hq=1, m=163, masks=("runs",)),
    _case("runs_cross", b=2, hq=1, m=113, n=163, masks=("runs_cross",), return_lse=True, unseen_nan=True),
    _case("runs_causal", b=2, hq=1, masks=("runs", "causal"), return_lse=True),
    _case("runs_lengths", b=3, hq=1, m=97, masks=("runs", "lengths_q"), unseen_nan=True, return_lse=True),
    _case("speckled", b=2, hq=1, m=63, n=97, masks=("speckled",)),
    _case("speckled_runs", b=2, hq=1, m=63, n=97, masks=("speckled", "runs_cross"), unseen_nan=True),
    _case("window_sinks", "core half", hq=1, m=163, masks=("window_sinks",)),
    _case("window_sinks_wide", hq=1, m=63, n=203, masks=("window_sinks",), alignment="bottom_right", unseen_nan=True),
    _case("window_sinks_top_left", hq=1, m=63, n=203, masks=("window_many_sinks",), alignment="top_left",
          unseen_nan=True),
    _case("window_sinks_tall", hq=1, m=163, n=63, masks=("window_sinks",), alignment="bottom_right", return_lse=True),
    _case("window_sinks_far", hq=1, m=163, n=33, masks=("window_many_sinks",), alignment="top_left", return_lse=True),
    _case("window_sinks_lengths", b=3, hq=1, m=97, masks=("window_many_sinks", "lengths_q"), unseen_nan=True),
    _case("window_sinks_twice", hq=1, masks=("window_sinks", "window_many_sinks")),
    _case("blocks", "core half", hq=1, m=203, masks=("blocks",)),
    _case("blocks_heads", hq=4, hkv=2, m=33, n=65, masks=("blocks_heads",), return_lse=True),
    _case("blocks_batch", b=2, hq=1, m=113, n=97, masks=("blocks_batch",), unseen_nan=True),
    _case("blocks_causal", hq=1, m=163, masks=("blocks",), causal=True),
    _case("blocks_of_two_sizes", b=2, m=63, n=65, masks=("blocks_batch", "blocks_heads", "random_1hmn")),
    _case("pattern_everything", b=2, hq=1, m=63, masks=("runs", "blocks_heads", "window_many_sinks")),
    # tensor masks
    *(_case(f"mask_{x}", b=2, m=63, n=97, masks=(f"random_{x}",)) for x in MASK_SHAPES),
    _case("mask_causal", "core half", masks=("random_11mn",), causal=True, hq=1),
    _case("masked_rows", "core half", masks=("some_rows",), return_lse=True),
    _case("masked_rows_bias", hq=1, bias="bhmn", bias_mask="some_rows", return_lse=True),
    _case("masked_everywhere", m=63, masks=("nothing",), return_lse=True, bias="1hmn", softcap=5.0),
    # A float mask with a finite minimum: all weights of such a row are equal, in float64 too.
    _case("masked_rows_finite", "core", hq=1, bias="bhmn", bias_mask="some_rows", bias_low=-3e38, return_lse=True,
          dtypes=(torch.bfloat16, *FLOAT_ONLY)),
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
    _case("bias_dense_blocks", hq=1, m=113, bias="1hmn", masks=("blocks",)),
    _case("bias_shared_runs", b=2, m=63, n=65, bias="11mn", masks=("runs_cross",), unseen_nan=True),
    _case("bias_columns_window_sinks", b=2, hq=1, m=97, bias="b11n", masks=("window_sinks",)),
    _case("alibi_h", "core half", alibi="h"),
    _case("alibi_bh", b=2, hq=2, m=63, alibi="bh", causal=True),
    _case("alibi_window_sinks", hq=1, alibi="h", masks=("window_sinks",), softcap=3.0),
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
    _case("dropout_runs", hq=1, m=97, dropout_p=0.3, masks=("runs",), sink=True, return_lse=True),
    _case("dropout_gqa_causal", hq=4, hkv=2, dropout_p=0.6, causal=True),
    _case("everything", "core half", **EVERYTHING),
    _case("everything_tensor", softcap_tensor=True, scale_tensor="h", **EVERYTHING),
    # scores and normalizers
    *(
        _case(f"{score}{suffix}", tags, score=score, **(more | options))
        for score, options in SCORE_CASES.items()
        for suffix, tags, more in (
            ("", "core half", {"m": 63, "n": 97}),
            ("_causal_gqa", "", {"b": 2, "hq": 4, "hkv": 2, "m": 33, "n": 65, "causal": True, "window": (40, None),
                                 "alignment": "top_left", "return_lse": True, "sink": True, "unseen_nan": True}),
            ("_modified", "", {"m": 63, "n": 65, "scale_tensor": "h", "bias": "1hmn", "alibi": "h", "dropout_p": 0.2,
                               "masks": ("random_b11n",), "alignment": "top_left"}),
            ("_sigmoid", "", {"b": 2, "m": 63, "n": 65, "d": 40, "dv": 24, "normalizer": "sigmoid",
                              "masks": ("lengths",), "unseen_nan": True}),
        )
    ),
    _case("bilinear_shared", "half", score="bilinear", parameter="dc", dk=40, hq=4, hkv=2, m=33),
    _case("cosine_float", score="cosine", parameter=5.0, hq=1, m=63),
    _case("cosine_scalar", score="cosine", parameter="", m=63, softcap=2.0, normalizer="softmax1"),
    _case("cosine_zeros", score="cosine", parameter="h", m=63, values="zero_rows"),
    _case("cosine_huge", "half", score="cosine", parameter="h", m=63, values="huge_rows",
          dtypes=(torch.bfloat16, *FLOAT_ONLY)),
    _case("distance_float", score="distance", parameter=3.0, hq=1, m=63),
    _case("distance_scalar", score="distance", parameter="", hq=4, hkv=2, m=33, n=65, return_lse=True),
    _case("distance_bias_rows", score="distance", parameter="h", m=63, bias="bhm1", normalizer="sigmoid"),
    _case("additive_shared", "half", score="additive", parameter="d", hq=4, hkv=2, m=33, n=65, d=16),
    _case("additive_odd", score="additive", parameter="hd", hq=1, d=5, m=33, n=65),
    _case("additive_softcap", score="additive", parameter="hd", m=33, n=65, d=8, softcap=2.0, softcap_tensor=True,
          scale_tensor=""),
    _case("additive_saturated", "half", score="additive", parameter="d", m=33, n=65, d=8, values="cancelling"),
    _case("additive_edge", "half", score="additive", parameter="d", m=33, n=65, d=8, values="edge"),
    _case("additive_runs", score="additive", parameter="d", b=2, hq=1, m=41, n=49, d=6, masks=("runs_cross",)),
    _case("additive_window_sinks", score="additive", parameter="hd", hq=2, hkv=1, m=65, d=6, masks=("window_sinks",),
          bias="1hmn"),
    _case("additive_bias_shared", score="additive", parameter="d", b=2, m=33, n=65, d=8, bias="11mn"),
    _case("additive_bias_columns", score="additive", parameter="d", b=2, m=33, n=65, d=8, bias="1h1n"),
    *(_case(f"only_parameter_{score}", needs=("parameter",), score=score, m=33, **options)
      for score, options in SCORE_CASES.items()),
    _case("softmax1", "core half", normalizer="softmax1", m=63),
    _case("softmax1_masked_rows", "half", normalizer="softmax1", masks=("some_rows",), return_lse=True),
    _case("softmax1_negative", normalizer="softmax1", values="negative", m=63, hq=1, return_lse=True),
    _case("sigmoid", "core half", normalizer="sigmoid", m=63),
    _case("sigmoid_causal", normalizer="sigmoid", causal=True, hq=4, hkv=2, b=2, m=63, n=97, alignment="bottom_right"),
    _case("sigmoid_masked_rows", normalizer="sigmoid", masks=("some_rows",), softcap=3.0, softcap_tensor=True),
    _case("sigmoid_masked_rows_bias", normalizer="sigmoid", hq=1, bias="bhmn", bias_mask="some_rows"),
    _case("sigmoid_modified", normalizer="sigmoid", b=2, m=63, n=97, bias="b11n", alibi="h", scale_tensor="h",
          dropout_p=0.3, alignment="top_left"),
    _case("sigmoid_runs", normalizer="sigmoid", b=2, hq=1, masks=("runs_cross",), unseen_nan=True),
    _case("sigmoid_window_sinks", normalizer="sigmoid", hq=1, masks=("window_sinks",), bias="1hmn"),
    _case("sigmoid_bias_rows", normalizer="sigmoid", b=2, m=63, bias="bhm1", window=(9, 4)),
    _case("sigmoid_bias_one", normalizer="sigmoid", b=2, m=63, bias="1h11", masks=("some_rows",)),
    *_family("sigmoid", "values", ("very_negative", "nan_q", "nan_k", "nan_v"), m=97, normalizer="sigmoid", hq=1),
    *_family("additive", "values", ("nan_q", "nan_k", "nan_v", "inf_q"), score="additive", parameter="d", m=33, hq=1,
             d=8),
    # ragged batches
    _case("ragged", "core half", lengths=RAGGED),
    _case("ragged_self", "half", hq=4, hkv=2, lengths=SELF, causal=True, alignment="bottom_right"),
    _case("ragged_one", hq=1, lengths=((63, 97),)),
    _case("ragged_empty", lengths=((0, 0), (0, 7), (5, 0), (0, 0)), return_lse=True, sink=True),
    _case("ragged_bottom_right", "core", lengths=RAGGED, causal=True, alignment="bottom_right", return_lse=True,
          unseen_nan=True),
    _case("ragged_top_left", lengths=RAGGED, causal=True, alignment="top_left", unseen_nan=True),
    _case("ragged_window", hq=1, lengths=RAGGED, window=(17, 5), alignment="bottom_right", alibi="bh", unseen_nan=True),
    _case("ragged_window_top_left", hq=1, lengths=RAGGED, window=(30, 3), alignment="top_left", alibi="h"),
    _case("ragged_sinks", lengths=RAGGED, masks=("window_sinks",), alignment="bottom_right", return_lse=True),
    *(_case(f"ragged_{mask}", hq=2, lengths=SELF, alignment="top_left", return_lse=True, masks=(mask,))
      for mask in ("lengths", "lengths_q", "prefix", "segments", "runs", "blocks", "random_bhmn", "random_b11n")),
    *_family("ragged_bias", "bias", ("bhmn", "1hmn", "b11n", "bhm1", "1h11"), lengths=RAGGED, dropout_p=0.2),
    _case("ragged_everything", "core half", lengths=RAGGED, **{x: EVERYTHING[x] for x in EVERYTHING if x not in "bmn"}),
    _case("ragged_everything_tensor", lengths=RAGGED, softcap_tensor=True, scale_tensor="h",
          **{x: EVERYTHING[x] for x in EVERYTHING if x not in "bmn"}),
    _case("ragged_sigmoid", lengths=RAGGED, normalizer="sigmoid", causal=True, alignment="bottom_right", bias="bhm1"),
    *(
        _case(f"ragged_{score}", "half" if score == "additive" else "", lengths=SHORT, score=score, causal=True,
              alignment="bottom_right", unseen_nan=True, **SCORE_CASES[score])
        for score in SCORE_CASES
    ),
    _case("ragged_additive_modified", lengths=SHORT, score="additive", parameter="d", d=6, hq=4, hkv=2, alibi="bh",
          alignment="top_left", bias="1hmn", masks=("runs_cross",), softcap=3.0, softcap_tensor=True, scale_tensor="h"),
    _case("ragged_gaps", b=1, lengths=SELF, memory="strided", dout="transposed"),
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
    _case("values_huge_equal", "half", values="huge_equal", m=97, hq=1, d=16, return_lse=True,
          dtypes=(torch.bfloat16, *FLOAT_ONLY)),
    _case("values_very_negative", "core", values="very_negative", m=97, hq=1, return_lse=True),
    *_family("values", "values", ("nan_q", "nan_k", "nan_v", "inf_q"), m=97, return_lse=True),
    # which tensors require grad
    *(_case(f"only_{x}", needs=(x,), b=2, m=63, bias="b11n", sink=True, softcap=3.0, softcap_tensor=True,
            scale_tensor="h", alibi="h") for x in LEAVES if x != "parameter"),
    _case("no_gradient", needs=(), m=63),
)  # fmt: skip


def named(case: Case | str) -> Case:
    """A case, or the one of this name in `CASES`."""
    if isinstance(case, Case):
        return case
    if case not in CASES:
        close = ", ".join(difflib.get_close_matches(str(case), CASES))
        raise ValueError(f"case: expected a Case or a key of CASES, got {case!r}{close and f'; close to {close}'}")
    return CASES[case]
