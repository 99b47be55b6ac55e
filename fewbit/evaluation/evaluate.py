"""`fewbit eval`: perplexity of models, and their distance from the original, window by window."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import open_checkpoint
from fewbit.errors import FewbitError
from fewbit.evaluation.perplexity import Protocol
from fewbit.evaluation.score import Original, score
from fewbit.evaluation.text import Text, read_text
from fewbit.evaluation.windows import read_windows
from fewbit.formats.config import describe
from fewbit.memory import peak_rss_bytes
from fewbit.runtime.load import load
from fewbit.runtime.unpack import unpack_modules
from fewbit.versions import versions

Progress = Callable[[int, int, str], None]
LOSS = "next token, mean over scored tokens, float32"


def evaluate(
    models: str | Path | Sequence[str | Path],
    data: str | Path,
    protocol: Protocol | None = None,
    reference: str | Path | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate models on a text.

    models: one or several, as for :func:`fewbit.load`. data: as for :func:`fewbit.evaluation.text.read_text`.
    reference: the original, for the distance of each model from it.
    Returns ``{"models": [...], "protocol": {...}, "versions": {...}}`` with the stable keys of `docs/guide.md`.
    Raises FewbitError for bad input.
    """
    names = [models] if isinstance(models, str | Path) else list(models)
    if not names:
        raise FewbitError("name at least one model to evaluate")
    protocol = protocol or Protocol()
    text = read_text(data)
    first = locate(reference if reference is not None else names[0])
    windows, bos = read_windows(first, text, protocol)
    shown = _Counter(progress, windows.shape[0] * (len(names) + (1 if reference is not None else 0)))
    original = Original(reference, windows, device, shown.step) if reference is not None else None
    rows = [_evaluate_one(name, windows, original, device, shown) for name in names]
    return {
        "models": rows,
        "protocol": {
            **describe_protocol(protocol, windows, bos, text),
            "reference": str(reference) if reference is not None else None,
            "loss": LOSS,
        },
        "versions": versions(),
    }


def describe_protocol(protocol: Protocol, windows: Tensor, bos: bool, text: Text) -> dict[str, Any]:
    """What was scored, for the output: windows, BOS, tokens, data and its hash."""
    return {
        **asdict(protocol),
        "bos": "always" if bos else "never",
        "windows": windows.shape[0],
        "tokens_scored": windows.shape[0] * (windows.shape[1] - 1),
        "data": text.name,
        "data_sha256": text.sha256,
    }


class _Counter:
    """Counts windows over all models for the progress line."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def step(self, what: str) -> None:
        self._done += 1
        if self._progress:
            self._progress(min(self._done, self._total), self._total, what)


def _evaluate_one(
    name: str | Path, windows: Tensor, original: Original | None, device: str | None, shown: _Counter
) -> dict[str, Any]:
    started = time.perf_counter()
    checkpoint = open_checkpoint(locate(name))
    model = unpack_modules(load(name, device=device))
    row: dict[str, Any] = {
        "name": str(name),
        **describe(checkpoint),
        **score(model, windows, original, str(name), shown.step),
    }
    row["dtype"] = str(model.dtype).removeprefix("torch.")
    row["seconds"] = time.perf_counter() - started
    row["peak_rss_bytes"] = peak_rss_bytes()
    return row
