"""Two one-sided t-tests (TOST; Schuirmann 1987): whether the losses of two models are equal within a margin.

A test that finds no difference does not show equality. In TOST, the null hypothesis is a difference of at least the
margin, and a small p rejects it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fewbit.errors import FewbitError

_TINY = 1e-300


@dataclass(frozen=True)
class Equivalence:
    """The result of a test of a mean difference against a margin.

    p: the larger p of the two one-sided tests; below alpha, the two models are equivalent. low, high: the (1 - 2 alpha)
    confidence interval, which lies inside the margin exactly if p < alpha. p_different: of the usual two-sided test of
    no difference.
    """

    mean: float
    standard_error: float
    degrees: float
    margin: float
    alpha: float
    p: float
    low: float
    high: float
    p_different: float

    @property
    def verdict(self) -> str:
        """same: significantly within the margin. worse, better: significantly above or below the margin. near:
        significantly different from 0, but possibly within the margin. open: undecided.
        """
        if self.p < self.alpha:
            return "same"
        if self.low > self.margin:
            return "worse"
        if self.high < -self.margin:
            return "better"
        return "near" if self.low > 0 or self.high < 0 else "open"


def equivalence(mean: float, standard_error: float, degrees: float, margin: float, alpha: float = 0.05) -> Equivalence:
    """TOST of a mean difference with a standard error of `degrees` degrees of freedom, against ±`margin`."""
    if margin <= 0 or not 0 < alpha < 0.5 or degrees <= 0:
        raise FewbitError("an equivalence test needs a margin above 0, an alpha from 0 to 0.5 and at least 2 values")
    if standard_error <= 0:
        # Without any variance, the difference is exact.
        inside = abs(mean) < margin
        different = 0.0 if mean else 1.0
        return Equivalence(mean, 0.0, degrees, margin, alpha, 0.0 if inside else 1.0, mean, mean, different)
    above = student_tail((mean + margin) / standard_error, degrees)
    below = student_tail((margin - mean) / standard_error, degrees)
    reach = student_quantile(1 - alpha, degrees) * standard_error
    different = 2 * student_tail(abs(mean) / standard_error, degrees)
    return Equivalence(
        mean, standard_error, degrees, margin, alpha, max(above, below), mean - reach, mean + reach, different
    )


def paired(differences: Sequence[float], margin: float, alpha: float = 0.05) -> Equivalence:
    """TOST of paired differences, such as those of two models' losses by window; at least two values."""
    mean, variance = moments(differences)
    count = len(differences)
    return equivalence(mean, math.sqrt(variance / count), count - 1, margin, alpha)


def paired_with_runs(
    differences: Sequence[float], run_variance: float, run_degrees: float, runs: tuple[int, int], margin: float,
    alpha: float = 0.05,
) -> Equivalence:  # fmt: skip
    """TOST of differences between means over several runs (seeds), paired over windows.

    differences: for every window, the difference of the two means over runs. run_variance, run_degrees: variance
    between seeds of a run's mean loss, and its degrees of freedom. runs: number of runs on each side. A seed changes
    the loss of all windows together, so the variance over windows does not include it: ``SE^2 = s_windows^2 / n +
    s_runs^2 (1/r_1 + 1/r_2)``, with the degrees of freedom of Welch and Satterthwaite.
    """
    mean, variance = moments(differences)
    count = len(differences)
    windows = variance / count
    seeds = run_variance * (1 / runs[0] + 1 / runs[1])
    total = windows + seeds
    spread = windows**2 / (count - 1) + seeds**2 / run_degrees
    degrees = total**2 / spread if spread > 0 else count - 1
    return equivalence(mean, math.sqrt(total), degrees, margin, alpha)


def moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and unbiased variance; raises FewbitError for fewer than two values."""
    if len(values) < 2:
        raise FewbitError(f"an equivalence test needs at least 2 values, not {len(values)}: use more windows or seeds")
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def pooled_variance(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Pooled variance within groups of two or more values, and its degrees of freedom (0 if there are no groups)."""
    squares, degrees = 0.0, 0
    for group in groups:
        if len(group) > 1:
            squares += moments(group)[1] * (len(group) - 1)
            degrees += len(group) - 1
    return (squares / degrees if degrees else 0.0), degrees


def student_tail(t: float, degrees: float) -> float:
    """P(T > t) of Student's distribution."""
    half = 0.5 * incomplete_beta(degrees / (degrees + t * t), degrees / 2, 0.5)
    return half if t > 0 else 1.0 - half


def student_quantile(share: float, degrees: float) -> float:
    """The t with P(T <= t) = `share`, by bisection."""
    if share < 0.5:
        return -student_quantile(1 - share, degrees)
    low, high = 0.0, 1.0
    while 1 - student_tail(high, degrees) < share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - student_tail(middle, degrees) < share else (low, middle)
    return (low + high) / 2


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b), by its continued fraction (Lentz's method)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - incomplete_beta(1 - x, b, a)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x) - math.log(a)
    )
    c, d = 1.0, 1.0 / _not_zero(1.0 - (a + b) * x / (a + 1))
    result = d
    for m in range(1, 10_000):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / _not_zero(1.0 + step * d)
            c = _not_zero(1.0 + step / c)
            result *= c * d
        if abs(c * d - 1.0) < 1e-14:
            break
    return front * result


def _not_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
