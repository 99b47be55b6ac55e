"""Runs from end to end on a tiny model: the same bytes however it is run, interrupted or not."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import build_tiny, folder_bytes, run_cli
from safetensors.torch import load_file, save_file

import fewbit
from fewbit.errors import FewbitError
from fewbit.pipeline.run import RunOptions


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "adpq", "adpq+"])
def test_the_same_bytes_for_any_number_of_workers(
    tiny: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewbit.pipeline.quantize_tensor._CHUNK_WEIGHTS", 1000)
    recipe = fewbit.preset(method, bits=3)
    one = fewbit.quantize(tiny, tmp_path / "one", recipe, RunOptions(workers=1))
    four = fewbit.quantize(tiny, tmp_path / "four", recipe, RunOptions(workers=4))
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "four")
    assert one["layers"] == four["layers"]
    monkeypatch.setattr("fewbit.pipeline.quantize_tensor._CHUNK_WEIGHTS", 1 << 20)
    whole = fewbit.quantize(tiny, tmp_path / "whole", recipe)
    codes = "model.safetensors"
    assert (tmp_path / "whole" / codes).read_bytes() == (tmp_path / "one" / codes).read_bytes()
    assert whole["output"] == one["output"]


def test_shards_index_and_companions(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = fewbit.quantize(tiny, out, fewbit.preset("adpq", bits=4, embedding_bits=16), RunOptions(shard_size=20_000))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == shards
    found = {name: shard for shard in shards for name in load_file(out / shard)}
    assert found == index["weight_map"]
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "fewbit_report.json", "fewbit_run.json"} <= names
    assert not [n for n in names if "partial" in n or n.endswith("safetensors.json") or n == ".fewbit-job.json"]
    assert "lm_head.weight" not in found
    kept = {k["name"]: k["reason"] for k in report["kept"]}
    assert kept["model.embed_tokens.weight"] == "embedding or head"
    assert kept["model.norm.weight"].startswith("vector")
    assert len(report["layers"]) == 14
    before, after = load_tiny(tiny), load_file(out / found["model.embed_tokens.weight"])
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def load_tiny(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes(tmp_path: Path, dtype: str) -> None:
    model = build_tiny(tmp_path / "model", dtype, shard_size="1GB")
    for method in ("rtn", "adpq", "adpq+"):
        report = fewbit.quantize(model, tmp_path / method, fewbit.preset(method, bits=4))
        assert max(layer["relative_squared_error"] for layer in report["layers"]) < 0.02


def test_report_only_writes_nothing(tiny: Path, tmp_path: Path) -> None:
    before = sorted(tiny.parent.iterdir())
    report = fewbit.quantize(tiny, None, fewbit.preset("adpq+", bits=2), RunOptions(report_only=True))
    assert sorted(tiny.parent.iterdir()) == before
    assert 2 < report["output"]["bits_per_weight"] < 3.2
    with pytest.raises(FewbitError, match="give the output folder"):
        fewbit.quantize(tiny, None, fewbit.preset("rtn"))


def test_overwrite_replaces_only_what_fewbit_made(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fewbit.quantize(tiny, out, fewbit.preset("rtn", bits=4))
    with pytest.raises(FewbitError, match="already exists: choose another name or pass --overwrite"):
        fewbit.quantize(tiny, out, fewbit.preset("rtn", bits=3))
    fewbit.quantize(tiny, out, fewbit.preset("rtn", bits=3), RunOptions(overwrite=True))
    assert json.loads((out / "fewbit_report.json").read_text())["recipe"]["bits"] == 3
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(FewbitError, match="fewbit did not make this folder"):
        fewbit.quantize(tiny, mine, fewbit.preset("rtn"), RunOptions(overwrite=True))
    assert (mine / "thesis.txt").read_text() == "precious"


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
import fewbit, fewbit.pipeline.run as run
from fewbit.pipeline.run import RunOptions
original = run.quantize_tensor
def slow(*arguments):
    time.sleep(0.15)
    return original(*arguments)
run.quantize_tensor = slow
fewbit.quantize(sys.argv[1], sys.argv[2], fewbit.preset("adpq+", bits=3), RunOptions(shard_size=20_000))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_and_gives_the_same_bytes(tiny: Path, tmp_path: Path, how: signal.Signals) -> None:
    out = tmp_path / "out"
    partial = tmp_path / ".out.fewbit-partial"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(tiny), str(out)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(partial.glob("*.safetensors.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(how)
    process.wait()
    assert process.returncode != 0
    assert not out.exists()
    finished = {p.name: p.stat().st_mtime_ns for p in partial.glob("*.safetensors")}
    assert finished
    with pytest.raises(
        FewbitError,
        match=r"other arguments was interrupted here \(recipe.grid was .*; and 9 more.: repeat those arguments",
    ):
        fewbit.quantize(tiny, out, fewbit.preset("rtn", bits=3), RunOptions(shard_size=20_000))
    shown: list[str] = []
    options = RunOptions(shard_size=20_000, progress=lambda done, total, what: shown.append(what))
    fewbit.quantize(tiny, out, fewbit.preset("adpq+", bits=3), options)
    for name, time_ns in finished.items():
        assert (out / name).stat().st_mtime_ns == time_ns, "a finished shard was written again"
    fewbit.quantize(tiny, tmp_path / "straight", fewbit.preset("adpq+", bits=3), RunOptions(shard_size=20_000))
    assert folder_bytes(out) == folder_bytes(tmp_path / "straight")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "straight"]


def test_a_full_disk_says_so_and_leaves_nothing_whole(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fewbit.checkpoints.safetensors_io.ShardWriter._write", full)
    with pytest.raises(FewbitError, match=r"the disk is full: free .* and run the same command again"):
        fewbit.quantize(tiny, tmp_path / "out", fewbit.preset("rtn"))
    assert not (tmp_path / "out").exists()


def test_too_little_space_is_noticed_before_any_work(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewbit.pipeline.run.shutil.disk_usage", lambda path: _Free())
    with pytest.raises(FewbitError, match=r"the output needs 0\.0 GB, but only 0\.0 GB are free"):
        fewbit.quantize(tiny, tmp_path / "out", fewbit.preset("rtn"))


class _Free:
    free = 10


@pytest.mark.slow
def test_a_local_folder_needs_neither_transformers_nor_a_network(tiny: Path, tmp_path: Path) -> None:
    program = """
import socket, sys
def refuse(*arguments, **keywords):
    raise AssertionError("a network connection was opened")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
sys.argv = ["fewbit", "quantize", sys.argv[1], sys.argv[2], "--method", "adpq+", "--bits", "3"]
from fewbit.cli import app
try:
    app(standalone_mode=False)
finally:
    loaded = [m for m in ("transformers", "huggingface_hub", "datasets", "requests", "httpx") if m in sys.modules]
    assert not loaded, loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert "AssertionError" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "config.json").is_file()


def test_nan_is_named(tiny: Path, tmp_path: Path) -> None:
    for bad in (float("nan"), float("inf")):
        folder = tmp_path / f"bad{bad}"
        folder.mkdir()
        tensors = load_tiny(tiny)
        tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = bad
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text((tiny / "config.json").read_text())
        for method in ("rtn", "adpq", "adpq+"):
            message = r"model\.layers\.1\.mlp\.up_proj\.weight: a weight is NaN or infinite"
            with pytest.raises(FewbitError, match=message):
                fewbit.quantize(folder, tmp_path / "out", fewbit.preset(method), RunOptions(overwrite=True))
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_json_of_a_run_has_the_stable_keys(tiny: Path, tmp_path: Path) -> None:
    # A process of its own: its peak memory is that of the run, not of the tests before it.
    result = run_cli("quantize", tiny, tmp_path / "out", "--method", "adpq", "--bits", 3, "--json", env={"LANG": "C"})
    data = json.loads(result.stdout)
    row = data["models"][0]
    keys = {"name", "method", "bits_per_weight", "bits_per_weight_all", "bytes", "seconds", "peak_rss_bytes"}
    assert keys == set(row)
    assert row["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert data["report"]["recipe"]["bits"] == 3
    assert 50e6 < row["peak_rss_bytes"] < 1.5e9


@pytest.mark.slow
def test_a_second_run_on_the_same_output_is_refused(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(tiny), str(out)], stderr=subprocess.DEVNULL)
    while not (tmp_path / ".out.fewbit-partial" / ".fewbit-job.json").exists():
        time.sleep(0.02)
    with pytest.raises(FewbitError, match="another run is writing to it"):
        fewbit.quantize(tiny, out, fewbit.preset("adpq+", bits=3), RunOptions(shard_size=20_000, overwrite=True))
    assert process.wait() == 0
    assert (out / "config.json").is_file()


def test_overwrite_goes_on_with_its_own_work(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = RunOptions(shard_size=20_000, overwrite=True)
    with pytest.raises(RuntimeError, match="stop"):
        fewbit.quantize(tiny, out, fewbit.preset("rtn", bits=3), _stopping(options, after=12))
    partial = tmp_path / ".out.fewbit-partial"
    finished = {p.name: p.stat().st_mtime_ns for p in partial.glob("*.safetensors")}
    assert finished
    fewbit.quantize(tiny, out, fewbit.preset("rtn", bits=3), options)
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in finished.items())
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def _stopping(options: RunOptions, after: int) -> RunOptions:
    seen = []

    def progress(done: int, total: int, what: str) -> None:
        seen.append(what)
        if len(seen) == after:
            raise RuntimeError("stop")

    return replace(options, progress=progress)


def test_files_of_the_users_own_are_left_alone(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "job.json").write_text("{}")
    (model / "model.safetensors.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewbit.checkpoints.workdir.WorkFolder.publish", lambda work: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fewbit.quantize(model, tmp_path / "out", fewbit.preset("rtn"))
    fewbit.quantize(model, tmp_path / "out", fewbit.preset("rtn"))
    assert (tmp_path / "out" / "job.json").read_text() == "{}"
    assert not (tmp_path / "out" / "model.safetensors.json").exists()
    own = ("job.json", "notes.partial", "best.solved", "x.states")
    for name in own:
        (tmp_path / "out" / name).write_text("mine")
    run_cli("quantize", model, tmp_path / "out", code=2)
    assert all((tmp_path / "out" / name).read_text() == "mine" for name in own)
