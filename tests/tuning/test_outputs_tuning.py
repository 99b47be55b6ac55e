"""Tuning: what the end needs is there before anything is trained, and what changed in between is noticed."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import build_tiny, folder_bytes, run_cli
from dying import dies_before, needs_fork

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.checkpoints.json_file import write_json
from fewbit.checkpoints.workdir import WorkFolder, check_output
from fewbit.errors import FewbitError, WorkKeptError
from fewbit.pipeline.run import RunOptions
from fewbit.report.text import quantize_json, tuning_summary
from fewbit.tuning import in_one_go, loop
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.run import TuneOptions, tune

CHOICE = TuningChoice(epochs=1, held_out=2, batch_size=2)
OPTIONS = TuneOptions(calibration=CalibrationChoice("random-tokens", 8, 16), device="cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tuned") / "model", shard_size="1GB", num_hidden_layers=1)


@pytest.fixture(scope="module")
def folder(model: Path) -> Path:
    fewbit.quantize(model, model.parent / "q", fewbit.preset("rtn", bits=2))
    return model.parent / "q"


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


@pytest.mark.slow
@pytest.mark.parametrize("report", [None, "{", "[]", '{"model": "m"}', '{"model": 3, "method": [], "layers": {}}'])
def test_without_a_whole_report_it_is_tuned_all_the_same(
    model: Path, folder: Path, tmp_path: Path, report: str | None
) -> None:
    quantized = copy(folder, tmp_path / "q")
    for name in ("fewbit_report.json", "fewbit_run.json"):
        (quantized / name).unlink()
    if report is not None:
        (quantized / "fewbit_report.json").write_text(report)
    found = tune(quantized, tmp_path / "out", CHOICE, replace(OPTIONS, reference=model))
    assert found["method"] == "rtn + qaft" and found["model"] == model.name
    whole = json.loads((folder / "fewbit_report.json").read_text())
    same = ("weights_quantized", "bytes", "bits_per_weight", "outliers")
    assert {key: found["output"][key] for key in same} == {key: whole["output"][key] for key in same}
    assert found["output"]["file_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    keys = ("name", "shape", "weights", "group_size", "outliers", "bytes", "bits_per_weight")
    by_name = sorted([{key: layer[key] for key in keys} for layer in found["layers"]], key=lambda one: one["name"])
    assert by_name == sorted(
        [{key: layer[key] for key in keys} for layer in whole["layers"]], key=lambda one: one["name"]
    )
    assert all(layer["relative_squared_error"] > 0 for layer in found["layers"])
    assert "rtn + qaft" in tuning_summary(found, tmp_path / "out") and quantize_json(found)["models"]
    # And what came out is tuned again without a word about its original.
    tune(tmp_path / "out", tmp_path / "again", CHOICE, OPTIONS)


@pytest.mark.slow
def test_what_the_end_needs_is_checked_before_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.Trainer, "run", lambda *arguments: pytest.fail("it was trained"))
    with monkeypatch.context() as patch:
        patch.setattr("fewbit.tuning.run.shutil.disk_usage", lambda path: type("Free", (), {"free": 10}))
        with pytest.raises(WorkKeptError, match=r"the output needs 0\.0 GB, but only 0\.0 GB are free"):
            tune(folder, tmp_path / "out", CHOICE, OPTIONS)
    for error in (RuntimeError("a fault"), KeyError("x"), MemoryError()):
        with monkeypatch.context() as patch:
            patch.setattr("fewbit.tuning.run.calibration_set", lambda *a, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(type(error)):
                tune(folder, tmp_path / "out", CHOICE, OPTIONS)
    assert not list(tmp_path.iterdir())


def stopped(patch: pytest.MonkeyPatch) -> None:
    """The next tuning is interrupted when it has predictions and nothing trained."""

    def run(*arguments: Any) -> None:
        raise KeyboardInterrupt

    patch.setattr(loop.Trainer, "run", run)


def change_alone(path: Path) -> None:
    """Write a file again with other bytes at the same size and time."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["reference", "quantized"])
def test_what_changed_between_two_runs_is_noticed(model: Path, folder: Path, tmp_path: Path, which: str) -> None:
    reference, quantized = copy(model, tmp_path / "reference"), copy(folder, tmp_path / "q")
    options = replace(OPTIONS, reference=reference)
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch)
        with pytest.raises(KeyboardInterrupt):
            tune(quantized, tmp_path / "out", CHOICE, options)
    change_alone((reference if which == "reference" else quantized) / "model.safetensors")
    said = r"interrupted here \(reference: model" if which == "reference" else r"interrupted here \(model"
    with pytest.raises(FewbitError, match=said + r"\.safetensors has been changed or replaced since"):
        tune(quantized, tmp_path / "out", CHOICE, options)
    tune(quantized, tmp_path / "out", CHOICE, replace(options, overwrite=True))


@pytest.mark.slow
def test_a_disk_that_is_full_while_it_trains_keeps_the_snapshots(folder: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "fewbit.tuning.snapshots.write_json", lambda path, data: (_ for _ in ()).throw(OSError(28, "full"))
        )
        with pytest.raises(WorkKeptError, match="the disk is full: free some space and run the same command again"):
            tune(folder, tmp_path / "out", CHOICE, OPTIONS)
    with pytest.raises(FewbitError, match="a run with other arguments was interrupted here"):
        tune(folder, tmp_path / "out", replace(CHOICE, lr=0.5), OPTIONS)
    tune(folder, tmp_path / "out", CHOICE, OPTIONS)
    tune(folder, tmp_path / "straight", CHOICE, OPTIONS)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "straight")


@pytest.mark.slow
def test_out_made_meanwhile_keeps_the_training(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def appear(done: int, total: int, what: str) -> None:
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").write_text("precious")

    with pytest.raises(WorkKeptError, match="appeared during the run; the finished work is kept"):
        tune(folder, out, CHOICE, OPTIONS, appear)
    assert (out / "thesis.txt").read_text() == "precious"
    out.rename(tmp_path / "mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_update", lambda *arguments: pytest.fail("it was trained again"))
        tune(folder, out, CHOICE, OPTIONS)


COMMAND: list[Any] = ["--method", "rtn", "--bits", 2, "--tune", "--tune-epochs", 1, "--sequence-length", 16]
COMMAND += ["--calibration", "random-tokens:16"]


@pytest.mark.parametrize("kind", ["folder", "link", "record", "record of others"])
def test_the_first_steps_place_may_be_someone_elses(model: Path, tmp_path: Path, kind: str) -> None:
    place, record = tmp_path / ".out.fewbit-untuned", tmp_path / ".out.fewbit-untuned.json"
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "thesis.txt").write_text("precious")
    if kind == "folder":
        (tmp_path / "victim").rename(place)
    elif kind == "link":
        place.symlink_to(tmp_path / "victim")
    else:
        record.write_text("precious" if kind == "record" else '{"fewbit": "0.1.0", "model": "m"}')
    before = sorted(tmp_path.rglob("*"))
    for more in ([], ["--overwrite"]):
        said = run_cli("quantize", model, tmp_path / "out", *COMMAND, *more, code=2).stderr
        assert "move it elsewhere first" in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_first_step_that_failed_does_not_block_another(model: Path, tmp_path: Path) -> None:
    def publish(work: WorkFolder) -> None:
        raise RuntimeError("a fault")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkFolder, "publish", publish)
        with pytest.raises(RuntimeError):
            run_cli("quantize", model, tmp_path / "out", *COMMAND)
    run_cli("quantize", model, tmp_path / "out", *[3 if word == 2 else word for word in COMMAND])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def made(out: Path, text: str, overwrite: bool) -> dict[str, Any]:
    """What stands for a step of hours: a whole folder of fewbit's."""
    replaces = check_output(out, out.parent / "model", overwrite)
    work = WorkFolder(out, {"text": text}, overwrite, replaces)
    work.shard("model.safetensors").write_text(text)
    report = {"fewbit_version": "0", "recipe": {}, "text": text}
    report["tuning"] = {"choice": vars(CHOICE), "calibration": vars(OPTIONS.calibration)}
    write_json(work.file("fewbit_report.json"), report)
    work.publish()
    return report


@pytest.mark.slow
@needs_fork
def test_both_steps_killed_at_any_step(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_one_go, "quantize", lambda model, out, recipe, run: made(out, "first", run.overwrite))
    monkeypatch.setattr(
        in_one_go, "tune", lambda folder, out, choice, options, progress: made(out, "second", options.overwrite)
    )
    recipe = fewbit.preset("rtn", bits=2)

    def go(out: Path) -> Callable[[], Any]:
        return lambda: in_one_go.quantize_and_tune(model, out, recipe, RunOptions(), CHOICE, OPTIONS)

    for step in range(1, 150):
        folder = tmp_path / str(step)
        folder.mkdir()
        died = dies_before(step, go(folder / "out"), str(folder))
        if not died:
            break
        was_there = (folder / "out").exists()
        try:
            go(folder / "out")()
        except FewbitError as error:
            assert was_there and "already exists" in str(error), (step, error)
        assert (folder / "out" / "model.safetensors").read_text() == "second"
        assert [path.name for path in folder.iterdir()] == ["out"], step
    assert step > 40
