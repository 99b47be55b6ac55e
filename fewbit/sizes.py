"""Byte sizes in human-readable form."""

import re

from fewbit.errors import FewbitError

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def parse_size(text: str) -> int:
    """The bytes of "500MB", "5GB", "2GiB" or "1000". Raises FewbitError for anything else or less than 1 kB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?\s*", text.upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1000:
        raise FewbitError(f"a size must have a form such as 500MB or 5GB (at least 1KB), not {text!r}")
    return size


def show_size(size: float) -> str:
    """A size in MB or GB, rounded for reading."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
