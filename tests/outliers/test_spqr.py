"""SpQR's parts: two-level statistics, leave-one-out, bits by formula and by bytes."""

import pytest
import torch
from test_column_solver import random_problem
from torch import Tensor

from fewbit.formats import native
from fewbit.formats.native import stored_bytes
from fewbit.grids.evenly import MINIMUM
from fewbit.grids.packing import unpack
from fewbit.grids.scales import as_statistics, from_statistics, to_statistics
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.outliers.grids import pack_outliers, read_positions
from fewbit.outliers.sensitivity import column_costs, leave_one_out, sensitivity_threshold
from fewbit.pipeline.plan import scheme_for
from fewbit.recipe import Recipe, preset
from fewbit.solvers.weight import solve_weight


@pytest.mark.parametrize(
    ("rows", "groups", "bits", "block"), [(16, 3, 3, 16), (37, 1, 3, 16), (5, 4, 2, 32), (1, 1, 8, 1)]
)
def test_statistics_are_within_half_a_step(rows: int, groups: int, bits: int, block: int) -> None:
    values = torch.randn(rows, groups) * 3 + 7
    packed, second = to_statistics(values, bits, block)
    found = from_statistics(packed, second, bits, block, groups)
    assert torch.equal(found, as_statistics(values, bits, block))
    for first in range(0, rows, block):
        part = slice(first, first + block)
        step = (values[part].amax(dim=0) - values[part].amin(dim=0)) / (2**bits - 1)
        # Half a step, and what float16 loses on the minimum and on the step.
        assert bool(((found[part] - values[part]).abs() <= 0.5 * step + 2e-3 * values[part].abs().amax()).all())


def saved_by_leaving_out(group: Tensor, cost: Tensor, bits: int) -> Tensor:
    """The definition: fit the grid without each weight in turn."""

    def total(fitted: Tensor, scored: Tensor, weights: Tensor) -> float:
        low, high = float(fitted.min()), float(fitted.max())
        step = (high - low) / (2**bits - 1) or 1.0
        decoded = low + step * torch.clamp(torch.round((scored - low) / step), 0, 2**bits - 1)
        return float(((decoded - scored) ** 2 * weights).sum())

    saved = torch.zeros_like(group)
    for row in range(group.shape[0]):
        everything = total(group[row], group[row], cost)
        for k in range(group.shape[1]):
            rest = torch.arange(group.shape[1]) != k
            saved[row, k] = everything - total(group[row, rest], group[row, rest], cost[rest])
    return saved


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [2, 7, 16])
def test_leave_one_out_against_its_definition(bits: int, size: int) -> None:
    generator = torch.Generator().manual_seed(bits * 100 + size)
    group = torch.randn(40, size, generator=generator).double()
    group[:10, 0] *= 8
    cost = torch.rand(size, generator=generator).double() + 0.1
    saved = saved_by_leaving_out(group, cost, bits)
    exact = Scheme(bits, size, "minimum", scale_format="float32")
    for threshold in (float(saved.quantile(0.5)), float(saved.quantile(0.9)), 1e9):
        sure = (saved - threshold).abs() > 1e-9
        assert torch.equal(leave_one_out(group, cost, MINIMUM, exact, threshold)[sure], (saved > threshold)[sure])


@pytest.mark.parametrize(
    ("bits", "group", "rows_a_block", "statistic_bits", "expected"),
    [(2, 16, 16, 3, 2.625), (2, 64, 32, 2, 2.09375), (2, 128, 16, 3, 2.078125)],
)
def test_bits_by_formula_and_by_bytes(
    bits: int, group: int, rows_a_block: int, statistic_bits: int, expected: float
) -> None:
    formula = bits + 2 * statistic_bits / group + 64 / (group * rows_a_block)
    assert formula == pytest.approx(expected)
    scheme = Scheme(bits, group, "real-zero", (), "statistics", "none", 0, statistic_bits, rows_a_block)
    stored = StoredWeight(scheme, (1024, 4096))
    assert 8 * stored_bytes(stored) / stored.weights == pytest.approx(expected)


def solve(
    recipe: Recipe, rows: int = 24, columns: int = 96
) -> tuple[Tensor, Tensor, StoredWeight, dict[str, Tensor], Tensor]:
    from fewbit.pipeline.plan import place_outliers

    weight, curvature = random_problem(rows, columns)
    weight[3, 5] = 30.0
    scheme = scheme_for(columns, recipe)
    solved = solve_weight(weight, curvature, recipe.for_weight(scheme))
    assert solved.path == "solved"
    where = solved.rows.where
    assert where is not None
    placed = place_outliers((rows, columns), recipe.for_weight(scheme), where.numel())
    stored = StoredWeight(scheme, (rows, columns), where.numel(), placed)
    parts = dict(solved.rows.parts)
    assert solved.rows.outlier_codes is not None
    parts.update(pack_outliers(solved.rows.outlier_codes, where, stored))
    native.check_parts(parts, stored)
    return weight, curvature, stored, parts, solved.decoded


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sensitive_weights_keep_16_bits(bits: int) -> None:
    recipe = preset("spqr", bits=bits)
    weight, curvature, stored, parts, decoded = solve(recipe)
    assert torch.equal(native.decode(parts, stored), decoded)
    where = read_positions(parts, stored).tolist()
    assert 3 * 96 + 5 in where
    assert len(where) < 0.2 * weight.numel()
    assert abs(float(decoded[3, 5]) - 30.0) < 1.0
    none = solve_weight(weight, curvature, preset("spqr", bits=bits, sensitivity=1e9).for_weight(stored.scheme))
    assert none.rows.where is not None
    assert none.rows.where.numel() == 0

    def cost(found: Tensor) -> float:
        return float(((found - weight) @ curvature * (found - weight)).sum())

    assert cost(decoded) < cost(none.decoded)


def test_the_threshold_is_the_mean_over_columns() -> None:
    weight = torch.tensor([[1.0, 4.0], [3.0, 8.0]])
    upper = torch.tensor([[2.0, 1.0], [0.0, 0.5]])
    none, second = torch.tensor([False, False]), torch.tensor([False, True])
    whole = sensitivity_threshold(weight, column_costs(upper, none), 0.1)
    assert whole == pytest.approx(0.1 * (1 / 4 + 4 / 0.25) / 2)
    assert sensitivity_threshold(weight, column_costs(upper, second), 0.1) == pytest.approx(0.1 / 4)


@pytest.mark.parametrize("name", ["spqr", "oac+spqr", "billm"])
def test_columns_without_input_are_neither_outliers_nor_salient(name: str) -> None:
    weight, curvature = random_problem(64, 128)
    dead = torch.arange(128) % 4 == 0
    weight[:, dead] *= 4
    curvature[dead] = 0
    curvature[:, dead] = 0
    recipe = preset(name) if name == "billm" else preset(name, bits=3)
    rows = solve_weight(weight, curvature, recipe.for_weight(scheme_for(128, recipe))).rows
    if name == "billm":
        assert not bool((unpack(rows.parts["salient"], 1, 128).bool() & dead).any())
        return
    where = rows.where
    assert where is not None
    assert len(where) > 0
    # One that stretches its group's grid may still be split off: that is a gain for the others.
    assert float(dead[where % 128].double().mean()) < 0.1
