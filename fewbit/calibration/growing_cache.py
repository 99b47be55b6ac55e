"""Keys and values of earlier tokens in memory that is taken once: nothing is copied when a token is added."""

from typing import Any

from torch import Tensor


def grow_in_place(cache: Any, length: int) -> None:
    """Let the plain layers of a transformers cache hold up to `length` tokens without copying what is there.

    Layers of other kinds (sliding windows, recurrent states), and caches that have none, are left alone.
    """
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", None)
    for layer in layers if isinstance(layers, list) else []:
        if type(layer) is DynamicLayer and layer.is_initialized:
            layer.update = _Growing(layer, length)


class _Growing:
    """A layer's `update`: new keys and values `(batch, heads, tokens, size)` go behind those that are there."""

    def __init__(self, layer: Any, length: int) -> None:
        self._layer, self._seen = layer, layer.keys.shape[-2]
        self._keys, self._values = _room(layer.keys, length), _room(layer.values, length)

    def __call__(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        end = self._seen + keys.shape[-2]
        self._keys[..., self._seen : end, :] = keys
        self._values[..., self._seen : end, :] = values
        self._seen = end
        self._layer.keys, self._layer.values = self._keys[..., :end, :], self._values[..., :end, :]
        return self._layer.keys, self._layer.values


def _room(held: Tensor, length: int) -> Tensor:
    room = held.new_empty(*held.shape[:-2], length, held.shape[-1])
    room[..., : held.shape[-2], :] = held
    return room
