"""The rows of a weight as a matrix (out, in), read from the checkpoint on demand."""

import math
import threading

from torch import Tensor

from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.grids.table import row_block
from fewbit.pipeline.plan import PlannedTensor


class TensorRows:
    """Rows of a planned tensor; several threads may read at once.

    A tensor that is stored as (in, out) is read and transposed as a whole, or one expert at a time. spans: first row
    and number of rows of the chunks that workers process, each of about `at_once` weights.
    """

    def __init__(self, item: PlannedTensor, reader: FileReader, at_once: int) -> None:
        self._entry, self._reader = item.tensor.entry, reader
        self.rows, self.columns = item.stored.shape
        self._turned = item.stored.transposed
        reader.descriptor(self._entry.file)
        self._height = self.rows // math.prod(self._entry.shape[:-2]) if self._turned else self.rows
        self._expert, self._lock = -1, threading.Lock()
        self._matrix: Tensor | None = None
        # Rows that share stored data stay together.
        block = row_block(item.stored.scheme) or self._height
        step = max(1, at_once // self.columns // block) * block
        self.spans = [
            (first, min(step, start + self._height - first))
            for start in range(0, self.rows, self._height)
            for first in range(start, start + self._height, step)
        ]

    def read(self, first: int, count: int) -> Tensor:
        """Rows `first` to `first + count`; they must be of one expert if experts are stored as (in, out)."""
        if not self._turned:
            return self._reader.read(self._entry, first * self.columns, count * self.columns).view(count, self.columns)
        expert, row = divmod(first, self._height)
        return self._turn(expert)[row : row + count]

    def _turn(self, expert: int) -> Tensor:
        with self._lock:
            if self._matrix is None or self._expert != expert:
                size = self._height * self.columns
                stored = self._reader.read(self._entry, expert * size, size).view(self.columns, self._height)
                self._expert, self._matrix = expert, stored.t().contiguous()
            return self._matrix
