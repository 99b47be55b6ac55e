"""A cache of keys and values whose memory is allocated only once.

A transformers cache concatenates old and new keys into a new tensor for every token. This copies them, and because each
tensor is larger than the last, freed memory cannot be used again: the heap grows to several times the size of the
cache. Here nothing is copied.
"""

from typing import Any

from torch import Tensor


def grow_in_place(cache: Any, length: int) -> None:
    """Let the layers of a transformers cache store up to `length` tokens without copying earlier ones.

    This applies to layers with or without a sliding window. Other layers (recurrent states), and caches without layers,
    are not changed.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", None)
    for layer in layers if isinstance(layers, list) else []:
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.is_initialized:
            layer.update = _Growing(layer, length)


class _Growing:
    """A layer's `update`: appends new keys and values `(batch, heads, tokens, size)` to the stored ones."""

    def __init__(self, layer: Any, length: int) -> None:
        self._layer, self._seen = layer, layer.keys.shape[-2]
        self._window = layer.sliding_window if layer.is_sliding else 0
        self._keys, self._values = _room(layer.keys, length), _room(layer.values, length)

    def __call__(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values to which the new tokens attend."""
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
