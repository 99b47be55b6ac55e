"""The foreign formats that can be imported: a table of objects. A new format is a row of FORMATS."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fewbit.checkpoints.gguf_parts import only_gguf_in
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.named import NAMED_MODELS
from fewbit.checkpoints.source import Checkpoint, open_checkpoint
from fewbit.errors import CannotImportError, FewbitError
from fewbit.imports.awq import open_awq
from fewbit.imports.compressed import open_compressed
from fewbit.imports.gguf import open_gguf
from fewbit.imports.gptq import open_gptq
from fewbit.imports.source import Source


@dataclass(frozen=True)
class Format:
    """A format of folders. tools: the names by which :mod:`fewbit.checkpoints.quantized_by` calls it.

    open(checkpoint): its tensors.
    """

    name: str
    tools: tuple[str, ...]
    open: Callable[[Checkpoint], Source]


FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Format("gptq", ("GPTQ", "GPTQ or AWQ"), open_gptq),
        Format("awq", ("AWQ",), open_awq),
        Format("compressed-tensors", ("compressed-tensors",), open_compressed),
    )
}
"""Formats of folders by name; a .gguf file is recognised by its ending."""


def format_of(checkpoint: Checkpoint) -> Format | None:
    """The format of a quantized folder, or None if it cannot be imported, or is not quantized by another tool."""
    tool = checkpoint.foreign.tool if checkpoint.foreign is not None else None
    return next((one for one in FORMATS.values() if tool in one.tools), None)


def open_source(source: str | Path, config: str | Path | None, scratch: Path) -> Source:
    """A foreign checkpoint: a .gguf file, a folder, or a name on the hub.

    config: a folder with the config and the tokenizer for a .gguf file. scratch: an empty folder for files that are
    made. Raises FewbitError for what cannot be imported.
    """
    path = Path(source).expanduser()
    path = only_gguf_in(path) or path
    if path.is_file() and path.suffix == ".gguf":
        return open_gguf(path, None if config is None else locate(config), scratch)
    if config is not None:
        raise FewbitError(f"{source}: --config applies to .gguf files only: leave it out")
    if str(source) in NAMED_MODELS and not path.exists():
        raise FewbitError(f"{source}: is a named model, which is not quantized: give it to  fewbit quantize")
    checkpoint = open_checkpoint(locate(source))
    if checkpoint.is_native:
        raise FewbitError(f"{checkpoint.folder}: is in fewbit's own format already: use it as it is")
    if checkpoint.foreign is None:
        raise FewbitError(f"{checkpoint.folder}: is not quantized: give it to  fewbit quantize")
    tool = checkpoint.foreign.tool
    found = format_of(checkpoint)
    if found is None:
        known = ", ".join(["GGUF", *(one.tools[0] for one in FORMATS.values())])
        raise CannotImportError(
            f"{checkpoint.folder}: quantized by {tool}, which cannot be imported (only {known}): give the 16-bit "
            "original to  fewbit quantize"
        )
    return found.open(checkpoint)
