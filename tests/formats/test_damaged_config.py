"""Values of the wrong kind in a folder's own quantization_config are refused in one line by whatever reads them."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import copy_folder, run_cli

import fewbit
from fewbit.checkpoints.source import open_checkpoint
from fewbit.errors import FewbitError
from fewbit.formats.config import has_scaled_channels, recipe_of, weights_of


@pytest.fixture(scope="module")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged") / "packed"
    fewbit.quantize(tiny, folder, fewbit.preset("rtn", bits=4))
    return folder


def damaged(packed: Path, folder: Path, changes: dict[str, Any]) -> Path:
    model = copy_folder(packed, folder)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"].update(changes)
    (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(({"recipe": value}, "damaged quantization_config: recipe: Input should be") for value in ([1], "x", 5, True)),
        ({"recipe": {"method": 5}}, "damaged quantization_config: recipe.method: Input should be a valid string"),
        ({"recipe": {"method": "rtn", "transform": [1]}}, "damaged quantization_config: recipe.transform: "),
        ({"recipe": {"method": "rtn", "bits": "x"}}, "damaged quantization_config: recipe.bits: "),
        ({"weights": {}}, "damaged quantization_config: weights lists none: fetch or write the folder again"),
        ({"weights": None}, "damaged quantization_config: weights: Input should be a valid dictionary"),
        ({"weights": [1]}, "damaged quantization_config: weights: Input should be a valid dictionary"),
        ({"weights": {"a": 5}}, "damaged quantization_config: weights.a: Input should be a valid dictionary"),
        ({"schemes": 5}, "damaged quantization_config: schemes: Input should be a valid list"),
        ({"schemes": [5]}, "damaged quantization_config: schemes.0: Input should be a valid dictionary"),
        ({"format_version": [1]}, "format version [1]: this fewbit reads versions"),
        ({"weights": {"a\x1b]": 5}}, r"damaged quantization_config: weights.a\x1b]: "),
    ],
)
def test_every_command_says_the_same(
    tiny: Path, packed: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    model = damaged(packed, tmp_path / "m", changes)
    for words in (
        ("eval", model, "--data", "topics", "--seq-len", 16, "--windows", 1),
        ("inspect", model),
        ("unpack", model, tmp_path / "out"),
    ):
        line = run_cli(*words, code=2).stderr
        assert line.startswith(f"fewbit: {model}: {said}") and line.count("\n") == 1 and len(line) < 600
    with pytest.raises(FewbitError, match=r"damaged quantization_config|format version"):
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(model)
    assert {path.name for path in tmp_path.iterdir()} == {"m"}


def test_a_folder_without_a_recipe_is_whole(packed: Path, tmp_path: Path) -> None:
    for number, recipe in enumerate((None, {})):
        model = damaged(packed, tmp_path / f"m{number}", {"recipe": recipe})
        run_cli("unpack", model, tmp_path / f"out{number}")
        assert recipe_of(open_checkpoint(model)) == {} and weights_of(open_checkpoint(model))
        assert not has_scaled_channels(open_checkpoint(model))


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        ({"transform": "awq"}, True),
        ({"transform": "smoothquant"}, True),
        ({"channel_scales": "awq"}, True),
        ({"channel_scales": "none"}, False),
        ({"transform": "none"}, False),
        ({"transform": None}, False),
        ({"transform": "of a later version"}, False),
    ],
)
def test_whether_channels_were_scaled(packed: Path, tmp_path: Path, recipe: dict[str, Any], wanted: bool) -> None:
    assert has_scaled_channels(open_checkpoint(damaged(packed, tmp_path / "m", {"recipe": recipe}))) == wanted


def test_the_table_of_transforms_decides(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.transforms.table import TRANSFORMS

    monkeypatch.setitem(TRANSFORMS, "another", TRANSFORMS["awq"])
    model = damaged(packed, tmp_path / "m", {"recipe": {"transform": "another", "bits": 4}})
    assert has_scaled_channels(open_checkpoint(model))
    assert recipe_of(open_checkpoint(model)) == {"transform": "another", "bits": 4}
