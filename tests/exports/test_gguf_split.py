"""Large models as several .gguf files, and what a file says of its recipe."""

import json
from pathlib import Path

import pytest
import torch
from gguf_models import build
from test_gguf_file import read

import fewbit
from fewbit.checkpoints.source import open_checkpoint
from fewbit.exports import gguf_file
from fewbit.exports.gguf_file import in_short, write_gguf
from fewbit.recipe import Recipe, preset

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("split") / "model", "qwen2")


def test_parts_hold_what_one_file_holds(model: Path, tmp_path: Path) -> None:
    def place(name: str) -> Path:
        return tmp_path / name

    whole = write_gguf(open_checkpoint(model), place, "whole")
    assert whole["files"] == ["whole.gguf"]
    parts = write_gguf(open_checkpoint(model), place, "part", largest=60_000)
    count = len(parts["files"])
    assert count > 2
    assert parts["files"] == [f"part-{index + 1:05}-of-{count:05}.gguf" for index in range(count)]
    assert parts["file"] == parts["files"][0]
    assert parts["bytes"] == sum((tmp_path / name).stat().st_size for name in parts["files"])
    fields, tensors, _ = read(tmp_path / "whole.gguf")
    first = read(tmp_path / parts["file"])[0]
    alike = {key for key in fields if not key.startswith(("GGUF.", "general.name"))}
    assert {key: fields[key] for key in alike} == {key: first[key] for key in alike}
    found: dict[str, torch.Tensor] = {}
    for index, name in enumerate(parts["files"]):
        said, some, some_kinds = read(tmp_path / name)
        split = [said[f"split.{key}"] for key in ("no", "count", "tensors.count")]
        assert split == [index, count, len(tensors)]
        assert sum(tensor.numel() * (4 if some_kinds[key] == "f32" else 2) for key, tensor in some.items()) <= 60_000
        assert not found.keys() & some.keys()
        found |= some
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_an_export_says_which_files_it_wrote(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "LARGEST", 60_000)
    report = fewbit.export(model, tmp_path / "out")
    written = sorted(path.name for path in (tmp_path / "out").glob("*.gguf"))
    assert report["files"] == written and len(written) > 2
    assert f"llama-server -m {written[0]}" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "fewbit_report.json").read_text())["files"] == written


@pytest.mark.parametrize("method", ["rtn", "adpq+", "precal+oac"])
@pytest.mark.parametrize("grid", ["q4_0", "q2_k"])
def test_a_recipe_in_short(method: str, grid: str) -> None:
    recipe = preset(method, grid=grid, embedding_bits=16)
    short = in_short(recipe.to_dict())
    assert len(json.dumps(short)) < 230
    assert (short.get("method", "rtn"), short["grid"]) == (method, grid)
    assert preset(method, grid=short["grid"], embedding_bits=16) == recipe
    assert short.keys() <= {"method", "grid", "search", "solver", "curvature"}


def test_a_plain_recipe_in_short_is_empty() -> None:
    assert in_short(Recipe().to_dict()) == {}
