"""What a transform is: an invertible map T of a layer's inputs that makes its weight easier to round.

    y = W x = (W T^-1) (T x)        W' = W T^-1        H' = T H T^T

W' is the weight that is rounded. T is applied to the inputs at run time, or folded into the operation that produces
them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fewbit.grids.scheme import Layout

Values = Mapping[str, Tensor]
Parts = Mapping[str, Tensor]
Rounding = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Inputs:
    """Measurements of the inputs that one or more layers share.

    gram: `(in, in)`. largest: the largest magnitude of each channel `(in,)`, if it was measured.
    """

    gram: Tensor
    largest: Tensor | None = None


def _same(x: Tensor, values: Values) -> Tensor:
    return x


@dataclass(frozen=True)
class Transform:
    """One kind of transform; an entry of :data:`fewbit.transforms.table.TRANSFORMS`.

    weight(w, values): W' of a weight `(out, in)`. back(w, values): the inverse. curvature(h, values): H' of a curvature
    `(in, in)`. inputs(x, values): T x of inputs `(..., in)`.
    If T is applied at run time: fixed(columns): the values of T. store(values), layout(columns), read(parts): their
    stored form, as parts whose names begin with ``transform``.
    If T is folded into the preceding layer: choose(weights, inputs, rounding): the values for the report, and the
    channel scales s of ``T = diag(1 / s)``, or None for no scaling; rounding(i, w): the decoded weights that weight i
    rounds to. `choose` is None if T is applied at run time or is the identity. from_largest: `choose` needs the largest
    inputs. from_norms: T is folded only into norms, not into linear layers.
    problem(values): why stored values cannot be those of T, or None. is_chosen: a recipe can name it; otherwise its
    values only come with a stored weight, and `fixed` is not used.
    """

    name: str
    summary: str
    weight: Callable[[Tensor, Values], Tensor] = _same
    back: Callable[[Tensor, Values], Tensor] = _same
    curvature: Callable[[Tensor, Values], Tensor] = _same
    inputs: Callable[[Tensor, Values], Tensor] = _same
    fixed: Callable[[int], Values] = lambda columns: {}
    store: Callable[[Values], dict[str, Tensor]] = lambda values: {}
    layout: Callable[[int], Layout] = lambda columns: {}
    read: Callable[[Parts], Values] = lambda parts: {}
    choose: Callable[[Sequence[Tensor], Inputs, Rounding], tuple[dict[str, Any], Tensor | None]] | None = None
    from_largest: bool = False
    from_norms: bool = False
    problem: Callable[[Values], str | None] = lambda values: None
    is_chosen: bool = True

    @property
    def folded(self) -> bool:
        """Whether the inverse is folded into the preceding layer."""
        return self.choose is not None
