"""The wheel and the source package, built and tried where nothing but the core's own needs is installed."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from conftest import build_tiny

import fewbit

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "demo-out")
SCRIPTS = "Scripts" if os.name == "nt" else "bin"


def core_requirements() -> set[str]:
    """What `pip install fewbit` brings, by the metadata of what is installed here."""
    requirement = pytest.importorskip("packaging.requirements").Requirement
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert listed is not None
    waiting, found = re.findall(r'"(.+?)"', listed[1]), set()
    while waiting:
        wanted = requirement(waiting.pop())
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if name in found or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        try:
            waiting += distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.add(name)
    return found


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, source package) built from a copy of the checkout, the wheel from the source package."""
    pytest.importorskip("build", reason="needs build: pip install 'fewbit[dev]'")
    copy = tmp_path_factory.mktemp("source") / "fewbit"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,), (source,) = (copy / "dist").glob("*.whl"), (copy / "dist").glob("*.tar.gz")
    return wheel, source


@pytest.fixture(scope="module")
def bare(packages: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and links to the core's requirements; torch is too large to install again."""
    folder = tmp_path_factory.mktemp("bare") / "environment"
    venv.create(folder, symlinks=os.name != "nt")
    python = folder / SCRIPTS / "python"
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", purelib], capture_output=True, text=True, check=True).stdout.strip())
    for name in core_requirements():
        for top in {file.parts[0] for file in distribution(name).files or []} - {"..", "__pycache__"}:
            here, there = Path(str(distribution(name).locate_file(top))), site / top
            if here.exists() and not there.exists():
                try:
                    there.symlink_to(here, target_is_directory=here.is_dir())
                except OSError:
                    pytest.skip("no links on this system")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install"]
    command += ["--quiet", "--no-deps", "--no-index", str(packages[0])]
    installed = subprocess.run(command, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr
    return folder


def run(bare: Path, *words: str | Path) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [str(bare / SCRIPTS / words[0]), *map(str, words[1:])]
    result = subprocess.run(command, capture_output=True, text=True, cwd=bare, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.mark.slow
def test_what_the_packages_hold(packages: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(packages[0]) as wheel:
        names = wheel.namelist()
        (where,) = (name for name in names if name.endswith("/METADATA"))
        metadata = wheel.read(where).decode("utf-8")
    assert {"fewbit/py.typed", "fewbit/report/page.html.j2", "fewbit/cli.py"} <= set(names)
    assert {name.split("/")[0] for name in names} == {"fewbit", f"fewbit-{fewbit.__version__}.dist-info"}
    assert f"\nVersion: {fewbit.__version__}\n" in metadata
    with tarfile.open(packages[1]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md", "Makefile", "constraints.txt"} <= held
    assert {"docs/format.md", "tests/conftest.py", "tests/grids/test_grids.py", "benchmarks/tables.py"} <= held


@pytest.mark.slow
def test_the_core_alone_quantizes(bare: Path, tmp_path: Path) -> None:
    assert run(bare, "fewbit", "--version").stdout.strip() == f"fewbit {fewbit.__version__}"
    absent = "transformers", "accelerate", "matplotlib", "datasets", "gguf", "huggingface_hub"
    code = f"import importlib.util as u, fewbit; print(fewbit.__file__, *filter(u.find_spec, {absent}))"
    where, *found = run(bare, "python", "-c", code).stdout.split()
    assert Path(where).is_relative_to(bare) and found == []
    model = build_tiny(tmp_path / "model")
    printed = run(bare, "fewbit", "quantize", model, tmp_path / "small", "--bits", "4", "--json").stdout
    assert json.loads(printed)["models"][0]["bits_per_weight"] < 8
    run(bare, "fewbit", "inspect", tmp_path / "small")
    run(bare, "fewbit", "unpack", tmp_path / "small", tmp_path / "plain")
    assert (tmp_path / "plain" / "model.safetensors").exists()


@pytest.mark.slow
def test_what_is_missing_is_named(bare: Path, tmp_path: Path) -> None:
    model = build_tiny(tmp_path / "model")
    for words, package, extra in (
        (["eval", model, "--data", "topics", "--windows", "1", "--seq-len", "32"], "transformers", "hf"),
        (["quantize", model, tmp_path / "out", "--html", tmp_path / "page.html"], "matplotlib", "report"),
    ):
        result = subprocess.run([str(bare / SCRIPTS / "fewbit"), *map(str, words)], capture_output=True, text=True)
        assert result.returncode == 2
        assert package in result.stderr and f"fewbit[{extra}]" in result.stderr
        assert "Traceback" not in result.stderr


def test_the_version_stands_in_one_place() -> None:
    from fewbit.version import __version__

    assert fewbit.__version__ == __version__
    stated = re.compile(r"^(?:__)?version(?:__)? *[=:] *[\"']?\d", re.MULTILINE)
    files = (ROOT / "pyproject.toml", ROOT / "CITATION.cff", *(ROOT / "fewbit").rglob("*.py"))
    found = [path.name for path in files if stated.search(path.read_text(encoding="utf-8"))]
    assert found == ["version.py"]
