"""Find heads that a checkpoint stores a second time although they are tied to the embeddings."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fewbit.architecture.block_lists import is_head
from fewbit.architecture.coverage import WeightTensor
from fewbit.checkpoints.safetensors_io import FileReader, TensorEntry
from fewbit.checkpoints.source import Checkpoint

_CHUNK = 1 << 22


def find_copies(checkpoint: Checkpoint, tables: Sequence[WeightTensor]) -> dict[str, str]:
    """Head -> embedding, for heads that the config ties to an embedding with the same values.

    tables: the embeddings and heads of the checkpoint. transformers ties such a head when it is missing. If the values
    differ, transformers keeps both, and so do we.
    """
    if not _says_tied(checkpoint.config):
        return {}
    heads = [table.entry for table in tables if is_head(table.entry.name)]
    others = [table.entry for table in tables if not is_head(table.entry.name)]
    with FileReader() as reader:
        found = {head.name: next((one.name for one in others if _equal(head, one, reader)), None) for head in heads}
    return {name: source for name, source in found.items() if source is not None}


def _says_tied(config: Mapping[str, Any]) -> bool:
    """Whether the config, or that of its text model, ties the head to the embeddings."""
    text = config.get("text_config")
    stated = [one.get("tie_word_embeddings") for one in (config, text) if isinstance(one, Mapping)]
    return True in stated and False not in stated


def _equal(one: TensorEntry, other: TensorEntry, reader: FileReader) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    spans = ((first, min(_CHUNK, one.numel - first)) for first in range(0, one.numel, _CHUNK))
    return all(torch.equal(reader.read(one, *span), reader.read(other, *span)) for span in spans)
