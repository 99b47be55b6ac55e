"""Markdown tables of the results in benchmarks/results, for docs/experiments.md and the README.

python benchmarks/tables.py
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MODELS = ("smollm2-135m", "gemma3-270m")


def read(name: str) -> Any:
    """One file of results; an empty list where it was not made."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def quality() -> None:
    """Perplexity of every zero-shot row, by model and bits."""
    found = {(r["model"], r["bits"], r["row"]): r for r in read("zero_shot_quality")}
    names = list(dict.fromkeys(row for _, _, row in found))
    for bits in (3, 4):
        print(f"\n| {bits} bits | " + " | ".join(f"{m}: bits | perplexity | seconds" for m in MODELS) + " |")
        print("| --- |" + " --- | --- | --- |" * len(MODELS))
        for name in names:
            cells = []
            for model in MODELS:
                r = found.get((model, bits, name))
                cells += (
                    [f"{r['bits_per_weight']:.2f}", f"{r['perplexity']:.1f}", f"{r['seconds']:.1f}"] if r else [""] * 3
                )
            if any(cells):
                print(f"| {name} | " + " | ".join(cells) + " |")


def speed() -> None:
    """Seconds, ratio to cp, and peak memory."""
    print("\n| checkpoint | what | seconds | x cp | peak memory |\n| --- | --- | --- | --- | --- |")
    for result in (read("zero_shot") or {"results": []})["results"]:
        for row in result["rows"]:
            peak = f"{row['peak_rss_bytes'] / 1e6:.0f} MB" if row["peak_rss_bytes"] else ""
            size = f"{result['bytes'] / 1e9:.1f} GB"
            print(f"| {size} | {row['what']} | {row['seconds']:.1f} | {row['times_cp']:.2f} | {peak} |")


def against_hqq() -> None:
    """Both tools side by side."""
    print("\n| model | bits | tool | bits/weight | perplexity | seconds |\n| --- | --- | --- | --- | --- | --- |")
    for r in read("against_hqq"):
        figures = f"{r['bits_per_weight']:.2f} | {r['perplexity']:.1f} | {r['seconds']:.1f}"
        print(f"| {r['model']} | {r['bits']} | {r['tool']} | {figures} |")


if __name__ == "__main__":
    quality()
    speed()
    against_hqq()
