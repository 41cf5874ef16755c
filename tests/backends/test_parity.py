"""Every backend against every case, forward and every gradient, by the one tolerance rule."""

from __future__ import annotations

import doctest
import inspect
from importlib import import_module

import pytest
import torch

import fused_attn
from fused_attn import testing
from fused_attn.testing import CASES

HALF = (torch.float16, torch.bfloat16)
BACKENDS = ("triton", "sdpa", "tiled", "reference")
# Cases that the sdpa backend must take.
SDPA = (
    "plain",
    "one_query",
    "tall",
    "wide",
    "gqa_3",
    "head_dim_5",
    "causal",
    "causal_203",
    "values_ramps",
    "ragged",
    "ragged_self",
)


def varies_memory(case: testing.Case) -> bool:
    """The reference can fail here although it is its own oracle, which is given dense tensors without padding."""
    return case.unseen_nan or case.memory != "gaps" or case.layout != "bhsd"


def _daily_half(case: testing.Case) -> list[torch.dtype]:
    """One of the half types that the case takes, the cases in turn."""
    halves = [x for x in HALF if x in case.dtypes]
    return halves and [halves[list(CASES).index(case.name) % len(halves)]]


def _dtypes(backend: str, case: testing.Case) -> list[torch.dtype]:
    """Half precision by tag. The reference computes it in float32; its oracle, and what E is taken from, do not."""
    if backend == "reference":
        wanted = [torch.float32] * varies_memory(case) + _daily_half(case) * ("half" in case.tags)
    else:
        wanted = [torch.float32, *(HALF if "half" in case.tags else ())]
        wanted += [torch.float64] if backend == "tiled" else []
    return [dtype for dtype in wanted if dtype in case.dtypes]


def _under_36(case: testing.Case, dtype: torch.dtype) -> bool:
    """The subset that an older triton runs as well: bfloat16 where it is repaired, everything else in float32."""
    return "core" in case.tags and (dtype == torch.float32 or (dtype == torch.bfloat16 and case.name == "everything"))


# Long in the interpreter, and a combination of what other cases have.
LONG = {
    "additive_bias_columns", "additive_bias_shared", "everything_tensor", "only_parameter_additive",
    "ragged_bias_bhmn", "ragged_bias_b11n", "ragged_bias_bhm1", "ragged_everything_tensor",
}  # fmt: skip


def _marks(backend: str, case: testing.Case, dtype: torch.dtype) -> list[pytest.MarkDecorator]:
    """Interpreted half precision costs most: each case runs daily in one of its types."""
    if backend != "triton":
        return []
    found = [pytest.mark.triton36] if _under_36(case, dtype) else []
    nightly = case.name in LONG or (dtype in HALF and dtype not in _daily_half(case))
    return [*found, pytest.mark.nightly] if nightly else found


PARAMETERS = [
    pytest.param(
        backend,
        name,
        dtype,
        id=f"{backend}-{name}-{str(dtype).removeprefix('torch.')}",
        marks=_marks(backend, case, dtype),
    )
    for backend in BACKENDS
    for name, case in CASES.items()
    for dtype in _dtypes(backend, case)
    if not (backend == "triton" and "large" in case.tags)
]


@pytest.mark.parametrize(("backend", "name", "dtype"), PARAMETERS)
@pytest.mark.usefixtures("nan_outputs")
def test_attention(backend: str, name: str, dtype: torch.dtype) -> None:
    """Forward and every gradient; skipped exactly where why_not speaks, after the call has said the same."""
    reasons = testing.why_not(name, backend, dtype)
    if reasons:
        with pytest.raises(fused_attn.BackendError) as refusal:
            testing.run_public(testing.make_inputs(name, dtype), backend)
        assert all(reason in str(refusal.value) for reason in reasons)
        pytest.skip(reasons[0])
    testing.check_parity(name, backend, dtype)


@pytest.mark.parametrize("backend", ("tiled", "reference"))
def test_torch_backends_support_every_case(backend: str) -> None:
    """The PyTorch backends take every case; a skip above would otherwise hide a backend that runs nothing."""
    assert {name: why for name in CASES if (why := testing.why_not(name, backend))} == {}


def test_triton_supports_every_case() -> None:
    pytest.importorskip("triton")
    assert {name: why for name in CASES if (why := testing.why_not(name, "triton"))} == {}


@pytest.mark.parametrize("name", SDPA)
def test_sdpa_takes_the_plain_cases(name: str) -> None:
    assert testing.why_not(name, "sdpa") == []


# ------------------------------------------------------------------------------------------ the rule itself can fail


@pytest.mark.parametrize("name", ("out", "q", "k", "v", "sink", "bias", "slopes", "lse"))
def test_small_errors_exceed_the_budget(name: str) -> None:
    """One part in two thousand of one element of one result, in float32."""
    inputs = testing.make_inputs("everything")
    expected = testing.expect(inputs)
    got = testing.run_public(inputs, "reference")
    testing.compare(inputs, got, expected, "right")
    flat = got[name].detach().clone().reshape(-1)
    worst = flat.nan_to_num(posinf=0, neginf=0).abs().argmax()
    flat[worst] *= 1.0005
    got[name] = flat.view(got[name].shape)
    with pytest.raises(AssertionError, match=name):
        testing.compare(inputs, got, expected, "wrong")


@pytest.mark.parametrize(
    ("bad", "message"),
    ((torch.nan, "got nan, expected"), (torch.inf, "got inf"), (1e-12, "budget 0")),
)
def test_nan_infinity_and_nonzero_are_detected(bad: float, message: str) -> None:
    oracle = torch.zeros(4, dtype=torch.float64)
    got = torch.tensor([0.0, 0.0, bad, 0.0])
    with pytest.raises(AssertionError, match=message):
        testing.assert_within_budget("out", got, oracle, oracle.float(), oracle, torch.float32)


def test_wrong_shape_is_detected() -> None:
    oracle = torch.ones(4, 1, dtype=torch.float64)
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_within_budget("out", torch.ones(4), oracle, oracle, oracle, torch.float32)


def test_writes_outside_of_outputs_are_detected() -> None:
    inputs = testing.make_inputs("plain")
    inputs.check_untouched()
    inputs.buffers[0][0][-1] = 0.0
    with pytest.raises(AssertionError, match="written to"):
        inputs.check_untouched()


def test_inputs_hold_nan_outside() -> None:
    """The inputs of a case hold NaN around every tensor and in unseen keys."""
    inputs = testing.make_inputs("lengths")
    assert inputs.tensors["k"].isnan().any() and not inputs.clean["k"].isnan().any()
    for name in "qkv":
        home = inputs.tensors[name]
        assert home.storage_offset() == 0 and home.untyped_storage().nbytes() > home.numel() * home.element_size()
    assert testing.make_inputs("memory_corrupt").tensors["q"].stride(0) > 2**33


def test_unknown_case() -> None:
    with pytest.raises(ValueError, match=r"case: expected .*got 'causl'; close to causal,"):
        testing.check_parity("causl", "tiled")


def test_every_modifier_has_a_case() -> None:
    """Each keyword of `attention` but backend differs from its default in a case."""
    wanted = {
        x.name: x.default
        for x in inspect.signature(fused_attn.attention).parameters.values()
        if x.kind == x.KEYWORD_ONLY and x.name != "backend"
    }
    used = set()
    for name, case in CASES.items():
        if "large" not in case.tags and "ragged" not in name:
            given = testing.make_inputs(name).kwargs
            used |= {x for x, value in given.items() if isinstance(value, torch.Tensor) or value != wanted[x]}
    assert used == wanted.keys()


def test_memory_holds_nan(nan_outputs: None) -> None:
    assert torch.empty(3).isnan().all() and torch.ones(3).new_empty(2).isnan().all()


@pytest.mark.parametrize("module", ("", ".cases", ".inputs", ".parity", ".tolerance"))
def test_examples(module: str) -> None:
    assert doctest.testmod(import_module(f"fused_attn.testing{module}"), raise_on_error=True).attempted >= 2
