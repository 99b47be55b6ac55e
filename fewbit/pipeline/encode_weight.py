"""Between a weight matrix and its stored parts when grids and places of outliers are settled, in both directions."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.formats import native
from fewbit.formats.scheme import StoredWeight
from fewbit.grids.packing import pack, unpack
from fewbit.grids.scales import from_pattern
from fewbit.pipeline.fit_grid import Grid, encode, encode_outliers, outlier_grid_of


@dataclass(frozen=True)
class Settled:
    """The grid of the core, and of the outliers with their ascending flat positions (int64), where there are any."""

    core: Grid
    where: Tensor | None = None
    outliers: Grid | None = None


@dataclass(frozen=True)
class Encoded:
    """Parts by name (positions of outliers apart), codes of the outliers, and decoded weights `(out, in)` float32."""

    parts: dict[str, Tensor]
    outlier_codes: Tensor | None
    decoded: Tensor


def encode_weight(weight: Tensor, settled: Settled) -> Encoded:
    """Round `(out, in)` float32 to settled grids."""
    scheme = settled.core.scheme
    rows, columns = weight.shape
    offset = settled.core.offset
    offset = offset.unsqueeze(2) if isinstance(offset, Tensor) else offset
    grouped = weight.reshape(rows, -1, scheme.group_size)
    codes, decoded = encode(grouped, settled.core.scale.unsqueeze(2), offset, scheme)
    codes, decoded = codes.reshape(-1), decoded.reshape(-1)
    parts, outlier_codes = dict(settled.core.parts), None
    if settled.where is not None and settled.outliers is not None:
        chosen = outlier_grid_of(settled.where, columns, settled.outliers)
        outlier_codes, values = encode_outliers(weight.reshape(-1)[settled.where], *chosen, scheme)
        parts.update(settled.outliers.parts)
        codes[settled.where] = (outlier_codes & (2**scheme.bits - 1)).to(torch.uint8)
        decoded[settled.where] = values
    parts["codes"] = pack(codes.view(rows, columns), scheme.bits)
    return Encoded(parts, outlier_codes, decoded.view(rows, columns))


def read_settled(parts: Mapping[str, Tensor], stored: StoredWeight) -> Settled:
    """The grids and places of outliers of a stored weight of any grid but the binary one."""
    scheme = stored.scheme
    scale, offset = native.read_scales(parts, stored), native.read_offset(parts, stored)
    names = [name for name in parts if name.startswith(("scale", "row_scale", "zero", "minima"))]
    core = Grid(scheme, {name: parts[name] for name in names}, scale, offset)
    if scheme.outlier_grid == "none" or not stored.outliers:
        return Settled(core)
    where = native.outlier_positions(parts, stored)
    rows = stored.shape[0]
    if scheme.outlier_grid == "float16":
        return Settled(core, where, Grid(scheme, {}, scale.new_ones(rows, 1), scale.new_zeros(rows, 1)))
    kept = {name: part for name, part in parts.items() if name in ("outlier_scales", "outlier_minima")}
    if scheme.outlier_grid == "row":
        row_scale = from_pattern(parts["outlier_scales"], "bfloat16").unsqueeze(1)
        return Settled(core, where, Grid(scheme, kept, row_scale, torch.zeros_like(row_scale)))
    spread, minimum = (native.read_floats(kept[name], scheme) for name in ("outlier_scales", "outlier_minima"))
    return Settled(core, where, Grid(scheme, kept, spread, minimum))


def read_codes(parts: Mapping[str, Tensor], stored: StoredWeight) -> Tensor:
    """Dense codes `(rows, groups, g)` uint8."""
    rows, columns = stored.shape
    return unpack(parts["codes"], stored.scheme.bits, columns).view(rows, stored.groups, stored.scheme.group_size)
