"""Adapters on packed models: gradients pass packed layers, and nothing is lost without a word."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import IDS, build, logits, packed_weights, quantized
from torch import nn
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.errors import FewbitError
from fewbit.runtime.packed_linear import PackedLinear
from fewbit.runtime.unpack import unpack_modules


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("training")
    build(place / "model", dtype="float32", attention_bias=True)
    return quantized(place / "model", place / "packed", "adpq", 4)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_plain_layers(folder: Path, checkpointing: bool) -> None:
    packed = fewbit.load(folder, device="cpu")
    plain = unpack_modules(fewbit.load(folder, device="cpu"))
    found = []
    for model in (packed, plain):
        model.requires_grad_(False).train()
        bias = model.model.layers[0].self_attn.q_proj.bias.requires_grad_()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        states = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=states).logits.square().mean().backward()
        found.append((states.grad, bias.grad))
    for one, other in zip(*found, strict=True):
        assert float(other.abs().max()) > 0
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_packed_layer_keeps_no_decoded_weight_for_its_gradient(folder: Path, dtype: torch.dtype) -> None:
    layer = fewbit.load(folder, device="cpu").model.layers[0].mlp.up_proj
    x = torch.randn(3, 9, layer.in_features, dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out = layer(x)
    assert (layer.out_features, layer.in_features) not in kept
    out.sum().backward()
    wanted = layer.decode(dtype).sum(0)
    assert x.grad is not None and x.grad.dtype == dtype
    assert torch.allclose(x.grad[0, 0].float(), wanted.float(), rtol=0.05, atol=0.05)


def test_an_adapter_trains(folder: Path) -> None:
    model = fewbit.load(folder, device="cpu").train()
    assert model.hf_quantizer.is_trainable
    model.requires_grad_(False)
    layer = model.model.layers[0].self_attn.q_proj
    down, up = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)
    nn.init.zeros_(up.weight)
    layer.register_forward_hook(lambda _, inputs, out: out + up(down(inputs[0])))
    optimizer = torch.optim.Adam([down.weight, up.weight], lr=0.05)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_a_packed_weight_cannot_be_changed_in_place(folder: Path) -> None:
    layer = fewbit.load(folder, device="cpu").model.layers[0].mlp.up_proj
    before = layer.weight.clone()
    delta = torch.ones_like(before)

    def set_data() -> None:
        layer.weight.data = delta

    def add_to_data() -> None:
        layer.weight.data += delta

    def set_item() -> None:
        layer.weight.data[0] = 0

    changes = (
        set_data,
        add_to_data,
        set_item,
        lambda: layer.weight.add_(delta),
        lambda: layer.weight.data.copy_(delta),
    )
    for change in changes:
        with pytest.raises(FewbitError, match=r"cannot be changed in place: call model\.dequantize\(\) first"):
            change()
    assert torch.equal(layer.weight, before)
    assert type(layer.weight + delta) is type(layer.weight.float() * 2) is torch.Tensor


@pytest.mark.parametrize("where", ["model", "packed"])
def test_a_folder_with_an_adapter_says_so(folder: Path, tmp_path: Path, where: str) -> None:
    import shutil

    place = Path(shutil.copytree(folder.parent / where, tmp_path / "both"))
    (place / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/base"}')
    (place / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(FewbitError, match=r"an adapter lies beside the weights .* model\.load_adapter\(FOLDER\)"):
        fewbit.load(place)
    if where == "model":
        quantized(place, tmp_path / "out")
        assert not list((tmp_path / "out").glob("adapter*"))
        assert packed_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == 14


def test_the_command_line_says_that_an_adapter_stays_out(folder: Path, tmp_path: Path) -> None:
    import shutil

    from conftest import run_cli

    place = Path(shutil.copytree(folder.parent / "model", tmp_path / "both"))
    (place / "adapter_config.json").write_text("{}")
    done = run_cli("quantize", place, tmp_path / "out", "--method", "rtn", "--bits", 8)
    assert "the adapter beside the weights (adapter_config.json) is left out" in done.stderr


def test_an_adapter_alone_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    for use in (fewbit.load, lambda path: quantized(path, tmp_path / "out")):
        with pytest.raises(FewbitError, match=r"an adapter .* not a model: quantize some/base and"):
            use(tmp_path / "adapter")


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


def lora(peft: Any, **changes: Any) -> Any:
    given = {"target_modules": ["q_proj", "up_proj", "down_proj"], "task_type": "CAUSAL_LM", "r": 4, **changes}
    return peft.LoraConfig(**given)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peft_trains_saves_and_loads(peft: Any, folder: Path, tmp_path: Path, checkpointing: bool) -> None:
    model = peft.get_peft_model(fewbit.load(folder, device="cpu"), lora(peft)).train()
    wrapped = [m for m in model.modules() if isinstance(getattr(m, "base_layer", None), PackedLinear)]
    assert len(wrapped) == 6
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval()
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    again = fewbit.load(folder, device="cpu")
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again), wanted)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(fewbit.load(folder, device="cpu")))


@pytest.mark.slow
def test_peft_does_not_merge_into_packed_weights(peft: Any, folder: Path) -> None:
    for merge in ({}, {"safe_merge": True}):
        model = peft.get_peft_model(fewbit.load(folder, device="cpu"), lora(peft, init_lora_weights=False))
        with pytest.raises(FewbitError, match="cannot be changed in place"):
            model.merge_and_unload(**merge)
    plain = fewbit.load(folder, device="cpu").dequantize()
    model = peft.get_peft_model(plain, lora(peft, init_lora_weights=False)).eval()
    wanted = logits(model)
    assert torch.allclose(logits(model.merge_and_unload()), wanted, atol=1e-4)


def test_peft_on_experts_and_tied_heads(peft: Any, tmp_path: Path) -> None:
    build(tmp_path / "model", "mixtral", "float32", num_local_experts=4, num_experts_per_tok=2)
    quantized(tmp_path / "model", tmp_path / "packed", include=("lm_head.weight", "model.embed_tokens.weight"))
    config = lora(peft, target_modules=["q_proj", "o_proj", "lm_head", "embed_tokens"], init_lora_weights=False)
    model = peft.get_peft_model(fewbit.load(tmp_path / "packed", device="cpu"), config).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all(g is not None and torch.isfinite(g).all() for g in gradients)
