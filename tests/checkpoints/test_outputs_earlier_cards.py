"""Folders of earlier versions hold the card of their original: --overwrite replaces them, and nothing of a user's."""

import json
from pathlib import Path

import pytest
from conftest import copy_folder, run_cli

CARD = "---\nlicense: mit\n---\n# The model\n"


@pytest.fixture
def earlier(tiny: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model with a card, and a folder of an earlier version: with a copy of that card, which is listed."""
    model, out = copy_folder(tiny, tmp_path / "model"), tmp_path / "out"
    (model / "README.md").write_text(CARD)
    run_cli("quantize", model, out, "--method", "rtn")
    (out / "README.original.md").rename(out / "README.md")
    run = json.loads((out / "fewbit_run.json").read_text())
    run["files"].remove("README.original.md")
    (out / "fewbit_run.json").write_text(json.dumps(run))
    return model, out


@pytest.mark.parametrize("listed", [True, False])
def test_a_copied_card_is_replaced(earlier: tuple[Path, Path], listed: bool) -> None:
    model, out = earlier
    if not listed:
        (out / "fewbit_run.json").unlink()
    run_cli("quantize", model, out, "--method", "rtn", "--bits", 3, "--overwrite")
    assert "fewbit wrote this card" in (out / "README.md").read_text()
    assert (out / "README.original.md").read_text() == CARD


def test_it_is_found_where_the_original_is(earlier: tuple[Path, Path], tiny: Path) -> None:
    # Another model goes there now: the copy is that of the folder's own original.
    run_cli("quantize", tiny, earlier[1], "--method", "rtn", "--overwrite")
    assert "fewbit wrote this card" in (earlier[1] / "README.md").read_text()


@pytest.mark.parametrize("change", ["edited", "another", "gone"])
def test_a_card_of_the_user_is_kept(earlier: tuple[Path, Path], change: str) -> None:
    model, out = earlier
    if change == "gone":
        (model / "README.md").unlink()
    else:
        (out / "README.md").write_text(CARD + "My notes.\n" if change == "edited" else "mine")
    before = (out / "README.md").read_bytes()
    done = run_cli("quantize", model, out, "--method", "rtn", "--overwrite", code=2)
    assert "contains README.md, which fewbit" in done.stderr
    assert (out / "README.md").read_bytes() == before


def test_another_file_beside_it_is_kept(earlier: tuple[Path, Path]) -> None:
    model, out = earlier
    (out / "notes.txt").write_text("mine")
    done = run_cli("quantize", model, out, "--method", "rtn", "--overwrite", code=2)
    assert "contains notes.txt, which fewbit" in done.stderr and "README.md" not in done.stderr
    assert (out / "notes.txt").read_text() == "mine"
