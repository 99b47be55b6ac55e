"""A matplotlib figure in the style of the reports, and its text as inline SVG."""

import io
import re
from typing import Any

from fewbit.errors import missing_extra


def new_figure(width: float = 6.2, height: float = 3.8) -> tuple[Any, Any]:
    """A figure with one pair of axes; sizes in inches. Raises FewbitError if matplotlib is not installed."""
    figure, grid = new_panels(1, 1, (width, height))
    return figure, grid[0][0]


def new_panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its axes, `grid[row][column]`; size of the whole figure in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "report") from error
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, grid


def to_svg(figure: Any) -> str:
    """The figure as an `<svg>` element; the same figure gives the same text."""
    from matplotlib import rc_context

    _as_it_stands(figure)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "fewbit"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return re.sub(r"\A.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)


def _as_it_stands(figure: Any) -> None:
    """Turn off mathematical notation in text, since names can contain dollar signs; tick labels of axes keep it."""
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter, ScalarFormatter

    numbers: set[int] = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if isinstance(axis.get_major_formatter(), LogFormatter | ScalarFormatter):
            numbers.update(id(text) for text in (*axis.get_ticklabels(which="both"), axis.get_offset_text()))
    for text in figure.findobj(Text):
        if id(text) not in numbers:
            text.set_parse_math(False)
