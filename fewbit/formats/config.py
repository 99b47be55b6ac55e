"""Read and check the `quantization_config` of a native folder."""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from fewbit.checkpoints.source import Checkpoint
from fewbit.errors import FewbitError
from fewbit.formats.native import READ_VERSIONS, check_scheme, part_layout, stored_bytes
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.grids.table import grid_of
from fewbit.printable import first_line, one_line
from fewbit.transforms.table import TRANSFORMS


class _Weight(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    scheme: NonNegativeInt
    shape: list[PositiveInt]
    outliers: NonNegativeInt = 0
    positions: str = "none"
    transposed: bool = False
    original_shape: list[PositiveInt] | None = None


class _Recipe(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    method: str = "fewbit"
    bits: float | None = None
    transform: str | None = None
    channel_scales: str | None = None
    """The transform in folders of earlier versions."""


class _Config(BaseModel):
    quant_method: str
    format_version: int
    schemes: list[dict[str, Any]]
    weights: dict[str, _Weight]
    embeddings: list[str] = []
    tied: dict[str, str] = {}
    recipe: _Recipe | None = None


def weights_of(checkpoint: Checkpoint) -> dict[str, StoredWeight]:
    """As :func:`read_weights`, for a quantized folder; errors name the folder."""
    try:
        return read_weights(checkpoint.quantization or {})
    except FewbitError as error:
        raise FewbitError(f"{checkpoint.folder}: {error}") from error


def tables_of(checkpoint: Checkpoint) -> frozenset[str]:
    """The packed weights of a native folder that are embeddings or heads; its config was read with :func:`weights_of`.

    They are not counted in its bits per weight.
    """
    return frozenset((checkpoint.quantization or {}).get("embeddings", ()))


def tied_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensors of the original that a native folder lacks -> the tensor that they are tied to and equal to."""
    return dict((checkpoint.quantization or {}).get("tied", {}))


def recipe_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The recipe in the config of a native folder; empty if there is none. Raises FewbitError if it is damaged."""
    recipe = (checkpoint.quantization or {}).get("recipe")
    if recipe is None:
        return {}
    try:
        _Recipe.model_validate(recipe)
    except ValidationError as error:
        raise FewbitError(f"{checkpoint.folder}: damaged quantization_config: recipe{_first(error)}") from error
    return dict(recipe)


def has_scaled_channels(checkpoint: Checkpoint) -> bool:
    """Whether scales were folded into the weights before rounding: they are then not rounded original weights."""
    recipe = recipe_of(checkpoint)
    kinds = (TRANSFORMS.get(recipe.get(key) or "none") for key in ("transform", "channel_scales"))
    return any(kind is not None and kind.folded for kind in kinds)


def read_weights(config: dict[str, Any]) -> dict[str, StoredWeight]:
    """Module name -> how its weight is stored.

    Raises FewbitError for another format or version, for invalid values, and if there are no weights.
    """
    if config.get("quant_method") != "fewbit":
        raise FewbitError(f"quantized by {config.get('quant_method')!r}, not by fewbit")
    if config.get("format_version") not in READ_VERSIONS:
        known = " and ".join(str(version) for version in READ_VERSIONS)
        raise FewbitError(
            f"format version {config.get('format_version')}: this fewbit reads versions {known}: upgrade fewbit"
        )
    try:
        checked = _Config.model_validate(config)
        if not checked.weights:
            raise FewbitError("damaged quantization_config: weights lists none: fetch or write the folder again")
        strange = set(checked.embeddings) - checked.weights.keys()
        if strange:
            raise ValueError(f"embeddings lists {min(strange)}, but weights does not")
        schemes = [check_scheme(Scheme.from_dict(scheme)) for scheme in checked.schemes]
        return {name: _stored(weight, schemes) for name, weight in checked.weights.items()}
    except ValidationError as error:
        raise FewbitError(f"damaged quantization_config: {_first(error).removeprefix('.')}") from error
    except (ValueError, IndexError, TypeError) as error:
        raise FewbitError(f"damaged quantization_config: {first_line(error)}") from error


def _first(error: ValidationError) -> str:
    """The first invalid value: its path, each part after a dot, and what is wrong with it."""
    first = error.errors(include_url=False)[0]
    return one_line(f"{''.join(f'.{part}' for part in first['loc'])}: {first['msg']}", 200)


def read_stored(data: dict[str, Any], scheme: Scheme) -> StoredWeight:
    """One weight from its entry in the config and its scheme; raises ValueError if the entry is damaged."""
    return _stored(_Weight.model_validate({**data, "scheme": 0}), [scheme])


def _stored(weight: _Weight, schemes: list[Scheme]) -> StoredWeight:
    scheme = schemes[weight.scheme]
    rows, columns = weight.shape
    if columns % scheme.group_size:
        raise ValueError(f"group size {scheme.group_size} does not divide {columns} columns")
    if columns % grid_of(scheme).block:
        raise ValueError(f"the grid {scheme.grid} has blocks of {grid_of(scheme).block} columns, not {columns}")
    if weight.original_shape is not None and math.prod(weight.original_shape) != rows * columns:
        raise ValueError("original_shape does not match shape")
    if weight.outliers > rows * columns:
        raise ValueError("more outliers than weights")
    original = tuple(weight.original_shape) if weight.original_shape else None
    stored = StoredWeight(scheme, (rows, columns), weight.outliers, weight.positions, weight.transposed, original)
    part_layout(stored)
    return stored


def tuned_name(method: str) -> str:
    """The name of a method after fine-tuning."""
    return f"{method.removesuffix(' + qaft')} + qaft"


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Method, bits per weight and file size of a folder.

    Bits per weight are those of the quantized linear layers, from the bytes that replace them; `bits_per_weight_all`
    are those of all weights of the model.
    """
    quantization = checkpoint.quantization
    if quantization is None:
        widths = {entry.dtype.itemsize * 8 for entry in checkpoint.entries.values() if len(entry.shape) >= 2}
        return {
            "method": "original",
            "bits_per_weight": float(max(widths, default=16)),
            **_bits_of_all(checkpoint, {}),
            "bytes": checkpoint.bytes,
        }
    if quantization.get("quant_method") != "fewbit":
        return {"method": str(quantization.get("quant_method")), "bytes": checkpoint.bytes}
    weights = weights_of(checkpoint)
    tables = tables_of(checkpoint)
    layers = [stored for module, stored in weights.items() if module not in tables] or list(weights.values())
    bits = 8 * sum(stored_bytes(w) for w in layers) / sum(w.weights for w in layers)
    method = recipe_of(checkpoint).get("method", "fewbit")
    if "tuning" in quantization:
        method = tuned_name(method)
    return {
        "method": method,
        "bits_per_weight": bits,
        **_bits_of_all(checkpoint, weights),
        "bytes": checkpoint.bytes,
    }


def _bits_of_all(checkpoint: Checkpoint, weights: Mapping[str, StoredWeight]) -> dict[str, float]:
    """8 x the bytes of all weights, packed or other floating-point tensors, divided by their number."""
    parts = {f"{module}.{part}" for module, stored in weights.items() for part in part_layout(stored)}
    rest = [e for name, e in checkpoint.entries.items() if name not in parts and e.dtype.is_floating_point]
    size = sum(stored_bytes(w) for w in weights.values()) + sum(entry.bytes for entry in rest)
    count = sum(w.weights for w in weights.values()) + sum(entry.numel for entry in rest)
    return {"bits_per_weight_all": 8 * size / count} if count else {}
