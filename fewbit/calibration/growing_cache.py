"""Keys and values of earlier tokens in memory that is taken once.

A transformers cache joins old and new keys into a new tensor for every token. Nothing is copied here; and a heap whose
pieces grow by a token each time cannot use the ones that were freed, and grows to several times of what is held.
"""

from typing import Any

from torch import Tensor


def grow_in_place(cache: Any, length: int) -> None:
    """Let the layers of a transformers cache hold up to `length` tokens without copying what is there.

    Layers with or without a sliding window; others (recurrent states), and caches without layers, are left alone.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", None)
    for layer in layers if isinstance(layers, list) else []:
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.is_initialized:
            layer.update = _Growing(layer, length)


class _Growing:
    """A layer's `update`: new keys and values `(batch, heads, tokens, size)` go behind those that are there."""

    def __init__(self, layer: Any, length: int) -> None:
        self._layer, self._seen = layer, layer.keys.shape[-2]
        self._window = layer.sliding_window if layer.is_sliding else 0
        self._keys, self._values = _room(layer.keys, length), _room(layer.values, length)

    def __call__(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values that the new tokens see."""
        new, seen = keys.shape[-2], self._seen
        self._keys[..., seen : seen + new, :] = keys
        self._values[..., seen : seen + new, :] = values
        self._seen += new
        kept = self._seen
        if self._window:
            self._layer.cumulative_length += new
            seen, kept = min(seen, self._window - 1), min(kept, self._window - 1)
        self._layer.keys, self._layer.values = self._last(kept)
        return self._last(seen + new)

    def _last(self, tokens: int) -> tuple[Tensor, Tensor]:
        part = slice(self._seen - tokens, self._seen)
        return self._keys[..., part, :], self._values[..., part, :]


def _room(held: Tensor, length: int) -> Tensor:
    room = held.new_empty(*held.shape[:-2], length, held.shape[-1])
    room[..., : held.shape[-2], :] = held
    return room
