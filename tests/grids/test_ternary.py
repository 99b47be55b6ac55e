"""Ternary: a grid that is one file and one line, with all the rest of the program."""

from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_column_solver import random_problem

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.errors import FewbitError
from fewbit.formats import native
from fewbit.formats.native import stored_bytes
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.grids.table import grid_of
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.plan import scheme_for
from fewbit.pipeline.run import RunOptions
from fewbit.recipe import Recipe, preset, replace_solver, with_choices
from fewbit.runtime.unpack import unpack
from fewbit.solvers.weight import solve_weight
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.run import TuneOptions

TEXT = CalibrationChoice("random-tokens", samples=4, sequence_length=32)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 40))
def test_five_codes_a_byte_and_back(rows: int, columns: int) -> None:
    layout = grid_of(Scheme(1.6, 1, "ternary")).codes(Scheme(1.6, 1, "ternary"))
    codes = torch.randint(0, 3, (rows, columns), dtype=torch.uint8)
    parts = layout.pack(codes)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == layout.layout(rows, columns)
    assert torch.equal(layout.unpack(parts, rows, columns), codes)


OUTLIERS = [
    {},
    *({"outliers": "adaptive-lasso", "outlier_grid": grid} for grid in ("minmax", "sign-magnitude", "float16")),
    {"outliers": "adaptive-lasso", "outlier_grid": "row", "outlier_bits": 8, "outlier_scope": "group"},
    {"outliers": "sensitivity", "outlier_grid": "float16"},
]


def recipes(solver: str, outliers: dict[str, str]) -> Recipe:
    if solver == "round":
        return preset("rtn", grid="ternary", group_size="16", **outliers)
    base = preset("oac", grid="ternary", group_size="16", curvature=preset("gptq").curvature)
    refit = outliers.get("outliers") == "sensitivity"
    return with_choices(replace_solver(base, act_order=not refit, refit=refit), outliers)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["round", "column"])
@pytest.mark.parametrize("outliers", OUTLIERS)
def test_every_outlier_rule_and_grid(tiny: Path, tmp_path: Path, solver: str, outliers: dict[str, str]) -> None:
    if solver == "round" and outliers.get("outliers") == "sensitivity":
        pytest.skip("only the column solver finds outliers by sensitivity")
    recipe, run = recipes(solver, outliers), RunOptions(calibration=CalibrationOptions(TEXT, max_fallback=99))
    report = fewbit.quantize(tiny, tmp_path / "out", recipe, run)
    assert report["recipe"]["bits"] == 1.6
    if not outliers:
        # 1.6 bits, in whole bytes, and 16 for the scale of 16 weights.
        assert 2.6 < report["output"]["bits_per_weight"] < 2.7
    ids = torch.arange(24).unsqueeze(0) + 3
    packed = fewbit.load(tmp_path / "out", device="cpu")(ids).logits
    plain = fewbit.load(unpack(tmp_path / "out", tmp_path / "plain"), device="cpu")(ids).logits
    assert torch.equal(packed, plain)
    assert all(0 <= row["relative_squared_error"] < 0.5 for row in report["layers"])
    found = fewbit.inspect(tmp_path / "out", tiny)
    assert found["models"][0]["bits_per_weight"] == pytest.approx(report["output"]["bits_per_weight"])


@pytest.mark.slow
@pytest.mark.parametrize("train", ["all", "scales", "codes"])
def test_tuning(tiny: Path, tmp_path: Path, train: str) -> None:
    recipe = recipes(
        "round", {"outliers": "adaptive-lasso", "outlier_grid": "row", "outlier_bits": "8"} and OUTLIERS[4]
    )
    fewbit.quantize(tiny, tmp_path / "start", recipe)
    choice = TuningChoice(train=train, epochs=1, batch_size=2, held_out=1)
    report = fewbit.tune(
        tmp_path / "start", tmp_path / "tuned", choice, TuneOptions(reference=str(tiny), calibration=TEXT)
    )
    assert report["output"]["bits_per_weight"] == pytest.approx(
        fewbit.inspect(tmp_path / "start")["models"][0]["bits_per_weight"]
    )


def test_the_column_solver_gains() -> None:
    weight, curvature = random_problem(32, 64)
    errors = {}
    for solver in ("round", "column"):
        recipe = recipes(solver, {})
        solved = solve_weight(weight, curvature, recipe.for_weight(scheme_for(64, recipe)))
        difference = solved.decoded - weight
        errors[solver] = float((difference @ curvature * difference).sum())
        stored = StoredWeight(scheme_for(64, recipe), (32, 64))
        assert torch.equal(native.decode(solved.rows.parts, stored), solved.decoded)
        assert stored_bytes(stored) == 32 * 13 + 32 * 4 * 2
    assert errors["column"] < 0.6 * errors["round"]


def test_bits_are_left_out_or_1_6() -> None:
    assert preset("rtn", grid="ternary", bits=1.6).bits == preset("rtn", grid="ternary").bits == 1.6
    with pytest.raises(FewbitError, match=r"the ternary grid has 1.6 bits, not 2: leave --bits out"):
        preset("rtn", grid="ternary", bits=2)
