"""Find the files of a folder with the model's weights: exactly those that transformers loads."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.checkpoints.json_in import read_json_object
from fewbit.errors import FewbitError
from fewbit.printable import printable

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
NAMED_IN_CONFIG = "transformers_weights"
"""The key of config.json that makes transformers load a file with another name than these two."""

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_SHARD = re.compile(r"^(?P<set>.*)-\d{5}-of-(?P<count>\d{5})\.safetensors$")


@dataclass(frozen=True)
class WeightFiles:
    """The files to read, each with the tensors that the index lists for it (None: no index), and the index."""

    files: dict[Path, set[str] | None]
    index: Path | None = None


def find_weight_files(folder: Path, config: dict[str, Any]) -> WeightFiles:
    """The set of files that transformers would load from `folder`, in its order of precedence.

    Raises FewbitError if it would load a pickle file, if there are two sets, if an index lists missing files, or if the
    folder has no weights.
    """
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    named = config.get(NAMED_IN_CONFIG)
    if named is not None:
        return _named_in_config(folder, named)
    if single.is_file() and index.is_file():
        placed = _read_index(folder, index)
        if set(placed.files) != {single}:
            raise FewbitError(
                f"{folder}: there are two sets of weights: transformers loads {SINGLE_NAME}, other programs load the "
                f"files that {INDEX_NAME} lists: remove one of the two"
            )
        return placed
    if single.is_file():
        return WeightFiles({single: None})
    if index.is_file():
        return _read_index(folder, index)
    return _under_another_name(folder)


def check_tensors(file: Path, named: set[str] | None, held: set[str]) -> None:
    """Raises FewbitError unless a file contains exactly the tensors that the index lists for it (`named`; None: no
    index).
    """
    if named is None or named == held:
        return
    if named - held:
        raise FewbitError(
            f"{file}: the index lists tensor {sorted(named - held)[0]} in this file, but the file does not contain it"
        )
    raise FewbitError(
        f"{file}: contains tensor {sorted(held - named)[0]}, which the index does not list: the index belongs to other "
        "files: fetch both again"
    )


def _named_in_config(folder: Path, named: Any) -> WeightFiles:
    if not isinstance(named, str) or not _is_plain_name(named):
        raise FewbitError(f"{folder}: {NAMED_IN_CONFIG} of config.json names a file outside the folder")
    path = folder / named
    if not path.is_file():
        raise FewbitError(f"{folder}: {NAMED_IN_CONFIG} of config.json names {named}, which does not exist")
    if named.endswith(".safetensors.index.json"):
        return _read_index(folder, path)
    if named.endswith(".safetensors"):
        return WeightFiles({path: None})
    raise FewbitError(f"{folder}: {NAMED_IN_CONFIG} of config.json names {named}, which is not a safetensors file")


def _read_index(folder: Path, index: Path) -> WeightFiles:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FewbitError(f"{index}: has no weight_map: fetch it again")
    files: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain_name(name):
            raise FewbitError(f"{index}: shard {name!r} of tensor {tensor} is outside the folder")
        files.setdefault(folder / name, set()).add(tensor)
    for path in files:
        if not path.is_file():
            raise FewbitError(f"{index}: lists {path.name}, which is missing: fetch that shard")
        if path.suffix != ".safetensors":
            raise FewbitError(f"{index}: lists {path.name}, which is not a .safetensors file")
    _check_siblings(folder, index, {path.name for path in files})
    return WeightFiles(dict(sorted(files.items())), index)


def _check_siblings(folder: Path, index: Path, named: set[str]) -> None:
    """Raise FewbitError if a shard with a name of the same set is not in the index."""
    sets = {(found["set"], found["count"]) for name in named if (found := _SHARD.match(name))}
    for path in sorted(folder.iterdir()):
        found = _SHARD.match(path.name)
        if found and (found["set"], found["count"]) in sets and path.name not in named:
            raise FewbitError(
                f"{index}: does not list {path.name}, which belongs to the same set: fetch the index again"
            )


def _under_another_name(folder: Path) -> WeightFiles:
    """A single file with another name. transformers finds no weights in this folder, so it loads no others either."""
    found = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" and not p.name.startswith("adapter_"))
    pickled = [name for name in _PICKLES if (folder / name).is_file()]
    if pickled and found:
        raise FewbitError(
            f"{folder}: transformers would load {pickled[0]}, a pickle file, instead of {printable(found[0].name)}: "
            f"rename that file to {SINGLE_NAME} if it is the same model, or remove one of the two"
        )
    if len(found) == 1:
        if printable(found[0].name) != found[0].name:
            raise FewbitError(
                f"{folder}: transformers does not load a file named {printable(found[0].name)}: rename it to "
                f"{SINGLE_NAME}"
            )
        return WeightFiles({found[0]: None})
    if found:
        raise FewbitError(f"{folder}: {len(found)} .safetensors files but no {INDEX_NAME}: fetch the index too")
    if pickled or any(p.suffix in {".bin", ".pt", ".pth"} for p in folder.iterdir()):
        raise FewbitError(
            f"{folder}: its weights are only pickle files (.bin): save the model with safe_serialization=True first"
        )
    raise FewbitError(f"{folder}: contains no .safetensors file")


def _is_plain_name(name: str) -> bool:
    return bool(name) and name not in (".", "..") and not set(name) & {"/", "\\", "\0", ":"} and name == printable(name)
