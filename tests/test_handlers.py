"""Room 12: transforms, actions, tools and structured answers, each through a real run."""

from __future__ import annotations

import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_orchestrator import (
    CompletionRequest,
    CompletionResponse,
    ExecutionError,
    Step,
    ValidationError,
    Workflow,
    WorkflowExecutor,
)
from llm_orchestrator import _schema_faults as schema_faults
from llm_orchestrator import _structured_answer as structured_answer


def run_step(step: dict[str, Any], inputs: dict[str, Any] | None = None, **executor: Any) -> Any:
    """The StepResult of a single step named `x`."""
    return WorkflowExecutor(Workflow(name="t", steps=[{"id": "x", **step}]), inputs=inputs or {}, **executor).run()["x"]


def transform(function: str, inputs: dict[str, Any], **parameters: Any) -> Any:
    """(value, error message) of a transform over all the inputs."""
    step = {"type": "transform", "function": function, "inputs": list(inputs), **parameters}
    result = run_step(step, inputs)
    return result.outputs["output"], result.error and result.error["message"]


PEOPLE = [{"name": "Ada", "age": 36, "tags": ["a"]}, {"name": "Bob", "age": None}, {"name": "Cid", "age": 7}]

VALUES: dict[str, tuple[str, dict[str, Any], dict[str, Any], Any]] = {
    "merge maps": ("merge", {"a": {"x": 1, "y": 1}, "b": {"y": 2}}, {}, {"x": 1, "y": 2}),
    "merge shallow": ("merge", {"a": {"m": {"x": 1}}, "b": {"m": {"y": 2}}}, {}, {"m": {"y": 2}}),
    "merge deep": ("merge", {"a": {"m": {"x": 1}}, "b": {"m": {"y": 2}}}, {"deep": True}, {"m": {"x": 1, "y": 2}}),
    "merge lists": ("merge", {"a": [1], "b": [2, 3]}, {}, [1, 2, 3]),
    "merge others": ("merge", {"a": 1, "b": [2]}, {}, {"a": 1, "b": [2]}),
    "concat texts": ("concat", {"a": "x", "b": 2, "c": None}, {"separator": "-"}, "x-2-"),
    "concat lists": ("concat", {"a": [1], "b": [2]}, {}, [1, 2]),
    "filter by value": ("filter", {"a": PEOPLE}, {"key": "age", "value": 36}, [PEOPLE[0]]),
    "filter by null": ("filter", {"a": PEOPLE}, {"key": "age", "value": None}, [PEOPLE[1]]),
    "filter by truth": ("filter", {"a": PEOPLE}, {"key": "age"}, [PEOPLE[0], PEOPLE[2]]),
    "filter true is not 1": ("filter", {"a": [{"k": 1}, {"k": True}]}, {"key": "k", "value": True}, [{"k": True}]),
    "filter by condition": ("filter", {"a": PEOPLE}, {"condition": "item.age > 6 and index < 1"}, [PEOPLE[0]]),
    "map key": ("map", {"a": PEOPLE}, {"key": "name"}, ["Ada", "Bob", "Cid"]),
    "map template": ("map", {"a": PEOPLE}, {"template": "{{index}}:{{item.name}}"}, ["0:Ada", "1:Bob", "2:Cid"]),
    "map template value": ("map", {"a": PEOPLE}, {"template": "{{item.age}}"}, [36, None, 7]),
    "pick key": ("pick", {"a": {"x": {"y": [5, 6]}}}, {"key": "x.y.1"}, 6),
    "pick keys": ("pick", {"a": {"x": 1, "y": 2, "z": 3}}, {"keys": ["x", "z", "q"]}, {"x": 1, "z": 3}),
    "pick of lists": ("pick", {"a": PEOPLE}, {"keys": "name"}, [{"name": "Ada"}, {"name": "Bob"}, {"name": "Cid"}]),
    "split lines": ("split", {"a": "x\ny"}, {}, ["x", "y"]),
    "split trim": ("split", {"a": "x , y"}, {"separator": ",", "trim": True}, ["x", "y"]),
    "split max": ("split", {"a": "1,2,3"}, {"separator": ",", "max_splits": 1}, ["1", "2,3"]),
    "join": ("join", {"a": ["x", 1, None, True]}, {"separator": "|"}, "x|1||true"),
    "join default": ("join", {"a": ["x", "y"]}, {}, "x, y"),
    "json_parse": ("json_parse", {"a": '{"x": [1, 2.5, null]}'}, {}, {"x": [1, 2.5, None]}),
    "json_dump": ("json_dump", {"a": {"x": "é"}}, {}, '{"x":"é"}'),
    "json_dump indent": ("json_dump", {"a": [1]}, {"indent": 2}, "[\n  1\n]"),
    "regex first": ("regex", {"a": "id 42, id 7"}, {"pattern": r"id (\d+)"}, "id 42"),
    "regex group": ("regex", {"a": "id 42, id 7"}, {"pattern": r"id (\d+)", "group": 1}, "42"),
    "regex named": ("regex", {"a": "id 42"}, {"pattern": r"(?P<n>\d+)", "group": "n"}, "42"),
    "regex all": ("regex", {"a": "id 42, id 7"}, {"pattern": r"\d+", "all": True}, ["42", "7"]),
    "regex all lazy": ("regex", {"a": "123"}, {"pattern": r"\d+?", "all": True}, ["1", "2", "3"]),
    "regex replace": ("regex", {"a": "a1b2"}, {"pattern": r"\d", "replace": "#"}, "a#b#"),
    "regex none": ("regex", {"a": "x"}, {"pattern": r"\d"}, None),
    "sort": ("sort", {"a": [3, 1, 2.5]}, {}, [1, 2.5, 3]),
    "sort key": ("sort", {"a": PEOPLE}, {"key": "age"}, [PEOPLE[2], PEOPLE[0], PEOPLE[1]]),
    "sort reverse": ("sort", {"a": PEOPLE}, {"key": "age", "reverse": True}, [PEOPLE[0], PEOPLE[2], PEOPLE[1]]),
    "unique": ("unique", {"a": [1, "1", 1, True, {"x": 1}, {"x": 1}, 1.0]}, {}, [1, "1", True, {"x": 1}]),
    "unique nested": ("unique", {"a": [{"x": [1, True]}, {"x": [1.0, True]}, {"x": [1, 1]}]}, {}, [{"x": [1, True]}, {"x": [1, 1]}]),
    "unique keys in any order": ("unique", {"a": [{"x": 1, "y": 2}, {"y": 2, "x": 1}]}, {}, [{"x": 1, "y": 2}]),
    "unique with keys of many types": ("unique", {"a": [{1: 0, "b": 1}, {"b": 1.0, 1: 0}]}, {}, [{1: 0, "b": 1}]),
    "unique key": ("unique", {"a": [{"k": 1, "v": 1}, {"k": 1, "v": 2}]}, {"key": "k"}, [{"k": 1, "v": 1}]),
    "slice": ("slice", {"a": [1, 2, 3, 4]}, {"start": 1, "end": -1}, [2, 3]),
    "slice text": ("slice", {"a": "hello"}, {"end": 2}, "he"),
    "flatten": ("flatten", {"a": [1, [2, [3]]]}, {}, [1, 2, [3]]),
    "flatten deep": ("flatten", {"a": [1, [2, [3]]]}, {"depth": 2}, [1, 2, 3]),
    "length": ("length", {"a": [1, 2]}, {}, 2),
    "length of text": ("length", {"a": "héé"}, {}, 3),
    "template": ("template", {"a": 2, "b": 3}, {"template": "{{a}}+{{b}}"}, "2+3"),
    "template value": ("template", {"a": [1]}, {"template": "{{a}}"}, [1]),
}


@pytest.mark.parametrize(("function", "inputs", "parameters", "expected"), VALUES.values(), ids=VALUES.keys())
def test_a_transform_gives(function: str, inputs: dict[str, Any], parameters: dict[str, Any], expected: Any) -> None:
    assert transform(function, inputs, **parameters) == (expected, None)
    assert json.dumps(transform(function, inputs, **parameters)[0]) == json.dumps(expected)  # true is not 1


FAULTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "two inputs": ("length", {"a": [1], "b": [2]}, {}, "needs one input, not 2"),
    "not a list": ("map", {"a": "text"}, {"key": "x"}, "needs a list, not text"),
    "no key": ("map", {"a": []}, {}, "key is missing"),
    "bad json": ("json_parse", {"a": '{"x": }'}, {}, "not JSON"),
    "mixed order": ("sort", {"a": [1, "x"]}, {}, "cannot order a number and text"),
    "maps have no order": ("sort", {"a": [{}, {}]}, {}, "cannot order a map"),
    "no such group": ("regex", {"a": "x"}, {"pattern": "x", "group": 3}, "no such group"),
    "bad pattern": ("regex", {"a": "x"}, {"pattern": "("}, "regular expression"),
    "regex all bomb": ("regex", {"a": "a" * 200_000}, {"pattern": "a+b", "all": True}, "regular expression"),
    "regex replace bomb": ("regex", {"a": "a" * 200_000}, {"pattern": "a+b", "replace": ""}, "regular expression"),
    "regex bomb": ("regex", {"a": "a" * 50}, {"pattern": "(a+)+$"}, "regular expression"),
    "no is text": ("sort", {"a": [1, 2]}, {"reverse": "no"}, "reverse must be true or false, not 'no'"),
    "deep": ("merge", {"a": {}}, {"deep": "off"}, "deep must be true or false"),
    "trim": ("split", {"a": "x"}, {"trim": "no"}, "trim must be true or false"),
    "all": ("regex", {"a": "x"}, {"pattern": "x", "all": "no"}, "all must be true or false"),
    "key and keys": ("pick", {"a": {}}, {"key": "x", "keys": ["y"]}, "give key or keys, not both"),
    "wrong depth": ("flatten", {"a": []}, {"depth": 0}, "depth must be a whole number"),
    "length of a number": ("length", {"a": 5}, {}, "needs a list, map or text, not a number"),
}


@pytest.mark.parametrize(("function", "inputs", "parameters", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_transform_refuses(function: str, inputs: dict[str, Any], parameters: dict[str, Any], message: str) -> None:
    value, error = transform(function, inputs, **parameters)
    assert value is None
    assert message in error


@given(st.lists(st.one_of(st.none(), st.integers(), st.floats(allow_nan=False))), st.booleans())
def test_sorting_is_pythons_own_with_nulls_last(values: list[Any], reverse: bool) -> None:
    present = sorted((value for value in values if value is not None), reverse=reverse)
    expected = present + [None] * values.count(None)
    assert transform("sort", {"a": values}, reverse=reverse) == (expected, None)


# ---- Actions ---------------------------------------------------------------------------------------------------------


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers what it was sent, with the status that the path names."""

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        sent = {"method": self.command, "body": self.rfile.read(length).decode(), "type": self.headers.get("content-type")}
        answer = json.dumps(sent).encode()
        self.send_response(int(self.path[1:] or 200))
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_http_sends_json_and_reads_json(url: str) -> None:
    result = run_step({"type": "action", "action": "http", "url": f"{url}200", "json": {"x": "{{y}}"}}, {"y": [1]})
    output = result.outputs["output"]
    assert (output["status"], output["body"]) == (200, {"method": "POST", "body": '{"x":[1]}', "type": "application/json"})


def test_what_a_server_repeats_of_secret_headers_is_in_no_error(url: str) -> None:
    step = {"type": "action", "action": "http", "url": f"{url}500", "body": "no sk-secret-123456 here", "retry": {"max_attempts": 1}}
    result = run_step({**step, "headers": {"Authorization": "Bearer sk-secret-123456"}})
    assert "no *** here" in result.error["message"] and "sk-secret" not in str(result.to_dict())


def test_http_sends_text_as_text(url: str) -> None:
    step = {"type": "action", "action": "webhook", "url": f"{url}200", "method": "put", "body": "héllo"}
    body = run_step(step).outputs["output"]["body"]
    assert body == {"method": "PUT", "body": "héllo", "type": "text/plain; charset=utf-8"}


@pytest.mark.parametrize(("status", "retryable"), [(404, False), (503, True), (429, True)])
def test_an_http_error_fails_the_step_with_its_status(url: str, status: int, retryable: bool) -> None:
    step = {"type": "action", "action": "http", "url": f"{url}{status}", "retry": {"max_attempts": 2, "initial_delay": 1}}
    result = run_step(step)
    assert (result.error["status"], result.error["retryable"], result.attempts) == (status, retryable, 1 + retryable)


def test_an_http_error_can_be_a_value(url: str) -> None:
    step = {"type": "action", "action": "http", "url": f"{url}404", "fail_on_error": False}
    assert run_step(step).outputs["output"]["status"] == 404


@pytest.mark.parametrize("path", ["../out.txt", "/etc/out.txt", "a/../../out.txt", "link/out.txt", "a\0b", "."])
def test_write_file_stays_below_the_output_folder(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "output"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    result = run_step({"type": "action", "action": "write_file", "path": path, "content": "x"}, output_folder=folder)
    assert result.status == "failed"
    assert not (tmp_path / "out.txt").exists()


def test_write_file_writes_text_and_json_and_appends(tmp_path: Path) -> None:
    for content, append in (("é\n", False), ("b", True), ([1], False)):
        step = {"type": "action", "action": "write_file", "path": "a/b.txt", "content": content, "append": append}
        result = run_step(step, output_folder=tmp_path)
        assert result.outputs["output"] == str((tmp_path / "a/b.txt").resolve())
        written = (tmp_path / "a/b.txt").read_text(encoding="utf-8")
        assert written == {"é\n": "é\n", "b": "é\nb"}.get(str(content), "[\n  1\n]\n")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]


def test_fail_says_the_message_and_log_and_sleep_give_their_values() -> None:
    assert run_step({"type": "action", "action": "fail", "message": "no {{x}}"}, {"x": 1}).error["message"] == "no 1"
    assert run_step({"type": "action", "action": "log", "message": "hi {{x}}"}, {"x": 1}).outputs == {"output": "hi 1"}
    assert run_step({"type": "action", "action": "sleep", "seconds": "1ms"}).outputs == {"output": 0.001}


FUNCTIONS: dict[str, Any] = {
    "by name": lambda a, b=2: [a, b],
    "as one map": lambda parameters: [parameters["a"], 2],
    "keywords": lambda **parameters: [parameters["a"], 2],
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_an_action_gets_its_parameters(function: Any) -> None:
    result = run_step({"type": "action", "action": "mine", "a": "{{x}}"}, {"x": [1]}, actions={"mine": function})
    assert result.outputs == {"output": [[1], 2]}


def test_an_action_that_cannot_take_its_parameters_says_so() -> None:
    result = run_step({"type": "action", "action": "mine", "wrong": 1}, actions={"mine": lambda a, b: None})
    assert "cannot take the parameters wrong" in result.error["message"]


def test_a_custom_transform_gets_inputs_first_and_may_be_async() -> None:
    async def shout(inputs: Any, mark: str = "!") -> str:
        return f"{inputs['a']}{inputs[1]}{mark}"

    step = {"type": "transform", "function": "shout", "inputs": ["a", "b"], "mark": "?"}
    assert run_step(step, {"a": "x", "b": "y"}, transforms={"shout": shout}).outputs == {"output": "xy?"}


# ---- Structured answers ----------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "integer", "minimum": 0, "maximum": 10}, "tags": {"$ref": "#/$defs/tags"}},
    "required": ["score"],
    "additionalProperties": False,
    "$defs": {"tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]+$"}, "maxItems": 2}},
}


def ask(answers: list[str], **step: Any) -> tuple[Any, list[CompletionRequest]]:
    """The result of an llm step with SCHEMA, and the requests that its provider saw."""
    requests: list[CompletionRequest] = []

    def provider(request: CompletionRequest) -> str:
        requests.append(request)
        return answers[len(requests) - 1]

    llm = {"type": "llm", "provider": "p", "model": "m", "prompt": "rate it", "schema": SCHEMA, **step}
    return run_step(llm, providers={"p": provider}), requests


@pytest.mark.parametrize(
    "answer",
    ['{"score": 7}', ' {"score": 7}\n', '```json\n{"score": 7}\n```', 'Sure! Here it is: {"score": 7}. Bye', 'a {b} {"score": 7}'],
)
def test_a_structured_answer_is_found_in_fences_and_prose(answer: str) -> None:
    result, requests = ask([answer])
    assert (result.outputs, len(requests)) == ({"output": {"score": 7}}, 1)


def test_a_mismatch_is_asked_again_with_the_errors() -> None:
    result, requests = ask(['{"score": 11, "x": 1}', '{"score": 10}'], output=["value", "model", "tokens", "meta"])
    assert result.outputs["value"] == {"score": 10}
    assert result.outputs["meta"]["schema_retries"] == 1
    assert result.usage["calls"] == 2
    asked = requests[1].messages[-1]["content"]
    assert "$.score must be at most 10" in asked and "$.x is not allowed" in asked


def test_schema_retries_are_bounded_and_the_error_shows_the_answer() -> None:
    result, requests = ask(["no json", "nothing", "never", "too much"])
    assert (result.error["type"], len(requests)) == ("BadResponseError", 3)
    assert "never" in result.error["message"]


def test_a_provider_without_a_native_mode_is_told_the_schema() -> None:
    _, requests = ask(['{"score": 1}'], system="Be brief.")
    assert requests[0].system.startswith("Be brief.") and '"maximum":10' in requests[0].system


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"if": {}}, "'if' is not supported"),
        ({"properties": {"a": {"items": {"prefixItems": []}}}}, "schema.properties.a.items: the keyword 'prefixItems'"),
        ({"anyOf": [{}, {"$dynamicRef": "#x"}]}, "schema.anyOf[1]: the keyword '$dynamicRef'"),
        ({"$ref": "#/x", "x": {"contains": {}}}, "schema.$ref: the keyword 'contains'"),
        ({"$ref": "http://x/y.json"}, "must begin with #/ and stay in the schema"),
        ({"$ref": "#anchor"}, "must begin with #/ and stay in the schema"),
        ({"$ref": "#/nowhere"}, "nothing at $ref '#/nowhere'"),
        ({"items": [{}]}, "schema.items must be a JSON Schema, not a list"),
        ({"minLength": "x"}, "schema: minLength must be a whole number"),
        ({"exclusiveMinimum": True}, "schema: exclusiveMinimum must be a number, not true"),
        ({"multipleOf": 0}, "schema: multipleOf must be a number above 0"),
        ({"enum": 5}, "schema: enum must be a list, not 5"),
        ({"required": "name"}, "schema: required must be a list of texts"),
        ({"properties": [1]}, "schema: properties must be a map, not a list"),
        ({"anyOf": []}, "schema: anyOf must be a list of schemas"),
        ({"pattern": "("}, "bad regular expression"),
        ({"type": "text"}, "type must be of string"),
    ],
)
def test_a_schema_that_cannot_be_checked_whole_is_refused_when_the_workflow_is_loaded(schema: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        ask(['{"score": 1}'], schema=schema)


def test_unique_takes_inputs_that_are_not_json() -> None:
    step = Step(id="u", type="transform", function="unique", inputs=["inputs.a"])
    run = WorkflowExecutor(Workflow(name="w", steps=[step]), inputs={"a": [{"x": {1}}, {"x": {1}}, b"x"]}).run()
    assert run["u"].outputs == {"output": [{"x": {1}}, b"x"]}


def test_a_schema_may_refer_to_itself_but_not_go_in_circles() -> None:
    tree = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}}}
    assert list(schema_faults({"kids": [{"kids": []}, {"kids": [1]}]}, tree)) == ["$.kids[1].kids[0] must be object, not 1"]
    twice = {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}
    with pytest.raises(ExecutionError, match="leads round to itself"):
        list(schema_faults(1, twice))


def test_echo_answers_a_schema() -> None:
    step = {"type": "llm", "provider": "openai", "model": "m", "prompt": "x", "schema": SCHEMA}
    assert run_step(step, offline=True).outputs == {"output": {"score": 0}}


SCHEMA_CASES: dict[str, tuple[Any, Any, str | None]] = {
    "type": ("x", {"type": "integer"}, "$ must be integer, not 'x'"),
    "true is no integer": (True, {"type": "integer"}, "$ must be integer, not true"),
    "1.0 is an integer": (1.0, {"type": "integer"}, None),
    "types": (None, {"type": ["string", "null"]}, None),
    "enum": ("c", {"enum": ["a", "b"]}, '$ must be one of ["a","b"]'),
    "enum 1 is not true": (True, {"enum": [1]}, "$ must be one of [1]"),
    "const": ({"a": [1]}, {"const": {"a": [1]}}, None),
    "required": ({}, {"required": ["a"]}, "$.a is missing"),
    "additional": ({"b": 1}, {"properties": {"a": {}}, "additionalProperties": False}, "$.b is not allowed"),
    "additional schema": ({"b": 1}, {"additionalProperties": {"type": "string"}}, "$.b must be string, not 1"),
    "items": ([1, "x"], {"items": {"type": "integer"}}, "$[1] must be integer, not 'x'"),
    "min": (1, {"exclusiveMinimum": 1}, "$ must be more than 1"),
    "multiple": (0.3, {"multipleOf": 0.1}, None),
    "length": ("ab", {"minLength": 3}, "$ must be at least 3 characters long"),
    "pattern": ("AB", {"pattern": "^[a-z]+$"}, '$ must be text that matches "^[a-z]+$"'),
    "unique": ([1, 1], {"uniqueItems": True}, "$ must be a list without repeats"),
    "any": (5, {"anyOf": [{"type": "string"}, {"minimum": 3}]}, None),
    "any fails": (1, {"anyOf": [{"type": "string"}, {"minimum": 3}]}, "$ must be string, not 1"),
    "one": (5, {"oneOf": [{"minimum": 1}, {"minimum": 3}]}, "$ must fit exactly one of 2 schemas, but fits 2"),
    "all": (5, {"allOf": [{"minimum": 1}, {"maximum": 4}]}, "$ must be at most 4"),
    "not": (5, {"not": {"type": "integer"}}, '$ must not fit {"type":"integer"}'),
    "ref": ({"v": {"v": 1}}, {"properties": {"v": {"$ref": "#"}}, "type": "object"}, "$.v.v must be object, not 1"),
}


@pytest.mark.parametrize(("value", "schema", "fault"), SCHEMA_CASES.values(), ids=SCHEMA_CASES.keys())
def test_a_schema_says_what_does_not_fit(value: Any, schema: Any, fault: str | None) -> None:
    assert next(iter(schema_faults(value, schema)), None) == fault


# ---- Tools -----------------------------------------------------------------------------------------------------------


def weather(city: str, days: int = 1) -> str:
    """The weather in a city."""
    if city == "Nowhere":
        raise LookupError("no such city")
    return f"sun in {city} for {days} days"


def use_tools(*calls: dict[str, Any], weather: Any = weather, **step: Any) -> tuple[Any, list[CompletionRequest]]:
    """An llm step whose model makes these tool calls, one a round, and then answers `done`."""
    requests: list[CompletionRequest] = []

    def provider(request: CompletionRequest) -> CompletionResponse:
        requests.append(request)
        made = calls[len(requests) - 1 : len(requests)]
        return CompletionResponse("" if made else "done", "m", tool_calls=made)

    llm = {"type": "llm", "provider": "p", "model": "m", "prompt": "x", "tools": ["weather"], "output": ["a", "b", "c", "meta"]}
    return run_step({**llm, **step}, providers={"p": provider}, tools={"weather": weather}), requests


def test_a_tools_schema_comes_from_its_signature_and_docstring() -> None:
    _, requests = use_tools()
    properties = {"city": {"type": "string"}, "days": {"type": "integer"}}
    parameters = {"type": "object", "properties": properties, "required": ["city"], "additionalProperties": False}
    assert requests[0].tools == [{"name": "weather", "description": "The weather in a city.", "parameters": parameters}]


def test_tool_results_go_back_to_the_model_and_into_the_metadata() -> None:
    result, requests = use_tools({"id": "1", "name": "weather", "arguments": {"city": "Rome"}})
    assert result.outputs["a"] == "done"
    call = {"name": "weather", "arguments": {"city": "Rome"}, "result": "sun in Rome for 1 days"}
    assert result.outputs["meta"]["tool_calls"] == [call]
    answer = {"role": "tool", "id": "1", "name": "weather", "content": "sun in Rome for 1 days", "is_error": False}
    assert requests[1].messages[-1] == answer


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("weather", {"city": "Nowhere"}, "no such city"),
        ("weather", {"town": "Rome"}, "city is missing"),
        ("weather", "not json", "wrong arguments"),
        ("wether", {}, "there is no tool 'wether'"),
    ],
)
def test_a_tools_error_goes_back_to_the_model(name: str, arguments: Any, error: str) -> None:
    result, requests = use_tools({"id": "1", "name": name, "arguments": arguments})
    assert result.status == "completed"
    assert requests[1].messages[-1]["is_error"] is True
    assert error in requests[1].messages[-1]["content"]


def test_a_tool_gets_its_arguments_whatever_kind_of_parameters_it_has() -> None:
    def weather(city: str, days: int = 2, /, scale: str = "C", *more: str, wind: bool = False, **rest: Any) -> str:
        return f"{city} {days} {scale} {more} {wind} {rest}"

    for arguments, answer in (
        ({"city": "Rome", "wind": True}, "Rome 2 C () True {}"),
        ({"scale": "F", "city": "Rome"}, "Rome 2 F () False {}"),
        ({"days": 1, "city": "Rome"}, "Rome 1 C () False {}"),
    ):
        result, _ = use_tools({"id": "1", "name": "weather", "arguments": arguments}, weather=weather)
        assert result.outputs["meta"]["tool_calls"][0]["result"] == answer


def test_tool_rounds_are_bounded() -> None:
    calls = [{"id": str(n), "name": "weather", "arguments": {"city": "Rome"}} for n in range(9)]
    result, requests = use_tools(*calls, max_tool_rounds=3)
    assert (result.status, len(requests)) == ("failed", 4)
    assert "max_tool_rounds" in result.error["message"]


def test_an_unregistered_tool_is_refused_before_the_first_step() -> None:
    step = Step(id="x", type="llm", provider="echo", model="m", prompt="x", tools=["weather"])
    with pytest.raises(Exception, match="weather"):
        WorkflowExecutor(Workflow(name="t", steps=[step])).run()


def problems(**step: Any) -> list[str]:
    return [str(problem) for problem in Workflow("t", [Step(id="a", **step)]).validate()]


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"type": "transform", "function": "sort", "inputs": [], "revers": True}, ["'revers'", "did you mean 'reverse'"]),
        ({"type": "transform", "function": "slice", "inputs": [], "start": "x"}, ["start must be a whole number"]),
        ({"type": "transform", "function": "regex", "inputs": [], "pattern": "("}, ["pattern", "the step will fail"]),
        ({"type": "transform", "function": "map", "inputs": []}, ["key is missing (or template)"]),
        ({"type": "action", "action": "sleep"}, ["seconds is missing"]),
        ({"type": "action", "action": "http", "methd": "POST"}, ["'methd'", "did you mean 'method'"]),
        ({"type": "action", "action": "write_file", "path": "x", "contents": "y"}, ["did you mean 'content'"]),
    ],
)
def test_validation_warns_of_what_a_built_in_does_not_take(step: dict[str, Any], words: list[str]) -> None:
    found = " | ".join(problems(**step))
    assert all(word in found for word in words), found
    assert "warning" in found


def test_validation_is_silent_about_parameters_that_are_right_free_or_rendered() -> None:
    assert problems(type="transform", function="sort", inputs=[], reverse="{{inputs.way}}", note="mine") == []
    assert problems(type="action", action="log", message="hi", m=1, thing="{{inputs.x}}") == []


def test_a_file_is_not_emptied_for_a_misspelt_content(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("kept")
    step = {"type": "action", "action": "write_file", "path": "keep.txt", "contents": "typo"}
    assert "content is missing" in run_step(step, output_folder=str(tmp_path)).error["message"]
    assert (tmp_path / "keep.txt").read_text() == "kept"


@pytest.mark.parametrize(("condition", "kept"), [("index < 2", [5, 6]), ("item > 5", [6, 7]), ("true", [5, 6, 7])])
def test_the_condition_of_a_filter_without_a_key_is_over_its_items(condition: str, kept: list[int]) -> None:
    assert transform("filter", {"a": [5, 6, 7]}, condition=condition) == (kept, None)


NAMED = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "parts": {"type": "array"}, "id": {"type": "integer"}},
    "required": ["name"],
}


@pytest.mark.parametrize(
    ("answer", "schema"),
    [
        pytest.param('{"name": "car", "parts": [{"name": "bolt"}],}', NAMED, id="broken"),
        pytest.param('{"name": "car", "parts": [{"name": "bolt"}, {"name": "nu', NAMED, id="cut off"),
        pytest.param('{"name": "car", "parts": [{"name": "bolt"}], "name": "bus"}', NAMED, id="duplicate key"),
        pytest.param('{"name": 5, "parts": [{"name": "bolt"}]}', NAMED, id="does not fit"),
        pytest.param('```json\n{"name": 5, "parts": [{"name": "bolt"}]}\n```', NAMED, id="does not fit, in a fence"),
        pytest.param('{"id": 1, "tags": ["a"]}', {"type": "array", "items": {"type": "string"}}, id="list inside"),
        pytest.param("[1, 2, 3, [4], 5", {"type": "array", "items": {"type": "integer"}}, id="list cut off"),
        *(pytest.param(text, {"type": "integer"}, id=text) for text in ("2,500", "1/2", "2024-05-01", "007", "3 or 4")),
        pytest.param("true, but", {"type": "boolean"}, id="true, but"),
    ],
)
def test_a_part_of_an_answer_is_never_taken_for_the_answer(answer: str, schema: dict[str, Any]) -> None:
    value, faults = structured_answer(answer, schema)
    assert value is None and faults


@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "x]}"}', ' \n{"name": "x]}"}\n', 'Here [1] it is: {"name": "x]}"}. Good?', '```\n{"name": "x]}"}\n```',
        '```json\n// a note\n{"name": "x]}"}\n```',
    ],
)  # fmt: skip
def test_an_answer_is_found_in_a_fence_and_in_prose(answer: str) -> None:
    assert structured_answer(answer, NAMED) == ({"name": "x]}"}, [])


def test_what_the_model_is_told_says_why_its_answer_is_no_json() -> None:
    assert "duplicate key 'a'" in structured_answer('{"a": 1, "a": 2}', {})[1][0]


def test_checking_a_schema_takes_no_time_that_doubles_with_the_depth() -> None:
    child = {"type": "object", "properties": {"c": {"$ref": "#/$defs/n"}}}
    either = {"$ref": "#/$defs/n", "$defs": {"n": {"anyOf": [{**child, "required": [one]} for one in "xy"]}}}
    assert structured_answer('{"c":' * 60 + '{"x":1}' + "}" * 60, either)[1] == ["$.x is missing"]
    twice: dict[str, Any] = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(60)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**twice, "d60": {"type": "string"}}}
    assert structured_answer("1", schema)[1] == ["$ must be string, not 1"]


def test_a_schema_that_leads_round_to_itself_says_so() -> None:
    with pytest.raises(ExecutionError, match="leads round"):
        schema_faults(1, {"properties": {"a": {"$ref": "#"}}, "anyOf": [{"$ref": "#"}]})


def test_an_answer_too_deep_for_its_schema_is_a_fault_and_no_crash() -> None:
    hops = {f"h{n}": {"allOf": [{"$ref": f"#/$defs/h{n + 1}"}]} for n in range(12)}
    schema = {"$ref": "#/$defs/h0", "$defs": {**hops, "h12": {"items": {"$ref": "#/$defs/h0"}}}}
    assert "nested too deeply" in structured_answer("[" * 98 + "1" + "]" * 98, schema)[1][0]


@pytest.mark.parametrize(
    ("value", "step", "fits"),
    [(0.3, 0.1, True), (10**17, 3, False), (10**17 - 1, 3, True), (10**400, 3, False), (10**400, 0.1, True), (1e-9, 7, False)],
)
def test_multiples_are_exact(value: float, step: float, fits: bool) -> None:
    assert (schema_faults(value, {"multipleOf": step}) == []) is fits


@pytest.mark.parametrize("number", [1e300, -1e300, 10**400])
def test_a_large_number_is_a_number(number: float) -> None:
    assert schema_faults(number, {"type": "number"}) == []
    declared = Workflow("t", [Step(id="a", type="action", action="log")], inputs={"n": {"type": "number"}})
    assert WorkflowExecutor(declared, {"n": number}).run().status == "completed"


@pytest.mark.parametrize("template", ["{{this}}", "{{.}}", "{{@root}}", "<<this>>", "{{default this 1}}", "{{lookup this 'steps'}}"])
def test_all_that_templates_see_is_no_value(template: str) -> None:
    value, error = transform("template", {}, template=template)
    assert value is None and "name a part of it" in error


def test_a_part_of_what_templates_see_is_a_value() -> None:
    for template in ("{{this.a}}", "{{default this.a 1}}", "{{lookup this 'a'}}", "{{lookup . 'a'}}", "{{@root.a}}", "{{./a}}"):
        assert transform("template", {"a": {"x": 1}}, template=template) == ({"x": 1}, None)


@pytest.mark.parametrize("answer", ['{"' + '\\"' * 200_000, "{" * 200_000, "[1]" * 100_000, "```\n" * 50_000, '{"a":"' + "\\" * 200_001])
def test_looking_for_json_in_an_answer_takes_linear_time(answer: str) -> None:
    started = time.monotonic()
    assert structured_answer(answer, {"type": "object"})[0] is None
    assert time.monotonic() - started < 10  # quadratic: minutes
