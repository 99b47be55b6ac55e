"""The command that talks with a model: chat."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.cli_shared import JsonFlag, announce, print_json, read_foreign, with_options
from fewbit.errors import FewbitError
from fewbit.options import given_of
from fewbit.options_more import CHAT
from fewbit.printable import printable, printable_text

if TYPE_CHECKING:
    from fewbit.runtime.chat import Answer, Conversation

_STDIN = "-"


@with_options(CHAT)
def chat(
    folder: Annotated[str, typer.Argument(help="A quantized folder, or any model that `fewbit quantize` takes.")],
    as_json: JsonFlag = False,
    **choices: Any,
) -> None:
    """Talk with a model in the terminal. Ctrl-C stops an answer, Ctrl-D ends.

    A model without a chat template continues each text that you type. If standard input is not a terminal, each of its
    lines is one message of the same conversation.

    Examples:

      fewbit chat small

      fewbit chat small --prompt "Name three colours." --temperature 0

      fewbit chat small --system "Answer in one sentence." < questions.txt
    """
    from fewbit.api import checked
    from fewbit.api_models import with_codes
    from fewbit.runtime.chat import ChatChoice, open_conversation

    choices = checked("chat", CHAT, choices)
    choice = ChatChoice(**given_of(CHAT, choices, "choice"))
    prompt = choices["prompt"]
    is_typed = prompt is None and sys.stdin.isatty()
    if prompt == _STDIN:
        prompt = _clean(_read_all())
    announce(folder)
    read_foreign(folder)
    place = str(with_codes(folder))
    conversation = open_conversation(place, choice, choices["device"])
    if is_typed:
        what = "Talk with it" if conversation.has_template else "It has no chat template and continues what you type"
        print(f"{printable(f'{folder}: {what}')}. Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    said = _typed() if is_typed else _lines() if prompt is None else iter([prompt])
    answers: list[Answer] = []
    try:
        for message in said:
            answers.append(_ask(conversation, message, is_shown=not as_json, goes_on=prompt is None))
            if not is_typed and answers[-1].is_stopped:
                raise typer.Exit(130)
    finally:
        if answers:
            print(printable(f"fewbit: {_figures(answers)}"), file=sys.stderr)
    if as_json:
        print_json(_json(folder, place, answers))


def _ask(conversation: "Conversation", message: str, is_shown: bool, goes_on: bool) -> "Answer":
    """The answer, printed as it comes. goes_on: start anew where the conversation has become too long."""
    from fewbit.runtime.chat import TooLongError

    def show(text: str) -> None:
        if is_shown:
            print(printable_text(text), end="", flush=True)

    try:
        answer = conversation.ask(message, show)
    except TooLongError as error:
        if not goes_on or not conversation.restart():
            raise
        print(f"fewbit: {printable(str(error))}: it starts again here", file=sys.stderr)
        answer = conversation.ask(message, show)
    show("\n")
    return answer


def _typed() -> Iterator[str]:
    """What the user types, until the end of the input."""
    import contextlib

    with contextlib.suppress(ImportError):
        # With this, `input` lets the user edit a line and go back to former ones.
        import readline  # noqa: F401
    while True:
        try:
            line = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\nfewbit: Ctrl-D ends", file=sys.stderr)
            continue
        if line.strip():
            yield _clean(line)


def _lines() -> Iterator[str]:
    try:
        for line in sys.stdin:
            if line.strip():
                yield _clean(line.rstrip("\n"))
    except UnicodeDecodeError as error:
        raise _not_utf8() from error


def _read_all() -> str:
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise _not_utf8() from error


def _clean(text: str) -> str:
    """The text. Raises FewbitError if bytes of it were not UTF-8."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _not_utf8()
    return text


def _not_utf8() -> FewbitError:
    return FewbitError("standard input is not in UTF-8: convert it first")


def _figures(answers: "list[Answer]") -> str:
    """One line: tokens, speed and memory."""
    from fewbit.runtime.chat import memory_bytes, tokens_per_second
    from fewbit.sizes import show_size

    tokens, speed = sum(one.tokens for one in answers), tokens_per_second(answers)
    shown = f", {speed:.1f} tokens/s" if speed is not None else ""
    used = ", ".join(f"{show_size(size)} {where}" for where, size in memory_bytes().items() if size)
    return f"{tokens} token{'s' * (tokens != 1)} in {sum(one.seconds for one in answers):.1f} s{shown}, {used}"


def _json(folder: str, place: str, answers: "list[Answer]") -> dict[str, Any]:
    from dataclasses import asdict

    from fewbit.runtime.chat import model_facts, tokens_per_second
    from fewbit.versions import versions

    speed = tokens_per_second(answers)
    row = {
        "name": folder,
        **model_facts(place),
        "seconds": sum(one.seconds for one in answers),
        **({"tokens_per_second": speed} if speed is not None else {}),
    }
    return {"models": [row], "protocol": None, "versions": versions(), "answers": [asdict(one) for one in answers]}
