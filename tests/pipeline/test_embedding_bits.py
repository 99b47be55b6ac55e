"""The bit-width of embeddings and heads: defaults, recipes, what is a table, sizes in bytes on disk, bad input."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, folder_bytes, run_cli
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fewbit
from fewbit.architecture.coverage import cover
from fewbit.checkpoints.safetensors_io import TensorEntry
from fewbit.checkpoints.source import open_checkpoint
from fewbit.errors import FewbitError
from fewbit.formats.config import describe
from fewbit.grids.embeddings import EmbeddingChoice
from fewbit.recipe import Recipe, with_choices
from fewbit.recipe_choices import recipe_from_choices

TABLE = "model.embed_tokens.weight"


@pytest.mark.parametrize(("bits", "expected"), [(8, 8), (4, 8), (3, 6), (2, 6), (1, 6)])
def test_the_default_follows_the_bits(bits: int, expected: int) -> None:
    assert fewbit.preset("adpq+", bits=bits).embeddings.bits == expected
    assert recipe_from_choices("adpq+", {"bits": bits}).embeddings.bits == expected
    assert with_choices(Recipe(), {"bits": bits, "grid": "normal-float"}).embeddings.bits == expected
    assert recipe_from_choices("adpq+", {"bits": bits, "embedding_bits": 5}).embeddings.bits == 5
    assert with_choices(fewbit.preset("adpq+", bits=bits, embedding_bits=5), {"bits": 4}).embeddings.bits == 5


def test_recipes_hold_the_bits_and_earlier_ones_mean_16() -> None:
    recipe = fewbit.preset("adpq+", bits=3)
    data = json.loads(json.dumps(recipe.to_dict()))
    assert data["embedding_bits"] == 6 and Recipe.from_dict(data) == recipe
    del data["embedding_bits"]
    assert Recipe.from_dict(data).embeddings.bits == 16


@pytest.mark.parametrize("bits", [0, 9, 12, 17, -1])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(FewbitError, match="embedding bits must be from 1 to 8, or 16 to keep them"):
        EmbeddingChoice(bits)


def entry(name: str, *shape: int) -> TensorEntry:
    return TensorEntry(name, Path("model.safetensors"), torch.bfloat16, shape, 0, 2 * math.prod(shape))


def tables(config: dict[str, Any], *entries: TensorEntry) -> set[str]:
    return {one.entry.name for one in cover(entries, config).tensors if one.is_vocabulary}


def test_tables_are_known_by_their_rows_whatever_their_names() -> None:
    config = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 1, "type_vocab_size": 16}
    layers = [entry(f"h.0.mlp.{name}.weight", 64, 64) for name in "abc"]
    named = ["wte", "embed_in", "tok_embeddings", "word_embeddings", "shared", "lm_head", "embed_out", "output"]
    every = [entry(f"{name}.weight", 500, 64) for name in named]
    others = [
        entry("wpe.weight", 500, 64),
        entry("embeddings.position_embeddings.weight", 500, 64),
        entry("embeddings.token_type_embeddings.weight", 16, 64),
        entry("score.weight", 3, 64),
        entry("project_in.weight", 64, 48),
    ]
    assert tables(config, *layers, *every, *others) == {one.name for one in every}
    assert tables({"text_config": config}, *layers, *every) == {one.name for one in every}
    turned = cover([*layers, entry("lm_head.weight", 64, 500)], config).tensors[-1]
    assert turned.is_vocabulary and turned.transposed and turned.matrix_shape == (500, 64)
    kept = cover([*layers, *every], config, exclude=("lm_head",), include=("embed_out",)).tensors
    assert {one.entry.name for one in kept if not one.is_vocabulary} >= {"lm_head.weight", "embed_out.weight"}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 6, 8, 16])
def test_sizes_are_bytes_on_disk(tied: bool, bits: int, tmp_path: Path) -> None:
    model = build_tiny(tmp_path / "model", tie_word_embeddings=tied)
    recipe = fewbit.preset("adpq+", bits=4, embedding_bits=bits)
    report = fewbit.quantize(model, tmp_path / "out", recipe)
    held = weights = files = 0
    for file in (tmp_path / "out").glob("*.safetensors"):
        files += file.stat().st_size
        with safe_open(file, "pt") as opened:
            held += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    for file in model.glob("*.safetensors"):
        weights += sum(tensor.numel() for tensor in load_file(file).values())
    output, row = report["output"], describe(open_checkpoint(tmp_path / "out"))
    assert output["weights_all"] == weights and output["file_bytes"] == files == row["bytes"]
    assert row["bits_per_weight_all"] == output["bits_per_weight_all"] == 8 * held / weights
    layers = fewbit.preset("adpq+", bits=4, embedding_bits=16)
    alone = fewbit.quantize(model, None, layers, fewbit.RunOptions(report_only=True))["output"]
    assert row["bits_per_weight"] == output["bits_per_weight"] == alone["bits_per_weight"]
    names = [one["name"] for one in report["embeddings"]]
    assert len(names) == (0 if bits == 16 else 1 if tied else 2)
    assert {one["name"] for one in report["layers"]}.isdisjoint(names)
    plan = fewbit.plan(model, "adpq+", bits=4, embedding_bits=bits)
    assert plan["output"]["bits_per_weight_all"] == pytest.approx(row["bits_per_weight_all"])
    assert [one["name"] for one in plan["tensors"]["embeddings"]] == names
    assert fewbit.inspect(tmp_path / "out")["models"][0] == {"name": str(tmp_path / "out"), **row}
    assert describe(open_checkpoint(model))["bits_per_weight_all"] == 16


def test_tensors_can_have_other_bits(tmp_path: Path) -> None:
    model = build_tiny(tmp_path / "model", tie_word_embeddings=False)
    run_cli("quantize", model, tmp_path / "out", "--bits", 3, "--set", "lm_head:embedding_bits=4", "--set", "*:bits=2")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["recipe"]["embedding_bits"] == 6 and sorted(config["embeddings"]) == ["lm_head", TABLE[:-7]]
    bits = {name: config["schemes"][one["scheme"]]["bits"] for name, one in config["weights"].items()}
    assert bits.pop("lm_head") == 4 and bits.pop(TABLE[:-7]) == 6 and set(bits.values()) == {2}
    again = tmp_path / "again"
    run_cli("quantize", model, again, "--recipe", tmp_path / "out" / "config.json")
    assert folder_bytes(again)["config.json"] == folder_bytes(tmp_path / "out")["config.json"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--set", "model.embed_tokens:bits=4"), "matches only embeddings or heads"),
        (("--set", "*.up_proj:embedding_bits=4"), "embedding_bits applies to embeddings and heads"),
        (("--embedding-bits", 12), "from 1 to 8, or 16"),
        (("--set", "model.embed_tokens:embedding_bits=10"), "from 1 to 8, or 16"),
    ],
)
def test_bad_input(tiny: Path, tmp_path: Path, options: tuple[Any, ...], expected: str) -> None:
    result = run_cli("quantize", tiny, tmp_path / "out", *options, code=2)
    assert expected in result.stderr and not (tmp_path / "out").exists()


def test_included_tables_are_layers(tiny: Path, tmp_path: Path) -> None:
    report = fewbit.quantize(tiny, tmp_path / "out", fewbit.preset("rtn", bits=3, include=(TABLE,)))
    assert TABLE in {one["name"] for one in report["layers"]} and not report["embeddings"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tables_with_values_that_are_not_finite_are_kept(tmp_path: Path, value: float) -> None:
    model = build_tiny(tmp_path / "model", shard_size="1GB")
    tensors = load_file(model / "model.safetensors")
    tensors[TABLE][255, 3] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    report = fewbit.quantize(model, tmp_path / "out", fewbit.preset("rtn", bits=4))
    assert {"name": TABLE, "shape": [256, 64], "reason": "has a weight that is NaN or infinite"} in report["kept"]
    written = load_file(tmp_path / "out" / "model.safetensors")[TABLE]
    assert torch.equal(written.isfinite(), tensors[TABLE].isfinite())
    fewbit.load(tmp_path / "out", device="cpu")


def test_rows_of_any_length(tmp_path: Path) -> None:
    for columns, group in ((576, 64), (97, 97), (262, 262), (24, 24), (8, 8)):
        from fewbit.grids.embeddings import embedding_grid

        grid, _ = embedding_grid(6, columns)
        found = columns if grid.group_size == "row" else int(grid.group_size)
        assert found == group and columns % found == 0


def test_few_bits_without_data_say_what_to_expect(tiny: Path, tmp_path: Path) -> None:
    for bits, expected in ((3, "clearly worse text"), (2, "writes no sensible text")):
        said = run_cli("quantize", tiny, tmp_path / f"{bits}", "--bits", bits).stderr
        assert expected in said and f"--method precal+oac --bits {bits} --calibration" in said
        assert expected in run_cli("plan", tiny, "--bits", bits).stdout
    quiet = run_cli("quantize", tiny, tmp_path / "4")
    assert "without data" not in quiet.stderr + run_cli("plan", tiny).stdout
    assert json.loads((tmp_path / "4" / "config.json").read_text())["quantization_config"]["recipe"]["bits"] == 4


def test_progress_begins_before_the_first_tensor(tiny: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    options = fewbit.RunOptions(progress=lambda *one: seen.append(one), shard_size=60_000)
    fewbit.quantize(tiny, tmp_path / "out", fewbit.preset("rtn", bits=4), options)
    assert seen[0][0] == 0 and [one[0] for one in seen] == sorted(one[0] for one in seen)
    assert seen[-1][0] == seen[-1][1]
