"""Try fixes for outliers on the layers of a single site and measure the error of their outputs.

Every fix starts from the same plain rounding in groups. Errors are never compensated, so that the fixes are comparable.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.activations.rounding import Range, range_of, round_inputs, round_weight
from fewbit.activations.site_record import SiteRecord
from fewbit.architecture.network import Site
from fewbit.curvature.damping import factor, prepare
from fewbit.formats.native import stored_bytes
from fewbit.grids.grid import Groups, fit_and_settle
from fewbit.grids.scheme import StoredWeight
from fewbit.grids.table import grid_of
from fewbit.outliers.adaptive_lasso import outlier_count
from fewbit.pipeline.plan import place_outliers, scheme_for
from fewbit.recipe import Recipe, preset
from fewbit.solvers.settled import WeightChoices
from fewbit.solvers.weight import round_weight as round_in_groups
from fewbit.solvers.weight import solve_weight
from fewbit.transforms.channel_scales import best_scales, smoothing_scales

FIXES = ("none", "adaptive-lasso", "smoothquant", "awq", "sensitivity")
_GROUPS = "128,64,auto"
_SENSITIVE_FRACTION = 0.01
_DAMPING = 1.0
_W8A8 = 8


@dataclass(frozen=True)
class Fixed:
    """Decoded weights of a site's layers, float32 `(out, in)` each, for inputs that are divided by `scales` `(in,)`."""

    weights: list[Tensor]
    scales: Tensor | None
    bits_per_weight: float


def apply_fix(fix: str, consumers: Sequence[Site], record: SiteRecord, bits: int) -> Fixed:
    """Round the weights of a site's layers to `bits` bits in groups, with one of FIXES.

    adaptive-lasso: 5 % of the weights get a separate grid in each group (arXiv 2405.13358). smoothquant: scales with
    exponent 0.5 (2211.10438). awq: scales by search (2306.00978). sensitivity: the 1 % of the weights with the largest
    rounding cost, ``(w - q)^2 / [H^-1]_jj``, are kept in float16 (2306.03078), without compensation in the others.
    """
    weights = [site.read().float() for site in consumers]
    columns = weights[0].shape[1]
    base = _choices(columns, preset("rtn", bits=bits, group_size=_GROUPS))
    scales = None
    if fix == "smoothquant":
        scales = smoothing_scales(record.largest, weights, 0.5)
    elif fix == "awq":
        read = [site.read() for site in consumers]
        _, scales = best_scales(read, record.gram, lambda _, weight: round_in_groups(weight, base))
    if scales is not None:
        weights = [weight * scales for weight in weights]
    if fix == "adaptive-lasso":
        choices = _choices(columns, preset("adpq", bits=bits, group_size=_GROUPS, grid="zero-point"))
        solved = [solve_weight(weight, None, choices) for weight in weights]
        counts = [0 if one.rows.where is None else one.rows.where.numel() for one in solved]
        return Fixed([one.decoded for one in solved], None, _bits(weights, choices, counts))
    if fix == "sensitivity":
        inverse = inverse_diagonal(record.gram)
        outliers = {"outliers": "adaptive-lasso", "outlier_fraction": _SENSITIVE_FRACTION, "outlier_grid": "float16"}
        choices = _choices(columns, preset("rtn", bits=bits, group_size=_GROUPS, **outliers))
        kept = [keep_sensitive(weight, inverse, _SENSITIVE_FRACTION, base) for weight in weights]
        counts = [int(mask.sum()) for _, mask in kept]
        return Fixed([weight for weight, _ in kept], None, _bits(weights, choices, counts))
    decoded = [solve_weight(weight, None, base).decoded for weight in weights]
    return Fixed(decoded, scales, _bits(weights, base, [0] * len(weights)))


def _choices(columns: int, recipe: Recipe) -> WeightChoices:
    return recipe.for_weight(scheme_for(columns, recipe))


def inverse_diagonal(gram: Tensor) -> Tensor:
    """``[H^-1]_jj`` of a damped Gram `(in, in)`, float32 `(in,)`; all 1 if it has no Cholesky factor."""
    prepared, _ = prepare(gram)
    found = factor(prepared, _DAMPING)
    if found is None:
        return torch.ones(gram.shape[0])
    return found.upper.square().sum(dim=0)


def keep_sensitive(weight: Tensor, inverse: Tensor, fraction: float, choices: WeightChoices) -> tuple[Tensor, Tensor]:
    """Round a weight `(out, in)` in groups, except for the `fraction` with the largest rounding cost, kept in float16.

    Returns the decoded weights and the mask of those that were kept. The grids are fitted to the others.
    """
    cost = (_round(weight, None, choices) - weight).square() / inverse
    count = outlier_count(weight.numel(), fraction)
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[cost.flatten().topk(count).indices] = True
    mask = mask.view_as(weight)
    return torch.where(mask, weight.half().float(), _round(weight, mask, choices)), mask


def _round(weight: Tensor, mask: Tensor | None, choices: WeightChoices) -> Tensor:
    x = weight.reshape(weight.shape[0], -1, choices.scheme.group_size)
    outside = None if mask is None else mask.view(x.shape)
    core = x if outside is None else x.masked_fill(outside, 0.0)
    grid = grid_of(choices.scheme)
    fitted = fit_and_settle(grid, Groups(core, outside), choices.scheme)
    return grid.round(core, fitted.values, choices.scheme).view_as(weight)


def _bits(weights: Sequence[Tensor], choices: WeightChoices, outliers: Sequence[int]) -> float:
    size = count = 0
    for weight, kept in zip(weights, outliers, strict=True):
        shape = (weight.shape[0], weight.shape[1])
        size += stored_bytes(StoredWeight(choices.scheme, shape, kept, place_outliers(shape, choices, kept)))
        count += weight.numel()
    return 8 * size / count


def output_error(
    weights: Sequence[Tensor], found: Sequence[Tensor], inputs: Sequence[Tensor], seen: Sequence[Tensor]
) -> float:
    """``sum |x' W'^T - x W^T|^2 / sum |x W^T|^2`` over the layers of a site and the sequences.

    weights, inputs: the original ones. found, seen: the layers' weights and inputs after rounding.
    """
    error = norm = 0.0
    stacked, rounded = torch.cat([w.float() for w in weights]), torch.cat(list(found))
    for x, rounded_x in zip(inputs, seen, strict=True):
        expected = x.float() @ stacked.t()
        norm += float(expected.square().sum(dtype=torch.float64))
        error += float((rounded_x.float() @ rounded.t()).sub_(expected).square_().sum(dtype=torch.float64))
    return error / max(norm, 1e-300)


def fixed_error(
    consumers: Sequence[Site], fixed: Fixed, record: SiteRecord, inputs: Sequence[Tensor], input_bits: int | None
) -> float:
    """Relative squared output error of a site with a fix, on held-out inputs, one tensor `(tokens, in)` per sequence.

    input_bits: also round the inputs (scaled, if the fix scales them) to so many bits, with one range measured on
    calibration text; None leaves them unchanged.
    """
    seen = [x.float() if fixed.scales is None else x.float() / fixed.scales for x in inputs]
    if input_bits is not None:
        seen = [round_inputs(x, record.range(fixed.scales), input_bits, True) for x in seen]
    return output_error([site.read() for site in consumers], fixed.weights, inputs, seen)


def w8a8_error(
    consumers: Sequence[Site], record: SiteRecord, inputs: Sequence[Tensor], granularity: str, ranges: str
) -> float:
    """Relative squared output error of a site whose inputs and weights are rounded to 8 bits, on held-out inputs.

    Weights have one scale per output channel. granularity, ranges: of the inputs' ranges, as in
    :class:`fewbit.activations.choice.ActivationChoice`.
    """
    found = [round_weight(site.read(), _W8A8).decode() for site in consumers]
    seen = []
    for x in inputs:
        if ranges == "dynamic":
            spread = range_of(x, granularity)
        elif granularity == "token":
            spread = Range(*record.ranges.at(x.shape[0]))
        else:
            spread = record.range()
        seen.append(round_inputs(x, spread, _W8A8, True))
    return output_error([site.read() for site in consumers], found, inputs, seen)
