"""`fewbit quantize --for TARGET`: choose grids that the target holds, quantize, and write the target's format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fewbit.checkpoints.json_file import drop, read_json, write_json
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.output import REPORT, made_by_fewbit, remove_made
from fewbit.checkpoints.source import open_checkpoint
from fewbit.checkpoints.workdir import check_output, tidy
from fewbit.errors import FewbitError, WorkKeptError
from fewbit.exports.export import check_is_folder, export
from fewbit.exports.table import FORMATS, TARGETS, Target
from fewbit.grids.inputs import KEPT
from fewbit.pipeline.plan import make_plan
from fewbit.pipeline.run import RunOptions
from fewbit.recipe import Recipe

_MARK = "fewbit_for"


def choices_for(target: Target, model: str | Path, flat: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The choices of a recipe that the target holds, from the choices that were given, and notes for the user.

    Raises FewbitError if the target cannot run the model or does not hold what was chosen.
    """
    if flat.get("input_bits") not in (None, KEPT) and not FORMATS[target.format].with_inputs:
        others = [one.name for one in TARGETS.values() if FORMATS[one.format].with_inputs]
        raise FewbitError(f"--for {target.name}: has no rounded inputs: use --for {' or '.join(others)}")
    return target.choices(open_checkpoint(locate(model)), flat)


def embedding_type(target: Target, model: str | Path, flat: dict[str, Any]) -> str:
    """What embeddings and head are rounded to when the target's format is written."""
    return target.embeddings(open_checkpoint(locate(model)), flat)


def plan_problem(target: Target, model: str | Path, recipe: Recipe) -> str | None:
    """Why the target does not load the model quantized with that recipe, or None. Raises FewbitError as a run does."""
    plan = make_plan(open_checkpoint(locate(model)), recipe)
    keeps = FORMATS[target.format].keeps
    lost = next((item.tensor.entry.name for item in plan.quantized if not keeps(item.stored.scheme)), None)
    if lost is not None:
        return f"{lost}: {target.format} does not hold the grid, scales, outliers or transform chosen for it"
    return target.problem(plan)


def quantize_for(
    target: Target,
    model: str | Path,
    out: Path,
    job: dict[str, Any],
    make: Callable[[Path], dict[str, Any]],
    run: RunOptions,
    embeddings: str,
) -> dict[str, Any]:
    """Make a native folder beside the output, and export it to `out`; returns the report of the run.

    job: what determines the native folder. make(folder): makes it, and returns its report. embeddings: what embeddings
    and head are rounded to, from :func:`embedding_type`. If it is killed, the same call resumes. Raises FewbitError as
    the two steps do; nothing is left then, except for a WorkKeptError.
    """
    between = out.absolute().with_name(f".{out.name}.fewbit-native")
    record = between.with_name(f"{between.name}.json")
    source = locate(model)
    check_is_folder(out, target.format)
    check_output(out, source, run.overwrite)
    job = {_MARK: job}
    tidy(between)
    if between.exists():
        if not made_by_fewbit(between):
            raise FewbitError(f"{between}: fewbit needs this name for its work: move it elsewhere first")
        if read_json(record) != job:
            remove_made(between)
    report = read_json(between / REPORT) if between.exists() else None
    if report is None:
        report = make(between)
        # After the folder: a record without one is of no use, a folder without one is made again.
        write_json(record, job)
    try:
        written = export(between, out, target.format, embeddings, run.overwrite, run.progress)
    except WorkKeptError:
        raise
    except FewbitError as error:
        # The same command would end here again.
        drop(record)
        remove_made(between)
        raise type(error)(str(error).replace(str(between), str(model))) from error
    drop(record)
    remove_made(between)
    facts = report.get("run") or {}
    return {**report, "run": {"seconds": 0.0, "peak_rss_bytes": 0, **facts}, "export": {"for": target.name, **written}}
