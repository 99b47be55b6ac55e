"""fewbit quantizes the weights of language models to 8 to 1 bits, in a format that transformers loads.

Importing the package has one side effect: it registers the format with transformers as soon as transformers itself is
imported, so that ``AutoModelForCausalLM.from_pretrained(folder)`` works.
"""

from typing import TYPE_CHECKING, Any

from fewbit.version import __version__

__all__ = [
    "PRESETS",
    "CalibrationChoice",
    "CalibrationOptions",
    "CurvatureChoice",
    "FewbitError",
    "Protocol",
    "Recipe",
    "RoundedChoice",
    "RunOptions",
    "TaskChoice",
    "TuneOptions",
    "TuningChoice",
    "__version__",
    "evaluate",
    "export",
    "import_model",
    "inspect",
    "load",
    "plan",
    "preset",
    "quantize",
    "tune",
    "unpack",
]

_WHERE = {
    "CalibrationChoice": "fewbit.calibration.choice",
    "CalibrationOptions": "fewbit.pipeline.calibration_options",
    "CurvatureChoice": "fewbit.curvature.choice",
    "FewbitError": "fewbit.errors",
    "PRESETS": "fewbit.presets",
    "Protocol": "fewbit.evaluation.perplexity",
    "Recipe": "fewbit.recipe",
    "RoundedChoice": "fewbit.evaluation.rounded",
    "RunOptions": "fewbit.pipeline.run",
    "TaskChoice": "fewbit.evaluation.tasks",
    "TuneOptions": "fewbit.tuning.run",
    "TuningChoice": "fewbit.tuning.choice",
    "evaluate": "fewbit.api",
    "export": "fewbit.api",
    "import_model": "fewbit.api",
    "inspect": "fewbit.api_models",
    "load": "fewbit.api_models",
    "plan": "fewbit.api",
    "preset": "fewbit.recipe",
    "quantize": "fewbit.api",
    "tune": "fewbit.api",
    "unpack": "fewbit.api",
}

if TYPE_CHECKING:
    from fewbit.api import evaluate, export, import_model, plan, quantize, tune, unpack
    from fewbit.api_models import inspect, load
    from fewbit.calibration.choice import CalibrationChoice
    from fewbit.curvature.choice import CurvatureChoice
    from fewbit.errors import FewbitError
    from fewbit.evaluation.perplexity import Protocol
    from fewbit.evaluation.rounded import RoundedChoice
    from fewbit.evaluation.tasks import TaskChoice
    from fewbit.pipeline.calibration_options import CalibrationOptions
    from fewbit.pipeline.run import RunOptions
    from fewbit.presets import PRESETS
    from fewbit.recipe import Recipe, preset
    from fewbit.tuning.choice import TuningChoice
    from fewbit.tuning.run import TuneOptions


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
