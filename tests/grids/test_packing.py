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


@pytest.mark.slow
@given(
    groups=st.integers(1, 12), size=st.integers(1, 300), share=st.floats(0, 1), seed=st.integers(0, 99), data=st.data()
)
@settings(max_examples=150, deadline=None)
def test_positions_round_trip(groups: int, size: int, share: float, seed: int, data: st.DataObject) -> None:
    weights = groups * size
    generator = torch.Generator().manual_seed(seed)
    where = (torch.rand(weights, generator=generator) < share).nonzero().squeeze(1)
    counts = positions.Where(weights, where.numel(), size)
    for encoding in (positions.ENCODINGS["elias-fano"], positions.ENCODINGS["bitmap"]):
        coded = encoding.encode(where, counts)
        assert coded.numel() == encoding.bytes(counts)
        assert torch.equal(encoding.decode(coded, counts), where)
    per_group = data.draw(st.integers(1, size))
    inside = torch.stack([torch.randperm(size, generator=generator)[:per_group].sort().values for _ in range(groups)])
    where = (inside + torch.arange(groups).unsqueeze(1) * size).view(-1)
    counts, encoding = positions.Where(weights, where.numel(), size), positions.ENCODINGS["indices"]
    coded = encoding.encode(where, counts)
    assert encoding.fits(counts)
    assert coded.numel() == encoding.bytes(counts)
    assert torch.equal(encoding.decode(coded, counts), where)


@given(
    name=st.sampled_from([*positions.ENCODINGS]),
    count=st.integers(1, 60),
    damage=st.binary(min_size=1),
    at=st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_damaged_positions_are_the_right_number_in_order_or_refused(
    name: str, count: int, damage: bytes, at: float
) -> None:
    encoding, size = positions.ENCODINGS[name], 24
    counts = positions.Where(size * 10, 10 * (count % 6 + 1) if encoding.even else count, size)
    step = counts.weights // counts.outliers
    data = encoding.encode(torch.arange(counts.outliers) * step, counts)
    start = int(at * (data.numel() - 1))
    bad = torch.tensor(list(damage), dtype=torch.uint8)[: data.numel() - start]
    data[start : start + bad.numel()] = bad
    try:
        found = encoding.decode(data, counts)
        positions.check(found, counts)
    except ValueError as error:
        assert "positions of outliers" in str(error)
    else:
        assert sorted(set(found.tolist())) == found.tolist()
        assert len(found) == counts.outliers
        assert 0 <= int(found[0]) <= int(found[-1]) < counts.weights


def test_the_smallest_encoding_is_chosen() -> None:
    assert positions.choose(positions.Where(64 * 100, 200, 64), 2) == "indices"
    assert positions.choose(positions.Where(6400, 320, 64), None) == "elias-fano"
    assert positions.choose(positions.Where(6400, 3000, 64), None) == "bitmap"


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.1])
def test_positions_cost_little_more_than_their_entropy(share: float) -> None:
    weights = 1 << 20
    count = int(share * weights)
    entropy = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) * weights / 8
    counts = positions.Where(weights, count, 128)
    assert positions.ENCODINGS[positions.choose(counts, None)].bytes(counts) < 1.12 * entropy
