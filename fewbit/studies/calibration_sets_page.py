"""The page of the study `calibration-sets`, drawn from its result."""

import math
from typing import Any

from fewbit.report.canvas import new_figure, to_svg
from fewbit.report.html import Figure, Section
from fewbit.studies.sets import DEFAULT
from fewbit.studies.study import Result, Row

_COLOURS = {"same": "#2f8f6b", "worse": "#c8553d", "better": "#0b6e99", "near": "#e0a030", "open": "#5b6478"}
_MEANING = (
    "same: equivalent within the margin; worse, better: the whole interval lies beyond it; near: a significant "
    "difference that may lie within it; open: the data do not say."
)


def draw(result: Result) -> list[Section]:
    """The sections of the page."""
    findings, rows = result["findings"], result["rows"]
    runs = [row for row in rows if row["table"] == "run" and "set" in row]
    sections = [_seeds(findings["seeds"], runs)]
    for verdict in findings["verdicts"]:
        method, bits = verdict["method"], verdict["bits"]
        sets = [row for row in findings["sets"] if (row["method"], row["bits"]) == (method, bits)]
        own = [row for row in runs if (row["method"], row["bits"]) == (method, bits)]
        sections.append(_method(verdict, sets, own, findings))
    if findings["tasks"]:
        sections.append(_tasks(findings["tasks"]))
    return sections


def _method(verdict: Row, sets: list[Row], runs: list[Row], findings: dict[str, Any]) -> Section:
    default = [row["nll"] for row in runs if row["set"] == DEFAULT]
    base = sum(default) / len(default)
    figure, axes = new_figure(7.2, 1.4 + 0.34 * (len(sets) + 1))
    margin = findings["margin"]
    axes.axvspan(1 / (1 + margin), 1 + margin, color="#2f8f6b", alpha=0.12)
    axes.axvline(1.0, color="black", linewidth=0.8)
    names = ["default", *[f"{row['axis']}/{row['set']}" for row in sets]]
    for place, row in enumerate(sets, 1):
        colour = _COLOURS[row["verdict"]]
        axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=3, alpha=0.5)
        axes.plot([row["ratio"]], [place], "o", color=colour, markersize=6)
    for row in runs:
        place = 0 if row["set"] == DEFAULT else 1 + [one["set"] for one in sets].index(row["set"])
        axes.plot([math.exp(min(row["nll"] - base, 700.0))], [place], "|", color="black", markersize=9)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    if max((row["ratio"] for row in sets), default=1.0) > 1.5:
        axes.set_xscale("log")
    axes.set_xlabel("perplexity relative to the default set")
    share = 1 - 2 * findings["alpha"]
    caption = (
        f"Point and {share:.0%} interval (windows and seeds); strokes: single seeds; band: margin of {margin:.0%}."
    )
    table = [
        [f"{row['axis']}/{row['set']}", f"{row['ratio']:.4f}", f"{row['low']:.4f} to {row['high']:.4f}",
         f"{row['p_equivalent']:.2g}", f"{row['p_different']:.2g}",
         f"{row['in_seed_deviations']:+.1f}" if "in_seed_deviations" in row else "", str(row["seeds"]), row["verdict"]]
        for row in sets
    ]  # fmt: skip
    columns = ["set", "ratio", "interval", "p equivalent", "p different", "in seed deviations", "seeds", "verdict"]
    heading = f"{verdict['method']}, {verdict['bits']} bits: {verdict['verdict']}"
    return Section(heading, [_MEANING], [Figure(to_svg(figure), caption)], columns, table)


def _seeds(seeds: list[Row], runs: list[Row]) -> Section:
    table = [
        [f"{row['method']}, {row['bits']} bits", f"{row['perplexity']:.3f}",
         _percent(row.get("default_deviation")), _percent(row.get("default_range")),
         _percent(row.get("pooled_deviation")), str(row["pooled_degrees"]), str(row["seeds"])]
        for row in seeds
    ]  # fmt: skip
    columns = ["method", "perplexity, default set", "std. dev. over its seeds", "range over its seeds",
               "std. dev. over seeds, all sets", "degrees of freedom", "seeds"]  # fmt: skip
    figure, axes = new_figure(7.2, 3.2)
    labels = [f"{row['method']}\n{row['bits']} bits" for row in seeds]
    for place, row in enumerate(seeds):
        chosen = [r["nll"] for r in runs if (r["method"], r["bits"], r["set"]) == (row["method"], row["bits"], DEFAULT)]
        centre = sum(chosen) / len(chosen)
        axes.plot([place] * len(chosen), [100 * math.expm1(nll - centre) for nll in chosen], "o", color="#0b6e99")
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylabel("perplexity, % from the mean")
    caption = "Seeds of the default set: different sequences of the same text."
    return Section("Effect of the seed alone", [], [Figure(to_svg(figure), caption)], columns, table)


def _tasks(tasks: list[Row]) -> Section:
    table = [
        [f"{row['method']}, {row['bits']} bits", row["set"], row["task"], f"{row['accuracy']:.1%}",
         f"{100 * row['difference']:+.1f}" if "difference" in row else ""]
        for row in tasks
    ]  # fmt: skip
    return Section("Accuracy", columns=["method", "set", "task", "accuracy", "points from the default set"], rows=table)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{math.expm1(value):.2%}"
