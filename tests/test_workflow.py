"""Room 6, Workflow: what is read, what is refused, and where the finger points."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_orchestrator import DagError, OrchestratorError, ParseError, Step, ValidationError, Workflow

LLM = "{id: a, type: llm, provider: openai, model: m, prompt: hi}"


def problems(text: str) -> list[str]:
    """Every problem of a workflow, one line each, as `validate` would report it."""
    try:
        warnings = Workflow.from_yaml(text).validate()
    except ValidationError as error:
        return [str(problem) for problem in error.problems]
    return [str(problem) for problem in warnings]


def steps(*entries: str, head: str = "") -> str:
    return f"name: t\n{head}\nsteps:\n" + "".join(f"  - {entry}\n" for entry in entries)


def test_a_problem_reads_file_line_column_step_and_suggestion() -> None:
    text = "name: t\nsteps:\n  - id: analyze\n    type: llm\n    provider: openai\n    model: m\n    promt: hi\n"
    assert "workflow:7:5: steps[0] 'analyze': unknown key 'promt', did you mean 'prompt'?" in problems(text)


def test_all_problems_are_reported_in_document_order() -> None:
    text = steps(
        "{id: a, type: llm, provider: openai, model: m, prompt: '{{#if x}}', temperature: hot}",
        "{id: b, type: lm}",
        "{id: c, type: action, action: log, depends_on: [nobody], retry: {max_attempt: 3}}",
        head="versoin: 1",
    )
    found = "\n".join(problems(text))
    for part in ("versoin", "temperature must be a number from 0 to 2", "prompt: ", "'lm', did you mean 'llm'", "max_attempts"):
        assert part in found
    lines = [int(problem.split(":")[1]) for problem in problems(text)]
    assert lines == sorted(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be a map"),
        ("", "must be a map"),
        ("name: t", "steps is missing"),
        ("steps: [" + LLM + "]", "name is missing"),
        ("name: t\nsteps: []", "must be a list of steps"),
        ("name: t\nsteps: [5]", "a step must be a map"),
        ("name: t\nsteps: {a: b}", "must be a list of steps"),
        (steps("{type: action, action: log}"), "id is missing"),
        (steps("{id: a}"), "type is missing"),
        (steps("{id: 'a b', type: action, action: log}"), "letters, digits"),
        (steps("{id: a, type: llm, model: m, prompt: x}"), "provider is missing"),
        (steps("{id: a, type: llm, provider: openai, model: m}"), "prompt is missing"),
        (steps("{id: a, type: llm, provider: openai, model: m, prompt: x, messages: [{role: user, content: x}]}"), "not both"),
        (steps("{id: a, type: llm, provider: openai, model: m, messages: [{role: user}]}"), "content is missing"),
        (steps("{id: a, type: transform}"), "function is missing"),
        (steps("{id: a, type: action}"), "action is missing"),
        (steps(LLM[:-1] + ", max_tokens: 0}"), "at least 1"),
        (steps(LLM[:-1] + ", timeout_seconds: -1}"), "above 0"),
        (steps(LLM[:-1] + ", trigger_rule: all_succes}"), "did you mean 'all_success'"),
        (steps(LLM[:-1] + ", continue_on_error: yes}"), "true or false"),
        (steps(LLM[:-1] + ", output: [a, b, c, d, e]}"), "4 outputs"),
        (steps(LLM[:-1] + ", output: [a, a]}"), "twice"),
        (steps(LLM[:-1] + ", retry: {max_attempts: 0}}"), "from 1 to 1000"),
        (steps(LLM[:-1] + ", retry: {strategy: linear, backoff: linear}}"), "two names"),
        (steps(LLM[:-1] + ", condition: 'a ='}"), "condition"),
        (steps(LLM, head="inputs: {x: {type: strin}}"), "did you mean 'string'"),
        (steps(LLM, head="inputs: {x: {type: integer, default: high}}"), "must be an integer"),
        (steps(LLM, head="defaults: {lm: {model: m}}"), "did you mean 'llm'"),
        (steps(LLM, head="defaults: {llm: {modle: m}}"), "did you mean 'model'"),
        (steps(LLM, head="partials: {p: '{{#if}}'}"), "p: "),
    ],
)  # fmt: skip
def test_wrong_shapes_are_refused_when_the_document_is_loaded(text: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Workflow.from_yaml(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (steps(LLM, LLM), "duplicate id 'a'"),
        (steps(LLM[:-1] + ", depends_on: b}"), "there is no step 'b'"),
        (steps(LLM[:-1] + ", depends_on: a}"), "depends on itself"),
        (steps(LLM, "{id: b, type: action, action: log, message: '{{steps.c.x}}'}"), "there is no step 'c'"),
        (steps(LLM, "{id: b, type: action, action: log, message: '{{steps.a.oputput}}'}"), "did you mean 'output'"),
        (steps(LLM, "{id: b, type: action, action: log, condition: steps.A.output}"), "there is no step 'A'"),
        (steps("{id: b, type: action, action: log, message: '{{inputs.nam}}'}", head="inputs: {name: {}}"), "did you mean 'name'"),
        (steps("{id: b, type: action, action: log, message: '{{nam}}'}", head="inputs: {name: {}}"), "no input 'nam'"),
        (steps(LLM, head="outputs: {x: '{{steps.z}}'}"), "there is no step 'z'"),
        (steps("{id: a, type: transform, function: merge, output: x}", "{id: b, type: transform, function: merge, output: x}",
               "{id: c, type: transform, function: merge, inputs: [x], depends_on: [a, b]}"), "several dependencies"),
    ],
    ids=lambda value: value if "\n" not in value else "",
)  # fmt: skip
def test_references_to_what_does_not_exist_are_found_by_validate(text: str, message: str) -> None:
    assert any(message in problem for problem in problems(text)), problems(text)


def test_a_cycle_is_named_in_full_and_is_a_dag_error() -> None:
    text = steps(
        "{id: a, type: action, action: log, message: '{{steps.c}}'}",
        "{id: b, type: action, action: log, depends_on: [a]}",
        "{id: c, type: action, action: log, condition: steps.b.output}",
    )
    with pytest.raises(DagError) as caught:
        Workflow.from_yaml(text).validate()
    assert caught.value.cycle == ["a", "b", "c", "a"] or caught.value.cycle == ["a", "c", "b", "a"]
    assert "a -> " in str(caught.value)


def test_unknown_actions_and_transforms_are_warnings() -> None:
    found = problems(steps("{id: a, type: action, action: publish}", "{id: b, type: transform, function: merg}"))
    assert len(found) == 2
    assert all("warning" in problem for problem in found)


def test_a_text_that_cannot_be_read_is_a_parse_error_with_its_place() -> None:
    with pytest.raises(ParseError) as caught:
        Workflow.from_yaml("name: t\nsteps:\n  - id: 'a\n")
    assert caught.value.line >= 3


@pytest.mark.parametrize("content", [b"\x00\x01\x02", b"\xff\xfe\x00", b"\x89PNG\r\n\x1a\n"])
def test_a_binary_file_is_refused(tmp_path: Any, content: bytes) -> None:
    path = tmp_path / "wf.yaml"
    path.write_bytes(content)
    with pytest.raises(OrchestratorError) as caught:
        Workflow.from_file(path)
    assert "wf.yaml" in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(OrchestratorError, match=r"nowhere\.yaml"):
        Workflow.from_file("nowhere.yaml")


def test_a_workflow_survives_the_way_through_yaml_and_json() -> None:
    document = {
        "name": "t",
        "inputs": {"x": {"type": "string", "required": True}},
        "steps": [{"id": "a", "type": "llm", "provider": "openai", "model": "m", "prompt": "Hi {{inputs.x}}\n- no list\n"}],
        "outputs": {"y": "{{steps.a}}"},
    }
    workflow = Workflow.from_dict(document)
    assert workflow.to_dict() == document
    assert Workflow.from_yaml(workflow.to_yaml()).to_dict() == document
    assert Workflow.from_json(workflow.to_json()).to_dict() == document
    assert json.loads(workflow.to_json()) == document


def test_a_workflow_can_be_built_in_code_and_extended() -> None:
    workflow = Workflow(name="t", version="2.0")
    workflow.steps.append(Step(id="a", type="llm", provider="openai", model="m", prompt="x", output="text"))
    workflow.steps.append(Step(id="b", type="action", action="log", message="{{steps.a.text}}"))
    assert workflow.validate() == []
    assert workflow.version == "2.0"
    assert workflow.steps[0].output == ["text"]
    assert workflow.steps[0].config["prompt"] == "x"
    assert [step["id"] for step in workflow.to_dict()["steps"]] == ["a", "b"]


def test_an_empty_workflow_built_in_code_is_refused_by_validate() -> None:
    with pytest.raises(ValidationError):
        Workflow(name="t").validate()


ORIGINALS = {
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
  - {id: embed_query, type: embed, provider: openai, model: text-embedding-3-small, input: "{{ query }}", output: [query_embedding]}
  - {id: search_docs, type: vector_search, depends_on: [embed_query], database: pinecone, index: kb,
     query: "{{ outputs.query_embedding }}", top_k: 5, include_metadata: true, output: [search_results]}
  - {id: cite, type: transform, depends_on: [search_docs], function: extract_metadata, inputs: ["{{ outputs.search_docs }}"],
     fields: [source, title], output: [citations]}
""",
    "transform": """
name: transform-workflow
version: "1.0"
steps:
  - {id: merge_inputs, type: transform, function: merge, inputs: [text1, text2], output: [merged]}
  - {id: filter_data, type: transform, depends_on: [merge_inputs], function: filter, inputs: [merged], key: status,
     value: active, output: [filtered]}
""",
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_workflows_of_the_original_validate(name: str) -> None:
    Workflow.from_yaml(ORIGINALS[name]).validate()


def test_an_output_may_be_referred_to_by_its_name_alone() -> None:
    workflow = Workflow.from_yaml(ORIGINALS["rag"])
    assert workflow.validate()[0].severity == "warning"
    from llm_orchestrator import WorkflowDAG

    assert WorkflowDAG(workflow).dependencies("search_docs") == ["embed_query"]
