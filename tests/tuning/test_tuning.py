"""Fine-tuning end to end on a tiny model: losses, the loop, interruption, bad input."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import build_tiny, folder_bytes, run_cli, with_tests

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.checkpoints.source import open_checkpoint
from fewbit.errors import FewbitError
from fewbit.formats.config import describe
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.run import RunOptions
from fewbit.tuning import loop
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.losses import mean_loss, predict
from fewbit.tuning.reconstruct import reconstruct_blocks
from fewbit.tuning.run import TuneOptions, tune
from fewbit.tuning.snapshots import DESCRIBED
from fewbit.tuning.tuned_model import make_trainable, without_dropout

TEXT = CalibrationChoice("random-tokens", samples=68, sequence_length=32)
CHOICE = TuningChoice(epochs=3, held_out=4, lr=0.02, scale_lr=0.01, top=16)
GENTLE = replace(CHOICE, lr=0.005)
"""So few codes change that the order of float sums cannot send two runs different ways."""
HARSH = replace(CHOICE, lr=0.9, scale_lr=0.2, patience=1, epochs=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float32 Llama: the numbers of one and of two processes can be compared."""
    return build_tiny(
        tmp_path_factory.mktemp("tuning") / "model", dtype="float32", shard_size="100KB", initializer_range=0.1
    )


@pytest.fixture(scope="module")
def folder(model: Path) -> Path:
    """It, rounded to 2 bits."""
    return rounded(model)


def rounded(model: Path) -> Path:
    """A model beside `model`: it, rounded to 2 bits."""
    fewbit.quantize(model, model.parent / "rtn", fewbit.preset("rtn", bits=2, group_size="32"))
    return model.parent / "rtn"


def test_rate_and_order() -> None:
    rates = [loop.learning_rate(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0.05 <= rates[-1] < 0.06
    first, second = (loop.order_of(epoch, 10, 4, 7) for epoch in (0, 1))
    assert first != second and first == loop.order_of(0, 10, 4, 7)
    assert [len(batch) for batch in first] == [4, 4, 4]
    assert {number for batch in first for number in batch} == set(range(10))


@pytest.mark.slow
@pytest.mark.parametrize("train", ["all", "weights", "scales", "codes"])
def test_tuning_brings_a_model_nearer_to_the_original(folder: Path, model: Path, tmp_path: Path, train: str) -> None:
    choice = TuningChoice(**{**vars(CHOICE), "train": train})
    report = tune(folder, tmp_path / "out", choice, TuneOptions(calibration=TEXT, device="cpu"))
    held = report["tuning"]["history"]["held_out"]
    best = report["tuning"]["history"]["best_epoch"]
    assert best > 0 and held[best] == min(held) < {"all": 0.85, "scales": 0.95}.get(train, 0.9) * held[0]
    before, after = (describe(open_checkpoint(path)) for path in (folder, tmp_path / "out"))
    assert after == {**before, "method": "rtn + qaft"}
    assert report["tuning"]["calibration"]["tokens_sha256"]
    # What the training saw is what a reader of the folder gets.
    original, tuned = fewbit.load(model, device="cpu"), fewbit.load(tmp_path / "out", device="cpu")
    from fewbit.pipeline.calibration_tokens import calibration_set

    ids = loop.held_out_last(calibration_set(open_checkpoint(model), TEXT, original).ids, CHOICE.held_out)
    ids = ids[-CHOICE.held_out :]
    with torch.inference_mode():
        prediction = predict(original(ids).logits[:, :-1], CHOICE.top).flat()
        logits = tuned(ids).logits[:, :-1].reshape(-1, 256)
    loss = mean_loss(logits, ids[:, 1:].reshape(-1), prediction, "kd")
    assert float(loss) == pytest.approx(held[best], rel=2e-3)


def test_what_is_held_out_is_spread_over_the_sources() -> None:
    ids = torch.arange(24).view(12, 2)
    spread = loop.held_out_last(ids, 3)
    assert spread[-3:, 0].tolist() == [4, 12, 20]
    assert sorted(spread.flatten().tolist()) == list(range(24))
    assert spread[:-3, 0].tolist() == sorted(spread[:-3, 0].tolist())
    assert loop.held_out_last(ids, 0) is ids


@pytest.mark.slow
def test_an_epoch_that_made_it_worse_is_taken_back(folder: Path, tmp_path: Path) -> None:
    choice = replace(CHOICE, lr=0.4, scale_lr=0.05, epochs=6, patience=6)
    report = tune(folder, tmp_path / "out", choice, TuneOptions(calibration=TEXT, device="cpu"))
    history = report["tuning"]["history"]
    best, worse = history["held_out"][0], 0
    for loss in history["held_out"][1:]:
        worse += loss >= best
        best = min(best, loss)
    assert worse > 0
    assert history["share"] == 0.5**worse
    assert history["held_out"][history["best_epoch"]] == best < history["held_out"][0]


@pytest.mark.slow
def test_a_float16_model_is_trained_in_bfloat16(tmp_path: Path) -> None:
    model = build_tiny(tmp_path / "model", dtype="float16", initializer_range=0.1)
    fewbit.quantize(model, tmp_path / "rtn", fewbit.preset("rtn", bits=2, group_size="32"))
    report = tune(tmp_path / "rtn", tmp_path / "out", CHOICE, TuneOptions(calibration=TEXT, device="cpu"))
    held = report["tuning"]["history"]["held_out"]
    assert min(held) < 0.9 * held[0]
    assert open_checkpoint(tmp_path / "out").config["dtype"] == "float16"


@pytest.mark.slow
def test_accumulation_and_checkpointing_change_nothing(folder: Path, tmp_path: Path) -> None:
    options = TuneOptions(calibration=TEXT, device="cpu", checkpointing=False)
    short = {**vars(CHOICE), "epochs": 1}
    whole = tune(folder, tmp_path / "whole", TuningChoice(**short), options)["tuning"]["history"]
    parts = tune(folder, tmp_path / "parts", TuningChoice(**{**short, "micro_batch": 1}), options)["tuning"]["history"]
    again = TuneOptions(calibration=TEXT, device="cpu", checkpointing=True)
    recomputed = tune(folder, tmp_path / "again", TuningChoice(**short), again)["tuning"]["history"]
    assert parts["losses"] == pytest.approx(whole["losses"], rel=1e-3)
    assert recomputed["losses"] == pytest.approx(whole["losses"], rel=1e-4)


SLOW = """
import sys, time
from pathlib import Path
from fewbit.tuning import loop, run, snapshots
from test_tuning import CHOICE, TEXT
original = loop.Trainer._update
def slow(self, *arguments):
    time.sleep(0.15)
    return original(self, *arguments)
loop.Trainer._update = slow
run.Snapshots = lambda folder, accelerator: snapshots.Snapshots(folder, accelerator, seconds=0.0)
run.tune(sys.argv[1], sys.argv[2], CHOICE, run.TuneOptions(calibration=TEXT, device="cpu"))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    out, state = tmp_path / "out", tmp_path / ".out.fewbit-partial" / DESCRIBED
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(folder), str(out)], env=with_tests())
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None
        if state.is_file() and json.loads(state.read_text())["updates"] >= 6:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    options = TuneOptions(calibration=TEXT, device="cpu")
    with pytest.raises(FewbitError, match=r"other arguments was interrupted here \(choice.lr was 0.02, is 0.01\)"):
        tune(folder, out, TuningChoice(**{**vars(CHOICE), "lr": 0.01}), options)
    tune(folder, out, CHOICE, options)
    tune(folder, tmp_path / "straight", CHOICE, options)
    assert folder_bytes(out) == folder_bytes(tmp_path / "straight")
    assert not list(out.glob("tuning-*"))


@pytest.mark.slow
def test_quantize_and_tune_in_one_go(folder: Path, model: Path, tmp_path: Path) -> None:
    text = ["--calibration", "random-tokens", "--samples", 36, "--sequence-length", 32]
    quantize = ["quantize", model, tmp_path / "out", "--method", "rtn", "--bits", 2, "--group-size", 32, *text]
    done = run_cli(*quantize, "--tune", "--tune-epochs", 1, "--json")
    assert json.loads(done.stdout)["models"][0]["method"] == "rtn + qaft"
    choice = TuningChoice(epochs=1)
    text_choice = CalibrationChoice("random-tokens", 36, 32)
    tune(folder, tmp_path / "steps", choice, TuneOptions(calibration=text_choice, device="cpu"))
    assert folder_weights(tmp_path / "out") == folder_weights(tmp_path / "steps")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    refused = run_cli(*quantize, code=2)
    assert "rtn uses no data" in refused.stderr
    assert "--tune-epochs needs --tune" in run_cli(*quantize[:7], "--tune-epochs", 2, code=2).stderr


@pytest.mark.slow
def test_the_first_step_is_made_again_for_another_job(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize = ["quantize", model, out, "--method", "gptq", "--bits", 2, "--sequence-length", 32, "--tune"]
    quantize += ["--tune-epochs", 1, "--calibration"]
    few = run_cli(*quantize, "random-tokens:10", code=2)
    assert "10 sequences with 8 held out leave 2 for batches of 4" in few.stderr
    assert not list(tmp_path.iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbit.tuning.in_one_go.tune", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_cli(*quantize, "random-tokens:16")
    refused = run_cli(*quantize, "random-tokens:20", code=2)
    assert "a run with other arguments was interrupted here (calibration." in refused.stderr
    run_cli(*quantize, "random-tokens:20", "--overwrite")
    run_cli(*[tmp_path / "once" if word == out else word for word in quantize], "random-tokens:20")
    assert folder_weights(out) == folder_weights(tmp_path / "once")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["once", "out"]
    assert "--epochs must be at least 1" in run_cli(*quantize[:-2], 0, "--overwrite", code=2).stderr


@pytest.mark.slow
def test_quantize_and_tune_killed_at_its_very_end(model: Path, tmp_path: Path) -> None:
    out, choices = tmp_path / "out", ["--method", "rtn", "--bits", 2, "--group-size", 32, "--tune", "--tune-epochs", 1]
    command = ["quantize", model, out, *choices, "--sequence-length", 16, "--calibration"]
    remove, unlink, record = shutil.rmtree, Path.unlink, ".out.fewbit-untuned.json"
    with pytest.MonkeyPatch.context() as patch:
        # Published, and the record of the first step is still there.
        patch.setattr(Path, "unlink", lambda path, **more: 1 / 0 if path.name == record else unlink(path, **more))
        with pytest.raises(ZeroDivisionError):
            run_cli(*command, "random-tokens:16")
    assert len(list(tmp_path.iterdir())) == 3
    assert "already exists" in run_cli(*command, "nonsense:16", code=2).stderr
    again = json.loads(run_cli(*command, "random-tokens:16", "--json").stdout)
    assert again["report"]["tuning"]["history"]["losses"] and sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    with pytest.MonkeyPatch.context() as patch:
        # The record is gone, the folder of the first step is not.
        def dying(path: Path, **more: Any) -> None:
            assert more or path.name != record.removesuffix(".json"), "killed"
            remove(path, **more)

        patch.setattr(shutil, "rmtree", dying)
        with pytest.raises(AssertionError, match="killed"):
            run_cli(*command, "random-tokens:20", "--overwrite")
    report = json.loads((out / "fewbit_report.json").read_text())
    assert report["tuning"]["calibration"]["sources"] == "random-tokens:20"
    assert "already exists" in run_cli(*command, "random-tokens:20", code=2).stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.slow
def test_text_that_changed_between_two_runs_is_refused(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words that go on and on. " * 100)
    options = TuneOptions(calibration=CalibrationChoice(str(text), 12, 32), device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "run", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tune(folder, tmp_path / "out", CHOICE, options)
    text.write_text("other words that go on and on. " * 100)
    with pytest.raises(FewbitError, match="the calibration text has changed since this run was interrupted"):
        tune(folder, tmp_path / "out", CHOICE, options)


def test_there_is_no_dropout_in_training() -> None:
    from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    opt = OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32, dropout=0.5, attention_dropout=0.5, layerdrop=0.5)
    falcon = FalconConfig(**sizes, hidden_dropout=0.5, attention_dropout=0.5)
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    ids = torch.arange(20)[None]
    for made in (OPTForCausalLM(opt), FalconForCausalLM(falcon), GPT2LMHeadModel(gpt2)):
        plain = made.eval()(ids).logits
        assert not torch.equal(made.train()(ids).logits, plain)
        assert torch.equal(without_dropout(made).train()(ids).logits, plain)


@pytest.mark.slow
def test_weights_whose_channels_were_scaled_are_compared_with_nothing(model: Path, tmp_path: Path) -> None:
    text = CalibrationOptions(CalibrationChoice("random-tokens", 8, 32))
    fewbit.quantize(model, tmp_path / "awq", fewbit.preset("awq", bits=4), RunOptions(calibration=text))
    report = json.loads((tmp_path / "awq" / "fewbit_report.json").read_text())
    before = {row["name"]: row["relative_squared_error"] for row in report["layers"]}
    inspected = fewbit.inspect(tmp_path / "awq")
    assert inspected["reference"] and not any("relative_squared_error" in row for row in inspected["tensors"])
    assert "scaled before they were rounded" in run_cli("inspect", tmp_path / "awq").stdout.replace("\n", " ")
    gentle = replace(CHOICE, epochs=1, lr=1e-9, scale_lr=1e-9)
    found = tune(tmp_path / "awq", tmp_path / "out", gentle, TuneOptions(calibration=TEXT, device="cpu"))
    assert {row["name"]: row["relative_squared_error"] for row in found["layers"]} == before


def folder_weights(path: Path) -> dict[str, bytes]:
    return {name: data for name, data in folder_bytes(path).items() if name.endswith(".safetensors")}


@pytest.mark.slow
def test_blocks_are_reconstructed_one_by_one(folder: Path, model: Path, tmp_path: Path) -> None:
    choice = TuningChoice(**{**vars(CHOICE), "reconstruction": 3})
    original, student = fewbit.load(model, device="cpu"), fewbit.load(folder, device="cpu")
    make_trainable(student, choice, lambda _: None)
    ids = torch.randint(0, 256, (36, 32), generator=torch.Generator().manual_seed(0))
    sequences = loop.Sequences(ids, 4)
    first = reconstruct_blocks(student, original, sequences, choice, tmp_path)
    assert all(after < 0.9 * before for before, after in first)
    # A second run takes the blocks from the first.
    again = fewbit.load(folder, device="cpu")
    make_trainable(again, choice, lambda _: None)
    assert [after for _, after in reconstruct_blocks(again, original, sequences, choice, tmp_path)] == [
        after for _, after in first
    ]
    report = tune(folder, tmp_path / "out", choice, TuneOptions(calibration=TEXT, device="cpu"))
    plain = tune(folder, tmp_path / "plain", CHOICE, TuneOptions(calibration=TEXT, device="cpu"))
    assert report["tuning"]["history"]["held_out"][0] < plain["tuning"]["history"]["held_out"][0]
    assert not list((tmp_path / "out").glob("*.block.*"))


def test_bad_input(folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = TuneOptions(calibration=TEXT, device="cpu")
    with (
        monkeypatch.context() as three,
        pytest.raises(FewbitError, match="--batch-size 4: it must be a multiple of the number of processes"),
    ):
        three.setattr("fewbit.tuning.run._accelerator", lambda device: SimpleNamespace(num_processes=3))
        tune(folder, tmp_path / "out", CHOICE, options)
    with pytest.raises(FewbitError, match="not quantized by fewbit: make a folder with"):
        tune(model, tmp_path / "out", CHOICE, options)
    with pytest.raises(FewbitError, match="is quantized itself: --reference must be the original"):
        tune(folder, tmp_path / "out", CHOICE, TuneOptions(reference=folder, calibration=TEXT, device="cpu"))
    few = CalibrationChoice("random-tokens", samples=6, sequence_length=32)
    with pytest.raises(FewbitError, match="6 sequences with 4 held out leave 2 for batches of 4"):
        tune(folder, tmp_path / "out", CHOICE, TuneOptions(calibration=few, device="cpu"))
    for wrong, message in [
        ({"loss": "mse"}, "--loss must be one of nll, kd, nll"),
        ({"train": "biases"}, "--train must be one of weights, scales, codes, all"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"micro_batch": 3}, "--micro-batch 3 must divide --batch-size 4"),
    ]:
        with pytest.raises(FewbitError, match=message):
            TuningChoice(**{**vars(CHOICE), **wrong})
    failed = run_cli("tune", tmp_path / "nowhere", tmp_path / "out", code=2)
    assert failed.stderr.strip().endswith("nowhere: no such folder") and not failed.stdout
