"""The file formats that a model can be exported to, and the runtimes that they are for: two tables of objects.

A new format is a row of FORMATS, a new runtime a row of TARGETS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fewbit.architecture.coverage import WeightTensor
from fewbit.checkpoints.source import Checkpoint
from fewbit.checkpoints.workdir import WorkFolder
from fewbit.errors import FewbitError
from fewbit.exports.compressed_folder import compressed_problem, write_compressed
from fewbit.exports.compressed_targets import RUNTIMES
from fewbit.exports.compressed_weights import form_of as compressed_form
from fewbit.exports.gguf_architectures import architecture_of
from fewbit.exports.gguf_file import gguf_problem, write_gguf
from fewbit.exports.gguf_types import form_of
from fewbit.grids.scheme import Scheme
from fewbit.pipeline.plan import Plan
from fewbit.progress import Progress
from fewbit.recipe import Recipe


@dataclass(frozen=True)
class Format:
    """A file format.

    holds(scheme): whether a stored weight keeps its bits. problem(checkpoint, embeddings): why a model cannot be
    written, or None. write(checkpoint, work, embeddings, progress): write the model into the folder of `work`; returns
    what the report says about it, with the name of the `file` that holds the weights, or lists those that do.
    """

    name: str
    summary: str
    holds: Callable[[Scheme], bool]
    problem: Callable[[Checkpoint, str], str | None]
    write: Callable[[Checkpoint, WorkFolder, str, Progress | None], dict[str, Any]]


@dataclass(frozen=True)
class Fit:
    """The grid of one tensor, None to keep it in 16 bits, and why it is not the one that the bits ask for ("")."""

    grid: str | None
    note: str = ""


@dataclass(frozen=True)
class Target:
    """A runtime.

    format: the name of its format. grids: those that it loads. fit(tensor, bits): the grid of a tensor.
    refuses(checkpoint): why it cannot run the model, or None. embeddings(checkpoint): what embeddings and head are
    rounded to, as in :func:`fewbit.exports.gguf_file.write_gguf`. choices(checkpoint, flat): the choices of a recipe,
    in place of a grid for each tensor. problem(plan): why it does not load a planned model, or None.
    notes(checkpoint, flat): what the user should know about these choices.
    """

    name: str
    summary: str
    format: str
    grids: tuple[str, ...]
    fit: Callable[[WeightTensor, float], Fit]
    refuses: Callable[[Checkpoint], str | None]
    embeddings: Callable[[Checkpoint], str]
    choices: Callable[[Checkpoint, dict[str, Any]], dict[str, Any]] | None = None
    problem: Callable[[Plan], str | None] = lambda _: None
    notes: Callable[[Checkpoint, dict[str, Any]], list[str]] = lambda checkpoint, flat: []


def _write_gguf(checkpoint: Checkpoint, work: WorkFolder, embeddings: str, progress: Progress | None) -> dict[str, Any]:
    name = f"{work.out.name}.gguf"
    return {"file": name, **write_gguf(checkpoint, work.file(name), embeddings, progress)}


FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Format(
            "gguf",
            "one .gguf file for llama.cpp and what is built on it",
            lambda scheme: form_of(scheme) is not None,
            gguf_problem,
            _write_gguf,
        ),
        Format(
            "compressed-tensors",
            "a folder for transformers and vLLM",
            lambda scheme: compressed_form(scheme) is not None,
            compressed_problem,
            write_compressed,
        ),
    )
}


_BY_BITS: tuple[tuple[float, str, int], ...] = (
    (2, "q2_k", 256),
    (3, "q3_k", 256),
    (4, "q4_k", 256),
    (4, "iq4_nl", 32),
    (5, "q5_k", 256),
    (5, "q5_0", 32),
    (6, "q6_k", 256),
    (8, "q8_0", 32),
)
"""Bits, block type, and what must divide the columns. Of types of one width, the first has less error."""


def _fit_llama_cpp(tensor: WeightTensor, bits: float) -> Fit:
    """The first type of at least these bits whose blocks divide the columns."""
    columns = tensor.matrix_shape[1]
    found = next((row for row in _BY_BITS if row[0] >= bits and columns % row[2] == 0), None)
    if found is None:
        return Fit(None, f"{columns} columns are no multiple of 32: kept in 16 bits")
    wanted = next(row for row in _BY_BITS if row[0] >= bits)
    narrow = found[0] > bits and found[0] != wanted[0]
    return Fit(found[1], f"256 does not divide {columns} columns: {found[1]} in place of {wanted[1]}" if narrow else "")


def _refuses_llama_cpp(checkpoint: Checkpoint) -> str | None:
    try:
        architecture_of(checkpoint.config, str(checkpoint.folder))
    except FewbitError as error:
        return str(error)
    return None


def _embeddings_llama_cpp(checkpoint: Checkpoint) -> str:
    hidden = int(checkpoint.config.get("hidden_size") or 0)
    return "q8_0" if hidden and hidden % 32 == 0 else "keep"


TARGETS: dict[str, Target] = {
    one.name: one
    for one in (
        Target(
            "llama.cpp",
            "llama.cpp, Ollama, LM Studio: a folder with one .gguf file",
            "gguf",
            (
                *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "iq4_xs"),
                *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "tq2_0"),
            ),
            _fit_llama_cpp,
            _refuses_llama_cpp,
            _embeddings_llama_cpp,
        ),
        *(
            Target(
                one.name,
                one.summary,
                "compressed-tensors",
                one.grids,
                lambda tensor, bits: Fit(None),
                lambda checkpoint: None,
                lambda checkpoint: "keep",
                one.choices,
                one.problem,
            )
            for one in RUNTIMES
        ),
    )
}


def target_named(name: str) -> Target:
    """The target of that name. Raises FewbitError if there is none."""
    _check(name, TARGETS, "--for")
    return TARGETS[name]


def format_named(name: str) -> Format:
    """The format of that name. Raises FewbitError if there is none."""
    _check(name, FORMATS, "--format")
    return FORMATS[name]


def export_problems(recipe: Recipe, planned: Sequence[dict[str, Any]]) -> dict[str, str | None]:
    """Format -> None, or why it cannot hold the planned weights, as `fewbit plan` lists them (name, group_size)."""
    found: dict[str, str | None] = {}
    for name, kind in FORMATS.items():
        lost = [one["name"] for one in planned if not kind.holds(recipe.at(one["name"]).scheme(one["group_size"]))]
        found[name] = f"cannot hold {len(lost)} of {len(planned)} weights: see --for" if lost else None
    return found


def _check(name: str, known: Sequence[str] | dict[str, Any], flag: str) -> None:
    if name not in known:
        raise FewbitError(f"{flag} must be one of {', '.join(known)}, not {name!r}")
