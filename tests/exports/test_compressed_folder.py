"""Folders in the format compressed-tensors, read by the package's own decoder and loaded by transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, copy_folder, run_cli
from safetensors.torch import load_file, save_file

import fewbit
from fewbit.exports.compressed_weights import pack_words
from fewbit.recipe import preset
from fewbit.runtime.unpack import unpack

compressed_tensors = pytest.importorskip("compressed_tensors")

SAME_WORDS = (1, 2, 4, 8)
"""Bits that every release packs in the same way."""
PADDED = tuple(int(part) for part in compressed_tensors.__version__.split(".")[:2]) < (0, 18)
"""Whether the installed package packs other bits as we do."""
packed_as_ours = pytest.mark.skipif(not PADDED, reason="needs compressed-tensors before 0.18")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose columns 128 divides, and whose rows no word of zero-points divides."""
    folder = tmp_path_factory.mktemp("compressed") / "model"
    return build_tiny(folder, hidden_size=128, intermediate_size=384, num_hidden_layers=1, num_key_value_heads=1)


def plain(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    """The weights as `fewbit unpack` gives them."""
    unpack(folder, out)
    found: dict[str, torch.Tensor] = {}
    for file in out.glob("*.safetensors"):
        found |= load_file(file)
    return found


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """The weights as the package decodes the files, module by module."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    checked = QuantizationConfig.model_validate(config)
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    found = {}
    modules = {name.rpartition(".")[0] for name in tensors if name.endswith(".weight_scale")}
    for module in modules:
        groups = list(checked.config_groups.values())
        group = next((one for one in groups if module in one.targets), groups[0])
        assert module in group.targets or group.targets == ["Linear"]
        assert module not in checked.ignore
        state = {name.rpartition(".")[2]: tensors[name] for name in tensors if name.rpartition(".")[0] == module}
        compressor = BaseCompressor.get_value_from_registry(group.format)
        found[f"{module}.weight"] = compressor.decompress(state, group)["weight"]
    rest = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in modules}
    return found | rest


def loaded(folder: Path, dequantize: bool = False) -> dict[str, torch.Tensor]:
    """The weights of the model that transformers makes of a folder."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    more = {"quantization_config": CompressedTensorsConfig(**{**config, "dequantize": True})} if dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **more)
    if not dequantize:
        # The package decodes all weights at the first tokens.
        with torch.no_grad():
            assert torch.isfinite(model(torch.arange(8).unsqueeze(0) + 3).logits).all()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["signed", "symmetric", "zero-point"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", ["32", "128", "row"])
def test_the_package_decodes_the_same_weights(grid: str, bits: int, group: str, model: Path, tmp_path: Path) -> None:
    if bits not in SAME_WORDS and not PADDED:
        pytest.skip("packs 3 bits in another way")
    recipe = preset("rtn", grid=grid, bits=bits, group_size=group, scale_format="bfloat16")
    fewbit.quantize(model, tmp_path / "q", recipe)
    report = fewbit.export(tmp_path / "q", tmp_path / "out", "compressed-tensors")
    assert report["file"] == "model.safetensors"
    assert report["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    same(decoded(tmp_path / "out"), plain(tmp_path / "q", tmp_path / "plain"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "bits", "group"),
    [
        ("signed", 4, "128"),
        ("signed", 8, "row"),
        ("symmetric", 2, "32"),
        pytest.param("signed", 3, "64", marks=packed_as_ours),
        pytest.param("zero-point", 4, "64", marks=packed_as_ours),
        pytest.param("zero-point", 3, "row", marks=packed_as_ours),
        pytest.param("zero-point", 2, "32", marks=packed_as_ours),
        ("fp8", 8, "row"),
        ("mxfp4", 4, "32"),
        ("nvfp4", 4, "16"),
    ],
)
def test_transformers_loads_the_same_weights(grid: str, bits: int, group: str, model: Path, tmp_path: Path) -> None:
    own = {} if grid in ("fp8", "mxfp4", "nvfp4") else {"group_size": group, "scale_format": "bfloat16", "bits": bits}
    fewbit.quantize(model, tmp_path / "q", preset("rtn", grid=grid, **own))
    fewbit.export(tmp_path / "q", tmp_path / "out", "compressed-tensors")
    wanted = plain(tmp_path / "q", tmp_path / "plain")
    same(decoded(tmp_path / "out"), wanted)
    same(loaded(tmp_path / "out"), wanted)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_models_of_other_dtypes(dtype: str, tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "model", dtype=dtype, num_hidden_layers=1)
    run_cli("quantize", folder, tmp_path / "q", "--bits", 4, "--grid", "signed", "--scale-format", dtype, *NO_OUTLIERS)
    run_cli("export", tmp_path / "q", tmp_path / "out", "--format", "compressed-tensors")
    wanted = plain(tmp_path / "q", tmp_path / "plain")
    same(decoded(tmp_path / "out"), wanted)
    same(loaded(tmp_path / "out"), wanted)


NO_OUTLIERS = ("--outlier-fraction", 0)


@packed_as_ours
def test_mixed_widths_kept_tensors_and_packed_embeddings(model: Path, tmp_path: Path) -> None:
    choices: dict[str, Any] = {"grid": "signed", "scale_format": "bfloat16", "group_size": "128", "bits": 4}
    choices["sets"] = {"*.down_proj": {"bits": 3}, "*.o_proj": {"grid": "mxfp4"}}
    choices["exclude"] = ("*.k_proj.weight",)
    fewbit.quantize(model, tmp_path / "q", preset("rtn", **choices))
    done = run_cli("export", tmp_path / "q", tmp_path / "out", "--format", "compressed-tensors")
    assert "model.embed_tokens: its 8 bits are written decoded" in done.stdout
    assert "3 bits are packed as compressed-tensors up to 0.17 reads them" in done.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == ["lm_head", "model.embed_tokens", "model.layers.0.self_attn.k_proj"]
    targets = {one["weights"]["num_bits"]: one["targets"] for one in config["config_groups"].values()}
    assert targets[3] == ["model.layers.0.mlp.down_proj"]
    assert len(config["config_groups"]) == 3
    wanted = plain(tmp_path / "q", tmp_path / "plain")
    same(decoded(tmp_path / "out"), wanted)
    same(loaded(tmp_path / "out"), wanted)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "fewbit_report.json"} <= names


def test_the_config_is_what_the_package_writes(model: Path, tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    for grid in ("signed", "zero-point", "fp8", "mxfp4", "nvfp4"):
        own = {"scale_format": "bfloat16", "bits": 4} if grid in ("signed", "zero-point") else {}
        fewbit.quantize(model, tmp_path / f"q-{grid}", preset("rtn", grid=grid, **own))
        fewbit.export(tmp_path / f"q-{grid}", tmp_path / grid, "compressed-tensors")
        config = json.loads((tmp_path / grid / "config.json").read_text())["quantization_config"]
        known = json.loads(QuantizationConfig.model_validate(config).model_dump_json())
        for key in ("sparsity_config", "transform_config", "version"):
            del config[key]
        if grid in ("fp8", "mxfp4", "nvfp4"):
            # It says which zero-points there would be.
            for group in known["config_groups"].values():
                group["weights"]["zp_dtype"] = None
        assert config == known


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 7, 32, 45])
def test_words_of_codes(bits: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (3, columns), dtype=torch.uint8)
    words = pack_words(codes, bits)
    per = 32 // bits
    assert words.dtype == torch.int32
    assert words.shape == (3, -(-columns // per))
    for column in range(columns):
        word = words[:, column // per].to(torch.int64)
        assert torch.equal((word >> (bits * (column % per))) & (2**bits - 1), codes[:, column].to(torch.int64))


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ((), "holds no 4 bits on the normal-float grid with outliers and two-level scales"),
        (("--method", "adpq"), "on the minimum grid with outliers and float16 scales"),
        (("--method", "rtn", "--symmetric", "--scale-format", "two-level"), "symmetric grid and two-level scales"),
        (("--method", "rtn"), "scales (they would change by up to 0."),
    ],
)
def test_what_the_format_cannot_hold(choices: tuple[str, ...], says: str, tiny: Path, tmp_path: Path) -> None:
    run_cli("quantize", tiny, tmp_path / "q", *choices)
    done = run_cli("export", tmp_path / "q", tmp_path / "out", "--format", "compressed-tensors", code=2)
    assert says in done.stderr
    assert "model.layers.0." in done.stderr
    assert "--for transformers --bits 4" in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]


def test_other_bad_input(tiny: Path, tmp_path: Path) -> None:
    export = ("--format", "compressed-tensors")
    done = run_cli("export", tiny, tmp_path / "out", *export, code=2)
    assert "is not quantized by fewbit: quantize the original with  --for transformers" in done.stderr
    run_cli("quantize", tiny, tmp_path / "q", "--grid", "mxfp4", "--method", "rtn")
    done = run_cli("export", tmp_path / "q", tmp_path / "out", *export, "--embeddings", "q8_0", code=2)
    assert "--embeddings is for --format gguf" in done.stderr
    run_cli("export", tmp_path / "q", tmp_path / "out", *export)
    assert "already exists" in run_cli("export", tmp_path / "q", tmp_path / "out", *export, code=2).stderr
    run_cli("export", tmp_path / "q", tmp_path / "out", *export, "--overwrite")
    done = run_cli("quantize", tmp_path / "out", tmp_path / "again", code=2)
    assert "already quantized (compressed-tensors" in done.stderr


def test_damaged_content_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    run_cli("quantize", tiny, tmp_path / "q", "--grid", "nvfp4", "--method", "rtn")
    folder = copy_folder(tmp_path / "q", tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.scales"][2, 1] = 0x7F
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = run_cli("export", folder, tmp_path / "out", "--format", "compressed-tensors", code=2)
    assert "model.layers.1.mlp.up_proj: values of the grid are not finite" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "q"]
