"""The runtimes that load compressed-tensors: which recipes make folders that they run."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fewbit.checkpoints.model_dtype import model_dtype
from fewbit.checkpoints.source import Checkpoint
from fewbit.errors import FewbitError
from fewbit.exports.compressed_folder import expert_problem
from fewbit.exports.compressed_weights import FORMS
from fewbit.grids.embeddings import KEPT
from fewbit.grids.inputs import KEPT as INPUTS_KEPT
from fewbit.grids.scheme import StoredWeight
from fewbit.grids.table import GRIDS
from fewbit.pipeline.plan import Plan, PlannedTensor

_GROUPS = "128,64,32,row"
_FUSED = re.compile(r"(.*\.)(?:([qkv])_proj|(gate|up)_proj)\.weight")
"""What a runtime reads as one matrix: the same scheme for all."""


@dataclass(frozen=True)
class Runtime:
    """A runtime that loads the format: its grids, and the functions of :class:`fewbit.exports.table.Target`."""

    name: str
    summary: str
    grids: tuple[str, ...]
    choices: Callable[[Checkpoint, dict[str, Any]], dict[str, Any]]
    problem: Callable[[Plan], str | None]


def _choices(
    name: str, bits: tuple[int, ...], grids: tuple[str, ...], checkpoint: Checkpoint, flat: dict[str, Any]
) -> dict[str, Any]:
    """The choices of a recipe: levels around 0, scales in the model's dtype, no outliers; what is given is kept.

    Raises FewbitError for bits or grids that the runtime does not have.
    """
    given, symmetric = flat.get("grid"), flat.get("symmetric")
    rest = {key: value for key, value in flat.items() if key not in ("symmetric", "grid")}
    if flat.get("embedding_bits") not in (None, KEPT):
        raise FewbitError(f"--for {name}: has embeddings and head in 16 bits: leave out --embedding-bits")
    split = next((key for key in flat if key.startswith("outlier") and flat[key] not in (None, "none", 0)), None)
    if split is not None:
        raise FewbitError(f"--for {name}: holds no outliers: leave out --{split.replace('_', '-')}")
    if given is not None and symmetric is not None:
        raise FewbitError("give either --grid or --symmetric/--asymmetric, not both")
    grid = given or ("zero-point" if symmetric is False else "signed")
    if grid not in grids:
        raise FewbitError(f"--for {name}: runs the grids {', '.join(grids)}, not {grid}")
    rest |= {"grid": grid, "outliers": "none", "embedding_bits": KEPT}
    if flat.get("input_bits") not in (None, INPUTS_KEPT):
        _check_bits(name, (8,), flat.get("bits") or 8)
        rest |= {"bits": 8, "group_size": flat.get("group_size") or "row"}
        rest["scale_format"] = _scales(name, flat.get("scale_format"), checkpoint)
        return rest
    if not GRIDS[grid].brings:
        _check_bits(name, bits, flat.get("bits") or 4)
        rest["group_size"] = flat.get("group_size") or _GROUPS
        rest["scale_format"] = _scales(name, flat.get("scale_format"), checkpoint)
    return rest


def _check_bits(name: str, held: tuple[int, ...], bits: float) -> None:
    if bits in held:
        return
    listed = [f"{one}" for one in held]
    if len(listed) == 1:
        raise FewbitError(
            f"--for {name}: runs {listed[0]} bits where inputs are rounded, not {bits:g}: leave out --bits"
        )
    others = [runtime.name for runtime in RUNTIMES if runtime.name != name and bits in BITS[runtime.name]]
    also = f", or --for {others[0]}" if others else ""
    raise FewbitError(
        f"--for {name}: runs {', '.join(listed[:-1])} and {listed[-1]} bits, not {bits:g}: use --bits "
        f"{min(held, key=lambda one: (abs(one - bits), one))}{also}"
    )


def _scales(name: str, given: str | None, checkpoint: Checkpoint) -> str:
    """The scale format: the model's dtype, in which the runtime keeps scales, or the given one if it has its numbers.

    Raises FewbitError for one of another dtype.
    """
    dtype = str(model_dtype(checkpoint)).removeprefix("torch.")
    if given in ("float16", "bfloat16", "float32") and dtype not in (given, "float32"):
        raise FewbitError(
            f"--for {name}: has scales in the model's dtype, {dtype}, not {given}: leave out --scale-format"
        )
    return given or dtype


def _loads_transformers(plan: Plan) -> str | None:
    return _loads_all(plan) or expert_problem({item.tensor.module: item.stored for item in plan.quantized})


def _loads_all(plan: Plan) -> str | None:
    return next((problem for item in plan.quantized if (problem := _shape_problem(item))), None)


def _shape_problem(item: PlannedTensor) -> str | None:
    if item.stored.original_shape is not None:
        return f"{item.tensor.entry.name}: experts that are fused in one tensor: keep them with --exclude"
    if item.stored.transposed:
        return f"{item.tensor.entry.name}: it is stored as (in, out), which compressed-tensors does not have"
    if item.stored.scheme.input_bits and item.stored.groups > 1:
        return f"{item.tensor.entry.name}: rounded inputs need --group-size row, not {item.stored.scheme.group_size}"
    return None


def _loads_vllm(plan: Plan) -> str | None:
    """Why vLLM does not load the plan: bits and groups without a kernel, or parts of one matrix that differ."""
    found = _loads_all(plan)
    if found:
        return found
    fused: dict[str, tuple[str, str]] = {}
    for tensor in plan.coverage.tensors:
        match = _FUSED.fullmatch(tensor.entry.name)
        if match is None:
            continue
        item = next((one for one in plan.quantized if one.tensor is tensor), None)
        how = "16 bits" if item is None else _described(item.stored)
        where = f"{match[1]}{'qkv' if match[2] else 'gate_up'}"
        name, other = fused.setdefault(where, (tensor.entry.name, how))
        if other != how:
            return f"{name} has {other}, but {tensor.entry.name} {how}: vLLM reads them as one matrix"
    for item in plan.quantized:
        stored = item.stored
        whole = GRIDS[stored.scheme.grid].brings
        if not whole and stored.scheme.whole_bits not in BITS["vllm"]:
            return f"{item.tensor.entry.name}: vLLM runs 4 and 8 bits, not {stored.scheme.bits:g}"
        if not whole and stored.groups > 1 and stored.scheme.group_size not in (32, 64, 128):
            return f"{item.tensor.entry.name}: vLLM has groups of 32, 64, 128 or row, not {stored.scheme.group_size}"
    return None


def _described(stored: StoredWeight) -> str:
    group = "row" if stored.groups == 1 else str(stored.scheme.group_size)
    inputs = f" with inputs in {stored.scheme.input_bits} bits" if stored.scheme.input_bits else ""
    return f"{stored.scheme.bits:g} bits on {GRIDS[stored.scheme.grid].choice} in groups of {group}{inputs}"


BITS = {"transformers": (2, 3, 4, 8), "vllm": (4, 8)}
_ALL = tuple(GRIDS[name].choice for name in FORMS if name not in ("q4_0", "q5_0", "q8_0"))
_SYMMETRIC = tuple(name for name in _ALL if not GRIDS[name].offset)
RUNTIMES = (
    Runtime(
        "transformers",
        "transformers with the package compressed-tensors: a folder",
        _ALL,
        partial(_choices, "transformers", BITS["transformers"], _ALL),
        _loads_transformers,
    ),
    Runtime(
        "vllm",
        "vLLM: a folder with groups of 128 where they divide the columns, or 64 or 32",
        _SYMMETRIC,
        partial(_choices, "vllm", BITS["vllm"], _SYMMETRIC),
        _loads_vllm,
    ),
)
