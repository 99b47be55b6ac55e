"""What the cells of a study of activations share in one process: the model, the windows, the sets that were drawn."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fewbit.architecture.coverage import Coverage
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import Checkpoint, open_checkpoint
from fewbit.evaluation.text import read_text
from fewbit.evaluation.windows import read_windows
from fewbit.pipeline.network import Network, open_original
from fewbit.pipeline.plan import cover_original
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


def cover_model(choice: StudyChoice) -> tuple[Checkpoint, Coverage]:
    """The checkpoint, and which of its tensors are linear layers in the blocks, without loading any."""
    checkpoint = open_checkpoint(locate(choice.model))
    return checkpoint, cover_original(checkpoint)


def block_count(coverage: Coverage) -> int:
    """Number of decoder blocks with linear layers."""
    blocks = {tensor.block for tensor in coverage.of("quantize")}
    return 1 + max((block for block in blocks if block is not None), default=-1)
