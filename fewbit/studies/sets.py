"""Named calibration sets: a default, sets made from nothing, and those that the user gives, each on an axis."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewbit.calibration.choice import CalibrationChoice, choice_from
from fewbit.calibration.source import parse_sources
from fewbit.calibration.tokens import CalibrationSet
from fewbit.checkpoints.json_in import parse_json
from fewbit.checkpoints.source import Checkpoint
from fewbit.errors import FewbitError
from fewbit.pipeline.calibration_tokens import calibration_set

DEFAULT = "default"
MADE = ("mixed", "nonsense", "random-tokens", "self")
"""Sets on the axis quality that need no file; mixed is the default set with nonsense for half of its sequences."""


@dataclass(frozen=True)
class NamedSet:
    """A calibration set by name. axis: quality, content, language, … sources: ``SRC[:COUNT][,SRC...]``."""

    axis: str
    name: str
    sources: str

    def __post_init__(self) -> None:
        if not self.axis or not self.name:
            raise FewbitError(
                f"--set {self.axis}/{self.name}={self.sources}: write AXIS/NAME=SRC, e.g. content/code=my.jsonl"
            )
        if not parse_sources(self.sources):
            raise FewbitError(f"--set {self.axis}/{self.name}=none: a set needs a source")


def parse_set(text: str) -> NamedSet:
    """Read ``AXIS/NAME=SRC[:COUNT][,SRC...]``; FewbitError for anything else."""
    head, equals, sources = text.partition("=")
    axis, slash, name = head.partition("/")
    if not equals or not slash or not sources:
        raise FewbitError(
            f"--set {text}: write AXIS/NAME=SRC, e.g. content/code=my-code.jsonl or language/hindi=hin.txt"
        )
    return NamedSet(axis.strip(), name.strip(), sources.strip())


def read_sets(path: Path) -> list[NamedSet]:
    """Sets of a JSON file ``{"AXIS": {"NAME": "SRC", ...}, ...}``; paths in it are from the current folder."""
    try:
        data = parse_json(path.read_bytes())
        return [NamedSet(str(axis), str(name), str(src)) for axis, sets in data.items() for name, src in sets.items()]
    except (OSError, ValueError, AttributeError) as error:
        raise FewbitError(f'{path}: not a JSON file of the form {{"AXIS": {{"NAME": "SRC"}}}} ({error})') from error


def as_options(sets: Iterable[NamedSet]) -> list[dict[str, str]]:
    """The sets as plain JSON values of a study's options."""
    return [asdict(one) for one in sets]


def all_sets(calibration: CalibrationChoice, made: Sequence[str], given: Sequence[dict[str, str]]) -> list[NamedSet]:
    """The default set, the `made` ones of MADE, and those given as :func:`as_options` returns them.

    A given set takes the place of a made one of its name. Raises FewbitError when a name is there twice.
    """
    theirs = [NamedSet(**one) for one in given]
    names = [one.name for one in theirs]
    twice = next((name for name in names if names.count(name) > 1 or name == DEFAULT), None)
    if twice:
        raise FewbitError(f"--set {twice}: two sets have this name: rename one")
    found = [NamedSet(DEFAULT, DEFAULT, calibration.sources)]
    for name in made:
        sources = _mixed(calibration) if name == "mixed" else name
        if name not in names and sources is not None and sources != calibration.sources:
            found.append(NamedSet("quality", name, sources))
    return found + theirs


def _mixed(calibration: CalibrationChoice) -> str | None:
    """Half default, half nonsense; None where the default's sources have counts, or there is but one sequence."""
    half = calibration.samples // 2
    counted = any(source.count is not None for source in parse_sources(calibration.sources))
    return None if counted or not half else f"{calibration.sources},nonsense:{half}"


def draw_set(
    one: NamedSet, calibration: CalibrationChoice, seed: int, checkpoint: Checkpoint, model: Any
) -> CalibrationSet:
    """The tokens of a set, in as many sequences as the default set has; FewbitError naming it when it has too few."""
    try:
        drawn = {**asdict(calibration), "sources": one.sources, "seed": seed, "samples": None}
        return calibration_set(checkpoint, choice_from(drawn, calibration.samples), model)
    except FewbitError as error:
        raise FewbitError(f"set {one.axis}/{one.name}: {error}") from error
