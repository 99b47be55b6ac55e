"""Draw docs/frontier.png: bits against perplexity on gemma3-270m, ours and others, from benchmarks/results/*.json.

python benchmarks/readme_plot.py
"""

import json
from pathlib import Path
from typing import Any

from fewbit.report.canvas import new_figure

HERE = Path(__file__).parent
OUT = HERE.parent / "docs/frontier.png"
MODEL = "gemma3-270m"
HIGHEST = 600.0
# Our methods in one colour, others in another; a marker tells them apart in print.
OURS, OTHERS = "#0b6e99", "#c8553d"

Rows = list[dict[str, Any]]
Points = list[tuple[float, float]]


def results(name: str) -> Rows:
    """The rows of one file of results that are about the model."""
    rows = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return [row for row in rows if row["model"] == MODEL]


def best_of_each_width(rows: Rows) -> Points:
    """(bits, perplexity) of the best row of every nominal width, in order of bits."""
    best: dict[int, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: -row["perplexity"]):
        best[row["bits"]] = row
    return sorted((row["bits_per_weight"], row["perplexity"]) for row in best.values())


def series() -> dict[str, tuple[str, Points]]:
    """Label -> (colour, points)."""
    calibrated = [row for row in results("calibrated_quality") if row["seed"] == 0]
    tuned = [row for row in results("tuning") if row["text"] == "c4"]
    tools = results("against_calibrated_tools")
    hqq = [row for row in results("against_hqq") if row["tool"] == "hqq"]

    def method(name: str) -> Points:
        return best_of_each_width([row for row in calibrated if row["method"] == name])

    def tool(name: str) -> Points:
        return best_of_each_width([row for row in tools if row["tool"] == name])

    return {
        "precal+oac, tuned": (OURS, best_of_each_width(tuned)),
        "precal+oac": (OURS, method("precal+oac")),
        "adpq+ (no data)": (OURS, method("adpq+")),
        "SpQR": (OTHERS, method("spqr")),
        "GPTQ": (OTHERS, method("gptq")),
        "AWQ": (OTHERS, method("awq")),
        "AutoRound (tool)": (OTHERS, tool("autoround")),
        "GPTQModel (tool)": (OTHERS, tool("gptqmodel")),
        "HQQ (tool, no data)": (OTHERS, best_of_each_width(hqq)),
        "rounding (no data)": (OTHERS, method("rtn")),
    }


def main() -> None:
    figure, axes = new_figure(8.4, 4.0)
    markers = {OURS: iter("o^s"), OTHERS: iter("Dv<Xp*P")}
    for label, (colour, points) in series().items():
        shown = [point for point in points if point[1] <= HIGHEST]
        axes.plot(*zip(*shown, strict=True), marker=next(markers[colour]), color=colour, markersize=7, label=label,
                  linewidth=2 if colour == OURS else 1, linestyle="-" if colour == OURS else ":",
                  markerfacecolor=colour if colour == OURS else "white", zorder=3 if colour == OURS else 2)  # fmt: skip
    original = 18.63
    axes.axhline(original, color="#5b6478", linestyle="--", linewidth=1)
    axes.annotate("original", (0.99, original), xycoords=("axes fraction", "data"), va="top", ha="right", fontsize=8,
                  xytext=(0, -2), textcoords="offset points", color="#5b6478")  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(15, HIGHEST)
    axes.set_yticks([20, 30, 50, 100, 200, 500], ["20", "30", "50", "100", "200", "500"])
    axes.minorticks_off()
    axes.set_xlabel("bits per weight, from bytes on disk")
    axes.set_ylabel("perplexity on WikiText-2 (lower is better)")
    axes.set_title("Gemma 3 270M", fontsize=10, loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8.5, frameon=False, labelspacing=0.9)
    figure.savefig(OUT, dpi=100, facecolor="white")
    print(f"wrote {OUT.name}, {OUT.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
