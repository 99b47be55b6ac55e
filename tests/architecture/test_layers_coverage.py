"""What becomes of every tensor: told from shapes, neighbours and the configuration; names only keep."""

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.architecture.block_lists import place_of
from fewbit.architecture.coverage import Coverage, WeightTensor, cover, require_recognised
from fewbit.checkpoints.safetensors_io import TensorEntry
from fewbit.errors import FewbitError

Shapes = dict[str, tuple[int, ...]]
HIDDEN, INNER = 64, 160
CONFIG = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2, "vocab_size": 512}


def entry(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> TensorEntry:
    return TensorEntry(name, Path("x"), dtype, shape, 0, dtype.itemsize * prod(shape))


def decoder(prefix: str = "model.layers", blocks: int = 2) -> Shapes:
    """A Llama's blocks."""
    shapes: Shapes = {}
    for number in range(blocks):
        for name, shape in {
            "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            "self_attn.k_proj.weight": (32, HIDDEN),
            "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            "mlp.gate_proj.weight": (INNER, HIDDEN),
            "mlp.up_proj.weight": (INNER, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, INNER),
            "input_layernorm.weight": (HIDDEN,),
        }.items():
            shapes[f"{prefix}.{number}.{name}"] = shape
    return shapes


def covered(shapes: Shapes, config: dict[str, Any] | None = None, **patterns: list[str]) -> Coverage:
    return cover([entry(n, s) for n, s in shapes.items()], CONFIG if config is None else config, **patterns)


def decided(shapes: Shapes, config: dict[str, Any] | None = None) -> dict[str, WeightTensor]:
    return {tensor.entry.name: tensor for tensor in covered(shapes, config).tensors}


ROUTERS = [
    "mlp.gate.weight",
    "mlp.router.weight",
    "block_sparse_moe.gate.weight",
    "block_sparse_moe.router.layer.weight",
    "feed_forward.router.weight",
    "ffn.router.layer.weight",
    "mlp.router.classifier.weight",
    "router.proj.weight",
    "moe.gate.wg.weight",
    "mlp.shared_expert_gate.weight",
    "altup.modality_router.weight",
    "mlp.choice.weight",
]


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("described", [True, False])
def test_every_router_is_kept(name: str, described: bool) -> None:
    if name == "mlp.choice.weight" and not described:
        pytest.skip("only its number of rows tells")
    shapes = {
        **decoder(),
        f"model.layers.0.{name}": (8, HIDDEN),
        "model.layers.0.mlp.experts.up_proj": (8, INNER, HIDDEN),
    }
    found = decided(shapes, {**CONFIG, "num_local_experts": 8} if described else CONFIG)
    assert found[f"model.layers.0.{name}"].reason == "router"
    assert found["model.layers.0.mlp.gate_proj.weight"].action == "quantize"


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("conv.conv.weight", (HIDDEN, 1, 3), "convolution"),
        ("mixer.conv1d.weight", (HIDDEN, 4), "convolution"),
        ("temporal_block.conv_1d.weight", (HIDDEN, 1, 4), "convolution"),
        ("self_attn.q_norm.weight", (4, 16), "norm"),
        ("ln_1.weight", (4, 16), "norm"),
        ("self_attn.relative_attention_bias.weight", (32, 8), "positions"),
        ("mlp.experts.down_proj_bias", (8, HIDDEN), "bias"),
        ("mixer.A_log", (128, 16), "state-space or recurrence parameter"),
        ("attention.time_mix_key", (1, 1, HIDDEN), "vector (norm, bias or scale)"),
        ("self_attn.q_proj.lora_A.weight", (16, HIDDEN), "low-rank factor of an adapter"),
        ("self_attn.q_proj.lora_B.default.weight", (HIDDEN, 16), "low-rank factor of an adapter"),
        ("per_layer_embedding.weight", (512, 32), "embedding"),
        ("table.weight", (512, 32), "embedding"),
        ("self_attn.bias", (1, 1, 32, 32), "attention mask"),
        ("rg_lru.input_gate_weight", (4, 16, 16), "one small matrix per head"),
        ("self_attn.b_proj.weight", (4, HIDDEN), "fewer than 8 rows or columns"),
        ("attn_hc.fn", (24, 256), "parameter that is no layer's weight"),
    ],
)
def test_what_is_no_linear_layer_is_kept(name: str, shape: tuple[int, ...], reason: str) -> None:
    found = decided({**decoder(), f"model.layers.0.{name}": shape}, {**CONFIG, "num_attention_heads": 4})
    tensor = found[f"model.layers.0.{name}"]
    assert (tensor.action, tensor.reason) == ("keep", reason)
    assert sum(t.action == "quantize" for t in found.values()) == 12


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("per_layer_input_gate.weight", (32, HIDDEN)),
        ("mixer.dt_proj.weight", (128, 8)),
        ("mixer.x_proj.weight", (40, 128)),
        ("self_attn.q_a_proj.weight", (48, HIDDEN)),
        ("self_attn.output_gate.weight", (HIDDEN, HIDDEN)),
        ("conv.in_proj.weight", (3 * HIDDEN, HIDDEN)),
        ("input_layernorm.mlp.fc1.weight", (16, HIDDEN)),
    ],
)
def test_names_that_sound_like_something_else(name: str, shape: tuple[int, ...]) -> None:
    shapes = {**decoder(), f"model.layers.0.{name}": shape, "model.layers.0.mixer.out_proj.weight": (HIDDEN, 128)}
    assert decided(shapes)[f"model.layers.0.{name}"].action == "quantize"


def test_what_is_not_understood_is_an_error_that_names_it() -> None:
    strange = {
        "model.layers.0.a.weight": (7, 9, 11),
        "model.layers.1.b.weight": (37, 41),
        "model.other.weight": (40, 48),
    }
    with pytest.raises(FewbitError) as caught:
        require_recognised(covered({**decoder(), **strange}), "m")
    assert all(name in str(caught.value) for name in strange)
    assert "--include PATTERN (quantize) or --exclude PATTERN (keep)" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "action"),
    [
        ("model.layers.0.mlp.extra.weight", (HIDDEN, HIDDEN), torch.int32, "unknown"),
        ("model.layers.0.mlp.extra.weight", (HIDDEN, HIDDEN), torch.float64, "unknown"),
        ("model.layers.0.mlp.extra.weight", (HIDDEN, HIDDEN), torch.uint8, "unknown"),
        ("model.layers.0.mlp.extra.weight", (0, HIDDEN), torch.bfloat16, "unknown"),
        ("model.layers.0.mlp.extra", (0,), torch.bfloat16, "unknown"),
        ("model.layers.0.self_attn.bias", (1, 1, 32, 32), torch.bool, "keep"),
        ("model.embeddings.position_ids", (1, 32), torch.int64, "keep"),
        ("model.layers.0.mlp.extra.weight", (HIDDEN, HIDDEN), torch.float32, "quantize"),
    ],
)
def test_nothing_is_kept_for_its_dtype_or_its_emptiness(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, action: str
) -> None:
    entries = [entry(n, s) for n, s in decoder().items()]
    found = cover([*entries, entry(name, shape, dtype)], CONFIG).tensors[-1]
    assert found.action == action


@pytest.mark.parametrize(
    "prefix",
    [
        "mtp.layers",
        "model.mtp_layers",
        "draft.layers",
        "model.layers.1.mtp_block",
        "eagle.model.layers",
        "talker.layers",
    ],
)
def test_a_second_list_of_blocks_is_not_the_decoder(prefix: str) -> None:
    found = decided({**decoder(), **decoder(prefix, 1)})
    ours = [t for name, t in found.items() if name.startswith(f"{prefix}.")]
    assert ours and all(t.action == "keep" and t.block is None for t in ours)
    assert {t.block for t in found.values() if t.entry.name.startswith("model.layers.") and t not in ours} == {0, 1}


def test_a_list_that_the_config_does_not_describe_is_unknown() -> None:
    found = decided({**decoder(), **decoder("second.stack", 3)})
    assert {t.action for n, t in found.items() if n.startswith("second.") and "norm" not in n} == {"unknown"}
    assert "second.stack is a second list" in found["second.stack.0.mlp.up_proj.weight"].reason


def test_blocks_beyond_the_last_predict_further_tokens() -> None:
    shapes = {**decoder(blocks=3), "model.layers.2.eh_proj.weight": (HIDDEN, 2 * HIDDEN)}
    found = decided(shapes)
    last = [t for name, t in found.items() if name.startswith("model.layers.2.")]
    assert {t.action for t in last} == {"keep"} and {t.block for t in last} == {None}
    assert "config.json has 2 blocks" in found["model.layers.2.eh_proj.weight"].reason


def test_towers_and_projectors_are_kept_and_named() -> None:
    extra = {
        "vision_tower.encoder.layers.0.mlp.fc1.weight": (256, 48),
        "audio_tower.layers.0.self_attn.q_proj.weight": (48, 48),
        "multi_modal_projector.linear_1.weight": (HIDDEN, 48),
        "visual.merger.mlp.0.weight": (48, 48),
        "vision_tower.embeddings.patch_embedding.weight": (48, 3, 14, 14),
    }
    config = {"text_config": CONFIG, "vision_config": {"hidden_size": 48, "num_hidden_layers": 9}}
    found = decided({**decoder("language_model.model.layers"), **extra}, config)
    assert {found[name].action for name in extra} == {"keep"}
    assert all("projector" in found[name].reason for name in extra)
    assert sum(t.action == "quantize" for t in found.values()) == 12


def test_encoder_and_decoder_are_both_text() -> None:
    shapes = {**decoder("decoder.block"), **decoder("encoder.block"), "shared.weight": (512, HIDDEN)}
    shapes["decoder.block.0.cross.q.weight"] = (HIDDEN, HIDDEN)
    found = decided(shapes, {**CONFIG, "is_encoder_decoder": True})
    assert sum(t.action == "quantize" for t in found.values()) == 25
    assert found["encoder.block.1.mlp.up_proj.weight"].block is None
    assert found["decoder.block.1.mlp.up_proj.weight"].block == 1


def test_patterns_may_be_the_names_themselves() -> None:
    odd = "model.layers.0.mlp.up[1]*.weight"
    shapes = {**decoder(), odd: (INNER, HIDDEN), "model.layers.0.mlp.up1x.weight": (INNER, HIDDEN)}
    found = {t.entry.name: t for t in covered(shapes, exclude=[odd]).tensors}
    assert found[odd].reason == "excluded"
    assert found["model.layers.0.mlp.up1x.weight"].action == "quantize"
    found = {t.entry.name: t for t in covered(shapes, exclude=["*up[[]1]*"]).tensors}
    assert [name for name, t in found.items() if t.reason == "excluded"] == [odd]
    with pytest.raises(FewbitError, match="matches no tensor"):
        covered(shapes, include=["nothing.*"])


def experts(up: tuple[int, int], down: tuple[int, int], names: tuple[str, str], bias: bool = False) -> Shapes:
    base = "model.layers.0.mlp"
    shapes: Shapes = {**decoder(), f"{base}.router.weight": (8, HIDDEN)}
    shapes[f"{base}.{names[0]}"], shapes[f"{base}.{names[1]}"] = (8, *up), (8, *down)
    if bias:
        shapes[f"{base}.{names[1]}_bias"] = (8, HIDDEN)
    return shapes


FUSED = ("experts.gate_up_proj", "experts.down_proj")


@pytest.mark.parametrize(
    ("up", "down", "names", "bias", "turned"),
    [
        ((320, HIDDEN), (HIDDEN, INNER), FUSED, False, False),
        ((HIDDEN, 320), (INNER, HIDDEN), FUSED, False, True),
        ((HIDDEN, 128), (HIDDEN, HIDDEN), FUSED, False, True),
        ((128, HIDDEN), (HIDDEN, HIDDEN), FUSED, False, False),
        ((HIDDEN, HIDDEN), (32, HIDDEN), FUSED, False, True),
        ((HIDDEN, HIDDEN), (HIDDEN, 32), FUSED, False, False),
        ((HIDDEN, HIDDEN), (32, HIDDEN), ("experts.a", "experts.b"), True, True),
        ((HIDDEN, 320), (INNER, HIDDEN), ("experts.fc1.weight", "experts.fc2.weight"), False, True),
        ((320, HIDDEN), (HIDDEN, INNER), ("input_linear.weight", "output_linear.weight"), False, False),
        ((HIDDEN, HIDDEN), (HIDDEN, HIDDEN), FUSED, False, False),
    ],
)
def test_which_axis_of_experts_holds_the_inputs(
    up: tuple[int, int], down: tuple[int, int], names: tuple[str, str], bias: bool, turned: bool
) -> None:
    found = decided(experts(up, down, names, bias))
    for name, shape in zip(names, (up, down), strict=True):
        tensor = found[f"model.layers.0.mlp.{name}"]
        assert (tensor.action, tensor.transposed) == ("quantize", turned)
        rows, columns = reversed(shape) if turned else shape
        assert tensor.matrix_shape == (8 * rows, columns)
        assert tensor.original_shape == (8, *shape)
        assert tensor.module == tensor.entry.name


def test_experts_one_below_the_other() -> None:
    base = "transformer.blocks.0.ffn.experts.mlp"
    shapes = {**decoder("transformer.blocks"), **{f"{base}.{name}": (8 * INNER, HIDDEN) for name in ("w1", "v1", "w2")}}
    found = decided(shapes, {**CONFIG, "ffn_config": {"moe_num_experts": 8, "ffn_hidden_size": INNER}})
    tensors = [found[f"{base}.{name}"] for name in ("w1", "v1", "w2")]
    assert {t.action for t in tensors} == {"quantize"}
    assert [t.matrix_shape for t in tensors] == [(8 * INNER, HIDDEN)] * 2 + [(HIDDEN, 8 * INNER)]
    assert [t.module for t in tensors] == [t.entry.name for t in tensors]


def test_matrices_that_are_stored_in_out_are_told_by_their_biases_list_by_list() -> None:
    shapes: Shapes = {"transformer.wte.weight": (512, HIDDEN), "score.weight": (8, HIDDEN)}
    for number in range(2):
        base = f"transformer.h.{number}"
        shapes |= {f"{base}.c_attn.weight": (HIDDEN, 192), f"{base}.c_attn.bias": (192,)}
        shapes |= {f"{base}.c_proj.weight": (HIDDEN, HIDDEN), f"{base}.c_proj.bias": (HIDDEN,)}
    found = {t.entry.name: t for t in covered(shapes, include=["transformer.wte.weight"]).tensors}
    assert found["transformer.h.0.c_proj.weight"].transposed
    assert found["transformer.h.1.c_attn.weight"].matrix_shape == (192, HIDDEN)
    assert not found["transformer.wte.weight"].transposed
    assert found["transformer.h.1.c_attn.weight"].module == "transformer.h.1.c_attn"


def test_the_place_that_a_name_tells() -> None:
    place = place_of("mtp.layers.0.mlp.experts.3.w1.weight")
    assert place is not None and (place.prefix, place.number, place.rest) == (
        "mtp.layers",
        0,
        "mlp.experts.3.w1.weight",
    )
    assert place_of("lm_head.weight") is None
    assert place_of("layer.1") is None
