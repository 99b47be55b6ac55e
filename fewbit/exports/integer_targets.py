"""`--for gptq`, `--for awq` and `--for mlx`: which recipes make folders that the format holds."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fewbit.architecture.coverage import WeightTensor
from fewbit.checkpoints.model_dtype import model_dtype
from fewbit.checkpoints.source import Checkpoint
from fewbit.errors import FewbitError
from fewbit.exports.gptq import AWQ, GPTQ
from fewbit.exports.integer_format import IntegerFormat, differ, join_problem, shape_problem
from fewbit.exports.mlx import MLX
from fewbit.exports.words import whole_words
from fewbit.grids.embeddings import KEPT
from fewbit.grids.scale_formats import SCALE_FORMATS
from fewbit.grids.table import GRIDS
from fewbit.pipeline.plan import Plan, cover_original

_SIZES = (128, 64, 32)
"""Group sizes that are tried, the largest first."""
_HALVES = ("float16", "bfloat16")
"""Dtypes that do not have all numbers of each other."""


@dataclass(frozen=True)
class IntegerTarget:
    """A target with one of these formats, and the functions of :class:`fewbit.exports.table.Target`.

    grids: those that it takes, by their names in recipes, the default first. sizes: group sizes to try in turn.
    """

    format: IntegerFormat
    summary: str
    grids: tuple[str, ...]
    sizes: tuple[int, ...] = _SIZES

    @property
    def name(self) -> str:
        """The target's name, which is that of its format."""
        return self.format.name

    @property
    def choices(self) -> Callable[[Checkpoint, dict[str, Any]], dict[str, Any]]:
        """See :func:`_choices`."""
        return partial(_choices, self)

    @property
    def notes(self) -> Callable[[Checkpoint, dict[str, Any]], list[str]]:
        """See :func:`_notes`."""
        return partial(_notes, self)

    @property
    def problem(self) -> Callable[[Plan], str | None]:
        """See :func:`_problem`."""
        return partial(_problem, self.format)


def _choices(target: IntegerTarget, checkpoint: Checkpoint, flat: dict[str, Any]) -> dict[str, Any]:
    """The choices of a recipe: a grid and a group size that the format holds, without outliers; what is given is kept.

    Layers whose shape the format does not hold are left out. Raises FewbitError for bits, grids, group sizes or
    outliers that it does not have, and if no layer is left.
    """
    kind, where = target.format, f"--for {target.name}"
    if flat.get("embedding_bits") not in (None, KEPT):
        raise FewbitError(f"{where}: has embeddings and head in 16 bits: leave out --embedding-bits")
    split = next((key for key in flat if key.startswith("outlier") and flat[key] not in (None, "none", 0)), None)
    if split is not None:
        raise FewbitError(f"{where}: holds no outliers: leave out --{split.replace('_', '-')}")
    bits = flat.get("bits") or 4
    if bits not in kind.widths:
        raise FewbitError(f"{where}: holds {_or(kind.widths)} bits, not {bits:g}")
    held = _scales_for(kind, checkpoint)
    scales = flat.get("scale_format") or held[0]
    if scales not in held:
        raise FewbitError(
            f"{where}: holds scales in {_or(held)} for this model, not {scales}: leave out --scale-format"
        )
    kept = _kept(target, checkpoint, flat)
    rest = {key: value for key, value in flat.items() if key != "symmetric"}
    rest |= {
        "grid": _grid(target, flat),
        "bits": bits,
        "group_size": flat.get("group_size") or _group_sizes(target, checkpoint, flat),
        "scale_format": scales,
        "outliers": "none",
        "embedding_bits": KEPT,
    }
    if kept:
        rest["exclude"] = (*(flat.get("exclude") or ()), *kept)
    return rest


def _grid(target: IntegerTarget, flat: dict[str, Any]) -> str:
    given, symmetric = flat.get("grid"), flat.get("symmetric")
    if given is not None and symmetric is not None:
        raise FewbitError("give either --grid or --symmetric/--asymmetric, not both")
    known = [name for name in target.grids if name in {grid.choice for grid in GRIDS.values()}]
    if given is None:
        offsets = {grid.choice: bool(grid.offset) for grid in GRIDS.values()}
        fit = [name for name in known if symmetric is None or offsets[name] != symmetric]
        if not fit:
            raise FewbitError(f"--for {target.name}: holds the grids {_or(known)}, which are all symmetric")
        return fit[0]
    if given not in known:
        raise FewbitError(f"--for {target.name}: holds the grids {_or(known)}, not {given}")
    return str(given)


def _scales_for(kind: IntegerFormat, checkpoint: Checkpoint) -> list[str]:
    """The scale formats for a model, the default first: bfloat16 for a model of that dtype, in which loaders then have
    the same scales.

    Raises FewbitError if scales must be in the model's dtype, and there is no such format.
    """
    dtype = str(model_dtype(checkpoint)).removeprefix("torch.")
    wide = kind.in_model_dtype and dtype in _HALVES
    held = [name for name in kind.scales if name in SCALE_FORMATS and (name == dtype or not wide)]
    if not held:
        raise FewbitError(f"--for {kind.name}: has scales in the model's dtype, and fewbit has none in {dtype}")
    return sorted(held, key=lambda name: name != dtype)


def _covered(checkpoint: Checkpoint, flat: dict[str, Any]) -> list[WeightTensor]:
    return cover_original(checkpoint, flat.get("include") or (), flat.get("exclude") or ()).of("quantize")


def _kept(target: IntegerTarget, checkpoint: Checkpoint, flat: dict[str, Any]) -> dict[str, str]:
    """Names of layers that the format does not hold -> why. Raises FewbitError if no other is left."""
    covered = _covered(checkpoint, flat)
    reasons = {tensor.entry.name: _reason(target, tensor, flat) for tensor in covered}
    kept = {name: reason for name, reason in reasons.items() if reason}
    if len(kept) == len(covered):
        raise FewbitError(f"{checkpoint.folder}: {next(iter(kept.values()))}")
    return kept


def _reason(target: IntegerTarget, tensor: WeightTensor, flat: dict[str, Any]) -> str:
    kind, (rows, columns) = target.format, tensor.matrix_shape
    bits = int(flat.get("bits") or 4)
    if tensor.original_shape is not None:
        return f"{kind.called} has no experts fused in one tensor"
    if tensor.transposed and not kind.turned:
        return f"{kind.called} has no weights stored as (in, out)"
    if not flat.get("group_size") and not any(columns % size == 0 for size in target.sizes):
        return f"none of the group sizes {_or(target.sizes)} divides {columns} columns"
    if kind.fills_words and not whole_words(rows, bits):
        return f"{rows} rows of {bits} bits do not fill words of 32 bits"
    return ""


def _group_sizes(target: IntegerTarget, checkpoint: Checkpoint, flat: dict[str, Any]) -> str:
    """The group sizes to try, as in recipes: one for all weights if the format has only one."""
    if not target.format.one_for_all:
        return ",".join(map(str, target.sizes))
    kept = _kept(target, checkpoint, flat)
    columns = [one.matrix_shape[1] for one in _covered(checkpoint, flat) if one.entry.name not in kept]
    fits = [size for size in target.sizes if all(count % size == 0 for count in columns)]
    return str(fits[0] if fits else min(target.sizes))


def _notes(target: IntegerTarget, checkpoint: Checkpoint, flat: dict[str, Any]) -> list[str]:
    """What is kept in 16 bits because the format does not hold it."""
    kept, count = _kept(target, checkpoint, flat), len(_covered(checkpoint, flat))
    return [
        f"{number} of {count} layers: {reason}: kept in 16 bits" for reason, number in Counter(kept.values()).items()
    ]


def _problem(kind: IntegerFormat, plan: Plan) -> str | None:
    weights = {item.tensor.entry.name: item.stored for item in plan.quantized}
    shapes = ((name, shape_problem(kind, stored)) for name, stored in weights.items())
    wrong = next((f"{name}: {problem} with  --exclude" for name, problem in shapes if problem), None)
    return (
        wrong
        or differ(kind, weights)
        or join_problem(kind, {item.tensor.module: item.stored for item in plan.quantized})
    )


def _or(words: Any) -> str:
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last


INTEGER_TARGETS = (
    IntegerTarget(GPTQ, "GPTQModel, vLLM and transformers: a folder in the format of GPTQ", ("signed", "symmetric")),
    IntegerTarget(
        AWQ, "AutoAWQ, vLLM and transformers: a folder in the format of AWQ", ("zero-point", "signed", "symmetric")
    ),
    IntegerTarget(MLX, "MLX on Apple computers: a folder in its format", ("minimum", "signed", "symmetric"), (64, 32)),
)
