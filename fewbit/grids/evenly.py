"""Evenly spaced grids: 2^b levels per group, with or without an offset.

Values: ``scale`` and, if the grid has one, ``offset``, each `(rows, groups, 1)`. The ends of each group's range,
``low`` and ``high``, are fitted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fewbit.grids import integer
from fewbit.grids.codes import bit_planes
from fewbit.grids.formula import Formula, Terms
from fewbit.grids.grid import Fitted, Grid, Groups, Parts, ScaleSearch, Values
from fewbit.grids.packing import pack, packed_bytes, small_integers, unpack
from fewbit.grids.scale_formats import SCALE_FORMATS
from fewbit.grids.scales import divisor
from fewbit.grids.scheme import Layout, Scheme
from fewbit.grids.straight_through import round_evenly


@dataclass(frozen=True)
class _Offset:
    """How an offset `(rows, groups)` is computed from a range and stored.

    of_range(low, high, scale, bits): the offset of a range; `scale` is the decoded scale. term: which term of a formula
    it is.
    """

    kind: str
    of_range: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    pack: Callable[[Tensor, Scheme], tuple[dict[str, Tensor], Tensor]]
    see: Callable[[Tensor, Scheme], Tensor]
    read: Callable[[Parts, Scheme, int], Tensor]
    layout: Callable[[Scheme, int, int], Layout]
    term: str = "zero"


def _pack_zeros(zeros: Tensor, scheme: Scheme) -> tuple[dict[str, Tensor], Tensor]:
    seen = zeros.round().clamp(0, _top(scheme))
    return {"zeros": pack(seen.to(torch.uint8), scheme.whole_bits)}, seen


def _pack_minima(minima: Tensor, scheme: Scheme) -> tuple[dict[str, Tensor], Tensor]:
    pattern, seen = SCALE_FORMATS[scheme.scale_format].pack_floats(minima)
    return {"minima": pattern}, seen


_WHOLE = _Offset(
    "zero",
    of_range=lambda low, high, scale, bits: integer.zero_point_grid(low, high, bits)[1],
    pack=_pack_zeros,
    see=lambda zeros, scheme: zeros.round().clamp(0, _top(scheme)),
    read=lambda parts, scheme, groups: unpack(parts["zeros"], scheme.whole_bits, groups).to(torch.float32),
    layout=lambda scheme, rows, groups: {"zeros": (torch.uint8, (rows, packed_bytes(groups, scheme.whole_bits)))},
)
_REAL = _Offset(
    "real",
    of_range=lambda low, high, scale, bits: -low / divisor(scale),
    pack=lambda zeros, scheme: SCALE_FORMATS[scheme.scale_format].pack(zeros, "zero", scheme),
    see=lambda zeros, scheme: SCALE_FORMATS[scheme.scale_format].see(zeros, scheme),
    read=lambda parts, scheme, groups: SCALE_FORMATS[scheme.scale_format].read(parts, "zero", scheme, groups),
    layout=lambda scheme, rows, groups: SCALE_FORMATS[scheme.scale_format].layout("zero", scheme, rows, groups),
)
_MINIMUM = _Offset(
    "minimum",
    of_range=lambda low, high, scale, bits: low,
    pack=_pack_minima,
    see=lambda minima, scheme: _pack_minima(minima, scheme)[1],
    read=lambda parts, scheme, groups: SCALE_FORMATS[scheme.scale_format].read_floats(parts["minima"]),
    layout=lambda scheme, rows, groups: {"minima": (SCALE_FORMATS[scheme.scale_format].word, (rows, groups))},
    term="minimum",
)


def _top(scheme: Scheme) -> int:
    """The largest code."""
    return int(2**scheme.whole_bits) - 1


def _fit(trial: Callable[[], Grid], groups: Groups, scheme: Scheme, search: ScaleSearch | None) -> Values:
    low, high = integer.extremes(groups.x, groups.outside)
    if search is not None:
        low, high = _search_range(trial(), groups, (low, high), scheme, search)
    return {"low": low, "high": high}


def _search_range(
    grid: Grid, groups: Groups, widest: tuple[Tensor, Tensor], scheme: Scheme, search: ScaleSearch
) -> tuple[Tensor, Tensor]:
    """The range of each group, multiplied by the ratio with the least weighted error over the core weights."""
    low, high = widest
    exact = _exact(grid, scheme)
    best_error = torch.full_like(low, float("inf"))
    best = torch.ones_like(low)
    for ratio in search.ratios():
        values = grid.settle({"low": low * ratio, "high": high * ratio}, exact, False).values
        error = grid.round(groups.x, values, exact).sub_(groups.x).abs_().pow_(search.error_power)
        error = error if groups.outside is None else error.masked_fill_(groups.outside, 0.0)
        error = error if groups.importance is None else error.mul_(groups.importance)
        total = error.sum(dim=-1, keepdim=True)
        best = torch.where(total < best_error, ratio, best)
        best_error = torch.minimum(total, best_error)
    return low * best, high * best


def _exact(grid: Grid, scheme: Scheme) -> Scheme:
    return Scheme(scheme.bits, scheme.group_size, grid.name, scale_format="float32")


def _settle(
    scale_of: Callable[[Tensor, Tensor, int], Tensor],
    offset: _Offset | None,
    wanted: Values,
    scheme: Scheme,
    stored: bool,
) -> Fitted:
    low, high = wanted["low"].squeeze(-1), wanted["high"].squeeze(-1)
    scale = scale_of(low, high, scheme.whole_bits)
    parts, seen = _store(scale, scheme, stored)
    values = {"scale": seen.unsqueeze(-1)}
    if offset is not None:
        chosen = offset.of_range(low, high, seen, scheme.whole_bits)
        more, chosen = offset.pack(chosen, scheme) if stored else ({}, offset.see(chosen, scheme))
        parts, values = {**parts, **more}, {**values, "offset": chosen.unsqueeze(-1)}
    return Fitted(scheme, parts, values)


def _store(scale: Tensor, scheme: Scheme, stored: bool) -> tuple[dict[str, Tensor], Tensor]:
    form = SCALE_FORMATS[scheme.scale_format]
    return form.pack(scale, "scale", scheme) if stored else ({}, form.see(scale, scheme))


def _restore(offset: _Offset | None, values: Values, scheme: Scheme) -> Fitted:
    parts, scale = _store(values["scale"].squeeze(-1), scheme, True)
    seen = {"scale": scale.unsqueeze(-1)}
    if offset is not None:
        more, zero = offset.pack(values["offset"].squeeze(-1), scheme)
        parts, seen = {**parts, **more}, {**seen, "offset": zero.unsqueeze(-1)}
    return Fitted(scheme, parts, seen)


def _read(offset: _Offset | None, parts: Parts, scheme: Scheme, groups: int) -> Values:
    values = {"scale": SCALE_FORMATS[scheme.scale_format].read(parts, "scale", scheme, groups).unsqueeze(-1)}
    if offset is not None:
        values["offset"] = offset.read(parts, scheme, groups).unsqueeze(-1)
    return values


def _layout(offset: _Offset | None, scheme: Scheme, rows: int, groups: int) -> Layout:
    layout = SCALE_FORMATS[scheme.scale_format].layout("scale", scheme, rows, groups)
    return layout if offset is None else {**layout, **offset.layout(scheme, rows, groups)}


def _terms(offset: _Offset | None, values: Values) -> Terms:
    return Terms(values["scale"], **({offset.term: values["offset"]} if offset else {}))


def _zero(values: Values, scheme: Scheme) -> Tensor | float:
    return values["offset"] if "offset" in values else float(2 ** (scheme.whole_bits - 1))


def _codes_of_minimum(x: Tensor, values: Values, scheme: Scheme) -> Tensor:
    return integer.encode_minimum(x, values["scale"], values["offset"], scheme.whole_bits)


def _codes_of_real(x: Tensor, values: Values, scheme: Scheme) -> Tensor:
    return integer.encode_real_zero(x, values["scale"], values["offset"], scheme.whole_bits)


def _codes_of_whole(x: Tensor, values: Values, scheme: Scheme) -> Tensor:
    return integer.encode(x, values["scale"], _zero(values, scheme), scheme.whole_bits)


def _from_minimum(codes: Tensor, values: Values, scheme: Scheme) -> Tensor:
    return codes.mul_(values["scale"]).add_(values["offset"])


def _from_zero(codes: Tensor, values: Values, scheme: Scheme) -> Tensor:
    return codes.sub_(_zero(values, scheme)).mul_(values["scale"])


def _decode(codes: Tensor, values: Values, scheme: Scheme) -> Tensor:
    return (codes.to(torch.float32) - _zero(values, scheme)) * values["scale"]


def _decode_minimum(codes: Tensor, values: Values, scheme: Scheme) -> Tensor:
    return codes.to(torch.float32) * values["scale"] + values["offset"]


def _through(whole: bool, latent: Tensor, values: Values, scheme: Scheme) -> Tensor:
    zero = _zero(values, scheme)
    zero = zero if isinstance(zero, Tensor) else torch.full_like(values["scale"], zero)
    return round_evenly(latent, values["scale"], zero, _top(scheme), whole)


def _through_minimum(latent: Tensor, values: Values, scheme: Scheme) -> Tensor:
    scale, offset = values["scale"], values["offset"]
    return round_evenly(latent - offset, scale, torch.zeros_like(scale), _top(scheme), True) + offset


def _step(values: Values, scheme: Scheme) -> Tensor:
    return values["scale"].abs()


def _neighbours(x: Tensor, values: Values, scheme: Scheme) -> tuple[Tensor, Tensor]:
    step = _step(values, scheme)
    return x - step, x + step


@dataclass(frozen=True)
class _Rounding:
    """How one family of grids rounds.

    codes: weights to integer codes. back: codes to weights, in place. decode: the same, out of place. through: weights
    to decoded weights, with gradients.
    """

    codes: Callable[[Tensor, Values, Scheme], Tensor]
    back: Callable[[Tensor, Values, Scheme], Tensor]
    decode: Callable[[Tensor, Values, Scheme], Tensor]
    through: Callable[[Tensor, Values, Scheme], Tensor]


def _grid(
    name: str,
    summary: str,
    scale_of: Callable[[Tensor, Tensor, int], Tensor],
    offset: _Offset | None,
    rounding: _Rounding,
    trial: Callable[[], Grid],
) -> Grid:
    def encode(x: Tensor, values: Values, scheme: Scheme) -> tuple[Tensor, Tensor]:
        codes = rounding.codes(x, values, scheme)
        return small_integers(codes), rounding.back(codes, values, scheme)

    def formula(scheme: Scheme) -> Formula:
        first = 0.0 if offset else -float(2 ** (scheme.whole_bits - 1))
        ladder = tuple(first + code for code in range(_top(scheme) + 1))
        return Formula(bit_planes(scheme.whole_bits).planes, ladder, partial(_terms, offset))

    return Grid(
        name,
        summary,
        codes=lambda scheme: bit_planes(scheme.whole_bits),
        layout=partial(_layout, offset),
        fit=partial(_fit, trial),
        settle=partial(_settle, scale_of, offset),
        restore=partial(_restore, offset),
        read=partial(_read, offset),
        encode=encode,
        round=lambda x, values, scheme: rounding.back(rounding.codes(x, values, scheme), values, scheme),
        decode=rounding.decode,
        through=rounding.through,
        step=_step,
        neighbours=_neighbours,
        trial=lambda scheme: (trial(), _exact(trial(), scheme)),
        offset=offset.kind if offset else "",
        formula=formula,
    )


_TO_WHOLE = _Rounding(_codes_of_whole, _from_zero, _decode, partial(_through, True))

ZERO_POINT: Grid = _grid(
    "zero-point",
    "evenly spaced with an integer zero-point, so 0 is a level",
    lambda low, high, bits: integer.zero_point_grid(low, high, bits)[0],
    _WHOLE,
    _TO_WHOLE,
    lambda: ZERO_POINT,
)
SYMMETRIC: Grid = _grid(
    "symmetric", "evenly spaced around 0", integer.symmetric_grid, None, _TO_WHOLE, lambda: SYMMETRIC
)
MINIMUM: Grid = _grid(
    "minimum",
    "evenly spaced from a real-valued minimum, as in AdpQ",
    integer.minimum_grid,
    _MINIMUM,
    _Rounding(_codes_of_minimum, _from_minimum, _decode_minimum, _through_minimum),
    lambda: MINIMUM,
)
REAL_ZERO: Grid = _grid(
    "real-zero",
    "evenly spaced with a real-valued zero-point, as in SpQR",
    integer.minimum_grid,
    _REAL,
    _Rounding(_codes_of_real, _from_zero, _decode, partial(_through, False)),
    lambda: MINIMUM,
)
