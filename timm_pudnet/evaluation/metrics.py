"""Means and shares with their intervals, and rank correlation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# 97.5 % quantiles of Student's t, by degrees of freedom from 1 on.
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def mean_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean of independent values and the half-width of its 95 % interval: by Student's t, normal above 100 values.

    Example:
        >>> mean_interval([0.0, 1.0, 0.0, 1.0])['mean']
        0.5
    """
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return {'mean': mean, 'interval': math.nan}
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return {'mean': mean, 'interval': _quantile(count - 1) * math.sqrt(variance / count)}


def _quantile(freedom: int) -> float:
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    return 1.96 + 2.372 / freedom + 2.823 / freedom**2 if freedom < 100 else 1.96  # the first terms of its expansion


def share_interval(right: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share, from counts; sound for small counts and for shares near 0 and 1.

    Example:
        >>> low, high = share_interval(10, 10)
        >>> round(low, 2), high
        (0.72, 1.0)
    """
    z = 1.96
    share = right / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low, high = (middle - half) / (1 + z * z / total), (middle + half) / (1 + z * z / total)
    # Bounds of 0 and 1 may come out a rounding error short of the share itself.
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks. 0 where a side is all equal.

    Example:
        >>> rank_correlation([1, 2, 3, 4], [10, 20, 40, 30])
        0.8
    """

    def ranks(values: Sequence[float]) -> list[float]:
        return [
            sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values
        ]

    try:
        return statistics.correlation(ranks(first), ranks(second))
    except statistics.StatisticsError:
        return 0.0
