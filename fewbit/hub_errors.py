"""Recognise exceptions that say that something on the hub cannot be had."""

import socket
import sys

from fewbit.errors import is_out_of_memory, raised_in

_LIBRARIES = ("datasets", "huggingface_hub", "fsspec", "pyarrow")
_NETWORK_ERRORS = {"httpx": "HTTPError", "requests": "RequestException", "aiohttp": "ClientError"}
"""Modules that fetch for `datasets`, and the exception that each raises."""


def is_unreachable(error: Exception) -> bool:
    """Whether an exception says that something on the hub is not there, cannot be reached, or cannot be read.

    `datasets` and the hub's client say so with general exceptions; from anywhere else, and with the name of a file on
    this machine, these are unknown.
    """
    if is_out_of_memory(error) or getattr(error, "filename", None) is not None:
        return False
    network = tuple(
        getattr(sys.modules[module], name) for module, name in _NETWORK_ERRORS.items() if module in sys.modules
    )
    if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror, *network)):
        return True
    return isinstance(error, OSError | ValueError | RuntimeError) and raised_in(error, *_LIBRARIES)
