"""The windows of an evaluation text, in a model's own tokenizer."""

from pathlib import Path
from typing import Any

from torch import Tensor

from fewbit.checkpoints.own_code import open_tokenizer
from fewbit.checkpoints.source import open_checkpoint
from fewbit.errors import FewbitError
from fewbit.evaluation.perplexity import Protocol, cut_windows
from fewbit.evaluation.text import Text


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder; FewbitError when there is none that transformers can read."""
    open_checkpoint(folder)
    return open_tokenizer(folder)


def read_windows(folder: Path, text: Text, protocol: Protocol) -> tuple[Tensor, bool]:
    """Windows `(windows, sequence_length)` of token ids, and whether each begins with a BOS.

    Raises FewbitError when the folder has no usable tokenizer or the text is too short.
    """
    tokenizer = read_tokenizer(folder)
    bos = None
    if protocol.bos != "never":
        adds = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
        if protocol.bos == "always" and tokenizer.bos_token_id is None:
            raise FewbitError(f"{folder}: its tokenizer has no BOS: use --bos never")
        bos = tokenizer.bos_token_id if adds or protocol.bos == "always" else None
    ids = tokenizer(text.content, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    return cut_windows(ids, protocol, bos), bos is not None
