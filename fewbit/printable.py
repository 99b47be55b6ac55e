"""Makes names and data from outside safe for a terminal: one line, without control characters."""

import unicodedata

from fewbit.errors import FewbitError

_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Control, format (with what turns the direction of text), halves of pairs, private use, breaks of line."""


def printable(text: str) -> str:
    r"""The text with control characters, breaks and the like as escapes (``\x1b``, ``\n``); others stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(letter) for letter in text)


def check_name(name: str) -> None:
    """Raises FewbitError for a file name that is not UTF-8, since no report, job or page could contain it."""
    if "\0" in name or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise FewbitError(f"{printable(name)}: the name is not in UTF-8: rename it")


def markup_free(text: str) -> str:
    """:func:`printable`, for where rich reads markup: ``[red]`` is shown, not obeyed."""
    from rich.markup import escape

    return escape(printable(text))


def _shown(letter: str) -> str:
    if unicodedata.category(letter) not in _INVISIBLE:
        return letter
    return letter.encode("unicode_escape").decode("ascii")
