"""Dense packing of b-bit codes in bit planes of 4, 2 and 1 bits, without unused bits inside a plane.

A code of b bits is split into planes whose widths are powers of two, low bits first: 3 = 2 + 1, 5 = 4 + 1,
6 = 4 + 2, 7 = 4 + 2 + 1 (8 bits are one plane). In a plane of p bits, a byte holds 8/p neighbouring codes, the
first in its low bits. A packed row is the concatenation of its planes, widest first; each plane is padded with
zero bits to a whole byte. `docs/format.md` specifies the same.
"""

import numpy as np
import torch
from torch import Tensor

_PLANE_WIDTHS = (8, 4, 2, 1)
_WORDS = {4: (torch.int16, 2), 2: (torch.int32, 4), 1: (torch.int64, 8)}


def planes(bits: int) -> list[int]:
    """Widths of the planes of a b-bit code, widest (and least significant) first; they sum to `bits`."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, not {bits}")
    return [width for width in _PLANE_WIDTHS if bits & width]


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row of `columns` codes of `bits` bits."""
    return sum((columns * width + 7) // 8 for width in planes(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes `(..., columns)`, each below `2**bits`, into uint8 `(..., packed_bytes(columns, bits))`."""
    columns = codes.shape[-1]
    if codes.numel() == 0:
        return codes.new_zeros((*codes.shape[:-1], packed_bytes(columns, bits)))
    packed = []
    shift = 0
    for width in planes(bits):
        plane = codes
        if shift or bits > width:
            plane = (codes >> shift) & (2**width - 1)
        packed.append(_pack_plane(plane, width, columns))
        shift += width
    return packed[0] if len(packed) == 1 else torch.cat(packed, dim=-1)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of :func:`pack`: uint8 codes `(..., columns)`."""
    if packed.numel() == 0:
        return packed.new_zeros((*packed.shape[:-1], columns))
    codes: Tensor | None = None
    start, shift = 0, 0
    for width in planes(bits):
        size = (columns * width + 7) // 8
        plane = _unpack_plane(packed[..., start : start + size], width, columns)
        codes = plane if codes is None else codes | (plane << shift)
        start, shift = start + size, shift + width
    assert codes is not None
    return codes


def small_integers(values: Tensor) -> Tensor:
    """Convert whole numbers from 0 to 255 in float32 to uint8; on the CPU four times as fast as torch's conversion."""
    if values.device.type == "cpu":
        return torch.from_numpy(values.numpy().astype(np.uint8))
    return values.to(torch.uint8)


def _pack_plane(plane: Tensor, width: int, columns: int) -> Tensor:
    if width == 8:
        return plane.contiguous()
    word, per_byte = _WORDS[width]
    padding = -columns % per_byte
    if padding:
        plane = torch.nn.functional.pad(plane, (0, padding))
    # The codes that share a packed byte are read as one little-endian word, in which they are 8 bits apart. Each fold
    # combines the word with a shifted copy of itself, which moves the codes together. Unlike strided slices, this
    # keeps every operation contiguous.
    words = plane.contiguous().view(word)
    gap, folds = 8 - width, per_byte // 2
    while folds:
        words = words | (words >> gap)
        gap, folds = gap * 2, folds // 2
    return (words & 0xFF).to(torch.uint8)


def _unpack_plane(packed: Tensor, width: int, columns: int) -> Tensor:
    if width == 8:
        return packed
    word, per_byte = _WORDS[width]
    words = packed.to(word)
    gap, folds = (8 - width) * (per_byte // 2), per_byte // 2
    mask = _spread_mask(width, per_byte)
    while folds:
        words = words | (words << gap)
        gap, folds = gap // 2, folds // 2
        words = words & _fold_mask(width, folds, per_byte) if folds else words & mask
    return words.contiguous().view(torch.uint8)[..., :columns]


def _spread_mask(width: int, per_byte: int) -> int:
    return sum((2**width - 1) << (8 * i) for i in range(per_byte))


def _fold_mask(width: int, folds: int, per_byte: int) -> int:
    """Mask of the bits that hold codes when runs of `2 * folds` codes are still together and yet to be split."""
    run = 2 * folds * width
    return sum((2**run - 1) << (8 * 2 * folds * i) for i in range(per_byte // (2 * folds)))
