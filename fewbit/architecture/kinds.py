"""Classify a tensor by its shape, its neighbours in the block, and its name.

A name can be a reason to keep a tensor (a router, a norm, a convolution), but never to quantize it: a linear layer must
be a matrix whose shape matches the shapes around it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from fewbit.architecture.facts import Facts

SMALLEST = 8
"""Matrices with fewer rows or columns are not quantized."""
_KERNEL = 16
"""Longest kernel of a depthwise convolution that is stored without its dimension of size 1."""

_TABLE = 64
"""A matrix with fewer rows or columns, whose sizes match no other tensor, may be a table rather than a layer."""
_SMALL_SHARE = 0.02
_FEW = 4

_ROUTER = re.compile(
    r"router|(^|[._])(moe_gate|gating|gate_network|shared_experts?_gate|e_score_correction_bias)([._]|$)"
)
_GATE = re.compile(r"(^|\.)(gate|wg)(\.|$)")
_IN_EXPERTS = re.compile(r"expert[^.]*\.")
_ATTENTION = re.compile(r"att", re.IGNORECASE)
_EMBEDDING = re.compile(r"embed|(^|[._])(wte|wpe|emb)([._]|$)", re.IGNORECASE)
_POSITION = re.compile(
    r"relative_attention_bias|rel_logits|rel(ative)?_(pos|bias|position)|position_bias|alibi|rotary|inv_freq|decay|slope"
)
_PLACE_TABLE = re.compile(r"position|(^|[._])(wpe|pos_?emb\w*|token_type\w*|segment\w*)([._]|$)", re.IGNORECASE)
_STATE_SPACE = re.compile(r"(^|[._])(A_log|A|D|dt|dt_bias|time_mix\w*|time_maa\w*|time_decay|time_first|time_faaaa)$")
_LOW_RANK = re.compile(r"(^|[._])lora([._]|$)", re.IGNORECASE)
_NORM = re.compile(r"norm|(^|[._])ln(_?\w{1,5})?$", re.IGNORECASE)
_CONVOLUTION = re.compile(r"conv", re.IGNORECASE)
_PARAMETER = re.compile(
    r"(^|[._])(fn|ape|base|scale|scales|gamma|alpha|beta|gain|mask_emb|sinks?|probe|query|r_\w_bias|seg_embed)$"
)
ROUTERS = re.compile(rf"{_ROUTER.pattern}|{_GATE.pattern}")
_MASK = re.compile(r"(^|\.)(masked_bias|bias|causal_mask|attn_mask|mask)$")
_BUFFER = re.compile(
    r"(^|[._])(position_ids|token_type_ids|num_batches_tracked|tid2eid|masked_bias|causal_mask|bias|steps?)$"
)


@dataclass(frozen=True)
class Subject:
    """A tensor with its context. rest: its name in the block, or its whole name outside the blocks.

    sizes: length -> number of tensors in the same block with an axis of that length. routed: numbers of experts, from
    the routers in the same block. grouped: number of tensors in its module that stack equally many matrices. share: its
    fraction of the block's elements.
    """

    rest: str
    shape: tuple[int, ...]
    facts: Facts
    sizes: dict[int, int]
    routed: frozenset[int] = frozenset()
    grouped: int = 0
    share: float = 1.0

    @property
    def module(self) -> str:
        """The name without `.weight`."""
        return self.rest.removesuffix(".weight")

    @property
    def leaf(self) -> str:
        """The last part of the module's name."""
        return self.module.rpartition(".")[2]

    @property
    def wide(self) -> tuple[int, ...]:
        """Its axes that are longer than 1."""
        return tuple(size for size in self.shape if size != 1)


@dataclass(frozen=True)
class Rule:
    """The reason for which a tensor is kept if the test is true."""

    reason: str
    test: Callable[[Subject], bool]


def _is_router(subject: Subject) -> bool:
    rest, rows = subject.rest, subject.shape[0]
    if _ROUTER.search(rest):
        return True
    columns = subject.shape[-1]
    experts = subject.facts.experts | subject.routed
    if _GATE.search(rest) and len(subject.shape) == 2:
        return rows in experts or columns in experts or 2 * rows <= columns
    scores = len(subject.shape) == 2 and rows in experts and 2 * rows < columns and rows not in subject.facts.inner
    return scores and not _ATTENTION.search(rest) and not _IN_EXPERTS.search(rest) and "proj" not in rest


def _is_convolution(subject: Subject) -> bool:
    shape = subject.shape
    if len(shape) == 3 and 1 in shape[1:]:
        return True
    if len(shape) == 2:
        return bool(_CONVOLUTION.search(subject.leaf)) and shape[1] <= _KERNEL
    return len(shape) == 3 and bool(_CONVOLUTION.search(subject.module))


def _is_embedding(subject: Subject) -> bool:
    if _EMBEDDING.search(subject.leaf):
        return True
    rows, columns = subject.shape[0], subject.shape[-1]
    # Only an embedding has as many rows as the vocabulary. In tiny models, layers can have this size by chance, but
    # then several of them do.
    alone = subject.sizes.get(rows, 0) == 1 and rows not in {2 * size for size in subject.facts.inner}
    return rows in subject.facts.vocabularies and rows >= 6 * columns and alone


def _is_per_head(subject: Subject) -> bool:
    """Whether it is one small matrix per head, as in a gate of RG-LRU, or XLNet's (in, heads, size)."""
    if len(subject.shape) != 3:
        return False
    return subject.shape[0] in subject.facts.heads or subject.shape[1] in subject.facts.heads


KEPT: tuple[Rule, ...] = (
    Rule("vector (norm, bias or scale)", lambda s: len(s.wide) < 2),
    Rule("attention mask", lambda s: len(s.shape) == 4 and bool(_MASK.search(s.rest))),
    Rule("positions", lambda s: bool(_POSITION.search(s.rest))),
    Rule("bias", lambda s: s.leaf.endswith(("bias", "biases"))),
    Rule("router", _is_router),
    Rule("low-rank factor of an adapter", lambda s: bool(_LOW_RANK.search(s.rest))),
    Rule("convolution", _is_convolution),
    Rule("norm", lambda s: bool(_NORM.search(s.leaf))),
    Rule("embedding", _is_embedding),
    Rule("state-space or recurrence parameter", lambda s: bool(_STATE_SPACE.search(s.rest))),
    Rule("parameter that is no layer's weight", lambda s: bool(_PARAMETER.search(s.rest))),
)


def kept_as(subject: Subject) -> str | None:
    """The reason for which a tensor is kept; None if no rule applies."""
    return next((rule.reason for rule in KEPT if rule.test(subject)), None)


def is_known_buffer(name: str) -> bool:
    """Whether an integer or bool tensor of this name is a buffer that models commonly store with their weights."""
    return bool(_BUFFER.search(name))


def is_position(name: str) -> bool:
    """Whether a name is that of a table of positions or of token types."""
    return bool(_PLACE_TABLE.search(name))


def is_norm(name: str) -> bool:
    """Whether a name is that of a norm's gain."""
    return bool(_NORM.search(name.removesuffix(".weight").rpartition(".")[2]))


def is_experts(subject: Subject) -> bool:
    """Whether a tensor stacks one matrix per expert: their number is known, or neighbours stack equally many."""
    if len(subject.shape) != 3:
        return False
    count = subject.shape[0]
    known = count in subject.facts.experts or count in subject.routed
    return known or (subject.grouped > 1 and not _is_per_head(subject))


def is_row_stack(name: str, shape: tuple[int, ...], facts: Facts) -> bool:
    """Whether a 2-D parameter contains the experts' matrices stacked along the rows, as in DBRX."""
    if len(shape) != 2 or name.endswith("weight") or shape[1] not in facts.widths:
        return False
    return any(shape[0] % count == 0 and shape[0] // count in facts.inner for count in facts.experts if count > 1)


def matrix_in_block(subject: Subject) -> tuple[str, str]:
    """Action and reason for a matrix, or a stack of matrices, in a block, if no rule keeps it."""
    if len(subject.shape) == 3:
        if is_experts(subject):
            return "quantize", "fused experts in a block"
        if _is_per_head(subject):
            return "keep", "one small matrix per head"
        return "unknown", "three dimensions, but no experts"
    if is_row_stack(subject.rest, subject.shape, subject.facts):
        return "quantize", "experts stacked in one matrix of a block"
    if len(subject.shape) != 2 or not subject.rest.endswith("weight"):
        if subject.share < _SMALL_SHARE:
            return "keep", "parameter that is no layer's weight"
        return "unknown", "in a block, but no linear layer"
    if min(subject.shape) < SMALLEST:
        return "keep", f"fewer than {SMALLEST} rows or columns"
    if min(subject.shape) < _TABLE and not any(_fits(subject, size) for size in subject.shape):
        return "unknown", "its shape matches nothing else in its block"
    return "quantize", "linear layer in a block"


def _fits(subject: Subject, size: int) -> bool:
    if not subject.facts.widths and sum(subject.sizes.values()) <= _FEW:
        # There is nothing to compare with.
        return True
    return size in subject.facts.widths or subject.sizes.get(size, 0) > 1
