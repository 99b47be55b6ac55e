"""Output folders: where they may be, which ones fewbit made, and which ones a run may replace."""

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.checkpoints.json_file import read_json, write_json
from fewbit.errors import FewbitError, WorkKeptError

CONFIG, REPORT, RUN = "config.json", "fewbit_report.json", "fewbit_run.json"
FILES = "files"
"""Key of the file `RUN`: the names of all files that belong to the folder."""
_PROOFS = (REPORT, CONFIG, RUN)
_LEFT_BY_SYSTEMS = (".DS_Store", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Standing:
    """A folder that a run may replace, in its state when the run begins: its identity, and the file names in it."""

    device: int
    inode: int
    names: frozenset[str]


def standing_at(path: Path) -> Standing | None:
    """What exists at `path`, without following a link; None if nothing does."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    is_folder = path.is_dir() and not path.is_symlink()
    names = frozenset(entry.name for entry in path.iterdir()) if is_folder else frozenset()
    return Standing(status.st_dev, status.st_ino, names)


def refuse_meanwhile(out: Path, allowed: Standing | None, moved: Path | None = None) -> None:
    """Raises WorkKeptError if there is something at `out` (or was `moved` from it) that the run must not replace."""
    now = standing_at(moved or out)
    if now is None:
        return
    advice = f"the finished work is kept: move {out.name} elsewhere and run the same command again"
    if allowed is None or (now.device, now.inode) != (allowed.device, allowed.inode):
        raise WorkKeptError(f"{out}: something with this name appeared during the run; {advice}")
    added = sorted(now.names - allowed.names - {*_LEFT_BY_SYSTEMS})
    if added:
        raise WorkKeptError(f"{out}: {added[0]} was added to it during the run; {advice}")


def check_place(out: Path, source: Path) -> None:
    """Raises FewbitError if `out` is a link or the current folder, or if one of the two folders is inside the other."""
    if out.is_symlink():
        raise FewbitError(f"{out}: is a symbolic link: give the folder itself")
    there, model = out.resolve(), source.resolve()
    if there == Path.cwd():
        raise FewbitError(f"{out}: is the current folder: choose a new one")
    if there == model or model in there.parents:
        raise FewbitError(f"{out}: is inside the model's own folder {source}: choose another place")
    if there in model.parents:
        raise FewbitError(f"{out}: contains the model's folder {source}: choose another place")


def check_replaceable(out: Path, overwrite: bool) -> Standing | None:
    """What a run may replace at `out`, or None. Raises FewbitError if anything else exists there."""
    found = standing_at(out)
    if found is None:
        return None
    if not overwrite:
        raise FewbitError(f"{out}: already exists: choose another name or pass --overwrite")
    if not out.is_dir() or not made_by_fewbit(out):
        raise FewbitError(
            f"{out}: fewbit did not make this folder, so --overwrite does not replace it: remove it first"
        )
    added = _added(out)
    if added:
        raise FewbitError(
            f"{out}: contains {added[0]}, which fewbit did not write, so --overwrite does not replace it: move that "
            "file first"
        )
    return found


def made_by_fewbit(folder: Path) -> bool:
    """Whether a folder is empty or contains files that only fewbit writes; its name alone proves nothing."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    quantization = _object(folder / CONFIG).get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "fewbit":
        return True
    report = _object(folder / REPORT)
    return {"fewbit_version", "recipe"} <= report.keys() or "unpacked_from" in report or not any(folder.iterdir())


def remove_made(folder: Path) -> None:
    """Remove a folder that fewbit made. The files that prove this are removed last, in case the process is killed."""
    for path in folder.iterdir():
        if path.name in _PROOFS:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    shutil.rmtree(folder)


def list_file(out: Path, name: str) -> None:
    """Add a file that was written into a finished folder to the folder's list of files."""
    run = _object(out / RUN)
    if name not in run.get(FILES, ()):
        write_json(out / RUN, {**run, FILES: sorted([*run.get(FILES, ()), name])})


def file_names(folder: Path) -> set[str]:
    """Names of all files in a folder and its subfolders, relative to it, with forward slashes; links count as files."""
    found = set()
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        found |= {(Path(parent) / name).relative_to(folder).as_posix() for name in [*files, *links]}
    return found


def is_of_the_system(name: str) -> bool:
    """Whether a file is one that file systems and file managers create on their own."""
    return name in _LEFT_BY_SYSTEMS or name.startswith((".nfs", "._"))


def _added(out: Path) -> list[str]:
    """Files that fewbit did not write in a folder that fewbit made, as far as that can be determined."""
    names = {name for name in file_names(out) if not is_of_the_system(name.rpartition("/")[2])}
    listed: Collection[str] = _object(out / RUN).get(FILES, ())
    if listed:
        return sorted(names - set(listed) - {RUN})
    # Older versions wrote no list of files, and they made no subfolders.
    return sorted(name for name in names if "/" in name)


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is none."""
    found = read_json(path) if path.is_file() else None
    return found if isinstance(found, dict) else {}
