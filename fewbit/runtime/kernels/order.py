"""The order of the columns of a block of 64, in which AVX512-BF16 and AVX2 decode them."""

BLOCK = 64
"""Columns that are decoded together: a code in each of 64 bytes, which are 32 words of 16 bits."""


def widest(widths: tuple[int, ...]) -> int:
    """The plane that decides on the order: the widest one below 8 bits, or 8. widths: of the planes."""
    return max((width for width in widths if width < 8), default=8)


def column_of_byte(widths: tuple[int, ...], byte: int) -> int:
    """The column in its block of the code in one of 64 bytes.

    The codes of a plane of w bits are 4 w words, which come 8 / w times, one after the other. Each time they are
    shifted by w bits more: then the lowest bits of both bytes of each word are the next codes.
    """
    width, (word, high) = widest(widths), divmod(byte, 2)
    if width == 8:
        return byte
    time, place = divmod(word, 4 * width)
    return 16 // width * place + time + 8 // width * high


def by_words(widths: tuple[int, ...], by_table: bool) -> list[int]:
    """The column in a block at each of the 64 places, which are two vectors of 32.

    by_table: each byte is a place in a table, and those of the first vector are the low bytes of words; otherwise those
    are the first byte of each four, and then the second.
    """
    places = (divmod(place, 32) for place in range(BLOCK))
    if by_table:
        return [column_of_byte(widths, 2 * lane + vector) for vector, lane in places]
    return [column_of_byte(widths, 4 * (lane % 16) + 2 * vector + lane // 16) for vector, lane in places]


def by_halves(widths: tuple[int, ...], by_table: bool) -> list[int]:
    """As :func:`by_words`, for AVX2.

    With a table, the first vector has the first eight of every 16 bytes; otherwise the first two of each four.
    """
    places = (divmod(place, 32) for place in range(BLOCK))
    if by_table:
        return [column_of_byte(widths, 16 * (lane // 8) + 8 * vector + lane % 8) for vector, lane in places]
    return [column_of_byte(widths, 4 * (lane // 2) + 2 * vector + lane % 2) for vector, lane in places]
