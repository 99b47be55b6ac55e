"""The page of the study `outliers`, drawn from its result."""

from typing import Any

from fewbit.report.canvas import new_figure, new_panels, to_svg
from fewbit.report.html import Figure, Section
from fewbit.studies.outliers_measure import SITES
from fewbit.studies.outliers_summary import FIRST_TOKEN_RATIO
from fewbit.studies.palette import method_colours
from fewbit.studies.sets import DEFAULT
from fewbit.studies.study import Result, Row


def draw(result: Result) -> list[Section]:
    """The sections of the page."""
    rows, findings = result["rows"], result["findings"]
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row["table"], []).append(row)
    sections = []
    default = [row for row in kinds.get("site", []) if row["set"] == DEFAULT]
    if default:
        sections += [_heat_maps(default), _sizes(default, findings["sites"])]
    if findings["overlap"]:
        sections.append(_overlap(findings["overlap"]))
    if kinds.get("states"):
        sections.append(_states(kinds["states"], findings["massive"]))
    if findings["weights"]:
        sections.append(_weights(findings["weights"]))
    if kinds.get("w8a8"):
        sections.append(_w8a8(kinds["w8a8"], findings["w8a8"], findings["model"]))
    if findings["fixes"]:
        sections.append(_fixes(findings["fixes"]))
    return sections


def _labels(rows: list[Row]) -> list[str]:
    return [site for site in SITES if any(row["site"] == site for row in rows)]


def _heat_maps(rows: list[Row]) -> Section:
    labels = _labels(rows)
    figure, grid = new_panels(1, len(labels), (3.2 * len(labels), 4.0))
    image = None
    for axes, label in zip(grid[0], labels, strict=True):
        lines = [[float(v) for v in row["profile"].split()] for row in rows if row["site"] == label]
        width = max(map(len, lines))
        shown = [line + [0.0] * (width - len(line)) for line in lines]
        image = axes.imshow(shown, aspect="auto", cmap="magma", vmin=0.0, vmax=2.0, interpolation="nearest")
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("channels, from first to last")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.grid(visible=False)
    grid[0][0].set_ylabel("block")
    figure.colorbar(image, ax=list(grid[0]), label="log10 of rms over the median channel's")
    caption = "Bright: channels that are far above the median one. Default set."
    return Section("Layer against channel", figures=[Figure(to_svg(figure), caption)])


def _sizes(rows: list[Row], sites: list[Row]) -> Section:
    labels, figures = _labels(rows), []
    for key, name, log in (("kurtosis", "kurtosis", True), ("max", "largest magnitude", True),
                           ("top_share", "energy share of the top 1 % of the channels", False)):  # fmt: skip
        figure, axes = new_figure()
        for label in labels:
            chosen = [row for row in rows if row["site"] == label]
            colour = method_colours(SITES)[label]
            axes.plot([row["block"] for row in chosen], [row[key] for row in chosen], ".-", color=colour, label=label)
        axes.set_xlabel("block")
        axes.set_ylabel(name)
        if log:
            axes.set_yscale("log")
        axes.legend(fontsize=8, frameon=False)
        figures.append(Figure(to_svg(figure), f"{name[0].upper()}{name[1:]} by block."))
    table = [
        [row["set"], row["site"], f"{row['kurtosis']:.1f}", f"{row['max']:.1f}", f"{row['max_over_999']:.1f}",
         f"{row['top_share']:.1%}", f"{row['outliers']:.1f}", f"{row['with_outliers']:.0%}"]
        for row in sites
    ]  # fmt: skip
    columns = ["set", "site", "kurtosis", "max", "max over 99.9 %", "energy of top 1 %", "outlier channels",
               "layers with any"]  # fmt: skip
    return Section("Where inputs are large", figures=figures, columns=columns, rows=table)


def _overlap(pairs: list[Row]) -> Section:
    names = list(dict.fromkeys([name for row in pairs for name in (row["one"], row["other"])]))
    place = {name: index for index, name in enumerate(names)}
    values: list[list[float]] = [[1.0 if a == b else float("nan") for a in names] for b in names]
    for row in pairs:
        one, other = place[row["one"]], place[row["other"]]
        values[one][other] = values[other][one] = row["jaccard"]
    figure, axes = new_figure(max(8.0, 1.8 + 0.5 * len(names)), 1.6 + 0.5 * len(names))
    axes.imshow(values, cmap="viridis", vmin=0.0, vmax=1.0)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if value == value:
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7,
                          color="white" if value < 0.6 else "black")  # fmt: skip
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.grid(visible=False)
    chance = sum(row["by_chance"] for row in pairs) / len(pairs)
    caption = f"Mean Jaccard index of the outlier channels over sites; masks of these sizes at random: {chance:.2f}."
    return Section("Are they the same channels on other text?", figures=[Figure(to_svg(figure), caption)])


def _states(rows: list[Row], massive: list[Row]) -> Section:
    figures = []
    for key, name in (("first_norm_ratio", "first token's norm over the median token's"),
                      ("magnitude", "largest magnitude of the hidden states")):  # fmt: skip
        figure, axes = new_figure()
        colours = method_colours(row["set"] for row in rows)
        for name_of_set in dict.fromkeys(row["set"] for row in rows):
            chosen = [row for row in rows if row["set"] == name_of_set]
            axes.plot([r["after_block"] for r in chosen], [r[key] for r in chosen], color=colours[name_of_set],
                      label=name_of_set, linewidth=2.0 if name_of_set == DEFAULT else 1.0)  # fmt: skip
        axes.set_yscale("log")
        axes.set_xlabel("after block (0: before the first)")
        axes.set_ylabel(name)
        axes.legend(fontsize=7, frameon=False, ncols=2)
        figures.append(Figure(to_svg(figure), f"{name[0].upper()}{name[1:]}, mean over sequences."))
    table = [
        [row["set"], _or_never(row["massive_after_block"]), _or_never(row["first_token_after_block"]),
         f"{row['magnitude']:.0f}", f"{row['median_magnitude']:.2f}", str(row["channel"]),
         f"{row['largest_is_first']:.0%}"]
        for row in massive
    ]  # fmt: skip
    columns = ["set", "massive after block", f"first token over {FIRST_TOKEN_RATIO:g}x after block", "largest",
               "median", "channel", "on the first token"]  # fmt: skip
    text = "Massive: above 100 and above 1,000 times the median magnitude, in more than half of the sequences."
    return Section("Massive activations", [text], figures, columns, table)


def _weights(weights: list[Row]) -> Section:
    table = [
        [row["site"], f"{row.get('met', 0)} of {row['layers']}", _number(row, "relative_norm", ".2f"),
         _number(row, "rank", ".2f"), _number(row, "lasso_ratio", ".2f"), _number(row, "correlation", ".2f")]
        for row in weights
    ]  # fmt: skip
    columns = ["site", "layers with outliers", "relative norm of their columns", "rank of these (0 to 1)",
               "share of LASSO outliers, relative", "rank correlation, channel and column"]  # fmt: skip
    return Section(
        "Which weights outlier channels are multiplied with",
        ["Medians over layers; by chance 1, 0.5, 1 and 0."],
        (),
        columns,
        table,
    )


def _w8a8(rows: list[Row], errors: list[Row], model: list[Row]) -> Section:
    labels = _labels(rows)
    figure, grid = new_panels(1, len(labels), (3.2 * len(labels), 3.4))
    kinds = list(dict.fromkeys((row["granularity"], row["ranges"]) for row in rows))
    colours = method_colours(f"{granularity} {ranges}" for granularity, ranges in kinds)
    for axes, label in zip(grid[0], labels, strict=True):
        for granularity, ranges in kinds:
            chosen = [r for r in rows if (r["site"], r["granularity"], r["ranges"]) == (label, granularity, ranges)]
            axes.plot([r["block"] for r in chosen], [max(r["error"], 1e-12) for r in chosen], ".-", linewidth=1,
                      color=colours[f"{granularity} {ranges}"], label=f"per {granularity}, {ranges}")  # fmt: skip
        axes.set_yscale("log")
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("block")
    grid[0][0].set_ylabel("relative squared error of outputs")
    grid[0][0].legend(fontsize=7, frameon=False)
    table = [
        [f"{row['site']}, per {row['granularity']}, {row['ranges']}", f"{row['median']:.2e}", f"{row['worst']:.2e}",
         str(row["worst_block"]), _model_cell(model, row)]
        for row in errors
    ]  # fmt: skip
    table += [
        [f"all sites, per {row['granularity']}, {row['ranges']}{_smoothed(row)}", "", "", "",
         f"{row['nll_rise']:+.4f}"]
        for row in model
        if row["sites"] == "all"
    ]  # fmt: skip
    columns = ["8-bit weights and inputs", "error, median", "worst", "in block", "increase of the loss, nats per token"]
    return Section("W8A8 by site", figures=[Figure(to_svg(figure), "On held-out text.")], columns=columns, rows=table)


def _model_cell(model: list[Row], row: Row) -> str:
    for one in model:
        if (one["sites"], one.get("granularity"), one.get("ranges")) == (
            row["site"],
            row["granularity"],
            row["ranges"],
        ):
            return f"{one['nll_rise']:+.4f}"
    return ""


def _smoothed(row: Row) -> str:
    return "" if row["smoothed"] == "none" else f", smoothed ({row['smoothed']})"


def _fixes(fixes: list[Row]) -> Section:
    shown = [row for row in fixes if row["fix"] != "none"]
    figures = []
    for inputs in dict.fromkeys(row["inputs"] for row in shown):
        figure, axes = new_figure()
        names = list(dict.fromkeys(row["fix"] for row in shown))
        widths = list(dict.fromkeys(row["bits"] for row in shown))
        for index, name in enumerate(names):
            chosen = [row for row in shown if row["fix"] == name and row["inputs"] == inputs]
            places = [widths.index(row["bits"]) + 0.8 * (index - (len(names) - 1) / 2) / len(names) for row in chosen]
            heights = [100 * row["recovered"] for row in chosen]
            axes.bar(places, heights, 0.8 / len(names), color=method_colours(names)[name], label=name)
        axes.set_xticks(range(len(widths)), [f"{bits} bits" for bits in widths])
        axes.set_ylabel("error removed, median, %")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.legend(fontsize=8, frameon=False)
        figures.append(Figure(to_svg(figure), f"Inputs of {inputs}."))
    columns = ["weights", "inputs", "fix", "error, median", "taken away, median", "least", "of the sum", "sites helped",
               "bits a weight"]  # fmt: skip
    table = [
        [f"{row['bits']} bits", row["inputs"], row["fix"], f"{row['error']:.2e}", f"{row['recovered']:.0%}",
         f"{row['recovered_least']:.0%}", f"{row['recovered_of_sum']:.0%}", f"{row['helps']:.0%}",
         f"{row['bits_per_weight']:.2f}"]
        for row in fixes
    ]  # fmt: skip
    text = "Plain rounding in groups, no compensation of errors; each remedy alone, on held-out text."
    return Section("How much each remedy recovers", [text], figures, columns, table)


def _or_never(value: Any) -> str:
    return "never" if value is None else str(value)


def _number(row: Row, key: str, style: str) -> str:
    return format(row[key], style) if row.get(key) is not None else ""
