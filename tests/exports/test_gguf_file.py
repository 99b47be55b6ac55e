"""Models written as GGUF, read back by the gguf package and compared with the original."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import copy_folder, run_cli
from gguf_models import ARCHITECTURES, build
from safetensors.torch import load_file, save_file

import fewbit
from fewbit.exports.gguf_architectures import reordered
from fewbit.recipe import preset
from fewbit.runtime.unpack import unpack

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("gguf")
    return {name: build(top / name, name) for name in ARCHITECTURES}


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, str]]:
    """The metadata, the decoded tensors and their types."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    tensors, kinds = {}, {}
    for one in reader.tensors:
        shape = tuple(int(n) for n in reversed(one.shape))
        kind = gguf.GGMLQuantizationType(one.tensor_type)
        tensors[one.name] = torch.from_numpy(np.array(gguf.quants.dequantize(one.data, kind))).reshape(shape)
        kinds[one.name] = kind.name.lower()
    return fields, tensors, kinds


def original(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return {name: tensor.float() for name, tensor in found.items()}


NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def expected(name: str, folder: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as llama.cpp wants them, by its names."""
    config = json.loads((folder / "config.json").read_text())
    after = "post_attention_norm" if name == "gemma3" else "ffn_norm"
    found = {}
    for key, tensor in weights.items():
        called = key.replace("model.layers.", "blk.")
        for ours, theirs in {**NAMES, "post_attention_layernorm": after}.items():
            called = called.replace(ours, theirs)
        if name == "gemma3" and called.endswith("norm.weight"):
            tensor = tensor + 1
        if name in ("llama", "llama3", "mistral"):
            heads = {"attn_q.": "num_attention_heads", "attn_k.": "num_key_value_heads"}
            count = next((config[key] for part, key in heads.items() if part in called), 0)
            if count:
                rows = torch.arange(tensor.shape[0]).view(count, 2, -1)
                # Row 2 i of a head is its row i, and row 2 i + 1 is the one half a head further on.
                tensor = tensor[torch.stack([rows[:, 0], rows[:, 1]], dim=2).reshape(-1)]
        found[called] = tensor
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_16_bit_model_is_written_without_loss(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    report = fewbit.export(models[name], tmp_path / "out")
    assert report["file"] == "out.gguf"
    fields, tensors, kinds = read(tmp_path / "out" / "out.gguf")
    wanted = expected(name, models[name], original(models[name]))
    extra = {"rope_freqs.weight"} if name == "llama3" else set()
    assert tensors.keys() == wanted.keys() | extra
    for key, tensor in wanted.items():
        assert torch.equal(tensors[key], tensor), key
        assert kinds[key] == ("f32" if tensor.ndim == 1 else "bf16")
    config = json.loads((models[name] / "config.json").read_text())
    arch = fields["general.architecture"]
    assert fields[f"{arch}.block_count"] == config["num_hidden_layers"]
    assert fields[f"{arch}.attention.head_count_kv"] == config["num_key_value_heads"]
    assert fields[f"{arch}.rope.freq_base"] == (500000.0 if name == "llama3" else 1e6 if name == "gemma3" else 10000.0)
    assert len(fields["tokenizer.ggml.tokens"]) == 320
    assert fields["tokenizer.ggml.add_bos_token"] == (name in ("gemma3", "phi3"))
    pre = {"llama": "gpt-2", "llama3": "llama-bpe", "mistral": "tekken", "qwen2": "qwen2", "qwen3": "qwen2"}
    assert fields["tokenizer.ggml.pre"] == pre.get(name, "default")
    assert "fewbit.recipe" not in fields


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "phi3"])
@pytest.mark.parametrize("grid", ["q4_0", "iq4_nl", "q8_0"])
def test_a_quantized_folder_is_written_without_loss(
    name: str, grid: str, models: dict[str, Path], tmp_path: Path
) -> None:
    fewbit.quantize(models[name], tmp_path / "q", preset("adpq+", grid=grid, embedding_bits=16))
    plain = original(unpack(tmp_path / "q", tmp_path / "plain"))
    fewbit.export(tmp_path / "q", tmp_path / "out")
    fields, tensors, kinds = read(tmp_path / "out" / "out.gguf")
    wanted = expected(name, models[name], plain)
    assert tensors.keys() == wanted.keys()
    for key, tensor in wanted.items():
        # The unpacked folder rounds to bfloat16, the file does not.
        assert torch.equal(tensors[key].bfloat16().float() if tensor.ndim == 2 else tensors[key], tensor), key
    assert kinds["blk.0.ffn_down.weight"] == grid
    assert json.loads(fields["fewbit.recipe"])["grid"] == grid


def test_even_grids_of_ours_in_any_number_of_blocks(models: dict[str, Path], tmp_path: Path) -> None:
    for index, (grid, bits, group, kind) in enumerate(
        [("symmetric", 4, "32", "q4_0"), ("symmetric", 8, "row", "q8_0"), ("minimum", 5, "32", "q5_1")]
    ):
        recipe = preset("rtn", grid=grid, bits=bits, group_size=group, embedding_bits=16)
        fewbit.quantize(models["qwen2"], tmp_path / f"q{index}", recipe)
        fewbit.export(tmp_path / f"q{index}", tmp_path / f"out{index}")
        _, tensors, kinds = read(tmp_path / f"out{index}" / f"out{index}.gguf")
        plain = original(unpack(tmp_path / f"q{index}", tmp_path / f"plain{index}"))
        key = "model.layers.1.mlp.down_proj.weight"
        assert torch.equal(tensors["blk.1.ffn_down.weight"].bfloat16().float(), plain[key])
        assert kinds["blk.1.ffn_down.weight"] == kind


def test_embeddings_are_rounded_only_if_asked(models: dict[str, Path], tmp_path: Path) -> None:
    report = fewbit.export(models["llama3"], tmp_path / "out", embeddings="q8_0")
    _, tensors, kinds = read(tmp_path / "out" / "out.gguf")
    found = [kinds[name] for name in ("token_embd.weight", "output.weight", "blk.0.attn_q.weight")]
    assert found == ["q8_0", "q8_0", "bf16"]
    weights = original(models["llama3"])
    for key, source in (("token_embd.weight", "model.embed_tokens.weight"), ("output.weight", "lm_head.weight")):
        error = (tensors[key] - weights[source]).square().sum() / weights[source].square().sum()
        assert report["rounded"][source] == pytest.approx(float(error), rel=1e-3)
        assert 0 < error < 1e-4
    half = fewbit.export(models["llama3"], tmp_path / "half", embeddings="f16")
    assert read(tmp_path / "half" / "half.gguf")[2]["output.weight"] == "f16"
    assert max(half["rounded"].values()) < 1e-10
    with pytest.raises(fewbit.FewbitError, match="q6_k needs a multiple of 256 columns, not 64: use q8_0"):
        fewbit.export(models["llama3"], tmp_path / "other", embeddings="q6_k")
    assert not (tmp_path / "other").exists()


def test_packed_embeddings_that_no_type_holds_are_rounded_if_asked(models: dict[str, Path], tmp_path: Path) -> None:
    table = (
        "--include",
        "model.embed_tokens.weight",
        "--set",
        "model.embed_tokens.weight:grid=symmetric,group_size=16",
    )
    run_cli("quantize", models["llama"], tmp_path / "q", "--grid", "q8_0", *table)
    plain = original(unpack(tmp_path / "q", tmp_path / "plain"))["model.embed_tokens.weight"]
    # Otherwise they are written with the 16 bits that they are computed with.
    run_cli("export", tmp_path / "q", tmp_path / "out")
    _, tensors, kinds = read(tmp_path / "out" / "out.gguf")
    assert kinds["token_embd.weight"] == "bf16" and torch.equal(tensors["token_embd.weight"], plain.float())
    run_cli("export", tmp_path / "q", tmp_path / "out", "--embeddings", "q8_0", "--overwrite")
    _, tensors, kinds = read(tmp_path / "out" / "out.gguf")
    assert kinds["token_embd.weight"] == "q8_0"
    assert (tensors["token_embd.weight"] - plain).norm() < 0.01 * plain.norm()


def test_the_order_of_rows_is_a_permutation_that_differs() -> None:
    rows = torch.arange(12).view(12, 1)
    assert reordered(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert reordered(rows, 0) is rows


def test_the_name_of_a_phi_3(models: dict[str, Path], tmp_path: Path) -> None:
    """llama.cpp looks for tokens of Phi-3 in every file whose name says so."""
    fewbit.export(models["phi3"], tmp_path / "my-Phi3-mini")
    assert read(tmp_path / "my-Phi3-mini" / "my-Phi3-mini.gguf")[0]["general.name"] == "my-phi 3-mini"
    folder = copy_folder(models["phi3"], tmp_path / "model")
    data = json.loads((folder / "tokenizer.json").read_text())
    for index, text in enumerate(("<s>", "<|endoftext|>")):
        data["added_tokens"].append({**data["added_tokens"][0], "id": 300 + index, "content": text})
    (folder / "tokenizer.json").write_text(json.dumps(data))
    fewbit.export(folder, tmp_path / "mine")
    assert read(tmp_path / "mine" / "mine.gguf")[0]["general.name"] == "mine phi-3"


def test_the_same_file_each_time(models: dict[str, Path], tmp_path: Path) -> None:
    fewbit.export(models["llama"], tmp_path / "a" / "model")
    fewbit.export(models["llama"], tmp_path / "b" / "model")
    one, two = ((tmp_path / name / "model" / "model.gguf").read_bytes() for name in "ab")
    assert one == two


def test_what_gguf_cannot_hold_is_refused_by_name(models: dict[str, Path], tmp_path: Path) -> None:
    run_cli("quantize", models["llama"], tmp_path / "q", "--bits", "3", "--embedding-bits", "16")
    done = run_cli("export", tmp_path / "q", tmp_path / "out", code=2)
    assert "model.layers.0." in done.stderr
    assert "no type of GGUF holds 3 bits on the codebook grid with outliers" in done.stderr
    assert "--for llama.cpp --bits 3" in done.stderr
    assert not (tmp_path / "out").exists()
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("llama", {"model_type": "gpt_neox"}, "models of the type gpt_neox cannot be written as GGUF, only llama"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "a rotary embedding of the type dyn"),
        ("mistral", {"sliding_window": 32}, "llama.cpp does not know a sliding window in models of the type mistral"),
        ("gemma3", {"query_pre_attn_scalar": 100}, "queries scaled by 100 instead of the head size 32"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "sliding windows that are not in five layers of six"),
        ("qwen3", {"hidden_act": "gelu"}, "the activation gelu"),
        ("qwen2", {"hidden_size": "many"}, "config.json lacks what GGUF needs"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise(
    name: str, changes: dict[str, Any], says: str, models: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_folder(models[name], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    done = run_cli("export", folder, tmp_path / "out", code=2)
    assert says in done.stderr
    assert not (tmp_path / "out").exists()


def test_output_that_exists_or_is_misnamed(models: dict[str, Path], tmp_path: Path) -> None:
    run_cli("export", models["llama"], tmp_path / "out", "--format", "gguf")
    assert "already exists" in run_cli("export", models["llama"], tmp_path / "out", code=2).stderr
    run_cli("export", models["llama"], tmp_path / "out", "--overwrite")
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "mine.txt" in run_cli("export", models["llama"], tmp_path / "out", "--overwrite", code=2).stderr
    done = run_cli("export", models["llama"], tmp_path / "m.gguf", code=2)
    assert "give a folder, such as" in done.stderr
    done = run_cli("export", models["llama"], tmp_path / "b", "--format", "x", code=2)
    assert "--format must be one of gguf" in done.stderr
    (tmp_path / "file").write_text("x")
    run_cli("export", models["llama"], tmp_path / "file", code=2)
    assert (tmp_path / "file").read_text() == "x"


def test_a_damaged_folder_and_a_failure_leave_nothing(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_cli("quantize", models["llama"], tmp_path / "q", "--grid", "q4_0", "--embedding-bits", "16")
    folder = copy_folder(tmp_path / "q", tmp_path / "cut")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["type"] = "Unigram"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "of the type Unigram" in run_cli("export", folder, tmp_path / "out", code=2).stderr
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json" in run_cli("export", folder, tmp_path / "out", code=2).stderr

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    assert "the disk is full" in run_cli("export", tmp_path / "q", tmp_path / "out", code=2).stderr
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    run_cli("export", tmp_path / "q", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.gguf")] == ["out.gguf"]


def test_damaged_content_is_found_while_writing(models: dict[str, Path], tmp_path: Path) -> None:
    fewbit.quantize(models["qwen2"], tmp_path / "q", preset("rtn", grid="q4_0", embedding_bits=16))
    path = tmp_path / "q" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.scales"][3, 1] = 0x7C00  # infinite
    save_file(tensors, path, {"format": "pt"})
    done = run_cli("export", tmp_path / "q", tmp_path / "out", code=2)
    assert "model.layers.1.mlp.up_proj: values of the grid are not finite" in done.stderr
    tensors.pop("model.layers.1.mlp.up_proj.scales")
    save_file(tensors, path, {"format": "pt"})
    done = run_cli("export", tmp_path / "q", tmp_path / "out", code=2)
    assert "model.layers.1.mlp.up_proj.scales is missing" in done.stderr
    assert sorted(one.name for one in tmp_path.iterdir()) == ["q"]


def test_a_tokenizer_larger_than_the_model_or_of_unknown_splits(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_folder(models["qwen2"], tmp_path / "model")
    data = json.loads((folder / "tokenizer.json").read_text())
    before = json.dumps(data)
    data["added_tokens"].append({**data["added_tokens"][0], "id": 320, "content": "<more>"})
    (folder / "tokenizer.json").write_text(json.dumps(data))
    done = run_cli("export", folder, tmp_path / "out", code=2)
    assert "has a token 320, but the model has only 320" in done.stderr
    data = json.loads(before)
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "x+"
    (folder / "tokenizer.json").write_text(json.dumps(data))
    done = run_cli("export", folder, tmp_path / "out", code=2)
    assert "splits text in a way that llama.cpp has no name for (Split x+, ByteLevel)" in done.stderr
    (folder / "tokenizer.json").write_text(
        before.replace('"content": "<s>"', '"content": 5', 1).replace('"id": 0', '"id": []', 1)
    )
    assert "tokenizer.json: cannot be read" in run_cli("export", folder, tmp_path / "out", code=2).stderr
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_llama_cpp_does_not_have(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_folder(models["llama"], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.sinks"] = torch.zeros(4)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = run_cli("export", folder, tmp_path / "out", code=2)
    assert "model.layers.0.self_attn.sinks: llama.cpp has no such tensor in llama" in done.stderr


def test_a_module_without_the_package(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    done = run_cli("export", models["llama"], tmp_path / "out", code=2)
    assert "pip install 'fewbit[gguf]'" in done.stderr
    assert not (tmp_path / "out").exists()
