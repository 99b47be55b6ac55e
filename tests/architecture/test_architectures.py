"""Every architecture by structure: a tiny random model of each, calibrated end to end through the real loaders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.run import RunOptions

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "mistral": {**SMALL, "sliding_window": 16},
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 8},
    "gemma2": {**SMALL, "head_dim": 8, "sliding_window": 16},
    "gemma3_text": {**SMALL, "head_dim": 8, "sliding_window": 16},
    "phi3": SMALL,
    "opt": {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64, "bos_token_id": 1},
    "gpt_neox": SMALL,
    "falcon": {**SMALL, "new_decoder_architecture": False, "multi_query": True},
    "mixtral": {**SMALL, **EXPERTS},
    "qwen3_moe": {**SMALL, **EXPERTS, "head_dim": 8},
}
CHOICE = CalibrationOptions(CalibrationChoice("random-tokens", samples=4, sequence_length=32))


def build(name: str, folder: Path, **more: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    # As many rows as the byte tokenizer of some tests has tokens.
    values = {**ARCHITECTURES[name], **more}
    config = AutoConfig.for_model(name, **values)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            # Some architectures begin with biases of 0, which would hide a lost bias.
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(request.param, tmp_path_factory.mktemp("architecture") / request.param)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "precal+oac"])
def test_calibrated(model: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out"
    recipe = fewbit.preset(method, bits=8, group_size="16")
    report = fewbit.quantize(model, out, recipe, RunOptions(calibration=CHOICE))
    assert report["output"]["weights_quantized"] > 0
    paths = {record["path"] for record in report["layers"]}
    assert paths <= {"solved", "rounded: no input seen", "rounded: no input seen; solved"}
    for kind in {record["name"].rsplit(".", 2)[-2] for record in report["layers"]}:
        assert any("solved" in r["path"] for r in report["layers"] if f".{kind}." in r["name"]), kind
    assert max(record["relative_squared_error"] for record in report["layers"]) < 1e-3
    ids = torch.randint(3, 128, (1, 24), generator=torch.Generator().manual_seed(2))
    plain = fewbit.load(model, device="cpu")
    try:
        packed = fewbit.load(out, device="cpu")
    except fewbit.FewbitError as error:
        # Fused experts cannot run packed yet; the error says how to run them.
        assert "fewbit unpack" in str(error)
        from fewbit.runtime.unpack import unpack

        packed = fewbit.load(unpack(out, tmp_path / "plain"), device="cpu")
    with torch.inference_mode():
        expected, found = plain(ids).logits.float(), packed(ids).logits.float()
    assert float((expected - found).norm() / expected.norm()) < 0.05
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert len(config["weights"]) == len(report["layers"]) + len(report["embeddings"])


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def fused(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with all experts of a block in one tensor, as newer models are stored."""
    from safetensors.torch import save_file

    folder = build(request.param, tmp_path_factory.mktemp("fused") / request.param)
    weights = {name: tensor.clone() for name, tensor in fewbit.load(folder, device="cpu").state_dict().items()}
    assert sum(tensor.dim() == 3 for tensor in weights.values()) == 4
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "oac", "spqr", "awq"])
def test_fused_experts(fused: Path, tmp_path: Path, method: str) -> None:
    from fewbit.runtime.unpack import unpack

    recipe = fewbit.preset(method, bits=8, group_size="16")
    report = fewbit.quantize(fused, tmp_path / "out", recipe, RunOptions(calibration=CHOICE))
    experts = [record for record in report["layers"] if ".experts." in record["name"]]
    assert len(experts) == 4 and max(record["relative_squared_error"] for record in experts) < 1e-3
    ids = torch.randint(3, 128, (1, 24), generator=torch.Generator().manual_seed(2))
    plain, found = (fewbit.load(f, device="cpu") for f in (fused, unpack(tmp_path / "out", tmp_path / "plain")))
    with torch.inference_mode():
        expected, logits = plain(ids).logits.float(), found(ids).logits.float()
    assert float((expected - logits).norm() / expected.norm()) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "oac"])
def test_experts_that_saw_no_token_are_rounded_and_named(fused: Path, method: str) -> None:
    few = CalibrationOptions(CalibrationChoice("random-tokens", samples=1, sequence_length=2), max_fallback=99)
    recipe = fewbit.preset(method, bits=8, group_size="16")
    report = fewbit.quantize(fused, None, recipe, RunOptions(report_only=True, calibration=few))
    experts = [record for record in report["layers"] if ".experts." in record["name"]]
    # Two experts a token: with two tokens, and for the Fisher one that has a target, not all of four have any.
    without = [record["experts_without_input"] for record in experts if "experts_without_input" in record]
    assert without and all(set(found) < set(range(4)) for found in without)
    assert all("rounded: no input seen" in r["path"] for r in experts if "experts_without_input" in r)


def test_planes_of_bits_hold_no_fused_experts(fused: Path, tmp_path: Path) -> None:
    with pytest.raises(fewbit.FewbitError, match="experts fused in one tensor cannot be stored with this grid: choose"):
        fewbit.quantize(fused, tmp_path / "out", fewbit.preset("billm"), RunOptions(calibration=CHOICE))
