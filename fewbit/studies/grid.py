"""Run the cells of a study: those that are not finished, one after another here, or on Ray."""

import time

from fewbit.errors import FewbitError
from fewbit.studies.cells import Finish, cell_error, show_cell
from fewbit.studies.choice import StudyChoice
from fewbit.studies.folder import StudyFolder
from fewbit.studies.study import Cell, Progress, Row, Study

_STEPS = 1000


def run_grid(
    study: Study, choice: StudyChoice, cells: list[Cell], folder: StudyFolder, progress: Progress | None
) -> list[Row]:
    """The rows of all cells in the order of the grid; every cell is on disk as soon as it is finished.

    Raises FewbitError when a cell does, saying which.
    """
    found = [folder.rows(index, cell) for index, cell in enumerate(cells)]
    left = [(index, cell) for index, cell in enumerate(cells) if found[index] is None]
    if left:
        study.prepare(choice, progress)

        def finish(index: int, cell: Cell, rows: list[Row], seconds: float) -> None:
            folder.put(index, cell, rows, seconds)
            found[index] = folder.rows(index, cell)

        if choice.engine == "ray":
            from fewbit.studies.ray_engine import run_on_ray

            run_on_ray(study.name, choice, left, finish, progress)
        else:
            _run_here(study, choice, left, finish, progress)
    return [row for rows in found for row in rows or []]


def _run_here(
    study: Study, choice: StudyChoice, left: list[tuple[int, Cell]], finish: Finish, progress: Progress | None
) -> None:
    opened = study.open(choice)
    for done, (index, cell) in enumerate(left):

        def tell(share: float, what: str, done: int = done) -> None:
            if progress:
                progress(round(_STEPS * (done + share)), _STEPS * len(left), f"cell {done + 1} of {len(left)}: {what}")

        started = time.perf_counter()
        tell(0.0, show_cell(cell))
        try:
            rows = study.run_cell(cell, opened, tell)
        except FewbitError as error:
            raise cell_error(cell, error) from error
        finish(index, cell, rows, time.perf_counter() - started)
    if progress:
        progress(_STEPS * len(left), _STEPS * len(left), "done")
