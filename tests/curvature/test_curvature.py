"""Curvature against sums computed by an independent route, and its store."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, run_cli
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewbit
from fewbit.architecture.coverage import cover
from fewbit.architecture.network import Site, find_blocks, find_sites
from fewbit.calibration.choice import CalibrationChoice
from fewbit.checkpoints.source import open_checkpoint
from fewbit.curvature.accumulate import Accumulator
from fewbit.curvature.choice import CurvatureChoice
from fewbit.curvature.fisher import measure_fisher
from fewbit.curvature.observe import watching
from fewbit.curvature.store import open_curvature
from fewbit.errors import FewbitError
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.measure_curvature import measure
from fewbit.pipeline.run import RunOptions
from fewbit.runtime.load import load


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Any], list[Site]]:
    folder = build_tiny(tmp_path_factory.mktemp("curvature") / "model", dtype="float32")
    model = load(folder, dtype=torch.float32, device="cpu")
    blocks = list(find_blocks(model))
    checkpoint = open_checkpoint(folder)
    tensors = cover(checkpoint.entries.values(), checkpoint.config).of("quantize")
    return model, blocks, [site for block in find_sites(blocks, tensors, None) for site in block]


IDS = torch.randint(2, 256, (3, 24), generator=torch.Generator().manual_seed(1))


def by_autograd(model: Any, site: Site) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Per sequence: the weight's gradient of the summed loss, the layer's inputs, its output gradients; float64."""
    model = model.double()
    gradients, inputs, outputs = [], [], []
    for sequence in IDS:
        seen: list[Tensor] = []

        def note(module: Any, args: Any, out: Tensor, seen: list[Tensor] = seen) -> None:
            out.retain_grad()
            seen.extend([args[0].detach(), out])

        weight = site.watched.weight
        weight.requires_grad_(True)
        weight.grad = None
        handle = site.watched.module.register_forward_hook(note)
        logits = model(sequence[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, sequence[1:], reduction="sum").backward()
        handle.remove()
        assert weight.grad is not None
        assert seen[1].grad is not None
        gradients.append(weight.grad.clone())
        inputs.append(seen[0][0])
        outputs.append(seen[1].grad[0])
    model.zero_grad()
    model.float()
    return gradients, inputs, outputs


@pytest.mark.slow
@pytest.mark.parametrize("terms", ["sequence", "token"])
def test_fisher_is_the_sum_over_per_sequence_gradients(network: Any, terms: str) -> None:
    model, blocks, sites = network
    for site in (sites[0], sites[6], sites[-1]):
        gradients, inputs, outputs = by_autograd(model, site)
        layers = [s.watched for s in sites]
        found, loss = measure_fisher(model, blocks, layers, IDS, CurvatureChoice("fisher", terms))
        if terms == "sequence":
            expected = sum(g.T @ g for g in gradients)
        else:
            expected = sum((x * d.norm(dim=1, keepdim=True) ** 2).T @ x for x, d in zip(inputs, outputs, strict=True))
        measured = found.curvature(site.watched.key)
        assert measured is not None
        assert measured.dtype == torch.float32
        assert torch.allclose(measured.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
        assert 4 < loss < 8
        diagonal, _ = measure_fisher(model, blocks, layers, IDS, CurvatureChoice("fisher", terms, diagonal=True))
        kept = diagonal.curvature(site.watched.key)
        assert kept is not None
        assert torch.allclose(kept, measured.diagonal(), rtol=1e-3)


@pytest.mark.parametrize("terms", ["sequence", "token"])
def test_a_share_of_the_gram_is_weighed_by_the_traces_so_far(terms: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = Accumulator(CurvatureChoice("fisher", terms, gram_share=0.25))
    expected, fisher, gram = torch.zeros(6, 6).double(), 0.0, 0.0
    for size in (1.0, 0.01, 3.0):
        x, d = torch.randn(40, 6, generator=generator), size * torch.randn(40, 5, generator=generator)
        d[-1] = 0
        mixed.observe("layer", x, d)
        x, d = x.double(), d.double()
        rows = d.T @ x if terms == "sequence" else x * d.norm(dim=1, keepdim=True)
        fisher, gram = fisher + float((rows**2).sum()), gram + float((x**2).sum())
        expected += rows.T @ rows + 0.25 / 0.75 * fisher / gram * x.T @ x
    found = mixed.curvature("layer")
    assert found is not None
    assert torch.allclose(found.double(), expected, rtol=1e-4)


def test_equal_parts_of_two_steady_sums_have_equal_mean_diagonals() -> None:
    generator = torch.Generator().manual_seed(1)
    plain, mixed = (Accumulator(CurvatureChoice("fisher", "token", gram_share=share)) for share in (0.0, 0.5))
    for _ in range(8):
        x, d = torch.randn(256, 8, generator=generator), 1e-4 * torch.randn(256, 4, generator=generator)
        plain.observe("layer", x, d)
        mixed.observe("layer", x, d)
    ratio = float(mixed.sums["layer"].trace() / plain.sums["layer"].trace())
    assert ratio == pytest.approx(2.0, rel=0.02)


def test_fisher_leaves_the_model_as_it_was(network: Any) -> None:
    model, blocks, sites = network
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    measure_fisher(model, blocks, [s.watched for s in sites], IDS, CurvatureChoice("fisher"))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert parameter.grad is None
        assert torch.equal(parameter, before[name][1])
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_fisher_of_later_blocks_alone_is_the_same(network: Any) -> None:
    model, blocks, sites = network
    late = [s.watched for s in sites if s.tensor.block == 1]
    alone, _ = measure_fisher(model, blocks[1:], late, IDS, CurvatureChoice("fisher"))
    together, _ = measure_fisher(model, blocks, [s.watched for s in sites], IDS, CurvatureChoice("fisher"))
    for layer in late:
        assert torch.equal(alone.sums[layer.key], together.sums[layer.key])


def test_running_blocks_again_changes_nothing_but_memory(network: Any) -> None:
    model, blocks, sites = network
    layers = [s.watched for s in sites]
    again, _ = measure_fisher(model, blocks, layers, IDS, CurvatureChoice("fisher", "token"), recompute=True)
    kept, _ = measure_fisher(model, blocks, layers, IDS, CurvatureChoice("fisher", "token"), recompute=False)
    for layer in layers:
        assert torch.equal(again.sums[layer.key], kept.sums[layer.key])
        assert again.tokens[layer.key] == kept.tokens[layer.key] == IDS.shape[0] * (IDS.shape[1] - 1)


def test_sampled_labels_change_the_fisher_and_are_repeatable(network: Any) -> None:
    model, blocks, sites = network
    layers = [sites[0].watched]
    sampled = CurvatureChoice("fisher", labels="sampled")
    first, _ = measure_fisher(model, blocks, layers, IDS, sampled)
    second, _ = measure_fisher(model, blocks, layers, IDS, sampled)
    data, _ = measure_fisher(model, blocks, layers, IDS, CurvatureChoice("fisher"))
    key = layers[0].key
    assert torch.equal(first.sums[key], second.sums[key])
    assert not torch.allclose(first.sums[key], data.sums[key])


def test_gram_is_shared_by_layers_that_see_the_same_inputs(network: Any) -> None:
    model, _, sites = network
    found = Accumulator(CurvatureChoice("gram"))
    inputs: dict[str, list[Tensor]] = {}
    handles = [
        s.watched.module.register_forward_hook(
            lambda m, args, out, key=s.watched.key: inputs.setdefault(key, []).append(args[0][0].double())
        )
        for s in sites
    ]
    with torch.inference_mode(), watching([s.watched for s in sites], found.observe, backward=False):
        for sequence in IDS:
            model(sequence[None], use_cache=False)
    for handle in handles:
        handle.remove()
    for site in sites:
        expected = sum(x.T @ x for x in inputs[site.watched.key])
        measured = found.curvature(site.watched.key)
        assert measured is not None
        assert torch.allclose(measured.double(), expected, rtol=1e-4, atol=1e-4)
    # q, k, v share one matrix, gate and up another.
    assert len(found.sums) == 2 * 4
    assert found.tokens[sites[0].watched.key] == IDS.numel()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gram", "fisher"])
def test_a_stored_curvature_gives_the_same_weights(tiny: Path, tmp_path: Path, kind: str) -> None:
    method = ["--method", "precal+oac" if kind == "fisher" else "gptq", "--bits", "3", "--group-size", "32"]
    source = ["--calibration", "random-tokens", "--samples", "4", "--sequence-length", "32"]
    run_cli("curvature", tiny, tmp_path / "kept", "--kind", kind, *source)
    run_cli("curvature", tiny, tmp_path / "kept", "--kind", kind, *source)
    run_cli("quantize", tiny, tmp_path / "stored", *method, "--curvature", tmp_path / "kept")
    extra = ["--original-inputs"] if kind == "gram" else []
    run_cli("quantize", tiny, tmp_path / "direct", *method, *source, *extra)
    stored, direct = (tmp_path / name / "model.safetensors" for name in ("stored", "direct"))
    assert stored.read_bytes() == direct.read_bytes()


@pytest.mark.slow
def test_a_stored_share_of_the_gram_serves_every_method(tiny: Path, tmp_path: Path) -> None:
    source = ["--calibration", "random-tokens", "--samples", "4", "--sequence-length", "32"]
    run_cli("curvature", tiny, tmp_path / "kept", *source)
    method = ["--method", "oac", "--bits", "3", "--group-size", "32"]
    run_cli("quantize", tiny, tmp_path / "stored", *method, "--curvature", tmp_path / "kept")
    run_cli("quantize", tiny, tmp_path / "direct", *method, *source)
    run_cli("quantize", tiny, tmp_path / "published", *method, "--gram-share", "0", *source)
    stored, direct, published = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("stored", "direct", "published")
    )
    assert stored == direct
    assert stored != published


def test_columns_are_judged_by_their_inputs_not_by_gradients_that_are_left() -> None:
    x = torch.rand(6, 4) + 0.1
    x[:, 2] = 0
    x[[0, 1, 2, 3, 5], 1] = 0
    gradients = torch.rand(6, 3) + 0.1
    gradients[[4, 5]] = 0
    # Column 1 is active at token 4 alone, whose gradient is lost; column 2 nowhere; the last token has no target.
    found = Accumulator(CurvatureChoice("fisher"), length=6)
    found.observe("layer", x, gradients)
    with pytest.raises(FewbitError, match="layer: the gradients of 1 active columns underflowed to 0"):
        found.check_gradients()
    x[4, 1], x[5, 1] = 0, 1
    found = Accumulator(CurvatureChoice("fisher"), length=6)
    found.observe("layer", x, gradients)
    found.check_gradients()


def test_tempering_divides_by_the_size_of_the_inputs() -> None:
    x = torch.randn(50, 8) * torch.logspace(-2, 3, 50).unsqueeze(1)
    for tempering in (0.5, 1.0):
        found = Accumulator(CurvatureChoice("gram", tempering=tempering))
        found.observe("layer", x, None)
        scaled = x.double() / x.double().norm(dim=1, keepdim=True) ** tempering
        assert torch.allclose(found.sums["layer"].double(), scaled.T @ scaled, rtol=1e-4, atol=1e-4)


def test_tempering_of_a_fisher_divides_inputs_and_keeps_the_gradients_weight() -> None:
    x = torch.randn(50, 8) * torch.logspace(-2, 3, 50).unsqueeze(1)
    gradients = torch.randn(50, 4) * torch.logspace(1, -1, 50).unsqueeze(1)
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    weights = gradients.double().norm(dim=1, keepdim=True) ** 2
    found = Accumulator(CurvatureChoice("fisher", "token", tempering=1.0))
    found.observe("layer", x, gradients)
    assert torch.allclose(found.sums["layer"].double(), (weights * unit).T @ unit, rtol=1e-4)
    whole = gradients.double().T @ unit
    found = Accumulator(CurvatureChoice("fisher", "sequence", tempering=1.0))
    found.observe("layer", x, gradients)
    assert torch.allclose(found.sums["layer"].double(), whole.T @ whole, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_stored_curvature_is_checked(tiny: Path, tmp_path: Path) -> None:
    source = ["--calibration", "random-tokens", "--samples", "2", "--sequence-length", "16"]
    run_cli("curvature", tiny, tmp_path / "kept", *source)
    other = build_tiny(tmp_path / "other", intermediate_size=192)
    with pytest.raises(FewbitError, match="was measured on another model"):
        open_curvature(tmp_path / "kept", open_checkpoint(other))
    merged = build_tiny(tmp_path / "merged")
    weights = load_file(next(merged.glob("*-00003-*")))
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 0.01}, next(merged.glob("*-00003-*")), {"format": "pt"})
    with pytest.raises(FewbitError, match=r"was measured on another model \(its sample differs\)"):
        open_curvature(tmp_path / "kept", open_checkpoint(merged))
    with pytest.raises(FewbitError, match="contains no curvature: make one with"):
        open_curvature(tmp_path, open_checkpoint(tiny))
    for arguments, message in (
        (["--method", "gptq"], "contains a fisher, but gptq needs a gram"),
        (
            ["--method", "oac", "--fisher-terms", "sequence"],
            "its Fisher was measured with terms 'token', not 'sequence'",
        ),
        (["--method", "oac", "--tempering", "1"], "was measured with tempering 0, not 1: pass --tempering 0"),
        (["--method", "oac", "--gram-share", "0.3"], "a Gram share of 0.5, not 0.3: measure again with"),
        (
            ["--method", "oac+billm"],
            "a Gram share of 0.5, not 0: measure again with  fewbit curvature … --gram-share 0",
        ),
        (["--method", "oac", "--samples", "3"], "--samples: with --curvature nothing is measured"),
        (["--method", "oac", "--memory", "1GB"], "--memory: with --curvature nothing is measured"),
    ):
        result = run_cli("quantize", tiny, tmp_path / "out", *arguments, "--curvature", tmp_path / "kept", code=2)
        assert message in result.stderr
    run_cli("curvature", tiny, tmp_path / "thin", "--kind", "gram", "--gram-share", "0", "--diagonal", *source)
    result = run_cli("quantize", tiny, tmp_path / "out", "--method", "gptq", "--curvature", tmp_path / "thin", code=2)
    assert (
        "contains only diagonals, with which gptq would do no more than rounding: measure again without --diagonal"
        in result.stderr
    )
    block = tmp_path / "kept" / "block-00001.safetensors"
    whole = block.read_bytes()
    block.unlink()
    with pytest.raises(FewbitError, match="block 2 is not measured: run the same fewbit curvature command again"):
        open_curvature(tmp_path / "kept", open_checkpoint(tiny))
    block.write_bytes(whole)
    description = tmp_path / "kept" / "fewbit_curvature.json"
    description.write_text(description.read_text().replace('"version": 2', '"version": 9'))
    with pytest.raises(FewbitError, match="curvature version 9, but this fewbit reads 2: measure it again"):
        open_curvature(tmp_path / "kept", open_checkpoint(tiny))
    description.write_text("{}")
    with pytest.raises(FewbitError, match="damaged"):
        open_curvature(tmp_path / "kept", open_checkpoint(tiny))


@pytest.mark.slow
def test_what_was_left_out_is_named_before_anything_is_solved(tiny: Path, tmp_path: Path) -> None:
    text = CalibrationOptions(CalibrationChoice("random-tokens", 2, 16))
    wanted = fewbit.preset("gptq").curvature
    assert wanted is not None
    left_out = ("*.layers.0.*", "*.1.mlp.down_proj.weight")
    measure(tiny, tmp_path / "kept", wanted, text, exclude=left_out)
    stored = CalibrationOptions(stored=open_curvature(tmp_path / "kept", open_checkpoint(tiny)))
    message = r"has no curvature for .*layers\.0\..* … \(8 weights\), because they were left out of the measurement"
    with pytest.raises(FewbitError, match=message):
        fewbit.quantize(tiny, tmp_path / "out", fewbit.preset("gptq"), RunOptions(calibration=stored))
    assert not list((tmp_path / ".out.fewbit-partial").glob("*.solved"))
    same = fewbit.preset("gptq", exclude=left_out)
    report = fewbit.quantize(tiny, tmp_path / "out", same, RunOptions(calibration=stored, overwrite=True))
    assert len(report["layers"]) == 6


@pytest.mark.parametrize(("columns", "parts"), [(1024, 1), (1100, 2), (1537, 1)])
def test_wide_sums_are_whole_and_symmetric(columns: int, parts: int) -> None:
    rows = [torch.randn(5, columns) for _ in range(4)]
    found = [Accumulator(CurvatureChoice("gram")) for _ in range(parts)]
    with torch.inference_mode():
        for index, x in enumerate(rows):
            found[index % parts].observe("layer", x, None)
    for other in found[1:]:
        found[0].add(other)
    expected = sum(x.double().T @ x.double() for x in rows)
    for _ in range(2):
        matrix = found[0].curvature("layer")
        assert matrix is not None
        assert torch.allclose(matrix.double(), expected, rtol=1e-4, atol=1e-4)
        assert torch.allclose(matrix, matrix.T, atol=1e-5)
    with torch.inference_mode():
        found[0].observe("layer", rows[0], None)
    again = found[0].curvature("layer")
    assert again is not None
    assert torch.allclose(again.double(), expected + rows[0].double().T @ rows[0].double(), rtol=1e-4, atol=1e-4)
