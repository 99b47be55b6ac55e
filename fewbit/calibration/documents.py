"""Documents of a calibration source, in a fixed order, one at a time."""

import random
import string
from collections.abc import Iterator
from pathlib import Path

from fewbit.calibration.source import Source
from fewbit.text.documents import Document, Render, file_documents, pieces_of
from fewbit.text.hub import hub_documents

_NONSENSE = string.punctuation + " "
_NONSENSE_CHARACTERS = 4096
_OFFLINE = "a local .txt, .jsonl, .json, .csv, .parquet or folder, or self, nonsense, random-tokens"


def documents(source: Source, seed: int, render: Render | None = None) -> Iterator[str]:
    """The texts of a file, a folder, a hub data set, or the nonsense source, which never ends.

    render: turns a conversation into text. Raises FewbitError if a file cannot be read, a data set cannot be fetched,
    or there is a conversation but no `render`.
    """
    for document in unread_documents(source, seed):
        yield "".join(pieces_of(document, render))


def unread_documents(source: Source, seed: int) -> Iterator[Document]:
    """The same documents, but with plain texts still in their files, and conversations as messages."""
    if source.kind == "file":
        yield from file_documents(Path(source.name), source.column)
    elif source.kind == "hub":
        yield from hub_documents(source.name, source.column, False, _OFFLINE)
    elif source.kind == "nonsense":
        generator = random.Random(seed)
        while True:
            yield "".join(generator.choices(_NONSENSE, k=_NONSENSE_CHARACTERS))
    else:
        raise ValueError(f"{source.kind} is not a source of documents")
