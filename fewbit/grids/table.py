"""The table of grids."""

from math import lcm

from fewbit.grids.binary_grid import BINARY
from fewbit.grids.evenly import MINIMUM, REAL_ZERO, SYMMETRIC, ZERO_POINT
from fewbit.grids.floats import FLOAT_GRIDS
from fewbit.grids.ggml import GGML_GRIDS
from fewbit.grids.grid import Grid
from fewbit.grids.level_grid import CODEBOOK
from fewbit.grids.scale_formats import SCALE_FORMATS, ScaleFormat
from fewbit.grids.scheme import Scheme
from fewbit.grids.signed import SIGNED
from fewbit.grids.ternary import TERNARY

GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        ZERO_POINT,
        SYMMETRIC,
        MINIMUM,
        REAL_ZERO,
        CODEBOOK,
        BINARY,
        TERNARY,
        SIGNED,
        *GGML_GRIDS,
        *FLOAT_GRIDS,
    )
}
"""Grids by their name in files."""


def grid_of(scheme: Scheme) -> Grid:
    """The grid of a stored weight."""
    return GRIDS[scheme.grid]


def chosen_grid(name: str) -> Grid | None:
    """The grid with this name in recipes."""
    return next((grid for grid in GRIDS.values() if grid.choice == name), None)


def takes_scales(grid: Grid, form: ScaleFormat) -> bool:
    """Whether the scales of a grid can be stored in a format."""
    return form.name == grid.scales if grid.scales else grid.offset in form.offsets


def row_block(scheme: Scheme) -> int:
    """How many consecutive rows are stored or rounded together; 0 for all rows of a weight."""
    grid = grid_of(scheme)
    return 0 if grid.joins_rows else lcm(grid.span.rows, SCALE_FORMATS[scheme.scale_format].row_block(scheme))


def check_core(scheme: Scheme) -> None:
    """Raise ValueError unless the grid, its bit-width and its scales can be combined."""
    grid, form = GRIDS.get(scheme.grid), SCALE_FORMATS.get(scheme.scale_format)
    if grid is None or form is None:
        unknown = f"grid {scheme.grid!r}" if grid is None else f"scale format {scheme.scale_format!r}"
        raise ValueError(f"a stored weight cannot have this {unknown}")
    problems = [
        (scheme.bits not in grid.widths, f"bits {scheme.bits} with the grid {grid.name}"),
        (not takes_scales(grid, form), f"scale format {form.name} with the grid {grid.name}"),
        (scheme.group_size % grid.span.columns != 0, f"group size {scheme.group_size}"),
        (bool(scheme.levels) != bool(grid.levels(scheme.bits)), "number of levels"),
        (form.has_statistics and not 1 <= scheme.statistic_bits <= 8, "statistics"),
        (form.has_statistics and scheme.statistic_rows < 1, "statistics"),
    ]
    wrong = next((what for bad, what in problems if bad), None) or grid.refuses(scheme)
    if wrong:
        raise ValueError(f"a stored weight cannot have this {wrong}")
