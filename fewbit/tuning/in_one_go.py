"""`fewbit quantize --tune`: quantize into a folder beside the output, train from there, leave the trained one."""

import shutil
from pathlib import Path
from typing import Any

from fewbit.checkpoints.workdir import WorkFolder, check_output, differences, read_json, write_json
from fewbit.errors import FewbitError
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
    check_output(out, Path(model), run.overwrite)
    check_enough(options.calibration.samples, choice)
    between = out.absolute().with_name(f".{out.name}.fewbit-untuned")
    record = between.with_name(f"{between.name}.json")
    _begin(between, record, job_of(model, recipe, run), run.overwrite)
    if not (between / "fewbit_report.json").is_file():
        try:
            quantize(model, between, recipe, run)
        except FewbitError:
            if not WorkFolder.place(between).exists():
                record.unlink()
            raise
    report = tune(between, out, choice, options, run.progress)
    shutil.rmtree(between)
    record.unlink()
    return report


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
