"""llama.cpp: the type of each tensor, by bits, by name, or by a mixture; and that of embeddings and head."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fewbit.architecture.coverage import WeightTensor
from fewbit.checkpoints.source import Checkpoint
from fewbit.errors import FewbitError
from fewbit.exports.gguf_architectures import architecture_of, metadata
from fewbit.exports.gguf_mixtures import MIXTURES, Mixture
from fewbit.exports.gguf_tokenizer import tokenizer_facts
from fewbit.exports.least_loss import Fit, kind_of, least_loss
from fewbit.formats.gguf_blocks import BLOCK_TYPES
from fewbit.grids.embeddings import KEPT, EmbeddingChoice, default_bits
from fewbit.grids.table import GRIDS
from fewbit.pipeline.plan import cover_original

NAME = "llama.cpp"
GRID_NAMES = tuple(BLOCK_TYPES)
BITS = (2, 3, 4, 5, 6, 8)
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


def fit(tensor: WeightTensor, bits: float, wanted: str = "") -> Fit:
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


def choices(checkpoint: Checkpoint, flat: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The choices of a recipe, and notes for the user: a type that is named is used, or else one for each tensor.

    Raises FewbitError for a model that llama.cpp cannot run, and for grids and bits that it does not have.
    """
    # Refuse a model that llama.cpp does not know before anything is computed.
    where = str(checkpoint.folder)
    dict(metadata(architecture_of(checkpoint.config, where), checkpoint.config, where))
    tokenizer_facts(checkpoint.folder, checkpoint.config)
    EmbeddingChoice(flat.get("embedding_bits"))
    if flat.get("symmetric") is not None:
        raise FewbitError(f"--for {NAME}: the levels are those of its types: leave out --symmetric/--asymmetric")
    # Embeddings are rounded when the file is written, to a type of llama.cpp's.
    flat = {**flat, "embedding_bits": KEPT}
    given = flat.get("grid")
    if given in BLOCK_TYPES:
        return flat, []
    if given is not None and given not in MIXTURES:
        raise FewbitError(f"--for {NAME}: holds the grids {', '.join((*GRID_NAMES, *MIXTURES))}, not {given}")
    if given is not None and flat.get("bits") is not None:
        raise FewbitError(f"the mixture {given} has its own bits: leave --bits out")
    bits = float(flat.get("bits") or 4)
    if not BITS[0] <= bits <= BITS[-1]:
        allowed = f"{BITS[0]} or more" if bits < BITS[0] else f"{BITS[-1]} or less"
        raise FewbitError(f"--for {NAME}: has no type of {bits:g} bits: use --bits {allowed}")
    coverage = cover_original(checkpoint, flat.get("include") or (), flat.get("exclude") or ())
    tensors = coverage.of("quantize")
    if given is None:
        fits = least_loss({tensor: fit(tensor, bits) for tensor in tensors})
    else:
        count = 1 + max((tensor.block for tensor in tensors if tensor.block is not None), default=0)
        fits = {tensor.entry.name: _mixed(MIXTURES[given], tensor, count) for tensor in tensors}
    used = Counter(fit.grid for fit in fits.values() if fit.grid is not None)
    if not used:
        raise FewbitError(f"{checkpoint.folder}: {next(iter(fits.values())).note}")
    most = used.most_common(1)[0][0]
    others = {name: fit.grid for name, fit in fits.items() if fit.grid not in (most, None)}
    kept = [name for name, fit in fits.items() if fit.grid is None]
    rest = {key: value for key, value in flat.items() if key != "bits"}
    sets = [f"{pattern}:grid={grid}" for pattern, grid in _patterns(others, fits).items()]
    rest["grid"], rest["sets"] = most, (*sets, *_as_list(flat.get("sets")))
    if kept:
        rest["exclude"] = (*(flat.get("exclude") or ()), *kept)
    notes = Counter(fit.note for fit in fits.values() if fit.note)
    return rest, [f"{count} of {len(fits)} layers: {note}" for note, count in notes.items()]


def embeddings(checkpoint: Checkpoint, flat: dict[str, Any]) -> str:
    """What embeddings and head are rounded to: for the bits given for them, or else for those of the layers.

    In a mixture of types they have 6 bits, as llama.cpp has it. It is the smallest type of at least these bits whose
    blocks divide the columns, or keep.
    """
    grid = str(flat.get("grid"))
    width = float(GRIDS[grid].widths[0]) if grid in GRIDS else float(flat.get("bits") or 4)
    bits = int(flat.get("embedding_bits") or (6 if grid in MIXTURES else default_bits(width)))
    hidden = int(checkpoint.config.get("hidden_size") or 0)
    fits = (name for least, block, name in ((6, 256, "q6_k"), (8, 32, "q8_0")) if bits <= least and hidden % block == 0)
    return next(fits, "keep") if hidden else "keep"


def _mixed(mixture: Mixture, tensor: WeightTensor, count: int) -> Fit:
    """The grid of a tensor in a mixture, or one of as many bits that its columns allow."""
    wanted = mixture.grid_of(tensor.entry.name.removesuffix(".weight"), tensor.block or 0, count)
    return fit(tensor, float(GRIDS[wanted].widths[0]), wanted)


def _patterns(others: dict[str, Any], fits: dict[str, Any]) -> dict[str, Any]:
    """Patterns of names for tensors that have another grid than most: one for all blocks where they agree."""
    found: dict[str, Any] = {}
    for name, grid in others.items():
        pattern = kind_of(name)
        alike = [fit.grid for other, fit in fits.items() if kind_of(other) == pattern]
        found[pattern if set(alike) == {grid} else name] = grid
    return found


def _as_list(sets: Any) -> Sequence[Any]:
    if not sets:
        return ()
    return (sets,) if isinstance(sets, str) else tuple(sets.items()) if isinstance(sets, dict) else tuple(sets)
