"""Which features go together, and on which backends: every pair of them, as binding and each `why_not` say.

    python -m bench.support            bench/results/support.csv, from which bench.report writes the guide's part

No kernel runs. tests/bench/test_support.py checks the answers: its rows hold every pair that a backend takes, and each
row is held to the tolerance rule, forward and every gradient. A GPU is not needed either: `triton` is asked as its
interpreter would be, with bfloat16 repaired, and `hopper` as if the GPU were there; no row tests the answers of that
one.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch

from bench.harness.table import RESULTS
from fused_attn import testing
from fused_attn.backends.triton import hopper, settings
from fused_attn.runtime import dispatch
from fused_attn.spec.problem import DTYPES, NORMALIZERS
from fused_attn.testing import Case

TABLE = RESULTS / "support.csv"
BACKENDS = dispatch.BACKENDS
YES = "yes"

# What each factor can be, the plainest value first, and what that is to a Case; shapes are spelled in letters.
SIZES: dict[str, Any] = {"b": 2, "m": 33, "n": 65, "d": 64, "dv": 64, "alignment": "top_left"}
FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "score": {
        "dot": {},
        "bilinear": {"score": "bilinear", "parameter": "hdc", "d": 40, "dk": 64},
        **{name: {"score": name, "parameter": "h"} for name in ("cosine", "distance")},
        "additive": {"score": "additive", "parameter": "hd", "d": 16, "dv": 16},  # fewer features, for interpreters
    },
    "normalizer": {name: {"normalizer": name} for name in NORMALIZERS},
    "mask": {
        "none": {},
        "causal": {"causal": True},
        "window": {"window": (12, 5), "alignment": "bottom_right"},
        "lengths": {"masks": ("lengths",)},
        "prefix": {"masks": ("prefix",), "alignment": "bottom_right"},
        "segments": {"masks": ("segments_cross",)},
        "unsorted segments": {"masks": ("runs_cross",)},
        "window with sinks": {"masks": ("window_sinks",), "alignment": "bottom_right"},
        "blocks": {"masks": ("blocks_heads",)},
        "tensor": {"masks": ("random_bhmn",)},
        "causal & lengths & tensor": {"causal": True, "masks": ("lengths", "random_b11n"), "alignment": "bottom_right"},
    },
    "bias": {"none": {}, **{letters: {"bias": letters} for letters in ("bhmn", "1hmn", "11mn", "b11n", "bhm1")}},
    "alibi": {"none": {}, "h": {"alibi": "h"}, "bh": {"alibi": "bh"}},
    "softcap": {"none": {}, "float": {"softcap": 2.0}, "tensor": {"softcap": 2.0, "softcap_tensor": True}},
    "sink": {"none": {}, "h": {"sink": True}},
    "dropout": {"none": {}, "0.3": {"dropout_p": 0.3}},
    "group": {"1": {"hq": 2, "hkv": 2}, "3": {"hq": 3, "hkv": 1}},
    "Dv": {"D": {}, "other": {"dv": 48}},
    "scale": {"float": {}, "tensor": {"scale_tensor": ""}, "h": {"scale_tensor": "h"}},
    "lse": {"no": {}, "with gradient": {"return_lse": True}},
    "dtype": {str(x).removeprefix("torch."): {"dtype": x} for x in sorted(DTYPES, key=lambda x: x != torch.bfloat16)},
    "layout": {"bhsd": {}, "bshd": {"layout": "bshd"}, "packed": {"lengths": ((33, 20), (0, 4), (5, 0), (20, 65))}},
}

Feature = tuple[str, str]  # a factor and what it is
Pair = tuple[Feature, Feature]


def plain() -> dict[str, str]:
    """Each factor at its plainest."""
    return {factor: next(iter(values)) for factor, values in FACTORS.items()}


def features() -> list[Feature]:
    return [(factor, value) for factor, values in FACTORS.items() for value in values]


def pairs() -> Iterator[Pair]:
    """Every two features of different factors."""
    return ((a, b) for a, b in itertools.combinations(features(), 2) if a[0] != b[0])


def case(row: dict[str, str]) -> tuple[Case, torch.dtype]:
    """The problem that has these features and is plain beside them, named by what is not."""
    base, fields = plain(), dict(SIZES)
    for factor, value in (base | row).items():
        fields |= FACTORS[factor][value]
    named = [f"{factor} {value}" for factor, value in row.items() if value != base[factor]]
    dtype = fields.pop("dtype")
    return Case(", ".join(named) or "plain", **fields), dtype


def answers(row: dict[str, str]) -> dict[str, str]:
    """What each backend says of a problem with these features: YES, or why not."""
    try:
        p = testing.make_inputs(*case(row)).problem()
    except ValueError as refusal:
        return dict.fromkeys(BACKENDS, str(refusal))
    lowered = p.lower()
    with (
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),
        mock.patch.object(settings, "multiplies_bit_patterns", lambda: False),
        mock.patch.object(hopper, "_machine", lambda device: []),
    ):
        reasons = {name: dispatch.why_not(name, dispatch.taken(name, p, lowered), True, None) for name in BACKENDS}
    return {name: "; ".join(why) or YES for name, why in reasons.items()}


def matrix() -> list[dict[str, str]]:
    """A row for each pair."""
    return [{"first": "=".join(a), "second": "=".join(b), **answers(dict((a, b)))} for a, b in pairs()]


def read() -> dict[Pair, dict[str, str]]:
    """The committed answers by pair."""
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {(_feature(row.pop("first")), _feature(row.pop("second"))): row for row in rows}


def _feature(text: str) -> Feature:
    factor, _, value = text.partition("=")
    return factor, value


def spelled(rows: Iterable[dict[str, str]]) -> str:
    """Rows as the file's text."""
    text = io.StringIO()
    table = csv.DictWriter(text, ("first", "second", *BACKENDS), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m bench.support", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    TABLE.write_text(spelled(matrix()))
    print(TABLE)
