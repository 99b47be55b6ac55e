"""Solve the weights of one block after another, keep each at once, and put them into the network that runs on."""

from collections.abc import Callable
from dataclasses import dataclass, field
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
from fewbit.pipeline.awq import fold_block
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.plan import PlannedTensor
from fewbit.pipeline.quantize_tensor import assemble
from fewbit.pipeline.quantize_weight import NotFiniteError
from fewbit.pipeline.solve_weight import NO_INPUT, round_weight, solve_weight, solve_weights
from fewbit.pipeline.solved import Solved
from fewbit.pipeline.solved_store import SolvedStore, SolvedWeight
from fewbit.pipeline.walk import Walk
from fewbit.recipe import Recipe

Progress = Callable[[int, int, str], None]
_SAMPLE_TOKENS = 24


@dataclass(frozen=True)
class Network:
    """The model that runs, its blocks, and where the tensors to quantize are in it, block by block.

    kept: for every block, the names of the other tensors of the checkpoint by their parameters in the block.
    """

    model: Any
    blocks: list[Any]
    sites: list[list[Site]]
    items: dict[str, PlannedTensor]
    kept: list[dict[str, str]]
    device: torch.device

    def take(self, index: int) -> None:
        """Give a block weights of its own, on the device that computes.

        Until then they are mapped from the checkpoint's files, so that a walk holds those of one block.
        """
        for tensor in _tensors(self.blocks[index]):
            tensor.data = tensor.data.to(self.device, copy=True)

    def release(self, index: int) -> None:
        """Free a block that a walk has passed."""
        for tensor in _tensors(self.blocks[index]):
            tensor.data = tensor.data.new_empty(0)


def _tensors(block: Any) -> list[Tensor]:
    return [*block.parameters(), *block.buffers()]


@dataclass
class BlockSolver:
    """Solving one block after another, with what the progress line shows."""

    recipe: Recipe
    options: CalibrationOptions
    store: SolvedStore
    network: Network
    progress: Progress | None
    paths: dict[str, str] = field(default_factory=dict)
    done: int = 0
    total: int = 1
    what: str = ""
    sample: Walk | None = None
    notes: list[dict[str, Any]] = field(default_factory=list)

    def step(self, *_: Any) -> None:
        """One sequence through one block, or one sequence forward and back."""
        self.done += 1
        self.show()

    def show(self) -> None:
        """Bring the progress line up to date."""
        if self.progress:
            self.progress(min(self.done, self.total), self.total, self.what)

    def begin(self) -> None:
        """To be called while the whole network is on one device."""
        if self.recipe.channel_scales == "awq":
            ids = torch.arange(_SAMPLE_TOKENS).unsqueeze(0) + 5
            self.sample = Walk(self.network.model, self.network.blocks, ids, 1 << 30)

    def solve_block(self, index: int, curvature: Callable[[Site], Tensor | None], install: bool = True) -> None:
        """Solve the weights of a block, or take them from an interrupted run; `install` puts them into the network."""
        if self.recipe.channel_scales == "awq":
            self._fold(index, curvature)
        by_tensor: dict[str, list[Site]] = {}
        for site in self.network.sites[index]:
            by_tensor.setdefault(site.tensor.entry.name, []).append(site)
        for names in self._together(by_tensor, curvature):
            found = [self.store.find(name) for name in names]
            if any(one is None for one in found):
                # All of them, so that a run that was interrupted between two ends with the same bytes.
                found = self._solve_together({name: by_tensor[name] for name in names}, curvature)
            for name, one in zip(names, found, strict=True):
                assert one is not None
                self._take(name, one, by_tensor[name], install)
            self.what = f"block {index + 1} of {len(self.network.blocks)}, error {_error(found[-1]):.2%}"
            self.show()

    def _together(
        self, by_tensor: dict[str, list[Site]], curvature: Callable[[Site], Tensor | None]
    ) -> list[list[str]]:
        """Names of tensors that are solved together: plain layers that share their curvature and are stored alike."""
        groups: dict[Any, list[str]] = {}
        for name, sites in by_tensor.items():
            item, matrix = self.network.items[name], curvature(sites[0])
            assert item.stored is not None
            alone = len(sites) > 1 or matrix is None
            key = name if alone or matrix is None else (matrix.data_ptr(), item.stored.scheme)
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def _take(self, name: str, found: SolvedWeight, sites: list[Site], install: bool) -> None:
        self.paths[name] = found.record["path"]
        if install:
            decoded = native.decode(found.parts, found.stored)
            first = 0
            for site in sites:
                site.write(decoded[first : first + site.rows])
                first += site.rows

    def _fold(self, index: int, curvature: Callable[[Site], Tensor | None]) -> None:
        """Scale the channels of a block; what is not quantized and changed by that is kept for the output."""
        block, sites = self.network.blocks[index], self.network.sites[index]
        sample = self.sample
        assert sample is not None
        if self.solved(index):
            for name, parameter in block.named_parameters():
                changed = self.store.kept(self.network.kept[index].get(name, ""))
                if changed is not None:
                    parameter.data.copy_(changed)
            self.notes += self.store.notes(index)
            # The sample only has to reach the next block in some plausible form.
            sample.advance(index, _nothing)
            return

        def rounding(site: Site, weight: Tensor) -> Tensor:
            item = self.network.items[site.tensor.entry.name]
            assert item.stored is not None
            return round_weight(weight, self.recipe, item.stored.scheme)

        before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
        notes = fold_block(block, sites, curvature, rounding, partial(sample.change, index))
        self.notes += notes
        self.store.put_notes(index, notes)
        matrices = {id(site.watched.weight) for site in sites}
        for name, parameter in block.named_parameters():
            if id(parameter) not in matrices and not torch.equal(parameter, before[name]):
                self.store.put_kept(self.network.kept[index][name], parameter.detach().cpu())
        sample.advance(index, _nothing)

    def solved(self, index: int) -> bool:
        """Whether an interrupted run has solved all of a block."""
        return all(self.store.find(site.tensor.entry.name) is not None for site in self.network.sites[index])

    def round_outside(self, item: PlannedTensor, checkpoint: Checkpoint) -> None:
        """A weight outside the blocks has no curvature: it is rounded."""
        found = self.store.find(item.tensor.entry.name)
        if found is None:
            with FileReader() as reader:
                whole = reader.tensor(item.tensor.entry)
            # Only what was asked for by name goes without a word.
            idle = item.tensor.reason != "included"
            found = self._solve(item, [(to_matrix(whole, item.tensor.transposed), None)], idle)
        self.paths[item.tensor.entry.name] = found.record["path"]

    def _solve_together(
        self, by_tensor: dict[str, list[Site]], curvature: Callable[[Site], Tensor | None]
    ) -> list[SolvedWeight | None]:
        """Solve the tensors of one group and keep them."""
        if len(by_tensor) > 1:
            sites = [found[0] for found in by_tensor.values()]
            items = [self.network.items[name] for name in by_tensor]
            assert items[0].stored is not None
            try:
                weights = [site.read() for site in sites]
                solved = solve_weights(weights, curvature(sites[0]), self.recipe, items[0].stored.scheme)
                return [self._keep(item, [one]) for item, one in zip(items, solved, strict=True)]
            except (NotFiniteError, FewbitError):
                # One by one the error says which of them it is.
                pass
        kept: list[SolvedWeight | None] = []
        for name, found in by_tensor.items():
            matrices = [(site.read(), curvature(site)) for site in found]
            idle = any(_idle(site, matrix) for site, (_, matrix) in zip(found, matrices, strict=True))
            # One expert may go without tokens, not all of them.
            idle = idle or (len(matrices) > 1 and all(matrix is None for _, matrix in matrices))
            kept.append(self._solve(self.network.items[name], matrices, idle))
        return kept

    def _solve(
        self, item: PlannedTensor, matrices: list[tuple[Tensor, Tensor | None]], idle: bool = False
    ) -> SolvedWeight:
        assert item.stored is not None
        name, solved = item.tensor.entry.name, []
        for weight, matrix in matrices:
            try:
                solved.append(solve_weight(weight, matrix, self.recipe, item.stored.scheme))
            except NotFiniteError as error:
                raise FewbitError(f"{name}: a weight is NaN or infinite: the checkpoint is damaged") from error
            except FewbitError as error:
                raise FewbitError(f"{name}: {error}") from error
        return self._keep(item, solved, idle)

    def _keep(self, item: PlannedTensor, solved: list[Solved], idle: bool = False) -> SolvedWeight:
        """Store a tensor whose parts, one below the other, were solved."""
        assert item.stored is not None
        spans: list[tuple[int, int]] = []
        for one in solved:
            first = spans[-1][0] + spans[-1][1] if spans else 0
            spans.append((first, one.decoded.shape[0]))
        stored, parts, record = assemble(item, item.stored, [one.rows for one in solved], spans, self.recipe)
        paths = sorted({one.path for one in solved})
        record["path"] = next((path for path in paths if path.startswith("fallback")), "; ".join(paths))
        if idle:
            record["path"] = "fallback: it never ran on the calibration text, or no gradient reached it"
        unseen = [index for index, one in enumerate(solved) if one.path == NO_INPUT]
        if unseen and len(solved) > 1:
            record["experts_without_input"] = unseen
        predicted = [one.predicted for one in solved if one.predicted is not None]
        if predicted:
            record["relative_curvature_error"] = sum(predicted) / len(predicted)
        return self.store.put(item.tensor.entry.name, SolvedWeight(stored, parts, record))


def _error(found: SolvedWeight | None) -> float:
    return float(found.record["relative_squared_error"]) if found is not None else 0.0


def _idle(site: Site, matrix: Tensor | None) -> bool:
    """Whether a layer saw no input though it is no expert, which may go without."""
    return matrix is None and site.watched.expert is None


def _nothing() -> None:
    """No progress to show."""
