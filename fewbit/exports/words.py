"""Codes in words of 32 bits, as GPTQ, AWQ and MLX have them: one stream of bits, low bits first."""

import math

import torch
from torch import Tensor

WORD = 32


def whole_words(count: int, bits: int) -> bool:
    """Whether so many codes fill whole words."""
    return count * bits % WORD == 0


def to_words(codes: Tensor, bits: int) -> Tensor:
    """Words int32 `(rows, columns * bits / 32)` of uint8 codes `(rows, columns)`, each row a stream of its own.

    Code i has the bits from `i * bits` on, and bit 0 of a word is its lowest. Raises ValueError if a row does not fill
    whole words.
    """
    rows, columns = codes.shape
    if not whole_words(columns, bits):
        raise ValueError(f"{columns} codes of {bits} bits do not fill words of {WORD} bits")
    together = math.lcm(bits, WORD)
    runs = codes.reshape(rows, -1, together // bits).to(torch.int64)
    words = torch.zeros(rows, runs.shape[1], together // WORD, dtype=torch.int64, device=codes.device)
    for index in range(together // bits):
        word, shift = divmod(index * bits, WORD)
        words[..., word] |= runs[..., index] << shift
        if shift + bits > WORD:
            words[..., word + 1] |= runs[..., index] >> (WORD - shift)
    low = words.view(rows, -1) & (2**WORD - 1)
    return torch.where(low >= 2 ** (WORD - 1), low - 2**WORD, low).to(torch.int32)
