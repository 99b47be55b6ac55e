"""A loader that does not know the format stops at a packed folder; one that knows it passes over the guards."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runtime_models import build, quantized
from safetensors.torch import load_file

import fewbit

LOAD = """
import sys
from transformers import AutoModelForCausalLM
assert "fewbit" not in sys.modules
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        print("ignore_mismatched_sizes" in str(error))
"""


EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS = (("llama", 8), ("llama", 4), ("qwen3_moe", 8), ("gpt_oss", 8))


@pytest.mark.slow
def test_without_the_format_nothing_loads(tmp_path: Path) -> None:
    folders = []
    for kind, bits in KINDS:
        model, packed = tmp_path / f"{kind}-{bits}", tmp_path / f"{kind}-{bits}-packed"
        build(model, kind, **(EXPERTS if kind != "llama" else {}))
        quantized(model, packed, bits=bits)
        ids = torch.arange(20).unsqueeze(0) + 3
        assert bool(torch.isfinite(fewbit.load(packed, device="cpu")(ids).logits).all())
        folders.append(str(packed))
    found = subprocess.run([sys.executable, "-c", LOAD, *folders], capture_output=True, text=True)
    assert found.stdout.split() == ["True"] * len(KINDS), found.stderr


def test_a_saved_model_keeps_its_guards(tmp_path: Path) -> None:
    build(tmp_path / "model")
    quantized(tmp_path / "model", tmp_path / "packed", "adpq+", bits=3)
    fewbit.load(tmp_path / "packed", device="cpu").save_pretrained(tmp_path / "saved")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("packed", "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    guards = [name for name, tensor in after.items() if tuple(tensor.shape) == (0,)]
    assert len(guards) == 14
