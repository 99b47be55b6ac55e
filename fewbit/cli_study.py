"""The studies: each is a command, and most options are shared."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.cli_shared import (
    CalibrationOption,
    DeviceOption,
    JsonFlag,
    LengthOption,
    SamplesOption,
    announce,
    print_json,
)
from fewbit.printable import printable
from fewbit.progress import progress_line

study_app = typer.Typer(
    no_args_is_help=True,
    help="Study the effects of quantization on a model. Each study writes study.json and an HTML page with plots.\n\n"
    "If a study is interrupted or killed, the same command resumes it.",
)

ModelArgument = Annotated[
    str, typer.Argument(help="A folder, a .gguf file, a name from `fewbit models`, or a hub name.")
]
OutArgument = Annotated[Path, typer.Argument(help="The folder of the study's results.")]
DataOption = Annotated[
    str, typer.Option(help="Evaluation text: a .txt or .jsonl file, wikitext2, c4, NAME[:COLUMN], or topics.")
]
SizeOption = Annotated[
    str, typer.Option(help="quick (minutes), standard (hours, for a model of 0.1 to 0.3 billion weights), or large.")
]
MethodsOption = Annotated[str | None, typer.Option(help="Methods, separated by commas; default: those of the size.")]
BitsOption = Annotated[str | None, typer.Option(help="Bit-widths, separated by commas; default: those of the size.")]
FolderOption = Annotated[
    list[str] | None, typer.Option("--folder", help="A quantized folder to include as well (repeatable).")
]
WindowsOption = Annotated[int | None, typer.Option(help="Windows of the evaluation text; default: depends on --size.")]
SeqLenOption = Annotated[int | None, typer.Option(help="Tokens per window; default: depends on --size.")]
StudySeedOption = Annotated[int | None, typer.Option(help="Random seed, also for the calibration sets; default 0.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="A calibration set: AXIS/NAME=SRC, e.g. language/hindi=hin.txt (repeatable)."),
]
SetFileOption = Annotated[
    Path | None, typer.Option("--set-file", help='A JSON file of sets: {"AXIS": {"NAME": "SRC"}}.')
]
EngineOption = Annotated[str, typer.Option(help="local, or ray (run each cell of the study as a Ray task).")]
OverwriteFlag = Annotated[bool, typer.Option("--overwrite", help="Replace a study that was run with other arguments.")]


@study_app.command()
def objectives(
    model: ModelArgument,
    out: OutArgument,
    data: DataOption,
    size: SizeOption = "standard",
    methods: MethodsOption = None,
    bits: BitsOption = None,
    folder: FolderOption = None,
    calibration: CalibrationOption = None,
    samples: SamplesOption = None,
    sequence_length: LengthOption = None,
    windows: WindowsOption = None,
    seq_len: SeqLenOption = None,
    seed: StudySeedOption = None,
    engine: EngineOption = "local",
    device: DeviceOption = "cpu",
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Does a lower layer-wise error mean a lower loss? Methods x bit-widths, with rank correlations.

    Examples:

      fewbit study objectives smollm2-135m smol-objectives --data wiki.test.raw.txt --calibration c4.jsonl

      fewbit study objectives ./llama out --data wikitext2 --size quick --methods rtn,gptq --bits 4,3 --folder ./tuned
    """
    given = _given(locals())
    run_named("objectives", model, out, data, given, overwrite=overwrite, as_json=as_json)


@study_app.command()
def landscape(
    model: ModelArgument,
    out: OutArgument,
    data: DataOption,
    size: SizeOption = "standard",
    methods: MethodsOption = None,
    bits: BitsOption = None,
    folder: FolderOption = None,
    plane: Annotated[
        str | None,
        typer.Option(
            "--slice",
            help="The two models that span the plotted plane, A,B; default: the first two folders, otherwise the last "
            "two models that the study makes.",
        ),
    ] = None,
    directions: Annotated[
        int | None, typer.Option(help="Random directions of each kind; default: depends on --size.")
    ] = None,
    calibration: CalibrationOption = None,
    samples: SamplesOption = None,
    sequence_length: LengthOption = None,
    windows: WindowsOption = None,
    seq_len: SeqLenOption = None,
    seed: StudySeedOption = None,
    engine: EngineOption = "local",
    device: DeviceOption = "cpu",
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Plot the loss around a model's weights: random directions, lines to quantized weights, a plane through two.

    Examples:

      fewbit study landscape smollm2-135m smol-landscape --data wiki.test.raw.txt --calibration c4.jsonl

      fewbit study landscape ./llama out --data wikitext2 --size quick --folder ./gptq-3bit --folder ./tuned-3bit
    """
    options = {"slice": _names(plane), "directions": directions}
    given = {**_given(locals()), "options": {key: value for key, value in options.items() if value is not None}}
    run_named("landscape", model, out, data, given, overwrite=overwrite, as_json=as_json)


@study_app.command()
def outliers(
    model: ModelArgument,
    out: OutArgument,
    data: DataOption,
    size: SizeOption = "standard",
    sets: SetOption = None,
    set_file: SetFileOption = None,
    methods: Annotated[
        str | None, typer.Option(help="Remedies: adaptive-lasso,smoothquant,awq,sensitivity; default: all.")
    ] = None,
    bits: BitsOption = None,
    factor: Annotated[
        float | None,
        typer.Option(help="A channel is an outlier if its RMS exceeds the median by this factor; default 5."),
    ] = None,
    calibration: CalibrationOption = None,
    samples: SamplesOption = None,
    sequence_length: LengthOption = None,
    windows: WindowsOption = None,
    seq_len: SeqLenOption = None,
    seed: StudySeedOption = None,
    engine: EngineOption = "local",
    device: DeviceOption = "cpu",
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Where and for which text are activations large? What does rounding them to 8 bits cost, and which remedy helps?

    Examples:

      fewbit study outliers smollm2-135m smol-outliers --data wiki.test.raw.txt --calibration c4.jsonl

      fewbit study outliers ./llama out --data wikitext2 --set content/code=code.jsonl --set language/hindi=hin.txt
    """
    given = _with(locals(), sets=_sets(sets, set_file), factor=factor)
    run_named("outliers", model, out, data, given, overwrite=overwrite, as_json=as_json)


@study_app.command("calibration-sets")
def calibration_sets(
    model: ModelArgument,
    out: OutArgument,
    data: DataOption,
    size: SizeOption = "standard",
    sets: SetOption = None,
    set_file: SetFileOption = None,
    methods: MethodsOption = None,
    bits: BitsOption = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="A,B: number of seeds for the default set and for each other set; default: depends on --size."
        ),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(help="Sets are equivalent within this relative difference of perplexity; default 0.02."),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Significance level of the equivalence test; default 0.05.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Also measure accuracy on these tasks (comma-separated).")] = None,
    task_data: Annotated[str | None, typer.Option(help="A folder with the tasks' questions.")] = None,
    task_limit: Annotated[int | None, typer.Option(help="Use only the first N questions of each task.")] = None,
    calibration: CalibrationOption = None,
    samples: SamplesOption = None,
    sequence_length: LengthOption = None,
    windows: WindowsOption = None,
    seq_len: SeqLenOption = None,
    seed: StudySeedOption = None,
    engine: EngineOption = "local",
    device: DeviceOption = "cpu",
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Does the choice of calibration set matter? Sets x seeds x methods, with equivalence tests and a verdict.

    Examples:

      fewbit study calibration-sets smollm2-135m smol-sets --data wiki.test.raw.txt --calibration c4.jsonl

      fewbit study calibration-sets ./llama out --data wikitext2 --methods gptq,w8a8 --set content/code=code.jsonl
    """
    given = _with(
        locals(),
        sets=_sets(sets, set_file),
        seeds=_numbers(seeds, "--seeds"),
        margin=margin,
        alpha=alpha,
        tasks=_names(tasks),
        task_data=task_data,
        task_limit=task_limit,
    )
    run_named("calibration-sets", model, out, data, given, overwrite=overwrite, as_json=as_json)


def run_named(
    name: str, model: str, out: Path, data: str, given: dict[str, Any], *, overwrite: bool, as_json: bool
) -> None:
    """Run a study with the given options and print its conclusion, or its full result if `as_json`."""
    from fewbit.studies.registry import find_study, make_choice
    from fewbit.studies.run import run_study

    study = find_study(name)
    choice = make_choice(study, model, out, data, given)
    announce(model)
    with progress_line(f"study {name}") as progress:
        try:
            result = run_study(study, choice, progress, overwrite)
        except KeyboardInterrupt:
            print("fewbit: interrupted; run the same command again to resume", file=sys.stderr)
            raise typer.Exit(130) from None
    if as_json:
        print_json(result)
        return
    for line in result["conclusion"]:
        print(printable(line))
    print(printable(f"wrote {out / 'study.json'} and {out / 'study.html'}"))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that all studies share, under the names of :func:`fewbit.studies.registry.make_choice`."""
    return {
        "size": options["size"],
        "methods": _names(options.get("methods")),
        "bits": _numbers(options.get("bits")),
        "folders": tuple(options.get("folder") or ()),
        "sources": options["calibration"],
        "samples": options["samples"],
        "sample_length": options["sequence_length"],
        "windows": options["windows"],
        "sequence_length": options["seq_len"],
        "seed": options["seed"],
        "engine": options["engine"],
        "device": options["device"],
    }


def _with(shared: dict[str, Any], **own: Any) -> dict[str, Any]:
    """The shared options, and those of one study that were given."""
    return {**_given(shared), "options": {key: value for key, value in own.items() if value is not None}}


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
