"""Room 17, Command line: real processes, their output, their exit status."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Program

WORKFLOW = """
name: hello
inputs:
  name: {type: string, required: true}
steps:
  - {id: greet, type: llm, provider: openai, model: m, prompt: "Hello {{inputs.name}}", output: text}
  - {id: shout, type: transform, function: template, template: "{{upper steps.greet.text}}", output: text}
outputs:
  shouted: "{{steps.shout.text}}"
"""
FAILING = "name: f\nsteps:\n  - {id: a, type: action, action: fail, message: boom}\n  - {id: b, type: action, action: log, message: ok}\n"
HANGING = "name: h\nsteps:\n  - {id: a, type: transform, function: template, template: done}\n  - {id: b, type: action, action: sleep, seconds: 60, depends_on: a}\n"


@pytest.fixture
def hello(program: Program) -> Program:
    program.write("wf.yaml", WORKFLOW)
    return program


def test_run_prints_the_result_as_json_and_nothing_else(hello: Program) -> None:
    done = hello.run("run", "wf.yaml", "--offline", "--set", "name=Ann")
    result = json.loads(done.stdout)
    assert done.returncode == 0
    assert result["status"] == "completed"
    assert "HELLO ANN" in result["outputs"]["shouted"]
    assert list(result["steps"]) == ["greet", "shout"]


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [
        (["--input", '{"name": "Ann"}'], b""),
        (["--input", "in.json"], b""),
        (["--input", "in.yaml"], b""),
        (["--input", "-"], b'{"name": "Ann"}'),
        (["--input", '{"name": "Bob"}', "--set", "name=Ann"], b""),
    ],
)
def test_inputs_come_from_text_files_standard_input_and_set(hello: Program, arguments: list[str], stdin: bytes) -> None:
    hello.write("in.json", '{"name": "Ann"}')
    hello.write("in.yaml", "name: Ann\n")
    done = hello.run("run", "wf.yaml", "--offline", "--print", "outputs.shouted", *arguments, stdin=stdin)
    assert (done.returncode, "HELLO ANN" in done.stdout) == (0, True), done.stderr


def test_the_workflow_may_come_from_standard_input(program: Program) -> None:
    done = program.run("run", "-", "--offline", "--set", "name=Ann", "--print", "steps.shout.text", stdin=WORKFLOW.encode())
    assert "HELLO ANN" in done.stdout


def test_set_takes_json_where_it_parses_and_text_for_declared_strings(program: Program) -> None:
    program.write("wf.yaml", "name: t\nsteps:\n  - {id: a, type: transform, function: merge, inputs: [n, s]}\n")
    done = program.run("run", "wf.yaml", "--set", "n=[1,2]", "--set", "s=plain words", "--print", "steps.a")
    assert json.loads(done.stdout) == {"n": [1, 2], "s": "plain words"}
    program.write("wf2.yaml", WORKFLOW)
    assert "HELLO 5" in program.run("run", "wf2.yaml", "--offline", "--set", "name=5", "--print", "steps.shout").stdout


def test_print_gives_one_value_raw(hello: Program) -> None:
    done = hello.run("run", "wf.yaml", "--offline", "--set", "name=Ann", "--print", "status")
    assert done.stdout == "completed\n"


def test_out_writes_the_result_to_a_file(hello: Program) -> None:
    done = hello.run("run", "wf.yaml", "--offline", "--set", "name=Ann", "-o", "out.json")
    assert done.stdout == ""
    assert json.loads((hello.folder / "out.json").read_text("utf-8"))["status"] == "completed"


def test_a_failed_run_exits_with_1_and_prints_its_result(program: Program) -> None:
    program.write("wf.yaml", FAILING)
    done = program.run("run", "wf.yaml")
    assert done.returncode == 1
    assert json.loads(done.stdout)["steps"]["b"]["status"] == "completed"
    assert "boom" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml"),
        (["run", "bad.yaml"], "bad.yaml:2:"),
        (["run", "wf.yaml"], "'name' is missing"),
        (["run", "wf.yaml", "--set", "name"], "KEY=VALUE"),
        (["run", "wf.yaml", "--input", "[1]"], "--input"),
        (["run", "wf.yaml", "--input", "{"], "1:2"),
        (["run", "wf.yaml", "--set", "name=x"], "OPENAI_API_KEY"),
        (["run", "wf.yaml", "--set", "name=x", "--plugin", "nowhere.py"], "nowhere.py"),
        (["run", "wf.yaml", "--offline", "--set", "name=x", "--max-concurrency", "0"], "max_concurrency"),
        (["run"], "FILE"),
        (["fly"], "fly"),
        ([], "COMMAND"),
        (["graph", "bad.yaml"], "bad.yaml:2:"),
    ],
)
def test_bad_usage_exits_with_2_and_says_why(hello: Program, arguments: list[str], message: str) -> None:
    hello.write("bad.yaml", "name: t\n  steps: [\n")
    done = hello.run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_validate_reports_every_problem_of_every_file(hello: Program) -> None:
    hello.write("bad.yaml", "name: t\nsteps:\n  - {id: a, type: llm, promt: x}\n")
    done = hello.run("validate", "wf.yaml", "bad.yaml", "nowhere.yaml")
    assert done.returncode == 2
    assert "wf.yaml: valid" in done.stdout
    for part in ("bad.yaml:3:24: steps[0] 'a': unknown key 'promt', did you mean 'prompt'?", "provider is missing", "nowhere.yaml"):
        assert part in done.stderr


def test_validate_can_answer_in_json(hello: Program) -> None:
    hello.write("bad.yaml", "name: t\nsteps:\n  - {id: a, type: llm, promt: x}\n")
    report = json.loads(hello.run("validate", "--json", "bad.yaml").stdout)
    assert report[0]["valid"] is False
    assert {"line", "column", "message", "path", "severity"} <= set(report[0]["problems"][0])


@pytest.mark.parametrize(("form", "start"), [("mermaid", "flowchart"), ("dot", "digraph"), ("text", "hello")])
def test_graph_draws(hello: Program, form: str, start: str) -> None:
    done = hello.run("graph", "wf.yaml", "--format", form)
    assert done.returncode == 0
    assert done.stdout.startswith(start)
    assert "greet" in done.stdout
    assert "shout" in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["validate", "--help"], ["graph", "--help"], ["--version"]])
def test_help_teaches(program: Program, arguments: list[str]) -> None:
    done = program.run(*arguments)
    assert done.returncode == 0
    assert "llm_orchestrator" in done.stdout


def test_plugins_bring_actions_transforms_and_providers_and_share_the_classes(program: Program) -> None:
    program.write(
        "plugin.py",
        "import llm_orchestrator\n"
        "def publish(text, loud=False):\n    return {'published': text.upper() if loud else text}\n"
        "async def second(inputs, step=1):\n    return inputs[0] + step\n"
        "def model(request):\n"
        "    assert isinstance(request, llm_orchestrator.CompletionRequest)\n    return request.prompt[::-1]\n"
        "actions = {'publish': publish}\ntransforms = {'second': second}\nproviders = {'mirror': model}\n",
    )
    program.write(
        "wf.yaml",
        "name: p\nsteps:\n"
        "  - {id: a, type: llm, provider: mirror, model: m, prompt: abc}\n"
        "  - {id: b, type: action, action: publish, text: '{{steps.a}}', loud: true}\n"
        "  - {id: c, type: transform, function: second, inputs: [n], step: 2}\n",
    )
    done = program.run("run", "wf.yaml", "--plugin", "plugin.py", "--set", "n=40")
    steps = json.loads(done.stdout)["steps"]
    assert steps["a"]["outputs"] == {"output": "cba"}
    assert steps["b"]["outputs"] == {"output": {"published": "CBA"}}
    assert steps["c"]["outputs"] == {"output": 42}


def test_an_emoji_survives_a_stdout_that_cannot_print_it(program: Program) -> None:
    program.write("wf.yaml", "name: t\nsteps:\n  - {id: a, type: transform, function: template, template: 'ok 🎉'}\n")
    for encoding in ("ascii", "latin-1", "utf-8"):
        done = program.run("run", "wf.yaml", PYTHONIOENCODING=encoding)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["steps"]["a"]["outputs"]["output"] == "ok 🎉"


def test_logs_go_to_stderr_as_text_or_json(hello: Program) -> None:
    done = hello.run("run", "wf.yaml", "--offline", "--set", "name=Ann", "-v", "--log-format", "json")
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert {"run_started", "step_completed", "run_finished"} <= {event["type"] for event in events}
    assert "step greet completed" in hello.run("run", "wf.yaml", "--offline", "--set", "name=Ann", "-v").stderr
    assert hello.run("run", "wf.yaml", "--offline", "--set", "name=Ann", "-q").stderr == ""
    done = hello.run("run", "wf.yaml", "--offline", "--set", "name=A", LLM_ORCHESTRATOR_LOG="debug")
    assert "provider call greet" in done.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_prints_the_partial_result_within_a_second(program: Program, number: int, status: int) -> None:
    program.write("wf.yaml", HANGING)
    process = subprocess.Popen(
        [sys.executable, "-m", "llm_orchestrator", "run", "wf.yaml", "-v"], cwd=program.folder, text=True,
        env=program.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    while "step a completed" not in process.stderr.readline():
        pass
    started = time.monotonic()
    process.send_signal(number)
    stdout, _ = process.communicate(timeout=20)
    assert time.monotonic() - started < 10
    assert process.returncode == status
    result = json.loads(stdout)
    assert result["status"] == "cancelled"
    assert {step_id: step["status"] for step_id, step in result["steps"].items()} == {"a": "completed", "b": "cancelled"}


def test_a_terminal_sees_live_progress(hello: Program) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "llm_orchestrator", "run", "wf.yaml", "--offline", "--set", "name=Ann"], cwd=hello.folder,
        env=hello.environment(TERM="xterm"), stdout=subprocess.PIPE, stderr=follower,
    )  # fmt: skip
    stdout, _ = process.communicate(timeout=60)
    os.close(follower)
    seen = b""
    while select.select([leader], [], [], 1)[0]:
        try:
            seen += os.read(leader, 65536)
        except OSError:  # the other side is closed: all has been read
            break
    os.close(leader)
    assert b"2/2 steps" in seen
    assert b"\x1b[" in seen
    assert json.loads(stdout)["status"] == "completed"


def test_a_closed_pipe_is_no_traceback(hello: Program) -> None:
    done = subprocess.run(
        f"{sys.executable} -m llm_orchestrator run wf.yaml --offline --set name=Ann | true", shell=True, cwd=hello.folder,
        env=hello.environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr


def test_crlf_and_byte_order_marks_are_read(program: Program) -> None:
    (program.folder / "wf.yaml").write_bytes(b"\xef\xbb\xbf" + WORKFLOW.replace("\n", "\r\n").encode())
    assert program.run("run", "wf.yaml", "--offline", "--set", "name=Ann").returncode == 0


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_runs_offline(program: Program, path: Path) -> None:
    done = program.run("run", path, "--offline")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["status"] == "completed"
    assert all(value not in (None, "") for value in result["outputs"].values())


def test_a_path_that_is_not_there_and_a_file_that_cannot_be_written_are_failures(hello: Program) -> None:
    done = hello.run("run", "wf.yaml", "--offline", "--set", "name=A", "--print", "outputs.nope", "-q")
    assert (done.returncode, done.stdout) == (1, "")
    assert "outputs.nope" in done.stderr
    done = hello.run("run", "wf.yaml", "--offline", "--set", "name=A", "-o", "/nowhere/at/all.json", "-q")
    assert done.returncode == 1
    assert json.loads(done.stdout)["status"] == "completed"  # the result is not lost


def test_stream_shows_the_answers_on_stderr_as_they_arrive(hello: Program) -> None:
    done = hello.run("run", "wf.yaml", "--offline", "--set", "name=A", "--stream", "--print", "status", "-q")
    assert done.stdout == "completed\n"
    assert "] echo: " in done.stderr


def test_quiet_hides_no_error(program: Program) -> None:
    workflow = program.write("wf.yaml", "name: t\nsteps: [{id: a, type: action, action: fail, message: boom}]\n")
    done = program.run("run", workflow, "-q")
    assert done.returncode == 1
    assert done.stderr == "failed: ExecutionError: boom\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "wf.yaml", "--cache", "c.db", "--cache-max-mb", "nan"], "--cache-max-mb"),
        (["run", "wf.yaml", "--cache", "c.db", "--cache-max-mb", "-1"], "must be from 0 to"),
        (["run", "wf.yaml", "--batch", "lines", "--print", "outputs"], "--print shows a value of one result"),
        (["runs", "list", "--store", "s.db", "--limit", "99999999999999999999"], "--limit"),
        (["runs", "list", "--store", "s.db", "--status", "bogus"], "completed"),
        (["resume", "--failed", "--store", "s.db", "--out", "f.json"], "leave --out away"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_done(
    program: Program, arguments: list[str], words: str
) -> None:
    program.write("wf.yaml", "name: t\nsteps: [{id: a, type: action, action: log}]\n")
    done = program.run(*arguments)
    assert done.returncode == 2 and words in done.stderr and "internal" not in done.stderr


def test_a_text_that_holds_no_characters_is_printed_escaped(program: Program) -> None:
    program.write("mine.py", "actions = {'odd': lambda: 'a\\ud800b'}\n")
    workflow = program.write("wf.yaml", "name: t\nsteps: [{id: a, type: action, action: odd}]\n")
    done = program.run("run", workflow, "--plugin", "mine.py", "--print", "steps.a", "-q")
    assert (done.returncode, done.stdout) == (0, "a\\ud800b\n")


def test_a_signal_is_heard_at_any_moment_of_the_start(program: Program) -> None:
    workflow = program.write("wf.yaml", "name: t\nsteps: [{id: a, type: action, action: sleep, seconds: 60}]\n")
    for delay in (0.05, 0.08, 0.11, 0.14, 0.2, 0.3):
        process = subprocess.Popen(
            [sys.executable, "-m", "llm_orchestrator", "run", str(workflow)], cwd=program.folder,
            env=program.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (143, -signal.SIGTERM)
