"""`fewbit inspect`: statistics of a model's weights, and their quantization errors."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbit.architecture.coverage import cover
from fewbit.architecture.orientation import to_matrix
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.safetensors_io import FileReader, TensorEntry
from fewbit.checkpoints.source import Checkpoint, open_checkpoint, refuse_quantized
from fewbit.errors import FewbitError
from fewbit.formats.config import describe, has_scaled_channels, weights_of
from fewbit.formats.native import part_layout, stored_bytes
from fewbit.formats.original import original_of
from fewbit.grids.scheme import StoredWeight
from fewbit.inspection import statistics
from fewbit.progress import Progress
from fewbit.runtime.unpack import check_all_parts, read_weight
from fewbit.versions import versions

_CHUNK = 1 << 22


def inspect(model: str | Path, reference: str | Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Statistics of every floating-point tensor of a model.

    For a native folder, each quantized weight is decoded and compared with the tensor of `reference` (default: the
    model that the folder was made from, if it is still available locally). Returns
    ``{"models": [...], "reference", "protocol", "tensors": [...], "versions"}``. Raises FewbitError for bad input.
    """
    checkpoint = open_checkpoint(locate(model))
    if not checkpoint.is_native:
        refuse_quantized(checkpoint)
    with FileReader() as reader:
        if checkpoint.quantization is None:
            if reference is not None:
                raise FewbitError(f"{model}: is not a quantized folder, so --reference has nothing to compare: omit it")
            tensors = _original(checkpoint, reader, progress)
            made_from = None
        else:
            check_all_parts(checkpoint)
            original = _find_reference(checkpoint, reference)
            tensors = _quantized(checkpoint, original, reader, progress)
            made_from = str(original.folder) if original else None
    return {
        "models": [{"name": str(model), **describe(checkpoint)}],
        "reference": made_from,
        "protocol": {"estimator": statistics.ESTIMATOR},
        "tensors": tensors,
        "versions": versions(),
    }


def _original(checkpoint: Checkpoint, reader: FileReader, progress: Progress | None) -> list[dict[str, Any]]:
    actions = {
        t.entry.name: ("embedding" if t.is_vocabulary else t.action, t.reason)
        for t in cover(checkpoint.entries.values(), checkpoint.config).tensors
    }
    floats = [e for e in checkpoint.entries.values() if _is_described(e)]
    total, done = sum(e.bytes for e in floats), 0
    rows = []
    for entry in floats:
        action, reason = actions[entry.name]
        row = {"name": entry.name, "shape": list(entry.shape), "action": action, "reason": reason}
        rows.append({**row, "bits": 8.0 * entry.dtype.itemsize, **_describe(_chunks(entry, reader))})
        done += entry.bytes
        if progress:
            progress(done, total, entry.name)
    return rows


def _quantized(
    checkpoint: Checkpoint, original: Checkpoint | None, reader: FileReader, progress: Progress | None
) -> list[dict[str, Any]]:
    weights = weights_of(checkpoint)
    parts = {f"{module}.{part}" for module, stored in weights.items() for part in part_layout(stored)}
    kept = [e for name, e in checkpoint.entries.items() if name not in parts and _is_described(e)]
    rows = []
    steps = len(weights) + len(kept)
    for done, (module, stored) in enumerate(weights.items(), 1):
        rows.append(_compare(checkpoint, original, reader, module, stored))
        if progress:
            progress(done, steps, module)
    for done, entry in enumerate(kept, len(weights) + 1):
        row = {
            "name": entry.name,
            "shape": list(entry.shape),
            "action": "keep",
            "bits": 8.0 * entry.dtype.itemsize,
        }
        rows.append({**row, **_describe(_chunks(entry, reader))})
        if progress:
            progress(done, steps, entry.name)
    return rows


def _compare(
    checkpoint: Checkpoint, original: Checkpoint | None, reader: FileReader, module: str, stored: StoredWeight
) -> dict[str, Any]:
    weight = read_weight(checkpoint, reader, module, stored)
    name = stored.tensor_name(module)
    row: dict[str, Any] = {
        "name": name,
        "shape": list(stored.tensor_shape),
        "action": "quantized",
        "bits": 8 * stored_bytes(stored) / stored.weights,
        **_describe(_pieces(weight)),
    }
    if original is None:
        return row
    entry = original.entries[name]
    if has_scaled_channels(checkpoint):
        return row
    before = to_matrix(reader.tensor(entry).float(), stored.transposed)
    olds, news = _pieces(before), _pieces(weight)
    squared = sum(float(old().double().square().sum()) for old in olds)
    error = sum(float((new() - old()).double().square().sum()) for old, new in zip(olds, news, strict=True))
    row["relative_squared_error"] = error / squared if squared else 0.0
    span = statistics.measure_range(olds)
    p = statistics.histogram(olds, span)
    q = statistics.histogram(news, span)
    row["entropy_bits_original"] = statistics.entropy(p)
    row["entropy_bits"] = statistics.entropy(q)
    row["kl_divergence_bits"] = statistics.kl_divergence(p, q)
    row["jensen_shannon_bits"] = statistics.jensen_shannon(p, q)
    return row


def _pieces(weight: Tensor) -> list[Callable[[], Tensor]]:
    """A weight in pieces: copies of a whole embedding in float64 would take gigabytes."""
    return [partial(piece.view, -1) for piece in weight.reshape(-1).split(_CHUNK)]


def _describe(chunks: statistics.Chunks) -> dict[str, Any]:
    span = statistics.measure_range(chunks)
    if not span.finite or not span.count:
        return {"finite": span.finite}
    row: dict[str, Any] = {"finite": True, "kurtosis": statistics.kurtosis(chunks, span)}
    row.update(statistics.energy_shares(chunks, span.count))
    if span.high > span.low:
        row["entropy_bits"] = statistics.entropy(statistics.histogram(chunks, span))
    else:
        row["entropy_bits"] = 0.0
    if row["kurtosis"] != row["kurtosis"]:
        del row["kurtosis"]
    return row


def _is_described(entry: TensorEntry) -> bool:
    return entry.dtype.is_floating_point and entry.dtype.itemsize in (2, 4)


def _chunks(entry: TensorEntry, reader: FileReader) -> list[Callable[[], Tensor]]:
    return [
        partial(reader.read, entry, first, min(_CHUNK, entry.numel - first)) for first in range(0, entry.numel, _CHUNK)
    ]


def _find_reference(checkpoint: Checkpoint, reference: str | Path | None) -> Checkpoint | None:
    try:
        return original_of(checkpoint, reference, fetch=False)
    except FewbitError:
        if reference is not None:
            raise
        return None
