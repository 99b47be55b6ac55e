"""The file formats that a model can be exported to, and the runtimes that they are for: two tables of objects.

A new format is a row of FORMATS, a new runtime a row of TARGETS.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewbit.architecture.coverage import WeightTensor
from fewbit.checkpoints.source import Checkpoint
from fewbit.errors import FewbitError
from fewbit.exports.gguf_architectures import architecture_of
from fewbit.exports.gguf_file import gguf_problem, write_gguf
from fewbit.exports.gguf_mixtures import MIXTURES, Mixture
from fewbit.exports.gguf_types import form_of
from fewbit.formats.gguf_blocks import BLOCK_TYPES
from fewbit.grids.scheme import Scheme
from fewbit.progress import Progress
from fewbit.recipe import Recipe


@dataclass(frozen=True)
class Format:
    """A file format.

    holds(scheme): whether a stored weight keeps its bits. problem(checkpoint, embeddings): why a model cannot be
    written, or None. write(checkpoint, path, embeddings,
    progress): write the model; returns what the report says about it. file(name): the file's name in the output folder.
    """

    name: str
    summary: str
    holds: Callable[[Scheme], bool]
    problem: Callable[[Checkpoint, str], str | None]
    write: Callable[[Checkpoint, Path, str, Progress | None], dict[str, Any]]
    file: Callable[[str], str]


@dataclass(frozen=True)
class Fit:
    """The grid of one tensor, None to keep it in 16 bits, and why it is not the one that the bits ask for ("").

    others: grids of no more bytes; of all, the one with the least predicted loss is taken.
    """

    grid: str | None
    note: str = ""
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """A runtime.

    format: the name of its format. grids: those that it loads. fit(tensor, bits, wanted): the grid of a
    tensor: the wanted one, if there is one and its columns allow it, or one of these bits.
    refuses(checkpoint): why it cannot run the model, or None. embeddings(checkpoint, bits): what embeddings and head
    are rounded to for `bits` of their own, as in :func:`fewbit.exports.gguf_file.write_gguf`. mixtures: names of grids
    by layer.
    """

    name: str
    summary: str
    format: str
    grids: tuple[str, ...]
    fit: Callable[[WeightTensor, float, str], Fit]
    refuses: Callable[[Checkpoint], str | None]
    embeddings: Callable[[Checkpoint, int], str]
    mixtures: Mapping[str, Mixture] = field(default_factory=dict)


FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Format(
            "gguf",
            "one .gguf file for llama.cpp and what is built on it",
            lambda scheme: form_of(scheme) is not None,
            gguf_problem,
            write_gguf,
            lambda name: f"{name}.gguf",
        ),
    )
}


_BY_BITS: tuple[tuple[float, str, int, tuple[str, ...]], ...] = (
    (2, "q2_k", 256, ()),
    (3, "q3_k", 256, ()),
    (4, "q4_k", 256, ("q4_0", "iq4_nl")),
    (4, "iq4_nl", 32, ("q4_0",)),
    (5, "q5_k", 256, ("q5_0",)),
    (5, "q5_0", 32, ()),
    (6, "q6_k", 256, ()),
    (8, "q8_0", 32, ()),
)
"""Bits, block type, what must divide the columns, and other types of as many bytes."""


def _fit_llama_cpp(tensor: WeightTensor, bits: float, wanted: str = "") -> Fit:
    """The wanted type, or else the first type of at least these bits, whose blocks divide the columns."""
    columns = tensor.matrix_shape[1]
    if wanted and columns % BLOCK_TYPES[wanted].weights == 0:
        return Fit(wanted)
    of_these = [row for row in _BY_BITS if row[0] >= bits]
    found = next((row for row in of_these if columns % row[2] == 0), None)
    if found is None:
        return Fit(None, f"{columns} columns are no multiple of 32: kept in 16 bits")
    asked = of_these[0][0]
    narrow = found[0] > bits and found[0] != asked
    note = f"256 does not divide {columns} columns: {found[0]} bits in place of {asked}" if narrow else ""
    return Fit(found[1], note, found[3])


def _refuses_llama_cpp(checkpoint: Checkpoint) -> str | None:
    try:
        architecture_of(checkpoint.config, str(checkpoint.folder))
    except FewbitError as error:
        return str(error)
    return None


def _embeddings_llama_cpp(checkpoint: Checkpoint, bits: int) -> str:
    """The smallest type of at least these bits whose blocks divide the columns."""
    hidden = int(checkpoint.config.get("hidden_size") or 0)
    fits = (name for least, block, name in ((6, 256, "q6_k"), (8, 32, "q8_0")) if bits <= least and hidden % block == 0)
    return next(fits, "keep") if hidden else "keep"


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
            MIXTURES,
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
