from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.outliers.adaptive_lasso import group_mask, outlier_count, threshold


def soft_threshold_outliers(w: np.ndarray, lam: float) -> np.ndarray:
    """The adaptive LASSO's solution in float64, and which weights it leaves non-zero."""
    magnitude = np.abs(w)
    q = np.sign(w) * np.maximum(magnitude - lam / np.where(magnitude > 0, magnitude, 1), 0)
    return q != 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.05, 0.3])
def test_threshold_is_the_square_root_of_lambda(dtype: torch.dtype, fraction: float) -> None:
    w = (torch.randn(8, 512, generator=torch.Generator().manual_seed(3)) * 0.02).to(dtype)
    wanted = outlier_count(w.numel(), fraction)
    parts = [partial(lambda i: w[i : i + 3], i) for i in range(0, 8, 3)]
    t = threshold(parts, wanted)
    outliers = w.abs().double().numpy() > t
    assert outliers.sum() <= wanted
    below = w.abs().double().numpy() >= t
    assert below.sum() > wanted or wanted == 0
    lam = t * t * (1 + 1e-12)
    assert (soft_threshold_outliers(w.double().numpy(), lam) == outliers).all()


@pytest.mark.slow
@given(st.lists(st.floats(-10, 10, width=16), min_size=1, max_size=60), st.floats(0, 0.49))
@settings(max_examples=200, deadline=None)
def test_threshold_against_sorting(values: list[float], fraction: float) -> None:
    wanted = outlier_count(len(values), fraction)
    for dtype in (torch.float16, torch.float32):
        w = torch.tensor(values, dtype=dtype)
        expected = w.abs().float().sort(descending=True).values[wanted]
        assert threshold([lambda w=w: w], wanted) == float(expected)


def test_group_mask_takes_the_largest_and_the_first_of_equals() -> None:
    magnitudes = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert group_mask(magnitudes, 1).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert group_mask(magnitudes, 3).sum(dim=1).tolist() == [3, 3]
    assert not group_mask(magnitudes, 0).any()


@pytest.mark.parametrize(("weights", "fraction", "count"), [(100, 0.05, 5), (10, 0.05, 0), (1000, 0.29, 290)])
def test_outlier_count(weights: int, fraction: float, count: int) -> None:
    assert outlier_count(weights, fraction) == count
