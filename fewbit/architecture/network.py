"""Where a checkpoint's tensors live in the running network: its decoder blocks, and a view of every weight.

Found by structure, with no list of architectures: the blocks are the largest list of modules; a tensor is the
parameter of the same name in its block, or, where a runtime fuses what the file keeps apart (experts), the rows of a
parameter that hold the same numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.architecture.coverage import WeightTensor, name_in_block
from fewbit.curvature.observe import Watched
from fewbit.errors import FewbitError

_SAMPLE = 16


@dataclass(frozen=True)
class Site:
    """A weight of the checkpoint inside the network.

    watched: the matrix that is one linear layer for the network. first, rows: which of its output rows are this
    weight's. transposed: the network stores it (in, out).
    """

    tensor: WeightTensor
    watched: Watched
    first: int
    rows: int
    transposed: bool

    @property
    def columns(self) -> int:
        """Inputs of the layer."""
        return self.tensor.matrix_shape[1]

    def read(self) -> Tensor:
        """The weight `(out, in)`, a view of the network's own."""
        matrix = self.watched.weight.detach()
        matrix = matrix.t() if self.transposed else matrix
        return matrix[self.first : self.first + self.rows]

    def write(self, weight: Tensor) -> None:
        """Put a weight `(out, in)` of any dtype into the network."""
        with torch.no_grad():
            self.read().copy_(weight)


def find_blocks(model: nn.Module) -> Sequence[nn.Module]:
    """The decoder blocks in order; FewbitError when there is no list of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise FewbitError(f"{type(model).__name__}: it has no list of decoder blocks")
    return max(lists, key=lambda found: sum(_size(module) for module in found))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def find_sites(blocks: Sequence[nn.Module], tensors: list[WeightTensor], weights: Any) -> list[list[Site]]:
    """Sites of the quantized tensors of every block; a tensor fused over experts has one for each expert.

    weights: a callable that reads a tensor from the checkpoint, for those that no name leads to.
    Raises FewbitError naming a tensor that is nowhere in its block.
    """
    sites: list[list[Site]] = [[] for _ in blocks]
    for tensor in tensors:
        if tensor.block is None:
            continue
        if tensor.block >= len(blocks):
            raise FewbitError(f"{tensor.entry.name}: the network has {len(blocks)} blocks only")
        found = _by_name(blocks[tensor.block], tensor) or _by_content(blocks[tensor.block], tensor, weights)
        if not found:
            raise FewbitError(f"{tensor.entry.name}: not found in the network that transformers builds")
        sites[tensor.block].extend(found)
    return sites


def _by_name(block: nn.Module, tensor: WeightTensor) -> list[Site]:
    path, _, parameter = name_in_block(tensor.entry.name).rpartition(".")
    try:
        module = block.get_submodule(path)
        found = getattr(module, parameter)
    except AttributeError:
        return []
    if not isinstance(found, nn.Parameter) or tuple(found.shape) != tuple(tensor.entry.shape):
        return []
    key = tensor.entry.name
    if found.dim() == 2:
        rows = tensor.matrix_shape[0]
        return [Site(tensor, Watched(key, module, parameter), 0, rows, tensor.transposed)]
    rows = found.shape[1]
    return [
        Site(tensor, Watched(f"{key}[{expert}]", module, parameter, expert), 0, rows, False)
        for expert in range(found.shape[0])
    ]


def _by_content(block: nn.Module, tensor: WeightTensor, weights: Any) -> list[Site]:
    wanted = weights(tensor)
    rows, columns = wanted.shape
    sample = wanted[0, :_SAMPLE]
    for module_name, module in block.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() not in (2, 3) or parameter.shape[-1] != columns or parameter.shape[-2] < rows:
                continue
            stacked = parameter.detach().view(-1, columns)
            starts = (stacked[:, :_SAMPLE] == sample.to(stacked.dtype)).all(dim=1).nonzero().view(-1).tolist()
            for start in starts:
                if not torch.equal(stacked[start : start + rows], wanted.to(stacked.dtype)):
                    continue
                height = parameter.shape[-2]
                expert, first = divmod(start, height) if parameter.dim() == 3 else (None, start)
                key = f"{module_name}.{name}" + ("" if expert is None else f"[{expert}]")
                watched = Watched(f"{tensor.block}.{key}", module, name, expert)
                return [Site(tensor, watched, first, rows, False)]
    return []
