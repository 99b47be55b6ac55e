"""A model's folder: which files are its weights, where links may lead, what travels with the weights."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import build_tiny, copy_folder, run_cli
from safetensors.torch import load_file, save_file

import fewbit
from fewbit.checkpoints.companions import say_left
from fewbit.checkpoints.source import open_checkpoint
from fewbit.errors import FewbitError


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in one file."""
    return build_tiny(tmp_path_factory.mktemp("single") / "model", shard_size="1GB")


def zeroed(path: Path) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}


def refused(folder: Path, message: str) -> None:
    with pytest.raises(FewbitError, match=message):
        open_checkpoint(folder)
    with pytest.raises(FewbitError, match=message):
        fewbit.load(folder, device="cpu")


def test_a_pickle_that_transformers_would_load(single: Path, tmp_path: Path) -> None:
    model = copy_folder(single, tmp_path / "m")
    torch.save(zeroed(model / "model.safetensors"), model / "pytorch_model.bin")
    assert "pytorch_model.bin" in open_checkpoint(model).left
    assert fewbit.load(model, device="cpu").model.norm.weight.min() == 1
    (model / "model.safetensors").rename(model / "weights.safetensors")
    refused(model, r"transformers would load pytorch_model.bin, a pickle file, instead of weights.safetensors")
    (model / "weights.safetensors").unlink()
    refused(model, "its weights are only pickle files")


def test_a_second_set_of_weights(tiny: Path, single: Path, tmp_path: Path) -> None:
    model = copy_folder(tiny, tmp_path / "m")
    save_file(zeroed(single / "model.safetensors"), model / "model.safetensors", {"format": "pt"})
    refused(model, "two sets of weights: transformers loads model.safetensors")
    (model / "model.safetensors").rename(model / "consolidated.safetensors")
    (model / "original").mkdir()
    (model / "original" / "consolidated.00.pth").write_text("x")
    checkpoint = open_checkpoint(model)
    assert checkpoint.left == ("consolidated.safetensors", "original/")
    assert {path.name for path in checkpoint.files} == {p.name for p in tiny.glob("*.safetensors")}
    assert fewbit.load(model, device="cpu").model.norm.weight.min() == 1


def test_variants_are_left_alone(single: Path, tmp_path: Path) -> None:
    model = copy_folder(single, tmp_path / "m")
    save_file(zeroed(single / "model.safetensors"), model / "model.fp16.safetensors", {"format": "pt"})
    assert open_checkpoint(model).left == ("model.fp16.safetensors",)
    assert fewbit.load(model, device="cpu").model.norm.weight.min() == 1


def test_an_index_that_names_the_single_file(single: Path, tmp_path: Path) -> None:
    model = copy_folder(single, tmp_path / "m")
    names = dict.fromkeys(load_file(model / "model.safetensors"), "model.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert set(open_checkpoint(model).entries) == set(names)
    del names["model.norm.weight"]
    index.write_text(json.dumps({"weight_map": names}))
    refused(model, r"contains tensor model.norm.weight, which the index does not list")


def test_an_index_without_one_of_its_shards(tiny: Path, tmp_path: Path) -> None:
    model = copy_folder(tiny, tmp_path / "m")
    index = model / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    last = sorted(set(weight_map.values()))[-1]
    index.write_text(json.dumps({"weight_map": {n: f for n, f in weight_map.items() if f != last}}))
    refused(model, f"does not list {last}, which belongs to the same set")


def test_weights_that_the_config_names(single: Path, tmp_path: Path) -> None:
    model = copy_folder(single, tmp_path / "m")
    save_file(zeroed(single / "model.safetensors"), model / "other.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    checkpoint = open_checkpoint(model)
    assert [path.name for path in checkpoint.files] == ["other.safetensors"]
    assert checkpoint.left == ("model.safetensors",)
    assert fewbit.load(model, device="cpu").model.norm.weight.max() == 0
    fewbit.quantize(model, tmp_path / "q", fewbit.preset("rtn"))
    assert "transformers_weights" not in json.loads((tmp_path / "q" / "config.json").read_text())
    for named in ("../x.safetensors", "none.safetensors", "adapter_model.bin", 7):
        (model / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
        refused(model, "transformers_weights of config.json")


def test_another_config(single: Path, tmp_path: Path) -> None:
    model = copy_folder(single, tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "configuration_files": ["config.4.0.0.json"]}))
    refused(model, "configuration_files")


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links here")
def test_links_out_of_the_folder(single: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "id_rsa").write_text("private key")
    (tmp_path / "home" / "config.json").write_text((single / "config.json").read_text())
    (tmp_path / "home" / "model.safetensors").write_bytes((single / "model.safetensors").read_bytes())
    (tmp_path / "home" / "x.jinja").write_text("private template")
    for number, (name, target) in enumerate(
        (
            ("notes.txt", "id_rsa"),
            ("config.json", "config.json"),
            ("model.safetensors", "model.safetensors"),
            ("tokenizer.json", "id_rsa"),
            ("additional_chat_templates", ""),
            ("additional_chat_templates/x.jinja", "x.jinja"),
            ("hf_quant_config.json", "config.json"),
        )
    ):
        model = copy_folder(single, tmp_path / f"m{number}")
        (model / name).unlink(missing_ok=True)
        (model / name).parent.mkdir(exist_ok=True)
        up = os.path.relpath(tmp_path / "home" / target, (model / name).parent)
        (model / name).symlink_to(up)
        line = run_cli("quantize", model, tmp_path / "out", "--method", "rtn", code=2).stderr
        assert f"{name} is a link to a place outside the model's folder" in line and line.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links here")
def test_links_that_are_followed(single: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(single.iterdir())):
        (blobs / f"{number}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "copy.txt").symlink_to("config.json")
    names = {companion.name for companion in open_checkpoint(snapshot).companions}
    assert {"tokenizer.json", "tokenizer_config.json", "copy.txt"} <= names
    # A link to the folder is the user's own.
    (tmp_path / "here").symlink_to(snapshot)
    assert open_checkpoint(tmp_path / "here").entries
    # Blobs that lie elsewhere are not the cache's.
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FewbitError, match="is a link to a place outside the model's folder"):
        open_checkpoint(snapshot)


def test_companions_travel_and_the_rest_is_named(single: Path, tmp_path: Path) -> None:
    model = copy_folder(single, tmp_path / "m")
    carried = ["vocab.json", "merges.txt", "tokenizer.model", "tokenizer.model.v3", "vocab.bpe", "NOTICE.txt", "notice"]
    carried += ["LICENSE-2.0", "preprocessor_config.json", "additional_chat_templates/rag.jinja"]
    left = ["modeling_x.py", "1_Pooling/config.json", "training_args.bin", "rng_state.pth", "model.onnx", "x.gguf"]
    left += ["additional_chat_templates/x.py", "old.zip", "events.partial"]
    left += ["fewbit_report.json", "fewbit_run.json", ".fewbit-notes"]
    carried += ["fewbit_notes.md", "fewbit_report.txt"]
    silent = [".gitattributes"]
    for name in carried + left + silent:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    result = run_cli("quantize", model, tmp_path / "q", "--method", "rtn", "--json")
    report = json.loads(result.stdout)["report"]
    assert report["left"] == sorted("1_Pooling/" if name.startswith("1_") else name for name in left)
    assert result.stderr.startswith(
        "not copied from the model's folder: .fewbit-notes, 1_Pooling/, additional_chat_templates/x.py"
    )
    assert result.stderr.count("\n") == 1
    out = {str(path.relative_to(tmp_path / "q")) for path in (tmp_path / "q").rglob("*") if path.is_file()}
    # Reports of its own that have these names.
    ours = {"fewbit_report.json", "fewbit_run.json"}
    assert set(carried) | ours <= out and not (set(left) - ours) & out
    assert "recipe" in json.loads((tmp_path / "q" / "fewbit_report.json").read_text())
    # What was carried goes on being carried.
    run_cli("unpack", tmp_path / "q", tmp_path / "u")
    assert {name for name in carried if (tmp_path / "u" / name).is_file()} == set(carried)


def test_reports_of_fewbit_are_no_companions_and_other_files_of_these_names_are_said(
    single: Path, tmp_path: Path
) -> None:
    run_cli("quantize", single, tmp_path / "q", "--method", "rtn")
    run_cli("unpack", tmp_path / "q", tmp_path / "u")
    for folder in (tmp_path / "q", tmp_path / "u"):
        found = open_checkpoint(folder)
        assert not found.left and not {one.name for one in found.companions} & {"fewbit_report.json", "fewbit_run.json"}
    assert "not copied" not in run_cli("quantize", tmp_path / "u", tmp_path / "again", "--method", "rtn").stderr
    (tmp_path / "u" / "fewbit_report.json").write_text('{"my": "own notes"}')
    (tmp_path / "u" / "Fewbit_Run.json").write_text("{}")
    (tmp_path / "u" / "fewbit_notes.txt").write_text("my own notes")
    said = run_cli("quantize", tmp_path / "u", tmp_path / "more", "--method", "rtn").stderr
    assert said == "not copied from the model's folder: Fewbit_Run.json, fewbit_report.json\n"
    assert (tmp_path / "more" / "fewbit_notes.txt").read_text() == "my own notes"


def test_what_is_said_stays_short() -> None:
    assert say_left([]) is None
    assert say_left(map(str, range(20))) == "not copied from the model's folder: 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
