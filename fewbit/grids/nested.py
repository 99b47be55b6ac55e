"""Scales of k-quants: a whole number of a few bits per group, times a float16 for each 256 weights of a row.

    scale = d * code

The largest scale of a block gets the code of the largest magnitude, so that it determines d. Storing what was read back
therefore changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.grids.packing import pack, packed_bytes, unpack
from fewbit.grids.scales import divisor, from_pattern, to_pattern
from fewbit.grids.scheme import Layout, Scheme

BLOCK = 256
"""Weights of a row that share a float16."""


@dataclass(frozen=True)
class Nested:
    """Scale codes from `lowest` to `highest`, stored in `bits` bits as code - lowest."""

    bits: int
    lowest: int
    highest: int

    @property
    def extreme(self) -> int:
        """The code of the largest magnitude."""
        return self.lowest if -self.lowest > self.highest else self.highest

    def pattern(self, scales: Tensor) -> Tensor:
        """d as float16 patterns `(rows, blocks)` for scales `(rows, blocks, n)`."""
        top = scales.gather(-1, scales.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
        return to_pattern(top / self.extreme, "float16")

    def unit(self, scales: Tensor) -> Tensor:
        """d as a reader decodes it, `(rows, blocks, 1)`, for scales `(rows, blocks, n)`."""
        return from_pattern(self.pattern(scales), "float16").unsqueeze(-1)

    def clamp(self, codes: Tensor) -> Tensor:
        """Codes within the range, in place."""
        return codes.clamp_(self.lowest, self.highest)

    def pack(self, values: Tensor, quantity: str, scheme: Scheme) -> tuple[dict[str, Tensor], Tensor]:
        """The parts of scales `(rows, groups)` float32, and the scales as a reader decodes them."""
        blocks = self._blocks(values, scheme)
        pattern = self.pattern(blocks)
        unit = from_pattern(pattern, "float16").unsqueeze(-1)
        codes = self.clamp((blocks / divisor(unit)).round_())
        stored = (codes - self.lowest).to(torch.uint8).view(values.shape)
        parts = {f"{quantity}s": pack(stored, self.bits), f"block_{quantity}s": pattern}
        return parts, (unit * codes).view(values.shape)

    def see(self, values: Tensor, scheme: Scheme) -> Tensor:
        """The scales that a reader decodes."""
        return self.pack(values, "scale", scheme)[1]

    def read(self, parts: Mapping[str, Tensor], quantity: str, scheme: Scheme, groups: int) -> Tensor:
        """Inverse of :meth:`pack`."""
        codes = unpack(parts[f"{quantity}s"], self.bits, groups).to(torch.float32) + self.lowest
        unit = from_pattern(parts[f"block_{quantity}s"], "float16")
        return (unit.unsqueeze(-1) * codes.view(codes.shape[0], unit.shape[1], -1)).view(codes.shape)

    def layout(self, quantity: str, scheme: Scheme, rows: int, groups: int) -> Layout:
        """Names, dtypes and shapes of the parts."""
        return {
            f"{quantity}s": (torch.uint8, (rows, packed_bytes(groups, self.bits))),
            f"block_{quantity}s": (torch.int16, (rows, groups * scheme.group_size // BLOCK)),
        }

    def _blocks(self, values: Tensor, scheme: Scheme) -> Tensor:
        values = values.clamp(min=0.0) if self.lowest == 0 else values
        return values.view(values.shape[0], -1, BLOCK // scheme.group_size)


NESTED = {
    "block-4": Nested(4, 0, 15),
    "block-6": Nested(6, 0, 63),
    "block-6-signed": Nested(6, -32, 31),
    "block-8-signed": Nested(8, -128, 127),
}
"""By the names of their scale formats."""
