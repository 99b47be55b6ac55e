"""Self-contained HTML pages, made only from the JSON of a result."""

import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewbit.checkpoints.json_file import drop
from fewbit.checkpoints.workdir import WorkFolder
from fewbit.errors import FewbitError, missing_extra
from fewbit.report import plots
from fewbit.report.tasks import asked_models, measured_tasks, task_cells, task_notes
from fewbit.sizes import show_size
from fewbit.versions import versions


@dataclass(frozen=True)
class Figure:
    """A plot and its caption; a `wide` one takes the full width of the page."""

    svg: str
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A section of a page: text, figures, a table, quotations, and the data behind it as JSON."""

    heading: str
    paragraphs: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    best: int = -1
    quotes: Sequence[dict[str, str]] = ()
    data: str = field(default="")


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Render a page. Raises FewbitError if it cannot be written or jinja2 is not installed."""
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError as error:
        raise missing_extra("jinja2", "report") from error
    environment = Environment(loader=PackageLoader("fewbit", "report"), autoescape=True, trim_blocks=True)
    footer = ", ".join(f"{name} {version}" for name, version in versions().items())
    text = environment.get_template("page.html.j2").render(title=title, lead=lead, sections=sections, footer=footer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        drop(partial)
        # Characters that cannot be encoded, as in some file names, are written as escapes.
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))
        partial.replace(path)
    except OSError as error:
        raise FewbitError(f"{path}: cannot write the page ({error.strerror})") from error


def check_page(path: Path | None, out: Path | None = None, model: Path | None = None) -> None:
    """Raises FewbitError before the work starts if a page could not be written to `path` later; None means no page.

    out: the folder that the run writes; the page may be in it. model: the folder that the run reads; the page must not
    be in it. Creates nothing.
    """
    if path is None:
        return
    for package in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "report")
    if path.is_dir():
        raise FewbitError(f"{path}: is a folder: give the name of an HTML file")
    if path.suffix.lower() not in (".html", ".htm"):
        raise FewbitError(f"{path}: the name of a page must end in .html")
    there = path.resolve()
    if model is not None and model.is_dir() and model.resolve() in there.parents:
        raise FewbitError(f"{path}: is inside the model's own folder {model}: choose another place")
    if out is not None:
        folder = out.resolve()
        if there == folder or there in folder.parents:
            raise FewbitError(f"{path}: the output folder {out} will have this name: choose another name for the page")
        if folder in there.parents and there.parent != folder:
            raise FewbitError(f"{path}: a page in {out} must be directly in that folder: omit {path.parent.name}")
        if WorkFolder.place(out).resolve() in there.parents:
            raise FewbitError(f"{path}: is inside the work folder of {out}: choose another place")
    above = next(parent for parent in there.parents if os.path.lexists(parent))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise FewbitError(
            f"{path}: cannot write there ({'permission denied' if above.is_dir() else f'{above} is a file'})"
        )
    if path.exists() and not os.access(path, os.W_OK):
        raise FewbitError(f"{path}: cannot write there (permission denied)")


def write_quantize_page(report: dict[str, Any], path: Path) -> None:
    """The page of one run of `fewbit quantize`."""
    output = report["output"]
    lead = (
        f"{output['weights_quantized']:,} weights in layers at {output['bits_per_weight']:.3f} bits per weight, "
        f"the whole model at {output['bits_per_weight_all']:.3f}; "
        f"{show_size(report['source']['bytes'])} became {show_size(output['file_bytes'])}."
    )
    rows = [
        [
            r["name"],
            "x".join(map(str, r["shape"])),
            f"{r['bits_per_weight']:.3f}",
            f"{r['relative_squared_error']:.5f}",
        ]
        for r in (*report["layers"], *report["embeddings"])
    ]
    kept = [[k["name"], "x".join(map(str, k["shape"])), k["reason"]] for k in report["kept"]]
    sections = [
        Section("Error by layer", figures=[Figure(plots.layer_errors([report]), "sum (w - q)^2 / sum w^2")]),
        Section("Quantized", columns=["tensor", "shape", "bits", "relative squared error"], rows=rows),
        Section("Kept in 16 bits", columns=["tensor", "shape", "why"], rows=kept),
        Section("Recipe", data=json.dumps(report["recipe"], indent=1)),
    ]
    write_page(path, f"{report['model']}: {report['method']}, {report['recipe']['bits']} bits", lead, sections)


_COLUMNS = (
    "model",
    "method",
    "bits/weight",
    "of all weights",
    "size",
    "perplexity",
    "ratio",
    "KL mean",
    "KL 99 %",
    "same top token",
)


def evaluation_section(result: dict[str, Any], heading: str = "Models") -> Section:
    """The table and figures of an evaluation; the quantized model with the least divergence is highlighted."""
    rows = result["models"]
    quantized = [i for i, row in enumerate(rows) if row["method"] != "original" and "kl_mean" in row]
    best = min(quantized, key=lambda i: rows[i]["kl_mean"], default=-1)
    protocol = result["protocol"]
    figures: list[Figure] = []
    lines: list[str] = []
    if "windows" in protocol:
        figures.append(Figure(plots.bits_against_perplexity(rows), "Down and to the left is better."))
        lines.append(
            f"{protocol['windows']} windows of {protocol['sequence_length']} tokens of {protocol['data']} "
            f"(sha256 {protocol['data_sha256'][:16]}), BOS {protocol['bos']}; loss: {protocol['loss']}."
        )
    if quantized:
        figures.append(Figure(plots.divergence_bars(rows), "How much the predictions changed; lower is better."))
    cells = [_evaluation_row(row) for row in rows]
    used = [i for i in range(len(_COLUMNS)) if any(row[i] for row in cells)]
    return Section(
        heading,
        lines,
        figures,
        [_COLUMNS[i] for i in used],
        [[row[i] for i in used] for row in cells],
        best,
        data=json.dumps(result, indent=1),
    )


def task_section(result: dict[str, Any]) -> Section:
    """Accuracy on tasks, as a plot and a table."""
    columns, rows = task_cells(result)
    figure = Figure(plots.task_accuracies(asked_models(result), measured_tasks(result)), "acc ± one standard error.")
    return Section("Tasks", [f"{task_notes(result)}."], [figure], columns, rows)


def _evaluation_row(row: dict[str, Any]) -> list[str]:
    def cell(key: str, style: str) -> str:
        return format(row[key], style) if key in row else ""

    return [
        row["name"],
        row["method"],
        cell("bits_per_weight", ".2f"),
        cell("bits_per_weight_all", ".2f"),
        show_size(row["bytes"]) if "bytes" in row else "",
        cell("perplexity", ".2f"),
        cell("perplexity_ratio", ".3f"),
        cell("kl_mean", ".4f"),
        cell("kl_p99", ".3f"),
        f"{100 * row['top1_agreement']:.1f} %" if "top1_agreement" in row else "",
    ]


def write_evaluation_page(result: dict[str, Any], path: Path) -> None:
    """The page of `fewbit eval`."""
    reference = result["protocol"]["reference"]
    lead = (
        f"Divergences are measured from {reference}."
        if reference
        else "No reference was given, so divergences were not measured."
    )
    sections = [evaluation_section(result)]
    if measured_tasks(result):
        sections.append(task_section(result))
    write_page(path, "Evaluation", lead, sections)


def write_inspection_page(result: dict[str, Any], path: Path) -> None:
    """The page of `fewbit inspect`."""
    matrices = [row for row in result["tensors"] if len(row["shape"]) >= 2]
    model = result["models"][0]
    keys = [
        ("kurtosis", "kurtosis"),
        ("energy_top_0.01", "energy share of the top 1 %"),
        ("relative_squared_error", "relative squared error"),
        ("kl_divergence_bits", "D_KL(f_W || f_Q), bits"),
        ("jensen_shannon_bits", "Jensen-Shannon divergence, bits"),
    ]
    used = [(key, label) for key, label in keys if any(key in row for row in matrices)]
    figures = [Figure(plots.tensor_values(matrices, key, label), label) for key, label in used]
    columns = ["tensor", "shape", "bits", "entropy, bits", *[label for _, label in used]]
    rows = [
        [
            row["name"],
            "x".join(map(str, row["shape"])),
            f"{row['bits']:.2f}",
            *[f"{row[key]:.4g}" if key in row else "" for key in ("entropy_bits", *[k for k, _ in used])],
        ]
        for row in matrices
    ]
    sections = [
        Section("Matrices in order", figures=figures),
        Section("Every matrix", [f"Estimator: {result['protocol']['estimator']}."], columns=columns, rows=rows),
    ]
    lead = (
        f"{model['bits_per_weight']:.2f} bits per weight in layers, {model['bits_per_weight_all']:.2f} in all weights; "
        f"{show_size(model['bytes'])}. Compared with {result['reference'] or 'nothing'}."
    )
    write_page(path, f"Weights of {model['name']}", lead, sections)
