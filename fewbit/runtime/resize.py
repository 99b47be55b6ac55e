"""Resizing the vocabulary of a packed model: its embeddings and head are unpacked, since new rows have no codes."""

from functools import partial
from typing import Any

from torch import nn

from fewbit.runtime.packed_linear import PackedLinear
from fewbit.runtime.packed_parameter import Held, PackedParameter, PackedWeight, release
from fewbit.runtime.unpack import plain_layer


def unpack_to_resize(model: Any) -> None:
    """Make `model.resize_token_embeddings` unpack embeddings and head before it resizes them, if they are packed."""
    if any(_is_packed(module) for module in _ends(model)):
        # A partial function is copied and saved together with the model.
        model.resize_token_embeddings = partial(_resize, model)


def _resize(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
) -> Any:
    """As the method of transformers. Unless no size is given, embeddings and head are plain 16-bit ones afterwards."""
    if new_num_tokens is not None or pad_to_multiple_of is not None:
        names = _unpack_ends(model)
        for holder in (model.config, model.hf_quantizer):
            _forget(holder.quantization_config, names)
        del model.resize_token_embeddings
    return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, *args, **kwargs)


def _ends(model: Any) -> list[nn.Module]:
    """The embeddings and the head of a model, if it has them."""
    found = []
    for ask in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            found.append(ask())
        except (AttributeError, NotImplementedError):
            # transformers raises these for models without text inputs or outputs.
            continue
    return [module for module in found if isinstance(module, nn.Module)]


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, PackedLinear) or isinstance(getattr(module, "held", None), Held)


def _unpack_ends(model: Any) -> set[str]:
    """Unpack embeddings, head and all that is tied to them, in place; returns their names in the checkpoint."""
    ends, names = _ends(model), set()
    for path, module in list(model.named_modules()):
        if isinstance(module, PackedLinear) and any(module is end for end in ends):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, plain_layer(module, module.like.dtype))
            names.add(module.name)
    wanted = {value for end in ends for value in _held(end).values()}
    plain: dict[PackedParameter, nn.Parameter] = {}
    for module in list(model.modules()):
        held = _held(module)
        if held and wanted.issuperset(held.values()):
            for value in held.values():
                if value not in plain:
                    plain[value] = nn.Parameter(value().contiguous(), requires_grad=False)
            release(module, {name: plain[value] for name, value in held.items()})
    for value in plain:
        names |= {source.name for source in value.sources if isinstance(source, PackedWeight)}
    return names


def _held(module: nn.Module) -> dict[str, PackedParameter]:
    held = getattr(module, "held", None)
    return dict(held.all()) if isinstance(held, Held) else {}


def _forget(quantization: Any, names: set[str]) -> None:
    """Remove weights from a quantization config, so that the model is saved and loaded with plain ones."""
    quantization.weights = {name: one for name, one in quantization.weights.items() if name not in names}
    if hasattr(quantization, "embeddings"):
        quantization.embeddings = [name for name in quantization.embeddings if name not in names]
