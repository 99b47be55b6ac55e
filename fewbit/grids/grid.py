"""The interface of a grid: its levels, and how it is fitted, stored and differentiated.

Weights are `x`, float32 `(rows, groups, g)`, or `(rows, k)` for k consecutive columns of one group. The parameters of a
grid are a mapping from names to tensors ("values") that broadcast over the last dimension of `x`: `(rows, groups, n)`,
or `(rows, n)` for the columns of one group.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewbit.choices import check_values
from fewbit.errors import FewbitError
from fewbit.grids.codes import CodeLayout
from fewbit.grids.formula import Formula
from fewbit.grids.scheme import Layout, Scheme

Values = Mapping[str, Tensor]
Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class ScaleSearch:
    """Which ranges or scales to try, as fractions of a group's full range or largest magnitude.

    error_power: the exponent of the error, 2 for squared error.
    """

    smallest: float = 0.6
    largest: float = 1.0
    step: float = 0.05
    error_power: float = 2.0

    def __post_init__(self) -> None:
        check_values(self, {name: f"search: {name}" for name in ("smallest", "largest", "step")})
        if not 0 < self.smallest <= self.largest or not 0 < self.step <= 1:
            raise FewbitError(
                f"search: cannot search from {self.smallest} to {self.largest} in steps of {self.step}: fractions must "
                "be above 0, and a step at most 1"
            )
        if not 0 < self.error_power <= 16:
            raise FewbitError(f"error_power must be above 0 and at most 16, not {self.error_power}")

    def ratios(self) -> list[float]:
        """The fractions, largest first."""
        count = round((self.largest - self.smallest) / self.step)
        return [self.largest - self.step * i for i in range(count + 1)]


@dataclass(frozen=True)
class Span:
    """Which weights share one code: this many rows of one column, or this many consecutive columns of one row."""

    rows: int = 1
    columns: int = 1

    @property
    def weights(self) -> int:
        """How many weights are rounded together."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Groups:
    """Weights to fit grids to: x `(rows, groups, g)` float32, with 0 wherever `outside` (bool, outliers) is True.

    importance: c_j, the cost of a squared error, broadcasts to x; None means 1. costs: the cost after later columns
    have compensated for the error, `(groups, g)`, if the solver knows it.
    """

    x: Tensor
    outside: Tensor | None = None
    importance: Tensor | None = None
    costs: Tensor | None = None


@dataclass(frozen=True)
class Fitted:
    """A grid fitted to the groups of some rows.

    parts: the tensors that store it. values: its parameters as a reader decodes them, including storage rounding.
    """

    scheme: Scheme
    parts: dict[str, Tensor]
    values: Values


def _nothing(*_: Any) -> None:
    return None


def _no_levels(_: float) -> tuple[float, ...]:
    return ()


def _as_they_are(values: Values) -> Values:
    return values


@dataclass(frozen=True)
class Grid:
    """One kind of grid; an entry of :data:`fewbit.grids.table.GRIDS`.

    name: its name in files. called: its name in recipes and on the command line, if different. summary: one line for
    help. widths: the bit-widths that it supports; if there is only one, it is the default.
    codes(scheme): how dense codes are packed. layout(scheme, rows, groups): the parts stored beside the codes.
    fit(groups, scheme, search): the parameters, in full precision: values `(rows, groups, n)`.
    settle(wanted, scheme, stored): these values with storage rounding applied; the parts are made only if `stored`.
    restore(values, scheme): the same, with parts, for values from :meth:`read` that training has changed.
    read(parts, scheme, groups): the values of a stored weight.
    encode(x, values, scheme): codes (uint8) and decoded weights. round(x, values, scheme): only the decoded weights;
    the solver calls it at each step. decode(codes, values, scheme): the inverse of encode, differentiable in the
    values.
    through(latent, values, scheme): the result of :attr:`round`, with gradients for `latent` and for the values.
    step(values, scheme): the distance between neighbouring levels; broadcasts over x.
    neighbours(x, values, scheme): for decoded x, the next lower and the next higher level.
    refuses(scheme): why a scheme is not possible, or None. trial(scheme): the grid and scheme with which ranges are
    searched, without storage rounding. levels(bits): the codebook of a scheme of that width.
    span: which weights share one code. spread(values): the values of one group; those that differ between columns are
    expanded to one per column, under the names `by_column`.
    joins_rows: some data is stored once for all rows of a weight. block_by_block: the grid is fitted only when the
    solver reaches a group. offset: what is stored in addition to scales: "" (nothing), zero (an integer zero-point),
    real (a real-valued zero-point), or minimum (in units of the weights).
    scales: the only scale format of a grid whose format is part of it; "" for all that fit the offset. brings: choices
    on other axes that the grid determines, by their flat names in recipes. block: a row's columns must be a multiple.
    formula(scheme): what :attr:`decode` computes, for kernels; None if it is not of that form.
    """

    name: str
    summary: str
    codes: Callable[[Scheme], CodeLayout]
    layout: Callable[[Scheme, int, int], Layout]
    fit: Callable[[Groups, Scheme, ScaleSearch | None], Values]
    settle: Callable[[Values, Scheme, bool], Fitted]
    restore: Callable[[Values, Scheme], Fitted]
    read: Callable[[Parts, Scheme, int], Values]
    encode: Callable[[Tensor, Values, Scheme], tuple[Tensor, Tensor]]
    round: Callable[[Tensor, Values, Scheme], Tensor]
    decode: Callable[[Tensor, Values, Scheme], Tensor]
    through: Callable[[Tensor, Values, Scheme], Tensor]
    step: Callable[[Values, Scheme], Tensor]
    neighbours: Callable[[Tensor, Values, Scheme], tuple[Tensor, Tensor]]
    called: str = ""
    widths: tuple[float, ...] = (2, 3, 4, 5, 6, 7, 8)
    refuses: Callable[[Scheme], str | None] = _nothing
    trial: Callable[[Scheme], "tuple[Grid, Scheme]"] | None = None
    levels: Callable[[float], tuple[float, ...]] = _no_levels
    span: Span = field(default_factory=Span)
    spread: Callable[[Values], Values] = _as_they_are
    by_column: tuple[str, ...] = ()
    joins_rows: bool = False
    block_by_block: bool = False
    offset: str = ""
    scales: str = ""
    brings: Mapping[str, str] = field(default_factory=dict)
    block: int = 1
    formula: Callable[[Scheme], Formula] | None = None

    @property
    def choice(self) -> str:
        """The grid's name in recipes."""
        return self.called or self.name


def of_group(values: Values, group: int) -> dict[str, Tensor]:
    """The values `(rows, n)` of one group."""
    return {name: value[:, min(group, value.shape[1] - 1)] for name, value in values.items()}


def fit_and_settle(grid: Grid, groups: Groups, scheme: Scheme, search: ScaleSearch | None = None) -> Fitted:
    """Fit a grid and make its stored parts, in one step."""
    return grid.settle(grid.fit(groups, scheme, search), scheme, True)


def stack(values: list[Values]) -> dict[str, Tensor]:
    """The values of several weights, concatenated along the rows."""
    return {name: torch.cat([one[name] for one in values]) for name in values[0]}
