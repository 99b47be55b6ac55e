"""Talk with a model: conversations by its chat template, or plain continuation, token by token."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.architecture.positions import positions_of
from fewbit.choices import check_values, flag_names
from fewbit.errors import FewbitError, raised_in
from fewbit.memory import peak_rss_bytes
from fewbit.printable import first_line
from fewbit.quiet import quiet_loggers
from fewbit.runtime.stream import Stream
from fewbit.text.chat import Chat, render
from fewbit.text.tokenizer import check_ids

_CACHE_BITS = 4
_REFUSED = "leave out --system, or use a model whose template takes it"


@dataclass(frozen=True)
class ChatChoice:
    """How a model answers.

    system: the message before the conversation; needs a chat template. temperature: 0 takes the most likely token.
    seed: of the draws; the n-th answer is drawn with seed + n. quantized_cache: keep keys and values in few bits.
    """

    system: str | None = None
    max_new_tokens: int = 512
    temperature: float = 0.7
    seed: int = 0
    quantized_cache: bool = False

    def __post_init__(self) -> None:
        check_values(self, flag_names(self))
        if self.max_new_tokens < 1:
            raise FewbitError(f"--max-new-tokens must be 1 or more, not {self.max_new_tokens}")
        if self.temperature < 0:
            raise FewbitError(f"--temperature must be 0 (the most likely token) or more, not {self.temperature:g}")
        if not 0 <= self.seed < 1 << 63:
            raise FewbitError(f"--seed must be 0 or more, not {self.seed}")


@dataclass(frozen=True)
class Answer:
    """One answer. prompt_tokens: that the model read for it. seconds: all; first_seconds: until the first token.

    is_whole: whether the model ended it, and not the limit of tokens. is_stopped: whether the user stopped it.
    """

    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    seconds: float
    first_seconds: float
    is_whole: bool
    is_stopped: bool


class TooLongError(FewbitError):
    """The conversation leaves no room for an answer."""


class Conversation:
    """A conversation with one model. Without a chat template, each prompt is a text of its own that is continued."""

    def __init__(self, model: Any, tokenizer: Any, choice: ChatChoice, name: str) -> None:
        """name: of the model, for messages. Raises FewbitError if the model cannot do what `choice` asks."""
        if not model.can_generate():
            raise FewbitError(f"{name}: a {type(model).__name__} does not write text: a language model is needed")
        self._model, self._tokenizer, self._choice, self._name = model, tokenizer, choice, name
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        if choice.system is not None and not self.has_template:
            raise FewbitError(f"{name}: its tokenizer has no chat template, so --system cannot be used: leave it out")
        if choice.quantized_cache:
            _quantized_cache(model.config, name)
        self._answers = 0
        self._kept: _Kept | None = None
        self._messages: list[dict[str, str]] = []
        self.restart()

    def restart(self) -> bool:
        """Forget what was said; returns whether there was something to forget."""
        system, before = self._choice.system, len(self._messages)
        self._kept, self._messages = None, [] if system is None else [{"role": "system", "content": system}]
        return len(self._messages) < before

    def ask(self, prompt: str, show: Callable[[str], None]) -> Answer:
        """The model's answer; its text is also passed to `show` as it is made.

        An answer that KeyboardInterrupt stops is returned as far as it came. Raises TooLongError if there is no room
        for an answer, and FewbitError if the template refuses the conversation or logits are NaN or infinite.
        """
        messages = [*self._messages, {"role": "user", "content": prompt}]
        ids = self._ids(prompt, messages)
        stream = Stream(self._tokenizer, show, time.perf_counter)
        is_whole = is_stopped = False
        try:
            tokens, cache = self._generate(ids, stream)
            is_whole = bool(tokens) and tokens[-1] in self._ends()
            # The last token was not put into the cache.
            self._kept = _Kept([*map(int, ids[0]), *tokens][:-1], cache) if _can_go_on(cache) else None
        except KeyboardInterrupt:
            # Some layers of the cache may have the last token already, and others not.
            self._kept, is_stopped = None, True
            stream.end()
        self._answers += 1
        if self.has_template:
            self._messages = [*messages, {"role": "assistant", "content": stream.text}]
        seconds = time.perf_counter() - stream.times[0]
        first = stream.times[1] - stream.times[0] if len(stream.times) > 1 else seconds
        sizes = ids.shape[1], len(stream.tokens)
        return Answer(prompt, stream.text, *sizes, seconds, first, is_whole, is_stopped)

    def _ids(self, prompt: str, messages: Sequence[dict[str, str]]) -> Tensor:
        """The tokens of the conversation `(1, tokens)`."""
        if self.has_template:
            chat = Chat("the conversation", tuple(messages))
            text = render(chat, self._tokenizer, None, reply=True, advice=_REFUSED)
            ids = self._tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        else:
            ids = self._tokenizer(prompt, return_tensors="pt").input_ids
        if not ids.numel():
            raise FewbitError("the prompt is empty: there is nothing to answer")
        check_ids(ids, self._tokenizer, self._model.get_input_embeddings().weight.shape[0], self._name)
        return ids.long()

    def _room(self, ids: Tensor) -> int:
        """How many tokens an answer may have."""
        positions = positions_of(self._model.config)
        wanted = self._choice.max_new_tokens
        if positions is None or self._model.config.is_encoder_decoder:
            return wanted
        if ids.shape[1] >= positions:
            raise TooLongError(
                f"{self._name}: the conversation has {ids.shape[1]} tokens, but the model's maximum length is "
                f"{positions}: shorten it"
            )
        return min(wanted, positions - ids.shape[1])

    def _ends(self) -> list[int]:
        """The tokens that end an answer: those of the model, and the tokenizer's, which chat templates write."""
        named = self._model.generation_config.eos_token_id
        ends = set(named if isinstance(named, list) else [named]) | {self._tokenizer.eos_token_id}
        return sorted(one for one in ends if one is not None)

    def _generate(self, ids: Tensor, stream: Stream) -> tuple[list[int], Any]:
        """The tokens of the answer, and the cache; tokens go to the stream as they come."""
        choice, device = self._choice, self._model.device
        room, ends = self._room(ids), self._ends()
        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if choice.temperature > 0:
            drawn = {"do_sample": True, "temperature": choice.temperature}
        options = {
            "attention_mask": torch.ones_like(ids, device=device),
            "max_new_tokens": room,
            "pad_token_id": ends[0] if ends else 0,
            "logits_processor": [_refuse_not_finite],
            "streamer": stream,
            "return_dict_in_generate": True,
            **drawn,
            **({"eos_token_id": ends} if ends else {}),
            **self._cache(ids),
        }
        seeded = [device] if device.type == "cuda" else []
        with quiet_loggers("transformers"), torch.random.fork_rng(seeded), torch.inference_mode():
            torch.manual_seed(choice.seed + self._answers)
            out = self._model.generate(ids.to(device), **options)
        return stream.tokens, getattr(out, "past_key_values", None)

    def _cache(self, ids: Tensor) -> dict[str, Any]:
        """The cache to go on with, if the new tokens begin with those that it holds."""
        kept, self._kept = self._kept, None
        if self._choice.quantized_cache:
            return {"past_key_values": _quantized_cache(self._model.config, self._name)}
        if kept is None or ids.shape[1] <= len(kept.ids) or ids[0, : len(kept.ids)].tolist() != kept.ids:
            return {}
        return {"past_key_values": kept.cache}


@dataclass(frozen=True)
class _Kept:
    """A cache, and the tokens whose keys and values it holds."""

    ids: list[int]
    cache: Any


def open_conversation(model: str, choice: ChatChoice, device: str | None = None) -> Conversation:
    """A conversation with a packed folder or any original model, loaded on `device`.

    Raises FewbitError if the model cannot be loaded, has no tokenizer, or cannot do what `choice` asks.
    """
    from fewbit.checkpoints.locate import locate
    from fewbit.checkpoints.own_code import open_tokenizer
    from fewbit.runtime.load import load

    folder = locate(model)
    tokenizer = open_tokenizer(folder)
    return Conversation(load(folder, device=device), tokenizer, choice, model)


def tokens_per_second(answers: Sequence[Answer]) -> float | None:
    """The speed of writing: without the first token of each answer, which the prompt takes. None without others."""
    seconds = sum(one.seconds - one.first_seconds for one in answers)
    tokens = sum(max(one.tokens - 1, 0) for one in answers)
    return tokens / seconds if tokens and seconds > 0 else None


def memory_bytes() -> dict[str, int]:
    """Where memory is -> the most that this process held there; 0 where the system does not say."""
    found = {"peak memory": peak_rss_bytes()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["on the GPU"] = torch.cuda.max_memory_allocated()
    return found


def model_facts(model: str) -> dict[str, Any]:
    """Method, bits and bytes of a model, and the peak memory of this process."""
    from fewbit.checkpoints.locate import locate
    from fewbit.checkpoints.source import open_checkpoint
    from fewbit.formats.config import describe

    return {**describe(open_checkpoint(locate(model))), "peak_rss_bytes": peak_rss_bytes()}


def _can_go_on(cache: Any) -> bool:
    """Whether further tokens give the same answer with this cache as without it: it holds keys and values as they are.

    A model with recurrent states reads its text anew, and so does one with a cache that rounds.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", None)
    kinds = {type(layer) for layer in layers or ()}
    return bool(kinds) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def _backends() -> dict[str, tuple[str, bool, dict[str, Any]]]:
    """The backends of transformers' quantized cache: package, whether it is there, and options."""
    from transformers import cache_utils

    return {
        "quanto": ("optimum-quanto", cache_utils.is_optimum_quanto_available(), {"nbits": _CACHE_BITS}),
        "hqq": ("hqq", cache_utils.is_hqq_available(), {"nbits": _CACHE_BITS, "axis_key": 1, "axis_value": 1}),
    }


def _cache_group(config: Any) -> dict[str, int]:
    """Groups of at most 64 numbers of which each head has an even number: two of them are packed together by HQQ."""
    text = config.get_text_config(decoder=True)
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return {"q_group_size": max(1, math.gcd(128, size) // 2)}


def _quantized_cache(config: Any, name: str) -> Any:
    """An empty quantized cache of transformers. Raises FewbitError if no backend is installed, or for other layers."""
    from transformers import QuantizedCache

    backends = _backends()
    found = next((backend for backend, (_, is_there, _) in backends.items() if is_there), None)
    if found is None:
        packages = " or ".join(package for package, _, _ in backends.values())
        raise FewbitError(f"--quantized-cache needs the package {packages}: pip install {backends['quanto'][0]}")
    try:
        options = backends[found][2]
        return QuantizedCache(found, config, **options, **(_cache_group(config) if options else {}))
    except ValueError as error:
        if not raised_in(error, "transformers"):
            raise
        raise FewbitError(f"{name}: cannot use --quantized-cache ({first_line(error)}): leave it out") from error


def _refuse_not_finite(ids: Tensor, scores: Tensor) -> Tensor:
    # Some tokens may be ruled out, with minus infinity.
    if not bool(torch.isfinite(scores.amax(-1)).all()):
        raise FewbitError(
            f"the model's logits are NaN or infinite after {ids.shape[1]} tokens: its weights are damaged, or its "
            "dtype overflows (float16 does in many models trained in bfloat16)"
        )
    return scores
