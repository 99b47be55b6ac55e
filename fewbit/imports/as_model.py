"""Other tools' quantized checkpoints in place of a model: their codes, or their decoded weights, kept in the cache."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from fewbit.checkpoints.cache import build_once, cache_folder
from fewbit.checkpoints.gguf import gguf_key
from fewbit.checkpoints.gguf_parts import only_gguf_in, read_gguf, stem_of
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.named import NAMED_MODELS
from fewbit.checkpoints.public_names import last_part, public_model
from fewbit.checkpoints.source import Checkpoint, open_checkpoint, says_native
from fewbit.checkpoints.stamps import file_stamp
from fewbit.errors import CannotImportError
from fewbit.exports.gguf_file import import_gguf
from fewbit.exports.gguf_types import PLAIN
from fewbit.imports.import_model import import_model
from fewbit.imports.table import format_of
from fewbit.printable import check_name
from fewbit.progress import Progress
from fewbit.runtime.unpack import unpack
from fewbit.version import __version__

_PLAIN = frozenset(number for _, number in PLAIN.values())


@dataclass(frozen=True)
class Opened:
    """What to open instead of a model that was named, and a line that says so, or None if it is the model itself."""

    place: str | Path
    said: str | None = None


def with_codes(model: str | Path, progress: Progress | None = None) -> Opened:
    """For a checkpoint that another tool quantized: a native folder with the same codes.

    It is made in the cache, once for these exact files. A model that is not quantized stays as it is, and so does one
    whose codes cannot be written in fewbit's format. Raises FewbitError for damaged files.
    """
    found = _found(model)
    if found is None:
        return Opened(model)
    try:
        return Opened(_imported(found, progress), f"{model}: read with the codes of {found.tool}, as they are")
    except CannotImportError as error:
        if found.checkpoint is not None:
            # transformers may load it, or says what it takes.
            return Opened(found.path)
        return Opened(found.path, f"{model}: read as 16-bit weights, decoded ({_reason(error, found.path)})")


def decoded(model: str | Path, progress: Progress | None = None) -> Opened:
    """For a checkpoint that another tool quantized: a 16-bit one with its decoded weights, to be quantized again.

    As :func:`with_codes`; what cannot be imported stays as it is.
    """
    found = _found(model)
    if found is None:
        return Opened(model)
    said = (
        f"{model}: quantized already ({found.tool}): starts from its decoded weights; its 16-bit original does better"
    )
    if found.checkpoint is None:
        return Opened(found.path, said)
    try:
        packed = _imported(found, progress)
    except CannotImportError:
        return Opened(found.path)
    target = cache_folder() / "decoded" / packed.parent.name
    return Opened(build_once(target, lambda out: _unpack(packed, out)) / packed.name, said)


@dataclass(frozen=True)
class _Found:
    """A quantized checkpoint. path: the .gguf file or the folder. checkpoint: None for a .gguf file. key: changes with
    its files."""

    path: Path
    tool: str
    name: str
    key: str
    checkpoint: Checkpoint | None = None


def _found(model: str | Path) -> _Found | None:
    """The checkpoint if another tool quantized it, in a format that can be imported."""
    path = Path(model).expanduser()
    check_name(str(path))
    if not path.exists() and str(model) in NAMED_MODELS:
        return None
    file = path if path.is_file() and path.suffix == ".gguf" else only_gguf_in(path)
    if file is not None:
        found = _Found(file, "GGUF", stem_of(file), gguf_key(file))
        return found if _place(found).is_dir() or _is_quantized(file) else None
    folder = locate(model)
    if says_native(folder):
        return None
    checkpoint = open_checkpoint(folder)
    kind = format_of(checkpoint)
    if kind is None or checkpoint.foreign is None:
        return None
    name = last_part(public_model(folder))
    return _Found(folder, checkpoint.foreign.tool, name, _key(checkpoint), checkpoint)


def _is_quantized(file: Path) -> bool:
    gguf = import_gguf()
    header = read_gguf(file, {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()})
    return any(tensor.kind not in _PLAIN for tensor in header.tensors.values())


def _imported(found: _Found, progress: Progress | None) -> Path:
    """The native folder. It is called as the model is, since cards and reports name models by their folders."""

    def build(out: Path) -> None:
        import_model(found.path, out / found.name, progress=progress)

    return build_once(_place(found), build) / found.name


def _place(found: _Found) -> Path:
    return cache_folder() / "imported" / hashlib.sha256(f"{__version__} {found.key}".encode()).hexdigest()[:16]


def _unpack(packed: Path, out: Path) -> None:
    unpack(packed, out / packed.name)


def _key(checkpoint: Checkpoint) -> str:
    files = [*checkpoint.files, *(one.path for one in checkpoint.companions)]
    facts = {"config": checkpoint.config, "files": [[str(path), file_stamp(path)] for path in files]}
    return json.dumps(facts, sort_keys=True)


def _reason(error: CannotImportError, path: Path) -> str:
    """The reason without the path and the advice."""
    return str(error).removeprefix(f"{path}: ").partition(": ")[0]
