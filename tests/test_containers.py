"""Containers: parallel, branch, loop, workflow and for_each, each sentence of their reference with a run of its own."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import finished

from llm_orchestrator import ParseError, RunResult, Step, ValidationError, Workflow, WorkflowExecutor


def value(step_id: str, template: str = "x", **keys: Any) -> Step:
    return Step(id=step_id, type="transform", function="template", template=template, **keys)


def llm(step_id: str, prompt: str = "hi", **keys: Any) -> Step:
    return Step(id=step_id, type="llm", provider="p", model="m", prompt=prompt, **keys)


def failing(step_id: str, **keys: Any) -> Step:
    return Step(id=step_id, type="action", action="fail", message="boom", **keys)


def parallel(step_id: str, *tasks: Step, **keys: Any) -> Step:
    return Step(id=step_id, type="parallel", tasks=list(tasks), **keys)


def branch(step_id: str, condition: Any, branches: dict[Any, list[Step]], **keys: Any) -> Step:
    return Step(id=step_id, type="branch", condition=condition, branches=branches, **keys)


def loop(step_id: str, *steps: Step, until: Any, max_iterations: int = 10, **keys: Any) -> Step:
    return Step(id=step_id, type="loop", steps=list(steps), until=until, max_iterations=max_iterations, **keys)


def called(step_id: str, workflow: Any, **keys: Any) -> Step:
    return Step(id=step_id, type="workflow", workflow=workflow, **keys)


def run(
    *steps: Step, inputs: Any = None, provider: Any = None, concurrency: int | None = None, **keys: Any
) -> RunResult:
    """One run, which must end within 20 seconds."""
    names = ("actions", "transforms", "on_event", "providers")
    options = {name: keys.pop(name) for name in names if name in keys}
    options.setdefault("providers", {"p": provider or (lambda request: request.prompt)})
    executor = WorkflowExecutor(Workflow("t", steps, **keys), inputs, max_concurrency=concurrency, **options)
    return finished(executor)


def states(result: RunResult) -> dict[str, str]:
    return {step_id: step.reason or step.status for step_id, step in result.items()}


def output(result: RunResult, step_id: str) -> Any:
    return next(iter(result[step_id].outputs.values()))


class Meter:
    """A provider that knows how many of its calls ran at once."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.seconds, self.lock, self.active, self.most = seconds, threading.Lock(), 0, 0

    def __call__(self, request: Any) -> str:
        with self.lock:
            self.active += 1
            self.most = max(self.most, self.active)
        time.sleep(self.seconds)
        with self.lock:
            self.active -= 1
        return str(request.prompt)


# for_each


def test_for_each_runs_a_step_once_per_item_in_item_order() -> None:
    def backwards(request: Any) -> str:
        time.sleep(0.05 - int(request.prompt) / 100)
        return f"<{request.prompt}>"

    result = run(
        llm("f", "{{item}}", for_each="{{inputs.n}}", output="text"), inputs={"n": [0, 1, 2, 3]}, provider=backwards
    )
    assert result["f"].outputs == {"text": ["<0>", "<1>", "<2>", "<3>"]}
    assert list(result) == ["f", "f.0", "f.1", "f.2", "f.3"]
    assert result["f.2"].outputs == {"text": "<2>"}


def test_for_each_over_a_map_has_key_index_and_item() -> None:
    result = run(value("f", "{{index}}:{{key}}={{item}}", for_each={"a": 1, "b": 2}))
    assert output(result, "f") == ["0:a=1", "1:b=2"]


def test_for_each_over_a_map_from_an_input() -> None:
    assert output(run(value("f", "{{key}}", for_each="{{inputs.m}}"), inputs={"m": {"x": 0, "y": 0}}), "f") == [
        "x", "y"
    ]


def test_for_each_over_an_earlier_steps_output() -> None:
    split = Step(id="s", type="transform", function="split", inputs={"text": "a,b,c"}, separator=",")
    assert output(run(value("f", "{{item}}!", for_each="{{steps.s}}"), split), "f") == ["a!", "b!", "c!"]


@pytest.mark.parametrize("items", [[], {}], ids=["list", "map"])
@pytest.mark.parametrize("container", [False, True])
def test_no_items_give_empty_lists(items: Any, container: bool) -> None:
    step = parallel("f", value("a"), for_each=items) if container else value("f", for_each=items)
    result = run(step, value("after", "{{json steps.f}}"))
    assert output(result, "f") == []
    assert output(result, "after") == "[]"
    assert list(result) == ["f", "after"]


@pytest.mark.parametrize("concurrency", [1, 16])
def test_10000_items(concurrency: int) -> None:
    result = run(
        llm("f", "{{item}}", for_each="{{inputs.n}}"), inputs={"n": list(range(10_000))}, concurrency=concurrency
    )
    assert output(result, "f") == [str(number) for number in range(10_000)]
    assert len(result) == 10_001


@pytest.mark.parametrize("source", ["text", 5, None, True], ids=repr)
def test_for_each_over_something_else_fails_the_step_and_says_so(source: Any) -> None:
    result = run(value("f", for_each="{{inputs.n}}"), value("b", depends_on="f"), inputs={"n": source})
    assert result["f"].error is not None
    assert "list or a map" in result["f"].error["message"]
    assert states(result) == {"f": "failed", "b": "upstream_failed"}


def test_a_failed_item_fails_the_step_after_the_others_finished() -> None:
    result = run(value("f", "{{item.a}}", for_each=[1, {"a": 2}, 3]), value("b", depends_on="f"))
    assert states(result) == {
        "f": "failed", "f.0": "failed", "f.1": "completed", "f.2": "failed", "b": "upstream_failed"
    }
    assert result["f"].error is not None
    assert result["f"].error["message"].startswith("f.0: ")
    assert "1 more of 3" in result["f"].error["message"]
    assert result["f.1"].outputs == {"output": 2}
    assert result.status == "failed"


def test_continue_on_error_leaves_null_and_the_error_in_the_items_place() -> None:
    steps = [value("f", "{{item.a}}", for_each=[1, {"a": 2}], continue_on_error=True), value("b", "{{json steps.f}}")]
    result = run(*steps)
    assert (result.status, output(result, "f"), output(result, "b")) == ("completed", [None, 2], "[null,2]")
    assert result["f.0"].error is not None
    assert "item.a" in result["f.0"].error["message"]
    assert result["f.1"].error is None
    assert result.to_dict()["steps"]["f.0"]["error"]["type"] == "TemplateError"


@pytest.mark.parametrize(("limit", "most"), [(1, 1), (3, 3), (None, 8)])
def test_for_each_has_a_max_concurrency_of_its_own(limit: int | None, most: int) -> None:
    meter = Meter()
    keys = {"max_concurrency": limit} if limit else {}
    run(llm("f", for_each=list(range(16)), **keys), provider=meter, concurrency=8)
    assert meter.most == most


def test_a_condition_on_the_item_skips_single_items() -> None:
    result = run(value("f", "{{item}}", for_each=[1, 2, 3], condition="item != 2"))
    assert output(result, "f") == [1, None, 3]
    assert states(result) == {"f": "completed", "f.0": "completed", "f.1": "condition", "f.2": "completed"}


def test_a_condition_without_the_item_skips_the_whole_step() -> None:
    result = run(value("f", "{{item}}", for_each=[1, 2], condition="inputs.go"), inputs={"go": False})
    assert states(result) == {"f": "condition"}


def test_every_output_of_a_step_is_a_list_of_the_items_outputs() -> None:
    result = run(llm("f", "{{item}}", for_each=["a", "b"], output=["text", "model"]))
    assert result["f"].outputs == {"text": ["a", "b"], "model": ["m", "m"]}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (value("f", "{{item}}", for_each=["a", "b"]), {"output": ["a", "b"]}),
        (Step("f", "action", action="log", message="{{item}}", for_each=["a", "b"]), None),
        (parallel("f", value("c", "{{item}}1"), value("d", "{{steps.c}}2"), for_each=["a", "b"]),
         {"c": ["a1", "b1"], "d": ["a12", "b12"]}),
        (branch("f", "item", {"a": [value("c", "A")], "default": [value("d", "{{item}}")]}, for_each=["a", "b"]),
         {"branch": ["a", "default"], "c": ["A", None], "d": [None, "b"]}),
        (loop("f", value("c", "{{item}}{{iteration}}"), until="iteration == 1", for_each=["a", "b"]),
         {"c": ["a1", "b1"], "iterations": [2, 2]}),
        (called("f", {"name": "s", "inputs": {"q": {}}, "steps": [value("z", "<{{q}}>")]}, inputs={"q": "{{item}}"},
                for_each=["a", "b"]), {"z": ["<a>", "<b>"]}),
    ],
    ids=lambda step: step.type if isinstance(step, Step) else "",
)  # fmt: skip
def test_for_each_works_on_every_type(step: Step, expected: Any) -> None:
    result = run(step)
    assert result.status == "completed", result.error
    if expected is not None:
        assert result["f"].outputs == expected


def test_children_of_for_each_containers_have_ids_with_the_index() -> None:
    result = run(parallel("review", value("score", "{{index}}"), for_each=["a", "b"]))
    assert list(result) == ["review", "review.0", "review.0.score", "review.1", "review.1.score"]
    assert result["review.1.score"].outputs == {"output": 1}
    assert "review.0.score" in result.to_dict()["steps"]


def test_the_inner_item_hides_the_outer_one() -> None:
    inner = parallel("i", value("v", "{{item}}"), for_each="{{item}}")
    result = run(parallel("o", inner, for_each=[["a", "b"], ["c"]]))
    assert output(result, "o") == [["a", "b"], ["c"]]
    assert result["o.0.i.1.v"].outputs == {"output": "b"}


def test_each_item_is_retried_by_itself() -> None:
    calls: list[str] = []

    def flaky(request: Any) -> str:
        calls.append(request.prompt)
        if calls.count(request.prompt) == 1 and request.prompt == "b":
            raise ConnectionError("reset")
        return str(request.prompt)

    result = run(llm("f", "{{item}}", for_each=["a", "b"], retry={"initial_delay": 1}), provider=flaky)
    assert output(result, "f") == ["a", "b"]
    assert (result["f.0"].attempts, result["f.1"].attempts) == (1, 2)


def test_each_item_has_the_deadline_for_itself() -> None:
    steps = [
        Step("f", "action", action="sleep", seconds="{{item}}", for_each=[0, 30, 0], timeout_seconds=0.3,
             continue_on_error=True)
    ]
    result = run(*steps)
    assert states(result) == {"f": "completed", "f.0": "completed", "f.1": "failed", "f.2": "completed"}


# parallel


def test_parallel_gives_one_value_per_task() -> None:
    result = run(
        parallel("p", value("a", "1"), llm("b", "2", output=["text", "model"])), value("c", "{{steps.p.b.model}}")
    )
    assert result["p"].outputs == {"a": "1", "b": "2"}
    assert output(result, "c") == "m"
    assert list(result) == ["p", "p.a", "p.b", "c"]


def test_tasks_run_at_the_same_time() -> None:
    meter = Meter(0.1)
    run(parallel("p", *(llm(f"t{n}") for n in range(4))), provider=meter, concurrency=8)
    assert meter.most == 4


def test_parallel_has_a_max_concurrency_of_its_own() -> None:
    meter = Meter()
    run(parallel("p", *(llm(f"t{n}") for n in range(6)), max_concurrency=2), provider=meter, concurrency=8)
    assert meter.most == 2


def test_outputs_of_a_container_may_be_renamed() -> None:
    result = run(parallel("p", value("a", "1"), value("b", "2"), output=["x", "y"]), value("c", "{{steps.p.y}}"))
    assert result["p"].outputs == {"x": "1", "y": "2"}
    assert output(result, "c") == "2"


def test_a_failed_child_fails_the_container_after_its_siblings_ended() -> None:
    result = run(parallel("p", failing("a"), llm("b")), value("c", depends_on="p"), provider=Meter(0.05))
    assert states(result) == {"p": "failed", "p.a": "failed", "p.b": "completed", "c": "upstream_failed"}
    assert result["p"].error is not None
    assert result["p"].error["message"] == "p.a: boom"
    assert result.error is not None
    assert result.error["step_id"] == "p"


def test_a_child_with_continue_on_error_does_not_fail_its_container() -> None:
    result = run(
        parallel("p", failing("a", continue_on_error=True), value("b")), value("c", "[{{steps.p.a}}{{steps.p.b}}]")
    )
    assert (result.status, result["p"].outputs, output(result, "c")) == ("completed", {"a": None, "b": "x"}, "[x]")


def test_a_container_with_continue_on_error_lets_its_dependents_run() -> None:
    steps = [
        parallel("p", failing("a"), value("b", "B"), continue_on_error=True),
        value("c", "{{steps.p.b.output}}{{steps.p.a.error}}"),
    ]
    result = run(*steps)
    assert (result.status, result["p"].outputs, output(result, "c")) == ("completed", {"a": None, "b": None}, "Bboom")


# scopes


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{inputs.i}}{{i}}{{input.i}}", "III"),
        ("{{steps.before.output}}", "B"),
        ("{{steps.before}}", "B"),
        ("{{outputs.before.output}}", "B"),
        ("{{steps.sibling.output}}", "S"),
        ("{{outputs.sibling.output}}", "S"),
        ("{{outputs.named}}", "N"),
        ("{{workflow.name}}", "t"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("depth", [1, 3])
def test_inside_a_container_outer_values_and_siblings_are_in_scope(template: str, expected: str, depth: int) -> None:
    sibling = [value("sibling", "S")]
    step = parallel("c0", *sibling, value("t", template))
    for level in range(1, depth):
        step = parallel(f"c{level}", step)
    result = run(value("before", "B"), value("other", "N", output="named"), step, inputs={"i": "I"})
    assert result.status == "completed", result.error
    full_id = ".".join([f"c{level}" for level in reversed(range(depth))] + ["t"])
    assert output(result, full_id) == expected


def test_conditions_inside_a_container_see_the_outer_steps() -> None:
    child = value("t", condition="steps.before == 'B' and outputs.before.output == 'B' and steps.s == 'S'")
    assert states(run(value("before", "B"), parallel("p", child, value("s", "S"))))["p.t"] == "completed"


def test_a_child_hides_an_outer_step_of_the_same_id() -> None:
    result = run(
        value("a", "outer"), parallel("p", value("a", "inner"), value("b", "{{steps.a}}")), value("c", "{{steps.a}}")
    )
    assert (output(result, "p.b"), output(result, "c")) == ("inner", "outer")


def test_a_container_waits_for_what_its_children_refer_to() -> None:
    result = run(parallel("p", parallel("q", value("t", "{{steps.late}}"))), llm("late", "L"), provider=Meter(0.05))
    assert output(result, "p.q.t") == "L"


@pytest.mark.parametrize("reference", ["steps.p.q.r.output", "steps.p.q.r", "steps.p.q", "steps.p"])
def test_from_outside_children_are_reached_through_their_containers(reference: str) -> None:
    result = run(parallel("p", parallel("q", value("r", "R"))), value("o", "{{" + reference + "}}"))
    assert output(result, "o") == "R"


def test_from_outside_an_unknown_child_is_refused() -> None:
    with pytest.raises(ValidationError, match="no output 'rr'"):
        Workflow("t", [parallel("p", value("r")), value("o", "{{steps.p.rr}}")]).validate()


def test_a_child_is_not_in_scope_outside_its_container() -> None:
    with pytest.raises(ValidationError, match="no step 'r'"):
        Workflow("t", [parallel("p", value("r")), value("o", "{{steps.r}}")]).validate()


@pytest.mark.parametrize(
    ("container", "reference"),
    [
        (parallel("c", value("r"), condition="1 == 2"), "steps.c.r.output"),
        (parallel("c", value("r"), condition="1 == 2"), "steps.c.r"),
        (parallel("c", parallel("r", value("q")), condition="1 == 2"), "steps.c.r.q.output"),
        (loop("c", value("r"), until="true", condition="1 == 2"), "steps.c.r.output"),
        (called("c", {"name": "s", "steps": [value("r")]}, condition="1 == 2"), "steps.c.r.output"),
        (parallel("c", value("r"), condition="1 == 2", for_each=[1]), "steps.c.r"),
        (branch("c", "1", {"1": [value("s")], "2": [value("r")]}), "steps.c.r.output"),
        (branch("c", "3", {"1": [value("s")], "2": [value("r")]}), "steps.c.r.output"),
        (branch("c", "1", {"1": [failing("s")], "2": [value("r")]}, continue_on_error=True), "steps.c.r.output"),
    ],
)
def test_children_that_did_not_run_are_null_from_outside(container: Step, reference: str) -> None:
    result = run(container, value("o", "[{{" + reference + "}}]", trigger_rule="all_done"))
    assert output(result, "o") == "[]", result["o"].error


# branch

BRANCHES: dict[Any, list[Step]] = {
    "yes": [value("a", "A")], 2: [value("b", "B")], False: [value("c", "C")],
    None: [value("d", "D")], "0.5": [value("e", "E")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "child"),
    [("yes", "a"), (" yes\n", "a"), (2, "b"), (2.0, "b"), ("2", "b"), (False, "c"),
     ("false", "c"), (None, "d"), (0.5, "e"),
     ("no", None), (True, None), (3, None), ([2], None), ({}, None), ("Yes", None)],
    ids=repr,
)  # fmt: skip
def test_branch_picks_by_the_value_of_its_condition(given: Any, child: str | None) -> None:
    result = run(branch("br", "inputs.v", BRANCHES), inputs={"v": given})
    assert states(result) == {
        "br": "completed", **{f"br.{other}": "completed" if other == child else "branch" for other in "abcde"}
    }  # fmt: skip
    assert list(result) == ["br", "br.a", "br.b", "br.c", "br.d", "br.e"]
    expected = {other: other.upper() if other == child else None for other in "abcde"}
    assert {name: result["br"].outputs[name] for name in "abcde"} == expected


@pytest.mark.parametrize("condition", ["{{inputs.v}}", "inputs.v > 3", "inputs.v > 3 and true"])
def test_a_branchs_condition_may_be_a_reference_or_a_comparison(condition: str) -> None:
    step = branch("br", condition, {"true": [value("a")], "5": [value("b")]})
    assert run(step, inputs={"v": 5})["br"].outputs["branch"] in ("true", "5")


def test_branch_takes_default_when_nothing_else_fits() -> None:
    result = run(branch("br", "inputs.v", {"a": [value("x")], "default": [value("y", "Y")]}), inputs={"v": "?"})
    assert result["br"].outputs == {"branch": "default", "x": None, "y": "Y"}


def test_no_match_and_no_default_skips_every_child_and_completes() -> None:
    result = run(branch("br", "'?'", {"a": [value("x")]}), value("after", "[{{steps.br.branch}}{{steps.br.x}}]"))
    assert states(result) == {"br": "completed", "br.x": "branch", "after": "completed"}
    assert output(result, "after") == "[]"


@pytest.mark.parametrize("given", ["a", "b", "c"])
def test_an_id_may_stand_in_several_branches(given: str) -> None:
    ends: list[str] = []
    step = branch("br", "inputs.v", {"a": [value("x", "1")], "b": [value("x", "2")], "d": [value("x", "3")]})

    def listener(event: dict[str, Any]) -> None:
        if event.get("step_id") == "br.x":
            ends.append(event["type"])

    result = run(step, value("o", "{{steps.br.x}}"), inputs={"v": given}, on_event=listener)
    assert output(result, "o") == {"a": "1", "b": "2", "c": None}[given]
    assert [kind for kind in ends if kind not in ("step_running", "step_pending")] == [
        "step_skipped" if given == "c" else "step_completed"
    ]


def test_a_failed_child_still_leaves_the_other_branches_recorded() -> None:
    result = run(branch("br", "'a'", {"a": [failing("x")], "b": [value("y")]}))
    assert states(result) == {"br": "failed", "br.x": "failed", "br.y": "branch"}


def test_two_branches_for_one_value_are_refused() -> None:
    with pytest.raises(ValidationError, match="twice"):
        Workflow.from_dict({"name": "t", "steps": [branch("b", "1", {"1": [value("x")], 1: [value("y")]}).to_dict()]})


# loop


def test_loop_repeats_until_the_condition_holds() -> None:
    result = run(loop("l", value("a", "{{iteration}}"), until="steps.a == 3"), value("o", "{{steps.l.a.output}}"))
    assert result["l"].outputs == {"a": 3, "iterations": 4}
    assert list(result) == ["l", "l.0.a", "l.1.a", "l.2.a", "l.3.a", "o"]
    assert output(result, "o") == 3


def test_the_previous_iteration_is_in_scope() -> None:
    draft = value("draft", "{{#if previous}}{{previous.draft}}{{previous.note.output}}{{else}}start{{/if}}")
    note = value("note", "+{{length steps.draft}}")
    result = run(loop("l", draft, note, until="iteration == 2"))
    assert output(result, "l.2.draft") == "start+5+7"


def test_previous_is_null_in_the_first_iteration() -> None:
    result = run(loop("l", value("a", "x", condition="previous == null"), until="iteration == 1"))
    assert states(result) == {"l": "completed", "l.0.a": "completed", "l.1.a": "condition"}


def test_a_loop_that_is_exhausted_is_an_error_that_says_so() -> None:
    result = run(loop("l", value("a"), until="false", max_iterations=3), value("b", depends_on="l"))
    assert result["l"].error is not None
    assert "3 iterations" in result["l"].error["message"]
    assert states(result) == {
        "l": "failed", "l.0.a": "completed", "l.1.a": "completed", "l.2.a": "completed", "b": "upstream_failed"
    }  # fmt: skip


def test_on_exhausted_continue_keeps_the_last_iteration() -> None:
    result = run(loop("l", value("a", "{{iteration}}"), until="false", max_iterations=3, on_exhausted="continue"))
    assert (result.status, result["l"].outputs) == ("completed", {"a": 2, "iterations": 3})


def test_a_failed_child_ends_the_loop() -> None:
    result = run(loop("l", value("a", "{{#if previous}}{{nothing.x}}{{/if}}"), until="false"), inputs={"nothing": {}})
    assert states(result) == {"l": "failed", "l.0.a": "completed", "l.1.a": "failed"}


def test_until_sees_a_tolerated_failure() -> None:
    result = run(
        loop("l", failing("a", continue_on_error=True), until="steps.a.status == 'failed' and steps.a == null")
    )
    assert result["l"].outputs == {"a": None, "iterations": 1}


@pytest.mark.parametrize("keys", [{"until": "x"}, {"max_iterations": 3}], ids=["max_iterations", "until"])
def test_a_loop_needs_both_its_ends(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="is missing"):
        Workflow.from_dict(
            {"name": "t", "steps": [{"id": "l", "type": "loop", "steps": [value("a").to_dict()], **keys}]}
        )


def test_a_loop_of_1000_iterations_takes_linear_memory_and_time() -> None:
    step = loop("l", value("a", "{{iteration}}{{#if previous}}{{lookup previous 'b'}}{{/if}}"), value("b", "."),
                until="iteration == 999", max_iterations=1000)  # fmt: skip
    assert run(step)["l"].outputs["iterations"] == 1000


# workflow

SUB = """
name: sub
inputs:
  q: {type: string, required: true}
  n: {type: integer, default: 2}
steps:
  - {id: z, type: transform, function: template, template: "<{{q}}{{n}}>"}
  - {id: y, type: transform, function: template, template: "{{steps.z}}!"}
outputs: {answer: "{{steps.y}}", n: "{{inputs.n}}"}
"""


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".yaml").write_text(text, encoding="utf-8")
    return folder


def test_a_workflow_file_is_found_relative_to_its_callers_file(tmp_path: Path) -> None:
    write(
        tmp_path, main="name: m\nsteps: [{id: s, type: workflow, workflow: parts/one.yaml, inputs: {q: Q}}]",
        parts__one="name: o\nsteps: [{id: t, type: workflow, workflow: two.yaml, inputs: {q: '{{q}}'}}]",
        parts__two=SUB,
    )  # fmt: skip
    result = finished(WorkflowExecutor(Workflow.from_file(tmp_path / "main.yaml")))
    assert result["s.t"].outputs == {"answer": "<Q2>!", "n": 2}
    assert list(result) == ["s", "s.t", "s.t.z", "s.t.y"]


def test_an_inline_workflow_takes_mapped_inputs_and_gives_its_outputs() -> None:
    steps = [value("q", "Q"), called("s", Workflow.from_yaml(SUB), inputs={"q": "{{steps.q}}", "n": 7})]
    result = run(*steps, value("o", "{{steps.s.answer}} {{steps.s.y.output}}"))
    assert (result["s"].outputs, output(result, "o")) == ({"answer": "<Q7>!", "n": 7}, "<Q7>! <Q7>!")


def test_a_workflow_without_outputs_gives_its_steps_first_outputs() -> None:
    result = run(called("s", {"name": "x", "steps": [value("a", "1"), value("b", "2")]}))
    assert result["s"].outputs == {"a": "1", "b": "2"}


def test_a_called_workflow_does_not_see_the_callers_steps_and_inputs() -> None:
    step = called("s", {"name": "x", "steps": [value("a", "{{default inputs.secret 'none'}}")]})
    assert output(run(step, inputs={"secret": "!"}), "s.a") == "none"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [({}, "needs the input 'q'"), ({"q": "x", "nn": 1}, "no input 'nn'"), (None, "needs the input 'q'")],
)
def test_the_inputs_of_a_call_are_checked_before_the_run(inputs: Any, message: str) -> None:
    keys = {} if inputs is None else {"inputs": inputs}
    with pytest.raises(ValidationError, match=message):
        Workflow("t", [called("s", Workflow.from_yaml(SUB), **keys)]).validate()


def test_an_input_of_the_wrong_type_fails_the_step() -> None:
    result = run(called("s", Workflow.from_yaml(SUB), inputs={"q": "{{inputs.n}}"}), inputs={"n": 5})
    assert result["s"].error is not None
    assert "q must be a string" in result["s"].error["message"]


@pytest.mark.parametrize("text", ["name: x\nsteps: [", "name: x\nsteps: []", "just text"])
def test_a_broken_workflow_file_is_a_problem_of_the_caller(tmp_path: Path, text: str) -> None:
    write(tmp_path, main="name: m\nsteps: [{id: s, type: workflow, workflow: sub.yaml}]", sub=text)
    with pytest.raises((ValidationError, ParseError), match=r"sub\.yaml"):
        Workflow.from_file(tmp_path / "main.yaml").validate()


def test_a_missing_workflow_file_is_a_problem_of_the_caller(tmp_path: Path) -> None:
    write(tmp_path, main="name: m\nsteps: [{id: s, type: workflow, workflow: nope.yaml}]")
    with pytest.raises(ValidationError, match=r"main\.yaml:2:.*nope\.yaml.*cannot be read"):
        Workflow.from_file(tmp_path / "main.yaml").validate()


def test_the_file_may_be_picked_by_a_template(tmp_path: Path) -> None:
    write(
        tmp_path, sub=SUB,
        main="name: m\nsteps: [{id: s, type: workflow, for_each: [sub, nope], continue_on_error: true, "
        "workflow: '{{item}}.yaml', inputs: {q: '{{item}}'}}]",
    )  # fmt: skip
    result = finished(WorkflowExecutor(Workflow.from_file(tmp_path / "main.yaml")))
    assert states(result) == {
        "s": "completed", "s.0": "completed", "s.0.z": "completed", "s.0.y": "completed", "s.1": "failed"
    }
    assert output(result, "s.0.y") == "<sub2>!"


def test_what_a_templated_workflow_needs_is_checked_before_its_first_step(tmp_path: Path) -> None:
    write(
        tmp_path, main="name: m\nsteps: [{id: s, type: workflow, workflow: '{{f}}'}]",
        sub="name: s\nsteps: [{id: a, type: transform, function: template, template: x}, "
        "{id: b, type: action, action: nope}]",
    )  # fmt: skip
    result = finished(WorkflowExecutor(Workflow.from_file(tmp_path / "main.yaml"), {"f": "sub.yaml"}))
    assert list(result) == ["s"]
    assert result["s"].error is not None
    assert "'nope' is unknown" in result["s"].error["message"]


def test_recursion_ends_when_a_condition_says_so(tmp_path: Path) -> None:
    text = (
        "name: m\ninputs: {items: {default: [1, 2, 3]}}\nsteps:\n"
        "- {id: rest, type: transform, function: slice, inputs: {items: '{{inputs.items}}'}, start: 1}\n"
        "- {id: s, type: workflow, workflow: main.yaml, condition: len(inputs.items) > 0, "
        "inputs: {items: '{{steps.rest}}'}}"
    )
    write(tmp_path, main=text)
    result = finished(WorkflowExecutor(Workflow.from_file(tmp_path / "main.yaml")))
    assert result.status == "completed", result.error
    assert states(result)["s.s.s.s"] == "condition"


def test_endless_recursion_is_an_error_that_shows_the_chain(tmp_path: Path) -> None:
    write(
        tmp_path, a="name: alpha\nsteps: [{id: s, type: workflow, workflow: b.yaml}]",
        b="name: beta\nsteps: [{id: s, type: workflow, workflow: a.yaml}]",
    )  # fmt: skip
    result = finished(WorkflowExecutor(Workflow.from_file(tmp_path / "a.yaml")))
    assert result.status == "failed"
    assert result.error is not None
    assert "more than 16 deep: alpha -> beta -> alpha -> beta" in result.error["message"]
    assert max(step_id.count(".") for step_id in result) == 15


def test_a_called_workflow_keeps_its_own_deadline() -> None:
    steps = [Step("a", "action", action="sleep", seconds=30), value("b", depends_on="a")]
    sub = {"name": "x", "timeout_seconds": 0.1, "steps": steps}
    result = run(called("s", sub), value("c", depends_on="s"))
    assert states(result) == {"s": "failed", "s.a": "cancelled", "s.b": "cancelled", "c": "upstream_failed"}
    assert result["s"].error is not None
    assert "0.1 s" in result["s"].error["message"]


def test_a_called_workflow_has_its_own_defaults_and_partials() -> None:
    sub = {"name": "x", "defaults": {"llm": {"provider": "p", "model": "other"}}, "partials": {"hi": "Hi!"},
           "steps": [{"id": "a", "type": "llm", "prompt": "{{> hi}}", "output": ["text", "model"]}]}  # fmt: skip
    assert run(called("s", sub))["s.a"].outputs == {"text": "Hi!", "model": "other"}


# conditions, trigger rules, retries, deadlines, events, cancellation inside containers


def test_conditions_and_trigger_rules_work_inside_containers() -> None:
    result = run(
        parallel(
            "p", value("a", condition="1 == 2"), value("b", depends_on="a"), value("c", depends_on=["a", "d"]),
            value("d"),
            failing("e", continue_on_error=True), value("f", depends_on="e", trigger_rule="one_failed"),
            value("g", depends_on="a", trigger_rule="all_done"),
        )
    )  # fmt: skip
    assert {step_id[2:]: state for step_id, state in states(result).items() if step_id != "p"} == {
        "a": "condition", "b": "upstream_skipped", "c": "completed", "d": "completed", "e": "failed",
        "f": "trigger_rule", "g": "completed",
    }  # fmt: skip


def test_a_container_itself_is_skipped_like_any_step() -> None:
    steps = [
        failing("a"), parallel("p", value("x"), depends_on="a"), loop("l", value("y"), until="true", condition="false")
    ]
    assert states(run(*steps)) == {"a": "failed", "p": "upstream_failed", "l": "condition"}


def test_children_are_retried() -> None:
    calls: list[int] = []

    def flaky(request: Any) -> str:
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError("reset")
        return "ok"

    result = run(parallel("p", llm("a", retry={"initial_delay": 1})), provider=flaky)
    assert (result["p"].outputs, result["p.a"].attempts, result["p"].attempts) == ({"a": "ok"}, 3, 1)


@pytest.mark.parametrize("error", [ConnectionError("reset"), ValueError("odd")], ids=["transient", "unknown"])
@pytest.mark.parametrize("deep", [False, True])
def test_a_container_is_retried_as_a_whole_when_it_asks_for_it(error: Exception, deep: bool) -> None:
    calls: list[int] = []

    def flaky() -> str:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return "ok"

    def step(**keys: Any) -> Step:
        child = Step("a", "action", action="flaky", retry={"max_attempts": 1})
        return loop("l", parallel("q", child) if deep else child, until="iteration == 1", **keys)

    assert run(step(), actions={"flaky": flaky}).status == "failed"
    calls.clear()
    result = run(step(retry={"max_attempts": 2, "initial_delay": 1}), actions={"flaky": flaky})
    assert (result.status, len(calls), result["l"].attempts) == ("completed", 4, 2)


def test_a_retried_container_leaves_no_results_of_the_failed_attempt() -> None:
    calls: list[int] = []

    def third_fails() -> int:
        calls.append(1)
        if len(calls) == 3:
            raise ConnectionError("reset")
        return len(calls)

    child = Step("a", "action", action="count", retry={"max_attempts": 1})
    result = run(loop("l", child, until="steps.a > 3", retry={"initial_delay": 1}), actions={"count": third_fails})
    assert list(result) == ["l", "l.0.a"]


def test_a_container_does_not_retry_an_error_that_is_final() -> None:
    result = run(parallel("p", failing("a"), retry={"initial_delay": 1}))
    assert (result.status, result["p"].attempts) == ("failed", 1)


def test_the_deadline_of_a_container_reaches_its_children() -> None:
    sleeping = Step("a", "action", action="sleep", seconds=30)
    result = run(parallel("p", parallel("q", sleeping), timeout_seconds=0.1), value("b", depends_on="p"))
    assert states(result) == {"p": "failed", "p.q": "cancelled", "p.q.a": "cancelled", "b": "upstream_failed"}


def test_the_deadline_of_a_child_is_its_own() -> None:
    sleeping = Step("a", "action", action="sleep", seconds=30, timeout_seconds=0.1, continue_on_error=True)
    assert states(run(parallel("p", sleeping, value("b")))) == {"p": "completed", "p.a": "failed", "p.b": "completed"}


def test_fail_fast_reaches_into_containers() -> None:
    sleeping = Step("s", "action", action="sleep", seconds=30)
    steps = [
        parallel("p", sleeping), parallel("q", parallel("r", failing("f"), sleeping)), loop("l", sleeping, until="true")
    ]
    result = run(*steps, fail_fast=True)
    assert states(result) == {
        "p": "cancelled", "p.s": "cancelled", "q": "failed", "q.r": "failed", "q.r.f": "failed", "q.r.s": "cancelled",
        "l": "cancelled", "l.0.s": "cancelled",
    }  # fmt: skip


def test_events_tell_of_children_by_their_full_ids() -> None:
    events: list[tuple[str, str]] = []
    step = parallel("p", llm("a"), value("b", condition="false"), for_each=[1])
    run(step, on_event=lambda event: events.append((event["type"], event.get("step_id", ""))))
    assert [event for event in events if event[0] not in ("provider_call", "step_pending")] == [
        ("run_started", ""), ("step_running", "p"), ("step_running", "p.0"), ("step_skipped", "p.0.b"),
        ("step_running", "p.0.a"), ("step_completed", "p.0.a"), ("step_completed", "p.0"), ("step_completed", "p"),
        ("run_finished", ""),
    ]  # fmt: skip


def test_containers_hold_no_slot() -> None:
    step: Step = llm("x", "deep")
    for level in range(8):
        step = parallel(f"c{level}", step, llm(f"y{level}"))
    steps = [step, loop("l", llm("z"), until="iteration == 2"), llm("w", for_each=[1, 2])]
    assert run(*steps, concurrency=1).status == "completed"


@pytest.mark.parametrize("depth", [8, 40])
def test_containers_nest_to_the_depth_that_the_loader_accepts(depth: int) -> None:
    step = value("v", "{{inputs.i}}{{steps.first}}")
    for level in range(depth):
        step = [
            lambda s, n: parallel(n, s), lambda s, n: branch(n, "1", {"1": [s]}),
            lambda s, n: loop(n, s, until="true"), lambda s, n: parallel(n, s, for_each=[1]),
        ][level % 4](step, f"c{level}")  # fmt: skip
    text = Workflow("t", [value("first", "F"), step]).to_json()
    result = finished(WorkflowExecutor(Workflow.from_json(text), {"i": "I"}))
    assert result.status == "completed", result.error
    deepest = max(result, key=len)
    assert output(result, deepest) == "IF"
    json.dumps(result.to_dict())


@pytest.mark.parametrize("kind", ["parallel", "workflow", "branch"])
@pytest.mark.parametrize("depth", [150, 1000, 5000])
def test_deeper_nesting_is_refused(kind: str, depth: int) -> None:
    step: Any = {"id": "v", "type": "transform", "function": "template", "template": "x"}
    for level in range(depth):
        keys = {
            "parallel": {"tasks": [step]}, "branch": {"condition": "1", "branches": {"1": [step]}},
            "workflow": {"workflow": {"name": "w", "steps": [step]}},
        }[kind]  # fmt: skip
        step = {"id": f"c{level}", "type": kind, **keys}
    with pytest.raises(ValidationError, match="deep"):
        Workflow.from_dict({"name": "t", "steps": [step]}).validate()


# what looks alike


@pytest.mark.parametrize(
    ("step", "name"),
    [(branch("c", "1", {"1": [value("branch")]}), "branch"), (loop("c", value("iterations"), until="true"), "iterations")],
    ids=["branch", "loop"],
)
def test_a_child_may_not_take_the_name_of_its_containers_own_output(step: Step, name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        Workflow("t", [step]).validate()


def test_children_may_be_called_output_status_and_error() -> None:
    step = parallel("p", value("output", "O"), value("status", "S"), value("error", "E"))
    assert output(run(step, value("o", "{{steps.p.output}}{{steps.p.status}}{{steps.p.error}}")), "o") == "OSE"


def test_the_budget_of_a_called_workflow_is_warned_about() -> None:
    sub = {"name": "s", "budget": {"max_calls": 1}, "steps": [value("a").to_dict()]}
    assert "budget" in str(Workflow("t", [called("s", sub)]).validate()[0])


@pytest.mark.parametrize(("item", "text"), [(1, "1"), (2.5, "2.5"), (None, ""), (True, "true"), ({"a": 1}, '{"a":1}')])
def test_an_item_alone_in_a_prompt_or_message_is_text(item: Any, text: str) -> None:
    step = llm("f", "{{item}}", system="{{item}}", for_each=[item])
    assert output(run(step), "f") == [text]
    messages = [{"role": "user", "content": "{{item}}"}]
    step = Step("f", "llm", provider="p", model="m", messages=messages, for_each=[item])
    assert output(run(step, provider=lambda request: str(request.messages[0]["content"])), "f") == [text]


def test_a_loop_of_steps_that_never_wait_hears_of_its_deadline() -> None:
    started = time.monotonic()
    result = run(loop("l", value("a"), until="false", max_iterations=1_000_000), timeout_seconds=0.2)
    assert result.status == "timed_out"
    assert time.monotonic() - started < 5
