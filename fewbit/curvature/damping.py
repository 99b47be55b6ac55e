"""From a curvature matrix to the factor that the column solver runs on, with a ladder of dampings.

The solver needs U, upper triangular, with ``H^-1 = U^T U`` (OPTQ, arXiv 2210.17323, section 3.3). With P the reversal
of the columns and ``P H P = L L^T``, U is the inverse of ``P L P``: one Cholesky factorisation and one triangular
inverse, and H itself is never inverted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_LADDER = (1.0, 10.0, 100.0)
_FLOAT64_UP_TO = 4096


@dataclass(frozen=True)
class Factor:
    """upper: U, float32 `(in, in)`. damping: the relative one that worked. step: its place on the ladder, from 0."""

    upper: Tensor
    damping: float
    step: int


def prepare(curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Scale a curvature `(in, in)` to a mean diagonal of 1 over its live columns; returns it and the mask of dead ones.

    A column is dead when its diagonal is 0: its input was never active. It gets a diagonal of 1 and no ties to
    others, so that the solver rounds it plainly. The scale of a curvature means nothing to the solver, but float32
    sums of gradients can be so small that their products underflow.
    """
    matrix = curvature.to(torch.float64)
    diagonal = matrix.diagonal()
    dead = ~(diagonal > 0)
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    matrix = matrix / mean
    matrix[dead, :] = 0.0
    matrix[:, dead] = 0.0
    matrix.diagonal()[dead] = 1.0
    return matrix, dead


def factor(prepared: Tensor, damping: float) -> Factor | None:
    """U of a curvature from :func:`prepare` (in the solver's column order), or None when no step of the ladder works.

    `damping` is relative to the mean diagonal; a failed factorisation tries 10 and 100 times as much.
    """
    size = prepared.shape[0]
    dtype = torch.float64 if size <= _FLOAT64_UP_TO else torch.float32
    matrix = prepared.to(dtype)
    mean = float(matrix.diagonal().mean())
    for step, times in enumerate(_LADDER):
        used = damping * times
        damped = matrix.clone()
        damped.diagonal().add_(used * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(failed) == 0:
            reversed_upper = lower.flip(0, 1)
            identity = torch.eye(size, dtype=dtype, device=matrix.device)
            upper = torch.linalg.solve_triangular(reversed_upper, identity, upper=True).to(torch.float32)
            if bool(torch.isfinite(upper).all()) and bool((upper.diagonal() > 0).all()):
                return Factor(upper, used, step)
    return None
