"""Every class of transformers that a folder names loads with `fewbit.load`, packed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import IDS, SIZES, build, packed_weights, quantized
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import fewbit
from fewbit.errors import FewbitError
from fewbit.runtime.unpack import unpack

LLAMA = LlamaConfig(**SIZES, num_labels=3)
ENCODER = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
BART = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA = {"mm_tokens_per_image": 4, "image_token_index": 125, "boi_token_index": 126, "eoi_token_index": 127}
MODELS: dict[str, Callable[[], Any]] = {
    "a reward model": lambda: LlamaForSequenceClassification(LLAMA),
    "a tagger": lambda: LlamaForTokenClassification(LLAMA),
    "an embedding model": lambda: LlamaModel(LLAMA),
    "BERT": lambda: BertForMaskedLM(BertConfig(**ENCODER)),
    "ModernBERT": lambda: ModernBertForSequenceClassification(ModernBertConfig(**ENCODER)),
    "T5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, vocab_size=128)
    ),
    "BART": lambda: BartForConditionalGeneration(
        BartConfig(d_model=64, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=128, **BART)
    ),
    "a vision-language wrapper": lambda: Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=SIZES, vision_config={**VISION, "image_size": 28, "patch_size": 14}, **GEMMA)
    ),
}


def layers_of(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The matrices in blocks that are not a vision tower's, and all other tensors."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    inside = [name for name in shapes if ".layer" in f".{name}" and not ("vision" in name or "relative" in name)]
    layers = tuple(name for name in inside if len(shapes[name]) == 2)
    return layers, tuple(name for name in shapes if name not in layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_class_loads_packed_with_the_logits_of_the_unpacked_folder(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.save_pretrained(tmp_path / "model")
    layers, others = layers_of(tmp_path / "model")
    quantized(tmp_path / "model", tmp_path / "packed", include=layers, exclude=others)
    packed = fewbit.load(tmp_path / "packed", device="cpu")
    plain = fewbit.load(unpack(tmp_path / "packed", tmp_path / "plain"), device="cpu")
    assert type(packed) is type(plain) is type(model)
    assert packed_weights(packed) == len(layers) > 0
    arguments = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        one, other, was = (m(**arguments)[0] for m in (packed, plain, model))
    assert torch.equal(one, other)
    assert float((one - was).abs().max()) < 0.05 * float(was.abs().max())
    assert packed_weights(AutoModel.from_pretrained(tmp_path / "packed")) == len(layers)
    packed.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("packed", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_reward_model_has_no_perplexity(tmp_path: Path) -> None:
    LlamaForSequenceClassification(LlamaConfig(**{**SIZES, "vocab_size": 256})).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("some words " * 100)
    from conftest import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(FewbitError, match="LlamaForSequenceClassification does not predict next tokens"):
        fewbit.evaluate(tmp_path / "model", tmp_path / "text.txt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architectures", "loaded"),
    [
        (None, "LlamaForCausalLM"),
        ([], "LlamaForCausalLM"),
        (["LLaMAForCausalLM"], "LlamaForCausalLM"),
        (["LlamaForCausalLM"], "LlamaForCausalLM"),
        (["LlamaForRegionProposals"], None),
        (["BertForMaskedLM"], None),
        (["Trainer"], None),
    ],
)
def test_the_class_is_the_one_that_the_config_names(
    architectures: list[str] | None, loaded: str | None, tmp_path: Path
) -> None:
    build(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["architectures"] = architectures
    path.write_text(json.dumps(config))
    if loaded:
        assert type(fewbit.load(tmp_path / "model", device="cpu")).__name__ == loaded
    else:
        with pytest.raises(FewbitError, match=f"no Auto class that has {(architectures or [''])[0]}"):
            fewbit.load(tmp_path / "model")
