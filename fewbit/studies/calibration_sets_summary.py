"""What the rows of the study `calibration-sets` say: ratios, their spread over seeds, equivalence, a verdict."""

import math
from statistics import mean
from typing import Any

from fewbit.evaluation.equivalence import Equivalence, moments, paired, paired_with_runs, pooled_variance
from fewbit.studies.choice import StudyChoice
from fewbit.studies.sets import DEFAULT
from fewbit.studies.study import Row, Summary

MARGIN = 0.02
ALPHA = 0.05

Losses = dict[tuple[str, int], dict[str, dict[int, list[float]]]]
"""(method, bits) -> set -> seed -> losses by window."""


def summarize(rows: list[Row], choice: StudyChoice) -> Summary:
    """Findings for every method, bit-width and set, and the verdict.

    The margin is of perplexity: ``--margin 0.02`` asks whether the mean loss differs by less than ``log 1.02``.
    """
    margin = float(choice.options.get("margin", MARGIN))
    alpha = float(choice.options.get("alpha", ALPHA))
    axes = {row["set"]: row["axis"] for row in rows if row["table"] == "run" and "set" in row}
    losses = collect(rows)
    found: list[Row] = []
    spreads: list[Row] = []
    for (method, bits), sets in losses.items():
        if DEFAULT not in sets:
            continue
        variance, degrees = pooled_variance([_run_means(seeds) for seeds in sets.values()])
        default = _run_means(sets[DEFAULT])
        spread: Row = {"method": method, "bits": bits, "perplexity": math.exp(min(mean(default), 700.0))}
        spread.update(seeds=len(default), pooled_degrees=degrees)
        if degrees:
            spread["pooled_deviation"] = math.sqrt(variance)
        if len(default) > 1:
            spread["default_deviation"] = math.sqrt(moments(default)[1])
            spread["default_range"] = max(default) - min(default)
        spreads.append(spread)
        for name, seeds in sets.items():
            if name != DEFAULT:
                about = {"method": method, "bits": bits, "set": name, "axis": axes[name], "seeds": len(seeds)}
                found.append({**about, **compare(sets[DEFAULT], seeds, (variance, degrees), (margin, alpha))})
    findings: dict[str, Any] = {
        "margin": margin,
        "alpha": alpha,
        "original_perplexity": next((r["perplexity"] for r in rows if r.get("method") == "original"), None),
        "sets": found,
        "seeds": spreads,
        "tasks": _tasks(rows),
        "failed": [{k: v for k, v in row.items() if k != "table"} for row in rows if row["table"] == "failed"],
        "verdicts": verdicts(found),
    }
    return Summary(findings, conclude(findings))


def collect(rows: list[Row]) -> Losses:
    """The losses of all methods, windows in order."""
    losses: Losses = {}
    for row in rows:
        if row["table"] == "loss" and "set" in row:
            seeds = losses.setdefault((row["method"], row["bits"]), {}).setdefault(row["set"], {})
            seeds.setdefault(row["seed"], []).append(row["nll"])
    return losses


def _run_means(seeds: dict[int, list[float]]) -> list[float]:
    return [math.fsum(losses) / len(losses) for losses in seeds.values()]


def compare(
    default: dict[int, list[float]],
    other: dict[int, list[float]],
    spread: tuple[float, int],
    limits: tuple[float, float],
) -> Row:
    """One set against the default: seed -> losses by window of each.

    spread: variance of a run's mean loss between seeds, pooled over all sets, and its degrees of freedom (0: unknown,
    then the windows alone decide). limits: margin and alpha.
    """
    margin, alpha = math.log1p(limits[0]), limits[1]
    differences = [
        mean(of_other) - mean(of_default)
        for of_default, of_other in zip(
            zip(*default.values(), strict=True), zip(*other.values(), strict=True), strict=True
        )
    ]
    windows = paired(differences, margin, alpha)
    variance, degrees = spread
    both = windows
    if degrees:
        both = paired_with_runs(differences, variance, degrees, (len(default), len(other)), margin, alpha)
    row: Row = {
        "ratio": math.exp(min(both.mean, 700.0)),
        "low": math.exp(min(both.low, 700.0)),
        "high": math.exp(min(both.high, 700.0)),
        "p_equivalent": both.p,
        "p_different": both.p_different,
        "p_equivalent_windows_only": windows.p,
        "standard_error": both.standard_error,
        "degrees": both.degrees,
        "verdict": both.verdict,
    }
    if degrees:
        row["in_seed_deviations"] = _deviations(both, variance, len(default), len(other))
    return row


def _deviations(found: Equivalence, variance: float, default: int, other: int) -> float:
    """The difference over what two means of so many seeds differ by through luck alone (one standard deviation)."""
    luck = math.sqrt(variance * (1 / default + 1 / other))
    return found.mean / luck if luck > 0 else math.copysign(1e9, found.mean) if found.mean else 0.0


def _tasks(rows: list[Row]) -> list[Row]:
    """Mean accuracy over seeds by method, set and task, and its difference from the default set's."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if row["table"] == "task":
            key = (row["method"], row["bits"], row.get("set", "original"), row["task"])
            groups.setdefault(key, []).append(row["accuracy"])
    found: list[Row] = []
    for (method, bits, name, task), values in groups.items():
        row = {"method": method, "bits": bits, "set": name, "task": task, "accuracy": mean(values)}
        default = groups.get((method, bits, DEFAULT, task))
        if default and name != DEFAULT:
            row["difference"] = mean(values) - mean(default)
        found.append(row)
    return found


def verdicts(sets: list[Row]) -> list[Row]:
    """For every method: robust, sensitive (to the sets that are worse beyond the margin) or undecided."""
    found: list[Row] = []
    for method, bits in dict.fromkeys((row["method"], row["bits"]) for row in sets):
        group = [row for row in sets if (row["method"], row["bits"]) == (method, bits)]
        named = {
            verdict: [f"{row['axis']}/{row['set']}" for row in group if row["verdict"] == verdict]
            for verdict in ("worse", "better", "near", "open")
        }
        unsure = "undecided" if named["near"] or named["open"] else "robust"
        verdict = "sensitive" if named["worse"] else unsure
        found.append({"method": method, "bits": bits, "verdict": verdict, "sets": len(group), **named})
    return found


def conclude(findings: dict[str, Any]) -> list[str]:
    """A few lines for people, from the findings alone."""
    lines: list[str] = []
    ratios = {(row["method"], row["bits"], f"{row['axis']}/{row['set']}"): row["ratio"] for row in findings["sets"]}
    spreads = {(row["method"], row["bits"]): row for row in findings["seeds"]}
    for row in findings["verdicts"]:
        key = (row["method"], row["bits"])
        text = f"{row['method']} {row['bits']} bits: {row['verdict']}"

        def named(names: list[str], key: tuple[str, int] = key) -> str:
            return ", ".join(f"{name} x{ratios[(*key, name)]:.3f}" for name in names)

        if row["worse"]:
            text += f" to {named(row['worse'])}"
        if row["verdict"] == "robust":
            text += f", no set of {row['sets']} is worse by {findings['margin']:.0%} or more"
        if row["better"]:
            text += f"; better with {named(row['better'])}"
        if row["near"] or row["open"]:
            text += f"; undecided: {named(row['near'] + row['open'])}"
        deviation = spreads[key].get("pooled_deviation")
        if deviation is not None:
            text += f"; the seed alone changes perplexity by {math.expm1(deviation):.2%}"
        lines.append(text + ".")
    for row in findings["failed"]:
        lines.append(f"{row['method']} {row['bits']} bits failed on {row['axis']}/{row['set']}: {row['reason']}.")
    kinds = {row["verdict"] for row in findings["verdicts"]}
    worse = [name.partition("/")[0] for row in findings["verdicts"] for name in row["worse"]]
    axes = ", ".join(dict.fromkeys(worse))
    if worse:
        lines.append(f"Verdict: sensitive to {axes}.")
    elif kinds:
        lines.append("Verdict: robust." if kinds == {"robust"} else "Verdict: undecided; use more windows or seeds.")
    return lines
