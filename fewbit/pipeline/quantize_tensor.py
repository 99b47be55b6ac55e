"""One tensor of a checkpoint, streamed: rows are read, quantized by several workers, and put together in order."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewbit.architecture.norms import gain_before, gain_offset
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import Checkpoint
from fewbit.errors import FewbitError
from fewbit.formats import native
from fewbit.formats.scheme import StoredWeight, stored_bytes
from fewbit.outliers.adaptive_lasso import outlier_count, threshold
from fewbit.pipeline.plan import PlannedTensor, outliers_per_group, place_outliers
from fewbit.pipeline.quantize_weight import NotFiniteError, QuantizedRows, RowsContext, quantize_rows
from fewbit.pipeline.tensor_rows import TensorRows
from fewbit.recipe import Recipe

# Few enough that passes over them stay in a core's cache, many enough that Python's lock is rarely waited for.
_CHUNK_WEIGHTS = 1 << 19
_SMALLEST_NORMAL_FLOAT16 = 2.0**-14


@dataclass(frozen=True)
class Workers:
    """Who does the arithmetic: a pool of threads, and the device they send rows to."""

    pool: ThreadPoolExecutor
    device: torch.device


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quantize_tensor(
    item: PlannedTensor, checkpoint: Checkpoint, reader: FileReader, recipe: Recipe, workers: Workers
) -> Callable[[], tuple[StoredWeight, dict[str, Tensor], dict[str, Any]]]:
    """Quantize one planned tensor.

    Returns a function that puts the rows together (another thread can call it while the next tensor is quantized): how
    it is stored, its parts on the CPU, and its record for the report. Raises FewbitError naming the tensor when a
    weight is NaN or infinite or a scale cannot be stored.
    """
    stored = item.stored
    assert stored is not None
    source = TensorRows(item, reader, _CHUNK_WEIGHTS)
    context = RowsContext(
        recipe=recipe,
        scheme=stored.scheme,
        threshold=_threshold(source, stored, recipe, workers),
        per_group=outliers_per_group(recipe, stored.scheme.group_size) if recipe.outlier_scope == "group" else 0,
        importance=_importance(item, checkpoint, reader, recipe, workers.device),
    )

    def work(span: tuple[int, int]) -> QuantizedRows:
        return quantize_rows(source.read(*span).to(workers.device), context)

    try:
        results = list(workers.pool.map(work, source.spans))
    except NotFiniteError as error:
        raise FewbitError(
            f"{item.tensor.entry.name}: a weight is NaN or infinite: the checkpoint is damaged"
        ) from error
    except FewbitError as error:
        raise FewbitError(f"{item.tensor.entry.name}: {error}") from error
    return partial(assemble, item, stored, results, source.spans, recipe)


def _too_small(parts: dict[str, Tensor], stored: StoredWeight) -> bool:
    return float(native.read_scales(parts, stored).abs().max()) < _SMALLEST_NORMAL_FLOAT16


def _threshold(source: TensorRows, stored: StoredWeight, recipe: Recipe, workers: Workers) -> float | None:
    if recipe.outliers == "none" or recipe.outlier_scope != "tensor":
        return None
    chunks = [partial(source.read, *span) for span in source.spans]
    return threshold(chunks, outlier_count(stored.weights, recipe.outlier_fraction), workers.pool)


def _importance(
    item: PlannedTensor, checkpoint: Checkpoint, reader: FileReader, recipe: Recipe, device: torch.device
) -> Tensor | None:
    """c_j of each column: after a norm an input has about unit power times its squared gain."""
    if recipe.column_weights == "none":
        return None
    entry = gain_before(item.tensor.entry.name, checkpoint.entries)
    if entry is None or entry.numel != item.tensor.matrix_shape[1]:
        return None
    gain = reader.tensor(entry).to(torch.float32) + gain_offset(checkpoint.config)
    power = gain.square().clamp(min=1e-8)
    return (power / power.mean()).to(device)


def assemble(
    item: PlannedTensor,
    stored: StoredWeight,
    results: list[QuantizedRows],
    spans: list[tuple[int, int]],
    recipe: Recipe,
) -> tuple[StoredWeight, dict[str, Tensor], dict[str, Any]]:
    """Put rows `(first, count)` together: how the weight is stored, its parts on the CPU, its record for the report."""
    columns = stored.shape[1]
    parts = {name: torch.cat([r.parts[name] for r in results]).cpu() for name in results[0].parts}
    if stored.scheme.outlier_grid != "none":
        moved = [
            r.outlier_positions + first * columns
            for r, (first, _) in zip(results, spans, strict=True)
            if r.outlier_positions is not None
        ]
        where = torch.cat(moved).cpu()
        codes = torch.cat([r.outlier_codes for r in results if r.outlier_codes is not None]).cpu()
        count = where.numel()
        if count:
            placed = place_outliers(stored.shape, stored.scheme, recipe, count)
            stored = replace(stored, outliers=count, positions=placed)
            parts.update(native.pack_outliers(codes, where, stored))
        else:
            scheme = replace(stored.scheme, outlier_grid="none", outlier_bits=0)
            stored = replace(stored, scheme=scheme, outliers=0, positions="none")
            parts = {name: part for name, part in parts.items() if not name.startswith("outlier_")}
    native.check_parts(parts, stored)
    norm, error = sum(r.squared_norm for r in results), sum(r.squared_error for r in results)
    if stored.scheme.scale_format == "float16" and error > 0.1 * norm and _too_small(parts, stored):
        raise FewbitError(
            f"{item.tensor.entry.name}: its weights are too small for float16 scales: use --scale-format float32"
        )
    record = {
        "name": item.tensor.entry.name,
        "shape": list(item.tensor.entry.shape),
        "weights": stored.weights,
        "group_size": stored.scheme.group_size,
        "outliers": stored.outliers,
        "bytes": stored_bytes(stored),
        "bits_per_weight": 8 * stored_bytes(stored) / stored.weights,
        "relative_squared_error": error / norm if norm else 0.0,
    }
    return stored, parts, record
