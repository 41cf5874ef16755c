"""Rows whose scores are all very large or very small keep the log of their sum beside the maximum.

A mask that fills rows with a finite minimum, as BERT's does, and equal logits from 4e4 to 1e10 are where one rounded
float32 log-sum-exp is off by more than the log of the number of keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn import attention_decode, attention_map, attention_stats, testing
from fused_attn.backends.triton import hopper
from fused_attn.testing.cases import Case
from fused_attn.tuning import Config, override

BACKENDS = ("reference", "tiled", "triton")
LOWEST = torch.finfo(torch.float32).min
FILLED = (-1e4, -1e9, LOWEST)
EQUAL = (100.0, 1024.0, 65536.0)  # whose squares, times 4, are 4e4, 4e6 and 1.7e10; all products and sums are exact
TINY = {"hq": 2, "hkv": 1, "m": 5, "n": 9, "d": 16, "return_lse": True}
Fill = float | Callable[[Tensor], Any]


def prepared(case: Case, dtype: torch.dtype, **fills: Fill) -> testing.Inputs:
    """A case's inputs, some of them filled with a number or changed in place."""
    inputs = testing.make_inputs(case, dtype)
    with torch.no_grad():
        for name, fill in fills.items():
            for x in (inputs.tensors[name], inputs.clean[name]):
                fill(x) if callable(fill) else x.fill_(fill)
    return inputs


def judge(backend: str, case: Case, dtype: torch.dtype = torch.float32, **fills: Fill) -> dict[str, Tensor]:
    """out, lse and every gradient of a case, held to the one rule; skipped exactly where why_not speaks."""
    if reasons := testing.why_not(case, backend, dtype):
        pytest.skip(reasons[0])
    inputs = prepared(case, dtype, **fills)
    got = testing.run_public(inputs, backend)
    testing.compare(inputs, got, testing.expect(inputs), case.name)
    return got


def rows(value: float) -> Fill:
    """Of every three rows of a bias the second is filled, and the third but for its last two keys."""

    def fill(x: Tensor) -> None:
        x[..., 1::3, :] = value
        x[..., 2::3, :-2] = value

    return fill


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", FILLED)
def test_rows_filled_with_a_finite_minimum(backend: str, value: float) -> None:
    """Rows that a bias fills with a finite minimum, wholly or partly, beside ordinary ones."""
    judge(backend, Case("filled", **TINY, bias="1hmn"), bias=rows(value))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "value"), ((torch.float64, LOWEST), (torch.bfloat16, -3e38), (torch.float16, -6e4)),
                         ids=str)  # fmt: skip
def test_rows_filled_with_a_finite_minimum_in_other_dtypes(backend: str, dtype: torch.dtype, value: float) -> None:
    judge(backend, Case("filled", **TINY, bias="1hmn"), dtype, bias=rows(value))


FORMS: dict[str, dict[str, Any]] = {
    "shared": {"bias": "11mn", "b": 2},
    "one_value_a_row": {"bias": "1hm1"},
    "one_value_a_key": {"bias": "1h1n", "causal": True, "alignment": "bottom_right"},
    "sink": {"bias": "1hmn", "sink": True},
    "masked": {"bias": "1hmn", "masks": ("random_11mn",)},
    "dropout": {"bias": "1hmn", "dropout_p": 0.3},
    "softcap_alibi": {"bias": "1hmn", "softcap": 2.0, "alibi": "h", "alignment": "top_left"},
    "additive": {"bias": "1hmn", "score": "additive", "parameter": "hd"},
    "ragged": {"bias": "bhmn", "lengths": ((5, 9), (0, 3), (4, 0), (3, 7))},
}


@pytest.mark.parametrize("backend", ("tiled", "triton"))
@pytest.mark.parametrize("form", FORMS)
def test_rows_filled_with_a_finite_minimum_beside_modifiers(backend: str, form: str) -> None:
    """What else reads the normaliser: every kernel of the backward, sinks, and ragged batches."""
    judge(backend, Case(form, **TINY | FORMS[form]), bias=rows(LOWEST) if form != "one_value_a_key" else LOWEST)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", EQUAL)
def test_equal_logits(backend: str, value: float) -> None:
    """Every weight is 1 / N: each row's gradient reaches each value by that part."""
    case = Case("equal", **TINY | {"hq": 4, "hkv": 2}, dout="ones")
    found = judge(backend, case, q=value, k=value)
    assert (found["v"] / (2 * 5 / 9) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_equal_logits_in_other_dtypes(backend: str, dtype: torch.dtype) -> None:
    judge(backend, Case("equal", **TINY), dtype, q=100.0, k=100.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("sign", "above"), ((1, 0.0), (-1, 1.0), (1, -(2.0**22)), (-1, 2.0**22)))
def test_equal_logits_and_a_sink(backend: str, sign: int, above: float) -> None:
    """A sink as large as the logits, far below them, or far above; and a row that sees nothing but the sink."""
    logit = sign * 4 * 1024.0**2
    case = Case("sink", **TINY | {"m": 6, "n": 5}, sink=True, causal=True, alignment="bottom_right")
    judge(backend, case, q=1024.0, k=sign * 1024.0, sink=logit + above)


@pytest.mark.parametrize("backend", ("tiled", "triton"))
@pytest.mark.parametrize("fields", ({"scale_tensor": "h"}, {"lengths": ((5, 9), (3, 7), (1, 2))},
                                    {"causal": True, "alignment": "bottom_right"}),
                         ids=("scales", "ragged", "causal"))  # fmt: skip
def test_equal_logits_beside_modifiers(backend: str, fields: dict) -> None:
    fills: dict[str, Fill] = {"q": 1024.0, "k": 1024.0}
    if "scale_tensor" in fields:
        fills["scale"] = 0.25
    judge(backend, Case("equal", **TINY | fields), **fills)


# ----------------------------------------------------------------------------------------------- the parts of a decode


@pytest.mark.parametrize(("value", "sink"), ((100.0, None), (1024.0, 0.0), (65536.0, None)))
def test_split_decoding(value: float, sink: float | None) -> None:
    """However the keys are cut, the last part being shorter, the answer is the mean of the values."""
    keys = 16 * 4 + 3
    q, k = torch.full((1, 2, 2, 16), value), torch.full((1, keys, 1, 16), value)
    v = torch.randn(1, keys, 1, 8, generator=torch.Generator().manual_seed(0))
    options = {"sink": None if sink is None else torch.full((2,), sink), "return_lse": True}
    mean, lse = v.double().mean(1, keepdim=True).expand(1, 2, 2, 8), 4 * value**2 + math.log(keys)
    for backend, splits in (("tiled", None), ("reference", None), *(("triton", n) for n in (1, 2, 5))):
        with override(decode=Config(16, 16, 1, 1)):
            out, found = attention_decode(q, k, v, num_splits=splits, backend=backend, **options)
        assert (out - mean).abs().max() < 1e-6, (backend, splits)
        assert (found / lse - 1).abs().max() < 1e-6


def test_split_decoding_with_unequal_splits() -> None:
    """A part of small logits beside parts of equal large ones, and one that sees nothing: the window ends before it."""
    q, k = torch.full((1, 1, 1, 16), 1024.0), torch.full((1, 80, 1, 16), 1024.0)
    k[:, 40:60] = -1.0
    v = torch.randn(1, 80, 1, 8, generator=torch.Generator().manual_seed(0))
    mean = v[:, :40].double().sum(1) + v[:, 60:].double().sum(1)
    for splits in (1, 2, 5):
        with override(decode=Config(16, 16, 1, 1)):
            out = attention_decode(q, k, v, num_splits=splits, backend="triton")
        assert (out[0, 0] - mean / 60).abs().max() < 1e-6, splits


# --------------------------------------------------------------------------------------------------- statistics, maps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", EQUAL)
def test_statistics(backend: str, value: float) -> None:
    q, k = torch.full((1, 2, 5, 16), value), torch.full((1, 1, 9, 16), value)
    found = attention_stats(q, k, key_mass=True, entropy=True, top_k=2, backend=backend)
    weights = attention_map(q, k, rows=[0, 3], heads=[1], backend=backend)
    for name, x, expected in (("key_mass", found.key_mass, 5 / 9), ("entropy", found.entropy, math.log(9)),
                              ("top_k", found.top_k_weights, 1 / 9), ("map", weights, 1 / 9)):  # fmt: skip
        assert (x / expected - 1).abs().max() < 1e-6, name


# -------------------------------------------------------------------------------------------------------------- sm_90


@pytest.mark.parametrize(("wide", "sink"), ((False, True), (True, False)))
def test_hopper(wide: bool, sink: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Gluon kernels in their emulator, forward and one-pass backward."""
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
    from tests.emulator import emulated
    from tests.kernels.test_hopper import pretend

    pretend(monkeypatch)
    monkeypatch.setattr(hopper, "WIDE", 16 if wide else 1024)
    case = Case("equal", **TINY | {"m": 20, "n": 23, "sink": sink}, deterministic=False)
    fills: dict[str, Fill] = {"q": 65536.0, "k": 65536.0} | ({"sink": 4 * 65536.0**2} if sink else {})
    inputs = prepared(case, torch.bfloat16, **fills)
    p = inputs.problem().lower()
    tiles = {"hopper_forward": Config(16, 16, 4, 2, consumers=2), "hopper_backward": Config(16, 16, 4, 2, consumers=2)}
    with torch.no_grad(), override(**tiles), emulated():
        out, lse, *normaliser = hopper.forward(p)
        grads = hopper.backward(p, out, *normaliser, inputs.dout, inputs.dlse, frozenset(inputs.leaves))
    testing.compare(inputs, {"out": out, "lse": lse} | grads, testing.expect(inputs), case.name)
