"""How fine-tuning ends: other losses, early, with no held-out text, and where a number is none."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import build_tiny
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


@pytest.mark.parametrize(
    ("poison", "choice", "message"),
    [
        (
            lambda latent: latent.register_hook(lambda gradient: gradient * math.nan),
            CHOICE,
            r"the gradient of model\.layers\.1\.mlp\.down_proj\.latent is no number at update 1: lower --lr",
        ),
        (
            lambda latent: latent.data.fill_(math.nan),
            CHOICE,
            r"what model\.layers\.1\.mlp\.down_proj gives is no number at update 1: lower --lr, or check the text",
        ),
        (
            lambda latent: None,
            replace(CHOICE, scale_lr=1e30),
            r"the scales of model\.layers\.0\.self_attn\.q_proj left their range at update 2: lower --scale-lr",
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


def test_reconstruction_stops_too(folder: Path, tmp_path: Path) -> None:
    choice = replace(CHOICE, reconstruction=1, lr=math.inf)
    with pytest.raises(FewbitError, match=r"the gradient of block 1 is no number at its update \d+: lower --lr"):
        tune(folder, tmp_path / "out", choice, TuneOptions(calibration=TEXT, device="cpu"))


@pytest.mark.parametrize(("loss", "top"), [("nll", 16), ("nll+kd", 16), ("kd", 0)])
def test_other_losses(folder: Path, tmp_path: Path, loss: str, top: int) -> None:
    choice = replace(CHOICE, loss=loss, top=top, epochs=1, lr=0.005)
    held = tune(folder, tmp_path / "out", choice, TuneOptions(calibration=TEXT, device="cpu"))["tuning"]["history"]
    assert held["held_out"][1] < held["held_out"][0]


def test_it_ends_when_nothing_gets_better(folder: Path, tmp_path: Path) -> None:
    shown: list[str] = []
    options = TuneOptions(calibration=TEXT, device="cpu")
    report = tune(folder, tmp_path / "out", HARSH, options, lambda done, total, text: shown.append(text))
    history = report["tuning"]["history"]
    assert history["stopped"] and len(history["held_out"]) == history["best_epoch"] + 2 < HARSH.epochs + 1
    line = next(text for text in shown if text.startswith("loss"))
    assert re.fullmatch(r"loss \d+\.\d{3}, held out \d+\.\d{3}, rate 0\.09", line)


def test_without_held_out_sequences_there_is_no_such_loss(folder: Path, tmp_path: Path) -> None:
    report = tune(folder, tmp_path / "out", replace(CHOICE, held_out=0, epochs=2), TuneOptions(None, TEXT, None, "cpu"))
    assert report["tuning"]["history"]["held_out"] == []
    assert report["tuning"]["history"]["best_epoch"] == 2
    assert "held-out" not in tuning_summary(report, tmp_path / "out")
