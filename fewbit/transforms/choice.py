"""The choice of a transform in a recipe."""

from dataclasses import dataclass

from fewbit.choices import Choices, check_name
from fewbit.transforms.table import TRANSFORMS
from fewbit.transforms.transform import Transform


@dataclass(frozen=True)
class TransformChoice:
    """The transform of a recipe. name: a name in :data:`fewbit.transforms.table.TRANSFORMS`."""

    name: str = "none"

    def __post_init__(self) -> None:
        check_name("transform", self.name, TRANSFORMS)

    @property
    def kind(self) -> Transform:
        """The transform object."""
        return TRANSFORMS[self.name]

    def refuses(self, recipe: Choices) -> str | None:
        """Why this transform cannot be combined with the choices on the other axes, or None."""
        if self.kind.folded and (recipe.curvature is None or recipe.curvature.kind != "gram"):
            return "channel scales need the input Gram: choose curvature gram"
        return None
