"""The study of calibration sets end to end on a tiny model, and its statistics on made rows."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, run_cli
from study_cases import look_at
from test_evaluation import check_page
from test_task_data import GOOD, write

import fewbit
from fewbit.errors import FewbitError
from fewbit.evaluation.perplexity import Protocol
from fewbit.evaluation.score import window_losses
from fewbit.evaluation.tasks import TaskChoice
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.measure_curvature import measure_tokens
from fewbit.pipeline.run import RunOptions
from fewbit.studies import calibration_sets_measure
from fewbit.studies.calibration_sets import STUDY, cells, grouped
from fewbit.studies.calibration_sets_summary import summarize
from fewbit.studies.registry import make_choice
from fewbit.studies.run import run_study
from fewbit.studies.sets import as_options, parse_set

WORDS = "the quick brown fox jumps over a lazy dog and then it sleeps under some old tree until the sun is up again "
GIVEN = {
    "size": "quick", "windows": 4, "sequence_length": 32, "samples": 4, "sample_length": 32, "bits": (3,),
    "methods": ("gptq", "awq", "spqr", "oac", "smoothquant", "w8a8"),
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS * 40)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("model") / "model", shard_size="1GB")


def choice_of(model: Path, out: Path, text: Path, **given: Any) -> Any:
    return make_choice(STUDY, str(model), out, str(text), {**GIVEN, "sources": str(text), **given})


@pytest.mark.slow
def test_the_study_end_to_end(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choice_of(model, tmp_path / "out", text, options={"seeds": [2, 1]})

    def scorer(choice: Any) -> Any:
        return lambda network: {"guess": {"metric": "acc", "accuracy": 0.5, "standard_error": 0.1, "questions": 4}}

    monkeypatch.setattr(calibration_sets_measure, "task_scorer", scorer)
    seen: list[Any] = []

    def stop(cell: dict[str, Any], opened: Any, tell: Any) -> Any:
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(cell)
        return STUDY.run_cell(cell, opened, tell)

    with pytest.raises(KeyboardInterrupt):
        run_study(replace(STUDY, run_cell=stop), choice)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "work").glob("set-*")}
    assert len(kept) == 4 and not list((tmp_path / "out" / "work").glob("tmp*"))
    again: list[Any] = []

    def rest(cell: dict[str, Any], opened: Any, tell: Any) -> Any:
        if not again:
            assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out" / "work").glob("set-*")} == kept
        again.append(cell)
        return STUDY.run_cell(cell, opened, tell)

    result = run_study(replace(STUDY, run_cell=rest), choice)
    assert [*seen, *again] == cells(choice) and len(seen) == 4
    straight = run_study(STUDY, replace(choice, out=tmp_path / "straight"))
    assert result["rows"] == straight["rows"] and result["conclusion"] == straight["conclusion"]
    assert not (tmp_path / "out" / "work").exists()
    runs = [row for row in result["rows"] if row["table"] == "run" and "set" in row]
    assert len(runs) == 6 * (2 + 1 + 1)
    assert {(row["method"], row["bits"]) for row in runs} == {
        ("gptq", 3), ("awq", 3), ("spqr", 3), ("oac", 3), ("smoothquant", 8), ("w8a8", 8),
    }  # fmt: skip
    assert len([row for row in result["rows"] if row["table"] == "loss"]) == 4 * (len(runs) + 1)
    by_set = {name: {r["tokens_sha256"] for r in runs if r["set"] == name} for name in ("default", "nonsense")}
    assert (len(by_set["default"]), len(by_set["nonsense"])) == (2, 1)
    sets = result["findings"]["sets"]
    assert len(sets) == 6 * 2 and all(row["low"] < row["ratio"] < row["high"] for row in sets)
    assert len(result["findings"]["verdicts"]) == 6 and result["conclusion"][-1].startswith("Verdict: ")
    assert {(row["task"], row["accuracy"]) for row in result["findings"]["tasks"]} == {("guess", 0.5)}
    check_page(tmp_path / "out" / "study.html")


@pytest.mark.slow
def test_tasks_are_asked_as_the_evaluation_asks_them(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'fewbit[tasks]'")
    for task in ("piqa", "winogrande"):
        write(tmp_path, task, *[{**GOOD[task], "label": index % 2} for index in range(5)])
    options = {"seeds": [1, 1], "tasks": ["piqa", "winogrande"], "task_data": str(tmp_path), "task_limit": 4}
    given = {"methods": ("w8a8", "gptq"), "options": options}
    result = run_study(STUDY, choice_of(model, tmp_path / "out", text, **given))
    rows = [row for row in result["rows"] if row["table"] == "task"]
    assert len(rows) == 2 * (1 + 2 * 3) and {row["questions"] for row in rows} == {4}
    wanted = fewbit.evaluate(model, tasks=TaskChoice(("piqa", "winogrande"), tmp_path, 4))["models"][0]["tasks"]
    for task, found in wanted.items():
        row = next(r for r in rows if r["method"] == "original" and r["task"] == task)
        assert (row["accuracy"], row["standard_error"]) == (found["accuracy"], found["standard_error"])
    assert {row["task"] for row in result["findings"]["tasks"]} == {"piqa", "winogrande"}
    with pytest.raises(FewbitError, match="need --tasks"):
        cells(choice_of(model, tmp_path / "other", text, options={"task_limit": 8}))


@pytest.mark.slow
def test_a_run_is_that_of_the_quantize_command(model: Path, text: Path, tmp_path: Path) -> None:
    given = {"methods": ("gptq",), "options": {"seeds": [1, 1]}}
    choice = choice_of(model, tmp_path / "study", text, **given)
    result = run_study(STUDY, choice)
    row = next(r for r in result["rows"] if r["table"] == "run" and r.get("set") == "default")
    recipe = fewbit.preset("gptq", bits=3, embedding_bits=16)
    options = CalibrationOptions(choice.calibration, original_inputs=True)
    fewbit.quantize(model, tmp_path / "out", recipe, RunOptions(calibration=options))
    found = fewbit.evaluate(tmp_path / "out", text, Protocol(32, 4))["models"][0]
    assert row["nll"] == pytest.approx(found["nll"], rel=1e-6)
    assert row["bits_per_weight"] == found["bits_per_weight"]
    original = next(r for r in result["rows"] if r.get("method") == "original")
    assert original["nll"] == pytest.approx(fewbit.evaluate(model, text, Protocol(32, 4))["models"][0]["nll"], rel=1e-6)


def made_rows(effects: dict[str, float], seed_deviation: float, windows: int = 20) -> list[dict[str, Any]]:
    """Rows of a method whose sets differ by known amounts."""
    generator = random.Random(1)
    hard = [generator.gauss(0, 0.3) for _ in range(windows)]
    rows: list[dict[str, Any]] = [{"table": "run", "method": "original", "bits": 16, "perplexity": 20.0}]
    for name, effect in {"default": 0.0, **effects}.items():
        for seed in range(3):
            luck = generator.gauss(0, seed_deviation)
            base = {"set": name, "axis": "language" if name in ("hin", "deu") else "quality", "seed": seed}
            base.update(method="gptq", bits=4)
            rows.append({"table": "run", **base, "nll": 3 + effect + luck})
            for window in range(windows):
                nll = 3 + hard[window] + effect + luck + generator.gauss(0, 0.002)
                rows.append({"table": "loss", **base, "window": window, "nll": nll})
    return rows


def test_the_summary_finds_what_is_there(model: Path, text: Path, tmp_path: Path) -> None:
    choice = choice_of(model, tmp_path / "out", text)
    found = summarize(made_rows({"deu": 0.001, "hin": 0.08, "self": 0.0}, 0.002), choice)
    sets = {row["set"]: row for row in found.findings["sets"]}
    assert {name: row["verdict"] for name, row in sets.items()} == {"deu": "same", "hin": "worse", "self": "same"}
    assert sets["hin"]["ratio"] == pytest.approx(math.exp(0.08), rel=0.01)
    assert found.findings["verdicts"][0]["verdict"] == "sensitive"
    assert found.conclusion[-1] == "Verdict: sensitive to language." and "language/hin x1.08" in found.conclusion[0]
    assert summarize(made_rows({"deu": 0.001, "self": 0.0}, 0.002), choice).conclusion[-1] == "Verdict: robust."
    # Between windows the sets differ by nothing, but seeds move everything: windows alone would be sure of it.
    loud = summarize(made_rows({"self": 0.0}, 0.05), choice).findings
    assert loud["sets"][0]["verdict"] == "open" and loud["verdicts"][0]["verdict"] == "undecided"
    assert (
        loud["seeds"][0]["pooled_deviation"] == pytest.approx(0.05, rel=0.6) and loud["seeds"][0]["pooled_degrees"] == 4
    )
    assert abs(loud["sets"][0]["in_seed_deviations"]) < 3


def test_one_seed_leaves_the_windows(model: Path, text: Path, tmp_path: Path) -> None:
    rows = [row for row in made_rows({"self": 0.0}, 0.0) if row.get("seed", 0) == 0]
    found = summarize(rows, choice_of(model, tmp_path / "out", text)).findings
    assert found["seeds"][0]["pooled_degrees"] == 0 and "in_seed_deviations" not in found["sets"][0]
    assert found["sets"][0]["p_equivalent"] == found["sets"][0]["p_equivalent_windows_only"]
    assert found["sets"][0]["degrees"] == 19 and found["sets"][0]["verdict"] == "same"


@pytest.mark.slow
def test_a_set_that_a_method_cannot_take_is_a_result(model: Path, text: Path, tmp_path: Path) -> None:
    choice = choice_of(model, tmp_path / "out", text, methods=("oac",), options={"seeds": [1, 1]})

    def refused(*arguments: Any) -> None:
        if arguments[2].choice.sources == "nonsense":
            raise FewbitError("its gradients are all 0")
        measure_tokens(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_sets_measure, "measure_tokens", refused)
        result = run_study(STUDY, choice)
    assert [row["set"] for row in result["findings"]["failed"]] == ["nonsense"]
    assert [row["set"] for row in result["findings"]["sets"]] == ["random-tokens"]
    assert "oac 3 bits failed on quality/nonsense: its gradients are all 0." in result["conclusion"]


@pytest.mark.slow
def test_the_page_in_a_browser(model: Path, text: Path, tmp_path: Path) -> None:
    run_study(STUDY, choice_of(model, tmp_path / "out", text, methods=("w8a8", "smoothquant")))
    seen = look_at(tmp_path / "out" / "study.html", tmp_path)
    assert "<h2>Effect of the seed alone</h2>" in seen and "<h2>w8a8, 8 bits: " in seen
    assert seen.count("<svg") == 3 and "quality/nonsense" in seen


def test_losses_by_window_are_the_model_s(model: Path) -> None:
    network = fewbit.load(model, device="cpu")
    windows = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = network(windows).logits.float()
    for window, found, predicted in zip(windows, window_losses(network, windows, "m"), logits, strict=True):
        wanted = torch.nn.functional.cross_entropy(predicted[:-1], window[1:])
        assert found == pytest.approx(float(wanted), rel=2e-3)


def test_methods_are_measured_together_where_they_see_the_same(model: Path, text: Path, tmp_path: Path) -> None:
    groups = grouped(("gptq", "w8a8", "spqr", "oac", "billm"), (4, 3))
    assert [(g["measures"], len(g["methods"])) for g in groups] == [("gram", 5), ("inputs", 1), ("fisher", 2)]
    assert ["billm", 1] in groups[0]["methods"]
    for given, message in (
        ({"methods": ("rtn",)}, "'rtn' is not a calibrated method: choose from"),
        ({"options": {"margin": 0.0}}, "--margin must be from 0 to 1"),
        ({"options": {"seeds": [3]}}, "--seeds must be A,B"),
        ({"windows": 1}, "--windows 1: the test pairs windows"),
        ({"options": {"sets": as_options([parse_set("content/none=nonsense")]), "seeds": [0, 1]}}, "--seeds must be"),
    ):
        with pytest.raises(FewbitError, match=message):
            cells(choice_of(model, tmp_path / "out", text, **given))
    short = tmp_path / "short.txt"
    short.write_text("too short")
    choice = choice_of(
        model, tmp_path / "out", text, options={"sets": as_options([parse_set(f"content/short={short}")])}
    )
    with pytest.raises(FewbitError, match=r"set content/short: .*it has 9 tokens"):
        run_study(STUDY, choice)


@pytest.mark.slow
def test_the_commands(model: Path, text: Path, tmp_path: Path) -> None:
    shared = ["--size", "quick", "--data", text, "--calibration", text, "--samples", 2, "--sequence-length", 24]
    shared += ["--windows", 2, "--seq-len", 24]
    file = tmp_path / "sets.json"
    file.write_text(json.dumps({"content": {"odd": "nonsense:1,random-tokens:1"}}))
    command = ["study", "calibration-sets", model, tmp_path / "sets", *shared, "--methods", "w8a8", "--seeds", "2,1"]
    found = json.loads(run_cli(*command, "--set-file", file, "--margin", 0.5, "--json").stdout)
    assert [row["set"] for row in found["findings"]["sets"]] == ["nonsense", "random-tokens", "odd"]
    assert found["findings"]["margin"] == 0.5
    command = ["study", "outliers", model, tmp_path / "outliers", *shared, "--bits", 4, "--methods", "awq"]
    printed = run_cli(*command, "--set", "language/none=nonsense", "--factor", 3).stdout
    assert "Outlier channels:" in printed and "study.html" in printed
    error = run_cli(*command, "--set", "odd", code=2).stderr
    assert error.count("\n") == 1 and "write AXIS/NAME=SRC" in error
