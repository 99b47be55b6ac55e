"""What the rows of `landscape` say: radii of the basin, curvature, and which quantized weights lie inside."""

from statistics import mean, stdev
from typing import Any

from fewbit.studies.basin import crossing_radius, second_difference, slope
from fewbit.studies.choice import StudyChoice
from fewbit.studies.directions import KINDS
from fewbit.studies.statistics import spearman, spearman_interval
from fewbit.studies.study import Row, Summary

LEVELS = (0.1, 1.0)
"""By how many nats a token the loss rises at the edge of the basin."""

_FEWEST = 5
Point = tuple[float, float]


def summarize(rows: list[Row], choice: StudyChoice) -> Summary:
    """Radii along random directions and rays, curvature, distances of the quantized weights against the radii."""
    usable = [row for row in rows if "loss" in row]
    directions = {kind: _kind([r for r in usable if r["table"] == "direction" and r["kind"] == kind]) for kind in KINDS}
    names = list(dict.fromkeys(row["name"] for row in rows if row["table"] == "ray"))
    rays = [_ray([row for row in usable if row["table"] == "ray" and row["name"] == name]) for name in names]
    edge = {level: directions["filter"]["radius"][f"{level:g}"].get("mean") for level in LEVELS}
    for ray in rays:
        ray["inside"] = {f"{level:g}": _inside(ray, level) for level in LEVELS}
    findings: dict[str, Any] = {
        "loss": next(r["loss"] for r in usable if r["table"] == "direction" and r["distance"] == 0),
        "directions": directions,
        "rays": rays,
        "distance_against_rise": _orders(rays, choice.seed),
    }
    return Summary(findings, _conclusion(findings, edge))


def _kind(rows: list[Row]) -> dict[str, Any]:
    """Mean and spread over the directions of one kind; both senses of a direction count as directions."""
    curves = [[row for row in rows if row["index"] == index] for index in sorted({row["index"] for row in rows})]
    places = sorted({row["distance"] for row in rows})
    radii: dict[str, list[float]] = {f"{level:g}": [] for level in LEVELS}
    bends = []
    for curve in curves:
        start = next(row["loss"] for row in curve if row["distance"] == 0)
        points = sorted((row["distance"], row["loss"]) for row in curve)
        bends.append(_bend(points, 0.0))
        for sign in (1, -1):
            side = sorted((sign * r, value - start) for r, value in points if sign * r >= 0)
            for level in LEVELS:
                radius = crossing_radius([p[0] for p in side], [p[1] for p in side], level)
                if radius is not None:
                    radii[f"{level:g}"].append(radius)
    return {
        "directions": len(curves),
        "radius": {level: {"of": 2 * len(curves), **_spread(found)} for level, found in radii.items()},
        "curvature": _spread(bends),
        "curve": [{"distance": p, **_spread([r["loss"] for r in rows if r["distance"] == p])} for p in places],
    }


def _spread(values: list[float]) -> dict[str, Any]:
    """Count, and where there are any mean and standard deviation."""
    if not values:
        return {"n": 0}
    return {"n": len(values), "mean": mean(values), "sd": stdev(values) if len(values) > 1 else 0.0}


def _bend(points: list[Point], place: float) -> float:
    """Second difference at a sampled place, in nats over squared relative distance."""
    index = next(i for i, point in enumerate(points) if point[0] == place)
    return second_difference(points[index - 1], points[index], points[index + 1])


def _ray(rows: list[Row]) -> dict[str, Any]:
    """One ray: its length, the loss at its end, radii, and how it bends at the original and at the end."""
    first = rows[0]
    found: dict[str, Any] = {key: first[key] for key in ("name", "method", "bits", "length")}
    points = sorted((row["distance"], row["loss"]) for row in rows)
    by_t = {row["t"]: row for row in rows}
    if 0.0 not in by_t or not found["length"]:
        return found
    start = by_t[0.0]["loss"]
    ahead = [(r, value - start) for r, value in points if r >= 0]
    found["radius"] = {}
    for level in LEVELS:
        radius = crossing_radius([p[0] for p in ahead], [p[1] for p in ahead], level)
        if radius is not None:
            found["radius"][f"{level:g}"] = radius
    found["reached"] = points[-1][0]
    found["curvature"] = _bend(points, 0.0)
    if 1.0 in by_t:
        end = by_t[1.0]["distance"]
        place = next(i for i, point in enumerate(points) if point[0] == end)
        found["rise"] = by_t[1.0]["loss"] - start
        found["highest_between"] = max(value for r, value in ahead if r <= end)
        if place + 1 < len(points):
            around = (points[place - 1], points[place], points[place + 1])
            found["curvature_at_end"] = second_difference(*around)
            found["slope_at_end"] = slope(*around)
    return found


def _inside(ray: dict[str, Any], level: float) -> bool | None:
    """Whether the quantized weights lie before their ray has risen by `level`; None where that is not known."""
    if "rise" not in ray:
        return None
    radius = ray["radius"].get(f"{level:g}")
    return radius is None or ray["length"] < radius


def _orders(rays: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Spearman's correlation of distance and rise, for all rays and on each side of the wider edge."""
    level = f"{LEVELS[-1]:g}"
    known = [ray for ray in rays if "rise" in ray]
    groups = {
        "all": known,
        "inside": [ray for ray in known if ray["inside"][level]],
        "outside": [ray for ray in known if not ray["inside"][level]],
    }
    found = []
    for name, members in groups.items():
        row: dict[str, Any] = {"group": name, "n": len(members)}
        if len(members) >= _FEWEST:
            x, y = [ray["length"] for ray in members], [ray["rise"] for ray in members]
            low, high = spearman_interval(x, y, seed)
            row.update(rho=spearman(x, y), low=low, high=high)
        found.append(row)
    return found


def _conclusion(findings: dict[str, Any], edge: dict[float, float | None]) -> list[str]:
    lines = [f"The original's loss is {findings['loss']:.3f} nats per token."]
    for kind in KINDS:
        radius = findings["directions"][kind]["radius"]
        parts = [
            f"{level:g} nats at {radius[f'{level:g}']['mean']:.3f} ± {radius[f'{level:g}']['sd']:.3f}"
            for level in LEVELS
            if radius[f"{level:g}"]["n"]
        ]
        what = "filter-normalised" if kind == "filter" else kind
        bend = findings["directions"][kind]["curvature"]
        lines.append(
            f"Random {what} directions: risen by {', '.join(parts) or 'less than 0.1 nats'} (relative distance); "
            f"curvature {bend.get('mean', 0.0):.1f}."
        )
    for ray in findings["rays"]:
        if "rise" not in ray:
            lines.append(f"{ray['name']}: at {ray['length']:.3f}; its loss is NaN or infinite.")
            continue
        where = [
            f"{'inside' if ray['inside'][f'{level:g}'] else 'outside'} the {level:g}-nat basin of its ray"
            for level in LEVELS
        ]
        wide = edge[LEVELS[-1]]
        random = f", random radius {wide:.3f}" if wide is not None else ""
        lines.append(f"{ray['name']}: at {ray['length']:.3f}, loss {ray['rise']:+.3f}, {'; '.join(where)}{random}.")
    for row in findings["distance_against_rise"]:
        if "rho" in row:
            lines.append(
                f"Distance against rise, {row['group']} (n={row['n']}): rho {row['rho']:.2f} "
                f"({row['low']:.2f} to {row['high']:.2f})."
            )
    return lines
