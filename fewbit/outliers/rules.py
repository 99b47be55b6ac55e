"""The rules that find outliers."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.choices import Choices, check_name
from fewbit.grids.choice import MAX_BITS
from fewbit.outliers.adaptive_lasso import group_mask, outlier_count, split, threshold
from fewbit.outliers.choice import OutlierChoice

Chunks = Sequence[Callable[[], Tensor]]

SENSITIVE_SHARE = 0.01
"""Estimated fraction of outliers by sensitivity; the exact number is known only after the solver has run."""


@dataclass(frozen=True)
class OutlierRule:
    """One rule that finds outliers; an entry of :data:`OUTLIER_RULES`.

    cut(chunks, weights, choice, pool): the threshold that all rows of a weight share, computed from chunks of the
    weight (or of its magnitudes, weighted by the cost of errors) that can be read repeatedly. divide(x, weighed, cut,
    choice): for weights `(..., g)`, the weights with outliers set to 0, and the mask of the outliers, or None if there
    can be none. weighed: the magnitudes that are compared with the threshold; None means those of the weights.
    expected(weights, group_size, choice): estimated number of outliers, as an upper bound. evenly: every group has the
    same number of outliers. in_columns: the column solver finds the outliers while it runs. refuses(recipe): why the
    rule cannot be combined with the other choices, or None.
    """

    name: str
    summary: str
    cut: Callable[[Chunks, int, OutlierChoice, Executor | None], float | None]
    divide: Callable[[Tensor, Tensor | None, float | None, OutlierChoice], tuple[Tensor, Tensor | None]]
    expected: Callable[[int, int, OutlierChoice], int]
    evenly: Callable[[OutlierChoice], bool] = lambda choice: False
    in_columns: bool = False
    refuses: Callable[[Choices], str | None] = lambda recipe: None


def _none(x: Tensor, *_: Any) -> tuple[Tensor, Tensor | None]:
    return x, None


def _found_later(x: Tensor, *_: Any) -> tuple[Tensor, Tensor | None]:
    """No outliers yet: the solver finds them later. Its fallback, plain rounding, has none."""
    return x, torch.zeros(x.shape, dtype=torch.bool, device=x.device)


def _lasso_cut(chunks: Chunks, weights: int, choice: OutlierChoice, pool: Executor | None) -> float | None:
    if choice.scope == "group" or choice.fraction == 0:
        return None
    return threshold(chunks, outlier_count(weights, choice.fraction), pool)


def _lasso_divide(
    x: Tensor, weighed: Tensor | None, cut: float | None, choice: OutlierChoice
) -> tuple[Tensor, Tensor | None]:
    if cut is not None and weighed is None:
        return split(x, cut)
    if cut is not None and weighed is not None:
        mask = split(weighed, cut)[1]
        return x.masked_fill(mask, 0.0), mask
    count = choice.per_group(x.shape[-1])
    if not count:
        return x, None
    magnitudes = x.abs() if weighed is None else weighed
    mask = group_mask(magnitudes.reshape(-1, x.shape[-1]), count).view(x.shape)
    return x.masked_fill(mask, 0.0), mask


def _lasso_refuses(recipe: Choices) -> str | None:
    return None if recipe.outliers.fraction else "outlier_fraction is 0, so there are no outliers: choose outliers none"


def _sensitivity_refuses(recipe: Choices) -> str | None:
    if recipe.solver.kind != "column" or not recipe.outliers.kind.apart:
        return "sensitivity outliers need the column solver and the outlier grid float16"
    if recipe.solver.act_order:
        return "sensitivity outliers are found when the solver reaches their group: omit --act-order"
    return None


def _lasso_expected(weights: int, group_size: int, choice: OutlierChoice) -> int:
    if choice.scope == "group":
        return choice.per_group(group_size) * (weights // group_size)
    return outlier_count(weights, choice.fraction)


OUTLIER_RULES: dict[str, OutlierRule] = {
    rule.name: rule
    for rule in (
        OutlierRule(
            "none",
            "no outliers",
            cut=lambda chunks, weights, choice, pool: None,
            divide=_none,
            expected=lambda weights, group_size, choice: 0,
        ),
        OutlierRule(
            "adaptive-lasso",
            "weights that an adaptive LASSO keeps non-zero (AdpQ)",
            cut=_lasso_cut,
            divide=_lasso_divide,
            expected=_lasso_expected,
            evenly=lambda choice: choice.scope == "group",
            refuses=_lasso_refuses,
        ),
        OutlierRule(
            "sensitivity",
            "weights with the largest rounding cost, found by the column solver (SpQR)",
            cut=lambda chunks, weights, choice, pool: None,
            divide=_found_later,
            expected=lambda weights, group_size, choice: outlier_count(weights, SENSITIVE_SHARE),
            in_columns=True,
            refuses=_sensitivity_refuses,
        ),
    )
}


def check_outlier_choice(recipe: Choices) -> str | None:
    """Why a recipe's outliers cannot be combined with its other choices, or None.

    Raises FewbitError for an unknown rule.
    """
    choice, core = recipe.outliers, recipe.grid
    check_name("outliers", choice.rule, OUTLIER_RULES)
    if choice.bits and not core.width <= choice.bits <= MAX_BITS:
        return f"outlier_bits must be 0 or from bits ({core.width:g}) to 8, not {choice.bits}"
    least = choice.kind.fewest_bits
    if choice.rule != "none" and choice.kind.bits(choice.bits, -int(-core.width // 1)) < least:
        return f"the outlier grid {choice.grid} needs at least {least} bits: raise --outlier-bits"
    return OUTLIER_RULES[choice.rule].refuses(recipe)
