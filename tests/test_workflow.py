"""Room 6, Workflow: what is read, what is refused, and where the finger points.

`mistakes.txt` holds one wrong document after another, each with every problem that `validate` must report for it.
"""

from __future__ import annotations

import collections
import copy
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Program
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_orchestrator import (
    DagError,
    OrchestratorError,
    ParseError,
    Step,
    ValidationError,
    Workflow,
    WorkflowDAG,
    WorkflowExecutor,
    load_yaml,
)

HERE = Path(__file__).resolve().parent
LLM = "{id: a, type: llm, provider: openai, model: m, prompt: hi}"
MISTAKES = dict(case.split("\n", 1) for case in (HERE / "mistakes.txt").read_text().strip()[2:].split("\n\n# "))


def problems(text: str) -> list[str]:
    """Every problem of a workflow, one line each, as `validate` would report it."""
    try:
        warnings = Workflow.from_yaml(text).validate()
    except ValidationError as error:
        return [str(problem) for problem in error.problems]
    return [str(problem) for problem in warnings]


def steps(*entries: str, head: str = "") -> str:
    return f"name: t\n{head}\nsteps:\n" + "".join(f"  - {entry}\n" for entry in entries)


# ---- What is wrong, and where ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_reported_once_at_its_place_with_what_would_be_right(name: str) -> None:
    text, expected = MISTAKES[name].split("\n--\n")
    assert problems(text + "\n") == [f"workflow:{line}" for line in expected.strip().split("\n")]


def test_all_problems_are_reported_in_document_order() -> None:
    text = steps(
        "{id: a, type: llm, provider: openai, model: m, prompt: '{{#if x}}', temperature: hot}",
        "{id: b, type: lm}",
        "{id: c, type: action, action: log, depends_on: [nobody], retry: {max_attempt: 3}}",
        head="versoin: 1",
    )
    found = problems(text)
    for part in ("'versoin'", "temperature must", "prompt: ", "'lm', did you mean 'llm'", "'nobody'", "'max_attempt'"):
        assert sum(part in problem for problem in found) == 1, part
    places = [tuple(map(int, problem.split(":")[1:3])) for problem in found]
    assert places == sorted(places)


def test_a_document_without_text_has_its_problems_in_the_same_order() -> None:
    for case in MISTAKES.values():
        text, expected = case.split("\n--\n")
        messages = [line.split(": ", 1)[1] for line in expected.strip().split("\n")]
        with pytest.raises(ValidationError) as caught:
            Workflow.from_dict(load_yaml(text)).validate()
        assert [problem.message for problem in caught.value.problems] == messages
        assert all(problem.line is None for problem in caught.value.problems)


def test_a_problem_carries_its_place_as_numbers_and_as_a_path() -> None:
    with pytest.raises(ValidationError) as caught:
        Workflow.from_yaml("name: t\nsteps:\n  - id: a\n    type: action\n    action: log\n    output: [x, y z]\n")
    problem = caught.value.problems[0]
    assert (problem.line, problem.column, problem.path, problem.severity) == (6, 5, ("steps", 0, "output"), "error")


def test_a_problem_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "wf.yaml"
    path.write_text("name: t\nsteps:\n  - id: a\n    type: action\n    acton: log\n")
    with pytest.raises(ValidationError) as caught:
        Workflow.from_file(path)
    assert str(caught.value) == f"{path}:5:5: steps[0] 'a': unknown key 'acton', did you mean 'action'?"


def test_a_problem_in_a_json_file_has_a_line_too(tmp_path: Path) -> None:
    path = tmp_path / "wf.json"
    path.write_text('{"name": "t",\n "steps": [\n  {"id": "a", "type": "action",\n   "action": 5}]}')
    with pytest.raises(ValidationError) as caught:
        Workflow.from_file(path)
    assert str(caught.value) == f"{path}:4:4: steps[0] 'a': action must be a name, not 5; quote it"


def test_a_cycle_is_a_dag_error_that_names_it_in_full() -> None:
    text = steps(
        "{id: a, type: action, action: log, message: '{{steps.c}}'}",
        "{id: b, type: action, action: log, depends_on: [a]}",
        "{id: c, type: action, action: log, condition: steps.b.output}",
    )
    with pytest.raises(DagError) as caught:
        Workflow.from_yaml(text).validate()
    assert caught.value.cycle == ["a", "c", "b", "a"]
    assert "a -> c -> b -> a" in str(caught.value)


def test_references_are_reported_by_validate_and_not_when_loading() -> None:
    workflow = Workflow.from_yaml(steps(LLM[:-1] + ", depends_on: b}"))
    with pytest.raises(ValidationError, match="there is no step 'b'"):
        workflow.validate()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{id: a, type: action, action: publsh}", "the action 'publsh' is unknown here"),
        ("{id: a, type: action, action: lgo}", "did you mean 'log'?"),
        ("{id: a, type: transform, function: mergee}", "did you mean 'merge'?"),
        (LLM.replace("openai", "opnai"), "the provider 'opnai' is unknown here, did you mean 'openai'?"),
    ],
)
def test_what_a_run_may_still_bring_along_is_a_warning(entry: str, message: str) -> None:
    warnings = Workflow.from_yaml(steps(entry)).validate()
    assert [problem.severity for problem in warnings] == ["warning"]
    assert message in str(warnings[0])
    assert ": warning: steps[0] 'a': " in str(warnings[0])


def test_a_configured_provider_needs_no_warning() -> None:
    head = "providers: {mine: {type: openai}}"
    assert Workflow.from_yaml(steps(LLM.replace("openai", "mine"), head=head)).validate() == []


# ---- What is right ---------------------------------------------------------------------------------------------------

EVERYTHING = """
name: everything
version: "1.0"
inputs: {q: {type: string, required: true}, docs: {type: array, default: [a, b]}, n: {type: int, enum: [1, 2]}}
providers: {mine: {type: openai, base_url: "http://x", api_key_env: K, headers: {a: b}, timeout_seconds: 3}}
defaults: {llm: {provider: openai, model: m, retry: {max_attempts: 2}}, action: {timeout_seconds: 1m}}
partials: {p: "Hi {{inputs.q}}"}
budget: {max_tokens: 5, max_calls: 3, max_cost: 0.5}
pricing: {m: {input: 1, output: 2}}
outputs: {x: "{{steps.llm.text}}", y: {deep: ["{{steps.par.t1}}", 5]}}
steps:
  - {id: llm, type: llm, prompt: "{{> p}}", system: s, max_tokens: 5, stop: [a], schema: {type: object}, top_p: 0.5,
     fallback: [{provider: mine, model: x}], params: {a: "{{q}}"}, cache: false, output: [text, model],
     retry: {max_attempts: 3, backoff: linear, initial_delay_ms: 5, max_delay: 1s, jitter: 0.5}, trigger_rule: all_done}
  - {id: chat, type: llm, messages: [{role: user, content: "{{steps.llm.text}}"}], temperature: "{{inputs.n}}"}
  - {id: emb, type: embed, provider: openai, model: e, input: ["{{inputs.q}}", b], output: [vec, meta]}
  - {id: search, type: vector_search, database: local, index: i, query: "{{outputs.vec}}", filter: {a: 1}}
  - {id: tr, type: transform, function: merge, inputs: [text, steps.llm.text, q], output: out}
  - {id: tm, type: transform, function: map, inputs: [docs], template: "{{item}}", depends_on: [tr]}
  - {id: tf, type: transform, function: filter, inputs: {list: inputs.docs}, condition: "item == 'a'"}
  - {id: act, type: action, action: log, message: "{{item}}", for_each: "{{inputs.docs}}", max_concurrency: 2}
  - {id: ok, type: approval, message: "fine? {{inputs.q}}", depends_on: act}
  - id: par
    type: parallel
    max_concurrency: 2
    tasks:
      - {id: t1, type: action, action: log, message: "{{steps.llm.text}}"}
      - {id: t2, type: action, action: log, message: "{{steps.t1.output}}"}
  - id: br
    type: branch
    condition: "{{steps.llm.text}}"
    branches:
      true: [{id: b1, type: action, action: log}]
      default:
        - id: b2
          type: loop
          max_iterations: 3
          until: "steps.l1.output == 'x' and iteration > 1"
          steps: [{id: l1, type: action, action: log, message: "{{iteration}}{{#if previous}}{{previous.l1}}{{/if}}"}]
  - id: sub
    type: workflow
    inputs: {z: "{{steps.par.t1.output}}"}
    workflow:
      name: inner
      inputs: {z: {type: string}}
      steps: [{id: s1, type: action, action: log, message: "{{inputs.z}}"}]
      outputs: {r: "{{steps.s1}}"}
  - {id: last, type: action, action: log, message: "{{steps.sub.r}} {{steps.br.b1.output}} {{steps.tr.status}}"}
"""


def test_a_document_with_every_step_type_and_key_is_valid() -> None:
    workflow = Workflow.from_yaml(EVERYTHING)
    assert workflow.validate() == []
    dag = WorkflowDAG(workflow)
    assert dag.dependencies("tr") == ["llm"]  # `text` is an output of what another input depends on
    assert dag.dependencies("search") == ["emb"]  # an output by its name alone
    assert set(dag.dependencies("last")) == {"sub", "br", "tr"}


@pytest.mark.parametrize("how", ["yaml", "json", "dict"])
def test_a_workflow_survives_the_way_through_yaml_json_and_dict(how: str) -> None:
    document = load_yaml(EVERYTHING)
    document["description"] = "- no list\n # no comment: \u00e9\u2028"
    workflow = Workflow.from_dict(document)
    if how == "yaml":
        again = Workflow.from_yaml(workflow.to_yaml())
    else:
        again = Workflow.from_json(workflow.to_json()) if how == "json" else Workflow.from_dict(workflow.to_dict())
    expected = json.loads(json.dumps(document)) if how == "json" else document  # JSON has texts for keys
    assert again.to_dict() == expected
    assert again.validate() == []


def test_null_is_the_same_as_not_given() -> None:
    text = steps(LLM[:-1] + ", temperature: null, depends_on: , output: ~, retry: , for_each: , condition: }")
    assert problems(text) == []


def test_numbers_and_texts_both_give_durations() -> None:
    for value in ("5", "0.5", "'5'", "1.5s", "200ms", "2m", "1h"):
        assert problems(steps(LLM[:-1] + f", timeout_seconds: {value}}}")) == []


def test_names_of_a_scope_hide_those_around_it() -> None:
    child = "{id: a, type: action, action: log, output: inner}, {id: b, type: action, action: log, m: '{{steps.a.%s}}'}"
    assert problems(steps(LLM, f"{{id: p, type: parallel, tasks: [{child % 'inner'}]}}")) == []
    assert "has no output 'text'" in problems(steps(LLM, f"{{id: p, type: parallel, tasks: [{child % 'text'}]}}"))[0]


def test_partials_may_call_each_other_in_any_number() -> None:
    partials = {f"p{number}": f"{{{{> p{number + 1}}}}}{{{{> p{number + 1}}}}}" for number in range(2000)}
    partials["p2000"] = "{{inputs.x}}{{> p0}}"
    workflow = Workflow("t", [Step(id="a", type="action", action="log", message="{{> p0}}")], partials=partials, inputs={})
    with pytest.raises(ValidationError, match=r"'inputs\.x': there is no input 'x'"):
        workflow.validate()


def test_the_smallest_step_may_still_continue_on_error() -> None:
    workflow = Workflow("t", [Step(id="a", type="action", action="fail", continue_on_error=True)])
    assert WorkflowExecutor(workflow).run().status == "completed"


# ---- The original's own files ----------------------------------------------------------------------------------------

ORIGINALS = {
    "simple": """
name: simple-workflow
version: "1.0"
steps:
  - {id: greet, type: llm, provider: openai, model: gpt-3.5-turbo, prompt: "Say hello to {{inputs.name}}",
     temperature: 0.7, max_tokens: 50, output: [greeting]}
  - {id: analyze, type: llm, depends_on: [greet], provider: openai, model: gpt-3.5-turbo,
     prompt: "Analyze this greeting: {{steps.greet.greeting}}", stream: false, output: [analysis],
     retry: {max_attempts: 3, backoff: exponential, initial_delay_ms: 100, max_delay_ms: 30000}, timeout_seconds: 30}
""",
    "sentiment": """
name: "sentiment-analysis-pipeline"
version: "1.0"
steps:
  - id: "extract"
    type: "llm"
    provider: "openai"
    model: "gpt-4"
    prompt: |
      Analyze: {{ input.text }}
    temperature: 0.3
    output: ["sentiment"]
  - id: "log_result"
    type: "action"
    depends_on: ["extract"]
    action: "log"
    message: "Sentiment: {{ outputs.extract }}"
""",
    "moderation": """
name: "content-moderation-router"
steps:
  - {id: moderate, type: llm, provider: openai, model: gpt-4, prompt: "{{ input.content }}", output: [result]}
  - id: "route_safe"
    type: "action"
    depends_on: ["moderate"]
    condition: "{{ outputs.moderate }} == 'safe'"
    action: "publish"
    content: "{{ input.content }}"
""",
    "rag": """
name: "rag-qa-pipeline"
steps:
  - {id: embed_query, type: embed, provider: openai, model: text-embedding-3-small, input: "{{ query }}",
     output: [query_embedding]}
  - {id: search_docs, type: vector_search, depends_on: [embed_query], database: pinecone, index: kb,
     query: "{{ outputs.query_embedding }}", top_k: 5, include_metadata: true, output: [search_results]}
  - {id: cite, type: transform, depends_on: [search_docs], function: extract_metadata,
     inputs: ["{{ outputs.search_docs }}"], fields: [source, title], output: [citations]}
""",
    "transform": """
name: transform-workflow
version: "1.0"
steps:
  - {id: merge_inputs, type: transform, function: merge, inputs: [text1, text2], output: [merged]}
  - {id: filter_data, type: transform, depends_on: [merge_inputs], function: filter, inputs: [merged], key: status,
     value: active, output: [filtered]}
""",
    "as it serialises": """
id: 0b9f0c9e-5c1b-4d5c-8f0e-0d3b0a2f1c11
name: t
version: '1.0'
steps:
  - {id: a, type: parallel, depends_on: [], tasks: [{id: b, type: action, depends_on: [], action: notify, output: []}],
     max_concurrency: 4, output: []}
  - {id: c, type: branch, condition: "{{ outputs.a }}", branches: {x: [{id: d, type: action, action: log}]}}
metadata: {}
""",
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_workflows_in_the_shape_of_the_original_validate(name: str) -> None:
    warnings = Workflow.from_yaml(ORIGINALS[name]).validate()
    assert all("is unknown here" in problem.message for problem in warnings)
    assert bool(warnings) == (name in ("moderation", "rag", "as it serialises"))


def test_the_simple_workflow_of_the_original_runs() -> None:
    result = WorkflowExecutor(Workflow.from_yaml(ORIGINALS["simple"]), inputs={"name": "Alice"}, offline=True).run()
    assert result.status == "completed"
    assert "Alice" in result["analyze"].outputs["analysis"]


def test_the_transform_workflow_of_the_original_runs() -> None:
    inputs = {"text1": [{"status": "active"}], "text2": [{"status": "closed"}]}
    result = WorkflowExecutor(Workflow.from_yaml(ORIGINALS["transform"]), inputs=inputs).run()
    assert result["filter_data"].outputs == {"filtered": [{"status": "active"}]}


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_a_text_that_cannot_be_read_is_a_parse_error_with_its_place() -> None:
    with pytest.raises(ParseError) as caught:
        Workflow.from_yaml("name: t\nsteps:\n  - id: 'a\n")
    assert caught.value.line >= 3


@pytest.mark.parametrize("content", [b"\x00\x01", b"\xff\xfe\x00", b"\x89PNG\r\n\x1a\n", b"", b"\n#\n", b"[1]", b"5"])
def test_a_file_that_holds_no_workflow_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "wf.yaml"
    path.write_bytes(content)
    with pytest.raises(OrchestratorError, match=r"wf\.yaml"):
        Workflow.from_file(path)


@pytest.mark.parametrize("path", ["nowhere.yaml", "", ".", "a\0b", "\ud800.yaml"])
def test_a_file_that_cannot_be_read_is_an_error_of_ours(path: str) -> None:
    with pytest.raises(OrchestratorError, match="cannot be read"):
        Workflow.from_file(path)


def test_sub_workflows_are_found_beside_their_caller_and_read_once(tmp_path: Path) -> None:
    inner = "name: inner\ninputs: {x: {required: true}}\nsteps:\n  - {id: z, type: action, action: log, output: k}\n"
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "inner.yaml").write_text(inner)
    call = "{id: %s, type: workflow, workflow: sub/inner.yaml, inputs: {x: 1}}"
    last = "{id: c, type: action, action: log, m: '{{steps.a.z.k}}'}"
    (tmp_path / "outer.yaml").write_text(steps(call % "a", call % "b", last))
    workflow = Workflow.from_file(tmp_path / "outer.yaml")
    assert workflow.validate() == []
    called = {id(node.workflow) for node in workflow._plan().graph.nodes if node.workflow}
    assert len(called) == 1


def test_problems_of_a_sub_workflow_are_reported_at_the_call_with_their_own_place(tmp_path: Path) -> None:
    (tmp_path / "inner.yaml").write_text(steps("{id: z, type: action, action: log, m: '{{steps.q}}'}"))
    (tmp_path / "outer.yaml").write_text("name: o\nsteps:\n  - id: a\n    type: workflow\n    workflow: inner.yaml\n")
    with pytest.raises(ValidationError) as caught:
        Workflow.from_file(tmp_path / "outer.yaml").validate()
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/outer.yaml:5:5: steps[0] 'a': workflow: ")
    assert message.endswith("inner.yaml:4:46: steps[0] 'z': m: 'steps.q': there is no step 'q'")


def test_a_workflow_may_call_itself(tmp_path: Path) -> None:
    call = "{id: a, type: workflow, workflow: me.yaml, condition: inputs.x, inputs: {x: null}}"
    (tmp_path / "me.yaml").write_text(steps(call, head="inputs: {x: {}}"))
    assert Workflow.from_file(tmp_path / "me.yaml").validate() == []


def test_files_that_call_each_other_too_deeply_are_refused_with_the_chain(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"w{number}.yaml").write_text(steps(f"{{id: a, type: workflow, workflow: w{number + 1}.yaml}}"))
    (tmp_path / "w16.yaml").write_text(steps("{id: a, type: action, action: log}"))
    with pytest.raises(ValidationError) as caught:
        Workflow.from_file(tmp_path / "w0.yaml").validate()
    assert "more than 16 deep: w0.yaml -> w1.yaml -> " in str(caught.value)
    assert Workflow.from_file(tmp_path / "w1.yaml").validate() == []


# ---- Building in code ------------------------------------------------------------------------------------------------


def test_a_workflow_can_be_built_in_code_and_extended() -> None:
    workflow = Workflow(name="t", version="2.0")
    workflow.steps.append(Step(id="a", type="llm", provider="openai", model="m", prompt="x", output="text"))
    workflow.steps.append(Step(id="b", type="action", action="log", message="{{steps.a.text}}"))
    assert workflow.validate() == []
    assert workflow.version == "2.0"
    assert workflow.steps[0].output == ["text"]
    assert workflow.steps[0].config["prompt"] == "x"
    assert [step["id"] for step in workflow.to_dict()["steps"]] == ["a", "b"]


def test_a_change_after_validation_is_seen() -> None:
    workflow = Workflow("t", [Step(id="a", type="action", action="log")])
    assert workflow.validate() == []
    workflow.steps[0].depends_on = ["b"]
    with pytest.raises(ValidationError, match="there is no step 'b'"):
        workflow.validate()
    workflow.steps.append(Step(id="b", type="action", action="log"))
    assert workflow.validate() == []
    workflow.timeout_seconds = -1
    with pytest.raises(ValidationError, match="timeout_seconds"):
        workflow.validate()


def test_steps_may_hold_steps_and_workflows() -> None:
    child = Step(id="x", type="action", action="log")
    inner = Workflow("inner", [child])
    both = [Step(id="p", type="parallel", tasks=[child]), Step(id="w", type="workflow", workflow=inner)]
    workflow = Workflow("t", [*both, {"id": "c", "type": "action", "action": "log", "message": "{{steps.p.x.output}}"}])
    assert workflow.validate() == []
    assert Workflow.from_json(workflow.to_json()).to_dict() == workflow.to_dict()


def test_a_workflow_does_not_share_its_values_with_the_mapping_it_was_made_from() -> None:
    document = load_yaml(steps(LLM))
    workflow = Workflow.from_dict(document)
    document["steps"][0]["prompt"] = workflow.to_dict()["steps"][0]["prompt"] = "{{#if"
    assert workflow.validate() == []


def test_workflows_and_steps_can_be_copied() -> None:
    workflow = copy.deepcopy(Workflow.from_yaml(EVERYTHING))
    assert workflow.validate() == []
    assert copy.copy(workflow.steps[0]).id == "llm"


@pytest.mark.parametrize("keys", [{}, {"steps": []}, {"steps": [5]}, {"steps": 5}, {"steps": "abc"}, {"steps": [{}]}])
def test_a_workflow_without_proper_steps_is_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Workflow(name="t", **keys).validate()


@pytest.mark.parametrize("value", [{1, 2}, b"x", object(), 10**5000, math.nan], ids=("set", "bytes", "", "huge", "nan"))
def test_a_value_that_no_document_can_hold_is_written_or_refused_but_never_crashes(value: Any) -> None:
    workflow = Workflow("t", [Step(id="a", type="action", action="log", thing=value)])
    assert workflow.validate() == []
    for write in (workflow.to_yaml, workflow.to_json):
        try:
            assert isinstance(write(), str)
        except OrchestratorError as error:
            assert str(error)


def test_an_input_whose_name_is_a_huge_number_is_refused() -> None:
    inner = {"name": "i", "inputs": {"z": {}}, "steps": [{"id": "z", "type": "action", "action": "log"}]}
    call = Step(id="w", type="workflow", workflow=inner, inputs={10**5000: 1})
    with pytest.raises(ValidationError, match="has no input a number"):
        Workflow("t", [call]).validate()


# ---- Anything at all -------------------------------------------------------------------------------------------------

_circle: dict[str, Any] = {}
_circle["again"] = [_circle]
_deep: list[Any] = []
for _ in range(500):
    _deep = [_deep]
ODD: list[Any] = [
    None, True, False, 0, -1, 2.5, 10**400, 10**5000, math.nan, math.inf, "", " ", "x", "{{", "{{x}}", "{{steps}}",
    "{{steps.llm.text}}", "<<steps.q>>", "{{> p}}", "{{#each x}}{{item}}", "a ==", "inputs.x", "\ud800", "\0", "1s",
    "llm", "parallel", "nowhere.yaml", "__init__", "default", [], {}, [None], [[]], [{}], {"a": None},
    {1: 2}, {None: 1}, {(1,): 3}, ["a", "a"], ["a", 1], (1, 2), b"bytes", {1, 2}, object(), _circle, _deep,
    collections.OrderedDict(a=1), ["steps.llm.text"], {"name": "i", "steps": [{"id": "z", "type": "action", "action": "log"}]},
    Step(id="n", type="action"), Workflow(name="w"),
]  # fmt: skip
KEYS: list[Any] = [1, None, True, 2.5, "zz", "", "__class__", "id", "type", "for_each", "condition", 10**5000, (1,)]
KEYS += ["="] * 30  # keep the key


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in entries for found in ((*path, key), *_paths(item, (*path, key)))]


BASE = load_yaml(EVERYTHING)
PATHS = _paths(BASE)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PATHS), st.sampled_from(ODD), st.sampled_from(KEYS)), max_size=3))
def test_no_document_whatever_raises_anything_but_our_errors(changes: list[tuple[Any, Any, Any]]) -> None:
    document = copy.deepcopy(BASE)
    for path, value, key in changes:
        place: Any = document
        try:
            for part in path[:-1]:
                place = place[part]
            place[path[-1] if key == "=" or isinstance(place, list) else key] = value
        except (KeyError, IndexError, TypeError):
            continue
    try:
        workflow = Workflow.from_dict(document)
        workflow.validate()
        WorkflowDAG(workflow).levels()
        text = workflow.to_yaml()
    except OrchestratorError as error:
        assert str(error)
        return
    again = Workflow.from_yaml(text)
    again.validate()
    assert repr(again.to_dict()) == repr(workflow.to_dict())


# ---- Size ------------------------------------------------------------------------------------------------------------


def _duration(document: dict[str, Any]) -> float:
    started = time.process_time()  # other processes do not count
    try:
        Workflow.from_dict(document).validate()
    except ValidationError as error:
        assert len(error.problems) >= len(document["steps"])
    return time.process_time() - started


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chain", "references", "problems", "children"])
def test_a_hundred_times_the_steps_take_a_hundred_times_the_time(kind: str) -> None:
    def document(size: int) -> dict[str, Any]:
        entries: list[dict[str, Any]] = [{"id": f"s{n}", "type": "action", "action": "log"} for n in range(size)]
        for index, entry in enumerate(entries[1:]):
            if kind == "chain":
                entry["depends_on"] = [f"s{index}"]
            elif kind == "references":
                entry["message"] = f"{{{{steps.s{index}.output}}}}"
            elif kind == "problems":
                entry.update(message=f"{{{{steps.z{index}}}}}", depends_on=[f"z{index}"])
        if kind == "children":
            ends = [{**entry, "id": f"e{n}", "x": f"{{{{steps.p.s{n}.output}}}}"} for n, entry in enumerate(entries)]
            entries = [{"id": "p", "type": "parallel", "tasks": entries}, *ends]
        return {"name": "t", "steps": entries}

    small = min(_duration(document(100)) for _ in range(5))
    assert _duration(document(10_000)) < 10 * 100 * small  # were it quadratic, it would be ten times this


def test_containers_nest_as_deep_as_a_document_may() -> None:
    step: dict[str, Any] = {"id": "leaf", "type": "action", "action": "log", "message": "{{inputs.x}} {{steps.first}}"}
    for level in range(48):
        step = {"id": f"c{level}", "type": "parallel", "tasks": [step]}
    first = {"id": "first", "type": "action", "action": "log"}
    workflow = Workflow.from_dict({"name": "t", "steps": [first, step]})
    assert WorkflowDAG(workflow).dependencies("c47") == ["first"]
    assert Workflow.from_yaml(workflow.to_yaml()).validate() == []
    with pytest.raises(ValidationError, match="nested deeper than 100"):
        Workflow.from_dict({"name": "t", "steps": [{"id": "a", "type": "parallel", "tasks": [{"tasks": [step]}]}]})


@pytest.mark.slow
def test_checking_a_workflow_imports_neither_asyncio_nor_what_only_mistakes_need(program: Program) -> None:
    program.write("wf.yaml", steps(*(LLM.replace("id: a", f"id: a{index}") for index in range(10))))
    code = (
        "import sys; from llm_orchestrator import Workflow; Workflow.from_file('wf.yaml').validate(); "
        "slow = {'asyncio', 'difflib', 'graphlib', 'typing', 'http', 'ssl'}; print(sorted(slow & set(sys.modules)))"
    )
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=program.folder, env=program.environment(), capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"
