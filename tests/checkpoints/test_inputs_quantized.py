"""Checkpoints of other tools are named with the tool and refused; dtypes that the format has are known."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, copy_folder, run_cli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import fewbit
from fewbit.checkpoints.safetensors_io import FileReader, ShardWriter, read_header
from fewbit.checkpoints.source import open_checkpoint, refuse_quantized
from fewbit.errors import FewbitError

LAYER = "model.layers.0.mlp.up_proj"
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, "AWQ"),
    "bitsandbytes": ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
    "mxfp4": ({"quantization_config": {"quant_method": "mxfp4"}}, "MXFP4"),
    "hqq": ({"quantization_config": {"quant_method": "hqq"}}, "HQQ"),
    "quanto": ({"quantization_config": {"quant_method": "quanto"}}, "optimum-quanto"),
    "torchao": ({"quantization_config": {"quant_method": "torchao"}}, "torchao"),
    "aqlm": ({"quantization_config": {"quant_method": "aqlm"}}, "AQLM"),
    "exl3": ({"quantization_config": {"quant_method": "exl3"}}, "ExLlamaV3"),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
    "new": ({"quantization_config": {"quant_method": "some-new-tool"}}, "some-new-tool"),
    "nameless": ({"quantization_config": {"weights": "small"}}, "an unknown tool"),
    "nvfp4": ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "NVIDIA ModelOpt"),
    "compressed": ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    "older": ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    "part": ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "GPTQ"),
}
SIGNS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "gptq": ({f"{LAYER}.qweight": torch.zeros(8, 128, dtype=torch.int32)}, "GPTQ or AWQ"),
    "packed": ({f"{LAYER}.weight_packed": torch.zeros(128, 8, dtype=torch.int32)}, "compressed-tensors"),
    "bitsandbytes": ({f"{LAYER}.weight.absmax": torch.zeros(8)}, "bitsandbytes"),
    "mxfp4": (
        {
            "model.layers.0.mlp.experts.up_proj_blocks": torch.zeros(2, 4, 2, 16, dtype=torch.uint8),
            "model.layers.0.mlp.experts.up_proj_scales": torch.zeros(2, 4, 2, dtype=torch.uint8),
        },
        "MXFP4",
    ),
    "exl2": ({f"{LAYER}.q_weight": torch.zeros(8, 128, dtype=torch.int32)}, "ExLlamaV2"),
    "quanto": ({f"{LAYER}.weight._data": torch.zeros(4), f"{LAYER}.weight._scale": torch.zeros(4)}, "optimum-quanto"),
    "hqq": ({f"{LAYER}.W_q": torch.zeros(8, 8, dtype=torch.uint8)}, "HQQ"),
    "ours": ({f"{LAYER}.codes": torch.zeros(8).byte(), f"{LAYER}.scales": torch.zeros(4).half()}, "fewbit"),
    "mlx": ({f"{LAYER}.weight": torch.zeros(8, 8), f"{LAYER}.biases": torch.zeros(8, 1)}, "MLX"),
    "int8": ({f"{LAYER}.weight": torch.zeros(128, 64, dtype=torch.int8)}, "int8 codes without known scales"),
    "words": ({f"{LAYER}.weight": torch.zeros(128, 64, dtype=torch.uint32)}, "uint32 codes without known scales"),
}


KEYS = ["quantization_config", "compression_config", "quantization", "text_config", "config_groups", "weights", "dtype"]
KEYS += [
    "quant_method",
    "quant_algo",
    "quantized_layers",
    "weight_block_size",
    "sparsity_config",
    "transformers_weights",
]
KEYS += ["load_in_4bit", "num_bits", "type", "strategy", "group_size", "block_structure"]


@pytest.fixture(scope="module")
def any_config(single: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one layer in FP8, whose config changes."""
    model = copy_folder(single, tmp_path_factory.mktemp("any") / "m")
    tensors = load_file(model / "model.safetensors")
    name = f"{LAYER}.weight"
    tensors |= {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(1)}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("single") / "model", shard_size="1GB")


def refused(model: Path, tool: str, tmp_path: Path) -> None:
    for command in (("quantize", model, tmp_path / "out"), ("plan", model), ("inspect", model)):
        line = run_cli(*command, code=2).stderr
        assert f"{model}: already quantized ({tool}" in line and "give the 16-bit original" in line, line
        assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_tools_that_a_config_names(single: Path, tmp_path: Path, name: str) -> None:
    model = copy_folder(single, tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **CONFIGS[name][0]}))
    refused(model, CONFIGS[name][1], tmp_path)


@pytest.mark.parametrize("name", ["mlx", "new", "nvfp4", "part", "exl3"])
def test_what_transformers_would_load_as_plain_weights(single: Path, tmp_path: Path, name: str) -> None:
    model = copy_folder(single, tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **CONFIGS[name][0]}))
    with pytest.raises(FewbitError, match="already quantized"):
        fewbit.load(model, device="cpu")


@pytest.mark.parametrize("name", SIGNS)
def test_tools_that_only_tensors_show(single: Path, tmp_path: Path, name: str) -> None:
    model = copy_folder(single, tmp_path / "m")
    tensors, tool = SIGNS[name]
    before = load_file(model / "model.safetensors")
    save_file({**before, **tensors}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(FewbitError, match="already quantized"):
        fewbit.load(model, device="cpu")
    refused(model, "an unknown tool" if "codes" in tool else tool, tmp_path)


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json", "quanto_qmap.json"])
def test_files_of_older_releases_say_whose_the_tensors_are(single: Path, tmp_path: Path, file: str) -> None:
    model = copy_folder(single, tmp_path / "m")
    (model / file).write_text("{}")
    # By itself it is a leftover.
    assert open_checkpoint(model).foreign is None
    tensors = {**load_file(model / "model.safetensors"), **SIGNS["gptq"][0]}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    foreign = open_checkpoint(model).foreign
    assert foreign is not None and foreign.tool in ("GPTQ", "AWQ", "optimum-quanto")


def raw(folder: Path, tensors: dict[str, tuple[str, list[int], int]]) -> Path:
    """A safetensors file of zeros with any dtypes: name -> (dtype, shape, bytes)."""
    header, at = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(exist_ok=True)
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(range(1, 129)) * (at // 128) + bytes(at % 128))
    return path


DTYPES = {
    **{"F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E4M3": 1, "F8_E5M2": 1},
    **{"U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8, "C64": 8, "F64": 8, "BOOL": 1},
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_read_and_copied(tmp_path: Path, dtype: str) -> None:
    size = 6 * DTYPES[dtype]
    path = raw(tmp_path / "m", {"x": (dtype, [2, 3], size), "y": ("BF16", [64], 128)})
    entries, _ = read_header(path)
    assert entries["x"].shape == (2, 3) and entries["x"].bytes == size
    with FileReader() as reader:
        writer = ShardWriter(tmp_path / "out.safetensors", 1000)
        writer.copy(entries["x"], reader)
        writer.close()
        copied, _ = read_header(tmp_path / "out.safetensors")
        assert copied["x"].dtype == entries["x"].dtype
        wanted = reader.tensor(entries["x"]).view(-1).view(torch.uint8)
        assert torch.equal(reader.tensor(copied["x"]).view(-1).view(torch.uint8), wanted)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no 4-bit floats")
def test_two_numbers_in_a_byte(tmp_path: Path) -> None:
    entries, _ = read_header(raw(tmp_path / "m", {"x": ("F4", [2, 16], 16)}))
    assert entries["x"].shape == (2, 8) and entries["x"].bytes == 16
    with FileReader() as reader:
        writer = ShardWriter(tmp_path / "out.safetensors", 1000)
        writer.copy(entries["x"], reader)
        writer.close()
    assert b'"F4","shape":[2,16]' in (tmp_path / "out.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2", "Q9"])
def test_a_dtype_that_torch_lacks_is_named(tmp_path: Path, dtype: str) -> None:
    path = raw(tmp_path / "m", {"counts": (dtype, [4], 3)})
    with pytest.raises(FewbitError, match=f"tensor counts has the dtype {dtype}, which this PyTorch does not support"):
        read_header(path)


def test_a_counter_is_copied(single: Path, tmp_path: Path) -> None:
    model = copy_folder(single, tmp_path / "m")
    counter = torch.tensor([7, 8], dtype=torch.uint64)
    save_file({**load_file(model / "model.safetensors"), "model.seen": counter}, model / "model.safetensors")
    fewbit.quantize(model, tmp_path / "q", fewbit.preset("rtn"))
    assert torch.equal(load_file(tmp_path / "q/model.safetensors")["model.seen"], counter)


WORDS = ["fp8", "modelopt", "FP8", "float", "128x128", "compressed-tensors", "bfloat16", "x"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 200) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4), JSON)
def test_any_config_is_read_or_refused(any_config: Path, config: dict[str, Any], beside: Any) -> None:
    (any_config / "config.json").write_text(json.dumps(config))
    (any_config / "hf_quant_config.json").write_text(json.dumps({"quantization": beside}))
    try:
        checkpoint = open_checkpoint(any_config)
        refuse_quantized(checkpoint)
        assert not checkpoint.quantization
    except FewbitError:
        pass
