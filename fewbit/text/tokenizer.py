"""What we ask of a tokenizer: its BOS, and whether its tokens fit the model."""

from typing import Any

from torch import Tensor

from fewbit.errors import FewbitError


def bos_id(tokenizer: Any) -> int | None:
    """The BOS with which the tokenizer begins every text; None where it does not."""
    if tokenizer is None or tokenizer.bos_token_id is None:
        return None
    return int(tokenizer.bos_token_id) if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else None


def check_tokenizer(tokenizer: Any, rows: int, model: str) -> None:
    """FewbitError when ordinary tokens have no row in the model's embedding of so many `rows`.

    Added tokens beyond it are let pass, as text models have them that share a tokenizer with others (for images, say):
    only a text that holds one is wrong, which :func:`check_ids` finds.
    """
    added = set(getattr(tokenizer, "added_tokens_decoder", {}))
    beyond = [number for number in tokenizer.get_vocab().values() if number >= rows and number not in added]
    if beyond:
        raise FewbitError(
            f"{model}: its tokenizer has token ids up to {max(beyond)}, but its embedding has {rows} rows: the "
            "tokenizer belongs to another model: put the right one into the folder"
        )


def check_ids(ids: Tensor, tokenizer: Any, rows: int, model: str) -> None:
    """FewbitError when token ids (any shape) are beyond the embedding's `rows`, naming one of them."""
    largest = int(ids.max()) if ids.numel() else 0
    if largest >= rows:
        raise FewbitError(
            f"{model}: the token {tokenizer.convert_ids_to_tokens(largest)!r} of the text has the id {largest}, but "
            f"the embedding has {rows} rows: the tokenizer belongs to another model, or the text contains a token that "
            "the model does not know"
        )
