"""Determine the input axis of a stored matrix from biases, known widths, and neighbouring tensors.

``torch.nn.Linear`` stores (out, in). GPT-2 stores (in, out); gpt-oss and Llama 4 store their experts as (experts, in,
out). The shape of a square matrix does not show which of the two it is.
"""

import re
from collections.abc import Iterable, Sequence

from torch import Tensor

from fewbit.architecture.facts import Facts
from fewbit.checkpoints.safetensors_io import TensorEntry

_FROM_HIDDEN = re.compile(r"(gate|up|w1|w3|w13|v1|input_linear|fc1|wi|c_fc|linear_1|h_to_4h)[^.]*$")
_TO_HIDDEN = re.compile(r"(down|w2|output_linear|fc2|wo|c_proj|linear_2|4h_to_h)[^.]*$")


def to_matrix(whole: Tensor, transposed: bool) -> Tensor:
    """A tensor `(..., out, in)`, or `(..., in, out)` if it is transposed, as a contiguous matrix `(... * out, in)`."""
    turned = whole.transpose(-1, -2) if transposed else whole
    return turned.reshape(-1, turned.shape[-1]).contiguous()


def from_matrix(matrix: Tensor, shape: Sequence[int], transposed: bool) -> Tensor:
    """Inverse of :func:`to_matrix`: the tensor of `shape`, which is not contiguous if it is transposed."""
    if not transposed:
        return matrix.reshape(tuple(shape))
    *lead, columns, rows = shape
    return matrix.reshape(*lead, rows, columns).transpose(-1, -2)


def matrices_in_out(entries: Iterable[TensorEntry], biases: dict[str, tuple[int, ...]]) -> bool:
    """Whether matrices of one list of blocks are stored as (in, out): biases of non-square ones match their columns."""
    votes = 0
    for entry in entries:
        bias = biases.get(entry.name.removesuffix(".weight") + ".bias")
        if len(entry.shape) == 2 and bias and len(bias) == 1 and entry.shape[0] != entry.shape[1]:
            votes += (bias[0] == entry.shape[1]) - (bias[0] == entry.shape[0])
    return votes > 0


def experts_in_out(stack: Sequence[TensorEntry], biases: dict[str, tuple[int, ...]], hidden: set[int]) -> bool:
    """Whether the experts of one module are stored as (experts, in, out).

    stack: the 3-D tensors of the module. hidden: widths of the experts' inputs and outputs. Without any evidence, for
    example if all matrices are square, (experts, out, in) is assumed.
    """
    inner = {size for entry in stack for size in entry.shape[-2:] if size not in hidden}
    return sum(_vote(entry, biases, hidden, inner) for entry in stack) > 0


def _vote(entry: TensorEntry, biases: dict[str, tuple[int, ...]], hidden: set[int], inner: set[int]) -> int:
    """Positive for (in, out), negative for (out, in), 0 for no evidence. A bias counts more than a name.

    inner: widths between up and down projections; a fused gate and up projection has twice that width.
    """
    first, second = entry.shape[-2:]
    if first == second:
        return 0
    base = entry.name.removesuffix(".weight")
    bias = biases.get(f"{base}_bias") or biases.get(f"{base}.bias")
    if bias is not None and bias[-1] in (first, second):
        return 4 if bias[-1] == second else -4
    if (first in hidden) == (second in hidden):
        return 0
    leaf = base.rpartition(".")[2]
    # The axis with the width of hidden states is the input of an up projection and the output of a down projection.
    if _TO_HIDDEN.search(leaf):
        return 1 if second in hidden else -1
    other = second if first in hidden else first
    if _FROM_HIDDEN.search(leaf) or other // 2 in inner:
        return 1 if first in hidden else -1
    return 0


def hidden_widths(routers: Iterable[TensorEntry], facts: Facts, default: Iterable[int]) -> set[int]:
    """Widths of the experts' hidden states: from the routers in their block, else from the configuration."""
    found = {entry.shape[-1] for entry in routers}
    return found or set(facts.widths) or set(default)
