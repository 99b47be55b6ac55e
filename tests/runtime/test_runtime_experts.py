"""Mixtures of experts run packed, whatever way the checkpoint stores them and transformers computes them."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from runtime_models import IDS, build, logits, packed_weights, quantized
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.runtime.packed_parameter import Held, PackedParameter
from fewbit.runtime.unpack import unpack, unpack_modules
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.run import TuneOptions, tune

# Model type: what its config needs, packed parameters of two blocks, tensors that the test keeps.
MIXTURES: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "qwen3_moe": ({"moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2}, 12, ()),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, 12, ()),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2}, 12, ("*_bias",)),
    "granitemoe": ({"num_local_experts": 4, "num_experts_per_tok": 2}, 12, ("*.router.*",)),
}


def made(folder: Path, kind: str, method: str = "adpq", bits: int = 4, **changes: Any) -> Path:
    needs, _, kept = MIXTURES[kind]
    build(folder / "model", kind, **{**needs, **changes})
    byte_tokenizer().save_pretrained(folder / "model")
    return quantized(folder / "model", folder / "packed", method, bits, exclude=kept)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXTURES)
def test_packed_logits_are_those_of_unpacked_weights_bit_for_bit(kind: str, tmp_path: Path) -> None:
    packed = fewbit.load(made(tmp_path, kind), device="cpu")
    plain = unpack_modules(fewbit.load(tmp_path / "packed", device="cpu"))
    original = fewbit.load(tmp_path / "model", device="cpu")
    assert packed_weights(packed) == MIXTURES[kind][1]
    assert packed_weights(plain) == 0
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in original.named_parameters()}
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        for model in (packed, plain):
            model.set_experts_implementation(implementation)
        # Of one token some experts get nothing, and are not decoded where each is packed by itself.
        for ids in (IDS, IDS[:1, :1]):
            found, wanted = logits(packed, ids), logits(plain, ids)
            # Kernels sum the products of few tokens in another order.
            limit = 0.0 if ids.numel() > 8 else 0.02
            assert torch.allclose(found, wanted, rtol=limit, atol=limit), implementation
    assert torch.equal(*(model.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False) for model in (packed, plain)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_an_unpacked_folder_gives_the_packed_logits(kind: str, tmp_path: Path) -> None:
    packed = fewbit.load(made(tmp_path, kind), device="cpu")
    plain = fewbit.load(unpack(tmp_path / "packed", tmp_path / "plain"), device="cpu")
    assert torch.equal(logits(packed), logits(plain))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "plain"))
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}


@pytest.mark.slow
def test_experts_that_the_checkpoint_stores_fused_run_in_a_network_that_merges_others(tmp_path: Path) -> None:
    needs, _, _ = MIXTURES["qwen3_moe"]
    build(tmp_path / "apart", "qwen3_moe", **needs)
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "apart")
    fused.save_pretrained(tmp_path / "fused", save_original_format=False)
    names = load_file(tmp_path / "fused" / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    one = fewbit.load(quantized(tmp_path / "apart", tmp_path / "apart-q"), device="cpu")
    other = fewbit.load(quantized(tmp_path / "fused", tmp_path / "fused-q"), device="cpu")
    assert packed_weights(one) == packed_weights(other) == 12
    assert torch.equal(logits(one), logits(other))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "needs"),
    [
        # Experts as a 3-D `.weight`, and stored (experts, in, out).
        ("jetmoe", {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
        ("llama4_text", {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}),
    ],
)
def test_other_layouts_of_experts(kind: str, needs: dict[str, Any], tmp_path: Path) -> None:
    build(tmp_path / "model", kind, **needs)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    stacks = tuple(name for name, tensor in tensors.items() if tensor.dim() == 3)
    quantized(
        tmp_path / "model", tmp_path / "packed", include=stacks, exclude=tuple(n for n in tensors if n not in stacks)
    )
    packed, plain = (fewbit.load(tmp_path / "packed", device="cpu") for _ in range(2))
    assert packed_weights(packed) == len(stacks) > 0
    plain.dequantize().save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(packed), logits(plain))
    after = load_file(tmp_path / "plain" / "model.safetensors")
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in tensors.items()}
    assert all(float((after[n].float() - tensors[n].float()).abs().max()) < 0.01 for n in stacks)


def test_some_experts_may_be_kept(tmp_path: Path) -> None:
    needs, _, _ = MIXTURES["mixtral"]
    build(tmp_path / "model", "mixtral", **needs)
    kept = ("*.experts.1.*", "model.layers.1.*.w2.weight")
    packed = fewbit.load(quantized(tmp_path / "model", tmp_path / "packed", exclude=kept), device="cpu")
    plain = fewbit.load(unpack(tmp_path / "packed", tmp_path / "plain"), device="cpu")
    assert torch.equal(logits(packed), logits(plain))
    packed.save_pretrained(tmp_path / "again")
    assert same_tensors(tmp_path / "again", tmp_path / "packed")


def same_tensors(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXTURES)
def test_saving_gives_the_folder_again_and_dequantizing_the_original_s_names(kind: str, tmp_path: Path) -> None:
    made(tmp_path, kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "again")
    assert same_tensors(tmp_path / "again", tmp_path / "packed")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("again", "packed")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    before = logits(model)
    model.dequantize()
    assert packed_weights(model) == 0
    assert torch.equal(before, logits(model))
    model.save_pretrained(tmp_path / "plain")
    original, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "plain"))
    assert {n: t.shape for n, t in original.items()} == {n: t.shape for n, t in plain.items()}
    assert torch.equal(before, logits(fewbit.load(tmp_path / "plain", device="cpu")))


def test_only_the_experts_that_are_used_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fewbit.load(made(tmp_path, "qwen3_moe"), device="cpu")
    asked: list[int] = []
    plain = PackedParameter.forward

    def forward(self: Any, experts: Any = None, dtype: Any = None) -> torch.Tensor:
        asked.append(len(experts))
        return plain(self, experts, dtype)

    monkeypatch.setattr(PackedParameter, "forward", forward)
    logits(model, IDS[:1, :1])
    # Once for each of two parameters in two blocks, however often a forward pass looks at them.
    assert asked == [2, 2, 2, 2]


@pytest.mark.slow
def test_gradients_pass_and_no_decoded_weight_is_kept_for_them(tmp_path: Path) -> None:
    packed = fewbit.load(made(tmp_path, "mixtral", dtype="float32"), device="cpu")
    plain = unpack_modules(fewbit.load(tmp_path / "packed", device="cpu"))
    gradients, kept = [], []
    for model in (packed, plain):
        model.requires_grad_(False)
        states = model.get_input_embeddings()(IDS).detach().requires_grad_()
        sizes: list[int] = []

        def note(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel() if tensor.dim() > 1 and tensor.shape[0] == 4 else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(inputs_embeds=states).logits.square().sum().backward()
        gradients.append(states.grad)
        kept.append(max(sizes))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)
    assert kept[0] < 4 * 128 * 64


def test_a_packed_mixture_is_copied_and_pickled(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made(tmp_path, "granitemoe"))
    wanted = logits(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(logits(other), wanted)
        experts = other.model.layers[0].block_sparse_moe.experts
        assert (
            isinstance(experts.held, Held) and experts.held is not model.model.layers[0].block_sparse_moe.experts.held
        )
    assert logits(model.to(torch.float32)).dtype == torch.float32


def plain_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("train", ["all", "scales"])
def test_a_tuned_mixture_reports_its_own_errors(kind: str, train: str, tmp_path: Path) -> None:
    made(tmp_path, kind, "adpq+", 2, dtype="float32", vocab_size=256)
    choice = TuningChoice(epochs=1, lr=0.5, scale_lr=0.1, held_out=0, batch_size=2, train=train)
    text = CalibrationChoice("random-tokens", samples=4, sequence_length=32)
    report = tune(tmp_path / "packed", tmp_path / "tuned", choice, TuneOptions(calibration=text, device="cpu"))
    started = json.loads((tmp_path / "packed" / "fewbit_report.json").read_text())
    plain, original = plain_tensors(unpack(tmp_path / "tuned", tmp_path / "plain")), plain_tensors(tmp_path / "model")
    assert [layer["name"] for layer in report["layers"]] == [layer["name"] for layer in started["layers"]]
    for before, layer in zip(started["layers"], report["layers"], strict=True):
        name = layer["name"]
        assert layer.keys() == before.keys() and layer["shape"] == list(original[name].shape)
        error, norm = (plain[name] - original[name]).square(), original[name].square()
        if kind == "gpt_oss" and norm.dim() == 3:
            error, norm = error.mT, norm.mT
        shares = error.reshape(-1, 32).sum(dim=1) / norm.reshape(-1, 32).sum(dim=1)
        assert layer["relative_squared_error"] == pytest.approx(float(error.sum() / norm.sum()), rel=1e-3), name
        assert layer["mean_group_error"] == pytest.approx(float(shares.mean()), rel=1e-3), name
        assert layer["worst_group_error"] == pytest.approx(float(shares.max()), rel=1e-3), name
        assert layer["relative_squared_error"] != before["relative_squared_error"], name


@pytest.mark.slow
def test_packed_experts_are_tuned_and_evaluated(tmp_path: Path) -> None:
    made(tmp_path, "qwen3_moe", "rtn", 3, dtype="float32", vocab_size=256)
    text = CalibrationChoice("random-tokens", samples=8, sequence_length=32)
    choice = TuningChoice(epochs=2, lr=0.05, held_out=2, batch_size=2)
    report = tune(tmp_path / "packed", tmp_path / "tuned", choice, TuneOptions(calibration=text, device="cpu"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "tuned"))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(".experts.5.down_proj." in name for name in moved)
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    assert torch.isfinite(logits(fewbit.load(tmp_path / "tuned", device="cpu"))).all()
    assert report["tuning"]["history"]
    (tmp_path / "text.txt").write_text("the same words over and over again " * 40)
    rows = fewbit.evaluate([tmp_path / "packed", tmp_path / "tuned"], tmp_path / "text.txt")["models"]
    assert all(row["perplexity"] > 1 for row in rows)
