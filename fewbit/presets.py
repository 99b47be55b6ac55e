"""The presets: published methods and our own, as rows of data with the choices that differ from a plain recipe.

Keys are those of :data:`fewbit.recipe.FIELDS`.
"""

import hashlib
from typing import Any

from fewbit.curvature.choice import BEST_GRAM_SHARE, CurvatureChoice
from fewbit.grids.grid import ScaleSearch
from fewbit.solvers.choice import SolverChoice

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
    "awq": {"group_size": "128,64,auto", "transform": "awq", "curvature": CurvatureChoice("gram")},
    "w8a8": {"bits": 8, "group_size": "row", "grid": "symmetric", "input_bits": 8},
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
PRESETS["smoothquant"] = {**PRESETS["w8a8"], "transform": "smoothquant", "curvature": CurvatureChoice("gram")}
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


def row_of(method: str, bits: float) -> dict[str, Any]:
    """The choices of a method at a bit-width."""
    row = dict(PRESETS[method])
    rows = ((bits >= 5, PRESETS_FROM_5_BITS), (bits == 2, PRESETS_AT_2_BITS), (bits == 1, PRESETS_AT_1_BIT))
    for holds, others in rows:
        if holds:
            row.update(others.get(method, {}))
    return row


def fingerprint() -> str:
    """SHA-256 of all presets, to detect results that were made with other defaults."""
    rows = repr((PRESETS, PRESETS_FROM_5_BITS, PRESETS_AT_2_BITS, PRESETS_AT_1_BIT))
    return hashlib.sha256(rows.encode()).hexdigest()
