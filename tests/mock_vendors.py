"""A threaded local server that speaks the vendors' wire formats and checks what it receives.

Each vendor's path is served below its name: a base URL is `server.url("anthropic")`. A request that the vendor's API
reference does not allow (a missing or unknown field, another type, a missing header) gets a 400 that says why. What is
answered is `server.answer`, in one piece or as the vendor's stream; `server.reply` replaces it with raw bytes.
The shapes are those that the official SDKs of 2026-11 send and read (openai 3.57, anthropic 2.14, google-genai 3.6,
cohere 7.3, mistralai 3.7, ollama 0.6, voyageai 0.5).
"""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, NamedTuple

KEY = "sk-mock-0123456789abcdef"


class Answer(NamedTuple):
    """What the model says, in no vendor's words; `finish` is stop, length, tools or filter."""

    text: str = "Grüße, 世界 🌍!"
    tool_calls: tuple[tuple[str, str, dict[str, Any]], ...] = ()  # (id, name, arguments)
    finish: str = "stop"
    input_tokens: int = 11
    output_tokens: int = 7


class Reply(NamedTuple):
    """A raw reply: `pieces` are written one by one, then the connection is closed; `whole` gives a content length."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),)
    pieces: tuple[bytes, ...] = ()
    whole: bool = True


class Request(NamedTuple):
    vendor: str
    path: str
    headers: dict[str, str]
    body: Any


Event = tuple[str, str]  # (name or "", data)


def pieces_of(text: str) -> list[str]:
    """A text in pieces of up to three characters."""
    return [text[start : start + 3] for start in range(0, len(text), 3)]


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# ---- checks: what is wrong with a request, or nothing ---------------------------------------------------------------


def fields(body: Any, allowed: dict[str, Any], required: tuple[str, ...]) -> str | None:
    """The first thing that is wrong with the fields of a map: unknown, of another type, or missing."""
    if not isinstance(body, dict):
        return "the body is no object"
    for name, value in body.items():
        if name not in allowed:
            return f"{name}: Extra inputs are not permitted"
        if not isinstance(value, allowed[name]) or (isinstance(value, bool) and allowed[name] is not bool):
            return f"{name}: wrong type {type(value).__name__}"
    missing = [name for name in required if name not in body]
    return f"{missing[0]}: Field required" if missing else None


NUMBER = (int, float)
CHAT = {
    "model": str,
    "messages": list,
    "temperature": NUMBER,
    "top_p": NUMBER,
    "stop": (list, str),
    "tools": list,
    "frequency_penalty": NUMBER,
    "presence_penalty": NUMBER,
    "response_format": dict,
    "stream": bool,
}
OPENAI_CHAT = {
    **CHAT,
    "max_tokens": int,
    "max_completion_tokens": int,
    "seed": int,
    "stream_options": dict,
    "tool_choice": object,
}
COMPATIBLE_CHAT = {**OPENAI_CHAT, "top_k": int, "provider": dict}
MISTRAL_CHAT = {**CHAT, "max_tokens": int, "random_seed": int}
COHERE_CHAT = {
    **{name: kind for name, kind in CHAT.items() if name not in ("top_p", "stop")},
    "max_tokens": int,
    "seed": int,
    "p": NUMBER,
    "k": int,
    "stop_sequences": list,
}
OLLAMA_CHAT = {
    "model": str,
    "messages": list,
    "tools": list,
    "format": (dict, str),
    "options": dict,
    "stream": bool,
    "keep_alive": object,
    "think": object,
}
RESPONSES = {
    "model": str,
    "input": list,
    "instructions": str,
    "max_output_tokens": int,
    "temperature": NUMBER,
    "top_p": NUMBER,
    "text": dict,
    "tools": list,
    "stream": bool,
}
ANTHROPIC = {
    "model": str,
    "messages": list,
    "max_tokens": int,
    "system": (str, list),
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": int,
    "stop_sequences": list,
    "tools": list,
    "tool_choice": dict,
    "output_config": dict,
    "stream": bool,
    "thinking": dict,
    "metadata": dict,
}
GEMINI = {
    "contents": list,
    "systemInstruction": dict,
    "generationConfig": dict,
    "tools": list,
    "toolConfig": dict,
    "safetySettings": list,
}
GEMINI_CONFIG = {
    "temperature": NUMBER,
    "topP": NUMBER,
    "topK": NUMBER,
    "maxOutputTokens": int,
    "stopSequences": list,
    "seed": int,
    "frequencyPenalty": NUMBER,
    "presencePenalty": NUMBER,
    "responseMimeType": str,
    "responseJsonSchema": dict,
    "thinkingConfig": dict,
}


def check_chat(body: Any, allowed: dict[str, Any] = OPENAI_CHAT, object_arguments: bool = False) -> str | None:
    """Chat Completions: roles, tool calls that are answered, tools and schemas of the right shape."""
    fault = fields(body, allowed, ("model", "messages"))
    waiting: list[str] = []
    for message in body["messages"] if not fault else ():
        role, calls = message.get("role"), message.get("tool_calls") or []
        if role not in ("system", "user", "assistant", "tool"):
            return f"messages: invalid role {role!r}"
        if role == "tool" and not object_arguments:
            if message.get("tool_call_id") not in waiting:
                return "messages: a tool result without its call"
            waiting.remove(message["tool_call_id"])
        if role == "tool" and object_arguments and not isinstance(message.get("tool_name"), str):
            return "messages: a tool result without tool_name"
        if message.get("content") is None and not calls:
            return "messages: content: Field required"
        for call in calls:
            kind = dict if object_arguments else str
            if not isinstance(call["function"]["arguments"], kind):
                return "messages: tool_calls: arguments of the wrong type"
            if not object_arguments:
                if call.get("type") != "function":
                    return "messages: tool_calls: type: Field required"
                json.loads(call["function"]["arguments"])
                waiting.append(call["id"])
    for tool in body.get("tools", ()) if not fault else ():
        if tool.get("type") != "function" or not isinstance(tool["function"]["parameters"], dict):
            return "tools: not a function"
    shape = body.get("response_format") if not fault else None
    if shape and shape.get("type") == "json_schema" and not isinstance(shape["json_schema"]["schema"], dict):
        return "response_format: no schema"
    return fault


def check_openai(body: Any) -> str | None:
    fault = check_chat(body)
    new = not fault and re.match(r"o\d|gpt-5", body["model"])
    if new and "max_tokens" in body:
        return (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        )
    shape = body.get("response_format", {}).get("json_schema") if not fault else None
    if shape and shape["schema"].get("type") != "object":
        return "Invalid schema for response_format: schema must be a JSON Schema of 'type: \"object\"'"
    return fault


def check_responses(body: Any) -> str | None:
    return fields(body, RESPONSES, ("model", "input"))


def check_anthropic(body: Any) -> str | None:
    """Messages: roles user and assistant only, tool results right after their calls in one message."""
    fault, asked = fields(body, ANTHROPIC, ("model", "messages", "max_tokens")), []  # type: Tuple[Optional[str], List[str]]
    for message in body["messages"] if not fault else ():
        if message.get("role") not in ("user", "assistant") or set(message) != {"role", "content"}:
            return "messages: role and content expected"
        blocks = message["content"] if isinstance(message["content"], list) else []
        if message["content"] in ("", []):
            return "messages: content must not be empty"
        results = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
        if results != asked:
            return "messages: `tool_use` ids were found without `tool_result` blocks immediately after"
        asked = [block["id"] for block in blocks if block["type"] == "tool_use" and isinstance(block["input"], dict)]
    for tool in body.get("tools", ()) if not fault else ():
        if set(tool) != {"name", "description", "input_schema"} or tool["input_schema"].get("type") != "object":
            return "tools: input_schema of type object expected"
    return fault


def check_gemini(body: Any) -> str | None:
    fault = fields(body, GEMINI, ("contents",)) or fields(body.get("generationConfig", {}), GEMINI_CONFIG, ())
    for content in body["contents"] if not fault else ():
        if content.get("role") not in ("user", "model") or not content.get("parts"):
            return "contents: role user or model, and parts expected"
        for part in content["parts"]:
            if "functionResponse" in part and not isinstance(part["functionResponse"]["response"], dict):
                return "contents: functionResponse.response is no struct"
            if "functionCall" in part and not isinstance(part["functionCall"]["args"], dict):
                return "contents: functionCall.args is no struct"
    return fault


def check_embeddings(allowed: dict[str, Any], required: tuple[str, ...]) -> Callable[[Any], str | None]:
    return lambda body: fields(body, {"model": str, **allowed}, required)


# ---- answers --------------------------------------------------------------------------------------------------------


def openai_calls(answer: Answer) -> list[dict[str, Any]]:
    return [
        {"id": id, "type": "function", "function": {"name": name, "arguments": compact(arguments)}}
        for id, name, arguments in answer.tool_calls
    ]


OPENAI_FINISH = {"stop": "stop", "length": "length", "tools": "tool_calls", "filter": "content_filter"}


def openai_usage(answer: Answer) -> dict[str, int]:
    total = answer.input_tokens + answer.output_tokens
    return {"prompt_tokens": answer.input_tokens, "completion_tokens": answer.output_tokens, "total_tokens": total}


def openai_plain(answer: Answer, model: str) -> Any:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or None, "refusal": None}
    if answer.tool_calls:
        message["tool_calls"] = openai_calls(answer)
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": OPENAI_FINISH[answer.finish]}
    whole = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1764000000, "model": model}
    return {**whole, "choices": [choice], "usage": openai_usage(answer)}


def openai_events(answer: Answer, model: str, mistral: bool = False) -> list[Event]:
    whole = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1764000000, "model": model}
    deltas: list[Any] = [
        {"role": "assistant", "content": ""},
        *({"content": piece} for piece in pieces_of(answer.text)),
    ]
    for index, call in enumerate(openai_calls(answer)):
        arguments = call["function"]["arguments"]
        if mistral:  # in one piece
            deltas.append({"tool_calls": [{**call, "index": index}]})
            continue
        deltas.append({"tool_calls": [{**call, "index": index, "function": {**call["function"], "arguments": ""}}]})
        deltas += [
            {"tool_calls": [{"index": index, "function": {"arguments": piece}}]} for piece in pieces_of(arguments)
        ]
    chunks = [
        {**whole, "choices": [{"index": 0, "delta": delta, "finish_reason": None}], "usage": None} for delta in deltas
    ]
    last = {**whole, "choices": [{"index": 0, "delta": {}, "finish_reason": OPENAI_FINISH[answer.finish]}]}
    if not mistral:
        chunks += [{**last, "usage": None}, {**whole, "choices": [], "usage": openai_usage(answer)}]
    else:
        chunks.append({**last, "usage": openai_usage(answer)})
    return [("", compact(chunk)) for chunk in chunks] + [("", "[DONE]")]


def mistral_events(answer: Answer, model: str) -> list[Event]:
    return openai_events(answer, model, mistral=True)


def responses_plain(answer: Answer, model: str) -> Any:
    output: list[Any] = [{"id": "rs_1", "type": "reasoning", "summary": []}]
    if answer.text:
        part = {"type": "output_text", "text": answer.text, "annotations": [], "logprobs": []}
        output.append({"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]})
    output += [
        {
            "id": f"fc_{id}",
            "type": "function_call",
            "call_id": id,
            "name": name,
            "arguments": compact(arguments),
            "status": "completed",
        }
        for id, name, arguments in answer.tool_calls
    ]
    total = answer.input_tokens + answer.output_tokens
    usage = {"input_tokens": answer.input_tokens, "output_tokens": answer.output_tokens, "total_tokens": total}
    details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    cut = answer.finish == "length"
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1764000000,
        "model": model,
        "output": output,
        "error": None,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "usage": {**usage, **details},
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "metadata": {},
        "instructions": None,
        "temperature": 1.0,
        "top_p": 1.0,
    }


def responses_events(answer: Answer, model: str) -> list[Event]:
    plain = responses_plain(answer, model)
    begun = {"type": "response.created", "response": {**plain, "status": "in_progress", "output": [], "usage": None}}
    place = {"item_id": "msg_1", "output_index": 1, "content_index": 0, "logprobs": []}
    texts = [{"type": "response.output_text.delta", **place, "delta": piece} for piece in pieces_of(answer.text)]
    events = [begun, *texts, {"type": f"response.{plain['status']}", "response": plain}]
    return [(event["type"], compact({**event, "sequence_number": number})) for number, event in enumerate(events)]


ANTHROPIC_FINISH = {"stop": "end_turn", "length": "max_tokens", "tools": "tool_use", "filter": "refusal"}


def anthropic_plain(answer: Answer, model: str) -> Any:
    blocks: list[Any] = [{"type": "text", "text": answer.text, "citations": None}] if answer.text else []
    blocks += [
        {"type": "tool_use", "id": id, "name": name, "input": arguments} for id, name, arguments in answer.tool_calls
    ]
    usage = {"input_tokens": answer.input_tokens - 5, "cache_creation_input_tokens": 3, "cache_read_input_tokens": 2}
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": blocks,
        "stop_sequence": None,
        "stop_reason": ANTHROPIC_FINISH[answer.finish],
        "usage": {**usage, "output_tokens": answer.output_tokens},
    }


def anthropic_events(answer: Answer, model: str) -> list[Event]:
    plain = anthropic_plain(answer, model)
    begun = {**plain, "content": [], "stop_reason": None, "usage": {**plain["usage"], "output_tokens": 1}}
    events: list[Any] = [{"type": "message_start", "message": begun}, {"type": "ping"}]
    for index, block in enumerate(plain["content"]):
        empty = {**block, "text": ""} if block["type"] == "text" else {**block, "input": {}}
        field, kind, text = "text", "text_delta", block.get("text", "")
        if block["type"] == "tool_use":
            field, kind, text = "partial_json", "input_json_delta", compact(block["input"])
        events.append({"type": "content_block_start", "index": index, "content_block": empty})
        deltas = [{"type": kind, field: piece} for piece in ["", *pieces_of(text)]]
        events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        events.append({"type": "content_block_stop", "index": index})
    ended = {"stop_reason": plain["stop_reason"], "stop_sequence": None}
    events.append({"type": "message_delta", "delta": ended, "usage": {"output_tokens": answer.output_tokens}})
    events.append({"type": "message_stop"})
    return [(event["type"], compact(event)) for event in events]


GEMINI_FINISH = {"stop": "STOP", "length": "MAX_TOKENS", "tools": "STOP", "filter": "SAFETY"}


def gemini_parts(answer: Answer) -> list[Any]:
    calls = [{"functionCall": {"id": id, "name": name, "args": arguments}} for id, name, arguments in answer.tool_calls]
    return ([{"text": answer.text}] if answer.text else []) + calls


def gemini_plain(answer: Answer, model: str) -> Any:
    candidate = {
        "content": {"parts": gemini_parts(answer), "role": "model"},
        "finishReason": GEMINI_FINISH[answer.finish],
        "index": 0,
    }
    usage = {
        "promptTokenCount": answer.input_tokens,
        "candidatesTokenCount": answer.output_tokens - 2,
        "thoughtsTokenCount": 2,
    }
    usage["totalTokenCount"] = answer.input_tokens + answer.output_tokens
    return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": model, "responseId": "gem-1"}


def gemini_events(answer: Answer, model: str) -> list[Event]:
    plain, events = gemini_plain(answer, model), []
    parts = [{"text": piece} for piece in pieces_of(answer.text)] + gemini_parts(Answer("", answer.tool_calls))
    for number, part in enumerate(parts or [{"text": ""}]):
        candidate: Any = {"content": {"parts": [part], "role": "model"}, "index": 0}
        if number == max(0, len(parts) - 1):
            candidate["finishReason"] = GEMINI_FINISH[answer.finish]
        events.append(("", compact({**plain, "candidates": [candidate]})))
    return events


COHERE_FINISH = {"stop": "COMPLETE", "length": "MAX_TOKENS", "tools": "TOOL_CALL", "filter": "ERROR"}


def cohere_plain(answer: Answer, model: str) -> Any:
    message: dict[str, Any] = {"role": "assistant"}
    if answer.text:
        message["content"] = [{"type": "text", "text": answer.text}]
    if answer.tool_calls:
        message.update(tool_plan="I will ask.", tool_calls=openai_calls(answer))
    tokens = {"input_tokens": float(answer.input_tokens), "output_tokens": float(answer.output_tokens)}
    usage = {"billed_units": {"input_tokens": 1.0, "output_tokens": 1.0}, "tokens": tokens}
    return {"id": "coh-1", "finish_reason": COHERE_FINISH[answer.finish], "message": message, "usage": usage}


def cohere_events(answer: Answer, model: str) -> list[Event]:
    plain = cohere_plain(answer, model)
    empty = {"role": "assistant", "content": [], "tool_plan": "", "tool_calls": [], "citations": []}
    events: list[Any] = [{"type": "message-start", "id": "coh-1", "delta": {"message": empty}}]
    if answer.text:
        start = {"message": {"content": {"type": "text", "text": ""}}}
        events.append({"type": "content-start", "index": 0, "delta": start})
        texts = [{"message": {"content": {"text": piece}}} for piece in pieces_of(answer.text)]
        events += [{"type": "content-delta", "index": 0, "delta": delta} for delta in texts]
        events.append({"type": "content-end", "index": 0})
    for index, call in enumerate(openai_calls(answer)):
        begun = {**call, "function": {**call["function"], "arguments": ""}}
        events.append({"type": "tool-call-start", "index": index, "delta": {"message": {"tool_calls": begun}}})
        for piece in pieces_of(call["function"]["arguments"]):
            delta = {"message": {"tool_calls": {"function": {"arguments": piece}}}}
            events.append({"type": "tool-call-delta", "index": index, "delta": delta})
        events.append({"type": "tool-call-end", "index": index})
    ended = {"finish_reason": plain["finish_reason"], "usage": plain["usage"]}
    events.append({"type": "message-end", "id": "coh-1", "delta": ended})
    return [(event["type"], compact(event)) for event in events]


OLLAMA_FINISH = {"stop": "stop", "length": "length", "tools": "stop", "filter": "stop"}


def ollama_plain(answer: Answer, model: str) -> Any:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if answer.tool_calls:
        message["tool_calls"] = [
            {"function": {"name": name, "arguments": values}} for _, name, values in answer.tool_calls
        ]
    counts = {"prompt_eval_count": answer.input_tokens, "eval_count": answer.output_tokens, "total_duration": 5}
    whole = {"model": model, "created_at": "2026-11-25T00:00:00Z", "message": message, "done": True}
    return {**whole, "done_reason": OLLAMA_FINISH[answer.finish], **counts}


def ollama_events(answer: Answer, model: str) -> list[Event]:
    plain = ollama_plain(answer, model)
    pieces: list[Any] = [{"role": "assistant", "content": piece} for piece in pieces_of(answer.text)]
    pieces += [
        {"role": "assistant", "content": "", "tool_calls": [call]} for call in plain["message"].get("tool_calls", ())
    ]
    begun = {"model": model, "created_at": "2026-11-25T00:00:00Z", "done": False}
    lines = [{**begun, "message": piece} for piece in pieces]
    return [("", compact(line)) for line in [*lines, {**plain, "message": {"role": "assistant", "content": ""}}]]


# ---- embeddings: the vector of a text is its length and its place ---------------------------------------------------


def vectors_of(texts: list[str], size: int) -> list[list[float]]:
    return [[float(len(text)), float(number), *([0.5] * (size - 2))] for number, text in enumerate(texts)]


def openai_embeddings(body: Any) -> Any:
    size = body.get("dimensions") or body.get("output_dimension") or 4
    rows = [
        {"object": "embedding", "index": index, "embedding": row}
        for index, row in enumerate(vectors_of(body["input"], size))
    ]
    usage = {"prompt_tokens": 5, "total_tokens": 5}
    return {"object": "list", "data": rows[::-1], "model": body["model"], "usage": usage}


def voyage_embeddings(body: Any) -> Any:
    return {**openai_embeddings(body), "usage": {"total_tokens": 5}}


def cohere_embeddings(body: Any) -> Any:
    vectors = vectors_of(body["texts"], body.get("output_dimension") or 4)
    meta = {"api_version": {"version": "2"}, "billed_units": {"input_tokens": 5}}
    return {
        "id": "e",
        "embeddings": {"float": vectors},
        "texts": body["texts"],
        "meta": meta,
        "response_type": "embeddings_by_type",
    }


def gemini_embeddings(body: Any) -> Any:
    texts = ["".join(part["text"] for part in request["content"]["parts"]) for request in body["requests"]]
    vectors = vectors_of(texts, body["requests"][0].get("outputDimensionality", 4))
    return {"embeddings": [{"values": vector} for vector in vectors]}


def ollama_embeddings(body: Any) -> Any:
    vectors = vectors_of(body["input"], body.get("dimensions") or 4)
    return {
        "model": body["model"],
        "embeddings": vectors,
        "total_duration": 1,
        "load_duration": 1,
        "prompt_eval_count": 5,
    }


EMBED = {"input": list, "dimensions": int, "encoding_format": str}
VOYAGE = {
    "input": list,
    "input_type": (str, type(None)),
    "output_dimension": int,
    "truncation": bool,
    "encoding_format": str,
    "output_dtype": object,
}


class Route(NamedTuple):
    """One call of one vendor: its method is POST; `header` is (name, what it has to hold)."""

    path: str
    header: tuple[str, str]
    check: Callable[[Any], str | None]
    plain: Callable[..., Any]
    events: Callable[..., list[Event]] | None = None
    stream: str = "sse"


BEARER = ("authorization", f"Bearer {KEY}")
MISTRAL_EMBED = {"input": list, "output_dimension": int, "output_dtype": str, "encoding_format": str}
COHERE_EMBED = {"texts": list, "input_type": str, "embedding_types": list, "output_dimension": int, "truncate": str}
ROUTES: dict[str, tuple[Route, ...]] = {
    "openai": (
        Route(r"/v1/chat/completions", BEARER, check_openai, openai_plain, openai_events),
        Route(r"/v1/responses", BEARER, check_responses, responses_plain, responses_events),
        Route(r"/v1/embeddings", BEARER, check_embeddings(EMBED, ("input",)), openai_embeddings),
    ),
    "azure": (
        Route(
            r"/openai/deployments/[\w.-]+/chat/completions\?api-version=[\w-]+",
            ("api-key", KEY),
            check_openai,
            openai_plain,
            openai_events,
        ),
        Route(r"/openai/v1/chat/completions", ("api-key", KEY), check_openai, openai_plain, openai_events),
        Route(
            r"/openai/responses\?api-version=[\w-]+",
            ("api-key", KEY),
            check_responses,
            responses_plain,
            responses_events,
        ),
        Route(
            r"/openai/(deployments/[\w.-]+|v1)/embeddings(\?api-version=[\w-]+)?",
            ("api-key", KEY),
            check_embeddings(EMBED, ("input",)),
            openai_embeddings,
        ),
    ),
    "openai_compatible": (
        Route(
            r"/v1/chat/completions", BEARER, lambda body: check_chat(body, COMPATIBLE_CHAT), openai_plain, openai_events
        ),
        Route(r"/v1/embeddings", BEARER, check_embeddings(EMBED, ("input",)), openai_embeddings),
    ),
    "mistral": (
        Route(
            r"/v1/chat/completions", BEARER, lambda body: check_chat(body, MISTRAL_CHAT), openai_plain, mistral_events
        ),
        Route(r"/v1/embeddings", BEARER, check_embeddings(MISTRAL_EMBED, ("input",)), openai_embeddings),
    ),
    "cohere": (
        Route(r"/v2/chat", BEARER, lambda body: check_chat(body, COHERE_CHAT), cohere_plain, cohere_events),
        Route(
            r"/v2/embed",
            BEARER,
            check_embeddings(COHERE_EMBED, ("texts", "input_type", "embedding_types")),
            cohere_embeddings,
        ),
    ),
    "ollama": (
        Route(
            r"/api/chat",
            ("content-type", "application/json"),
            lambda body: check_chat(body, OLLAMA_CHAT, True),
            ollama_plain,
            ollama_events,
            "lines",
        ),
        Route(
            r"/api/embed",
            ("content-type", "application/json"),
            check_embeddings({"input": list, "dimensions": int}, ("input",)),
            ollama_embeddings,
        ),
    ),
    "voyage": (Route(r"/v1/embeddings", BEARER, check_embeddings(VOYAGE, ("input",)), voyage_embeddings),),
    "anthropic": (Route(r"/v1/messages", ("x-api-key", KEY), check_anthropic, anthropic_plain, anthropic_events),),
    "gemini": (
        Route(r"/v1(beta)?/models/[\w.-]+:generateContent", ("x-goog-api-key", KEY), check_gemini, gemini_plain),
        Route(
            r"/v1(beta)?/models/[\w.-]+:streamGenerateContent\?alt=sse",
            ("x-goog-api-key", KEY),
            check_gemini,
            gemini_plain,
            gemini_events,
        ),
        Route(
            r"/v1(beta)?/models/[\w.-]+:batchEmbedContents",
            ("x-goog-api-key", KEY),
            lambda body: fields(body, {"requests": list}, ("requests",)),
            gemini_embeddings,
        ),
    ),
}


def error_body(vendor: str, status: int, message: str) -> Any:
    """An error in the words of a vendor."""
    if vendor in ("cohere", "mistral"):
        return {"message": message}
    if vendor == "ollama":
        return {"error": message}
    if vendor == "gemini":
        return {"error": {"code": status, "message": message, "status": "INVALID_ARGUMENT", "details": []}}
    if vendor == "anthropic":
        return {"type": "error", "error": {"type": "invalid_request_error", "message": message}, "request_id": "req_1"}
    if vendor == "voyage":
        return {"detail": message}
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def stream_bytes(events: list[Event], kind: str = "sse", line_end: str = "\n", comments: bool = False) -> bytes:
    """Events as they are on the wire: server-sent events, or lines of JSON."""
    if kind == "lines":
        return "".join(data + line_end for _, data in events).encode()
    note = f": OPENROUTER PROCESSING{line_end}{line_end}" if comments else ""
    named = [
        f"{note}{f'event: {name}{line_end}' if name else ''}data: {data}{line_end}{line_end}" for name, data in events
    ]
    return "".join(named).encode()


class MockVendors:
    """The server. `requests` has what came in; `answer` or `reply` is what goes out. Use as a context."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answer = Answer()
        self.reply: Callable[[Request], Reply | None] | None = None
        self.server = _Server(("127.0.0.1", 0), _handler(self))

    def url(self, vendor: str, suffix: str = "") -> str:
        return f"http://127.0.0.1:{self.server.server_port}/{vendor}{suffix}"

    def always(self, *pieces: bytes, status: int = 200, whole: bool = True, **headers: str) -> None:
        """Every request gets these bytes; header names are written with `_`."""
        named = tuple((name.replace("_", "-"), value) for name, value in headers.items())
        self.reply = lambda request: Reply(status, named, pieces, whole)

    def reset(self) -> None:
        self.requests.clear()
        self.answer, self.reply = Answer(), None

    def respond(self, request: Request) -> Reply:
        raw = self.reply(request) if self.reply else None
        if raw is not None:
            return raw
        routes = [route for route in ROUTES.get(request.vendor, ()) if re.fullmatch(route.path, request.path)]
        if not routes:
            return self.refuse(request, 404, f"no such path {request.path}")
        name, value = routes[0].header
        if request.headers.get(name) != value:
            return self.refuse(request, 401, f"the header {name} is missing or wrong")
        if request.vendor == "anthropic" and request.headers.get("anthropic-version") != "2023-06-01":
            return self.refuse(request, 400, "anthropic-version: header is required")
        fault = routes[0].check(request.body)
        if fault:
            return self.refuse(request, 400, fault)
        return self.serve(request, routes[0])

    def serve(self, request: Request, route: Route) -> Reply:
        body = request.body
        if route.plain.__name__.endswith("_embeddings"):
            return Reply(pieces=(compact(route.plain(body)).encode(),))
        model = str(body.get("model") or request.path.rpartition("/")[2].partition(":")[0])
        if route.events and (body.get("stream", request.vendor in ("ollama", "gemini"))):
            events, kind = (
                route.events(self.answer, model),
                "application/x-ndjson" if route.stream == "lines" else "text/event-stream",
            )
            if (
                request.vendor in ("openai", "azure")
                and not body.get("stream_options")
                and route.events is openai_events
            ):
                events = [event for event in events if '"choices":[],' not in event[1]]
            return Reply(headers=(("content-type", kind),), pieces=(stream_bytes(events, route.stream),), whole=False)
        return Reply(pieces=(compact(route.plain(self.answer, model)).encode(),))

    def refuse(self, request: Request, status: int, message: str) -> Reply:
        return Reply(status, pieces=(compact(error_body(request.vendor, status, message)).encode(),))

    def __enter__(self) -> MockVendors:
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the tests."""


def _handler(vendors: MockVendors) -> Any:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("content-length") or 0))
            vendor, _, path = self.path[1:].partition("/")
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(vendor, f"/{path}", headers, json.loads(raw))
            vendors.requests.append(request)
            reply = vendors.respond(request)
            self.send_response(reply.status)
            for name, value in reply.headers:
                self.send_header(name, value)
            self.send_header(
                "content-length" if reply.whole else "transfer-encoding",
                str(sum(map(len, reply.pieces))) if reply.whole else "chunked",
            )
            self.end_headers()
            for piece in reply.pieces:
                self.wfile.write(piece if reply.whole else b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"" if reply.whole else b"0\r\n\r\n")

        def log_message(self, *_: object) -> None:
            pass

    return Handler
