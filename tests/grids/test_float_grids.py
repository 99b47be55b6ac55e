"""fp8, mxfp4 and nvfp4 as grids in recipes, runs, files and training; and the signed grid."""

import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from conftest import run_cli
from hypothesis import given, settings
from test_column_solver import random_problem

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.errors import FewbitError
from fewbit.formats import native
from fewbit.grids.eight_bit_scales import exponents_to_float, from_e4m3, to_e4m3, to_exponents
from fewbit.grids.floats import E2M1, E4M3, FLOAT_GRIDS
from fewbit.grids.grid import Grid, ScaleSearch
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.plan import scheme_for
from fewbit.pipeline.run import RunOptions
from fewbit.recipe import preset
from fewbit.recipe_choices import recipe_from_choices
from fewbit.runtime.unpack import unpack
from fewbit.solvers.settled import Encoded, NotFiniteError, WeightChoices, round_rows
from fewbit.solvers.weight import solve_weight
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.run import TuneOptions

TEXT = CalibrationChoice("random-tokens", samples=4, sequence_length=32)
EVERY = pytest.mark.parametrize("grid", FLOAT_GRIDS, ids=lambda grid: grid.name)
BITS = {"fp8": 8 + 16 / 64, "mxfp4": 4.25, "nvfp4": 4.5}
"""Bits per weight in rows of 64, without what is stored once for a tensor."""


def scheme_of(grid: Grid, columns: int) -> Scheme:
    return scheme_for(columns, preset("rtn", grid=grid.name))


def quantized(weight: torch.Tensor, grid: Grid, search: ScaleSearch | None) -> Encoded:
    scheme = scheme_of(grid, weight.shape[1])
    found = round_rows(weight, WeightChoices(scheme, search), None, None)
    stored = StoredWeight(scheme, (weight.shape[0], weight.shape[1]))
    native.check_parts(found.parts, stored)
    assert torch.equal(native.decode(found.parts, stored), found.decoded)
    return found


def test_the_numbers_are_those_of_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    known = codes.view(torch.float8_e4m3fn).float()
    ours = torch.tensor(E4M3.by_code)
    numbers = torch.isfinite(known)
    assert torch.equal(ours[numbers], known[numbers])
    assert (~numbers).nonzero().flatten().tolist() == [127, 255]
    assert E4M3.largest == 448.0
    assert E2M1.ascending == (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)


@pytest.mark.parametrize("numbers", [E2M1, E4M3], ids=["e2m1", "e4m3"])
def test_the_nearest_number(numbers: Any) -> None:
    u = torch.linspace(-1.2 * numbers.largest, 1.2 * numbers.largest, 4001)
    levels = torch.tensor(numbers.ascending)
    found = numbers.nearest(u.clone())
    assert torch.isin(found, levels).all()
    assert torch.equal((found - u).abs(), (u.unsqueeze(1) - levels).abs().amin(dim=1))


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(2.0**-120, 2.0**120), min_size=1, max_size=8), zeros=st.integers(0, 2))
def test_scales_that_were_stored_are_stored_again_unchanged(values: list[float], zeros: int) -> None:
    scales = torch.tensor([values + [0.0] * zeros])
    powers = exponents_to_float(to_exponents(scales))
    assert torch.equal(to_exponents(powers), to_exponents(scales))
    ratio = (powers / scales)[0, : len(values)]
    assert bool(((ratio > 0.66) & (ratio < 1.34)).all())
    codes, whole = to_e4m3(scales)
    seen = from_e4m3(codes, whole)
    again = from_e4m3(*to_e4m3(seen))
    assert torch.equal(again, seen)
    assert math.frexp(float(whole))[0] == 0.5
    near = scales > scales.max() / 448 / 2
    assert bool(((seen - scales).abs() <= scales / 15)[near].all())


@EVERY
@pytest.mark.parametrize("search", [None, ScaleSearch(), ScaleSearch(error_power=2.5)])
def test_ragged_weights(grid: Grid, search: ScaleSearch | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 96) * torch.logspace(-20, 5, 24).unsqueeze(1)
    weight[3], weight[5, :40] = 0, 0
    found = quantized(weight, grid, search)
    assert not found.decoded[3].any()
    assert torch.isfinite(found.decoded).all()
    # A magnitude is not more than doubled, and a group's largest weight is clipped by half at most.
    assert float(found.decoded.abs().max()) <= 2 * float(weight.abs().max())


@EVERY
def test_the_search_gains(grid: Grid) -> None:
    torch.manual_seed(1)
    weight, importance = torch.randn(16, 512), torch.rand(512) * 4 + 0.01
    plain, searched = (quantized(weight, grid, one).squared_error for one in (None, ScaleSearch()))
    assert searched < (1.0 if grid.name == "fp8" else 0.95) * plain
    choices = WeightChoices(scheme_of(grid, 512), ScaleSearch())
    weighed, alone = (round_rows(weight, choices, None, one).decoded for one in (importance, None))
    error = [float(((one - weight).square() * importance).sum()) for one in (weighed, alone)]
    assert error[0] <= error[1]


@EVERY
def test_the_column_solver_gains(grid: Grid) -> None:
    weight, curvature = random_problem(16, 256)
    errors = {}
    for method in ("adpq+", "precal+oac"):
        recipe = preset(method, grid=grid.name)
        scheme = scheme_for(256, recipe)
        solved = solve_weight(weight, curvature, recipe.for_weight(scheme))
        difference = solved.decoded - weight
        errors[method] = float((difference @ curvature * difference).sum())
        assert torch.equal(native.decode(solved.rows.parts, StoredWeight(scheme, (16, 256))), solved.decoded)
    assert errors["precal+oac"] < 0.8 * errors["adpq+"]


@pytest.mark.slow
@EVERY
def test_quantized_with_data_packed_and_unpacked(grid: Grid, tiny: Path, tmp_path: Path) -> None:
    run = RunOptions(calibration=CalibrationOptions(TEXT, max_fallback=99))
    report = fewbit.quantize(tiny, tmp_path / "out", preset("precal+oac", grid=grid.name), run)
    widths = [row["bits_per_weight"] for row in report["layers"] if "down_proj" not in row["name"]]
    assert widths == pytest.approx([BITS[grid.name]] * len(widths), abs=0.05)
    ids = torch.arange(24).unsqueeze(0) + 3
    plain = fewbit.load(unpack(tmp_path / "out", tmp_path / "plain"), device="cpu")
    packed = fewbit.load(tmp_path / "out", device="cpu")
    assert torch.equal(packed(ids).logits, plain(ids).logits)
    # One token takes the kernels.
    torch.testing.assert_close(packed(ids[:, :1]).logits, plain(ids[:, :1]).logits, rtol=0.02, atol=0.02)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("train", ["all", "scales", "codes"])
def test_tuning(grid: Grid, train: str, tiny: Path, tmp_path: Path) -> None:
    fewbit.quantize(tiny, tmp_path / "start", preset("adpq+", grid=grid.name))
    before = fewbit.inspect(tmp_path / "start")["models"][0]["bits_per_weight"]
    choice = TuningChoice(train=train, epochs=1, batch_size=2, held_out=1)
    options = TuneOptions(reference=str(tiny), calibration=TEXT)
    report = fewbit.tune(tmp_path / "start", tmp_path / "tuned", choice, options)
    assert report["output"]["bits_per_weight"] == before


@EVERY
def test_what_a_grid_brings(grid: Grid) -> None:
    for method in ("rtn", "adpq", "adpq+", "gptq", "oac", "precal+oac", "awq"):
        for recipe in (preset(method, grid=grid.name), recipe_from_choices(method, {"grid": grid.name})):
            assert (recipe.grid.width, recipe.scales.format) == (grid.widths[0], grid.scales)
            assert not recipe.outliers.wanted
            assert type(recipe).from_dict(recipe.to_dict()) == recipe
    with pytest.raises(FewbitError, match="leave --scale-format out"):
        recipe_from_choices("rtn", {"grid": grid.name, "scale_format": "float32"})
    with pytest.raises(FewbitError, match="has the outliers none"):
        recipe_from_choices("rtn", {"grid": grid.name, "outlier_fraction": 0.1})


@EVERY
def test_weights_that_are_no_numbers(grid: Grid) -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NotFiniteError):
            round_rows(torch.full((2, 64), bad), WeightChoices(scheme_of(grid, 64)), None, None)


def test_columns_that_groups_do_not_divide(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="group size"):
        native.check_scheme(Scheme(4, 64, "mxfp4", scale_format="e8m0"))
    run_cli("quantize", tiny, tmp_path / "out", "--grid", "nvfp4", "--set", "*.down_proj:grid=fp8", "--method", "rtn")
    assert 4.5 < fewbit.inspect(tmp_path / "out", tiny)["models"][0]["bits_per_weight"] < 8.5


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_signed_scale_has_less_error(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 128)
    errors = {}
    for name in ("symmetric", "signed"):
        choices = preset("rtn", grid=name, bits=bits, search=ScaleSearch()).for_weight(Scheme(bits, 64, name))
        errors[name] = round_rows(weight, choices, None, None).squared_error
    assert errors["signed"] < 0.92 * errors["symmetric"]
