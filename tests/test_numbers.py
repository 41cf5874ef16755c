"""Numbers and flags: Python's, numpy's of any width and 0-d tensors are taken; anything else is refused by name."""

from __future__ import annotations

import decimal
import fractions
from typing import Any

import numpy as np
import pytest
import torch

from fused_attn.checks import as_bool, as_float, as_int


class Index:
    """An integer of another library."""

    def __index__(self) -> int:
        return 3


class Real:
    """A float of another library."""

    def __float__(self) -> float:
        return 3.0


INTEGERS = [
    3,
    np.int8(3),
    np.uint16(3),
    np.int64(3),
    np.uint64(3),
    np.array(3),
    torch.tensor(3),
    torch.tensor(3, dtype=torch.uint8),
    Index(),
]
FLOATS = [
    3.0,
    np.float16(3),
    np.float32(3),
    np.float64(3),
    np.array(3.0),
    torch.tensor(3.0),
    torch.tensor(3.0).half(),
    fractions.Fraction(3),
    decimal.Decimal(3),
    Real(),
]
NEITHER = [
    None,
    "3",
    True,
    np.True_,
    np.array(True),
    torch.tensor(True),
    [3],
    np.array([3]),
    torch.tensor([3]),
    3j,
    np.complex64(3),
    torch.tensor(3j),
    b"3",
    np.str_("3"),
    np.timedelta64(3),
]


def kind(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__name__}-{getattr(x, 'dtype', '')}-{x}"


@pytest.mark.parametrize("x", INTEGERS, ids=kind)
def test_integers(x: Any) -> None:
    assert as_int("n", x) == 3 and type(as_int("n", x)) is int
    assert as_float("n", x) == 3.0 and type(as_float("n", x)) is float


@pytest.mark.parametrize("x", FLOATS, ids=kind)
def test_floats(x: Any) -> None:
    assert as_float("n", x) == 3.0 and type(as_float("n", x)) is float
    with pytest.raises(TypeError, match="n: expected an int, got"):
        as_int("n", x)


@pytest.mark.parametrize("x", NEITHER, ids=kind)
def test_no_numbers(x: Any) -> None:
    with pytest.raises(TypeError, match="n: expected an int, got"):
        as_int("n", x)
    with pytest.raises(TypeError, match="n: expected a float, got"):
        as_float("n", x)


def test_a_number_has_no_gradient() -> None:
    with pytest.raises(TypeError, match="n: expected a number, which has no gradient"):
        as_float("n", torch.tensor(3.0, requires_grad=True))


@pytest.mark.parametrize("x", [True, np.True_, np.array(True), torch.tensor(True)], ids=kind)
def test_flags(x: Any) -> None:
    assert as_bool("flag", x) is True
    assert as_bool("flag", ~x if not isinstance(x, bool) else False) is False


@pytest.mark.parametrize(
    "x",
    [None, "false", "never", 0, 1, 0.0, [], np.int64(1), np.array([True]), torch.tensor(1), torch.tensor([True])],
    ids=kind,
)
def test_no_flags(x: Any) -> None:
    with pytest.raises(TypeError, match="flag: expected a bool, got"):
        as_bool("flag", x)


@pytest.mark.parametrize("x", [np.zeros((100, 100)), list(range(1000)), "x" * 1000], ids=["array", "list", "str"])
def test_messages_hold_no_whole_array(x: Any) -> None:
    with pytest.raises(TypeError, match=r"^n: expected a float, got ") as error:
        as_float("n", x)
    assert len(str(error.value)) < 150
