"""ggml's blocks, bit for bit against the gguf package's own decoder."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fewbit.formats.gguf_blocks import BLOCK_TYPES, from_blocks, to_blocks
from fewbit.formats.native import decode, part_layout
from fewbit.grids.ggml import GGML_GRIDS
from fewbit.grids.grid import Grid, ScaleSearch
from fewbit.grids.scheme import Scheme, StoredWeight
from fewbit.solvers.settled import Encoded, WeightChoices, round_rows

gguf = pytest.importorskip("gguf")
EVERY = pytest.mark.parametrize("grid", GGML_GRIDS, ids=lambda grid: grid.name)
SEARCHES = [None, ScaleSearch(), ScaleSearch(error_power=2.5)]


def scheme_of(grid: Grid) -> Scheme:
    return Scheme(grid.widths[0], int(grid.brings["group_size"]), grid.name, scale_format=grid.scales)


def quantized(weight: torch.Tensor, grid: Grid, search: ScaleSearch | None) -> Encoded:
    return round_rows(weight, WeightChoices(scheme_of(grid), search), None, None)


def theirs(blocks: torch.Tensor, grid: Grid) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType(BLOCK_TYPES[grid.name].number)
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind))


def check(weight: torch.Tensor, grid: Grid, search: ScaleSearch | None) -> Encoded:
    """What is stored, ours and theirs decode to the same bits, and the blocks give the parts back."""
    found, stored = quantized(weight, grid, search), StoredWeight(scheme_of(grid), tuple(weight.shape))
    blocks = to_blocks(found.parts, stored)
    decoded = decode(found.parts, stored)
    assert torch.equal(decoded, found.decoded)
    assert torch.equal(theirs(blocks, grid), decoded)
    back = from_blocks(blocks, stored.scheme)
    assert back.keys() == found.parts.keys() == part_layout(stored).keys()
    assert all(torch.equal(back[name], part) for name, part in found.parts.items())
    return found


def test_every_grid_has_its_type_of_block() -> None:
    assert {grid.name for grid in GGML_GRIDS} == BLOCK_TYPES.keys()
    for name, kind in BLOCK_TYPES.items():
        known = gguf.GGMLQuantizationType(kind.number)
        assert (known.name.lower(), gguf.GGML_QUANT_SIZES[known]) == (name, (kind.weights, kind.bytes))


@EVERY
def test_random_blocks_decode_as_theirs(grid: Grid) -> None:
    kind, scheme = BLOCK_TYPES[grid.name], scheme_of(grid)
    blocks = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (500, 4 * kind.bytes), dtype=np.uint8))
    parts = from_blocks(blocks, scheme)
    stored = StoredWeight(scheme, (500, 4 * kind.weights))
    assert torch.equal(to_blocks(parts, stored), blocks)
    decoded, known = decode(parts, stored), theirs(blocks, grid)
    # Scales that are no numbers are left out.
    usable = torch.isfinite(known).all(dim=1)
    assert usable.sum() > 300
    assert torch.equal(decoded[usable], known[usable])


@EVERY
@pytest.mark.parametrize("search", SEARCHES)
def test_quantized_weights_decode_as_theirs(grid: Grid, search: ScaleSearch | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 512) * torch.rand(24, 1)
    weight[3], weight[5, :40], weight[7], weight[9] = 0, 0, weight[7].abs(), -weight[9].abs()
    weight[11, ::2] = 0.5
    check(weight, grid, search)


@pytest.mark.slow
@EVERY
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    exponents=st.lists(st.integers(-60, 12), min_size=1, max_size=16),
    zeros=st.floats(0, 1),
    searched=st.booleans(),
)
def test_ragged_weights_decode_as_theirs(
    grid: Grid, seed: int, exponents: list[int], zeros: float, searched: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, 256, generator=draw)
    sizes = torch.tensor([2.0 ** exponents[i % len(exponents)] for i in range(16)])
    weight = (weight.view(2, 16, 16) * sizes.view(1, 16, 1)).view(2, 256)
    weight = weight.masked_fill(torch.rand(2, 256, generator=draw) < zeros, 0.0)
    found = check(weight, grid, ScaleSearch() if searched else None)
    # No weight comes out larger than twice the largest that its block holds.
    assert float(found.decoded.abs().max()) <= 2 * float(weight.abs().max())


@EVERY
def test_the_search_gains_and_weighs(grid: Grid) -> None:
    torch.manual_seed(1)
    weight, importance = torch.randn(16, 512), torch.rand(512) * 4 + 0.01
    plain, searched = (quantized(weight, grid, one).squared_error for one in SEARCHES[:2])
    assert searched < 0.98 * plain
    choices = WeightChoices(scheme_of(grid), ScaleSearch())
    weighed = round_rows(weight, choices, None, importance / importance.mean()).decoded
    alone = round_rows(weight, choices, None, None).decoded
    error = [float(((one - weight).square() * importance).sum()) for one in (weighed, alone)]
    assert error[0] < error[1]


def test_part_of_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="no blocks of q4_0"):
        from_blocks(torch.zeros(2, 19, dtype=torch.uint8), Scheme(4, 32, "q4_0"))
