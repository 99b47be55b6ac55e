"""JSON from strangers: whatever it holds, one line says what is wrong with it."""

import json
from pathlib import Path

import pytest
from conftest import copy_folder, run_cli

from fewbit.checkpoints.json_in import parse_json, read_json_object
from fewbit.errors import FewbitError

BAD = {
    "nested": ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested more than 100 deep"),
    "nested a little": ('{"a": ' + "[" * 300 + "]" * 300 + "}", "nested more than 100 deep"),
    "objects": ('{"a": ' * 300 + "1" + "}" * 300, "nested more than 100 deep"),
    "a long number": ('{"a": ' + "9" * 5000 + "}", "a number of 5000 digits"),
    "half of a surrogate pair": ('{"a": "\\ud83d"}', "half of a surrogate pair"),
    "contradiction": ('{"a": 1, "a": 2}', "'a' occurs twice with different values"),
    "not JSON": ("{", "not valid JSON"),
    "no object": ("[1]", "not a JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    text, message = BAD[name]
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(FewbitError, match=message):
        read_json_object(tmp_path / "a.json")


def test_bytes_that_are_no_text_and_files_that_are_too_large(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"\xff": 1}')
    with pytest.raises(FewbitError, match="not valid JSON"):
        read_json_object(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a": "' + "x" * (2 << 20) + '"}')
    with pytest.raises(FewbitError, match="larger than 1 MB"):
        read_json_object(tmp_path / "a.json", 1 << 20)
    with pytest.raises(FewbitError, match="cannot be read"):
        read_json_object(tmp_path / "b.json")


def test_what_is_read() -> None:
    data = {"a": [1, -2.5, None, True, "ü", {"b": [[]]}], "": 10**300}
    assert parse_json(json.dumps(data)) == data
    # State-space models have a time step without an upper limit in their configs.
    assert parse_json('{"a": Infinity, "b": 1, "b": 1}') == {"a": float("inf"), "b": 1}
    for text in ('{"a": Infinity}', '{"a": NaN}', '{"a": 1e999}', '{"b": 1, "b": 1}'):
        with pytest.raises(ValueError):
            parse_json(text, strict=True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "hf_quant_config.json"])
def test_every_command_says_it_in_one_line(tiny: Path, tmp_path: Path, name: str) -> None:
    model = copy_folder(tiny, tmp_path / "model")
    (model / name).write_text(BAD["nested"][0])
    for command in (("quantize", model, tmp_path / "out", "--method", "rtn"), ("plan", model), ("inspect", model)):
        line = run_cli(*command, code=2).stderr
        assert line == f"fewbit: {model / name}: not valid JSON (nested more than 100 deep)\n"
    assert not (tmp_path / "out").exists()


def test_files_that_only_transformers_reads(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words and words " * 20)
    model = copy_folder(tiny, tmp_path / "model")
    for name in ("tokenizer_config.json", "generation_config.json", "tokenizer.json"):
        before = (model / name).read_bytes() if (model / name).is_file() else None
        (model / name).write_text(BAD["nested"][0])
        result = run_cli("eval", model, "--data", tmp_path / "a.txt", "--seq-len", 16, "--windows", 1, code=2)
        assert result.stderr.startswith(f"fewbit: {model}") and result.stderr.count("\n") == 1
        (model / name).unlink()
        if before is not None:
            (model / name).write_bytes(before)


def test_a_nested_header(tiny: Path, tmp_path: Path) -> None:
    model = copy_folder(tiny, tmp_path / "model")
    for path in model.glob("model*"):
        path.unlink()
    header = b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    line = run_cli("inspect", model, code=2).stderr
    assert "not a complete safetensors file (nested more than 100 deep)" in line


def test_a_report_of_a_quantized_folder(tiny: Path, tmp_path: Path) -> None:
    run_cli("quantize", tiny, tmp_path / "q", "--method", "rtn")
    for text in (BAD["nested"][0], '{"model": 7, "source": "x"}'):
        for name in ("fewbit_report.json", "fewbit_run.json"):
            (tmp_path / "q" / name).write_text(text)
        # Without a report that says where the original is, there is nothing to compare with.
        assert json.loads(run_cli("inspect", tmp_path / "q", "--json").stdout)["reference"] is None
