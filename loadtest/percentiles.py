"""Percentiles of durations, with confidence intervals. Knows nothing of requests or runs.

They come from HDR histograms of microseconds with three significant digits. A distribution contains its histogram, so
that the distributions of several runs can be merged.
"""

import math
from collections.abc import Iterable
from typing import Any

from hdrh.histogram import HdrHistogram

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
HIGHEST_US = 24 * 3600 * 1_000_000
DIGITS = 3
Distribution = dict[str, Any]


def histogram_of(seconds: Iterable[float]) -> HdrHistogram:
    histogram = HdrHistogram(1, HIGHEST_US, DIGITS)
    for value in seconds:
        add(histogram, value)
    return histogram


def add(histogram: HdrHistogram, seconds: float) -> None:
    histogram.record_value(min(HIGHEST_US, max(1, round(seconds * 1e6))))


def distribution(histogram: HdrHistogram) -> Distribution | None:
    """Mean, extremes and percentiles in seconds. A percentile beyond which there is no request is None."""
    if not histogram.total_count:
        return None
    count = histogram.total_count
    return {
        "count": count,
        "mean": histogram.get_mean_value() / 1e6,
        "min": histogram.get_min_value() / 1e6,
        "max": histogram.get_max_value() / 1e6,
        **{f"p{p:g}": histogram.get_value_at_percentile(p) / 1e6 if supported(count, p) else None for p in PERCENTILES},
        "between": {f"p{p:g}": between_95(histogram, p) for p in PERCENTILES if supported(count, p)},
        "hdr": histogram.encode().decode(),
    }


def between_95(histogram: HdrHistogram, percentile: float) -> tuple[float, float]:
    """The 95 % confidence interval of a percentile, from the binomial distribution of its rank.

    It assumes independent requests, which requests in a common queue are only approximately.
    """
    count, share = histogram.total_count, percentile / 100
    reach = 1.96 * math.sqrt(count * share * (1 - share))
    ranks = max(1.0, count * share - reach), min(float(count), count * share + reach + 1)
    low, high = (histogram.get_value_at_percentile(100 * rank / count) / 1e6 for rank in ranks)
    return low, high


def supported(count: int, percentile: float) -> bool:
    """Whether at least one request is beyond the percentile."""
    return count * (100 - percentile) >= 100 - 1e-6


def merged(distributions: Iterable[Distribution | None]) -> Distribution | None:
    """The distribution of all values of several distributions, of which empty ones are None."""
    whole = histogram_of([])
    for part in filter(None, distributions):
        whole.decode_and_add(part["hdr"].encode())
    return distribution(whole)
