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
from fewbit.formats.config import recipe_of, tables_of, weights_of
from fewbit.formats.native import stored_bytes
from fewbit.pipeline.records import published
from fewbit.progress import Progress
from fewbit.runtime.whole import check_all_parts
from fewbit.sizes import show_size
from fewbit.version import __version__

_SMALLER, _BLOCK, _BLOCK_BYTES = "q8_0", 32, 34
"""The type for embeddings that loses least, the weights and the bytes of a block of it."""


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
            notes = [*written.get("notes", ()), *_about_tables(kind, checkpoint, embeddings)]
            report = {"format": format, **written, **({"notes": notes} if notes else {}), **_source(checkpoint)}
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


def _about_tables(kind: Format, checkpoint: Checkpoint, embeddings: str) -> list[str]:
    """A line if packed embeddings or heads grow to 16 bits in a format that could hold them in fewer."""
    if embeddings != "keep" or _SMALLER not in kind.embeddings or not checkpoint.is_native:
        return []
    weights = weights_of(checkpoint)
    found = [weights[name] for name in tables_of(checkpoint) if not kind.holds(weights[name].scheme)]
    count = sum(stored.weights for stored in found)
    if not count or any(stored.shape[1] % _BLOCK for stored in found):
        return []
    packed = sum(stored_bytes(stored) for stored in found)
    return [
        f"embeddings and head, packed in {show_size(packed)}, take {show_size(2 * count)} in 16 bits: --embeddings "
        f"{_SMALLER} rounds them again and takes {show_size(count // _BLOCK * _BLOCK_BYTES)}"
    ]


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
