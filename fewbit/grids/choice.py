"""The choice of a grid and of a scale format in a recipe."""

from dataclasses import dataclass

from fewbit.choices import Choices, check_name, check_values, plain_number
from fewbit.errors import FewbitError
from fewbit.grids.grid import Grid, ScaleSearch
from fewbit.grids.scale_formats import SCALE_FORMATS, ScaleFormat
from fewbit.grids.table import GRIDS, chosen_grid

MAX_BITS = 8
COLUMN_WEIGHTS = ("none", "norm-gain")


@dataclass(frozen=True)
class GridChoice:
    """The grid of a recipe.

    name: the name of a grid of :data:`fewbit.grids.table.GRIDS` in recipes. bits: bits per code; None means the only
    width of a grid that has one, otherwise 4. group_size: "auto" (the largest divisor of a layer's columns up to 128),
    "row", a number, or a comma-separated list, of which the first that divides the layer's columns is used ("64,auto").
    search: the ranges to try for each group, of which the one with the least error is used; None for plain min-max.
    column_weights: norm-gain weights squared errors by the squared gain of the norm before the layer.
    """

    name: str = "zero-point"
    bits: float | None = None
    group_size: str = "auto"
    search: ScaleSearch | None = None
    column_weights: str = "none"

    def __post_init__(self) -> None:
        size = plain_number(self.group_size)
        if isinstance(size, int) and not isinstance(size, bool):
            object.__setattr__(self, "group_size", str(size))
        check_values(self, {"name": "grid"})
        check_name("grid", self.name, [grid.choice for grid in GRIDS.values()])
        widths = self.grid.widths
        if self.bits is None:
            object.__setattr__(self, "bits", widths[0] if len(widths) == 1 else 4)
        if isinstance(self.bits, float) and self.bits.is_integer():
            object.__setattr__(self, "bits", int(self.bits))
        number = not isinstance(self.bits, bool) and isinstance(self.bits, int | float)
        if not number or (self.bits not in widths and self.bits not in range(1, MAX_BITS + 1)):
            raise FewbitError(f"bits must be a whole number from 1 to {MAX_BITS}, not {self.bits}")
        if self.bits not in widths and len(widths) == 1:
            unit = "bit" if widths[0] == 1 else "bits"
            raise FewbitError(f"the {self.name} grid has {widths[0]:g} {unit}, not {self.bits}: leave --bits out")
        check_group_size(self.group_size)
        check_name("column_weights", self.column_weights, COLUMN_WEIGHTS)
        if self.weighs_columns and self.search is None:
            raise FewbitError(
                "column_weights weight the errors of the range search: turn the search on with --clip-search"
            )

    @property
    def grid(self) -> Grid:
        """The grid object."""
        found = chosen_grid(self.name)
        assert found is not None
        return found

    @property
    def weighs_columns(self) -> bool:
        """Whether the errors of the range search have weights."""
        return self.column_weights != "none"

    @property
    def width(self) -> float:
        """Bits per code."""
        assert self.bits is not None
        return self.bits

    def refuses(self, recipe: Choices) -> str | None:
        """Why this grid cannot be combined with the choices on the other axes, or None."""
        if self.width not in self.grid.widths:
            fit = [grid.choice for grid in GRIDS.values() if self.width in grid.widths]
            return f"{self.width:g} bit needs one of the grids {', '.join(fit)}, not {self.name}: see --method adpq+"
        if self.grid.block_by_block and not recipe.solver.refit:
            return f"the {self.name} grid is fitted block by block: omit --act-order and --static-groups"
        if self.grid.block_by_block and (recipe.outliers.wanted or not recipe.solver.method.compensates):
            return f"the {self.name} grid needs the column solver, and its salient columns replace outliers"
        if self.weighs_columns and recipe.curvature is not None:
            return "column_weights replace a curvature, but this method measures one"
        return None


@dataclass(frozen=True)
class ScaleChoice:
    """How scales are stored.

    format: a name in :data:`fewbit.grids.scale_formats.SCALE_FORMATS`. statistic_bits: for the format statistics, the
    bits of a scale and of a zero-point, with a second level of 64 bits for every `statistic_rows` rows.
    """

    format: str = "float16"
    statistic_bits: int = 3
    statistic_rows: int = 16

    def __post_init__(self) -> None:
        check_values(self, {"format": "scale_format"})
        check_name("scale_format", self.format, SCALE_FORMATS)
        if not 1 <= self.statistic_bits <= 8 or self.statistic_rows < 1:
            raise FewbitError("statistics need 1 to 8 bits and blocks of at least 1 row")

    @property
    def kind(self) -> ScaleFormat:
        """The format object."""
        return SCALE_FORMATS[self.format]

    def refuses(self, recipe: Choices) -> str | None:
        """Why these scales cannot be combined with the choices on the other axes, or None."""
        if recipe.grid.grid.offset not in self.kind.offsets:
            fit = [grid.choice for grid in GRIDS.values() if grid.offset in self.kind.offsets]
            return f"scale_format {self.format} needs one of the grids {', '.join(fit)}, not {recipe.grid.name}"
        if self.kind.joins_groups and recipe.solver.refit:
            return f"{self.format} scales share data among all groups of a row, so grids cannot be refitted one by one"
        return None


def check_group_size(text: str) -> None:
    """FewbitError unless `text` is a comma-separated list of auto, row and positive numbers."""
    for choice in str(text).split(","):
        if choice not in ("auto", "row") and not (choice.isdecimal() and int(choice) > 0):
            raise FewbitError(f"group size must be a number, auto, row, or a list such as 64,auto, not {text!r}")


def group_size_for(columns: int, choices: str, multiple: int = 1) -> int | None:
    """The group size of a layer with `columns` columns, or None if no choice divides them.

    multiple: the group size must be a multiple of this, the number of weights of a row that are rounded together.
    """
    for choice in choices.split(","):
        if choice == "row":
            size = columns
        elif choice == "auto":
            sizes = range(multiple, min(128, columns) + 1, multiple)
            size = max((size for size in sizes if columns % size == 0), default=0)
        else:
            size = int(choice)
        if size and columns % size == 0 and size % multiple == 0:
            return size
    return None
