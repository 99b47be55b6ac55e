"""`fewbit plan`: the result of a run and the resources that it needs, before it starts."""

import math
import time
from pathlib import Path
from typing import Any

import torch

from fewbit.advice import advice
from fewbit.calibration.generate import BATCH
from fewbit.calibration.source import parse_sources, shares
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import Checkpoint, open_checkpoint
from fewbit.errors import FewbitError
from fewbit.grids.table import row_block
from fewbit.linear import is_native, linear
from fewbit.outliers.rules import OUTLIER_RULES
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.plan import (
    KeptTensor,
    PlannedTensor,
    cover_original,
    group_size_problem,
    plan_tensors,
    with_sizes_that_fit,
)
from fewbit.pipeline.quantize_tensor import available_cores
from fewbit.pipeline.stages import check_length, stages_of
from fewbit.recipe import Recipe
from fewbit.solvers.settled import round_rows

_START_SECONDS = 1.5
_START_BYTES = 350_000_000
_TRIAL_ROWS = 256
_READ_BYTES_A_SECOND = 1e10
_SOLVE_NANOSECONDS = 160.0
"""Time of the column solver per weight, as measured with `benchmarks/calibrated.py` on two cores."""


def forecast(model: str | Path, recipe: Recipe, options: CalibrationOptions | None = None) -> dict[str, Any]:
    """What `quantize` would do with these choices; nothing is written. Times are rough estimates from short trials.

    Returns ``tensors`` (by action), ``output`` (weights, bits per weight, bytes), ``needs`` (seconds, memory_bytes,
    disk_bytes), ``problems`` (group sizes that do not divide, limits that a calibrated run would exceed), ``advice``
    and ``exports`` (format -> None, or why it cannot represent the result). Raises FewbitError for a model that cannot
    be read.
    """
    options = options or CalibrationOptions()
    checkpoint = open_checkpoint(locate(model))
    # Layers whose groups do not divide are shown, not refused: they are planned with the size that fits them best.
    coverage = cover_original(checkpoint, recipe.include, recipe.exclude)
    problem = group_size_problem(coverage, recipe)
    fitted = with_sizes_that_fit(recipe) if problem else recipe
    if problem and group_size_problem(coverage, fitted):
        raise FewbitError(problem)
    plan = plan_tensors(checkpoint, coverage, fitted)
    items, tables = plan.quantized, plan.tables
    weights = sum(item.stored.weights for item in items)
    size, written = sum(item.bytes for item in items), plan.bytes
    seconds, memory = _zero_shot(checkpoint, items, tables, recipe)
    scratch, problems = 0, [problem] if problem else []
    if recipe.curvature is not None:
        try:
            solved = [*items, *tables] if recipe.solver.method.compensates else items
            more, memory, spilled = _calibrated(checkpoint, solved, recipe, options)
            seconds, scratch = seconds + more, size + spilled
        except FewbitError as error:
            problems.append(str(error))
    return {
        "model": str(model),
        "method": recipe.method,
        "bits": recipe.bits,
        "tensors": {
            "quantize": [_described(item) for item in items],
            "embeddings": [_described(item) for item in tables],
            "keep": [_kept(item) for item in plan.kept],
        },
        "output": {
            "weights": weights,
            "weights_all": plan.weights,
            "bits_per_weight": 8 * size / weights,
            "bits_per_weight_all": 8 * plan.weight_bytes / plan.weights,
            "bytes": written,
            "source_bytes": checkpoint.bytes,
        },
        "needs": {"seconds": seconds, "memory_bytes": memory, "disk_bytes": written + scratch},
        "problems": problems,
        "advice": advice(str(model), recipe),
        "exports": {"fewbit": None, "plain 16-bit (fewbit unpack)": None},
    }


def _described(item: PlannedTensor) -> dict[str, Any]:
    return {
        "name": item.tensor.entry.name,
        "shape": list(item.tensor.entry.shape),
        "group_size": item.stored.scheme.group_size,
        "bits_per_weight": 8 * item.bytes / item.stored.weights,
    }


def _kept(item: KeptTensor) -> dict[str, str]:
    reason = item.tensor.reason if item.same_as is None else f"tied to {item.same_as}"
    return {"name": item.tensor.entry.name, "reason": reason}


def _zero_shot(
    checkpoint: Checkpoint, items: list[PlannedTensor], tables: list[PlannedTensor], recipe: Recipe
) -> tuple[float, int]:
    """Seconds to round all weights, estimated from a trial on random weights, and peak memory in bytes."""
    weights = sum(item.stored.weights for item in (*items, *tables))
    choices = items[0].choices
    # Rows that are rounded together must stay together.
    rows = max(_TRIAL_ROWS, row_block(choices.scheme))
    trial = torch.randn(rows, items[0].stored.shape[1], generator=torch.Generator().manual_seed(0))
    seconds = 0.0
    if recipe.curvature is None:
        cut = OUTLIER_RULES[choices.outliers.rule].cut([lambda: trial], trial.numel(), choices.outliers, None)
        round_rows(trial, choices, cut, None)
        began = time.perf_counter()
        round_rows(trial, choices, cut, None)
        seconds = (time.perf_counter() - began) / trial.numel() * weights / min(available_cores(), 2)
    # Of an embedding, which is read in pieces, the packed rows are held, and joined.
    largest = max(*(4 * item.tensor.entry.bytes for item in items), *(3 * table.bytes for table in tables))
    return _START_SECONDS + seconds + checkpoint.bytes / 2e9, _START_BYTES + largest


def _calibrated(
    checkpoint: Checkpoint, items: list[PlannedTensor], recipe: Recipe, options: CalibrationOptions
) -> tuple[float, int, int]:
    """Seconds to measure and solve, peak memory in bytes, and bytes of hidden states on disk.

    Raises FewbitError for limits that the run would exceed.
    """
    if options.stored is None:
        check_length(checkpoint.config, options.choice.sequence_length)
    tokens = options.choice.samples * options.choice.sequence_length
    weights = sum(item.stored.weights for item in items)
    sizes = _matrix_bytes(items)
    speed = _speed()
    forward = 2.0 * tokens * (checkpoint.bytes / 2) / speed
    writing = _writing(checkpoint, options, speed) if options.stored is None else 0.0
    if options.stored is not None:
        measuring = 0.0
        held = max(sizes)
    elif recipe.curvature is not None and recipe.curvature.source.gradients:
        # A forward pass, a second one block by block, and a backward pass. With a refresh, this is repeated for every
        # stage, for half of the blocks on average.
        stages = stages_of(sizes, options.refresh, options.memory)
        measuring = 3.0 * forward * (1 if len(stages) == 1 else (len(stages) + 1) / 2)
        held = max(sum(sizes[index] for index in stage) for stage in stages)
    else:
        stages_of(sizes, 0, options.memory)
        measuring = 2.5 * forward
        held = max(sizes)
    hidden = int(checkpoint.config.get("hidden_size") or checkpoint.config.get("n_embd") or 0)
    vocabulary = int(checkpoint.config.get("vocab_size") or 0)
    states = 2 * tokens * hidden if recipe.curvature is not None and not recipe.curvature.source.gradients else 0
    spilled = states if states > options.memory // 2 else 0
    logits = 4 * options.choice.sequence_length * vocabulary
    memory = _START_BYTES + checkpoint.bytes + held + states - spilled + logits
    return writing + measuring + _SOLVE_NANOSECONDS * 1e-9 * weights, memory, spilled


def _matrix_bytes(items: list[PlannedTensor]) -> list[int]:
    """Bytes of the curvatures of each block's weights; that of the head is measured with the last block's."""
    sizes: dict[int, int] = {}
    of_head = max((4 * item.tensor.matrix_shape[1] ** 2 for item in items if item.is_table), default=0)
    for item in items:
        if item.tensor.block is not None:
            experts = math.prod(item.tensor.entry.shape[:-2])
            sizes[item.tensor.block] = sizes.get(item.tensor.block, 0) + 4 * item.tensor.matrix_shape[1] ** 2 * experts
    found = [sizes[block] for block in sorted(sizes)] or [0]
    return [*found[:-1], found[-1] + of_head]


def _writing(checkpoint: Checkpoint, options: CalibrationOptions, speed: float) -> float:
    """Seconds that the model needs to generate the sequences of the source `self`, token by token in batches."""
    choice = options.choice
    sources = parse_sources(choice.sources)
    written = sum(n for one, n in zip(sources, shares(sources, choice.samples), strict=True) if one.kind == "self")
    steps = -(-written // BATCH) * choice.sequence_length
    return steps * (min(written, BATCH) * checkpoint.bytes / speed + checkpoint.bytes / _READ_BYTES_A_SECOND)


def _speed() -> float:
    """Floating-point operations per second of a network with bfloat16 weights on this machine."""
    a, b = torch.ones(512, 1024, dtype=torch.bfloat16), torch.ones(1024, 1024, dtype=torch.bfloat16)
    linear(a, b)
    began = time.perf_counter()
    for _ in range(5):
        linear(a, b)
    product = 5 * 2 * a.numel() * b.shape[0] / (time.perf_counter() - began)
    # With native bfloat16 products, everything else takes two thirds of a forward pass; products that are converted to
    # float32 take most of it themselves.
    return product / 3 if is_native(a.dtype) else product
