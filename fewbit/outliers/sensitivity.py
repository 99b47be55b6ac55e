"""Outliers by sensitivity (SpQR, arXiv 2306.03078): weights whose rounding costs more than a threshold.

Rounding weight w in column j costs ``(w - quant(w))^2 / U_jj^2``, once later columns have compensated for the error. U
is the column solver's factor: ``U_jj^2`` is ``[H^-1]_jj`` of the columns that are not fixed yet.
"""

import torch
from torch import Tensor

from fewbit.grids.grid import Grid, Groups, of_group
from fewbit.grids.scheme import Scheme


def column_costs(upper: Tensor, dead: Tensor) -> Tensor:
    """``1 / U_jj^2`` of every column `(in,)` in the solver's order; 0 for columns whose input was always 0 (`dead`).

    The solver must give dead columns some curvature, but errors in them cost nothing.
    """
    return upper.diagonal().square().reciprocal().masked_fill(dead, 0.0)


def sensitivity_threshold(weight: Tensor, cost: Tensor, tau: float) -> float:
    """``tau * mean_j( Var_rows(W[:, j]) / U_jj^2 )`` of a matrix `(out, in)`, over the columns with a cost above 0.

    cost: from :func:`column_costs`, in the order of the weight's columns.
    """
    felt = cost > 0
    return tau * float((weight.var(dim=0, correction=0) * cost)[felt].mean())


def leave_one_out(group: Tensor, cost: Tensor, grid: Grid, scheme: Scheme, threshold: float | Tensor) -> Tensor:
    """Mask `(rows, g)` of the weights whose removal lowers the cost of their group by more than the threshold.

    group: `(rows, g)` float32. cost: from :func:`column_costs`, `(g,)`. grid, scheme: from
    :attr:`fewbit.grids.grid.Grid.trial`, without storage rounding. threshold: a number, or `(rows, 1)`. The cost of a
    group includes that of the removed weight. Only the smallest and the largest weight of a group affect its grid;
    removing any other weight saves only that weight's own cost.
    """
    own = _cost(group, None, cost, grid, scheme)
    total = own.sum(dim=1, keepdim=True)
    saved = own.clone()
    if group.shape[1] > 1:
        for index in (group.argmin(dim=1, keepdim=True), group.argmax(dim=1, keepdim=True)):
            left_out = torch.zeros(group.shape, dtype=torch.bool, device=group.device).scatter_(1, index, True)
            rest = _cost(group, left_out, cost, grid, scheme).scatter_(1, index, 0.0)
            saved.scatter_(1, index, total - rest.sum(dim=1, keepdim=True))
    return saved > threshold


def _cost(group: Tensor, left_out: Tensor | None, cost: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """The cost of each weight when the grid is fitted to the weights that are not left out."""
    core = group if left_out is None else group.masked_fill(left_out, 0.0)
    mask = None if left_out is None else left_out.unsqueeze(1)
    wanted = grid.fit(Groups(core.unsqueeze(1), mask), scheme, None)
    values = of_group(grid.settle(wanted, scheme, False).values, 0)
    return grid.round(group, values, scheme).sub_(group).square_().mul_(cost)
