"""Codes that stand for several weights: pairs in a row and pairs down a column, through all of the program."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_column_solver import random_problem
from torch import Tensor

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.curvature.damping import factor, prepare
from fewbit.errors import FewbitError
from fewbit.formats import native
from fewbit.formats.native import stored_bytes
from fewbit.grids.codes import bit_planes
from fewbit.grids.grid import Grid, Groups, Span, Values
from fewbit.grids.level_grid import read_scale, scale_layout, store_scale
from fewbit.grids.scales import divisor
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.grids.straight_through import seen_as
from fewbit.grids.table import GRIDS
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.plan import scheme_for
from fewbit.pipeline.run import RunOptions
from fewbit.recipe import Recipe, preset, with_choices
from fewbit.runtime.unpack import unpack
from fewbit.solvers.column import solve_columns
from fewbit.solvers.weight import solve_weight
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.run import TuneOptions

TEXT = CalibrationChoice("random-tokens", samples=4, sequence_length=32)
_SIDE = torch.tensor([-0.75, -0.25, 0.25, 0.75])
_TURN = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
POINTS = torch.cartesian_prod(_SIDE, _SIDE) @ _TURN
"""Sixteen points of the plane, no rows and columns of levels."""


def pairs_of(u: Tensor, span: Span) -> Tensor:
    """`(..., 2)`: the weights that are rounded together."""
    if span.columns == 2:
        return u.reshape(*u.shape[:-1], -1, 2)
    return u.reshape(-1, 2, *u.shape[1:]).movedim(1, -1)


def weights_of(pairs: Tensor, span: Span) -> Tensor:
    if span.columns == 2:
        return pairs.reshape(*pairs.shape[:-2], -1)
    return pairs.movedim(-1, 1).reshape(-1, *pairs.shape[1:-1])


def nearest(x: Tensor, scale: Tensor, span: Span) -> Tensor:
    pairs = pairs_of(x / divisor(scale), span)
    return torch.cdist(pairs.reshape(-1, 2), POINTS.to(pairs.dtype)).argmin(dim=1).view(pairs.shape[:-1])


def decode(span: Span, codes: Tensor, values: Values, scheme: Scheme) -> Tensor:
    return weights_of(POINTS[codes.long()], span) * values["scale"]


def rounded(span: Span, x: Tensor, scale: Tensor) -> Tensor:
    return weights_of(POINTS[nearest(x, scale, span)], span) * scale


def encode(span: Span, x: Tensor, values: Values, scheme: Scheme) -> tuple[Tensor, Tensor]:
    codes = nearest(x, values["scale"], span).to(torch.uint8)
    return codes, decode(span, codes, values, scheme)


def through(span: Span, x: Tensor, values: Values, scheme: Scheme) -> Tensor:
    scale = values["scale"]
    seen = rounded(span, x, scale).detach()
    return seen_as(x + scale * ((seen - x) / divisor(scale)).detach(), seen)


def neighbours(x: Tensor, values: Values, scheme: Scheme) -> tuple[Tensor, Tensor]:
    return x - 0.5 * values["scale"].abs(), x + 0.5 * values["scale"].abs()


def pair_grid(name: str, span: Span) -> Grid:
    return Grid(
        name,
        "pairs of weights, each at one of sixteen points",
        codes=lambda scheme: bit_planes(4, down=span.rows, along=span.columns),
        layout=scale_layout,
        fit=lambda groups, scheme, search: {"scale": groups.x.abs().amax(dim=-1, keepdim=True)},
        settle=store_scale,
        restore=store_scale,
        read=read_scale,
        encode=partial(encode, span),
        round=lambda x, values, scheme: rounded(span, x, values["scale"]),
        decode=partial(decode, span),
        through=partial(through, span),
        step=lambda values, scheme: 0.5 * values["scale"].abs(),
        neighbours=neighbours,
        widths=(2,),
        trial=lambda scheme: (GRIDS[name], Scheme(2, scheme.group_size, name, scale_format="float32")),
        span=span,
    )


SPANS = {"row-pairs": Span(columns=2), "column-pairs": Span(rows=2)}


@pytest.fixture(autouse=True, params=SPANS)
def grid(request: Any, monkeypatch: pytest.MonkeyPatch) -> Grid:
    made = pair_grid(request.param, SPANS[request.param])
    monkeypatch.setitem(GRIDS, made.name, made)
    return made


SPARSE: dict[str, Any] = {"outliers": "adaptive-lasso", "outlier_grid": "row", "outlier_bits": 8}
SENSITIVE: dict[str, Any] = {"outliers": "sensitivity", "outlier_grid": "float16"}


def recipe_of(grid: Grid, solver: str, **outliers: Any) -> Recipe:
    if solver == "round":
        return preset("rtn", grid=grid.name, group_size="16", **outliers)
    base = preset("gptq", grid=grid.name, group_size="16")
    if outliers.get("outliers") == "sensitivity":
        base = preset("gptq", grid=grid.name, group_size="16", solver=preset("spqr").solver)
    return with_choices(base, outliers)


@pytest.mark.slow
@pytest.mark.parametrize("outliers", [{}, SPARSE, SENSITIVE], ids=["none", "lasso", "sensitivity"])
@pytest.mark.parametrize("solver", ["round", "column"])
def test_quantized_packed_unpacked(grid: Grid, tiny: Path, tmp_path: Path, solver: str, outliers: Any) -> None:
    if solver == "round" and outliers is SENSITIVE:
        pytest.skip("only the column solver finds outliers by sensitivity")
    run = RunOptions(calibration=CalibrationOptions(TEXT, max_fallback=99))
    report = fewbit.quantize(tiny, tmp_path / "out", recipe_of(grid, solver, **outliers), run)
    if not outliers:
        assert report["output"]["bits_per_weight"] == 3.0
    ids = torch.arange(24).unsqueeze(0) + 3
    packed = fewbit.load(tmp_path / "out", device="cpu")(ids).logits
    plain = fewbit.load(unpack(tmp_path / "out", tmp_path / "plain"), device="cpu")(ids).logits
    assert torch.equal(packed, plain)


@pytest.mark.slow
@pytest.mark.parametrize("train", ["all", "scales", "codes"])
def test_tuned(grid: Grid, tiny: Path, tmp_path: Path, train: str) -> None:
    fewbit.quantize(tiny, tmp_path / "start", recipe_of(grid, "round", **SPARSE))
    choice = TuningChoice(train=train, epochs=1, batch_size=2, held_out=1, lr=0.01)
    fewbit.tune(tmp_path / "start", tmp_path / "tuned", choice, TuneOptions(reference=str(tiny), calibration=TEXT))
    ids = torch.arange(24).unsqueeze(0) + 3
    assert bool(torch.isfinite(fewbit.load(tmp_path / "tuned", device="cpu")(ids).logits).all())


def test_solved_codes_are_what_the_solver_rounded_to(grid: Grid) -> None:
    weight, curvature = random_problem(24, 64)
    errors = {}
    for act_order in (None, False, True):
        solver = "round" if act_order is None else "column"
        recipe = recipe_of(grid, solver)
        if act_order is not None:
            recipe = with_choices(recipe, {"solver": preset("oac").solver})
        choices = recipe.for_weight(scheme_for(64, recipe))
        solved = solve_weight(weight, curvature, choices)
        stored = StoredWeight(choices.scheme, (24, 64))
        assert torch.equal(native.decode(solved.rows.parts, stored), solved.decoded)
        assert stored_bytes(stored) == 24 * 64 // 4 + 24 * 4 * 2
        difference = solved.decoded - weight
        errors[act_order] = float((difference @ curvature * difference).sum())
    assert max(errors[True], errors[False]) < 0.7 * errors[None]


def test_a_run_of_columns_is_compensated_as_by_the_inverse() -> None:
    """Against the closed form: later columns take ``-E U_bb^-1 U_bk`` of the error E of those rounded together."""
    weight, curvature = random_problem(5, 12)
    found = factor(prepare(curvature)[0], 0.01)
    assert found is not None

    def halves(columns: Tensor, _: int) -> Tensor:
        total = columns.sum(dim=1, keepdim=True)
        return ((columns + 0.1 * total) * 2).round() / 2

    solved = solve_columns(weight, found.upper, halves, run=3)
    upper, expected = found.upper.double(), weight.double().clone()
    for start in range(0, 12, 3):
        part = slice(start, start + 3)
        error = expected[:, part] - halves(expected[:, part], 0)
        scaled = error @ torch.linalg.inv(upper[part, part])
        expected[:, start + 3 :] -= scaled @ upper[part, start + 3 :]
    torch.testing.assert_close(solved.double(), expected, rtol=1e-4, atol=1e-4)


def test_group_sizes_and_rows_that_cut_a_pair_are_refused(grid: Grid, tiny: Path, tmp_path: Path) -> None:
    if grid.span.columns == 2:
        with pytest.raises(FewbitError, match="group size 1 does not divide"):
            fewbit.quantize(tiny, tmp_path / "out", preset("rtn", grid=grid.name, group_size="1"))
        return
    x = Groups(torch.randn(2, 1, 16))
    assert grid.fit(x, Scheme(2, 16, grid.name), None)["scale"].shape == (2, 1, 1)
