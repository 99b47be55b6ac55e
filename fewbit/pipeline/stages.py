"""How many blocks' curvatures fit in memory at a time, and checks of a run's limits."""

from collections.abc import Sequence
from typing import Any

from fewbit.architecture.network import Site
from fewbit.architecture.positions import positions_of
from fewbit.errors import FewbitError
from fewbit.memory import activation_bytes
from fewbit.sizes import show_size


def matrix_bytes(sites: list[list[Site]], of_head: int = 0) -> list[int]:
    """Bytes of the curvatures of each block's layers, float32. of_head: those of the head's, measured with the last."""
    sizes = [sum({site.watched.key: 4 * site.columns**2 for site in block}.values()) for block in sites]
    return [*sizes[:-1], sizes[-1] + of_head]


def stages_of(sizes: Sequence[int], refresh: int, memory_bytes: int) -> list[list[int]]:
    """Blocks whose curvature is measured in one pass: `refresh` of them, or as many as fit (`refresh` 0).

    sizes: from :func:`matrix_bytes`. Raises FewbitError if the matrices of one block, or of one refresh, do not fit.
    """
    stages: list[list[int]] = [[]]
    filled = 0
    for index, size in enumerate(sizes):
        if size > memory_bytes:
            raise FewbitError(
                f"block {index + 1}: its curvature takes {show_size(size)}, but --memory allows "
                f"{show_size(memory_bytes)}: give at least {show_size(max(sizes))}"
            )
        crowded = filled + size > memory_bytes
        full = len(stages[-1]) >= refresh if refresh else crowded
        if crowded and refresh and not full:
            raise FewbitError(
                f"the curvature of {refresh} blocks takes more than the {show_size(memory_bytes)} of --memory: raise "
                "--memory, or refresh more often"
            )
        if stages[-1] and full:
            stages.append([])
            filled = 0
        stages[-1].append(index)
        filled += size
    return stages


def crowded(model: Any, length: int, memory_bytes: int) -> bool:
    """Whether one sequence's activations would take more than a quarter of a run's memory limit."""
    return activation_bytes(model.config, length) > memory_bytes // 4


def check_length(config: Any, length: int) -> None:
    """Raise FewbitError if sequences of `length` tokens are too long for a model. config: of transformers, or its JSON.

    A model with a table of positions fails beyond it; one with rotary positions was not trained there.
    """
    positions = positions_of(config)
    if positions is not None and length > positions:
        raise FewbitError(
            f"--sequence-length {length}: the model's maximum length is {positions}: use {positions} or less"
        )
