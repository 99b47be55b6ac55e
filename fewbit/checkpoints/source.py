"""A Hugging Face folder as a list of tensors: which file holds each, checked before any work starts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.checkpoints.adapter import carries_adapter, is_adapter_file, not_a_model
from fewbit.checkpoints.safetensors_io import TensorEntry, read_header
from fewbit.errors import FewbitError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its folder, its config, and every tensor in storage order."""

    folder: Path
    config: dict[str, Any]
    entries: dict[str, TensorEntry]
    companions: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all weights files."""
        return sum(path.stat().st_size for path in {entry.file for entry in self.entries.values()})

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The `quantization_config` of a folder that is already quantized."""
        return self.config.get("quantization_config")

    @property
    def is_native(self) -> bool:
        """Whether the folder is in fewbit's own format."""
        return self.quantization is not None and self.quantization.get("quant_method") == "fewbit"

    @property
    def has_scaled_channels(self) -> bool:
        """Whether scales were folded into the weights before they were rounded: none is its original's, rounded."""
        recipe = (self.quantization or {}).get("recipe") or {}
        return bool(recipe.get("channel_scales", "none") != "none")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the config and all headers of a folder; FewbitError says what is missing or broken."""
    if not folder.exists():
        raise FewbitError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise FewbitError(f"{folder}: not a folder (a model is a folder with config.json and .safetensors)")
    if not any(folder.iterdir()):
        raise FewbitError(f"{folder}: the folder is empty")
    config_path = folder / "config.json"
    if not config_path.is_file() and carries_adapter(folder):
        raise FewbitError(not_a_model(folder))
    if not config_path.is_file():
        raise FewbitError(f"{folder}: no config.json: is this a Hugging Face model folder?")
    config = _read_json(config_path)
    if not isinstance(config.get("quantization_config", {}), dict | None):
        raise FewbitError(f"{config_path}: its quantization_config is not an object")
    files = _weight_files(folder)
    entries: dict[str, TensorEntry] = {}
    for file, expected in files.items():
        header, _ = read_header(file)
        if expected is not None and expected - set(header):
            missing = sorted(expected - set(header))[0]
            raise FewbitError(f"{file}: the index places tensor {missing} here, but the file does not have it")
        for name, entry in header.items():
            if name in entries:
                raise FewbitError(f"{folder}: tensor {name} stands in both {entries[name].file.name} and {file.name}")
            entries[name] = entry
    companions = tuple(sorted(p for p in folder.iterdir() if p.is_file() and _is_companion(p) and p != config_path))
    return Checkpoint(folder, config, entries, companions)


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    index_path = folder / INDEX_NAME
    if index_path.is_file():
        weight_map = _read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FewbitError(f"{index_path}: no weight_map in it: fetch it again")
        files: dict[Path, set[str] | None] = {}
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
                raise FewbitError(f"{index_path}: shard {name!r} of tensor {tensor} lies outside the folder")
            path = folder / name
            if not path.is_file():
                raise FewbitError(f"{index_path}: it names {name}, which is not there: fetch that shard")
            names = files.setdefault(path, set())
            assert names is not None
            names.add(tensor)
        return dict(sorted(files.items()))
    if (folder / SINGLE_NAME).is_file():
        return {folder / SINGLE_NAME: None}
    found = sorted(path for path in folder.glob("*.safetensors") if not is_adapter_file(path.name))
    if len(found) == 1:
        return {found[0]: None}
    if found:
        raise FewbitError(f"{folder}: {len(found)} .safetensors files but no {INDEX_NAME}: fetch the index too")
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt*")):
        raise FewbitError(f"{folder}: only pickled weights (.bin): save it with safe_serialization=True first")
    raise FewbitError(f"{folder}: no .safetensors file in it")


def _is_companion(path: Path) -> bool:
    """Files that travel with the weights: tokenizer, generation config, chat template, licence, model card."""
    if (
        path.name.startswith((".", "fewbit_"))
        or is_adapter_file(path.name)
        or path.name.endswith((".index.json", ".safetensors.json"))
    ):
        return False
    return path.suffix in {".json", ".jinja", ".model", ".txt", ".md", ".tiktoken"} or path.name.upper() in {
        "LICENSE",
        "NOTICE",
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise FewbitError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise FewbitError(f"{path}: not a JSON object")
    return data
