"""What the commands share: option types, JSON output, announcements."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
HtmlFlag = Annotated[Path | None, typer.Option("--html", help="Write a self-contained HTML page here.")]
DeviceOption = Annotated[str, typer.Option(help="Where the arithmetic runs: cpu, cuda, ….")]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        help="SRC[:COUNT][,SRC...]: a .txt, .jsonl, .parquet or folder, self (the model's own text), nonsense, "
        "random-tokens, or a hub data set (c4, wikitext2, redpajama, NAME:COLUMN). Default: self."
    ),
]
SamplesOption = Annotated[int | None, typer.Option(help="Calibration sequences in all; default 128.")]
LengthOption = Annotated[int | None, typer.Option(help="Tokens of a calibration sequence; default 512.")]
SeedOption = Annotated[int | None, typer.Option(help="Which sequences are drawn; default 0.")]
ChatOption = Annotated[bool | None, typer.Option("--chat-template", help="Wrap every document as a user's turn.")]
TemperingOption = Annotated[
    float | None, typer.Option(help="0 to 1: how far every token counts alike, whatever the size of its inputs.")
]
MemoryOption = Annotated[
    str | None, typer.Option(help="For curvature and hidden states, e.g. 4GB; default: half of what is free.")
]


def calibration_choice(**given: Any) -> Any:
    """The calibration set from options, None for those that were not given."""
    from fewbit.calibration.choice import choice_from

    return choice_from(given)


def print_json(data: Any) -> None:
    """Print one JSON object on standard output."""
    print(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False))


def announce(*models: str | None) -> None:
    """Say so when a named model will be fetched first, which takes a while, or a folder's adapter stays out."""
    from fewbit.checkpoints.adapter import carries_adapter, left_out
    from fewbit.checkpoints.named import NAMED_MODELS, named_folder
    from fewbit.sizes import show_size

    for name in models:
        if name in NAMED_MODELS and not Path(name).exists() and not named_folder(NAMED_MODELS[name]).is_dir():
            size = show_size(NAMED_MODELS[name].download_bytes)
            print(f"fetching {name} ({size}) and converting it, once: about a minute …", file=sys.stderr)
        if name is not None and carries_adapter(Path(name)) and (Path(name) / "config.json").is_file():
            print(f"fewbit: {left_out(Path(name))}", file=sys.stderr)
