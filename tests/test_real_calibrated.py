"""Calibrated methods on SmolLM2-135M with very little text; the full figures are in docs/benchmarks.md."""

from pathlib import Path
from typing import Any

import pytest

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import open_checkpoint
from fewbit.curvature.store import open_curvature
from fewbit.evaluation.perplexity import Protocol
from fewbit.evaluation.text import read_text
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.measure import measure
from fewbit.pipeline.run import RunOptions

pytestmark = pytest.mark.real_model
MODEL = "smollm2-135m"
PROTOCOL = Protocol(256, 4)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The help text of Python as two files: one to calibrate on, one to judge by."""
    text = read_text("topics").content
    folder = tmp_path_factory.mktemp("text")
    middle = len(text) // 2
    for name, half in (("first", text[:middle]), ("second", text[middle:])):
        (folder / f"{name}.txt").write_text(half, encoding="utf-8")
    return folder / "first.txt", folder / "second.txt"


@pytest.fixture(scope="module")
def kept(halves: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A stored Gram and a stored Fisher with the presets' share of it, of 8 sequences of 256 tokens."""
    folder = tmp_path_factory.mktemp("curvature")
    choice = CalibrationChoice(str(halves[0]), 8, 256)
    for method in ("gptq", "oac"):
        wanted = fewbit.preset(method).curvature
        assert wanted is not None
        measure(MODEL, folder / wanted.kind, wanted, CalibrationOptions(choice))
    return {kind: folder / kind for kind in ("gram", "fisher")}


def quantized(kept: dict[str, Path], out: Path, method: str, **choices: Any) -> Path:
    recipe = fewbit.preset(method, **choices)
    assert recipe.curvature is not None
    stored = open_curvature(kept[recipe.curvature.kind], open_checkpoint(locate(MODEL)))
    report = fewbit.quantize(MODEL, out, recipe, RunOptions(calibration=CalibrationOptions(stored=stored)))
    assert {layer["path"] for layer in report["layers"]} <= {"solved", "rounded"}
    return out


def test_bits_with_little_text(kept: dict[str, Path], halves: tuple[Path, Path], tmp_path: Path) -> None:
    wanted: dict[str, dict[str, Any]] = {
        "gptq 8": {"bits": 8, "group_size": "64"},
        "precal+oac 3": {"bits": 3},
        "precal+oac 2": {"bits": 2},
        "gptq 2": {"bits": 2, "group_size": "64"},
    }
    folders = [quantized(kept, tmp_path / name, name.split()[0], **choices) for name, choices in wanted.items()]
    rows = dict(zip(wanted, fewbit.evaluate(folders, halves[1], PROTOCOL, MODEL)["models"], strict=True))
    ratio = {name: row["perplexity_ratio"] for name, row in rows.items()}
    assert ratio["gptq 8"] == pytest.approx(1, abs=0.02)
    assert rows["gptq 8"]["kl_mean"] < 0.01
    assert ratio["precal+oac 3"] < 1.6
    assert 2 * ratio["precal+oac 3"] < ratio["precal+oac 2"] < 0.2 * ratio["gptq 2"]
    assert rows["precal+oac 3"]["bits_per_weight"] < 3.3
    assert rows["precal+oac 2"]["bits_per_weight"] < 2.3
