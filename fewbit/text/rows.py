"""Rows of the files that hold data in columns: JSON lines, JSON, CSV and Parquet, one at a time."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.errors import FewbitError, is_out_of_memory, missing_extra, raised_in
from fewbit.printable import first_line
from fewbit.text.files import characters, decode, opened

_LONGEST_FIELD = 2**31 - 1
_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Row:
    """One row. where: the file and the line, for messages. values: by column; None is null."""

    where: str
    values: Mapping[str, Any]


def json_lines(path: Path) -> Iterator[Row]:
    """A JSON object a line; blank lines are left out. Raises FewbitError that names the line."""
    with opened(path) as file:
        for number, line in enumerate(decode(path, file, file.tell()), 1):
            if line.strip():
                where = f"{path}:{number}"
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise FewbitError(f"{where}: not a line of JSON ({_reason(error)})") from error
                yield _row(where, value)


def json_values(path: Path) -> Iterator[Row]:
    """The objects of a JSON file: those of its one array, or one after another, as in JSON lines.

    Read in pieces: only the object at hand is in memory. Raises FewbitError that names the object by its number.
    """
    pieces = characters(path)
    decoder = json.JSONDecoder()
    text, place, number, ended, in_array, closed = "", 0, 0, False, False, False
    wanted = 1
    while True:
        while not ended and len(text) - place < wanted:
            more = next(pieces, None)
            ended = more is None
            text, place = text[place:] + (more or ""), 0
        while place < len(text) and text[place] in _SPACE:
            place += 1
        if place == len(text):
            if not ended:
                continue
            if in_array and not closed:
                raise FewbitError(f"{path}: the array does not end: the file is truncated")
            return
        where = f"{path}: object {number + 1}"
        sign = text[place]
        if closed:
            raise FewbitError(f"{path}: there is more text after the array")
        if number == 0 and not in_array and sign == "[":
            in_array, place = True, place + 1
            continue
        if in_array and sign == "]":
            closed, place = True, place + 1
            continue
        if in_array and number and sign == ",":
            place += 1
            continue
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            if ended or not _cut_short(error, text):
                raise FewbitError(f"{where}: not JSON ({_reason(error)})") from error
            wanted = 2 * (len(text) - place) + 1
            continue
        if end == len(text) and not ended and not isinstance(value, dict):
            wanted = 2 * (len(text) - place) + 1
            continue
        place, number, wanted = end, number + 1, 1
        yield _row(where, value)


def csv_rows(path: Path) -> Iterator[Row]:
    """Rows of a file with commas and a line of names; an empty field is null. Raises FewbitError naming the line."""
    with opened(path) as file:
        reader = csv.reader(decode(path, file, file.tell()), strict=True)
        names: list[str] | None = None
        while (fields := _next_fields(path, reader)) is not None:
            if not fields:
                continue
            if names is None:
                names = fields
                if len(set(names)) < len(names):
                    raise FewbitError(f"{path}: two columns have the same name in its first line: {', '.join(names)}")
                continue
            if len(fields) != len(names):
                raise FewbitError(
                    f"{path}:{reader.line_num}: {len(fields)} fields, but the first line has {len(names)}"
                )
            values = {name: field or None for name, field in zip(names, fields, strict=True)}
            yield Row(f"{path}:{reader.line_num}", values)


def _next_fields(path: Path, reader: Any) -> list[str] | None:
    # The limit on a field is the module's own, so it is put back at once.
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        return next(reader, None)
    except csv.Error as error:
        raise FewbitError(f"{path}:{reader.line_num}: not a line of CSV ({error})") from error
    finally:
        csv.field_size_limit(before)


def parquet_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Rows of a Parquet file, with all columns or some. Raises FewbitError when it is none, or without pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "data") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1 if columns is None else 1024, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}: row {number}", values)
    except Exception as error:
        known = isinstance(error, pyarrow.ArrowException | OSError | ValueError | OverflowError) and raised_in(
            error, "pyarrow"
        )
        if is_out_of_memory(error) or not known:
            raise
        raise FewbitError(f"{path}: not a readable Parquet file ({_reason(error)})") from error


ROWS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": json_lines,
    ".json": json_values,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
}
"""How the files with columns are read, by :func:`fewbit.text.files.kind_of`."""


def _row(where: str, value: Any) -> Row:
    if isinstance(value, str):
        return Row(where, {"text": value})
    if not isinstance(value, dict):
        raise FewbitError(f'{where}: not a JSON object with columns, such as {{"text": "…"}}')
    return Row(where, value)


def _cut_short(error: Exception, text: str) -> bool:
    """Whether an error in JSON may be that of a text which goes on."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.pos > len(text) - 16 or error.msg.startswith("Unterminated string")


def _reason(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg[:1].lower() + error.msg[1:]
    return "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
