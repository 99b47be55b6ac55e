"""GGUF files in several parts: imported and converted as if they were one; missing, foreign and damaged parts named."""

import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import copy_folder, run_cli
from safetensors.torch import load_file
from test_import_gguf import TYPES, rounded, write

import fewbit
from fewbit.checkpoints.gguf import folder_of_gguf
from fewbit.checkpoints.gguf_header import read_gguf_header
from fewbit.checkpoints.gguf_parts import only_gguf_in, read_gguf, stem_of, write_joined, write_outline
from fewbit.errors import FewbitError

gguf = pytest.importorskip("gguf")
BLOCKS = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
NAMES = [f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file, and a folder with the same in three parts, as the package writes them."""
    top = tmp_path_factory.mktemp("parts")
    (top / "parts").mkdir()
    write(top / "model.gguf", TYPES["q4_0"], make=rounded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", partial(gguf.GGUFWriter, split_max_tensors=4))
        write(top / "parts" / "model.gguf", TYPES["q4_0"], make=rounded)
    assert sorted(path.name for path in (top / "parts").iterdir()) == NAMES
    return top / "model.gguf", top / "parts"


def refused(folder: Path, name: str = NAMES[0]) -> str:
    with pytest.raises(FewbitError) as caught:
        fewbit.import_model(folder / name, folder.parent / "out")
    assert not (folder.parent / "out").exists() and "\n" not in str(caught.value)
    return str(caught.value)


def changed(path: Path, key: str, form: str, value: int) -> None:
    """Another number under a key of a part."""
    data = bytearray(path.read_bytes())
    at = data.index(key.encode()) + len(key) + 4
    struct.pack_into("<" + form, data, at, value)
    path.write_bytes(data)


@pytest.mark.parametrize("given", [NAMES[0], NAMES[2], ""])
def test_imported_as_one(made: tuple[Path, Path], given: str, tmp_path: Path) -> None:
    whole, parts = made
    one = fewbit.import_model(whole, tmp_path / "one")
    report = fewbit.import_model(parts / given, tmp_path / "three")
    assert report["model"] == one["model"] == "model"
    assert report["source"]["bytes"] == sum(path.stat().st_size for path in parts.iterdir())
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("one", "three"))
        if name != "model.safetensors":
            assert first == second
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "three"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_converted_as_one(made: tuple[Path, Path]) -> None:
    first, second = (load_file(folder_of_gguf(path) / "model.safetensors") for path in (made[0], made[1] / NAMES[1]))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_joined_as_the_package_reads_it(made: tuple[Path, Path], tmp_path: Path) -> None:
    whole, parts = made
    write_joined(read_gguf(parts / NAMES[0], BLOCKS), tmp_path / "joined.gguf")
    theirs, ours = gguf.GGUFReader(whole), gguf.GGUFReader(tmp_path / "joined.gguf")
    assert [key for key in theirs.fields if "GGUF." not in key] == [key for key in ours.fields if "GGUF." not in key]
    found = {tensor.name: tensor for tensor in ours.tensors}
    for tensor in theirs.tensors:
        assert np.array_equal(found[tensor.name].data, tensor.data)
    write_outline(read_gguf(whole, BLOCKS), tmp_path / "outline.gguf")
    outline = read_gguf_header(tmp_path / "outline.gguf", BLOCKS)
    header = read_gguf_header(whole, BLOCKS)
    assert outline.tensors.keys() == header.tensors.keys()
    assert outline.values["tokenizer.ggml.tokens"] == header.values["tokenizer.ggml.tokens"]


def test_names(made: tuple[Path, Path], tmp_path: Path) -> None:
    whole, parts = made
    assert only_gguf_in(parts) == parts / NAMES[0] and stem_of(parts / NAMES[1]) == "model" == stem_of(whole)
    both = copy_folder(parts, tmp_path / "both")
    (both / "other.gguf").write_bytes(whole.read_bytes())
    with pytest.raises(FewbitError, match=r"contains 2 .gguf files \(model-00001-of-00003.gguf, other.gguf\)"):
        only_gguf_in(both)
    (both / "config.json").write_text("{}")
    assert only_gguf_in(both) is None


def test_parts_that_are_not_there_or_do_not_belong(made: tuple[Path, Path], tmp_path: Path) -> None:
    parts = copy_folder(made[1], tmp_path / "parts")
    (parts / NAMES[1]).rename(parts / "kept")
    assert f"{parts / NAMES[1]}: this part of 3 is missing: fetch all parts" in refused(parts)
    assert "quantize" not in run_cli("import", parts, tmp_path / "out", code=2).stderr
    (parts / NAMES[1]).write_bytes((parts / NAMES[2]).read_bytes())
    assert f"{parts / NAMES[1]}: is not part 2 of 3 of this file" in refused(parts)
    (parts / NAMES[1]).write_bytes(made[0].read_bytes())
    assert "is not part 2 of 3" in refused(parts)
    (parts / NAMES[1]).write_bytes((parts / "kept").read_bytes()[:-64])
    assert f"{parts / NAMES[1]}: is truncated or damaged" in refused(parts)
    (parts / NAMES[1]).write_bytes((parts / "kept").read_bytes())
    (parts / NAMES[0]).rename(parts / "model.gguf")
    assert "is one of 3 parts, whose names must be NAME-00001-of-00003.gguf" in refused(parts, "model.gguf")


def test_counts_that_lie(made: tuple[Path, Path], tmp_path: Path) -> None:
    for key, form, value, said in [
        ("split.count", "H", 4, "is one of 4 parts, whose names"),
        ("split.count", "H", 60000, "is one of 60000 parts, whose names"),
        ("split.tensors.count", "i", 12, "has 11 tensors in 3 parts, but states 12"),
        ("split.no", "H", 2, "is not part 1 of 3"),
    ]:
        parts = copy_folder(made[1], tmp_path / f"{key}-{value}")
        changed(parts / NAMES[0], key, form, value)
        assert said in refused(parts)
    parts = copy_folder(made[1], tmp_path / "twice")
    data = (parts / NAMES[1]).read_bytes()
    name = next(iter(read_gguf_header(parts / NAMES[1], BLOCKS).tensors)).encode()
    other = next(one for one in read_gguf_header(parts / NAMES[0], BLOCKS).tensors if len(one) == len(name)).encode()
    (parts / NAMES[1]).write_bytes(data.replace(name, other))
    assert f"the tensor {other.decode()} is in two parts" in refused(parts)
