"""Room 10, Providers: requests, answers, streams, errors and faults of each vendor, with a server that checks them."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mock_vendors import KEY, ROUTES, Answer, MockVendors, compact, error_body, stream_bytes

import llm_orchestrator
from llm_orchestrator import (
    PROVIDERS,
    AuthenticationError,
    BadResponseError,
    CompletionRequest,
    CompletionResponse,
    ContextLengthError,
    EchoProvider,
    EmbeddingRequest,
    OrchestratorError,
    ProviderConnectionError,
    ProviderError,
    ProviderTimeoutError,
    QuotaExceededError,
    RateLimitError,
    ValidationError,
)

CHAT = ["openai", "azure", "openai_compatible", "mistral", "cohere", "ollama", "anthropic", "gemini"]
EMBED = ["openai", "azure", "openai_compatible", "mistral", "cohere", "ollama", "gemini", "voyage"]
SSE = [vendor for vendor in CHAT if vendor != "ollama"]
BASE = {"openai": "/v1", "openai_compatible": "/v1"}  # what the SDK's base URL ends with
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"name": "weather", "description": "Tells the weather.", "parameters": CITY}]
HELLO = [{"role": "user", "content": "Hello"}]
CALLS = (("call_a", "weather", {"city": "Köln"}), ("call_b", "weather", {"city": '"}{', "days": 2}))
STREAM = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])


@pytest.fixture(scope="module")
def running() -> Iterator[MockVendors]:
    with MockVendors() as vendors:
        yield vendors


@pytest.fixture
def vendors(running: MockVendors, monkeypatch: pytest.MonkeyPatch) -> Iterator[MockVendors]:
    for name in list(os.environ):
        if name.startswith(("CO_", "COHERE_", "OLLAMA_", "VOYAGE_", "GROQ_", "TOGETHER_", "OPENROUTER_")):
            monkeypatch.delenv(name)
    running.reset()
    yield running
    for client in CLIENTS.values():
        client.close()
    CLIENTS.clear()


CLIENTS: dict[str, Any] = {}  # of the running test


def provider(vendors: MockVendors, vendor: str, **options: Any) -> Any:
    """The test's client of a vendor, at the server."""
    options = {"api_key": KEY, "base_url": vendors.url(vendor, BASE.get(vendor, "")), **options}
    return CLIENTS.setdefault(f"{vendor} {options}", PROVIDERS[vendor](**options))


def from_environment(vendor: str, **options: Any) -> Any:
    return CLIENTS.setdefault(f"{vendor} {options}", PROVIDERS[vendor].from_env(**options))


def ask(vendors: MockVendors, vendor: str, messages: Any = HELLO, **options: Any) -> CompletionResponse:
    answer: CompletionResponse = provider(vendors, vendor).complete(CompletionRequest("a-model", messages, **options))
    return answer


def route(vendor: str) -> Any:
    """How the vendor's chat answers, streamed too."""
    return next(route for route in ROUTES[vendor] if route.events)


# ---- answers ---------------------------------------------------------------------------------------------------------


@STREAM
@pytest.mark.parametrize("vendor", CHAT)
def test_text_usage_and_model_are_read_as_the_vendor_sent_them(vendors: MockVendors, vendor: str, stream: bool) -> None:
    answer = ask(vendors, vendor, stream=stream)
    assert answer.text == vendors.answer.text
    assert (answer.input_tokens, answer.output_tokens, answer.total_tokens) == (11, 7, 18)
    assert answer.model == "a-model"
    assert answer.finish_reason in ("stop", "end_turn", "STOP", "COMPLETE")
    assert "truncated" not in answer.metadata
    assert answer.tool_calls == []


@pytest.mark.parametrize("vendor", CHAT)
def test_text_comes_in_pieces_and_the_time_to_the_first_is_measured(vendors: MockVendors, vendor: str) -> None:
    pieces: list[str] = []
    answer = ask(vendors, vendor, stream=True, on_text=pieces.append)
    assert "".join(pieces) == answer.text
    assert len(pieces) > 3
    assert answer.metadata["time_to_first_token_ms"] > 0


@STREAM
@pytest.mark.parametrize("vendor", CHAT)
def test_an_answer_cut_off_by_a_limit_is_marked_as_truncated(vendors: MockVendors, vendor: str, stream: bool) -> None:
    vendors.answer = Answer("Once upon", finish="length")
    answer = ask(vendors, vendor, stream=stream)
    assert answer.text == "Once upon"
    assert answer.metadata["truncated"] is True
    assert answer.metadata["finish_reason"] in ("length", "max_tokens", "MAX_TOKENS")


@STREAM
@pytest.mark.parametrize("vendor", [vendor for vendor in CHAT if vendor != "ollama"])
def test_an_answer_that_a_filter_stopped_is_an_error(vendors: MockVendors, vendor: str, stream: bool) -> None:
    vendors.answer = Answer("", finish="filter")
    with pytest.raises(BadResponseError, match="stopped by") as caught:
        ask(vendors, vendor, stream=stream)
    assert not caught.value.retryable


@STREAM
@pytest.mark.parametrize("vendor", CHAT)
def test_tool_calls_are_read_with_their_arguments(vendors: MockVendors, vendor: str, stream: bool) -> None:
    vendors.answer = Answer("", CALLS, "tools")
    answer = ask(vendors, vendor, stream=stream, tools=TOOLS)
    assert answer.text == ""
    assert [(call["name"], call["arguments"]) for call in answer.tool_calls] == [call[1:] for call in CALLS]
    assert len({call["id"] for call in answer.tool_calls}) == 2


@pytest.mark.parametrize("vendor", CHAT)
def test_tool_results_go_back_in_the_vendors_form(vendors: MockVendors, vendor: str) -> None:
    vendors.answer = Answer("", CALLS, "tools")
    calls = ask(vendors, vendor, tools=TOOLS).tool_calls
    results = [
        {"role": "tool", "id": calls[0]["id"], "name": "weather", "content": "sunny"},
        {"role": "tool", "id": calls[1]["id"], "name": "weather", "content": "no such city", "is_error": True},
    ]
    vendors.answer = Answer("It is sunny.")
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    assert ask(vendors, vendor, [*HELLO, turn, *results], tools=TOOLS).text == "It is sunny."
    sent = json.dumps(vendors.requests[-1].body, ensure_ascii=False)
    assert "sunny" in sent and "no such city" in sent and "Köln" in sent


@STREAM
def test_responses_is_used_where_a_model_needs_it(vendors: MockVendors, stream: bool) -> None:
    client = provider(vendors, "openai")
    vendors.answer = Answer("", CALLS, "tools")
    request = CompletionRequest("o1-pro", HELLO, system="Be short.", max_tokens=9, stream=stream, tools=TOOLS)
    calls = client.complete(request).tool_calls
    assert [(call["id"], call["arguments"]) for call in calls] == [(call[0], call[2]) for call in CALLS]
    vendors.answer = Answer("Fine.", finish="length")
    results = [{"role": "tool", "id": call["id"], "name": "weather", "content": "rain"} for call in calls]
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    answer = client.complete(CompletionRequest("o1-pro", [*HELLO, turn, *results], seed=1, stream=stream))
    assert (answer.text, answer.finish_reason, answer.total_tokens) == ("Fine.", "length", 18)
    assert answer.metadata["ignored"] == ["seed"]
    assert [request.path for request in vendors.requests] == ["/v1/responses"] * 2
    assert vendors.requests[0].body["instructions"] == "Be short."
    assert [item.get("type", "message") for item in vendors.requests[1].body["input"]] == [
        "message",
        "function_call",
        "function_call",
        "function_call_output",
        "function_call_output",
    ]


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (
            {
                "type": "object",
                "properties": {"n": {"type": "integer"}},
                "required": ["n"],
                "additionalProperties": False,
            },
            '{"n":1}',
        ),
        ({"type": "object", "properties": {"n": {"type": "integer", "minimum": 0}}}, '{"n":1}'),
        ({"type": "array", "items": {"$ref": "#/$defs/n"}, "$defs": {"n": {"type": "integer"}}}, "[1,2]"),
        ({"enum": ["yes", "no"]}, '"yes"'),
    ],
    ids=["closed", "open", "list", "text"],
)
@STREAM
@pytest.mark.parametrize("vendor", CHAT)
def test_a_schema_reaches_the_vendor_and_the_answer_is_the_bare_value(
    vendors: MockVendors, vendor: str, schema: Any, text: str, stream: bool
) -> None:
    wrapped = vendor not in ("gemini", "ollama") and schema.get("type") != "object"
    said = compact({"value": json.loads(text)}) if wrapped else text
    by_tool = vendor == "anthropic" and schema.get("additionalProperties") is not False and not wrapped
    vendors.answer = Answer("", (("t", "give_answer", json.loads(said)),), "tools") if by_tool else Answer(said)
    answer = ask(vendors, vendor, stream=stream, schema=schema)
    assert answer.text == text
    assert answer.tool_calls == []
    sent = vendors.requests[-1].body
    inner = schema["properties"] if schema.get("type") == "object" else schema.get("enum") or schema["$defs"]
    assert compact(inner) in compact(sent)
    assert ("output_config" in sent or "tool_choice" in sent) == (vendor == "anthropic")


def test_strict_mode_is_asked_for_where_the_schema_allows_it(vendors: MockVendors) -> None:
    closed = {**CITY, "additionalProperties": False}
    for schema, strict in (
        (closed, True),
        (CITY, False),
        ({**closed, "required": []}, False),
        ({"items": closed}, True),
    ):
        ask(vendors, "openai", schema=schema)
        assert vendors.requests[-1].body["response_format"]["json_schema"].get("strict", False) is strict


def test_anthropic_answers_by_a_tool_beside_the_tools_of_the_step(vendors: MockVendors) -> None:
    vendors.answer = Answer("", (CALLS[0], ("t", "give_answer", {"city": "Rome"})), "tools")
    answer = ask(vendors, "anthropic", schema=CITY, tools=TOOLS)
    assert [call["name"] for call in answer.tool_calls] == ["weather"]
    assert vendors.requests[-1].body["tool_choice"] == {"type": "any"}
    vendors.answer = Answer("", (("t", "give_answer", {"city": "Rome"}),), "tools")
    answer = ask(vendors, "anthropic", schema=CITY, tools=TOOLS)
    assert (json.loads(answer.text), answer.tool_calls, answer.finish_reason) == ({"city": "Rome"}, [], "end_turn")


def test_a_server_without_schemas_gets_none(vendors: MockVendors) -> None:
    client = provider(vendors, "openai_compatible", structured="instructions")
    client.complete(CompletionRequest("a-model", HELLO, schema=CITY))
    assert client.native_schema is False
    assert "response_format" not in vendors.requests[-1].body


# ---- requests --------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "temperature": 0.5,
    "max_tokens": 9,
    "top_p": 0.9,
    "top_k": 4,
    "stop": "END",
    "seed": 1,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.2,
}


@pytest.mark.parametrize(
    ("vendor", "ignored"),
    [
        ("openai", ["top_k"]),
        ("azure", ["top_k"]),
        ("mistral", ["top_k"]),
        ("openai_compatible", []),
        ("cohere", []),
        ("ollama", []),
        ("gemini", []),
        ("anthropic", ["seed", "frequency_penalty", "presence_penalty"]),
    ],
)
def test_every_setting_arrives_or_is_named_as_ignored(vendors: MockVendors, vendor: str, ignored: list[str]) -> None:
    answer = ask(vendors, vendor, system="Be short.", **SETTINGS)
    assert answer.metadata.get("ignored", []) == ignored
    body = vendors.requests[-1].body
    sent = {**body, **body.get("options", {}), **body.get("generationConfig", {})}
    values = [["END"] if value == "END" else value for name, value in SETTINGS.items() if name not in ignored]
    assert all(value in sent.values() for value in values)
    assert compact(body).count("Be short.") == 1


def test_zero_is_a_setting_too(vendors: MockVendors) -> None:
    ask(vendors, "openai", temperature=0, seed=0)
    assert (vendors.requests[-1].body["temperature"], vendors.requests[-1].body["seed"]) == (0, 0)


@pytest.mark.parametrize("model", ["o1", "o3-mini", "o4-mini", "gpt-5", "gpt-5.1-mini", "gpt-6", "ft:o4-mini:me"])
def test_newer_openai_models_get_max_completion_tokens(vendors: MockVendors, model: str) -> None:
    provider(vendors, "openai").complete(CompletionRequest(model, HELLO, max_tokens=9))
    assert vendors.requests[-1].body["max_completion_tokens"] == 9


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4.1-mini", "gpt-3.5-turbo", "chatgpt-4o-latest"])
def test_older_openai_models_get_max_tokens(vendors: MockVendors, model: str) -> None:
    provider(vendors, "openai").complete(CompletionRequest(model, HELLO, max_tokens=9))
    assert vendors.requests[-1].body["max_tokens"] == 9


def test_params_go_to_the_vendor_and_join_its_maps(vendors: MockVendors) -> None:
    ask(vendors, "ollama", seed=1, params={"options": {"num_ctx": 4096}, "keep_alive": 0})
    assert vendors.requests[-1].body["options"] == {"seed": 1, "num_ctx": 4096}
    assert vendors.requests[-1].body["keep_alive"] == 0


def test_anthropic_always_gets_max_tokens_and_its_system_text_apart(vendors: MockVendors) -> None:
    ask(vendors, "anthropic", [{"role": "system", "content": "B"}, *HELLO], system="A")
    body = vendors.requests[-1].body
    assert (body["max_tokens"], body["system"], body["messages"]) == (4096, "A\n\nB", HELLO)


def test_anthropic_versions_that_refuse_sampling_settings_get_none(vendors: MockVendors) -> None:
    client = provider(vendors, "anthropic", anthropic_version="2026-10-21")
    vendors.always(compact(route("anthropic").plain(Answer("ok"), "m")).encode())
    answer = client.complete(CompletionRequest("m", HELLO, temperature=0.1, top_p=1, top_k=1, stop=["x"]))
    assert answer.metadata["ignored"] == ["temperature", "top_p", "top_k"]
    assert set(vendors.requests[-1].body) == {"model", "messages", "max_tokens", "stop_sequences"}
    assert vendors.requests[-1].headers["anthropic-version"] == "2026-10-21"


def test_anthropic_thinking_goes_back_with_the_tool_results(vendors: MockVendors) -> None:
    thinking = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}
    plain = route("anthropic").plain(Answer("", CALLS[:1], "tools"), "m")
    plain["content"].insert(0, thinking)
    vendors.always(compact(plain).encode())
    call = ask(vendors, "anthropic", tools=TOOLS).tool_calls[0]
    turn = {"role": "assistant", "content": "Let me see.", "tool_calls": [call]}
    vendors.reset()
    ask(vendors, "anthropic", [*HELLO, turn, {"role": "tool", "id": call["id"], "name": "weather", "content": "rain"}])
    assert [block["type"] for block in vendors.requests[-1].body["messages"][1]["content"]] == [
        "thinking",
        "text",
        "tool_use",
    ]
    assert vendors.requests[-1].body["messages"][1]["content"][0] == thinking


def test_gemini_signatures_go_back_with_the_tool_results(vendors: MockVendors) -> None:
    plain = route("gemini").plain(Answer("", CALLS[:1], "tools"), "m")
    plain["candidates"][0]["content"]["parts"][0]["thoughtSignature"] = "c2ln"
    vendors.always(compact(plain).encode())
    call = ask(vendors, "gemini", tools=TOOLS).tool_calls[0]
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    vendors.reset()
    ask(vendors, "gemini", [*HELLO, turn, {"role": "tool", "id": call["id"], "name": "weather", "content": "rain"}])
    contents = vendors.requests[-1].body["contents"]
    assert contents[1]["parts"][0]["thoughtSignature"] == "c2ln"
    result = {"id": "call_a", "name": "weather", "response": {"output": "rain"}}
    assert contents[2]["parts"] == [{"functionResponse": result}]


@pytest.mark.parametrize("vendor", CHAT)
@pytest.mark.parametrize(
    "messages",
    [
        [{}],
        ["Hello"],
        [{"role": "tool"}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": {1, 2}}],
    ],
)
def test_messages_that_cannot_be_written_are_refused(vendors: MockVendors, vendor: str, messages: Any) -> None:
    with pytest.raises(ValidationError):
        ask(vendors, vendor, messages)
    assert vendors.requests == []


# ---- settings --------------------------------------------------------------------------------------------------------

ENVIRONMENT = {
    "openai": "OPENAI_API_KEY OPENAI_BASE_URL",
    "azure": "AZURE_OPENAI_API_KEY AZURE_OPENAI_ENDPOINT",
    "openai_compatible": "OPENAI_COMPATIBLE_API_KEY OPENAI_COMPATIBLE_BASE_URL",
    "mistral": "MISTRAL_API_KEY MISTRAL_BASE_URL",
    "cohere": "CO_API_KEY CO_API_URL",
    "ollama": "OLLAMA_API_KEY OLLAMA_HOST",
    "gemini": "GEMINI_API_KEY GOOGLE_GEMINI_BASE_URL",
    "anthropic": "ANTHROPIC_API_KEY ANTHROPIC_BASE_URL",
}


@pytest.mark.parametrize("ending", ["", "/"])
@pytest.mark.parametrize("vendor", CHAT)
def test_the_sdks_variables_set_a_client_up(
    vendors: MockVendors, monkeypatch: pytest.MonkeyPatch, vendor: str, ending: str
) -> None:
    key, url = ENVIRONMENT[vendor].split()
    monkeypatch.setenv(key, KEY)
    monkeypatch.setenv(url, vendors.url(vendor, BASE.get(vendor, "")) + ending)
    answer = from_environment(vendor).complete(CompletionRequest("a-model", HELLO))
    assert answer.text == vendors.answer.text


@pytest.mark.parametrize(
    ("vendor", "suffix", "path"),
    [
        ("anthropic", "/v1", "/v1/messages"),
        ("anthropic", "/v1/", "/v1/messages"),
        ("mistral", "/v1", "/v1/chat/completions"),
        ("cohere", "/v1", "/v2/chat"),
        ("cohere", "/v2/", "/v2/chat"),
        ("ollama", "/api", "/api/chat"),
        ("ollama", "/v1/", "/api/chat"),
        ("gemini", "/v1beta", "/v1beta/models/a-model:generateContent"),
        ("gemini", "/v1/", "/v1/models/a-model:generateContent"),
        ("azure", "/openai", "/openai/v1/chat/completions"),
        ("azure", "/openai/v1/", "/openai/v1/chat/completions"),
        ("openai", "/v1/", "/v1/chat/completions"),
        ("openai", "", "/chat/completions"),
    ],
)
def test_a_base_url_may_end_with_the_version(vendors: MockVendors, vendor: str, suffix: str, path: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vendors, "answer", Answer("ok"))
        client = provider(vendors, vendor, base_url=vendors.url(vendor, suffix))
        if path != "/chat/completions":
            client.complete(CompletionRequest("a-model", HELLO))
        else:  # as the SDK: what is not given is not added
            with pytest.raises(ProviderError, match="404"):
                client.complete(CompletionRequest("a-model", HELLO))
    assert vendors.requests[-1].path == path


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("1.2.3.4", "http://1.2.3.4:11434"),
        ("1.2.3.4:5", "http://1.2.3.4:5"),
        (":5", "http://127.0.0.1:5"),
        ("http://h", "http://h"),
        ("https://h:5/p/", "https://h:5/p"),
        ("h/", "http://h:11434"),
        ("h/p", "http://h:11434/p"),
        ("[::1]", "http://[::1]:11434"),
        ("[::1]:5/p", "http://[::1]:5/p"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("", "http://127.0.0.1:11434"),
    ],
)
def test_ollama_host_is_read_as_its_client_reads_it(monkeypatch: pytest.MonkeyPatch, host: str, url: str) -> None:
    monkeypatch.setenv("OLLAMA_HOST", host)
    assert PROVIDERS["ollama"].from_env().base_url == url


@pytest.mark.parametrize(
    ("vendor", "named"),
    [
        ("openai", "OPENAI_API_KEY"),
        ("anthropic", "ANTHROPIC_API_KEY"),
        ("azure", "AZURE_OPENAI_ENDPOINT"),
        ("mistral", "MISTRAL_API_KEY"),
        ("gemini", "GOOGLE_API_KEY or GEMINI_API_KEY"),
        ("cohere", "CO_API_KEY or COHERE_API_KEY"),
        ("voyage", "VOYAGE_API_KEY"),
        ("groq", "GROQ_API_KEY"),
        ("together", "TOGETHER_API_KEY"),
        ("openrouter", "OPENROUTER_API_KEY"),
    ],
)
def test_a_missing_key_is_an_error_that_names_its_variable(vendors: MockVendors, vendor: str, named: str) -> None:
    with pytest.raises(AuthenticationError, match=named):
        PROVIDERS[vendor].from_env()


@pytest.mark.parametrize("vendor", ["ollama", "openai_compatible", "echo"])
def test_local_servers_need_no_key(vendors: MockVendors, vendor: str) -> None:
    assert vendor == PROVIDERS[vendor].from_env().TYPE


@pytest.mark.parametrize(
    ("vendor", "url", "path"),
    [
        ("groq", "https://api.groq.com", "/openai/v1/chat/completions"),
        ("together", "https://api.together.ai", "/v1/chat/completions"),
        ("openrouter", "https://openrouter.ai", "/api/v1/chat/completions"),
    ],
)
def test_services_that_speak_chat_completions_are_a_row_each(
    vendors: MockVendors, vendor: str, url: str, path: str
) -> None:
    assert PROVIDERS[vendor](api_key=KEY).base_url == url
    vendors.always(compact(route("openai").plain(Answer("ok"), "m")).encode())
    assert ask(vendors, vendor).text == "ok"
    assert vendors.requests[-1].path == path
    assert vendors.requests[-1].headers["authorization"] == f"Bearer {KEY}"


def test_openai_sends_its_organization_and_project(vendors: MockVendors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    client = from_environment("openai", api_key=KEY, base_url=vendors.url("openai", "/v1"))
    client.complete(CompletionRequest("a-model", HELLO))
    headers = vendors.requests[-1].headers
    assert (headers["openai-organization"], headers["openai-project"]) == ("org-1", "proj-1")


def test_anthropic_takes_a_bearer_token_and_custom_headers(
    vendors: MockVendors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "token-1")
    monkeypatch.setenv("ANTHROPIC_CUSTOM_HEADERS", "X-Team: blue\nno header\n anthropic-beta : a,b ")
    vendors.always(compact(route("anthropic").plain(Answer("ok"), "m")).encode())
    client = from_environment("anthropic", base_url=vendors.url("anthropic"))
    client.complete(CompletionRequest("a-model", HELLO))
    headers = vendors.requests[-1].headers
    assert (headers["authorization"], headers["x-team"], headers["anthropic-beta"]) == ("Bearer token-1", "blue", "a,b")
    assert "x-api-key" not in headers
    assert headers["anthropic-version"] == "2023-06-01"


@pytest.mark.parametrize(
    ("options", "path", "header"),
    [
        ({}, "/openai/v1/chat/completions", "api-key"),
        (
            {"api_version": "2024-10-21"},
            "/openai/deployments/a-model/chat/completions?api-version=2024-10-21",
            "api-key",
        ),
        (
            {"api_version": "2024-10-21", "deployment": "mine"},
            "/openai/deployments/mine/chat/completions?api-version=2024-10-21",
            "api-key",
        ),
        ({"api_version": "preview"}, "/openai/v1/chat/completions?api-version=preview", "api-key"),
        ({"api_version": "2025-03-01", "api": "responses"}, "/openai/responses?api-version=2025-03-01", "api-key"),
        ({"ad_token": "t", "api_key": None}, "/openai/v1/chat/completions", "authorization"),
    ],
)
def test_azure_has_deployment_and_v1_paths_keys_and_tokens(
    vendors: MockVendors, options: Any, path: str, header: str
) -> None:
    plain = ROUTES["openai"][1 if "api" in options else 0].plain
    vendors.always(compact(plain(Answer("ok"), "m")).encode())
    provider(vendors, "azure", **options).complete(CompletionRequest("a-model", HELLO))
    assert vendors.requests[-1].path == path
    assert [name for name in ("api-key", "authorization") if name in vendors.requests[-1].headers] == [header]


@pytest.mark.parametrize(
    ("version", "path"), [("beta", "/v1beta"), ("v1beta", "/v1beta"), ("v1alpha", "/v1alpha"), ("", "/v1")]
)
def test_gemini_takes_its_version_from_the_environment(
    vendors: MockVendors, monkeypatch: pytest.MonkeyPatch, version: str, path: str
) -> None:
    monkeypatch.setenv("GOOGLE_GENAI_API_VERSION", version)
    vendors.always(compact(route("gemini").plain(Answer("ok"), "m")).encode())
    from_environment("gemini", api_key=KEY, base_url=vendors.url("gemini")).complete(
        CompletionRequest("tunedModels/x", HELLO)
    )
    assert vendors.requests[-1].path == f"{path}/tunedModels/x:generateContent"


def test_headers_of_the_user_win_however_they_are_spelled(vendors: MockVendors) -> None:
    client = provider(
        vendors, "openai", api_key="other-key", headers={"AUTHORIZATION": f"Bearer {KEY}", "X-Title": "mine"}
    )
    assert client.complete(CompletionRequest("a-model", HELLO)).text
    assert vendors.requests[-1].headers["x-title"] == "mine"


@pytest.mark.parametrize(
    "options", [{"api_key": "a\nb"}, {"api_key": "a\x00"}, {"headers": {"X-Key": "ü€"}}, {"headers": {"a b": "c"}}]
)
def test_headers_that_cannot_be_sent_are_refused_without_showing_them(options: Any) -> None:
    with pytest.raises((AuthenticationError, ValidationError), match="no header can carry") as caught:
        PROVIDERS["openai"](**options)
    assert "€" not in str(caught.value)


def test_an_unknown_option_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ValidationError, match="did you mean 'base_url'"):
        PROVIDERS["openai"](base_urll="x")


@pytest.mark.parametrize("vendor", [*CHAT, "voyage"])
def test_the_repr_shows_no_secret(vendor: str) -> None:
    shown = repr(
        PROVIDERS[vendor](api_key=KEY, base_url="https://me:password1@host/x?key=secret1", headers={"X-Key": "secret2"})
    )
    assert "host" in shown
    assert not any(secret in shown for secret in (KEY, "password1", "secret1", "secret2"))


# ---- errors ----------------------------------------------------------------------------------------------------------

PLAIN = ProviderError
ERRORS = [  # (status, error class, retryable)
    (400, PLAIN, False),
    (401, AuthenticationError, False),
    (402, QuotaExceededError, False),
    (403, AuthenticationError, False),
    (404, PLAIN, False),
    (408, ProviderTimeoutError, True),
    (409, PLAIN, True),
    (413, ContextLengthError, False),
    (422, PLAIN, False),
    (425, PLAIN, True),
    (429, RateLimitError, True),
    (498, AuthenticationError, False),
    (500, PLAIN, True),
    (502, PLAIN, True),
    (503, PLAIN, True),
    (504, ProviderTimeoutError, True),
    (529, PLAIN, True),
]


@pytest.mark.parametrize(("status", "kind", "retryable"), ERRORS, ids=[str(row[0]) for row in ERRORS])
@STREAM
@pytest.mark.parametrize("vendor", CHAT)
def test_each_status_has_its_error_class(
    vendors: MockVendors, vendor: str, stream: bool, status: int, kind: type, retryable: bool
) -> None:
    body = compact(error_body(vendor, status, "went wrong")).encode()
    vendors.always(body, status=status, x_request_id="req-9")
    with pytest.raises(ProviderError) as caught:
        ask(vendors, vendor, stream=stream)
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.retryable, error.provider, error.request_id) == (status, retryable, vendor, "req-9")
    assert f"{vendor}: answered {status}: went wrong" in str(error)


def test_anthropic_names_the_request_in_the_body_too(vendors: MockVendors) -> None:
    vendors.always(compact(error_body("anthropic", 400, "no")).encode(), status=400)
    with pytest.raises(ProviderError) as caught:
        ask(vendors, "anthropic")
    assert caught.value.request_id == "req_1"


TOO_LONG = {  # what the vendors say
    "openai": (
        400,
        {
            "error": {
                "message": "This model's maximum context length is 8192 tokens. However, you asked for 9000.",
                "type": "invalid_request_error",
                "param": "messages",
                "code": "context_length_exceeded",
            }
        },
    ),
    "openai-responses": (
        400,
        {
            "error": {
                "message": "Your input exceeds the context window of this model.",
                "code": "context_length_exceeded",
            }
        },
    ),
    "anthropic": (
        400,
        {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": "prompt is too long: 210000 tokens > 200000 maximum"},
        },
    ),
    "anthropic-limit": (
        400,
        {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "input length and `max_tokens` exceed context limit: 188240 + 21333 > 200000",
            },
        },
    ),
    "anthropic-size": (
        413,
        {"type": "error", "error": {"type": "request_too_large", "message": "Request exceeds the maximum size"}},
    ),
    "gemini": (
        400,
        {
            "error": {
                "code": 400,
                "status": "INVALID_ARGUMENT",
                "message": "The input token count (1048577) exceeds the maximum number of tokens allowed (1048576).",
            }
        },
    ),
    "cohere": (
        400,
        {"message": "too many tokens: total number of tokens in the prompt cannot exceed 4081 - received 12345."},
    ),
    "mistral": (
        400,
        {
            "object": "error",
            "type": "invalid_request_error",
            "message": "Prompt contains 65673 tokens, too large for model with 32768 maximum context length",
        },
    ),
    "ollama": (400, {"error": "the input length exceeds the context length"}),
    "groq": (
        400,
        {
            "error": {
                "message": "Please reduce the length of the messages or completion.",
                "type": "invalid_request_error",
                "code": "context_length_exceeded",
            }
        },
    ),
    "vllm": (
        400,
        {
            "object": "error",
            "message": "The decoder prompt (length 5000) is longer than the maximum model length of 4096.",
            "code": 400,
        },
    ),
    "llama.cpp": (
        400,
        {
            "error": {
                "code": 400,
                "message": "the request exceeds the available context size",
                "type": "exceed_context_size_error",
            }
        },
    ),
}
NO_MONEY = {
    "openai": (
        429,
        {
            "error": {
                "message": "You exceeded your current quota.",
                "type": "insufficient_quota",
                "code": "insufficient_quota",
            }
        },
    ),
    "openai-credit": (429, {"error": {"message": "No credit.", "type": "billing", "code": "credit_balance_exhausted"}}),
    "anthropic": (
        400,
        {
            "type": "error",
            "error": {
                "type": "invalid_request_error",
                "message": "Your credit balance is too low to access the Anthropic API.",
            },
        },
    ),
    "anthropic-402": (402, {"type": "error", "error": {"type": "billing_error", "message": "Pay."}}),
    "openrouter": (402, {"error": {"code": 402, "message": "Insufficient credits"}}),
    "deepseek": (402, {"error": {"message": "Insufficient Balance", "type": "unknown_error"}}),
}


@pytest.mark.parametrize("vendor", TOO_LONG)
def test_a_prompt_that_is_too_long_is_a_context_length_error(vendors: MockVendors, vendor: str) -> None:
    status, body = TOO_LONG[vendor]
    vendors.always(compact(body).encode(), status=status)
    with pytest.raises(ContextLengthError) as caught:
        ask(vendors, "openai")
    assert not caught.value.retryable


@pytest.mark.parametrize("vendor", NO_MONEY)
def test_a_spent_quota_is_not_retried(vendors: MockVendors, vendor: str) -> None:
    status, body = NO_MONEY[vendor]
    vendors.always(compact(body).encode(), status=status, x_should_retry="true")
    with pytest.raises(QuotaExceededError) as caught:
        ask(vendors, "openai")
    assert not caught.value.retryable


def test_a_wrong_gemini_key_is_an_authentication_error(vendors: MockVendors) -> None:
    body = {
        "error": {
            "code": 400,
            "message": "API key not valid. Please pass a valid API key.",
            "status": "INVALID_ARGUMENT",
        }
    }
    vendors.always(compact(body).encode(), status=400)
    with pytest.raises(AuthenticationError):
        ask(vendors, "gemini")


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"retry_after": "7"}, 7),
        ({"retry_after": "1.5"}, 1.5),
        ({"retry_after_ms": "250", "retry_after": "9"}, 0.25),
        ({"retry_after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry_after": "soon"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_the_time_to_wait_is_read_from_the_headers(vendors: MockVendors, headers: Any, wait: Any) -> None:
    vendors.always(b"{}", status=429, **headers)
    with pytest.raises(RateLimitError) as caught:
        ask(vendors, "openai")
    assert caught.value.retry_after == wait


def test_gemini_says_in_the_body_how_long_to_wait(vendors: MockVendors) -> None:
    details = [
        {"@type": "type.googleapis.com/google.rpc.Help"},
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.5s"},
    ]
    vendors.always(compact([{"error": {"code": 429, "message": "slow", "details": details}}]).encode(), status=429)
    with pytest.raises(RateLimitError, match="slow") as caught:
        ask(vendors, "gemini")
    assert caught.value.retry_after == 34.5


@pytest.mark.parametrize(("status", "said"), [(500, "false"), (400, "true"), (429, "false")])
def test_x_should_retry_overrides_the_status(vendors: MockVendors, status: int, said: str) -> None:
    vendors.always(b"{}", status=status, x_should_retry=said)
    with pytest.raises(ProviderError) as caught:
        ask(vendors, "openai")
    assert caught.value.retryable == (said == "true")


IN_BODY = [
    ({"error": {"code": 502, "message": "upstream", "metadata": {}}}, PLAIN, 502, True),
    ({"error": {"code": 429, "message": "slow"}}, RateLimitError, 429, True),
    ({"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}, PLAIN, 529, True),
    ({"error": {"message": "no", "type": "invalid_request_error"}}, PLAIN, 400, False),
    ({"error": {"message": "no", "code": "insufficient_quota"}}, QuotaExceededError, 429, False),
    ({"error": {"message": "The server had an error", "type": "server_error"}}, PLAIN, 500, True),
    ({"error": "model runner has stopped"}, PLAIN, None, False),
    ([{"error": {"code": 503, "message": "busy", "status": "UNAVAILABLE"}}], PLAIN, 503, True),
]


@pytest.mark.parametrize(("body", "kind", "status", "retryable"), IN_BODY, ids=[str(row[2]) for row in IN_BODY])
@pytest.mark.parametrize("way", ["plain", "instead of a stream", "in a stream", "after a stream"])
@pytest.mark.parametrize("vendor", CHAT)
def test_an_error_in_a_good_answer_is_that_error(
    vendors: MockVendors, vendor: str, way: str, body: Any, kind: type, status: Any, retryable: bool
) -> None:
    raw = compact(body).encode()
    events = route(vendor).events(Answer("Hello there"), "m")[:2]
    begun = stream_bytes(events, route(vendor).stream)
    if way == "in a stream":
        raw = begun + stream_bytes([("", raw.decode())], route(vendor).stream)
    elif way == "after a stream":
        raw = begun + raw
    vendors.always(raw)
    with pytest.raises(ProviderError) as caught:
        ask(vendors, vendor, stream=way != "plain")
    assert (type(caught.value), caught.value.status, caught.value.retryable) == (kind, status, retryable)


NONSENSE = {
    "empty": b"",
    "html": b"<html>\n<body>504 Gateway</body></html>",
    "text": b"oops",
    "null": b"null",
    "number": b"5",
    "list": b"[]",
    "map": b"{}",
    "text in json": b'"hello"',
    "cut": b'{"choices": [{"mess',
    "duplicate key": b'{"id": "a", "id": "b"}',
    "not utf-8": b'{"a": "\xff"}',
    "no choices": b'{"choices": [], "content": null, "candidates": [], "message": null, "output": null}',
    "nulls": b'{"choices": [{"message": {"content": null}}], "content": null, "candidates": [null], "message": {}}',
    "wrong types": b'{"choices": {"a": 1}, "content": 7, "candidates": "x", "message": ["x"]}',
    "nan": b'{"choices": NaN}',
    "deep": b'{"choices":' + b"[" * 100_000,
}


@pytest.mark.parametrize("nonsense", NONSENSE)
@STREAM
@pytest.mark.parametrize("vendor", CHAT)
def test_nonsense_is_a_bad_response_that_shows_how_it_begins(
    vendors: MockVendors, vendor: str, stream: bool, nonsense: str
) -> None:
    vendors.always(NONSENSE[nonsense])
    expected = (
        (BadResponseError, ProviderConnectionError) if stream else BadResponseError
    )  # a stream may be cut at once
    with pytest.raises(expected) as caught:
        ask(vendors, vendor, stream=stream)
    if nonsense in ("html", "text"):
        assert type(caught.value) is BadResponseError
        assert NONSENSE[nonsense].decode().split("\n")[-1][:200] in str(caught.value)


@pytest.mark.parametrize("nonsense", NONSENSE)
@pytest.mark.parametrize("vendor", EMBED)
def test_nonsense_for_embeddings_is_a_bad_response(vendors: MockVendors, vendor: str, nonsense: str) -> None:
    vendors.always(NONSENSE[nonsense])
    with pytest.raises(BadResponseError):
        provider(vendors, vendor).embed(EmbeddingRequest("m", ["a"]))


@pytest.mark.parametrize(
    ("body", "again"),
    [
        ('{"id": "c", "choices": [{"', True), ('{"id": "c", "choices": [', True), ('{"id": ', True), ('{"id": "c"}}', False),
        ("Service", False), ('{"id": nope}', False), ("", False),
    ],
)  # fmt: skip
def test_json_that_ends_in_the_middle_is_asked_for_again(vendors: MockVendors, body: str, again: bool) -> None:
    vendors.always(body.encode())
    with pytest.raises(BadResponseError) as caught:
        ask(vendors, "openai")
    assert caught.value.retryable is again


def test_a_long_page_is_shown_by_its_first_200_characters(vendors: MockVendors) -> None:
    vendors.always(b"<html>" + b"x" * 300)
    with pytest.raises(BadResponseError) as caught:
        ask(vendors, "openai")
    assert str(caught.value).endswith("<html>" + "x" * 194)


@pytest.mark.parametrize("status", [200, 400, 401, 500])
@pytest.mark.parametrize("shape", ["text", "error", "event", "straddling", "repeated"])
@pytest.mark.parametrize("vendor", ["openai", "anthropic", "gemini"])
def test_a_key_that_the_server_sends_back_is_in_no_message(
    vendors: MockVendors, vendor: str, shape: str, status: int
) -> None:
    texts = {
        "text": f"bad key {KEY}",
        "error": compact({"error": {"message": f"bad key {KEY}", "type": KEY}}),
        "event": f'data: {{"x": "{KEY}"}}\n\n',
        "straddling": "y" * 190 + KEY,
        "repeated": KEY * 1000,
    }
    vendors.always(texts[shape].encode(), status=status)
    for stream in (False, True):
        with pytest.raises(ProviderError) as caught:
            ask(vendors, vendor, stream=stream)
        assert KEY[:8] not in f"{caught.value} {caught.value!r}"


def test_what_a_terminal_would_obey_is_not_in_a_message(vendors: MockVendors) -> None:
    vendors.always(b"\x1b[2Jcleared", status=500)
    with pytest.raises(ProviderError) as caught:
        ask(vendors, "openai")
    assert "\x1b" not in str(caught.value)
    assert "cleared" in str(caught.value)


# ---- streams ---------------------------------------------------------------------------------------------------------


def in_pieces(raw: bytes, size: int) -> tuple[bytes, ...]:
    return tuple(raw[start : start + size] for start in range(0, len(raw), size))


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("vendor", CHAT)
def test_a_stream_may_be_cut_into_pieces_anywhere(vendors: MockVendors, vendor: str, line_end: str, size: int) -> None:
    events = route(vendor).events(vendors.answer, "a-model")
    raw = stream_bytes(events, route(vendor).stream, line_end, comments=True)
    vendors.always(*in_pieces(raw, size), whole=False, content_type="text/event-stream")
    pieces: list[str] = []
    answer = ask(vendors, vendor, stream=True, on_text=pieces.append)
    assert (answer.text, answer.total_tokens) == (vendors.answer.text, 18)
    assert "".join(pieces) == answer.text


@pytest.mark.parametrize("vendor", CHAT)
def test_every_cut_of_a_stream_is_a_lost_connection_or_the_whole_answer(vendors: MockVendors, vendor: str) -> None:
    vendors.answer = Answer("Hi you", CALLS[:1], "tools")
    events = route(vendor).events(vendors.answer, "a-model")
    raw = stream_bytes(events, route(vendor).stream)
    ended = False
    for length in (*range(0, len(raw) - 250, 11), *range(len(raw) - 250, len(raw) + 1)):
        vendors.always(raw[:length], content_type="text/event-stream")
        try:
            answer = ask(vendors, vendor, stream=True, tools=TOOLS)
        except ProviderConnectionError as error:
            assert error.retryable
            assert not ended
        else:
            ended = True
            assert (answer.text, answer.tool_calls[0]["arguments"]) == ("Hi you", CALLS[0][2])
    assert ended


@pytest.mark.parametrize("vendor", CHAT)
def test_a_server_that_does_not_stream_is_understood(vendors: MockVendors, vendor: str) -> None:
    document = route(vendor).plain(vendors.answer, "a-model")
    for indent in (None, 2):
        vendors.always(json.dumps(document, indent=indent).encode())
        answer = ask(vendors, vendor, stream=True)
        assert (answer.text, answer.total_tokens) == (vendors.answer.text, 18)


@pytest.mark.parametrize("vendor", SSE)
def test_an_event_may_have_several_data_lines_and_no_space(vendors: MockVendors, vendor: str) -> None:
    lines = []
    for _, data in route(vendor).events(vendors.answer, "a-model"):
        spread = data if data == "[DONE]" else json.dumps(json.loads(data), indent=1)
        lines += [*("data:" + line for line in spread.splitlines()), "id: 7", "retry: 10", "unknown: x", ""]
    vendors.always(("\ufeff" + "\n".join(lines) + "\n").encode())
    assert ask(vendors, vendor, stream=True).text == vendors.answer.text


def test_choices_beside_the_first_are_left_out(vendors: MockVendors) -> None:
    events = [
        {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": end}]}
        for index, text, end in ((1, "no", None), (0, "yes", None), (1, "", "stop"), (0, "", "stop"))
    ]
    vendors.always(stream_bytes([("", compact(event)) for event in events]))
    assert ask(vendors, "openai_compatible", stream=True).text == "yes"


def test_parallel_calls_of_one_index_stay_apart(vendors: MockVendors) -> None:
    calls = [
        {"id": id, "index": 0, "function": {"name": "weather", "arguments": f'{{"city":"{id}"}}'}} for id in ("a", "b")
    ]
    events = [
        {"choices": [{"delta": {"tool_calls": [call]}, "finish_reason": end}]}
        for call, end in zip(calls, (None, "tool_calls"))
    ]
    vendors.always(stream_bytes([("", compact(event)) for event in events]))
    answer = ask(vendors, "openai_compatible", stream=True)
    assert [(call["id"], call["arguments"]) for call in answer.tool_calls] == [
        ("a", {"city": "a"}),
        ("b", {"city": "b"}),
    ]


def test_arguments_that_are_no_json_stay_text(vendors: MockVendors) -> None:
    document = route("openai").plain(Answer("", CALLS[:1], "tools"), "m")
    document["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] = '{"city": '
    vendors.always(compact(document).encode())
    assert ask(vendors, "openai").tool_calls[0]["arguments"] == '{"city": '


def test_a_refusal_is_the_text_and_is_marked(vendors: MockVendors) -> None:
    document = route("openai").plain(Answer("", finish="stop"), "m")
    document["choices"][0]["message"]["refusal"] = "I cannot."
    vendors.always(compact(document).encode())
    answer = ask(vendors, "openai")
    assert (answer.text, answer.metadata["refusal"]) == ("I cannot.", True)


def test_mistral_chunks_are_joined_without_the_thinking(vendors: MockVendors) -> None:
    document = route("mistral").plain(Answer(""), "m")
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
    document["choices"][0]["message"]["content"] = [
        thinking,
        {"type": "text", "text": "Hel"},
        {"type": "text", "text": "lo"},
    ]
    vendors.always(compact(document).encode())
    assert ask(vendors, "mistral").text == "Hello"


@STREAM
def test_gemini_thoughts_are_no_part_of_the_text(vendors: MockVendors, stream: bool) -> None:
    document = route("gemini").plain(Answer("Hello"), "m")
    document["candidates"][0]["content"]["parts"].insert(0, {"text": "Hm.", "thought": True})
    vendors.always(stream_bytes([("", compact(document))]) if stream else compact(document).encode())
    assert ask(vendors, "gemini", stream=stream).text == "Hello"


@STREAM
def test_a_blocked_gemini_prompt_is_an_error_that_says_why(vendors: MockVendors, stream: bool) -> None:
    document = {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": {"promptTokenCount": 3}}
    vendors.always(stream_bytes([("", compact(document))]) if stream else compact(document).encode())
    with pytest.raises(BadResponseError, match="PROHIBITED_CONTENT"):
        ask(vendors, "gemini", stream=stream)


def test_a_failed_response_is_its_error(vendors: MockVendors) -> None:
    failed = {"id": "r", "status": "failed", "error": {"code": "rate_limit_exceeded", "message": "slow"}, "output": []}
    for events in (
        [{"type": "response.failed", "response": failed}],
        [{"type": "error", "code": "rate_limit_exceeded", "message": "slow"}],
    ):
        vendors.always(stream_bytes([(event["type"], compact(event)) for event in events]))
        with pytest.raises(RateLimitError, match="slow"):
            provider(vendors, "openai").complete(CompletionRequest("o1-pro", HELLO, stream=True))


@pytest.mark.parametrize("kind", [ZeroDivisionError, ConnectionResetError, UnicodeError, ValueError, BadResponseError])
@pytest.mark.parametrize("ending", ["\n\n", ""], ids=["whole", "cut"])
@pytest.mark.parametrize("vendor", CHAT)
def test_an_error_of_the_listener_passes_unchanged(
    vendors: MockVendors, vendor: str, ending: str, kind: type[Exception]
) -> None:
    def fail(text: str) -> None:
        raise error

    error = kind("of the listener")
    events = route(vendor).events(Answer("Hello"), "m")
    vendors.always(stream_bytes(events, route(vendor).stream).rstrip(b"\n") + ending.encode())
    with pytest.raises(kind) as caught:
        ask(vendors, vendor, stream=True, on_text=fail)
    assert caught.value is error


# ---- mutated answers -------------------------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.sampled_from([None, True, 0, -1, 1.5, 10**30, "", "x", "stop", [], {}]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["text", "type", "content", "index"]), inner, max_size=2)
    ),
    max_leaves=3,
)


def places_in(document: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [above] * bool(above) + [place for key, value in inner for place in places_in(value, (*above, key))]


@st.composite
def mutated(draw: Any, document: Any) -> Any:
    """A document in which up to three values are replaced or removed."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = places_in(changed)
        if places:
            *above, last = draw(st.sampled_from(places))
            inner = changed
            for key in above:
                inner = inner[key]
            if draw(st.booleans()):
                inner[last] = draw(JSON_VALUES)
            else:
                del inner[last]
    return changed


def reads_or_refuses(vendors: MockVendors, vendor: str, stream: bool) -> None:
    """An answer of the right types comes out, or an error of the family."""
    try:
        answer = ask(vendors, vendor, stream=stream, tools=TOOLS)
    except ProviderError:
        return
    assert isinstance(answer.text, str) and isinstance(answer.model, str)
    assert all(
        type(count) in (int, type(None)) for count in (answer.input_tokens, answer.output_tokens, answer.total_tokens)
    )
    assert all(isinstance(call["name"], str) and isinstance(call["id"], str) for call in answer.tool_calls)
    json.dumps(answer.metadata)


FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("vendor", [*CHAT, "responses"])
@FUZZ
@given(choice=st.data())
def test_a_mutated_answer_is_read_or_refused(vendors: MockVendors, vendor: str, choice: st.DataObject) -> None:
    shape = ROUTES["openai"][1] if vendor == "responses" else route(vendor)
    document = choice.draw(mutated(shape.plain(Answer("Hello", CALLS, "tools"), "m")))
    vendors.always(compact(document).encode())
    reads_or_refuses(vendors, "openai" if vendor == "responses" else vendor, False)


@pytest.mark.parametrize("vendor", [*CHAT, "responses"])
@FUZZ
@given(choice=st.data())
def test_a_mutated_stream_is_read_or_refused(vendors: MockVendors, vendor: str, choice: st.DataObject) -> None:
    shape = ROUTES["openai"][1] if vendor == "responses" else route(vendor)
    events = [data for _, data in shape.events(Answer("Hello", CALLS[:1], "tools"), "m")]
    documents = choice.draw(mutated([json.loads(data) for data in events if data != "[DONE]"]))
    vendors.always(stream_bytes([("", compact(document)) for document in documents] + [("", "[DONE]")], shape.stream))
    reads_or_refuses(vendors, "openai" if vendor == "responses" else vendor, True)


@pytest.mark.parametrize("vendor", EMBED)
@FUZZ
@given(choice=st.data())
def test_mutated_embeddings_are_read_or_refused(vendors: MockVendors, vendor: str, choice: st.DataObject) -> None:
    client, request = provider(vendors, vendor), EmbeddingRequest("m", ["a", "bb"], 3)
    vendors.reply = None
    client.embed(request)
    valid = json.loads(vendors.respond(vendors.requests[-1]).pieces[0])
    vendors.always(compact(choice.draw(mutated(valid))).encode())
    try:
        vectors = client.embed(request).vectors
    except ProviderError:
        return
    assert all(type(number) in (int, float) for vector in vectors for number in vector)
    assert len(vectors) == 2 and len(vectors[0]) == len(vectors[1])


# ---- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vendor", EMBED)
def test_vectors_come_in_the_order_of_the_texts(vendors: MockVendors, vendor: str) -> None:
    answer = provider(vendors, vendor).embed(EmbeddingRequest("a-model", ["a", "bb", "ccc"], 3))
    assert answer.vectors == [[1.0, 0.0, 0.5], [2.0, 1.0, 0.5], [3.0, 2.0, 0.5]]
    assert answer.model == "a-model"
    assert answer.tokens == (None if vendor == "gemini" else 5)


@pytest.mark.parametrize(
    ("vendor", "place", "query", "document"),
    [
        ("cohere", "input_type", "search_query", "search_document"),
        ("voyage", "input_type", "query", "document"),
        ("gemini", "taskType", "RETRIEVAL_QUERY", "RETRIEVAL_DOCUMENT"),
    ],
)
def test_query_and_document_are_said_in_the_vendors_words(
    vendors: MockVendors, vendor: str, place: str, query: str, document: str
) -> None:
    for kind, word in (("query", query), ("document", document), ("CLUSTERING", "CLUSTERING")):
        provider(vendors, vendor).embed(EmbeddingRequest("m", ["a"], input_type=kind))
        body = vendors.requests[-1].body
        assert body.get("requests", [body])[0][place] == word


def test_mongodb_keys_of_voyage_lead_to_mongodb() -> None:
    assert PROVIDERS["voyage"](api_key="al-123").base_url == "https://ai.mongodb.com"
    assert PROVIDERS["voyage"](api_key="pa-123").base_url == "https://api.voyageai.com"


def test_a_vendor_without_embeddings_or_completions_says_so(vendors: MockVendors) -> None:
    with pytest.raises(ValidationError, match="embeddings"):
        provider(vendors, "anthropic").embed(EmbeddingRequest("m", ["a"]))
    with pytest.raises(ValidationError, match="embeddings only"):
        ask(vendors, "voyage")


# ---- echo ------------------------------------------------------------------------------------------------------------


def test_echo_repeats_the_prompt_in_pieces_and_counts_words() -> None:
    pieces: list[str] = []
    request = CompletionRequest(
        "any",
        [{"role": "user", "content": "Say  hello\nto me"}],
        system="Be kind.",
        stream=True,
        tools=TOOLS,
        on_text=pieces.append,
    )
    answer = EchoProvider().complete(request)
    assert (answer.text, answer.tool_calls) == ("echo: Say  hello\nto me", [])
    assert "".join(pieces) == answer.text and len(pieces) > 2
    assert (answer.input_tokens, answer.output_tokens, answer.finish_reason) == (6, 5, "stop")


SCHEMAS = [
    (
        {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a"]},
        {"a": ""},
    ),
    ({"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}}}, {"a": False, "b": None}),
    ({"type": "array", "items": {"type": "integer", "minimum": 3}, "minItems": 2}, [3, 3]),
    ({"enum": ["x", "y"]}, "x"),
    ({"const": 0}, 0),
    ({"type": ["integer", "null"]}, 0),
    ({"type": "string", "minLength": 3}, "xxx"),
    ({"type": "integer", "exclusiveMinimum": 4, "multipleOf": 5}, 5),
    ({"type": "integer", "maximum": -3}, -3),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, 0.25),
    ({"type": "number", "minimum": -5, "maximum": 5}, 0),
    ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, None),
    ({"allOf": [{"required": ["a"]}, {"properties": {"a": {"const": 1}}}]}, {"a": 1}),
    ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "boolean"}}}, False),
    ({}, ""),
    ({"type": "string", "pattern": "^[a-z]{2}$", "examples": ["de"]}, "de"),
]


@pytest.mark.parametrize(("schema", "value"), SCHEMAS, ids=[compact(row[0])[:60] for row in SCHEMAS])
def test_echo_answers_a_schema_with_the_smallest_value(schema: Any, value: Any) -> None:
    assert json.loads(EchoProvider().complete(CompletionRequest("any", HELLO, schema=schema)).text) == value


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-2, 2) | st.text("ab$", max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "type",
                        "enum",
                        "anyOf",
                        "allOf",
                        "$ref",
                        "items",
                        "minItems",
                        "properties",
                        "required",
                        "minimum",
                        "maximum",
                        "multipleOf",
                        "minLength",
                        "examples",
                        "const",
                    ]
                ),
                inner,
                max_size=3,
            )
        ),
        max_leaves=6,
    )
)
@settings(max_examples=150, deadline=None)
def test_echo_answers_or_refuses_any_schema(schema: Any) -> None:
    schema = [schema] if schema is None else schema
    try:
        json.loads(EchoProvider().complete(CompletionRequest("any", HELLO, schema=schema)).text)
    except OrchestratorError:
        pass


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "minItems": 10**9},
        {"type": "string", "minLength": 10**12},
        {"type": "integer", "minimum": 10, "maximum": 5},
        {"$ref": "#/nowhere"},
        {"allOf": [{"$ref": "#/a"}, 1]},
        {"enum": []},
    ],
    ids=str,
)
def test_echo_refuses_a_schema_that_nothing_small_fits(schema: Any) -> None:
    with pytest.raises(ValidationError):
        EchoProvider().complete(CompletionRequest("any", HELLO, schema=schema))


def cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other))


def test_echo_embeddings_of_similar_texts_are_near_each_other() -> None:
    documents = [
        "Refunds are paid within 14 days of the return.",
        "Our office in Berlin opens at nine o'clock.",
        "The battery lasts for ten hours of video.",
        "Passwords must have twelve characters.",
    ]
    for question, best in (
        ("How do I get a refund for a returned item?", 0),
        ("When does the Berlin office open?", 1),
        ("How long will the batteries last?", 2),
        ("How long must my password be?", 3),
    ):
        query, *vectors = EchoProvider().embed(EmbeddingRequest("any", [question, *documents])).vectors
        scores = [cosine(query, vector) for vector in vectors]
        assert scores.index(max(scores)) == best


@given(st.text(max_size=60), st.integers(1, 300))
@settings(max_examples=150, deadline=None)
def test_echo_embeddings_have_length_one_and_the_size_asked_for(text: str, size: int) -> None:
    one, other = EchoProvider().embed(EmbeddingRequest("any", [text, text], size)).vectors
    assert one == other and len(one) == size
    assert math.isclose(math.sqrt(cosine(one, one)), 1, rel_tol=1e-9)


def test_echo_embeddings_have_256_dimensions_and_ignore_case() -> None:
    one, other = EchoProvider().embed(EmbeddingRequest("any", ["Über UNS", "über uns"])).vectors
    assert len(one) == 256 and one == other
    with pytest.raises(ValidationError):
        EchoProvider().embed(EmbeddingRequest("any", ["a"], 0))


def test_echo_embeddings_are_the_same_in_every_process_and_on_every_python() -> None:
    texts = ["Hello, World!", "größer", "日本語のテキスト", "", "a b c", "\U00010d50\ua7cb\u2c2f\U00010570"]
    code = (
        "import sys, json; from llm_orchestrator import EchoProvider, EmbeddingRequest;"
        "vectors = EchoProvider().embed(EmbeddingRequest('any', json.loads(sys.argv[1]))).vectors;"
        "print(json.dumps([[round(n, 6) for n in v if n] for v in vectors]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(texts)],
        capture_output=True,
        cwd=ROOT,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    here = EchoProvider().embed(EmbeddingRequest("any", texts)).vectors
    assert json.loads(run.stdout) == [[round(number, 6) for number in vector if number] for vector in here]
    import hashlib

    digest = hashlib.sha256(repr(here).encode()).hexdigest()[:16]
    assert digest == "edcc63ceb969b852"


def test_every_provider_is_a_provider_and_carries_its_name() -> None:
    for name, kind in PROVIDERS.items():
        assert issubclass(kind, llm_orchestrator.Provider)
        assert name == kind.TYPE
        assert kind(name="mine").name == "mine"
