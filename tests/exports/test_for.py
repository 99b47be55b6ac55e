"""`--for`: grids chosen for a target, one file that it loads, and what is said about what it does not hold."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import run_cli
from gguf_models import build
from test_gguf_file import read

import fewbit
from fewbit.errors import FewbitError
from fewbit.exports.llama_cpp_target import fit as fit_of

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which 256 divides the columns of down_proj only."""
    return build(tmp_path_factory.mktemp("mixed") / "model", "llama", intermediate_size=256)


def fit(columns: int, bits: float) -> tuple[str | None, str]:
    tensor: Any = SimpleNamespace(matrix_shape=(8, columns))
    found = fit_of(tensor, bits)
    return found.grid, found.note


def test_types_by_bits_and_columns() -> None:
    assert [fit(512, bits)[0] for bits in (2, 3, 4, 5, 6, 7, 8)] == [
        "q2_k",
        "q3_k",
        "q4_k",
        "q5_k",
        "q6_k",
        "q8_0",
        "q8_0",
    ]
    assert [fit(64, bits)[0] for bits in (2, 3, 4, 5, 6, 8)] == ["iq4_nl", "iq4_nl", "iq4_nl", "q5_0", "q8_0", "q8_0"]
    assert fit(512, 3)[1] == fit(64, 4)[1] == ""
    assert fit(64, 3)[1] == "256 does not divide 64 columns: 4 bits in place of 3"
    assert fit(48, 4) == (None, "48 columns are no multiple of 32: kept in 16 bits")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_folder_with_one_file(bits: int, mixed: Path, tmp_path: Path) -> None:
    done = run_cli("quantize", mixed, tmp_path / "out", "--for", "llama.cpp", "--bits", bits, "--json")
    data = json.loads(done.stdout)
    assert data["report"]["export"]["for"] == "llama.cpp"
    assert data["models"][0]["bytes"] == (tmp_path / "out" / "out.gguf").stat().st_size
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "fewbit_report.json",
        "fewbit_run.json",
        "out.gguf",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    _, tensors, kinds = read(tmp_path / "out" / "out.gguf")
    wanted = {2: ("iq4_nl", "q2_k"), 4: ("iq4_nl", "q4_k"), 8: ("q8_0", "q8_0")}[bits]
    assert (kinds["blk.1.attn_q.weight"], kinds["blk.1.ffn_down.weight"]) == wanted
    assert kinds["token_embd.weight"] == "q8_0"
    assert ("4 bits in place of 2" in done.stderr) == (bits == 2)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


@pytest.mark.slow
def test_with_data_the_best_method_and_own_choices(mixed: Path, tmp_path: Path) -> None:
    data = ("--calibration", "random-tokens", "--samples", 4, "--sequence-length", 32, "--max-fallback", 99)
    more = ("--set", "*.o_proj:grid=q8_0", "--exclude", "model.layers.0.mlp.up_proj.weight")
    run_cli("quantize", mixed, tmp_path / "out", "--for", "llama.cpp", "--bits", 4, *data, *more)
    fields, _, kinds = read(tmp_path / "out" / "out.gguf")
    recipe = json.loads(fields["fewbit.recipe"])
    assert (recipe["method"], recipe["grid"]) == ("precal+oac", "iq4_nl")
    assert kinds["blk.0.attn_output.weight"] == "q8_0"
    assert kinds["blk.0.ffn_up.weight"] == "bf16"
    assert kinds["blk.1.ffn_up.weight"] == "iq4_nl"
    assert kinds["blk.1.ffn_down.weight"] == "q4_k"


@pytest.mark.slow
def test_tuned_in_one_go(mixed: Path, tmp_path: Path) -> None:
    data = ("--calibration", "random-tokens", "--samples", 24, "--sequence-length", 16, "--tune-epochs", 1)
    run_cli("quantize", mixed, tmp_path / "out", "--for", "llama.cpp", "--method", "rtn", "--tune", *data)
    report = json.loads((tmp_path / "out" / "fewbit_report.json").read_text())
    assert len(report["quantize"]["tuning"]["history"]["losses"]) > 0
    assert read(tmp_path / "out" / "out.gguf")[2]["blk.0.attn_q.weight"] == "iq4_nl"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_grid_by_name(mixed: Path, tmp_path: Path) -> None:
    run_cli("quantize", mixed, tmp_path / "out", "--for", "llama.cpp", "--grid", "q4_0", "--method", "rtn")
    assert read(tmp_path / "out" / "out.gguf")[2]["blk.1.ffn_down.weight"] == "q4_0"
    done = run_cli("quantize", mixed, tmp_path / "b", "--for", "llama.cpp", "--grid", "normal-float", code=2)
    assert "--for llama.cpp: holds the grids q4_0, q4_1" in done.stderr


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"target": "nothing"}, "--for must be one of fewbit, llama.cpp.*, not 'nothing'"),
        ({"target": "llama.cpp", "bits": 1}, "has no type of 1 bits: use --bits 2 or more"),
        ({"target": "llama.cpp", "recipe": "recipe.json"}, "leave out --recipe"),
        ({"target": "llama.cpp", "outlier_fraction": 0.01}, "holds no outliers: leave out --outlier-fraction"),
    ],
)
def test_choices_that_do_not_go_together(choices: dict[str, Any], says: str, mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitError, match=says):
        fewbit.quantize(mixed, tmp_path / "out", **choices)
    assert not list(tmp_path.iterdir())


def test_models_that_the_target_cannot_run(tiny: Path, tmp_path: Path) -> None:
    folder = build(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    for command in (("quantize", folder, tmp_path / "out"), ("plan", folder)):
        done = run_cli(*command, "--for", "llama.cpp", code=2)
        assert "llama.cpp does not know the activation relu" in done.stderr
    assert not (tmp_path / "out").exists()


def test_plan_says_what_can_be_exported(mixed: Path) -> None:
    plain = json.loads(run_cli("plan", mixed, "--json").stdout)
    assert plain["exports"]["gguf"] == "cannot hold 14 of 14 weights: see --for"
    planned = json.loads(run_cli("plan", mixed, "--for", "llama.cpp", "--bits", 3, "--json").stdout)
    assert planned["exports"]["gguf"] is None
    assert any("4 bits in place of 3" in problem for problem in planned["problems"])
    sizes = {one["name"]: one["bits_per_weight"] for one in planned["tensors"]["quantize"]}
    assert sizes["model.layers.0.mlp.down_proj.weight"] == 3.4375
    assert sizes["model.layers.0.mlp.up_proj.weight"] == 4.5


@pytest.mark.slow
def test_a_killed_run_goes_on_and_another_is_not_mixed_with_it(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    command = ("quantize", mixed, out, "--for", "llama.cpp", "--bits")
    with monkeypatch.context() as patch:
        patch.setattr("fewbit.exports.quantize_for.export", killed)
        run_cli(*command, 4, code=130)
    assert (tmp_path / ".out.fewbit-native" / "config.json").is_file()
    with monkeypatch.context() as patch:
        patch.setattr("fewbit.api.run_quantize", lambda *_: pytest.fail("done again"))
        run_cli(*command, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with monkeypatch.context() as patch:
        patch.setattr("fewbit.exports.quantize_for.export", killed)
        run_cli(*command, 8, "--overwrite", code=130)
    run_cli(*command, 4, "--overwrite")
    assert read(out / "out.gguf")[2]["blk.0.attn_q.weight"] == "iq4_nl"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "already exists" in run_cli(*command, 4, code=2).stderr
    (tmp_path / ".new.fewbit-native").mkdir()
    (tmp_path / ".new.fewbit-native" / "mine").write_text("mine")
    done = run_cli("quantize", mixed, tmp_path / "new", "--for", "llama.cpp", code=2)
    assert "fewbit needs this name" in done.stderr
