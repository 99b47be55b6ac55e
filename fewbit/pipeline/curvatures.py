"""Yield the curvature of one block after another, from any source; used for quantizing and for measuring.

The weights of a block are available while it is yielded, and may be changed: Grams of later blocks are then measured on
the outputs of the changed weights.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fewbit.architecture.network import Site
from fewbit.curvature.accumulate import Accumulator
from fewbit.curvature.choice import CurvatureChoice
from fewbit.curvature.fisher import measure_fisher
from fewbit.curvature.observe import Watched
from fewbit.curvature.store import StoredCurvature
from fewbit.pipeline.heads import HEAD
from fewbit.pipeline.network import Network
from fewbit.pipeline.stages import crowded
from fewbit.pipeline.walk import Walk
from fewbit.progress import Counter

Known = Callable[[int], bool]
PutHead = Callable[[Tensor | None], None]


@dataclass(frozen=True)
class BlockCurvature:
    """The curvatures of a block. of(site): `(in, in)`, or None if the layer never ran.

    largest(site): the largest magnitude of each input `(in,)`, or None if it was not measured.
    measured: all sums by layer, if they were measured in this run. fixed: they are measured with the original weights,
    which stay in the network for later blocks.
    """

    index: int
    of: Callable[[Site], Tensor | None]
    measured: Accumulator | None = None
    fixed: bool = False
    largest: Callable[[Site], Tensor | None] = lambda site: None


@dataclass(frozen=True)
class Source:
    """What a curvature is measured on: sequences `(samples, length)` that run through a network, with `memory` bytes.

    spill: folder for hidden states that do not fit in memory. known(index): whether a block need not be measured.
    with_largest: also measure the largest inputs, for a Gram. put_head: called with the curvature of the network's
    head, or None if the head never ran; without it, the head is not measured.
    """

    network: Network
    ids: Tensor
    choice: CurvatureChoice
    memory: int
    spill: Path
    known: Known
    counter: Counter
    with_largest: bool = False
    put_head: PutHead | None = None

    def layers(self, blocks: list[int]) -> list[Watched]:
        """The linear layers of some blocks, each once."""
        sites = [site for index in blocks for site in self.network.sites[index]]
        return list({site.watched.key: site.watched for site in sites}.values())

    @property
    def head(self) -> Watched | None:
        """The head, if it is to be measured."""
        return self.network.head.watched if self.network.head is not None and self.put_head is not None else None

    def found_head(self, accumulator: Accumulator) -> None:
        """The head is measured."""
        if self.put_head is not None:
            self.put_head(accumulator.curvature(HEAD))


def gram_blocks(source: Source, original_inputs: bool) -> Iterator[BlockCurvature]:
    """Grams block by block, with changed weights in the preceding blocks, or with `original_inputs` original ones."""
    network, samples = source.network, source.ids.shape[0]
    source.counter.total = ((1 if original_inputs else 2) * len(network.blocks) + (source.head is not None)) * samples
    walk = Walk(network.model, network.blocks, source.ids, source.memory // 2, source.spill)
    for index in range(len(network.blocks)):
        accumulator = Accumulator(source.choice, source.with_largest)
        network.take(index)
        if source.known(index):
            if original_inputs:
                walk.advance(index, source.counter.step)
            else:
                source.counter.skip(samples)
        elif original_inputs:
            walk.observe_and_advance(index, source.layers([index]), accumulator, source.counter.step)
        else:
            walk.observe(index, source.layers([index]), accumulator, source.counter.step)
        yield _measured(index, accumulator, fixed=False)
        if not original_inputs:
            walk.advance(index, source.counter.step)
        network.release(index)
    if source.head is not None:
        accumulator = Accumulator(source.choice)
        source.counter.show("curvature of the head")
        walk.observe_head(source.head, accumulator, source.counter.step)
        source.found_head(accumulator)


def fisher_blocks(source: Source, stages: list[list[int]], refreshed: bool) -> Iterator[BlockCurvature]:
    """Fishers stage by stage, each in one pass over the sequences.

    refreshed: the changed weights of the preceding blocks count as part of the network.
    """
    network, samples = source.network, source.ids.shape[0]
    # Solving or storing a block takes about as long as the forward and backward pass of one sequence.
    source.counter.total = len(stages) * samples + len(network.blocks)
    for stage in stages:
        accumulator = Accumulator(source.choice)
        last = stage[-1] == len(network.blocks) - 1
        head = [source.head] if last and source.head is not None else []
        measured = [] if all(source.known(index) for index in stage) else source.layers(stage)
        if not measured and not head:
            source.counter.skip(samples)
        else:
            source.counter.show(f"curvature of blocks {stage[0] + 1} to {stage[-1] + 1}")
            recompute = crowded(network.model, source.ids.shape[1], source.memory)
            blocks = network.blocks[stage[0] if measured else -1 :]
            accumulator, _ = measure_fisher(
                network.model, blocks, measured + head, source.ids, source.choice, source.counter.step, recompute
            )
            accumulator.check_gradients()
            if head:
                source.found_head(accumulator)
        for index in stage:
            # Without a refresh, the original weights are used even if limited memory requires several passes.
            yield _measured(index, accumulator, fixed=not refreshed)
            source.counter.step()


def stored_blocks(network: Network, stored: StoredCurvature, counter: Counter) -> Iterator[BlockCurvature]:
    """Stored curvatures block by block."""
    counter.total = len(network.blocks)
    for index in range(len(network.blocks)):
        matrices = stored.block(index)
        network.take(index)
        yield BlockCurvature(index, lambda site, found=matrices: found.get(site.watched.key), fixed=True)  # type: ignore[misc]
        network.release(index)
        counter.step()


def _measured(index: int, accumulator: Accumulator, fixed: bool) -> BlockCurvature:
    return BlockCurvature(
        index,
        lambda site: accumulator.curvature(site.watched.key),
        accumulator,
        fixed,
        lambda site: accumulator.largest_inputs(site.watched.key),
    )
