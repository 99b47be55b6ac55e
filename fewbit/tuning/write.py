"""Write a quantized folder again with other parts for its packed weights; everything else is copied."""

import json
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fewbit.checkpoints.safetensors_io import FileReader, ShardWriter, header_room
from fewbit.checkpoints.source import Checkpoint
from fewbit.checkpoints.workdir import WorkFolder, copy_companions, write_index, write_json
from fewbit.formats import native
from fewbit.formats.config import read_weights, tuned_name
from fewbit.formats.original import REPORT, RUN


def write_tuned(
    checkpoint: Checkpoint,
    work: WorkFolder,
    parts: dict[str, dict[str, Tensor]],
    facts: dict[str, dict[str, Any]],
    relative_error: Callable[[str, Tensor], float | None],
) -> dict[str, Any]:
    """Write and publish the folder; returns its report.

    parts: of every trained weight by its name; what the network does not use (a draft head) keeps its own.
    facts: "tuning", what the report and the config will say, and "run", what changes from run to run.
    relative_error: of a tensor's decoded weights, by name.
    """
    stored = read_weights(checkpoint.quantization or {})
    of_module = {module: parts[module] for module in stored if module in parts}
    replaced = {f"{module}.{part}": tensor for module, found in of_module.items() for part, tensor in found.items()}
    files = sorted({entry.file for entry in checkpoint.entries.values()})
    written: dict[str, list[str]] = {}
    with FileReader() as reader:
        for file in files:
            names = [name for name, entry in checkpoint.entries.items() if entry.file == file]
            writer = ShardWriter(work.path / file.name, header_room(names))
            try:
                for name in names:
                    if name in replaced:
                        writer.add(name, replaced[name])
                    else:
                        writer.copy(checkpoint.entries[name], reader)
                writer.close()
            except BaseException:
                writer.abandon()
                raise
            written[file.name] = names
    report = _report(checkpoint)
    for layer in report.get("layers", []):
        module = layer["name"].removesuffix(".weight")
        if module in of_module:
            error = relative_error(layer["name"], native.decode(of_module[module], stored[module]))
            layer.pop("relative_curvature_error", None)
            if error is not None:
                layer["relative_squared_error"] = error
    report["tuning"] = facts["tuning"]
    report["method"] = tuned_name(report.get("method", "fewbit"))
    copy_companions(checkpoint.companions, work)
    quantization = {**(checkpoint.quantization or {}), "tuning": facts["tuning"]["choice"]}
    write_json(work.path / "config.json", {**checkpoint.config, "quantization_config": quantization})
    write_json(work.path / REPORT, report)
    write_json(work.path / RUN, facts["run"])
    write_index(work, written)
    work.publish()
    return report


def _report(checkpoint: Checkpoint) -> dict[str, Any]:
    path = checkpoint.folder / REPORT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
