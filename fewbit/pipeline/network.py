"""The original model as a running network, with the location of every linear layer in it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.architecture.coverage import Coverage
from fewbit.architecture.names import names_in_network
from fewbit.architecture.network import Site, find_blocks, find_sites, names_by_parameter
from fewbit.architecture.orientation import to_matrix
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import Checkpoint, open_checkpoint
from fewbit.paging import page_out
from fewbit.pipeline.heads import Head, find_head
from fewbit.pipeline.plan import cover_original
from fewbit.runtime.load import load_decoder


@dataclass(frozen=True)
class Network:
    """The running model, its blocks, and the location of the checkpoint's linear layers in it, block by block.

    kept: for every block, parameter name in the block -> name in the checkpoint, for tensors that are not quantized.
    head: the output head, or None if it has none that can be solved.
    """

    model: Any
    blocks: list[Any]
    sites: list[list[Site]]
    kept: list[dict[str, str]]
    device: torch.device
    head: Head | None = None

    def take(self, index: int) -> None:
        """Give a block its own copy of the weights, on the compute device.

        Until then they are memory-mapped from the checkpoint's files, so only the weights of one block are in memory.
        """
        for tensor in _tensors(self.blocks[index]):
            tensor.data = tensor.data.to(self.device, copy=True)

    def release(self, index: int) -> None:
        """Free a block that is finished."""
        for tensor in _tensors(self.blocks[index]):
            tensor.data = tensor.data.new_empty(0)


def _tensors(block: Any) -> list[Tensor]:
    return [*block.parameters(), *block.buffers()]


def open_original(
    model: str | Path, device: str | None, walking: bool = False, dtype: Any = "auto"
) -> tuple[Checkpoint, Network]:
    """An original checkpoint and its network, with every linear layer in the blocks as a site.

    device, walking, dtype: as for :func:`open_network`.
    """
    checkpoint = open_checkpoint(locate(model))
    return checkpoint, open_network(checkpoint, cover_original(checkpoint), device, walking, dtype)


def open_network(
    checkpoint: Checkpoint, coverage: Coverage, device: str | None, walking: bool = False, dtype: Any = "auto"
) -> Network:
    """Load the model and find the tensors in it that are to be quantized.

    walking: only one block at a time will run, so the weights stay memory-mapped until a block is taken. device, dtype:
    as for :func:`fewbit.load`.
    """
    model = load_decoder(checkpoint.folder, dtype, "cpu" if walking else device)
    if hasattr(model, "set_experts_implementation"):
        # One linear layer for each expert, which can be watched, instead of one fused product for all.
        model.set_experts_implementation("eager")
    blocks = list(find_blocks(model))
    with FileReader() as reader:

        def read(tensor: Any) -> Tensor:
            return to_matrix(reader.tensor(tensor.entry), tensor.transposed).to(model.device)

        names = names_in_network(model, checkpoint.entries)
        sites = find_sites(blocks, coverage.of("quantize"), read, model, names, page_out if walking else None)
    kept_names = {tensor.entry.name: names[tensor.entry.name] for tensor in coverage.of("keep")}
    kept = names_by_parameter(model, blocks, kept_names)
    where = torch.device(device) if device else model.device
    return Network(model, blocks, sites, kept, where, find_head(model, names))
