"""Patterns have one meaning in --include, --exclude and --set."""

from pathlib import Path

import pytest

import fewbit
from fewbit.architecture.patterns import exact_names, matches, matching
from fewbit.errors import FewbitError

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (UP, True),
        ("model.layers.0.mlp.up_proj", True),
        ("model.layers.0", True),
        ("*.up_proj", True),
        ("*.up_proj.weight", True),
        ("*.mlp.*", True),
        ("model.layers.[01].mlp", True),
        ("*.?p_proj", True),
        ("model.layers.0.ml", False),
        ("up_proj", False),
        ("*.layers.1", False),
        ("*.UP_proj", False),
        ("", False),
    ],
)
def test_what_matches(pattern: str, found: bool) -> None:
    assert matches(UP, pattern) is found


def test_exact_names_stand_for_themselves() -> None:
    names = ["a[1].weight", "a1.weight", "b.a1.weight"]
    exact = exact_names(names)
    assert matching("a[1].weight", names, exact) == ["a[1].weight"]
    assert matching("a[1]", names, exact) == ["a[1].weight"]
    assert matching("*a[[]1]*", names, exact) == ["a[1].weight"]
    assert matching("*a[1]", names, exact) == ["a1.weight", "b.a1.weight"]
    with pytest.raises(FewbitError, match="matches no tensor"):
        matching("A1", names, exact)


@pytest.mark.parametrize(
    "pattern", ["*.mlp.down_proj", "*.mlp.down_proj.weight", "model.layers.0", "*.layers.0.mlp.[du]*_proj", "*.MLP.*"]
)
def test_the_same_tensors_for_exclude_and_set(tiny: Path, pattern: str) -> None:
    try:
        kept = fewbit.plan(tiny, "rtn", exclude=[pattern])["tensors"]["keep"]
    except FewbitError as error:
        assert "matches no tensor" in str(error)
        with pytest.raises(FewbitError, match="matches no tensor"):
            fewbit.plan(tiny, "rtn", set=[f"{pattern}:bits=7"])
        return
    rows = fewbit.plan(tiny, "rtn", set=[f"{pattern}:bits=7"])["tensors"]["quantize"]
    excluded = {row["name"] for row in kept if row["reason"] == "excluded"}
    changed = {row["name"] for row in rows if row["bits_per_weight"] >= 7}
    assert changed and changed == {name for name in excluded if name.endswith("_proj.weight")}


def test_include_takes_the_matrices_of_a_module(tiny: Path) -> None:
    rows = fewbit.plan(tiny, "rtn", include=["model.embed_tokens"])["tensors"]["quantize"]
    assert "model.embed_tokens.weight" in {row["name"] for row in rows}
    with pytest.raises(FewbitError, match=r"model.norm.weight: --include needs a 16 or 32-bit matrix"):
        fewbit.plan(tiny, "rtn", include=["model.norm"])
