"""The choice of how the inputs of linear layers are rounded, together with their weights."""

from dataclasses import dataclass

from fewbit.errors import FewbitError

GRANULARITIES = ("tensor", "token")
RANGES = ("static", "dynamic")
SMOOTHED = ("norms", "all")


@dataclass(frozen=True)
class ActivationChoice:
    """How inputs are rounded: W8A8 and its variants.

    granularity: tensor, one range for all tokens, or token, one for each token. ranges: static, measured on calibration
    text (with granularity token: one for each position in the sequence), or dynamic, measured on the inputs that are
    rounded. symmetric: the grid is symmetric around 0; otherwise it has a zero-point. bits, weight_bits: 2 to 8;
    weights have one symmetric scale per output channel. exponent: SmoothQuant's alpha (arXiv 2211.10438), how much of
    the difference between channels moves from the inputs into the weights; None for no smoothing. smoothed: norms,
    layers whose input comes from a norm, as published; all, also layers whose input comes from a linear layer.
    """

    granularity: str = "tensor"
    ranges: str = "static"
    symmetric: bool = True
    bits: int = 8
    weight_bits: int = 8
    exponent: float | None = None
    smoothed: str = "norms"

    def __post_init__(self) -> None:
        for name, choices in (("granularity", GRANULARITIES), ("ranges", RANGES), ("smoothed", SMOOTHED)):
            if getattr(self, name) not in choices:
                raise FewbitError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        for name in ("bits", "weight_bits"):
            if not 2 <= getattr(self, name) <= 8:
                raise FewbitError(f"{name} must be from 2 to 8, not {getattr(self, name)}")
        if self.exponent is not None and not 0 <= self.exponent <= 1:
            raise FewbitError(f"the smoothing exponent must be from 0 to 1, not {self.exponent}")

    @property
    def calibrated(self) -> bool:
        """Whether a calibration set is needed."""
        return self.ranges == "static" or self.exponent is not None


NAMED = {
    "w8a8": ActivationChoice(),
    "smoothquant": ActivationChoice(exponent=0.5),
    "w8a8-dynamic": ActivationChoice(granularity="token", ranges="dynamic"),
}
"""W8A8 with one static range for all tokens, plain and smoothed (arXiv 2211.10438), or a dynamic range per token."""
