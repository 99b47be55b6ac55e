"""`fewbit eval`: perplexity of models, and their distance from the original, window by window."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import open_checkpoint
from fewbit.errors import FewbitError, missing_extra
from fewbit.evaluation.perplexity import Protocol, Totals, cut_windows, quantile
from fewbit.evaluation.text import Text, read_text
from fewbit.formats.config import describe
from fewbit.memory import available_bytes, peak_rss_bytes
from fewbit.runtime.load import load
from fewbit.runtime.unpack import unpack_modules
from fewbit.versions import versions

Progress = Callable[[int, int, str], None]


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
    windows, bos = _windows(first, text, protocol)
    shown = _Counter(progress, windows.shape[0] * (len(names) + (1 if reference is not None else 0)))
    original = _Original(reference, windows, device, shown) if reference is not None else None
    rows = [_evaluate_one(name, windows, original, device, shown) for name in names]
    return {
        "models": rows,
        "protocol": {
            **asdict(protocol),
            "bos": "always" if bos else "never",
            "windows": windows.shape[0],
            "tokens_scored": windows.shape[0] * (windows.shape[1] - 1),
            "data": text.name,
            "data_sha256": text.sha256,
            "reference": str(reference) if reference is not None else None,
            "loss": "next token, mean over scored tokens, float32",
        },
        "versions": versions(),
    }


class _Counter:
    """Counts windows over all models for the progress line."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def step(self, what: str) -> None:
        self._done += 1
        if self._progress:
            self._progress(min(self._done, self._total), self._total, what)


def _windows(folder: Path, text: Text, protocol: Protocol) -> tuple[Tensor, bool]:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise missing_extra("transformers", "hf") from error
    open_checkpoint(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise FewbitError(f"{folder}: no tokenizer that transformers can read") from error
    bos = None
    if protocol.bos != "never":
        adds = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
        if protocol.bos == "always" and tokenizer.bos_token_id is None:
            raise FewbitError(f"{folder}: its tokenizer has no BOS: use --bos never")
        bos = tokenizer.bos_token_id if adds or protocol.bos == "always" else None
    ids = tokenizer(text.content, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    return cut_windows(ids, protocol, bos), bos is not None


class _Original:
    """The original's logits, kept in memory when they fit into half of what is free, else computed each time."""

    def __init__(self, name: str | Path, windows: Tensor, device: str | None, shown: _Counter) -> None:
        self._model = load(name, device=device)
        self._windows, self._shown = windows, shown
        vocabulary = self._model.get_output_embeddings().weight.shape[0]
        size = windows.numel() * vocabulary * self._model.dtype.itemsize
        self._kept: list[Tensor] | None = [] if size < available_bytes() // 2 else None
        if self._kept is not None:
            for window in windows:
                self._kept.append(_logits(self._model, window).cpu())
                shown.step(f"original {name}")
            del self._model

    def logits(self, index: int) -> Tensor:
        if self._kept is not None:
            return self._kept[index]
        return _logits(self._model, self._windows[index])


@torch.inference_mode()
def _logits(model: Any, window: Tensor) -> Tensor:
    """Logits `(tokens - 1, vocabulary)` that predict every token of a window but its first."""
    try:
        return model(window[None].to(model.device), use_cache=False).logits[0, :-1]
    except (IndexError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise FewbitError(f"the model cannot run a window of {window.numel()} tokens ({first})") from error


def _evaluate_one(
    name: str | Path, windows: Tensor, original: _Original | None, device: str | None, shown: _Counter
) -> dict[str, Any]:
    started = time.perf_counter()
    checkpoint = open_checkpoint(locate(name))
    model = unpack_modules(load(name, device=device))
    totals, baseline = Totals(), Totals()
    for index, window in enumerate(windows):
        targets = window[1:].to(model.device)
        expected = original.logits(index) if original is not None else None
        logits = _logits(model, window)
        if expected is not None and expected.shape != logits.shape:
            raise FewbitError(f"{name}: its vocabulary is not the reference's: is it the same model?")
        totals.add(logits, targets, expected)
        if expected is not None:
            baseline.add(expected.to(model.device), targets, None)
        shown.step(str(name))
    nll = totals.nll / totals.tokens
    if not math.isfinite(nll) or nll > 700:
        raise FewbitError(f"{name}: its loss is {nll}, not a number to report: are the weights damaged?")
    row: dict[str, Any] = {
        "name": str(name),
        **describe(checkpoint),
        "perplexity": math.exp(nll),
        "nll": nll,
    }
    if original is not None:
        row["kl_mean"] = float(torch.cat(totals.divergences).double().mean())
        row["kl_p99"] = quantile(totals.divergences, 0.99)
        row["top1_agreement"] = totals.same_top / totals.tokens
        row["perplexity_ratio"] = math.exp(nll - baseline.nll / baseline.tokens)
    row["dtype"] = str(model.dtype).removeprefix("torch.")
    row["seconds"] = time.perf_counter() - started
    row["peak_rss_bytes"] = peak_rss_bytes()
    return row
