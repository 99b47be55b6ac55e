"""Devices by name."""

import torch

from fewbit.errors import FewbitError


def check_device(name: str) -> torch.device:
    """The device with that name. Raises FewbitError if torch does not know it or cannot use it here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0]
        raise FewbitError(f"device {name!r} cannot be used here ({first}): use cpu") from error
    return device
