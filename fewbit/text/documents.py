"""The documents of files, folders, data sets of the hub and CPython's help text: one reader for all text."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fewbit.errors import FewbitError
from fewbit.text.chat import Chat
from fewbit.text.columns import choose_columns, documents_of
from fewbit.text.files import TextFile, is_text_name, kind_of, text_files
from fewbit.text.rows import ROWS, Row, parquet_rows

Document = str | Chat | TextFile
"""A text, a conversation that the tokenizer's chat template makes a text of, or a text that stays in its file."""

Render = Callable[[Chat], str]


@dataclass(frozen=True)
class Place:
    """Where a user's words point to. path: None for a name on the hub. column: None for the usual one."""

    name: str
    path: Path | None
    column: str | None


def place_of(words: str, option: str) -> Place:
    """``PATH``, ``PATH:COLUMN`` or ``NAME[:COLUMN]``; FewbitError for what looks like a path and is not there."""
    path = _path(words)
    if _exists(path):
        return Place(str(path), path, None)
    head, _, column = words.rpartition(":")
    if head and _exists(_path(head)):
        return Place(str(_path(head)), _path(head), column)
    if is_text_name(path) or is_text_name(Path(head)) or words.startswith((".", "/", "~")):
        raise FewbitError(f"{option} {words}: no such file or folder")
    return Place(head or words, None, column if head else None)


def _path(words: str) -> Path:
    try:
        return Path(words).expanduser()
    except RuntimeError:
        # A home of nobody here.
        return Path(words)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        # A name that no file can have.
        return False


def file_documents(path: Path, column: str | None) -> Iterator[Document]:
    """The documents of a file or folder, in a fixed order; a plain text is one document and stays in its file.

    column: of files with columns; None for the usual one. Raises FewbitError that names the file, and the row.
    """
    for file in text_files(path):
        kind = kind_of(file)
        if kind not in ROWS:
            if column is not None and file == path:
                raise FewbitError(f"{path}: a plain text file has no column {column!r}: omit it")
            yield TextFile(file)
        elif kind == ".parquet":
            yield from documents_of(str(file), _parquet(file, column), column)
        else:
            yield from documents_of(str(file), ROWS[kind](file), column)


def _parquet(file: Path, column: str | None) -> Iterator[Row]:
    """Rows with the wanted columns alone: others may be large."""
    first = next(parquet_rows(file), None)
    return parquet_rows(file, choose_columns(str(file), first.values, column).names) if first else iter(())


def pieces_of(document: Document, render: Render | None) -> Iterator[str]:
    """A document's text in pieces. Raises FewbitError for a conversation when there is nothing to render it by."""
    if isinstance(document, TextFile):
        yield from document.pieces()
    elif isinstance(document, str):
        yield document
    elif render is None:
        raise FewbitError(
            f"{document.where}: chat messages need the model's chat template, which is not available here: choose a "
            "column of plain text"
        )
    else:
        yield render(document)
