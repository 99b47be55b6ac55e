"""The page of `landscape`: curves along directions and rays, radii against distances, the slice."""

from typing import Any

from fewbit.report.canvas import new_panels, to_svg
from fewbit.report.html import Figure, Section
from fewbit.studies.directions import KINDS
from fewbit.studies.landscape_summary import LEVELS
from fewbit.studies.palette import method_colours
from fewbit.studies.study import Result, Row

_KIND_COLOURS = {"filter": "#0b6e99", "plain": "#c8553d"}
_KIND_NAMES = {"filter": "filter-normalised", "plain": "plain"}


def draw(result: Result) -> list[Section]:
    """Sections from `study.json` alone."""
    rows, findings = result["rows"], result["findings"]
    usable = [row for row in rows if "loss" in row]
    plane = [row for row in usable if row["table"] == "plane"]
    points = [row for row in usable if row["table"] == "point"]
    sections = [
        Section(
            "Random directions",
            figures=[Figure(_directions(findings), "Loss, mean and standard deviation over directions.", wide=True)],
            columns=["directions", "number", "risen by", "radius", "sd", "reached by", "curvature at 0", "sd"],
            rows=[row for kind in KINDS for row in _radius_rows(kind, findings["directions"][kind])],
        ),
        Section(
            "Rays to the quantized weights",
            ["t = 0 is the original, t = 1 the quantized weights. Curvature and slope are in nats over distance."],
            [
                Figure(_rays([row for row in usable if row["table"] == "ray"]), "Loss along each ray.", wide=True),
                Figure(
                    _distances(findings),
                    "Distance of each method, and the radii of its ray and of random directions.",
                    wide=True,
                ),
            ],
            [
                "weights",
                "distance",
                *[f"radius, {v:g} nats" for v in LEVELS],
                "rise",
                *_RAY_TITLES,
                "inside 0.1",
                "inside 1",
            ],
            [_ray_row(ray) for ray in findings["rays"]],
        ),
    ]
    if plane and points:
        names = " and ".join(point["name"] for point in points[1:])
        sections.append(
            Section(
                "A slice",
                figures=[Figure(_slice(plane, points), f"The plane through the original, {names}.", wide=True)],
            )
        )
    return sections


def _directions(findings: dict[str, Any]) -> str:
    figure, grid = new_panels(1, 1, (9.5, 3.6))
    axes = grid[0][0]
    for kind in KINDS:
        curve = [point for point in findings["directions"][kind]["curve"] if point["n"]]
        x = [point["distance"] for point in curve]
        middle, spread = [point["mean"] for point in curve], [point["sd"] for point in curve]
        axes.plot(x, middle, ".-", color=_KIND_COLOURS[kind], label=_KIND_NAMES[kind])
        low = [m - s for m, s in zip(middle, spread, strict=True)]
        high = [m + s for m, s in zip(middle, spread, strict=True)]
        axes.fill_between(x, low, high, color=_KIND_COLOURS[kind], alpha=0.2)
    for level in LEVELS:
        axes.axhline(findings["loss"] + level, color="#5b6478", linewidth=0.8, linestyle=":")
    axes.set_xlabel("relative distance")
    axes.set_ylabel("loss, nats per token")
    axes.legend(fontsize=8, frameon=False)
    return to_svg(figure)


def _rays(rows: list[Row]) -> str:
    figure, grid = new_panels(1, 2, (11, 4.0))
    names = list(dict.fromkeys(row["name"] for row in rows))
    colours = method_colours(row["method"] for row in rows)
    styles = dict(zip(_widths(rows), ("-", "--", ":", "-."), strict=False))
    for name in names:
        mine = sorted((row for row in rows if row["name"] == name), key=lambda row: row["t"])
        look = {"color": colours[mine[0]["method"]], "linestyle": styles.get(mine[0]["bits"], "-"), "linewidth": 1.2}
        for axes, key in zip(grid[0], ("t", "distance"), strict=True):
            axes.plot([row[key] for row in mine], [row["loss"] for row in mine], label=name, **look)
        end = next((row for row in mine if row["t"] == 1.0), None)
        if end:
            grid[0][1].plot(end["distance"], end["loss"], "o", color=look["color"], markersize=5)
    grid[0][0].set_xlabel("t")
    grid[0][1].set_xlabel("relative distance; the dot is the quantized model")
    grid[0][0].set_ylabel("loss, nats per token")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside right upper", frameon=False)
    return to_svg(figure)


def _widths(rows: list[Row]) -> list[Any]:
    return sorted({row["bits"] for row in rows}, key=lambda bits: -(bits or 0))


def _distances(findings: dict[str, Any]) -> str:
    rays = findings["rays"]
    figure, grid = new_panels(1, 1, (9.5, 1.6 + 0.28 * len(rays)))
    axes = grid[0][0]
    places = range(len(rays))
    axes.plot([ray["length"] for ray in rays], places, "o", color="#1d2330", label="quantized weights", markersize=6)
    for level, marker in zip(LEVELS, ("|", "d"), strict=True):
        key = f"{level:g}"
        known = [(ray["radius"][key], i) for i, ray in enumerate(rays) if key in ray.get("radius", {})]
        axes.plot([k[0] for k in known], [k[1] for k in known], marker, color="#c8553d", markersize=8,
                  linestyle="none", label=f"its ray has risen by {key}")  # fmt: skip
        radius = findings["directions"]["filter"]["radius"][key]
        if radius["n"]:
            axes.axvline(radius["mean"], color="#0b6e99", linestyle=":" if level < 1 else "--", linewidth=1,
                         label=f"random directions have risen by {key}")  # fmt: skip
    axes.set_yticks(list(places), [ray["name"] for ray in rays], fontsize=8)
    axes.set_xlabel("relative distance")
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    figure.legend(fontsize=8, loc="outside upper center", ncols=3, frameon=False)
    return to_svg(figure)


def _slice(plane: list[Row], points: list[Row]) -> str:
    import numpy as np

    xs, ys = sorted({row["x"] for row in plane}), sorted({row["y"] for row in plane})
    values = np.full((len(ys), len(xs)), np.nan)
    for row in plane:
        values[ys.index(row["y"]), xs.index(row["x"])] = row["loss"]
    start = next(point["loss"] for point in points if point["name"] == "original")
    figure, grid = new_panels(1, 1, (9.0, 5.4))
    axes = grid[0][0]
    axes.grid(visible=False)
    # Levels by rise: fine near the original, coarse far away, where the loss only says that all is lost.
    levels = [-1.0, 0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0]
    shown = np.ma.masked_invalid(np.clip(values - start, levels[0], levels[-1]))
    filled = axes.contourf(xs, ys, shown, levels=levels, cmap="viridis_r", norm=_by_level(levels))
    if np.nanmin(values - start) < LEVELS[-1] and np.nanmax(values - start) > LEVELS[0]:
        edges = axes.contour(xs, ys, shown, levels=list(LEVELS), colors="#ffffff", linewidths=1)
        axes.clabel(edges, fmt=lambda level: f"+{level:g}", fontsize=8)
    for point in points:
        axes.plot(point["x"], point["y"], "o", color="#c8553d", markeredgecolor="#ffffff", markersize=8)
        axes.annotate(f"{point['name']}\n{point['loss']:.2f}", (point["x"], point["y"]), xytext=(8, 6),
                      textcoords="offset points", fontsize=8, color="#1d2330",
                      bbox={"facecolor": "#ffffff", "alpha": 0.8, "edgecolor": "none"})  # fmt: skip
    axes.set_xlabel("relative distance")
    axes.set_ylabel("relative distance")
    axes.set_aspect("equal", adjustable="box")
    figure.colorbar(filled, ax=axes, label="increase of the loss, nats per token", ticks=levels)
    return to_svg(figure)


def _by_level(levels: list[float]) -> Any:
    from matplotlib.colors import BoundaryNorm

    return BoundaryNorm(levels, 256)


_RAY_TITLES = ("highest between", "curvature at 0", "curvature at 1", "slope at 1")
_RAY_KEYS = ("highest_between", "curvature", "curvature_at_end", "slope_at_end")


def _radius_rows(kind: str, found: dict[str, Any]) -> list[list[str]]:
    rows = []
    bend = found["curvature"]
    for level in LEVELS:
        radius = found["radius"][f"{level:g}"]
        values = [f"{radius['mean']:.4f}", f"{radius['sd']:.4f}"] if radius["n"] else ["beyond", ""]
        reached = f"{radius['n']} of {radius['of']}"
        bends = [f"{bend['mean']:.2f}", f"{bend['sd']:.2f}"]
        rows.append([_KIND_NAMES[kind], str(found["directions"]), f"{level:g} nats", *values, reached, *bends])
    return rows


def _ray_row(ray: dict[str, Any]) -> list[str]:
    known = ray.get("radius")
    radii = ["" if known is None else f"{known[k]:.4f}" if k in known else "beyond" for k in (f"{v:g}" for v in LEVELS)]
    cells = [f"{ray[key]:.4g}" if key in ray else "" for key in ("rise", *_RAY_KEYS)]
    inside = [{True: "yes", False: "no", None: ""}[ray["inside"][f"{level:g}"]] for level in LEVELS]
    return [ray["name"], f"{ray['length']:.4f}", *radii, *cells, *inside]
