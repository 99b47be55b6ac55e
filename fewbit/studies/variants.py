"""The quantized models of a study: methods x bit-widths x group sizes, made from curvature that is measured once."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import open_checkpoint
from fewbit.curvature.choice import CurvatureChoice
from fewbit.curvature.store import open_curvature
from fewbit.errors import FewbitError
from fewbit.grids.embeddings import KEPT
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.measure_curvature import measure
from fewbit.pipeline.run import RunOptions, quantize
from fewbit.presets import PRESETS
from fewbit.recipe import Recipe, preset
from fewbit.studies.choice import StudyChoice
from fewbit.studies.study import Cell, Progress

GRAM, FISHER = CurvatureChoice("gram"), CurvatureChoice("fisher", terms="token")
"""Inputs of the original, and its output Fisher without terms between tokens."""

_ONE_BIT = ("billm", "oac+billm")


@dataclass(frozen=True)
class Variant:
    """A preset at a bit-width; group_size None for the preset's own."""

    method: str
    bits: int
    group_size: str | None = None

    @property
    def name(self) -> str:
        """Also the name of its folder."""
        group = f"-g{self.group_size.split(',')[0]}" if self.group_size else ""
        return f"{self.method}-{self.bits}bit{group}"

    @property
    def recipe(self) -> Recipe:
        """The recipe, which keeps embeddings and heads; FewbitError for a method or bit-width that does not exist."""
        group = {"group_size": self.group_size} if self.group_size else {}
        return preset(self.method, bits=self.bits, embedding_bits=KEPT, **group)

    def cell(self) -> Cell:
        """As plain JSON."""
        return {"method": self.method, "bits": self.bits, "group_size": self.group_size}


def variants(methods: Sequence[str], bits: Sequence[int], group_sizes: Sequence[str | None]) -> list[Variant]:
    """All combinations; methods of one bit come once. Raises FewbitError for one that cannot be."""
    found: list[Variant] = []
    for method in methods:
        if method not in PRESETS:
            raise FewbitError(f"unknown method {method!r}: choose from {', '.join(PRESETS)}")
        for width in bits if method not in _ONE_BIT else (1,):
            for group_size in group_sizes if method not in _ONE_BIT else (None,):
                variant = Variant(method, width, group_size)
                if variant.recipe.grid.group_size != preset(method, bits=width).grid.group_size or group_size is None:
                    found.append(variant)
    return found


def measure_once(
    choice: StudyChoice, wanted: Sequence[Variant], progress: Progress | None, also: Sequence[CurvatureChoice] = ()
) -> None:
    """Measure in `choice.work` every curvature that the variants need, and those of `also`, on the calibration set."""
    needed = [*also, *(variant.recipe.curvature for variant in wanted if variant.recipe.curvature)]
    for curvature in dict.fromkeys(needed):
        folder = curvature_folder(choice, curvature)
        if not is_measured(folder, choice):
            options = CalibrationOptions(choice.calibration)
            measure(choice.model, folder, curvature, options, choice.device, progress)


def is_measured(folder: Path, choice: StudyChoice) -> bool:
    """Whether a curvature of the model is there, whole."""
    try:
        open_curvature(folder, open_checkpoint(locate(choice.model)))
    except FewbitError:
        return False
    return True


def curvature_folder(choice: StudyChoice, curvature: CurvatureChoice) -> Path:
    """Where a curvature of the calibration set is kept while a study runs."""
    mixed = f"-gram-{curvature.gram_share:g}" if curvature.gram_share else ""
    return choice.work / f"curvature-{curvature.kind}{mixed}"


def make_variant(variant: Variant, choice: StudyChoice) -> tuple[Path, dict[str, Any]]:
    """Quantize in `choice.work`; returns the folder and its report. One that is there is taken as it is."""
    out = choice.work / variant.name
    report = out / "fewbit_report.json"
    recipe = variant.recipe
    if not report.is_file():
        stored = None
        if recipe.curvature is not None:
            checkpoint = open_checkpoint(locate(choice.model))
            stored = open_curvature(curvature_folder(choice, recipe.curvature), checkpoint)
        # Weights that fall back to rounding are counted in the result; they do not end a study.
        calibration = CalibrationOptions(choice.calibration, stored=stored, max_fallback=1 << 30)
        quantize(choice.model, out, recipe, RunOptions(device=choice.device, calibration=calibration))
    return out, json.loads(report.read_text(encoding="utf-8"))


def drop_variant(variant: Variant, choice: StudyChoice) -> None:
    """Remove a folder that :func:`make_variant` made."""
    shutil.rmtree(choice.work / variant.name, ignore_errors=True)
