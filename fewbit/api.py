"""The Python interface: the same functions and options as the command line, with the same names."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbit.advice import advice
from fewbit.api_models import Named, check_apart, decoded, with_codes, with_codes_here
from fewbit.calibration.choice import CalibrationChoice, choice_from
from fewbit.checkpoints.json_in import read_json_object
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import open_checkpoint
from fewbit.curvature.store import open_curvature
from fewbit.errors import ChangedError, FewbitError
from fewbit.option_values import checked
from fewbit.options import EVALUATE, PLAN, QUANTIZE, TUNE, described_by, given_of
from fewbit.pipeline.calibration_options import CalibrationOptions, parse_refresh, refuse_unused, share_of_stored
from fewbit.pipeline.run import RunOptions, job_of
from fewbit.pipeline.run import quantize as run_quantize
from fewbit.presets import PRESETS
from fewbit.progress import Progress
from fewbit.recipe import Recipe
from fewbit.recipe_choices import recipe_from_choices
from fewbit.sizes import parse_size
from fewbit.tuning.choice import TuningChoice, tuning_choice

if TYPE_CHECKING:
    from fewbit.exports.table import Target


DEFAULT_METHOD, DEFAULT_CALIBRATED = "adpq+", "precal+oac"
"""The methods of `--for` if none is given: without data, and with a calibration set."""


@described_by(QUANTIZE)
def quantize(
    model: str | Path,
    out: str | Path | None = None,
    method: str | Recipe = "adpq+",
    options: RunOptions | None = None,
    progress: Progress | None = None,
    **choices: Any,
) -> dict[str, Any]:
    """Quantize a model and write it in the native format, with or without a calibration set.

    model: a folder, a `.gguf` file, a named model or a hub name. out: the output folder (None with `report_only`).
    method: a name in `fewbit.PRESETS`, together with the options below, or a `fewbit.Recipe`, together with `options`.
    Returns the report that is also written to `fewbit_report.json`, with an additional `run` entry (seconds, peak
    memory). Raises FewbitError for bad input; `out` is then not created.
    """
    check_apart(out, model)
    model = decoded(model)
    if isinstance(method, Recipe) or options is not None:
        if choices:
            raise FewbitError("give either a Recipe and RunOptions, or a method name and single choices, not both")
        recipe = method if isinstance(method, Recipe) else recipe_from_choices(method, {})
        return run_quantize(model, out, recipe, options)
    request = quantize_request(model, method, choices, progress)
    return _carried_out(model, out, request, choices)


def _carried_out(
    model: str | Path,
    out: str | Path | None,
    request: "QuantizeRequest",
    choices: dict[str, Any],
    embeddings: str | None = None,
) -> dict[str, Any]:
    """Quantize, and write the format of the target if there is one. embeddings: None for what the target chooses."""
    if request.target is None or request.target.format is None or out is None or request.options.report_only:
        return {**_quantized(model, out, request, choices), **({"notes": request.notes} if request.notes else {})}
    from fewbit.exports.quantize_for import embedding_type, plan_problem, quantize_for

    problem = plan_problem(request.target, model, request.recipe)
    if problem:
        raise FewbitError(f"--for {request.target.name}: {problem}")
    job = {
        **job_of(model, request.recipe, request.options),
        "tuning": asdict(request.tuning) if request.tuning else None,
    }
    report = quantize_for(
        request.target,
        model,
        Path(out),
        job,
        lambda folder: _quantized(model, folder, request, choices),
        request.options,
        embeddings or embedding_type(request.target, model, choices),
    )
    return {**report, "notes": request.notes}


def _quantized(
    model: str | Path, out: str | Path | None, request: "QuantizeRequest", choices: dict[str, Any]
) -> dict[str, Any]:
    """Quantize, and fine-tune if that is requested, into a native folder; returns its report."""
    if request.tuning is None or out is None:
        return run_quantize(model, out, request.recipe, request.options)
    # Imported here because a data-free run starts in half the time without the imports of training.
    from fewbit.tuning.in_one_go import quantize_and_tune
    from fewbit.tuning.run import TuneOptions

    trained = TuneOptions(
        reference=locate(model),
        calibration=request.options.calibration.choice,
        device=choices.get("device"),
        overwrite=request.options.overwrite,
    )
    return quantize_and_tune(model, Path(out), request.recipe, request.options, request.tuning, trained)


@dataclass(frozen=True)
class QuantizeRequest:
    """What a call of :func:`quantize` requests. notes: what the target cannot hold as asked, for the user."""

    recipe: Recipe
    options: RunOptions
    tuning: TuningChoice | None
    target: "Target | None" = None
    notes: list[str] = field(default_factory=list)


def quantize_request(
    model: str | Path, method: str, choices: dict[str, Any], progress: Progress | None = None
) -> QuantizeRequest:
    """The recipe, options and training for flat choices. Raises FewbitError for choices that cannot be combined."""
    choices, model = checked("quantize", QUANTIZE, choices), decoded(model)
    flat = given_of(QUANTIZE, choices, "recipe")
    flat["sets"] = flat.pop("set", ())
    file = flat.pop("recipe", None)
    target: Target | None = None
    notes: list[str] = []
    if choices.get("target") is not None:
        method, target, flat, notes = _for_target(model, method, choices, flat, file)
    recipe = recipe_from_choices(method, flat) if file is None else _recipe_in(Path(file), flat)
    text, others = _text(QUANTIZE, choices), given_of(QUANTIZE, choices, "curvature")
    run, tune = given_of(QUANTIZE, choices, "run"), given_of(QUANTIZE, choices, "tune")
    refuse_unused(recipe, text, others, bool(tune.get("tune")))
    report_only = bool(run.get("report_only"))
    tuning = tuning_choice(bool(tune.get("tune")), tune.get("tune_epochs"), text.get("seed"), report_only)
    stored = others.get("curvature")
    calibration = CalibrationOptions(
        choice=choice_from(text),
        stored=open_curvature(Path(stored), open_checkpoint(locate(model))) if stored else None,
        refresh=parse_refresh(str(others.get("refresh", "once"))),
        original_inputs=bool(others.get("original_inputs")),
        memory_bytes=parse_size(others["memory"]) if "memory" in others else 0,
        max_fallback=others.get("max_fallback", 0),
    )
    if calibration.stored is not None and "gram_share" not in flat:
        recipe = share_of_stored(recipe, calibration.stored)
    options = RunOptions(
        shard_size=parse_size(run.get("shard_size", "5GB")),
        overwrite=bool(run.get("overwrite")),
        report_only=report_only,
        workers=run.get("workers", 0),
        device=run.get("device", "cpu"),
        progress=progress,
        calibration=calibration,
    )
    return QuantizeRequest(recipe, options, tuning, target, notes)


def _for_target(
    model: str | Path, method: str, choices: dict[str, Any], flat: dict[str, Any], file: Any
) -> "tuple[str, Target, dict[str, Any], list[str]]":
    """The method, the target, and the choices of a recipe whose grids it holds."""
    from fewbit.exports.quantize_for import choices_for
    from fewbit.exports.table import target_named

    target = target_named(choices["target"])
    if file is not None and target.format is not None:
        raise FewbitError(f"--for {target.name}: chooses grids itself: leave out --recipe")
    if choices.get("shard_size") is not None and target.format is not None:
        raise FewbitError(f"--for {target.name}: chooses the files itself: leave out --shard-size")
    if method == DEFAULT_METHOD and (choices.get("calibration") or choices.get("curvature")):
        method = DEFAULT_CALIBRATED
    flat = {**_of_inputs(method, flat), **{key: value for key, value in flat.items() if value is not None}}
    flat, notes = choices_for(target, model, method, flat)
    return method, target, flat, notes


def _of_inputs(method: str, flat: dict[str, Any]) -> dict[str, Any]:
    """What a preset that rounds inputs says of them and of its grid, which a target would otherwise choose."""
    row = PRESETS.get(method, {})
    if "input_bits" not in row or flat.get("symmetric") is not None:
        return {key: row[key] for key in ("input_bits",) if key in row}
    return {key: row[key] for key in ("input_bits", "grid")}


def _recipe_in(path: Path, flat: dict[str, Any]) -> Recipe:
    """The recipe of a JSON file: the object itself, or what it holds under ``recipe``."""
    given = [name for name, value in flat.items() if value not in ((), None)]
    if given:
        raise FewbitError(f"--recipe {path}: holds all choices: leave out --{given[0].replace('_', '-')}")
    data = read_json_object(path)
    found = data.get("quantization_config", data)
    found = found.get("recipe", found) if isinstance(found, dict) else found
    if not isinstance(found, dict):
        raise FewbitError(f"{path}: holds no recipe")
    try:
        return Recipe.from_dict(found)
    except (TypeError, ValueError) as error:
        raise FewbitError(f"{path}: is no recipe ({error})") from error


@described_by(PLAN)
def plan(model: str | Path, method: str = "adpq+", **choices: Any) -> dict[str, Any]:
    """What :func:`quantize` would do with these choices, and about what it would take; nothing is written.

    Returns ``tensors`` (by action), ``output`` (weights, bits per weight, bytes), ``needs`` (seconds, memory_bytes,
    disk_bytes), ``problems`` and ``exports``. Raises FewbitError for a model that cannot be read.
    """
    from fewbit.exports.table import export_problems
    from fewbit.pipeline.forecast import forecast

    choices = checked("plan", PLAN, choices)
    request, named, model = quantize_request(model, method, choices), model, decoded(model)
    result = {**forecast(model, request.recipe, request.options.calibration), "model": str(named)}
    if request.target is not None:
        result["advice"] = advice(str(named), request.recipe, request.target.name)
    result["problems"] += request.notes
    if request.target is not None and request.target.format is not None and not result["problems"]:
        from fewbit.exports.quantize_for import plan_problem

        problem = plan_problem(request.target, model, request.recipe)
        result["problems"] += [f"--for {request.target.name}: {problem}"] if problem else []
    result["exports"].update(export_problems(request.recipe, result["tensors"]["quantize"]))
    return result


@described_by(TUNE)
def tune(
    folder: str | Path,
    out: str | Path,
    choice: TuningChoice | None = None,
    options: Any = None,
    progress: Progress | None = None,
    **choices: Any,
) -> dict[str, Any]:
    """Fine-tune a quantized folder under its own rounding and write the result in the same format and bit-width.

    choice, options: a `fewbit.TuningChoice` and `fewbit.TuneOptions`, instead of the options below.
    Returns the new report, whose `tuning` entry has the losses. A run that was killed is resumed. Raises FewbitError
    for bad input, or if the loss becomes NaN or infinite. All processes of a launch call this with the same arguments.
    """
    from fewbit.tuning.run import TuneOptions
    from fewbit.tuning.run import tune as run

    check_apart(out, folder)
    folder = with_codes_here(folder)
    if choice is not None or options is not None:
        if choices:
            raise FewbitError("give either a TuningChoice and TuneOptions, or single choices, not both")
        return run(folder, out, choice, options, progress)
    choices = checked("tune", TUNE, choices)
    text, chosen = _text(TUNE, choices), given_of(TUNE, choices, "choice")
    if text.get("seed") is not None:
        chosen["seed"] = text["seed"]
    trained = TuneOptions(calibration=choice_from(text), **given_of(TUNE, choices, "run"))
    return run(folder, out, TuningChoice(**chosen), trained, progress)


@described_by([option for option in EVALUATE if option.name not in ("data", "reference", "device", "tasks")])
def evaluate(
    models: str | Path | Sequence[str | Path],
    data: str | Path | None = None,
    protocol: Any = None,
    reference: str | Path | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    tasks: Any = None,
    rounded: Any = None,
    **choices: Any,
) -> dict[str, Any]:
    """Evaluate models on a text, on tasks, or on both.

    models: one or several originals, quantized folders, or models that another tool quantized. data: a text. reference:
    the original, with which each model is compared on the text. tasks: comma-separated names, or a `fewbit.TaskChoice`.
    protocol, rounded: a `fewbit.Protocol` and a `fewbit.RoundedChoice`, instead of the options below.
    Returns ``{"models": [...], "protocol": {...}, "versions": {...}}`` with the stable keys of `docs/guide.md`.
    Raises FewbitError for bad input.
    """
    from fewbit.evaluation.evaluate import evaluate as run
    from fewbit.evaluation.perplexity import Protocol
    from fewbit.evaluation.rounded import choose_rounded
    from fewbit.evaluation.tasks import choose_tasks

    choices = checked("evaluate", EVALUATE, choices)
    windows = given_of(EVALUATE, choices, "protocol")
    if windows:
        if protocol is not None:
            raise FewbitError("give either a Protocol or single choices, not both")
        protocol = Protocol(**{"sequence_length" if k == "seq_len" else k: v for k, v in windows.items()})
    given = given_of(EVALUATE, choices, "tasks")
    if tasks is None or isinstance(tasks, str):
        place = given.get("task_data")
        tasks = choose_tasks(tasks, None if place is None else Path(place), given.get("task_limit", 0))
    if rounded is None:
        rounded = choose_rounded(choices.get("w8a8"), _text(EVALUATE, choices))
    named = Named.of([models] if isinstance(models, str | Path) else models, reference)
    return named.restore(run(named.places, data, protocol, named.reference, device, progress, tasks, rounded))


def export(
    folder: str | Path,
    dest: str | Path,
    format: str = "gguf",
    embeddings: str = "keep",
    overwrite: bool = False,
    progress: Progress | None = None,
    allow_requantize: bool = False,
) -> dict[str, Any]:
    """Write a quantized folder, or a 16-bit model, in a foreign format into the new folder `dest`.

    Weights are converted without loss, or the export is refused. embeddings: the type to which embeddings and head are
    rounded; keep (default) writes them as they are. allow_requantize: what cannot be converted is quantized again, as
    :func:`fewbit.requantize.requantize` does. Returns the report: ``file``, ``bytes``, ``tensors`` (by type),
    ``rounded`` (relative squared errors) and, if it was necessary, ``requantized``. Raises FewbitError for bad input;
    `dest` is then not created.
    """
    from fewbit.exports.export import export as run
    from fewbit.exports.table import format_named

    check_apart(dest, folder)
    kind, folder = format_named(format), with_codes(folder)
    checkpoint = open_checkpoint(locate(folder))
    if not (allow_requantize and checkpoint.is_native):
        return run(folder, dest, format, embeddings, overwrite, progress)
    if embeddings not in kind.embeddings:
        raise FewbitError(f"--embeddings for --format {format} must be one of {', '.join(kind.embeddings)}")
    if not kind.problem(checkpoint, embeddings):
        with contextlib.suppress(ChangedError):
            return run(folder, dest, format, embeddings, overwrite, progress)
    from fewbit.requantize import requantize

    return requantize(checkpoint, Path(dest), format, overwrite, partial(_quantized_again, embeddings, progress))


def _quantized_again(
    embeddings: str, progress: Progress | None, model: Path, out: Path, method: str, **choices: Any
) -> dict[str, Any]:
    """As :func:`quantize`, with the type of embeddings and head that was given for an export."""
    request = quantize_request(model, method, choices, progress)
    return _carried_out(model, out, request, choices, None if embeddings == "keep" else embeddings)


def import_model(
    source: str | Path,
    out: str | Path,
    config: str | Path | None = None,
    overwrite: bool = False,
    shard_size: str | int = "5GB",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a checkpoint that another tool quantized as a folder of fewbit's own format, without loss.

    source: a .gguf file, or a folder or hub name in the formats of GPTQ, AWQ or compressed-tensors. config: for a .gguf
    file, a folder with the config and the tokenizer of the model; None for those in the file. Returns the report.
    Raises FewbitError for what is not quantized, is damaged, or cannot be represented; `out` is then not created.
    """
    from fewbit.imports.import_model import import_model as run

    size = parse_size(shard_size) if isinstance(shard_size, str) else shard_size
    return run(source, out, config, overwrite, size, progress)


def unpack(folder: str | Path, out: str | Path, overwrite: bool = False, shard_size: str | int = "5GB") -> Path:
    """Convert a quantized folder to an ordinary 16-bit one that any tool loads, with one tensor in memory at a time.

    Returns `out`. Raises FewbitError if `folder` is not a complete native folder or `out` cannot be written.
    """
    from fewbit.runtime.unpack import unpack as run

    check_apart(out, folder)
    folder = with_codes_here(folder)
    return run(folder, out, overwrite, parse_size(shard_size) if isinstance(shard_size, str) else shard_size)


def _text(options: Any, choices: dict[str, Any]) -> dict[str, Any]:
    """The options of the calibration set, as fields of a CalibrationChoice."""
    given = given_of(options, choices, "text")
    calibration = given.pop("calibration", None)
    if isinstance(calibration, CalibrationChoice):
        raise FewbitError(
            "calibration must be a string such as my.jsonl or c4:64,self:64; pass a CalibrationChoice in options "
            "instead"
        )
    return {"sources": str(calibration), **given} if calibration is not None else given
