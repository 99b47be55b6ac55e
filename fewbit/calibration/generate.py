"""Calibration text that the original model generates itself, without external data."""

from typing import Any

import torch
from torch import Tensor

from fewbit.attention import SharedKeys
from fewbit.calibration.growing_cache import grow_in_place
from fewbit.errors import FewbitError
from fewbit.progress import Progress

BATCH = 32
NOT_FINITE_ADVICE = (
    "save the model in bfloat16 or float32 first (float16 overflows in many models trained in bfloat16); otherwise its "
    "weights are damaged"
)


@torch.inference_mode()
def generate_sequences(
    model: Any, bos: int | None, shape: tuple[int, int], seed: int, progress: Progress | None = None
) -> Tensor:
    """Sample sequences of exactly the requested length at temperature 1, int64 of `shape` (count, length).

    Each sequence starts with the BOS, or with a random token if there is none. The end of a text does not end a
    sequence: a new text follows. The result is deterministic on one type of machine, because the random numbers come
    from a separate generator. Raises FewbitError if logits are NaN or infinite.
    """
    if model is None:
        raise ValueError("the source 'self' needs the model")
    count, length = shape
    generator = torch.Generator().manual_seed(seed)
    device = model.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    parts = []
    for first in range(0, count, BATCH):
        rows = min(BATCH, count - first)
        if bos is None:
            ids = torch.randint(0, vocabulary, (rows, 1), generator=generator)
        else:
            ids = torch.full((rows, 1), bos)
        cache = None
        pieces = [ids]
        for place in range(1, length):
            if progress:
                progress(first * length + rows * place, count * length, "the model generates calibration text")
            with SharedKeys():
                out = model(pieces[-1].to(device), past_key_values=cache, use_cache=True)
            if cache is None:
                cache = out.past_key_values
                grow_in_place(cache, length)
            probabilities = torch.softmax(out.logits[:, -1].float().cpu(), dim=-1)
            if not bool(torch.isfinite(probabilities).all()):
                raise FewbitError(
                    f"the model's logits are NaN or infinite (after {place} tokens of its own text, in "
                    f"{str(model.dtype).removeprefix('torch.')}): {NOT_FINITE_ADVICE}"
                )
            pieces.append(torch.multinomial(probabilities, 1, generator=generator))
        parts.append(torch.cat(pieces, dim=1))
    return torch.cat(parts)
