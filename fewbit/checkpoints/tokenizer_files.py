"""Check the JSON files of a tokenizer: transformers uses their values without looking at them."""

from pathlib import Path
from typing import Any

from fewbit.checkpoints.json_in import Rule, check_values, read_json_object
from fewbit.errors import FewbitError

_OTHERS = ("added_tokens.json", "chat_template.json")


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_token(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _are_tokens(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else value
    return value is None or (isinstance(value, dict | list) and all(map(_is_token, values)))


def _are_numbered(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and all(number.isdecimal() and isinstance(token, dict) and _is_token(token) for number, token in value.items())
    )


def _are_templates(value: Any) -> bool:
    if not isinstance(value, list):
        return True
    return all(isinstance(one, dict) and {"name", "template"} <= one.keys() for one in value)


def _are_added(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and isinstance(one.get("id"), int) and isinstance(one.get("content"), str)
        for one in value
    )


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value))


_TEXT: Rule = (_is_text, "a string")
_CODE: Rule = (lambda value: value is None or isinstance(value, dict | list), "an object")
_TOKEN: Rule = (_is_token, "a string, or an object with content")
_TOKENS: Rule = (_are_tokens, "a list of tokens, or an object of them")
_SPECIAL: dict[str, Rule] = {
    **{f"{kind}_token": _TOKEN for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")},
    "additional_special_tokens": _TOKENS,
    "extra_special_tokens": _TOKENS,
}
_RULES: dict[str, dict[str, Rule]] = {
    "tokenizer_config.json": {
        "tokenizer_class": _TEXT,
        "auto_map": _CODE,
        **_SPECIAL,
        "model_specific_special_tokens": (lambda value: value is None or isinstance(value, dict), "an object"),
        "added_tokens_decoder": (_are_numbered, "an object of tokens by their numbers"),
        "chat_template": (_are_templates, "a string, or a list of objects with name and template"),
        "model_input_names": (_is_names, "a list of strings"),
        "split_special_tokens": (lambda value: isinstance(value, bool), "true or false"),
    },
    "special_tokens_map.json": _SPECIAL,
    "config.json": {"tokenizer_class": _TEXT, "auto_map": _CODE},
}
"""File -> key -> what its value must be; files without some key are valid."""
_WHOLE: dict[str, Rule] = {
    "model": (lambda value: isinstance(value, dict), "an object"),
    "added_tokens": (_are_added, "a list of objects with id and content"),
}
"""Keys that tokenizer.json must have."""


def check_tokenizer_files(folder: Path) -> None:
    """Raises FewbitError that names the file and the key if a value is of the wrong kind, or if a file is not JSON.

    tokenizer.json is left to :func:`check_whole_tokenizer`.
    """
    for name in (*_RULES, *_OTHERS):
        path = folder / name
        if path.is_file():
            check_values(path, read_json_object(path), _RULES.get(name, {}))


def check_whole_tokenizer(folder: Path) -> None:
    """As :func:`check_tokenizer_files`, for tokenizer.json. Large ones take seconds, so only after a failure."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    data = read_json_object(path)
    for key in _WHOLE:
        if key not in data:
            raise FewbitError(f"{path}: has no {key}: the file is damaged: fetch it again")
    check_values(path, data, _WHOLE)
