"""`fewbit curvature`: measure a curvature of the original and keep it for any method and bit-width."""

import time
from pathlib import Path
from typing import Any

import torch

from fewbit.calibration.tokens import CalibrationSet
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import Checkpoint, open_checkpoint
from fewbit.checkpoints.whole_file import said_when_full
from fewbit.curvature.accumulate import Accumulator
from fewbit.curvature.choice import CurvatureChoice
from fewbit.curvature.fisher import measure_fisher
from fewbit.curvature.store import CurvatureWriter, check_curvature_place
from fewbit.device import check_device
from fewbit.memory import peak_rss_bytes
from fewbit.pipeline.calibrated import calibration_set, open_network
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.plan import make_plan
from fewbit.pipeline.solve_blocks import Network, Progress
from fewbit.pipeline.stages import crowded, matrix_bytes, stages_of
from fewbit.pipeline.walk import Walk
from fewbit.recipe import Recipe


def measure(
    model: str | Path,
    out: Path,
    choice: CurvatureChoice,
    options: CalibrationOptions,
    device: str = "cpu",
    progress: Progress | None = None,
    recipe: Recipe | None = None,
) -> dict[str, Any]:
    """Measure a curvature on the original's own weights and inputs into the folder `out`; goes on where it stopped.

    recipe: whose `include` and `exclude` say which tensors are meant; default: all linear layers in the blocks.
    Returns figures: tokens, bytes, seconds, peak_rss_bytes. Raises FewbitError for bad input.
    """
    started = time.perf_counter()
    check_device(device)
    checkpoint = open_checkpoint(locate(model))
    check_curvature_place(out, checkpoint)
    plan = make_plan(checkpoint, recipe or Recipe(group_size="row"), 1 << 62)
    network = open_network(checkpoint, plan, device, walking=choice.kind == "gram")
    # Before the model writes its own text, which takes minutes.
    stages_of(matrix_bytes(network.sites), 0, options.memory)
    calibration = calibration_set(checkpoint, options.choice, network.model, progress)
    with said_when_full("free some and run the same command again, finished blocks are kept"):
        measure_tokens(network, checkpoint, calibration, out, choice, options, progress)
    return {
        "folder": str(out),
        "kind": choice.kind,
        "sequences": calibration.ids.shape[0],
        "tokens": calibration.ids.numel(),
        "tokens_sha256": calibration.sha256,
        "bytes": sum(path.stat().st_size for path in out.iterdir()),
        "seconds": time.perf_counter() - started,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def measure_tokens(
    network: Network,
    checkpoint: Checkpoint,
    calibration: CalibrationSet,
    out: Path,
    choice: CurvatureChoice,
    options: CalibrationOptions,
    progress: Progress | None = None,
) -> None:
    """Measure a curvature on given sequences into the folder `out`; goes on where it stopped.

    network: opened for walking where the kind is gram; its blocks are empty afterwards then.
    """
    writer = CurvatureWriter(out, checkpoint, choice, {**calibration.describe(), "blocks": len(network.blocks)})
    if choice.kind == "gram":
        _gram(network, calibration.ids, choice, options, writer, progress)
    else:
        stages = stages_of(matrix_bytes(network.sites), 0, options.memory)
        for number, stage in enumerate(stages):
            if all(writer.has(index) for index in stage):
                continue

            def step(done: int, total: int, begun: int = number) -> None:
                if progress:
                    progress(begun * total + done, len(stages) * total, f"sequence {done} of {total}")

            layers = {site.watched.key: site.watched for index in stage for site in network.sites[index]}
            recompute = crowded(network.model, calibration.ids.shape[1], options.memory)
            blocks, watched = network.blocks[stage[0] :], list(layers.values())
            found, _ = measure_fisher(network.model, blocks, watched, calibration.ids, choice, step, recompute)
            found.check_gradients()
            for index in stage:
                _put(network, index, found, writer)


def _gram(
    network: Network,
    ids: torch.Tensor,
    choice: CurvatureChoice,
    options: CalibrationOptions,
    writer: CurvatureWriter,
    progress: Progress | None,
) -> None:
    walk = Walk(network.model, network.blocks, ids, options.memory // 2, writer.folder)
    done, total = 0, len(network.blocks) * ids.shape[0]
    for index, sites in enumerate(network.sites):
        accumulator = Accumulator(choice)

        def step(block: int = index) -> None:
            nonlocal done
            done += 1
            if progress:
                progress(done, total, f"block {block + 1} of {len(network.blocks)}")

        network.take(index)
        if writer.has(index):
            walk.advance(index, step)
        else:
            layers = list({site.watched.key: site.watched for site in sites}.values())
            walk.observe_and_advance(index, layers, accumulator, step)
            _put(network, index, accumulator, writer)
        network.release(index)


def _put(network: Network, index: int, found: Accumulator, writer: CurvatureWriter) -> None:
    keys = {site.watched.key for site in network.sites[index]}
    sums = {key: matrix for key in found.sums if key in keys and (matrix := found.curvature(key)) is not None}
    writer.put(index, sums, {key: owner for key, owner in found.shared.items() if key in keys})
