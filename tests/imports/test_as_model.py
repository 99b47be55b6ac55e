"""Other tools' checkpoints in place of a model: every command reads their codes, or says what it does instead."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, copy_folder, run_cli
from safetensors.torch import load_file, save_file
from test_import_folders import awq, compressed, gptq
from test_import_gguf import TYPES, blocks, rounded, write

import fewbit
from fewbit.errors import FewbitError
from fewbit.imports.as_model import decoded, with_codes
from fewbit.imports.import_model import import_model

gguf = pytest.importorskip("gguf")
KINDS = {"gptq": "GPTQ", "awq": "AWQ", "compressed": "compressed-tensors", "gguf": "GGUF"}
IDS = torch.arange(12).view(1, -1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("models")
    for name, make in {"gptq": gptq, "awq": awq, "compressed": compressed}.items():
        make(top / name)
    (top / "gguf").mkdir()
    write(top / "gguf" / "file.gguf", TYPES["q4_0"], make=rounded)
    (top / "text.txt").write_text("!\"#$%&'()" * 300)
    return {**{name: top / name for name in KINDS}, "text": top / "text.txt"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_codes_are_read_by_every_command(models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    model, said = models[kind], f"{models[kind]}: read with the codes of {KINDS[kind]}, as they are"
    options = ["--data", models["text"], "--seq-len", 32, "--windows", 2, "--json"]
    ran = run_cli("eval", model, *options, "--reference", model)
    assert f"fewbit: {said}" in ran.stderr
    result = json.loads(ran.stdout)
    [row] = result["models"]
    assert row["name"] == str(model) == result["protocol"]["reference"] and row["kl_mean"] == 0
    assert row["method"] == f"{KINDS[kind]} (imported)" and 4 <= row["bits_per_weight"] < 5.5
    imported = import_model(model, tmp_path / "native") and tmp_path / "native"
    again = json.loads(run_cli("eval", imported, *options).stdout)["models"][0]
    assert again["nll"] == row["nll"] and again["bits_per_weight"] == row["bits_per_weight"]
    loaded = fewbit.load(model, dtype=torch.float32, device="cpu")
    ours = fewbit.load(imported, dtype=torch.float32, device="cpu")
    assert torch.equal(loaded(IDS).logits, ours(IDS).logits)
    shown = json.loads(run_cli("inspect", model, "--json").stdout)
    assert shown["models"][0]["name"] == str(model)
    assert [one for one in shown["tensors"] if one["action"] == "quantized"]
    run_cli("unpack", model, tmp_path / "plain")
    assert torch.equal(
        load_file(tmp_path / "plain" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].float(),
        fewbit.load(imported, device="cpu").model.layers[0].mlp.up_proj.weight.float(),
    )
    assert json.loads(run_cli("chat", model, "--prompt", "#$%", "--max-new-tokens", 2, "--json").stdout)
    assert "give the original with --reference" in run_cli("tune", model, tmp_path / "t", code=2).stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_quantizing_again_starts_from_decoded_weights(models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    model = models[kind]
    ran = run_cli("quantize", model, tmp_path / "again", "--method", "rtn", "--json")
    assert f"{model}: quantized already ({KINDS[kind]}): starts from its decoded weights" in ran.stderr
    found = load_file(decoded(model).place / "model.safetensors") if kind != "gguf" else {}
    if found:
        fewbit.unpack(model, tmp_path / "plain")
        plain = load_file(tmp_path / "plain" / "model.safetensors")
        assert plain.keys() == found.keys() and all(torch.equal(found[name], plain[name]) for name in plain)
        assert json.loads(ran.stdout)["report"]["model"] == kind
    planned = json.loads(run_cli("plan", model, "--method", "rtn", "--json").stdout)
    assert planned["model"] == str(model) and not planned["problems"]


@pytest.mark.slow
def test_a_study_takes_them(models: dict[str, Path], tmp_path: Path) -> None:
    options = ["--data", models["text"], "--size", "quick", "--methods", "rtn", "--bits", 4, "--windows", 2]
    more = ["--seq-len", 16, "--samples", 2, "--sequence-length", 16, "--calibration", "random-tokens", "--json"]
    ran = run_cli("study", "objectives", models["gptq"], tmp_path / "s", *options, *more, "--folder", models["gptq"])
    assert "starts from its decoded weights" in ran.stderr and "read with the codes of GPTQ" in ran.stderr
    rows = json.loads(ran.stdout)["rows"]
    assert [row for row in rows if "imported" in json.dumps(row)]


def test_it_is_read_once_for_the_same_files(models: dict[str, Path], tmp_path: Path) -> None:
    model = copy_folder(models["gptq"], tmp_path / "m")
    first = with_codes(model).place
    assert with_codes(model).place == first and Path(first).name == "m"
    config = model / "config.json"
    config.write_text(config.read_text() + " ")
    assert with_codes(model).place == first
    tensors = load_file(model / "model.safetensors")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert with_codes(model).place != first
    (model / "tokenizer_config.json").write_text((model / "tokenizer_config.json").read_text() + " ")
    assert with_codes(model).place != with_codes(models["gptq"]).place


def test_what_is_not_quantized_stays_as_it_is(tiny: Path, tmp_path: Path) -> None:
    for find in (with_codes, decoded):
        assert find(tiny).place == tiny and find(tiny).said is None
        assert find("smollm2-135m").place == "smollm2-135m"
    packed = tmp_path / "packed"
    fewbit.quantize(tiny, packed, fewbit.preset("rtn"))
    assert with_codes(packed).place == packed
    write(tmp_path / "f32.gguf", gguf.GGMLQuantizationType.F32, make=_float32)
    assert with_codes(tmp_path / "f32.gguf").place == tmp_path / "f32.gguf"
    with pytest.raises(FewbitError, match="no such"):
        with_codes(tmp_path / "nothing" / "at" / "all")


def _float32(kind: Any, shape: tuple[int, int], random: Any) -> Any:
    return (random.standard_normal(shape) * 0.06).astype("float32")


def test_a_file_whose_codes_have_no_grid_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, gguf.GGMLQuantizationType.TQ1_0, make=blocks)
    found = with_codes(path)
    assert found.place == path and found.said is not None
    assert found.said.startswith(f"{path}: read as 16-bit weights, decoded (the tensor ") and "TQ1_0" in found.said


def test_a_folder_that_cannot_be_read_is_left_to_transformers_or_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    model = copy_folder(models["gptq"], tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"]["rotation"] = "hadamard"
    (model / "config.json").write_text(json.dumps(config))
    assert with_codes(model).place == model and decoded(model).place == model
    line = run_cli("quantize", model, tmp_path / "out", code=2).stderr
    assert f"{model}: already quantized (GPTQ" in line and "give the 16-bit original" in line
    damaged = copy_folder(models["gptq"], tmp_path / "d")
    tensors = load_file(damaged / "model.safetensors")
    name = next(one for one in tensors if one.endswith("qweight"))
    save_file({**tensors, name: tensors[name][:-1]}, damaged / "model.safetensors", {"format": "pt"})
    for command in (["eval", damaged, "--data", models["text"]], ["quantize", damaged, tmp_path / "out"]):
        line = run_cli(*command, code=2).stderr
        assert "do not fit" in line or "damaged" in line
        assert line.count("\n") == 1


@pytest.mark.parametrize("kind", ["gptq", "gguf"])
def test_an_output_never_replaces_what_it_is_made_from(models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    model = copy_folder(models[kind], tmp_path / "m")
    # As if fewbit itself had written it.
    (model / "fewbit_report.json").write_text(json.dumps({"fewbit_version": "0", "recipe": {}}))
    names = sorted(path.name for path in model.iterdir())
    (model / "fewbit_run.json").write_text(json.dumps({"files": names}))
    given = model if kind == "gptq" else model / "file.gguf"
    for command in ("quantize", "unpack", "export"):
        for out in (model, tmp_path):
            line = run_cli(command, given, out, "--overwrite", code=2).stderr
            assert "is inside the model's own folder" in line or "contains the model's folder" in line
    assert sorted(path.name for path in model.iterdir()) == sorted([*names, "fewbit_run.json"])


def test_another_tool_is_refused_as_before(tmp_path: Path) -> None:
    model = build_tiny(tmp_path / "m", shard_size="1GB")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "hqq"}}))
    for command in (["quantize", model, tmp_path / "out"], ["inspect", model]):
        assert "already quantized (HQQ" in run_cli(*command, code=2).stderr
