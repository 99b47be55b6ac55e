"""The table of transforms."""

from fewbit.transforms.channel_scales import AWQ, SMOOTHQUANT
from fewbit.transforms.transform import Transform

TRANSFORMS: dict[str, Transform] = {
    one.name: one
    for one in (
        Transform("none", "no transform"),
        AWQ,
        SMOOTHQUANT,
    )
}
"""Transforms by name."""
