"""Quantized layers of a folder whose codes lie evenly spaced: what GPTQ, AWQ and compressed-tensors have in common.

    w = (code - zero) * scale

with a scale and a zero-point for each group of a row. That is the grid zero-point, or symmetric if every zero-point is
the middle code.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fewbit.architecture.coverage import WeightTensor
from fewbit.checkpoints.safetensors_io import FileReader, TensorEntry
from fewbit.checkpoints.source import Checkpoint
from fewbit.errors import CannotImportError, FewbitError
from fewbit.grids.packing import pack
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.imports.source import PackedTensor, PlainTensor, cover_logical
from fewbit.transforms.column_order import COLUMN_ORDER

Entries = Mapping[str, TensorEntry]
"""The tensors of one layer by the last part of their names."""
_FORMATS = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
"""Dtypes of scales -> scale formats."""
_IN_OUT = ("gpt2", "openai-gpt")
"""Types of models whose layers are stored as (in, out) if they are not quantized."""
BITS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class EvenLayer:
    """One layer of `shape` (out, in).

    codes(): uint8 `(out, in)`. scales(): `(out, groups)` in `scale_dtype`. zeros: uint8 `(out, groups)`, or None if all
    are the middle code. groups: of each column, int64 `(in,)`, or None if groups are consecutive columns.
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    scale_dtype: torch.dtype
    codes: Callable[[], Tensor]
    scales: Callable[[], Tensor]
    zeros: Tensor | None = None
    groups: Tensor | None = None


def gather(
    checkpoint: Checkpoint, endings: Iterable[str], needed: str
) -> tuple[dict[str, dict[str, TensorEntry]], list[TensorEntry]]:
    """The layers that have a tensor `MODULE.needed`, with their tensors of these endings; and all other tensors.

    Raises FewbitError for a tensor with such an ending that belongs to no layer.
    """
    modules = [name.removesuffix(f".{needed}") for name in checkpoint.entries if name.endswith(f".{needed}")]
    layers: dict[str, dict[str, TensorEntry]] = {module: {} for module in modules}
    rest, known = [], set(endings)
    for name, entry in checkpoint.entries.items():
        module, _, ending = name.rpartition(".")
        if ending not in known:
            rest.append(entry)
        elif module in layers:
            layers[module][ending] = entry
        else:
            raise FewbitError(f"{checkpoint.folder}: {name} belongs to no layer: {module}.{needed} is missing")
    return layers, rest


def without_order(groups: Tensor, columns: int, group_size: int) -> Tensor | None:
    """The groups of columns as :class:`EvenLayer` has them, from those of a file. Raises ValueError if one is too large
    or too small.
    """
    count = columns // group_size
    groups = groups.to(torch.int64)
    if groups.shape != (columns,) or bool((groups < 0).any()) or bool((groups >= count).any()):
        raise ValueError(f"the groups of its columns are not {columns} numbers below {count}")
    if torch.equal(groups, torch.arange(columns) // group_size):
        return None
    if bool((groups.bincount(minlength=count) != group_size).any()):
        raise ValueError(f"not every group has {group_size} columns")
    return groups


def middle(zeros: Tensor, bits: int) -> Tensor | None:
    """Zero-points as :class:`EvenLayer` has them: None if all are the middle code."""
    return None if bool((zeros == 2 ** (bits - 1)).all()) else zeros


def scheme_of(layer: EvenLayer) -> Scheme:
    """The stored form of a layer. Raises ValueError if there is none."""
    rows, columns = layer.shape
    if layer.bits not in BITS:
        raise ValueError(f"{layer.bits} bits, but only {BITS[0]} to {BITS[-1]} can be imported")
    if layer.scale_dtype not in _FORMATS:
        raise ValueError(f"its scales have the dtype {layer.scale_dtype}, not a 16 or 32-bit float")
    if rows < 1 or columns < 1 or layer.group_size < 1 or columns % layer.group_size:
        raise ValueError(f"groups of {layer.group_size} do not divide its {columns} columns")
    grid = "symmetric" if layer.zeros is None else "zero-point"
    transform = "none" if layer.groups is None else COLUMN_ORDER.name
    return Scheme(layer.bits, layer.group_size, grid, scale_format=_FORMATS[layer.scale_dtype], transform=transform)


def parts_of(layer: EvenLayer) -> dict[str, Tensor]:
    """The parts that store a layer."""
    codes, order = layer.codes(), None
    if layer.groups is not None:
        order = layer.groups.argsort(stable=True)
        codes = codes.index_select(1, order)
    word = torch.int32 if layer.scale_dtype == torch.float32 else torch.int16
    parts = {"codes": pack(codes.contiguous(), layer.bits), "scales": layer.scales().contiguous().view(word)}
    if layer.zeros is not None:
        parts["zeros"] = pack(layer.zeros.contiguous(), layer.bits)
    return parts if order is None else {**parts, **COLUMN_ORDER.store({"order": order.to(torch.int32)})}


def tensors_of(
    checkpoint: Checkpoint, config: dict[str, object], layers: Mapping[str, EvenLayer], rest: Iterable[TensorEntry]
) -> list[PackedTensor | PlainTensor]:
    """All tensors in the order of the files. Raises FewbitError for a layer that has no stored form."""
    turned = config.get("model_type") in _IN_OUT
    shapes = {f"{name}.weight": layer.shape[::-1] if turned else layer.shape for name, layer in layers.items()}
    kept = {entry.name: entry for entry in rest}
    both = shapes.keys() & kept.keys()
    if both:
        raise FewbitError(f"{checkpoint.folder}: {min(both)} is stored twice, with and without codes: fetch it again")
    everything = {**{name: entry.shape for name, entry in kept.items()}, **shapes}
    logical = cover_logical(everything, dict(config), checkpoint.folder)
    found: list[PackedTensor | PlainTensor] = []
    seen: set[str] = set()
    for name in checkpoint.entries:
        module = name.rpartition(".")[0]
        if name in kept:
            entry = kept[name]
            found.append(PlainTensor(name, entry.shape, entry.dtype, partial(_read, entry)))
        elif module not in seen:
            seen.add(module)
            found.append(_packed(checkpoint, module, layers[module], logical[f"{module}.weight"]))
    return found


def _read(entry: TensorEntry) -> Tensor:
    with FileReader() as reader:
        return reader.tensor(entry)


def _packed(checkpoint: Checkpoint, module: str, layer: EvenLayer, logical: WeightTensor) -> PackedTensor:
    try:
        scheme = scheme_of(layer)
    except ValueError as error:
        raise CannotImportError(
            f"{checkpoint.folder}: {module}: {error}: give the 16-bit original to  fewbit quantize"
        ) from error
    if logical.matrix_shape != layer.shape:
        raise FewbitError(f"{checkpoint.folder}: {module}: not clear which side of {list(layer.shape)} are its inputs")
    stored = StoredWeight(scheme, layer.shape, transposed=logical.transposed)
    return PackedTensor(module, stored, partial(parts_of, layer), logical.is_vocabulary)


def whole(entry: TensorEntry) -> Tensor:
    """A tensor of the file."""
    return _read(entry)


def checked(entries: Entries, ending: str, dtypes: tuple[torch.dtype, ...], dimensions: int) -> TensorEntry:
    """A tensor of a layer. Raises ValueError if it is missing, or has another dtype or number of dimensions."""
    entry = entries.get(ending)
    if entry is None:
        raise ValueError(f"{ending} is missing")
    if entry.dtype not in dtypes or len(entry.shape) != dimensions:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{ending} is {str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}, not {wanted} with "
            f"{dimensions} dimension{'s' if dimensions > 1 else ''}"
        )
    return entry


def each(
    checkpoint: Checkpoint, found: Mapping[str, Entries], make: Callable[[str, Entries], EvenLayer]
) -> dict[str, EvenLayer]:
    """Every layer by its module; a ValueError of `make` becomes a FewbitError that names the layer."""
    layers = {}
    for module, entries in found.items():
        try:
            layers[module] = make(module, entries)
        except ValueError as error:
            raise FewbitError(
                f"{checkpoint.folder}: {module}: {error}: the checkpoint is damaged or of an unknown kind"
            ) from error
    return layers


FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WORDS = (torch.int32,)


def with_config(checkpoint: Checkpoint) -> dict[str, object]:
    """The config without descriptions of the quantization, at any depth."""
    return {key: value for key, value in checkpoint.config.items() if key not in _DESCRIPTIONS}


_DESCRIPTIONS = ("quantization_config", "compression_config", "quantization")
