"""Write a quantized folder in a format of evenly spaced integers: config, one weight file, tokenizer and companions."""

from collections import Counter, defaultdict
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
from fewbit.exports.integer_format import EXPERT, IntegerFormat, Layers, NotHeldError, advice, layers_of
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
    groups = _joined(kind, items)
    kinds: Counter[str] = Counter()
    path = work.file(SINGLE_NAME)
    writer = ShardWriter(path, header_room([f"{name}.qweight" for name, _ in items for _ in range(_TENSORS)]))
    try:
        with FileReader() as reader:
            for index, (joined, members) in enumerate(groups.items()):
                name, item = members[0]
                if isinstance(item, TensorEntry) and joined == name:
                    writer.copy(item, reader)
                    kinds[_said(kind, item)] += 1
                elif isinstance(item, StoredWeight) and name not in layers.packed:
                    weight = read_weight(checkpoint, reader, name, item).to(dtype)
                    writer.add(item.tensor_name(name), from_matrix(weight, item.tensor_shape, item.transposed))
                    kinds[_short(dtype)] += 1
                else:
                    parts = [_parts(kind, checkpoint, reader, one) for one in members]
                    for end in parts[0]:
                        found = [one[end] for one in parts]
                        writer.add(f"{joined}{end}", found[0] if joined == name else torch.stack(found))
                    kinds[_said(kind, item)] += len(members)
                if progress:
                    progress(index + 1, len(groups), name)
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


def _joined(
    kind: IntegerFormat, items: list[tuple[str, TensorEntry | StoredWeight]]
) -> dict[str, list[tuple[str, TensorEntry | StoredWeight]]]:
    """Name of what is written -> the items in it, in order: one each, but all experts where the format joins them."""
    found: dict[str, list[tuple[int, str, TensorEntry | StoredWeight]]] = defaultdict(list)
    for name, item in items:
        joined, place = kind.joined(name) or (name, 0)
        found[joined].append((place, name, item))
    return {
        joined: [(name, item) for _, name, item in sorted(members, key=lambda one: one[0])]
        for joined, members in found.items()
    }


def _parts(
    kind: IntegerFormat, checkpoint: Checkpoint, reader: FileReader, named: tuple[str, TensorEntry | StoredWeight]
) -> dict[str, Tensor]:
    """The tensors of a packed weight, or a plain one, by the ends of their names."""
    module, stored = named
    if isinstance(stored, TensorEntry):
        return {"": reader.tensor(stored)}
    try:
        parts = read_parts(checkpoint, reader, module, stored)
        return {f".{end}": one for end, one in kind.tensors(parts, stored, plain_dtype(checkpoint)).items()}
    except NotHeldError as error:
        raise ChangedError(f"{checkpoint.folder}: {module}: {error}: {_advice(kind, stored.scheme, error)}") from error


def _advice(kind: IntegerFormat, scheme: Scheme, error: NotHeldError) -> str:
    """The command that makes a folder that the format holds; the bare one chooses the same scales again."""
    other = next((name for name in error.scales if name in kind.scales and name != scheme.scale_format), None)
    return advice(kind, scheme) + (f" --scale-format {other}" if other else "")


def _notes(kind: IntegerFormat, checkpoint: Checkpoint, layers: Layers, config: dict[str, Any]) -> Iterator[str]:
    weights = weights_of(checkpoint)
    if kind.expert_note and any(EXPERT.fullmatch(name) for name in layers.packed):
        yield kind.expert_note
    for name in layers.tables:
        if name in weights:
            yield (
                f"{name}: its {weights[name].scheme.bits:g} bits are written decoded, in 16 bits: {kind.called} "
                "folders have no packed embeddings"
            )
    for key in ("dtype", "torch_dtype"):
        if config.get(key) != checkpoint.config.get(key):
            yield f"the folder is to be loaded in {config[key]}, which has all scales exactly"


def _said(kind: IntegerFormat, item: TensorEntry | StoredWeight) -> str:
    return _short(item.dtype) if isinstance(item, TensorEntry) else f"{kind.name} {item.scheme.bits:g} bits"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
