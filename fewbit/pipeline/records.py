"""What a run reports about each tensor and about itself; written as JSON to `fewbit_report.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fewbit.calibration.source import public_text
from fewbit.checkpoints.public_names import public_model
from fewbit.checkpoints.safetensors_io import TensorEntry
from fewbit.formats.native import stored_bytes
from fewbit.grids.scheme import StoredWeight

RowErrors = tuple[float, float, tuple[float, float, int]]
"""Squared error, squared norm and group errors of some rows, as :func:`fewbit.solvers.settled.errors_of` gives them."""


@dataclass(frozen=True)
class LayerRecord:
    """One quantized tensor.

    bytes: size on disk of everything that replaces it. relative_squared_error: squared error of all its weights,
    divided by their squared norm. mean_group_error, worst_group_error: the same for each group, so that groups with
    large weights do not hide the others. path: how a calibrated run computed it. relative_curvature_error: ``tr(dW H
    dW^T) / tr(W H W^T)``. experts_without_input: experts that no token reached. Errors that are not known are None.
    """

    name: str
    shape: list[int]
    weights: int
    bits: float
    group_size: int
    outliers: int
    bytes: int
    bits_per_weight: float
    relative_squared_error: float | None = None
    mean_group_error: float | None = None
    worst_group_error: float | None = None
    path: str | None = None
    experts_without_input: list[int] | None = None
    relative_curvature_error: float | None = None

    @classmethod
    def of(cls, module: str, stored: StoredWeight, errors: Mapping[str, Any] | None = None) -> "LayerRecord":
        """The record of a weight whose parts are stored under `module`. errors: see :func:`relative_errors`."""
        size = stored_bytes(stored)
        return cls(
            name=stored.tensor_name(module),
            shape=list(stored.tensor_shape),
            weights=stored.weights,
            bits=stored.scheme.bits,
            group_size=stored.scheme.group_size,
            outliers=stored.outliers,
            bytes=size,
            bits_per_weight=8 * size / stored.weights,
            **(errors or {}),
        )

    def to_dict(self) -> dict[str, Any]:
        """The record as a dict of JSON values, without unknown values."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def relative_errors(rows: Sequence[RowErrors]) -> dict[str, Any]:
    """The errors of a :class:`LayerRecord` by name, from those of all its rows."""
    error, norm = sum(one[0] for one in rows), sum(one[1] for one in rows)
    groups = [one[2] for one in rows]
    return {
        "relative_squared_error": error / norm if norm else 0.0,
        "mean_group_error": sum(one[0] for one in groups) / max(1, sum(one[2] for one in groups)),
        "worst_group_error": max(one[1] for one in groups),
    }


@dataclass(frozen=True)
class KeptRecord:
    """One tensor that was kept unchanged, and the reason.

    same_as: it is not stored, since it is tied to this tensor and equal to it.
    """

    name: str
    shape: list[int]
    reason: str
    same_as: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The record as a dict of JSON values."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class WrittenTensor:
    """What a finished shard contains of one tensor: either it was kept, or it is a layer with its stored form.

    module, parts: its tensors are ``module.part``, and a guard under the original name. stored, scheme: as in
    `config.json`. is_table: it is an embedding or a head.
    """

    kept: KeptRecord | None = None
    layer: LayerRecord | None = None
    module: str = ""
    stored: dict[str, Any] | None = None
    scheme: dict[str, Any] | None = None
    parts: tuple[str, ...] = ()
    is_table: bool = False

    @property
    def tensors(self) -> list[str]:
        """Names of its tensors in the shard."""
        if self.kept is not None:
            return [] if self.kept.same_as is not None else [self.kept.name]
        guard = [self.layer.name] if self.layer else []
        return [*guard, *(f"{self.module}.{part}" for part in self.parts)]

    def to_dict(self) -> dict[str, Any]:
        """As a dict of JSON values; :meth:`from_dict` is the inverse."""
        if self.kept is not None:
            return {"kept": self.kept.to_dict()}
        assert self.layer is not None
        rest = {"module": self.module, "stored": self.stored, "scheme": self.scheme, "parts": list(self.parts)}
        return {"layer": self.layer.to_dict(), **rest, **({"is_table": True} if self.is_table else {})}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "WrittenTensor":
        """Inverse of :meth:`to_dict`, to read what an interrupted run has written."""
        if "kept" in data:
            return cls(kept=KeptRecord(**data["kept"]))
        layer = LayerRecord(**data["layer"])
        table = bool(data.get("is_table"))
        return cls(None, layer, data["module"], data["stored"], data["scheme"], tuple(data["parts"]), table)


@dataclass(frozen=True)
class Output:
    """What was written.

    weights_quantized, bytes, outliers: of the quantized linear layers. embedding_bytes: of quantized embeddings and
    heads. kept_bytes: of kept tensors. file_bytes: of all files. weights_all, bytes_all: of all weights in them, that
    is, quantized or floating-point; 0 in reports of earlier versions.
    """

    weights_quantized: int
    bytes: int
    kept_bytes: int
    file_bytes: int
    outliers: int
    embedding_bytes: int = 0
    weights_all: int = 0
    bytes_all: int = 0

    @classmethod
    def of(cls, layers: Sequence[LayerRecord], tables: Sequence[LayerRecord], kept: Sequence[TensorEntry]) -> "Output":
        """Sums over layers, quantized embeddings and heads, and kept tensors, which are all that the files contain."""
        size, apart = sum(layer.bytes for layer in layers), sum(table.bytes for table in tables)
        weights, outliers = sum(layer.weights for layer in layers), sum(layer.outliers for layer in layers)
        whole = sum(entry.bytes for entry in kept)
        floats = [entry for entry in kept if entry.dtype.is_floating_point]
        every = weights + sum(table.weights for table in tables) + sum(entry.numel for entry in floats)
        held = size + apart + sum(entry.bytes for entry in floats)
        return cls(weights, size, whole, size + apart + whole, outliers, apart, every, held)

    def to_dict(self) -> dict[str, Any]:
        """As a dict of JSON values, with the bits per weight of the layers and of the whole model."""
        data = asdict(self)
        weights, size = data.pop("weights_quantized"), data.pop("bytes")
        bits = {"bits_per_weight": 8 * self.bytes / self.weights_quantized}
        if self.weights_all:
            bits["bits_per_weight_all"] = 8 * self.bytes_all / self.weights_all
        return {"weights_quantized": weights, "bytes": size, **bits, **data}


@dataclass(frozen=True)
class Report:
    """The content of `fewbit_report.json`; the same for the same input, even if the run was interrupted.

    layers, embeddings: the quantized linear layers, and the quantized embeddings and heads. left: files of the original
    model that were not copied. fewbit_version: None if it is not known. tuning: of a
    fine-tuned model, the choices and losses of the tuning. model: its name, without folders. model_is_local: whether
    that is the name of a file or folder here, and not of a model on the hub.
    """

    model: str
    method: str
    recipe: dict[str, Any]
    source: dict[str, int]
    output: Output
    layers: Sequence[LayerRecord]
    kept: Sequence[KeptRecord]
    fewbit_version: str | None
    left: Sequence[str] = ()
    embeddings: Sequence[LayerRecord] = ()
    calibration: dict[str, Any] | None = None
    tuning: dict[str, Any] | None = None
    model_is_local: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As a dict of JSON values."""
        data: dict[str, Any] = {
            "model": self.model,
            "method": self.method,
            "recipe": self.recipe,
            "source": self.source,
            "output": self.output.to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
            "embeddings": [table.to_dict() for table in self.embeddings],
            "kept": [kept.to_dict() for kept in self.kept],
            "left": list(self.left),
            "fewbit_version": self.fewbit_version,
        }
        more = {"calibration": self.calibration, "tuning": self.tuning, "model_is_local": self.model_is_local or None}
        return data | {name: value for name, value in more.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Any) -> "Report":
        """Inverse of :meth:`to_dict`; raises ValueError if something is missing or of another type."""
        try:
            return TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            raise ValueError(f"not a whole report: {error}") from error


def published(data: dict[str, Any]) -> dict[str, Any]:
    """The values of a report without local paths, which reports of earlier versions have."""
    model = data.get("model")
    return {**public_text(data), **({"model": public_model(model)} if isinstance(model, str) else {})}
