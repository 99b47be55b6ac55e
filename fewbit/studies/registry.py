"""The studies by name. A study is a module with a constant STUDY, imported when it is asked for."""

import importlib
from pathlib import Path
from typing import Any

from fewbit.calibration.choice import choice_from
from fewbit.errors import FewbitError
from fewbit.evaluation.perplexity import Protocol
from fewbit.studies.choice import SIZES, StudyChoice
from fewbit.studies.study import Study

STUDIES: dict[str, str] = {
    "objectives": "fewbit.studies.objectives",
    "landscape": "fewbit.studies.landscape",
    "outliers": "fewbit.studies.outliers",
    "calibration-sets": "fewbit.studies.calibration_sets",
}


def find_study(name: str) -> Study:
    """The study of that name; FewbitError naming those there are."""
    if name not in STUDIES:
        raise FewbitError(f"unknown study {name!r}: choose from {', '.join(STUDIES)}")
    study: Study = importlib.import_module(STUDIES[name]).STUDY
    return study


def make_choice(study: Study, model: str, out: Path, data: str, given: dict[str, Any]) -> StudyChoice:
    """The choices of a study from what a user gave (None: not given), the rest from its size.

    given: fields of StudyChoice, and `windows`, `sequence_length`, `bos` of the evaluation, `sources`, `samples`,
    `sample_length` of the calibration set. Raises FewbitError for values that cannot be.
    """
    values = {key: value for key, value in given.items() if value is not None}
    size = study.sizes.get(values.get("size", "standard"))
    if size is None:
        raise FewbitError(f"--size must be one of {', '.join(SIZES)}, not {values['size']!r}")
    seed = values.get("seed", 0)
    protocol = Protocol(
        values.pop("sequence_length", size.sequence_length),
        values.pop("windows", size.windows),
        values.pop("bos", "auto"),
    )
    drawn = {name: values.pop(name, None) for name in ("sources", "samples")}
    length = values.pop("sample_length", size.sample_length)
    calibration = choice_from({**drawn, "sequence_length": length, "seed": seed}, size.samples)
    return StudyChoice(study.name, model, out, data, protocol, calibration, **values)
