"""Numbers and flags: Python's, numpy's of any width and 0-d tensors are accepted; others are refused by name."""

from __future__ import annotations

import decimal
import fractions
from typing import Any

import numpy as np
import pytest
import torch

import fused_attn
from fused_attn.spec.checks import as_bool, as_float, as_int


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
    shown = "" if " at 0x" in repr(x) else x  # an address differs between the processes that share the tests
    return f"{type(x).__module__}.{type(x).__name__}-{getattr(x, 'dtype', '')}-{shown}"


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
def test_values_that_are_no_numbers(x: Any) -> None:
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
def test_values_that_are_no_flags(x: Any) -> None:
    with pytest.raises(TypeError, match="flag: expected a bool, got"):
        as_bool("flag", x)


@pytest.mark.parametrize("x", [np.zeros((100, 100)), list(range(1000)), "x" * 1000], ids=["array", "list", "str"])
def test_error_messages_shorten_arrays(x: Any) -> None:
    with pytest.raises(TypeError, match=r"^n: expected a float, got ") as error:
        as_float("n", x)
    assert len(str(error.value)) < 150


# ---------------------------------------- at the public functions

STARTS = torch.tensor([0, 2, 6], dtype=torch.int32)


def dense(**options: Any) -> Any:
    q, k, v = (torch.arange(2 * 6 * 4).reshape(1, 2, 6, 4).sin() * x for x in (1, 2, 3))
    return fused_attn.attention(q, k, v, **options)


def packed(**options: Any) -> Any:
    q, k, v = (torch.arange(6 * 2 * 4).reshape(6, 2, 4).sin() * x for x in (1, 2, 3))
    return fused_attn.attention_varlen(q, k, v, STARTS, STARTS, **options)


def wrapper(**options: Any) -> Any:
    x = torch.arange(2 * 6 * 4).reshape(1, 2, 6, 4).sin()
    return fused_attn.scaled_dot_product_attention(x, x, x, **options)


def statistics(**options: Any) -> Any:
    x = torch.arange(2 * 6 * 4).reshape(1, 2, 6, 4).sin()
    return fused_attn.attention_stats(x, x, **{"entropy": True} | options)


def weights(**options: Any) -> Any:
    x = torch.arange(2 * 6 * 4).reshape(1, 2, 6, 4).sin()
    return fused_attn.attention_map(x, x, **options)


def explained(**options: Any) -> Any:
    x = torch.arange(2 * 6 * 4).reshape(1, 2, 6, 4).sin()
    return fused_attn.explain(x, x, x, **options)


def warmed(**options: Any) -> Any:
    return fused_attn.warmup([(1, 2, 2, 4, 4, 4)], dtypes=[torch.float32], device="cpu", **options)


CALLS = {f.__name__: f for f in (dense, packed, wrapper, statistics, weights, explained, warmed)}
ALL = ("dense", "packed", "wrapper", "statistics", "weights", "explained", "warmed")
GIVEN: list[tuple[str, Any, Any, tuple[str, ...]]] = [
    ("scale", 0.5, np.float32(0.5), ALL),
    ("scale", 2.0, np.int16(2), ALL),
    ("scale", 0.5, np.array(0.5), ALL),
    ("softcap", 2.0, np.float64(2), ALL),
    ("window", (2, 1), (np.int64(2), torch.tensor(1)), ALL),
    ("causal", True, np.True_, ("dense", "packed", "statistics", "weights", "explained", "warmed")),
    ("causal", True, torch.tensor(True), ("dense", "packed")),
    ("is_causal", True, np.True_, ("wrapper",)),
    ("dropout_p", 0.25, np.float32(0.25), ("dense", "packed")),
    ("dropout_p", 0.25, torch.tensor(0.25), ("dense", "packed")),
    ("return_lse", True, np.True_, ("dense", "packed")),
    ("deterministic", False, np.False_, ("dense", "packed")),
    ("max_seqlen_q", 6, np.int32(6), ("packed",)),
    ("top_k", 2, np.uint8(2), ("statistics",)),
    ("max_logit", True, np.True_, ("statistics",)),
    ("rows", [0, -1], [np.int64(0), torch.tensor(-1)], ("weights",)),
    ("heads", [1], torch.tensor([1], dtype=torch.uint8), ("weights",)),
]


def flat(x: Any) -> list[Any]:
    parts = x if isinstance(x, tuple) else (x,)
    return [x.tolist() if isinstance(x, torch.Tensor) else str(x) for x in parts]


@pytest.mark.parametrize(("name", "python", "other", "calls"), GIVEN, ids=lambda x: x if isinstance(x, str) else "")
def test_numbers_of_any_kind(name: str, python: Any, other: Any, calls: tuple[str, ...]) -> None:
    always = {"seed": np.int64(3)} if name == "dropout_p" else {}
    for call in calls:
        expected = flat(CALLS[call](**{name: python}, **always | ({"seed": 3} if always else {})))
        assert flat(CALLS[call](**{name: other}, **always)) == expected, call


REFUSED: list[tuple[str, Any, tuple[str, ...]]] = [
    ("causal", "false", ("dense", "packed", "statistics", "weights", "explained", "warmed")),
    ("causal", 1, ("dense", "packed", "statistics", "weights", "explained", "warmed")),
    ("is_causal", 0, ("wrapper",)),
    ("enable_gqa", "no", ("wrapper",)),
    ("return_lse", "no", ("dense", "packed", "explained", "warmed")),
    ("deterministic", "never", ("dense", "packed", "explained", "warmed")),
    ("scale", "0.5", ALL),
    ("scale", True, ALL),
    ("scale", 1j, ALL),
    ("softcap", "2", ALL),
    ("window", (1.0, 0), ALL),
    ("window", (True, 0), ALL),
    ("dropout_p", True, ("dense", "packed", "wrapper", "explained", "warmed")),
    ("seed", 1.5, ("dense", "packed", "explained", "warmed")),
    ("seed", True, ("dense", "packed", "explained", "warmed")),
    ("max_seqlen_q", 6.0, ("packed",)),
    ("top_k", 2.0, ("statistics",)),
    ("entropy", 1, ("statistics",)),
    ("rows", [0.0], ("weights",)),
    ("heads", [True], ("weights",)),
    ("backward", "no", ("warmed",)),
]


@pytest.mark.parametrize(("name", "value", "calls"), REFUSED, ids=lambda x: repr(x) if not isinstance(x, tuple) else "")
def test_strings_of_another_type(name: str, value: Any, calls: tuple[str, ...]) -> None:
    for call in calls:
        with pytest.raises(TypeError, match=rf"^{name}\b.*: expected .*, got "):
            CALLS[call](**{name: value})


MAKERS: list[tuple[str, Any, Any]] = [
    ("window: left", lambda x: fused_attn.Mask.window(x, 0), np.int8(2)),
    ("sinks", lambda x: fused_attn.Mask.window(1, 0, sinks=x), torch.tensor(2)),
    ("block", lambda x: fused_attn.Mask.blocks(torch.eye(2) > 0, x), np.uint64(2)),
    ("block", lambda x: fused_attn.Mask.blocks(torch.eye(2) > 0, (2, x)), Index()),
    ("score.t", fused_attn.scores.Cosine, np.float16(2)),
    ("score.h", fused_attn.scores.Distance, np.int64(2)),
]


@pytest.mark.parametrize(("name", "make", "number"), MAKERS)
def test_numbers_in_objects(name: str, make: Any, number: Any) -> None:
    plain = 3 if isinstance(number, Index) else 2
    assert make(number) == make(plain) and repr(make(number)) == repr(make(plain))
    for wrong in ("2", True, [2]):
        with pytest.raises(TypeError, match=f"{name}: expected .*, got "):
            make(wrong)


@pytest.mark.parametrize("dynamic", (False, True))
def test_a_scale_of_numpy_compiles(dynamic: bool) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        scale = 1 / np.sqrt(x.size(-1))
        out = fused_attn.scaled_dot_product_attention(x, x, x, scale=scale)
        return out + fused_attn.attention(x, x, x, scale=scale, softcap=np.float32(3), window=(np.int64(2), 0))

    x = torch.randn(1, 2, 7, 8)
    torch.testing.assert_close(torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=dynamic)(x), f(x))
