"""The folder of a study: its job, one file for every finished cell, and in the end its result."""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from fewbit.checkpoints.json_file import drop, read_json, write_json
from fewbit.checkpoints.output import is_of_the_system
from fewbit.checkpoints.stamps import differences
from fewbit.checkpoints.workdir import lock_folder
from fewbit.errors import FewbitError
from fewbit.studies.study import Cell, Row

RESULT = "study.json"
PAGE = "study.html"
_JOB = "job.json"
_FOLDERS = ("cells", "work")
_KEYS = frozenset(("study", "model", "protocol", "calibration", "presets", "fewbit"))
"""What the job of a study has, and what others call a job has not."""


class StudyFolder:
    """A study's folder while one process writes it."""

    def __init__(self, out: Path, job: dict[str, Any], overwrite: bool = False) -> None:
        """Open or continue the study in `out`.

        job: plain JSON that fixes the result. A folder with another job is refused, or with `overwrite` begun again;
        a folder that no study made is always refused.
        """
        self.out, self._cells = out, out / "cells"
        job = as_json(job)
        self._new = not out.exists()
        before = _job_of(out)
        if before is not None and before != job and not overwrite and _holds_work(out):
            raise FewbitError(
                f"{out}: contains a study with other arguments ({differences(before, job)}): repeat those to resume "
                "it, choose another name, or pass --overwrite to start again"
            )
        out.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = lock_folder(out, out)
        if before != job:
            if before is not None:
                self._clear()
            # First of all: what else is here is known to be a study's by it.
            write_json(out / _JOB, job)
        self._cells.mkdir(exist_ok=True)

    def _clear(self) -> None:
        for name in _FOLDERS:
            shutil.rmtree(self.out / name, ignore_errors=True)
        for name in (RESULT, PAGE):
            drop(self.out / name)

    def leave(self) -> None:
        """End without a result: a study that holds nothing yet goes, so that nothing blocks another."""
        if not _holds_work(self.out):
            self._clear()
            drop(self.out / _JOB)
            if self._new and not any(self.out.iterdir()):
                self.out.rmdir()

    def release(self) -> None:
        """Let other processes at the folder; called when work ends, well or not."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def rows(self, index: int, cell: Cell) -> list[Row] | None:
        """The rows of a cell that is finished, else None."""
        record = read_json(self._path(index, cell))
        return record["rows"] if isinstance(record, dict) and record.get("cell") == as_json(cell) else None

    def put(self, index: int, cell: Cell, rows: list[Row], seconds: float) -> None:
        """Keep a finished cell at once."""
        finite = [{key: value for key, value in row.items() if not _is_odd(value)} for row in rows]
        write_json(self._path(index, cell), {"cell": cell, "seconds": seconds, "rows": finite})

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result; what was needed on the way goes."""
        write_json(self.out / RESULT, result)
        shutil.rmtree(self.out / "work", ignore_errors=True)

    def _path(self, index: int, cell: Cell) -> Path:
        text = json.dumps(cell, sort_keys=True, allow_nan=False)
        return self._cells / f"{index:04d}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"


def _job_of(out: Path) -> dict[str, Any] | None:
    """The job of the study in a folder; None for no folder, or one that is empty.

    Raises FewbitError when anything else is there: a name alone is no proof that a study made it.
    """
    refused = FewbitError(f"{out}: is not the folder of a study: choose another name, or remove it")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise refused
    if not out.exists():
        return None
    names = {path.name: path for path in out.iterdir() if not is_of_the_system(path.name)}
    if not names.keys() - {f"{_JOB}.partial"}:
        return None
    job = read_json(out / _JOB) if _JOB in names else None
    if not isinstance(job, dict) or not job.keys() >= _KEYS:
        raise refused
    for name in (_JOB, RESULT, PAGE, *_FOLDERS):
        if name in names and (names[name].is_symlink() or names[name].is_dir() != (name in _FOLDERS)):
            raise FewbitError(f"{names[name]}: fewbit did not write this file: move it out of the study's folder first")
    return job


def _holds_work(out: Path) -> bool:
    """Whether a study's folder holds a finished cell, or anything that was made for all of them."""
    return any((out / name).is_dir() and any((out / name).iterdir()) for name in _FOLDERS) or (out / RESULT).exists()


def as_json(data: dict[str, Any]) -> dict[str, Any]:
    """What data become when they are written as JSON and read again."""
    found: dict[str, Any] = json.loads(json.dumps(data, allow_nan=False))
    return found


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
