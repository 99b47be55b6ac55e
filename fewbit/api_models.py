"""The Python interface to models as they are, other tools' quantized ones included: load, inspect."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.progress import Progress


def load(model: str | Path, dtype: Any = "auto", device: str | None = None) -> Any:
    """The transformers model of a quantized folder (weights stay packed) or of any original model, in evaluation mode.

    Its class is the one that config.json names: a language model, a reward model, an encoder, and so on. model: as for
    :func:`fewbit.quantize`, a folder that it wrote, or a model that another tool quantized: a .gguf file, or a folder
    in the format of GPTQ, AWQ or compressed-tensors. dtype: a torch dtype, or "auto" for the one in config.json.
    device: "cpu", "cuda", …; None for CUDA if available, otherwise the CPU. Raises FewbitError if the folder is not a
    complete model or transformers is not installed.
    """
    from fewbit.runtime.load import load as run

    return run(with_codes(model), dtype, device)


def inspect(model: str | Path, reference: str | Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Statistics of every floating-point tensor of a model.

    For a quantized folder or file, each quantized weight is decoded and compared with the tensor of `reference`
    (default: the model that the folder was made from, if it is still available locally). Returns
    ``{"models": [...], "reference", "protocol", "tensors": [...], "versions"}``. Raises FewbitError for bad input.
    """
    from fewbit.inspection.inspect import inspect as run

    named = Named.of([model])
    return named.restore(run(named.places[0], reference, progress))


def with_codes(model: str | Path) -> str | Path:
    """What to open for a model: if another tool quantized it, the native folder in the cache with the same codes."""
    from fewbit.imports.as_model import with_codes as find

    return find(model).place


def with_codes_here(folder: str | Path) -> str | Path:
    """As :func:`with_codes`, for commands that take a folder or file of this machine, and no names."""
    return with_codes(folder) if Path(folder).expanduser().exists() else folder


def decoded(model: str | Path) -> str | Path:
    """What to quantize for a model: if another tool quantized it, the folder in the cache with its decoded weights."""
    from fewbit.imports.as_model import decoded as find

    return find(model).place


def check_apart(out: str | Path | None, model: str | Path) -> None:
    """Raise FewbitError if an output is the model itself, or one is inside the other: what is read may be a copy."""
    from fewbit.checkpoints.output import check_place

    path = Path(model).expanduser()
    if out is not None and path.exists():
        check_place(Path(out), path)


@dataclass(frozen=True)
class Named:
    """Models under the names that a user gave, and what to open for them."""

    names: Sequence[str | Path]
    places: list[str | Path]
    reference: str | Path | None = None

    @staticmethod
    def of(models: Sequence[str | Path], reference: str | Path | None = None) -> "Named":
        """Find what to open. Raises FewbitError as :func:`fewbit.imports.as_model.with_codes` does."""
        names = [*models] if reference is None else [*models, reference]
        places = [with_codes(name) for name in names]
        return Named(names, places[: len(models)], None if reference is None else places[-1])

    def restore(self, result: dict[str, Any]) -> dict[str, Any]:
        """A result with the names that the user gave in place of those of the folders in the cache."""
        places = self.places if self.reference is None else [*self.places, self.reference]
        given = {str(place): str(name) for place, name in zip(places, self.names, strict=True)}
        rows = [{**row, "name": given.get(row["name"], row["name"])} for row in result["models"]]
        protocol = dict(result["protocol"])
        if "reference" in protocol:
            protocol["reference"] = given.get(protocol["reference"], protocol["reference"])
        return {**result, "models": rows, "protocol": protocol}
