"""`export --allow-requantize`: what a format does not hold is quantized again, and the cost is stated."""

from pathlib import Path

import pytest
import torch
from conftest import run_cli
from gguf_models import build
from safetensors.torch import load_file
from test_gguf_file import read

import fewbit
from fewbit.errors import FewbitError
from fewbit.runtime.unpack import unpack


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("again")
    fewbit.quantize(build(root / "model", "qwen2"), root / "q", "adpq+", bits=4)
    return root / "q"


def test_what_gguf_does_not_hold_is_quantized_again(folder: Path, tmp_path: Path) -> None:
    done = run_cli("export", folder, tmp_path / "out", code=2)
    assert "no type of GGUF holds" in done.stderr
    done = run_cli("export", folder, tmp_path / "out", "--allow-requantize")
    assert "quantized again: relative squared error" in done.stdout
    _, tensors, kinds = read(tmp_path / "out" / "out.gguf")
    assert kinds["blk.0.ffn_up.weight"] in ("iq4_nl", "q4_0")
    before = load_file(unpack(folder, tmp_path / "plain") / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    lost = float((tensors["blk.0.ffn_up.weight"] - before.float()).norm() / before.float().norm()) ** 2
    report = fewbit.export(folder, tmp_path / "b", allow_requantize=True)
    assert 0 < lost < 2 * report["requantized"]["worst"] < 0.03
    assert report["requantized"]["mean"] <= report["requantized"]["worst"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "out", "plain"]


@pytest.mark.parametrize("format", ["gptq", "mlx", "compressed-tensors"])
def test_other_formats(folder: Path, tmp_path: Path, format: str) -> None:
    with pytest.raises(FewbitError):
        fewbit.export(folder, tmp_path / "out", format)
    report = fewbit.export(folder, tmp_path / "out", format, allow_requantize=True)
    assert report["format"] == format and report["requantized"]["worst"] < 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_format_holds_is_not_quantized_again(tmp_path: Path) -> None:
    model = build(tmp_path / "model", "llama")
    fewbit.quantize(model, tmp_path / "q", "rtn", grid="q4_0")
    report = fewbit.export(tmp_path / "q", tmp_path / "out", allow_requantize=True)
    assert "requantized" not in report
    assert torch.isfinite(read(tmp_path / "out" / "out.gguf")[1]["blk.0.ffn_up.weight"]).all()


def test_nothing_is_overwritten_or_left(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "already exists" in run_cli("export", folder, tmp_path / "out", "--allow-requantize", code=2).stderr
    (tmp_path / ".new.fewbit-plain").mkdir()
    (tmp_path / ".new.fewbit-plain" / "mine.txt").write_text("mine")
    assert "needs this name" in run_cli("export", folder, tmp_path / "new", "--allow-requantize", code=2).stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new.fewbit-plain", "out"]


def test_scales_that_a_format_lacks_are_chosen_again(tmp_path: Path) -> None:
    model = build(tmp_path / "model", "llama")
    fewbit.quantize(model, tmp_path / "q", bits=4, grid="signed", scale_format="float16", outliers="none")
    with pytest.raises(FewbitError, match="no bfloat16 numbers"):
        fewbit.export(tmp_path / "q", tmp_path / "out", "compressed-tensors")
    report = fewbit.export(tmp_path / "q", tmp_path / "out", "compressed-tensors", allow_requantize=True)
    assert 0 < report["requantized"]["mean"] < 0.01
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "q"]


def test_the_type_of_embeddings_is_the_one_asked_for(folder: Path, tmp_path: Path) -> None:
    command = ("export", folder, tmp_path / "out", "--allow-requantize", "--embeddings")
    run_cli(*command, "f16")
    assert read(tmp_path / "out" / "out.gguf")[2]["token_embd.weight"] == "f16"
    done = run_cli(*command, "q8_0", "--format", "gptq", "--overwrite", code=2)
    assert "--embeddings for --format gptq must be one of keep" in done.stderr


def test_the_original_keeps_its_name(folder: Path, tmp_path: Path) -> None:
    run_cli("export", folder, tmp_path / "out", "--format", "mlx", "--allow-requantize")
    for path in (tmp_path / "out").glob("*.*"):
        assert b"fewbit-" not in path.read_bytes()
    assert "\n# model, quantized to 4 bits\n" in (tmp_path / "out" / "README.md").read_text()


def test_errors_name_the_folder_that_was_given(tmp_path: Path) -> None:
    model = build(tmp_path / "model", "llama")
    fewbit.quantize(model, tmp_path / "q", bits=4)
    (tmp_path / "q" / "tokenizer.json").unlink()
    done = run_cli("export", tmp_path / "q", tmp_path / "out", "--allow-requantize", code=2)
    assert f"{tmp_path / 'q'}: no tokenizer.json" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "q"]
