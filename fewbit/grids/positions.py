"""Compact encodings of the positions of outliers, a table; :func:`choose` takes the smallest.

Encoding and decoding are vectorized.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewbit.grids.packing import pack, packed_bytes, unpack


@dataclass(frozen=True)
class Where:
    """How many positions there are, in what: `outliers` among `weights` weights in groups of `group_size`."""

    weights: int
    outliers: int
    group_size: int


@dataclass(frozen=True)
class Encoding:
    """One way to store ascending flat positions (int64, 1-D) as uint8 bytes (1-D).

    bytes: how many it takes. decode: the inverse of encode; raises ValueError for bytes that do not contain as many
    positions, but does not check that they ascend. even: whether every group must have the same number of outliers.
    """

    name: str
    bytes: Callable[[Where], int]
    encode: Callable[[Tensor, Where], Tensor]
    decode: Callable[[Tensor, Where], Tensor]
    even: bool = False

    def fits(self, where: Where) -> bool:
        """Whether this encoding can store so many positions."""
        groups = where.weights // where.group_size
        return not self.even or (where.outliers > 0 and where.outliers % groups == 0)


def index_bits(group_size: int) -> int:
    """Number of bits of an index inside a group of `group_size` weights."""
    return max(1, (group_size - 1).bit_length())


def low_bits(weights: int, outliers: int) -> int:
    """Number of low bits that Elias-Fano stores as they are, for `outliers` positions below `weights`."""
    return max(0, math.floor(math.log2(weights / outliers))) if outliers else 0


def _index_bytes(where: Where) -> int:
    return sum(packed_bytes(where.outliers, width) for width in _byte_widths(index_bits(where.group_size)))


def _high_bytes(weights: int, outliers: int) -> int:
    return (outliers + (weights >> low_bits(weights, outliers)) + 8) // 8


def _low_bytes(weights: int, outliers: int) -> int:
    """Size of the packed low bits; more than 8 bits per position are packed in pieces of at most 8 bits."""
    return sum(packed_bytes(outliers, width) for width in _byte_widths(low_bits(weights, outliers)))


def _byte_widths(bits: int) -> list[int]:
    return [8] * (bits // 8) + ([bits % 8] if bits % 8 else [])


def flat_positions(mask: Tensor) -> Tensor:
    """Ascending flat positions (int64, 1-D) of the True elements of a mask of any shape."""
    if mask.device.type == "cpu":
        # On a boolean array, NumPy's flatnonzero takes two thirds of the time of torch's nonzero.
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero().squeeze(1)


def _encode_indices(positions: Tensor, where: Where) -> Tensor:
    return _pack_wide(positions % where.group_size, index_bits(where.group_size))


def _decode_indices(data: Tensor, where: Where) -> Tensor:
    inside = _unpack_wide(data, index_bits(where.group_size), where.outliers)
    per_group = where.outliers * where.group_size // where.weights
    group = torch.arange(where.outliers, device=data.device) // per_group
    return group * where.group_size + inside


def _encode_bitmap(positions: Tensor, where: Where) -> Tensor:
    bits = torch.zeros(where.weights, dtype=torch.uint8, device=positions.device)
    bits[positions] = 1
    return pack(bits, 1)


def _decode_bitmap(data: Tensor, where: Where) -> Tensor:
    return _counted(unpack(data, 1, where.weights).nonzero().squeeze(1), where)


def _encode_elias_fano(positions: Tensor, where: Where) -> Tensor:
    low = low_bits(where.weights, where.outliers)
    high = torch.zeros(8 * _high_bytes(where.weights, where.outliers), dtype=torch.uint8, device=positions.device)
    high[(positions >> low) + torch.arange(where.outliers, device=positions.device)] = 1
    return torch.cat([_pack_wide(positions & ((1 << low) - 1), low), pack(high, 1)])


def _decode_elias_fano(data: Tensor, where: Where) -> Tensor:
    low = low_bits(where.weights, where.outliers)
    split = _low_bytes(where.weights, where.outliers)
    high_bits = 8 * _high_bytes(where.weights, where.outliers)
    ones = _counted(unpack(data[split:], 1, high_bits).nonzero().squeeze(1), where)
    high = ones - torch.arange(where.outliers, device=data.device)
    return (high << low) | _unpack_wide(data[:split], low, where.outliers)


def _counted(found: Tensor, where: Where) -> Tensor:
    if found.numel() != where.outliers:
        raise ValueError(f"{found.numel()} positions of outliers instead of {where.outliers}")
    return found


ENCODINGS: dict[str, Encoding] = {
    one.name: one
    for one in (
        # The index inside the group, ceil(log2(g)) bits each.
        Encoding("indices", _index_bytes, _encode_indices, _decode_indices, even=True),
        # The sorted flat positions, low bits packed and high bits in unary (Elias 1974, Fano 1971): about
        # 2 + log2(weights / outliers) bits each, however they are distributed over the groups.
        Encoding(
            "elias-fano",
            lambda where: _low_bytes(where.weights, where.outliers) + _high_bytes(where.weights, where.outliers),
            _encode_elias_fano,
            _decode_elias_fano,
        ),
        # One bit per weight, the smallest when more than about a quarter of the weights are outliers.
        Encoding("bitmap", lambda where: packed_bytes(where.weights, 1), _encode_bitmap, _decode_bitmap),
    )
}


def choose(where: Where, per_group: int | None) -> str:
    """The smallest encoding; `per_group` is the number of outliers in every group if it is the same, else None."""
    candidates = [encoding for encoding in ENCODINGS.values() if per_group or not encoding.even]
    return min(candidates, key=lambda encoding: encoding.bytes(where)).name


def check(positions: Tensor, where: Where) -> None:
    """Raise ValueError unless decoded positions (int64, 1-D) ascend and lie inside the matrix."""
    ascending = bool((positions[1:] > positions[:-1]).all())
    if positions.numel() and not (ascending and int(positions[0]) >= 0 and int(positions[-1]) < where.weights):
        raise ValueError("positions of outliers do not ascend, or lie outside the weight")


def _pack_wide(values: Tensor, bits: int) -> Tensor:
    parts, shift = [], 0
    for width in _byte_widths(bits):
        parts.append(pack(((values >> shift) & (2**width - 1)).to(torch.uint8), width))
        shift += width
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8, device=values.device)


def _unpack_wide(data: Tensor, bits: int, count: int) -> Tensor:
    values = torch.zeros(count, dtype=torch.int64, device=data.device)
    start, shift = 0, 0
    for width in _byte_widths(bits):
        size = packed_bytes(count, width)
        values |= unpack(data[start : start + size], width, count).to(torch.int64) << shift
        start, shift = start + size, shift + width
    return values
