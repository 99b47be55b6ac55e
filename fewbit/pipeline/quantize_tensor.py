"""Quantize one tensor of a checkpoint in chunks: workers read and quantize rows, which are then joined in order."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from fewbit.architecture.norms import gain_before, gain_offset
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import Checkpoint
from fewbit.errors import FewbitError
from fewbit.formats import native
from fewbit.grids.scale_formats import SCALE_FORMATS
from fewbit.grids.scheme import StoredWeight
from fewbit.grids.table import grid_of
from fewbit.outliers.grids import pack_outliers
from fewbit.outliers.rules import OUTLIER_RULES
from fewbit.pipeline.plan import PlannedTensor, place_outliers
from fewbit.pipeline.records import LayerRecord, relative_errors
from fewbit.pipeline.tensor_rows import TensorRows
from fewbit.solvers.settled import Encoded, NotFiniteError, round_rows
from fewbit.solvers.solved import Solved
from fewbit.solvers.weight import row_solver
from fewbit.transforms.table import TRANSFORMS

# Small enough for a core's cache, and large enough that threads rarely wait for Python's global lock.
_CHUNK_WEIGHTS = 1 << 19
_SOLVED_AT_ONCE = 1 << 22
"""The column solver takes several steps for every column, whatever the number of rows."""
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class SolvedWeight:
    """How a weight is stored, its parts on the CPU in the order of the format, and its record for the report."""

    stored: StoredWeight
    parts: dict[str, Tensor]
    record: LayerRecord


@dataclass(frozen=True)
class Workers:
    """Where the computation runs: a pool of threads, and the device to which the rows are moved."""

    pool: ThreadPoolExecutor
    device: torch.device


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quantize_tensor(
    item: PlannedTensor, checkpoint: Checkpoint, reader: FileReader, workers: Workers
) -> Callable[[], SolvedWeight]:
    """Quantize one planned tensor by rounding.

    Returns a function that joins the rows (another thread can call it while the next tensor is quantized). Raises
    FewbitError, which names the tensor, if a weight is NaN or infinite or a scale cannot be stored.
    """
    stored, choices = item.stored, item.choices
    source = TensorRows(item, reader, _CHUNK_WEIGHTS)
    rule, transform = OUTLIER_RULES[choices.outliers.rule], TRANSFORMS[stored.scheme.transform]
    mapped = transform.fixed(stored.shape[1])

    def read(first: int, count: int) -> Tensor:
        rows = source.read(first, count)
        return transform.weight(rows.float(), mapped) if mapped else rows

    chunks = [partial(read, *span) for span in source.spans]
    cut = rule.cut(chunks, stored.weights, choices.outliers, workers.pool)
    importance = _importance(item, checkpoint, reader, workers.device)

    def work(span: tuple[int, int]) -> Encoded:
        found = round_rows(read(*span).to(workers.device), choices, cut, importance)
        # The decoded weights of a whole embedding would take a gigabyte, and nobody reads them.
        return replace(found, decoded=found.decoded.new_empty(0))

    return partial(assemble, item, _over_rows(item, work, source.spans, workers), source.spans)


def solve_tensor(
    item: PlannedTensor, curvature: Tensor, reader: FileReader, workers: Workers
) -> Callable[[], SolvedWeight]:
    """Solve a planned tensor without outliers, a few rows at a time, with a curvature `(in, in)`.

    Returns and raises the same as :func:`quantize_tensor`.
    """
    source = TensorRows(item, reader, _SOLVED_AT_ONCE)
    solve = row_solver(curvature.to(workers.device), item.choices, workers.device)

    def work(span: tuple[int, int]) -> Solved:
        found = solve(source.read(*span).to(workers.device))
        return replace(found, rows=replace(found.rows, decoded=found.decoded.new_empty(0)))

    results = _over_rows(item, work, source.spans, workers)

    def join() -> SolvedWeight:
        whole = assemble(item, [one.rows for one in results], source.spans)
        return replace(whole, record=replace(whole.record, **solved_facts(results)))

    return join


def _over_rows(
    item: PlannedTensor, work: Callable[[tuple[int, int]], _Found], spans: list[tuple[int, int]], workers: Workers
) -> list[_Found]:
    """The results of `work` on rows `(first, count)`, in their order."""
    try:
        return list(workers.pool.map(work, spans))
    except NotFiniteError as error:
        raise FewbitError(
            f"{item.tensor.entry.name}: a weight is NaN or infinite: the checkpoint is damaged"
        ) from error
    except FewbitError as error:
        raise FewbitError(f"{item.tensor.entry.name}: {error}") from error


def solved_facts(solved: Sequence[Solved]) -> dict[str, Any]:
    """How the parts of a weight were solved, and their mean error under the curvature, for its record."""
    paths = sorted({one.path for one in solved})
    predicted = [one.predicted for one in solved if one.predicted is not None]
    return {
        "path": next((path for path in paths if path.startswith("fallback")), "; ".join(paths)),
        "relative_curvature_error": sum(predicted) / len(predicted) if predicted else None,
    }


def _too_small(parts: dict[str, Tensor], stored: StoredWeight) -> bool:
    """Whether all scales are so small that their format loses precision."""
    smallest = SCALE_FORMATS[stored.scheme.scale_format].smallest
    if not smallest:
        return False
    values = grid_of(stored.scheme).read(parts, stored.scheme, stored.groups)
    return float(values["scale"].abs().max()) < smallest


def _importance(item: PlannedTensor, checkpoint: Checkpoint, reader: FileReader, device: torch.device) -> Tensor | None:
    """c_j of each column, its squared norm gain: the mean square of a norm's output is about its squared gain."""
    if not item.recipe.grid.weighs_columns:
        return None
    entry = gain_before(item.tensor.entry.name, checkpoint.entries)
    if entry is None or entry.numel != item.tensor.matrix_shape[1]:
        return None
    gain = reader.tensor(entry).to(torch.float32) + gain_offset(checkpoint.config)
    power = gain.square().clamp(min=1e-8)
    return (power / power.mean()).to(device)


def assemble(item: PlannedTensor, results: list[Encoded], spans: list[tuple[int, int]]) -> SolvedWeight:
    """Join rows `(first, count)`: how the weight is stored, its parts on the CPU, and its record for the report."""
    stored, columns = item.stored, item.stored.shape[1]
    parts = {name: torch.cat([r.parts[name] for r in results]).cpu() for name in results[0].parts}
    if stored.scheme.has_outliers:
        moved = [r.where + first * columns for r, (first, _) in zip(results, spans, strict=True) if r.where is not None]
        where = torch.cat(moved).cpu()
        codes = torch.cat([r.outlier_codes for r in results if r.outlier_codes is not None]).cpu()
        count = where.numel()
        if count:
            stored = replace(stored, outliers=count, positions=place_outliers(stored.shape, item.choices, count))
            parts.update(pack_outliers(codes, where, stored))
        else:
            scheme = replace(stored.scheme, outlier_grid="none", outlier_bits=0)
            stored = replace(stored, scheme=scheme, outliers=0, positions="none")
            parts = {name: part for name, part in parts.items() if not name.startswith("outlier_")}
    transform = TRANSFORMS[stored.scheme.transform]
    parts.update(transform.store(transform.fixed(columns)))
    native.check_parts(parts, stored)
    parts = {name: parts[name] for name in native.part_layout(stored)}
    errors = relative_errors([(r.squared_error, r.squared_norm, r.group_errors) for r in results])
    if errors["relative_squared_error"] > 0.1 and _too_small(parts, stored):
        raise FewbitError(
            f"{item.tensor.entry.name}: its weights are too small for float16 scales: use --scale-format float32"
        )
    return SolvedWeight(stored, parts, LayerRecord.of(item.tensor.module, stored, errors))
