"""Convert a folder to a foreign format: `fewbit export`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from fewbit.checkpoints.json_file import read_json, write_json
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.model_card import Written, base_of, write_card
from fewbit.checkpoints.output import CARD, REPORT
from fewbit.checkpoints.own_files import is_own
from fewbit.checkpoints.public_names import public_model
from fewbit.checkpoints.source import Checkpoint, open_checkpoint
from fewbit.checkpoints.stamps import file_stamps
from fewbit.checkpoints.whole_file import said_when_full
from fewbit.checkpoints.workdir import WorkFolder, check_output
from fewbit.errors import FewbitError
from fewbit.exports.table import Format, format_named
from fewbit.formats.config import recipe_of, weights_of
from fewbit.pipeline.records import published
from fewbit.progress import Progress
from fewbit.runtime.whole import check_all_parts
from fewbit.version import __version__


def export(
    folder: str | Path,
    dest: str | Path,
    format: str = "gguf",
    embeddings: str = "keep",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a quantized folder, or a 16-bit model, in a foreign format into the new folder `dest`.

    Weights are converted without loss, or the export is refused. embeddings: the type to which embeddings and head are
    rounded; keep (default) writes them as they are. Returns the report that is also written to `fewbit_report.json`:
    ``file``, ``bytes``, ``tensors`` (by type) and ``rounded`` (relative squared errors). Raises FewbitError for bad
    input; `dest` is then not created.
    """
    kind, out = format_named(format), Path(dest)
    check_is_folder(out, format)
    checkpoint = open_checkpoint(locate(folder))
    problem = kind.problem(checkpoint, embeddings) or _inputs_problem(kind, checkpoint)
    if problem:
        raise FewbitError(problem)
    if checkpoint.is_native:
        check_all_parts(checkpoint)
    replaces = check_output(out, checkpoint.folder, overwrite)
    work = WorkFolder(out, _job(checkpoint, format, embeddings), overwrite, replaces)
    try:
        with said_when_full("free some space and run the same command again"):
            written = kind.write(checkpoint, work, embeddings, progress)
            report = {"format": format, **written, **_source(checkpoint)}
            write_json(work.file(REPORT), report)
            base = replace(base_of(checkpoint.folder, public_model(folder), checkpoint.config), has_card=False)
            described = report.get("quantize") or {"fewbit_version": __version__, "recipe": report["recipe"]}
            write_card(work.file(CARD), base, Written(format, described, written["bytes"], written["file"]))
            work.publish()
    except BaseException as error:
        work.leave(error)
        raise
    finally:
        work.release()
    return report


def check_is_folder(out: Path, format: str) -> None:
    """Raise FewbitError for an output that is named like a file of the format."""
    if out.suffix == f".{format}":
        raise FewbitError(f"{out}: give a folder, such as {out.with_suffix('')}: the file is written into it")


def _inputs_problem(kind: Format, checkpoint: Checkpoint) -> str | None:
    """Why a folder whose inputs are rounded at run time cannot be written, or None."""
    if kind.with_inputs or not checkpoint.is_native:
        return None
    rounded = next((module for module, stored in weights_of(checkpoint).items() if stored.scheme.input_bits), None)
    if rounded is None:
        return None
    return f"{checkpoint.folder}: {rounded}: {kind.name} has no rounded inputs: use compressed-tensors"


def _source(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is known of a folder: its recipe, and the report of the run that made it."""
    if not checkpoint.is_native:
        return {"fewbit_version": __version__, "recipe": None}
    path = checkpoint.folder / REPORT
    made = {"quantize": published(read_json(path))} if is_own(path) else {}
    return {"fewbit_version": __version__, "recipe": recipe_of(checkpoint), **made}


def _job(checkpoint: Checkpoint, format: str, embeddings: str) -> dict[str, Any]:
    return {
        "export": str(checkpoint.folder.resolve()),
        "files": file_stamps(checkpoint.files),
        "format": format,
        "embeddings": embeddings,
    }
