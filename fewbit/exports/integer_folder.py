"""Write a quantized folder in a format of evenly spaced integers: config, one weight file, tokenizer and companions."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fewbit.architecture.orientation import from_matrix
from fewbit.checkpoints.json_file import write_json
from fewbit.checkpoints.output import CONFIG
from fewbit.checkpoints.safetensors_io import FileReader, ShardWriter, TensorEntry, header_room
from fewbit.checkpoints.source import SINGLE_NAME, Checkpoint
from fewbit.checkpoints.workdir import WorkFolder, copy_companions
from fewbit.errors import ChangedError
from fewbit.exports.integer_format import IntegerFormat, Layers, NotHeldError, advice, layers_of
from fewbit.formats.config import weights_of
from fewbit.formats.native import part_layout
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.progress import Progress
from fewbit.runtime.unpack import read_parts, read_weight
from fewbit.runtime.whole import plain_dtype

_TENSORS = 4
"""At most so many tensors replace a weight."""


def write_folder(
    kind: IntegerFormat, checkpoint: Checkpoint, work: WorkFolder, embeddings: str, progress: Progress | None
) -> dict[str, Any]:
    """Write a native folder, which :func:`fewbit.exports.integer_format.folder_problem` accepts, into that of `work`.

    Packed embeddings and heads are written decoded. Returns the number of tensors by kind, the bytes, and notes for the
    user. Raises ChangedError, which names the tensor, for scales or offsets that the format does not have.
    """
    layers, dtype = layers_of(checkpoint), plain_dtype(checkpoint)
    items = list(_items(checkpoint))
    kinds: Counter[str] = Counter()
    path = work.file(SINGLE_NAME)
    writer = ShardWriter(path, header_room([f"{name}.qweight" for name, _ in items for _ in range(_TENSORS)]))
    try:
        with FileReader() as reader:
            for index, (name, item) in enumerate(items):
                if isinstance(item, TensorEntry):
                    writer.copy(item, reader)
                    kinds[_short(item.dtype)] += 1
                elif name in layers.packed:
                    for end, tensor in _packed(kind, checkpoint, reader, (name, item)).items():
                        writer.add(f"{name}.{end}", tensor)
                    kinds[f"{kind.name} {item.scheme.bits:g} bits"] += 1
                else:
                    weight = read_weight(checkpoint, reader, name, item).to(dtype)
                    writer.add(item.tensor_name(name), from_matrix(weight, item.tensor_shape, item.transposed))
                    kinds[_short(dtype)] += 1
                if progress:
                    progress(index + 1, len(items), name)
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    copy_companions(checkpoint.companions, work)
    plain = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    config = kind.config(plain, layers)
    write_json(work.file(CONFIG), config)
    return {
        "file": SINGLE_NAME,
        "tensors": dict(kinds),
        "bytes": path.stat().st_size,
        "rounded": {},
        "notes": list(_notes(kind, checkpoint, layers, config)),
    }


def _items(checkpoint: Checkpoint) -> Iterator[tuple[str, TensorEntry | StoredWeight]]:
    """Tensors, and packed weights in place of their parts, in storage order."""
    weights = weights_of(checkpoint)
    parts = {f"{module}.{part}": module for module, stored in weights.items() for part in part_layout(stored)}
    seen = set()
    for name, entry in checkpoint.entries.items():
        module = parts.get(name)
        if module is None:
            yield name, entry
        elif module not in seen:
            seen.add(module)
            yield module, weights[module]


def _packed(
    kind: IntegerFormat, checkpoint: Checkpoint, reader: FileReader, named: tuple[str, StoredWeight]
) -> dict[str, Tensor]:
    module, stored = named
    try:
        return kind.tensors(read_parts(checkpoint, reader, module, stored), stored, plain_dtype(checkpoint))
    except NotHeldError as error:
        raise ChangedError(f"{checkpoint.folder}: {module}: {error}: {_advice(kind, stored.scheme, error)}") from error


def _advice(kind: IntegerFormat, scheme: Scheme, error: NotHeldError) -> str:
    """The command that makes a folder that the format holds; the bare one chooses the same scales again."""
    other = next((name for name in error.scales if name in kind.scales and name != scheme.scale_format), None)
    return advice(kind, scheme) + (f" --scale-format {other}" if other else "")


def _notes(kind: IntegerFormat, checkpoint: Checkpoint, layers: Layers, config: dict[str, Any]) -> Iterator[str]:
    weights = weights_of(checkpoint)
    for name in layers.tables:
        if name in weights:
            yield (
                f"{name}: its {weights[name].scheme.bits:g} bits are written decoded, in 16 bits: {kind.called} "
                "folders have no packed embeddings"
            )
    for key in ("dtype", "torch_dtype"):
        if config.get(key) != checkpoint.config.get(key):
            yield f"the folder is to be loaded in {config[key]}, which has all scales exactly"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
