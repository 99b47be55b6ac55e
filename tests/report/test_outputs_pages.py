"""Where `--html` may write: said before any work, and never over anything that is not a page."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import run_cli

from fewbit.errors import FewbitError
from fewbit.report.html import check_page


def test_a_page_inside_out_is_part_of_what_the_run_makes(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["quantize", tiny, out, "--method", "rtn", "--html"]
    run_cli(*command, out / "report.html")
    assert "<html" in (out / "report.html").read_text() and (out / "config.json").is_file()
    assert "report.html" in json.loads((out / "fewbit_run.json").read_text())["files"]
    run_cli(*command, out / "report.html", "--overwrite")
    assert (out / "report.html").is_file()
    run_cli("quantize", tiny, out, "--method", "rtn", "--overwrite")
    assert not (out / "report.html").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("out", "the name of a page must end in .html"),
        ("out.html", "will have this name"),
        ("out.html/deep/page.html", "must be directly in that folder: omit deep"),
        (".out.html.fewbit-partial/page.html", "is inside the work folder of"),
        ("model/page.html", "is inside the model's own folder"),
        ("model/config.json", "the name of a page must end in .html"),
        ("file/page.html", "is a file"),
        ("folder.html", "is a folder: give the name of an HTML file"),
    ],
)
def test_pages_that_cannot_be_are_refused_before_any_work(tiny: Path, tmp_path: Path, page: str, message: str) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder.html").mkdir()
    before = sorted(tmp_path.rglob("*"))
    command = ["quantize", tmp_path / "model", tmp_path / "out.html", "--method", "rtn", "--html", tmp_path / page]
    assert message in run_cli(*command, code=2).stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_the_folder_of_a_page_is_made_with_it_and_not_before(tiny: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "folder" / "page.html"
    check_page(page, tmp_path / "out", tiny)
    assert not list(tmp_path.iterdir())
    assert run_cli("inspect", tmp_path / "nothing", "--html", page, code=2)
    assert not list(tmp_path.iterdir())
    run_cli("quantize", tiny, tmp_path / "out", "--method", "rtn", "--html", page)
    assert "<html" in page.read_text() and [path.name for path in page.parent.iterdir()] == ["page.html"]


def test_a_page_in_a_folder_without_rights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbit.report.html.os.access", lambda path, mode: False)
    with pytest.raises(FewbitError, match=r"page\.html: cannot write there \(permission denied\)"):
        check_page(tmp_path / "page.html")


def test_report_only_has_no_out(tiny: Path, tmp_path: Path) -> None:
    run_cli("quantize", tiny, "--report-only", "--method", "rtn", "--html", tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
