"""Room 14, Store: runs, checkpoints, cache."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_orchestrator as engine
from llm_orchestrator import (
    CompletionRequest,
    CompletionResponse,
    EmbeddingRequest,
    EmbeddingResponse,
    ExecutionError,
    OrchestratorError,
    QuotaExceededError,
    RateLimitError,
    ResponseCache,
    SQLiteStore,
    Store,
    ValidationError,
)

ROOT = Path(__file__).resolve().parent.parent
RUN = {"run_id": "r1", "workflow": "demo", "workflow_text": "name: demo\n", "workflow_hash": "abc", "inputs": {"n": 1}}
DONE = {"status": "completed", "type": "llm", "outputs": {"text": "hi"}}
FAILED = {"status": "failed", "type": "llm", "outputs": {"text": None}, "error": {"type": "RateLimitError", "message": "no"}}


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "runs.db")


@pytest.fixture
def store(path: str) -> Iterator[SQLiteStore]:
    with SQLiteStore(path, busy_timeout_seconds=0.2) as opened:
        yield opened


def run(run_id: str, **fields: Any) -> dict[str, Any]:
    return {**RUN, "run_id": run_id, **fields}


def finished(store: Store, run_id: str, states: dict[str, Any], status: str = "completed", **fields: Any) -> None:
    store.begin(run(run_id, **fields))
    for step_id, state in states.items():
        store.record(run_id, step_id, state)
    store.update(run_id, status, {"outputs": {"x": 1}}, release=True)


def edit(path: str, *statements: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def in_process(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "import sys, llm_orchestrator as engine\n" + textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options,
    )  # fmt: skip


# ---- What is written is what is read ---------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(
        st.characters(), max_size=8
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(JSON, JSON, st.text(st.characters(), max_size=20))
def test_a_run_is_loaded_exactly_as_it_was_written(inputs: Any, output: Any, text: str) -> None:
    with SQLiteStore(":memory:") as store:
        store.begin(run("r1", inputs=inputs, workflow_text=text))
        store.record("r1", "a.0.b", {"status": "completed", "outputs": {"x": output}})
        store.update("r1", "completed", {"outputs": output}, release=True)
        loaded = store.load("r1")
        assert (loaded["inputs"], loaded["outputs"], loaded["workflow_text"]) == (inputs, output, text)
        assert loaded["steps"] == {"a.0.b": {"status": "completed", "outputs": {"x": output}}}
        assert store.verify("r1") == []


def test_a_store_outlives_its_process(path: str) -> None:
    with SQLiteStore(path) as store:
        finished(store, "r1", {"a": DONE, "b": FAILED}, "failed")
    with SQLiteStore(path) as store:
        loaded = store.load("r1")
        assert loaded["status"] == "failed"
        assert loaded["workflow_text"] == RUN["workflow_text"]
        assert loaded["steps"] == {"a": DONE, "b": FAILED}
        assert loaded["held_by"] is None
        assert store.export("r1") == {**loaded, "audit": store.audit("r1")}
        json.dumps(store.export("r1"))


def test_the_last_state_of_a_step_replaces_those_before(store: SQLiteStore) -> None:
    finished(store, "r1", {"a": FAILED}, "failed")
    store.claim("r1")
    store.record("r1", "a", DONE)
    store.update("r1", "completed", release=True)
    assert store.load("r1")["steps"] == {"a": DONE}
    assert store.verify("r1") == []
    assert [event["kind"] for event in store.audit("r1")] == [
        "run_started", "steps", "run_failed", "run_claimed", "steps", "run_completed",
    ]  # fmt: skip


def test_forgotten_steps_are_gone_and_the_trail_says_so(store: SQLiteStore) -> None:
    store.begin(RUN)
    for step_id in ("a", "b", "b.0", "c"):
        store.record("r1", step_id, DONE)
    store.forget("r1", ["b", "b.0"])
    assert set(store.load("r1")["steps"]) == {"a", "c"}
    assert store.verify("r1") == []


def test_runs_of_one_workflow_share_its_text(store: SQLiteStore, path: str) -> None:
    for number in range(20):
        finished(store, f"r{number}", {}, workflow_text="x" * 100_000)
    store.close()
    assert os.path.getsize(path) < 300_000
    edit(path, "DELETE FROM runs WHERE run_id <> 'r3'")
    with SQLiteStore(path) as again:
        assert again.load("r3")["workflow_text"] == "x" * 100_000
        again.delete("r3")
    connection = sqlite3.connect(path)
    counts = [connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] for table in ("runs", "texts")]
    connection.close()
    assert counts == [0, 0]


def test_the_callback_comes_after_the_commit(store: SQLiteStore, path: str) -> None:
    seen: list[Any] = []

    def look(error: Any) -> None:
        connection = sqlite3.connect(path)
        seen.append((error, connection.execute("SELECT COUNT(*) FROM steps").fetchone()[0]))
        connection.close()

    store.begin(RUN)
    for number in range(5):
        store.record("r1", f"s{number}", DONE, look)
        store.flush()
    assert seen == [(None, number) for number in range(1, 6)]


def test_what_gathers_during_a_commit_is_committed_together(store: SQLiteStore) -> None:
    store.begin(RUN)
    statements: list[str] = []
    store._connection.set_trace_callback(statements.append)
    with store._lock:  # the writer is held up
        for number in range(300):
            store.record("r1", f"s{number}", DONE)
    store.flush()
    assert 1 <= statements.count("COMMIT") <= 3
    assert len(store.load("r1")["steps"]) == 300


def test_a_failing_listener_harms_nobody_else(store: SQLiteStore) -> None:
    store.begin(RUN)
    told: list[Any] = []
    with store._lock:
        store.record("r1", "a", DONE, lambda error: 1 / 0)
        store.record("r1", "b", DONE, told.append)
    store.flush()
    assert told == [None]


# ---- Leases ----------------------------------------------------------------------------------------------------------


def test_of_many_that_claim_a_run_at_once_one_gets_it(path: str) -> None:
    with contextlib.ExitStack() as opened:
        stores = [opened.enter_context(SQLiteStore(path)) for _ in range(4)]
        finished(stores[0], "r1", {})
        for _ in range(15):
            claimed: list[SQLiteStore] = []
            together = threading.Barrier(8)

            def claim(store: SQLiteStore, claimed: Any = claimed, together: Any = together) -> None:
                together.wait()
                with contextlib.suppress(OrchestratorError):
                    store.claim("r1")
                    claimed.append(store)

            threads = [threading.Thread(target=claim, args=(store,)) for store in stores * 2]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(claimed) == 1
            claimed[0].update("r1", "completed", release=True)
            assert stores[0].verify("r1") == []


def test_a_run_is_written_by_one_process_at_a_time(store: SQLiteStore, path: str) -> None:
    store.begin(RUN)
    with SQLiteStore(path) as other:
        for refused in (lambda: other.claim("r1"), lambda: other.delete("r1"), lambda: store.claim("r1")):
            with pytest.raises(OrchestratorError, match="held by a running process"):
                refused()
        with pytest.raises(OrchestratorError, match="not held"):
            other.update("r1", "completed")
        store.update("r1", "paused", {"waits_for": "ok"}, release=True)
        claimed = other.claim("r1")
        assert claimed["held_by"] == other.holder
        assert claimed["waits_for"] == "ok"
        with pytest.raises(OrchestratorError, match="not held"):
            store.update("r1", "completed")


def test_closing_gives_the_leases_back(path: str) -> None:
    first = SQLiteStore(path)
    first.begin(RUN)
    first.record("r1", "a", DONE)
    first.close()
    with SQLiteStore(path) as second:
        assert second.runs()[0]["status"] == "interrupted"
        assert second.claim("r1")["steps"] == {"a": DONE}
        assert second.runs()[0]["status"] == "running"


def test_a_lease_is_renewed_without_writes(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_HEARTBEAT_SECONDS", 0.05)
    with SQLiteStore(path) as store:
        store.begin(RUN)
        connection = sqlite3.connect(path)

        def ending() -> float:
            return float(connection.execute("SELECT lease_until FROM runs").fetchone()[0])

        first, deadline = ending(), time.monotonic() + 20
        while ending() <= first and time.monotonic() < deadline:
            time.sleep(0.02)
        assert ending() > first
        connection.close()


def test_a_lease_of_another_machine_holds_until_it_runs_out(store: SQLiteStore, path: str) -> None:
    finished(store, "r1", {})
    take = "UPDATE runs SET holder = 'elsewhere/0:1:00.00', lease_until = "
    edit(path, f"{take}{time.time() + 20}")
    with pytest.raises(OrchestratorError, match=r"elsewhere.*ends in (19|20) s"):
        store.claim("r1")
    edit(path, f"{take}{time.time() - 1}")
    assert store.claim("r1")["held_by"] == store.holder


def test_who_lost_the_lease_writes_nothing_more(store: SQLiteStore, path: str) -> None:
    store.begin(RUN)
    store.record("r1", "a", DONE)
    store.flush()
    edit(path, "UPDATE runs SET lease_until = 0")  # as if this process had been stopped for a while
    with SQLiteStore(path) as other:
        other.claim("r1")
        errors: list[Any] = []
        store.record("r1", "b", DONE, errors.append)
        with pytest.raises(OrchestratorError, match="deleted or taken by another process"):
            store.update("r1", "completed")
        assert "taken by another" in str(errors[0])
        other.record("r1", "c", DONE)
        other.update("r1", "completed", release=True)
        assert set(other.load("r1")["steps"]) == {"a", "c"}
        assert other.verify("r1") == []


HOLD = """
store = engine.SQLiteStore(sys.argv[1])
store.begin({"run_id": "r1", "workflow": "w"})
print("held", flush=True)
sys.stdin.read()
"""


def test_the_lease_of_a_killed_process_is_free_at_once(path: str) -> None:
    holder = in_process(HOLD, path, stdin=subprocess.PIPE)
    with holder, SQLiteStore(path) as store:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OrchestratorError, match="held by a running process"):
            store.claim("r1")
        assert store.runs(status="running")
        holder.kill()
        holder.wait()
        assert [entry["run_id"] for entry in store.runs(status="interrupted")] == ["r1"]
        assert store.runs(status="running") == []
        assert store.claim("r1")["held_by"] == store.holder


def test_a_process_id_that_was_used_before_is_no_holder(store: SQLiteStore, path: str) -> None:
    finished(store, "r1", {})
    host, pid, _ = store.holder.rsplit(":", 2)
    edit(path, f"UPDATE runs SET holder = '{host}:{pid}:0.0', lease_until = {time.time() + 20}")
    assert store.claim("r1")["held_by"] == store.holder


def test_a_forked_process_is_told_to_open_the_store_itself(store: SQLiteStore) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    store.begin(RUN)
    child = os.fork()
    if child == 0:
        outcome = 1
        with contextlib.suppress(BaseException):
            faults = []
            for call in (store.runs, store.flush, lambda: store.record("r1", "a", DONE)):
                try:
                    call()
                except OrchestratorError as error:
                    faults.append("fork" in str(error))
            outcome = 0 if faults == [True] * 3 else 1
        os._exit(outcome)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    store.update("r1", "completed", release=True)


def test_a_process_that_is_forked_during_a_commit_does_not_hang(store: SQLiteStore) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    held, let_go = threading.Event(), threading.Event()

    def commit() -> None:
        with store._lock:
            held.set()
            let_go.wait(20)

    thread = threading.Thread(target=commit)
    thread.start()
    held.wait(20)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        for call in (store.runs, lambda: store.begin(RUN), lambda: store.claim("r1"), store.close):
            with contextlib.suppress(OrchestratorError):
                call()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    let_go.set()
    thread.join()
    assert status == 0


def test_many_processes_share_one_file(path: str) -> None:
    code = """
        with engine.SQLiteStore(sys.argv[1]) as store:
            for number in range(4):
                run_id = f"{sys.argv[2]}-{number}"
                store.begin({"run_id": run_id, "workflow": "w", "workflow_text": "same"})
                for step in range(25):
                    store.record(run_id, f"s{step}", {"status": "completed", "outputs": {"x": step}})
                    if step % 10 == 0:
                        store.flush()
                store.update(run_id, "completed", release=True)
    """
    processes = [in_process(code, path, str(number)) for number in range(4)]
    assert [process.wait(60) for process in processes if process.communicate()] == [0] * 4
    with SQLiteStore(path) as store:
        runs = store.runs()
        assert len(runs) == 16
        for entry in runs:
            assert store.verify(entry["run_id"]) == []
            assert len(store.load(entry["run_id"])["steps"]) == 25


# ---- What goes wrong -------------------------------------------------------------------------------------------------


def test_a_state_that_is_no_json_is_refused_and_nothing_else(store: SQLiteStore) -> None:
    store.begin(RUN)
    circle: list[Any] = []
    circle.append(circle)
    for value in (object(), circle, {1: {2: {b"x": 1}}}, {"x": {1, 2}}):
        with pytest.raises(OrchestratorError, match="no JSON form"):
            store.record("r1", "a", {"status": "completed", "outputs": value})
        with pytest.raises(OrchestratorError, match="no JSON form"):
            store.update("r1", "completed", {"outputs": value})
    store.record("r1", "b", DONE)
    store.update("r1", "completed", release=True)
    assert set(store.load("r1")["steps"]) == {"b"}
    assert store.verify("r1") == []


def test_a_state_may_be_changed_once_it_was_recorded(store: SQLiteStore) -> None:
    store.begin(RUN)
    state = {"status": "completed", "outputs": {"x": [1]}}
    with store._lock:
        store.record("r1", "a", state)
        state["outputs"] = None
    store.flush()
    assert store.load("r1")["steps"] == {"a": {"status": "completed", "outputs": {"x": [1]}}}


def test_after_a_write_that_failed_nothing_follows_until_the_next_claim(store: SQLiteStore, path: str) -> None:
    store.begin(RUN)
    store.begin(run("r2"))
    told: list[Any] = []
    blocker = sqlite3.connect(path, isolation_level=None)
    store.record("r1", "a", DONE, told.append)
    store.flush()
    blocker.execute("BEGIN EXCLUSIVE")
    with store._lock:
        store.record("r1", "b", DONE, told.append)
        store.record("r1", "c", DONE, told.append)
    store.flush()
    blocker.execute("ROLLBACK")
    blocker.close()
    assert [error is None for error in told] == [True, False, False]
    for write in (lambda: store.record("r1", "d", DONE), lambda: store.update("r1", "completed")):
        with pytest.raises(OrchestratorError, match="keeps it locked"):
            write()
    store.record("r2", "a", DONE)
    assert set(store.claim("r1")["steps"]) == {"a"}
    store.record("r1", "d", DONE)
    for run_id in ("r1", "r2"):
        store.update(run_id, "completed", release=True)
        assert store.verify(run_id) == []
    assert set(store.load("r1")["steps"]) == {"a", "d"}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda store: store.load("nowhere"), "has no run 'nowhere'"),
        (lambda store: store.claim("nowhere"), "has no run 'nowhere'"),
        (lambda store: store.delete("nowhere"), "has no run 'nowhere'"),
        (lambda store: store.verify("nowhere"), "has no run 'nowhere'"),
        (lambda store: store.begin(RUN), "there is one already .*runs.run_id"),
        (lambda store: store.begin({"run_id": "x", "workflow": "w", "inputs": object()}), "has no JSON form"),
        (lambda store: store.begin({"run_id": "\ud800", "workflow": "w"}), "surrogates"),
        (lambda store: (store.close(), store.record("r1", "a", DONE)), "is closed"),
        (lambda store: (store.close(), store.runs()), "is closed"),
    ],
)
def test_wrong_calls_are_refused_in_words(store: SQLiteStore, call: Any, words: str) -> None:
    finished(store, "r1", {})
    with pytest.raises(OrchestratorError, match=words):
        call(store)


def garbage(path: str) -> None:
    Path(path).write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 40)


def text_file(path: str) -> None:
    Path(path).write_text("name: workflow\n" * 500)


def overwritten(path: str) -> None:
    with SQLiteStore(path) as store:
        for number in range(50):
            finished(store, f"r{number}", {"a": DONE})
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096 * 8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (garbage, "damaged"),
        (text_file, "damaged, or no SQLite database"),
        (overwritten, "damaged"),
        (os.mkdir, "cannot be opened"),
        (lambda path: edit(path, "CREATE TABLE recipes (name TEXT)"), "belongs to another program"),
        (lambda path: ResponseCache(path).close(), "another kind of file"),
        (lambda path: (SQLiteStore(path).close(), edit(path, "PRAGMA user_version = 99")), r"newer version \(99\)"),
    ],
)
def test_a_file_that_is_no_store_is_refused_in_words(path: str, make: Any, words: str) -> None:
    make(path)
    with pytest.raises(OrchestratorError, match=words) as caught, SQLiteStore(path) as store:
        store.load("r30")
    assert path in str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OrchestratorError, match=r"nowhere.*No such file"):
        SQLiteStore(tmp_path / "nowhere" / "runs.db")


def test_without_sqlite3_the_error_says_so(path: str) -> None:
    code = """
        sys.modules["_sqlite3"] = sys.modules["sqlite3"] = None
        for kind in (engine.SQLiteStore, engine.ResponseCache):
            try:
                kind(sys.argv[1])
            except engine.OrchestratorError as error:
                print(error)
    """
    output, _ = in_process(code, path).communicate(timeout=60)
    assert output.count("this Python has no sqlite3 module") == 2


def test_a_locked_file_is_an_error_after_the_busy_timeout(store: SQLiteStore, path: str) -> None:
    store.begin(RUN)
    store.record("r1", "a", DONE)
    store.flush()
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    errors: list[Any] = []
    store.record("r1", "b", DONE, errors.append)
    store.flush()
    blocker.execute("ROLLBACK")
    blocker.close()
    assert "another process keeps it locked" in str(errors[0])
    assert isinstance(errors[0], OrchestratorError)
    assert set(store.claim("r1")["steps"]) == {"a"}
    store.record("r1", "b", DONE)
    store.update("r1", "completed", release=True)
    assert store.verify("r1") == []


DAMAGES = {
    "a run's document": "UPDATE runs SET document = '{'",
    "a run's document of another kind": "UPDATE runs SET document = '[1]'",
    "a step's state": "UPDATE steps SET state = 'gar bage'",
    "an event's details": "UPDATE audit SET details = x'00ff'",
    "the workflow's text": "UPDATE texts SET body = 'nothing'",
    "a lease": "UPDATE runs SET holder = 'somebody', lease_until = 'soon'",
    "a lease's holder": "UPDATE runs SET holder = 'some:body', lease_until = 9e12",
    "the removal of a table": "DROP TABLE steps",
}


@pytest.mark.parametrize("statement", DAMAGES.values(), ids=DAMAGES)
def test_no_damage_to_the_rows_raises_another_error(store: SQLiteStore, path: str, statement: str) -> None:
    finished(store, "r1", {"a": FAILED}, "failed")
    edit(path, statement)
    reads = (store.load, store.claim, store.audit, store.verify, store.export, store.failures, store.delete)
    calls = [lambda read=read: read("r1") for read in reads]
    for call in (store.runs, lambda: store.runs(status="running"), lambda: store.prune(0), *calls):
        with contextlib.suppress(OrchestratorError):
            call()


def test_a_run_that_failed_to_be_written_is_free_for_others_in_time(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(engine, "_LEASE_SECONDS", 0.3)
    with SQLiteStore(path, busy_timeout_seconds=0.05) as store, SQLiteStore(path) as other:
        store.begin(RUN)
        store.begin(run("r2"))
        blocker = sqlite3.connect(path, isolation_level=None)
        blocker.execute("BEGIN EXCLUSIVE")
        store.record("r1", "a", DONE)
        store.flush()
        blocker.execute("ROLLBACK")
        blocker.close()
        time.sleep(0.5)
        assert other.claim("r1")["steps"] == {}
        with pytest.raises(OrchestratorError, match="held by a running process"):
            other.claim("r2")


def test_closing_while_others_write_neither_hangs_nor_loses_a_word(path: str) -> None:
    for _ in range(20):
        store, outcomes = SQLiteStore(path), []
        run_id = os.urandom(4).hex()
        store.begin(run(run_id))

        def write(store: SQLiteStore = store, run_id: str = run_id, outcomes: list[Any] = outcomes) -> None:
            for number in range(10**9):
                try:
                    store.record(run_id, f"s{number}", DONE, outcomes.append)
                    if number % 5 == 0:
                        store.flush()
                except OrchestratorError:
                    outcomes.append(number)
                    return

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        time.sleep(0.003)
        store.close()
        thread.join(30)
        assert not thread.is_alive()
        with SQLiteStore(path) as again:
            assert len(again.load(run_id)["steps"]) >= outcomes.count(None) > 0
            assert again.verify(run_id) == []


def fill(store: SQLiteStore, path: str) -> list[Any]:
    store.begin(RUN)
    store.record("r1", "a", DONE)
    store.flush()
    store._connection.execute(f"PRAGMA max_page_count = {os.path.getsize(path) // 4096 + 40}")
    errors: list[Any] = []
    for number in range(60):
        try:
            store.record("r1", f"big{number}", {**DONE, "outputs": {"text": "x" * 10_000}}, errors.append)
        except OrchestratorError as error:
            errors.append(error)
        if number % 3 == 0:
            store.flush()
    store.flush()
    return errors


def test_a_full_disk_is_an_error_and_leaves_no_gap(store: SQLiteStore, path: str) -> None:
    errors = fill(store, path)
    failed = [error is not None for error in errors]
    stored = failed.index(True)
    assert failed == [False] * stored + [True] * (60 - stored)
    assert all("no room is left on the disk" in str(error) for error in errors[stored:])
    assert len(store.load("r1")["steps"]) == 1 + stored
    assert store.verify("r1") == []
    store._connection.execute("PRAGMA max_page_count = 100000")
    store.claim("r1")
    store.record("r1", "late", DONE)
    store.update("r1", "completed", release=True)
    assert store.verify("r1") == []


@pytest.mark.slow
def test_a_full_file_system_is_an_error_and_leaves_no_gap(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", mount], check=False).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        with SQLiteStore(mount / "runs.db") as store:
            store.begin(RUN)
            errors: list[Any] = []
            for number in range(60):
                with contextlib.suppress(OrchestratorError):
                    store.record("r1", f"s{number}", {**DONE, "outputs": {"text": "x" * 10_000}}, errors.append)
                store.flush()
            stored = errors.count(None)
            assert 0 < stored == len(errors) - 1 < 59
            assert "r1" in [entry["run_id"] for entry in store.runs()]
        with SQLiteStore(mount / "runs.db") as store:
            assert set(store.load("r1")["steps"]) == {f"s{number}" for number in range(stored)}
            assert store.verify("r1") == []
    finally:
        subprocess.run(["umount", mount], check=True)


def test_files_are_for_the_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with SQLiteStore(tmp_path / "a.db") as store, ResponseCache(tmp_path / "b.db") as cache:
            store.begin(RUN)
            keep(cache, "hi", "answer")
            cassette = engine.Cassette(str(tmp_path / "c.jsonl"), replay=False)
            cassette.close()
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert {"a.db", "a.db-wal", "a.db-shm", "b.db", "b.db-wal", "c.jsonl"} <= set(modes)
    assert set(modes.values()) == {0o600}


def test_an_older_file_is_brought_up_to_date_with_its_runs(path: str) -> None:
    class Later(SQLiteStore):
        SCHEMA = (*SQLiteStore.SCHEMA, "ALTER TABLE runs ADD COLUMN owner TEXT; CREATE TABLE owners (name TEXT)")

    with SQLiteStore(path) as store:
        finished(store, "r1", {"a": DONE})
    with Later(path) as later:
        assert later.load("r1")["steps"] == {"a": DONE}
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    assert connection.execute("SELECT owner FROM runs").fetchall() == [(None,)]
    connection.close()
    with pytest.raises(OrchestratorError, match="newer version"):
        SQLiteStore(path)


def test_an_interpreter_ends_with_an_open_store(path: str) -> None:
    code = """
        store = engine.SQLiteStore(sys.argv[1])
        store.begin({"run_id": "r1", "workflow": "w"})
        store.record("r1", "a", {"status": "completed"})
        store.flush()
    """
    with in_process(code, path) as process:
        assert process.wait(30) == 0


def test_closing_ends_the_thread_and_commits_what_was_recorded(path: str) -> None:
    store = SQLiteStore(path)
    store.begin(RUN)
    errors: list[Any] = []
    for number in range(2500):
        store.record("r1", f"s{number}", DONE, errors.append)
    store.close()
    store.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "llm_orchestrator-store"]
    assert errors == [None] * 2500
    with SQLiteStore(path) as again:
        assert len(again.load("r1")["steps"]) == 2500


# ---- Kills -----------------------------------------------------------------------------------------------------------

WRITER = """
import os, random, threading
store = engine.SQLiteStore(sys.argv[1])
lock, seed = threading.Lock(), int(sys.argv[2])
chance = random.Random(seed)

def told(number):
    def durable(error):
        assert error is None, error
        os.write(1, b"%d\\n" % number)  # one write: whole, or not there
    return durable

run_id = f"run{seed}"
store.begin({"run_id": run_id, "workflow": "w", "workflow_text": "x" * 5000})
os.write(1, b"begun\\n")
for number in range(1000000):
    text = "x" * chance.choice((10, 10, 1000, 30000))
    store.record(run_id, f"s{number}", {"status": "completed", "outputs": {"n": number, "text": text}}, told(number))
    store.note(run_id, "provider_call", {"number": number})
    if chance.random() < 0.05:
        store.flush()
"""


def killed_at_random(path: str, seed: int) -> list[int]:
    """The numbers of the records that a killed process was told were durable."""
    writer = in_process(WRITER, path, str(seed))
    with writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "begun\n"
        time.sleep(random.Random(seed).uniform(0, 0.12))
        writer.send_signal(signal.SIGKILL)
        lines = writer.stdout.read().split("\n")
    return [int(line) for line in lines if line]


def check_after_kill(path: str, seed: int, durable: list[int]) -> None:
    with SQLiteStore(path) as store:
        run_id = f"run{seed}"
        steps = store.load(run_id)["steps"]
        assert durable == list(range(len(durable)))
        assert set(steps) == {f"s{number}" for number in range(len(steps))}, "an unbroken beginning"
        assert len(steps) >= len(durable)
        assert all(steps[f"s{number}"]["outputs"]["n"] == number for number in range(len(steps)))
        assert store.verify(run_id) == []
        claimed = store.claim(run_id)  # at once: the process is gone
        assert len(claimed["steps"]) == len(steps)
        store.record(run_id, f"s{len(steps)}", DONE)
        store.update(run_id, "completed", release=True)
        assert store.verify(run_id) == []
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def kill_rounds(path: str, rounds: int) -> int:
    total = 0
    for seed in range(rounds):
        durable = killed_at_random(path, seed)
        total += len(durable)
        check_after_kill(path, seed, durable)
    return total


def test_what_was_reported_durable_survives_kills(path: str) -> None:
    assert kill_rounds(path, 8) > 0


@pytest.mark.soak
def test_what_was_reported_durable_survives_hundreds_of_kills(path: str) -> None:
    assert kill_rounds(path, 300) > 1000


def test_a_torn_log_leaves_a_whole_beginning(path: str) -> None:
    killed_at_random(path, 3)
    log = Path(path + "-wal")
    whole, database = log.read_bytes(), Path(path).read_bytes()
    assert whole
    for cut in sorted({random.Random(5).randrange(len(whole)) for _ in range(12)}, reverse=True):
        Path(path).write_bytes(database)
        log.write_bytes(whole[:cut] + b"\xa5" * min(100, len(whole) - cut))
        Path(path + "-shm").unlink(missing_ok=True)
        with contextlib.suppress(OrchestratorError), SQLiteStore(path) as store:
            for entry in store.runs():
                steps = store.load(entry["run_id"])["steps"]
                assert set(steps) == {f"s{number}" for number in range(len(steps))}
                assert store.verify(entry["run_id"]) == []


# ---- The audit trail -------------------------------------------------------------------------------------------------

TAMPERINGS = {
    "an event's details": "UPDATE audit SET details = replace(details, 'gpt', 'gqt') WHERE number = 4",
    "an event's kind": "UPDATE audit SET kind = 'provider_cull' WHERE number = 4",
    "an event's time": "UPDATE audit SET time = time + 0.001 WHERE number = 3",
    "an event's hash": "UPDATE audit SET hash = replace(hash, substr(hash, 1, 1), 'g') WHERE number = 3",
    "the first event's removal": "DELETE FROM audit WHERE number = 1",
    "an event's removal": "DELETE FROM audit WHERE number = 3",
    "an event's removal and renumbering": (
        "DELETE FROM audit WHERE number = 3; UPDATE audit SET number = number - 1 WHERE number > 3"
    ),
    "the last event's removal": "DELETE FROM audit WHERE number = (SELECT MAX(number) FROM audit)",
    "the removal of all events": "DELETE FROM audit",
    "an added event": "INSERT INTO audit VALUES ('r1', 99, 1.0, 'provider_call', '{}', 'ab')",
    "a copied event": "INSERT INTO audit SELECT run_id, 99, time, kind, details, hash FROM audit WHERE number = 3",
    "swapped events": (
        "UPDATE audit SET number = 98 WHERE number = 3; UPDATE audit SET number = 3 WHERE number = 4;"
        "UPDATE audit SET number = 4 WHERE number = 98"
    ),
    "a step's state": "UPDATE steps SET state = replace(state, 'hi', 'ho') WHERE step_id = 'a'",
    "a step's status": "UPDATE steps SET status = 'completed' WHERE step_id = 'b'",
    "a step's removal": "DELETE FROM steps WHERE step_id = 'a'",
    "an added step": "INSERT INTO steps VALUES ('r1', 'z', 'completed', '{}')",
    "the run's status": "UPDATE runs SET status = 'completed'",
    "the run's inputs": "UPDATE runs SET document = replace(document, '\"n\":1', '\"n\":2')",
    "the run's workflow": "UPDATE runs SET workflow = 'other'",
    "the workflow's text": "UPDATE texts SET body = replace(body, 'demo', 'dome')",
    "the removal of the workflow's text": "DELETE FROM texts",
    "the run's count of events": "UPDATE runs SET audit_count = audit_count + 1",
    "the run's last hash": "UPDATE runs SET audit_head = 'ab'",
}


@pytest.mark.parametrize("statements", TAMPERINGS.values(), ids=TAMPERINGS)
def test_verify_finds_a_change_of(store: SQLiteStore, path: str, statements: str) -> None:
    store.begin(RUN)
    store.note("r1", "provider_call", {"model": "gpt", "prompt": engine._digest("hello"), "output_tokens": 3})
    store.record("r1", "a", DONE)
    store.note("r1", "provider_call", {"model": "gpt", "prompt": engine._digest("bye"), "output_tokens": 4})
    store.record("r1", "b", FAILED)
    store.update("r1", "failed", {"error": {"message": "b failed"}}, release=True)
    assert store.verify("r1") == []
    edit(path, *statements.split(";"))
    assert store.verify("r1")


def test_a_note_of_any_kind_harms_no_run(store: SQLiteStore) -> None:
    store.begin(RUN)
    store.note("r1", "steps", {})
    store.record("r1", "a", DONE)
    store.note("r1", "steps_forgotten", {"step_ids": None})
    store.update("r1", "completed", release=True)
    assert store.verify("r1") == []


def test_the_trail_says_who_started_the_run_and_what_was_asked(store: SQLiteStore, monkeypatch: Any) -> None:
    monkeypatch.setenv("USER", "alice")
    store.begin(RUN)
    store.note("r1", "provider_call", {"model": "gpt", "input_tokens": 3, "prompt": engine._digest("hello")})
    store.update("r1", "completed", release=True)
    started, call, ended = store.audit("r1")
    assert started["details"]["by"].startswith("alice@")
    assert f"process {os.getpid()}" in started["details"]["by"]
    assert (call["kind"], call["details"]["input_tokens"]) == ("provider_call", 3)
    assert [event["number"] for event in (started, call, ended)] == [1, 2, 3]
    assert ended["hash"] == store.load("r1")["audit_head"]


# ---- Listing, dead letters, deleting ---------------------------------------------------------------------------------


def test_runs_are_listed_newest_first_and_by_status_and_workflow(store: SQLiteStore) -> None:
    for number, status in enumerate(("completed", "failed", "paused", "completed")):
        finished(store, f"r{number}", {}, status, started_at=100.0 + number, workflow="odd" if number % 2 else "even")
    store.begin(run("r9", started_at=1.0, workflow="odd"))

    def listed(**wanted: Any) -> list[str]:
        return [entry["run_id"] for entry in store.runs(**wanted)]

    assert listed() == ["r3", "r2", "r1", "r0", "r9"]
    assert listed(limit=2) == ["r3", "r2"]
    assert listed(status="completed") == ["r3", "r0"]
    assert listed(workflow="odd") == ["r3", "r1", "r9"]
    assert listed(workflow="odd", status="running") == ["r9"]
    assert listed(status="interrupted") == listed(workflow="none") == []
    assert set(store.runs(limit=1)[0]) == {"run_id", "workflow", "status", "started_at", "updated_at", "held_by"}


def test_dead_letters_hold_their_context(store: SQLiteStore) -> None:
    finished(store, "r1", {"a": DONE, "each": FAILED, "each.1": FAILED, "each.2": DONE}, "failed", started_at=1.0)
    finished(store, "r2", {"x": FAILED}, "failed", inputs={"n": 2}, started_at=2.0)
    finished(store, "r3", {"x": DONE}, started_at=3.0)
    letters = store.failures()
    assert [(letter["run_id"], letter["step_id"]) for letter in letters] == [("r2", "x"), ("r1", "each.1")]
    assert letters[0] == {"run_id": "r2", "workflow": "demo", "started_at": 2.0, "step_id": "x", "inputs": {"n": 2}, **FAILED}
    assert [letter["step_id"] for letter in store.failures("r1")] == ["each.1"]
    store.claim("r2")
    store.record("r2", "x", DONE)
    store.update("r2", "completed", release=True)
    assert store.failures("r2") == []


def test_pruning_spares_the_young_the_running_and_the_paused(store: SQLiteStore, path: str) -> None:
    for run_id, status in (("old", "completed"), ("failed", "failed"), ("paused", "paused"), ("young", "completed")):
        finished(store, run_id, {"a": DONE}, status)
    store.begin(run("running"))
    store.begin(run("killed"))
    edit(path, "UPDATE runs SET updated_at = updated_at - 1000 WHERE run_id <> 'young'",
         "UPDATE runs SET lease_until = 0 WHERE run_id = 'killed'")  # fmt: skip
    assert sorted(store.prune(900)) == ["failed", "killed", "old"]
    assert {entry["run_id"] for entry in store.runs()} == {"paused", "young", "running"}
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT DISTINCT run_id FROM steps ORDER BY 1").fetchall() == [("paused",), ("young",)]
    connection.close()


def test_pruning_deletes_no_run_that_was_claimed_meanwhile(store: SQLiteStore, path: str, monkeypatch: Any) -> None:
    finished(store, "r1", {"a": DONE})
    found = store._list
    with SQLiteStore(path) as other:

        def found_and_then_claimed(*condition: Any) -> list[dict[str, Any]]:
            entries = found(*condition)
            other.claim("r1")
            return entries

        monkeypatch.setattr(store, "_list", found_and_then_claimed)
        with pytest.raises(OrchestratorError, match="held by a running process"):
            store.prune(0)
        other.update("r1", "completed", release=True)
        assert other.verify("r1") == []


@pytest.mark.slow
def test_a_lookup_among_100000_runs_takes_less_than_10_ms(path: str) -> None:
    with SQLiteStore(path) as store:
        finished(store, "needle", {f"s{number}": DONE for number in range(10)}, started_at=50_000.5)
        with store._transaction() as execute:
            rows = [(f"r{i}", f"w{i % 1000}", "failed" if i % 5000 == 0 else "completed", float(i)) for i in range(100_000)]
            execute("INSERT INTO runs SELECT ?, ?, ?, ?, 1, '', '{}', NULL, NULL, 0, ''", rows, many=True)
            steps = [(f"r{i}", "s", "failed" if i % 5000 == 0 else "completed", "{}") for i in range(100_000)]
            execute("INSERT INTO steps VALUES (?, ?, ?, ?)", steps, many=True)
        looks = {
            "load": lambda: store.load("needle"),
            "list": lambda: store.runs(limit=20),
            "by status": lambda: store.runs(limit=20, status="failed"),
            "by workflow": lambda: store.runs(limit=20, workflow="w7"),
            "interrupted": lambda: store.runs(status="interrupted"),
            "failures": lambda: store.failures(limit=20),
        }
        for name, look in looks.items():
            durations = []
            for _ in range(7):
                started = time.perf_counter()
                look()
                durations.append(time.perf_counter() - started)
            assert min(durations) < 0.01, (name, durations)


# ---- The cache -------------------------------------------------------------------------------------------------------


def asked(prompt: Any, **settings: Any) -> CompletionRequest:
    return CompletionRequest("m", [{"role": "user", "content": str(prompt)}], **settings)


def keep(cache: ResponseCache, prompt: Any, text: str) -> None:
    cache.keep("p", len, asked(prompt), CompletionResponse(text))


def recall(cache: ResponseCache, prompt: Any) -> str | None:
    answer = cache.recall("p", len, asked(prompt))
    return None if answer is None else str(answer.text)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ResponseCache]:
    with ResponseCache(tmp_path / "cache.db") as opened:
        yield opened


def test_a_cache_answers_the_same_request_only(cache: ResponseCache) -> None:
    keep(cache, "hi", "a")
    assert recall(cache, "hi") == "a"
    assert recall(cache, "hi!") is None
    assert cache.recall("p", len, asked("hi", temperature=0)) is None
    assert cache.recall("other name", len, asked("hi")).text == "a"
    assert cache.recall("p", print, asked("hi")) is None
    keep(cache, "hi", "b")
    assert recall(cache, "hi") == "b"


def test_a_hit_is_marked_and_whole(cache: ResponseCache) -> None:
    answer = CompletionResponse("hi", "gpt", 3, 4, "stop", "req-1", [{"id": "1"}], {"x": 1})
    cache.keep("p", len, asked("hi"), answer)
    found = cache.recall("p", len, asked("hi"))
    assert found.metadata.pop("cached") is True
    assert vars(found) == vars(answer)
    cache.keep("p", len, EmbeddingRequest("m", ["a"]), EmbeddingResponse([[0.5, 1.0]], "m", 1))
    assert vars(cache.recall("p", len, EmbeddingRequest("m", ["a"]))) == {"vectors": [[0.5, 1.0]], "model": "m", "tokens": 1}


@pytest.mark.parametrize("answer", [RateLimitError("slow down"), None, 5, {"text": "no"}])
def test_errors_and_nonsense_are_not_kept(cache: ResponseCache, answer: Any) -> None:
    cache.keep("p", len, asked("hi"), answer)
    assert recall(cache, "hi") is None


def test_the_text_of_a_plain_function_is_kept(cache: ResponseCache) -> None:
    cache.keep("p", len, asked("hi"), "just text")
    answer = cache.recall("p", len, asked("hi"))
    assert (answer.text, answer.model) == ("just text", "m")


def test_a_cache_keeps_neither_prompts_nor_keys(cache: ResponseCache) -> None:
    request = asked("secret prompt", params={"api_key": "sk-123456"})
    cache.keep("p", len, request, CompletionResponse("answer"))
    cache.close()
    content = b"".join(file.read_bytes() for file in Path(cache.name).parent.iterdir())
    assert b"answer" in content
    assert b"secret prompt" not in content
    assert b"sk-123456" not in content


def test_a_cache_that_fails_is_a_warning(cache: ResponseCache, caplog: pytest.LogCaptureFixture) -> None:
    keep(cache, "hi", "a")
    cache._connection.execute("DROP TABLE answers")
    keep(cache, "hi", "b")
    assert recall(cache, "hi") is None
    assert caplog.text.count("the cache is not used") == 2
    cache.keep("p", len, asked("hi", params={"x": object()}), CompletionResponse("a"))
    assert "no JSON form" in caplog.text


def test_old_answers_are_not_given_out(tmp_path: Path) -> None:
    path = tmp_path / "cache.db"
    with ResponseCache(path, max_age_seconds=100) as cache:
        keep(cache, 1, "a")
        edit(str(path), "UPDATE answers SET stored_at = stored_at - 200")
        keep(cache, 2, "b")
        assert recall(cache, 1) is None
        assert recall(cache, 2) == "b"
    with ResponseCache(path) as cache:
        assert recall(cache, 1) == "a"
    with ResponseCache(path, max_age_seconds=100), ResponseCache(path) as cache:
        assert recall(cache, 1) is None, "it was deleted"


def test_a_full_cache_drops_what_was_not_asked_for_the_longest(tmp_path: Path) -> None:
    with ResponseCache(tmp_path / "cache.db", max_bytes=3500) as cache:
        for number in range(3):
            keep(cache, number, "x" * 850)  # about 1,000 bytes each
        assert recall(cache, 0)
        keep(cache, 3, "x" * 850)
        assert [recall(cache, number) is not None for number in range(4)] == [True, False, True, True]
        keep(cache, 4, "x" * 5000)
        assert recall(cache, 4) is None
        keep(cache, 5, "y")
        assert recall(cache, 5) == "y"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 900)), max_size=25))
def test_the_size_of_a_cache_is_the_sum_of_its_answers_and_within_the_limit(steps: list[tuple[bool, int, int]]) -> None:
    with ResponseCache(":memory:", max_bytes=3000) as cache:
        for put, number, size in steps:
            keep(cache, number, "x" * size) if put else recall(cache, number)
            with cache._transaction() as execute:
                total = execute("SELECT COALESCE(SUM(size), 0) FROM answers").fetchone()[0]
                assert total == execute("SELECT COALESCE(SUM(LENGTH(answer)), 0) FROM answers").fetchone()[0] <= 3000


def test_threads_and_processes_share_a_cache(cache: ResponseCache) -> None:
    code = """
        def asked(prompt):
            return engine.CompletionRequest("m", [{"role": "user", "content": str(prompt)}])
        with engine.ResponseCache(sys.argv[1], max_bytes=9000) as cache:
            for number in range(60):
                cache.keep("p", len, asked(number), f"answer {number}")
                found = cache.recall("p", len, asked(number % 7))
                assert found is None or found.text == f"answer {number % 7}"
    """
    process = in_process(code, cache.name)

    def work(start: int) -> None:
        for number in range(start, start + 40):
            keep(cache, number, f"answer {number}")
            if recall(cache, number) not in (None, f"answer {number}"):
                faults.append(number)

    faults: list[Any] = []
    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 20, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    process.communicate(timeout=60)
    assert (process.returncode, faults) == (0, [])


# ---- Requests and answers as JSON, record and replay -----------------------------------------------------------------

HELLO = CompletionRequest("gpt", [{"role": "user", "content": "Say hello"}], temperature=0.0, stream=True, on_text=print)
VARIANTS = [
    CompletionRequest("gpt-2", [{"role": "user", "content": "Say hello"}], temperature=0.0),
    CompletionRequest("gpt", [{"role": "user", "content": "Say hello!"}], temperature=0.0),
    CompletionRequest("gpt", [{"role": "user", "content": "Say hello"}]),
    CompletionRequest("gpt", [{"role": "user", "content": "Say hello"}], temperature=0.0, seed=1),
    CompletionRequest("gpt", [{"role": "user", "content": "Say hello"}], temperature=0.0, schema={"type": "string"}),
    CompletionRequest("gpt", [{"role": "user", "content": "Say hello"}], temperature=0.0, params={"n": 2}),
    CompletionRequest("gpt", [{"role": "user", "content": "Say hello"}], temperature=0.0, tools=[{"name": "t"}]),
    CompletionRequest("gpt", [{"role": "user", "content": "Say hello"}], temperature=0.0, tools=[{"name": "t", "secret": 1}]),
    CompletionRequest("gpt", [{"role": "user", "content": "Say hello"}], temperature=0.0, system="Be brief"),
    EmbeddingRequest("gpt", ["Say hello"]),
]


def test_every_parameter_of_a_request_counts_and_streaming_does_not() -> None:
    documents = [engine._request_document("p", request) for request in (HELLO, *VARIANTS)]
    assert len({engine._digest(document) for document in documents}) == len(documents)
    quiet = CompletionRequest("gpt", [{"role": "user", "content": "Say hello"}], temperature=0.0)
    assert engine._request_document("p", quiet) == documents[0]


def test_the_provider_s_type_address_and_options_count_and_its_key_does_not() -> None:
    def key(**settings: Any) -> str:
        provider = engine.OpenAIProvider(**{"api_key": "sk-1", **settings})
        return engine._digest(engine._request_document("p", HELLO, provider))

    assert key() == key(api_key="sk-2")
    assert key() != key(base_url="http://localhost:1/v1")


@pytest.mark.parametrize(
    "answer",
    [
        CompletionResponse("hi", "gpt", 3, 4, "stop", "req-1", [{"id": "1", "name": "t", "arguments": {}}], {"x": 1}),
        CompletionResponse("hi"),
        EmbeddingResponse([[0.1, -2.5e-30], [1.0, 0.0]], "m", 7),
    ],
)
def test_an_answer_survives_the_way_through_json(answer: Any) -> None:
    kind = "completion" if isinstance(answer, CompletionResponse) else "embedding"
    again = engine._answer_from(kind, json.loads(json.dumps(engine._answer_document(answer))))
    assert type(again) is type(answer)
    assert vars(again) == vars(answer)


@pytest.mark.parametrize(
    "error",
    [RateLimitError("slow down", provider="openai", status=429, retry_after=2.0), QuotaExceededError("empty", status=402)],
)
def test_an_error_survives_the_way_through_json(error: Any) -> None:
    with pytest.raises(type(error)) as caught:
        engine._answer_from("completion", json.loads(json.dumps(engine._answer_document(error))))
    assert (str(caught.value), vars(caught.value)) == (str(error), vars(error))


def recorded(path: Path, *entries: tuple[Any, Any]) -> Any:
    cassette = engine.Cassette(str(path), replay=False)
    for request, response in entries:
        assert cassette.recall("openai", None, request) is None
        cassette.keep("openai", None, request, response)
    cassette.close()
    return engine.Cassette(str(path), replay=True)


def test_a_cassette_answers_in_the_order_of_recording_and_then_no_more(tmp_path: Path) -> None:
    entries = [(1, CompletionResponse("a")), (2, "x"), (1, RateLimitError("slow down", status=429)), (1, "b")]
    cassette = recorded(tmp_path / "c.jsonl", *((asked(prompt), answer) for prompt, answer in entries))
    assert cassette.recall("openai", None, asked(1)).text == "a"
    with pytest.raises(RateLimitError, match="slow down"):
        cassette.recall("openai", None, asked(1))
    assert cassette.recall("openai", None, asked(1)).text == "b"
    assert cassette.recall("openai", None, asked(2)).text == "x"
    with pytest.raises(ExecutionError, match="recorded, but not as often"):
        cassette.recall("openai", None, asked(1))


def test_a_request_that_was_not_recorded_shows_the_nearest(tmp_path: Path) -> None:
    far = EmbeddingRequest("embedder", ["something else"])
    cassette = recorded(tmp_path / "c.jsonl", (far, EmbeddingResponse([[1.0]])), (HELLO, "hello"))
    with pytest.raises(ExecutionError) as caught:
        cassette.recall("openai", None, VARIANTS[1])
    assert '-   "content": "Say hello"' in str(caught.value)
    assert '+   "content": "Say hello!"' in str(caught.value)
    assert "embedder" not in str(caught.value)
    with pytest.raises(ExecutionError, match="nothing is recorded"):
        recorded(tmp_path / "empty.jsonl").recall("openai", None, HELLO)


def test_a_cassette_holds_no_keys(tmp_path: Path) -> None:
    params = {"api_key": "sk-1", "headers": {"Authorization": "Bearer sk-2", "X-Api-Key": "sk-3"}, "max_tokens": 5}
    answer = CompletionResponse("a", metadata={"access_token": "sk-4"})
    answer.tool_calls = [{"id": "1", "name": "login", "arguments": {"password": "told"}}]
    replay = recorded(tmp_path / "c.jsonl", (asked("hi", params=params, max_tokens=7), answer))
    assert replay.recall("openai", None, asked("hi", params=params, max_tokens=7)).tool_calls == answer.tool_calls
    content = (tmp_path / "c.jsonl").read_text()
    assert "sk-" not in content
    request = json.loads(content)["request"]
    assert (request["max_tokens"], request["params"]["max_tokens"]) == (7, 5)


def test_a_cassette_that_cannot_be_written_any_more_is_an_error(tmp_path: Path) -> None:
    cassette = engine.Cassette(str(tmp_path / "c.jsonl"), replay=False)
    with pytest.raises(OrchestratorError, match="no JSON form"):
        cassette.keep("p", None, asked("hi", params={"x": object()}), "a")
    cassette.close()
    with pytest.raises(OrchestratorError, match="cannot be written"):
        cassette.keep("p", None, asked("hi"), "a")


@pytest.mark.parametrize("line", ["{", "[]", '{"request": {}}', '{"request": {}, "response": 5}', "\xff"])
def test_a_broken_cassette_names_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"request": {}, "response": {}}\n' + line + "\n", encoding="latin-1")
    with pytest.raises(OrchestratorError, match=r"c\.jsonl:2: "):
        engine.Cassette(str(path), replay=True)


def test_cassettes_that_cannot_be_opened_are_refused(tmp_path: Path) -> None:
    for replay in (True, False):
        with pytest.raises(OrchestratorError, match="cannot be"):
            engine.Cassette(str(tmp_path / "nowhere" / "c.jsonl"), replay)


# ---- Small things ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("45m", 2700), ("12h", 43200), ("30d", 2592000), ("2w", 1209600), (" 1.5h ", 5400)]
)
def test_ages_are_read(text: str, seconds: float) -> None:
    assert engine._parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "30", "-1d", "1y", "1 000d", "30 days", "1e3d", "nan", "٣d", None, 5])
def test_other_ages_are_refused(text: Any) -> None:
    with pytest.raises(ValidationError, match="30d or 12h"):
        engine._parse_age(text)


def test_a_workflow_s_hash_is_that_of_its_meaning() -> None:
    texts = ["name: a\nsteps: [{id: x, type: llm}]", "# hi\nsteps:\n- type: llm\n  id: 'x'\nname: a", "name: b\nsteps: []"]
    first, same, other = (engine._digest(engine.load_yaml(text)) for text in texts)
    assert first == same
    assert first != other


def test_a_diff_shows_what_changed() -> None:
    assert engine._workflow_diff("a\nb\n", "a\nb\n") == ""
    assert "-b\n+c" in engine._workflow_diff("a\nb\n", "a\nc\n")


def test_a_store_in_any_database_needs_a_connection_only(path: str) -> None:
    spec = importlib.util.spec_from_file_location("postgres_store", ROOT / "examples" / "postgres_store.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    class FormatCursor(sqlite3.Cursor):
        """What a driver does whose paramstyle is `format`."""

        def execute(self, sql: str, parameters: Any = ()) -> Any:
            return super().execute(sql.replace("%s", "?"), parameters)

        def executemany(self, sql: str, parameters: Any) -> Any:
            return super().executemany(sql.replace("%s", "?"), parameters)

    class FormatConnection(sqlite3.Connection):
        def cursor(self) -> Any:  # type: ignore[override]
            return super().cursor(FormatCursor)

    def connect() -> Any:
        return sqlite3.connect(path, check_same_thread=False)

    def connect_format() -> Any:
        return sqlite3.connect(path, check_same_thread=False, factory=FormatConnection)

    with example.PostgresStore(connect_format, paramstyle="format") as store:
        finished(store, "r1", {"a": DONE, "b": FAILED}, "failed")
        store.claim("r1")
        store.record("r1", "b", DONE)
        store.update("r1", "completed", release=True)
    with example.PostgresStore(connect, paramstyle="qmark") as store:
        assert store.load("r1")["steps"] == {"a": DONE, "b": DONE}
        assert store.verify("r1") == []
    edit(path, "INSERT INTO llm_orchestrator_version VALUES (9)")
    with pytest.raises(OrchestratorError, match="newer version"), example.PostgresStore(connect, "qmark") as store:
        store.runs()
