"""The study `calibration-sets`: how much does it matter what a method is calibrated on?

After arXiv 2405.20835, with what it lacks: the spread over seeds alone, and a test of equivalence.
"""

from dataclasses import asdict
from typing import Any

from fewbit.curvature.choice import CurvatureChoice
from fewbit.errors import FewbitError
from fewbit.grids.embeddings import KEPT
from fewbit.pipeline.plan import make_plan
from fewbit.presets import PRESETS
from fewbit.recipe import Recipe, preset
from fewbit.studies.calibration_sets_measure import (
    INPUTS,
    OpenedSets,
    asked_tasks,
    draw_sets,
    measure_original,
    measure_set,
    open_sets,
)
from fewbit.studies.calibration_sets_page import draw
from fewbit.studies.calibration_sets_summary import ALPHA, MARGIN, summarize
from fewbit.studies.choice import StudyChoice
from fewbit.studies.opened import cover_model
from fewbit.studies.sets import NamedSet, all_sets
from fewbit.studies.study import Cell, Progress, Row, Size, Study, Tell

ALL_METHODS = ("gptq", "awq", "spqr", "oac", "smoothquant", "w8a8")
_BITS = 4


def cells(choice: StudyChoice) -> list[Cell]:
    """The original, and for every set and seed a cell for each measurement: Gram, Fisher, activations."""
    grid = STUDY.sizes[choice.size].grid
    methods = choice.methods or grid["methods"]
    groups = grouped(methods, choice.bits or (_BITS,))
    checkpoint, _ = cover_model(choice)
    for group in groups:
        for method, bits in group["methods"]:
            if method not in INPUTS:
                make_plan(checkpoint, recipe_of(method, bits))
    _check_test(choice)
    asked_tasks(choice)
    seeds = choice.options.get("seeds", list(grid["seeds"]))
    if len(seeds) != 2 or min(seeds) < 1:
        raise FewbitError(
            "--seeds must be A,B: the number of seeds of the default set and of each other set, at least 1"
        )
    found: list[Cell] = [{"part": "original"}]
    for index, one in enumerate(all_sets(choice.calibration, grid["made"], choice.options.get("sets", ()))):
        for seed in range(seeds[0] if index == 0 else seeds[1]):
            where = {"set": one.name, "axis": one.axis, "sources": one.sources, "seed": choice.seed + seed}
            found += [{"part": "set", **where, **group} for group in groups]
    return found


def grouped(methods: tuple[str, ...], widths: tuple[int, ...]) -> list[dict[str, Any]]:
    """The methods by what they measure on a set: ``{"measures": gram, fisher or inputs, "curvature", "methods"}``."""
    groups: dict[CurvatureChoice | None, list[list[Any]]] = {}
    for method in methods:
        if method in INPUTS:
            groups.setdefault(None, []).append([method, 8])
            continue
        if method not in PRESETS or PRESETS[method].get("curvature") is None:
            known = [name for name, row in PRESETS.items() if row.get("curvature") is not None]
            raise FewbitError(
                f"--methods: {method!r} is not a calibrated method: choose from {', '.join([*known, *INPUTS])}"
            )
        for bits in (1,) if "billm" in method else widths:
            curvature = recipe_of(method, bits).curvature
            entry = groups.setdefault(curvature, [])
            if [method, bits] not in entry:
                entry.append([method, bits])
    return [
        {"measures": one.kind if one else "inputs", "curvature": asdict(one) if one else None, "methods": entry}
        for one, entry in groups.items()
    ]


def recipe_of(method: str, bits: int) -> Recipe:
    """The preset of a method. Embeddings and heads are kept: a study of the layers is not about them."""
    return preset(method, bits=bits, embedding_bits=KEPT)


def _check_test(choice: StudyChoice) -> None:
    margin, alpha = choice.options.get("margin", MARGIN), choice.options.get("alpha", ALPHA)
    if not 0 < margin < 1 or not 0 < alpha < 0.5:
        raise FewbitError(
            f"--margin must be from 0 to 1 (0.02: 2 % of perplexity) and --alpha from 0 to 0.5, not {margin} and "
            f"{alpha}"
        )
    if choice.protocol.windows == 1:
        raise FewbitError("--windows 1: the test pairs windows, so it needs at least 2")


def run_cell(cell: Cell, opened: OpenedSets, tell: Tell) -> list[Row]:
    """The rows of one cell."""
    return measure_original(opened, tell) if cell["part"] == "original" else measure_set(cell, opened, tell)


def prepare(choice: StudyChoice, progress: Progress | None) -> None:
    """Draw all sets first, so that one with too little text is found before hours of work."""
    wanted = [
        (NamedSet(cell["axis"], cell["set"], cell["sources"]), cell["seed"])
        for cell in cells(choice)
        if cell["part"] == "set"
    ]
    draw_sets(choice, list(dict.fromkeys(wanted)), progress)


_QUICK = {"made": ("nonsense", "random-tokens"), "methods": ("gptq", "smoothquant", "w8a8"), "seeds": (2, 1)}
_STANDARD = {"made": ("mixed", "nonsense", "random-tokens", "self"), "methods": ALL_METHODS, "seeds": (3, 2)}
STUDY = Study(
    name="calibration-sets",
    title="Calibration sets",
    about="How much the choice of calibration set matters, compared with the choice of the seed.",
    sizes={
        "quick": Size(8, 1024, 16, 512, _QUICK),
        "standard": Size(16, 1024, 64, 512, _STANDARD),
        "large": Size(64, 1024, 128, 512, {**_STANDARD, "seeds": (5, 5)}),
    },
    cells=cells,
    run_cell=run_cell,
    summarize=summarize,
    draw=draw,
    open=open_sets,
    prepare=prepare,
)
