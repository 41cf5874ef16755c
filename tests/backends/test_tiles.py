"""Splitting a problem on the host: small batches run together, large ones skip fully masked tiles."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fused_attn import Mask, attention, testing
from fused_attn.api.bind import bind
from fused_attn.backends.tiled import tiles
from fused_attn.spec.options import Options
from fused_attn.testing.cases import CASES


def chunks(b: int, n: int, mask: Mask | None, heads: int = 2) -> list[tiles.Chunk]:
    q, k, v = (torch.zeros(1, 1, 1, 1).expand(b, heads, n, 16) for _ in range(3))
    return list(tiles.chunks(bind(q, k, v, Options(mask=mask))))


def lengths(b: int, n: int) -> Mask:
    return Mask.lengths(torch.arange(b) % n)


def test_small_batches_share_a_chunk() -> None:
    (chunk,) = chunks(64, 16, lengths(64, 16))
    (tile,) = chunk.tiles
    assert chunk.batch == slice(0, 64) and tile == tiles.Tile(0, 16, 0, 15, 0, 0)
    alike = Mask.lengths(torch.full((64,), 11))
    assert [chunk.tiles for chunk in chunks(64, 16, alike)] == [[tiles.Tile(0, 16, 0, 11, 0, 11)]]


def test_keys_visible_to_all_batches_are_full() -> None:
    seen = (torch.arange(16) >= torch.tensor([[1], [3], [2]])).int()
    (chunk,) = chunks(3, 16, Mask.segments(torch.ones_like(seen), seen))
    assert chunk.tiles == [tiles.Tile(0, 16, 1, 16, 3, 16)]


def test_large_batches_have_chunks_of_their_own() -> None:
    found = chunks(3, 2048, Mask.lengths(torch.tensor([0, 700, 2048])), heads=1)
    assert [chunk.batch for chunk in found] == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert [{(tile.last, tile.full_to) for tile in chunk.tiles} for chunk in found] == [
        set(),
        {(700, 700)},
        {(2048, 2048)},
    ]


def test_batches_with_equal_bounds_share_a_chunk() -> None:
    """They skip alike, so that joining them costs nothing."""
    ids = torch.arange(512).expand(1, 512) // 100
    assert [chunk.batch for chunk in chunks(3, 512, Mask.segments(ids), heads=1)] == [
        chunk.batch for chunk in chunks(3, 512, None, heads=1)
    ]


@pytest.mark.parametrize("together", (1, 2))
@pytest.mark.parametrize("name", ("lengths", "lengths_q", "lengths_causal", "lengths_tensor"))
def test_rounds_of_batches(monkeypatch: pytest.MonkeyPatch, name: str, together: int) -> None:
    """Three batches one by one, or two and one: as right as all of them together."""
    case = dataclasses.replace(CASES[name], b=3)
    scores = case.hq * case.m * case.sizes()["n"]
    monkeypatch.setattr(tiles, "_elements", lambda device: 8 * together * scores)
    rounds = [len(range(3)[x.batch]) for x in tiles.chunks(testing.make_inputs(case).problem().lower())]
    assert rounds == {1: [1, 1, 1], 2: [2, 1]}[together]
    testing.check_parity(case, "tiled")


def test_dropout_does_not_overflow_a_large_cotangent() -> None:
    q, k, v = (torch.randn(1, 1, 8, 4, requires_grad=True) for _ in range(3))
    out = attention(q * 0, k, v, dropout_p=0.5, seed=1, backend="tiled")
    (dv,) = torch.autograd.grad(out, v, torch.full_like(out, 2e38))
    assert dv.isfinite().all() and dv.any()


@pytest.mark.parametrize("backend", ("tiled", "reference"))
def test_vmap_over_a_dropout_seed(backend: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 20, 8)

    def call(seed: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, dropout_p=0.5, seed=seed, backend=backend)

    assert not torch.equal(call(torch.tensor(0)), call(torch.tensor(1)))
    found = torch.vmap(call)(torch.arange(3))
    torch.testing.assert_close(found, torch.stack([call(x) for x in torch.arange(3)]))
