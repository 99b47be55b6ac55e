"""Find the 16-bit model from which a quantized folder was made, and check whether a given model is it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewbit.checkpoints.json_file import read_json
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.named import NAMED_MODELS, named_folder
from fewbit.checkpoints.output import MODEL_FOLDER, REPORT, RUN
from fewbit.checkpoints.source import Checkpoint, open_checkpoint
from fewbit.errors import FewbitError
from fewbit.formats.config import weights_of


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
    report = _read(quantized.folder / REPORT)
    name, source = report.get("model"), report.get("source")
    name, size = name if isinstance(name, str) else None, source.get("bytes") if isinstance(source, dict) else None
    for place in _places(quantized, name):
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
    parts = tuple(f"{module}." for module in weights)
    for module, stored in weights.items():
        entry = original.entries.get(f"{module}.weight") or original.entries.get(module)
        if entry is None or tuple(entry.shape) != shape_of(stored):
            return f"has no {module} of that shape"
    for name, entry in quantized.entries.items():
        other = original.entries.get(name)
        if other is None and name.startswith(parts):
            continue
        if other is None or other.shape != entry.shape:
            return f"has no {name} of that shape"
    packed = {name for module in weights for name in (module, f"{module}.weight")}
    more = [name for name in original.entries if name not in quantized.entries and name not in packed]
    return f"has an additional {more[0]}" if more else ""


def shape_of(stored: Any) -> tuple[int, ...]:
    """The shape of a packed weight in the original model."""
    rows, columns = stored.shape
    plain = (columns, rows) if stored.transposed else (rows, columns)
    return tuple(stored.original_shape or plain)


def _places(quantized: Checkpoint, name: str | None) -> Iterator[str]:
    where = _read(quantized.folder / RUN).get(MODEL_FOLDER)
    if isinstance(where, str) and Path(where).is_dir():
        yield where
    if name is not None:
        yield name


def _here(place: str) -> Path:
    return named_folder(NAMED_MODELS[place]) if place in NAMED_MODELS else Path(place)


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is none."""
    found = read_json(path) if path.is_file() else None
    return found if isinstance(found, dict) else {}
