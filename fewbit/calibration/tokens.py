"""Calibration sequences: token ids `(samples, length)`, made the same way every time, with their SHA-256."""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.calibration.choice import CalibrationChoice
from fewbit.calibration.documents import documents
from fewbit.calibration.source import Source, parse_sources, shares
from fewbit.errors import FewbitError

# Documents are drawn from the head of a source that may have no end (a hub data set that is streamed).
_HEAD_DOCUMENTS = 20_000
_HEAD_CHARACTERS = 200_000_000


@dataclass(frozen=True)
class CalibrationSet:
    """Token ids `(samples, length)` int64, and what they were made from."""

    ids: Tensor
    choice: CalibrationChoice

    @property
    def sha256(self) -> str:
        """Of the ids as little-endian int64 in storage order."""
        return hashlib.sha256(self.ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """For the report."""
        return {**asdict(self.choice), "tokens": self.ids.numel(), "tokens_sha256": self.sha256}


def make_set(
    choice: CalibrationChoice,
    tokenizer: Any,
    vocabulary: int,
    model: Any = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> CalibrationSet:
    """Draw the sequences of a calibration set.

    tokenizer: transformers' tokenizer of the model, or None where it has none, which is enough for `random-tokens` and
    `self`. vocabulary: number of token ids. model: the original, for the source `self`. A BOS begins each sequence
    where the tokenizer begins texts with one.
    Raises FewbitError when a source has too few tokens, saying how many there are.
    """
    sources = parse_sources(choice.sources)
    if not sources:
        raise FewbitError("this method needs calibration text: give --calibration, e.g. self, c4 or a file")
    parts = []
    for index, (source, count) in enumerate(zip(sources, shares(sources, choice.samples), strict=True)):
        if not count:
            continue
        seed = choice.seed * 1000 + index
        if source.kind == "random-tokens":
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(0, vocabulary, (count, choice.sequence_length), generator=generator)
            parts.append(_begin(ids, tokenizer))
        elif source.kind == "self":
            from fewbit.calibration.generate import generate_sequences

            parts.append(generate_sequences(model, bos_id(tokenizer), (count, choice.sequence_length), seed, progress))
        elif tokenizer is None:
            raise FewbitError(
                f"--calibration {source}: the model's folder has no tokenizer that transformers can read: add it, or "
                "take random-tokens"
            )
        else:
            parts.append(_from_documents(source, count, choice, tokenizer, seed))
    return CalibrationSet(torch.cat(parts), choice)


def bos_id(tokenizer: Any) -> int | None:
    """The BOS with which the tokenizer begins every text; None where it does not."""
    if tokenizer is None:
        return None
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    return int(tokenizer.bos_token_id) if begins else None


def _begin(ids: Tensor, tokenizer: Any) -> Tensor:
    first = bos_id(tokenizer)
    if first is not None:
        ids[:, 0] = first
    return ids


def _from_documents(source: Source, count: int, choice: CalibrationChoice, tokenizer: Any, seed: int) -> Tensor:
    """Documents in random order, joined by the end-of-text token, cut into sequences: nothing is ever padded."""
    first = bos_id(tokenizer)
    body = choice.sequence_length - (first is not None)
    end = tokenizer.eos_token_id
    wanted = count * body
    stream: list[int] = []
    for document in _shuffled(documents(source, seed), source.kind, seed):
        if choice.chat_template:
            document = _as_turn(document, tokenizer)
        stream.extend(tokenizer(document, add_special_tokens=False, verbose=False).input_ids)
        if len(stream) >= wanted:
            break
        if end is not None:
            stream.append(end)
    if len(stream) < wanted:
        available = len(stream) // body
        raise FewbitError(
            f"{source.name}: it has {len(stream):,} tokens, {available} sequences of {choice.sequence_length}; "
            f"{count} were asked for: take fewer or shorter ones (--samples, --sequence-length), or more text"
        )
    ids = torch.tensor(stream[:wanted], dtype=torch.int64).view(count, body)
    if first is not None:
        ids = torch.cat([torch.full((count, 1), first), ids], dim=1)
    return ids


def _shuffled(texts: Iterator[str], kind: str, seed: int) -> Iterator[str]:
    if kind == "nonsense":
        return texts
    head, size = [], 0
    for text in texts:
        if text.strip():
            head.append(text)
            size += len(text)
        if len(head) >= _HEAD_DOCUMENTS or size >= _HEAD_CHARACTERS:
            break
    if len(head) == 1:
        # One long text: begin at a random place and go round, so that seeds differ.
        start = random.Random(seed).randrange(len(head[0]))
        return iter([head[0][start:], head[0][:start]])
    random.Random(seed).shuffle(head)
    return iter(head)


def _as_turn(document: str, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise FewbitError("--chat-template: the model's tokenizer has none")
    return str(tokenizer.apply_chat_template([{"role": "user", "content": document}], tokenize=False))
