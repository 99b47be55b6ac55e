"""Adapters (such as LoRA) in a model's folder. PEFT trained them on top of a model; they are not the model itself."""

import json
from pathlib import Path

CONFIG = "adapter_config.json"


def is_adapter_file(name: str) -> bool:
    """Whether a file belongs to an adapter. The files of an adapter are copied together or not at all."""
    return name == CONFIG or name.startswith(("adapter_model.", "adapter_model-"))


def carries_adapter(folder: Path) -> bool:
    """Whether transformers would apply an adapter to a model that it loads from this folder, if PEFT is installed."""
    return (folder / CONFIG).is_file()


def base_of(folder: Path) -> str:
    """The model that the folder's adapter was trained on, or a generic description if the folder does not say."""
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        found = None
    return found if isinstance(found, str) and found else "its base model"


def not_a_model(folder: Path) -> str:
    """The advice for a folder that contains an adapter but no model."""
    return (
        f"{folder}: is an adapter ({CONFIG}), not a model: quantize {base_of(folder)} and add the adapter with "
        "model.load_adapter(FOLDER), or merge the two with PEFT first (merge_and_unload, save_pretrained)"
    )


def left_out(folder: Path) -> str:
    """The message that an adapter in a model's folder is left out."""
    return (
        f"{folder}: the adapter beside the weights ({CONFIG}) is left out: only the weights are quantized; put it on "
        "top of the result with model.load_adapter(FOLDER), or merge the two with PEFT first"
    )


def cannot_tell(folder: Path) -> str:
    """Why a folder with both a model and an adapter is not loaded."""
    return (
        f"{folder}: an adapter lies beside the weights ({CONFIG}), and whether it is used depends on whether PEFT is "
        "installed: move its files to a folder of their own and put it on top with model.load_adapter(FOLDER)"
    )
