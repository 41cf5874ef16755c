"""Checks of the examples that train: equal losses with fused_attn and with torch's attention, and others.

A promise is (description, measured value, largest allowed value). NaN breaks it.
"""

from __future__ import annotations

import torch
from rich.table import Table

FIRST, FIRST_ALLOWED, LAST_ALLOWED = 20, 1e-5, 1e-2
Promise = tuple[str, float, float]


def apart(ours: list[float], theirs: list[float]) -> list[float]:
    """The relative difference at each step."""
    return [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]


def same_losses(ours: list[float], theirs: list[float]) -> list[Promise]:
    """The promises that the first losses of two trainings agree to a relative 1e-5, and the last one to 1%."""
    distance = torch.tensor(apart(ours, theirs), dtype=torch.float64)
    first = distance[:FIRST]
    return [
        (f"first {len(first)} losses: largest relative difference from torch's", first.max().item(), FIRST_ALLOWED),
        ("last loss: relative difference from torch's", distance[-1].item(), LAST_ALLOWED),
    ]


def verdicts(promised: list[Promise]) -> tuple[Table, int]:
    """The table of promises, and the number of broken ones."""
    table = Table(title="Promises")
    for heading in ("", "measured", "at most", ""):
        table.add_column(heading, justify="right" if table.columns else "left")
    broken = 0
    for what, value, allowed in promised:
        kept = value <= allowed  # False for NaN
        broken += not kept
        table.add_row(what, f"{value:.3g}", f"{allowed:.3g}", "[green]ok[/]" if kept else "[red]BROKEN[/]")
    return table, broken
