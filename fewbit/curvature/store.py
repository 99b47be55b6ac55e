"""A measured curvature on disk: one file a block, written as it is measured, and a description that is checked."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import Checkpoint
from fewbit.checkpoints.whole_file import save_whole
from fewbit.curvature.choice import CurvatureChoice
from fewbit.errors import FewbitError

VERSION = 2
_DESCRIPTION = "fewbit_curvature.json"
_SAMPLE_BYTES = 4096


def model_fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What says that a curvature belongs to a model: the shapes of all tensors, and a sample of the weights."""
    return {
        "model_type": checkpoint.config.get("model_type"),
        "bytes": checkpoint.bytes,
        "tensors": {name: list(entry.shape) for name, entry in checkpoint.entries.items()},
        "sample": _sample(checkpoint),
    }


def _sample(checkpoint: Checkpoint) -> str:
    """SHA-256 of a stretch from the middle of every tensor: fine-tunes differ in it, copies do not."""
    digest = hashlib.sha256()
    with FileReader() as reader:
        for name in sorted(checkpoint.entries):
            entry = checkpoint.entries[name]
            length = min(entry.bytes, _SAMPLE_BYTES)
            first = entry.start + (entry.bytes - length) // 2
            digest.update(os.pread(reader.descriptor(entry.file), length, first))
    return digest.hexdigest()


@dataclass(frozen=True)
class StoredCurvature:
    """An open curvature folder."""

    folder: Path
    choice: CurvatureChoice
    description: dict[str, Any]

    def layers(self, index: int) -> set[str]:
        """Keys of the layers of one block that were measured."""
        with safe_open(_block_path(self.folder, index), framework="pt") as file:
            return {*file.keys(), *json.loads(file.metadata()["shared"])}

    def block(self, index: int) -> dict[str, Tensor]:
        """Layer key -> float32 `(in, in)` of one block's layers."""
        path = _block_path(self.folder, index)
        if not path.is_file():
            raise FewbitError(f"{path}: missing: the measurement was not finished; run fewbit curvature again")
        found: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                matrix = file.get_tensor(name)
                found[name] = torch.diag(matrix) if matrix.dim() == 1 else matrix
            shared = json.loads(file.metadata()["shared"])
        for name, owner in shared.items():
            found[name] = found[owner]
        return found


class CurvatureWriter:
    """A curvature folder that is being filled; a block that is there already is whole."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, choice: CurvatureChoice, calibration: dict[str, Any]):
        self.folder = folder
        self._header = {
            "version": VERSION,
            "choice": asdict(choice),
            "calibration": calibration,
            "model": model_fingerprint(checkpoint),
        }
        folder.mkdir(parents=True, exist_ok=True)
        before = folder / _DESCRIPTION
        if before.is_file() and json.loads(before.read_text(encoding="utf-8")) != self._header:
            raise FewbitError(f"{folder}: holds another curvature: choose another name, or remove it")
        if not before.is_file() and any(folder.iterdir()):
            raise FewbitError(f"{folder}: is not empty and holds no curvature: choose another name")
        self._write_header()

    def has(self, index: int) -> bool:
        """Whether a block is written."""
        return _block_path(self.folder, index).is_file()

    def put(self, index: int, sums: dict[str, Tensor], shared: dict[str, str]) -> None:
        """Write one block's matrices."""
        path = _block_path(self.folder, index)
        save_whole({name: tensor.cpu() for name, tensor in sums.items()}, path, {"shared": json.dumps(shared)})

    def _write_header(self) -> None:
        path = self.folder / _DESCRIPTION
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self._header, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def open_curvature(folder: Path, checkpoint: Checkpoint) -> StoredCurvature:
    """Open a stored curvature for a model; FewbitError when it is of another model, shape or version."""
    path = folder / _DESCRIPTION
    if not path.is_file():
        raise FewbitError(f"{folder}: no curvature here: make one with  fewbit curvature MODEL {folder}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            raise FewbitError(
                f"{folder}: curvature version {data['version']}, this fewbit reads {VERSION}: measure again"
            )
        wanted, found = model_fingerprint(checkpoint), data["model"]
        if wanted != found:
            differs = next(
                (k for k in ("model_type", "tensors", "bytes", "sample") if wanted[k] != found.get(k)), "tensors"
            )
            raise FewbitError(f"{folder}: was measured on another model (its {differs} differs): measure this one")
        choice = CurvatureChoice(**data["choice"])
        missing = [i for i in range(data["calibration"]["blocks"]) if not _block_path(folder, i).is_file()]
        if missing:
            raise FewbitError(f"{folder}: block {missing[0] + 1} is not measured: run the same fewbit curvature again")
        return StoredCurvature(folder, choice, data["calibration"])
    except (ValueError, KeyError, TypeError) as error:
        raise FewbitError(f"{path}: damaged ({error}): measure again") from error


def _block_path(folder: Path, index: int) -> Path:
    return folder / f"block-{index:05d}.safetensors"
