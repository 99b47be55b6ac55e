"""What a calibrated run needs beside its recipe."""

from dataclasses import asdict, dataclass, field
from typing import Any

from fewbit.calibration.choice import CalibrationChoice
from fewbit.curvature.store import StoredCurvature
from fewbit.errors import FewbitError
from fewbit.memory import available_bytes


@dataclass(frozen=True)
class CalibrationOptions:
    """What a calibrated run needs beside its recipe.

    choice: the calibration set. stored: a measured curvature to use instead. refresh: for the Fisher, 0 to measure all
    blocks once, else how many blocks are measured at a time, with those before already quantized. original_inputs:
    the Gram of a block is taken from the original's inputs, not from those that the quantized blocks give.
    memory_bytes: for hidden states and curvature; 0 for half of what is free. max_fallback: weights that may fall
    back to rounding.
    """

    choice: CalibrationChoice = field(default_factory=CalibrationChoice)
    stored: StoredCurvature | None = None
    refresh: int = 0
    original_inputs: bool = False
    memory_bytes: int = 0
    max_fallback: int = 0

    def __post_init__(self) -> None:
        if self.refresh < 0 or self.max_fallback < 0 or self.memory_bytes < 0:
            raise FewbitError("--refresh, --max-fallback and --memory cannot be negative")

    @property
    def memory(self) -> int:
        """Bytes that hidden states and curvature may take."""
        return self.memory_bytes or available_bytes() // 2

    def describe(self) -> dict[str, Any]:
        """What of this changes the weights."""
        calibration = self.stored.description if self.stored else asdict(self.choice)
        return {"calibration": calibration, "refresh": self.refresh, "original_inputs": self.original_inputs}


def parse_refresh(text: str) -> int:
    """`once` -> 0, `block` -> 1, a number K -> K; FewbitError for anything else."""
    if text in ("once", "block"):
        return 0 if text == "once" else 1
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise FewbitError(f"--refresh must be once, block or a number of blocks, not {text!r}")
