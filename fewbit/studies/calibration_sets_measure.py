"""The cells of the study `calibration-sets`: draw sets, calibrate methods on one, score them window by window."""

import hashlib
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fewbit.activations.choice import NAMED
from fewbit.calibration.tokens import CalibrationSet
from fewbit.checkpoints.whole_file import save_whole
from fewbit.curvature.choice import CurvatureChoice
from fewbit.curvature.store import open_curvature
from fewbit.errors import FewbitError, WorkKeptError
from fewbit.evaluation.score import window_losses
from fewbit.evaluation.task_answers import answer_tasks, summarize
from fewbit.evaluation.tasks import TaskChoice, open_tasks
from fewbit.evaluation.windows import read_tokenizer
from fewbit.grids.embeddings import KEPT
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.measure_curvature import measure_tokens
from fewbit.pipeline.network import open_original
from fewbit.pipeline.run import RunOptions, quantize
from fewbit.pipeline.w8a8 import rounding_inputs
from fewbit.recipe import preset
from fewbit.runtime.load import load_decoder
from fewbit.runtime.unpack import unpack_modules
from fewbit.studies.choice import StudyChoice
from fewbit.studies.opened import Opened, cover_model, open_model
from fewbit.studies.sets import NamedSet, draw_set
from fewbit.studies.study import Cell, Progress, Row, Tell

INPUTS = {name: NAMED[name] for name in ("w8a8", "smoothquant")}
"""Methods that round inputs: one range for all tokens, measured on the set."""
_ANY = 1 << 30
Scorer = Callable[[Any], dict[str, dict[str, Any]]]
"""Puts the questions of all tasks to a model; by task ``accuracy`` and, where there is one, ``standard_error``."""


@dataclass
class OpenedSets:
    """What the cells of one process share; scorer is None where no tasks are asked for."""

    inner: Opened
    scorer: Scorer | None


def open_sets(choice: StudyChoice) -> OpenedSets:
    """Load the model and build the questions of the tasks."""
    return OpenedSets(open_model(choice), task_scorer(choice))


def task_scorer(choice: StudyChoice) -> Scorer | None:
    """How tasks are scored, by the options `tasks`, `task_data` and `task_limit`; None for no tasks."""
    asked = asked_tasks(choice)
    if asked is None:
        return None
    opened = open_tasks(asked)
    tokenizer = read_tokenizer(cover_model(choice)[0].folder)

    def score(model: Any) -> dict[str, dict[str, Any]]:
        return {task: summarize(answers) for task, answers in answer_tasks(model, tokenizer, opened).items()}

    return score


def asked_tasks(choice: StudyChoice) -> TaskChoice | None:
    """The choice of tasks, None for none; FewbitError for one that cannot be."""
    names, data = choice.options.get("tasks"), choice.options.get("task_data")
    limit = choice.options.get("task_limit", 0)
    if not names:
        if data or limit:
            raise FewbitError("--task-data and --task-limit need --tasks: name the tasks")
        return None
    return TaskChoice(tuple(names), Path(data) if data else None, limit)


def draw_sets(choice: StudyChoice, wanted: Sequence[tuple[NamedSet, int]], progress: Progress | None) -> None:
    """Draw the sets with their seeds into the study's work folder, those that are not there yet."""
    choice.work.mkdir(parents=True, exist_ok=True)
    left = [(one, seed) for one, seed in wanted if not _path(choice, one, seed).is_file()]
    if not left:
        return
    checkpoint, _ = cover_model(choice)
    model = load_decoder(checkpoint.folder, device=choice.device)
    for done, (one, seed) in enumerate(left):
        if progress:
            progress(done, len(left), f"drawing {one.axis}/{one.name}, seed {seed}")
        ids = draw_set(one, choice.calibration, seed, checkpoint, model).ids
        path = _path(choice, one, seed)
        save_whole({"ids": ids}, path)


def _path(choice: StudyChoice, one: NamedSet, seed: int) -> Path:
    name = hashlib.sha256(f"{one.sources}\n{seed}".encode()).hexdigest()[:16]
    return choice.work / f"set-{name}.safetensors"


def _drawn(cell: Cell, choice: StudyChoice) -> CalibrationSet:
    one = NamedSet(cell["axis"], cell["set"], cell["sources"])
    ids = load_file(_path(choice, one, cell["seed"]))["ids"]
    return CalibrationSet(ids, replace(choice.calibration, sources=one.sources, seed=cell["seed"]))


def measure_original(opened: OpenedSets, tell: Tell) -> list[Row]:
    """Rows of the original."""
    tell(0.0, "the original")
    return _scored({"method": "original", "bits": 16, "bits_per_weight": 16.0}, opened.inner.model, opened)


def measure_set(cell: Cell, opened: OpenedSets, tell: Tell) -> list[Row]:
    """Rows of one set and seed: for every method a ``run``, a ``loss`` for each window, a ``task`` for each task, or
    ``failed`` with the reason.
    """
    drawn = _drawn(cell, opened.inner.choice)
    base = {key: cell[key] for key in ("set", "axis", "seed")}
    base["tokens_sha256"] = drawn.sha256
    if cell["measures"] == "inputs":
        return _inputs(cell, base, drawn, opened, tell)
    return _curvature(cell, base, drawn, opened, tell)


def _inputs(cell: Cell, base: Row, drawn: CalibrationSet, opened: OpenedSets, tell: Tell) -> list[Row]:
    rows: list[Row] = []
    for index, (method, bits) in enumerate(cell["methods"]):
        tell(index / len(cell["methods"]), f"{method} on {cell['set']}")
        choice = replace(INPUTS[method], bits=bits, weight_bits=bits)
        about = {**base, "method": method, "bits": bits}
        try:
            with rounding_inputs(opened.inner.network, choice, drawn.ids) as simulation:
                about["bits_per_weight"] = simulation.bits_per_weight
                rows += _scored(about, opened.inner.model, opened)
        except FewbitError as error:
            rows.append(_failed(about, error))
    return rows


def _curvature(cell: Cell, base: Row, drawn: CalibrationSet, opened: OpenedSets, tell: Tell) -> list[Row]:
    """Measure a curvature on the original's own inputs once, solve every method from it, score what was written."""
    choice, checkpoint = opened.inner.choice, opened.inner.checkpoint
    steps = len(cell["methods"]) + 1
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=choice.work) as folder:
        kept = Path(folder) / "curvature"
        what = f"{cell['measures']} on {cell['set']}"
        try:
            _measure(cell, drawn, opened, kept, lambda share: tell(share / steps, what))
        except FewbitError as error:
            return [_failed({**base, "method": method, "bits": bits}, error) for method, bits in cell["methods"]]
        stored = open_curvature(kept, checkpoint)
        for index, (method, bits) in enumerate(cell["methods"]):
            tell((index + 1) / steps, f"{method} on {cell['set']}")
            out = Path(folder) / f"{method}-{bits}"
            # Fallbacks are part of what a bad set does; they are counted in the row.
            options = CalibrationOptions(stored=stored, max_fallback=_ANY)
            run = RunOptions(device=choice.device, calibration=options)
            about = {**base, "method": method, "bits": bits}
            try:
                report = quantize(checkpoint.folder, out, preset(method, bits=bits, embedding_bits=KEPT), run)
                about["bits_per_weight"] = report["output"]["bits_per_weight"]
                about["fallbacks"] = sum(layer["path"].startswith("fallback") for layer in report["layers"])
                rows += _scored(about, unpack_modules(load_decoder(out, device=choice.device)), opened)
            except FewbitError as error:
                rows.append(_failed(about, error))
    return rows


def _measure(cell: Cell, drawn: CalibrationSet, opened: OpenedSets, out: Path, tell: Callable[[float], None]) -> None:
    choice, network = opened.inner.choice, opened.inner.network
    if cell["measures"] == "gram":
        # A walk empties the blocks behind it, so it takes a network of its own.
        _, network = open_original(choice.model, choice.device, walking=True)
    wanted = CurvatureChoice(**cell["curvature"])
    options = CalibrationOptions(drawn.choice)
    measure_tokens(
        network, opened.inner.checkpoint, drawn, out, wanted, options, lambda done, total, _: tell(done / total)
    )


def _failed(about: Row, error: FewbitError) -> Row:
    """A set that a method cannot take is a result too: the other cells go on. A full disk is none."""
    if isinstance(error, WorkKeptError):
        raise error
    return {"table": "failed", **about, "reason": str(error)}


def _scored(about: Row, model: Any, opened: OpenedSets) -> list[Row]:
    """A ``run`` row, one ``loss`` row a window, one ``task`` row a task."""
    windows = opened.inner.windows
    losses = window_losses(model, windows, str(about["method"]))
    nll = math.fsum(losses) / len(losses)
    run = {"table": "run", **about, "nll": nll, "perplexity": math.exp(min(nll, 700.0))}
    base = {key: about[key] for key in ("set", "axis", "seed", "method", "bits") if key in about}
    rows = [run, *({"table": "loss", **base, "window": i, "nll": loss} for i, loss in enumerate(losses))]
    if opened.scorer is not None:
        for task, found in opened.scorer(model).items():
            kept = {key: found[key] for key in ("metric", "accuracy", "standard_error", "questions") if key in found}
            rows.append({"table": "task", **base, "task": task, **kept})
    return rows
