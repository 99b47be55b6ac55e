"""What a grid is: the levels that weights are rounded to, how it is fitted, stored, and passed by a gradient.

Weights are `x`, float32 `(rows, groups, g)`, or `(rows, k)` for k neighbouring columns of one group. Everything that
fixes a grid is a mapping of names to tensors ("values") that broadcast over the last dimension of `x`:
`(rows, groups, n)`, or `(rows, n)` beside the columns of one group.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import FewbitError
from fewbit.grids.codes import CodeLayout
from fewbit.grids.scheme import Layout, Scheme

Values = Mapping[str, Tensor]
Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class ScaleSearch:
    """Which ranges or scales to try, as shares of the group's largest magnitude.

    error_power: the exponent of the error, 2 for squared error.
    """

    smallest: float = 0.6
    largest: float = 1.0
    step: float = 0.05
    error_power: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.error_power <= 16:
            raise FewbitError(f"error_power must be above 0 and at most 16, not {self.error_power}")

    def ratios(self) -> list[float]:
        """The shares, largest first."""
        count = round((self.largest - self.smallest) / self.step)
        return [self.largest - self.step * i for i in range(count + 1)]


@dataclass(frozen=True)
class Span:
    """Which weights one code stands for: so many rows of one column, or so many neighbouring columns of one row."""

    rows: int = 1
    columns: int = 1

    @property
    def weights(self) -> int:
        """How many weights are rounded together."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Groups:
    """Weights to fit grids to: x `(rows, groups, g)` float32, 0 wherever `outside` (bool, outliers) is True.

    importance: c_j, what a squared error costs, broadcasts to x; None for 1. costs: what it costs once later columns
    have made up for it, `(groups, g)`, where a solver knows.
    """

    x: Tensor
    outside: Tensor | None = None
    importance: Tensor | None = None
    costs: Tensor | None = None


@dataclass(frozen=True)
class Fitted:
    """A grid fitted to the groups of some rows.

    parts: the tensors that store it. values: what a reader will see, rounded as it is stored.
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

    name: in files. called: in recipes and on the command line, where that is another name. summary: one line for help.
    widths: the bits that it can have, the first of them without being asked where there is one only.
    codes(scheme): how dense codes are packed. layout(scheme, rows, groups): parts beside the codes.
    fit(groups, scheme, search): what to store, chosen in full precision: values `(rows, groups, n)`.
    settle(wanted, scheme, stored): those values as stored; without `stored` the parts are not made.
    restore(values, scheme): parts from values as :meth:`read` gives them, changed by training.
    read(parts, scheme, groups): the values of a stored weight.
    encode(x, values, scheme): codes (uint8) and decoded weights. round(x, values, scheme): the decoded ones alone, the
    solver's step. decode(codes, values, scheme): the inverse; differentiable in the values.
    through(latent, values, scheme): what :attr:`round` gives, passed by gradients to `latent` and to the values.
    step(values, scheme): the distance between neighbouring levels, broadcasts over x.
    neighbours(x, values, scheme): for decoded x the levels below and above each.
    refuses(scheme): why a scheme cannot be, or None. trial(scheme): the scheme in which ranges are tried, unrounded.
    levels(bits): the codebook that a scheme of that width holds.
    span: which weights one code stands for. spread: values of one group with those that differ by column set out
    column by column, under the names `by_column`.
    joins_rows: something is stored once for all rows of a weight. block_by_block: fitted only as the solver enters a
    group. offset: what is stored beside scales: "", zero (an integer), real, or minimum (in the weights' own units).
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

    @property
    def choice(self) -> str:
        """What recipes call it."""
        return self.called or self.name


def of_group(values: Values, group: int) -> dict[str, Tensor]:
    """The values `(rows, n)` of one group."""
    return {name: value[:, min(group, value.shape[1] - 1)] for name, value in values.items()}


def fit_and_settle(grid: Grid, groups: Groups, scheme: Scheme, search: ScaleSearch | None = None) -> Fitted:
    """Fit a grid and store it, in one step."""
    return grid.settle(grid.fit(groups, scheme, search), scheme, True)


def stack(values: list[Values]) -> dict[str, Tensor]:
    """The values of several weights, one below the other, as those of one."""
    return {name: torch.cat([one[name] for one in values]) for name in values[0]}
