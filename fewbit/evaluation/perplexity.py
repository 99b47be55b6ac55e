"""Perplexity by a fixed protocol, and the divergence of a model's predictions from the original's.

All sums are in float32 or wider, whatever the model's dtype.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import FewbitError
from fewbit.memory import rows_at_once

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Protocol:
    """How text is cut into windows and scored.

    sequence_length: tokens per window. windows: how many, from the start of the text; 0 for all complete ones. bos:
    auto (if the tokenizer adds one), always or never. With a BOS, a window is the BOS and `sequence_length - 1` tokens,
    and all of these tokens are scored. Without, the first token of a window is not scored. dtype: the dtype of the
    computation: auto (the model's own) or one of DTYPES. bfloat16 adds rounding errors of its own; float32 shows
    smaller differences.
    """

    sequence_length: int = 1024
    windows: int = 0
    bos: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise FewbitError(f"windows need at least 2 tokens, not {self.sequence_length}")
        if self.windows < 0:
            raise FewbitError(f"the number of windows cannot be {self.windows}")
        if self.bos not in ("auto", "always", "never"):
            raise FewbitError(f"bos must be auto, always or never, not {self.bos!r}")
        if self.dtype not in ("auto", *DTYPES):
            raise FewbitError(f"dtype must be auto, {', '.join(DTYPES)}, not {self.dtype!r}")

    @property
    def torch_dtype(self) -> Any:
        """The dtype as an argument for `fewbit.load`."""
        return DTYPES.get(self.dtype, "auto")


def cut_windows(token_ids: Tensor, protocol: Protocol, bos_id: int | None) -> Tensor:
    """Non-overlapping windows `(windows, sequence_length)` of token ids `(tokens,)`, each after a BOS if one is given.

    Raises FewbitError if there are too few tokens.
    """
    length = protocol.sequence_length
    available = token_ids.numel() // length
    wanted = protocol.windows or available
    if wanted < 1 or wanted > available:
        raise FewbitError(
            f"the text has {token_ids.numel():,} tokens, which is {available} windows of {length}, but "
            f"{max(wanted, 1)} were requested: use fewer or shorter windows, or more text"
        )
    windows = token_ids[: wanted * length].view(wanted, length)
    if bos_id is not None:
        windows = torch.cat([torch.full((wanted, 1), bos_id, dtype=windows.dtype), windows[:, :-1]], dim=1)
    return windows


@dataclass
class Totals:
    """Sums over scored tokens."""

    nll: float = 0.0
    tokens: int = 0
    same_top: int = 0
    divergences: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        """Add one window: logits `(tokens, vocabulary)` predict targets `(tokens,)`; `reference` are the original's."""
        at_once = rows_at_once(logits)
        for first in range(0, targets.numel(), at_once):
            part = slice(first, first + at_once)
            log_q = torch.log_softmax(logits[part].float(), dim=-1)
            self.nll -= float(log_q.gather(1, targets[part, None]).double().sum())
            if reference is not None:
                log_p = torch.log_softmax(reference[part].to(log_q.device).float(), dim=-1)
                terms = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True)
                divergence = terms.sum(dim=-1)
                if bool(torch.isnan(divergence).any()):
                    # A token with probability 0 in both (a logit of -inf) gives NaN, but contributes 0.
                    divergence = terms.masked_fill(log_p == float("-inf"), 0.0).sum(dim=-1)
                self.divergences.append(divergence.cpu())
                self.same_top += int((log_q.argmax(-1) == log_p.argmax(-1)).sum())
        self.tokens += targets.numel()


def check_finite(value: float, name: str, what: str = "loss") -> None:
    """Raises FewbitError with the model's name for a value that is NaN or infinite."""
    if not math.isfinite(value):
        raise FewbitError(
            f"{name}: its {what} is {value}: its logits overflow, or its weights are damaged: try --dtype float32 "
            "(float16 overflows in many models that were trained in bfloat16)"
        )


def quantile(values: Iterable[Tensor], share: float) -> float:
    """The smallest value that a fraction of at least `share` of the values do not exceed."""
    ordered = torch.cat(list(values)).sort().values
    return float(ordered[max(0, min(ordered.numel() - 1, -int(-share * ordered.numel() // 1) - 1))])
