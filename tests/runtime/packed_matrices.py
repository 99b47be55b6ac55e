"""Packed matrices of random weights, in every form that is stored."""

import torch
from torch import Tensor

from fewbit.formats import native
from fewbit.grids import codebook, positions
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.outliers.grids import pack_outliers
from fewbit.solvers.settled import WeightChoices, encode, settle, settle_around


def normal_float(bits: int, group_size: int = 64, **others: object) -> Scheme:
    """A scheme with the codebook of normal quantiles."""
    levels = codebook.normal_float(bits)
    return Scheme(bits, group_size, "codebook", levels=levels, **others)  # type: ignore[arg-type]


def pack(
    scheme: Scheme, rows: int = 21, columns: int = 192, share: float = 0.03, encoding: str = ""
) -> tuple[dict[str, Tensor], StoredWeight]:
    """The parts of a random weight, and how it is stored. share: of outliers, if the scheme has any."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    choices = WeightChoices(scheme)
    if scheme.has_outliers:
        settled = settle_around(weight, torch.rand(rows, columns, generator=generator) < share, choices)
    else:
        settled = settle(weight, choices, None, None)
    return finish(weight, settled, scheme, encoding)


def finish(
    weight: Tensor, settled: object, scheme: Scheme, encoding: str = ""
) -> tuple[dict[str, Tensor], StoredWeight]:
    """The parts of a weight whose grids and outliers are settled."""
    encoded = encode(weight, weight, settled)  # type: ignore[arg-type]
    count = 0 if encoded.where is None else encoded.where.numel()
    rows, columns = weight.shape
    if count:
        encoding = encoding or positions.choose(positions.Where(rows * columns, count, scheme.group_size), None)
    stored = StoredWeight(scheme, (rows, columns), count, encoding if count else "none")
    parts = dict(encoded.parts)
    if encoded.where is not None and encoded.outlier_codes is not None and count:
        parts |= pack_outliers(encoded.outlier_codes, encoded.where, stored)
        native.check_parts(parts, stored)
    return parts, stored
