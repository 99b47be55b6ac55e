"""Recognise exceptions of transformers that are caused by the model's folder."""

from collections.abc import Iterator
from typing import Any

from fewbit.errors import is_out_of_memory, raised_in

_LIBRARIES = ("transformers", "huggingface_hub")
_PHRASES = ("ignore_mismatched_sizes", "negative dimension", "Padding_idx must be within num_embeddings")
"""What transformers and torch say of sizes in a config that cannot be."""


def known_cause(error: Exception, config: dict[str, Any]) -> str | None:
    """The first line of an exception that was caused by the folder or by what is installed; otherwise None.

    transformers raises a ValueError or an OSError if it cannot load something; from anywhere else, these are unknown.
    An ImportError can come from any package that transformers imports for a model; only fewbit's own are unknown. The
    hub's client has its own exceptions for invalid fields of a config. Lookups that transformers does not check raise
    Python's own exceptions; these are recognised only if they contain a value of the config.
    """
    if is_out_of_memory(error) or not _is_known(error, config):
        return None
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if "ignore_mismatched_sizes" in lines[0]:
        return "the shapes of its weights differ from config.json"
    return f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def _is_known(error: Exception, config: dict[str, Any]) -> bool:
    if isinstance(error, ValueError | OSError) and raised_in(error, *_LIBRARIES):
        return True
    if isinstance(error, ImportError):
        return not raised_in(error, "fewbit")
    if type(error).__name__.startswith("StrictDataclass"):
        return True
    if isinstance(error, RuntimeError | AssertionError):
        return any(phrase in str(error) for phrase in _PHRASES)
    if isinstance(error, KeyError | AttributeError):
        return any(f"'{value}'" in str(error) for value in _texts(config))
    return isinstance(error, ZeroDivisionError) and 0 in config.values()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
