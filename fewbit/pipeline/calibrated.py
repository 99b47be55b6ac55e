"""Quantize with a curvature: measure it stage by stage, solve the stage's weights, put them into the network, go on.

A stage is one block for the input Gram (which sees what the quantized blocks before it give), and as many as
`refresh` says for the output Fisher. Every solved weight is written at once, so a killed run goes on from there.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.architecture.names import names_in_network
from fewbit.architecture.network import Site, find_blocks, find_sites, names_by_parameter
from fewbit.architecture.orientation import to_matrix
from fewbit.calibration.choice import CalibrationChoice
from fewbit.calibration.tokens import CalibrationSet, make_set
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import Checkpoint, open_checkpoint
from fewbit.curvature.accumulate import Accumulator
from fewbit.curvature.fisher import measure_fisher
from fewbit.curvature.store import StoredCurvature
from fewbit.errors import FewbitError, missing_extra
from fewbit.paging import page_out
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.plan import Plan, make_plan
from fewbit.pipeline.solve_blocks import BlockSolver, Network, Progress
from fewbit.pipeline.solved_store import SolvedStore
from fewbit.pipeline.stages import check_length, crowded, matrix_bytes, stages_of
from fewbit.pipeline.walk import Walk
from fewbit.recipe import Recipe
from fewbit.runtime.load import load


def solve_model(
    checkpoint: Checkpoint,
    plan: Plan,
    recipe: Recipe,
    options: CalibrationOptions,
    store: SolvedStore,
    device: str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Solve every planned tensor into `store`; returns what the report says of the calibration.

    Raises FewbitError when more weights than `max_fallback` fell back to rounding, naming them.
    """
    walking = options.stored is not None or (recipe.curvature is not None and recipe.curvature.kind == "gram")
    network = open_network(checkpoint, plan, device, walking)
    if options.stored is None:
        # Before the model writes its own text, which takes minutes.
        stages_of(matrix_bytes(network.sites), options.refresh, options.memory)
    calibration = None if options.stored else calibration_set(checkpoint, options.choice, network.model, progress)
    if calibration is not None:
        store.same_tokens(calibration.sha256)
    run = BlockSolver(recipe, options, store, network, progress)
    run.begin()
    placed = {site.tensor.entry.name for sites in network.sites for site in sites}
    outside = [item for name, item in network.items.items() if name not in placed]
    for item in outside:
        run.round_outside(item, checkpoint)
    if options.stored is not None:
        _with_stored(run, options.stored)
    elif recipe.curvature is not None and recipe.curvature.kind == "fisher":
        assert calibration is not None
        _with_fisher(run, calibration)
    else:
        assert calibration is not None
        _with_gram(run, calibration)
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


def open_original(
    model: str | Path, device: str | None, walking: bool = False, dtype: Any = "auto"
) -> tuple[Checkpoint, Network]:
    """An original and its network, with every linear layer in the blocks as a site; options as for `open_network`."""
    checkpoint = open_checkpoint(locate(model))
    plan = make_plan(checkpoint, Recipe(group_size="row"), 1 << 62)
    return checkpoint, open_network(checkpoint, plan, device, walking, dtype)


def open_network(
    checkpoint: Checkpoint, plan: Plan, device: str | None, walking: bool = False, dtype: Any = "auto"
) -> Network:
    """Load the model and find the planned tensors in it.

    walking: only one block at a time will run, so the weights stay where they are mapped until a block is taken.
    device, dtype: as for :func:`fewbit.load`.
    """
    model = load(checkpoint.folder, dtype, "cpu" if walking else device)
    if hasattr(model, "set_experts_implementation"):
        # One linear layer for each expert, which can be watched, in place of one fused product for all.
        model.set_experts_implementation("eager")
    blocks = list(find_blocks(model))
    items = {item.tensor.entry.name: item for shard in plan.shards for item in shard if item.stored is not None}
    with FileReader() as reader:

        def read(tensor: Any) -> Tensor:
            return to_matrix(reader.tensor(tensor.entry), tensor.transposed).to(model.device)

        names = names_in_network(model, checkpoint.entries)
        sites = find_sites(
            blocks, [item.tensor for item in items.values()], read, model, names, page_out if walking else None
        )
    kept_names = {tensor.entry.name: names[tensor.entry.name] for tensor in plan.coverage.of("keep")}
    kept = names_by_parameter(model, blocks, kept_names)
    return Network(model, blocks, sites, items, kept, torch.device(device) if device else model.device)


def calibration_set(
    checkpoint: Checkpoint, choice: CalibrationChoice, model: Any, progress: Progress | None = None
) -> CalibrationSet:
    """The tokens to calibrate on, in the model's own tokenizer."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise missing_extra("transformers", "hf") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    except (OSError, ValueError, KeyError, TypeError):
        tokenizer = None
    check_length(model.config, choice.sequence_length)
    return make_set(choice, tokenizer, model.get_input_embeddings().weight.shape[0], model, progress)


def _with_gram(run: BlockSolver, calibration: CalibrationSet) -> None:
    network, options = run.network, run.options
    passes = 1 if options.original_inputs else 2
    run.total = passes * len(network.blocks) * calibration.ids.shape[0]
    walk = Walk(network.model, network.blocks, calibration.ids, options.memory // 2, run.store.folder)
    assert run.recipe.curvature is not None
    for index, sites in enumerate(network.sites):
        accumulator = Accumulator(run.recipe.curvature)
        network.take(index)
        layers = list({site.watched.key: site.watched for site in sites}.values())
        if options.original_inputs:
            walk.observe_and_advance(index, layers, accumulator, run.step)
        elif not run.solved(index):
            walk.observe(index, layers, accumulator, run.step)
        else:
            run.done += calibration.ids.shape[0]
        run.solve_block(index, lambda site, found=accumulator: found.curvature(site.watched.key))  # type: ignore[misc]
        if not options.original_inputs:
            walk.advance(index, run.step)
        network.release(index)


def _with_fisher(run: BlockSolver, calibration: CalibrationSet) -> None:
    network, choice, refresh = run.network, run.recipe.curvature, run.options.refresh
    assert choice is not None
    stages = stages_of(matrix_bytes(network.sites), refresh, run.options.memory)
    # To solve a block takes about as long as one sequence forward and back.
    run.total = len(stages) * calibration.ids.shape[0] + len(network.blocks)
    for stage in stages:
        accumulator = Accumulator(choice)
        if all(run.solved(index) for index in stage):
            run.done += calibration.ids.shape[0]
        else:
            layers = {site.watched.key: site.watched for index in stage for site in network.sites[index]}
            run.what = f"curvature of blocks {stage[0] + 1} to {stage[-1] + 1}"
            blocks = network.blocks[stage[0] :]
            recompute = crowded(network.model, calibration.ids.shape[1], run.options.memory)
            accumulator, _ = measure_fisher(
                network.model, blocks, list(layers.values()), calibration.ids, choice, run.step, recompute
            )
            accumulator.check_gradients()
        for index in stage:
            # Measured once means with the original's weights, also where memory makes several passes of it.
            run.solve_block(index, partial(_curvature_at, accumulator), install=refresh > 0)
            run.step()


def _check_measured(run: BlockSolver, stored: StoredCurvature) -> None:
    """FewbitError, before anything is solved, when weights have no curvature that should have one."""
    missing: list[str] = []
    for index, sites in enumerate(run.network.sites):
        layers = stored.layers(index)
        # An expert may have seen no token.
        lost = [s for s in sites if s.watched.key not in layers and s.watched.expert is None]
        missing += [site.tensor.entry.name for site in lost]
    if len(missing) > run.options.max_fallback:
        raise FewbitError(
            f"{stored.folder}: holds no curvature of {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''} "
            f"({len(missing)} weights): they were left out when it was measured: measure again, or --exclude them here"
        )


def _with_stored(run: BlockSolver, stored: StoredCurvature) -> None:
    _check_measured(run, stored)
    run.total = len(run.network.blocks)
    for index in range(len(run.network.blocks)):
        matrices = stored.block(index)
        run.network.take(index)
        run.solve_block(index, lambda site, found=matrices: found.get(site.watched.key), install=False)  # type: ignore[misc]
        run.network.release(index)
        run.step()


def _curvature_at(accumulator: Accumulator, site: Site) -> Tensor | None:
    return accumulator.curvature(site.watched.key)
