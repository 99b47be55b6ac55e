"""The transformers hook: `from_pretrained` on a native folder builds packed layers and loads their parts."""

from typing import Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fewbit.errors import FewbitError
from fewbit.formats.config import read_weights
from fewbit.linear import use_fast_products
from fewbit.runtime.install import install
from fewbit.runtime.part_names import Hide, PartNames, Settle
from fewbit.runtime.places import mark_used
from fewbit.runtime.resize import unpack_to_resize
from fewbit.runtime.unpack import unpack_modules
from fewbit.runtime.whole import check_content_of, check_parts_of, read_entries


class FewbitConfig(QuantizationConfigMixin):
    """The `quantization_config` of a native folder, unchanged."""

    def __init__(self, quant_method: str = "fewbit", **data: Any) -> None:
        self.quant_method = quant_method
        self.__dict__.update(data)

    def get(self, key: str, default: Any = None) -> Any:
        """Like `dict.get`, because transformers can treat the config of a loaded model as a dict."""
        return self.__dict__.get(key, default)


class FewbitQuantizer(HfQuantizer):
    """Replaces the weights that the config lists by packed ones; transformers then loads their parts like any buffer.

    Raises FewbitError if a part is missing, has another dtype or shape, belongs to no weight, or is damaged.
    """

    requires_calibration = True
    requires_parameters_quantization = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not hasattr(HfQuantizer, "update_weight_conversions"):
            raise FewbitError("this version of transformers is too old for packed weights: install 5.9 or newer")
        try:
            weights = read_weights(self.quantization_config.to_dict())
        except FewbitError as error:
            raise FewbitError(f"{model.config.name_or_path}: {error}") from error
        entries = read_entries(kwargs.get("checkpoint_files"))
        if entries:
            check_parts_of(str(model.config.name_or_path), entries, weights)
        self._names = install(model, weights, entries, kwargs.get("dtype") or model.dtype)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Add conversions that protect parts from transformers' conversions of weights."""
        mark_used(weight_conversions, self._names.tensors)
        return [Hide(self._names), *weight_conversions, Settle(self._names)]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        missing = self._names.missing()
        if missing:
            raise FewbitError(f"{model.config.name_or_path}: {missing[0]} is missing: the folder is incomplete")
        check_content_of(model)
        # For saving, the model's own list of conversions keeps the names.
        self._names = PartNames()
        use_fast_products(model)
        unpack_to_resize(model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        # After a model was saved, its config contains the dtype by name.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        model.__dict__.pop("resize_token_embeddings", None)
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [entry for entry in conversions if not isinstance(entry, Hide | Settle)]
        return unpack_modules(model, dtype, own_classes=True)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on the model; the packed weights themselves do not change."""
        return True


def register() -> None:
    """Add the format to transformers' registries, unless it is already in them."""
    if "fewbit" not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config("fewbit")(FewbitConfig)
    if "fewbit" not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer("fewbit")(FewbitQuantizer)


# The imports above may have imported transformers' registry before this module was ready to be registered.
register()
