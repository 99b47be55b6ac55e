"""Check that a native folder has exactly the parts that its config lists, with content that fewbit can have written."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from fewbit.checkpoints.config_dtype import stated_dtype
from fewbit.checkpoints.safetensors_io import TensorEntry, read_header
from fewbit.checkpoints.source import INDEX_NAME, Checkpoint, open_checkpoint
from fewbit.errors import FewbitError
from fewbit.formats.config import weights_of
from fewbit.formats.native import check_content, part_layout
from fewbit.grids.scheme import StoredWeight
from fewbit.runtime.packed_linear import PackedLinear, parts_of
from fewbit.runtime.packed_parameter import PackedWeight


def check_all_parts(checkpoint: Checkpoint) -> None:
    """Raises FewbitError unless every packed weight in the config is complete and no other parts are present."""
    check_parts_of(str(checkpoint.folder), checkpoint.entries, weights_of(checkpoint))


def check_parts_of(where: str, entries: Mapping[str, TensorEntry], weights: Mapping[str, StoredWeight]) -> None:
    """Like :func:`check_all_parts`, for the given tensors and weights; `where` is the beginning of the message."""
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for module, stored in weights.items():
        expected |= {f"{module}.{part}": form for part, form in part_layout(stored).items()}
    for name, (dtype, shape) in expected.items():
        entry = entries.get(name)
        if entry is None:
            raise FewbitError(f"{where}: {name} is missing: the folder is incomplete")
        if (entry.dtype, entry.shape) != (dtype, shape):
            found, wanted = f"{entry.dtype} {list(entry.shape)}", f"{dtype} {list(shape)}"
            raise FewbitError(f"{where}: {name} is {found}, not {wanted}: the folder is damaged")
    endings = {name.rpartition(".")[2] for name in expected} - {"weight", "bias"}
    for name, entry in entries.items():
        if name not in expected and name.rpartition(".")[2] in endings and not entry.dtype.is_floating_point:
            raise FewbitError(f"{where}: {name} does not belong to any weight in config.json: the folder is damaged")


def check_content_of(model: nn.Module) -> None:
    """Raises FewbitError if a packed weight of a loaded model contains values that fewbit does not write.

    Weights that are not in memory, because they are offloaded to disk, are left out.
    """
    for module in model.modules():
        if not isinstance(module, PackedLinear | PackedWeight):
            continue
        parts = parts_of(module)
        if any(part.is_meta for part in parts.values()):
            continue
        try:
            check_content(parts, module.stored)
        except ValueError as error:
            raise FewbitError(f"{module.name}: {error}: the folder is damaged") from error


def read_entries(files: Iterable[str | Path] | None) -> dict[str, TensorEntry]:
    """Every tensor of the weight files that a loader was given; empty if they are not safetensors.

    A folder's index is checked against its files. Raises FewbitError for a damaged file, or a tensor in two files.
    """
    paths = [Path(file) for file in files or ()]
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        return {}
    folder = paths[0].parent
    if len(paths) > 1 and len({path.parent for path in paths}) == 1 and (folder / INDEX_NAME).is_file():
        checkpoint = open_checkpoint(folder)
        entries = {**checkpoint.entries, **checkpoint.guards}
        if {path.resolve() for path in paths} == {entry.file.resolve() for entry in entries.values()}:
            return entries
    entries = {}
    for path in paths:
        header, _ = read_header(path)
        twice = entries.keys() & header.keys()
        if twice:
            raise FewbitError(f"{path}: tensor {min(twice)} is also in another file: the folder is damaged")
        entries |= header
    return entries


def plain_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that a native folder's config states, or else the one with the most elements among the kept weights."""
    stated = stated_dtype(checkpoint.config)
    if stated is not None:
        return stated
    packed = weights_of(checkpoint)
    sizes: dict[torch.dtype, int] = {}
    for name, entry in checkpoint.entries.items():
        if entry.dtype in (torch.bfloat16, torch.float16, torch.float32) and name.rpartition(".")[0] not in packed:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.numel
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.bfloat16)
