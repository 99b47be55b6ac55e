"""Find the 16-bit model from which a quantized folder was made, and check whether a given model is it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewbit.checkpoints.json_file import read_json
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.named import NAMED_MODELS, named_folder
from fewbit.checkpoints.origins import origin_of
from fewbit.checkpoints.output import REPORT
from fewbit.checkpoints.source import Checkpoint, open_checkpoint
from fewbit.errors import FewbitError
from fewbit.formats.config import recipe_of, tied_of, weights_of
from fewbit.formats.native import part_layout


def original_of(quantized: Checkpoint, named: str | Path | None = None, fetch: bool = True) -> Checkpoint:
    """The original model: `named` if it is given, else the one of the run that wrote the folder.

    fetch: download the run's model if necessary; otherwise it must be on the disk. Raises FewbitError if there is none,
    or if the named model cannot be the original.
    """
    if named is not None:
        original = open_checkpoint(locate(named))
        if original.quantization is not None:
            raise FewbitError(f"{original.folder}: is quantized itself: --reference must be the original model")
        check_original(quantized, original)
        return original
    if "imported" in recipe_of(quantized):
        raise FewbitError(
            f"{quantized.folder}: was imported, so its original is not known: give the original with --reference"
        )
    report = _read(quantized.folder / REPORT)
    name, source = report.get("model"), report.get("source")
    name, size = name if isinstance(name, str) else None, source.get("bytes") if isinstance(source, dict) else None
    for place in _places(quantized, name, report.get("model_is_local") is True):
        try:
            original = open_checkpoint(locate(place) if fetch else _here(place))
            check_original(quantized, original)
        except FewbitError:
            continue
        # The path that the user gave to that run may lead to another folder now.
        if original.quantization is None and original.bytes == size:
            return original
    lost = f"its original, {name}, cannot be found" if name else "its report names no original"
    raise FewbitError(f"{quantized.folder}: {lost}: give the original with --reference")


def check_original(quantized: Checkpoint, original: Checkpoint) -> None:
    """Raise FewbitError unless both models have the same type, and their tensors match in name and shape."""
    kinds = (original.config.get("model_type"), quantized.config.get("model_type"))
    wrong = f"is a {kinds[0]}, not a {kinds[1]}" if kinds[0] != kinds[1] else _missing(quantized, original)
    if wrong:
        raise FewbitError(f"{original.folder}: {wrong}: {quantized.folder} was not made from this model")


def _missing(quantized: Checkpoint, original: Checkpoint) -> str:
    weights = weights_of(quantized)
    parts = {f"{module}.{part}" for module, stored in weights.items() for part in part_layout(stored)}
    for module, stored in weights.items():
        entry = original.entries.get(stored.tensor_name(module))
        if entry is None or entry.shape != stored.tensor_shape:
            return f"has no {stored.tensor_name(module)} of that shape"
    for name, entry in quantized.entries.items():
        other = original.entries.get(name)
        if other is None and name in parts:
            continue
        if other is None or other.shape != entry.shape:
            return f"has no {name} of that shape"
    packed = {stored.tensor_name(module) for module, stored in weights.items()}
    known = quantized.entries.keys() | packed | tied_of(quantized).keys()
    more = [name for name in original.entries if name not in known]
    return f"has an additional {more[0]}" if more else ""


def _places(quantized: Checkpoint, name: str | None, is_local: bool) -> Iterator[str]:
    where = origin_of(quantized.folder)
    if where is not None and where.is_dir():
        yield str(where)
    # The name of a folder may be that of another model on the hub.
    if name is not None and (not is_local or Path(name).exists()):
        yield name


def _here(place: str) -> Path:
    return named_folder(NAMED_MODELS[place]) if place in NAMED_MODELS else Path(place)


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is none."""
    found = read_json(path) if path.is_file() else None
    return found if isinstance(found, dict) else {}
