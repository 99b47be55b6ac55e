"""Convert packed layers to plain ones, in memory or on disk, for programs that cannot use the packed form."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbit.architecture.orientation import from_matrix
from fewbit.checkpoints.json_file import read_json, write_json
from fewbit.checkpoints.model_card import Written, base_of, write_card
from fewbit.checkpoints.output import CARD, CONFIG, REPORT
from fewbit.checkpoints.own_files import is_own
from fewbit.checkpoints.public_names import public_config, public_model
from fewbit.checkpoints.safetensors_io import FileReader, ShardWriter, TensorEntry, header_room
from fewbit.checkpoints.shards import shard_name, split_by_size
from fewbit.checkpoints.source import Checkpoint, open_checkpoint
from fewbit.checkpoints.stamps import file_stamps
from fewbit.checkpoints.whole_file import said_when_full
from fewbit.checkpoints.workdir import WorkFolder, check_output, copy_companions, write_index
from fewbit.errors import FewbitError
from fewbit.formats import native
from fewbit.formats.config import weights_of
from fewbit.formats.native import part_layout
from fewbit.grids.inputs import round_tokens
from fewbit.grids.scheme import StoredWeight
from fewbit.linear import Linear
from fewbit.runtime.packed_linear import PackedLinear
from fewbit.runtime.packed_parameter import Held, PackedParameter, release
from fewbit.runtime.whole import check_all_parts, plain_dtype

__all__ = ["check_all_parts", "read_parts", "read_weight", "unpack", "unpack_modules"]


def unpack_modules(model: nn.Module, dtype: torch.dtype | None = None, own_classes: bool = False) -> Any:
    """Replace every packed weight of `model` by a plain one with the same values and logits, in place.

    dtype: of the plain weights; None for that of each packed one. own_classes: restore the original class of layers
    that are not `Linear` (such as GPT-2's, with transposed weights), which is necessary for saving the model. This
    takes the memory of the 16-bit model; it is faster if the model runs over much text.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PackedLinear):
                setattr(parent, name, plain_layer(child, dtype or child.like.dtype, own_classes))
    plain: dict[PackedParameter, nn.Parameter] = {}
    holders = [module for module in model.modules() if isinstance(getattr(module, "held", None), Held)]
    for module in holders:
        for _, value in module.held.all():  # type: ignore[operator]
            if value not in plain:
                plain[value] = nn.Parameter(value(dtype=dtype).contiguous(), requires_grad=False)
    for module in holders:
        release(module, {name: plain[value] for name, value in module.held.all()})  # type: ignore[operator]
    return model


@dataclass(frozen=True)
class RoundInputs:
    """Called before a plain layer, it rounds the inputs as the packed layer did."""

    bits: int

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (round_tokens(inputs[0], self.bits), *inputs[1:])


def plain_layer(packed: PackedLinear, dtype: torch.dtype, own_class: bool = False) -> nn.Module:
    """A plain layer with the same weight in `dtype`, the same bias, and inputs rounded as before.

    own_class: as for :func:`unpack_modules`."""
    weight = packed.decode(dtype)
    if own_class and packed.stored.transposed:
        from transformers.pytorch_utils import Conv1D

        layer: Any = Conv1D(0, 0)
        layer.nf, layer.nx = packed.stored.shape
        weight = weight.t().contiguous()
    else:
        layer = Linear(packed.in_features, packed.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_parameter("bias", packed.bias)
    if packed.stored.scheme.input_bits:
        layer.register_forward_pre_hook(RoundInputs(packed.stored.scheme.input_bits))
    return layer.train(packed.training)


def read_parts(checkpoint: Checkpoint, reader: FileReader, module: str, stored: StoredWeight) -> dict[str, Any]:
    """The parts of one packed weight; raises FewbitError if one is missing, does not fit, or has damaged content."""
    parts = {}
    for part in part_layout(stored):
        entry = checkpoint.entries.get(f"{module}.{part}")
        if entry is None:
            raise FewbitError(f"{checkpoint.folder}: {module}.{part} is missing: the folder is incomplete")
        parts[part] = reader.tensor(entry)
    try:
        native.check_parts(parts, stored)
        native.check_content(parts, stored)
    except ValueError as error:
        raise FewbitError(f"{checkpoint.folder}: {module}: {error}: the folder is damaged") from error
    return parts


def read_weight(checkpoint: Checkpoint, reader: FileReader, module: str, stored: StoredWeight) -> torch.Tensor:
    """The decoded weight `(out, in)` in float32."""
    return native.decode(read_parts(checkpoint, reader, module, stored), stored)


def unpack(folder: str | Path, out: str | Path, overwrite: bool = False, shard_size: int = 5_000_000_000) -> Path:
    """Convert a native folder to a plain 16-bit one that any tool can load, with one tensor in memory at a time.

    It holds weights only: if inputs were rounded at run time, they no longer are.
    Returns `out`. Raises FewbitError if `folder` is not a complete native folder or `out` cannot be written.
    """
    checkpoint = open_checkpoint(Path(folder))
    if not checkpoint.is_native:
        raise FewbitError(f"{folder}: not quantized by fewbit, so there is nothing to unpack")
    check_all_parts(checkpoint)
    weights = weights_of(checkpoint)
    replaces = check_output(Path(out), checkpoint.folder, overwrite)
    dtype = plain_dtype(checkpoint)
    parts = {f"{module}.{part}": module for module, stored in weights.items() for part in part_layout(stored)}
    order: dict[str, TensorEntry | StoredWeight] = {}
    for name, entry in checkpoint.entries.items():
        module = parts.get(name)
        if module is None:
            order[name] = entry
        else:
            order.setdefault(module, weights[module])
    files = file_stamps(entry.file for entry in checkpoint.entries.values())
    job = {"unpack": str(checkpoint.folder.resolve()), "files": files}
    work = WorkFolder(Path(out), job, overwrite, replaces)
    try:
        with said_when_full("free some space and run the same command again"):
            _write_plain(work, checkpoint, order, dtype, _split(order, dtype, shard_size))
            work.publish()
    except BaseException as error:
        work.leave(error)
        raise
    return Path(out)


def _write_plain(
    work: WorkFolder,
    checkpoint: Checkpoint,
    order: dict[str, TensorEntry | StoredWeight],
    dtype: torch.dtype,
    shards: list[list[str]],
) -> None:
    names = [shard_name(index, len(shards)) for index in range(len(shards))]
    written: list[list[str]] = []
    with FileReader() as reader:
        for shard, name in zip(shards, names, strict=True):
            writer = ShardWriter(work.shard(name), header_room([f"{key}.weight" for key in shard]))
            try:
                written.append([_write(writer, checkpoint, reader, key, order[key], dtype) for key in shard])
                writer.close()
            except BaseException:
                writer.abandon()
                raise
    copy_companions(checkpoint.companions, work)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    write_json(work.file(CONFIG), public_config(config))
    write_json(work.file(REPORT), {"unpacked_from": checkpoint.quantization})
    path = checkpoint.folder / REPORT
    report = read_json(path) if is_own(path) else {"recipe": (checkpoint.quantization or {}).get("recipe")}
    base = base_of(checkpoint.folder, public_model(checkpoint.folder), checkpoint.config)
    write_card(work.file(CARD), base, Written("plain", report, work.shard_bytes))
    write_index(work, dict(zip(names, written, strict=True)))


def _split(order: dict[str, TensorEntry | StoredWeight], dtype: torch.dtype, shard_size: int) -> list[list[str]]:
    def size(name: str) -> int:
        item = order[name]
        return item.bytes if isinstance(item, TensorEntry) else item.weights * dtype.itemsize

    return split_by_size(order, size, shard_size)


def _write(
    writer: ShardWriter,
    checkpoint: Checkpoint,
    reader: FileReader,
    name: str,
    item: TensorEntry | StoredWeight,
    dtype: torch.dtype,
) -> str:
    if isinstance(item, TensorEntry):
        writer.copy(item, reader)
        return name
    weight = read_weight(checkpoint, reader, name, item).to(dtype)
    original = item.tensor_name(name)
    writer.add(original, from_matrix(weight, item.tensor_shape, item.transposed))
    return original
