"""Plots as SVG text, drawn from report data; nothing is fetched to show them."""

from collections.abc import Sequence
from typing import Any

from fewbit.report.canvas import new_figure as _figure
from fewbit.report.canvas import to_svg as _svg

COLOURS = {"original": "#5b6478", "rtn": "#c8553d", "adpq": "#e0a030", "adpq+": "#0b6e99"}
_OTHERS = ["#2f8f6b", "#7a5195", "#ef5675", "#4f6d7a"]


def colour(method: str) -> str:
    """The colour of a method, the same in every plot."""
    return COLOURS.get(method) or _OTHERS[sum(map(ord, method)) % len(_OTHERS)]


def bits_against_perplexity(rows: Sequence[dict[str, Any]]) -> str:
    """A point for each model: bits per weight on disk against perplexity (log scale); the original is a line."""
    figure, axes = _figure()
    for row in rows:
        if row["method"] == "original":
            axes.axhline(row["perplexity"], color=colour("original"), linestyle="--", linewidth=1)
            axes.annotate("original, 16 bits", (0.99, row["perplexity"]), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", fontsize=8, color=colour("original"))  # fmt: skip
            continue
        axes.scatter(row["bits_per_weight"], row["perplexity"], s=70, color=colour(row["method"]), zorder=3)
        axes.annotate(f"{row['method']}  {row['perplexity']:.1f}", (row["bits_per_weight"], row["perplexity"]),
                      xytext=(7, 4), textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set_yscale("log")
    axes.margins(x=0.2, y=0.15)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("bits per weight, from bytes on disk")
    axes.set_ylabel("perplexity (lower is better)")
    return _svg(figure)


def divergence_bars(rows: Sequence[dict[str, Any]]) -> str:
    """Mean KL per token from the original, with one bar per model."""
    shown = [row for row in rows if "kl_mean" in row and row["method"] != "original"]
    figure, axes = _figure()
    labels = [f"{row['method']}\n{row['bits_per_weight']:.2f} bits" for row in shown]
    bars = axes.bar(labels, [row["kl_mean"] for row in shown], color=[colour(row["method"]) for row in shown])
    axes.bar_label(bars, fmt="%.3f", fontsize=8)
    axes.set_ylabel("KL from the original, nats per token")
    return _svg(figure)


def task_accuracies(rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> str:
    """Accuracy of every model on every task with its standard error; models side by side in the order of the rows."""
    figure, axes = _figure(9.5, 3.8)
    for index, row in enumerate(rows):
        found = [row["tasks"][name] for name in tasks]
        places = [at + 0.7 * ((index + 0.5) / len(rows) - 0.5) for at in range(len(tasks))]
        errors = [100 * one.get("standard_error", 0.0) for one in found]
        label = f"{row['method']}, {row['bits_per_weight']:.2f} bits"
        axes.errorbar(places, [100 * one["accuracy"] for one in found], errors, fmt="o", markersize=5, capsize=2,
                      color=colour(row["method"]), label=label)  # fmt: skip
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylabel("right, per cent")
    axes.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return _svg(figure)


def layer_errors(reports: Sequence[dict[str, Any]]) -> str:
    """Relative squared error of every layer in order, with one line per run."""
    figure, axes = _figure(9.5, 3.4)
    for report in reports:
        errors = [layer["relative_squared_error"] for layer in report["layers"]]
        label = f"{report['method']}, {report['recipe']['bits']} bits"
        style = "-" if report["recipe"]["bits"] == 3 else ":"
        axes.plot(errors, style, color=colour(report["method"]), linewidth=1.2, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("layer, in storage order")
    axes.set_ylabel("relative squared error")
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.2), frameon=False)
    return _svg(figure)


def tensor_values(tensors: Sequence[dict[str, Any]], key: str, label: str) -> str:
    """One value of every matrix in order."""
    figure, axes = _figure(9.5, 3.0)
    values = [row[key] for row in tensors if key in row]
    axes.plot(values, ".", color=colour("adpq+"), markersize=4)
    if values and min(values) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("matrix, in storage order")
    axes.set_ylabel(label)
    return _svg(figure)
