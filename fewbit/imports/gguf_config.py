"""The config, the tokenizer and the tensor names of a GGUF file, as transformers has them."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.checkpoints.companions import Companion, find_companions
from fewbit.checkpoints.gguf import read_alone
from fewbit.checkpoints.gguf_header import GgufHeader
from fewbit.checkpoints.gguf_parts import write_emptied, write_outline
from fewbit.checkpoints.json_in import read_json_object
from fewbit.errors import CannotImportError, FewbitError, missing_extra
from fewbit.exports.gguf_architectures import ARCHITECTURES, Architecture, Facts, common_facts
from fewbit.printable import first_line
from fewbit.quiet import quiet_transformers
from fewbit.runtime.load_errors import known_cause

CONFIG_ADVICE = "give the original's folder with --config, or  fewbit quantize  the file, which reads decoded weights"
_DTYPE = "bfloat16"
_SUFFIXES = (".weight", ".bias")
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192
"""The rotary embedding of Llama 3.1 to 3.3: a file holds only the divisors that follow from this and a factor."""
_COUNTS = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
_GLOBAL = "full_attention"
_OTHER_SCALE = (62,)
"""Numbers of blocks of the Gemma 3 whose queries are not scaled by the size of a head, in llama.cpp."""
_HEADER_ONLY = ("vocab_size", "context_length")
"""Keys that do not change what a network computes; their values differ between converters."""


@dataclass(frozen=True)
class Model:
    """What is known of a file besides its tensors.

    names: llama.cpp's names of tensors -> transformers' names and shapes. companions: tokenizer and other files.
    """

    architecture: Architecture
    config: dict[str, Any]
    names: dict[str, tuple[str, tuple[int, ...]]]
    companions: tuple[Companion, ...]
    left: tuple[str, ...]


def architecture_named(path: Path, header: GgufHeader) -> Architecture:
    """The architecture of a file. Raises FewbitError if its tensors are not known."""
    name = header.values["general.architecture"]
    found = next((one for one in ARCHITECTURES if one.name == name), None)
    if found is None:
        known = ", ".join(one.name for one in ARCHITECTURES)
        raise CannotImportError(
            f"{path}: models of the architecture {name} cannot be imported (only {known}): quantize the file itself, "
            "whose weights are then decoded"
        )
    return found


def read_model(path: Path, header: GgufHeader, given: Path | None, scratch: Path) -> Model:
    """Config, names and companions of a GGUF file.

    given: a folder from which config and tokenizer are taken, or None. scratch: an empty folder for files that are
    made. Raises FewbitError for what transformers cannot read, and for a config that does not fit the file.
    """
    found = architecture_named(path, header)
    for key in _COUNTS:
        value = header.values.get(f"{found.name}.{key}")
        if not isinstance(value, int) or value < 1:
            raise FewbitError(f"{path}: its {found.name}.{key} is no number above 0: the file is damaged")
    layers = header.values.get(f"{found.name}.block_count")
    if not isinstance(layers, int) or not 0 < layers <= len(header.tensors):
        raise FewbitError(f"{path}: its {found.name}.block_count is not a number of its blocks: the file is damaged")
    left: tuple[str, ...] = ()
    if given is None:
        config, companions = _from_file(path, header, scratch)
        config = _completed(path, header, found, config)
    else:
        config, companions, left = _from_folder(path, found, given)
    _check_facts(path, header, found, config)
    return Model(found, config, _names(path, header, found, config, layers), companions, left)


def extra_tensors(model: Model) -> dict[str, Tensor]:
    """The tensors that GGUF has, and transformers computes from the config."""
    return model.architecture.tensors(model.config)


def _from_file(path: Path, header: GgufHeader, scratch: Path) -> tuple[dict[str, Any], tuple[Companion, ...]]:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    except ImportError as error:
        raise missing_extra(error.name or "transformers", "hf") from error
    with read_alone(path, header, scratch, write_outline) as (alone, source):
        config = AutoConfig.from_pretrained(alone, **source)
    # The tokenizer needs no tensors, but transformers must find those of all parts.
    with read_alone(path, header, scratch, write_emptied if len(header.files) > 1 else None) as (alone, source):
        tokenizer = AutoTokenizer.from_pretrained(alone, **source)
        kinds = AutoModelForCausalLM._model_mapping
        if type(config) not in kinds:
            raise CannotImportError(f"{path}: transformers has no language model of the type {config.model_type}")
        config.architectures, config.dtype = [kinds[type(config)].__name__], _DTYPE
    made = scratch / "made"
    with quiet_transformers():
        tokenizer.save_pretrained(made)
        GenerationConfig.from_model_config(config).save_pretrained(made)
        config.save_pretrained(made)
    data = read_json_object(made / "config.json")
    # transformers takes it from the name of the model in the file.
    data.pop("_name_or_path", None)
    _without_spaces(made / "tokenizer.json")
    return data, tuple(Companion(one, one.name) for one in sorted(made.iterdir()) if one.name != "config.json")


def _without_spaces(path: Path) -> None:
    """Write a JSON file without indentation, which takes as much as the rest of a tokenizer's file."""
    if path.is_file():
        data = json.loads(path.read_bytes())
        path.write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def _from_folder(
    path: Path, found: Architecture, given: Path
) -> tuple[dict[str, Any], tuple[Companion, ...], tuple[str, ...]]:
    place = given / "config.json"
    if not place.is_file():
        raise FewbitError(f"{given}: no config.json: give the folder of the model from which {path.name} was made")
    config = read_json_object(place)
    if config.get("quantization_config"):
        raise FewbitError(f"{place}: has a quantization_config: give the folder of the 16-bit model")
    if config.get("model_type") not in found.types:
        raise FewbitError(f"{given}: is a {config.get('model_type')}, but {path.name} is a {' or '.join(found.types)}")
    others = find_companions(given, {place})
    return config, others.carried, others.left


def _completed(path: Path, header: GgufHeader, found: Architecture, config: dict[str, Any]) -> dict[str, Any]:
    """The config that transformers reads, with facts of the header that it leaves out."""
    size, layers = (header.values.get(f"{found.name}.{key}") for key in ("attention.key_length", "block_count"))
    if isinstance(size, int) and size > 0 and "head_dim" in config:
        config = {**config, "head_dim": size}
    if "query_pre_attn_scalar" in config and "head_dim" in config and layers not in _OTHER_SCALE:
        config = {**config, "query_pre_attn_scalar": config["head_dim"]}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return config
    if _GLOBAL in rope:
        return {**config, "rope_parameters": {**rope, _GLOBAL: _rope(path, header, found, rope[_GLOBAL], config)}}
    return {**config, "rope_parameters": _rope(path, header, found, rope, config)}


def _rope(
    path: Path, header: GgufHeader, found: Architecture, rope: dict[str, Any], config: dict[str, Any]
) -> dict[str, Any]:
    """The rotary embedding of the file, of which transformers reads only the base."""
    if rope.get("rope_type", "default") != "default":
        return rope
    kind, factor, original = (
        header.values.get(f"{found.name}.rope.scaling.{key}") for key in ("type", "factor", "original_context_length")
    )
    if kind in ("linear", "yarn") and isinstance(factor, float):
        more = {"original_max_position_embeddings": original} if kind == "yarn" and isinstance(original, int) else {}
        return {**rope, "rope_type": kind, "factor": factor, **more}
    tensor = header.tensors.get("rope_freqs.weight")
    if tensor is None or tensor.kind != 0:
        return rope
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        divisors = torch.frombuffer(bytearray(file.read(tensor.bytes)), dtype=torch.float32)
    known = {"factor": round(float(divisors.max()), 3), "original_max_position_embeddings": _LLAMA3_CONTEXT}
    tried = {**rope, **_LLAMA3, **known}
    made = found.tensors({**config, "rope_parameters": tried}).get("rope_freqs.weight")
    fits = made is not None and made.shape == divisors.shape and torch.allclose(made, divisors, rtol=1e-4)
    return tried if fits else rope


def _check_facts(path: Path, header: GgufHeader, found: Architecture, config: dict[str, Any]) -> None:
    """Raise FewbitError unless the metadata of a file with this config are those of the file."""
    try:
        facts: Facts = {**common_facts(config), **found.facts(config)}
        refused = found.refuses(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CannotImportError(
            f"{path}: its config lacks what the architecture {found.name} needs ({first_line(error)}): {CONFIG_ADVICE}"
        ) from error
    if refused:
        raise CannotImportError(f"{path}: {refused}, which cannot be imported: quantize the file itself")
    for key, ours in facts.items():
        theirs = header.values.get(f"{found.name}.{key}")
        if theirs is None or ours is None or key in _HEADER_ONLY:
            continue
        if not _same(ours, theirs):
            raise CannotImportError(
                f"{path}: {found.name}.{key} is {theirs}, but its config gives {ours}: {CONFIG_ADVICE}"
            )
    for key, theirs in header.values.items():
        if key.startswith(f"{found.name}.rope.scaling.") and key.removeprefix(f"{found.name}.") not in facts:
            raise CannotImportError(f"{path}: {key} is {theirs}, which its config does not have: {CONFIG_ADVICE}")


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, bool | str) or isinstance(theirs, str):
        return bool(ours == theirs)
    return math.isclose(ours, theirs, rel_tol=1e-5)


def _names(
    path: Path, header: GgufHeader, found: Architecture, config: dict[str, Any], layers: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """llama.cpp's name of every tensor of the network -> its name there, and its shape."""
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == found.name)
    known = gguf.get_tensor_name_map(architecture, layers)
    names: dict[str, tuple[str, tuple[int, ...]]] = {}
    tied = "output.weight" not in header.tensors
    for name, shape in _network(path, config):
        called = known.get_name(name, try_suffixes=_SUFFIXES)
        if called is None:
            raise CannotImportError(f"{path}: llama.cpp has no tensor for {name}: {CONFIG_ADVICE}")
        if called == "output.weight" and tied:
            if not config.get("tie_word_embeddings"):
                raise FewbitError(f"{path}: has no output.weight, but its config has a head that is not tied")
            continue
        names[called] = (name, shape)
    return names


def _network(path: Path, config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the parameters of the network, which is built without memory for its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with quiet_transformers(), torch.device("meta"):
            made = AutoConfig.for_model(**config)
            model = AutoModelForCausalLM.from_config(made, trust_remote_code=False)
    except Exception as error:
        cause = known_cause(error, config)
        if cause is None:
            raise
        raise CannotImportError(f"{path}: transformers cannot build its model ({cause}): {CONFIG_ADVICE}") from error
    yield from ((name, tuple(tensor.shape)) for name, tensor in model.state_dict().items())


def shapes_of(names: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the network's tensors, by their names there."""
    return dict(names.values())
