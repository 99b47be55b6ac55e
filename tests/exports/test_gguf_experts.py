"""Mixtures of experts written as GGUF: the experts of a layer are one tensor."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import copy_folder, run_cli
from gguf_experts import MIXTURES, build_mixture
from safetensors.torch import load_file, save_file
from test_gguf_file import original, read

import fewbit
from fewbit.recipe import preset
from fewbit.runtime.unpack import unpack

pytest.importorskip("gguf")
PARTS = {
    "mixtral": ("block_sparse_moe", {"ffn_gate_exps": "w1", "ffn_down_exps": "w2", "ffn_up_exps": "w3"}),
    "qwen2_moe": ("mlp", {f"ffn_{part}_exps": f"{part}_proj" for part in ("gate", "down", "up")}),
}
PARTS["qwen3_moe"] = PARTS["qwen2_moe"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("experts")
    return {name: build_mixture(top / name, name) for name in MIXTURES}


def stacked(name: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts' tensors by llama.cpp's names."""
    place, parts = PARTS[name]
    return {
        f"blk.{block}.{called}.weight": torch.stack(
            [weights[f"model.layers.{block}.{place}.experts.{index}.{part}.weight"] for index in range(4)]
        )
        for block in range(2)
        for called, part in parts.items()
    }


@pytest.mark.parametrize("name", MIXTURES)
def test_16_bit_experts_are_stacked(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    fewbit.export(models[name], tmp_path / "out")
    fields, tensors, kinds = read(tmp_path / "out" / "out.gguf")
    weights = original(models[name])
    for key, wanted in stacked(name, weights).items():
        assert torch.equal(tensors[key], wanted), key
        assert kinds[key] == "bf16"
    place = PARTS[name][0]
    router = tensors["blk.1.ffn_gate_inp.weight"]
    assert torch.equal(router, weights[f"model.layers.1.{place}.gate.weight"])
    assert kinds["blk.1.ffn_gate_inp.weight"] == "f32"
    arch = {"mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}[name]
    assert fields["general.architecture"] == arch
    assert (fields[f"{arch}.expert_count"], fields[f"{arch}.expert_used_count"]) == (4, 2)
    assert fields.get(f"{arch}.expert_feed_forward_length") == (None if name == "mixtral" else 32)
    if name == "qwen2_moe":
        assert fields["qwen2moe.expert_shared_feed_forward_length"] == 64
        wanted = weights["model.layers.0.mlp.shared_expert.up_proj.weight"]
        assert torch.equal(tensors["blk.0.ffn_up_shexp.weight"], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_quantized_experts_keep_their_bits(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    fewbit.quantize(models[name], tmp_path / "q", preset("rtn", grid="q4_0", embedding_bits=16))
    fewbit.export(tmp_path / "q", tmp_path / "out")
    _, tensors, kinds = read(tmp_path / "out" / "out.gguf")
    for key, wanted in stacked(name, original(unpack(tmp_path / "q", tmp_path / "plain"))).items():
        assert torch.equal(tensors[key].bfloat16().float(), wanted), key
        assert kinds[key] == "q4_0"


@pytest.mark.slow
def test_from_one_command(models: dict[str, Path], tmp_path: Path) -> None:
    run_cli("quantize", models["qwen3_moe"], tmp_path / "out", "--for", "llama.cpp", "--bits", 4)
    kinds = read(tmp_path / "out" / "out.gguf")[2]
    assert kinds["blk.0.ffn_up_exps.weight"] in ("iq4_nl", "q4_0")
    assert kinds["blk.0.ffn_gate_inp.weight"] == "f32"


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "llama.cpp does not know norm_topk_prob False"),
        ("qwen2_moe", {"norm_topk_prob": True}, "llama.cpp does not know norm_topk_prob True"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "llama.cpp does not know layers without experts"),
        ("mixtral", {"num_local_experts": 5}, "4 experts, but config.json says 5"),
    ],
)
def test_what_llama_cpp_computes_otherwise(
    name: str, changes: dict[str, Any], says: str, models: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_folder(models[name], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    assert says in run_cli("export", folder, tmp_path / "out", code=2).stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_expert_and_experts_of_several_types(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_folder(models["qwen3_moe"], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.experts.2.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = run_cli("export", folder, tmp_path / "out", code=2)
    assert "3 experts, but config.json says 4" in done.stderr
    other = ("--set", "*.experts.1.up_proj:grid=q8_0")
    run_cli("quantize", models["qwen3_moe"], tmp_path / "q", "--grid", "q4_0", *other, "--embedding-bits", 16)
    done = run_cli("export", tmp_path / "q", tmp_path / "out", code=2)
    assert "GGUF has one type for all experts of a layer, not q4_0, q8_0" in done.stderr
    assert done.stderr.count("\n") == 1
