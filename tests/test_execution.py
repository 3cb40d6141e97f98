"""Room 13, Execution: the promises of the SPEC's section 5, each with real threads and a real clock."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import threading
import time
import tracemalloc
import weakref
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_orchestrator import (
    AuthenticationError,
    CompletionRequest,
    CompletionResponse,
    ExecutionError,
    OpenAIProvider,
    ProviderError,
    RateLimitError,
    RunResult,
    RunTimeoutError,
    Step,
    ValidationError,
    Workflow,
    WorkflowExecutor,
)


class Scripted:
    """A provider that answers with its prompt, after a delay, or raises what its script says."""

    def __init__(self, delay: float = 0.0, script: list[Exception | str] | None = None) -> None:
        self.delay, self.script = delay, list(script or [])
        self.lock = threading.Lock()
        self.calls = self.active = self.most_active = 0
        self.times: list[float] = []
        self.prompts: list[str] = []

    def complete(self, request: CompletionRequest) -> CompletionResponse:
        with self.lock:
            self.calls += 1
            self.times.append(time.monotonic())
            self.prompts.append(request.prompt)
            self.active += 1
            self.most_active = max(self.most_active, self.active)
            answer = self.script.pop(0) if self.script else None
        time.sleep(self.delay)
        with self.lock:
            self.active -= 1
        if isinstance(answer, Exception):
            raise answer
        return CompletionResponse(text=answer or request.prompt, model=request.model, input_tokens=3, output_tokens=2)


def llm(step_id: str, prompt: str = "hi", **keys: Any) -> Step:
    return Step(id=step_id, type="llm", provider="p", model="m", prompt=prompt, **keys)


def value(step_id: str, template: str = "x", **keys: Any) -> Step:
    return Step(id=step_id, type="transform", function="template", template=template, **keys)


def failing(step_id: str, **keys: Any) -> Step:
    return Step(id=step_id, type="action", action="fail", message="boom", **keys)


def run(*steps: Step, inputs: Any = None, provider: Any = None, concurrency: int | None = None, **keys: Any) -> RunResult:
    names = ("actions", "transforms", "on_event", "offline", "output_folder")
    options = {name: keys.pop(name) for name in names if name in keys}
    providers = provider if isinstance(provider, dict) else {"p": provider or Scripted()}
    return WorkflowExecutor(Workflow("t", steps, **keys), inputs, providers, max_concurrency=concurrency, **options).run()


def statuses(result: RunResult) -> dict[str, str]:
    return {step_id: step.reason or step.status for step_id, step in result.items()}


# results


def test_outputs_flow_from_step_to_step_and_to_the_run() -> None:
    result = run(
        llm("a", "Hello {{inputs.name}}", output=["text", "model", "tokens"]),
        llm("b", "<<steps.a.text>>, <<steps.a.tokens>> tokens of <<outputs.a.model>>", output="text"),
        inputs={"name": "Ann"}, outputs={"last": "{{steps.b}}", "tokens": "{{steps.a.tokens}}"},
    )  # fmt: skip
    assert result.outputs == {"last": "Hello Ann, 5 tokens of m", "tokens": 5}
    assert result.usage == {"input_tokens": 6, "output_tokens": 4, "total_tokens": 10, "calls": 2}
    assert result.status == "completed"
    result.raise_for_status()


def test_the_result_is_json_of_the_documented_shape() -> None:
    result = run(llm("a", output="text"), failing("b", depends_on="a"), value("c", depends_on="b")).to_dict()
    assert set(result) == {"run_id", "workflow", "status", "duration_ms", "outputs", "usage", "error", "steps"}
    assert result["status"] == "failed"
    assert result["error"]["message"] == "b: boom" or result["error"]["message"] == "boom"
    assert result["steps"]["a"]["usage"]["total_tokens"] == 5
    assert result["steps"]["a"]["provider"] == "p"
    assert result["steps"]["b"]["error"] == {"type": "ExecutionError", "message": "boom", "retryable": False}
    assert result["steps"]["c"]["reason"] == "upstream_failed"
    assert result["steps"]["c"]["outputs"] == {"output": None}


def test_results_are_in_workflow_order_whatever_finished_first() -> None:
    def slow(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    steps = [Step(id=f"s{n}", type="action", action="slow", seconds=0.1 - n / 50) for n in range(5)]
    assert list(run(*steps, actions={"slow": slow}, concurrency=5)) == [f"s{n}" for n in range(5)]


def test_a_failed_step_never_loses_another_steps_result() -> None:
    result = run(llm("a", output="text"), failing("b"), llm("c", "{{steps.a}}", output="text"))
    assert statuses(result) == {"a": "completed", "b": "failed", "c": "completed"}
    with pytest.raises(ExecutionError) as caught:
        result.raise_for_status()
    assert caught.value.step_id == "b"


# when a step runs


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([failing("a"), value("b", depends_on="a")], {"b": "upstream_failed"}),
        ([value("a", condition="false"), value("b", depends_on="a")], {"a": "condition", "b": "upstream_skipped"}),
        ([value("a", condition="false"), value("b"), value("c", depends_on=["a", "b"])], {"c": "completed"}),
        ([failing("a", continue_on_error=True), value("b", depends_on="a")], {"a": "failed", "b": "completed"}),
        ([failing("a"), value("b", depends_on="a", trigger_rule="all_done")], {"b": "completed"}),
        ([failing("a"), value("b", depends_on="a", trigger_rule="one_failed")], {"b": "completed"}),
        ([value("a"), value("b", depends_on="a", trigger_rule="one_failed")], {"b": "trigger_rule"}),
        ([failing("a"), value("b"), value("c", depends_on=["a", "b"], trigger_rule="one_success")], {"c": "completed"}),
        (
            [value("a", condition="false"), value("b"), value("c", depends_on=["a", "b"], trigger_rule="all_success")],
            {"c": "upstream_skipped"},
        ),
    ],
)
def test_the_state_of_the_dependencies_decides(steps: list[Step], expected: dict[str, str]) -> None:
    found = statuses(run(*steps))
    assert {step_id: found[step_id] for step_id in expected} == expected


def test_continue_on_error_keeps_the_error_and_lets_the_run_succeed() -> None:
    result = run(failing("a", continue_on_error=True, output="x"), value("b", "[{{steps.a.x}}] {{steps.a.error}}"))
    assert result.status == "completed"
    assert result["a"].outputs == {"x": None}
    assert result["b"].outputs == {"output": "[] boom"}


def test_fail_fast_cancels_everything_else() -> None:
    provider = Scripted(delay=0.5)
    started = time.monotonic()
    result = run(failing("a"), llm("b"), llm("c", "{{steps.b}}"), provider=provider, fail_fast=True)
    assert statuses(result) == {"a": "failed", "b": "cancelled", "c": "cancelled"}
    assert time.monotonic() - started < 5
    assert result.status == "failed"


def test_a_missing_value_fails_the_step_and_names_the_path() -> None:
    result = run(value("a", "{{inputs.user.nam}}", condition="true"), inputs={"user": {"name": "x"}})
    assert result["a"].error is not None
    assert result["a"].error["type"] == "TemplateError"
    assert "inputs.user.nam" in result["a"].error["message"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["ok", "fail", "tolerated", "false"]), st.sets(st.integers(0, 11), max_size=4)),
        min_size=1, max_size=12,
    ),
    st.integers(1, 5),
)  # fmt: skip
def test_every_state_is_what_the_rules_say_whatever_the_concurrency(graph: list[Any], concurrency: int) -> None:
    steps, expected = [], {}
    for index, (kind, depends) in enumerate(graph):
        upstream = sorted(other for other in depends if other < index)
        keys: dict[str, Any] = {"depends_on": [f"s{other}" for other in upstream]}
        if kind == "false":
            keys["condition"] = "1 == 2"
        if kind == "tolerated":
            keys["continue_on_error"] = True
        steps.append(failing(f"s{index}", **keys) if kind in ("fail", "tolerated") else value(f"s{index}", **keys))
        before = [expected[f"s{other}"] for other in upstream]
        if "failed" in before:
            state = "upstream_failed"
        elif before and all(state not in ("completed", "tolerated") for state in before):
            state = "upstream_skipped"
        else:
            state = {"ok": "completed", "fail": "failed", "tolerated": "tolerated", "false": "condition"}[kind]
        expected[f"s{index}"] = state
    found = statuses(run(*steps, concurrency=concurrency))
    assert found == {step_id: "failed" if state == "tolerated" else state for step_id, state in expected.items()}


# concurrency


def test_256_slow_calls_at_concurrency_256_take_the_time_of_one() -> None:
    provider = Scripted(delay=1.0)
    started = time.monotonic()
    result = run(*(llm(f"s{n}") for n in range(256)), provider=provider, concurrency=256)
    assert time.monotonic() - started < 10  # one after the other they take 256 s
    assert provider.most_active > 200
    assert result.status == "completed"


def test_all_slots_are_busy_and_never_more() -> None:
    provider = Scripted(delay=0.02)
    run(*(llm(f"s{n}") for n in range(64)), provider=provider, concurrency=8)
    assert provider.most_active == 8


def action(step_id: str, name: str, **settings: Any) -> Step:
    return Step(id=step_id, type="action", action=name, **settings)


def test_blocking_and_asynchronous_calls_have_their_slots_in_the_order_of_asking() -> None:
    began: list[int] = []

    def blocking(number: int) -> None:
        began.append(number)
        time.sleep(0.001)

    async def asynchronous(number: int) -> None:
        began.append(number)
        await asyncio.sleep(0.001)

    names = ["blocking", "blocking", "asynchronous", "asynchronous", "blocking", "asynchronous"] * 8
    actions = {"blocking": blocking, "asynchronous": asynchronous}
    steps = [action(f"s{number}", name, number=number) for number, name in enumerate(names)]
    assert run(*steps, actions=actions, concurrency=1).status == "completed"
    assert began == list(range(48))


def test_the_slot_of_a_blocking_call_whose_time_is_up_goes_to_the_next_in_line() -> None:
    release, ends = threading.Event(), []

    def blocking(seconds: float) -> str:
        release.wait(seconds)
        ends.append(seconds)
        return "done"

    steps = [action("stuck", "blocking", seconds=60, timeout_seconds=0.1), *(action(f"s{n}", "blocking", seconds=0) for n in range(9))]
    result = run(*steps, actions={"blocking": blocking}, concurrency=1)
    assert (result["stuck"].status, ends) == ("failed", [0] * 9)
    assert {result[f"s{n}"].status for n in range(9)} == {"completed"}
    release.set()


def test_there_are_never_more_threads_than_slots() -> None:
    threads: set[int] = set()

    def blocking() -> None:
        threads.add(threading.get_ident())
        time.sleep(0.002)

    steps = [action(f"s{n}", "blocking", **({"depends_on": [f"s{n - 5}"]} if n % 3 == 2 and n > 4 else {})) for n in range(120)]
    assert run(*steps, actions={"blocking": blocking}, concurrency=4).status == "completed"
    assert len(threads) <= 4


def layered(count: int) -> WorkflowExecutor:
    steps = [value(f"s{n}", depends_on=[f"s{n - 100}"] if n >= 100 else []) for n in range(count)]
    return WorkflowExecutor(Workflow("t", steps))


def test_the_work_for_a_step_does_not_grow_with_their_number() -> None:
    def calls_per_step(count: int) -> float:
        executor, calls = layered(count), 0

        def count_calls(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        executor.run()
        sys.setprofile(count_calls)
        try:
            executor.run()
        finally:
            sys.setprofile(None)
        return calls / count

    assert calls_per_step(5000) < 1.2 * calls_per_step(500)


def test_a_finished_step_keeps_no_more_memory_in_a_long_run_than_in_a_short_one() -> None:
    def bytes_per_step(count: int) -> float:
        executor = layered(count)
        executor.run()
        executor.result = None
        gc.collect()
        tracemalloc.start()
        try:
            result = executor.run()
            executor.result = None
            gc.collect()
            return tracemalloc.get_traced_memory()[0] / len(result.steps)
        finally:
            tracemalloc.stop()

    assert bytes_per_step(5000) < 1.3 * bytes_per_step(500) < 2000


@pytest.mark.parametrize("concurrency", [1, 2])
def test_cancelling_starts_none_of_the_calls_that_wait_for_a_slot(concurrency: int) -> None:
    began: list[int] = []

    def blocking(number: int) -> None:
        began.append(number)
        time.sleep(0.3)

    steps = [action(f"s{n}", "blocking", number=n) for n in range(20)]
    executor = WorkflowExecutor(Workflow("t", steps), {}, actions={"blocking": blocking}, max_concurrency=concurrency)
    threading.Timer(0.1, executor.cancel).start()
    assert executor.run().status == "cancelled"
    time.sleep(0.4)
    assert began == list(range(concurrency))


def test_calls_that_wait_for_a_slot_end_when_no_thread_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    async def asynchronous() -> None:
        await asyncio.sleep(0.02)

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    steps = [action("first", "asynchronous"), *(action(f"s{n}", "blocking") for n in range(3))]
    result = run(*steps, actions={"asynchronous": asynchronous, "blocking": lambda: None}, concurrency=1)
    assert [result[step.id].status for step in steps] == ["completed", "failed", "failed", "failed"]


def test_events_keep_their_order_and_the_context_of_the_caller_when_a_thread_goes_from_call_to_call() -> None:
    request_id = contextvars.ContextVar("request_id", default="lost")
    request_id.set("r1")
    seen: list[tuple[str, str]] = []

    def answer(request: CompletionRequest) -> str:
        assert request.on_text is not None
        request.on_text("a piece")
        return "an answer"

    def listen(event: dict[str, Any]) -> None:
        if event.get("step_id") and event["type"] != "step_pending":
            seen.append((event["type"], event["step_id"]))
            assert event["type"] == "text" or request_id.get() == "r1"

    steps = [llm(f"s{n}", stream=True) for n in range(6)]
    WorkflowExecutor(Workflow("t", steps), {}, {"p": answer}, max_concurrency=1, on_event=listen).run()
    kinds = ("step_running", "provider_call", "text", "step_completed")
    assert seen == [(kind, step.id) for step in steps for kind in kinds]


def test_a_call_that_began_is_counted_also_if_the_run_ends_before_the_loop_hears_of_it() -> None:
    calls: list[int] = []

    def answer(request: CompletionRequest) -> str:
        calls.append(1)
        time.sleep(0.03)
        return "x"

    async def busy() -> None:
        await asyncio.sleep(0.01)
        time.sleep(0.06)  # the loop sleeps while a thread goes on to the second call
        raise RuntimeError("x")

    workflow = Workflow("t", [action("busy", "busy"), llm("a"), llm("b")], fail_fast=True)
    result = WorkflowExecutor(workflow, {}, {"p": answer}, actions={"busy": busy}, max_concurrency=2).run()
    assert result.status == "failed"
    assert result.usage["calls"] == len(calls) == 2


def test_a_thread_that_waits_for_work_keeps_nothing_of_the_last_call_alive() -> None:
    class Answer(str):
        """A text that can be watched."""

    alive: list[Any] = []

    def answer(request: CompletionRequest) -> str:
        text = Answer("x")
        alive.extend((weakref.ref(text), weakref.ref(request)))
        return text

    async def look() -> int:
        await asyncio.sleep(0.1)
        gc.collect()
        return sum(reference() is not None for reference in alive)

    result = run(llm("a"), action("look", "look", depends_on=["a"]), provider=answer, actions={"look": look}, concurrency=1)
    assert len(alive) == 2
    assert result["look"].outputs["output"] <= 1  # the text is the step's result


def test_a_system_without_threads_to_spare_slows_a_run_down_and_does_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    start, left = threading.Thread.start, [3]

    def scarce(thread: threading.Thread) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", scarce)
    provider = Scripted(delay=0.01)
    result = run(*(llm(f"s{n}") for n in range(40)), llm("last", depends_on=["s39"]), provider=provider, concurrency=16)
    assert (result.status, provider.calls, provider.most_active) == ("completed", 41, 3)
    left[0] = 0
    result = run(llm("a"), value("b"))
    assert (result["a"].status, result["b"].status) == ("failed", "completed")
    assert "can't start new thread" in result["a"].error["message"]


def test_what_a_blocking_function_gives_to_await_is_awaited_in_its_slot() -> None:
    active, most = 0, 0

    async def later() -> str:
        nonlocal active, most
        active += 1
        most = max(most, active)
        await asyncio.sleep(0.01)
        active -= 1
        return "later"

    result = run(*(action(f"s{n}", "wrapped") for n in range(12)), actions={"wrapped": lambda: later()}, concurrency=3)
    assert most == 3
    assert {result[f"s{n}"].outputs["output"] for n in range(12)} == {"later"}


def test_a_call_in_line_is_said_to_run_when_it_has_its_slot() -> None:
    events: list[Any] = []
    run(*(llm(f"s{n}") for n in range(6)), provider=Scripted(delay=0.05), concurrency=2, on_event=events.append)
    running, waits = {}, []
    for event in events:
        if event["type"] == "step_running":
            running[event["step_id"]] = event["time"]
            assert len(running) <= 2
        elif event["type"] == "step_completed":
            waits.append(event["time"] - running.pop(event["step_id"]))
            assert event["duration_ms"] < 5000
    assert len(waits) == 6
    assert min(waits) > 0.02


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited", "ignore::pytest.PytestUnraisableExceptionWarning")
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["blocking", "asynchronous", "both"]), st.sampled_from([0, 0, 0.001, 0.004]), st.booleans()),
             min_size=1, max_size=16),
    st.integers(1, 4), st.floats(0, 0.02) | st.none(),
)  # fmt: skip
def test_events_never_show_more_steps_running_than_there_are_slots(
    steps: list[tuple[str, float, bool]], concurrency: int, moment: float | None
) -> None:
    def blocking(seconds: float, fails: bool) -> None:
        time.sleep(seconds)
        assert not fails

    async def asynchronous(seconds: float, fails: bool) -> None:
        await asyncio.sleep(seconds)
        assert not fails

    actions = {"blocking": blocking, "asynchronous": asynchronous, "both": lambda seconds, fails: asynchronous(seconds, fails)}
    events: list[Any] = []
    nodes = [action(f"s{n}", name, seconds=seconds, fails=fails) for n, (name, seconds, fails) in enumerate(steps)]
    executor = WorkflowExecutor(Workflow("t", nodes), {}, actions=actions, max_concurrency=concurrency, on_event=events.append)

    async def perhaps_cancelled() -> None:
        task = asyncio.ensure_future(executor.execute())
        await asyncio.wait([task], timeout=moment)
        task.cancel()
        await asyncio.wait([task], timeout=10)
        assert task.done()

    asyncio.run(perhaps_cancelled())
    running: set[str] = set()
    for event in events:
        if event["type"] == "step_running":
            running.add(event["step_id"])
            assert len(running) <= concurrency
        elif event["type"] in ("step_completed", "step_failed", "step_cancelled"):
            running.discard(event["step_id"])
    assert not running


def test_a_step_starts_when_its_own_dependencies_end_not_when_a_level_does() -> None:
    ends: dict[str, float] = {}

    def work(name: str, seconds: float) -> None:
        time.sleep(seconds)
        ends[name] = time.monotonic()

    def step(name: str, seconds: float, *depends_on: str) -> Step:
        return Step(id=name, type="action", action="work", name=name, seconds=seconds, depends_on=list(depends_on))

    run(step("slow", 1.0), step("quick", 0.01), step("after", 0.01, "quick"), actions={"work": work})
    assert ends["after"] < ends["slow"]


def test_a_step_that_waits_to_retry_holds_no_slot() -> None:
    provider = Scripted(script=[ProviderError("down", provider="p", status=503, retryable=True, retry_after=0.5)])
    started = time.monotonic()
    result = run(
        llm("a", retry={"max_attempts": 2}), llm("b"), llm("c"), provider=provider, concurrency=1, on_event=lambda event: None
    )
    assert result.status == "completed"
    assert provider.calls == 4
    assert provider.times[2] - started < 0.4  # b and c went ahead while a was waiting
    assert provider.times[3] - provider.times[0] >= 0.5


@pytest.mark.parametrize("asynchronous", [False, True])
def test_providers_may_be_plain_functions(asynchronous: bool) -> None:
    async def later(request: CompletionRequest) -> str:
        await asyncio.sleep(0)
        return request.prompt.upper()

    provider = later if asynchronous else lambda request: request.prompt.upper()
    assert run(llm("a", "hi"), provider=provider)["a"].outputs == {"output": "HI"}


# retries


def test_attempts_are_counted_and_bounded() -> None:
    errors: list[Exception | str] = [ProviderError("down", provider="p", status=503, retryable=True) for _ in range(9)]
    provider = Scripted(script=errors)
    result = run(llm("a", retry={"max_attempts": 4, "initial_delay": 1}), provider=provider)
    assert (provider.calls, result["a"].attempts, result["a"].status) == (4, 4, "failed")
    assert result["a"].error == {"type": "ProviderError", "message": str(errors[0]), "status": 503, "retryable": True}


def test_an_error_that_is_final_is_not_retried() -> None:
    provider = Scripted(script=[ProviderError("bad request", provider="p", status=400, retryable=False)])
    assert run(llm("a"), provider=provider)["a"].attempts == 1


def test_a_retry_after_longer_than_max_delay_fails_at_once_and_says_how_long() -> None:
    provider = Scripted(script=[RateLimitError("slow down", provider="p", status=429, retryable=True, retry_after=90)])
    result = run(llm("a"), provider=provider)
    assert result["a"].attempts == 1
    assert result["a"].error is not None
    assert "90" in result["a"].error["message"]


# deadlines and cancelling


def test_a_deadline_ends_an_attempt_and_is_retried() -> None:
    provider = Scripted(delay=30)
    started = time.monotonic()
    result = run(llm("a", timeout_seconds=0.1, retry={"max_attempts": 2, "initial_delay": 1}), provider=provider)
    assert time.monotonic() - started < 5
    assert result["a"].attempts == 2
    assert result["a"].error is not None
    assert result["a"].error["type"] == "ProviderTimeoutError"


def test_the_whole_run_has_a_deadline_and_keeps_what_was_done() -> None:
    result = run(value("a"), llm("b", depends_on="a"), llm("c", depends_on="b"), provider=Scripted(delay=30), timeout_seconds=0.2)
    assert result.status == "timed_out"
    assert statuses(result) == {"a": "completed", "b": "cancelled", "c": "cancelled"}
    with pytest.raises(RunTimeoutError):
        result.raise_for_status()


def test_cancelling_the_task_keeps_the_partial_result() -> None:
    executor = WorkflowExecutor(Workflow("t", [value("a"), llm("b", "{{steps.a}}")]), {}, {"p": Scripted(delay=30)})

    async def cancelled() -> None:
        task = asyncio.ensure_future(executor.execute())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    started = time.monotonic()
    asyncio.run(cancelled())
    assert time.monotonic() - started < 3
    assert executor.result is not None
    assert executor.result.status == "cancelled"
    assert statuses(executor.result) == {"a": "completed", "b": "cancelled"}


def test_cancel_from_another_thread_ends_the_run() -> None:
    executor = WorkflowExecutor(Workflow("t", [llm("a")]), {}, {"p": Scripted(delay=30)})
    threading.Timer(0.2, executor.cancel).start()
    started = time.monotonic()
    assert executor.run().status == "cancelled"
    assert time.monotonic() - started < 3


@settings(max_examples=15, deadline=None)
@given(st.floats(0, 0.05), st.integers(1, 8))
def test_cancelling_at_any_moment_leaves_nothing_unfinished(moment: float, concurrency: int) -> None:
    provider = Scripted(delay=0.01)
    steps = [llm(f"s{n}", f"{{{{steps.s{n - 1}}}}}" if n % 3 else "x") for n in range(12)]
    executor = WorkflowExecutor(Workflow("t", steps), {}, {"p": provider}, max_concurrency=concurrency)

    async def cancelled() -> int:
        task = asyncio.ensure_future(executor.execute())
        await asyncio.sleep(moment)
        task.cancel()
        await asyncio.wait([task])
        return provider.calls

    calls = asyncio.run(cancelled())
    time.sleep(0.03)
    assert provider.calls == calls  # no call starts after cancellation
    assert executor.result is not None
    final = {"completed", "cancelled"}
    assert not executor.result.steps or {step.status for _, step in executor.result.items()} <= final


# where it runs


def test_run_works_inside_a_running_loop() -> None:
    async def notebook() -> RunResult:
        return run(llm("a", "hi"))

    assert asyncio.run(notebook())["a"].outputs == {"output": "hi"}


def test_many_executors_share_one_loop() -> None:
    async def many() -> list[RunResult]:
        executors = [WorkflowExecutor(Workflow("t", [llm("a", f"n{n}")]), {}, {"p": Scripted(0.05)}) for n in range(20)]
        return list(await asyncio.gather(*(executor.execute() for executor in executors)))

    started = time.monotonic()
    assert [result["a"].outputs["output"] for result in asyncio.run(many())] == [f"n{n}" for n in range(20)]
    assert time.monotonic() - started < 1


def test_an_executor_may_be_run_again() -> None:
    executor = WorkflowExecutor(Workflow("t", [llm("a")]), {}, {"p": Scripted()})
    assert executor.run().run_id != executor.run().run_id


def test_no_thread_is_left_behind() -> None:
    before = set(threading.enumerate())
    run(*(llm(f"s{n}") for n in range(20)), concurrency=20)
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


# before the first step


def test_missing_inputs_are_refused_before_the_first_step() -> None:
    provider = Scripted()
    with pytest.raises(ValidationError, match="'name' is missing"):
        run(llm("a"), llm("b", "{{steps.a}} {{inputs.name}}"), provider=provider)
    assert provider.calls == 0


@pytest.mark.parametrize(
    ("inputs", "message"),
    [({}, "'n' is missing"), ({"n": "x"}, "must be an integer"), ({"n": 1, "m": 2}, "unknown input 'm'"), ({"n": 9}, "one of")],
)
def test_declared_inputs_are_checked(inputs: dict[str, Any], message: str) -> None:
    workflow = Workflow("t", [value("a")], inputs={"n": {"type": "integer", "required": True, "enum": [1, 2]}})
    with pytest.raises(ValidationError, match=message):
        WorkflowExecutor(workflow, inputs)


def test_a_missing_key_is_an_error_before_the_first_step_naming_the_variable() -> None:
    provider = Scripted()
    steps = [llm("a"), Step(id="b", type="llm", provider="openai", model="m", prompt="x", depends_on="a")]
    with pytest.raises(AuthenticationError, match="OPENAI_API_KEY"):
        run(*steps, provider=provider)
    assert provider.calls == 0


def test_an_unknown_provider_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ValidationError, match="did you mean 'openai'"):
        run(Step(id="b", type="llm", provider="opnai", model="m", prompt="x"))


def test_an_unregistered_action_is_an_error_before_the_first_step() -> None:
    with pytest.raises(ValidationError, match="publish"):
        run(Step(id="b", type="action", action="publish"))


# events


def test_events_tell_the_story_of_a_run() -> None:
    events: list[dict[str, Any]] = []
    provider = Scripted(script=[ProviderError("down", provider="p", status=503, retryable=True)])
    run(llm("a", retry={"max_attempts": 2, "initial_delay": 1}), value("b", condition="false"), provider=provider, on_event=events.append)
    kinds = [event["type"] for event in events]
    assert kinds[0] == "run_started"
    assert kinds[-1] == "run_finished"
    for kind in ("step_running", "step_retry", "provider_call", "step_completed", "step_skipped"):
        assert kind in kinds
    assert len({event["run_id"] for event in events}) == 1


def test_a_listener_that_raises_does_not_harm_the_run() -> None:
    def broken(event: dict[str, Any]) -> None:
        raise ValueError("listener")

    assert run(llm("a"), on_event=broken).status == "completed"


# fallbacks, budgets, streams


def down(status: int = 503) -> ProviderError:
    return ProviderError("down", provider="p", status=status, retryable=status >= 500)


def test_fallbacks_are_tried_in_order_when_retries_are_spent_and_the_result_says_who_answered() -> None:
    first, second, third = Scripted(script=[down()] * 9), Scripted(script=[down(401)]), Scripted()
    fallback = [{"provider": "q", "model": "other"}, {"provider": "r"}]
    events: list[Any] = []
    step = llm("a", fallback=fallback, retry={"max_attempts": 2, "initial_delay": 1}, output=["text", "model"])
    result = run(step, provider={"p": first, "q": second, "r": third}, on_event=events.append)
    assert (first.calls, second.calls, third.calls) == (2, 1, 1)
    assert (result["a"].provider, result["a"].model, result["a"].attempts) == ("r", "m", 4)
    assert [event["provider"] for event in events if event["type"] == "step_fallback"] == ["q", "r"]


def test_the_last_fallbacks_error_is_the_steps() -> None:
    providers = {"p": Scripted(script=[down(400)]), "q": Scripted(script=[down(404)])}
    result = run(llm("a", fallback=[{"provider": "q"}]), provider=providers)
    assert result["a"].error is not None and result["a"].error["status"] == 404


def test_a_budget_of_calls_stops_before_the_call_that_exceeds_it_and_keeps_what_is_done() -> None:
    provider = Scripted()
    steps = [llm(f"s{n}", depends_on=[f"s{n - 1}"] if n else [], continue_on_error=n == 2) for n in range(4)]
    result = run(*steps, provider=provider, budget={"max_calls": 2})
    assert (provider.calls, result.status, result.usage["calls"]) == (2, "failed", 2)
    assert statuses(result) == {"s0": "completed", "s1": "completed", "s2": "failed", "s3": "failed"}
    assert result.error is not None and result.error["type"] == "BudgetExceededError"


def test_a_budget_of_tokens_counts_what_is_in_flight() -> None:
    provider = Scripted(delay=0.05)  # 5 tokens a call; 1 of prompt and 4 of answer are set aside for each
    steps = [llm(f"s{n}", "abcd", max_tokens=4) for n in range(8)]
    result = run(*steps, provider=provider, concurrency=8, budget={"max_tokens": 20})
    assert (provider.calls, result.usage["total_tokens"]) == (4, 20)


def test_a_cost_comes_from_the_pricing_table_and_is_bounded() -> None:
    pricing = {"m": {"input": 1_000_000, "output": 2_000_000}}  # 7 a call
    result = run(llm("a"), llm("b", depends_on="a"), pricing=pricing, budget={"max_cost": 7})
    assert result.usage["cost"] == 7
    assert statuses(result) == {"a": "completed", "b": "failed"}


def test_stream_yields_events_and_the_pieces_of_answers_in_order() -> None:
    executor = WorkflowExecutor(Workflow("t", [llm("a", "one two three")]), offline=True)

    async def collect() -> list[dict[str, Any]]:
        return [event async for event in executor.stream()]

    events = asyncio.run(collect())
    assert "".join(event["text"] for event in events if event["type"] == "text") == "echo: one two three"
    kinds = [event["type"] for event in events]
    assert kinds[0] == "run_started" and kinds[-2:] == ["step_completed", "run_finished"]
    assert executor.result is not None and executor.result.status == "completed"


def test_pieces_from_a_worker_thread_come_before_the_end_of_their_step() -> None:
    def provider(request: CompletionRequest) -> str:
        assert request.stream and request.on_text
        for piece in ("a", "b", "c"):
            request.on_text(piece)
        return "abc"

    executor = WorkflowExecutor(Workflow("t", [llm("a")]), providers={"p": provider})

    async def collect() -> list[str]:
        return [event.get("text", event["type"]) async for event in executor.stream()]

    assert asyncio.run(collect())[-5:] == ["a", "b", "c", "step_completed", "run_finished"]


def test_leaving_a_stream_early_cancels_the_run() -> None:
    executor = WorkflowExecutor(Workflow("t", [llm("a")]), providers={"p": Scripted(delay=30)})

    async def leave() -> None:
        stream = executor.stream()
        async for event in stream:
            if event["type"] == "step_running":
                break
        await stream.aclose()

    started = time.monotonic()
    asyncio.run(leave())
    assert time.monotonic() - started < 3
    assert executor.result is not None and executor.result.status == "cancelled"


def test_the_deadline_of_an_attempt_does_not_count_the_wait_for_a_slot() -> None:
    provider = Scripted(delay=0.2)
    result = run(*(llm(f"s{n}", timeout_seconds=1.0) for n in range(8)), provider=provider, concurrency=1)
    assert result.status == "completed"


# gates: limits, pauses, circuit breakers


class Tool:
    """A provider object of its own, so that what stands before it is shared by whoever uses it."""

    def __init__(self, *answers: Exception | str, delay: float = 0.0) -> None:
        self.script, self.delay, self.times, self.active, self.most = list(answers), delay, [], 0, 0
        self.lock = threading.Lock()

    def complete(self, request: CompletionRequest) -> str:
        with self.lock:
            self.times.append(time.monotonic())
            self.active += 1
            self.most = max(self.most, self.active)
            answer = self.script.pop(0) if self.script else "ok"
        time.sleep(self.delay)
        with self.lock:
            self.active -= 1
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_429_slows_the_provider_down_for_everyone() -> None:
    slow = Tool(RateLimitError("slow down", provider="p", status=429, retry_after=0.4))
    other = Tool()
    later = Step(id="later", type="action", action="sleep", seconds=0.05)
    steps = [llm("a", retry={"max_attempts": 2, "initial_delay": 1}), later, *(llm(f"s{n}", depends_on="later") for n in range(3))]
    steps.append(Step(id="other", type="llm", provider="q", model="m", prompt="x", depends_on="later"))
    result = run(*steps, provider={"p": slow, "q": other})
    assert result.status == "completed"
    assert min(slow.times[1:]) - slow.times[0] >= 0.4  # nobody else found out for itself
    assert other.times[0] - slow.times[0] < 0.4  # and other providers' callers did not wait


def test_a_pause_longer_than_max_delay_fails_at_once_and_says_how_long() -> None:
    provider = Tool(RateLimitError("slow down", provider="p", status=429, retry_after=90))
    result = run(llm("a"), llm("b", depends_on="a", trigger_rule="all_done"), provider=provider)
    assert len(provider.times) == 1
    assert "wait" in result["b"].error["message"] and result["b"].error["type"] == "RateLimitError"


def test_max_concurrent_bounds_the_calls_of_one_provider_and_holds_no_slot_of_others() -> None:
    limited, other = Tool(delay=0.1), Tool()
    steps = [llm(f"s{n}") for n in range(4)] + [Step(id="o", type="llm", provider="q", model="m", prompt="x")]
    started = time.monotonic()
    result = run(*steps, provider={"p": limited, "q": other}, concurrency=2, providers={"p": {"rate_limit": {"max_concurrent": 1}}})
    assert (result.status, limited.most) == ("completed", 1)
    assert other.times[0] - started < 0.3  # it did not wait for the four


def test_requests_per_minute_are_spaced_and_shared_by_executors() -> None:
    provider = Tool()
    workflow = Workflow("t", [llm("a"), llm("b"), llm("c")], providers={"p": {"rate_limit": {"requests_per_minute": 240}}})

    async def both() -> None:
        executors = [WorkflowExecutor(workflow, providers={"p": provider}) for _ in range(2)]
        await asyncio.gather(*(executor.execute() for executor in executors))

    asyncio.run(both())
    assert len(provider.times) == 6
    assert max(provider.times) - min(provider.times) >= 0.4  # four a second: one second's worth at once, then one by one


def test_limits_may_be_given_to_a_provider_in_code() -> None:
    provider = OpenAIProvider(api_key="k", base_url="http://127.0.0.1:9", circuit_breaker={"min_calls": 1, "window": 1})
    retry = {"max_attempts": 1}
    result = run(llm("a", retry=retry), llm("b", retry=retry, depends_on="a", trigger_rule="all_done"), provider=provider)
    assert [result[step].error["type"] for step in "ab"] == ["ProviderConnectionError", "CircuitOpenError"]


def test_an_open_circuit_fails_fast_goes_to_the_fallback_and_is_told() -> None:
    bad, good = Tool(*[down() for _ in range(20)]), Tool()
    events: list[Any] = []
    breaker = {"p": {"circuit_breaker": {"min_calls": 2, "window": 4, "open_seconds": 60}}}
    step = {"retry": {"max_attempts": 1}, "fallback": [{"provider": "q"}]}
    steps = [llm(f"s{n}", depends_on=[f"s{n - 1}"] if n else [], **step) for n in range(5)]
    result = run(*steps, provider={"p": bad, "q": good}, providers=breaker, on_event=events.append)
    assert (result.status, len(bad.times), len(good.times)) == ("completed", 2, 5)
    assert [event["state"] for event in events if event["type"] == "circuit"] == ["open"]


def test_a_circuit_closes_after_a_probe_that_succeeds() -> None:
    provider = Tool(down(), down())
    breaker = {"p": {"circuit_breaker": {"min_calls": 2, "window": 4, "open_seconds": 0.05}}}
    pause = Step(id="pause", type="action", action="sleep", seconds=0.1, depends_on=["a", "b"], trigger_rule="all_done")
    retry = {"max_attempts": 1}
    last = llm("c", depends_on="pause"), llm("d", depends_on="c")
    result = run(llm("a", retry=retry), llm("b", retry=retry), pause, *last, provider=provider, providers=breaker)
    assert statuses(result)["d"] == "completed"


# what a budget bounds


@pytest.mark.parametrize("concurrency", [1, 4, 16])
def test_a_budget_of_calls_is_spent_to_the_last_and_never_beyond(concurrency: int) -> None:
    each = {"for_each": list(range(10))}
    provider = Scripted(delay=0.01)
    result = run(llm("f", **each), provider=provider, concurrency=concurrency, budget={"max_calls": 10})
    assert (result.status, provider.calls, result.usage["calls"]) == ("completed", 10, 10)
    provider = Scripted(delay=0.01)
    result = run(llm("f", **each), provider=provider, concurrency=concurrency, budget={"max_calls": 7})
    assert (result.status, provider.calls, result.usage["calls"]) == ("failed", 7, 7)
    assert "7 are spent or in flight" in result.error["message"]


@pytest.mark.parametrize("budget", [{"max_tokens": 20}, {"max_cost": 28}])
def test_calls_that_wait_for_a_slot_are_asked_whether_the_budget_still_holds(budget: dict[str, Any]) -> None:
    provider = Scripted(delay=0.001)  # 5 tokens a call, which cost 7: more than is known before
    pricing = {"m": {"input": 1_000_000, "output": 2_000_000}}
    steps = [llm("f", "", for_each=list(range(50)))]
    result = run(*steps, provider=provider, concurrency=1, budget=budget, pricing=pricing)
    assert (result.status, provider.calls) == ("failed", 4)


# cancelling at any moment


def test_a_run_that_is_cancelled_before_its_first_step_has_all_steps() -> None:
    events: list[tuple[str, Any]] = []

    def listen(event: dict[str, Any]) -> None:
        events.append((event["type"], event.get("step_id")))
        if event["type"] == "run_started":
            executor.cancel()

    executor = WorkflowExecutor(Workflow("t", [value("a"), value("b", depends_on="a")]), on_event=listen)
    result = executor.run()
    assert (result.status, statuses(result)) == ("cancelled", {"a": "cancelled", "b": "cancelled"})
    assert events[0][0] == "run_started" and events[-1][0] == "run_finished"
    assert {("step_cancelled", "a"), ("step_cancelled", "b")} < set(events)
    assert executor.run().status == "cancelled"  # by the listener, once more
    executor.on_event = None
    assert executor.run().status == "completed"


def test_a_cancellation_that_comes_while_a_run_begins_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = WorkflowExecutor(Workflow("t", [Step(id="a", type="action", action="sleep", seconds=60)]))
    check = executor._check

    def slow(inputs: Any) -> None:
        executor.cancel()
        check(inputs)

    monkeypatch.setattr(executor, "_check", slow)
    assert executor.run().status == "cancelled"


# values that refuse every question


class _Unbound:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("working outside of a context")


@pytest.mark.parametrize("function", [lambda: _Unbound(), None], ids=["function", "coroutine"])
def test_a_value_that_raises_when_it_is_looked_at_fails_its_step_and_hangs_nothing(function: Any) -> None:
    async def coroutine() -> Any:
        return _Unbound()

    step = Step(id="a", type="action", action="f")
    result = run(step, actions={"f": function or coroutine}, timeout_seconds=30)
    assert result.status == "failed" and "no JSON value" in result["a"].error["message"]


def test_an_error_that_cannot_be_shown_fails_its_step_and_hangs_nothing() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise KeyboardInterrupt

    def odd() -> None:
        raise Odd

    result = run(Step(id="a", type="action", action="f"), actions={"f": odd}, timeout_seconds=30)
    assert result.status == "failed" and "Odd" in result["a"].error["message"]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_json_does_not_know_is_refused_where_it_comes_from(number: float) -> None:
    result = run(Step(id="a", type="action", action="f"), actions={"f": lambda: number})
    assert "no number in JSON" in result["a"].error["message"]


def test_the_error_of_an_output_names_it() -> None:
    result = run(value("a"), outputs={"fine": "{{steps.a}}", "mine": "{{steps.a.output.zz}}"})
    assert result.status == "failed" and "outputs: mine" in result.error["message"]


def test_calls_past_a_rate_limit_do_not_pile_up_behind_busy_slots() -> None:
    started: list[float] = []

    def provider(request: Any) -> str:
        started.append(time.monotonic())
        time.sleep(2 if len(started) == 1 else 0)
        return "x"

    limited = {"p": {"type": "openai", "rate_limit": {"requests_per_minute": 240}}}  # one each 0.25 s, 4 at once
    steps = [llm(f"s{n}") for n in range(9)]
    assert run(*steps, provider={"p": provider}, concurrency=1, providers=limited).status == "completed"
    assert started[8] - started[1] > 0.4  # 8 calls; all at once if they had been let through during the first


def test_text_of_an_attempt_that_timed_out_is_not_shown_in_the_next() -> None:
    go_on, said = threading.Event(), []
    attempts = iter((1, 2))

    def provider(request: CompletionRequest) -> str:
        attempt = next(attempts)
        request.on_text(f"a{attempt}")
        if attempt == 1:
            go_on.wait(20)
            request.on_text("late")
        else:
            go_on.set()
            time.sleep(0.1)
            request.on_text("b2")
        return "done"

    def listen(event: dict[str, Any]) -> None:
        if event["type"] == "text":
            said.append(event["text"])

    step = llm("a", stream=True, timeout_seconds=0.5, retry={"max_attempts": 2, "initial_delay": 1})
    assert run(step, provider=provider, on_event=listen).status == "completed"
    assert said == ["a1", "a2", "b2"]


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("limited", [{}, {"rate_limit": {"requests_per_minute": 100_000}}])
@pytest.mark.parametrize("budget", [None, {"max_calls": 100}])
@pytest.mark.parametrize("is_async", [False, True])
def test_calls_that_wait_for_a_slot_keep_to_a_pause_that_comes_meanwhile(
    concurrency: int, limited: dict[str, Any], budget: Any, is_async: bool
) -> None:
    moments: list[float] = []
    paused = [0.0, 0.0]

    def provider(request: CompletionRequest) -> str:
        moments.append(time.monotonic())
        if len(moments) == 1:
            time.sleep(0.05)
            paused[:] = time.monotonic(), time.monotonic() + 0.5
            raise RateLimitError("slow down", provider="p", status=429, retry_after=0.5)
        time.sleep(0.05)
        return "x"

    async def coroutine(request: CompletionRequest) -> str:
        return provider(request)

    steps = [llm(f"s{n}", retry={"max_attempts": 2}) for n in range(12)]
    options = {"budget": budget} if budget else {}
    providers = {"p": {"type": "openai", **limited}}
    made = {"p": coroutine if is_async else provider}
    result = run(*steps, provider=made, concurrency=concurrency, providers=providers, **options)
    assert (result.status, result.usage["calls"], len(moments)) == ("completed", 13, 13)
    assert not [moment for moment in moments if paused[0] + 0.02 < moment < paused[1] - 0.02]


def test_no_call_that_waits_for_a_slot_passes_a_circuit_that_opens_meanwhile() -> None:
    calls: list[int] = []

    def provider(request: CompletionRequest) -> str:
        calls.append(1)
        raise ProviderError("down", provider="p", status=500, retryable=True)

    breaker = {"failure_rate": 0.5, "window": 4, "min_calls": 2, "open_seconds": 60}
    steps = [llm("a", for_each=list(range(10)), retry={"max_attempts": 1}, continue_on_error=True)]
    result = run(
        *steps, provider={"p": provider}, concurrency=1, providers={"p": {"type": "openai", "circuit_breaker": breaker}}
    )
    assert (len(calls), result.usage["calls"]) == (2, 2)


def test_a_call_that_the_budget_forbids_is_no_failure_of_its_provider() -> None:
    breaker = {"failure_rate": 0.5, "window": 4, "min_calls": 1, "open_seconds": 60}
    result = run(
        *[llm(f"s{n}", continue_on_error=True) for n in range(5)], provider={"p": lambda request: "x"}, concurrency=1,
        providers={"p": {"type": "openai", "circuit_breaker": breaker}}, budget={"max_calls": 1},
    )  # fmt: skip
    assert [step.error["type"] for step in result.values() if step.error] == ["BudgetExceededError"] * 4
