"""Two one-sided tests against mpmath's incomplete beta, printed t tables, and what a test must do on known samples."""

import math
import random

import pytest

from fewbit.errors import FewbitError
from fewbit.evaluation.equivalence import (
    equivalence,
    incomplete_beta,
    moments,
    paired,
    paired_with_runs,
    pooled_variance,
    student_quantile,
    student_tail,
)

mpmath = pytest.importorskip("mpmath")


@pytest.mark.parametrize("degrees", [1, 2, 3.7, 11, 23, 400])
def test_student_is_the_integral_of_its_density(degrees: float) -> None:
    def density(t: float) -> float:
        gamma, pi = mpmath.gamma, mpmath.pi
        front = gamma((degrees + 1) / 2) / (gamma(degrees / 2) * mpmath.sqrt(degrees * pi))
        return front * (1 + t**2 / mpmath.mpf(degrees)) ** (-(degrees + 1) / 2)

    for t in (-3.0, -0.2, 0.0, 0.7, 2.5, 8.0):
        wanted = 0.5 - mpmath.quad(density, [0, t])
        assert student_tail(t, degrees) == pytest.approx(float(wanted), rel=1e-8, abs=1e-12)
    assert student_tail(student_quantile(0.95, degrees), degrees) == pytest.approx(0.05, rel=1e-9)


def test_known_values() -> None:
    # Printed tables of the t distribution.
    assert student_quantile(0.95, 1) == pytest.approx(6.3138, abs=1e-4)
    assert student_quantile(0.95, 23) == pytest.approx(1.7139, abs=1e-4)
    assert student_quantile(0.025, 10) == pytest.approx(-2.2281, abs=1e-4)
    for x, a, b in ((0.1, 0.5, 0.5), (0.9, 3.0, 0.5), (0.5, 11.5, 0.5), (0.999, 200.0, 0.5)):
        assert incomplete_beta(x, a, b) == pytest.approx(float(mpmath.betainc(a, b, 0, x, regularized=True)), rel=1e-10)
    assert (incomplete_beta(0, 2, 3), incomplete_beta(1, 2, 3)) == (0.0, 1.0)


def test_two_one_sided_tests_by_hand() -> None:
    # t_low = (0.005 + 0.02) / 0.004 = 6.25, t_high = (0.02 - 0.005) / 0.004 = 3.75, 9 degrees.
    found = equivalence(0.005, 0.004, 9, 0.02)
    tail = float(mpmath.betainc(4.5, 0.5, 0, 9 / (9 + 3.75**2), regularized=True)) / 2
    assert found.p == pytest.approx(tail, rel=1e-9) and found.verdict == "same"
    assert (found.low, found.high) == pytest.approx((0.005 - 1.8331 * 0.004, 0.005 + 1.8331 * 0.004), abs=1e-6)


def test_verdicts() -> None:
    margin = math.log(1.02)
    assert equivalence(0.0, 0.002, 20, margin).verdict == "same"
    assert equivalence(0.1, 0.01, 20, margin).verdict == "worse"
    assert equivalence(-0.1, 0.01, 20, margin).verdict == "better"
    assert equivalence(0.02, 0.005, 20, margin).verdict == "near"
    assert equivalence(0.0, 0.05, 20, margin).verdict == "open"
    for mean in (-0.05, -0.015, 0.0, 0.01, 0.02, 0.03):
        for error in (0.001, 0.01, 0.1):
            found = equivalence(mean, error, 8, margin)
            assert (found.p < 0.05) == (-margin < found.low and found.high < margin)
    assert equivalence(0.0, 0.0, 5, margin).verdict == "same" and equivalence(0.5, 0.0, 5, margin).verdict == "worse"


@pytest.mark.slow
def test_a_pair_of_equal_models_is_called_different_as_rarely_as_alpha() -> None:
    generator = random.Random(0)
    margin, count = 0.5, 400
    # At the very margin the null hypothesis holds: 5 % of the samples may be called the same.
    called = sum(
        paired([generator.gauss(margin, 1) for _ in range(12)], margin).verdict == "same" for _ in range(count)
    )
    assert called / count < 0.085
    sure = sum(paired([generator.gauss(0, 0.3) for _ in range(12)], margin).verdict == "same" for _ in range(count))
    assert sure / count > 0.95


def test_seeds_widen_what_windows_alone_would_say() -> None:
    differences = [0.001, 0.002, -0.001, 0.0005, 0.0015, -0.0005]
    alone = paired(differences, 0.02)
    none = paired_with_runs(differences, 0.0, 4, (3, 2), 0.02)
    assert none.standard_error == pytest.approx(alone.standard_error) and none.degrees == pytest.approx(alone.degrees)
    wide = paired_with_runs(differences, 0.03**2, 4, (3, 2), 0.02)
    mean, variance = moments(differences)
    windows, seeds = variance / 6, 0.03**2 * (1 / 3 + 1 / 2)
    assert wide.mean == mean and wide.standard_error == pytest.approx(math.sqrt(windows + seeds))
    assert wide.degrees == pytest.approx((windows + seeds) ** 2 / (windows**2 / 5 + seeds**2 / 4))
    assert alone.verdict == "same" and wide.verdict == "open"


def test_pooled_variance() -> None:
    assert pooled_variance([[1.0, 3.0], [5.0], [2.0, 2.0, 5.0]]) == ((2.0 + 6.0) / 3, 3)
    assert pooled_variance([[1.0], []]) == (0.0, 0)
    with pytest.raises(FewbitError, match="at least 2 values"):
        paired([0.1], 0.02)
    with pytest.raises(FewbitError, match="margin above 0"):
        equivalence(0.1, 0.1, 5, 0.0)
