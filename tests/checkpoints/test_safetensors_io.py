import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fewbit.checkpoints.safetensors_io import FileReader, ShardWriter, header_room, read_header
from fewbit.errors import FewbitError


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "odd": torch.randint(0, 255, (3, 5), dtype=torch.uint8, generator=generator),
        "half": torch.randn(7, 3, generator=generator).half(),
        "brain": torch.randn(4, 4, generator=generator).bfloat16(),
        "wide": torch.randn(3, generator=generator),
        "empty": torch.zeros(0, 4),
        "words": torch.arange(5, dtype=torch.int16),
        "scalar": torch.tensor(3.0),
    }


def test_what_we_write_the_library_reads(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file({k: v for k, v in tensors.items() if k != "odd"}, tmp_path / "theirs.safetensors")
    entries, _ = read_header(tmp_path / "theirs.safetensors")
    writer = ShardWriter(tmp_path / "ours.safetensors", header_room(list(tensors)))
    with FileReader() as reader:
        writer.add("odd", tensors["odd"])
        for name in tensors:
            if name != "odd":
                writer.copy(entries[name], reader)
    writer.close()
    read = load_file(tmp_path / "ours.safetensors")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_library_writes_we_read_in_parts(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "a.safetensors")
    entries, _ = read_header(tmp_path / "a.safetensors")
    with FileReader() as reader:
        for name, tensor in tensors.items():
            assert torch.equal(reader.tensor(entries[name]), tensor)
        assert torch.equal(reader.read(entries["half"], 4, 6), tensors["half"].view(-1)[4:10])


def test_an_unfinished_file_has_no_name(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.safetensors", 1000)
    writer.add("x", torch.zeros(8))
    assert not (tmp_path / "a.safetensors").exists()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ONE = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
ATTACKS = {
    "empty file": (b"", "shorter than 8 bytes"),
    "only a length": (struct.pack("<Q", 10), "header claims 10 bytes"),
    "a length beyond the file": (raw({}, length=1 << 60), "header claims"),
    "not JSON": (raw(b"{'a': 1"), "not a complete safetensors file"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not a complete safetensors file"),
    "not an object": (raw([1]), "not an object"),
    "a name twice": (raw(b'{"a":1,"a":2}'), "a name occurs twice"),
    "a missing key": (raw({"a": {"dtype": "U8"}}), "not a complete safetensors file"),
    "a negative size": (raw({"a": {**ONE, "shape": [-4]}}, b"1234"), "not whole numbers"),
    "sizes that do not fit": (raw({"a": {**ONE, "shape": [5]}}, b"1234"), "its shape needs 5"),
    "data cut off": (raw({"a": ONE}, b"12"), "the file ends at"),
    "data left over": (raw({"a": ONE}, b"123456"), "the file ends at"),
    "a hole": (raw({"a": ONE, "b": {**ONE, "data_offsets": [5, 9]}}, b"123456789"), "starts at byte"),
    "an overlap": (raw({"a": ONE, "b": {**ONE, "data_offsets": [2, 6]}}, b"123456"), "starts at byte"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_damaged_headers_are_refused(tmp_path: Path, name: str) -> None:
    data, message = ATTACKS[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(FewbitError, match=message) as caught:
        read_header(path)
    assert "fetch or copy it again" in str(caught.value)
