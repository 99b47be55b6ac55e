"""Write a model as a .gguf file, or several: metadata, tokenizer, and every tensor under llama.cpp's name."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import Checkpoint
from fewbit.choices import check_name
from fewbit.curvature.choice import CurvatureChoice
from fewbit.errors import FewbitError
from fewbit.exports.gguf_architectures import Architecture, architecture_of, metadata
from fewbit.exports.gguf_tensors import check_schemes, import_gguf, items_of, own_tensors, tensor_names
from fewbit.exports.gguf_tokenizer import tokenizer_facts
from fewbit.exports.gguf_types import PLAIN
from fewbit.formats.config import recipe_of
from fewbit.formats.gguf_blocks import BLOCK_TYPES
from fewbit.grids.grid import ScaleSearch
from fewbit.grids.table import GRIDS
from fewbit.progress import Progress
from fewbit.recipe import Recipe
from fewbit.version import __version__

EMBEDDING_TYPES = (
    "keep",
    "f16",
    *(name for name, kind in BLOCK_TYPES.items() if name in ("q8_0", "q6_k", "q5_k", "q4_k")),
)
"""What embeddings and head can be rounded to. keep: as they are, or, if no type holds their packed form, as 16-bit
weights, with which they run."""
LARGEST = 40_000_000_000
"""Bytes of tensors in one file, above which there are several; hubs take files of up to 50 GB."""
_PHI_3 = re.compile("phi-?3", re.IGNORECASE)
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10}
_FILE_TYPES |= {"q3_k": 11, "q4_k": 14, "q5_k": 16, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30, "tq2_0": 37}
"""The type of most weights -> `general.file_type`, which programs show."""


def gguf_problem(checkpoint: Checkpoint, embeddings: str) -> str | None:
    """Why a model cannot be written as GGUF; None if it can. Nothing is read but headers and the tokenizer.

    embeddings: as in :func:`write_gguf`.
    """
    try:
        check_name("embeddings", embeddings, EMBEDDING_TYPES)
        where = str(checkpoint.folder)
        found = architecture_of(checkpoint.config, where)
        dict(metadata(found, checkpoint.config, where))
        tokenizer_facts(checkpoint.folder, checkpoint.config)
        check_schemes(checkpoint, tensor_names(found, checkpoint))
    except FewbitError as error:
        return str(error)
    return None


def write_gguf(
    checkpoint: Checkpoint,
    place: Callable[[str], Path],
    stem: str,
    embeddings: str = "keep",
    progress: Progress | None = None,
    largest: int | None = None,
) -> dict[str, Any]:
    """Write a native folder, or a 16-bit one, as STEM.gguf, or as STEM-00001-of-00003.gguf and so on.

    place(name): the path for a file of that name; all are in one folder. embeddings: the type to which embeddings and
    head are rounded, however they are stored, one of EMBEDDING_TYPES; all other tensors are written without loss.
    largest: bytes of tensors in one file, unless one tensor is larger; default LARGEST. Returns the name of the first
    file, from which llama.cpp finds the others, those of all, the number of tensors by type, the bytes, and the
    relative squared errors of what was rounded. Raises FewbitError for what GGUF cannot hold.
    """
    gguf = import_gguf()
    check_name("embeddings", embeddings, EMBEDDING_TYPES)
    where = str(checkpoint.folder)
    found = architecture_of(checkpoint.config, where)
    check_schemes(checkpoint, tensor_names(found, checkpoint))
    facts = dict(metadata(found, checkpoint.config, where))
    tokenizer = tokenizer_facts(checkpoint.folder, checkpoint.config)
    errors: dict[str, float] = {}
    with FileReader() as reader:
        items = [*own_tensors(found, checkpoint), *items_of(found, checkpoint, reader, embeddings, errors)]
        types = Counter(item.kind for item in items)
        weights: Counter[str] = Counter()
        for item in items:
            weights[item.kind] += math.prod(item.shape) if len(item.shape) > 1 else 0
        writer = gguf.GGUFWriter(None, found.name, split_max_size=largest or LARGEST)
        _add(writer, "general.type", "model")
        _add(writer, "general.name", _model_name(stem, found, tokenizer.values["ggml.tokens"]))
        _add(writer, "general.quantized_by", f"fewbit {__version__}")
        _add(writer, "general.quantization_version", 2)
        _add(writer, "general.file_type", _FILE_TYPES[weights.most_common(1)[0][0]])
        for key, value in facts.items():
            _add(writer, key, value)
        for key, value in tokenizer.values.items():
            _add(writer, f"tokenizer.{key}", value)
        if recipe := recipe_of(checkpoint):
            _add(writer, "fewbit.recipe", json.dumps(in_short(recipe), sort_keys=True, separators=(",", ":")))
        for item in items:
            kind = gguf.GGMLQuantizationType(_number(item.kind))
            size = math.prod(item.bytes_shape)
            writer.add_tensor_info(item.name, item.bytes_shape, np.dtype(np.uint8), size, kind)
        paths = [place(path.name) for path in writer.format_shard_names(Path(f"{stem}.gguf"))]
        # The package says that one file is enough, as a warning.
        writer.split_max_size = 0
        try:
            writer.write_header_to_file(paths[0].with_name(f"{stem}.gguf"))
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for index, item in enumerate(items):
                writer.write_tensor_data(item.read().numpy())
                if progress:
                    progress(index + 1, len(items), item.name)
        finally:
            writer.close()
    return {
        "file": paths[0].name,
        "files": [path.name for path in paths],
        "tensors": dict(types),
        "bytes": sum(path.stat().st_size for path in paths),
        "rounded": errors,
    }


def in_short(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe has otherwise than a plain one, without what its grid determines and what is not in use."""
    plain, grid = Recipe().to_dict(), GRIDS.get(str(recipe.get("grid")))
    unused = set(grid.brings) if grid else set()
    if recipe.get("outliers") == "none":
        unused |= {"outlier_fraction", "outlier_scope", "outlier_grid", "outlier_bits", "sensitivity"}
    if grid and len(grid.widths) == 1:
        unused |= {"bits"}
    # Those of embeddings and head are in the types of their tensors.
    unused |= {"embedding_bits"}
    nested = {"solver": plain["solver"], "search": asdict(ScaleSearch()), "curvature": asdict(CurvatureChoice())}
    found = {}
    for key, value in recipe.items():
        if key not in unused and value != plain.get(key):
            usual = nested.get(key, {}) if isinstance(value, dict) else {}
            found[key] = {k: v for k, v in value.items() if v != usual.get(k)} if usual else value
    return found


def _model_name(stem: str, found: Architecture, tokens: list[str]) -> str:
    """The file's name, which must say "phi-3" if the tokens are those of Phi-3, and must not otherwise.

    llama.cpp decides by the name whether spaces after these tokens are dropped, and fails if it lacks one of them.
    """
    has_them = {"<unk>", "<s>", "<|endoftext|>"} <= set(tokens)
    named = _PHI_3.search(stem) is not None
    if has_them and found.name == "phi3" and not named:
        return f"{stem} phi-3"
    return _PHI_3.sub("phi 3", stem) if named and not has_them else stem


def _number(kind: str) -> int:
    plain = dict(PLAIN.values())
    return plain[kind] if kind in plain else BLOCK_TYPES[kind].number


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a value with the type that llama.cpp expects: whole numbers are unsigned, other numbers are float32."""
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)
