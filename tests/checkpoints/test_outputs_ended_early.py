"""Runs that end early: their work is gone on with or gives way, and what stands at the end is whole."""

import json
from pathlib import Path

import pytest
from dying import dies_before, needs_fork, siblings, stop_at

import fewbit
from fewbit.checkpoints.output import made_by_fewbit
from fewbit.checkpoints.workdir import WorkFolder, check_output
from fewbit.errors import FewbitError, WorkKeptError
from fewbit.pipeline.run import RunOptions
from fewbit.runtime.unpack import unpack

RTN = fewbit.preset("rtn", bits=4)
SHARDS = RunOptions(shard_size=20_000)


def publish_one(out: Path, text: str, overwrite: bool = False) -> None:
    """A run that makes two shards and three other files."""
    replaces = check_output(out, out.parent / "model", overwrite)
    work = WorkFolder(out, {"text": text}, overwrite, replaces)
    for name in ("a.safetensors", "b.safetensors"):
        if work.finished(name) is None:
            (work.path / f"{name}.solved").write_text("scratch")
            work.shard(name).write_text(f"{text} of {name}")
            work.finish(name, [])
    work.file("config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fewbit"}, "text": text}))
    work.file("templates/one.jinja").write_text(text)
    work.publish()


def read(out: Path) -> dict[str, str]:
    return {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*") if path.is_file()}


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("replacing", [False, True])
def test_killed_before_any_step_it_is_whole_or_goes_on(tmp_path: Path, replacing: bool) -> None:
    whole = tmp_path / "straight" / "out"
    publish_one(whole, "new")
    old = tmp_path / "older" / "out"
    publish_one(old, "old")
    for step in range(1, 200):
        folder = tmp_path / str(step)
        out = folder / "out"
        if replacing:
            publish_one(out, "old")
        folder.mkdir(exist_ok=True)
        died = dies_before(step, lambda out=out: publish_one(out, "new", replacing), str(folder))
        if out.exists():
            assert read(out) in ([read(whole)] if not replacing else [read(whole), read(old)])
        if not out.exists() or (replacing and read(out) == read(old)):
            publish_one(out, "new", replacing)
        else:
            with pytest.raises(FewbitError, match="already exists"):
                publish_one(out, "new")
        assert read(out) == read(whole)
        assert siblings(folder) == ["out"], step
        if not died:
            break
    assert step > 30


@pytest.mark.slow
@needs_fork
def test_killed_at_any_step_it_does_not_block_what_is_given_next(tmp_path: Path) -> None:
    for step in range(1, 60):
        folder = tmp_path / str(step)
        folder.mkdir()
        if not dies_before(step, lambda folder=folder: publish_one(folder / "out", "new"), str(folder)):
            break
        begun = any((folder / ".out.fewbit-partial").glob("*.safetensors.json")) or any(
            (folder / ".out.fewbit-partial").glob("*.solved")
        )
        if (folder / "out").exists():
            continue
        if begun:
            with pytest.raises(FewbitError, match="a run with other arguments was interrupted here"):
                publish_one(folder / "out", "other")
        publish_one(folder / "out", "other", begun)
        assert read(folder / "out")["a.safetensors"] == "other of a.safetensors"
        assert siblings(folder) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("unknown"), FewbitError("bad input"), KeyError("x"), MemoryError()])
def test_work_that_holds_nothing_goes_whatever_ended_it(
    tiny: Path, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fewbit.pipeline.run._stream", lambda *arguments: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            fewbit.quantize(tiny, tmp_path / "out", RTN)
    assert siblings(tmp_path) == []


@pytest.mark.parametrize("error", [OSError(28, "full"), OSError(5, "a bad disk"), KeyboardInterrupt(), MemoryError()])
def test_work_that_the_same_command_goes_on_with_is_kept_for_it(
    tiny: Path, tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, error)
        with pytest.raises((type(error), WorkKeptError)):
            fewbit.quantize(tiny, tmp_path / "out", RTN)
    with pytest.raises(FewbitError, match=r"interrupted here \(.*recipe\.bits was 4, is 3"):
        fewbit.quantize(tiny, tmp_path / "out", fewbit.preset("rtn", bits=3))
    shown: list[str] = []
    fewbit.quantize(tiny, tmp_path / "out", RTN, RunOptions(progress=lambda *step: shown.append(step[2])))
    assert shown == ["model.safetensors was finished before"]


@pytest.mark.parametrize("error", [RuntimeError("a fault"), FewbitError("bad input"), ValueError("a fault")])
def test_work_that_failed_gives_way_to_another_command(
    tiny: Path, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    for _ in range(3):
        # The same command goes on with it.
        with monkeypatch.context() as patch:
            stop_at(patch, error)
            with pytest.raises(type(error)):
                fewbit.quantize(tiny, tmp_path / "out", RTN, RunOptions(progress=lambda *step: shown.append(step[2])))
    assert shown.count("model.safetensors was finished before") == 2
    fewbit.quantize(tiny, tmp_path / "out", fewbit.preset("rtn", bits=3))
    assert siblings(tmp_path) == ["out"]


def test_unpack_does_not_drop_the_work_of_others(tiny: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "q"
    fewbit.quantize(tiny, quantized, RTN)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            fewbit.quantize(tiny, tmp_path / "out", RTN)
    with pytest.raises(FewbitError, match="a run with other arguments was interrupted here"):
        unpack(quantized, tmp_path / "out")
    unpack(quantized, tmp_path / "out", overwrite=True)
    assert made_by_fewbit(tmp_path / "out") and siblings(tmp_path) == ["out", "q"]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, RuntimeError("a fault"))
        with pytest.raises(RuntimeError):
            unpack(quantized, tmp_path / "other")
    assert siblings(tmp_path) == ["out", "q"]
