"""The original in memory with the places of its quantized weights, and the weights of a quantized folder for them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewbit.architecture.network import Site
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import Checkpoint, open_checkpoint
from fewbit.errors import FewbitError
from fewbit.formats.config import weights_of
from fewbit.grids.scheme import StoredWeight
from fewbit.pipeline.plan import cover_original
from fewbit.runtime.unpack import check_all_parts, read_weight


@dataclass(frozen=True)
class QuantizedFolder:
    """A folder in the native format that was made from an original.

    weights: module -> how it is stored. changed: what outside the linear layers of the blocks is not the original's,
    except for packed embeddings and heads, which studies of these layers leave as they are in the original.
    """

    checkpoint: Checkpoint
    weights: dict[str, StoredWeight]
    changed: tuple[str, ...]

    def read(self, sites: list[Site]) -> Iterator[tuple[Site, Tensor]]:
        """Every site with its weight `(out, in)` here, float32, as the network that is run has it (rounded to its
        dtype); sites that this folder leaves alone are left out. A tensor's sites must stand in order.
        """
        by_module: dict[str, list[Site]] = {}
        for site in sites:
            by_module.setdefault(site.tensor.module, []).append(site)
        with FileReader() as reader:
            for module, places in by_module.items():
                if module not in self.weights:
                    continue
                whole = read_weight(self.checkpoint, reader, module, self.weights[module])
                whole = whole.to(places[0].tensor.entry.dtype).float()
                first = 0
                for site in places:
                    yield site, whole[first : first + site.rows]
                    first += site.rows


def check_folders(folders: Sequence[str], model: str | Path) -> None:
    """FewbitError unless all folders are whole, native, of this original, and have different names."""
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise FewbitError(f"--folder: two folders have the same name ({', '.join(names)}): rename one")
    original = open_checkpoint(locate(model))
    for folder in folders:
        _check_folder(folder, original)


def _check_folder(folder: str | Path, original: Checkpoint) -> tuple[Checkpoint, dict[str, StoredWeight]]:
    checkpoint = open_checkpoint(locate(folder))
    if not checkpoint.is_native:
        raise FewbitError(f"{folder}: not quantized by fewbit: give a folder that fewbit quantize wrote")
    check_all_parts(checkpoint)
    weights = weights_of(checkpoint)
    for module, stored in weights.items():
        entry = original.entries.get(f"{module}.weight") or original.entries.get(module)
        if entry is None or entry.numel != stored.weights:
            raise FewbitError(
                f"{folder}: {original.folder} has no {module} of that shape: was it made from this model?"
            )
    return checkpoint, weights


def open_quantized(folder: str | Path, original: Checkpoint, sites: list[Site]) -> QuantizedFolder:
    """Open a quantized folder; FewbitError when it is not whole, not native, or not of this original."""
    checkpoint, weights = _check_folder(folder, original)
    inside = {site.tensor.module for site in sites}
    inside |= {tensor.module for tensor in cover_original(original).tensors if tensor.is_vocabulary}
    outside = [module for module in weights if module not in inside]
    return QuantizedFolder(checkpoint, weights, (*outside, *_changed(checkpoint, original)))


def _changed(checkpoint: Checkpoint, original: Checkpoint) -> Iterator[str]:
    with FileReader() as reader:
        for name, entry in original.entries.items():
            other = checkpoint.entries.get(name)
            if other is None:
                continue
            if other.dtype != entry.dtype or not torch.equal(reader.tensor(other), reader.tensor(entry)):
                yield name
