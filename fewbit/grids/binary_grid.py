"""The binary grid of BiLLM: a code has two bits, the sign and the choice of one of two magnitudes.

Values: ``scale`` `(rows, groups, 4)`, the magnitudes of :mod:`fewbit.grids.binary`, and ``salient`` `(1, groups, g)`, 1
in salient columns, which are the same for all rows of a weight.
"""

import torch
from torch import Tensor

from fewbit.grids import binary
from fewbit.grids.codes import Plane, two_planes
from fewbit.grids.formula import Formula, Terms
from fewbit.grids.grid import Fitted, Grid, Groups, Parts, ScaleSearch, Values
from fewbit.grids.packing import pack, packed_bytes, unpack
from fewbit.grids.scales import from_pattern, to_pattern
from fewbit.grids.scheme import Layout, Scheme
from fewbit.grids.straight_through import round_to_magnitudes

_MOST_SALIENT = 30
_CODES = two_planes("second")


def _fit(groups: Groups, scheme: Scheme, search: ScaleSearch | None) -> Values:
    """Saliency is ``w^2 / U_jj^2``, summed over rows: the squared diagonal of the Cholesky factor of H^-1."""
    scales, salient = [], []
    for index in range(groups.x.shape[1]):
        block = groups.x[:, index].contiguous()
        saliency = block.square().sum(dim=0)
        if groups.costs is not None:
            saliency = saliency * groups.costs[index]
        mask, scale = binary.fit_block(block, saliency, _MOST_SALIENT)
        scales.append(scale)
        salient.append(mask.to(torch.uint8))
    return {"scale": torch.stack(scales, dim=1), "salient": torch.stack(salient).unsqueeze(0)}


def _settle(wanted: Values, scheme: Scheme, stored: bool = True) -> Fitted:
    pattern = to_pattern(wanted["scale"], "float16")
    values = {"scale": from_pattern(pattern, "float16"), "salient": wanted["salient"]}
    parts = {"salient": pack(wanted["salient"].reshape(-1).to(torch.uint8), 1), "scales": pattern} if stored else {}
    return Fitted(scheme, parts, values)


def _read(parts: Parts, scheme: Scheme, groups: int) -> Values:
    salient = unpack(parts["salient"], 1, groups * scheme.group_size).view(1, groups, scheme.group_size)
    return {"scale": from_pattern(parts["scales"], "float16"), "salient": salient}


def _layout(scheme: Scheme, rows: int, groups: int) -> Layout:
    return {
        "salient": (torch.uint8, (packed_bytes(groups * scheme.group_size, 1),)),
        "scales": (torch.int16, (rows, groups, 4)),
    }


def _spread(values: Values) -> Values:
    small, large = binary.magnitudes_of(values["scale"].unsqueeze(-2), values["salient"].bool())
    return {"small": small, "large": large}


def _magnitudes(values: Values) -> tuple[Tensor, Tensor]:
    found = values if "small" in values else _spread(values)
    return found["small"], found["large"]


def _encode(x: Tensor, values: Values, scheme: Scheme) -> tuple[Tensor, Tensor]:
    negative, second, decoded = binary.encode(x, *_magnitudes(values))
    return negative | (second << 1), decoded


def _decode(codes: Tensor, values: Values, scheme: Scheme) -> Tensor:
    small, large = _magnitudes(values)
    value = torch.where((codes & 2).bool(), large, small)
    return torch.where((codes & 1).bool(), -value, value)


def _through(latent: Tensor, values: Values, scheme: Scheme) -> Tensor:
    small, large = _magnitudes(values)
    return round_to_magnitudes(latent, small.expand_as(latent), large.expand_as(latent))


def _step(values: Values, scheme: Scheme) -> Tensor:
    return values["scale"][..., :2].mean(dim=-1, keepdim=True)


def _neighbours(x: Tensor, values: Values, scheme: Scheme) -> tuple[Tensor, Tensor]:
    step = _step(values, scheme).abs()
    return x - step, x + step


def _formula(scheme: Scheme) -> Formula:
    """A code's third bit is that of its column: salient or not."""
    planes = (*_CODES.planes, Plane("salient", 1, shared=True))
    return Formula(planes, (1.0, -1.0) * 4, lambda values: Terms(_four_magnitudes(values["scale"])))


def _four_magnitudes(scale: Tensor) -> Tensor:
    """The smaller and the larger magnitude outside salient columns, then those inside them, `(..., 4)`."""
    both = [
        binary.magnitudes_of(scale, torch.full_like(scale[..., 0], salient, dtype=torch.bool)) for salient in (0, 1)
    ]
    return torch.stack([magnitude for pair in both for magnitude in pair], dim=-1)


def _refuses(scheme: Scheme) -> str | None:
    return None if scheme.bits == 1 and not scheme.has_outliers else "bits or outliers of a binary grid"


BINARY = Grid(
    "binary",
    "a sign and one of two magnitudes, as in BiLLM",
    codes=lambda scheme: _CODES,
    layout=_layout,
    fit=_fit,
    settle=_settle,
    restore=_settle,
    read=_read,
    encode=_encode,
    round=lambda x, values, scheme: binary.encode(x, *_magnitudes(values))[2],
    decode=_decode,
    through=_through,
    step=_step,
    neighbours=_neighbours,
    widths=(1,),
    refuses=_refuses,
    spread=_spread,
    by_column=("small", "large"),
    joins_rows=True,
    block_by_block=True,
    formula=_formula,
)
