"""The page of `objectives`: scatters by bit-width, correlations with intervals, errors along the layers, tables."""

from typing import Any

from fewbit.report.canvas import new_panels, to_svg
from fewbit.report.html import Figure, Section
from fewbit.studies.objectives_summary import MEASURES, TRUTHS
from fewbit.studies.palette import method_colours
from fewbit.studies.study import Result, Row

_SCATTERED = ("output_error", "predicted")


def draw(result: Result) -> list[Section]:
    """Sections from `study.json` alone."""
    models = [row for row in result["rows"] if row["table"] == "model" and row["method"] != "original"]
    usable = [row for row in models if "loss_increase" in row and "output_error" in row]
    layers = [row for row in result["rows"] if row["table"] == "layer" and "output_error" in row]
    scatters = [
        Figure(
            _scatter(usable, measure, truth),
            f"{MEASURES[measure].capitalize()} against {TRUTHS[truth]}, nats per token.",
            wide=True,
        )
        for measure in _SCATTERED
        for truth in TRUTHS
        if usable
    ]
    best = min(range(len(models)), key=lambda i: models[i].get("kl_mean", float("inf")), default=-1)
    return [
        Section("Local and predicted errors against the loss, by bit-width", figures=scatters),
        Section(
            "Rank correlations",
            [
                "Spearman, with 95 % intervals (bootstrap over models, at least as wide as Fisher's transformation). "
                "holds: the interval is above 0.5; fails: below; open: it contains 0.5. Pairs in the opposite order: "
                "of two models of a group, the one with the lower measure has the higher loss."
            ],
            [
                Figure(
                    _correlations(result["findings"]["correlations"]), "Correlation with the loss increase.", wide=True
                )
            ],
            ["bits", "measure", "against", "models", "rho", "95 %", "pairs in the opposite order", "verdict"],
            [_correlation_row(c) for c in result["findings"]["correlations"]],
        ),
        Section(
            "Along the network",
            figures=[Figure(_along(layers, bits), f"{bits} bits", wide=True) for bits in _widths(layers)],
        ),
        Section(
            "Predicted over true increase",
            [
                "1 is a perfect prediction. It is of second order and treats layers as independent, so it fails for "
                "large errors."
            ],
            columns=["bits", "models", "quarter", "median", "three quarters"],
            rows=[_ratio_row(r) for r in result["findings"]["prediction_ratio"]],
        ),
        Section(
            "Every model",
            columns=["model", "bits/weight", "loss increase", "KL", *MEASURES.values(), "fell back"],
            rows=[_model_row(row) for row in models],
            best=best,
        ),
    ]


def _widths(rows: list[Row]) -> list[int]:
    return sorted({row["bits"] for row in rows}, reverse=True)


def _scatter(models: list[Row], measure: str, truth: str) -> str:
    """A panel for each bit-width; both axes logarithmic, the loss symmetrically since it may fall."""
    widths = _widths(models)
    colours = method_colours(row["method"] for row in models)
    figure, grid = new_panels(1, len(widths), (2.0 + 2.9 * len(widths), 3.4))
    for axes, bits in zip(grid[0], widths, strict=True):
        for row in (row for row in models if row["bits"] == bits):
            marker = "o" if row.get("group_size") is None else "^"
            axes.scatter(row[measure], row[truth], s=46, marker=marker, color=colours[row["method"]], alpha=0.9)
        axes.set_title(f"{bits} bit{'s' if bits > 1 else ''}", fontsize=10)
        axes.set_xscale("log")
        if min(row[truth] for row in models) > 0:
            axes.set_yscale("log")
        else:
            axes.set_yscale("symlog", linthresh=1e-3)
        axes.margins(0.12)
        axes.tick_params(labelsize=7, which="both")
        axes.set_xlabel(MEASURES[measure], fontsize=8)
    grid[0][0].set_ylabel(TRUTHS[truth])
    for method, colour in colours.items():
        grid[0][0].scatter([], [], color=colour, label=method)
    figure.legend(fontsize=8, loc="outside right upper", frameon=False)
    return to_svg(figure)


def _correlations(found: list[dict[str, Any]]) -> str:
    """Intervals side by side, measures within groups."""
    shown = [c for c in found if c["truth"] == "loss_increase" and "rho" in c]
    groups = list(dict.fromkeys(c["bits"] for c in shown))
    figure, grid = new_panels(1, 1, (9.5, 3.4))
    axes = grid[0][0]
    for place, (measure, label) in enumerate(MEASURES.items()):
        mine = [c for c in shown if c["measure"] == measure]
        x = [groups.index(c["bits"]) + 0.14 * (place - 2) for c in mine]
        rho = [c["rho"] for c in mine]
        # A percentile interval need not hold the estimate itself.
        spread = [[max(0.0, c["rho"] - c["low"]) for c in mine], [max(0.0, c["high"] - c["rho"]) for c in mine]]
        axes.errorbar(x, rho, yerr=spread, fmt="o", markersize=4, capsize=2, linewidth=1, label=label)
    axes.axhline(0, color="#5b6478", linewidth=0.8)
    axes.set_ylim(-1.05, 1.05)
    axes.set_xticks(range(len(groups)), ["all" if g == "all" else f"{g} bit{'s' if g != '1' else ''}" for g in groups])
    axes.set_ylabel("Spearman's rho")
    if shown:
        figure.legend(fontsize=8, loc="outside upper center", ncols=3, frameon=False)
    return to_svg(figure)


def _along(layers: list[Row], bits: int) -> str:
    figure, grid = new_panels(1, 1, (9.5, 3.0))
    mine = [row for row in layers if row["bits"] == bits]
    colours = method_colours(row["method"] for row in layers)
    seen: set[str] = set()
    for name in dict.fromkeys(row["name"] for row in mine):
        line = [row for row in mine if row["name"] == name]
        method = line[0]["method"]
        label = None if method in seen else method
        seen.add(method)
        values = [max(row["output_error"], 1e-12) for row in line]
        grid[0][0].plot(values, color=colours[method], linewidth=0.9, label=label)
    grid[0][0].set_yscale("log")
    grid[0][0].set_xlabel("layer, in storage order")
    grid[0][0].set_ylabel("output error")
    figure.legend(fontsize=8, loc="outside right upper", frameon=False)
    return to_svg(figure)


def _correlation_row(found: dict[str, Any]) -> list[str]:
    start = [found["bits"], MEASURES[found["measure"]], TRUTHS[found["truth"]], str(found["n"])]
    if "rho" not in found:
        return [*start, "", "", "", found["verdict"]]
    interval = f"{found['low']:.2f} to {found['high']:.2f}"
    return [*start, f"{found['rho']:.2f}", interval, f"{100 * found['discordant']:.0f} %", found["verdict"]]


def _ratio_row(row: dict[str, Any]) -> list[str]:
    return [row["bits"], str(row["n"]), *(f"{row[k]:.3g}" if k in row else "" for k in _QUARTERS)]


_QUARTERS = ("quarter", "median", "three_quarters")


def _model_row(row: Row) -> list[str]:
    def cell(key: str, style: str) -> str:
        return format(row[key], style) if row.get(key) is not None else ""

    return [
        row["name"],
        cell("bits_per_weight", ".2f"),
        row.get("failed") or cell("loss_increase", ".4f"),
        cell("kl_mean", ".4f"),
        *(cell(measure, ".4g") for measure in MEASURES),
        cell("fallbacks", "d"),
    ]
