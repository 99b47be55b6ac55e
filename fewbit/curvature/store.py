"""A measured curvature on disk: one file per block and one of the head, written as soon as they are measured, and a
description.

Folders of earlier versions have no file of the head; otherwise they are the same.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fewbit.checkpoints.json_file import drop, read_json, write_json
from fewbit.checkpoints.json_in import parse_json
from fewbit.checkpoints.output import check_place, is_of_the_system
from fewbit.checkpoints.read_at import bytes_at
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import Checkpoint
from fewbit.checkpoints.stamps import differences, file_stamps
from fewbit.checkpoints.whole_file import save_whole
from fewbit.checkpoints.workdir import SPILLED
from fewbit.curvature.choice import CurvatureChoice
from fewbit.errors import FewbitError

VERSION = 2
_DESCRIPTION = "fewbit_curvature.json"
_MEASURING = "fewbit_measuring.json"
"""File with the state of the model's files when the measurement began; removed after the last block is written."""
_HEAD = "head.safetensors"
_PART = re.compile(rf"block-\d{{5,}}\.safetensors|{re.escape(_HEAD)}")
_SCRATCH = re.compile(rf"(fewbit_|block-|head).*\.partial|\.tmp.*|.*{re.escape(SPILLED)}")
_SAMPLE_BYTES = 4096


def model_fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Identifies the model of a curvature: the shapes of all tensors, and a sample of the weights."""
    return {
        "model_type": checkpoint.config.get("model_type"),
        "bytes": checkpoint.bytes,
        "tensors": {name: list(entry.shape) for name, entry in checkpoint.entries.items()},
        "sample": _sample(checkpoint),
    }


def _sample(checkpoint: Checkpoint) -> str:
    """SHA-256 of a slice from the middle of every tensor; different for fine-tuned models and equal for copies."""
    digest = hashlib.sha256()
    with FileReader() as reader:
        for name in sorted(checkpoint.entries):
            entry = checkpoint.entries[name]
            length = min(entry.bytes_on_disk, _SAMPLE_BYTES)
            first = entry.start + (entry.bytes_on_disk - length) // 2
            digest.update(bytes_at(reader.descriptor(entry.file), length, first))
    return digest.hexdigest()


@dataclass(frozen=True)
class StoredCurvature:
    """An open curvature folder."""

    folder: Path
    choice: CurvatureChoice
    description: dict[str, Any]

    @property
    def files(self) -> list[Path]:
        """The existing files of blocks and of the head."""
        return [path for path in self.folder.iterdir() if _PART.fullmatch(path.name)]

    @property
    def has_head(self) -> bool:
        """Whether the head was measured."""
        return (self.folder / _HEAD).is_file()

    def head(self) -> Tensor:
        """Float32 `(in, in)` of the head, which must have been measured."""
        with safe_open(self.folder / _HEAD, framework="pt") as file:
            return _whole(file.get_tensor("head"))

    def layers(self, index: int) -> set[str]:
        """Keys of the layers of one block that were measured."""
        with safe_open(_block_path(self.folder, index), framework="pt") as file:
            return {*file.keys(), *parse_json(file.metadata()["shared"])}

    def block(self, index: int) -> dict[str, Tensor]:
        """Layer key -> float32 `(in, in)` of one block's layers."""
        path = _block_path(self.folder, index)
        if not path.is_file():
            raise FewbitError(f"{path}: missing, because the measurement did not finish: run fewbit curvature again")
        found: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                found[name] = _whole(file.get_tensor(name))
            shared = parse_json(file.metadata()["shared"])
        for name, owner in shared.items():
            found[name] = found[owner]
        return found


class CurvatureWriter:
    """A curvature folder that is being written; every file of a block or of the head in it is complete."""

    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        choice: CurvatureChoice,
        calibration: dict[str, Any],
        with_head: bool = False,
    ):
        """Start a folder, or resume one after an interruption at any point.

        calibration: describes what is measured, including the number of `blocks`. with_head: the head is measured too.
        Raises FewbitError if the folder contains blocks of another measurement, or any other files.
        """
        self.folder, self._with_head = folder, with_head
        self._blocks = int(calibration["blocks"])
        header = {
            "version": VERSION,
            "choice": asdict(choice),
            "calibration": calibration,
            "model": model_fingerprint(checkpoint),
        }
        measuring = {"files": file_stamps(entry.file for entry in checkpoint.entries.values())}
        check_curvature_place(folder, checkpoint)
        self._new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        if any(_PART.fullmatch(path.name) for path in folder.iterdir()):
            self._refuse_other(header, measuring)
        if not self._is_whole():
            write_json(folder / _MEASURING, measuring)
        write_json(folder / _DESCRIPTION, header)

    def __enter__(self) -> "CurvatureWriter":
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        """If an exception ends the measurement before anything is measured, nothing is left behind."""
        if kind is None or any(_PART.fullmatch(path.name) for path in self.folder.iterdir()):
            return
        for path in list(self.folder.iterdir()):
            if path.name in (_DESCRIPTION, _MEASURING) or _SCRATCH.fullmatch(path.name):
                drop(path)
        if self._new and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _refuse_other(self, header: dict[str, Any], measuring: dict[str, Any]) -> None:
        before = read_json(self.folder / _DESCRIPTION)
        if not isinstance(before, dict):
            raise FewbitError(
                f"{self.folder}: contains blocks but no complete {_DESCRIPTION}: choose another name, or remove it"
            )
        if before != header:
            what = differences(before, header)
            raise FewbitError(f"{self.folder}: contains another curvature ({what}): choose another name, or remove it")
        files = read_json(self.folder / _MEASURING)
        if isinstance(files, dict) and files != measuring:
            raise FewbitError(
                f"{self.folder}: the model has changed since this measurement was interrupted "
                f"({differences(files, measuring)}): choose another name, or remove it"
            )

    def has(self, index: int) -> bool:
        """Whether a block has been written."""
        return _block_path(self.folder, index).is_file()

    def put(self, index: int, sums: dict[str, Tensor], shared: dict[str, str]) -> None:
        """Write the matrices of one block; after the last part, all files that are not part of the curvature are
        removed.
        """
        path = _block_path(self.folder, index)
        save_whole({name: tensor.cpu() for name, tensor in sums.items()}, path, {"shared": json.dumps(shared)})
        self._tidy()

    @property
    def has_head(self) -> bool:
        """Whether the head has been written."""
        return (self.folder / _HEAD).is_file()

    def put_head(self, matrix: Tensor | None) -> None:
        """Write the matrix of the head; None if it never ran, which leaves the folder without one."""
        self._with_head = matrix is not None
        if matrix is not None:
            save_whole({"head": matrix.cpu()}, self.folder / _HEAD)
        self._tidy()

    def _tidy(self) -> None:
        if self._is_whole():
            for left in [path for path in self.folder.iterdir() if _SCRATCH.fullmatch(path.name)]:
                left.unlink()
            drop(self.folder / _MEASURING)

    def _is_whole(self) -> bool:
        return all(self.has(index) for index in range(self._blocks)) and (self.has_head or not self._with_head)


def check_curvature_place(folder: Path, checkpoint: Checkpoint) -> None:
    """Raises FewbitError if a curvature cannot be stored in `folder`: a link, or a folder with other files."""
    check_place(folder, checkpoint.folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FewbitError(f"{folder}: is a file: give a folder for the curvature")
    for path in folder.iterdir():
        name = path.name
        own = name in (_DESCRIPTION, _MEASURING) or _PART.fullmatch(name) or _SCRATCH.fullmatch(name)
        if not is_of_the_system(name) and not (own and path.is_file() and not path.is_symlink()):
            raise FewbitError(f"{folder}: contains {name}, which is not part of a curvature: choose another name")


def open_curvature(folder: Path, checkpoint: Checkpoint) -> StoredCurvature:
    """Open a stored curvature for a model. Raises FewbitError if it is of another model or version, or damaged."""
    path = folder / _DESCRIPTION
    if not path.is_file():
        raise FewbitError(f"{folder}: contains no curvature: make one with  fewbit curvature MODEL {folder}")
    data = read_json(path)
    if not isinstance(data, dict) or "version" not in data:
        raise FewbitError(f"{path}: damaged (no description of a curvature): measure it again")
    if data.get("version") != VERSION:
        raise FewbitError(
            f"{folder}: curvature version {data.get('version')}, but this fewbit reads {VERSION}: measure it again"
        )
    wanted, found = model_fingerprint(checkpoint), data.get("model")
    if wanted != found:
        kinds = ("model_type", "tensors", "bytes", "sample")
        differs = next((k for k in kinds if not isinstance(found, dict) or wanted[k] != found.get(k)), "tensors")
        raise FewbitError(
            f"{folder}: was measured on another model (its {differs} differs): measure the curvature of this model"
        )
    try:
        choice, calibration = CurvatureChoice(**data["choice"]), dict(data["calibration"])
        blocks = int(calibration["blocks"])
    except (ValueError, KeyError, TypeError) as error:
        raise FewbitError(f"{path}: damaged ({error}): measure it again") from error
    # Limited by the number of files: the number of blocks in a damaged file can be arbitrarily large.
    there = {entry.name for entry in folder.iterdir()}
    missing = next((i for i in range(min(blocks, len(there) + 1)) if _block_path(folder, i).name not in there), None)
    if missing is not None or blocks < 1:
        raise FewbitError(
            f"{folder}: block {(missing or 0) + 1} is not measured: run the same fewbit curvature command again"
        )
    return StoredCurvature(folder, choice, calibration)


def _whole(matrix: Tensor) -> Tensor:
    """A matrix of which only the diagonal may be stored."""
    return torch.diag(matrix) if matrix.dim() == 1 else matrix


def _block_path(folder: Path, index: int) -> Path:
    return folder / f"block-{index:05d}.safetensors"
