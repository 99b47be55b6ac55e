"""The result of a solver for one weight."""

from dataclasses import dataclass

from torch import Tensor

from fewbit.solvers.settled import Encoded


@dataclass(frozen=True)
class Solved:
    """What is stored for a weight `(out, in)`, and how it was computed.

    path: solved, solved with raised damping, rounded (there was nothing to solve), or fallback with its reason.
    predicted: ``tr(dW H dW^T) / tr(W H W^T)``, the relative error under the curvature.
    """

    rows: Encoded
    path: str
    predicted: float | None

    @property
    def decoded(self) -> Tensor:
        """The decoded weights `(out, in)` float32."""
        return self.rows.decoded
