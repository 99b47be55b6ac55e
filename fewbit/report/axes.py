"""The choices on each axis of a recipe, as text and as JSON."""

from typing import Any

from fewbit.curvature.choice import CURVATURES
from fewbit.grids.scale_formats import SCALE_FORMATS
from fewbit.grids.table import GRIDS
from fewbit.outliers.grids import OUTLIER_GRIDS
from fewbit.outliers.rules import OUTLIER_RULES
from fewbit.presets import PRESETS
from fewbit.recipe import preset
from fewbit.solvers.choice import SOLVERS
from fewbit.transforms.table import chosen_transforms


def axes_json() -> dict[str, Any]:
    """The choices on each axis with a summary; ``methods``: the choices of each preset at its default bits."""
    return {
        "transform": {name: one.summary for name, one in chosen_transforms().items()},
        "outliers": {one.name: one.summary for one in OUTLIER_RULES.values()},
        "outlier_grid": {one.name: one.summary for one in OUTLIER_GRIDS.values()},
        "curvature": {one.name: one.summary for one in CURVATURES.values()},
        "grid": {one.choice: one.summary for one in GRIDS.values()},
        "scale_format": {one.name: one.summary for one in SCALE_FORMATS.values()},
        "solver": {one.name: one.summary for one in SOLVERS.values()},
        "methods": {name: _method(name) for name in PRESETS},
    }


def _method(name: str) -> dict[str, Any]:
    recipe = preset(name)
    return {
        "transform": recipe.transform.name,
        "outliers": recipe.outliers.rule,
        "curvature": recipe.curvature.kind if recipe.curvature else "none",
        "grid": recipe.grid.name,
        "scale_format": recipe.scales.format,
        "solver": recipe.solver.kind,
    }


def axes_text() -> str:
    """The same as text lines."""
    found = axes_json()
    lines: list[str] = []
    for axis, choices in found.items():
        lines.append(f"{axis}:")
        for name, said in choices.items():
            text = said if isinstance(said, str) else ", ".join(f"{k} {v}" for k, v in said.items() if v != "none")
            lines.append(f"  {name:15} {text}")
        lines.append("")
    return "\n".join(lines).rstrip()
