"""Fit grids, find outliers, and convert between weights and stored parts once both are fixed.

All functions take complete rows of a matrix and return what is stored for them, so rows can be processed in any order
and by any number of workers with the same result.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbit.grids.grid import Fitted, Groups, ScaleSearch
from fewbit.grids.positions import flat_positions
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.grids.table import grid_of
from fewbit.outliers.choice import OutlierChoice
from fewbit.outliers.grids import OUTLIER_GRIDS, at_positions, read_positions
from fewbit.outliers.rules import OUTLIER_RULES
from fewbit.solvers.choice import SolverChoice


@dataclass(frozen=True)
class WeightChoices:
    """How one weight is quantized: its stored form, the search for grids, the outliers, and the solver."""

    scheme: Scheme
    search: ScaleSearch | None = None
    outliers: OutlierChoice = field(default_factory=OutlierChoice)
    solver: SolverChoice = field(default_factory=SolverChoice)


@dataclass(frozen=True)
class Settled:
    """The grid of the core, and the ascending flat positions and grid of the outliers, if there are any."""

    core: Fitted
    where: Tensor | None = None
    outliers: Fitted | None = None


@dataclass(frozen=True)
class Encoded:
    """What is stored for some rows.

    parts: by name; concatenated over rows, they are the stored tensors, except for positions and codes of outliers.
    where, outlier_codes: ascending flat positions (int64) and codes (int32) of the outliers, or None. decoded: the
    weights `(rows, in)` float32. squared_error, squared_norm: of these rows. group_errors: each group of each row has a
    relative squared error, its squared error divided by its squared norm; this is their sum, the largest of them, and
    the number of groups that are not all 0.
    """

    parts: dict[str, Tensor]
    where: Tensor | None
    outlier_codes: Tensor | None
    decoded: Tensor
    squared_error: float
    squared_norm: float
    group_errors: tuple[float, float, int] = (0.0, 0.0, 0)


class NotFiniteError(ValueError):
    """A weight is NaN or infinite."""


def check_finite(weight: Tensor) -> None:
    """Raise NotFiniteError if a weight is NaN or infinite."""
    if not bool(torch.isfinite(weight.sum())) and not bool(torch.isfinite(weight).all()):
        raise NotFiniteError


def settle(weight: Tensor, choices: WeightChoices, cut: float | None, importance: Tensor | None) -> Settled:
    """Find the outliers of rows `(rows, in)` float32 and fit all grids, before any code is chosen.

    cut: the threshold of the outlier rule. importance: c_j of each column `(in,)`, or None for 1. Outliers are found by
    ``|w| sqrt(c_j)``, because with a diagonal curvature lambda'_j is lambda / (2 c_j).
    """
    return _settle(weight, choices, cut, importance, importance)[0]


def _settle(
    weight: Tensor, choices: WeightChoices, cut: float | None, importance: Tensor | None, weighing: Tensor | None
) -> tuple[Settled, Tensor]:
    scheme, (rows, columns) = choices.scheme, weight.shape
    x = weight.reshape(rows, -1, scheme.group_size)
    spread = None if importance is None else importance.view(1, -1, scheme.group_size)
    weighed = None if weighing is None else x.abs() * weighing.view(1, -1, scheme.group_size).sqrt()
    rule, grid = OUTLIER_RULES[choices.outliers.rule], grid_of(scheme)
    core, mask = rule.divide(x, weighed, cut, choices.outliers)
    fitted = grid.settle(grid.fit(Groups(core, mask, spread), scheme, choices.search), scheme, True)
    if mask is None:
        return Settled(fitted), core
    where = flat_positions(mask)
    values = weight.reshape(-1)[where]
    outliers = OUTLIER_GRIDS[scheme.outlier_grid].fit(values, where, (rows, columns), scheme)
    return Settled(fitted, where, outliers), core


def round_rows(weight: Tensor, choices: WeightChoices, cut: float | None, importance: Tensor | None) -> Encoded:
    """Quantize whole rows `(rows, in)` of any floating-point dtype without a curvature, on their device.

    importance: c_j of each column `(in,)` for fitting grids, not for finding outliers. Raises NotFiniteError if a
    weight is NaN or infinite.
    """
    x = weight.to(torch.float32)
    check_finite(x)
    settled, core = _settle(x, choices, cut, importance, None)
    return _encode(x, x, core, settled)


def encode(weight: Tensor, original: Tensor, settled: Settled) -> Encoded:
    """Round rows `(rows, in)` float32 to the given grids; errors are relative to `original`."""
    core = weight.reshape(weight.shape[0], -1, settled.core.scheme.group_size)
    if settled.where is not None and settled.where.numel():
        core = weight.reshape(-1).index_fill(0, settled.where, 0.0).view(core.shape)
    return _encode(weight, original, core, settled)


def _encode(weight: Tensor, original: Tensor, core: Tensor, settled: Settled) -> Encoded:
    scheme, (rows, columns) = settled.core.scheme, weight.shape
    grid = grid_of(scheme)
    layout = grid.codes(scheme)
    codes, decoded = grid.encode(core, settled.core.values, scheme)
    codes, decoded = codes.reshape(codes.shape[0], -1), decoded.reshape(rows, columns)
    parts, outlier_codes = dict(settled.core.parts), None
    if settled.where is not None and settled.outliers is not None:
        where = settled.where
        chosen = at_positions(settled.outliers.values, where, (rows, columns))
        kind = OUTLIER_GRIDS[scheme.outlier_grid]
        outlier_codes, values = kind.encode(weight.reshape(-1)[where], *chosen, scheme)
        parts.update(settled.outliers.parts)
        layout.put(codes, where, outlier_codes)
        decoded.view(-1)[where] = values
    parts.update(layout.pack(codes))
    return Encoded(parts, settled.where, outlier_codes, decoded, *errors_of(decoded, original, scheme.group_size))


def errors_of(decoded: Tensor, original: Tensor, group_size: int) -> tuple[float, float, tuple[float, float, int]]:
    """Squared error, squared norm, and the group errors of :class:`Encoded`, of rows `(rows, in)` float32.

    Sums inside a group are in float32, sums over groups in float64: a float64 copy of all weights would be slow.
    """
    error = (decoded - original).reshape(-1, group_size).square_().sum(dim=1)
    norm = original.reshape(-1, group_size).square().sum(dim=1)
    shares = torch.where(norm > 0, error / norm, 0.0)
    by_group = (float(shares.sum(dtype=torch.float64)), float(shares.max()), int((norm > 0).sum()))
    return float(error.sum(dtype=torch.float64)), float(norm.sum(dtype=torch.float64)), by_group


def read_settled(parts: Mapping[str, Tensor], stored: StoredWeight) -> Settled:
    """The grids and the positions of outliers of a stored weight."""
    scheme, grid = stored.scheme, grid_of(stored.scheme)
    names = grid.layout(scheme, stored.shape[0], stored.groups)
    core = Fitted(scheme, {name: parts[name] for name in names}, grid.read(parts, scheme, stored.groups))
    if scheme.outlier_grid == "none" or not stored.outliers:
        return Settled(core)
    kind = OUTLIER_GRIDS[scheme.outlier_grid]
    kept = {name: parts[name] for name in kind.layout(stored)}
    return Settled(core, read_positions(parts, stored), Fitted(scheme, kept, kind.read(parts, stored)))


def read_codes(parts: Mapping[str, Tensor], stored: StoredWeight) -> Tensor:
    """Dense codes, uint8 `(rows, groups, g)`; rows and g are divided by the grid's span where weights share a code."""
    grid, (rows, columns) = grid_of(stored.scheme), stored.shape
    codes = grid.codes(stored.scheme).unpack(parts, rows, columns)
    return codes.view(rows // grid.span.rows, stored.groups, stored.scheme.group_size // grid.span.columns)
