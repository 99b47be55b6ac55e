"""How the house is cut: imports point downward only, and no two rooms need each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import fewbit

ROOT = Path(fewbit.__file__).parent
PURE = ("grids", "outliers", "transforms", "solvers")
"""Rooms of tensors alone."""
KNOW_NO_MODEL = {"errors", "choices", "grids", "outliers", "transforms", "solvers", "curvature"}


def room(module: str) -> str:
    """The folder that a module is in, or its own name where it lies at the top."""
    first = module.split(".")[1] if "." in module else ""
    return first if (ROOT / first).is_dir() else first or "fewbit"


def imports() -> Iterator[tuple[str, str]]:
    """(module that imports, module that is imported), inside the package, at any depth of a file."""
    for path in ROOT.rglob("*.py"):
        name = ".".join(("fewbit", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fewbit":
                yield name, node.module


def test_rooms_of_tensors_know_nothing_of_models() -> None:
    wrong = {
        (name, imported) for name, imported in imports() if room(name) in PURE and room(imported) not in KNOW_NO_MODEL
    }
    assert not wrong


def test_no_two_rooms_need_each_other() -> None:
    # What only the names of `fewbit` or a launched module lead to is no room below.
    needs: dict[str, set[str]] = {}
    for name, imported in imports():
        if name in ("fewbit", "fewbit.tuning.__main__") or room(name) == room(imported):
            continue
        needs.setdefault(room(name), set()).add(room(imported))
    left = set(needs) | {one for found in needs.values() for one in found}
    while left:
        free = {one for one in left if not needs.get(one, set()) & left}
        assert free, f"a circle among {sorted(left)}"
        left -= free


def test_no_grid_is_known_by_its_name_elsewhere() -> None:
    """Adding a grid, a scale format, an outlier rule or grid takes a file and a line: nothing compares their names."""
    attributes = {"grid", "scale_format", "outlier_grid", "rule", "transform"}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Compare) or not isinstance(node.left, ast.Attribute):
                continue
            values = [one.value for one in node.comparators if isinstance(one, ast.Constant)]
            named = [value for value in values if isinstance(value, str) and value not in ("none", "")]
            assert not (node.left.attr in attributes and named), f"{path.name}: {ast.unparse(node)}"
