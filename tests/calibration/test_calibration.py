"""Calibration sources: one syntax, repeatable tokens, and exact refusals."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, byte_tokenizer, run_cli

from fewbit.architecture.positions import positions_of
from fewbit.calibration.choice import CalibrationChoice, choice_from
from fewbit.calibration.source import Source, parse_sources, shares
from fewbit.calibration.tokens import make_set
from fewbit.errors import FewbitError
from fewbit.runtime.load import load


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return byte_tokenizer()


def write_texts(folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    text, lines = folder / "a.txt", folder / "b.jsonl"
    text.write_text("plain words that go on and on. " * 200)
    lines.write_text("".join(json.dumps({"text": f"document {i} " * 3, "other": "x"}) + "\n" for i in range(50)))
    return {"txt": text, "jsonl": lines, "folder": folder}


def test_syntax(tmp_path: Path) -> None:
    text = tmp_path / "a:b.txt"
    text.write_text("hello")
    assert parse_sources("none") == []
    assert parse_sources("self") == [Source("self", "self")]
    assert parse_sources("c4:64,nonsense:3") == [Source("hub", "c4", None, 64), Source("nonsense", "nonsense", None, 3)]
    assert parse_sources("some/set:column:7") == [Source("hub", "some/set", "column", 7)]
    assert parse_sources(str(text)) == [Source("file", str(text))]
    assert parse_sources(f"{text}:12") == [Source("file", str(text), None, 12)]
    assert parse_sources(f"{text}:body:12") == [Source("file", str(text), "body", 12)]
    assert [str(s) for s in parse_sources("c4:64,self")] == ["c4:64", "self"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("c4,,self", "a source is empty"),
        ("c4:0", "a number of at least 1"),
        ("self,none", "cannot be combined"),
        ("missing.txt", "missing.txt: no such file or folder"),
        ("./missing", "no such file or folder"),
    ],
)
def test_syntax_errors(text: str, message: str) -> None:
    with pytest.raises(FewbitError, match=message):
        parse_sources(text)


def test_shares() -> None:
    assert shares(parse_sources("self,nonsense"), 5) == [3, 2]
    assert shares(parse_sources("self:1,nonsense,random-tokens"), 6) == [1, 3, 2]
    assert shares(parse_sources("self:4,nonsense:9"), 13) == [4, 9]
    assert choice_from({"sources": "self:4,nonsense:9", "samples": None}).samples == 13
    assert choice_from({"sources": "self:4,nonsense"}).samples == 128
    with pytest.raises(
        FewbitError, match="--samples 2: the counts of the sources add up to 13: omit --samples or the counts"
    ):
        CalibrationChoice("self:4,nonsense:9", 2)
    with pytest.raises(FewbitError, match="--samples 3: the counts of the other sources leave 0 sequences for 1"):
        shares(parse_sources("self:4,nonsense"), 3)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "folder", "nonsense", "random-tokens"])
def test_same_arguments_same_tokens(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    source = str(write_texts(tmp_path / "texts").get(kind, kind))
    first, second = (make_set(CalibrationChoice(source, 5, 32, seed=3), tokenizer, 256) for _ in range(2))
    other = make_set(CalibrationChoice(source, 5, 32, seed=4), tokenizer, 256)
    assert first.ids.shape == (5, 32)
    assert first.ids.dtype == torch.int64
    assert torch.equal(first.ids, second.ids)
    assert first.sha256 == second.sha256 != other.sha256
    assert first.describe()["tokens_sha256"] == first.sha256
    assert first.describe()["tokens"] == 160


def test_documents_are_joined_and_never_padded(tmp_path: Path, tokenizer: Any) -> None:
    source = str(write_texts(tmp_path / "texts")["jsonl"])
    ids = make_set(CalibrationChoice(source, 4, 64), tokenizer, 256).ids
    assert not bool((ids == 1).any())
    text = tokenizer.decode(ids.reshape(-1))
    assert text.count("document") > 12


def test_parquet_and_columns(tmp_path: Path, tokenizer: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["some words " * 30] * 10}), path)
    assert make_set(CalibrationChoice(f"{path}:body:2", 2, 32), tokenizer, 256).ids.shape == (2, 32)
    parquet.write_table(pyarrow.table({"body": ["some words"], "title": ["a title"]}), path)
    with pytest.raises(FewbitError, match="no column 'text': it has body, title"):
        make_set(CalibrationChoice(str(path), 2, 32), tokenizer, 256)


def test_self_is_sampled_from_the_model(tiny: Path) -> None:
    model = load(tiny, device="cpu")
    choice = CalibrationChoice("self", 3, 20, seed=1)
    first, second = (make_set(choice, None, 256, model) for _ in range(2))
    assert torch.equal(first.ids, second.ids)
    assert first.ids.shape == (3, 20)
    assert not torch.equal(first.ids[0], first.ids[1])


def test_too_little_text_says_how_much_there_is(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x" * 100)
    with pytest.raises(FewbitError) as error:
        make_set(CalibrationChoice(str(path), 8, 32), tokenizer, 256)
    assert str(error.value) == (
        f"{path}: it has 100 tokens, which is 3 sequences of 32, but 8 were requested: use fewer or shorter "
        "sequences (--samples, --sequence-length), or more text"
    )


def test_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    source = str(write_texts(tmp_path / "texts")["jsonl"])
    with pytest.raises(FewbitError, match="--chat-template: the model's tokenizer has none"):
        make_set(CalibrationChoice(source, 2, 32, chat_template=True), tokenizer, 256)
    templated = byte_tokenizer()
    templated.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    with pytest.raises(FewbitError, match="--chat-template: self:3,random-tokens has no documents to apply it to"):
        CalibrationChoice("self:3,random-tokens", 5, 32, chat_template=True)
    ids = make_set(CalibrationChoice(source, 2, 300, chat_template=True), templated, 256).ids
    assert "<user>document" in templated.decode(ids.reshape(-1))


CALIBRATED = ["--method", "gptq", "--bits", "4", "--group-size", "32"]
RANDOM = ["--calibration", "random-tokens", "--samples", "4", "--sequence-length", "32"]


def refused(*arguments: Any) -> str:
    result = run_cli("quantize", *arguments, code=2)
    assert not result.stdout
    # Nothing stands in the way of the same name with better arguments.
    assert not list(Path(arguments[1]).parent.glob(".*fewbit*"))
    return result.stderr.strip().splitlines()[-1].removeprefix("fewbit: ")


def test_a_hub_data_set_without_a_network(tiny: Path, tmp_path: Path) -> None:
    line = refused(tiny, tmp_path / "out", *CALIBRATED, *RANDOM[2:], "--calibration", "c4")
    assert "c4: no such file, and the data set cannot be fetched" in line or "pip install 'fewbit[data]'" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["c4", "redpajama", "some/set:body"])
def test_a_hub_data_set(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((arguments, options))
        return [{"text": f"words of row {row} ", "body": None if row % 2 else "a body "} for row in range(50)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    ids = make_set(CalibrationChoice(name, 4, 32), tokenizer, 256).ids
    text = tokenizer.decode(ids.reshape(-1))
    assert ("a body" if name.endswith("body") else "words of row") in text
    assert "None" not in text
    [((path, configuration), options)] = asked
    files = options.pop("data_files")
    assert options.pop("trust_remote_code", False) is False
    assert options == {"split": "train", "streaming": True}
    assert (path, configuration) == {
        "c4": ("allenai/c4", "en"),
        "redpajama": ("json", None),
        "some/set:body": ("some/set", None),
    }[name]
    assert (files is not None) == (name == "redpajama")


def test_none_is_no_calibration(tiny: Path, tmp_path: Path) -> None:
    line = refused(tiny, tmp_path / "out", *CALIBRATED, *RANDOM[2:], "--calibration", "none")
    assert line == "this method needs a calibration set: give --calibration, e.g. self, c4 or a file"
    run_cli("quantize", tiny, tmp_path / "out", "--method", "rtn", "--calibration", "none")


@pytest.mark.slow
def test_memory_too_small_for_one_block(tiny: Path, tmp_path: Path) -> None:
    text = ["--calibration", "self", *RANDOM[2:], "--memory", "1KB"]
    expected = "block 1: its curvature takes 0.2 MB, but --memory allows 0.0 MB: give at least 0.2 MB"
    assert refused(tiny, tmp_path / "out", "--method", "oac", "--group-size", "32", *text) == expected
    for kind in ("gram", "fisher"):
        result = run_cli("curvature", tiny, tmp_path / kind, "--kind", kind, *text, code=2)
        assert result.stderr.strip().splitlines()[-1] == f"fewbit: {expected}"
        assert not (tmp_path / kind).exists()


@pytest.mark.slow
def test_sequences_longer_than_the_model(tiny: Path, tmp_path: Path) -> None:
    long = ["--calibration", "random-tokens", "--samples", "2", "--sequence-length", "129"]
    expected = "--sequence-length 129: the model's maximum length is 128: use 128 or less"
    assert refused(tiny, tmp_path / "out", *CALIBRATED, *long) == expected
    assert expected in run_cli("curvature", tiny, tmp_path / "c", *long, code=2).stderr
    assert f"problem: {expected}" in run_cli("plan", tiny, "--method", "oac", *long).stdout
    assert positions_of({"n_positions": 64}) == positions_of({"text_config": {"max_position_embeddings": 64}}) == 64
    assert positions_of({"hidden_size": 64}) is None


@pytest.mark.slow
def test_after_a_refusal_the_same_name_is_free(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    text = ["--samples", "4", "--sequence-length", "32", "--calibration"]
    refused(tiny, tmp_path / "out", *CALIBRATED, *text, tmp_path / "short.txt")
    refused(tiny, tmp_path / "out", *CALIBRATED, *text, tmp_path / "short.txt", "--tune", "--tune-epochs", "1")
    run_cli("quantize", tiny, tmp_path / "out", *CALIBRATED, *text, "nonsense")
    assert (tmp_path / "out" / "fewbit_report.json").is_file()


@pytest.mark.slow
def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    model = build_tiny(tmp_path / "model")
    for path in model.glob("token*"):
        path.unlink()
    run_cli("quantize", model, tmp_path / "out", *CALIBRATED, *RANDOM)
    line = refused(model, tmp_path / "more", *CALIBRATED, *RANDOM[2:], "--calibration", "nonsense")
    assert "no tokenizer that transformers can read (Couldn.t instantiate" in line.replace("'", ".")
    assert line.endswith("): add one, or use --calibration random-tokens")
