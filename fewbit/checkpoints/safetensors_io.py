"""Read and write safetensors files by position, with strict checks of headers and without memory mapping.

The safetensors library maps whole files, which then count as resident memory, and writes only tensors that are in
memory. `tests/checkpoints/test_safetensors_io.py` compares reading and writing with the library.
"""

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoints.json_in import parse_json
from fewbit.checkpoints.read_at import open_to_read, read_at
from fewbit.checkpoints.scaled import Scaled, product
from fewbit.errors import FewbitError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    # Only newer releases of torch have these.
    **{
        name: getattr(torch, attribute)
        for name, attribute in (
            ("U16", "uint16"),
            ("U32", "uint32"),
            ("U64", "uint64"),
            ("F8_E8M0", "float8_e8m0fnu"),
            ("F8_E4M3FNUZ", "float8_e4m3fnuz"),
            ("F8_E5M2FNUZ", "float8_e5m2fnuz"),
            ("F4", "float4_e2m1fn_x2"),
        )
        if hasattr(torch, attribute)
    },
}
_PER_ELEMENT = {"F4": 2}
"""How many numbers one element of torch's dtype contains, if more than one; divides the last dimension."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000
_COPY_BYTES = 1 << 24
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class TensorEntry:
    """A tensor and its location: bytes `start` to `stop` of `file`.

    dtype, shape: of the tensor as it is read. scaled: how it is computed, if codes of another dtype are stored there.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    scaled: "Scaled[TensorEntry] | None" = None

    @property
    def bytes(self) -> int:
        """Size in bytes of the tensor as it is read."""
        return self.numel * self.dtype.itemsize

    @property
    def bytes_on_disk(self) -> int:
        """Size in bytes in its file, without its scales."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def files(self) -> "set[Path]":
        """The files from which it is read."""
        return {self.file, *([self.scaled.scale.file] if self.scaled else [])}


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Entries and metadata of a safetensors file.

    Raises FewbitError if the header is cut off, is not JSON, or does not describe tensors that fill the file without
    gaps or overlaps.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise ValueError("the file is shorter than 8 bytes")
            length = struct.unpack("<Q", prefix)[0]
            if length > min(_MAX_HEADER, size - 8):
                raise ValueError(f"its header claims {length:,} bytes, but the file has {size:,}")
            header = parse_json(file.read(length), strict=True)
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is not an object")
        entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
        _check_layout(entries, 8 + length, size)
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise FewbitError(f"{path}: not a complete safetensors file ({error}): fetch or copy it again") from error
    return entries, metadata


def _entry(path: Path, name: str, value: dict[str, Any], base: int) -> TensorEntry:
    if not isinstance(value["dtype"], str) or not isinstance(value["shape"], list):
        raise ValueError(f"tensor {name} has no dtype or no shape")
    if value["dtype"] not in DTYPES:
        # This is not damage: the format gets new dtypes, and it states the number of bytes even of an unknown one.
        raise FewbitError(
            f"{path}: tensor {name} has the dtype {value['dtype']}, which this PyTorch does not support: if the model "
            "is quantized, give the 16-bit original"
        )
    dtype = DTYPES[value["dtype"]]
    shape = tuple(value["shape"])
    start, stop = value["data_offsets"]
    if any(not isinstance(v, int) or isinstance(v, bool) or v < 0 for v in (*shape, start, stop)):
        raise ValueError(f"tensor {name} has a shape or offsets that are not whole numbers")
    shape = _shorter(name, value["dtype"], shape)
    expected = dtype.itemsize
    for size in shape:
        expected *= size
    if stop - start != expected:
        raise ValueError(f"tensor {name} has {stop - start} bytes, but its shape needs {expected}")
    return TensorEntry(name, path, dtype, shape, base + start, base + stop)


def _shorter(name: str, dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in elements of torch's dtype, each of which can contain several numbers."""
    count = _PER_ELEMENT.get(dtype, 1)
    if count == 1:
        return shape
    if not shape or shape[-1] % count:
        raise ValueError(f"tensor {name} has a last dimension that is not divisible by {count}")
    return (*shape[:-1], shape[-1] // count)


def _check_layout(entries: dict[str, TensorEntry], base: int, size: int) -> None:
    end = base
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.stop)):
        if entry.start != end:
            raise ValueError(f"tensor {entry.name} starts at byte {entry.start}, not at {end}")
        end = entry.stop
    if end != size:
        raise ValueError(f"its tensors end at byte {end:,}, but the file ends at {size:,}")


class FileReader:
    """Reads parts of tensors by position; thread-safe, with one open descriptor per file and no memory mapping."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._last_scale: tuple[TensorEntry, Tensor] | None = None

    def __enter__(self) -> "FileReader":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._last_scale = None

    def descriptor(self, path: Path) -> int:
        """The open descriptor of `path`; call once from one thread before sharing."""
        if path not in self._descriptors:
            self._descriptors[path] = open_to_read(path)
        return self._descriptors[path]

    def read(self, entry: TensorEntry, first: int = 0, count: int | None = None) -> Tensor:
        """Elements `first` to `first + count` of the flat tensor, 1-D, in the entry's dtype."""
        count = entry.numel - first if count is None else count
        if entry.scaled is None:
            return self._read(entry, entry.dtype, first, count)
        data = torch.empty(count, dtype=entry.dtype)
        columns = max(1, entry.shape[-1])
        # Computed in pieces, because the products take four bytes each.
        step = columns * max(1, _AT_ONCE // columns)
        scale = self._scale(entry.scaled.scale)
        for start in range(first // columns * columns, first + count, step):
            piece = self._products(entry, scale, start // columns, min(step, entry.numel - start) // columns)
            low, high = max(first, start), min(first + count, start + step)
            data[low - first : high - first] = piece[low - start : high - start]
        return data

    def _scale(self, entry: TensorEntry) -> Tensor:
        """The scales of a tensor, float32. The last ones are kept, because a tensor is read in many parts."""
        last = self._last_scale
        if last is None or last[0] != entry:
            self._last_scale = last = (entry, self.tensor(entry).to(torch.float32))
        return last[1]

    def _products(self, entry: TensorEntry, scale: Tensor, row: int, rows: int) -> Tensor:
        """Products of codes and scales for whole rows, flat; the row number selects the scales."""
        assert entry.scaled is not None
        columns = entry.shape[-1]
        codes = self._read(entry, entry.scaled.dtype, row * columns, rows * columns).view(rows, columns)
        return product(codes, scale, entry.scaled, entry.shape, row).view(-1)

    def _read(self, entry: TensorEntry, dtype: torch.dtype, first: int, count: int) -> Tensor:
        data = torch.empty(count, dtype=dtype)
        if count == 0:
            return data
        view = _bytes_of(data)
        position = entry.start + first * dtype.itemsize
        descriptor = self.descriptor(entry.file)
        while len(view):
            got = read_at(descriptor, view, position)
            if got == 0:
                raise FewbitError(f"{entry.file}: the file ends inside tensor {entry.name}: fetch or copy it again")
            view, position = view[got:], position + got
        return data

    def tensor(self, entry: TensorEntry) -> Tensor:
        """The whole tensor in its shape and dtype."""
        return self.read(entry).view(entry.shape)


class ShardWriter:
    """Writes one safetensors file tensor by tensor, and renames it to its final name when it is complete.

    The header is at the start of the file but is known only at the end. So space is reserved for it and padded with
    space characters, which the format allows. Tensors that would break the alignment of later ones are written last.
    """

    def __init__(self, path: Path, header_room: int, metadata: dict[str, str] | None = None) -> None:
        self._path, self._partial = path, path.with_name(path.name + ".partial")
        self._room = -(-header_room // 8) * 8
        self._header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
        self._late: list[tuple[str, Tensor]] = []
        self._offset = 0
        self._file = self._partial.open("wb")
        self._file.seek(8 + self._room)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor from any device."""
        if tensor.numel() * tensor.element_size() % 8:
            self._late.append((name, tensor))
        else:
            self._write(name, tensor)

    def copy(self, entry: TensorEntry, reader: FileReader) -> None:
        """Copy a tensor from another file, piece by piece."""
        if entry.bytes % 8:
            self._late.append((entry.name, reader.tensor(entry)))
            return
        self._describe(entry.name, entry.dtype, entry.shape, entry.bytes)
        step = max(1, _COPY_BYTES // entry.dtype.itemsize)
        for first in range(0, entry.numel, step):
            piece = reader.read(entry, first, min(step, entry.numel - first))
            self._file.write(_bytes_of(piece))

    def close(self) -> None:
        """Write the remaining tensors and the header, and rename the file."""
        for name, tensor in sorted(self._late, key=lambda item: (-item[1].element_size(), item[0])):
            self._write(name, tensor)
        text = json.dumps(self._header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > self._room:
            raise AssertionError(f"{len(text)} bytes of header, room for {self._room}")
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + text.ljust(self._room))
        self._file.close()
        self._partial.rename(self._path)

    def abandon(self) -> None:
        """Remove the unfinished file."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _write(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous()
        self._describe(name, data.dtype, tuple(data.shape), data.numel() * data.element_size())
        self._file.write(_bytes_of(data.reshape(-1)))

    def _describe(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], size: int) -> None:
        if name in self._header:
            # A kept tensor may have the same name as a part of a packed weight.
            raise FewbitError(f"{self._path}: two tensors would have the name {name}: rename one in the model")
        offsets = [self._offset, self._offset + size]
        stored = _NAMES[dtype]
        if count := _PER_ELEMENT.get(stored):
            shape = (*shape[:-1], shape[-1] * count)
        self._header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": offsets}
        self._offset += size


def header_room(names: list[str]) -> int:
    """A number of bytes that is certainly enough for the header of a file with these tensors."""
    return 256 + sum(200 + len(json.dumps(name, ensure_ascii=False).encode()) for name in names)


def _bytes_of(flat: Tensor) -> memoryview:
    """The bytes of a 1-D CPU tensor, in shared memory."""
    return memoryview(flat.view(torch.uint8).numpy().data)
