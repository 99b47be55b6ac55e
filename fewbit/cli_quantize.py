"""The commands that make things from a model: quantize, curvature."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli_shared import (
    CalibrationOption,
    ChatOption,
    DeviceOption,
    HtmlFlag,
    JsonFlag,
    LengthOption,
    MemoryOption,
    SamplesOption,
    SeedOption,
    TemperingOption,
    announce,
    calibration_choice,
    print_json,
)
from fewbit.printable import printable
from fewbit.progress import progress_line

METHODS_HELP = (
    "Without data: rtn, adpq (as published), adpq+ (best). With a little text: gptq, awq, spqr, billm, "
    "oac, precal+gptq, precal+spqr, oac+spqr, oac+billm, precal+oac (best)."
)


def quantize(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a name from `fewbit models`, or a hub name.")],
    out: Annotated[Path | None, typer.Argument(help="The folder to make.")] = None,
    method: Annotated[
        str, typer.Option(help="Without data: rtn, adpq, adpq+. With a little text: gptq, oac, precal+oac.")
    ] = "adpq+",
    bits: Annotated[int | None, typer.Option(help="Bits of a code, 1 to 8; default 4 (billm: 1).")] = None,
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
    damping: Annotated[float | None, typer.Option(help="Share of the mean diagonal added to the curvature.")] = None,
    act_order: Annotated[
        bool | None, typer.Option("--act-order/--no-act-order", help="Columns by falling curvature.")
    ] = None,
    static_groups: Annotated[
        bool | None, typer.Option("--static-groups/--refit-groups", help="Grids before the solver, or group by group.")
    ] = None,
    fisher_terms: Annotated[
        str | None, typer.Option(help="sequence (as published) or token: drop the terms between tokens.")
    ] = None,
    fisher_labels: Annotated[str | None, typer.Option(help="data, or sampled from the model.")] = None,
    gram_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the input Gram mixed into a Fisher, 0 (as published) to below 1; default: the method's."
        ),
    ] = None,
    tempering: TemperingOption = None,
    calibration: CalibrationOption = None,
    samples: SamplesOption = None,
    sequence_length: LengthOption = None,
    seed: SeedOption = None,
    chat_template: ChatOption = None,
    curvature: Annotated[
        Path | None, typer.Option(help="A folder of `fewbit curvature`, instead of --calibration.")
    ] = None,
    refresh: Annotated[
        str | None, typer.Option(help="Measure the Fisher once (default), for every block, or every K blocks.")
    ] = None,
    original_inputs: Annotated[
        bool | None, typer.Option("--original-inputs", help="Take a Gram from the original's inputs.")
    ] = None,
    memory: MemoryOption = None,
    max_fallback: Annotated[int | None, typer.Option(help="Weights that may fall back to rounding; default 0.")] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Fine-tune the result on the same text (see `fewbit tune`).")
    ] = False,
    tune_epochs: Annotated[int | None, typer.Option(help="Passes over the text in --tune; default 3.")] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Also quantize tensors of this pattern (repeatable).")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Keep tensors of this pattern (repeatable).")] = None,
    shard_size: Annotated[str, typer.Option(help="Largest output file, e.g. 500MB, 5GB.")] = "5GB",
    report_only: Annotated[bool, typer.Option("--report-only", help="Measure only; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if fewbit made it.")] = False,
    workers: Annotated[int, typer.Option(help="Threads; 0 for one a core.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu (default), cuda, …; --tune takes CUDA by itself where there is one.")
    ] = None,
    as_json: JsonFlag = False,
    html: HtmlFlag = None,
) -> None:
    """Quantize a model, without data or with a little text.

    Examples:

      fewbit quantize smollm2-135m small --bits 3

      fewbit quantize smollm2-135m smaller --method precal+oac --bits 2 --calibration my-texts.jsonl

      fewbit quantize smollm2-135m best --method precal+oac --bits 2 --calibration my-texts.jsonl --tune

      fewbit quantize ./llama ./llama-4bit --method rtn --bits 4 --group-size 64

      fewbit quantize ./llama --report-only --bits 2 --json
    """
    from fewbit.checkpoints.companions import say_left
    from fewbit.checkpoints.locate import locate
    from fewbit.checkpoints.source import open_checkpoint
    from fewbit.curvature.store import open_curvature
    from fewbit.pipeline.calibration_options import CalibrationOptions, parse_refresh, refuse_unused, share_of_stored
    from fewbit.pipeline.run import RunOptions
    from fewbit.pipeline.run import quantize as run
    from fewbit.recipe import recipe_from_choices
    from fewbit.report.html import check_page, write_quantize_page
    from fewbit.report.text import quantize_json, quantize_summary, tuning_summary
    from fewbit.sizes import parse_size
    from fewbit.tuning.choice import tuning_choice

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
            "damping": damping,
            "act_order": act_order,
            "static_groups": static_groups,
            "fisher_terms": fisher_terms,
            "fisher_labels": fisher_labels,
            "gram_share": gram_share,
            "tempering": tempering,
            "include": tuple(include or ()),
            "exclude": tuple(exclude or ()),
        },
    )
    check_page(html)
    text = {
        "sources": calibration,
        "samples": samples,
        "sequence_length": sequence_length,
        "seed": seed,
        "chat_template": chat_template,
    }
    others = {
        "curvature": curvature,
        "refresh": refresh,
        "original_inputs": original_inputs,
        "memory": memory,
        "max_fallback": max_fallback,
    }
    refuse_unused(recipe, text, others, tune)
    tuning = tuning_choice(tune, tune_epochs, seed, report_only)
    announce(model)
    calibrated = CalibrationOptions(
        choice=calibration_choice(**text),
        stored=open_curvature(curvature, open_checkpoint(locate(model))) if curvature else None,
        refresh=parse_refresh(refresh or "once"),
        original_inputs=bool(original_inputs),
        memory_bytes=parse_size(memory) if memory else 0,
        max_fallback=max_fallback or 0,
    )
    if calibrated.stored is not None and gram_share is None:
        recipe = share_of_stored(recipe, calibrated.stored)
    with progress_line(f"{recipe.method} {recipe.bits} bits") as progress:
        options = RunOptions(
            parse_size(shard_size), overwrite, report_only, workers, device or "cpu", progress, calibrated
        )
        try:
            if tuning is not None and out is not None:
                # Not at the top: a run without data starts in half the time without what training imports.
                from fewbit.tuning.in_one_go import quantize_and_tune
                from fewbit.tuning.run import TuneOptions

                trained = TuneOptions(locate(model), calibrated.choice, None, device, overwrite)
                report = quantize_and_tune(model, out, recipe, options, tuning, trained)
            else:
                report = run(model, out, recipe, options)
        except KeyboardInterrupt:
            print("fewbit: interrupted: the same command goes on where this one stopped", file=sys.stderr)
            raise typer.Exit(130) from None
    if (left := say_left(report.get("left", ()))) and not report_only:
        print(left, file=sys.stderr)
    if as_json:
        print_json(quantize_json(report))
    elif tuning is not None and out is not None:
        print(tuning_summary(report, out))
    else:
        print(quantize_summary(report, None if report_only else out))
    if html:
        write_quantize_page(report, html)


def curvature(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a name from `fewbit models`, or a hub name.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    kind: Annotated[str, typer.Option(help="gram (inputs) or fisher (output gradients).")] = "fisher",
    fisher_terms: Annotated[str, typer.Option(help="sequence (as published) or token.")] = "token",
    fisher_labels: Annotated[str, typer.Option(help="data, or sampled from the model.")] = "data",
    diagonal: Annotated[bool, typer.Option("--diagonal", help="Keep only the diagonal.")] = False,
    gram_share: Annotated[
        float | None,
        typer.Option(help="Share of the input Gram in a Fisher, from 0 (as published); default 0.5."),
    ] = None,
    tempering: TemperingOption = None,
    calibration: CalibrationOption = None,
    samples: SamplesOption = None,
    sequence_length: LengthOption = None,
    seed: SeedOption = None,
    chat_template: ChatOption = None,
    include: Annotated[list[str] | None, typer.Option(help="Also measure tensors of this pattern.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave out tensors of this pattern.")] = None,
    memory: MemoryOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonFlag = False,
) -> None:
    """Measure what errors in a model's weights cost, and keep it for any method and bit-width.

    Example:

      fewbit curvature smollm2-135m smol-fisher --calibration my-texts.jsonl

      fewbit quantize smollm2-135m small --method precal+oac --bits 2 --curvature smol-fisher
    """
    from fewbit.curvature.choice import BEST_GRAM_SHARE, CurvatureChoice
    from fewbit.pipeline.calibration_options import CalibrationOptions
    from fewbit.pipeline.measure import measure
    from fewbit.recipe import Recipe
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
    recipe = Recipe(group_size="row", include=tuple(include or ()), exclude=tuple(exclude or ()))
    with progress_line(f"{kind} of {model}") as progress:
        result = measure(model, out, choice, options, device, progress, recipe)
    if as_json:
        print_json(result)
    else:
        measured = f"{result['tokens']:,} tokens, {show_size(result['bytes'])}, {result['seconds']:.0f} s"
        print(printable(f"wrote {out}: {kind}, {measured}"))
