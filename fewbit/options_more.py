"""The options of `curvature`, `unpack`, `export`, `chat` and the studies, described once; see :mod:`fewbit.options`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fewbit.options import CALIBRATION, EVALUATE, OVERWRITE, QUANTIZE, SAMPLES, TEXT, Option

_QUANTIZE = {option.name: option for option in QUANTIZE}
_EVALUATE = {option.name: option for option in EVALUATE}
_RUN = "Run"
_DEVICE = Option("device", str, "cpu (default), cuda, ….", "run", _RUN)


def _common(options: Sequence[Option], part: str) -> tuple[Option, ...]:
    """Options under the first heading of the help."""
    return tuple(replace(option, part=part, panel=Option.panel) for option in options)


CURVATURE: tuple[Option, ...] = (
    Option("kind", str, "fisher (default; from output gradients), or gram (from inputs).", "choice"),
    CALIBRATION,
    SAMPLES,
    Option("diagonal", bool, "Keep only the diagonal.", "choice", flag="--diagonal"),
    Option(
        "fisher_terms",
        str,
        "token (default): drop the cross terms between tokens; or sequence (as published).",
        "choice",
    ),
    replace(
        _common([_QUANTIZE["fisher_labels"]], "choice")[0],
        help="data (default), or sampled (drawn from the model's predictions).",
    ),
    replace(
        _common([_QUANTIZE["gram_share"]], "choice")[0],
        help="Share of the input Gram in a Fisher, from 0 (as published) to below 1; default 0.5.",
    ),
    *_common([_QUANTIZE["tempering"]], "choice"),
    *TEXT,
    replace(_QUANTIZE["include"], help=_QUANTIZE["include"].help.replace("quantize", "measure"), part="where"),
    replace(_QUANTIZE["exclude"], help=_QUANTIZE["exclude"].help.replace("quantize", "measure"), part="where"),
    replace(_QUANTIZE["memory"], part="run"),
    _DEVICE,
)

UNPACK: tuple[Option, ...] = (OVERWRITE, *_common([_QUANTIZE["shard_size"]], "run"))
EXPORT: tuple[Option, ...] = (
    Option("format", str, "The file format: gguf (default), compressed-tensors, gptq, awq, mlx.", "run"),
    Option(
        "embeddings",
        str,
        "Round embeddings and head to this type of GGUF: f16, q8_0, q6_k, q5_k, q4_k; default: keep (as they are).",
        "run",
    ),
    Option(
        "allow_requantize",
        bool,
        "Quantize again, on grids of the format, what it does not hold as it is, and say what that costs.",
        "run",
    ),
    OVERWRITE,
)
IMPORT: tuple[Option, ...] = (
    Option(
        "config",
        Path,
        "For a .gguf file: a folder with the config and the tokenizer of the model; default: those in the file.",
        "run",
    ),
    OVERWRITE,
    *_common([_QUANTIZE["shard_size"]], "run"),
)

CHAT: tuple[Option, ...] = (
    Option("prompt", str, "Answer this and end; - reads it from standard input.", "ask"),
    Option("system", str, "Message before the conversation, for models with a chat template.", "choice"),
    Option("max_new_tokens", int, "Maximum number of tokens of an answer; default 512.", "choice"),
    Option("temperature", float, "0: always the most likely token; default 0.7.", "choice"),
    Option("seed", int, "Random seed; default 0. The same seed gives the same answers.", "choice"),
    Option("device", str, "cpu, cuda, …; default: CUDA if available.", "run"),
    Option(
        "quantized_cache",
        bool,
        "Keep keys and values in 4 bits, for long conversations (needs optimum-quanto or hqq).",
        "choice",
        flag="--quantized-cache",
    ),
)

_SIZE = "default: depends on --size."
_METHODS = Option("methods", str, "Methods, separated by commas; default: those of the size.", "shared")
_BITS = Option("bits", str, "Bit-widths, separated by commas; default: those of the size.", "shared")
_FOLDER = Option("folder", list[str], "A quantized folder to include as well (repeatable).", "shared")
_TEXTS, _PROTOCOL, _TEST = "Calibration sets", "Evaluation text", "Equivalence test"
_SETS = (
    Option(
        "set",
        list[str],
        "A calibration set: AXIS/NAME=SRC, e.g. language/hindi=hin.txt (repeatable).",
        "own",
        _TEXTS,
        "--set",
    ),
    Option("set_file", Path, 'A JSON file of sets: {"AXIS": {"NAME": "SRC"}}.', "own", _TEXTS),
)


def _study(
    own: Sequence[Option] = (), sets: Sequence[Option] = (), behind: Sequence[Option] = ()
) -> tuple[Option, ...]:
    """The options of a study: its `own` common ones, further `sets`, and `behind` those that all studies share."""
    return (
        Option(
            "size",
            str,
            "quick (minutes), standard (default; hours, for a model of 0.1 to 0.3 billion weights), or large.",
            "shared",
        ),
        *own,
        *sets,
        replace(CALIBRATION, part="shared", panel=_TEXTS),
        Option("samples", int, f"Number of calibration sequences; {_SIZE}", "shared", _TEXTS),
        Option("sequence_length", int, f"Tokens per calibration sequence; {_SIZE}", "shared", _TEXTS),
        Option("seed", int, "Random seed, also for the calibration sets; default 0.", "shared", _TEXTS),
        Option("windows", int, f"Number of windows from the start of the text; 0: all; {_SIZE}", "shared", _PROTOCOL),
        Option("seq_len", int, f"Tokens per window; {_SIZE}", "shared", _PROTOCOL),
        *behind,
        Option("engine", str, "local (default), or ray (run each cell of the study as a Ray task).", "shared", _RUN),
        replace(_DEVICE, part="shared"),
        replace(OVERWRITE, help="Replace a study that was run with other arguments.", panel=_RUN),
    )


OBJECTIVES = _study((_METHODS, _BITS, _FOLDER))
LANDSCAPE = _study(
    (
        _METHODS,
        _BITS,
        _FOLDER,
        Option(
            "slice",
            str,
            "The two models that span the plotted plane, A,B; default: the first two folders, otherwise the last two "
            "models that the study makes.",
            "own",
        ),
        Option("directions", int, f"Random directions of each kind; {_SIZE}", "own"),
    )
)
OUTLIERS = _study(
    (
        replace(_METHODS, help="Remedies: adaptive-lasso,smoothquant,awq,sensitivity; default: all."),
        _BITS,
        Option(
            "factor",
            float,
            "A channel is an outlier if its RMS exceeds the median by this factor; default 5.",
            "own",
        ),
    ),
    _SETS,
)
CALIBRATION_SETS = _study(
    (_METHODS, _BITS, *_common([_EVALUATE[name] for name in ("tasks", "task_data", "task_limit")], "own")),
    (
        *_SETS,
        Option(
            "seeds", str, f"A,B: number of seeds for the default set and for each other set; {_SIZE}", "own", _TEXTS
        ),
    ),
    (
        Option(
            "margin",
            float,
            "Sets are equivalent within this relative difference of perplexity; default 0.02.",
            "own",
            _TEST,
        ),
        Option("alpha", float, "Significance level of the equivalence test; default 0.05.", "own", _TEST),
    ),
)
STUDIES = {
    "objectives": OBJECTIVES,
    "landscape": LANDSCAPE,
    "outliers": OUTLIERS,
    "calibration-sets": CALIBRATION_SETS,
}
"""Study -> its options."""
