"""Durable runs: what a store, a cache, a cassette and a batch keep, and what is done again after a kill."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Program

from llm_orchestrator import (
    Cassette,
    CompletionRequest,
    CompletionResponse,
    ExecutionError,
    OrchestratorError,
    ProviderError,
    ResponseCache,
    SQLiteStore,
    Step,
    Workflow,
    WorkflowExecutor,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLiteStore]:
    with SQLiteStore(tmp_path / "runs.db") as store:
        yield store


class Work:
    """An action that counts its calls by name and fails for the names in `broken`."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.broken: set[str] = set()

    def __call__(self, name: Any) -> str:
        self.calls.append(str(name))
        if str(name) in self.broken:
            raise ValueError(f"{name} is broken")
        return f"did {name}"


def work(step_id: str, *depends_on: str, name: str = "", **keys: Any) -> Step:
    return Step(id=step_id, type="action", action="work", name=name or step_id, depends_on=list(depends_on), **keys)


def executor(workflow: Workflow, store: Any, work: Work, inputs: Any = None, **keys: Any) -> WorkflowExecutor:
    return WorkflowExecutor(workflow, inputs, actions={"work": work}, store=store, **keys)


def comparable(result: Any) -> Any:
    """A result without what differs from run to run: times, ids and counts of attempts."""
    document = result if isinstance(result, dict) else result.to_dict()
    steps = {step_id: (step["status"], step["outputs"]) for step_id, step in document["steps"].items()}
    return document["status"], document["outputs"], steps


DIAMOND = Workflow(
    "diamond",
    [
        work("a"), work("b", "a"), work("c", "a"),
        Step(id="join", type="transform", function="template", template="{{steps.b}} and {{steps.c}}"),
        work("e", "join"),
    ],
    outputs={"all": "{{steps.join}}"},
)  # fmt: skip


def test_a_resumed_run_repeats_only_what_had_not_completed(store: SQLiteStore) -> None:
    job = Work()
    job.broken = {"c"}
    first = executor(DIAMOND, store, job).run()
    assert (first.status, first["e"].status) == ("failed", "skipped")
    job.broken, job.calls = set(), []
    result = executor(DIAMOND, store, job).resume(first.run_id)
    assert sorted(job.calls) == ["c", "e"]
    assert result.run_id == first.run_id
    assert comparable(result) == comparable(executor(DIAMOND, None, Work()).run())
    assert store.load(first.run_id)["status"] == "completed"


def test_resume_takes_the_inputs_the_run_was_started_with(store: SQLiteStore) -> None:
    workflow = Workflow("t", [work("a", name="{{inputs.x}}")], inputs={"x": {"default": "d"}})
    job = Work()
    job.broken = {"mine"}
    run_id = executor(workflow, store, job, {"x": "mine"}).run().run_id
    job.broken = set()
    assert executor(workflow, store, job).resume(run_id)["a"].outputs == {"output": "did mine"}


NESTED = Workflow(
    "nested",
    [
        Step(id="items", type="parallel", for_each="{{inputs.items}}", tasks=[work("t", name="{{item}}").to_dict()]),
        Step(id="loop", type="loop", max_iterations=3, until="iteration == 2", steps=[work("l", name="loop{{iteration}}").to_dict()]),
        Step(id="last", type="transform", function="template", template="{{steps.items.t.1}} {{steps.loop.l}} {{steps.loop.iterations}}"),
    ],
)


def test_finished_items_and_iterations_inside_containers_stay_finished(store: SQLiteStore) -> None:
    inputs, job = {"items": [f"i{n}" for n in range(6)]}, Work()
    job.broken = {"i4", "loop1"}
    run_id = executor(NESTED, store, job, inputs).run().run_id
    job.broken, job.calls = set(), []
    result = executor(NESTED, store, job, inputs).resume(run_id)
    assert sorted(job.calls) == ["i4", "loop1", "loop2"]
    assert comparable(result) == comparable(executor(NESTED, None, Work(), inputs).run())


def test_a_completed_container_is_seen_whole_by_what_follows(store: SQLiteStore) -> None:
    workflow = Workflow("t", [
        Step(id="loop", type="loop", max_iterations=2, until="iteration == 1", steps=[work("l").to_dict(), work("m", "l").to_dict()]),
        work("after", "loop", name="{{steps.loop.m.output}}/{{steps.loop.iterations}}"),
    ])  # fmt: skip
    job = Work()
    job.broken = {"did m/2"}
    run_id = executor(workflow, store, job).run().run_id
    job.broken = set()
    assert executor(workflow, store, job).resume(run_id)["after"].outputs == {"output": "did did m/2"}


def test_from_runs_a_step_and_what_follows_it_again(store: SQLiteStore) -> None:
    job = Work()
    run_id = executor(DIAMOND, store, job).run().run_id
    job.calls = []
    assert executor(DIAMOND, store, job).resume(run_id, from_step="c").status == "completed"
    assert sorted(job.calls) == ["c", "e"]
    with pytest.raises(OrchestratorError, match="did you mean 'join'"):
        executor(DIAMOND, store, job).resume(run_id, from_step="joim")


def test_a_changed_workflow_is_refused_with_the_difference_unless_forced(store: SQLiteStore) -> None:
    job = Work()
    job.broken = {"c"}
    run_id = executor(DIAMOND, store, job).run().run_id
    changed = Workflow.from_dict(DIAMOND.to_dict())
    changed.steps = [step if step.id != "c" else work("c", "a", name="other") for step in changed.steps]
    with pytest.raises(OrchestratorError, match="name: other"):
        executor(changed, store, job).resume(run_id)
    assert executor(changed, store, job).resume(run_id, force=True)["c"].outputs == {"output": "did other"}


def test_a_run_that_is_running_cannot_be_resumed(store: SQLiteStore, tmp_path: Path) -> None:
    started, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        started.set()
        go_on.wait(20)

    running = WorkflowExecutor(Workflow("t", [Step(id="a", type="action", action="wait")]), actions={"wait": wait}, store=store)
    thread = threading.Thread(target=running.run)
    thread.start()
    started.wait(10)
    try:
        with SQLiteStore(tmp_path / "runs.db") as other, pytest.raises(OrchestratorError, match="held by a running process"):
            WorkflowExecutor(running.workflow, actions={"wait": wait}, store=other).resume(store.runs()[0]["run_id"])
    finally:
        go_on.set()
        thread.join()


def test_resume_is_awaitable_inside_a_loop(store: SQLiteStore) -> None:
    import asyncio

    job = Work()
    run_id = executor(DIAMOND, store, job).run().run_id

    async def main() -> str:
        return (await executor(DIAMOND, store, job).resume(run_id)).status

    assert asyncio.run(main()) == "completed"


def test_a_store_that_fails_ends_the_run_and_loses_no_result(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(run_id: str, step_id: str, state: Any, on_durable: Any) -> None:
        threading.Timer(0.01, on_durable, (OrchestratorError("the disk is full"),)).start()

    monkeypatch.setattr(store, "record", record)
    result = executor(DIAMOND, store, Work()).run()
    assert result["a"].outputs == {"output": "did a"}
    assert result.status == "failed"
    assert "the disk is full" in result["b"].error["message"]


KILLED = """
import json, os, sys, time
import llm_orchestrator as engine
database, log, run_id = sys.argv[1:]
def act(name):
    with open(log, "a") as file:
        file.write(f"{name}\\n")
    time.sleep(0.004)
    return f"did {name}"
step = lambda step_id, name, **keys: {"id": step_id, "type": "action", "action": "act", "name": name, **keys}
workflow = engine.Workflow.from_dict({"name": "killed", "steps": [
    step("a", "a"), step("b", "b{{steps.a}}"),
    {"id": "each", "type": "parallel", "for_each": list(range(12)), "tasks": [step("t", "{{item}}"), step("u", "u{{steps.t}}")]},
    {"id": "loop", "type": "loop", "max_iterations": 4, "until": "iteration == 3", "steps": [step("l", "l{{iteration}}")]},
    step("z", "{{steps.each.t}}{{steps.loop.l}}{{steps.b}}"),
], "outputs": {"z": "{{steps.z}}"}})
with engine.SQLiteStore(database) as store:
    executor = engine.WorkflowExecutor(workflow, actions={"act": act}, store=store, max_concurrency=3)
    print("ready", flush=True)
    result = executor.resume(run_id) if run_id else executor.run()
    print(json.dumps(result.to_dict()))
"""


def killed_and_resumed(tmp_path: Path, seed: int) -> None:
    """Runs a workflow in processes that are killed at random moments until one gets to its end."""
    chance, database, log = random.Random(seed), tmp_path / f"{seed}.db", tmp_path / f"{seed}.log"
    run_id, kills, answer = "", 0, ""
    while not answer:
        before: dict[str, Any] = {}
        if database.exists():
            with SQLiteStore(database) as store:
                run_id = next((run["run_id"] for run in store.runs()), "")
                before = store.load(run_id)["steps"] if run_id else {}
        calls = log.read_text() if log.exists() else ""
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(database), str(log), run_id], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )  # fmt: skip
        assert process.stdout and process.stdout.readline() == "ready\n"
        if kills < 4:
            time.sleep(chance.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
            kills += 1
        answer = process.communicate(timeout=60)[0]
        made = (log.read_text() if log.exists() else "")[len(calls) :].splitlines()
        done = {str(state["outputs"]["output"])[4:] for state in before.values() if state["status"] == "completed" and state["type"] == "action"}
        assert not done & set(made), f"seed {seed}: called again although stored as completed"
    undisturbed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "whole.db"), str(tmp_path / "whole.log"), ""], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}, check=True,
    ).stdout  # fmt: skip
    assert comparable(json.loads(answer)) == comparable(json.loads(undisturbed.splitlines()[-1]))
    with SQLiteStore(database) as store:
        run = store.load(store.runs()[0]["run_id"])
        assert store.verify(run["run_id"]) == []
        assert {state["status"] for state in run["steps"].values()} == {"completed"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_run_goes_on_and_no_stored_step_is_called_again(tmp_path: Path, seed: int) -> None:
    killed_and_resumed(tmp_path, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 160))
def test_hundreds_of_kills(tmp_path: Path, seed: int) -> None:
    killed_and_resumed(tmp_path, seed)


# ---- Approvals -------------------------------------------------------------------------------------------------------

ASKING = Workflow("asking", [
    work("a"),
    Step(id="ok", type="approval", message="publish {{steps.a}}?"),
    work("b", name="{{steps.ok.output.by}}"), work("other"),
])  # fmt: skip


def test_an_approval_pauses_the_run_and_a_decision_goes_on(store: SQLiteStore) -> None:
    job, events = Work(), []  # type: ignore[var-annotated]
    paused = executor(ASKING, store, job, on_event=events.append).run()
    assert (paused.status, sorted(job.calls)) == ("paused", ["a", "other"])
    assert [event["message"] for event in events if event["type"] == "approval_needed"] == ["publish did a?"]
    assert store.load(paused.run_id)["status"] == "paused"
    assert executor(ASKING, store, job).resume(paused.run_id).status == "paused"  # no decision yet
    result = executor(ASKING, store, job).resume(paused.run_id, decisions={"ok": (True, {"by": "me"})})
    assert (result.status, result["ok"].outputs) == ("completed", {"output": {"approved": True, "by": "me"}})
    assert sorted(job.calls) == ["a", "me", "other"]


def test_a_rejection_fails_the_step(store: SQLiteStore) -> None:
    paused = executor(ASKING, store, Work()).run()
    result = executor(ASKING, store, Work()).resume(paused.run_id, decisions={"ok": (False, {})})
    assert (result.status, result["ok"].status, result["b"].reason) == ("failed", "failed", "upstream_failed")


def test_an_approval_inside_containers_pauses_and_goes_on(store: SQLiteStore) -> None:
    approval = {"id": "ok", "type": "approval"}
    tasks = [work("t", name="{{item}}").to_dict(), {**approval, "depends_on": "t"}, work("u", "ok", name="u{{item}}").to_dict()]
    workflow = Workflow("t", [Step(id="each", type="parallel", for_each=["x", "y"], tasks=tasks), work("z", "each")])
    job = Work()
    paused = executor(workflow, store, job).run()
    assert (paused.status, sorted(job.calls)) == ("paused", ["x", "y"])
    half = executor(workflow, store, job).resume(paused.run_id, decisions={"each.0.ok": (True, {})})
    assert (half.status, sorted(job.calls)) == ("paused", ["ux", "x", "y"])
    assert executor(workflow, store, job).resume(paused.run_id, decisions={"each.1.ok": (True, {})}).status == "completed"
    assert sorted(job.calls) == ["ux", "uy", "x", "y", "z"]


def test_an_approval_without_a_store_is_refused_before_the_first_step() -> None:
    job = Work()
    with pytest.raises(OrchestratorError, match="store"):
        executor(ASKING, None, job).run()
    assert job.calls == []


# ---- Cache, cassettes ------------------------------------------------------------------------------------------------


class Model:
    """A provider that counts its calls."""

    def __init__(self, *script: Exception) -> None:
        self.calls, self.script = 0, list(script)

    def complete(self, request: CompletionRequest) -> CompletionResponse:
        self.calls += 1
        if self.script:
            raise self.script.pop(0)
        return CompletionResponse(f"{request.prompt}#{self.calls}", request.model, 3, 2, "stop")


def ask(step_id: str, prompt: str = "hi", **keys: Any) -> Step:
    names = ["text", "model", "tokens", "meta"]
    return Step(id=step_id, type="llm", provider="p", model="m", prompt=prompt, output=names, **keys)


def test_a_cached_answer_costs_nothing_and_is_marked(tmp_path: Path) -> None:
    model, cache = Model(), ResponseCache(tmp_path / "cache.db")
    workflow = Workflow("t", [ask("a"), ask("b", depends_on=["a"]), ask("c", cache=False), ask("d", temperature=1, depends_on=["a"])])
    result = WorkflowExecutor(workflow, providers={"p": model}, cache=cache, max_concurrency=1).run()
    assert model.calls == 3
    assert result["b"].outputs["text"] == result["a"].outputs["text"] and result["b"].outputs["meta"]["cached"] is True
    assert result["b"].usage is None and result.usage["calls"] == 3
    cache.close()
    again = ResponseCache(tmp_path / "cache.db")
    assert WorkflowExecutor(Workflow("t", [ask("x")]), providers={"p": model}, cache=again).run().usage["calls"] == 0
    again.close()


def test_a_recorded_run_is_replayed_without_its_provider(tmp_path: Path) -> None:
    workflow = Workflow("t", [ask("a", retry={"initial_delay": 1}), ask("b", "{{steps.a.text}} more")])
    path, model = str(tmp_path / "tape.jsonl"), Model(ProviderError("busy", provider="p", status=503, retryable=True))
    tape = Cassette(path, False)
    recorded = WorkflowExecutor(workflow, providers={"p": model}, cassette=tape).run()
    tape.close()
    unused = Model()
    tape = Cassette(path, True)
    replayed = WorkflowExecutor(workflow, providers={"p": unused}, cassette=tape).run()
    assert comparable(replayed) == comparable(recorded)
    assert (unused.calls, replayed["a"].attempts) == (0, 2)
    other = WorkflowExecutor(Workflow("t", [ask("a", "hi there")]), providers={"p": unused}, cassette=tape).run()
    assert other["a"].error["type"] == ExecutionError.__name__
    assert "hi there" in other["a"].error["message"] and '"content": "hi"' in other["a"].error["message"]
    tape.close()


# ---- The command line ------------------------------------------------------------------------------------------------

FAILING = """
name: shop
inputs: {x: {default: 1}}
steps:
  - {id: a, type: llm, provider: echo, model: m, prompt: "hello {{inputs.x}}"}
  - {id: b, type: action, action: write_file, path: "{{inputs.file}}", content: "{{steps.a}}"}
""".replace("inputs: {x: {default: 1}}", "inputs: {x: {default: 1}, file: {default: '../no'}}")


def test_a_failed_run_is_shown_listed_and_resumed_from_the_command_line(program: Program) -> None:
    program.write("wf.yaml", FAILING)
    failed = program.run("run", "wf.yaml", "--store", "runs.db", "-q")
    run_id = json.loads(failed.stdout)["run_id"]
    assert failed.returncode == 1
    environment = {"LLM_ORCHESTRATOR_STORE": "runs.db"}
    assert run_id in program.run("runs", "list", **environment).stdout
    entry = json.loads(program.run("runs", "failures", "--json", **environment).stdout)[0]
    assert (entry["step_id"], entry["inputs"]) == ("b", {"x": 1, "file": "../no"})
    program.write("wf.yaml", FAILING.replace("hello", "goodbye"))
    changed = program.run("resume", run_id, **environment)
    assert changed.returncode == 2
    assert "+" in changed.stderr and "goodbye" in changed.stderr
    program.write("wf.yaml", FAILING)
    again = program.run("resume", "--failed", **environment)
    assert (again.returncode, json.loads(again.stdout)["steps"]["a"]["status"]) == (1, "completed")
    assert program.run("runs", "audit", run_id, "--verify", **environment).returncode == 0
    assert json.loads(program.run("runs", "export", run_id, **environment).stdout)["audit"]
    assert program.run("runs", "delete", run_id, **environment).returncode == 0
    assert program.run("runs", "show", run_id, **environment).returncode == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resume", "x"], "--store"),
        (["resume", "--store", "s.db"], "--failed"),
        (["resume", "nope", "--store", "s.db"], "nope"),
        (["runs", "show", "--store", "s.db"], "takes the id"),
        (["runs", "prune", "--store", "s.db"], "--older-than"),
        (["runs", "prune", "--older-than", "soon", "--store", "s.db"], "30d"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_usage_of_stores_exits_with_2_and_says_why(program: Program, arguments: list[str], message: str) -> None:
    done = program.run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


BATCH = """
name: b
inputs: {x: {type: string, required: true}, ms: {default: 0}}
steps:
  - {id: s, type: action, action: sleep, seconds: "{{inputs.ms}}ms"}
  - {id: a, type: llm, provider: echo, model: m, prompt: "{{inputs.x}}", depends_on: s}
outputs: {r: "{{steps.a}}"}
"""


def batch_lines(program: Program, *lines: str) -> None:
    program.write("b.yaml", BATCH)
    program.write("in.jsonl", "".join(f"{line}\n" for line in lines))


def results(program: Program, name: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (program.folder / name).read_text("utf-8").splitlines()]


def test_a_batch_gives_results_in_input_order(program: Program) -> None:
    batch_lines(program, *(json.dumps({"x": str(n), "ms": 50 if n % 5 == 0 else 0}) for n in range(20)))
    done = program.run("run", "b.yaml", "--batch", "in.jsonl", "--out", "out.jsonl", "--max-concurrency", "5")
    assert (done.returncode, done.stdout) == (0, "")
    assert [(entry["line"], entry["outputs"]["r"]) for entry in results(program)] == [(n + 1, f"echo: {n}") for n in range(20)]
    assert not (program.folder / "out.jsonl.partial").exists()
    assert "20/20 lines" in done.stderr


def test_bad_lines_end_the_batch_or_are_reported(program: Program) -> None:
    batch_lines(program, '{"x": "a"}', '{"x": 1}', "{nonsense", "[]", "", '{"x": "b"}')
    done = program.run("run", "b.yaml", "--batch", "in.jsonl", "--out", "out.jsonl")
    assert done.returncode == 2
    assert "in.jsonl:2:" in done.stderr and "--keep-going" in done.stderr
    done = program.run("run", "b.yaml", "--batch", "in.jsonl", "--out", "out.jsonl", "--keep-going")
    assert done.returncode == 1
    assert [(entry["line"], entry["status"]) for entry in results(program)] == [
        (1, "completed"), (2, "invalid"), (3, "invalid"), (4, "invalid"), (6, "completed"),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_killed_batch_goes_on_without_doing_a_line_twice(program: Program) -> None:
    program.write("plugin.py", "def note(x):\n    with open('log', 'a') as f:\n        f.write(x + '\\n')\n    return x\nactions = {'note': note}\n")
    program.write("b.yaml", BATCH.replace("type: llm, provider: echo, model: m, prompt:", "type: action, action: note, x:"))
    program.write("in.jsonl", "".join(json.dumps({"x": str(n), "ms": n % 7 * 3}) + "\n" for n in range(1000)))
    command = [sys.executable, "-m", "llm_orchestrator", "run", "b.yaml", "--batch", "in.jsonl", "--out", "out.jsonl"]
    command += ["--plugin", "plugin.py", "-q", "--max-concurrency", "4"]
    for _ in range(3):
        process = subprocess.Popen(command, cwd=program.folder, env=program.environment())
        time.sleep(0.5)
        process.kill()
        process.wait()
    assert subprocess.run(command, cwd=program.folder, env=program.environment(), check=False).returncode == 0
    assert [entry["outputs"]["r"] for entry in results(program)] == [str(n) for n in range(1000)]
    calls = (program.folder / "log").read_text().split()
    assert set(calls) == {str(n) for n in range(1000)}
    assert len(calls) <= 1000 + 3 * 4  # only what was running when it was killed is done again


def test_results_of_another_batch_are_not_overwritten(program: Program) -> None:
    batch_lines(program, '{"x": "a"}')
    program.write("out.jsonl", "mine\n")
    done = program.run("run", "b.yaml", "--batch", "in.jsonl", "--out", "out.jsonl")
    assert done.returncode == 2
    assert (program.folder / "out.jsonl").read_text() == "mine\n"


def test_a_resumed_run_takes_over_how_it_was_started_and_one_that_cannot_be_resumed_stops_no_other(program: Program) -> None:
    program.write("plugins/p.py", "import os\ndef act():\n    if not os.path.exists('go'):\n        raise ValueError('not yet')\n    return 'done'\nactions = {'act': act}\n")
    text = "name: n\nsteps:\n  - {id: a, type: action, action: act}\n  - {id: w, type: action, action: write_file, path: x, content: y, depends_on: a}\n"
    for name in ("one", "two"):
        program.write(f"{name}.yaml", text)
        done = program.run("run", f"{name}.yaml", "--plugin", "plugins/p.py", "--output-dir", "made", "--store", "s.db", "-q")
        assert done.returncode == 1
    program.write("one.yaml", text.replace("content: y", "content: z"))
    program.write("go", "")
    done = program.run("resume", "--failed", "--store", "s.db", "--print", "steps.a.output", "-q")
    assert (done.returncode, done.stdout) == (2, "done\n")
    assert "has changed" in done.stderr
    assert (program.folder / "made" / "x").read_text() == "y"


def test_the_pytest_example_passes() -> None:
    example = Path(__file__).parent.parent / "examples" / "test_simple_workflow.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(example)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("wanted", [False, True])
def test_the_audit_holds_prompts_and_answers_only_if_they_are_wanted(store: SQLiteStore, wanted: bool) -> None:
    workflow = Workflow("t", [ask("a", "a private prompt")])
    run_id = WorkflowExecutor(workflow, providers={"p": Model()}, store=store, audit_texts=wanted).run().run_id
    calls = [event["details"] for event in store.audit(run_id) if event["kind"] == "provider_call"]
    assert len(calls) == 1 and len(calls[0]["asked"]) == 64
    assert ("a private prompt" in json.dumps(calls)) is wanted
    assert store.verify(run_id) == []


def test_a_cache_has_an_age_and_a_size_limit_on_the_command_line(program: Program) -> None:
    program.write("wf.yaml", FAILING.split("  - {id: b")[0])
    for arguments, calls in ((), 1), ((), 0), (("--cache-max-age", "1h"), 0), (("--cache-max-mb", "0.00001"), 0):
        done = program.run("run", "wf.yaml", "--cache", "c.db", "--print", "usage.calls", "-q", *arguments)
        assert done.stdout == f"{calls}\n"
    assert program.run("run", "wf.yaml", "--cache", "c.db", "--cache-max-age", "soon").returncode == 2


# what belongs to a run, whoever goes on with it


def test_a_budget_and_usage_go_on_where_a_run_is_resumed(store: SQLiteStore) -> None:
    def call(step_id: str, **keys: Any) -> Step:
        return Step(id=step_id, type="llm", provider="p", model="m", prompt="x", **keys)

    workflow = Workflow(
        "t",
        [
            Step(id="pair", type="parallel", tasks=[call("a"), call("b")]),
            call("items", for_each=[1, 2]),
            work("w", "pair", "items"),
            call("last", depends_on="w"),
        ],
        budget={"max_calls": 4},
    )
    answer = CompletionResponse(text="y", model="m", input_tokens=2, output_tokens=1)
    job = Work()
    job.broken = {"w"}
    first = WorkflowExecutor(workflow, actions={"work": job}, providers={"p": lambda request: answer}, store=store).run()
    assert (first.status, first.usage["calls"], first.usage["total_tokens"]) == ("failed", 4, 12)
    job.broken = set()
    again = WorkflowExecutor(workflow, actions={"work": job}, providers={"p": lambda request: answer}, store=store)
    result = again.resume(first.run_id)
    assert (result.status, result.usage["calls"], result.usage["total_tokens"]) == ("failed", 4, 12)
    assert result["last"].error["type"] == "BudgetExceededError"


def test_a_resumed_run_sees_nothing_of_the_dead_attempt_of_a_container(store: SQLiteStore) -> None:
    seen: list[Any] = []
    attempts = [0]

    def turn(iteration: int) -> str:
        attempts[0] += iteration == 0
        if attempts[0] == 1 and iteration == 2:
            raise ConnectionError("the first attempt ends here")
        return f"{'stale' if attempts[0] == 1 else 'end'}-{iteration}"

    def end(value: Any) -> Any:
        seen.append(value)
        if len(seen) == 1:
            raise ValueError("once")
        return value

    body = Step(id="c", type="action", action="turn", iteration="{{iteration}}", retry={"max_attempts": 1})
    workflow = Workflow(
        "t",
        [
            Step(
                id="l", type="loop", max_iterations=4, steps=[body], until="steps.c == 'end-0' or iteration == 3",
                retry={"max_attempts": 2, "initial_delay": 1},
            ),
            Step(id="z", type="action", action="end", value="{{steps.l.c}}", depends_on="l"),
        ],
        outputs={"c": "{{steps.l.c}}"},
    )  # fmt: skip
    actions = {"turn": turn, "end": end}
    first = WorkflowExecutor(workflow, actions=actions, store=store).run()
    assert (first.status, seen) == ("failed", ["end-0"])
    assert {step_id for step_id in store.load(first.run_id)["steps"] if step_id.startswith("l.")} == {"l.0.c"}
    result = WorkflowExecutor(workflow, actions=actions, store=store).resume(first.run_id)
    assert (result.status, result.outputs, seen) == ("completed", {"c": "end-0"}, ["end-0", "end-0"])


def test_resuming_leaves_the_inputs_of_the_executor_alone(store: SQLiteStore) -> None:
    workflow = Workflow("t", [work("a", name="{{inputs.x}}")], inputs={"x": {}})
    old = executor(workflow, store, Work(), {"x": "old"}).run().run_id
    mine = executor(workflow, store, Work(), {"x": "mine"})
    assert mine.resume(old)["a"].outputs == {"output": "did old"}
    assert mine.run()["a"].outputs == {"output": "did mine"}


def test_a_run_that_dies_while_it_is_resumed_is_interrupted_whatever_it_was_before(store: SQLiteStore) -> None:
    job = Work()
    job.broken = {"a"}
    run_id = executor(DIAMOND, store, job).run().run_id
    with SQLiteStore(store.name) as other:
        other.claim(run_id)
        with other._transaction() as execute:  # its process has died, and did not give the run back
            execute("UPDATE runs SET holder = '1:0:gone', lease_until = 1 WHERE run_id = ?", (run_id,))
        other._held.clear()
    assert store.load(run_id)["status"] == "interrupted"
    assert [run["run_id"] for run in store.runs(status="interrupted")] == [run_id]
    assert store.runs(status="failed") == []
    job.broken = set()
    assert executor(DIAMOND, store, job).resume(run_id).status == "completed"
    assert store.load(run_id)["status"] == "completed"


@pytest.mark.parametrize("concurrency", ["1", "2", "4"])
@pytest.mark.parametrize("to_file", [True, False])
def test_empty_lines_of_a_batch_lose_no_result(program: Program, concurrency: str, to_file: bool) -> None:
    text = "name: t\nsteps:\n  - {id: a, type: transform, function: template, template: '{{inputs.t}}'}\n"
    workflow = program.write("wf.yaml", text)
    lines = program.write("in.jsonl", '\n{"t": 1}\n\n  \n{"t": 2}\n{"t": 3}\n\n{"t": 4}\n\n')
    out = program.folder / "out.jsonl"
    options = ["--out", str(out)] if to_file else []
    ended = program.run("run", workflow, "--batch", lines, "--max-concurrency", concurrency, *options)
    assert ended.returncode == 0, ended.stderr
    results = [json.loads(line) for line in (out.read_text() if to_file else ended.stdout).splitlines()]
    assert [(one["line"], one["steps"]["a"]["outputs"]["output"]) for one in results] == [(2, 1), (5, 2), (6, 3), (8, 4)]
    assert "4/4 lines" in ended.stderr
    assert not (program.folder / "out.jsonl.partial").exists()


@pytest.mark.parametrize("most", [0, -1])
def test_a_cache_that_may_keep_nothing_keeps_nothing(tmp_path: Path, most: int) -> None:
    workflow = Workflow("t", [Step(id="a", type="llm", provider="p", model="m", prompt="x")])
    calls: list[Any] = []
    with ResponseCache(tmp_path / "cache.db", max_bytes=most) as cache:
        for _ in range(2):
            assert WorkflowExecutor(workflow, providers={"p": lambda request: calls.append(1) or "y"}, cache=cache).run()["a"].outputs["output"] == "y"
    assert len(calls) == 2


def test_answers_that_broke_their_schema_are_not_kept_when_the_step_fails(tmp_path: Path) -> None:
    answers = iter(["bad", "worse", "7"])
    step = Step(id="a", type="llm", provider="p", model="m", prompt="x", schema={"type": "integer"}, schema_retries=1)
    with ResponseCache(tmp_path / "cache.db") as cache:
        runner = WorkflowExecutor(Workflow("t", [step]), providers={"p": lambda request: next(answers)}, cache=cache)
        assert runner.run().status == "failed"
        assert [runner.run()["a"].outputs["output"] for _ in range(2)] == [7, 7]


def test_a_batch_goes_on_only_with_what_it_was_begun_with(program: Program) -> None:
    text = "name: t\ninputs: {t: {}, n: {default: 0}}\nsteps:\n  - {id: a, type: action, action: log, message: '{{inputs.t}}'}\n"
    workflow, lines = program.write("wf.yaml", text), program.write("in.jsonl", '{"t": 1}\n[]\n{"t": 2}\n')
    command = ["run", workflow, "--batch", lines, "--out", "out.jsonl", "-q"]
    assert program.run(*command).returncode == 2  # the second line ends it
    for other in (["--set", "n=9"], ["--offline"]):
        done = program.run(*command, *other)
        assert done.returncode == 2 and "of another batch" in done.stderr
    done = program.run(*command, "--keep-going")
    assert [json.loads(line)["line"] for line in (program.folder / "out.jsonl").read_text().splitlines()] == [1, 2, 3]
