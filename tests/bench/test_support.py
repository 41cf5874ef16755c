"""The support matrix: it matches the code, refusals raise, and supported pairs give right results."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

import fused_attn
from bench import support
from bench.support import FACTORS, YES, Feature, Pair
from fused_attn import testing

covertable = pytest.importorskip("covertable")
pytest.importorskip("triton")

COMMITTED = support.read()
# Every refusal of two of these features together, and the argument that the error names.
REFUSED: dict[Pair, str] = {
    (("normalizer", "softmax1"), ("sink", "h")): "sink",
    (("normalizer", "sigmoid"), ("sink", "h")): "sink",
    (("normalizer", "sigmoid"), ("lse", "with gradient")): "return_lse",
    (("score", "distance"), ("softcap", "float")): "softcap",
    (("score", "distance"), ("softcap", "tensor")): "softcap",
}
# Backends that take everything else, but for the features beside them.
COMPLETE: dict[str, set[Feature]] = {"triton": {("dtype", "float64")}, "tiled": set(), "reference": set()}
TESTED = (*COMPLETE, "sdpa")


def taken(backend: str) -> set[Pair]:
    return {pair for pair, answers in COMMITTED.items() if answers[backend] == YES}


def covering(backend: str) -> list[dict[str, str]]:
    """Rows that hold every pair which a backend takes, and none that it does not."""
    pairs = taken(backend)
    alone = {feature for pair in pairs for feature in pair}
    factors = {x: [value for value in values if (x, value) in alone] for x, values in FACTORS.items()}
    pruned = [
        {"operator": "not", "condition": {"operator": "and", "conditions": [
            {"operator": "eq", "left": factor, "value": value} for factor, value in pair]}}
        for pair in COMMITTED if set(pair) <= alone and pair not in pairs
    ]  # fmt: skip
    return [{x: row[x] for x in FACTORS} for row in covertable.make(factors, constraints=pruned)]


ROWS = {backend: covering(backend) for backend in ("triton", "tiled", "sdpa")}
ROWS["reference"] = ROWS["tiled"]


def test_committed_matrix_is_current() -> None:
    with support.TABLE.open() as file:
        written = file.read()
    assert support.spelled(support.matrix()) == written, "run python -m bench.support"


@pytest.mark.parametrize("backend", COMPLETE)
def test_refusals_are_listed(backend: str) -> None:
    refused = set(COMMITTED) - taken(backend)
    assert set(REFUSED) <= refused <= {x for x in COMMITTED if x in REFUSED or COMPLETE[backend] & set(x)}


@pytest.mark.parametrize("backend", TESTED)
def test_rows_hold_every_pair(backend: str) -> None:
    held = {pair for row in ROWS[backend] for pair in itertools.combinations(row.items(), 2)}
    assert taken(backend) <= held


@pytest.mark.parametrize("backend", support.BACKENDS)
@pytest.mark.parametrize("pair", REFUSED, ids=lambda pair: " ".join("-".join(x) for x in pair))
def test_refused_combinations_raise(pair: Pair, backend: str) -> None:
    """The public call names the argument, whichever backend was asked for."""
    inputs = testing.make_inputs(*support.case(dict(pair)))
    with pytest.raises(ValueError, match=f"^{REFUSED[pair]}: "):
        fused_attn.attention(*inputs.qkv, **inputs.kwargs, backend=backend)


@pytest.mark.parametrize(
    ("backend", "number"), [pytest.param(x, n, id=f"{x}-{n}") for x in TESTED for n in range(len(ROWS[x]))]
)
@pytest.mark.usefixtures("nan_outputs")
def test_row(backend: str, number: int) -> None:
    """Forward and every gradient. Keys that no row sees hold NaN, which torch's own operator would clean."""
    case, dtype = support.case(ROWS[backend][number])
    testing.check_parity(replace(case, unseen_nan=backend != "sdpa"), backend, dtype)
