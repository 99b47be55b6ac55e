"""GPTQ, AWQ and MLX: weights as fewbit unpacks them, what the config says, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_cli
from integer_models import build, numbers, read_awq, read_gptq, read_mlx, tensors_of

import fewbit
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import open_checkpoint
from fewbit.errors import FewbitError
from fewbit.exports.words import to_words
from fewbit.formats.config import weights_of
from fewbit.grids.scale_formats import SCALE_FORMATS
from fewbit.runtime.unpack import read_weight


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("integers") / "model")


def make(model: Path, out: Path, grid: str, bits: int, group: int | str, **others: Any) -> Path:
    """A native folder with float16 scales."""
    plain = {"method": "rtn", "scale_format": "float16", "embedding_bits": 16}
    fewbit.quantize(model, out, **{**plain, **others}, grid=grid, bits=bits, group_size=str(group))
    return out


def decoded(folder: Path) -> dict[str, Any]:
    """Module -> the weight float32 that fewbit decodes."""
    checkpoint = open_checkpoint(folder)
    with FileReader() as reader:
        return {
            module: read_weight(checkpoint, reader, module, stored).numpy()
            for module, stored in weights_of(checkpoint).items()
        }


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_words(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 96), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = to_words(codes, bits)
    assert (words.dtype, tuple(words.shape)) == (torch.int32, (3, 3 * bits))
    for row in range(3):
        whole = sum(int(code) << (index * bits) for index, code in enumerate(codes[row]))
        assert sum((int(word) & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words[row])) == whole
    with pytest.raises(ValueError, match="do not fill words"):
        to_words(codes[:, :31], bits)


# In small groups all weights can be of one sign, so that 0 is the zero-point: see below.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "group"), [*(("symmetric", size) for size in (16, 32, 64, 128)), ("zero-point", 64), ("zero-point", 128)]
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits: int, grid: str, group: int, model: Path, tmp_path: Path) -> None:
    folder = make(model, tmp_path / "native", grid, bits, group)
    report = fewbit.export(folder, tmp_path / "out", "gptq")
    tensors, weights = tensors_of(tmp_path / "out"), decoded(folder)
    for module, weight in weights.items():
        assert np.array_equal(read_gptq(tensors, module, bits), weight), module
        assert f"{module}.weight" not in tensors
        assert tensors[f"{module}.scales"].dtype == torch.float16
    described = config_of(tmp_path / "out")["quantization_config"]
    assert [described[key] for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format")] == [
        *(bits, group, grid == "symmetric", False, "gptq")
    ]
    assert "dynamic" not in described
    assert report["tensors"] == {f"gptq {bits} bits": 14, "float16": 6}
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    same_as_before(model, tensors)


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["symmetric", "zero-point"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_awq(group: int, grid: str, model: Path, tmp_path: Path) -> None:
    folder = make(model, tmp_path / "native", grid, 4, group)
    fewbit.export(folder, tmp_path / "out", "awq")
    tensors = tensors_of(tmp_path / "out")
    for module, weight in decoded(folder).items():
        assert np.array_equal(read_awq(tensors, module, group), weight), module
    assert config_of(tmp_path / "out")["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    same_as_before(model, tensors)


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["symmetric", "minimum"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_mlx(group: int, bits: int, grid: str, model: Path, tmp_path: Path) -> None:
    folder = make(model, tmp_path / "native", grid, bits, group)
    fewbit.export(folder, tmp_path / "out", "mlx")
    tensors = tensors_of(tmp_path / "out")
    for module, weight in decoded(folder).items():
        assert np.array_equal(read_mlx(tensors, module, bits), weight), module
        kinds = [tensors[f"{module}.{end}"].dtype for end in ("weight", "scales", "biases")]
        assert kinds == [torch.uint32, torch.float16, torch.float16]
    config = config_of(tmp_path / "out")
    plain = {"group_size": group, "bits": bits, "mode": "affine", "model.embed_tokens": False}
    assert config["quantization"] == config["quantization_config"] == plain
    assert config["rope_theta"] == 10000.0
    same_as_before(model, tensors)


def same_as_before(model: Path, tensors: dict[str, Any]) -> None:
    """What is not packed is as in the original."""
    for name, tensor in tensors_of(model).items():
        if name in tensors and not name.endswith("proj.weight"):
            assert torch.equal(tensors[name], tensor), name
    assert "model.embed_tokens.weight" in tensors


def test_kept_layers_are_named_as_each_format_does(model: Path, tmp_path: Path) -> None:
    kept = "model.layers.1.mlp.up_proj"
    folder = make(model, tmp_path / "native", "symmetric", 4, 64, exclude=[f"{kept}.weight"])
    found = {}
    for name in ("gptq", "awq", "mlx"):
        fewbit.export(folder, tmp_path / name, name)
        found[name] = config_of(tmp_path / name)["quantization_config"]
        assert f"{kept}.weight" in tensors_of(tmp_path / name)
    assert found["gptq"]["dynamic"] == {r"-:model\.layers\.1\.mlp\.up_proj$": {}}
    (packed,) = found["gptq"]["modules_in_block_to_quantize"]
    assert len(packed) == 13
    assert kept not in packed
    assert found["awq"]["modules_to_not_convert"] == [kept, "lm_head"]
    assert found["mlx"][kept] is False


def test_mlx_has_sizes_for_each_weight(model: Path, tmp_path: Path) -> None:
    folder = make(model, tmp_path / "native", "minimum", 4, 64, set={"*.down_proj.weight": {"bits": 6}})
    fewbit.export(folder, tmp_path / "out", "mlx")
    described, tensors = config_of(tmp_path / "out")["quantization"], tensors_of(tmp_path / "out")
    assert (described["bits"], described["group_size"]) == (4, 64)
    down = "model.layers.0.mlp.down_proj"
    assert described[down] == {"group_size": 64, "bits": 6, "mode": "affine"}
    assert np.array_equal(read_mlx(tensors, down, 6), decoded(folder)[down])
    for name in ("gptq", "awq"):
        with pytest.raises(FewbitError, match=r"(down|up|gate|_)proj: .*(6 bits|grid)"):
            fewbit.export(folder, tmp_path / name, name)


def test_rotary_embeddings_as_mlx_reads_them(tmp_path: Path) -> None:
    from fewbit.exports.mlx import _rotary

    scaled = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    named = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    assert _rotary({"rope_parameters": scaled}) == named
    both = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    assert _rotary({"rope_parameters": both}) == {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    assert _rotary({"rope_theta": 1e4}) == {}


@pytest.mark.parametrize("name", ["gptq", "awq", "mlx"])
def test_packed_embeddings_are_written_decoded(name: str, model: Path, tmp_path: Path) -> None:
    folder = make(model, tmp_path / "native", "symmetric", 4, 64, embedding_bits=8)
    done = run_cli("export", folder, tmp_path / "out", "--format", name)
    assert "model.embed_tokens: its 8 bits are written decoded, in 16 bits" in done.stdout
    wanted = decoded(folder)["model.embed_tokens"].astype(np.float16)
    assert np.array_equal(tensors_of(tmp_path / "out")["model.embed_tokens.weight"].numpy(), wanted)


def test_groups_of_zeros(tmp_path: Path) -> None:
    """A group of zeros has a scale of 0, and a zero-point of 0 that GPTQ could not store."""
    from safetensors.torch import load_file, save_file

    folder = build(tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.weight"][3, :64] = 0
    save_file(tensors, file, {"format": "pt"})
    native = make(folder, tmp_path / "native", "zero-point", 4, 64)
    fewbit.export(native, tmp_path / "out", "gptq")
    weight = read_gptq(tensors_of(tmp_path / "out"), name, 4)
    assert np.array_equal(weight, decoded(native)[name])
    assert not weight[3, :64].any()
    tensors[f"{name}.weight"][3, :64] = 1
    save_file(tensors, file, {"format": "pt"})
    native = make(folder, tmp_path / "positive", "zero-point", 4, 64)
    done = run_cli("export", native, tmp_path / "no", "--format", "gptq", code=2)
    assert f"{name}: it has zero-points of 0" in done.stderr
    assert "--for gptq --bits 4" in done.stderr
    assert not list(tmp_path.glob(".no*"))
    assert not (tmp_path / "no").exists()
    fewbit.export(native, tmp_path / "awq", "awq")
    assert np.array_equal(read_awq(tensors_of(tmp_path / "awq"), name, 64), decoded(native)[name])


@pytest.mark.parametrize(
    ("name", "grid", "bits", "group", "others", "says"),
    [
        ("gptq", "minimum", 4, 64, {}, "does not hold the minimum grid: .*--for gptq --bits 4"),
        ("gptq", "symmetric", 5, 64, {}, "does not hold 5 bits: .*--for gptq --bits 4"),
        ("gptq", "symmetric", 4, 8, {}, "does not hold groups of 8: "),
        ("awq", "zero-point", 3, 64, {}, "does not hold 3 bits: .*--for awq --bits 4"),
        ("awq", "zero-point", 4, 16, {}, "does not hold groups of 16"),
        ("mlx", "symmetric", 7, 64, {}, "does not hold 7 bits: .*--for mlx --bits 6"),
        ("mlx", "symmetric", 4, 16, {}, "does not hold groups of 16"),
        ("mlx", "symmetric", 4, 64, {"scale_format": "float32"}, "does not hold float32 scales"),
        ("gptq", "normal-float", 4, 64, {"method": "adpq+"}, "the outliers and the normal-float grid"),
        (
            "gptq",
            "symmetric",
            4,
            64,
            {"set": {"*.down_proj.weight": {"bits": 8}}},
            "has 8 bits in groups of 64, most others 4 bits in groups of 64: ",
        ),
        (
            "awq",
            "symmetric",
            4,
            64,
            {"set": {"*.down_proj.weight": {"group_size": 32}}},
            "has 4 bits in groups of 32, most",
        ),
    ],
)
def test_what_a_format_does_not_hold(
    name: str, grid: str, bits: int, group: int, others: dict[str, Any], says: str, model: Path, tmp_path: Path
) -> None:
    folder = make(model, tmp_path / "native", grid, bits, group, **others)
    with pytest.raises(FewbitError, match=rf"model\.layers\.\d\.\w+\.\w+: .*{says}"):
        fewbit.export(folder, tmp_path / "out", name)
    assert [path.name for path in tmp_path.iterdir()] == ["native"]


def test_other_bad_input(model: Path, tmp_path: Path) -> None:
    folder = make(model, tmp_path / "native", "symmetric", 4, 64)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for name in ("gptq", "awq", "mlx"):
        assert "already exists" in run_cli("export", folder, tmp_path / "out", "--format", name, code=2).stderr
        done = run_cli("export", folder, tmp_path / "b", "--format", name, "--embeddings", "q8_0", code=2)
        assert "--embeddings q8_0" in done.stderr
        done = run_cli("export", model, tmp_path / "b", "--format", name, code=2)
        assert f"not quantized by fewbit: quantize the original with  --for {name}" in done.stderr
    assert not (tmp_path / "b").exists()


def test_rows_that_do_not_fill_words(tmp_path: Path) -> None:
    folder = build(tmp_path / "model", num_attention_heads=8, num_key_value_heads=1, num_hidden_layers=1)
    native = make(folder, tmp_path / "native", "symmetric", 3, 32)
    done = run_cli("export", native, tmp_path / "out", "--format", "gptq", code=2)
    assert "k_proj: 16 rows of 3 bits do not fill words of 32 bits" in done.stderr
    assert "--exclude model.layers.0.self_attn.k_proj.weight" in done.stderr
    fewbit.export(native, tmp_path / "out", "mlx")
    done = run_cli("quantize", folder, tmp_path / "direct", "--for", "gptq", "--bits", 3)
    assert "2 of 7 layers: 16 rows of 3 bits do not fill words of 32 bits: kept in 16 bits" in done.stderr


def test_the_folder_is_loaded_in_the_dtype_that_has_its_scales(tmp_path: Path) -> None:
    folder = build(tmp_path / "model", "bfloat16", num_hidden_layers=1)
    native = make(folder, tmp_path / "native", "symmetric", 4, 64)
    for name in ("gptq", "awq"):
        done = run_cli("export", native, tmp_path / name, "--format", name)
        assert "to be loaded in float16" in done.stdout
        assert config_of(tmp_path / name)["dtype"] == "float16"
        assert tensors_of(tmp_path / name)["model.norm.weight"].dtype == torch.bfloat16
    done = run_cli("export", native, tmp_path / "mlx", "--format", "mlx", code=2)
    assert "it has scales that bfloat16 does not have exactly" in done.stderr
    assert not (tmp_path / "mlx").exists()


@pytest.mark.skipif("bfloat16" not in SCALE_FORMATS, reason="needs scales in bfloat16")
@pytest.mark.parametrize("name", ["gptq", "awq", "mlx"])
def test_scales_in_bfloat16(name: str, tmp_path: Path) -> None:
    folder = build(tmp_path / "model", "bfloat16", num_hidden_layers=1)
    grid = "minimum" if name == "mlx" else "symmetric"
    native = make(folder, tmp_path / "native", grid, 4, 64, scale_format="bfloat16")
    fewbit.export(native, tmp_path / "out", name)
    tensors = tensors_of(tmp_path / "out")
    read = {"gptq": lambda m: read_gptq(tensors, m, 4), "awq": lambda m: read_awq(tensors, m, 64)}
    for module, weight in decoded(native).items():
        assert np.array_equal(read.get(name, lambda m: read_mlx(tensors, m, 4))(module), weight)
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"
    assert numbers(tensors["model.layers.0.mlp.up_proj.scales"]).any()
