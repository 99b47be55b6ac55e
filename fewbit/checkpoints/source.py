"""A Hugging Face folder as a list of tensors with their files, checked before any work starts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewbit.checkpoints.adapter import carries_adapter, not_a_model
from fewbit.checkpoints.companions import Companion, check_link, find_companions
from fewbit.checkpoints.fp8 import described_fp8, read_as_products
from fewbit.checkpoints.json_in import read_json_object
from fewbit.checkpoints.quantized_by import IMPORTED, MODELOPT_FILE, Foreign, described_in, seen_in
from fewbit.checkpoints.safetensors_io import TensorEntry, read_header
from fewbit.checkpoints.weight_files import INDEX_NAME, NAMED_IN_CONFIG, SINGLE_NAME, check_tensors, find_weight_files
from fewbit.errors import FewbitError
from fewbit.printable import check_name

__all__ = ["INDEX_NAME", "SINGLE_NAME", "Checkpoint", "open_checkpoint", "refuse_quantized"]


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: its folder, its config, and every tensor in storage order.

    config: as it describes `entries`; if FP8 codes are read as products, without the description of the codes.
    companions, left: the files that are copied together with the weights, and the names of those that are not.
    foreign: another tool's quantization that cannot be read, or None. guards: the tensors of a native folder that only
    stop loaders that do not know the format; they are not among `entries`.
    """

    folder: Path
    config: dict[str, Any]
    entries: dict[str, TensorEntry]
    companions: tuple[Companion, ...]
    left: tuple[str, ...] = ()
    foreign: Foreign | None = None
    guards: Mapping[str, TensorEntry] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """All weight files, sorted."""
        return sorted({path for entry in self.entries.values() for path in entry.files})

    @property
    def bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The `quantization_config` of a quantized folder, or the tool's name if it has none; None if not quantized."""
        found: dict[str, Any] | None = self.config.get("quantization_config")
        return found or ({"quant_method": self.foreign.tool} if self.foreign is not None else None)

    @property
    def is_native(self) -> bool:
        """Whether the folder is in fewbit's own format."""
        return _is_native(self.config)

    @property
    def is_products(self) -> bool:
        """Whether weights are read as products of codes and scales, so that other programs read different values."""
        return any(entry.scaled is not None for entry in self.entries.values())


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the config and all headers of a folder. Raises FewbitError for what is missing, invalid or ambiguous."""
    check_name(str(folder))
    if not folder.exists():
        raise FewbitError(f"{folder}: no such folder")
    check_name(str(folder.resolve()))
    if not folder.is_dir():
        raise FewbitError(f"{folder}: not a folder (a model is a folder with config.json and .safetensors)")
    if not any(folder.iterdir()):
        raise FewbitError(f"{folder}: the folder is empty")
    config_path = folder / "config.json"
    if not config_path.is_file() and carries_adapter(folder):
        raise FewbitError(not_a_model(folder))
    if not config_path.is_file():
        raise FewbitError(f"{folder}: no config.json: is this a Hugging Face model folder?")
    check_link(folder, config_path)
    config = _read_config(config_path)
    found = find_weight_files(folder, config)
    entries: dict[str, TensorEntry] = {}
    for file, expected in found.files.items():
        check_link(folder, file)
        header, _ = read_header(file)
        for name, entry in header.items():
            if name in entries:
                raise FewbitError(f"{folder}: tensor {name} is in both {entries[name].file.name} and {file.name}")
            entries[name] = entry
        check_tensors(file, expected, set(header))
    config.pop(NAMED_IN_CONFIG, None)
    read = {config_path, *found.files, *([found.index] if found.index else [])}
    guards = _guards(config, entries)
    config, rest, foreign = _understood(folder, config, {n: entry for n, entry in entries.items() if n not in guards})
    if (folder / MODELOPT_FILE).is_file():
        check_link(folder, folder / MODELOPT_FILE)
        read.add(folder / MODELOPT_FILE)
    others = find_companions(folder, read)
    return Checkpoint(folder, config, rest, others.carried, others.left, foreign, guards)


def says_native(folder: Path) -> bool:
    """Whether the folder's config names fewbit, without opening its tensors; False for what opening would refuse."""
    path = folder / "config.json"
    try:
        return path.is_file() and _is_native(_read_config(path))
    except FewbitError:
        return False


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raises FewbitError with the tool's name if a checkpoint is already quantized, since its original weights are
    gone.
    """
    if checkpoint.is_native:
        raise FewbitError(f"{checkpoint.folder}: already quantized (fewbit): give the 16-bit original")
    if checkpoint.foreign is not None:
        tool, sign = checkpoint.foreign.tool, checkpoint.foreign.sign
        other = ", or read its codes with  fewbit import" if tool in IMPORTED else ""
        raise FewbitError(
            f"{checkpoint.folder}: already quantized ({tool}; see {sign}): give the 16-bit original{other}"
        )


def _understood(
    folder: Path, config: dict[str, Any], entries: dict[str, TensorEntry]
) -> tuple[dict[str, Any], dict[str, TensorEntry], Foreign | None]:
    """Config and tensors as a 16-bit model if they can be read as one; otherwise unchanged, with the tool's name."""
    if _is_native(config):
        return config, entries, None
    described = described_in(config, folder)
    fp8 = described_fp8(config, folder) if described is not None else None
    if fp8 is None:
        return config, entries, described or seen_in(entries, folder)
    products = read_as_products(entries, fp8, folder)
    rest = seen_in(products, folder)
    if rest is not None:
        return config, entries, rest
    return _without_quantization(config), products, None


def _guards(config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The guards of a native folder; its config is not checked yet."""
    weights = config["quantization_config"].get("weights") if _is_native(config) else None
    packed = weights if isinstance(weights, dict) else {}
    return {
        name: entry
        for name, entry in entries.items()
        if entry.shape == (0,) and {name, name.removesuffix(".weight")} & packed.keys()
    }


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config, including those of its parts, without descriptions of a quantization."""
    drop = ("quantization_config", "compression_config", "quantization")
    return {
        key: _without_quantization(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in drop
    }


def _is_native(config: Mapping[str, Any]) -> bool:
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "fewbit"


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json_object(path)
    if not isinstance(config.get("quantization_config", {}), dict | None):
        raise FewbitError(f"{path}: its quantization_config is not an object")
    if "configuration_files" in config:
        # transformers then reads another file instead of this one; which one depends on its version.
        raise FewbitError(
            f"{path}: its configuration_files lists other configs that transformers may load: remove that key"
        )
    return config
