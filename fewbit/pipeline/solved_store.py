"""Solved weights on disk, each written when it is solved, until the shards are written from them."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fewbit.checkpoints.json_file import write_whole
from fewbit.checkpoints.whole_file import save_whole
from fewbit.checkpoints.workdir import SOLVED, TOKENS
from fewbit.errors import FewbitError
from fewbit.formats.config import read_stored
from fewbit.grids.scheme import Scheme
from fewbit.pipeline.plan import stored_to_dict
from fewbit.pipeline.quantize_tensor import SolvedWeight
from fewbit.pipeline.records import LayerRecord
from fewbit.solvers.weight import NO_INPUT

_PLAIN = re.compile(r"[a-z0-9_]{1,60}(\.[a-z0-9_]{1,60}){1,9}")
_CURVATURE = "curvature"
_NOT_PLAIN = re.compile(r"[^a-z0-9_]")


def file_name(name: str) -> str:
    """The file name for a tensor: the tensor's name if it is safe, otherwise its safe characters and a hash.

    Tensor names come from untrusted files: one may be a path, too long for a file name, or differ from another only in
    case. Names without a dot are reserved for the other files in this folder.
    """
    if _PLAIN.fullmatch(name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:24]
    return f"{_NOT_PLAIN.sub('_', name)[-60:]}-{digest}"


class SolvedStore:
    """A folder with one file for every solved weight; a file is either complete or missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, name: str, solved: SolvedWeight) -> SolvedWeight:
        """Store a weight under the name of its tensor."""
        described = {
            "name": name,
            "scheme": solved.stored.scheme.to_dict(),
            "stored": stored_to_dict(solved.stored, 0),
            "record": solved.record.to_dict(),
        }
        path = self._path(name)
        save_whole(solved.parts, path, {"solved": json.dumps(described)})
        return solved

    def find(self, name: str) -> SolvedWeight | None:
        """A weight that was stored, or None."""
        path = self._path(name)
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            described = json.loads(file.metadata()["solved"])
            stored = read_stored(described["stored"], Scheme.from_dict(described["scheme"]))
            parts = {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118
        return SolvedWeight(stored, parts, LayerRecord(**described["record"]))

    def put_kept(self, name: str, tensor: Tensor) -> None:
        """Store a tensor that is changed but not quantized."""
        save_whole({"kept": tensor}, self._path(name))

    def kept(self, name: str) -> Tensor | None:
        """A changed tensor, or None if it is unchanged."""
        path = self._path(name)
        return load_file(path)["kept"] if path.is_file() else None

    def put_curvature(self, name: str, matrix: Tensor | None, without: str = NO_INPUT) -> None:
        """Store the curvature `(in, in)` of a table that is solved when it is written.

        None: it is rounded. without: the path of its record then.
        """
        tensors = {} if matrix is None else {"curvature": matrix.cpu()}
        save_whole(tensors, self._own(_CURVATURE), {"of": name, "without": without})

    def has_curvature(self, name: str) -> bool:
        """Whether the curvature of a table is stored, or that it has none."""
        path = self._own(_CURVATURE)
        if not path.is_file():
            return False
        with safe_open(path, framework="pt") as file:
            return bool(file.metadata()["of"] == name)

    def curvature(self, name: str) -> tuple[Tensor | None, str]:
        """The stored curvature of a table, or None and the path of a table without one."""
        assert self.has_curvature(name)
        with safe_open(self._own(_CURVATURE), framework="pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return found.get("curvature"), file.metadata()["without"]

    def same_tokens(self, sha256: str) -> None:
        """Raise FewbitError if the interrupted run here was calibrated on other tokens: its text has changed since."""
        path = self._own(TOKENS)
        if path.is_file() and path.read_text(encoding="ascii") != sha256:
            raise FewbitError(
                f"{self.folder}: the calibration text has changed since this run was interrupted: restore the old "
                "text, or remove that folder to start again"
            )
        write_whole(path, sha256.encode("ascii"))

    def put_notes(self, block: int, notes: list[dict[str, Any]]) -> None:
        """Store the notes on a block for the report."""
        write_whole(self._own(f"notes-{block}"), json.dumps(notes).encode())

    def notes(self, block: int) -> list[dict[str, Any]]:
        """The stored notes on a block."""
        path = self._own(f"notes-{block}")
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def take(self, name: str) -> SolvedWeight:
        """A weight that was stored; it must exist."""
        found = self.find(name)
        assert found is not None
        return found

    def _path(self, name: str) -> Path:
        return self.folder / f"{file_name(name)}{SOLVED}"

    def _own(self, name: str) -> Path:
        return self.folder / f"{name}{SOLVED}"
