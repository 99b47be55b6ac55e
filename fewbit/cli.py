"""The command line: parse, call, print."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.errors import FewbitError
from fewbit.progress import progress_line

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Turn the 16-bit weights of a language model into 8 to 2 bits, and see what it costs.\n\n"
    "Begin with:  fewbit quantize smollm2-135m small --method adpq+ --bits 3",
)
models_app = typer.Typer(help="List and fetch the models that need no hub.", invoke_without_command=True)
app.add_typer(models_app, name="models")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
HtmlFlag = Annotated[Path | None, typer.Option("--html", help="Write a self-contained HTML page here.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from fewbit import __version__

        print(f"fewbit {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What every command shares."""


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False))


def _announce(*models: str | None) -> None:
    """Say so when a named model will be fetched first, which takes a while."""
    from fewbit.checkpoints.named import NAMED_MODELS, named_folder
    from fewbit.sizes import show_size

    for name in models:
        if name in NAMED_MODELS and not Path(name).exists() and not named_folder(NAMED_MODELS[name]).is_dir():
            size = show_size(NAMED_MODELS[name].download_bytes)
            print(f"fetching {name} ({size}) and converting it, once: about a minute …", file=sys.stderr)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a name from `fewbit models`, or a hub name.")],
    out: Annotated[Path | None, typer.Argument(help="The folder to make.")] = None,
    method: Annotated[str, typer.Option(help="rtn, adpq (as published) or adpq+ (best).")] = "adpq+",
    bits: Annotated[int, typer.Option(help="Bits of a code, 2 to 8.")] = 4,
    group_size: Annotated[
        str | None, typer.Option(help="N, auto (largest divisor up to 128), row, or a list: 64,auto.")
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option("--symmetric/--asymmetric", help="Grid of the core around 0, or with a zero-point."),
    ] = None,
    grid: Annotated[str | None, typer.Option(help="zero-point, symmetric, minimum or normal-float.")] = None,
    scale_format: Annotated[str | None, typer.Option(help="float16, float32 or two-level.")] = None,
    outlier_fraction: Annotated[float | None, typer.Option(help="Share of weights split off; 0 for none.")] = None,
    outlier_scope: Annotated[str | None, typer.Option(help="tensor or group.")] = None,
    outlier_grid: Annotated[str | None, typer.Option(help="minmax, sign-magnitude or row.")] = None,
    outlier_bits: Annotated[int | None, typer.Option(help="Bits of an outlier's code; 0 for --bits.")] = None,
    clip_search: Annotated[
        bool | None,
        typer.Option("--clip-search/--no-clip-search", help="Search each group's range by least error."),
    ] = None,
    error_power: Annotated[float | None, typer.Option(help="Exponent of the error in the search.")] = None,
    column_weights: Annotated[str | None, typer.Option(help="none or norm-gain.")] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Also quantize tensors of this pattern (repeatable).")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Keep tensors of this pattern (repeatable).")] = None,
    shard_size: Annotated[str, typer.Option(help="Largest output file, e.g. 500MB, 5GB.")] = "5GB",
    report_only: Annotated[bool, typer.Option("--report-only", help="Measure only; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if fewbit made it.")] = False,
    workers: Annotated[int, typer.Option(help="Threads; 0 for one a core.")] = 0,
    device: Annotated[str, typer.Option(help="Where the arithmetic runs: cpu, cuda, ….")] = "cpu",
    as_json: JsonFlag = False,
    html: HtmlFlag = None,
) -> None:
    """Quantize a model without data.

    Examples:

      fewbit quantize smollm2-135m small --bits 3

      fewbit quantize ./llama ./llama-4bit --method rtn --bits 4 --group-size 64

      fewbit quantize ./llama --report-only --bits 2 --json
    """
    from fewbit.memory import keep_freed_memory
    from fewbit.pipeline.run import RunOptions
    from fewbit.pipeline.run import quantize as run
    from fewbit.recipe import recipe_from_choices
    from fewbit.report.html import check_page, write_quantize_page
    from fewbit.report.text import quantize_json, quantize_summary
    from fewbit.sizes import parse_size

    recipe = recipe_from_choices(
        method,
        {
            "bits": bits,
            "group_size": group_size,
            "symmetric": symmetric,
            "grid": grid,
            "scale_format": scale_format,
            "outlier_fraction": outlier_fraction,
            "outlier_scope": outlier_scope,
            "outlier_grid": outlier_grid,
            "outlier_bits": outlier_bits,
            "clip_search": clip_search,
            "error_power": error_power,
            "column_weights": column_weights,
            "include": tuple(include or ()),
            "exclude": tuple(exclude or ()),
        },
    )
    check_page(html)
    _announce(model)
    keep_freed_memory()
    with progress_line(f"{recipe.method} {recipe.bits} bits") as progress:
        options = RunOptions(parse_size(shard_size), overwrite, report_only, workers, device, progress)
        try:
            report = run(model, out, recipe, options)
        except KeyboardInterrupt:
            print("fewbit: interrupted: the same command goes on where this one stopped", file=sys.stderr)
            raise typer.Exit(130) from None
    if as_json:
        _print_json(quantize_json(report))
    else:
        print(quantize_summary(report, None if report_only else out))
    if html:
        write_quantize_page(report, html)


@app.command("eval")
def evaluate_command(
    models: Annotated[list[str], typer.Argument(help="Originals and quantized folders.")],
    data: Annotated[str, typer.Option(help="A .txt or .jsonl file, wikitext2, c4, NAME[:COLUMN], or topics.")],
    seq_len: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    windows: Annotated[int, typer.Option(help="Windows from the start of the text; 0 for all.")] = 0,
    bos: Annotated[
        str, typer.Option(help="A BOS before each window: auto (as the tokenizer), always, never.")
    ] = "auto",
    reference: Annotated[str | None, typer.Option(help="The original, to measure the distance from.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: CUDA if there is one.")] = None,
    as_json: JsonFlag = False,
    html: HtmlFlag = None,
) -> None:
    """Perplexity of models, and with --reference how far they are from the original.

    Example:

      fewbit eval smollm2-135m small --data wiki.txt --windows 24 --reference smollm2-135m
    """
    from fewbit.evaluation.evaluate import evaluate
    from fewbit.evaluation.perplexity import Protocol
    from fewbit.report.html import check_page, write_evaluation_page
    from fewbit.report.text import evaluation_table

    check_page(html)
    _announce(*models, reference)
    with progress_line("evaluating") as progress:
        result = evaluate(list(models), data, Protocol(seq_len, windows, bos), reference, device, progress)
    if as_json:
        _print_json(result)
    else:
        evaluation_table(result)
    if html:
        write_evaluation_page(result, html)


@app.command("inspect")
def inspect_command(
    model: Annotated[str, typer.Argument(help="An original or a quantized folder.")],
    reference: Annotated[
        str | None,
        typer.Option(help="The original of a quantized folder; default: the one it was made from."),
    ] = None,
    as_json: JsonFlag = False,
    html: HtmlFlag = None,
) -> None:
    """Statistics of every weight tensor; for a quantized folder also its error and its divergence from the original.

    Examples:

      fewbit inspect smollm2-135m

      fewbit inspect small --html small.html
    """
    from fewbit.inspection.inspect import inspect
    from fewbit.report.html import check_page, write_inspection_page
    from fewbit.report.text import inspection_table

    check_page(html)
    _announce(model, reference)
    with progress_line("inspecting") as progress:
        result = inspect(model, reference, progress)
    if as_json:
        _print_json(result)
    else:
        inspection_table(result)
    if html:
        write_inspection_page(result, html)


@app.command()
def unpack(
    folder: Annotated[Path, typer.Argument(help="A quantized folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if fewbit made it.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a quantized folder as plain 16-bit weights, for tools that do not know the format."""
    from fewbit.checkpoints.source import open_checkpoint
    from fewbit.runtime.unpack import unpack as run
    from fewbit.versions import versions

    written = run(folder, out, overwrite)
    if as_json:
        row = {"name": str(written), "method": "unpacked", "bytes": open_checkpoint(written).bytes}
        _print_json({"models": [row], "protocol": None, "versions": versions()})
    else:
        print(f"wrote {written}")


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="Where the models and the report go.")] = Path("demo-out"),
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens to evaluate.")] = 24,
) -> None:
    """Fetch a small model, quantize it six ways, measure all, let two of them speak; writes a report."""
    from fewbit.demo import demo as run

    run(out, windows)


@models_app.callback()
def list_models(context: typer.Context, as_json: JsonFlag = False) -> None:
    """List the models that need no hub, and which of them are cached."""
    if context.invoked_subcommand is not None:
        return
    from fewbit.report.text import models_json, models_table

    if as_json:
        _print_json(models_json())
    else:
        models_table()


@models_app.command("fetch")
def fetch_model(
    name: Annotated[str, typer.Argument(help="A name from `fewbit models`.")], as_json: JsonFlag = False
) -> None:
    """Fetch a named model, check it, convert it to safetensors, keep it in the cache; print its folder."""
    from fewbit.checkpoints.named import fetch_named
    from fewbit.versions import versions

    _announce(name)
    folder = fetch_named(name)
    if as_json:
        _print_json({"models": [{"name": name, "folder": str(folder)}], "protocol": None, "versions": versions()})
    else:
        print(folder)


def main() -> None:
    """Run the command line; bad input ends with one line and status 2."""
    try:
        app()
    except SystemExit as end:
        _leave(end.code)
    except FewbitError as error:
        print(f"fewbit: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        print(f"fewbit: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


def _leave(code: Any) -> None:
    """End the process at once: taking torch apart, module by module, would cost a third of a second more."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = 141
    sys.stderr.flush()
    os._exit(int(code or 0))


if __name__ == "__main__":
    main()
