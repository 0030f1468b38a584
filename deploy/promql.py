"""Builders of PromQL, for the dashboards and the rules.

Every function sums over processes and pods before it does anything else: a quantile of quantiles or a mean of means
means nothing. `matchers` are label matchers as PromQL writes them, `by` a comma-separated list of labels.
"""

from __future__ import annotations


def selector(name: str, *matchers: str) -> str:
    """The series `name` that fit every matcher."""
    return f"{name}{{{', '.join(matchers)}}}" if matchers else name


def aggregate(operation: str, by: str, expr: str) -> str:
    """`operation` (sum, max, ...) over all labels but `by`; an empty `by` leaves none."""
    return f"{operation} by ({by}) ({expr})" if by else f"{operation}({expr})"


def rate(name: str, by: str, window: str, *matchers: str) -> str:
    """Growth per second of a counter."""
    return aggregate("sum", by, f"rate({selector(name, *matchers)}[{window}])")


def increase(name: str, by: str, window: str, *matchers: str) -> str:
    """Growth of a counter within the window."""
    return aggregate("sum", by, f"increase({selector(name, *matchers)}[{window}])")


def mean(name: str, by: str, window: str, *matchers: str) -> str:
    """Mean of what the histogram `name` observed within the window; nothing where it observed nothing."""
    return ratio(rate(f"{name}_sum", by, window, *matchers), rate(f"{name}_count", by, window, *matchers))


def quantile(q: float, name: str, by: str, window: str, *matchers: str) -> str:
    """Quantile of what the histogram `name` observed within the window; NaN where it observed nothing."""
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({q:g}, {rate(f'{name}_bucket', labels, window, *matchers)})"


def ratio(part: str, whole: str) -> str:
    """part / whole; nothing, rather than NaN, where the whole is 0."""
    return f"{part} / ({whole} > 0)"
