"""Tokenizers with values of the wrong kind are refused with file and key; unknown exceptions are not refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import copy_folder, run_cli

from fewbit.checkpoints.own_code import open_tokenizer
from fewbit.errors import FewbitError, NoTokenizerError, raised_in

CONFIG, SPECIAL, WHOLE = "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"


def changed(model: Path, name: str, values: dict[str, Any]) -> None:
    path = model / name
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**before, **values}))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *((CONFIG, "tokenizer_class", value) for value in (5, True, ["a"], {})),
        ("config.json", "tokenizer_class", 5),
        (CONFIG, "auto_map", 5),
        *((CONFIG, "bos_token", value) for value in (5, {"a": 1}, ["x"])),
        *((CONFIG, "added_tokens_decoder", value) for value in (5, {"a": 1}, {"x": {"content": "q"}}, {"3": 5})),
        *((CONFIG, key, 5) for key in ("extra_special_tokens", "additional_special_tokens", "model_input_names")),
        (CONFIG, "additional_special_tokens", [5]),
        (CONFIG, "model_specific_special_tokens", 5),
        *((CONFIG, "chat_template", value) for value in ([1], [{"name": "a"}])),
        (CONFIG, "split_special_tokens", []),
        (SPECIAL, "bos_token", 5),
        *((WHOLE, "added_tokens", value) for value in (5, None, [5], [{"id": "x"}])),
        *((WHOLE, "model", value) for value in (5, [])),
    ],
)
def test_values_of_the_wrong_kind_are_named(tiny: Path, tmp_path: Path, name: str, key: str, value: Any) -> None:
    model = copy_folder(tiny, tmp_path / "m")
    changed(model, name, {key: value})
    with pytest.raises(FewbitError, match=rf"{name}: its {key} must be .*, not .*: correct or fetch the file again$"):
        open_tokenizer(model)


def test_the_command_line_names_file_and_key(tiny: Path, tmp_path: Path) -> None:
    model = copy_folder(tiny, tmp_path / "m")
    changed(model, CONFIG, {"tokenizer_class": 5})
    for sources in ("nonsense", "random-tokens"):
        calibrated = ("--method", "gptq", "--calibration", sources, "--samples", 2, "--sequence-length", 8)
        said = run_cli("quantize", model, tmp_path / "out", *calibrated, code=2).stderr
        wanted = "its tokenizer_class must be a string, not 5: correct or fetch the file again"
        assert said == f"fewbit: {model}/{CONFIG}: {wanted}\n"
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        (CONFIG, {"padding_side": "up"}, "Padding side should be selected"),
        (WHOLE, {"model": {"type": "X"}}, "data did not match any variant"),
        (WHOLE, {"added_tokens": [{"id": -1, "content": "x"}]}, "invalid value"),
    ],
)
def test_what_the_libraries_refuse_is_said(tiny: Path, tmp_path: Path, name: str, values: Any, said: str) -> None:
    model = copy_folder(tiny, tmp_path / "m")
    changed(model, name, values)
    with pytest.raises(NoTokenizerError, match=rf"no tokenizer that transformers can read \({said}"):
        open_tokenizer(model)


@pytest.mark.parametrize("data", [None, b"broken"])
def test_what_sentencepiece_refuses_is_said(tmp_path: Path, data: bytes | None) -> None:
    pytest.importorskip("sentencepiece")
    changed(tmp_path, "config.json", {"model_type": "gpt-sw3"})
    changed(tmp_path, CONFIG, {"tokenizer_class": "GPTSw3Tokenizer"})
    if data is not None:
        (tmp_path / "spiece.model").write_bytes(data)
    with pytest.raises(NoTokenizerError, match="no tokenizer that transformers can read "):
        open_tokenizer(tmp_path)


def test_values_that_transformers_takes(tiny: Path, tmp_path: Path) -> None:
    model = copy_folder(tiny, tmp_path / "m")
    values = {"tokenizer_class": None, "pad_token": {"content": "<s>", "__type": "AddedToken"}, "chat_template": None}
    changed(model, CONFIG, {**values, "extra_special_tokens": {"image_token": "<i>"}, "added_tokens_decoder": {}})
    assert open_tokenizer(model)("a").input_ids


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "{}", '{"added_tokens": []}'])
def test_a_damaged_tokenizer(tiny: Path, tmp_path: Path, text: str) -> None:
    model = copy_folder(tiny, tmp_path / "m")
    (model / WHOLE).write_text(text)
    with pytest.raises(FewbitError, match=r"tokenizer\.json: (not valid JSON|not a JSON object|has no )"):
        open_tokenizer(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [OSError("odd"), ValueError("odd"), KeyError("odd"), TypeError("odd"), RecursionError("odd")]
)
def test_unknown_exceptions_are_not_refusals(
    tiny: Path, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(type(error), match="odd"):
        open_tokenizer(tiny)
    drawn = ("--method", "gptq", "--calibration", "random-tokens", "--samples", 2, "--sequence-length", 8)
    with pytest.raises(type(error), match="odd"):
        run_cli("quantize", tiny, tmp_path / "out", *drawn)
    assert not list(tmp_path.iterdir())


def test_who_raised_an_exception() -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("{")
    assert raised_in(caught.value, "json") and not raised_in(caught.value, "js", "fewbit")
    assert not raised_in(ValueError("never raised"), "json")
