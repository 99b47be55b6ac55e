"""The levels -1, 0 and 1 with one scale per group; five codes per byte as a base-3 number (3^5 = 243)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fewbit.grids.codes import CODES, CodeLayout, Plane
from fewbit.grids.level_grid import level_grid
from fewbit.grids.scheme import Layout

_LEVELS = (-1.0, 0.0, 1.0)
_A_BYTE = 5


def _bytes(columns: int) -> int:
    return -(-columns // _A_BYTE)


def _layout(rows: int, columns: int) -> Layout:
    return {CODES: (torch.uint8, (rows, _bytes(columns)))}


def _powers(like: Tensor) -> Tensor:
    return 3 ** torch.arange(_A_BYTE, dtype=torch.uint8, device=like.device)


def _pack(codes: Tensor) -> dict[str, Tensor]:
    """The first code of a byte is its lowest digit; the last byte is padded with zero digits."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % _A_BYTE))
    digits = padded.view(codes.shape[0], _bytes(codes.shape[1]), _A_BYTE)
    return {CODES: (digits * _powers(codes)).sum(dim=2, dtype=torch.uint8)}


def _unpack(parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
    packed = parts[CODES]
    digits = (packed.unsqueeze(2) // _powers(packed)) % 3
    return digits.view(rows, -1)[:, :columns].contiguous()


TERNARY = level_grid(
    "ternary",
    "-1, 0 and 1 times a scale, five weights per byte",
    lambda scheme: _LEVELS,
    widths=(1.6,),
    # A base-3 digit cannot hold bits of an outlier's code.
    codes=lambda scheme: CodeLayout(0, _layout, _pack, _unpack, (Plane(CODES, 2, base=3, codes_in_a_byte=_A_BYTE),)),
)
