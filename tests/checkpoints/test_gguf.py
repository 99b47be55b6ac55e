"""GGUF files: whole ones are converted, damaged ones refused in one line, and a replaced one is converted again."""

import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from conftest import run_cli

import fewbit
from fewbit.checkpoints import gguf as converted
from fewbit.checkpoints.gguf import folder_of_gguf
from fewbit.checkpoints.gguf_header import read_gguf_header
from fewbit.checkpoints.gguf_reader import reading_once
from fewbit.errors import FewbitError

gguf = pytest.importorskip("gguf")
BLOCKS = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
WIDTH, ROWS, WORDS = 32, 64, 64


def write_gguf(
    path: Path,
    architecture: str = "llama",
    leave: tuple[str, ...] = (),
    parts: int = 0,
    merge: str = '! "',
    numbers: str = "float32",
) -> Path:
    """A Llama of one block with a byte-pair tokenizer."""
    import numpy

    writer, random = gguf.GGUFWriter(path, architecture), numpy.random.default_rng(0)
    sizes = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": WIDTH,
        "feed_forward_length": ROWS,
        "attention.head_count": 2,
        "attention.head_count_kv": 2,
        "vocab_size": WORDS,
    }
    for key, value in sizes.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{architecture}.rope.freq_base", 1e4)
    if "model" not in leave:
        writer.add_tokenizer_model("gpt2")
    if "tokens" not in leave:
        writer.add_token_list(["<s>", "</s>", "<unk>", '!"', *(chr(33 + number) for number in range(WORDS - 4))])
        writer.add_token_types([3, 3, 3, *[1] * (WORDS - 3)])
        writer.add_token_merges([merge])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_unk_token_id(2)
    if parts:
        writer.add_uint16("split.count", parts)
    shapes = {
        "token_embd": (WORDS, WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
        **{f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (ROWS, WIDTH),
        "blk.0.ffn_up": (ROWS, WIDTH),
        "blk.0.ffn_down": (WIDTH, ROWS),
    }
    for name, shape in shapes.items() if "tensors" not in leave else ():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(numbers))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(path: Path) -> str:
    with pytest.raises(FewbitError) as caught:
        folder_of_gguf(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_a_whole_file_is_converted(whole: Path, tmp_path: Path, cache: Path) -> None:
    header = read_gguf_header(whole, BLOCKS)
    assert header.values["general.architecture"] == "llama" and header.values["tokenizer.ggml.tokens"] == WORDS
    assert len(header.tensors) == 11
    run_cli("quantize", whole, tmp_path / "out", "--method", "rtn")
    assert type(fewbit.load(tmp_path / "out")).__name__ == "LlamaForCausalLM"
    [folder] = (cache / "gguf").iterdir()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert not [path for path in folder.iterdir() if path.is_dir()]


def test_a_file_with_the_same_size_and_time_is_another_one(whole: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(whole, tmp_path / "a.gguf"))
    times = path.stat()
    first = folder_of_gguf(path)
    assert folder_of_gguf(path) == first
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    (tmp_path / "b.gguf").write_bytes(data)
    os.utime(tmp_path / "b.gguf", ns=(times.st_atime_ns, times.st_mtime_ns))
    (tmp_path / "b.gguf").replace(path)
    assert path.stat().st_mtime_ns == times.st_mtime_ns and path.stat().st_size == times.st_size
    replaced = folder_of_gguf(path)
    assert replaced != first
    path.write_bytes(whole.read_bytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert folder_of_gguf(path) not in (first, replaced)


def test_four_bytes_are_a_truncated_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    said = run_cli("quantize", tmp_path / "a.gguf", tmp_path / "out", "--method", "rtn", code=2).stderr
    assert said.startswith(f"fewbit: {tmp_path}/a.gguf: is truncated or damaged: it ends before its last tensor")
    assert said.count("\n") == 1


def test_a_file_that_ends_anywhere_is_truncated(whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    for size in (*range(4, 3000, 97), *range(3000, len(data), 4001), len(data) - 128):
        (tmp_path / "a.gguf").write_bytes(data[:size])
        with pytest.raises(FewbitError, match="truncated or damaged: it ends before its last tensor: fetch it again"):
            read_gguf_header(tmp_path / "a.gguf", BLOCKS)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not a GGUF file"),
        (b"GGML" * 9, "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "is GGUF version 1, but only versions 2 and 3 can be read"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "has no general.architecture"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "has no general.architecture"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60), "a name of"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 77), "a value of the unknown type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"\xff", 4), "a text that is not UTF-8"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 4, 2**62), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 9, 1), "a list of values of the type 9"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ1sII", 3, 0, 2, 1, b"a", 4, 5, 1, b"a", 4, 5), "the key a occurs twice"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"a", 99), "has 99 dimensions"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 8, 4321, 0), "has the type 4321"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 2**60, 0, 0), "truncated"),
    ],
)
def test_headers_that_lie(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "a.gguf").write_bytes(data)
    assert said in refused(tmp_path / "a.gguf")
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_files_that_transformers_cannot_use(tmp_path: Path) -> None:
    for leave in ("model", "tokens"):
        assert f"tokenizer.ggml.{leave} is missing" in refused(write_gguf(tmp_path / "a.gguf", leave=(leave,)))
    assert "contains no tensors" in refused(write_gguf(tmp_path / "a.gguf", leave=("tensors",)))
    assert "is one of 3 parts, whose names must be NAME-00001" in refused(write_gguf(tmp_path / "a.gguf", parts=3))
    assert "Error while initializing BPE" in refused(write_gguf(tmp_path / "a.gguf", merge="x yz"))
    said = refused(write_gguf(tmp_path / "a.gguf", "nothing"))
    assert said.startswith("transformers cannot read this GGUF file (GGUF model with architecture nothing")


def test_a_type_of_tensor_that_gguf_knows_but_cannot_read(tmp_path: Path) -> None:
    said = refused(write_gguf(tmp_path / "a.gguf", numbers="float64"))
    assert said.startswith("transformers cannot read this GGUF file (Dequantization for F64 is not yet implemented")


@pytest.mark.parametrize("error", [kind("odd") for kind in (ValueError, KeyError, OSError, NotImplementedError)])
def test_unknown_exceptions_are_not_refusals(
    whole: Path, cache: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(type(error), match="odd"):
        folder_of_gguf(whole)
    assert not list((cache / "gguf").iterdir())


def test_scratch_of_a_killed_process_is_inside_what_is_removed(
    whole: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def link(path: Path, header: Any, place: Path) -> None:
        seen.append(place)
        shutil.copyfile(path, place)

    monkeypatch.setattr(converted, "_link", link)
    folder = folder_of_gguf(whole)
    [place] = seen
    assert place.parent.parent.name == f"{folder.name}.partial-{os.getpid()}"
    assert [path.name for path in (cache / "gguf").iterdir()] == [folder.name]


def test_one_reading_for_all(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    plain, parsed = gguf.GGUFReader(whole), []
    build = gguf.GGUFReader._build_fields
    monkeypatch.setattr(
        gguf.GGUFReader, "_build_fields", lambda self, *given: parsed.append(self) or build(self, *given)
    )
    folder_of_gguf(whole)
    assert len(parsed) == 1
    with pytest.raises(ZeroDivisionError), reading_once():
        reader = gguf.GGUFReader(whole)
        assert gguf.GGUFReader(str(whole)) is reader and isinstance(reader, type(plain))
        assert gguf.GGUFReader(whole, "c") is not reader
        assert list(reader.fields) == list(plain.fields)
        for name, field in plain.fields.items():
            assert [part.tolist() for part in field.parts] == [part.tolist() for part in reader.fields[name].parts]
        for ours, theirs in zip(reader.tensors, plain.tensors, strict=True):
            assert ours.name == theirs.name and (ours.data == theirs.data).all()
        raise ZeroDivisionError
    assert gguf.GGUFReader(whole) is not reader and gguf.GGUFReader is type(plain)
