"""Load a model, original or quantized, ready to run."""

from pathlib import Path
from typing import Any

from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import open_checkpoint
from fewbit.errors import FewbitError, missing_extra
from fewbit.quiet import quiet_transformers


def load(model: str | Path, dtype: Any = "auto", device: str | None = None) -> Any:
    """The transformers model of a native folder (weights stay packed) or of any original, in evaluation mode.

    model: as for :func:`fewbit.quantize`, or a folder it made. dtype: a torch dtype, or "auto" for the one the config
    names. device: "cpu", "cuda", …; None for CUDA where there is one, else the CPU.
    Raises FewbitError when the folder is no whole model or transformers is not installed.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise missing_extra(error.name or "transformers", "hf") from error
    folder = locate(model)
    open_checkpoint(folder)
    try:
        with quiet_transformers():
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (ValueError, KeyError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FewbitError(f"{folder}: transformers cannot load it ({first})") from error
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return loaded.to(target).eval()
