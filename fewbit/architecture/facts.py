"""Facts about a model's shapes from its configuration, including nested configurations; no network is built."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_LAYER_COUNTS = re.compile(
    "num_hidden_layers|n_layer|n_layers|num_layers|num_decoder_layers|num_encoder_layers|decoder_layers|"
    "encoder_layers|num_blocks|num_layers_per_stack"
)
_WIDTHS = re.compile("hidden_size|n_embd|d_model|dim|model_dim|embed_dim|hidden_dim|word_embed_proj_dim")
_INNER = re.compile(
    "intermediate_size|moe_intermediate_size|expert_intermediate_size|ffn_dim|ffn_hidden_size|d_ff|n_inner"
)
_DEPTH = 8
_NOT_A_COUNT = ("per_tok", "shared", "topk", "top_k", "group", "used", "activ", "size", "dim", "zero", "freq", "step")
_SPEECH = re.compile("num_mel_bins|feat_extract_norm|input_feat_per_channel|conv_kernel_sizes|conv_channels")
_SENSES = re.compile("vision|visual|image|images|audio|speech|video|mel")

TOWER_WORDS = re.compile(
    "vision|visual|image|images|img|vit|video|audio|speech|sound|acoustic|whisper|wav|clip|siglip|sam|tower|"
    "qformer|resampler|perceiver|projector|projectors|projection|connector|merger|mergers|deepstack|aligner|"
    "vqmodel|vqvae|vae|radio|protein|perception|diarization|codec|tokenizer|multimodal|mm|patch|patches|"
    "depth|vq|timm|feature|featurizer"
)
"""Words in names of modules that turn images, sound and the like into inputs of a language model."""


@dataclass(frozen=True)
class Facts:
    """Facts from a configuration.

    layers: numbers of blocks. widths: widths of hidden states. inner: widths of feed-forward layers. experts: numbers
    of experts in a block. heads: numbers of heads. vocabularies: numbers of rows of embeddings. parts: names of
    sub-configurations and their layer counts. multimodal: the model has inputs other than text. speech: its encoder
    processes speech.
    """

    layers: frozenset[int] = frozenset()
    widths: frozenset[int] = frozenset()
    inner: frozenset[int] = frozenset()
    experts: frozenset[int] = frozenset()
    heads: frozenset[int] = frozenset()
    vocabularies: frozenset[int] = frozenset()
    parts: tuple[tuple[str, frozenset[int]], ...] = ()
    multimodal: bool = False
    speech: bool = False
    encoder_decoder: bool = False


def gather_facts(config: dict[str, Any]) -> Facts:
    """The facts in a config.json; sub-configurations of towers are used only for `multimodal`."""
    found: dict[str, set[int]] = {kind: set() for kind in ("layers", "widths", "inner", "experts", "heads", "vocab")}
    for key, value in _numbers(config):
        for kind in _kinds(key):
            found[kind].add(value)
    parts = [(key, value) for key, value in _parts(config) if not _is_tower(key)]
    return Facts(
        frozenset(found["layers"]),
        frozenset(found["widths"]),
        frozenset(found["inner"]),
        frozenset(found["experts"]),
        frozenset(found["heads"]),
        frozenset(found["vocab"]),
        tuple((key.removesuffix("_config"), frozenset(_layer_counts(value))) for key, value in parts),
        any(_is_tower(key) for key, _ in _parts(config))
        or any(_SENSES.fullmatch(word) for key in config for word in words_of(key)),
        any(_SPEECH.fullmatch(key) for key in config),
        config.get("is_encoder_decoder") is True,
    )


def words_of(name: str) -> list[str]:
    """The words of a dotted name, in lower case: ``model.mtp_layers`` has model, mtp and layers."""
    return [word for part in name.split(".") for word in part.lower().split("_") if word]


def _is_tower(key: str) -> bool:
    words = words_of(key.removesuffix("_config"))
    return any(TOWER_WORDS.fullmatch(word) for word in words)


def _parts(config: dict[str, Any], depth: int = _DEPTH) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in config.items() if depth else ():
        if isinstance(value, dict) and key != "quantization_config":
            if key.endswith("_config") or key in ("encoder", "decoder"):
                yield key, value
            yield from _parts(value, depth - 1)


def _numbers(config: dict[str, Any], depth: int = _DEPTH) -> Iterator[tuple[str, int]]:
    for key, value in config.items() if depth else ():
        if isinstance(value, dict):
            if key != "quantization_config" and not _is_tower(key):
                yield from _numbers(value, depth - 1)
            continue
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and not isinstance(number, bool) and number > 0:
                yield key, number


def _layer_counts(config: dict[str, Any]) -> set[int]:
    return {value for key, value in _numbers(config) if _LAYER_COUNTS.fullmatch(key)}


def _kinds(key: str) -> Iterator[str]:
    if _LAYER_COUNTS.fullmatch(key):
        yield "layers"
    if _WIDTHS.fullmatch(key):
        yield "widths"
    if _INNER.fullmatch(key):
        yield "inner"
    if "expert" in key and not any(word in key for word in _NOT_A_COUNT):
        yield "experts"
    if "heads" in key or key == "n_head":
        yield "heads"
    if "vocab_size" in key:
        yield "vocab"
