"""Types of a block by layer: llama.cpp's mixtures, and what loses least among types of one size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_cli
from gguf_models import build
from test_gguf_file import read

from fewbit.checkpoints.source import open_checkpoint
from fewbit.exports.gguf_mixtures import MIXTURES
from fewbit.exports.least_loss import Fit, least_loss
from fewbit.exports.llama_cpp_target import fit
from fewbit.grids.grid import ScaleSearch
from fewbit.pipeline.plan import cover_original, scheme_for
from fewbit.recipe_choices import recipe_from_choices
from fewbit.solvers.settled import WeightChoices, round_rows

SPREAD = {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29}
# What `llama-quantize --dry-run` of llama.cpp 0.7 prints for a Llama of 30 blocks: the blocks that have another type.
PRINTED: dict[str, dict[str, dict[str, set[int]]]] = {
    "q2_k_s": {"down_proj": {"q4_k": {0, 1, 2}}},
    "q2_k_m": {name: {"q3_k": set(range(30))} for name in ("o_proj", "v_proj", "down_proj")},
    "q3_k_s": {},
    "q3_k_m": {
        "o_proj": {"q4_k": set(range(30))},
        "v_proj": {"q5_k": {0, 1}, "q4_k": set(range(2, 30))},
        "down_proj": {"q5_k": {0}, "q4_k": set(range(1, 30))},
    },
    "q3_k_l": {name: {"q5_k": set(range(30))} for name in ("o_proj", "v_proj", "down_proj")},
    "q4_k_s": {"v_proj": {"q5_k": {0, 1, 2, 3}}, "down_proj": {"q5_k": {0, 1, 2}}},
    "q4_k_m": {"v_proj": {"q6_k": SPREAD}, "down_proj": {"q6_k": SPREAD}},
    "q5_k_s": {},
    "q5_k_m": {"v_proj": {"q6_k": SPREAD}, "down_proj": {"q6_k": SPREAD}},
}


@pytest.mark.parametrize("name", PRINTED)
def test_mixtures_are_those_of_llama_cpp(name: str) -> None:
    assert set(PRINTED) == set(MIXTURES)
    for layer in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        for block in range(30):
            other = [grid for grid, blocks in PRINTED[name].get(layer, {}).items() if block in blocks]
            found = MIXTURES[name].grid_of(f"model.layers.{block}.mlp.{layer}", block, 30)
            assert found == (other[0] if other else name[:4])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which 256 divides the columns of down_proj only."""
    return build(tmp_path_factory.mktemp("mixed") / "model", "llama", intermediate_size=256)


def test_a_mixture_by_name(mixed: Path, tmp_path: Path) -> None:
    run_cli("quantize", mixed, tmp_path / "out", "--for", "llama.cpp", "--grid", "q3_k_m", "--method", "rtn")
    _, _, kinds = read(tmp_path / "out" / "out.gguf")
    # Two blocks: the first two have wider values, and none is in the first sixteenth.
    assert [kinds[f"blk.{block}.ffn_down.weight"] for block in (0, 1)] == ["q4_k", "q4_k"]
    assert kinds["blk.0.attn_q.weight"] == "iq4_nl" and kinds["blk.0.attn_v.weight"] == "q5_0"
    done = run_cli("plan", mixed, "--grid", "q3_k_m", code=2)
    assert "q3_k" in done.stderr


def _error(grid: str, weight: torch.Tensor) -> float:
    recipe = recipe_from_choices("rtn", {"grid": grid})
    return round_rows(
        weight, WeightChoices(scheme_for(weight.shape[1], recipe), ScaleSearch()), None, None
    ).squared_error


def test_the_type_that_loses_least(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {tensor.entry.name: tensor for tensor in cover_original(open_checkpoint(mixed), (), ()).of("quantize")}
    even = torch.arange(-8.0, 8.0).repeat(64, 16)  # what q4_0 stores exactly
    uneven = even.sign() * even.abs() ** 1.5
    for weight in (even, uneven):
        monkeypatch.setattr("fewbit.exports.least_loss._first_rows", lambda *_, weight=weight: weight)
        few = {found["model.layers.0.mlp.down_proj.weight"]: Fit("q4_k", "said", ("q4_0", "iq4_nl"))}
        errors = {grid: _error(grid, weight) for grid in ("q4_k", "q4_0", "iq4_nl")}
        best = least_loss(few)["model.layers.0.mlp.down_proj.weight"]
        assert best == Fit(min(errors, key=lambda grid: errors[grid]), "said")
    assert errors["q4_0"] > errors[best.grid or ""]


def test_layers_of_a_kind_have_one_type_and_transposed_ones_are_turned(mixed: Path) -> None:
    tensors = cover_original(open_checkpoint(mixed), (), ()).of("quantize")
    fits = {tensor: fit(tensor, 4) for tensor in tensors}
    grids: dict[str, set[Any]] = {}
    for name, found in least_loss(fits).items():
        grids.setdefault(name.split(".", 3)[3], set()).add(found.grid)
    assert all(len(found) == 1 for found in grids.values())
    square = next(tensor for tensor in tensors if "q_proj" in tensor.entry.name)
    turned = replace(square, transposed=True)
    assert least_loss({turned: Fit("iq4_nl", "", ("q4_0",))})[square.entry.name].grid in ("iq4_nl", "q4_0")


@pytest.mark.parametrize(
    ("choices", "kind"),
    [((), "q8_0"), (("--embedding-bits", 6), "q6_k"), (("--embedding-bits", 16), "bf16"), (("--bits", 2), "q6_k")],
)
def test_embeddings_have_the_bits_that_are_asked_for(choices: tuple[Any, ...], kind: str, tmp_path: Path) -> None:
    model = build(tmp_path / "model", "llama", hidden_size=256, intermediate_size=256)
    run_cli("quantize", model, tmp_path / "out", "--for", "llama.cpp", "--method", "rtn", *choices)
    assert read(tmp_path / "out" / "out.gguf")[2]["token_embd.weight"].lower() == kind.lower()
