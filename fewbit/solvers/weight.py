"""Quantize one weight matrix with a curvature: choose outliers and grids, then the column solver chooses the codes.

`docs/methods.md` describes the method. With static grids, everything except the codes is fixed before the first column.
With refitted grids, a group's grid is fitted when the solver reaches it, to weights that already compensate for earlier
errors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewbit.curvature.cost import relative_cost
from fewbit.curvature.damping import Factor, factor, prepare
from fewbit.errors import FewbitError
from fewbit.grids.grid import Groups, Values, of_group, stack
from fewbit.grids.positions import flat_positions
from fewbit.grids.scheme import Scheme
from fewbit.grids.table import grid_of, row_block
from fewbit.outliers.grids import OUTLIER_GRIDS
from fewbit.outliers.rules import OUTLIER_RULES
from fewbit.outliers.sensitivity import column_costs, leave_one_out, sensitivity_threshold
from fewbit.solvers.column import DivergedError, solve_columns
from fewbit.solvers.settled import Settled, WeightChoices, check_finite, encode, settle
from fewbit.solvers.solved import Solved

NO_INPUT = "rounded: no input seen"
"""The path of a weight that no token of the calibration text reached."""


def solve_weight(weight: Tensor, curvature: Tensor | None, choices: WeightChoices) -> Solved:
    """Quantize a weight `(out, in)` of any floating-point dtype with a curvature `(in, in)`; None means rounding.

    Raises NotFiniteError if a weight is NaN or infinite.
    """
    return solve_weights([weight], curvature, choices)[0]


def solve_weights(weights: Sequence[Tensor], curvature: Tensor | None, choices: WeightChoices) -> list[Solved]:
    """Quantize weights `(out, in)` that share a curvature; the result is the same as for each weight by itself.

    The column solver treats rows independently, so it processes the rows of all weights at once. This leaves a third
    fewer columns to process in a block whose layers share their inputs.
    """
    if len(weights) > 1 and not _stackable(weights, choices):
        return [solve_weight(weight, curvature, choices) for weight in weights]
    weights = [weight.to(torch.float32) for weight in weights]
    for weight in weights:
        check_finite(weight)
    if curvature is not None and curvature.shape[0] != weights[0].shape[1]:
        raise FewbitError(
            f"its curvature has {curvature.shape[0]} columns, but the weight has {weights[0].shape[1]}: this layer "
            "cannot be calibrated: keep it with --exclude"
        )
    return _solve(weights, _prepared(curvature, choices, weights[0].device), choices)


def row_solver(curvature: Tensor, choices: WeightChoices, device: torch.device) -> Callable[[Tensor], Solved]:
    """A function that quantizes some rows `(rows, in)` of a weight on `device` with a curvature `(in, in)`.

    For a weight that is too large to be solved at once; the factor is computed only once. Several threads may call it.
    The choices must be without outliers, as they depend on all rows. It raises NotFiniteError as :func:`solve_weight`.
    """
    ready = _prepared(curvature, choices, device)

    def solve(rows: Tensor) -> Solved:
        rows = rows.to(torch.float32)
        check_finite(rows)
        return _solve([rows], ready, choices)[0]

    return solve


@dataclass(frozen=True)
class _Ready:
    """A curvature, prepared for the solver.

    path: that of the result. columns: None for weights that are rounded. importance: c_j for rounding. live: the
    scaled curvature, 0 in dead columns, for the predicted error; None to predict none.
    """

    path: str
    columns: "_Columns | None" = None
    importance: Tensor | None = None
    live: Tensor | None = None


def _prepared(curvature: Tensor | None, choices: WeightChoices, device: torch.device) -> _Ready:
    if curvature is None:
        return _Ready(NO_INPUT)
    if not bool(torch.isfinite(curvature).all()):
        return _Ready("fallback: the curvature is not finite")
    prepared, dead = prepare(curvature.to(device))
    if bool(dead.all()):
        return _Ready("fallback: its curvature is all 0")
    if not choices.solver.method.compensates:
        return _Ready("rounded")
    order = _order(prepared, choices)
    live = prepared - torch.diag(dead.to(prepared.dtype))
    found = factor(prepared[order][:, order], choices.solver.damping)
    importance = _importance(prepared, dead, found, order, choices.solver.importance)
    if found is None:
        return _Ready("fallback: the curvature has no Cholesky factor", None, importance, live)
    columns = _Columns(found, order, column_costs(found.upper, dead[order]), importance)
    path = "solved" if found.step == 0 else f"solved with damping {found.damping:g}"
    return _Ready(path, columns, importance, live)


def _solve(weights: list[Tensor], ready: _Ready, choices: WeightChoices) -> list[Solved]:
    """Quantize weights `(out, in)` float32 that can be solved as one matrix."""
    path = ready.path
    if ready.columns is not None:
        try:
            ends = _columns(weights, choices, ready.columns)
            return [_finish(*one, path, ready.live) for one in zip(weights, *ends, strict=True)]
        except DivergedError:
            if len(weights) > 1:
                return [_solve([weight], ready, choices)[0] for weight in weights]
            path = "fallback: the solver diverged"
    return [_rounded(weight, choices, ready.importance, path, ready.live) for weight in weights]


def _stackable(weights: Sequence[Tensor], choices: WeightChoices) -> bool:
    """Whether the weights can be solved as one matrix: rows stored or rounded together must be of the same weight."""
    block = row_block(choices.scheme)
    return block > 0 and all(weight.shape[0] % block == 0 for weight in weights[:-1])


def _rounded(
    weight: Tensor, choices: WeightChoices, importance: Tensor | None, path: str, live: Tensor | None
) -> Solved:
    """Round every weight to its nearest level."""
    return _finish(weight, weight, _static(weight, choices, importance), path, live)


def round_weight(weight: Tensor, choices: WeightChoices) -> Tensor:
    """The decoded weight of `(out, in)` float32, rounded without a curvature; its stored form is not made."""
    scheme = choices.scheme
    if scheme.has_outliers:
        return _rounded(weight, choices, None, "", None).decoded
    grouped = weight.view(weight.shape[0], -1, scheme.group_size)
    return grid_of(scheme).round(grouped, _static(weight, choices, None).core.values, scheme).view(weight.shape)


def _order(prepared: Tensor, choices: WeightChoices) -> Tensor:
    """Indices of the columns in the solver's order; columns that are rounded together stay together."""
    columns = prepared.shape[0]
    if not choices.solver.act_order:
        return torch.arange(columns, device=prepared.device)
    run = grid_of(choices.scheme).span.columns
    runs = torch.argsort(prepared.diagonal().view(-1, run).sum(dim=1), descending=True, stable=True)
    return (runs.unsqueeze(1) * run + torch.arange(run, device=prepared.device)).view(-1)


def _importance(prepared: Tensor, dead: Tensor, found: Factor | None, order: Tensor, kind: str) -> Tensor | None:
    """c_j of each column, with mean 1, for fitting grids and finding outliers; None if all are 1.

    A dead column gets the lowest cost of the live ones.
    """
    costs = _COLUMN_COSTS[kind](prepared, found, order)
    if costs is None:
        return None
    costs = torch.where(dead, costs[~dead].min(), costs)
    return (costs / costs.mean()).clamp(min=1e-8).to(torch.float32)


def _inverse_costs(prepared: Tensor, found: Factor | None, order: Tensor) -> Tensor | None:
    if found is None:
        return None
    costs = torch.empty_like(prepared.diagonal())
    costs[order] = 1.0 / found.upper.to(torch.float64).square().sum(dim=0)
    return costs


_COLUMN_COSTS: dict[str, Callable[[Tensor, Factor | None, Tensor], Tensor | None]] = {
    "none": lambda prepared, found, order: None,
    "diagonal": lambda prepared, found, order: prepared.diagonal(),
    "inverse": _inverse_costs,
}
"""The cost of an error in each column: by itself (H_jj), or after the other columns have compensated for it
(1 / [H^-1]_jj)."""


def _static(weight: Tensor, choices: WeightChoices, importance: Tensor | None) -> Settled:
    """Outliers and grids of the original weights."""
    rule, columns = OUTLIER_RULES[choices.outliers.rule], weight.shape[1]
    magnitudes = weight.abs() if importance is None else weight.abs() * importance.view(1, columns).sqrt()
    cut = rule.cut([lambda: magnitudes], weight.numel(), choices.outliers, None)
    return settle(weight, choices, cut, importance)


@dataclass(frozen=True)
class _Columns:
    """The solver's factor, the storage index of each of its columns, the cost of a squared error in each, and c_j."""

    factor: Factor
    order: Tensor
    costs: Tensor
    importance: Tensor | None


@dataclass
class _Grids:
    """The grids to which columns are rounded.

    values: those of static grids, `(groups, rows, n)`, so that the values of a group are contiguous; None if grids are
    refitted. here: the values of the current refitted group. refitted: the values of all refitted groups so far.
    """

    values: dict[str, Tensor] | None
    here: Values
    refitted: list[Values]


def _columns(
    weights: Sequence[Tensor], choices: WeightChoices, columns: _Columns
) -> tuple[list[Tensor], list[Settled]]:
    """Run the column solver; returns the compensated weights in storage order, and their final grids."""
    order, cost = columns.order, columns.costs
    scheme, importance, size = choices.scheme, columns.importance, choices.scheme.group_size
    grid, run, refit = grid_of(scheme), grid_of(scheme).span.columns, choices.solver.refit
    rule = OUTLIER_RULES[choices.outliers.rule]
    # Grids that are fitted block by block need no static fit. All others do, if only for the outliers.
    each = [] if grid.block_by_block else [_static(weight, choices, importance) for weight in weights]
    weight = torch.cat(list(weights))
    mask = _masks(weights, each)
    cut = None
    if rule.in_columns:
        cut = _thresholds(weights, choices, columns)
        mask = torch.zeros(weight.t().shape, dtype=torch.bool, device=weight.device)
    kept = _outlier_rounding(each, scheme) if mask is not None else None
    column_of, group_of = order.tolist(), (order // size).tolist()
    grids = _Grids(None, {}, [])
    if not refit:
        stacked = stack([one.core.values for one in each])
        grids.values = {name: value.transpose(0, 1).contiguous() for name, value in stacked.items()}

    def quantize(part: Tensor, j: int) -> Tensor:
        group, first = group_of[j], column_of[j]
        here = grids.here
        if grids.values is not None:
            here = {name: value[group] for name, value in grids.values.items()}
        if grid.by_column:
            inside = slice(first % size, first % size + run)
            here = {name: value[:, inside] if name in grid.by_column else value for name, value in here.items()}
        decoded = grid.round(part, here, scheme)
        if mask is None or kept is None:
            return decoded
        if cut is not None:
            for k in range(run):
                torch.gt((part[:, k] - decoded[:, k]).square() * cost[j + k], cut, out=mask[j + k])
        outside = mask[first : first + run].t()
        if grid.span.weights > 1:
            # Weights that share a code with an outlier are rounded without it, as they will be stored.
            decoded = grid.round(part.masked_fill(outside, 0.0), here, scheme)
        return torch.where(outside, kept(part, group), decoded)

    def enter(group: Tensor, first: int) -> None:
        part = slice(first, first + size)
        group = group.contiguous()
        outside = mask[part].t().contiguous() if mask is not None else None
        try:
            if cut is not None and grid.trial is not None:
                outside = leave_one_out(group, cost[part], *grid.trial(scheme), cut.unsqueeze(1))
            core = group if outside is None else group.masked_fill(outside, 0.0)
            spread = None if importance is None else importance[part].view(1, 1, -1)
            outside = None if outside is None else outside.unsqueeze(1)
            groups = Groups(core.unsqueeze(1), outside, spread, cost[part].view(1, -1))
            wanted = grid.fit(groups, scheme, choices.search)
            grids.here = grid.spread(of_group(grid.settle(wanted, scheme, False).values, 0))
        except FewbitError as error:
            # Diverged weights can be too large for the storage format; the original weight is not.
            raise DivergedError from error
        grids.refitted.append(wanted)

    ordered = solve_columns(weight[:, order], columns.factor.upper, quantize, enter if refit else None, size, run)
    compensated = torch.empty_like(ordered)
    compensated[:, order] = ordered
    ends, first = [], 0
    for index, one in enumerate(weights):
        rows = slice(first, first + one.shape[0])
        first = rows.stop
        end = each[index] if each else None
        if refit:
            wanted = {
                name: torch.cat([_rows(group[name], rows) for group in grids.refitted], dim=1)
                for name in grids.refitted[0]
            }
            core = grid.settle(wanted, scheme, True)
            end = Settled(core) if end is None else replace(end, core=core)
        assert end is not None
        if cut is not None and mask is not None:
            end = replace(end, where=flat_positions(mask[:, rows].t().contiguous()))
        ends.append(end)
    return list(compensated.split([one.shape[0] for one in weights])), ends


def _rows(value: Tensor, rows: slice) -> Tensor:
    """Some rows of a value; a value with one row is the same for all rows."""
    return value if value.shape[0] == 1 else value[rows]


def _masks(weights: Sequence[Tensor], each: list[Settled]) -> Tensor | None:
    """The mask of the outliers of all weights, `(in, rows)`, or None if there are none."""
    if not each or each[0].where is None:
        return None
    masks = []
    for weight, one in zip(weights, each, strict=True):
        mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        mask[one.where] = True
        masks.append(mask.view(weight.shape))
    return torch.cat(masks).t().contiguous()


def _outlier_rounding(each: list[Settled], scheme: Scheme) -> Callable[[Tensor, int], Tensor]:
    """The function that rounds columns `(rows, k)` of one group as outliers."""
    kind = OUTLIER_GRIDS[scheme.outlier_grid]
    values = stack([one.outliers.values for one in each if one.outliers is not None])
    scale, minimum = values["scale"], values["minimum"]

    def kept(part: Tensor, group: int) -> Tensor:
        place = group if scale.shape[1] > 1 else 0
        return kind.encode(part, scale[:, place, None], minimum[:, place, None], scheme)[1]

    return kept


def _thresholds(weights: Sequence[Tensor], choices: WeightChoices, columns: _Columns) -> Tensor:
    """The cost above which a weight is an outlier, for each row, `(rows,)`; all rows of a weight have the same."""
    cuts = []
    for weight in weights:
        cut = sensitivity_threshold(weight[:, columns.order], columns.costs, choices.outliers.sensitivity)
        cuts.append(weight.new_full((weight.shape[0],), cut))
    return torch.cat(cuts)


def _finish(weight: Tensor, compensated: Tensor, settled: Settled, path: str, prepared: Tensor | None) -> Solved:
    """Packed codes of the compensated weights, and their error relative to the original weights."""
    encoded = encode(compensated, weight, settled)
    return Solved(encoded, path, relative_cost(encoded.decoded - weight, weight, prepared))
