"""The tokens of a long text, read and tokenized only as far as they are wanted, the same as those of the whole text.

A tokenizer does not split a text at any place alike: what stands behind a cut can change the tokens before it. So a
text is cut where words end, neighbouring pieces overlap, and what they say of the middle of their overlap has to be the
same, token for token at the same characters; where it is not, the piece grows, at last to the whole text.

Why that is enough. Where the tokenizer splits a text into words first, the words of the middle are whole in both
pieces. Where its merges run over the whole text (byte-pair encoding without words), a list of tokens is the encoding of
its text if every two neighbours are the encoding of theirs, and each pair stands in one of the two pieces. Where the
likeliest split of the whole text is looked for (Unigram without words), two best splits that are the same for so many
tokens are taken for parts of one. What depends on a whole run of characters (digits grouped from the right, words too
long to be known) does not cross the white space or punctuation at which pieces are cut.
"""

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fewbit.errors import FewbitError
from fewbit.printable import first_line

Pieces = Callable[[], Iterable[str]]
"""A text in pieces, as often as it is called."""

Counted = Callable[[int], None]
"""Called with how many tokens there are so far."""


@dataclass(frozen=True)
class Sizes:
    """In characters: the first piece, the largest one (each is twice the one before), the overlap. tokens: how many
    the middle of an overlap has to hold."""

    first: int = 1 << 13
    largest: int = 1 << 18
    overlap: int = 1 << 11
    tokens: int = 16


# From best to worst: before a space between two words, at the start of a line, before other white space, and where a
# word meets punctuation (texts without spaces). Never inside a run of letters or digits.
_CUTS = (
    re.compile(r"(?<=\w)(?= \w)"),
    re.compile(r"(?<=\n)(?=\S)"),
    re.compile(r"(?<=\S)(?=\s)"),
    re.compile(r"(?<=\w)(?=[!-&(-/:-@\[-^`{-~、。，．！？；：…「」『』（）])"),
)
_NEAR = 256


def first_tokens(
    tokenizer: Any,
    pieces: Pieces,
    wanted: int | None = None,
    leading: int | None = None,
    counted: Counted | None = None,
    sizes: Sizes | None = None,
) -> array:
    """The first `wanted` token ids of a text, None for all; fewer where the text has fewer.

    Those of ``tokenizer(text, add_special_tokens=False)``, without special tokens around them. leading: a token (the
    BOS) that is left out where the text begins with it. Raises FewbitError when the tokenizer cannot encode the text.
    """
    sizes = sizes or Sizes()
    fast = getattr(tokenizer, "is_fast", False)
    try:
        if not fast and wanted is None:
            raise _UnstableError
        method = _overlapping if fast else _growing
        found = _take(method(tokenizer, _Reader(pieces()), sizes), wanted, leading, counted)
    except _UnstableError:
        found = _take(iter([_encode(tokenizer, "".join(pieces()))]), None, leading, counted)
    return found if wanted is None else found[:wanted]


def _take(parts: Iterator[Sequence[int]], wanted: int | None, leading: int | None, counted: Counted | None) -> array:
    found = array("q")
    for ids in parts:
        found.extend(ids)
        while leading is not None and found and found[0] == leading:
            del found[0]
        if counted:
            counted(len(found))
        if wanted is not None and len(found) >= wanted:
            break
    return found


class _UnstableError(Exception):
    """Pieces of this text do not fit together: only the whole of it will do."""


class _Reader:
    """A text as it comes: `text` is what has been read and not dropped; `base` is where that begins."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces = iter(pieces)
        self.text, self.base, self.ended = "", 0, False

    def fill(self, size: int) -> bool:
        """Read until there are more than `size` characters; whether there are."""
        parts, there = [self.text], len(self.text)
        while there <= size and not self.ended:
            piece = next(self._pieces, None)
            self.ended = piece is None
            parts.append(piece or "")
            there += len(parts[-1])
        if len(parts) > 1:
            self.text = "".join(parts)
        return there > size

    def drop(self, size: int) -> None:
        """Forget the first characters."""
        self.text, self.base = self.text[size:], self.base + size


@dataclass(frozen=True)
class _Piece:
    """Tokens of a part of the text, which begins and ends at these characters: ids, and where each begins and ends.

    last: whether the text ends with it.
    """

    begin: int
    end: int
    last: bool
    ids: Sequence[int]
    spans: Sequence[tuple[int, int]]

    def between(self, low: int, high: int) -> tuple[int, list[tuple[int, int, int]]]:
        """Index of the first token within some characters, and `(id, begin, end)` of all from there to the last."""
        low, high = low - self.begin, high - self.begin
        inside = [i for i, (first, last) in enumerate(self.spans) if first >= low and last <= high]
        if not inside:
            return 0, []
        part = range(inside[0], inside[-1] + 1)
        return inside[0], [(self.ids[i], self.spans[i][0] - low, self.spans[i][1] - low) for i in part]


def _overlapping(tokenizer: Any, reader: _Reader, sizes: Sizes) -> Iterator[Sequence[int]]:
    """Ids in parts, from overlapping pieces; _UnstableError when what was given out was wrong."""
    left, given = _piece(tokenizer, reader, 0, 0, sizes.first), 0
    while not left.last:
        length = left.end - left.begin
        begin = _last_cut(reader.text, length // 4, length - sizes.overlap)
        if begin is not None:
            size = max(min(2 * length, sizes.largest), length - begin + sizes.overlap)
            right = _piece(tokenizer, reader, begin, length, begin + size)
            seam = _seam(left, right, sizes)
            if seam is not None:
                yield left.ids[given : seam[0]]
                left, given = right, seam[1]
                reader.drop(begin)
                continue
        longer = _piece(tokenizer, reader, 0, length, 2 * length)
        kept = given + sizes.tokens if given else 0
        if longer.ids[:kept] != left.ids[:kept] or longer.spans[:kept] != left.spans[:kept]:
            raise _UnstableError
        left = longer
    yield left.ids[given:]


def _seam(left: _Piece, right: _Piece, sizes: Sizes) -> tuple[int, int] | None:
    """Indices, in two overlapping pieces, of a token in the middle of what both say alike; None if they do not."""
    quarter = (min(left.end, right.end) - right.begin) // 4
    low, high = right.begin + quarter, min(left.end, right.end) - quarter
    (i, ours), (j, theirs) = left.between(low, high), right.between(low, high)
    if len(ours) < sizes.tokens or ours != theirs:
        return None
    return i + len(ours) // 2, j + len(ours) // 2


def _growing(tokenizer: Any, reader: _Reader, sizes: Sizes) -> Iterator[Sequence[int]]:
    """Ids in parts, from the text's beginning in growing lengths: for tokenizers that do not say where tokens stand."""
    size, given, margin = sizes.first, 0, 4 * sizes.tokens
    before: list[int] = []
    while reader.fill(size):
        end = _last_cut(reader.text, size // 2, size)
        size *= 2
        if end is None:
            continue
        ids = _encode(tokenizer, reader.text[:end])
        same = next(
            (i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids))
        )
        if same < given:
            raise _UnstableError
        if same - margin > given:
            yield ids[given : same - margin]
            given = same - margin
        before = ids
    ids = _encode(tokenizer, reader.text)
    if ids[:given] != before[:given]:
        raise _UnstableError
    yield ids[given:]


def _piece(tokenizer: Any, reader: _Reader, begin: int, behind: int, stop: int) -> _Piece:
    """Tokenize from `begin` to the last good cut behind `behind` and up to `stop`, farther on where there is none."""
    end: int | None = None
    while end is None and reader.fill(stop):
        end = _last_cut(reader.text, max((begin + stop) // 2, behind + 1), stop)
        stop += stop - begin
    last = end is None
    if end is None:
        end = len(reader.text)
    encoded = _call(tokenizer, reader.text[begin:end], return_offsets_mapping=True)
    return _Piece(reader.base + begin, reader.base + end, last, encoded["input_ids"], encoded["offset_mapping"])


def _last_cut(text: str, low: int, high: int) -> int | None:
    """The last good place to cut a text, from `low` to `high`: of the best kind near the end, else farther away."""
    if low >= high:
        return None
    for start in (max(low, high - _NEAR), low):
        for cut in _CUTS:
            places = [match.start() for match in cut.finditer(text, start, high + 2)]
            while places and places[-1] > high:
                places.pop()
            if places:
                return places[-1]
    return None


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(_call(tokenizer, text)["input_ids"])


def _call(tokenizer: Any, text: str, **options: Any) -> Any:
    try:
        return tokenizer(text, add_special_tokens=False, verbose=False, **options)
    except Exception as error:
        # The tokenizers library raises plain exceptions, with what its model is missing.
        if type(error) is not Exception:
            raise
        raise FewbitError(f"the model's tokenizer cannot encode the text: {first_line(error)}") from error
