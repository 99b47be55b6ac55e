"""Run our GPTQ, AWQ and MLX folders in the programs that read them, each in an environment of its own.

    python benchmarks/interop.py gptq
    python benchmarks/interop.py mlx --data wiki.txt

Makes `.venv-NAME` once (from constraints.txt), runs `tests/exports/test_integer_readers.py` in it, and compares
smollm2-135m with `integer_readers.py` (for MLX, whose build for processors is slow in 16 bits, in float32). The last
line says what passed. Exits with 1 if a test failed or a figure is beyond its bound. Where a package does not install,
it says so and succeeds.
"""

import argparse
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Part:
    """packages: what is installed. alone: what is installed without what it asks for. tests: which of the tests run.
    runs: options of `integer_readers.py`, a run each. modules: what must be there, or the tests would be skipped."""

    packages: tuple[str, ...]
    alone: tuple[str, ...]
    tests: str
    runs: tuple[tuple[str, ...], ...]
    modules: tuple[str, ...]


_HALF = ("--dtype", "float16")
# gptqmodel 7.7.0 asks for torch 2.14; it runs with the torch of constraints.txt, and then without much of the rest.
_GPTQ = (
    *("optimum==2.3.0", "datasets", "threadpoolctl", "protobuf", "pillow"),
    *("device-smi", "pypcre", "tokenicer", "logbar"),
)
PARTS = {
    "gptq": Part(
        _GPTQ,
        ("gptqmodel==7.7.0", "defuser==0.0.28", "torchao==0.18.0"),
        "gptq or awq",
        # With 2 bits and no data the model is noise, which float16 changes beyond the bound: the tests have 2 bits.
        (("--format", "gptq", *_HALF, "--bits", "8", "--bits", "4", "--bits", "3"), ("--format", "awq", *_HALF)),
        ("gptqmodel", "optimum"),
    ),
    "mlx": Part(
        ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"),
        (),
        "mlx",
        (("--format", "mlx", "--float32"),),
        ("mlx.core", "mlx_lm"),
    ),
}


def environment(name: str) -> Path | None:
    """The interpreter of the environment, or None with a line that says what does not install."""
    part, folder = PARTS[name], ROOT / f".venv-{name}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    ready, holds = folder / ".ready", " ".join(part.packages + part.alone)
    if ready.exists() and ready.read_text() == holds:
        return python
    venv.create(folder, with_pip=True, clear=True)
    pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    tests = ("pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100")
    own = ("--constraint", ROOT / "constraints.txt", "--editable", f"{ROOT}[hf,fast]", *tests)
    steps: list[tuple[str | Path, ...]] = [
        (*own, *part.packages),
        *([("--no-deps", *part.alone)] if part.alone else []),
    ]
    for step in steps:
        done = subprocess.run([*pip, *step], capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: skipped: {holds}: {done.stderr.strip().splitlines()[-1]}")
            return None
    ready.write_text(holds)
    return python


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("--data", default="topics")
    choices = parser.parse_args()
    python = environment(choices.name)
    if python is None:
        return 0
    part, here = PARTS[choices.name], Path(__file__).parent
    common = [
        "--method",
        "rtn",
        "--windows",
        "2",
        "--data",
        choices.data,
        "--results",
        ROOT / f".interop-{choices.name}",
    ]
    tests: list[str | Path] = [
        "-m",
        "pytest",
        "-q",
        ROOT / "tests" / "exports" / "test_integer_readers.py",
        "-k",
        part.tests,
    ]
    commands: dict[str, list[str | Path]] = {
        "packages": ["-c", f"import {', '.join(part.modules)}"],
        "tests": tests,
        **{" ".join(run): [here / "integer_readers.py", *run, *common] for run in part.runs},
    }
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    failed = []
    for name, command in commands.items():
        print(f"{choices.name}: {name}", flush=True)
        if subprocess.run([python, *command], cwd=ROOT, env=one_thread).returncode:
            failed.append(name)
    print(f"{choices.name}: " + (f"FAILED: {'; '.join(failed)}" if failed else f"passed: {'; '.join(commands)}"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
