"""The study `objectives`: does a lower local error mean a lower loss? (arXiv 2410.14570)

For every quantized model: local errors of its layers on the evaluation text, the loss increase that the output Fisher
predicts, and the true one with the KL from the original, on the same text.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fewbit.architecture.network import Site
from fewbit.calibration.choice import CalibrationChoice
from fewbit.calibration.tokens import CalibrationSet
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import Checkpoint, open_checkpoint
from fewbit.curvature.store import StoredCurvature, open_curvature
from fewbit.errors import FewbitError
from fewbit.evaluation.score import Original, score
from fewbit.evaluation.text import read_text
from fewbit.evaluation.windows import read_windows
from fewbit.formats.config import describe, recipe_of
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.measure_curvature import measure_tokens
from fewbit.pipeline.network import Network, open_original
from fewbit.runtime.load import load_decoder
from fewbit.runtime.unpack import unpack_modules
from fewbit.studies.choice import StudyChoice
from fewbit.studies.layer_errors import Fisher, output_error, predicted_increase, weight_error
from fewbit.studies.network import QuantizedFolder, check_folders, open_quantized
from fewbit.studies.objectives_page import draw
from fewbit.studies.objectives_summary import summarize
from fewbit.studies.study import Cell, Progress, Row, Size, Study, Tell
from fewbit.studies.variants import (
    FISHER,
    GRAM,
    Variant,
    curvature_folder,
    drop_variant,
    is_measured,
    make_variant,
    measure_once,
    variants,
)

_QUICK = {"methods": ("rtn", "adpq", "adpq+", "gptq", "precal+oac"), "bits": (4, 3, 2), "group_sizes": (None,)}
_STANDARD = {
    "methods": (
        *("rtn", "adpq", "adpq+", "gptq", "spqr", "oac", "precal+gptq", "precal+oac", "oac+spqr"),
        *("billm", "oac+billm"),
    ),
    "bits": (6, 4, 3, 2),
    "group_sizes": (None, "32,auto"),
}
_LARGE = {**_STANDARD, "bits": (8, 6, 5, 4, 3, 2), "group_sizes": (None, "32,auto", "row")}
_HELD_OUT = "held-out"


@dataclass
class Opened:
    """What cells share; the original's logits come when the first cell asks for them."""

    choice: StudyChoice
    checkpoint: Checkpoint
    network: Network
    windows: Tensor
    curvatures: dict[str, StoredCurvature]
    original: Original | None = field(default=None)


def cells(choice: StudyChoice) -> list[Cell]:
    """The original, then every variant, then the folders that were named."""
    found: list[Cell] = [{"original": choice.model}]
    found += [variant.cell() for variant in _variants(choice)]
    check_folders(choice.folders, choice.model)
    found += [{"folder": folder} for folder in choice.folders]
    return found


def _variants(choice: StudyChoice) -> list[Variant]:
    grid = STUDY.sizes[choice.size].grid
    return variants(choice.methods or grid["methods"], choice.bits or grid["bits"], grid["group_sizes"])


def prepare(choice: StudyChoice, progress: Progress | None) -> None:
    """Curvature of the calibration set for the methods, and of the evaluation text for the measures."""
    measure_once(choice, _variants(choice), progress, also=(FISHER,))
    checkpoint = open_checkpoint(locate(choice.model))
    windows = _windows(choice)
    described = CalibrationChoice("none", windows.shape[0], windows.shape[1], choice.seed)
    for curvature in (GRAM, FISHER):
        out = choice.work / f"{_HELD_OUT}-{curvature.kind}"
        if is_measured(out, choice):
            continue
        _, network = open_original(choice.model, choice.device, walking=not curvature.source.gradients)
        tokens, options = CalibrationSet(windows, described), CalibrationOptions()
        measure_tokens(network, checkpoint, tokens, out, curvature, options, progress)


def _windows(choice: StudyChoice) -> Tensor:
    return read_windows(locate(choice.model), read_text(choice.data), choice.protocol)[0]


def open_cells(choice: StudyChoice) -> Opened:
    """The network for its sites, the windows, and the measured curvatures."""
    checkpoint, network = open_original(choice.model, "cpu", walking=True)
    folders = {
        "gram": choice.work / f"{_HELD_OUT}-gram",
        "fisher": choice.work / f"{_HELD_OUT}-fisher",
        "fisher-calibration": curvature_folder(choice, FISHER),
    }
    stored = {name: open_curvature(folder, checkpoint) for name, folder in folders.items()}
    return Opened(choice, checkpoint, network, _windows(choice), stored)


def run_cell(cell: Cell, opened: Opened, tell: Tell) -> list[Row]:
    """Rows of the tables `model` (one) and `layer`."""
    choice = opened.choice
    if opened.original is None:
        opened.original = Original(choice.model, opened.windows, choice.device)
    if "original" in cell:
        return [_score(choice.model, opened, {"table": "model", "name": "original"})]
    if "folder" in cell:
        folder = Path(cell["folder"])
        name, group_size, fallbacks = folder.resolve().name, None, None
    else:
        variant = Variant(**cell)
        tell(0.0, f"quantizing {variant.name}")
        folder, report = make_variant(variant, choice)
        name, group_size = variant.name, cell["group_size"]
        fallbacks = sum(str(layer.get("path", "")).startswith("fallback") for layer in report["layers"])
    quantized = open_quantized(folder, opened.checkpoint, _sites(opened.network))
    common = {"name": name, "method": describe(quantized.checkpoint)["method"], "bits": _bits(quantized)}
    tell(0.3, f"layers of {name}")
    layers = [] if quantized.changed else _layers(opened, quantized)
    tell(0.6, f"loss of {name}")
    row: Row = {"table": "model", **common, "group_size": group_size}
    if fallbacks is not None:
        row["fallbacks"] = fallbacks
    row.update(_over_layers(layers))
    row = _score(str(folder), opened, row)
    if "folder" not in cell:
        drop_variant(Variant(**cell), choice)
    shown = [{k: v for k, v in layer.items() if not k.startswith("_")} for layer in layers]
    return [row, *({"table": "layer", **common, **layer} for layer in shown)]


def _sites(network: Network) -> list[Site]:
    return [site for block in network.sites for site in block]


def _bits(quantized: QuantizedFolder) -> int:
    recipe = recipe_of(quantized.checkpoint)
    return int(recipe.get("bits") or next(iter(quantized.weights.values())).scheme.bits)


@torch.inference_mode()
def _layers(opened: Opened, quantized: QuantizedFolder) -> list[Row]:
    """A row for every layer; sums of squares stand under keys with an underscore."""
    rows = []
    for index, sites in enumerate(opened.network.sites):
        found = {name: stored.block(index) for name, stored in opened.curvatures.items()}
        for site, weight in quantized.read(sites):
            original = site.read().float()
            key = site.watched.key
            squared, whole = weight_error(original, weight)
            row: Row = {"layer": key, "block": index, "weight_error": squared / whole if whole else 0.0}
            row.update(_squared=squared, _whole=whole)
            if key in found["gram"]:
                row["output_error"] = output_error(original, weight, found["gram"][key])
            for name, column in (("fisher", "predicted"), ("fisher-calibration", "predicted_calibration")):
                if key in found[name]:
                    tokens = _scored_tokens(opened.curvatures[name])
                    row[column] = predicted_increase(original, weight, Fisher(found[name][key], tokens))
            rows.append(row)
    return rows


def _scored_tokens(stored: StoredCurvature) -> int:
    """Tokens whose losses a Fisher sums over: all but the first of every sequence."""
    length = int(stored.description["sequence_length"])
    return int(stored.description["tokens"]) // length * (length - 1)


def _over_layers(layers: list[Row]) -> Row:
    """The measures of a whole model: means over layers of local errors, sums of predicted increases."""
    if not layers:
        return {}
    errors = [layer["output_error"] for layer in layers if "output_error" in layer]
    return {
        "weight_distance": math.sqrt(sum(r["_squared"] for r in layers) / sum(r["_whole"] for r in layers)),
        "weight_error": sum(r["weight_error"] for r in layers) / len(layers),
        "output_error": sum(errors) / len(errors),
        "output_error_worst": max(errors),
        "predicted": sum(r.get("predicted", 0.0) for r in layers),
        "predicted_calibration": sum(r.get("predicted_calibration", 0.0) for r in layers),
    }


def _score(model: str, opened: Opened, row: Row) -> Row:
    """The row with what was measured on the evaluation text; a loss that is no number is said, not made up."""
    described = describe(open_checkpoint(locate(model)))
    row = {**row, "method": described["method"], "bits_per_weight": described.get("bits_per_weight")}
    loaded = unpack_modules(load_decoder(model, device=opened.choice.device))
    try:
        found = score(loaded, opened.windows, opened.original, row["name"])
    except FewbitError as error:
        return {**row, "failed": str(error)}
    return {**row, **found, "loss_increase": math.log(found["perplexity_ratio"])}


STUDY = Study(
    name="objectives",
    title="Local errors against the loss",
    about="Does a lower layer-wise error mean a lower loss? Each point is a quantized model.",
    sizes={
        "quick": Size(4, 512, 16, 256, _QUICK),
        "standard": Size(24, 1024, 128, 512, _STANDARD),
        "large": Size(96, 1024, 256, 512, _LARGE),
    },
    cells=cells,
    run_cell=run_cell,
    summarize=summarize,
    draw=draw,
    open=open_cells,
    prepare=prepare,
)
