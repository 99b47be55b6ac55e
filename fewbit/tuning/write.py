"""Write a quantized folder again with other parts for its packed weights; everything else is copied."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoints.json_file import write_json
from fewbit.checkpoints.model_card import Written, base_of, write_card
from fewbit.checkpoints.output import CARD, CONFIG, REPORT, RUN
from fewbit.checkpoints.public_names import public_config
from fewbit.checkpoints.safetensors_io import FileReader, ShardWriter, header_room
from fewbit.checkpoints.source import Checkpoint
from fewbit.checkpoints.workdir import WorkFolder, copy_companions, write_index
from fewbit.formats.config import weights_of
from fewbit.formats.native import GUARD, part_layout
from fewbit.pipeline.records import Report
from fewbit.tuning.report import Originals, tuned_report


@dataclass(frozen=True)
class TuningFacts:
    """What is written beside the weights.

    report: of the untrained folder. tuning: for the report and, its choice, for the config. run: what changes from run
    to run.
    """

    report: Report
    tuning: dict[str, Any]
    run: dict[str, Any]


def write_tuned(
    checkpoint: Checkpoint,
    work: WorkFolder,
    parts: Mapping[str, Mapping[str, Tensor]],
    facts: TuningFacts,
    original: Originals,
) -> Report:
    """Write and publish the folder; returns its report.

    parts: of every trained weight by its module; what the network does not use (a draft head) keeps its own.
    """
    stored = weights_of(checkpoint)
    replaced = {f"{module}.{part}": tensor for module, found in parts.items() for part, tensor in found.items()}
    first_parts = {
        f"{module}.{next(iter(part_layout(one)))}": one.tensor_name(module) for module, one in stored.items()
    }
    files = sorted({entry.file for entry in checkpoint.entries.values()})
    written: dict[str, list[str]] = {}
    with FileReader() as reader:
        for file in files:
            names = [name for name, entry in checkpoint.entries.items() if entry.file == file]
            guards = [first_parts[name] for name in names if name in first_parts]
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
    report = tuned_report(facts.report, checkpoint, parts, original, facts.tuning)
    report = replace(report, output=replace(report.output, file_bytes=work.shard_bytes))
    copy_companions(checkpoint.companions, work)
    quantization = {**(checkpoint.quantization or {}), "tuning": facts.tuning["choice"]}
    write_json(work.file(CONFIG), {**public_config(checkpoint.config), "quantization_config": quantization})
    data = report.to_dict()
    write_json(work.file(REPORT), data)
    base = base_of(checkpoint.folder, report.model, checkpoint.config)
    write_card(work.file(CARD), base, Written("native", data, work.shard_bytes))
    write_json(work.file(RUN), facts.run)
    write_index(work, written)
    work.publish()
    return report
