"""Quantize with a curvature, stage by stage: measure it, solve the weights, put them into the network, and continue.

A stage is one block for the input Gram (which is measured on the outputs of the preceding quantized blocks), and
`refresh` blocks for the output Fisher. Every solved weight is written immediately, so a killed run can resume.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from fewbit.calibration.tokens import CalibrationSet
from fewbit.checkpoints.source import Checkpoint
from fewbit.curvature.store import StoredCurvature
from fewbit.errors import FewbitError
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.calibration_tokens import calibration_set
from fewbit.pipeline.curvatures import BlockCurvature, Source, fisher_blocks, gram_blocks, stored_blocks
from fewbit.pipeline.heads import NOT_MEASURED, solved_table
from fewbit.pipeline.network import Network, open_network
from fewbit.pipeline.plan import Plan, PlannedTensor
from fewbit.pipeline.solve_blocks import BlockSolver
from fewbit.pipeline.solved_store import SolvedStore
from fewbit.pipeline.stages import matrix_bytes, stages_of
from fewbit.progress import Counter, Progress
from fewbit.recipe import Recipe


def solve_model(
    checkpoint: Checkpoint,
    plan: Plan,
    recipe: Recipe,
    options: CalibrationOptions,
    store: SolvedStore,
    device: str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Solve every planned tensor into `store`; returns the calibration entry of the report.

    Raises FewbitError if more than `max_fallback` weights fell back to rounding, and names them.
    """
    walking = options.stored is not None or (recipe.curvature is not None and not recipe.curvature.source.gradients)
    network = open_network(checkpoint, plan.coverage, device, walking)
    table = solved_table(plan, recipe, network.head)
    if options.stored is None:
        # Checked before the model generates its calibration text, which takes minutes.
        _stages(network, table, options)
    calibration = None if options.stored else calibration_set(checkpoint, options.choice, network.model, progress)
    if calibration is not None:
        store.same_tokens(calibration.sha256)
    items = {item.tensor.entry.name: item for item in plan.quantized}
    run = BlockSolver(recipe, items, store, network, Counter(progress))
    run.begin()
    placed = {site.tensor.entry.name for sites in network.sites for site in sites}
    for item in plan.quantized:
        if item.tensor.entry.name not in placed:
            run.round_outside(item, checkpoint)
    for block in _blocks(run, options, calibration, table):
        run.solve_block(block)
    fallen = [name for name, path in run.paths.items() if path.startswith("fallback")]
    if len(fallen) > options.max_fallback:
        raise FewbitError(
            f"{len(fallen)} weights fell back to rounding: "
            + "; ".join(f"{name} ({run.paths[name].removeprefix('fallback: ')})" for name in fallen)
            + ": allow it with --max-fallback, or raise --damping or give more calibration text, with --overwrite"
        )
    return {
        **options.describe(),
        **({"calibration": calibration.describe()} if calibration else {}),
        **({"channel_scales": run.notes} if run.notes else {}),
    }


def _blocks(
    run: BlockSolver, options: CalibrationOptions, calibration: CalibrationSet | None, table: PlannedTensor | None
) -> Iterator[BlockCurvature]:
    """The curvature of one block after another, from the source that the recipe and the options define.

    table: the table that is the head; its curvature goes to the store of solved weights.
    """
    network, choice = run.network, run.recipe.curvature
    name = "" if table is None else table.tensor.entry.name
    if options.stored is not None:
        _check_measured(run, options.stored, options.max_fallback)
        if table is not None:
            matrix = options.stored.head() if options.stored.has_head else None
            run.store.put_curvature(name, matrix, NOT_MEASURED)
        return stored_blocks(network, options.stored, run.counter)
    assert calibration is not None
    assert choice is not None
    source = Source(
        network,
        calibration.ids,
        choice,
        options.memory,
        run.store.folder,
        run.solved,
        run.counter,
        run.recipe.transform.kind.from_largest,
        None if table is None or run.store.has_curvature(name) else partial(run.store.put_curvature, name),
    )
    if not choice.source.gradients:
        return gram_blocks(source, options.original_inputs)
    return fisher_blocks(source, _stages(network, table, options), refreshed=options.refresh > 0)


def _stages(network: Network, table: PlannedTensor | None, options: CalibrationOptions) -> list[list[int]]:
    """The blocks that are measured together; the head is measured with the last ones."""
    of_head = network.head.bytes if network.head is not None and table is not None else 0
    return stages_of(matrix_bytes(network.sites, of_head), options.refresh, options.memory)


def _check_measured(run: BlockSolver, stored: StoredCurvature, max_fallback: int) -> None:
    """Raises FewbitError, before anything is solved, if weights that need a curvature have none."""
    missing: list[str] = []
    for index, sites in enumerate(run.network.sites):
        layers = stored.layers(index)
        # An expert may have received no token.
        lost = [s for s in sites if s.watched.key not in layers and s.watched.expert is None]
        missing += [site.tensor.entry.name for site in lost]
    if len(missing) > max_fallback:
        raise FewbitError(
            f"{stored.folder}: has no curvature for {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''} "
            f"({len(missing)} weights), because they were left out of the measurement: measure again, or --exclude "
            "them here"
        )
