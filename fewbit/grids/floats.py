"""Grids of small floating-point numbers, as recent GPUs multiply them: fp8 (E4M3), mxfp4 and nvfp4 (E2M1).

``w = number[code] * scale``, where a code is the bit pattern of the number: the sign is its highest bit. Formats: OCP
Microscaling (MX) 1.0 for E4M3, E2M1 and E8M0; NVFP4 has E4M3 scales for 16 weights, and one divisor for a tensor.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fewbit.grids.codes import bit_planes
from fewbit.grids.eight_bit_scales import E4M3_LARGEST, divisor_for, round_e4m3
from fewbit.grids.formula import Formula, Terms
from fewbit.grids.grid import Grid, Groups, ScaleSearch, Values
from fewbit.grids.level_grid import level_grid
from fewbit.grids.scales import divisor
from fewbit.grids.scheme import Scheme
from fewbit.grids.straight_through import Levels, round_to_nearest

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _of_e4m3(code: int) -> float:
    """The number of a code without sign. 127 stands for no number in the standard, and is never written."""
    exponent, fraction = divmod(code, 8)
    return math.ldexp(fraction / 8 + (exponent > 0), max(exponent, 1) - 7)


@dataclass(frozen=True)
class _Numbers:
    """A kind of number. magnitudes: by code. used: how many of them are written. nearest(u): the nearest numbers."""

    bits: int
    magnitudes: tuple[float, ...]
    used: int
    nearest: Callable[[Tensor], Tensor]

    @property
    def largest(self) -> float:
        """The largest number that is written."""
        return self.magnitudes[self.used - 1]

    @property
    def by_code(self) -> tuple[float, ...]:
        """The numbers of all codes."""
        return (*self.magnitudes, *(-one for one in self.magnitudes))

    @property
    def ascending(self) -> tuple[float, ...]:
        """The numbers that are written, from the lowest."""
        positive = self.magnitudes[: self.used]
        return (*(-one for one in reversed(positive[1:])), *positive)


def _nearest_e2m1(u: Tensor) -> Tensor:
    """Numbers are 1/2 apart below 2, 1 apart below 4, then 2; a middle goes to the even code."""
    size = u.abs().clamp_(max=_E2M1[-1])
    fine, rough = size.mul(2).round_().mul_(0.5), size.mul(0.5).round_().mul_(2)
    return torch.where(size <= 2, fine, torch.where(size <= 4, size.round(), rough)).copysign_(u)


E2M1 = _Numbers(4, _E2M1, 8, _nearest_e2m1)
E4M3 = _Numbers(8, tuple(_of_e4m3(code) for code in range(128)), 127, round_e4m3)
_Scales = Callable[[Tensor, ScaleSearch | None], Iterable[Tensor]]
"""Scales to try, from the smallest ones with which no weight of a group is clipped, `(rows, groups, 1)`."""


def _fit(numbers: _Numbers, scales: _Scales, groups: Groups, scheme: Scheme, search: ScaleSearch | None) -> Values:
    x = groups.x
    widest = x.abs().amax(dim=-1, keepdim=True) / numbers.largest
    power = search.error_power if search is not None else 2.0
    best, least = widest, torch.full_like(widest, float("inf"))
    for scale in scales(widest, search):
        error = numbers.nearest(x / divisor(scale)).mul_(scale).sub_(x).abs_()
        error = error.square_() if power == 2.0 else error.pow_(power)
        error = error if groups.importance is None else error.mul_(groups.importance)
        total = error.sum(dim=-1, keepdim=True)
        best, least = torch.where(total < least, scale, best), torch.minimum(total, least)
    return {"scale": best}


def _fractions(widest: Tensor, search: ScaleSearch | None) -> Iterable[Tensor]:
    return (widest * ratio for ratio in ([1.0] if search is None else search.ratios()))


def _powers_of_two(widest: Tensor, search: ScaleSearch | None) -> Iterable[Tensor]:
    """The smallest power of two that clips nothing, and with a search the next smaller one."""
    fraction, exponent = torch.frexp(widest)
    power = torch.ldexp(torch.ones_like(widest), exponent - (fraction == 0.5).to(exponent.dtype))
    return (power,) if search is None else (power, power * 0.5)


def _as_e4m3(widest: Tensor, search: ScaleSearch | None) -> Iterable[Tensor]:
    """Fractions of the range as they are stored: an E4M3 number may be 6 % off."""
    whole = divisor_for(float(widest.max()) if widest.numel() else 0.0)
    return (round_e4m3(scale * whole) / whole for scale in _fractions(widest, search))


def _refusal(group: int, scales: str, scheme: Scheme) -> str | None:
    fits = group in (0, scheme.group_size) and scheme.scale_format == scales and not scheme.has_outliers
    return None if fits else "group size, scale format or outliers with a grid of floating-point numbers"


def _grid(name: str, summary: str, numbers: _Numbers, scales: _Scales, stored: tuple[int, str]) -> Grid:
    """stored: the group size, 0 for whole rows, and the scale format."""
    group, form = stored
    levels = Levels(numbers.nearest, -numbers.largest, numbers.largest, len(numbers.ascending))
    table, known = torch.tensor(numbers.by_code), torch.tensor(numbers.magnitudes)

    def rounded(x: Tensor, values: Values, scheme: Scheme) -> Tensor:
        return numbers.nearest(x / divisor(values["scale"])).mul_(values["scale"])

    def encode(x: Tensor, values: Values, scheme: Scheme) -> tuple[Tensor, Tensor]:
        number = numbers.nearest(x / divisor(values["scale"]))
        codes = torch.bucketize(number.abs(), known.to(x.device)).to(torch.uint8)
        codes += (number < 0).to(torch.uint8) << (numbers.bits - 1)
        return codes, number.mul_(values["scale"])

    def decode(codes: Tensor, values: Values, scheme: Scheme) -> Tensor:
        return table.to(codes.device)[codes.to(torch.int32)] * values["scale"]

    def formula(scheme: Scheme) -> Formula:
        return Formula(bit_planes(numbers.bits).planes, numbers.by_code, lambda values: Terms(values["scale"]))

    return replace(
        level_grid(name, summary, lambda scheme: numbers.ascending),
        fit=partial(_fit, numbers, scales),
        encode=encode,
        round=rounded,
        decode=decode,
        through=lambda latent, values, scheme: round_to_nearest(latent, values["scale"], levels),
        formula=formula,
        widths=(numbers.bits,),
        refuses=partial(_refusal, group, form),
        brings={"group_size": str(group) if group else "row", "scale_format": form, "outliers": "none"},
        scales=form,
        block=group or 1,
    )


FP8 = _grid("fp8", "numbers of 8 bits (E4M3), one scale per row", E4M3, _fractions, (0, "bfloat16"))
MXFP4 = _grid("mxfp4", "numbers of 4 bits (E2M1), 32 weights per power of two", E2M1, _powers_of_two, (32, "e8m0"))
NVFP4 = replace(
    _grid("nvfp4", "numbers of 4 bits (E2M1), 16 weights per scale of 8 bits", E2M1, _as_e4m3, (16, "e4m3")),
    joins_rows=True,
)
FLOAT_GRIDS = (FP8, MXFP4, NVFP4)
assert E4M3.largest == E4M3_LARGEST
