"""`fewbit quantize --tune`: quantize into a folder beside the output, train from there, leave the trained one."""

import json
import shutil
from pathlib import Path
from typing import Any

from fewbit.checkpoints.workdir import check_output
from fewbit.errors import FewbitError
from fewbit.pipeline.run import RunOptions, quantize
from fewbit.recipe import Recipe
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.run import TuneOptions, tune


def quantize_and_tune(
    model: str | Path, out: Path, recipe: Recipe, run: RunOptions, choice: TuningChoice, options: TuneOptions
) -> dict[str, Any]:
    """Quantize `model` by `recipe` and fine-tune the result into `out`; returns the report of the trained folder.

    Killed at any point, the same call goes on. Raises FewbitError as the two steps do.
    """
    check_output(out, Path(model), run.overwrite)
    between = out.absolute().with_name(f".{out.name}.fewbit-untuned")
    if not _is_done(between, recipe):
        if between.exists() and not run.overwrite:
            raise FewbitError(
                f"{out}: a run with another method was interrupted here: repeat its arguments to go on, or pass "
                "--overwrite to begin again"
            )
        quantize(model, between, recipe, run)
    report = tune(between, out, choice, options, run.progress)
    shutil.rmtree(between)
    return report


def _is_done(folder: Path, recipe: Recipe) -> bool:
    """Whether the first step was finished, with this recipe."""
    report = folder / "fewbit_report.json"
    if not report.is_file():
        return False
    return bool(json.loads(report.read_text(encoding="utf-8"))["recipe"] == json.loads(json.dumps(recipe.to_dict())))
