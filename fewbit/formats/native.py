"""The native format of one weight: named integer tensors <-> weights. `docs/format.md` is its specification."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fewbit.formats.scheme import Scheme, StoredWeight, part_layout
from fewbit.grids import binary, positions
from fewbit.grids.packing import pack, unpack
from fewbit.grids.scales import (
    from_pattern,
    from_statistics,
    from_two_level,
    to_pattern,
    to_statistics,
    to_two_level,
)


def pack_scales(scales: Tensor, scheme: Scheme) -> tuple[dict[str, Tensor], Tensor]:
    """Store scales `(rows, groups)`; returns the parts and the float32 scales that a reader will see."""
    if scheme.scale_format == "two-level":
        codes, row_scales = to_two_level(scales)
        return {"scales": codes, "row_scales": row_scales}, from_two_level(codes, row_scales, scales.shape[1])
    if scheme.scale_format == "statistics":
        codes, second = to_statistics(scales, scheme.statistic_bits, scheme.statistic_rows)
        parts = {"scales": codes, "scale_statistics": second}
        return parts, _from_statistics(parts, "scale", scheme, scales.shape[1])
    pattern = to_pattern(scales, scheme.scale_format)
    return {"scales": pattern}, from_pattern(pattern, scheme.scale_format)


def pack_real_zeros(zeros: Tensor, scheme: Scheme) -> tuple[dict[str, Tensor], Tensor]:
    """Store real-valued zero-points `(rows, groups)` as statistics; returns the parts and what a reader will see."""
    codes, second = to_statistics(zeros, scheme.statistic_bits, scheme.statistic_rows)
    parts = {"zeros": codes, "zero_statistics": second}
    return parts, _from_statistics(parts, "zero", scheme, zeros.shape[1])


def _from_statistics(parts: Mapping[str, Tensor], name: str, scheme: Scheme, groups: int) -> Tensor:
    codes, second = parts[f"{name}s"], parts[f"{name}_statistics"]
    return from_statistics(codes, second, scheme.statistic_bits, scheme.statistic_rows, groups)


def pack_floats(values: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Store minima or outlier scales in the scheme's float format; returns the patterns and what a reader sees."""
    number_format = "float32" if scheme.scale_format == "float32" else "float16"
    pattern = to_pattern(values, number_format)
    return pattern, from_pattern(pattern, number_format)


def read_scales(parts: Mapping[str, Tensor], stored: StoredWeight) -> Tensor:
    """Float32 scales `(rows, groups)`."""
    if stored.scheme.scale_format == "two-level":
        return from_two_level(parts["scales"], parts["row_scales"], stored.groups)
    if stored.scheme.scale_format == "statistics":
        return _from_statistics(parts, "scale", stored.scheme, stored.groups)
    return from_pattern(parts["scales"], stored.scheme.scale_format)


def read_offset(parts: Mapping[str, Tensor], stored: StoredWeight) -> Tensor | float:
    """Zero-points or minima `(rows, groups)` float32, or the one number that stands for all."""
    scheme = stored.scheme
    if scheme.grid == "minimum":
        return read_floats(parts["minima"], scheme)
    if scheme.grid == "real-zero":
        return _from_statistics(parts, "zero", scheme, stored.groups)
    if scheme.grid == "zero-point":
        return unpack(parts["zeros"], scheme.bits, stored.groups).to(torch.float32)
    return float(2 ** (scheme.bits - 1)) if scheme.grid == "symmetric" else 0.0


def read_floats(pattern: Tensor, scheme: Scheme) -> Tensor:
    """Float32 values of minima or outlier scales."""
    return from_pattern(pattern, "float32" if scheme.scale_format == "float32" else "float16")


def decode(parts: Mapping[str, Tensor], stored: StoredWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight matrix `(out, in)`, computed in float32 and rounded to `dtype` once; on the parts' device."""
    scheme, (rows, columns) = stored.scheme, stored.shape
    codes = unpack(parts["codes"], scheme.bits, columns)
    if scheme.grid == "binary":
        return _decode_binary(parts, stored, codes).to(dtype)
    scale = read_scales(parts, stored).unsqueeze(2)
    grouped = codes.view(rows, stored.groups, scheme.group_size)
    offset = read_offset(parts, stored)
    offset = offset.unsqueeze(2) if isinstance(offset, Tensor) else offset
    if scheme.grid == "codebook":
        levels = torch.tensor(scheme.levels, dtype=torch.float32, device=codes.device)
        weight = levels[grouped.to(torch.int32)] * scale
    elif scheme.grid == "minimum":
        weight = grouped.to(torch.float32) * scale + offset
    else:
        weight = (grouped.to(torch.float32) - offset) * scale
    weight = weight.view(rows * columns)
    if scheme.outlier_grid != "none" and stored.outliers:
        where = outlier_positions(parts, stored)
        weight[where] = _decode_outliers(parts, stored, codes.view(-1)[where], where)
    return weight.view(rows, columns).to(dtype)


def _decode_binary(parts: Mapping[str, Tensor], stored: StoredWeight, negative: Tensor) -> Tensor:
    rows, columns = stored.shape
    grouped = (rows, stored.groups, stored.scheme.group_size)
    salient = unpack(parts["salient"], 1, columns).view(1, *grouped[1:]).bool()
    scales = from_pattern(parts["scales"], "float16").unsqueeze(2)
    small, large = binary.magnitudes_of(scales, salient)
    second = unpack(parts["second"], 1, columns).view(grouped).bool()
    value = torch.where(second, large, small)
    return torch.where(negative.view(grouped).bool(), -value, value).view(rows, columns)


def outlier_positions(parts: Mapping[str, Tensor], stored: StoredWeight) -> Tensor:
    """Ascending flat positions (int64) of the outliers."""
    return positions.decode(
        parts["outlier_positions"],
        stored.positions,
        stored.weights,
        stored.outliers,
        stored.scheme.group_size,
    )


def _decode_outliers(parts: Mapping[str, Tensor], stored: StoredWeight, dense: Tensor, where: Tensor) -> Tensor:
    scheme = stored.scheme
    if scheme.outlier_grid == "float16":
        return from_pattern(parts["outlier_values"], "float16")
    code = dense.to(torch.int32)
    if scheme.outlier_bits > scheme.bits:
        extra = unpack(parts["outlier_codes"], scheme.outlier_bits - scheme.bits, stored.outliers)
        code = code | (extra.to(torch.int32) << scheme.bits)
    value = code.to(torch.float32)
    if scheme.outlier_grid == "row":
        scale = from_pattern(parts["outlier_scales"], "bfloat16")[where // stored.shape[1]]
        return (value - float(2 ** (scheme.outlier_bits - 1))) * scale
    group = where // scheme.group_size
    scale = read_floats(parts["outlier_scales"], scheme).view(-1)[group]
    minimum = read_floats(parts["outlier_minima"], scheme).view(-1)[group]
    if scheme.outlier_grid == "minmax":
        return value * scale + minimum
    half = 2 ** (scheme.outlier_bits - 1)
    magnitude = (code % half).to(torch.float32) * scale + minimum
    return torch.where(code >= half, -magnitude, magnitude)


def pack_outliers(codes: Tensor, where: Tensor, stored: StoredWeight) -> dict[str, Tensor]:
    """Positions, and the bits of the outliers' codes (int32, 1-D) that do not fit the dense codes.

    Codes of float16 outliers are the bit patterns of their values.
    """
    scheme = stored.scheme
    parts = {"outlier_positions": positions.encode(where, stored.positions, stored.weights, scheme.group_size)}
    if scheme.outlier_grid == "float16":
        parts["outlier_values"] = codes.to(torch.int16)
    elif scheme.outlier_bits > scheme.bits:
        extra = (codes >> scheme.bits).to(torch.uint8)
        parts["outlier_codes"] = pack(extra, scheme.outlier_bits - scheme.bits)
    return parts


def check_parts(parts: Mapping[str, Tensor], stored: StoredWeight) -> None:
    """ValueError unless the tensors have exactly the names, dtypes and shapes of the stored weight."""
    expected = part_layout(stored)
    actual = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in parts.items()}
    if expected != actual:
        raise ValueError(f"parts of a stored weight do not fit it: expected {expected}, found {actual}")
