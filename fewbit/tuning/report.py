"""The report of a tuned folder: that of the untrained folder with what the tuning changed."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewbit.calibration.source import public_text
from fewbit.checkpoints.json_file import read_json
from fewbit.checkpoints.output import REPORT
from fewbit.checkpoints.public_names import is_hub_name, public_model
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import Checkpoint
from fewbit.formats import native
from fewbit.formats.config import describe, recipe_of, tables_of, tuned_name, weights_of
from fewbit.grids.scheme import StoredWeight
from fewbit.pipeline.records import KeptRecord, LayerRecord, Output, Report, relative_errors
from fewbit.runtime.unpack import read_parts
from fewbit.solvers.settled import errors_of

Originals = Callable[[str], Tensor | None]
"""The 16-bit weight `(out, in)` of a packed one by the name of its module, or None if there is none to compare with."""


def report_of(checkpoint: Checkpoint, original: Checkpoint) -> Report:
    """The report of a quantized folder; if it is missing or not whole, one of what the folder itself says."""
    try:
        found = Report.from_dict(read_json(checkpoint.folder / REPORT))
    except ValueError:
        return _made_up(checkpoint, original)
    if not is_hub_name(found.model):
        # Reports of earlier versions hold paths.
        found = replace(found, model=public_model(found.model), model_is_local=True)
    found = replace(found, calibration=public_text(found.calibration), tuning=public_text(found.tuning))
    if not found.output.weights_all:
        # Reports of earlier versions do not count all weights.
        counted = _made_up(checkpoint, original).output
        output = replace(found.output, weights_all=counted.weights_all, bytes_all=counted.bytes_all)
        found = replace(found, output=output)
    return found


def _made_up(checkpoint: Checkpoint, original: Checkpoint) -> Report:
    quantization = checkpoint.quantization or {}
    stored = weights_of(checkpoint)
    parts = {f"{module}.{part}" for module, one in stored.items() for part in native.part_layout(one)}
    others = [entry for name, entry in checkpoint.entries.items() if name not in parts]
    tables = tables_of(checkpoint)
    layers = [LayerRecord.of(module, one) for module, one in stored.items() if module not in tables]
    apart = [LayerRecord.of(module, one) for module, one in stored.items() if module in tables]
    return Report(
        model=public_model(original.folder),
        model_is_local=True,
        method=str(describe(checkpoint)["method"]),
        recipe=recipe_of(checkpoint),
        source={"bytes": original.bytes, "tensors": len(original.entries)},
        output=Output.of(layers, apart, others),
        layers=layers,
        embeddings=apart,
        kept=[KeptRecord(entry.name, list(entry.shape), "not quantized") for entry in others],
        fewbit_version=quantization.get("fewbit_version"),
    )


def tuned_report(
    report: Report,
    checkpoint: Checkpoint,
    parts: Mapping[str, Mapping[str, Tensor]],
    original: Originals,
    tuning: dict[str, Any],
) -> Report:
    """The report after the tuning.

    report, checkpoint: of the untrained folder. parts: of every trained weight by its module. tuning: its entry.
    """
    weights = weights_of(checkpoint)
    modules = {weights[module].tensor_name(module): module for module in parts}
    with FileReader() as reader:

        def after(record: LayerRecord) -> LayerRecord:
            module = modules.get(record.name)
            if module is None:
                return record
            stored = weights[module]
            before = read_parts(checkpoint, reader, module, stored)
            return _tuned(record, stored, before, parts[module], original(module))

        layers, tables = [after(one) for one in report.layers], [after(one) for one in report.embeddings]
    return replace(report, method=tuned_name(report.method), layers=layers, embeddings=tables, tuning=tuning)


def _tuned(
    record: LayerRecord,
    stored: StoredWeight,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    original: Tensor | None,
) -> LayerRecord:
    """The record of a weight with other parts; errors that cannot be computed again are no longer known."""
    if original is not None:
        wanted = native.transform_weight(original.float(), after, stored)
        found = errors_of(native.decode_stored(after, stored), wanted, stored.scheme.group_size)
        record = replace(record, **relative_errors([found]))
    if all(torch.equal(before[name], part) for name, part in after.items()):
        return record
    if original is None:
        record = replace(record, relative_squared_error=None, mean_group_error=None, worst_group_error=None)
    return replace(record, relative_curvature_error=None)
