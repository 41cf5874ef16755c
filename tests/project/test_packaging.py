"""How the package installs: wheel, sdist, editable, a bare checkout; its public names and versions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fused_attn
from tests import KERNELS, PACKAGE, ROOT
from tests.processes import run

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


def probe(cwd: Path, *path: Path, python: object = sys.executable) -> dict[str, str]:
    found = json.loads(run(python, "-c", PROBE, cwd=cwd, path=path))
    assert found["typed"] and not found["beside"]
    ours = {
        f"fused_attn.{path.relative_to(PACKAGE).with_suffix('')}".replace("/", ".") for path in PACKAGE.rglob("*.py")
    }
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
    expected = {f"fused_attn/{path.relative_to(PACKAGE)}" for path in PACKAGE.rglob("*.py")}
    expected |= {f"fused_attn/kernels/{path.name}" for path in KERNELS.glob("*.py")}
    expected |= {f"fused_attn/tuning/tables/{path.name}" for path in (PACKAGE / "tuning" / "tables").glob("*.json")}
    assert contents(wheel) == expected | {"fused_attn/py.typed", TABLE}


@needs_a_builder
def test_sdist_is_a_checkout_and_builds_the_same_wheel(wheel: Path, checkout: Path, tmp_path: Path) -> None:
    for name in ("bench", "docs", "examples", "tests"):
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
    (checkout / "tests" / "test_import_probe.py").write_text(
        "def test_import_probe():\n"
        "    import fused_attn.kernels.types, kernels\n"
        f"    assert fused_attn.__file__ == {str(checkout / 'fused_attn' / '__init__.py')!r}\n"
        f"    assert fused_attn.kernels.types.__file__ == {str(checkout / 'kernels' / 'types.py')!r}\n"
        "    assert kernels.OTHER\n"
    )
    program = (sys.executable, *command) if command[0] == "-m" else (Path(sys.executable).parent / command[0],)
    said = run(*program, "-q", "-p", "no:cacheprovider", cwd=checkout, path=(decoy,))
    assert "1 passed" in said


def test_kernels_directory_shadows_no_package() -> None:
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


def test_dir_shows_names_that_exist() -> None:
    """Functions and modules alike, although some modules are imported only when they are asked for."""
    assert [name for name in dir(fused_attn) if not hasattr(fused_attn, name)] == []


def test_versions_agree() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    declared = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
    assert declared and declared[1] == fused_attn.__version__
    assert f"## {fused_attn.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    oldest = dict(re.findall(r"^(\w+)==(\d+\.\d+)", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    assert oldest == dict(re.findall(r'"(torch|triton)>=(\d+\.\d+)', project))
