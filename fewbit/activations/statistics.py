"""Statistics of a layer's inputs, collected call by call: moments, extremes, and a histogram for quantiles.

Their size does not grow with the number of tokens. The histogram counts the upper 16 bits of a magnitude's float32
pattern. For bfloat16 inputs these are the exact number; for others they are within 1 % of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_PATTERNS = 1 << 15


@dataclass
class InputStatistics:
    """Sums over the inputs `(tokens, in)` of one site.

    low, high: extremes of every channel, float32 `(in,)`. squares: sum of squares of every channel, float64 `(in,)`.
    powers: sums of x, x^2, x^3 and x^4 over all entries, float64 `(4,)`. counts: histogram of magnitudes, int64.
    """

    tokens: int
    low: Tensor
    high: Tensor
    squares: Tensor
    powers: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, channels: int) -> "InputStatistics":
        """Statistics without any inputs yet."""
        return cls(
            0,
            torch.full((channels,), float("inf")),
            torch.full((channels,), float("-inf")),
            torch.zeros(channels, dtype=torch.float64),
            torch.zeros(4, dtype=torch.float64),
            torch.zeros(_PATTERNS, dtype=torch.int64),
        )

    def add(self, x: Tensor) -> None:
        """Add inputs `(tokens, in)` of any floating-point dtype, on any device."""
        if x.shape[0] == 0:
            return
        self.tokens += x.shape[0]
        self.counts += _histogram(x).cpu()
        x = x.detach().float()
        self.low = torch.minimum(self.low, x.amin(dim=0).cpu())
        self.high = torch.maximum(self.high, x.amax(dim=0).cpu())
        squared = x.square()
        by_channel = squared.sum(dim=0).double()
        self.squares += by_channel.cpu()
        third, fourth = (squared * x).sum(dim=0).double(), squared.square().sum(dim=0).double()
        sums = torch.stack([x.sum(dim=0).double().sum(), by_channel.sum(), third.sum(), fourth.sum()])
        self.powers += sums.cpu()

    @property
    def largest(self) -> Tensor:
        """Largest magnitude of every channel `(in,)`; 0 if there were no inputs."""
        if not self.tokens:
            return torch.zeros_like(self.high)
        return torch.maximum(self.high, -self.low).clamp(min=0.0)

    @property
    def rms(self) -> Tensor:
        """Root mean square of every channel, float64 `(in,)`."""
        return (self.squares / max(self.tokens, 1)).sqrt()

    @property
    def kurtosis(self) -> float:
        """``E[(x - m)^4] / E[(x - m)^2]^2`` over all entries: 3 for a normal distribution."""
        entries = self.tokens * self.squares.numel()
        first, second, third, fourth = (self.powers / max(entries, 1)).tolist()
        variance = second - first**2
        central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        return central / variance**2 if variance > 0 else 0.0

    def quantile(self, share: float) -> float:
        """The smallest magnitude that a fraction of at least `share` of all entries do not exceed."""
        total = int(self.counts.sum())
        if not total:
            return 0.0
        # A float such as 0.999 is not exact; without the tolerance, the count could be one too high.
        wanted = -int(-(share * total - 1e-6) // 1)
        pattern = int(torch.searchsorted(self.counts.cumsum(0), max(wanted, 1)))
        return float(torch.tensor([pattern << 16], dtype=torch.int32).view(torch.float32))


def _histogram(x: Tensor) -> Tensor:
    x = x.detach().contiguous()
    if x.dtype == torch.bfloat16:
        bits = x.view(torch.int16).reshape(-1) & 0x7FFF
    else:
        bits = (x.float().view(torch.int32).reshape(-1) >> 16) & 0x7FFF
    return torch.bincount(bits, minlength=_PATTERNS)


@dataclass
class InputRanges:
    """Extremes of the inputs of one site: over all tokens, and at each position of a sequence.

    lows, highs: float32 `(length,)`. positions: False if a call did not contain exactly one whole sequence, as with
    experts; then only the range over all tokens is known.
    """

    lows: Tensor
    highs: Tensor
    positions: bool = True
    low: float = float("inf")
    high: float = float("-inf")

    @classmethod
    def empty(cls, length: int) -> "InputRanges":
        """Ranges without any inputs yet, for sequences of `length` tokens."""
        return cls(torch.full((length,), float("inf")), torch.full((length,), float("-inf")))

    def add(self, x: Tensor) -> None:
        """Add one sequence's inputs `(tokens, in)`."""
        if x.shape[0] == 0:
            return
        low, high = x.detach().amin(dim=1).float().cpu(), x.detach().amax(dim=1).float().cpu()
        self.low, self.high = min(self.low, float(low.min())), max(self.high, float(high.max()))
        if x.shape[0] != self.lows.numel():
            self.positions = False
            return
        self.lows, self.highs = torch.minimum(self.lows, low), torch.maximum(self.highs, high)

    def at(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Extremes at each of the first `tokens` positions, `(tokens, 1)`.

        Beyond the measured length, these are the extremes over all positions except the first, whose activations can
        be massive. If positions are not known, they are the extremes over all tokens.
        """
        if not self.positions:
            return torch.full((tokens, 1), self.low), torch.full((tokens, 1), self.high)
        rest = slice(1, None) if self.lows.numel() > 1 else slice(None)
        low = self.lows[rest].min().expand(tokens).clone()
        high = self.highs[rest].max().expand(tokens).clone()
        known = min(tokens, self.lows.numel())
        low[:known], high[:known] = self.lows[:known], self.highs[:known]
        return low.unsqueeze(1), high.unsqueeze(1)
