"""Text files: their names, which files may be opened, and their characters, read in chunks."""

import codecs
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from fewbit.errors import FewbitError

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
"""What a folder is searched for; a file that is named may end otherwise, and is then plain text."""

ACCEPTED = "a .txt, .jsonl, .json, .csv or .parquet file (all but .parquet also as .gz, .bz2, .xz or .zst)"

_PIECE_BYTES = 1 << 20
_BOM = codecs.BOM_UTF8


def _gzip(path: Path) -> BinaryIO:
    import gzip

    return gzip.open(path, "rb")  # type: ignore[return-value]


def _bz2(path: Path) -> BinaryIO:
    import bz2

    return bz2.open(path, "rb")  # type: ignore[return-value]


def _xz(path: Path) -> BinaryIO:
    import lzma

    return lzma.open(path, "rb")  # type: ignore[return-value]


def _zstd(path: Path) -> BinaryIO:
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise FewbitError(
            f"{path}: Python reads .zst only from 3.14 on: decompress it first, or compress it as .gz"
        ) from error
    return zstd.open(path, "rb")  # type: ignore[no-any-return, unused-ignore]


_PACKED: dict[str, Callable[[Path], BinaryIO]] = {".gz": _gzip, ".bz2": _bz2, ".xz": _xz, ".zst": _zstd}


def kind_of(path: Path) -> str:
    """The suffix of SUFFIXES that defines how a file is read, whatever its compression; ".txt" for any other name."""
    inner = path.with_suffix("") if path.suffix.lower() in _PACKED else path
    return inner.suffix.lower() if inner.suffix.lower() in SUFFIXES else ".txt"


def is_text_name(path: Path) -> bool:
    """Whether a name has the suffix of a text file, compressed or not."""
    inner = path.with_suffix("") if path.suffix.lower() in _PACKED else path
    return inner.suffix.lower() in SUFFIXES


def text_files(path: Path) -> list[Path]:
    """The file itself, or the text files of a folder and its subfolders, sorted by path.

    Raises FewbitError for what is neither a file nor a folder, and for a folder without text files.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise FewbitError(f"{path}: cannot be read ({error.strerror or error})") from error
    if stat.S_ISREG(mode):
        return [path]
    if not stat.S_ISDIR(mode):
        raise FewbitError(
            f"{path}: not a regular file or folder, and text is read more than once: write it to a file first"
        )
    found = sorted((p for p in path.rglob("*") if is_text_name(p) and p.is_file()), key=lambda p: p.parts)
    if not found:
        raise FewbitError(f"{path}: contains no text file: supported are {ACCEPTED}")
    return found


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of a file, after a UTF-8 byte order mark.

    Raises FewbitError if it is not a regular file, cannot be read, or has damaged compressed data, also while it is
    read.
    """
    try:
        if not path.is_file():
            raise FewbitError(f"{path}: not a readable file")
        with _PACKED.get(path.suffix.lower(), lambda p: p.open("rb"))(path) as file:
            if file.read(len(_BOM)) != _BOM:
                file.seek(0)
            yield file
    except (EOFError, zlib.error) as error:
        raise FewbitError(f"{path}: its compressed data is damaged or truncated ({error})") from error
    except OSError as error:
        raise FewbitError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ImportError as error:
        raise FewbitError(f"{path}: this Python cannot decompress it ({error}): decompress it first") from error
    except Exception as error:
        # lzma and zstd have error classes of their own, in modules that may not be there.
        if type(error).__name__ in ("LZMAError", "ZstdError"):
            raise FewbitError(f"{path}: its compressed data is damaged ({error})") from error
        raise


def decode(path: Path, pieces: Iterable[bytes], before: int) -> Iterator[str]:
    """Characters of a file's bytes, piece by piece; `before` of them come before the first piece.

    Raises FewbitError that names the file and the byte at which they are not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    ended = False
    source = iter(pieces)
    while not ended:
        piece = next(source, None)
        ended = piece is None
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(piece or b"", final=ended)
        except UnicodeDecodeError as error:
            raise FewbitError(
                f"{path}: not UTF-8 text: byte {before - held + error.start:,} cannot be read: convert it to UTF-8 "
                "first"
            ) from error
        before += len(piece or b"")
        if text:
            yield text


def raw_pieces(file: BinaryIO) -> Iterator[bytes]:
    """The rest of a file in pieces."""
    while piece := file.read(_PIECE_BYTES):
        yield piece


def characters(path: Path) -> Iterator[str]:
    """The characters of a text file, in pieces, line ends as they are. Raises FewbitError as the functions above."""
    with opened(path) as file:
        yield from decode(path, raw_pieces(file), file.tell())


@dataclass(frozen=True)
class TextFile:
    """A plain text that stays in its file: the characters from `start` up to `stop`, None for all."""

    path: Path
    start: int = 0
    stop: int | None = None

    def pieces(self) -> Iterator[str]:
        """The characters, in pieces."""
        place = 0
        for piece in characters(self.path):
            stop = len(piece) if self.stop is None else self.stop - place
            part = piece[max(0, self.start - place) : max(0, stop)]
            if part:
                yield part
            place += len(piece)
            if self.stop is not None and place >= self.stop:
                return

    def part(self, start: int, stop: int | None) -> "TextFile":
        """Some of a whole file's characters."""
        return TextFile(self.path, start, stop)

    def read(self) -> str:
        """All characters at once."""
        return "".join(self.pieces())

    @cached_property
    def size(self) -> int:
        """How many characters there are; 0 for a text of white space alone."""
        count, blank = 0, True
        for piece in self.pieces():
            count += len(piece)
            blank = blank and not piece.strip()
        return 0 if blank else count

    def hash_into(self, digest: Any) -> None:
        """Add a whole file's bytes, unpacked, a byte order mark among them."""
        with opened(self.path) as file:
            file.seek(0)
            for piece in raw_pieces(file):
                digest.update(piece)
