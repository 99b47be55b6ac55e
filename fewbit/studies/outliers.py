"""The study `outliers`: where activations are large, whom that hurts when they are rounded, and what helps.

After arXiv 2405.20835 (outliers by layer, calibration set and language) and 2402.17762 (massive activations).
"""

import math
from typing import Any

from fewbit.errors import FewbitError
from fewbit.pipeline.layer_fixes import FIXES
from fewbit.studies.choice import StudyChoice
from fewbit.studies.opened import Opened, block_count, cover_model, open_model
from fewbit.studies.outliers_measure import SITES, measure_errors, measure_model, measure_statistics
from fewbit.studies.outliers_page import draw
from fewbit.studies.outliers_summary import summarize
from fewbit.studies.sets import all_sets
from fewbit.studies.study import Cell, Row, Size, Study, Tell

FACTOR = 5.0
_BLOCKS_A_CELL = 5
_PARTS = {"statistics": measure_statistics, "errors": measure_errors, "model": measure_model}
_MADE = ("mixed", "nonsense", "random-tokens", "self")


def cells(choice: StudyChoice) -> list[Cell]:
    """Statistics of every set, errors of the sites of a few blocks at a time, and the whole model rounded."""
    grid = STUDY.sizes[choice.size].grid
    _, coverage = cover_model(choice)
    sets = all_sets(choice.calibration, grid["made"], choice.options.get("sets", ()))
    factor = float(choice.options.get("factor", FACTOR))
    if not 1 < factor < math.inf:
        raise FewbitError(
            f"--factor must be above 1, not {factor:g}: a channel is an outlier if it exceeds the median by this factor"
        )
    fixes = choice.methods or FIXES
    unknown = [fix for fix in fixes if fix not in FIXES]
    if unknown:
        raise FewbitError(f"--methods: no remedy {unknown[0]!r}: choose from {', '.join(FIXES)}")
    bits = list(choice.bits or grid["bits"])
    if not all(2 <= value <= 8 for value in bits):
        raise FewbitError(f"--bits must be from 2 to 8, not {', '.join(map(str, bits))}")
    found: list[Cell] = [
        {"part": "statistics", "set": one.name, "axis": one.axis, "sources": one.sources, "factor": factor}
        for one in sets
    ]
    default = {"set": sets[0].name, "axis": sets[0].axis, "sources": sets[0].sources}
    blocks = chosen_blocks(block_count(coverage), grid["blocks"])
    for first in range(0, len(blocks), _BLOCKS_A_CELL):
        part = blocks[first : first + _BLOCKS_A_CELL]
        asked = ["none", *[fix for fix in fixes if fix != "none"]]
        found.append({"part": "errors", **default, "blocks": part, "bits": bits, "fixes": asked})
    found += [{"part": "model", **default, "sites": where} for where in ("all", *SITES)]
    return found


def chosen_blocks(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` blocks, evenly spread from the first to the last; all of them for 0."""
    if not wanted or wanted >= count:
        return list(range(count))
    return sorted({round(index * (count - 1) / max(wanted - 1, 1)) for index in range(wanted)})


def run_cell(cell: Cell, opened: Opened, tell: Tell) -> list[Row]:
    """The rows of one cell."""
    return _PARTS[cell["part"]](cell, opened, tell)


_GRID: dict[str, Any] = {"made": _MADE, "blocks": 0, "bits": (8, 4, 3)}
STUDY = Study(
    name="outliers",
    title="Outliers in activations",
    about="Where and for which text the inputs of linear layers are large, the cost of rounding them, and remedies.",
    sizes={
        "quick": Size(2, 512, 8, 512, {"made": ("nonsense", "random-tokens"), "blocks": 3, "bits": (8, 4, 3)}),
        "standard": Size(8, 512, 64, 512, _GRID),
        "large": Size(32, 512, 128, 512, _GRID),
    },
    cells=cells,
    run_cell=run_cell,
    summarize=summarize,
    draw=draw,
    open=open_model,
)
