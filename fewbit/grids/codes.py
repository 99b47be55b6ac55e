"""How the dense codes of a weight are packed. No other module depends on this.

Codes are a matrix `(rows, columns)` with one code per weight, or a smaller matrix with one code for each set of weights
that are rounded together.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.grids.packing import pack, packed_bytes, planes, unpack
from fewbit.grids.scheme import Layout

CODES = "codes"
"""Name of the part that holds the dense codes, or the first of these parts if there are several."""


@dataclass(frozen=True)
class Plane:
    """Where some bits of every code are stored: as digits of bytes, in the rows of a part.

    part: its name. width: how many bits. before: widths of the planes before this one in the same row. base,
    codes_in_a_byte: a byte is a number in this base, with the digit of its first code lowest. shared: one row for all.
    """

    part: str
    width: int
    before: tuple[int, ...] = ()
    base: int = 0
    codes_in_a_byte: int = 0
    shared: bool = False

    def __post_init__(self) -> None:
        if not self.base:
            object.__setattr__(self, "base", 2**self.width)
            object.__setattr__(self, "codes_in_a_byte", 8 // self.width)

    def place(self, columns: int) -> tuple[int, int]:
        """The first byte of the plane in its row, and how many bytes it has, for so many codes."""
        start = sum(packed_bytes(columns, width) for width in self.before)
        return start, -(-columns // self.codes_in_a_byte)


@dataclass(frozen=True)
class CodeLayout:
    """A packing of dense codes.

    room_bits: how many low bits of an outlier's code fit into the dense code at the outlier's position; if 0, the
    outliers' codes are stored entirely outside the dense codes. layout(rows, columns): the parts of a weight of that
    shape.
    pack(codes): the parts of uint8 codes. unpack(parts, rows, columns): the codes of a weight of that shape,
    contiguous. planes: where the bits of a code of one weight are; empty if a code stands for several weights.
    """

    room_bits: int
    layout: Callable[[int, int], Layout]
    pack: Callable[[Tensor], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], int, int], Tensor]
    planes: tuple[Plane, ...] = ()

    def put(self, codes: Tensor, where: Tensor, outlier_codes: Tensor) -> None:
        """Write the low bits of outlier codes (int32) into dense codes at flat positions, in place."""
        if self.room_bits:
            codes.view(-1)[where] = (outlier_codes & (2**self.room_bits - 1)).to(torch.uint8)

    def low_bits(self, codes: Tensor, where: Tensor) -> Tensor:
        """The low bits that :meth:`put` wrote, int32."""
        if not self.room_bits:
            return torch.zeros(where.shape, dtype=torch.int32, device=codes.device)
        return codes.view(-1)[where].to(torch.int32)


def bit_planes(bits: int, down: int = 1, along: int = 1) -> CodeLayout:
    """Codes of `bits` bits, each row packed by :mod:`fewbit.grids.packing`.

    One code stands for a block of `down` rows by `along` columns.
    """

    def layout(rows: int, columns: int) -> Layout:
        return {CODES: (torch.uint8, (rows // down, packed_bytes(columns // along, bits)))}

    def unpacked(parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        return unpack(parts[CODES], bits, columns // along).contiguous()

    widths = planes(bits) if down * along == 1 else []
    where = tuple(Plane(CODES, width, tuple(widths[:index])) for index, width in enumerate(widths))
    return CodeLayout(sum(widths), layout, lambda codes: {CODES: pack(codes, bits)}, unpacked, where)


def two_planes(second: str) -> CodeLayout:
    """Two-bit codes in two tensors of one bit per weight: the low bits, and the high bits as the part `second`."""
    one = bit_planes(1)

    def layout(rows: int, columns: int) -> Layout:
        return {**one.layout(rows, columns), second: one.layout(rows, columns)[CODES]}

    def packed(codes: Tensor) -> dict[str, Tensor]:
        return {CODES: pack(codes & 1, 1), second: pack(codes >> 1, 1)}

    def unpacked(parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        low, high = unpack(parts[CODES], 1, columns), unpack(parts[second], 1, columns)
        return (low | (high << 1)).contiguous()

    return CodeLayout(0, layout, packed, unpacked, (Plane(CODES, 1), Plane(second, 1)))
