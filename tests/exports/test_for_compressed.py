"""`--for transformers` and `--for vllm`: recipes that the runtimes load, and what they do not run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, run_cli
from safetensors.torch import load_file

import fewbit
from fewbit.errors import FewbitError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with 192 columns, which only 64 divides, and 256 in down_proj."""
    folder = tmp_path_factory.mktemp("for") / "model"
    return build_tiny(folder, hidden_size=192, intermediate_size=256, num_hidden_layers=1)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def weights_of(folder: Path) -> list[dict[str, Any]]:
    return [group["weights"] for group in config_of(folder)["config_groups"].values()]


@pytest.mark.parametrize(
    ("target", "bits"), [("transformers", 2), ("transformers", 3), ("transformers", 8), ("vllm", 4), ("vllm", 8)]
)
def test_a_folder_of_the_target(target: str, bits: int, model: Path, tmp_path: Path) -> None:
    done = run_cli("quantize", model, tmp_path / "out", "--for", target, "--bits", bits, "--json")
    data = json.loads(done.stdout)
    assert data["models"][0]["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert data["report"]["export"]["for"] == target
    recipe = data["report"]["recipe"]
    assert (recipe["method"], recipe["scale_format"], recipe["outliers"]) == ("adpq+", "bfloat16", "none")
    assert recipe["embedding_bits"] == 16
    assert recipe["search"] is not None
    assert {one["num_bits"] for one in weights_of(tmp_path / "out")} == {bits}
    assert sorted(one["group_size"] for one in weights_of(tmp_path / "out")) == [64, 128]
    assert all(one["symmetric"] for one in weights_of(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].dtype == torch.bfloat16
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_with_data_the_best_method(model: Path, tmp_path: Path) -> None:
    data = ("--calibration", "random-tokens", "--samples", 4, "--sequence-length", 32, "--max-fallback", 99)
    run_cli("quantize", model, tmp_path / "out", "--for", "vllm", *data)
    report = json.loads((tmp_path / "out" / "fewbit_report.json").read_text())
    assert report["quantize"]["method"] == "precal+oac"
    assert (report["recipe"]["grid"], report["recipe"]["outliers"]) == ("signed", "none")


@pytest.mark.parametrize("grid", ["fp8", "mxfp4", "nvfp4"])
def test_grids_by_name(grid: str, model: Path, tmp_path: Path) -> None:
    run_cli("quantize", model, tmp_path / "out", "--for", "vllm", "--grid", grid)
    found = {"fp8": "naive-quantized"}.get(grid, f"{grid}-pack-quantized")
    assert config_of(tmp_path / "out")["format"] == found


def test_own_choices(model: Path, tmp_path: Path) -> None:
    own = ("--asymmetric", "--group-size", 32, "--set", "*.down_proj:bits=8", "--exclude", "*.o_proj.weight")
    run_cli("quantize", model, tmp_path / "out", "--for", "transformers", "--bits", 4, *own)
    assert sorted(one["num_bits"] for one in weights_of(tmp_path / "out")) == [4, 8]
    assert not any(one["symmetric"] for one in weights_of(tmp_path / "out"))
    assert "model.layers.0.self_attn.o_proj" in config_of(tmp_path / "out")["ignore"]


def test_scales_in_the_dtype_of_the_model(tmp_path: Path) -> None:
    for dtype in ("float16", "float32"):
        folder = build_tiny(tmp_path / dtype, dtype=dtype, num_hidden_layers=1)
        run_cli("quantize", folder, tmp_path / f"{dtype}-out", "--for", "vllm")
        tensors = load_file(tmp_path / f"{dtype}-out" / "model.safetensors")
        assert str(tensors["model.layers.0.mlp.down_proj.weight_scale"].dtype) == f"torch.{dtype}"


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"target": "vllm", "bits": 3}, "--for vllm: runs 4 and 8 bits, not 3: use --bits 4, or --for transformers"),
        ({"target": "transformers", "bits": 5}, "--for transformers: runs 2, 3, 4 and 8 bits, not 5: use --bits 4"),
        (
            {"target": "vllm", "symmetric": False},
            "--for vllm: runs the grids symmetric, signed, fp8, .* not zero-point",
        ),
        ({"target": "vllm", "grid": "normal-float"}, "not normal-float"),
        ({"target": "transformers", "embedding_bits": 8}, "leave out --embedding-bits"),
        ({"target": "transformers", "outlier_fraction": 0.01}, "holds no outliers: leave out --outlier-fraction"),
        (
            {"target": "transformers", "scale_format": "two-level"},
            "does not hold two-level scales: leave out --scale-format",
        ),
        ({"target": "vllm", "set": "*.down_proj:bits=3"}, "down_proj.weight: vLLM runs 4 and 8 bits, not 3"),
        ({"target": "vllm", "group_size": "16"}, "vLLM has groups of 32, 64, 128 or row, not 16"),
        ({"target": "vllm", "set": "*.k_proj:bits=8"}, "vLLM reads them as one matrix"),
        ({"target": "vllm", "exclude": ["*.up_proj.weight"]}, "up_proj.weight 16 bits: vLLM reads them as one"),
        ({"target": "vllm", "grid": "fp8", "bits": 4}, "the fp8 grid has 8 bits, not 4"),
    ],
)
def test_what_a_target_does_not_run(choices: dict[str, Any], says: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitError, match=says):
        fewbit.quantize(model, tmp_path / "out", **choices)
    assert not list(tmp_path.iterdir())


def test_plan_says_it_before(model: Path) -> None:
    plain = json.loads(run_cli("plan", model, "--json").stdout)
    assert plain["exports"]["compressed-tensors"] == "cannot hold 7 of 7 weights: see --for"
    planned = json.loads(run_cli("plan", model, "--for", "vllm", "--bits", 4, "--json").stdout)
    assert planned["exports"]["compressed-tensors"] is None
    assert planned["problems"] == []
    sizes = {one["name"]: one["group_size"] for one in planned["tensors"]["quantize"]}
    assert sizes["model.layers.0.mlp.down_proj.weight"] == 128
    split = json.loads(run_cli("plan", model, "--for", "vllm", "--set", "*.k_proj:bits=8", "--json").stdout)
    assert "reads them as one matrix" in split["problems"][0]
    assert "not 3" in run_cli("plan", model, "--for", "vllm", "--bits", 3, code=2).stderr
