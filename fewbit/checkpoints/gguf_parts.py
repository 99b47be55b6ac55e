"""GGUF files in several parts, NAME-00001-of-00003.gguf and so on: the first has the facts, each has some tensors."""

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fewbit.checkpoints.gguf_header import MAGIC, BlockSizes, GgufHeader, GgufTensor, read_gguf_header
from fewbit.errors import FewbitError
from fewbit.printable import printable

_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_VERSION = 3
_LISTS = "tokenizer.ggml."
_TOKENS = "tokenizer.ggml.tokens"
_BYTE, _ARRAY = 0, 9
_AT_ONCE = 1 << 24
_ADVICE = "fetch all parts, under their own names, into one folder"


def files_of(path: Path) -> list[Path]:
    """The existing parts of a GGUF file, in order, as far as names tell; a file with any other name is alone."""
    found = _NAME.fullmatch(path.name)
    if found is None:
        return [path]
    same = {
        int(other["number"]): beside
        for beside in path.absolute().parent.iterdir()
        if (other := _NAME.fullmatch(beside.name))
        and (other["stem"], other["count"]) == (found["stem"], found["count"])
    }
    return [path.with_name(same[number].name) for number in sorted(same)] or [path]


def only_gguf_in(folder: Path) -> Path | None:
    """The GGUF file of a folder without config.json, or its first part; None if there is none.

    Raises FewbitError for several.
    """
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    found = sorted(path for path in folder.iterdir() if path.suffix == ".gguf" and path.is_file())
    whole = list(dict.fromkeys(files_of(path)[0] for path in found))
    if len(whole) > 1:
        names = ", ".join(printable(path.name) for path in whole[:4])
        raise FewbitError(f"{folder}: contains {len(whole)} .gguf files ({names}): give one of them")
    return whole[0] if whole else None


def stem_of(path: Path) -> str:
    """The name of a GGUF file without its ending and the number of its part."""
    found = _NAME.fullmatch(path.name)
    return found["stem"] if found else path.stem


def read_gguf(path: Path, blocks: BlockSizes) -> GgufHeader:
    """The header of a GGUF file with the tensors of all its parts, which lie beside it.

    path: any of the parts. Raises FewbitError as :func:`read_gguf_header` does, and names a part that is missing or
    belongs to another file.
    """
    header = read_gguf_header(path, blocks)
    count = header.values.get(_COUNT)
    if not isinstance(count, int) or count <= 1:
        return header
    named = _NAME.fullmatch(path.name)
    if named is None or int(named["count"]) != count:
        raise FewbitError(
            f"{path}: is one of {count} parts, whose names must be NAME-00001-of-{count:05d}.gguf to "
            f"NAME-{count:05d}-of-{count:05d}.gguf: {_ADVICE}"
        )
    places = [path.with_name(f"{named['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [place for place in places if not place.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FewbitError(f"{missing[0]}: this part{more} of {count} is missing: {_ADVICE}")
    parts = [header if place == path else read_gguf_header(place, blocks) for place in places]
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(parts):
        if part.values.get(_NUMBER) != number or part.values.get(_COUNT) != count or part.order != parts[0].order:
            raise FewbitError(f"{part.file}: is not part {number + 1} of {count} of this file: {_ADVICE}")
        both = tensors.keys() & part.tensors.keys()
        if both:
            raise FewbitError(f"{part.file}: the tensor {min(both)} is in two parts: the file is damaged")
        tensors |= part.tensors
    stated = parts[0].values.get(_TENSORS)
    if stated != len(tensors):
        raise FewbitError(f"{path}: has {len(tensors)} tensors in {count} parts, but states {stated}: {_ADVICE}")
    first = parts[0]
    return GgufHeader(first.values, tensors, first.order, first.file, first.spans, first.alignment)


def write_joined(header: GgufHeader, out: Path) -> None:
    """Write the parts of a GGUF file as one."""
    kept = [key for key in header.spans if not _is_split(key)]
    with out.open("wb") as file:
        starts = _write_head(header, kept, {}, file)
        for tensor, start in zip(header.tensors.values(), starts, strict=True):
            file.write(bytes(start - file.tell()))
            for piece in _bytes(tensor):
                file.write(piece)


def write_outline(header: GgufHeader, out: Path) -> None:
    """Write a GGUF file for readers of configs: no tokenizer's lists, but their length, and a hole for the tensors.

    transformers takes long to read a list item by item, and wants every tensor to lie inside the file.
    """
    kept = [key for key, span in header.spans.items() if not _is_split(key) and not _is_list(header, key, span)]
    lists = {_TOKENS: header.values[_TOKENS]} if _TOKENS in header.spans and _TOKENS not in kept else {}
    _write_empty(header, kept, lists, out)


def write_emptied(header: GgufHeader, out: Path) -> None:
    """Write the parts of a GGUF file as one, with a hole for the tensors."""
    _write_empty(header, [key for key in header.spans if not _is_split(key)], {}, out)


def _write_empty(header: GgufHeader, kept: list[str], lists: dict[str, int], out: Path) -> None:
    with out.open("wb") as file:
        starts = _write_head(header, kept, lists, file)
        ends = (start + one.bytes for start, one in zip(starts, header.tensors.values(), strict=True))
        file.truncate(max(ends, default=file.tell()))


def _is_split(key: str) -> bool:
    return key.startswith("split.")


def _is_list(header: GgufHeader, key: str, span: slice) -> bool:
    if not key.startswith(_LISTS):
        return False
    with header.file.open("rb") as file:
        file.seek(span.start + 8 + len(key.encode()))
        (kind,) = struct.unpack(header.order + "I", file.read(4))
    return bool(kind == _ARRAY)


def _write_head(header: GgufHeader, kept: list[str], lists: dict[str, int], file: BinaryIO) -> list[int]:
    """Write all that stands before the data of the tensors; returns where the data of each begins.

    kept: keys that are copied. lists: keys of lists of so many bytes that are all 0.
    """
    order = header.order
    file.write(MAGIC + struct.pack(order + "IQQ", _VERSION, len(header.tensors), len(kept) + len(lists)))
    with header.file.open("rb") as source:
        for key in kept:
            span = header.spans[key]
            source.seek(span.start)
            file.write(source.read(span.stop - span.start))
    for key, count in lists.items():
        file.write(_text(key, order) + struct.pack(order + "IIQ", _ARRAY, _BYTE, count) + bytes(count))
    offsets, end = [], 0
    for tensor in header.tensors.values():
        shape = tensor.shape[::-1]
        file.write(_text(tensor.name, order) + struct.pack(f"{order}I{len(shape)}Q", len(shape), *shape))
        file.write(struct.pack(order + "IQ", tensor.kind, end))
        offsets.append(end)
        end += _up(tensor.bytes, header.alignment)
    begin = _up(file.tell(), header.alignment)
    file.write(bytes(begin - file.tell()))
    return [begin + offset for offset in offsets]


def _text(text: str, order: str) -> bytes:
    data = text.encode()
    return struct.pack(order + "Q", len(data)) + data


def _up(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _bytes(tensor: GgufTensor) -> Iterator[bytes]:
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        left = tensor.bytes
        while left:
            piece = file.read(min(left, _AT_ONCE))
            if not piece:
                raise FewbitError(f"{tensor.file}: the file ends inside {tensor.name}: fetch or copy it again")
            left -= len(piece)
            yield piece
