"""Compare two revisions of the package, each in its own process, in interleaved rounds.

The working tree runs in two processes, whose difference is the noise level for the difference to the other revision.
That one is unpacked from git into a temporary directory. All three get the same tensors and are checked before timing.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import ROOT
from bench.harness import clock
from bench.harness.providers import Provider
from bench.harness.rounds import Turns
from bench.harness.samples import Sample
from bench.harness.table import Row, figure, quantiles, said
from fused_attn import Mask
from fused_attn.testing import Case

OURS, AGAIN = "ours", "ours again"


class Side:
    """A process that runs one revision of the package."""

    def __init__(self, name: str, tree: Path, folder: Path):
        self.name, self.tree, self.folder = name, tree, folder
        script = folder / "side.py"
        shutil.copy(clock.__file__, script)
        environ = os.environ | {"PYTHONPATH": str(tree)}
        self.process = subprocess.Popen(
            [sys.executable, str(script)], cwd=folder, env=environ, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return the answer; a failed request has an `error`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended with code {self.process.wait()}")
        return json.loads(line)

    def load(self, x: Sample, words: dict[str, Any]) -> str | None:
        """Load a problem and check the results. Returns the reason not to time it, or None."""
        results = self.folder / "results"
        answer = self.ask("load", problem=str(self.folder / "problem"), results=str(results), words=words)
        if "error" in answer:
            return answer["error"]
        if Path(answer["package"]).parent.parent != self.tree:
            raise RuntimeError(f"{self.name} runs {answer['package']}, not the package of {self.tree}")
        found = torch.load(results)
        outputs = len(x.cotangents)
        try:
            x.judge(tuple(found[:outputs]), found[outputs:])
        except AssertionError as failure:
            return f"wrong: {failure}"
        return None

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@contextlib.contextmanager
def sides(revision: str) -> Iterator[list[Side]]:
    """The working tree twice and the other revision, each in its own process."""
    packed = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True)
    if packed.returncode:
        raise SystemExit(f"--base {revision}: {packed.stderr.decode().strip()}")
    commit = said("git", "rev-parse", "--short=10", f"{revision}^{{commit}}")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name).resolve()
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
            archive.extractall(folder / "tree", filter="data")
        trees = {OURS: ROOT, AGAIN: ROOT, commit: folder / "tree"}
        found = [Side(side, tree, folder) for side, tree in trees.items()]
        for side in found:
            stack.callback(side.end)
        yield found


def measured(
    case: Case, what: Row, chosen: list[Provider], dtype: str, turns: Turns, found: list[Side], tick: Callable[[], Any]
) -> list[Row]:
    """Rows of one case: for each backend, time, noise and speedup over the base revision."""
    x = Sample.draw(case, getattr(torch, dtype), turns.device)
    if isinstance(x.inputs.options["mask"], Mask):
        why = "a Mask holds functions and does not leave its process"
        return [what | {"provider": y.name, "status": "unavailable", "reason": why} for y in chosen]
    kept = {"qkv": x.inputs.qkv, "kwargs": x.inputs.kwargs, "leaves": x.leaves, "cotangents": x.cotangents}
    torch.save(kept, found[0].folder / "problem")
    rows = []
    for provider in chosen:
        assert provider.words is not None
        where = what | {"provider": provider.name, "against": found[-1].name}
        reasons = {side.name: why for side in found if (why := side.load(x, provider.words))}
        if reasons:
            wrong = any(why.startswith("wrong") for why in reasons.values())
            words = "; ".join(f"{name}: {why}" for name, why in reasons.items())
            rows.append(where | {"status": "refused" if wrong else "unavailable", "reason": words[:400]})
            continue
        for direction in turns.directions:
            took: dict[str, list[float]] = {side.name: [] for side in found}
            for turn in range(turns.rounds):
                for side in found if turn % 2 else reversed(found):
                    answer = side.ask("time", direction=direction, seconds=turns.seconds)
                    if "error" in answer:
                        raise RuntimeError(f"{side.name}: {answer['error']}")
                    took[side.name].append(answer["ms"])
                tick()
            rows += [where | {"direction": direction, "status": "timed"} | row for row in compared(*took.values())]
    return rows


def compared(ours: list[float], again: list[float], base: list[float]) -> list[Row]:
    """The speedup over the base, and whether it is noise.

    It is noise if two runs of the same version differ by as much, or if the rounds disagree on its sign.
    """
    alike = [b / a for a, b in zip(ours, again, strict=True)]
    ratios = [b / a for a, b in zip(ours, base, strict=True)]
    _, low, high = quantiles(alike)
    noise = max(high, 1 / low)
    middle, low, high = quantiles(ratios)
    lost = 1 / noise <= middle <= noise or low <= 1 <= high
    verdict = "noise" if lost else "faster" if middle > 1 else "slower"
    reason = f"{verdict}: the same version differs by up to {100 * (noise - 1):.1f} %"
    return [figure("ms", ours), figure("a/a", alike), figure("speedup", ratios, reason=reason)]
