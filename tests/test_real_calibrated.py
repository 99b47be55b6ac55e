"""Calibrated methods on SmolLM2-135M with very little text; the full figures are in docs/benchmarks.md."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import open_checkpoint
from fewbit.curvature.store import open_curvature
from fewbit.evaluation.perplexity import Protocol
from fewbit.linear import is_native
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.measure_curvature import measure
from fewbit.pipeline.run import RunOptions

pytestmark = pytest.mark.real_model
MODEL = "smollm2-135m"
TEXT = SHARED / "wikitext2_raw_test.txt"
# Without bfloat16 products calibration and perplexities take five times as long.
NATIVE = is_native(torch.bfloat16)
PROTOCOL = Protocol(512, 12 if NATIVE else 4, dtype="float32")
METHODS_AT_8_BITS = ["gptq", "spqr"]
if NATIVE:
    METHODS_AT_8_BITS += ["awq", "precal+gptq", "precal+spqr", "oac", "oac+spqr", "precal+oac"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A stored Gram and a stored Fisher with the presets' share of it, of 16 sequences of 256 tokens."""
    folder = tmp_path_factory.mktemp("curvature")
    choice = CalibrationChoice(str(SHARED / "c4_rp_sample1.jsonl"), 16, 256)
    for method in ("gptq", "oac"):
        wanted = fewbit.preset(method).curvature
        assert wanted is not None
        measure(MODEL, folder / wanted.kind, wanted, CalibrationOptions(choice))
    return {kind: folder / kind for kind in ("gram", "fisher")}


@pytest.fixture(scope="module")
def original() -> float:
    return fewbit.evaluate(MODEL, TEXT, PROTOCOL)["models"][0]["perplexity"]


def perplexity(kept: dict[str, Path], out: Path, method: str, **choices: Any) -> tuple[float, float]:
    recipe = fewbit.preset(method, **choices)
    assert recipe.curvature is not None
    stored = open_curvature(kept[recipe.curvature.kind], open_checkpoint(locate(MODEL)))
    options = RunOptions(overwrite=True, calibration=CalibrationOptions(stored=stored))
    report = fewbit.quantize(MODEL, out, recipe, options)
    assert {layer["path"] for layer in report["layers"]} <= {"solved", "rounded"}
    return fewbit.evaluate(out, TEXT, PROTOCOL)["models"][0]["perplexity"], report["output"]["bits_per_weight"]


@pytest.mark.parametrize("method", METHODS_AT_8_BITS)
def test_8_bits_cost_nothing(kept: dict[str, Path], original: float, tmp_path: Path, method: str) -> None:
    measured, _ = perplexity(kept, tmp_path / "out", method, bits=8, group_size="64")
    assert abs(math.log(measured / original)) < 0.003


def test_3_and_2_bits_with_little_text(kept: dict[str, Path], original: float, tmp_path: Path) -> None:
    out = tmp_path / "out"
    three, bits = perplexity(kept, out, "precal+oac", bits=3)
    assert bits < 3.3
    assert three < 1.5 * original
    two, bits = perplexity(kept, out, "precal+oac", bits=2)
    assert bits < 2.3
    assert two < 12 * original
    if NATIVE:
        gptq, _ = perplexity(kept, out, "gptq", bits=2, group_size="64")
        assert gptq > 12 * original
