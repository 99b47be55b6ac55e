"""Nothing that only Linux has is needed: every module is imported, and a model quantized, without it."""

import ast
import os
import pkgutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import build_tiny, folder_bytes

import fewbit
from fewbit.checkpoints import read_at
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import open_checkpoint

PACKAGE = Path(fewbit.__file__).parent
UNIX_ONLY = ("fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "readline", "curses", "syslog")
# Of the module os: what Windows, or Windows and macOS, do not have and this package could be tempted by.
ABSENT = """
    sched_getaffinity posix_fallocate posix_fadvise preadv pwritev pread pwrite getuid geteuid sysconf O_DIRECTORY
    O_DIRECT O_NOFOLLOW mkfifo killpg setsid
"""
ELSEWHERE = f"""
import os, pathlib, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in {UNIX_ONLY}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

def hide():
    # The standard library found out at its import what there is.
    import shutil
    shutil._use_fd_functions = shutil._USE_CP_SENDFILE = False
    for name in {UNIX_ONLY}:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, Hidden())
    for name in {ABSENT.split()}:
        if hasattr(os, name):
            delattr(os, name)
    kept = os.open
    def refusing(path, *rest, **more):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return kept(path, *rest, **more)
    os.open = refusing
    def no_proc(path, *rest, _open=open, **more):
        if str(path).startswith("/proc"):
            raise FileNotFoundError(2, "No such file", str(path))
        return _open(path, *rest, **more)
    import builtins
    builtins.open = no_proc
"""


def run(code: str, *words: str | Path) -> subprocess.CompletedProcess:
    # What other packages need is imported before; they have guards of their own.
    first = "import torch, numpy, safetensors.torch, pydantic, typer, rich.console, rich.progress, concurrent.futures\n"
    command = [sys.executable, "-c", f"{ELSEWHERE}\n{first}hide()\n{code}", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_every_module_is_imported_without_them() -> None:
    names = [module.name for module in pkgutil.walk_packages([str(PACKAGE)], "fewbit.")]
    names = [name for name in names if not name.endswith("__main__")]
    if find_spec("triton") is None:
        # It is for Linux alone, and these are imported for CUDA only.
        names = [name for name in names if ".triton_" not in name]
    # Extras that are not installed are not what is asked here; transformers comes before things are hidden.
    code = "import importlib\n" + f"for name in {names}:\n    importlib.import_module(name)\nprint(len({names}))"
    before = "import numba, transformers, transformers.quantizers.auto, matplotlib.figure, jinja2\n"
    command = [sys.executable, "-c", f"{ELSEWHERE}\nimport torch\n{before}hide()\n{code}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout) > 80


@pytest.mark.slow
def test_a_model_is_quantized_without_them(tmp_path: Path) -> None:
    model = build_tiny(tmp_path / "model")
    fewbit.quantize(model, tmp_path / "here", fewbit.preset("adpq+"))
    result = run("from fewbit.cli import run; sys.exit(run(sys.argv[1:]))", "quantize", model, tmp_path / "there")
    assert result.returncode == 0, result.stderr[-2000:]
    here, there = folder_bytes(tmp_path / "here"), folder_bytes(tmp_path / "there")
    assert here.keys() == there.keys()
    assert here["model.safetensors"] == there["model.safetensors"]


def test_reading_with_a_seek(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(build_tiny(tmp_path / "model"))
    entry = max(checkpoint.entries.values(), key=lambda one: one.bytes)
    with FileReader() as reader:
        expected = reader.read(entry, 3, 100)
        monkeypatch.delattr(os, "preadv", raising=False)
        assert torch.equal(reader.read(entry, 3, 100), expected)
        assert read_at.bytes_at(reader.descriptor(entry.file), 1 << 30, entry.start)[:200]
        assert read_at.bytes_at(reader.descriptor(entry.file), 5, 1 << 40) == b""


@pytest.mark.slow
def test_what_only_some_systems_have_is_imported_where_it_is_used() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & set(UNIX_ONLY), path
