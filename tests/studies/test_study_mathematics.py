"""The mathematics of the studies against few-line references."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from fewbit.studies.basin import crossing_radius, second_difference, slope
from fewbit.studies.directions import inner, norm, plane_of, random_direction
from fewbit.studies.layer_errors import Fisher, output_error, predicted_increase, weight_error
from fewbit.studies.statistics import (
    bootstrap_interval,
    discordant_share,
    normal_interval,
    ranks,
    spearman,
    spearman_interval,
)


def slow_ranks(values: list[float]) -> list[float]:
    """The mean of the places that a value and its equals take when sorted."""
    ordered = sorted(values)
    return [float(np.mean([i + 1 for i, other in enumerate(ordered) if other == value])) for value in values]


@pytest.mark.parametrize("seed", range(5))
def test_spearman_with_ties_is_the_correlation_of_mean_ranks(seed: int) -> None:
    generator = np.random.default_rng(seed)
    x, y = generator.integers(0, 8, 30).astype(float), generator.integers(0, 8, 30) + 0.5
    assert ranks(x).tolist() == slow_ranks(x.tolist())
    expected = np.corrcoef(slow_ranks(x.tolist()), slow_ranks(y.tolist()))[0, 1]
    assert spearman(x, y) == pytest.approx(expected, abs=1e-12)
    assert spearman(x, x**3 + 1) == pytest.approx(1.0)
    assert spearman(x, -np.exp(x)) == pytest.approx(-1.0)


def test_spearman_by_the_textbook_formula_and_of_a_constant() -> None:
    # Without ties: 1 - 6 sum d^2 / (n (n^2 - 1)), here with d = (-1, 1, -1, 1, 0).
    assert spearman([1, 2, 3, 4, 5], [3, 0, 4, 3.5, 5]) == pytest.approx(1 - 6 * 4 / 120)
    assert spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(1 - 6 * 4 / 60)
    assert math.isnan(spearman([1, 2, 3], [5, 5, 5]))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    # Normal pairs with correlation r have Spearman's rho = 6/pi asin(r/2).
    r = 0.6
    truth = 6 / math.pi * math.asin(r / 2)
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        x = generator.normal(size=40)
        y = r * x + math.sqrt(1 - r * r) * generator.normal(size=40)
        low, high = spearman_interval(x, y, trial, resamples=200)
        covered += low <= truth <= high
    assert 85 <= covered <= 100
    assert bootstrap_interval(x, y, 1) == bootstrap_interval(x, y, 1) != bootstrap_interval(x, y, 2)
    assert all(map(math.isnan, spearman_interval([1, 1, 1, 1], [1, 2, 3, 4], 0, resamples=20)))


@pytest.mark.parametrize("size", [5, 8])
def test_the_interval_of_a_few_pairs_is_no_point(size: int) -> None:
    r = 0.95
    truth = 6 / math.pi * math.asin(r / 2)
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        x = generator.normal(size=size)
        y = r * x + math.sqrt(1 - r * r) * generator.normal(size=size)
        low, high = spearman_interval(x, y, trial, resamples=200)
        assert high - low > 0.1
        covered += low <= truth <= high
    assert covered >= 186
    assert spearman_interval(range(size), range(size), 0)[1] == pytest.approx(1.0)
    low, high = normal_interval(0.5, 28)
    assert (low, high) == pytest.approx((math.tanh(0.5493 - 0.41579), math.tanh(0.5493 + 0.41579)), abs=1e-3)


def test_the_interval_is_that_of_drawing_pairs_one_by_one() -> None:
    generator = np.random.default_rng(3)
    x, y = generator.integers(0, 6, 25).astype(float), generator.normal(size=25)
    drawn = np.random.default_rng(7).integers(0, 25, (300, 25))
    slow = [spearman(x[row], y[row]) for row in drawn]
    expected = np.quantile(slow, [0.05, 0.95])
    assert bootstrap_interval(x, y, 7, 0.9, 300) == pytest.approx(tuple(expected), abs=1e-12)


def test_discordant_share_counts_pairs() -> None:
    x, y = [1.0, 2.0, 3.0, 3.0, 5.0], [2.0, 1.0, 4.0, 0.0, 5.0]
    pairs = [(i, j) for i, j in combinations(range(5), 2) if x[i] != x[j] and y[i] != y[j]]
    expected = sum((x[i] - x[j]) * (y[i] - y[j]) < 0 for i, j in pairs) / len(pairs)
    assert len(pairs) == 9
    assert discordant_share(x, y) == pytest.approx(expected)
    assert math.isnan(discordant_share([1, 1], [1, 2]))


def test_crossing_radius_interpolates_and_takes_the_first() -> None:
    distances, rises = [0.0, 0.1, 0.2, 0.4], [0.0, 0.05, 0.25, 2.0]
    assert crossing_radius(distances, rises, 0.1) == pytest.approx(0.125)
    assert crossing_radius(distances, rises, 0.25) == pytest.approx(0.2)
    assert crossing_radius(distances, rises, 1.0) == pytest.approx(0.2 + 0.2 * 0.75 / 1.75)
    assert crossing_radius(distances, rises, 3.0) is None
    assert crossing_radius([0, 1, 2, 3], [0, -1, 3, 0], 1.0) == pytest.approx(1.5)


@pytest.mark.parametrize("places", [(-1.0, 0.0, 1.0), (-0.3, 0.0, 2.0), (0.4, 1.0, 1.1)])
def test_differences_are_exact_for_a_parabola(places: tuple[float, float, float]) -> None:
    points = [(x, 3 * x * x - 2 * x + 1) for x in places]
    assert second_difference(*points) == pytest.approx(6)
    assert slope(*points) == pytest.approx(6 * places[1] - 2)


WEIGHTS = [torch.randn(6, 10, generator=torch.Generator().manual_seed(1)) * 3, torch.ones(4, 5) * 0.1]


def test_random_directions_have_the_norm_they_say() -> None:
    filters = random_direction(WEIGHTS, "filter", 5)
    for part, weight in zip(filters, WEIGHTS, strict=True):
        assert torch.allclose(part.norm(dim=1), weight.norm(dim=1), rtol=1e-5)
    plain = random_direction(WEIGHTS, "plain", 5)
    whole = torch.cat([w.flatten() for w in WEIGHTS]).norm()
    assert norm(plain) == pytest.approx(float(whole), rel=1e-6)
    # Plain directions know nothing of the weights' sizes: all entries have one variance.
    many = [random_direction(WEIGHTS, "plain", seed) for seed in range(200)]
    first, second = (torch.stack([d[i] for d in many]).square().mean() for i in (0, 1))
    assert float(first / second) == pytest.approx(1, abs=0.1)
    assert all(map(torch.equal, filters, random_direction(WEIGHTS, "filter", 5)))
    assert not torch.equal(filters[0], random_direction(WEIGHTS, "filter", 6)[0])


def test_a_row_of_zeros_is_not_moved_by_a_filter_direction() -> None:
    found = random_direction([torch.zeros(2, 3), torch.ones(2, 3)], "filter", 0)
    assert torch.equal(found[0], torch.zeros(2, 3))
    assert torch.isfinite(found[1]).all()


def test_the_plane_holds_both_directions() -> None:
    one = [torch.randn(3, 4), torch.randn(5)]
    other = [torch.randn(3, 4), torch.randn(5)]
    first, second, (x, y) = plane_of(one, other)
    assert norm(first) == pytest.approx(1, rel=1e-5)
    assert norm(second) == pytest.approx(1, rel=1e-5)
    assert inner(first, second) == pytest.approx(0, abs=1e-5)
    for part, a, b, a1, b1 in zip(other, first, second, one, first, strict=True):
        assert torch.allclose(x * a + y * b, part, atol=1e-5)
        assert torch.allclose(norm(one) * b1, a1, atol=1e-5)
    _, flat, (x, y) = plane_of(one, [2 * part for part in one])
    assert x == pytest.approx(2 * norm(one))
    assert norm(flat) == 0


def test_output_error_is_that_of_the_outputs() -> None:
    w, q, x = torch.randn(6, 8), torch.randn(6, 8), torch.randn(8, 50)
    expected = (w @ x - q @ x).square().sum() / (w @ x).square().sum()
    assert output_error(w, q, x @ x.T) == pytest.approx(float(expected), rel=1e-4)
    assert output_error(torch.zeros(6, 8), q, x @ x.T) == 0
    squared, whole = weight_error(w, q)
    assert squared / whole == pytest.approx(float((q - w).square().sum() / w.square().sum()), rel=1e-5)


def test_the_prediction_is_the_second_order_term_of_independent_errors() -> None:
    """For a softmax regression whose labels follow the model, the Fisher is the Hessian: compare with the true rise."""
    generator = torch.Generator().manual_seed(0)
    out, columns, tokens = 12, 20, 4000
    w = torch.randn(out, columns, generator=generator) * 0.3
    x = torch.randn(tokens, columns, generator=generator) * torch.logspace(-1, 0.3, columns)
    logits = x @ w.T
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    delta = logits.softmax(1)
    delta[torch.arange(tokens), labels] -= 1
    scaled = x * delta.norm(dim=1, keepdim=True)
    fisher = Fisher(scaled.T @ scaled, tokens)
    predicted, true = 0.0, 0.0
    for _ in range(60):
        q = w + 0.05 * torch.randn(out, columns, generator=generator)
        predicted += predicted_increase(w, q, fisher)
        # The expected rise given the inputs: the divergence of the predictions, free of the labels' first-order term.
        log_p, log_q = logits.log_softmax(1), (x @ q.T).log_softmax(1)
        true += float((log_p.exp() * (log_p - log_q)).sum(1).mean())
    assert predicted == pytest.approx(true, rel=0.1)
