"""Calibration sequences: token ids `(samples, length)`, drawn deterministically, with their SHA-256."""

import hashlib
import random
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewbit.calibration.choice import CalibrationChoice
from fewbit.calibration.documents import unread_documents
from fewbit.calibration.source import DOCUMENTS, Source, parse_sources, shares
from fewbit.errors import FewbitError
from fewbit.progress import Progress
from fewbit.text.chat import Chat, check_template
from fewbit.text.chat import render as render_chat
from fewbit.text.documents import Document, pieces_of
from fewbit.text.files import TextFile
from fewbit.text.tokenizer import bos_id, check_ids, check_tokenizer
from fewbit.text.tokens import first_tokens

# Documents are drawn from the beginning of a source, because it may never end (a streamed data set of the hub).
_HEAD_DOCUMENTS = 20_000
_HEAD_CHARACTERS = 200_000_000


@dataclass(frozen=True)
class CalibrationSet:
    """Token ids `(samples, length)` int64, and the choice from which they were made."""

    ids: Tensor
    choice: CalibrationChoice

    @property
    def sha256(self) -> str:
        """SHA-256 of the ids as little-endian int64 in storage order."""
        return hashlib.sha256(self.ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """The set's description in the report."""
        return {**asdict(self.choice), "tokens": self.ids.numel(), "tokens_sha256": self.sha256}


def make_set(
    choice: CalibrationChoice,
    tokenizer: Any,
    vocabulary: int,
    model: Any = None,
    progress: Progress | None = None,
) -> CalibrationSet:
    """Draw the sequences of a calibration set.

    tokenizer: transformers' tokenizer of the model, or None if it has none, which is enough for `random-tokens` and
    `self`. vocabulary: number of token ids. model: the original, for the source `self`. Each sequence starts with a BOS
    if the tokenizer begins texts with one.
    Raises FewbitError if a source has too few tokens, if the tokenizer does not belong to the model, and if the chat
    template is missing or refuses a conversation.
    """
    sources = parse_sources(choice.sources)
    if not sources:
        raise FewbitError("this method needs a calibration set: give --calibration, e.g. self, c4 or a file")
    documents = any(source.kind in DOCUMENTS for source in sources)
    if tokenizer is not None and documents:
        check_tokenizer(tokenizer, vocabulary, "the model")
        if choice.chat_template:
            check_template(tokenizer, "--chat-template")
    first = bos_id(tokenizer)
    if first is not None and first >= vocabulary:
        check_ids(torch.tensor([first]), tokenizer, vocabulary, "the model")
    parts: dict[int, Tensor] = {}
    counts = shares(sources, choice.samples)
    # The model's own text takes minutes to generate. It comes last, so that unreadable text ends the run earlier.
    for index in sorted((i for i, count in enumerate(counts) if count), key=lambda i: sources[i].kind == "self"):
        source, count, seed = sources[index], counts[index], choice.seed * 1000 + index
        if source.kind == "random-tokens":
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(0, vocabulary, (count, choice.sequence_length), generator=generator)
            parts[index] = _begin(ids, tokenizer)
        elif source.kind == "self":
            from fewbit.calibration.generate import generate_sequences

            parts[index] = generate_sequences(model, first, (count, choice.sequence_length), seed, progress)
        elif tokenizer is None:
            raise FewbitError(f"--calibration {source}: needs a tokenizer: give one, or use random-tokens")
        else:
            parts[index] = _from_documents(source, count, choice, tokenizer, seed, progress)
            check_ids(parts[index], tokenizer, vocabulary, "the model")
    return CalibrationSet(torch.cat([parts[index] for index in sorted(parts)]), choice)


def _begin(ids: Tensor, tokenizer: Any) -> Tensor:
    first = bos_id(tokenizer)
    if first is not None:
        ids[:, 0] = first
    return ids


def _from_documents(
    source: Source, count: int, choice: CalibrationChoice, tokenizer: Any, seed: int, progress: Progress | None
) -> Tensor:
    """Documents in random order, joined by the end-of-text token and cut into sequences, without padding.

    Each sequence starts with the BOS if the tokenizer adds one to texts; a BOS at the start of a document or a rendered
    conversation is then dropped.
    """
    first = bos_id(tokenizer)
    body = choice.sequence_length - (first is not None)
    end = tokenizer.eos_token_id
    wanted = count * body
    stream = array("q")

    def counted(tokens: int) -> None:
        if progress:
            progress(min(len(stream) + tokens, wanted), wanted, f"reading {source.name}")

    for document in _shuffled(unread_documents(source, seed), source.kind, seed):
        pieces = partial(_text, document, choice.chat_template, tokenizer, first)
        stream.extend(first_tokens(tokenizer, pieces, wanted - len(stream), first, counted))
        if len(stream) >= wanted:
            break
        if end is not None:
            stream.append(end)
    if len(stream) < wanted:
        available = len(stream) // body
        raise FewbitError(
            f"{source.name}: it has {len(stream):,} tokens, which is {available} sequences of "
            f"{choice.sequence_length}, but {count} were requested: use fewer or shorter sequences (--samples, "
            "--sequence-length), or more text"
        )
    ids = torch.tensor(stream[:wanted], dtype=torch.int64).view(count, body)
    if first is not None:
        ids = torch.cat([torch.full((count, 1), first), ids], dim=1)
    return ids


def _shuffled(documents: Iterator[Document], kind: str, seed: int) -> Iterator[Document]:
    if kind == "nonsense":
        return documents
    head: list[Document] = []
    size = 0
    for document in documents:
        characters = _characters(document)
        if characters:
            head.append(document)
            size += characters
        if len(head) >= _HEAD_DOCUMENTS or size >= _HEAD_CHARACTERS:
            break
    if len(head) == 1 and not isinstance(head[0], Chat):
        # A single long text is read from a random position and continued at its start, so that seeds differ.
        only, start = head[0], random.Random(seed).randrange(size)
        if isinstance(only, TextFile):
            return iter([only.part(start, None), only.part(0, start)])
        return iter([only[start:], only[:start]])
    random.Random(seed).shuffle(head)
    return iter(head)


def _characters(document: Document) -> int:
    """Number of characters; 0 for a document of white space only."""
    if isinstance(document, TextFile):
        return document.size
    if isinstance(document, Chat):
        return sum(len(message["content"]) for message in document.messages)
    return len(document) if document.strip() else 0


def _text(document: Document, chat_template: bool, tokenizer: Any, bos: int | None) -> Iterator[str]:
    """A document's text in pieces; with `chat_template`, a plain text is rendered as a user's turn."""
    render = partial(render_chat, tokenizer=tokenizer, bos=bos)
    if chat_template and not isinstance(document, Chat):
        turn = {"role": "user", "content": "".join(pieces_of(document, None))}
        document = Chat("--chat-template", (turn,))
    return pieces_of(document, render)
