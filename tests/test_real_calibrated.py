"""Calibrated methods on SmolLM2-135M with very little text; the full figures are in docs/benchmarks.md."""

from pathlib import Path

import pytest

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import open_checkpoint
from fewbit.curvature.store import open_curvature
from fewbit.evaluation.perplexity import Protocol
from fewbit.evaluation.text import read_text
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.measure_curvature import measure
from fewbit.pipeline.run import RunOptions

pytestmark = pytest.mark.real_model
MODEL = "smollm2-135m"
PROTOCOL = Protocol(128, 4)


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
    """A stored Gram and a stored Fisher with the presets' share of it, of 6 sequences of 128 tokens."""
    folder = tmp_path_factory.mktemp("curvature")
    choice = CalibrationChoice(str(halves[0]), 6, 128)
    for method in ("gptq", "oac"):
        wanted = fewbit.preset(method).curvature
        assert wanted is not None
        measure(MODEL, folder / wanted.kind, wanted, CalibrationOptions(choice))
    return {kind: folder / kind for kind in ("gram", "fisher")}


# Solving takes longest: of the 30 blocks the first six.
BEHIND_THE_SIXTH = ("model.layers.[6-9].*", "model.layers.1[0-9].*", "model.layers.2[0-9].*")


def quantized(kept: dict[str, Path], out: Path, method: str) -> Path:
    recipe = fewbit.preset(method, bits=2, group_size="64", exclude=BEHIND_THE_SIXTH, embedding_bits=16)
    stored = None
    if recipe.curvature is not None:
        stored = open_curvature(kept[recipe.curvature.kind], open_checkpoint(locate(MODEL)))
    report = fewbit.quantize(MODEL, out, recipe, RunOptions(calibration=CalibrationOptions(stored=stored)))
    assert len(report["layers"]) == 42
    assert stored is None or {layer["path"] for layer in report["layers"]} <= {"solved", "rounded"}
    return out


def test_2_bits_with_little_text(kept: dict[str, Path], halves: tuple[Path, Path], tmp_path: Path) -> None:
    folders = [quantized(kept, tmp_path / method, method) for method in ("rtn", "gptq", "precal+oac")]
    rtn, gptq, best = fewbit.evaluate(folders, halves[1], PROTOCOL, MODEL)["models"]
    assert best["perplexity_ratio"] < 0.5 * gptq["perplexity_ratio"] < 0.25 * rtn["perplexity_ratio"]
    assert best["kl_mean"] < gptq["kl_mean"] < rtn["kl_mean"]
    assert best["top1_agreement"] > gptq["top1_agreement"] > rtn["top1_agreement"]
    assert best["perplexity_ratio"] < 4 and best["bits_per_weight"] < 2.3
