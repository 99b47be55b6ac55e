"""Evaluation text: a local file or a hub data set, joined into one string."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fewbit.errors import FewbitError, missing_extra

_HUB = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    "c4": ("allenai/c4", "en", "validation", "text"),
}
_DOCUMENT_BREAK = "\n\n"
_HUB_CHARACTERS = 20_000_000


@dataclass(frozen=True)
class Text:
    """A text, where it is from, and its SHA-256."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode("utf-8")).hexdigest()


def read_text(source: str | Path) -> Text:
    """Read a text.

    source: a `.txt` file (taken as it is), a `.jsonl` file (its "text" fields joined by blank lines), `topics` (the
    help text that every CPython ships, for demonstrations), or a hub data set: wikitext2, c4 or NAME[:COLUMN].
    Raises FewbitError when there is nothing to read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        content = _read_file(path)
        name = path.name
    elif str(source) == "topics":
        content, name = _topics(), "pydoc_data.topics"
    elif path.suffix in (".txt", ".jsonl") or path.exists():
        raise FewbitError(f"{source}: no such text file (.txt or .jsonl)")
    else:
        content, name = _from_hub(str(source)), str(source)
    if not content.strip():
        raise FewbitError(f"{source}: the text is empty")
    return Text(name, content)


def _read_file(path: Path) -> str:
    try:
        if path.suffix == ".jsonl":
            return _DOCUMENT_BREAK.join(_documents(path))
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise FewbitError(f"{path}: not UTF-8 text") from error


def _documents(path: Path) -> Iterator[str]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise FewbitError(f'{path}:{number}: not a JSON object with a "text" field') from error
        yield str(document)


def _topics() -> str:
    from pydoc_data.topics import topics

    return _DOCUMENT_BREAK.join(topics[key] for key in sorted(topics))


def _from_hub(source: str) -> str:
    name, _, column = source.partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise missing_extra("datasets", "data") from error
    path, config, split, default = _HUB.get(name, (name, None, "test", "text"))
    try:
        rows = load_dataset(path, config, split=split, streaming=True, trust_remote_code=False)
        pieces, size = [], 0
        for row in rows:
            pieces.append(str(row[column or default]))
            size += len(pieces[-1])
            if size > _HUB_CHARACTERS:
                break
    except KeyError as error:
        raise FewbitError(f"{source}: it has no column {error}: name one as {name}:COLUMN") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise FewbitError(
            f"{source}: no such file here, and the data set cannot be fetched: give a .txt or .jsonl file"
        ) from error
    return _DOCUMENT_BREAK.join(pieces)
