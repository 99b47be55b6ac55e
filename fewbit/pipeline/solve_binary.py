"""BiLLM for one weight matrix: block by block, the column solver carrying errors on.

When the solver enters a block, its salient columns and scales are fitted to the weights as they are then; each column
is then rounded to the nearest of its levels, and later columns make up for the error.
"""

import torch
from torch import Tensor

from fewbit.curvature.damping import Factor
from fewbit.errors import FewbitError
from fewbit.formats.scheme import Scheme
from fewbit.grids import binary
from fewbit.grids.packing import pack
from fewbit.grids.scales import from_pattern, to_pattern
from fewbit.pipeline.quantize_weight import QuantizedRows
from fewbit.pipeline.solved import Solved, relative_cost
from fewbit.solvers.column import DivergedError, solve_columns

_MOST_SALIENT = 30


def solve_binary(
    weight: Tensor,
    prepared: Tensor | None,
    found: Factor | None,
    costs: Tensor | None,
    scheme: Scheme,
    path: str = "",
) -> Solved:
    """Binarize `(out, in)` float32; without a factor each block is fitted to the weights as they are, under `path`.

    costs: ``1 / U_jj^2`` of the columns, 0 for dead ones (:func:`fewbit.outliers.sensitivity.column_costs`).
    """
    fitted = _Blocks(weight, costs, scheme.group_size)
    if found is None:
        path = path or "fallback: the curvature has no Cholesky factor"
        return _finish(weight, fitted.plainly(), fitted, scheme, prepared, path)
    try:
        compensated = solve_columns(weight, found.upper, fitted.quantize, fitted.enter, scheme.group_size)
    except DivergedError:
        fitted = _Blocks(weight, None, scheme.group_size)
        return _finish(weight, fitted.plainly(), fitted, scheme, prepared, "fallback: the solver diverged")
    path = "solved" if found.step == 0 else f"solved with damping {found.damping:g}"
    return _finish(weight, compensated, fitted, scheme, prepared, path)


class _Blocks:
    """Salient columns and scales of the blocks that have been entered."""

    def __init__(self, weight: Tensor, costs: Tensor | None, size: int) -> None:
        rows, columns = weight.shape
        self._weight, self._size = weight, size
        self._costs = weight.new_ones(columns) if costs is None else costs
        self.salient = torch.zeros(columns, dtype=torch.bool, device=weight.device)
        self.patterns = torch.zeros(rows, columns // size, 4, dtype=torch.int16, device=weight.device)
        self._magnitudes: dict[bool, tuple[Tensor, Tensor]] = {}

    def enter(self, block: Tensor, first: int) -> None:
        part = slice(first, first + self._size)
        # Saliency w^2 / U_jj^2, summed over rows: the squared diagonal of the Cholesky factor of H^-1.
        saliency = block.square().sum(dim=0) * self._costs[part]
        self.salient[part], scales = binary.fit_block(block.contiguous(), saliency, _MOST_SALIENT)
        try:
            pattern = to_pattern(scales, "float16")
        except FewbitError as error:
            raise DivergedError from error
        self.patterns[:, first // self._size] = pattern
        seen = from_pattern(pattern, "float16")
        for kind in (False, True):
            self._magnitudes[kind] = binary.magnitudes_of(seen, torch.tensor(kind, device=block.device))

    def quantize(self, column: Tensor, j: int) -> Tensor:
        return binary.encode(column, *self._magnitudes[bool(self.salient[j])])[2]

    def plainly(self) -> Tensor:
        """Fit every block to the weights as they are; returns them."""
        for first in range(0, self._weight.shape[1], self._size):
            self.enter(self._weight[:, first : first + self._size], first)
        return self._weight


def _finish(
    weight: Tensor, compensated: Tensor, fitted: _Blocks, scheme: Scheme, prepared: Tensor | None, path: str
) -> Solved:
    rows, columns = weight.shape
    scales = from_pattern(fitted.patterns, "float16").unsqueeze(2)
    small, large = binary.magnitudes_of(scales, fitted.salient.view(1, -1, scheme.group_size))
    grouped = compensated.reshape(rows, -1, scheme.group_size)
    negative, second, decoded = binary.encode(grouped, small, large)
    decoded = decoded.reshape(rows, columns)
    parts = {
        "codes": pack(negative.view(rows, columns), 1),
        "second": pack(second.view(rows, columns), 1),
        "salient": pack(fitted.salient.to(torch.uint8), 1),
        "scales": fitted.patterns,
    }
    difference = decoded - weight
    error, norm = float(difference.double().square().sum()), float(weight.double().square().sum())
    predicted = relative_cost(difference, weight, prepared)
    return Solved(QuantizedRows(parts, None, None, error, norm), decoded, path, predicted)
