"""`fewbit quantize --tune`: quantize into a folder beside the output, train from there, leave the trained one."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fewbit.checkpoints.workdir import WorkFolder, check_output, differences, read_json, tidy, write_json
from fewbit.errors import FewbitError
from fewbit.formats.original import REPORT, RUN
from fewbit.pipeline.run import RunOptions, job_of, quantize
from fewbit.recipe import Recipe
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.run import TuneOptions, check_enough, tune


def quantize_and_tune(
    model: str | Path, out: Path, recipe: Recipe, run: RunOptions, choice: TuningChoice, options: TuneOptions
) -> dict[str, Any]:
    """Quantize `model` by `recipe` and fine-tune the result into `out`; returns the report of the trained folder.

    Killed at any point, the same call goes on. Raises FewbitError as the two steps do.
    """
    between = out.absolute().with_name(f".{out.name}.fewbit-untuned")
    record = between.with_name(f"{between.name}.json")
    job = job_of(model, recipe, run)
    done = None if run.overwrite else _published(out, record, job, choice, options)
    if done is not None:
        record.unlink()
    if not record.exists():
        # What is left of a first step whose result has been used.
        shutil.rmtree(between, ignore_errors=True)
    if done is not None:
        return done
    check_output(out, Path(model), run.overwrite)
    check_enough(options.calibration.samples, choice)
    _begin(between, record, job, run.overwrite)
    if not (between / "fewbit_report.json").is_file():
        try:
            quantize(model, between, recipe, run)
        except FewbitError:
            if not WorkFolder.place(between).exists():
                record.unlink()
            raise
    report = tune(between, out, choice, options, run.progress)
    # In this order: a record never speaks of a folder that is there in part.
    record.unlink()
    shutil.rmtree(between)
    return report


def _published(
    out: Path, record: Path, job: dict[str, Any], choice: TuningChoice, options: TuneOptions
) -> dict[str, Any] | None:
    """The report of what this very run had published before it was killed: newer than its record, same choices."""
    path = out / REPORT
    if read_json(record) != job or not path.is_file() or path.stat().st_mtime_ns < record.stat().st_mtime_ns:
        return None
    tidy(out)
    report: dict[str, Any] = read_json(path)
    tuning = report.get("tuning", {})
    text = {key: tuning.get("calibration", {}).get(key) for key in asdict(options.calibration)}
    same = tuning.get("choice") == asdict(choice) and text == asdict(options.calibration)
    return {**report, "run": read_json(out / RUN)} if same else None


def _begin(between: Path, record: Path, job: dict[str, Any], overwrite: bool) -> None:
    """Note the job of the first step; what another job left is refused, or dropped with `overwrite`."""
    before = read_json(record)
    if before == job:
        return
    if before is not None and not overwrite:
        raise FewbitError(
            f"{between.name}: a run with other arguments was interrupted here ({differences(before, job)}): repeat "
            "those arguments to go on, or pass --overwrite to begin again"
        )
    record.parent.mkdir(parents=True, exist_ok=True)
    # In this order: a folder never stands beside a record that it was not made by.
    shutil.rmtree(between, ignore_errors=True)
    write_json(record, job)
