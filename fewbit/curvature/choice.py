"""The choice of a curvature: how the cost of an error in a weight is estimated."""

from dataclasses import dataclass

from fewbit.errors import FewbitError

KINDS = ("gram", "fisher")
TERMS = ("sequence", "token")
LABELS = ("data", "sampled")
BEST_GRAM_SHARE = 0.5
"""The best share at 2 bits (`benchmarks/calibrated_choices.py`, docs/experiments.md)."""


@dataclass(frozen=True)
class CurvatureChoice:
    """How the cost of an error in a weight is estimated.

    kind: gram or fisher. terms: for fisher, sequence (as published) or token. labels: for fisher, data (the next tokens
    of the data: empirical Fisher) or sampled (tokens sampled from the model). diagonal: keep only the diagonal.
    tempering: each token's contribution is divided by ``|x_t|^(2 tempering)``; 0 for none, 1 for inputs of unit norm.
    It prevents massive activations from dominating a Gram. gram_share: for fisher, the share of the input Gram in the
    matrix, from 0 to below 1, after each of the two is divided by its mean diagonal.
    """

    kind: str = "gram"
    terms: str = "sequence"
    labels: str = "data"
    diagonal: bool = False
    tempering: float = 0.0
    gram_share: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in (("kind", KINDS), ("terms", TERMS), ("labels", LABELS)):
            if getattr(self, name) not in choices:
                raise FewbitError(f"curvature {name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if not 0 <= self.tempering <= 1:
            raise FewbitError(f"tempering must be from 0 to 1, not {self.tempering}")
        if not 0 <= self.gram_share < 1:
            raise FewbitError(f"gram share must be from 0 to below 1, not {self.gram_share}")
        if self.gram_share and self.kind != "fisher":
            raise FewbitError("gram share: only a Fisher can be mixed with a Gram")
