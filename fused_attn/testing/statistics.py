"""Check `attention_stats` and `attention_map` against float64 by the tolerance rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..api.statistics import attention_map, attention_stats
from ..backends import reference
from ..spec.problem import Problem, Statistics
from .absolute_sums import absolute_scores
from .cases import Case
from .inputs import make_inputs
from .parity import Parity
from .tolerance import Row, allowed, assert_within_budget

OUTPUT_OPTIONS = ("dropout_p", "seed", "return_lse", "deterministic")  # of `attention`, but not of its statistics
ROWS, HEADS = (-1, 0, 0), (-1, 0)  # requested of a map, beside the middle row: repeated and not in order


class StatisticsCheck:
    """The expected statistics and map of a case; for a ragged case, the statistics of each sequence."""

    def __init__(
        self,
        case: Case | str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        top_k: int = 7,
        seed: int = 0,
    ) -> None:
        self.inputs, self.dtype = make_inputs(case, dtype, device, seed), dtype
        _, heads, m, n = (self.inputs.case.sizes()[x] for x in "bhmn")
        self.rows, self.heads = [m // 2, *ROWS] if m else [], list(HEADS) if heads else []
        plain_dtype = torch.float32 if dtype == torch.float64 else dtype
        exact, plain = (self.inputs.clean_problem(x) for x in (torch.float64, plain_dtype))
        self.requested: dict[str, Any] = {
            "key_mass": True,
            "entropy": not exact.sigmoid,
            "max_logit": True,
            "top_k": min(top_k, n),
        }
        self.sequences, pairs = [], [(exact, plain)]
        if exact.ragged is not None:
            self.sequences = [sequence for sequence, _ in exact.sequences()]
            pairs = [(x, y) for (_, x), (_, y) in zip(exact.sequences(), plain.sequences(), strict=True)]
        with torch.no_grad():
            self.expected = [_Expected(x, y, self.requested, plain_dtype) for x, y in pairs]
            if not self.sequences:
                self.map, self.plain_map = (
                    reference.weights(p, self.rows, self.heads, own)
                    for p, own in ((exact, torch.float64), (plain, plain_dtype))
                )

    def run(self, backend: str | None) -> Parity:
        """Run a backend and check its results. Raises AssertionError, or whatever the backend raises."""
        options = {name: x for name, x in self.inputs.kwargs.items() if name not in OUTPUT_OPTIONS}
        options["backend"] = backend
        q, k, _, *starts = self.inputs.qkv
        options |= dict(zip(("cu_seqlens_q", "cu_seqlens_k"), starts, strict=False))
        got = attention_stats(q, k, **self.requested, **options)
        weights = None if starts else attention_map(q, k, rows=self.rows, heads=self.heads, **options)
        self.inputs.check_untouched()
        case = self.inputs.case
        try:
            rows = self.compare(got)
            return Parity(case, str(backend), self.dtype, rows if weights is None else rows | self.compare_map(weights))
        except AssertionError as failure:
            raise AssertionError(f"{case.name} on {backend} in {self.dtype}: {failure}") from None

    def compare(self, got: Statistics) -> dict[str, Row]:
        """The worst row of each statistic."""
        if not self.sequences:
            return self.expected[0].compare(got)
        rows: dict[str, Row] = {}
        whole = {name: None if x is None else x.transpose(0, 1)[None] for name, x in got._asdict().items()}
        for sequence, expected in zip(self.sequences, self.expected, strict=True):
            own = Statistics(**{name: None if x is None else sequence.part(name, x) for name, x in whole.items()})
            for name, row in expected.compare(own).items():
                rows[name] = max(rows.get(name, row), row, key=lambda x: x.share)
        return rows

    def compare_map(self, got: Tensor) -> dict[str, Row]:
        weights = _float32("map", got)
        return {"map": assert_within_budget("map", weights, self.map, self.plain_map, self.map, torch.float32)}


class _Expected:
    """The expected statistics of one dense problem: the float64 oracle, plain PyTorch in dtype, and A."""

    def __init__(self, exact: Problem, plain: Problem, requested: dict[str, Any], plain_dtype: torch.dtype) -> None:
        self.top_k = min(requested["top_k"], exact.shape[3])
        requested = requested | {"top_k": self.top_k}
        self.scores = reference.scores(exact, torch.float64)
        self.plain_scores = reference.scores(plain, plain_dtype)
        self.terms = absolute_scores(exact).masked_fill(self.scores == -torch.inf, 0.0)
        self.oracle = reference.statistics(exact, **requested, dtype=torch.float64)
        self.plain = reference.statistics(plain, **requested, dtype=plain_dtype)
        self.absolute = self._absolute(exact)

    def _absolute(self, p: Problem) -> Statistics:
        weights, lse = reference.returned_weights(p, self.scores), reference.normalized(p, self.scores)[1]
        entropy = None
        if not p.sigmoid:
            entropy = (weights * (lse.abs()[..., None] + self.scores.abs())).masked_fill(weights == 0, 0.0).sum(-1)
        max_logit = self.terms.amax(-1) if p.shape[3] else self.scores.new_zeros(self.scores.shape[:3])
        return Statistics(self.oracle.key_mass, entropy, max_logit, None, self.oracle.top_k_weights)

    def compare(self, got: Statistics) -> dict[str, Row]:
        rows = {}
        got = self._without_padding(got)
        for name in Statistics._fields:
            x = getattr(got, name)
            if x is not None and x.is_floating_point():
                oracle, plain, absolute = (getattr(column, name) for column in (self.oracle, self.plain, self.absolute))
                rows[name] = assert_within_budget(name, _float32(name, x), oracle, plain, absolute, torch.float32)
        if got.top_k_indices is not None:
            rows["top_k_indices"] = self._check_indices(got.top_k_indices)
        return rows

    def _check_indices(self, got: Tensor) -> Row:
        """Check the indices of the largest scores and their order. Scores closer than their budgets may be swapped.

        The row's error is the fraction of indices that may be swapped.
        """
        k, best = self.top_k, self.scores.sort(dim=-1, descending=True).values[..., : self.top_k + 1]
        oracle: Any = self.oracle.top_k_indices
        if got.shape != oracle.shape or got.dtype != torch.int64:
            raise AssertionError(f"top_k_indices: {got.dtype} {tuple(got.shape)}, expected int64 {tuple(oracle.shape)}")
        if not got.numel():
            return Row(0.0, 0.0, 0.0)
        missing = oracle == -1
        if not torch.equal(got.eq(-1), missing):
            raise AssertionError(f"top_k_indices: {int(got.eq(-1).sum())} are -1, expected {int(missing.sum())}")
        ordered = torch.where(got == -1, -1 - torch.arange(k, device=got.device), got).sort(-1).values
        if (ordered[..., 1:] == ordered[..., :-1]).any():
            raise AssertionError("top_k_indices: a row has the same key twice")
        budget = allowed(self.scores, self.plain_scores, self.terms, torch.float32)
        slack = 2 * budget.masked_fill(~self.scores.isfinite(), 0.0).amax(-1, keepdim=True)
        score, expected = self.scores.gather(-1, got.clamp_min(0)), best[..., :k]
        close = ((score - expected).abs() <= slack) | ~expected.isfinite()
        gaps = torch.nn.functional.pad(best, (1, 2 - best.shape[-1] + k), value=-torch.inf).diff(dim=-1).abs()
        gaps[..., 0] = torch.inf
        unique = (torch.minimum(gaps[..., :k], gaps[..., 1 : k + 1]) > slack) | ~expected.isfinite()
        wrong = ~missing & (~close | (unique & (got != oracle)))
        if wrong.any():
            where = tuple(wrong.nonzero()[0].tolist())
            raise AssertionError(
                f"top_k_indices: got key {got[where].item()} with score {score[where].item():.9g}, expected key"
                f" {oracle[where].item()} with score {expected[where].item():.9g} at {where};"
                f" {int(wrong.sum())} of {wrong.numel()} indices are wrong"
            )
        return Row(1.0 - unique.double().mean().item(), 0.0, 0.0)

    def _without_padding(self, got: Statistics) -> Statistics:
        """Remove the entries beyond the last key of a sequence shorter than top_k; they must be empty."""
        if got.top_k_indices is None or got.top_k_weights is None:
            return got
        if (got.top_k_indices[..., self.top_k :] != -1).any() or (got.top_k_weights[..., self.top_k :] != 0).any():
            raise AssertionError("top_k_indices: entries beyond the last key must be -1 with weight 0")
        kept = (x[..., : self.top_k] if self.top_k else None for x in (got.top_k_indices, got.top_k_weights))
        return got._replace(**dict(zip(("top_k_indices", "top_k_weights"), kept, strict=True)))


def _float32(name: str, x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise AssertionError(f"{name}: {x.dtype}, expected torch.float32")
    return x


def check_statistics(case: Case | str, backend: str | None, dtype: torch.dtype = torch.float32, **more: Any) -> Parity:
    """Check every statistic of a case, and its map for some rows and heads; more: arguments of `StatisticsCheck`."""
    return StatisticsCheck(case, dtype, **more).run(backend)
