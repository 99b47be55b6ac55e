"""The study `landscape` end to end on a tiny model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from study_cases import kill_half_way, look_at, study_choice, without_run
from test_evaluation import check_page

import fewbit
from fewbit.errors import FewbitError
from fewbit.evaluation.perplexity import Protocol
from fewbit.evaluation.score import score
from fewbit.evaluation.text import read_text
from fewbit.evaluation.windows import read_windows
from fewbit.runtime.unpack import unpack_modules
from fewbit.studies.landscape import STEP, STUDY, open_cells
from fewbit.studies.landscape_summary import summarize
from fewbit.studies.moving import loss
from fewbit.studies.run import run_study

FEW: dict[str, Any] = {"methods": ("rtn", "precal+oac"), "bits": (2,), "options": {"directions": 1}}


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "tuned"
    fewbit.quantize(tiny, out, fewbit.preset("rtn", bits=2))
    return out


@pytest.fixture(scope="module")
def result(tiny: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("landscape") / "out"
    given = {**FEW, "folders": (str(folder),), "options": {"directions": 2, "slice": ("tuned", "precal+oac-2bit")}}
    return out, run_study(STUDY, study_choice("landscape", tiny, out, **given))


def rows_of(result: Any, table: str) -> list[dict[str, Any]]:
    return [row for row in result[1]["rows"] if row["table"] == table]


@pytest.mark.slow
def test_a_move_is_what_it_says_and_is_undone_bit_for_bit(tiny: Path, folder: Path, tmp_path: Path) -> None:
    opened = open_cells(study_choice("landscape", tiny, tmp_path / "out", folders=(str(folder),)))
    movable = opened.movable
    before = {name: parameter.detach().clone() for name, parameter in movable.model.named_parameters()}
    quantized = unpack_modules(fewbit.load(folder))
    name = "model.layers.0.mlp.down_proj"
    with movable.moved((1.0, opened.move_to("tuned"))):
        found = movable.model.get_submodule(name).weight
        assert torch.allclose(found, quantized.get_submodule(name).weight.float(), atol=1e-7)
        assert torch.equal(movable.model.get_input_embeddings().weight, before["model.embed_tokens.weight"])
    ones = [torch.ones_like(part) for part in movable.originals]
    with pytest.raises(ZeroDivisionError), movable.moved((0.25, ones), (0.5, ones)):
        moved = movable.model.get_submodule(name).weight - before[f"{name}.weight"]
        assert torch.allclose(moved, torch.tensor(0.75), atol=1e-6)
        raise ZeroDivisionError
    for key, parameter in movable.model.named_parameters():
        assert torch.equal(parameter, before[key]), key
    assert sum(part.numel() for part in movable.originals) == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)


@pytest.mark.slow
def test_rays_lead_from_the_original_to_the_quantized_weights(tiny: Path, folder: Path, result: Any) -> None:
    windows, _ = read_windows(tiny, read_text(result[0].parent / "text.txt"), Protocol(48, 3))
    rays = rows_of(result, "ray")
    assert {row["name"] for row in rays} == {"tuned", "rtn-2bit", "precal+oac-2bit"}
    mine = {row["t"]: row for row in rays if row["name"] == "tuned"}
    ends = {
        0.0: fewbit.load(tiny, dtype=torch.float32),
        1.0: torch.nn.Module.float(unpack_modules(fewbit.load(folder))),
    }
    # Embeddings and head, which this folder packs too, stay those of the original.
    with torch.no_grad():
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            ends[1.0].get_parameter(name).copy_(ends[0.0].get_parameter(name))
    for t, model in ends.items():
        assert mine[t]["loss"] == pytest.approx(score(model, windows, None, "model")["nll"], abs=1e-5)
    w, q = (torch.cat([p.flatten() for n, p in m.named_parameters() if "_proj" in n]) for m in ends.values())
    w, q = w.detach(), q.detach()
    assert mine[1.0]["distance"] == pytest.approx(float((q - w).norm() / w.norm()), rel=1e-5)
    # The same recipe made both folders, so both rays are one.
    same = [(row["t"], row["loss"]) for row in rays if row["name"] == "rtn-2bit"]
    assert same == [(row["t"], row["loss"]) for row in rays if row["name"] == "tuned"]


@pytest.mark.slow
def test_the_slice_holds_its_three_points(result: Any) -> None:
    points = {row["name"]: row for row in rows_of(result, "point")}
    rays = {(row["name"], row["t"]): row for row in rows_of(result, "ray")}
    assert list(points) == ["original", "tuned", "precal+oac-2bit"]
    for name in ("tuned", "precal+oac-2bit"):
        assert points[name]["loss"] == pytest.approx(rays[name, 1.0]["loss"], abs=1e-5)
        length = (points[name]["x"] ** 2 + points[name]["y"] ** 2) ** 0.5
        assert length == pytest.approx(rays[name, 1.0]["distance"], rel=1e-4)
    assert points["original"]["loss"] == pytest.approx(rays["tuned", 0.0]["loss"], abs=1e-6)
    plane = rows_of(result, "plane")
    assert len(plane) == 81
    assert len({(row["x"], row["y"]) for row in plane}) == 81
    xs = [row["x"] for row in plane]
    assert min(xs) < 0 < points["tuned"]["x"] < max(xs)


@pytest.mark.slow
def test_directions_and_what_is_said_of_them(result: Any) -> None:
    rows = rows_of(result, "direction")
    assert {(row["kind"], row["index"]) for row in rows} == {(k, i) for k in ("filter", "plain") for i in (0, 1)}
    assert len({row["loss"] for row in rows if row["distance"] == 0}) == 1
    curve = {row["distance"]: row["loss"] for row in rows if row["kind"] == "filter" and row["index"] == 0}
    bend = (curve[STEP] - 2 * curve[0.0] + curve[-STEP]) / STEP**2
    other = {row["distance"]: row["loss"] for row in rows if row["kind"] == "filter" and row["index"] == 1}
    second = (other[STEP] - 2 * other[0.0] + other[-STEP]) / STEP**2
    found = result[1]["findings"]["directions"]["filter"]
    assert found["curvature"]["mean"] == pytest.approx((bend + second) / 2, rel=1e-6, abs=1e-6)
    assert found["radius"]["0.1"]["of"] == 4
    at = next(point for point in found["curve"] if point["distance"] == 0.5)
    assert at["mean"] == pytest.approx((curve[0.5] + other[0.5]) / 2)


@pytest.mark.slow
def test_the_page_shows_it_and_fetches_nothing(result: Any, tmp_path: Path) -> None:
    page = result[0] / "study.html"
    check_page(page)
    text = page.read_text()
    assert text.count("<svg") == 4
    assert "precal+oac-2bit" in text
    dom = look_at(page, tmp_path)
    assert dom.count("<svg") == 4
    assert "A slice" in dom


@pytest.mark.slow
def test_a_killed_study_goes_on_and_gives_the_same_result(tiny: Path, tmp_path: Path) -> None:
    out, straight = tmp_path / "out", tmp_path / "straight"
    kill_half_way("landscape", tiny, out, "loss", 3, **FEW)
    assert not (out / "study.json").exists()
    finished = {p.name: p.stat().st_mtime_ns for p in (out / "cells").glob("*.json")}
    assert 3 <= len(finished) < 14
    assert (out / "work" / "rtn-2bit").is_dir()
    with pytest.raises(FewbitError, match=r"contains a study with other arguments .options.directions was 1, is 2"):
        run_study(STUDY, study_choice("landscape", tiny, out, **{**FEW, "options": {"directions": 2}}))
    run_study(STUDY, study_choice("landscape", tiny, out, **FEW))
    run_study(STUDY, study_choice("landscape", tiny, straight, **FEW))
    assert without_run(out / "study.json") == without_run(straight / "study.json")
    assert all((out / "cells" / name).stat().st_mtime_ns == time for name, time in finished.items())
    assert not (out / "work").exists()


def test_bad_input(tiny: Path, folder: Path, tmp_path: Path) -> None:
    for given, message in (
        ({"options": {"directions": 0}}, "--directions must be at least 1, not 0"),
        ({"options": {"slice": ("rtn-3bit", "mine")}}, r"--slice: choose two of rtn-3bit, .*, not rtn-3bit,mine"),
        ({"options": {"slice": ("rtn-3bit",)}}, "--slice: choose two of"),
        ({"folders": (str(tiny),)}, "not quantized by fewbit: give a folder"),
        ({"methods": ("nothing",)}, "unknown method 'nothing'"),
    ):
        with pytest.raises(FewbitError, match=message):
            run_study(STUDY, study_choice("landscape", tiny, tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_folder_that_changes_more_than_linear_layers_is_refused(tiny: Path, tmp_path: Path) -> None:
    choice = study_choice("landscape", tiny, tmp_path / "out", **{**FEW, "methods": ("awq",)})
    with pytest.raises(FewbitError, match=r"awq-2bit: .*layernorm.weight differs from the original: only folders"):
        run_study(STUDY, choice)


def curve(rises: dict[float, float], **common: Any) -> list[dict[str, Any]]:
    return [{**common, "distance": r, "loss": 3.0 + rise} for r, rise in rises.items()]


def test_radii_and_what_lies_inside(tiny: Path, tmp_path: Path) -> None:
    steep, flat = {-0.2: 1.2, -0.1: 0.2, 0.0: 0.0, 0.1: 0.2, 0.2: 2.2}, {-0.1: 0.01, 0.0: 0.0, 0.1: 0.01}
    rows = curve(steep, table="direction", kind="filter", index=0) + curve(
        flat, table="direction", kind="plain", index=0
    )
    ray = {"table": "ray", "method": "m", "bits": 3, "length": 0.2}
    near = {-0.5: 0.1, 0.0: 0.0, 0.5: 0.02, 1.0: 0.05, 1.5: 0.6}
    far = {-0.5: 0.9, 0.0: 0.0, 0.5: 0.9, 1.0: 2.9, 1.5: 5.0}
    for name, losses in (("near", near), ("far", far)):
        rows += [{**ray, "name": name, "t": t, "distance": 0.2 * t, "loss": 3 + rise} for t, rise in losses.items()]
    rows += [{**ray, "name": "broken", "t": t, "distance": 0.2 * t, "loss": 3.0} for t in (-0.5, 0.0, 0.5)]
    summary = summarize(rows, study_choice("landscape", tiny, tmp_path))
    radius = summary.findings["directions"]["filter"]["radius"]
    assert radius["0.1"]["mean"] == pytest.approx(0.05)
    assert radius["1"]["mean"] == pytest.approx((0.14 + 0.18) / 2)
    assert summary.findings["directions"]["plain"]["radius"]["0.1"] == {"of": 2, "n": 0}
    assert summary.findings["directions"]["filter"]["curvature"]["mean"] == pytest.approx(0.4 / 0.01)
    rays = {ray["name"]: ray for ray in summary.findings["rays"]}
    assert rays["near"]["inside"] == {"0.1": True, "1": True}
    assert rays["near"]["radius"] == {"0.1": pytest.approx(0.2 + 0.1 * 0.05 / 0.55)}
    assert rays["far"]["inside"] == {"0.1": False, "1": False}
    assert rays["far"]["radius"]["1"] == pytest.approx(0.1 + 0.1 * 0.1 / 2.0)
    assert rays["near"]["curvature_at_end"] == pytest.approx((0.6 - 2 * 0.05 + 0.02) / 0.01)
    assert rays["broken"]["inside"] == {"0.1": None, "1": None}
    assert any(line.startswith("broken: at 0.200; its loss is NaN or infinite") for line in summary.conclusion)


def test_a_loss_that_is_no_number_is_left_out(tiny: Path, tmp_path: Path) -> None:
    opened = open_cells(study_choice("landscape", tiny, tmp_path / "out"))
    huge = [torch.full_like(part, 1e30) for part in opened.movable.originals]
    with opened.movable.moved((1e9, huge)):
        found = loss(opened.movable.model, opened.windows)
    assert found != found or found > 1e3
