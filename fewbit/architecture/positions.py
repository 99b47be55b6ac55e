"""How long a sequence a model can take."""

from typing import Any

_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx")


def positions_of(config: Any) -> int | None:
    """The maximum sequence length of a model, or None if its configuration does not state it.

    config: of transformers, or its JSON.
    """
    if isinstance(config, dict):
        config = config.get("text_config") or config
        found = next((config[name] for name in _POSITIONS if isinstance(config.get(name), int)), None)
    else:
        inner = config.get_text_config()
        found = next((value for name in _POSITIONS if isinstance(value := getattr(inner, name, None), int)), None)
    return found if found and found > 0 else None
