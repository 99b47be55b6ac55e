"""What quantizing one layer does by itself, and what that should do to the loss: one number each."""

from dataclasses import dataclass

from torch import Tensor

from fewbit.curvature.cost import curvature_cost


@dataclass(frozen=True)
class Fisher:
    """A layer's output Fisher ``sum_t |delta_t|^2 x_t x_t^T`` `(in, in)` and the tokens whose losses it sums over."""

    matrix: Tensor
    tokens: int


def weight_error(original: Tensor, quantized: Tensor) -> tuple[float, float]:
    """``|Q - W|^2`` and ``|W|^2`` of weights `(out, in)`."""
    difference = (quantized - original).double()
    return float(difference.square().sum()), float(original.double().square().sum())


def output_error(original: Tensor, quantized: Tensor, gram: Tensor) -> float:
    """``|WX - QX|^2 / |WX|^2`` from the Gram ``X X^T`` `(in, in)` of the layer's inputs; 0 where the output is 0."""
    whole = curvature_cost(original, gram)
    return curvature_cost(quantized - original, gram) / whole if whole > 0 else 0.0


def predicted_increase(original: Tensor, quantized: Tensor, fisher: Fisher) -> float:
    """Nats a token: ``1/2 tr(dW F dW^T)`` with the Fisher of a mean row and a mean token.

    The measured matrix sums the outer products of all `out` rows' gradients (OAC, arXiv 2405.15025, shares it between
    the rows), so a row's own is on average `1/out` of it. Summed over layers this is the second-order term of the loss
    where layers and rows are independent, exact in expectation for errors that are independent of the gradients.
    """
    cost = curvature_cost(quantized - original, fisher.matrix)
    return cost / (2 * original.shape[0] * fisher.tokens)
