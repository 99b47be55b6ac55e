"""The curvature of output heads, against float64 sums by another route, and what is solved with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, byte_tokenizer, copy_folder, folder_bytes, run_cli
from safetensors.torch import load_file
from torch import Tensor

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.checkpoints.source import open_checkpoint
from fewbit.curvature.accumulate import Accumulator
from fewbit.curvature.choice import CurvatureChoice
from fewbit.formats.native import decode
from fewbit.grids.table import grid_of
from fewbit.pipeline import heads, quantize_tensor
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.calibration_tokens import calibration_set
from fewbit.pipeline.measure_curvature import measure
from fewbit.pipeline.plan import make_plan
from fewbit.pipeline.run import RunOptions
from fewbit.pipeline.solved_store import SolvedStore
from fewbit.runtime.load import load
from fewbit.runtime.unpack import unpack_modules
from fewbit.solvers.settled import settle

TEXT = CalibrationChoice("random-tokens", samples=4, sequence_length=24)
TABLE = "model.embed_tokens"
WORDS = ("--calibration", "random-tokens", "--samples", 4, "--sequence-length", 24)


def build_gemma(folder: Path) -> Path:
    """A tiny Gemma 2 with a tied head, norms that are not 1, and capped logits."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    others = {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "final_logit_softcapping": 2.0}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **others, max_position_embeddings=128))
    model.model.norm.weight.data.normal_()
    model.lm_head.weight.data.mul_(20)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


MODELS: dict[str, Callable[[Path], Path]] = {
    "tied": lambda folder: build_tiny(folder, "float32"),
    "untied": lambda folder: build_tiny(folder, "float32", tie_word_embeddings=False),
    "capped": build_gemma,
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param](tmp_path_factory.mktemp("heads") / "model")


def options(**choices: Any) -> RunOptions:
    return RunOptions(calibration=CalibrationOptions(TEXT, **choices))


def inputs_and_gradients(network: Any, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each sequence, what the head gets and the loss gradients of its outputs, by autograd in float64."""
    network = network.double()
    head, found = network.get_output_embeddings(), []
    for sequence in ids:
        seen: list[Tensor] = []

        def note(module: Any, args: Any, out: Tensor, seen: list[Tensor] = seen) -> None:
            out.retain_grad()
            seen.extend([args[0].detach()[0], out])

        head.weight.requires_grad_(True)
        handle = head.register_forward_hook(note)
        logits = network(sequence[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, sequence[1:], reduction="sum").backward()
        handle.remove()
        assert seen[1].grad is not None
        found.append((seen[0], seen[1].grad[0]))
    return found


def reference(found: list[tuple[Tensor, Tensor]], choice: CurvatureChoice) -> Tensor:
    grams = [x.T @ x for x, _ in found]
    if choice.kind == "gram":
        return torch.stack(grams).sum(dim=0)
    if choice.terms == "token":
        fishers = [(x * gradient.square().sum(dim=1, keepdim=True)).T @ x for x, gradient in found]
    else:
        fishers = [(gradient.T @ x).T @ (gradient.T @ x) for x, gradient in found]
    total, share = torch.zeros_like(grams[0]), choice.gram_share
    for index in range(len(found)):
        traces = [float(sum(one.trace() for one in part[: index + 1])) for part in (fishers, grams)]
        total += fishers[index] + share / (1 - share) * traces[0] / traces[1] * grams[index]
    return total


def ids_of(folder: Path) -> Tensor:
    return calibration_set(open_checkpoint(folder), TEXT, load(folder, device="cpu")).ids


@pytest.mark.parametrize(
    "choice",
    [
        CurvatureChoice("gram"),
        CurvatureChoice("fisher", "token"),
        CurvatureChoice("fisher", "sequence"),
        CurvatureChoice("fisher", "token", gram_share=0.5),
    ],
    ids=lambda choice: f"{choice.kind}-{choice.terms}-{choice.gram_share}",
)
def test_the_curvature_of_a_head_is_that_of_the_reference(model: Path, tmp_path: Path, choice: CurvatureChoice) -> None:
    measure(model, tmp_path / "kept", choice, CalibrationOptions(TEXT))
    found = load_file(tmp_path / "kept" / "head.safetensors")["head"].double()
    expected = reference(inputs_and_gradients(load(model, device="cpu"), ids_of(model)), choice)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.diagonal().mean()))


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("diagonal", [False, True])
def test_tall_layers_need_no_gradient_matrix(share: float, diagonal: bool) -> None:
    choice = CurvatureChoice("fisher", "sequence", diagonal=diagonal, gram_share=share)
    whole, tall = Accumulator(choice), Accumulator(choice)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x, gradient = (torch.randn(9, columns, generator=generator) for columns in (4, 20))
        whole.observe("layer", x, gradient)
        # Zeros add nothing but outputs.
        tall.observe("layer", x, torch.cat([gradient, torch.zeros(9, 300)], dim=1))
    assert torch.allclose(whole.sums["layer"], tall.sums["layer"], rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_a_gram_is_that_of_the_quantized_blocks(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Tensor] = []
    put = SolvedStore.put_curvature

    def note(store: SolvedStore, name: str, matrix: Tensor | None) -> None:
        assert matrix is not None
        found.append(matrix.double())
        put(store, name, matrix)

    monkeypatch.setattr(SolvedStore, "put_curvature", note)
    fewbit.quantize(model, tmp_path / "out", fewbit.preset("gptq", bits=2, group_size="32"), options())
    low, network = unpack_modules(load(tmp_path / "out", device="cpu")), load(model, device="cpu")
    own = dict(network.named_parameters())
    for name, parameter in low.named_parameters():
        if ".layers." in name:
            own[name].data.copy_(parameter.data)
    expected = reference(inputs_and_gradients(network, ids_of(model)), CurvatureChoice("gram"))
    assert len(found) == 1
    assert torch.allclose(found[0], expected, rtol=1e-3, atol=1e-4 * float(expected.diagonal().mean()))


def damped(matrix: Tensor) -> Tensor:
    return matrix + heads.SOLVER.damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)


def compensated(weight: Tensor, matrix: Tensor, quantize: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Column after column in float64, with the inverse of what is left computed anew for each."""
    weight, out = weight.clone(), weight.clone()
    left = torch.argsort(matrix.diagonal(), descending=True, stable=True).tolist()
    while left:
        inverse = torch.linalg.inv(matrix[left][:, left])
        first = left.pop(0)
        out[:, first] = quantize(weight[:, first].float(), first).double()
        error = (weight[:, first] - out[:, first]) / inverse[0, 0]
        weight[:, left] -= error.unsqueeze(1) * inverse[0, 1:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "at_once"), [(3, 1 << 22), (6, 64 * 50)])
def test_a_solved_table_is_that_of_the_reference(
    model: Path, tmp_path: Path, bits: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_tensor, "_SOLVED_AT_ONCE", at_once)
    choice = CurvatureChoice("gram")
    measure(model, tmp_path / "kept", choice, CalibrationOptions(TEXT))
    recipe = fewbit.preset("gptq", bits=4, embedding_bits=bits)
    words = ("--method", "gptq", "--bits", 4, "--embedding-bits", bits, "--curvature", tmp_path / "kept")
    said = run_cli("quantize", model, tmp_path / "out", *words).stdout
    plan = make_plan(open_checkpoint(model), recipe)
    item = plan.tables[-1] if "lm_head.weight" in open_checkpoint(model).entries else plan.tables[0]
    assert f"{item.tensor.entry.name}: solved" in said
    written = all_tensors(tmp_path / "out")
    parts = {name.rpartition(".")[2]: one for name, one in written.items() if name.startswith(f"{item.tensor.module}.")}
    parts.pop("weight")
    found = decode(parts, item.stored).double()
    weight = all_tensors(model)[item.tensor.entry.name]
    matrix = damped(load_file(tmp_path / "kept" / "head.safetensors")["head"].double())
    costs = 1 / torch.linalg.inv(matrix).diagonal()
    values = settle(weight, item.choices, None, (costs / costs.mean()).float()).core.values
    size, grid = item.stored.scheme.group_size, grid_of(item.stored.scheme)

    def rounded(column: Tensor, index: int) -> Tensor:
        here = {name: value[:, index // size] for name, value in values.items()}
        return grid.round(column.unsqueeze(1), here, item.stored.scheme)[:, 0]

    expected = compensated(weight.double(), matrix, rounded)
    # Where a weight is halfway between two levels, float32 may choose another, and later columns compensate for it.
    same = (found - expected).abs() < 1e-6
    assert float(same.double().mean()) > 0.98
    lost = [float(((one - weight).double() @ matrix * (one - weight).double()).sum()) for one in (found, expected)]
    assert lost[0] == pytest.approx(lost[1], rel=0.02)
    values = settle(weight, item.choices, None, None).core.values
    plain = grid.round(weight.view(len(weight), -1, size), values, item.stored.scheme).view(weight.shape).double()
    assert lost[0] < 0.9 * float(((plain - weight) @ matrix * (plain - weight)).sum())
    record = json.loads((tmp_path / "out" / "fewbit_report.json").read_text())["embeddings"][-1]
    assert record["path"] == "solved" and 0 < record["relative_curvature_error"] < 0.1


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.slow
def test_only_the_head_is_solved_and_only_by_methods_that_compensate(model: Path, tmp_path: Path) -> None:
    untied = "lm_head.weight" in open_checkpoint(model).entries
    parts = {}
    for method, text in (("rtn", ()), ("awq", WORDS), ("gptq", WORDS), ("precal+oac", WORDS)):
        run_cli("quantize", model, tmp_path / method, "--method", method, "--bits", 3, *text)
        every = all_tensors(tmp_path / method)
        parts[method] = {
            table: {name: one for name, one in every.items() if name.startswith(f"{table}.")}
            for table in (TABLE, "lm_head")
        }

    def same(method: str, table: str) -> bool:
        one, other = parts[method][table], parts["rtn"][table]
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    assert same("awq", TABLE) and same("awq", "lm_head")
    for method in ("gptq", "precal+oac"):
        assert same(method, TABLE) == untied and same(method, "lm_head") != untied


@pytest.mark.slow
@pytest.mark.parametrize(("method", "refresh", "written"), [("gptq", 0, False), ("oac", 0, True), ("oac", 1, False)])
def test_a_run_that_ends_at_the_head_goes_on_to_the_same_bytes(
    tiny: Path, tmp_path: Path, method: str, refresh: int, written: bool
) -> None:
    recipe = fewbit.preset(method, bits=3, group_size="32")
    fewbit.quantize(tiny, tmp_path / "straight", recipe, options(refresh=refresh))
    put = SolvedStore.put_curvature

    def ends(store: SolvedStore, name: str, matrix: Tensor | None) -> None:
        if written:
            put(store, name, matrix)
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SolvedStore, "put_curvature", ends)
        with pytest.raises(MemoryError):
            fewbit.quantize(tiny, tmp_path / "out", recipe, options(refresh=refresh))
    fewbit.quantize(tiny, tmp_path / "out", recipe, options(refresh=refresh))
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "straight")


def test_any_number_of_workers_gives_the_same_bytes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_tensor, "_SOLVED_AT_ONCE", 64 * 30)
    recipe = fewbit.preset("gptq", bits=4, embedding_bits=4)
    for workers in (1, 3):
        run = RunOptions(workers=workers, calibration=CalibrationOptions(TEXT))
        fewbit.quantize(tiny, tmp_path / str(workers), recipe, run)
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "3")


@pytest.mark.parametrize("kind", ["gram", "fisher"])
def test_folders_of_earlier_versions_have_no_head_and_get_one(tiny: Path, tmp_path: Path, kind: str) -> None:
    made = ("curvature", tiny, tmp_path / "kept", "--kind", kind, *WORDS)
    run_cli(*made)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    old = copy_folder(tmp_path / "kept", tmp_path / "old")
    (old / "head.safetensors").unlink()
    method = ("--method", "oac" if kind == "fisher" else "gptq", "--bits", 3)
    result = run_cli("quantize", tiny, tmp_path / "out", *method, "--curvature", old)
    assert f"{TABLE}.weight: rounded: the stored curvature has none of the head; the same `fewb" in result.stdout
    run_cli("quantize", tiny, tmp_path / "free", "--method", "rtn", "--bits", 3)
    out, free = all_tensors(tmp_path / "out"), all_tensors(tmp_path / "free")
    names = [name for name in free if name.startswith(TABLE)]
    assert len(names) > 1 and all(torch.equal(out[name], free[name]) for name in names)
    run_cli("curvature", tiny, old, "--kind", kind, *WORDS)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == whole


def test_a_head_with_values_that_are_not_finite_is_kept(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = build_tiny(tmp_path / "model", shard_size="1GB", tie_word_embeddings=False)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][255, 3] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    recipe = fewbit.preset("gptq", bits=4, embedding_bits=4)
    report = fewbit.quantize(folder, tmp_path / "out", recipe, options())
    assert [table["name"] for table in report["embeddings"]] == [f"{TABLE}.weight"]
    assert {one["name"]: one["reason"] for one in report["kept"]}["lm_head.weight"].startswith("has a weight that is")
