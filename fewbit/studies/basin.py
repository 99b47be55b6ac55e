"""Curves of the loss along a direction: where it has risen by so much, and how it bends. Pure functions of floats."""

from collections.abc import Sequence


def crossing_radius(distances: Sequence[float], rises: Sequence[float], level: float) -> float | None:
    """The smallest distance at which the loss has risen by `level`, interpolated linearly between samples.

    distances: from 0, increasing. rises: the loss minus that at 0, in nats. None when it does not rise so far.
    """
    for index in range(1, len(distances)):
        if rises[index] >= level:
            low, high = rises[index - 1], rises[index]
            share = (level - low) / (high - low) if high > low else 1.0
            return distances[index - 1] + share * (distances[index] - distances[index - 1])
    return None


def second_difference(before: tuple[float, float], here: tuple[float, float], after: tuple[float, float]) -> float:
    """The second derivative at `here` of the parabola through three points (place, value), evenly spaced or not."""
    left, right = here[0] - before[0], after[0] - here[0]
    slope_left, slope_right = (here[1] - before[1]) / left, (after[1] - here[1]) / right
    return 2 * (slope_right - slope_left) / (left + right)


def slope(before: tuple[float, float], here: tuple[float, float], after: tuple[float, float]) -> float:
    """The first derivative at `here` of the parabola through three points (place, value)."""
    left, right = here[0] - before[0], after[0] - here[0]
    slope_left, slope_right = (here[1] - before[1]) / left, (after[1] - here[1]) / right
    return (slope_left * right + slope_right * left) / (left + right)
