"""Tiny models of every architecture that can be written as GGUF, with tokenizers."""

from pathlib import Path
from typing import Any

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama3": ("LlamaForCausalLM", {"tie_word_embeddings": False, "rope_parameters": LLAMA3}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3ForCausalLM",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 7, "sliding_window": 16},
    ),
    "phi3": ("Phi3ForCausalLM", {"pad_token_id": 0, "sliding_window": None}),
}
"""Name of a test's model -> its class, and what differs from SIZES."""


def build(folder: Path, name: str, dtype: str = "bfloat16", **changes: Any) -> Path:
    """A random model of that architecture, whose norms and biases are no ones and zeros."""
    import torch
    import transformers

    torch.manual_seed(0)
    kind, others = ARCHITECTURES[name]
    kind = getattr(transformers, kind)
    config = kind.config_class(**{**SIZES, **others, **changes})
    model = kind(config).to(getattr(torch, dtype))
    for tensor_name, tensor in model.named_parameters():
        if tensor.ndim == 1:
            tensor.data.add_(torch.randn(tensor.shape) * 0.1)
        else:
            tensor.data.mul_(4.0)
        assert tensor_name
    model.save_pretrained(folder)
    (sentencepiece_tokenizer() if name in ("gemma3", "phi3") else byte_tokenizer(name)).save_pretrained(folder)
    return folder


def byte_tokenizer(name: str) -> Any:
    """Byte-level BPE with a few merges, split as the architecture's own tokenizers do."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from fewbit.exports import gguf_tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: index + 2 for index, letter in enumerate(alphabet)}}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("an", "d"), ("Ġ", "and")]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    splits = {"llama3": gguf_tokenizer._LLAMA3, "qwen2": gguf_tokenizer._QWEN2, "qwen3": gguf_tokenizer._QWEN2}
    splits["mistral"] = gguf_tokenizer._TEKKEN
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in splits)
    if name in splits:
        split = pre_tokenizers.Split(Regex(splits[name]), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def sentencepiece_tokenizer() -> Any:
    """BPE with byte fallback, as Gemma has it, that begins a text with a BOS."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {name: index for index, name in enumerate(names)}
    for letter in "▁abcdefghinorst.":
        vocabulary[letter] = len(vocabulary)
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("a", "n"), ("an", "d"), ("▁", "and"), ("s", "t")]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
