"""The options of `quantize`, `tune` and `evaluate`, described once for Python and the command line.

Each table defines both the keyword arguments of a function in :mod:`fewbit.api` and the options of a command.
Options that are not given are None. `part` says which part of the program an option configures, `panel` under which
heading the help shows it.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMON = "Options"


@dataclass(frozen=True)
class Option:
    """One option. name: in Python; with dashes on the command line. flag: the flag, if spelled differently."""

    name: str
    kind: Any
    help: str
    part: str
    panel: str = COMMON
    flag: str = ""
    metavar: str | None = None


TEXT_HELP = (
    "SRC[:COUNT][,SRC...]: a .txt, .jsonl, .json, .csv or .parquet file (FILE:COLUMN; also .gz) or a folder of them, "
    "self (text that the model generates), nonsense, random-tokens, or a hub data set (c4, wikitext2, redpajama, "
    "NAME:COLUMN). "
    "Chat messages are rendered by the model's chat template. Default: self."
)
CALIBRATION = Option("calibration", str, TEXT_HELP, "text")
SAMPLES = Option("samples", int, "Number of calibration sequences; default 128.", "text")
BITS = Option("bits", float, "Bits per weight, 1 to 8; default 4 (billm: 1).", "recipe")
OVERWRITE = Option("overwrite", bool, "Replace OUT if fewbit made it.", "run", flag="--overwrite")
TEXT_PANEL = "Calibration text"
TEXT = (
    Option("sequence_length", int, "Tokens per calibration sequence; default 512.", "text", TEXT_PANEL),
    Option("seed", int, "Random seed for drawing the sequences; default 0.", "text", TEXT_PANEL),
    Option("chat_template", bool, "Render each document as a user's turn in the chat template.", "text", TEXT_PANEL),
)

_GRID, _OUTLIERS, _COST, _RUN = "Grid and scales", "Outliers", "Curvature and solver", "Run"
_AXES = "(`fewbit axes` lists them)"
_PATTERN = (
    "PATTERN, the name of a tensor or of a module with all its tensors, with *, ? and [...] as in a shell; "
    "case-sensitive (repeatable)."
)
TARGET = Option(
    "target",
    str,
    "The runtime that is to load the result: fewbit (default), llama.cpp, transformers, vllm, gptq, awq, mlx. OUT is "
    "in its format, and grids are chosen by --bits (or --grid) among those that it loads.",
    "target",
    flag="--for",
)
QUANTIZE: tuple[Option, ...] = (
    BITS,
    TARGET,
    CALIBRATION,
    SAMPLES,
    Option("tune", bool, "Fine-tune the result on the same text (see `fewbit tune`).", "tune", flag="--tune"),
    OVERWRITE,
    Option("group_size", str, "N, auto (the largest divisor up to 128), row, or a list: 64,auto.", "recipe", _GRID),
    Option("grid", str, f"Quantization levels {_AXES}; with --for llama.cpp also a mixture, q4_k_m.", "recipe", _GRID),
    Option(
        "symmetric",
        bool,
        "Make the grid symmetric around 0, or give it a zero-point.",
        "recipe",
        _GRID,
        "--symmetric/--asymmetric",
    ),
    Option("scale_format", str, f"How scales are stored {_AXES}.", "recipe", _GRID),
    Option(
        "clip_search",
        bool,
        "Search for the range of each group that gives the least error.",
        "recipe",
        _GRID,
        "--clip-search/--no-clip-search",
    ),
    Option("error_power", float, "Exponent of the error in that search.", "recipe", _GRID),
    Option(
        "column_weights", str, "none, or norm-gain: weight columns by the gain of the preceding norm.", "recipe", _GRID
    ),
    Option(
        "embedding_bits",
        int,
        "Bits of embeddings and output heads, 1 to 8; 16 keeps them. Default: 8 from 4 bits on, otherwise 6.",
        "recipe",
        _GRID,
    ),
    Option(
        "input_bits",
        int,
        "Round the inputs of the linear layers to 8 bits per token while the model runs; 16 (default) keeps them.",
        "recipe",
        _GRID,
    ),
    Option("transform", str, f"Transform of each layer's inputs {_AXES}.", "recipe", _GRID),
    Option(
        "set",
        list[str],
        "PATTERN:NAME=VALUE[,NAME=VALUE]: different choices for some tensors, e.g. '*.down_proj:bits=4' "
        "(repeatable; the last match wins). Patterns as for --include.",
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
    Option("outliers", str, f"Which weights are outliers, with a separate grid {_AXES}.", "recipe", _OUTLIERS),
    Option("outlier_fraction", float, "Fraction of weights that are outliers; 0 for none.", "recipe", _OUTLIERS),
    Option("outlier_scope", str, "Apply that fraction per tensor or per group: tensor, group.", "recipe", _OUTLIERS),
    Option("outlier_grid", str, f"How outliers are stored {_AXES}.", "recipe", _OUTLIERS),
    Option("outlier_bits", int, "Bits per outlier; 0 means the same as --bits.", "recipe", _OUTLIERS),
    Option("curvature", Path, "A folder written by `fewbit curvature`, instead of --calibration.", "curvature", _COST),
    Option("damping", float, "Damping added to the curvature, as a fraction of its mean diagonal.", "recipe", _COST),
    Option(
        "act_order",
        bool,
        "Process columns in order of decreasing curvature.",
        "recipe",
        _COST,
        "--act-order/--no-act-order",
    ),
    Option(
        "static_groups",
        bool,
        "Fit all grids before the solver starts, or refit each group when the solver reaches it.",
        "recipe",
        _COST,
        "--static-groups/--refit-groups",
    ),
    Option(
        "fisher_terms", str, "sequence (as published), or token: drop the cross terms between tokens.", "recipe", _COST
    ),
    Option("fisher_labels", str, "data, or sampled (drawn from the model's predictions).", "recipe", _COST),
    Option(
        "gram_share",
        float,
        "Share of the input Gram in a Fisher, from 0 (as published) to below 1; default: depends on the method.",
        "recipe",
        _COST,
    ),
    Option(
        "tempering",
        float,
        "Exponent from 0 to 1 that divides out the norm of each token's input; 1: all tokens count equally.",
        "recipe",
        _COST,
    ),
    Option(
        "refresh",
        str,
        "When to measure the Fisher: once (default), block (again for every block), or K (again every K blocks).",
        "curvature",
        _COST,
    ),
    Option(
        "original_inputs",
        bool,
        "Compute the Gram from the inputs in the original model.",
        "curvature",
        _COST,
        "--original-inputs",
    ),
    Option("max_fallback", int, "How many weights may fall back to rounding; default 0.", "curvature", _COST),
    *TEXT,
    Option("tune_epochs", int, "Epochs of --tune; default 3.", "tune", TEXT_PANEL),
    Option("include", list[str], f"Also quantize tensors that match {_PATTERN}", "recipe", _RUN),
    Option("exclude", list[str], f"Do not quantize tensors that match {_PATTERN}", "recipe", _RUN),
    Option(
        "memory",
        str,
        "Memory limit for curvature and hidden states, e.g. 4GB; default: half of the free memory.",
        "curvature",
        _RUN,
    ),
    Option("shard_size", str, "Maximum size of an output file, e.g. 500MB; default 5GB.", "run", _RUN),
    Option("report_only", bool, "Only measure and report; write no model.", "run", _RUN, "--report-only"),
    Option("workers", int, "Number of threads; 0: one per core.", "run", _RUN),
    Option("device", str, "cpu (default), cuda, …; --tune uses CUDA if available.", "run", _RUN),
)

PLAN: tuple[Option, ...] = tuple(
    option
    for option in QUANTIZE
    if option.part in ("recipe", "text", "curvature", "target") and option.name != "max_fallback"
)

_HOW, _WHERE = "Training", "Run"
TUNE: tuple[Option, ...] = (
    CALIBRATION,
    SAMPLES,
    Option("loss", str, "nll (next tokens), kd (predictions of the original; default), or nll+kd.", "choice"),
    Option("train", str, "weights, scales, codes (each by at most one level), or all (default).", "choice"),
    Option("epochs", int, "Epochs; default 3.", "choice"),
    Option(
        "embeddings",
        bool,
        "Train packed embeddings and head like layers (default), or only the layers.",
        "choice",
        flag="--embeddings/--no-embeddings",
    ),
    OVERWRITE,
    Option("lr", float, "Learning rate of weights, in steps of their grid; default 0.002.", "choice", _HOW),
    Option("scale_lr", float, "Learning rate of scales, relative to their size; default 0.003.", "choice", _HOW),
    Option("batch_size", int, "Sequences per update; default 4.", "choice", _HOW),
    Option("micro_batch", int, "Sequences that run at a time; gradients are accumulated.", "choice", _HOW),
    Option("warmup", float, "Fraction of updates with a rising learning rate; default 0.1.", "choice", _HOW),
    Option("clip", float, "Maximum norm of the gradient; default 1.", "choice", _HOW),
    Option("held_out", int, "Sequences held out to evaluate each epoch; default 8.", "choice", _HOW),
    Option("patience", int, "Stop after this many epochs without improvement; default 2.", "choice", _HOW),
    Option(
        "top",
        int,
        "Most likely tokens of the original that are stored for kd; 0: all, recomputed; default 64.",
        "choice",
        _HOW,
    ),
    Option(
        "reconstruction",
        int,
        "Epochs of training each block to reproduce the original's outputs, before the main training; default 0.",
        "choice",
        _HOW,
    ),
    *TEXT,
    Option("reference", str, "The original model; default: the one that the folder was made from.", "run", _WHERE),
    Option(
        "checkpointing",
        bool,
        "Recompute activations: less memory, a third more time; default: if needed.",
        "run",
        _WHERE,
        "--checkpointing/--no-checkpointing",
    ),
    Option("device", str, "cpu, cuda, …; default: CUDA if available.", "run", _WHERE),
)

_TASKS, _ROUNDED = "Tasks", "8-bit inputs"
EVALUATE: tuple[Option, ...] = (
    Option(
        "data",
        str,
        "A .txt, .jsonl, .json, .csv or .parquet file (FILE:COLUMN; also .gz), a folder of them, a hub data set "
        "(wikitext2, c4, NAME[:COLUMN]), or topics (Python's built-in help text).",
        "data",
    ),
    Option("reference", str, "The original model, to compare with.", "data"),
    Option("windows", int, "Number of windows from the start of the text; 0 (default): all.", "protocol"),
    Option("seq_len", int, "Tokens per window; default 1024.", "protocol"),
    Option(
        "bos", str, "Put a BOS before each window: auto (if the tokenizer does; default), always, never.", "protocol"
    ),
    Option(
        "dtype",
        str,
        "Dtype of the computation: auto (the model's; default), float32 (for small differences), bfloat16, float16.",
        "protocol",
    ),
    Option("device", str, "cpu, cuda, …; default: CUDA if available.", "data"),
    Option(
        "tasks",
        str,
        "Comma-separated: piqa, arc_easy, arc_challenge, winogrande, hellaswag, lambada_openai.",
        "tasks",
        _TASKS,
    ),
    Option("task_data", Path, "A folder with the questions in TASK*.jsonl files; default: the hub.", "tasks", _TASKS),
    Option("task_limit", int, "Use only the first N questions of each task; 0 (default): all.", "tasks", _TASKS),
    Option(
        "w8a8",
        str,
        "Also evaluate the original with 8-bit weights and inputs: w8a8,smoothquant,w8a8-dynamic.",
        "rounded",
        _ROUNDED,
    ),
    *(Option(one.name, one.kind, one.help, "text", _ROUNDED, one.flag) for one in (CALIBRATION, SAMPLES, *TEXT[:2])),
)


def given_of(options: Sequence[Option], choices: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The options of one part that were given (that is, are not None)."""
    names = [option.name for option in options if option.part == part]
    return {name: choices[name] for name in names if choices.get(name) is not None}


def described_by(options: Sequence[Option]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that gives a function with ``**choices`` the signature and docstring of a table of options."""

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
