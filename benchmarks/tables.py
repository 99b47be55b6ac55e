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


def calibrated() -> None:
    """Every preset with the same text, seed 0 (* without bfloat16 products); then the claims over seeds."""
    rows = read("calibrated_quality")
    for model in MODELS:
        for bits in (8, 4, 3, 2, 1):
            found = [r for r in rows if (r["model"], r["bits"], r["seed"]) == (model, bits, 0)]
            if found:
                print(
                    f"\n| {model}, {bits} bits | bits/weight | perplexity | KL | curvature s | solve s | peak memory |"
                )
                print("| --- | --- | --- | --- | --- | --- | --- |")
            for r in found:
                figures = (
                    f"{r['bits_per_weight']:.2f} | {r['perplexity']:,.{2 if bits == 8 else 1}f} | {r['kl_mean']:.3f}"
                )
                mark = "" if r.get("bfloat16_products", True) else " *"
                times = f"{r['curvature_seconds']:.0f}{mark} | {r['solve_seconds']:.0f}{mark}"
                times += f" | {r['peak_rss_bytes'] / 1e9:.1f} GB"
                print(f"| {r['method']} | {figures} | {times} |")
    print("\n| model | bits | method | perplexity by seed | spread |\n| --- | --- | --- | --- | --- |")
    seeds: dict[tuple[str, int, str], list[float]] = {}
    for r in sorted(rows, key=lambda r: r["seed"]):
        seeds.setdefault((r["model"], r["bits"], r["method"]), []).append(r["perplexity"])
    for (model, bits, method), values in sorted(seeds.items()):
        if len(values) > 1:
            spread = f"{max(values) / min(values) - 1:.1%}"
            print(f"| {model} | {bits} | {method} | {', '.join(f'{v:,.1f}' for v in values)} | {spread} |")


def eight_bits() -> None:
    """What 8 bits change, run in float32."""
    print("\n| 8 bits, float32 | smollm2-135m: bits | change | gemma3-270m: bits | change |\n" + "| --- " * 5 + "|")
    found = {(r["model"], r["method"]): r for r in read("eight_bits")}
    for method in dict.fromkeys(method for _, method in found):
        rows = [found.get((model, method)) for model in MODELS]
        cells = [f"{r['bits_per_weight']:.2f} | {r['change']:+.2%}" if r else " | " for r in rows]
        print(f"| {method} | {' | '.join(cells)} |")


def other_tools() -> None:
    """Other calibrated tools on the same tokens."""
    print("\n| model | bits | tool | bits/weight | perplexity | seconds | cores |\n" + "| --- " * 7 + "|")
    for r in read("against_calibrated_tools"):
        figures = f"{r['bits_per_weight']:.2f} | {r['perplexity']:,.1f} | {r['seconds']:.0f} | {r['cores']}"
        print(f"| {r['model']} | {r['bits']} | {r['tool']} | {figures} |")


def calibrated_speed() -> None:
    """Seconds of presets against the passes that they need."""
    print("\n| model | preset | sequences | seconds | its passes | times | peak memory |\n" + "| --- " * 7 + "|")
    for model, result in (read("calibrated_speed") or {}).items():
        for r in result["rows"]:
            times = r.get("times_needed_passes")
            needed, ratio = (f"{r['seconds'] / times:.1f}", f"{times:.2f}") if times else ("", "")
            name = r["method"] if "billm" in r["method"] else f"{r['method']}, {r['bits']} bits"
            figures = f"{r['seconds']:.1f} | {needed} | {ratio} | {r['peak_rss_bytes'] / 1e9:.1f} GB"
            print(f"| {model} | {name} | {r['samples']} | {figures} |")


def tuning() -> None:
    """Fine-tuning: before and after."""
    print("\n| model | start | loss, trained, epochs | bits/weight | before | after | seconds |\n" + "| --- " * 7 + "|")
    for r in read("tuning"):
        choice = f"{r['choice']['loss']}, {r['choice']['train']}, {r['choice']['epochs']}"
        figures = f"{r['bits_per_weight']:.2f} | {r['before']:,.1f} | {r['perplexity']:,.2f} | {r['seconds']:.0f}"
        print(f"| {r['model']} | {r['method']}, {r['bits']} bits | {choice} | {figures} |")


def choices() -> None:
    """One choice changed at a time."""
    found = {(r["model"], r["bits"], r["variant"]): r for r in read("calibrated_choices")}
    print("\n| smollm2-135m | 2 bits: bits/weight | perplexity | 3 bits: bits/weight | perplexity |")
    print("| --- | --- | --- | --- | --- |")
    for name in dict.fromkeys(variant for _, _, variant in found):
        cells = []
        for bits in (2, 3):
            r = found.get(("smollm2-135m", bits, name))
            cells += [f"{r['bits_per_weight']:.2f}", f"{r['perplexity']:,.1f}"] if r else ["", ""]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    quality()
    speed()
    against_hqq()
    calibrated()
    eight_bits()
    other_tools()
    calibrated_speed()
    tuning()
    choices()
