"""Every width, ragged shape and form of outliers, through rounding, the solver, storage, decoding and tuning."""

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fewbit.errors import FewbitError
from fewbit.formats import native
from fewbit.grids.grid import Grid
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.grids.table import GRIDS
from fewbit.outliers.grids import OUTLIER_GRIDS, pack_outliers
from fewbit.outliers.rules import OUTLIER_RULES
from fewbit.pipeline.plan import place_outliers
from fewbit.recipe import Recipe, preset, with_choices
from fewbit.solvers.settled import Encoded, round_rows
from fewbit.solvers.weight import solve_weight
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.tuned_weight import TunedWeight

GROUPS = (1, 2, 3, 5, 8, 15, 16, 45)
FORMS = [("none", "minmax")] + [("adaptive-lasso", grid) for grid in OUTLIER_GRIDS]


def recipe_for(grid: Grid, bits: float, group: int, form: tuple[str, str], scope: str) -> Recipe:
    """A rounding recipe of that grid; FewbitError where two of its choices do not go together."""
    scales = {"real": "statistics"}.get(grid.offset, "two-level" if bits == 4 and not grid.offset else "float16")
    choices: dict[str, Any] = {"grid": grid.choice, "bits": bits, "group_size": str(group), "scale_format": scales}
    rule, outlier_grid = form
    if rule != "none":
        few = max(2, -int(-bits // 1))
        wide = 0 if outlier_grid == "float16" else 8 if group % 2 else few
        choices |= {"outliers": rule, "outlier_grid": outlier_grid, "outlier_bits": wide, "outlier_scope": scope}
        choices |= {"outlier_fraction": 0.2}
    return preset("rtn", **choices)


def stored(found: Encoded, recipe: Recipe, scheme: Scheme, shape: tuple[int, int]) -> tuple[StoredWeight, Any]:
    count = 0 if found.where is None else found.where.numel()
    if not count:
        # As the pipeline stores a weight in which none were found.
        scheme = replace(scheme, outlier_grid="none", outlier_bits=0)
        parts = {name: part for name, part in found.parts.items() if not name.startswith("outlier_")}
        return StoredWeight(scheme, shape), parts
    placed = place_outliers(shape, recipe.for_weight(scheme), count)
    one, parts = StoredWeight(scheme, shape, count, placed), dict(found.parts)
    if found.where is not None and found.outlier_codes is not None:
        parts |= pack_outliers(found.outlier_codes, found.where, one)
    native.check_parts(parts, one)
    return one, parts


@st.composite
def problems(draw: Any) -> tuple[Recipe, Scheme, Tensor]:
    grid = draw(st.sampled_from([grid for grid in GRIDS.values() if not grid.block_by_block]))
    bits = draw(st.sampled_from(grid.widths))
    group = draw(st.sampled_from(GROUPS))
    shape = (draw(st.integers(1, 7)), group * draw(st.integers(1, 7)))
    form, scope = draw(st.sampled_from(FORMS)), draw(st.sampled_from(["tensor", "group"]))
    if grid.brings:
        recipe = preset("rtn", grid=grid.choice)
        shape = (shape[0], grid.block * draw(st.integers(1, 2)))
        size = recipe.grid.group_size
        group = shape[1] if size == "row" else int(size)
    else:
        try:
            recipe = recipe_for(grid, bits, group, form, scope)
        except FewbitError:
            recipe = recipe_for(grid, bits, group, ("none", "minmax"), scope)
    scheme = native.check_scheme(recipe.scheme(group))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    if draw(st.booleans()):
        weight[:, ::3] = 0.0
    return recipe, scheme, weight


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(problems())
def test_what_is_rounded_is_what_is_read(problem: tuple[Recipe, Scheme, Tensor]) -> None:
    recipe, scheme, weight = problem
    choices = recipe.for_weight(scheme)
    cut = OUTLIER_RULES[choices.outliers.rule].cut([lambda: weight], weight.numel(), choices.outliers, None)
    found = round_rows(weight, choices, cut, None)
    one, parts = stored(found, recipe, scheme, (weight.shape[0], weight.shape[1]))
    assert torch.equal(native.decode(parts, one), found.decoded)
    assert native.stored_bytes(one) == sum(part.numel() * part.element_size() for part in parts.values())


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(problems())
def test_what_is_solved_is_what_is_read(problem: tuple[Recipe, Scheme, Tensor]) -> None:
    recipe, scheme, weight = problem
    inputs = torch.randn(3 * weight.shape[1], weight.shape[1], generator=torch.Generator().manual_seed(1))
    solver = preset("oac").solver
    solved = with_choices(recipe, {"solver": solver, "curvature": preset("gptq").curvature})
    found = solve_weight(weight, inputs.t() @ inputs, solved.for_weight(scheme))
    one, parts = stored(found.rows, solved, scheme, (weight.shape[0], weight.shape[1]))
    assert torch.equal(native.decode(parts, one), found.decoded)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(["all", "scales", "codes", "weights"]))
def test_what_is_tuned_is_what_is_read(problem: tuple[Recipe, Scheme, Tensor], train: str) -> None:
    recipe, scheme, weight = problem
    choices = recipe.for_weight(scheme)
    cut = OUTLIER_RULES[choices.outliers.rule].cut([lambda: weight], weight.numel(), choices.outliers, None)
    one, parts = stored(round_rows(weight, choices, cut, None), recipe, scheme, (weight.shape[0], weight.shape[1]))
    tuned = TunedWeight(one, parts, weight, TuningChoice(train=train))
    value = tuned.decoded()
    value.square().sum().backward()
    again = tuned.parts()
    torch.testing.assert_close(native.decode(again, one), value.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("columns", [1, 3, 7, 9, 90, 105])
@pytest.mark.parametrize("name", ["billm", "spqr"])
def test_ragged_columns_of_methods_that_refit(name: str, columns: int) -> None:
    recipe = preset(name, group_size="row")
    scheme, weight = recipe.scheme(columns), torch.randn(5, columns)
    inputs = torch.randn(200, columns)
    found = solve_weight(weight, inputs.t() @ inputs, recipe.for_weight(scheme))
    one, parts = stored(found.rows, recipe, scheme, (5, columns))
    assert torch.equal(native.decode(parts, one), found.decoded)
