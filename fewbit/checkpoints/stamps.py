"""Detect changed files without reading them, and describe the differences between two jobs."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_SAID = 4
_STAMP = ("bytes", "modified_ns", "changed_ns", "inode")


def file_stamp(path: Path) -> dict[str, int]:
    """Size, times and inode of a file.

    A file that is written again has a new change time, even if its size and modification time are restored, and a file
    that replaces it has another inode. On systems with neither, only size and modification time are compared.
    """
    status = path.stat()
    values = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return dict(zip(_STAMP, values, strict=True))


def file_stamps(paths: Iterable[Path]) -> dict[str, dict[str, int]]:
    """File name -> stamp of files that are all in one folder."""
    return {path.name: file_stamp(path) for path in sorted(set(paths))}


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The differences between two jobs, as text for a message."""
    before, now = dict(_leaves(before)), dict(_leaves(now))
    keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    said = [_said(key, before.get(key), now.get(key)) for key in keys[:_SAID]]
    return "; ".join([*said, f"and {len(keys) - _SAID} more"] if len(keys) > _SAID else said)


def _said(key: str, before: Any, now: Any) -> str:
    stamps = [_is_stamp(before), _is_stamp(now)]
    if not any(stamps):
        return f"{key} was {_short(before)}, is {_short(now)}"
    group, _, name = key.partition(".")
    file = name if group == "files" else key.replace(".files.", ": ")
    if not all(stamps):
        return f"{file} {'is gone' if stamps[0] else 'is new'}"
    if before["bytes"] != now["bytes"]:
        return f"{file} had {before['bytes']:,} bytes, has {now['bytes']:,}"
    if before["modified_ns"] != now["modified_ns"]:
        return f"{file} has been modified since"
    return f"{file} has been changed or replaced since, with the same size and time"


def _is_stamp(value: Any) -> bool:
    return isinstance(value, dict) and tuple(value) == _STAMP


def _leaves(data: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Values with their path, such as ``choice.lr``; the stamp of a file counts as one value."""
    for key, value in data.items():
        if isinstance(value, dict) and not _is_stamp(value):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
