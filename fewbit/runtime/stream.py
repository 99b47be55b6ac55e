"""Text from tokens as they come: each piece is shown as soon as no later token can change it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

_UNFINISHED = "�"


class Stream:
    """A streamer for transformers' `generate`, for one sequence: passes new text to `show` and keeps the tokens.

    A token may hold only some bytes of a character: its text is passed on with that of the token that completes it.
    tokens: the ids of the answer so far, special ones included. times: `clock` when each was known, after that of the
    start.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._tokenizer, self._show, self._clock = tokenizer, show, clock
        self._shown_from, self._shown_to = 0, 0
        self._is_prompt = True
        self.tokens: list[int] = []
        self.times = [clock()]

    def put(self, value: Tensor) -> None:
        """The next token `(1,)`; what comes first, the prompt, is skipped."""
        if self._is_prompt:
            self._is_prompt = False
            return
        self.tokens.extend(map(int, value.flatten()))
        self.times.append(self._clock())
        self._pass_on(at_end=False)

    def end(self) -> None:
        """Pass on what is left, complete or not."""
        self._pass_on(at_end=True)

    @property
    def text(self) -> str:
        """The whole answer so far, without special tokens."""
        return self._decode(self.tokens)

    def _pass_on(self, at_end: bool) -> None:
        # The tokens before are decoded with the new ones, because some decoders drop a space at the start of a text.
        before = self._decode(self.tokens[self._shown_from : self._shown_to])
        now = self._decode(self.tokens[self._shown_from :])
        if len(now) <= len(before) or (now.endswith(_UNFINISHED) and not at_end):
            return
        self._shown_from, self._shown_to = self._shown_to, len(self.tokens)
        self._show(now[len(before) :])

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
