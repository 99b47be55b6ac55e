"""BiLLM's binarization against explicit loops, and its bytes."""

import pytest
import torch
from test_column_solver import random_problem

from fewbit.formats import native
from fewbit.formats.native import stored_bytes
from fewbit.grids import binary
from fewbit.grids.packing import unpack
from fewbit.grids.scheme import StoredWeight
from fewbit.pipeline.plan import scheme_for
from fewbit.recipe import preset
from fewbit.solvers.weight import solve_weight


def squared_error(block: torch.Tensor, salient: torch.Tensor) -> float:
    """Of one sign for what is not salient, and two signs for what is, weight by weight."""
    total = 0.0
    for row in block.tolist():
        one = [w for w, chosen in zip(row, salient.tolist(), strict=True) if not chosen]
        two = [w for w, chosen in zip(row, salient.tolist(), strict=True) if chosen]
        mean = sum(map(abs, one)) / len(one)
        total += sum((abs(w) - mean) ** 2 for w in one)
        if two:
            a1 = sum(map(abs, two)) / len(two)
            rest = [w - (a1 if w >= 0 else -a1) for w in two]
            a2 = sum(map(abs, rest)) / len(two)
            total += sum((r - (a2 if r >= 0 else -a2)) ** 2 for r in rest)
    return total


@pytest.mark.parametrize(("columns", "most"), [(24, 10), (5, 30), (1, 30)])
def test_the_number_of_salient_columns_by_an_explicit_loop(columns: int, most: int) -> None:
    block = torch.randn(7, columns, dtype=torch.float64).float() * torch.rand(columns)
    saliency = block.square().sum(dim=0)
    order = saliency.argsort(descending=True, stable=True)
    errors = []
    for count in range(min(most, columns - 1) + 1):
        salient = torch.zeros(columns, dtype=torch.bool)
        salient[order[:count]] = True
        errors.append(squared_error(block, salient))
    found, _ = binary.fit_block(block, saliency, most)
    assert squared_error(block, found) == pytest.approx(min(errors), rel=1e-5)


def test_the_break_point_by_an_explicit_loop() -> None:
    weights = torch.randn(4, 20)
    near, far = binary.split_scales(weights)
    best, expected = float("inf"), None
    largest = float(weights.abs().max())
    for step in range(1, binary.BREAKS):
        total, scales = 0.0, []
        for row in weights.abs().tolist():
            inside = [w for w in row if w <= largest * step / binary.BREAKS]
            outside = [w for w in row if w > largest * step / binary.BREAKS]
            a_c = sum(inside) / len(inside) if inside else 0.0
            a_s = sum(outside) / len(outside) if outside else a_c
            total += sum((w - a_c) ** 2 for w in inside) + sum((w - a_s) ** 2 for w in outside)
            scales.append((a_c, a_s))
        if total < best - 1e-9:
            best, expected = total, scales
    assert expected is not None
    assert torch.allclose(torch.cat([near, far], dim=1), torch.tensor(expected), atol=1e-5)


def test_salient_columns_are_those_that_pay() -> None:
    block = torch.randn(16, 32) * 0.1
    block[:, 7] *= 40
    salient, scales = binary.fit_block(block, block.square().sum(dim=0), 10)
    assert bool(salient[7])
    assert int(salient.sum()) <= 10
    assert scales.shape == (16, 4)
    none, _ = binary.fit_block(block, block.square().sum(dim=0), 0)
    assert not bool(none.any())


@pytest.mark.parametrize(("rows", "columns", "group"), [(16, 128, "64"), (9, 96, "32"), (3, 24, "row")])
def test_stored_planes_are_the_weights(rows: int, columns: int, group: str) -> None:
    weight, curvature = random_problem(rows, columns)
    recipe = preset("billm", group_size=group)
    scheme = scheme_for(columns, recipe)
    stored = StoredWeight(scheme, (rows, columns))
    for matrix in (curvature, None):
        solved = solve_weight(weight, matrix, recipe.for_weight(scheme))
        native.check_parts(solved.rows.parts, stored)
        assert torch.equal(native.decode(solved.rows.parts, stored), solved.decoded)
        blocks = solved.decoded.view(rows, -1, scheme.group_size)
        salient = torch.tensor([bool(b) for b in unpack(solved.rows.parts["salient"], 1, columns)])
        for index in range(blocks.shape[1]):
            inside = salient.view(-1, scheme.group_size)[index]
            for row in range(rows):
                assert blocks[row, index, ~inside].abs().unique().numel() <= 2
                assert blocks[row, index, inside].abs().unique().numel() <= 2
    expected = 2 + 64 / scheme.group_size
    assert 8 * stored_bytes(stored) / stored.weights == pytest.approx(expected + 1 / rows, abs=0.2)


def test_the_solver_carries_errors_on() -> None:
    weight, curvature = random_problem(32, 128)
    recipe = preset("billm", group_size="32")
    scheme = scheme_for(128, recipe)

    def cost(found: torch.Tensor) -> float:
        return float(((found - weight) @ curvature * (found - weight)).sum())

    solved = solve_weight(weight, curvature, recipe.for_weight(scheme))
    assert cost(solved.decoded) < 0.7 * cost(solve_weight(weight, None, recipe.for_weight(scheme)).decoded)
