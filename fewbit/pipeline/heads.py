"""The output head of a network, which is solved with a curvature of its own.

The head is a linear layer after the blocks. If it is tied to the embeddings, their table is the head's weight. It can
have a quarter of a million rows, so only its curvature is kept, and its rows are solved a few at a time when they are
written.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fewbit.architecture.block_lists import is_head
from fewbit.architecture.names import Target
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import Checkpoint
from fewbit.curvature.choice import CurvatureChoice
from fewbit.curvature.observe import Watched
from fewbit.pipeline.plan import Plan, PlannedTensor
from fewbit.pipeline.quantize_tensor import SolvedWeight, Workers, quantize_tensor, solve_tensor
from fewbit.pipeline.solved_store import SolvedStore
from fewbit.recipe import Recipe
from fewbit.solvers.choice import SolverChoice

HEAD = "head"
"""The key of the head's curvature; layers in blocks have longer ones."""
SOLVER = SolverChoice("column", damping=0.1, act_order=True, importance="inverse")
"""How heads are solved, whatever the method of the layers (`benchmarks/head_curvature.py`, docs/experiments.md)."""
NOT_MEASURED = "rounded: the stored curvature has none of the head; the same `fewbit curvature` command adds it"


@dataclass(frozen=True)
class Head:
    """The output head of a network. tensors: the names of the checkpoint's tensors that are loaded into its weight."""

    watched: Watched
    tensors: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its curvature, float32."""
        return int(4 * self.watched.inputs**2)


def find_head(model: Any, names: Mapping[str, Target]) -> Head | None:
    """The output head of a network, or None if it has none that is a linear layer with a weight in the checkpoint.

    names: where the network has the checkpoint's tensors.
    """
    ask = getattr(model, "get_output_embeddings", None)
    module = ask() if callable(ask) else None
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    known = dict(model.named_parameters(remove_duplicate=False))
    tensors = [
        name
        for name, target in names.items()
        if not target.converted and any(known.get(parameter) is weight for parameter in target.parameters)
    ]
    return Head(Watched(HEAD, module, "weight"), tuple(tensors)) if tensors else None


def solved_table(plan: Plan, recipe: Recipe, head: Head | None) -> PlannedTensor | None:
    """The planned table that is the head, if the recipe solves with a curvature; None if there is nothing to solve.

    If a tied table is stored twice, with different bits, it is the one that is named as a head.
    """
    if head is None or recipe.curvature is None or not recipe.solver.method.compensates:
        return None
    found = [item for item in plan.tables if item.tensor.entry.name in head.tensors]
    found = [item for item in found if item.tensor.matrix_shape[1] == head.watched.inputs]
    return next((item for item in found if is_head(item.tensor.entry.name)), found[0] if found else None)


def quantize_table(
    item: PlannedTensor, checkpoint: Checkpoint, reader: FileReader, workers: Workers, store: SolvedStore | None
) -> Callable[[], SolvedWeight]:
    """Quantize an embedding or a head: with its curvature if it is in the store of a calibrated run, or by rounding.

    Returns and raises the same as :func:`fewbit.pipeline.quantize_tensor.quantize_tensor`.
    """
    name = item.tensor.entry.name
    if store is None or not store.has_curvature(name):
        return quantize_tensor(item, checkpoint, reader, workers)
    curvature, without = store.curvature(name)
    if curvature is not None:
        solved = replace(item, recipe=replace(item.recipe, curvature=CurvatureChoice(), solver=SOLVER))
        return solve_tensor(solved, curvature, reader, workers)
    rounded = quantize_tensor(item, checkpoint, reader, workers)

    def noted() -> SolvedWeight:
        found = rounded()
        return replace(found, record=replace(found.record, path=without))

    return noted
