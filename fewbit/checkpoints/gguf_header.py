"""Check the header of a GGUF file: its reader follows sizes and counts from the file without looking at them."""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from fewbit.errors import FewbitError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""Number of a type of value -> its form for `struct`."""
_STRING, _ARRAY = 8, 9
_LONGEST_NAME, _MOST_DIMENSIONS = 1 << 16, 8
_ALIGNMENT = 32
BlockSizes = Mapping[int, tuple[int, int]]
"""Number of a type of tensor -> the weights and the bytes of a block."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor and its location. kind: the number of its type. shape: of its weights, rows first. start: its first byte
    in `file`.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    start: int
    bytes: int
    file: Path = Path()


@dataclass(frozen=True)
class GgufHeader:
    """The texts and numbers of a header by their keys (of lists, the number of items), its tensors by name, and the
    byte order of the file, as in `struct`.

    spans: the bytes of `file` that hold each key with its value. alignment: of the data of tensors.
    """

    values: dict[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, GgufTensor] = field(default_factory=dict)
    order: str = "<"
    file: Path = Path()
    spans: Mapping[str, slice] = field(default_factory=dict)
    alignment: int = _ALIGNMENT

    @property
    def files(self) -> list[Path]:
        """The files that hold its tensors, in order; the first holds all other facts."""
        return list(dict.fromkeys([self.file, *(tensor.file for tensor in self.tensors.values())]))


def read_gguf_header(path: Path, blocks: BlockSizes) -> GgufHeader:
    """The header of a GGUF file.

    Raises FewbitError if the file is not GGUF, is of another version, ends before its last tensor, or has a type of
    tensor that is not in `blocks`.
    """
    with path.open("rb") as file:
        reader = _Reader(path, file, path.stat().st_size)
        magic = file.read(len(MAGIC))
        if magic != MAGIC:
            raise FewbitError(f"{path}: not a GGUF file (it does not start with the bytes GGUF)")
        version = reader.scalar("I")
        if version & 0xFFFF == 0:
            reader.order = ">"
            version = int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in _VERSIONS:
            raise FewbitError(
                f"{path}: is GGUF version {version}, but only versions 2 and 3 can be read: convert it again"
            )
        tensors, count = reader.scalar("Q"), reader.scalar("Q")
        values: dict[str, Any] = {}
        spans: dict[str, slice] = {}
        for _ in range(count):
            begin = file.tell()
            key = reader.text(_LONGEST_NAME)
            if key in values:
                raise FewbitError(f"{path}: the key {key} occurs twice: the file is damaged")
            values[key] = reader.value(reader.scalar("I"))
            spans[key] = slice(begin, file.tell())
        found: dict[str, GgufTensor] = {}
        for _ in range(tensors):
            name = reader.text(_LONGEST_NAME)
            if name in found:
                raise FewbitError(f"{path}: the tensor {name} occurs twice: the file is damaged")
            found[name] = reader.tensor(name, blocks)
        alignment = values.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise FewbitError(f"{path}: its general.alignment is not a power of two: the file is damaged")
        begin = -(-file.tell() // alignment) * alignment
        placed = {name: replace(tensor, start=begin + tensor.start, file=path) for name, tensor in found.items()}
        if any(tensor.start + tensor.bytes > reader.size for tensor in placed.values()):
            raise reader.truncated()
    return GgufHeader(values, placed, reader.order, path, spans, alignment)


@dataclass
class _Reader:
    path: Path
    file: BinaryIO
    size: int
    order: str = "<"

    def truncated(self) -> FewbitError:
        return FewbitError(f"{self.path}: is truncated or damaged: it ends before its last tensor: fetch it again")

    def take(self, count: int) -> bytes:
        """So many bytes; sizes in a damaged file can be arbitrarily large."""
        self.check(count)
        return self.file.read(count)

    def check(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise self.truncated()

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack(self.order + form, self.take(struct.calcsize("<" + form)))
        return value

    def text(self, longest: int | None = None) -> str:
        length = self.scalar("Q")
        if longest is not None and length > longest:
            raise FewbitError(f"{self.path}: a name of {length} bytes: the file is damaged: fetch it again")
        data = self.take(length)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FewbitError(f"{self.path}: a text that is not UTF-8: the file is damaged: fetch it again") from error

    def value(self, kind: int) -> Any:
        """A text or a number; of a list, the number of its items."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise FewbitError(
                f"{self.path}: a value of the unknown type {kind}: the file is damaged or newer than fewbit"
            )
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in _SCALARS:
            length = count * struct.calcsize("<" + _SCALARS[inner])
            self.check(length)
            self.file.seek(length, 1)
        elif inner == _STRING:
            for _ in range(count):
                self.text()
        else:
            raise FewbitError(f"{self.path}: a list of values of the type {inner}, which cannot be read")
        return count

    def tensor(self, name: str, blocks: BlockSizes) -> GgufTensor:
        """The description of a tensor; its `start` is counted from the end of the header."""
        dimensions = self.scalar("I")
        if dimensions > _MOST_DIMENSIONS:
            raise FewbitError(f"{self.path}: the tensor {name} has {dimensions} dimensions: the file is damaged")
        shape = tuple(self.scalar("Q") for _ in range(dimensions))[::-1]
        kind, offset = self.scalar("I"), self.scalar("Q")
        if kind not in blocks:
            raise FewbitError(
                f"{self.path}: the tensor {name} has the type {kind}, which the installed gguf does not know: "
                "pip install -U gguf"
            )
        length, size = blocks[kind]
        return GgufTensor(name, kind, shape, offset, math.prod(shape) * size // length)
