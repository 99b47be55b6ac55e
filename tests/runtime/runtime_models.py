"""Tiny models for the tests of packed folders, quantized, and what they are compared by."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import fewbit
from fewbit.runtime.packed_linear import PackedLinear
from fewbit.runtime.packed_parameter import Held

IDS = torch.arange(2, 50).view(2, 24)
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build(folder: Path, kind: str = "llama", dtype: str = "bfloat16", shard_size: str = "1GB", **changes: Any) -> Any:
    """A random decoder of a model type, saved in `folder`; returns the model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def quantized(folder: Path, out: Path, method: str = "rtn", bits: int = 8, **changes: Any) -> Path:
    """The folder, quantized in groups of 32; embeddings and heads are kept unless they are asked for."""
    fewbit.quantize(folder, out, fewbit.preset(method, bits=bits, group_size="32", **{"embedding_bits": 16, **changes}))
    return out


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def packed_weights(model: nn.Module) -> int:
    """How many parameters of a model are packed."""
    held = sum(len(module.own) for module in model.modules() if isinstance(module, Held))
    return held + sum(isinstance(module, PackedLinear) for module in model.modules())
