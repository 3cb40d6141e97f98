"""Room 13 under attack: functions that raise, return and block as no function should, and ends at the worst moment."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import finished

from llm_orchestrator import CompletionResponse, OpenAIProvider, RunResult, Step, Workflow, WorkflowExecutor

ROOT = Path(__file__).resolve().parent.parent


def llm(step_id: str, provider: str = "p", **keys: Any) -> Step:
    return Step(id=step_id, type="llm", provider=provider, model="m", prompt="hi", **keys)


def nested(*steps: Step) -> Step:
    """The steps as children of a loop in a parallel."""
    return Step("c", "parallel", tasks=[Step("l", "loop", steps=list(steps), until="true", max_iterations=1)])


def executor(
    *steps: Step, provider: Any = None, on_event: Any = None, concurrency: int = 8, **keys: Any
) -> WorkflowExecutor:
    providers = {"p": provider, "ok": lambda request: "ok"}
    return WorkflowExecutor(
        Workflow("t", steps, **keys), providers=providers, max_concurrency=concurrency, on_event=on_event
    )


def states(result: RunResult) -> dict[str, str]:
    return {step_id: step.reason or step.status for step_id, step in result.items()}


# what a function may raise


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Odd(Exception):
    retryable = True
    retry_after = "soon"


ERRORS: list[BaseException] = [
    SystemExit(3), GeneratorExit(), StopIteration(1), StopAsyncIteration(), Exception(), Mute(), Odd(),
    BaseException("b"), asyncio.CancelledError(), concurrent.futures.CancelledError(),
    concurrent.futures.InvalidStateError(),
    RecursionError(), MemoryError(), asyncio.TimeoutError(), KeyError("k"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"),
]  # fmt: skip


@pytest.mark.parametrize("error", [*ERRORS, KeyboardInterrupt()], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("listening", [False, True])
def test_whatever_a_function_raises_fails_its_step_and_nothing_else(
    error: BaseException, listening: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def raising(request: Any) -> str:
        raise error

    on_event = print if listening else None
    _check_failure(executor(llm("a"), llm("b", "ok"), nested(llm("d")), provider=raising, on_event=on_event), caplog)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_coroutine_raises_fails_its_step_and_nothing_else(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    async def raising(request: Any) -> str:
        await asyncio.sleep(0)
        raise error

    _check_failure(executor(llm("a"), llm("b", "ok"), nested(llm("d")), provider=raising), caplog)


def _check_failure(runner: WorkflowExecutor, caplog: pytest.LogCaptureFixture) -> None:
    runner.workflow.defaults = {"llm": {"retry": {"max_attempts": 2, "initial_delay": 1, "jitter": False}}}
    result = finished(runner)
    assert states(result) == {"a": "failed", "b": "completed", "c": "failed", "c.l": "failed", "c.l.0.d": "failed"}
    assert result["a"].error is not None
    assert result["a"].error["message"]
    json.dumps(result.to_dict())
    assert not [record for record in caplog.records if record.name == "asyncio"]


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), Mute()], ids=lambda e: type(e).__name__
)
def test_whatever_an_action_raises_fails_its_step(error: BaseException) -> None:
    def raising() -> None:
        raise error

    workflow = Workflow("t", [Step("a", "action", action="x", for_each=[1, 2])])
    result = finished(WorkflowExecutor(workflow, actions={"x": raising}))
    assert states(result) == {"a": "failed", "a.0": "failed", "a.1": "failed"}


# what a function may return


def _generator(request: Any) -> Any:
    yield "x"


def _answer(**keys: Any) -> CompletionResponse:
    answer = CompletionResponse(text="x", model="m")
    for name, value in keys.items():
        setattr(answer, name, value)
    return answer


@pytest.mark.parametrize(
    "value",
    [None, b"x", 3, float("nan"), {}, object(), ["x"], lambda: "x", _answer(text=None), _answer(text=object()),
     _answer(model=object())],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_an_answer_of_the_wrong_kind_is_a_bad_response(value: Any) -> None:
    result = finished(executor(llm("a"), provider=lambda request: value))
    assert result["a"].error is not None
    assert result["a"].error["type"] == "BadResponseError"


def test_a_generator_is_no_answer() -> None:
    assert finished(executor(llm("a"), provider=_generator))["a"].status == "failed"


@pytest.mark.parametrize("count", ["many", float("nan"), -5, None, True, [], 2.5], ids=repr)
def test_token_counts_of_the_wrong_kind_count_nothing(count: Any) -> None:
    answer = _answer(input_tokens=count, output_tokens=count, total_tokens=count)
    result = finished(executor(llm("a"), provider=lambda request: answer))
    assert result.status == "completed"
    assert result.usage == {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "calls": 1}


def test_an_answer_without_a_model_has_the_model_that_was_asked_for() -> None:
    result = finished(executor(llm("a", output=["text", "model"]), provider=lambda request: _answer(model=None)))
    assert result["a"].outputs == {"text": "x", "model": "m"}


def test_a_huge_answer_is_kept_whole() -> None:
    result = finished(executor(llm("a"), provider=lambda request: "x" * 10_000_000))
    assert len(result["a"].outputs["output"]) == 10_000_000


@pytest.mark.parametrize(
    "value", [b"x", object(), {1: 2}, {"a": {"b": b""}}, (n for n in "ab")], ids=lambda v: type(v).__name__
)
def test_an_action_that_returns_no_json_value_fails(value: Any) -> None:
    workflow = Workflow("t", [Step("a", "action", action="x")])
    result = finished(WorkflowExecutor(workflow, actions={"x": lambda: value}))
    assert result["a"].error is not None
    assert "no JSON value" in result["a"].error["message"]


def test_a_value_that_contains_itself_fails_the_step() -> None:
    endless: list[Any] = []
    endless.append(endless)
    workflow = Workflow("t", [Step("a", "action", action="x")])
    assert finished(WorkflowExecutor(workflow, actions={"x": lambda: endless}))["a"].status == "failed"


# what never ends


def hang(request: Any) -> str:
    """A function that nothing can stop."""
    while True:
        try:
            time.sleep(1000)
        except BaseException:
            pass


async def hang_politely(request: Any) -> str:
    await asyncio.sleep(1000)
    return "never"


async def hang_twice(request: Any) -> str:
    for _ in range(2):
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            pass
    return "at last"


@pytest.mark.parametrize("provider", [hang, hang_politely, hang_twice], ids=lambda function: function.__name__)
@pytest.mark.parametrize("how", ["cancel", "run timeout", "fail_fast"])
def test_a_run_ends_within_seconds_whatever_its_calls_do(provider: Callable[[Any], Any], how: str) -> None:
    fail = Step("f", "action", action="fail" if how == "fail_fast" else "log", message="x")
    keys = {"fail_fast": True} if how == "fail_fast" else {"timeout_seconds": 0.2} if how == "run timeout" else {}
    runner = executor(nested(llm("a"), llm("b", for_each=[1, 2])), fail, provider=provider, **keys)
    if how == "cancel":
        threading.Timer(0.2, runner.cancel).start()
    result = finished(runner, 10)
    assert result.status == {"cancel": "cancelled", "run timeout": "timed_out", "fail_fast": "failed"}[how]
    assert {step.status for step in result.steps.values()} <= {"completed", "failed", "cancelled"}
    assert result["c"].status == "cancelled"


@pytest.mark.parametrize("provider", [hang, hang_politely, hang_twice], ids=lambda function: function.__name__)
def test_a_deadline_ends_a_step_whatever_its_call_does(provider: Callable[[Any], Any]) -> None:
    step = Step("c", "parallel", tasks=[llm("a", timeout_seconds=0.1, retry={"max_attempts": 1})])
    result = finished(executor(step, provider=provider))
    assert result["c.a"].status == ("completed" if provider is hang_twice else "failed")


def test_an_async_function_may_clean_up_when_it_is_cancelled() -> None:
    cleaned: list[str] = []

    async def careful(request: Any) -> str:
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(0.05)
            cleaned.append("up")
        return ""

    runner = executor(nested(llm("a")), provider=careful)
    threading.Timer(0.1, runner.cancel).start()
    assert states(finished(runner))["c.l.0.a"] == "cancelled"
    assert cleaned == ["up"]


# sockets


@pytest.mark.parametrize("how", ["cancel", "run timeout", "fail_fast", "deadline"])
def test_sockets_under_the_children_of_a_container_are_closed(how: str) -> None:
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = threading.Semaphore(0)

        def serve() -> None:
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                threading.Thread(target=swallow, args=(connection,), daemon=True).start()

        def swallow(connection: socket.socket) -> None:
            with connection:
                connection.settimeout(20)
                try:
                    while connection.recv(65536):
                        pass
                except socket.timeout:
                    return
                except OSError:
                    pass
            closed.release()

        threading.Thread(target=serve, daemon=True).start()
        provider = OpenAIProvider(api_key="k", base_url=f"http://127.0.0.1:{server.getsockname()[1]}/v1")
        keys: dict[str, Any] = {"fail_fast": how == "fail_fast"}
        if how == "run timeout":
            keys["timeout_seconds"] = 0.5
        slow_fail = Step("f", "action", action="sleep", seconds=0.4)
        fail = Step("g", "action", action="fail" if how == "fail_fast" else "log", message="x", depends_on="f")
        deadline = {"timeout_seconds": 0.4, "retry": {"max_attempts": 1}} if how == "deadline" else {}
        runner = executor(nested(llm("a", for_each=[1, 2, 3], **deadline)), slow_fail, fail, provider=provider, **keys)
        if how == "cancel":
            threading.Timer(0.5, runner.cancel).start()
        finished(runner)
        assert all(closed.acquire(timeout=5) for _ in range(3))
        _no_threads_left(before)


def _no_threads_left(before: set[threading.Thread]) -> None:
    deadline = time.monotonic() + 5
    while any(thread.name == "llm_orchestrator" for thread in set(threading.enumerate()) - before):
        assert time.monotonic() < deadline, "worker threads are left"
        time.sleep(0.01)


# listeners


@pytest.mark.parametrize(
    "error", [ValueError("x"), SystemExit(2), Mute(), asyncio.CancelledError()], ids=lambda e: type(e).__name__
)
def test_a_listener_that_raises_harms_nothing(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    def listener(event: dict[str, Any]) -> None:
        raise error

    with caplog.at_level(logging.CRITICAL, "llm_orchestrator"):
        result = finished(executor(nested(llm("a", "ok"), llm("b", "ok", for_each=[1, 2])), on_event=listener))
    assert result.status == "completed"


def test_a_slow_listener_delays_but_does_not_reorder() -> None:
    events: list[tuple[str, str]] = []

    def listener(event: dict[str, Any]) -> None:
        time.sleep(0.005)
        events.append((event["type"], event.get("step_id", "")))

    finished(executor(*(llm(f"s{n}", "ok") for n in range(5)), on_event=listener))
    for number in range(5):
        own = [kind for kind, step_id in events if step_id == f"s{number}" and kind != "step_pending"]
        assert own == ["step_running", "provider_call", "step_completed"]
    assert events[0][0] == "run_started"
    assert events[-1][0] == "run_finished"


def test_a_listener_may_cancel_the_run() -> None:
    def listener(event: dict[str, Any]) -> None:
        if event["type"] == "step_completed":
            runner.cancel()

    runner = executor(llm("a", "ok"), llm("b", depends_on="a"), provider=hang, on_event=listener)
    assert states(finished(runner)) == {"a": "completed", "b": "cancelled"}


# many runs


def test_an_executor_may_run_in_many_threads_and_tasks_at_once() -> None:
    runner = executor(llm("a", "ok", for_each=[1, 2]), nested(llm("b", "ok")))

    async def many() -> list[RunResult]:
        return await asyncio.gather(*(runner.execute() for _ in range(5)))

    results = asyncio.run(many())
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        results += [future.result(20) for future in [pool.submit(runner.run) for _ in range(5)]]
    assert {result.status for result in results} == {"completed"}
    assert len({result.run_id for result in results}) == 10


def test_cancelling_in_each_of_the_first_turns_of_the_loop_is_clean() -> None:
    for turns in range(60):
        runner = executor(llm("a", "ok", for_each=[1, 2]), nested(llm("b", "ok")))

        async def main(runner: WorkflowExecutor = runner, turns: int = turns) -> None:
            task = asyncio.ensure_future(runner.execute())
            for _ in range(turns + 1):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(main())
        assert runner.result is not None
        assert {step.status for step in runner.result.steps.values()} <= {"completed", "failed", "cancelled", "skipped"}


def test_deadlines_that_race_with_answers_lose_nothing() -> None:
    def quick(request: Any) -> str:
        time.sleep(0.004)
        return "ok"

    keys = {"timeout_seconds": 0.005, "continue_on_error": True, "retry": {"max_attempts": 3, "initial_delay": 1}}
    result = finished(executor(llm("a", for_each=list(range(200)), **keys), provider=quick), 20)
    assert result.status == "completed"
    assert {step.status for step in result.steps.values()} <= {"completed", "failed"}
    assert [value in ("ok", None) for value in result["a"].outputs["output"]] == [True] * 200


# processes


def _program(body: str, **environment: str) -> subprocess.Popen[str]:
    head = """
        import asyncio, sys, threading, time
        from llm_orchestrator import *
        def hang(request):
            sys.stdout.write("hanging\\n")  # in one piece: another thread writes too
            sys.stdout.flush()
            while True:
                time.sleep(1000)
        async def hang_politely(request):
            sys.stdout.write("hanging\\n")  # in one piece: another thread writes too
            sys.stdout.flush()
            await asyncio.sleep(1000)
        def workflow(provider):
            step = Step("a", "llm", provider=provider, model="m", prompt="x", for_each=[1, 2])
            container = Step("c", "parallel", tasks=[step])
            return WorkflowExecutor(Workflow("t", [container]), providers={"hang": hang, "polite": hang_politely})
    """
    source = textwrap.dedent(head) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", source], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONASYNCIODEBUG": "1", **environment},
    )  # fmt: skip


class _Killer:
    """Ends a process that a failed assertion would leave running, which the end of `with process` waits for."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.close = process.kill


@pytest.mark.skipif(os.name == "nt", reason="SIGINT")
@pytest.mark.parametrize("provider", ["hang", "polite"])
@pytest.mark.parametrize("where", ["runner.run()", "asyncio.run(runner.execute())", "asyncio.run(inside())"])
def test_ctrl_c_in_the_python_api_ends_the_process_and_keeps_the_result(provider: str, where: str) -> None:
    body = f"""
        runner = workflow({provider!r})
        async def inside():
            runner.run()
        try:
            {where}
        except KeyboardInterrupt:
            print("interrupted", runner.result.status, [step.status for step in runner.result.steps.values()])
    """
    with _program(body) as process, contextlib.closing(_Killer(process)):
        assert process.stdout is not None
        assert process.stdout.readline().startswith("hanging")
        time.sleep(0.2)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert time.monotonic() - started < 10
    assert "interrupted cancelled ['cancelled', 'cancelled', 'cancelled', 'cancelled']" in out, err
    assert not [line for line in err.splitlines() if "took" not in line], err


@pytest.mark.parametrize(
    "body",
    [
        "runner = workflow('hang'); threading.Timer(0.2, runner.cancel).start(); print(runner.run().status)",
        "runner = workflow('hang'); runner.workflow.timeout_seconds = 0.2; print(runner.run().status)",
        "threading.Thread(target=workflow('hang').run, daemon=True).start(); time.sleep(0.3)",
    ],
    ids=["cancelled", "timed out", "abandoned"],
)
def test_a_process_exits_although_a_call_never_returns(body: str) -> None:
    with _program(body) as process:
        _, err = process.communicate(timeout=20)
    assert process.returncode == 0, err


def test_a_run_in_debug_mode_warns_of_nothing() -> None:
    body = """
        def flaky(request, seen=[]):
            seen.append(1)
            if len(seen) % 3:
                raise ConnectionError("reset")
            return "ok"
        async def slow(request):
            await asyncio.sleep(0.01)
            return "ok"
        def step(id, provider, **keys):
            return Step(id, "llm", provider=provider, model="m", prompt="x", retry={"initial_delay": 1}, **keys)
        steps = [
            step("a", "flaky"), step("b", "slow", for_each=[1, 2, 3]),
            Step("c", "loop", until="iteration == 3", max_iterations=5,
                 steps=[step("d", "slow", timeout_seconds=0.001, continue_on_error=True)]),
            Step("e", "action", action="fail", message="x"), step("f", "slow", depends_on="e"),
        ]
        runner = WorkflowExecutor(Workflow("t", steps), providers={"flaky": flaky, "slow": slow}, max_concurrency=3)
        runner.run(), asyncio.run(runner.execute())
        import gc
        gc.collect()
        print(runner.result.status)
    """
    with _program(body) as process:
        out, err = process.communicate(timeout=30)
    assert (out, process.returncode) == ("failed\n", 0), err
    assert not [line for line in err.splitlines() if "took" not in line], err
