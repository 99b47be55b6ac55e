"""AWQ: folding changes no output before rounding, finds every feeder, and its search is a search."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_architectures import CHOICE, build
from torch import Tensor

import fewbit
from fewbit.architecture.folding import in_float32
from fewbit.checkpoints.source import open_checkpoint
from fewbit.pipeline.fold import Folding, fold_block
from fewbit.pipeline.network import Network, open_network
from fewbit.pipeline.plan import cover_original
from fewbit.pipeline.run import RunOptions
from fewbit.pipeline.walk import Walk
from fewbit.runtime.unpack import unpack
from fewbit.transforms.channel_scales import best_scales
from fewbit.transforms.table import TRANSFORMS

FEEDERS = {"llama": 3, "mistral": 3, "gemma3_text": 3, "phi3": 2, "opt": 4, "gpt2": 2, "gpt_neox": 2, "qwen2": 3}
"""How many sets of layers of a block can be scaled: those behind a norm or a linear layer of their own."""


def open_tiny(name: str, folder: Path) -> tuple[Network, Walk]:
    checkpoint = open_checkpoint(build(name, folder / name))
    network = open_network(checkpoint, cover_original(checkpoint), "cpu")
    return network, Walk(network.model, network.blocks, torch.arange(16).unsqueeze(0) + 5, 1 << 30)


@pytest.mark.parametrize("name", FEEDERS)
def test_folding_changes_no_output_before_rounding(name: str, tmp_path: Path) -> None:
    network, walk = open_tiny(name, tmp_path)
    block, sites = network.blocks[0], network.sites[0]
    grams: dict[int, Tensor] = {}

    def gram(site: Any) -> Tensor:
        kind = site.tensor.entry.name.split(".")[-2]
        joined = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "gate_proj": 2, "up_proj": 2}
        key = joined.get(kind, hash(site.tensor.entry.name))
        if key not in grams:
            power = torch.rand(site.columns, generator=torch.Generator().manual_seed(len(grams))) * 9 + 0.1
            grams[key] = torch.diag(power)
        return grams[key]

    with in_float32(block):
        expected = walk.change(0)
        # A rounding that is hurt by small channels, so that every set is scaled.
        folding = Folding(TRANSFORMS["awq"], lambda _, w: (w * 20).round() / 20)
        notes = fold_block(block, sites, gram, folding, lambda: walk.change(0))
        found = walk.change(0)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert sum(note["exponent"] is not None for note in notes) == FEEDERS[name]
    assert any(note["exponent"] for note in notes)


def test_the_search_takes_the_least_error(tmp_path: Path) -> None:
    network, _ = open_tiny("llama", tmp_path)
    site = network.sites[0][0]
    power = torch.logspace(-2, 2, site.columns)
    gram = torch.diag(power)

    def rounding(_: Any, weight: Tensor) -> Tensor:
        step = weight.abs().amax(dim=1, keepdim=True) / 3
        return (weight / step).round() * step

    def error(scales: Tensor) -> float:
        weight = site.read().float()
        return float(((rounding(None, weight * scales) / scales - weight).square() * power).sum())

    exponent, scales = best_scales([site.read()], gram, rounding)
    assert 0 < exponent < 1
    candidates = []
    for step in range(20):
        raw = power.sqrt().pow(step / 20)
        candidates.append(error(raw / (raw.max() * raw.min()).sqrt()))
    assert error(scales) == pytest.approx(min(candidates), rel=1e-4)
    assert error(scales) < 0.8 * error(torch.ones_like(power))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt"])
def test_written_folders_hold_the_folded_norms(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path / "model")
    recipe = fewbit.preset("awq", bits=8, group_size="16")
    report = fewbit.quantize(model, tmp_path / "out", recipe, RunOptions(calibration=CHOICE))
    assert any(note["exponent"] for note in report["calibration"]["channel_scales"])
    before, after = open_checkpoint(model), open_checkpoint(tmp_path / "out")
    assert set(after.entries) >= {n for n, e in before.entries.items() if len(e.shape) == 1}
    ids = torch.randint(3, 128, (1, 24), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = fewbit.load(model, device="cpu")(ids).logits.float()
        found = fewbit.load(tmp_path / "out", device="cpu")(ids).logits.float()
        plain = fewbit.load(unpack(tmp_path / "out", tmp_path / "plain"), device="cpu")(ids).logits.float()
    assert float((expected - found).norm() / expected.norm()) < 0.05
    assert torch.allclose(found, plain, atol=0.05)
