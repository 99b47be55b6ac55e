"""What `quantize`, `tune` and `evaluate` can be told: one description for Python and for the command line.

A table of options makes the keyword arguments of a function in :mod:`fewbit.api` and the options of a command; what was
not given is None. `part` says what an option belongs to, `panel` where help shows it.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.choices import nearest
from fewbit.errors import FewbitError

COMMON = "Options"


@dataclass(frozen=True)
class Option:
    """One option. name: in Python; on the command line with dashes. flag: where the spelling there is another."""

    name: str
    kind: Any
    help: str
    part: str
    panel: str = COMMON
    flag: str = ""
    metavar: str | None = None


TEXT_HELP = (
    "SRC[:COUNT][,SRC...]: a .txt, .jsonl, .json, .csv or .parquet file (FILE:COLUMN; also .gz) or a folder of them, "
    "self (the model's own text), nonsense, random-tokens, or a hub data set (c4, wikitext2, redpajama, NAME:COLUMN). "
    "Chat messages are rendered by the model's chat template. Default: self."
)
CALIBRATION = Option("calibration", str, TEXT_HELP, "text")
SAMPLES = Option("samples", int, "Calibration sequences in all; default 128.", "text")
BITS = Option("bits", float, "Bits of a weight, 1 to 8; default 4 (billm: 1).", "recipe")
OVERWRITE = Option("overwrite", bool, "Replace OUT if fewbit made it.", "run", flag="--overwrite")
TEXT_PANEL = "Calibration text"
TEXT = (
    Option("sequence_length", int, "Tokens of a calibration sequence; default 512.", "text", TEXT_PANEL),
    Option("seed", int, "Which sequences are drawn; default 0.", "text", TEXT_PANEL),
    Option("chat_template", bool, "Wrap every document as a user's turn.", "text", TEXT_PANEL),
)
CLI_DEVICE = Option("device", str, "cpu, cuda, …; default: CUDA if there is one.", "run")

_GRID, _OUTLIERS, _COST, _RUN = "Grid and scales", "Outliers", "Curvature and solver", "Run"
_AXES = "(`fewbit axes` lists them)"
QUANTIZE: tuple[Option, ...] = (
    BITS,
    CALIBRATION,
    SAMPLES,
    Option("tune", bool, "Fine-tune the result on the same text (see `fewbit tune`).", "tune", flag="--tune"),
    OVERWRITE,
    Option("group_size", str, "N, auto (largest divisor up to 128), row, or a list: 64,auto.", "recipe", _GRID),
    Option("grid", str, f"Which levels {_AXES}.", "recipe", _GRID),
    Option(
        "symmetric",
        bool,
        "Grid of the core around 0, or with a zero-point.",
        "recipe",
        _GRID,
        "--symmetric/--asymmetric",
    ),
    Option("scale_format", str, f"How scales are stored {_AXES}.", "recipe", _GRID),
    Option(
        "clip_search",
        bool,
        "Search each group's range by least error.",
        "recipe",
        _GRID,
        "--clip-search/--no-clip-search",
    ),
    Option("error_power", float, "Exponent of the error in the search.", "recipe", _GRID),
    Option("column_weights", str, "none, or norm-gain: weigh columns by the gain of the norm before.", "recipe", _GRID),
    Option("transform", str, f"Map of the inputs {_AXES}.", "recipe", _GRID),
    Option(
        "set",
        list[str],
        "PATTERN:NAME=VALUE[,NAME=VALUE]: other choices for some tensors, e.g. '*.down_proj.weight:bits=4' "
        "(repeatable; the last match wins).",
        "recipe",
        _GRID,
        "--set",
    ),
    Option(
        "recipe",
        Path,
        "A JSON file with a whole recipe, as config.json and fewbit_report.json hold it, in place of --method.",
        "recipe",
        _GRID,
    ),
    Option("outliers", str, f"Which weights get a grid of their own {_AXES}.", "recipe", _OUTLIERS),
    Option("outlier_fraction", float, "Share of weights split off; 0 for none.", "recipe", _OUTLIERS),
    Option("outlier_scope", str, "tensor or group.", "recipe", _OUTLIERS),
    Option("outlier_grid", str, f"How outliers are stored {_AXES}.", "recipe", _OUTLIERS),
    Option("outlier_bits", int, "Bits of an outlier's code; 0 for --bits.", "recipe", _OUTLIERS),
    Option("curvature", Path, "A folder of `fewbit curvature`, instead of --calibration.", "curvature", _COST),
    Option("damping", float, "Share of the mean diagonal added to the curvature.", "recipe", _COST),
    Option("act_order", bool, "Columns by falling curvature.", "recipe", _COST, "--act-order/--no-act-order"),
    Option(
        "static_groups",
        bool,
        "Grids before the solver, or group by group.",
        "recipe",
        _COST,
        "--static-groups/--refit-groups",
    ),
    Option("fisher_terms", str, "sequence (as published) or token: drop the terms between tokens.", "recipe", _COST),
    Option("fisher_labels", str, "data, or sampled from the model.", "recipe", _COST),
    Option(
        "gram_share",
        float,
        "Share of the input Gram mixed into a Fisher, 0 (as published) to below 1; default: the method's.",
        "recipe",
        _COST,
    ),
    Option(
        "tempering",
        float,
        "0 to 1: how far every token counts alike, whatever the size of its inputs.",
        "recipe",
        _COST,
    ),
    Option(
        "refresh",
        str,
        "Measure the Fisher once (default), for every block (block), or every K blocks.",
        "curvature",
        _COST,
    ),
    Option(
        "original_inputs",
        bool,
        "Take a Gram from the original's inputs.",
        "curvature",
        _COST,
        "--original-inputs",
    ),
    Option("max_fallback", int, "Weights that may fall back to rounding; default 0.", "curvature", _COST),
    *TEXT,
    Option("tune_epochs", int, "Passes over the text in --tune; default 3.", "tune", TEXT_PANEL),
    Option("include", list[str], "Also quantize tensors of this pattern (repeatable).", "recipe", _RUN),
    Option("exclude", list[str], "Keep tensors of this pattern (repeatable).", "recipe", _RUN),
    Option(
        "memory", str, "For curvature and hidden states, e.g. 4GB; default: half of what is free.", "curvature", _RUN
    ),
    Option("shard_size", str, "Largest output file, e.g. 500MB; default 5GB.", "run", _RUN),
    Option("report_only", bool, "Measure only; write nothing.", "run", _RUN, "--report-only"),
    Option("workers", int, "Threads; 0 for one a core.", "run", _RUN),
    Option("device", str, "cpu (default), cuda, …; --tune takes CUDA by itself where there is one.", "run", _RUN),
)

PLAN: tuple[Option, ...] = tuple(
    option for option in QUANTIZE if option.part in ("recipe", "text", "curvature") and option.name != "max_fallback"
)

_HOW, _WHERE = "Training", "Run"
TUNE: tuple[Option, ...] = (
    CALIBRATION,
    SAMPLES,
    Option("loss", str, "nll (next tokens), kd (the original's predictions; default), or nll+kd.", "choice"),
    Option("train", str, "weights, scales, codes (by one step at most), or all (default).", "choice"),
    Option("epochs", int, "Passes over the text; default 3.", "choice"),
    OVERWRITE,
    Option("lr", float, "Of weights, in steps of their grid; default 0.002.", "choice", _HOW),
    Option("scale_lr", float, "Of scales, relative; default 0.003.", "choice", _HOW),
    Option("batch_size", int, "Sequences of an update; default 4.", "choice", _HOW),
    Option("micro_batch", int, "Of them, how many run at a time; the rest is accumulated.", "choice", _HOW),
    Option("warmup", float, "Share of updates in which the rate rises; default 0.1.", "choice", _HOW),
    Option("clip", float, "Largest norm of the gradient; default 1.", "choice", _HOW),
    Option("held_out", int, "Sequences that only judge the epochs; default 8.", "choice", _HOW),
    Option("patience", int, "Epochs without a better one before the end; default 2.", "choice", _HOW),
    Option(
        "top",
        int,
        "Predictions kept of the original for kd; 0: all, computed anew; default 64.",
        "choice",
        _HOW,
    ),
    Option(
        "reconstruction",
        int,
        "Before, for every block by itself: passes over its inputs; default 0.",
        "choice",
        _HOW,
    ),
    *TEXT,
    Option("reference", str, "The original; default: the one that the folder was made from.", "run", _WHERE),
    Option(
        "checkpointing",
        bool,
        "Less memory, a third more time; default: if needed.",
        "run",
        _WHERE,
        "--checkpointing/--no-checkpointing",
    ),
    Option("device", str, "cpu, cuda, …; default: CUDA if there is one.", "run", _WHERE),
)

_TASKS, _ROUNDED = "Tasks", "8-bit inputs"
EVALUATE: tuple[Option, ...] = (
    Option(
        "data",
        str,
        "A .txt, .jsonl, .json, .csv or .parquet file (FILE:COLUMN; also .gz), a folder of them, a hub data set "
        "(wikitext2, c4, NAME[:COLUMN]), or topics (Python's help text).",
        "data",
    ),
    Option("reference", str, "The original, to measure the distance from.", "data"),
    Option("windows", int, "Windows from the start of the text; 0 (default) for all.", "protocol"),
    Option("seq_len", int, "Tokens of a window; default 1024.", "protocol"),
    Option("bos", str, "A BOS before each window: auto (as the tokenizer; default), always, never.", "protocol"),
    Option(
        "dtype",
        str,
        "What models run in: auto (their own; default), float32 for small differences, bfloat16, float16.",
        "protocol",
    ),
    Option("device", str, "cpu, cuda, …; default: CUDA if there is one.", "data"),
    Option(
        "tasks",
        str,
        "With commas: piqa, arc_easy, arc_challenge, winogrande, hellaswag, lambada_openai.",
        "tasks",
        _TASKS,
    ),
    Option("task_data", Path, "A folder with the questions as TASK*.jsonl; default: the hub.", "tasks", _TASKS),
    Option("task_limit", int, "The first so many questions of each task; 0 (default) for all.", "tasks", _TASKS),
    Option(
        "w8a8",
        str,
        "Also originals with 8-bit weights and inputs: w8a8,smoothquant,w8a8-dynamic.",
        "rounded",
        _ROUNDED,
    ),
    *(Option(one.name, one.kind, one.help, "text", _ROUNDED, one.flag) for one in (CALIBRATION, SAMPLES, *TEXT[:2])),
)


def given_of(options: Sequence[Option], choices: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The choices of one part that were given (not None)."""
    names = [option.name for option in options if option.part == part]
    return {name: choices[name] for name in names if choices.get(name) is not None}


def check_names(what: str, options: Sequence[Option], choices: Mapping[str, Any]) -> None:
    """FewbitError for a choice that there is not, with the nearest there is."""
    known = [option.name for option in options]
    for name in choices:
        if name not in known:
            raise FewbitError(f"{what} has no option {name!r}{nearest(name, known)}")


def described_by(options: Sequence[Option]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a function that takes ``**choices`` the signature and the documentation of a table of options."""

    def describe(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        kind = inspect.Parameter.KEYWORD_ONLY
        more = [inspect.Parameter(one.name, kind, default=None, annotation=one.kind | None) for one in options]
        function.__signature__ = signature.replace(parameters=[*named, *more])  # type: ignore[attr-defined]
        lines = "\n".join(f"    {one.name}: {one.help}" for one in options)
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nOptions:\n{lines}\n"
        return function

    return describe
