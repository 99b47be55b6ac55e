"""What engines that run the cells of a study share: how a finished cell is taken, how one is named."""

from collections.abc import Callable

from fewbit.errors import FewbitError
from fewbit.studies.study import Cell, Row

Finish = Callable[[int, Cell, list[Row], float], None]


def show_cell(cell: Cell) -> str:
    """A cell in a few words."""
    return " ".join(str(value) for value in cell.values() if not isinstance(value, dict | list | tuple))[:60]


def cell_error(cell: Cell, error: FewbitError) -> FewbitError:
    """The error of a cell, saying which; finished cells are kept."""
    return FewbitError(f"{show_cell(cell)}: {error} (finished cells are kept)")
