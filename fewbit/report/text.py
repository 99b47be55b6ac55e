"""Results as tables for the terminal, and as the stable keys of `--json`."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fewbit.checkpoints.named import NAMED_MODELS, named_folder
from fewbit.printable import markup_free, printable
from fewbit.report.tasks import measured_tasks, task_cells, task_notes
from fewbit.sizes import show_size
from fewbit.versions import versions


def quantize_json(report: dict[str, Any]) -> dict[str, Any]:
    """The report of a run under the stable keys, together with the complete report."""
    row = {
        "name": report["model"],
        "method": report["method"],
        "bits_per_weight": report["output"]["bits_per_weight"],
        "bits_per_weight_all": report["output"]["bits_per_weight_all"],
        "bytes": _file_bytes(report),
        "seconds": report["run"]["seconds"],
        "peak_rss_bytes": report["run"]["peak_rss_bytes"],
    }
    return {"models": [row], "protocol": None, "versions": versions(), "report": report}


def _file_bytes(report: dict[str, Any]) -> int:
    """The bytes of the weight files that a run leaves: those of an exported format, or of the native folder."""
    return int(report["export"]["bytes"] if "export" in report else report["output"]["file_bytes"])


def quantize_summary(report: dict[str, Any], out: Path | None) -> str:
    """A summary of a few lines."""
    output, run = report["output"], report["run"]
    errors = sorted(report["layers"], key=lambda layer: -layer["relative_squared_error"])
    worst = errors[0]
    lines = [
        f"{report['method']}: {output['weights_quantized']:,} weights in {len(errors)} layers at "
        f"{output['bits_per_weight']:.2f} bits per weight on disk{_of_tables(report)}; "
        f"{len(report['kept'])} tensors kept",
        f"whole model: {output['bits_per_weight_all']:.2f} bits per weight; "
        f"{show_size(report['source']['bytes'])} -> {show_size(_file_bytes(report))} in {run['seconds']:.1f} s, "
        f"peak memory {show_size(run['peak_rss_bytes'])}",
        f"largest relative squared error {worst['relative_squared_error']:.4f} in {worst['name']}",
    ]
    paths = Counter(layer["path"] for layer in report["layers"] if "path" in layer)
    if paths:
        lines.append("weights: " + ", ".join(f"{count} {path}" for path, count in paths.most_common()))
    lines += [f"{table['name']}: {table['path']}" for table in report["embeddings"] if "path" in table]
    if "export" in report and out is not None:
        return "\n".join([*map(printable, lines), export_summary(report["export"], out)])
    lines.append(f"wrote {out}" if out is not None else "nothing written (--report-only)")
    if out is not None:
        lines.append(f"measure it:  fewbit eval {out} --data FILE --reference {report['model']}")
    return "\n".join(map(printable, lines))


def export_summary(report: dict[str, Any], dest: Path) -> str:
    """A summary of a few lines."""
    types = ", ".join(f"{count} {name}" for name, count in sorted(report["tensors"].items(), key=lambda one: -one[1]))
    lines = [f"wrote {dest / report['file']}: {show_size(report['bytes'])}; tensors: {types}"]
    lines += [f"{name}: relative squared error {error:.2g}" for name, error in report["rounded"].items()]
    lines += report.get("notes", ())
    return "\n".join(map(printable, lines))


def import_summary(report: dict[str, Any], out: Path) -> str:
    """A summary of a few lines."""
    output, kept = report["output"], len(report["kept"])
    facts = ", ".join(f"{count} {name}" for name, count in report["recipe"]["imported"].get("types", {}).items())
    lines = [
        f"wrote {out}: {show_size(output['file_bytes'])} of weights, from {show_size(report['source']['bytes'])}",
        f"{len(report['layers'])} layers at {output['bits_per_weight']:.2f} bits per weight{_of_tables(report)}, "
        f"{kept} tensors that are not quantized" + (f" ({facts})" if facts else ""),
    ]
    return "\n".join(map(printable, lines))


def _of_tables(report: dict[str, Any]) -> str:
    """Quantized embeddings and heads, in words."""
    tables = report["embeddings"]
    if not tables:
        return ""
    what = "embedding or head" if len(tables) == 1 else "embeddings and heads"
    bits = 8 * sum(table["bytes"] for table in tables) / sum(table["weights"] for table in tables)
    return f", {len(tables)} {what} at {bits:.2f}"


def tuning_summary(report: dict[str, Any], out: Path) -> str:
    """A summary of a few lines."""
    history, run = report["tuning"]["history"], report["run"]
    held, best = history["held_out"], history["best_epoch"]
    lines = [
        f"{report['method']}: {len(history['losses'])} updates in {run['seconds']:.0f} s, peak memory "
        f"{show_size(run['peak_rss_bytes'])}, {report['output']['bits_per_weight']:.2f} bits per weight and "
        f"{show_size(report['output']['file_bytes'])} as before"
    ]
    if report["tuning"]["choice"]["held_out"]:
        shown = " -> ".join(f"{loss:.3f}" for loss in held)
        lines.append(f"held-out {report['tuning']['choice']['loss']} by epoch: {shown} (kept: after epoch {best})")
    if best == 0:
        lines.append("no epoch improved on the initial weights, so these were kept: lower --lr or use more text")
    lines.append(f"wrote {out}")
    lines.append(f"measure it:  fewbit eval {out} --data FILE --reference {report['model']}")
    return "\n".join(map(printable, lines))


def evaluation_table(result: dict[str, Any]) -> None:
    """Print the models of an evaluation."""
    table = Table()
    columns: list[tuple[str, str, Callable[[Any], str]]] = [
        ("model", "name", _short),
        ("method", "method", str),
        ("bits/weight", "bits_per_weight", lambda v: f"{v:.2f}"),
        ("of all", "bits_per_weight_all", lambda v: f"{v:.2f}"),
        ("size", "bytes", show_size),
        ("perplexity", "perplexity", _figure),
        ("ratio", "perplexity_ratio", lambda v: f"{v:.3f}"),
        ("KL mean", "kl_mean", lambda v: f"{v:.4f}"),
        ("KL 99 %", "kl_p99", lambda v: f"{v:.3f}"),
        ("same top", "top1_agreement", lambda v: f"{100 * v:.1f} %"),
        ("seconds", "seconds", lambda v: f"{v:.0f}"),
    ]
    used = [c for c in columns if any(c[1] in row for row in result["models"])]
    for title, _, _ in used:
        table.add_column(title, justify="left" if title in ("model", "method") else "right")
    for row in result["models"]:
        table.add_row(*(markup_free(show(row[key])) if key in row else "" for _, key, show in used))
    console = _console()
    console.print(table)
    protocol = result["protocol"]
    if "windows" in protocol:
        console.print(
            f"{protocol['windows']} windows of {protocol['sequence_length']} tokens of {markup_free(protocol['data'])} "
            f"(sha256 {protocol['data_sha256'][:12]}), BOS {protocol['bos']}, {protocol['loss']}",
            highlight=False,
        )
    if measured_tasks(result):
        _task_table(result, console)


def _task_table(result: dict[str, Any], console: Console) -> None:
    columns, rows = task_cells(result)
    table = Table()
    for title in columns:
        table.add_column(title, justify="left" if title in ("model", "metric") else "right")
    for name, *cells in rows:
        table.add_row(*map(markup_free, (_short(name), *cells)))
    console.print(table)
    console.print(markup_free(task_notes(result)), highlight=False)


def inspection_table(result: dict[str, Any]) -> None:
    """Print the tensors of an inspection."""
    table = Table()
    compared = any("kl_divergence_bits" in row for row in result["tensors"])
    columns: list[tuple[str, str, Callable[[Any], str]]] = [
        ("tensor", "name", str),
        ("shape", "shape", lambda v: "x".join(map(str, v))),
        ("what", "action", str),
        ("bits", "bits", lambda v: f"{v:.2f}"),
        ("kurtosis", "kurtosis", lambda v: f"{v:.1f}"),
        ("top 0.1 %", "energy_top_0.001", _percent),
        ("top 1 %", "energy_top_0.01", _percent),
        ("top 5 %", "energy_top_0.05", _percent),
        ("entropy", "entropy_bits", lambda v: f"{v:.2f}"),
    ]
    if compared:
        columns += [
            ("rel. sq. error", "relative_squared_error", lambda v: f"{v:.5f}"),
            ("D_KL", "kl_divergence_bits", lambda v: f"{v:.3f}"),
            ("JS", "jensen_shannon_bits", lambda v: f"{v:.4f}"),
        ]
    for title, _, _ in columns:
        wide = title == "tensor"
        table.add_column(
            title,
            justify="left" if title in ("tensor", "what") else "right",
            no_wrap=not wide,
            overflow="fold",
        )
    for row in result["tensors"]:
        if len(row["shape"]) >= 2:
            table.add_row(*(markup_free(show(row[key])) if key in row else "" for _, key, show in columns))
    console = _console()
    console.print(table)
    if result["models"][0]["method"] != "original" and result["reference"] is None:
        console.print("Its original was not found, so nothing is compared: give it with --reference", highlight=False)
    elif result["models"][0]["method"] != "original" and not compared:
        console.print(
            "Its channels were scaled before they were rounded, so no weight is compared with the original's: compare "
            "what they do with  fewbit eval --reference",
            highlight=False,
        )
    vectors = sum(len(row["shape"]) < 2 for row in result["tensors"])
    model = result["models"][0]
    console.print(
        f"{model['bits_per_weight']:.2f} bits per weight in the linear layers, {model['bits_per_weight_all']:.2f} in "
        f"all weights; {show_size(model['bytes'])}",
        highlight=False,
    )
    console.print(
        f"{vectors} vectors not shown (--json has them). Estimator: {result['protocol']['estimator']}", highlight=False
    )


def models_json() -> dict[str, Any]:
    """Named models and whether they are cached."""
    rows = [
        {
            "name": model.name,
            "cached": named_folder(model).is_dir(),
            "folder": str(named_folder(model)),
            "download_bytes": model.download_bytes,
            "licence": model.licence,
            "description": model.description,
        }
        for model in NAMED_MODELS.values()
    ]
    return {"models": rows, "versions": versions()}


def models_table() -> None:
    """Print the named models."""
    table = Table()
    for title in ("name", "download", "licence", "cached", "what"):
        table.add_column(title)
    for row in models_json()["models"]:
        cached = row["folder"] if row["cached"] else "no"
        cells = (row["name"], show_size(row["download_bytes"]), row["licence"], cached, row["description"])
        table.add_row(*map(markup_free, cells))
    _console().print(table)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _figure(value: float) -> str:
    if not math.isfinite(value):
        return "inf"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _short(name: str) -> str:
    return name if len(name) <= 40 else "…" + name[-39:]


def plan_text(result: dict[str, Any]) -> str:
    """A summary of what a run would do, in a few lines."""
    layers, kept = result["tensors"]["quantize"], result["tensors"]["keep"]
    tables = result["tensors"]["embeddings"]
    output, needs = result["output"], result["needs"]
    kinds: dict[tuple[str, tuple[int, ...], int, float], int] = {}
    for layer in (*layers, *tables):
        short = ".".join(part for part in layer["name"].removesuffix(".weight").split(".") if not part.isdigit())
        key = (short, tuple(layer["shape"]), layer["group_size"], round(layer["bits_per_weight"], 3))
        kinds[key] = kinds.get(key, 0) + 1
    apart = f", {len(tables)} embeddings or heads" if tables else ""
    lines = [
        f"{result['method']}, {result['bits']} bits: {len(layers)} weights quantized{apart}, {len(kept)} tensors kept"
    ]
    for (name, shape, size, bits), count in kinds.items():
        lines.append(f"  {count:4d} x {name}  {' x '.join(map(str, shape))}  groups of {size}  {bits:.3f} bits")
    reasons: dict[str, int] = {}
    for tensor in kept:
        reasons[tensor["reason"]] = reasons.get(tensor["reason"], 0) + 1
    lines += [f"  {count:4d} x kept: {reason}" for reason, count in reasons.items()]
    lines.append(
        f"{output['bits_per_weight']:.3f} bits a weight in the layers, {output['bits_per_weight_all']:.3f} in the "
        f"whole model; {show_size(output['source_bytes'])} become {show_size(output['bytes'])}"
    )
    lines.append(
        f"takes about {needs['seconds']:.0f} s, {show_size(needs['memory_bytes'])} of memory and "
        f"{show_size(needs['disk_bytes'])} of disk"
    )
    lines += [f"problem: {problem}" for problem in result["problems"]]
    lines += result["advice"]
    held = [name for name, reason in result["exports"].items() if reason is None]
    lines.append(f"can be written as: {', '.join(held)}")
    return "\n".join(map(printable, lines))
