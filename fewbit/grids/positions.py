"""Compact encodings of the positions of outliers.

There are three encodings, and :func:`choose` takes the smallest. Encoding and decoding are vectorized.

- ``indices``: the index inside the group, ceil(log2(g)) bits each; only if every group has the same number of outliers.
- ``elias-fano``: the sorted flat positions, low bits packed and high bits in unary (Elias 1974, Fano 1971): about
  2 + log2(weights / outliers) bits each, however they are distributed over the groups.
- ``bitmap``: one bit per weight, the smallest when more than about a quarter of the weights are outliers.
"""

import math

import numpy as np
import torch
from torch import Tensor

from fewbit.grids.packing import pack, packed_bytes, unpack

ENCODINGS = ("indices", "elias-fano", "bitmap")


def index_bits(group_size: int) -> int:
    """Number of bits of an index inside a group of `group_size` weights."""
    return max(1, (group_size - 1).bit_length())


def low_bits(weights: int, outliers: int) -> int:
    """Number of low bits that Elias-Fano stores as they are, for `outliers` positions below `weights`."""
    return max(0, math.floor(math.log2(weights / outliers))) if outliers else 0


def _high_bytes(weights: int, outliers: int) -> int:
    return (outliers + (weights >> low_bits(weights, outliers)) + 8) // 8


def _low_bytes(weights: int, outliers: int) -> int:
    """Size of the packed low bits; more than 8 bits per position are packed in pieces of at most 8 bits."""
    return sum(packed_bytes(outliers, width) for width in _byte_widths(low_bits(weights, outliers)))


def _byte_widths(bits: int) -> list[int]:
    return [8] * (bits // 8) + ([bits % 8] if bits % 8 else [])


def encoded_bytes(encoding: str, weights: int, outliers: int, group_size: int) -> int:
    """Bytes that `encoding` takes for `outliers` positions among `weights` weights."""
    if encoding == "indices":
        return sum(packed_bytes(outliers, width) for width in _byte_widths(index_bits(group_size)))
    if encoding == "bitmap":
        return packed_bytes(weights, 1)
    if encoding == "elias-fano":
        return _low_bytes(weights, outliers) + _high_bytes(weights, outliers)
    raise ValueError(f"unknown encoding {encoding!r}")


def choose(weights: int, outliers: int, group_size: int, per_group: int | None) -> str:
    """The smallest encoding; `per_group` is the number of outliers in every group if it is the same, else None."""
    candidates = [e for e in ENCODINGS if e != "indices" or per_group]
    return min(candidates, key=lambda e: encoded_bytes(e, weights, outliers, group_size))


def flat_positions(mask: Tensor) -> Tensor:
    """Ascending flat positions (int64, 1-D) of the True elements of a mask of any shape."""
    if mask.device.type == "cpu":
        # On a boolean array, NumPy's flatnonzero takes two thirds of the time of torch's nonzero.
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero().squeeze(1)


def encode(positions: Tensor, encoding: str, weights: int, group_size: int) -> Tensor:
    """Encode ascending flat positions (int64, 1-D) as uint8 bytes (1-D)."""
    if encoding == "indices":
        return _pack_wide(positions % group_size, index_bits(group_size))
    if encoding == "bitmap":
        bits = torch.zeros(weights, dtype=torch.uint8, device=positions.device)
        bits[positions] = 1
        return pack(bits, 1)
    count = positions.numel()
    low = low_bits(weights, count)
    high = torch.zeros(8 * _high_bytes(weights, count), dtype=torch.uint8, device=positions.device)
    high[(positions >> low) + torch.arange(count, device=positions.device)] = 1
    return torch.cat([_pack_wide(positions & ((1 << low) - 1), low), pack(high, 1)])


def decode(data: Tensor, encoding: str, weights: int, outliers: int, group_size: int) -> Tensor:
    """Inverse of :func:`encode`: ascending flat positions (int64, 1-D)."""
    if outliers == 0:
        return torch.zeros(0, dtype=torch.int64, device=data.device)
    if encoding == "indices":
        inside = _unpack_wide(data, index_bits(group_size), outliers)
        per_group = outliers * group_size // weights
        return torch.arange(outliers, device=data.device) // per_group * group_size + inside
    if encoding == "bitmap":
        return unpack(data, 1, weights).nonzero().squeeze(1)
    low = low_bits(weights, outliers)
    split = _low_bytes(weights, outliers)
    ones = unpack(data[split:], 1, 8 * _high_bytes(weights, outliers)).nonzero().squeeze(1)[:outliers]
    high = ones - torch.arange(outliers, device=data.device)
    return (high << low) | _unpack_wide(data[:split], low, outliers)


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
