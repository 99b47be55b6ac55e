"""Sums that a curvature is made of, from what the watched layers see. All sums are float32, `(in, in)`.

gram: ``sum_t x_t x_t^T``, the Hessian of a layer's squared output error (up to its factor 2).
fisher, a whole sequence: ``sum_i G_i^T G_i`` with ``G_i = sum_t delta_t x_t^T`` the gradient of one sequence's loss
(OAC, arXiv 2405.15025): what an error costs at the model's output.
fisher, tokens: ``sum_t |delta_t|^2 x_t x_t^T``, the same without the terms between tokens, which are noise around 0
where the contributions of different tokens are independent.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbit.curvature.choice import CurvatureChoice


@dataclass
class Accumulator:
    """Sums by layer. shared: layers that see the very same inputs -> the one whose Gram they use."""

    choice: CurvatureChoice
    sums: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    _last: tuple[str, Tensor] | None = None

    def observe(self, key: str, x: Tensor, gradient: Tensor | None) -> None:
        """Add one call of a layer: inputs `(tokens, in)` and, for fisher, output gradients `(tokens, out)`."""
        self.tokens[key] = self.tokens.get(key, 0) + x.shape[0]
        if x.shape[0] == 0:
            return
        if self.choice.kind == "fisher":
            assert gradient is not None
            if self.choice.terms == "sequence":
                self._add(key, (gradient.t() @ x).to(torch.float32))
                return
            self._add(key, x * gradient.float().norm(dim=1, keepdim=True))
            return
        if self._last is not None and self._last[1].data_ptr() == x.data_ptr() and self._last[1].shape == x.shape:
            self.shared[key] = self._last[0]
            return
        self._last = (key, x)
        self._add(key, x.to(torch.float32))

    def curvature(self, key: str) -> Tensor | None:
        """The sum of a layer, or None when it never ran (an expert that saw no token)."""
        return self.sums.get(self.shared.get(key, key))

    def _add(self, key: str, rows: Tensor) -> None:
        if self.choice.tempering:
            rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-20).pow(self.choice.tempering)
        if self.choice.diagonal:
            squares = rows.square().sum(dim=0)
            self.sums[key] = self.sums[key].add_(squares) if key in self.sums else squares
            return
        found = self.sums.get(key)
        if found is None:
            self.sums[key] = rows.t() @ rows
        else:
            found.addmm_(rows.t(), rows)
