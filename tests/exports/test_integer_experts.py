"""Mixtures of experts in the formats of evenly spaced integers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer
from integer_models import read_gptq, read_mlx, tensors_of
from test_integer_formats import config_of, decoded

import fewbit
from fewbit.errors import FewbitError

EXPERTS = 4
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256, "max_position_embeddings": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2}


def qwen(folder: Path) -> Path:
    """A tiny Qwen 3 with experts that transformers saves one by one, and names `num_local_experts` in the config."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"intermediate_size": 128, "moe_intermediate_size": 64, "num_experts": EXPERTS}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **HEADS, **sizes))
    model.to(torch.float16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def mixtral(folder: Path) -> Path:
    """A tiny Mixtral, which has other names for the same."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, intermediate_size=64, num_local_experts=EXPERTS))
    model.to(torch.float16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[qwen, mixtral])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return request.param(tmp_path_factory.mktemp("experts") / request.param.__name__)


def make(model: Path, out: Path, grid: str, **others: Any) -> Path:
    plain = {"scale_format": "float16", "embedding_bits": 16, "bits": 4, "group_size": "32"}
    fewbit.quantize(model, out, "rtn", grid=grid, **plain, **others)
    return out


@pytest.mark.slow
def test_mlx_joins_the_experts_of_a_layer(model: Path, tmp_path: Path) -> None:
    native = make(model, tmp_path / "native", "minimum")
    report = fewbit.export(native, tmp_path / "out", "mlx")
    tensors, weights = tensors_of(tmp_path / "out"), decoded(native)
    where = "mlp" if model.name == "qwen" else "block_sparse_moe"
    for layer, named in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        module = f"model.layers.1.{where}.switch_mlp.{layer}"
        joined = {end: tensors[f"{module}.{end}"] for end in ("weight", "scales", "biases")}
        for expert in range(EXPERTS):
            one = {f"one.{end}": tensor[expert] for end, tensor in joined.items()}
            its = f"model.layers.1.{where}.experts.{expert}.{layer if where == 'mlp' else named}"
            assert np.array_equal(read_mlx(one, "one", 4), weights[its])
    assert not any(".experts." in name for name in tensors)
    config = config_of(tmp_path / "out")
    assert config["num_experts"] == EXPERTS
    assert config["quantization"][f"model.layers.0.{where}.gate"] is False
    assert report["tensors"]["mlx 4 bits"] == 2 * (4 + 3 * EXPERTS)


def test_mlx_has_one_size_for_the_experts_of_a_layer(model: Path, tmp_path: Path) -> None:
    one = "model.layers.0.*.experts.2.*"
    native = make(model, tmp_path / "native", "minimum", set={one: {"bits": 8}})
    with pytest.raises(FewbitError, match=r"experts\.2.*8 bits.*one size for all experts of a layer"):
        fewbit.export(native, tmp_path / "out", "mlx")
    native = make(model, tmp_path / "kept", "minimum", exclude=[one])
    with pytest.raises(FewbitError, match="one size for all experts of a layer"):
        fewbit.export(native, tmp_path / "out", "mlx")


@pytest.mark.slow
def test_mlx_joins_experts_that_are_kept(model: Path, tmp_path: Path) -> None:
    native = make(model, tmp_path / "native", "minimum", exclude=["model.layers.0.*.experts.*"])
    fewbit.export(native, tmp_path / "out", "mlx")
    tensors, before = tensors_of(tmp_path / "out"), tensors_of(model)
    where, its = ("mlp", "down_proj") if model.name == "qwen" else ("block_sparse_moe", "w2")
    name = f"model.layers.0.{where}.switch_mlp.down_proj"
    kept = [before[f"model.layers.0.{where}.experts.{expert}.{its}.weight"] for expert in range(EXPERTS)]
    assert torch.equal(tensors[f"{name}.weight"], torch.stack(kept))
    described = config_of(tmp_path / "out")["quantization"]
    assert described[name] is False


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_gptq_and_awq_have_experts_one_by_one(kind: str, model: Path, tmp_path: Path) -> None:
    native = make(model, tmp_path / "native", "symmetric")
    report = fewbit.export(native, tmp_path / "out", kind)
    assert any("transformers does not read them" in note for note in report["notes"])
    if kind == "gptq":
        tensors = tensors_of(tmp_path / "out")
        for module, weight in decoded(native).items():
            assert np.array_equal(read_gptq(tensors, module, 4), weight), module
