"""GGUF files as native folders: every type bit for bit, every architecture there and back, and damaged files."""

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import copy_folder, run_cli
from gguf_models import ARCHITECTURES, LLAMA3, build
from safetensors.torch import load_file

import fewbit
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import open_checkpoint
from fewbit.errors import FewbitError
from fewbit.formats.config import tables_of, weights_of
from fewbit.formats.gguf_blocks import BLOCK_TYPES
from fewbit.runtime.unpack import read_weight

gguf = pytest.importorskip("gguf")
WIDTH, INNER, WORDS = 256, 512, 64
TYPES = {name: gguf.GGMLQuantizationType[name.upper()] for name in BLOCK_TYPES}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a native folder, decoded to float32."""
    checkpoint = open_checkpoint(folder)
    packed = weights_of(checkpoint)
    with FileReader() as reader:
        found = {one.tensor_name(name): read_weight(checkpoint, reader, name, one) for name, one in packed.items()}
        for name, entry in checkpoint.entries.items():
            if entry.dtype.is_floating_point:
                found[name] = reader.tensor(entry).float()
    return found


def blocks(kind: Any, shape: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """Random blocks whose float16 numbers are finite: bytes of 0x78 and above would begin infinite ones."""
    weights_in, size = gguf.GGML_QUANT_SIZES[kind]
    return random.integers(0, 120, (shape[0], shape[1] // weights_in * size)).astype(np.uint8)


def rounded(kind: Any, shape: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """Blocks of small random weights, which a network can run with."""
    return gguf.quants.quantize(random.standard_normal(shape).astype(np.float32) * 0.06, kind)


def write(
    path: Path, kind: Any, tensors: dict[str, Any] | None = None, make: Any = blocks, **facts: Any
) -> dict[str, np.ndarray]:
    """A Llama of one block; returns its weights as the gguf package decodes them.

    kind: the type of its matrices, whose blocks `make` makes. tensors: others, or None to leave one out. facts:
    metadata that differ.
    """
    random, writer = np.random.default_rng(0), gguf.GGUFWriter(path, "llama")
    sizes: dict[str, Any] = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": WIDTH,
        "feed_forward_length": INNER,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 64,
        "vocab_size": WORDS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 1e4,
        **facts,
    }
    for key, value in sizes.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"llama.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "<unk>", '!"', *(chr(33 + number) for number in range(WORDS - 4))])
    writer.add_token_types([3, 3, 3, *[1] * (WORDS - 3)])
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    shapes = {
        "token_embd": (WORDS, WIDTH),
        **{f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "output")},
        **{f"blk.0.attn_{name}": (WIDTH // 2, WIDTH) for name in ("k", "v")},
        "blk.0.ffn_gate": (INNER, WIDTH),
        "blk.0.ffn_up": (INNER, WIDTH),
        "blk.0.ffn_down": (WIDTH, INNER),
    }
    found: dict[str, Any] = {f"{name}.weight": (make(kind, shape, random), kind) for name, shape in shapes.items()}
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        found[f"{name}.weight"] = (random.standard_normal(WIDTH).astype(np.float32), gguf.GGMLQuantizationType.F32)
    for name, one in {**found, **(tensors or {})}.items():
        if one is not None:
            writer.add_tensor(name, one[0], raw_dtype=one[1])
        found[name] = one
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: gguf.quants.dequantize(*one) for name, one in found.items() if one is not None}


NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
}


def in_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of neighbouring pairs, as llama.cpp has them, in the order of transformers: two halves."""
    out, size = np.empty_like(weight), weight.shape[0] // heads
    for head in range(heads):
        for pair in range(size // 2):
            out[head * size + pair] = weight[head * size + 2 * pair]
            out[head * size + size // 2 + pair] = weight[head * size + 2 * pair + 1]
    return out


@pytest.mark.parametrize("name", TYPES)
def test_every_type_keeps_its_weights_and_bytes(tmp_path: Path, name: str) -> None:
    path, out = tmp_path / "model.gguf", tmp_path / "out"
    theirs = write(path, TYPES[name])
    report = fewbit.import_model(path, out)
    ours = weights(out)
    assert ours.keys() == NAMES.keys()
    for called, other in NAMES.items():
        wanted = theirs[other]
        for part, heads in (("attn_q", 4), ("attn_k", 2)):
            wanted = in_halves(wanted, heads) if part in other else wanted
        assert np.array_equal(ours[called].numpy(), wanted), called
    tensors = gguf.GGUFReader(path).tensors
    size = sum(int(one.n_bytes) for one in tensors)
    output = report["output"]
    assert output["bytes"] + output["embedding_bytes"] + output["kept_bytes"] == size
    assert tables_of(open_checkpoint(out)) == {"model.embed_tokens"}
    assert report["recipe"]["imported"]["types"] == {name: 8, "f32": 3}
    assert str(tmp_path) not in (out / "config.json").read_text() + (out / "fewbit_report.json").read_text()


@pytest.fixture(scope="module")
def q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("q4") / "model.gguf"
    write(path, TYPES["q4_0"], make=rounded)
    return path


@pytest.mark.slow
def test_an_imported_folder_is_a_folder_like_any_other(q4: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", tmp_path / "text.txt"
    made = json.loads(run_cli("import", q4, out, "--json").stdout)
    assert made["models"][0]["bits_per_weight"] == 4.5 and made["models"][0]["method"] == "GGUF (imported)"
    text.write_text("!\"#$%&'()" * 200)
    ids = torch.arange(20).view(1, -1)
    packed = fewbit.load(out, dtype=torch.float32, device="cpu")(ids).logits.detach()
    fewbit.unpack(out, tmp_path / "plain")
    plain = fewbit.load(tmp_path / "plain", dtype=torch.float32, device="cpu")(ids).logits.detach()
    assert packed.std() > 0 and torch.allclose(packed, plain, rtol=0.05, atol=0.05 * float(plain.std()))
    found = json.loads(run_cli("eval", out, "--data", text, "--seq-len", 32, "--windows", 2, "--json").stdout)
    assert found["models"][0]["bits_per_weight"] == 4.5
    assert "q_proj" in run_cli("inspect", out, "--json").stdout
    assert "give the original with --reference" in run_cli("tune", out, tmp_path / "t", code=2).stderr
    assert "already quantized (fewbit)" in run_cli("quantize", out, tmp_path / "q", code=2).stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """A folder that is exported and imported has the same packed bytes and the same kept weights."""
    model = build(tmp_path / "model", name)
    run_cli("quantize", model, tmp_path / "packed", "--method", "rtn", "--grid", "q4_0", "--embedding-bits", 16)
    fewbit.export(tmp_path / "packed", tmp_path / "file")
    config = ["--config", model] if name in ("phi3", "llama3") else []
    run_cli("import", tmp_path / "file" / "file.gguf", tmp_path / "back", *config)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("packed", "back"))
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        same = torch.equal(after[key], tensor) if not tensor.is_floating_point() else None
        assert same is not False, key
        if same is None:
            assert torch.allclose(after[key].float(), tensor.float(), rtol=0, atol=1e-7), key
    ids = torch.arange(12).view(1, -1) + 20
    first, second = (fewbit.load(tmp_path / f, device="cpu")(ids).logits for f in ("packed", "back"))
    assert torch.equal(first, second)


@pytest.mark.slow
def test_tuned_with_a_reference(tmp_path: Path) -> None:
    model = build(tmp_path / "model", "llama")
    text = tmp_path / "text.txt"
    text.write_text("the man and the sand in the land. " * 200)
    run_cli("quantize", model, tmp_path / "packed", "--grid", "q4_1", "--embedding-bits", 16, "--method", "rtn")
    fewbit.export(tmp_path / "packed", tmp_path / "file", embeddings="q8_0")
    run_cli("import", tmp_path / "file" / "file.gguf", tmp_path / "back")
    options = ["--calibration", text, "--samples", 8, "--sequence-length", 16, "--epochs", 1, "--held-out", 2]
    words = ["tune", tmp_path / "back", tmp_path / "tuned", "--reference", model, *options, "--batch-size", 2]
    run_cli(*words, "--device", "cpu")
    report = json.loads((tmp_path / "tuned" / "fewbit_report.json").read_text())
    assert report["method"] == "GGUF (imported) + qaft"


def refused(path: Path, tmp_path: Path, *options: Any) -> str:
    line = run_cli("import", path, tmp_path / "refused", *options, code=2).stderr
    assert line.count("\n") == 1 and line.startswith("fewbit: "), line
    assert not (tmp_path / "refused").exists() and not list(tmp_path.glob(".refused*"))
    return line


def test_types_that_no_grid_has_are_named(tmp_path: Path) -> None:
    random, path = np.random.default_rng(0), tmp_path / "m.gguf"
    for name in ("IQ2_XXS", "TQ1_0", "Q8_K", "MXFP4"):
        kind = gguf.GGMLQuantizationType[name]
        with contextlib.suppress(NotImplementedError):
            write(path, TYPES["q8_0"], {"blk.0.ffn_up.weight": (blocks(kind, (INNER, WIDTH), random), kind)})
        line = refused(path, tmp_path)
        assert f"blk.0.ffn_up.weight has the type {name}" in line and "fewbit quantize" in line


def test_other_architectures_are_named(q4: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(q4.read_bytes().replace(b"llama", b"mamba"))
    assert "models of the architecture mamba cannot be imported" in refused(path, tmp_path)


@pytest.mark.parametrize("share", [0.0001, 0.3, 0.9, 0.9999])
def test_truncated_files(q4: Path, tmp_path: Path, share: float) -> None:
    path, data = tmp_path / "m.gguf", q4.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert "truncated or damaged" in refused(path, tmp_path)


def test_wrong_magic_and_versions(q4: Path, tmp_path: Path) -> None:
    path, data = tmp_path / "m.gguf", q4.read_bytes()
    path.write_bytes(b"GGML" + data[4:])
    assert "not a GGUF file" in refused(path, tmp_path)
    path.write_bytes(data[:4] + struct.pack("<I", 4) + data[8:])
    assert "GGUF version 4" in refused(path, tmp_path)
    path.write_bytes(b"")
    assert "not a GGUF file" in refused(path, tmp_path)


def place(data: bytes, name: str) -> int:
    """Where the description of a tensor stands after its name."""
    key = struct.pack("<Q", len(name)) + name.encode()
    assert data.count(key) == 1
    return data.index(key) + len(key)


@pytest.mark.parametrize(
    ("offset", "form", "value", "said"),
    [
        (0, "<I", 2**31, "has 2147483648 dimensions"),
        (4, "<Q", 2**62, "truncated or damaged"),
        (4, "<Q", 0, "has no weights"),
        (4, "<Q", WIDTH - 1, "no matrix with rows of blocks"),
        (12, "<Q", INNER // 2, "its config gives [512, 256]"),
        (20, "<I", 77, "has the type 77"),
        (24, "<Q", 2**63, "truncated or damaged"),
        (24, "<Q", 0, "overlap"),
    ],
)
def test_descriptions_that_lie(q4: Path, tmp_path: Path, offset: int, form: str, value: int, said: str) -> None:
    path, data = tmp_path / "m.gguf", bytearray(q4.read_bytes())
    at = place(bytes(data), "blk.0.ffn_up.weight") + offset
    data[at : at + struct.calcsize(form)] = struct.pack(form, value)
    path.write_bytes(data)
    assert said in refused(path, tmp_path)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"block_count": 2**31}, "block_count is not a number of its blocks"),
        ({"block_count": 2}, "has no tensor blk.1."),
        ({"embedding_length": 2**31 - 4}, "its config gives"),
        ({"embedding_length": 2**31 - 1}, "not a multiple"),
        ({"vocab_size": 2**31 - 1}, "its config gives"),
        ({"attention.head_count": 0}, "is no number above 0"),
        ({"attention.head_count": 8}, "--config"),
        ({"attention.key_length": 32}, "rope.dimension_count is 64, but its config gives 32"),
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type is longrope"),
    ],
)
def test_metadata_that_lie(tmp_path: Path, facts: dict[str, Any], said: str) -> None:
    write(tmp_path / "m.gguf", TYPES["q8_0"], **facts)
    assert said in refused(tmp_path / "m.gguf", tmp_path)


def test_rotary_embeddings_that_transformers_does_not_read(tmp_path: Path) -> None:
    facts = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    write(tmp_path / "m.gguf", TYPES["q8_0"], **facts)
    fewbit.import_model(tmp_path / "m.gguf", tmp_path / "out")
    rope = json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"]
    assert rope == {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}
    rope = {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}
    model = build(tmp_path / "model", "llama3", rope_parameters=rope)
    run_cli("quantize", model, tmp_path / "packed", "--method", "rtn", "--grid", "q4_0", "--embedding-bits", 16)
    fewbit.export(tmp_path / "packed", tmp_path / "file")
    fewbit.import_model(tmp_path / "file" / "file.gguf", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["rope_parameters"] == rope


def test_tensors_that_are_missing_or_have_no_place(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, TYPES["q8_0"], {"blk.0.attn_k.weight": None})
    assert "has no tensor blk.0.attn_k.weight" in refused(path, tmp_path)
    bias = (np.ones(WIDTH, np.float32), gguf.GGMLQuantizationType.F32)
    write(path, TYPES["q8_0"], {"blk.0.attn_q.bias": bias})
    assert "blk.0.attn_q.bias has no place in a llama" in refused(path, tmp_path)


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    data = blocks(TYPES["q8_0"], (INNER, WIDTH), np.random.default_rng(0))
    data[3, 1] = 0x7E
    write(tmp_path / "m.gguf", TYPES["q8_0"], {"blk.0.ffn_up.weight": (data, TYPES["q8_0"])})
    assert "mlp.up_proj: values of the grid are not finite" in refused(tmp_path / "m.gguf", tmp_path)


def test_files_without_quantized_layers(tmp_path: Path) -> None:
    path, kind = tmp_path / "m.gguf", gguf.GGMLQuantizationType.F16
    random = np.random.default_rng(0)
    shapes = {"q": WIDTH, "output": WIDTH, "k": WIDTH // 2, "v": WIDTH // 2}
    plain = {f"blk.0.attn_{name}.weight": (rows, WIDTH) for name, rows in shapes.items()}
    plain |= {f"blk.0.ffn_{name}.weight": (INNER, WIDTH) for name in ("up", "gate")}
    plain["blk.0.ffn_down.weight"] = (WIDTH, INNER)
    write(path, TYPES["q8_0"], {n: (random.standard_normal(s).astype(np.float16), kind) for n, s in plain.items()})
    assert "contains no quantized layers" in refused(path, tmp_path)


def test_outputs_that_exist(q4: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fewbit.import_model(q4, out)
    before = (out / "model.safetensors").read_bytes()
    assert "already exists" in run_cli("import", q4, out, code=2).stderr
    run_cli("import", q4, out, "--overwrite")
    assert (out / "model.safetensors").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    assert "did not make this folder" in run_cli("import", q4, tmp_path / "mine", "--overwrite", code=2).stderr


def test_a_folder_with_one_file(q4: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.gguf").write_bytes(q4.read_bytes())
    run_cli("import", tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "b.gguf").write_bytes(q4.read_bytes())
    assert "contains 2 .gguf files" in refused(tmp_path / "in", tmp_path)


def test_configs_from_a_folder(tmp_path: Path, tiny: Path) -> None:
    model = build(tmp_path / "model", "llama3")
    run_cli("quantize", model, tmp_path / "packed", "--method", "rtn", "--grid", "q4_0", "--embedding-bits", 16)
    fewbit.export(tmp_path / "packed", tmp_path / "file")
    file = tmp_path / "file" / "file.gguf"
    fewbit.import_model(file, tmp_path / "back", config=model)
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("packed", "back"))
    assert {**before, "quantization_config": 0} == {**after, "quantization_config": 0}
    assert "--config" in refused(file, tmp_path, "--config", tiny)
    other = copy_folder(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["factor"] = 4.0
    (other / "config.json").write_text(json.dumps(config))
    assert "its rope_freqs.weight are not those of its config" in refused(file, tmp_path, "--config", other)
    assert "no config.json" in refused(file, tmp_path, "--config", tmp_path)
    assert "applies to .gguf files only" in refused(tmp_path / "packed", tmp_path, "--config", model)


def test_what_is_no_foreign_checkpoint(tmp_path: Path, tiny: Path) -> None:
    assert "is not quantized: give it to  fewbit quantize" in refused(tiny, tmp_path)
    run_cli("quantize", tiny, tmp_path / "own", "--method", "rtn")
    assert "in fewbit's own format already" in refused(tmp_path / "own", tmp_path)
    assert "is a named model" in refused(Path("smollm2-135m"), tmp_path)
    assert "no such file or folder" in refused(tmp_path / "none.gguf", tmp_path)
    with pytest.raises(FewbitError, match=r"is a file, but not a \.gguf file"):
        fewbit.import_model(tiny / "config.json", tmp_path / "out")
