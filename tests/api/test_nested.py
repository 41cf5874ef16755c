"""Jagged nested tensors as inputs and outputs: equal to one call for each sequence, with every derivative."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_attn
import fused_attn.compat.sdpa as compat_sdpa
from fused_attn import Mask, attention, scaled_dot_product_attention
from tests.parity import within_budget

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

TORCH = F.scaled_dot_product_attention
HEADS, KV_HEADS, DIM = 4, 2, 8
ROWS, KEYS = [5, 0, 1, 7, 2], [9, 3, 0, 7, 4]


def offsets_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def jagged(values: Tensor, offsets: Tensor, layout: str = "bhsd") -> Any:
    """Values (T, H, D) as (B, H, j, D), or as (B, j, H, D)."""
    x = torch.nested.nested_tensor_from_jagged(values, offsets)
    return x.transpose(1, 2) if layout == "bhsd" else x


def test_torch_logs_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Of making a jagged tensor torch logs advice to itself, once in a process; other records of that log stay."""
    from torch.fx import _symbolic_trace

    _symbolic_trace.is_fx_tracing_warning.cache_clear()
    q = jagged(torch.randn(8, HEADS, DIM), offsets_of([5, 3]))
    attention(q, q, q)
    assert not caplog.records
    _symbolic_trace.log.warning("another")
    assert [record.msg for record in caplog.records] == ["another"]


def values_of(x: Any, layout: str = "bhsd") -> Tensor:
    """The packed (T, H, ...) again."""
    return x.values().transpose(0, 1) if layout == "bhsd" else x.values()


def one_by_one(call: Callable, rows: Sequence[int], keys: Sequence[int], *packed: Tensor) -> list[Tensor]:
    """What call finds of each sequence, its number and tensors, heads-first in a batch of one; packed again."""
    parts = zip(*(x.split(list(n)) for x, n in zip(packed, (rows, keys, keys), strict=True)), strict=True)
    found = [call(b, *(x.transpose(0, 1)[None] for x in part)) for b, part in enumerate(parts)]
    return [torch.cat([x[0].transpose(0, 1) for x in column]) for column in zip(*found, strict=True)]


SOME = torch.tensor([4, 3, 0, 5, 1]), torch.tensor([5, 0, 1, 6, 0])  # of the keys, and of the rows
WORDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "alignment": "top_left"},
    "bottom right": {"causal": True, "alignment": "bottom_right"},
    "window": {"window": (2, 1), "alignment": "bottom_right"},
    "modified": {
        "softcap": 1.5, "scale": 0.6, "sink": torch.tensor([0.3, -1.0, 0.0, 2.0]), "alignment": "top_left",
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0]),
    },
    "mask": {"mask": Mask.causal("top_left") & Mask.window(3, None, "top_left"), "alignment": "top_left"},
    "lengths": {"mask": Mask.lengths(*SOME)},
    "distance": {"score": fused_attn.scores.Distance(torch.tensor(1.3))},
}  # fmt: skip


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("words", WORDS)
def test_attention(words: str, layout: str, backend: str) -> None:
    check(words, layout, backend)


def test_on_triton() -> None:
    """After a dense call by the same words, which is remembered."""
    pytest.importorskip("triton")
    dense = torch.randn(1, 2, 5, 8)
    for _ in range(4):
        attention(dense, dense, dense, causal=True, alignment="top_left", return_lse=True, backend="triton")
    check("causal", "bhsd", "triton")


def check(words: str, layout: str, backend: str) -> None:
    """out, lse and the gradients of packed values, with offsets of its own for the keys."""
    packed = [
        torch.randn(sum(ROWS), HEADS, DIM),
        torch.randn(sum(KEYS), KV_HEADS, DIM),
        torch.randn(sum(KEYS), KV_HEADS, DIM),
    ]
    dout, dlse = torch.randn(sum(ROWS), HEADS, DIM), torch.randn(sum(ROWS), HEADS)
    rows, keys = offsets_of(ROWS), offsets_of(KEYS)

    def ours(*leaves: Tensor) -> list[Tensor]:
        q, k, v = (jagged(x, n, layout) for x, n in zip(leaves, (rows, keys, keys), strict=True))
        out, lse = attention(q, k, v, layout=layout, return_lse=True, backend=backend, **WORDS[words])
        assert out.shape == q.shape
        assert (lse.shape[:2], lse.shape[2]) == ((len(ROWS), HEADS), q.shape[2 if layout == "bhsd" else 1])
        return [values_of(out, layout), values_of(lse)]

    def alone(b: int, *heads: Tensor) -> Any:
        own = {n: x.to(heads[0].dtype) if isinstance(x, Tensor) else x for n, x in WORDS[words].items()}
        if words == "lengths":
            own["mask"] = Mask.lengths(*(x[b : b + 1] for x in SOME))
        return attention(*heads, return_lse=True, backend="reference", **own)

    def run(function: Callable, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in packed]
        out, lse = function(*leaves)
        loss = (out * dout.to(dtype)).sum() + (torch.where(lse.isfinite(), lse, 0.0) * dlse.to(dtype)).sum()
        return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]

    def theirs(*leaves: Tensor) -> list[Tensor]:
        return one_by_one(alone, ROWS, KEYS, *leaves)

    columns = run(ours, torch.float32), run(theirs, torch.float64), run(theirs, torch.float32)
    for name, *found in zip(("out", "lse", "dq", "dk", "dv"), *columns, strict=True):
        within_budget(name, *found)


def test_out_shares_the_offsets_of_q() -> None:
    """It shares q's offsets, so that torch adds them; and what is known of the lengths stays known."""
    q = torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in (3, 5)], layout=torch.jagged).transpose(1, 2)
    out, lse = attention(q, q, q, causal=True, return_lse=True)
    assert out.offsets() is q.offsets()
    assert lse.offsets() is q.offsets()
    total: Any = q + out
    assert torch.equal(total.values(), q.values() + out.values())
    assert (out._maybe_max_seqlen, out._maybe_min_seqlen) == (5, 3)
    assert attention(q, q, q, layout="bhsd").transpose(1, 2).is_contiguous()


class Block(nn.Module):
    """Self-attention as people write it for batches that may be nested."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, attend: Callable, **words: Any) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.inward(x).chunk(3, -1))
        return self.outward(attend(q, k, v, **words).transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("causal", [False, True])
def test_a_model(causal: bool) -> None:
    """Projections, halves of one tensor as q, k and v, F.scaled_dot_product_attention, gradients of the weights."""
    torch.manual_seed(0)
    model, batch = Block(), [torch.randn(n, 16) for n in (5, 1, 8)]

    def run(dtype: torch.dtype, nested: bool) -> list[Tensor]:
        model.to(dtype).zero_grad()
        xs = [x.to(dtype) for x in batch]
        if nested:
            with compat_sdpa.scope():
                x = torch.nested.nested_tensor(xs, layout=torch.jagged)
                y = model(x, F.scaled_dot_product_attention, is_causal=causal).values()
        else:
            y = torch.cat([model(x[None], TORCH, is_causal=causal)[0] for x in xs])
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    columns = run(torch.float32, True), run(torch.float64, False), run(torch.float32, False)
    assert len(columns[0]) == 5
    for n, found in enumerate(zip(*columns, strict=True)):
        within_budget(str(n), *found)


def test_sdpa_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced SDPA takes them without a word to torch: scale, groups, a window, other offsets for the keys."""
    packed = [
        torch.randn(sum(ROWS), HEADS, DIM),
        torch.randn(sum(KEYS), KV_HEADS, DIM),
        torch.randn(sum(KEYS), KV_HEADS, DIM),
    ]
    rows, keys = offsets_of(ROWS), offsets_of(KEYS)

    def run(dtype: torch.dtype, **words: Any) -> Tensor:
        def alone(b: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
            return (scaled_dot_product_attention(q, k, v, backend="reference", **words),)

        return one_by_one(alone, ROWS, KEYS, *(x.to(dtype) for x in packed))[0]

    q, k, v = (jagged(x, n) for x, n in zip(packed, (rows, keys, keys), strict=True))
    words: dict[str, Any] = {"scale": 0.3, "is_causal": True, "enable_gqa": True}
    with compat_sdpa.scope():
        out = F.scaled_dot_product_attention(q, k, v, **words)
    within_budget("out", values_of(out), run(torch.float64, **words), run(torch.float32, **words))
    words |= {"window": (2, 0), "softcap": 2.0}
    out = scaled_dot_product_attention(q, k, v, **words)
    within_budget("window", values_of(out), run(torch.float64, **words), run(torch.float32, **words))


def test_dropout_is_that_of_the_padded_batch() -> None:
    lengths = [5, 2, 7]
    packed, offsets = [torch.randn(14, HEADS, DIM) for _ in range(3)], offsets_of(lengths)
    out = attention(*(jagged(x, offsets) for x in packed), dropout_p=0.4, seed=5)
    dense = [torch.nested.to_padded_tensor(torch.nested.nested_tensor_from_jagged(x, offsets), 0.0) for x in packed]
    mask = Mask.lengths(torch.tensor(lengths))
    padded = [
        attention(*dense, layout="bshd", mask=mask, dropout_p=0.4, seed=5, backend=b) for b in ("tiled", "reference")
    ]
    mine, plain = (torch.cat([x[b, :n] for b, n in enumerate(lengths)]) for x in padded)
    exact = attention(
        *(x.double() for x in dense), layout="bshd", mask=mask, dropout_p=0.4, seed=5, backend="reference"
    )
    oracle = torch.cat([exact[b, :n] for b, n in enumerate(lengths)])
    assert torch.equal(values_of(out) == 0, mine == 0)
    within_budget("out", values_of(out), oracle, plain)


def test_autocast() -> None:
    q = torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in (3, 5)], layout=torch.jagged).transpose(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for out in (attention(q, q, q), scaled_dot_product_attention(q, q, q)):
            assert out.dtype == torch.bfloat16
            assert out.shape == q.shape


def test_compiled() -> None:
    packed, offsets = [torch.randn(7, 2, 8) for _ in range(3)], offsets_of([3, 0, 4])

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=True, backend="tiled")

    heads = [jagged(x, offsets) for x in packed]
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(*heads)
    assert torch.equal(values_of(out), values_of(call(*heads)))


def test_empty_batch() -> None:
    empty = jagged(torch.randn(0, 2, 8), offsets_of([0, 0]))
    out, lse = attention(empty, empty, empty, causal=True, return_lse=True)
    assert (out.shape, lse.shape) == (empty.shape, empty.shape[:3])


def test_jagged_tensors_with_holes() -> None:
    """torch.nested.narrow leaves them."""
    x = torch.nested.narrow(torch.randn(3, 7, 2, 8), 1, torch.tensor([1, 0, 2]), torch.tensor([3, 7, 2]), torch.jagged)
    q = x.transpose(1, 2)
    with pytest.raises(NotImplementedError, match=r"q: a jagged tensor with holes .*contiguous\(\)"):
        attention(q, q, q)
    packed = x.contiguous().transpose(1, 2)
    out = attention(packed, packed, packed)
    first = x.values()[1:4].transpose(0, 1)[None]
    exact = TORCH(*(first.double(),) * 3)[0].transpose(0, 1)
    within_budget("out", values_of(out)[:3], exact, TORCH(first, first, first)[0].transpose(0, 1))


def test_errors() -> None:
    offsets, others = offsets_of([3, 4]), offsets_of([4, 3])
    q, k = jagged(torch.randn(7, 2, 8), offsets), jagged(torch.randn(7, 2, 8), others)
    dense = torch.randn(2, 2, 4, 8)
    with pytest.raises(NotImplementedError, match="mask: a tensor mask has no jagged form"):
        attention(q, q, q, mask=torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="mask: a tensor mask has no jagged form"):
        attention(q, q, q, mask=Mask.causal("top_left") & torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="bias: it has no jagged form"):
        attention(q, q, q, bias=torch.zeros(4, 4))
    with pytest.raises(NotImplementedError, match="attn_mask: it has no jagged form"):
        scaled_dot_product_attention(q, q, q, torch.zeros(4, 4))
    with pytest.raises(TypeError, match=r"k: expected a jagged tensor like the others, got torch\.float32"):
        attention(q, dense, dense)
    with pytest.raises(TypeError, match="query: expected a jagged tensor"):
        scaled_dot_product_attention(dense, q, q)
    with pytest.raises(ValueError, match="v: expected k's offsets"):
        attention(q, q, k)
    with pytest.raises(ValueError, match="alignment"):
        attention(q, k, k, causal=True)
    with pytest.raises(ValueError, match="k: expected q's 2 sequences, got 1"):
        attention(q, *[jagged(torch.randn(7, 2, 8), offsets_of([7]))] * 2)
    with pytest.raises(ValueError, match=r"q: expected shape \(B, H, j, D\)"):
        attention(*[q.transpose(1, 2)] * 3)
    with pytest.raises(ValueError, match=r"q: expected shape \(B, j, H, D\) with layout 'bshd'"):
        attention(q, q, q, layout="bshd")
    with pytest.raises(ValueError, match="layout: expected one of"):
        attention(q, q, q, layout="thd")
    with pytest.raises(ValueError, match="key: expected query's 2 heads without enable_gqa, got 1"):
        scaled_dot_product_attention(q, *[jagged(torch.randn(7, 1, 8), offsets)] * 2)
    with pytest.raises(ValueError, match="key: expected query's head dim 8"):
        scaled_dot_product_attention(q, *[jagged(torch.randn(7, 2, 5), offsets)] * 2)
    with pytest.raises(TypeError, match=r"layout torch\.jagged"):
        attention(*[torch.nested.nested_tensor([torch.randn(2, 3, 8)], layout=torch.strided)] * 3)
    with pytest.raises(NotImplementedError, match="take jagged tensors"):
        fused_attn.attention_map(q, q)
