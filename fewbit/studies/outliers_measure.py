"""The cells of the study `outliers`: statistics of a set, errors of some blocks, the whole model rounded."""

import math
from typing import Any

import torch
from torch import Tensor

from fewbit.activations.channels import outlier_channels, top_share, weights_met
from fewbit.activations.choice import GRANULARITIES, RANGES, ActivationChoice
from fewbit.activations.massive import HiddenStates
from fewbit.activations.record import Recorder, following_states, record
from fewbit.activations.site_record import Captured, SiteRecord
from fewbit.activations.statistics import InputStatistics
from fewbit.evaluation.score import window_losses
from fewbit.memory import available_bytes
from fewbit.outliers.adaptive_lasso import outlier_count, split, threshold
from fewbit.pipeline.input_sites import InputSite, input_sites, watched_layers
from fewbit.pipeline.layer_fixes import apply_fix, fixed_error, w8a8_error
from fewbit.pipeline.w8a8 import rounding_inputs
from fewbit.pipeline.walk import Walk
from fewbit.studies.opened import Opened
from fewbit.studies.sets import DEFAULT, NamedSet
from fewbit.studies.statistics import spearman
from fewbit.studies.study import Cell, Row, Tell

TOP_FRACTION = 0.01
PROFILE_BINS = 96
LASSO_FRACTION = 0.05
SITES = ("attention in", "attention out", "mlp in", "mlp out")


def measure_statistics(cell: Cell, opened: Opened, tell: Tell) -> list[Row]:
    """Rows of one set: ``site`` for every site, ``states`` for the hidden states after every block, and for the
    default set ``weights`` for every layer.
    """
    ids = _ids(cell, opened)
    network = opened.network
    with following_states(network.blocks) as states:
        recorder = record(
            network.model,
            watched_layers(network),
            ids,
            lambda x: InputStatistics.empty(x.shape[-1]),
            lambda done, total: tell(done / total, f"statistics of {cell['set']}"),
        )
    base = {"set": cell["set"], "axis": cell["axis"]}
    rows: list[Row] = []
    for site in input_sites(network, list(recorder.found), recorder.shared):
        found: InputStatistics = recorder.of(site.key)
        mask = outlier_channels(found.rms, cell["factor"])
        rows.append({"table": "site", **base, **_place(site), **_site_values(found, mask)})
        if cell["set"] == DEFAULT:
            rows[-1]["profile"] = " ".join(f"{value:.2f}" for value in profile(found.rms, PROFILE_BINS))
            rows += [{"table": "weights", **base, **_place(site), **row} for row in _weights(site, found.rms, mask)]
    return rows + [{"table": "states", **base, "after_block": i, **_described(one)} for i, one in enumerate(states)]


def _site_values(found: InputStatistics, mask: Tensor) -> Row:
    return {
        "channels": mask.numel(),
        "tokens": found.tokens,
        "max": float(found.largest.max()),
        "quantile_999": found.quantile(0.999),
        "rms": float(found.squares.mean() / max(found.tokens, 1)) ** 0.5,
        "kurtosis": found.kurtosis,
        "top_share": top_share(found.squares, TOP_FRACTION),
        "outliers": int(mask.sum()),
        "outlier_channels": " ".join(map(str, mask.nonzero().view(-1).tolist())),
    }


def profile(size: Tensor, bins: int) -> list[float]:
    """For each of `bins` stretches of channels, log10 of its largest size over the median channel's."""
    median = float(size.median()) or 1.0
    parts = size.double().tensor_split(min(bins, size.numel()))
    return [math.log10(max(float(part.max()) / median, 1e-3)) for part in parts]


def _weights(site: InputSite, size: Tensor, mask: Tensor) -> list[Row]:
    rows: list[Row] = []
    for consumer in site.consumers:
        weight = consumer.read().detach().float().cpu()
        norms = weight.norm(dim=0)
        met = weights_met(norms, mask)
        row: Row = {
            "layer": consumer.tensor.module,
            "relative_norm": met.relative_norm,
            "rank": met.rank,
            "correlation": spearman(size.numpy(), norms.numpy()),
        }
        if bool(mask.any()):
            cut = threshold([weight.abs], outlier_count(weight.numel(), LASSO_FRACTION))
            lasso = split(weight, cut)[1].float()
            row["lasso_ratio"] = float(lasso[:, mask].mean() / lasso.mean().clamp(min=1e-12))
        rows.append(row)
    return rows


def _described(states: HiddenStates) -> Row:
    return dict(states.describe())


def measure_errors(cell: Cell, opened: Opened, tell: Tell) -> list[Row]:
    """Rows of some blocks: ``w8a8`` and ``fix`` for every site, on evaluation text, calibrated on the default set."""
    network, ids = opened.network, _ids(cell, opened)
    memory = available_bytes() // 8
    walks = [Walk(network.model, network.blocks, tokens, memory) for tokens in (ids, opened.windows)]
    rows: list[Row] = []
    chosen: list[int] = cell["blocks"]
    for index in range(chosen[-1] + 1):
        tell(index / (chosen[-1] + 1), f"errors of block {index + 1}")
        if index not in chosen:
            for walk in walks:
                walk.advance(index, _nothing)
            continue
        layers = watched_layers(network, [index])
        seen = Recorder(lambda x: SiteRecord.empty(x.shape[-1], ids.shape[1]))
        held_out = Recorder(lambda _: Captured())
        for walk, recorder in zip(walks, (seen, held_out), strict=True):
            walk.observe_and_advance(index, layers, recorder, _nothing)
        for site in input_sites(network, list(seen.found), seen.shared):
            if held_out.of(site.key) is not None:
                rows += _site_errors(site, seen.of(site.key), held_out.of(site.key).parts, cell)
    return rows


@torch.inference_mode()
def _site_errors(site: InputSite, seen: SiteRecord, inputs: list[Tensor], cell: Cell) -> list[Row]:
    rows: list[Row] = []
    for granularity in GRANULARITIES:
        for ranges in RANGES:
            error = w8a8_error(site.consumers, seen, inputs, granularity, ranges)
            rows.append({"table": "w8a8", **_place(site), "granularity": granularity, "ranges": ranges, "error": error})
    for bits in cell["bits"]:
        for fix in cell["fixes"]:
            fixed = apply_fix(fix, site.consumers, seen, bits)
            for name, input_bits in (("16 bits", None), ("8 bits static", 8)):
                rows.append(
                    {
                        "table": "fix",
                        **_place(site),
                        "bits": bits,
                        "inputs": name,
                        "fix": fix,
                        "error": fixed_error(site.consumers, fixed, seen, inputs, input_bits),
                        "bits_per_weight": fixed.bits_per_weight,
                    }
                )
    return rows


def measure_model(cell: Cell, opened: Opened, tell: Tell) -> list[Row]:
    """Rows ``model``: the loss on the evaluation text with all sites rounded, or those of one label."""
    network, ids, where = opened.network, _ids(cell, opened), cell["sites"]
    only = None
    if where != "all":
        first = record(network.model, watched_layers(network), ids[:1], lambda _: Captured())
        sites = input_sites(network, list(first.found), first.shared)
        only = {one.watched.key for site in sites if site.label == where for one in site.consumers}
        if not only:
            return []
    choices = [ActivationChoice(granularity, ranges) for granularity in GRANULARITIES for ranges in RANGES]
    if where == "all":
        choices += [
            ActivationChoice(exponent=0.5),
            ActivationChoice(exponent=0.5, smoothed="all"),
            ActivationChoice("token", "dynamic", exponent=0.5),
        ]
    rows: list[Row] = []
    if where == "all":
        rows.append({"table": "model", "sites": "none", **_loss(opened)})
    for index, choice in enumerate(choices):
        tell(index / len(choices), f"{where} sites, {choice.granularity} {choice.ranges}")
        with rounding_inputs(network, choice, ids, only=only) as simulation:
            row: Row = {"table": "model", "sites": where, "granularity": choice.granularity, "ranges": choice.ranges}
            row.update(smoothed="none" if choice.exponent is None else choice.smoothed)
            row.update(bits_per_weight=simulation.bits_per_weight)
            rows.append({**row, **_loss(opened)})
    return rows


def _loss(opened: Opened) -> Row:
    losses = window_losses(opened.model, opened.windows, opened.choice.model)
    nll = math.fsum(losses) / len(losses)
    return {"nll": nll, "perplexity": math.exp(min(nll, 700.0))}


def _ids(cell: Cell, opened: Opened) -> Tensor:
    return opened.ids(NamedSet(cell["axis"], cell["set"], cell["sources"]), opened.choice.seed)


def _place(site: InputSite) -> dict[str, Any]:
    return {"block": site.block, "site": site.label, "layers": site.layers}


def _nothing() -> None:
    """The share of a cell that is done is told block by block."""
