"""The transformers hook: `from_pretrained` on a native folder builds packed layers and loads their parts."""

import re
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fewbit.formats.config import read_weights
from fewbit.linear import use_fast_products
from fewbit.runtime.packed_linear import PackedLinear


class FewbitConfig(QuantizationConfigMixin):
    """`quantization_config` of a native folder, kept as it was read."""

    def __init__(self, quant_method: str = "fewbit", **data: Any) -> None:
        self.quant_method = quant_method
        self.__dict__.update(data)


class FewbitQuantizer(HfQuantizer):
    """Replaces the linear layers that the config lists; transformers then loads their parts like any buffer."""

    requires_calibration = True
    requires_parameters_quantization = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        dtype = kwargs.get("dtype") or model.dtype
        prefix = _prefix(model)
        for name, stored in read_weights(self.quantization_config.to_dict()).items():
            name = prefix(name)
            parent_name, _, child = name.rpartition(".")
            try:
                parent = model.get_submodule(parent_name)
                layer = parent.get_submodule(child)
            except AttributeError:
                layer = None
            if not _is_linear(layer):
                raise ValueError(
                    f"{name} is packed but no linear layer of {type(model).__name__}: write plain 16-bit weights "
                    "with  fewbit unpack FOLDER OUT  and load those"
                )
            with torch.device("meta"):
                packed = PackedLinear(stored, layer.bias is not None, dtype)
            packed.requires_grad_(False)
            setattr(parent, child, packed)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        use_fast_products(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Add the format to transformers' registries; once."""
    if "fewbit" not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config("fewbit")(FewbitConfig)
        register_quantizer("fewbit")(FewbitQuantizer)


def _is_linear(layer: Any) -> bool:
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def _prefix(model: Any) -> Any:
    """Checkpoint names to module names: a bare base model has no `model.` in front, a full one may lack it on disk."""
    base = model.base_model_prefix
    full = bool(base) and hasattr(model, base)
    pattern = re.compile(rf"^{re.escape(base)}\.") if base else None

    def translate(name: str) -> str:
        if pattern is None:
            return name
        if full and not pattern.match(name) and not hasattr(model, name.split(".")[0]):
            return f"{base}.{name}"
        return name if full else pattern.sub("", name)

    return translate
