"""The native format of one weight: named integer tensors <-> weights. `docs/format.md` is its specification.

The grid defines how the core is stored, the outlier grid how outliers are stored, and the transform how the values of
the transform are stored. This module combines them.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fewbit.grids.inputs import INPUT_BITS, round_tokens
from fewbit.grids.scheme import Layout, Scheme, StoredWeight
from fewbit.grids.table import check_core, grid_of, row_block
from fewbit.outliers.grids import check_outlier_values, check_outliers, outlier_layout, read_positions, read_values
from fewbit.solvers.settled import read_codes
from fewbit.transforms.table import TRANSFORMS
from fewbit.transforms.transform import Values

FORMAT_VERSION = 2
READ_VERSIONS = (1, 2)
"""Versions that this code reads. Version 2 added guards and rows with logarithmic scales."""
GUARD = (torch.uint8, (0,))
"""Dtype and shape of the guard, a tensor with the name of the original one. It fits no network, so that a loader that
does not know the format fails instead of filling the layer with random numbers."""
AT_ONCE = 1 << 24
"""Weights of a large embedding or head that are decoded at one time."""


def check_scheme(scheme: Scheme) -> Scheme:
    """Return the scheme; raise ValueError unless its parts are known and can be combined."""
    check_core(scheme)
    check_outliers(scheme)
    if scheme.transform not in TRANSFORMS or TRANSFORMS[scheme.transform].folded:
        raise ValueError(f"a stored weight cannot have this transform {scheme.transform!r}")
    if scheme.input_bits and scheme.input_bits not in INPUT_BITS:
        raise ValueError(f"inputs cannot be rounded to {scheme.input_bits!r} bits")
    return scheme


def part_layout(stored: StoredWeight) -> Layout:
    """Name -> (dtype, shape) of every tensor that stores this weight, in the order in which they are written."""
    scheme, (rows, columns) = stored.scheme, stored.shape
    grid = grid_of(scheme)
    return {
        **grid.codes(scheme).layout(rows, columns),
        **grid.layout(scheme, rows, stored.groups),
        **outlier_layout(stored),
        **TRANSFORMS[scheme.transform].layout(columns),
    }


def stored_bytes(stored: StoredWeight) -> int:
    """Size in bytes on disk of the tensors that replace the weight."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in part_layout(stored).values())


def decode(parts: Mapping[str, Tensor], stored: StoredWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight matrix `(out, in)`, computed in float32 and then rounded to `dtype`; on the parts' device."""
    if stored.weights > AT_ONCE and has_separate_rows(stored):
        pieces = [decode_rows(parts, stored, rows, dtype) for rows in row_slices(stored)]
        return torch.cat(pieces)
    weight = decode_stored(parts, stored)
    return TRANSFORMS[stored.scheme.transform].back(weight, read_transform(parts, stored)).to(dtype)


def decode_stored(parts: Mapping[str, Tensor], stored: StoredWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight for transformed inputs, `(out, in)`."""
    scheme, (rows, columns) = stored.scheme, stored.shape
    grid, codes = grid_of(scheme), read_codes(parts, stored)
    weight = grid.decode(codes, grid.read(parts, scheme, stored.groups), scheme).reshape(rows * columns)
    if scheme.has_outliers and stored.outliers:
        where = read_positions(parts, stored)
        weight[where] = read_values(parts, stored, codes, where)
    return weight.view(rows, columns).to(dtype)


def has_separate_rows(stored: StoredWeight) -> bool:
    """Whether every part has one row for each row of the weight, so that some rows can be decoded alone."""
    scheme, rows = stored.scheme, stored.shape[0]
    if stored.outliers or scheme.transform != "none" or row_block(scheme) != 1:
        return False
    return all(shape and shape[0] == rows for _, shape in part_layout(stored).values())


def decode_rows(
    parts: Mapping[str, Tensor], stored: StoredWeight, rows: Tensor | slice, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Some rows `(n, in)` of a weight that has separate rows. rows: their indices `(n,)`, or a slice.

    Raises IndexError for an index that is negative or too large.
    """
    chosen = {
        name: part[rows] if isinstance(rows, slice) else part.index_select(0, rows) for name, part in parts.items()
    }
    count = chosen["codes"].shape[0]
    return decode_stored(chosen, replace(stored, shape=(count, stored.shape[1]), original_shape=None), dtype)


def row_slices(stored: StoredWeight) -> list[slice]:
    """Slices of a weight's rows with about `AT_ONCE` weights each."""
    step = max(1, AT_ONCE // stored.shape[1])
    return [slice(first, first + step) for first in range(0, stored.shape[0], step)]


def read_transform(parts: Mapping[str, Tensor], stored: StoredWeight) -> Values:
    """The values of the transform of the weight's inputs; empty for most weights."""
    return TRANSFORMS[stored.scheme.transform].read(parts)


def transform_weight(weight: Tensor, parts: Mapping[str, Tensor], stored: StoredWeight) -> Tensor:
    """A weight `(out, in)` float32 for inputs after the weight's transform, as :func:`decode_stored` gives it."""
    return TRANSFORMS[stored.scheme.transform].weight(weight, read_transform(parts, stored))


def transform_inputs(x: Tensor, parts: Mapping[str, Tensor], stored: StoredWeight) -> Tensor:
    """Inputs `(..., in)` as the stored weight takes them: after its transform, and rounded if its scheme says so."""
    x = TRANSFORMS[stored.scheme.transform].inputs(x, read_transform(parts, stored))
    return round_tokens(x, stored.scheme.input_bits) if stored.scheme.input_bits else x


def check_parts(parts: Mapping[str, Tensor], stored: StoredWeight) -> None:
    """Raise ValueError unless the tensors have exactly the names, dtypes and shapes of the stored weight."""
    expected = part_layout(stored)
    actual = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in parts.items()}
    if expected != actual:
        raise ValueError(f"parts of a stored weight do not fit it: expected {expected}, found {actual}")


def check_content(parts: Mapping[str, Tensor], stored: StoredWeight) -> None:
    """Raise ValueError if the tensors, which fit the stored weight, contain values that fewbit does not write.

    These are positions of outliers that are too many or too few, do not ascend or lie outside the weight; and scales or
    other values of the grids that are NaN or infinite; and values of the transform that are none of its own.
    """
    values = [*grid_of(stored.scheme).read(parts, stored.scheme, stored.groups).values()]
    transform = read_transform(parts, stored)
    values += transform.values()
    wrong = TRANSFORMS[stored.scheme.transform].problem(transform)
    if wrong:
        raise ValueError(wrong)
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise ValueError("values of the grid are not finite")
    if stored.outliers:
        check_outlier_values(parts, stored)
