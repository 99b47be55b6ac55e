"""JSON files that are either complete or absent."""

import contextlib
import json
from pathlib import Path
from typing import Any

from fewbit.checkpoints.json_in import parse_json


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON that ends with a newline, so that the file is either complete or absent."""
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    # File names need not be valid UTF-8; characters that cannot be encoded are written as JSON escapes.
    write_whole(path, text.encode("utf-8", "backslashreplace"))


def write_whole(path: Path, data: bytes) -> None:
    """Write bytes to a temporary file, then rename the file."""
    partial = path.with_name(path.name + ".partial")
    # It may be a link, which writing would follow.
    drop(partial)
    partial.write_bytes(data)
    partial.replace(path)


def drop(path: Path) -> None:
    """Remove a file if it exists; of a link, remove only the link."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def read_json(path: Path) -> Any:
    """The JSON value of a file; None if the file is missing or not valid."""
    try:
        return parse_json(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
