"""The walk over blocks: what it observes and where its states go, for one worker and for several."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny
from torch import Tensor

from fewbit.architecture.coverage import cover
from fewbit.architecture.network import find_blocks, find_sites
from fewbit.checkpoints.source import open_checkpoint
from fewbit.curvature.accumulate import Accumulator
from fewbit.curvature.choice import CurvatureChoice
from fewbit.parallel import over_cores
from fewbit.pipeline.observers import EnoughSeenError, UntilLast
from fewbit.pipeline.walk import Walk
from fewbit.runtime.load import load

IDS = torch.randint(2, 256, (19, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=[1, 2, 3])
def threads(request: Any) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def by_hooks(model: Any, modules: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """Grams of modules, summed over all sequences in float64, and what leaves the last block."""
    sums: dict[str, Tensor] = {}

    def note(key: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            x = args[0].detach().double().reshape(-1, args[0].shape[-1])
            sums[key] = sums.get(key, 0.0) + x.t() @ x

        return hook

    handles = [module.register_forward_pre_hook(note(key)) for key, module in modules.items()]
    with torch.no_grad():
        hidden = [model.model(row[None], use_cache=False, output_hidden_states=True) for row in IDS]
    for handle in handles:
        handle.remove()
    return sums, torch.cat([one.hidden_states[1] for one in hidden])


@pytest.mark.slow
def test_what_a_walk_observes_and_where_it_goes(tmp_path: Path, threads: int) -> None:
    folder = build_tiny(tmp_path / "model", dtype="float32")
    model = load(folder, dtype=torch.float32, device="cpu")
    blocks = list(find_blocks(model))
    checkpoint = open_checkpoint(folder)
    sites = find_sites(blocks, cover(checkpoint.entries.values(), checkpoint.config).of("quantize"), None)
    layers = [site.watched for site in sites[0]]
    expected, after = by_hooks(model, {layer.key: layer.module for layer in layers})

    walk = Walk(model, blocks, IDS, 1 << 30)
    done: list[int] = []
    found = Accumulator(CurvatureChoice("gram"))
    walk.observe(0, layers, found, lambda: done.append(threading.get_ident()))
    assert len(done) == IDS.shape[0]
    assert len(set(done)) <= threads
    assert torch.get_num_threads() == threads
    for key, matrix in expected.items():
        seen = found.curvature(key)
        assert seen is not None
        assert torch.allclose(seen.double(), matrix, rtol=1e-4, atol=1e-4)
        assert found.tokens[key] == IDS.numel()

    both = Accumulator(CurvatureChoice("gram"))
    walk.observe_and_advance(0, layers, both, lambda: None)
    for key in expected:
        one, other = both.curvature(key), found.curvature(key)
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    states = torch.cat([walk.states(sample) for sample in range(IDS.shape[0])])
    assert torch.allclose(states, after, atol=1e-5)


class Kept:
    def __init__(self) -> None:
        self.keys: list[str] = []

    def observe(self, key: str, x: Tensor, gradient: Tensor | None) -> None:
        self.keys.append(key)


class Layer:
    def __init__(self, key: str, expert: int | None = None) -> None:
        self.key, self.expert = key, expert


@pytest.mark.parametrize(
    ("first", "expert", "stops"),
    [(["b", "a"], None, True), (["a"], None, False), (["a", "b", "a"], None, False), (["b", "a"], 0, False)],
)
def test_a_run_ends_at_the_last_layer_if_each_is_called_once(first: list[str], expert: int | None, stops: bool) -> None:
    kept = Kept()
    until: Any = UntilLast(kept, [Layer("a", expert), Layer("b", expert)])  # type: ignore[list-item]
    for key in first:
        until.observe(key, torch.zeros(1), None)
    until.ended()
    until.observe("b", torch.zeros(1), None)
    if stops:
        with pytest.raises(EnoughSeenError):
            until.observe("a", torch.zeros(1), None)
    else:
        until.observe("a", torch.zeros(1), None)
    assert kept.keys == [*first, "b", "a"]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_items_are_dealt_out_in_turn(workers: int) -> None:
    found: dict[int, list[int]] = {}
    over_cores(lambda item, worker: found.setdefault(worker, []).append(item), 8, workers)
    assert found == {worker: list(range(worker, 8, workers)) for worker in range(workers)}


def test_an_error_of_a_worker_ends_the_others() -> None:
    began: list[int] = []
    released = threading.Event()

    def work(item: int, worker: int) -> None:
        began.append(item)
        if item == 1:
            released.set()
            raise ValueError("no")
        released.wait(10)

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="no"):
        over_cores(work, 1000, 2)
    assert len(began) < 1000
    assert torch.get_num_threads() == before
