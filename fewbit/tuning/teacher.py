"""The original's predictions over the training sequences: computed once and kept compactly, or anew each time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fewbit.checkpoints.whole_file import save_whole
from fewbit.tuning.losses import Prediction, predict

Step = Callable[[int, int], None]


class Teacher:
    """Predictions of sequences by their number."""

    def __init__(self, ids: Tensor, kept: Prediction | None, model: Any = None) -> None:
        self._ids, self._kept, self._model = ids, kept, model

    def __call__(self, numbers: list[int]) -> Prediction:
        """Predictions of all tokens of these sequences but their first, `(tokens, k)`."""
        if self._kept is not None:
            return self._kept[numbers].flat()
        with torch.inference_mode():
            logits = self._model(self._ids[numbers].to(self._model.device), use_cache=False).logits[:, :-1]
        return predict(logits, 0).flat()


def keep_predictions(model: Any, ids: Tensor, top: int, file: Path, step: Step) -> Prediction:
    """Predictions of `model` for `ids` `(sequences, length)`, the `top` most likely tokens of each; kept in `file`.

    Takes 6 bytes for each of them. A file that is there already is read.
    """
    if not file.is_file():
        values, indices = [], []
        with torch.inference_mode():
            for number, sequence in enumerate(ids):
                logits = model(sequence[None].to(model.device), use_cache=False).logits[0, :-1]
                found = predict(logits, min(top, logits.shape[-1] - 1))
                assert found.indices is not None
                values.append(found.log_probabilities.to(torch.float16).cpu())
                indices.append(found.indices.cpu())
                step(number + 1, ids.shape[0])
        save_whole({"log_probabilities": torch.stack(values), "indices": torch.stack(indices)}, file)
    kept = load_file(file)
    return Prediction(kept["log_probabilities"], kept["indices"])
