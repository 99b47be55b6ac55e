"""Compute the factor of a curvature matrix that the column solver needs, with increasing damping if necessary.

The solver needs U, upper triangular, with ``H^-1 = U^T U`` (OPTQ, arXiv 2210.17323, section 3.3). If P reverses the
order of the columns and ``P H P = L L^T``, U is the inverse of ``P L P``. This takes one Cholesky factorisation and one
triangular inverse; H itself is never inverted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_LADDER = (1.0, 10.0, 100.0)
_FLOAT64_UP_TO = 4096


@dataclass(frozen=True)
class Factor:
    """The factor of a damped curvature.

    upper: U, float32 `(in, in)`. damping: the relative damping that was used. step: how often it was raised.
    """

    upper: Tensor
    damping: float
    step: int


def prepare(curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Scale a curvature `(in, in)` to a mean diagonal of 1 over its live columns; returns it and the mask of dead ones.

    A column is dead if its diagonal is 0: its input was always 0. It gets a diagonal of 1 and is 0 elsewhere, so that
    the solver rounds it without compensation. The scale of a curvature does not affect the solver, but float32 sums of
    gradients can be so small that their products underflow.
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
    """U of a curvature from :func:`prepare` (in the solver's column order), or None if no damping gives a factor.

    `damping` is relative to the mean diagonal. If the factorisation fails, 10 and 100 times as much are tried.
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
