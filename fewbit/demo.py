"""The demonstration: one small model, quantized four ways without data, measured, and asked a question.

Each model is quantized by the command line in a process of its own, so that seconds and peak memory are those of a
user's run. Few windows are scored and each model once, so that the demonstration ends within four minutes on two cores
that have no bfloat16 products.
"""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fewbit.checkpoints.json_file import read_json
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.named import fetch_named
from fewbit.checkpoints.source import open_checkpoint
from fewbit.errors import FewbitError
from fewbit.evaluation.evaluate import evaluate
from fewbit.evaluation.perplexity import Protocol
from fewbit.formats.config import describe
from fewbit.printable import printable
from fewbit.progress import progress_line
from fewbit.report import plots
from fewbit.report.html import Figure, Section, evaluation_section, write_page
from fewbit.runtime.load import load
from fewbit.runtime.unpack import unpack_modules
from fewbit.sizes import show_size

MODEL = "smollm2-135m"
RUNS = [("rtn", 4), ("adpq+", 4), ("rtn", 3), ("adpq+", 3)]
WINDOWS, SEQUENCE_LENGTH = 4, 512
PROMPT = "In one sentence, what is a language model?"


def demo(out: Path, windows: int = WINDOWS, sequence_length: int = SEQUENCE_LENGTH) -> dict[str, Any]:
    """Fetch, quantize, evaluate, generate; prints a table and writes `report.html` and `report.json` into `out`."""
    say = Console(stderr=True).print
    _check_report(out)
    out.mkdir(parents=True, exist_ok=True)
    say(f"fetching {MODEL} (93 MB the first time, then converted: half a minute) …")
    fetch_named(MODEL)
    reports = []
    for method, bits in RUNS:
        say(f"quantizing with {method} to {bits} bits …")
        reports.append(_quantize(method, bits, out / f"{MODEL}-{method}-{bits}bit"))
    folders = [str(out / f"{MODEL}-{method}-{bits}bit") for method, bits in RUNS]
    with progress_line("evaluating the original and four models") as progress:
        result = evaluate(folders, "topics", Protocol(sequence_length, windows), MODEL, progress=progress)
    result["models"].insert(0, _original_row(result["models"][0]))
    for row, report in zip(result["models"][1:], reports, strict=True):
        row["name"] = Path(row["name"]).name
        row["quantize_seconds"] = report["run"]["seconds"]
        row["quantize_peak_rss_bytes"] = report["run"]["peak_rss_bytes"]
    best = min(range(len(RUNS)), key=lambda i: result["models"][1 + i]["kl_mean"])
    say("generating …")
    spoken = [(MODEL, MODEL), (result["models"][1 + best]["name"], folders[best])]
    quotes = [{"who": who, "text": _generate(folder)} for who, folder in spoken]
    _print_table(result)
    print(f"\nAsked: {PROMPT}")
    for quote in quotes:
        print(f"\n{quote['who']}:", *map(printable, quote["text"].splitlines()), sep="\n")
    _write_page(out / "report.html", result, reports, quotes)
    (out / "report.json").write_text(json.dumps({**result, "generations": quotes}, indent=1) + "\n", encoding="utf-8")
    print("\nReport:", printable(str(out / "report.html")))
    return result


def _check_report(out: Path) -> None:
    """FewbitError when a report stands in `out` that no demonstration wrote."""
    found = read_json(out / "report.json") if out.is_dir() else None
    ours = isinstance(found, dict) and {"generations", "protocol"} <= found.keys()
    for name in ("report.json", "report.html"):
        if (out / name).exists() and not ours:
            raise FewbitError(f"{out / name}: already exists and was not made by the demo: choose another folder")


def _original_row(measured: dict[str, Any]) -> dict[str, Any]:
    """The row of the original, whose loss is known from any model that was compared with it: it runs only once."""
    nll = measured["nll"] - math.log(measured["perplexity_ratio"])
    same = {"kl_mean": 0.0, "kl_p99": 0.0, "top1_agreement": 1.0, "perplexity_ratio": 1.0}
    return {"name": MODEL, **describe(open_checkpoint(locate(MODEL))), "perplexity": math.exp(nll), "nll": nll, **same}


def _quantize(method: str, bits: int, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "fewbit.cli", "quantize", MODEL, str(folder)]
    command += ["--method", method, "--bits", str(bits), "--overwrite", "--json"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise FewbitError(f"the step  {' '.join(command[1:])}  failed: see above")
    return json.loads(result.stdout)["report"]


def _generate(folder: str) -> str:
    from fewbit.checkpoints.own_code import open_tokenizer

    tokenizer = open_tokenizer(locate(folder))
    model = unpack_modules(load(folder))
    messages = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**ids.to(model.device), max_new_tokens=48, do_sample=False)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _print_table(result: dict[str, Any]) -> None:
    table = Table()
    for name in (
        "model",
        "method",
        "bits/weight",
        "of all",
        "size",
        "perplexity",
        "ratio",
        "KL/token",
        "same top",
        "seconds",
        "peak memory",
    ):
        table.add_column(name, justify="left" if name in ("model", "method") else "right", no_wrap=True)
    for row in result["models"]:
        quantized = "quantize_seconds" in row
        table.add_row(
            row["name"],
            row["method"],
            f"{row['bits_per_weight']:.2f}",
            f"{row['bits_per_weight_all']:.2f}",
            show_size(row["bytes"]),
            f"{row['perplexity']:.2f}",
            f"{row['perplexity_ratio']:.3f}",
            f"{row['kl_mean']:.4f}",
            f"{100 * row['top1_agreement']:.1f} %",
            f"{row['quantize_seconds']:.1f}" if quantized else "",
            show_size(row["quantize_peak_rss_bytes"]) if quantized else "",
        )
    console = Console()
    (console if console.is_terminal else Console(width=150)).print(table)


def _write_page(
    path: Path, result: dict[str, Any], reports: list[dict[str, Any]], quotes: list[dict[str, str]]
) -> None:
    sizes = ", ".join(f"{show_size(row['bytes'])} ({row['name']})" for row in result["models"][:1])
    lead = f"{MODEL} without any data, on {time.strftime('%Y-%m-%d')}. The original takes {sizes}."
    errors = Figure(plots.layer_errors(reports), "sum (w - q)^2 / sum w^2; dotted 4 bits, solid 3 bits")
    runs = [
        [
            f"{report['method']}, {report['recipe']['bits']} bits",
            f"{report['run']['seconds']:.1f}",
            show_size(report["run"]["peak_rss_bytes"]),
            show_size(report["output"]["file_bytes"]),
        ]
        for report in reports
    ]
    sections = [
        evaluation_section(result, "What it costs"),
        Section(
            "Time and memory",
            columns=["run", "seconds", "peak memory", "files"],
            rows=runs,
        ),
        Section("Where the error is", figures=[errors]),
        Section("What it says", [f"Asked: {PROMPT}"], quotes=quotes),
    ]
    write_page(path, "fewbit: a real model in 4 and 3 bits", lead, sections)
