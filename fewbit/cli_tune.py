"""The command that trains a quantized folder: tune."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli_shared import (
    CalibrationOption,
    ChatOption,
    JsonFlag,
    LengthOption,
    SamplesOption,
    SeedOption,
    announce,
    calibration_choice,
    print_json,
)
from fewbit.progress import progress_line


def tune(
    folder: Annotated[Path, typer.Argument(help="A folder that fewbit quantized, with any method.")],
    out: Annotated[Path, typer.Argument(help="The folder to make: the same format, bits and outliers.")],
    reference: Annotated[
        str | None, typer.Option(help="The original; default: the one that the folder was made from.")
    ] = None,
    calibration: CalibrationOption = None,
    samples: SamplesOption = None,
    sequence_length: LengthOption = None,
    seed: SeedOption = None,
    chat_template: ChatOption = None,
    loss: Annotated[
        str, typer.Option(help="nll (the text's next tokens), kd (the original's predictions), or nll+kd.")
    ] = "kd",
    train: Annotated[
        str, typer.Option(help="weights, scales (and zero-points), codes (by one step at most), or all.")
    ] = "all",
    epochs: Annotated[int | None, typer.Option(help="Passes over the text; default 3.")] = None,
    lr: Annotated[float | None, typer.Option(help="Of weights, in steps of their grid; default 0.002.")] = None,
    scale_lr: Annotated[float | None, typer.Option(help="Of scales, relative; default 0.003.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences of an update; default 4.")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Of them, how many run at a time; the rest is accumulated.")
    ] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of updates in which the rate rises; default 0.1.")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest norm of the gradient; default 1.")] = None,
    held_out: Annotated[int | None, typer.Option(help="Sequences that only judge the epochs; default 8.")] = None,
    patience: Annotated[int | None, typer.Option(help="Epochs without a better one before the end; default 2.")] = None,
    top: Annotated[
        int | None, typer.Option(help="Predictions kept of the original for kd; 0: all, computed anew; default 64.")
    ] = None,
    reconstruction: Annotated[
        int | None, typer.Option(help="Before, for every block by itself: passes over its inputs; default 0.")
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option("--checkpointing/--no-checkpointing", help="Less memory, a third more time; default: if needed."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: CUDA if there is one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if fewbit made it.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train a quantized model under its own rounding (quantization-aware fine-tuning).

    Examples:

      fewbit tune smaller tuned --calibration my-texts.jsonl

      fewbit tune smaller tuned --calibration my-texts.jsonl --train scales --epochs 2

      accelerate launch -m fewbit.tuning smaller tuned --calibration my-texts.jsonl
    """
    from fewbit.report.text import quantize_json, tuning_summary
    from fewbit.tuning.choice import TuningChoice
    from fewbit.tuning.run import TuneOptions
    from fewbit.tuning.run import tune as run

    given = {
        "epochs": epochs,
        "lr": lr,
        "scale_lr": scale_lr,
        "batch_size": batch_size,
        "micro_batch": micro_batch,
        "warmup": warmup,
        "clip": clip,
        "held_out": held_out,
        "patience": patience,
        "top": top,
        "reconstruction": reconstruction,
        "seed": seed,
    }
    choice = TuningChoice(loss=loss, train=train, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
    announce(reference)
    text = calibration_choice(
        sources=calibration, samples=samples, sequence_length=sequence_length, seed=seed, chat_template=chat_template
    )
    options = TuneOptions(reference, text, checkpointing, device, overwrite)
    with progress_line("tuning") as progress:
        try:
            report = run(folder, out, choice, options, progress)
        except KeyboardInterrupt:
            print("fewbit: interrupted: the same command goes on where this one stopped", file=sys.stderr)
            raise typer.Exit(130) from None
    if not report:
        return
    if as_json:
        print_json(quantize_json(report))
    else:
        print(tuning_summary(report, out))
