"""Output Fisher: forward and backward passes, one gradient per sequence, with activation checkpointing of blocks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewbit.attention import fast_attention
from fewbit.curvature.accumulate import Accumulator
from fewbit.curvature.choice import CurvatureChoice
from fewbit.curvature.observe import Watched, watching
from fewbit.memory import rows_at_once

Step = Callable[[int, int], None]


def measure_fisher(
    model: Any,
    blocks: Sequence[nn.Module],
    layers: list[Watched],
    ids: Tensor,
    choice: CurvatureChoice,
    step: Step | None = None,
    recompute: bool = True,
) -> tuple[Accumulator, float]:
    """Fisher sums of `layers` over the sequences `ids` `(samples, length)`, and the mean loss in nats per token.

    blocks: the decoder blocks from the first that contains one of the layers; the backward pass ends there. recompute:
    blocks keep only their inputs and are run again in the backward pass, so that memory does not grow with depth times
    length. The loss is summed over a sequence, so that 16-bit gradients do not underflow. step(done, total) is called
    after every sequence.
    """
    accumulator = Accumulator(choice, length=ids.shape[1])
    generator = torch.Generator().manual_seed(0)
    total, tokens = 0.0, 0
    seen = watching(layers, accumulator.observe, backward=True)
    # The model is included, so that blocks before the first of `blocks` use the same attention.
    with _frozen(model), fast_attention([model, *blocks]), _begun(blocks, recompute), seen:
        for index, sequence in enumerate(ids):
            logits = model(sequence[None].to(model.device), use_cache=False).logits[0, :-1]
            gradient, loss = _loss_gradient(logits.detach(), sequence[1:], choice.labels, generator)
            logits.backward(gradient)
            total, tokens = total + loss, tokens + gradient.shape[0]
            if step:
                step(index + 1, ids.shape[0])
    return accumulator, total / max(tokens, 1)


def _loss_gradient(logits: Tensor, targets: Tensor, labels: str, generator: torch.Generator) -> tuple[Tensor, float]:
    """d(summed cross-entropy)/d(logits) in the logits' dtype, and the summed loss; computed a few tokens at a time."""
    gradient = torch.empty_like(logits)
    loss = 0.0
    targets = targets.to(logits.device)
    at_once = rows_at_once(logits)
    for first in range(0, targets.numel(), at_once):
        part = slice(first, first + at_once)
        log_probabilities = torch.log_softmax(logits[part].float(), dim=-1)
        loss -= float(log_probabilities.gather(1, targets[part, None]).double().sum())
        probabilities = log_probabilities.exp_()
        wanted = targets[part, None]
        if labels == "sampled":
            wanted = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(logits.device)
        probabilities.scatter_add_(1, wanted, torch.full_like(wanted, -1.0, dtype=torch.float32))
        gradient[part] = probabilities.to(logits.dtype)
    return gradient, loss


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """While inside, no parameter requires a gradient."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def _begun(blocks: Sequence[nn.Module], recompute: bool) -> Iterator[None]:
    """The autograd graph begins at the first block's input; with `recompute`, every block is checkpointed."""
    try:
        for index, block in enumerate(blocks):
            block.forward = _Block(block.forward, first=index == 0, recompute=recompute)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


class _Block:
    def __init__(self, forward: Any, first: bool, recompute: bool) -> None:
        self._forward, self._first, self._recompute = forward, first, recompute

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._first:
            hidden = hidden.detach().requires_grad_(True)
        if not self._recompute:
            return self._forward(hidden, *args, **kwargs)
        return checkpoint(self._forward, hidden, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
