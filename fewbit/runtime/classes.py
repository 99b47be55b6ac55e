"""The transformers class for a folder: the class that its config.json names, found through the Auto classes."""

from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from fewbit.errors import FewbitError

_FIRST = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForSeq2SeqLM")
_DECODERS = ("ForCausalLM", "LMHeadModel")


def class_of(folder: Path, config: Any) -> Any:
    """The class whose `from_pretrained` loads the folder.

    config: as transformers reads it. Without `architectures`, the class is that of a causal language model, or else of
    the base model. Raises FewbitError, with the name of the class, if no Auto class has it for this type of model.
    """
    import transformers

    named = list(getattr(config, "architectures", None) or ())
    for wanted in named:
        for auto in chain(_FIRST, _others()):
            for candidate in _classes(getattr(transformers, auto, None), config):
                if candidate.__name__ == wanted:
                    return candidate
    # The name of a decoder may be one that only its authors use, or that transformers no longer has.
    if not named or named[0].endswith(_DECODERS):
        for auto in (*_FIRST, "AutoModel"):
            if _classes(getattr(transformers, auto, None), config):
                return getattr(transformers, auto)
    kind = getattr(config, "model_type", "") or "?"
    what = f"no Auto class that has {named[0]} for it" if named else "no Auto class for it"
    raise FewbitError(f"{folder}: is a model of type {kind}, and transformers has {what}: it cannot be loaded")


def _others() -> Iterator[str]:
    """The names of all other Auto classes."""
    yield from _listed()


@cache
def _listed() -> tuple[str, ...]:
    # To list all that transformers has takes it a fifth of a second.
    import transformers

    return tuple(sorted(name for name in dir(transformers) if name.startswith("AutoModel") and name not in _FIRST))


def check_predicts_tokens(folder: Path, model: Any) -> None:
    """Raises FewbitError unless the model predicts the next token of a text, which perplexity and training need."""
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise FewbitError(
            f"{folder}: a {type(model).__name__} does not predict next tokens: a causal language model is needed"
        )


def _classes(auto: Any, config: Any) -> tuple[Any, ...]:
    """The classes that an Auto class has for a config: one, several, or none."""
    mapping = getattr(auto, "_model_mapping", None)
    if mapping is None or type(config) not in mapping:
        return ()
    found = mapping[type(config)]
    return tuple(found) if isinstance(found, list | tuple) else (found,)
