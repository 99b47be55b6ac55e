"""The choice of outliers in a recipe: which weights they are, and how they are stored."""

from dataclasses import dataclass

from fewbit.choices import check_name
from fewbit.errors import FewbitError
from fewbit.outliers.grids import OUTLIER_GRIDS, OutlierGrid


@dataclass(frozen=True)
class OutlierChoice:
    """Which weights are outliers, and how they are stored.

    rule: none, or a name in :data:`fewbit.outliers.rules.OUTLIER_RULES`. fraction: the largest fraction of weights that
    are outliers (in group scope rounded to a whole number per group, at least one). scope: tensor (one quantile for the
    whole tensor) or group (the same number in each group). grid: a name in :data:`fewbit.outliers.grids.OUTLIER_GRIDS`.
    bits: bits per outlier; 0 means the same as the core. sensitivity: the threshold of the rule sensitivity, as a
    multiple of the mean over the columns of their variance divided by U_jj^2.
    """

    rule: str = "none"
    fraction: float = 0.05
    scope: str = "tensor"
    grid: str = "minmax"
    bits: int = 0
    sensitivity: float = 0.2

    def __post_init__(self) -> None:
        check_name("outlier_grid", self.grid, OUTLIER_GRIDS)
        if not 0 <= self.fraction < 0.5:
            raise FewbitError(f"outlier_fraction must be from 0 to below 0.5, not {self.fraction}")
        check_name("outlier_scope", self.scope, ("tensor", "group"))
        if self.sensitivity <= 0:
            raise FewbitError(f"sensitivity must be above 0, not {self.sensitivity}")

    @property
    def kind(self) -> OutlierGrid:
        """The grid object of the outliers."""
        return OUTLIER_GRIDS[self.grid]

    def per_group(self, group_size: int) -> int:
        """Number of outliers per group in group scope: the fraction of the group, rounded, at least one; 0 if there
        is no group scope or the fraction is 0.
        """
        if self.scope != "group" or self.fraction == 0:
            return 0
        return max(1, round(self.fraction * group_size))
