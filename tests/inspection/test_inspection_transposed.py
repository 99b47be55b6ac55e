"""Inspecting a model whose matrices are stored as (in, out)."""

from pathlib import Path

import pytest
import torch

import fewbit


def test_a_quantized_gpt2_is_compared_with_its_original(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=256, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    report = fewbit.quantize(tmp_path / "model", tmp_path / "q", fewbit.preset("rtn", bits=4, group_size="32"))
    rows = {row["name"]: row for row in fewbit.inspect(tmp_path / "q")["tensors"]}
    for layer in report["layers"]:
        row = rows[layer["name"]]
        assert row["shape"] == layer["shape"]
        assert row["relative_squared_error"] == pytest.approx(layer["relative_squared_error"], rel=1e-3)
        assert row["jensen_shannon_bits"] > 0
