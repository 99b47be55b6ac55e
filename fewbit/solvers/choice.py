"""How codes are chosen: by rounding, or column by column under a curvature."""

from dataclasses import dataclass

from fewbit.errors import FewbitError

KINDS = ("round", "column")
IMPORTANCE = ("none", "diagonal", "inverse")


@dataclass(frozen=True)
class SolverChoice:
    """kind: round or column.

    damping: added to the diagonal, as a share of its mean. act_order: columns by falling diagonal of the curvature
    (grids are then chosen before the first column). refit: choose a group's grid when the solver enters it, from the
    weights as they are then; else from the original weights. importance: c_j for grids and outliers, none, diagonal
    (H_jj) or inverse (1 / [H^-1]_jj).
    """

    kind: str = "round"
    damping: float = 0.01
    act_order: bool = False
    refit: bool = False
    importance: str = "none"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise FewbitError(f"solver must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if self.importance not in IMPORTANCE:
            raise FewbitError(f"importance must be one of {', '.join(IMPORTANCE)}, not {self.importance!r}")
        if not 0 < self.damping <= 100:
            raise FewbitError(f"damping must be above 0 and at most 100 times the mean diagonal, not {self.damping}")
        if self.act_order and self.refit:
            raise FewbitError("act-order takes columns out of their groups: grids cannot be refitted (--static-groups)")
