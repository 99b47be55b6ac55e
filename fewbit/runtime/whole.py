"""Check that the files of a native folder contain exactly the parts that its config lists."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoints.safetensors_io import TensorEntry, read_header
from fewbit.checkpoints.source import INDEX_NAME, Checkpoint, open_checkpoint
from fewbit.errors import FewbitError
from fewbit.formats.config import weights_of
from fewbit.formats.native import part_layout
from fewbit.grids.scheme import StoredWeight


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


def read_entries(files: Iterable[str | Path] | None) -> dict[str, TensorEntry]:
    """Every tensor of the weight files that a loader was given; empty if they are not safetensors.

    A folder's index is checked against its files. Raises FewbitError for a damaged file, or a tensor in two files.
    """
    paths = [Path(file) for file in files or ()]
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        return {}
    folder = paths[0].parent
    if (folder / INDEX_NAME).is_file() and len({path.parent for path in paths}) == 1 and len(paths) > 1:
        open_checkpoint(folder)
    entries: dict[str, TensorEntry] = {}
    for path in paths:
        header, _ = read_header(path)
        twice = entries.keys() & header.keys()
        if twice:
            raise FewbitError(f"{path}: tensor {min(twice)} is also in another file: the folder is damaged")
        entries |= header
    return entries


def dtype_of_kept(entries: Iterable[TensorEntry]) -> Any:
    """The floating-point dtype with the most elements among the kept weights; None if there are none."""
    sizes: dict[torch.dtype, int] = {}
    for entry in entries:
        if entry.dtype in (torch.bfloat16, torch.float16, torch.float32):
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.numel
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None
