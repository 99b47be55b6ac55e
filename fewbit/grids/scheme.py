"""How one weight matrix is stored: everything that a reader needs to know."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> (dtype, shape) of tensors that store something."""


@dataclass(frozen=True)
class Scheme:
    """The stored form of a weight matrix.

    bits: bits of a dense code for each weight, a whole number for all but a few grids. group_size: weights of a row
    that share a grid. grid: the grid of the core, a name in :data:`fewbit.grids.table.GRIDS`. levels: the values of a
    codebook. scale_format: how scales (and minima) are stored, a name in
    :data:`fewbit.grids.scale_formats.SCALE_FORMATS`.
    outlier_grid: none, or a name in :data:`fewbit.outliers.grids.OUTLIER_GRIDS`. outlier_bits: bits of an outlier's
    code; bits that do not fit into the dense codes are stored beside them. statistic_bits, statistic_rows: for the
    scale format statistics, the bits of a scale and of a zero-point, and how many rows share the second level.
    transform: the transform that is applied to the layer's inputs before this weight, a name in
    :data:`fewbit.transforms.table.TRANSFORMS`. input_bits: bits to which the layer's inputs are rounded at run time, a
    scale for each token; 0 if they are not rounded.
    """

    bits: float
    group_size: int
    grid: str
    levels: tuple[float, ...] = ()
    scale_format: str = "float16"
    outlier_grid: str = "none"
    outlier_bits: int = 0
    statistic_bits: int = 0
    statistic_rows: int = 0
    transform: str = "none"
    input_bits: int = 0

    def __post_init__(self) -> None:
        for good, what in ((0 < self.bits <= 8, f"bits {self.bits}"), (self.group_size >= 1, "group size")):
            if not good:
                raise ValueError(f"a stored weight cannot have this {what}")

    @property
    def whole_bits(self) -> int:
        """The number of bits per code, rounded up."""
        return math.ceil(self.bits)

    @property
    def has_outliers(self) -> bool:
        """Whether some weights may be stored on a grid for outliers."""
        return self.outlier_grid != "none"

    def to_dict(self) -> dict[str, Any]:
        """The scheme as a dict of JSON values; keys that only some formats use are omitted for the others."""
        data = {**asdict(self), "levels": list(self.levels)}
        if not self.statistic_bits:
            del data["statistic_bits"], data["statistic_rows"]
        if self.transform == "none":
            del data["transform"]
        if not self.input_bits:
            del data["input_bits"]
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
    """One quantized weight: its scheme, its logical shape (out, in), the number and position encoding of its outliers.

    transposed: the original checkpoint stores the weight as (in, out). original_shape: the tensor's original shape if
    it is not (out, in), such as fused experts (experts, out, in), which are stored as (experts * out, in).
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

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of the original tensor in its checkpoint."""
        if self.original_shape is not None:
            return self.original_shape
        rows, columns = self.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def tensor_name(self, module: str) -> str:
        """The name of the original tensor in its checkpoint, which is also the name of the guard.

        module: the name under which the parts are stored: of the tensor itself if there is an `original_shape`,
        otherwise of the layer with this `.weight`.
        """
        return module if self.original_shape is not None else f"{module}.weight"
