"""A model's folder provides data and never code: only fewbit, transformers and the user's own packages run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fewbit.checkpoints.companions import check_link
from fewbit.checkpoints.json_in import Rule, check_values, read_json_object
from fewbit.checkpoints.source import Checkpoint, refuse_quantized
from fewbit.checkpoints.tokenizer_files import check_tokenizer_files, check_whole_tokenizer
from fewbit.errors import FewbitError, NoTokenizerError, is_out_of_memory, missing_extra, raised_in
from fewbit.printable import first_line

_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_CONFIG: dict[str, Rule] = {
    "architectures": (
        lambda value: value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value)),
        "a list of strings",
    ),
    "auto_map": (lambda value: value is None or isinstance(value, dict | list), "an object"),
    "id2label": (lambda value: value is None or isinstance(value, dict), "an object"),
    **dict.fromkeys(
        ("dtype", "torch_dtype"), (lambda value: value is None or isinstance(value, str | dict), "a string")
    ),
}
"""Values that transformers uses without looking at them."""
_NEVER = "fewbit never runs code of a model"


def check_loadable(checkpoint: Checkpoint) -> None:
    """Raises FewbitError for a model that transformers could not load safely.

    That is a model that needs code from its folder or from the hub, or a model quantized by a tool that transformers
    does not know, whose codes it would use as weights.
    """
    from transformers import CONFIG_MAPPING
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    folder, config = checkpoint.folder, checkpoint.config
    kind = config.get("model_type")
    if _named_code(config) and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise FewbitError(
            f"{folder}: transformers does not know the architecture {kind!r}; it is code in the model's folder "
            f"(auto_map of config.json): {_NEVER}: only data-free methods, such as --method rtn, work for this model"
        )
    check_values(folder / "config.json", config, _CONFIG)
    for kernel in _kernels(config):
        raise FewbitError(f"{folder}: config.json requests code from the hub ({kernel}): {_NEVER}: remove that line")
    foreign = checkpoint.foreign
    if foreign is not None:
        known = [name for name in AUTO_QUANTIZATION_CONFIG_MAPPING if name.split("_")[0] == foreign.method]
        at_top = foreign.sign.startswith(("quantization_config", "compression_config"))
        if not at_top or not (known or foreign.method in AUTO_QUANTIZATION_CONFIG_MAPPING):
            refuse_quantized(checkpoint)
    _check_json(folder, "generation_config.json")


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder.

    Raises NoTokenizerError if there is none that transformers can read without running code from the folder, and
    FewbitError for a file with invalid values.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise missing_extra("transformers", "hf") from error
    for path in sorted(folder.iterdir()):
        if path.is_file():
            check_link(folder, path)
    check_tokenizer_files(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        check_whole_tokenizer(folder)
        if not _is_refusal(error):
            raise
        for name in ("tokenizer_config.json", "config.json"):
            if (folder / name).is_file() and "AutoTokenizer" in _named_code(read_json_object(folder / name)):
                raise NoTokenizerError(
                    f"{folder}: its tokenizer is code in the model's folder (auto_map of {name}): {_NEVER}"
                ) from error
        raise NoTokenizerError(f"{folder}: no tokenizer that transformers can read ({first_line(error)})") from error


def _is_refusal(error: Exception) -> bool:
    """Whether an exception is how transformers and its tokenizer libraries say that files cannot be used."""
    # The tokenizers library has no exception of its own: it raises plain ones.
    if type(error) is Exception:
        return True
    if isinstance(error, OSError | ValueError | ImportError) and raised_in(error, "transformers", "huggingface_hub"):
        return True
    return isinstance(error, OSError | ValueError | RuntimeError) and raised_in(error, "sentencepiece")


def _named_code(config: Mapping[str, Any]) -> Any:
    """The transformers classes that a config replaces by code; in older configs, a list means the tokenizer's."""
    named = config.get("auto_map")
    if isinstance(named, list):
        return ("AutoTokenizer",)
    return named if isinstance(named, dict) else ()


def _kernels(config: Mapping[str, Any]) -> Iterator[str]:
    """Values of a config, or of its parts, that name repositories with code on the hub."""
    for key, value in config.items():
        if key in _KERNELS:
            named = value.values() if isinstance(value, dict) else [value]
            yield from (name for name in named if isinstance(name, str) and "/" in name)
        elif isinstance(value, dict):
            yield from _kernels(value)


def _check_json(folder: Path, name: str) -> None:
    if (folder / name).is_file():
        check_link(folder, folder / name)
        read_json_object(folder / name)
