"""Laws of execution that hold for any workflow: random nested steps, random timing, random cancellation."""

from __future__ import annotations

import asyncio
import collections
import json
import random
import threading
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_orchestrator import RunResult, Workflow, WorkflowExecutor

FINAL = ("completed", "failed", "skipped", "cancelled")
WATCHDOG_SECONDS = 20

# A scope is a list of steps; a step is (kind, upstream siblings, whether it looks at outer steps, options, children).
_LEAVES = ("value", "value", "llm", "llm", "instant", "async", "fail", "missing")
_CONTAINERS = ("parallel", "branch", "loop", "workflow")
_options = st.fixed_dictionaries(
    {
        "for_each": st.sampled_from([None, None, None, [], ["i"], ["i", 2, None]]),
        "condition": st.sampled_from([None, None, None, "1 == 2", "steps.{0} == null", "steps.{0}.status == 'failed'"]),
        "continue_on_error": st.booleans(),
        "trigger_rule": st.sampled_from([None, None, None, "all_done", "one_failed", "all_success", "one_success"]),
        "limit": st.sampled_from([None, None, 1, 2]),
        "pick": st.sampled_from(["a", "b", "default", "?"]),
        "iterations": st.integers(1, 3),
    }
)


def _scopes(children: st.SearchStrategy[Any] | None) -> st.SearchStrategy[Any]:
    kinds = st.sampled_from(_LEAVES if children is None else (*_LEAVES[2:6], *_CONTAINERS, *_CONTAINERS))
    inner = children if children is not None else st.just([])
    step = st.tuples(kinds, st.sets(st.integers(0, 3), max_size=2), st.booleans(), _options, inner)
    return st.lists(step, min_size=1, max_size=4)


_WORKFLOWS = st.one_of(_scopes(_scopes(None)), _scopes(_scopes(_scopes(None))))


def _document(scope: Any, outer: tuple[str, ...] = (), depth: int = 0) -> list[dict[str, Any]]:
    """The steps of a scope as they stand in a workflow document."""
    steps: list[dict[str, Any]] = []
    for position, (kind, upstream, looks_out, options, children) in enumerate(scope):
        siblings = [f"s{depth}{index}" for index in sorted(upstream) if index < position]
        seen = [*siblings, *(outer[-1:] if looks_out else ())]
        text = "".join("[{{#if steps.X}}{{json steps.X}}{{/if}}]".replace("X", name) for name in seen)
        step: dict[str, Any] = {"id": f"s{depth}{position}", "depends_on": siblings}
        if options["for_each"] is not None:
            step["for_each"], text = options["for_each"], text + "{{json item}}{{index}}"
        if options["condition"] and kind != "branch" and (seen or "{0}" not in options["condition"]):
            step["condition"] = options["condition"].format(*seen)
        if options["continue_on_error"]:
            step["continue_on_error"] = True
        if options["trigger_rule"]:
            step["trigger_rule"] = options["trigger_rule"]
        if options["limit"] and (kind == "parallel" or "for_each" in step):
            step["max_concurrency"] = options["limit"]
        inside = _document(children, () if kind == "workflow" else (*outer, *(s["id"] for s in steps)), depth + 1)
        step.update(_own_keys(kind, text, options, inside))
        steps.append(step)
    return steps


def _own_keys(kind: str, text: str, options: dict[str, Any], inside: list[dict[str, Any]]) -> dict[str, Any]:
    if kind in ("llm", "instant", "async"):
        provider = {"llm": "p", "instant": "echo", "async": "q"}[kind]
        return {"type": "llm", "provider": provider, "model": "m", "prompt": text + "?"}
    if kind == "fail":
        return {"type": "action", "action": "fail", "message": "boom " + text}
    if kind in ("value", "missing"):
        template = text if kind == "value" else text + "{{inputs.none.at_all}}"
        return {"type": "transform", "function": "template", "template": template}
    if kind == "parallel":
        return {"type": kind, "tasks": inside}
    if kind == "branch":
        other = {"id": "s99", "type": "llm", "provider": "p", "model": "m", "prompt": "other"}
        return {"type": kind, "condition": f"'{options['pick']}'", "branches": {"a": inside, "b": [*inside[:1], other]}}
    if kind == "loop":
        until = f"iteration == {options['iterations'] - 1}"
        return {"type": kind, "steps": inside, "until": until, "max_iterations": 2, "on_exhausted": "continue"}
    return {"type": kind, "workflow": {"name": "inner", "inputs": {"none": {}}, "steps": inside}}


class Calls:
    """Providers that answer with their prompt after a delay that depends on nothing but luck."""

    def __init__(self, seed: int, longest: float = 0.003) -> None:
        self.random, self.longest = random.Random(seed), longest

    def blocking(self, request: Any) -> str:
        time.sleep(self.random.random() * self.longest)
        return f"b{len(request.prompt)}"

    async def asynchronous(self, request: Any) -> str:
        await asyncio.sleep(self.random.random() * self.longest)
        return f"a{len(request.prompt)}"

    def providers(self) -> dict[str, Any]:
        return {"p": self.blocking, "q": self.asynchronous}


def _executor(scope: Any, calls: Calls, concurrency: int, events: list[Any] | None = None) -> WorkflowExecutor:
    workflow = Workflow.from_dict({"name": "laws", "inputs": {"none": {}}, "steps": _document(scope)})
    listener = None if events is None else events.append
    return WorkflowExecutor(workflow, providers=calls.providers(), max_concurrency=concurrency, on_event=listener)


def _watched(function: Any) -> Any:
    """What the function returns; a failure if it does not within the watchdog's time."""
    outcome: list[Any] = []

    def target() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(WATCHDOG_SECONDS)
    assert outcome, "it hangs"
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def _essence(result: RunResult) -> Any:
    """All of a result that must not depend on time."""
    steps = {
        step_id: (step.status, step.reason, step.outputs, step.error and step.error["message"], step.attempts)
        for step_id, step in result.items()
    }
    return result.status, result.error and result.error["message"], list(steps), steps, result.usage


_laws = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@_laws
@given(_WORKFLOWS, st.integers(2, 32), st.integers(0, 2**32))
def test_results_do_not_depend_on_concurrency_or_timing(scope: Any, concurrency: int, seed: int) -> None:
    alone = _watched(_executor(scope, Calls(seed), 1).run)
    for number in range(2):
        assert _essence(_watched(_executor(scope, Calls(seed + number), concurrency).run)) == _essence(alone)


@_laws
@given(_WORKFLOWS, st.integers(1, 8), st.integers(0, 2**32))
def test_every_step_ends_once_and_containers_end_after_their_children(scope: Any, concurrency: int, seed: int) -> None:
    events: list[dict[str, Any]] = []
    result = _watched(_executor(scope, Calls(seed), concurrency, events).run)
    _check_story(result, events)
    assert "cancelled" not in {step.status for step in result.steps.values()}


def _check_story(result: RunResult, events: list[dict[str, Any]]) -> None:
    """Each step has one final state, one event that says so, and ran between the start and the end of its container."""
    assert all(step.status in FINAL for step in result.steps.values())
    first: dict[str, int] = {}
    ends: dict[str, list[tuple[int, str]]] = collections.defaultdict(list)
    for position, event in enumerate(events):
        step_id = event.get("step_id")
        if step_id is not None:
            first.setdefault(step_id, position)
            if event["type"].rpartition("_")[2] in FINAL:
                ends[step_id].append((position, event["type"]))
    assert {step_id: [kind for _, kind in found] for step_id, found in ends.items()} == {
        step_id: [f"step_{step.status}"] for step_id, step in result.items()
    }
    for step_id in result:
        parent = step_id.rpartition(".")[0]
        while parent and parent not in result:  # an iteration of a loop is no step
            parent = parent.rpartition(".")[0]
        if parent:
            assert ends[step_id][0][0] < ends[parent][0][0]
            assert first[parent] < first[step_id] or result[parent].status == "cancelled"
    assert (events[0]["type"], events[-1]["type"]) == ("run_started", "run_finished")


@_laws
@given(_WORKFLOWS, st.integers(1, 8), st.integers(0, 2**32))
def test_results_are_in_document_order_and_json(scope: Any, concurrency: int, seed: int) -> None:
    result = _watched(_executor(scope, Calls(seed, 0.001), concurrency).run)
    json.dumps(result.to_dict(), allow_nan=False)
    places = [[int(part[-1]) if part[0] == "s" else int(part) for part in step_id.split(".")] for step_id in result]
    if "'b'" not in json.dumps(_document(scope)):  # there, s10 stands in both branches and is a child of the second
        assert places == sorted(places)
    assert [place[0] for place in places if len(place) == 1] == list(range(len(scope)))


@settings(_laws, max_examples=40)
@given(
    _WORKFLOWS, st.integers(1, 8), st.integers(0, 2**32), st.floats(0, 0.03),
    st.sampled_from(["cancel", "task", "timeout"]),
)  # fmt: skip
def test_cancelling_at_a_random_moment_leaves_nothing_running(
    scope: Any, concurrency: int, seed: int, moment: float, how: str
) -> None:
    events: list[dict[str, Any]] = []
    before = set(threading.enumerate())
    executor = _executor(scope, Calls(seed, 0.02), concurrency, events)
    if how == "timeout":
        executor.workflow.timeout_seconds = max(moment, 0.001)

    async def main() -> None:
        task = asyncio.ensure_future(executor.execute())
        if how != "timeout":
            await asyncio.sleep(moment)
            executor.cancel() if how == "cancel" else task.cancel()
        await asyncio.wait([task])
        assert asyncio.all_tasks() == {asyncio.current_task()}
        if not task.cancelled():
            task.result()

    _watched(lambda: asyncio.run(main()))
    result = executor.result
    assert result is not None
    assert result.status in ("completed", "failed", "cancelled", "timed_out")
    _check_story(result, events)
    _no_threads_left(before)


@settings(_laws, max_examples=40)
@given(_WORKFLOWS, st.integers(1, 8), st.integers(0, 2**32))
def test_fail_fast_ends_and_leaves_nothing_running(scope: Any, concurrency: int, seed: int) -> None:
    events: list[dict[str, Any]] = []
    before = set(threading.enumerate())
    executor = _executor(scope, Calls(seed, 0.01), concurrency, events)
    executor.workflow.fail_fast = True
    result = _watched(executor.run)
    _check_story(result, events)
    assert result.status in ("completed", "failed")
    if "cancelled" in {step.status for step_id, step in result.items() if "." not in step_id}:
        assert result.status == "failed"
    _no_threads_left(before)


def _no_threads_left(before: set[threading.Thread]) -> None:
    deadline = time.monotonic() + 5
    while any(thread.name == "llm_orchestrator" for thread in set(threading.enumerate()) - before):
        assert time.monotonic() < deadline, "worker threads are left"
        time.sleep(0.001)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(_WORKFLOWS, min_size=2, max_size=6), st.integers(0, 2**32))
def test_many_executors_in_one_loop_do_what_each_does_alone(scopes: list[Any], seed: int) -> None:
    alone = [_essence(_watched(_executor(scope, Calls(seed), 1).run)) for scope in scopes]

    async def main() -> list[RunResult]:
        return await asyncio.gather(*(_executor(scope, Calls(seed), 4).execute() for scope in scopes))

    assert [_essence(result) for result in _watched(lambda: asyncio.run(main()))] == alone
