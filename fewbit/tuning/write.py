"""Write a quantized folder again with other parts for its packed weights; everything else is copied."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoints.json_file import read_json, write_json
from fewbit.checkpoints.output import CONFIG, REPORT, RUN
from fewbit.checkpoints.safetensors_io import FileReader, ShardWriter, header_room
from fewbit.checkpoints.source import Checkpoint
from fewbit.checkpoints.workdir import WorkFolder, copy_companions, write_index
from fewbit.formats import native
from fewbit.formats.config import describe, recipe_of, tuned_name, weights_of
from fewbit.formats.native import GUARD, original_name, part_layout, stored_bytes
from fewbit.formats.original import shape_of
from fewbit.grids.scheme import StoredWeight


def write_tuned(
    checkpoint: Checkpoint,
    work: WorkFolder,
    parts: dict[str, dict[str, Tensor]],
    facts: dict[str, dict[str, Any]],
    relative_error: Callable[[str, Tensor], float | None],
) -> dict[str, Any]:
    """Write and publish the folder; returns its report.

    parts: of every trained weight by its name; what the network does not use (a draft head) keeps its own. facts:
    "report", that of the untrained folder, "tuning", what the report and the config will say, and "run", what changes
    from run to run. relative_error: of a tensor's decoded weights, by name.
    """
    stored = weights_of(checkpoint)
    of_module = {module: parts[module] for module in stored if module in parts}
    replaced = {f"{module}.{part}": tensor for module, found in of_module.items() for part, tensor in found.items()}
    files = sorted({entry.file for entry in checkpoint.entries.values()})
    written: dict[str, list[str]] = {}
    with FileReader() as reader:
        for file in files:
            names = [name for name, entry in checkpoint.entries.items() if entry.file == file]
            guards = [
                original_name(m, stored[m]) for m in stored if f"{m}.{next(iter(part_layout(stored[m])))}" in names
            ]
            writer = ShardWriter(work.shard(file.name), header_room([*guards, *names]))
            try:
                for guard in guards:
                    writer.add(guard, torch.zeros(GUARD[1], dtype=GUARD[0]))
                for name in names:
                    if name in replaced:
                        writer.add(name, replaced[name])
                    else:
                        writer.copy(checkpoint.entries[name], reader)
                writer.close()
            except BaseException:
                writer.abandon()
                raise
            written[file.name] = [*guards, *names]
    report = copy.deepcopy(facts["report"])
    report["output"]["file_bytes"] = work.shard_bytes
    for layer in report["layers"]:
        module = layer["name"].removesuffix(".weight")
        if module in of_module:
            error = relative_error(layer["name"], native.decode(of_module[module], stored[module]))
            for stale in ("relative_curvature_error", "mean_group_error", "worst_group_error"):
                layer.pop(stale, None)
            if error is not None:
                layer["relative_squared_error"] = error
    report["tuning"] = facts["tuning"]
    report["method"] = tuned_name(report["method"])
    copy_companions(checkpoint.companions, work)
    quantization = {**(checkpoint.quantization or {}), "tuning": facts["tuning"]["choice"]}
    write_json(work.file(CONFIG), {**checkpoint.config, "quantization_config": quantization})
    write_json(work.file(REPORT), report)
    write_json(work.file(RUN), facts["run"])
    write_index(work, written)
    work.publish()
    return report


def report_of(checkpoint: Checkpoint, original: Checkpoint) -> dict[str, Any]:
    """The report of a quantized folder; where it is missing or not whole, one of what the folder itself says."""
    kept = read_json(checkpoint.folder / REPORT)
    if isinstance(kept, dict) and _is_whole(kept):
        return kept
    quantization = checkpoint.quantization or {}
    stored = weights_of(checkpoint)
    parts = tuple(f"{module}." for module in stored)
    others = [entry for name, entry in checkpoint.entries.items() if not name.startswith(parts)]
    weights, size = sum(one.weights for one in stored.values()), sum(map(stored_bytes, stored.values()))
    kept_bytes = sum(entry.bytes for entry in others)
    return {
        "model": str(original.folder),
        "method": describe(checkpoint)["method"],
        "recipe": recipe_of(checkpoint),
        "source": {"bytes": original.bytes, "tensors": len(original.entries)},
        "output": {
            "weights_quantized": weights,
            "bytes": size,
            "bits_per_weight": 8 * size / weights,
            "kept_bytes": kept_bytes,
            "file_bytes": size + kept_bytes,
            "outliers": sum(one.outliers for one in stored.values()),
        },
        "layers": [_layer(module, one) for module, one in stored.items()],
        "kept": [{"name": entry.name, "shape": list(entry.shape), "reason": "not quantized"} for entry in others],
        "fewbit_version": quantization.get("fewbit_version"),
    }


def _layer(module: str, stored: StoredWeight) -> dict[str, Any]:
    size = stored_bytes(stored)
    return {
        "name": module if stored.original_shape is not None else f"{module}.weight",
        "shape": list(shape_of(stored)),
        "weights": stored.weights,
        "group_size": stored.scheme.group_size,
        "outliers": stored.outliers,
        "bytes": size,
        "bits_per_weight": 8 * size / stored.weights,
    }


def _is_whole(report: dict[str, Any]) -> bool:
    """Whether a report has what the summary of a run is made of."""
    output, layers = report.get("output"), report.get("layers")
    if not isinstance(report.get("model"), str) or not isinstance(report.get("method"), str):
        return False
    if not isinstance(output, dict) or not isinstance(output.get("bits_per_weight"), int | float):
        return False
    return isinstance(layers, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) for one in layers
    )
