"""The column solver (OPTQ/GPTQ, arXiv 2210.17323): round one column, then let the later columns compensate its error.

    e = (w_j - quant(w_j)) / U_jj        w_k -= e U_jk  for k > j

with ``H^-1 = U^T U``. Columns are processed in blocks. Later columns of the same block are updated after every column,
columns after the block once per block. Neighbouring columns that share a code (a run) are rounded together, with their
values from before the first of them is processed; their errors then update later columns by the same rule (forward
substitution).
"""

from collections.abc import Callable

import torch
from torch import Tensor

Quantizer = Callable[[Tensor, int], Tensor]
Enter = Callable[[Tensor, int], None]

BLOCK = 128


class DivergedError(ArithmeticError):
    """A compensated weight is NaN or infinite."""


def solve_columns(
    weight: Tensor,
    upper: Tensor,
    quantize: Quantizer,
    enter: Enter | None = None,
    group_size: int = 0,
    run: int = 1,
) -> Tensor:
    """The compensated weights `(out, in)` float32, each as it was when its column was rounded.

    weight: float32 `(out, in)` in the solver's column order. upper: U. run: how many neighbouring columns are rounded
    together; it divides the number of columns. quantize(columns, j): the decoded values `(out, run)` to which the run
    that starts at column j is rounded. enter(group, first): if given, called with the compensated columns
    `(out, group_size)` of a group before its first column is rounded.
    Rounding the result with the same grids gives the solver's codes. Raises DivergedError if a weight becomes NaN or
    infinite.
    """
    columns = weight.shape[1]
    # The solver works on a transposed copy: a column is then a row, and every access is contiguous.
    work = weight.t().contiguous()
    # When a group's grid is refitted, all its columns must be up to date. So a block holds whole groups and whole runs.
    whole = run if enter is None else group_size
    block = max(1, BLOCK // whole) * whole
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty((stop - start, work.shape[1]), dtype=work.dtype, device=work.device)
        inner = upper[start:stop, start:stop]
        decoded = work[:0]
        for i in range(stop - start):
            j = start + i
            if enter is not None and j % group_size == 0:
                enter(work[j : j + group_size].t(), j)
            if i % run == 0:
                if run > 1:
                    before = work[j : j + run].clone()
                decoded = quantize(work[j : j + run].t(), j).t()
            error = (work[j] - decoded[i % run]).div_(inner[i, i])
            errors[i] = error
            if i + 1 < stop - start:
                work[j + 1 : stop].addr_(inner[i, i + 1 :], error, alpha=-1.0)
            if run > 1 and i % run == run - 1:
                work[j + 1 - run : j + 1] = before
        if stop < columns:
            work[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1.0)
    if not bool(torch.isfinite(work).all()):
        raise DivergedError
    return work.t().contiguous()
