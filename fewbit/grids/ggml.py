"""The block types of ggml (llama.cpp, GGUF) as grids: q4_0 to q8_0, iq4_nl, and the k-quants.

A group is what shares a scale, 16 or 32 weights (tq2_0: 256). Weights decode to the same float32 numbers as in the
`gguf` package. :mod:`fewbit.formats.gguf_blocks` converts the parts to ggml's blocks and back.
"""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from fewbit.grids.evenly import MINIMUM, SYMMETRIC
from fewbit.grids.ggml_fit import Steps, fit_minimum, fit_scale
from fewbit.grids.grid import Fitted, Grid, Parts, Values
from fewbit.grids.level_grid import level_grid, read_scale, scale_layout, store_scale
from fewbit.grids.nested import BLOCK, NESTED
from fewbit.grids.scale_formats import SCALE_FORMATS
from fewbit.grids.scheme import Layout, Scheme

LEVELS_16 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The levels of iq4_nl and iq4_xs, in units of the scale."""
_TERNARY = (-1, 0, 1)
_END = 256


def _refusal(group: int, scale_format: str, scheme: Scheme) -> str | None:
    fits = scheme.group_size == group and scheme.scale_format == scale_format and not scheme.has_outliers
    return None if fits else "group size, scale format or outliers with a block type of ggml"


def _of_type(grid: Grid, name: str, summary: str, bits: int, group: int = 32, scales: str = "float16") -> Grid:
    """A grid under the name of a block type, with what the type determines."""
    return replace(
        grid,
        name=name,
        called="",
        summary=summary,
        widths=(bits,),
        refuses=partial(_refusal, group, scales),
        brings={"group_size": str(group), "scale_format": scales, "outliers": "none"},
        scales=scales,
        block=max(group, 32) if scales == "float16" else BLOCK,
        trial=None,
    )


def _centred(name: str, summary: str, bits: int, group: int = 32, scales: str = "float16") -> Grid:
    """``(code - 2^(b-1)) * scale`` with a signed scale."""
    half = 2.0 ** (bits - 1)
    steps = Steps(lambda u: u.round_().clamp_(-half, half - 1), -half, half - 1, 2**bits)
    made = replace(
        SYMMETRIC,
        fit=partial(fit_scale, steps, NESTED.get(scales)),
        settle=store_scale,
        restore=store_scale,
        read=read_scale,
        layout=scale_layout,
    )
    return _of_type(made, name, summary, bits, group, scales)


def _listed(
    name: str, summary: str, levels: tuple[int, ...], bits: int, group: int = 32, scales: str = "float16"
) -> Grid:
    """``levels[code] * scale`` with a signed scale."""
    known = tuple(float(level) for level in levels)
    # Twice a middle is a whole number m, and u > m / 2 is ceil(2 u) > m: the level follows from ceil(2 u). A table
    # is ten times as fast as a search among the middles.
    doubled = [a + b for a, b in pairwise(levels)]
    table = torch.tensor([known[sum(m < index for m in doubled)] for index in range(-_END, _END + 1)])

    def snap(u: Tensor) -> Tensor:
        index = u.mul_(2).ceil_().clamp_(-_END, _END).add_(_END).to(torch.int32)
        return table.to(u.device).index_select(0, index.view(-1)).view(u.shape)

    steps = Steps(snap, known[0], known[-1], len(known))
    made = replace(level_grid(name, summary, lambda scheme: known), fit=partial(fit_scale, steps, NESTED.get(scales)))
    return _of_type(made, name, summary, bits, group, scales)


# ``code * scale + minimum``; a nested minimum is stored as its negative, a multiple of a second float16.


def _settle_minimum(wanted: Values, scheme: Scheme, stored: bool = True) -> Fitted:
    form = SCALE_FORMATS[scheme.scale_format]
    scale, offset = wanted["scale"].squeeze(-1), wanted["offset"].squeeze(-1)
    parts, seen = form.pack(scale, "scale", scheme)
    if scheme.scale_format in NESTED:
        more, depth = form.pack(-offset, "minimum", scheme)
        offset = -depth
    else:
        pattern, offset = form.pack_floats(offset)
        more = {"minima": pattern}
    values = {"scale": seen.unsqueeze(-1), "offset": offset.unsqueeze(-1)}
    return Fitted(scheme, {**parts, **more} if stored else {}, values)


def _read_minimum(parts: Parts, scheme: Scheme, groups: int) -> Values:
    form = SCALE_FORMATS[scheme.scale_format]
    if scheme.scale_format in NESTED:
        offset = -form.read(parts, "minimum", scheme, groups)
    else:
        offset = form.read_floats(parts["minima"])
    scale = form.read(parts, "scale", scheme, groups)
    return {"scale": scale.unsqueeze(-1), "offset": offset.unsqueeze(-1)}


def _layout_minimum(scheme: Scheme, rows: int, groups: int) -> Layout:
    form = SCALE_FORMATS[scheme.scale_format]
    nested = scheme.scale_format in NESTED
    more = form.layout("minimum", scheme, rows, groups) if nested else {"minima": (form.word, (rows, groups))}
    return {**form.layout("scale", scheme, rows, groups), **more}


def _minimum(name: str, summary: str, bits: int, group: int = 32, scales: str = "float16") -> Grid:
    made = replace(
        MINIMUM,
        fit=partial(fit_minimum, NESTED.get(scales)),
        settle=_settle_minimum,
        restore=_settle_minimum,
        read=_read_minimum,
        layout=_layout_minimum,
    )
    return _of_type(made, name, summary, bits, group, scales)


GGML_GRIDS = (
    _centred("q4_0", "ggml: 4 bits around 0, 32 weights per scale", 4),
    _minimum("q4_1", "ggml: 4 bits from a minimum, 32 weights per scale", 4),
    _centred("q5_0", "ggml: 5 bits around 0, 32 weights per scale", 5),
    _minimum("q5_1", "ggml: 5 bits from a minimum, 32 weights per scale", 5),
    _centred("q8_0", "ggml: 8 bits around 0, 32 weights per scale", 8),
    _listed("iq4_nl", "ggml: 4 bits, uneven levels, 32 weights per scale", LEVELS_16, 4),
    _listed("iq4_xs", "ggml: 4 bits, uneven levels, 6-bit scales", LEVELS_16, 4, 32, "block-6-signed"),
    _minimum("q2_k", "ggml: 2 bits from a minimum, 4-bit scales", 2, 16, "block-4"),
    _centred("q3_k", "ggml: 3 bits around 0, 6-bit scales", 3, 16, "block-6-signed"),
    _minimum("q4_k", "ggml: 4 bits from a minimum, 6-bit scales", 4, 32, "block-6"),
    _minimum("q5_k", "ggml: 5 bits from a minimum, 6-bit scales", 5, 32, "block-6"),
    _centred("q6_k", "ggml: 6 bits around 0, 8-bit scales", 6, 16, "block-8-signed"),
    replace(
        _listed("tq2_0", "ggml: -1, 0 and 1, 256 weights per scale", _TERNARY, 2, BLOCK),
        # Code 3 is never written, but decodes in ggml.
        decode=lambda codes, values, scheme: (codes.to(torch.float32) - 1.0) * values["scale"],
    ),
)
