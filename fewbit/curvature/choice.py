"""The choice of a curvature: how the cost of an error in a weight is estimated."""

from dataclasses import dataclass, replace
from typing import Any

from fewbit.choices import check_values
from fewbit.errors import FewbitError

TERMS = ("sequence", "token")
LABELS = ("data", "sampled")
BEST_GRAM_SHARE = 0.5
"""The best share at 2 bits (`benchmarks/calibrated_choices.py`, docs/experiments.md)."""


@dataclass(frozen=True)
class CurvatureSource:
    """What a curvature is made of: a layer's inputs, or (gradients) also the gradients of the loss at its outputs.

    best_share: the share of the input Gram that is best to mix in.
    """

    name: str
    summary: str
    gradients: bool = False
    best_share: float = 0.0


CURVATURES = {
    one.name: one
    for one in (
        CurvatureSource("gram", "from a layer's inputs: the squared error of its own outputs"),
        CurvatureSource(
            "fisher",
            "from the gradients of the loss: the error of the model's outputs",
            gradients=True,
            best_share=BEST_GRAM_SHARE,
        ),
    )
}


@dataclass(frozen=True)
class CurvatureChoice:
    """How the cost of an error in a weight is estimated.

    kind: a name in :data:`CURVATURES`. terms: for fisher, sequence (as published) or token. labels: for fisher, data
    (the next tokens of the data: empirical Fisher) or sampled (tokens sampled from the model). diagonal: keep only the
    diagonal.
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
        check_values(self, {"kind": "curvature", "terms": "fisher_terms", "labels": "fisher_labels"})
        for name, choices in (("kind", CURVATURES), ("terms", TERMS), ("labels", LABELS)):
            if getattr(self, name) not in choices:
                raise FewbitError(f"curvature {name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if not 0 <= self.tempering <= 1:
            raise FewbitError(f"tempering must be from 0 to 1, not {self.tempering}")
        if not 0 <= self.gram_share < 1:
            raise FewbitError(f"gram share must be from 0 to below 1, not {self.gram_share}")
        if self.gram_share and not self.source.gradients:
            raise FewbitError("gram share: only a Fisher can be mixed with a Gram")

    @property
    def source(self) -> CurvatureSource:
        """What it is made of."""
        return CURVATURES[self.kind]


def curvature_choice(
    kind: str = "fisher",
    fisher_terms: str = "token",
    fisher_labels: str = "data",
    gram_share: float | None = None,
    **others: Any,
) -> CurvatureChoice:
    """The curvature of `fewbit curvature` from its options; without a share, that which is best for the kind."""
    choice = CurvatureChoice(kind, fisher_terms, fisher_labels, **others)
    return replace(choice, gram_share=choice.source.best_share if gram_share is None else gram_share)
