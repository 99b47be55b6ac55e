"""The windows of an evaluation text, tokenized by a model's own tokenizer."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoints.own_code import open_tokenizer
from fewbit.checkpoints.source import Checkpoint, open_checkpoint
from fewbit.errors import FewbitError
from fewbit.evaluation.perplexity import Protocol, cut_windows
from fewbit.evaluation.text import Text
from fewbit.progress import Progress
from fewbit.text.chat import render
from fewbit.text.tokenizer import bos_id, check_ids, check_tokenizer
from fewbit.text.tokens import first_tokens


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder. Raises FewbitError if there is none that transformers can read."""
    open_checkpoint(folder)
    return open_tokenizer(folder)


def read_windows(folder: Path, text: Text, protocol: Protocol, progress: Progress | None = None) -> tuple[Tensor, bool]:
    """Windows `(windows, sequence_length)` of token ids, and whether each starts with a BOS.

    Only as much of the text is tokenized as the windows need; conversations are rendered by the tokenizer's chat
    template. Raises FewbitError if the folder has no usable tokenizer or the text is too short.
    """
    tokenizer = read_tokenizer(folder)
    rows = vocabulary_rows(open_checkpoint(folder))
    if rows:
        check_tokenizer(tokenizer, rows, str(folder))
    bos = bos_id(tokenizer) if protocol.bos == "auto" else None
    if protocol.bos == "always":
        bos = tokenizer.bos_token_id
        if bos is None:
            raise FewbitError(f"{folder}: its tokenizer has no BOS: use --bos never")
    wanted = protocol.windows * protocol.sequence_length or None

    def counted(tokens: int) -> None:
        if progress:
            progress(tokens, max(wanted or 0, tokens), f"reading {text.name}")

    rendered = partial(render, tokenizer=tokenizer, bos=bos)
    found = first_tokens(tokenizer, lambda: text.pieces(rendered), wanted, bos, counted)
    ids = torch.tensor(found, dtype=torch.int64)
    if rows:
        check_ids(ids if bos is None else torch.cat([ids, torch.tensor([bos])]), tokenizer, rows, str(folder))
    return cut_windows(ids, protocol, bos), bos is not None


def vocabulary_rows(checkpoint: Checkpoint) -> int:
    """Rows of a model's embedding according to its config; 0 if the config does not say."""
    config = checkpoint.config
    inner = config.get("text_config")
    found = config.get("vocab_size") or (inner.get("vocab_size") if isinstance(inner, dict) else 0)
    return found if isinstance(found, int) else 0
