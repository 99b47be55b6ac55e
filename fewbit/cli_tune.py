"""The command that trains a quantized folder: tune."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.cli_shared import JsonFlag, announce, print_json, read_foreign, resumable, with_options
from fewbit.options import TUNE
from fewbit.progress import progress_line


@with_options(TUNE)
def tune(
    folder: Annotated[Path, typer.Argument(help="A folder that fewbit or another tool quantized, or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="The output folder; same format, bits and outliers.")],
    as_json: JsonFlag = False,
    **choices: Any,
) -> None:
    """Train a quantized model under its own rounding (quantization-aware fine-tuning).

    Examples:

      fewbit tune smaller tuned --calibration my-texts.jsonl

      fewbit tune smaller tuned --calibration my-texts.jsonl --train scales --epochs 2

      accelerate launch -m fewbit.tuning smaller tuned --calibration my-texts.jsonl
    """
    from fewbit.api import tune as run
    from fewbit.report.text import quantize_json, tuning_summary

    announce(choices["reference"])
    read_foreign(folder if folder.exists() else None)
    with progress_line("tuning") as progress, resumable():
        report = run(folder, out, progress=progress, **choices)
    if not report:
        return
    if as_json:
        print_json(quantize_json(report))
    else:
        print(tuning_summary(report, out))
