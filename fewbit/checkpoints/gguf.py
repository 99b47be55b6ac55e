"""Read GGUF: transformers converts a `.gguf` file to a Hugging Face folder with bfloat16 safetensors."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fewbit.checkpoints.cache import build_once, cache_folder
from fewbit.errors import FewbitError, missing_extra
from fewbit.quiet import quiet_transformers

_ALONE = "model.gguf"


def folder_of_gguf(path: Path) -> Path:
    """The converted folder of a GGUF file, from the cache if the same file was converted before."""
    stat = path.stat()
    with path.open("rb") as file:
        head = file.read(1 << 20)
    if head[:4] != b"GGUF":
        raise FewbitError(f"{path}: not a GGUF file (it does not start with the bytes GGUF)")
    key = hashlib.sha256(head + f"{stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    return build_once(cache_folder() / "gguf" / f"{path.stem}-{key}", lambda out: convert_gguf(path, out))


def convert_gguf(path: Path, folder: Path) -> None:
    """Write config, tokenizer and bfloat16 weights of a GGUF file into `folder`."""
    try:
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise missing_extra(error.name or "transformers", "hf") from error
    # The file is put into a folder of its own, because transformers also reads a config or an adapter beside it.
    with tempfile.TemporaryDirectory(dir=folder.parent) as alone, quiet_transformers():
        _link(path, Path(alone) / _ALONE)
        source: dict[str, Any] = {"gguf_file": _ALONE, "trust_remote_code": False}
        try:
            tokenizer = AutoTokenizer.from_pretrained(alone, **source)
            model = AutoModelForCausalLM.from_pretrained(alone, dtype=torch.bfloat16, **source, **_dequantized())
        except (ValueError, KeyError, OSError, NotImplementedError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FewbitError(f"{path}: transformers cannot read this GGUF file ({first})") from error
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _link(path: Path, place: Path) -> None:
    """Give a file another name: by a link if possible, otherwise by copying it."""
    for make in (os.symlink, os.link, shutil.copyfile):
        try:
            make(path.resolve(), place)
            return
        except (OSError, NotImplementedError):
            continue
    raise FewbitError(f"{path}: cannot be copied to {place.parent}")


def _dequantized() -> dict[str, Any]:
    """Arguments that make newer releases of transformers dequantize GGUF weights; older ones always do."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
