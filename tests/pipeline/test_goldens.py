"""Stored bytes that no change may touch unawares: of methods whose sums are exact on every processor."""

import hashlib

import pytest
import torch
from torch import Tensor

from fewbit.outliers.rules import OUTLIER_RULES
from fewbit.pipeline.plan import scheme_for
from fewbit.recipe import preset
from fewbit.solvers.settled import round_rows


def weights() -> Tensor:
    """A matrix (24, 128) from whole numbers, with a few large ones, the same everywhere."""
    numbers = (torch.arange(24 * 128, dtype=torch.int64) * 48271 + 12345) % 65537
    values = (numbers - 32768).to(torch.float32) / 2**20
    values[::97] *= 8
    return values.view(24, 128)


def digest(method: str, bits: int) -> str:
    recipe = preset(method, bits=bits)
    choices = recipe.for_weight(scheme_for(128, recipe))
    weight = weights()
    cut = OUTLIER_RULES[choices.outliers.rule].cut([lambda: weight], weight.numel(), choices.outliers, None)
    rows = round_rows(weight, choices, cut, None)
    found = hashlib.sha256()
    for name in sorted(rows.parts):
        found.update(name.encode() + rows.parts[name].contiguous().view(torch.uint8).numpy().tobytes())
    if rows.where is not None and rows.outlier_codes is not None:
        found.update(rows.where.numpy().tobytes() + rows.outlier_codes.numpy().tobytes())
    return found.hexdigest()[:16]


GOLDENS: dict[tuple[str, int], str] = {
    ("rtn", 2): "261fc34b6ef1e37d",
    ("rtn", 3): "daedabb760845025",
    ("rtn", 4): "5c1f1796631ffd3d",
    ("rtn", 5): "6955f6374910b491",
    ("rtn", 6): "07606175a1334107",
    ("rtn", 7): "06d4627e729267f6",
    ("rtn", 8): "3d0a929fa49ac855",
    ("adpq", 2): "5ab3b34df136cdfb",
    ("adpq", 3): "87bc012d0327b15f",
    ("adpq", 4): "08b04a1245d35733",
    ("adpq", 5): "8a32379b5db5107c",
    ("adpq", 6): "7dfd1a061c9b6ab0",
    ("adpq", 7): "561b54fa354f18f6",
    ("adpq", 8): "6209e21ce1f5e7cd",
}


@pytest.mark.parametrize(("method", "bits"), GOLDENS)
def test_bytes_stay(method: str, bits: int) -> None:
    assert digest(method, bits) == GOLDENS[method, bits]
