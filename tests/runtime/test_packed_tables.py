"""Packed embeddings and heads: rows of tokens, products, ties, copies, resizing; the logits of the unpacked folder."""

import copy
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import IDS, build, logits, packed_weights, quantized
from safetensors.torch import load_file, save_file
from test_runtime_classes import MODELS, layers_of
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import fewbit
from fewbit.architecture.coverage import cover
from fewbit.checkpoints.source import open_checkpoint
from fewbit.formats import native
from fewbit.runtime import packed_table
from fewbit.runtime.kernels import table
from fewbit.runtime.packed_linear import PackedLinear
from fewbit.runtime.unpack import unpack

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64, "max_position_embeddings": 64},
}


def packed(folder: Path, kind: str = "llama", tied: bool = True, bits: int = 8, **changes: Any) -> Path:
    """A tiny model and, beside it, its packed folder, whose embeddings and head have `bits` bits."""
    vocabulary = {"vocab_size": 320, "pad_token_id": 300, "tie_word_embeddings": tied}
    build(folder / "model", kind, **{**vocabulary, **KINDS[kind], **changes})
    return quantized(folder / "model", folder / "packed", "rtn", 4, embedding_bits=bits)


def plain(folder: Path) -> Any:
    return fewbit.load(unpack(folder / "packed", folder / "plain"), device="cpu")


def assert_same(found: torch.Tensor, wanted: torch.Tensor, kind: str) -> None:
    """Equal; where GPT-2 has layers of its own, nearly: without products in bfloat16 these sum in another order."""
    apart = float((found - wanted).abs().max())
    assert apart <= (0.01 * float(wanted.abs().max()) if kind == "gpt2" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_unpacked_folder(kind: str, tied: bool, tmp_path: Path) -> None:
    model = fewbit.load(packed(tmp_path, kind, tied), device="cpu")
    ids = IDS.clone()
    ids[0, 3] = 300
    other = plain(tmp_path)
    assert_same(logits(model, ids), logits(other, ids), kind)
    embeddings, weight = model.get_input_embeddings(), other.get_input_embeddings().weight
    assert torch.equal(embeddings.weight, weight) and isinstance(embeddings, nn.Embedding)
    assert embeddings.padding_idx == other.get_input_embeddings().padding_idx
    assert isinstance(model.get_output_embeddings(), PackedLinear) != tied
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_same(logits(again, ids), logits(other, ids), kind)
    assert_same(logits(again.dequantize(), ids), logits(other, ids), kind)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_rows_are_gathered_without_the_others(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packed(tmp_path, "gemma3_text", bits=bits)
    whole = plain(tmp_path).get_input_embeddings()
    cases = (IDS, IDS.int(), torch.tensor([[319, 0]]), torch.tensor(7), torch.empty(1, 0, dtype=torch.int64))
    expected = [whole(ids) for ids in cases]
    seen: list[int] = []
    decode_stored = native.decode_stored
    monkeypatch.setattr(
        native,
        "decode_stored",
        lambda parts, stored, *a: seen.append(stored.shape[0]) or decode_stored(parts, stored, *a),
    )
    for kernels in (table.KERNELS, ()):
        monkeypatch.setattr(table, "KERNELS", kernels)
        embeddings = fewbit.load(folder, device="cpu").get_input_embeddings()
        seen.clear()
        for ids, wanted in zip(cases, expected, strict=True):
            assert torch.equal(embeddings(ids), wanted)
        for wrong in (320, -1):
            with pytest.raises(IndexError):
                embeddings(torch.tensor([[wrong]]))
        for kind in (torch.bool, torch.float32):
            with pytest.raises((IndexError, RuntimeError)):
                embeddings(torch.ones(1, 1, dtype=kind))
        # A kernel decodes the rows itself, if there are any.
        by_kernel = bool(kernels) and find_spec("numba") is not None
        assert seen == ([0] if by_kernel else [ids.numel() for ids in cases])


def test_a_large_head_is_multiplied_some_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fewbit.load(packed(tmp_path), device="cpu")
    states = torch.randn(2, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    whole = model.lm_head(states)
    (back,) = torch.autograd.grad(whole.float().square().sum(), states)
    decoded = model.lm_head.weight.clone()
    monkeypatch.setattr(native, "AT_ONCE", 100 * 64)
    pieces = model.lm_head(states)
    assert torch.equal(decoded, model.lm_head.weight)
    assert torch.allclose(whole, pieces, rtol=0.02, atol=1e-3)
    (again,) = torch.autograd.grad(pieces.float().square().sum(), states)
    assert float((back - again).norm() / back.norm()) < 0.02
    with torch.no_grad():
        assert torch.equal(model.lm_head(states), pieces)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_the_unpacked_model(tied: bool, tmp_path: Path) -> None:
    model = fewbit.load(packed(tmp_path, tied=tied, dtype="float32"), device="cpu")
    found = []
    for one in (model, plain(tmp_path)):
        states = one.get_input_embeddings()(IDS).detach().requires_grad_()
        one(inputs_embeds=states).logits.square().mean().backward()
        found.append(states.grad)
    assert torch.allclose(*found, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_what_is_tied_has_one_copy(tmp_path: Path) -> None:
    folder = packed(tmp_path, "gemma3_text")
    names = set(load_file(folder / "model.safetensors"))
    assert "model.embed_tokens.codes" in names and not [name for name in names if name.startswith("lm_head")]
    model = fewbit.load(folder, device="cpu")
    assert not [name for name, _ in model.named_buffers() if "lm_head" in name]
    for moved in (model.to(torch.float16), copy.deepcopy(model), whole_copy(model)):
        assert moved.get_input_embeddings().weight.dtype == torch.float16
        assert moved(IDS).logits.dtype == torch.float16
        parts = moved.lm_head.held.of("weight").sources[0]
        assert parts is moved.get_input_embeddings().held.of("weight").sources[0]


def whole_copy(model: Any) -> Any:
    """The model, saved and loaded as a whole."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("values", ["equal", "differing"])
def test_a_tied_head_that_is_stored_again(values: str, tmp_path: Path) -> None:
    build(tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = table.clone() if values == "equal" else table.flip(0).contiguous()
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    report = fewbit.quantize(tmp_path / "model", tmp_path / "packed", fewbit.preset("adpq+", bits=4))
    stored = [one["name"] for one in report["embeddings"]]
    assert stored == ["model.embed_tokens.weight"] if values == "equal" else len(stored) == 2
    model = fewbit.load(tmp_path / "packed", device="cpu")
    assert torch.equal(logits(model), logits(plain(tmp_path)))
    original = logits(fewbit.load(tmp_path / "model", device="cpu"))
    assert float((logits(model) - original).norm() / original.norm()) < 0.3
    compared = fewbit.inspect(tmp_path / "packed", reference=tmp_path / "model")["tensors"]
    assert sum("relative_squared_error" in row for row in compared) == 14 + len(stored)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_resizing_unpacks_embeddings_and_head(kind: str, tied: bool, tmp_path: Path) -> None:
    model = fewbit.load(packed(tmp_path, kind, tied), device="cpu")
    before = logits(model)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    model = copy.deepcopy(model)
    embeddings = model.resize_token_embeddings(330)
    assert isinstance(embeddings.weight, nn.Parameter) and embeddings.weight.shape == (330, 64)
    assert (model.lm_head.weight is embeddings.weight) == tied
    assert torch.equal(logits(model)[..., :320], before)
    model.save_pretrained(tmp_path / "larger")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "larger")
    assert torch.equal(logits(again), logits(model)) and again.config.vocab_size == 330
    assert torch.equal(logits(again.dequantize()), logits(model))


def test_other_classes_of_the_same_folder(tmp_path: Path) -> None:
    folder = packed(tmp_path, tied=False)
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder)(IDS).last_hidden_state
        wanted = plain(tmp_path).model(IDS).last_hidden_state
    assert torch.equal(states, wanted)
    scores = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)(IDS).logits
    assert scores.shape == (2, 3) and bool(torch.isfinite(scores).all())


@pytest.mark.parametrize("tied", [True, False])
def test_device_maps_with_a_disk(tied: bool, tmp_path: Path) -> None:
    folder = packed(tmp_path, tied=tied)
    wanted = logits(plain(tmp_path))
    places = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=str(tmp_path / "disk"))
    assert torch.equal(logits(model), wanted)


def test_a_weight_that_is_used_otherwise_is_decoded(tmp_path: Path) -> None:
    model = fewbit.load(packed(tmp_path, "gemma3_text"), device="cpu")
    embeddings = model.get_input_embeddings()
    lazy, weight = packed_table.rows_on_demand(embeddings.held.of("weight")), embeddings.weight
    assert lazy.shape == (320, 64) and lazy.dtype == torch.bfloat16
    assert torch.equal(lazy.mean(dim=0), weight.mean(dim=0))
    assert torch.equal(lazy[IDS], weight[IDS]) and torch.equal(torch.cat([lazy, weight]), torch.cat([weight, weight]))
    states = torch.randn(3, 64, dtype=torch.bfloat16)
    assert torch.equal(nn.functional.linear(states, lazy), nn.functional.linear(states, weight))


@pytest.mark.slow
def test_adapters_of_other_layers(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = fewbit.load(packed(tmp_path), device="cpu")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted(IDS, labels=IDS).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trained)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_classes_with_packed_tables(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.save_pretrained(tmp_path / "model")
    layers, others = layers_of(tmp_path / "model")
    covered = cover(open_checkpoint(tmp_path / "model").entries.values(), model.config.to_dict())
    tables = {one.entry.name for one in covered.tensors if one.is_vocabulary}
    assert tables and not [one for one in tables if "position" in one or "vision" in one]
    kept = tuple(one for one in others if one not in tables)
    quantized(tmp_path / "model", tmp_path / "packed", include=layers, exclude=kept, embedding_bits=8)
    found = fewbit.load(tmp_path / "packed", device="cpu")
    assert packed_weights(found) == len(layers) + len(tables)
    arguments = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        one, other, was = (m(**arguments)[0] for m in (found, plain(tmp_path), model))
    assert torch.equal(one, other)
    assert float((one - was).abs().max()) < 0.05 * float(was.abs().max())
    found.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("packed", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
