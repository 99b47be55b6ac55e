"""Tensors are divided among files in order, by size."""

import pytest

from fewbit.checkpoints.shards import is_shard_name, shard_name, split_by_size


@pytest.mark.parametrize(
    ("sizes", "limit", "wanted"),
    [
        ([], 5, [[]]),
        ([9], 5, [[9]]),
        ([2, 3, 1, 9, 1], 5, [[2, 3], [1], [9], [1]]),
        ([1, 1, 1], 3, [[1, 1, 1]]),
        ([0, 5, 0], 5, [[0, 5, 0]]),
    ],
)
def test_items_are_divided(sizes: list[int], limit: int, wanted: list[list[int]]) -> None:
    assert split_by_size(sizes, lambda size: size, limit) == wanted


def test_names() -> None:
    assert [shard_name(0, 1), shard_name(1, 12)] == ["model.safetensors", "model-00002-of-00012.safetensors"]
    assert all(is_shard_name(shard_name(index, count)) for index, count in ((0, 1), (0, 2), (99_998, 99_999)))
    assert not any(map(is_shard_name, ("model.safetensors.index.json", "my.safetensors", "model-1-of-2.safetensors")))
