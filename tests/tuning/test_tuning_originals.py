"""What is tuned towards: matrices that a checkpoint stores turned, and finding the original again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import build_tiny, byte_tokenizer, run_cli
from test_tuning import CHOICE, GENTLE, TEXT

import fewbit
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import open_checkpoint
from fewbit.errors import FewbitError
from fewbit.formats.original import original_of
from fewbit.runtime.packed_linear import PackedLinear
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.run import TuneOptions, _originals, tune
from fewbit.tuning.tuned_model import make_trainable

FEW = ["--calibration", "random-tokens", "--samples", 12, "--sequence-length", 16, "--epochs", 1, "--held-out", 4]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2, which stores (in, out); its attention's projection is square."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2") / "model"
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256, n_positions=64, initializer_range=0.1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("method", "bits"), [("adpq+", 2), ("adpq+", 1), ("adpq", 2), ("rtn", 2)])
@pytest.mark.parametrize("train", ["all", "scales"])
def test_gpt2_is_tuned(gpt2: Path, tmp_path: Path, method: str, bits: int, train: str) -> None:
    made = fewbit.quantize(gpt2, tmp_path / "start", fewbit.preset(method, bits=bits, group_size="32"))
    choice = replace(GENTLE, train=train, scale_lr=0.005)
    report = tune(tmp_path / "start", tmp_path / "out", choice, TuneOptions(calibration=TEXT, device="cpu"))
    held = report["tuning"]["history"]["held_out"]
    assert min(held) < held[0]
    still = replace(CHOICE, train=train, lr=1e-9, scale_lr=1e-9, epochs=1)
    same = tune(tmp_path / "start", tmp_path / "still", still, TuneOptions(calibration=TEXT, device="cpu"))
    for before, after in zip(made["layers"], same["layers"], strict=True):
        assert after["relative_squared_error"] == pytest.approx(before["relative_squared_error"], rel=1e-4)


def test_latent_weights_begin_at_the_original_where_it_is_stored_turned(gpt2: Path, tmp_path: Path) -> None:
    fewbit.quantize(gpt2, tmp_path / "start", fewbit.preset("rtn", bits=3, group_size="32"))
    checkpoint, original = (open_checkpoint(folder) for folder in (tmp_path / "start", gpt2))
    model = fewbit.load(tmp_path / "start", device="cpu")
    names = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    whole = {name: module.weight.detach() for name, module in fewbit.load(gpt2).named_modules() if name in names}
    with FileReader() as reader:
        make_trainable(model, TuningChoice(), _originals(checkpoint, original, reader))
    for name in names:
        tuned = model.get_submodule(name).tuned
        latent = (tuned.latent * tuned.step).view(tuned.stored.shape)
        # A margin of 0.3 steps holds three fifths of uniform errors.
        assert float(((latent - whole[name].t()).abs() < 1e-6).float().mean()) > 0.5, name


@pytest.mark.slow
def test_the_original_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    build_tiny(here / "llama", dtype="float32", shard_size="1GB")
    monkeypatch.chdir(here)
    run_cli("quantize", "llama", "small", "--method", "rtn", "--bits", 2)
    assert json.loads((here / "small" / "fewbit_report.json").read_text())["model"] == "llama"
    monkeypatch.chdir(there)
    build_tiny(there / "llama", dtype="float32", shard_size="1GB", num_hidden_layers=3)
    assert original_of(open_checkpoint(here / "small")).folder == here / "llama"
    run_cli("tune", here / "small", "tuned", *FEW)
    assert original_of(open_checkpoint(there / "tuned")).folder == here / "llama"
    (here / "llama").rename(here / "moved")
    line = run_cli("tune", here / "small", "again", *FEW, code=2).stderr
    assert "its original, llama, cannot be found: give the original with --reference" in line
    run_cli("tune", here / "small", "again", "--reference", here / "moved", *FEW)
    assert sorted(path.name for path in there.iterdir()) == ["again", "llama", "tuned"]


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"num_hidden_layers": 3}, "has an additional model.layers.2."),
        ({"vocab_size": 300}, "has no model.embed_tokens.weight of that shape"),
        ({"intermediate_size": 192}, "has no model.layers.0.mlp."),
    ],
)
def test_another_model_is_no_reference(tmp_path: Path, other: dict[str, int], what: str) -> None:
    fewbit.quantize(build_tiny(tmp_path / "model"), tmp_path / "small", fewbit.preset("rtn", bits=2))
    build_tiny(tmp_path / "other", **other)
    line = run_cli("tune", tmp_path / "small", tmp_path / "out", "--reference", tmp_path / "other", *FEW, code=2).stderr
    assert f"other: {what}" in line and "was not made from this model" in line.replace("\n", " ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other", "small"]


def test_a_model_of_another_kind_is_no_reference(gpt2: Path, tmp_path: Path) -> None:
    fewbit.quantize(build_tiny(tmp_path / "model"), tmp_path / "small", fewbit.preset("rtn", bits=2))
    with pytest.raises(FewbitError, match="is a gpt2, not a llama"):
        original_of(open_checkpoint(tmp_path / "small"), gpt2)
