"""The choice of a solver: codes are chosen by rounding, or column by column with a curvature."""

from dataclasses import dataclass

from fewbit.choices import Choices, check_name
from fewbit.errors import FewbitError

KINDS = ("round", "column")
IMPORTANCE = ("none", "diagonal", "inverse")


@dataclass(frozen=True)
class SolverChoice:
    """How codes are chosen.

    kind: round or column. damping: added to the diagonal of the curvature, as a fraction of its mean. act_order:
    process columns in order of decreasing diagonal (grids are then fitted before the first column). refit: fit a
    group's grid when the solver reaches it, to the compensated weights; otherwise all grids are fitted to the original
    weights. importance: c_j for fitting grids and finding outliers: none, diagonal (H_jj) or inverse (1 / [H^-1]_jj).
    """

    kind: str = "round"
    damping: float = 0.01
    act_order: bool = False
    refit: bool = False
    importance: str = "none"

    def __post_init__(self) -> None:
        check_name("solver", self.kind, KINDS)
        check_name("importance", self.importance, IMPORTANCE)
        if not 0 < self.damping <= 100:
            raise FewbitError(f"damping must be above 0 and at most 100 times the mean diagonal, not {self.damping}")
        if self.act_order and self.refit:
            raise FewbitError(
                "act-order processes columns across groups, so grids cannot be refitted: use --static-groups"
            )

    def refuses(self, recipe: Choices) -> str | None:
        """Why this solver cannot be combined with the choices on the other axes, or None."""
        if self.kind == "column" and recipe.curvature is None:
            return "the column solver needs a curvature: gram or fisher"
        return None
