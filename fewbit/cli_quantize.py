"""The commands that compute something from a model: quantize, curvature."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.cli_shared import (
    HtmlFlag,
    JsonFlag,
    MethodOption,
    ModelArgument,
    announce,
    print_json,
    read_foreign,
    resumable,
    with_options,
)
from fewbit.options import QUANTIZE, given_of
from fewbit.options_more import CURVATURE
from fewbit.printable import printable
from fewbit.progress import progress_line


@with_options(QUANTIZE)
def quantize(
    model: ModelArgument,
    out: Annotated[Path | None, typer.Argument(help="The output folder.")] = None,
    method: MethodOption = "adpq+",
    as_json: JsonFlag = False,
    html: HtmlFlag = None,
    **choices: Any,
) -> None:
    """Quantize a model, with or without a calibration set.

    Examples:

      fewbit quantize smollm2-135m small

      fewbit quantize smollm2-135m smaller --method precal+oac --bits 2 --calibration my-texts.jsonl

      fewbit quantize smollm2-135m best --method precal+oac --bits 2 --calibration my-texts.jsonl --tune

      fewbit quantize ./llama mixed --bits 3 --set '*.down_proj.weight:bits=4'

      fewbit quantize ./llama --report-only --bits 2 --json
    """
    from fewbit.advice import advice
    from fewbit.api import quantize as run
    from fewbit.api import quantize_request
    from fewbit.checkpoints.companions import say_left
    from fewbit.checkpoints.output import list_file
    from fewbit.report.html import check_page, write_quantize_page
    from fewbit.report.text import export_summary, quantize_json, quantize_summary, tuning_summary

    check_page(html, None if choices["report_only"] else out, Path(model))
    announce(model)
    read_foreign(model, again=True)
    request = quantize_request(model, method, choices)
    target = request.target.name if request.target is not None else None
    for line in advice(model, request.recipe, target) if request.tuning is None and out is not None else ():
        print(printable(f"fewbit: {line}"), file=sys.stderr)
    with progress_line(f"{method} {model}") as progress, resumable():
        report = run(model, out, method, progress=progress, **choices)
    for note in report.get("notes", ()):
        print(printable(f"fewbit: {note}"), file=sys.stderr)
    if (left := say_left(report.get("left", ()))) and not choices["report_only"]:
        print(printable(left), file=sys.stderr)
    if as_json:
        print_json(quantize_json(report))
    elif "tuning" in report and out is not None:
        print(tuning_summary(report, out))
        if "export" in report:
            print(export_summary(report["export"], out))
    else:
        print(quantize_summary(report, None if choices["report_only"] else out))
    if html:
        write_quantize_page(report, html)
        if out is not None and html.resolve().parent == out.resolve():
            list_file(out, html.name)


@with_options(CURVATURE)
def curvature(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="The output folder.")],
    as_json: JsonFlag = False,
    **choices: Any,
) -> None:
    """Measure how much errors in a model's weights cost (the curvature), and store it for any method and bit-width.

    Examples:

      fewbit curvature smollm2-135m smol-fisher --calibration my-texts.jsonl

      fewbit quantize smollm2-135m small --method precal+oac --bits 2 --curvature smol-fisher
    """
    from fewbit.api_models import decoded
    from fewbit.calibration.choice import choice_from
    from fewbit.curvature.choice import curvature_choice
    from fewbit.pipeline.calibration_options import CalibrationOptions
    from fewbit.pipeline.measure_curvature import measure
    from fewbit.sizes import parse_size, show_size

    announce(model)
    read_foreign(model, again=True)
    text = given_of(CURVATURE, choices, "text")
    if "calibration" in text:
        text["sources"] = text.pop("calibration")
    memory = choices["memory"]
    options = CalibrationOptions(choice_from(text), memory_bytes=parse_size(memory) if memory else 0)
    choice = curvature_choice(**given_of(CURVATURE, choices, "choice"))
    patterns = [tuple(choices[name] or ()) for name in ("include", "exclude")]
    with progress_line(f"{choice.kind} of {model}") as progress, resumable():
        result = measure(decoded(model), out, choice, options, choices["device"] or "cpu", progress, *patterns)
    if as_json:
        print_json(result)
    else:
        measured = f"{result['tokens']:,} tokens, {show_size(result['bytes'])}, {result['seconds']:.0f} s"
        print(printable(f"wrote {out}: {choice.kind}, {measured}"))
