"""Conversations: what counts as one, and its text by the tokenizer's own chat template."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fewbit.errors import FewbitError, missing_extra, raised_in
from fewbit.printable import one_line

_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_ADVICE = "give conversations that it takes, or plain text without --chat-template"


@dataclass(frozen=True)
class Chat:
    """A conversation. where: its place, for messages. messages: `{"role", "content", …}` each, as templates take it."""

    where: str
    messages: tuple[Mapping[str, Any], ...]

    def as_json(self) -> str:
        """The messages alone, the same for every tokenizer."""
        return json.dumps(list(self.messages), ensure_ascii=False, sort_keys=True, default=str)


def looks_like_turns(value: Any) -> bool:
    """Whether a value is a list of turns with role and content, or, as ShareGPT has it, with from and value."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and len(value) > 0
        and all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in value)
    )


def chat_of(value: Any, where: str) -> Chat:
    """The conversation in a list of turns; FewbitError when a turn cannot be understood."""
    return Chat(where, tuple(_message(turn, f"{where}, turn {number}") for number, turn in enumerate(value, 1)))


def chat_of_pair(prompt: Any, completion: Any, where: str) -> Chat:
    """A prompt and its completion, each a text or a list of turns, as one conversation."""
    turns = []
    for role, value in (("user", prompt), ("assistant", completion)):
        turns += [{"role": role, "content": value}] if isinstance(value, str) else list(value)
    return chat_of(turns, where)


def _message(turn: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    if "role" in turn:
        role, content = turn["role"], turn.get("content")
        rest = {key: value for key, value in turn.items() if key not in ("role", "content") and value is not None}
    else:
        role, content, rest = _SHAREGPT.get(str(turn["from"]).lower()), turn.get("value"), {}
        if role is None:
            raise FewbitError(
                f"{where}: from {turn['from']!r} is not a known speaker: use one of {', '.join(_SHAREGPT)}"
            )
    if not isinstance(role, str):
        raise FewbitError(f"{where}: its role is {role!r}, not a string")
    return {"role": role, "content": _content(content, where), **rest}


def _content(content: Any, where: str) -> str:
    """The text of a turn; that of its parts, where it has some. None, as beside a tool call, is the empty text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) and not isinstance(content, bytes) else [content]
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str) or (isinstance(part, Mapping) and part.get("type", "text") != "text"):
            kind = part.get("type", "unknown") if isinstance(part, Mapping) else type(part).__name__
            raise FewbitError(f"{where}: its content has a part of the kind {kind!r}: only text can be used")
        texts.append(text)
    return "".join(texts)


def check_template(tokenizer: Any, what: str) -> None:
    """FewbitError, in the name of `what` needs it, when the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise FewbitError(
            f"{what}: the model's tokenizer has none: add a chat_template.jinja to the model's folder, or give plain "
            "text"
        )


def render(chat: Chat, tokenizer: Any, bos: int | None, reply: bool = False, advice: str = _ADVICE) -> str:
    """The text of a conversation by the tokenizer's chat template, without the BOS at its start when `bos` is one.

    bos: what is put before the text later, or None. reply: end with what begins the assistant's next turn. advice: what
    to do if the template refuses the conversation. Templates run in the sandbox of transformers.
    Raises FewbitError with the template's own words when it refuses the conversation or fails.
    """
    check_template(tokenizer, f"{chat.where}: chat messages need the tokenizer's chat template")
    try:
        text = tokenizer.apply_chat_template(list(chat.messages), tokenize=False, add_generation_prompt=reply)
    except ImportError as error:
        raise missing_extra("jinja2", "report") from error
    except Exception as error:
        if not _from_template(error):
            raise
        raise FewbitError(
            f"{chat.where}: the tokenizer's chat template does not take this conversation "
            f"({one_line(', '.join(message['role'] for message in chat.messages[:6]), 300)}): "
            f"{one_line(str(error) or type(error).__name__, 300)}: {advice}"
        ) from error
    text = str(text)
    first = tokenizer.convert_ids_to_tokens(bos) if bos is not None else ""
    while first and text.startswith(first):
        text = text[len(first) :]
    return text


def _from_template(error: Exception) -> bool:
    """Whether an error was raised by a template or inside one: by jinja2, or by an expression that it evaluated.

    ValueError is how transformers says that it has no template to choose.
    """
    if type(error).__module__.split(".")[0] == "jinja2" or (
        isinstance(error, ValueError) and raised_in(error, "transformers")
    ):
        return True
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    # jinja2 gives the code of a template that was read from a string this name.
    return "<template>" in frames or "<unknown>" in frames
