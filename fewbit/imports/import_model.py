"""`fewbit import`: write another tool's quantized checkpoint as a native folder. Codes stay codes."""

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewbit.checkpoints.gguf_parts import stem_of
from fewbit.checkpoints.json_file import write_json
from fewbit.checkpoints.model_card import Written, base_of, write_card
from fewbit.checkpoints.output import CARD, CONFIG, REPORT, RUN
from fewbit.checkpoints.own_files import ORIGINAL_CARD
from fewbit.checkpoints.public_names import public_config, public_model
from fewbit.checkpoints.safetensors_io import ShardWriter, header_room
from fewbit.checkpoints.shards import shard_name, split_by_size
from fewbit.checkpoints.stamps import file_stamps
from fewbit.checkpoints.whole_file import said_when_full
from fewbit.checkpoints.workdir import WorkFolder, check_output, copy_companions, write_index
from fewbit.errors import FewbitError, WorkKeptError
from fewbit.formats.native import GUARD, check_content, check_parts, check_scheme
from fewbit.imports.source import PackedTensor, PlainTensor, Source
from fewbit.imports.table import open_source
from fewbit.memory import peak_rss_bytes
from fewbit.pipeline.plan import DEFAULT_SHARD_SIZE, stored_to_dict
from fewbit.pipeline.records import KeptRecord, LayerRecord, Output, Report, WrittenTensor
from fewbit.pipeline.run import quantization_config
from fewbit.progress import Progress
from fewbit.version import __version__


def import_model(
    source: str | Path,
    out: str | Path,
    config: str | Path | None = None,
    overwrite: bool = False,
    shard_size: int = DEFAULT_SHARD_SIZE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a checkpoint that another tool quantized as a native folder, without loss, one tensor in memory at a time.

    source: a .gguf file, a folder, or a hub name. config: for a .gguf file, a folder with the config and the tokenizer
    of the model. Returns the report that is also written to `fewbit_report.json`. Raises FewbitError for what is not
    quantized, cannot be represented, or is damaged; `out` is then not created.
    """
    started, out = time.perf_counter(), Path(out)
    with tempfile.TemporaryDirectory() as scratch:
        found = open_source(source, config, Path(scratch))
        for tensor in _packed(found.tensors):
            _check_scheme(found, tensor)
        replaces = check_output(out, found.place, overwrite)
        work = WorkFolder(out, _job(found, shard_size), overwrite, replaces)
        try:
            with said_when_full("free some space and run the same command again"):
                _check_space(found, work.path)
                written = _write_shards(found, work, shard_size, progress)
                report = _report(found, written, work)
                _write_rest(found, work, written, shard_size)
                write_json(work.file(REPORT), report)
                folder = found.place if found.place.is_dir() else found.place.parent
                has_card = any(one.name == ORIGINAL_CARD for one in found.companions)
                base = replace(base_of(folder, report["model"], found.config), has_card=has_card)
                write_card(work.file(CARD), base, Written("native", report, work.shard_bytes))
                facts = {"seconds": time.perf_counter() - started, "peak_rss_bytes": peak_rss_bytes()}
                write_json(work.file(RUN), facts)
                work.publish()
        except BaseException as error:
            work.leave(error)
            raise
        finally:
            work.release()
    return {**report, "run": facts}


def _packed(tensors: Sequence[PackedTensor | PlainTensor]) -> list[PackedTensor]:
    return [one for one in tensors if isinstance(one, PackedTensor)]


def _check_scheme(found: Source, tensor: PackedTensor) -> None:
    try:
        check_scheme(tensor.stored.scheme)
    except ValueError as error:
        raise FewbitError(f"{found.place}: {tensor.module}: {error}") from error


def _check_space(found: Source, folder: Path) -> None:
    needed = sum(one.bytes for one in found.tensors)
    done = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free = shutil.disk_usage(folder).free
    if needed - done > free:
        raise WorkKeptError(
            f"{folder.parent}: the output needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free"
        )


def _shards(found: Source, shard_size: int) -> dict[str, list[PackedTensor | PlainTensor]]:
    shards = split_by_size(found.tensors, lambda one: one.bytes, shard_size)
    return {shard_name(index, len(shards)): shard for index, shard in enumerate(shards)}


def _write_shards(found: Source, work: WorkFolder, shard_size: int, progress: Progress | None) -> list[WrittenTensor]:
    """Write all weight files; those that an interrupted run finished are kept."""
    total, done = sum(one.bytes for one in found.tensors), 0
    written: list[WrittenTensor] = []
    for name, shard in _shards(found, shard_size).items():
        before = work.finished(name)
        if before is not None:
            written += [WrittenTensor.from_dict(one) for one in before]
            done += sum(one.bytes for one in shard)
            continue
        writer = ShardWriter(work.shard(name), header_room([tensor for one in shard for tensor in one.output]))
        records = []
        try:
            for one in shard:
                records.append(_write(found, one, writer))
                done += one.bytes
                if progress:
                    progress(done, total, one.output[0])
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        work.finish(name, [record.to_dict() for record in records])
        written += records
    return written


def _write(found: Source, tensor: PackedTensor | PlainTensor, writer: ShardWriter) -> WrittenTensor:
    if isinstance(tensor, PlainTensor):
        writer.add(tensor.name, tensor.read())
        return WrittenTensor(kept=KeptRecord(tensor.name, list(tensor.shape), f"not quantized by {found.tool}"))
    stored = tensor.stored
    try:
        parts = tensor.read()
        check_parts(parts, stored)
        check_content(parts, stored)
    except ValueError as error:
        raise FewbitError(f"{found.place}: {tensor.module}: {error}: the file is damaged") from error
    dtype, shape = GUARD
    writer.add(stored.tensor_name(tensor.module), torch.zeros(shape, dtype=dtype))
    for part, value in parts.items():
        writer.add(f"{tensor.module}.{part}", value)
    return WrittenTensor(
        layer=LayerRecord.of(tensor.module, stored),
        module=tensor.module,
        stored=stored_to_dict(stored, 0),
        scheme=stored.scheme.to_dict(),
        parts=tuple(parts),
        is_table=tensor.is_table,
    )


def _write_rest(found: Source, work: WorkFolder, written: Sequence[WrittenTensor], shard_size: int) -> None:
    copy_companions(found.companions, work)
    quantization = quantization_config(_recipe(found), list(written))
    write_json(work.file(CONFIG), {**public_config(found.config), "quantization_config": quantization})
    names = {
        name: [tensor for one in shard for tensor in one.output] for name, shard in _shards(found, shard_size).items()
    }
    write_index(work, names)


def _recipe(found: Source) -> dict[str, Any]:
    """What stands where other folders have their recipe. No path: a folder may be shared."""
    return {"method": f"{found.tool} (imported)", "imported": {"tool": found.tool, **found.facts}}


def _report(found: Source, written: Sequence[WrittenTensor], work: WorkFolder) -> dict[str, Any]:
    layers = [one.layer for one in written if one.layer and not one.is_table]
    tables = [one.layer for one in written if one.layer and one.is_table]
    recipe = _recipe(found)
    plain = [one for one in found.tensors if isinstance(one, PlainTensor)]
    report = Report(
        model=stem_of(found.place) if found.place.is_file() else public_model(found.place),
        method=recipe["method"],
        recipe=recipe,
        source={"bytes": found.bytes, "tensors": len(found.tensors)},
        output=_output(layers, tables, plain, work.shard_bytes),
        layers=layers,
        embeddings=tables,
        kept=[one.kept for one in written if one.kept],
        fewbit_version=__version__,
        left=list(found.left),
    )
    return report.to_dict()


def _output(
    layers: Sequence[LayerRecord], tables: Sequence[LayerRecord], plain: Sequence[PlainTensor], size: int
) -> Output:
    floats = [one for one in plain if one.dtype.is_floating_point]
    packed, apart = sum(one.bytes for one in layers), sum(one.bytes for one in tables)
    count = sum(one.weights for one in (*layers, *tables)) + sum(torch.Size(one.shape).numel() for one in floats)
    return Output(
        weights_quantized=sum(one.weights for one in layers),
        bytes=packed,
        kept_bytes=sum(one.bytes for one in plain),
        file_bytes=size,
        outliers=0,
        embedding_bytes=apart,
        weights_all=count,
        bytes_all=packed + apart + sum(one.bytes for one in floats),
    )


def _job(found: Source, shard_size: int) -> dict[str, Any]:
    return {
        "import": str(found.place.resolve()),
        "files": file_stamps(found.files),
        "config": found.config,
        "shard_size": shard_size,
        "fewbit": __version__,
    }
