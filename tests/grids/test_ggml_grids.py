"""The block types of ggml as grids in recipes, runs, files and training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, run_cli
from test_column_solver import random_problem

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.errors import FewbitError
from fewbit.formats import native
from fewbit.formats.config import read_weights
from fewbit.grids.ggml import GGML_GRIDS
from fewbit.grids.grid import Grid, ScaleSearch
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.plan import scheme_for
from fewbit.pipeline.run import RunOptions
from fewbit.recipe import preset
from fewbit.recipe_choices import recipe_from_choices
from fewbit.runtime.unpack import unpack
from fewbit.solvers.settled import NotFiniteError, WeightChoices, round_rows
from fewbit.solvers.weight import solve_weight
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.run import TuneOptions

TEXT = CalibrationChoice("random-tokens", samples=4, sequence_length=32)
EVERY = pytest.mark.parametrize("grid", GGML_GRIDS, ids=lambda grid: grid.name)
BYTES = {"q4_0": 4.5, "q4_1": 5, "q5_0": 5.5, "q5_1": 6, "q8_0": 8.5, "iq4_nl": 4.5, "iq4_xs": 4.25, "q2_k": 2.625}
BYTES |= {"q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625, "tq2_0": 2.0625}
"""Bits per weight of the blocks."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose columns 256 divides."""
    return build_tiny(tmp_path_factory.mktemp("wide") / "model", hidden_size=256, intermediate_size=256)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [one for one in GGML_GRIDS if one.name in ("q4_1", "iq4_nl", "q2_k", "q6_k", "tq2_0")])
def test_quantized_with_data_packed_and_unpacked(grid: Grid, wide: Path, tmp_path: Path) -> None:
    recipe = preset("precal+oac", grid=grid.name)
    run = RunOptions(calibration=CalibrationOptions(TEXT, max_fallback=99))
    report = fewbit.quantize(wide, tmp_path / "out", recipe, run)
    assert report["output"]["bits_per_weight"] == BYTES[grid.name]
    ids = torch.arange(24).unsqueeze(0) + 3
    packed = fewbit.load(tmp_path / "out", device="cpu")(ids).logits
    plain = fewbit.load(unpack(tmp_path / "out", tmp_path / "plain"), device="cpu")(ids).logits
    assert torch.equal(packed, plain)


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
@pytest.mark.parametrize("grid", [grid for grid in GGML_GRIDS if grid.name in ("q4_0", "iq4_xs", "q2_k", "q6_k")])
@pytest.mark.parametrize("train", ["all", "scales", "codes"])
def test_tuning(grid: Grid, wide: Path, tmp_path: Path, train: str) -> None:
    fewbit.quantize(wide, tmp_path / "start", preset("adpq+", grid=grid.name))
    choice = TuningChoice(train=train, epochs=1, batch_size=2, held_out=1)
    options = TuneOptions(reference=str(wide), calibration=TEXT)
    report = fewbit.tune(tmp_path / "start", tmp_path / "tuned", choice, options)
    assert report["output"]["bits_per_weight"] == BYTES[grid.name]


@EVERY
def test_a_grid_brings_its_group_size_scales_and_no_outliers(grid: Grid) -> None:
    for method in ("rtn", "adpq", "adpq+", "gptq", "oac", "precal+oac", "awq"):
        for recipe in (preset(method, grid=grid.name), recipe_from_choices(method, {"grid": grid.name})):
            assert recipe.grid.width == grid.widths[0]
            assert not recipe.outliers.wanted
            assert type(recipe).from_dict(recipe.to_dict()) == recipe
    mixed = preset("adpq+", sets={"*.down_proj": {"grid": grid.name}})
    assert mixed.at("model.down_proj").grid.name == grid.name
    assert mixed.outliers.wanted
    assert not mixed.at("model.down_proj").outliers.wanted


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"grid": "q4_0", "group_size": "64"}, "the q4_0 grid has the group size 32, not 64: leave --group-size out"),
        ({"grid": "q4_k", "scale_format": "float16"}, "the q4_k grid has the scale format block-6, not float16"),
        ({"grid": "q4_0", "outlier_fraction": 0.1}, "the q4_0 grid has the outliers none, not adaptive-lasso"),
        ({"grid": "q5_0", "bits": 4}, "the q5_0 grid has 5 bits, not 4: leave --bits out"),
        ({"grid": "symmetric", "scale_format": "block-6"}, "scale_format block-6 needs one of the grids q4_k, q5_k"),
    ],
)
def test_what_a_grid_does_not_take_is_refused(choices: dict[str, Any], says: str) -> None:
    with pytest.raises(FewbitError, match=says):
        recipe_from_choices("rtn", choices)


def test_the_spqr_solver_refits_32_wide_grids_only() -> None:
    with pytest.raises(FewbitError, match="cannot be refitted one by one"):
        preset("precal+oac", grid="q4_k", solver=_refit())
    assert preset("precal+oac", grid="q4_0", solver=_refit()).solver.refit


def _refit() -> Any:
    from fewbit.solvers.choice import SolverChoice

    return SolverChoice("column", refit=True)


def test_columns_that_blocks_do_not_divide(tiny: Path, tmp_path: Path) -> None:
    done = run_cli("quantize", tiny, tmp_path / "out", "--grid", "q4_k", code=2)
    assert "the q4_k grid needs a multiple of 256 columns, but this tensor has 64: use q4_0, q4_1" in done.stderr
    assert not (tmp_path / "out").exists()
    run_cli("quantize", tiny, tmp_path / "out", "--grid", "iq4_nl", "--set", "*.down_proj:grid=q8_0")
    config = fewbit.inspect(tmp_path / "out", tiny)["models"][0]
    assert 4.5 < config["bits_per_weight"] < 8.5


def test_a_folder_whose_blocks_are_cut_is_refused() -> None:
    scheme = Scheme(4, 32, "q4_k", scale_format="block-6").to_dict()
    config = {"quant_method": "fewbit", "format_version": 2, "schemes": [scheme]}
    assert read_weights({**config, "weights": {"a": {"scheme": 0, "shape": [4, 512]}}})
    with pytest.raises(FewbitError, match="the grid q4_k has blocks of 256 columns, not 288"):
        read_weights({**config, "weights": {"a": {"scheme": 0, "shape": [4, 288]}}})


@EVERY
def test_weights_that_the_scales_cannot_hold(grid: Grid) -> None:
    scheme = Scheme(grid.widths[0], int(grid.brings["group_size"]), grid.name, scale_format=grid.scales)
    for search in (None, ScaleSearch()):
        choices = WeightChoices(scheme, search)
        for bad in (float("nan"), float("inf")):
            with pytest.raises(NotFiniteError):
                round_rows(torch.full((2, 256), bad), choices, None, None)
        with pytest.raises(FewbitError, match="too large for float16"):
            round_rows(torch.randn(2, 256) * 1e30, choices, None, None)
        assert not round_rows(torch.zeros(2, 256), choices, None, None).decoded.any()


def test_weights_too_small_for_float16_scales(tmp_path: Path) -> None:
    model = build_tiny(tmp_path / "model", dtype="float32", initializer_range=1e-9)
    done = run_cli("quantize", model, tmp_path / "out", "--grid", "q4_0", code=2)
    assert "its weights are too small for float16 scales" in done.stderr
