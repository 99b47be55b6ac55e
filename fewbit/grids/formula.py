"""A grid as a formula over its codes, for programs that decode weights themselves, such as kernels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fewbit.grids.codes import Plane


@dataclass(frozen=True)
class Terms:
    """The numbers of the groups: scale `(rows, groups, n)`; zero and minimum `(rows, groups, 1)`, None for 0."""

    scale: Tensor
    zero: Tensor | None = None
    minimum: Tensor | None = None


@dataclass(frozen=True)
class Formula:
    """``w = (ladder[code] - zero) * scale + minimum``, in float32 and in this order.

    planes: where the bits of a code are, the lowest first. ladder: a number for each code. terms: from the grid's
    values. With n scales in a group, the codes are divided into n equal runs with a scale each.
    """

    planes: tuple[Plane, ...]
    ladder: tuple[float, ...]
    terms: Callable[[Mapping[str, Tensor]], Terms]
