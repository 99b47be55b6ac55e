"""Versions of what took part in a result, read without importing anything."""

import platform
from importlib.metadata import PackageNotFoundError, version

from fewbit.version import __version__


def versions() -> dict[str, str]:
    """Package name -> version, of those that are installed."""
    found = {"fewbit": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "numpy", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
