"""Which of several grids of the same size loses least: the squared error of some rows of each layer.

To first order, what rounding costs is proportional to the squared error of the weights, for every grid of one layer
alike, if nothing is known of its inputs. Layers of one kind get the same grid.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.architecture.coverage import WeightTensor
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.grids.grid import ScaleSearch
from fewbit.pipeline.plan import scheme_for
from fewbit.recipe_choices import recipe_from_choices
from fewbit.solvers.settled import WeightChoices, round_rows

_DIGITS = re.compile(r"(?<=\.)\d+(?=\.)")
_WEIGHTS = 1 << 18
"""How many weights of a layer are read."""


@dataclass(frozen=True)
class Fit:
    """The grid of one tensor, None to keep it in 16 bits, and why it is not the one that the bits ask for ("").

    others: grids of no more bytes; of all, the one with the least predicted loss is taken.
    """

    grid: str | None
    note: str = ""
    others: tuple[str, ...] = ()


def kind_of(name: str) -> str:
    """A tensor's name without the numbers of its block and expert."""
    return _DIGITS.sub("*", name)


def least_loss(fits: Mapping[WeightTensor, Fit]) -> dict[str, Fit]:
    """Tensor's name -> its fit, with the grid of least error among its own and `others`, for each kind of layer.

    The first, the middle and the last layer of a kind are looked at.
    """
    kinds: dict[tuple[str, Fit], list[WeightTensor]] = {}
    for tensor, fit in fits.items():
        kinds.setdefault((kind_of(tensor.entry.name), fit), []).append(tensor)
    found: dict[str, Fit] = {}
    with FileReader() as reader:
        for (_, fit), alike in kinds.items():
            grid = fit.grid
            if grid is not None and fit.others:
                few = list(dict.fromkeys((alike[0], alike[len(alike) // 2], alike[-1])))
                errors = {name: _error(name, few, reader) for name in (grid, *fit.others)}
                grid = min(errors, key=lambda name: errors[name])
            found |= {tensor.entry.name: Fit(grid, fit.note) for tensor in alike}
    return found


def _error(grid: str, tensors: Sequence[WeightTensor], reader: FileReader) -> float:
    """The relative squared errors of some rows of each tensor, added up."""
    recipe, total = recipe_from_choices("rtn", {"grid": grid}), 0.0
    for tensor in tensors:
        rows = _first_rows(tensor, reader)
        encoded = round_rows(rows, WeightChoices(scheme_for(rows.shape[1], recipe), ScaleSearch()), None, None)
        total += float(encoded.squared_error) / max(float(encoded.squared_norm), 1e-30)
    return total


def _first_rows(tensor: WeightTensor, reader: FileReader) -> Tensor:
    """The first rows of a layer, float32; what is not finite, which a run refuses later, is 0."""
    high, wide = tensor.entry.shape[-2:]
    columns = tensor.matrix_shape[1]
    count = min(max(1, _WEIGHTS // columns), high * wide // columns)
    if tensor.transposed:
        rows = reader.read(tensor.entry, 0, high * wide).view(high, wide)[:, :count].T
    else:
        rows = reader.read(tensor.entry, 0, count * columns).view(count, columns)
    return torch.nan_to_num(rows.float().contiguous(), nan=0.0, posinf=0.0, neginf=0.0)
