"""`fewbit curvature`: measure a curvature of the original model and store it for any method and bit-width."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewbit.calibration.tokens import CalibrationSet
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import Checkpoint, open_checkpoint
from fewbit.checkpoints.whole_file import said_when_full
from fewbit.curvature.accumulate import Accumulator
from fewbit.curvature.choice import CurvatureChoice
from fewbit.curvature.store import CurvatureWriter, check_curvature_place
from fewbit.device import check_device
from fewbit.memory import peak_rss_bytes
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.calibration_tokens import calibration_set
from fewbit.pipeline.curvatures import Source, fisher_blocks, gram_blocks
from fewbit.pipeline.network import Network, open_network
from fewbit.pipeline.plan import cover_original
from fewbit.pipeline.stages import matrix_bytes, stages_of
from fewbit.progress import Counter, Progress


def measure(
    model: str | Path,
    out: Path,
    choice: CurvatureChoice,
    options: CalibrationOptions,
    device: str = "cpu",
    progress: Progress | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure a curvature with the original weights and inputs and store it in the folder `out`, or resume this.

    include, exclude: patterns of tensor names to add to, and to remove from, the linear layers in the blocks. Returns
    tokens, bytes, seconds and peak_rss_bytes. Raises FewbitError for bad input.
    """
    started = time.perf_counter()
    check_device(device)
    checkpoint = open_checkpoint(locate(model))
    check_curvature_place(out, checkpoint)
    coverage = cover_original(checkpoint, include, exclude)
    network = open_network(checkpoint, coverage, device, walking=not choice.source.gradients)
    # Checked before the model generates its calibration text, which takes minutes.
    stages_of(_sizes(network), 0, options.memory)
    calibration = calibration_set(checkpoint, options.choice, network.model, progress)
    with said_when_full("free some space and run the same command again; finished blocks are kept"):
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
    """Measure a curvature on the given sequences and store it in the folder `out`, or resume the measurement.

    network: must be opened for running block by block if the kind is gram; its blocks are then empty afterwards.
    """
    described, with_head = {**calibration.describe(), "blocks": len(network.blocks)}, network.head is not None
    with CurvatureWriter(out, checkpoint, choice, described, with_head) as writer:
        counter = Counter(progress)
        put_head = None if writer.has_head or not with_head else writer.put_head
        source = Source(
            network,
            calibration.ids,
            choice,
            options.memory,
            writer.folder,
            writer.has,
            counter,
            put_head=put_head,
        )
        if not choice.source.gradients:
            blocks = gram_blocks(source, original_inputs=True)
        else:
            blocks = fisher_blocks(source, stages_of(_sizes(network), 0, options.memory), refreshed=False)
        for block in blocks:
            counter.show(f"block {block.index + 1} of {len(network.blocks)}")
            if not writer.has(block.index) and block.measured is not None:
                _put(network, block.index, block.measured, writer)


def _sizes(network: Network) -> list[int]:
    return matrix_bytes(network.sites, network.head.bytes if network.head is not None else 0)


def _put(network: Network, index: int, found: Accumulator, writer: CurvatureWriter) -> None:
    keys = {site.watched.key for site in network.sites[index]}
    sums = {key: matrix for key in found.sums if key in keys and (matrix := found.curvature(key)) is not None}
    writer.put(index, sums, {key: owner for key, owner in found.shared.items() if key in keys})
