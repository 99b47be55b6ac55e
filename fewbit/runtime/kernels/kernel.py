"""The interface of a kernel: what multiplies with packed weights without decoding all of them first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.grids.scheme import StoredWeight


@dataclass(frozen=True)
class Kernel:
    """One way to compute with packed weights; an entry of :data:`fewbit.runtime.kernels.table.KERNELS`.

    device: the type of device on which it runs. package: the package that it needs, in the extra `extra`, and
    oldest: of which version, at least.
    dtypes: of inputs. supports(stored): whether it can read a weight that is stored this way.
    prepare(parts, stored, dtype): what it needs of a weight for inputs in `dtype`, made once from its parts; it refers
    to the parts, and raises ValueError if they do not fit together.
    product(prepared, x, bias): ``x W^T + b`` `(..., out)` in the dtype of x `(..., in)`, with the weights rounded to
    that dtype and sums in float32; for at most `most_tokens` tokens, beyond which decoding first is faster, at most
    `weights_at_once` of them at a time.
    rows(prepared, first, last): the rows of the weight from `first` to before `last`, in that dtype.
    gather(prepared, ids): the rows at ids `(n,)` on the device, of a weight without outliers, without waiting for the
    device; None if decoding with tensor operations is as good. For an id that has no row: IndexError on the CPU, NaN
    elsewhere.
    reads(prepared): the tensors that it goes on reading, parts among them; other parts were needed only for preparing.
    None if that is not known.
    """

    name: str
    summary: str
    device: str
    package: str
    extra: str
    dtypes: tuple[torch.dtype, ...]
    most_tokens: int
    weights_at_once: int
    supports: Callable[[StoredWeight], bool]
    prepare: Callable[[Mapping[str, Tensor], StoredWeight, torch.dtype], Any]
    product: Callable[[Any, Tensor, Tensor | None], Tensor]
    rows: Callable[[Any, int, int], Tensor]
    gather: Callable[[Any, Tensor], Tensor] | None = None
    reads: Callable[[Any], Sequence[Tensor]] | None = None
    oldest: tuple[int, int] = (0, 0)
