"""Counter-based dropout: the same mask on every backend, device, layout and tile size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Dropout:
    """Counter-based dropout: whether (b, h, i, j) is dropped depends only on the seed and these indices.

    rng: int64 (2,), seed and offset, on the device. first: the index b * Hq + h of the first head, for a slice of a
    problem. Philox 4x32 with 7 rounds gives four 32-bit words for the counter (j with bit 3 cleared, i with bit 3
    cleared, b * Hq + h, offset); (i, j) uses word 2 * bit3(i) + bit3(j) and is kept where word >= round(p * 2**32).
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """

    p: float
    rng: Tensor
    first: int = 0

    @property
    def threshold(self) -> int:
        """Weights whose word is below it are dropped. Clipped to 32 bits; for p = 1, `rescale` is 0."""
        return min(round(self.p * 2**32), 2**32 - 1)

    @property
    def rescale(self) -> float:
        """The factor for kept weights."""
        return 0.0 if round(self.p * 2**32) >= 2**32 else 1.0 / (1.0 - self.p)

    def materialize(self, heads: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """bool (*heads.shape, rows, cols), True where the weight is kept; heads holds b * Hq + h - first."""
        heads = heads + self.first
        i, j = rows.long()[:, None], cols.long()
        words = philox(self.rng, j & ~8, i & ~8, heads.long()[..., None, None])
        lower, upper = (torch.where((j >> 3 & 1).bool(), words[a + 1], words[a]) for a in (0, 2))
        word = torch.where((i >> 3 & 1).bool(), upper, lower)
        return word >= self.threshold


def philox(rng: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, rounds: int = 7) -> tuple[Tensor, ...]:
    """Four uint32 words, stored as int64, for counters that broadcast."""
    low = 0xFFFFFFFF
    seed, c3 = rng[0], rng[1] & low
    steps = torch.arange(rounds, device=rng.device)
    keys = (seed + 0x9E3779B9 * steps & low).unbind(), ((seed >> 32) + 0xBB67AE85 * steps & low).unbind()
    c0, c1, c2 = c0 & low, c1 & low, c2 & low
    for n, (k0, k1) in enumerate(zip(*keys, strict=True)):
        # The int64 products wrap around, but their 64 bits are right; bits above 32 after a shift are masked.
        a, b = c0.mul_(0xD2511F53), c2.mul_(0xCD9E8D57)
        c0, c2, c1, c3 = _mixed(c1, k0, b, n > 2), _mixed(c3, k1, a, n > 2), b, a
    return tuple(torch.broadcast_tensors(c0, c1.bitwise_and_(low), c2, c3.bitwise_and_(low)))


def _mixed(c: Tensor, key: Tensor, product: Tensor, late: bool) -> Tensor:
    """XOR of c, the key and the high word of the product, low 32 bits. late: all words depend on the key, and so
    are batched under vmap if it is; c can then be overwritten: new memory costs a CPU several times the arithmetic."""
    high = product >> 32
    if late and c.shape == high.shape:
        return c.bitwise_xor_(high).bitwise_xor_(key).bitwise_and_(0xFFFFFFFF)
    return (c ^ high ^ key) & 0xFFFFFFFF
