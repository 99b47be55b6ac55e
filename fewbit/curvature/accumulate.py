"""Accumulate curvatures from the inputs and output gradients of watched layers. All sums are float32, `(in, in)`.

gram: ``sum_t x_t x_t^T``, the Hessian of a layer's squared output error, without its factor 2.
fisher with sequence terms: ``sum_i G_i^T G_i``, where ``G_i = sum_t delta_t x_t^T`` is the gradient of the loss of one
sequence (OAC, arXiv 2405.15025): the cost of an error at the model's output.
fisher with token terms: ``sum_t |delta_t|^2 x_t x_t^T``, the same without the terms between tokens. If the
contributions of different tokens are independent, those terms are noise with mean 0.
fisher with a share s of the Gram: ``F + rho G`` with ``rho = s / (1 - s) tr(F) / tr(G)``, accumulated as one matrix.
Each call is weighted with the rho of all calls up to and including it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbit.curvature.choice import CurvatureChoice
from fewbit.curvature.products import products
from fewbit.errors import FewbitError

_ADVICE = "run the model in float32 or bfloat16"
_TALL = 16
"""Of a layer with so many times as many outputs as inputs, which is a head, the gradient matrix is not formed."""
_AT_ONCE = 1 << 24


@dataclass
class Accumulator:
    """Sums by layer; read them with :meth:`curvature`.

    Only Gram sums are computed in parts (:meth:`another`, :meth:`add`): a Fisher processes its sequences one by one.

    shared: layer -> the layer with the same inputs whose Gram it uses.
    tokens: number of tokens by layer; for fisher, only those whose gradient is not 0 (it is 0 for the last token of a
    sequence). live: for fisher, mask of the columns that were not 0 for at least one token, other than the last of a
    sequence. length: for fisher, tokens per sequence. For a call with another number of rows (an expert, whose tokens
    come in any order), `live` counts the tokens with a gradient instead. largest: for a Gram with `with_largest`, the
    largest magnitude of each input `(in,)`, by layer.
    """

    choice: CurvatureChoice
    with_largest: bool = False
    sums: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    live: dict[str, Tensor] = field(default_factory=dict)
    largest: dict[str, Tensor] = field(default_factory=dict)
    length: int = 0
    _traces: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _last: tuple[str, Tensor] | None = None

    def observe(self, key: str, x: Tensor, gradient: Tensor | None) -> None:
        """Add one call of a layer: its inputs `(tokens, in)` and, for fisher, its output gradients `(tokens, out)`."""
        if gradient is not None:
            self._observe_fisher(key, x, gradient)
            return
        self.tokens[key] = self.tokens.get(key, 0) + x.shape[0]
        if x.shape[0] == 0:
            return
        if self._last is not None and self._last[1].data_ptr() == x.data_ptr() and self._last[1].shape == x.shape:
            self.shared[key] = self._last[0]
            return
        self._last = (key, x)
        if self.with_largest:
            self._add_largest(key, x.abs().amax(dim=0).float())
        self._add(key, self._tempered(x).to(torch.float32), x.dtype)

    def _observe_fisher(self, key: str, x: Tensor, gradient: Tensor) -> None:
        norms = _norms(gradient)
        felt = norms > 0
        count = int(felt.sum())
        self.tokens[key] = self.tokens.get(key, 0) + count
        # As a matrix product, because comparing every input takes as long as computing the curvature.
        judged = felt
        if x.shape[0] == self.length:
            judged = torch.ones_like(felt)
            judged[-1] = False
        active = (judged.to(x.dtype).t() @ x.abs()).view(-1) > 0
        self.live[key] = self.live[key] | active if key in self.live else active
        if not count:
            return
        precision, x = x.dtype, self._tempered(x)
        if self.choice.terms == "sequence" and gradient.shape[1] >= _TALL * x.shape[1]:
            self._observe_tall(key, x, gradient)
        elif self.choice.terms == "sequence":
            with products(precision):
                whole = gradient.float().t() @ x.float()
            if self.choice.gram_share:
                rho = self._rho(key, whole.square().sum(), _squares(x).sum())
                whole = torch.cat([whole, x.float() * rho.sqrt()])
            self._add(key, whole, precision)
        elif self.choice.gram_share:
            weights, squares = norms.square().view(-1), _squares(x)
            rho = self._rho(key, weights @ squares, squares.sum())
            self._add(key, x * (weights + rho).sqrt().unsqueeze(1), precision)
        else:
            self._add(key, x * norms, precision)

    def _observe_tall(self, key: str, x: Tensor, gradient: Tensor) -> None:
        """The sequence term ``G^T G`` as ``X^T (D D^T) X``, with `(tokens, tokens)` in memory, not `(out, in)`."""
        precision, x = x.dtype, x.float()
        with products(precision):
            between = torch.zeros(gradient.shape[0], gradient.shape[0], device=x.device)
            for part in gradient.split(max(1, _AT_ONCE // gradient.shape[0]), dim=1):
                between.addmm_(part.float(), part.float().t())
            whole = between @ x
        if self.choice.gram_share:
            whole += x * self._rho(key, (whole * x).sum(), _squares(x).sum())
        self._add(key, x, precision, whole)

    def _rho(self, key: str, fisher: Tensor, gram: Tensor) -> Tensor:
        """The weight rho of the Gram, after adding the traces of one call to those of the calls before."""
        if key in self._traces:
            fisher, gram = self._traces[key][0] + fisher, self._traces[key][1] + gram
        self._traces[key] = fisher, gram
        share = self.choice.gram_share
        return share / (1 - share) * fisher / gram.clamp(min=1e-30)

    def _tempered(self, x: Tensor) -> Tensor:
        """Inputs `(tokens, in)`, each token's divided by a power of its norm."""
        if not self.choice.tempering:
            return x
        x = x.to(torch.float32)
        return x / x.norm(dim=1, keepdim=True).clamp(min=1e-20).pow(self.choice.tempering)

    def another(self) -> "Accumulator":
        """An empty accumulator for the same curvature, to be used for a part of the sequences."""
        return Accumulator(self.choice, self.with_largest)

    def add(self, other: "Accumulator") -> None:
        """Add the sums of another part of the sequences."""
        self.shared.update(other.shared)
        for key, found in other.sums.items():
            self.sums[key] = self.sums[key] + found if key in self.sums else found
        for key, count in other.tokens.items():
            self.tokens[key] = self.tokens.get(key, 0) + count
        for key, live in other.live.items():
            self.live[key] = self.live[key] | live if key in self.live else live
        for key, largest in other.largest.items():
            self._add_largest(key, largest)

    def largest_inputs(self, key: str) -> Tensor | None:
        """The largest magnitude of each input `(in,)` of a layer; None if it never ran, or they were not measured."""
        return self.largest.get(self.shared.get(key, key))

    def curvature(self, key: str) -> Tensor | None:
        """The complete curvature of a layer, or None if it never ran (an expert that no token reached).

        Raises FewbitError if an input Gram is not finite, because the layer's inputs were not.
        """
        matrix = self.sums.get(self.shared.get(key, key))
        if matrix is not None and not self.choice.source.gradients:
            diagonal = matrix if matrix.dim() == 1 else matrix.diagonal()
            if not bool(torch.isfinite(diagonal).all()):
                raise FewbitError(
                    f"{key}: its inputs contain NaN or infinity: save the model in bfloat16 or float32 first (float16 "
                    "overflows in many models that were trained in bfloat16); otherwise its weights are damaged"
                )
        half = 0 if matrix is None or matrix.dim() == 1 else _half(matrix.shape[0])
        if matrix is not None and half:
            # The sums may be inference tensors, which can be changed in place only in inference mode.
            with torch.inference_mode():
                matrix[half:, :half] = matrix[:half, half:].t()
        return matrix

    def check_gradients(self) -> None:
        """Raise FewbitError if gradients underflowed: all of a layer's, or those of a column that was active.

        With a share of the Gram, the diagonal is not 0 in an active column, so only the loss of all gradients is found.
        """
        for key, live in self.live.items():
            # In a sequence of two tokens, only the first has a target. It attends only to itself, so the gradients of
            # its query and key are 0.
            if not self.tokens[key] and self.length != 2 and bool(live.any()):
                raise FewbitError(f"{key}: its gradients are all 0 although it had inputs: {_ADVICE}")
            matrix = self.sums.get(key)
            diagonal = None if matrix is None else matrix if matrix.dim() == 1 else matrix.diagonal()
            if diagonal is not None and bool((live & ~(diagonal > 0)).any()):
                lost = int((live & ~(diagonal > 0)).sum())
                raise FewbitError(f"{key}: the gradients of {lost} active columns underflowed to 0: {_ADVICE}")
        if self.live and not any(self.tokens.values()):
            raise FewbitError(f"{next(iter(self.live))}: its gradients are all 0 although it had inputs: {_ADVICE}")

    def _add_largest(self, key: str, largest: Tensor) -> None:
        self.largest[key] = torch.maximum(self.largest[key], largest) if key in self.largest else largest

    def _add(self, key: str, rows: Tensor, precision: torch.dtype, others: Tensor | None = None) -> None:
        """Add ``R^T R``, or ``R^T O``, which must be symmetric, of rows and others `(any, in)`."""
        others = rows if others is None else others
        if self.choice.diagonal:
            squares = (rows.square() if others is rows else rows * others).sum(dim=0)
            self.sums[key] = self.sums[key].add_(squares) if key in self.sums else squares
            return
        found = self.sums.get(key)
        with products(precision):
            half = _half(rows.shape[1])
            if found is None:
                self.sums[key] = rows.t() @ others
            elif not half:
                found.addmm_(rows.t(), others)
            else:
                left, right = rows[:, :half], rows[:, half:]
                found[:half].addmm_(left.t(), others)
                found[half:, half:].addmm_(right.t(), others[:, half:])


def _norms(gradient: Tensor) -> Tensor:
    """Norms of the rows, `(tokens, 1)` float32; of a head's gradients a few rows at a time, as each is converted."""
    parts = gradient.split(max(1, _AT_ONCE // max(1, gradient.shape[1])))
    norms = [torch.linalg.vector_norm(part, dim=1, keepdim=True, dtype=torch.float32) for part in parts]
    return torch.cat(norms)


def _squares(x: Tensor) -> Tensor:
    """Squared norms of the rows, float32."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).square()


def _half(columns: int) -> int:
    """The column at which a symmetric sum is split into quarters.

    The lower left quarter is the transpose of the upper right one, so it is not accumulated. 0 if the products of the
    other quarters are not faster than one whole product.
    """
    return columns // 128 * 64 if columns >= 1024 else 0
