"""Native folders in transformers: the same logits as plain weights, packed in memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, byte_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import fewbit
from fewbit.errors import FewbitError
from fewbit.runtime.packed_linear import PackedLinear
from fewbit.runtime.unpack import unpack, unpack_modules

TOKENS = torch.arange(2, 50).view(2, 24)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits


@pytest.mark.slow
@pytest.mark.parametrize(("method", "bits"), [("rtn", 3), ("adpq", 3), ("adpq+", 3), ("adpq+", 1)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_logits_equal_those_of_unpacked_weights(tiny: Path, tmp_path: Path, method: str, bits: int, dtype: str) -> None:
    torch_dtype = getattr(torch, dtype)
    fewbit.quantize(tiny, tmp_path / "out", fewbit.preset(method, bits=bits))
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch_dtype).eval()
    layers = [m for m in packed.modules() if isinstance(m, PackedLinear)]
    assert len(layers) == 14
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    held = sum(b.numel() * b.element_size() for layer in layers for b in layer.buffers())
    report = json.loads((tmp_path / "out" / "fewbit_report.json").read_text())
    assert held == report["output"]["bytes"] < 0.4 * 2 * weights
    packed_logits = logits(packed)
    if dtype == "bfloat16":
        unpack(tmp_path / "out", tmp_path / "plain")
        plain = fewbit.load(tmp_path / "plain", dtype=torch_dtype)
        assert not [m for m in plain.modules() if isinstance(m, PackedLinear)]
        assert torch.equal(packed_logits, logits(plain))
    assert torch.equal(packed_logits, logits(unpack_modules(packed)))


def test_generates_and_keeps_tied_weights(tiny: Path, tmp_path: Path) -> None:
    fewbit.quantize(tiny, tmp_path / "out", fewbit.preset("adpq+", bits=4, embedding_bits=16))
    model = fewbit.load(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("hello", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert out.shape[1] == ids.shape[1] + 5


@pytest.mark.slow
@pytest.mark.parametrize("order", ["import fewbit, transformers", "import transformers, fewbit"])
def test_registration_in_either_order_of_imports(tiny: Path, tmp_path: Path, order: str) -> None:
    fewbit.quantize(tiny, tmp_path / "out", fewbit.preset("rtn", bits=4))
    program = (
        f"{order}, sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.stdout.strip() == "PackedLinear", done.stderr


def test_importing_fewbit_imports_nothing_heavy() -> None:
    program = "import sys, fewbit; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_the_base_model_loads_too(tiny: Path, tmp_path: Path) -> None:
    fewbit.quantize(tiny, tmp_path / "out", fewbit.preset("adpq", bits=4))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    base = AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        assert torch.equal(base(TOKENS).last_hidden_state, whole.model(TOKENS).last_hidden_state)


def test_biases_are_carried(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
    )
    model = Qwen2ForCausalLM(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.normal_(module.bias)
    same_logits_after_8_bits(model, tmp_path)


def test_gpt2_stores_its_matrices_turned(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256, n_positions=64))
    report = same_logits_after_8_bits(model, tmp_path)
    assert [layer["shape"] for layer in report["layers"]][:2] == [[64, 192], [64, 64]]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["embeddings"] == ["transformer.wte"]
    assert all(("transposed" in w) == (name != "transformer.wte") for name, w in config["weights"].items())


def same_logits_after_8_bits(model: Any, tmp_path: Path) -> dict[str, Any]:
    model.eval().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    report = fewbit.quantize(tmp_path / "model", tmp_path / "out", fewbit.preset("rtn", bits=8, group_size="32"))
    packed = fewbit.load(tmp_path / "out")
    assert [m for m in packed.modules() if isinstance(m, PackedLinear)]
    assert float((logits(packed) - logits(model)).abs().max()) < 0.05 * float(logits(model).abs().max())
    unpack(tmp_path / "out", tmp_path / "plain")
    assert torch.equal(logits(fewbit.load(tmp_path / "plain")), logits(packed))
    return report


def test_fused_experts_are_stored_and_unpacked(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    experts = torch.randn(3, 32, 64, generator=generator).bfloat16()
    (tmp_path / "model").mkdir()
    tensors = {
        "model.embed_tokens.weight": torch.zeros(8, 64, dtype=torch.bfloat16),
        "model.layers.0.mlp.experts.gate_up_proj": experts,
        "model.layers.0.mlp.gate.weight": torch.zeros(3, 64, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "some_moe", "dtype": "bfloat16"}')
    report = fewbit.quantize(tmp_path / "model", tmp_path / "out", fewbit.preset("adpq", bits=8))
    assert [layer["name"] for layer in report["layers"]] == ["model.layers.0.mlp.experts.gate_up_proj"]
    assert {k["name"]: k["reason"] for k in report["kept"]}["model.layers.0.mlp.gate.weight"] == "router"
    unpack(tmp_path / "out", tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert plain.keys() == tensors.keys()
    after = plain["model.layers.0.mlp.experts.gate_up_proj"]
    assert after.shape == experts.shape
    assert float((after.float() - experts.float()).abs().max()) < 0.05


def test_load_says_what_is_wrong(tiny: Path, tmp_path: Path) -> None:
    fewbit.quantize(tiny, tmp_path / "out", fewbit.preset("rtn", bits=4))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FewbitError, match="format version 99: this fewbit reads versions 1 and 2: upgrade fewbit"):
        fewbit.load(tmp_path / "out")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_same_weights(tiny: Path, tmp_path: Path) -> None:
    fewbit.quantize(tiny, tmp_path / "out", fewbit.preset("adpq+", bits=3))
    model = fewbit.load(tmp_path / "out", device="cpu")
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight
    assert torch.equal(layer.cuda().weight.cpu(), before)


def test_tiny_models_differ_by_seed_only(tmp_path: Path) -> None:
    one, two = build_tiny(tmp_path / "one"), build_tiny(tmp_path / "two")
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


def test_a_packed_model_saves_and_loads_again(tiny: Path, tmp_path: Path) -> None:
    fewbit.quantize(tiny, tmp_path / "out", fewbit.preset("adpq+", bits=3))
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    first.save_pretrained(tmp_path / "again")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert isinstance(second.model.layers[0].mlp.up_proj, PackedLinear)
    assert torch.equal(logits(first), logits(second))
