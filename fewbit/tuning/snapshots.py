"""Half-done training on disk: latent weights and the optimizer's moments, as safetensors and JSON, never pickled.

They go when the output is published, not before: a run that is killed while it writes has nothing to train again.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fewbit.checkpoints.json_file import write_json
from fewbit.checkpoints.whole_file import save_whole
from fewbit.checkpoints.workdir import SOLVED

_STATE, _BEST = "tuning-state", f"tuning-best{SOLVED}"
DESCRIBED = f"{_STATE}.json{SOLVED}"
"""The file that names the last snapshot."""
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
_ALONE = StateDictOptions(full_state_dict=True, strict=False)


class Snapshots:
    """Snapshots of one run in `folder`, at most one every `seconds`; the main process writes."""

    def __init__(self, folder: Path, accelerator: Any, seconds: float = 120.0) -> None:
        self._folder, self._accelerator, self._seconds = folder, accelerator, seconds
        self._last = time.monotonic()

    def resume(self, model: nn.Module, optimizer: Any, history: Any) -> int:
        """Put back the last snapshot, where there is one; returns how many updates it had behind it."""
        described = self._folder / DESCRIBED
        if not described.is_file():
            return 0
        data = json.loads(described.read_text(encoding="utf-8"))
        for name, value in data["history"].items():
            setattr(history, name, value)
        tensors = load_file(self._folder / data["file"])
        _set_model(model, {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")})
        state: dict[str, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind != "model":
                state.setdefault(rest, {})[kind] = tensor
        optimizer_state: dict[str, Any] = {"state": state, "param_groups": data["groups"]}
        set_optimizer_state_dict(model, _bare(optimizer), optim_state_dict=optimizer_state, options=_options())
        return int(data["updates"])

    def keep(self, model: nn.Module, optimizer: Any, history: Any, updates: int, last: bool) -> None:
        """Write a snapshot if it is time; `last`: at the end of an epoch, in any case."""
        due = last or time.monotonic() - self._last >= self._seconds
        if not _agreed(self._accelerator, due):
            return
        weights: dict[str, Any] = get_model_state_dict(model, options=_WHOLE)
        moments: dict[str, Any] = get_optimizer_state_dict(model, _bare(optimizer), options=_WHOLE)
        if self._accelerator.is_main_process:
            tensors = {f"model/{name}": tensor for name, tensor in weights.items()}
            for name, values in moments["state"].items():
                tensors.update({f"{kind}/{name}": torch.as_tensor(value) for kind, value in values.items()})
            # The description is renamed last and names its file: either snapshot is whole, whenever the run is killed.
            file = f"{_STATE}-{updates}{SOLVED}"
            save_whole(tensors, self._folder / file)
            data = {
                "file": file,
                "updates": updates,
                "history": asdict(history),
                "groups": moments["param_groups"],
            }
            write_json(self._folder / DESCRIBED, data)
            for old in list(self._folder.iterdir()):
                if old.name.startswith(f"{_STATE}-") and old.name.endswith(SOLVED) and old.name != file:
                    old.unlink()
        self._last = time.monotonic()

    def keep_best(self, model: nn.Module) -> None:
        """Keep the trained weights as they are now."""
        weights: dict[str, Any] = get_model_state_dict(model, options=_WHOLE)
        if self._accelerator.is_main_process:
            save_whole(weights, self._folder / _BEST)
        self._accelerator.wait_for_everyone()

    def load_best(self, model: nn.Module) -> None:
        """Put back what :meth:`keep_best` kept."""
        self._accelerator.wait_for_everyone()
        _set_model(model, load_file(self._folder / _BEST))


def whole_state(model: nn.Module) -> dict[str, Any]:
    """All parameters in full, on the CPU of the main process; every process takes part."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _set_model(model: nn.Module, state: dict[str, Any]) -> None:
    for module in model.modules():
        # After a forward pass alone, some parts of a sharded model stay whole, which takes no sharded state.
        reshard = getattr(module, "reshard", None)
        if callable(reshard):
            reshard()
    set_model_state_dict(model, state, options=_options())


def _options() -> StateDictOptions:
    import torch.distributed as distributed

    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return _SPREAD if several else _ALONE


def _bare(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _agreed(accelerator: Any, due: bool) -> bool:
    """The main process's clock decides for all, since all take part in gathering."""
    if accelerator.num_processes == 1:
        return due
    from accelerate.utils import broadcast

    return bool(broadcast(torch.tensor(int(due), device=accelerator.device)))
