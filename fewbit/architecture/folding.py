"""What feeds a linear layer, so that a channel can be made larger before it and smaller after it, or the reverse.

Found by trying, with no list of architectures: if dividing a candidate's output channels by some factors and
multiplying the layers' input columns by the same leaves what a block adds unchanged, then the candidate feeds those
layers and nothing else. The trial runs in float32 with factors of 1 and 2.
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

    offset: what a norm adds to its stored gain, 0 or 1.
    """

    module: nn.Module
    site: Site | None = None
    offset: float = 0.0

    def divide(self, factors: Tensor) -> Tensor:
        """Divide its output channels by `factors` `(channels,)`; returns the factors that rounding left, float32."""
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
    """The norm or linear layer of `block` that feeds exactly the `consumers`; None where there is none.

    others: the linear layers of the block that may feed them. run: what the block, in float32, adds to some sample.
    The block is left as it was.
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
            # Token by token: one massive activation would hide what happens to all others.
            if bool(((found - expected).norm(dim=-1) <= _SAME * expected.norm(dim=-1)).all()):
                return feeder
    return None


@contextmanager
def in_float32(block: nn.Module) -> Iterator[None]:
    """Float32 copies of a block's parameters while inside; afterwards it has its own again, untouched."""
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
    """Length of a module's `weight` where that is a vector, as a norm's is."""
    weight = getattr(module, "weight", None)
    return weight.numel() if isinstance(weight, nn.Parameter) and weight.dim() == 1 else None
