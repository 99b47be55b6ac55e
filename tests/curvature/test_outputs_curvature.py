"""A curvature's folder: gone on with whenever it was killed, and nobody else's files in it touched."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, run_cli
from dying import dies_before, needs_fork

from fewbit.calibration.choice import CalibrationChoice
from fewbit.checkpoints.source import Checkpoint, open_checkpoint
from fewbit.curvature.choice import CurvatureChoice
from fewbit.curvature.store import CurvatureWriter, check_curvature_place, open_curvature
from fewbit.errors import FewbitError
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.measure_curvature import measure

GRAM = CurvatureChoice("gram")
TEXT: dict[str, Any] = {"sources": "random-tokens", "blocks": 2}


def fill(folder: Path, checkpoint: Checkpoint, blocks: int = 2, **text: Any) -> list[int]:
    """Measure up to so many blocks; returns those that were not there."""
    writer = CurvatureWriter(folder, checkpoint, GRAM, {**TEXT, **text})
    left = [index for index in range(blocks) if not writer.has(index)]
    for index in left:
        writer.put(index, {f"layer {index}": torch.eye(2) * (index + 1)}, {})
    return left


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@needs_fork
def test_killed_at_any_step_it_goes_on_to_the_same_folder(tiny: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    fill(tmp_path / "straight", checkpoint)
    assert sorted(read(tmp_path / "straight")) == [
        "block-00000.safetensors",
        "block-00001.safetensors",
        "fewbit_curvature.json",
    ]
    for step in range(1, 60):
        folder = tmp_path / str(step)
        died = dies_before(step, lambda folder=folder: fill(folder, checkpoint), str(folder))
        # What the library leaves that writes tensors, and what block-wise work spills.
        folder.mkdir(exist_ok=True)
        (folder / ".tmpAbCdEf").write_text("half")
        (folder / "tmpx.states").write_text("half")
        left = fill(folder, checkpoint)
        if left:
            assert read(folder) == read(tmp_path / "straight"), step
        if not died:
            break
    assert step > 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "leftover",
    [["fewbit_curvature.partial"], ["fewbit_curvature.json.partial"], ["block-00000.partial"], [".tmpabc"], []],
)
def test_the_command_goes_on_with_its_own_leftovers(tiny: Path, tmp_path: Path, leftover: list[str]) -> None:
    (tmp_path / "curv").mkdir()
    for name in leftover:
        (tmp_path / "curv" / name).write_text("{")
    command = ["--kind", "gram", "--calibration", "random-tokens", "--samples", 2, "--sequence-length", 16]
    run_cli("curvature", tiny, tmp_path / "curv", *command)
    assert sorted(read(tmp_path / "curv")) == [
        "block-00000.safetensors",
        "block-00001.safetensors",
        "fewbit_curvature.json",
        "head.safetensors",
    ]


@pytest.mark.parametrize("kind", ["foreign file", "foreign folder", "link inside", "link", "file", "model"])
def test_what_no_measurement_made_is_refused_before_any_work(tiny: Path, tmp_path: Path, kind: str) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "curv"
    victim.mkdir()
    (victim / "thesis.txt").write_text("precious")
    if kind == "link":
        folder.symlink_to(victim)
    elif kind == "file":
        folder.write_text("precious")
    elif kind == "model":
        folder = tiny / "curv"
    else:
        folder.mkdir()
        if kind == "foreign file":
            (folder / "thesis.txt").write_text("precious")
        elif kind == "foreign folder":
            (folder / "block-00000.safetensors").mkdir()
        else:
            (folder / "block-00000.safetensors").symlink_to(victim / "thesis.txt")
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(FewbitError):
        check_curvature_place(folder, open_checkpoint(tiny))
    with pytest.raises(FewbitError):
        fill(folder, open_checkpoint(tiny))
    assert "fewbit: " in run_cli("curvature", tiny, folder, "--calibration", "random-tokens", code=2).stderr
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert (victim / "thesis.txt").read_text() == "precious" and not (tiny / "curv").exists()


def test_other_arguments_are_refused_once_there_is_a_block_and_said(tiny: Path, tmp_path: Path) -> None:
    checkpoint, folder = open_checkpoint(tiny), tmp_path / "curv"
    fill(folder, checkpoint, blocks=0)
    fill(folder, checkpoint, blocks=1, sources="nonsense")
    with pytest.raises(
        FewbitError, match=r'contains another curvature \(calibration\.sources was "nonsense", is "random-to'
    ):
        fill(folder, checkpoint)
    with pytest.raises(FewbitError, match="block 2 is not measured"):
        open_curvature(folder, checkpoint)
    assert fill(folder, checkpoint, sources="nonsense") == [1]
    assert len(open_curvature(folder, checkpoint).files) == 2


def test_a_model_that_changed_in_between_is_noticed(tmp_path: Path) -> None:
    model = build_tiny(tmp_path / "model", shard_size="1GB")
    weights = model / "model.safetensors"
    fill(tmp_path / "curv", open_checkpoint(model), blocks=1)
    before = weights.stat()
    data = bytearray(weights.read_bytes())
    # Where no sample of the weights is taken.
    data[max(open_checkpoint(model).entries.values(), key=lambda entry: entry.bytes).start] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    said = r"the model has changed since this measurement .* \(model\.safetensors has been changed or replaced since"
    with pytest.raises(FewbitError, match=said):
        fill(tmp_path / "curv", open_checkpoint(model))
    # A finished one belongs to the weights, wherever they lie.
    fill(tmp_path / "whole", open_checkpoint(model))
    shutil.copytree(model, tmp_path / "copy")
    assert fill(tmp_path / "whole", open_checkpoint(tmp_path / "copy")) == []


@pytest.mark.parametrize("blocks", [10**9, 0, -1, "many", None])
def test_a_curvature_that_claims_any_number_of_blocks(tiny: Path, tmp_path: Path, blocks: Any) -> None:
    checkpoint, folder = open_checkpoint(tiny), tmp_path / "curv"
    fill(folder, checkpoint)
    description = folder / "fewbit_curvature.json"
    data = json.loads(description.read_text())
    data["calibration"]["blocks"] = blocks
    description.write_text(json.dumps(data))
    with pytest.raises(FewbitError, match=r"not measured|damaged"):
        open_curvature(folder, checkpoint)
    for text in ("[]", "{}", "{", "[" * 100_000):
        description.write_text(text)
        with pytest.raises(FewbitError, match="damaged"):
            open_curvature(folder, checkpoint)


@pytest.mark.slow
def test_a_run_notices_that_its_curvature_was_measured_anew(tiny: Path, tmp_path: Path) -> None:
    measure = ["curvature", tiny, tmp_path / "curv", "--kind", "gram", "--samples", 4, "--sequence-length", 16]
    measure += ["--calibration", "random-tokens"]
    run_cli(*measure)
    quantize = ["quantize", tiny, tmp_path / "out", "--method", "gptq", "--bits", 3, "--curvature", tmp_path / "curv"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "fewbit.checkpoints.workdir.WorkFolder.publish", lambda work: (_ for _ in ()).throw(MemoryError())
        )
        run_cli(*quantize, code=2)
    shutil.rmtree(tmp_path / "curv")
    run_cli(*measure)
    assert "curvature: block-00000.safetensors has been" in run_cli(*quantize, code=2).stderr
    run_cli(*quantize, "--overwrite")


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError("a fault"), FewbitError("bad input"), KeyboardInterrupt()])
def test_a_measurement_that_holds_nothing_goes_whatever_ended_it(
    tiny: Path, tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = CalibrationOptions(CalibrationChoice("random-tokens", 4, 16))
    put = CurvatureWriter.put

    def fail(writer: CurvatureWriter, index: int, *more: Any) -> None:
        if index == fails_at:
            raise error
        put(writer, index, *more)

    monkeypatch.setattr(CurvatureWriter, "put", fail)
    fails_at = 0
    for there in (False, True):
        if there:
            (tmp_path / "curv").mkdir()
        with pytest.raises(type(error)):
            measure(tiny, tmp_path / "curv", GRAM, text)
        assert sorted(tmp_path.rglob("*")) == ([tmp_path / "curv"] if there else [])
    fails_at = 1
    with pytest.raises(type(error)):
        measure(tiny, tmp_path / "curv", GRAM, text)
    assert "block-00000.safetensors" in read(tmp_path / "curv")
    fails_at = 2
    measure(tiny, tmp_path / "curv", GRAM, text)
