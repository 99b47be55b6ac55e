"""The cache of fetched and converted models. A folder in it appears only when it is complete."""

import glob
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """`$FEWBIT_CACHE` if it is set, else `fewbit` in the user's cache folder."""
    if named := os.environ.get("FEWBIT_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fewbit"


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Return `target`, built first if it does not exist: `build` fills a temporary folder that is then renamed."""
    if target.is_dir():
        return target
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    for left in target.parent.glob(f"{glob.escape(target.name)}.partial-*"):
        # A killed process could not remove its temporary folder, which may be many gigabytes.
        if not _is_running(left.name.rpartition("-")[2]):
            shutil.rmtree(left, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        build(partial)
        if not target.is_dir():
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _is_running(process: str) -> bool:
    """Whether a process may still exist; True if that cannot be determined safely."""
    if os.name != "posix" or not process.isdecimal():
        return True
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
