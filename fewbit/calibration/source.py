"""Sources of calibration text: one syntax, ``SRC[:COUNT][,SRC...]``, for files, hub data sets and generated text."""

import re
from dataclasses import dataclass, replace
from typing import Any

from fewbit.checkpoints.public_names import last_part
from fewbit.errors import FewbitError
from fewbit.text.documents import place_of

MADE = ("self", "nonsense", "random-tokens")
"""Sources that need no external data."""

DOCUMENTS = ("file", "hub", "nonsense")
"""Kinds of sources whose text consists of documents."""

_LONGEST_COUNT = 16


@dataclass(frozen=True)
class Source:
    """One part of a calibration set.

    kind: file, hub, self, nonsense or random-tokens. name: the path or the data set. column: the column of a data set
    or file; None for the default. count: sequences from this source; None for an equal share of the rest.
    """

    kind: str
    name: str
    column: str | None = None
    count: int | None = None

    def __str__(self) -> str:
        column = f":{self.column}" if self.column else ""
        return f"{self.name}{column}" + (f":{self.count}" if self.count is not None else "")


def parse_sources(text: str) -> list[Source]:
    """Parse ``SRC[:COUNT][,SRC...]``; the empty list for ``none``. Raises FewbitError if a part is invalid."""
    if text.strip() == "none":
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise FewbitError(f"--calibration {text!r}: a source is empty: write SRC[:COUNT][,SRC...], e.g. c4:64,self:64")
    return [_parse_one(part) for part in parts]


def _parse_one(part: str) -> Source:
    head, _, tail = part.rpartition(":")
    count = None
    if head and re.fullmatch(r"[+-]?\d+", tail, re.ASCII):
        part, count = head, int(tail) if len(tail) < _LONGEST_COUNT else 0
        if count < 1:
            raise FewbitError(f"--calibration {part}:{tail}: the count of a source must be a number of at least 1")
    if part in MADE:
        return Source(part, part, None, count)
    if part == "none":
        raise FewbitError("--calibration none cannot be combined with other sources")
    if part.partition(":")[0] in MADE:
        raise FewbitError(
            f"--calibration {part}: {part.partition(':')[0]} can be followed only by a number of sequences"
        )
    place = place_of(part, "--calibration")
    return Source("file" if place.path is not None else "hub", place.name, place.column, count)


def shares(sources: list[Source], samples: int) -> list[int]:
    """How many of `samples` sequences come from each source: its count, or an equal share of the rest."""
    fixed = sum(source.count or 0 for source in sources)
    open_ended = [i for i, source in enumerate(sources) if source.count is None]
    if not open_ended:
        if fixed != samples:
            raise FewbitError(
                f"--samples {samples}: the counts of the sources add up to {fixed}: omit --samples or the counts"
            )
        return [source.count or 0 for source in sources]
    left = samples - fixed
    if left < len(open_ended):
        raise FewbitError(
            f"--samples {samples}: the counts of the other sources leave {max(left, 0)} sequences for "
            f"{len(open_ended)} sources: raise --samples or lower the counts"
        )
    base, extra = divmod(left, len(open_ended))
    share = {index: base + (rank < extra) for rank, index in enumerate(open_ended)}
    return [source.count if source.count is not None else share[i] for i, source in enumerate(sources)]


def public_text(described: Any) -> Any:
    """The description of a calibration set, or anything that contains some, with the names of files without folders."""
    if isinstance(described, list):
        return [public_text(one) for one in described]
    if not isinstance(described, dict):
        return described
    return {
        key: _public_sources(value) if key == "sources" and isinstance(value, str) else public_text(value)
        for key, value in described.items()
    }


def _public_sources(text: str) -> str:
    return ",".join(_public_source(part.strip()) for part in text.split(","))


def _public_source(part: str) -> str:
    try:
        found = parse_sources(part)
    except FewbitError:
        # The text was read where it was measured; here a file may be missing by which its name is understood.
        return last_part(part)
    return str(replace(found[0], name=last_part(found[0].name))) if found and found[0].kind == "file" else part
