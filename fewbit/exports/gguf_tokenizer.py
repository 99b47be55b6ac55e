"""tokenizer.json as the metadata that llama.cpp reads.

Two kinds are known: byte-level BPE, which llama.cpp calls gpt2, and BPE with byte fallback (SentencePiece, Gemma),
which it calls llama. The latter merges by scores instead of ranks: a token's score is minus the rank of its first
merge.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.checkpoints.json_in import read_json_object
from fewbit.errors import FewbitError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_NO_MERGE = -1e6
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE = "▁"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: dict[tuple[str, ...], str] = {
    ("ByteLevel+",): "gpt-2",
    ("Digits", "ByteLevel+"): "smollm",
    (f"Split {_LLAMA3}", "ByteLevel"): "llama-bpe",
    (f"Split {_QWEN2}", "ByteLevel"): "qwen2",
    (f"Split {_TEKKEN}", "ByteLevel"): "tekken",
}
"""How text is split before merging, as :func:`_steps` describes it -> llama.cpp's name of it. "+": with GPT-2's own
expression."""


@dataclass(frozen=True)
class TokenizerFacts:
    """What GGUF holds of a tokenizer. values: metadata keys after `tokenizer.` -> values."""

    values: dict[str, Any]


def tokenizer_facts(folder: Path, config: Mapping[str, Any]) -> TokenizerFacts:
    """The metadata of the tokenizer in a folder. Raises FewbitError for one that llama.cpp has no name for."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FewbitError(f"{folder}: no tokenizer.json, which GGUF needs")
    data = read_json_object(path)
    settings = _object(folder / "tokenizer_config.json")
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise FewbitError(f"{path}: a tokenizer of the type {kind} cannot be written as GGUF, only BPE")
    try:
        tokens, kinds = _tokens(data, model, int(config["vocab_size"]), path)
        merges = [tuple(one.split(" ", 1)) if isinstance(one, str) else tuple(one) for one in model.get("merges", ())]
        if any(len(one) != 2 for one in merges):
            raise ValueError("a merge is not of two tokens")
        values = _by_kind(data, model, tokens, merges, path)
        special = _special(data, settings, model, config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FewbitError(f"{path}: cannot be read ({type(error).__name__}: {error}): fetch it again") from error
    values = {"ggml.model": values.pop("model"), "ggml.tokens": tokens, "ggml.token_type": kinds, **values}
    template = _template(folder, settings)
    return TokenizerFacts({**values, **special, **({"chat_template": template} if template else {})})


def _tokens(data: Mapping[str, Any], model: Mapping[str, Any], size: int, path: Path) -> tuple[list[str], list[int]]:
    """Every token and its type by id; ids without a token are filled."""
    texts = {int(index): str(text) for text, index in model["vocab"].items()}
    kinds = {
        index: BYTE if model.get("byte_fallback") and _BYTE.fullmatch(text) else NORMAL for index, text in texts.items()
    }
    for one in data.get("added_tokens", ()):
        index, text = int(one["id"]), str(one["content"])
        special = bool(one.get("special"))
        # llama.cpp looks for these in the text before it replaces spaces.
        texts[index] = text if special or not model.get("byte_fallback") else text.replace(_SPACE, " ")
        kinds[index] = CONTROL if special else USER_DEFINED
    unknown = model.get("unk_token")
    if model.get("byte_fallback") and unknown in model["vocab"]:
        kinds[int(model["vocab"][unknown])] = UNKNOWN
    last = max(texts, default=-1)
    if last >= size:
        raise FewbitError(f"{path}: has a token {last}, but the model has only {size}: fetch it again")
    # A token may occur once only.
    seen: dict[str, int] = {}
    tokens = []
    for index in range(size):
        text = texts.get(index, f"[PAD{index}]")
        if text in seen:
            text = f"[PAD{index}]"
        seen[text] = index
        tokens.append(text)
    return tokens, [kinds.get(index, UNUSED) for index in range(size)]


def _by_kind(
    data: Mapping[str, Any], model: Mapping[str, Any], tokens: list[str], merges: list[Any], path: Path
) -> dict[str, Any]:
    steps = _steps(data.get("pre_tokenizer"))
    if any(step.startswith("ByteLevel") for step in steps):
        name = _SPLITS.get(tuple(steps))
        if name is None:
            raise FewbitError(f"{path}: splits text in a way that llama.cpp has no name for ({', '.join(steps)})")
        return {"model": "gpt2", "ggml.pre": name, "ggml.merges": [" ".join(map(str, one)) for one in merges]}
    if not model.get("byte_fallback"):
        raise FewbitError(f"{path}: is neither byte-level BPE nor BPE with byte fallback, which llama.cpp reads")
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks[token]) if token in ranks else _NO_MERGE for token in tokens]
    prefix = any(kind == "Prepend" for kind in _normalizers(data.get("normalizer"))) or _metaspace(data)
    return {"model": "llama", "ggml.pre": "default", "ggml.scores": scores, "ggml.add_space_prefix": prefix}


def _steps(found: Any) -> list[str]:
    if not found:
        return []
    if found["type"] == "Sequence":
        return [step for one in found["pretokenizers"] for step in _steps(one)]
    if found["type"] == "ByteLevel":
        return ["ByteLevel+" if found.get("use_regex", True) else "ByteLevel"]
    if found["type"] == "Split":
        pattern = found["pattern"]
        return [f"Split {pattern.get('Regex', pattern.get('String'))}"]
    return [str(found["type"])]


def _normalizers(found: Any) -> list[str]:
    if not found:
        return []
    if found["type"] == "Sequence":
        return [kind for one in found["normalizers"] for kind in _normalizers(one)]
    return [str(found["type"])]


def _metaspace(data: Mapping[str, Any]) -> bool:
    found = data.get("pre_tokenizer") or {}
    return found.get("type") == "Metaspace" and found.get("prepend_scheme", "always") != "never"


_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
"""A special token's name in tokenizer_config.json -> in GGUF, as it spells it."""


def _special(
    data: Mapping[str, Any], settings: Mapping[str, Any], model: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    ids = {str(text): int(index) for text, index in model["vocab"].items()}
    ids |= {str(one["content"]): int(one["id"]) for one in data.get("added_tokens", ())}
    values: dict[str, Any] = {}
    for name, called in _IDS.items():
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        index = ids.get(token) if token is not None else config.get(f"{name}_token_id")
        index = index[0] if isinstance(index, list) and index else index
        if isinstance(index, int):
            values[f"ggml.{called}_token_id"] = index
    begins = _begins_with(data.get("post_processor"), values.get("ggml.bos_token_id"), ids)
    added = settings.get("add_bos_token")
    values["ggml.add_bos_token"] = bool(added) if isinstance(added, bool) and begins is None else bool(begins)
    values["ggml.add_eos_token"] = False
    return values


def _begins_with(found: Any, bos: int | None, ids: Mapping[str, int]) -> bool | None:
    """Whether text gets a BOS; None if tokenizer.json does not say."""
    if not found or bos is None:
        return None
    if found["type"] == "Sequence":
        said = [_begins_with(one, bos, ids) for one in found["processors"]]
        return next((one for one in said if one is not None), None)
    if found["type"] != "TemplateProcessing":
        return None
    first = found["single"][0] if found["single"] else {}
    return ids.get(first.get("SpecialToken", {}).get("id")) == bos


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _object(path: Path) -> dict[str, Any]:
    return dict(read_json_object(path)) if path.is_file() else {}
