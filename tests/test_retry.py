"""Room 8, Retry: policies and delays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_orchestrator import RetryPolicy, ValidationError

POLICIES = st.builds(
    RetryPolicy,
    max_attempts=st.integers(1, 20),
    strategy=st.sampled_from(["exponential", "linear", "constant"]),
    initial_delay=st.floats(0, 1e6),
    max_delay=st.floats(0, 1e6),
    backoff_multiplier=st.floats(1, 1000),
    jitter=st.one_of(st.booleans(), st.floats(0, 1)),
)


@given(POLICIES, st.integers(1, 100_000))
def test_a_delay_is_never_negative_and_never_longer_than_the_maximum(policy: RetryPolicy, failures: int) -> None:
    delay = policy.delay_seconds(failures)
    assert delay is not None
    assert 0 <= delay <= policy.max_delay_seconds


@given(POLICIES, st.integers(1, 50), st.floats(0, 1e5))
def test_retry_after_is_honoured_or_refused(policy: RetryPolicy, failures: int, wait: float) -> None:
    delay = policy.delay_seconds(failures, wait)
    assert (delay is None) == (wait > policy.max_delay_seconds)
    assert delay is None or delay >= wait


@pytest.mark.parametrize(
    ("strategy", "delays"),
    [("exponential", [0.5, 1, 2, 4]), ("linear", [0.5, 1, 1.5, 2]), ("constant", [0.5, 0.5, 0.5, 0.5])],
)
def test_the_strategies_grow_as_they_are_named(strategy: str, delays: list[float]) -> None:
    policy = RetryPolicy(strategy=strategy, jitter=False)
    assert [policy.delay_seconds(failures) for failures in (1, 2, 3, 4)] == delays


@pytest.mark.parametrize(("jitter", "low", "high"), [(True, 0, 1), (0.25, 0.75, 1), (False, 1, 1)])
def test_jitter_spreads_the_delay(jitter: float, low: float, high: float) -> None:
    policy = RetryPolicy(initial_delay="1s", max_delay="1s", jitter=jitter)
    delays = [policy.delay_seconds(1) or 0 for _ in range(300)]
    assert low <= min(delays) <= max(delays) <= high
    assert jitter is False or max(delays) - min(delays) > (high - low) / 2


@pytest.mark.parametrize(
    "document",
    [
        {"strategy": "linear", "initial_delay": 1000, "max_delay": "30s"},
        {"backoff": "linear", "initial_delay_ms": 1000, "max_delay_ms": 30_000},
        {"backoff": "linear", "initial_delay": "1s", "max_delay": "0.5m"},
    ],
)
def test_both_spellings_of_the_original_mean_the_same(document: dict[str, object]) -> None:
    policy = RetryPolicy.from_dict(document)
    assert (policy.strategy, policy.initial_delay_seconds, policy.max_delay_seconds) == ("linear", 1, 30)


@pytest.mark.parametrize(
    "document",
    [{"max_attempts": 0}, {"max_attempts": True}, {"jitter": 2}, {"initial_delay": "soon"}, {"tries": 3}, {"max_delay": -1}],
)
def test_wrong_values_are_refused(document: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RetryPolicy.from_dict(document)
