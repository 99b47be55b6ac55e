"""Choices hold finite numbers of the right type, wherever they come from."""

import dataclasses
import json
import math
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import numpy
import pytest
from conftest import run_cli

import fewbit
from fewbit.activations.choice import ActivationChoice
from fewbit.choices import check_values
from fewbit.curvature.choice import CurvatureChoice
from fewbit.errors import FewbitError
from fewbit.grids.choice import GridChoice, ScaleChoice
from fewbit.grids.grid import ScaleSearch
from fewbit.outliers.choice import OutlierChoice
from fewbit.presets import PRESETS
from fewbit.recipe import Recipe, preset
from fewbit.solvers.choice import SolverChoice
from fewbit.studies.choice import StudyChoice
from fewbit.transforms.choice import TransformChoice

CHOICES: list[Any] = [
    ActivationChoice,
    CurvatureChoice,
    GridChoice,
    OutlierChoice,
    ScaleChoice,
    ScaleSearch,
    SolverChoice,
    TransformChoice,
    fewbit.CalibrationChoice,
    fewbit.CalibrationOptions,
    fewbit.Protocol,
    fewbit.RunOptions,
    fewbit.TaskChoice,
    fewbit.TuningChoice,
    StudyChoice,
]
NEEDED: dict[Any, dict[str, Any]] = {
    fewbit.TaskChoice: {"names": ("piqa",)},
    StudyChoice: {"study": "outliers", "model": "m", "out": Path("o"), "data": "topics"},
}
NUMBERS = [
    (choice, one.name)
    for choice in CHOICES
    for one in dataclasses.fields(choice)
    if {int, float} & set(get_args(one.type) if get_origin(one.type) is UnionType else (one.type,))
]


@pytest.mark.parametrize(("choice", "name"), NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "3", True, [1]])
def test_no_other_numbers(choice: Any, name: str, value: Any) -> None:
    with pytest.raises(FewbitError):
        choice(**{**NEEDED.get(choice, {}), name: value})


@pytest.mark.parametrize("choice", CHOICES)
def test_no_other_types(choice: Any) -> None:
    for one in dataclasses.fields(choice):
        if one.type in (str, bool) and one.name != "group_size":
            with pytest.raises(FewbitError, match=r"must be (text|True or False), not 3"):
                choice(**{**NEEDED.get(choice, {}), one.name: 3})


def test_whole_numbers() -> None:
    with pytest.raises(FewbitError, match=r"statistic_bits must be a whole number, not 3.5"):
        ScaleChoice(statistic_bits=3.5)  # type: ignore[arg-type]
    with pytest.raises(FewbitError, match=r"--epochs must be a whole number, not 1.5"):
        fewbit.TuningChoice(epochs=1.5)  # type: ignore[arg-type]
    with pytest.raises(FewbitError, match=r"search: cannot search from 0.6 to 1.0 in steps of 0"):
        ScaleSearch(step=0)
    assert GridChoice(group_size=64).group_size == "64"  # type: ignore[arg-type]
    check_values(OutlierChoice(fraction=0, bits=8))


def test_numbers_of_numpy_are_plain_ones() -> None:
    four, share = numpy.int64(4), numpy.float32(0.25)
    given = preset("spqr", bits=four, group_size=numpy.int64(64), outlier_fraction=share, sets={"*": {"bits": four}})
    plain = preset("spqr", bits=4, group_size=64, outlier_fraction=0.25, sets={"*": {"bits": 4}})
    assert given == plain and json.dumps(given.to_dict()) == json.dumps(plain.to_dict())
    for method in PRESETS:
        if method != "billm" and not method.endswith("+billm"):
            assert preset(method, bits=numpy.int64(2)) == preset(method, bits=2)
    assert type(OutlierChoice(fraction=share).fraction) is float  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "name",
    ["bits", "damping", "outlier_bits", "outlier_fraction", "sensitivity", "statistic_bits", "statistic_rows"],
)
def test_set(name: str, value: str) -> None:
    with pytest.raises(FewbitError, match=rf"--set \*: {name} must be a .*(finite|whole) number.*, not -?(nan|inf)"):
        fewbit.preset("spqr", sets=[f"*:{name}={value}"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_everywhere(tiny: Path, tmp_path: Path, value: float) -> None:
    out, message = tmp_path / "out", f"sensitivity must be a finite number, not {value}"
    with pytest.raises(FewbitError, match=message):
        fewbit.preset("spqr", sensitivity=value)
    with pytest.raises(FewbitError, match=message):
        fewbit.quantize(tiny, out, "spqr", set=[f"*:sensitivity={value}"], calibration="nonsense")
    assert message in run_cli("plan", tiny, "--method", "spqr", "--set", f"*:sensitivity={value}", code=2).stderr
    (tmp_path / "recipe.json").write_text(json.dumps({**fewbit.preset("spqr").to_dict(), "sensitivity": value}))
    assert message in run_cli("quantize", tiny, out, "--recipe", tmp_path / "recipe.json", code=2).stderr
    data = {**fewbit.preset("rtn").to_dict(), "sets": [["*", {"outlier_fraction": value}]]}
    with pytest.raises(FewbitError, match=r"--set \*: outlier_fraction must be a finite number"):
        Recipe.from_dict(data)
    assert "--damping" in run_cli("quantize", tiny, out, "--damping", str(value), "--method", "rtn", code=2).stderr
    assert not out.exists()


@pytest.mark.parametrize(
    "sets", [[["*"]], [["*", 3]], ["*"], [5], 7, [["*", {"bits": "many"}]], [["*", {"bits": None, "grid": 4}]]]
)
def test_sets_in_a_file_of_the_wrong_form(tiny: Path, tmp_path: Path, sets: Any) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({**fewbit.preset("rtn").to_dict(), "sets": sets}))
    line = run_cli("plan", tiny, "--recipe", tmp_path / "recipe.json", code=2).stderr
    assert line.count("\n") == 1 and line.startswith("fewbit: ") and ("set" in line or "choices" in line)


def test_group_sizes_of_single_tensors(tiny: Path, tmp_path: Path) -> None:
    given = ("--set", "*.down_proj:group_size=100")
    line = run_cli("quantize", tiny, tmp_path / "out", *given, code=2).stderr
    assert "group size 100 does not divide 2 layers with 128 columns" in line and "group_size=auto in --set" in line
    assert "group size 100 does not divide 2 layers" in run_cli("plan", tiny, *given).stdout
    with pytest.raises(FewbitError, match=r"--set \*: group size must be a number, auto, row"):
        fewbit.preset("rtn", sets=["*:group_size=big"])


def test_a_kind_or_a_pattern_may_be_given_alone() -> None:
    recipe = fewbit.preset("gptq", solver="round", curvature="fisher", include="lm_head.weight", group_size=64)
    assert recipe.solver == dataclasses.replace(fewbit.preset("gptq").solver, kind="round")
    assert recipe.curvature == dataclasses.replace(fewbit.preset("gptq").curvature, kind="fisher")
    assert (recipe.include, recipe.grid.group_size) == (("lm_head.weight",), "64")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"solver": "colunm"}, "solver must be one of .*did you mean column"),
        ({"curvature": 3}, "curvature must be a CurvatureChoice or None, not 3"),
        ({"search": "x"}, "search must be a ScaleSearch or None, not 'x'"),
        ({"include": 5}, "include must be a tuple, not 5"),
    ],
)
def test_axes_are_of_their_type(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(FewbitError, match=message):
        fewbit.preset("gptq", **choices)
