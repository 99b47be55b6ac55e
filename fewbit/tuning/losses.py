"""Losses on logits, with their gradients in closed form, a few tokens at a time.

nll: ``-log q(target)``, gradient ``q - onehot(target)``.
kd: ``KL(p || q)`` of the original's prediction p. Of p the `k` most likely tokens K are kept, and the rest's mass
``p_r``; so the divergence is between the k tokens and one bucket for all others: ``sum_K p_i log(p_i / q_i) +
p_r log(p_r / q_r)``. Its gradient is ``q_j - p_j`` in K and ``q_j (1 - p_r / q_r)`` outside.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.memory import rows_at_once

_TINY = 1e-12
_SMALLEST = 1e-37


@dataclass(frozen=True)
class Prediction:
    """The original's prediction of each token: `indices` int32 and `log_probabilities` float, `(..., tokens, k)`.

    With all of a vocabulary kept, `indices` is None.
    """

    log_probabilities: Tensor
    indices: Tensor | None = None

    def __getitem__(self, where: Any) -> "Prediction":
        return Prediction(self.log_probabilities[where], None if self.indices is None else self.indices[where])

    def to(self, device: torch.device) -> "Prediction":
        """On a device."""
        return Prediction(self.log_probabilities.to(device), None if self.indices is None else self.indices.to(device))

    def flat(self) -> "Prediction":
        """All tokens in one row."""
        kept = self.log_probabilities.shape[-1]
        indices = None if self.indices is None else self.indices.reshape(-1, kept)
        return Prediction(self.log_probabilities.reshape(-1, kept), indices)


def predict(logits: Tensor, top: int) -> Prediction:
    """What is kept of logits `(..., tokens, vocabulary)`: the `top` most likely tokens, or (0) everything."""
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    if not top or top >= logits.shape[-1]:
        return Prediction(log_probabilities)
    values, indices = log_probabilities.topk(top, dim=-1)
    return Prediction(values, indices.to(torch.int32))


def mean_loss(logits: Tensor, targets: Tensor, prediction: Prediction | None, loss: str) -> Tensor:
    """Mean loss of a token: logits `(tokens, vocabulary)` predict `targets` `(tokens,)`; loss: nll, kd or nll+kd."""
    result = _Loss.apply(logits, targets, prediction, loss)
    assert isinstance(result, Tensor)
    return result


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, logits: Tensor, targets: Tensor, prediction: Prediction | None, loss: str) -> Tensor:
        gradient = torch.empty_like(logits)
        total, count = 0.0, targets.numel()
        at_once = rows_at_once(logits)
        for first in range(0, count, at_once):
            part = slice(first, first + at_once)
            log_q = torch.log_softmax(logits[part].float(), dim=-1)
            sums = torch.zeros_like(log_q)
            if "nll" in loss:
                total += _add_nll(log_q, targets[part], sums)
            if "kd" in loss:
                assert prediction is not None
                total += _add_kd(log_q, prediction[part], sums)
            gradient[part] = sums.div_(count)
        context.save_for_backward(gradient)
        return torch.tensor(total / count, device=logits.device)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = context.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None


def _add_nll(log_q: Tensor, targets: Tensor, gradient: Tensor) -> float:
    wanted = targets.unsqueeze(1)
    gradient.add_(log_q.exp())
    gradient.scatter_add_(1, wanted, torch.full_like(wanted, -1.0, dtype=gradient.dtype))
    return -float(log_q.gather(1, wanted).sum())


def _add_kd(log_q: Tensor, prediction: Prediction, gradient: Tensor) -> float:
    log_p = prediction.log_probabilities.float()
    q = log_q.exp()
    if prediction.indices is None:
        p = log_p.exp()
        gradient.add_(q).sub_(p)
        return float((p * (log_p - log_q)).sum())
    kept = prediction.indices.long()
    p, q_kept = log_p.exp(), q.gather(1, kept)
    p_rest = (1.0 - p.sum(dim=1, keepdim=True)).clamp(min=0.0)
    # Summed from what is there: 1 less the kept ones would be noise where they have nearly all of it.
    q_rest = q.scatter_(1, kept, 0.0).sum(dim=1, keepdim=True).clamp(min=_SMALLEST)
    inside = (p * (log_p - log_q.gather(1, kept))).sum()
    outside = (p_rest * ((p_rest.clamp(min=_TINY)).log() - q_rest.log())).sum()
    gradient.add_(q.mul_(1.0 - p_rest / q_rest).scatter_(1, kept, q_kept - p))
    return float(inside + outside)
