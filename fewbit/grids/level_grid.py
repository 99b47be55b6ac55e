"""Grids with arbitrary levels, ``w = scale * levels[code]`` with one scale per group, and the normal-float grid.

Values: ``scale`` `(rows, groups, 1)`.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fewbit.grids import codebook
from fewbit.grids.codes import bit_planes
from fewbit.grids.formula import Formula, Terms
from fewbit.grids.grid import Fitted, Grid, Groups, Parts, ScaleSearch, Values
from fewbit.grids.scale_formats import SCALE_FORMATS
from fewbit.grids.scales import divisor
from fewbit.grids.scheme import Layout, Scheme
from fewbit.grids.straight_through import round_to_levels

_WIDEST = ScaleSearch(smallest=1.0)


@lru_cache
def _table(levels: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels as a float32 tensor, and the midpoints between them."""
    known = torch.tensor(levels, dtype=torch.float32, device=device)
    return known, (known[1:] + known[:-1]) * 0.5


def store_scale(values: Values, scheme: Scheme, stored: bool = True) -> Fitted:
    """Store a grid whose only value is a scale `(rows, groups, 1)`; its parts are made only if `stored`."""
    form, wanted = SCALE_FORMATS[scheme.scale_format], values["scale"].squeeze(-1)
    parts, seen = form.pack(wanted, "scale", scheme) if stored else ({}, form.see(wanted, scheme))
    return Fitted(scheme, parts, {"scale": seen.unsqueeze(-1)})


def read_scale(parts: Parts, scheme: Scheme, groups: int) -> Values:
    """Inverse of :func:`store_scale`."""
    return {"scale": SCALE_FORMATS[scheme.scale_format].read(parts, "scale", scheme, groups).unsqueeze(-1)}


def scale_layout(scheme: Scheme, rows: int, groups: int) -> Layout:
    """Names, dtypes and shapes of the parts of :func:`store_scale`."""
    return SCALE_FORMATS[scheme.scale_format].layout("scale", scheme, rows, groups)


def level_grid(name: str, summary: str, levels_of: Callable[[Scheme], tuple[float, ...]], **others: Any) -> Grid:
    """A grid of ascending levels in [-1, 1]; `others` are further fields of :class:`fewbit.grids.grid.Grid`."""

    def fit(groups: Groups, scheme: Scheme, search: ScaleSearch | None) -> Values:
        return {"scale": codebook.search_scale(groups.x, groups.importance, levels_of(scheme), search or _WIDEST)}

    def encode(x: Tensor, values: Values, scheme: Scheme) -> tuple[Tensor, Tensor]:
        codes = codebook.encode(x, values["scale"], levels_of(scheme))
        return codes, decode(codes, values, scheme)

    def rounded(x: Tensor, values: Values, scheme: Scheme) -> Tensor:
        known, middles = _table(levels_of(scheme), x.device)
        return known[torch.bucketize(x / divisor(values["scale"]), middles)] * values["scale"]

    def decode(codes: Tensor, values: Values, scheme: Scheme) -> Tensor:
        return codebook.decode(codes, values["scale"], _table(levels_of(scheme), codes.device)[0])

    def through(latent: Tensor, values: Values, scheme: Scheme) -> Tensor:
        return round_to_levels(latent, values["scale"], levels_of(scheme))

    def step(values: Values, scheme: Scheme) -> Tensor:
        levels = levels_of(scheme)
        return values["scale"].abs() * ((levels[-1] - levels[0]) / (len(levels) - 1))

    def neighbours(x: Tensor, values: Values, scheme: Scheme) -> tuple[Tensor, Tensor]:
        known, middles = _table(levels_of(scheme), x.device)
        code = torch.bucketize(x / divisor(values["scale"]), middles)
        ends = [known[(code + by).clamp(0, len(known) - 1)] * values["scale"] for by in (-1, 1)]
        return torch.minimum(*ends), torch.maximum(*ends)

    settings: dict[str, Any] = {"codes": lambda scheme: bit_planes(scheme.whole_bits), **others}

    def formula(scheme: Scheme) -> Formula:
        return Formula(settings["codes"](scheme).planes, levels_of(scheme), lambda values: Terms(values["scale"]))

    return Grid(
        name,
        summary,
        layout=scale_layout,
        fit=fit,
        settle=store_scale,
        restore=store_scale,
        read=read_scale,
        encode=encode,
        round=rounded,
        decode=decode,
        through=through,
        step=step,
        neighbours=neighbours,
        formula=formula,
        **settings,
    )


def _held(scheme: Scheme) -> tuple[float, ...]:
    return scheme.levels


def _refuses(scheme: Scheme) -> str | None:
    return None if len(scheme.levels) == 2**scheme.bits else "number of levels"


CODEBOOK = level_grid(
    "codebook",
    "quantiles of a normal distribution, as in NF4; at 1 bit only the sign",
    _held,
    called="normal-float",
    widths=(1, 2, 3, 4, 5, 6, 7, 8),
    levels=lambda bits: codebook.normal_float(int(bits)),
    refuses=_refuses,
)
