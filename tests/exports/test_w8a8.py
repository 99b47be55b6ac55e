"""Weights and inputs in 8 bits: presets, their folders in our runtime, and as `int-quantized` in the package's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, run_cli
from safetensors.torch import load_file

import fewbit
from fewbit.errors import FewbitError
from fewbit.grids.inputs import round_tokens
from fewbit.linear import Linear
from fewbit.runtime.unpack import unpack, unpack_modules

TEXT = {"calibration": "random-tokens", "samples": 4, "sequence_length": 32}
IDS = torch.arange(24).unsqueeze(0) + 7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return build_tiny(tmp_path_factory.mktemp("w8a8") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native folder of it."""
    out = tmp_path_factory.mktemp("w8a8") / "q"
    fewbit.quantize(model, out, "w8a8", scale_format="bfloat16", embedding_bits=16)
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_rounding_of_tokens() -> None:
    x = torch.randn(2, 3, 40)
    rounded = round_tokens(x, 8)
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    assert torch.allclose(rounded, scale * (x / scale).round(), atol=1e-6)
    assert torch.equal(round_tokens(torch.zeros(1, 8), 8), torch.zeros(1, 8))
    wanted = x.clone().requires_grad_()
    round_tokens(wanted, 8).backward(rounded)
    assert torch.equal(wanted.grad, rounded)
    assert round_tokens(x.bfloat16(), 8).dtype == torch.bfloat16


@torch.no_grad()
def test_our_runtime_rounds_the_inputs(folder: Path) -> None:
    packed = fewbit.load(folder, dtype=torch.float32)
    found = packed(IDS).logits
    plain = unpack_modules(fewbit.load(folder, dtype=torch.float32))
    assert torch.allclose(plain(IDS).logits, found, atol=1e-4)
    layers = [layer for name, layer in plain.named_modules() if "layers." in name and isinstance(layer, Linear)]
    for layer in layers:
        layer._forward_pre_hooks.clear()
    assert not torch.allclose(plain(IDS).logits, found, atol=1e-4)
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs: (round_tokens(inputs[0], 8),))
    assert torch.allclose(plain(IDS).logits, found, atol=1e-4)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert {scheme["input_bits"] for scheme in config["schemes"]} == {8}
    assert config["recipe"]["input_bits"] == 8


def test_smoothing_leaves_the_function(model: Path, tmp_path: Path) -> None:
    """Norms are divided by what the weights are multiplied by."""
    fewbit.quantize(model, tmp_path / "q", "smoothquant", **TEXT, original_inputs=True)
    report = json.loads((tmp_path / "q" / "fewbit_report.json").read_text())
    notes = report["calibration"]["channel_scales"]
    folded = [note for note in notes if note["exponent"] is not None]
    assert [len(note["layers"]) for note in folded] == [3, 2, 3, 2]
    assert {note["exponent"] for note in folded} == {0.5}
    assert {note["reason"] for note in notes if note["exponent"] is None} == {"no foldable norm feeds them"}
    before, after = tensors(model), tensors(tmp_path / "q")
    norm = "model.layers.0.input_layernorm.weight"
    scales = before[norm].float() / after[norm].float()
    assert not torch.allclose(scales, torch.ones_like(scales))
    unpack(tmp_path / "q", tmp_path / "plain")
    name = "model.layers.0.self_attn.q_proj.weight"
    found, wanted = tensors(tmp_path / "plain")[name].float(), before[name].float() * scales
    assert float((found - wanted).square().sum() / wanted.square().sum()) < 1e-3
    plain, original = fewbit.load(tmp_path / "plain"), fewbit.load(model)
    with torch.no_grad():
        assert torch.allclose(plain(IDS).logits.float(), original(IDS).logits.float(), atol=0.1)


def test_smoothing_is_that_of_the_simulation(model: Path, tmp_path: Path) -> None:
    """The largest inputs and weights give the scales: ``s = sqrt(max|X| / max|W|)``."""
    fewbit.quantize(model, tmp_path / "q", "smoothquant", **TEXT, original_inputs=True)
    network, seen = fewbit.load(model), []
    layer = network.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].abs().amax(dim=(0, 1))))
    from fewbit.calibration.choice import choice_from
    from fewbit.checkpoints.source import open_checkpoint
    from fewbit.pipeline.calibration_tokens import calibration_set

    choice = choice_from({"sources": "random-tokens", "samples": 4, "sequence_length": 32})
    with torch.no_grad():
        for ids in calibration_set(open_checkpoint(model), choice, network, None).ids:
            network(ids.unsqueeze(0))
    largest = torch.stack(seen).amax(dim=0).float()
    weights = [getattr(network.model.layers[0].self_attn, f"{one}_proj").weight.float() for one in "qkv"]
    columns = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    norm = "model.layers.0.input_layernorm.weight"
    scales = tensors(model)[norm].float() / tensors(tmp_path / "q")[norm].float()
    # Norms are in bfloat16.
    assert torch.allclose(scales, (largest / columns).sqrt(), rtol=2**-7)


def test_the_same_again(model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        fewbit.quantize(model, tmp_path / name, "smoothquant", **TEXT)
    first, second = (tmp_path / name / "model.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("target", ["transformers", "vllm"])
@pytest.mark.parametrize("method", ["w8a8", "smoothquant"])
def test_targets(method: str, target: str, model: Path, tmp_path: Path) -> None:
    text = ("--calibration", "random-tokens", "--samples", 4, "--sequence-length", 32)
    data = text if method == "smoothquant" else ()
    done = run_cli("quantize", model, tmp_path / "out", "--for", target, "--method", method, *data)
    assert "inputs are rounded to 8 bits per token at run time: vLLM multiplies whole numbers" in done.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    (group,) = config["config_groups"].values()
    assert (group["weights"]["strategy"], group["weights"]["symmetric"]) == ("channel", True)
    inputs = group["input_activations"]
    assert (inputs["num_bits"], inputs["strategy"], inputs["dynamic"]) == (8, "token", True)
    found = tensors(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj"
    assert found[f"{name}.weight"].dtype == torch.int8
    assert found[f"{name}.weight_scale"].shape == (found[f"{name}.weight"].shape[0], 1)
    assert "rounded to 8 bits per token at run time" in (tmp_path / "out" / "README.md").read_text()


@torch.no_grad()
def test_the_package_reads_the_same(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig
    from test_compressed_folder import decoded, loaded, plain, same
    from transformers import AutoModelForCausalLM

    fewbit.export(folder, tmp_path / "out", "compressed-tensors")
    wanted = plain(folder, tmp_path / "plain")
    same(decoded(tmp_path / "out"), wanted)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    known = json.loads(QuantizationConfig.model_validate(config).model_dump_json())
    for key in ("sparsity_config", "transform_config", "version"):
        del config[key]
    assert config == known
    same(loaded(tmp_path / "out"), wanted)
    # It rounds the inputs to 127.5 steps on each side of 0, as it does everywhere; we and vLLM to 127.
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(IDS).logits
    ours = fewbit.load(folder, dtype=torch.float32)(IDS).logits
    unrounded = fewbit.load(tmp_path / "plain", dtype=torch.float32)(IDS).logits
    assert not torch.equal(theirs, unrounded)
    assert (theirs - ours).abs().mean() < 2 * (unrounded - ours).abs().mean()


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"method": "w8a8", "target": "vllm", "bits": 4}, "runs 8 bits where inputs are rounded, not 4"),
        ({"method": "w8a8", "target": "vllm", "group_size": "32"}, "rounded inputs need --group-size row, not 32"),
        ({"method": "w8a8", "target": "vllm", "symmetric": False}, "not zero-point"),
        ({"method": "w8a8", "target": "transformers", "symmetric": False}, "does not hold the grid"),
        ({"method": "w8a8", "target": "vllm", "set": "*.k_proj:input_bits=16"}, "vLLM reads them as one matrix"),
        ({"method": "w8a8", "target": "gptq"}, "--for gptq: has no rounded inputs: use --for transformers or vllm"),
        ({"method": "rtn", "target": "llama.cpp", "input_bits": 8}, "--for llama.cpp: has no rounded inputs"),
        ({"method": "rtn", "input_bits": 4}, "input_bits must be 8 or 16, not 4"),
        ({"method": "smoothquant", "curvature": "gram"}, "smoothquant needs the largest inputs"),
    ],
)
def test_what_cannot_be(choices: dict[str, Any], says: str, model: Path, tmp_path: Path) -> None:
    if "curvature" in choices:
        text = ("--calibration", "random-tokens", "--samples", 2, "--sequence-length", 16)
        run_cli("curvature", model, tmp_path / "gram", "--kind", "gram", *text)
        choices = {**choices, "curvature": tmp_path / "gram"}
    with pytest.raises(FewbitError, match=says):
        fewbit.quantize(model, tmp_path / "out", **choices)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("format", "scales"), [("gguf", "float16"), ("gptq", "float16"), ("mlx", "bfloat16")])
def test_formats_without_rounded_inputs(format: str, scales: str, model: Path, tmp_path: Path) -> None:
    """Though they hold the weights."""
    choices = {"bits": 8, "grid": "symmetric", "group_size": "32", "scale_format": scales, "embedding_bits": 16}
    fewbit.quantize(model, tmp_path / "q", "rtn", **choices)
    fewbit.export(tmp_path / "q", tmp_path / "without", format)
    fewbit.quantize(model, tmp_path / "q8", "w8a8", **choices)
    with pytest.raises(FewbitError, match="has no rounded inputs: use compressed-tensors"):
        fewbit.export(tmp_path / "q8", tmp_path / "out", format)


def test_groups_are_refused_by_the_export(model: Path, tmp_path: Path) -> None:
    fewbit.quantize(model, tmp_path / "q", "w8a8", group_size="32", scale_format="bfloat16")
    with pytest.raises(FewbitError, match="rounded inputs with weights in groups of 32"):
        fewbit.export(tmp_path / "q", tmp_path / "out", "compressed-tensors")
    fewbit.quantize(model, tmp_path / "q4", "w8a8", bits=4)
    with pytest.raises(FewbitError, match="rounded inputs with 4 bits on the symmetric grid"):
        fewbit.export(tmp_path / "q4", tmp_path / "out", "compressed-tensors")


def test_tuning_with_rounded_inputs(folder: Path, model: Path, tmp_path: Path) -> None:
    text = {"calibration": "random-tokens", "samples": 8, "sequence_length": 16}
    report = fewbit.tune(folder, tmp_path / "tuned", reference=str(model), epochs=1, held_out=2, **text)
    assert report["recipe"]["input_bits"] == 8
    assert torch.isfinite(fewbit.load(tmp_path / "tuned")(IDS).logits).all()
