"""Solved weights on disk, each written when it is found, until the shards are put together from them."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fewbit.checkpoints.whole_file import save_whole
from fewbit.checkpoints.workdir import SOLVED, TOKENS
from fewbit.errors import FewbitError
from fewbit.formats.config import read_stored
from fewbit.grids.scheme import Scheme
from fewbit.pipeline.plan import stored_to_dict
from fewbit.pipeline.quantize_tensor import SolvedWeight


class SolvedStore:
    """A folder with one file for every solved weight; a file is there in full or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, name: str, solved: SolvedWeight) -> SolvedWeight:
        """Keep a weight under the name of its tensor."""
        described = {
            "name": name,
            "scheme": solved.stored.scheme.to_dict(),
            "stored": stored_to_dict(solved.stored, 0),
            "record": solved.record,
        }
        path = self._path(name)
        save_whole(solved.parts, path, {"solved": json.dumps(described)})
        return solved

    def find(self, name: str) -> SolvedWeight | None:
        """A weight that was kept, or None."""
        path = self._path(name)
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            described = json.loads(file.metadata()["solved"])
            stored = read_stored(described["stored"], Scheme.from_dict(described["scheme"]))
            parts = {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118
        return SolvedWeight(stored, parts, described["record"])

    def put_kept(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor that is not quantized but changed."""
        save_whole({"kept": tensor}, self._path(name))

    def kept(self, name: str) -> Tensor | None:
        """A changed tensor, or None when it is as the checkpoint has it."""
        path = self._path(name)
        return load_file(path)["kept"] if path.is_file() else None

    def same_tokens(self, sha256: str) -> None:
        """FewbitError when an interrupted run here was calibrated on other tokens: its text has changed since."""
        path = self._path(TOKENS)
        if path.is_file() and path.read_text(encoding="ascii") != sha256:
            raise FewbitError(
                f"{self.folder}: the calibration text has changed since this run was interrupted: put the old text "
                "back, or remove that folder to begin again"
            )
        path.write_text(sha256, encoding="ascii")

    def put_notes(self, block: int, notes: list[dict[str, Any]]) -> None:
        """Keep what the report will say of a block."""
        path = self._path(f"notes-{block}")
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(notes), encoding="utf-8")
        partial.replace(path)

    def notes(self, block: int) -> list[dict[str, Any]]:
        """What was kept for a block."""
        path = self._path(f"notes-{block}")
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def take(self, name: str) -> SolvedWeight:
        """A weight that was kept."""
        found = self.find(name)
        assert found is not None
        return found

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SOLVED}"
