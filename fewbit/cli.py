"""The command line: parse, call, print."""

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.cli_chat import chat
from fewbit.cli_import import import_command
from fewbit.cli_plan import plan
from fewbit.cli_quantize import curvature, quantize
from fewbit.cli_shared import HtmlFlag, JsonFlag, announce, print_json, read_foreign, with_options
from fewbit.cli_study import study_app
from fewbit.cli_tune import tune
from fewbit.faults import fault_report, hidden_error, line_for
from fewbit.memory import keep_freed_memory
from fewbit.options import EVALUATE, given_of
from fewbit.options_more import EXPORT, UNPACK
from fewbit.printable import check_name, printable
from fewbit.progress import progress_line

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Quantize the weights of a language model from 16 bits to 8 to 1 bits, and measure the loss in quality.\n\n"
    "Start with:  fewbit quantize smollm2-135m small",
)
models_app = typer.Typer(help="List and fetch the named models, which need no hub.", invoke_without_command=True)
app.add_typer(models_app, name="models")
app.add_typer(study_app, name="study")


def _show_version(wanted: bool) -> None:
    if wanted:
        from fewbit.version import __version__

        print(f"fewbit {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the program itself."""


app.command()(quantize)
app.command()(plan)
app.command()(curvature)
app.command()(tune)
app.command()(chat)


@app.command("eval")
@with_options(EVALUATE)
def evaluate_command(
    models: Annotated[list[str], typer.Argument(help="Original models, and quantized folders or .gguf files.")],
    as_json: JsonFlag = False,
    html: HtmlFlag = None,
    **choices: Any,
) -> None:
    """Measure perplexity; with --reference also KL divergence from the original, with --tasks also accuracy on tasks.

    Examples:

      fewbit eval smollm2-135m small --data wiki.txt --windows 24 --reference smollm2-135m

      fewbit eval smollm2-135m small --tasks piqa,arc_easy --task-limit 200

      fewbit eval smollm2-135m --data wiki.txt --w8a8 w8a8,smoothquant --calibration my-texts.jsonl
    """
    from fewbit.api import evaluate
    from fewbit.report.html import check_page, write_evaluation_page
    from fewbit.report.text import evaluation_table

    check_page(html)
    announce(*models, choices["reference"])
    read_foreign(*models, choices["reference"])
    with progress_line("evaluating") as progress:
        result = evaluate(list(models), progress=progress, **choices)
    if as_json:
        print_json(result)
    else:
        evaluation_table(result)
    if html:
        write_evaluation_page(result, html)


@app.command("inspect")
def inspect_command(
    model: Annotated[str, typer.Argument(help="An original model, or a quantized folder or .gguf file.")],
    reference: Annotated[
        str | None,
        typer.Option(help="The original of a quantized folder; default: the one it was made from."),
    ] = None,
    as_json: JsonFlag = False,
    html: HtmlFlag = None,
) -> None:
    """Show statistics of every weight tensor; for a quantized folder also errors and divergence from the original.

    Examples:

      fewbit inspect smollm2-135m

      fewbit inspect small --html small.html
    """
    from fewbit.api_models import inspect
    from fewbit.report.html import check_page, write_inspection_page
    from fewbit.report.text import inspection_table

    check_page(html)
    announce(model, reference)
    read_foreign(model)
    with progress_line("inspecting") as progress:
        result = inspect(model, reference, progress)
    if as_json:
        print_json(result)
    else:
        inspection_table(result)
    if html:
        write_inspection_page(result, html)


@app.command()
@with_options(UNPACK)
def unpack(
    folder: Annotated[Path, typer.Argument(help="A quantized folder, or a model that another tool quantized.")],
    out: Annotated[Path, typer.Argument(help="The output folder.")],
    as_json: JsonFlag = False,
    **choices: Any,
) -> None:
    """Convert a quantized folder to plain 16-bit weights, for tools that do not know the format."""
    from fewbit.api import unpack as run
    from fewbit.checkpoints.source import open_checkpoint
    from fewbit.versions import versions

    read_foreign(folder if folder.exists() else None)
    written = run(folder, out, **given_of(UNPACK, choices, "run"))
    if as_json:
        row = {"name": str(written), "method": "unpacked", "bytes": open_checkpoint(written).bytes}
        print_json({"models": [row], "protocol": None, "versions": versions()})
    else:
        print(printable(f"wrote {written}"))


@app.command("export")
@with_options(EXPORT)
def export_command(
    folder: Annotated[
        str, typer.Argument(help="A quantized folder, a 16-bit model, or a model that another tool quantized.")
    ],
    dest: Annotated[Path, typer.Argument(help="The output folder.")],
    as_json: JsonFlag = False,
    **choices: Any,
) -> None:
    """Convert a quantized folder to a format that other runtimes load. Weights are converted without loss, or refused.

    Examples:

      fewbit quantize smollm2-135m small --grid q4_0

      fewbit export small small-gguf --format gguf --embeddings q8_0
    """
    from fewbit.api import export as run
    from fewbit.report.text import export_summary
    from fewbit.versions import versions

    announce(folder)
    read_foreign(folder)
    with progress_line(f"exporting {folder}") as progress:
        report = run(folder, dest, progress=progress, **given_of(EXPORT, choices, "run"))
    if as_json:
        row = {"name": str(dest), "method": report["format"], "bytes": report["bytes"]}
        print_json({"models": [row], "protocol": None, "versions": versions(), "report": report})
    else:
        print(export_summary(report, dest))


app.command("import")(import_command)


@app.command()
def axes(as_json: JsonFlag = False) -> None:
    """List the choices on each axis of a recipe, and the choices of each method."""
    from fewbit.report.axes import axes_json, axes_text

    if as_json:
        print_json(axes_json())
    else:
        print(axes_text())


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="Folder for the models and the report.")] = Path("demo-out"),
    windows: Annotated[int, typer.Option(help="Number of windows of 512 tokens to evaluate.")] = 4,
) -> None:
    """Fetch a small model, quantize it in four ways, evaluate all, ask two of them a question, and write a report."""
    from fewbit.demo import demo as run

    run(out, windows)


@models_app.callback()
def list_models(context: typer.Context, as_json: JsonFlag = False) -> None:
    """List the named models, which need no hub, and which of them are cached."""
    if context.invoked_subcommand is not None:
        return
    from fewbit.report.text import models_json, models_table

    if as_json:
        print_json(models_json())
    else:
        models_table()


@models_app.command("fetch")
def fetch_model(
    name: Annotated[str, typer.Argument(help="A name from `fewbit models`.")], as_json: JsonFlag = False
) -> None:
    """Fetch a named model, verify it, convert it to safetensors, cache it, and print its folder."""
    from fewbit.checkpoints.named import fetch_named
    from fewbit.versions import versions

    announce(name)
    folder = fetch_named(name)
    if as_json:
        print_json({"models": [{"name": name, "folder": str(folder)}], "protocol": None, "versions": versions()})
    else:
        print(printable(str(folder)))


def run(arguments: list[str] | None = None) -> int:
    """Run the command line in this process and return its exit status. None: use the arguments of the process.

    Errors that have a known cause, such as bad input, print one line and return 2. Any other exception is raised.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        for word in words:
            check_name(word)
        app(words)
    except SystemExit as end:
        hidden = hidden_error(end)
        if hidden is not None:
            raise hidden from None
        if isinstance(end.code, str):
            print(printable(end.code), file=sys.stderr)
            return 1
        return int(end.code or 0)
    except BrokenPipeError:
        return 141
    except Exception as error:
        line = line_for(error, words)
        if line is None:
            raise
        print(f"fewbit: {printable(line)}", file=sys.stderr)
        return 2
    return 0


def guarded(arguments: list[str] | None = None) -> int:
    """As :func:`run`, but an exception prints a short bug report, and the exit status is 1."""
    try:
        return run(arguments)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        print(fault_report(error), file=sys.stderr)
        return 1


def main() -> None:
    """Run the command line and end the process."""
    keep_freed_memory()
    # File names may not be encodable in the terminal's encoding; standard error already escapes such characters.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    code = guarded()
    try:
        sys.stdout.flush()
    except OSError as error:
        code = 141 if isinstance(error, BrokenPipeError) else code or 1
    sys.stderr.flush()
    # Exit without clean-up: tearing down torch's modules would take a third of a second more.
    os._exit(code)


if __name__ == "__main__":
    main()
