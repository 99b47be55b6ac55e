"""Originals with 8-bit weights and inputs in `fewbit eval`: plain W8A8 and SmoothQuant, simulated exactly."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbit.activations.choice import NAMED, ActivationChoice
from fewbit.calibration.choice import CalibrationChoice
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import open_checkpoint
from fewbit.errors import FewbitError
from fewbit.evaluation.score import Original, score
from fewbit.memory import peak_rss_bytes
from fewbit.pipeline.calibrated import calibration_set, open_network
from fewbit.pipeline.plan import make_plan
from fewbit.pipeline.w8a8 import rounding_inputs
from fewbit.recipe import Recipe


@dataclass(frozen=True)
class RoundedChoice:
    """names: of :data:`fewbit.activations.choice.NAMED`. calibration: for static ranges and smoothing."""

    names: tuple[str, ...]
    calibration: CalibrationChoice = field(default_factory=CalibrationChoice)

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in NAMED]
        if unknown or not self.names:
            raise FewbitError(f"--w8a8 must be of {', '.join(NAMED)}, not {', '.join(unknown) or 'nothing'}")

    @property
    def choices(self) -> dict[str, ActivationChoice]:
        """What is asked for, by name."""
        return {name: NAMED[name] for name in self.names}


def choose_rounded(names: str | None, text: dict[str, Any]) -> RoundedChoice | None:
    """The choice behind `--w8a8 A,B` with the options of the calibration set (None where not given); None without it.

    Raises FewbitError for options that would go unused.
    """
    given = {key: value for key, value in text.items() if value is not None}
    if names is None:
        if given:
            options = ", ".join(f"--{ {'sources': 'calibration'}.get(k, k).replace('_', '-') }" for k in given)
            raise FewbitError(f"{options}: belongs to --w8a8")
        return None
    wanted = tuple(name.strip() for name in names.split(",") if name.strip())
    return RoundedChoice(wanted, CalibrationChoice(**given))


def score_rounded(
    name: str | Path,
    rounded: RoundedChoice,
    windows: Tensor,
    original: Original | None,
    device: str | None,
    step: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row for each choice: the loss of an original whose linear layers round weights and inputs on `windows`.

    Raises FewbitError for a folder that is quantized already.
    """
    checkpoint = open_checkpoint(locate(name))
    if checkpoint.quantization is not None:
        raise FewbitError(f"{name}: --w8a8 rounds an original's weights and inputs, this one is quantized already")
    plan = make_plan(checkpoint, Recipe(group_size="row"), 1 << 62)
    network = open_network(checkpoint, plan, device or "cpu")
    calibrated = any(choice.calibrated for choice in rounded.choices.values())
    drawn = calibration_set(checkpoint, rounded.calibration, network.model, None) if calibrated else None
    rows = []
    for label, choice in rounded.choices.items():
        started = time.perf_counter()
        with rounding_inputs(network, choice, drawn.ids if drawn is not None else None) as simulation:
            row = {"name": f"{name} {label}", "method": label, "bits_per_weight": simulation.bits_per_weight}
            row |= score(network.model, windows, original, f"{name} {label}", step)
        if drawn is not None and choice.calibrated:
            row["calibration"] = drawn.describe()
        row["dtype"] = str(network.model.dtype).removeprefix("torch.")
        row |= {"seconds": time.perf_counter() - started, "peak_rss_bytes": peak_rss_bytes()}
        rows.append(row)
    return rows
