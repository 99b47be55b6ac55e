"""Evenly spaced around 0, ``w = (code - 2^(b-1)) * scale``, with a scale of either sign, found by least squares.

Of 2^b levels around 0, one side has one more than the other, and the sign of the scale says which. The symmetric grid
leaves the outermost level unused instead.
"""

from dataclasses import replace

from fewbit.grids.evenly import SYMMETRIC
from fewbit.grids.ggml_fit import Steps, fit_scale
from fewbit.grids.grid import Grid, Groups, ScaleSearch, Values
from fewbit.grids.level_grid import read_scale, scale_layout, store_scale
from fewbit.grids.scheme import Scheme


def _fit(groups: Groups, scheme: Scheme, search: ScaleSearch | None) -> Values:
    half = 2.0 ** (scheme.whole_bits - 1)
    steps = Steps(lambda u: u.round_().clamp_(-half, half - 1), -half, half - 1, 2**scheme.whole_bits)
    return fit_scale(steps, None, groups, scheme, search)


SIGNED: Grid = replace(
    SYMMETRIC,
    name="signed",
    summary="evenly spaced around 0, with a scale of either sign",
    fit=_fit,
    settle=store_scale,
    restore=store_scale,
    read=read_scale,
    layout=scale_layout,
    trial=lambda scheme: (SIGNED, replace(scheme, scale_format="float32")),
)
