"""A map of a layer's inputs that is applied at run time: a random orthogonal one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_column_solver import random_problem
from torch import Tensor

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.formats import native
from fewbit.grids.scheme import Layout, StoredWeight
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.plan import scheme_for
from fewbit.pipeline.run import RunOptions
from fewbit.pipeline.solve_weight import solve_weight
from fewbit.recipe import preset
from fewbit.runtime.unpack import unpack
from fewbit.transforms.table import TRANSFORMS
from fewbit.transforms.transform import Parts, Transform, Values
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.run import TuneOptions

TEXT = CalibrationChoice("random-tokens", samples=4, sequence_length=32)
NAME = "random-orthogonal"


def orthogonal(columns: int) -> Values:
    random = torch.randn(columns, columns, generator=torch.Generator().manual_seed(columns), dtype=torch.float64)
    return {"map": torch.linalg.qr(random)[0].float()}


def layout(columns: int) -> Layout:
    return {"transform_map": (torch.int32, (columns, columns))}


def read(parts: Parts) -> Values:
    return {"map": parts["transform_map"].view(torch.float32)}


def inputs(x: Tensor, values: Values) -> Tensor:
    return x @ values["map"].t().to(x.dtype)


@pytest.fixture(autouse=True)
def rotation(monkeypatch: pytest.MonkeyPatch) -> Transform:
    made = Transform(
        NAME,
        "a random orthogonal map",
        weight=lambda w, values: w @ values["map"].t(),
        back=lambda w, values: w @ values["map"],
        curvature=lambda h, values: values["map"] @ h.float() @ values["map"].t(),
        inputs=inputs,
        fixed=orthogonal,
        store=lambda values: {"transform_map": values["map"].contiguous().view(torch.int32)},
        layout=layout,
        read=read,
    )
    monkeypatch.setitem(TRANSFORMS, NAME, made)
    return made


def test_the_map_changes_nothing_before_rounding(rotation: Transform) -> None:
    weight, curvature = random_problem(8, 32)
    values, x = rotation.fixed(32), torch.randn(5, 32)
    mapped = rotation.weight(weight, values)
    torch.testing.assert_close(rotation.inputs(x, values) @ mapped.t(), x @ weight.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotation.back(mapped, values), weight, rtol=1e-4, atol=1e-4)
    error = torch.randn(8, 32)
    before = (error @ curvature * error).sum()
    turned = rotation.weight(error, values)
    after = (turned @ rotation.curvature(curvature, values) * turned).sum()
    assert float(after) == pytest.approx(float(before), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "oac", "adpq+"])
def test_quantized_packed_unpacked_tuned(tiny: Path, tmp_path: Path, method: str) -> None:
    recipe = preset(method, bits=8, group_size="16", transform=NAME)
    run = RunOptions(calibration=CalibrationOptions(TEXT, max_fallback=99))
    report = fewbit.quantize(tiny, tmp_path / "out", recipe, run)
    assert report["recipe"]["transform"] == NAME
    ids = torch.arange(24).unsqueeze(0) + 3
    original = fewbit.load(tiny, dtype=torch.float32, device="cpu")(ids).logits
    packed = fewbit.load(tmp_path / "out", dtype=torch.float32, device="cpu")(ids).logits
    plain = fewbit.load(unpack(tmp_path / "out", tmp_path / "plain"), dtype=torch.float32, device="cpu")(ids).logits
    assert float((packed - original).norm() / original.norm()) < 0.03
    # The unpacked weights are rounded to the model's 16 bits.
    assert float((packed - plain).norm() / plain.norm()) < 0.02
    choice = TuningChoice(epochs=1, batch_size=2, held_out=1)
    fewbit.tune(tmp_path / "out", tmp_path / "tuned", choice, TuneOptions(reference=str(tiny), calibration=TEXT))
    tuned = fewbit.load(tmp_path / "tuned", dtype=torch.float32, device="cpu")(ids).logits
    assert float((tuned - original).norm() / original.norm()) < 0.05


def test_solved_weights_come_back(rotation: Transform) -> None:
    weight, curvature = random_problem(16, 64)
    recipe: Any = preset("oac", bits=4, group_size="16", transform=NAME)
    scheme, values = scheme_for(64, recipe), rotation.fixed(64)
    solved = solve_weight(weight, curvature, recipe, scheme)
    stored = StoredWeight(scheme, (16, 64))
    parts = {**solved.rows.parts, **rotation.store(values)}
    native.check_parts(parts, stored)
    assert torch.equal(native.decode_stored(parts, stored), solved.decoded)
    difference = native.decode(parts, stored) - weight
    assert float((difference @ curvature * difference).sum() / (weight @ curvature * weight).sum()) < 0.01
