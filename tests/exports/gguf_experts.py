"""Tiny mixtures of experts that can be written as GGUF, with tokenizers."""

from pathlib import Path
from typing import Any

from gguf_models import SIZES, byte_tokenizer

_QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_QWEN, "head_dim": 32, "norm_topk_prob": True}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**_QWEN, "shared_expert_intermediate_size": 64}),
}
"""Name of a test's model -> its class, and what differs from SIZES."""


def build_mixture(folder: Path, name: str, dtype: str = "bfloat16", **changes: Any) -> Path:
    """A random model of that architecture, whose norms and biases are no ones and zeros."""
    import torch
    import transformers

    torch.manual_seed(0)
    kind, others = MIXTURES[name]
    kind = getattr(transformers, kind)
    model = kind(kind.config_class(**{**SIZES, **others, **changes})).to(getattr(torch, dtype))
    for tensor in model.parameters():
        if tensor.ndim == 1:
            tensor.data.add_(torch.randn(tensor.shape) * 0.1)
        else:
            tensor.data.mul_(4.0)
    model.save_pretrained(folder)
    byte_tokenizer("qwen2" if name.startswith("qwen") else "llama").save_pretrained(folder)
    return folder
