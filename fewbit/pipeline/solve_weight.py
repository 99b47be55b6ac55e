"""Weights by a recipe: for inputs as the recipe's transform gives them, the solver's part of it."""

from collections.abc import Sequence

from torch import Tensor

from fewbit.grids.scheme import Scheme
from fewbit.recipe import Recipe
from fewbit.solvers.solved import Solved
from fewbit.solvers.weight import solve_weights
from fewbit.transforms.table import TRANSFORMS


def solve_weight(weight: Tensor, curvature: Tensor | None, recipe: Recipe, scheme: Scheme) -> Solved:
    """Quantize `(out, in)` under a curvature `(in, in)` of its inputs, or by rounding where it is None."""
    return solve_alike([weight], curvature, recipe, scheme)[0]


def solve_alike(weights: Sequence[Tensor], curvature: Tensor | None, recipe: Recipe, scheme: Scheme) -> list[Solved]:
    """Quantize weights that share their inputs, their recipe and their scheme.

    What is solved, and its decoded weights, are for inputs that went through the transform.
    """
    transform = TRANSFORMS[scheme.transform]
    mapped = transform.fixed(weights[0].shape[1])
    if mapped:
        weights = [transform.weight(weight.float(), mapped) for weight in weights]
        curvature = None if curvature is None else transform.curvature(curvature, mapped)
    return solve_weights(weights, curvature, recipe.for_weight(scheme))
