"""What the rows of `objectives` say: how well each measure orders the models by their true loss."""

import math
from typing import Any

from fewbit.studies.choice import StudyChoice
from fewbit.studies.statistics import discordant_share, spearman, spearman_interval
from fewbit.studies.study import Row, Summary

MEASURES = {
    "weight_error": "weight error",
    "output_error": "output error, mean of layers",
    "output_error_worst": "output error, worst layer",
    "predicted_calibration": "predicted loss, calibration set",
    "predicted": "predicted loss, evaluation text",
}
TRUTHS = {"loss_increase": "loss increase", "kl_mean": "KL from the original"}
_FEWEST = 5
_STRONG = 0.5
_VERDICTS = {
    "holds": "A lower layer-wise error means a lower loss",
    "fails": "A lower layer-wise error does not mean a lower loss",
    "open": "Too few models to tell whether a lower layer-wise error means a lower loss",
}


def summarize(rows: list[Row], choice: StudyChoice) -> Summary:
    """Rank correlations over all models and within each bit-width, and where they break down."""
    models = [row for row in rows if row["table"] == "model" and row["method"] != "original"]
    original = next(row for row in rows if row["table"] == "model" and row["method"] == "original")
    usable = [row for row in models if "loss_increase" in row and "output_error" in row]
    groups: list[tuple[str, list[Row]]] = [("all", usable)]
    for bits in sorted({row["bits"] for row in usable}, reverse=True):
        groups.append((str(bits), [row for row in usable if row["bits"] == bits]))
    found = [
        _correlation(group, members, measure, truth, choice.seed)
        for group, members in groups
        for measure in MEASURES
        for truth in TRUTHS
    ]
    findings: dict[str, Any] = {
        "original_nll": original["nll"],
        "models": len(models),
        "failed": [row["name"] for row in models if "failed" in row],
        "without_local_errors": [row["name"] for row in models if "output_error" not in row],
        "correlations": found,
        "prediction_ratio": [_ratio(group, members) for group, members in groups if members],
        "best": [_best(group, members) for group, members in groups[1:]],
    }
    return Summary(findings, _conclusion(findings))


def _correlation(group: str, members: list[Row], measure: str, truth: str, seed: int) -> dict[str, Any]:
    """One correlation; verdict: `holds` when its interval lies above 0.5, `fails` when below, else `open`."""
    row: dict[str, Any] = {"bits": group, "measure": measure, "truth": truth, "n": len(members)}
    if len(members) < _FEWEST:
        return {**row, "verdict": "too few models"}
    x, y = [m[measure] for m in members], [m[truth] for m in members]
    rho = spearman(x, y)
    if rho != rho:
        return {**row, "verdict": "one side is constant"}
    low, high = spearman_interval(x, y, seed)
    verdict = "holds" if low > _STRONG else "fails" if high < _STRONG else "open"
    return {**row, "rho": rho, "low": low, "high": high, "discordant": discordant_share(x, y), "verdict": verdict}


def _ratio(group: str, members: list[Row]) -> dict[str, Any]:
    """Predicted over true increase of the loss: median and quartiles over models whose loss did rise."""
    ratios = sorted(m["predicted"] / m["loss_increase"] for m in members if m["loss_increase"] > 0)
    row: dict[str, Any] = {"bits": group, "n": len(ratios)}
    if ratios:
        row.update(
            quarter=_quantile(ratios, 0.25), median=_quantile(ratios, 0.5), three_quarters=_quantile(ratios, 0.75)
        )
    return row


def _quantile(ordered: list[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _best(group: str, members: list[Row]) -> dict[str, Any]:
    """At one bit-width, the model with the least loss, and the one that each measure would have chosen."""
    row: dict[str, Any] = {"bits": group, "least_loss": min(members, key=lambda m: m["loss_increase"])["name"]}
    least = min(m["loss_increase"] for m in members)
    for measure in MEASURES:
        chosen = min(members, key=lambda m, measure=measure: m[measure])  # type: ignore[misc]
        row[measure] = chosen["name"]
        row[f"{measure}_regret"] = chosen["loss_increase"] - least
    return row


def _conclusion(findings: dict[str, Any]) -> list[str]:
    found = {(c["bits"], c["measure"]): c for c in findings["correlations"] if c["truth"] == "loss_increase"}
    groups = list(dict.fromkeys(bits for bits, _ in found))
    lines = [
        f"{findings['models']} quantized models; the original's loss is {findings['original_nll']:.3f} nats per token. "
        "Spearman's correlation with the true loss increase (95 % interval):"
    ]
    for bits in groups:
        where = "all models" if bits == "all" else f"{bits} bit{'s' if bits != '1' else ''}"
        local, predicted = found[bits, "output_error"], found[bits, "predicted"]
        lines.append(f"{where} (n={local['n']}): output error {_shown(local)}; predicted loss {_shown(predicted)}")
    for verdict, text in _VERDICTS.items():
        which = [bits for bits in groups if bits != "all" and found[bits, "output_error"]["verdict"] == verdict]
        if which:
            lines.append(f"{text} at {', '.join(which)} bits.")
    if findings["failed"]:
        lines.append(f"No usable loss: {', '.join(findings['failed'])}.")
    return lines


def _shown(correlation: dict[str, Any]) -> str:
    if "rho" not in correlation:
        return str(correlation["verdict"])
    return f"{correlation['rho']:.2f} ({correlation['low']:.2f} to {correlation['high']:.2f}, {correlation['verdict']})"
