"""A run from start to end: plan, quantize tensor by tensor, write shards, publish the folder."""

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fewbit.calibration.source import public_text
from fewbit.checkpoints.json_file import write_json
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.model_card import Written, base_of, write_card
from fewbit.checkpoints.origins import remember_origin
from fewbit.checkpoints.output import CARD, CONFIG, REPORT, RUN
from fewbit.checkpoints.public_names import is_local, public_config, public_model
from fewbit.checkpoints.safetensors_io import FileReader, ShardWriter, header_room
from fewbit.checkpoints.source import Checkpoint, open_checkpoint
from fewbit.checkpoints.stamps import file_stamps
from fewbit.checkpoints.whole_file import said_when_full
from fewbit.checkpoints.workdir import SOLVED, WorkFolder, check_output, copy_companions, write_index
from fewbit.choices import check_values, flag_names
from fewbit.device import check_device
from fewbit.errors import FewbitError, WorkKeptError
from fewbit.formats.native import FORMAT_VERSION, GUARD, check_scheme
from fewbit.grids.scheme import Scheme
from fewbit.memory import peak_rss_bytes
from fewbit.pipeline.calibration_options import CalibrationOptions, check_fit
from fewbit.pipeline.heads import quantize_table
from fewbit.pipeline.plan import DEFAULT_SHARD_SIZE, KeptTensor, Plan, PlannedTensor, make_plan, stored_to_dict
from fewbit.pipeline.quantize_tensor import SolvedWeight, Workers, available_cores, quantize_tensor
from fewbit.pipeline.records import KeptRecord, Output, Report, WrittenTensor
from fewbit.pipeline.solved_store import SolvedStore
from fewbit.progress import Progress
from fewbit.recipe import Recipe
from fewbit.solvers.settled import NotFiniteError
from fewbit.version import __version__


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options that do not change the weights: file sizes, workers, device, and whether a folder may be replaced.

    calibration: only for recipes with a curvature; its calibration set does change the weights.
    """

    shard_size: int = DEFAULT_SHARD_SIZE
    overwrite: bool = False
    report_only: bool = False
    workers: int = 0
    device: str = "cpu"
    progress: Progress | None = None
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)

    def __post_init__(self) -> None:
        check_values(self, flag_names(self))
        if self.workers < 0:
            raise FewbitError(f"the number of workers cannot be {self.workers}")


def quantize(
    model: str | Path, out: str | Path | None, recipe: Recipe, options: RunOptions | None = None
) -> dict[str, Any]:
    """Quantize a model and write it in the native format.

    model: a folder, a `.gguf` file, a named model or a hub name. out: the output folder (None with `report_only`).
    Returns the report that is also written to `fewbit_report.json`, with an additional `run` entry (seconds, peak
    memory). Raises FewbitError for bad input; `out` is then not created.
    """
    options = options or RunOptions()
    check_device(options.device)
    if recipe.curvature is not None:
        check_fit(recipe, options.calibration)
    started = time.perf_counter()
    folder = locate(model)
    checkpoint = open_checkpoint(folder)
    plan = make_plan(checkpoint, recipe, options.shard_size)
    if options.report_only:
        work = None
    else:
        if out is None:
            raise FewbitError("give the output folder, or pass --report-only")
        replaces = check_output(Path(out), folder, options.overwrite)
        work = WorkFolder(Path(out), _job(checkpoint, recipe, options), options.overwrite, replaces)
    try:
        with said_when_full(f"free {plan.bytes / 1e9:.1f} GB and run the same command again; finished work is kept"):
            if work is not None:
                _check_space(plan, work.path, twice=recipe.curvature is not None)
            with contextlib.ExitStack() as scratch:
                solved = calibration = None
                if recipe.curvature is not None:
                    where = work.path if work else Path(scratch.enter_context(tempfile.TemporaryDirectory()))
                    solved = SolvedStore(where)
                    calibration = _calibrate(checkpoint, plan, recipe, options, solved)
                workers = scratch.enter_context(_workers(options))
                reader = scratch.enter_context(FileReader())
                results = _stream(plan, checkpoint, _Run(workers, reader, work, options.progress, solved))
            report = replace(_report(model, checkpoint, recipe, results), calibration=public_text(calibration))
            if work is not None:
                _write_companions(work, checkpoint, recipe, plan, results)
                report = replace(report, output=replace(report.output, file_bytes=work.shard_bytes))
                data = report.to_dict()
                write_json(work.file(REPORT), data)
                base = base_of(folder, report.model, checkpoint.config)
                write_card(work.file(CARD), base, Written("native", data, work.shard_bytes))
                write_json(work.file(RUN), {**_run_facts(started, options), **remember_origin(folder)})
                work.publish()
    except BaseException as error:
        if work is not None:
            work.leave(error)
        raise
    finally:
        if work is not None:
            work.release()
    return {**report.to_dict(), "run": _run_facts(started, options)}


@dataclass(frozen=True)
class _Run:
    workers: Workers
    reader: FileReader
    work: WorkFolder | None
    progress: Progress | None
    solved: SolvedStore | None


def _calibrate(
    checkpoint: Checkpoint, plan: Plan, recipe: Recipe, options: RunOptions, solved: SolvedStore
) -> dict[str, Any]:
    from fewbit.pipeline.calibrated import solve_model

    return solve_model(checkpoint, plan, recipe, options.calibration, solved, options.device, options.progress)


def _stream(plan: Plan, checkpoint: Checkpoint, run: _Run) -> list[list[WrittenTensor]]:
    """Write all shards and return the records of their tensors; shards that an interrupted run finished are kept."""
    total = sum(item.tensor.entry.bytes for shard in plan.shards for item in shard)
    done = 0
    results = []
    for index, shard in enumerate(plan.shards):
        name = plan.shard_name(index)
        before = run.work.finished(name) if run.work else None
        records = None if before is None else [WrittenTensor.from_dict(one) for one in before]
        size = sum(item.tensor.entry.bytes for item in shard)
        if records is None:
            records = _write_shard(name, shard, checkpoint, run, (done, total))
        elif run.progress:
            run.progress(done + size, total, f"{name} was finished before")
        done += size
        results.append(records)
    return results


def _write_shard(
    name: str,
    shard: list[PlannedTensor | KeptTensor],
    checkpoint: Checkpoint,
    run: _Run,
    position: tuple[int, int],
) -> list[WrittenTensor]:
    done, total = position
    writer = None
    if run.work:
        room = header_room([tensor for item in shard for tensor in item.output])
        writer = ShardWriter(run.work.shard(name), room)
    pending: list[Future[WrittenTensor]] = []
    if run.progress and shard:
        # The remaining time counts from here: the first tensor may be an embedding, which takes long.
        run.progress(done, total, shard[0].tensor.entry.name)
    try:
        with ThreadPoolExecutor(1) as behind:
            for item in shard:
                write = _quantize_then_write(item, checkpoint, run, writer)
                # Writing is one tensor behind quantizing, so at most two tensors are in memory.
                if pending:
                    pending[-1].result()
                pending.append(behind.submit(write))
                done += item.tensor.entry.bytes
                if run.progress:
                    run.progress(done, total, item.tensor.entry.name)
        records = [future.result() for future in pending]
        if writer:
            writer.close()
    except BaseException:
        if writer:
            writer.abandon()
        raise
    if run.work:
        run.work.finish(name, [record.to_dict() for record in records])
    return records


def _quantize_then_write(
    item: PlannedTensor | KeptTensor, checkpoint: Checkpoint, run: _Run, writer: ShardWriter | None
) -> Callable[[], WrittenTensor]:
    """Quantize a tensor now; the returned function writes it (or copies a kept tensor) and returns its record."""
    run.reader.descriptor(item.tensor.entry.file)
    if isinstance(item, KeptTensor):
        return partial(_copy, item, run, writer)
    if item.is_table:
        return _quantize_table(item, checkpoint, run, writer)
    if run.solved is None:
        return partial(_write, item, quantize_tensor(item, checkpoint, run.reader, run.workers), writer)
    return partial(_write, item, partial(run.solved.take, item.tensor.entry.name), writer)


def _quantize_table(
    item: PlannedTensor, checkpoint: Checkpoint, run: _Run, writer: ShardWriter | None
) -> Callable[[], WrittenTensor]:
    """Quantize an embedding or a head. It is kept if a weight is not finite: its row may be one that no text uses."""
    try:
        return partial(_write, item, quantize_table(item, checkpoint, run.reader, run.workers, run.solved), writer)
    except FewbitError as error:
        if not isinstance(error.__cause__, NotFiniteError):
            raise
    return partial(_copy, KeptTensor(replace(item.tensor, reason="has a weight that is NaN or infinite")), run, writer)


def _copy(item: KeptTensor, run: _Run, writer: ShardWriter | None) -> WrittenTensor:
    entry = item.tensor.entry
    if item.same_as is not None:
        return WrittenTensor(kept=KeptRecord(entry.name, list(entry.shape), f"tied to {item.same_as}", item.same_as))
    changed = run.solved.kept(entry.name) if run.solved else None
    if writer and changed is not None:
        writer.add(entry.name, changed)
    elif writer:
        writer.copy(entry, run.reader)
    return WrittenTensor(kept=KeptRecord(entry.name, list(entry.shape), item.tensor.reason))


def _write(item: PlannedTensor, assemble: Callable[[], SolvedWeight], writer: ShardWriter | None) -> WrittenTensor:
    found = assemble()
    if writer:
        dtype, shape = GUARD
        writer.add(item.tensor.entry.name, torch.zeros(shape, dtype=dtype))
        for part, tensor in found.parts.items():
            writer.add(f"{item.tensor.module}.{part}", tensor)
    return WrittenTensor(
        layer=found.record,
        module=item.tensor.module,
        stored=stored_to_dict(found.stored, 0),
        scheme=found.stored.scheme.to_dict(),
        parts=tuple(found.parts),
        is_table=item.is_table,
    )


@contextlib.contextmanager
def _workers(options: RunOptions) -> Iterator[Workers]:
    """A pool of threads in which torch uses one thread each: chunks are small, and there is a worker for every core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(
            options.workers or available_cores(), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            yield Workers(pool, torch.device(options.device))
    finally:
        torch.set_num_threads(before)


def job_of(model: str | Path, recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """Everything that determines the result of :func:`quantize`, as a dict of JSON values."""
    return dict(json.loads(json.dumps(_job(open_checkpoint(locate(model)), recipe, options))))


def _job(checkpoint: Checkpoint, recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    calibration = options.calibration
    stored = calibration.stored if recipe.curvature is not None else None
    return {
        "model": str(checkpoint.folder.resolve()),
        "files": file_stamps(checkpoint.files),
        "config": checkpoint.config,
        "recipe": recipe.to_dict(),
        **({"calibration": calibration.describe()} if recipe.curvature is not None else {}),
        **({"curvature": {"files": file_stamps(stored.files)}} if stored is not None else {}),
        "shard_size": options.shard_size,
        "fewbit": __version__,
    }


def _check_space(plan: Plan, folder: Path, twice: bool) -> None:
    """Raise FewbitError unless the output fits on the disk. twice: solved weights are stored in addition."""
    done = sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".safetensors", SOLVED))
    free = shutil.disk_usage(folder).free
    needed = plan.bytes + (sum(item.bytes for item in plan.quantized) if twice else 0)
    if needed - done > free:
        raise WorkKeptError(
            f"{folder.parent}: the output needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free"
        )


def _write_companions(
    work: WorkFolder, checkpoint: Checkpoint, recipe: Recipe, plan: Plan, results: list[list[WrittenTensor]]
) -> None:
    copy_companions(checkpoint.companions, work)
    quantization = quantization_config(recipe.to_dict(), [one for shard in results for one in shard])
    write_json(work.file(CONFIG), {**public_config(checkpoint.config), "quantization_config": quantization})
    names = [[name for record in records for name in record.tensors] for records in results]
    write_index(work, {plan.shard_name(i): shard for i, shard in enumerate(names)})


def quantization_config(recipe: dict[str, Any], written: list[WrittenTensor]) -> dict[str, Any]:
    """The `quantization_config` of config.json: everything that a reader needs in addition to the tensors.

    recipe: how the weights were made; readers only show it.
    """
    schemes: list[dict[str, Any]] = []
    weights: dict[str, Any] = {}
    for one in written:
        if one.layer is None:
            continue
        assert one.scheme is not None
        assert one.stored is not None
        if one.scheme not in schemes:
            schemes.append(one.scheme)
        weights[one.module] = {**one.stored, "scheme": schemes.index(one.scheme)}
    for scheme in schemes:
        check_scheme(Scheme.from_dict(scheme))
    tables = [one.module for one in written if one.is_table]
    tied = {one.kept.name: one.kept.same_as for one in written if one.kept is not None and one.kept.same_as is not None}
    return {
        "quant_method": "fewbit",
        "format_version": FORMAT_VERSION,
        "fewbit_version": __version__,
        "recipe": recipe,
        "schemes": schemes,
        "weights": weights,
        **({"embeddings": tables} if tables else {}),
        **({"tied": tied} if tied else {}),
    }


def _report(model: str | Path, checkpoint: Checkpoint, recipe: Recipe, results: list[list[WrittenTensor]]) -> Report:
    records = [record for shard in results for record in shard]
    layers = [record.layer for record in records if record.layer and not record.is_table]
    tables = [record.layer for record in records if record.layer and record.is_table]
    kept = {record.kept.name for record in records if record.kept and record.kept.same_as is None}
    entries = [entry for name, entry in checkpoint.entries.items() if name in kept]
    return Report(
        model=public_model(model),
        model_is_local=is_local(model),
        method=recipe.method,
        recipe=recipe.to_dict(),
        source={"bytes": checkpoint.bytes, "tensors": len(checkpoint.entries)},
        output=Output.of(layers, tables, entries),
        layers=layers,
        embeddings=tables,
        kept=[record.kept for record in records if record.kept],
        fewbit_version=__version__,
        left=list(checkpoint.left),
    )


def _run_facts(started: float, options: RunOptions) -> dict[str, Any]:
    return {
        "seconds": time.perf_counter() - started,
        "peak_rss_bytes": peak_rss_bytes(),
        "workers": options.workers or available_cores(),
        "device": options.device,
        "torch": torch.__version__,
    }
