"""Where the original of a quantized folder is on this machine: kept in the user's cache, since folders are published.

A folder holds an identifier, and the cache the path that belongs to it.
"""

import contextlib
import os
import re
from pathlib import Path
from typing import Any
from uuid import uuid4

from fewbit.checkpoints.cache import cache_folder
from fewbit.checkpoints.json_file import read_json, write_json
from fewbit.checkpoints.own_files import MODEL_FOLDER, RUN

ORIGIN = "origin"
"""Key of the file `RUN`: the identifier."""
_IDENTIFIER = re.compile(r"[0-9a-f]{32}")
_MOST = 2000


def remember_origin(folder: Path) -> dict[str, str]:
    """Note the folder of an original model; returns the entry for the file `RUN`.

    A cache that cannot be written is no error: the user then names the original when it is needed.
    """
    identifier, place = uuid4().hex, cache_folder() / "origins"
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / f"{identifier}.json", {MODEL_FOLDER: str(folder.resolve())})
        _drop_old(place)
    return {ORIGIN: identifier}


def origin_of(folder: Path) -> Path | None:
    """The folder of the model that a quantized folder was made from; None if this machine does not know it."""
    run = _object(folder / RUN)
    identifier = run.get(ORIGIN)
    if isinstance(identifier, str) and _IDENTIFIER.fullmatch(identifier):
        run = _object(cache_folder() / "origins" / f"{identifier}.json")
    # Folders of earlier versions hold the path itself.
    where = run.get(MODEL_FOLDER)
    return Path(where) if isinstance(where, str) else None


def _drop_old(place: Path) -> None:
    """Remove the oldest notes if there are very many."""
    notes = list(os.scandir(place))
    if len(notes) > _MOST:
        for note in sorted(notes, key=lambda one: one.stat().st_mtime)[: len(notes) - _MOST]:
            Path(note.path).unlink(missing_ok=True)


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else None
    return found if isinstance(found, dict) else {}
