"""Times in fixed buckets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.client.latency import BUCKETS, Latency

times = st.lists(st.floats(0, 100, allow_nan=False), min_size=1, max_size=50)


def made(seconds: list[float]) -> Latency:
    latency = Latency()
    for each in seconds:
        latency.add(each)
    return latency


def test_nothing_was_counted() -> None:
    assert Latency().quantile(50) is None
    assert Latency().buckets()[-1] == ("+Inf", 0.0)


@given(times)
def test_every_time_is_in_its_bucket(seconds: list[float]) -> None:
    latency = made(seconds)
    assert latency.count == len(seconds)
    assert latency.total == pytest.approx(sum(seconds))
    for text, count in latency.buckets():
        assert count == sum(each <= float(text) for each in seconds)


@given(times, st.sampled_from([50, 90, 99]))
def test_a_quantile_is_within_the_bucket_of_the_true_one(seconds: list[float], share: int) -> None:
    ordered = sorted(seconds)
    true = ordered[max(0, -(-len(ordered) * share // 100) - 1)]
    found = made(seconds).quantile(share)
    assert found is not None
    upper = next((bound for bound in BUCKETS if true <= bound), BUCKETS[-1])
    lower = max((bound for bound in (0.0, *BUCKETS) if bound < upper), default=0.0)
    assert lower <= found <= upper


def test_quantiles_rise() -> None:
    latency = made([0.004] * 98 + [0.2, 0.3])
    found = [latency.quantile(share) for share in (50, 98, 99, 100)]
    assert found == sorted(found, key=lambda each: each or 0)
    assert found[0] == pytest.approx(0.0025 + 0.0025 * 50 / 98)
    assert found[-1] == 0.5
