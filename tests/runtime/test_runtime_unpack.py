"""Unpacked folders: dtypes, names, shapes; and packed models saved, dequantized, moved and loaded again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import IDS, SIZES, build, logits, packed_weights, quantized
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

import fewbit
from fewbit.linear import use_fast_products
from fewbit.runtime.unpack import unpack


def set_dtype(folder: Path, values: dict[str, Any]) -> None:
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("dtype", "torch_dtype")}
    path.write_text(json.dumps({**config, **values}))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("named", [{}, {"dtype": None}, {"dtype": "auto"}, {"torch_dtype": "auto", "dtype": "no such"}])
def test_without_a_dtype_in_the_config_it_is_that_of_the_kept_weights(
    dtype: str, named: dict[str, Any], tmp_path: Path
) -> None:
    build(tmp_path / "model", dtype=dtype)
    set_dtype(tmp_path / "model", named)
    quantized(tmp_path / "model", tmp_path / "packed", "adpq", 8)
    plain = load_file(unpack(tmp_path / "packed", tmp_path / "plain") / "model.safetensors")
    assert {tensor.dtype for tensor in plain.values()} == {getattr(torch, dtype)}
    if "no such" not in named.values():
        set_dtype(tmp_path / "packed", {})
        set_dtype(tmp_path / "plain", {})
        one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("packed", "plain"))
        assert one.dtype == getattr(torch, dtype)
        use_fast_products(other)
        assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_s_dtype_counts_wherever_it_stands(key: str, tmp_path: Path) -> None:
    build(tmp_path / "model", dtype="float16")
    quantized(tmp_path / "model", tmp_path / "packed")
    for values in ({key: "float32"}, {"text_config": {key: "float32"}}, {key: "torch.float32"}):
        set_dtype(tmp_path / "packed", values)
        out = unpack(tmp_path / "packed", tmp_path / "plain", overwrite=True)
        weight = load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        assert weight.dtype == torch.float32


def test_norms_of_another_type_do_not_count(tmp_path: Path) -> None:
    build(tmp_path / "model", dtype="bfloat16")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    wide = {name: t.float() if t.dim() == 1 else t for name, t in tensors.items()}
    save_file(wide, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    set_dtype(tmp_path / "model", {})
    quantized(tmp_path / "model", tmp_path / "packed")
    plain = load_file(unpack(tmp_path / "packed", tmp_path / "plain") / "model.safetensors")
    assert {name: t.dtype for name, t in plain.items()} == {name: t.dtype for name, t in wide.items()}


def test_names_and_shapes_are_the_original_s(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    tensors = {
        "model.embed_tokens.weight": random(96, 64),
        "model.layers.0.mlp.experts.gate_up_proj": random(3, 32, 64),
        "model.layers.0.mlp.ünï proj.weight": random(32, 64),
        "model.layers.0.mlp.a[b]*.weight": random(64, 32),
        "model.layers.0.norm.weight": random(64),
    }
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    (tmp_path / "model" / "config.json").write_text('{"model_type": "odd", "dtype": "bfloat16"}')
    quantized(tmp_path / "model", tmp_path / "packed", "adpq", include=("*.gate_up_proj",))
    plain = load_file(unpack(tmp_path / "packed", tmp_path / "plain") / "model.safetensors")
    assert {name: t.shape for name, t in plain.items()} == {name: t.shape for name, t in tensors.items()}
    for name, tensor in tensors.items():
        assert float((plain[name].float() - tensor.float()).abs().max()) < 0.05, name


def test_a_turned_layer_is_saved_as_it_was(tmp_path: Path) -> None:
    build(tmp_path / "model", "gpt2", n_embd=64, n_layer=1, n_head=4, n_positions=64)
    model = AutoModelForCausalLM.from_pretrained(quantized(tmp_path / "model", tmp_path / "packed"))
    unpack(tmp_path / "packed", tmp_path / "plain")
    model.dequantize().save_pretrained(tmp_path / "saved")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "saved"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_dequantizing_leaves_a_plain_model(tmp_path: Path) -> None:
    build(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(quantized(tmp_path / "model", tmp_path / "packed"))
    before = logits(model)
    plain = model.dequantize()
    assert plain is model and packed_weights(model) == 0
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    original, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "plain"))
    assert {n: (t.shape, t.dtype) for n, t in original.items()} == {n: (t.shape, t.dtype) for n, t in saved.items()}
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").dequantize(torch.float32)
    weight = wide.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight.bfloat16(), saved["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.slow
def test_names_that_transformers_changes_are_saved_as_they_were(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 125, "boi_token_index": 126, "eoi_token_index": 127}
    vision |= {"image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=SIZES, vision_config=vision, **tokens))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    names = list(load_file(tmp_path / "model" / "model.safetensors"))
    layers = tuple(n for n in names if ".layers." in n and "vision" not in n and n.endswith("_proj.weight"))
    others = tuple(n for n in names if n not in layers)
    quantized(tmp_path / "model", tmp_path / "packed", "adpq", 4, include=layers, exclude=others)
    packed = fewbit.load(tmp_path / "packed", device="cpu")
    assert packed_weights(packed) == len(layers)
    packed.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    wanted = logits(packed)
    assert torch.equal(logits(fewbit.load(tmp_path / "again", device="cpu")), wanted)
    packed.dequantize().save_pretrained(tmp_path / "plain")
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == set(names)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_devices_dtypes_and_loading_twice(kind: str, tmp_path: Path) -> None:
    needs = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "mixtral" else {}
    build(tmp_path / "model", kind, "float32", tie_word_embeddings=True, **needs)
    folder = quantized(tmp_path / "model", tmp_path / "packed", "adpq", 4, include=("model.embed_tokens.weight",))
    first = AutoModelForCausalLM.from_pretrained(folder)
    wanted = logits(first)
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    devices |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    others = {
        "again": AutoModelForCausalLM.from_pretrained(folder),
        "auto": AutoModelForCausalLM.from_pretrained(folder, device_map="auto"),
        "disk": AutoModelForCausalLM.from_pretrained(folder, device_map=devices, offload_folder=str(tmp_path / "o")),
        "moved": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(torch.float32),
        "meta": AutoModelForCausalLM.from_pretrained(folder, low_cpu_mem_usage=True).to("cpu"),
    }
    for name, model in others.items():
        close = torch.allclose(logits(model), wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))
        assert close if name == "moved" else torch.equal(logits(model), wanted), name
    for dtype in (torch.bfloat16, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert logits(model).dtype == dtype
    out = first.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert torch.equal(out, others["again"].generate(IDS[:1, :4], max_new_tokens=4, do_sample=False))
