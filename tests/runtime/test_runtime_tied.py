"""Heads tied to embeddings, or not, or stored twice: packed or kept, they give the logits of the unpacked folder."""

import copy
from pathlib import Path

import pytest
import torch
from runtime_models import IDS, build, logits, packed_weights, quantized
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

import fewbit
from fewbit.linear import Linear
from fewbit.runtime.packed_linear import PackedLinear
from fewbit.runtime.unpack import unpack, unpack_modules

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def store(folder: Path, stored: str) -> None:
    """Change which of the two tensors a checkpoint has: "embeddings", "head", or "both" (equal, or "differing")."""
    tensors = load_file(folder / "model.safetensors")
    weight = tensors.pop(EMBEDDINGS)
    tensors.pop(HEAD, None)
    if stored != "head":
        tensors[EMBEDDINGS] = weight
    if stored != "embeddings":
        tensors[HEAD] = weight.flip(0).contiguous() if stored == "differing" else weight.clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    ("tied", "stored", "include"),
    [
        (True, "embeddings", (EMBEDDINGS,)),
        (True, "head", (HEAD,)),
        (True, "both", (HEAD,)),
        (True, "both", (EMBEDDINGS,)),
        (True, "both", (HEAD, EMBEDDINGS)),
        (True, "differing", (HEAD,)),
        (True, "differing", (EMBEDDINGS,)),
        (False, "both", (HEAD,)),
        (False, "differing", (EMBEDDINGS,)),
        (False, "differing", (HEAD, EMBEDDINGS)),
    ],
)
def test_logits_packed_and_unpacked(
    kind: str, tied: bool, stored: str, include: tuple[str, ...], tmp_path: Path
) -> None:
    original = build(tmp_path / "model", kind, tie_word_embeddings=tied)
    store(tmp_path / "model", stored)
    original = fewbit.load(tmp_path / "model", device="cpu")
    quantized(tmp_path / "model", tmp_path / "packed", "adpq", 8, include=include)
    packed = fewbit.load(tmp_path / "packed", device="cpu")
    plain = fewbit.load(unpack(tmp_path / "packed", tmp_path / "plain"), device="cpu")
    assert packed_weights(packed) == 14 + len(include)
    assert isinstance(packed.get_output_embeddings(), Linear | PackedLinear)
    assert torch.equal(logits(packed), logits(plain))
    assert float((logits(packed) - logits(original)).abs().max()) < 0.05 * float(logits(original).abs().max())
    packed.save_pretrained(tmp_path / "again")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again"))
    assert one.keys() == other.keys()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(plain))
    copied = copy.deepcopy(packed)
    assert torch.equal(logits(unpack_modules(packed)), logits(plain))
    assert torch.equal(logits(copied), logits(plain))


@pytest.mark.slow
def test_what_was_tied_stays_one_weight(tmp_path: Path) -> None:
    build(tmp_path / "model", tie_word_embeddings=True)
    quantized(tmp_path / "model", tmp_path / "packed", include=(EMBEDDINGS,))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    names = [name for name, _ in model.named_buffers() if "embed_tokens" in name or "lm_head" in name]
    assert names and not [name for name in names if "lm_head" in name]
    model.dequantize()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "plain")
    assert HEAD not in load_file(tmp_path / "plain" / "model.safetensors")


def test_embeddings_that_three_others_share(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, vocab_size=128)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    shapes = {n: t.shape for n, t in load_file(tmp_path / "model" / "model.safetensors").items()}
    layers = tuple(n for n, s in shapes.items() if len(s) == 2 and ".layer." in n and "relative" not in n)
    include = ("shared.weight", *layers)
    quantized(
        tmp_path / "model", tmp_path / "packed", include=include, exclude=tuple(n for n in shapes if n not in include)
    )
    packed = fewbit.load(tmp_path / "packed", device="cpu")
    plain = AutoModelForSeq2SeqLM.from_pretrained(unpack(tmp_path / "packed", tmp_path / "plain"))
    with torch.no_grad():
        one, other = (m(input_ids=IDS, decoder_input_ids=IDS).logits for m in (packed, plain))
    assert torch.equal(one, other)
