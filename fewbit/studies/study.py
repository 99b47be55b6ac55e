"""A study as data: which cells it has, how one is measured, what the rows of all say, and how they are drawn.

Everything between these steps is plain JSON: a cell is a dict of choices, its result a list of flat dicts (tidy
rows), the summary a dict. So a grid can stop, go on, run elsewhere, and be drawn again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fewbit.progress import Progress
from fewbit.report.html import Section
from fewbit.studies.choice import StudyChoice

Cell = dict[str, Any]
Row = dict[str, Any]
Result = dict[str, Any]
Tell = Callable[[float, str], None]
"""Called inside a cell with the share of it that is done, 0 to 1, and what is being done."""


@dataclass(frozen=True)
class Size:
    """What a size preset sets where the user does not: evaluation windows and their tokens, calibration sequences and
    their tokens. grid: what one study alone knows.
    """

    windows: int
    sequence_length: int
    samples: int
    sample_length: int
    grid: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What the rows say. findings: plain JSON. conclusion: a few lines for people."""

    findings: dict[str, Any]
    conclusion: list[str]


def _nothing(choice: StudyChoice, progress: Progress | None) -> None:
    """Most studies need nothing made before their cells."""


def _the_choice(choice: StudyChoice) -> Any:
    return choice


@dataclass(frozen=True)
class Study:
    """One study.

    cells(choice): the grid, in order; raises FewbitError for choices that cannot be. prepare(choice, progress): makes
    in `choice.work`, once, what all cells need; not called when no cell is left, and called again by a run that goes
    on. open(choice): what the cells of one process share (a loaded model), given to each. run_cell(cell, opened, tell):
    the rows of one cell; values are numbers, text, booleans or None, and a number that is not finite is left out.
    summarize(rows, choice) and draw(result), from `study.json` alone, make the page.
    """

    name: str
    title: str
    about: str
    sizes: Mapping[str, Size]
    cells: Callable[[StudyChoice], list[Cell]]
    run_cell: Callable[[Cell, Any, Tell], list[Row]]
    summarize: Callable[[list[Row], StudyChoice], Summary]
    draw: Callable[[Result], list[Section]]
    open: Callable[[StudyChoice], Any] = _the_choice
    prepare: Callable[[StudyChoice, Progress | None], None] = _nothing
