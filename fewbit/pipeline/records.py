"""What a run reports about each tensor and about itself; written as JSON to `fewbit_report.json`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerRecord:
    """One quantized tensor.

    bytes: size on disk of everything that replaces it. relative_squared_error: squared error of all its weights,
    divided by their squared norm. mean_group_error, worst_group_error: the same for each group, so that groups with
    large weights do not hide the others. path: how a calibrated run computed it. relative_curvature_error: ``tr(dW H
    dW^T) / tr(W H W^T)``. experts_without_input: experts that no token reached.
    """

    name: str
    shape: list[int]
    weights: int
    bits: float
    group_size: int
    outliers: int
    bytes: int
    bits_per_weight: float
    relative_squared_error: float
    mean_group_error: float
    worst_group_error: float
    path: str | None = None
    experts_without_input: list[int] | None = None
    relative_curvature_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The record as a dict of JSON values, without unknown values."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class KeptRecord:
    """One tensor that was kept unchanged, and the reason."""

    name: str
    shape: list[int]
    reason: str


@dataclass(frozen=True)
class WrittenTensor:
    """What a finished shard contains of one tensor: either it was kept, or it is a layer with its stored form.

    module, parts: its tensors are ``module.part``, and a guard under the original name. stored, scheme: as in
    `config.json`.
    """

    kept: KeptRecord | None = None
    layer: LayerRecord | None = None
    module: str = ""
    stored: dict[str, Any] | None = None
    scheme: dict[str, Any] | None = None
    parts: tuple[str, ...] = ()

    @property
    def tensors(self) -> list[str]:
        """Names of its tensors in the shard."""
        if self.kept is not None:
            return [self.kept.name]
        guard = [self.layer.name] if self.layer else []
        return [*guard, *(f"{self.module}.{part}" for part in self.parts)]

    def to_dict(self) -> dict[str, Any]:
        """As a dict of JSON values; :meth:`from_dict` is the inverse."""
        if self.kept is not None:
            return {"kept": asdict(self.kept)}
        assert self.layer is not None
        rest = {"module": self.module, "stored": self.stored, "scheme": self.scheme, "parts": list(self.parts)}
        return {"layer": self.layer.to_dict(), **rest}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "WrittenTensor":
        """Inverse of :meth:`to_dict`, to read what an interrupted run has written."""
        if "kept" in data:
            return cls(kept=KeptRecord(**data["kept"]))
        layer = LayerRecord(**data["layer"])
        return cls(None, layer, data["module"], data["stored"], data["scheme"], tuple(data["parts"]))


@dataclass(frozen=True)
class Output:
    """What was written: number of weights in quantized tensors, their bytes, bytes of kept tensors and of all files."""

    weights_quantized: int
    bytes: int
    kept_bytes: int
    file_bytes: int
    outliers: int

    def to_dict(self) -> dict[str, Any]:
        """As a dict of JSON values, with the bits per weight."""
        data = asdict(self)
        bits = {"bits_per_weight": 8 * self.bytes / self.weights_quantized}
        return {"weights_quantized": data.pop("weights_quantized"), "bytes": data.pop("bytes"), **bits, **data}


@dataclass(frozen=True)
class Report:
    """The content of `fewbit_report.json`; the same for the same input, even if the run was interrupted.

    left: files of the original model that were not copied.
    """

    model: str
    method: str
    recipe: dict[str, Any]
    source: dict[str, int]
    output: Output
    layers: Sequence[LayerRecord]
    kept: Sequence[KeptRecord]
    fewbit_version: str
    left: Sequence[str] = ()
    calibration: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a dict of JSON values."""
        data: dict[str, Any] = {
            "model": self.model,
            "method": self.method,
            "recipe": self.recipe,
            "source": self.source,
            "output": self.output.to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
            "kept": [asdict(kept) for kept in self.kept],
            "left": list(self.left),
            "fewbit_version": self.fewbit_version,
        }
        return data if self.calibration is None else {**data, "calibration": self.calibration}
