"""What the cells of a study of activations share in one process: the model, the windows, the sets that were drawn."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import Checkpoint, open_checkpoint
from fewbit.evaluation.text import read_text
from fewbit.evaluation.windows import read_windows
from fewbit.pipeline.calibrated import open_original
from fewbit.pipeline.plan import Plan, make_plan
from fewbit.pipeline.solve_blocks import Network
from fewbit.recipe import Recipe
from fewbit.studies.choice import StudyChoice
from fewbit.studies.sets import NamedSet, draw_set


@dataclass
class Opened:
    """The model in memory, whole; windows `(windows, length)` of the evaluation text; sets by sources and seed."""

    choice: StudyChoice
    checkpoint: Checkpoint
    network: Network
    windows: Tensor
    sets: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.network.model

    def ids(self, one: NamedSet, seed: int) -> Tensor:
        """Token ids of a set `(samples, length)`, drawn once."""
        key = (one.sources, seed)
        if key not in self.sets:
            self.sets[key] = draw_set(one, self.choice.calibration, seed, self.checkpoint, self.model).ids
        return self.sets[key]


def open_model(choice: StudyChoice) -> Opened:
    """Load what the cells of a study share."""
    checkpoint, network = open_original(choice.model, choice.device)
    windows, _ = read_windows(checkpoint.folder, read_text(choice.data), choice.protocol)
    return Opened(choice, checkpoint, network, windows)


def plan_of(choice: StudyChoice) -> tuple[Checkpoint, Plan]:
    """The checkpoint, and which of its tensors are linear layers in the blocks, without loading any."""
    checkpoint = open_checkpoint(locate(choice.model))
    return checkpoint, make_plan(checkpoint, Recipe(group_size="row"), 1 << 62)


def block_count(plan: Plan) -> int:
    """Number of decoder blocks with linear layers."""
    blocks = {item.tensor.block for shard in plan.shards for item in shard if item.stored is not None}
    return 1 + max((block for block in blocks if block is not None), default=-1)
