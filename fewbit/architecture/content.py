"""Find the rows of a checkpoint's tensor in a parameter of the network by their values."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_SAMPLE = 16


@dataclass(frozen=True)
class Spot:
    """Output rows `first` to `first + rows` of a parameter, or of one expert's part of it.

    transposed: the parameter stores (in, out). order: the index of each row, if the rows are not consecutive.
    """

    expert: int | None
    first: int
    rows: int
    transposed: bool
    order: Tensor | None = None


def same(held: Tensor, wanted: Tensor) -> bool:
    """Whether a parameter has the same values as a tensor, in the parameter's dtype; NaN equals NaN."""
    converted = wanted.to(held.device, held.dtype)
    if held.shape != converted.shape:
        return False
    return torch.equal(held, converted) or bool(((held == converted) | (held.isnan() & converted.isnan())).all())


def find_rows(
    parameter: Tensor, wanted: Tensor, guess: int | None, taken: Collection[tuple[int | None, int]]
) -> Spot | None:
    """Where `parameter` contains the matrix `wanted` `(out, in)`; a smaller parameter may contain only its first rows.

    guess: the expert that is tried first. taken: experts and first rows that belong to other tensors.
    """
    for expert, slab in _slabs(parameter, guess):
        for transposed in (False, True):
            matrix = slab.t() if transposed else slab
            if matrix.shape[1] != wanted.shape[1]:
                continue
            found = _in_matrix(matrix, wanted, {first for one, first in taken if one == expert})
            if found is not None:
                first, rows, order = found
                return Spot(expert, first, rows, transposed, order)
    return None


def _slabs(parameter: Tensor, guess: int | None) -> Iterator[tuple[int | None, Tensor]]:
    if parameter.dim() == 2:
        yield None, parameter
    elif parameter.dim() == 3:
        experts = list(range(parameter.shape[0]))
        if guess is not None and guess < len(experts):
            experts.insert(0, experts.pop(guess))
        for expert in experts:
            yield expert, parameter[expert]


def _in_matrix(matrix: Tensor, wanted: Tensor, taken: set[int]) -> tuple[int, int, Tensor | None] | None:
    """First row, number of rows, and the order of the rows if they are not consecutive."""
    height, rows = matrix.shape[0], wanted.shape[0]
    if height < rows:
        # A tensor of the file can become several parameters; this one is its first part.
        return (0, height, None) if 0 not in taken and same(matrix, wanted[:height]) else None
    for first in _starts(matrix, wanted, rows):
        if first not in taken and same(matrix[first : first + rows], wanted):
            return first, rows, None
    return _permuted(matrix, wanted) if height == rows and 0 not in taken else None


def _starts(matrix: Tensor, wanted: Tensor, rows: int) -> Iterator[int]:
    """Rows that begin like the first row of `wanted`; multiples of its number of rows come first."""
    sample = wanted[0, :_SAMPLE].to(matrix.device, matrix.dtype)
    equal = (matrix[: matrix.shape[0] - rows + 1, :_SAMPLE] == sample).all(dim=1)
    hits = equal.nonzero().view(-1).tolist()
    yield from sorted(hits, key=lambda first: (first % rows != 0, first))


def _permuted(matrix: Tensor, wanted: Tensor) -> tuple[int, int, Tensor] | None:
    """The order of a matrix's rows that gives `wanted`, if all rows are different."""
    rows = {_bytes(row): index for index, row in enumerate(matrix.cpu())}
    order = [rows.get(_bytes(row)) for row in wanted.to(matrix.dtype).cpu()]
    if None in order or len(set(order)) != matrix.shape[0]:
        return None
    return 0, matrix.shape[0], torch.tensor(order, device=matrix.device)


def _bytes(row: Tensor) -> bytes:
    return bytes(row.contiguous().view(torch.uint8).numpy().data)
