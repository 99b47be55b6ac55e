"""Read JSON from untrusted sources. All such JSON is read here, so that any invalid file gives a one-line error."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fewbit.errors import FewbitError
from fewbit.printable import one_line

MOST_BYTES = 256 << 20
_DEEPEST = 100
_LONGEST_NUMBER = 400

Rule = tuple[Callable[[Any], bool], str]
"""What a value must be: a test, and its description for a message."""


def read_json_object(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Raises FewbitError if the file is missing, too large, or not a valid JSON object."""
    try:
        with path.open("rb") as file:
            text = file.read(most_bytes + 1)
    except OSError as error:
        raise FewbitError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(text) > most_bytes:
        raise FewbitError(f"{path}: larger than {most_bytes >> 20} MB, which is too large for a file of this kind")
    try:
        data = parse_json(text)
    except ValueError as error:
        raise FewbitError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise FewbitError(f"{path}: not a JSON object")
    return data


def check_values(path: Path, data: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Raises FewbitError that names the file and the key if a value of a JSON object is of the wrong kind."""
    for key, (is_valid, wanted) in rules.items():
        if key in data and not is_valid(data[key]):
            found = one_line(json.dumps(data[key], ensure_ascii=False), 60)
            raise FewbitError(f"{path}: its {key} must be {wanted}, not {found}: correct or fetch the file again")


def parse_json(text: bytes | str, strict: bool = False) -> Any:
    """The value of a JSON text.

    Raises ValueError if the text is not UTF-8 or not JSON, is nested more than 100 deep, contains numbers of hundreds
    of digits, or has one key twice with different values. strict: also for any duplicate key, and for NaN and Infinity,
    which JSON does not have (some configs contain them, and transformers reads those).
    """
    try:
        data = json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            object_pairs_hook=_unique if strict else _unambiguous,
            parse_int=_whole_number,
            parse_constant=_refuse_constant if strict else float,
        )
    except RecursionError:
        raise ValueError(f"nested more than {_DEEPEST} deep") from None
    _check_values(data, strict)
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice in it")
    return result


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        for name, value in pairs:
            if result[name] != value:
                raise ValueError(f"{name!r} occurs twice with different values")
    return result


def _whole_number(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _check_values(data: Any, strict: bool) -> None:
    """Raise ValueError for values that are nested too deeply, and for strings that cannot be encoded as UTF-8.

    It is not recursive.
    """
    level = [data]
    for _ in range(_DEEPEST):
        level = [inner for value in level for inner in _inside(value, strict)]
        if not level:
            return
    raise ValueError(f"nested more than {_DEEPEST} deep")


def _inside(value: Any, strict: bool) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list):
        yield from value
    elif isinstance(value, str):
        # An unpaired escape such as \ud800 can be read, but it cannot be written again.
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError("a string with half of a surrogate pair in it")
    elif strict and isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number too large for a float")
