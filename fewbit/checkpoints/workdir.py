"""An output folder that appears only when it is whole, and a run that goes on where it was killed.

Work happens in a sibling folder, `.NAME.fewbit-partial`, that holds the run's fingerprint and every finished shard.
The last act is one rename.
"""

import glob
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewbit.checkpoints.companions import Companion
from fewbit.checkpoints.json_in import parse_json
from fewbit.checkpoints.source import INDEX_NAME
from fewbit.errors import FewbitError

_JOB = ".fewbit-job.json"
_SAID = 4
SOLVED = ".solved"
"""Ending of what is kept only until the work is whole."""
SPILLED = ".states"
"""Ending of files that have no name for longer than it takes to map them, unless the process was killed just then."""
TOKENS = "tokens"
"""Name of what is kept of the calibration text: its SHA-256, which by itself is no work."""


def check_output(out: Path, source: Path, overwrite: bool) -> None:
    """FewbitError when `out` exists without `overwrite`, or one of the two folders lies inside the other."""
    if out.is_symlink():
        raise FewbitError(f"{out}: is a symbolic link: name the folder itself")
    there, model = out.resolve(), source.resolve()
    if there == Path.cwd():
        raise FewbitError(f"{out}: is the folder you are in: name a new one")
    if there == model or model in there.parents:
        raise FewbitError(f"{out}: lies inside the model's own folder {source}: choose another place")
    if there in model.parents:
        raise FewbitError(f"{out}: contains the model's folder {source}: choose another place")
    tidy(out)
    if out.exists() and not overwrite:
        raise FewbitError(f"{out}: already exists: choose another name or pass --overwrite")
    if out.exists() and not _may_replace(out):
        raise FewbitError(f"{out}: is not a folder that fewbit made, so --overwrite does not touch it: remove it first")


def tidy(out: Path) -> None:
    """Finish what a run that was killed behind its last rename has left to do: remove what only its making needed."""
    if (out / _JOB).is_file() and (out / "fewbit_report.json").is_file():
        _remove_scratch(out)


def _remove_scratch(out: Path) -> None:
    """The run's fingerprint goes last: as long as it is there, so may be the rest."""
    endings = (".safetensors.json", SOLVED, SPILLED, ".partial")
    for path in [*(path for ending in endings for path in out.glob(f"*{ending}")), out / _JOB]:
        if path.is_file():
            path.unlink()


def _may_replace(out: Path) -> bool:
    return out.is_dir() and (not any(out.iterdir()) or (out / "fewbit_report.json").is_file())


class WorkFolder:
    """The folder in which one run builds its output."""

    def __init__(self, out: Path, job: dict[str, Any], restart: bool = False) -> None:
        """Open or continue the work on `out`; one process at a time.

        job: plain JSON values that fix the result; a half-done run with others is refused, or with `restart` dropped.
        """
        self.out = out.absolute()
        self.path = self.place(out)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = lock_folder(self.path, out)
        job_path = self.path / _JOB
        before = read_json(job_path)
        if before is None or (restart and before != job):
            for leftover in self.path.iterdir():
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
            write_json(job_path, job)
        elif before != job:
            self.release()
            raise FewbitError(
                f"{out}: a run with other arguments was interrupted here ({differences(before, job)}): "
                "repeat those arguments to go on, or pass --overwrite to begin again"
            )

    @staticmethod
    def place(out: Path) -> Path:
        """Where the work on `out` happens."""
        return out.absolute().with_name(f".{out.name}.fewbit-partial")

    def release(self) -> None:
        """Let other processes at the folder; called when work ends, well or not."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard_unbegun(self) -> None:
        """Remove the folder when it holds no work yet, so that the same output can be asked for in another way."""
        if self._lock is not None and all(path.name in (_JOB, TOKENS + SOLVED) for path in self.path.iterdir()):
            self.discard()

    def discard(self) -> None:
        """Remove the folder: its work cannot be gone on with."""
        shutil.rmtree(self.path)
        self.release()

    def finished(self, shard: str) -> list[dict[str, Any]] | None:
        """The records of a shard that an earlier run finished, else None."""
        record = read_json(self.path / f"{shard}.json")
        if record is None or not (self.path / shard).is_file():
            return None
        if (self.path / shard).stat().st_size != record["bytes"]:
            return None
        return record["tensors"]

    def finish(self, shard: str, tensors: list[dict[str, Any]]) -> None:
        """Note that a shard is written."""
        write_json(self.path / f"{shard}.json", {"bytes": (self.path / shard).stat().st_size, "tensors": tensors})

    def publish(self) -> None:
        """Give the work its name, in place of an older output of that name.

        Killed at any point, either output is whole under `out`, or all of the new work is kept for the next run.
        """
        if self.out.exists():
            self.out.rename(self.out.with_name(f".{self.out.name}.fewbit-old-{os.getpid()}"))
        self.path.rename(self.out)
        _remove_scratch(self.out)
        for old in self.out.parent.glob(f".{glob.escape(self.out.name)}.fewbit-old-*"):
            shutil.rmtree(old)
        self.release()


def write_json(path: Path, data: Any) -> None:
    """Write JSON by write-then-rename, indented, ending in a newline."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def lock_folder(folder: Path, out: Path) -> int:
    """A descriptor that holds the folder's lock until it is closed; FewbitError when another process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError as error:
        os.close(descriptor)
        raise FewbitError(f"{out}: another run is writing it: wait for that one or choose another name") from error
    return descriptor


def copy_companions(companions: tuple[Companion, ...], work: WorkFolder) -> None:
    """Copy tokenizer, generation config, chat templates and the like into the work folder."""
    for companion in companions:
        target = work.path / companion.name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(companion.path, target)


def write_index(work: WorkFolder, shards: dict[str, list[str]]) -> None:
    """Write the index of several shards (file name -> tensor names); a single file needs none."""
    if len(shards) > 1:
        size = sum((work.path / name).stat().st_size for name in shards)
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        write_json(work.path / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map})


def read_json(path: Path) -> Any:
    """The JSON of a file; None where there is none that is whole."""
    try:
        return parse_json(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two jobs, for a message."""
    before, now = dict(_leaves(before)), dict(_leaves(now))
    keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    said = [f"{key} was {_short(before.get(key))}, is {_short(now.get(key))}" for key in keys[:_SAID]]
    return "; ".join([*said, f"and {len(keys) - _SAID} more"] if len(keys) > _SAID else said)


def _leaves(data: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Values by their path, as in ``choice.lr``."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
