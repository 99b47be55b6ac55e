"""JSON files that are either complete or absent."""

import contextlib
import json
from pathlib import Path
from typing import Any

from fewbit.checkpoints.json_in import parse_json


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON that ends with a newline to a temporary file, then rename the file."""
    partial = path.with_name(path.name + ".partial")
    # It may be a link, which writing would follow.
    drop(partial)
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    # File names need not be valid UTF-8; characters that cannot be encoded are written as JSON escapes.
    partial.write_bytes(text.encode("utf-8", "backslashreplace"))
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
