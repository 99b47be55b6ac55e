"""What the commands share: option types, JSON output, announcements."""

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.options import CALIBRATION, SAMPLES, TEXT, Option

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
HtmlFlag = Annotated[Path | None, typer.Option("--html", help="Write a self-contained HTML page here.")]
ModelArgument = Annotated[
    str, typer.Argument(help="A folder, a .gguf file, a name from `fewbit models`, or a hub name.")
]
MethodOption = Annotated[
    str, typer.Option(help="Without data: rtn, adpq, adpq+. With a little text: gptq, oac, precal+oac (`fewbit axes`).")
]
DeviceOption = Annotated[str, typer.Option(help="Where the arithmetic runs: cpu, cuda, ….")]
CalibrationOption = Annotated[str | None, typer.Option(help=CALIBRATION.help)]
SamplesOption = Annotated[int | None, typer.Option(help=SAMPLES.help)]
LengthOption = Annotated[int | None, typer.Option(help=TEXT[0].help)]
SeedOption = Annotated[int | None, typer.Option(help=TEXT[1].help)]
ChatOption = Annotated[bool | None, typer.Option("--chat-template", help=TEXT[2].help)]
TemperingOption = Annotated[
    float | None, typer.Option(help="0 to 1: how far every token counts alike, whatever the size of its inputs.")
]
MemoryOption = Annotated[
    str | None, typer.Option(help="For curvature and hidden states, e.g. 4GB; default: half of what is free.")
]

_NOT_SHOWN = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def calibration_choice(**given: Any) -> Any:
    """The calibration set from options, None for those that were not given."""
    from fewbit.calibration.choice import choice_from

    return choice_from(given)


def print_json(data: Any) -> None:
    """Print one JSON object on standard output."""
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    # Names may hold what a terminal obeys or no encoding has; as escapes they are the same JSON.
    print(_NOT_SHOWN.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


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


def with_options(options: Sequence[Option]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of a function that takes ``**choices``: each option of the table becomes one of the command's."""

    def make(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        # Help shows panels in the order of their first option: what is common stands first.
        ahead = [p for p in named if p.name not in ("as_json", "html")]
        behind = [p for p in named if p.name in ("as_json", "html")]
        common = sum(option.panel == options[0].panel for option in options)
        made = [_parameter(option) for option in options]
        parameters = [*ahead, *made[:common], *behind, *made[common:]]
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters = [p.replace(kind=kind) for p in parameters]

        def command(**given: Any) -> None:
            function(**given)

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return make


def _parameter(option: Option) -> inspect.Parameter:
    flag = option.flag or f"--{option.name.replace('_', '-')}"
    panel = None if option.panel == "Options" else option.panel
    declared = typer.Option(flag, help=option.help, rich_help_panel=panel)
    annotation = Annotated[option.kind | None, declared]  # type: ignore[name-defined]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


@contextmanager
def resumable() -> Iterator[None]:
    """Says, when the user stops the work inside, that it can be taken up again."""
    try:
        yield
    except KeyboardInterrupt:
        print("fewbit: interrupted: the same command goes on where this one stopped", file=sys.stderr)
        raise typer.Exit(130) from None
