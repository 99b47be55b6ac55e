"""Codes of a few bits in 32-bit words, in the layouts of GPTQ, AWQ and compressed-tensors."""

import torch
from torch import Tensor

from fewbit.grids.packing import unpack

_WORD = 32
_AT_ONCE = 1 << 22
"""Codes that are unpacked at one time."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column, of eight, that each four bits of a word hold, the lowest first."""


def dense_words(count: int, bits: int) -> int:
    """Words of a row of codes without unused bits; a code may lie in two words."""
    return -(-count * bits // _WORD)


def whole_words(count: int, bits: int) -> int:
    """Words of a row of codes if no code lies in two words; the highest bits of a word may be unused."""
    return -(-count // (_WORD // bits))


def from_words(words: Tensor, bits: int, count: int, is_dense: bool | None = None) -> Tensor:
    """The first `count` codes of each row, uint8 `(rows, count)`, lowest bits first.

    words: int32 `(rows, n)` with n = :func:`dense_words` or :func:`whole_words`. is_dense: which of the two it is; None
    if n tells. Raises ValueError for another n, and for None if n does not tell.
    """
    rows, width = words.shape
    dense, whole = dense_words(count, bits), whole_words(count, bits)
    if width not in (dense, whole):
        raise ValueError(f"rows of {width} words cannot hold {count} codes of {bits} bits, which take {dense}")
    if _WORD % bits == 0:
        return unpack(words.contiguous().view(torch.uint8), bits, 4 * width * (8 // bits))[:, :count].contiguous()
    index = torch.arange(count)
    if is_dense is None and dense == whole and width > 1:
        raise ValueError(f"{count} codes of {bits} bits take {dense} words in both known layouts")
    if width == dense if is_dense is None else is_dense:
        word, shift = index * bits // _WORD, index * bits % _WORD
    else:
        word, shift = index // (_WORD // bits), index % (_WORD // bits) * bits
    after = torch.nn.functional.pad(words, (0, 1))
    step = max(1, _AT_ONCE // count)
    pieces = []
    for first in range(0, rows, step):
        piece = after[first : first + step].to(torch.int64) & (2**_WORD - 1)
        # Two words side by side: a code begins in the lower one.
        both = piece[:, word] | ((piece[:, word + 1] & (2**bits - 1)) << _WORD)
        pieces.append(((both >> shift) & (2**bits - 1)).to(torch.uint8))
    return torch.cat(pieces)


def from_awq_words(words: Tensor) -> Tensor:
    """Codes of four bits, uint8 `(rows, 8 n)`, of words int32 `(rows, n)` in AWQ's order."""
    nibbles = from_words(words, 4, 8 * words.shape[1]).view(words.shape[0], -1, 8)
    codes = torch.empty_like(nibbles)
    codes[..., list(AWQ_ORDER)] = nibbles
    return codes.view(words.shape[0], -1)


def add_one(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes plus one, uint8 `(rows, count)`, of zero-points in version 1 of GPTQ's format, which holds them minus one.

    The writer subtracts whole words where a word holds whole codes. So a 0 borrows from its neighbour, and only an
    addition of whole words restores both.
    """
    if _WORD % bits:
        return (from_words(words, bits, count) + 1) & (2**bits - 1)
    ones = sum(1 << at for at in range(0, _WORD, bits))
    total = ((words.to(torch.int64) & (2**_WORD - 1)) + ones) & (2**_WORD - 1)
    signed = torch.where(total >= 2 ** (_WORD - 1), total - 2**_WORD, total)
    return from_words(signed.to(torch.int32), bits, count)
