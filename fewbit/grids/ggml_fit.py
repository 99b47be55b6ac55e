"""Fit the grids of ggml's block types: search scales and minima, then round them as the type stores them.

A scale is searched among fractions of the largest, each improved by least squares for the codes that it gives:

    s = sum c w v / sum c v^2        v: levels, c: importance

A scale and a minimum are improved together in the same way. Where scales are whole multiples of one float16 for a block
(k-quants), several such units are tried; for each, every scale is rounded up and down, and what leaves the least error
is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.grids import integer
from fewbit.grids.grid import Groups, ScaleSearch, Values
from fewbit.grids.nested import BLOCK, Nested
from fewbit.grids.scales import divisor
from fewbit.grids.scheme import Scheme

_IMPROVEMENTS = 2
_FACTORS = (1.0, 0.95, 0.975, 1.025, 1.05)
"""Units of a block that are tried, as fractions of the one that its largest scale suggests."""
_FEW_LEVELS, _SMALLEST_OF_FEW = 4, 0.3


@dataclass(frozen=True)
class Steps:
    """The levels of a scale of 1. snap(u): the nearest level of each element. lowest, highest: the outermost levels."""

    snap: Callable[[Tensor], Tensor]
    lowest: float
    highest: float
    count: int


@dataclass(frozen=True)
class _Cost:
    """The error of decoded weights, summed over each group."""

    x: Tensor
    importance: Tensor | None
    power: float

    def of(self, decoded: Tensor) -> Tensor:
        error = decoded.sub_(self.x)
        if self.power == 2.0:
            error = error.square_()
        elif self.power == 2.5:
            error = error.square().mul_(error.abs_().sqrt_())
        else:
            error = error.abs_().pow_(self.power)
        return self.weigh(error).sum(dim=-1, keepdim=True)

    def weigh(self, values: Tensor) -> Tensor:
        return values if self.importance is None else values * self.importance

    def mean(self, values: Tensor) -> Tensor:
        """The weighted mean of each group."""
        total = values.shape[-1] if self.importance is None else self.importance.sum(dim=-1, keepdim=True)
        return self.weigh(values).sum(dim=-1, keepdim=True) / total


def fit_scale(
    steps: Steps, nested: Nested | None, groups: Groups, scheme: Scheme, search: ScaleSearch | None
) -> Values:
    """Signed scales `(rows, groups, 1)`. Without a search, the largest magnitude gets the lowest level."""
    x = groups.x
    if search is None:
        largest = x.gather(-1, x.abs().argmax(dim=-1, keepdim=True))
        return {"scale": largest / steps.lowest}
    cost = _Cost(x, groups.importance, search.error_power)
    best = _search_scale(steps, cost, search)
    return {"scale": best if nested is None else _nested_scale(steps, nested, cost, best, scheme)}


def _search_scale(steps: Steps, cost: _Cost, search: ScaleSearch) -> Tensor:
    x = cost.x
    widest = x.abs().amax(dim=-1, keepdim=True) / steps.highest
    if steps.count <= _FEW_LEVELS:
        search = replace(search, smallest=min(search.smallest, _SMALLEST_OF_FEW))
    signs = (1.0,) if steps.highest == -steps.lowest else (1.0, -1.0)
    best, least = widest, torch.full_like(widest, float("inf"))

    def consider(scale: Tensor) -> None:
        nonlocal best, least
        levels = steps.snap(x / divisor(scale))
        weighed = cost.weigh(levels)
        fitted = (weighed * x).sum(dim=-1, keepdim=True) / divisor((weighed * levels).sum(dim=-1, keepdim=True))
        error = cost.of(levels * fitted)
        best, least = torch.where(error < least, fitted, best), torch.minimum(error, least)

    for ratio in search.ratios():
        for sign in signs:
            consider(widest * (sign * ratio))
    for _ in range(_IMPROVEMENTS):
        consider(best)
    return best


def _nested_scale(steps: Steps, nested: Nested, cost: _Cost, wanted: Tensor, scheme: Scheme) -> Tensor:
    per, x = BLOCK // scheme.group_size, cost.x
    best, least = wanted, torch.full_like(wanted, float("inf"))
    for factor in _FACTORS:
        unit = _unit(nested, wanted * factor, per)
        chosen, error = wanted, torch.full_like(wanted, float("inf"))
        for codes in _codes_near(nested, wanted, unit, per):
            scale = unit * codes
            tried = cost.of(steps.snap(x / divisor(scale)) * scale)
            chosen, error = torch.where(tried < error, scale, chosen), torch.minimum(tried, error)
        better = _by_block(error, per) < _by_block(least, per)
        best, least = torch.where(better, chosen, best), torch.where(better, error, least)
    return best


def fit_minimum(nested: Nested | None, groups: Groups, scheme: Scheme, search: ScaleSearch | None) -> Values:
    """Scales and minima `(rows, groups, 1)`; minima of nested grids are 0 at most."""
    top = 2**scheme.whole_bits - 1
    low, high = integer.extremes(groups.x)
    low = low if nested is None else low.clamp(max=0.0)
    scale, offset = (high - low) / top, low
    if search is None:
        return {"scale": scale, "offset": offset}
    cost = _Cost(groups.x, groups.importance, search.error_power)
    scale, offset = _search_minimum(cost, (scale, offset), top, search, nested is not None)
    if nested is not None:
        scale, offset = _nested_minimum(nested, cost, (scale, offset), top, scheme)
    return {"scale": scale, "offset": offset}


def _search_minimum(
    cost: _Cost, widest: tuple[Tensor, Tensor], top: int, search: ScaleSearch, below: bool
) -> tuple[Tensor, Tensor]:
    x, (scale, offset) = cost.x, widest
    best, least = (scale, offset), torch.full_like(scale, float("inf"))

    def consider(scale: Tensor, offset: Tensor) -> None:
        nonlocal best, least
        codes = _codes(x, scale, offset, top)
        fitted = _least_squares(cost, codes, (scale, offset), below)
        error = cost.of(codes * fitted[0] + fitted[1])
        better = error < least
        best = (torch.where(better, fitted[0], best[0]), torch.where(better, fitted[1], best[1]))
        least = torch.minimum(error, least)

    for ratio in search.ratios():
        consider(scale * ratio, offset * ratio)
    for _ in range(_IMPROVEMENTS):
        consider(*best)
    return best


def _least_squares(cost: _Cost, codes: Tensor, before: tuple[Tensor, Tensor], below: bool) -> tuple[Tensor, Tensor]:
    """The scale and minimum with the least squared error for given codes; below: the minimum is 0 at most."""
    mean_code, mean_x = cost.mean(codes), cost.mean(cost.x)
    around = cost.weigh(codes - mean_code)
    spread = (around * (codes - mean_code)).sum(dim=-1, keepdim=True)
    scale = (around * cost.x).sum(dim=-1, keepdim=True) / divisor(spread)
    offset = mean_x - scale * mean_code
    if below:
        weighed = cost.weigh(codes)
        alone = (weighed * cost.x).sum(dim=-1, keepdim=True) / divisor((weighed * codes).sum(dim=-1, keepdim=True))
        scale = torch.where(offset > 0, alone.clamp(min=0.0), scale)
        offset = offset.clamp(max=0.0)
    usable = spread > 0
    return torch.where(usable, scale, before[0]), torch.where(usable, offset, before[1])


def _nested_minimum(
    nested: Nested, cost: _Cost, wanted: tuple[Tensor, Tensor], top: int, scheme: Scheme
) -> tuple[Tensor, Tensor]:
    per, x = BLOCK // scheme.group_size, cost.x
    scale, depth = wanted[0].clamp(min=0.0), (-wanted[1]).clamp(min=0.0)
    best, least = (scale, -depth), torch.full_like(scale, float("inf"))
    for factor in _FACTORS:
        unit, low_unit = _unit(nested, scale * factor, per), _unit(nested, depth * factor, per)
        deepest = _is_top(depth, per)
        chosen, error = best, torch.full_like(scale, float("inf"))
        for codes in _codes_near(nested, scale, unit, per):
            tried = unit * codes
            assigned = _codes(x, tried, -depth, top)
            # The minimum that suits the rounded scale, beside the one that suited the exact scale.
            suited = cost.mean(assigned * tried - x)
            for target in (suited, depth):
                low = nested.clamp((target / divisor(low_unit)).round_())
                low = torch.where(deepest, float(nested.extreme), low) * low_unit
                found = cost.of(_codes(x, tried, -low, top) * tried - low)
                better = found < error
                chosen = (torch.where(better, tried, chosen[0]), torch.where(better, -low, chosen[1]))
                error = torch.minimum(found, error)
        better = _by_block(error, per) < _by_block(least, per)
        best = (torch.where(better, chosen[0], best[0]), torch.where(better, chosen[1], best[1]))
        least = torch.where(better, error, least)
    return best


def _codes(x: Tensor, scale: Tensor, offset: Tensor, top: int) -> Tensor:
    return ((x - offset) / divisor(scale)).round_().clamp_(0, top)


def _unit(nested: Nested, scales: Tensor, per: int) -> Tensor:
    """d of each group's block, `(rows, groups, 1)`."""
    rows, groups, _ = scales.shape
    return nested.unit(scales.reshape(rows, -1, per)).expand(-1, -1, per).reshape(rows, groups, 1)


def _is_top(scales: Tensor, per: int) -> Tensor:
    """Which groups have the scale that determines their block's unit."""
    rows, groups, _ = scales.shape
    size = scales.abs().reshape(rows, -1, per)
    first = torch.zeros_like(size, dtype=torch.bool).scatter_(-1, size.argmax(dim=-1, keepdim=True), True)
    return first.view(rows, groups, 1)


def _codes_near(nested: Nested, scales: Tensor, unit: Tensor, per: int) -> list[Tensor]:
    """The scale codes below and above; the largest scale of a block keeps the extreme code, which determines d."""
    below = (scales / divisor(unit)).floor_()
    is_top, extreme = _is_top(scales, per), float(nested.extreme)
    return [torch.where(is_top, extreme, nested.clamp(below + more)) for more in (0, 1)]


def _by_block(errors: Tensor, per: int) -> Tensor:
    """The sum over each group's block, `(rows, groups, 1)`."""
    rows, groups, _ = errors.shape
    total = errors.reshape(rows, -1, per).sum(dim=-1, keepdim=True)
    return total.expand(-1, -1, per).reshape(rows, groups, 1)
