"""Masks pickle, copy, compare, print and move, and their tensors are read when a call is made."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn
from fused_attn import Mask, attention, scores

SHAPE = (2, 2, 6, 6)
IDS = torch.tensor([0, 0, 1, 1, 2, 2])


def lengths(*x: int) -> Tensor:
    return torch.tensor(x)


MASKS: dict[str, tuple[Any, str]] = {
    "empty": (lambda: Mask(), "Mask()"),
    "causal": (lambda: Mask.causal(), "Mask.causal()"),
    "aligned": (lambda: Mask.causal("top_left"), "Mask.causal('top_left')"),
    "window": (lambda: Mask.window(2, 1), "Mask.window(2, 1)"),
    "sinks": (lambda: Mask.window(1, 0, sinks=2), "Mask.window(1, 0, sinks=2)"),
    "prefix": (lambda: Mask.prefix(lengths(3, 4)), "Mask.prefix(<torch.int64 tensor of shape (2,)>)"),
    "lengths": (lambda: Mask.lengths(lengths(3, 4)), "Mask.lengths(<torch.int64 tensor of shape (2,)>)"),
    "lengths_q": (
        lambda: Mask.lengths(lengths(3, 4), lengths(6, 1)),
        "Mask.lengths(<torch.int64 tensor of shape (2,)>, q=<torch.int64 tensor of shape (2,)>)",
    ),
    "segments": (lambda: Mask.segments(IDS.clone()), "Mask.segments(<torch.int64 tensor of shape (6,)>)"),
    "promised": (
        lambda: Mask.segments(IDS.clone(), IDS.clone(), sorted=True),
        "Mask.segments(<torch.int64 tensor of shape (6,)>, kv_ids=<torch.int64 tensor of shape (6,)>, sorted=True)",
    ),
    "blocks": (
        lambda: Mask.blocks(torch.eye(3) > 0, 2),
        "Mask.blocks(<torch.bool tensor of shape (3, 3)>, (2, 2))",
    ),
    "tensor": (lambda: Mask.tensor(torch.eye(6) > 0), "Mask.tensor(<torch.bool tensor of shape (6, 6)>)"),
    "two": (lambda: Mask.causal() & Mask.window(3, 0), "Mask.causal() & Mask.window(3, 0)"),
}


def saved(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "save": saved,
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", MASKS)
def test_a_copy_is_equal(name: str, copied: str) -> None:
    mask = MASKS[name][0]()
    again = COPIES[copied](mask)
    assert again == mask and repr(again) == repr(mask)
    assert torch.equal(again.materialize(SHAPE), mask.materialize(SHAPE))


@pytest.mark.parametrize("name", MASKS)
def test_repr(name: str) -> None:
    make, shown = MASKS[name]
    assert repr(make()) == shown
    assert make() == make()


def test_different_masks_are_unequal() -> None:
    made = [make() for make, _ in MASKS.values()]
    for i, mask in enumerate(made):
        assert [mask == other for other in made] == [i == j for j in range(len(made))]
    assert Mask.causal() != "Mask.causal()"


def test_equality_ignores_the_order_of_conditions() -> None:
    assert Mask.causal() & Mask.window(3, 0) == Mask.window(3, 0) & Mask.causal()
    assert Mask.causal() == Mask.window(None, 0) and Mask.window(None, None) == Mask()
    assert Mask.causal() & Mask.causal() == Mask.causal() != Mask.causal("top_left")
    assert Mask.lengths(lengths(3, 4)) != Mask.lengths(lengths(3, 5))
    assert Mask.lengths(lengths(3, 4)) != Mask.lengths(lengths(3, 4).int())
    assert Mask.lengths(lengths(3, 4)) != Mask.lengths(lengths(3, 4, 5))
    assert Mask.segments(IDS) == Mask.segments(IDS, IDS) != Mask.segments(IDS, sorted=True)


def test_masks_are_unhashable() -> None:
    for x in (Mask.causal(), Mask.causal().parts[0]):
        with pytest.raises(TypeError, match="unhashable"):
            hash(x)


def test_a_deep_copy_shares_nothing() -> None:
    kept = lengths(3, 4)
    mask = Mask.lengths(kept)
    again = copy.deepcopy(mask)
    kept.fill_(1)
    assert again == Mask.lengths(lengths(3, 4)) and mask == Mask.lengths(lengths(1, 1))


@pytest.mark.parametrize("name", MASKS)
def test_to(name: str) -> None:
    mask = MASKS[name][0]()
    moved = mask.to("meta")
    tensors = [x for part in moved.parts for x in vars(part).values() if isinstance(x, Tensor)]
    assert all(x.device.type == "meta" for x in tensors)
    assert (moved == mask) == (not tensors)
    assert mask.to("cpu") == mask
    if tensors:
        q = torch.zeros(2, 2, 6, 4, device="meta")
        assert attention(q, q, q, mask=moved).device.type == "meta"


@pytest.mark.parametrize(
    "x", (Mask(), Mask.causal(), Mask.lengths(lengths(3, 4)), scores.Cosine(torch.ones(2))), ids=repr
)
def test_to_accepts_only_a_device(x: Any) -> None:
    assert x.to(torch.device("cpu")) == x
    for other in (torch.int32, torch.float16, torch.zeros(2), None, True):
        with pytest.raises(TypeError, match=r"device: expected a torch.device, a str or an int, got"):
            x.to(other)
    with pytest.raises(ValueError, match="device: expected the name or index of a device, got str 'gpu'"):
        x.to("gpu")


# ---------------------------------------- tensors are read late

FIRST, SECOND = torch.tensor([[0, 0, 0, 1, 1, 1]]), torch.tensor([[2, 0, 2, 0, 1, 1]])
REFILLED = {
    "segments": (lambda x: Mask.segments(x), FIRST, SECOND),
    "segments_back": (lambda x: Mask.segments(x), SECOND, FIRST),
    "segments_q": (lambda x: Mask.segments(x, FIRST), FIRST, SECOND),
    "segments_kv": (lambda x: Mask.segments(FIRST, x), FIRST, SECOND),
    "lengths": (lambda x: Mask.lengths(x), lengths(6, 2), lengths(1, 5)),
    "prefix": (lambda x: Mask.prefix(x), lengths(6, 2), lengths(1, 5)),
    "blocks": (lambda x: Mask.blocks(x, 2), torch.ones(3, 3) > 0, torch.eye(3) > 0),
    "tensor": (lambda x: Mask.tensor(x), torch.ones(6, 6) > 0, torch.eye(6) > 0),
}


@pytest.mark.parametrize("backend", [None, "tiled", "reference"])
@pytest.mark.parametrize("name", REFILLED)
def test_index_tensors_are_read_at_each_call(name: str, backend: str | None) -> None:
    make, before, after = REFILLED[name]
    q, k, v = (torch.randn(2, 2, 6, 4) for _ in range(3))
    kept = before.clone()
    mask = make(kept)
    for content in (before, after):
        kept.copy_(content)
        right = attention(q, k, v, mask=make(content.clone()).materialize(SHAPE), backend=backend)
        torch.testing.assert_close(attention(q, k, v, mask=mask, backend=backend), right)


@pytest.mark.parametrize("ids", [(SECOND, None), (FIRST, SECOND), (SECOND, FIRST)], ids=["both", "keys", "queries"])
def test_unsorted_ids_with_sorted_true_are_refused(ids: tuple[Tensor, Tensor | None]) -> None:
    mask = Mask.segments(*ids, sorted=True)
    name = "q_ids" if ids[0] is SECOND else "kv_ids"
    with pytest.raises(ValueError, match=rf"Mask.segments\({name}\): sorted=True promises ids that never decrease"):
        mask.materialize(SHAPE)


def test_ids_on_a_device_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, the default is right for all ids; a promise is believed, and checked under `debug`."""
    monkeypatch.setattr("fused_attn.spec.conditions.readable", lambda x: fused_attn.spec.checks._debugging.get())
    assert Mask.segments(FIRST).resolve(SHAPE)[1] is not None
    assert Mask.segments(FIRST, sorted=True).resolve(SHAPE)[1] is None
    assert Mask.segments(SECOND, sorted=True).resolve(SHAPE)[1] is None
    with fused_attn.debug(), pytest.raises(ValueError, match=r"Mask.segments\(q_ids\): sorted=True"):
        Mask.segments(SECOND, sorted=True).resolve(SHAPE)


# ---------------------------------------- integers of any width

WIDTHS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
LONG = (1, 1, 300, 300)


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_integers_of_any_width(dtype: torch.dtype) -> None:
    """N and M fit no 8 bits."""
    kv, q, ids = lengths(100), lengths(120), torch.arange(300) // 100
    makes = {
        "lengths": lambda d: Mask.lengths(kv.to(d), q.to(d)),
        "prefix": lambda d: Mask.prefix(kv.to(d)),
        "segments": lambda d: Mask.segments(ids.to(d)),
        "backwards": lambda d: Mask.segments(ids.flip(0).to(d)),
        "promised": lambda d: Mask.segments(ids.to(d), sorted=True),
    }
    for make in makes.values():
        assert torch.equal(make(dtype).materialize(LONG), make(torch.int64).materialize(LONG))


@pytest.mark.parametrize("order", [None, True, False])
def test_ids_beyond_int64(order: bool | None) -> None:
    ids = torch.tensor([0, 1, -(2**63), -(2**63), -1, -1]).view(torch.uint64)
    expected = ids.view(torch.int64)[:, None] == ids.view(torch.int64)
    assert torch.equal(Mask.segments(ids, sorted=order).materialize((1, 1, 6, 6))[0, 0], expected)
    with pytest.raises(TypeError, match=r"Mask.segments\(kv_ids\): expected q_ids' torch.uint64"):
        Mask.segments(ids, ids.view(torch.int64))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("make", [Mask.lengths, Mask.prefix, Mask.segments])
def test_non_integers_are_refused(make: Any, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"Mask\.\w+\((kv|lengths|q_ids)\): expected an integer tensor, got torch\."):
        make(torch.ones(6).to(dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint64], ids=str)
@pytest.mark.parametrize("wrong", [-1, 7])
def test_lengths_out_of_range_are_refused(wrong: int, dtype: torch.dtype) -> None:
    given = torch.tensor([3, wrong]).to(dtype)
    makes = (("kv", lambda: Mask.lengths(given)), ("q", lambda: Mask.lengths(lengths(3, 3), given)),
             ("lengths", lambda: Mask.prefix(given)))  # fmt: skip
    for name, make in makes:
        with pytest.raises(ValueError, match=rf"{name}\): expected lengths from 0 to [MN] = 6, got "):
            make().materialize(SHAPE)


# ---------------------------------------- under a compiler


@pytest.mark.parametrize("order", [None, True, False])
def test_made_inside_a_compiled_function(order: bool | None) -> None:
    x, ids = torch.randn(1, 2, 6, 8), IDS

    def f(q: Tensor, ids: Tensor) -> Tensor:
        return attention(q, q, q, causal=True, mask=Mask.segments(ids, sorted=order))

    torch.testing.assert_close(torch.compile(f, backend="aot_eager", fullgraph=True)(x, ids), f(x, ids))


@pytest.mark.parametrize("name", ["two", "lengths", "segments", "blocks"])
def test_an_argument_of_a_compiled_function(name: str) -> None:
    x, mask = torch.randn(2, 2, 6, 8), MASKS[name][0]()

    def f(q: Tensor, mask: Mask) -> Tensor:
        return attention(q, q, q, mask=mask & Mask.window(4, None))

    torch.testing.assert_close(torch.compile(f, backend="aot_eager", fullgraph=True)(x, mask), f(x, mask))


@pytest.fixture
def warn_always() -> Iterator[None]:
    """torch shows some warnings only once for a process."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


BOUNDED = {"lengths": Mask.lengths, "of rows": lambda x: Mask.lengths(x, x), "prefix": Mask.prefix}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("backend", (None, "tiled", "reference"))
@pytest.mark.parametrize("dim", (0, 1), ids=lambda dim: f"in_dim {dim}")
@pytest.mark.parametrize("mask", BOUNDED)
def test_lengths_under_vmap_without_a_warning(mask: str, dim: int, backend: str | None, warn_always: None) -> None:
    """Of a single batch and of several, batched in any dim, and of tensors that only the lengths or only q batch."""
    x, kv = torch.randn(3, 2, 2, 6, 4), torch.tensor([[6, 2], [1, 0], [3, 5]])

    def f(x: Tensor, kv: Tensor) -> Tensor:
        return attention(x, x, x, mask=BOUNDED[mask](kv), backend=backend)

    over = kv.movedim(0, dim)
    right = torch.stack([f(*given) for given in zip(x, kv, strict=True)])
    torch.testing.assert_close(torch.vmap(f, (0, dim))(x, over), right)
    right = torch.stack([f(x[0], given) for given in kv])
    torch.testing.assert_close(torch.vmap(f, (None, dim))(x[0], over), right)
    right = torch.stack([f(given, kv[0]) for given in x])
    torch.testing.assert_close(torch.vmap(f, (0, None))(x, kv[0]), right)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_ids_and_lengths_under_vmap() -> None:
    """There, too, ids cannot be looked at."""
    x, ids, kv = torch.randn(2, 2, 6, 4), torch.cat((FIRST, SECOND)), lengths(2, 6)

    def f(x: Tensor, ids: Tensor, kv: Tensor) -> Tensor:
        q = x[None]
        return attention(q, q, q, mask=Mask.segments(ids) & Mask.lengths(kv[None]))[0]

    right = torch.stack([f(*given) for given in zip(x, ids, kv, strict=True)])
    torch.testing.assert_close(torch.vmap(f)(x, ids, kv), right)


NESTED = {
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f)),
    "vmap of jacrev": lambda f: torch.func.vmap(torch.func.jacrev(f)),
    "vmap of jvp": lambda f: torch.func.vmap(lambda x, *y: torch.func.jvp(lambda x: f(x, *y), (x,), (x,))[1]),
    "grad of vmap": lambda f: torch.func.grad(lambda *x: torch.func.vmap(f)(*x).sum()),
}


@pytest.mark.parametrize("transform", NESTED)
@pytest.mark.parametrize("mask", (*BOUNDED, "segments"))
def test_index_tensors_under_nested_transforms(mask: str, transform: str) -> None:
    """Where vmap is not the innermost transform, they cannot be looked at either."""
    x, given = torch.randn(2, 1, 2, 6, 4), lengths(2, 6)[:, None]
    if mask == "segments":
        given = torch.cat((FIRST, SECOND))

    def f(x: Tensor, given: Tensor) -> Tensor:
        return attention(x, x, x, mask=(BOUNDED | {"segments": Mask.segments})[mask](given)).sin().sum()

    right = [NESTED[transform](f)(x[i : i + 1], given[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(NESTED[transform](f)(x, given), torch.cat(right))
