"""Whole runs against a server that fails at random: what issue 5 promises of attempts, waits, calls and cancelling."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from typing import Any

import pytest
from fault_server import RESET, STALL, FaultServer, Request, chunked, json_reply, reply
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_orchestrator import OpenAIProvider, Step, Workflow, WorkflowExecutor

ANSWER = {
    "id": "x", "model": "m", "choices": [{"message": {"role": "assistant", "content": "fine"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
}  # fmt: skip
FINE = json_reply(ANSWER)
# what the server does -> (the entry, whether it is worth another attempt)
FAULTS: dict[str, tuple[Any, bool]] = {
    "500": (json_reply({"error": {"message": "oops"}}, 500), True),
    "429": (json_reply({"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, 429, {"Retry-After": "0.02"}), True),
    "quota": (json_reply({"error": {"message": "no money", "code": "insufficient_quota"}}, 429), False),
    "400": (json_reply({"error": {"message": "bad"}}, 400), False),
    "401": (json_reply({"error": {"message": "who?"}}, 401), False),
    "reset": ([RESET], True),
    "cut body": ([FINE[:-20], RESET], True),
    "cut chunks": ([chunked(b'{"id": "x"', end=b"")], True),
    "stall": ([STALL], True),
    "html": (reply(b"<html>Bad gateway</html>", 502), True),
    "nonsense": (json_reply({"choices": []}), False),
}


def statuses(result: Any) -> set[str]:
    return {step.status for step in result.steps.values()}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([*FAULTS, "fine", "fine", "fine"]), max_size=20), st.integers(1, 6), st.integers(1, 4))
def test_whatever_the_server_does_each_step_ends_once_within_its_attempts(script: list[str], concurrency: int, most: int) -> None:
    entries = [FINE if name == "fine" else FAULTS[name][0] for name in script]
    events: list[dict[str, Any]] = []
    threads = threading.active_count()
    with FaultServer([*entries, FINE]) as server:
        provider = OpenAIProvider(api_key="sk-secret-0123456789", base_url=f"{server.url}/v1")
        retry = {"max_attempts": most, "initial_delay": 1, "max_delay": 50}
        steps = [
            Step(id=f"s{n}", type="llm", provider="openai", model="m", prompt="x", retry=retry, timeout_seconds=0.5,
                 depends_on=[f"s{n - 3}"] if n >= 3 else [], trigger_rule="all_done")
            for n in range(8)
        ]  # fmt: skip
        executor = WorkflowExecutor(
            Workflow("chaos", steps), providers={"openai": provider}, max_concurrency=concurrency, on_event=events.append
        )
        result = executor.run()
        executor.close()
        provider.close()
        sent = len(server.requests)
    ends = [event["step_id"] for event in events if event["type"] in ("step_completed", "step_failed", "step_skipped")]
    assert sorted(ends) == sorted(result.steps)
    assert statuses(result) <= {"completed", "failed"}
    assert all(step.attempts <= most for step in result.steps.values())
    assert sum(step.attempts for step in result.steps.values()) == result.usage["calls"]
    assert result.usage["calls"] <= sent <= result.usage["calls"] + script.count("reset")  # a lost kept connection, once
    assert "sk-secret" not in str(result.to_dict()) + str(events)
    final = {name for name in script if name != "fine" and not FAULTS[name][1]}
    if not final and most > len(script):
        assert statuses(result) == {"completed"}
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads


@settings(max_examples=10, deadline=None)
@given(st.floats(0, 0.15), st.integers(0, 2**31))
def test_no_call_starts_after_the_run_was_cancelled(moment: float, seed: int) -> None:
    chance, arrived = random.Random(seed), []  # type: ignore[var-annotated]

    def answer(request: Request) -> Any:
        arrived.append(time.monotonic())
        return [chance.choice([0.0, 0.01, 0.05]), FINE] if chance.random() < 0.8 else [STALL]

    with FaultServer([answer]) as server:
        provider = OpenAIProvider(api_key="k", base_url=f"{server.url}/v1")
        steps = [Step(id=f"s{n}", type="llm", provider="openai", model="m", prompt="x", retry={"initial_delay": 1}) for n in range(40)]
        executor = WorkflowExecutor(Workflow("c", steps), providers={"openai": provider}, max_concurrency=4)

        async def cancelled() -> float:
            task = asyncio.ensure_future(executor.execute())
            await asyncio.sleep(moment)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return time.monotonic()

        ended = asyncio.run(cancelled())
        time.sleep(0.05)
        provider.close()
    assert not [moment for moment in arrived if moment > ended + 0.02]
    assert executor.result is not None and executor.result.status == "cancelled"
    assert statuses(executor.result) <= {"completed", "cancelled"}


def test_waits_honour_retry_after() -> None:
    busy = json_reply({"error": {"message": "busy"}}, 503, {"Retry-After": "0.4"})
    times: list[float] = []

    def answer(request: Request) -> Any:
        times.append(time.monotonic())
        return busy if len(times) == 1 else FINE

    with FaultServer([answer]) as server:
        provider = OpenAIProvider(api_key="k", base_url=f"{server.url}/v1")
        step = Step(id="a", type="llm", provider="openai", model="m", prompt="x", retry={"initial_delay": 1})
        assert WorkflowExecutor(Workflow("r", [step]), providers={"openai": provider}).run().status == "completed"
        provider.close()
    assert times[1] - times[0] >= 0.4
