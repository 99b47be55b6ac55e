"""Solve weights as a recipe says: apply its transform, then its solver."""

from collections.abc import Sequence

from torch import Tensor

from fewbit.grids.scheme import Scheme
from fewbit.recipe import Recipe
from fewbit.solvers.solved import Solved
from fewbit.solvers.weight import solve_weights
from fewbit.transforms.table import TRANSFORMS


def solve_weight(weight: Tensor, curvature: Tensor | None, recipe: Recipe, scheme: Scheme) -> Solved:
    """Quantize a weight `(out, in)` with a curvature `(in, in)` of its inputs, or by rounding if it is None."""
    return solve_alike([weight], curvature, recipe, scheme)[0]


def solve_alike(weights: Sequence[Tensor], curvature: Tensor | None, recipe: Recipe, scheme: Scheme) -> list[Solved]:
    """Quantize weights that share their inputs, their recipe and their scheme.

    The results, including the decoded weights, are for transformed inputs.
    """
    transform = TRANSFORMS[scheme.transform]
    mapped = transform.fixed(weights[0].shape[1])
    if mapped:
        weights = [transform.weight(weight.float(), mapped) for weight in weights]
        curvature = None if curvature is None else transform.curvature(curvature, mapped)
    return solve_weights(weights, curvature, recipe.for_weight(scheme))
