"""Recipes: one choice per axis. A published method is a row of the table PRESETS, not a class."""

import hashlib
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fewbit.curvature.choice import BEST_GRAM_SHARE, CurvatureChoice
from fewbit.errors import FewbitError
from fewbit.grids.codebook import ScaleSearch, normal_float
from fewbit.solvers.choice import SolverChoice

CHOICES: dict[str, tuple[str, ...]] = {
    "grid": ("zero-point", "symmetric", "minimum", "real-zero", "normal-float", "binary"),
    "scale_format": ("float16", "float32", "two-level", "statistics"),
    "outliers": ("none", "adaptive-lasso", "sensitivity"),
    "outlier_scope": ("tensor", "group"),
    "outlier_grid": ("minmax", "sign-magnitude", "row", "float16"),
    "column_weights": ("none", "norm-gain"),
    "channel_scales": ("none", "awq"),
}
MIN_BITS, MAX_BITS = 1, 8


@dataclass(frozen=True)
class Recipe:
    """How weights are quantized.

    method: the preset this began as. bits: 2 to 8, or 1 for the binary and normal-float grids.
    group_size: "auto" (the largest divisor of a layer's columns up to 128), "row", a number, or several separated
    by commas, of which the first that divides a layer's columns is taken ("64,auto").
    grid: zero-point (integer zero-point, 0 always a level), symmetric, minimum (real-valued minimum, as AdpQ
    publishes it), normal-float (non-uniform codebook with a signed scale).
    real-zero: a real-valued zero-point stored in few bits, as SpQR publishes it. binary: BiLLM's signs and split.
    scale_format: float16, float32, two-level (7 bits a group, 16 a row) or statistics (`statistic_bits` for a scale and
    as many for a zero-point, with a second level of 64 bits for `statistic_rows` rows).
    outliers: none, adaptive-lasso, or sensitivity (found by the column solver: what costs more than `sensitivity`
    times the mean variance over U_jj^2). outlier_fraction: at most this share of the weights (in
    group scope rounded to a whole number in each group, at least one). outlier_scope: the
    quantile is taken over the whole tensor, or each group has equally many. outlier_grid: minmax or
    sign-magnitude (a grid a group), row (a linear scale a row) or float16 (16 bits each). outlier_bits: 0 for as many
    as `bits`.
    search: which ranges to try for each group by least error; None for plain min-max.
    column_weights: norm-gain weighs squared errors by the squared gain of the norm before the layer.
    channel_scales: awq rounds channels with large inputs more finely, folding their scales into what feeds them.
    curvature: what an error costs, measured on calibration text; None for methods without data.
    solver: how codes are chosen.
    """

    method: str = "rtn"
    bits: int = 4
    group_size: str = "auto"
    grid: str = "zero-point"
    scale_format: str = "float16"
    outliers: str = "none"
    outlier_fraction: float = 0.05
    outlier_scope: str = "tensor"
    outlier_grid: str = "minmax"
    outlier_bits: int = 0
    sensitivity: float = 0.2
    statistic_bits: int = 3
    statistic_rows: int = 16
    search: ScaleSearch | None = None
    column_weights: str = "none"
    channel_scales: str = "none"
    curvature: CurvatureChoice | None = None
    solver: SolverChoice = field(default_factory=SolverChoice)
    include: tuple[str, ...] = field(default=())
    exclude: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise FewbitError(f"bits must be a whole number from 1 to {MAX_BITS}, not {self.bits}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise FewbitError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        check_group_size(self.group_size)
        if not 0 <= self.outlier_fraction < 0.5:
            raise FewbitError(f"outlier_fraction must be from 0 to below 0.5, not {self.outlier_fraction}")
        if self.grid == "binary" and self.bits != 1:
            raise FewbitError(f"the binary grid has 1 bit, not {self.bits}: leave --bits out")
        if self.bits == 1 and self.grid not in ("binary", "normal-float") and self.method in _of_one_bit():
            raise FewbitError(
                f"1 bit of {self.method} has the normal-float grid alone: leave --grid and --symmetric out"
            )
        if self.bits == 1 and self.grid not in ("binary", "normal-float"):
            raise FewbitError(
                f"1 bit goes with the methods {', '.join(_of_one_bit())}: --method {self.method} has 2 to 8"
            )
        if self.grid == "binary" and not self.solver.refit:
            raise FewbitError("the binary grid is fitted block by block: no act-order, no static groups")
        if self.solver.refit and self.grid == "normal-float":
            raise FewbitError("a normal-float grid is chosen before the solver: --static-groups")
        if self.curvature is not None and self.column_weights != "none":
            raise FewbitError("column_weights stand in for a curvature: this method measures one")
        if self.grid == "binary" and (self.outliers != "none" or self.solver.kind != "column"):
            raise FewbitError("the binary grid goes with the column solver and has salient columns for outliers")
        if (self.grid == "real-zero") != (self.scale_format == "statistics"):
            raise FewbitError("the grid real-zero and the scale format statistics go together")
        if not 1 <= self.statistic_bits <= 8 or self.statistic_rows < 1:
            raise FewbitError("statistics need 1 to 8 bits and blocks of at least 1 row")
        if self.outliers == "sensitivity" and (self.solver.kind != "column" or self.outlier_grid != "float16"):
            raise FewbitError("outliers by sensitivity are found by the column solver and kept in float16")
        if self.outliers == "adaptive-lasso" and not self.outlier_fraction:
            raise FewbitError("outlier_fraction 0 finds none: outliers none")
        if self.sensitivity <= 0:
            raise FewbitError(f"sensitivity must be above 0, not {self.sensitivity}")
        if self.outlier_bits and not self.bits <= self.outlier_bits <= MAX_BITS:
            raise FewbitError(f"outlier_bits must be 0 or from bits ({self.bits}) to 8, not {self.outlier_bits}")
        if self.outliers != "none" and self.outlier_grid == "row" and (self.outlier_bits or self.bits) < 2:
            raise FewbitError("outliers on a scale of their row need 2 bits or more: --outlier-bits")
        if self.search is not None and not 0 < self.search.error_power <= 16:
            raise FewbitError(f"error_power must be above 0 and at most 16, not {self.search.error_power}")
        if self.column_weights != "none" and self.search is None:
            raise FewbitError("column_weights weigh the errors of the range search: turn it on with --clip-search")
        if self.channel_scales != "none" and (self.curvature is None or self.curvature.kind != "gram"):
            raise FewbitError("channel scales are found with the input Gram: curvature gram")
        if self.solver.kind == "column" and self.curvature is None:
            raise FewbitError("the column solver needs a curvature: gram or fisher")
        if self.solver.refit and self.scale_format == "two-level":
            raise FewbitError("two-level scales join all groups of a row: grids cannot be refitted one by one")
        if self.outliers == "sensitivity" and self.solver.act_order:
            raise FewbitError("outliers by sensitivity shape the grid of a group when it is entered: no act-order")
        if self.scale_format == "two-level" and self.grid in ("zero-point", "minimum"):
            raise FewbitError("scale_format two-level goes with the symmetric and normal-float grids")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; :meth:`from_dict` is the inverse."""
        data = asdict(self)
        return {**data, "include": list(self.include), "exclude": list(self.exclude)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Recipe":
        """A recipe from :meth:`to_dict`'s values; FewbitError for an unknown key."""
        unknown = set(data) - set(cls.__dataclass_fields__)
        if unknown:
            raise FewbitError(f"unknown recipe keys: {', '.join(sorted(unknown))}")
        search, curvature = data.get("search"), data.get("curvature")
        return cls(
            **{
                **data,
                "search": ScaleSearch(**search) if search else None,
                "curvature": CurvatureChoice(**curvature) if curvature else None,
                "solver": SolverChoice(**data.get("solver", {})),
                "include": tuple(data.get("include", ())),
                "exclude": tuple(data.get("exclude", ())),
            }
        )

    def levels(self) -> tuple[float, ...]:
        """The codebook of the grid; empty for the evenly spaced ones."""
        return normal_float(self.bits) if self.grid == "normal-float" else ()


_OUTPUT = CurvatureChoice("fisher", terms="token", gram_share=BEST_GRAM_SHARE)
PRESETS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "adpq": {"group_size": "128,64,auto", "grid": "minimum", "outliers": "adaptive-lasso"},
    "adpq+": {
        "group_size": "64,auto",
        "grid": "normal-float",
        "scale_format": "two-level",
        "outliers": "adaptive-lasso",
        "outlier_fraction": 1 / 32,
        "outlier_scope": "group",
        "outlier_grid": "row",
        "outlier_bits": 8,
        "search": ScaleSearch(error_power=2.5),
    },
    "gptq": {
        "group_size": "128,64,auto",
        "curvature": CurvatureChoice("gram"),
        "solver": SolverChoice("column", act_order=True),
    },
    "spqr": {
        "group_size": "16,auto",
        "grid": "real-zero",
        "scale_format": "statistics",
        "outliers": "sensitivity",
        "outlier_grid": "float16",
        "curvature": CurvatureChoice("gram"),
        "solver": SolverChoice("column", damping=1.0, refit=True),
    },
    "awq": {"group_size": "128,64,auto", "channel_scales": "awq", "curvature": CurvatureChoice("gram")},
    "billm": {
        "bits": 1,
        "group_size": "128,192,auto",
        "grid": "binary",
        "curvature": CurvatureChoice("gram"),
        "solver": SolverChoice("column", refit=True),
    },
    "oac": {
        "group_size": "64,auto",
        "curvature": _OUTPUT,
        "search": ScaleSearch(),
        "solver": SolverChoice("column", damping=0.1, act_order=True, importance="inverse"),
    },
    "precal+oac": {
        "group_size": "64,auto",
        "grid": "normal-float",
        "scale_format": "two-level",
        "outliers": "adaptive-lasso",
        "outlier_fraction": 1 / 128,
        "outlier_grid": "row",
        "outlier_bits": 8,
        "search": ScaleSearch(),
        "curvature": _OUTPUT,
        "solver": SolverChoice("column", damping=0.1, act_order=True, importance="inverse"),
    },
}
_LASSO = {"outliers": "adaptive-lasso"}
PRESETS["precal+gptq"] = {
    **PRESETS["adpq"],
    "curvature": PRESETS["gptq"]["curvature"],
    "solver": PRESETS["gptq"]["solver"],
}
PRESETS["precal+spqr"] = {**PRESETS["spqr"], **_LASSO, "outlier_fraction": 0.01}
PRESETS["oac+spqr"] = {**PRESETS["spqr"], "curvature": _OUTPUT}
PRESETS["oac+billm"] = {**PRESETS["billm"], "curvature": CurvatureChoice("fisher", terms="token")}
"""Published methods (and our own) as choices that differ from a plain Recipe. Sources: `docs/methods.md`."""

PRESETS_FROM_5_BITS: dict[str, dict[str, Any]] = {
    **{name: {"grid": "symmetric"} for name in ("adpq+", "precal+oac")},
    **{name: {"statistic_bits": 8} for name in ("spqr", "precal+spqr", "oac+spqr")},
}
"""What a preset does otherwise from 5 bits on: with many levels an even spacing has less error than normal quantiles
(compare `fewbit quantize MODEL --report-only --bits 6 --json` with and without `--grid normal-float`); statistics of
3 bits would lose more than the codes do."""


PRESETS_AT_1_BIT: dict[str, dict[str, Any]] = {
    "adpq+": {"search": ScaleSearch(smallest=0.1, error_power=2.5)},
    "precal+oac": {"search": ScaleSearch(smallest=0.1)},
}
"""What a preset does otherwise at 1 bit: of two levels the best scale is near the mean magnitude."""


PRESETS_AT_2_BITS: dict[str, dict[str, Any]] = {name: {"sensitivity": 1.0} for name in ("spqr", "oac+spqr")}
"""What a preset does otherwise at 2 bits: with four levels the usual threshold makes a fifth of all weights outliers,
the published 2-bit settings have none; this one takes about 1 % (`benchmarks/calibrated_quality.py`)."""


def preset(method: str, **choices: Any) -> Recipe:
    """The recipe of a named method with some choices replaced; FewbitError for an unknown name."""
    if method not in PRESETS:
        raise FewbitError(f"unknown method {method!r}: there are {', '.join(PRESETS)}")
    row = dict(PRESETS[method])
    bits = choices.get("bits", Recipe.bits)
    if isinstance(bits, int) and bits >= 5:
        row.update(PRESETS_FROM_5_BITS.get(method, {}))
    if bits in (1, 2):
        row.update((PRESETS_AT_1_BIT if bits == 1 else PRESETS_AT_2_BITS).get(method, {}))
    return Recipe(**{"method": method, **row, **choices})


def _of_one_bit() -> list[str]:
    return [name for name, row in PRESETS.items() if row.get("grid") in ("binary", "normal-float")]


def fingerprint() -> str:
    """SHA-256 of all presets, to tell results of other defaults apart."""
    rows = repr((PRESETS, PRESETS_FROM_5_BITS, PRESETS_AT_2_BITS, PRESETS_AT_1_BIT))
    return hashlib.sha256(rows.encode()).hexdigest()


def replace_solver(recipe: Recipe, **choices: Any) -> Recipe:
    """The recipe with some choices of its solver replaced."""
    return replace(recipe, solver=replace(recipe.solver, **choices))


def check_group_size(text: str) -> None:
    """FewbitError unless `text` is a comma-separated list of auto, row and positive numbers."""
    for choice in str(text).split(","):
        if choice not in ("auto", "row") and not (choice.isdecimal() and int(choice) > 0):
            raise FewbitError(f"group size must be a number, auto, row, or several (64,auto), not {text!r}")


def group_size_for(columns: int, choices: str) -> int | None:
    """The group size of a layer with `columns` columns, or None if no choice divides them."""
    for choice in choices.split(","):
        if choice == "row":
            return columns
        if choice == "auto":
            return max(size for size in range(1, min(128, columns) + 1) if columns % size == 0)
        if columns % int(choice) == 0:
            return int(choice)
    return None


def recipe_from_choices(method: str, choices: dict[str, Any]) -> Recipe:
    """A recipe from a preset and what a user chose; a choice that is None leaves the preset's.

    Beside a Recipe's own fields: `symmetric` picks the symmetric grid or (False) the method's asymmetric one;
    `clip_search` turns the range search on or off; `error_power` sets the exponent of its error. Asking for outliers
    of a method that has none turns the split on; a fraction of 0 turns it off.
    """
    given = {key: value for key, value in choices.items() if value is not None}
    base = preset(method, **({"bits": given["bits"]} if "bits" in given else {}))
    symmetric = given.pop("symmetric", None)
    clip_search = given.pop("clip_search", None)
    error_power = given.pop("error_power", None)
    _refuse_inert(base, given, clip_search, error_power)
    base = _with_curvature(base, given)
    if symmetric is not None:
        if "grid" in given:
            raise FewbitError("give either --grid or --symmetric/--asymmetric, not both")
        asymmetric = base.grid if base.grid in ("zero-point", "minimum") else "zero-point"
        given["grid"] = "symmetric" if symmetric else asymmetric
    if given.get("grid") in ("zero-point", "minimum") and base.scale_format == "two-level":
        given.setdefault("scale_format", "float16")
    if given.get("outlier_fraction") == 0:
        given["outliers"] = "none"
    elif any(key.startswith("outlier_") for key in given) and base.outliers == "none":
        given.setdefault("outliers", "adaptive-lasso")
    if clip_search is False and error_power is not None:
        raise FewbitError("--error-power belongs to the search that --no-clip-search turns off")
    if clip_search is False:
        given["search"] = None
    elif clip_search or error_power is not None:
        search = base.search or ScaleSearch()
        given["search"] = replace(search, error_power=error_power) if error_power is not None else search
    return replace(base, **given)


def _refuse_inert(base: Recipe, given: dict[str, Any], clip_search: bool | None, error_power: float | None) -> None:
    """FewbitError for choices that a method would silently leave unused."""
    unused: list[str] = []
    if base.grid == "binary":
        unused = [key for key in ("grid", "scale_format") if key in given]
        unused += [key for key in given if key.startswith("outlier_")]
        unused += ["clip_search"] if clip_search else []
        unused += ["error_power"] if error_power is not None else []
    elif base.outliers == "sensitivity":
        unused = [key for key in given if key.startswith("outlier_")]
    elif given.get("outlier_grid", base.outlier_grid) == "float16":
        unused = [key for key in ("outlier_bits",) if key in given]
    if base.solver.kind == "round" and base.curvature is not None:
        unused += [key for key in ("damping", "act_order", "static_groups") if key in given]
    if base.curvature is not None and base.curvature.kind != "fisher":
        unused += [key for key in ("fisher_terms", "fisher_labels", "gram_share") if key in given]
    if unused:
        named = ", ".join(f"--{key.replace('_', '-')}" for key in unused)
        raise FewbitError(f"{named}: {base.method} has no use for it")


def _with_curvature(base: Recipe, given: dict[str, Any]) -> Recipe:
    """`base` with the choices that concern the curvature and the solver, which are taken out of `given`."""
    options = ("damping", "act_order", "static_groups", "fisher_terms", "fisher_labels", "gram_share", "tempering")
    named = [f"--{key.replace('_', '-')}" for key in options if key in given]
    if named and base.curvature is None:
        raise FewbitError(f"{', '.join(named)}: belongs to methods with a curvature, {base.method} has none")
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
