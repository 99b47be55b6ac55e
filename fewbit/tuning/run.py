"""`fewbit tune`: trains the weights of a quantized folder on some text and writes a folder of the same format."""

import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.architecture.network import find_blocks
from fewbit.architecture.orientation import to_matrix
from fewbit.attention import fast_attention
from fewbit.calibration.choice import CalibrationChoice
from fewbit.calibration.source import public_text
from fewbit.checkpoints.origins import remember_origin
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import Checkpoint, open_checkpoint
from fewbit.checkpoints.stamps import file_stamps
from fewbit.checkpoints.whole_file import said_when_full
from fewbit.checkpoints.workdir import SOLVED, WorkFolder, check_output
from fewbit.device import check_device
from fewbit.errors import FewbitError, WorkKeptError, missing_extra
from fewbit.formats.config import has_scaled_channels, tables_of, weights_of
from fewbit.formats.original import original_of
from fewbit.memory import activation_bytes, available_bytes, peak_rss_bytes
from fewbit.pipeline.calibration_tokens import calibration_set
from fewbit.pipeline.solved_store import SolvedStore
from fewbit.progress import Progress
from fewbit.runtime.load import load_decoder
from fewbit.runtime.whole import plain_dtype
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.loop import Sequences, Trainer, held_out_last
from fewbit.tuning.not_finite import TrainingStoppedError
from fewbit.tuning.reconstruct import reconstruct_blocks
from fewbit.tuning.report import Originals, report_of
from fewbit.tuning.snapshots import Snapshots, whole_state
from fewbit.tuning.teacher import Teacher, keep_predictions
from fewbit.tuning.tuned_model import make_trainable, stored_parts, without_dropout
from fewbit.tuning.write import TuningFacts, write_tuned
from fewbit.version import __version__

_TEACHER = f"tuning-teacher{SOLVED}"


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Options of a run beside its choice.

    reference: the original; None for the one that the folder was made from. calibration: the training text.
    checkpointing: store only the inputs of blocks and recompute activations in the backward pass; None to do so if
    memory requires it.
    """

    reference: str | Path | None = None
    calibration: CalibrationChoice = field(default_factory=CalibrationChoice)
    checkpointing: bool | None = None
    device: str | None = None
    overwrite: bool = False


def tune(
    folder: str | Path,
    out: str | Path,
    choice: TuningChoice | None = None,
    options: TuneOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tune a quantized folder under its own rounding and write the result in the same format and bit-width.

    Returns the new report, whose `tuning` entry has the losses. A run that was killed is resumed. Raises FewbitError
    for bad input, or if the loss becomes NaN or infinite. All processes of a launch call this with the same arguments.
    """
    choice, options = choice or TuningChoice(), options or TuneOptions()
    accelerator = _accelerator(options.device)
    if choice.batch_size % accelerator.num_processes:
        raise FewbitError(
            f"--batch-size {choice.batch_size}: it must be a multiple of the number of processes "
            f"({accelerator.num_processes})"
        )
    started = time.perf_counter()
    checkpoint = open_checkpoint(Path(folder))
    if not checkpoint.is_native:
        raise FewbitError(f"{folder}: not quantized by fewbit: make a folder with  fewbit quantize  first")
    original_checkpoint = original_of(checkpoint, options.reference)
    work = None
    if accelerator.is_main_process:
        replaces = check_output(Path(out), checkpoint.folder, options.overwrite)
        job = _job(checkpoint, original_checkpoint, choice, options)
        work = WorkFolder(Path(out), job, options.overwrite, replaces)
    accelerator.wait_for_everyone()
    try:
        with said_when_full("free some space and run the same command again; training resumes from its last snapshot"):
            run = _Run(checkpoint, original_checkpoint, choice, options, accelerator, work, WorkFolder.place(Path(out)))
            report = _train(run, started, progress if work is not None else None)
        accelerator.wait_for_everyone()
    except BaseException as error:
        if work is not None and isinstance(error, TrainingStoppedError):
            work.discard()
        elif work is not None:
            work.leave(error)
        raise
    finally:
        if work is not None:
            work.release()
    return report


@dataclass(frozen=True)
class _Run:
    """One run; `work` is the main process's alone, the folder `path` everyone's."""

    checkpoint: Checkpoint
    original: Checkpoint
    choice: TuningChoice
    options: TuneOptions
    accelerator: Any
    work: WorkFolder | None
    path: Path


def _train(run: _Run, started: float, progress: Progress | None) -> dict[str, Any]:
    """Load, train, and write in the main process, whose report is returned. What the end needs is checked first."""
    checkpoint, options, accelerator = run.checkpoint, run.options, run.accelerator
    # Processes that share the parameters would have to gather a head's before each of its products.
    choice = replace(run.choice, embeddings=False) if _shares(accelerator) else run.choice
    reference, path = run.original.folder, run.path
    if run.work is not None:
        _check_space(checkpoint, path)
    known = report_of(checkpoint, run.original)
    # First, since what cannot be trained is refused here.
    model = load_decoder(checkpoint.folder, dtype=_training_dtype(checkpoint), device="cpu")
    original = load_decoder(reference, device=str(accelerator.device))
    calibration = calibration_set(run.original, options.calibration, original, progress)
    if run.work is not None:
        SolvedStore(path).same_tokens(calibration.sha256)
    sequences = _split(calibration.ids, choice)
    teacher = _teacher(original, sequences.ids, choice, path, accelerator, progress)
    with FileReader() as reader:
        fixed = () if choice.embeddings else tables_of(checkpoint)
        places = make_trainable(model, choice, _originals(checkpoint, run.original, reader), fixed)
    model.to(accelerator.device)
    blocks = list(find_blocks(model))
    if choice.reconstruction:
        with fast_attention(blocks):
            reconstruct_blocks(model, original, sequences, choice, path, progress)
    if choice.top or "kd" not in choice.loss:
        del original
    without_dropout(model).train()
    if options.checkpointing or (options.checkpointing is None and _crowded(model, choice, calibration.ids)):
        # The older name of the same method is all that transformers 5.0 has.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    trainer = Trainer(model, sequences, teacher, choice, Snapshots(path, accelerator), accelerator)
    with fast_attention(blocks):
        history = trainer.run(progress)
    state = whole_state(trainer.model)
    if run.work is None:
        return {}
    parts = stored_parts(accelerator.unwrap_model(trainer.model), places, state)
    tuning = {
        "choice": asdict(choice),
        "calibration": public_text(calibration.describe()),
        "history": asdict(history),
        "fewbit_version": __version__,
    }
    facts: dict[str, Any] = {"seconds": time.perf_counter() - started, "peak_rss_bytes": peak_rss_bytes()}
    facts |= remember_origin(reference)
    with FileReader() as reader:
        weights = _originals(checkpoint, run.original, reader)
        report = write_tuned(checkpoint, run.work, parts, TuningFacts(known, tuning, facts), weights)
    return {**report.to_dict(), "run": facts}


def _check_space(checkpoint: Checkpoint, folder: Path) -> None:
    """WorkKeptError unless what is written in the end, of the size of the quantized folder, fits beside the work."""
    free = shutil.disk_usage(folder).free
    if checkpoint.bytes > free:
        needed = checkpoint.bytes / 1e9
        raise WorkKeptError(f"{folder.parent}: the output needs {needed:.1f} GB, but only {free / 1e9:.1f} GB are free")


def _shares(accelerator: Any) -> bool:
    """Whether each process holds only a share of the parameters (FSDP)."""
    return getattr(accelerator.state, "fsdp_plugin", None) is not None


def _accelerator(device: str | None) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise missing_extra("accelerate", "hf") from error
    if device is not None:
        check_device(device)
    wants_cpu = device == "cpu" or not torch.cuda.is_available()
    accelerator = Accelerator(cpu=wants_cpu)
    sharding = getattr(accelerator.state, "fsdp_plugin", None)
    if sharding is not None and sharding.fsdp_version != 2:
        # Version 1 flattens a block's parameters into one, of one number format and trained or not as a whole.
        raise FewbitError("FSDP: trained and frozen parameters need version 2: launch with --fsdp_version 2")
    return accelerator


def _job(checkpoint: Checkpoint, original: Checkpoint, choice: TuningChoice, options: TuneOptions) -> dict[str, Any]:
    return {
        "tune": str(checkpoint.folder.resolve()),
        "files": file_stamps(entry.file for entry in checkpoint.entries.values()),
        "config": checkpoint.config,
        "reference": {
            "folder": str(original.folder.resolve()),
            "files": file_stamps(entry.file for entry in original.entries.values()),
        },
        "choice": asdict(choice),
        "calibration": asdict(options.calibration),
        "fewbit": __version__,
    }


def _training_dtype(checkpoint: Checkpoint) -> Any:
    """The model's own, but for float16 bfloat16: gradients of a mean loss would underflow."""
    return torch.bfloat16 if plain_dtype(checkpoint) == torch.float16 else "auto"


def check_enough(sequences: int, choice: TuningChoice) -> None:
    """FewbitError when so many sequences leave too few to train on."""
    training = max(sequences - choice.held_out, 0)
    if training < choice.batch_size:
        raise FewbitError(
            f"{sequences} sequences with {choice.held_out} held out leave {training} for batches of "
            f"{choice.batch_size}: use more text (--samples), or lower --held-out or --batch-size"
        )


def _split(ids: Tensor, choice: TuningChoice) -> Sequences:
    check_enough(ids.shape[0], choice)
    return Sequences(held_out_last(ids, choice.held_out), choice.held_out)


def _teacher(
    original: Any, ids: Tensor, choice: TuningChoice, folder: Path, accelerator: Any, progress: Progress | None
) -> Teacher | None:
    if "kd" not in choice.loss:
        return None
    if not choice.top:
        return Teacher(ids, None, original)

    def step(done: int, total: int) -> None:
        if progress:
            progress(done, total, "the original's predictions")

    if accelerator.is_main_process:
        keep_predictions(original, ids, choice.top, folder / _TEACHER, step)
    accelerator.wait_for_everyone()
    return Teacher(ids, keep_predictions(original, ids, choice.top, folder / _TEACHER, step))


def _originals(quantized: Checkpoint, checkpoint: Checkpoint, reader: FileReader) -> Originals:
    """Original weights, unless channels were scaled before rounding: a packed weight then stands for another one."""
    if has_scaled_channels(quantized):
        return lambda module: None
    weights = weights_of(quantized)

    def find(module: str) -> Tensor:
        stored = weights[module]
        return to_matrix(reader.tensor(checkpoint.entries[stored.tensor_name(module)]), stored.transposed)

    return find


def _crowded(model: Any, choice: TuningChoice, ids: Tensor) -> bool:
    """Whether the activations of one micro-batch would take more than half of the memory that is free."""
    free = torch.cuda.mem_get_info()[0] if model.device.type == "cuda" else available_bytes()
    return activation_bytes(model.config, choice.micro_batch * ids.shape[1]) > free // 2
