"""Makes names and data from outside safe for a terminal: one line, without control characters."""

import unicodedata

from fewbit.errors import FewbitError

_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Control, format (with what turns the direction of text), halves of pairs, private use, breaks of line."""
_IN_TEXT = "\n\t\u200c\u200d"


def printable(text: str) -> str:
    r"""The text with control characters, breaks and the like as escapes (``\x1b``, ``\n``); others stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(letter) for letter in text)


def printable_text(text: str) -> str:
    """The same for text of several lines: breaks of line and tabs stay, and what joins letters of many scripts."""
    return "".join(letter if letter in _IN_TEXT else _shown(letter) for letter in text)


def one_line(text: object, longest: int | None = None) -> str:
    """Text from files and libraries as one printable line, without blank lines; cut off after `longest` characters."""
    line = printable(" ".join(part.strip() for part in str(text).splitlines() if part.strip()))
    return line if longest is None or len(line) <= longest else f"{line[: longest - 1]}…"


def first_line(error: BaseException, longest: int = 300) -> str:
    """The first line of an error's message that is not blank, as :func:`one_line`; its type if there is no message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line(lines[0] if lines else type(error).__name__, longest)


def check_name(name: str) -> None:
    """Raises FewbitError for a file name that is not UTF-8, since no report, job or page could contain it."""
    if "\0" in name or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise FewbitError(f"{printable(name)}: the name is not in UTF-8: rename it")


def markup_free(text: str) -> str:
    """:func:`printable`, for where rich reads markup: ``[red]`` is shown, not obeyed."""
    from rich.markup import escape

    return escape(printable(text))


def is_invisible(letter: str) -> bool:
    """Whether a character is escaped by :func:`printable`."""
    return unicodedata.category(letter) in _INVISIBLE


def _shown(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii") if is_invisible(letter) else letter
