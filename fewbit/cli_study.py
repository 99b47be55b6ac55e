"""The studies: each is a command, and most options are shared."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.cli_shared import JsonFlag, ModelArgument, announce, print_json, read_foreign, resumable, with_options
from fewbit.options import given_of
from fewbit.options_more import CALIBRATION_SETS, LANDSCAPE, OBJECTIVES, OUTLIERS, STUDIES
from fewbit.printable import printable
from fewbit.progress import progress_line

study_app = typer.Typer(
    no_args_is_help=True,
    help="Study the effects of quantization on a model. Each study writes study.json and an HTML page with plots.\n\n"
    "If a study is interrupted or killed, the same command resumes it.",
)

OutArgument = Annotated[Path, typer.Argument(help="The folder of the study's results.")]
DataOption = Annotated[
    str,
    typer.Option(
        help="Evaluation text: a .txt, .jsonl, .json, .csv or .parquet file (FILE:COLUMN; also .gz), a folder of them, "
        "a hub data set (wikitext2, c4, NAME[:COLUMN]), or topics."
    ),
]


@study_app.command()
@with_options(OBJECTIVES)
def objectives(
    model: ModelArgument, out: OutArgument, data: DataOption, as_json: JsonFlag = False, **choices: Any
) -> None:
    """Does a lower layer-wise error mean a lower loss? Methods x bit-widths, with rank correlations.

    Examples:

      fewbit study objectives smollm2-135m smol-objectives --data wiki.test.raw.txt --calibration c4.jsonl

      fewbit study objectives ./llama out --data wikitext2 --size quick --methods rtn,gptq --bits 4,3 --folder ./tuned
    """
    _run("objectives", model, out, data, choices, as_json)


@study_app.command()
@with_options(LANDSCAPE)
def landscape(
    model: ModelArgument, out: OutArgument, data: DataOption, as_json: JsonFlag = False, **choices: Any
) -> None:
    """Plot the loss around a model's weights: random directions, lines to quantized weights, a plane through two.

    Examples:

      fewbit study landscape smollm2-135m smol-landscape --data wiki.test.raw.txt --calibration c4.jsonl

      fewbit study landscape ./llama out --data wikitext2 --size quick --folder ./gptq-3bit --folder ./tuned-3bit
    """
    _run("landscape", model, out, data, choices, as_json)


@study_app.command()
@with_options(OUTLIERS)
def outliers(
    model: ModelArgument, out: OutArgument, data: DataOption, as_json: JsonFlag = False, **choices: Any
) -> None:
    """Where and for which text are activations large? What does rounding them to 8 bits cost, and which remedy helps?

    Examples:

      fewbit study outliers smollm2-135m smol-outliers --data wiki.test.raw.txt --calibration c4.jsonl

      fewbit study outliers ./llama out --data wikitext2 --set content/code=code.jsonl --set language/hindi=hin.txt
    """
    _run("outliers", model, out, data, choices, as_json)


@study_app.command("calibration-sets")
@with_options(CALIBRATION_SETS)
def calibration_sets(
    model: ModelArgument, out: OutArgument, data: DataOption, as_json: JsonFlag = False, **choices: Any
) -> None:
    """Does the choice of calibration set matter? Sets x seeds x methods, with equivalence tests and a verdict.

    Examples:

      fewbit study calibration-sets smollm2-135m smol-sets --data wiki.test.raw.txt --calibration c4.jsonl

      fewbit study calibration-sets ./llama out --data wikitext2 --methods gptq,w8a8 --set content/code=code.jsonl
    """
    _run("calibration-sets", model, out, data, choices, as_json)


def _run(name: str, model: str, out: Path, data: str, choices: dict[str, Any], as_json: bool) -> None:
    overwrite = bool(choices["overwrite"])
    run_named(name, model, out, data, study_values(name, choices), overwrite=overwrite, as_json=as_json)


def run_named(
    name: str, model: str, out: Path, data: str, given: dict[str, Any], *, overwrite: bool, as_json: bool
) -> None:
    """Run a study with the given options and print its conclusion, or its full result if `as_json`."""
    from fewbit.api_models import decoded, with_codes
    from fewbit.studies.registry import find_study, make_choice
    from fewbit.studies.run import run_study

    study = find_study(name)
    make_choice(study, model, out, data, given)
    announce(model)
    read_foreign(model, again=True)
    named = given.get("folders") or ()
    read_foreign(*named)
    folders = tuple(str(with_codes(folder)) for folder in named)
    choice = make_choice(study, str(decoded(model)), out, data, {**given, "folders": folders})
    with progress_line(f"study {name}") as progress, resumable():
        result = run_study(study, choice, progress, overwrite)
    if as_json:
        print_json(result)
        return
    for line in result["conclusion"]:
        print(printable(line))
    print(printable(f"wrote {out / 'study.json'} and {out / 'study.html'}"))


def study_values(name: str, choices: dict[str, Any]) -> dict[str, Any]:
    """The options of a study under the names of :func:`fewbit.studies.registry.make_choice`; None: not given."""
    shared, own = given_of(STUDIES[name], choices, "shared"), given_of(STUDIES[name], choices, "own")
    if any(option.name == "set" for option in STUDIES[name]):
        own["sets"] = _sets(own.pop("set", None), own.pop("set_file", None))
    for key in own.keys() & {"slice", "tasks"}:
        own[key] = _names(own[key])
    if "seeds" in own:
        own["seeds"] = _numbers(own["seeds"], "--seeds")
    if "task_data" in own:
        own["task_data"] = str(own["task_data"])
    return {
        **{_CALLED.get(key, key): value for key, value in shared.items()},
        "methods": _names(shared.get("methods")),
        "bits": _numbers(shared.get("bits")),
        "folders": tuple(shared.get("folder") or ()),
        "options": own,
    }


_CALLED = {
    "calibration": "sources",
    "folder": "folders",
    "seq_len": "sequence_length",
    "sequence_length": "sample_length",
}
"""Options -> names of the same in make_choice."""


def _sets(given: list[str] | None, file: Path | None) -> list[dict[str, str]]:
    """Named calibration sets as plain JSON."""
    from fewbit.studies.sets import as_options, parse_set, read_sets

    return as_options([*(read_sets(file) if file else []), *map(parse_set, given or ())])


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str | None, option: str = "--bits") -> tuple[int, ...] | None:
    from fewbit.errors import FewbitError

    names = _names(text)
    if names is None:
        return None
    if not names or not all(name.isdecimal() for name in names):
        raise FewbitError(f"{option} must be whole numbers separated by commas, e.g. 4,3,2, not {text!r}")
    return tuple(map(int, names))
