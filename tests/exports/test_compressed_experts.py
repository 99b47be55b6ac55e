"""Mixtures of experts in the format compressed-tensors: transformers joins the experts while it loads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, run_cli

import fewbit
from fewbit.recipe import preset
from fewbit.runtime.unpack import unpack

pytest.importorskip("compressed_tensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen 3 with four experts in each of two layers."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(**sizes, **heads, **experts, vocab_size=256, max_position_embeddings=128)
    folder = tmp_path_factory.mktemp("experts") / "model"
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def same_as_unpacked(native: Path, out: Path, plain: Path) -> None:
    """Every weight that transformers reads, and the logits, are those of the unpacked folder."""
    from transformers import AutoModelForCausalLM

    unpack(native, plain)
    ids = torch.arange(16).unsqueeze(0) + 3
    read, states = [], []
    for folder in (plain, out):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        with torch.no_grad():
            read.append(model(ids).logits)
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor), name
    assert torch.equal(*read)


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["signed", "fp8", "mxfp4"])
def test_transformers_reads_the_same_experts(grid: str, model: Path, tmp_path: Path) -> None:
    own: dict[str, Any] = {"bits": 4, "group_size": "32", "scale_format": "bfloat16"} if grid == "signed" else {}
    fewbit.quantize(model, tmp_path / "q", preset("rtn", grid=grid, **own))
    report = fewbit.export(tmp_path / "q", tmp_path / "out", "compressed-tensors")
    assert not any("experts" in note for note in report["notes"])
    same_as_unpacked(tmp_path / "q", tmp_path / "out", tmp_path / "plain")


def test_experts_beside_other_widths(model: Path, tmp_path: Path) -> None:
    own = {"grid": "signed", "bits": 8, "group_size": "32", "scale_format": "bfloat16"}
    recipe = preset("rtn", **own, sets={"*.experts.*": {"bits": 4}})
    fewbit.quantize(model, tmp_path / "q", recipe)
    fewbit.export(tmp_path / "q", tmp_path / "out", "compressed-tensors")
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    targets = {one["weights"]["num_bits"]: one["targets"] for one in groups.values()}
    assert targets[4][0] == r"re:model\.layers\.0\.mlp\.experts\.[0-9]+\.down_proj$"
    assert len(targets[4]) == 6
    assert "model.layers.0.self_attn.q_proj" in targets[8]
    same_as_unpacked(tmp_path / "q", tmp_path / "out", tmp_path / "plain")


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        (("--grid", "nvfp4"), "does not read experts in nvfp4"),
        (("--asymmetric",), "does not read experts in int4 asymmetric"),
        (("--set", "*.experts.1.*:bits=8"), "reads experts only if all are stored alike"),
    ],
)
def test_experts_that_transformers_misreads(choices: tuple[str, ...], says: str, model: Path, tmp_path: Path) -> None:
    done = run_cli("quantize", model, tmp_path / "out", "--for", "transformers", *choices, code=2)
    assert says in done.stderr
    assert not list(tmp_path.iterdir())
    scales = ("--scale-format", "bfloat16") if "--grid" not in choices else ()
    grid = ("--grid", "signed") if "--set" in choices else ()
    run_cli("quantize", model, tmp_path / "q", "--method", "rtn", *scales, *grid, *choices)
    done = run_cli("export", tmp_path / "q", tmp_path / "out", "--format", "compressed-tensors")
    assert says in done.stdout


def test_inputs_of_experts_cannot_be_rounded(model: Path, tmp_path: Path) -> None:
    with pytest.raises(fewbit.FewbitError, match="inputs of experts cannot be rounded: keep them with --exclude"):
        fewbit.quantize(model, tmp_path / "q", "w8a8")
    report = fewbit.quantize(model, tmp_path / "q", "w8a8", exclude=["*.experts.*"])
    assert not any("experts" in layer["name"] for layer in report["layers"])
    with torch.no_grad():
        assert torch.isfinite(fewbit.load(tmp_path / "q")(torch.arange(16).unsqueeze(0) + 3).logits).all()
