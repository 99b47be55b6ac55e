"""What a target cannot hold is named with its option, and with what to give; fewbit's own format is a target."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import folder_bytes, run_cli
from gguf_models import build

import fewbit
from fewbit.errors import FewbitError
from fewbit.exports.table import TARGETS
from fewbit.grids.table import GRIDS

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("messages") / "model", "llama", intermediate_size=128)


def said(model: Path, target: str, method: str, choices: dict[str, Any]) -> str:
    try:
        return " ".join(fewbit.plan(model, method, target=target, **choices)["problems"])
    except FewbitError as error:
        return str(error)


DOWN = "'*.down_proj'"
CHOICES: list[tuple[str, dict[str, Any], str]] = [
    ("transformers", {"scale_format": "two-level"}, "does not hold two-level scales: leave out --scale-format"),
    ("vllm", {"scale_format": "two-level"}, "does not hold two-level scales: leave out --scale-format"),
    ("transformers", {"set": ["*.down_proj:scale_format=two-level"]}, f"leave out scale_format in --set {DOWN}"),
    ("transformers", {"set": ["*.down_proj:grid=normal-float"]}, f"leave out grid in --set {DOWN} or give zero-point"),
    ("gptq", {"set": ["*.down_proj:outliers=adaptive-lasso"]}, f"hold outliers: leave out outliers in --set {DOWN}"),
    ("awq", {"set": ["*.down_proj:bits=3"]}, f"hold 3 bits: leave out bits in --set {DOWN} or give 4"),
    ("awq", {"group_size": "16"}, "hold groups of 16: leave out --group-size or give 128, 64 or 32"),
    ("mlx", {"group_size": "16"}, "hold groups of 16: leave out --group-size"),
    (
        "gptq",
        {"set": ["*.down_proj:grid=normal-float,scale_format=two-level"]},
        f"two-level scales and the grid normal-float: leave out scale_format in --set {DOWN} and grid in --set {DOWN}",
    ),
    ("llama.cpp", {"scale_format": "two-level"}, "its types have scales of their own: leave out --scale-format"),
    ("llama.cpp", {"group_size": "16"}, "its types have groups of their own: leave out --group-size"),
    ("llama.cpp", {"outlier_fraction": 0.01}, "holds no outliers: leave out --outlier-fraction"),
    ("llama.cpp", {"set": ["*.down_proj:bits=3"]}, "name the type in place of bits, as in  --set '*.down_proj:grid="),
    ("llama.cpp", {"set": ["*.down_proj:grid=normal-float"]}, f"leave out grid in --set {DOWN} or give q4_0"),
]


@pytest.mark.parametrize(("target", "choices", "says"), CHOICES)
def test_the_option_and_what_to_give(model: Path, target: str, choices: dict[str, Any], says: str) -> None:
    found = said(model, target, "adpq+", choices)
    assert says in found and found.startswith(f"--for {target}: ")


@pytest.mark.parametrize("target", [name for name, one in TARGETS.items() if one.format is not None])
def test_a_method_with_a_grid_of_its_own(model: Path, target: str) -> None:
    found = said(model, target, "billm", {"calibration": "random-tokens"})
    assert found.startswith(f"--for {target}: does not hold the binary grid of billm: use another --method")


def test_fewbits_own_format_is_a_target(model: Path, tmp_path: Path) -> None:
    run_cli("quantize", model, tmp_path / "a", "--for", "fewbit", "--bits", 3, "--shard-size", "1GB")
    run_cli("quantize", model, tmp_path / "b", "--bits", 3, "--shard-size", "1GB")
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["quant_method"] == "fewbit"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    planned = json.loads(run_cli("plan", model, "--for", "fewbit", "--grid", "normal-float", "--json").stdout)
    assert not planned["problems"]
    assert next(iter(TARGETS)) == "fewbit" and {grid.choice for grid in GRIDS.values()} == {*TARGETS["fewbit"].grids}


def test_packed_embeddings_that_grow_are_said(model: Path, tmp_path: Path) -> None:
    run_cli("quantize", model, tmp_path / "packed", "--grid", "q4_0", "--method", "rtn")
    kept = run_cli("export", tmp_path / "packed", tmp_path / "kept").stdout
    assert "in 16 bits: --embeddings q8_0 rounds them again and takes 0.0 MB" in kept
    small = run_cli("export", tmp_path / "packed", tmp_path / "small", "--embeddings", "q8_0").stdout
    assert "--embeddings" not in small
    sizes = [(tmp_path / name / f"{name}.gguf").stat().st_size for name in ("kept", "small")]
    assert sizes[0] - sizes[1] == 320 * 64 * 2 - 320 * 2 * 34
    assert "--embeddings" not in run_cli("export", model, tmp_path / "plain").stdout


def test_with_a_calibration_set_it_takes_the_best_method(model: Path, tmp_path: Path) -> None:
    options = ["--calibration", "random-tokens", "--samples", 2, "--sequence-length", 16]
    run_cli("quantize", model, tmp_path / "out", "--for", "fewbit", *options)
    assert json.loads((tmp_path / "out" / "fewbit_report.json").read_text())["method"] == "precal+oac"
