"""On a GPU: what is quantized, measured, trained and run there, against the CPU. Skipped where there is none."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import open_checkpoint
from fewbit.formats.config import read_weights
from fewbit.presets import PRESETS
from fewbit.runtime.unpack import read_weight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TEXT: dict[str, Any] = {"calibration": "random-tokens", "samples": 4, "sequence_length": 32, "max_fallback": 99}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    with FileReader() as reader:
        stored = read_weights(checkpoint.quantization or {})
        return {name: read_weight(checkpoint, reader, name, one) for name, one in stored.items()}


@pytest.mark.parametrize("method", PRESETS)
def test_quantized_there_is_as_good(tiny: Path, tmp_path: Path, method: str) -> None:
    text = TEXT if fewbit.preset(method).curvature else {}
    errors = {}
    for device in ("cpu", "cuda"):
        report = fewbit.quantize(tiny, tmp_path / device, method, device=device, **text)
        errors[device] = [row["relative_squared_error"] for row in report["layers"]]
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.15)
    if not text:
        here, there = weights(tmp_path / "cpu"), weights(tmp_path / "cuda")
        # Sums are rounded otherwise there, so that a tie may fall to the other side.
        moved = [float((here[name] != there[name]).float().mean()) for name in here]
        assert max(moved) < 0.01


@pytest.mark.parametrize("method", ["rtn", "adpq", "adpq+", "billm", "spqr"])
def test_packed_runs_there_as_unpacked(tiny: Path, tmp_path: Path, method: str) -> None:
    text = TEXT if fewbit.preset(method).curvature else {}
    fewbit.quantize(tiny, tmp_path / "out", method, **text)
    ids = torch.arange(24).unsqueeze(0).cuda() + 3
    packed = fewbit.load(tmp_path / "out", device="cuda")(ids).logits
    plain = fewbit.load(fewbit.unpack(tmp_path / "out", tmp_path / "plain"), device="cuda")(ids).logits
    assert torch.equal(packed, plain)
    here = fewbit.load(tmp_path / "out", device="cpu")(ids.cpu()).logits
    assert float((packed.cpu() - here).norm() / here.norm()) < 0.02


@pytest.mark.parametrize("train", ["all", "scales", "codes"])
def test_trained_there(tiny: Path, tmp_path: Path, train: str) -> None:
    fewbit.quantize(tiny, tmp_path / "start", "adpq+", bits=2)
    text = {name: value for name, value in TEXT.items() if name != "max_fallback"}
    report = fewbit.tune(
        tmp_path / "start",
        tmp_path / "out",
        train=train,
        epochs=2,
        batch_size=1,
        held_out=1,
        reference=str(tiny),
        device="cuda",
        **text,
    )
    history = report["tuning"]["history"]
    assert min(history["held_out"]) <= history["held_out"][0]
    ids = torch.arange(24).unsqueeze(0).cuda() + 3
    assert bool(torch.isfinite(fewbit.load(tmp_path / "out", device="cuda")(ids).logits).all())


def test_evaluated_there(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 200)
    found = [fewbit.evaluate(tiny, text, windows=2, seq_len=32, dtype="float32", device=d) for d in ("cpu", "cuda")]
    here, there = (one["models"][0]["perplexity"] for one in found)
    assert there == pytest.approx(here, rel=1e-3)
