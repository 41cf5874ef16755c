"""GPU evidence on packed (varlen) sequences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from bench.evidence.setting import Listed, Setting, compared, seconds, throughputs, verify
from bench.harness.packed import PEERS, ragged_case
from bench.harness.providers import ours
from bench.harness.rounds import DIRECTIONS
from bench.harness.samples import Sample, heavy_tail, sized

FILL = {"heavy": 0.3, "equal": 1.0}  # share of the padded batch that is not padding
GOAL = 0.9  # of the dense kernel's TFLOP/s


class RaggedBatches:
    """Packed sequences with heavy-tailed and with equal lengths: TFLOP/s against the dense kernel with as many scores,
    and against peers that take packed sequences."""

    shares = seconds(check=25, measure=40)

    def cases(self, s: Setting) -> Iterator[Listed]:
        for kind, d, mask in itertools.product(FILL, s.dims[:2], ("full", "causal")):
            args = {"kind": kind, "d": d, "causal": mask == "causal"}
            yield f"{kind}/d{d}/{mask}", kind == "heavy" and d == s.dims[0], args

    def samples(self, s: Setting, kind: str, d: int, causal: bool) -> tuple[Sample, Sample]:
        """The packed batch, and a dense one with as many sequences and scores."""
        batch, longest = s.ragged
        lengths = heavy_tail(batch, longest, FILL[kind]) if FILL[kind] < 1 else [longest] * max(1, batch // 8)
        heads, each = max(1, s.width // d), round(math.sqrt(sum(n * n for n in lengths) / len(lengths)))
        cases = (
            ragged_case(lengths, heads, d, causal),
            sized("causal" if causal else "plain", len(lengths), heads, each, d),
        )
        packed, dense = (Sample.draw(case, s.half, s.device, scores=0) for case in cases)
        return packed, dense

    def check(self, s: Setting, kind: str, d: int, causal: bool) -> dict[str, Any]:
        packed, dense = self.samples(s, kind, d, causal)
        return {"rows": verify(ours(), packed) | {f"dense {n}": x for n, x in verify(ours(), dense).items()}}

    def measure(self, s: Setting, checked: dict[str, Any], kind: str, d: int, causal: bool) -> dict[str, Any]:
        packed, dense = self.samples(s, kind, d, causal)
        found = compared([ours(), *PEERS], packed, s, DIRECTIONS, ["triton"])
        for direction, (own, other) in throughputs([packed, dense], s).items():
            found[direction] = {"ms": own[0], "dense_ms": other[0], "of_dense": own[1] / other[1], "goal": GOAL}
        return found
