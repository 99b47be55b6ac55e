"""Tiny models in llama.cpp itself: what transformers computes from the same 16-bit weights, and files in parts.

Needs a Python that has the wheel `xllamacpp` and NumPy, in the variable LLAMA_CPP_PYTHON: `make test-interop` sets it.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_experts import MIXTURES, build_mixture
from gguf_models import ARCHITECTURES, build

import fewbit
from fewbit.checkpoints.source import open_checkpoint
from fewbit.exports.gguf_file import write_gguf

PYTHON = os.environ.get("LLAMA_CPP_PYTHON")
RUNNER = Path(__file__).parents[2] / "benchmarks/llama_cpp_runner.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="LLAMA_CPP_PYTHON names no Python with xllamacpp"),
]
TOKENS = [(7 * index * index + 3) % 250 + 4 for index in range(24)]


def losses(file: Path) -> torch.Tensor:
    """llama.cpp's losses of TOKENS."""
    requests = file.with_suffix(".json")
    requests.write_text(json.dumps([{"tokens": TOKENS}]))
    done = subprocess.run([str(PYTHON), RUNNER, file, requests], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.tensor(json.loads(done.stdout.splitlines()[-1])["answers"][0]["nll"], dtype=torch.float64)


@torch.no_grad()
def expected(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(torch.tensor([TOKENS])).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(TOKENS[1:]), reduction="none")


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MIXTURES])
def test_the_same_losses(name: str, tmp_path: Path) -> None:
    made: Any = build_mixture if name in MIXTURES else build
    # llama.cpp rounds the inputs of layers in bfloat16 to bfloat16, of layers in float32 not.
    folder = made(tmp_path / "model", name, "float32")
    fewbit.export(folder, tmp_path / "out")
    ours, theirs = expected(folder), losses(tmp_path / "out" / "out.gguf")
    assert float((ours - theirs).abs().max()) < 0.02
    assert float((ours - theirs).mean().abs()) < 0.002


def test_a_file_in_parts(tmp_path: Path) -> None:
    folder = build(tmp_path / "model", "qwen2", "float32")
    whole = write_gguf(open_checkpoint(folder), lambda name: tmp_path / name, "whole")
    parts = write_gguf(open_checkpoint(folder), lambda name: tmp_path / name, "part", largest=100_000)
    assert len(parts["files"]) > 2
    assert torch.equal(losses(tmp_path / whole["file"]), losses(tmp_path / parts["file"]))
