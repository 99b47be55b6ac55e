"""Run the cells of a study as Ray tasks. The folder of the study must be one that every node sees."""

import os
import time
from pathlib import Path
from typing import Any

import torch

from fewbit.errors import FewbitError, missing_extra
from fewbit.printable import first_line
from fewbit.studies.cells import Finish, cell_error, show_cell
from fewbit.studies.choice import StudyChoice
from fewbit.studies.study import Cell, Progress, Row


def run_on_ray(
    name: str,
    choice: StudyChoice,
    left: list[tuple[int, Cell]],
    finish: Finish,
    progress: Progress | None,
) -> None:
    """Run cells on the cluster of `RAY_ADDRESS`, or on one of this machine; `finish` is called here as each ends.

    A task takes as many threads as this process would, so that the figures are those of the local engine; with
    OMP_NUM_THREADS=1 every core runs a cell of its own.
    """
    try:
        import ray
    except ImportError as error:
        raise missing_extra("ray", "ray") from error
    own = not ray.is_initialized()
    if own:
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        threads = _threads(ray)
        gpus = 1 if choice.device.startswith("cuda") else 0
        task = ray.remote(num_cpus=threads, num_gpus=gpus)(_run_one)
        pending: dict[Any, tuple[int, Cell]] = {
            task.remote(name, choice, cell, threads, os.fspath(Path.cwd())): (index, cell) for index, cell in left
        }
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1)
            index, cell = pending.pop(ready[0])
            rows, seconds = _result(ray, ready[0], cell)
            finish(index, cell, rows, seconds)
            if progress:
                progress(len(left) - len(pending), len(left), show_cell(cell))
    finally:
        if own:
            ray.shutdown()


def _run_one(name: str, choice: StudyChoice, cell: Cell, threads: int, folder: str) -> tuple[list[Row], float]:
    from fewbit.studies.registry import find_study

    if Path(folder).is_dir():
        os.chdir(folder)
    torch.set_num_threads(threads)
    started = time.perf_counter()
    study = find_study(name)
    rows = study.run_cell(cell, study.open(choice), lambda share, what: None)
    return rows, time.perf_counter() - started


def _threads(ray: Any) -> int:
    """Threads of a task: those of this process, or of the largest node if that has fewer."""
    largest = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
    if not largest:
        raise FewbitError("--engine ray: the cluster has no CPU to run on")
    return min(torch.get_num_threads(), largest)


def _result(ray: Any, reference: Any, cell: Cell) -> tuple[list[Row], float]:
    try:
        rows, seconds = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, FewbitError):
            raise cell_error(cell, error.cause) from error
        raise
    except ray.exceptions.RayError as error:
        raise FewbitError(
            f"--engine ray: {show_cell(cell)}: {first_line(error)}: run the same command again, finished cells are kept"
        ) from error
    return rows, seconds
