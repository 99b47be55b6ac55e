"""A study's folder: gone on with whenever it was killed; nobody else's files in it touched."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import build_tiny, run_cli
from dying import dies_before, needs_fork
from test_studies import TOY, run_cell

from fewbit.errors import FewbitError
from fewbit.studies.folder import StudyFolder
from fewbit.studies.registry import make_choice
from fewbit.studies.run import run_study

JOB = {"study": "toy", "model": "m", "protocol": {}, "calibration": {}, "presets": "x", "fewbit": "0"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return tmp_path / "text.txt"


@pytest.mark.parametrize(
    "job",
    [
        {"name": "my cluster job"},
        {"fewbit": "0.1.0"},
        {"study": "toy", "model": "m"},
        [],
        None,
        "link",
        "link to folder",
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_no_study_made_is_refused(tmp_path: Path, job: Any, overwrite: bool) -> None:
    out, victim = tmp_path / "proj", tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.tex").write_text("precious")
    (out / "cells").mkdir(parents=True)
    if job == "link":
        (out / "job.json").write_text(json.dumps(JOB))
        (out / "work").symlink_to(victim)
    elif job == "link to folder":
        (out / "cells").rmdir()
        out.rmdir()
        StudyFolder(victim / "study", JOB).release()
        out.symlink_to(victim / "study")
    else:
        (out / "work").mkdir()
        (out / "work" / "thesis.tex").write_text("precious")
        if job is not None:
            (out / "job.json").write_text(json.dumps(job))
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    with pytest.raises(FewbitError, match=r"not the folder of a study|fewbit did not write this file"):
        StudyFolder(out, {**JOB, "model": "other"}, overwrite)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def make(out: Path, model: str = "m", overwrite: bool = False) -> None:
    folder = StudyFolder(out, {**JOB, "model": model}, overwrite)
    for index in range(3):
        if folder.rows(index, {"n": index}) is None:
            folder.put(index, {"n": index}, [{"n": index, "model": model}], 0.0)
    folder.finish({"model": model})
    folder.release()


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("begun_again", [False, True])
def test_killed_at_any_step_the_same_study_goes_on(tmp_path: Path, begun_again: bool) -> None:
    make(tmp_path / "straight", "new")
    for step in range(1, 80):
        out = tmp_path / str(step)
        if begun_again:
            make(out, "old")
        died = dies_before(step, lambda out=out: make(out, "new", begun_again), str(out))
        make(out, "new", begun_again)
        assert json.loads((out / "study.json").read_text()) == {"model": "new"}
        assert [p.read_bytes() for p in sorted((out / "cells").glob("*.json"))] == [
            p.read_bytes() for p in sorted((tmp_path / "straight" / "cells").iterdir())
        ]
        if not died:
            break
    assert step > 8


def test_a_study_that_holds_nothing_goes_whatever_ended_it(tiny: Path, text: Path, tmp_path: Path) -> None:
    choice = make_choice(TOY, str(tiny), tmp_path / "out", str(text), {"size": "quick"})

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError):
        run_study(replace(TOY, run_cell=fail), choice)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]

    def second(cell: Any, opened: Any, tell: Any) -> Any:
        return fail() if cell["n"] else run_cell(cell, opened, tell)

    with pytest.raises(RuntimeError):
        run_study(replace(TOY, run_cell=second), choice)
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 1
    run_study(TOY, choice)


def test_what_changed_between_two_runs_is_noticed(text: Path, tmp_path: Path) -> None:
    model = build_tiny(tmp_path / "model", shard_size="1GB")
    calibration = tmp_path / "calibration.txt"
    calibration.write_text("Some words to draw from. " * 40)
    given = {"size": "quick", "sources": str(calibration)}
    choice = make_choice(TOY, str(model), tmp_path / "out", str(text), given)
    run_study(TOY, choice)
    calibration.write_text("Other words to draw from. " * 40)
    with pytest.raises(FewbitError, match=r"contains a study with other arguments \(texts\..*calibration\.txt was "):
        run_study(TOY, choice)
    calibration.write_text("Some words to draw from. " * 40)
    run_study(TOY, choice)
    weights = model / "model.safetensors"
    before = weights.stat()
    weights.write_bytes(weights.read_bytes())
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(FewbitError, match=r"model\.safetensors has been changed or replaced since"):
        run_study(TOY, choice)


def test_a_study_is_not_made_inside_the_model(tiny: Path, text: Path) -> None:
    before = sorted(tiny.iterdir())
    command = ["study", "landscape", tiny, tiny / "study", "--data", text, "--size", "quick"]
    assert "is inside the model's own folder" in run_cli(*command, code=2).stderr
    assert sorted(tiny.iterdir()) == before
