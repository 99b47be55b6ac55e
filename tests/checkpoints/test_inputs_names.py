"""Names from strangers: they make no paths, match as they are, and do nothing to a terminal."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import build_tiny, copy_folder, run_cli
from safetensors.torch import load_file, save_file

import fewbit
from fewbit.architecture.coverage import cover
from fewbit.checkpoints.source import open_checkpoint
from fewbit.checkpoints.workdir import SOLVED
from fewbit.errors import FewbitError
from fewbit.pipeline.solved_store import SolvedStore, file_name
from fewbit.printable import markup_free, printable

ODD = [
    "../x",
    "/etc/x",
    "a/b",
    "a\\b",
    "x" * 5000,
    "",
    ".",
    "..",
    "a\0b",
    "a\nb",
    "[red]a",
    "*?",
    "Ü",
    "\ud800",
    "C:x",
    "A.b",
]


def test_file_names_of_tensors(tmp_path: Path) -> None:
    assert file_name("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    names = [*ODD, *map(str.lower, ODD), "tokens", "notes-0", "a.b"]
    made = {name: file_name(name) for name in names}
    assert len({made_name.lower() for made_name in made.values()}) == len(set(names))
    for name in made.values():
        assert len(name) < 160 and Path(name).name == name and name.isascii() and name.isprintable()
        assert name not in ("tokens", "notes-0") and not name.startswith(".")


def test_what_is_kept_of_such_tensors(tmp_path: Path) -> None:
    store = SolvedStore(tmp_path / "in")
    store.folder.mkdir()
    for number, name in enumerate(ODD):
        store.put_kept(name, torch.full((2,), float(number)))
    for number, name in enumerate(ODD):
        kept = store.kept(name)
        assert kept is not None and kept[0] == number
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert all(path.name.endswith(SOLVED) for path in store.folder.iterdir())


@pytest.mark.slow
def test_a_run_over_tensors_that_are_paths(tmp_path: Path) -> None:
    model = build_tiny(tmp_path / "m", shard_size="1GB")
    (tmp_path / "a.txt").write_text("some words and more of them. " * 100)
    (tmp_path / "victim").mkdir()
    tensors = load_file(model / "model.safetensors")
    for place in (f"{tmp_path}/victim/x", "../../victim/y", "a/../../victim/z"):
        tensors[f"{place}.weight"] = torch.ones(64)
        tensors[f"model.layers.0.{place}.weight"] = torch.ones(64)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    calibrated = ("--calibration", tmp_path / "a.txt", "--samples", 2, "--sequence-length", 8)
    for method in ("rtn", "gptq", "awq"):
        more = () if method == "rtn" else calibrated
        run_cli("quantize", model, tmp_path / "q", "--method", method, "--overwrite", *more, code=None)
        assert not list((tmp_path / "victim").iterdir())


def test_solved_weights_of_layers_that_are_paths(tmp_path: Path) -> None:
    model = build_tiny(tmp_path / "m", shard_size="1GB")
    (tmp_path / "victim").mkdir()
    tensors = load_file(model / "model.safetensors")
    odd = f"{tmp_path}/victim/x.layers.0.mlp.up_proj.weight"
    tensors[odd] = tensors["model.layers.0.mlp.up_proj.weight"].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    drawn = ("--calibration", "random-tokens", "--samples", 2, "--sequence-length", 8)
    result = run_cli("quantize", model, tmp_path / "q", "--method", "gptq", *drawn, code=None)
    assert result.returncode in (0, 2) and "Traceback" not in result.stderr
    assert not list((tmp_path / "victim").iterdir())


@pytest.mark.slow
def test_patterns_and_folders_with_glob_characters(tiny: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts[0].up*proj?.weight"
    checkpoint = open_checkpoint(tiny)
    entry = checkpoint.entries["model.layers.0.mlp.up_proj.weight"]
    covered = cover([replace(entry, name=name)], {}, (), [name])
    assert covered.tensors[0].reason == "excluded"
    model = copy_folder(tiny, tmp_path / "[a]*?[!b]")
    for out in (tmp_path / "q[1]*", tmp_path / "q[1]*"):
        run_cli("quantize", model, out, "--method", "rtn", "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([model.name, "q[1]*"])
    assert open_checkpoint(tmp_path / "q[1]*").is_native
    fewbit.load(tmp_path / "q[1]*", device="cpu")
    run_cli("inspect", tmp_path / "q[1]*")
    run_cli("unpack", tmp_path / "q[1]*", tmp_path / "u[2]")


@pytest.mark.skipif(os.name != "posix", reason="names of files are text there")
def test_names_that_are_not_utf_8(tiny: Path, tmp_path: Path) -> None:
    bad = os.fsdecode(b"mod\xff")
    try:
        model = copy_folder(tiny, tmp_path / bad)
    except OSError:
        pytest.skip("this file system has no such names")
    line = run_cli("quantize", model, tmp_path / "q", code=2).stderr
    assert line == f"fewbit: {tmp_path}/mod\\udcff: the name is not in UTF-8: rename it\n"
    assert "not in UTF-8" in run_cli("quantize", tiny, tmp_path / os.fsdecode(b"q\xff"), code=2).stderr
    with pytest.raises(FewbitError, match="not in UTF-8"):
        fewbit.load(model)
    (tmp_path / "here").symlink_to(bad)
    with pytest.raises(FewbitError, match="not in UTF-8"):
        open_checkpoint(tmp_path / "here")
    (tmp_path / "here").unlink()
    assert [path.name for path in tmp_path.iterdir()] == [bad]
    (model / bad).write_text("x")
    model.rename(tmp_path / "m")
    result = run_cli("quantize", tmp_path / "m", tmp_path / "q", "--method", "rtn")
    assert result.stderr == "not copied from the model's folder: mod\\udcff\n"
    (tmp_path / "m" / bad).rename(tmp_path / "m" / os.fsdecode(b"\xff.safetensors"))
    assert "\\udcff.safetensors" in open_checkpoint(tmp_path / "m").left


def test_what_a_terminal_would_obey() -> None:
    assert printable("a.b_ü é 漢 🙂") == "a.b_ü é 漢 🙂"
    assert printable("a\nb\r\x1b[31m\x9b\u202e\ud800\0") == "a\\nb\\r\\x1b[31m\\x9b\\u202e\\ud800\\x00"
    assert markup_free("[red]a[/red]\x1b") == "\\[red]a\\[/red]\\x1b"


def test_names_on_the_terminal(tmp_path: Path) -> None:
    model = build_tiny(tmp_path / "m", shard_size="1GB")
    tensors = load_file(model / "model.safetensors")
    odd = "model.layers.0.[red]a\x1b]0;b\x07\n.mlp.up_proj.weight"
    save_file({**tensors, odd: torch.ones(64, 64)}, model / "model.safetensors", {"format": "pt"})
    shown = "model.layers.0.[red]a\\x1b]0;b\\x07\\n.mlp.up_proj.weight"
    out = run_cli("inspect", model).stdout
    assert shown in "".join(part.strip(" │\n") for part in out.splitlines() for part in part.split("│")[1:2])
    (tmp_path / "a.txt").write_text("words " * 50)
    for command in (("plan", model), ("quantize", model, tmp_path / "q", "--group-size", "48")):
        result = run_cli(*command, code=None)
        assert not set(result.stdout + result.stderr) & set("\x1b\x07")
        assert result.returncode in (0, 2)
    renamed = model.rename(tmp_path / "[bold]m\x1b[31m")
    result = run_cli("eval", renamed, "--data", tmp_path / "none.txt", code=2)
    assert result.stderr.count("\n") == 1 and "\x1b" not in result.stderr


@pytest.mark.slow
def test_names_in_json_and_in_drawings(tiny: Path, tmp_path: Path) -> None:
    from fewbit.report.canvas import new_figure, to_svg

    model = copy_folder(tiny, tmp_path / "a\u202eb\x9bc $_{x$")
    out = run_cli("quantize", model, tmp_path / "q", "--method", "rtn", "--json").stdout
    assert "\\u202e" in out and not set(out) & set("\u202e\x9b")
    assert json.loads(out)["models"][0]["name"] == model.name
    pytest.importorskip("matplotlib")
    figure, axes = new_figure()
    axes.plot([1, 1000], [1, 10], label=model.name)
    axes.set_yticks([1, 2], [model.name, "b"])
    axes.set_xscale("log")
    axes.legend()
    assert to_svg(figure).startswith("<svg")


def test_a_kept_tensor_with_the_name_of_a_part(tmp_path: Path) -> None:
    model = build_tiny(tmp_path / "m", shard_size="1GB")
    extra = {"model.layers.0.mlp.up_proj.codes": torch.ones(4)}
    save_file({**load_file(model / "model.safetensors"), **extra}, model / "model.safetensors", {"format": "pt"})
    line = run_cli("quantize", model, tmp_path / "q", "--method", "rtn", code=2).stderr
    assert "two tensors would have the name model.layers.0.mlp.up_proj.codes" in line and line.count("\n") == 1
