"""A study from end to end: check, run the grid, say what it says, write the JSON, draw the page."""

import hashlib
import time
from pathlib import Path
from typing import Any

from fewbit.calibration.source import parse_sources
from fewbit.checkpoints.json_file import read_json
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.output import check_place
from fewbit.checkpoints.source import open_checkpoint, refuse_quantized
from fewbit.checkpoints.stamps import file_stamps
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
        raise FewbitError(f"{choice.out}: is a file: give a folder for the study")
    model = locate(choice.model)
    checkpoint = open_checkpoint(model)
    refuse_quantized(checkpoint)
    check_place(choice.out, model)
    check_page(choice.out / PAGE)
    cells = study.cells(choice)
    protocol = _protocol(choice, model)
    job = {**choice.describe(), **_files([model, *map(locate, choice.folders)]), **_texts(choice)}
    job.update(presets=fingerprint(), data_sha256=protocol["evaluation"]["data_sha256"], fewbit=__version__)
    folder = StudyFolder(choice.out, job, overwrite)
    try:
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
    except BaseException:
        folder.leave()
        raise
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


def _files(folders: list[Path]) -> dict[str, Any]:
    """What says that models are the same as before."""
    weights = [{entry.file for entry in open_checkpoint(folder).entries.values()} for folder in folders]
    found: dict[str, Any] = {"files": file_stamps(weights[0])}
    for index, (folder, files) in enumerate(zip(folders[1:], weights[1:], strict=True)):
        found[f"{index + 1}, {folder.name}"] = {"files": file_stamps(files)}
    return found


def _texts(choice: StudyChoice) -> dict[str, Any]:
    """The SHA-256 of every local text that calibration sets are drawn from: a name says nothing of what it holds."""
    named = [choice.calibration.sources, *(one.get("sources", "") for one in choice.options.get("sets", ()))]
    paths = {Path(source.name) for text in named if text for source in parse_sources(text) if source.kind == "file"}
    data = choice.options.get("task_data")
    if data:
        paths.add(Path(data))
    return {"texts": {str(path): _sha256(path) for path in sorted(paths)}}


def _sha256(path: Path) -> str:
    """Of a file, or of all files below a folder in order."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                while block := opened.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
