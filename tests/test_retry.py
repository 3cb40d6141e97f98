"""Room 8, Retry: policies, delays, limits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_orchestrator import RetryPolicy, ValidationError, _CircuitBreaker, _Places, _RateLimit, _retry_after_seconds

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
    [
        {"max_attempts": 0},
        {"max_attempts": True},
        {"max_attempts": 1.5},
        {"max_attempts": "3"},
        {"jitter": 2},
        {"jitter": float("nan")},
        {"jitter": "yes"},
        {"initial_delay": "soon"},
        {"tries": 3},
        {1: 3},
        {"max_delay": -1},
        {"max_delay": float("inf")},
        {"strategy": "random"},
        {"backoff_multiplier": 0},
        {"backoff": "linear", "strategy": "linear"},
        [],
        "3",
        None,
        3,
    ],
    ids=repr,
)
def test_wrong_values_are_refused(document: Any) -> None:
    with pytest.raises(ValidationError):
        RetryPolicy.from_dict(document)


def test_every_wrong_value_is_reported_with_its_key() -> None:
    with pytest.raises(ValidationError) as caught:
        RetryPolicy.from_dict({"max_atempts": 3, "jitter": 7, "backoff": "linear", "initial_delay_ms": "x"})
    assert [problem.path for problem in caught.value.problems] == [("max_atempts",), ("jitter",), ("initial_delay_ms",)]
    assert "did you mean 'max_attempts'?" in str(caught.value)
    with pytest.raises(ValidationError) as caught:
        RetryPolicy(max_attempts=0, jitter=None)  # type: ignore[arg-type]
    assert [problem.path for problem in caught.value.problems] == [("max_attempts",), ("jitter",)]


def test_null_means_the_default() -> None:
    assert repr(RetryPolicy.from_dict({"max_attempts": None, "jitter": None})) == repr(RetryPolicy())
    for document in ({"strategy": "linear", "backoff": None}, {"backoff": None, "strategy": "linear"}):
        assert RetryPolicy.from_dict(document).strategy == "linear", "null says nothing under either name"


@pytest.mark.parametrize("strategy", ["exponential", "linear", "constant"])
@pytest.mark.parametrize("initial", [0, 1, "24h", 86_400_000])
def test_no_number_of_failures_overflows(strategy: str, initial: Any) -> None:
    policy = RetryPolicy(1000, strategy, initial, "24h", 1000, jitter=False)
    delays = [policy.delay_seconds(failures) for failures in (1, 2, 100, 103, 104, 999, 10**9)]
    assert delays == sorted(delays)
    assert all(delay == 0 for delay in delays) if initial == 0 else delays[-1] is not None


def test_a_slow_growth_goes_on_as_long_as_attempts_do() -> None:
    policy = RetryPolicy(1000, initial_delay=1, max_delay="24h", backoff_multiplier=1.01, jitter=False)
    assert policy.delay_seconds(999) == pytest.approx(0.001 * 1.01**998)
    steep = RetryPolicy(1000, initial_delay=1, max_delay="24h", backoff_multiplier=1000, jitter=False)
    assert [steep.delay_seconds(failures) for failures in (1, 2, 3, 4)] == [0.001, 1, 1000, 86_400]


# ---- Retry-After


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": " 0 "}, 0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "007"}, 7),
        ({"retry-after": "99999999999"}, 99999999999),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "0.5"}, 0.0005),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9),
        ({"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}, 0),
        ({"retry-after": "Sunday, 06-Nov-94 08:49:37 GMT"}, 0),
        ({"retry-after": "Sun Nov  6 08:49:37 1994"}, 0),
        *(
            ({"retry-after": text}, None)
            for text in (
                "",
                "-1",
                "soon",
                "1e3",
                "inf",
                "nan",
                "5, 5",
                "\u0665",
                "Sun, 99 Foo 1994",
                "Sun, 06 Nov 99999 08:49:37 GMT",
                "1" * 400,
            )
        ),
    ],
    ids=repr,
)
def test_retry_after_is_read_in_each_of_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert _retry_after_seconds(headers) == (seconds if seconds is None else pytest.approx(seconds))


@given(st.integers(1, 10**6))
def test_a_date_is_as_far_off_as_it_says(offset: int) -> None:
    found = _retry_after_seconds({"retry-after": formatdate(time.time() + offset, usegmt=True)})
    assert found is not None
    assert offset - 60 <= found <= offset + 1


@given(st.text(max_size=40), st.text(max_size=40))
def test_whatever_a_server_sends_is_a_wait_or_none(first: str, second: str) -> None:
    found = _retry_after_seconds({"retry-after-ms": first, "retry-after": second})
    assert found is None or 0 <= found < float("inf")


# ---- Rate limits


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "requests_per_minute": st.integers(1, 2000) | st.floats(0.5, 100),
        "tokens_per_minute": st.integers(1, 10_000),
    },
)
CALLS = st.lists(st.tuples(st.integers(0, 500), st.floats(0, 20), st.none() | st.integers(0, 800)), max_size=80)


@settings(max_examples=60, deadline=None)
@given(LIMITS, CALLS)
def test_no_window_of_a_minute_sees_more_than_the_limit(
    limits: dict[str, float], calls: list[tuple[int, float, Any]]
) -> None:
    clock = Clock()
    limit = _RateLimit.from_dict(limits, clock)
    starts: list[tuple[float, int]] = []  # (start, tokens actually used)
    for tokens, later, actual in calls:
        clock.now += later
        start = clock.now + limit.reserve(tokens)
        assert start >= (starts[-1][0] if starts else 0), "starts keep the order of asking"
        if actual is not None and actual < tokens:
            limit.settle(tokens, actual)
        starts.append((start, tokens))
        if actual is not None and actual < tokens:
            starts[-1] = (start, actual)
    most_calls, most_tokens = limits.get("requests_per_minute", 1e9), limits.get("tokens_per_minute", 1e9)
    for index, (first, _) in enumerate(starts):
        inside = [tokens for start, tokens in starts[index:] if start < first + 60 - 1e-6]
        assert len(inside) <= max(1, most_calls)
        assert sum(inside) <= most_tokens or sum(map(bool, inside)) == 1


@pytest.mark.parametrize(
    ("limits", "tokens", "calls"),
    [
        ({"requests_per_minute": 60}, 0, 600),
        ({"tokens_per_minute": 6000}, 100, 600),
        ({"requests_per_minute": 6000}, 0, 60_000),
    ],
)
def test_a_limit_is_used_up_evenly(limits: dict[str, float], tokens: int, calls: int) -> None:
    limit = _RateLimit.from_dict(limits, Clock())
    waits = [limit.reserve(tokens) for _ in range(calls)]
    assert waits[-1] == pytest.approx(600, rel=0.02)
    gaps = [later - earlier for earlier, later in zip(waits, waits[1:])]
    assert max(gaps) <= 1.1


def test_at_most_one_second_s_worth_starts_at_once() -> None:
    limit = _RateLimit.from_dict({"requests_per_minute": 600}, Clock())
    assert sum(limit.reserve() < 0.01 for _ in range(100)) == 10
    slow = _RateLimit.from_dict({"requests_per_minute": 6}, Clock())
    assert [slow.reserve() for _ in range(4)] == [0, 10, 20, 30]


def test_a_long_idle_time_saves_nothing_up() -> None:
    clock = Clock()
    limit = _RateLimit.from_dict({"requests_per_minute": 60}, clock)
    limit.reserve()
    clock.now += 3600
    assert [limit.reserve() for _ in range(3)] == [0, 1, 2]


def test_a_call_larger_than_the_limit_goes_alone() -> None:
    limit = _RateLimit.from_dict({"tokens_per_minute": 100}, Clock())
    assert [limit.reserve(tokens) for tokens in (10, 500, 10)] == pytest.approx([0, 60, 360])


def test_settling_gives_tokens_back_or_takes_more() -> None:
    clock = Clock()
    limit = _RateLimit.from_dict({"tokens_per_minute": 6000}, clock)
    assert limit.reserve(3000) == 0
    limit.settle(3000, 100)
    assert limit.reserve(100) == pytest.approx(1)
    limit.settle(100, 3000)
    assert limit.reserve(100) == pytest.approx(31)


def test_nobody_starts_during_a_pause() -> None:
    clock = Clock()
    limit = _RateLimit.from_dict({"requests_per_minute": 60}, clock)
    limit.pause(30)
    limit.pause(10)
    assert limit.blocked_seconds() == 30
    assert [limit.reserve() for _ in range(2)] == [30, 31]
    clock.now += 31
    assert limit.blocked_seconds() == 0
    assert limit.reserve() == 1


def test_no_limits_let_everything_pass() -> None:
    limit = _RateLimit.from_dict({})
    assert {limit.reserve(10**9) for _ in range(1000)} == {0}
    assert not limit.booked


@pytest.mark.parametrize(
    ("document", "word"),
    [
        ({"request_per_minute": 1}, "did you mean 'requests_per_minute'?"),
        ({"requests_per_minute": 0}, "above 0"),
        ({"tokens_per_minute": "many"}, "above 0"),
        ({"max_concurrent": 1.5}, "whole number"),
        ({"max_concurrent": 0}, "whole number"),
        (7, "map"),
    ],
    ids=repr,
)
def test_wrong_limits_are_refused(document: Any, word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        _RateLimit.from_dict(document)


def run_in_loops(count: int, work: Callable[[], Any]) -> None:
    """The coroutine in an event loop of its own in each of so many threads."""
    failures: list[BaseException] = []

    def thread() -> None:
        try:
            asyncio.run(work())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=thread, daemon=True) for _ in range(count)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30)
        assert not each.is_alive(), "it hangs"
    assert not failures


def test_places_are_never_more_than_there_are_over_many_loops_and_none_is_lost() -> None:
    limit, lock = _RateLimit.from_dict({"max_concurrent": 3}), threading.Lock()
    inside, most, done = 0, 0, 0

    async def call() -> None:
        nonlocal inside, most, done
        await limit.start()
        try:
            with lock:
                inside += 1
                most = max(most, inside)
            await asyncio.sleep(0.001)
        finally:
            with lock:
                inside -= 1
                done += 1
            limit.leave()

    async def work() -> None:
        tasks = [asyncio.ensure_future(call()) for _ in range(60)]
        await asyncio.sleep(0.01)
        for task in tasks[::3]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run_in_loops(4, work)
    assert most == 3
    assert done >= 160
    assert limit.taken == 0
    assert not limit.waiting
    assert limit.gate.taken == 0


def test_places_are_given_in_the_order_of_asking() -> None:
    places, order = _Places(1), list[int]()

    async def one(number: int) -> None:
        await places.enter()
        order.append(number)
        await asyncio.sleep(0)
        places.leave()

    async def work() -> None:
        await asyncio.gather(*(one(number) for number in range(50)))

    asyncio.run(work())
    assert order == list(range(50))


def test_a_place_given_to_who_was_cancelled_at_that_moment_goes_on_to_the_next() -> None:
    async def work() -> None:
        places = _Places(1)
        await places.enter()
        first, second = asyncio.ensure_future(places.enter()), asyncio.ensure_future(places.enter())
        await asyncio.sleep(0)
        places.leave()
        first.cancel()
        await asyncio.wait_for(second, 5)
        places.leave()
        assert places.taken == 0

    asyncio.run(work())


def test_a_closed_event_loop_does_not_keep_a_place() -> None:
    places, loop = _Places(1), asyncio.new_event_loop()
    loop.run_until_complete(places.enter())
    waiting = loop.create_task(places.enter())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    places.leave()
    assert places.taken == 0
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]
    waiting.get_coro().close()


def test_a_pause_holds_those_who_wait_already_and_they_do_not_start_all_at_once() -> None:
    async def work() -> list[float]:
        limit = _RateLimit.from_dict({"requests_per_minute": 120})
        started = time.monotonic()
        moments: list[float] = []

        async def call() -> None:
            await limit.start()
            moments.append(time.monotonic() - started)
            limit.leave()

        tasks = [asyncio.ensure_future(call()) for _ in range(5)]
        await asyncio.sleep(0.05)
        limit.pause(0.7)
        await asyncio.gather(*tasks)
        return moments

    moments = asyncio.run(work())
    assert len([moment for moment in moments if moment < 0.4]) == 2
    assert moments[2] >= 0.7
    assert moments[4] >= 1.4


def test_a_cancelled_wait_gives_its_tokens_and_its_place_back() -> None:
    async def work() -> None:
        limit = _RateLimit.from_dict({"tokens_per_minute": 60, "max_concurrent": 1})
        await limit.start(60)
        limit.leave()
        waiting = asyncio.ensure_future(limit.start(60))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (limit.taken, limit.gate.taken, limit.used - 60) == (0, 0, 0) or limit.used == 0

    asyncio.run(work())


# ---- Circuit breaker


def breaker(clock: Clock, **document: Any) -> tuple[_CircuitBreaker, list[tuple[str, str]]]:
    changes: list[tuple[str, str]] = []
    made = _CircuitBreaker.from_dict(document, clock)
    made.on_change = lambda old, new: changes.append((old, new))
    return made, changes


def call(breaker: _CircuitBreaker, ok: bool | None) -> bool:
    permit = breaker.allow()
    if permit:
        breaker.record(ok, permit)
    return bool(permit)


def test_a_breaker_opens_at_its_failure_rate_and_half_opens_after_its_time() -> None:
    clock = Clock()
    made, changes = breaker(clock)
    assert [call(made, number % 2 == 0) for number in range(9)] == [True] * 9
    assert made.state == "closed"
    assert call(made, False)
    assert (made.state, made.allow(), made.retry_after_seconds) == ("open", False, 30)
    clock.now += 29
    assert (made.allow(), made.retry_after_seconds) == (False, 1)
    clock.now += 1
    assert [bool(made.allow()), bool(made.allow()), made.state] == [True, False, "half_open"], "one probe at a time"
    made.record(True)
    assert (made.state, bool(made.allow()), made.retry_after_seconds) == ("closed", True, 0)
    assert changes == [("closed", "open"), ("open", "half_open"), ("half_open", "closed")]


def test_a_failed_probe_opens_it_again_and_a_cancelled_one_lets_the_next_pass() -> None:
    clock = Clock()
    made, changes = breaker(clock, window=2, min_calls=1, open_seconds="10s")
    call(made, False)
    clock.now += 10
    assert [bool(made.allow()) for _ in range(2)] == [True, False]
    made.record(None)
    assert [made.state, bool(made.allow()), bool(made.allow())] == ["half_open", True, False]
    made.record(False)
    assert (made.state, made.retry_after_seconds) == ("open", 10)
    clock.now += 10
    assert call(made, True)
    assert made.state == "closed"
    assert len(changes) == 5


def test_only_the_latest_calls_count_and_cancelled_ones_do_not() -> None:
    made, _ = breaker(Clock(), window=4, min_calls=4, failure_rate=0.5)
    for ok in (False, True, True, True, True, None, None, None, False, True):
        call(made, ok)
    assert made.state == "closed"
    call(made, False)
    assert made.state == "open"


def test_what_ends_late_does_not_prolong_an_open_breaker() -> None:
    clock = Clock()
    made, _ = breaker(clock, window=1)
    assert made.allow() and made.allow()
    made.record(False)
    clock.now += 20
    made.record(False)
    made.record(True)
    assert (made.state, made.retry_after_seconds) == ("open", 10)


def test_what_began_before_the_last_change_of_state_tells_nothing_about_the_probe() -> None:
    clock = Clock()
    made, _ = breaker(clock, window=1)
    early = [made.allow() for _ in range(3)]
    made.record(False, early[0])
    clock.now += 30
    probe = made.allow()
    for ok in (True, None):
        made.record(ok, early[1])
        assert (made.state, made.allow()) == ("half_open", 0)
    made.record(True, probe)
    made.record(False, early[2])
    assert made.state == "closed"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([True, False, None]), st.floats(0, 20)), max_size=60), st.integers(1, 6))
def test_a_breaker_lets_calls_pass_only_when_closed_or_as_a_probe(calls: list[tuple[Any, float]], window: int) -> None:
    clock = Clock()
    made, changes = breaker(clock, window=window, min_calls=1, open_seconds=15)
    opened = -1e9
    for ok, later in calls:
        clock.now += later
        allowed = bool(made.allow())
        assert allowed == (made.state != "open")
        assert allowed or clock.now - opened < 15
        if allowed:
            before = made.state
            made.record(ok)
            if made.state == "open" and before != "open":
                opened = clock.now
    for (_, new), (old, _) in zip(changes, changes[1:]):
        assert new == old


@pytest.mark.slow
def test_many_threads_get_one_probe() -> None:
    clock = Clock()
    made, _ = breaker(clock, window=1)
    call(made, False)
    clock.now += 30
    allowed: list[bool] = []
    threads = [threading.Thread(target=lambda: allowed.append(bool(made.allow()))) for _ in range(16)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sum(allowed) == 1


@pytest.mark.parametrize(
    "document",
    [
        {"failure_rate": 0},
        {"failure_rate": 1.5},
        {"window": 0},
        {"min_calls": 0},
        {"open_seconds": -1},
        {"open_second": 1},
        [],
    ],
    ids=repr,
)
def test_a_wrong_breaker_is_refused(document: Any) -> None:
    with pytest.raises(ValidationError):
        _CircuitBreaker.from_dict(document)
