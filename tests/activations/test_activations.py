"""Rounded activations: whole numbers and their ranges, SmoothQuant's folding, statistics against direct computation."""

from pathlib import Path

import pytest
import torch
from conftest import build_tiny
from test_architectures import build
from torch import Tensor

import fewbit
from fewbit.activations.channels import (
    expected_jaccard,
    jaccard,
    outlier_channels,
    top_share,
    weights_met,
)
from fewbit.activations.choice import ActivationChoice
from fewbit.activations.massive import HiddenStates, begins_at
from fewbit.activations.record import Largest, following_states, record, run
from fewbit.activations.rounding import Range, range_of, round_inputs, round_weight, rounded_linear
from fewbit.activations.statistics import InputRanges, InputStatistics
from fewbit.checkpoints.source import open_checkpoint
from fewbit.errors import FewbitError
from fewbit.pipeline.input_sites import input_sites, watched_layers
from fewbit.pipeline.network import Network, open_network
from fewbit.pipeline.plan import cover_original
from fewbit.pipeline.w8a8 import rounding_inputs, smooth
from fewbit.transforms.channel_scales import smoothing_scales


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network_of(folder: Path) -> Network:
    checkpoint = open_checkpoint(folder)
    return open_network(checkpoint, cover_original(checkpoint), "cpu")


def ids_of(count: int = 4, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(seed))


def logits_of(network: Network, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return network.model(ids, use_cache=False).logits.float()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_inputs_are_rounded_to_the_nearest_of_at_most_256_levels(granularity: str, symmetric: bool) -> None:
    x = random(20, 64) * torch.logspace(-2, 2, 20).unsqueeze(1) + 0.5
    spread = range_of(x, granularity)
    found = round_inputs(x, spread, 8, symmetric)
    rows = found if granularity == "token" else found.view(1, -1)
    assert max(row.unique().numel() for row in rows) <= 256
    largest, low, high = x.abs(), x.clamp(max=0), x.clamp(min=0)
    if granularity == "token":
        step = largest.amax(1) / 127 if symmetric else (high.amax(1) - low.amin(1)) / 255
    else:
        step = (largest.max() / 127 if symmetric else (high.max() - low.min()) / 255).expand(20)
    assert ((found - x).abs().amax(1) <= step * 0.501 * (1 if symmetric else 2)).all()
    assert (round_inputs(torch.zeros(3, 4), range_of(torch.zeros(3, 4), granularity), 8, symmetric) == 0).all()


def test_a_static_range_clips() -> None:
    found = round_inputs(
        torch.tensor([[-9.0, -1.0, 0.3, 1.0, 9.0]]), Range(torch.tensor(-1.0), torch.tensor(1.0)), 8, True
    )
    assert torch.allclose(found[0, [0, 4]], torch.tensor([-128 / 127, 1.0]))
    assert float(found[0, 1]) == -1.0 and float(found[0, 3]) == 1.0


@pytest.mark.parametrize("symmetric", [True, False])
def test_products_are_those_of_whole_numbers(symmetric: bool) -> None:
    x, weight = random(7, 300).bfloat16(), random(5, 300, seed=1).bfloat16()
    spread, rounded = range_of(x, "token"), round_weight(weight, 8)
    assert rounded.codes.abs().amax() == 127
    assert float((rounded.decode() - weight.float()).abs().max()) <= 0.5 * float(rounded.scale.max()) * 1.001
    found = rounded_linear(x, rounded, spread, 8, symmetric)
    exact = round_inputs(x, spread, 8, symmetric).double() @ (rounded.codes.double() * rounded.scale.double()).t()
    assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_smoothing_evens_out_both_sides() -> None:
    largest, weight = torch.tensor([100.0, 1.0, 0.0, 4.0]), torch.tensor([[1.0, 2.0, 3.0, 0.0], [-4.0, 0.5, 1.0, 0.0]])
    scales = smoothing_scales(largest, [weight], 0.5)
    assert torch.allclose(scales, torch.tensor([(100 / 4) ** 0.5, (1 / 2) ** 0.5, 1.0, 1.0]))
    both = smoothing_scales(largest, [weight, 4 * weight], 0.5)
    assert torch.allclose(both[:2], scales[:2] / 2)
    assert torch.allclose((largest / scales)[:2], (weight.abs().amax(0) * scales)[:2])
    assert torch.allclose(smoothing_scales(largest, [weight], 1.0)[:2], largest[:2])


SMOOTHED = {"llama": 2, "mistral": 2, "gemma3_text": 2, "phi3": 2, "opt": 2, "gpt2": 2, "gpt_neox": 2, "mixtral": 1}
"""Sites of a block behind a norm that feeds nothing else."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOOTHED)
def test_smoothing_changes_no_output_before_rounding(name: str, tmp_path: Path) -> None:
    network = network_of(build(name, tmp_path / name))
    network.model.float()
    ids = ids_of()
    with torch.no_grad():
        for block in network.blocks:
            for key, parameter in block.named_parameters():
                if parameter.dim() == 1 and key.endswith("weight"):
                    # An outlier channel of a norm, so that smoothing has something to do.
                    parameter[3] = 40.0
    expected = logits_of(network, ids)
    largest = record(network.model, watched_layers(network), ids, Largest.like)
    for smoothed in ("norms", "all"):
        notes = smooth(network, largest, ActivationChoice(exponent=0.5, smoothed=smoothed))
        found = logits_of(network, ids)
        assert float((found - expected).norm() / expected.norm()) < 1e-4
        count = sum(note["smoothed"] for note in notes if note["block"] == 0)
        assert count == SMOOTHED[name] if smoothed == "norms" else count >= SMOOTHED[name]
    after = record(network.model, watched_layers(network), ids, Largest.like)
    key = next(iter(largest.found))
    spread = [float(r.found[key].magnitude.max() / r.found[key].magnitude.median()) for r in (largest, after)]
    assert spread[1] < 0.6 * spread[0]


CHOICES = {
    "static tensor": ActivationChoice(),
    "dynamic tensor": ActivationChoice(ranges="dynamic"),
    "static token": ActivationChoice(granularity="token"),
    "dynamic token": ActivationChoice(granularity="token", ranges="dynamic"),
    "asymmetric": ActivationChoice(ranges="dynamic", symmetric=False),
    "smoothquant": ActivationChoice(exponent=0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "phi3"])
def test_every_layer_of_the_blocks_is_rounded_and_then_as_before(name: str, tmp_path: Path) -> None:
    network, ids = network_of(build(name, tmp_path / name)), ids_of()
    weights = {key: value.clone() for key, value in network.model.state_dict().items()}
    expected = logits_of(network, ids[:1])
    errors = {}
    for label, choice in CHOICES.items():
        with rounding_inputs(network, choice, ids) as simulation:
            found = logits_of(network, ids[:1])
            assert simulation.weights.keys() == {layer.key for layer in watched_layers(network)}
        errors[label] = float((found - expected).norm() / expected.norm())
        assert torch.equal(logits_of(network, ids[:1]), expected)
    assert all(1e-4 < error < 0.1 for error in errors.values()), errors
    coarse = ActivationChoice(granularity="token", ranges="dynamic", bits=4, weight_bits=4)
    with rounding_inputs(network, coarse) as simulation:
        assert float((logits_of(network, ids[:1]) - expected).norm() / expected.norm()) > 3 * errors["dynamic token"]
        assert 4 < simulation.bits_per_weight < 5.1
    assert all(torch.equal(value, weights[key]) for key, value in network.model.state_dict().items())
    with pytest.raises(FewbitError, match="need a calibration set"), rounding_inputs(network, ActivationChoice()):
        pass


def test_the_simulation_is_that_of_decoded_weights_and_rounded_inputs(tmp_path: Path) -> None:
    network, ids = network_of(build_tiny(tmp_path / "m", dtype="float32")), ids_of(1)
    choice = ActivationChoice(granularity="token", ranges="dynamic")
    with rounding_inputs(network, choice) as simulation:
        found = logits_of(network, ids)
    for sites in network.sites:
        for site in sites:
            site.write(simulation.weights[site.watched.key].decode())
    owners = {id(site.watched.module): site.watched.module for sites in network.sites for site in sites}
    for module in owners.values():
        module.register_forward_pre_hook(
            lambda _, args: (round_inputs(args[0], range_of(args[0], "token"), 8, True), *args[1:])
        )
    assert torch.allclose(logits_of(network, ids), found, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_streamed_statistics_are_those_of_everything_at_once(dtype: torch.dtype) -> None:
    x = (random(60, 16) * torch.logspace(-1, 1, 16) + 0.3).to(dtype)
    streamed = InputStatistics.empty(16)
    for part in x.split([1, 20, 0, 39]):
        streamed.add(part)
    exact = x.double()
    assert streamed.tokens == 60
    assert torch.equal(streamed.largest, x.abs().amax(0).float())
    assert torch.allclose(streamed.rms, exact.square().mean(0).sqrt(), rtol=1e-5)
    centred = exact - exact.mean()
    assert streamed.kurtosis == pytest.approx(float(centred.pow(4).mean() / centred.square().mean() ** 2), rel=1e-4)
    ordered = x.abs().float().flatten().sort().values
    for share in (0.5, 0.9, 0.999, 1.0):
        wanted = float(ordered[min(959, -int(-share * 960 // 1) - 1)])
        assert streamed.quantile(share) == pytest.approx(wanted, rel=0 if dtype == torch.bfloat16 else 2**-7)
    empty = InputStatistics.empty(4)
    assert (empty.kurtosis, empty.quantile(0.999), float(empty.largest.sum())) == (0.0, 0.0, 0.0)


def test_ranges_by_position() -> None:
    x = random(3, 10, 8)
    x[:, 0] *= 100
    ranges = InputRanges.empty(10)
    for sequence in x:
        ranges.add(sequence)
    assert (ranges.low, ranges.high) == (float(x.min()), float(x.max()))
    low, high = ranges.at(12)
    assert torch.equal(low[:10, 0], x.amin(dim=(0, 2))) and torch.equal(high[:10, 0], x.amax(dim=(0, 2)))
    assert float(high[11]) == float(x[:, 1:].max()) < float(high[0])
    ranges.add(x[0, :4])
    assert float(ranges.at(3)[1].min()) == float(x.max())


def test_outlier_channels_and_their_overlap() -> None:
    size = torch.tensor([1.0, 1.2, 9.0, 0.8, 30.0, 1.0])
    one = outlier_channels(size, 6.0)
    assert one.tolist() == [False, False, True, False, True, False]
    other = outlier_channels(torch.tensor([1.0, 1.0, 9.0, 1.0, 1.0, 1.0]), 6.0)
    assert jaccard(one, other) == 0.5 and jaccard(one, one) == 1.0
    none = torch.zeros(6, dtype=torch.bool)
    assert jaccard(none, none) is None and jaccard(one, none) == 0.0
    assert not outlier_channels(torch.tensor([0.0, 0.0, 5.0]), 6.0).any()
    big, small = torch.arange(10000) < 300, (torch.arange(10000) % 100) < 2
    chance = jaccard(big, small)
    assert chance == pytest.approx(expected_jaccard(big, small), rel=0.05)
    assert top_share(torch.tensor([1.0, 2.0, 7.0]), 0.01) == pytest.approx(0.7)
    assert top_share(torch.ones(200), 0.05) == pytest.approx(0.05)


def test_the_weights_that_outliers_meet() -> None:
    weight = random(32, 5)
    weight[:, 2] *= 10
    size = torch.tensor([1.0, 1.0, 50.0, 1.0, 1.0])
    norms = weight.norm(dim=0)
    met = weights_met(norms, outlier_channels(size, 6.0))
    assert met.relative_norm == pytest.approx(float(norms[2] / norms.median()), rel=1e-5) and met.rank == 1.0
    assert weights_met(norms, torch.zeros(5, dtype=torch.bool)).rank is None
    order = torch.arange(101.0)
    chance = weights_met(order, (order % 10) == 5)
    assert chance.rank == pytest.approx(0.5) and chance.relative_norm == pytest.approx(1.0)


def test_massive_activations_begin_where_a_block_makes_them(tmp_path: Path) -> None:
    network = network_of(build_tiny(tmp_path / "m", dtype="float32", num_hidden_layers=3))

    def planted(module: torch.nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        out = out.clone()
        out[:, 0, 7] += 5000.0
        return out

    network.blocks[1].register_forward_hook(planted)
    with following_states(network.blocks) as found:
        run(network.model, ids_of(3))
    rows = [states.describe() for states in found]
    assert [row["massive"] for row in rows] == [False, False, True, True]
    assert rows[2]["channel"] == 7 and rows[2]["largest_is_first"] == 1.0
    assert begins_at([row["first_norm_ratio"] for row in rows], 10.0) == 2
    assert begins_at([1.0, 2.0], 10.0) is None
    direct = HiddenStates()
    states = random(5, 4)
    direct.add(states)
    norms = states.norm(dim=1)
    assert direct.describe()["first_norm_ratio"] == pytest.approx(float(norms[0] / norms.median()))
    assert direct.describe()["channel"] == int(states.abs().amax(0).argmax())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "falcon"])
def test_sites_are_the_places_that_share_inputs(name: str, tmp_path: Path) -> None:
    network = network_of(build(name, tmp_path / name))
    found = record(network.model, watched_layers(network), ids_of(8), Largest.like)
    sites = input_sites(network, list(found.found), found.shared)
    first = [(site.label, site.layers) for site in sites if site.block == 0]
    assert [label for label, _ in first if "attention" in label] == ["attention in", "attention out"]
    if name == "llama":
        layers = ["self_attn.k_proj+q_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj"]
        assert first == list(zip(["attention in", "attention out", "mlp in", "mlp out"], layers, strict=True))
    if name == "gpt2":
        assert [label for label, _ in first] == ["attention in", "attention out", "mlp in", "mlp out"]
    if name == "mixtral":
        labels = [label for label, _ in first[2:]]
        assert set(labels) == {"mlp in", "mlp out"} and labels.count("mlp in") == labels.count("mlp out")
    sites_at = [len(site.consumers) for site in sites]
    assert sum(sites_at) == sum(len(block) for block in network.sites)


def test_choices_are_checked() -> None:
    for wrong in ({"granularity": "channel"}, {"bits": 1}, {"exponent": 1.5}, {"ranges": "both"}):
        with pytest.raises(FewbitError):
            ActivationChoice(**wrong)
    assert not ActivationChoice(ranges="dynamic").calibrated
    assert fewbit.FewbitError is FewbitError
