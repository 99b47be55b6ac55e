"""Evaluation text: files, folders or a hub data set, joined into one text that is read in chunks."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fewbit.errors import FewbitError
from fewbit.progress import Progress
from fewbit.text.chat import Chat
from fewbit.text.documents import Document, Render, file_documents, pieces_of, place_of
from fewbit.text.files import ACCEPTED, TextFile, text_files
from fewbit.text.hub import hub_documents

DOCUMENT_BREAK = "\n\n"
_HUB_CHARACTERS = 20_000_000
_TOLD_EVERY = 1_000_000


@dataclass(frozen=True)
class Text:
    """A text, its source, and its SHA-256.

    sha256: of the bytes of a plain text; otherwise of the joined documents, with the messages of conversations as JSON,
    so that it is the same for every model. documents: a function that reads the documents each time it is called.
    """

    name: str
    sha256: str
    documents: Callable[[], Iterable[Document]]

    def pieces(self, render: Render | None = None) -> Iterator[str]:
        """The text in pieces, with documents joined by blank lines.

        Raises FewbitError for conversations without `render`.
        """
        for index, document in enumerate(self.documents()):
            if index:
                yield DOCUMENT_BREAK
            yield from pieces_of(document, render)

    @property
    def content(self) -> str:
        """The whole text as one string."""
        return "".join(self.pieces())


def read_text(source: str | Path, progress: Progress | None = None) -> Text:
    """Read a whole text to check and hash it; the documents of files are not kept in memory.

    source: a `.txt` file (used unchanged), a `.jsonl`, `.json`, `.csv` or `.parquet` file or ``FILE:COLUMN`` (its
    documents joined by blank lines), a folder of such files, `topics` (the help text that is part of every CPython, for
    demonstrations), or a hub data set: wikitext2, c4 or NAME[:COLUMN]. The default column is "text", otherwise one with
    chat messages, otherwise the only one with strings. progress: called with characters, bytes and a description.
    Raises FewbitError if the text is empty or cannot be read.
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
            # Compressed files can have more characters than bytes; other files do not.
            progress(told, max(size, told), f"checking {path.name}")
    return found.text(path.name, words, lambda: file_documents(path, column))


def _kept(name: str, documents: Iterator[Document]) -> Text:
    kept, found = list(documents), _Check()
    for _ in found.steps(kept):
        pass
    return found.text(name, name, lambda: kept)


class _Check:
    """The hash of the joined documents, and whether they contain anything except white space."""

    def __init__(self) -> None:
        self._digest, self._blank = hashlib.sha256(), True

    def steps(self, documents: Iterable[Document]) -> Iterator[int]:
        """Process the documents; yields the number of characters so far."""
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
        """The processed documents as a text; raises FewbitError if it is empty."""
        if self._blank:
            raise FewbitError(f"{words}: the text is empty")
        return Text(name, self._digest.hexdigest(), documents)


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    return (topics[key] for key in sorted(topics))


def _head(documents: Iterator[Document]) -> Iterator[Document]:
    """The first documents of a data set that may never end."""
    size = 0
    for document in documents:
        yield document
        size += len(document) if isinstance(document, str) else 0
        if size > _HUB_CHARACTERS:
            return
