"""Where calibration text comes from: one syntax, ``SRC[:COUNT][,SRC...]``, for files, hub data sets and made text."""

from dataclasses import dataclass
from pathlib import Path

from fewbit.errors import FewbitError

MADE = ("self", "nonsense", "random-tokens")
"""Sources that need no outside data."""

DOCUMENTS = ("file", "hub", "nonsense")
"""Kinds of sources whose text comes in documents."""


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub, as `datasets.load_dataset` takes it; files: some of its files, where it has a script."""

    path: str
    configuration: str | None = None
    column: str = "text"
    files: str | None = None


HUB = {
    "c4": HubSet("allenai/c4", "en"),
    "wikitext2": HubSet("Salesforce/wikitext", "wikitext-2-raw-v1"),
    # Its script no longer runs, and its files are in order of their origin: this is its largest part.
    "redpajama": HubSet(
        "json", files="hf://datasets/togethercomputer/RedPajama-Data-1T-Sample/cc_2023-06_sample.jsonl"
    ),
}
"""Short names of hub data sets, of which the split `train` is taken."""

_FILES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Source:
    """One part of a calibration set.

    kind: file, hub, self, nonsense or random-tokens. name: the path or the data set. column: of a hub data set, or of
    a parquet or jsonl file. count: sequences from here; None for an equal share of what is left.
    """

    kind: str
    name: str
    column: str | None = None
    count: int | None = None

    def __str__(self) -> str:
        column = f":{self.column}" if self.column else ""
        return f"{self.name}{column}" + (f":{self.count}" if self.count is not None else "")


def parse_sources(text: str) -> list[Source]:
    """Read ``SRC[:COUNT][,SRC...]``; the empty list for ``none``. FewbitError when a part cannot be understood."""
    if text.strip() == "none":
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise FewbitError(f"--calibration {text!r}: an empty source: write SRC[:COUNT][,SRC...], e.g. c4:64,self:64")
    return [_parse_one(part) for part in parts]


def _parse_one(part: str) -> Source:
    head, _, tail = part.rpartition(":")
    count = None
    if head and tail.isdecimal():
        part, count = head, int(tail)
        if count < 1:
            raise FewbitError(f"--calibration {part}:{count}: a source needs at least one sequence")
    if part in MADE:
        return Source(part, part, None, count)
    if part == "none":
        raise FewbitError("--calibration none cannot be combined with other sources")
    path = Path(part).expanduser()
    if path.exists():
        return Source("file", str(path), None, count)
    name, _, column = part.rpartition(":")
    if name and Path(name).expanduser().exists():
        return Source("file", str(Path(name).expanduser()), column, count)
    if path.suffix in _FILES or part.startswith((".", "/", "~")):
        raise FewbitError(f"--calibration {part}: no such file or folder")
    return Source("hub", name or part, column if name else None, count)


def shares(sources: list[Source], samples: int) -> list[int]:
    """How many of `samples` sequences each source gives: its count, or an equal share of what the counts leave."""
    fixed = sum(source.count or 0 for source in sources)
    open_ended = [i for i, source in enumerate(sources) if source.count is None]
    if not open_ended:
        if fixed != samples:
            raise FewbitError(f"--samples {samples}: the sources count {fixed} sequences in all: leave one of them out")
        return [source.count or 0 for source in sources]
    left = samples - fixed
    if left < len(open_ended):
        raise FewbitError(f"--samples {samples}: the counts of the sources leave {max(left, 0)} for {len(open_ended)}")
    base, extra = divmod(left, len(open_ended))
    share = {index: base + (rank < extra) for rank, index in enumerate(open_ended)}
    return [source.count if source.count is not None else share[i] for i, source in enumerate(sources)]
