"""The column solver against one-weight-at-a-time optimal brain surgeon in float64, and its invariances."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fewbit.curvature.damping import factor, prepare
from fewbit.grids.packing import unpack
from fewbit.grids.scale_formats import SCALE_FORMATS
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.pipeline.plan import scheme_for
from fewbit.recipe import Recipe, preset, replace_solver
from fewbit.solvers.column import DivergedError, solve_columns
from fewbit.solvers.weight import solve_weight, solve_weights


def round_to_half(column: Tensor, _: int = 0) -> Tensor:
    return (column * 2).round() / 2


def surgeon(weight: Tensor, curvature: Tensor) -> Tensor:
    """Optimal brain surgeon, a weight at a time: fix one, move the rest by its error, drop it from the inverse."""
    fixed = torch.zeros_like(weight, dtype=torch.float64)
    for row in range(weight.shape[0]):
        w = weight[row].double().clone()
        inverse = torch.linalg.inv(curvature.double())
        for j in range(w.numel()):
            fixed[row, j] = round_to_half(w[j])
            w = w - inverse[:, j] * (w[j] - fixed[row, j]) / inverse[j, j]
            inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return fixed


def random_problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), inputs.t() @ inputs


@pytest.mark.parametrize("columns", [1, 5, 128, 130, 300])
def test_against_the_surgeon(columns: int) -> None:
    weight, curvature = random_problem(3, columns)
    prepared, _ = prepare(curvature)
    damped = prepared + 0.01 * torch.eye(columns) * prepared.diagonal().mean()
    found = factor(prepared, 0.01)
    assert found is not None
    assert found.step == 0
    inverse = (found.upper.T @ found.upper).double()
    assert torch.allclose(inverse @ damped, torch.eye(columns, dtype=torch.float64), atol=1e-3)
    compensated = solve_columns(weight, found.upper, round_to_half)
    agreement = (round_to_half(compensated).double() == surgeon(weight, damped)).double().mean()
    # A float32 tie that falls the other way moves the columns after it, so a rare disagreement is no error.
    assert agreement > 0.98


def test_compensation_lowers_the_error() -> None:
    weight, curvature = random_problem(16, 64)
    found = factor(prepare(curvature)[0], 0.01)
    assert found is not None

    def cost(rounded: Tensor) -> float:
        return float(((rounded - weight) @ curvature * (rounded - weight)).sum())

    solved = round_to_half(solve_columns(weight, found.upper, round_to_half))
    assert cost(solved) < 0.7 * cost(round_to_half(weight))


def test_groups_are_entered_with_compensated_weights() -> None:
    weight, curvature = random_problem(4, 24)
    found = factor(prepare(curvature)[0], 0.1)
    assert found is not None
    seen: list[tuple[int, Tensor]] = []
    solved = solve_columns(weight, found.upper, round_to_half, lambda group, j: seen.append((j, group.clone())), 8)
    assert [j for j, _ in seen] == [0, 8, 16]
    assert torch.equal(seen[0][1], weight[:, :8])
    assert torch.equal(seen[1][1][:, 0], solved[:, 8])


def test_weights_that_run_away_are_an_error() -> None:
    with pytest.raises(DivergedError):
        solve_columns(torch.ones(2, 3), torch.full((3, 3), 1e-30).triu(), lambda c, _: c * 1e30)


RECIPES = {
    "gptq": preset("gptq", bits=3, group_size="16"),
    "gptq, act-order": replace_solver(preset("gptq", bits=3, group_size="16"), refit=False, act_order=True),
    "oac": preset("oac", bits=3, group_size="16"),
    "precal+oac": preset("precal+oac", bits=3, group_size="16"),
}


def solved_weight(weight: Tensor, curvature: Tensor | None, recipe: Recipe) -> Tensor:
    return solve_weight(weight, curvature, recipe.for_weight(scheme_for(weight.shape[1], recipe))).decoded


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
@settings(max_examples=8, deadline=None)
@given(power=st.integers(-60, 60))
def test_the_scale_of_a_curvature_means_nothing(name: str, power: int) -> None:
    weight, curvature = random_problem(8, 48)
    expected = solved_weight(weight, curvature, RECIPES[name])
    assert torch.equal(solved_weight(weight, curvature * 2.0**power, RECIPES[name]), expected)
    nearly = solved_weight(weight, curvature * 3.7, RECIPES[name])
    assert (nearly == expected).double().mean() > 0.99


def test_act_order_with_one_group_is_a_permuted_problem() -> None:
    weight, curvature = random_problem(8, 32)
    recipe = replace_solver(preset("oac", bits=3, group_size="row"), act_order=True)
    order = torch.argsort(prepare(curvature)[0].diagonal(), descending=True, stable=True)
    plain = replace_solver(recipe, act_order=False)
    permuted = solved_weight(weight[:, order], curvature[order][:, order], plain)
    assert torch.equal(solved_weight(weight, curvature, recipe)[:, order], permuted)


@pytest.mark.parametrize("name", RECIPES)
def test_dead_columns_are_rounded_plainly(name: str) -> None:
    weight, curvature = random_problem(8, 48)
    dead = torch.tensor([0, 5, 17, 47])
    curvature[dead] = 0
    curvature[:, dead] = 0
    scheme = scheme_for(48, RECIPES[name])
    found = solve_weight(weight, curvature, RECIPES[name].for_weight(scheme))
    stored = StoredWeight(scheme, (8, 48))
    if found.rows.where is not None:
        pytest.skip("its outliers are looked at in test_dead_columns_are_no_outliers")
    scale = SCALE_FORMATS["float16"].read(found.rows.parts, "scale", scheme, stored.groups)
    zero = unpack(found.rows.parts["zeros"], 3, 3).float()
    for column in dead.tolist():
        group = column // 16
        codes = (weight[:, column] / scale[:, group]).round().add(zero[:, group]).clamp(0, 7)
        assert torch.allclose(found.decoded[:, column], (codes - zero[:, group]) * scale[:, group])
    assert found.predicted is not None


def test_dead_columns_are_no_outliers() -> None:
    weight, curvature = random_problem(16, 64)
    dead = torch.arange(0, 64, 8)
    curvature[dead] = 0
    curvature[:, dead] = 0
    recipe = preset("precal+oac", bits=2, group_size="16", outlier_fraction=1 / 16)
    where = solve_weight(weight, curvature, recipe.for_weight(scheme_for(64, recipe))).rows.where
    assert where is not None
    assert float((where % 64 % 8 == 0).float().mean()) < 0.125


def test_a_curvature_of_0_is_a_fallback() -> None:
    weight, _ = random_problem(8, 48)
    recipe = preset("gptq", bits=4, group_size="16")
    solved = solve_weight(weight, torch.zeros(48, 48), recipe.for_weight(scheme_for(48, recipe)))
    assert solved.path == "fallback: its curvature is all 0"


def test_no_curvature_rounds_and_says_so() -> None:
    weight, _ = random_problem(8, 48)
    recipe = preset("gptq", bits=4, group_size="16")
    scheme = scheme_for(48, recipe)
    solved = solve_weight(weight, None, recipe.for_weight(scheme))
    assert solved.path == "rounded: no input seen"
    rounded = solve_weight(weight, torch.eye(48), recipe.for_weight(scheme))
    assert torch.equal(rounded.decoded, solved.decoded)
    assert rounded.path == "solved"


def test_a_curvature_that_is_not_one_falls_back() -> None:
    weight, _ = random_problem(8, 48)
    recipe = preset("gptq", bits=4, group_size="16")
    scheme: Scheme = scheme_for(48, recipe)
    nan = torch.eye(48)
    nan[3, 4] = float("nan")
    assert solve_weight(weight, nan, recipe.for_weight(scheme)).path == "fallback: the curvature is not finite"
    indefinite = torch.eye(48)
    indefinite[0, 1] = indefinite[1, 0] = 50.0
    assert (
        solve_weight(weight, indefinite, recipe.for_weight(scheme)).path
        == "fallback: the curvature has no Cholesky factor"
    )
    indefinite[0, 1] = indefinite[1, 0] = 1.05
    assert solve_weight(weight, indefinite, recipe.for_weight(scheme)).path == "solved with damping 0.1"


@pytest.mark.slow
@pytest.mark.parametrize("rows", [(16, 32, 48), (7, 16, 5)])
@pytest.mark.parametrize("method", ["gptq", "spqr", "precal+gptq", "precal+spqr", "precal+oac", "oac", "billm"])
def test_weights_solved_together_are_as_if_alone(method: str, rows: tuple[int, ...]) -> None:
    recipe = preset(method, **({} if method == "billm" else {"bits": 3}))
    _, curvature = random_problem(1, 128)
    weights = [random_problem(count, 128, seed=count)[0] * count for count in rows]
    scheme = scheme_for(128, recipe)
    together = solve_weights(weights, curvature, recipe.for_weight(scheme))
    for weight, found in zip(weights, together, strict=True):
        alone = solve_weight(weight, curvature, recipe.for_weight(scheme))
        # Sums over more rows may be added up in another order, which can move a code that was a tie.
        assert (found.decoded != alone.decoded).double().mean() < 0.02
        assert found.rows.squared_error == pytest.approx(alone.rows.squared_error, rel=0.02)
        assert found.rows.parts.keys() == alone.rows.parts.keys()
        for name, part in alone.rows.parts.items():
            assert found.rows.parts[name].shape == part.shape


def test_a_weight_that_diverges_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(weight: Tensor, *others: Any) -> Tensor:
        if float(weight.abs().max()) > 1e20:
            raise DivergedError
        return solve_columns(weight, *others)

    monkeypatch.setattr("fewbit.solvers.weight.solve_columns", diverging)
    recipe = preset("spqr", bits=3)
    good, curvature = random_problem(16, 64)
    found = solve_weights([good, good * 1e30], curvature, recipe.for_weight(scheme_for(64, recipe)))
    assert [one.path for one in found] == ["solved", "fallback: the solver diverged"]
    assert torch.equal(
        found[0].decoded, solve_weight(good, curvature, recipe.for_weight(scheme_for(64, recipe))).decoded
    )
