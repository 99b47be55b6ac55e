"""`fewbit quantize --for TARGET`: choose grids that the target holds, quantize, and write the target's format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fewbit.architecture.patterns import matches
from fewbit.checkpoints.json_file import drop, read_json, write_json
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.output import REPORT, made_by_fewbit, remove_made
from fewbit.checkpoints.source import open_checkpoint
from fewbit.checkpoints.workdir import check_output, tidy
from fewbit.errors import FewbitError, WorkKeptError
from fewbit.exports.export import check_is_folder, export
from fewbit.exports.lost import what_is_lost
from fewbit.exports.table import FORMATS, TARGETS, Target
from fewbit.grids.inputs import KEPT
from fewbit.pipeline.plan import make_plan
from fewbit.pipeline.run import RunOptions
from fewbit.presets import PRESETS
from fewbit.recipe import Recipe, brought_by, preset, sets_of

_MARK = "fewbit_for"


def choices_for(
    target: Target, model: str | Path, method: str, flat: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The choices of a recipe that the target holds, from the choices that were given, and notes for the user.

    Raises FewbitError if the target cannot run the model or does not hold what was chosen.
    """
    if target.format is None:
        return flat, []
    if flat.get("input_bits") not in (None, KEPT) and not FORMATS[target.format].with_inputs:
        others = [one.name for one in TARGETS.values() if one.format and FORMATS[one.format].with_inputs]
        raise FewbitError(f"--for {target.name}: has no rounded inputs: use --for {' or '.join(others)}")
    own = preset(method).grid.grid if method in PRESETS else None
    if own is not None and own.block_by_block:
        raise FewbitError(
            f"--for {target.name}: does not hold the {own.choice} grid of {method}: use another --method, such as "
            "adpq+, gptq or precal+oac"
        )
    chosen, notes = target.choices(open_checkpoint(locate(model)), flat)
    if flat.get("grid") is None:
        _check_brought(target, flat, brought_by(chosen.get("grid")))
    return chosen, notes


def _check_brought(target: Target, flat: dict[str, Any], brought: dict[str, Any]) -> None:
    """Raise FewbitError for a choice that the grids of the target, which the user did not name, have of their own."""
    if not brought:
        return
    for key, value in flat.items():
        if key in brought and key != "bits" and value is not None and value != brought[key]:
            raise FewbitError(
                f"--for {target.name}: {_HAVE_THEIR_OWN.get(key, _OTHERS)}: leave out --{key.replace('_', '-')}"
            )
        if key.startswith("outlier") and value not in (None, "none", 0):
            raise FewbitError(f"--for {target.name}: holds no outliers: leave out --{key.replace('_', '-')}")
    for pattern, pairs in sets_of(flat.get("sets") or ()):
        changes = dict(pairs)
        named = next((key for key in changes if key in (*brought, "bits") or key.startswith("outlier")), None)
        if named is not None and "grid" not in changes:
            raise FewbitError(
                f"--for {target.name}: --set {pattern}: {_HAVE_THEIR_OWN.get(named, _NONE)}: name "
                f"the type in place of {named}, as in  --set '{pattern}:grid={target.grids[0]}'"
            )


def embedding_type(target: Target, model: str | Path, flat: dict[str, Any]) -> str:
    """What embeddings and head are rounded to when the target's format is written."""
    return target.embeddings(open_checkpoint(locate(model)), flat)


def plan_problem(target: Target, model: str | Path, recipe: Recipe) -> str | None:
    """Why the target does not load the model quantized with that recipe, or None. Raises FewbitError as a run does."""
    if target.format is None:
        return None
    plan = make_plan(open_checkpoint(locate(model)), recipe)
    holds = FORMATS[target.format].keeps
    lost = next((item for item in plan.quantized if not holds(item.stored.scheme)), None)
    if lost is not None:
        name = lost.tensor.entry.name
        sets = [(pattern, dict(pairs)) for pattern, pairs in recipe.sets if matches(name, pattern)]
        return f"{name}: {target.format} does not hold {what_is_lost(holds, lost.stored.scheme, target, sets)}"
    return target.problem(plan)


_HAVE_THEIR_OWN = {
    "group_size": "its types have groups of their own",
    "scale_format": "its types have scales of their own",
    "bits": "its types have bits of their own",
}
_OTHERS, _NONE = "its types determine this", "its types have no outliers"


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
    assert target.format is not None, "fewbit's own format is written without an export"
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
