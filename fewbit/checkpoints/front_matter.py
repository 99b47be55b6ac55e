"""The few lines of YAML at the start of a model card that the hub reads: written, and read as far as we use them."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

_FENCE = "---"
_LINE = re.compile(r"([A-Za-z_][\w-]*):(?:[ \t]+(.*))?")
_ITEM = re.compile(r"\s*-\s+(.*)")
_PLAIN = re.compile(r"[A-Za-z][\w./+-]*")
_YAML_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}
_LONGEST = 1 << 16


def front_matter(values: Mapping[str, str | Sequence[str]]) -> str:
    """The block for these values, with its two fences: a string for a scalar, anything else for a list."""
    lines = [_FENCE]
    for key, value in values.items():
        if isinstance(value, str):
            lines.append(f"{key}: {_scalar(value)}")
        else:
            lines += [f"{key}:", *(f"- {_scalar(one)}" for one in value)]
    return "\n".join([*lines, _FENCE, ""])


def read_front_matter(path: Path) -> dict[str, str | list[str]]:
    """The scalars and lists of strings at the top level of a card; empty without a card or a block.

    Anything else that YAML may hold is left out: this is not a reader of YAML.
    """
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = file.read(_LONGEST).lstrip("\ufeff").splitlines()
    except OSError:
        return {}
    if not lines or lines[0].rstrip() != _FENCE or _FENCE not in [line.rstrip() for line in lines[1:]]:
        return {}
    found: dict[str, str | list[str]] = {}
    key = ""
    for line in lines[1:]:
        if line.rstrip() == _FENCE:
            break
        named, item = _LINE.fullmatch(line.rstrip()), _ITEM.fullmatch(line.rstrip())
        if named is not None:
            key = named[1]
            value = _value(named[2] or "")
            if value is not None:
                found[key] = value
        elif key and item is not None and isinstance(found.get(key, []), list):
            one = _value(item[1])
            if isinstance(one, str):
                found[key] = [*found.get(key, []), one]
    return found


def _scalar(text: str) -> str:
    """A string in YAML; strings of JSON are strings of YAML."""
    return text if _PLAIN.fullmatch(text) and text.lower() not in _YAML_WORDS else json.dumps(text)


def _value(text: str) -> str | list[str] | None:
    """A scalar, or a list between brackets; None for nothing, and for what this does not read."""
    text = text.strip()
    if text.startswith('"'):
        try:
            found = json.loads(text)
        except ValueError:
            return None
        return found if isinstance(found, str) else None
    if text.startswith("'") and text.endswith("'") and len(text) > 1:
        return text[1:-1].replace("''", "'")
    if text.startswith("[") and text.endswith("]"):
        return [one for part in text[1:-1].split(",") if isinstance(one := _value(part), str)]
    text = re.split(r"\s#", text)[0].strip()
    return None if not text or text[0] in "{[&*!|>%@`#" else text
