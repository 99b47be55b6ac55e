"""Straight-through rounding and trainable weights: gradients against references, stored form against training."""

from pathlib import Path

import pytest
import torch
from conftest import build_tiny
from torch import Tensor

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import open_checkpoint
from fewbit.formats import native
from fewbit.formats.config import read_weights
from fewbit.grids.codebook import normal_float
from fewbit.grids.packing import unpack
from fewbit.grids.scheme import StoredWeight
from fewbit.grids.straight_through import round_evenly, round_to_levels, round_to_magnitudes, seen_as
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.run import RunOptions
from fewbit.runtime.unpack import read_parts
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.tuned_weight import TunedWeight

PRESETS = ["rtn", "adpq", "adpq+", "gptq", "spqr", "billm", "precal+spqr", "precal+oac", "precal+oac 1 bit"]


def reference_even(w: Tensor, s: Tensor, z: Tensor, top: int) -> Tensor:
    """The same with rounding's gradient left out by detaching, as autograd sees it."""
    u = w / s
    code = u + (u.round() - u).detach() + z
    return (code.clamp(0, top) - z) * s


@pytest.mark.parametrize("top", [3, 7, 15])
def test_gradients_of_an_even_grid_are_those_of_lsq(top: int) -> None:
    torch.manual_seed(top)
    tensors = [torch.randn(5, 3, 8) * 2, torch.rand(5, 3, 1) + 0.2, torch.randint(0, top + 1, (5, 3, 1)).float()]
    out = torch.randn(5, 3, 8)
    ours = [t.clone().requires_grad_() for t in tensors]
    value = round_evenly(ours[0], ours[1], ours[2], top, True)
    value.backward(out)
    theirs = [t.double().requires_grad_() for t in tensors]
    expected = reference_even(*theirs, top)
    expected.backward(out.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    damping = (8 * top) ** -0.5
    for mine, other, factor in zip(ours, theirs, (1.0, damping, damping), strict=True):
        assert mine.grad is not None and other.grad is not None
        torch.testing.assert_close(mine.grad.double(), other.grad * factor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_gradients_of_a_codebook(bits: int) -> None:
    torch.manual_seed(bits)
    levels = normal_float(bits)
    weight, scale = torch.randn(6, 2, 16), torch.randn(6, 2, 1)
    out = torch.randn(6, 2, 16)
    w, s = weight.clone().requires_grad_(), scale.clone().requires_grad_()
    value = round_to_levels(w, s, levels)
    value.backward(out)
    w64, s64 = weight.double().requires_grad_(), scale.double().requires_grad_()
    u = (w64 / s64).clamp(levels[0], levels[-1])
    nearest = torch.tensor(levels, dtype=torch.float64)[
        (u.detach().unsqueeze(-1) - torch.tensor(levels, dtype=torch.float64)).abs().argmin(dim=-1)
    ]
    expected = (u + (nearest - u).detach()) * s64
    expected.backward(out.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert w.grad is not None and s.grad is not None and w64.grad is not None and s64.grad is not None
    torch.testing.assert_close(w.grad.double(), w64.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(s.grad.double(), s64.grad * (16 * 2**bits) ** -0.5, rtol=1e-4, atol=1e-5)


def test_gradients_of_binary_magnitudes_and_of_what_a_format_shows() -> None:
    weight = torch.tensor([0.1, -0.4, 0.9, -2.0], requires_grad=True)
    small, large = torch.full((4,), 0.3, requires_grad=True), torch.full((4,), 1.0, requires_grad=True)
    value = round_to_magnitudes(weight, small, large)
    assert torch.equal(value, torch.tensor([0.3, -0.3, 1.0, -1.0]))
    value.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert weight.grad is not None and small.grad is not None and large.grad is not None
    assert weight.grad.tolist() == [1.0, 2.0, 3.0, 0.0]
    assert small.grad.tolist() == [1.0, -2.0, 0.0, 0.0]
    assert large.grad.tolist() == [0.0, 0.0, 3.0, -4.0]
    wanted = torch.tensor([1.3], requires_grad=True)
    seen_as(wanted, wanted.detach().round()).mul(2).backward()
    assert wanted.grad is not None and wanted.grad.item() == 2.0


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model quantized by every preset whose stored form is different."""
    folder = tmp_path_factory.mktemp("tuned")
    model = build_tiny(folder / "model", shard_size="1GB")
    options = RunOptions(calibration=CalibrationOptions(CalibrationChoice("random-tokens", 8, 32)))
    made = {"model": model}
    for method in PRESETS:
        preset, _, one = method.partition(" ")
        bits = 1 if one or preset == "billm" else 2
        size = "16" if "spqr" in method else "32"
        recipe = fewbit.preset(preset, bits=bits, group_size=size, embedding_bits=16)
        fewbit.quantize(model, folder / method, recipe, options)
        made[method] = folder / method
    return made


def weights(folder: Path) -> list[tuple[str, StoredWeight, dict[str, Tensor]]]:
    checkpoint = open_checkpoint(folder)
    with FileReader() as reader:
        return [
            (module, stored, read_parts(checkpoint, reader, module, stored))
            for module, stored in read_weights(checkpoint.quantization or {}).items()
        ]


@pytest.mark.slow
@pytest.mark.parametrize("method", PRESETS)
@pytest.mark.parametrize("train", ["all", "weights", "codes", "scales"])
def test_a_weight_begins_as_stored_and_is_stored_as_trained(
    quantized: dict[str, Path], method: str, train: str
) -> None:
    torch.manual_seed(0)
    originals = open_checkpoint(quantized["model"])
    for module, stored, parts in weights(quantized[method])[:9:4]:
        with FileReader() as reader:
            original = reader.tensor(originals.entries[f"{module}.weight"])
        tuned = TunedWeight(stored, parts, original, TuningChoice(train=train))
        before = native.decode(parts, stored)
        torch.testing.assert_close(tuned.decoded(), before, rtol=1e-6, atol=1e-7)
        same = tuned.parts()
        assert all(torch.equal(same[name], parts[name]) for name in parts if name not in ("outlier_codes", "codes"))
        torch.testing.assert_close(native.decode(same, stored), before, rtol=0, atol=0)
        tuned.decoded().square().sum().backward()
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if parameter.requires_grad:
                    # A zero-point moves only where codes are clamped, which a min-max grid never does.
                    assert parameter.grad is not None and (name == "offset" or bool(parameter.grad.ne(0).any()))
                    parameter += 0.3 * torch.randn_like(parameter)
        after = tuned.decoded()
        assert not torch.equal(after, before)
        stored_again = tuned.parts()
        assert {n: (t.dtype, t.shape) for n, t in stored_again.items()} == {
            n: (t.dtype, t.shape) for n, t in parts.items()
        }
        torch.testing.assert_close(native.decode(stored_again, stored), after, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "adpq+", "precal+oac"])
@pytest.mark.parametrize("towards", [-100.0, 100.0])
def test_learned_rounding_moves_a_code_by_one_at_most(quantized: dict[str, Path], method: str, towards: float) -> None:
    for _, stored, parts in weights(quantized[method])[:9:4]:
        tuned = TunedWeight(stored, parts, None, TuningChoice(train="codes"))
        assert tuned.outliers is None or not tuned.outliers.requires_grad
        with torch.no_grad():
            tuned.latent += towards
        codes = [unpack(found["codes"], stored.scheme.bits, stored.shape[1]).int() for found in (parts, tuned.parts())]
        moved = (codes[1] - codes[0]).abs()
        assert int(moved.max()) == 1
        # All but those that are at the end of their grid already.
        assert float(moved.double().mean()) > 0.7


@pytest.mark.slow
def test_latent_weights_begin_at_the_original_where_codes_allow(quantized: dict[str, Path]) -> None:
    originals = open_checkpoint(quantized["model"])
    module, stored, parts = weights(quantized["rtn"])[0]
    with FileReader() as reader:
        original = reader.tensor(originals.entries[f"{module}.weight"]).float()
    tuned = TunedWeight(stored, parts, original, TuningChoice())
    latent = (tuned.latent * tuned.step).view(stored.shape)
    decoded = native.decode(parts, stored)
    margin = 0.3 * tuned.step.expand_as(tuned.latent).reshape(stored.shape)
    expected = torch.maximum(torch.minimum(original, decoded + margin), decoded - margin)
    torch.testing.assert_close(latent, expected, rtol=0, atol=1e-6)
    assert 0.5 < float((latent - original).abs().lt(1e-6).float().mean()) < 0.9


@pytest.mark.parametrize("method", PRESETS)
def test_codes_and_outliers_stay_where_only_scales_are_trained(quantized: dict[str, Path], method: str) -> None:
    torch.manual_seed(0)
    for _, stored, parts in weights(quantized[method])[:9:4]:
        tuned = TunedWeight(stored, parts, None, TuningChoice(train="scales"))
        tuned.decoded().square().sum().backward()
        with torch.no_grad():
            tuned.gain *= 1 + 0.4 * torch.rand_like(tuned.gain)
            if tuned.offset is not None:
                tuned.offset += torch.rand_like(tuned.offset)
        after = tuned.parts()
        held = {"codes", "second", "salient", "outlier_codes", "outlier_values", "outlier_positions"} & parts.keys()
        assert all(torch.equal(after[name], parts[name]) for name in held)
        assert not torch.equal(after["scales"], parts["scales"])


@pytest.mark.parametrize(("method", "top"), [("adpq", 3), ("rtn", 3), ("precal+oac", 4), ("precal+oac 1 bit", 2)])
@pytest.mark.parametrize("train", ["all", "scales"])
def test_gradients_of_scales_and_offsets_are_damped(
    quantized: dict[str, Path], method: str, top: int, train: str
) -> None:
    """Against differences of the loss: sums of gradients of weights over a group, divided by sqrt(g top)."""
    torch.manual_seed(0)
    _, stored, parts = weights(quantized[method])[0]
    tuned = TunedWeight(stored, parts, None, TuningChoice(train=train))
    if method == "adpq" and train == "all":
        # A minimum is moved by what is beyond its grid.
        tuned.latent.data += 100.0
    change = torch.randn(stored.shape)
    (tuned.decoded() * change).sum().backward()
    core = change.clone().view(-1)
    if tuned.outliers is not None:
        core[tuned.places] = 0.0
    size = stored.scheme.group_size
    grouped, damping = core.view(stored.shape[0], -1, size), (stored.scheme.group_size * top) ** -0.5
    if tuned.offset is not None and (method == "adpq" or train == "scales"):
        # In steps for minima; a zero-point's gradient is that of -scale for codes that stay.
        unit = tuned.step if method == "adpq" else -tuned.first
        expected = grouped.sum(dim=-1, keepdim=True) * unit * damping
        assert tuned.offset.grad is not None
        torch.testing.assert_close(tuned.offset.grad, expected, rtol=1e-4, atol=1e-6)
    if train == "scales":
        values = native.decode(parts, stored).view_as(grouped) - (tuned.first_offset if method == "adpq" else 0.0)
        assert tuned.gain.grad is not None
        expected = (grouped * values).sum(dim=-1, keepdim=True) * damping
        torch.testing.assert_close(tuned.gain.grad, expected.view_as(tuned.gain.grad), rtol=1e-3, atol=1e-5)
