"""Originals with 8-bit weights and inputs in `fewbit eval`: plain W8A8 and SmoothQuant, simulated exactly."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbit.activations.choice import NAMED, ActivationChoice
from fewbit.calibration.choice import CalibrationChoice, choice_from
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import open_checkpoint
from fewbit.errors import FewbitError
from fewbit.evaluation.score import Original, score
from fewbit.memory import peak_rss_bytes
from fewbit.pipeline.calibration_options import flags
from fewbit.pipeline.calibration_tokens import calibration_set
from fewbit.pipeline.network import open_original
from fewbit.pipeline.w8a8 import rounding_inputs


@dataclass(frozen=True)
class RoundedChoice:
    """Which roundings of inputs to evaluate.

    names: keys of :data:`fewbit.activations.choice.NAMED`. calibration: the set for static ranges and smoothing.
    """

    names: tuple[str, ...]
    calibration: CalibrationChoice = field(default_factory=CalibrationChoice)

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in NAMED]
        if unknown or not self.names:
            raise FewbitError(
                f"--w8a8 must be one or more of {', '.join(NAMED)}, not {', '.join(unknown) or 'nothing'}"
            )

    @property
    def calibrated(self) -> bool:
        """Whether any of them needs a calibration set."""
        return any(NAMED[name].calibrated for name in self.names)

    @property
    def choices(self) -> dict[str, ActivationChoice]:
        """The requested choices by name."""
        return {name: NAMED[name] for name in self.names}


def choose_rounded(names: str | None, text: dict[str, Any]) -> RoundedChoice | None:
    """The choice of `--w8a8 A,B` with the options of the calibration set (None if not given); None without `--w8a8`.

    Raises FewbitError for options that would not be used.
    """
    given = {key: value for key, value in text.items() if value is not None}
    wanted = tuple(name.strip() for name in (names or "").split(",") if name.strip())
    rounded = RoundedChoice(wanted, choice_from(given)) if names is not None else None
    if given and (rounded is None or not rounded.calibrated):
        raise FewbitError(f"{flags(given)}: only --w8a8 w8a8 and smoothquant use a calibration set: omit these options")
    return rounded


@dataclass(frozen=True)
class Scoring:
    """How rows are scored: windows `(windows, tokens)`, the original's predictions, dtype and device for loading.

    step(name) is called after each window, say(what) while inputs are measured.
    """

    windows: Tensor
    original: Original | None
    dtype: Any
    device: str | None
    step: Callable[[str], None]
    say: Callable[[str], None]


def is_original(name: str | Path) -> bool:
    """Whether a model is in 16 bits, so that its weights and inputs can be rounded."""
    return open_checkpoint(locate(name)).quantization is None


def _say(scoring: Scoring, name: str, done: int, total: int) -> None:
    scoring.say(f"{name}: inputs of sequence {done} of {total}")


def score_rounded(name: str | Path, rounded: RoundedChoice, scoring: Scoring) -> list[dict[str, Any]]:
    """One row for each choice: the loss of an original model whose linear layers round weights and inputs."""
    started = time.perf_counter()
    checkpoint, network = open_original(name, scoring.device, dtype=scoring.dtype)
    drawn = None
    if rounded.calibrated:
        what = f"{name}: the calibration set"
        drawn = calibration_set(checkpoint, rounded.calibration, network.model, lambda *_: scoring.say(what))
    rows = []
    for label, choice in rounded.choices.items():
        full = f"{name} {label}"
        ids = drawn.ids if drawn is not None else None
        with rounding_inputs(network, choice, ids, partial(_say, scoring, full)) as simulation:
            row = {"name": full, "method": label, "bits_per_weight": simulation.bits_per_weight}
            row |= score(network.model, scoring.windows, scoring.original, full, scoring.step)
        if drawn is not None and choice.calibrated:
            row["calibration"] = drawn.describe()
        row["dtype"] = str(network.model.dtype).removeprefix("torch.")
        row |= {"seconds": time.perf_counter() - started, "peak_rss_bytes": peak_rss_bytes()}
        rows.append(row)
        started = time.perf_counter()
    return rows
