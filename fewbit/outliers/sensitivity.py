"""Outliers by sensitivity (SpQR, arXiv 2306.03078): weights whose rounding costs more than a threshold.

What rounding weight w in column j costs, once later columns have made up for it, is ``(w - quant(w))^2 / U_jj^2``, with
U the column solver's factor: ``U_jj^2`` is ``[H^-1]_jj`` of the columns that are not fixed yet.
"""

import torch
from torch import Tensor

from fewbit.grids.scales import divisor


def column_costs(upper: Tensor, dead: Tensor) -> Tensor:
    """``1 / U_jj^2`` of every column `(in,)` in the solver's order; 0 where no input was ever active (`dead`).

    The solver has to give dead columns some curvature, but errors in them cost nothing.
    """
    return upper.diagonal().square().reciprocal().masked_fill(dead, 0.0)


def sensitivity_threshold(weight: Tensor, cost: Tensor, tau: float) -> float:
    """``tau * mean_j( Var_rows(W[:, j]) / U_jj^2 )`` over the columns that cost anything, one for a matrix `(out, in)`.

    cost: of :func:`column_costs`, in the order of the weight's columns.
    """
    felt = cost > 0
    return tau * float((weight.var(dim=0, correction=0) * cost)[felt].mean())


def leave_one_out(group: Tensor, cost: Tensor, bits: int, threshold: float | Tensor) -> Tensor:
    """Mask `(rows, g)` of the weights without which a group's min-max grid costs less by more than the threshold.

    group: `(rows, g)` float32. cost: of :func:`column_costs`, `(g,)`. threshold: one, or `(rows, 1)`. The cost
    that goes is that of the whole group, the weight's own included. Only the smallest and the largest weight of a group
    shape its grid; without any other, just its own cost goes.
    """
    low, high = group.amin(dim=1, keepdim=True), group.amax(dim=1, keepdim=True)
    own = _cost(group, low, high, cost, bits)
    total = own.sum(dim=1, keepdim=True)
    saved = own.clone()
    if group.shape[1] > 1:
        lowest, highest = group.argmin(dim=1, keepdim=True), group.argmax(dim=1, keepdim=True)
        second_low = group.scatter(1, lowest, torch.inf).amin(dim=1, keepdim=True)
        second_high = group.scatter(1, highest, -torch.inf).amax(dim=1, keepdim=True)
        for index, narrower in ((lowest, (second_low, high)), (highest, (low, second_high))):
            rest = _cost(group, *narrower, cost, bits).scatter_(1, index, 0.0)
            saved.scatter_(1, index, total - rest.sum(dim=1, keepdim=True))
    return saved > threshold


def _cost(group: Tensor, low: Tensor, high: Tensor, cost: Tensor, bits: int) -> Tensor:
    scale = (high - low) / (2**bits - 1)
    codes = ((group - low) / divisor(scale)).round_().clamp_(0, 2**bits - 1)
    return codes.mul_(scale).add_(low).sub_(group).square_().mul_(cost)
