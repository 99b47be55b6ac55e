"""ggml's blocks <-> parts of a stored weight, bit for bit, for the grids of :mod:`fewbit.grids.ggml`.

A row is its blocks one after the other, little-endian. A block type is a list of fields: planes of the codes, scales
and minima, and the float16 numbers d, dmin and m.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.grids.codes import CODES
from fewbit.grids.nested import NESTED
from fewbit.grids.packing import pack, unpack
from fewbit.grids.scheme import Scheme, StoredWeight

Numbers = dict[str, Tensor]
"""What the blocks of a weight hold: codes `(blocks, weights)`; scales, minima `(blocks, n)` uint8; d, dmin or m
`(blocks, 2)`, the bytes of a float16."""


@dataclass(frozen=True)
class _Field:
    """Some bytes of a block. write(numbers): them, `(blocks, bytes)`. read(bytes): what they add to the numbers.

    Fields that share a key each hold some of its bits, which are added.
    """

    bytes: int
    write: Callable[[Numbers], Tensor]
    read: Callable[[Tensor], Numbers]


@dataclass(frozen=True)
class BlockType:
    """One type of block. number: ggml's. weights, bytes: of a block."""

    number: int
    weights: int
    fields: tuple[_Field, ...]

    @property
    def bytes(self) -> int:
        """Bytes of a block."""
        return sum(field.bytes for field in self.fields)


def _plane(weights: int, bits: int, shift: int, run: int) -> _Field:
    """`bits` bits of each code, from bit `shift` on.

    The block is cut into chunks of 8 / bits runs of `run` codes. Byte l of a chunk holds code l of each of its runs,
    the first run in the lowest bits.
    """
    per = 8 // bits
    at = bits * torch.arange(per, dtype=torch.uint8).view(1, 1, per, 1)

    def write(numbers: Numbers) -> Tensor:
        part = (numbers[CODES] >> shift) & (2**bits - 1)
        return (part.view(-1, weights // (per * run), per, run) << at).sum(dim=2, dtype=torch.uint8).flatten(1)

    def read(data: Tensor) -> Numbers:
        spread = (data.view(-1, weights // (per * run), 1, run) >> at) & (2**bits - 1)
        return {CODES: spread.flatten(1) << shift}

    return _Field(weights * bits // 8, write, read)


def _as_it_is(key: str, count: int) -> _Field:
    return _Field(count, lambda numbers: numbers[key], lambda data: {key: data})


_D, _DMIN, _M = _as_it_is("d", 2), _as_it_is("dmin", 2), _as_it_is("m", 2)
# ggml has these scales as signed bytes, the parts have them from 0 on.
_SIGNED = _Field(16, lambda numbers: numbers["scales"] ^ 128, lambda data: {"scales": data ^ 128})
_NIBBLES_2K = _Field(
    16,
    lambda numbers: numbers["scales"] | (numbers["minima"] << 4),
    lambda data: {"scales": data & 15, "minima": data >> 4},
)


def _write_4k(numbers: Numbers) -> Tensor:
    scales, minima = numbers["scales"], numbers["minima"]
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = minima[:, :4] | ((minima[:, 4:] >> 4) << 6)
    return torch.cat([first, second, (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)], dim=1)


def _read_4k(data: Tensor) -> Numbers:
    first, second, third = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], dim=1)
    return {"scales": scales, "minima": torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], dim=1)}


def _write_3k(numbers: Numbers) -> Tensor:
    scales = numbers["scales"]
    low = (scales[:, :8] & 15) | ((scales[:, 8:] & 15) << 4)
    at = 2 * torch.arange(4, dtype=torch.uint8).view(1, 4, 1)
    return torch.cat([low, ((scales >> 4).view(-1, 4, 4) << at).sum(dim=1, dtype=torch.uint8)], dim=1)


def _read_3k(data: Tensor) -> Numbers:
    low = torch.cat([data[:, :8] & 15, data[:, :8] >> 4], dim=1)
    at = 2 * torch.arange(4, dtype=torch.uint8).view(1, 4, 1)
    high = (data[:, 8:].unsqueeze(1) >> at) & 3
    return {"scales": low | (high.flatten(1) << 4)}


def _write_4xs(numbers: Numbers) -> Tensor:
    scales = numbers["scales"]
    return torch.cat([pack((scales >> 4).contiguous(), 2), pack((scales & 15).contiguous(), 4)], dim=1)


def _read_4xs(data: Tensor) -> Numbers:
    return {"scales": unpack(data[:, 2:].contiguous(), 4, 8) | (unpack(data[:, :2].contiguous(), 2, 8) << 4)}


_SCALES_4K, _SCALES_3K, _SCALES_4XS = (
    _Field(12, _write_4k, _read_4k),
    _Field(12, _write_3k, _read_3k),
    _Field(6, _write_4xs, _read_4xs),
)
_LOW_32, _HIGH_32 = _plane(32, 4, 0, 16), _plane(32, 1, 4, 1)

BLOCK_TYPES: dict[str, BlockType] = {
    "q4_0": BlockType(2, 32, (_D, _LOW_32)),
    "q4_1": BlockType(3, 32, (_D, _M, _LOW_32)),
    "q5_0": BlockType(6, 32, (_D, _HIGH_32, _LOW_32)),
    "q5_1": BlockType(7, 32, (_D, _M, _HIGH_32, _LOW_32)),
    "q8_0": BlockType(8, 32, (_D, _Field(32, lambda numbers: numbers[CODES] ^ 128, lambda data: {CODES: data ^ 128}))),
    "iq4_nl": BlockType(20, 32, (_D, _LOW_32)),
    "iq4_xs": BlockType(23, 256, (_D, _SCALES_4XS, _plane(256, 4, 0, 16))),
    "q2_k": BlockType(10, 256, (_NIBBLES_2K, _plane(256, 2, 0, 32), _D, _DMIN)),
    "q3_k": BlockType(11, 256, (_plane(256, 1, 2, 32), _plane(256, 2, 0, 32), _SCALES_3K, _D)),
    "q4_k": BlockType(12, 256, (_D, _DMIN, _SCALES_4K, _plane(256, 4, 0, 32))),
    "q5_k": BlockType(13, 256, (_D, _DMIN, _SCALES_4K, _plane(256, 1, 4, 32), _plane(256, 4, 0, 32))),
    "q6_k": BlockType(14, 256, (_plane(256, 4, 0, 64), _plane(256, 2, 4, 32), _SIGNED, _D)),
    "tq2_0": BlockType(35, 256, (_plane(256, 2, 0, 32), _D)),
}
"""By the names of the grids."""

_PLAIN = {"scales": "d", "minima": "m"}
_UNITS = {"block_scales": "d", "block_minimums": "dmin"}
_NESTED_CODES = {"scales": "scales", "minimums": "minima"}
"""Names of parts -> what blocks call them: of float16 scales, and of nested ones."""


def to_blocks(parts: Mapping[str, Tensor], stored: StoredWeight) -> Tensor:
    """The blocks of a stored weight, uint8 `(rows, bytes)`; its grid is one of :data:`BLOCK_TYPES`."""
    kind, (rows, columns), scheme = BLOCK_TYPES[stored.scheme.grid], stored.shape, stored.scheme
    codes = unpack(parts[CODES], scheme.whole_bits, columns).contiguous()
    numbers = {CODES: codes.view(-1, kind.weights)}
    nested = NESTED.get(scheme.scale_format)
    for part, key in (_PLAIN if nested is None else _UNITS).items():
        if part in parts:
            numbers[key] = parts[part].contiguous().view(torch.uint8).view(-1, 2)
    if nested is not None:
        per = kind.weights // scheme.group_size
        for part, key in _NESTED_CODES.items():
            if part in parts:
                numbers[key] = unpack(parts[part], nested.bits, stored.groups).reshape(-1, per)
    return torch.cat([field.write(numbers) for field in kind.fields], dim=1).view(rows, -1)


def from_blocks(blocks: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """Inverse of :func:`to_blocks`: the parts of blocks `(rows, bytes)`. Raises ValueError for a part of a block."""
    kind, rows = BLOCK_TYPES[scheme.grid], blocks.shape[0]
    if blocks.dtype != torch.uint8 or blocks.shape[1] % kind.bytes:
        raise ValueError(f"rows of {blocks.shape[1]} bytes are no blocks of {scheme.grid}, of {kind.bytes} bytes each")
    numbers: Numbers = {}
    pieces = blocks.reshape(-1, kind.bytes).split([field.bytes for field in kind.fields], dim=1)
    for field, data in zip(kind.fields, pieces, strict=True):
        for key, value in field.read(data).items():
            numbers[key] = numbers[key] | value if key in numbers else value
    parts = {CODES: pack(numbers.pop(CODES).reshape(rows, -1), scheme.whole_bits)}
    nested = NESTED.get(scheme.scale_format)
    if nested is not None:
        for part, key in _NESTED_CODES.items():
            if key in numbers:
                parts[part] = pack(numbers[key].reshape(rows, -1).contiguous(), nested.bits)
    for part, key in (_PLAIN if nested is None else _UNITS).items():
        if key in numbers:
            parts[part] = numbers[key].contiguous().view(torch.int16).view(rows, -1)
    return parts
