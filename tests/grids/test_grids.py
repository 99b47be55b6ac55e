import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.errors import FewbitError
from fewbit.grids import codebook, integer, scales
from fewbit.outliers import adaptive_lasso

FINITE = st.floats(-4, 4, width=32)


@given(st.lists(FINITE, min_size=1, max_size=30), st.integers(2, 8))
@settings(max_examples=200, deadline=None)
def test_zero_point_grid_against_float64(values: list[float], bits: int) -> None:
    x = torch.tensor([values], dtype=torch.float32)
    scale, zero = integer.zero_point_grid(*integer.extremes(x), bits)
    codes = integer.encode(x, scale, zero, bits)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    low, high = min(0.0, *values), max(0.0, *values)
    wide = (high - low) / (2**bits - 1)
    decoded = ((codes - zero) * scale).double().numpy()
    assert np.abs(decoded - np.array([values])).max() <= wide * 1.001 + 1e-6
    assert float(integer.encode(torch.zeros(1, 1), scale, zero, bits)) == float(zero)


@given(st.lists(FINITE, min_size=1, max_size=30), st.integers(2, 8))
@settings(max_examples=200, deadline=None)
def test_minimum_grid_reaches_both_ends_and_is_off_by_half_a_step(values: list[float], bits: int) -> None:
    x = torch.tensor([values], dtype=torch.float32)
    low, high = integer.extremes(x)
    scale = integer.minimum_grid(low, high, bits)
    decoded = integer.encode_minimum(x, scale, low, bits) * scale + low
    assert float((decoded - x).abs().max()) <= float(scale) / 2 * 1.001 + 1e-6


def test_extremes_of_a_subset() -> None:
    x = torch.tensor([[-3.0, 1.0, 2.0], [5.0, 6.0, 7.0], [-9.0, -1.0, -2.0], [-1.0, 8.0, 2.0], [3.0, 0.0, 1.0]])
    outside = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    low, high = integer.extremes(x.masked_fill(outside, 0.0), outside)
    assert low.view(-1).tolist() == [1.0, 0.0, -2.0, -1.0, 0.0]
    assert high.view(-1).tolist() == [2.0, 0.0, -1.0, 2.0, 3.0]


@pytest.mark.parametrize("cut", [0.0, 0.5, 100.0])
def test_split_is_by_magnitude_above_the_cut(cut: float) -> None:
    x = torch.cat([torch.randn(3, 64), torch.full((1, 64), 0.5)])
    core, outliers = adaptive_lasso.split(x, cut)
    assert torch.equal(outliers, x.abs() > cut)
    assert torch.equal(core, torch.where(outliers, 0.0, x))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_normal_float_levels(bits: int) -> None:
    levels = codebook.normal_float(bits)
    assert len(levels) == 2**bits
    assert list(levels) == sorted(levels)
    assert (levels[0], levels[-1]) == (-1.0, 1.0)
    assert (0.0 in levels) == (bits > 1)


def test_normal_float_of_4_bits_is_nf4() -> None:
    # Values printed in QLoRA (arXiv 2305.14314), appendix E.
    nf4 = [-1.0, -0.6961928, -0.5250730, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    nf4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    assert np.abs(np.array(codebook.normal_float(4)) - nf4).max() < 2e-6


@given(st.lists(st.floats(-2, 2, width=32, allow_subnormal=False), min_size=1, max_size=50), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_codebook_picks_the_nearest_level(values: list[float], bits: int) -> None:
    levels = np.array(codebook.normal_float(bits))
    u = torch.tensor([values], dtype=torch.float32)
    codes = codebook.encode(u, torch.ones(1, 1), tuple(levels))[0].numpy()
    distance = np.abs(np.array(values)[:, None] - levels[None])
    assert (distance[np.arange(len(values)), codes] <= distance.min(1) + 1e-6).all()
    value = codebook.quantize(u, tuple(levels))[0].numpy()
    assert np.abs(value - levels[codes]).max() < 1e-5


def test_scale_search_is_the_best_of_its_candidates_in_float64() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 64, generator=generator)
    importance = torch.rand(20, 64, generator=generator)
    levels = codebook.normal_float(3)
    search = codebook.ScaleSearch(error_power=2.0)
    found = codebook.search_scale(x, importance, levels, search)

    def error(row: int, scale: float) -> float:
        w, c, book = x[row].double().numpy(), importance[row].double().numpy(), np.array(levels) * scale
        return float((c * np.abs(w[:, None] - book[None]).min(1) ** 2).sum())

    for row in range(20):
        widest = float(x[row].abs().max())
        best = min(error(row, sign * ratio * widest) for ratio in search.ratios() for sign in (1, -1))
        assert error(row, float(found[row])) <= best * 1.0001


@given(st.lists(st.lists(st.floats(-1, 1, width=32), min_size=5, max_size=5), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_two_level_scales(values: list[list[float]]) -> None:
    wanted = torch.tensor(values, dtype=torch.float32)
    seen = scales.from_two_level(*scales.to_two_level(wanted), 5)
    for found, row in zip(seen.double().numpy(), wanted.double().numpy(), strict=True):
        evenly, slack = two_level_levels(row, None), 0.03 * float((row != 0).sum())
        if (np.abs(nearest(evenly, row) - row) <= 0.1 * np.abs(row)).all():
            assert lost(found, row) <= lost(nearest(evenly, row), row) + slack
        else:
            assert lost(found, row) <= min(lost(nearest(two_level_levels(row, s), row), row) for s in range(4)) + slack
    # A scale that is not 0 stays what it is, or becomes a larger one of its own sign.
    normal = wanted.abs().amax(dim=1, keepdim=True) > 1e-30
    assert bool((torch.sign(seen) == torch.sign(wanted))[normal & (wanted.abs() > 1e-30)].all())


def two_level_levels(row: np.ndarray, spread: int | None) -> np.ndarray:
    """The 63 magnitudes of a row, evenly spaced or logarithmic; in float64, without the rounding of the row's scale."""
    code = np.arange(1, 64)
    return np.abs(row).max() * (code / 63 if spread is None else 2.0 ** ((code - 63) / 5 * 2**spread))


def nearest(levels: np.ndarray, row: np.ndarray) -> np.ndarray:
    """The nearest level to each value, with its sign; 0 for 0."""
    return np.sign(row) * levels[np.abs(levels[None] - np.abs(row)[:, None]).argmin(1)]


def lost(found: np.ndarray, row: np.ndarray) -> float:
    """Squared relative error, 1 at most for each value."""
    part = np.abs(found - row)[row != 0] / np.abs(row[row != 0])
    return float((np.minimum(part, 1.0) ** 2).sum())


def test_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FewbitError, match="use --scale-format float32"):
        scales.to_pattern(torch.tensor([1e6]), "float16")


def test_a_group_of_zeros_stays_zero_on_every_grid() -> None:
    x = torch.zeros(2, 8)
    scale, zero = integer.zero_point_grid(*integer.extremes(x), 3)
    assert float(((integer.encode(x, scale, zero, 3) - zero) * scale).abs().sum()) == 0
    found = codebook.search_scale(x, None, codebook.normal_float(3), codebook.ScaleSearch())
    levels = torch.tensor(codebook.normal_float(3))
    codes = codebook.encode(x, found, codebook.normal_float(3))
    assert float(codebook.decode(codes, found, levels).abs().sum()) == 0


@settings(max_examples=60, deadline=None)
@given(exponents=st.lists(st.floats(-12, 0), min_size=2, max_size=9), sign=st.sampled_from([1.0, -1.0]))
def test_no_two_level_scale_beside_a_large_one_is_lost(exponents: list[float], sign: float) -> None:
    wanted = torch.tensor([[sign * 2.0**e for e in (0.0, *exponents)]])
    seen = scales.from_two_level(*scales.to_two_level(wanted), wanted.shape[1])
    assert bool(((seen - wanted).abs() <= 0.101 * wanted.abs()).all())


@settings(max_examples=60, deadline=None)
@given(exponents=st.lists(st.floats(-49, 0), min_size=2, max_size=9), size=st.floats(-40, 20))
def test_the_loss_of_a_two_level_scale_has_a_bound_at_any_ratio(exponents: list[float], size: float) -> None:
    wanted = torch.tensor([[2.0 ** (e + size) for e in (0.0, *exponents)]])
    seen = scales.from_two_level(*scales.to_two_level(wanted), wanted.shape[1])
    # At most half a step of the spread that reaches the smallest (1/10, 1/5 or 2/5 of an octave), and the row scale's
    # rounding.
    spread = max(0, math.ceil(math.log2(max(-min(exponents), 1e-9) / 12.4)))
    worst = 2.0 ** (0.1 * 2**spread + 0.03) - 1
    assert lost(seen.double().numpy()[0], wanted.double().numpy()[0]) <= wanted.shape[1] * worst**2


def test_two_level_rows_of_one_size_stay_linear() -> None:
    wanted = torch.tensor([[1.0, 0.5, -0.25, 0.0], [1.0, 0.001, -0.25, 0.0]])
    codes, rows = scales.to_two_level(wanted)
    assert (scales.from_pattern(rows, "bfloat16") < 0).tolist() == [False, True]
    assert scales.from_two_level(codes, rows, 4)[:, 3].tolist() == [0.0, 0.0]
