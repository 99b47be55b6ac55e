"""The choice of a transform in a recipe."""

from dataclasses import dataclass

from fewbit.choices import Choices, check_name, check_values
from fewbit.transforms.table import TRANSFORMS, chosen_transforms
from fewbit.transforms.transform import Transform


@dataclass(frozen=True)
class TransformChoice:
    """The transform of a recipe. name: one of :func:`fewbit.transforms.table.chosen_transforms`."""

    name: str = "none"

    def __post_init__(self) -> None:
        check_values(self, {"name": "transform"})
        check_name("transform", self.name, chosen_transforms())

    @property
    def kind(self) -> Transform:
        """The transform object."""
        return TRANSFORMS[self.name]

    def refuses(self, recipe: Choices) -> str | None:
        """Why this transform cannot be combined with the choices on the other axes, or None."""
        if self.kind.folded and (recipe.curvature is None or recipe.curvature.source.gradients):
            return "channel scales need the input Gram: choose curvature gram"
        return None
