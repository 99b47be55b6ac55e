"""Folders of other tools that are damaged or not understood are refused, in one line that says why."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import copy_folder, run_cli
from safetensors.torch import load_file, save_file
from test_import_folders import LAYER, awq, compressed, gptq
from test_import_gguf import refused

WRITERS = {"gptq": gptq, "awq": awq, "compressed": compressed}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each kind, which tests copy and damage."""
    top = tmp_path_factory.mktemp("foreign")
    for name, make in WRITERS.items():
        make(top / name)
    return {name: top / name for name in WRITERS}


def changed(models: dict[str, Path], kind: str, tmp_path: Path, *keys: Any) -> Path:
    """A copy with another value in its quantization_config: keys lead to it, the last of them is the value."""
    model = copy_folder(models[kind], tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    inner = config["quantization_config"]
    *path, last, value = keys
    for key in path:
        inner = inner[key]
    inner[last] = value
    (model / "config.json").write_text(json.dumps(config))
    return model


GROUP = ("config_groups", "group_0")
DESCRIPTIONS: list[tuple[str, tuple[Any, ...], str]] = [
    ("gptq", ("bits", 5), "bits is 5: only 2 or 3 or 4 or 8 can be imported"),
    ("gptq", ("bits", "4"), "bits is 4: only"),
    ("gptq", ("bits", 8), "do not fit"),
    ("gptq", ("group_size", 64), "are no groups of 64"),
    ("gptq", ("group_size", None), "group_size is None: it must be a whole number"),
    ("gptq", ("checkpoint_format", "marlin"), "checkpoint_format is marlin"),
    ("gptq", ("is_marlin_format", True), "is_marlin_format is True"),
    ("gptq", ("rotation", "hadamard"), "rotation is hadamard: rotated weights"),
    ("gptq", ("planar", True), "planar is True: fewbit does not know this key"),
    ("gptq", ("quant_method", "bitnet"), "quantized by BitNet, which cannot be imported"),
    ("awq", ("version", "gemv"), "version is gemv: only gemm"),
    ("awq", ("bits", 8), "bits is 8"),
    ("awq", ("group_size", 128), "do not fit each other and groups of 128"),
    ("awq", ("new_key", [1]), "new_key is [1]: fewbit does not know this key"),
    ("compressed", ("format", "int-quantized"), "format is int-quantized: only pack-quantized"),
    ("compressed", ("kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme"),
    ("compressed", ("transform_config", {"config_groups": {"a": 1}}), "transform_config"),
    ("compressed", ("sparsity_config", {"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
    ("compressed", ("config_groups", {}), "no layers are described"),
    ("compressed", ("config_groups", []), "it must be an object"),
    ("compressed", (*GROUP, "targets", None), "it must be a list of names"),
    ("compressed", (*GROUP, "targets", ["re:("]), "is no pattern"),
    ("compressed", (*GROUP, "targets", ["lm_head.x"]), "not clear which of the groups"),
    ("compressed", (*GROUP, "input_activations", {"num_bits": 8}), "quantized activations"),
    ("compressed", (*GROUP, "weights", "num_bits", 8), "codes of 8 bits"),
    ("compressed", (*GROUP, "weights", "type", "float"), "type is float"),
    ("compressed", (*GROUP, "weights", "strategy", "block"), "strategy is block"),
    ("compressed", (*GROUP, "weights", "group_size", 64), "are no groups of 64"),
    ("compressed", (*GROUP, "weights", "dynamic", True), "its scales are not stored"),
    ("compressed", (*GROUP, "weights", "actorder", "group"), "weight_g_idx is missing"),
    ("compressed", (*GROUP, "weights", "zz", 1), "zz is 1: fewbit does not know this key"),
]


@pytest.mark.parametrize(("kind", "keys", "said"), DESCRIPTIONS)
def test_descriptions_that_are_not_understood(
    models: dict[str, Path], tmp_path: Path, kind: str, keys: tuple[Any, ...], said: str
) -> None:
    assert said in refused(changed(models, kind, tmp_path, *keys), tmp_path)


def number(*values: int) -> torch.Tensor:
    return torch.tensor(values)


TENSORS: list[tuple[str, str, Any, str]] = [
    ("gptq", "qweight", None, "belongs to no layer"),
    ("gptq", "scales", None, "scales is missing"),
    ("gptq", "qzeros", None, "qzeros is missing"),
    ("gptq", "scales", lambda old: old[:, :-1], "do not fit each other"),
    ("gptq", "scales", lambda old: old[:-1], "do not fit each other"),
    ("gptq", "scales", lambda old: old.to(torch.int32), "scales is int32"),
    ("gptq", "scales", lambda old: old * float("nan"), "values of the grid are not finite"),
    ("gptq", "qzeros", lambda old: old[:, :-1], "qzeros"),
    ("gptq", "qweight", lambda old: old.to(torch.int64), "qweight is int64"),
    ("gptq", "qweight", lambda old: old[:-1], "120 columns are no groups of 32"),
    ("gptq", "g_idx", lambda old: old[:-1], "g_idx has 127 numbers"),
    ("gptq", "g_idx", lambda old: old + 1, "are not 128 numbers below 4"),
    ("gptq", "g_idx", lambda old: old - 1, "are not 128 numbers below 4"),
    ("gptq", "g_idx", lambda old: old * 0, "not every group has 32 columns"),
    ("gptq", "weight", lambda old: torch.zeros(64, 128), "is stored twice"),
    ("awq", "qzeros", None, "qzeros is missing"),
    ("awq", "scales", lambda old: old[:-1], "do not fit each other"),
    ("awq", "qweight", lambda old: old[:, :-1], "do not fit each other"),
    ("compressed", "weight_shape", None, "weight_shape is missing"),
    ("compressed", "weight_shape", lambda old: number(64, 2**40), "does not hold"),
    ("compressed", "weight_shape", lambda old: number(64, -128), "weight_shape is 64 x -128"),
    ("compressed", "weight_shape", lambda old: number(64, 128, 1), "weight_shape has 3 numbers"),
    ("compressed", "weight_shape", lambda old: number(128, 64), "does not hold"),
    ("compressed", "weight_scale", lambda old: old[:, :-1], "does not fit 64 x 128 codes"),
    ("compressed", "weight_scale", lambda old: old[:-1], "does not fit 64 x 128 codes"),
    ("compressed", "weight_zero_point", None, "weight_zero_point is missing"),
    ("compressed", "weight_zero_point", lambda old: old[:-1], "weight_zero_point"),
    ("compressed", "weight_packed", None, "belongs to no layer"),
]


@pytest.mark.parametrize(("kind", "part", "change", "said"), TENSORS)
def test_codes_and_scales_that_do_not_fit(
    models: dict[str, Path], tmp_path: Path, kind: str, part: str, change: Any, said: str
) -> None:
    model = copy_folder(models[kind], tmp_path / "m")
    tensors, name = load_file(model / "model.safetensors"), f"{LAYER}.{part}"
    old = tensors.pop(name, None)
    if change is not None:
        tensors[name] = change(old).contiguous()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert said in refused(model, tmp_path)


@pytest.mark.parametrize("kind", WRITERS)
def test_truncated_folders(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    model = copy_folder(models[kind], tmp_path / "m")
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "not a complete safetensors file" in refused(model, tmp_path)


@pytest.mark.parametrize("kind", WRITERS)
def test_quantize_of_what_cannot_be_read_names_the_command(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    model = changed(models, kind, tmp_path, "new_key", "strange")
    line = run_cli("quantize", model, tmp_path / "out", code=2).stderr
    assert "already quantized" in line and "fewbit import" in line and line.count("\n") == 1
    assert "new_key is strange: fewbit does not know this key" in refused(model, tmp_path)
