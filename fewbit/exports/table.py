"""The file formats that a model can be exported to, and the runtimes that they are for: two tables of objects.

A new format is a row of FORMATS, a new runtime a row of TARGETS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fewbit.checkpoints.source import Checkpoint
from fewbit.checkpoints.workdir import WorkFolder
from fewbit.errors import FewbitError
from fewbit.exports import llama_cpp_target
from fewbit.exports.compressed_folder import compressed_problem, write_compressed
from fewbit.exports.compressed_targets import BITS, RUNTIMES
from fewbit.exports.compressed_weights import form_of as compressed_form
from fewbit.exports.gguf_file import EMBEDDING_TYPES, gguf_problem, write_gguf
from fewbit.exports.gguf_mixtures import MIXTURES
from fewbit.exports.gguf_types import form_of
from fewbit.exports.gptq import AWQ, GPTQ
from fewbit.exports.integer_folder import write_folder
from fewbit.exports.integer_format import folder_problem, holds
from fewbit.exports.integer_targets import INTEGER_TARGETS
from fewbit.exports.mlx import MLX
from fewbit.grids.choice import MAX_BITS
from fewbit.grids.scheme import Scheme
from fewbit.grids.table import GRIDS
from fewbit.pipeline.plan import Plan
from fewbit.progress import Progress
from fewbit.recipe import Recipe


@dataclass(frozen=True)
class Format:
    """A file format.

    holds(scheme): whether a stored weight keeps its bits. problem(checkpoint, embeddings): why a model cannot be
    written, or None. write(checkpoint, work, embeddings, progress): write the model into the folder of `work`; returns
    what the report says about it, with the name of the `file` that holds the weights, or lists those that do.
    embeddings: what embeddings and head can be rounded to. with_inputs: it also holds that inputs are rounded.
    """

    name: str
    summary: str
    holds: Callable[[Scheme], bool]
    problem: Callable[[Checkpoint, str], str | None]
    write: Callable[[Checkpoint, WorkFolder, str, Progress | None], dict[str, Any]]
    embeddings: tuple[str, ...] = ("keep",)
    with_inputs: bool = False

    def keeps(self, scheme: Scheme) -> bool:
        """Whether a stored weight keeps its bits, and its inputs their rounding."""
        return self.holds(scheme) and (self.with_inputs or not scheme.input_bits)


@dataclass(frozen=True)
class Target:
    """A runtime.

    format: the name of its format, or None for fewbit's own, which needs no export. grids, bits: those that it loads.
    choices(checkpoint, flat): the choices of a recipe that it loads, from those that were given, and notes for the
    user; raises FewbitError if it cannot run the model or lacks what was asked for. problem(plan): why it does not load
    a planned model, or None. embeddings(checkpoint, flat): what embeddings and head are rounded to when the format is
    written.
    """

    name: str
    summary: str
    format: str | None
    grids: tuple[str, ...]
    bits: tuple[int, ...]
    choices: Callable[[Checkpoint, dict[str, Any]], tuple[dict[str, Any], list[str]]]
    problem: Callable[[Plan], str | None] = lambda _: None
    embeddings: Callable[[Checkpoint, dict[str, Any]], str] = lambda checkpoint, flat: "keep"


def _write_gguf(checkpoint: Checkpoint, work: WorkFolder, embeddings: str, progress: Progress | None) -> dict[str, Any]:
    return write_gguf(checkpoint, work.file, work.out.name, embeddings, progress)


FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Format(
            "gguf",
            "a .gguf file for llama.cpp and what is built on it; several above 40 GB",
            lambda scheme: form_of(scheme) is not None,
            gguf_problem,
            _write_gguf,
            EMBEDDING_TYPES,
        ),
        Format(
            "compressed-tensors",
            "a folder for transformers and vLLM",
            lambda scheme: compressed_form(scheme) is not None,
            compressed_problem,
            write_compressed,
            with_inputs=True,
        ),
        *(
            Format(one.name, one.summary, partial(holds, one), partial(folder_problem, one), partial(write_folder, one))
            for one in (GPTQ, AWQ, MLX)
        ),
    )
}


def _with_notes(one: Any) -> Callable[[Checkpoint, dict[str, Any]], tuple[dict[str, Any], list[str]]]:
    return lambda checkpoint, flat: (one.choices(checkpoint, flat), one.notes(checkpoint, flat))


def _without_notes(one: Any) -> Callable[[Checkpoint, dict[str, Any]], tuple[dict[str, Any], list[str]]]:
    return lambda checkpoint, flat: (one.choices(checkpoint, flat), [])


OWN = "fewbit"
"""The target that is meant if none is given."""
TARGETS: dict[str, Target] = {
    one.name: one
    for one in (
        Target(
            OWN,
            "fewbit's own format, which holds every choice: transformers loads it where fewbit is installed",
            None,
            tuple(dict.fromkeys(grid.choice for grid in GRIDS.values())),
            tuple(range(1, MAX_BITS + 1)),
            lambda _, flat: (flat, []),
        ),
        Target(
            llama_cpp_target.NAME,
            "llama.cpp, Ollama, LM Studio: a folder with a .gguf file",
            "gguf",
            (*llama_cpp_target.GRID_NAMES, *MIXTURES),
            llama_cpp_target.BITS,
            llama_cpp_target.choices,
            embeddings=llama_cpp_target.embeddings,
        ),
        *(
            Target(
                one.name, one.summary, "compressed-tensors", one.grids, BITS[one.name], _without_notes(one), one.problem
            )
            for one in RUNTIMES
        ),
        *(
            Target(one.name, one.summary, one.format.name, one.grids, one.format.widths, _with_notes(one), one.problem)
            for one in INTEGER_TARGETS
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
        lost = [one["name"] for one in planned if not kind.keeps(recipe.at(one["name"]).scheme(one["group_size"]))]
        found[name] = f"cannot hold {len(lost)} of {len(planned)} weights: see --for" if lost else None
    return found


def _check(name: str, known: Sequence[str] | dict[str, Any], flag: str) -> None:
    if name not in known:
        raise FewbitError(f"{flag} must be one of {', '.join(known)}, not {name!r}")
