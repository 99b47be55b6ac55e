"""One weight matrix with a curvature: choose outliers and grids, then let the column solver choose the codes.

Read it beside `docs/methods.md`. With static grids everything but the codes is fixed before the first column; with
grids that are refitted a group's is chosen when the solver enters it, from weights that already make up for errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewbit.curvature.damping import Factor, factor, prepare
from fewbit.errors import FewbitError
from fewbit.formats.scheme import Scheme
from fewbit.grids.positions import flat_positions
from fewbit.outliers.adaptive_lasso import group_mask, outlier_count, split, threshold
from fewbit.outliers.sensitivity import column_costs, leave_one_out, sensitivity_threshold
from fewbit.pipeline.encode_weight import Settled, encode_weight
from fewbit.pipeline.fit_grid import Grid, as_float16, encode_outliers, evenly_spaced, fit_core, fit_outliers, round_to
from fewbit.pipeline.plan import outliers_per_group
from fewbit.pipeline.quantize_weight import NotFiniteError, QuantizedRows
from fewbit.pipeline.solve_binary import solve_binary
from fewbit.pipeline.solved import Solved, relative_cost
from fewbit.recipe import Recipe
from fewbit.solvers.column import DivergedError, solve_columns

NO_INPUT = "rounded: no input seen"
"""The path of a weight that no token of the calibration text reached."""


@dataclass(frozen=True)
class _Problem:
    """Everything the columns are rounded with; grids as `(groups, rows)`, so that a group's are contiguous."""

    recipe: Recipe
    scheme: Scheme
    weight: Tensor
    importance: Tensor | None


def solve_weight(weight: Tensor, curvature: Tensor | None, recipe: Recipe, scheme: Scheme) -> Solved:
    """Quantize `(out, in)`, any floating dtype, under a curvature `(in, in)`, or by rounding where it is None.

    Raises NotFiniteError when a weight is NaN or infinite.
    """
    return solve_weights([weight], curvature, recipe, scheme)[0]


def solve_weights(weights: Sequence[Tensor], curvature: Tensor | None, recipe: Recipe, scheme: Scheme) -> list[Solved]:
    """Quantize weights `(out, in)` that have one curvature in common, each as by itself.

    Rows do not see each other in the column solver, so it goes over all of them at once: a third fewer columns to step
    through in a block whose layers share their inputs.
    """
    if len(weights) > 1 and not _stackable(weights, scheme):
        return [solve_weight(weight, curvature, recipe, scheme) for weight in weights]
    weights = [weight.to(torch.float32) for weight in weights]
    if not all(bool(torch.isfinite(weight).all()) for weight in weights):
        raise NotFiniteError

    def rounded(path: str) -> list[Solved]:
        return [_rounded(weight, recipe, scheme, path) for weight in weights]

    if curvature is None:
        return rounded(NO_INPUT)
    if not bool(torch.isfinite(curvature).all()):
        return rounded("fallback: the curvature is not finite")
    if curvature.shape[0] != weights[0].shape[1]:
        raise FewbitError(
            f"its curvature has {curvature.shape[0]} columns, the weight {weights[0].shape[1]}: this layer is not one "
            "that can be calibrated: keep it with --exclude"
        )
    prepared, dead = prepare(curvature.to(weights[0].device))
    if bool(dead.all()):
        return rounded("fallback: its curvature is all 0")
    if recipe.solver.kind == "round":
        return rounded("rounded")
    order = _order(prepared, recipe)
    live = prepared - torch.diag(dead.to(prepared.dtype))
    found = factor(prepared[order][:, order], recipe.solver.damping)
    costs = None if found is None else column_costs(found.upper, dead[order])
    if scheme.grid == "binary":
        return [solve_binary(weight, live, found, costs, scheme) for weight in weights]
    importance = _importance(prepared, dead, found, order, recipe.solver.importance)
    problems = [_Problem(recipe, scheme, weight, importance) for weight in weights]
    fixed = [_static(problem) for problem in problems]
    path = "fallback: the curvature has no Cholesky factor"
    compensated = list(weights)
    if found is not None and costs is not None:
        try:
            compensated, fixed = _columns(problems, fixed, _Columns(found, order, costs))
            path = "solved" if found.step == 0 else f"solved with damping {found.damping:g}"
        except DivergedError:
            if len(weights) > 1:
                return [solve_weight(weight, curvature, recipe, scheme) for weight in weights]
            path = "fallback: the solver diverged"
    return [_finish(*one, path, live) for one in zip(weights, compensated, fixed, strict=True)]


def _stackable(weights: Sequence[Tensor], scheme: Scheme) -> bool:
    """Whether the rows of weights can be solved as one: statistics are shared by blocks of rows of one weight."""
    blocks = scheme.statistic_rows if scheme.scale_format == "statistics" else 1
    return all(weight.shape[0] % blocks == 0 for weight in weights[:-1])


def _rounded(weight: Tensor, recipe: Recipe, scheme: Scheme, path: str) -> Solved:
    """Every weight to its nearest level, with no curvature."""
    if scheme.grid == "binary":
        return solve_binary(weight, None, None, None, scheme, path)
    return _finish(weight, weight, _static(_Problem(recipe, scheme, weight, None)), path, None)


def round_weight(weight: Tensor, recipe: Recipe, scheme: Scheme) -> Tensor:
    """What a weight `(out, in)` float32 decodes to when it is rounded with no curvature, without its stored form."""
    if scheme.grid == "binary" or recipe.outliers != "none":
        return solve_weight(weight, None, recipe, scheme).decoded
    core = _static(_Problem(recipe, scheme, weight, None)).core
    grouped = weight.view(weight.shape[0], -1, scheme.group_size)
    offset = core.offset.unsqueeze(2) if isinstance(core.offset, Tensor) else core.offset
    return round_to(grouped, core.scale.unsqueeze(2), offset, scheme).view(weight.shape)


def _order(prepared: Tensor, recipe: Recipe) -> Tensor:
    columns = prepared.shape[0]
    if recipe.solver.act_order:
        return torch.argsort(prepared.diagonal(), descending=True, stable=True)
    return torch.arange(columns, device=prepared.device)


def _importance(prepared: Tensor, dead: Tensor, found: Factor | None, order: Tensor, kind: str) -> Tensor | None:
    """c_j of each column, mean 1, for grids and outliers.

    diagonal: H_jj, what an error in the column costs by itself. inverse: 1 / [H^-1]_jj, what it costs after the others
    have made up for it. A dead column costs as little as the cheapest live one.
    """
    if kind == "none" or (kind == "inverse" and found is None):
        return None
    if kind == "diagonal":
        costs = prepared.diagonal()
    else:
        assert found is not None
        costs = torch.empty_like(prepared.diagonal())
        costs[order] = 1.0 / found.upper.to(torch.float64).square().sum(dim=0)
    costs = torch.where(dead, costs[~dead].min(), costs)
    return (costs / costs.mean()).clamp(min=1e-8).to(torch.float32)


@dataclass(frozen=True)
class _Fixed:
    """What is chosen before the columns: the mask of outliers `(out, in)`, and both grids."""

    mask: Tensor | None
    core: Grid
    outliers: Grid | None


def _static(problem: _Problem) -> _Fixed:
    """Outliers by the adaptive LASSO, weighed by the columns' importance; grids from the weights as they are."""
    recipe, scheme, weight = problem.recipe, problem.scheme, problem.weight
    rows, columns = weight.shape
    x = weight.reshape(-1, scheme.group_size)
    spread = None
    if problem.importance is not None:
        spread = problem.importance.view(-1, scheme.group_size).repeat(rows, 1)
    mask = _outliers(x, spread, recipe, scheme)
    if recipe.outliers == "sensitivity":
        # The solver will find them; plain rounding, its fallback, has none.
        mask = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    core = x if mask is None else x.masked_fill(mask, 0.0)
    grid = fit_core(core, rows, scheme, recipe.search, mask, spread)
    if mask is None:
        return _Fixed(None, grid, None)
    where = flat_positions(mask)
    outlier_grid = fit_outliers(weight.reshape(-1)[where], where, (rows, columns), scheme)
    return _Fixed(mask.view(rows, columns), grid, outlier_grid)


def _outliers(x: Tensor, importance: Tensor | None, recipe: Recipe, scheme: Scheme) -> Tensor | None:
    """``|w| sqrt(c_j)`` above the threshold: with a diagonal curvature lambda'_j is lambda / (2 c_j)."""
    if recipe.outliers != "adaptive-lasso" or recipe.outlier_fraction == 0:
        return None
    magnitudes = x.abs() if importance is None else x.abs() * importance.sqrt()
    if recipe.outlier_scope == "group":
        return group_mask(magnitudes, outliers_per_group(recipe, scheme.group_size))
    cut = threshold([lambda: magnitudes], outlier_count(x.numel(), recipe.outlier_fraction))
    return split(magnitudes, cut)[1]


@dataclass(frozen=True)
class _Columns:
    """The solver's factor, the storage place of each of its columns, and what a squared error in each costs."""

    factor: Factor
    order: Tensor
    costs: Tensor


def _columns(problems: list[_Problem], each: list[_Fixed], columns: _Columns) -> tuple[list[Tensor], list[_Fixed]]:
    """Run the column solver; returns the compensated weights in storage order and the grids they ended with."""
    order, cost = columns.order, columns.costs
    scheme, recipe, importance = problems[0].scheme, problems[0].recipe, problems[0].importance
    weight, fixed, size = torch.cat([problem.weight for problem in problems]), _stack(each), scheme.group_size
    scale = fixed.core.scale.t().contiguous()
    offset = fixed.core.offset.t().contiguous() if isinstance(fixed.core.offset, Tensor) else fixed.core.offset
    column_of, group_of = order.tolist(), (order // size).tolist()
    mask = None if fixed.mask is None else fixed.mask.t().contiguous()
    cut = None
    if recipe.outliers == "sensitivity":
        cut = _thresholds(problems, columns)
        mask = torch.zeros(weight.t().shape, dtype=torch.bool, device=weight.device)
    refitted: list[Grid] = []

    def quantize(column: Tensor, j: int) -> Tensor:
        group = group_of[j]
        decoded = round_to(column, scale[group], offset[group] if isinstance(offset, Tensor) else offset, scheme)
        if mask is None:
            return decoded
        if cut is not None:
            torch.gt((column - decoded).square() * cost[j], cut, out=mask[j])
        if scheme.outlier_grid == "float16":
            return torch.where(mask[column_of[j]], as_float16(column), decoded)
        assert fixed.outliers is not None and isinstance(fixed.outliers.offset, Tensor)
        place = group if fixed.outliers.scale.shape[1] > 1 else 0
        _, kept = encode_outliers(column, fixed.outliers.scale[:, place], fixed.outliers.offset[:, place], scheme)
        return torch.where(mask[column_of[j]], kept, decoded)

    def enter(group: Tensor, first: int) -> None:
        index, rows, part = first // size, group.shape[0], slice(first, first + size)
        group = group.contiguous()
        outside = mask[part].t().contiguous() if mask is not None else None
        if cut is not None:
            outside = leave_one_out(group, cost[part], scheme.bits, cut.unsqueeze(1))
        core = group if outside is None else group.masked_fill(outside, 0.0)
        weights = None if importance is None else importance[part].unsqueeze(0)
        try:
            grid = fit_core(core, rows, scheme, recipe.search, outside, weights, stored=False)
        except FewbitError as error:
            # Weights that ran away fit no storage format; the weight as it was does.
            raise DivergedError from error
        refitted.append(grid)
        scale[index] = grid.scale[:, 0]
        if isinstance(offset, Tensor) and isinstance(grid.offset, Tensor):
            offset[index] = grid.offset[:, 0]

    ordered = solve_columns(
        weight[:, order], columns.factor.upper, quantize, enter if recipe.solver.refit else None, size
    )
    compensated = torch.empty_like(ordered)
    compensated[:, order] = ordered
    ends, first = [], 0
    for one, problem in zip(each, problems, strict=True):
        rows = slice(first, first + problem.weight.shape[0])
        first = rows.stop
        if cut is not None and mask is not None:
            one = replace(one, mask=mask[:, rows].t().contiguous())
        ends.append(replace(one, core=_join(refitted, rows, scheme)) if recipe.solver.refit else one)
    return list(compensated.split([problem.weight.shape[0] for problem in problems])), ends


def _thresholds(problems: list[_Problem], columns: _Columns) -> Tensor:
    """What each row's weights may cost before they are outliers, `(rows,)`: one threshold for all rows of a weight."""
    tau = problems[0].recipe.sensitivity
    cuts = []
    for problem in problems:
        cut = sensitivity_threshold(problem.weight[:, columns.order], columns.costs, tau)
        cuts.append(problem.weight.new_full((problem.weight.shape[0],), cut))
    return torch.cat(cuts)


def _stack(each: list[_Fixed]) -> _Fixed:
    """What was chosen for several weights, as for one with all their rows; without the parts that store it."""
    masks = [one.mask for one in each if one.mask is not None]
    outliers = [one.outliers for one in each if one.outliers is not None]
    return _Fixed(torch.cat(masks) if masks else None, _stack_grids([one.core for one in each]), _stack_grids(outliers))


def _stack_grids(grids: list[Grid]) -> Any:
    if not grids:
        return None
    offsets = [grid.offset for grid in grids if isinstance(grid.offset, Tensor)]
    offset = torch.cat(offsets) if offsets else grids[0].offset
    return Grid(grids[0].scheme, {}, torch.cat([grid.scale for grid in grids]), offset)


def _join(grids: list[Grid], rows: slice, scheme: Scheme) -> Grid:
    """One grid of all groups of some rows from those of single groups, in order: stored anew from the same ranges."""
    ends = [grid.extremes for grid in grids if grid.extremes is not None]
    return evenly_spaced(
        torch.cat([low[rows] for low, _ in ends], dim=1), torch.cat([high[rows] for _, high in ends], dim=1), scheme
    )


def _finish(weight: Tensor, compensated: Tensor, fixed: _Fixed, path: str, prepared: Tensor | None) -> Solved:
    """Codes of the compensated weights, packed, and the error against the weights as they were."""
    where = None if fixed.mask is None else flat_positions(fixed.mask)
    encoded = encode_weight(compensated, Settled(fixed.core, where, fixed.outliers))
    decoded = encoded.decoded
    difference = decoded - weight
    error, norm = float(difference.double().square().sum()), float(weight.double().square().sum())
    predicted = relative_cost(difference, weight, prepared)
    rows = QuantizedRows(encoded.parts, where, encoded.outlier_codes, error, norm)
    return Solved(rows, decoded, path, predicted)
