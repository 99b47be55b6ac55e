"""`fewbit export --allow-requantize`: decode what a format cannot hold, and quantize it again on the format's grids."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fewbit.checkpoints.model_card import base_of
from fewbit.checkpoints.output import made_by_fewbit
from fewbit.checkpoints.public_names import last_part, public_model
from fewbit.checkpoints.source import Checkpoint
from fewbit.checkpoints.workdir import WorkFolder, check_output
from fewbit.errors import FewbitError
from fewbit.exports.table import TARGETS
from fewbit.formats.config import weights_of
from fewbit.runtime.unpack import unpack

METHOD = "adpq+"


def requantize(
    checkpoint: Checkpoint, dest: Path, format: str, overwrite: bool, quantize: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """Write a native folder in a format that does not hold it: its decoded weights are quantized again without data.

    quantize: :func:`fewbit.quantize`. The bits are the smallest that the format has and that are not below those of
    the folder, if there are any. Returns the report of the export, with ``requantized``: the relative squared errors of
    the second rounding, over all weights and for the layer that lost most. Raises FewbitError as a run does.
    """
    check_output(dest, checkpoint.folder, overwrite)
    target = next(one for one in TARGETS.values() if one.format == format)
    wanted = _bits(checkpoint)
    bits = min((one for one in target.bits if one >= wanted), default=max(target.bits))
    room = dest.absolute().with_name(f".{dest.name}.fewbit-plain")
    # Cards and reports call a model as its folder is called.
    name = base_of(checkpoint.folder, public_model(checkpoint.folder), checkpoint.config).name
    plain = room / last_part(name)
    _check_room(room, plain)
    room.mkdir(exist_ok=True)
    try:
        unpack(checkpoint.folder, plain, overwrite=True)
        report = quantize(plain, dest, METHOD, bits=bits, target=target.name, overwrite=overwrite)
    except FewbitError as error:
        raise type(error)(str(error).replace(str(plain), str(checkpoint.folder))) from error
    finally:
        shutil.rmtree(room)
    layers = report["layers"]
    errors = {layer["name"]: layer["relative_squared_error"] for layer in layers}
    weights = sum(layer["weights"] for layer in layers)
    mean = sum(layer["weights"] * errors[layer["name"]] for layer in layers) / weights
    most = max(errors, key=lambda name: errors[name])
    lost = {"mean": mean, "worst": errors[most], "worst_layer": most}
    said = f"quantized again: relative squared error {mean:.2g}, at most {errors[most]:.2g} ({most})"
    return {**report["export"], "requantized": lost, "notes": [*report["notes"], said]}


def _check_room(room: Path, plain: Path) -> None:
    """Raise FewbitError if there is anything in `room` but the plain folder, finished or not, of a run before."""
    if not os.path.lexists(room):
        return
    own = (plain, WorkFolder.place(plain))
    is_own = room.is_dir() and not room.is_symlink() and all(path in own for path in room.iterdir())
    if not is_own or (plain.exists() and not made_by_fewbit(plain)):
        raise FewbitError(f"{room}: fewbit needs this name for its work: move it elsewhere first")


def _bits(checkpoint: Checkpoint) -> float:
    """The bits of most weights."""
    found: dict[float, int] = {}
    for stored in weights_of(checkpoint).values():
        found[stored.scheme.bits] = found.get(stored.scheme.bits, 0) + stored.weights
    return max(found, key=lambda bits: found[bits])
