"""The report of a tuned folder says only what holds for its weights."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import build_tiny
from safetensors.torch import load_file

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.records import Report
from fewbit.pipeline.run import RunOptions
from fewbit.runtime.unpack import unpack
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.run import TuneOptions, tune

TEXT = CalibrationChoice("random-tokens", samples=8, sequence_length=32)
OPTIONS = TuneOptions(calibration=TEXT, device="cpu")
CHOICE = TuningChoice(epochs=1, held_out=0, batch_size=2, lr=0.5, scale_lr=0.1)
STILL = TuningChoice(epochs=1, held_out=0, batch_size=2, lr=1e-9, scale_lr=1e-9)
ERRORS = {"relative_squared_error", "mean_group_error", "worst_group_error", "relative_curvature_error"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("report") / "model", shard_size="1GB", num_hidden_layers=1)


def quantized(model: Path, out: Path, method: str) -> dict[str, Any]:
    options = RunOptions(calibration=CalibrationOptions(TEXT))
    fewbit.quantize(model, out, fewbit.preset(method, bits=3, group_size="32"), options)
    return read(out)


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "fewbit_report.json").read_text())


@pytest.mark.slow
def test_a_calibrated_weight_keeps_its_path_and_loses_its_curvature_error(model: Path, tmp_path: Path) -> None:
    before = quantized(model, tmp_path / "q", "gptq")
    assert all(layer.keys() > ERRORS for layer in before["layers"])
    tune(tmp_path / "q", tmp_path / "out", CHOICE, OPTIONS)
    after = read(tmp_path / "out")
    assert after.keys() == before.keys() | {"tuning"}
    assert {k: after[k] for k in ("recipe", "source", "kept", "left", "calibration")} == {
        k: before[k] for k in ("recipe", "source", "kept", "left", "calibration")
    }
    plain = load_file(unpack(tmp_path / "out", tmp_path / "plain") / "model.safetensors")
    original = load_file(model / "model.safetensors")
    for old, new in zip(before["layers"], after["layers"], strict=True):
        assert old.keys() - new.keys() == {"relative_curvature_error"} and old["path"] == new["path"]
        weight, wanted = plain[new["name"]].float(), original[new["name"]].float()
        error = float((weight - wanted).square().sum() / wanted.square().sum())
        # The unpacked weights are rounded to 16 bits.
        assert new["relative_squared_error"] == pytest.approx(error, rel=1e-2)
        assert new["relative_squared_error"] != old["relative_squared_error"]


@pytest.mark.slow
def test_weights_that_did_not_change_keep_all_errors(model: Path, tmp_path: Path) -> None:
    before = quantized(model, tmp_path / "q", "gptq")
    tune(tmp_path / "q", tmp_path / "out", STILL, OPTIONS)
    for old, new in zip(before["layers"], read(tmp_path / "out")["layers"], strict=True):
        assert {key: new[key] for key in ERRORS} == pytest.approx({key: old[key] for key in ERRORS}, rel=1e-5)
        assert {k: v for k, v in new.items() if k not in ERRORS} == {k: v for k, v in old.items() if k not in ERRORS}


@pytest.mark.slow
def test_errors_that_cannot_be_computed_again_are_left_out(model: Path, tmp_path: Path) -> None:
    before = quantized(model, tmp_path / "q", "awq")
    tune(tmp_path / "q", tmp_path / "out", CHOICE, OPTIONS)
    for old, new in zip(before["layers"], read(tmp_path / "out")["layers"], strict=True):
        assert not new.keys() & ERRORS and old.keys() - new.keys() <= ERRORS


@pytest.mark.parametrize("method", ["rtn", "gptq", "adpq"])
def test_a_report_is_read_as_it_was_written(model: Path, tmp_path: Path, method: str) -> None:
    written = quantized(model, tmp_path / "q", method)
    again = Report.from_dict(written)
    assert again.to_dict() == written and list(again.to_dict()) == list(written)
    for broken in (None, [], {}, {**written, "layers": [{"name": "x"}]}, {**written, "output": {}}):
        with pytest.raises(ValueError, match="not a whole report"):
            Report.from_dict(broken)
