"""The table of transforms."""

from fewbit.transforms.channel_scales import AWQ, SMOOTHQUANT
from fewbit.transforms.column_order import COLUMN_ORDER
from fewbit.transforms.transform import Transform

TRANSFORMS: dict[str, Transform] = {
    one.name: one
    for one in (
        Transform("none", "no transform"),
        AWQ,
        SMOOTHQUANT,
        COLUMN_ORDER,
    )
}
"""Transforms by name."""


def chosen_transforms() -> dict[str, Transform]:
    """The transforms that a recipe can have, by name."""
    return {name: one for name, one in TRANSFORMS.items() if one.is_chosen}
