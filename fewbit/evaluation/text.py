"""Evaluation text: files, folders or a hub data set, joined into one text that is read in chunks."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fewbit.errors import FewbitError
from fewbit.text.chat import Chat
from fewbit.text.documents import Document, Render, file_documents, pieces_of, place_of
from fewbit.text.files import ACCEPTED, TextFile, text_files
from fewbit.text.hub import hub_documents

DOCUMENT_BREAK = "\n\n"
_HUB_CHARACTERS = 20_000_000
_TOLD_EVERY = 1_000_000

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Text:
    """A text, where it is from, and its SHA-256.

    sha256: of the bytes of a plain text; else of the documents as they are joined, with the messages of conversations
    as JSON, which is the same for every model. documents: reads them anew, each time it is called.
    """

    name: str
    sha256: str
    documents: Callable[[], Iterable[Document]]

    def pieces(self, render: Render | None = None) -> Iterator[str]:
        """The text in pieces, documents joined by blank lines; FewbitError for conversations without `render`."""
        for index, document in enumerate(self.documents()):
            if index:
                yield DOCUMENT_BREAK
            yield from pieces_of(document, render)

    @property
    def content(self) -> str:
        """The whole text at once."""
        return "".join(self.pieces())


def read_text(source: str | Path, progress: Progress | None = None) -> Text:
    """Check a text from end to end and hash it; its documents stay where they are.

    source: a `.txt` file (taken as it is), a `.jsonl`, `.json`, `.csv` or `.parquet` file or ``FILE:COLUMN`` (its
    documents joined by blank lines), a folder of such files, `topics` (the help text that every CPython ships, for
    demonstrations), or a hub data set: wikitext2, c4 or NAME[:COLUMN]. The column is "text"; else one of chat messages;
    else the only one of strings. progress: called with characters, bytes and what is read.
    Raises FewbitError when there is nothing to read, or something in it that cannot be read.
    """
    words = str(source)
    if words == "topics" and not Path(words).exists():
        return _kept("pydoc_data.topics", _topics())
    place = place_of(words, "--data")
    if place.path is None:
        return _kept(words, _head(hub_documents(place.name, place.column, True, f"{ACCEPTED}, or topics")))
    path, column = place.path, place.column
    size = sum(file.stat().st_size for file in text_files(path)) if progress else 0
    found, told = _Check(), 0
    for characters in found.steps(file_documents(path, column)):
        if progress and characters - told >= _TOLD_EVERY:
            told = characters
            # Packed files have more characters than bytes, others fewer.
            progress(told, max(size, told), f"checking {path.name}")
    return found.text(path.name, words, lambda: file_documents(path, column))


def _kept(name: str, documents: Iterator[Document]) -> Text:
    kept, found = list(documents), _Check()
    for _ in found.steps(kept):
        pass
    return found.text(name, name, lambda: kept)


class _Check:
    """The hash of documents as they are joined, and whether there is anything in them but white space."""

    def __init__(self) -> None:
        self._digest, self._blank = hashlib.sha256(), True

    def steps(self, documents: Iterable[Document]) -> Iterator[int]:
        """Take the documents in; how many characters have been, again and again."""
        characters = 0
        for index, document in enumerate(documents):
            if index:
                self._digest.update(DOCUMENT_BREAK.encode())
            if isinstance(document, TextFile):
                document.hash_into(self._digest)
                pieces = document.pieces()
            else:
                pieces = iter([document.as_json() if isinstance(document, Chat) else document])
            for piece in pieces:
                if not isinstance(document, TextFile):
                    self._digest.update(piece.encode("utf-8"))
                self._blank = self._blank and not piece.strip()
                characters += len(piece)
                yield characters

    def text(self, name: str, words: str, documents: Callable[[], Iterable[Document]]) -> Text:
        """What was taken in, as a text; FewbitError when it is empty."""
        if self._blank:
            raise FewbitError(f"{words}: the text is empty")
        return Text(name, self._digest.hexdigest(), documents)


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    return (topics[key] for key in sorted(topics))


def _head(documents: Iterator[Document]) -> Iterator[Document]:
    """The first documents of a data set that may have no end."""
    size = 0
    for document in documents:
        yield document
        size += len(document) if isinstance(document, str) else 0
        if size > _HUB_CHARACTERS:
            return
