"""The choice of a bit-width for embeddings and output heads, and the grid that they get at that width.

The grid needs no data and stores every row by itself, so that a runtime can decode the rows of single tokens.
"""

from dataclasses import dataclass

from fewbit.choices import check_values
from fewbit.errors import FewbitError
from fewbit.grids.choice import MAX_BITS, GridChoice, ScaleChoice, group_size_for
from fewbit.grids.grid import ScaleSearch

KEPT = 16
"""The bit-width that leaves embeddings and heads unchanged."""
_GROUPS = "64,auto"
_SMALLEST_GROUP = 16
_EVENLY_FROM = 5
_ERROR_POWER = 3.0
_ENOUGH = 7
"""With so many bits, the full range is as good as any other."""


@dataclass(frozen=True)
class EmbeddingChoice:
    """How embeddings and output heads are stored.

    bits: 1 to 8, or 16 to keep them unchanged; None is replaced by :func:`default_bits`.
    """

    bits: int | None = None

    def __post_init__(self) -> None:
        check_values(self, {"bits": "embedding_bits"})
        if self.bits is not None and self.bits != KEPT and not 1 <= self.bits <= MAX_BITS:
            raise FewbitError(f"embedding bits must be from 1 to {MAX_BITS}, or {KEPT} to keep them, not {self.bits}")


def default_bits(width: float) -> int:
    """The bits of embeddings and heads beside layers with `width` bits."""
    return 8 if width >= 4 else 6


def embedding_grid(bits: int, columns: int) -> tuple[GridChoice, ScaleChoice]:
    """The grid and the scales of a table with rows of `columns` weights.

    As for layers, few levels are spaced like normal quantiles, many evenly. A row without a divisor from 16 to 128 is
    one group.
    """
    size = group_size_for(columns, _GROUPS) or 0
    group = str(size) if size >= min(columns, _SMALLEST_GROUP) else "row"
    name = "symmetric" if bits >= _EVENLY_FROM else "normal-float"
    return GridChoice(name, bits, group, _search(bits)), ScaleChoice("two-level")


def _search(bits: int) -> ScaleSearch | None:
    """The search for ranges. What measured best: with few levels, large weights count more than squares say."""
    if bits == 1:
        # Of two levels, the best scale is near the mean magnitude.
        return ScaleSearch(smallest=0.1)
    return ScaleSearch(error_power=_ERROR_POWER) if bits < _ENOUGH else None
