"""A study from end to end: check, run the grid, say what it says, write the JSON, draw the page."""

import time
from pathlib import Path
from typing import Any

from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import open_checkpoint
from fewbit.checkpoints.workdir import read_json
from fewbit.device import check_device
from fewbit.errors import FewbitError
from fewbit.evaluation.evaluate import LOSS, describe_protocol
from fewbit.evaluation.text import read_text
from fewbit.evaluation.windows import read_windows
from fewbit.memory import peak_rss_bytes
from fewbit.presets import fingerprint
from fewbit.report.html import check_page
from fewbit.studies.choice import StudyChoice
from fewbit.studies.folder import PAGE, RESULT, StudyFolder
from fewbit.studies.grid import run_grid
from fewbit.studies.page import write_study_page
from fewbit.studies.study import Progress, Result, Study
from fewbit.version import __version__
from fewbit.versions import versions


def run_study(study: Study, choice: StudyChoice, progress: Progress | None = None, overwrite: bool = False) -> Result:
    """Run a study, or go on with one that was stopped; returns what `study.json` holds.

    That is ``rows`` (tidy: flat dicts), ``findings``, ``conclusion`` (lines), ``choice``, ``protocol``, ``versions``
    and ``run`` (what changes from run to run: seconds, memory, engine). Raises FewbitError for bad input.
    """
    started = time.perf_counter()
    check_device(choice.device)
    if choice.out.is_file():
        raise FewbitError(f"{choice.out}: is a file: name a folder for the study")
    model = locate(choice.model)
    checkpoint = open_checkpoint(model)
    if checkpoint.quantization is not None:
        raise FewbitError(f"{choice.model}: already quantized: give the 16-bit original")
    cells = study.cells(choice)
    protocol = _protocol(choice, model)
    job = {**choice.describe(), "files": _files([model, *map(locate, choice.folders)])}
    job.update(presets=fingerprint(), data_sha256=protocol["evaluation"]["data_sha256"], fewbit=__version__)
    folder = StudyFolder(choice.out, job, overwrite)
    try:
        check_page(choice.out / PAGE)
        rows = run_grid(study, choice, cells, folder, progress)
        summary = study.summarize(rows, choice)
        result = {
            "rows": rows,
            "findings": summary.findings,
            "conclusion": summary.conclusion,
            "choice": choice.describe(),
            "protocol": protocol,
            "versions": versions(),
            "run": {
                "seconds": time.perf_counter() - started,
                "peak_rss_bytes": peak_rss_bytes(),
                "engine": choice.engine,
                "cells": len(cells),
            },
        }
        folder.finish(result)
        write_study_page(study, read_json(choice.out / RESULT), choice.out / PAGE)
    finally:
        folder.release()
    return result


def _protocol(choice: StudyChoice, model: Path) -> dict[str, Any]:
    text = read_text(choice.data)
    windows, bos = read_windows(model, text, choice.protocol)
    described = choice.describe()
    return {
        "evaluation": {**describe_protocol(choice.protocol, windows, bos, text), "loss": LOSS},
        "calibration": described["calibration"],
        "seed": choice.seed,
        "size": choice.size,
    }


def _files(folders: list[Path]) -> list[list[Any]]:
    """What says that models are the same as before: names, sizes and times of their weights."""
    found = []
    for folder in folders:
        for path in sorted({entry.file for entry in open_checkpoint(folder).entries.values()}):
            found.append([folder.name, path.name, path.stat().st_size, path.stat().st_mtime_ns])
    return found
