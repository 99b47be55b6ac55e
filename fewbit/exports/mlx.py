"""MLX's affine quantization: ``w = code * scale + bias``, with scales and biases in the model's dtype."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewbit.exports.integer_format import EXPERT, IntegerFormat, Layers, exactly
from fewbit.exports.words import to_words
from fewbit.grids.packing import unpack
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.grids.table import grid_of

_FULL, _SLIDING = "full_attention", "sliding_attention"
_EXPERT_LAYERS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def mlx_tensors(parts: Mapping[str, Tensor], stored: StoredWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a weight: words `(rows, columns * bits / 32)`, scales and biases `(rows, groups)` in `dtype`.

    Raises NotHeldError for scales and biases that `dtype` does not have.
    """
    scheme, (rows, columns) = stored.scheme, stored.shape
    grid = grid_of(scheme)
    values = grid.read(parts, scheme, stored.groups)
    scales = values["scale"].reshape(rows, stored.groups)
    if grid.offset == "minimum":
        biases = values["offset"].reshape(rows, stored.groups).double()
    else:
        zeros = values["offset"].reshape(rows, stored.groups) if grid.offset else 2.0 ** (scheme.whole_bits - 1)
        biases = -(scales.double() * zeros)
    return {
        "weight": to_words(unpack(parts["codes"], scheme.whole_bits, columns), scheme.whole_bits).view(torch.uint32),
        "scales": exactly(scales, dtype, "it has scales"),
        "biases": exactly(biases, dtype, "it has biases"),
    }


def joined_experts(name: str) -> tuple[str, int] | None:
    """Where mlx_lm has a tensor or module of one expert: the name of the one with all experts, and its place in it."""
    found = EXPERT.fullmatch(name)
    if found is None:
        return None
    before, place, layer, end = found.groups()
    return f"{before}.switch_mlp.{_EXPERT_LAYERS.get(layer, layer)}{end or ''}", int(place)


def _name(module: str) -> str:
    joined = joined_experts(module)
    return joined[0] if joined else module


def mlx_config(config: dict[str, Any], layers: Layers) -> dict[str, Any]:
    """The config.json of an MLX folder.

    `quantization` has the bits and group size of most weights, those of any other weight under its name, and false for
    what is kept in 16 bits; `quantization_config` is the same, as mlx_lm writes it.
    """
    sizes = Counter(_size(stored.scheme) for stored in layers.packed.values())
    most = sizes.most_common(1)[0][0]
    described: dict[str, Any] = {"group_size": most[0], "bits": most[1], "mode": "affine"}
    for name, stored in layers.packed.items():
        size = _size(stored.scheme)
        if size != most:
            described[_name(name)] = {"group_size": size[0], "bits": size[1], "mode": "affine"}
    described |= dict.fromkeys(map(_name, (*layers.kept, *layers.tables)), False)
    return {
        **config,
        **_experts(config),
        **_rotary(config),
        "quantization": described,
        "quantization_config": described,
    }


def _experts(config: dict[str, Any]) -> dict[str, Any]:
    """The number of experts under the name that mlx_lm reads, from where newer releases of transformers have it."""
    count = config.get("num_local_experts")
    return {} if count is None or "num_experts" in config else {"num_experts": count}


def _size(scheme: Scheme) -> tuple[int, int]:
    return scheme.group_size, scheme.whole_bits


def _rotary(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embeddings under the names that mlx_lm reads, from where newer releases of transformers have them."""
    found = config.get("rope_parameters")
    if not isinstance(found, dict):
        return {}
    full = found[_FULL] if isinstance(found.get(_FULL), dict) else found
    named: dict[str, Any] = {}
    if "rope_theta" in full:
        named["rope_theta"] = full["rope_theta"]
    if full.get("rope_type", "default") != "default":
        named["rope_scaling"] = {key: value for key, value in full.items() if key != "rope_theta"}
    local = found.get(_SLIDING)
    if isinstance(local, dict) and "rope_theta" in local:
        named["rope_local_base_freq"] = local["rope_theta"]
    return {key: value for key, value in named.items() if config.get(key) is None}


MLX = IntegerFormat(
    "mlx",
    "MLX",
    "a folder for MLX on Apple computers",
    (2, 3, 4, 5, 6, 8),
    ("minimum", "signed", "symmetric", "zero-point"),
    (32, 64, 128),
    ("float16", "bfloat16"),
    mlx_tensors,
    mlx_config,
    in_model_dtype=True,
    joined=joined_experts,
)
