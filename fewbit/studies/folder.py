"""The folder of a study: its job, one file for every finished cell, and in the end its result."""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from fewbit.checkpoints.workdir import differences, lock_folder, read_json, write_json
from fewbit.errors import FewbitError
from fewbit.studies.study import Cell, Row

RESULT = "study.json"
PAGE = "study.html"
_JOB = "job.json"


class StudyFolder:
    """A study's folder while one process writes it."""

    def __init__(self, out: Path, job: dict[str, Any], overwrite: bool = False) -> None:
        """Open or continue the study in `out`.

        job: plain JSON that fixes the result. A folder with another job is refused, or with `overwrite` begun again;
        a folder that no study made is always refused.
        """
        self.out = out
        job = as_json(job)
        before = read_json(out / _JOB) if out.is_dir() else None
        if out.exists() and (not out.is_dir() or (before is None and any(out.iterdir()))):
            raise FewbitError(f"{out}: is no folder that a study made: choose another name, or remove it")
        if before is not None and before != job and not overwrite:
            raise FewbitError(
                f"{out}: holds a study with other arguments ({differences(before, job)}): repeat those to go on, "
                "choose another name, or pass --overwrite to begin again"
            )
        self._cells = out / "cells"
        self._cells.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = lock_folder(out, out)
        if before != job:
            self._clear()
            write_json(out / _JOB, job)

    def _clear(self) -> None:
        for name in ("cells", "work"):
            shutil.rmtree(self.out / name, ignore_errors=True)
        for name in (RESULT, PAGE):
            (self.out / name).unlink(missing_ok=True)
        self._cells.mkdir()

    def release(self) -> None:
        """Let other processes at the folder; called when work ends, well or not."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def rows(self, index: int, cell: Cell) -> list[Row] | None:
        """The rows of a cell that is finished, else None."""
        record = read_json(self._path(index, cell))
        return None if record is None or record["cell"] != as_json(cell) else record["rows"]

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


def as_json(data: dict[str, Any]) -> dict[str, Any]:
    """What data become when they are written as JSON and read again."""
    found: dict[str, Any] = json.loads(json.dumps(data, allow_nan=False))
    return found


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
