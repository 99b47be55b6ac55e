"""fewbit: the 16-bit weights of a language model in 4, 3 or 2 bits, with files that transformers loads.

Importing the package does one thing to the outside: it makes sure that transformers knows the format once
transformers itself is imported, so that ``AutoModelForCausalLM.from_pretrained(folder)`` works.
"""

from typing import TYPE_CHECKING, Any

from fewbit.version import __version__ as __version__

__all__ = ["PRESETS", "FewbitError", "Recipe", "evaluate", "inspect", "load", "preset", "quantize", "tune"]

_WHERE = {
    "FewbitError": "fewbit.errors",
    "PRESETS": "fewbit.recipe",
    "Recipe": "fewbit.recipe",
    "preset": "fewbit.recipe",
    "quantize": "fewbit.pipeline.run",
    "load": "fewbit.runtime.load",
    "evaluate": "fewbit.evaluation.evaluate",
    "inspect": "fewbit.inspection.inspect",
    "tune": "fewbit.tuning.run",
}

if TYPE_CHECKING:
    from fewbit.errors import FewbitError
    from fewbit.evaluation.evaluate import evaluate
    from fewbit.inspection.inspect import inspect
    from fewbit.pipeline.run import quantize
    from fewbit.recipe import PRESETS, Recipe, preset
    from fewbit.runtime.load import load
    from fewbit.tuning.run import tune


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fewbit' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _register() -> None:
    from fewbit.runtime.register import register_when_imported

    register_when_imported()


_register()
