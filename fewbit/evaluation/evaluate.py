"""`fewbit eval`: perplexity of models and their distance from the original, window by window; accuracy on tasks."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import open_checkpoint
from fewbit.errors import FewbitError, missing_extra
from fewbit.evaluation.perplexity import Protocol, Totals, cut_windows, quantile
from fewbit.evaluation.task_answers import answer_tasks, summarize
from fewbit.evaluation.tasks import OpenTasks, TaskChoice, open_tasks
from fewbit.evaluation.text import Text, read_text
from fewbit.formats.config import describe
from fewbit.memory import available_bytes, peak_rss_bytes
from fewbit.runtime.load import load
from fewbit.runtime.unpack import unpack_modules
from fewbit.versions import versions

Progress = Callable[[int, int, str], None]


def evaluate(
    models: str | Path | Sequence[str | Path],
    data: str | Path | None = None,
    protocol: Protocol | None = None,
    reference: str | Path | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    tasks: TaskChoice | None = None,
) -> dict[str, Any]:
    """Evaluate models on a text, on tasks, or on both.

    models: one or several, as for :func:`fewbit.load`. data: as for :func:`fewbit.evaluation.text.read_text`.
    reference: the original, for the distance of each model from it on the text.
    Returns ``{"models": [...], "protocol": {...}, "versions": {...}}`` with the stable keys of `docs/guide.md`.
    Raises FewbitError for bad input.
    """
    names = [models] if isinstance(models, str | Path) else list(models)
    if not names:
        raise FewbitError("name at least one model to evaluate")
    if data is None and tasks is None:
        raise FewbitError("nothing to measure: give --data, --tasks or both")
    if data is None and reference is not None:
        raise FewbitError("the distance from --reference is measured on a text: give --data too")
    protocol = protocol or Protocol()
    text = read_text(data) if data is not None else None
    opened = open_tasks(tasks) if tasks is not None else None
    first = locate(reference if reference is not None else names[0])
    windows, bos = _windows(first, text, protocol) if text is not None else (None, False)
    scored = windows.shape[0] if windows is not None else 0
    total = len(names) * (scored + (opened.requests if opened is not None else 0))
    shown = _Counter(progress, total + (scored if reference is not None else 0))
    original = None
    if reference is not None and windows is not None:
        original = _Original(reference, windows, device, shown)
    work = _Work(windows, original, opened, device)
    rows = [_evaluate_one(name, work, shown) for name in names]
    described: dict[str, Any] = {"reference": str(reference) if reference is not None else None}
    if text is not None and windows is not None:
        described |= {
            **asdict(protocol),
            "bos": "always" if bos else "never",
            "windows": windows.shape[0],
            "tokens_scored": windows.shape[0] * (windows.shape[1] - 1),
            "data": text.name,
            "data_sha256": text.sha256,
            "loss": "next token, mean over scored tokens, float32",
        }
    if opened is not None:
        described["tasks"] = opened.protocol()
    return {"models": rows, "protocol": described, "versions": versions()}


class _Counter:
    """Counts windows over all models for the progress line."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def step(self, what: str) -> None:
        self._done += 1
        if self._progress:
            self._progress(min(self._done, self._total), self._total, what)


def _tokenizer(folder: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise missing_extra("transformers", "hf") from error
    open_checkpoint(folder)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise FewbitError(f"{folder}: no tokenizer that transformers can read") from error


def _windows(folder: Path, text: Text, protocol: Protocol) -> tuple[Tensor, bool]:
    tokenizer = _tokenizer(folder)
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


@dataclass(frozen=True)
class _Work:
    """What is measured on every model: a loss on windows `(windows, tokens)`, the distance from an original, tasks."""

    windows: Tensor | None
    original: _Original | None
    tasks: OpenTasks | None
    device: str | None


def _evaluate_one(name: str | Path, work: _Work, shown: _Counter) -> dict[str, Any]:
    started = time.perf_counter()
    folder = locate(name)
    checkpoint = open_checkpoint(folder)
    model = unpack_modules(load(name, device=work.device))
    row: dict[str, Any] = {"name": str(name), **describe(checkpoint)}
    if work.windows is not None:
        row |= _score_windows(name, model, work.windows, work.original, shown)
    if work.tasks is not None:
        row["tasks"] = _score_tasks(name, model, folder, work.tasks, shown)
    row["dtype"] = str(model.dtype).removeprefix("torch.")
    row["seconds"] = time.perf_counter() - started
    row["peak_rss_bytes"] = peak_rss_bytes()
    return row


def _score_tasks(name: str | Path, model: Any, folder: Path, tasks: OpenTasks, shown: _Counter) -> dict[str, Any]:
    try:
        answered = answer_tasks(model, _tokenizer(folder), tasks, lambda: shown.step(str(name)))
    except FewbitError as error:
        raise FewbitError(f"{name}: {error}") from error
    return {task: summarize(answers) for task, answers in answered.items()}


def _score_windows(
    name: str | Path, model: Any, windows: Tensor, original: _Original | None, shown: _Counter
) -> dict[str, Any]:
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
    found: dict[str, Any] = {"perplexity": math.exp(nll), "nll": nll}
    if original is not None:
        found["kl_mean"] = float(torch.cat(totals.divergences).double().mean())
        found["kl_p99"] = quantile(totals.divergences, 0.99)
        found["top1_agreement"] = totals.same_top / totals.tokens
        found["perplexity_ratio"] = math.exp(nll - baseline.nll / baseline.tokens)
    return found
