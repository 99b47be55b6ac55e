"""What to calibrate on."""

from dataclasses import dataclass

from fewbit.calibration.source import parse_sources
from fewbit.errors import FewbitError


@dataclass(frozen=True)
class CalibrationChoice:
    """What to calibrate on.

    sources: ``SRC[:COUNT][,SRC...]`` (see :mod:`fewbit.calibration.source`). samples: sequences in all.
    sequence_length: tokens of each. chat_template: every document becomes a user's turn in the tokenizer's template.
    """

    sources: str = "self"
    samples: int = 128
    sequence_length: int = 512
    seed: int = 0
    chat_template: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1 or self.sequence_length < 2:
            raise FewbitError("calibration needs at least 1 sample of at least 2 tokens")
        parse_sources(self.sources)
