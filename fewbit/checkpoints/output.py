"""Output folders: where they may be, which ones fewbit made, and which ones a run may replace."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.checkpoints.companions import find_companions
from fewbit.checkpoints.json_file import read_json, write_json
from fewbit.checkpoints.origins import origin_of
from fewbit.checkpoints.own_files import CARD, CONFIG, FILES, REPORT, RUN, is_own, is_own_card
from fewbit.checkpoints.shards import is_shard_name
from fewbit.checkpoints.weight_files import INDEX_NAME
from fewbit.errors import FewbitError, WorkKeptError

_PROOFS = (REPORT, CONFIG, RUN)
_SAID = 4
_LEFT_BY_SYSTEMS = (".DS_Store", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Standing:
    """A folder that a run may replace, in its state when the run begins: its identity, and all file names below it."""

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
    return Standing(status.st_dev, status.st_ino, frozenset(file_names(path) if is_folder else ()))


def refuse_meanwhile(out: Path, allowed: Standing | None, moved: Path | None = None) -> None:
    """Raises WorkKeptError if there is something at `out` (or was `moved` from it) that the run must not replace."""
    now = standing_at(moved or out)
    if now is None:
        return
    advice = f"the finished work is kept: move {out.name} elsewhere and run the same command again"
    if allowed is None or (now.device, now.inode) != (allowed.device, allowed.inode):
        raise WorkKeptError(f"{out}: something with this name appeared during the run; {advice}")
    added = sorted(name for name in now.names - allowed.names if not is_of_the_system(name))
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


def check_replaceable(out: Path, source: Path, overwrite: bool) -> Standing | None:
    """What a run on the model in `source` may replace at `out`.

    Raises FewbitError if something exists there that it may not replace.
    """
    found = standing_at(out)
    if found is None:
        return None
    if not overwrite:
        raise FewbitError(f"{out}: already exists: choose another name or pass --overwrite")
    if not out.is_dir() or not made_by_fewbit(out):
        raise FewbitError(
            f"{out}: fewbit did not make this folder, so --overwrite does not replace it: remove it first"
        )
    _refuse_added(out, source)
    return found


def made_by_fewbit(folder: Path) -> bool:
    """Whether a folder is empty or contains files that only fewbit writes; its name alone proves nothing."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    quantization = _object(folder / CONFIG).get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "fewbit":
        return True
    return is_own(folder / REPORT) or not any(folder.iterdir())


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
    listed = _listed(out)
    if listed is not None and name not in listed:
        write_json(out / RUN, {**_object(out / RUN), FILES: sorted({*listed, name})})


def file_names(folder: Path) -> set[str]:
    """Names of all files in a folder and its subfolders, relative to it, with forward slashes; links count as files."""
    found = set()
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        found |= {(Path(parent) / name).relative_to(folder).as_posix() for name in [*files, *links]}
    return found


def is_of_the_system(name: str) -> bool:
    """Whether a file is one that file systems and file managers create on their own."""
    last = name.rpartition("/")[2]
    return last in _LEFT_BY_SYSTEMS or last.startswith((".nfs", "._"))


def _refuse_added(out: Path, source: Path) -> None:
    """Raises FewbitError if a folder that fewbit made contains files that fewbit did not write.

    A folder whose list of files is lost, or was never written, is judged by names: those that fewbit writes itself, and
    those of the files that it copies from the original.
    """
    names = {name for name in file_names(out) if not is_of_the_system(name)}
    listed, reason = _listed(out), "fewbit did not write"
    if listed is None:
        listed = {name for name in names if is_shard_name(name)} | {CONFIG, REPORT, INDEX_NAME}
        listed |= _copied_from(source) | _copied_from(origin_of(out))
        reason = f"fewbit may not have written ({RUN} does not list the folder's files)"
    # A user may have written a card in place of ours.
    is_ours = is_own_card(out / CARD) or _is_copied_card(out, source)
    listed = listed | {CARD} if is_ours else listed - {CARD}
    added = sorted(names - listed - {RUN})
    if added:
        more = f" and {len(added) - _SAID} more" if len(added) > _SAID else ""
        raise FewbitError(
            f"{out}: contains {', '.join(added[:_SAID])}{more}, which {reason}, so --overwrite does not replace the "
            f"folder: move {'that file' if len(added) == 1 else 'those files'} elsewhere first"
        )


def _is_copied_card(out: Path, source: Path) -> bool:
    """Whether the card of a folder is that of its original, which earlier versions copied, byte for byte."""
    card = out / CARD
    if card.is_symlink() or not card.is_file():
        return False
    models = [source, origin_of(source), origin_of(out)]
    places = [model / CARD for model in models if model is not None]
    try:
        own = card.read_bytes()
        return any(place.is_file() and place.read_bytes() == own for place in places)
    except OSError:
        return False


def _listed(out: Path) -> set[str] | None:
    """The names of all files of a finished folder, as its own list has them; None without a list."""
    listed = _object(out / RUN).get(FILES)
    return set(listed) if isinstance(listed, list) and listed and all(isinstance(one, str) for one in listed) else None


def _copied_from(folder: Path | None) -> set[str]:
    """The names of the files that go wherever the weights of a model go; none where the folder is gone."""
    try:
        return {one.name for one in find_companions(folder, ()).carried} if folder is not None else set()
    except (FewbitError, OSError, ValueError):
        return set()


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is none."""
    found = read_json(path) if path.is_file() else None
    return found if isinstance(found, dict) else {}
