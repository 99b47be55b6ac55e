"""Packed embeddings and heads in training: they are trained like layers, or keep their codes; sizes stay."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import build_tiny
from safetensors.torch import load_file

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import open_checkpoint
from fewbit.formats import native
from fewbit.formats.config import weights_of
from fewbit.runtime.unpack import read_parts
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.run import TuneOptions, tune
from fewbit.tuning.tuned_model import make_trainable, stored_parts
from fewbit.tuning.tuned_table import TunedTensor, product
from fewbit.tuning.tuned_weight import TunedWeight

CHOICE = TuningChoice(epochs=1, held_out=0, batch_size=2, lr=0.3, scale_lr=0.05, top=0)
OPTIONS = TuneOptions(
    calibration=CalibrationChoice("random-tokens", samples=8, sequence_length=16), device="cpu", checkpointing=True
)
IDS = torch.tensor([[7, 3, 7, 200, 9, 9, 31, 4]])


def packed_folder(folder: Path, tied: bool, bits: int = 3, embedding_bits: int = 3) -> Path:
    model = build_tiny(folder / "model", shard_size="1GB", tie_word_embeddings=tied, initializer_range=0.1)
    fewbit.quantize(model, folder / "packed", fewbit.preset("rtn", bits=bits, embedding_bits=embedding_bits))
    return folder / "packed"


def a_table(tmp_path: Path, train: str = "all") -> TunedWeight:
    checkpoint = open_checkpoint(packed_folder(tmp_path, tied=False))
    stored = weights_of(checkpoint)["lm_head"]
    with FileReader() as reader:
        return TunedWeight(stored, read_parts(checkpoint, reader, "lm_head", stored), None, TuningChoice(train=train))


def gradients(weight: TunedWeight) -> dict[str, torch.Tensor]:
    found = {name: value.grad.clone() for name, value in weight.named_parameters() if value.grad is not None}
    weight.zero_grad(set_to_none=True)
    assert found
    return found


@pytest.mark.parametrize("train", ["all", "weights", "codes", "scales"])
def test_rows_and_pieces_have_the_gradients_of_the_whole(
    train: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight = a_table(tmp_path, train)
    wanted = torch.randn(*IDS.shape, weight.stored.shape[1])
    rows = TunedTensor(weight).rows(IDS.view(-1), torch.float32).view_as(wanted)
    (rows * wanted).sum().backward()
    sparse = gradients(weight)
    whole = torch.nn.functional.embedding(IDS, weight.decoded())
    (whole * wanted).sum().backward()
    assert torch.equal(rows, whole)
    for name, value in gradients(weight).items():
        torch.testing.assert_close(sparse[name], value)
    x = torch.randn(2, 5, weight.stored.shape[1], requires_grad=True)
    bias = torch.randn(weight.stored.shape[0], requires_grad=True)
    out = product(weight, x, bias)
    upon = torch.randn_like(out)
    (out * upon).sum().backward()
    inputs, shift, dense = x.grad, bias.grad, gradients(weight)
    x.grad = bias.grad = None
    # 256 rows in pieces of 48, the last one shorter.
    monkeypatch.setattr(native, "AT_ONCE", 48 * weight.stored.shape[1])
    again = product(weight, x, bias)
    (again * upon).sum().backward()
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(x.grad, inputs)
    torch.testing.assert_close(bias.grad, shift)
    for name, value in gradients(weight).items():
        torch.testing.assert_close(dense[name], value)


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_network_is_the_packed_one_at_first_and_its_stored_form_at_last(tied: bool, tmp_path: Path) -> None:
    packed = packed_folder(tmp_path, tied)
    model = fewbit.load(packed, dtype=torch.float32, device="cpu")
    before = model(IDS).logits
    places = make_trainable(model, TuningChoice(), lambda module: None)
    assert {"model.embed_tokens"} <= places.keys() and ("lm_head" in places) is not tied
    torch.testing.assert_close(model(IDS).logits, before)
    model(IDS).logits.square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                parameter -= 0.5 * parameter.grad.sign() * (parameter.grad != 0)
    after = model(IDS).logits.detach()
    assert not torch.allclose(after, before, atol=1e-3)
    parts = stored_parts(model, places, dict(model.named_parameters()))
    again = fewbit.load(packed, dtype=torch.float32, device="cpu")
    names = {module.name: module for module in again.modules() if hasattr(module, "stored")}
    for name, found in parts.items():
        for part, value in found.items():
            setattr(names[name], f"packed_{part}", value)
    torch.testing.assert_close(again(IDS).logits, after, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_tables_are_trained_like_layers(tied: bool, tmp_path: Path) -> None:
    packed = packed_folder(tmp_path, tied)
    # Small steps: on any processor the first of them helps on the two sequences that are held out.
    choice = replace(CHOICE, epochs=3, lr=0.005, scale_lr=0.002, held_out=2)
    report = tune(packed, tmp_path / "tuned", choice, OPTIONS)
    held = report["tuning"]["history"]["held_out"]
    assert min(held) < held[0]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "tuned"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert [name for name in changed if "embed_tokens" in name]
    assert bool([name for name in changed if "lm_head" in name]) is not tied
    whole = json.loads((packed / "fewbit_report.json").read_text())
    pairs = list(zip(report["embeddings"], whole["embeddings"], strict=True))
    assert len(pairs) == (1 if tied else 2) and all(a["bytes"] == b["bytes"] for a, b in pairs)
    assert all(a["relative_squared_error"] != b["relative_squared_error"] for a, b in pairs)
    assert report["output"]["bits_per_weight_all"] == whole["output"]["bits_per_weight_all"]
    losses = [fewbit.load(tmp_path / name, device="cpu")(IDS, labels=IDS).loss for name in ("packed", "tuned")]
    assert all(torch.isfinite(loss) for loss in losses)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_tables_keep_their_codes_on_request(tied: bool, tmp_path: Path) -> None:
    packed = packed_folder(tmp_path, tied, embedding_bits=6)
    report = tune(packed, tmp_path / "tuned", replace(CHOICE, embeddings=False), OPTIONS)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "tuned"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not [name for name in changed if "embed_tokens" in name or "lm_head" in name]
    whole = json.loads((packed / "fewbit_report.json").read_text())
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
