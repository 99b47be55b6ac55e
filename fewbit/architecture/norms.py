"""Find the norm before a linear layer. Without calibration data, its gains are used instead of input statistics."""

import re
from typing import Any

from fewbit.architecture.block_lists import place_of
from fewbit.checkpoints.safetensors_io import TensorEntry

_ATTENTION_INPUT = re.compile(r"\.(q_proj|k_proj|v_proj|qkv_proj|query_key_value|c_attn|W_pack)\.weight$")
_MLP_INPUT = re.compile(r"\.(gate_proj|up_proj|gate_up_proj|fc1|c_fc|dense_h_to_4h|w1|w3)\.weight$")
_ATTENTION_NORMS: tuple[str, ...] = ("input_layernorm", "self_attn_layer_norm", "ln_1", "attn_norm")
_MLP_NORMS: tuple[str, ...] = (
    "pre_feedforward_layernorm",
    "post_attention_layernorm",
    "final_layer_norm",
    "ln_2",
    "ffn_norm",
)
_CENTRED = re.compile(r"gemma|recurrent_gemma|t5gemma|vaultgemma|qwen3_next|qwen3_5|qwen4_exp|minimax_m3|muse_|step3p7")


def gain_before(name: str, entries: dict[str, TensorEntry]) -> TensorEntry | None:
    """The gain of the norm whose output is the input of linear layer `name`; None if no such norm is known."""
    place = place_of(name)
    if place is None:
        return None
    if _ATTENTION_INPUT.search(name):
        candidates = _ATTENTION_NORMS
    elif _MLP_INPUT.search(name):
        candidates = _MLP_NORMS
    else:
        return None
    for norm in candidates:
        entry = entries.get(f"{place.prefix}.{place.number}.{norm}.weight")
        if entry is not None and len(entry.shape) == 1:
            return entry
    return None


def gain_offset(config: dict[str, Any]) -> float:
    """The number that the architecture adds to a stored gain: Gemma and some others store gain - 1."""
    return 1.0 if _CENTRED.match(str(config.get("model_type", ""))) else 0.0
