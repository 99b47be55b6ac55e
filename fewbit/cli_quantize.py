"""The commands that compute something from a model: quantize, curvature."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.cli_shared import (
    CalibrationOption,
    ChatOption,
    DeviceOption,
    HtmlFlag,
    JsonFlag,
    LengthOption,
    MemoryOption,
    MethodOption,
    ModelArgument,
    SamplesOption,
    SeedOption,
    TemperingOption,
    announce,
    calibration_choice,
    print_json,
    resumable,
    with_options,
)
from fewbit.options import QUANTIZE
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

      fewbit quantize smollm2-135m small --bits 3

      fewbit quantize smollm2-135m smaller --method precal+oac --bits 2 --calibration my-texts.jsonl

      fewbit quantize smollm2-135m best --method precal+oac --bits 2 --calibration my-texts.jsonl --tune

      fewbit quantize ./llama mixed --bits 3 --set '*.down_proj.weight:bits=4'

      fewbit quantize ./llama --report-only --bits 2 --json
    """
    from fewbit.api import quantize as run
    from fewbit.checkpoints.companions import say_left
    from fewbit.checkpoints.output import list_file
    from fewbit.report.html import check_page, write_quantize_page
    from fewbit.report.text import quantize_json, quantize_summary, tuning_summary

    check_page(html, None if choices["report_only"] else out, Path(model))
    announce(model)
    with progress_line(f"{method} {model}") as progress, resumable():
        report = run(model, out, method, progress=progress, **choices)
    if (left := say_left(report.get("left", ()))) and not choices["report_only"]:
        print(printable(left), file=sys.stderr)
    if as_json:
        print_json(quantize_json(report))
    elif "tuning" in report and out is not None:
        print(tuning_summary(report, out))
    else:
        print(quantize_summary(report, None if choices["report_only"] else out))
    if html:
        write_quantize_page(report, html)
        if out is not None and html.resolve().parent == out.resolve():
            list_file(out, html.name)


def curvature(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="The output folder.")],
    kind: Annotated[str, typer.Option(help="gram (from inputs) or fisher (from output gradients).")] = "fisher",
    fisher_terms: Annotated[str, typer.Option(help="sequence (as published) or token.")] = "token",
    fisher_labels: Annotated[str, typer.Option(help="data, or sampled (from the model's predictions).")] = "data",
    diagonal: Annotated[bool, typer.Option("--diagonal", help="Keep only the diagonal.")] = False,
    gram_share: Annotated[
        float | None,
        typer.Option(help="Share of the input Gram in a Fisher; 0: none, as published; default 0.5."),
    ] = None,
    tempering: TemperingOption = None,
    calibration: CalibrationOption = None,
    samples: SamplesOption = None,
    sequence_length: LengthOption = None,
    seed: SeedOption = None,
    chat_template: ChatOption = None,
    include: Annotated[list[str] | None, typer.Option(help="Also measure tensors that match this.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Do not measure tensors that match this.")] = None,
    memory: MemoryOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonFlag = False,
) -> None:
    """Measure how much errors in a model's weights cost (the curvature), and store it for any method and bit-width.

    Examples:

      fewbit curvature smollm2-135m smol-fisher --calibration my-texts.jsonl

      fewbit quantize smollm2-135m small --method precal+oac --bits 2 --curvature smol-fisher
    """
    from fewbit.curvature.choice import BEST_GRAM_SHARE, CurvatureChoice
    from fewbit.pipeline.calibration_options import CalibrationOptions
    from fewbit.pipeline.measure_curvature import measure
    from fewbit.sizes import parse_size, show_size

    announce(model)
    options = CalibrationOptions(
        calibration_choice(
            sources=calibration,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            chat_template=chat_template,
        ),
        memory_bytes=parse_size(memory) if memory else 0,
    )
    if gram_share is None:
        gram_share = BEST_GRAM_SHARE if kind == "fisher" else 0.0
    choice = CurvatureChoice(kind, fisher_terms, fisher_labels, diagonal, tempering or 0.0, gram_share)
    with progress_line(f"{kind} of {model}") as progress:
        result = measure(model, out, choice, options, device, progress, tuple(include or ()), tuple(exclude or ()))
    if as_json:
        print_json(result)
    else:
        measured = f"{result['tokens']:,} tokens, {show_size(result['bytes'])}, {result['seconds']:.0f} s"
        print(printable(f"wrote {out}: {kind}, {measured}"))
