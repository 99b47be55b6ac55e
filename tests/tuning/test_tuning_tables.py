"""Packed embeddings and heads in training: they keep their codes, gradients pass, and sizes stay."""

import json
from pathlib import Path

import pytest
import torch
from conftest import build_tiny
from safetensors.torch import load_file

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.run import TuneOptions, tune

CHOICE = TuningChoice(epochs=1, held_out=0, batch_size=2, lr=0.3, scale_lr=0.05, top=0)
OPTIONS = TuneOptions(
    calibration=CalibrationChoice("random-tokens", samples=8, sequence_length=16), device="cpu", checkpointing=True
)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_tables_keep_their_codes_and_layers_are_trained(tied: bool, tmp_path: Path) -> None:
    model = build_tiny(tmp_path / "model", shard_size="1GB", tie_word_embeddings=tied, initializer_range=0.1)
    fewbit.quantize(model, tmp_path / "packed", fewbit.preset("rtn", bits=3))
    report = tune(tmp_path / "packed", tmp_path / "tuned", CHOICE, OPTIONS)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "tuned"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not [name for name in changed if "embed_tokens" in name or "lm_head" in name]
    whole = json.loads((tmp_path / "packed" / "fewbit_report.json").read_text())
    assert report["embeddings"] == whole["embeddings"] and len(whole["embeddings"]) == (1 if tied else 2)
    assert report["output"]["bits_per_weight_all"] == whole["output"]["bits_per_weight_all"]


@pytest.mark.slow
def test_all_weights_of_an_earlier_folder_are_counted(tmp_path: Path) -> None:
    model = build_tiny(tmp_path / "model", shard_size="1GB")
    fewbit.quantize(model, tmp_path / "packed", fewbit.preset("rtn", bits=3, embedding_bits=16))
    path = tmp_path / "packed" / "fewbit_report.json"
    whole = json.loads(path.read_text())
    expected = whole["output"]["bits_per_weight_all"]
    for key in ("embedding_bytes", "weights_all", "bytes_all", "bits_per_weight_all"):
        del whole["output"][key]
    del whole["embeddings"]
    path.write_text(json.dumps(whole))
    report = tune(tmp_path / "packed", tmp_path / "tuned", CHOICE, OPTIONS)
    assert report["output"]["bits_per_weight_all"] == pytest.approx(expected) and report["embeddings"] == []
