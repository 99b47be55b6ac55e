"""The frame of all studies, on a study that measures nothing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_evaluation import check_page

from fewbit.errors import FewbitError
from fewbit.report.canvas import new_figure, to_svg
from fewbit.report.html import Figure, Section
from fewbit.studies.registry import STUDIES, find_study, make_choice
from fewbit.studies.run import run_study
from fewbit.studies.study import Size, Study, Summary

TEXT = "The quick brown fox jumps over the lazy dog. " * 40
ran: list[Any] = []


def run_cell(cell: dict[str, Any], opened: Any, tell: Any) -> list[dict[str, Any]]:
    tell(0.5, "half way")
    ran.append(cell["n"])
    if cell["n"] == opened:
        raise FewbitError("this one cannot be")
    return [{"n": cell["n"], "square": cell["n"] ** 2, "odd": float("nan")}]


def draw(result: dict[str, Any]) -> list[Section]:
    figure, axes = new_figure()
    axes.plot([row["square"] for row in result["rows"]])
    return [Section("Squares", figures=[Figure(to_svg(figure), "n against its square")])]


TOY = Study(
    name="toy",
    title="Squares",
    about="Numbers and their squares.",
    sizes={"quick": Size(2, 16, 4, 16), "standard": Size(3, 16, 4, 16, {"count": 5})},
    cells=lambda choice: [{"n": n, "pair": (n, n)} for n in range(4)],
    run_cell=run_cell,
    summarize=lambda rows, choice: Summary({"sum": sum(r["square"] for r in rows)}, [f"{len(rows)} squares"]),
    draw=draw,
    open=lambda choice: choice.options.get("fail"),
    prepare=lambda choice, progress: ran.append("prepare"),
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_a_stopped_study_goes_on_and_a_finished_one_is_only_drawn_again(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    choice = make_choice(TOY, str(tiny), out, str(text), {"size": "quick", "options": {"pair": (1, 2)}})
    seen: list[tuple[int, int, str]] = []
    ran.clear()

    def stop(cell: Any, opened: Any, tell: Any) -> Any:
        if cell["n"] == 2:
            raise KeyboardInterrupt
        return run_cell(cell, opened, tell)

    with pytest.raises(KeyboardInterrupt):
        run_study(replace(TOY, run_cell=stop), choice)
    assert ran == ["prepare", 0, 1]
    assert not (out / "study.json").exists()
    ran.clear()
    result = run_study(TOY, choice, lambda *step: seen.append(step))
    assert ran == ["prepare", 2, 3]
    assert seen[1] == (500, 2000, "cell 1 of 2: half way")
    assert seen[-1][0] == seen[-1][1]
    assert result["rows"] == [{"n": n, "square": n * n} for n in range(4)]
    assert result["findings"] == {"sum": 14}
    assert result["protocol"]["evaluation"]["windows"] == 2
    written = json.loads((out / "study.json").read_text())
    assert written["rows"] == result["rows"]
    check_page(out / "study.html")
    page = (out / "study.html").read_text()
    assert "4 squares" in page
    (out / "study.html").unlink()
    (out / "study.json").unlink()
    ran.clear()
    again = run_study(TOY, choice)
    assert ran == []
    assert {**again, "run": None} == {**result, "run": None}
    assert (out / "study.html").read_text() == page


def test_other_arguments_are_refused_unless_the_study_is_begun_again(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    choice = make_choice(TOY, str(tiny), out, str(text), {"size": "quick"})
    run_study(TOY, choice)
    with pytest.raises(FewbitError, match=r"contains a study with other arguments .seed was 0, is 3.: repeat those"):
        run_study(TOY, replace(choice, seed=3))
    text.write_text(TEXT + "More.")
    with pytest.raises(FewbitError, match="data_sha256 was"):
        run_study(TOY, choice)
    ran.clear()
    run_study(TOY, replace(choice, seed=3), overwrite=True)
    assert ran == ["prepare", 0, 1, 2, 3]
    other = tmp_path / "mine"
    other.mkdir()
    (other / "precious").write_text("kept")
    with pytest.raises(FewbitError, match="is not the folder of a study"):
        run_study(TOY, replace(choice, out=other), overwrite=True)
    assert [p.name for p in other.iterdir()] == ["precious"]


def test_a_cell_that_cannot_be_is_named_and_finished_cells_are_kept(tiny: Path, text: Path, tmp_path: Path) -> None:
    choice = make_choice(TOY, str(tiny), tmp_path / "out", str(text), {"size": "quick", "options": {"fail": 2}})
    with pytest.raises(FewbitError, match=r"^2: this one cannot be \(finished cells are kept\)$"):
        run_study(TOY, choice)
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 2


def test_two_processes_do_not_write_one_study(tiny: Path, text: Path, tmp_path: Path) -> None:
    choice = make_choice(TOY, str(tiny), tmp_path / "out", str(text), {"size": "quick"})

    def second(cell: Any, opened: Any, tell: Any) -> Any:
        with pytest.raises(FewbitError, match="another run is writing to it"):
            run_study(TOY, choice)
        return run_cell(cell, opened, tell)

    run_study(replace(TOY, run_cell=second), choice)


def test_sizes_fill_in_what_is_not_given_and_bad_choices_are_refused(tmp_path: Path) -> None:
    choice = make_choice(TOY, "m", tmp_path, "topics", {"seed": 2, "windows": 7, "sources": "nonsense", "bits": None})
    assert (choice.size, choice.protocol.windows, choice.protocol.sequence_length) == ("standard", 7, 16)
    assert (choice.calibration.sources, choice.calibration.samples, choice.calibration.seed) == ("nonsense", 4, 2)
    assert choice.bits == ()
    for given, message in (
        ({"size": "huge"}, "--size must be one of quick, standard, large, not 'huge'"),
        ({"engine": "dask"}, "--engine must be one of local, ray, not 'dask'"),
        ({"seed": -1}, "--seed cannot be -1"),
    ):
        with pytest.raises(FewbitError, match=message):
            make_choice(TOY, "m", tmp_path, "topics", given)


def test_every_study_of_the_table_is_whole() -> None:
    for name in STUDIES:
        study = find_study(name)
        assert study.name == name
        assert set(study.sizes) == {"quick", "standard", "large"}
    with pytest.raises(FewbitError, match="unknown study 'none': choose from objectives"):
        find_study("none")
