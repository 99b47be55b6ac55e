"""`fewbit eval`: perplexity of models, their divergence from the original, and accuracy on tasks."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import open_checkpoint
from fewbit.errors import FewbitError
from fewbit.evaluation.perplexity import Protocol
from fewbit.evaluation.rounded import RoundedChoice, Scoring, is_original, score_rounded
from fewbit.evaluation.score import Original, score
from fewbit.evaluation.task_answers import answer_tasks, summarize
from fewbit.evaluation.tasks import OpenTasks, TaskChoice, open_tasks
from fewbit.evaluation.text import Text, read_text
from fewbit.evaluation.windows import read_tokenizer, read_windows
from fewbit.formats.config import describe
from fewbit.memory import peak_rss_bytes
from fewbit.progress import Progress
from fewbit.runtime.load import load_decoder
from fewbit.runtime.unpack import unpack_modules
from fewbit.versions import versions

LOSS = "next token, mean over scored tokens, float32"


def evaluate(
    models: str | Path | Sequence[str | Path],
    data: str | Path | None = None,
    protocol: Protocol | None = None,
    reference: str | Path | None = None,
    device: str | None = None,
    progress: Progress | None = None,
    tasks: TaskChoice | None = None,
    rounded: RoundedChoice | None = None,
) -> dict[str, Any]:
    """Evaluate models on a text, on tasks, or on both.

    models: one or several, as for :func:`fewbit.load`. data: as for :func:`fewbit.evaluation.text.read_text`.
    reference: the original, with which each model is compared on the text. rounded: also evaluate the originals among
    the models with 8-bit weights and inputs, each in a separate row.

    Returns ``{"models": [...], "protocol": {...}, "versions": {...}}`` with the stable keys of `docs/guide.md`. Raises
    FewbitError for bad input.
    """
    names = [models] if isinstance(models, str | Path) else list(models)
    if not names:
        raise FewbitError("give at least one model to evaluate")
    if data is None and tasks is None:
        raise FewbitError("nothing to evaluate: give --data, --tasks or both")
    if data is None and reference is not None:
        raise FewbitError("--reference compares models on a text: give --data too")
    if data is None and rounded is not None:
        raise FewbitError("--w8a8 is evaluated on a text: give --data too")
    originals = [name for name in names if rounded is not None and is_original(name)]
    if rounded is not None and not originals:
        raise FewbitError("--w8a8 needs an original model, but the given models are all quantized: add an original")
    protocol = protocol or Protocol()
    text = read_text(data, progress) if data is not None else None
    opened = open_tasks(tasks) if tasks is not None else None
    first = locate(reference if reference is not None else names[0])
    windows, bos = read_windows(first, text, protocol, progress) if text is not None else (None, False)
    scored = windows.shape[0] if windows is not None else 0
    more = len(originals) * len(rounded.names) * scored if rounded is not None else 0
    total = more + len(names) * (scored + (opened.requests if opened is not None else 0))
    shown = _Counter(progress, total + (scored if reference is not None else 0))
    original = None
    if reference is not None and windows is not None:
        original = Original(reference, windows, device, shown.step, protocol.torch_dtype)
    work = _Work(windows, original, opened, protocol, device)
    rows = []
    for name in names:
        extra: list[dict[str, Any]] = []
        if rounded is not None and windows is not None and name in originals:
            # First, so that an error in the calibration set ends the run before the other work.
            scoring = Scoring(windows, original, protocol.torch_dtype, device, shown.step, shown.say)
            extra = score_rounded(name, rounded, scoring)
        rows += [_evaluate_one(name, work, shown), *extra]
    described: dict[str, Any] = {"reference": str(reference) if reference is not None else None}
    if text is not None and windows is not None:
        described |= {**describe_protocol(protocol, windows, bos, text), "loss": LOSS}
    if opened is not None:
        described["tasks"] = opened.protocol()
    return {"models": rows, "protocol": described, "versions": versions()}


def describe_protocol(protocol: Protocol, windows: Tensor, bos: bool, text: Text) -> dict[str, Any]:
    """A description of what was scored, for the output: windows, BOS, tokens, data and its hash."""
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
        self.say(what)

    def say(self, what: str) -> None:
        if self._progress:
            self._progress(min(self._done, self._total), self._total, what)


@dataclass(frozen=True)
class _Work:
    """What is measured on every model: loss on windows `(windows, tokens)`, divergence from an original, and tasks."""

    windows: Tensor | None
    original: Original | None
    tasks: OpenTasks | None
    protocol: Protocol
    device: str | None


def _evaluate_one(name: str | Path, work: _Work, shown: _Counter) -> dict[str, Any]:
    started = time.perf_counter()
    folder = locate(name)
    checkpoint = open_checkpoint(folder)
    model = unpack_modules(load_decoder(name, work.protocol.torch_dtype, work.device))
    row: dict[str, Any] = {"name": str(name), **describe(checkpoint)}
    if work.windows is not None:
        row |= score(model, work.windows, work.original, str(name), shown.step)
    if work.tasks is not None:
        row["tasks"] = _score_tasks(name, model, folder, work.tasks, shown)
    row["dtype"] = str(model.dtype).removeprefix("torch.")
    row["seconds"] = time.perf_counter() - started
    row["peak_rss_bytes"] = peak_rss_bytes()
    return row


def _score_tasks(name: str | Path, model: Any, folder: Path, tasks: OpenTasks, shown: _Counter) -> dict[str, Any]:
    try:
        answered = answer_tasks(model, read_tokenizer(folder), tasks, lambda: shown.step(str(name)))
    except FewbitError as error:
        raise FewbitError(f"{name}: {error}") from error
    return {task: summarize(answers) for task, answers in answered.items()}
