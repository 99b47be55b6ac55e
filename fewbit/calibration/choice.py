"""The choice of a calibration set."""

from dataclasses import dataclass
from typing import Any

from fewbit.calibration.source import DOCUMENTS, parse_sources, shares
from fewbit.choices import check_values, flag_names
from fewbit.errors import FewbitError


@dataclass(frozen=True)
class CalibrationChoice:
    """A calibration set.

    sources: ``SRC[:COUNT][,SRC...]`` (see :mod:`fewbit.calibration.source`). samples: total number of sequences.
    sequence_length: tokens per sequence. chat_template: render each document as a user's turn in the tokenizer's chat
    template.
    """

    sources: str = "self"
    samples: int = 128
    sequence_length: int = 512
    seed: int = 0
    chat_template: bool = False

    def __post_init__(self) -> None:
        check_values(self, {**flag_names(self), "sources": "--calibration"})
        if self.samples < 1 or self.sequence_length < 2:
            raise FewbitError("calibration needs at least 1 sample of at least 2 tokens")
        sources = parse_sources(self.sources)
        if sources:
            shares(sources, self.samples)
        if self.chat_template and not any(source.kind in DOCUMENTS for source in sources):
            raise FewbitError(f"--chat-template: {self.sources} has no documents to apply it to: omit the option")


def choice_from(given: dict[str, Any], samples: int = CalibrationChoice.samples) -> CalibrationChoice:
    """The choice from a user's options by field; options that were not given are None.

    If `samples` is not given and every source has a count, the counts are added up.
    """
    given = {name: value for name, value in given.items() if value is not None}
    counts = [source.count for source in parse_sources(given.get("sources", CalibrationChoice.sources))]
    counted = sum(count or 0 for count in counts) if None not in counts else 0
    return CalibrationChoice(**{"samples": counted or samples, **given})
