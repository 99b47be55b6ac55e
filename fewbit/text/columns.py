"""Which column of a row contains the text, and the document in it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fewbit.errors import FewbitError
from fewbit.printable import one_line
from fewbit.text.chat import Chat, chat_of, chat_of_pair, looks_like_turns
from fewbit.text.rows import Row

TEXT = "text"
_CONVERSATIONS = ("messages", "conversations", "conversation")
_PAIR = ("prompt", "completion")


@dataclass(frozen=True)
class Columns:
    """The columns that make a document: one, or a prompt and its completion. asked: whether the user named it."""

    names: tuple[str, ...]
    asked: bool


def choose_columns(name: str, first: Mapping[str, Any], asked: str | None) -> Columns:
    """The columns of a file or data set, from its first row.

    name: of the file or data set, for messages. asked: the column that the user named. Without: text; else a
    conversation; else prompt and completion; else the one column of strings.
    Raises FewbitError that lists the columns.
    """
    there = one_line(", ".join(map(str, first)), 300) or "none"
    if asked is not None:
        if asked not in first:
            raise FewbitError(f"{name}: no column {asked!r}: it has {there}")
        return Columns((asked,), True)
    if TEXT in first:
        return Columns((TEXT,), False)
    chats = [column for column in _CONVERSATIONS if looks_like_turns(first.get(column))]
    if chats:
        return Columns((chats[0],), False)
    if all(isinstance(first.get(column), str) or looks_like_turns(first.get(column)) for column in _PAIR):
        return Columns(_PAIR, False)
    # A null may be a text in other rows.
    texts = [column for column, value in first.items() if value is None or isinstance(value, str)]
    if len(texts) == 1:
        return Columns((texts[0],), False)
    raise FewbitError(f"{name}: no column {TEXT!r}: it has {there}: choose one as {name}:COLUMN")


def documents_of(name: str, rows: Iterator[Row], asked: str | None) -> Iterator[str | Chat]:
    """The documents in rows, in order; rows whose column is null or an empty list are left out.

    name, asked: as for :func:`choose_columns`. Raises FewbitError that names the row.
    """
    columns: Columns | None = None
    for row in rows:
        columns = columns or choose_columns(name, row.values, asked)
        found = document_of(row, columns)
        if found is not None:
            yield found


def document_of(row: Row, columns: Columns) -> str | Chat | None:
    """The document in a row, None for null or an empty list.

    Raises FewbitError that names the row when it is neither a text nor a conversation.
    """
    missing = [name for name in columns.names if name not in row.values]
    if missing:
        raise FewbitError(
            f"{row.where}: no column {missing[0]!r}: it has {one_line(', '.join(map(str, row.values)), 300)}"
        )
    values = [row.values[name] for name in columns.names]
    if any(value is None or value == [] for value in values):
        return None
    if len(values) == 2:
        return _clean(_pair(row, values), row.where)
    value = values[0]
    if isinstance(value, str):
        return _clean(value, row.where)
    if looks_like_turns(value):
        return _clean(chat_of(value, row.where), row.where)
    kind = "list" if isinstance(value, Sequence) and not isinstance(value, bytes) else type(value).__name__
    raise FewbitError(
        f"{row.where}: its column {columns.names[0]!r} holds a value of the kind {kind}, not a text or chat messages: "
        "name another column, or write text into it"
    )


def _pair(row: Row, values: Sequence[Any]) -> Chat:
    for name, value in zip(_PAIR, values, strict=True):
        if not isinstance(value, str) and not looks_like_turns(value):
            raise FewbitError(f"{row.where}: its column {name!r} contains neither text nor chat messages")
    return chat_of_pair(values[0], values[1], row.where)


def _clean(document: str | Chat, where: str) -> str | Chat:
    r"""The document; FewbitError for half a surrogate pair, which JSON can hold (``"\ud800"``) and no text has."""
    text = document if isinstance(document, str) else document.as_json()
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FewbitError(
            f"{where}: character {error.start:,} of its text is half of a surrogate pair "
            f"(\\u{ord(text[error.start]):04x}), which is not valid Unicode: correct or remove this row"
        ) from error
    return document
