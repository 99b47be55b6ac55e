"""`fewbit quantize --for TARGET`: choose grids that the target holds, quantize, and write the target's format."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fewbit.checkpoints.json_file import drop, read_json, write_json
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.output import REPORT, made_by_fewbit, remove_made
from fewbit.checkpoints.source import open_checkpoint
from fewbit.checkpoints.workdir import check_output, tidy
from fewbit.errors import FewbitError
from fewbit.exports.export import export
from fewbit.exports.table import FORMATS, Target
from fewbit.pipeline.plan import cover_original, make_plan
from fewbit.pipeline.run import RunOptions
from fewbit.recipe import Recipe

_DIGITS = re.compile(r"(?<=\.)\d+(?=\.)")
_MARK = "fewbit_for"


def choices_for(target: Target, model: str | Path, flat: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The choices of a recipe whose grids the target holds, from the choices that were given, and notes for the user.

    A grid that was given is used if the target holds it; otherwise the bits determine one for each tensor. Raises
    FewbitError if the target cannot run the model or does not hold the grid.
    """
    checkpoint = open_checkpoint(locate(model))
    problem = target.refuses(checkpoint)
    if problem:
        raise FewbitError(problem)
    # Embeddings are rounded when the file is written, to a type of the target.
    flat = {**flat, "embedding_bits": flat.get("embedding_bits") or 16}
    given = flat.get("grid")
    if target.choices is not None:
        return target.choices(checkpoint, flat), target.notes(checkpoint, flat)
    if given is not None:
        if given not in target.grids:
            raise FewbitError(f"--for {target.name}: holds the grids {', '.join(target.grids)}, not {given}")
        return flat, []
    bits = float(flat.get("bits") or 4)
    if bits < 2:
        raise FewbitError(f"--for {target.name}: has no type of {bits:g} bits: use --bits 2 or more")
    coverage = cover_original(checkpoint, flat.get("include") or (), flat.get("exclude") or ())
    fits = {tensor.entry.name: target.fit(tensor, bits) for tensor in coverage.of("quantize")}
    used = Counter(fit.grid for fit in fits.values() if fit.grid is not None)
    if not used:
        raise FewbitError(f"{checkpoint.folder}: {next(iter(fits.values())).note}")
    most = used.most_common(1)[0][0]
    others = {name: fit.grid for name, fit in fits.items() if fit.grid not in (most, None)}
    kept = [name for name, fit in fits.items() if fit.grid is None]
    rest = {key: value for key, value in flat.items() if key != "bits"}
    sets = [f"{pattern}:grid={grid}" for pattern, grid in _patterns(others, fits).items()]
    rest["grid"], rest["sets"] = most, (*sets, *_as_list(flat.get("sets")))
    if kept:
        rest["exclude"] = (*(flat.get("exclude") or ()), *kept)
    notes = Counter(fit.note for fit in fits.values() if fit.note)
    return rest, [f"{count} of {len(fits)} layers: {note}" for note, count in notes.items()]


def plan_problem(target: Target, model: str | Path, recipe: Recipe) -> str | None:
    """Why the target does not load the model quantized with that recipe, or None. Raises FewbitError as a run does."""
    plan = make_plan(open_checkpoint(locate(model)), recipe)
    holds = FORMATS[target.format].holds
    lost = next((item.tensor.entry.name for item in plan.quantized if not holds(item.stored.scheme)), None)
    if lost is not None:
        return f"{lost}: {target.format} does not hold the grid, scales, outliers or transform chosen for it"
    return target.problem(plan)


def _patterns(others: dict[str, Any], fits: dict[str, Any]) -> dict[str, Any]:
    """Patterns of names for tensors that have another grid than most: one for all blocks where they agree."""
    found: dict[str, Any] = {}
    for name, grid in others.items():
        pattern = _DIGITS.sub("*", name)
        alike = [fit.grid for other, fit in fits.items() if _DIGITS.sub("*", other) == pattern]
        found[pattern if set(alike) == {grid} else name] = grid
    return found


def _as_list(sets: Any) -> Sequence[Any]:
    if not sets:
        return ()
    return (sets,) if isinstance(sets, str) else tuple(sets.items()) if isinstance(sets, dict) else tuple(sets)


def quantize_for(
    target: Target,
    model: str | Path,
    out: Path,
    job: dict[str, Any],
    make: Callable[[Path], dict[str, Any]],
    run: RunOptions,
) -> dict[str, Any]:
    """Make a native folder beside the output, and export it to `out`; returns the report of the run.

    job: what determines the native folder. make(folder): makes it, and returns its report. If it is killed, the same
    call resumes. Raises FewbitError as the two steps do.
    """
    between = out.absolute().with_name(f".{out.name}.fewbit-native")
    record = between.with_name(f"{between.name}.json")
    source = locate(model)
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
    embeddings = target.embeddings(open_checkpoint(source))
    written = export(between, out, target.format, embeddings, run.overwrite, run.progress)
    drop(record)
    remove_made(between)
    facts = report.get("run") or {}
    return {**report, "run": {"seconds": 0.0, "peak_rss_bytes": 0, **facts}, "export": {"for": target.name, **written}}
