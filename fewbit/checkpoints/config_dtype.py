"""The floating-point dtype that a model's config states."""

from collections.abc import Mapping
from typing import Any

import torch

_STATED = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}
_TEXT_PARTS = ("text_config", "llm_config")
_KEYS = ("dtype", "torch_dtype")


def stated_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that a config states for the model, or else for its text part; None if it states none."""
    parts = (config.get(key) for key in _TEXT_PARTS)
    for place in (config, *(part for part in parts if isinstance(part, Mapping))):
        for key in _KEYS:
            found = _STATED.get(str(place.get(key)).removeprefix("torch."))
            if found is not None:
                return found
    return None
