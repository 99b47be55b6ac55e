"""How fine-tuning ends: other losses, early, with no held-out text, and where a number is none."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, folder_bytes
from test_tuning import CHOICE, HARSH, TEXT, rounded

from fewbit.errors import FewbitError
from fewbit.report.text import tuning_summary
from fewbit.tuning import loop
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.run import TuneOptions, tune


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, rounded to 2 bits."""
    return rounded(build_tiny(tmp_path_factory.mktemp("stops") / "model", dtype="float32", initializer_range=0.1))


def poisoned(monkeypatch: pytest.MonkeyPatch, poison: Callable[[Any], Any]) -> None:
    """`poison` gets the trained weight of one layer of the second block before the first update."""
    original = loop.optimizer_for

    def made(model: Any, choice: TuningChoice) -> Any:
        poison(model.get_submodule("model.layers.1.mlp.down_proj.tuned").latent)
        return original(model, choice)

    monkeypatch.setattr(loop, "optimizer_for", made)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("poison", "choice", "message"),
    [
        (
            lambda latent: latent.register_hook(lambda gradient: gradient * math.nan),
            CHOICE,
            r"the gradient of model\.layers\.1\.mlp\.down_proj\.latent is NaN or infinite at update 1: lower --lr",
        ),
        (
            lambda latent: latent.data.fill_(math.nan),
            CHOICE,
            r"the output of model\.layers\.1\.mlp\.down_proj is NaN or infinite at update 1: lower --lr",
        ),
        (
            lambda latent: None,
            replace(CHOICE, scale_lr=1e30),
            r"the scales of model\.layers\.0\.self_attn\.q_proj left the valid range at update 2: lower --scale-lr",
        ),
    ],
)
def test_what_is_no_number_stops_with_the_update_and_the_layer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: Any, choice: TuningChoice, message: str
) -> None:
    poisoned(monkeypatch, poison)
    with pytest.raises(FewbitError, match=message):
        tune(folder, tmp_path / "out", choice, TuneOptions(calibration=TEXT, device="cpu"))
    # The name is free for another rate.
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_reconstruction_stops_too(folder: Path, tmp_path: Path) -> None:
    choice = replace(CHOICE, reconstruction=1, lr=1e300)
    with pytest.raises(FewbitError, match=r"the gradient of block 1 is NaN or infinite at its update \d+: lower --lr"):
        tune(folder, tmp_path / "out", choice, TuneOptions(calibration=TEXT, device="cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "top"), [("nll", 16), ("nll+kd", 16), ("kd", 0)])
def test_other_losses(folder: Path, tmp_path: Path, loss: str, top: int) -> None:
    choice = replace(CHOICE, loss=loss, top=top, epochs=1, lr=0.005, embeddings=False)
    held = tune(folder, tmp_path / "out", choice, TuneOptions(calibration=TEXT, device="cpu"))["tuning"]["history"]
    assert held["held_out"][1] < held["held_out"][0]


@pytest.mark.slow
def test_it_ends_when_nothing_gets_better(folder: Path, tmp_path: Path) -> None:
    shown: list[str] = []
    options = TuneOptions(calibration=TEXT, device="cpu")
    report = tune(folder, tmp_path / "out", HARSH, options, lambda done, total, text: shown.append(text))
    history = report["tuning"]["history"]
    assert history["stopped"] and len(history["held_out"]) == history["best_epoch"] + 2 < HARSH.epochs + 1
    line = next(text for text in shown if text.startswith("loss"))
    assert re.fullmatch(r"loss \d+\.\d{3}, held out \d+\.\d{3}, rate 0\.09", line)


@pytest.mark.slow
def test_without_held_out_sequences_there_is_no_such_loss(folder: Path, tmp_path: Path) -> None:
    report = tune(
        folder, tmp_path / "out", replace(CHOICE, held_out=0, epochs=2), TuneOptions(calibration=TEXT, device="cpu")
    )
    assert report["tuning"]["history"]["held_out"] == []
    assert report["tuning"]["history"]["best_epoch"] == 2
    assert "held-out" not in tuning_summary(report, tmp_path / "out")


@pytest.mark.slow
def test_what_could_not_be_written_is_not_trained_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice, options = replace(CHOICE, epochs=1, reconstruction=1), TuneOptions(calibration=TEXT, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr("fewbit.tuning.write.ShardWriter.close", lambda writer: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tune(folder, tmp_path / "out", choice, options)
    # What a process leaves that is killed while it writes a block.
    (tmp_path / ".out.fewbit-partial" / "0.block.123.partial").write_text("half")
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_update", lambda *arguments: 1 / 0)
        tune(folder, tmp_path / "out", choice, options)
    tune(folder, tmp_path / "straight", choice, options)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "straight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "straight"]


@pytest.mark.slow
@pytest.mark.parametrize("removed", [0, 1, 3])
def test_killed_behind_the_last_rename(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    """The output is there and whole, and beside it some of what only its making needed."""
    choice, options = replace(CHOICE, epochs=1), TuneOptions(calibration=TEXT, device="cpu")
    unlink, left = Path.unlink, [removed]

    def dying(path: Path, **more: Any) -> None:
        if path.parent.name == ".out.fewbit-partial" and (tmp_path / "out").exists():
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        unlink(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dying)
        with pytest.raises(KeyboardInterrupt):
            tune(folder, tmp_path / "out", choice, options)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.fewbit-partial", "out"]
    with pytest.raises(FewbitError, match="already exists"):
        tune(folder, tmp_path / "out", choice, options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    tune(folder, tmp_path / "straight", choice, options)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "straight")


@pytest.mark.slow
def test_rates_are_halved_and_gradients_clipped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[tuple[float, int]] = []
    norms: list[float] = []
    trainer_update = loop.Trainer._update

    def update(self: Any, numbers: list[int], rate: float, step: int) -> float:
        def look(optimizer: Any, *_: Any) -> None:
            assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
                [rate * HARSH.lr, rate * HARSH.scale_lr]
            )
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norms.append(float(torch.stack([g.square().sum() for g in grads]).sum().sqrt()))

        inner = getattr(self._optimizer, "optimizer", self._optimizer)
        handle = inner.register_step_pre_hook(look)
        loss = trainer_update(self, numbers, rate, step)
        handle.remove()
        rates.append((rate, step))
        return loss

    monkeypatch.setattr(loop.Trainer, "_update", update)
    choice = replace(HARSH, clip=0.01)
    report = tune(folder, tmp_path / "out", choice, TuneOptions(calibration=TEXT, device="cpu"))
    assert norms[0] > 0.0099 and max(norms) < 0.01 * 1.001
    history = report["tuning"]["history"]
    batches = -(-64 // choice.batch_size)
    worse, share = history["held_out"], 1.0
    for epoch in range(len(worse) - 1):
        for rate, step in rates[epoch * batches : (epoch + 1) * batches]:
            assert rate == pytest.approx(share * loop.learning_rate(step, batches * choice.epochs, choice.warmup))
        share *= 1.0 if worse[epoch + 1] < min(worse[: epoch + 1]) else 0.5
    assert share < 1.0
