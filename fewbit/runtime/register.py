"""Register the format with transformers without importing it: at once if it is already imported, otherwise later.

transformers has no entry points with which a package could announce a format without being imported; its two registries
are dictionaries that are filled by calls.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Register the quantizer now if transformers' registry is imported, otherwise right after its import."""
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
    if _REGISTRY in sys.modules:
        _register()


def _register() -> None:
    """Import the hook module and let it register.

    The hook module may itself be importing the registry at this moment, in this thread or another. Then it is not
    ready, and it registers by itself at the end of its import.
    """
    hook = importlib.import_module("fewbit.runtime.hf_quantizer")
    ready = getattr(hook, "register", None)
    if ready is not None:
        ready()


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the registry module the usual way and adds one call to the end of its import, each time it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        for finder in list(sys.meta_path):
            if isinstance(finder, _AfterImport) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ThenRegister(spec.loader)
                return spec
        return None


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        _register()
