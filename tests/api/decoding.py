"""Named calls of `attention_decode`, with caches that hold NaN outside of the sequences, and their oracle.

A call starts from the keys and values of each sequence, one behind another. They are put into a cache or into pages of
it, and the oracle is dense attention over each sequence, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fused_attn import Mask, attention_decode, testing
from fused_attn.api.bind import bind
from fused_attn.backends import reference
from fused_attn.spec.options import Options
from fused_attn.spec.problem import Problem
from fused_attn.testing.absolute_sums import absolute_sums


@dataclass(frozen=True)
class Call:
    """lengths: keys of each sequence, the new ones included; new: how many of them are appended by the call."""

    lengths: tuple[int, ...] = (70, 33, 0, 96)
    m: int = 1
    hq: int = 4
    hkv: int = 2
    d: int = 16
    dv: int | None = None
    page: int | None = None
    room: int = 130  # keys that each sequence has room for
    new: int = 0
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    alibi: bool = False
    alibi_batch: bool = False
    softcap: float | None = None
    sink: bool = False
    normalizer: str = "softmax"
    scale: Any = None
    tree: str = ""  # "" for none, "shared" or "own"
    leftpad: bool = False
    indexed: bool = False
    rotary: str = ""  # "" for none, "halves" or "pairs"
    layout: str = "bmhd"  # memory order of q, or "gaps"
    cache_order: str = "bnhd"  # or "bhnd" or "gaps"
    seed: int = 0

    def __post_init__(self) -> None:
        """A word with another spelling would select the default in silence."""
        assert self.tree in ("", "shared", "own"), self.tree
        assert self.rotary in ("", "halves", "pairs"), self.rotary
        assert self.layout in ("bmhd", "bhmd", "gaps"), self.layout
        assert self.cache_order in ("bnhd", "bhnd", "gaps"), self.cache_order


class Given:
    """A call's tensors. `keys` and `values` are each sequence's own, (n, Hkv, D), as they must be found."""

    def __init__(self, call: Call, dtype: torch.dtype = torch.float32) -> None:
        self.call, self.dtype = call, dtype
        self.draw = torch.Generator().manual_seed(call.seed)
        c, b, dv = call, len(call.lengths), call.dv or call.d
        self.q = self._tensor(b, c.m, c.hq, c.d)
        if c.layout == "bhmd":
            self.q = self.q.transpose(1, 2).contiguous().transpose(1, 2)
        if c.layout == "gaps":
            roomy = torch.full((b, c.m, c.hq, c.d + 3), torch.nan, dtype=dtype)
            self.q = roomy[..., : c.d].copy_(self.q)
        self.keys = [self._tensor(n, c.hkv, c.d) for n in c.lengths]
        self.values = [self._tensor(n, c.hkv, dv) for n in c.lengths]
        self.starts = [min(n, 3 + 5 * i) if c.leftpad else 0 for i, n in enumerate(c.lengths)]
        self.kwargs: dict[str, Any] = self._words()
        self.k, self.v = self._caches(c.d), self._caches(dv)
        self._lay_out()
        if c.new:
            old = torch.tensor(self.old, dtype=torch.int32)
            news = ((self.keys, c.d, "k_new"), (self.values, dv, "v_new"))
            for rows, width, name in news:
                self.kwargs[name] = torch.stack([x[n:] for x, n in zip(rows, self.old, strict=True)])
                assert self.kwargs[name].shape == (b, c.new, c.hkv, width)
            self.kwargs["cache_seqlens"] = old
        self.before = self.k.clone(), self.v.clone()

    def _tensor(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw).to(self.dtype)

    @property
    def old(self) -> list[int]:
        return [n - self.call.new for n in self.call.lengths]

    def _words(self) -> dict[str, Any]:
        c, b = self.call, len(self.call.lengths)
        found: dict[str, Any] = {"causal": c.causal, "window": c.window, "normalizer": c.normalizer}
        found["cache_seqlens"] = torch.tensor(c.lengths, dtype=torch.int32)
        found["softcap"] = c.softcap
        found["scale"] = torch.linspace(0.1, 0.4, c.hq) if c.scale == "heads" else c.scale
        if c.alibi or c.alibi_batch:
            found["alibi_slopes"] = torch.rand((b, c.hq) if c.alibi_batch else (c.hq,), generator=self.draw) / 8
        if c.sink:
            found["sink"] = torch.randn(c.hq, generator=self.draw)
        if c.tree:
            shape = (b if c.tree == "own" else 1, c.m, c.m)
            found["tree_mask"] = (torch.rand(shape, generator=self.draw) < 0.5) | torch.eye(c.m, dtype=torch.bool)
        if c.leftpad:
            found["cache_leftpad"] = torch.tensor(self.starts, dtype=torch.int32)
        if c.rotary:
            angles = torch.outer(torch.arange(c.room + c.m), 100.0 ** -torch.linspace(0, 1, c.d // 4))
            found["rotary"] = (angles.cos().to(self.dtype), angles.sin().to(self.dtype), c.rotary == "pairs")
        return found

    def _caches(self, width: int) -> Tensor:
        """NaN everywhere, more of it than anybody needs."""
        c, b = self.call, len(self.call.lengths)
        outer, inner = (b + 2 * c.indexed, c.room) if c.page is None else (b * -(-c.room // c.page) + 3, c.page)
        if c.cache_order == "gaps":  # as rows of something longer
            return torch.full((outer, inner, c.hkv, width + 3), torch.nan, dtype=self.dtype)[..., :width]
        if c.cache_order == "bhnd":
            return torch.full((outer, c.hkv, inner, width), torch.nan, dtype=self.dtype).transpose(1, 2)
        return torch.full((outer, inner, c.hkv, width), torch.nan, dtype=self.dtype)

    def _lay_out(self) -> None:
        """Put every sequence's old keys where it has them, none before its leftpad; tables name no page in vain."""
        c, b = self.call, len(self.call.lengths)
        if c.page is None:
            order = torch.randperm(len(self.k), generator=self.draw)[:b] if c.indexed else torch.arange(b)
            if c.indexed:
                self.kwargs["cache_batch_idx"] = order.int()
            self.places = [(order[i].expand(n), torch.arange(n)) for i, n in enumerate(c.lengths)]
        else:
            width = -(-c.room // c.page)
            pages = torch.randperm(len(self.k), generator=self.draw)[: b * width].view(b, width)
            table = torch.full((b, width), 2**30, dtype=torch.int32)
            self.places = []
            for i, n in enumerate(c.lengths):
                keys = torch.arange(n)
                self.places.append((pages[i, keys // c.page], keys % c.page))
                used = slice(self.starts[i] // c.page, -(-n // c.page))
                table[i, used] = pages[i, used].int()
            self.kwargs["page_table"] = table
        for i, n in enumerate(self.old):
            rows, slots = (x[self.starts[i] : n] for x in self.places[i])
            self.k[rows, slots], self.v[rows, slots] = (x[i][self.starts[i] : n] for x in (self.keys, self.values))

    def run(self, backend: str | None, **more: Any) -> tuple[Tensor, Tensor]:
        return attention_decode(self.q, self.k, self.v, **self.kwargs, **more, return_lse=True, backend=backend)

    def check_caches(self) -> None:
        """What was appended stands in its place, and nothing else has changed."""
        for have, before, new in zip((self.k, self.v), self.before, ("k_new", "v_new"), strict=True):
            wanted = before.clone()
            for i, n in enumerate(self.old):
                rows, slots = (x[n:] for x in self.places[i])
                if self.call.new:
                    written = self.kwargs[new]
                    wanted[rows, slots] = (self.turned(written, self.old) if new == "k_new" else written)[i]
            torch.testing.assert_close(have, wanted, rtol=0, atol=0, equal_nan=True)

    def turned(self, x: Tensor, starts: list[int], advance: bool = True) -> Tensor:
        """x (B, T, H, D) under the rotary embedding, one pair of dims after another."""
        if not self.call.rotary:
            return x
        cos, sin, pairs = self.kwargs["rotary"]
        half, wide = cos.shape[1], torch.promote_types(x.dtype, torch.float32)
        at = torch.tensor(starts)[:, None] + torch.arange(x.shape[1]) * int(advance)
        found = x.clone()
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if pairs else (i, i + half)
            c, s = (y.to(wide)[at, i][:, :, None] for y in (cos, sin))
            first, second = x[..., a].to(wide), x[..., b].to(wide)
            found[..., a] = (first * c - second * s).to(x.dtype)
            found[..., b] = (second * c + first * s).to(x.dtype)
        return found

    def problems(self, dtype: torch.dtype) -> list[Problem]:
        """Dense attention over each sequence, whose last rows are the queries."""
        c, words = self.call, self.kwargs
        moves = c.causal or c.window not in (None, (None, None))
        q = self.turned(self.q, self.old, moves)
        keys = self.keys
        if c.new:
            new = self.turned(words["k_new"], self.old)
            keys = [torch.cat((x[:n], new[i])) for i, (x, n) in enumerate(zip(keys, self.old, strict=True))]
        found = []
        for i, n in enumerate(c.lengths):
            start = self.starts[i]
            slopes, tree = words.get("alibi_slopes"), words.get("tree_mask")
            mask = None
            if tree is not None:
                seen = torch.ones(c.m, n, dtype=torch.bool)
                last = min(n, c.m)
                seen[:, n - last :] = tree[i if c.tree == "own" else 0][:, c.m - last :]
                mask = Mask.tensor(seen[:, start:])
            heads = [x[None].transpose(1, 2).to(dtype) for x in (q[i], keys[i][start:], self.values[i][start:])]
            options = {
                x: words[x] for x in ("scale", "softcap", "sink", "normalizer", "causal", "window") if x in words
            }
            own = slopes[i : i + 1] if c.alibi_batch else slopes
            options = {x: y.to(torch.float32) if isinstance(y, Tensor) else y for x, y in options.items()}
            found.append(
                bind(*heads, Options(**options, alibi_slopes=own, mask=mask, alignment="bottom_right", return_lse=True))
            )
        return found

    def check(self, out: Tensor, lse: Tensor) -> float:
        """Both against the oracle by the one rule; the largest share of the budget that was used."""
        wide = torch.promote_types(self.dtype, torch.float32)
        assert out.dtype == self.dtype and lse.dtype == wide
        b, m, heads, _ = self.q.shape
        assert out.shape == (b, m, heads, self.v.shape[3]) and lse.shape == (b, heads, m)
        share = 0.0
        plain_in = torch.float32 if self.dtype == torch.float64 else self.dtype
        for i, (exact, plain) in enumerate(zip(self.problems(torch.float64), self.problems(self.dtype), strict=True)):
            oracle, near = reference.attention(exact, torch.float64), reference.attention(plain, plain_in)
            absolute = absolute_sums(exact, SimpleNamespace(dout=None, dlse=None))
            got = {"out": out[i].transpose(0, 1)[None], "lse": lse[i][None]}
            for j, name in enumerate(("out", "lse")):
                own = wide if name == "lse" else self.dtype
                row = testing.assert_within_budget(
                    f"{name} of sequence {i}", got[name], oracle[j], near[j], absolute[name], own
                )
                share = max(share, row.share)
        return share
