"""Devices by name."""

import torch

from fewbit.errors import FewbitError
from fewbit.printable import first_line


def check_device(name: str) -> torch.device:
    """The device with that name. Raises FewbitError if torch does not know it or cannot compute on it here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise FewbitError(f"device {name!r} cannot be used here: torch does not know it: {_possible()}") from error
    count = device_count(device.type)
    if not count:
        raise FewbitError(f"device {name!r} cannot be used here: {_possible()}")
    if device.type != "cpu" and (device.index or 0) >= count:
        raise FewbitError(
            f"device {name!r} cannot be used here: the {device.type} devices of this machine are "
            f"{', '.join(f'{device.type}:{index}' for index in range(count))}"
        )
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        # Drivers report their errors as, for example, "CUDA error: all devices are busy"; AMD's begin with HIP.
        if not str(error).lower().startswith((f"{device.type} error", "hip error")):
            raise
        raise FewbitError(f"device {name!r} cannot be used here ({first_line(error)}): {_possible()}") from error
    return device


def device_count(kind: str) -> int:
    """The number of devices of a type on which torch can compute here; 1 for the CPU, 0 for types without any."""
    module = getattr(torch, kind, None)
    available, count = getattr(module, "is_available", None), getattr(module, "device_count", None)
    # Older releases of torch say of mps only how many there are.
    if (available is None and count is None) or (available is not None and not available()):
        return 0
    return int(count()) if count is not None else 1


def _possible() -> str:
    found = [kind for kind in ("cpu", "cuda", "xpu", "mps", _accelerator()) if kind and device_count(kind)]
    return f"use {' or '.join(dict.fromkeys(found))}"


def _accelerator() -> str | None:
    """The type of this machine's accelerator, where torch has a module for it under that name."""
    accelerators = getattr(torch, "accelerator", None)
    found = accelerators.current_accelerator() if accelerators is not None else None
    return found.type if found is not None else None
