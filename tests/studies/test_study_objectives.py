"""The study `objectives` end to end on a tiny model."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, byte_tokenizer, run_cli
from study_cases import SMALL, kill_half_way, look_at, study_choice, without_run
from test_architectures import build
from test_evaluation import check_page

import fewbit
from fewbit.cli_study import _numbers, run_named
from fewbit.errors import FewbitError
from fewbit.evaluation.perplexity import Protocol
from fewbit.evaluation.text import read_text
from fewbit.evaluation.windows import read_windows
from fewbit.studies.objectives import STUDY
from fewbit.studies.objectives_summary import MEASURES, summarize
from fewbit.studies.registry import find_study
from fewbit.studies.run import run_study
from fewbit.studies.variants import Variant, variants

FEW: dict[str, Any] = {"methods": ("rtn", "gptq", "precal+oac"), "bits": (4, 2)}


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized folder of the tiny model that no variant is."""
    out = tmp_path_factory.mktemp("tuned") / "tuned"
    fewbit.quantize(tiny, out, fewbit.preset("rtn", bits=3, group_size="16"))
    return out


@pytest.fixture(scope="module")
def result(tiny: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("objectives") / "out"
    return out, run_study(STUDY, study_choice("objectives", tiny, out, folders=(str(folder),), **FEW))


@pytest.mark.slow
def test_rows_are_tidy_and_truths_are_those_of_eval(tiny: Path, folder: Path, result: Any) -> None:
    out, data = result
    models = {row["name"]: row for row in data["rows"] if row["table"] == "model"}
    expected = {f"{m}-{b}bit" for m in FEW["methods"] for b in FEW["bits"]}
    assert set(models) == {"original", "tuned"} | expected
    assert all(isinstance(v, str | int | float | bool | None) for row in data["rows"] for v in row.values())
    assert sorted(p.name for p in out.iterdir()) == ["cells", "job.json", "study.html", "study.json"]
    told = fewbit.evaluate([folder], out.parent / "text.txt", Protocol(48, 3), tiny)["models"][0]
    for key in ("nll", "kl_mean", "kl_p99", "top1_agreement", "bits_per_weight"):
        assert models["tuned"][key] == pytest.approx(told[key], rel=1e-9)
    assert models["tuned"]["loss_increase"] == pytest.approx(told["nll"] - models["original"]["nll"], abs=1e-9)
    assert models["tuned"]["bits"] == 3
    assert models["original"]["loss_increase"] == 0
    for method in FEW["methods"]:
        four, two = models[f"{method}-4bit"], models[f"{method}-2bit"]
        for measure in (*MEASURES, "weight_distance", "kl_mean"):
            assert 0 < four[measure] < two[measure]


@pytest.mark.slow
def test_layer_errors_are_those_of_running_the_layer(tiny: Path, folder: Path, result: Any) -> None:
    rows = {r["layer"]: r for r in result[1]["rows"] if r["table"] == "layer" and r["name"] == "tuned"}
    assert len(rows) == 14
    original, quantized = fewbit.load(tiny), fewbit.load(folder)
    windows, _ = read_windows(tiny, read_text(result[0].parent / "text.txt"), Protocol(48, 3))
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"):
        seen: list[torch.Tensor] = []
        layer = original.get_submodule(name)
        handle = layer.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0][0]))
        with torch.no_grad():
            for window in windows:
                original(window[None], use_cache=False)
        handle.remove()
        x = torch.cat(seen).double()
        w, q = layer.weight.detach().double(), quantized.get_submodule(name).weight.double()
        expected = float((x @ (q - w).T).square().sum() / (x @ w.T).square().sum())
        assert rows[f"{name}.weight"]["output_error"] == pytest.approx(expected, rel=1e-3)
        assert rows[f"{name}.weight"]["weight_error"] == pytest.approx(float((q - w).norm() ** 2 / w.norm() ** 2))
    model = next(r for r in result[1]["rows"] if r["table"] == "model" and r["name"] == "tuned")
    for measure in ("weight_error", "output_error"):
        assert model[measure] == pytest.approx(sum(r[measure] for r in rows.values()) / 14)
    assert model["predicted"] == pytest.approx(sum(r["predicted"] for r in rows.values()))


@pytest.mark.slow
def test_a_prediction_is_near_the_divergence_for_small_errors(tmp_path: Path) -> None:
    """For errors of 8 bits, and labels from the model itself, KL is the second-order term that the Fisher predicts."""
    model = build_tiny(tmp_path / "model", dtype="float32", initializer_range=0.3)
    given = {"methods": ("rtn",), "bits": (8,), "windows": 24, "sequence_length": 64}
    data = run_study(STUDY, study_choice("objectives", model, tmp_path / "out", **given))
    row = next(r for r in data["rows"] if r.get("name") == "rtn-8bit" and r["table"] == "model")
    # Random weights do not predict the text, so the empirical Fisher is larger than the true one; the scale is right.
    assert 0.3 < row["predicted"] / row["kl_mean"] < 30


@pytest.mark.slow
def test_the_page_shows_it_and_fetches_nothing(result: Any, tmp_path: Path) -> None:
    page = result[0] / "study.html"
    check_page(page)
    text = page.read_text()
    assert "precal+oac-2bit" in text
    for line in result[1]["conclusion"]:
        assert line.replace("'", "&#39;") in text
    assert text.count("<svg") >= 6
    dom = look_at(page, tmp_path)
    assert dom.count("<svg") == text.count("<svg")
    assert "Rank correlations" in dom


@pytest.mark.slow
def test_a_killed_study_goes_on_and_gives_the_same_result(tiny: Path, tmp_path: Path) -> None:
    out, straight = tmp_path / "out", tmp_path / "straight"
    few = {**FEW, "methods": ("rtn", "precal+oac")}
    kill_half_way("objectives", tiny, out, "score", 2, **few)
    assert not (out / "study.json").exists()
    finished = {p.name: p.stat().st_mtime_ns for p in (out / "cells").glob("*.json")}
    assert 2 <= len(finished) < 5
    with pytest.raises(FewbitError, match="contains a study with other arguments"):
        run_study(STUDY, study_choice("objectives", tiny, out, **{**few, "bits": (3,)}))
    run_study(STUDY, study_choice("objectives", tiny, out, **few))
    run_study(STUDY, study_choice("objectives", tiny, straight, **few))
    assert without_run(out / "study.json") == without_run(straight / "study.json")
    assert (out / "study.html").read_text() == (straight / "study.html").read_text()
    assert all((out / "cells" / name).stat().st_mtime_ns == time for name, time in finished.items())


@pytest.mark.slow
def test_a_model_with_fused_experts(tmp_path: Path) -> None:
    model = build("mixtral", tmp_path / "mixtral", vocab_size=260)
    byte_tokenizer().save_pretrained(model)
    for study, method in (("objectives", "rtn"), ("calibration-sets", "gptq")):
        choice = study_choice(study, model, tmp_path / study, methods=(method,), bits=(4,))
        data = run_study(find_study(study), choice)
        assert data["rows"]


@pytest.mark.slow
def test_without_ray_the_error_names_the_extra(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FewbitError, match=r"needs the package ray: install it with  pip install 'fewbit\[ray\]'"):
        run_study(STUDY, study_choice("objectives", tiny, tmp_path / "out", engine="ray", methods=("rtn",), bits=(3,)))


@pytest.mark.slow
def test_folded_folders_have_no_local_errors(tiny: Path, tmp_path: Path) -> None:
    data = run_study(STUDY, study_choice("objectives", tiny, tmp_path / "out", methods=("awq",), bits=(3,)))
    row = next(r for r in data["rows"] if r["table"] == "model" and r["name"] == "awq-3bit")
    assert "output_error" not in row
    assert row["kl_mean"] > 0
    assert data["findings"]["without_local_errors"] == ["awq-3bit"]


def test_bad_input(tiny: Path, folder: Path, tmp_path: Path) -> None:
    for given, message in (
        ({"methods": ("gtpq",)}, "unknown method 'gtpq'"),
        ({"bits": (9,)}, "bits must be a whole number from 1 to 8"),
        ({"folders": (str(tiny),)}, "not quantized by fewbit: give a folder"),
        ({"folders": (str(folder), str(folder))}, "two folders have the same name"),
        ({"windows": 10**6}, "use fewer or shorter windows"),
    ):
        with pytest.raises(FewbitError, match=message):
            run_study(STUDY, study_choice("objectives", tiny, tmp_path / "out", **given))
    with pytest.raises(FewbitError, match=r"already quantized \(fewbit\): give the 16-bit original"):
        run_study(STUDY, study_choice("objectives", folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    other = build_tiny(tmp_path / "other", intermediate_size=192)
    with pytest.raises(FewbitError, match=r"has no model.layers.0.mlp.down_proj of that shape"):
        run_study(STUDY, study_choice("objectives", other, tmp_path / "out", folders=(str(folder),), **FEW))


@pytest.mark.slow
def test_the_command_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choice = study_choice("objectives", tiny, tmp_path / "out", methods=("rtn",), bits=(4, 3))
    words = ["--data", choice.data, "--size", "quick", "--windows", 3, "--seq-len", 48, "--methods", "rtn"]
    words += ["--calibration", "random-tokens", "--samples", 6, "--sequence-length", 32]
    data = json.loads(run_cli("study", "objectives", tiny, choice.out, *words, "--bits", "4, 3", "--json").stdout)
    assert data["rows"] == json.loads((choice.out / "study.json").read_text())["rows"]
    assert {"fewbit", "torch"} <= set(data["versions"])
    refused = run_cli("study", "objectives", tiny, choice.out, *words, "--bits", "4,2", code=2)
    assert "contains a study with other arguments (bits was [4, 3], is [4, 2])" in refused.stderr
    # What the command line made is what Python goes on with.
    given = {"size": "quick", "methods": ("rtn",), "bits": (4, 3), **SMALL}
    run_named("objectives", str(tiny), choice.out, choice.data, given, overwrite=False, as_json=False)
    told = capsys.readouterr().out
    assert "2 quantized models; the original's loss is" in told
    assert f"wrote {choice.out / 'study.json'} and {choice.out / 'study.html'}" in told
    with pytest.raises(FewbitError, match="--bits must be whole numbers separated by commas"):
        _numbers("four")


def test_every_variant_of_every_size_exists() -> None:
    for size in STUDY.sizes.values():
        found = variants(size.grid["methods"], size.grid["bits"], size.grid["group_sizes"])
        assert len({variant.name for variant in found}) == len(found)
        assert all(variant.recipe.bits == variant.bits for variant in found)
    assert [v.name for v in variants(("billm", "rtn"), (3, 2), (None, "32,auto"))] == [
        *("billm-1bit", "rtn-3bit", "rtn-3bit-g32", "rtn-2bit", "rtn-2bit-g32")
    ]
    assert Variant(**Variant("gptq", 3, "row").cell()) == Variant("gptq", 3, "row")


def model_row(bits: int, error: float, rise: float) -> dict[str, Any]:
    row = {"table": "model", "method": "m", "name": f"m{bits}-{error}", "bits": bits, "loss_increase": rise}
    return {**row, "kl_mean": rise, **dict.fromkeys(MEASURES, error)}


def test_where_the_order_breaks_down_is_said(tiny: Path, tmp_path: Path) -> None:
    rows = [{"table": "model", "method": "original", "name": "original", "nll": 3.0}]
    rows += [model_row(4, 0.01 * i, 0.001 * i**2) for i in range(1, 13)]
    rows += [model_row(2, 0.1 * i, 5.0 - 0.3 * i) for i in range(1, 13)]
    rows += [model_row(3, 0.1 * i, float(i)) for i in range(1, 4)]
    summary = summarize(rows, study_choice("objectives", tiny, tmp_path))
    found = {(c["bits"], c["measure"]): c for c in summary.findings["correlations"] if c["truth"] == "loss_increase"}
    assert (found["4", "output_error"]["verdict"], found["2", "output_error"]["verdict"]) == ("holds", "fails")
    assert found["2", "output_error"]["discordant"] == 1
    assert found["3", "output_error"]["verdict"] == "too few models"
    assert "A lower layer-wise error means a lower loss at 4 bits." in summary.conclusion
    assert "A lower layer-wise error does not mean a lower loss at 2 bits." in summary.conclusion
    best = {b["bits"]: b for b in summary.findings["best"]}
    assert best["2"]["least_loss"] == "m2-1.2000000000000002"
    assert best["2"]["output_error_regret"] == pytest.approx(3.3)
    assert math.isclose(summary.findings["prediction_ratio"][1]["median"], 0.065 / 0.0425, rel_tol=0.1)
