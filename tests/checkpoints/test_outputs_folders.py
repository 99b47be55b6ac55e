"""Folders that runs write: whole or not there, replacing only what they may, and with nothing else in them."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import build_tiny, folder_bytes, run_cli
from dying import siblings, stop_at

import fewbit
from fewbit.checkpoints.json_file import write_json
from fewbit.errors import FewbitError, WorkKeptError
from fewbit.pipeline.run import RunOptions
from fewbit.runtime.unpack import unpack

RTN = fewbit.preset("rtn", bits=4)
SHARDS = RunOptions(shard_size=20_000)


@pytest.mark.parametrize("made", ["folder", "file", "link", "of fewbit"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_at_out_meanwhile_is_left_alone(tiny: Path, tmp_path: Path, made: str, overwrite: bool) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    fewbit.quantize(tiny, other, RTN)

    def appear(done: int, total: int, what: str) -> None:
        if os.path.lexists(out):
            return
        if made == "folder":
            out.mkdir()
            (out / "thesis.txt").write_text("precious")
        elif made == "file":
            out.write_text("precious")
        elif made == "link":
            out.symlink_to(other)
        else:
            other.rename(out)

    with pytest.raises(WorkKeptError, match=r"appeared during the run; the finished work is kept: move out else"):
        fewbit.quantize(tiny, out, RTN, RunOptions(overwrite=overwrite, progress=appear))
    assert not other.exists() if made == "of fewbit" else other.is_dir()
    out.rename(tmp_path / "kept")
    assert made != "folder" or (tmp_path / "kept" / "thesis.txt").read_text() == "precious"
    assert made != "file" or (tmp_path / "kept").read_text() == "precious"
    assert made != "link" or (tmp_path / "kept").is_symlink()
    shown: list[str] = []
    fewbit.quantize(tiny, out, RTN, RunOptions(progress=lambda done, total, what: shown.append(what)))
    assert shown == ["model.safetensors was finished before"]
    assert siblings(tmp_path) == sorted({"kept", "out"} | ({"other"} - ({"other"} if made == "of fewbit" else set())))


def test_only_what_overwrite_allowed_at_the_start_is_replaced(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fewbit.quantize(tiny, out, RTN)

    def change(done: int, total: int, what: str) -> None:
        (out / "notes.md").write_text("precious")

    with pytest.raises(WorkKeptError, match=r"out: notes\.md was added to it during the run"):
        fewbit.quantize(tiny, out, RTN, RunOptions(overwrite=True, progress=change))
    assert (out / "notes.md").read_text() == "precious"
    with pytest.raises(FewbitError, match=r"out: contains notes\.md, which fewbit did not write"):
        fewbit.quantize(tiny, out, RTN, RunOptions(overwrite=True))
    (out / "notes.md").rename(tmp_path / "notes.md")
    fewbit.quantize(tiny, out, RTN, RunOptions(overwrite=True))
    (out / "sub").mkdir()
    (out / "sub" / "thesis.txt").write_text("precious")
    with pytest.raises(FewbitError, match=r"contains sub/thesis\.txt"):
        fewbit.quantize(tiny, out, RTN, RunOptions(overwrite=True))
    assert siblings(tmp_path) == ["notes.md", "out"]


@pytest.mark.parametrize("name", ["thesis.txt", "new/thesis.txt", "additional_chat_templates/deep/thesis.txt"])
def test_what_is_added_during_a_run_is_kept_at_any_depth(tmp_path: Path, name: str) -> None:
    model, out = build_tiny(tmp_path / "model"), tmp_path / "out"
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("x")
    fewbit.quantize(model, out, RTN)

    def change(done: int, total: int, what: str) -> None:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("precious")
        (out / "additional_chat_templates" / ".DS_Store").write_text("of the system")

    with pytest.raises(WorkKeptError, match=rf"out: {re.escape(name)} was added to it during the run"):
        fewbit.quantize(model, out, RTN, RunOptions(overwrite=True, progress=change))
    assert (out / name).read_text() == "precious"


@pytest.mark.slow
@pytest.mark.parametrize("run", ["no list", "list of another kind", "damaged", "gone"])
@pytest.mark.parametrize("name", ["my_notes.txt", "my.safetensors", "page.html", "fewbit_notes.json", "sub/a.txt"])
def test_without_a_list_only_names_that_fewbit_writes_are_replaced(
    tiny: Path, tmp_path: Path, run: str, name: str
) -> None:
    out = tmp_path / "out"
    fewbit.quantize(tiny, out, RTN, SHARDS)
    kept = json.loads((out / "fewbit_run.json").read_text())
    listed = kept.pop("files")
    if run == "gone":
        (out / "fewbit_run.json").unlink()
    elif run == "damaged":
        (out / "fewbit_run.json").write_text("{")
    else:
        write_json(out / "fewbit_run.json", {**kept, **({"files": {"a": 1}} if run != "no list" else {})})
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("precious")
    said = rf"contains {re.escape(name)}, which fewbit may not have written \(.*\), .*: move that file elsewhere first"
    with pytest.raises(FewbitError, match=said):
        fewbit.quantize(tiny, out, RTN, RunOptions(overwrite=True))
    assert (out / name).read_text() == "precious"
    (out / name).rename(tmp_path / "kept")
    (out / ".DS_Store").write_text("of the system")
    fewbit.quantize(tiny, out, RTN, replace(SHARDS, overwrite=True))
    assert json.loads((out / "fewbit_run.json").read_text())["files"] == listed


def test_without_a_list_what_was_copied_from_the_original_is_replaced(tmp_path: Path) -> None:
    first, second, out = (tmp_path / name for name in ("first", "second", "out"))
    build_tiny(first)
    build_tiny(second)
    (first / "LICENSE").write_text("of the first")
    (first / "additional_chat_templates").mkdir()
    (first / "additional_chat_templates" / "tools.jinja").write_text("x")
    fewbit.quantize(first, out, RTN)
    run = json.loads((out / "fewbit_run.json").read_text())
    del run["files"]
    # The original is known by its folder, or is the model that is given; gone, its files are nobody's.
    write_json(out / "fewbit_run.json", {"model_folder": "\0"})
    names = r"contains LICENSE, additional_chat_templates/tools\.jinja, which .*: move those files elsewhere first"
    with pytest.raises(FewbitError, match=names):
        fewbit.quantize(second, out, RTN, RunOptions(overwrite=True))
    for model in (first, second):
        write_json(out / "fewbit_run.json", run if model == second else {})
        fewbit.quantize(model, out, RTN, RunOptions(overwrite=True))
        assert (out / "LICENSE").exists() == (model == first)


def test_a_name_alone_is_no_proof_that_fewbit_made_a_folder(tiny: Path, tmp_path: Path) -> None:
    for name, text in (("fewbit_report.json", '{"my": "own"}'), ("config.json", "{}"), ("fewbit_run.json", "[]")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(text)
        (folder / "thesis.txt").write_text("precious")
        with pytest.raises(FewbitError, match="fewbit did not make this folder"):
            fewbit.quantize(tiny, folder, RTN, RunOptions(overwrite=True))
        assert siblings(folder) == sorted([name, "thesis.txt"])
    # What loads is proof enough: a report need not be there.
    out = tmp_path / "out"
    fewbit.quantize(tiny, out, RTN)
    for name in ("fewbit_report.json", "fewbit_run.json"):
        (out / name).unlink()
    fewbit.quantize(tiny, out, RTN, RunOptions(overwrite=True))
    assert (out / "fewbit_report.json").exists()


@pytest.mark.parametrize("kind", ["link", "file", "foreign folder", "folder with a job of others", "link inside"])
def test_a_work_place_that_is_not_fewbits_is_refused(tiny: Path, tmp_path: Path, kind: str) -> None:
    victim, place = tmp_path / "victim", tmp_path / ".out.fewbit-partial"
    victim.mkdir()
    (victim / "thesis.txt").write_text("precious")
    if kind == "link":
        place.symlink_to(victim)
    elif kind == "file":
        place.write_text("precious")
    elif kind == "foreign folder":
        place.mkdir()
        (place / "model.safetensors").write_text("precious")
    elif kind == "folder with a job of others":
        place.mkdir()
        (place / ".fewbit-job.json").write_text('{"fewbit": "0.1.0"}')
        (place / "thesis.txt").write_text("precious")
    else:
        place.mkdir()
        write_json(place / ".fewbit-job.json", {"fewbit_work": 1, "job": {}})
        (place / "model.safetensors.partial").symlink_to(victim / "thesis.txt")
    for options in (RunOptions(), RunOptions(overwrite=True)):
        with pytest.raises(FewbitError, match=r"\.out\.fewbit-partial"):
            fewbit.quantize(tiny, tmp_path / "out", RTN, options)
        with pytest.raises(FewbitError, match=r"\.out\.fewbit-partial"):
            unpack(_quantized(tiny, tmp_path), tmp_path / "out", options.overwrite)
    assert (victim / "thesis.txt").read_text() == "precious"
    assert os.path.lexists(place) and not (tmp_path / "out").exists()


def _quantized(tiny: Path, tmp_path: Path) -> Path:
    if not (tmp_path / "q").exists():
        fewbit.quantize(tiny, tmp_path / "q", RTN)
    return tmp_path / "q"


def test_a_stranger_in_the_work_folder_outlives_the_run(tiny: Path, tmp_path: Path) -> None:
    def visit(done: int, total: int, what: str) -> None:
        (tmp_path / ".out.fewbit-partial" / "thesis.txt").write_text("precious")

    with pytest.raises(WorkKeptError, match=r"thesis\.txt: fewbit did not write this file"):
        fewbit.quantize(tiny, tmp_path / "out", RTN, RunOptions(progress=visit))
    stranger = tmp_path / ".out.fewbit-partial" / "thesis.txt"
    assert stranger.read_text() == "precious"
    stranger.rename(tmp_path / "thesis.txt")
    fewbit.quantize(tiny, tmp_path / "out", RTN)
    assert siblings(tmp_path) == ["out", "thesis.txt"]


def test_only_what_belongs_to_the_output_is_published(tiny: Path, tmp_path: Path) -> None:
    def litter(done: int, total: int, what: str) -> None:
        for name in (
            ".tmpAbCdEf",
            "half.partial",
            "old.solved",
            "x.states",
            "stale.safetensors",
            "stale.safetensors.json",
        ):
            (tmp_path / ".out.fewbit-partial" / name).write_text("scratch")
        (tmp_path / ".out.fewbit-partial" / "output").mkdir(exist_ok=True)
        (tmp_path / ".out.fewbit-partial" / "output" / "stale.json").write_text("{}")

    fewbit.quantize(tiny, tmp_path / "out", RTN, replace(SHARDS, progress=litter))
    fewbit.quantize(tiny, tmp_path / "straight", RTN, SHARDS)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "straight")
    listed = json.loads((tmp_path / "out" / "fewbit_run.json").read_text())["files"]
    assert listed == siblings(tmp_path / "out")
    assert siblings(tmp_path) == ["out", "straight"]


def test_an_original_that_was_changed_or_replaced_is_noticed(tmp_path: Path) -> None:
    model = build_tiny(tmp_path / "model", shard_size="1GB")
    weights, config = model / "model.safetensors", model / "config.json"

    def interrupted() -> None:
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                fewbit.quantize(model, tmp_path / "out", RTN, RunOptions(overwrite=True))

    interrupted()
    before = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    same = r"model\.safetensors has been changed or replaced since, with the same size and time"
    with pytest.raises(FewbitError, match=same):
        fewbit.quantize(model, tmp_path / "out", RTN)
    interrupted()
    twin = tmp_path / "twin"
    twin.write_bytes(data)
    os.utime(twin, ns=(before.st_atime_ns, before.st_mtime_ns))
    twin.replace(weights)
    with pytest.raises(FewbitError, match=same):
        fewbit.quantize(model, tmp_path / "out", RTN)
    interrupted()
    weights.touch()
    with pytest.raises(FewbitError, match=r"model\.safetensors has been modified since"):
        fewbit.quantize(model, tmp_path / "out", RTN)
    interrupted()
    config.write_text(config.read_text().replace('"max_position_embeddings": 128', '"max_position_embeddings": 64'))
    with pytest.raises(FewbitError, match=r"config\.max_position_embeddings was 128, is 64"):
        fewbit.quantize(model, tmp_path / "out", RTN)
    interrupted()
    fewbit.quantize(model, tmp_path / "out", RTN)


def test_names_with_glob_characters_and_jobs_with_nan(tmp_path: Path) -> None:
    model = build_tiny(tmp_path / "m[1]*", shard_size="1GB")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "odd": float("nan")}))
    out = tmp_path / "out[1]?*"
    for overwrite in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                fewbit.quantize(model, out, RTN, RunOptions(overwrite=overwrite))
        fewbit.quantize(model, out, RTN, RunOptions(overwrite=overwrite))
        assert siblings(tmp_path) == sorted([model.name, out.name])


def test_a_disk_that_fills_up_at_any_write_keeps_what_is_done(tiny: Path, tmp_path: Path) -> None:
    """Whatever is written, from the first shard to the last file before the name."""
    import builtins

    real, out = builtins.open, tmp_path / "out"
    write_bytes, count = Path.write_bytes, [0]
    fewbit.quantize(tiny, tmp_path / "straight", RTN, SHARDS)
    for limit in (1, 2, 4, 7, 9, 10, 11, 12):
        count[0] = 0

        def full(path: Path, data: bytes, limit: int = limit) -> int:
            count[0] += 1
            if count[0] > limit:
                raise OSError(28, "No space left on device", str(path))
            return write_bytes(path, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            try:
                fewbit.quantize(tiny, out, RTN, SHARDS)
            except WorkKeptError as error:
                assert "the disk is full" in str(error)
        assert not out.exists() or folder_bytes(out) == folder_bytes(tmp_path / "straight")
        if not out.exists():
            fewbit.quantize(tiny, out, RTN, SHARDS)
        assert folder_bytes(out) == folder_bytes(tmp_path / "straight")
        shutil.rmtree(out)
        assert siblings(tmp_path) == ["straight"] and builtins.open is real


def test_what_unpack_replaces(tiny: Path, tmp_path: Path) -> None:
    quantized = _quantized(tiny, tmp_path)
    run_cli("unpack", quantized, tmp_path / "plain")
    assert "already exists" in run_cli("unpack", quantized, tmp_path / "plain", code=2).stderr
    run_cli("unpack", quantized, tmp_path / "plain", "--overwrite")
    run_cli("quantize", tmp_path / "plain", tmp_path / "again", "--method", "rtn")
    listed = json.loads((tmp_path / "plain" / "fewbit_run.json").read_text())["files"]
    assert listed == siblings(tmp_path / "plain")


def test_the_demonstration_overwrites_no_report_of_others(tmp_path: Path) -> None:
    for name, text in (("report.json", '{"my": "own"}'), ("report.html", "mine")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(text)
        assert "already exists and was not made by the demo" in run_cli("demo", folder, code=2).stderr
        assert (folder / name).read_text() == text and siblings(folder) == [name]
