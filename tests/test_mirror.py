"""The folders of the tests are those of the package, and what is in them can be imported from any other."""

from collections import Counter
from pathlib import Path

import pytest
from conftest import TESTS

import fewbit


def folders(top: Path) -> set[str]:
    """Names of the folders that hold Python files."""
    return {path.parent.name for path in top.glob("*/*.py")}


def test_folders_mirror_the_package() -> None:
    assert folders(TESTS) == folders(Path(fewbit.__file__).parent)


def test_every_folder_is_on_the_path(pytestconfig: pytest.Config) -> None:
    paths = {Path(path).resolve() for path in pytestconfig.getini("pythonpath")}
    top = TESTS.resolve()
    assert {top, *(top / name for name in folders(top))} <= paths


def test_file_names_are_unique() -> None:
    names = Counter(path.name for path in TESTS.rglob("*.py"))
    assert [name for name, times in names.items() if times > 1] == []
