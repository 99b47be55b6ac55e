import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.grids import positions
from fewbit.grids.packing import pack, packed_bytes, planes, unpack


def unpack_slowly(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """One row, bit by bit, as docs/format.md says."""
    codes, start, shift = np.zeros(columns, dtype=np.int64), 0, 0
    for width in [w for w in (8, 4, 2, 1) if bits & w]:
        for j in range(columns):
            for i in range(width):
                bit = j * width + i
                codes[j] |= ((int(packed[start + bit // 8]) >> (bit % 8)) & 1) << (shift + i)
        start, shift = start + (columns * width + 7) // 8, shift + width
    return codes


@given(bits=st.integers(1, 8), rows=st.integers(0, 3), columns=st.integers(0, 40), seed=st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_pack_and_unpack_are_inverse_and_as_specified(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_bytes(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)
    for row in range(rows):
        assert unpack_slowly(packed[row].numpy(), bits, columns).tolist() == codes[row].tolist()


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_take_exactly_their_bits(bits: int) -> None:
    assert sum(planes(bits)) == bits
    assert packed_bytes(64, bits) == 8 * bits


def test_unpack_reads_a_strided_slice() -> None:
    packed = pack(torch.arange(64, dtype=torch.uint8).view(4, 16) % 8, 3)
    wide = torch.cat([packed, packed], dim=1)
    assert torch.equal(unpack(wide[:, packed.shape[1] :], 3, 16), unpack(packed, 3, 16))


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        planes(bits)


@given(
    groups=st.integers(1, 12), size=st.integers(1, 300), share=st.floats(0, 1), seed=st.integers(0, 99), data=st.data()
)
@settings(max_examples=150, deadline=None)
def test_positions_round_trip(groups: int, size: int, share: float, seed: int, data: st.DataObject) -> None:
    weights = groups * size
    generator = torch.Generator().manual_seed(seed)
    where = (torch.rand(weights, generator=generator) < share).nonzero().squeeze(1)
    for encoding in ("elias-fano", "bitmap"):
        coded = positions.encode(where, encoding, weights, size)
        assert coded.numel() == positions.encoded_bytes(encoding, weights, where.numel(), size)
        assert torch.equal(positions.decode(coded, encoding, weights, where.numel(), size), where)
    per_group = data.draw(st.integers(1, size))
    inside = torch.stack([torch.randperm(size, generator=generator)[:per_group].sort().values for _ in range(groups)])
    where = (inside + torch.arange(groups).unsqueeze(1) * size).view(-1)
    coded = positions.encode(where, "indices", weights, size)
    assert coded.numel() == positions.encoded_bytes("indices", weights, where.numel(), size)
    assert torch.equal(positions.decode(coded, "indices", weights, where.numel(), size), where)


def test_the_smallest_encoding_is_chosen() -> None:
    assert positions.choose(64 * 100, 200, 64, 2) == "indices"
    assert positions.choose(6400, 320, 64, None) == "elias-fano"
    assert positions.choose(6400, 3000, 64, None) == "bitmap"


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.1])
def test_positions_cost_little_more_than_their_entropy(share: float) -> None:
    weights = 1 << 20
    count = int(share * weights)
    entropy = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) * weights / 8
    chosen = positions.encoded_bytes(positions.choose(weights, count, 128, None), weights, count, 128)
    assert chosen < 1.12 * entropy
