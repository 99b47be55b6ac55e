"""JSON files that are there in full or not at all."""

import contextlib
import json
from pathlib import Path
from typing import Any

from fewbit.checkpoints.json_in import parse_json


def write_json(path: Path, data: Any) -> None:
    """Write JSON by write-then-rename, indented, ending in a newline."""
    partial = path.with_name(path.name + ".partial")
    # It may be a link to somewhere else, which writing would follow.
    drop(partial)
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    # Names of files need not be UTF-8: what has no encoding stands as JSON's own escape.
    partial.write_bytes(text.encode("utf-8", "backslashreplace"))
    partial.replace(path)


def drop(path: Path) -> None:
    """Remove a file, or a link and not what it leads to, where there is one."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def read_json(path: Path) -> Any:
    """The JSON of a file; None where there is none that is whole."""
    try:
        return parse_json(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
