"""Tensor files that are either complete or absent, and the errors for a full disk."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fewbit.checkpoints.json_file import drop
from fewbit.errors import DISK_FULL, WorkKeptError


def save_whole(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file under a temporary name, then rename it. Raises OSError if the disk is full."""
    # Several processes may write the same file; each writes its own copy.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    drop(partial)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    except SafetensorError as error:
        drop(partial)
        # The library raises its own error, which contains only the text of the system's error.
        for number in DISK_FULL:
            if f"os error {number}" in str(error):
                raise OSError(number, "the disk is full", str(path)) from error
        raise
    partial.replace(path)


def reserve(descriptor: int, size: int) -> None:
    """Reserve `size` bytes on the disk for an open file. Raises OSError if there is too little space."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)


@contextmanager
def said_when_full(advice: str) -> Iterator[None]:
    """While inside, the error for a full disk is raised as a WorkKeptError with the path and `advice`."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise WorkKeptError(f"{where}the disk is full: {advice}") from error
