"""Read GGUF: transformers converts a `.gguf` file to a Hugging Face folder with bfloat16 safetensors."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fewbit.checkpoints.cache import build_once, cache_folder
from fewbit.checkpoints.gguf_header import MAGIC, GgufHeader
from fewbit.checkpoints.gguf_parts import files_of, read_gguf, stem_of, write_joined
from fewbit.checkpoints.gguf_reader import reading_once
from fewbit.checkpoints.stamps import file_stamp
from fewbit.errors import FewbitError, is_out_of_memory, missing_extra, raised_in
from fewbit.printable import first_line, one_line
from fewbit.quiet import quiet_transformers

_ALONE = "model.gguf"
_HEAD = 1 << 20
_ARCHITECTURE = "general.architecture"
_TOKENIZER = ("tokenizer.ggml.model", "tokenizer.ggml.tokens")


def folder_of_gguf(path: Path) -> Path:
    """The converted folder of a GGUF file, from the cache if the same file was converted before.

    path: the file, or any of its parts.
    """
    key = gguf_key(path)
    return build_once(cache_folder() / "gguf" / f"{stem_of(path)}-{key}", lambda out: convert_gguf(path, out))


def gguf_key(path: Path) -> str:
    """A key that changes with the beginning of a GGUF file, and with the size, times or inode of any of its parts."""
    files = files_of(path)
    with files[0].open("rb") as file:
        head = file.read(_HEAD)
    if not head.startswith(MAGIC):
        raise FewbitError(f"{files[0]}: not a GGUF file (it does not start with the bytes GGUF)")
    stamps = json.dumps([file_stamp(one) for one in files])
    return hashlib.sha256(head + stamps.encode()).hexdigest()[:16]


def convert_gguf(path: Path, folder: Path) -> None:
    """Write config, tokenizer and bfloat16 weights of a GGUF file into `folder`, which exists.

    Raises FewbitError for a file that is damaged, truncated or incomplete, or that transformers does not support.
    """
    try:
        import torch
        from gguf import GGML_QUANT_SIZES
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise missing_extra(error.name or "transformers", "hf") from error
    header = read_gguf(path, {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()})
    check_complete(path, header)
    with read_alone(path, header, folder) as (alone, source):
        tokenizer = AutoTokenizer.from_pretrained(alone, **source)
        model = AutoModelForCausalLM.from_pretrained(alone, dtype=torch.bfloat16, **source, **_dequantized())
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def read_alone(
    path: Path, header: GgufHeader, folder: Path, make: Callable[[GgufHeader, Path], None] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A place from which transformers can read a GGUF file, and the arguments for its `from_pretrained`.

    The file gets another name inside `folder`, in a folder of its own, because transformers also reads a config or an
    adapter beside it. Parts are joined. make(header, place): writes another file to read in its place. Raises
    FewbitError if transformers, when it is used inside, says that it cannot read the file.
    """
    make = make or (write_joined if len(header.files) > 1 else partial(_link, path))
    with tempfile.TemporaryDirectory(dir=folder) as alone, quiet_transformers(), reading_once():
        make(header, Path(alone) / _ALONE)
        try:
            yield alone, {"gguf_file": _ALONE, "trust_remote_code": False}
        except Exception as error:
            if is_out_of_memory(error) or not _is_refusal(error, header):
                raise
            line = first_line(error)
            reason = one_line(error, 300) if line.endswith(":") else line
            raise FewbitError(f"{path}: transformers cannot read this GGUF file ({reason})") from error


def check_complete(path: Path, header: GgufHeader) -> None:
    """Raises FewbitError for a file without what transformers needs and does not look for."""
    if not isinstance(header.values.get(_ARCHITECTURE), str):
        raise FewbitError(f"{path}: has no {_ARCHITECTURE}: the file is damaged or not a language model")
    if not header.tensors:
        raise FewbitError(f"{path}: contains no tensors: give the file with the weights")
    for key in _TOKENIZER:
        if key not in header.values:
            raise FewbitError(f"{path}: contains no tokenizer ({key} is missing), which transformers needs to read it")


def _is_refusal(error: Exception, header: GgufHeader) -> bool:
    """Whether an exception is how transformers says that it does not support a valid file."""
    if isinstance(error, KeyError):
        # Its tables by architecture are read without a check.
        return raised_in(error, "transformers") and header.values[_ARCHITECTURE] in map(str, error.args)
    # The tokenizers library has no exception of its own: it raises plain ones. The hub's client checks configs.
    return (
        type(error) is Exception
        or type(error).__name__.startswith("StrictDataclass")
        or (
            isinstance(error, ValueError | NotImplementedError | ImportError | OSError)
            and raised_in(error, "transformers", "gguf")
        )
    )


def _link(path: Path, header: GgufHeader, place: Path) -> None:
    """Give a file another name: by a link if possible, otherwise by copying it."""
    for make in (os.symlink, os.link):
        try:
            make(path.resolve(), place)
            return
        except (OSError, NotImplementedError):
            continue
    try:
        shutil.copyfile(path.resolve(), place)
    except OSError as error:
        raise FewbitError(f"{path}: cannot be copied to {place.parent}: {error.strerror or error}") from None


def _dequantized() -> dict[str, Any]:
    """Arguments that make newer releases of transformers dequantize GGUF weights; older ones always do."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
