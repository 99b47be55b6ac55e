"""Load an original or a quantized model, ready to run."""

from pathlib import Path
from typing import Any

from fewbit.checkpoints.adapter import cannot_tell, carries_adapter
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.own_code import check_loadable
from fewbit.checkpoints.plain_copy import folder_to_load
from fewbit.checkpoints.source import open_checkpoint
from fewbit.device import check_device
from fewbit.errors import FewbitError, missing_extra
from fewbit.memory import return_freed_memory
from fewbit.quiet import quiet_transformers
from fewbit.runtime.load_errors import known_cause


def load(model: str | Path, dtype: Any = "auto", device: str | None = None) -> Any:
    """The transformers model of a native folder (weights stay packed) or of any original model, in evaluation mode.

    Its class is the one that config.json names: a language model, a reward model, an encoder, and so on. model: as for
    :func:`fewbit.quantize`, or a folder that it wrote. dtype: a torch dtype, or "auto" for the one in config.json.
    device: "cpu", "cuda", …; None for CUDA if available, otherwise the CPU. Raises FewbitError if the folder is not a
    complete model or transformers is not installed.
    """
    try:
        import torch
        from transformers import AutoConfig

        from fewbit.linear import use_fast_products
        from fewbit.runtime.classes import class_of
        from fewbit.runtime.prepare import prepare
    except ImportError as error:
        raise missing_extra(error.name or "transformers", "hf") from error
    folder = locate(model)
    checkpoint = open_checkpoint(folder)
    if carries_adapter(folder):
        raise FewbitError(cannot_tell(folder))
    check_loadable(checkpoint)
    target = check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    place = folder_to_load(checkpoint)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(place, trust_remote_code=False)
            loaded, keys = class_of(folder, config).from_pretrained(
                place, dtype=dtype, output_loading_info=True, trust_remote_code=False, use_safetensors=True
            )
    except FewbitError:
        raise
    except Exception as error:
        cause = known_cause(error, checkpoint.config)
        if cause is None:
            raise
        raise FewbitError(f"{folder}: transformers cannot load it ({cause})") from error
    # transformers initialises missing weights randomly and only logs that; such a model must not be used.
    for kind in ("missing_keys", "mismatched_keys"):
        if keys.get(kind):
            names = ", ".join(sorted(str(key) for key in keys[kind])[:3])
            raise FewbitError(
                f"{folder}: {kind.replace('_keys', '')} weights ({names}): the folder is incomplete or damaged"
            )
    use_fast_products(loaded)
    loaded = loaded.to(target).eval()
    if target.type == "cpu":
        prepare(loaded)
        return_freed_memory()
    return loaded


def load_decoder(model: str | Path, dtype: Any = "auto", device: str | None = None) -> Any:
    """As :func:`load`, but raises FewbitError for a model that does not predict the next token of a text."""
    from fewbit.runtime.classes import check_predicts_tokens

    loaded = load(model, dtype, device)
    check_predicts_tokens(Path(model), loaded)
    return loaded
