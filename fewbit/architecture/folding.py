"""Find the module that produces the inputs of linear layers, so that channel scales can be folded into it.

It is found by trial, without a list of architectures. A candidate's output channels are divided by some factors, and
the input columns of the layers are multiplied by the same factors. If the change that the block makes to a sample stays
the same, the candidate feeds those layers and nothing else. The trial runs in float32 with factors of 1 and 2.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewbit.architecture.network import Site

_SAME = 1e-3


@dataclass(frozen=True)
class Feeder:
    """A norm, or a linear layer given by its site, whose outputs are the inputs of some layers.

    offset: the number that a norm adds to its stored gain, 0 or 1.
    """

    module: nn.Module
    site: Site | None = None
    offset: float = 0.0

    def divide(self, factors: Tensor) -> Tensor:
        """Divide its output channels by `factors` `(channels,)`; returns the factors after rounding, float32."""
        with torch.no_grad():
            if self.site is not None:
                self.site.write(self.site.read().float() / factors.unsqueeze(1))
                left = factors
            else:
                weight = self.module.weight
                assert isinstance(weight, Tensor)
                gain = weight.float() + self.offset
                weight.copy_(gain / factors - self.offset)
                now = weight.float() + self.offset
                left = torch.where(now == 0, torch.ones_like(gain), gain / torch.where(now == 0, 1.0, now))
            bias = getattr(self.module, "bias", None)
            if isinstance(bias, Tensor):
                bias.copy_(bias.float() / left)
        return left


def find_feeder(
    block: nn.Module, consumers: Sequence[Site], others: Sequence[Site], run: Callable[[], Tensor]
) -> Feeder | None:
    """The norm or linear layer of `block` that feeds exactly the `consumers`, or None.

    others: the linear layers of the block that may feed them. run: the change that the block, in float32, makes to some
    sample. The block is unchanged afterwards.
    """
    columns = consumers[0].columns
    with in_float32(block):
        expected = run()
        factors = torch.ones(columns, device=expected.device)
        factors[::2] = 2.0
        for feeder in _candidates(block, consumers, others, columns):
            with in_float32(block):
                left = feeder.divide(factors)
                for consumer in consumers:
                    consumer.write(consumer.read() * left)
                found = run()
            # Compared token by token: one massive activation would hide the changes of all others.
            if bool(((found - expected).norm(dim=-1) <= _SAME * expected.norm(dim=-1)).all()):
                return feeder
    return None


@contextmanager
def in_float32(block: nn.Module) -> Iterator[None]:
    """While inside, a block's parameters are float32 copies; afterwards it has its own, unchanged parameters again."""
    before = [(parameter, parameter.data) for parameter in block.parameters()]
    try:
        for parameter, data in before:
            parameter.data = data.to(torch.float32, copy=True)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


def _candidates(block: nn.Module, consumers: Sequence[Site], others: Sequence[Site], columns: int) -> list[Feeder]:
    inside = {id(site.watched.module) for site in [*consumers, *others]}
    norms = [module for module in block.modules() if id(module) not in inside and _gain_size(module) == columns]
    names = {consumer.tensor.entry.name for consumer in consumers}
    linear = [
        Feeder(site.watched.module, site)
        for site in others
        if site.rows == columns and site.tensor.entry.name not in names and site.watched.expert is None
    ]
    return [Feeder(norm, offset=offset) for norm in norms for offset in (0.0, 1.0)] + linear


def _gain_size(module: nn.Module) -> int | None:
    """Length of a module's `weight` if that is a vector, as in a norm; otherwise None."""
    weight = getattr(module, "weight", None)
    return weight.numel() if isinstance(weight, nn.Parameter) and weight.dim() == 1 else None
