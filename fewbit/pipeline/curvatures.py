"""Yields the curvature of one block after another, from any source; used for quantizing and for measuring.

The weights of a block are available while it is yielded, and may be changed: a Gram of later blocks is measured on the
outputs of the changed weights.
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
from fewbit.pipeline.network import Network
from fewbit.pipeline.stages import crowded
from fewbit.pipeline.walk import Walk
from fewbit.progress import Counter

Known = Callable[[int], bool]


@dataclass(frozen=True)
class BlockCurvature:
    """A block and what errors in its layers cost: of(site), `(in, in)`, None where a layer never ran.

    measured: all sums by layer, where they were measured here. fixed: of the original's own weights, which later blocks
    go on seeing.
    """

    index: int
    of: Callable[[Site], Tensor | None]
    measured: Accumulator | None = None
    fixed: bool = False


@dataclass(frozen=True)
class Source:
    """What a curvature is measured on: sequences `(samples, length)` through a network, within `memory` bytes.

    spill: where hidden states go that memory does not hold. known(index): blocks that need not be measured.
    """

    network: Network
    ids: Tensor
    choice: CurvatureChoice
    memory: int
    spill: Path
    known: Known
    counter: Counter

    def layers(self, blocks: list[int]) -> list[Watched]:
        """The linear layers of some blocks, each once."""
        sites = [site for index in blocks for site in self.network.sites[index]]
        return list({site.watched.key: site.watched for site in sites}.values())


def gram_blocks(source: Source, original_inputs: bool) -> Iterator[BlockCurvature]:
    """Block by block, from the inputs that the blocks before give as they are by then, or the original's own."""
    network, samples = source.network, source.ids.shape[0]
    source.counter.total = (1 if original_inputs else 2) * len(network.blocks) * samples
    walk = Walk(network.model, network.blocks, source.ids, source.memory // 2, source.spill)
    for index in range(len(network.blocks)):
        accumulator = Accumulator(source.choice)
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


def fisher_blocks(source: Source, stages: list[list[int]], refreshed: bool) -> Iterator[BlockCurvature]:
    """Stage by stage, each by one pass over the sequences; `refreshed`: with the blocks before as they are by then."""
    network, samples = source.network, source.ids.shape[0]
    # To solve or store a block takes about as long as one sequence forward and back.
    source.counter.total = len(stages) * samples + len(network.blocks)
    for stage in stages:
        accumulator = Accumulator(source.choice)
        if all(source.known(index) for index in stage):
            source.counter.skip(samples)
        else:
            source.counter.show(f"curvature of blocks {stage[0] + 1} to {stage[-1] + 1}")
            recompute = crowded(network.model, source.ids.shape[1], source.memory)
            blocks, layers = network.blocks[stage[0] :], source.layers(stage)
            accumulator, _ = measure_fisher(
                network.model, blocks, layers, source.ids, source.choice, source.counter.step, recompute
            )
            accumulator.check_gradients()
        for index in stage:
            # Measured once means with the original's weights, also where memory makes several passes of it.
            yield _measured(index, accumulator, fixed=not refreshed)
            source.counter.step()


def stored_blocks(network: Network, stored: StoredCurvature, counter: Counter) -> Iterator[BlockCurvature]:
    """Block by block, as it was measured before."""
    counter.total = len(network.blocks)
    for index in range(len(network.blocks)):
        matrices = stored.block(index)
        network.take(index)
        yield BlockCurvature(index, lambda site, found=matrices: found.get(site.watched.key), fixed=True)  # type: ignore[misc]
        network.release(index)
        counter.step()


def _measured(index: int, accumulator: Accumulator, fixed: bool) -> BlockCurvature:
    return BlockCurvature(index, lambda site: accumulator.curvature(site.watched.key), accumulator, fixed)
