"""Architectures as llama.cpp names them: metadata, and how their tensors differ from Hugging Face checkpoints.

One row of ARCHITECTURES per architecture. A row also says what llama.cpp takes for granted, so that a model that
differs is refused: it would load, and compute something else.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import FewbitError

Config = Mapping[str, Any]
Facts = dict[str, Any]
"""Metadata keys after the name of the architecture -> values; None is left out."""


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    name: llama.cpp's. types: of config.json. facts(config): its metadata, besides what all have. heads(name, config):
    the number of heads whose rows llama.cpp has in another order, or 0. norm_offset: what is added to the weights of
    norms. tensors(config): tensors that are in GGUF only. refuses(config): what llama.cpp does not compute, or None.
    """

    name: str
    types: tuple[str, ...]
    facts: Callable[[Config], Facts]
    heads: Callable[[str, Config], int] = lambda name, config: 0
    norm_offset: float = 0.0
    tensors: Callable[[Config], dict[str, Tensor]] = lambda config: {}
    refuses: Callable[[Config], str | None] = lambda config: None


def head_size(config: Config) -> int:
    """Columns of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_of(config: Config, layers: str = "full_attention") -> dict[str, Any]:
    """The rotary embedding's parameters: theta, type, and those of its type.

    They are in `rope_parameters`, by kind of layer if there are several, or in `rope_theta` and `rope_scaling`.
    """
    found = config.get("rope_parameters")
    if isinstance(found, dict):
        chosen = found.get(layers, found)
        return {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": "default", **chosen}
    scaling = config.get("rope_scaling") or {}
    return {
        "rope_theta": config.get("rope_theta", 10000.0),
        **scaling,
        "rope_type": scaling.get("rope_type", scaling.get("type", "default")),
    }


def _heads(config: Config) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def common_facts(config: Config) -> Facts:
    """What all architectures have."""
    rope, size = rope_of(config), head_size(config)
    return {
        "block_count": int(config["num_hidden_layers"]),
        "context_length": int(config["max_position_embeddings"]),
        "embedding_length": int(config["hidden_size"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": int(config["num_attention_heads"]),
        "attention.head_count_kv": _heads(config),
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "rope.dimension_count": int(size * float(rope.get("partial_rotary_factor") or 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": int(config["vocab_size"]),
        **_scaling(config, rope),
    }


def _scaling(config: Config, rope: dict[str, Any]) -> Facts:
    kind = rope["rope_type"]
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if kind == "yarn":
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(original or config["max_position_embeddings"]),
        }
    return {}


def _rope_problem(*known: str) -> Callable[[Config], str | None]:
    def refuses(config: Config) -> str | None:
        rope = rope_of(config)
        kind = rope["rope_type"]
        if kind not in ("default", *known):
            return f"a rotary embedding of the type {kind}"
        return _yarn_problem(rope) if kind == "yarn" else None

    return refuses


def _yarn_problem(rope: dict[str, Any]) -> str | None:
    """A parameter of YaRN that is not in a file, and differs from what llama.cpp takes for granted."""
    usual = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "mscale": None, "mscale_all_dim": None}
    usual["attention_factor"] = 1.0 + 0.1 * math.log(max(float(rope["factor"]), 1.0))
    for key, value in usual.items():
        found = rope.get(key)
        if found is not None and (value is None or not math.isclose(float(found), float(value), rel_tol=1e-5)):
            return f"a rotary embedding of the type yarn with {key} {found}"
    return None


def _first(*checks: Callable[[Config], str | None]) -> Callable[[Config], str | None]:
    return lambda config: next((said for check in checks if (said := check(config))), None)


def _needs_silu(config: Config) -> str | None:
    found = config.get("hidden_act", "silu")
    return None if found in ("silu", "swish") else f"the activation {found}"


def _no_window(config: Config) -> str | None:
    used = config.get("sliding_window") and config.get("use_sliding_window", True)
    reaches = int(config.get("sliding_window") or 0) >= int(config["max_position_embeddings"])
    return "a sliding window" if used and not reaches else None


def _llama_heads(name: str, config: Config) -> int:
    """llama.cpp rotates neighbouring pairs, transformers the two halves of a head: rows of q and k are reordered."""
    if ".q_proj." in name:
        return int(config["num_attention_heads"])
    return _heads(config) if ".k_proj." in name else 0


def _llama3_frequencies(config: Config) -> dict[str, Tensor]:
    """The divisors of the frequencies of Llama 3.1's rotary embedding."""
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return {}
    size = head_size(config)
    frequencies = float(rope["rope_theta"]) ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rope["original_max_position_embeddings"])
    wavelength = 2 * math.pi / frequencies
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": 1.0 / ((1 - smooth) / factor + smooth)}


def _gemma3_facts(config: Config) -> Facts:
    pattern = [kind == "sliding_attention" for kind in _layer_types(config)]
    window = config.get("sliding_window")
    return {
        "attention.sliding_window": int(window) if window and any(pattern) else None,
        "final_logit_softcapping": config.get("final_logit_softcapping"),
    }


def _layer_types(config: Config) -> Sequence[str]:
    every = int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6)
    made = [
        "full_attention" if (index + 1) % every == 0 else "sliding_attention"
        for index in range(int(config["num_hidden_layers"]))
    ]
    return config.get("layer_types") or made


def _gemma3_problem(config: Config) -> str | None:
    kinds = _layer_types(config)
    regular = all((kind == "full_attention") == ((index + 1) % 6 == 0) for index, kind in enumerate(kinds))
    scale, activation = config.get("query_pre_attn_scalar", 256), config.get("hidden_activation", "gelu_pytorch_tanh")
    local = rope_of(config, "sliding_attention")["rope_theta"] if "rope_parameters" in config else None
    local = config.get("rope_local_base_freq", 10000.0) if local is None else local
    problems = (
        (not regular, "sliding windows that are not in five layers of six"),
        (scale != head_size(config), f"queries scaled by {scale} instead of the head size {head_size(config)}"),
        (activation != "gelu_pytorch_tanh", f"the activation {activation}"),
        (float(local) != 10000.0, f"a rotary base of {local} in layers with a sliding window"),
        (bool(config.get("attn_logit_softcapping")), "attn_logit_softcapping"),
        (bool(config.get("use_bidirectional_attention")), "bidirectional attention"),
    )
    return next((what for wrong, what in problems if wrong), None)


def _phi3_facts(config: Config) -> Facts:
    original = config.get("original_max_position_embeddings") or config["max_position_embeddings"]
    facts: Facts = {
        "rope.scaling.original_context_length": int(original),
        "attention.sliding_window": int(config.get("sliding_window") or 0),
    }
    if rope_of(config)["rope_type"] == "longrope":
        ratio = int(config["max_position_embeddings"]) / int(original)
        facts["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    return facts


def _phi3_factors(config: Config) -> dict[str, Tensor]:
    rope = rope_of(config)
    if rope["rope_type"] != "longrope":
        return {}
    return {
        f"rope_factors_{which}.weight": torch.tensor(rope[f"{which}_factor"], dtype=torch.float32)
        for which in ("long", "short")
    }


def experts_of(config: Config) -> int:
    """How many experts a layer has."""
    return int(config.get("num_local_experts") or config.get("num_experts") or 0)


def _expert_facts(config: Config) -> Facts:
    shared, own = config.get("shared_expert_intermediate_size"), config.get("moe_intermediate_size")
    return {
        "expert_count": experts_of(config),
        "expert_used_count": int(config["num_experts_per_tok"]),
        "expert_feed_forward_length": int(own) if own else None,
        "expert_shared_feed_forward_length": int(shared) if shared else None,
    }


def _needs_experts(normalized: bool) -> Callable[[Config], str | None]:
    """normalized: llama.cpp divides the weights of a token's experts by their sum, or never does."""

    def refuses(config: Config) -> str | None:
        if int(config.get("decoder_sparse_step") or 1) != 1 or config.get("mlp_only_layers"):
            return "layers without experts"
        if bool(config.get("norm_topk_prob", False)) != normalized:
            return f"norm_topk_prob {not normalized}"
        return None

    return refuses


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        "llama",
        ("llama", "mistral"),
        lambda config: {},
        refuses=_first(_rope_problem("linear", "yarn", "llama3"), _needs_silu, _no_window),
        heads=_llama_heads,
        tensors=_llama3_frequencies,
    ),
    Architecture(
        "llama",
        ("mixtral",),
        _expert_facts,
        refuses=_first(_rope_problem("linear", "yarn"), _needs_silu, _no_window),
        heads=_llama_heads,
    ),
    Architecture(
        "qwen2moe",
        ("qwen2_moe",),
        _expert_facts,
        refuses=_first(_rope_problem("yarn"), _needs_silu, _no_window, _needs_experts(normalized=False)),
    ),
    Architecture(
        "qwen3moe",
        ("qwen3_moe",),
        _expert_facts,
        refuses=_first(_rope_problem("yarn"), _needs_silu, _no_window, _needs_experts(normalized=True)),
    ),
    Architecture(
        "qwen2", ("qwen2",), lambda config: {}, refuses=_first(_rope_problem("yarn"), _needs_silu, _no_window)
    ),
    Architecture(
        "qwen3", ("qwen3",), lambda config: {}, refuses=_first(_rope_problem("yarn"), _needs_silu, _no_window)
    ),
    Architecture(
        "gemma3",
        ("gemma3_text",),
        _gemma3_facts,
        norm_offset=1.0,
        refuses=_first(_rope_problem("linear"), _gemma3_problem),
    ),
    Architecture(
        "phi3", ("phi3",), _phi3_facts, tensors=_phi3_factors, refuses=_first(_rope_problem("longrope"), _needs_silu)
    ),
)


def architecture_of(config: Config, where: str) -> Architecture:
    """The architecture of a model. Raises FewbitError if llama.cpp does not know it, or computes it otherwise."""
    kind = config.get("model_type")
    found = next((one for one in ARCHITECTURES if kind in one.types), None)
    if found is None:
        known = ", ".join(name for one in ARCHITECTURES for name in one.types)
        raise FewbitError(f"{where}: models of the type {kind} cannot be written as GGUF, only {known}")
    try:
        wrong = found.refuses(config)
    except (KeyError, TypeError, ValueError) as error:
        raise FewbitError(f"{where}: config.json lacks what GGUF needs ({error}): fetch the model again") from error
    if wrong:
        raise FewbitError(f"{where}: llama.cpp does not know {wrong} in models of the type {kind}")
    return found


def metadata(found: Architecture, config: Config, where: str) -> Iterator[tuple[str, Any]]:
    """Keys and values of the metadata. Raises FewbitError if config.json lacks one."""
    try:
        facts = {**common_facts(config), **found.facts(config)}
    except (KeyError, TypeError, ValueError) as error:
        raise FewbitError(f"{where}: config.json lacks what GGUF needs ({error}): fetch the model again") from error
    yield from ((f"{found.name}.{key}", value) for key, value in facts.items() if value is not None)


def reordered(rows: Tensor, heads: int) -> Tensor:
    """Rows of a head `(2, half)` -> `(half, 2)`, for a tensor whose first dimension is `heads` heads."""
    if not heads:
        return rows
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).transpose(1, 2).reshape(shape)
