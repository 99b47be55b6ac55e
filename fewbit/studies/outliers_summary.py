"""What the rows of the study `outliers` say."""

from collections.abc import Iterable
from itertools import combinations
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from fewbit.activations.channels import expected_jaccard, jaccard
from fewbit.activations.massive import begins_at
from fewbit.studies.choice import StudyChoice
from fewbit.studies.sets import DEFAULT
from fewbit.studies.study import Row, Summary

FIRST_TOKEN_RATIO = 10.0
"""From here on the first token's norm, over the median token's, counts as massive."""


def summarize(rows: list[Row], choice: StudyChoice) -> Summary:
    """Findings by kind of row, and the conclusion."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row["table"], []).append(row)
    findings = {
        "sites": _sites(kinds.get("site", [])),
        "overlap": _overlap(kinds.get("site", [])),
        "massive": _massive(kinds.get("states", [])),
        "weights": _weights(kinds.get("weights", [])),
        "w8a8": _w8a8(kinds.get("w8a8", [])),
        "model": _model(kinds.get("model", [])),
        "fixes": _fixes(kinds.get("fix", [])),
    }
    return Summary(findings, conclude(findings))


def _grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def _median(values: Iterable[float | None]) -> float | None:
    """Of the values that are there; a correlation with what is constant is not."""
    present = [value for value in values if value is not None]
    return median(present) if present else None


def _sites(rows: list[Row]) -> list[Row]:
    """For every set and kind of site, over its blocks."""
    return [
        {
            "set": name,
            "axis": group[0]["axis"],
            "site": site,
            "kurtosis": median(row["kurtosis"] for row in group),
            "max": max(row["max"] for row in group),
            "max_over_999": median(row["max"] / max(row["quantile_999"], 1e-30) for row in group),
            "top_share": median(row["top_share"] for row in group),
            "outliers": mean(row["outliers"] for row in group),
            "outlier_share": sum(row["outliers"] for row in group) / sum(row["channels"] for row in group),
            "with_outliers": mean(row["outliers"] > 0 for row in group),
        }
        for (name, site), group in _grouped(rows, "set", "site").items()
    ]


def _mask(row: Row) -> Tensor:
    mask = torch.zeros(row["channels"], dtype=torch.bool)
    mask[[int(channel) for channel in row["outlier_channels"].split()]] = True
    return mask


def _overlap(rows: list[Row]) -> list[Row]:
    """For every pair of sets: the mean Jaccard index over the sites where one of them has outlier channels."""
    masks = {(row["set"], row["block"], row["layers"]): _mask(row) for row in rows}
    axes = {row["set"]: row["axis"] for row in rows}
    places = list(dict.fromkeys((row["block"], row["layers"]) for row in rows))
    found: list[Row] = []
    for one, other in combinations(axes, 2):
        pairs = [(masks.get((one, *place)), masks.get((other, *place))) for place in places]
        both = [(a, b) for a, b in pairs if a is not None and b is not None and bool((a | b).any())]
        if both:
            found.append(
                {
                    "one": one,
                    "other": other,
                    "axes": [axes[one], axes[other]],
                    "jaccard": mean(value for a, b in both if (value := jaccard(a, b)) is not None),
                    "by_chance": mean(value for a, b in both if (value := expected_jaccard(a, b)) is not None),
                    "sites": len(both),
                }
            )
    return found


def _massive(rows: list[Row]) -> list[Row]:
    """For every set: after which block massive activations are there (0: before the first), and where they sit."""
    found: list[Row] = []
    for (name,), group in _grouped(rows, "set").items():
        group = sorted(group, key=lambda row: row["after_block"])
        peak = max(group, key=lambda row: row["magnitude"])
        found.append(
            {
                "set": name,
                "massive_after_block": next((row["after_block"] for row in group if row["massive"]), None),
                "first_token_after_block": begins_at([row["first_norm_ratio"] for row in group], FIRST_TOKEN_RATIO),
                "magnitude": peak["magnitude"],
                "median_magnitude": peak["median_magnitude"],
                "channel": peak["channel"],
                "largest_is_first": peak["largest_is_first"],
                "first_norm_ratio": max(row["first_norm_ratio"] for row in group),
            }
        )
    return found


def _weights(rows: list[Row]) -> list[Row]:
    """For every kind of site: which columns the outlier channels meet, in the layers where there are any."""
    found: list[Row] = []
    for (site,), group in _grouped(rows, "site").items():
        met = [row for row in group if row.get("rank") is not None and row.get("relative_norm") is not None]
        row: Row = {"site": site, "layers": len(group), "correlation": _median(r.get("correlation") for r in group)}
        if met:
            row.update(
                met=len(met),
                relative_norm=median(r["relative_norm"] for r in met),
                rank=median(r["rank"] for r in met),
                lasso_ratio=median(r["lasso_ratio"] for r in met),
            )
        found.append(row)
    return found


def _w8a8(rows: list[Row]) -> list[Row]:
    return [
        {
            "site": site,
            "granularity": granularity,
            "ranges": ranges,
            "median": median(row["error"] for row in group),
            "worst": max(row["error"] for row in group),
            "worst_block": max(group, key=lambda row: row["error"])["block"],
        }
        for (site, granularity, ranges), group in _grouped(rows, "site", "granularity", "ranges").items()
    ]


def _model(rows: list[Row]) -> list[Row]:
    """Losses against the original's."""
    base = next((row["nll"] for row in rows if row["sites"] == "none"), None)
    return [
        {**{k: v for k, v in row.items() if k != "table"}, "nll_rise": row["nll"] - base}
        for row in rows
        if base is not None
    ]


def _fixes(rows: list[Row]) -> list[Row]:
    """For every bit-width, inputs and fix: what share of the plain error it takes away, over the sites."""
    plain = {
        (row["block"], row["layers"], row["bits"], row["inputs"]): row["error"] for row in rows if row["fix"] == "none"
    }
    found: list[Row] = []
    for (bits, inputs, fix), group in _grouped(rows, "bits", "inputs", "fix").items():
        before = [plain[(row["block"], row["layers"], bits, inputs)] for row in group]
        recovered = [1 - row["error"] / max(b, 1e-300) for row, b in zip(group, before, strict=True)]
        found.append(
            {
                "bits": bits,
                "inputs": inputs,
                "fix": fix,
                "error": median(row["error"] for row in group),
                "recovered": median(recovered),
                "recovered_least": min(recovered),
                "recovered_of_sum": 1 - sum(row["error"] for row in group) / max(sum(before), 1e-300),
                "helps": mean(value > 0 for value in recovered),
                "bits_per_weight": mean(row["bits_per_weight"] for row in group),
            }
        )
    return found


def conclude(findings: dict[str, list[Row]]) -> list[str]:
    """A few lines for people, from the findings alone."""
    lines: list[str] = []
    sites = [row for row in findings["sites"] if row["set"] == DEFAULT]
    if sites:
        worst = max(sites, key=lambda row: row["kurtosis"])
        lines.append(
            "Outlier channels: "
            + "; ".join(
                f"{row['site']} {row['outliers']:.1f} per layer (kurtosis {row['kurtosis']:.0f})" for row in sites
            )
            + f". Heaviest tails: {worst['site']}."
        )
    lines += _overlap_lines(findings["overlap"])
    massive = next((row for row in findings["massive"] if row["set"] == DEFAULT), None)
    if massive and massive["massive_after_block"] is not None:
        lines.append(
            f"Massive activations appear after block {massive['massive_after_block']}: up to "
            f"{massive['magnitude']:.0f} in channel {massive['channel']}, on the first token in "
            f"{massive['largest_is_first']:.0%} of the sequences."
        )
    elif massive:
        lines.append(
            f"No massive activations (largest {massive['magnitude']:.1f}); the first token's norm is up to "
            f"{massive['first_norm_ratio']:.1f} times the median token's."
        )
    met = [row for row in findings["weights"] if "rank" in row]
    if met:
        lines.append(
            "Outlier channels are multiplied with columns of relative norm "
            + ", ".join(f"{row['relative_norm']:.2f} (rank {row['rank']:.2f}) at {row['site']}" for row in met)
            + "; 1 and 0.5 would be chance."
        )
    rounded = [row for row in findings["model"] if row["sites"] == "all"]
    if rounded:
        lines.append("W8A8, increase of the loss in nats per token: " + ", ".join(map(_rise, rounded)) + ".")
    for bits in dict.fromkeys(row["bits"] for row in findings["fixes"]):
        shown = [row for row in findings["fixes"] if row["bits"] == bits and row["fix"] != "none"]
        for inputs in dict.fromkeys(row["inputs"] for row in shown):
            each = [f"{row['fix']} {row['recovered']:.0%}" for row in shown if row["inputs"] == inputs]
            lines.append(f"Weights of {bits} bits, inputs of {inputs}: error removed: {', '.join(each)}.")
    return lines


def _overlap_lines(pairs: list[Row]) -> list[str]:
    lines: list[str] = []
    against = [row for row in pairs if DEFAULT in (row["one"], row["other"])]
    if against:
        named = [f"{row['other'] if row['one'] == DEFAULT else row['one']} {row['jaccard']:.2f}" for row in against]
        chance = mean(row["by_chance"] for row in against)
        lines.append(
            f"Overlap of outlier channels with the default set's (by chance {chance:.2f}): {', '.join(named)}."
        )
    languages = [row for row in pairs if row["axes"] == ["language", "language"]]
    if languages:
        least = min(languages, key=lambda row: row["jaccard"])
        lines.append(
            f"Between languages it is {mean(row['jaccard'] for row in languages):.2f} on average, least for "
            f"{least['one']} and {least['other']} ({least['jaccard']:.2f})."
        )
    return lines


def _rise(row: Row) -> str:
    name = f"per {row['granularity']} {row['ranges']}"
    name += "" if row["smoothed"] == "none" else f" smoothed ({row['smoothed']})"
    return f"{name} {row['nll_rise']:+.4f}"
