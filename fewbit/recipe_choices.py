"""Recipes from what a user chose: a preset, and the options that were given."""

from dataclasses import replace
from typing import Any

from fewbit.choices import check_name
from fewbit.errors import FewbitError
from fewbit.grids.grid import ScaleSearch
from fewbit.grids.table import GRIDS, chosen_grid
from fewbit.outliers.grids import OUTLIER_GRIDS
from fewbit.outliers.rules import OUTLIER_RULES
from fewbit.recipe import Recipe, brought_by, preset, replace_solver, sets_of, with_choices


def recipe_from_choices(method: str, choices: dict[str, Any]) -> Recipe:
    """A recipe from a preset and what a user chose; a choice that is None leaves the preset's.

    Beside a Recipe's own fields: `symmetric` picks the symmetric grid or (False) the method's asymmetric one;
    `clip_search` turns the range search on or off; `error_power` sets the exponent of its error. Asking for outliers
    of a method that has none turns the split on; a fraction of 0 turns it off.
    """
    given = {key: value for key, value in choices.items() if value is not None}
    # What a preset chooses by bit-width it says of whole ones; a grid with another width is among the choices.
    whole = float(given.get("bits", 0.5)).is_integer()
    base = preset(method, **({"bits": given["bits"]} if whole else {}))
    symmetric = given.pop("symmetric", None)
    clip_search = given.pop("clip_search", None)
    error_power = given.pop("error_power", None)
    _refuse_inert(base, given, clip_search, error_power)
    base = _with_curvature(base, given)
    if symmetric is not None:
        if "grid" in given:
            raise FewbitError("give either --grid or --symmetric/--asymmetric, not both")
        asymmetric = base.grid.name if base.grid.grid.offset else "zero-point"
        given["grid"] = "symmetric" if symmetric else asymmetric
    if "grid" in given:
        check_name("grid", given["grid"], [grid.choice for grid in GRIDS.values()])
        chosen = chosen_grid(given["grid"])
        if chosen is not None and not chosen.scales and chosen.offset not in base.scales.kind.offsets:
            given.setdefault("scale_format", "float16")
    if given.get("outlier_fraction") == 0:
        given["outliers"] = "none"
    elif any(key.startswith("outlier_") for key in given) and (
        not base.outliers.wanted or "outliers" in brought_by(given.get("grid"))
    ):
        given.setdefault("outliers", "adaptive-lasso")
    if clip_search is False and error_power is not None:
        raise FewbitError(
            "--error-power applies to the range search, which --no-clip-search turns off: omit one of the two"
        )
    if clip_search is False:
        given["search"] = None
    elif clip_search or error_power is not None:
        search = base.grid.search or ScaleSearch()
        given["search"] = replace(search, error_power=error_power) if error_power is not None else search
    if "sets" in given:
        given["sets"] = sets_of(given["sets"])
    return with_choices(base, given)


def _refuse_inert(base: Recipe, given: dict[str, Any], clip_search: bool | None, error_power: float | None) -> None:
    """FewbitError for choices that a method would silently leave unused."""
    unused: list[str] = []
    if base.grid.grid.block_by_block:
        unused = [key for key in ("grid", "scale_format") if key in given]
        unused += [key for key in given if key.startswith("outlier_")]
        unused += ["clip_search"] if clip_search else []
        unused += ["error_power"] if error_power is not None else []
    elif OUTLIER_RULES[base.outliers.rule].in_columns:
        unused = [key for key in given if key.startswith("outlier_")]
    elif (kind := OUTLIER_GRIDS.get(given.get("outlier_grid", base.outliers.grid))) is not None and kind.apart:
        unused = [key for key in ("outlier_bits",) if key in given]
    if base.curvature is not None and not base.solver.method.compensates:
        unused += [key for key in ("damping", "act_order", "static_groups") if key in given]
    if base.curvature is not None and not base.curvature.source.gradients:
        unused += [key for key in ("fisher_terms", "fisher_labels", "gram_share") if key in given]
    if unused:
        named = ", ".join(f"--{key.replace('_', '-')}" for key in unused)
        raise FewbitError(f"{named}: {base.method} does not use it: omit it")


def _with_curvature(base: Recipe, given: dict[str, Any]) -> Recipe:
    """`base` with the choices that concern the curvature and the solver, which are taken out of `given`."""
    options = ("damping", "act_order", "static_groups", "fisher_terms", "fisher_labels", "gram_share", "tempering")
    named = [f"--{key.replace('_', '-')}" for key in options if key in given]
    if named and base.curvature is None:
        raise FewbitError(f"{', '.join(named)}: applies only to methods with a curvature, and {base.method} has none")
    solver: dict[str, Any] = {key: given.pop(key) for key in ("damping", "act_order") if key in given}
    if "static_groups" in given:
        solver["refit"] = not given.pop("static_groups")
    if solver.get("act_order"):
        solver.setdefault("refit", False)
    curvature = {key: given.pop(f"fisher_{key}") for key in ("terms", "labels") if f"fisher_{key}" in given}
    curvature.update({key: given.pop(key) for key in ("gram_share", "tempering") if key in given})
    if curvature and base.curvature is not None:
        base = replace(base, curvature=replace(base.curvature, **curvature))
    return replace_solver(base, **solver) if solver else base
