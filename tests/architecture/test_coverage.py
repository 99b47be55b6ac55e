from pathlib import Path

import pytest
import torch

from fewbit.architecture.coverage import Coverage, cover, require_recognised
from fewbit.architecture.norms import gain_before
from fewbit.checkpoints.safetensors_io import TensorEntry
from fewbit.errors import FewbitError
from fewbit.grids.choice import group_size_for


def entries(shapes: dict[str, tuple[int, ...]]) -> list[TensorEntry]:
    made = []
    for name, shape in shapes.items():
        size = 2
        for n in shape:
            size *= n
        made.append(TensorEntry(name, Path("x"), torch.bfloat16, shape, 0, size))
    return made


def actions(coverage: Coverage) -> dict[str, str]:
    return {t.entry.name: t.action for t in coverage.tensors}


def test_every_tensor_of_real_models_is_recognised() -> None:
    """Checkpoint names of families built from their own configs, by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "pad_token_id": 0,
    }
    families = {
        "llama": 14, "mistral": 14, "qwen2": 14, "qwen3": 14, "gemma2": 14, "gemma3_text": 14, "phi3": 8, "gpt_neox": 8,
        "falcon": 8, "opt": 12, "gpt2": 8,
    }  # fmt: skip
    for family, linear_layers in families.items():
        extra = {"n_embd": 32, "n_layer": 2, "n_head": 2} if family == "gpt2" else small
        if family == "opt":
            extra = {**small, "ffn_dim": 64, "word_embed_proj_dim": 32}
        if family in ("qwen3", "gemma2", "gemma3_text"):
            extra = {**small, "head_dim": 16}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **extra))
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        coverage = cover(entries(shapes), {"model_type": family})
        require_recognised(coverage, family)
        assert len(coverage.of("quantize")) == linear_layers, family
        assert all(t.transposed == (family == "gpt2") for t in coverage.of("quantize")), family


def test_routers_experts_and_strangers() -> None:
    shapes = {
        "model.embed_tokens.weight": (64, 32),
        "lm_head.weight": (64, 32),
        "model.norm.weight": (32,),
        "model.layers.0.mlp.gate.weight": (4, 32),
        "model.layers.0.block_sparse_moe.gate.weight": (4, 32),
        "model.layers.0.mlp.experts.0.up_proj.weight": (16, 32),
        "model.layers.0.mlp.experts.gate_up_proj": (4, 16, 32),
        "model.layers.0.mlp.gate_proj.weight": (16, 32),
        "model.visual.blocks.0.qkv.weight": (16, 32),
        "model.projector.weight": (16, 32),
        "model.layers.0.conv.weight": (4, 4, 3, 3),
    }
    coverage = cover(entries(shapes), {})
    found = actions(coverage)
    assert [n for n, a in found.items() if a == "quantize"] == [
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.gate_proj.weight",
    ]
    assert [n for n, a in found.items() if a == "unknown"] == [
        "model.visual.blocks.0.qkv.weight",
        "model.projector.weight",
        "model.layers.0.conv.weight",
    ]
    assert {t.matrix_shape for t in coverage.of("quantize")} == {(16, 32), (64, 32)}
    with pytest.raises(FewbitError, match="3 weights are not recognised"):
        require_recognised(coverage, "m")
    chosen = actions(cover(entries(shapes), {}, include=["lm_head.weight"], exclude=["*.experts.*"]))
    assert chosen["lm_head.weight"] == "quantize"
    assert chosen["model.layers.0.mlp.experts.0.up_proj.weight"] == "keep"


def test_the_norm_before_a_layer() -> None:
    shapes = {
        "model.layers.0.input_layernorm.weight": (32,),
        "model.layers.0.post_attention_layernorm.weight": (32,),
        "model.layers.0.pre_feedforward_layernorm.weight": (32,),
    }
    table = {e.name: e for e in entries(shapes)}

    def norm(name: str) -> str | None:
        entry = gain_before(f"model.layers.0.{name}.weight", table)
        return entry.name.split(".")[3] if entry else None

    assert norm("self_attn.q_proj") == "input_layernorm"
    assert norm("mlp.gate_proj") == "pre_feedforward_layernorm"
    assert norm("mlp.down_proj") is None
    assert norm("self_attn.o_proj") is None
    del table["model.layers.0.pre_feedforward_layernorm.weight"]
    assert norm("mlp.up_proj") == "post_attention_layernorm"


@pytest.mark.parametrize(
    ("columns", "choice", "size"),
    [
        (576, "auto", 96),
        (1536, "auto", 128),
        (576, "128,64,auto", 64),
        (576, "row", 576),
        (7, "auto", 7),
        (576, "100", None),
    ],
)
def test_group_sizes(columns: int, choice: str, size: int | None) -> None:
    assert group_size_for(columns, choice) == size
