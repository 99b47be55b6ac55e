"""How compressed-tensors stores a weight of ours, bit for bit: names of tensors, words of codes, and its arguments.

Packing is that of releases up to 0.17: a word of 32 bits holds 32 // b whole codes of b bits. With 3, 5, 6 and 7 bits
later releases read other words.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.grids.grid import Values
from fewbit.grids.scales import from_pattern
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.grids.table import grid_of
from fewbit.solvers.settled import read_codes

_WORD = 32
_FLOATS = ("float16", "bfloat16", "float32")


class InexactError(ValueError):
    """A scale cannot be written without rounding."""


@dataclass(frozen=True)
class Form:
    """One way in which compressed-tensors stores weights.

    format: its name there. arguments: of `QuantizationArgs`, those that differ from integers around 0. scales: formats
    of scales of ours that it may hold. tensors(parts, stored, dtype): the tensors that replace a weight, by the ends
    of their names; dtype is that of the model. Raises InexactError. kind(scheme): in a few letters, for reports.
    as_expert: transformers reads it in mixtures of experts, where it uses one scale for each group, and nothing else.
    of_rows: a scale must be that of a whole row. inputs: the `QuantizationArgs` of the inputs, if they are rounded.
    """

    format: str
    arguments: Mapping[str, Any]
    scales: tuple[str, ...]
    tensors: Callable[[Mapping[str, Tensor], StoredWeight, torch.dtype], dict[str, Tensor]]
    kind: Callable[[Scheme], str]
    as_expert: bool = True
    of_rows: bool = False
    inputs: Mapping[str, Any] | None = None


def form_of(scheme: Scheme) -> Form | None:
    """The form that decodes to the same weights, if its scales are numbers of the model's dtype; None without one.

    A form of whole rows is one for weights with one group in a row.
    """
    rounded = INPUT_FORMS.get((scheme.grid, scheme.bits, scheme.input_bits))
    form = rounded if scheme.input_bits else FORMS.get(scheme.grid)
    if form is None or scheme.has_outliers or scheme.transform != "none" or scheme.scale_format not in form.scales:
        return None
    return form


def arguments_of(form: Form, stored: StoredWeight) -> dict[str, Any]:
    """The `QuantizationArgs` of a weight, all of them, as the package writes them."""
    scheme, whole_rows = stored.scheme, stored.groups == 1
    given: dict[str, Any] = {
        "num_bits": scheme.whole_bits,
        "type": "int",
        "symmetric": True,
        "group_size": None if whole_rows else scheme.group_size,
        "strategy": "channel" if whole_rows else "group",
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "scale_dtype": None,
        "zp_dtype": None,
        "observer": "memoryless_minmax",
        "observer_kwargs": {},
    }
    return {**given, **form.arguments}


def input_arguments_of(form: Form) -> dict[str, Any] | None:
    """The `QuantizationArgs` of a weight's inputs, all of them, as the package writes them; None if they are kept."""
    if form.inputs is None:
        return None
    rest = ("group_size", "block_structure", "actorder", "scale_dtype", "zp_dtype", "observer")
    return {**dict.fromkeys(rest), "type": "int", "symmetric": True, "observer_kwargs": {}, **form.inputs}


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes `(rows, n)` uint8 as int32 words `(rows, ceil(n / (32 // bits)))`, the first code in the lowest bits."""
    per = _WORD // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per))
    shifts = bits * torch.arange(per, dtype=torch.int32)
    return (padded.view(len(codes), -1, per).to(torch.int32) << shifts).sum(dim=2, dtype=torch.int32)


def _values(parts: Mapping[str, Tensor], stored: StoredWeight) -> Values:
    return grid_of(stored.scheme).read(parts, stored.scheme, stored.groups)


def _scales(values: Values, dtype: torch.dtype) -> Tensor:
    """The scales `(rows, groups)` in `dtype`."""
    wanted = values["scale"].squeeze(-1)
    seen = wanted.to(dtype)
    if not torch.equal(seen.to(torch.float32), wanted):
        off = ((seen.to(torch.float32) - wanted) / torch.where(wanted == 0, 1.0, wanted)).abs()
        name = str(dtype).removeprefix("torch.")
        raise InexactError(
            f"{int((off > 0).sum())} of its {off.numel()} scales ({stored_as(off)}) are no {name} numbers"
        )
    return seen


def stored_as(off: Tensor) -> str:
    """The largest relative change, in words."""
    return f"they would change by up to {100 * float(off.max()):.2g} %"


def _matrix(parts: Mapping[str, Tensor], stored: StoredWeight) -> Tensor:
    return read_codes(parts, stored).view(stored.shape)


def _integers(parts: Mapping[str, Tensor], stored: StoredWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    bits, values = stored.scheme.whole_bits, _values(parts, stored)
    # The package stores signed numbers with 2^(b-1) added: these are our codes, and our zero-points.
    found = {"weight_packed": pack_words(_matrix(parts, stored), bits), "weight_scale": _scales(values, dtype)}
    if "offset" in values:
        zeros = values["offset"].squeeze(-1).to(torch.uint8)
        found["weight_zero_point"] = pack_words(zeros.t().contiguous(), bits).t().contiguous()
    return {**found, "weight_shape": torch.tensor(stored.shape, dtype=torch.int64)}


def _whole_numbers(parts: Mapping[str, Tensor], stored: StoredWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    # Our codes have 2^7 added; without it, 0 to 127 are 128 to 255, which as signed bytes are -128 to -1.
    codes = (_matrix(parts, stored) ^ 0x80).contiguous().view(torch.int8)
    return {"weight": codes, "weight_scale": _scales(_values(parts, stored), dtype)}


def _fp8(parts: Mapping[str, Tensor], stored: StoredWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    codes = _matrix(parts, stored).contiguous().view(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": _scales(_values(parts, stored), dtype)}


def _mxfp4(parts: Mapping[str, Tensor], stored: StoredWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"weight_packed": parts["codes"], "weight_scale": parts["scales"]}


def _nvfp4(parts: Mapping[str, Tensor], stored: StoredWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "weight_packed": parts["codes"],
        "weight_scale": parts["scales"].view(torch.float8_e4m3fn),
        "weight_global_scale": from_pattern(parts["tensor_scale"], "float32"),
    }


def _named(name: str) -> Callable[[Scheme], str]:
    return lambda scheme: name


def _int_kind(end: str) -> Callable[[Scheme], str]:
    return lambda scheme: f"int{scheme.whole_bits}{end}"


_AROUND_ZERO = Form("pack-quantized", {}, _FLOATS, _integers, _int_kind(""))
_FP4 = {"type": "float", "strategy": "group"}
FORMS: dict[str, Form] = {
    **dict.fromkeys(("symmetric", "signed", "q4_0", "q5_0", "q8_0"), _AROUND_ZERO),
    "zero-point": Form(
        "pack-quantized",
        {"symmetric": False, "zp_dtype": "torch.int8"},
        _FLOATS,
        _integers,
        _int_kind(" asymmetric"),
        as_expert=False,
    ),
    "fp8": Form("naive-quantized", {"type": "float"}, ("bfloat16",), _fp8, _named("fp8")),
    "mxfp4": Form(
        "mxfp4-pack-quantized",
        {**_FP4, "group_size": 32, "scale_dtype": "torch.uint8"},
        ("e8m0",),
        _mxfp4,
        _named("mxfp4"),
    ),
    "nvfp4": Form(
        "nvfp4-pack-quantized",
        {**_FP4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
        ("e4m3",),
        _nvfp4,
        _named("nvfp4"),
        as_expert=False,
    ),
}
"""By the names of grids in files."""
_W8A8 = Form(
    "int-quantized",
    {},
    _FLOATS,
    _whole_numbers,
    _named("int8, inputs int8"),
    of_rows=True,
    inputs={"num_bits": 8, "strategy": "token", "dynamic": True},
)
INPUT_FORMS: dict[tuple[str, float, int], Form] = {(grid, 8, 8): _W8A8 for grid in ("symmetric", "signed")}
"""For weights whose inputs are rounded: by grid, bits of the weights, and bits of the inputs."""
