"""An output folder that appears only when it is complete, and runs that resume after a kill.

A run works in a sibling folder, `.NAME.fewbit-partial`, which contains the job of the run and every finished shard. At
the end, the files of the output, and nothing else, are collected in a subfolder; the last step renames this subfolder.
If either place contains anything that does not belong to the run, it is not touched, and the run is refused.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from fewbit.checkpoints.companions import Companion
from fewbit.checkpoints.json_file import drop, read_json, write_json
from fewbit.checkpoints.output import (
    FILES,
    RUN,
    Standing,
    check_place,
    check_replaceable,
    is_of_the_system,
    made_by_fewbit,
    refuse_meanwhile,
    remove_made,
)
from fewbit.checkpoints.source import INDEX_NAME
from fewbit.checkpoints.stamps import differences
from fewbit.errors import FewbitError, WorkKeptError, is_out_of_memory

_JOB, _MARK = ".fewbit-job.json", "fewbit_work"
_FAILED = ".fewbit-failed.json"
_PUBLISHING = ".fewbit-publishing.json"
_OUTPUT = "output"
SOLVED = ".solved"
"""Ending of files that are kept only until the output is complete."""
SPILLED = ".states"
"""Ending of files that are deleted as soon as they are mapped; one remains only if the process is killed in between."""
TOKENS = "tokens"
"""Name of the file with the SHA-256 of the calibration tokens; by itself, it does not count as work to resume."""
_OWN = (_JOB, _FAILED, _PUBLISHING)
_ENDINGS = (SOLVED, SPILLED, ".partial", ".safetensors", ".safetensors.json")


def check_output(out: Path, source: Path, overwrite: bool) -> Standing | None:
    """What a run may replace at `out`: None if nothing exists there, otherwise, with `overwrite`, what fewbit made.

    Raises FewbitError if anything else exists at `out`, or if one of the two folders is inside the other.
    """
    check_place(out, source)
    tidy(out)
    return check_replaceable(out, source, overwrite)


def tidy(out: Path) -> None:
    """Remove the work folder of a run that was killed after its last rename, or before it did anything.

    Raises FewbitError if something else has that name.
    """
    path = WorkFolder.place(out)
    if not os.path.lexists(path):
        return
    _refuse_place(path)
    job = read_job(path)
    published = (path / _PUBLISHING).is_file() and not (path / _OUTPUT).exists()
    if job is not None and _work_in(path) and not published:
        return
    work = WorkFolder(out, job or {})
    if published:
        _remove_old(work.out)
    work.discard()


def holds_work(out: Path) -> bool:
    """Whether there is unfinished work on `out` that only the same command can resume."""
    path = WorkFolder.place(out)
    return path.is_dir() and bool(_work_in(path)) and not (path / _FAILED).exists()


def read_job(path: Path) -> dict[str, Any] | None:
    """The job of a work folder; None if no run of fewbit has started there."""
    found = read_json(path / _JOB)
    return found["job"] if isinstance(found, dict) and _MARK in found else None


class WorkFolder:
    """The folder in which one run builds its output."""

    def __init__(self, out: Path, job: dict[str, Any], restart: bool = False, replaces: Standing | None = None) -> None:
        """Start or resume the work on `out`; only one process at a time.

        job: the JSON values that determine the result. An unfinished run with a different job is refused, or discarded
        with `restart`. replaces: what :func:`check_output` allowed to be replaced at the end.
        """
        self._named, self.out, self.path = out, out.absolute(), self.place(out)
        self._replaces = replaces
        self._shards: dict[str, None] = {}
        self._files: dict[str, None] = {}
        _refuse_place(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = lock_folder(self.path, out)
        self._open = True
        try:
            self._begin(job, restart)
        except BaseException:
            self.release()
            raise

    def _begin(self, job: dict[str, Any], restart: bool) -> None:
        before = read_job(self.path)
        self._refuse_foreign(begun=before is not None)
        self._failed_before = (self.path / _FAILED).is_file()
        if _text(before) != _text(job):
            if before is not None and _work_in(self.path) and not (restart or self._failed_before):
                raise FewbitError(
                    f"{self._named}: a run with other arguments was interrupted here ({differences(before, job)}): "
                    "repeat those arguments to resume it, or pass --overwrite to start again"
                )
            self._empty()
            self._failed_before = False
            write_json(self.path / _JOB, {_MARK: 1, "job": job})
        drop(self.path / _FAILED)
        self._begun_with = _work_in(self.path)

    @staticmethod
    def place(out: Path) -> Path:
        """The work folder of `out`."""
        return out.absolute().with_name(f".{out.name}.fewbit-partial")

    def release(self) -> None:
        """Release the folder for other processes; called when the work ends, with or without success."""
        self._open = False
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def leave(self, error: BaseException) -> None:
        """End the work because of `error` so that nothing blocks another attempt.

        Work without results is removed. After an interruption, a full disk or too little memory, the work is kept and
        only the same command can resume it. After any other error it is kept too, but a run with other arguments
        replaces it.
        """
        if not self._open:
            return
        try:
            found = _work_in(self.path)
            if not found:
                self.discard()
            elif self._failed_before if found == self._begun_with else not _goes_on(error):
                write_json(self.path / _FAILED, {"error": f"{type(error).__name__}: {error}"[:500]})
        except (OSError, FewbitError):
            # The error that ended the run is the one to report.
            pass
        finally:
            self.release()

    def discard(self) -> None:
        """Remove the folder, because its work cannot be resumed or is finished."""
        self._refuse_foreign()
        self._remove()

    def _refuse_foreign(self, begun: bool = True) -> None:
        """Raise FewbitError if the folder contains files that no run wrote.

        If no job has `begun`, only the temporary file of a job is allowed.
        """
        for path in self.path.iterdir():
            name = path.name
            own = name in _OWN or name.endswith(_ENDINGS) or name.startswith(".tmp")
            if not begun:
                own = name == f"{_JOB}.partial"
            if is_of_the_system(name) or (own and path.is_file() and not path.is_symlink()):
                continue
            if not (begun and name == _OUTPUT and path.is_dir() and not path.is_symlink()):
                raise WorkKeptError(
                    f"{path}: fewbit did not write this file: move it out of fewbit's work folder first"
                )

    def _empty(self) -> None:
        """Remove everything except the job.

        The file that states that the output was renamed is removed last if that is true, and first if it is not. So it
        is never wrong, even if the process is killed in between.
        """
        published = not (self.path / _OUTPUT).exists()
        for path in sorted(self.path.iterdir(), key=lambda path: (path.name == _PUBLISHING) == published):
            if path.name == _OUTPUT:
                shutil.rmtree(path)
            elif path.name != _JOB and not is_of_the_system(path.name):
                path.unlink()

    def _remove(self) -> None:
        """Remove the job last: as long as it exists, the rest is known to be fewbit's."""
        self._empty()
        drop(self.path / _JOB)
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def shard(self, name: str) -> Path:
        """The path for a weight file. It is kept when a run is resumed, and it is published."""
        self._shards[name] = None
        return self.path / name

    def file(self, name: str) -> Path:
        """The path for any other file of the output. Only paths from :meth:`shard` and this method are published."""
        self._files[name] = None
        path = self.path / _OUTPUT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def written(self, shard: str) -> Path:
        """The path of a shard. A run that was killed while publishing may have moved it."""
        moved = self.path / _OUTPUT / shard
        return moved if moved.is_file() and not (self.path / shard).is_file() else self.path / shard

    @property
    def shard_bytes(self) -> int:
        """Total bytes of the shards that this run has written or found."""
        return sum(self.written(name).stat().st_size for name in self._shards)

    def finished(self, shard: str) -> list[dict[str, Any]] | None:
        """The records of a shard that an earlier run finished, else None."""
        record, path = read_json(self.path / f"{shard}.json"), self.written(shard)
        if record is None or not path.is_file() or path.stat().st_size != record["bytes"]:
            return None
        self._shards[shard] = None
        return record["tensors"]

    def finish(self, shard: str, tensors: list[dict[str, Any]]) -> None:
        """Record that a shard has been written."""
        write_json(self.path / f"{shard}.json", {"bytes": self.written(shard).stat().st_size, "tensors": tensors})

    def publish(self) -> None:
        """Rename the work to its final name, and replace what was allowed to be replaced.

        If the process is killed at any point, either an output is complete at `out`, or all of the new work is kept for
        the next run. Raises WorkKeptError if something else has that name.
        """
        refuse_meanwhile(self.out, self._replaces)
        self._gather()
        write_json(self.path / _PUBLISHING, {})
        old = self._set_aside()
        try:
            (self.path / _OUTPUT).rename(self.out)
        except OSError:
            if old is not None and not self.out.exists():
                old.rename(self.out)
            refuse_meanwhile(self.out, self._replaces)
            raise
        # In this order, because as long as the work folder exists, the next run does the remaining steps.
        _remove_old(self.out)
        self._remove()

    def _gather(self) -> None:
        """Move the files of the output, and nothing else, into the folder that will be renamed."""
        self._refuse_foreign()
        listed = self.file(RUN)
        for name in self._shards:
            self.written(name).replace(self.path / _OUTPUT / name)
        names = sorted([*self._shards, *self._files])
        write_json(listed, {**(read_json(listed) or {}), FILES: names})
        folder = self.path / _OUTPUT
        for parent, folders, files in os.walk(folder, topdown=False):
            for name in files:
                if (Path(parent) / name).relative_to(folder).as_posix() not in {*names}:
                    (Path(parent) / name).unlink()
            for name in folders:
                if not any((Path(parent) / name).iterdir()):
                    (Path(parent) / name).rmdir()

    def _set_aside(self) -> Path | None:
        """Move the old output out of the way; it is deleted once the new output is in place."""
        if not os.path.lexists(self.out):
            return None
        old = self.out.with_name(f"{_old(self.out)}{os.getpid()}")
        self.out.rename(old)
        try:
            # Between the last check and the renaming, another folder may have been put at this path.
            refuse_meanwhile(self.out, self._replaces, moved=old)
        except WorkKeptError:
            old.rename(self.out)
            raise
        return old


def _refuse_place(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise FewbitError(
            f"{path}: fewbit needs this name for its work, but something else has it: move it elsewhere first"
        )


def _work_in(path: Path) -> set[str]:
    """Names of files in a work folder from which a run can resume."""
    names = {entry.name for entry in path.iterdir()}
    shards = {name for name in names if name.endswith(".safetensors.json")}
    return shards | {name for name in names if name.endswith(SOLVED) and name != TOKENS + SOLVED}


def _text(job: dict[str, Any] | None) -> str:
    """A job as text, so that NaN in a config is equal to NaN."""
    return json.dumps(job, sort_keys=True)


def _goes_on(error: BaseException) -> bool:
    """Whether the same command may succeed if it is run again."""
    if isinstance(error, FewbitError):
        return isinstance(error, WorkKeptError)
    return (
        not isinstance(error, Exception) or bool(isinstance(error, OSError) and error.errno) or is_out_of_memory(error)
    )


def _old(out: Path) -> str:
    return f".{out.name}.fewbit-old-"


def _remove_old(out: Path) -> None:
    """Remove outputs that were replaced, including those of killed runs."""
    for path in list(out.parent.iterdir()):
        if path.name.startswith(_old(out)) and path.name.removeprefix(_old(out)).isdecimal() and made_by_fewbit(path):
            remove_made(path)


def lock_folder(folder: Path, out: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed; None if the system has no such locks.

    Raises FewbitError if another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The process that had the lock may have removed the folder in the meantime.
        if os.fstat(descriptor).st_ino == folder.stat().st_ino:
            return descriptor
        raise BlockingIOError
    except (BlockingIOError, FileNotFoundError) as error:
        os.close(descriptor)
        raise FewbitError(
            f"{out}: another run is writing to it: wait until that run ends, or choose another name"
        ) from error
    except OSError:
        # Some network file systems do not support locks.
        return descriptor


def copy_companions(companions: tuple[Companion, ...], work: WorkFolder) -> None:
    """Copy tokenizer, generation config, chat templates and the like into the output."""
    for companion in companions:
        target = work.file(companion.name)
        target.parent.mkdir(exist_ok=True)
        # The target may be a link, which copying would follow.
        drop(target)
        shutil.copyfile(companion.path, target)


def write_index(work: WorkFolder, shards: dict[str, list[str]]) -> None:
    """Write the index of several shards (file name -> tensor names); a single file needs none."""
    if len(shards) > 1:
        size = sum(work.written(name).stat().st_size for name in shards)
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        write_json(work.file(INDEX_NAME), {"metadata": {"total_size": size}, "weight_map": weight_map})
