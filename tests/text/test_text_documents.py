"""One reader of text: what every kind of file gives to calibration and to evaluation, and what is refused."""

import bz2
import gzip
import json
import lzma
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, run_cli

from fewbit.calibration.choice import CalibrationChoice
from fewbit.calibration.documents import documents
from fewbit.calibration.source import parse_sources
from fewbit.calibration.tokens import make_set
from fewbit.errors import FewbitError
from fewbit.evaluation.text import read_text
from fewbit.text.files import TextFile
from fewbit.text.rows import json_values

ROWS = [{"text": "one", "id": "a"}, {"text": None, "id": "b"}, {"text": "two\r\nand ü", "id": "c"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
FILES: dict[str, str] = {
    "lines.jsonl": LINES,
    "lines.json": LINES,
    "array.json": json.dumps(ROWS, indent=1),
    "joined.json": json.dumps(ROWS, separators=(",", ":")),
    "rows.csv": 'text,id\none,a\n,b\n"two\r\nand ü",c\n',
}


def both(source: Path | str) -> tuple[list[str], str]:
    """The documents that calibration reads, and the text that is evaluated."""
    return list(documents(parse_sources(str(source))[0], 0)), read_text(str(source)).content


def refused(source: Path | str) -> str:
    """The message, the same for both uses."""
    messages = []
    for read in (lambda: list(documents(parse_sources(str(source))[0], 0)), lambda: read_text(str(source))):
        with pytest.raises(FewbitError) as error:
            read()
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    return messages[0]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_files_with_columns(tmp_path: Path, name: str, bom: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(bom + FILES[name].encode())
    assert both(path) == (["one", "two\r\nand ü"], "one\n\ntwo\r\nand ü")
    assert both(f"{path}:id") == (["a", "b", "c"], "a\n\nb\n\nc")
    assert refused(f"{path}:body") == f"{path}: no column 'body': it has text, id"


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    table = {**{key: [row[key] for row in ROWS] for key in ROWS[0]}, "vector": [[1.0, 2.0]] * 3}
    parquet.write_table(pyarrow.table(table), path)
    assert both(path) == (["one", "two\r\nand ü"], "one\n\ntwo\r\nand ü")
    assert refused(f"{path}:body") == f"{path}: no column 'body': it has text, id, vector"
    path.write_bytes(path.read_bytes()[:60])
    assert "not a readable Parquet file" in refused(path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert "this needs the package pyarrow: install it with  pip install 'fewbit[data]'" in refused(tmp_path)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_plain_text_is_taken_as_it_is(tmp_path: Path, bom: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(bom + "kept\r\nas it is\rü\n".encode())
    assert both(path) == (["kept\r\nas it is\rü\n"], "kept\r\nas it is\rü\n")
    assert both(path.rename(tmp_path / "NOTES.md"))[1] == "kept\r\nas it is\rü\n"


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("name", ["lines.jsonl", "rows.csv", "array.json"])
def test_packed_files(tmp_path: Path, name: str, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / (name + suffix)
    path.write_bytes(pack(FILES[name].encode()))
    assert both(path)[0] == both(tmp_path)[0] == ["one", "two\r\nand ü"]
    path.write_bytes(pack(FILES[name].encode() * 50)[:-12])
    assert str(path) in refused(path)
    path.write_bytes(b"no packed data at all")
    assert str(path) in refused(path)


def test_zstandard_where_python_has_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    if sys.version_info < (3, 14):
        path.write_bytes(b"\x28\xb5\x2f\xfd")
        assert "Python reads .zst only from 3.14 on: decompress it first" in refused(path)
    else:
        from compression import zstd

        path.write_bytes(zstd.compress(LINES.encode()))
        assert both(path)[0] == ["one", "two\r\nand ü"]


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in {"b.txt": "b", "a.jsonl": '{"text": "a"}\n', "sub/c.JSONL": '"c"\n', "README.md": "x"}.items():
        (tmp_path / name).write_text(text)
    assert both(tmp_path) == (["a", "b", "c"], "a\n\nb\n\nc")
    (tmp_path / "empty").mkdir()
    assert "contains no text file: supported are a .txt, .jsonl, .json, .csv or .parquet" in refused(tmp_path / "empty")


def test_columns_that_nobody_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for row, found in (
        ({"text": "a", "title": "b"}, "a"),
        ({"body": "a", "number": 3, "list": [1]}, "a"),
        ("a", "a"),
    ):
        path.write_text(json.dumps(row) + "\n")
        assert both(path) == ([found], found)
    for row, there in (
        ({"instruction": "a", "output": "b"}, "instruction, output"),
        ({"id": "a", "body": None}, "id, body"),
        ({"number": 3}, "number"),
        ({}, "none"),
    ):
        path.write_text(json.dumps(row) + "\n")
        expected = f"{path}: no column 'text': it has {there}: choose one as {path}:COLUMN"
        assert refused(path) == expected
    path.write_text('{"body": "a"}\n{"title": "b"}\n')
    assert refused(path) == f"{path}:2: no column 'body': it has title"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\nnot json\n', "a.jsonl:2: not a line of JSON (expecting value)"),
        ("a.jsonl", b"[1, 2]\n", "a.jsonl:1: not a JSON object with columns"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "a.jsonl:1: not a line of JSON"),
        ("a.jsonl", b'{"text": {"a": 1}}\n', "a.jsonl:1: its column 'text' holds a value of the kind dict"),
        ("a.jsonl", b'{"text": ["a", "b"]}\n', "a.jsonl:1: its column 'text' holds a value of the kind list"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "x\\ud800"}\n',
            "a.jsonl:2: character 1 of its text is half of a surrogate",
        ),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl: not UTF-8 text: byte 10 cannot be read"),
        ("a.txt", b"abc" * 400_000 + b"\xc3(", "a.txt: not UTF-8 text: byte 1,200,000 cannot be read"),
        ("a.txt", b"\xef\xbb\xbfabc\xe4\xb8", "a.txt: not UTF-8 text: byte 6 cannot be read"),
        ("a.txt", "text".encode("utf-16"), "a.txt: not UTF-8 text: byte 0 cannot be read"),
        ("a.json", b'[{"text": "a"}, {"text"', "a.json: object 2: not JSON"),
        ("a.json", b'[{"text": "a"}', "a.json: the array does not end"),
        ("a.json", b'[{"text": "a"}] x', "a.json: there is more text after the array"),
        ("a.json", b'{"text": "a" "b"}' + b" " * 100, "a.json: object 1: not JSON (expecting ',' delimiter)"),
        ("a.json", b"[" * 100_000, "a.json: object 1: not"),
        ("a.csv", b"text,id\na,b,c\n", "a.csv:2: 3 fields, but the first line has 2"),
        ("a.csv", b"text,text\na,b\n", "a.csv: two columns have the same name"),
        ("a.csv", b'text,id\n"a,b\n', "a.csv:2: not a line of CSV"),
        ("a.csv", b"one,two\na,b\n", "a.csv: no column 'text': it has one, two"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refused(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, content) for name in ("a.txt", "a.jsonl", "a.json") for content in (b"", b"\n \n", b"\xef\xbb\xbf")),
        *((name, content) for name in ("a.jsonl", "a.json") for content in (b'{"text": null}\n', b'{"text": " "}\n')),
        ("a.json", b"[]"),
        ("a.csv", b"text\n"),
    ],
)
def test_empty_files(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FewbitError, match="the text is empty"):
        read_text(path)
    with pytest.raises(FewbitError, match="it has 0 tokens"):
        make_set(CalibrationChoice(str(path), 1, 8), byte_tokenizer(), 256)


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "no such file or folder" in str(refuse_source(tmp_path / "missing.jsonl"))
    assert "no such file or folder" in str(refuse_source(f"{tmp_path}/missing.jsonl:messages"))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.txt")
        assert "not a regular file or folder, and text is read more than once" in refused(tmp_path / "pipe.txt")
        assert "contains no text file" in refused(tmp_path)
    if os.path.exists(os.devnull) and os.name == "posix":  # noqa: PTH110
        assert "not a regular file or folder" in refused(os.devnull)


def refuse_source(source: Path | str) -> str:
    with pytest.raises(FewbitError) as first:
        parse_sources(str(source))
    with pytest.raises(FewbitError) as second:
        read_text(str(source))
    assert str(first.value).removeprefix("--calibration ") == str(second.value).removeprefix("--data ")
    return str(first.value)


@pytest.mark.parametrize("source", ["self:-3", "a:0", "c4:99999999999999999999", "self:words", "random-tokens:a:3"])
def test_counts(source: str) -> None:
    with pytest.raises(FewbitError, match=r"a number of at least 1|followed only by a number of sequences"):
        parse_sources(source)


def test_a_plain_text_stays_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "ä bcd€f" * 300_000
    path.write_text(text, encoding="utf-8")
    file = TextFile(path)
    assert file.size == len(text)
    assert file.part(7, 2_000_003).read() == text[7:2_000_003]
    assert file.part(1_999_999, None).read() == text[1_999_999:]
    assert not file.part(0, 0).read()


def test_json_is_read_an_object_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [{"text": "[{" + 'x\\",' * (n % 700)} for n in range(3000)]
    for content in (json.dumps(rows), "\n\n".join(json.dumps(row, indent=2) for row in rows)):
        path.write_text(content)
        assert [row.values for row in json_values(path)] == rows


def test_long_fields_of_csv(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text('text\n"' + "a b " * 100_000 + '"\n')
    assert len(both(tmp_path / "a.csv")[1]) == 400_000
    assert csv.field_size_limit() == before


def test_long_texts_at_random_places(tmp_path: Path) -> None:
    """The same draws, whether a long text comes from a plain file or a row, and those of the whole text's tokens."""
    tokenizer = byte_tokenizer()
    text = "".join(f"sentence {n} of many. " for n in range(20_000))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    drawn = [
        [make_set(CalibrationChoice(str(tmp_path / name), 3, 64, seed), tokenizer, 256).ids for seed in range(3)]
        for name in ("a.txt", "a.jsonl")
    ]
    for one, two in zip(*drawn, strict=True):
        assert torch.equal(one, two)
        assert tokenizer.decode(one.reshape(-1)) in text
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append(options)
        if arguments[0] == "some/failing":
            raise ConnectionError("Bad line: test.\nMore about it")
        return [{"body": "a", "id": 1}, {"body": None, "id": 2}, {"body": "b", "id": 3}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, __version__="3.1"))
    assert both("some/set:body") == both("some/set") == (["a", "b"], "a\n\nb")
    assert [one["split"] for one in asked] == ["train", "test"] * 2
    assert not any(one["trust_remote_code"] for one in asked)
    assert "column 'id' holds a value of the kind int" in refused("some/set:id")
    assert refused("some/set:x") == "some/set: no column 'x': it has body, id"
    with pytest.raises(FewbitError, match=r"some/failing: no such file, .*ConnectionError: Bad line: test\.\)"):
        read_text("some/failing")


def test_the_command_line_says_where(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("one,two\na,b\n")
    expected = f"fewbit: {path}: no column 'text': it has one, two: choose one as {path}:COLUMN"
    quantize = ("quantize", tiny, tmp_path / "out", "--method", "gptq", "--sequence-length", "64", "--calibration")
    for words in (("eval", tiny, "--data"), quantize):
        assert run_cli(*words, path, code=2).stderr.strip().splitlines()[-1] == expected
