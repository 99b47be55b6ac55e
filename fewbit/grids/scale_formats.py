"""The formats in which scales and real-valued zero-points are stored.

A quantity is `(rows, groups)` float32. The names of its parts begin with its own name ("scale", "zero").
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbit.grids.eight_bit_scales import exponents_to_float, from_e4m3, to_e4m3, to_exponents
from fewbit.grids.nested import NESTED, Nested
from fewbit.grids.packing import packed_bytes
from fewbit.grids.scales import (
    TWO_LEVEL_BITS,
    as_statistics,
    from_pattern,
    from_statistics,
    from_two_level,
    to_pattern,
    to_statistics,
    to_two_level,
    two_level_factors,
)
from fewbit.grids.scheme import Layout, Scheme

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class ScaleFormat:
    """One way to store scales and real-valued zero-points.

    pack(values, name, scheme): the parts, and the values as a reader decodes them. see(values, scheme): only the
    decoded values. read(parts, name, scheme, groups): the inverse of pack. layout(name, scheme, rows, groups): names,
    dtypes and shapes of the parts. floats: the number format of minima and outlier grids stored beside the scales.
    row_block(scheme): number of rows that share stored data. joins_groups: all groups of a row share stored data, so
    they cannot be stored one by one. offsets: the offsets of a grid (see :class:`fewbit.grids.grid.Grid`) with which
    the format can be combined; "" is none. has_statistics: the format uses the scheme's statistic_bits and
    statistic_rows. smallest: scales below this lose precision. factors(parts, name, scheme, groups): signed bytes
    `(rows, groups)` and a float32 `(rows, 1)` whose products are the decoded values, or None where there are none.
    """

    name: str
    summary: str
    pack: Callable[[Tensor, str, Scheme], tuple[dict[str, Tensor], Tensor]]
    see: Callable[[Tensor, Scheme], Tensor]
    read: Callable[[Parts, str, Scheme, int], Tensor]
    layout: Callable[[str, Scheme, int, int], Layout]
    offsets: tuple[str, ...] = ("", "zero", "minimum")
    floats: str = "float16"
    row_block: Callable[[Scheme], int] = lambda _: 1
    joins_groups: bool = False
    has_statistics: bool = False
    smallest: float = 0.0
    factors: Callable[[Parts, str, Scheme, int], tuple[Tensor, Tensor] | None] = lambda *_: None

    def pack_floats(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Minima or outlier scales as bit patterns, and the values as a reader decodes them."""
        pattern = to_pattern(values, self.floats)
        return pattern, from_pattern(pattern, self.floats)

    def read_floats(self, pattern: Tensor) -> Tensor:
        """Inverse of :meth:`pack_floats`."""
        return from_pattern(pattern, self.floats)

    @property
    def word(self) -> torch.dtype:
        """The integer dtype of the bit patterns of :meth:`pack_floats`."""
        return torch.int32 if self.floats == "float32" else torch.int16


def _plain(name: str) -> ScaleFormat:
    word = torch.int32 if name == "float32" else torch.int16

    def pack(values: Tensor, quantity: str, scheme: Scheme) -> tuple[dict[str, Tensor], Tensor]:
        pattern = to_pattern(values, name)
        return {f"{quantity}s": pattern}, from_pattern(pattern, name)

    return ScaleFormat(
        name,
        f"{name} per group",
        pack=pack,
        see=lambda values, scheme: from_pattern(to_pattern(values, name), name),
        read=lambda parts, quantity, scheme, groups: from_pattern(parts[f"{quantity}s"], name),
        layout=lambda quantity, scheme, rows, groups: {f"{quantity}s": (word, (rows, groups))},
        floats=name,
        smallest=2.0**-14 if name == "float16" else 0.0,
    )


def _nested(name: str, nested: Nested) -> ScaleFormat:
    signed = "a sign and " if nested.lowest < 0 else ""
    return ScaleFormat(
        name,
        f"{signed}{nested.bits - (nested.lowest < 0)} bits per group, and 16 bits per 256 weights (k-quants)",
        pack=nested.pack,
        see=nested.see,
        read=nested.read,
        layout=nested.layout,
        # Only for the grids that name them.
        offsets=(),
        joins_groups=True,
        smallest=2.0**-14,
    )


def _pack_two_level(values: Tensor, quantity: str, scheme: Scheme) -> tuple[dict[str, Tensor], Tensor]:
    codes, rows = to_two_level(values)
    return {f"{quantity}s": codes, f"row_{quantity}s": rows}, from_two_level(codes, rows, values.shape[1])


def _pack_statistics(values: Tensor, quantity: str, scheme: Scheme) -> tuple[dict[str, Tensor], Tensor]:
    codes, second = to_statistics(values, scheme.statistic_bits, scheme.statistic_rows)
    parts = {f"{quantity}s": codes, f"{quantity}_statistics": second}
    return parts, _read_statistics(parts, quantity, scheme, values.shape[1])


def _read_statistics(parts: Parts, quantity: str, scheme: Scheme, groups: int) -> Tensor:
    codes, second = parts[f"{quantity}s"], parts[f"{quantity}_statistics"]
    return from_statistics(codes, second, scheme.statistic_bits, scheme.statistic_rows, groups)


def _pack_exponents(values: Tensor, quantity: str, scheme: Scheme) -> tuple[dict[str, Tensor], Tensor]:
    codes = to_exponents(values)
    return {f"{quantity}s": codes}, exponents_to_float(codes)


def _pack_e4m3(values: Tensor, quantity: str, scheme: Scheme) -> tuple[dict[str, Tensor], Tensor]:
    codes, whole = to_e4m3(values)
    parts = {f"{quantity}s": codes, f"tensor_{quantity}": to_pattern(whole, "float32")}
    return parts, from_e4m3(codes, whole)


def _read_e4m3(parts: Parts, quantity: str, scheme: Scheme, groups: int) -> Tensor:
    return from_e4m3(parts[f"{quantity}s"], from_pattern(parts[f"tensor_{quantity}"], "float32"))


SCALE_FORMATS: dict[str, ScaleFormat] = {
    one.name: one
    for one in (
        _plain("float16"),
        _plain("bfloat16"),
        _plain("float32"),
        ScaleFormat(
            "two-level",
            "7 bits per group and 16 bits per row",
            pack=_pack_two_level,
            see=lambda values, scheme: _pack_two_level(values, "scale", scheme)[1],
            read=lambda parts, name, scheme, groups: from_two_level(parts[f"{name}s"], parts[f"row_{name}s"], groups),
            layout=lambda name, scheme, rows, groups: {
                f"{name}s": (torch.uint8, (rows, packed_bytes(groups, TWO_LEVEL_BITS))),
                f"row_{name}s": (torch.int16, (rows,)),
            },
            offsets=("",),
            joins_groups=True,
            factors=lambda parts, name, scheme, groups: two_level_factors(
                parts[f"{name}s"], parts[f"row_{name}s"], groups
            ),
        ),
        ScaleFormat(
            "statistics",
            "a few bits per group, and second-level scales for blocks of rows (SpQR)",
            pack=_pack_statistics,
            see=lambda values, scheme: as_statistics(values, scheme.statistic_bits, scheme.statistic_rows),
            read=_read_statistics,
            layout=lambda name, scheme, rows, groups: {
                f"{name}s": (torch.uint8, (rows, packed_bytes(groups, scheme.statistic_bits))),
                f"{name}_statistics": (torch.int16, (-(-rows // scheme.statistic_rows), groups, 2)),
            },
            offsets=("real",),
            row_block=lambda scheme: scheme.statistic_rows,
            has_statistics=True,
        ),
        *(_nested(name, nested) for name, nested in NESTED.items()),
        ScaleFormat(
            "e8m0",
            "a power of two per group, as an exponent of 8 bits (MX formats)",
            pack=_pack_exponents,
            see=lambda values, scheme: exponents_to_float(to_exponents(values)),
            read=lambda parts, name, scheme, groups: exponents_to_float(parts[f"{name}s"]),
            layout=lambda name, scheme, rows, groups: {f"{name}s": (torch.uint8, (rows, groups))},
            # Only for the grids that name them.
            offsets=(),
        ),
        ScaleFormat(
            "e4m3",
            "a number of 8 bits per group, divided by a power of two for the whole tensor (NVFP4)",
            pack=_pack_e4m3,
            see=lambda values, scheme: _pack_e4m3(values, "scale", scheme)[1],
            read=_read_e4m3,
            layout=lambda name, scheme, rows, groups: {
                f"{name}s": (torch.uint8, (rows, groups)),
                f"tensor_{name}": (torch.int32, (1,)),
            },
            offsets=(),
            joins_groups=True,
        ),
    )
}
