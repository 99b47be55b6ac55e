"""How one weight matrix is stored: the choices that a reader needs, and the tensors that follow from them."""

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from fewbit.grids import positions
from fewbit.grids.packing import packed_bytes

FORMAT_VERSION = 1

GRIDS = ("zero-point", "symmetric", "minimum", "real-zero", "codebook", "binary")
OUTLIER_GRIDS = ("none", "minmax", "sign-magnitude", "row", "float16")
SCALE_FORMATS = ("float16", "float32", "two-level", "statistics")

TWO_LEVEL_BITS = 7
"""Bits of a two-level scale code: a sign above six bits of magnitude."""

_WORD = {"float16": torch.int16, "float32": torch.int32}


@dataclass(frozen=True)
class Scheme:
    """The stored form of a weight matrix.

    bits: bits of a dense code, 1 to 8. group_size: weights of a row that share a grid.
    grid: the grid of the core, one of GRIDS. levels: the 2^bits values of a codebook.
    scale_format: how scales (and minima) are stored, one of SCALE_FORMATS.
    outlier_grid: one of OUTLIER_GRIDS. outlier_bits: bits of an outlier's code, `bits` to 8; the ones above `bits`
    are stored beside the dense codes. float16 outliers have 16 bits of their own and leave their dense code unused.
    statistic_bits, statistic_rows: for the scale format statistics, the bits of a scale and of a zero-point, and how
    many rows share the second level.
    """

    bits: int
    group_size: int
    grid: str
    levels: tuple[float, ...] = ()
    scale_format: str = "float16"
    outlier_grid: str = "none"
    outlier_bits: int = 0
    statistic_bits: int = 0
    statistic_rows: int = 0

    def __post_init__(self) -> None:
        checks = [
            (1 <= self.bits <= 8, f"bits {self.bits}"),
            (self.group_size >= 1, f"group size {self.group_size}"),
            (self.grid in GRIDS, f"grid {self.grid!r}"),
            (len(self.levels) == (2**self.bits if self.grid == "codebook" else 0), "number of levels"),
            (self.scale_format in SCALE_FORMATS, f"scale format {self.scale_format!r}"),
            (self.grid in ("codebook", "symmetric") or self.scale_format != "two-level", "two-level minima"),
            (self.outlier_grid in OUTLIER_GRIDS, f"outlier grid {self.outlier_grid!r}"),
            (self._outlier_bits_fit(), "outlier bits"),
            ((self.scale_format == "statistics") == (self.grid == "real-zero"), "grid with these scales"),
            (self.grid != "binary" or (self.bits == 1 and self.outlier_grid == "none"), "bits of a binary grid"),
            (self.scale_format != "statistics" or self._statistics_fit(), "statistics"),
        ]
        for good, what in checks:
            if not good:
                raise ValueError(f"a stored weight cannot have this {what}")

    def _outlier_bits_fit(self) -> bool:
        if self.outlier_grid == "float16":
            return self.outlier_bits == 16
        return self.outlier_grid == "none" or self.bits <= self.outlier_bits <= 8

    def _statistics_fit(self) -> bool:
        return 1 <= self.statistic_bits <= 8 and self.statistic_rows >= 1

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; what only some formats have is left out of the others."""
        data = {**asdict(self), "levels": list(self.levels)}
        if self.scale_format != "statistics":
            del data["statistic_bits"], data["statistic_rows"]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Scheme":
        """Inverse of :meth:`to_dict`; unknown keys are an error, since they could change the meaning of the codes."""
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown keys in a quantization scheme: {', '.join(sorted(unknown))}")
        return cls(**{**data, "levels": tuple(data.get("levels", ()))})


@dataclass(frozen=True)
class StoredWeight:
    """One quantized weight: its scheme, its logical shape (out, in), and how its outliers are placed.

    transposed: the checkpoint this came from stores (in, out). original_shape: the tensor's own shape where it is
    not (out, in), such as fused experts (experts, out, in), which are stored as (experts * out, in).
    """

    scheme: Scheme
    shape: tuple[int, int]
    outliers: int = 0
    positions: str = "none"
    transposed: bool = False
    original_shape: tuple[int, ...] | None = None

    @property
    def groups(self) -> int:
        return self.shape[1] // self.scheme.group_size

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]


def part_layout(stored: StoredWeight) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor that stores this weight, in the order in which they are written."""
    scheme, (rows, columns), groups = stored.scheme, stored.shape, stored.groups
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "codes": (torch.uint8, (rows, packed_bytes(columns, scheme.bits)))
    }
    if scheme.grid == "binary":
        layout["second"] = (torch.uint8, (rows, packed_bytes(columns, 1)))
        layout["salient"] = (torch.uint8, (packed_bytes(columns, 1),))
        layout["scales"] = (torch.int16, (rows, groups, 4))
        return layout
    if scheme.scale_format == "two-level":
        layout["scales"] = (torch.uint8, (rows, packed_bytes(groups, TWO_LEVEL_BITS)))
        layout["row_scales"] = (torch.int16, (rows,))
        word = torch.int16
    elif scheme.scale_format == "statistics":
        blocks = -(-rows // scheme.statistic_rows)
        for name in ("scale", "zero"):
            layout[f"{name}s"] = (torch.uint8, (rows, packed_bytes(groups, scheme.statistic_bits)))
            layout[f"{name}_statistics"] = (torch.int16, (blocks, groups, 2))
        word = torch.int16
    else:
        word = _WORD[scheme.scale_format]
        layout["scales"] = (word, (rows, groups))
    if scheme.grid == "zero-point":
        layout["zeros"] = (torch.uint8, (rows, packed_bytes(groups, scheme.bits)))
    if scheme.grid == "minimum":
        layout["minima"] = (word, (rows, groups))
    if scheme.outlier_grid == "none":
        return layout
    size = positions.encoded_bytes(stored.positions, stored.weights, stored.outliers, scheme.group_size)
    layout["outlier_positions"] = (torch.uint8, (size,))
    if scheme.outlier_grid == "float16":
        layout["outlier_values"] = (torch.int16, (stored.outliers,))
        return layout
    if scheme.outlier_bits > scheme.bits:
        extra = packed_bytes(stored.outliers, scheme.outlier_bits - scheme.bits)
        layout["outlier_codes"] = (torch.uint8, (extra,))
    if scheme.outlier_grid == "row":
        layout["outlier_scales"] = (torch.int16, (rows,))
    else:
        layout["outlier_scales"] = (word, (rows, groups))
        layout["outlier_minima"] = (word, (rows, groups))
    return layout


def stored_bytes(stored: StoredWeight) -> int:
    """Bytes on disk of the tensors that replace the weight."""
    total = 0
    for dtype, shape in part_layout(stored).values():
        count = 1
        for size in shape:
            count *= size
        total += count * dtype.itemsize
    return total
