"""`--for gptq`, `--for awq` and `--for mlx`: recipes whose grids the formats hold."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import run_cli
from integer_models import build, numbers, tensors_of

import fewbit
from fewbit.errors import FewbitError
from fewbit.grids.scale_formats import SCALE_FORMATS

DATA = ("--calibration", "random-tokens", "--samples", 4, "--sequence-length", 32, "--max-fallback", 99)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which 128 divides the columns of down_proj only."""
    return build(tmp_path_factory.mktemp("targets") / "model", hidden_size=64)


def described(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text())["quantization_config"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), [("gptq", 2), ("gptq", 3), ("gptq", 8), ("awq", 4), ("mlx", 3), ("mlx", 6)])
def test_a_folder_in_one_go(name: str, bits: int, model: Path, tmp_path: Path) -> None:
    done = run_cli("quantize", model, tmp_path / "out", "--for", name, "--bits", bits, "--json")
    data = json.loads(done.stdout)
    assert data["report"]["export"]["for"] == name
    assert data["models"][0]["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    found = described(tmp_path / "out")
    assert (found["bits"], found["group_size"]) == (bits, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    recipe = data["report"]["recipe"]
    assert (recipe["method"], recipe["outliers"], recipe["embedding_bits"]) == ("adpq+", "none", 16)
    assert recipe["search"] is not None
    again = run_cli("quantize", model, tmp_path / "out", "--for", name, code=2)
    assert "already exists" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq", "awq", "mlx"])
def test_with_data_the_best_method_and_own_choices(name: str, model: Path, tmp_path: Path) -> None:
    more = ("--group-size", 32, "--exclude", "model.layers.0.mlp.up_proj.weight")
    run_cli("quantize", model, tmp_path / "out", "--for", name, *DATA, *more)
    report = json.loads((tmp_path / "out" / "fewbit_report.json").read_text())
    assert report["recipe"]["method"] == "precal+oac"
    assert described(tmp_path / "out")["group_size"] == 32
    tensors = tensors_of(tmp_path / "out")
    assert "model.layers.0.mlp.up_proj.weight" in tensors
    assert numbers(tensors["model.layers.1.mlp.up_proj.scales"]).size == 256 * 2


def test_the_largest_group_size_that_fits(tmp_path: Path) -> None:
    folder = build(tmp_path / "model", num_hidden_layers=1)
    run_cli("quantize", folder, tmp_path / "gptq", "--for", "gptq")
    assert described(tmp_path / "gptq")["group_size"] == 128
    run_cli("quantize", folder, tmp_path / "mlx", "--for", "mlx")
    assert described(tmp_path / "mlx")["group_size"] == 64
    narrow = build(tmp_path / "narrow", num_hidden_layers=1, intermediate_size=144)
    done = run_cli("quantize", narrow, tmp_path / "kept", "--for", "gptq")
    assert "1 of 7 layers: none of the group sizes 128, 64 or 32 divides 144 columns: kept in 16 bits" in done.stderr
    assert described(tmp_path / "kept")["group_size"] == 128
    assert described(tmp_path / "kept")["dynamic"] == {r"-:model\.layers\.0\.mlp\.down_proj$": {}}


@pytest.mark.parametrize(
    ("name", "choices", "says"),
    [
        ("gptq", {"bits": 5}, "holds 2, 3, 4 or 8 bits, not 5"),
        ("awq", {"bits": 3}, "holds 4 bits, not 3"),
        ("mlx", {"bits": 7}, "holds 2, 3, 4, 5, 6 or 8 bits, not 7"),
        ("gptq", {"grid": "normal-float"}, "holds the grids .*symmetric, not normal-float"),
        ("gptq", {"symmetric": False}, "which are all symmetric"),
        ("gptq", {"outlier_fraction": 0.01}, "holds no outliers: leave out --outlier-fraction"),
        ("mlx", {"embedding_bits": 8}, "has embeddings and head in 16 bits: leave out --embedding-bits"),
        ("mlx", {"scale_format": "float32"}, "holds scales in float16 for this model, not float32"),
        ("awq", {"group_size": "16"}, "awq does not hold"),
        ("awq", {"set": {"*.down_proj.weight": {"bits": 8}}}, "awq does not hold"),
        ("gptq", {"set": {"*.down_proj.weight": {"bits": 8}}}, "has 8 bits in groups of 64, most others 4 bits"),
        ("mlx", {"set": {"*.down_proj.weight": {"bits": 7}}}, "down_proj.weight: mlx does not hold"),
    ],
)
def test_choices_that_a_format_does_not_hold(
    name: str, choices: dict[str, Any], says: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(FewbitError, match=f"--for {name}: .*{says}"):
        fewbit.quantize(model, tmp_path / "out", target=name, **choices)
    assert not list(tmp_path.iterdir())


def test_both_ways_to_name_a_grid(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitError, match="either --grid or --symmetric"):
        fewbit.quantize(model, tmp_path / "out", target="mlx", grid="symmetric", symmetric=True)
    fewbit.quantize(model, tmp_path / "out", target="awq", symmetric=True, method="rtn")
    zeros = tensors_of(tmp_path / "out")["model.layers.0.mlp.up_proj.qzeros"]
    assert (zeros.to(dtype=zeros.dtype) == -0x77777778).all()


def test_models_in_bfloat16(tmp_path: Path) -> None:
    folder = build(tmp_path / "model", "bfloat16", num_hidden_layers=1)
    with pytest.raises(FewbitError, match=r"not float16|fewbit has none in bfloat16"):
        fewbit.quantize(folder, tmp_path / "out", target="mlx", scale_format="float16")
    if "bfloat16" in SCALE_FORMATS:
        for name in ("gptq", "awq", "mlx"):
            fewbit.quantize(folder, tmp_path / name, target=name)
            assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "bfloat16"


def test_plan(model: Path) -> None:
    planned = json.loads(run_cli("plan", model, "--for", "gptq", "--bits", 3, "--json").stdout)
    assert planned["exports"]["gptq"] is None
    assert planned["problems"] == []
    sizes = {one["name"]: one["group_size"] for one in planned["tensors"]["quantize"]}
    assert set(sizes.values()) == {64}
    done = run_cli("plan", model, "--for", "awq", "--set", "*.down_proj.weight:group_size=32", "--json")
    (problem,) = json.loads(done.stdout)["problems"]
    assert problem.startswith("--for awq: model.layers.0.mlp.down_proj.weight: has 4 bits in groups of 32")
    plain = json.loads(run_cli("plan", model, "--json").stdout)
    assert plain["exports"]["mlx"] == "cannot hold 14 of 14 weights: see --for"
