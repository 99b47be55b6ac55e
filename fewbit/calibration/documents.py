"""Documents of a calibration source, in a fixed order, one at a time."""

import json
import random
import string
from collections.abc import Iterator
from pathlib import Path

from fewbit.calibration.source import HUB, HubSet, Source
from fewbit.errors import FewbitError, missing_extra

_NONSENSE = string.punctuation + " "
_NONSENSE_CHARACTERS = 4096
_OFFLINE = "a local .txt, .jsonl, .parquet or folder, or self, nonsense, random-tokens"


def documents(source: Source, seed: int) -> Iterator[str]:
    """Texts of a file, folder, hub data set or nonsense source. Nonsense never ends.

    Raises FewbitError when a file cannot be read or a data set cannot be fetched.
    """
    if source.kind == "file":
        yield from _from_path(Path(source.name), source.column or "text")
    elif source.kind == "hub":
        yield from _from_hub(source)
    elif source.kind == "nonsense":
        generator = random.Random(seed)
        while True:
            yield "".join(generator.choices(_NONSENSE, k=_NONSENSE_CHARACTERS))
    else:
        raise ValueError(f"{source.kind} is no source of documents")


def _from_path(path: Path, column: str) -> Iterator[str]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl", ".parquet"))
        if not files:
            raise FewbitError(f"{path}: no .txt, .jsonl or .parquet file in this folder")
        for file in files:
            yield from _from_path(file, column)
    elif path.suffix == ".jsonl":
        yield from _from_lines(path, column)
    elif path.suffix == ".parquet":
        yield from _from_parquet(path, column)
    else:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FewbitError(f"{path}: not UTF-8 text") from error


def _from_lines(path: Path, column: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[column]
            except (ValueError, KeyError, TypeError) as error:
                raise FewbitError(f'{path}:{number}: not a JSON object with a "{column}" field') from error
            if text is not None:
                yield str(text)


def _from_parquet(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "data") from error
    try:
        file = parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise FewbitError(f"{path}: no column {column!r}: it has {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(columns=[column]):
            yield from (str(value) for value in batch.column(0).to_pylist() if value is not None)
    except (OSError, ValueError) as error:
        raise FewbitError(f"{path}: no readable parquet file ({error})") from error


def _from_hub(source: Source) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise missing_extra("datasets", "data") from error
    named = HUB.get(source.name, HubSet(source.name))
    column = source.column or named.column
    try:
        rows = load_dataset(
            named.path,
            named.configuration,
            data_files=named.files,
            split="train",
            streaming=True,
            trust_remote_code=False,
        )
        for row in rows:
            if row[column] is not None:
                yield str(row[column])
    except KeyError as error:
        raise FewbitError(
            f"{source.name}: it has no column {column!r}: name one as {source.name}:COLUMN[:COUNT]"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise FewbitError(
            f"{source.name}: no such file here, and the data set cannot be fetched ({type(error).__name__}): "
            f"without a network take {_OFFLINE}"
        ) from error
