"""Before any work: what becomes of every tensor, how it will be stored, which file it goes to, what it will take."""

import math
from dataclasses import dataclass
from typing import Any

from fewbit.architecture.coverage import Coverage, WeightTensor, cover, require_recognised
from fewbit.checkpoints.source import Checkpoint
from fewbit.errors import FewbitError
from fewbit.formats.scheme import Scheme, StoredWeight, part_layout, stored_bytes
from fewbit.grids import positions
from fewbit.outliers.adaptive_lasso import outlier_count
from fewbit.recipe import Recipe, group_size_for

_SMALLEST_AUTO = 8
_SENSITIVE = 0.01
"""About the share of outliers by sensitivity, which only the solver finds."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor and, when it is to be quantized, the form it will have (with the most outliers it may have)."""

    tensor: WeightTensor
    stored: StoredWeight | None
    bytes: int


@dataclass(frozen=True)
class Plan:
    """Tensors by output shard, in order."""

    coverage: Coverage
    shards: list[list[PlannedTensor]]

    @property
    def bytes(self) -> int:
        """Most bytes that the output's tensors take."""
        return sum(item.bytes for shard in self.shards for item in shard)

    def shard_name(self, index: int) -> str:
        """File name of shard `index`, from 0."""
        if len(self.shards) == 1:
            return "model.safetensors"
        return f"model-{index + 1:05d}-of-{len(self.shards):05d}.safetensors"


def make_plan(checkpoint: Checkpoint, recipe: Recipe, shard_size: int) -> Plan:
    """Plan a run; FewbitError when a weight is not recognised or a group size does not divide."""
    if checkpoint.quantization is not None:
        method = checkpoint.quantization.get("quant_method", "an unknown method")
        raise FewbitError(f"{checkpoint.folder}: already quantized ({method}): give the 16-bit original")
    coverage = cover(checkpoint.entries.values(), checkpoint.config, recipe.include, recipe.exclude)
    require_recognised(coverage, str(checkpoint.folder))
    if not coverage.of("quantize"):
        raise FewbitError(f"{checkpoint.folder}: no linear layer to quantize was found")
    _check_group_sizes(coverage, recipe)
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in coverage.tensors:
        item = _plan_tensor(tensor, recipe)
        if shards[-1] and filled + item.bytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += item.bytes
    return Plan(coverage, shards)


def scheme_for(columns: int, recipe: Recipe) -> Scheme:
    """The stored form of a layer with `columns` columns."""
    size = group_size_for(columns, recipe.group_size)
    assert size is not None
    split = recipe.outliers != "none"
    return Scheme(
        bits=recipe.bits,
        group_size=size,
        grid="codebook" if recipe.grid == "normal-float" else recipe.grid,
        levels=recipe.levels(),
        scale_format=recipe.scale_format,
        outlier_grid=recipe.outlier_grid if split else "none",
        outlier_bits=_outlier_bits(recipe) if split else 0,
        statistic_bits=recipe.statistic_bits if recipe.scale_format == "statistics" else 0,
        statistic_rows=recipe.statistic_rows if recipe.scale_format == "statistics" else 0,
    )


def _outlier_bits(recipe: Recipe) -> int:
    return 16 if recipe.outlier_grid == "float16" else recipe.outlier_bits or recipe.bits


def outliers_per_group(recipe: Recipe, group_size: int) -> int:
    """Outliers of each group in group scope: the fraction of the group, rounded, at least one unless it is 0."""
    if recipe.outliers == "none" or recipe.outlier_fraction == 0:
        return 0
    return max(1, round(recipe.outlier_fraction * group_size))


def place_outliers(stored_shape: tuple[int, int], scheme: Scheme, recipe: Recipe, outliers: int) -> str:
    """The position encoding for a weight with `outliers` outliers."""
    if scheme.outlier_grid == "none":
        return "none"
    even = recipe.outlier_scope == "group" and recipe.outliers == "adaptive-lasso"
    per_group = outliers_per_group(recipe, scheme.group_size) if even else None
    return positions.choose(stored_shape[0] * stored_shape[1], outliers, scheme.group_size, per_group)


def _plan_tensor(tensor: WeightTensor, recipe: Recipe) -> PlannedTensor:
    if tensor.action != "quantize":
        return PlannedTensor(tensor, None, tensor.entry.bytes)
    rows, columns = tensor.matrix_shape
    scheme = scheme_for(columns, recipe)
    if scheme.outlier_grid == "none":
        outliers = 0
    elif recipe.outlier_scope == "group":
        outliers = outliers_per_group(recipe, scheme.group_size) * rows * (columns // scheme.group_size)
    else:
        share = _SENSITIVE if recipe.outliers == "sensitivity" else recipe.outlier_fraction
        outliers = outlier_count(rows * columns, share)
    if len(tensor.entry.shape) > 2:
        _check_fused(tensor, scheme)
    placed = place_outliers((rows, columns), scheme, recipe, outliers)
    stored = StoredWeight(scheme, (rows, columns), outliers, placed, tensor.transposed, tensor.original_shape)
    return PlannedTensor(tensor, stored, stored_bytes(stored))


def _check_fused(tensor: WeightTensor, scheme: Scheme) -> None:
    """FewbitError for fused experts that a grid cannot hold one below the other."""
    rows = tensor.matrix_shape[0] // math.prod(tensor.entry.shape[:-2])
    if scheme.grid == "binary" or (scheme.scale_format == "statistics" and rows % scheme.statistic_rows):
        raise FewbitError(
            f"{tensor.entry.name}: experts fused in one tensor cannot be stored with this grid: take another method, "
            "or keep them with --exclude"
        )


def group_size_problem(checkpoint: Checkpoint, recipe: Recipe) -> str | None:
    """Which layers the group size does not divide, and which sizes would; None when it divides all."""
    return _indivisible(cover(checkpoint.entries.values(), checkpoint.config, recipe.include, recipe.exclude), recipe)


def _check_group_sizes(coverage: Coverage, recipe: Recipe) -> None:
    problem = _indivisible(coverage, recipe)
    if problem:
        raise FewbitError(problem)


def _indivisible(coverage: Coverage, recipe: Recipe) -> str | None:
    wrong: dict[int, list[str]] = {}
    for tensor in coverage.of("quantize"):
        columns = tensor.matrix_shape[1]
        if columns < 1:
            raise FewbitError(f"{tensor.entry.name}: it has no columns: keep it with --exclude")
        size = group_size_for(columns, recipe.group_size)
        if size is not None and size < min(columns, _SMALLEST_AUTO) and not recipe.group_size.isdecimal():
            raise FewbitError(
                f"{tensor.entry.name}: {columns} columns have no divisor from {_SMALLEST_AUTO} to 128 for groups: "
                "use --group-size row, or keep it with --exclude"
            )
        if size is None:
            wrong.setdefault(columns, []).append(tensor.module)
    if not wrong:
        return None
    all_columns = {t.matrix_shape[1] for t in coverage.of("quantize")}
    fits = [str(size) for size in (16, 32, 48, 64, 96, 128, 256) if all(c % size == 0 for c in all_columns)]
    described = "; ".join(
        f"{len(names)} layers with {columns} columns ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for columns, names in sorted(wrong.items())
    )
    advice = f"sizes that divide every layer: {', '.join(fits)}; or " if fits else "use "
    return f"group size {recipe.group_size} does not divide {described}: {advice}--group-size auto"


def output_tensors(item: PlannedTensor) -> list[str]:
    """Names of the tensors that one planned tensor becomes."""
    if item.stored is None:
        return [item.tensor.entry.name]
    return [f"{item.tensor.module}.{part}" for part in part_layout(item.stored)]


def stored_to_dict(stored: StoredWeight, scheme_index: int) -> dict[str, Any]:
    """A stored weight as it stands in config.json."""
    data: dict[str, Any] = {"scheme": scheme_index, "shape": list(stored.shape)}
    if stored.scheme.outlier_grid != "none":
        data.update(outliers=stored.outliers, positions=stored.positions)
    if stored.transposed:
        data["transposed"] = True
    if stored.original_shape is not None:
        data["original_shape"] = list(stored.original_shape)
    return data
