"""How tensors are divided among the weight files of a folder, and how the files are named."""

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

from fewbit.checkpoints.weight_files import SINGLE_NAME

_Item = TypeVar("_Item")
_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def split_by_size(items: Iterable[_Item], size: Callable[[_Item], int], limit: int) -> list[list[_Item]]:
    """Items in order, in as many lists as needed so that none is larger than `limit` bytes, unless it has one item."""
    shards: list[list[_Item]] = [[]]
    filled = 0
    for item in items:
        if shards[-1] and filled + size(item) > limit:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += size(item)
    return shards


def shard_name(index: int, count: int) -> str:
    """File name of shard `index`, from 0, of `count`."""
    return SINGLE_NAME if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def is_shard_name(name: str) -> bool:
    """Whether :func:`shard_name` returns this name for some numbers."""
    return _NAME.fullmatch(name) is not None
