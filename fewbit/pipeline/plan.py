"""The plan of a run: what happens to every tensor, how it will be stored, in which file, and in how many bytes."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fewbit.architecture.coverage import Coverage, WeightTensor, cover, require_recognised
from fewbit.architecture.patterns import matches
from fewbit.checkpoints.shards import shard_name, split_by_size
from fewbit.checkpoints.source import Checkpoint, refuse_quantized
from fewbit.errors import FewbitError
from fewbit.formats.native import check_scheme, part_layout, stored_bytes
from fewbit.grids import positions
from fewbit.grids.choice import group_size_for
from fewbit.grids.embeddings import KEPT, embedding_grid
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.grids.table import GRIDS, grid_of, row_block
from fewbit.outliers.rules import OUTLIER_RULES
from fewbit.pipeline.tied_copies import find_copies
from fewbit.recipe import Recipe, with_choices
from fewbit.solvers.settled import WeightChoices

DEFAULT_SHARD_SIZE = 5_000_000_000
_SMALLEST_AUTO = 8
_EXPERT = re.compile(r".*\.experts\.[0-9]+\..*")
"""The name of a module in one of several experts, whose layers the network joins."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to quantize, its recipe, and its stored form (with the largest possible number of outliers).

    is_table: it is an embedding or a head, counted separately; only a head is quantized with a curvature.
    """

    tensor: WeightTensor
    recipe: Recipe
    stored: StoredWeight
    is_table: bool = False

    @property
    def bytes(self) -> int:
        """The largest number of bytes that its stored form can take."""
        return stored_bytes(self.stored)

    @property
    def output(self) -> list[str]:
        """Names of the tensors in the output."""
        return [self.tensor.entry.name, *(f"{self.tensor.module}.{part}" for part in part_layout(self.stored))]

    @property
    def choices(self) -> WeightChoices:
        """How the tensor's rows are quantized."""
        return self.recipe.for_weight(self.stored.scheme)


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that is kept unchanged; or not written, if it is tied to the tensor `same_as` and equal to it."""

    tensor: WeightTensor
    same_as: str | None = None

    @property
    def bytes(self) -> int:
        """Bytes that the tensor takes in the output."""
        return 0 if self.same_as is not None else self.tensor.entry.bytes

    @property
    def output(self) -> list[str]:
        """Names of the tensors in the output."""
        return [] if self.same_as is not None else [self.tensor.entry.name]


@dataclass(frozen=True)
class Plan:
    """What happens to every tensor, by output shard, in order."""

    coverage: Coverage
    shards: list[list[PlannedTensor | KeptTensor]]

    @property
    def quantized(self) -> list[PlannedTensor]:
        """The linear layers to quantize, in order."""
        return [one for shard in self.shards for one in shard if isinstance(one, PlannedTensor) and not one.is_table]

    @property
    def tables(self) -> list[PlannedTensor]:
        """The embeddings and heads to quantize, in order."""
        return [one for shard in self.shards for one in shard if isinstance(one, PlannedTensor) and one.is_table]

    @property
    def kept(self) -> list[KeptTensor]:
        """The tensors that are kept unchanged, in order."""
        return [item for shard in self.shards for item in shard if isinstance(item, KeptTensor)]

    @property
    def weights(self) -> int:
        """The number of all weights in the output, quantized or kept."""
        packed = sum(item.stored.weights for item in (*self.quantized, *self.tables))
        return packed + sum(item.tensor.entry.numel for item in self.kept if _holds_weights(item))

    @property
    def weight_bytes(self) -> int:
        """The largest number of bytes that all weights can take."""
        packed = sum(item.bytes for item in (*self.quantized, *self.tables))
        return packed + sum(item.bytes for item in self.kept if _holds_weights(item))

    @property
    def bytes(self) -> int:
        """The largest number of bytes that the output's tensors can take."""
        return sum(item.bytes for shard in self.shards for item in shard)

    def shard_name(self, index: int) -> str:
        """File name of shard `index`, from 0."""
        return shard_name(index, len(self.shards))


def cover_original(checkpoint: Checkpoint, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Coverage:
    """Classify every tensor of an original model. Raises FewbitError if one is unknown, or none is to be quantized."""
    refuse_quantized(checkpoint)
    coverage = cover(checkpoint.entries.values(), checkpoint.config, include, exclude)
    require_recognised(coverage, str(checkpoint.folder))
    if not coverage.of("quantize"):
        raise FewbitError(f"{checkpoint.folder}: no linear layer to quantize was found")
    return coverage


def make_plan(checkpoint: Checkpoint, recipe: Recipe, shard_size: int = DEFAULT_SHARD_SIZE) -> Plan:
    """Plan a run. Raises FewbitError if a weight is not recognised or a group size does not divide."""
    coverage = cover_original(checkpoint, recipe.include, recipe.exclude)
    problem = group_size_problem(coverage, recipe)
    if problem:
        raise FewbitError(problem)
    return plan_tensors(checkpoint, coverage, recipe, shard_size)


def plan_tensors(
    checkpoint: Checkpoint, coverage: Coverage, recipe: Recipe, shard_size: int = DEFAULT_SHARD_SIZE
) -> Plan:
    """Plan a run of classified tensors, whose group sizes divide."""
    items = [_plan_tensor(tensor, recipe, coverage.exact_names) for tensor in coverage.tensors]
    tables = {item.tensor.entry.name: item for item in items if isinstance(item, PlannedTensor) and item.is_table}
    copies = {
        name: source
        for name, source in find_copies(checkpoint, [item.tensor for item in tables.values()]).items()
        if tables[name].recipe == tables[source].recipe
    }
    left = {name: KeptTensor(tables[name].tensor, source) for name, source in copies.items()}
    items = [left.get(item.tensor.entry.name, item) for item in items]
    return Plan(coverage, split_by_size(items, lambda item: item.bytes, shard_size))


def _holds_weights(item: KeptTensor) -> bool:
    return item.same_as is None and item.tensor.entry.dtype.is_floating_point


def _check_patterns(coverage: Coverage, recipe: Recipe) -> None:
    layers = [tensor.entry.name for tensor in coverage.of("quantize")]
    tables = [tensor.entry.name for tensor in coverage.tensors if tensor.is_vocabulary]
    for pattern, choices in recipe.sets:
        to_layer = any(matches(name, pattern, coverage.exact_names) for name in layers)
        to_table = any(matches(name, pattern, coverage.exact_names) for name in tables)
        if not (to_layer or to_table):
            raise FewbitError(f"--set {pattern}: matches no tensor to quantize: list the names with  fewbit plan")
        named = [name for name, _ in choices]
        if "embedding_bits" in named and not to_table:
            raise FewbitError(f"--set {pattern}: embedding_bits applies to embeddings and heads, but it matches none")
        if not to_layer and named != ["embedding_bits"]:
            raise FewbitError(
                f"--set {pattern}: matches only embeddings or heads, for which embedding_bits can be set (or add them "
                "to the layers with --include)"
            )


def scheme_for(columns: int, recipe: Recipe) -> Scheme:
    """The stored form of a layer with `columns` columns."""
    size = group_size_for(columns, recipe.grid.group_size, recipe.grid.grid.span.columns)
    assert size is not None
    return recipe.scheme(size)


def place_outliers(stored_shape: tuple[int, int], choices: WeightChoices, outliers: int) -> str:
    """The position encoding for a weight with `outliers` outliers."""
    scheme = choices.scheme
    if not scheme.has_outliers:
        return "none"
    even = OUTLIER_RULES[choices.outliers.rule].evenly(choices.outliers)
    per_group = choices.outliers.per_group(scheme.group_size) if even else None
    where = positions.Where(stored_shape[0] * stored_shape[1], outliers, scheme.group_size)
    return positions.choose(where, per_group)


def _plan_tensor(tensor: WeightTensor, recipe: Recipe, exact: frozenset[str]) -> PlannedTensor | KeptTensor:
    if tensor.is_vocabulary and (bits := recipe.embedding_bits(tensor.entry.name, exact)) < KEPT:
        return _plan_table(tensor, bits)
    if tensor.action != "quantize":
        return KeptTensor(tensor)
    recipe = recipe.at(tensor.entry.name, exact)
    rows, columns = tensor.matrix_shape
    scheme = scheme_for(columns, recipe)
    outliers = OUTLIER_RULES[recipe.outliers.rule].expected(rows * columns, scheme.group_size, recipe.outliers)
    _check_rows(tensor, scheme)
    if scheme.input_bits and (tensor.original_shape is not None or _EXPERT.fullmatch(tensor.module)):
        raise FewbitError(
            f"{tensor.entry.name}: inputs of experts cannot be rounded: keep them with --exclude or --input-bits 16"
        )
    placed = place_outliers((rows, columns), recipe.for_weight(scheme), outliers)
    stored = StoredWeight(scheme, (rows, columns), outliers, placed, tensor.transposed, tensor.original_shape)
    try:
        check_scheme(scheme)
    except ValueError as error:
        raise FewbitError(f"{tensor.entry.name}: {error}") from error
    return PlannedTensor(tensor, recipe, stored)


def _plan_table(tensor: WeightTensor, bits: int) -> PlannedTensor:
    rows, columns = tensor.matrix_shape
    grid, scales = embedding_grid(bits, columns)
    recipe = Recipe("embeddings", grid=grid, scales=scales)
    stored = StoredWeight(
        scheme_for(columns, recipe),
        (rows, columns),
        transposed=tensor.transposed,
        original_shape=tensor.original_shape,
    )
    return PlannedTensor(tensor, recipe, stored, is_table=True)


def _check_rows(tensor: WeightTensor, scheme: Scheme) -> None:
    """Raises FewbitError for rows that cannot be rounded together, or experts that cannot be stacked in one matrix."""
    experts = math.prod(tensor.entry.shape[:-2])
    rows = tensor.matrix_shape[0] // experts
    span, block = grid_of(scheme).span.rows, row_block(scheme)
    if rows % span:
        raise FewbitError(
            f"{tensor.entry.name}: the {scheme.grid} grid rounds {span} rows together, but this tensor has {rows}: "
            "choose another grid, or keep it with --exclude"
        )
    if len(tensor.entry.shape) > 2 and (block == 0 or rows % block):
        raise FewbitError(
            f"{tensor.entry.name}: experts fused in one tensor cannot be stored with this grid: choose another method, "
            "or keep them with --exclude"
        )


def group_size_problem(coverage: Coverage, recipe: Recipe) -> str | None:
    """Which layers their group size does not divide, and which sizes would divide them; None if it divides all.

    Raises FewbitError for a pattern that matches nothing, and for columns that no group size fits.
    """
    _check_patterns(coverage, recipe)
    wrong: dict[str, dict[int, list[str]]] = {}
    for tensor in coverage.of("quantize"):
        columns, grid = tensor.matrix_shape[1], recipe.at(tensor.entry.name, coverage.exact_names).grid
        if columns < 1:
            raise FewbitError(f"{tensor.entry.name}: it has no columns: keep it with --exclude")
        if columns % grid.grid.block:
            fit = [one.choice for one in GRIDS.values() if one.brings and columns % one.block == 0]
            others = f"use {', '.join(fit)}, or " if fit else ""
            raise FewbitError(
                f"{tensor.entry.name}: the {grid.name} grid needs a multiple of {grid.grid.block} columns, but this "
                f"tensor has {columns}: {others}keep it with --exclude"
            )
        size = group_size_for(columns, grid.group_size, grid.grid.span.columns)
        if size is not None and size < min(columns, _SMALLEST_AUTO) and not grid.group_size.isdecimal():
            raise FewbitError(
                f"{tensor.entry.name}: {columns} columns have no divisor from {_SMALLEST_AUTO} to 128 to use as the "
                "group size: use --group-size row, or keep it with --exclude"
            )
        if size is None:
            wrong.setdefault(grid.group_size, {}).setdefault(columns, []).append(tensor.module)
    if not wrong:
        return None
    all_columns = {t.matrix_shape[1] for t in coverage.of("quantize")}
    fits = [str(size) for size in (16, 32, 48, 64, 96, 128, 256) if all(c % size == 0 for c in all_columns)]
    described = "; ".join(f"group size {size} does not divide {_layers(found)}" for size, found in wrong.items())
    advice = f"sizes that divide every layer: {', '.join(fits)}; or " if fits else "use "
    ways = ["--group-size auto"] if recipe.grid.group_size in wrong else []
    ways += ["group_size=auto in --set"] if wrong.keys() - {recipe.grid.group_size} else []
    return f"{described}: {advice}{' and '.join(ways)}"


def _layers(found: dict[int, list[str]]) -> str:
    """Layers by their columns, in words."""
    return "; ".join(
        f"{len(names)} layers with {columns} columns ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for columns, names in sorted(found.items())
    )


def with_sizes_that_fit(recipe: Recipe) -> Recipe:
    """The recipe with the group size auto for all layers that their own does not divide."""
    sets = tuple(
        (pattern, tuple((name, _or_auto(value) if name == "group_size" else value) for name, value in choices))
        for pattern, choices in recipe.sets
    )
    return with_choices(recipe, {"group_size": _or_auto(recipe.grid.group_size), "sets": sets})


def _or_auto(sizes: object) -> str:
    return str(sizes) if "auto" in str(sizes).split(",") else f"{sizes},auto"


def stored_to_dict(stored: StoredWeight, scheme_index: int) -> dict[str, Any]:
    """A stored weight as config.json describes it."""
    data: dict[str, Any] = {"scheme": scheme_index, "shape": list(stored.shape)}
    if stored.scheme.has_outliers:
        data.update(outliers=stored.outliers, positions=stored.positions)
    if stored.transposed:
        data["transposed"] = True
    if stored.original_shape is not None:
        data["original_shape"] = list(stored.original_shape)
    return data
