"""Shared by the commands: option types, JSON output, announcements."""

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.options import Option
from fewbit.printable import is_invisible, printable

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on standard output.")]
HtmlFlag = Annotated[Path | None, typer.Option("--html", help="Write a self-contained HTML page to this file.")]
ModelArgument = Annotated[
    str, typer.Argument(help="A folder, a .gguf file, a name from `fewbit models`, or a hub name.")
]
MethodOption = Annotated[
    str,
    typer.Option(
        help="Data-free: rtn, adpq, adpq+. With a calibration set: gptq, oac, precal+oac, … (`fewbit axes` lists all)."
    ),
]


def print_json(data: Any) -> None:
    """Print one JSON object on standard output."""
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    # Names may contain characters that control a terminal, or cannot be encoded; JSON escapes keep their value.
    print("".join(_escaped(letter) if letter >= "\x7f" else letter for letter in text))


def _escaped(letter: str) -> str:
    """A letter after ASCII's visible ones, as JSON escape if it is invisible."""
    if not is_invisible(letter):
        return letter
    return r"\u007f" if letter == "\x7f" else json.dumps(letter)[1:-1]


def announce(*models: str | None) -> None:
    """Print a note if a named model has to be fetched first, or if a folder's adapter will be left out."""
    from fewbit.checkpoints.adapter import carries_adapter, left_out
    from fewbit.checkpoints.named import NAMED_MODELS, named_folder
    from fewbit.sizes import show_size

    for name in models:
        if name in NAMED_MODELS and not Path(name).exists() and not named_folder(NAMED_MODELS[name]).is_dir():
            what = f"{name} ({show_size(NAMED_MODELS[name].download_bytes)})"
            print(printable(f"fetching {what} and converting it (only once, about a minute) …"), file=sys.stderr)
        if name is not None and carries_adapter(Path(name)) and (Path(name) / "config.json").is_file():
            print(printable(f"fewbit: {left_out(Path(name))}"), file=sys.stderr)


def read_foreign(*models: str | Path | None, again: bool = False) -> None:
    """Read models that another tool quantized into the cache, and print a line for each.

    again: they are to be quantized again, so their weights are decoded.
    """
    from fewbit.imports.as_model import decoded, with_codes
    from fewbit.progress import progress_line

    for name in models:
        if name is not None:
            with progress_line(f"reading {name}") as progress:
                found = (decoded if again else with_codes)(name, progress)
            if found.said:
                print(printable(f"fewbit: {found.said}"), file=sys.stderr)


def with_options(options: Sequence[Option]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that turns a function with ``**choices`` into a command with the options of a table."""

    def make(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        # Help shows panels in the order of their first option, so the common options come first.
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
    """If the user interrupts the work inside, print that it can be resumed, and exit with status 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("fewbit: interrupted; run the same command again to resume", file=sys.stderr)
        raise typer.Exit(130) from None
