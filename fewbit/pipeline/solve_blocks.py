"""Solve the weights of one block after another, save each immediately, and put them into the running network."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewbit.architecture.network import Site
from fewbit.architecture.orientation import to_matrix
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import Checkpoint
from fewbit.errors import FewbitError
from fewbit.formats import native
from fewbit.pipeline.curvatures import BlockCurvature
from fewbit.pipeline.fold import Folding, fold_block
from fewbit.pipeline.network import Network
from fewbit.pipeline.plan import PlannedTensor
from fewbit.pipeline.quantize_tensor import SolvedWeight, assemble, solved_facts
from fewbit.pipeline.solve_weight import solve_alike, solve_weight
from fewbit.pipeline.solved_store import SolvedStore
from fewbit.pipeline.walk import Walk
from fewbit.progress import Counter
from fewbit.recipe import Recipe
from fewbit.solvers.settled import NotFiniteError
from fewbit.solvers.solved import Solved
from fewbit.solvers.weight import NO_INPUT, round_weight

_SAMPLE_TOKENS = 24


@dataclass
class BlockSolver:
    """Solves one block after another.

    items: planned tensors by name. paths: how each weight was computed, for the report. notes: on folded transforms,
    for the report. sample: hidden states of a short sample that runs through the network if a transform is folded.
    """

    recipe: Recipe
    items: dict[str, PlannedTensor]
    store: SolvedStore
    network: Network
    counter: Counter
    paths: dict[str, str] = field(default_factory=dict)
    sample: Walk | None = None
    notes: list[dict[str, Any]] = field(default_factory=list)

    def begin(self) -> None:
        """Must be called while the whole network is on one device."""
        if self.recipe.transform.kind.folded:
            ids = torch.arange(_SAMPLE_TOKENS).unsqueeze(0) + 5
            self.sample = Walk(self.network.model, self.network.blocks, ids, 1 << 30)

    def solve_block(self, block: BlockCurvature) -> None:
        """Solve the weights of a block, or take them from an interrupted run, and put them into the network."""
        index, curvature = block.index, block.of
        if self.recipe.transform.kind.folded:
            self._fold(index, block)
        by_tensor: dict[str, list[Site]] = {}
        for site in self.network.sites[index]:
            by_tensor.setdefault(site.tensor.entry.name, []).append(site)
        for names in self._together(by_tensor, curvature):
            found = [self.store.find(name) for name in names]
            if any(one is None for one in found):
                # All are solved again, so that a run that was interrupted in between ends with the same bytes.
                found = self._solve_together({name: by_tensor[name] for name in names}, curvature)
            for name, one in zip(names, found, strict=True):
                assert one is not None
                self._take(name, one, by_tensor[name], install=not block.fixed)
            self.counter.show(f"block {index + 1} of {len(self.network.blocks)}, error {_error(found[-1]):.2%}")

    def _together(
        self, by_tensor: dict[str, list[Site]], curvature: Callable[[Site], Tensor | None]
    ) -> list[list[str]]:
        """Names of tensors that are solved together: layers that share a curvature and are stored in the same way."""
        groups: dict[Any, list[str]] = {}
        for name, sites in by_tensor.items():
            item, matrix = self.items[name], curvature(sites[0])
            alone = len(sites) > 1 or matrix is None
            key = name if alone or matrix is None else (matrix.data_ptr(), item.choices)
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def _take(self, name: str, found: SolvedWeight, sites: list[Site], install: bool) -> None:
        self.paths[name] = found.record.path or ""
        if install:
            decoded = native.decode(found.parts, found.stored)
            first = 0
            for site in sites:
                site.write(decoded[first : first + site.rows])
                first += site.rows

    def _fold(self, index: int, measured: BlockCurvature) -> None:
        """Scale the channels of a block; unquantized tensors that this changes are stored for the output."""
        block, sites = self.network.blocks[index], self.network.sites[index]
        sample = self.sample
        assert sample is not None
        if self.solved(index):
            for name, parameter in block.named_parameters():
                changed = self.store.kept(self.network.kept[index].get(name, ""))
                if changed is not None:
                    parameter.data.copy_(changed)
            self.notes += self.store.notes(index)
            # The sample needs no exact values; it only has to reach the next block.
            sample.advance(index, _nothing)
            return

        def rounding(site: Site, weight: Tensor) -> Tensor:
            return round_weight(weight, self.items[site.tensor.entry.name].choices)

        before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
        folding = Folding(self.recipe.transform.kind, rounding, measured.largest)
        notes = fold_block(block, sites, measured.of, folding, partial(sample.change, index))
        self.notes += notes
        self.store.put_notes(index, notes)
        matrices = {id(site.watched.weight) for site in sites}
        for name, parameter in block.named_parameters():
            if id(parameter) not in matrices and not torch.equal(parameter, before[name]):
                self.store.put_kept(self.network.kept[index][name], parameter.detach().cpu())
        sample.advance(index, _nothing)

    def solved(self, index: int) -> bool:
        """Whether an interrupted run has solved the whole block."""
        return all(self.store.find(site.tensor.entry.name) is not None for site in self.network.sites[index])

    def round_outside(self, item: PlannedTensor, checkpoint: Checkpoint) -> None:
        """Round a weight outside the blocks, which has no curvature."""
        found = self.store.find(item.tensor.entry.name)
        if found is None:
            with FileReader() as reader:
                whole = reader.tensor(item.tensor.entry)
            # This is reported as a fallback, unless the tensor was included by name.
            idle = item.tensor.reason != "included"
            found = self._solve(item, [(to_matrix(whole, item.tensor.transposed), None)], idle)
        self.paths[item.tensor.entry.name] = found.record.path or ""

    def _solve_together(
        self, by_tensor: dict[str, list[Site]], curvature: Callable[[Site], Tensor | None]
    ) -> list[SolvedWeight | None]:
        """Solve the tensors of one group and store them."""
        if len(by_tensor) > 1:
            sites = [found[0] for found in by_tensor.values()]
            items = [self.items[name] for name in by_tensor]
            try:
                weights = [site.read() for site in sites]
                solved = solve_alike(weights, curvature(sites[0]), items[0].recipe, items[0].stored.scheme)
                return [self._keep(item, [one]) for item, one in zip(items, solved, strict=True)]
            except (NotFiniteError, FewbitError):
                # Solved one by one below, so that the error names the tensor.
                pass
        kept: list[SolvedWeight | None] = []
        for name, found in by_tensor.items():
            matrices = [(site.read(), curvature(site)) for site in found]
            idle = any(_idle(site, matrix) for site, (_, matrix) in zip(found, matrices, strict=True))
            # One expert may receive no tokens, but not all experts.
            idle = idle or (len(matrices) > 1 and all(matrix is None for _, matrix in matrices))
            kept.append(self._solve(self.items[name], matrices, idle))
        return kept

    def _solve(
        self, item: PlannedTensor, matrices: list[tuple[Tensor, Tensor | None]], idle: bool = False
    ) -> SolvedWeight:
        name, solved = item.tensor.entry.name, []
        for weight, matrix in matrices:
            try:
                solved.append(solve_weight(weight, matrix, item.recipe, item.stored.scheme))
            except NotFiniteError as error:
                raise FewbitError(f"{name}: a weight is NaN or infinite: the checkpoint is damaged") from error
            except FewbitError as error:
                raise FewbitError(f"{name}: {error}") from error
        return self._keep(item, solved, idle)

    def _keep(self, item: PlannedTensor, solved: list[Solved], idle: bool = False) -> SolvedWeight:
        """Store a tensor whose parts were solved; the parts are joined along the rows."""
        spans: list[tuple[int, int]] = []
        for one in solved:
            first = spans[-1][0] + spans[-1][1] if spans else 0
            spans.append((first, one.decoded.shape[0]))
        whole = assemble(item, [one.rows for one in solved], spans)
        facts = solved_facts(solved)
        unseen = [index for index, one in enumerate(solved) if one.path == NO_INPUT]
        if idle:
            facts["path"] = "fallback: it never ran on the calibration text, or no gradient reached it"
        unreached = unseen if unseen and len(solved) > 1 else None
        record = replace(whole.record, experts_without_input=unreached, **facts)
        return self.store.put(item.tensor.entry.name, replace(whole, record=record))


def _error(found: SolvedWeight | None) -> float:
    return found.record.relative_squared_error or 0.0 if found is not None else 0.0


def _idle(site: Site, matrix: Tensor | None) -> bool:
    """Whether a layer had no input although it is not an expert."""
    return matrix is None and site.watched.expert is None


def _nothing() -> None:
    """A step of progress that is not shown."""
