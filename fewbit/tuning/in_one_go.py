"""`fewbit quantize --tune`: quantize into a folder beside the output, train it, and keep only the trained folder."""

import importlib.util
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fewbit.calibration.source import public_text
from fewbit.checkpoints.json_file import read_json, write_json
from fewbit.checkpoints.output import REPORT, RUN, made_by_fewbit, refuse_meanwhile, remove_made
from fewbit.checkpoints.stamps import differences
from fewbit.checkpoints.workdir import check_output, holds_work, tidy
from fewbit.errors import FewbitError, missing_extra
from fewbit.pipeline.run import RunOptions, job_of, quantize
from fewbit.recipe import Recipe
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.run import TuneOptions, check_enough, tune

_MARK = "fewbit_untuned"
_NOT_OURS = "fewbit needs this name for its work, but something else has it: move it elsewhere first"


def quantize_and_tune(
    model: str | Path, out: Path, recipe: Recipe, run: RunOptions, choice: TuningChoice, options: TuneOptions
) -> dict[str, Any]:
    """Quantize `model` by `recipe` and fine-tune the result into `out`; returns the report of the trained folder.

    If it is killed at any point, the same call resumes. Raises FewbitError as the two steps do.
    """
    between = out.absolute().with_name(f".{out.name}.fewbit-untuned")
    record = between.with_name(f"{between.name}.json")
    _refuse_foreign(between, record)
    tidy(between)
    job = job_of(model, recipe, run)
    done = None if run.overwrite else _published(out, record, job, choice, options)
    if done is not None:
        record.unlink()
    if not record.exists():
        # What is left of a first step whose result has been used.
        _remove(between)
    if done is not None:
        return done
    replaces = check_output(out, Path(model), run.overwrite)
    check_enough(options.calibration.samples, choice)
    if importlib.util.find_spec("accelerate") is None:
        raise missing_extra("accelerate", "hf")
    _begin(between, record, job, run.overwrite)
    if not (between / REPORT).is_file():
        try:
            quantize(model, between, recipe, run)
        except BaseException:
            if not holds_work(between):
                record.unlink()
            raise
    # Training may replace what stands there when it begins, which must be what stood there at first.
    refuse_meanwhile(out.absolute(), replaces)
    report = tune(between, out, choice, options, run.progress)
    # In this order: a record never speaks of a folder that is there in part.
    record.unlink()
    remove_made(between)
    return report


def _refuse_foreign(between: Path, record: Path) -> None:
    """FewbitError when what stands at the first step's place, or at that of its record, is not fewbit's."""
    if os.path.lexists(between) and not made_by_fewbit(between):
        raise FewbitError(f"{between}: {_NOT_OURS}")
    if os.path.lexists(record) and (record.is_symlink() or _job_in(record) is None):
        raise FewbitError(f"{record}: {_NOT_OURS}")


def _job_in(record: Path) -> dict[str, Any] | None:
    found = read_json(record) if record.is_file() else None
    return found[_MARK] if isinstance(found, dict) and _MARK in found else None


def _remove(between: Path) -> None:
    if between.exists():
        remove_made(between)


def _published(
    out: Path, record: Path, job: dict[str, Any], choice: TuningChoice, options: TuneOptions
) -> dict[str, Any] | None:
    """The report of what this very run had published before it was killed: newer than its record, same choices."""
    path = out / REPORT
    if _job_in(record) != job or not path.is_file() or path.stat().st_mtime_ns < record.stat().st_mtime_ns:
        return None
    tidy(out)
    report: dict[str, Any] = read_json(path)
    tuning = report.get("tuning", {})
    wanted = public_text(asdict(options.calibration))
    text = {key: tuning.get("calibration", {}).get(key) for key in wanted}
    same = tuning.get("choice") == asdict(choice) and text == wanted
    return {**report, "run": read_json(out / RUN)} if same else None


def _begin(between: Path, record: Path, job: dict[str, Any], overwrite: bool) -> None:
    """Note the job of the first step; what another job left is refused, or dropped with `overwrite`."""
    before = _job_in(record)
    if before == job:
        return
    if before is not None and not overwrite and (between.exists() or holds_work(between)):
        raise FewbitError(
            f"{between.name}: a run with other arguments was interrupted here ({differences(before, job)}): repeat "
            "those arguments to resume it, or pass --overwrite to start again"
        )
    record.parent.mkdir(parents=True, exist_ok=True)
    # In this order: a folder never stands beside a record that it was not made by.
    _remove(between)
    write_json(record, {_MARK: job})
