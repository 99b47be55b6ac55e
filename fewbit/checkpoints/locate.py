"""Find a model's folder on disk from user input: a folder, a `.gguf` file, a named model, or a hub name."""

from pathlib import Path

from fewbit.checkpoints.gguf import folder_of_gguf
from fewbit.checkpoints.gguf_parts import only_gguf_in
from fewbit.checkpoints.named import NAMED_MODELS, fetch_named
from fewbit.errors import FewbitError, missing_extra
from fewbit.hub_errors import is_unreachable
from fewbit.printable import check_name

_HUB_FILES = [
    *("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.md", "*.tiktoken", "*.bpe", "*.spm", "*.yaml"),
    *("LICENSE*", "NOTICE*", "tokenizer*", "vocab*", "merges*"),
]
_HUB_LEFT = ["*.py", "*.bin", "*.pt", "*.pth", "original/*", "onnx/*", "openvino/*"]
"""Files that match those patterns but are never read: code, pickles, the same model in other formats."""


def locate(model: str | Path) -> Path:
    """The local folder of a model, fetched or converted if needed.

    A folder with a .gguf file and no config stands for that file. An existing path takes precedence, so a local model
    never needs the network.
    """
    path = Path(model).expanduser()
    check_name(str(path))
    path = only_gguf_in(path) or path
    if path.is_file():
        if path.suffix == ".gguf":
            return folder_of_gguf(path)
        raise FewbitError(f"{path}: is a file, but not a .gguf file: give the model's folder")
    if path.exists():
        return path
    name = str(model)
    if name in NAMED_MODELS:
        return fetch_named(name)
    looks_like_hub = name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not name.endswith(".gguf")
    if not looks_like_hub:
        raise FewbitError(f"{path}: no such file or folder")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise missing_extra("huggingface_hub", "hf") from error
    known = ", ".join(NAMED_MODELS)
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_LEFT))
    except GatedRepoError as error:
        raise FewbitError(
            f"{name}: this model is gated: accept its licence on the hub, then run  hf auth login"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FewbitError(f"{name}: no such folder, and no such model on the hub (named models: {known})") from error
    except Exception as error:
        if not isinstance(error, LocalEntryNotFoundError) and not is_unreachable(error):
            raise
        raise FewbitError(
            f"{name}: no such folder, and the hub cannot be reached: give a local folder, a .gguf file, or a named "
            f"model ({known})"
        ) from error
