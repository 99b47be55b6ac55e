"""Which axis of a stored matrix is the input axis, by biases, known widths, and neighbouring tensors.

``torch.nn.Linear`` stores (out, in). GPT-2 stores (in, out), and so do gpt-oss and Llama 4 for their experts, (experts,
in, out). The shape of a square matrix does not show which one it is.
"""

import re
from collections.abc import Iterable, Sequence

from torch import Tensor

from fewbit.architecture.facts import Facts
from fewbit.checkpoints.safetensors_io import TensorEntry

_FROM_HIDDEN = re.compile(r"(gate|up|w1|w3|w13|v1|input_linear|fc1|wi|c_fc|linear_1|h_to_4h)[^.]*$")
_TO_HIDDEN = re.compile(r"(down|w2|output_linear|fc2|wo|c_proj|linear_2|4h_to_h)[^.]*$")


def to_matrix(whole: Tensor, transposed: bool) -> Tensor:
    """A tensor `(..., out, in)`, or `(..., in, out)` where it is transposed, as the matrix `(... * out, in)`."""
    turned = whole.transpose(-1, -2) if transposed else whole
    return turned.reshape(-1, turned.shape[-1])


def from_matrix(matrix: Tensor, shape: Sequence[int], transposed: bool) -> Tensor:
    """Inverse of :func:`to_matrix`: the tensor of `shape`, contiguous."""
    if not transposed:
        return matrix.reshape(tuple(shape))
    *lead, columns, rows = shape
    return matrix.reshape(*lead, rows, columns).transpose(-1, -2).contiguous()


def tensor_name(module: str, original_shape: Sequence[int] | None) -> str:
    """A packed weight's name in the checkpoint: `module` itself where its shape is noted, else its layer's weight."""
    return module if original_shape is not None else f"{module}.weight"


def tensor_shape(shape: Sequence[int], transposed: bool, original_shape: Sequence[int] | None) -> tuple[int, ...]:
    """The checkpoint's shape of a packed weight whose matrix is `shape`, (out, in)."""
    if original_shape is not None:
        return tuple(original_shape)
    return tuple(reversed(shape)) if transposed else tuple(shape)


def matrices_in_out(entries: Iterable[TensorEntry], biases: dict[str, tuple[int, ...]]) -> bool:
    """Whether matrices of one list of blocks are stored (in, out): the biases of the oblong ones fit their columns."""
    votes = 0
    for entry in entries:
        bias = biases.get(entry.name.removesuffix(".weight") + ".bias")
        if len(entry.shape) == 2 and bias and len(bias) == 1 and entry.shape[0] != entry.shape[1]:
            votes += (bias[0] == entry.shape[1]) - (bias[0] == entry.shape[0])
    return votes > 0


def experts_in_out(stack: Sequence[TensorEntry], biases: dict[str, tuple[int, ...]], hidden: set[int]) -> bool:
    """Whether the experts of one module are stored (experts, in, out).

    stack: the 3-D tensors of the module. hidden: widths of what enters and leaves the experts. Where all of them are
    square and nothing tells, they are taken for (experts, out, in).
    """
    inner = {size for entry in stack for size in entry.shape[-2:] if size not in hidden}
    return sum(_vote(entry, biases, hidden, inner) for entry in stack) > 0


def _vote(entry: TensorEntry, biases: dict[str, tuple[int, ...]], hidden: set[int], inner: set[int]) -> int:
    """1 for (in, out), -1 for (out, in), 0 for no evidence. A bias counts more than a name.

    inner: widths between what goes up and what comes down; a fused gate and up projection has twice that.
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
    # The side that has the width of hidden states is the input of what goes up, the output of what comes down.
    if _TO_HIDDEN.search(leaf):
        return 1 if second in hidden else -1
    other = second if first in hidden else first
    if _FROM_HIDDEN.search(leaf) or other // 2 in inner:
        return 1 if first in hidden else -1
    return 0


def hidden_widths(routers: Iterable[TensorEntry], facts: Facts, default: Iterable[int]) -> set[int]:
    """Widths of the hidden states that experts see: those of the routers beside them, else what the config says."""
    found = {entry.shape[-1] for entry in routers}
    return found or set(facts.widths) or set(default)
