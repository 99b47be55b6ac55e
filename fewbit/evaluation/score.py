"""Score a loaded model on windows of tokens: its loss, and the divergence from the original's predictions."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import FewbitError
from fewbit.evaluation.perplexity import Totals, check_finite, quantile
from fewbit.memory import available_bytes
from fewbit.printable import first_line
from fewbit.runtime.load import load_decoder

Step = Callable[[str], None]


class Original:
    """The original's logits, stored in memory if they fit into half of the free memory, else recomputed."""

    def __init__(
        self, name: str | Path, windows: Tensor, device: str | None, step: Step | None = None, dtype: Any = "auto"
    ) -> None:
        """Load the model; if its logits fit, run it on `windows` `(windows, length)` and call `step` after each."""
        self._model = load_decoder(name, dtype, device)
        self._windows, self._step, self.name = windows, step, str(name)
        vocabulary = self._model.get_output_embeddings().weight.shape[0]
        size = windows.numel() * vocabulary * self._model.dtype.itemsize
        self._kept: list[Tensor] | None = [] if size < available_bytes() // 2 else None
        if self._kept is not None:
            for window in windows:
                self._kept.append(window_logits(self._model, window).cpu())
                if step:
                    step(f"original {name}")
            del self._model

    def logits(self, index: int) -> Tensor:
        """Logits `(tokens - 1, vocabulary)` of window `index`."""
        if self._kept is not None:
            return self._kept[index]
        return window_logits(self._model, self._windows[index])


def is_of_the_input(error: Exception) -> bool:
    """Whether a model's error was caused by its input: too many tokens, or tokens outside its vocabulary."""
    said = str(error)
    return isinstance(error, IndexError) or "size of tensor" in said or "index out of range" in said


@torch.inference_mode()
def window_logits(model: Any, window: Tensor) -> Tensor:
    """Logits `(tokens - 1, vocabulary)` that predict every token of a window except the first."""
    try:
        return model(window[None].to(model.device), use_cache=False).logits[0, :-1]
    except (IndexError, RuntimeError) as error:
        if not is_of_the_input(error):
            raise
        raise FewbitError(f"the model cannot run a window of {window.numel()} tokens ({first_line(error)})") from error


def window_losses(model: Any, windows: Tensor, name: str, step: Step | None = None) -> list[float]:
    """Mean next-token loss of every window, in nats per token. Raises FewbitError if one is NaN or infinite."""
    found = []
    for window in windows:
        totals = Totals()
        totals.add(window_logits(model, window), window[1:].to(model.device), None)
        loss = totals.nll / totals.tokens
        check_finite(loss, name)
        found.append(loss)
        if step:
            step(name)
    return found


def score(
    model: Any, windows: Tensor, original: Original | None, name: str, step: Step | None = None
) -> dict[str, float]:
    """Loss of `model` in nats per token; with an original also the KL divergence from it, in nats per token.

    Returns ``perplexity, nll`` and ``kl_mean, kl_p99, top1_agreement, perplexity_ratio``. `name` is for messages.
    Raises FewbitError if the loss is NaN or infinite.
    """
    totals, baseline = Totals(), Totals()
    for index, window in enumerate(windows):
        targets = window[1:].to(model.device)
        expected = original.logits(index) if original is not None else None
        logits = window_logits(model, window)
        if expected is not None and expected.shape != logits.shape:
            raise FewbitError(f"{name}: its vocabulary differs from that of the reference: is it the same model?")
        totals.add(logits, targets, expected)
        if expected is not None:
            baseline.add(expected.to(model.device), targets, None)
        if step:
            step(name)
    nll = totals.nll / totals.tokens
    check_finite(nll, name)
    if nll > 700:
        raise FewbitError(f"{name}: its loss is {nll}: are the weights damaged?")
    if original is not None:
        check_finite(baseline.nll, original.name)
    row: dict[str, float] = {"perplexity": math.exp(nll), "nll": nll}
    if original is not None:
        row["kl_mean"] = float(torch.cat(totals.divergences).double().mean())
        check_finite(row["kl_mean"], name, "divergence from the reference")
        row["kl_p99"] = quantile(totals.divergences, 0.99)
        row["top1_agreement"] = totals.same_top / totals.tokens
        row["perplexity_ratio"] = math.exp(nll - baseline.nll / baseline.tokens)
    return row
