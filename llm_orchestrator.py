"""Runs workflows of language-model calls, written as a YAML (or JSON) graph of steps. One file, no dependencies.

    name: hello
    steps:
      - id: greet
        type: llm
        provider: openai
        model: gpt-4o-mini
        prompt: "Say hello to {{inputs.name}}"
        output: greeting

    $ python -m llm_orchestrator run hello.yaml --set name=Alice --offline

    workflow = Workflow.from_file("hello.yaml")
    result = WorkflowExecutor(workflow, inputs={"name": "Alice"}).run()
    print(result["greet"].outputs["greeting"])

The rooms of this file, each built on those above it:
 1. this page: names, imports          7. Graph                13. Execution
 2. Errors                             8. Retry                14. Store
 3. YAML and JSON                      9. HTTP                 15. Events, logging, metrics
 4. Templates                         10. Providers            16. Pictures and reports
 5. Conditions                        11. Vector stores        17. Command line
 6. Workflow                          12. Step handlers
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import math
import os
import re
import sys
import threading
import time
from bisect import bisect_right
from collections import ChainMap
from collections.abc import Mapping
from operator import is_
from types import ModuleType

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022
    "AnthropicProvider", "AuthenticationError", "AzureOpenAIProvider", "BadResponseError", "BudgetExceededError",
    "Cassette", "ChromaStore", "CircuitOpenError", "CohereProvider", "CompletionRequest", "CompletionResponse",
    "Condition", "ConditionError", "ContextLengthError", "DagError", "EchoProvider", "EmbeddingRequest",
    "EmbeddingResponse", "ExecutionError", "GeminiProvider", "load_yaml", "LocalVectorStore", "MistralProvider",
    "OllamaProvider", "OpenAICompatibleProvider", "OpenAIProvider", "OrchestratorError", "ParseError", "PineconeStore",
    "Problem", "Provider", "ProviderConnectionError", "ProviderError", "PROVIDERS", "ProviderTimeoutError",
    "QdrantStore", "QuotaExceededError", "RateLimitError", "ResponseCache", "RetryPolicy", "RunResult",
    "RunTimeoutError", "SQLiteStore", "Step", "StepResult", "Store", "Template", "TemplateError", "ValidationError",
    "VECTOR_STORES", "VectorStore", "VoyageProvider", "WeaviateStore", "Workflow", "WorkflowDAG", "WorkflowExecutor",
]

class _OnDemand(ModuleType):
    """A module, or a value of this one, that is made when it is first used: a command that needs little is to start
    fast. From then on its name stands for what was made."""
    __module__ = "types"  # it is nothing of this module's own

    def __init__(self, name: str, make: Callable[[str], Any] = __import__) -> None:
        super().__init__(name)
        self._make = make

    def __getattr__(self, attribute: str) -> Any:
        made = globals()[self.__name__] = self._make(self.__name__)
        return getattr(made, attribute)

TYPE_CHECKING = False  # the name is enough for type checkers, and `typing` is slow to import
if TYPE_CHECKING:
    import argparse
    import asyncio
    import contextvars
    import difflib
    import graphlib
    import hashlib
    import inspect
    import json
    import logging
    import platform
    import queue
    import random
    import signal
    import socket
    import typing
    import uuid
    import zlib
    from collections.abc import AsyncIterator, Awaitable, Callable, Container, Generator, Iterable, Iterator, Sequence
    from typing import Any
else:
    Any = object  # for `dict[str, Any]` as a base class
    for _name in ("argparse", "asyncio", "contextvars", "difflib", "graphlib", "hashlib", "inspect", "json", "logging",
            "platform", "queue", "random", "signal", "socket", "typing", "uuid", "zlib"):
        globals()[_name] = _OnDemand(_name)

# ---------------------------------------------------------------------------------------------------------------------
# 2. Errors
# What goes wrong, as one family: every error says what was wrong, where, and what would be right.
# ---------------------------------------------------------------------------------------------------------------------

class OrchestratorError(Exception):
    """Base of every error that this module raises for bad input, a bad answer or a failed run."""
    message = property(str, doc="The error in one or more lines of text, without the class name.")

class ParseError(OrchestratorError):
    """YAML or JSON text that cannot be read. `line` and `column` count from 1; str() shows the line and a caret."""
    def __init__(self, reason: str, text: str = "", position: int = 0, source: str = "") -> None:
        super().__init__(reason)
        self.reason, self.source, self.position = reason, source, position
        self.line, start = text.count("\n", 0, position) + 1, text.rfind("\n", 0, position) + 1
        self.column, self.source_line = position - start + 1, text[start:].split("\n", 1)[0]

    def __str__(self) -> str:
        start = max(0, self.column - 60)  # of a window of 100 characters
        window = self.source_line[start : start + 100].replace("\t", " ")
        window = "".join(character if character.isprintable() else "?" for character in window)
        caret = f"\n    {window}\n    {' ' * (self.column - 1 - start)}^" if window.strip() else ""
        return f"{self.source or '<text>'}:{self.line}:{self.column}: {self.reason}{caret}"

class TemplateError(OrchestratorError):
    """A template that does not compile, or a value it needs that is missing. `line` and `column` count from 1."""
    def __init__(self, reason: str, source: str = "", position: int = 0) -> None:
        self.reason, self.position, self.line = reason, position, source.count("\n", 0, position) + 1
        self.column = position - source.rfind("\n", 0, position)
        super().__init__(f"{reason} (line {self.line}, column {self.column})" if source else reason)

class ConditionError(TemplateError):
    """A condition that does not parse, or that compares what cannot be compared."""
def _nearest(word: Any, known: Iterable[Any]) -> list[str]:
    """The one of the known words that the word is probably meant to be, if there is one and both are text."""
    words = tuple(one for one in known if isinstance(one, str)) if isinstance(word, str) else ()
    word = str(word)[:100].lower() if words else ""
    if len(words) > 300:  # comparing takes long
        words = tuple(one for one in words if one[:3].lower() == word[:3] or one[-3:].lower() == word[-3:])[:300]
    return _closest(word, words)

@functools.lru_cache(maxsize=1000)
def _closest(word: str, words: tuple[str, ...]) -> list[str]:
    lowered = {one.lower(): one for one in words}
    return [lowered[one] for one in difflib.get_close_matches(word, lowered, n=1)]

def _suggestion(word: Any, known: Iterable[Any]) -> str:
    """`, did you mean 'prompt'?` for the nearest of the known words, or nothing."""
    return "".join(f", did you mean {nearest!r}?" for nearest in _nearest(word, known))

class Problem:
    """One thing that is wrong with a workflow: a message and its place. str() reads `wf.yaml:12:5: message`.

    `path` leads to it from the top of the document (keys and indexes); `line` and `column` count from 1 and are None
    when there is no text. `severity` is "error" or "warning".
    """
    cycle: list[str] | None = None
    custom: tuple[str, str] | None = None  # (argument, name) of what only a run can know
    inside: tuple[str, int] | None = None  # a template and the position in it, for an exact place

    def __init__(self, message: str, path: tuple[Any, ...] = (), line: int | None = None, column: int | None = None,
            source: str = "workflow", severity: str = "error") -> None:
        self.message, self.path, self.line, self.column = message, path, line, column
        self.source, self.severity = source, severity

    def __str__(self) -> str:
        place = f"{self.source}:{self.line}:{self.column}" if self.line else self.source
        return (f"{place}: " if place else "") + ("warning: " if self.severity == "warning" else "") + self.message

    def __repr__(self) -> str:
        return f"Problem({str(self)!r})"

class ValidationError(OrchestratorError):
    """A workflow, its inputs or an argument is wrong. `problems` lists everything that was found, in order."""
    def __init__(self, problems: Iterable[Problem] | str) -> None:
        self.problems = [Problem(problems, source="")] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(map(str, self.problems)))

class DagError(ValidationError):
    """The steps depend on each other in a circle. `cycle` names them: ["a", "b", "a"]."""
    def __init__(self, problems: Iterable[Problem] | str, cycle: list[str]) -> None:
        super().__init__(problems)
        self.cycle = cycle

class ExecutionError(OrchestratorError):
    """A step could not do its work. `step_id` is its full id; `retryable` says whether another attempt may help."""
    def __init__(self, reason: str, step_id: str | None = None, retryable: bool = False) -> None:
        super().__init__(reason)
        self.step_id, self.retryable = step_id, retryable

class RunTimeoutError(OrchestratorError):
    """The whole run took longer than its `timeout_seconds`."""
class ProviderError(OrchestratorError):
    """A call of a provider or another server failed.

    `provider` is its name, `status` the HTTP status or None, `retryable` whether another attempt may help,
    `retry_after` the seconds that the server asks to wait, `request_id` its name for the call. Messages hold no keys.
    """
    _retryable = False

    def __init__(self, reason: str, *, provider: str = "", status: int | None = None, retryable: bool | None = None,
            retry_after: float | None = None, request_id: str | None = None) -> None:
        super().__init__(f"{provider}: {reason}" if provider else reason)
        self.provider, self.status, self.retry_after, self.request_id = provider, status, retry_after, request_id
        self.retryable = self._retryable if retryable is None else retryable

    def _too_long_a_wait(self, limit_seconds: float) -> None:
        """Adds to the message why a retryable error was not retried."""
        asked = f"the server asks to wait {self.retry_after:g} s, longer than max_delay {limit_seconds:g} s"
        self.args = (f"{self}; {asked}",)

class AuthenticationError(ProviderError):
    """The key is missing, wrong, or not allowed to do this (401, 403)."""
class RateLimitError(ProviderError):
    """Too many requests or tokens for the moment (429)."""
    _retryable = True

class QuotaExceededError(ProviderError):
    """No money or quota is left (402, 429 `insufficient_quota`); waiting does not help."""
class ProviderTimeoutError(ProviderError):
    """No answer in time (408, 504, or our own deadline)."""
    _retryable = True

class ProviderConnectionError(ProviderError):
    """The server could not be reached, or the connection was lost before the answer was complete."""
    _retryable = True

class BadResponseError(ProviderError):
    """The server answered something that is no answer. The message shows how it begins."""
class ContextLengthError(ProviderError):
    """The request is longer than what the model can read."""

# ---------------------------------------------------------------------------------------------------------------------
# 3. YAML and JSON: text or bytes come in, plain values go out: dict, list, str, int, float, bool, None.
# Each text is read exactly as YAML 1.2 (core schema) or JSON defines it, or refused with a ParseError at its place,
# in linear time. The reader is a recursive descent over (text, position); regular expressions find where things end.
# Those that not every text needs are compiled when they are used, once: `re` keeps them.
# ---------------------------------------------------------------------------------------------------------------------
_MAX_DEPTH = 100  # collections within collections
_MAX_DIGITS = 3500  # characters of a whole number: int() is quadratic, and str() of newer Pythons refuses 4300 digits
_MAX_KEY = 1024  # characters of a key up to its colon, by the specification
_MAX_EXPANSION = 1_000_000  # nodes reached through aliases; a text counts one more for every 100 characters
_USUAL = bytes(range(32, 127)) + b"\t\n"
_BYTE_ORDER_MARKS = ((b"\xff\xfe\0\0", "utf-32-le"), (b"\0\0\xfe\xff", "utf-32-be"), (b"\xff\xfe", "utf-16-le"),
                     (b"\xfe\xff", "utf-16-be"))
# The expressions repeat character sets and never groups, except over a bounded stretch: a repeated group costs memory
# for each round. The text ends with a newline, so that `text[position + 1]` is there for every character of a line.
_FIRST = r"""[^ \t\n\-?:,\[\]{}#&*!|>'"%@`]"""  # starts a plain scalar wherever it stands
_WORD, _QUOTED = r"([A-Za-z_][\w.-]{0,1000})", r""""([^"\\\n]*)"|'([^'\n]*)'"""
_VALUE = rf"(?:(-?{_FIRST}(?:[^:#\n]*[^:#\n \t])?)|{_QUOTED})(?:[ \t]+#[^\n]*|[ \t]*)\n( *)(?=[^ \t\n#])"
# What nearly all lines are: `key: value` or the `key:` of what follows, and `- value`; in a flow collection: `value` or
# `key: value` before a comma or bracket, or before another collection.
_SIMPLE_ENTRY, _SIMPLE_ITEM = rf"{_WORD}:(?: +{_VALUE}|(?=[ \t\n]))", rf"- +{_VALUE}"
_SIMPLE_FLOW = (rf"""(?:{_WORD}: +|"([^"\\\n]*)" *: *)?(?:(?:(-?{_FIRST}(?:[^:#,\[\]{{}}\n]*[^:#,\[\]{{}}\n \t])?)"""
                rf"|{_QUOTED}) *(?=[,\]}}])|(?=[\[{{]))")
_NEXT_LINE = re.compile(r"(?:#[^\n]*)?\n( *)(?=[^ \t\n#])").match
_BLOCK_PLAIN = re.compile(rf"{_FIRST}|[-?:](?=[^ \t\n])").match
_BLOCK_STOP = re.compile(r"\n|:(?=[ \t\n])|(?<=[ \t])#").search
_FLOW_PLAIN = re.compile(rf"{_FIRST}|[-?:](?=[^ \t\n,\[\]{{}}])").match
_FLOW_STOP = re.compile(r"[\n,\[\]{}]|:(?=[ \t\n,\[\]{}])|(?<=[ \t])#").search
_SIMPLE_KEY = re.compile(rf"{_WORD}:(?=[ \t\n])").match
_KEY = rf"""(?x)(?P<properties>(?:[&!][^ \t\n]*[ \t]+)*)  # any implicit key of a block mapping; over _MAX_KEY at most
    (?:\*[^ \t\n,\[\]{{}}]+(?=[ \t\n]) | "[^"\\\n]*(?:\\.[^"\\\n]*)*" | '[^'\n]*(?:''[^'\n]*)*'
      |(?P<plain>(?:(?:{_FIRST}|[-?:](?=[^ \t\n]))[^:\#\n]*(?:(?::(?=[^ \t\n])|(?<![ \t])\#)[^:\#\n]*)*)?))
    [ \t]*:(?=[ \t\n])"""
_DASH, _QUESTION, _COLON = ("- ", "-\n", "-\t"), ("? ", "?\n", "?\t"), (": ", ":\n", ":\t")
_RUNS: Any = (re.compile(f"[{characters}]*").match for characters in (" ", " \t", " \t\n", " \n"))  # match always
_SPACES, _WHITE, _BLANK, _EMPTY_LINES = _RUNS
# The end of a text in quotes is such a match of odd length: otherwise the quote at its end is escaped.
_CLOSING = {'"': re.compile(r'(?<!\\)\\*"').search, "'": re.compile("'+").search}
_PROPERTY = r"(?:&[^ \t\n,\[\]{}]+|!<[^ \t\n>]*>|![^ \t\n,\[\]{}]*)(?=[ \t\n,\]}])"
_SIMPLE_LITERAL = re.compile(r"\|([-+]?)\n( +)(?=[^ \t\n])").match
_BLOCK_HEADER = re.compile(r"[|>](?:([1-9])?([-+])?|([-+])([1-9]))(?:[ \t]+(?:#[^\n]*)?)?\n").match
_line_below = functools.lru_cache(maxsize=64)(  # finds the break before the first line with content indented by less
    lambda indent: re.compile(rf"\n(?= {{0,{indent - 1}}}[^ \n])").search)
_PROLOGUE = r"(%YAML)[ \t]+1\.[0-9]+(?=[ \t\n])|(%)(?!(?:YAML|TAG)[ \t\n])[^ \t\n][^\n]*|\.\.\.(?=[ \t\n])"
_BREAKS = r"(?<![ \t])[ \t]*\n[ \t\n]*"  # of a text on several lines, with the blanks around them
_ESCAPE = (r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
           r"|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[^\n])")
_ESCAPE_OR_BREAKS = rf"\\\n[ \t\n]*|(?:\\[ \t]|(?<![ \t]))[ \t]*\n[ \t\n]*|{_ESCAPE}"
_ESCAPES = dict(zip('0abtnvfre "/\\N_LP\t', '\0\a\b\t\n\v\f\r\x1b "/\\\x85\xa0\u2028\u2029\t'))
_YAML_WORDS: dict[str, Any] = {word: value for words, value in (
    ("~ null Null NULL", None), ("true True TRUE", True), ("false False FALSE", False), (".nan .NaN .NAN", math.nan),
    (".inf .Inf .INF +.inf +.Inf +.INF", math.inf), ("-.inf -.Inf -.INF", -math.inf)) for word in words.split()}
_YAML_WORDS[""] = None
_NOT_TEXT = frozenset("0123456789+-.~tTfFnN")  # the first characters of all plain scalars that are not text
_YAML_NUMBER = re.compile(
    r"([-+]?[0-9]+)|(0o[0-7]+)|(0x[0-9a-fA-F]+)|[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?").fullmatch
_TAGS = {"!!null": type(None), "!!bool": bool, "!!int": int, "!!float": float, "!!str": str, "!!seq": list,
         "!!map": dict, "!": object}  # "!" is the tag of what is not resolved, whatever its kind
_COMPLEX_KEY = "a key that is a list or a mapping is not supported"
_MERGE = object()  # stands for the key `<<` while its mapping is read

def load_yaml(text: str | bytes) -> Any:
    """The value of a YAML 1.2 document (core schema); None for an empty one. JSON text is YAML too.

    Bytes are UTF-8, or UTF-16 or UTF-32 with a byte order mark. Raises ParseError for all but exactly one document, and
    for other tags, %TAG, complex and duplicate keys, tabs that indent block lines, nesting deeper than 100, whole
    numbers of more than 3500 digits, and aliases that expand to more than a million nodes.
    """
    text = _decoded(text)
    try:
        return _YamlReader(text).document()
    except RecursionError:
        raise ParseError("nested too deeply for the stack that is left", text) from None

def _load_json(text: str | bytes) -> Any:
    """The value of a JSON text (RFC 8259) under the limits of `load_yaml`; raises ParseError."""
    text = _decoded(text)
    try:
        if "NaN" in text or "Infinity" in text:  # which the module takes for numbers
            json.loads(text.replace("NaN", "N_N").replace("Infinity", "I_finity"))
        value = _JSON_DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text or (text.count("[") + text.count("{") > _MAX_DEPTH and _too_deep(value)):
            load_yaml(text)  # refuses halves of surrogate pairs
    except json.JSONDecodeError as error:
        raise ParseError(f"not JSON: {error.msg}", text, error.pos) from None
    except (ValueError, RecursionError) as error:
        load_yaml(text)  # JSON is YAML, and the YAML reader knows the place
        raise ParseError(str(error), text) from None
    return value

def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(mapping := dict(pairs)) < len(pairs):
        raise ValueError("duplicate key")
    return mapping

def _json_integer(raw: str) -> Any:
    return int(raw) if len(raw) < 20 else _resolved(raw)

_JSON_DECODER: Any = _OnDemand(
    "_JSON_DECODER", lambda _: json.JSONDecoder(object_pairs_hook=_unique_keys, parse_int=_json_integer))

def _too_deep(value: Any) -> bool:
    level: list[Any] = [[value]]
    for _ in range(_MAX_DEPTH + 1):
        children = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in children if isinstance(child, (dict, list))]
        if not level:
            return False
    return True

def _positions(text: str) -> dict[tuple[str | int, ...], tuple[int, int]]:
    """The (line, column), from 1, of each key and item of YAML or JSON text, by path such as ("steps", 1, "prompt").
    Never raises: where the text cannot be read, it has the places up to there.
    """
    marks: dict[tuple[str | int, ...], int] = {}
    with contextlib.suppress(ParseError, RecursionError):
        text = _decoded(text)
        _YamlReader(text, marks).document()
    starts = [0, *(newline.end() for newline in re.finditer("\n", text))]
    lines = {path: bisect_right(starts, position) for path, position in marks.items()}
    return {path: (line, marks[path] - starts[line - 1] + 1) for path, line in lines.items()}

def _decoded(text: str | bytes) -> str:
    """The text without a byte order mark and with "\\n" line ends; refuses what neither YAML nor JSON may hold."""
    if isinstance(text, (bytes, bytearray, memoryview)):
        raw = bytes(text)
        if not raw.translate(None, _USUAL):
            return raw.decode("ascii")
        codec = next((name for mark, name in _BYTE_ORDER_MARKS if raw.startswith(mark)), "utf-8")
        try:
            text = raw.decode(codec)
        except UnicodeDecodeError as error:
            before = raw[: error.start].decode(codec, "replace")
            raise ParseError(f"not {codec.upper()} text: byte 0x{raw[error.start]:02x}", before, len(before)) from None
    elif not isinstance(text, str):
        raise ParseError(f"expected text, not {type(text).__name__}")
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    usual = text.isascii() and not text.encode().translate(None, _USUAL)
    if not usual and (control := re.search("[\0-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]", text)):
        raise ParseError(f"the character U+{ord(control[0]):04X} is not allowed in text", text, control.start())
    return text

def _resolved(raw: str) -> Any:
    """The value of a plain scalar by the core schema. Raises ValueError for a number that is too long."""
    if raw in _YAML_WORDS:
        return _YAML_WORDS[raw]
    number = _YAML_NUMBER(raw)
    if not number or not number.lastindex:
        return float(raw) if number else raw
    if len(raw) > _MAX_DIGITS:
        raise ValueError(f"a whole number of more than {_MAX_DIGITS} digits")
    return int(raw, (10, 8, 16)[number.lastindex - 1])

class _YamlReader:
    """Reads one document. Methods take a position and return the value there and the position behind it.

    Block methods return the position of the next content, which is the first of its line; `indent` is then the number
    of spaces before it, -1 at the end of the text. An anchor is a list to which the value is added when it is complete.
    """
    def __init__(self, text: str, marks: dict[tuple[str | int, ...], int] | None = None) -> None:
        self.source, self.padded = text, not text.endswith("\n")
        self.text = text + "\n" if self.padded else text
        self.indent = self.expansion = 0
        self.anchors: dict[str, list[Any]] = {}
        self.marks = marks
        self.path: tuple[str | int, ...] = ()  # of the last key or item, if marks are kept
        self.parents: list[tuple[str | int, ...]] = []  # the path of each open collection
        odd = "" if text.isascii() and "\x7f" not in text else "[\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]"
        self.odd = {match.start() for match in re.finditer(odd, text)} if odd else set()  # allowed in quotes only
        # The expressions for simple lines know nothing of marks and odd characters.
        simple = (_SIMPLE_ENTRY, _SIMPLE_ITEM, _SIMPLE_FLOW) if marks is None and not self.odd else ("(?!)",) * 3
        self.simple_entry, self.simple_item, self.simple_flow = (re.compile(pattern).match for pattern in simple)

    def error(self, reason: str, position: int) -> ParseError:
        return ParseError(reason, self.source, min(position, len(self.source)))

    def refuse_if(self, wrong: Any, reason: str, position: int) -> None:
        if wrong:
            raise self.error(reason, position)

    def document(self) -> Any:
        """The value of the only document in the text."""
        text, position = self.text, self.next_line(0, -1)
        directives: set[str] = set()
        while self.indent == 0 and (line := re.compile(_PROLOGUE).match(text, position)):
            directive = line[1] or line[2]
            if line[1] in directives or (directives and not directive):
                break
            directives |= {directive} if directive else set()
            position = self.rest_of_line(line.end())
        start = self.indent == 0 and text.startswith(("--- ", "---\n", "---\t"), position)
        if not start and (directives or text.startswith("%", position)):
            raise self.error("only %YAML 1.x may stand here, once, with a '---' line below it", position)
        begin, column = (position + 3, -1) if start else (position - max(self.indent, 0), 0)
        if end := re.compile(r"\n(?:---|\.\.\.)(?=[ \t\n])").search(text, begin):
            position, self.indent = end.start() + 1, 0
            while self.indent == 0 and text.startswith("...", position):
                position = self.rest_of_line(position + 3)
            self.refuse_if(self.indent >= 0, "several documents in one text are not supported", position)
            self.text, self.padded = text[: end.start() + 1], False
        value, position = self.block_node(begin, -1, column)
        self.refuse_if(self.indent >= 0, "the document ends before this", position)
        if self.odd:
            raise self.error(f"the character U+{ord(text[min(self.odd)]):04X} needs quotes", min(self.odd))
        return value

    # Lines and white space
    def rest_of_line(self, position: int) -> int:
        """The position of the next content; refuses anything but a comment in the rest of this line."""
        text, end = self.text, _WHITE(self.text, position).end()
        if text[end] != "\n" and (text[end] != "#" or text[end - 1] not in " \t"):
            hint = "'key: value' cannot stand here: it needs a line of its own, or quotes if it is text"
            raise self.error(hint if text[end] == ":" else "unexpected text", end)
        return self.next_line(end)

    def next_line(self, position: int, parent: int = _MAX_KEY) -> int:
        """The position of the next content; sets `indent`. Tabs before it stand behind more spaces than `parent`."""
        text = self.text
        if simple := _NEXT_LINE(text, position):
            self.indent = len(simple[1])
            return simple.end()
        position = _BLANK(text, position).end()
        while text.startswith("#", position):
            position = _BLANK(text, text.find("\n", position)).end()
        start = text.rfind("\n", 0, position) + 1
        self.indent = position - start if position < len(text) else -1
        tab = text.find("\t", start, position)
        if 0 <= tab <= start + parent and self.indent >= 0:
            raise self.error("a tab cannot indent this line", position)
        return position

    def space(self, position: int, indent: int) -> int:
        """The position of the next content in a flow collection, whose lines are indented by `indent` or more."""
        text, start = self.text, position
        position = _BLANK(text, position).end()
        while text.startswith("#", position) and text[position - 1] in " \t\n":
            position = _BLANK(text, text.find("\n", position)).end()
        if position == len(text):
            raise self.error("a '[' or '{' is not closed", start)
        if indent and (line := text.rfind("\n", start, position) + 1):
            spaces = _SPACES(text, line).end() - line
            # The one liberty taken, as by all common loaders: a closing bracket may be indented like its parent.
            if spaces < indent and not (text[position] in "]}" and spaces == indent - 1 == position - line):
                raise self.error("this line needs more indentation than the parent of its '[' or '{'", position)
        return position

    # Collections
    def enter(self, kind: type, tag: str | None, position: int) -> None:
        """Counts a collection that starts; `parents.pop()` ends it."""
        self.parents.append(self.path)
        if len(self.parents) > _MAX_DEPTH:
            raise self.error(f"nesting deeper than {_MAX_DEPTH}", position)
        self.check_tag(kind, tag, position)

    def check_tag(self, kind: type, tag: str | None, position: int) -> None:
        if tag and _TAGS[tag] not in (object, kind):
            raise self.error(f"this is no value for the tag {tag}", position)

    def mark(self, key: Any, position: int) -> None:
        """Notes where a key or an item of the innermost collection is, if that was asked for."""
        if self.marks is not None:
            self.path = (*self.parents[-1], key)
            self.marks[self.path] = position

    def block_node(self, position: int, parent: int, column: int, hanging: bool = False, tag: str | None = None,
                   anchor: list[Any] | None = None) -> tuple[Any, int]:
        """The node behind an indicator or properties, in a collection indented by `parent`. A collection may start on
        this line if `column`, the position's own, is not -1; a list below may be indented like its parent if `hanging`.
        """
        text, start = self.text, position
        position = _WHITE(text, position).end()
        if text[position : position + 1] in "\n#":
            position = self.next_line(position, parent)
            if self.indent <= parent and not (hanging and self.indent == parent and text.startswith(_DASH, position)):
                return self.scalar("", True, tag, anchor, start), position
            start, column = position - self.indent, 0
        if column >= 0:
            column = -1 if "\t" in text[start:position] else column + position - start
        first = text[position]
        indicator = first in "-?:" and text[position + 1] in " \t\n"
        if indicator and column < 0:
            raise self.error(f"'{first}' cannot start a list or mapping here", position)
        if indicator or (column >= 0 and first not in "[{|>" and (_SIMPLE_KEY(text, position) or self.key(position))):
            sequence = indicator and first == "-"
            self.enter(list if sequence else dict, tag, position)
            value: Any
            value, position = (self.block_sequence if sequence else self.block_mapping)(position, column)
            self.parents.pop()
            if self.indent > column:
                raise self.error("more indentation than the lines above have", position)
            return self.anchored(value, anchor), position
        if first in "&!":
            tag, anchor, position = self.properties(position, tag, anchor)
            return self.block_node(position, parent, -1, hanging, tag, anchor)
        if first in "|>":
            value, end = self.block_scalar(position, parent)
            return value if tag is None and anchor is None else self.scalar(value, False, tag, anchor, position), end
        value, end, _ = self.flow_node(position, parent + 1, False, tag, anchor)
        if isinstance(value, (dict, list)) and text.startswith(":", _WHITE(text, end).end()):
            raise self.error(_COMPLEX_KEY, position)
        return value, self.rest_of_line(end)

    def key(self, position: int) -> re.Match[str] | None:
        return re.compile(_KEY).match(self.text, position, position + _MAX_KEY + 2)

    def block_sequence(self, position: int, indent: int) -> tuple[list[Any], int]:
        """A block list whose dashes are at column `indent`."""
        text, self.indent = self.text, indent
        result: list[Any] = []
        while self.indent == indent and text.startswith(_DASH, position):
            item = self.simple_item(text, position)
            if item and len(item[4]) <= indent:
                result.append(self.simple(item, 1))
                position, self.indent = item.end(), len(item[4])
            else:
                self.mark(len(result), position)
                value, position = self.block_node(position + 1, indent, indent + 1)
                result.append(value)
        return result, position

    def block_mapping(self, position: int, indent: int) -> tuple[dict[Any, Any], int]:
        """A block mapping whose keys are at column `indent`."""
        text, simple_entry, self.indent = self.text, self.simple_entry, indent
        result: dict[Any, Any] = {}
        while self.indent == indent:
            entry = simple_entry(text, position)
            key, plain, _, _, spaces = entry.groups() if entry else (None,) * 5
            if key in _YAML_WORDS:
                key = _YAML_WORDS[key]
            if not entry or key in result:
                position = self.block_entry(position, indent, result)
            elif spaces is None or len(spaces) > indent:
                result[key], position = self.block_node(entry.end(1) + 1, indent, -1, True)
            else:
                result[key] = plain if plain and plain[0] not in _NOT_TEXT else self.simple(entry, 2)
                position, self.indent = entry.end(), len(spaces)
        return self.merged(result), position

    def simple(self, match: re.Match[str], group: int) -> Any:
        """The value of the scalar in three groups: plain, in double quotes, in single quotes."""
        if (plain := match[group]) is None:
            return match[group + 2] if match[group + 1] is None else match[group + 1]
        return self.scalar(plain, True, None, None, match.start(group))

    def block_entry(self, position: int, indent: int, result: dict[Any, Any]) -> int:
        """Reads one entry of a block mapping, of any kind, into `result`."""
        text, start, value = self.text, position, None
        if explicit := text.startswith(_QUESTION, position):
            content = _WHITE(text, position + 1).end()
            key, position = self.block_node(position + 1, indent, indent + 1, True)
        else:
            if not (match := self.key(position)):
                raise self.error("expected 'key: value' here", position)
            position = match.end()
            tag, anchor, content = self.properties(start, None, None)
            self.refuse_if(content != match.end("properties"), "unexpected text behind an anchor or a tag", content)
            if match["plain"] is None:
                key = self.flow_node(content, 0, False, tag, anchor)[0]
            else:
                key = self.scalar(match["plain"].rstrip(" \t"), True, tag, anchor, content)
        key = self.checked_key(key, result, start, content)
        if not explicit:
            value, position = self.block_node(position, indent, -1, True)
        elif self.indent == indent and text.startswith(_COLON, position):
            value, position = self.block_node(position + 1, indent, indent + 1, True)
        result[key] = value if key is not _MERGE else (value, start)
        return position

    def flow_node(self, position: int, indent: int, flow: bool = True, tag: str | None = None,
                  anchor: list[Any] | None = None) -> tuple[Any, int, int]:
        """A scalar, an alias or a flow collection, on lines indented by `indent` or more, and where its content starts.
        In a flow collection (`flow`) it may have properties, and the position is that of the next content.
        """
        text = self.text
        while flow and text[position] in "&!":
            tag, anchor, position = self.properties(position, tag, anchor)
            position = self.space(position, indent)
        first, start = text[position], position
        if first == "*":
            self.refuse_if(tag or anchor is not None, "an alias with an anchor or a tag", position)
            value, position = self.alias(position)
        elif first in "[{":
            value, position = self.flow_collection(position, indent, tag)
            self.anchored(value, anchor)
        else:
            if quoted := first in "\"'":
                value, position = self.quoted(position, indent)
            elif (_FLOW_PLAIN if flow else _BLOCK_PLAIN)(text, position):
                value, position = self.plain(position, indent, _FLOW_STOP if flow else _BLOCK_STOP)
            elif flow and first in ",]}:" and (tag or anchor is not None):
                value = ""
            else:
                raise self.error(f"'{first}' cannot start a value: put text into quotes", position)
            value = self.scalar(value, not quoted, tag, anchor, start)
        return value, self.space(position, indent) if flow else position, start

    def flow_collection(self, position: int, indent: int, tag: str | None) -> tuple[dict[Any, Any] | list[Any], int]:
        """A list in brackets or a mapping in braces."""
        text, simple_flow, pairs = self.text, self.simple_flow, self.text[position] == "{"
        result: Any
        close, result = ("}", {}) if pairs else ("]", [])
        self.enter(type(result), tag, position)
        while text[position] != close:
            start = position = position + 1
            if text[start] in " \t\n#":
                start = position = self.space(start, indent)
            if text[start] == close:
                break
            entry = simple_flow(text, start)
            word, quoted, plain, _, _ = entry.groups() if entry else (None,) * 5
            key = quoted if word is None else _YAML_WORDS.get(word, word)
            if not entry or pairs is (word is None and quoted is None) or (pairs and key in result):
                position = self.flow_entry(start, indent, result)
            else:
                position = entry.end()
                if plain and plain[0] not in _NOT_TEXT:
                    value = plain
                elif text[position] in "[{":
                    value, position, _ = self.flow_node(position, indent)
                else:
                    value = self.simple(entry, 3)
                if pairs:
                    result[key] = value
                else:
                    result.append(value)
            if text[position] not in ("," + close):
                raise self.error(f"expected ',' or '{close}'" if text[position] != ":" else _COMPLEX_KEY, position)
        self.parents.pop()
        return self.merged(result) if pairs else result, position + 1

    def flow_entry(self, start: int, indent: int, result: Any) -> int:
        """Reads one entry of any kind into the result; a pair in a list is a mapping of its own."""
        text, key, value, explicit = self.text, None, None, self.text.startswith(_QUESTION, start)
        mapping = result if isinstance(result, dict) else {}
        if mapping is not result:
            self.mark(len(result), start)
        position = content = self.space(start + 1, indent) if explicit else start
        if not (explicit and text[position] in ",]}") and (text[position] != ":" or _FLOW_PLAIN(text, position)):
            key, position, content = self.flow_node(position, indent)
        if mapping is not result:
            if not explicit and text[position] != ":":
                result.append(key)
                return position
            if not explicit and (position - start > _MAX_KEY or "\n" in text[start:position]):
                raise self.error(f"such a key stands on one line with its ':', within {_MAX_KEY} characters", position)
            self.enter(dict, None, start)
        key = self.checked_key(key, mapping, start, content)
        if text[position] == ":":
            colon, position = position, self.space(position + 1, indent)
            if text[position] not in ",]}":
                unspaced = position == colon + 1 and text[content] not in "\"'"
                self.refuse_if(unspaced, "expected white space behind ':'", position)
                value, position, _ = self.flow_node(position, indent)
        mapping[key] = value if key is not _MERGE else (value, start)
        if mapping is not result:
            self.parents.pop()
            result.append(self.merged(mapping))
        return position

    def checked_key(self, key: Any, result: dict[Any, Any], start: int, content: int) -> Any:
        """The key, marked, or _MERGE for a plain `<<`; refuses collections and duplicates."""
        text, explicit = self.text, self.text.startswith(_QUESTION, start)
        self.refuse_if(isinstance(key, (dict, list)), _COMPLEX_KEY, start)
        written = key
        if key == "<<" and text[content] not in "\"'":
            if not text.startswith("<<", content) or (content > start and not explicit):
                raise self.error("a merge key (<<) has no anchor, tag or alias", start)
            key = _MERGE
        if key in result:
            raise self.error(f"duplicate key {'<<' if key is _MERGE else key!r}"[:200], start)
        self.mark(written, content if explicit else start)
        return key

    def merged(self, result: dict[Any, Any]) -> dict[Any, Any]:
        """The mapping with its merge key, if any, carried out: its own entries win, then those of earlier sources."""
        if _MERGE not in result:
            return result
        value, position = result.pop(_MERGE)
        sources = [result, *value] if isinstance(value, list) else [result, value]
        unfit = not all(isinstance(source, dict) for source in sources)
        self.refuse_if(unfit, "a merge key (<<) needs a mapping or a list of mappings", position)
        joined = {key: value for source in reversed(sources) for key, value in source.items()}
        if len({(type(key), key) for source in sources for key in source}) > len(joined):
            raise self.error("merged keys that differ in YAML, but not in Python, such as 1 and true", position)
        return joined

    # Scalars
    def scalar(self, raw: str, plain: bool, tag: str | None, anchor: list[Any] | None, position: int) -> Any:
        """The value of a scalar, by its properties."""
        value: Any = raw
        if tag not in (None, "!!str", "!") or (plain and not tag and (not raw or raw[0] in _NOT_TEXT)):
            try:
                value = _resolved(raw)
            except ValueError as error:
                raise self.error(str(error), position) from None
            if tag == "!!float" and type(value) is int and raw[:2] not in ("0o", "0x"):
                value = float(raw)
            self.check_tag(type(value), tag, position)
        return self.anchored(value, anchor)

    def plain(self, position: int, indent: int, find_stop: Callable[[str, int], Any]) -> tuple[str, int]:
        text, end = self.text, find_stop(self.text, position).start()
        while text[end] == "\n":
            start = _BLANK(text, end).end()
            line = text.rfind("\n", end, start) + 1
            if start == len(text) or text[start] == "#" or _SPACES(text, line).end() - line < indent:
                break
            stop = find_stop(text, start).start()
            if stop == start or _short_line(text[end:line], indent):
                break
            end = stop
        return _folded(text[position:end].rstrip(" \t\n")), end

    def quoted(self, position: int, indent: int) -> tuple[str, int]:
        text, quote, start = self.text, self.text[position], position + 1
        closing = _CLOSING[quote](text, start)
        while closing and len(closing[0]) % 2 == 0:
            closing = _CLOSING[quote](text, closing.end())
        if not closing:
            raise self.error(f"the quote {quote} is not closed", position)
        end = closing.end() - 1
        raw = text[start:end]
        if self.odd:
            self.odd.difference_update(range(start, end))
        if "\n" in raw and _short_line(raw[raw.find("\n") :] + quote, indent):
            raise self.error("a line of this quoted text needs more indentation than its parent", position)
        if quote == "'":
            return _folded(raw).replace("''", "'"), end + 1
        if "\\" in raw or "\n" in raw:
            pattern = _ESCAPE_OR_BREAKS if "\n" in raw else _ESCAPE
            raw = re.sub(pattern, functools.partial(self.unescaped, start), raw)
        return raw, end + 1

    def unescaped(self, start: int, escape: re.Match[str]) -> str:
        """The text for an escape in double quotes, or for line breaks, one of which may be escaped."""
        written = escape[0]
        if written[0] == "\\" and (character := _ESCAPES.get(written[1:])):
            return character
        if breaks := written.count("\n"):
            kept = written[1:2].strip("\n") if written[0] == "\\" else ""
            return kept + ("\n" * (breaks - 1) or ("" if written.startswith("\\\n") else " "))
        code = int(written[2:].replace("\\u", "") or "D800", 16)
        if len(written) == 12:  # a surrogate pair
            code = 0x10000 + ((code >> 16 & 0x3FF) << 10) + (code & 0x3FF)
        if code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF:
            return chr(code)
        reason = "is not a character" if written[2:] else "is not an escape that YAML has; a backslash itself is \\\\"
        raise self.error(f"{written} {reason}", start + escape.start())

    def block_scalar(self, position: int, parent: int) -> tuple[str, int]:
        """A literal (|) or folded (>) scalar in a collection that is indented by `parent`."""
        text, simple = self.text, _SIMPLE_LITERAL(self.text, position)
        if simple and (indent := len(simple[2])) > parent:
            chomping, start, end = simple[1], simple.start(2), 0
        else:
            chomping, start, indent, end = self.block_header(position, parent)
        if not end:
            below = _line_below(indent)(text, start - 1) if indent else None
            end = below.start() + 1 if below else len(text)
        self.refuse_if(text.startswith("\t", _SPACES(text, end).end()), "a tab cannot indent this line", end)
        content = text[start - 1 : end]
        if " \n" in content:  # perhaps a blank line of less indentation
            content = "\n".join([line[indent:] for line in content.split("\n")])[1:]
        else:
            content = content.replace("\n" + " " * indent, "\n")[1:]
        if self.padded and start < end == len(text):
            content, last = content[:-1], content[content.rfind("\n", 0, -1) + 1 : -1]
            open_ended = not last.strip(" ") and (chomping == "+" or (last and not chomping))
            self.refuse_if(open_ended, "the last line of this text is blank, but not ended", end)
        body = content.rstrip("\n")
        ending = content[len(body) :] if chomping == "+" else content[len(body) :][: bool(body and not chomping)]
        if text[position] == ">":  # as in quotes, but line breaks next to a line that starts with a blank stay
            pattern = r"(?m)^([^ \t\n].*)(\n+)(?=[^ \t\n])"
            body = re.sub(pattern, lambda match: match[1] + (match[2][1:] or " "), body)
        return body + ending, self.next_line(end - 1)

    def block_header(self, position: int, parent: int) -> tuple[str | None, int, int, int]:
        """(chomping, start, indentation, end) of the text below the header of a block scalar; the end is 0 if lines of
        less indentation are what ends it."""
        text, header = self.text, _BLOCK_HEADER(self.text, position)
        digit = (header[1] or header[4]) if header else None
        if not header or (digit and parent < 0):
            raise self.error(f"expected a line end and indented lines of text behind '{text[position]}'", position)
        start = header.end()
        first = _EMPTY_LINES(text, start).end()
        line = text.rfind("\n", 0, first) + 1  # the first with content
        indent, end = parent + int(digit) if digit else first - line, 0
        if not digit and (indent <= parent or first == len(text)):
            end = line if first < len(text) else first
            indent = end - start  # nothing but blank lines, none of them longer
        elif not digit and " " * (indent + 1) in text[start:line]:
            raise self.error("a blank line above this text has more spaces than the text", first)
        return header[2] or header[3], start, indent, end

    # Properties and aliases
    def properties(self, position: int, tag: str | None, anchor: list[Any] | None) -> tuple[Any, Any, int]:
        """The tag and the anchor on this line, added to those given; the position is that of the next content."""
        text = self.text
        while text[position] in "&!":
            match = re.compile(_PROPERTY).match(text, position)
            if not match or (tag if text[position] == "!" else anchor is not None):
                reason = "a second anchor or tag for one value" if match else "not an anchor or a tag"
                raise self.error(reason, position)
            if match[0][0] == "&":
                anchor = self.anchors[match[0][1:]] = []
            elif (tag := match[0]) not in _TAGS:
                raise self.error(f"the tag {tag[:80]} is not supported", position)
            position = _WHITE(text, match.end()).end()
        return tag, anchor, position

    def alias(self, position: int) -> tuple[Any, int]:
        match = re.compile(r"\*([^ \t\n,\[\]{}]+)").match(self.text, position)
        anchor = self.anchors.get(match[1]) if match else None
        if not match or not anchor:
            raise self.error("an alias without a complete value with that anchor before it", position)
        pending = [(anchor[0], len(self.parents))]
        while pending:  # counts the nodes that the alias stands for
            value, depth = pending.pop()
            self.expansion += 1 + (len(value) // 100 if isinstance(value, str) else 0)
            collection = isinstance(value, (dict, list))
            if self.expansion > _MAX_EXPANSION or depth + collection > _MAX_DEPTH:
                raise self.error("an alias that nests too deeply, or expands to too many nodes", position)
            if collection:
                pending += [(child, depth + 1) for child in value]
                pending += [(child, depth + 1) for child in value.values()] if isinstance(value, dict) else []
        return anchor[0], match.end()

    def anchored(self, value: Any, anchor: list[Any] | None) -> Any:
        if anchor is not None:
            anchor.append(value)
        return value

def _short_line(text: str, indent: int) -> bool:
    """Whether a line below the first, blank or not, has something other than spaces before column `indent`."""
    return indent > 0 and any(len(line) > _SPACES(line).end() < indent for line in text.split("\n")[1:])

def _folded(text: str) -> str:
    """A text on several lines as one: a line break is a space, more are one less."""
    return re.sub(_BREAKS, lambda breaks: "\n" * (breaks[0].count("\n") - 1) or " ", text) if "\n" in text else text

def _dump_yaml(value: Any) -> str:
    """The value as a YAML document in block style that `load_yaml` reads back as the same value; for dict, list, tuple,
    str, int, float, bool and None, nested up to 100 deep. Raises OrchestratorError for others.
    """
    try:
        return _yaml_node(value, 0, 0) + "\n"
    except RecursionError:
        raise OrchestratorError("nested too deeply for the stack that is left") from None

def _yaml_node(value: Any, column: int, depth: int) -> str:
    """The node for a place at that column; its lines below the first are indented to it."""
    if isinstance(value, (dict, list, tuple)):
        if depth >= _MAX_DEPTH:
            raise OrchestratorError(f"cannot write YAML that nests deeper than {_MAX_DEPTH}")
        line = "\n" + " " * column
        if isinstance(value, dict):
            return line.join([_yaml_entry(key, child, column, depth) for key, child in value.items()]) or "{}"
        return line.join(["- " + _yaml_node(child, column + 2, depth + 1) for child in value]) or "[]"
    literal = "[^\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]*"
    if isinstance(value, str) and "\n" in value and value.strip(" \t\n") and re.fullmatch(literal, value):
        indicator = "2" if value.lstrip("\n")[0] in " \t" else ""
        if column or not indicator:
            body, pad = value.rstrip("\n"), "\n" + " " * (column or 2)
            chomping = "-" if body == value else "" if len(value) == len(body) + 1 else "+"
            lines = value.split("\n") if body == value else value[:-1].split("\n")
            return f"|{indicator}{chomping}" + "".join(pad + text if text else "\n" for text in lines)
    return _yaml_scalar(value)

def _yaml_entry(key: Any, value: Any, column: int, depth: int) -> str:
    written = _yaml_scalar(key)
    if len(written) > _MAX_KEY:
        written = f"? {written}\n{' ' * column}"
    gap = "\n" + " " * (column + 2) if isinstance(value, (dict, list, tuple)) and value else " "
    return f"{written}:{gap}{_yaml_node(value, column + 2, depth + 1)}"

def _yaml_scalar(value: Any) -> str:
    """A scalar on one line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        no_word = r"(?!(?i:y|n|yes|no|on|off|true|false|null)$)"
        if re.fullmatch(no_word + r"(?:[^\W\d]|/)([\w ,./()=+-]*[\w./()])?", value):
            return value  # what every YAML 1.1 and 1.2 loader reads as the same text
        if re.search("[\ud800-\udfff]", value):
            raise OrchestratorError("cannot write half of a surrogate pair as YAML")
        written = json.dumps(value, ensure_ascii=False)
        return re.sub("[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]", lambda odd: f"\\u{ord(odd[0]):04x}", written)
    if isinstance(value, int) and abs(value) < 10 ** (_MAX_DIGITS - 1):
        return int.__repr__(value)
    if isinstance(value, float):
        written = float.__repr__(value).replace("inf", ".inf").replace("nan", ".nan")
        return written if "." in written else written.replace("e", ".0e")
    raise OrchestratorError(f"cannot write a {type(value).__name__} as YAML")

def _to_json(value: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """A value as JSON text; numbers that JSON lacks (nan, inf) are null, as in JavaScript."""
    write = functools.partial(json.dumps, ensure_ascii=False, allow_nan=False, indent=indent, sort_keys=sort_keys,
                              separators=(",", ":" if indent is None else ": "))
    try:
        return write(value)
    except ValueError:
        return write(_finite(value))

def _finite(value: Any) -> Any:
    """The value with null in place of nan and inf."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value

# ---------------------------------------------------------------------------------------------------------------------
# 4. Templates: text -> compiled closures -> text or a value. Handlebars without HTML escaping, in two spellings, {{x}}
# and <<x>>. The source is scanned into texts and tags, the lines of stand-alone tags are taken out, each tag becomes
# a closure `read(this, frame)`. Linear in the source; paths reach keys and indexes only; no value is rendered again.
# ---------------------------------------------------------------------------------------------------------------------

if TYPE_CHECKING:
    _Frame = dict[str, Any]  # what a tag sees besides `this`, see Template._run
    _Read = Callable[[Any, Any], Any]  # (this, frame) -> value
    _Expression = tuple[str, Any, str, int]  # kind ("literal", "path", "call"), content, text, position
    _Helpers = Mapping[str, Callable[..., Any]]
    Reference = tuple[tuple[str, ...], bool, int]  # segments, required, position

_MAX_NESTING, _MAX_ITEMS, _MAX_ARGUMENTS = 100, 400_000, 1000  # of blocks and calls; texts and tags; in a tag
_NAME = r"""[^\s!"#%-,./;->@\[-^`{-~]+"""
_STEP = rf"(?:{_NAME}|\[[^\]\\]*(?:\\\]?[^\]\\]*)*\])"
_PATH = rf"@?(?:(?:\.\.?/)*{_STEP}(?:[./]{_STEP}|\[\d+\])*|\.\.?(?:/\.\.?)*)"
_QUOTED_TEXT = r""""[^"\\]*(?:\\"?[^"\\]*)*"|'[^'\\]*(?:\\'?[^'\\]*)*'"""
_TOKEN: Any = _OnDemand("_TOKEN", lambda _: re.compile(
    rf"\s*(?:(?P<text>{_QUOTED_TEXT})|(?P<mark>[()|])|(?P<path>(?=[^\s=~}})|>]){_PATH}(?=[\s=~}})|>]|\Z)))"))
_STEPS: Any = _OnDemand("_STEPS", lambda _: re.compile(rf"\.\.?(?=/|\Z)|{_STEP}"))
_WORDS = r"((?!(?:else|as|this|true|false|null|undefined)\b)@?[A-Za-z_][\w-]*(?:\.(?!this\b)[\w-]+)*)"
_SIMPLE_TAG: Any = _OnDemand(
    "_SIMPLE_TAG", lambda _: re.compile(rf"(?:\{{\{{|(<<))([#/]?) ?{_WORDS}(?: {_WORDS})? ?(?(1)>>|\}}\}}(?!\}}))"))
_OPENER, _LITERAL_NUMBER = re.compile(r"\{\{|<<(?=(?:[^<\n]|<(?!<))*>>)"), re.compile(r"-?[0-9]{1,4000}(\.[0-9]+)?")
_TAG = re.compile(r"(\{\{|<<)(~?)(#>|#\*|[#/^>&*!{<])?")
_TAG_ENDS = {"{{": r"\s*(?:\}\}(?!\})|~\}\})", "{{{": r"\s*\}~?\}\}", "{{!": r"~?\}\}", "{{!--": r"--~?\}\}",
             "<<": r"\s*~?>>", "<<<": r"\s*>~?>>", "<<!": "~?>>", "<<!--": "--~?>>", "(": r"\s*\)"}
_BLOCK_PARAMETERS, _RAW_BLOCK = rf"\s+\|\s*({_NAME}(?:\s+{_NAME})*)\s*\|", r"\{{4}raw\}{4}(.*?)\{{4}/raw\}{4}"
_STANDALONE = frozenset(("#", "^", "/", "else", ">", "#>", "#*", "!"))
_LITERAL_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "undefined": None}

class _Malformed(Exception):
    """(reason, position): a tag that does not read as one; an error in {{ }}, plain text in << >>."""

class _Tag:
    """One tag: its sign ("" for a value), what it calls with what, block parameters, and `~` on either side."""
    named: Mapping[str, _Expression] = {}
    names: Sequence[str] = ()
    left = right = False
    indent = ""

    def __init__(self, sign: str, position: int, end: int = 0, head: Any = None, arguments: Sequence[Any] = ()) -> None:
        self.sign, self.position, self.end, self.head, self.arguments = sign, position, end, head, arguments

    @property
    def name(self) -> str:
        """What the tag calls, as written: `each`, `steps.a`, `../x`."""
        return self.head[2] if self.head else ""

def _scan(source: str) -> list[str | _Tag]:
    """The texts and tags of a template, in order. A raw block is its text between two tags that render as nothing."""
    items: list[str | _Tag] = []
    start = search = 0
    while opener := _OPENER.search(source, search):
        position, curly = opener.start(), opener[0] == "{{"
        escaped = position > start and source[position - 1] == "\\"
        literal = escaped and source[max(start, position - 2) : position] != "\\\\"
        raw = re.compile(_RAW_BLOCK, re.S).match(source, position) if source.startswith("{{{{", position) else None
        try:
            tag = None if raw or (literal and curly) else _read_tag(source, position)
        except _Malformed as error:
            if curly:
                raise TemplateError(error.args[0], source, error.args[1]) from None
            search = position + 1
            continue
        if len(items) > _MAX_ITEMS:
            raise TemplateError(f"more than {_MAX_ITEMS} texts and tags in one template", source, position)
        if start < position - escaped:
            items.append(source[start : position - escaped])
        start, search = position, position + 2
        if raw and not literal:
            items += (_Tag("!", position), raw[1], _Tag("!", raw.end()))
            start = search = raw.end()
        elif tag and not literal:
            items.append(tag)
            start = search = tag.end
    return [*items, source[start:]] if start < len(source) else items

def _read_tag(source: str, position: int) -> _Tag:
    """The tag at `position`. A `<<` tag ends on its line and holds no other `<<`, so that to fail is cheap."""
    if source.startswith("{{else}}", position):
        return _Tag("else", position, position + 8)
    if simple := _SIMPLE_TAG.match(source, position):
        words = [(simple[group], simple.start(group)) for group in (3, 4) if simple[group]]
        head, *arguments = [("path", (0, text.lstrip("@").split("."), False), text, start) for text, start in words]
        return _Tag(simple[2], position, simple.end(), head, arguments)
    match: Any = _TAG.match(source, position)
    opener, sign, limit = match[1], match[3] or "", len(source)
    if opener == "<<" and (stop := re.compile(r"<<|\n").search(source, match.end())):
        limit = stop.start()
    tag = _Tag("" if sign in ("{", "<", "&") else sign, position)
    if sign in ("{", "<") and sign != opener[0]:
        raise _Malformed(f"unexpected {sign!r}", position)
    if sign == "!":
        kind = opener + ("!--" if source.startswith("--", match.end()) else "!")
        end = re.compile(_TAG_ENDS[kind]).search(source, match.end(), limit)
        if not end:
            raise _Malformed("comment is never closed", position)
    else:
        end = _read_arguments(source, match.end(), limit, opener + (sign if sign in ("{", "<") else ""), tag, 0)
    tag.left, tag.right, tag.end = bool(match[2]), "~" in end[0][-3:], end.end()
    if tag.sign == "" and tag.name == "else" and tag.head[0] == "path":
        tag.sign, tag.head, tag.arguments = "else", tag.arguments[0] if tag.arguments else None, tag.arguments[1:]
    elif tag.sign == "^" and not tag.head:
        tag.sign = "else"
    elif not tag.head and sign != "!":
        raise _Malformed("empty tag", position)
    elif opener == "<<" and tag.sign == "" and tag.head[0] == "literal":
        raise _Malformed("a number or a text is no tag", position)
    return tag

def _read_arguments(source: str, position: int, limit: int, opener: str, tag: _Tag, depth: int) -> re.Match[str]:
    """Reads head, arguments, named arguments and block parameters into the tag; returns the match of its end."""
    if depth > _MAX_NESTING:
        raise _Malformed(f"sub-expressions nested deeper than {_MAX_NESTING}", position)
    nodes: list[_Expression] = []
    named: dict[str, _Expression] = {}
    ending, parameters = re.compile(_TAG_ENDS[opener]), re.compile(_BLOCK_PARAMETERS)
    while not (end := ending.match(source, position, limit)):
        token, key = _TOKEN.match(source, position, limit), ""
        if token and nodes and token["path"] == "as" and (names := parameters.match(source, token.end(), limit)):
            tag.names, position = names[1].split(), names.end()
            continue
        if token and nodes and (equals := re.compile(r"\s*=").match(source, token.end(), limit)):
            key = token["path"] or ""
            token = _TOKEN.match(source, equals.end(), limit) if re.fullmatch(_STEP, key) else None
        if len(nodes) + len(named) > _MAX_ARGUMENTS:
            raise _Malformed(f"a tag has at most {_MAX_ARGUMENTS} arguments", position)
        if not token or (not key and named) or tag.names:
            position = re.compile(r"\s*").match(source, position, limit).end()  # type: ignore[union-attr]
            rest = source[position : min(limit, position + 60)]
            if opener == "{{" and rest.startswith("}}}"):
                raise _Malformed("'}}}' closes only '{{{': put a space before a brace that is text", position)
            word = re.split(r"[\s})>]", rest)[0] or rest[:1]
            raise _Malformed(f"unexpected {word!r} in a tag" if rest else f"{opener!r} is never closed", position)
        node, position = _read_operand(source, token, limit, depth)
        if key:
            named[_unbracketed(key)] = node
        else:
            nodes.append(node)
    tag.head, tag.arguments, tag.named = nodes[0] if nodes else None, nodes[1:], named
    return end

def _read_operand(source: str, token: re.Match[str], limit: int, depth: int) -> tuple[_Expression, int]:
    """The node that a token opens (a path, a literal or a sub-expression) and where it ends."""
    kind = token.lastgroup or ""
    text, start, end = token[kind], token.start(kind), token.end()
    if kind == "text":
        value = text[1:-1].replace("\\" + text[0], text[0])
        return ("literal", value, value, start), end
    if text in _LITERAL_WORDS:
        return ("literal", _LITERAL_WORDS[text], text, start), end
    if number := _LITERAL_NUMBER.fullmatch(text):
        return ("literal", float(text) if number[1] else int(text), text, start), end
    if kind == "path":
        return ("path", _split_path(text, start), text, start), end
    if text != "(":
        raise _Malformed(f"unexpected {text!r} in a tag", start)
    inner = _Tag("(", start)
    end = _read_arguments(source, end, limit, "(", inner, depth + 1).end()
    if not inner.head or inner.head[0] != "path":
        raise _Malformed("a sub-expression starts with the name of a helper", start)
    return ("call", inner, inner.name, start), end

def _unbracketed(step: str) -> str:
    """A path step without its brackets and their escapes."""
    return re.sub(r"\\([\\\]])", r"\1", step[1:-1]) if step[0] == "[" else step

def _split_path(text: str, position: int = 0) -> tuple[int, list[str], bool]:
    """Levels up, steps, and whether the path names its scope: "../a.[b c]" -> (1, ["a", "b c"], True)."""
    steps, scopes = _STEPS.findall(text), (".", "..", "this")
    first = next((index for index, step in enumerate(steps) if step not in scopes), len(steps))
    if not {*steps[first:]}.isdisjoint(scopes):
        raise _Malformed(f"invalid path {text!r}: '.', '..' and 'this' come first", position)
    return steps[:first].count(".."), [*map(_unbracketed, steps[first:])], first > 0

def _strip_lines(items: list[str | _Tag]) -> list[Any]:
    """Applies `~`, and takes block tags, comments and partials that stand alone on a line out with their line."""
    stripped: list[Any] = ["", *items, ""]
    last = len(items)
    for index, tag in enumerate(items, 1):
        if isinstance(tag, str) or not (tag.sign in _STANDALONE or tag.left or tag.right):
            continue
        if tag.left and isinstance(stripped[index - 1], str):
            stripped[index - 1] = stripped[index - 1].rstrip()
        if tag.right and isinstance(stripped[index + 1], str):
            stripped[index + 1] = stripped[index + 1].lstrip()
        before, after = items[index - 2] if index > 1 else "\n", items[index] if index < last else "\n"
        if tag.sign in _STANDALONE and isinstance(before, str) and isinstance(after, str):
            _, newline, indent = before.rpartition("\n")
            rest, ending, _ = after.partition("\n")
            if not (indent.strip() or rest.strip()) and (newline or index == 2) and (ending or index == last - 1):
                left = stripped[index - 1]
                stripped[index - 1] = left.rstrip(" \t")
                tag.indent = left[len(stripped[index - 1]) :]
                stripped[index + 1] = re.sub(r"\A[ \t]*\r?\n?", "", stripped[index + 1])
    return [item for item in stripped if item != ""]

# ---- Values: lookup, truth, text, comparison -------------------------------------------------------------------------

_MISSING: Any = object()
_PLAIN = frozenset((str, int, float, bool, list, dict, tuple))  # what a path may end at as it is
_ATOMS, _NUMBERS = frozenset((str, int, float, bool)), frozenset((int, float))
_KINDS = {"null": type(None), "a boolean": bool, "a number": (int, float), "text": str, "a list": (list, tuple),
          "a map": Mapping, "a Python object": object}

def _kind(value: Any) -> str:
    """What an error calls a value."""
    return next(name for name, types in _KINDS.items() if isinstance(value, types))  # type: ignore[arg-type]

def _settled(value: Any) -> Any:
    """The value that a path ends at: a view (such as a step's results) stands for its `__template_value__`."""
    hook = None if type(value) in _PLAIN else getattr(type(value), "__template_value__", None)
    return hook(value) if hook else value

def _child(value: Any, step: str) -> Any:
    """The value under a key of a map or an index of a list, or _MISSING; never an attribute."""
    if isinstance(value, (dict, Mapping)):
        if step in value:
            return value[step]
        number = int(step) if len(step) < 19 and re.fullmatch(r"-?(?:0|[1-9][0-9]*)", step) else None
        return value[number] if number is not None and number in value else _MISSING
    if isinstance(value, (list, tuple)):
        if len(step) < 19 and step.isascii() and step.isdigit() and int(step) < len(value):
            return value[int(step)]
        return len(value) if step == "length" else _MISSING
    return _MISSING

def _there(value: Any, *steps: str) -> str:
    """What is there where a path breaks off, for an error: the keys and the nearest of them, or the kind of value."""
    reached = 0
    while reached < len(steps) - 1 and (following := _child(value, steps[reached])) is not _MISSING:
        value, reached = following, reached + 1
    where = repr(".".join(steps[:reached])) if reached else "the scope"
    if not isinstance(value, Mapping):
        return f": {where} is {_kind(value)}" + (f" of {len(value)}" if isinstance(value, (list, tuple)) else "")
    keys = [str(key)[:50] for key in itertools.islice(value, 200)]
    listed = ", ".join(keys[:10]) + (", ..." if len(keys) > 10 else "")
    return f": {where} has {listed or 'no keys'}" + _suggestion(steps[reached], keys)

def _truthy(value: Any) -> bool:
    """Handlebars truth: false, null, "", 0 and [] are false; every map is true."""
    return bool(value) or (value is not None and type(value) not in _ATOMS and isinstance(value, (dict, Mapping)))

def _unpacked(value: Any) -> Any:
    """What JSON does not know, as something that it does."""
    if hasattr(type(value), "__template_value__"):
        return _settled(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")

def _json_text(value: Any, indent: int | None = None) -> str:
    """JSON of a value, compact unless indented; TemplateError for what JSON cannot say (nan and infinity too)."""
    options: Any = {"ensure_ascii": False, "allow_nan": False, "default": _unpacked}
    try:
        return json.dumps(value, indent=indent, separators=(",", ":") if indent is None else None, **options)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise TemplateError(f"cannot write {_kind(value)} as text: {reason}") from None

def _to_text(value: Any) -> str:
    """How a value is written into text: null as nothing; numbers, true, false, lists and maps as JSON."""
    if isinstance(value, str):
        return value
    if type(value) is int and -1000000 < value < 1000000:
        return repr(value)
    value = _settled(value)
    return value if isinstance(value, str) else "" if value is None else _json_text(value)

def _as_number(text: str) -> int | float | None:
    """The number that a text spells (`5`, `-0.5`, `1e3`, white space around), or None."""
    match = re.fullmatch(r"\s*([-+]?[0-9]{1,4000}(\.[0-9]+)?([eE][-+]?[0-9]+)?)\s*", text)
    return None if not match else float(match[1]) if match[2] or match[3] else int(match[1])

def _equal(left: Any, right: Any) -> bool:
    """Equality of `==`, `in` and `eq`, as Condition describes it."""
    if type(left) is type(right) and type(left) in _ATOMS:
        return bool(left == right)
    if isinstance(right, str):
        left, right = right, left
    if isinstance(left, str):
        if isinstance(right, bool):
            return left.strip().lower() == _to_text(right)
        return _as_number(left) == right if isinstance(right, (int, float)) else left == right
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return len(left) == len(right) and all(key in right and _equal(left[key], right[key]) for key in left)
    return bool(left == right)

def _order(left: Any, right: Any) -> int | None:
    """-1, 0 or 1; None if either is null (or nan); TypeError for what has no order."""
    if left is None or right is None:
        return None
    if type(left) not in _NUMBERS or type(right) not in _NUMBERS:
        if isinstance(left, str) and isinstance(right, str):
            return (left > right) - (left < right)
        numbers = [_as_number(value) if isinstance(value, str) else value for value in (left, right)]
        if any(isinstance(number, bool) or not isinstance(number, (int, float)) for number in numbers):
            raise TypeError(f"cannot order {_kind(left)} and {_kind(right)}")
        left, right = numbers
    return -1 if left < right else 1 if left > right else 0 if left == right else None

# ---- Helpers: plain functions of the arguments of a tag --------------------------------------------------------------

def _lookup(value: Any, key: Any) -> Any:
    return _settled(_child(value, _to_text(key)))

def _length_of(value: Any) -> int:
    if not isinstance(value, (str, list, tuple, Mapping, type(None))):
        raise TypeError(f"{_kind(value)} has no length")
    return len(value or ())

def _join_values(values: Any, separator: Any = ", ") -> str:
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"needs a list, not {_kind(values)}")
    return _to_text(separator).replace("\\n", "\n").replace("\\t", "\t").join(map(_to_text, values))

def _truncate(value: Any, length: int, suffix: Any = "...") -> str:
    text, suffix = _to_text(value), _to_text(suffix)
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise TypeError("needs a number of characters")
    return text if len(text) <= length else text[: max(0, length - len(suffix))] + suffix[:length]

_ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda left, right: _equal(left, right), "!=": lambda left, right: not _equal(left, right),
    "<": lambda left, right: _order(left, right) == -1, "<=": lambda left, right: _order(left, right) in (-1, 0),
    ">": lambda left, right: _order(left, right) == 1, ">=": lambda left, right: _order(left, right) in (0, 1),
}
_HELPERS: dict[str, Callable[..., Any]] = {
    **dict(zip(("eq", "ne", "lt", "le", "gt", "ge"), _ORDERS.values())),
    "and": lambda *values: next((value for value in values if not _truthy(value)), values[-1]),
    "or": lambda *values: next((value for value in values if _truthy(value)), values[-1]),
    "default": lambda *values: next((value for value in values[:-1] if value is not None and value != ""), values[-1]),
    "not": lambda value: not _truthy(value), "json": lambda value, indent=None: _json_text(value, indent),
    "upper": lambda value: _to_text(value).upper(), "lower": lambda value: _to_text(value).lower(),
    "trim": lambda value: _to_text(value).strip(), "log": lambda *values, **named: "",
    "lookup": _lookup, "length": _length_of, "join": _join_values, "truncate": _truncate,
}

def _arity_fault(function: Any, tag: _Tag) -> str | None:
    """What is wrong with the number of a built-in helper's arguments, or with their names."""
    code, given = function.__code__, len(tag.arguments)
    names, open_ended = code.co_varnames[: code.co_argcount], bool(code.co_flags & 4)
    least, most = len(names) - len(function.__defaults__ or ()) + open_ended, len(names)
    if unknown := [name for name in tag.named if name not in names and not code.co_flags & 8]:
        return f"has no argument {unknown[0]!r}{_suggestion(unknown[0], names)}"
    if given + len({*tag.named} & {*names[given:]}) >= least and (open_ended or given <= most):
        return None
    span = f"at least {least}" if open_ended else str(least) if least == most else f"{least} to {most}"
    return f"takes {span} argument{'s' * (not span.endswith('1'))}, not {given}"

_LENIENT = frozenset(("if", "unless", "default", "and", "or", "not"))  # a missing value is null in their arguments

# ---- Compiler: tags become closures ----------------------------------------------------------------------------------

_SPECIAL = frozenset(("root", "index", "key", "first", "last", "partial-block"))  # what of a frame can be read as @name
_ELSEWHERE, _MAYBE_ROOT, _AT_ROOT, _ROOTED = range(4)  # where a path starts; rooted is one that is written @root.x

def _inside(frame: _Frame, value: Any, names: Sequence[str] = ()) -> _Frame:
    """The frame of a block whose `this` is the value; its block parameter too, if it has one."""
    parameters = dict.fromkeys(names[:1], value)
    return {**frame, **parameters} if value is frame["this"] else {**frame, **parameters, "this": value, "outer": frame}

def _constant(value: Any) -> Callable[..., Any]:
    """A closure that gives the value, whatever it is called with, and says so."""
    def evaluate(this: Any, frame: Any = None) -> Any:
        return value
    evaluate.constant = value  # type: ignore[attr-defined]
    return evaluate

_nothing = _constant("")

def _path_reader(steps: Sequence[str], key: str = "", link: str = "", levels: int = 0, fail: Any = None,
                 raw: bool = False) -> _Read:
    """Reads a path from `this`, or from a key of the frame some links up. A missing value is null unless `fail` raises.
    Raw: a view at the end of the path stays a view."""
    def start(frame: Any) -> Any:
        for _ in range(levels):
            frame = frame and frame.get(link)
        return frame.get(key, _MISSING) if frame else _MISSING
    def read(this: Any, frame: Any) -> Any:
        value = start(frame) if key else this
        for step in steps:
            value = value[step] if type(value) is dict and step in value else _child(value, step)
        if type(value) in _PLAIN:
            return value
        if value is _MISSING:
            return fail(start(frame) if key else this) if fail else None
        return value if raw else _settled(value)
    return read

def _joined(parts: list[Any]) -> _Read:
    """A program: the texts of the parts (constant texts and closures), joined."""
    reads = [(index, part) for index, part in enumerate(parts) if not isinstance(part, str)]
    if not reads:
        return _constant("".join(parts))
    def render(this: Any, frame: Any) -> str:
        texts = parts[:]
        for index, read in reads:
            value = read(this, frame)
            texts[index] = value if type(value) is str else _to_text(value)
        return "".join(texts)
    return render

def _looped(body: _Read, names: Sequence[str], value: Any, frame: _Frame) -> str:
    """The body once for each item of a list or map, which is not empty."""
    pairs = list(value.items() if isinstance(value, Mapping) else enumerate(value))
    inner, texts = {**frame, "outer": frame, "around": frame}, []
    for index, (key, item) in enumerate(pairs):
        inner["this"], inner["index"], inner["key"] = item, index, key
        inner["first"], inner["last"] = not index, index == len(pairs) - 1
        if names:
            inner.update(zip(names, (item, key)))
        texts.append(body(item, inner))
    return "".join(texts)

class _Partials(dict):  # type: ignore[type-arg]
    """Partials by name: sources, each replaced by its Template when it is first asked for."""

    def __init__(self, sources: Mapping[str, Any] | None, strict: bool, helpers: _Helpers | None) -> None:
        super().__init__(sources or {})
        self.strict, self.helpers = strict, helpers

    def template(self, name: str) -> Template | None:
        source = self.get(name)
        if source is not None and not isinstance(source, Template):
            source = self[name] = Template(source, self.strict, self, self.helpers, _name=name)
        return source

class _TemplateCompiler:
    """Turns one source into its program, and collects what that refers to."""

    def __init__(self, source: str, strict: bool, partials: _Partials, helpers: _Helpers, name: str) -> None:
        self.source, self.strict, self.partials, self.helpers, self.name = source, strict, partials, helpers, name
        self.items = _strip_lines(_scan(source))
        self.next = self.nesting = 0
        self.end = _Tag("", 0)  # the tag that ended the program compiled last
        self.inlines: dict[str, _Read] = {}  # and its inline partials
        self.scopes: tuple[int, ...] = (_AT_ROOT,)  # where `this` is, level by level
        self.names: frozenset[str] = frozenset()  # block parameters
        self.guards: list[tuple[str, ...]] = []  # the paths that the #if and #unless around ask for
        self.references: list[tuple[tuple[str, ...], bool, int, int]] = []  # the last: where it starts
        self.calls: list[tuple[str, int, set[str], int]] = []  # partials: name, where `this` is, keys, position

    def error(self, reason: str, position: int) -> TemplateError:
        return TemplateError(reason + (f" in partial {self.name!r}" if self.name else ""), self.source, position)

    def program(self, opener: _Tag | None, scope: tuple[int, ...] = (), names: Sequence[str] = ()) -> _Read:
        """Compiles up to the tag that ends the opener's body, or to the end of the source."""
        parts: list[Any] = []
        inlines: dict[str, _Read] = {}
        outer, end = (self.scopes, self.names), _Tag("", 0)
        self.scopes, self.names = self.scopes + scope, self.names.union(names)
        self.nesting += 1
        if self.nesting > _MAX_NESTING + 1:
            raise self.error(f"blocks nested deeper than {_MAX_NESTING}", opener.position if opener else 0)
        while self.next < len(self.items) and not end.sign:
            item = self.items[self.next]
            self.next += 1
            if isinstance(item, str):
                parts.append(item)
            elif item.sign in ("/", "else"):
                end = item
            elif item.sign == "#*":
                inlines.update(self.inline(item))
            elif item.sign in _COMPILED:
                parts.append(_COMPILED[item.sign](self, item))
            elif item.sign != "!":
                raise self.error(f"unexpected {item.sign!r}", item.position)
        if opener and not end.sign:
            raise self.error(f"block '{opener.sign}{opener.name}' is never closed", opener.position)
        if end.sign and not opener:
            raise self.error(f"'{end.sign}{end.name}' outside of a block", end.position)
        (self.scopes, self.names), self.end, self.inlines, program = outer, end, inlines, _joined(parts)
        self.nesting -= 1
        def render(this: Any, frame: _Frame) -> Any:
            inner = {**frame}
            inner["partials"] = {**frame["partials"], **{name: (body, inner) for name, body in inlines.items()}}
            return program(this, inner)
        return render if inlines else program

    def close(self, opener: _Tag) -> None:
        """Checks that the tag that ended the last program closes the opener."""
        if self.end.sign != "/" or not self.end.head or opener.head[1] != self.end.head[1]:
            line = self.source.count("\n", 0, opener.position) + 1
            ending = f"'/{self.end.name}'" if self.end.sign == "/" else "a second else"
            raise self.error(f"{ending} does not close '{opener.sign}{opener.name}' of line {line}", self.end.position)

    def inline(self, tag: _Tag) -> dict[str, _Read]:
        """{{#*inline "name"}}: a partial for the block it stands in."""
        if tag.name != "inline" or len(tag.arguments) != 1 or tag.arguments[0][0] != "literal":
            raise self.error('the only decorator is {{#*inline "name"}}', tag.position)
        body = self.program(tag, (_MAYBE_ROOT,))
        self.close(tag)
        return {tag.arguments[0][2]: body}

    def bodies(self, tag: _Tag, scope: tuple[int, ...], chained: bool) -> tuple[_Read, _Read]:
        """The body and the inverse of a block. A chained one (`else if`) leaves its end to the block it is in."""
        inside: list[Any] = [(scope, tag.names), ((), ())]  # what the body sees, and the inverse
        first, second = reversed(inside) if tag.sign == "^" else inside
        body, inverse = self.program(tag, *first), _nothing
        if self.end.sign == "else" and self.end.head:
            self.end.sign = "#"
            self.nesting += 1
            inverse = self.block(self.end, chained=True)
            self.nesting -= 1
        elif self.end.sign == "else":
            inverse = self.program(tag, *second)
        if not chained:
            self.close(tag)
        return (inverse, body) if tag.sign == "^" else (body, inverse)

    def block(self, tag: _Tag, chained: bool = False) -> _Read:
        """A block: if and unless; each: the body for each item; with: once, the value as `this`; or a section (""),
        which does as the value of the tag asks for."""
        kind = tag.name if tag.name in _BLOCKS and tag.name not in self.helpers and tag.head[0] == "path" else ""
        if kind and len(tag.arguments) != 1:
            raise self.error(f"#{kind} takes one argument", tag.position)
        tests, seen, guarded = kind in _LENIENT, len(self.references), len(self.guards)
        read = self.expression(tag.arguments[0], tests, kind == "with") if kind else self.value(tag)
        zero = self.named(tag, True).get("includeZero", _nothing)
        if tests:
            self.guards += [steps for steps, *_ in self.references[seen:]]
        same = tests or (kind == "with" and tag.arguments[0][2] in (".", "this"))
        names = ["|" + name for name in tag.names[:2]]
        body, inverse = self.bodies(tag, () if same else (_ELSEWHERE if kind else _MAYBE_ROOT,), chained)
        del self.guards[guarded:]
        if kind == "unless":
            body, inverse = inverse, body
        def test(this: Any, frame: Any) -> Any:
            value = read(this, frame)
            true = _truthy(value) or (value is not False and value == 0 and _truthy(zero(this, frame)))
            return body(this, frame) if true else inverse(this, frame)
        def render(this: Any, frame: Any) -> Any:
            value = read(this, frame)
            settled = _settled(value)
            if kind != "with" and isinstance(settled, _LOOPED[kind]):
                return _looped(body, names, settled, frame) if settled else inverse(this, frame)
            if kind == "each" and self.strict and settled is not None:
                raise self.error(f"#each needs a list or a map, not {_kind(settled)}", tag.position)
            absent = settled is None or settled is False or (kind and not _truthy(settled) and settled != 0)
            if kind == "each" or absent:
                return inverse(this, frame)
            inner = this if settled is True and not kind else value
            return body(inner, _inside(frame, inner, names))
        return test if tests else render

    def value(self, tag: _Tag) -> _Read:
        """`{{head arguments}}`: a helper's value if there are arguments or a helper of the caller's, else a path's."""
        kind, _, text, position = tag.head
        if kind != "call" and (tag.arguments or tag.named or text in self.helpers):
            return self.call(tag, False)
        if tag.arguments or tag.named or (tag.names and not tag.sign):
            raise self.error("unexpected arguments", position)
        return self.expression(("path", (0, [text], True), text, position) if kind == "literal" else tag.head)

    def call(self, tag: _Tag, lenient: bool) -> _Read:
        """A helper call. A missing value is null in the arguments of helpers that ask whether it is there."""
        function = self.helpers.get(tag.name) or _HELPERS.get(tag.name)
        if function is None:
            known = _suggestion(tag.name, [*self.helpers, *_HELPERS])
            raise self.error(f"unknown helper {tag.name!r}{known}", tag.head[3])
        if function is _HELPERS.get(tag.name) and (fault := _arity_fault(function, tag)):
            raise self.error(f"helper {tag.name!r} {fault}", tag.position)
        lenient = lenient or tag.name in _LENIENT
        reads = [self.expression(node, lenient, raw=function is _lookup) for node in tag.arguments]
        named, strict = self.named(tag, lenient), self.strict and not lenient
        def read(this: Any, frame: Any) -> Any:
            values = [read(this, frame) for read in reads]
            keywords = {key: read(this, frame) for key, read in named.items()}
            try:
                value = function(*values, **keywords)
            except RecursionError:
                raise
            except Exception as error:
                reason = str(error).replace("<lambda>()", "it") or type(error).__name__
                raise self.error(f"helper {tag.name!r}: {reason}", tag.position) from error
            if value is _MISSING and strict:
                raise self.error(f"missing value {values[1]!r}{_there(values[0], _to_text(values[1]))}", tag.position)
            return None if value is _MISSING else value
        return read

    def named(self, tag: _Tag, lenient: bool = False) -> dict[str, _Read]:
        return {key: self.expression(node, lenient) for key, node in tag.named.items()}

    def expression(self, node: _Expression, lenient: bool = False, raw: bool = False) -> _Read:
        """The closure of a node. Lenient: a missing value is null. Raw: a view at the end of a path stays a view."""
        kind, content, text, position = node
        if kind == "literal":
            return _constant(content)
        if kind == "call":
            return self.call(content, lenient)
        levels, steps, fixed = content
        name, key, link = steps[0] if steps else "", "", "outer"
        if text[:1] == "@":
            key, link, steps = name if name in _SPECIAL else "@", "around", steps[1:]
            if name == "root":
                levels = 0
                self.refer(steps, lenient, position, _ROOTED)
        elif not fixed and name in self.names:
            key, steps = "|" + name, steps[1:]
        else:
            around = self.scopes[len(self.scopes) - 1 - levels :] if levels < len(self.scopes) else (_ELSEWHERE,)
            self.refer(steps, lenient or _MAYBE_ROOT in around, position, around[0])
            key = "this" if levels else ""
        hint = f"; outside of the block: ../{text} or @root.{text}" if len(self.scopes) > 1 and not key else ""
        def fail(value: Any) -> Any:
            there = ": there is no such scope or loop here" if value is _MISSING else _there(value, *steps) + hint
            raise self.error(f"missing value {text!r}{there}", position)
        return _path_reader(steps, key, link, levels, fail if self.strict and not lenient else None, raw)

    def refer(self, steps: Sequence[str], lenient: bool, position: int, at_root: int) -> None:
        if steps and at_root:
            required = not lenient and not any((*steps[: len(guard)],) == guard for guard in self.guards)
            self.references.append(((*steps,), required, position, at_root))

    def partial(self, tag: _Tag) -> _Read:
        """`{{> name context key=value}}`, or `{{#> name}}` with a block that the partial renders as @partial-block."""
        kind, content, name, _ = tag.head
        name = _unbracketed(name) if kind == "path" else name
        name_of = self.call(content, False) if kind == "call" else None
        if len(tag.arguments) > 1:
            raise self.error("a partial takes one context", tag.position)
        own_block, partials = kind == "path" and name == "@partial-block", self.partials
        indent = tag.indent if tag.sign == ">" else ""
        known = name in partials or self.name or "#*inline" in self.source
        if self.strict and tag.sign == ">" and not (name_of or own_block or known):
            raise self.error(f"unknown partial {name!r}{_suggestion(name, partials)}", tag.position)
        context = self.expression(tag.arguments[0], raw=True) if tag.arguments else None
        named, same = self.named(tag), not tag.arguments or tag.arguments[0][2] in (".", "this")
        self.calls.append((name, self.scopes[-1] if same else _ELSEWHERE, set(named), tag.position))
        block: Any = self.program(tag) if tag.sign == "#>" else None
        defined = self.inlines if block else {}
        if block:
            self.close(tag)
        def render(this: Any, frame: _Frame) -> str:
            known = _to_text(name_of(this, frame)) if name_of else name
            if frame["level"] >= _MAX_NESTING:
                raise self.error(f"partial recursion: {known!r} is over {_MAX_NESTING} partials deep", tag.position)
            value = context(this, frame) if context else this
            if named:
                values = {key: read(this, frame) for key, read in named.items()}
                value = ChainMap(values, value) if isinstance(value, Mapping) else values  # type: ignore[arg-type]
            found = frame["partial-block"] if own_block else frame["partials"].get(known)
            template = None if found or own_block else partials.template(known)
            if not (found or template or block):
                raise self.error(f"unknown partial {known!r}{_suggestion(known, partials)}", tag.position)
            program, origin = (template._program, frame) if template else found or (block, frame)
            inner = {**_inside(origin, value), "level": frame["level"] + 1}
            if template:
                inner.update(this=value, outer=None)  # a partial does not see the contexts around it
            if (found or template) and not own_block:
                inner["partial-block"] = (block, frame) if block else frame["partial-block"]
            if defined:
                inner["partials"] = {**inner["partials"], **{key: (body, frame) for key, body in defined.items()}}
            text = program(value, inner)
            return re.sub(r"^(?!\Z)", indent, text, flags=re.M) if indent else str(text)
        return render

_BLOCKS = frozenset(("if", "unless", "each", "with"))
_LOOPED: dict[str, Any] = {"each": (list, tuple, Mapping), "": (list, tuple)}
_COMPILED: dict[str, Callable[[_TemplateCompiler, _Tag], _Read]] = {
    "": _TemplateCompiler.value, ">": _TemplateCompiler.partial, "#>": _TemplateCompiler.partial,
    "#": _TemplateCompiler.block, "^": _TemplateCompiler.block,
}

class Template:
    """A compiled template: Handlebars without HTML escaping, `{{x}}` or `<<x>>`.

    `strict`: a missing value is a TemplateError (else it renders as nothing), but not in the arguments of #if, #unless,
    default, and, or, not. `partials`: name -> source or Template. `helpers`: name -> function, called with the
    arguments of the tag, the named ones as keywords; a block {{#name}} is a section over what it returns.

    A `<<` opens a tag if what follows, on the same line and up to `>>`, is a tag: a path, a helper call, a block tag;
    not a bare number or quoted text, and with no other `<<` in it. Otherwise it is plain text, as in `cout << x`.
    `\\{{x}}` and `\\<<x>>` are text too. Numbers that JSON cannot write (nan, infinity) are refused.
    """
    __slots__ = ("_calls", "_partials", "_program", "_references", "_value", "is_expression", "source")

    def __init__(self, source: str, strict: bool = True, partials: Mapping[str, Any] | None = None,
                 helpers: _Helpers | None = None, _name: str = "") -> None:
        if not isinstance(source, str):
            raise TemplateError(f"a template is text, not {_kind(source)}")
        self.source = source
        self._partials = partials if isinstance(partials, _Partials) else _Partials(partials, strict, helpers)
        compiler = _TemplateCompiler(source, strict, self._partials, helpers or {}, _name)
        first: Any = compiler.items[0] if len(compiler.items) == 1 else ""
        self.is_expression = isinstance(first, _Tag) and first.sign == "" and first.end - first.position == len(source)
        self._value = compiler.value(first) if self.is_expression else compiler.program(None)
        self._program = _joined([self._value]) if self.is_expression else self._value
        self._references, self._calls = compiler.references, compiler.calls

    def render(self, context: Any) -> str:
        """The text for a context (a map of names to JSON-like values). TemplateError for a missing value (strict)."""
        return self._run(self._program, context)  # type: ignore[no-any-return]

    def evaluate(self, context: Any) -> Any:
        """The value itself if the source is one `{{expression}}` and nothing else; otherwise the text."""
        return self._run(self._value, context)

    def _run(self, program: _Read, context: Any) -> Any:
        """Runs a program in its first frame. Blocks add `outer`, the frame that ../ reads; loops also index, key,
        first, last and `around`, the frame that @../ reads; a block parameter x is "|x". Inline partials and
        partial-block are (program, the frame it is defined in); `level` counts partials in partials."""
        frame = {"root": context, "this": context, "partials": {}, "partial-block": None, "level": 0}
        try:
            return program(context, frame)
        except RecursionError:
            raise TemplateError("nested too deeply to render") from None

    @property
    def references(self) -> tuple[Reference, ...]:
        """Every path read from the root: (segments, required, position). Required: it raises if missing and strict.

        What a partial reads counts at the position of the tag that calls it; names that the tag sets are hidden. In a
        section, whose value may be true or a map, names are read from the root only perhaps: those of steps count."""
        found: list[Reference] = []
        waiting: list[Any] = [(self, _AT_ROOT, frozenset(), None)]  # template, where its `this` is, hidden names, place
        seen = set()
        while waiting:
            template, context, hidden, place = waiting.pop(0)
            for steps, required, position, root in template._references:
                root = root if root == _ROOTED else _ELSEWHERE if steps[0] in hidden else min(root, context)
                if root > _MAYBE_ROOT or (root and len(steps) > 1 and steps[0] in ("steps", "outputs")):
                    found.append((steps, required and root > _MAYBE_ROOT, position if place is None else place))
            for name, same, keys, position in template._calls:
                call = (name, min(context, same), hidden | keys)
                partial = None if call in seen else self._partials.template(name)
                seen.add(call)
                if partial:
                    waiting.append((partial, *call[1:], position if place is None else place))
        return tuple(found)

# ---------------------------------------------------------------------------------------------------------------------
# 5. Conditions: text -> compiled predicate. A parser of its own (never `eval`); a reference or a tag is an operand, so
# that no value can change the expression. Regular expressions pass a guard that bounds what backtracking may cost.
# ---------------------------------------------------------------------------------------------------------------------

_CONDITION_TOKEN = (
    r"""\s*(?:(?P<text>"[^"\\]*(?:\\.[^"\\]*)*"|'[^'\\]*(?:\\.[^'\\]*)*')|(?P<tag>\{\{|<<)"""
    r"""|(?P<number>-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[-+]?[0-9]+)?(?![\w.]))"""
    r"""|(?P<mark>not\s+in(?![\w.-])|\|\||&&|[=!]=(?!=)|<=|>=|[<>!()\[\],])"""
    r"""|(?P<path>[^\W\d][\w-]*(?:\.(?:[\w-]+|\[[^\]\n]*\])|\[(?:\d+|'[^'\]\n]*'|"[^"\]\n]*")\])*))""")
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}
_CONDITION_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\", "'": "'", '"': '"'}
_OR, _AND, _NOT, _COMPARISON = range(1, 5)  # precedence

def _holds(value: Any) -> bool:
    """Truth in conditions: as in templates, but the texts "", "false", "no" and "0" are false, in any case."""
    return value.strip().lower() not in ("", "false", "no", "0") if isinstance(value, str) else _truthy(value)

def _contains(container: Any, item: Any) -> bool:
    """Whether an item is part of a text, a member of a list or a key of a map; nothing is in null."""
    if isinstance(container, (list, tuple)):
        return any(_equal(item, member) for member in container)
    if container is None or (item is None and isinstance(container, str)):
        return False
    if not isinstance(item, (str, int, float)) or not isinstance(container, (str, Mapping)):
        raise TypeError(f"cannot look for {_kind(item)} in {_kind(container)}")
    text = _to_text(item)
    return text in container if isinstance(container, str) else _child(container, text) is not _MISSING

def _on_texts(test: Callable[[str, str], bool]) -> Callable[[Any, Any], bool]:
    """A comparison of texts: numbers and booleans stand for their text, null compares as false."""
    def compare(left: Any, right: Any) -> bool:
        for value in (left, right):
            if not isinstance(value, (str, int, float, type(None))):
                raise TypeError(f"needs text, not {_kind(value)}")
        return left is not None and right is not None and test(_to_text(left), _to_text(right))
    return compare

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    **_ORDERS,
    "in": lambda left, right: _contains(right, left), "not in": lambda left, right: not _contains(right, left),
    "contains": _contains, "startswith": _on_texts(str.startswith), "endswith": _on_texts(str.endswith),
    "matches": _on_texts(lambda text, pattern: _guarded_search(_compile_regex(pattern), text) is not None),
}
_PRECEDENCE = {"or": _OR, "||": _OR, "and": _AND, "&&": _AND, **dict.fromkeys(_COMPARISONS, _COMPARISON)}
_FUNCTIONS = {"len": _length_of, **{name: _HELPERS[name] for name in ("lower", "upper", "trim")}}

class _ConditionParser:
    """Precedence climbing over the tokens of a condition; what it reads it returns as closures."""

    def __init__(self, source: str, helpers: _Helpers | None) -> None:
        self.source, self.helpers, self.end, self.depth = source, helpers, 0, 0
        self.references: list[Reference] = []
        self.advance()

    def advance(self) -> None:
        """To the next token: its kind (None for none), text and start; `mark` is the spelling of an operator."""
        match = re.compile(_CONDITION_TOKEN, re.S | re.I).match(self.source, self.end)
        self.kind = match.lastgroup if match else None
        self.word, self.start = (match[self.kind], match.start(self.kind)) if match and self.kind else ("", self.end)
        self.mark = " ".join(self.word.lower().split()) if self.kind in ("mark", "path") else ""
        self.end = match.end() if match else self.end

    def error(self, reason: object, position: int) -> ConditionError:
        return ConditionError(str(reason), self.source, position)

    def unexpected(self) -> ConditionError:
        rest = re.compile(r"\s*(\S[\w.=]*)").match(self.source, self.start)
        if not rest:
            return self.error("the condition ends too early", self.start)
        hints = {"=": ": use '=='", **dict.fromkeys("'\"", ": this text is never closed")}
        hint = "" if self.word else hints.get(rest[1][0], "")
        return self.error(f"unexpected {rest[1][:40]!r}{hint}", rest.start(1))

    def expect(self, mark: str) -> None:
        if self.mark != mark:
            raise self.unexpected()
        self.advance()

    def expression(self, lowest: int = _OR) -> _Read:
        self.depth += 1
        if self.depth > _MAX_NESTING:
            raise self.error(f"nested deeper than {_MAX_NESTING}", self.start)
        left, compared = self.operand(lowest), False
        while (precedence := _PRECEDENCE.get(self.mark, 0)) >= lowest:
            if precedence == _COMPARISON:
                if compared:
                    raise self.error("comparisons do not chain: join them with `and`", self.start)
                left, compared = self.comparison(left), True
                continue
            terms = [left]
            while _PRECEDENCE.get(self.mark) == precedence:
                self.advance()
                terms.append(self.expression(precedence + 1))
            left = self.junction(terms, precedence == _OR)
        self.depth -= 1
        return left

    def junction(self, terms: list[_Read], decisive: bool) -> _Read:
        """`or` (an operand that holds decides) or `and` (one that does not): the value of the deciding operand."""
        def read(this: Any, frame: Any) -> Any:
            value = None
            for term in terms:
                value = term(this, frame)
                if _holds(value) is decisive:
                    break
            return value
        return read

    def comparison(self, left: _Read) -> _Read:
        operator, start, compare = self.mark, self.start, _COMPARISONS[self.mark]
        self.advance()
        right = self.expression(_COMPARISON + 1)
        def read(this: Any, frame: Any) -> bool:
            first, second = left(this, frame), right(this, frame)
            try:
                return compare(first, second)
            except RecursionError:
                raise
            except Exception as error:  # values of other types than JSON's may raise anything
                raise self.error(error.reason if isinstance(error, TemplateError) else error, start) from None
        if operator == "matches" and isinstance(pattern := getattr(right, "constant", None), str):
            try:
                _compile_regex(pattern)
            except ConditionError as error:
                raise self.error(error.reason, start) from None
        return read

    def operand(self, lowest: int) -> _Read:
        kind, word, start = self.kind, self.word, self.start
        if kind == "tag":
            return self.tag(start)
        if not kind or self.mark in _PRECEDENCE or word in (")", "]", ","):
            raise self.unexpected()
        negated = self.mark in ("not", "!")
        self.advance()
        if negated:
            inner = self.expression(max(lowest, _NOT))
            return lambda this, frame: not _holds(inner(this, frame))
        if kind == "text":
            return self.text(word, start)
        if kind == "number":  # `1.` and `.5` are numbers here
            return _constant(float(word) if (number := _as_number(word)) is None else number)
        if kind == "path":
            return self.place(word, start)
        if word == "(":
            inner = self.expression()
            self.expect(")")
            return inner
        items = [] if self.mark == "]" else [self.expression()]
        while items and self.mark == ",":
            self.advance()
            items.append(self.expression())
        self.expect("]")
        return lambda this, frame: [item(this, frame) for item in items]

    def template(self, source: str, start: int) -> Template:
        try:
            template = Template(source, False, None, self.helpers)
        except TemplateError as error:
            raise self.error(error.reason, start) from None
        self.references += [(steps, False, start + at) for steps, _, at in template.references]
        return template

    def text(self, quoted: str, start: int) -> _Read:
        """Quoted text; with tags in it, it is a template whose text is the operand."""
        text = re.sub(r"\\([nt\\'\"])", lambda match: _CONDITION_ESCAPES[match[1]], quoted[1:-1])
        if "{{" not in text and "<<" not in text:
            return _constant(text)
        template = self.template(text, start)
        constant = hasattr(template._program, "constant")
        return template._program if constant else lambda this, frame: template.render(this)

    def tag(self, start: int) -> _Read:
        try:
            self.end = _read_tag(self.source, start).end
        except _Malformed as error:
            raise self.error(*error.args) from None
        template = self.template(self.source[start : self.end], start)
        if not template.is_expression:
            raise self.error("only a reference or a helper call can be an operand", start)
        self.advance()
        return lambda this, frame: template.evaluate(this)

    def place(self, text: str, start: int) -> _Read:
        """A word: a constant, a function call or a reference."""
        if text.lower() in _CONSTANTS:
            return _constant(_CONSTANTS[text.lower()])
        if self.mark != "(":
            found = re.findall(r"\.\[([^\]]*)\]|\[['\"]?([^\]]*?)['\"]?\]|([\w-]+)", text)
            steps = tuple(map("".join, found))
            self.references.append((steps, False, start))
            return _path_reader(steps)
        function = _FUNCTIONS.get(text.lower())
        if not function:
            raise self.error(f"unknown function {text!r}{_suggestion(text, _FUNCTIONS)}", start)
        self.advance()
        inner = self.expression()
        self.expect(")")
        def call(this: Any, frame: Any) -> Any:
            try:
                return function(inner(this, frame))
            except TypeError as error:
                raise self.error(error, start) from None
        return call

class Condition:
    """A compiled condition, such as `steps.a.score >= 0.7 and not inputs.dry_run`.

    Operands: numbers, 'text', true, false, null, [lists], references (`steps.a.x`, `a[0]`, `a['k']`, `a.[odd key]`),
    tags (`{{x}}`, `<<x>>`: the value), '{{x}} text' (the rendered text), len(), lower(), upper(), trim(), parentheses.
    Operators, loosest first: or ||, and &&, not !, then == != < <= > >= in, not in, contains, matches (regular
    expression), startswith, endswith. What is missing is null.

    Equality: a text equals the number that it spells and, in any case, the boolean; booleans and numbers are never
    equal (`true == 1` is false); lists and maps are equal item by item. Order: numbers, or texts by code point; a text
    that spells a number orders with numbers; null orders with nothing (false). Truth: Handlebars', with the texts
    "false", "no" and "0" false too. `or` and `and` give the value of the operand that decides, as in Python.
    """

    __slots__ = ("_read", "references", "source")

    def __init__(self, source: str | bool | int | float, helpers: _Helpers | None = None) -> None:
        if not isinstance(source, (str, int, float)):
            raise ConditionError(f"a condition is text, not {_kind(source)}")
        self.source = source if isinstance(source, str) else str(source)
        parser = _ConditionParser(self.source, helpers)
        self._read = parser.expression()
        if parser.kind or self.source[parser.end :].strip():
            raise parser.unexpected()
        self.references: tuple[Reference, ...] = tuple(parser.references)

    def value(self, context: Any) -> Any:
        """The value of the expression, before it is tested. ConditionError for what cannot be compared."""
        try:
            return self._read(context, None)
        except ConditionError:
            raise
        except TemplateError as error:
            raise ConditionError(error.reason, self.source) from error
        except RecursionError:
            raise ConditionError("a value is nested too deeply to compare", self.source) from None

    def evaluate(self, context: Any) -> bool:
        """Whether the condition holds."""
        return _holds(self.value(context))

# ---- Guarded regular expressions -------------------------------------------------------------------------------------

_MAX_STEPS = 100_000_000  # of backtracking in the worst case: a second or two
_SETS = frozenset(("LITERAL", "NOT_LITERAL", "IN", "ANY"))  # nodes that take one character
_SAMPLES = "".join(map(chr, range(128))) + "\u00e9\u0416\u4e2d\u0663\u00a0\u2028\u00b2\u20ac\U0001f600"
_regex_parser: Any = getattr(re, "_parser", None) or getattr(re, "sre_parse", None)
_regex_compiler: Any = getattr(re, "_compiler", None) or getattr(re, "sre_compile", None)

def _compile_regex(pattern: str) -> re.Pattern[str]:
    """A compiled pattern for _guarded; ConditionError for a bad one, or one that short texts can make take forever."""
    try:
        _regex_cost(pattern)
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        raise ConditionError(f"bad regular expression: {str(error) or 'nested too deeply'}", pattern[:200]) from None

def _guarded(pattern: re.Pattern[str], text: str) -> re.Pattern[str]:
    """The pattern; ConditionError if to search this text with it could take more than a second or two."""
    cost = _regex_cost(pattern.pattern)
    if len(text) > cost.safe_length and cost.steps(text) > _MAX_STEPS:
        raise ConditionError("this regular expression can take forever on this text; anchor it", pattern.pattern)
    return pattern

def _guarded_search(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """pattern.search(text), or ConditionError as in _guarded; a pattern that begins with a run takes less here."""
    cost = _regex_cost(pattern.pattern)
    if len(text) > cost.safe_length and cost.by_runs and cost.steps(text, by_runs=True) <= _MAX_STEPS:
        return cost.by_runs.search(text)
    return _guarded(pattern, text).search(text)

class _RegexCost:
    """How many steps a search may take. Backtracking multiplies choices that the next character does not decide: the
    `ways` of alternatives and bounded repeats, and for an open repeat the length of the longest run in the text of
    what it takes. `products` are the sets of repeats that multiply; a search may start at every `mark`.

    A pattern that begins with an open repeat of a set need start only once in a run of the set: `by_runs` does. What
    follows the run costs `rest`, for each `entry` that is in the text.

    The parsed pattern is walked from its end. A state tells of what follows a place: the characters it may start with,
    ways, products, whether a choice in it is ambiguous, and whether it cannot fail.
    """

    END: Any = (frozenset(), 1, frozenset([()]), False, True)

    def __init__(self, pattern: str) -> None:
        if len(pattern) > 2000:
            raise ConditionError("a regular expression has at most 2000 characters", pattern[:200])
        tree = _regex_parser.parse(pattern)
        numbers = (int(number) for number in re.findall(r"\d+", repr(tree)))
        self.samples = set(_SAMPLES) | {chr(number) for number in numbers if number < 0x110000}
        self.state, self.pattern, self.known = tree.state, pattern, {}  # type: ignore[var-annotated]
        self.flags = re.I | re.S if re.search(r"\(\?[a-zA-Z-]+:", pattern) else 0  # flags of a group: as if for all
        self.taken: list[Any] = []  # the nodes of one character, as they are met
        self.runs: dict[str, Any] = {}  # for each open repeat, a pattern of the runs that it can take
        nodes = list(tree)
        self.rest = self.sequence(nodes[1:], self.END, 0)[2]
        _, self.ways, self.products, _, _ = self.sequence(nodes, self.END, 0)
        begins = str(nodes[0][1]) if nodes and nodes[0][0].name == "AT" else ""
        self.anchored = begins == "AT_BEGINNING_STRING" or (begins == "AT_BEGINNING" and not tree.state.flags & re.M)
        self.mark = "\n" if begins == "AT_BEGINNING" else self.literal(nodes)
        self.entry, self.by_runs = self.literal(nodes[1:]), self.started_by_runs(nodes)
        self.safe_length = 25  # of texts that need no closer look
        while self.safe_length < 1e7 and self.total(self.products, self.safe_length * 2) <= _MAX_STEPS:
            self.safe_length *= 2
        if self.safe_length < 50:
            raise ConditionError("this regular expression can take forever on some texts", pattern)

    def literal(self, nodes: Any) -> str:
        """The text that nodes begin with."""
        exact = next((nodes[:end] for end, node in enumerate(nodes) if node[0].name != "LITERAL"), nodes)
        return "" if self.flags or self.state.flags & re.I else "".join(chr(argument) for _, argument in exact)

    def started_by_runs(self, nodes: Any) -> re.Pattern[str] | None:
        """The pattern with `not after what it repeats` in front, if it begins with an open repeat of a set."""
        lead = list(nodes[:1])
        while len(lead) == 1 and lead[0][0].name == "SUBPATTERN" and not (lead[0][1][1] or lead[0][1][2]):
            lead = list(lead[0][1][-1])
        if len(lead) != 1 or not lead[0][0].name.endswith("_REPEAT") or lead[0][1][1] != _regex_parser.MAXREPEAT:
            return None
        repeated = list(lead[0][1][2])
        if len(repeated) != 1 or repeated[0][0].name not in _SETS:
            return None
        guard = (_regex_parser.ASSERT_NOT, (-1, self.tree(*repeated)))
        return _regex_compiler.compile(self.tree(guard, *nodes))  # type: ignore[no-any-return]

    def total(self, products: Any, length: int, starts: int = 0, runs: Mapping[str, int] | None = None) -> int:
        """The steps for a text of some length, for the places where a search may start, and for its longest runs."""
        longest = runs or dict.fromkeys(self.runs, length)
        each = sum(math.prod(longest[run] + 1 for run in product) for product in products)
        return int(length + self.ways * (1 if self.anchored else starts or length) * each)

    def steps(self, text: str, by_runs: bool = False) -> int:
        """At most how many steps a search of the text takes."""
        starts, products = text.count(self.entry if by_runs else self.mark) + 1, self.rest if by_runs else self.products
        runs = {key: max((len(found[0]) for found in run.finditer(text)), default=0) for key, run in self.runs.items()}
        return self.total(products, len(text), starts, runs)

    def sequence(self, nodes: Any, state: Any, depth: int) -> Any:
        for operation, argument in reversed(list(nodes)):
            state = self.node(operation, argument, state, depth)
        return state

    def tree(self, *nodes: Any) -> Any:
        return _regex_parser.SubPattern(self.state, list(nodes))

    def run(self, nodes: list[Any]) -> Any:
        """A pattern of the runs of what any of the nodes take."""
        arms = nodes[0] if len(nodes) == 1 else (_regex_parser.BRANCH, (None, [self.tree(node) for node in nodes]))
        repeat = (_regex_parser.MAX_REPEAT, (1, _regex_parser.MAXREPEAT, self.tree(arms)))
        return _regex_compiler.compile(self.tree(repeat), self.flags)

    def characters(self, node: Any) -> frozenset[str]:
        """The sample characters that a node takes."""
        if repr(node) not in self.known:
            single = _regex_compiler.compile(self.tree(node), self.flags)
            self.known[repr(node)] = frozenset(filter(single.match, self.samples))
        return self.known[repr(node)]  # type: ignore[no-any-return]

    def node(self, operation: Any, argument: Any, state: Any, depth: int) -> Any:
        first, ways, products, ambiguous, _ = state
        name = operation.name
        if name in _SETS:
            self.taken.append((operation, argument))
            return self.characters((operation, argument)), ways, products, ambiguous, False
        if name == "AT":
            return first, ways, products, ambiguous, False
        if name in ("SUBPATTERN", "ATOMIC_GROUP"):
            return self.sequence(argument[-1] if name == "SUBPATTERN" else argument, state, depth)
        if name == "BRANCH":
            arms = [self.sequence(arm, state, depth) for arm in argument[1]]
            firsts, all_products = (frozenset().union(*(arm[index] for arm in arms)) for index in (0, 2))
            overlap = sum(len(arm[0]) for arm in arms) > len(firsts)
            total = (sum if overlap else max)(arm[1] for arm in arms)
            return firsts, total, all_products, overlap or any(arm[3] for arm in arms), False
        if name in ("ASSERT", "ASSERT_NOT"):
            inner = self.sequence(argument[1], self.END, depth)
            if not depth or inner[2] == self.END[2]:
                return first | inner[0], ways * inner[1], products | inner[2], ambiguous or inner[3], False
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            return self.repeat(argument, state, depth + 1)
        raise ConditionError("a back reference, or what a repeat repeats, can make this take forever", self.pattern)

    def repeat(self, argument: Any, state: Any, depth: int) -> Any:
        (low, high, body), (first, ways, products, ambiguous, sure), seen = argument, state, len(self.taken)
        if depth > 6:
            raise ConditionError("repeats in a regular expression are nested deeper than 6", self.pattern)
        starts = self.sequence(body, (frozenset([""]), *self.END[1:4], False), depth)[0]
        taken = {repr(node): node for node in self.taken[seen:]}
        empty, starts = "" in starts, starts - {""}
        inner = self.sequence(body, (starts | first if high > 1 else first, *self.END[1:4], False), depth)
        undecided = low != high and (empty or bool(starts & first))
        if inner[3] and high > 20:
            raise ConditionError("nested repeats in this regular expression can take forever", self.pattern)
        products = {some + more * (high if inner[3] else 1) for some in products for more in inner[2]} | products
        ways *= inner[1] ** high if inner[3] else 1
        if high > 50 and taken:
            key = repr(sorted(taken))
            self.runs.setdefault(key, self.run(list(taken.values())))
            products = {some + (key,) for some in products} if undecided else products if sure else products | {(key,)}
            ways *= 1 if len(body) == 1 and body[0][0].name in _SETS else 10  # groups repeat more slowly than sets
        elif undecided:
            ways *= high - low + 1
        if len(products) > 100:
            raise ConditionError("this regular expression has too many open repeats", self.pattern)
        following = starts | (first if empty or low == 0 else frozenset())
        return following, ways, frozenset(products), ambiguous or inner[3] or undecided, sure and low == 0

_regex_cost = functools.lru_cache(maxsize=256)(_RegexCost)

# ---------------------------------------------------------------------------------------------------------------------
# 6. Workflow: plain values -> Workflow and Steps, validated
# A document (mapping) comes in; a Workflow goes out. Every problem is collected with its place, so that one
# `validate` shows all of them. What is compiled here (templates, conditions, defaults) is never parsed again by a run.
# ---------------------------------------------------------------------------------------------------------------------

_ID_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_LONGEST_SECONDS = 1e9  # that a clock, a lock and a socket all take; longer durations mean this
_MAX_WORKFLOW_DEPTH = 16
_type_name = _kind  # what a reader calls the type of a value: text, a number, a list ...
if TYPE_CHECKING:
    _Path = tuple[Any, ...]  # of keys and indexes, from the top of the document
    _Check = Callable[[Any], str | None]  # value -> what is wrong with it ("must be ..."), or None
    _Render = Callable[[Any], Any]
    _Test = Callable[[Any], bool]

_has_tag: _Test = lambda value: isinstance(value, str) and ("{{" in value or "<<" in value)
_is_integer: _Test = lambda value: isinstance(value, int) and not isinstance(value, bool)
_is_number: _Test = lambda value: type(value) is not bool and isinstance(value, (int, float)) and -1e300 < value < 1e300
_is_identifier: _Test = lambda value: isinstance(value, str) and bool(value) and _ID_CHARACTERS.issuperset(value)

def _seconds(value: Any, bare_unit: str) -> float | None:
    """A duration in seconds from a number (in `bare_unit`) or a text such as "1.5s" or "200ms"; None if it is none."""
    seconds = -1.0
    if isinstance(value, str) and len(value) < 40:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(ms|s|m|h)?", value.strip())
        seconds = float(match[1]) * _UNIT_SECONDS[match[2] or bare_unit] if match else seconds
    elif _is_number(value):
        seconds = value * _UNIT_SECONDS[bare_unit]
    return min(seconds, _LONGEST_SECONDS) if 0 <= seconds < 1e12 else None
def _shown(value: Any) -> str:
    """A short picture of a wrong value for an error message."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, dict)) and not value:
        return f"an empty {'list' if isinstance(value, list) else 'map'}"
    is_short = isinstance(value, (str, float)) or (_is_number(value) and abs(value) < 1e60)
    return _shorten(repr(value), 60) if is_short else _type_name(value)

def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."

def _holds_tag(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return any(map(_holds_tag, value)) if isinstance(value, (list, tuple)) else _has_tag(value)

def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]

def _must(description: str, accepts: Callable[[Any], Any], hint: Callable[[Any], str] = lambda value: "") -> _Check:
    return lambda value: None if accepts(value) else f"must be {description}, not {_shown(value)}{hint(value)}"

def _must_be_text(description: str, accepts: Callable[[str], Any]) -> _Check:
    unquoted = lambda value: "; quote it" if isinstance(value, (int, float)) else ""
    return _must(description, lambda value: isinstance(value, str) and accepts(value), unquoted)

def _number(low: float, high: float) -> _Check:
    return _must(f"a number from {low:g} to {high:g}", lambda value: _is_number(value) and low <= value <= high)

def _integer(low: int, high: int = 2**53) -> _Check:
    span = f"a whole number of at least {low}" if high == 2**53 else f"a whole number from {low} to {high}"
    return _must(span, lambda value: _is_integer(value) and low <= value <= high)

def _one_of(*names: str) -> _Check:
    near = lambda value: _suggestion(value, names)
    return _must(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names, near)

def _texts(value: Any) -> str | None:
    wrong = [text for text in _as_list(value) if not isinstance(text, str)]
    return f"must be text or a list of texts; an item {_text(wrong[0])}" if wrong else None

def _step_ids(value: Any) -> str | None:
    return "must name steps, not the empty text" if "" in _as_list(value) else _texts(value)

class _Map:
    """The check of a map: its keys, those that it needs, of `either` exactly one; `every` checks all other keys.

    Other keys are refused unless `free`; what may be a template (`templates`) is checked in the run.
    """
    def __init__(self, keys: Mapping[str, _Check], required: tuple[str, ...] = (), *, every: _Check | None = None,
            either: tuple[str, ...] = (), free: bool = False, templates: Container[str] = ()) -> None:
        self.keys, self.required, self.every = keys, required, every
        self.either, self.free, self.templates = either, free, templates

    def __call__(self, value: Any) -> str | None:
        return next((fault for _, fault in self.faults(value)), None)

    def faults(self, value: Any, defaults: Mapping[str, Any] | None = None) -> Iterator[tuple[_Path, str]]:
        """(path, message) of everything that is wrong; a key that an unknown one is meant to be is not missing."""
        if not isinstance(value, Mapping):
            yield (), f"must be a map, not {_shown(value)}"
            return
        meant: list[str] = []
        for key, item in value.items():
            check = self.keys.get(key, self.every)
            if not isinstance(key, str):
                yield (key,), f"the key {_shown(key)} must be text; quote it"
            elif check is None:
                if not self.free:
                    meant += _nearest(key, self.keys)
                    yield (key,), f"unknown key {_shown(key)}{_suggestion(key, self.keys)}"
            elif item is not None and not (key in self.templates and _has_tag(item)):
                yield from _faults(check, item, key, key)
        given = {**defaults, **value} if defaults else value
        for key in self.required:
            if given.get(key) is None and key not in meant:
                near = _nearest(key, [name for name in value if name not in self.keys]) if self.free else []
                yield tuple(near), f"unknown key {near[0]!r}, did you mean {key!r}?" if near else f"{key} is missing"
        chosen = [key for key in self.either if given.get(key) is not None]
        if len(chosen) > 1:
            yield (chosen[1],), f"give {' or '.join(chosen)}, not both"
        elif self.either and not chosen and not set(meant).intersection(self.either):
            yield (), f"{self.either[0]} is missing (or {self.either[1]})"

class _List(_Map):
    """The check of a list that is not empty, and of its items."""
    def __init__(self, items: _Check, description: str) -> None:
        self.items, self.description = items, description

    def faults(self, value: Any, defaults: Mapping[str, Any] | None = None) -> Iterator[tuple[_Path, str]]:
        if not isinstance(value, list) or not value:
            yield (), f"must be {self.description}, not {'empty' if value == [] else _shown(value)}"
            return
        for index, item in enumerate(value):
            yield from _faults(self.items, item, index, f"item {index}")

def _faults(check: _Check, value: Any, key: Any, name: str) -> Iterator[tuple[_Path, str]]:
    """What a check finds wrong with the value of a key, under the path and the name of that key."""
    for path, fault in check.faults(value) if isinstance(check, _Map) else [((), check(value))]:
        if fault:
            yield (key, *path), f"{name}{' ' if fault.startswith('must ') else ': '}{fault}"

def _pattern_fault(pattern: Any) -> str | None:
    try:
        return _text(pattern) or (_compile_regex(pattern) and None)
    except ConditionError as error:
        return f"is not supported: {error}"

_text, _name = _must_be_text("text", lambda value: True), _must_be_text("a name", str.strip)
_names = _texts
_boolean = _must("true or false", lambda value: isinstance(value, bool))
_mapping = _must("a map", lambda value: isinstance(value, Mapping))
_anything = _must("a value", lambda value: True)
_list_or_text = _must("a list", lambda value: isinstance(value, (list, str)))
_steps = _List(_anything, "a list of steps")
_condition = _must("a condition", lambda value: isinstance(value, (str, bool)))
_timeout = _must("a number of seconds above 0", lambda value: _seconds(value, "s"))
_content = _must("text or a list of parts", lambda value: isinstance(value, (str, list)))
_roles = _one_of("system", "developer", "user", "assistant", "tool")
_message = _Map({"role": _roles, "content": _content}, ("role", "content"), free=True, templates=("role",))

_COMMON_KEYS: dict[str, _Check] = {
    "id": _must_be_text("letters, digits, _ or -", _is_identifier), "type": lambda value: _one_of(*_STEP_TYPES)(value),
    "description": _text, "depends_on": _step_ids, "condition": _condition, "output": _texts,
    "timeout_seconds": _timeout, "retry": _mapping, "continue_on_error": _boolean,
    "max_concurrency": _integer(1, 100_000),
    "trigger_rule": _one_of("none_failed_min_one_success", "all_success", "one_success", "all_done", "one_failed"),
    "for_each": _must("a list, a map or a template", lambda v: isinstance(v, (list, Mapping)) or _has_tag(v)),
}
_PLUGINS = {  # keys that name what may come with a run, and the argument of WorkflowExecutor that brings it
    "provider": "providers", "tools": "tools", "database": "vector_stores", "function": "transforms",
    "action": "actions",
}

class _StepType:
    """A row of the table of step types: its own keys, which of them it needs (of `either` exactly one), and which are
    no templates (`literal`); whether other keys are parameters (`free`) and whether it holds no slot, because it runs
    child steps or waits for somebody (`container`). It has `arity` outputs; 0: as its children or its callee name them.
    """
    def __init__(self, keys: dict[str, _Check], required: tuple[str, ...] = (), arity: int = 1, free: bool = False,
            container: bool = False, literal: tuple[str, ...] = (), either: tuple[str, ...] = ()) -> None:
        self.keys, self.arity, self.free, self.container = keys, arity, free, container
        self.literal, self.plugins = frozenset(literal), [key for key in keys if key in _PLUGINS]
        checks, templates = {**_COMMON_KEYS, **keys}, frozenset(keys) - self.literal
        self.shape = _Map(checks, ("id", "type", *required), either=either, free=free, templates=templates)
        defaults = {key: checks[key] for key in checks if key not in ("id", "type", "depends_on", "output")}
        self.default_shape = _Map(defaults, free=free, templates=templates)

_SAMPLING_KEYS: dict[str, _Check] = {
    "temperature": _number(0, 2), "max_tokens": _integer(1), "top_p": _number(0, 1), "top_k": _integer(0),
    "stop": _texts, "seed": _integer(-(2**63), 2**63), "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
}
_EMBED_KEYS = {
    "provider": _name, "model": _text, "dimensions": _integer(1, 100_000), "input_type": _text,
    "batch_size": _integer(1, 10_000), "params": _mapping,
}
_VECTOR_KEYS = {"database": _name, "index": _text, "namespace": _text, "embed": _mapping}
_FALLBACK = _List(_Map({"provider": _name, "model": _text}, ("provider",)), "a list of {provider, model}")

_STEP_TYPES: dict[str, _StepType] = {
    "llm": _StepType(
        {
            "provider": _name, "model": _text, "prompt": _text, "system": _text, **_SAMPLING_KEYS, "stream": _boolean,
            "messages": _List(_message, "a list of {role, content}"), "fallback": _FALLBACK, "params": _mapping,
            "schema": _must("a JSON Schema or a file", lambda value: isinstance(value, (Mapping, str))),
            "schema_retries": _integer(0, 20), "tools": _texts, "max_tool_rounds": _integer(1, 100), "cache": _boolean,
        },
        ("provider", "model"), 4, either=("prompt", "messages"), literal=("provider", "schema", "tools", "fallback")),
    "embed": _StepType(
        {**_EMBED_KEYS, "input": _texts, "cache": _boolean}, ("provider", "model", "input"), 2, literal=("provider",)),
    "vector_search": _StepType(
        {
            **_VECTOR_KEYS, "top_k": _integer(1, 100_000), "filter": _mapping, "include_metadata": _boolean,
            "include_vectors": _boolean, "query": _must("text or a list of numbers", lambda value: (
                isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_number, value))))),
        },
        ("database", "index", "query"), 2, literal=("database", "embed")),
    "vector_upsert": _StepType(
        {**_VECTOR_KEYS, "documents": _list_or_text, "vectors": _list_or_text}, ("database", "index"),
        literal=("database", "embed")),
    "transform": _StepType(
        {"function": _name, "inputs": _must("a list of names or a map", lambda v: isinstance(v, (list, str, Mapping)))},
        ("function",), free=True, literal=("function", "inputs")),
    "action": _StepType({"action": _name}, ("action",), free=True, literal=("action",)),
    "approval": _StepType({"message": _text}, container=True),
    "parallel": _StepType({"tasks": _steps}, ("tasks",), 0, container=True, literal=("tasks",)),
    "branch": _StepType(
        {"branches": _must("a map of value: steps", lambda value: isinstance(value, Mapping) and bool(value))},
        ("condition", "branches"), 0, container=True, literal=("branches",)),
    "loop": _StepType(
        {"steps": _steps, "until": _condition, "max_iterations": _integer(1, 1_000_000),
         "on_exhausted": _one_of("fail", "continue")},
        ("steps", "until", "max_iterations"), 0, container=True,
        literal=("steps", "until", "max_iterations", "on_exhausted")),
    "workflow": _StepType(
        {"workflow": _must("a file or a workflow", lambda v: isinstance(v, (str, Mapping))), "inputs": _mapping},
        ("workflow",), 0, container=True, literal=("workflow",)),
}
_UNKNOWN_TYPE = _StepType({}, arity=0, free=True)

_INPUT_TYPES: dict[str, _Test] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: _is_integer(value) or (isinstance(value, float) and value.is_integer()),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and value - value == 0,
    "boolean": lambda value: isinstance(value, bool),
    "array": lambda value: isinstance(value, (list, tuple)), "object": lambda value: isinstance(value, Mapping),
    "any": lambda value: True,
}
_INPUT_TYPE_ALIASES = {
    "str": "string", "text": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array",
    "dict": "object", "map": "object",
}
_INPUT = _Map({"type": _one_of(*_INPUT_TYPES, *_INPUT_TYPE_ALIASES), "required": _boolean, "default": _anything,
    "enum": _List(_anything, "a list of values"), "description": _text})
_PROVIDER = _Map({"type": lambda value: _one_of(*PROVIDERS)(value), "base_url": _text, "api_key_env": _name,
    "headers": _mapping, "timeout_seconds": _timeout, "rate_limit": lambda value: _Map(_RATE_LIMIT_KEYS)(value),
    "proxy": _text, "circuit_breaker": lambda value: _Map(_CIRCUIT_BREAKER_KEYS)(value), "options": _mapping})
_WORKFLOW_KEYS: dict[str, _Check] = {
    "name": _name, "version": _must("text or a number", lambda value: isinstance(value, str) or _is_number(value)),
    "description": _text, "inputs": _Map({}, every=_INPUT), "providers": _Map({}, every=_PROVIDER),
    "defaults": _Map({kind: row.default_shape for kind, row in _STEP_TYPES.items()}), "steps": _steps,
    "outputs": _Map({}, every=_anything), "partials": _Map({}, every=_text), "max_concurrency": _integer(1, 100_000),
    "timeout_seconds": _timeout, "fail_fast": _boolean, "metadata": _mapping,
    "budget": _Map({"max_tokens": _integer(1), "max_calls": _integer(0), "max_cost": _number(0, 1e12)}),
    "pricing": _Map({}, every=_Map({"input": _number(0, 1e9), "output": _number(0, 1e9)})),
    "id": _anything,  # the original writes one when it serialises a workflow; it has no meaning here
}

class Step:
    """One step of a workflow, as in the document: `Step(id="greet", type="llm", provider="openai", ...)`.

    Keyword arguments are the document's keys, and attributes that may be set; child steps may be Step objects too.
    Nothing is checked before the workflow is validated. `config` holds the keys that belong to the type.
    """
    __slots__ = ("document",)

    def __init__(self, id: str, type: str, **keys: Any) -> None:
        self.document: dict[str, Any] = _plain({"id": id, "type": type, **keys})

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Step:
        """A Step from one entry of a document's `steps`; a missing id or type is found by validation."""
        if not isinstance(document, Mapping):
            raise ValidationError(f"a step must be a map, not {_shown(document)}")
        return cls._of(_plain(document))

    @classmethod
    def _of(cls, document: dict[str, Any]) -> Step:
        step = cls.__new__(cls)
        step.document = document
        return step

    def __getattr__(self, name: str) -> Any:
        if name != "document" and (name in _COMMON_KEYS or name in self.document):
            value = self.document.get(name)
            return _as_list(value) if name in ("depends_on", "output") else value
        raise AttributeError(f"a Step has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        whole = name == "document"
        super().__setattr__("document", value if whole else {**self.document, name: _plain(value)})

    @property
    def config(self) -> dict[str, Any]:
        """The keys that are not common to all steps: provider, prompt, function ..."""
        return {key: value for key, value in self.document.items() if key not in _COMMON_KEYS}

    def to_dict(self) -> dict[str, Any]:
        """The step as it stands in a document."""
        return _plain(self.document)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"Step(id={self.document.get('id')!r}, type={self.document.get('type')!r})"

def _plain(value: Any, depth: int = 0) -> Any:
    """A copy made of dict, list and what they hold; Step and Workflow objects become their documents."""
    if isinstance(value, (str, int, float)) or value is None:
        return value
    if depth > _MAX_DEPTH:
        raise ValidationError(f"a value is nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, (Step, Workflow)):
        return _plain(value.document if isinstance(value, Step) else value._whole(), depth)
    if isinstance(value, Mapping):
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    return [_plain(item, depth + 1) for item in value] if isinstance(value, (list, tuple)) else value

class Workflow:
    """A workflow: its document's keys as attributes, and `steps`, a list of Step that may be extended.

    `from_file`, `from_yaml`, `from_json` and `from_dict` raise ParseError for text that cannot be read and
    ValidationError for a document whose shape is wrong (keys, types, templates). Wrong references and cycles are
    reported by `validate()`, by WorkflowDAG and by WorkflowExecutor.
    """
    source = "workflow"  # shown before the problems; a file's name if there is one
    folder: str | None = None  # where relative paths (sub-workflows, schemas) start
    _source_text = ""
    _compiled: _Plan | None = None
    _chain: tuple[str, ...] = ()  # the files of the workflows that call it, outermost first, and its own

    def __init__(self, name: str, steps: Iterable[Step | Mapping[str, Any]] = (), **keys: Any) -> None:
        self._document: dict[str, Any] = _plain({"name": name, **keys})
        if not hasattr(steps, "__iter__"):
            raise ValidationError(f"steps must be a list of steps, not {_shown(steps)}")
        self.steps = [step if isinstance(step, Step) else Step.from_dict(step) for step in steps]
        self._loaded: dict[str, Workflow] = {}  # sub-workflows by real path, shared by all that call each other

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _WORKFLOW_KEYS and name != "steps":
            self._document[name], self._compiled = _plain(value), None
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in _WORKFLOW_KEYS:
            defaults: dict[str, Any] = {"version": "1.0", "timeout_seconds": 3600, "fail_fast": False, "metadata": {}}
            return self._document.get(name, defaults.get(name))
        raise AttributeError(f"a Workflow has no attribute {name!r}")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Workflow:
        """The workflow in a YAML or JSON file (by its ending). OrchestratorError if it cannot be read."""
        return cls._from_path(str(path), {})

    @classmethod
    def from_yaml(cls, text: str | bytes) -> Workflow:
        """The workflow in a YAML text (so also in a JSON text)."""
        return cls._from_text(text, load_yaml)

    @classmethod
    def from_json(cls, text: str | bytes) -> Workflow:
        """The workflow in a JSON text."""
        return cls._from_text(text, _load_json)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Workflow:
        """The workflow in a mapping, shaped as the document is."""
        return cls._from_document(_plain(document), "workflow")._shaped()

    @classmethod
    def _from_path(cls, path: str, loaded: dict[str, Workflow], chain: tuple[str, ...] = ()) -> Workflow:
        return cls._from_text(_read_file(path), None, path, os.path.dirname(os.path.abspath(path)), loaded, chain)

    @classmethod
    def _from_text(cls, text: str | bytes, load: Callable[[Any], Any] | None, source: str = "workflow",
            folder: str | None = None, loaded: dict[str, Workflow] | None = None,
            chain: tuple[str, ...] = ()) -> Workflow:
        workflow = cls._from_document(_parsed(text, source, load), source)
        workflow.folder, workflow._source_text = folder, _decoded(text)
        workflow._chain = (*chain, os.path.basename(source))
        if folder is not None and loaded is not None:
            workflow._loaded = loaded
            loaded[os.path.realpath(source)] = workflow  # before it is compiled: it may call itself
        return workflow._shaped()

    @classmethod
    def _from_document(cls, document: Any, source: str) -> Workflow:
        """The workflow in a mapping, not yet compiled; nothing is copied."""
        if not isinstance(document, dict):
            message = f"a workflow must be a map with a name and steps, not {_type_name(document)}"
            raise ValidationError([Problem(message, (), 1, 1, source)])
        workflow = cls("")
        workflow.source, workflow._document = source, document
        if isinstance(document.get("steps"), list) and document["steps"]:
            workflow._document = {key: value for key, value in document.items() if key != "steps"}
            workflow.steps = [Step._of(step) if isinstance(step, dict) else step for step in document["steps"]]
        return workflow

    def _shaped(self) -> Workflow:
        """This workflow, compiled; ValidationError if it is misshapen."""
        if self._plan().misshapen:
            raise ValidationError(self._located(self._plan().errors))
        return self

    def _documents(self) -> list[Any]:
        return [step.document if isinstance(step, Step) else step for step in self.steps]

    def _whole(self) -> dict[str, Any]:
        """The document with its steps; they are not copied."""
        return {**self._document, "steps": self._documents()} if self.steps else self._document

    def to_dict(self) -> dict[str, Any]:
        """The document, as plain values."""
        return _plain(self._whole())  # type: ignore[no-any-return]

    def to_yaml(self) -> str:
        """The document as YAML, from which `from_yaml` reads it. OrchestratorError if a value is not JSON-like."""
        return _dump_yaml(self.to_dict())

    def to_json(self, indent: int | None = 2) -> str:
        """The document as JSON, from which `from_json` reads it. OrchestratorError if a value is not JSON-like."""
        try:
            return _to_json(self.to_dict(), indent=indent)
        except (TypeError, ValueError) as error:
            raise OrchestratorError(f"the workflow cannot be written as JSON: {error}") from None

    def step(self, step_id: str) -> Step:
        """The top-level step with this id; KeyError if there is none."""
        by_id = {step.id: step for step in self.steps[::-1] if isinstance(step, Step) and isinstance(step.id, str)}
        return by_id[step_id]

    def validate(self) -> list[Problem]:
        """Checks everything that can be known before a run and returns the warnings. Raises ValidationError (DagError
        if there is a cycle) with every problem in `problems`, in document order."""
        plan = self._plan()
        if errors := self._located(plan.errors):
            cycle = next((problem.cycle for problem in errors if problem.cycle), None)
            raise DagError(errors, cycle) if cycle else ValidationError(errors)
        return self._located(plan.problems)

    def _plan(self) -> _Plan:
        """The compiled form; made anew only when a step has changed."""
        plan, documents = self._compiled, self._documents()
        if plan is None or len(plan.documents) != len(documents) or not all(map(is_, plan.documents, documents)):
            self._compiled = plan = _Plan(self)
        return plan

    def _located(self, problems: list[Problem]) -> list[Problem]:
        """The problems in document order, with lines and columns if there is a text, which is read for them again."""
        if not problems:
            return []
        text = self._source_text
        places: Any = _positions(text) if text else {path: (i, 0) for i, path in enumerate(_paths(self._whole(), ()))}
        ranks, lines, known = [], text.split("\n"), {}  # type: list[Any], list[str], dict[Any, Any]
        for problem in problems:
            problem.source, path = self.source, problem.path
            while path and path not in places:
                path = path[:-1]
            rank = places.get(path, (1, 1) if text else (-1, 0))
            if text:
                if problem.inside and path == problem.path:
                    rank = _exact_place(lines, rank, *problem.inside, known)
                problem.line, problem.column = rank
            ranks.append(rank)
        return [problems[i] for i in sorted(range(len(problems)), key=ranks.__getitem__)]

    def __repr__(self) -> str:
        return f"Workflow(name={self._document.get('name')!r}, steps={len(self.steps)})"

def _paths(value: Any, path: _Path) -> Iterator[_Path]:
    """The paths of all keys and items in a value, in its order."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(item, (dict, list)):
            yield from _paths(item, (*path, key))

def _exact_place(lines: list[str], place: tuple[int, int], template: str, position: int,
                 known: dict[Any, Any]) -> tuple[int, int]:
    """The place of a position within a template whose key is at a line and column: there, or in the block below it.
    `known` keeps where lines of templates begin and were found, as many problems may stand in one."""
    from bisect import bisect_right
    starts = known.get(template)
    if starts is None:
        starts = known[template] = [0, *(match.end() for match in re.finditer("\n", template))]
    (line, column), row = place, bisect_right(starts, position) - 1
    start, key = starts[row], (place, template, row)
    if key not in known:
        wanted = template[start : starts[row + 1] - 1 if row + 1 < len(starts) else None]
        tried = ((line - 1 + row, 0 if row else column - 1), (line + row, 0)) if wanted.strip() else ()
        found = ((index, lines[index].find(wanted, first)) for index, first in tried if index < len(lines))
        known[key] = next(((index + 1, at + 1) for index, at in found if at >= 0), None)
    return (known[key][0], known[key][1] + position - start) if known[key] else place

def _read_file(path: str | os.PathLike[str]) -> bytes:
    """A file's bytes; OrchestratorError in the operating system's words if there are none to be had."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OrchestratorError(f"{os.fspath(path)}: cannot be read: {reason}") from None

def _parsed(text: str | bytes, source: str, load: Callable[[Any], Any] | None = None) -> Any:
    """The plain value in a text: as `load` reads it, or else as JSON or YAML by the ending of its file."""
    try:
        return (load or (_load_json if source.lower().endswith(".json") else load_yaml))(text)
    except ParseError as error:
        error.source = source
        raise

class _Node:
    """A compiled step: everything a run needs, nothing left to parse."""
    condition = picker = until = None  # type: Condition | None
    item_condition = False  # the condition looks at the item, so it is asked once per item
    for_each: _Render | None = None
    inputs = item_values = ()  # type: Sequence[tuple[str, _Render]]  # of a transform; what it renders for each item
    local = defaulted = frozenset()  # type: frozenset[str]  # names that only it sees; keys that `defaults` gave it
    children, workflow = None, None  # type: _Graph | None, Workflow | None
    timeout, limit = None, None  # type: float | None, int | None
    inline = retry_given = continue_on_error = False  # a built-in transform runs inline: it never waits
    rule = "none_failed_min_one_success"
    output_names: tuple[str, ...] = ()
    known: dict[str, _Node | None] | None = None
    given: dict[str, Any] | None = None  # the parameters of a built-in transform, if they are known to be right

    def __init__(self, document: Mapping[str, Any], path: _Path, position: int) -> None:
        self.document, self.path, self.position = document, path, position
        names = map(document.get, ("id", "type"))
        self.id, self.type = (name if isinstance(name, str) else _shown(name) for name in names)
        self.constants: dict[str, Any] = {}  # keys whose value never changes
        self.values: list[tuple[str, _Render]] = []  # keys that are rendered for each run
        self.references: list[tuple[Any, str]] = []  # (*Reference, path, source of the text), key: what its texts read
        self.dependencies: dict[str, None] = {}  # ids of siblings, in order
        self.dependents: list[int] = []
        self.branches: dict[str, _Graph] = {}
        self.retry = _NO_RETRY

    def groups(self) -> list[tuple[str, _Graph]]:
        """The graphs of a container's children, each with its title: the value that a branch is taken for, or ""."""
        return [*([("", self.children)] if self.children is not None else ()), *self.branches.items()]

    def graphs(self) -> list[_Graph]:
        return [graph for _, graph in self.groups()]

    def names(self) -> dict[str, _Node | None]:
        """What may follow `steps.ID.`, so far as it is known before a run: outputs, and steps inside this one."""
        if self.known is None:
            called = self.workflow and self.workflow._compiled
            self.known = dict.fromkeys(self.output_names)
            for graph in (*self.graphs(), *([called.graph] if called else ())):
                self.known.update(graph.by_id)
        return self.known

class _Graph:
    """Sibling steps, how they depend on each other, and what their templates may refer to: these steps, those around
    the container, and names. `counts[i]` is the number of dependencies of `nodes[i]`."""
    def __init__(self, inputs: Mapping[str, Any] | None = None) -> None:
        self.inputs = inputs  # those that are declared, if any are
        self.local: frozenset[str] = frozenset()  # other names
        self.owner: _Node | None = None  # the container that these steps are in
        self.around: tuple[_Graph, ...] = ()  # nearest first
        self.nodes: list[_Node] = []
        self.by_id: dict[str, _Node] = {}
        self.named: dict[str, list[str]] = {}  # output name -> the ids of the steps that have it
        self.producers: dict[str, str] = {}  # output name -> the id of the one step that has it
        self.counts, self.roots = [], []  # type: list[int], list[int]

    def inside(self, owner: _Node, local: frozenset[str] = frozenset()) -> _Graph:
        """A graph for the children of one of these steps, that see some more names."""
        inner = _Graph(self.inputs)
        inner.owner, inner.around, inner.local = owner, (self, *self.around), self.local | owner.local | local
        return inner

    def visible(self) -> Iterator[str]:
        return (step_id for graph in (self, *self.around) for step_id in graph.by_id)

    def walk(self) -> Iterator[_Node]:
        """Every node, containers before their children."""
        for node in self.nodes:
            yield node
            for graph in node.graphs():
                yield from graph.walk()

def _part_of_scope(template: Template, context: Any) -> Any:
    """The value of a template that may be all that templates see, or all steps: that would come to hold itself."""
    value = template.evaluate(context)
    if value is context or value is context.get("steps"):
        raise TemplateError(f"{template.source.strip()} is more than a value: name a part of it")
    return value

_STEP_FACTS = ("output", "status", "error")  # what steps.ID has besides its outputs
_ITEM_NAMES, _LOOP_NAMES = frozenset(("item", "index", "key")), frozenset(("iteration", "previous"))
_MOST_SUGGESTIONS = 50  # for names from long lists; more would take long and help nobody

class _Plan:
    """A workflow compiled: its graph, its outputs, and every problem that was found on the way."""
    def __init__(self, workflow: Workflow) -> None:
        self.workflow, self.document, self.documents = workflow, workflow._whole(), workflow._documents()
        self.found: dict[tuple[_Path, str], Problem] = {}
        self.misshapen = False  # the document has no meaning, so that loading it fails
        self.graphs: list[_Graph] = []
        self.check(_Map(_WORKFLOW_KEYS, ("name", "steps")), self.document, ())
        self.defaults = {kind: keys for kind, keys in self.section("defaults").items() if isinstance(keys, dict)}
        self.plugins: dict[str, Any] = {
            "provider": {**PROVIDERS, **self.section("providers")}, "tools": {}, "database": VECTOR_STORES,
            "function": _TRANSFORMS, "action": _ACTIONS,
        }
        inputs = {name: entry if isinstance(entry, dict) else {} for name, entry in self.section("inputs").items()}
        for name, entry in inputs.items():
            if entry.get("default") is not None and (fault := _input_fault(entry["default"], entry)):
                self.misshape(("inputs", name, "default"), f"inputs: {name}: the default {fault}")
        partials = {name: text for name, text in self.section("partials").items() if isinstance(text, str)}
        self.partials = _Partials(partials, True, None)
        for name, text in partials.items():
            if self.guarded(("partials", name), f"partials: {name}", Template, text, True, self.partials) is None:
                self.partials[name] = ""  # it is reported here, and not by each template that uses it
        self.graph = _Graph(inputs if isinstance(self.document.get("inputs"), dict) else None)
        self.steps(self.document.get("steps"), ("steps",), self.graph)
        for siblings in self.graphs:
            for node in siblings.nodes:
                self.connect(node, siblings)
        for siblings in self.graphs:
            self.link(siblings)
        holder = _Node({"id": ""}, ("outputs",), 0)  # the run's own outputs are rendered when every step has ended
        self.outputs: list[tuple[str, _Render]] = []
        for name, text in self.section("outputs").items():
            self.outputs.append((name, self.render(holder, f"outputs: {name}", text, ("outputs", name))))
        self.resolve(holder, self.graph)
        self.problems = list(self.found.values())
        self.errors = [problem for problem in self.problems if problem.severity == "error"]

    @functools.cached_property
    def needs(self) -> dict[tuple[str, str], list[_Path]]:
        """The providers, vector databases and approvals that steps need: (kind, name) -> where."""
        found: dict[tuple[str, str], list[_Path]] = {}
        for node in self.graph.walk():
            if node.type == "approval":
                found.setdefault(("approval", ""), []).append(node.path)
            entries: list[tuple[_Path, Any]] = [((), node.constants), (("embed",), node.constants.get("embed") or {})]
            entries += [(("fallback", i), one) for i, one in enumerate(_as_list(node.constants.get("fallback")))]
            for path, entry in entries:
                if isinstance(entry.get("provider"), str):
                    found.setdefault(("provider", entry["provider"]), []).append((*node.path, *path, "provider"))
            if isinstance(node.constants.get("database"), str):
                found.setdefault(("database", node.constants["database"]), []).append((*node.path, "database"))
        return found

    def section(self, name: str) -> dict[str, Any]:
        """A map of the document, so far as it is one with texts as keys."""
        entries = self.document.get(name)
        return {key: entries[key] for key in entries if isinstance(key, str)} if isinstance(entries, dict) else {}

    def problem(self, path: _Path, message: str, severity: str = "error",
            inside: tuple[str, int] | None = None) -> Problem:
        found = Problem(_label(self.document, path) + message, path, severity=severity)
        found.inside = inside
        return self.found.setdefault((path, found.message), found)

    def misshape(self, path: _Path, message: str, inside: tuple[str, int] | None = None) -> None:
        """A problem that leaves the document without a meaning, so that loading it fails."""
        self.misshapen = True
        self.problem(path, message, inside=inside)

    def near(self, name: str, known: Iterable[str]) -> str:
        """A suggestion, unless many have been made: looking through long lists takes long."""
        return _suggestion(name, known) if len(self.found) < _MOST_SUGGESTIONS else ""

    def check(self, shape: _Map, mapping: Any, path: _Path, defaults: Mapping[str, Any] | None = None) -> None:
        for inner, fault in shape.faults(mapping, defaults):
            self.misshape((*path, *inner), fault)

    def guarded(self, path: _Path, key: str, compile_it: Callable[..., Any], source: Any, *arguments: Any) -> Any:
        """What a compiler (of templates, conditions ...) makes of the source; None with a problem if it refuses it."""
        try:
            return compile_it(source, *arguments)
        except (TemplateError, ExecutionError) as error:
            inside = (source, getattr(error, "position", 0)) if isinstance(source, str) else None
            self.misshape(path, f"{key}: {error}", inside)
            return None

    def steps(self, documents: Any, path: _Path, graph: _Graph) -> _Graph:
        """Fills a graph with sibling steps. It is connected later, when the outputs of all steps are known."""
        for index, document in enumerate(documents if isinstance(documents, list) else ()):
            if not isinstance(document, dict):
                self.misshape((*path, index), f"a step must be a map, not {_shown(document)}")
                continue
            node = _Node(document, (*path, index), len(graph.nodes))
            graph.nodes.append(node)
            if "id" in document and graph.by_id.setdefault(node.id, node) is not node:
                first = graph.by_id[node.id].path
                self.problem((*node.path, "id"), f"duplicate id {node.id!r}: {first[-2]}[{first[-1]}] has it already")
        for node in graph.nodes:
            self.step(node, graph)
            for name in node.output_names:
                graph.named.setdefault(name, []).append(node.id)
        graph.producers = {name: ids[0] for name, ids in graph.named.items() if len(ids) == 1}
        self.graphs.append(graph)
        return graph

    def step(self, node: _Node, graph: _Graph) -> None:
        document, row = node.document, _STEP_TYPES.get(node.type, _UNKNOWN_TYPE)
        defaults = self.defaults.get(node.type)
        self.check(row.shape, document, node.path, defaults)
        if defaults:
            node.defaulted = frozenset(defaults).difference(document)
            node.document = document = {**defaults, **document}
        self.common_keys(node, row)
        for key, value in document.items():
            if key in row.literal:
                if key != "inputs":  # a transform's are compiled when it is connected
                    node.constants[key] = value
            elif key in _COMMON_KEYS or not isinstance(key, str) or (value is None and not row.free):
                continue
            elif key == "template" and node.type == "transform" and document.get("function") in ("map", "template"):
                node.item_values = [*node.item_values, (key, self.render(node, key, value))]
            elif render := self.compiled(node, key, value, self.place(node, key)):
                node.values.append((key, render))
            else:
                node.constants[key] = value
        for key in row.plugins:
            self.known_plugin(node, key)
        specific = getattr(self, f"_{node.type}", None) if row is not _UNKNOWN_TYPE else None
        if specific is not None:
            specific(node, document, graph)

    def place(self, node: _Node, key: str) -> _Path:
        """Where a key of a step stands: in the step, or in the workflow's `defaults`."""
        return ("defaults", node.type, key) if key in node.defaulted else (*node.path, key)

    def common_keys(self, node: _Node, row: _StepType) -> None:
        document = node.document
        if document.get("for_each") is not None:
            node.local, node.for_each = _ITEM_NAMES, self.render(node, "for_each", document["for_each"])
        source, place = document.get("condition"), self.place(node, "condition")
        if isinstance(source, (str, bool)) and (condition := self.guarded(place, "condition", Condition, source)):
            roots = {reference[0][0] for reference in condition.references if reference[0]}
            if node.type == "branch":
                node.picker = condition
            elif document.get("function") == "filter" and not node.for_each and (
                    "item" in roots or document.get("key") is None):
                node.local, node.item_values = _ITEM_NAMES, [("condition", condition.evaluate)]
            else:
                node.condition, node.item_condition = condition, not roots.isdisjoint(node.local)
            self.note(node, condition, "condition", place)
        if row.arity or row is _UNKNOWN_TYPE:  # a container's are named by its children
            self.name_outputs(node, ("output",) if row.arity else (), row.arity or 100)
        node.timeout = _seconds(document.get("timeout_seconds"), "s")
        node.continue_on_error = document.get("continue_on_error") is True
        node.rule, node.limit = document.get("trigger_rule") or node.rule, document.get("max_concurrency")
        if "max_concurrency" in document and not (node.for_each or node.type == "parallel" or node.defaulted):
            self.problem((*node.path, "max_concurrency"), "max_concurrency belongs to for_each and the type parallel")
        if not row.container:
            node.retry = _DEFAULT_RETRY
        if isinstance(document.get("retry"), dict):
            node.retry_given = True
            try:
                node.retry = RetryPolicy.from_dict(document["retry"])
            except ValidationError as error:
                for problem in error.problems:
                    self.misshape((*self.place(node, "retry"), *problem.path), problem.message)

    def name_outputs(self, node: _Node, names: Sequence[str], most: int) -> None:
        """The outputs of a step have the names that are given, in order; otherwise these."""
        given = [name for name in _as_list(node.document.get("output")) if isinstance(name, str)]
        path = (*node.path, "output")
        for name in given:
            if not _is_identifier(name):
                self.misshape(path, f"output {_shown(name)} must be letters, digits, _ or -")
        if len(set(given)) < len(given):
            self.misshape(path, "output gives one name twice")
        if len(given) > most:
            self.misshape(path, f"{node.type} has {most} output{'s' * (most > 1)}, but {len(given)} are named")
        if len(set(names)) < len(names):  # a branch's child `branch`, a loop's child `iterations`
            double = next(name for name in names if names.count(name) > 1)
            self.problem(node.path, f"a child of a {node.type} cannot be called {double!r}: an output has that name")
        node.output_names = tuple(given or names)

    def render(self, node: _Node, key: str, value: Any, path: _Path | None = None) -> _Render:
        """The value of a key as a function of the context."""
        return self.compiled(node, key, value, path or self.place(node, key)) or _constant(value)

    def compiled(self, node: _Node, key: str, value: Any, path: _Path) -> _Render | None:
        """A value as a function of the context, if there are templates in it; what they read is noted on the node."""
        if isinstance(value, str):
            template = self.guarded(path, key, Template, value, True, self.partials) if _has_tag(value) else None
            if template is None:
                return None
            self.note(node, template, key, path)
            if template.is_expression and re.search(r"this|@root|(?<![\w\]])\.(?![\w\[/.])", value):
                return functools.partial(_part_of_scope, template)
            return template.evaluate  # type: ignore[no-any-return]
        if not isinstance(value, (dict, list)) or not _holds_tag(value):
            return None
        keys = list(value) if isinstance(value, dict) else range(len(value))
        items = [(at, self.render(node, key, value[at], (*path, at))) for at in keys]
        if isinstance(value, dict):
            return lambda context: {at: render(context) for at, render in items}
        return lambda context: [render(context) for _, render in items]

    def note(self, node: _Node, source: Template | Condition, key: str, path: _Path) -> None:
        node.references += [((*reference, path, source.source), key) for reference in source.references]

    def known_plugin(self, node: _Node, key: str) -> None:
        argument, table = _PLUGINS[key], self.plugins[key]
        for name in _as_list(node.constants.get(key)):
            if isinstance(name, str) and name not in table:
                what, near = f"the {argument[:-1]} {name!r}", _suggestion(name, table)
                message = f"{what} is unknown here{near}; a run needs it from --plugin or {argument}={{...}}"
                self.problem(self.place(node, key), message, "warning").custom = (argument, name)

    def _llm(self, node: _Node, document: Mapping[str, Any], graph: _Graph) -> None:
        schema, place = document.get("schema"), self.place(node, "schema")
        try:
            if isinstance(schema, str):
                path = os.path.join(self.workflow.folder or ".", schema)
                node.constants["schema"] = loaded = _parsed(_read_file(path), path)
                if not isinstance(loaded, dict):
                    self.misshape(place, f"schema: {schema} must hold a map, not {_shown(loaded)}")
            if isinstance(node.constants.get("schema"), dict):
                _check_schema(node.constants["schema"])
        except ExecutionError as error:
            self.misshape(place, str(error))
        except OrchestratorError as error:
            self.misshape(place, f"schema: {error}")

    def _vector_search(self, node: _Node, document: Mapping[str, Any], graph: _Graph) -> None:
        query, documents = document.get("query"), document.get("documents")
        if isinstance(document.get("embed"), Mapping):
            self.check(_Map(_EMBED_KEYS, ("provider", "model")), document["embed"], (*node.path, "embed"))
        elif documents is not None or (isinstance(query, str)
                and not re.fullmatch(r"(?s)\s*(\{\{.*\}\}|<<.*>>)\s*", query)):
            needed = "documents need" if documents is not None else "query is text and needs"
            self.misshape(node.path, f"{needed} embed: {{provider, model}} to become vectors")
        if isinstance(document.get("filter"), Mapping) and not _holds_tag(document["filter"]):
            self.guarded((*node.path, "filter"), "filter", _predicate, document["filter"])
        if node.type == "vector_upsert" and (documents is None) == (document.get("vectors") is None):
            self.misshape(node.path, "give documents or vectors, one of the two")

    _vector_upsert = _vector_search

    def parameters(self, node: _Node, document: Mapping[str, Any], name: Any) -> None:
        """Checks those of a built-in transform or action, so far as they are known."""
        shape = _PARAMETERS.get(name) if isinstance(name, str) else None
        if shape is None:
            return
        own = _STEP_TYPES[node.type].shape.keys
        given = {key: value for key, value in document.items() if key not in own}
        given.update(dict.fromkeys((key for key, _ in node.item_values), True))
        for key in [key for key in given if key not in shape.keys]:
            if isinstance(key, str) and (near := self.near(key, [one for one in shape.keys if one not in given])):
                self.problem(self.place(node, key), f"{name} has no parameter {_shown(key)}{near}", "warning")
            del given[key]
        faults = [*_Map(shape.keys, shape.required, either=shape.either, templates=shape.keys).faults(given)]
        for path, fault in faults:
            place = self.place(node, path[0]) if path else node.path
            self.problem(place, f"{name}: {fault}: the step will fail", "warning")
        if not faults and not any(map(_holds_tag, given.values())):
            node.given = _checked(name, given)

    def _action(self, node: _Node, document: Mapping[str, Any], graph: _Graph) -> None:
        self.parameters(node, document, document.get("action"))

    def _transform(self, node: _Node, document: Mapping[str, Any], graph: _Graph) -> None:
        self.parameters(node, document, document.get("function"))
        node.inline = isinstance(function := document.get("function"), str) and function in _TRANSFORMS
        if function == "map":
            node.local |= _ITEM_NAMES
        if function == "template":  # its inputs are names in the template
            inputs = document.get("inputs")
            names = inputs if isinstance(inputs, dict) else _as_list(inputs)
            node.local |= {name for name in names if isinstance(name, str)}

    def _parallel(self, node: _Node, document: Mapping[str, Any], graph: _Graph) -> None:
        node.children = self.steps(document.get("tasks"), (*node.path, "tasks"), graph.inside(node))
        self.name_outputs(node, list(node.children.by_id), len(node.children.by_id))

    def _branch(self, node: _Node, document: Mapping[str, Any], graph: _Graph) -> None:
        branches = document.get("branches")
        for value, steps in branches.items() if isinstance(branches, dict) else ():
            path = (*node.path, "branches", value)
            if not isinstance(steps, list):
                self.misshape(path, f"branches: {_shown(value)} must be a list of steps, not {_shown(steps)}")
            if not (isinstance(value, (str, bool)) or value is None or _is_number(value)):
                self.misshape(path, f"branches: the key {_shown(value)} must be text; quote it")
                continue
            if _branch_key(value) in node.branches:
                self.misshape(path, f"branches: {_shown(value)} stands there twice")
            node.branches[_branch_key(value)] = self.steps(steps, path, graph.inside(node))
        names = ["branch", *dict.fromkeys(step_id for inner in node.branches.values() for step_id in inner.by_id)]
        self.name_outputs(node, names, len(names))

    def _loop(self, node: _Node, document: Mapping[str, Any], graph: _Graph) -> None:
        node.children = self.steps(document.get("steps"), (*node.path, "steps"), graph.inside(node, _LOOP_NAMES))
        if isinstance(document.get("until"), (str, bool)):
            node.until = self.guarded(self.place(node, "until"), "until", Condition, document["until"])
        if node.until:
            self.note(node, node.until, "until", self.place(node, "until"))
        self.name_outputs(node, [*node.children.by_id, "iterations"], len(node.children.by_id) + 1)

    def _workflow(self, node: _Node, document: Mapping[str, Any], graph: _Graph) -> None:
        target, path = document.get("workflow"), self.place(node, "workflow")
        if _has_tag(target):  # known only when it runs
            node.values.append(("workflow", self.render(node, "workflow", target)))
            self.name_outputs(node, (), 1000)
            return
        here = self.workflow
        try:
            if isinstance(target, str):
                node.workflow = called = _sub_workflow(here, target)
                for fault in called._located(called._compiled.problems if called._compiled else []):
                    self.problem(path, f"workflow: {fault}", fault.severity).custom = fault.custom
            elif isinstance(target, dict):
                node.workflow = called = Workflow._from_document(target, here.source)
                called.folder, called._loaded, called._chain = here.folder, here._loaded, here._chain
                self.misshapen |= called._plan().misshapen
                for fault in called._plan().problems:
                    message = fault.message[len(_label(called._whole(), fault.path)) :]
                    copy = self.problem((*path, *fault.path), message, fault.severity, fault.inside)
                    copy.custom, copy.cycle = fault.custom, fault.cycle
        except ValidationError as error:
            for fault in error.problems:
                self.misshape(path, f"workflow: {fault}")
        except OrchestratorError as error:
            (self.misshape if isinstance(error, ParseError) else self.problem)(path, f"workflow: {error}")
        if node.workflow is None:
            return
        if node.workflow.budget:
            message = "workflow: the budget of a called workflow does not apply, only that of the workflow that is run"
            self.problem(path, message, "warning")
        self.check_call(node, node.workflow, document.get("inputs") or {})
        outputs, ids = node.workflow.outputs, [step.id for step in node.workflow.steps if isinstance(step, Step)]
        names = [name for name in (outputs if isinstance(outputs, dict) and outputs else ids) if isinstance(name, str)]
        self.name_outputs(node, names, len(names))

    def check_call(self, node: _Node, called: Workflow, given: Any) -> None:
        """The inputs that a step gives to a sub-workflow against those that it declares."""
        path, declared = self.place(node, "inputs"), called.inputs
        if not isinstance(declared, dict) or not isinstance(given, dict):
            return
        for name in (name for name in given if name not in declared):
            message = f"inputs: the workflow has no input {_shown(name)}{self.near(name, declared)}"
            self.problem((*path, name), message)
        for name, entry in declared.items():
            value, entry = given.get(name), entry if isinstance(entry, dict) else {}
            if value is None and entry.get("required") and entry.get("default") is None:
                self.problem(path, f"inputs: the workflow needs the input {_shown(name)}")
            elif value is not None and not _holds_tag(value) and (fault := _input_fault(value, entry)):
                self.problem((*path, name), f"inputs: {name} {fault}")

    def connect(self, node: _Node, graph: _Graph) -> None:
        """Turns `depends_on` and references into dependencies, refusing what does not exist."""
        listed = node.document.get("depends_on")
        for index, step_id in enumerate(_as_list(listed) if listed else ()):
            path = (*node.path, "depends_on", *([index] if isinstance(listed, list) else ()))
            if isinstance(step_id, str) and not self.depend(node, step_id, graph, path, ("depends_on", step_id)):
                near = self.near(step_id, graph.visible())
                self.problem(path, f"depends_on: there is no step {_shown(step_id)}{near}")
        self.resolve(node, graph)
        if node.type == "transform" and "inputs" in node.document:
            self.transform_inputs(node, graph)

    def depend(self, node: _Node, step_id: str, graph: _Graph, path: _Path, shown: tuple[str, str]) -> _Node | None:
        """Finds a step from inside out; `node`, or the container of it that is its sibling, will wait for it."""
        waiting: _Node | None = node if graph.by_id.get(node.id) is node else None
        for scope in (graph, *graph.around):
            target = scope.by_id.get(step_id)
            if target is not None:
                if target is waiting:
                    wrong = "depends on itself" if waiting is node else "contains this step"
                    self.problem(path, f"{shown[0]}: {_shown(shown[1])}: {step_id!r} {wrong}")
                elif waiting is not None:
                    waiting.dependencies[step_id] = None
                return target
            waiting = scope.owner
        return None

    def resolve(self, node: _Node, graph: _Graph, first: int = 0) -> None:
        """Checks a node's references, and makes it wait for the steps that they name."""
        for (segments, _, position, path, source), key in node.references[first:]:
            root, scope = segments[0] if segments else "", graph
            if key == "until" and node.children is not None:
                scope = node.children  # it is asked after each iteration
            if root in ("", "workflow", "run", *scope.local) or (root in node.local and key != "for_each"):
                continue
            if root not in ("steps", "outputs"):
                fault = self.missing_input(segments, scope)
            elif len(segments) < 2:
                fault = " needs the id of a step, as in steps.ID.OUTPUT" if node.id else ""
            else:
                fault = self.missing_output(node, segments, path, key, scope)
            if fault:
                self.problem(path, f"{key}: {_shown('.'.join(segments))}{fault}", inside=(source, position))

    def missing_input(self, segments: tuple[str, ...], graph: _Graph) -> str:
        """What is wrong with a reference to an input, or nothing."""
        prefixed = segments[0] in ("inputs", "input")
        name = segments[1] if prefixed and len(segments) > 1 else segments[0]
        if graph.inputs is None:
            if prefixed or name not in ("item", *_LOOP_NAMES):
                return ""
            return f": {name!r} is known only inside {'a for_each' if name == 'item' else 'a loop'}"
        if name in graph.inputs or name in ("inputs", "input"):
            return ""
        step = name if name in graph.by_id else "".join(graph.named.get(name, ())[:1])
        path = f"steps.{name}" if step == name else f"steps.{step}.{name}"
        near = f", did you mean {path!r}?" if step else self.near(name, graph.inputs)
        return f": there is no input {_shown(name)}{near}"

    def missing_output(self, node: _Node, segments: tuple[str, ...], path: _Path, key: str, graph: _Graph) -> str:
        """What is wrong with a reference to a step, or nothing; the node will wait for the step."""
        step_id, rest, scopes = segments[1], segments[2:], (graph, *graph.around)
        if segments[0] == "outputs" and not any(step_id in scope.by_id for scope in scopes):
            ids = next((scope.named[step_id] for scope in scopes if step_id in scope.named), [])
            if len(ids) > 1:
                where = " or ".join(f"steps.{producer}.{step_id}" for producer in ids[:5])
                return f" is the name of several outputs; write {where}"
            step_id, rest = (ids[0], ()) if ids else (step_id, rest)
        target = self.depend(node, step_id, graph, path, (key, ".".join(segments)))
        if target is None:
            return f": there is no step {_shown(step_id)}{self.near(step_id, graph.visible())}"
        while rest and target is not None and (names := target.names()) and rest[0] not in _STEP_FACTS:
            if rest[0] not in names:
                if target.workflow is not None and target.workflow._compiled is None:
                    break  # it is calling itself, and not all of its steps are known yet
                near = self.near(rest[0], names) or f"; it has {', '.join(itertools.islice(names, 20))}"
                return f": step {target.id!r} has no output {_shown(rest[0])}{near}"
            target, rest = None if target.for_each else names[rest[0]], rest[1:]
        return ""

    def transform_inputs(self, node: _Node, graph: _Graph) -> None:
        """A transform's inputs: templates, values, or names of paths, upstream outputs and workflow inputs."""
        inputs, place, rendered = node.document["inputs"], self.place(node, "inputs"), {}
        entries = list(inputs.items() if isinstance(inputs, dict) else enumerate(_as_list(inputs)))
        plain = {key: source for key, source in entries if isinstance(source, str) and not _has_tag(source)}
        paths = {key for key, source in plain.items() if source.startswith(("steps.", "outputs.", "inputs.", "input."))}
        names = set(plain) - paths if not isinstance(inputs, dict) else set()
        for key, source in sorted(entries, key=lambda entry: entry[0] in names):  # when it is known what it waits for
            path, known = (*place, key) if isinstance(inputs, (dict, list)) else place, len(node.references)
            if key in names:
                source = self.input_path(node, source, path, graph)
            text = "{{" + source + "}}" if key in names or key in paths else source
            rendered[key] = self.render(node, "inputs", text, path)
            self.resolve(node, graph, known)
        titles = [(key, key if isinstance(inputs, dict) else source) for key, source in entries]
        node.inputs = [(name if isinstance(name, str) else _shown(name), rendered[key]) for key, name in titles]

    def input_path(self, node: _Node, name: str, path: _Path, graph: _Graph) -> str:
        """What an input's name stands for: an item, an output of a dependency, a dependency, a workflow input."""
        root = name.split(".", 1)[0]
        if root in graph.local or root in node.local:
            return name
        found = [step_id for step_id in graph.named.get(root, ()) if step_id in node.dependencies]
        if len(found) > 1:
            where = " or ".join(f"steps.{step_id}.{root}" for step_id in found)
            self.problem(path, f"inputs: {_shown(name)} is an output of several dependencies; write {where}")
        if found:
            return f"steps.{found[0]}.{name}"
        is_step = root in node.dependencies and root not in (graph.inputs or ())
        return f"steps.{name}" if is_step else f"inputs.{name}"

    def link(self, graph: _Graph) -> None:
        """Names the cycles, each broken where it was found, to look for others; fills in dependents, counts, roots."""
        ordered = all(graph.by_id[name].position < node.position for node in graph.nodes for name in node.dependencies)
        for _ in range(0 if ordered else 10):
            try:
                graphlib.TopologicalSorter({node.id: node.dependencies for node in graph.nodes}).prepare()
                break
            except graphlib.CycleError as error:
                cycle = error.args[1][::-1][1:]
                first = cycle.index(min(cycle, key=lambda step_id: graph.by_id[step_id].position))
                cycle = [*cycle[first:], *cycle[:first], cycle[first]]
                self.problem(graph.by_id[cycle[0]].path, f"cycle: {' -> '.join(cycle)}").cycle = cycle
                del graph.by_id[cycle[0]].dependencies[cycle[1]]
        for node in graph.nodes:
            for dependency in node.dependencies:
                graph.by_id[dependency].dependents.append(node.position)
        graph.counts = [len(node.dependencies) for node in graph.nodes]
        graph.roots = [node.position for node in graph.nodes if not node.dependencies]

def _branch_key(value: Any) -> str:
    """A branch's name as text: YAML's true, 1, 1.0 and null are the texts true, 1, 1 and null."""
    if isinstance(value, str):
        return value.strip()
    return _to_json(int(value) if isinstance(value, float) and value.is_integer() else value)

def _label(document: Any, path: _Path) -> str:
    """Where a problem is, in words: "steps[1] 'analyze': "."""
    label, name = "", ""
    for key in path:
        if not isinstance(document, (dict, list)) or (isinstance(document, dict) and key not in document):
            break
        document, is_item = document[key], isinstance(document, list)
        if is_item and isinstance(document, dict) and "id" in document:
            label += f"{name}[{key}] {_shown(document['id'])}: "
        name = key if isinstance(key, str) else _shown(key)
    return label

def _sub_workflow(caller: Workflow, name: str) -> Workflow:
    """The workflow in a file, by a name relative to the caller's own folder; read once however often it is called."""
    path = os.path.join(caller.folder or ".", name)
    try:
        known = caller._loaded.get(os.path.realpath(path))
    except ValueError as error:
        raise OrchestratorError(f"{path!a}: cannot be read: {error}") from None
    if known is None and len(caller._chain) >= _MAX_WORKFLOW_DEPTH:
        chain = " -> ".join((*caller._chain, os.path.basename(name)))
        raise OrchestratorError(f"workflows call each other more than {_MAX_WORKFLOW_DEPTH} deep: {chain}")
    return known or Workflow._from_path(path, caller._loaded, caller._chain)

def _input_fault(value: Any, declared: Mapping[str, Any]) -> str | None:
    """What is wrong with an input's value, or None."""
    kind = declared.get("type")
    kind = _INPUT_TYPE_ALIASES.get(kind, kind) if isinstance(kind, str) else "any"
    if kind in _INPUT_TYPES and not _INPUT_TYPES[kind](value):
        return f"must be {'an' if kind[0] in 'aio' else 'a'} {kind}, not {_shown(value)}"
    allowed = declared.get("enum")
    if isinstance(allowed, list) and not any(value == one and type(value) is type(one) for one in allowed):
        return f"must be one of {_shorten(', '.join(map(_shown, allowed)), 200)}, not {_shown(value)}"
    return None

# ---------------------------------------------------------------------------------------------------------------------
# 7. Graph: Workflow -> dependencies, order, levels
# The public view of what the compiler found: who waits for whom. Answers questions; runs nothing.
# ---------------------------------------------------------------------------------------------------------------------

class WorkflowDAG:
    """The dependency graph of a workflow's top-level steps.

    Raises DagError (with `cycle`) for a cycle and ValidationError for dependencies that do not exist.
    """
    def __init__(self, workflow: Workflow) -> None:
        workflow.validate()
        self._graph = workflow._plan().graph

    def dependencies(self, step_id: str) -> list[str]:
        """The ids of the steps that this one waits for; KeyError for an unknown id."""
        return list(self._graph.by_id[step_id].dependencies)

    def dependents(self, step_id: str) -> list[str]:
        """The ids of the steps that wait for this one; KeyError for an unknown id."""
        return [self._graph.nodes[position].id for position in self._graph.by_id[step_id].dependents]

    def execution_order(self) -> list[str]:
        """All ids, each after its dependencies; steps that are ready together keep the document's order."""
        return [step_id for level in self.levels() for step_id in level]

    def levels(self) -> list[list[str]]:
        """Ids in waves: the steps of a level depend only on those of the levels before it."""
        return [[node.id for node in level] for level in _levels(self._graph)]

def _levels(graph: _Graph) -> list[list[_Node]]:
    """The nodes of a graph in waves; inside a wave they keep the document's order."""
    waiting, wave, levels = list(graph.counts), list(graph.roots), []
    while wave:
        levels.append([graph.nodes[position] for position in wave])
        following = []
        for dependent in (dependent for node in levels[-1] for dependent in node.dependents):
            waiting[dependent] -= 1  # falls to 0 when the last dependency is placed
            if not waiting[dependent]:
                following.append(dependent)
        wave = sorted(following)
    return levels

# ---------------------------------------------------------------------------------------------------------------------
# 8. Retry: policies, delays, limits
# How often a step is tried and how long it waits in between; how fast a provider may be called, and when it is better
# left alone. Limits are shared by threads and event loops.
# ---------------------------------------------------------------------------------------------------------------------

_delay = _must("milliseconds, or a text such as 1.5s", lambda value: _seconds(value, "ms") is not None)
_above_zero = _must("a number above 0", lambda value: _is_number(value) and value > 0)
_RETRY_KEYS: dict[str, _Check] = {
    "max_attempts": _integer(1, 1000), "strategy": _one_of("exponential", "linear", "constant"),
    "initial_delay": _delay, "max_delay": _delay, "backoff_multiplier": _number(1, 1000),
    "jitter": _must("true, false or a fraction", lambda value: isinstance(value, (int, float)) and 0 <= value <= 1)}
_RETRY_ALIASES = {"backoff": "strategy", "initial_delay_ms": "initial_delay", "max_delay_ms": "max_delay"}
_RATE_LIMIT_KEYS: dict[str, _Check] = {
    "requests_per_minute": _above_zero, "tokens_per_minute": _above_zero, "max_concurrent": _integer(1)}
_CIRCUIT_BREAKER_KEYS: dict[str, _Check] = {
    "failure_rate": _must("above 0 and at most 1", lambda value: _is_number(value) and 0 < value <= 1),
    "window": _integer(1, 1000), "min_calls": _integer(1, 1000),
    "open_seconds": _must("seconds, or a text such as 30s", lambda value: _seconds(value, "s") is not None)}

def _settings(name: str, document: Any, checks: dict[str, _Check], aliases: Mapping[str, str]) -> dict[str, Any]:
    """A map of settings under their first names, without nulls (they mean the default). ValidationError: all faults."""
    shape = _Map({**checks, **{alias: checks[known] for alias, known in aliases.items()}})
    problems = [Problem(fault, path[1:]) for path, fault in _faults(shape, document, "", name)]
    for alias, known in aliases.items() if isinstance(document, Mapping) else ():
        if document.get(alias) is not None and document.get(known) is not None:
            problems.append(Problem(f"{name}: {alias} and {known} are two names of one value", (alias,)))
    if problems:
        raise ValidationError(problems)
    return {aliases.get(key, key): value for key, value in document.items() if value is not None}

class RetryPolicy:
    """How often a step is attempted (`max_attempts` counts all attempts) and how long it waits in between. Delays are
    milliseconds or texts such as "1.5s". `jitter` True draws each delay uniformly from 0 to its full length, False
    takes it as it is, a fraction varies it by plus or minus that. Raises ValidationError for values out of range."""
    def __init__(self, max_attempts: int = 3, strategy: str = "exponential", initial_delay: float | str = 500,
                 max_delay: float | str = 30_000, backoff_multiplier: float = 2, jitter: bool | float = True) -> None:
        given = (max_attempts, strategy, initial_delay, max_delay, backoff_multiplier, jitter)
        faults = [(key, check(value)) for (key, check), value in zip(_RETRY_KEYS.items(), given)]
        if any(fault for _, fault in faults):
            raise ValidationError([Problem(f"retry: {key} {fault}", (key,)) for key, fault in faults if fault])
        self.max_attempts, self.strategy = max_attempts, strategy
        self.initial_delay_seconds = _seconds(initial_delay, "ms") or 0.0
        self.max_delay_seconds = _seconds(max_delay, "ms") or 0.0
        self.backoff_multiplier, self.jitter = backoff_multiplier, jitter

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> RetryPolicy:
        """The policy of a document's `retry` map, in either spelling of its keys; null means the default."""
        return cls(**_settings("retry", document, _RETRY_KEYS, _RETRY_ALIASES))

    def delay_seconds(self, failures: int, retry_after_seconds: float | None = None) -> float | None:
        """How long to wait after this many failures (from 1); None if the server asks for more than `max_delay`."""
        if retry_after_seconds is not None and retry_after_seconds > self.max_delay_seconds:
            return None
        most = 690 / math.log(self.backoff_multiplier + 1e-9)  # what does not overflow: e to the power of 690 is 1e299
        growth: float = float(self.backoff_multiplier) ** min(failures - 1, most)
        factor = {"exponential": growth, "linear": failures}.get(self.strategy, 1)
        delay = min(self.initial_delay_seconds * factor, self.max_delay_seconds)
        if self.jitter is not False:
            delay *= random.uniform(0, 1) if self.jitter is True else random.uniform(1 - self.jitter, 1 + self.jitter)
        return max(min(delay, self.max_delay_seconds), retry_after_seconds or 0.0)

    def __repr__(self) -> str:
        return f"RetryPolicy({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

_DEFAULT_RETRY, _NO_RETRY = RetryPolicy(), RetryPolicy(max_attempts=1)

class _Turn:
    """A task's wait for a place."""

    __slots__ = ("given", "loop", "thread")
    pool: Any = None  # the worker threads that may go on with it by themselves

    def __init__(self) -> None:
        self.loop, self.thread, self.given = asyncio.get_running_loop(), threading.get_ident(), asyncio.Event()

    def give(self) -> None:
        """Wakes the task, from any thread; RuntimeError if its event loop is closed."""
        here = threading.get_ident() == self.thread
        self.given.set() if here else self.loop.call_soon_threadsafe(self.given.set)

class _Places:
    """A number of places, given in the order of asking to tasks of any event loop in any thread."""
    def __init__(self, count: float = math.inf) -> None:
        self.count, self.taken, self.lock = count, 0, threading.Lock()
        self.waiting: collections.deque[_Turn] = collections.deque()
        self.entrances: dict[Any, _Places] = {}  # to these places, for what only one at a time may wait for

    def take(self, turn: _Turn) -> bool:
        """Whether there is a place at once; otherwise it will be given in turn."""
        with self.lock:
            if self.taken < self.count:
                self.taken += 1
                return True
            self.waiting.append(turn)
        return False

    async def enter(self) -> None:
        """Waits for a place. A cancelled wait keeps none."""
        turn = _Turn()
        if not self.take(turn):
            try:
                await turn.given.wait()
            except BaseException:
                self.drop(turn)
                raise

    def drop(self, turn: _Turn) -> None:
        """Ends a wait; if it is over by now, gives the place up that it was for."""
        try:
            with self.lock:
                self.waiting.remove(turn)
        except ValueError:
            self.leave()

    def leave(self) -> None:
        """Gives a place up, from any thread. It passes to who has waited longest without ever being free."""
        while True:
            with self.lock:
                if not self.waiting:
                    self.taken -= 1
                    return
                turn = self.waiting.popleft()
            with contextlib.suppress(RuntimeError):  # the event loop is closed: the next one
                turn.give()
                return

    def following(self, pool: Any) -> Any:
        """Who has waited longest for a place, if a thread of `pool` can go on with that in a place that it holds."""
        with self.lock:
            return self.waiting.popleft() if self.waiting and self.waiting[0].pool is pool else None

class _RateLimit(_Places):
    """How fast and how many at once a provider may be called: `await start(tokens)`, the call, `settle`, `leave`. No
    window of 60 s sees more than `requests_per_minute` starts or `tokens_per_minute` tokens (a single larger call goes
    alone). Starts keep the order of asking and are evenly spaced, at most one second's worth at once."""
    def __init__(self, requests_per_minute: float = math.inf, tokens_per_minute: float = math.inf,
                 max_concurrent: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(max_concurrent)
        self.requests, self.tokens, self.clock = requests_per_minute, tokens_per_minute, clock
        self.window_seconds = max(60.0, 60 / requests_per_minute)
        self.booked: collections.deque[list[float]] = collections.deque()  # [start, tokens] within a window of the last
        self.used = self.refunded = 0.0  # tokens booked less refunds; refunds, which count for the oldest booked first
        self.last = self.due = self.resumes = -math.inf  # the last start, the next at an even pace, the end of a pause
        self.gate = _Places(1)  # only the first in line has booked, so that refunds and pauses count for those behind

    @classmethod
    def from_dict(cls, document: Any, clock: Callable[[], float] = time.monotonic) -> _RateLimit:
        return cls(**_settings("rate_limit", document, _RATE_LIMIT_KEYS, {}), clock=clock)

    async def start(self, tokens: int = 0) -> None:
        """Waits until a call of about so many tokens may start, and takes a place. A cancelled wait keeps none."""
        await self.enter()
        try:
            await self.gate.enter()
            try:
                wait = self.reserve(tokens)
                while wait > 0:
                    await asyncio.sleep(wait)
                    wait = self.blocked_seconds()  # a pause that came meanwhile does not move what is booked
            finally:
                self.gate.leave()
        except BaseException:
            self.leave()
            raise

    def reserve(self, tokens: int = 0) -> float:
        """Books the next start for a call of about so many tokens; returns the seconds until then (0.0: now)."""
        with self.lock:
            now, gap = self.clock(), max(60 / self.requests, tokens * 60 / self.tokens)
            start = max(now, self.last, self.resumes, self.due - max(0.0, 1 - gap))
            while self.booked:
                full = len(self.booked) + 1 > self.requests or self.used + tokens > self.tokens
                if self.booked[0][0] > start - self.window_seconds and not full:
                    break
                left, spent = self.booked.popleft()
                refund = min(spent, self.refunded)
                self.refunded -= refund
                self.used -= spent - refund
                start = max(start, left + self.window_seconds)
            if gap:
                self.booked.append([start, tokens])
                self.used += tokens
            self.last, self.due = start, max(self.due, start) + gap
            return start - now

    def settle(self, estimated: int, actual: int) -> None:
        """Corrects what a call that was booked with `estimated` tokens has used (0 if it was never made)."""
        with self.lock:
            more = max(float(actual - estimated), -self.used) if self.booked else 0.0
            self.due += more * 60 / self.tokens
            self.used += more
            if more > 0:
                self.booked[-1][1] += more
            else:
                self.refunded -= more

    def pause(self, seconds: float) -> None:
        """Nobody may start for so long: the provider has asked for it."""
        with self.lock:
            self.resumes = max(self.resumes, self.clock() + seconds)

    def blocked_seconds(self) -> float:
        """The rest of the pause."""
        return max(0.0, self.resumes - self.clock())

class _CircuitBreaker:
    """Whether a provider is worth calling: `permit = allow()` before a call, `record(ok, permit)` after it; any thread.
    Closed, it opens when of the last `window` calls at least `min_calls` are known and a share of `failure_rate` of
    them failed. Open, it lets nobody pass for `open_seconds`. Half open, it lets one probe pass at a time: a success
    closes it, a failure opens it again. `on_change(old, new)` hears of each change of `state`."""
    def __init__(self, failure_rate: float = 0.5, window: int = 20, min_calls: int | None = None,
                 open_seconds: float | str = 30, clock: Callable[[], float] = time.monotonic,
                 on_change: Callable[[str, str], Any] | None = None) -> None:
        self.failure_rate, self.min_calls = failure_rate, min(min_calls or 10, window)
        self.open_seconds, self.clock = _seconds(open_seconds, "s") or 0.0, clock
        self.on_change, self.lock = on_change, threading.RLock()  # on_change may look at the state
        self.state, self.opened, self.probing, self.changes = "closed", 0.0, False, 1
        self.outcomes: collections.deque[bool] = collections.deque(maxlen=window)

    @classmethod
    def from_dict(cls, document: Any, clock: Callable[[], float] = time.monotonic) -> _CircuitBreaker:
        return cls(**_settings("circuit_breaker", document, _CIRCUIT_BREAKER_KEYS, {}), clock=clock)

    @property
    def retry_after_seconds(self) -> float:
        """How long nobody passes; 0.0 if the next caller may, or the outcome of a probe decides."""
        return max(0.0, self.opened + self.open_seconds - self.clock()) if self.state == "open" else 0.0

    def allow(self) -> int:
        """Whether to make a call now: 0, or a permit whose outcome must be recorded."""
        with self.lock:
            if self.state == "open" and not self.retry_after_seconds:
                self.change("half_open")
            if self.state == "open" or self.probing:
                return 0
            self.probing = self.state == "half_open"
            return self.changes

    def record(self, ok: bool | None, permit: int | None = None) -> None:
        """The outcome of a call; None if there is none, as when it was cancelled. What was permitted before the last
        change of state tells nothing about the present one, and is ignored."""
        with self.lock:
            if permit not in (None, self.changes) or self.state == "open":
                return
            self.probing = False
            if ok is not None:
                self.outcomes.append(ok)
            failures, calls = self.outcomes.count(False), len(self.outcomes)
            if self.state == "half_open" and ok is not None:
                self.change("closed" if ok else "open")
            elif calls >= self.min_calls and failures >= self.failure_rate * calls:
                self.change("open")

    def change(self, state: str) -> None:
        old, self.state, self.opened = self.state, state, self.clock()
        self.changes, self.probing = self.changes + 1, False
        self.outcomes.clear()
        if self.on_change:
            self.on_change(old, state)

# ---------------------------------------------------------------------------------------------------------------------
# 9. HTTP: connections, deadlines, cancellation
# A request goes out, a bounded response comes back before its deadline, or an error of the ProviderError family says
# what happened. Connections are kept and reused; another thread can break a call off by the socket under it. HTTP/1.1
# is read here (RFC 9112): http.client has no deadline, and spends most of its time on reading headers.
# ---------------------------------------------------------------------------------------------------------------------

_CONNECT_SECONDS = 10.0  # for the TCP connection, the proxy's consent and the TLS handshake together
_CALL_SECONDS = 120.0  # for a whole attempt outside a run, unless the client has its own limit
_IDLE_SECONDS = 60.0  # after which an unused connection is not trusted any more
_MAX_IDLE_HOSTS = 64  # to which connections are kept
_LINGER_SECONDS = 0.25  # for the rest of a stream whose reader has had enough, so that its connection can be kept
_MAX_BODY_BYTES, _MAX_HEAD_BYTES = 64 * 1024 * 1024, 256 * 1024
_RETRIED_STATUSES = frozenset((408, 409, 425, 429, *range(500, 600)))
_CALL = threading.local()  # .scope: the _CancelScope of the call that this thread makes

_STATUS_LINE = re.compile(r"HTTP/1\.([0-9]) +([1-9][0-9][0-9])(?: .*)?").fullmatch
_HEAD_END, _CRLF = re.compile(rb"\r?\n\r?\n").search, re.compile(rb"\r\n").search  # of chunks: no other end
_FOLD, _CHUNK_SIZE = re.compile(r"\r?\n[ \t]+").sub, re.compile(rb"[ \t]*([0-9a-fA-F]{1,15})[ \t]*(?:;.*)?").fullmatch
_METHOD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_FIELD = rf"{_METHOD}: [\t\x20-\x7e\x80-\xff]*"

class _CancelScope:
    """One call in a worker thread. `cancel`, from any thread, shuts down the socket that the call waits for.
    The lookup of a host's addresses has no socket and cannot be broken off; the call ends right after it."""
    def __init__(self) -> None:
        self.cancelled, self.lock, self.socket = False, threading.Lock(), None

    def cancel(self) -> None:
        with self.lock:
            self.cancelled = True
            if self.socket is not None:
                with contextlib.suppress(OSError):  # not the method of an SSLSocket, which another thread is reading
                    socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def attach(self, sock: Any) -> None:
        """The socket to shut down from now on; None, before it is closed, when the call is done with it."""
        with self.lock:
            self.socket = sock
            if self.cancelled and sock is not None:
                raise ConnectionAbortedError("the call was cancelled")

class _Response:
    """What a server answered: status, headers with lower-case names, and the decoded body."""
    def __init__(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

class _Connection:
    """A socket and what was read from it ahead. It waits until `deadline` (by time.monotonic(); inf: for ever), then
    raises TimeoutError. A lost connection or a cancelled scope is a ConnectionError, broken HTTP a BadResponseError."""
    def __init__(self, sock: Any) -> None:
        self.socket, self.ahead, self.position, self.since = sock, b"", 0, 0.0

    def begin(self, scope: _CancelScope, deadline: float) -> None:
        """Serves a call. `silent`: nothing has come yet; `lives`: it can serve another one after the answer."""
        self.scope, self.deadline, self.silent, self.lives = scope, deadline, True, False
        scope.attach(self.socket)
        if self.socket.gettimeout() is not None:  # each change costs a system call
            self.socket.settimeout(None)

    def close(self) -> None:
        self.scope.attach(None)
        self.socket.close()

    def is_quiet(self) -> bool:
        """Whether there is nothing to read, not even the end. Linux says what is in the buffer (SO_MEMINFO, 55), and
        whether the connection stands (the first byte of TCP_INFO is 1), at once; a look at the data means to let
        another thread have the interpreter, and to wait for it again."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                state, unread = (socket.IPPROTO_TCP, socket.TCP_INFO, 1), (socket.SOL_SOCKET, 55, 4)
                if self.socket.getsockopt(*state) == b"\1" and not any(self.socket.getsockopt(*unread)):
                    return True
        try:
            at_once = getattr(socket, "MSG_DONTWAIT", 0) if self.socket.gettimeout() is None else 0
            if not at_once:
                self.socket.settimeout(0)
            socket.socket.recv(self.socket, 1, socket.MSG_PEEK | at_once)
        except OSError as error:
            return isinstance(error, BlockingIOError)
        return False

    def limit(self) -> None:
        """Lets the socket wait until the deadline."""
        if self.deadline != math.inf:
            remaining = self.deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError("timed out")
            self.socket.settimeout(min(remaining, 1e6))

    def send(self, message: bytes) -> None:
        rest = memoryview(message)
        while rest:
            self.limit()
            rest = rest[self.socket.send(rest) :]

    def read(self) -> bytes:
        """More bytes; none at the end of the connection."""
        self.limit()
        piece: bytes = self.socket.recv(65536)
        self.silent = self.silent and not piece
        if not piece and self.scope.cancelled:
            raise ConnectionAbortedError("the call was cancelled")
        return piece

    def more(self) -> None:
        piece = self.read()
        if not piece:
            raise ConnectionResetError(f"it was closed {'before' if self.silent else 'in the middle of'} the answer")
        self.ahead, self.position = self.ahead[self.position :] + piece, 0

    def until(self, end: Callable[..., re.Match[bytes] | None], most: int = _MAX_HEAD_BYTES) -> bytes:
        """What comes before a match of `end`, not much more than so many bytes; the match is passed over."""
        start = self.position
        while not (match := end(self.ahead, start)):
            start = max(0, len(self.ahead) - self.position - 3)  # where the unread bytes will end, less a split match
            if start > most:
                raise BadResponseError("more headers than can be right")
            self.more()
        text, self.position = self.ahead[self.position : match.start()], match.end()
        return text

    def head(self) -> _Response:
        """The answer without its body. Interim answers (1xx) are passed over."""
        left, status = _MAX_HEAD_BYTES, 100
        while status < 200:  # runs at least once
            self.ahead, self.position = self.ahead[self.position :], 0
            while b"HTTP/".startswith(self.ahead):
                self.more()
            raw = self.until(_HEAD_END, left) if self.ahead.startswith(b"HTTP/") else self.ahead
            text = _FOLD(" ", raw.decode("latin-1")).replace("\r\n", "\n")
            first, *lines = text.split("\n")
            status_line = _STATUS_LINE(first)
            if not status_line or status_line[2] == "101" or "\r" in text:
                raise BadResponseError(f"something that is not HTTP/1.1: {first[:12]!r}", retryable=True)
            left, status = left - len(raw), int(status_line[2])
            headers: dict[str, str] = {}
            for line in lines:
                name, colon, value = line.partition(":")
                name, value = name.strip().lower(), value.strip()
                if not colon:
                    raise BadResponseError("a header without a colon", retryable=True)
                if name in headers and not (name == "content-length" and headers[name] == value):
                    value = f"{headers[name]}, {value}"
                headers[name] = value
            wishes = headers.get("connection", "").lower()
            self.lives = "close" not in wishes and (status_line[1] != "0" or "keep-alive" in wishes)
        return _Response(status, headers)

    def body(self, headers: Mapping[str, str]) -> Iterator[bytes]:
        """The pieces of the body of an answer that has one, unchunked (RFC 9112, 6.3)."""
        coding, length, size = headers.get("transfer-encoding", "").lower(), headers.get("content-length"), -1
        if coding not in ("", "identity", "chunked"):
            raise BadResponseError("an unknown transfer encoding", retryable=True)
        if coding == "chunked":
            self.lives = self.lives and length is None
            while size:
                found = _CHUNK_SIZE(self.until(_CRLF))
                if not found:
                    raise BadResponseError("a chunk without its size", retryable=True)
                size = int(found[1], 16)
                yield from self.exactly(size)
                while self.until(_CRLF):  # trailers, if this was the last chunk
                    if size:
                        raise BadResponseError("a chunk longer than it says", retryable=True)
        elif length is None:
            self.lives, rest, self.position = False, self.ahead[self.position :], len(self.ahead)
            yield rest
            yield from iter(self.read, b"")
        elif not (length.isascii() and length.isdigit() and len(length) < 19):
            raise BadResponseError("a content length that is no number", retryable=True)
        elif int(length) > _MAX_BODY_BYTES:
            raise BadResponseError(f"more than {_MAX_BODY_BYTES >> 20} MiB")
        else:
            yield from self.exactly(int(length))

    def exactly(self, count: int) -> Iterator[bytes]:
        while count:
            if self.position == len(self.ahead):
                self.more()
            piece = self.ahead[self.position : self.position + count]
            self.position, count = self.position + len(piece), count - len(piece)
            yield piece

def _uncompressed(pieces: Iterable[bytes], coding: str) -> Iterator[bytes]:
    """A body without its encoding: gzip (any number of members) or zlib, unpacked in steps that stay small."""
    if coding in ("", "identity"):
        yield from pieces
        return
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise BadResponseError(f"in the encoding {coding[:12]!r}, which was not asked for")
    unpack = None
    for piece in pieces:
        while piece:
            unpack = zlib.decompressobj(47) if unpack is None or unpack.eof else unpack
            try:
                yield unpack.decompress(piece, 1 << 20)
            except zlib.error:
                raise BadResponseError("a compressed body that is broken", retryable=True) from None
            piece = unpack.unconsumed_tail or unpack.unused_data
    if unpack is not None and not unpack.eof:
        raise ConnectionResetError("it was closed in the middle of a compressed answer")

class _HttpClient:
    """Requests to any http or https address, over connections that are kept and reused; safe for many threads.
    `name` opens its error messages. `proxy` is a URL ("" for none); otherwise HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and
    NO_PROXY count. `timeout_seconds` bounds each call, beside what its scope decides."""
    def __init__(self, name: str, *, proxy: str | None = None, timeout_seconds: float | None = None) -> None:
        self.name, self.timeout_seconds = name, timeout_seconds
        self.idle: dict[tuple[Any, ...], list[_Connection]] = {}
        self.target = functools.lru_cache(maxsize=256)(functools.partial(_Target, proxy=proxy))

    def request(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None,
                on_bytes: Callable[[bytes], Any] | None = None) -> _Response:
        """The response, whatever its status; redirects are refused. Errors: ProviderConnectionError (retryable, but for
        certificates), ProviderTimeoutError, BadResponseError. With `on_bytes` the body of a 2xx answer is handed over
        piece by piece as it arrives, until it returns True."""
        answer = _Exchange(self, method, url, headers, body).answer()
        response, pieces = next(answer), []  # type: _Response, list[bytes]
        with contextlib.closing(answer):
            for piece in answer:
                if on_bytes is None or not 200 <= response.status < 300:
                    pieces.append(piece)
                elif on_bytes(piece):
                    with contextlib.suppress(ProviderError, StopIteration):
                        answer.send(True)
                        collections.deque(answer, 0)
        response.body = b"".join(pieces)
        return response

    def kept(self, key: tuple[Any, ...]) -> _Connection | None:
        """A connection that waits for use and on which nothing has come since the last, not even its end."""
        with contextlib.suppress(IndexError):  # none is left
            while True:
                connection = self.idle.get(key, []).pop()
                if time.monotonic() - connection.since < _IDLE_SECONDS and connection.is_quiet():
                    return connection
                connection.socket.close()
        return None

    def keep(self, key: tuple[Any, ...], connection: _Connection) -> None:
        connection.since = time.monotonic()
        while key not in self.idle and len(self.idle) >= _MAX_IDLE_HOSTS:
            with contextlib.suppress(KeyError, RuntimeError):  # another thread was faster
                for old in self.idle.pop(next(iter(self.idle))):
                    old.socket.close()
        waiting = self.idle.setdefault(key, [])
        waiting.append(connection)
        with contextlib.suppress(IndexError):  # another thread was faster
            while connection.since - waiting[0].since > _IDLE_SECONDS:
                waiting.pop(0).socket.close()

    def close(self) -> None:
        """Closes the connections that are not in use."""
        kept, self.idle = self.idle, {}
        for connections in kept.values():
            for connection in connections:
                connection.socket.close()

    __del__ = close

_FAULTS: dict[str, tuple[type[ProviderError], bool, str]] = {  # of the network, by the exception or a base of it
    "gaierror": (ProviderConnectionError, True, "cannot find the host of {place}: {text}"),
    "SSLCertVerificationError": (ProviderConnectionError, False, "the certificate of {place} is not trusted: {text}"),
    "SSLError": (ProviderConnectionError, True, "TLS with {place} failed: {text}"),
    "timeout": (ProviderTimeoutError, True, "cannot connect to {place} within {limit:g} s"),  # before Python 3.10
    "TimeoutError": (ProviderTimeoutError, True, "cannot connect to {place} within {limit:g} s"),
    "ConnectionRefusedError": (ProviderConnectionError, True, "{place} refused the connection"),
    "OSError": (ProviderConnectionError, True, "lost the connection to {place}: {text}"),
    "ImportError": (ProviderConnectionError, False, "{place} cannot be used with this Python: {text}"),
    "ValueError": (ProviderConnectionError, False, "{place} is no host that can be looked up")}

class _Exchange:
    """One request and its answer: over which connection, until when, and what a fault of the network means."""
    def __init__(self, client: _HttpClient, method: str, url: str, headers: Mapping[str, str], body: bytes | None):
        self.client, self.method, self.status = client, method, None  # type: _HttpClient, str, int | None
        scope: _CancelScope | None = getattr(_CALL, "scope", None)
        self.scope = scope or _CancelScope()
        self.seconds = client.timeout_seconds or (math.inf if scope else _CALL_SECONDS)
        self.deadline = time.monotonic() + self.seconds
        try:
            self.target = client.target(url)
            self.message = self.target.message(method, headers, body)
        except ValueError as error:
            raise ProviderConnectionError(str(error), provider=client.name, retryable=False) from None
        self.key = (os.getpid(), *self.target.key)  # a forked process leaves the connections to its parent

    def answer(self) -> Generator[Any, Any, None]:
        """The response without its body, then the body in pieces; a True sent back leaves little time for the rest. In
        the end the connection is kept, or closed if anything is wrong with it."""
        connection, done = None, False
        try:
            connection, response = self.open()
            self.status = response.status
            if 300 <= response.status < 400 and response.status != 304:
                place = _shorten(re.split("[?#]", response.headers.get("location", ""))[0], 200)
                raise BadResponseError(f"{response.status}, a redirect to {place!r}, which is not followed")
            yield response
            size, has_body = 0, self.method != "HEAD" and response.status not in (204, 304)
            coding = response.headers.get("content-encoding", "").lower()
            for piece in _uncompressed(connection.body(response.headers), coding) if has_body else ():
                size += len(piece)
                if size > _MAX_BODY_BYTES:
                    raise BadResponseError(f"more than {_MAX_BODY_BYTES >> 20} MiB")
                if piece and (yield piece):
                    connection.deadline = min(self.deadline, time.monotonic() + _LINGER_SECONDS)
            done = connection.lives and connection.position == len(connection.ahead)
        except (OSError, ValueError, ImportError, BadResponseError) as error:
            raise self.fault(error) from (error if isinstance(error, OSError) else None)
        finally:
            self.scope.attach(None)
            if connection:
                self.client.keep(self.key, connection) if done else connection.socket.close()

    def open(self) -> tuple[_Connection, _Response]:
        """(connection, the answer that begins on it). A kept connection may have been closed by the server just now: if
        it dies before the first byte of an answer, the request goes out once more, on a new one."""
        connection = self.client.kept(self.key)
        while True:
            reused = connection is not None
            connection = connection or self.connect()
            try:
                connection.begin(self.scope, self.deadline)
                with contextlib.suppress(ConnectionError):  # an answer may come before all is sent, as 413 does
                    connection.send(self.message)
                response = connection.head()
                if response.status != 408 or not reused:
                    return connection, response
                connection.close()  # the server was tired of waiting, before it heard of this request
            except BaseException as error:
                connection.close()
                died = reused and connection.silent and isinstance(error, ConnectionError)
                if not died or self.scope.cancelled:
                    raise
            connection = None

    def connect(self) -> _Connection:
        """A new connection, to the first address that takes one. Each but the last has half of the time left."""
        target = self.target
        context = _tls_context(*map(os.environ.get, ("SSL_CERT_FILE", "SSL_CERT_DIR"))) if target.secure else None
        addresses = socket.getaddrinfo(*(target.proxy or (target.host, target.port)), 0, socket.SOCK_STREAM)
        end = min(time.monotonic() + _CONNECT_SECONDS, self.deadline)
        failure: OSError = OSError("the host has no address")
        while addresses:
            (family, kind, protocol, _, address), connection = addresses.pop(0), None
            try:
                connection = _Connection(socket.socket(family, kind, protocol))
                connection.begin(self.scope, (time.monotonic() + end) / 2 if addresses else end)
                connection.limit()
                connection.socket.connect(address)
                connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.deadline = end
                self.secure(connection, context)
                return connection
            except BaseException as error:
                if connection:
                    connection.close()
                if not isinstance(error, OSError) or self.scope.cancelled:
                    raise
                failure = error
        raise failure

    def secure(self, connection: _Connection, context: Any) -> None:
        """For https: the way through the proxy, if there is one, and TLS."""
        target = self.target
        if context and target.proxy:
            user = map(": ".join, target.proxy_user.items())
            lines = (f"CONNECT {target.host_port} HTTP/1.1", f"Host: {target.host_port}", *user, "", "")
            connection.send("\r\n".join(lines).encode())
            status = connection.head().status
            if not 200 <= status < 300:
                reason, retryable = f"the proxy refused {target.host_port} with {status}", status in _RETRIED_STATUSES
                raise ProviderConnectionError(reason, provider=self.client.name, retryable=retryable)
            connection.ahead = b""
        if context:
            connection.limit()
            name, plain = target.host.rstrip("."), connection.socket
            try:
                connection.socket = context.wrap_socket(plain, server_hostname=name, do_handshake_on_connect=False)
            except OSError as error:  # frames of it, and of the one before it, hold the only socket that is left
                error.__context__ = None
                raise error.with_traceback(None) from None
            self.scope.attach(connection.socket)
            connection.socket.do_handshake()

    def fault(self, error: Exception) -> ProviderError:
        """What an exception means. Of the address only the host is named: a path or a query may hold a secret."""
        place = self.target.host_port + (f" through the proxy {self.target.proxy[0]}" if self.target.proxy else "")
        name = self.client.name
        if self.scope.cancelled:
            return ProviderConnectionError("the call was cancelled", provider=name, retryable=False)
        if isinstance(error, BadResponseError):
            reason, retryable = f"{place} answered {error}", error.retryable
            return BadResponseError(reason, provider=name, retryable=retryable, status=self.status)
        if time.monotonic() >= self.deadline:
            return ProviderTimeoutError(f"no answer from {place} within {self.seconds:g} s", provider=name)
        base = next(base.__name__ for base in type(error).__mro__ if base.__name__ in _FAULTS)
        text = getattr(error, "verify_message", "") or str(error) or base
        kind, retryable, reason = _FAULTS[base]
        return kind(reason.format(place=place, text=text, limit=_CONNECT_SECONDS), provider=name, retryable=retryable)

@functools.lru_cache(maxsize=8)
def _tls_context(bundle: str | None, _folder: str | None) -> Any:
    """What certificates are verified with: the system's authorities, or those of SSL_CERT_FILE and SSL_CERT_DIR."""
    import ssl
    if bundle and not os.path.isfile(bundle):
        raise ProviderConnectionError(f"SSL_CERT_FILE names {bundle!r}, which is no file", retryable=False)
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context

class _Target:
    """Where a URL leads: host, port, the path to ask for, and the proxy on the way. ValueError if nowhere."""
    def __init__(self, url: str, proxy: str | None) -> None:
        from urllib.parse import quote
        scheme, self.host, self.port, user, path = _url_parts("the address", url, http=80, https=443)
        self.secure, host = scheme == "https", f"[{self.host}]" if ":" in self.host else self.host
        self.host_port = f"{host}:{self.port}"
        self.path = path if path.isascii() else quote(path, safe="/%:=&?~+!$,;'@()*[]")
        self.own = {"Host": host if self.port == (443 if self.secure else 80) else self.host_port}
        self.own.update({"Accept-Encoding": "identity"}, **user)
        self.proxy: tuple[str, int] | None = None
        proxy = _proxy_for(scheme, self.host, self.port) if proxy is None else proxy
        if proxy:
            _, name, port, user, _ = _url_parts("the proxy", proxy if "://" in proxy else f"http://{proxy}", http=80)
            self.proxy, self.proxy_user = (name, port), {f"Proxy-{header}": value for header, value in user.items()}
            if not self.secure:
                self.path = f"http://{self.host_port}{self.path}"
                self.own.update(self.proxy_user)
        self.heads: dict[tuple[Any, ...], bytes] = {}
        self.key = (self.secure, self.host, self.port, self.proxy)

    def message(self, method: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
        """A whole request. ValueError for what cannot be sent."""
        key = (method, *headers.items())
        head = self.heads.get(key)
        if head is None:
            fields = {name.lower(): f"{name}: {value}" for name, value in (*self.own.items(), *headers.items())}
            for name in ("transfer-encoding", "content-length"):
                fields.pop(name, None)
            wrong = [name for name, line in fields.items() if not re.fullmatch(_FIELD, line)]
            if wrong or not re.fullmatch(_METHOD, method):
                name = wrong[0] if wrong else ""
                raise ValueError(f"the method or the header {_shorten(name, 40)!r} holds something that cannot be sent")
            lines = (f"{method} {self.path} HTTP/1.1", *fields.values())
            head = "".join(f"{line}\r\n" for line in lines).encode("latin-1")
            self.heads = {key: head}  # the latest is enough: a client sends the same ones again and again
        if body is not None or method in ("POST", "PUT", "PATCH"):
            return b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body or b""), body or b"")
        return head + b"\r\n"

def _url_parts(subject: str, url: str, **ports: int) -> tuple[str, str, int, dict[str, str], str]:
    """(scheme, host in ASCII, port, the header for its user, path and query) of a URL. Errors never show a password."""
    from base64 import b64encode
    from urllib.parse import unquote, urlsplit
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("ascii" if url.isascii() else "idna").decode(), parts.port
    except ValueError:
        raise ValueError(f"{subject} is no URL") from None
    if parts.scheme not in ports or not host or re.search(r"[\x00-\x20\x7f]", url):
        schemes = " or ".join(f"{scheme}://" for scheme in ports)
        raise ValueError(f"{subject} must start with {schemes} and a host, and hold no space or control characters")
    user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}".encode()
    header = {} if parts.username is None else {"Authorization": f"Basic {b64encode(user).decode()}"}
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return parts.scheme, host, ports[parts.scheme] if port is None else port, header, path

def _proxy_for(scheme: str, host: str, port: int) -> str | None:
    """The proxy that the environment names for an address, as curl and urllib read it."""
    forged = scheme == "http" and "REQUEST_METHOD" in os.environ  # CGI: HTTP_PROXY may be a header of the request
    names = (f"{scheme}_proxy", "" if forged else f"{scheme}_proxy".upper(), "all_proxy", "ALL_PROXY")
    proxy = next(filter(None, map(os.environ.get, names)), None)
    exceptions = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    for entry in exceptions.lower().replace(",", " ").split() if proxy else ():
        from ipaddress import ip_address, ip_network
        place = re.fullmatch(r"(\[.*\]|[^:]*):([0-9]+)", entry)
        name = (place[1] if place else entry).strip("[]")
        name = name if name == "*" else name.lstrip("*.")
        within = name in ("*", host) or host.endswith(f".{name}")
        with contextlib.suppress(ValueError):  # one of them is a name
            within = within or ip_address(host) in ip_network(name, strict=False)
        if name and within and (not place or int(place[2]) == port):
            return None
    return proxy

def _retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """How long the server asks to wait: `retry-after-ms`, or `retry-after` in seconds or as an HTTP date (RFC 9110)."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{0,12})?", text):
            return float(text) * unit
    from email.utils import mktime_tz, parsedate_tz
    with contextlib.suppress(ValueError, TypeError, OverflowError):  # TypeError: it is no date
        return max(0.0, mktime_tz(parsedate_tz(text)) - time.time())  # type: ignore[arg-type]
    return None

# ---------------------------------------------------------------------------------------------------------------------
# 10. Providers: requests and responses of each vendor, one class each, built from small shared pieces
# A vendor says where a request goes, how it is written, how its answer is read and how the events of a stream build
# that answer up. The wire facts are those of the vendors' API references and official SDKs, named at each class.
# ---------------------------------------------------------------------------------------------------------------------

_TUNING = ("temperature", "max_tokens", "top_p", "top_k", "stop", "seed", "frequency_penalty", "presence_penalty")
_SHAPE_ERRORS = (KeyError, IndexError, TypeError, ValueError, AttributeError)  # of reading what has another shape

class CompletionRequest:
    """What a step asks of a language model.

    `messages` are maps: {role: user | system, content}, {role: assistant, content, tool_calls}, {role: tool, id, name,
    content, is_error?}; tool calls are those of a CompletionResponse, passed back as they are. A content is a text, or
    a list of the vendor's own parts. `params` go to the vendor as they are. `schema` is a JSON Schema for the answer;
    `tools` are maps of name, description and parameters (a JSON Schema). `on_text` is called with each piece of text of
    a streamed answer as it arrives, in the thread that makes the call."""
    def __init__(self, model: str, messages: list[dict[str, Any]], *, system: str | None = None, stop: Any = None,
            temperature: float | None = None, max_tokens: int | None = None, top_p: float | None = None,
            top_k: int | None = None, seed: int | None = None, frequency_penalty: float | None = None,
            presence_penalty: float | None = None, stream: bool = False, params: Mapping[str, Any] | None = None,
            schema: Any = None, tools: list[dict[str, Any]] | None = None,
            on_text: Callable[[str], None] | None = None) -> None:
        self.model, self.messages, self.system, self.stop, self.seed = model, messages, system, stop, seed
        self.temperature, self.max_tokens, self.top_p, self.top_k = temperature, max_tokens, top_p, top_k
        self.frequency_penalty, self.presence_penalty, self.on_text = frequency_penalty, presence_penalty, on_text
        self.stream, self.params, self.schema, self.tools = stream, dict(params or {}), schema, tools

    @property
    def prompt(self) -> str:
        """The text of the last message of the user."""
        asked = [message for message in self.messages if message.get("role") == "user"]
        return _joined_text(asked[-1].get("content")) if asked else ""

    def __repr__(self) -> str:
        return f"CompletionRequest(model={self.model!r}, prompt={_shorten(self.prompt, 60)!r})"

class CompletionResponse:
    """What a language model answered. Token counts are None where the vendor does not say. `finish_reason` is the
    vendor's word (such as stop, length, tool_use). `tool_calls` are maps of id, name and arguments; further keys are
    the vendor's, for the next request. `metadata` is JSON: finish_reason, request_id, truncated (true for an answer cut
    off by a limit) and more."""
    def __init__(self, text: str, model: str = "", input_tokens: int | None = None, output_tokens: int | None = None,
            finish_reason: str | None = None, request_id: str | None = None, tool_calls: Iterable[dict[str, Any]] = (),
            metadata: Mapping[str, Any] | None = None, total_tokens: int | None = None) -> None:
        self.text, self.model, self.input_tokens, self.output_tokens = text, model, input_tokens, output_tokens
        counts = [count for count in (input_tokens, output_tokens) if count is not None]
        self.total_tokens = total_tokens if total_tokens is not None or not counts else sum(counts)
        self.finish_reason, self.request_id, self.tool_calls = finish_reason, request_id, list(tool_calls)
        named = {"finish_reason": finish_reason, "request_id": request_id, **(metadata or {})}
        self.metadata: dict[str, Any] = {name: value for name, value in named.items() if value is not None}

    def __repr__(self) -> str:
        shown, model = _shorten(self.text, 60), self.model
        return f"CompletionResponse({shown!r}, {model=}, total_tokens={self.total_tokens})"

class EmbeddingRequest:
    """Texts to embed with a model. `input_type` is "query" or "document" for vendors that tell them apart."""
    def __init__(self, model: str, input: list[str], dimensions: int | None = None, input_type: str | None = None,
            params: Mapping[str, Any] | None = None) -> None:
        self.model, self.input, self.dimensions, self.input_type = model, input, dimensions, input_type
        self.params = dict(params or {})

class EmbeddingResponse:
    """`vectors` (lists of floats) in the order of the texts; `tokens` is None where the vendor does not say."""
    def __init__(self, vectors: list[list[float]], model: str = "", tokens: int | None = None) -> None:
        self.vectors, self.model, self.tokens = vectors, model, tokens

def _joined_text(content: Any) -> str:
    """The text of a content: itself, or the texts among its parts; TypeError or AttributeError if it is neither."""
    if isinstance(content, str):
        return content
    return "".join(_joined_text(part if isinstance(part, str) else part.get("text", "")) for part in content or ())

@functools.lru_cache(maxsize=256)
def _keys_to(place: str) -> tuple[str | int, ...]:
    return tuple(int(key) if key.isdigit() else key for key in place.split(".")) if place else ()

def _dig(document: Any, place: str) -> Any:
    """The value at a place such as "choices.0.message"; None where there is none."""
    try:
        for key in _keys_to(place):
            document = document[key]
    except _SHAPE_ERRORS:
        return None
    return document if place else None

def _total(document: Any, places: str) -> int | None:
    """The sum of the token counts at places such as "usage.a + usage.b"; None if there is none."""
    total = None
    for place in places.split(" + "):
        value = _dig(document, place)
        if type(value) in (int, float) and value >= 0:
            total = value + (total or 0)
    return None if total is None else int(total)

# ---- From a bad answer to an error -----------------------------------------------------------------------------------

_STATUS_ERRORS: dict[int, type[ProviderError]] = {
    401: AuthenticationError, 402: QuotaExceededError, 403: AuthenticationError, 408: ProviderTimeoutError,
    413: ContextLengthError, 429: RateLimitError, 498: AuthenticationError, 504: ProviderTimeoutError,
}
_WORD_ERRORS: tuple[tuple[type[ProviderError], frozenset[int | None], str], ...] = (  # what code and message decide
    (QuotaExceededError, frozenset((400, 402, 403, 429)), (
        r"insufficient[_ ](quota|balance|credits?|funds)|credit[_ ]balance|billing_(error|hard_limit)|out of credits"
        r"|spend(ing)?[ _-](limit|cap)|reached your specified .{0,20}usage limits")),
    (ContextLengthError, frozenset((400, 413, 422, 500, None)), (
        r"context[_ ](length|window|size|limit)|string_above_max_length|(prompt|input) is too long|prompt too long"
        r"|too many (input )?tokens|token count .{0,40}exceeds|too large for model|maximum model length"
        r"|reduce the length|max allowed tokens per|must have less than \d+ tokens|`inputs` tokens \+ `max_new_tokens`"
    )),
    (AuthenticationError, frozenset((400,)), r"api[_ ]key[_ ](not[_ ]valid|invalid)|invalid[_ ]api[_ ]key"),
)
_TYPE_STATUSES = {  # of errors inside an answer that began as a 200
    "overloaded_error": 529, "rate_limit_error": 429, "rate_limit_exceeded": 429, "slow_down": 429, "api_error": 500,
    "server_error": 500, "internal_server_error": 500, "server_is_overloaded": 503, "timeout_error": 504,
    "authentication_error": 401, "invalid_api_key": 401, "permission_error": 403, "billing_error": 402,
    "insufficient_quota": 429, "credit_balance_exhausted": 429, "invalid_request_error": 400, "not_found_error": 404,
    "context_length_exceeded": 400, "request_too_large": 413,
}
_SECRET_HEADER = "(?i)auth|key|token|secret|cookie|password|credential|signature"
_HEADER = rf"{_METHOD}: [\t\x20-\x7e\xa0-\xff]*"
_USUAL_HEADERS = dict.fromkeys(("Accept", "Content-Type"), "application/json")
_USUAL_HEADERS["User-Agent"] = f"llm_orchestrator/{__version__}"
_JSON_WRITER: Any = _OnDemand(
    "_JSON_WRITER", lambda _: json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")))

def _error_parts(document: Any) -> tuple[str, str, Any]:
    """(message, code and type, the error map) of the error bodies that vendors send."""
    document = document[0] if isinstance(document, list) and document else document
    if not isinstance(document, Mapping):
        return "", "", {}
    fault = document["error"] if isinstance(document.get("error"), Mapping) else document
    words = next((fault[key] for key in ("message", "detail", "error") if fault.get(key)), fault)
    code = " ".join(str(fault[key]) for key in ("code", "type", "status") if isinstance(fault.get(key), (str, int)))
    return _as_text(words), code, fault

class _RestClient:
    """JSON calls to one server: its address, its headers, and one way from a bad answer to an error without secrets."""
    def __init__(self, name: str, base_url: str, headers: Mapping[str, str], *, proxy: str | None,
            timeout_seconds: float | None) -> None:
        self.name, self.base_url = name, base_url.rstrip("/")
        given: dict[str, tuple[str, str]] = {}  # by its name in lower case: the last one counts
        secrets: set[str] = set()
        for header, value in {**_USUAL_HEADERS, **headers}.items():
            header, value = str(header), str(value).strip()
            secret = bool(re.search(_SECRET_HEADER, header))
            if not re.fullmatch(_HEADER, f"{header}: {value}"):
                reason = f"{name}: the header {header!r} holds characters that no header can carry"
                raise AuthenticationError(reason) if secret else ValidationError(reason)
            given[header.lower()] = (header, value)
            secrets |= {part for part in (value, value.split(" ")[-1]) if secret and len(part) > 3}
        self.headers, self.secrets = dict(given.values()), sorted(secrets, key=len, reverse=True)
        self.http = _HttpClient(name, proxy=proxy, timeout_seconds=timeout_seconds)

    def send(self, method: str, path: str, payload: Any = None, on_bytes: Any = None) -> _Response:
        """The response to a JSON payload; an error of the ProviderError family for every status from 400 on."""
        try:
            body = None if payload is None else _JSON_WRITER.encode(payload).encode()
        except (TypeError, ValueError, RecursionError) as error:  # a lone surrogate is a ValueError too
            raise ValidationError(f"{self.name}: the request has no JSON form: {error}") from None
        response = self.http.request(method, self.base_url + path, self.headers, body, on_bytes)
        if response.status >= 400:
            document = None
            with contextlib.suppress(ParseError):
                document = _load_json(response.body)
            raise self.error(response.status, response.headers, document, response.text)
        return response

    def error(self, status: int | None, headers: Mapping[str, str], document: Any, text: str) -> ProviderError:
        """The error that an answer is: its class, whether to retry, and how long the server asks to wait. `status` is
        that of HTTP; below 400 the error itself says what it is, as those do that come in a stream."""
        message, code, fault = _error_parts(document)
        message = self.excerpt(message or text.strip() or "no reason was given", 500)
        if status is None or status < 400:
            number, known = fault.get("code"), [_TYPE_STATUSES[word] for word in code.split() if word in _TYPE_STATUSES]
            status = number if isinstance(number, int) and 400 <= number < 600 else known[0] if known else None
        words = f"{code} {message}".lower()
        kinds = (kind for kind, statuses, said in _WORD_ERRORS if status in statuses and re.search(said, words))
        kind = next(kinds, _STATUS_ERRORS.get(status or 0, ProviderError))
        advice, wait = headers.get("x-should-retry"), _retry_after_seconds(headers)
        retryable = status in _RETRIED_STATUSES if advice not in ("true", "false") else advice == "true"
        for detail in fault["details"] if wait is None and isinstance(fault.get("details"), list) else ():
            delay = _dig(detail, "retryDelay")  # google.rpc.RetryInfo
            wait = _seconds(delay, "s") if isinstance(delay, str) else wait
        return kind(f"answered {status or 'an error'}: {message}", provider=self.name, status=status, retry_after=wait,
            retryable=retryable and kind not in (QuotaExceededError, ContextLengthError),
            request_id=headers.get("x-request-id") or headers.get("request-id") or _dig(document, "request_id"))

    def check(self, headers: Mapping[str, str], document: Any) -> None:
        """Raises the error that a document is whose only news is an error, though the status was good."""
        whole = document[0] if isinstance(document, list) and document else document
        if isinstance(whole, Mapping) and (whole.get("error") or whole.get("type") == "error"):
            raise self.error(None, headers, whole, "")

    def parse(self, response: _Response) -> Any:
        """The JSON of a response; an error for nonsense, and for a document that is an error."""
        try:
            document = _load_json(response.body)
        except ParseError as error:
            reason = f"answered something that is not JSON ({error.reason}): {self.excerpt(response.text)}"
            at_end = error.position >= len(response.text.rstrip()) or "Unterminated string" in error.reason
            cut = at_end and response.text.lstrip()[:1] in ("{", "[")  # what there is of it is right
            raise BadResponseError(reason, provider=self.name, status=response.status, retryable=cut) from None
        self.check(response.headers, document)
        return document

    def call(self, method: str, path: str, payload: Any = None) -> Any:
        """The JSON that the server answers to a JSON payload."""
        return self.parse(self.send(method, path, payload))

    @contextlib.contextmanager
    def reading(self, what: str, answer: Any) -> Iterator[None]:
        """Reading an answer inside this raises BadResponseError with its beginning where it has another shape."""
        try:
            yield
        except _SHAPE_ERRORS:
            text = answer.decode("utf-8", "replace") if isinstance(answer, bytes) else _as_text(answer)
            reason = f"answered something else than {what}: {self.excerpt(text)}"
            raise BadResponseError(reason, provider=self.name) from None

    def excerpt(self, text: str, limit: int = 200) -> str:
        """How a text of the server begins, without secrets and without what a terminal would obey."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return "".join(mark if mark.isprintable() else " " for mark in text[:limit])

_EVENT_LINE_END = re.compile(b"\r\n|\n|\r")

class _Events:
    """The events of a stream from its bytes: server-sent events (WHATWG HTML, 9.2), or lines of JSON."""
    def __init__(self, plain_lines: bool) -> None:
        self.plain_lines, self.after_return = plain_lines, False
        self.rest: list[bytes] = []  # of a line that has not ended yet
        self.data: list[str] = []  # of an event that has not ended yet
        self.other: list[str] = []  # lines that belong to no event

    def feed(self, piece: bytes) -> Iterator[str]:
        """The data of each event that the piece completes; two line ends end the last. Raises UnicodeDecodeError."""
        piece = piece[1:] if self.after_return and piece.startswith(b"\n") else piece
        self.after_return = piece.endswith(b"\r")
        first, *others = _EVENT_LINE_END.split(piece)
        self.rest.append(first)
        for following in others:
            line, self.rest = b"".join(self.rest).decode("utf-8").lstrip("\ufeff"), [following]
            if not line and self.data:
                yield "\n".join(self.data)
                self.data.clear()
            elif self.plain_lines and line.startswith("{") and line.rstrip().endswith("}"):
                yield line
            elif line.startswith("data:") and not self.plain_lines:
                self.data.append(line[6:] if line.startswith("data: ") else line[5:])
            elif not line.startswith((":", "event:", "id:", "retry:")):
                self.other.append(line)

# ---- Vendors ---------------------------------------------------------------------------------------------------------

_TRUNCATED = frozenset(("length", "max_tokens", "model_length", "max_output_tokens", "model_context_window_exceeded"))
_NORMAL_ENDS = _TRUNCATED | {  # an answer without text that ended otherwise was stopped
    "none", "", "stop", "end_turn", "stop_sequence", "complete", "eos", "eos_token", "tool_calls", "tool_use", "load",
    "pause_turn",
}

class Provider:
    """Base of the vendors' clients; safe for many threads. It takes `api_key`, `base_url`, extra `headers`,
    `timeout_seconds` of each call, `proxy` (a URL, "" for none) and the options that the class lists in `OPTIONS`.
    `from_env` fills what is not given from the official SDK's variables. `native_schema` says whether `schema` is sent
    to the vendor; where it is not, the prompt has to ask for it."""
    TYPE = BASE_URL = CHAT_PATH = STREAM_PATH = EMBED_PATH = ""
    PREFIX = ""  # where the vendor's calls lie below the base URL, which may end with it or with another version
    KEY_VARIABLES, URL_VARIABLES = (), ()  # type: tuple[str, ...], tuple[str, ...]
    KEY_URLS: Mapping[str, str] = {}  # how a key begins -> another base URL for it
    NEEDS_KEY, KEY_HEADER = True, ("Authorization", "Bearer ")
    OPTIONS: Mapping[str, str | None] = {}  # name -> the variable that sets it, or None
    TOKEN_OPTION = ""  # the option that holds a bearer token in place of a key
    FIELDS: Mapping[str, str] = {}  # of a request -> the vendor's place for it ("options.seed": inside a map)
    STREAMING: tuple[dict[str, Any], dict[str, Any]] = {}, {"stream": True}  # fields of a plain and of a streamed call
    PLACES, COUNTS = ("model", "id", ""), ("", "", "")  # of an answer's model, id, finish reason; of its input, output
    # and total tokens (" + " for a sum)
    EMBED_FIELDS = ("input", "dimensions")  # the vendor's names for these
    EMBED_EXTRA: Mapping[str, Any] = {}  # further fields of an embedding call
    INPUT_TYPES: Mapping[str, str] = {}  # the vendor's words for query and document, if it asks for them
    VECTORS, EMBED_TOKENS, max_batch = "data", "usage.prompt_tokens", 2048  # texts in one embedding call
    PLAIN_LINES, native_schema = False, True  # streams are lines of JSON, not server-sent events
    OBJECT_SCHEMAS = True  # a schema has to be that of a map, so that others are wrapped

    # What a vendor says. The readers may raise KeyError and the like for nonsense.
    conversation: Callable[[CompletionRequest], dict[str, Any]]  # the body's fields of model, system text and messages
    tools: Callable[[CompletionRequest], list[dict[str, Any]]]
    schema_fields: Callable[[CompletionRequest], dict[str, Any]]  # the body's fields that ask for an answer by a schema
    read: Callable[[Any, CompletionRequest], dict[str, Any]]  # a document's text, tool_calls and what has no PLACE
    merge: Callable[[dict[str, Any], Any], str]  # adds a stream's event to the document that `read` gets; returns its
    # text; sets document["finished"] when the vendor said that the answer is complete, ["done"] at the end mark

    def __init__(self, *, api_key: str | None = None, base_url: str | None = None,
            headers: Mapping[str, str] | None = None, timeout_seconds: float | None = None, proxy: str | None = None,
            name: str | None = None, **options: Any) -> None:
        self.limits = {limit: options.pop(limit, None) for limit in ("rate_limit", "circuit_breaker")}
        for option in options:
            if option not in self.OPTIONS:
                known = (*self.OPTIONS, "api_key", "base_url", "headers", "timeout_seconds", "proxy")
                raise ValidationError(f"{self.TYPE}: unknown option {option!r}{_suggestion(option, known)}")
        self.name, self.timeout_seconds = name or self.TYPE, timeout_seconds
        self.options = {option: options.get(option) for option in self.OPTIONS}
        key, token = (str(secret or "").strip() for secret in (api_key, options.get(self.TOKEN_OPTION)))
        own = {"Authorization": f"Bearer {token}"} if token else {}
        own = {self.KEY_HEADER[0]: self.KEY_HEADER[1] + key} if key else own
        self.base_url = self.address((base_url or self.KEY_URLS.get(key[:3], self.BASE_URL)).rstrip("/"))
        url, headers = self.base_url + self.PREFIX, {**own, **self.extra_headers(), **(headers or {})}
        self._rest = _RestClient(self.name, url, headers, timeout_seconds=timeout_seconds, proxy=proxy)

    @classmethod
    def from_env(cls, **overrides: Any) -> Any:
        """A client set up by the environment. AuthenticationError names the variable of a key that is missing."""
        given = {name: value for name, value in overrides.items() if value is not None}
        given.setdefault("base_url", _variable(*cls.URL_VARIABLES))
        if not given.get("api_key") and not given.get(cls.TOKEN_OPTION):
            given["api_key"] = _variable(*cls.KEY_VARIABLES)
        for option, variable in cls.OPTIONS.items():
            if variable and (option != cls.TOKEN_OPTION or not given.get("api_key")):
                given.setdefault(option, _variable(variable))
        if missing := cls.missing_settings(given):
            raise AuthenticationError(f"set {missing} in the environment", provider=given.get("name") or cls.TYPE)
        return cls(**given)

    @classmethod
    def missing_settings(cls, settings: Mapping[str, Any]) -> str:
        """Which variables have to be set, if any have to."""
        keyed = settings.get("api_key") or settings.get(cls.TOKEN_OPTION) or not cls.NEEDS_KEY
        placed = settings.get("base_url") or cls.BASE_URL
        missing = () if placed else cls.URL_VARIABLES, () if keyed else cls.KEY_VARIABLES
        return " and ".join(" or ".join(names) for names in missing if names)

    def address(self, base_url: str) -> str:
        """The base URL without the PREFIX, or another version, that it may end with."""
        return re.sub(rf"({re.escape(self.PREFIX)})?(/v\d\w*)?$", "", base_url, count=1) if self.PREFIX else base_url

    def extra_headers(self) -> dict[str, str]:
        return {}

    def place(self, path: str, model: str) -> str:
        """Where a call of a model goes, below the prefix."""
        return path

    def fields(self, request: CompletionRequest) -> Mapping[str, str]:
        """FIELDS of this request."""
        return self.FIELDS

    def complete(self, request: CompletionRequest) -> CompletionResponse:
        """The answer to a request. Raises ValidationError for a request that cannot be written, and errors of the
        ProviderError family. What `on_text` raises passes unchanged."""
        path, body = self._written(self._completion_call, request)
        started, first = time.perf_counter(), None
        if request.stream:
            response, document, first = self._stream(path, body, request)
        else:
            response = self._rest.send("POST", path, body)
            document = self._rest.parse(response)
        with self._rest.reading("a completion", document):
            answer = self.answer(document, request)
        finish = str(answer.finish_reason).lower()
        if not answer.text and not answer.tool_calls and finish not in _NORMAL_ENDS:
            raise BadResponseError(f"gave no answer: it was stopped by {answer.finish_reason}", provider=self.name)
        fields, headers = self.fields(request), response.headers
        answer.request_id = headers.get("x-request-id") or headers.get("request-id") or answer.request_id
        ignored = [name for name in _TUNING if name not in fields and getattr(request, name) is not None]
        wait = None if first is None else round((first - started) * 1000, 3)
        for name, value in (("request_id", answer.request_id), ("ignored", ignored or None),
                ("truncated", finish in _TRUNCATED or None), ("time_to_first_token_ms", wait)):
            if value is not None:
                answer.metadata[name] = value
        return answer

    def _written(self, write: Callable[[Any], tuple[str, dict[str, Any]]], request: Any) -> tuple[str, dict[str, Any]]:
        """(path, body) of a request, with its `params` added."""
        try:
            path, body = write(request)
            _add_fields(body, request.params)
            return path, body
        except _SHAPE_ERRORS as error:
            reason = f"{self.name}: the request cannot be written: {type(error).__name__}: {error}"
            raise ValidationError(reason) from None

    def _completion_call(self, request: CompletionRequest) -> tuple[str, dict[str, Any]]:
        """(path, body) of a completion, put together from what the vendor says."""
        if not self.CHAT_PATH:
            raise ValidationError(f"the provider {self.name!r} makes embeddings only")
        body = self.conversation(request)
        for name, place in self.fields(request).items():
            value = getattr(request, name)
            if value is not None:
                value = [value] if name == "stop" and isinstance(value, str) else value
                outer, _, last = place.rpartition(".")
                _add_fields(body, {outer: {last: value}} if outer else {last: value})
        if request.tools:
            body["tools"] = self.tools(request)
        if request.schema is not None and self.native_schema:
            _add_fields(body, self.schema_fields(request))
        body.update(self.STREAMING[bool(request.stream)])
        return self.place((request.stream and self.STREAM_PATH) or self.CHAT_PATH, request.model), body

    def _stream(self, path: str, body: Any, request: CompletionRequest) -> tuple[_Response, Any, float | None]:
        """(response, the document that the events built up, when the first text came). A stream that ends before its
        end mark is a lost connection."""
        events, document, last = _Events(self.PLAIN_LINES), {}, []  # type: _Events, dict[str, Any], list[str]
        first: float | None = None

        def merged(text: str) -> str:
            if text.strip() == "[DONE]":
                document["done"] = True
                return ""
            event = self._rest.parse(_Response(200, {}, text.encode()))
            with self._rest.reading("the events of a completion", text):
                return self.merge(document, event)

        def listen(piece: str) -> None:
            nonlocal first
            first = first or (time.perf_counter() if piece else None)
            if piece and request.on_text:
                request.on_text(piece)

        def on_bytes(piece: bytes) -> bool:
            with self._rest.reading("a stream in UTF-8", piece):
                texts = list(events.feed(piece))
            for text in texts:
                if not document.get("done"):
                    listen(merged(text))
            return bool(document.get("done"))

        response = self._rest.send("POST", path, body, on_bytes)
        if not document.get("done"):
            with contextlib.suppress(BadResponseError, UnicodeDecodeError):  # an event that was cut off
                last = [merged(text) for text in events.feed(b"\n\n")]
            for piece in last:
                listen(piece)
        response.body = "\n".join(events.other).strip().encode()
        streams = re.search("event-stream|ndjson", response.headers.get("content-type", ""))
        if not document and response.body and not streams:  # the whole answer at once
            return response, self._rest.parse(response), None
        if not (document.get("done") or document.get("finished")):
            with contextlib.suppress(BadResponseError):  # an error may follow the events as it would stand alone
                self._rest.parse(response)
            raise ProviderConnectionError("the stream ended before its end mark", provider=self.name)
        self._rest.check(response.headers, document)
        return response, document, first

    def answer(self, document: Any, request: CompletionRequest) -> CompletionResponse:
        """The response that a document is. May raise KeyError and the like for nonsense."""
        model, request_id, finish = [_dig(document, place) for place in self.PLACES]
        facts = {"model": model or request.model, "request_id": request_id, "finish_reason": finish}
        facts = {name: str(value) for name, value in facts.items() if isinstance(value, (str, int))}
        for name, places in zip(("input_tokens", "output_tokens", "total_tokens"), self.COUNTS):
            facts[name] = _total(document, places)
        response = CompletionResponse(**{**facts, **self.read(document, request)})
        if request.schema is not None and self.OBJECT_SCHEMAS:
            response.text = _unwrapped(response.text, request.schema)
        return response

    def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        """The vectors of at most `max_batch` texts; errors as those of `complete`."""
        path, body = self._written(self.embedding_call, request)
        document = self._rest.call("POST", path, body)
        with self._rest.reading(f"{len(request.input)} embeddings", document):
            rows = _dig(document, self.VECTORS)
            if isinstance(rows[0], dict):
                rows = sorted(rows, key=lambda row: row.get("index", 0))
                rows = [row["embedding"] if "embedding" in row else row["values"] for row in rows]
            sizes, kinds = {len(row) for row in rows}, {type(number) for row in rows for number in row}
            if len(rows) != len(request.input) or len(sizes) != 1 or not kinds or not kinds <= {int, float}:
                raise ValueError
            model = str(_dig(document, "model") or request.model)
            return EmbeddingResponse(rows, model, _total(document, self.EMBED_TOKENS))

    def embedding_call(self, request: EmbeddingRequest) -> tuple[str, dict[str, Any]]:
        """(path, body) of an embedding call."""
        if not self.EMBED_PATH:
            raise ValidationError(f"the provider {self.name!r} makes no embeddings")
        texts, dimensions = self.EMBED_FIELDS
        body: dict[str, Any] = {"model": request.model, texts: request.input, **self.EMBED_EXTRA}
        body.update({} if request.dimensions is None else {dimensions: request.dimensions})
        if self.INPUT_TYPES and request.input_type is not None:
            body["input_type"] = self.INPUT_TYPES.get(request.input_type, request.input_type)
        return self.place(self.EMBED_PATH, request.model), body

    def close(self) -> None:
        """Closes the connections that are not in use."""
        self._rest.http.close()

    def __repr__(self) -> str:
        shown = re.sub(r"(?<=//)[^/]*@|\?.*", "", self.base_url)  # no password, no query
        return f"{type(self).__name__}(name={self.name!r}, base_url={shown!r})"

def _variable(*names: str) -> str | None:
    """The first of these environment variables that is set and not empty."""
    return next(filter(None, map(os.environ.get, names)), None)

def _add_fields(body: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Adds fields to a body; a map joins the one that is there."""
    for key, value in fields.items():
        both = isinstance(value, Mapping) and isinstance(body.get(key), Mapping)
        body[key] = {**body[key], **value} if both else value

def _as_text(value: Any) -> str:
    """A text as it is, anything else as JSON: what tools return, and the arguments they are called with."""
    return value if isinstance(value, str) else _to_json(value)

def _system_apart(request: CompletionRequest) -> tuple[str, list[dict[str, Any]]]:
    """The request's system texts, and its other messages, for vendors that keep the two apart."""
    system = [request.system or ""]
    system += [_joined_text(message.get("content")) for message in request.messages if message["role"] == "system"]
    return "\n\n".join(filter(None, system)), [message for message in request.messages if message["role"] != "system"]

def _merged_turns(messages: Iterable[dict[str, Any]], parts: str) -> list[dict[str, Any]]:
    """Messages in which neighbours of one role are one, as vendors want the results of several tool calls."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        lists = merged and isinstance(message[parts], list) and isinstance(merged[-1][parts], list)
        if lists and merged[-1]["role"] == message["role"]:
            merged[-1] = {**message, parts: [*merged[-1][parts], *message[parts]]}
        else:
            merged.append(message)
    return merged

def _functions(request: CompletionRequest, parameters: str = "parameters") -> list[dict[str, Any]]:
    """The tools of a request, with the vendor's name for the schema of their parameters."""
    nothing = {"type": "object", "properties": {}}
    return [{"name": tool["name"], "description": tool.get("description") or "", parameters: tool.get("parameters")
        or nothing} for tool in request.tools or ()]

def _load_arguments(arguments: Any) -> Any:
    """The arguments of a tool call: a JSON text (or its pieces), or a map already; what is no JSON stays text."""
    if isinstance(arguments, list):
        arguments = "".join(arguments) if all(isinstance(piece, str) for piece in arguments) else arguments[-1]
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    with contextlib.suppress(ParseError):
        return _load_json(arguments) if isinstance(arguments, str) else arguments
    return arguments

def _tool_calls(found: Iterable[tuple[Any, Any, Any]]) -> list[dict[str, Any]]:
    """The tool calls of a CompletionResponse from (id or None, name, arguments). Raises ValueError for no name."""
    calls = []
    for index, (id, name, arguments) in enumerate(found):
        if not (isinstance(name, str) and name):
            raise ValueError("a tool call without a name")
        calls.append({"id": str(id or f"call_{index}"), "name": name, "arguments": _load_arguments(arguments)})
    return calls

def _object_schema(schema: Any) -> Any:
    """A schema for vendors whose answers are maps: those of other values are wrapped under `value`."""
    if not isinstance(schema, Mapping) or schema.get("type") == "object":
        return schema
    outer = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    inner = {key: value for key, value in schema.items() if key not in outer}
    wrapped = {"type": "object", "properties": {"value": inner}, "required": ["value"], "additionalProperties": False}
    return {**wrapped, **outer}

def _unwrapped(text: str, schema: Any) -> str:
    """The text of an answer to `_object_schema(schema)` as it would be without the wrapping."""
    with contextlib.suppress(ParseError):
        answer = _load_json(text) if _object_schema(schema) is not schema else None
        if isinstance(answer, dict) and list(answer) == ["value"]:
            return _to_json(answer["value"])
    return text

_STRICT_KEYS = frozenset((
    "type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf", "$ref", "$defs",
    "title", "description"))

def _is_strict(schema: Any) -> bool:
    """Whether the strict modes of OpenAI and Anthropic take a schema: maps are closed, nothing in them is optional. See
    "Structured outputs" in platform.openai.com/docs/guides and docs.anthropic.com/en/docs/build-with-claude."""
    if not isinstance(schema, Mapping) or not _STRICT_KEYS.issuperset(schema):
        return False
    properties, required = schema.get("properties", {}), schema.get("required", ())
    closed = schema.get("additionalProperties") is False and set(required) == set(properties)
    inner = [*properties.values(), *schema.get("$defs", {}).values(), *schema.get("anyOf", ())]
    inner += [schema["items"]] if "items" in schema else []
    return (closed or not (properties or schema.get("type") == "object")) and all(map(_is_strict, inner))

def _named_schema(schema: Any) -> dict[str, Any]:
    """A schema as OpenAI's interfaces want it."""
    schema = _object_schema(schema)
    return {"name": "answer", "schema": schema, **({"strict": True} if _is_strict(schema) else {})}

class _ChatCompletions(Provider):
    """What speaks Chat Completions, or nearly so: messages of role and content, arguments of tools as JSON text."""
    CHAT_PATH, EMBED_PATH = "/chat/completions", "/embeddings"
    FIELDS: Mapping[str, str] = {name: name for name in _TUNING if name != "top_k"}
    COUNTS = ("usage.prompt_tokens", "usage.completion_tokens", "usage.total_tokens")

    def conversation(self, request: CompletionRequest) -> dict[str, Any]:
        system = [{"role": "system", "content": request.system}] if request.system else []
        return {"model": request.model, "messages": system + [self.message(message) for message in request.messages]}

    def message(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        if message["role"] == "tool":
            return {"role": "tool", "tool_call_id": message["id"], "content": _as_text(message["content"])}
        if not message.get("tool_calls"):
            return message
        calls = [(call["id"], call["name"], _as_text(call["arguments"])) for call in message["tool_calls"]]
        functions = [(id, {"name": name, "arguments": arguments}) for id, name, arguments in calls]
        turn = {"tool_calls": [{"id": id, "type": "function", "function": function} for id, function in functions]}
        return {"role": "assistant", **({"content": message["content"]} if message.get("content") else {}), **turn}

    def tools(self, request: CompletionRequest) -> list[dict[str, Any]]:
        return [{"type": "function", "function": function} for function in _functions(request)]

    def schema_fields(self, request: CompletionRequest) -> dict[str, Any]:
        return {"response_format": {"type": "json_schema", "json_schema": _named_schema(request.schema)}}

    def read(self, document: Any, request: CompletionRequest) -> dict[str, Any]:
        choice = document["choices"][0] if "choices" in document else document
        self._rest.check({}, choice)  # OpenRouter's errors once the generation began
        message, finish = choice["message"], choice.get("finish_reason") or choice.get("done_reason")
        content, refusal = message.get("content"), message.get("refusal")
        found = [(call.get("id"), call["function"]) for call in message.get("tool_calls") or ()]
        calls = _tool_calls((id, function["name"], function.get("arguments")) for id, function in found)
        if content is None and not (calls or refusal) and str(finish or "stop").lower() in _NORMAL_ENDS - _TRUNCATED:
            raise ValueError("no content, and no reason for it")
        marked = {"refusal": True} if refusal and not content else None
        text, finish = _joined_text(content or refusal), str(finish) if finish else None
        return {"text": text, "tool_calls": calls, "finish_reason": finish, "metadata": marked}

    def merge(self, document: dict[str, Any], event: Any) -> str:
        document.update({key: value for key, value in event.items() if value and key not in ("choices", "message")})
        text, message = "", document.setdefault("message", {})
        for choice in event.get("choices") or ([event] if "message" in event else ()):
            if choice.get("index", 0) == 0:
                self._rest.check({}, choice)
                text += self.add_delta(message, choice.get("delta") or choice.get("message") or {})
                if choice.get("finish_reason"):
                    document["finish_reason"] = document["finished"] = choice["finish_reason"]
        return text

    def add_delta(self, message: dict[str, Any], delta: Any) -> str:
        """Adds a piece of a message to the whole; texts and arguments are lists of their pieces. Returns the text."""
        calls, opened, text = message.setdefault("tool_calls", []), message.setdefault("opened", {}), ""
        for part in delta.get("tool_calls") or ():
            index, function = part.get("index"), part.get("function") or {}
            call = opened.get(index)
            other = index is None or part.get("id") not in (None, "", call and call["id"])
            if call is None or (other and function.get("name")):
                call = opened[index] = {"id": part.get("id"), "function": {"name": "", "arguments": []}}
                calls.append(call)
            call["function"]["name"] = call["function"]["name"] or function.get("name") or ""
            call["function"]["arguments"] += [function["arguments"]] if function.get("arguments") else []
        for field in ("content", "refusal"):
            if delta.get(field) is not None:
                text = _joined_text(delta[field])
                message.setdefault(field, []).append(text)
        return text

class OpenAIProvider(_ChatCompletions):
    """OpenAI: Chat Completions, Responses for the models that only it serves (or `api: responses`), Embeddings.
    Sources: platform.openai.com/docs/api-reference; openai-python 3.54 (`resources/chat/completions.py`)."""
    TYPE, BASE_URL = "openai", "https://api.openai.com/v1"
    KEY_VARIABLES, URL_VARIABLES = ("OPENAI_API_KEY",), ("OPENAI_BASE_URL",)
    OPTIONS: Mapping[str, str | None] = {"organization": "OPENAI_ORG_ID", "project": "OPENAI_PROJECT_ID", "api": None}
    STREAMING = ({}, {"stream": True, "stream_options": {"include_usage": True}})
    _NEW_LIMIT = r"(.*/)?(ft:)?(o[1-9]|gpt-[5-9]|codex|computer-use)"  # these refuse max_tokens
    _RESPONSES_ONLY = r"(.*/)?(o[1-9]-pro|gpt-[5-9][\w.]*-pro|.*codex|.*deep-research|computer-use)"

    def extra_headers(self) -> dict[str, str]:
        named = {"OpenAI-Organization": self.options.get("organization"), "OpenAI-Project": self.options.get("project")}
        return {header: str(value) for header, value in named.items() if value}

    def complete(self, request: CompletionRequest) -> CompletionResponse:
        chosen = self.options["api"] or ("responses" if re.match(self._RESPONSES_ONLY, request.model) else "")
        return _Responses(self).complete(request) if chosen == "responses" else super().complete(request)

    def fields(self, request: CompletionRequest) -> Mapping[str, str]:
        newer = request.max_tokens is not None and re.match(self._NEW_LIMIT, request.model)
        return {**self.FIELDS, "max_tokens": "max_completion_tokens"} if newer else self.FIELDS

class _Responses(Provider):
    """OpenAI's Responses interface, over the connections of a provider that has it."""
    CHAT_PATH = "/responses"
    FIELDS: Mapping[str, str] = {"temperature": "temperature", "top_p": "top_p", "max_tokens": "max_output_tokens"}
    COUNTS = ("usage.input_tokens", "usage.output_tokens", "usage.total_tokens")

    def __init__(self, client: OpenAIProvider) -> None:
        self.name, self._rest, self.native_schema = client.name, client._rest, client.native_schema
        self.place = client.place  # type: ignore[method-assign]

    def conversation(self, request: CompletionRequest) -> dict[str, Any]:
        items: list[dict[str, Any]] = []
        for message in request.messages:
            if message["role"] == "tool":
                output = _as_text(message["content"])
                items.append({"type": "function_call_output", "call_id": message["id"], "output": output})
            elif message.get("content"):
                items.append({"role": message["role"], "content": message["content"]})
            for call in message.get("tool_calls") or ():
                named = {"call_id": call["id"], "name": call["name"], "arguments": _as_text(call["arguments"])}
                items.append({"type": "function_call", **named})
        instructions = {"instructions": request.system} if request.system else {}
        return {"model": request.model, "input": items, **instructions}

    def tools(self, request: CompletionRequest) -> list[dict[str, Any]]:
        return [{"type": "function", "strict": False, **function} for function in _functions(request)]

    def schema_fields(self, request: CompletionRequest) -> dict[str, Any]:
        return {"text": {"format": {"type": "json_schema", **_named_schema(request.schema)}}}

    def read(self, document: Any, request: CompletionRequest) -> dict[str, Any]:
        if document.get("status") == "failed":
            raise self._rest.error(None, {}, {"error": "the response failed"}, "")
        parts = [part for item in document["output"] if item["type"] == "message" for part in item["content"]]
        found = [item for item in document["output"] if item["type"] == "function_call"]
        calls = _tool_calls((item["call_id"], item["name"], item["arguments"]) for item in found)
        text = _joined_text([part["text" if part["type"] == "output_text" else "refusal"] for part in parts])
        reason = (document.get("incomplete_details") or {}).get("reason")
        finish = {"max_output_tokens": "length", None: "tool_calls" if calls else "stop"}.get(reason, reason)
        refusal = {"refusal": True} if any(part["type"] == "refusal" for part in parts) else None
        return {"text": text, "tool_calls": calls, "finish_reason": str(finish), "metadata": refusal}

    def merge(self, document: dict[str, Any], event: Any) -> str:
        document["begun"] = True
        if event["type"] in ("response.completed", "response.incomplete", "response.failed"):
            document.update(event["response"], done=True)
        return str(event["delta"]) if event["type"] in ("response.output_text.delta", "response.refusal.delta") else ""

class OpenAICompatibleProvider(OpenAIProvider):
    """Any server that speaks Chat Completions: vLLM, LM Studio, llama.cpp, LiteLLM. `base_url` ends with /v1.
    `structured: instructions` is for servers without response_format json_schema."""
    TYPE, BASE_URL, NEEDS_KEY = "openai_compatible", "http://localhost:8000/v1", False
    KEY_VARIABLES, URL_VARIABLES = ("OPENAI_COMPATIBLE_API_KEY",), ("OPENAI_COMPATIBLE_BASE_URL",)
    OPTIONS: Mapping[str, str | None] = {"api": None, "structured": None}
    FIELDS: Mapping[str, str] = {name: name for name in _TUNING}
    _NEW_LIMIT = _RESPONSES_ONLY = "(?!)"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.native_schema = self.options["structured"] != "instructions"

def _service(kind: str, base_url: str, prefix: str) -> type[Provider]:
    """A service that speaks Chat Completions, with the variables that its SDK reads."""
    settings = {"KEY_VARIABLES": (f"{kind.upper()}_API_KEY",), "URL_VARIABLES": (f"{kind.upper()}_BASE_URL",)}
    facts = {"TYPE": kind, "BASE_URL": base_url, "PREFIX": prefix, "NEEDS_KEY": True, "__doc__": f"{base_url}{prefix}"}
    return type(f"{kind.title()}Provider", (OpenAICompatibleProvider,), {**facts, **settings})

class AzureOpenAIProvider(OpenAIProvider):
    """Azure OpenAI: the v1 path, or with `api_version` the path of a deployment (`deployment`, by default the model).
    Sources: learn.microsoft.com/azure/ai-services/openai/reference; openai-python 3.54 (`lib/azure.py`)."""
    TYPE, BASE_URL, PREFIX = "azure", "", "/openai"
    KEY_VARIABLES, URL_VARIABLES = ("AZURE_OPENAI_API_KEY",), ("AZURE_OPENAI_ENDPOINT",)
    OPTIONS: Mapping[str, str | None] = {
        "api_version": "OPENAI_API_VERSION", "deployment": None, "ad_token": "AZURE_OPENAI_AD_TOKEN", "api": None}
    TOKEN_OPTION, KEY_HEADER = "ad_token", ("api-key", "")

    @classmethod
    def missing_settings(cls, settings: Mapping[str, Any]) -> str:
        return super().missing_settings(settings) if settings.get("base_url") else "AZURE_OPENAI_ENDPOINT"

    def place(self, path: str, model: str) -> str:
        version = str(self.options["api_version"] or "v1")
        if version in ("v1", "latest", "preview"):
            return f"/v1{path}" + ("?api-version=preview" if version == "preview" else "")
        from urllib.parse import quote

        deployment = f"/deployments/{quote(str(self.options['deployment'] or model), safe='')}"
        return f"{'' if path == '/responses' else deployment}{path}?api-version={quote(version, safe='')}"

class MistralProvider(_ChatCompletions):
    """Mistral. Sources: docs.mistral.ai/api; mistralai 3.7 (`models/chatcompletionrequest.py`)."""
    TYPE, BASE_URL, PREFIX = "mistral", "https://api.mistral.ai", "/v1"
    KEY_VARIABLES, URL_VARIABLES = ("MISTRAL_API_KEY",), ("MISTRAL_BASE_URL",)
    FIELDS, EMBED_FIELDS = {**_ChatCompletions.FIELDS, "seed": "random_seed"}, ("input", "output_dimension")

class CohereProvider(_ChatCompletions):
    """Cohere v2. Sources: docs.cohere.com/reference/chat, /reference/embed; cohere 7.3.1 (`v2/client.py`)."""
    TYPE, BASE_URL, PREFIX, CHAT_PATH, EMBED_PATH = "cohere", "https://api.cohere.com", "/v2", "/chat", "/embed"
    KEY_VARIABLES, URL_VARIABLES = ("CO_API_KEY", "COHERE_API_KEY"), ("CO_API_URL",)
    FIELDS: Mapping[str, str] = {**_ChatCompletions.FIELDS, "top_p": "p", "top_k": "k", "stop": "stop_sequences"}
    COUNTS, max_batch = ("usage.tokens.input_tokens", "usage.tokens.output_tokens", ""), 96
    VECTORS, EMBED_TOKENS = "embeddings.float", "meta.billed_units.input_tokens"
    EMBED_FIELDS = ("texts", "output_dimension")
    EMBED_EXTRA: Mapping[str, Any] = {"input_type": "search_document", "embedding_types": ["float"]}
    INPUT_TYPES: Mapping[str, str] = {"query": "search_query", "document": "search_document"}

    def schema_fields(self, request: CompletionRequest) -> dict[str, Any]:
        shape = {"response_format": {"type": "json_object", "json_schema": _object_schema(request.schema)}}
        return {} if request.tools else shape  # it does not combine the two

    def merge(self, document: dict[str, Any], event: Any) -> str:
        message, kind, delta = document.setdefault("message", {}), event["type"], event.get("delta") or {}
        part = delta.get("message") or {}
        if kind == "message-start":
            document["id"] = event.get("id")
        elif kind == "message-end":
            document.update(delta, done=True)
        elif kind == "content-delta":
            return self.add_delta(message, {"content": part["content"].get("text")})  # null where it is thinking
        elif kind in ("tool-call-start", "tool-call-delta"):
            self.add_delta(message, {"tool_calls": [{"index": event.get("index", 0), **part["tool_calls"]}]})
        return ""

class OllamaProvider(_ChatCompletions):
    """Ollama's own interface; no key. Sources: github.com/ollama/ollama docs/api.md; ollama 0.6.3 (`_client.py`)."""
    TYPE, BASE_URL, PREFIX, CHAT_PATH, EMBED_PATH = "ollama", "http://127.0.0.1:11434", "/api", "/chat", "/embed"
    NEEDS_KEY, KEY_VARIABLES, URL_VARIABLES = False, ("OLLAMA_API_KEY",), ("OLLAMA_HOST",)
    FIELDS: Mapping[str, str] = {name: f"options.{'num_predict' if name == 'max_tokens' else name}" for name in _TUNING}
    STREAMING = ({"stream": False}, {"stream": True})  # it streams where it is not said
    COUNTS = ("prompt_eval_count", "eval_count", "")
    VECTORS, EMBED_TOKENS, PLAIN_LINES, OBJECT_SCHEMAS = "embeddings", "prompt_eval_count", True, False

    def address(self, base_url: str) -> str:
        """OLLAMA_HOST is a host, host:port or URL; 0.0.0.0 is where a server listens, not where it is."""
        scheme, _, rest = base_url.rpartition("://")
        host, slash, path = rest.replace("0.0.0.0", "127.0.0.1", 1).partition("/")
        host = f"127.0.0.1{host}" if host[:1] in ("", ":") else host
        port = "" if scheme or re.search(r":\d+$", host) else ":11434"
        return super().address(f"{scheme or 'http'}://{host}{port}{slash}{path}".rstrip("/"))

    def schema_fields(self, request: CompletionRequest) -> dict[str, Any]:
        return {"format": request.schema}

    def message(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        if message["role"] == "tool":
            return {"role": "tool", "tool_name": message["name"], "content": _as_text(message["content"])}
        calls = [{"name": call["name"], "arguments": call["arguments"]} for call in message.get("tool_calls") or ()]
        whole = {**message, "content": _joined_text(message.get("content"))}  # images are a list beside it
        return {**whole, "tool_calls": [{"function": call} for call in calls]} if calls else whole

class VoyageProvider(Provider):
    """Voyage embeddings; keys that begin with al- are those of MongoDB Atlas.
    Sources: docs.voyageai.com/reference/embeddings-api; voyageai 0.5 (`client.py`, `util.py`)."""
    TYPE, BASE_URL, PREFIX = "voyage", "https://api.voyageai.com", "/v1"
    KEY_VARIABLES, KEY_URLS = ("VOYAGE_API_KEY",), {"al-": "https://ai.mongodb.com"}
    EMBED_PATH, EMBED_FIELDS, EMBED_TOKENS = "/embeddings", ("input", "output_dimension"), "usage.total_tokens"
    INPUT_TYPES, max_batch = {"query": "query", "document": "document"}, 128

class AnthropicProvider(Provider):
    """Anthropic Messages. `anthropic_version` 2023-06-01 by default: later ones refuse temperature, top_p and top_k,
    which are then left out. A schema that the strict mode does not take is a tool that the model is made to call.
    Sources: docs.anthropic.com/en/api/messages, /api/errors, /api/versioning; anthropic-sdk-python 2.12."""
    TYPE, BASE_URL, PREFIX, CHAT_PATH = "anthropic", "https://api.anthropic.com", "/v1", "/messages"
    KEY_VARIABLES, URL_VARIABLES = ("ANTHROPIC_API_KEY",), ("ANTHROPIC_BASE_URL",)
    OPTIONS: Mapping[str, str | None] = {
        "auth_token": "ANTHROPIC_AUTH_TOKEN", "anthropic_version": None, "custom_headers": "ANTHROPIC_CUSTOM_HEADERS"}
    TOKEN_OPTION, KEY_HEADER = "auth_token", ("x-api-key", "")
    FIELDS: Mapping[str, str] = {**{name: name for name in _TUNING[:4]}, "stop": "stop_sequences"}
    PLACES = ("model", "id", "stop_reason")
    _INPUT_TOKENS = "usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens"
    COUNTS = (_INPUT_TOKENS, "usage.output_tokens", "")
    _DEFAULT_MAX_TOKENS, _ANSWER_TOOL = 4096, "give_answer"

    def version(self) -> str:
        return str(self.options["anthropic_version"] or "2023-06-01")

    def extra_headers(self) -> dict[str, str]:
        lines = [line.partition(":") for line in str(self.options["custom_headers"] or "").splitlines()]
        custom = {header.strip(): value.strip() for header, colon, value in lines if colon}
        return {"anthropic-version": self.version(), **custom}

    def fields(self, request: CompletionRequest) -> Mapping[str, str]:
        removed = ("temperature", "top_p", "top_k") if self.version() >= "2026-10-21" else ()
        return {name: place for name, place in self.FIELDS.items() if name not in removed}

    def conversation(self, request: CompletionRequest) -> dict[str, Any]:
        system, messages = _system_apart(request)
        turns = _merged_turns(map(self.message, messages), "content")
        body = {"model": request.model, "max_tokens": self._DEFAULT_MAX_TOKENS, "messages": turns}
        return {**body, "system": system} if system else body

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if message["role"] == "tool":
            result = {"type": "tool_result", "tool_use_id": message["id"], "content": _as_text(message["content"])}
            return {"role": "user", "content": [{**result, "is_error": True} if message.get("is_error") else result]}
        if not message.get("tool_calls"):
            return dict(message)
        blocks = [block for call in message["tool_calls"] for block in call.get("thinking") or ()]
        blocks += [{"type": "text", "text": message["content"]}] if message.get("content") else []
        for call in message["tool_calls"]:
            arguments = call["arguments"] if isinstance(call["arguments"], dict) else {}
            blocks.append({"type": "tool_use", "id": call["id"], "name": call["name"], "input": arguments})
        return {"role": "assistant", "content": blocks}

    def tools(self, request: CompletionRequest) -> list[dict[str, Any]]:
        return _functions(request, "input_schema")

    def schema_fields(self, request: CompletionRequest) -> dict[str, Any]:
        schema = _object_schema(request.schema)
        if _is_strict(schema):
            return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
        answer = {"name": self._ANSWER_TOOL, "description": "Gives the answer.", "input_schema": schema}
        choice = {"type": "any"} if request.tools else {"type": "tool", "name": self._ANSWER_TOOL}
        return {"tools": [*self.tools(request), answer], "tool_choice": choice}

    def read(self, document: Any, request: CompletionRequest) -> dict[str, Any]:
        blocks = document["content"]
        text = "".join(_joined_text(block["text"]) for block in blocks if block["type"] == "text")
        found = [(block["id"], block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"]
        calls = _tool_calls(found)
        others = [call for call in calls if request.schema is None or call["name"] != self._ANSWER_TOOL]
        if calls and not others:
            return {"text": _as_text(calls[0]["arguments"]), "finish_reason": "end_turn"}
        for call in others[:1]:  # whose results the vendor takes only with the thinking that led to them
            call["thinking"] = [block for block in blocks if block["type"] in ("thinking", "redacted_thinking")]
        return {"text": text, "tool_calls": others}

    def merge(self, document: dict[str, Any], event: Any) -> str:
        kind = event["type"]
        if kind == "message_start":
            document.update(event["message"], content=[])
        elif kind == "content_block_start":
            document["content"].append({**event["content_block"], "pieces": {}})
        elif kind == "content_block_delta":
            pieces = document["content"][event["index"]]["pieces"]
            for field, piece in event["delta"].items():
                if field != "type" and isinstance(piece, str):
                    pieces.setdefault(field, []).append(piece)
            return str(event["delta"].get("text", ""))
        elif kind == "message_delta":
            document["stop_reason"] = event["delta"].get("stop_reason")
            document["usage"] = {**(document.get("usage") or {}), **(event.get("usage") or {})}
        elif kind == "message_stop":
            document["done"] = True
            for block in document["content"]:
                for field, texts in block.pop("pieces").items():
                    block[field] = (block.get(field) or "") + "".join(texts)
                block["input"] = _load_arguments(block.pop("partial_json", block.get("input")))
        return ""

class GeminiProvider(Provider):
    """Google Gemini generateContent. `api_version` is v1 unless set (beta: v1beta), or the base URL ends with one.
    Sources: ai.google.dev/api/generate-content, /api/embeddings; google-genai 3.4 (`models.py`, `_api_client.py`)."""
    TYPE, BASE_URL, STREAMING = "gemini", "https://generativelanguage.googleapis.com", ({}, {})
    CHAT_PATH, STREAM_PATH, EMBED_PATH = "generateContent", "streamGenerateContent?alt=sse", "batchEmbedContents"
    KEY_VARIABLES, URL_VARIABLES = ("GOOGLE_API_KEY", "GEMINI_API_KEY"), ("GOOGLE_GEMINI_BASE_URL",)
    OPTIONS: Mapping[str, str | None] = {"api_version": "GOOGLE_GENAI_API_VERSION"}
    KEY_HEADER = ("x-goog-api-key", "")
    _NAMES = "temperature maxOutputTokens topP topK stopSequences seed frequencyPenalty presencePenalty"
    FIELDS: Mapping[str, str] = {ours: f"generationConfig.{name}" for ours, name in zip(_TUNING, _NAMES.split())}
    PLACES = ("modelVersion", "responseId", "candidates.0.finishReason")
    _OUTPUT_TOKENS = "usageMetadata.candidatesTokenCount + usageMetadata.thoughtsTokenCount"
    COUNTS = ("usageMetadata.promptTokenCount", _OUTPUT_TOKENS, "usageMetadata.totalTokenCount")
    INPUT_TYPES: Mapping[str, str] = {"query": "RETRIEVAL_QUERY", "document": "RETRIEVAL_DOCUMENT"}
    VECTORS, OBJECT_SCHEMAS, max_batch = "embeddings", False, 100

    def address(self, base_url: str) -> str:
        found, version = re.search(r"/v\d\w*$", base_url), self.options["api_version"] or "v1"
        self.PREFIX = found[0] if found else "/v1beta" if version == "beta" else f"/{version}"
        return base_url[: found.start()] if found else base_url

    def place(self, path: str, model: str) -> str:
        from urllib.parse import quote

        return f"/{quote(self.model_name(model), safe='/')}:{path}"

    def model_name(self, model: str) -> str:
        return model if "/" in model else f"models/{model}"

    def conversation(self, request: CompletionRequest) -> dict[str, Any]:
        system, messages = _system_apart(request)
        calls = [call for message in messages for call in message.get("tool_calls") or ()]
        named = {call["id"] for call in calls if _dig(call, "part.functionCall.id")}  # by the vendor, not by us
        contents = _merged_turns([self.message(message, named) for message in messages], "parts")
        return {"contents": contents, **({"systemInstruction": {"parts": [{"text": system}]}} if system else {})}

    def message(self, message: Mapping[str, Any], named: Container[str]) -> dict[str, Any]:
        if message["role"] == "tool":
            result = {"id": message["id"]} if message["id"] in named else {}
            answer = {"error" if message.get("is_error") else "output": message["content"]}
            result.update(name=message["name"], response=answer)
            return {"role": "user", "parts": [{"functionResponse": result}]}
        content = message.get("content") or []
        parts: list[Any] = [
            {"text": part} if isinstance(part, str) else {key: part[key] for key in part if key != "type"}
            for part in ([content] if isinstance(content, str) else content)
        ]
        for call in message.get("tool_calls") or ():
            parts.append(call.get("part") or {"functionCall": {"name": call["name"], "args": call["arguments"]}})
        return {"role": "model" if message["role"] == "assistant" else "user", "parts": parts}

    def tools(self, request: CompletionRequest) -> list[dict[str, Any]]:
        return [{"functionDeclarations": _functions(request, "parametersJsonSchema")}]

    def schema_fields(self, request: CompletionRequest) -> dict[str, Any]:
        return {"generationConfig": {"responseMimeType": "application/json", "responseJsonSchema": request.schema}}

    def read(self, document: Any, request: CompletionRequest) -> dict[str, Any]:
        blocked = not document.get("candidates") and _dig(document, "promptFeedback.blockReason")
        candidate: Any = {"finishReason": blocked} if blocked else document["candidates"][0]
        parts = (candidate.get("content") or {}).get("parts") or []
        if candidate.get("finishReason") in (None, "STOP") and "content" not in candidate:
            raise ValueError("no content")
        found = [(part, part["functionCall"]) for part in parts if "functionCall" in part]
        calls = _tool_calls((call.get("id"), call["name"], call.get("args")) for _, call in found)
        for call, (part, _) in zip(calls, found):
            call["part"] = part  # its signature has to come back
        answer = {"text": self.text_of(parts), "tool_calls": calls}
        return {**answer, "finish_reason": str(blocked)} if blocked else answer

    def text_of(self, parts: list[Any]) -> str:
        return "".join(part["text"] for part in parts if "text" in part and not part.get("thought"))

    def merge(self, document: dict[str, Any], event: Any) -> str:
        event, text = event[0] if isinstance(event, list) else event, ""
        document.update({key: value for key, value in event.items() if key != "candidates"})
        document["finished"] = document.get("finished") or _dig(event, "promptFeedback.blockReason")
        for candidate in event.get("candidates") or ():
            if candidate.get("index", 0) == 0:
                whole = document.setdefault("candidates", [{"content": {"parts": []}}])[0]
                parts = (candidate.get("content") or {}).get("parts") or []
                whole["content"]["parts"] += parts
                text += self.text_of(parts)
                if candidate.get("finishReason"):
                    whole["finishReason"] = document["finished"] = candidate["finishReason"]
        return text

    def embedding_call(self, request: EmbeddingRequest) -> tuple[str, dict[str, Any]]:
        kind = self.INPUT_TYPES.get(request.input_type or "", request.input_type)
        facts = {"taskType": kind, "outputDimensionality": request.dimensions}
        facts = {name: value for name, value in facts.items() if value is not None}
        facts["model"] = self.model_name(request.model)
        requests = [{**facts, "content": {"parts": [{"text": text}]}} for text in request.input]
        return self.place(self.EMBED_PATH, request.model), {"requests": requests}

class EchoProvider(Provider):
    """Answers without a network, the same in every process, on every system and every Python: "echo: " and the text of
    the user's last message, or the smallest value that fits a schema. Tools are never called; tokens are words.
    Embeddings are hashed counts of words and of the letter groups in them, of length 1: the more words and word stems
    two texts share, the nearer they are."""
    TYPE, DIMENSIONS = "echo", 256
    FIELDS: Mapping[str, str] = {name: name for name in _TUNING}
    instant = True  # never waits, so that it needs no thread

    def complete(self, request: CompletionRequest) -> CompletionResponse:
        try:
            text = f"echo: {request.prompt}"
            if request.schema is not None:
                text = _to_json(_smallest_value(request.schema, request.schema, iter(range(10_000))))
            asked = [request.system or "", *(_joined_text(message.get("content")) for message in request.messages)]
        except (*_SHAPE_ERRORS, ArithmeticError, RecursionError, StopIteration) as error:
            reason = f"the messages cannot be read, or no answer that fits the schema is known: {error!r}"
            raise ValidationError(f"{self.name}: {reason}") from None
        for piece in re.findall(r"\s*\S+\s*", text) if request.stream and request.on_text else ():
            request.on_text(piece)  # type: ignore[misc]
        words = sum(len(part.split()) for part in asked)
        return CompletionResponse(text, request.model, words, len(text.split()), "stop")

    def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        size = self.DIMENSIONS if request.dimensions is None else request.dimensions
        if size < 1:
            raise ValidationError(f"{self.name}: dimensions must be at least 1, not {size}")
        vectors = [_hashed_features(text, size) for text in request.input]
        return EmbeddingResponse(vectors, request.model, sum(len(text.split()) for text in request.input))

# Not \w, which knows more letters in newer Pythons: everything but ASCII's and the common other punctuation.
_ECHO_WORD = "[^\x00-/:-@\\[-`{-\xbf\u2000-\u206f\u3000-\u303f\uff00-\uff0f]+"

def _hashed_features(text: str, size: int) -> list[float]:
    """Counts of words and letter groups by feature hashing (Weinberger et al., 2009), scaled to length 1."""
    vector = [0.0] * size
    for word in re.findall(_ECHO_WORD, _lowered(text)) or [text]:
        for place, weight in _word_features(word):
            vector[place % size] += weight
    vector = vector if any(vector) else [1.0, *vector[1:]]  # no feature, or all cancel each other out
    length = math.sqrt(sum(number * number for number in vector))  # of multiples of 1/4: exact in any order
    return [number / length for number in vector]

def _lowered(text: str) -> str:
    """In lower case, but for letters that only newer Pythons know: the same in all."""
    if text.isascii():
        return text.lower()
    from unicodedata import ucd_3_2_0
    parts = itertools.groupby(text, lambda letter: ucd_3_2_0.category(letter) != "Cn")
    return "".join("".join(part).lower() if known else "".join(part) for known, part in parts)

@functools.lru_cache(maxsize=4096)
def _word_features(word: str) -> tuple[tuple[int, float], ...]:
    """(hash, weight) of a word and of the groups of three letters in it. Words of up to three letters count little."""
    marked, long = f"^{word[:100]}$", len(word) > 3
    features = [(word, 1.0 if long or word[0] > "\x7f" else 0.25)] if word else []
    features += [(marked[start : start + 3], 0.25) for start in range(len(marked) - 2)] if long else []
    hashed = []
    for feature, weight in features:
        digest = hashlib.blake2b(feature.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        number = int.from_bytes(digest, "big")
        hashed.append((number >> 1, weight if number & 1 else -weight))
    return tuple(hashed)

def _smallest_value(schema: Any, root: Any, left: Iterator[int], opened: tuple[str, ...] = ()) -> Any:
    """A small value that fits a part of a JSON Schema: short texts, numbers near 0, the first of several possibilities;
    of a map the required properties, or all where none is. A `pattern` needs an `examples`. `left` runs out (a
    ValueError) when the value grows too large; `opened` are the `$ref`s around this part."""
    if next(left, None) is None:
        raise ValueError("the smallest answer is too large")
    if not isinstance(schema, Mapping):
        return None
    for key in ("const", "enum", "default", "examples"):
        if key in schema:
            return schema[key][0] if key in ("enum", "examples") else schema[key]
    if "$ref" in schema:
        if schema["$ref"] in opened:
            return None
        keys = [key.replace("~1", "/").replace("~0", "~") for key in schema["$ref"].lstrip("#").split("/")[1:]]
        target = functools.reduce(lambda inner, key: inner[key], keys, root)
        return _smallest_value(target, root, left, (*opened, schema["$ref"]))
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            chosen = schema[key] if key == "allOf" else [min(schema[key], key=lambda branch: "$ref" in branch)]
            whole = {name: value for name, value in schema.items() if name != key}
            for part in chosen:
                properties = {**whole.get("properties", {}), **part.get("properties", {})}
                required = [*whole.get("required", ()), *part.get("required", ())]
                whole = {**whole, **part, "properties": properties, "required": required}
            return _smallest_value(whole, root, left, opened)
    properties, least = schema.get("properties") or {}, schema.get("minLength", 0)
    kind = (_as_list(schema.get("type")) or ["object" if properties else "string"])[0]
    if kind == "object":
        wanted = schema.get("required") or properties
        return {name: _smallest_value(properties.get(name, {}), root, left, opened) for name in wanted}
    if kind == "array":
        return [_smallest_value(schema.get("items", {}), root, left, opened) for _ in range(schema.get("minItems", 0))]
    if kind == "string" and least > 10_000:
        raise ValueError("the smallest answer is too large")
    if kind in ("number", "integer"):
        return _smallest_number(schema, kind == "integer")
    return "x" * least if kind == "string" else None if kind == "null" else False

def _smallest_number(schema: Mapping[str, Any], whole: bool) -> float:
    """A number near 0 within a schema's bounds."""
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
    step, bounds = schema.get("multipleOf") or 1, [*filter(math.isfinite, (max(low, above), min(high, below)))]
    tried: list[float] = [0, *(math.floor(bound / step + shift) * step for bound in bounds for shift in (0, 1, -1))]
    tried += [sum(bounds) / 2] if not whole and len(bounds) == 2 else []
    return next(number for number in tried if low <= number <= high and above < number < below)

PROVIDERS: dict[str, type[Provider]] = {
    provider.TYPE: provider for provider in (
        OpenAIProvider, AnthropicProvider, AzureOpenAIProvider, GeminiProvider, CohereProvider, MistralProvider,
        OllamaProvider, VoyageProvider, OpenAICompatibleProvider, EchoProvider,
        _service("groq", "https://api.groq.com", "/openai/v1"), _service("together", "https://api.together.ai", "/v1"),
        _service("openrouter", "https://openrouter.ai", "/api/v1"),
    )
}

# ---------------------------------------------------------------------------------------------------------------------
# 11. Vector stores
# Records {id, vector, metadata} come in, the nearest go out, best first; one protocol and one filter language for all.
# A filter is {field: value}, {field: {operator: value}}, {"$and": [..]}, {"$or": [..]} or {"$not": {..}}; several are
# an and. A list in the metadata fits where one of its items does. A missing field fits only $ne, $nin and $not.
# ---------------------------------------------------------------------------------------------------------------------

if TYPE_CHECKING:
    _Place = tuple[str, str]  # index and namespace
    _Record = tuple[str, list[float], dict[str, Any]]  # id, vector, metadata
    _Make = Callable[..., Any]

_FILTER_TESTS = {  # as Python's module `operator` and Weaviate call them
    "$eq": ("eq", "Equal"), "$in": ("eq", "Equal"), "$ne": ("ne", "NotEqual"), "$nin": ("ne", "NotEqual"),
    "$lt": ("lt", "LessThan"), "$lte": ("le", "LessThanEqual"), "$gt": ("gt", "GreaterThan"),
    "$gte": ("ge", "GreaterThanEqual")}
_PLAIN_TYPES = {str: "text", bool: "boolean", int: "number", float: "number"}
_METRICS = {  # as Qdrant, Chroma and Weaviate call them
    "cosine": ("Cosine", "cosine", "cosine"), "dot": ("Dot", "ip", "dot"), "euclidean": ("Euclid", "l2", "l2-squared")}

def _filtered(source: Any, joined: _Make, test: _Make, negated: bool = False, deep: int = 0) -> Any:
    """A filter in another language, made by `joined` of "and" or "or" and parts, and by `test` of a field, an operator
    (one stands for = and in), values one of which must fit, and whether none may. ExecutionError for no filter."""
    if not isinstance(source, Mapping) or deep > 50:
        raise ExecutionError(f"a filter must be a map of field: value, at most 50 deep, not {_shown(source)}")
    parts = []
    for key, wanted in source.items():
        if key == "$not":
            parts.append(_filtered(wanted, joined, test, not negated, deep + 1))
        elif key in ("$and", "$or"):
            if not (isinstance(wanted, list) and wanted):
                raise ExecutionError(f"{key} takes a list of filters, at least one, not {_shown(wanted)}")
            inner = [_filtered(part, joined, test, negated, deep + 1) for part in wanted]
            parts.append(joined("and" if (key == "$and") != negated else "or", inner))  # De Morgan
        elif not isinstance(key, str) or key.startswith("$"):
            raise ExecutionError(f"unknown filter operator {_shown(key)}{_suggestion(key, ('$and', '$or', '$not'))}")
        else:
            tests = wanted if isinstance(wanted, Mapping) else {"$eq": wanted}
            parts += [test(key, *_field_test(key, operator, value, negated)) for operator, value in tests.items()]
    return parts[0] if len(parts) == 1 else joined("or" if negated else "and", parts)

def _field_test(field: str, operator: str, value: Any, negated: bool) -> tuple[str, list[Any], bool]:
    if operator not in _FILTER_TESTS:
        raise ExecutionError(f"{field}: unknown filter operator {operator!r}{_suggestion(operator, _FILTER_TESTS)}")
    listed, equal = operator in ("$in", "$nin"), operator in ("$eq", "$ne", "$in", "$nin")
    values, kinds = value if listed else [value], (str, bool) if equal else (str,)
    if not isinstance(values, list) or not all(_is_number(each) or isinstance(each, kinds) for each in values):
        expected = f"{'a list of ' * listed}text or a number{' or a boolean' * equal}"
        raise ExecutionError(f"{field}: {operator} must be {expected}, not {_shown(value)}")
    return "$in" if equal else operator, values, negated != (operator in ("$ne", "$nin"))

def _predicate(source: Any) -> Any:
    """A filter as a function of a record's metadata. Text never equals a number nor true 1, but 1 is 1.0."""
    import operator
    def joined(joint: str, parts: list[Any]) -> Any:
        combine = all if joint == "and" else any
        return lambda metadata: combine(part(metadata) for part in parts)
    def test(field: str, name: str, values: list[Any], negated: bool) -> Any:
        fits, kind_of = getattr(operator, _FILTER_TESTS[name][0]), _PLAIN_TYPES.get
        wanted = [(kind_of(type(value)), value) for value in values]
        def decide(metadata: Mapping[str, Any]) -> bool:
            found = metadata.get(field)
            items = [(kind_of(type(item)), item) for item in (found if isinstance(found, list) else [found])]
            return negated != any(one == other and fits(item, value) for one, item in items for other, value in wanted)
        return decide
    return _filtered(source or {}, joined, test)

def _mongo_filter(source: Any) -> Any:
    """A filter as Pinecone and Chroma take it. Chroma wants the values of a list to be of one type."""
    def test(field: str, operator: str, values: list[Any], negated: bool) -> Any:
        if len(set(map(type, values))) > 1:
            return {"$and" if negated else "$or": [test(field, operator, [value], negated) for value in values]}
        word, several = _comparison(field, operator, negated), len(values) != 1
        word = {"$in": "$in" if several else "$eq", "$ne": "$nin" if several else "$ne"}.get(word, word)
        return {field: {word: values if several else values[0]}}
    return _filtered(source, lambda joint, parts: {f"${joint}": parts}, test)

def _comparison(field: str, operator: str, negated: bool) -> str:
    """The operator, $ne for a negated $in, for databases that cannot say "not greater, or not there"."""
    if negated and operator != "$in":
        raise ExecutionError(f"{field}: this database cannot negate {operator}; write the opposite comparison")
    return "$ne" if negated else operator

def _checked_vector(vector: Any) -> list[float]:
    kinds = set(map(type, vector)) if isinstance(vector, (list, tuple)) else {type(None)}
    if bool in kinds or not all(issubclass(kind, (int, float)) for kind in kinds):
        raise ExecutionError(f"a vector must be a list of numbers, not {_shown(vector)}")
    with contextlib.suppress(OverflowError):
        numbers = list(map(float, vector))
        if 0 < len(numbers) <= 65_536 and sum(map(abs, numbers)) < 1e100:  # false for nan
            return numbers
    raise ExecutionError("a vector must hold 1 to 65536 numbers, finite and below 1e100")

def _checked_name(value: Any, what: str) -> str:
    text = str(value) if _is_integer(value) else value
    if not isinstance(text, str) or not text or re.search("[\ud800-\udfff]", text):
        raise ExecutionError(f"{what} must be text, not {_shown(value)}")
    return text

def _checked_place(index: Any, namespace: Any) -> _Place:
    return _checked_name(index, "an index"), "" if namespace in (None, "") else _checked_name(namespace, "a namespace")

def _checked_records(records: Any) -> list[_Record]:
    """The records, of those with the same id the last. ExecutionError says which one is wrong."""
    checked: dict[str, _Record] = {}
    for position, record in enumerate(records if isinstance(records, (list, tuple)) else [records]):
        try:
            if not isinstance(record, Mapping) or not {"id", "vector"} <= set(record) <= {"id", "vector", "metadata"}:
                raise ExecutionError(f"it must be {{id, vector, metadata}}, not {_shown(record)}")
            key, vector = _checked_name(record["id"], "an id"), _checked_vector(record["vector"])
            checked[key] = key, vector, dict(record.get("metadata") or {})
            json.dumps(checked[key][2], allow_nan=False)
            if len(vector) != len(next(iter(checked.values()))[1]):
                raise ExecutionError(f"it has {len(vector)} dimensions, unlike those before")
        except (ExecutionError, TypeError, ValueError, RecursionError) as error:
            what = error if isinstance(error, ExecutionError) else f"its metadata is no map with a JSON form: {error}"
            raise ExecutionError(f"record {position}: {what}") from None
    return list(checked.values())

class VectorStore:
    """What the steps vector_search and vector_upsert need of a vector database; safe for many threads. A store of your
    own has `upsert` and `search`, which may be asynchronous. Errors are of the OrchestratorError family."""
    name, max_batch, max_numbers = "vectors", 250, 90_000  # in a call: records, numbers in vectors (2 MB of JSON)
    _write: Callable[..., None]  # (place, records)
    _nearest: _Make  # (place, vector, top_k, filter, whether vectors are wanted) -> (id, score, metadata, vector)s
    _remove: Callable[..., int | None]  # (place, ids or None, filter or None) -> how many

    def upsert(self, index: str, records: Sequence[Mapping[str, Any]], namespace: str | None = None) -> int:
        """Adds records {id, vector, metadata}, or replaces those with the same id; returns how many ids that were."""
        place, checked = _checked_place(index, namespace), _checked_records(records)
        size = max(1, min(self.max_batch, self.max_numbers // len(checked[0][1]))) if checked else 1
        for start in range(0, len(checked), size):
            with self._answers():
                self._write(place, checked[start : start + size])
        return len(checked)

    def search(self, index: str, vector: Sequence[float], top_k: int = 5, *, filter: Mapping[str, Any] | None = None,
            namespace: str | None = None, include_metadata: bool = True,
            include_vectors: bool = False) -> list[dict[str, Any]]:
        """The `top_k` nearest records that pass the filter, best first: {id, score, metadata, vector}."""
        if not _is_integer(top_k) or top_k < 1:
            raise ExecutionError(f"top_k must be a whole number of at least 1, not {_shown(top_k)}")
        place, query, results = _checked_place(index, namespace), _checked_vector(vector), []
        with self._answers():
            for key, score, metadata, values in self._nearest(place, query, top_k, filter, include_vectors):
                extra = {"metadata": metadata or {}} if include_metadata else {}
                extra.update({"vector": values} if include_vectors else {})
                results.append({"id": str(key), "score": score + 0.0, **extra})
        return results

    def delete(self, index: str, ids: Sequence[str] | None = None, *, filter: Mapping[str, Any] | None = None,
            namespace: str | None = None) -> int | None:
        """Deletes the records with these ids, or those that pass the filter; without both, the whole namespace. Returns
        how many, or None where the vendor does not say."""
        if ids is not None and (filter is not None or not isinstance(ids, (list, tuple))):
            raise ExecutionError("delete takes a list of ids, or a filter, not both")
        checked = None if ids is None else [_checked_name(key, "an id") for key in ids]
        with self._answers():
            return 0 if checked == [] else self._remove(_checked_place(index, namespace), checked, filter or None)

    @contextlib.contextmanager
    def _answers(self) -> Iterator[None]:
        """Turns what comes of reading an answer that is none into BadResponseError."""
        try:
            yield
        except _SHAPE_ERRORS as error:
            reason = f"answered something else than expected: {type(error).__name__} {error}"
            raise BadResponseError(reason, provider=self.name) from error

class LocalVectorStore(VectorStore):
    """Vectors in SQLite, in memory or in a file that many processes may use; the search is exact. The score is the
    cosine, the dot product, or 1 / (1 + the euclidean distance); equally near records are in the order of their ids."""
    name = "local"
    max_batch = max_numbers = sys.maxsize  # all in one transaction
    _SCHEMA = """BEGIN IMMEDIATE; CREATE TABLE IF NOT EXISTS vectors (name TEXT, namespace TEXT, id TEXT, vector BLOB,
        codes BLOB, step REAL, length REAL, metadata TEXT, PRIMARY KEY (name, namespace, id));
        PRAGMA user_version = 1; COMMIT;"""

    def __init__(self, path: str | os.PathLike[str] = ":memory:", metric: str = "cosine") -> None:
        self._connection: Any = None
        self._matrices: dict[_Place, _Matrix] = {}  # until somebody writes
        self._lock, self._data_version = threading.Lock(), 0
        self.path, self.metric = os.fspath(path), metric
        if metric not in _METRICS:
            raise ValidationError(f"unknown metric {metric!r}; there are {', '.join(_METRICS)}")

    @classmethod
    def from_env(cls) -> LocalVectorStore:
        """The store in the file that LLM_ORCHESTRATOR_VECTORS names, otherwise one in memory."""
        return cls(_variable("LLM_ORCHESTRATOR_VECTORS") or ":memory:")

    @contextlib.contextmanager
    def _transaction(self, written: _Place | None = None) -> Iterator[Any]:
        """The connection, for one thread at a time; what is written to the one place is kept if nothing fails."""
        try:
            import sqlite3
            with self._lock:
                if self._connection is None:  # it waits 5 s for another process's transaction
                    if self.path != ":memory:" and not os.path.exists(self.path):
                        os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))
                    self._connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
                with self._connection as connection:
                    version = connection.execute("PRAGMA user_version").fetchone()[0]
                    if version == 0:
                        connection.executescript(self._SCHEMA)
                    elif version != 1:
                        raise ExecutionError(f"the vector store {self.path} has the schema version {version}, not 1")
                    if written:
                        connection.execute("BEGIN IMMEDIATE")
                        self._matrices.pop(written, None)
                    yield connection
        except ImportError:
            raise ExecutionError("the local vector store needs the module sqlite3, which this Python lacks") from None
        except (sqlite3.Error, OSError, UnicodeError) as error:
            raise ExecutionError(f"the vector store {self.path}: {error}", retryable="locked" in str(error)) from None

    def _write(self, place: _Place, records: list[_Record]) -> None:
        from struct import pack
        dimensions, rows = len(records[0][1]), []
        for key, vector, metadata in records:
            peak = max(map(abs, vector))
            scale = 2047 / peak if peak > 1e-300 else 0.0
            codes = pack(f"<{dimensions}H", *[int(number * scale + 2048.5) for number in vector])
            exact = pack(f"<{dimensions}d", *vector)
            rows.append((*place, key, exact, codes, peak / 2047, math.hypot(*vector), json.dumps(metadata)))
        with self._transaction(place) as connection:
            known = connection.execute("SELECT length(codes) / 2 FROM vectors WHERE name = ?", place[:1]).fetchone()
            if known and known[0] != dimensions:
                raise ExecutionError(f"the index {place[0]!r} holds vectors of {known[0]} dimensions, not {dimensions}")
            connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def _nearest(self, place: _Place, query: list[float], top_k: int, filter: Any, vectors: bool) -> Iterable[Any]:
        with self._transaction() as connection:
            version = connection.execute("PRAGMA data_version").fetchone()[0]
            if version != self._data_version or len(self._matrices) > 100:  # another process wrote
                self._data_version = version
                self._matrices.clear()
            matrix = self._matrices.get(place)
            if matrix is None:
                rows = connection.execute("SELECT * FROM vectors WHERE name = ? AND namespace = ?", place).fetchall()
                matrix = self._matrices[place] = _Matrix(rows, self.metric)
        if matrix.ids and matrix.dimensions != len(query):
            known = f"{matrix.dimensions} dimensions, but the query has {len(query)}"
            raise ExecutionError(f"the index {place[0]!r} holds vectors of {known}")
        return matrix.nearest(query, top_k, _predicate(filter) if filter else None)

    def _remove(self, place: _Place, ids: list[str] | None, filter: Any) -> int:
        holds = _predicate(filter)
        with self._transaction(place) as connection:
            if ids is None:
                rows = connection.execute("SELECT id, metadata FROM vectors WHERE name = ? AND namespace = ?", place)
                ids = [key for key, text in rows.fetchall() if holds(json.loads(text))]
            one = "DELETE FROM vectors WHERE name = ? AND namespace = ? AND id = ?"
            return sum(connection.execute(one, (*place, key)).rowcount for key in ids)

    def close(self) -> None:
        """Closes the file, which the next use opens again; what was in memory only is gone."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None
            self._matrices.clear()

    __del__ = close

class _Matrix:
    """The records of one namespace in memory. A search compares the query with all vectors roughly, then exactly with
    those that may be among the nearest. For the rough part each vector is rounded to whole numbers from -2047 to 2047
    (stored as codes, plus 2048) times its `step`, and each dimension is one large integer with 32 bits a vector: these
    times the query's rounded numbers add up to all dot products, in C. How far they can be off is known."""

    def __init__(self, rows: list[tuple[Any, ...]], metric: str) -> None:
        every: Any = zip(*rows) if rows else ((),) * 8
        _, _, self.ids, self.vectors, self.codes, self.steps, self.lengths, self.texts = every
        self.metric, self.dimensions = metric, len(self.codes[0]) // 2 if rows else 0

    @functools.cached_property
    def metadata(self) -> list[Any]:
        return list(map(json.loads, self.texts))

    @functools.cached_property
    def columns(self) -> list[int]:
        """Each dimension as the sum of code * 2 ** (32 * row)."""
        codes, lanes, columns = b"".join(self.codes), bytearray(4 * len(self.ids)), []
        for position in range(0, 2 * self.dimensions, 2):
            lanes[::4], lanes[1::4] = (codes[place :: 2 * self.dimensions] for place in (position, position + 1))
            columns.append(int.from_bytes(lanes, "little"))
        return columns

    def nearest(self, query: list[float], top_k: int, holds: _Make | None) -> Iterator[Any]:
        from operator import mul
        from struct import Struct
        unpack, length = Struct(f"<{self.dimensions}d").unpack, math.hypot(*query)
        if self.metric == "cosine":
            query = [number / length if length > 1e-100 else 0.0 for number in query]
        def nearness(row: int) -> float:
            if self.metric == "euclidean":
                return -math.dist(unpack(self.vectors[row]), query)
            product = math.fsum(map(mul, unpack(self.vectors[row]), query))
            if self.metric == "dot":
                return product
            return max(-1.0, min(1.0, product / self.lengths[row])) if self.lengths[row] > 1e-100 else 0.0
        rows = [row for row in range(len(self.ids)) if holds is None or holds(self.metadata[row])]
        if len(rows) > max(200, top_k) and length > 1e-80:
            rows = self.likely(query, top_k, rows)
        for order, key, row in sorted([(-nearness(row), self.ids[row], row) for row in rows])[:top_k]:
            score = 1 / (1 + order) if self.metric == "euclidean" else -order
            yield key, score, json.loads(self.texts[row]), list(unpack(self.vectors[row]))

    def likely(self, query: list[float], top_k: int, rows: list[int]) -> list[int]:
        """The rows that may be among the `top_k` nearest. Nearness is x.q / |x|, x.q or 2 x.q - |x| ** 2 here."""
        from heapq import nlargest
        from operator import mul
        from struct import unpack
        count, half, length = len(self.ids), math.sqrt(self.dimensions) / 2, math.hypot(*query)
        scale = (2**31 / (4096 * half) - half) / length  # by Cauchy and Schwarz, no sum leaves its 32 bits
        factors = [round(number * scale) for number in query]
        zero = (2**31 - 2048 * sum(factors)) * int.from_bytes(b"\1\0\0\0" * count, "little")  # keeps the sums positive
        products = unpack(f"<{count}I", sum(map(mul, self.columns, factors), zero).to_bytes(4 * count, "little"))
        cosine, euclidean = self.metric == "cosine", self.metric == "euclidean"
        weights = [1 / max(size, 1e-100) for size in self.lengths] if cosine else [1.0 + euclidean] * count
        steps, longest = list(map(mul, weights, self.steps)), max(map(mul, weights, self.lengths))
        nearness = [(products[row] - 2**31) * steps[row] / scale - euclidean * self.lengths[row] ** 2 for row in rows]
        rounding = half * max(steps)  # the length of what rounding took from x, at most; then from the query
        lost = math.dist(query, [factor / scale for factor in factors])
        error = 1.001 * (rounding * (length + lost) + longest * lost) + 1e-9 * (longest + length) ** 2
        least = nlargest(top_k, nearness)[-1] - 2 * error
        return [row for row, value in zip(rows, nearness) if value >= least]

class _RemoteVectorStore(Provider, VectorStore):
    """Base of the vendors' clients: the settings of a provider, and the `metric` of the collections that it creates.
    Where the vendor has no namespaces, one is a collection of its own, INDEX__NAMESPACE."""
    max_batch, NEEDS_KEY = VectorStore.max_batch, False
    OPTIONS: Mapping[str, str | None] = {"metric": None}

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._rest.base_url = ""  # `call` gives whole addresses
        self.hosts: dict[str, str] = {}  # by index, where they were asked for
        self.metric: str = self.options.get("metric") or "cosine"
        if self.metric not in _METRICS:
            raise ValidationError(f"unknown metric {self.metric!r}; there are {', '.join(_METRICS)}")

    def address(self, base_url: str) -> str:
        """An address without a scheme is https, but http with a port or for this machine."""
        if "://" not in base_url:
            scheme = "http" if ":" in base_url else "https"
            base_url = self.BASE_URL if base_url == "localhost" else f"{scheme}://{base_url}"
        return base_url.rstrip("/")

    def call(self, method: str, path: str, names: Iterable[str] = (), payload: Any = None, expected: int = 0) -> Any:
        """The answer at an address, or a path, with these names in it; None if its status is the expected error."""
        from urllib.parse import quote
        host = self.base_url if path.startswith("/") else ""
        try:
            return self._rest.call(method, host + path.format(*(quote(name, safe="") for name in names)), payload)
        except ProviderError as error:
            if error.status != expected:
                raise
            return None

    def score(self, distance: float, metric: str) -> float:
        """A vendor's distance as a number that is the larger, the nearer a record is."""
        if metric in ("cosine", "ip", "dot"):
            return -distance if metric == "dot" else 1 - distance
        return 1 / (1 + math.sqrt(abs(distance)))  # the l2 of both is squared

def _collection(place: _Place) -> list[str]:
    return ["__".join(filter(None, place))]

def _as_uuid(identifier: str) -> str:
    """The id itself if it is a UUID, otherwise one made of it (version 5)."""
    is_one = re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", identifier)
    return identifier if is_one else str(uuid.uuid5(uuid.NAMESPACE_OID, identifier))

def _without_nulls(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata for databases that have no null; to a filter it is a missing field anyway."""
    return {key: value for key, value in metadata.items() if value is not None}

class QdrantStore(_RemoteVectorStore):
    """Qdrant (https://api.qdrant.tech). Ids that are neither whole numbers nor UUIDs become UUIDs, and the payload
    keeps them as `_id`. The score is Qdrant's."""
    TYPE, BASE_URL, KEY_HEADER = "qdrant", "http://localhost:6333", ("api-key", "")
    KEY_VARIABLES, URL_VARIABLES = ("QDRANT_API_KEY",), ("QDRANT_URL",)

    def point_id(self, identifier: str) -> Any:
        return int(identifier) if re.fullmatch("0|[1-9][0-9]{0,18}", identifier) else _as_uuid(identifier)

    def filter(self, source: Any) -> dict[str, Any]:
        def test(field: str, operator: str, values: list[Any], negated: bool) -> dict[str, Any]:
            tests, bounds = [], ("gte", "lte") if operator == "$in" else (operator[1:],)
            for value in values:
                exact = operator == "$in" and not isinstance(value, float)  # to match, integers must be integers
                fits = {"match": {"value": value}} if exact else {"range": dict.fromkeys(bounds, value)}
                tests.append({"key": field if re.fullmatch(r"[\w-]+", field) else f'"{field}"', **fits})
            return {"must_not": tests} if negated else tests[0] if len(tests) == 1 else {"should": tests}
        joints = {"and": "must", "or": "should"}
        return {"must": [_filtered(source, lambda joint, parts: {joints[joint]: parts}, test)] if source else []}

    def _write(self, place: _Place, records: list[_Record]) -> None:
        points = [{"id": self.point_id(key), "vector": vector, "payload": found} for key, vector, found in records]
        for point, (key, _, metadata) in zip(points, records):
            point["payload"] = metadata if str(point["id"]) == key else {**metadata, "_id": key}
        path, name, body = "/collections/{}/points?wait=true", _collection(place), {"points": points}
        if self.call("PUT", path, name, body, expected=404) is None:
            shape = {"size": len(records[0][1]), "distance": _METRICS[self.metric][0]}
            self.call("PUT", "/collections/{}", name, {"vectors": shape}, expected=409)  # somebody else was faster
            self.call("PUT", path, name, body)

    def _nearest(self, place: _Place, query: list[float], top_k: int, filter: Any, vectors: bool) -> Iterable[Any]:
        body = {"query": query, "limit": top_k, "with_payload": True, "with_vector": vectors}
        body.update({"filter": self.filter(filter)} if filter else {})
        answer = self.call("POST", "/collections/{}/points/query", _collection(place), body)
        for point in answer["result"]["points"]:
            metadata = dict(point.get("payload") or {})
            yield metadata.pop("_id", point["id"]), point["score"], metadata, point.get("vector")

    def _remove(self, place: _Place, ids: list[str] | None, filter: Any) -> None:
        chosen = {"filter": self.filter(filter)} if ids is None else {"points": list(map(self.point_id, ids))}
        self.call("POST", "/collections/{}/points/delete?wait=true", _collection(place), chosen)

class PineconeStore(_RemoteVectorStore):
    """Pinecone (https://docs.pinecone.io/reference/api). `base_url` is the host of the index; without it, Pinecone is
    asked for the host by the index's name. Indexes are not created here. The score is Pinecone's."""
    TYPE, BASE_URL, KEY_HEADER, NEEDS_KEY = "pinecone", "https://api.pinecone.io", ("Api-Key", ""), True
    KEY_VARIABLES, URL_VARIABLES = ("PINECONE_API_KEY",), ("PINECONE_INDEX_HOST",)
    OPTIONS: Mapping[str, str | None] = {"controller_host": "PINECONE_CONTROLLER_HOST"}

    def extra_headers(self) -> dict[str, str]:
        return {"X-Pinecone-Api-Version": "2026-07"}

    def ask(self, place: _Place, path: str, body: dict[str, Any]) -> Any:
        """The answer of the host that serves the index."""
        host = self.base_url if self.base_url != self.BASE_URL else self.hosts.get(place[0])
        if host is None:
            controller = self.address(self.options["controller_host"] or self.BASE_URL)
            found = self.call("GET", controller + "/indexes/{}", place[:1])
            host = self.hosts[place[0]] = self.address(found["host"])
        return self.call("POST", host + path, payload={**body, "namespace": place[1]})

    def _write(self, place: _Place, records: list[_Record]) -> None:
        vectors = [{"id": key, "values": values, "metadata": _without_nulls(found)} for key, values, found in records]
        self.ask(place, "/vectors/upsert", {"vectors": vectors})

    def _nearest(self, place: _Place, query: list[float], top_k: int, filter: Any, vectors: bool) -> Iterable[Any]:
        body = {"vector": query, "topK": top_k, "includeMetadata": True, "includeValues": vectors}
        body.update({"filter": _mongo_filter(filter)} if filter else {})
        for match in self.ask(place, "/query", body)["matches"]:
            yield match["id"], match["score"], match.get("metadata"), match.get("values")

    def _remove(self, place: _Place, ids: list[str] | None, filter: Any) -> None:
        wanted: dict[str, Any] = {"filter": _mongo_filter(filter)} if filter else {"deleteAll": True}
        self.ask(place, "/vectors/delete", wanted if ids is None else {"ids": ids})

class ChromaStore(_RemoteVectorStore):
    """Chroma's API v2 (https://docs.trychroma.com). The metadata's `text` becomes the document too. The score is
    1 - distance for cosine and ip, 1 / (1 + root of the distance) for l2. Filters do not look into lists there."""
    TYPE, BASE_URL, KEY_HEADER = "chroma", "http://localhost:8000", ("x-chroma-token", "")
    KEY_VARIABLES, URL_VARIABLES = ("CHROMA_API_KEY",), ("CHROMA_URL", "CHROMA_HOST")
    OPTIONS: Mapping[str, str | None] = {"metric": None, "tenant": "CHROMA_TENANT", "database": "CHROMA_DATABASE"}
    PATH = "/api/v2/tenants/{}/databases/{}/collections"

    def ask(self, place: _Place, verb: str, body: dict[str, Any], create: bool = False) -> tuple[Any, str]:
        """(answer, metric) of a collection, which goes by a UUID."""
        names = [self.options["tenant"] or "default_tenant", self.options["database"] or "default_database"]
        one, settings = _collection(place), {"hnsw": {"space": _METRICS[self.metric][1]}}
        new = {"name": one[0], "get_or_create": True, "configuration": settings}
        found = self.call("POST", self.PATH, names, new) if create else self.call("GET", self.PATH + "/{}", names + one)
        settings = found.get("configuration_json") or {}
        answer = self.call("POST", f"{self.PATH}/{{}}/{verb}", [*names, found["id"]], body)
        return answer, (settings.get("hnsw") or settings.get("spann") or {}).get("space", "l2")

    def _write(self, place: _Place, records: list[_Record]) -> None:
        ids, vectors, every = [list(column) for column in zip(*records)]
        texts = [found["text"] if isinstance(found.get("text"), str) else None for found in every]
        body = {"ids": ids, "embeddings": vectors, "documents": texts, "metadatas": list(map(_without_nulls, every))}
        self.ask(place, "upsert", body, create=True)

    def _nearest(self, place: _Place, query: list[float], top_k: int, filter: Any, vectors: bool) -> Iterable[Any]:
        include = ["distances", "metadatas", "documents", *["embeddings"] * vectors]
        body: dict[str, Any] = {"query_embeddings": [query], "n_results": top_k, "include": include}
        body.update({"where": _mongo_filter(filter)} if filter else {})
        answer, metric = self.ask(place, "query", body)
        nothing = [[None] * len(answer["ids"][0])]
        columns = [(answer.get(name) or nothing)[0] for name in ("ids", *include[:3], "embeddings")]
        for key, distance, metadata, document, values in zip(*columns):
            metadata = {**({} if document is None else {"text": document}), **(metadata or {})}
            yield key, self.score(distance, metric), metadata, values

    def _remove(self, place: _Place, ids: list[str] | None, filter: Any) -> int | None:
        where = _mongo_filter(filter) if filter else {"_": {"$ne": ""}}  # the last is true of everything
        answer, _ = self.ask(place, "delete", {"where": where} if ids is None else {"ids": ids})
        return answer.get("deleted") if isinstance(answer, Mapping) else None

class WeaviateStore(_RemoteVectorStore):
    """Weaviate's REST and GraphQL API (https://docs.weaviate.io). Its ids are UUIDs; the property `record` keeps the
    real id and metadata as JSON. The score is 1 - distance for cosine, -distance for dot, else 1 / (1 + its root)."""
    TYPE, BASE_URL = "weaviate", "http://localhost:8080"
    KEY_VARIABLES, URL_VARIABLES = ("WEAVIATE_API_KEY",), ("WEAVIATE_URL",)

    def opened(self, place: _Place, create: bool = False) -> tuple[str, str, dict[str, str]]:
        """(name, metric, types of the properties) of a collection."""
        name = _collection(place)[0]
        if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name):
            raise ExecutionError(f"the names of Weaviate's collections are letters, digits and _, not {name!r}")
        name = name[0].upper() + name[1:]
        found = self.call("GET", "/v1/schema/{}", [name], expected=404)
        if found is None:
            found = {"class": name, "vectorizer": "none", "vectorIndexConfig": {"distance": _METRICS[self.metric][2]}}
            if create:
                self.call("POST", "/v1/schema", payload=found)
        types = {entry["name"]: entry["dataType"][0] for entry in found.get("properties") or ()}
        return name, (found.get("vectorIndexConfig") or {}).get("distance", "cosine"), types

    def _write(self, place: _Place, records: list[_Record]) -> None:
        (name, _, types), objects = self.opened(place, create=True), []
        for key, vector, metadata in records:
            properties: dict[str, Any] = {}
            objects.append({"class": name, "id": _as_uuid(key), "vector": vector, "properties": properties})
            for field, value in [("record", json.dumps({"id": key, "metadata": metadata})), *metadata.items()]:
                many = isinstance(value, list)
                kinds = {_PLAIN_TYPES.get(type(item), "") for item in (value if many else [value])}
                if len(kinds) != 1 or "" in kinds or not re.fullmatch("(?!id$)[A-Za-z_][A-Za-z0-9_]{0,200}", field):
                    continue  # filters cannot test it
                properties.setdefault(field, value)
                if field not in types:
                    types[field] = kinds.pop() + "[]" * many
                    words = {"tokenization": "field"} if "text" in types[field] else {}  # so that equal is equal
                    settings = {"name": field, "dataType": [types[field]], **words}
                    self.call("POST", "/v1/schema/{}/properties", [name], settings)
        for entry in self.call("POST", "/v1/batch/objects", payload={"objects": objects}):
            errors = ((entry.get("result") or {}).get("errors") or {}).get("error")
            self._rest.check({}, {"error": errors and errors[0]})

    def filter(self, source: Any, types: Mapping[str, str]) -> Any:
        def joined(joint: str, parts: list[Any]) -> Any:
            return {"operator": joint.capitalize(), "operands": parts}
        def test(field: str, operator: str, values: list[Any], negated: bool) -> Any:
            word, tests = _FILTER_TESTS[_comparison(field, operator, negated)][1], []
            for value in values:
                kind = types.get(field, _PLAIN_TYPES.get(type(value), "text")).replace("[]", "").capitalize()
                tests.append({"path": [field], "operator": word, f"value{kind}": value})
            return tests[0] if len(tests) == 1 else joined("and" if negated else "or", tests)
        return _filtered(source, joined, test)

    def _nearest(self, place: _Place, query: list[float], top_k: int, filter: Any, vectors: bool) -> Iterable[Any]:
        name, metric, types = self.opened(place)
        fields = [field for field, kind in types.items() if re.match(r"(text|int|number|boolean|date|uuid)\b", kind)]
        where = f" where:{_graphql(self.filter(filter, types))}" if filter else ""
        asked = f"{' '.join(fields)} _additional{{id distance{' vector' * vectors}}}"
        near = f"nearVector:{{vector:{json.dumps(query)}}} limit:{top_k}{where}"
        answer = self.call("POST", "/v1/graphql", payload={"query": f"{{Get{{{name}({near}){{{asked}}}}}}}"})
        self._rest.check({}, {"error": answer.get("errors") and answer["errors"][0]})
        for found in answer["data"]["Get"][name]:
            extra, record = found.pop("_additional"), found.get("record")
            ours = json.loads(record) if record else {"id": extra["id"], "metadata": _without_nulls(found)}
            yield ours["id"], self.score(extra["distance"], metric), ours["metadata"], extra.get("vector")

    def _remove(self, place: _Place, ids: list[str] | None, filter: Any) -> int:
        name, _, types = self.opened(place)
        where = self.filter(filter, types) if filter else {"path": ["id"], "operator": "Like", "valueText": "*"}
        if ids is not None:
            where = {"path": ["id"], "operator": "ContainsAny", "valueTextArray": list(map(_as_uuid, ids))}
        count, answer = 0, {"successful": 1, "matches": 2}
        while 0 < answer["successful"] < answer["matches"]:  # one call deletes 10,000 at most
            match = {"match": {"class": name, "where": where}}
            answer = self.call("DELETE", "/v1/batch/objects", payload=match)["results"]
            count += answer["successful"]
        return count

def _graphql(value: Any, key: str = "") -> str:
    """A value as a literal of GraphQL, whose map keys and operators have no quotes."""
    if isinstance(value, Mapping):
        return f"{{{' '.join(f'{name}:{_graphql(item, name)}' for name, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{' '.join(map(_graphql, value))}]"
    return str(value) if key == "operator" else json.dumps(value, ensure_ascii=False)

VECTOR_STORES: dict[str, Any] = {
    "local": LocalVectorStore, "qdrant": QdrantStore, "pinecone": PineconeStore, "weaviate": WeaviateStore,
    "chroma": ChromaStore}

# ---------------------------------------------------------------------------------------------------------------------
# 12. Step handlers: one function a step type, and the tables of transforms and actions
# A handler gets one attempt of one step (its rendered values, a way to call and to run children) and returns the
# step's outputs in the order of the SPEC's table. It raises; retrying, recording and cancelling are done around it.
# ---------------------------------------------------------------------------------------------------------------------

class _Inputs(dict[str, Any]):
    """A transform's inputs by name, and by position too: inputs["text"], inputs[0]."""

    def __missing__(self, key: Any) -> Any:
        if isinstance(key, int) and -len(self) <= key < len(self):
            return list(self.values())[key]
        raise KeyError(key)

def _one_input(inputs: _Inputs, kind: Any = object, description: str = "") -> Any:
    """The only input of a transform, of the kind it needs."""
    if len(inputs) != 1:
        raise ExecutionError(f"needs one input, not {len(inputs)}")
    value = next(iter(inputs.values()))
    if not isinstance(value, kind):
        raise ExecutionError(f"needs {description}, not {_type_name(value)}")
    return value

def _list_input(inputs: _Inputs) -> list[Any]:
    return list(_one_input(inputs, (list, tuple), "a list"))

def _same(left: Any, right: Any) -> bool:
    """Equality of JSON values: 1 is 1.0 but not true, inside lists and maps too."""
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)

def _field(item: Any, path: str) -> Any:
    """The value at a dotted path in a map or list; None where there is none."""
    for part in path.split("."):
        item = _child(item, part)
        if item is _MISSING:
            return None
    return item

def _merge(inputs: _Inputs, parameters: dict[str, Any]) -> Any:
    values = list(inputs.values())
    if values and all(isinstance(value, Mapping) for value in values):
        merged: dict[str, Any] = {}
        for value in values:
            merged = _merge_deep(merged, value) if parameters.get("deep") else {**merged, **value}
        return merged
    return list(itertools.chain(*values)) if _are_lists(values) else dict(inputs)

def _are_lists(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, (list, tuple)) for value in values)

def _merge_deep(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(left)
    for key, value in right.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge_deep(merged[key], value) if both else value
    return merged

def _concat(inputs: _Inputs, parameters: dict[str, Any]) -> Any:
    values = list(inputs.values())
    if _are_lists(values):
        return list(itertools.chain(*values))
    return parameters.get("separator", "").join(map(_to_text, values))

def _filter(inputs: _Inputs, parameters: dict[str, Any]) -> Any:
    items, key = _list_input(inputs), parameters.get("key", "")
    if "condition" in parameters:  # compiled by the workflow, asked once an item
        return [item for index, item in enumerate(items) if parameters["condition"](item, index)]
    if "value" not in parameters:
        return [item for item in items if _truthy(_field(item, key))]
    return [item for item in items if isinstance(item, Mapping) and _same(_field(item, key), parameters["value"])]

def _map(inputs: _Inputs, parameters: dict[str, Any]) -> Any:
    items = _list_input(inputs)
    if "template" in parameters:  # compiled by the workflow, rendered once an item
        return [parameters["template"](item, index) for index, item in enumerate(items)]
    return [_field(item, parameters["key"]) for item in items]

def _pick(inputs: _Inputs, parameters: dict[str, Any]) -> Any:
    source = _one_input(inputs, (Mapping, list, tuple), "a map or a list of maps")
    if "key" in parameters:
        key = parameters["key"]
        return _field(source, key) if isinstance(source, Mapping) else [_field(item, key) for item in source]
    keys = _as_list(parameters["keys"])
    picked = [{key: item[key] for key in keys if key in item} for item in _as_list(source) if isinstance(item, Mapping)]
    return picked[0] if isinstance(source, Mapping) else picked

def _split(inputs: _Inputs, parameters: dict[str, Any]) -> Any:
    text: str = _one_input(inputs, str, "text")
    separator = parameters.get("separator", "\n")
    parts = text.split(separator, parameters.get("max_splits", -1)) if separator else list(text)
    return [part.strip() for part in parts] if parameters.get("trim") else parts

def _join(inputs: _Inputs, parameters: dict[str, Any]) -> Any:
    return parameters.get("separator", ", ").join(map(_to_text, _list_input(inputs)))

def _json_parse(inputs: _Inputs, parameters: dict[str, Any]) -> Any:
    try:
        return _load_json(_one_input(inputs, str, "text"))
    except ParseError as error:
        raise ExecutionError(f"not JSON: {error}") from None

def _json_dump(inputs: _Inputs, parameters: dict[str, Any]) -> Any:
    return _to_json(_one_input(inputs), indent=parameters.get("indent"))

def _regex(inputs: _Inputs, parameters: dict[str, Any]) -> Any:
    text, pattern = _one_input(inputs, str, "text"), parameters["pattern"]
    compiled, group = _compile_regex(pattern), parameters.get("group", 0)
    try:
        if "replace" in parameters:
            return _guarded(compiled, text).sub(parameters["replace"], text)
        if parameters.get("all"):
            return [match[group] for match in _guarded(compiled, text).finditer(text)]
        match = _guarded_search(compiled, text)
        return match[group] if match else None
    except (IndexError, re.error) as error:
        raise ExecutionError(f"{error}: the pattern has {compiled.groups} groups") from None

def _sort(inputs: _Inputs, parameters: dict[str, Any]) -> Any:
    items, key = _list_input(inputs), parameters.get("key")
    keyed = [(item if key is None else _field(item, str(key)), item) for item in items]
    present = [pair for pair in keyed if pair[0] is not None]
    kinds = sorted({_type_name(value) for value, _ in present})
    if len(kinds) > 1:
        raise ExecutionError(f"cannot order {' and '.join(kinds)}")
    try:
        present.sort(key=lambda pair: pair[0], reverse=bool(parameters.get("reverse")))
    except TypeError:
        raise ExecutionError(f"cannot order {_type_name(present[0][0])}") from None
    return [item for _, item in present] + [item for value, item in keyed if value is None]  # nulls last, always

def _unique(inputs: _Inputs, parameters: dict[str, Any]) -> Any:
    key, seen = parameters.get("key"), {}  # type: ignore[var-annotated]
    for item in _list_input(inputs):
        seen.setdefault(_identity(item if key is None else _field(item, str(key))), item)
    return list(seen.values())

def _identity(value: Any) -> Any:
    """Equal, and of equal hash, for values that are the same JSON: 1 is 1.0 but not true, keys have no order."""
    if isinstance(value, Mapping):
        return "map", frozenset((str(key), _identity(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_identity, value))
    hashable = callable(getattr(value, "__hash__", None))  # an input may hold a set and the like
    return isinstance(value, bool), value if hashable else repr(value)

def _slice(inputs: _Inputs, parameters: dict[str, Any]) -> Any:
    source = _one_input(inputs, (list, tuple, str), "a list or text")
    return source[parameters.get("start", 0) : parameters.get("end")]

def _flatten(inputs: _Inputs, parameters: dict[str, Any]) -> Any:
    items = _list_input(inputs)
    for _ in range(parameters.get("depth", 1)):
        items = [inner for item in items for inner in (item if isinstance(item, (list, tuple)) else [item])]
    return items

_TRANSFORMS: dict[str, Callable[[_Inputs, dict[str, Any]], Any]] = {
    "merge": _merge, "concat": _concat, "filter": _filter, "map": _map, "pick": _pick, "split": _split, "join": _join,
    "json_parse": _json_parse, "json_dump": _json_dump, "regex": _regex, "sort": _sort, "unique": _unique,
    "slice": _slice, "flatten": _flatten,
    "length": lambda inputs, parameters: len(_one_input(inputs, (list, tuple, str, Mapping), "a list, map or text")),
    "template": lambda inputs, parameters: parameters["template"](inputs, 0),
}

def _log_action(call: _StepRun, parameters: dict[str, Any]) -> Any:
    message = _to_text(parameters.get("message", ""))
    call.run.emit("log", call.id, level=parameters.get("level", "info"), message=message)
    return message

async def _sleep_action(call: _StepRun, parameters: dict[str, Any]) -> Any:
    seconds = _seconds(parameters.get("seconds", parameters.get("duration")), "s")
    await asyncio.sleep(seconds or 0)
    return seconds

def _fail_action(call: _StepRun, parameters: dict[str, Any]) -> Any:
    raise ExecutionError(_to_text(parameters.get("message", "the fail action was reached")))

async def _write_file_action(call: _StepRun, parameters: dict[str, Any]) -> Any:
    name, content = parameters["path"], parameters["content"]
    text = content if isinstance(content, str) else _to_json(content, indent=2) + "\n"
    folder, append = call.run.executor.output_folder, parameters.get("append", False)
    return await call.threaded(_write_below, folder, name, text, append)

def _write_below(folder: str, name: str, text: str, append: bool) -> str:
    """Writes a file below `folder` and nowhere else, whatever links and dots its name holds; returns its path."""
    try:
        path = os.path.realpath(os.path.join(root := os.path.realpath(folder), name))
        if not path.startswith(root.rstrip(os.sep) + os.sep):
            raise ExecutionError(f"{name!r} is not below the output folder {folder!r}")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if append:
            with open(path, "a", encoding="utf-8", newline="") as file:
                file.write(text)
        else:
            _replace_file(path, text)
        return path
    except (OSError, ValueError) as error:
        raise ExecutionError(f"{name!r}: {error}") from None

def _replace_file(path: str, text: str) -> None:
    """Writes a file so that a reader sees the old text or the new one, never a part."""
    partial = f"{path}.{os.getpid()}-{threading.get_ident()}.part"
    try:
        with open(partial, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise

async def _http_action(call: _StepRun, parameters: dict[str, Any]) -> Any:
    url, payload = parameters["url"], parameters.get("json", parameters.get("body"))
    headers = {str(name): _to_text(value) for name, value in parameters.get("headers", {}).items()}
    body: bytes | None = None
    if payload is not None:
        as_text = isinstance(payload, str) and "json" not in parameters
        body = (payload if as_text else _to_json(payload)).encode("utf-8", "replace")
        if not any(name.lower() == "content-type" for name in headers):
            headers["Content-Type"] = "text/plain; charset=utf-8" if as_text else "application/json"
    method = parameters.get("method", "GET" if body is None else "POST").upper()
    response = await call.threaded(call.run.http().request, method, url, headers, body)
    text = response.text
    status, wait = response.status, _retry_after_seconds(response.headers)
    if status >= 400 and parameters.get("fail_on_error", True):
        for name, value in headers.items():  # an answer may repeat what is secret
            for secret in value.split() if re.search(_SECRET_NAME, name) else ():
                text = text.replace(secret, "***") if len(secret) > 7 else text
        reason, retryable = f"{method} answered {status}: {_shorten(text, 200)}", status in _RETRIED_STATUSES
        raise ProviderError(reason, provider="http", status=status, retryable=retryable, retry_after=wait)
    answered: Any = text
    with contextlib.suppress(ParseError):
        answered = _load_json(text)
    return {"status": status, "headers": response.headers, "body": answered}

_ACTIONS: dict[str, Callable[[_StepRun, dict[str, Any]], Any]] = {
    "log": _log_action, "http": _http_action, "webhook": _http_action, "write_file": _write_file_action,
    "sleep": _sleep_action, "fail": _fail_action,
}

_key = _must("text or a whole number", lambda value: isinstance(value, str) or _is_integer(value))
_whole, _separator = _must("a whole number", _is_integer), {"separator": _text}
_pause = _must('a number of seconds, or a text such as "1.5s"', lambda value: _seconds(value, "s") is not None)
_HTTP_PARAMETERS = _Map({"url": _name, "method": _name, "headers": _mapping, "json": _anything, "body": _anything,
    "fail_on_error": _boolean}, ("url",))
_PARAMETERS: dict[str, _Map] = {  # of the built-in transforms and actions
    **dict.fromkeys(("json_parse", "length"), _Map({})), **dict.fromkeys(("concat", "join"), _Map(_separator)),
    "merge": _Map({"deep": _boolean}), "flatten": _Map({"depth": _integer(1, 100)}), "unique": _Map({"key": _key}),
    "filter": _Map({"key": _text, "value": _anything, "condition": _anything}, either=("key", "condition")),
    "map": _Map({"key": _text, "template": _anything}, either=("key", "template")),
    "pick": _Map({"key": _text, "keys": _names}, either=("key", "keys")),
    "split": _Map({**_separator, "max_splits": _integer(-1), "trim": _boolean}),
    "json_dump": _Map({"indent": _integer(0, 20)}), "sort": _Map({"key": _key, "reverse": _boolean}),
    "regex": _Map({"pattern": _pattern_fault, "group": _key, "all": _boolean, "replace": _text}, ("pattern",)),
    "slice": _Map({"start": _whole, "end": _whole}), "template": _Map({"template": _anything}, ("template",)),
    "log": _Map({"message": _anything, "level": _one_of("debug", "info", "warning", "error")}),
    **dict.fromkeys(("http", "webhook"), _HTTP_PARAMETERS), "fail": _Map({"message": _anything}),
    "write_file": _Map({"path": _name, "content": _anything, "append": _boolean}, ("path", "content")),
    "sleep": _Map({"seconds": _pause, "duration": _pause}, either=("seconds", "duration")),
}

def _checked(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a built-in transform or action; null is as good as none."""
    shape = _PARAMETERS[name]
    free = [key for key, check in shape.keys.items() if check is _anything]  # of these, null is a value
    given = {key: value for key, value in values.items() if key in shape.keys and (value is not None or key in free)}
    for _, fault in shape.faults(given):
        raise ExecutionError(fault)
    return given

def _fitting_call(function: Any, leading: tuple[Any, ...], parameters: dict[str, Any]) -> Callable[[], Any]:
    """A custom function bound to what it can take: `leading` (a transform's inputs) first if there is room for it, and
    the parameters by name, or as one map; ExecutionError if neither fits."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return lambda: function(*leading, **parameters)
    forms: Any = (leading, parameters), ((*leading, parameters), {}), (leading, {}), ((), parameters), ((), {})
    for positional, named in forms:
        if parameters and not named and parameters not in positional:
            continue  # a function that would not see its parameters is called wrongly
        with contextlib.suppress(TypeError):
            signature.bind(*positional, **named)
            return functools.partial(function, *positional, **named)
    name = getattr(function, "__name__", "function")
    raise ExecutionError(f"{name}{signature} cannot take the parameters {', '.join(parameters) or '(none)'}")

async def _transform_step(call: _StepRun, values: dict[str, Any]) -> tuple[Any, ...]:
    """A custom transform; the built-in ones never wait and are run by `_transform_inline`."""
    custom = call.run.executor.transforms[values.pop("function")]
    inputs = _Inputs((key, render(call.context)) for key, render in call.node.inputs)
    return (await call.custom(custom, _fitting_call(custom, (inputs,), values)),)

def _transform_inline(node: _Node, context: Any, values: dict[str, Any]) -> Any:
    inputs = _Inputs((name, render(context)) for name, render in node.inputs)
    name, given = values["function"], node.given
    parameters = values if given is None else given.copy()
    for key, render in node.item_values:  # what a transform renders for each item itself
        parameters[key] = _per_item(render, context, node)
    try:
        return _TRANSFORMS[name](inputs, _checked(name, parameters) if given is None else parameters)
    except (ExecutionError, ConditionError) as error:
        raise ExecutionError(f"{name}: {error}") from None
    except RecursionError:
        raise ExecutionError(f"{name}: the value is nested too deeply") from None

def _per_item(render: Callable[[Any], Any], context: Any, node: _Node) -> Callable[[Any, int], Any]:
    if node.constants.get("function") == "template":  # its inputs are names in the template
        return lambda inputs, index: render({**context, **inputs})
    return lambda item, index: render({**context, "item": item, "index": index})

async def _action_step(call: _StepRun, values: dict[str, Any]) -> tuple[Any, ...]:
    name = values.pop("action")
    if (custom := call.run.executor.actions.get(name)) is not None:
        return (await call.custom(custom, _fitting_call(custom, (), values)),)
    try:
        return (await call.working(True, _ACTIONS[name], call, _checked(name, values)),)
    except ExecutionError as error:
        raise ExecutionError(str(error) if name == "fail" else f"{name}: {error}") from None

# ---- Models: prompts, tools, structured answers ----------------------------------------------------------------------

async def _llm_step(call: _StepRun, values: dict[str, Any]) -> tuple[Any, ...]:
    """Asks a model, as often as its tool calls and a schema that it misses make necessary."""
    schema, made, rounds, retries = values.get("schema"), [], 0, 0  # type: dict[str, Any] | None, list[Any], int, int
    tools = {name: call.run.executor.tools[name] for name in _as_list(values.get("tools"))}
    request, asked = _completion_request(call, values, tools), []  # type: CompletionRequest, list[Any]
    while True:
        response = await call.complete(values["provider"], request, values.get("cache") is not False)
        if response.tool_calls and tools:
            rounds += 1
            if rounds > (values.get("max_tool_rounds") or 8):
                raise ExecutionError(f"the model asks for tools after max_tool_rounds ({rounds - 1}) rounds of them")
            request.messages = [*request.messages, *await _tool_round(call, response, tools, made)]
            continue
        value, faults = (response.text, []) if schema is None else _structured_answer(response.text, schema)
        if not faults:
            break
        asked.append(request.messages)
        if retries >= values.get("schema_retries", 2):
            await call.forget(values["provider"], request, asked)
            reason = f"the answer does not fit the schema: {'; '.join(faults[:5])}: {_shorten(response.text, 200)!r}"
            raise BadResponseError(reason, provider=values["provider"])
        retries += 1
        wrong = "\n- ".join(["That does not fit the schema:", *faults[:20]]) + "\nAnswer with the corrected JSON alone."
        answered = {"role": "assistant", "content": response.text or "(nothing)"}
        request.messages = [*request.messages, answered, {"role": "user", "content": wrong}]
    call.result.provider, call.result.model = values["provider"], response.model
    metadata = _json_value(response.metadata, "the provider")
    used = {name: found for name, found in (("tool_calls", made), ("schema_retries", retries)) if found}
    return value, response.model, (call.result.usage or {}).get("total_tokens"), {**metadata, **used}

_REQUEST_KEYS = frozenset(("model", "system", *_SAMPLING_KEYS, "params"))

def _completion_request(call: _StepRun, values: dict[str, Any], tools: Mapping[str, Any]) -> CompletionRequest:
    if (messages := values.get("messages")) is None:
        messages = [{"role": "user", "content": values["prompt"]}]
    given = {name: value for name, value in values.items() if name in _REQUEST_KEYS and value is not None}
    request = CompletionRequest(messages=messages, stream=call.streams(values), **given)
    if tools:
        request.tools = [_tool_schema(name, function) for name, function in tools.items()]
    if schema := values.get("schema"):
        provider = call.run.provider(values["provider"], call.siblings.workflow)
        if getattr(provider, "native_schema", False):
            request.schema = schema
        else:
            asked = "Answer with JSON that fits this JSON Schema, and with nothing else:\n" + _to_json(schema)
            request.system = f"{request.system}\n\n{asked}" if request.system else asked
    if request.stream:
        request.on_text = functools.partial(call.on_text, call.result.attempts)
    return request

def _with_text(message: Any) -> Any:
    """A message whose content is text, or a list of parts, whatever its template gave."""
    content = message.get("content", "") if isinstance(message, Mapping) else ""
    return message if isinstance(content, (str, list)) else {**message, "content": _to_text(content)}

async def _tool_round(call: _StepRun, response: Any, tools: Mapping[str, Any], made: list[Any]) -> list[dict[str, Any]]:
    """The messages that carry a model's tool calls and what came of them; a tool's error goes back to the model."""
    answers: list[Any] = [{"role": "assistant", "content": response.text, "tool_calls": response.tool_calls}]
    for asked in response.tool_calls:
        name, arguments = asked["name"], asked["arguments"]
        entry = {"name": name, "arguments": arguments}
        try:
            if name not in tools:
                raise ExecutionError(f"there is no tool {name!r}; there are {', '.join(tools)}")
            if faults := _schema_faults(arguments, _tool_schema(name, tools[name])["parameters"]):
                raise ExecutionError(f"wrong arguments: {'; '.join(faults[:5])}")
            entry["result"] = await call.custom(tools[name], _bound_tool(tools[name], arguments))
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {error}"
        made.append(entry)
        content, failed = entry.get("error") or _to_text(entry.get("result")), "error" in entry
        answers.append({"role": "tool", "id": asked["id"], "name": name, "content": content, "is_error": failed})
    return answers

def _bound_tool(function: Callable[..., Any], arguments: dict[str, Any]) -> Callable[[], Any]:
    """The function bound to arguments by name, those that it takes by position alone too."""
    bound = inspect.BoundArguments(inspect.signature(function), dict(arguments))
    bound.apply_defaults()
    return functools.partial(function, *bound.args, **bound.kwargs)

_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}

def _tool_schema(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """A function as a tool: its docstring, and a JSON Schema made of its signature."""
    properties, required = {}, []
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # names that are not there at run time: the parameters are then of any type
        hints = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        properties[parameter.name] = _type_schema(hints.get(parameter.name))
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"name": name, "description": inspect.getdoc(function) or name, "parameters": schema}

def _type_schema(hint: Any) -> dict[str, Any]:
    """The JSON Schema of a type hint; {} (anything) for those that JSON does not know."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if type(None) in arguments:  # Optional[X], X | None
        return {"anyOf": [_type_schema(one) for one in arguments if one is not type(None)] + [{"type": "null"}]}
    kind = _JSON_TYPES.get(origin or hint)
    items = {"items": _type_schema(arguments[0])} if kind == "array" and arguments else {}
    return {"type": kind, **items} if kind else {}

def _structured_answer(text: str, schema: Any) -> tuple[Any, list[str]]:
    """(value, faults) of an answer that should be JSON: the whole text, a fenced part, or a map or list in prose."""
    faults: list[str] = []
    refusal: Any = None
    for candidate in _json_candidates(text):
        try:
            value = _load_json(candidate.strip())
            found = _schema_faults(value, schema)
        except ParseError as error:
            refusal = refusal or error
            continue
        except RecursionError:
            found = ["$ is nested too deeply to be checked"]
        if not found:
            return value, []
        faults = faults or found
    if not faults:
        faults = [f"it cannot be read as JSON: line {refusal.line}, column {refusal.column}: {refusal.reason}"]
    return None, faults

def _json_candidates(text: str) -> Iterator[str]:
    """Never a part of what stands in brackets: of JSON that is broken or cut off, a part would be a wrong answer."""
    yield text
    yield from re.findall(r"```[\w-]*\n(.*?)```", text, re.DOTALL)
    marks, start = re.compile(r'"[^"\\]*(?:\\.?[^"\\]*)*(?:"|\Z)|[\[\]{}]', re.DOTALL), 0
    while opening := re.compile(r"[\[{]").search(text, start):
        depth = 0
        for mark in marks.finditer(text, opening.start()):
            depth += (mark[0] in "[{") - (mark[0] in "]}")
            if not depth:
                start = mark.end()
                yield text[opening.start() : start]
                break
        else:  # it is never closed
            return

def _is_multiple(value: float, step: float) -> bool:
    """Exactly, of the decimal numbers as they are written: 0.3 is a multiple of 0.1."""
    from fractions import Fraction
    return abs(value) != math.inf and Fraction(str(value)) % Fraction(str(step)) == 0

_SCHEMA_TYPES: dict[str, Callable[[Any], bool]] = {**_INPUT_TYPES, "null": lambda value: value is None}
_SCHEMA_CHECKS: dict[str, tuple[str, Any, Callable[[Any, Any], bool]]] = {
    # keyword -> (what the value must be, the types that the keyword speaks of, whether the value is so)
    "enum": ("one of {}", object, lambda value, allowed: any(_same(value, one) for one in allowed)),
    "const": ("{}", object, _same),
    "minimum": ("at least {}", (int, float), lambda value, bound: value >= bound),
    "maximum": ("at most {}", (int, float), lambda value, bound: value <= bound),
    "exclusiveMinimum": ("more than {}", (int, float), lambda value, bound: value > bound),
    "exclusiveMaximum": ("less than {}", (int, float), lambda value, bound: value < bound),
    "multipleOf": ("a multiple of {}", (int, float), _is_multiple),
    "minLength": ("at least {} characters long", str, lambda value, bound: len(value) >= bound),
    "maxLength": ("at most {} characters long", str, lambda value, bound: len(value) <= bound),
    "pattern": ("text that matches {}", str, lambda value, one: bool(_guarded_search(_compile_regex(one), value))),
    "minItems": ("a list of at least {}", (list, tuple), lambda value, bound: len(value) >= bound),
    "maxItems": ("a list of at most {}", (list, tuple), lambda value, bound: len(value) <= bound),
    "uniqueItems": ("a list without repeats", (list, tuple), lambda value, wanted: not wanted or
                    len(set(map(_identity, value))) == len(value)),
    "minProperties": ("a map of at least {} keys", Mapping, lambda value, bound: len(value) >= bound),
    "maxProperties": ("a map of at most {} keys", Mapping, lambda value, bound: len(value) <= bound),
}
_UNCHECKED = frozenset((
    "if", "then", "else", "patternProperties", "propertyNames", "contains", "minContains", "maxContains", "prefixItems",
    "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems", "unevaluatedProperties",
    "additionalItems", "$dynamicRef", "$recursiveRef",
))

_SCHEMA_PARTS: dict[str, Callable[[Any], str | None]] = {  # what the keywords themselves must be
    "type": _must(f"of {', '.join(_SCHEMA_TYPES)}", lambda part: all(
        isinstance(name, str) and name in _SCHEMA_TYPES for name in _as_list(part))),
    "enum": _must("a list", _INPUT_TYPES["array"]), "pattern": _pattern_fault, "$ref": _text,
    "required": _must("a list of texts", lambda part: isinstance(part, list) and not _texts(part)),
    "uniqueItems": _must("true or false", _INPUT_TYPES["boolean"]),
    "multipleOf": _must("a number above 0", lambda part: _is_number(part) and part > 0),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _must("a number", _is_number)),
    **dict.fromkeys((low + what for low in ("min", "max") for what in ("Length", "Items", "Properties")), _integer(0)),
    **dict.fromkeys(("properties", "$defs", "definitions"), _mapping),
    **dict.fromkeys(("anyOf", "oneOf", "allOf"), _must("a list of schemas", lambda part: part and type(part) is list)),
}

def _check_schema(root: Any) -> None:
    """ExecutionError for what `_schema_faults` would pass over (keywords that it does not know) or stumble over."""
    places, seen = [("schema", root)], set()
    while places:
        where, schema = places.pop()
        if isinstance(schema, bool) or id(schema) in seen:
            continue
        if not isinstance(schema, Mapping):
            raise ExecutionError(f"{where} must be a JSON Schema, not {_shown(schema)}")
        seen.add(id(schema))
        for keyword, part in schema.items():
            if keyword in _UNCHECKED:
                raise ExecutionError(f"{where}: the keyword {keyword!r} is not supported")
            if fault := _SCHEMA_PARTS.get(keyword, _anything)(part):
                raise ExecutionError(f"{where}: {keyword} {fault}")
            inner = {"": part} if keyword in ("items", "additionalProperties", "not") else {}
            if keyword == "$ref":
                inner = {"": _schema_at(root, part)}
            elif keyword in ("properties", "$defs", "definitions"):
                inner = {f".{name}": one for name, one in part.items()}
            elif keyword in ("anyOf", "oneOf", "allOf"):
                inner = {f"[{index}]": one for index, one in enumerate(part)}
            places += [(f"{where}.{keyword}{name}", one) for name, one in inner.items()]

def _schema_faults(value: Any, schema: Any, root: Any = None, where: str = "$", followed: Any = (),
                   known: dict[Any, list[str]] | None = None) -> list[str]:
    """What in a value does not fit a JSON Schema (the usual part of draft 2020-12), each with its place. What was found
    for a place is known when other parts of the schema ask again: the time does not double with each level."""
    if not isinstance(schema, Mapping):
        return [f"{where} must not be there"] if schema is False else []
    known, key = {} if known is None else known, (where, id(value), id(schema))
    if key in known:
        return known[key]
    root = schema if root is None else root
    rest, kinds = (root, where, followed, known), _as_list(schema.get("type"))
    faults: list[str] = []
    if kinds and not any(kind in _SCHEMA_TYPES and _SCHEMA_TYPES[kind](value) for kind in kinds):
        faults.append(f"{where} must be {' or '.join(map(str, kinds))}, not {_shown(value)}")
        return faults
    for keyword, (wanted, types, holds) in _SCHEMA_CHECKS.items():
        concerned = isinstance(value, types) and not (isinstance(value, bool) and types is not object)
        if keyword in schema and concerned and not holds(value, schema[keyword]):
            faults.append(f"{where} must be {wanted.format(_shorten(_to_json(schema[keyword]), 200))}")
    if (reference := schema.get("$ref")) is not None:
        if reference in followed:
            raise ExecutionError(f"$ref {reference!r} leads round to itself in the schema")
        faults += _schema_faults(value, _schema_at(root, reference), root, where, (*followed, reference), known)
    for part in schema.get("allOf", ()):
        faults += _schema_faults(value, part, *rest)
    for keyword in ("anyOf", "oneOf"):
        failures: list[list[str]] = []
        for part in schema.get(keyword, ()):
            failures.append(_schema_faults(value, part, *rest))
        fitting = failures.count([])
        if failures and not fitting:
            faults.append(min(failures, key=len)[0])
        elif keyword == "oneOf" and fitting > 1:
            faults.append(f"{where} must fit exactly one of {len(failures)} schemas, but fits {fitting}")
    if "not" in schema and not _schema_faults(value, schema["not"], *rest):
        faults.append(f"{where} must not fit {_shorten(_to_json(schema['not']), 100)}")
    for place, item, part in _schema_parts(value, schema, where):
        faults += [part] if isinstance(part, str) else _schema_faults(item, part, root, place, (), known)
    known[key] = faults = [*dict.fromkeys(faults)]
    return faults

def _schema_parts(value: Any, schema: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """(place, value, its schema) of a map's entries and a list's items; a text instead of a schema is a fault."""
    if isinstance(value, (list, tuple)) and "items" in schema:
        for index, item in enumerate(value):
            yield f"{where}[{index}]", item, schema["items"]
    if isinstance(value, Mapping):
        properties, others = schema.get("properties") or {}, schema.get("additionalProperties", True)
        for name in schema.get("required") or ():
            if name not in value:
                yield "", None, f"{where}.{name} is missing"
        for name, item in value.items():
            near = _suggestion(name, properties) if name not in properties and others is False else None
            part = f"{where}.{name} is not allowed{near}" if near is not None else properties.get(name, others)
            yield f"{where}.{name}", item, part

def _schema_at(root: Any, reference: str) -> Any:
    """The schema that a `$ref` within the document names (a JSON pointer); ExecutionError if there is none."""
    start, *steps = reference.split("/")
    if start != "#":
        raise ExecutionError(f"$ref {reference!r} is not supported; it must begin with #/ and stay in the schema")
    schema = root
    for step in steps:
        schema = _child(schema, step.replace("~1", "/").replace("~0", "~"))
    if schema is _MISSING:
        raise ExecutionError(f"the schema has nothing at $ref {reference!r}")
    return schema

# ---- Embeddings, vectors, containers ---------------------------------------------------------------------------------

async def _embed_step(call: _StepRun, values: dict[str, Any]) -> tuple[Any, ...]:
    texts, single = values["input"], isinstance(values["input"], str)
    vectors, model, tokens = await call.embed(values, [texts] if single else texts)
    call.result.provider, call.result.model = values["provider"], model
    metadata = {"model": model, "dimensions": len(vectors[0]) if vectors else 0, "tokens_used": tokens}
    return vectors[0] if single else vectors, metadata

async def _vector_search_step(call: _StepRun, values: dict[str, Any]) -> tuple[Any, ...]:
    query, top_k = values["query"], values.get("top_k") or 5
    if isinstance(query, str):
        if not values.get("embed"):
            raise ExecutionError("query is text; give embed: {provider, model} to make a vector of it")
        query = (await call.embed({"input_type": "query", **values["embed"]}, [query]))[0][0]
    options = {name: values.get(name) for name in ("filter", "namespace")}
    options["include_metadata"] = values.get("include_metadata") is not False
    options["include_vectors"] = values.get("include_vectors") is True
    store = call.run.vector_store(values["database"])
    results = await call.custom(store.search, functools.partial(store.search, values["index"], query, top_k, **options))
    if not isinstance(results, list):
        raise ExecutionError(f"the vector store {values['database']!r} answered {_type_name(results)}, not results")
    return results, {"count": len(results), "top_k": top_k, "database": values["database"], "index": values["index"]}

async def _vector_upsert_step(call: _StepRun, values: dict[str, Any]) -> tuple[Any, ...]:
    records, documents = values.get("vectors"), values.get("documents")
    if (records is None) == (documents is None):
        raise ExecutionError("documents and vectors are null; give one of the two")
    if documents is not None:
        if not values.get("embed"):
            raise ExecutionError("documents need embed: {provider, model} to make vectors of them")
        entries = list(map(_document_record, _as_list(documents)))
        texts = [entry["metadata"]["text"] for entry in entries]
        vectors = (await call.embed({"input_type": "document", **values["embed"]}, texts))[0]
        records = [{**entry, "vector": vector} for entry, vector in zip(entries, vectors)]
    store = call.run.vector_store(values["database"])
    upsert = functools.partial(store.upsert, values["index"], records, values.get("namespace"))
    return (await call.custom(store.upsert, upsert),)

def _document_record(document: Any) -> dict[str, Any]:
    """A document (a text, or a map with a text, and perhaps an id and metadata) as a record that lacks its vector."""
    entry = {"text": document} if isinstance(document, str) else document
    if not isinstance(entry, Mapping) or not isinstance(entry.get("text"), str):
        raise ExecutionError(f"documents must be texts, or maps with a text, not {_shown(document)}")
    for key in entry:
        if key not in ("id", "text", "metadata"):
            raise ExecutionError(f"a document has id, text and metadata; {key!r} belongs under metadata")
    metadata, identifier = entry.get("metadata") or {}, entry.get("id")
    if not isinstance(metadata, Mapping):
        raise ExecutionError(f"the metadata of a document must be a map, not {_shown(metadata)}")
    if identifier is None:  # what is the same is stored once
        content = entry["text"] + (_to_json(metadata, sort_keys=True) if metadata else "")
        identifier = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return {"id": identifier, "metadata": {**metadata, "text": entry["text"]}}

async def _parallel_step(call: _StepRun, values: dict[str, Any]) -> tuple[Any, ...]:
    assert call.node.children is not None
    return (await call.run_children(call.node.children, limit=call.node.limit)).firsts()

async def _branch_step(call: _StepRun, values: dict[str, Any]) -> tuple[Any, ...]:
    node = call.node
    value = _branch_key(node.picker.value(call.context) if node.picker else None)
    taken = value if value in node.branches else "default" if "default" in node.branches else None
    outputs = {child.id: None for graph in node.branches.values() for child in graph.nodes}
    recorded = set(node.branches[taken].by_id if taken is not None else ())  # an id may stand in several branches
    for order, (name, graph) in enumerate(node.branches.items()):
        if name != taken:
            call.skip_children([child for child in graph.nodes if child.id not in recorded], order, "branch")
            recorded.update(graph.by_id)
    if taken is not None:
        children = await call.run_children(node.branches[taken], order=list(node.branches).index(taken))
        outputs.update(zip(children.graph.by_id, children.firsts()))
    return (taken, *outputs.values())

async def _loop_step(call: _StepRun, values: dict[str, Any]) -> tuple[Any, ...]:
    node, previous = call.node, None  # type: _Node, Mapping[str, Any] | None
    assert node.children is not None and node.until is not None
    for iteration in range(values["max_iterations"]):
        local = {"iteration": iteration, "previous": previous}
        children = await call.run_children(node.children, local, segment=str(iteration), order=iteration)
        await asyncio.sleep(0)  # where no step ever waits, the loop would keep deadlines and cancellation waiting
        outputs = (*children.firsts(), iteration + 1)
        if node.until.evaluate(children.context):
            return outputs
        previous = call.child_views
    if values.get("on_exhausted") != "continue":
        raise ExecutionError(f"the condition of until did not hold within {values['max_iterations']} iterations")
    return outputs

class _Paused(BaseException):
    """A step waits for an approval: the run goes on as far as it can without it, and stops."""

async def _approval_step(call: _StepRun, values: dict[str, Any]) -> tuple[Any, ...]:
    """Pauses the run until it is resumed with a decision on this step."""
    decision = call.run.decisions.get(call.id)
    if decision is None:
        call.result.reason = "approval"
        call.run.emit("approval_needed", call.id, message=values.get("message") or "")
        raise _Paused
    approved, given = decision
    if not approved:
        raise ExecutionError("it was rejected", call.id)
    return ({"approved": True, **given},)

_HANDLERS: dict[str, Callable[[_StepRun, dict[str, Any]], Awaitable[tuple[Any, ...]]]] = {
    "llm": _llm_step, "embed": _embed_step, "vector_search": _vector_search_step, "vector_upsert": _vector_upsert_step,
    "transform": _transform_step, "action": _action_step, "parallel": _parallel_step, "branch": _branch_step,
    "loop": _loop_step, "approval": _approval_step, "workflow": lambda call, values: call.run_workflow(values),
}

# ---------------------------------------------------------------------------------------------------------------------
# 13. Execution: the scheduler and the run
# A plan, inputs and providers come in; a RunResult goes out. Steps start the moment their last dependency ends and a
# slot is free; what fails stops only what depends on it; a cancelled run leaves nothing running.
# ---------------------------------------------------------------------------------------------------------------------

_DEFAULT_CONCURRENCY = 4
_PROVIDER_TYPES = frozenset(("llm", "embed", "vector_search", "vector_upsert"))
_PATIENCE_SECONDS = 0.5  # after which what did not heed its cancellation is cancelled again
_SLICE_SECONDS = 0.004  # how long steps that never wait may keep the event loop to themselves
_USAGE = ("input_tokens", "output_tokens", "total_tokens", "calls")

class StepResult:
    """What became of one step.

    `status` is pending, running, completed, failed, skipped or cancelled; `outputs` maps output names to JSON values
    (null for a skipped or failed step); `error` is None or {"type", "message", "status", "retryable"}; `reason` says
    why a step was skipped; `usage` counts input_tokens, output_tokens, total_tokens and calls.
    """

    __slots__ = (
        "attempts", "duration_ms", "error", "exception", "model", "order", "outputs", "provider", "reason", "status",
        "step_id", "tolerated", "type", "usage",
    )

    def __init__(self, step_id: str, type: str, order: tuple[int, ...] = ()) -> None:
        self.step_id, self.type, self.order, self.status = step_id, type, order, "pending"
        self.outputs: dict[str, Any] = {}
        self.error: dict[str, Any] | None = None
        self.exception: BaseException | None = None
        self.reason: str | None = None
        self.attempts = 0
        self.duration_ms: float | None = None
        self.usage: dict[str, Any] | None = None
        self.provider: str | None = None
        self.model: str | None = None
        self.tolerated = False  # failed with continue_on_error

    def fail(self, error: BaseException) -> None:
        self.status, self.exception, self.error = "failed", error, _error_summary(error)

    def failure_text(self) -> str:
        """The error after the id of the step that it is from: this one, or the child that it names."""
        message = str((self.error or {}).get("message", "failed"))
        return message if message.startswith(f"{self.step_id}.") else f"{self.step_id}: {message}"

    def to_dict(self) -> dict[str, Any]:
        """The step's entry in the JSON result; keys that mean nothing for it are left out."""
        entry: dict[str, Any] = {"step_id": self.step_id, "type": self.type, "status": self.status}
        entry.update(outputs=self.outputs, error=self.error)
        for name in ("reason", "attempts", "duration_ms", "usage", "provider", "model"):
            value = getattr(self, name)
            if value:
                entry[name] = value
        return entry

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> StepResult:
        """The result that `to_dict` (and a store) wrote down."""
        result = cls(entry["step_id"], entry["type"], tuple(entry.get("order") or ()))
        for name in ("status", "outputs", "error", "reason", "attempts", "duration_ms", "usage", "provider", "model"):
            setattr(result, name, entry.get(name, getattr(result, name)))
        return result

    def __repr__(self) -> str:
        return f"StepResult({self.step_id!r}, {self.status}, outputs={self.outputs!r})"

def _error_summary(error: BaseException) -> dict[str, Any]:
    """An error as the JSON result shows it."""
    summary: dict[str, Any] = {"type": type(error).__name__, "message": _error_text(error)}
    status = getattr(error, "status", None)
    if isinstance(status, int):
        summary["status"] = status
    summary["retryable"] = _is_transient(error)
    return summary

def _error_text(error: BaseException) -> str:
    """What an error says, also if it is a foreign one that says nothing or cannot."""
    try:
        return str(error) or repr(error)
    except BaseException:
        return type(error).__name__

def _is_transient(error: BaseException) -> bool:
    """Whether another attempt may help, as far as the error itself can tell."""
    likely = isinstance(error, (ConnectionError, TimeoutError))
    return bool(getattr(error, "retryable", likely and not isinstance(error, OrchestratorError)))

class RunResult(Mapping[str, StepResult]):
    """What became of a run: a mapping of full step ids to StepResult, in workflow order, and the run's own outcome.

    `status` is completed, failed, cancelled or timed_out; `outputs` are the workflow's own outputs; `usage` counts
    input_tokens, output_tokens, total_tokens and calls; `error` is None or {"type", "message", ...}.
    """

    def __init__(self, run_id: str, workflow: str) -> None:
        self.run_id, self.workflow, self.status, self.duration_ms = run_id, workflow, "running", 0.0
        self.outputs: dict[str, Any] = {}
        self.usage: dict[str, Any] = dict.fromkeys(_USAGE, 0)
        self.error: dict[str, Any] | None = None
        self.exception: BaseException | None = None
        self.steps: dict[str, StepResult] = {}

    def __getitem__(self, step_id: str) -> StepResult:
        return self.steps[step_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def raise_for_status(self) -> None:
        """Raises unless the run completed: RunTimeoutError, or ExecutionError from the first failed step's error."""
        if self.status == "completed":
            return
        if isinstance(self.exception, (RunTimeoutError, ExecutionError)):
            raise self.exception
        raise ExecutionError(f"the run was {self.status}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON result of `run`."""
        names = ("run_id", "workflow", "status", "duration_ms", "outputs", "usage", "error")
        steps = {step_id: step.to_dict() for step_id, step in self.steps.items()}
        return {**{name: getattr(self, name) for name in names}, "steps": steps}

    def __repr__(self) -> str:
        return f"RunResult({self.run_id!r}, {self.status}, steps={len(self.steps)})"

def _is_awaitable(value: Any) -> bool:
    try:
        return hasattr(value, "__await__")
    except Exception:  # a proxy of nothing, for one, refuses every question
        return False

def _harmless(error: BaseException) -> Exception:
    """What a user's function raised, as an error of its step: nothing that would end, cancel or confuse the run."""
    if isinstance(error, Exception) and not isinstance(error, (StopIteration, _Paused)):
        return error
    failure = ExecutionError(f"{type(error).__name__} was raised: {_error_text(error)}")
    failure.__cause__ = error
    return failure

class _NotYet(Exception):
    """A call's turn came when its provider was not to be called any more, or not now: it was not made."""

class _Job(_Turn):
    """A blocking call for a worker thread, in one of `places` if given, past a `gate` with a `permit` of it. The loop
    hears by `began` when it began, a moment of time.perf_counter()."""

    __slots__ = ("arguments", "began", "function", "future", "gate", "permit", "places", "pool", "scope", "started")
    pool: _WorkerPool

    def __init__(self, pool: _WorkerPool, function: Callable[..., Any], arguments: tuple[Any, ...],
            places: _Places | None = None, began: Callable[[float], None] | None = None, gate: _Gate | None = None,
            permit: int = 0) -> None:
        self.pool, self.function, self.arguments, self.places, self.began = pool, function, arguments, places, began
        self.gate, self.permit = gate, permit
        self.future, self.scope, self.started = pool.loop.create_future(), _CancelScope(), 0.0

    async def outcome(self) -> Any:
        """What the call gives, awaited if need be. When cancelled, the socket under it is closed at once."""
        try:
            if self.places is None or self.places.take(self):
                self.give()
            outcome = await self.future
            return await outcome if _is_awaitable(outcome) else outcome
        except BaseException:
            self.scope.cancel()
            raise
        finally:
            with self.scope.lock:
                places, self.places = self.places, None
            if self.started:  # also if the news of it has not been delivered
                self.begin()
            if places is not None:
                given = self.future.done() and not self.future.cancelled()
                places.leave() if given else places.drop(self)

    def give(self) -> None:
        """Has the call made: its turn has come. If it was cancelled, its task gives the place up."""
        if self.future.done():
            return
        if threading.get_ident() == self.pool.thread:
            if self.gate is not None and self.gate.is_stale(self.permit):
                self.future.set_exception(_NotYet())
                return
            self.started = time.perf_counter()
            self.begin()
        self.pool.put(self)

    def begin(self, _: object = None) -> None:
        began, self.began = self.began, None
        if began is not None:
            began(self.started)

    def pass_on(self) -> _Job | None:
        """The next job of the pool in line, which has the place of this one from now on."""
        following: _Job | None = None
        with self.scope.lock:
            if self.places is not None and (following := self.places.following(self.pool)):
                self.places = None
        return following

    def call(self) -> tuple[Any, Exception | None]:
        with self.scope.lock:
            if self.scope.cancelled or self.future.done():  # nothing starts after it was cancelled
                return None, None
            if not self.started and self.gate is not None and self.gate.is_stale(self.permit):
                return None, _NotYet()
            self.started = self.started or time.perf_counter()
        if self.began is not None:
            self.pool.tell(self.future, self.begin, None)
        _CALL.scope = self.scope
        try:
            return self.function(*self.arguments), None
        except BaseException as raised:
            if self.gate is not None:  # before the next job takes over the place
                self.gate.hear(raised)
            return None, _harmless(raised)
        finally:
            _CALL.scope = None

class _WorkerPool:
    """Daemon threads for blocking calls: as many as there are calls in flight, kept for reuse until `close`.

    asyncio's default pool stops at cpu + 4 threads and is joined at exit; neither will do for slow calls. A thread that
    is done takes the next job that waits for its place by itself: the event loop hears of both later, in one wake-up.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop, self.thread, self.lock = loop, threading.get_ident(), threading.Lock()
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.idle = self.threads = 0  # idle: threads that no job has been promised to
        self.news: collections.deque[tuple[Any, ...]] = collections.deque()  # (future, what to call if not done, with)
        self.delivering = False

    def put(self, job: _Job) -> None:
        """Has a job done. If the system has not even one thread for that, it fails."""
        with self.lock:
            spawn = self.idle <= 0
            self.threads += spawn
            self.idle -= not spawn
        self.jobs.put(job)
        try:
            if spawn:
                threading.Thread(target=self.work, name="llm_orchestrator", daemon=True).start()
        except RuntimeError as error:  # no more threads: one of those that there are will come to it
            with self.lock:
                self.threads -= 1
                self.idle -= 1
                alone = not self.threads
            if alone:
                job.scope.cancelled = True
                self.tell(job.future, job.future.set_exception, error)

    def work(self) -> None:
        job = self.jobs.get()
        while job is not None:
            following = self.finish(job, *job.call())
            del job  # while the thread waits, nothing is to be kept alive
            job = following or self.jobs.get()

    def finish(self, job: _Job, value: Any, error: Exception | None) -> _Job | None:
        """Tells the loop what came of a job; returns the next one, if there is one that has its place now."""
        following = None if _is_awaitable(value) else job.pass_on()
        if following is None:
            with self.lock:
                self.idle += 1
        tell = job.future.set_result if error is None else job.future.set_exception
        self.tell(job.future, tell, value if error is None else error)
        return following

    def tell(self, future: Any, function: Callable[[Any], Any], told: Any) -> None:
        self.news.append((future, function, told))
        if not self.delivering:
            self.delivering = True  # one wake-up serves all that there is to tell when the loop looks
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self.loop.call_soon_threadsafe(self.deliver)

    def deliver(self) -> None:
        self.delivering = False
        while self.news:
            future, function, told = self.news.popleft()
            if future is None or not future.done():
                function(told)

    def close(self) -> None:
        for _ in range(self.threads):
            self.jobs.put(None)

class _StepView(dict[str, Any]):
    """What templates see as steps.ID: its outputs, its children, status and error; alone, its first output."""

    __slots__ = ("value",)

    def __init__(self, result: StepResult, children: Mapping[str, Any]) -> None:
        super().__init__(result.outputs)
        self.value = next(iter(result.outputs.values()), None)
        self.update(children)
        self.setdefault("output", self.value)
        self.setdefault("status", result.status)
        self.setdefault("error", result.error["message"] if result.error else None)

    def __template_value__(self) -> Any:
        return self.value

def _null_views(node: _Node, called: bool = True) -> dict[str, Any]:
    """What templates see as the children of a container that did not run them."""
    views: dict[str, Any] = {}
    graphs = [*node.graphs(), *([node.workflow._plan().graph] if node.workflow and called else [])]
    for child in (child for graph in graphs for child in graph.nodes):
        result = StepResult(child.id, child.type)
        result.status, result.outputs = "skipped", dict.fromkeys(child.output_names)
        views[child.id] = _StepView(result, _null_views(child, False))  # a workflow may call itself
    return views

class _OutputNames(dict[str, Any]):
    """`outputs.X`: a step by its id, or an output by its name, of this scope or of those around it."""

    __slots__ = ("around", "graph", "steps")

    def __init__(self, steps: Mapping[str, Any], graph: _Graph, around: Mapping[str, Any]) -> None:
        super().__init__()
        self.steps, self.graph, self.around = steps, graph, around

    def __missing__(self, key: str) -> Any:
        if key in self.steps:
            return self.steps[key]
        producer = self.graph.producers.get(key)
        return self.around[key] if producer is None else self.steps[producer][key]

    def __contains__(self, key: object) -> bool:
        return key in self.steps or key in self.graph.producers or key in self.around

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401

_TRIGGER_RULES: dict[str, Callable[[int, int, int], str | None]] = {
    # (ran, failed, skipped) dependencies -> why the step is skipped, or None to run it
    "none_failed_min_one_success": lambda ran, failed, skipped: (
        "upstream_failed" if failed else None if ran else "upstream_skipped"
    ),
    "all_success": lambda ran, failed, skipped: (
        "upstream_failed" if failed else "upstream_skipped" if skipped else None
    ),
    "one_success": lambda ran, failed, skipped: None if ran else "upstream_failed" if failed else "upstream_skipped",
    "all_done": lambda ran, failed, skipped: None,
    "one_failed": lambda ran, failed, skipped: None if failed else "trigger_rule",
}

class _GraphRun:
    """One pass over sibling steps: the top level of a run, the children of a container, an iteration of a loop.

    Every step ends in exactly one final state. `waiting[i]` falls to 0 when the last dependency of step i has ended;
    the step is decided at that moment. Steps that never wait run in place; the others each in a task of their own.
    """

    has_items = False  # whether these are the items of a for_each

    def __init__(self, run: _Run, graph: _Graph, context: dict[str, Any], workflow: Workflow, prefix: str = "",
            order: tuple[int, ...] = (), limit: int | None = None, fail_fast: bool = False,
            chain: tuple[str, ...] = ()) -> None:
        self.run, self.graph, self.context, self.workflow = run, graph, context, workflow
        self.prefix, self.order, self.limit, self.fail_fast, self.chain = prefix, order, limit, fail_fast, chain
        size = len(graph.counts)
        self.waiting = graph.counts.copy()
        self.failed, self.ran = [0] * size, [0] * size  # dependencies that failed, and that ran
        self.unfinished = size
        self.ready: collections.deque[int] = collections.deque(graph.roots)
        self.tasks: set[asyncio.Task[None]] = set()
        self.results: list[StepResult | None] = [None] * size
        self.cancelled = self.draining = self.paused = False
        self.done: asyncio.Future[None] | None = None
        self.crash: BaseException | None = None

    async def execute(self) -> None:
        """Returns when every step has ended; when cancelled, cancels the steps and waits for them first."""
        self.drain()
        try:
            while not self.is_over():
                self.done = self.run.loop.create_future()
                await self.done
            if self.crash is not None:
                self.abort()
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            while self.tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait(list(self.tasks), timeout=_PATIENCE_SECONDS if self.cancelled else None)
                if self.cancelled:
                    self.abort()
            self.close()
        if self.crash is not None:
            raise self.crash
        if self.paused and not self.cancelled:
            raise _Paused

    def is_over(self) -> bool:
        idle = not self.tasks and not self.draining
        return not self.unfinished or self.crash is not None or self.cancelled or (idle and self.paused)

    def abort(self) -> None:
        """Cancels what runs; what has not begun will not."""
        self.cancelled = True
        for task in list(self.tasks):
            task.cancel()
        self.wake()

    def close(self) -> None:
        """Gives every step that never began its final state; in a paused run it has none yet."""
        for position in range(len(self.results)) if self.unfinished else ():
            result = self.results[position]
            if result is None or result.status in ("pending", "running"):  # an exception may have come in between
                result = result or self.begin(position)
                if self.cancelled or not self.paused:
                    result.status = "cancelled"
                    self.finish(position, result)

    def node(self, position: int) -> _Node:
        return self.graph.nodes[position]

    def begin(self, position: int) -> StepResult:
        """The record of a step that is about to be decided."""
        node = self.graph.nodes[position]
        return self.record(position, self.prefix + node.id, node)

    def record(self, position: int, step_id: str, node: _Node) -> StepResult:
        result = self.results[position] = StepResult(step_id, node.type, (*self.order, position))
        self.run.results[step_id] = result
        return result

    def local_context(self, position: int) -> dict[str, Any]:
        return self.context

    def drain(self) -> None:
        """Decides and starts all steps that are ready, in their order, as far as `limit` allows."""
        self.draining = False
        slice_end = time.perf_counter() + _SLICE_SECONDS
        ready = self.ready
        try:
            while ready and not self.cancelled:
                if self.limit is not None and len(self.tasks) >= self.limit:
                    return
                self.start(ready.popleft())
                if ready and time.perf_counter() > slice_end:
                    self.draining = True
                    self.run.loop.call_soon(self.drain)
                    return
        except BaseException as error:  # a defect of the engine must not become a hang
            self.crash = error
        self.wake()

    def start(self, position: int) -> None:
        node, result = self.node(position), self.begin(position)
        if result.step_id in self.run.prior:
            self.restore(position, result)
            return
        reason = None
        if self.graph.counts[position]:
            ran, failed = self.ran[position], self.failed[position]
            reason = _TRIGGER_RULES[node.rule](ran, failed, self.graph.counts[position] - ran - failed)
        try:
            if reason is None and node.condition is not None and node.item_condition == self.has_items:
                reason = None if node.condition.evaluate(self.local_context(position)) else "condition"
        except Exception as error:
            result.fail(error)
            self.finish(position, result)
            return
        if reason is not None:
            result.status, result.reason = "skipped", reason
            self.finish(position, result)
        elif node.inline and (self.has_items or node.for_each is None) and not self.run.overrides(node):
            self.run_inline(position, node, result)
        else:
            if self.run.listening:
                self.run.emit("step_pending", result.step_id, step_type=node.type)
            step = _StepRun(self, node, result, self.local_context(position), position)
            task = step.task = self.run.loop.create_task(step.execute())
            self.tasks.add(task)
            task.add_done_callback(step.ended)

    def restore(self, position: int, result: StepResult) -> None:
        """Takes over what an earlier execution of this run completed."""
        restored = StepResult.from_dict({**self.run.prior[result.step_id], "order": result.order})
        self.results[position] = self.run.results[result.step_id] = restored
        self.finish(position, restored, self.run.restored_children(result.step_id), stored=True)

    def run_inline(self, position: int, node: _Node, result: StepResult) -> None:
        """A step that never waits: no task, no slot, no thread."""
        started, run = time.perf_counter(), self.run
        result.status, result.attempts = "running", 1
        if run.listening:
            run.emit("step_running", result.step_id, step_type=node.type, attempt=1)
        try:
            context = self.local_context(position)
            values = dict(node.constants)
            for key, render in node.values:
                values[key] = render(context)
            result.outputs = {node.output_names[0]: _transform_inline(node, context, values)}
            result.status = "completed"
        except Exception as error:
            result.fail(error)
        result.duration_ms = round((time.perf_counter() - started) * 1000, 3)
        self.finish(position, result)

    def finish(self, position: int, result: StepResult, children: Mapping[str, Any] | None = None,
            stored: bool = False) -> None:
        """Records the final state of a step and releases what waited for it."""
        node, status, run = self.node(position), result.status, self.run
        if status != "completed":
            result.outputs = dict.fromkeys(node.output_names)
            result.tolerated = status == "failed" and node.continue_on_error
        if not self.has_items:  # items have no name of their own in templates; the step gathers their outputs
            if _STEP_TYPES[node.type].container and node.for_each is None and (children is None or node.branches):
                children = {**_null_views(node), **(children or {})}
            self.context["steps"][node.id] = _StepView(result, children or {})
        ran = status == "completed" or result.tolerated
        failed = status in ("failed", "cancelled") and not ran
        if run.listening:
            run.emit_end(result)
        if run.journal is not None and not stored:
            run.journal.step(result)
        self.unfinished -= 1
        for dependent in node.dependents if not self.has_items else ():
            self.ran[dependent] += ran
            self.failed[dependent] += failed
            self.waiting[dependent] -= 1
            if not self.waiting[dependent]:
                self.ready.append(dependent)
        if status == "failed" and failed and self.fail_fast and not self.cancelled:
            self.abort()
        self.wake()

    def wake(self) -> None:
        if self.done is not None and self.is_over() and not self.done.done():
            self.done.set_result(None)

    def firsts(self) -> tuple[Any, ...]:
        """The first output of each step; null unless it completed."""
        return tuple(next(iter(result.outputs.values()), None) if result else None for result in self.results)

    def failures(self) -> list[StepResult]:
        return [result for result in self.results if result and result.status == "failed" and not result.tolerated]

    def raise_failures(self) -> None:
        """An ExecutionError for the container if a child failed for good."""
        failures = self.failures()
        if failures:
            first = failures[0]
            more = f" (and {len(failures) - 1} more of {len(self.results)})" if len(failures) > 1 else ""
            transient = first.exception is not None and _is_transient(first.exception)
            error = ExecutionError(first.failure_text() + more, first.step_id, retryable=transient)
            raise error from first.exception

class _ItemRuns(_GraphRun):
    """The items of a for_each: the same step once per item, under the ids STEP.INDEX."""

    has_items = True

    def __init__(self, parent: _StepRun, items: list[tuple[Any, Any]]) -> None:
        graph = _Graph()
        graph.counts, graph.roots = [0] * len(items), list(range(len(items)))
        outer = parent.siblings
        super().__init__(outer.run, graph, parent.context, outer.workflow, f"{parent.id}.", parent.result.order,
            parent.node.limit, outer.fail_fast and not parent.node.continue_on_error, outer.chain)
        self.step, self.items = parent.node, items

    def node(self, position: int) -> _Node:
        return self.step

    def begin(self, position: int) -> StepResult:
        return self.record(position, f"{self.prefix}{position}", self.step)

    def local_context(self, position: int) -> dict[str, Any]:
        key, item = self.items[position]
        return {**self.context, "item": item, "index": position, "key": key}

    def gathered(self) -> tuple[list[Any], ...]:
        """Each output of the step as the list of its items' outputs."""
        names = self.step.output_names
        return tuple([result.outputs.get(name) if result else None for result in self.results] for name in names)

class _StepRun:
    """One step being run outside the scheduler's own thread of control: its attempts, its calls, its children."""

    __slots__ = (
        "announced", "began", "candidate", "child_views", "context", "expired", "node", "position", "remaining",
        "result", "run", "settled", "siblings", "task",
    )

    def __init__(self, siblings: _GraphRun, node: _Node, result: StepResult, context: dict[str, Any],
            position: int) -> None:
        self.siblings, self.run, self.node, self.result = siblings, siblings.run, node, result
        self.context, self.position, self.expired, self.settled = context, position, False, False
        self.announced = 0  # the latest attempt that an event told of
        self.began: float | None = None  # when it first had a slot
        self.remaining: float | None = None  # seconds that are left of the attempt
        self.candidate: Mapping[str, Any] = {}  # the fallback that is being tried
        self.child_views: Mapping[str, Any] | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        return self.result.step_id

    async def execute(self) -> None:
        """Runs the step to its final state. Never raises: whatever happens becomes part of the result."""
        node, result = self.node, self.result
        result.status = "running"
        try:
            if self.run.journal is not None:
                await self.run.journal.barrier()  # what it builds on is durable before it begins
            if node.for_each is not None and not self.siblings.has_items:
                outputs: tuple[Any, ...] = await self.each()
            else:
                outputs = await self.attempts()
            result.outputs = dict(zip(node.output_names, outputs))
            result.status = "completed"
        except asyncio.CancelledError as error:
            if not self.siblings.cancelled:
                await asyncio.sleep(0)  # if it is the loop that cancels all its tasks, the run learns of it now
            if self.siblings.cancelled:
                result.status = "cancelled"
            else:
                result.fail(_harmless(error))  # a function's own
        except _Paused:
            result.status, self.siblings.paused = "pending", True
        except KeyboardInterrupt:  # of the process, wherever it came up
            raise
        except BaseException as error:
            result.fail(_harmless(error))
        if self.began is not None:
            result.duration_ms = round((time.perf_counter() - self.began) * 1000, 3)
        self.settle()

    def settle(self) -> None:
        """Records the final state; a paused step has none."""
        if not self.settled and self.result.status != "pending":
            self.settled = True
            try:
                self.siblings.finish(self.position, self.result, self.child_views)
            except BaseException as error:
                self.siblings.crash = error

    def ended(self, task: asyncio.Task[None]) -> None:
        """The task's last act, also when it was cancelled before it could begin."""
        siblings = self.siblings
        siblings.tasks.discard(task)
        if not task.cancelled():
            task.exception()  # it ends the loop by itself; nobody need hear of it twice
        if self.result.status == "running" or (self.result.status == "pending" and not siblings.paused):
            self.result.status = "cancelled"
        self.settle()
        if siblings.ready and not siblings.draining:
            siblings.drain()
        siblings.wake()

    # ---- attempts, deadlines, slots

    async def attempts(self) -> tuple[Any, ...]:
        """Tries until it succeeds, the error is final or the attempts are spent; then the fallbacks, in their order."""
        node, run = self.node, self.run
        candidates: list[dict[str, Any]] = [{}, *_as_list(node.constants.get("fallback"))]
        for number, self.candidate in enumerate(candidates, 1):
            failures = 0
            while True:
                try:
                    return await self.attempt()
                except Exception as error:
                    failures += 1
                    delay = self.retry_delay(error, node.retry, failures)
                    if delay is None and (number == len(candidates) or not isinstance(error, ProviderError)):
                        raise
                    summary = _error_summary(error) if run.listening else {}
                if delay is None:
                    if run.listening:
                        run.emit("step_fallback", self.id, error=summary, **candidates[number])
                    break
                if run.listening:
                    backoff, attempt = round(delay * 1000), self.result.attempts
                    run.emit("step_retry", self.id, attempt=attempt, backoff_ms=backoff, error=summary)
                await asyncio.sleep(delay)
        raise AssertionError

    def retry_delay(self, error: Exception, policy: RetryPolicy, failures: int) -> float | None:
        """Seconds until the next attempt, or None. A container is retried for what its child raised."""
        while type(error) is ExecutionError and isinstance(error.__cause__, Exception):
            error = error.__cause__
        known = isinstance(error, OrchestratorError) or hasattr(error, "retryable")
        if not (_is_transient(error) or (self.node.retry_given and not known)) or failures >= policy.max_attempts:
            return None
        hint = getattr(error, "retry_after", None)
        delay = policy.delay_seconds(failures, hint if _is_number(hint) else None)
        if delay is None and isinstance(error, ProviderError):
            error._too_long_a_wait(policy.max_delay_seconds)
        return delay

    async def attempt(self) -> tuple[Any, ...]:
        """One attempt within its deadline, which runs while it has a slot (a container: while its children run)."""
        node = self.node
        self.result.attempts += 1
        self.expired = False
        if self.result.attempts > 1 and _STEP_TYPES[node.type].container:
            self.run.forget_children(self.id)  # this attempt may not come as far as the last one
        self.remaining = timeout = node.timeout or (_CALL_SECONDS if node.type in _PROVIDER_TYPES else None)
        values = self.render(_STEP_TYPES[node.type])
        try:
            if not _STEP_TYPES[node.type].container:
                return await _HANDLERS[node.type](self, values)
            with _Clock(self) as clock:
                clock.start(time.perf_counter())
                return await _HANDLERS[node.type](self, values)
        except asyncio.CancelledError:
            if not self.expired or self.siblings.cancelled:
                raise
            while self.task is not None and hasattr(self.task, "cancelling") and self.task.cancelling():
                self.task.uncancel()  # type: ignore[attr-defined]
            if node.type in _PROVIDER_TYPES:
                provider = str(values.get("provider") or values.get("database"))
                raise ProviderTimeoutError(f"no answer within {timeout:g} s", provider=provider) from None
            raise ExecutionError(f"not done within {timeout:g} s", self.id, retryable=True) from None

    def render(self, row: _StepType) -> dict[str, Any]:
        """The step's keys with their templates rendered, checked as the compiler checked the constant ones."""
        values = dict(self.node.constants)
        for key, render in self.node.values:
            value, check = render(self.context), row.keys.get(key)
            if check is _text or (check is _texts and value is not None and not isinstance(value, list)):
                value = _to_text(value)  # where text is wanted, one {{expression}} alone gives text too
            elif key == "messages":
                value = [_with_text(message) for message in value] if isinstance(value, list) else value
            values[key] = value
            if check is not None and value is not None and (fault := check(value)):
                raise ExecutionError(f"{key} {fault}", self.id)
        values.update(self.candidate)
        return values

    async def working(self, direct: bool, function: Callable[..., Any], *arguments: Any,
            call: tuple[Any, ...] | None = None, in_slot: bool = False) -> Any:
        """What a function gives, awaited if need be: in a slot (the caller's, if `in_slot`) and on the attempt's clock,
        and in a worker thread unless it is `direct`, which means that it never blocks. `call`: if it is the call of a
        provider, its name, the request, its gate and the permit; _NotYet if that was withdrawn meanwhile."""
        clock, slots = _Clock(self, call), None if in_slot else self.run.slots
        gate, permit = call[2:] if call is not None else (None, 0)
        if not direct:
            with clock:
                if self.run.listening and slots:  # what ends may have passed its slot on before: is to be heard first
                    clock.context = contextvars.copy_context()
                return await _Job(self.run.pool, function, arguments, slots, clock.start, gate, permit).outcome()
        if slots is not None:
            await slots.enter()
        try:
            if gate is not None and gate.is_stale(permit):
                raise _NotYet
            with clock:
                clock.start(time.perf_counter())
                outcome = function(*arguments)
                return await outcome if _is_awaitable(outcome) else outcome
        finally:
            if slots is not None:
                slots.leave()

    async def threaded(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A blocking call in a worker thread, apart from slots and clock."""
        return await _Job(self.run.pool, function, arguments).outcome()

    async def custom(self, function: Callable[..., Any], bound: Callable[[], Any]) -> Any:
        """A function of the user's: awaited if it is asynchronous, in a worker thread otherwise."""
        value = await self.working(_is_async(function), bound)
        return _json_value(value, getattr(function, "__name__", "the function"))

    # ---- calls of providers

    def streams(self, values: Mapping[str, Any]) -> bool:
        """Whether the answer of an llm step is streamed: as it says, otherwise as the run does."""
        return self.run.streaming if values.get("stream") is None else bool(values["stream"])

    def on_text(self, attempt: int, piece: str) -> None:
        """Shows a piece of a streamed answer; called from any thread."""
        run, show = self.run, functools.partial(self.show, attempt, piece)
        if threading.get_ident() == run.thread:
            show()
        elif run.listening:  # after the news that the call began, which are told in the same two steps
            run.pool.tell(None, run.loop.call_soon, show)

    def show(self, attempt: int, piece: str) -> None:
        if self.run.listening and not self.settled and attempt == self.result.attempts:
            self.run.emit("text", self.id, text=piece)

    async def complete(self, name: str, request: CompletionRequest, cached: bool = True) -> CompletionResponse:
        """One call of a provider, counted and shown in events."""
        provider = self.run.provider(name, self.siblings.workflow)
        answer = await self.invoke(name, provider, getattr(provider, "complete", provider), request, cached)
        if isinstance(answer, str):
            answer = CompletionResponse(text=answer, model=request.model)
        if not isinstance(answer, CompletionResponse):
            raise BadResponseError(f"returned {type(answer).__name__}, not a CompletionResponse or text", provider=name)
        answer.model = answer.model or request.model
        if not isinstance(answer.text, str) or not isinstance(answer.model, str):
            kinds = f"{type(answer.text).__name__} and {type(answer.model).__name__}"
            raise BadResponseError(f"returned a CompletionResponse whose text and model are {kinds}", provider=name)
        return answer

    async def forget(self, name: str, request: CompletionRequest, asked: list[Any]) -> None:
        """Takes answers that were of no use out of the cache, so that the next run asks again."""
        forget: Any = getattr(self.run.executor.cache, "forget", None)
        provider = self.run.provider(name, self.siblings.workflow)
        for messages in asked if forget is not None else ():
            request.messages = messages
            await self.threaded(forget, name, provider, request)

    async def embed(self, settings: Mapping[str, Any], texts: list[str]) -> tuple[list[Any], str, int]:
        """(vectors, model, tokens) of texts, in as many calls as the provider's limit asks for, in order."""
        name = settings["provider"]
        provider = self.run.provider(name, self.siblings.workflow)
        if not hasattr(provider, "embed"):
            raise ExecutionError(f"the provider {name!r} makes no embeddings", self.id)
        most = getattr(provider, "max_batch", 2048)
        size = min(settings.get("batch_size") or most, most)
        names = ("dimensions", "input_type", "params")
        options = {key: settings[key] for key in names if settings.get(key) is not None}
        vectors, model, tokens = [], str(settings["model"]), 0
        for start in range(0, len(texts), size):
            request = EmbeddingRequest(model=settings["model"], input=texts[start : start + size], **options)
            answer = await self.invoke(name, provider, provider.embed, request, settings.get("cache") is not False)
            if not isinstance(answer, EmbeddingResponse) or len(answer.vectors) != len(request.input):
                raise BadResponseError(f"answered {len(request.input)} texts with something else", provider=name)
            vectors += answer.vectors
            model, tokens = answer.model, tokens + (answer.tokens or 0)
        return vectors, model, tokens

    async def invoke(self, name: str, provider: Any, call: Any, request: Any, cached: bool) -> Any:
        """One call of a provider: from the cassette or the cache, or past budget and gate, in a slot, counted."""
        run = self.run
        keepers = run.executor.keepers(cached)
        for keeper in keepers:
            if getattr(keeper, "replays", False):
                self.add_usage({"calls": 1})
            if (answer := await self.threaded(keeper.recall, name, provider, request)) is not None:
                if keeper is run.executor.cassette:  # the run is to be as it was
                    self.count(request, answer)
                return answer
        gate = run.executor.gate(name, provider, self.siblings.workflow)
        tokens = (0, 0) if gate.is_open and not run.budget.limits else _estimated_tokens(request)
        with run.budget.reserved(request.model, tokens) if run.budget.limits else _UNLIMITED as reserve:
            try:
                answer = await self.gated(gate, sum(tokens), reserve, name, provider, call, request)
            except ProviderError as error:
                answer = error
            if run.journal is not None:
                run.journal.call(self.id, name, request, answer, run.executor.audit_texts)
            for keeper in keepers:
                await self.threaded(keeper.keep, name, provider, request, answer)
            if isinstance(answer, ProviderError):
                raise answer
            self.count(request, answer)
        return answer

    async def gated(self, gate: _Gate, tokens: int, reserve: Any, name: str, provider: Any, call: Any,
            request: Any) -> Any:
        """A call in a slot, past the provider's gate: the wait there holds no slot."""
        state, paced = gate.breaker and gate.breaker.state, not gate.is_open or reserve is not None
        while True:
            permit, answer = await self.let_in(gate, name, tokens, paced), None
            try:
                if paced and gate.is_stale(permit):
                    raise _NotYet
                if reserve is not None:
                    reserve()
                about = (name, request, gate, permit)
                answer = await self.working(gate.is_direct(provider, call), call, request, call=about, in_slot=paced)
                return answer
            except _NotYet as error:
                answer = error
            except BaseException as error:
                answer = error
                raise
            finally:
                if paced:
                    self.run.slots.leave()
                gate.leave(tokens, answer, permit, self.expired)
                if gate.breaker is not None and gate.breaker.state != state:
                    self.run.emit("circuit", self.id, provider=name, state=gate.breaker.state)

    async def let_in(self, gate: _Gate, name: str, tokens: int, paced: bool) -> int:
        """Waits for a gate, whose permit it returns. Where starts are counted or paced, it waits for a slot too, and
        one call at a time is in between: those behind are not to start all at once when slots come free."""
        slots, patience = self.run.slots, self.node.retry.max_delay_seconds
        if not paced:
            return await gate.enter(name, tokens, patience)
        entrance = slots.entrances.setdefault(gate, _Places(1))
        await entrance.enter()
        try:
            permit = await gate.enter(name, tokens, patience)
            try:
                await slots.enter()
            except BaseException as error:
                gate.leave(tokens, error, permit, self.expired)
                raise
            return permit
        finally:
            entrance.leave()

    def count(self, request: Any, answer: Any) -> None:
        """Adds what an answer says that it used, and what that cost."""
        inputs, outputs = _used_tokens(answer)
        total = _tokens(answer, "total_tokens") or inputs + outputs
        used = {"input_tokens": inputs, "output_tokens": outputs, "total_tokens": total}
        cost = self.run.budget.cost(request.model, inputs, outputs)
        self.add_usage(used if cost is None else {**used, "cost": cost})

    def add_usage(self, amounts: Mapping[str, Any]) -> None:
        usage = self.result.usage = self.result.usage or dict.fromkeys(_USAGE, 0)
        for name, amount in amounts.items():
            usage[name] = usage.get(name, 0) + amount
        self.run.count(amounts)

    # ---- children

    async def each(self) -> tuple[Any, ...]:
        """The step once per item; a failed item fails it after the others have ended."""
        assert self.node.for_each is not None
        source = self.node.for_each(self.context)
        if isinstance(source, Mapping):
            items = list(source.items())
        elif isinstance(source, (list, tuple)):
            items = list(enumerate(source))
        else:
            raise ExecutionError(f"for_each needs a list or a map, not {_type_name(source)}", self.id)
        runs = _ItemRuns(self, items)
        with _Clock(self) as clock:
            clock.start(time.perf_counter())
            await runs.execute()
        if not self.node.continue_on_error:
            runs.raise_failures()
        return runs.gathered()

    async def run_children(self, graph: _Graph, local: Mapping[str, Any] | None = None, segment: str = "",
            order: int = 0, limit: int | None = None) -> _GraphRun:
        """The children of a container, in a scope in front of the container's own; an error if one fails for good."""
        steps: ChainMap[str, Any] = ChainMap({}, self.context["steps"])  # the children's, in front of those around
        outputs = _OutputNames(steps, graph, self.context["outputs"])
        context = {**self.context, **(local or {}), "steps": steps, "outputs": outputs}
        prefix = f"{self.id}.{segment}." if segment else f"{self.id}."
        outer = self.siblings
        children = _GraphRun(self.run, graph, context, outer.workflow, prefix, (*self.result.order, order), limit,
            outer.fail_fast, outer.chain)
        await children.execute()
        self.child_views = steps
        children.raise_failures()
        return children

    def skip_children(self, nodes: list[_Node], order: int, reason: str) -> None:
        """Records children that a container passed over."""
        for node in nodes:
            result = StepResult(f"{self.id}.{node.id}", node.type, (*self.result.order, order, node.position))
            result.status, result.reason, result.outputs = "skipped", reason, dict.fromkeys(node.output_names)
            self.run.results[result.step_id] = result
            if self.run.listening:
                self.run.emit_end(result)
            if self.run.journal is not None:
                self.run.journal.step(result)

    async def run_workflow(self, values: dict[str, Any]) -> tuple[Any, ...]:
        """Another workflow's steps as children of this one, with inputs, partials and providers of its own."""
        called = self.node.workflow or self.run.found_workflow(self.siblings.workflow, values["workflow"])
        chain = (*self.siblings.chain, str(called.name))
        if len(chain) > _MAX_WORKFLOW_DEPTH:
            shown = " -> ".join(chain)
            raise ExecutionError(f"workflows call each other more than {_MAX_WORKFLOW_DEPTH} deep: {shown}")
        plan = called._plan()
        context = _root_context(self.run, called, plan, _checked_inputs(called, values.get("inputs") or {}))
        children = _GraphRun(self.run, plan.graph, context, called, f"{self.id}.", (*self.result.order, 0),
            called.max_concurrency, called.fail_fast or self.siblings.fail_fast, chain)
        timeout = _seconds(called.timeout_seconds, "s") or 3600
        timer = self.run.loop.call_later(timeout, children.abort)
        try:
            await children.execute()
        finally:
            timer.cancel()
        self.child_views = context["steps"]
        children.raise_failures()
        if children.cancelled:
            raise ExecutionError(f"the workflow {called.name!r} took longer than its {timeout:g} s", retryable=True)
        if plan.outputs:
            return tuple(render(context) for _, render in plan.outputs)
        return children.firsts()

class _Clock:
    """Runs while a step works, from `start` on: it expires the attempt when its time is up, counts the call of a
    provider, and says what is running."""

    __slots__ = ("call", "context", "started", "step", "timer")

    def __init__(self, step: _StepRun, call: tuple[str, Any] | None = None) -> None:
        self.step, self.call, self.timer = step, call, None  # type: _StepRun, Any, asyncio.TimerHandle | None
        self.context: contextvars.Context | None = None  # if given, events come a little later, in this context

    def start(self, now: float) -> None:
        """Begins, at a moment of time.perf_counter(), in the loop's thread."""
        step, self.started = self.step, now
        if step.remaining is not None:
            self.timer = step.run.loop.call_later(step.remaining, self.expire)
        if step.began is None:
            step.began = now
        if self.call is not None:
            step.add_usage({"calls": 1})
        if step.run.listening and self.context is None:
            self.announce()
        elif step.run.listening:
            step.run.loop.call_soon(self.announce, context=self.context)

    def announce(self) -> None:
        step, attempt = self.step, self.step.result.attempts
        if step.settled:
            return
        if step.announced < attempt or not attempt:  # once an attempt
            step.announced = attempt
            step.run.emit("step_running", step.id, step_type=step.node.type, attempt=attempt)
        if self.call is not None:
            name, request = self.call[:2]
            step.run.emit("provider_call", step.id, provider=name, model=request.model, attempt=attempt)

    def __enter__(self) -> _Clock:
        return self

    def __exit__(self, *_: object) -> None:
        if self.timer is not None and self.step.remaining is not None:
            self.timer.cancel()
            self.step.remaining = max(0.0, self.step.remaining - (time.perf_counter() - self.started))

    def expire(self) -> None:
        self.step.expired = True
        if self.step.task is not None:
            self.step.task.cancel()
            self.timer = self.step.run.loop.call_later(_PATIENCE_SECONDS, self.expire)

class CircuitOpenError(ProviderError):
    """A provider failed so often that its circuit breaker lets nobody call it for a while; no call was made."""

class _Gate:
    """What stands before a provider's calls, for all who share the provider: limits, pauses, a circuit breaker."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.limit = _RateLimit.from_dict(settings.get("rate_limit") or {})
        breaker = settings.get("circuit_breaker")
        self.breaker = None if breaker is None else _CircuitBreaker.from_dict(breaker)
        self.is_open = not (settings.get("rate_limit") or breaker is not None)  # nothing but a pause holds calls up
        self.known: tuple[Any, bool] = None, False  # the function that was called last, and whether it is asynchronous

    def is_direct(self, provider: Any, call: Any) -> bool:
        """Whether a provider's function never blocks, so that it needs no thread."""
        function, known = getattr(call, "__func__", call), self.known
        if function is not known[0]:
            known = self.known = function, _is_async(call)
        return known[1] or getattr(provider, "instant", False)

    async def enter(self, name: str, tokens: int, patience_seconds: float) -> int:
        """Waits for a call's turn; returns what `leave` is told. Raises CircuitOpenError, and RateLimitError for a
        pause beyond patience."""
        pause = self.limit.blocked_seconds()
        if pause > patience_seconds:
            raise RateLimitError("asked all its callers to wait", provider=name, status=429, retry_after=pause)
        permit = 1 if self.breaker is None else self.breaker.allow()
        if self.breaker is not None and not permit:
            wait = self.breaker.retry_after_seconds
            reason = f"its circuit is open: it failed too often; the next try is in {wait:.1f} s"
            raise CircuitOpenError(reason, provider=name, retry_after=wait)
        try:
            if pause or not self.is_open:
                await self.limit.start(tokens)
                if self.is_open:
                    self.limit.leave()
        except BaseException:
            if self.breaker is not None:
                self.breaker.record(None, permit)
            raise
        return permit

    def is_stale(self, permit: int) -> bool:
        """Whether what was let through may not be called now: there is a pause, or the circuit breaker has changed."""
        paused = self.limit.resumes > 0 and self.limit.blocked_seconds() > 0
        return paused or (self.breaker is not None and self.breaker.changes != permit)

    def hear(self, outcome: Any) -> bool:
        """Whether the provider asked for slower calls; if it said for how long, all who share it wait."""
        limited = isinstance(outcome, RateLimitError)
        if limited and outcome.retry_after:
            self.limit.pause(outcome.retry_after)
        return limited

    def leave(self, tokens: int, outcome: Any, permit: int, expired: bool = False) -> None:
        """Tells how the call ended: its answer, or its error."""
        unmade = isinstance(outcome, (_NotYet, BudgetExceededError))
        if not self.is_open:
            used = 0 if unmade else tokens if isinstance(outcome, BaseException) else sum(_used_tokens(outcome))
            self.limit.leave()
            self.limit.settle(tokens, used)
        limited = self.hear(outcome)
        if self.breaker is not None:
            failed = (isinstance(outcome, Exception) and not unmade) or expired
            refused = isinstance(outcome, ProviderError) and (limited or not outcome.retryable)  # it does work
            unknown = isinstance(outcome, BaseException) and not failed
            self.breaker.record(None if unknown else not failed or refused, permit)

def _used_tokens(answer: Any) -> tuple[int, int]:
    """(input, output) tokens that an answer says it used."""
    return _tokens(answer, "input_tokens") or _tokens(answer, "tokens"), _tokens(answer, "output_tokens")

def _tokens(answer: Any, name: str) -> int:
    """A count of an answer; 0 if it has none."""
    count = getattr(answer, name, None)
    return count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else 0

class BudgetExceededError(ExecutionError):
    """The next call would exceed the workflow's `budget`; it was not made."""

_UNLIMITED: Any = contextlib.nullcontext()

class _Budget:
    """A run's `budget` and `pricing`: what is spent, what the calls in flight may still spend, what one more would."""

    def __init__(self, workflow: Workflow, usage: Mapping[str, Any]) -> None:
        self.limits: Mapping[str, Any] = workflow.budget or {}
        self.pricing: Mapping[str, Any] = workflow.pricing or {}
        self.usage = usage
        self.pending = {"total_tokens": 0, "cost": 0.0}
        self.error: BudgetExceededError | None = None

    def cost(self, model: str, input_tokens: int, output_tokens: int) -> float | None:
        """What tokens cost by the pricing table, whose prices are for a million tokens; None for an unknown model."""
        prices = self.pricing.get(model)
        if prices is None:
            return None
        return (input_tokens * (prices.get("input") or 0) + output_tokens * (prices.get("output") or 0)) / 1e6

    @contextlib.contextmanager
    def reserved(self, model: str, tokens: tuple[int, int]) -> Iterator[Callable[[], None]]:
        """Gives a function to call at the moment before a call starts, which sets (input, output) tokens aside until
        what the call used is counted, or raises BudgetExceededError if they are too many."""
        amounts = {"total_tokens": sum(tokens), "cost": self.cost(model, *tokens) or 0.0}
        taken: dict[str, float] = {}

        def take() -> None:
            for limit, name in (("max_calls", "calls"), ("max_tokens", "total_tokens"), ("max_cost", "cost")):
                if self.limits.get(limit) is not None:
                    planned, more = self.usage.get(name, 0) + self.pending.get(name, 0), amounts.get(name, 1)
                    if planned + more > self.limits[limit] or (name != "calls" and planned >= self.limits[limit]):
                        reason = f"the budget's {limit} is {self.limits[limit]:g}, {planned:g} are spent or in flight"
                        self.error = BudgetExceededError(f"{reason}, and the next call may need {more:g} more")
                        raise self.error
            taken.update(amounts)
            for name, amount in taken.items():
                self.pending[name] += amount

        try:
            yield take
        finally:
            for name, amount in taken.items():
                self.pending[name] -= amount

def _estimated_tokens(request: Any) -> tuple[int, int]:
    """(input, output) tokens that a call may use: a quarter of its characters, and its max_tokens."""
    if isinstance(request, EmbeddingRequest):
        return sum(map(len, request.input)) // 4, 0
    contents = (message.get("content") for message in request.messages)
    characters = sum(len(content if isinstance(content, str) else _to_json(content)) for content in contents)
    return (characters + len(request.system or "")) // 4, request.max_tokens or 0

def _is_async(function: Any) -> bool:
    return any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None))))  # noqa: B004

def _json_value(value: Any, origin: str, depth: int = 0) -> Any:
    """A value that user code returned, as plain JSON; ExecutionError if it is none."""
    if isinstance(value, float) and value - value != 0:
        raise ExecutionError(f"{origin} returned {value}, which is no number in JSON")
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if depth < 100 and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _json_value(item, origin, depth + 1) for key, item in value.items()}
    if depth < 100 and isinstance(value, (list, tuple)):
        return [_json_value(item, origin, depth + 1) for item in value]
    raise ExecutionError(f"{origin} returned {type(value).__name__}, which is no JSON value")

def _root_context(run: _Run, workflow: Workflow, plan: _Plan, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The names that templates see at the top level."""
    steps: dict[str, Any] = {}
    named = {"name": workflow.name, "version": workflow.version, "metadata": workflow.metadata}
    return {**inputs, "inputs": inputs, "input": inputs, "steps": steps, "outputs": _OutputNames(steps, plan.graph, {}),
        "workflow": named, "run": {"id": run.run_id}}

def _checked_inputs(workflow: Workflow, given: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs with their defaults filled in; ValidationError for missing, unknown or wrong ones."""
    if not isinstance(given, Mapping):
        raise ValidationError(f"inputs must be a map, not {_shown(given)}")
    declared = workflow.inputs
    if not isinstance(declared, Mapping):
        return dict(given)
    problems: list[Problem] = []
    inputs: dict[str, Any] = {}
    for name in given:
        if name not in declared:
            known = _suggestion(name, declared) or f"; there are {', '.join(map(str, declared))}"
            problems.append(Problem(f"inputs: unknown input {name!r}{known}", ("inputs",)))
    for name, entry in declared.items():
        entry = entry or {}
        value = given[name] if name in given else entry.get("default")
        fault = _input_fault(value, entry) if value is not None else None
        if fault:
            problems.append(Problem(f"inputs: {name} {fault}", ("inputs", name)))
        elif value is None and entry.get("required"):
            described = f" ({entry['description']})" if entry.get("description") else ""
            problems.append(Problem(f"inputs: the required input {name!r} is missing{described}", ("inputs", name)))
        inputs[name] = value
    if problems:
        raise ValidationError(workflow._located(problems))
    return inputs

class _Run:
    """One run of an executor: its slots, threads, results and clock."""

    def __init__(self, executor: WorkflowExecutor, loop: asyncio.AbstractEventLoop,
            listener: Callable[[dict[str, Any]], None] | None = None, recorded: Mapping[str, Any] | None = None,
            decisions: Mapping[str, tuple[bool, Mapping[str, Any]]] | None = None) -> None:
        self.executor, self.loop, self.thread = executor, loop, threading.get_ident()
        self.run_id, self.started = recorded["run_id"] if recorded else os.urandom(8).hex(), time.perf_counter()
        states = dict(recorded["steps"]) if recorded else {}
        self.prior = {step_id: state for step_id, state in states.items() if state["status"] == "completed"}
        self.prior_parts: dict[str, dict[str, None]] = {}  # id -> what follows it in the ids of the states
        for step_id in sorted(states, key=lambda step_id: states[step_id].get("order") or []):
            while "." in step_id:
                step_id, part = step_id.rsplit(".", 1)
                self.prior_parts.setdefault(step_id, {})[part] = None
        self.states, self.decisions, self.is_new = states, decisions or {}, recorded is None
        self.journal = executor.store.journal(self.run_id, loop) if executor.store is not None else None
        self.result = RunResult(self.run_id, str(executor.workflow.name))
        self.usage = self.result.usage
        self.results: dict[str, StepResult] = {}
        self.slots, self.pool = executor._shared or (_Places(executor.max_concurrency), _WorkerPool(loop))
        for state in self.prior.values():  # a budget belongs to the run, whoever goes on with it
            self.count(state.get("usage") or {})
        self.budget = _Budget(executor.workflow, self.usage)
        self.stopped: str | None = None  # cancelled or timed_out, once it is
        self.checked: list[Workflow] = []  # sub-workflows that were found while running
        self.main: asyncio.Task[None] | None = None
        self.logger = _enabled_logger()
        self.listeners = [one for one in (executor.on_event, listener) if one is not None]
        self.listening = bool(self.listeners) or self.logger is not None
        self.streaming = listener is not None or executor.streaming
        self.provider, self.vector_store, self.http = executor._provider, executor._vector_store, executor._http

    async def execute(self, inputs: Mapping[str, Any], cancelled: bool) -> RunResult:
        """Runs to the end. When the calling task is cancelled, the partial result is complete before that goes on."""
        workflow, plan = self.executor.workflow, self.executor.workflow._plan()
        if self.journal is not None and self.is_new:
            self.journal.begin(workflow, self.executor)
        context = _root_context(self, workflow, plan, inputs)
        chain = (str(workflow.name),)
        top = _GraphRun(self, plan.graph, context, workflow, fail_fast=bool(workflow.fail_fast), chain=chain)
        timer = self.loop.call_later(_seconds(workflow.timeout_seconds, "s") or 3600, self.stop, "timed_out")
        if self.listening:
            self.emit("run_started", workflow=workflow.name)
        self.main = self.loop.create_task(top.execute())
        interrupted = False
        if cancelled:
            self.stop("cancelled")
        while not self.main.done():
            try:
                await asyncio.wait([self.main])
            except asyncio.CancelledError:
                interrupted = True
                self.stop("cancelled")
        timer.cancel()
        if self.executor._shared is None:
            self.pool.close()
        if self.main.cancelled():  # perhaps before its first step
            top.abort()
            top.close()
        error = None if self.main.cancelled() else self.main.exception()
        if error is not None and not isinstance(error, _Paused):
            raise error
        self.finish(top, plan, context, error is not None)
        if interrupted:
            raise asyncio.CancelledError
        return self.result

    def stop(self, status: str) -> None:
        """Ends the run early; called in the loop's own thread."""
        if self.stopped is None and self.main is not None and not self.main.done():
            self.stopped = status
            self.main.cancel()

    def finish(self, top: _GraphRun, plan: _Plan, context: dict[str, Any], paused: bool) -> None:
        """The run's own status, outputs and error."""
        result = self.result
        result.steps = {step.step_id: step for step in sorted(self.results.values(), key=lambda step: step.order)}
        failures = top.failures()
        if self.stopped == "timed_out":
            seconds = _seconds(self.executor.workflow.timeout_seconds, "s")
            result.exception = RunTimeoutError(f"the run took longer than its {seconds:g} s")
        elif self.stopped == "cancelled":
            result.exception = ExecutionError("the run was cancelled")
        elif failures:
            first = failures[0]
            error = ExecutionError(first.failure_text(), first.step_id)
            error.__cause__ = first.exception
            result.exception, result.error = error, {**(first.error or {}), "step_id": first.step_id}
        elif self.budget.error is not None:  # also where continue_on_error hides it: the run is not complete
            result.exception = self.budget.error
        result.status = self.stopped or ("failed" if result.exception else "paused" if paused else "completed")
        for name, render in plan.outputs if result.status != "paused" else ():
            try:
                result.outputs[name] = render(context)
            except TemplateError as error:
                result.outputs[name] = None
                if result.status == "completed":  # otherwise the steps it reads may never have run
                    result.status, result.exception = "failed", ExecutionError(f"outputs: {name}: {error}")
                    result.error = {**_error_summary(error), "message": f"outputs: {name}: {error}"}
        if result.error is None and result.exception is not None:
            result.error = _error_summary(result.exception)
        result.duration_ms = round((time.perf_counter() - self.started) * 1000, 3)
        if self.journal is not None:
            self.journal.end(result)
        if self.listening:
            self.emit("run_finished", status=result.status, duration_ms=result.duration_ms, usage=result.usage)

    def overrides(self, node: _Node) -> bool:
        """Whether a built-in transform was replaced by one of the executor's."""
        return bool(self.executor.transforms) and node.constants["function"] in self.executor.transforms

    def found_workflow(self, caller: Workflow, name: str) -> Workflow:
        """A sub-workflow whose name is known only now, checked as the others were before the run."""
        called = _sub_workflow(caller, name)
        if called not in self.checked:
            for workflow in self.executor._workflows(called):
                workflow.validate()
                self.executor._check_needs(workflow)
            self.checked.append(called)
        return called

    def forget_children(self, step_id: str) -> None:
        """Drops what is known and stored of the steps in a container."""
        prefix, gone = f"{step_id}.", set()  # type: str, set[str]
        for known in (self.results, self.prior, self.states):
            for inner in [one for one in known if one.startswith(prefix)]:
                del known[inner]
                gone.add(inner)
        for parent in [one for one in self.prior_parts if f"{one}.".startswith(prefix)]:
            del self.prior_parts[parent]
        if self.journal is not None and gone:
            self.journal.forget(sorted(gone))

    def restored_children(self, step_id: str) -> dict[str, Any] | None:
        """Takes over the children of a restored container; what templates see of them, of a loop's last iteration."""
        views: dict[str, Any] = {}
        for part in self.prior_parts.get(step_id, ()):
            child_id = f"{step_id}.{part}"
            inner = self.restored_children(child_id)
            if child_id in self.states:
                self.results[child_id] = result = StepResult.from_dict(self.states[child_id])
                views[part] = _StepView(result, inner or {})
            else:
                views = inner or {}
        return views or None

    def count(self, amounts: Mapping[str, Any]) -> None:
        for name, amount in amounts.items():
            self.usage[name] = self.usage.get(name, 0) + amount

    def emit(self, kind: str, step_id: str | None = None, **details: Any) -> None:
        """One event to the listeners and to the log."""
        event = {"type": kind, "run_id": self.run_id, "time": time.time()}
        if step_id is not None:
            event["step_id"] = step_id
        event.update(details)
        for listener in self.listeners:
            try:
                listener(event)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a listener's fault is not the run's
                _logger().warning("on_event raised %r", error)
        if self.logger is not None:
            _log_event(self.logger, event)

    def emit_end(self, result: StepResult) -> None:
        names = ("duration_ms", "attempts", "usage", "error", "reason")
        shown = {name: value for name in names if (value := getattr(result, name))}
        self.emit(f"step_{result.status}", result.step_id, step_type=result.type, **shown)

_LATER: Any = object()  # in place of an executor's inputs, when each run of a batch brings its own

class WorkflowExecutor:
    """Runs one workflow with one set of inputs; it may be run again, and many may run at once.

    `providers` maps names to providers (anything with `complete(request)`, or a function from request to text); names
    that are not there are built from the workflow's `providers` and from the environment. `actions`, `transforms`
    and `tools` map names to functions. `max_concurrency` bounds the calls in flight (the workflow's, otherwise 4).
    `on_event` is called with each event, a dict with at least type, run_id and time. `offline` answers every llm and
    embed step from EchoProvider. Raises ValidationError or DagError for what is wrong with the workflow or the inputs.
    """

    def __init__(self, workflow: Workflow, inputs: Mapping[str, Any] | None = None,
            providers: Mapping[str, Any] | None = None, *, max_concurrency: int | None = None,
            actions: Mapping[str, Callable[..., Any]] | None = None,
            transforms: Mapping[str, Callable[..., Any]] | None = None,
            tools: Mapping[str, Callable[..., Any]] | None = None, vector_stores: Mapping[str, Any] | None = None,
            on_event: Callable[[dict[str, Any]], None] | None = None, offline: bool = False,
            output_folder: str | os.PathLike[str] = "output", streaming: bool = False, store: Any = None,
            cache: Any = None, cassette: Any = None, audit_texts: bool = False) -> None:
        if not isinstance(workflow, Workflow):
            raise ValidationError(f"workflow must be a Workflow, not {type(workflow).__name__}")
        self.workflow, self.warnings = workflow, workflow.validate()
        self.inputs = {} if inputs is _LATER else _checked_inputs(workflow, inputs or {})
        limit = max_concurrency if max_concurrency is not None else workflow.max_concurrency or _DEFAULT_CONCURRENCY
        if not _is_integer(limit) or limit < 1:
            raise ValidationError(f"max_concurrency must be a whole number of at least 1, not {limit!r}")
        self.max_concurrency: int = limit
        self.providers, self.vector_stores = dict(providers or {}), dict(vector_stores or {})
        self.actions, self.transforms, self.tools = dict(actions or {}), dict(transforms or {}), dict(tools or {})
        self.on_event, self.offline, self.output_folder = on_event, offline, os.fspath(output_folder)
        self.streaming, self.store, self.cache, self.cassette = streaming, store, cache, cassette
        self.audit_texts = audit_texts  # whether a store's audit trail gets prompts and answers, not their hashes alone
        self.launch: dict[str, Any] = {}  # what a store should know of how the run was started
        self.result: RunResult | None = None  # of the latest run, also when that was cancelled
        self._built: dict[tuple[Any, str], Any] = {}  # providers made here, by the workflow that sets them up and name
        self._shared: tuple[_Places, _WorkerPool] | None = None  # with the other runs of a batch
        self._gates: dict[int, _Gate] = {}  # by id() of providers, which this executor keeps alive
        self._client: _HttpClient | None = None
        self._lock = threading.Lock()
        self._runs: list[_Run] = []
        self._cancelled = [0]  # how often

    async def execute(self) -> RunResult:
        """Runs the workflow in the current event loop.

        Failed steps and timeouts are in the result. Raises before the first step for what makes a run impossible:
        ValidationError, AuthenticationError (a key is missing). When the task is cancelled, everything in flight is
        stopped first; `self.result` then holds what was done.
        """
        return await self._execute(None, self._cancelled[0])

    async def _execute(self, listener: Callable[[dict[str, Any]], None] | None, cancelled: int,
            recorded: Any = None, decisions: Any = None) -> RunResult:
        """One run; `cancelled` is how often `cancel` had been called when it was asked for."""
        inputs = recorded["inputs"] if recorded else self.inputs
        self._check(inputs)
        run = _Run(self, asyncio.get_running_loop(), listener, recorded, decisions)
        self.result = run.result
        self._runs.append(run)
        try:
            return await run.execute(inputs, self._cancelled[0] != cancelled)
        finally:
            self._runs.remove(run)

    async def each(self, inputs: Iterable[Any], width: int,
            may_start: Callable[[], bool] = lambda: True) -> AsyncIterator[tuple[Any, RunResult | ValidationError]]:
        """Runs the workflow once for each (key, inputs), `width` at a time, and yields (key, result) as they end.

        The runs share slots, threads, connections and limits. Inputs that are wrong give a ValidationError in place of
        a result. Leaving the iteration cancels what is running.
        """
        import copy

        loop = asyncio.get_running_loop()
        shared = _Places(self.max_concurrency), _WorkerPool(loop)
        running: dict[asyncio.Task[RunResult], Any] = {}
        entries, cancelled = iter(inputs), self._cancelled[0]
        self._check(None)
        try:
            while True:
                for key, values in itertools.islice(entries, width - len(running) if may_start() else 0):
                    one = copy.copy(self)
                    one._shared = shared
                    try:
                        one.inputs = _checked_inputs(self.workflow, values)
                        self._check_missing_inputs(one.inputs)
                    except ValidationError as error:
                        yield key, error
                        continue
                    running[asyncio.ensure_future(one._execute(None, cancelled))] = key
                if not running:
                    return
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield running.pop(task), task.result()
        finally:
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)
            shared[1].close()

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """Runs the workflow and yields its events as they happen, `text` events with the pieces of streamed answers
        among them; `self.result` holds the result afterwards. Raises as `execute` does."""
        events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        task = asyncio.ensure_future(self._execute(events.put_nowait, self._cancelled[0]))
        task.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            await task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])

    def run(self) -> RunResult:
        """Runs the workflow and returns its result; works with and without a running event loop (a notebook)."""
        return self._blocking(functools.partial(self._execute, None, self._cancelled[0]))

    def resume(self, run_id: str, *, from_step: str | None = None, force: bool = False,
            decisions: Mapping[str, tuple[bool, Mapping[str, Any]]] | None = None) -> Any:
        """Goes on with a run of this workflow that `store` holds, with the inputs it was started with.

        Completed steps are not run again; `from_step` and what follows it are. `decisions` maps the ids of approval
        steps to (approved, values). Returns the RunResult; inside a running event loop, an awaitable of it. Raises
        OrchestratorError if the run is held by another process, or if the workflow has changed (unless `force`).
        """
        cancelled = self._cancelled[0]

        async def resumed() -> RunResult:
            return await self._execute(None, cancelled, self._claimed(run_id, from_step, force), decisions)

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._blocking(resumed)
        return resumed()

    def _claimed(self, run_id: str, from_step: str | None, force: bool) -> dict[str, Any]:
        """A stored run that is ours now; given back if it cannot be resumed."""
        if self.store is None:
            raise OrchestratorError("to resume takes the store that holds the run")
        recorded: dict[str, Any] = self.store.claim(run_id)
        try:
            difference = self.store.difference(recorded, self)
            if difference and not force:
                raise OrchestratorError(f"the workflow has changed since run {run_id}; force to go on:\n{difference}")
            inputs = _checked_inputs(self.workflow, recorded.get("inputs") or {})
            again = self._following(from_step) if from_step is not None else set()
            forgotten = [step_id for step_id in recorded["steps"] if step_id.split(".")[0] in again]
            if forgotten:
                self.store.forget(run_id, forgotten)
            states = {step_id: state for step_id, state in recorded["steps"].items() if step_id not in forgotten}
            return {**recorded, "inputs": inputs, "steps": states}
        except BaseException:
            self.store.update(run_id, release=True)
            raise

    def _following(self, step_id: str) -> set[str]:
        """A top-level step and all that depend on it."""
        graph = self.workflow._plan().graph
        if step_id not in graph.by_id:
            raise ValidationError(f"there is no step {step_id!r}{_suggestion(step_id, graph.by_id)}")
        found = [graph.by_id[step_id]]
        for node in found:
            found += [graph.nodes[position] for position in node.dependents if graph.nodes[position] not in found]
        return {node.id for node in found}

    def _blocking(self, execute: Callable[[], Any]) -> RunResult:
        """The result of a run, in a loop of its own; in a thread of its own if this one has a running loop."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(execute())  # type: ignore[no-any-return]
        outcome: list[Any] = []
        ended, caller = threading.Event(), asyncio.current_task()

        def in_thread() -> None:
            try:
                outcome.append(asyncio.run(execute()))
            except BaseException as error:
                outcome.append(error)
            ended.set()

        threading.Thread(target=in_thread, name="llm_orchestrator-run", daemon=True).start()
        try:
            while not ended.wait(0.1):  # Ctrl-C in asyncio.run raises nothing here: it asks for the task's cancellation
                if caller is not None and hasattr(caller, "cancelling") and caller.cancelling():
                    self.cancel()
        except BaseException:
            self.cancel()
            ended.wait(1)
            raise
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        result: RunResult = outcome[0]
        return result

    def cancel(self) -> None:
        """Stops the runs of this executor, also those that are about to begin, from any thread; `execute` then returns
        with the status cancelled."""
        self._cancelled[0] += 1
        for run in list(self._runs):
            with contextlib.suppress(RuntimeError):  # its loop is closed already
                run.loop.call_soon_threadsafe(run.stop, "cancelled")

    def _check(self, inputs: Mapping[str, Any] | None) -> None:
        """Refuses a run that cannot succeed, before its first step; None: the inputs are checked later."""
        for workflow in self._workflows(self.workflow):
            self._check_needs(workflow)
        if inputs is not None:
            self._check_missing_inputs(inputs)

    def _check_needs(self, workflow: Workflow) -> None:
        """ValidationError if a workflow needs a function, provider or vector store that is not there."""
        document = workflow._whole()
        problems = [
            problem for problem in workflow._plan().problems
            for table, name in ([problem.custom] if problem.custom else ())
            if table in ("actions", "transforms", "tools") and name not in getattr(self, table)
        ]
        for (key, name), paths in workflow._plan().needs.items():
            message = ""
            try:
                if key == "approval" and self.store is None:
                    message = "an approval needs a store that keeps the run meanwhile: --store FILE, or store="
                elif key != "approval":
                    self._provider(name, workflow) if key == "provider" else self._vector_store(name)
            except ValidationError as error:
                message = error.problems[0].message
            problems += [Problem(_label(document, path) + message, path) for path in paths if message]
        if problems:
            located = workflow._located(problems)  # warnings of `validate` among them, that a run cannot live with
            raise ValidationError([Problem(one.message, one.path, one.line, one.column, one.source) for one in located])

    @staticmethod
    def _workflows(first: Workflow) -> Iterator[Workflow]:
        """A workflow and every sub-workflow of it that is known before it runs."""
        found = [first]
        for workflow in found:
            yield workflow
            for node in workflow._plan().graph.walk():
                if node.workflow is not None and node.workflow not in found:
                    found.append(node.workflow)

    def _check_missing_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Without declared inputs: what steps that are certain to run cannot do without."""
        if self.workflow.inputs is not None:
            return
        graph, document = self.workflow._plan().graph, self.workflow._whole()
        uncertain: set[str] = set()
        problems = []
        for node in (node for level in _levels(graph) for node in level):
            if node.condition or node.for_each or node.continue_on_error or uncertain & set(node.dependencies):
                uncertain.add(node.id)
                continue
            for reference, key in node.references:
                segments = reference[0]
                named = segments[1:2] if segments[0] in ("inputs", "input") else segments[:1]
                known = ("steps", "outputs", "workflow", "run", *node.local, *inputs)
                if named and reference[1] and (name := named[0]) not in known:
                    label = _label(document, node.path)
                    message = f"{label}{key}: the input {name!r} is missing; give it with inputs, or --set {name}=..."
                    problems.append(Problem(message, (*node.path, key)))
        if problems:
            raise ValidationError(self.workflow._located(problems))

    def _provider(self, name: str, workflow: Workflow) -> Any:
        """The provider of this name: given, configured in the workflow, or built in and set up by the environment."""
        if self.offline:
            name = "echo"
        elif name in self.providers:
            return self.providers[name]
        configured = workflow.providers or {}
        key = (workflow if name in configured else None, name)
        with self._lock:
            if key not in self._built:
                replayed = self.cassette is not None and self.cassette.replays
                self._built[key] = _build_provider(name, configured.get(name), self.providers, replayed)
            return self._built[key]

    def _vector_store(self, name: str) -> Any:
        """The vector store of this name: given, or built in and set up by the environment; offline always local."""
        if name in self.vector_stores:
            return self.vector_stores[name]
        if name not in VECTOR_STORES:
            near = _suggestion(name, [*VECTOR_STORES, *self.vector_stores]) or f"; there are {', '.join(VECTOR_STORES)}"
            raise ValidationError(f"unknown vector database {name!r}{near}")
        name = "local" if self.offline else name
        with self._lock:
            if ("vectors", name) not in self._built:
                self._built["vectors", name] = LocalVectorStore() if self.offline else VECTOR_STORES[name].from_env()
            return self._built["vectors", name]

    def gate(self, name: str, provider: Any, workflow: Workflow) -> _Gate:
        """The gate of a provider: one for all that use the object, as far as it can carry it."""
        known: _Gate | None = getattr(provider, "_gate", None) or self._gates.get(id(provider))
        if known is None:
            configured = {} if self.offline else (workflow.providers or {}).get(name) or {}
            own = getattr(provider, "limits", None) or {}
            settings = {**configured, **{limit: value for limit, value in own.items() if value is not None}}
            known = self._gates[id(provider)] = _Gate(settings)
            with contextlib.suppress(AttributeError, TypeError):
                known = vars(provider).setdefault("_gate", known)
        return known

    def keepers(self, cached: bool) -> list[Any]:
        """What may know the answer to a call already, and keeps it."""
        return [keeper for keeper in (self.cassette, self.cache if cached else None) if keeper is not None]

    def _http(self) -> _HttpClient:
        with self._lock:
            if self._client is None:
                self._client = _HttpClient("http")
            return self._client

    def close(self) -> None:
        """Closes the idle connections of the providers that were built here."""
        for provider in [*self._built.values(), *([self._client] if self._client else [])]:
            provider.close()

def _build_provider(name: str, configured: Mapping[str, Any] | None, known: Mapping[str, Any], replayed: bool) -> Any:
    """A provider from its entry in a workflow's `providers`, or from its name alone; a `replayed` one has no key."""
    settings = dict(configured or {})
    kind = settings.pop("type", None) or name
    if kind not in PROVIDERS:
        near = _suggestion(kind, [*PROVIDERS, *known]) or f"; there are {', '.join([*known, *PROVIDERS])}"
        raise ValidationError(f"unknown provider {kind!r}{near}")
    settings.update(settings.pop("options", None) or {})
    variable = settings.pop("api_key_env", None)
    if replayed:
        settings.update(api_key="replayed", base_url="http://replayed.invalid")
    elif variable is not None:
        settings["api_key"] = os.environ.get(variable)
        if not settings["api_key"]:
            raise AuthenticationError(f"the environment variable {variable} is not set", provider=name)
    if "timeout_seconds" in settings:
        settings["timeout_seconds"] = _seconds(settings["timeout_seconds"], "s")
    return PROVIDERS[kind].from_env(**({"name": name} if configured else {}), **settings)

# ---------------------------------------------------------------------------------------------------------------------
# 14. Store: runs, checkpoints, cache
# Records of runs come in and are committed by one writer thread, many at a time; runs, failures and an audit trail that
# shows every edit go out. What was reported as durable survives a kill at any moment; a failed write leaves no gap.
# ---------------------------------------------------------------------------------------------------------------------

_LEASE_SECONDS, _HEARTBEAT_SECONDS = 30.0, 10.0
_encoder = functools.lru_cache(maxsize=None)(lambda sort_keys: json.JSONEncoder(
    separators=(",", ":"), default=_unpacked, check_circular=False, sort_keys=sort_keys))

def _stored_json(value: Any, sort_keys: bool = False) -> str:
    """One line of JSON in ASCII, which every database keeps unchanged."""
    try:
        return _encoder(sort_keys).encode(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise OrchestratorError(f"what was to be stored has no JSON form: {error}") from None

def _digest(value: Any) -> str:
    """The SHA-256 of a text, or of a value as JSON with sorted keys, in hexadecimal."""
    text = value if isinstance(value, str) else _stored_json(value, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

def _workflow_diff(recorded: str, current: str) -> str:
    """How two texts differ, as a unified diff; "" if they do not."""
    texts = recorded.splitlines(), current.splitlines()
    return "\n".join(difflib.unified_diff(*texts, "recorded", "current", lineterm=""))

def _parse_age(text: str) -> float:
    """Seconds from "90s", "45m", "12h", "30d" or "2w"; ValidationError for anything else."""
    if match := re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhdw])", str(text).strip()):
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[match[2]]
    raise ValidationError(f"an age is a number with s, m, h, d or w, such as 30d or 12h, not {_shown(text)}")

@functools.lru_cache(maxsize=64)
def _process_name(pid: int) -> tuple[str, str, str]:
    """(host/scope, pid, random): this process, and no other ever; `scope` is the kernel and container of its pid."""
    scope = []
    with contextlib.suppress(OSError, OrchestratorError):  # Linux
        scope = [_read_file("/proc/sys/kernel/random/boot_id").decode(), os.readlink("/proc/self/ns/pid")]
    return f"{platform.node() or 'localhost'}/{_digest(scope)[:8]}", str(pid), os.urandom(4).hex()

def _is_alive(holder: str | None, lease_until: float | None) -> bool:
    """Whether a lease holds: it has not run out, and its process is not known to have ended (here, one can know)."""
    if not holder or (lease_until or 0) <= time.time():
        return False
    (host, pid, token), own = ["", "", *holder.rsplit(":", 2)][-3:], _process_name(os.getpid())
    if host != own[0] or os.name != "posix":  # on Windows, os.kill ends a process
        return True
    if pid == own[1]:
        return token.startswith(own[2])  # or else an earlier process had our pid
    try:
        os.kill(int(pid), 0)
    except (OSError, ValueError, OverflowError) as error:
        return not isinstance(error, ProcessLookupError)
    return True

_SQLITE_FAULTS = {
    "locked": "another process keeps it locked", "full": "no room is left on the disk", "malformed": "it is damaged",
    "not a database": "it is damaged, or no SQLite database", "readonly": "it cannot be written",
    "unable to open": "it cannot be opened", "[Errno": "it cannot be opened", "UNIQUE": "there is one already"}

class _Database(contextlib.AbstractContextManager[Any]):
    """One connection to a database, shared by threads, in which everything happens in transactions. As it stands, it is
    a file of SQLite that many processes may use: WAL, mode 0600, a version with migrations, `busy_timeout_seconds` to
    wait for others. For another database, override `connect`, `statement`, `begin_transaction` and `explain`."""
    SCHEMA: tuple[str, ...] = ()  # a script a version: statements separated by semicolons
    APPLICATION_ID, SYNCHRONOUS = 0, "NORMAL"  # the former tells our kinds of files from each other and from others'

    def __init__(self, path: str | os.PathLike[str], busy_timeout_seconds: float = 10.0) -> None:
        self.name, self.busy_timeout_seconds = os.fspath(path), busy_timeout_seconds
        self._pid, self._lock, self._closed = os.getpid(), threading.RLock(), False
        self._connection: Any = None
        with self._transaction(write=False):
            pass  # what cannot be used is an error now

    def connect(self) -> Any:
        """A new DB-API 2.0 connection to a database with the tables of `SCHEMA`."""
        try:
            import sqlite3
        except ImportError:
            raise OrchestratorError("this Python has no sqlite3 module, which stores and caches need") from None
        with contextlib.suppress(FileExistsError):  # SQLite gives -wal and -shm the mode of the file
            if self.name != ":memory:":
                os.close(os.open(self.name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        waiting = self.busy_timeout_seconds
        connection = sqlite3.connect(self.name, timeout=waiting, isolation_level=None, check_same_thread=False)
        try:
            self._migrate(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _migrate(self, connection: Any) -> None:
        """Brings the tables to this version; a newer or a strange file is refused."""
        def pragma(text: str) -> Any:
            return (connection.execute(f"PRAGMA {text}").fetchone() or [None])[0]
        ours, deadline = (self.APPLICATION_ID, len(self.SCHEMA)), time.monotonic() + self.busy_timeout_seconds
        pragma(f"synchronous = {self.SYNCHRONOUS}")
        if (pragma("application_id"), pragma("user_version"), pragma("journal_mode")) == (*ours, "wal"):
            return
        connection.execute("BEGIN IMMEDIATE")
        kind, version = pragma("application_id"), pragma("user_version")
        if kind != ours[0] and connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise OrchestratorError(f"{self.name} belongs to another program, or is another kind of file of this one")
        if version > ours[1]:
            raise OrchestratorError(f"{self.name} is of a newer version ({version}); this one knows {ours[1]}")
        for statement in ";".join(self.SCHEMA[version:]).split(";"):
            connection.execute(statement)
        pragma(f"application_id = {ours[0]}")
        pragma(f"user_version = {ours[1]}")
        connection.execute("COMMIT")
        while pragma("journal_mode") != "wal":
            try:
                if pragma("journal_mode = WAL") != "wal":
                    return  # in memory, or where files cannot be shared so
            except Exception:  # here SQLite itself does not wait for the others
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def statement(self, sql: str) -> str:
        """The SQL, written with `?` for parameters, as the driver wants it."""
        return sql

    def begin_transaction(self, cursor: Any, write: bool) -> None:
        """Called first in each transaction; many drivers begin one by themselves."""
        cursor.execute("BEGIN IMMEDIATE" if write else "BEGIN")

    def explain(self, error: Exception) -> str:
        """A driver's error in words for the user."""
        text = str(error)
        return next((f"{reason} ({text})" for words, reason in _SQLITE_FAULTS.items() if words in text), text)

    @contextlib.contextmanager
    def _transaction(self, write: bool = True) -> Iterator[Callable[..., Any]]:
        """Gives execute(sql, parameters, many=False) -> cursor. Commits at the end, or undoes everything."""
        self._check_open()  # without the lock: after a fork, nobody might let it go
        with self._lock:
            self._check_open()
            try:
                self._connection = self._connection or self.connect()
                with contextlib.closing(self._connection.cursor()) as cursor:
                    def execute(sql: str, parameters: Sequence[Any] = (), many: bool = False) -> Any:
                        (cursor.executemany if many else cursor.execute)(self.statement(sql), parameters)
                        return cursor
                    self.begin_transaction(cursor, write)
                    yield execute
                    self._connection.commit()
            except BaseException as error:
                try:
                    _ = self._connection and self._connection.rollback()
                except Exception:
                    self._connection = None  # it is lost: the next transaction makes a new one
                if isinstance(error, OrchestratorError) or not isinstance(error, Exception):
                    raise
                raise OrchestratorError(f"{self.name}: {self.explain(error)}") from error

    def _check_open(self) -> None:
        if self._closed or self._pid != os.getpid():
            reason = "is closed" if self._closed else "does not outlive a fork: open it in the new process"
            raise OrchestratorError(f"{self.name} {reason}")

    def close(self) -> None:
        """Ends the connection; whatever is called afterwards is refused."""
        if self._pid == os.getpid():  # or else the connection, and who knows which locks, are the parent's
            with self._lock, contextlib.suppress(Exception):  # it may be lost
                connection, self._connection, self._closed = self._connection, None, True
                _ = connection and connection.close()

    def __exit__(self, *_: object) -> None:
        self.close()

# ---- Runs ------------------------------------------------------------------------------------------------------------

_WRITES = {  # what is done to one run in one commit, in this order; without the lease, nothing after its renewal
    "begin": "INSERT INTO runs VALUES (?, ?, 'running', ?, ?, '', '', NULL, NULL, 0, ?)",
    "renew": "UPDATE runs SET audit_count = ?, audit_head = ?, updated_at = COALESCE(?, updated_at), holder = ?,"
    " lease_until = ? WHERE run_id = ? AND COALESCE(holder, '') = ?",
    "text": "INSERT INTO texts VALUES (?, ?) ON CONFLICT (hash) DO NOTHING",
    "change": "UPDATE runs SET status = COALESCE(?, status), text_hash = ?, document = ? WHERE run_id = ?",
    "step": "INSERT INTO steps VALUES (?, ?, ?, ?)"
    " ON CONFLICT (run_id, step_id) DO UPDATE SET status = excluded.status, state = excluded.state",
    "forget": "DELETE FROM steps WHERE run_id = ? AND step_id = ?",
    "event": "INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?)",
    "release": "UPDATE runs SET holder = NULL, lease_until = NULL WHERE run_id = ?"}
_COLUMNS = ("run_id", "workflow", "status", "started_at", "updated_at", "holder", "lease_until",  # those of lists
            "document", "text_hash", "body", "audit_count", "audit_head")
_RUN_SQL = f"SELECT {', '.join(_COLUMNS)} FROM runs LEFT JOIN texts ON hash = text_hash WHERE run_id = ?"
_STEPS_SQL = "SELECT step_id, status, state FROM steps WHERE run_id = ?"
_EVENTS_SQL = "SELECT * FROM audit WHERE run_id = ? ORDER BY number"
_MAYBE_RUNNING = (
    "run_id IN (SELECT run_id FROM runs WHERE status = ? UNION ALL SELECT run_id FROM runs WHERE holder IS NOT NULL)")

def _run_entry(run: Mapping[str, Any]) -> dict[str, Any]:
    """A row of runs as users see it: what a process holds is running, whatever became of it before."""
    held_by = run["holder"] if _is_alive(run["holder"], run["lease_until"]) else None
    dead = run["status"] == "running" or run["holder"] is not None  # it never gave the run back
    status = "running" if held_by else "interrupted" if dead else run["status"]
    return {**{name: run[name] for name in _COLUMNS[:5]}, "status": status, "held_by": held_by}

class _HeldRun:
    """A run that a store may write: its holder in the database, the end of its audit chain, its text and its fields."""
    def __init__(self, run_id: str, holder: str, count: int, head: str, text_hash: str, fields: dict[str, Any]) -> None:
        self.run_id, self.holder, self.count, self.head = run_id, holder, count, head
        self.text_hash, self.fields = text_hash, fields
        self.fault: OrchestratorError | None = None  # why it may be written no longer

    def event(self, kind: str, details: str, moment: float) -> tuple[Any, ...]:
        """The row of the next event; its hash covers the event and the hash of the one before."""
        self.count += 1
        self.head = _digest(f"{self.head}\n{self.count}\n{moment!r}\n{kind}\n{details}")
        return self.run_id, self.count, moment, kind, details, self.head

    def change(self, status: str | None, fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        """(what an event says of it, rows for `_WRITES`) of a change of status and fields."""
        changed, rows = {**self.fields, **fields}, []
        text = changed.pop("workflow_text", None)
        document, self.fields = _stored_json(changed), changed
        if text is not None:  # kept once for all runs of a workflow
            self.text_hash = _digest(text)
            rows.append(("text", (self.text_hash, _stored_json(text))))
        about = {"document": _digest(document), "workflow_text": self.text_hash}
        return about, [*rows, ("change", (status, self.text_hash, document, self.run_id))]

def _learn(told: dict[str, Any], kind: str, about: Any) -> None:
    """Takes down what an event says of the run and its steps."""
    if kind == "steps":
        told.update((f"state of step {step_id}", state) for step_id, state in about.items())
    elif kind == "steps_forgotten":
        _ = [told.pop(f"state of step {step_id}", None) for step_id in about["step_ids"]]
    elif "document" in about:
        told.update((f"run's {name}", about[name]) for name in about.keys() & {"workflow", "document", "workflow_text"})
        told["run's status"] = told["run's status"] if kind in ("run_started", "run_changed") else kind[4:]

class Store(_Database):
    """Where runs are kept: in one SQLite file, which many processes may use at once.

    It is the protocol too: an executor calls `begin`, `claim`, `record`, `note`, `update`, `forget` and `load`. A
    subclass that overrides what `_Database` names keeps runs in another SQL database. To write a run takes its lease,
    which `begin` and `claim` get and the store renews by itself until `update(release=True)` or `close`. All methods
    raise OrchestratorError and may be called from any thread. `record` and `note` return at once; what the others do is
    durable when they return: on the disk (synchronous = FULL), which costs a fraction of a model call."""
    APPLICATION_ID, SYNCHRONOUS = 0x4C4C4D53, "FULL"
    SCHEMA = ("""
        CREATE TABLE texts (hash TEXT PRIMARY KEY, body TEXT NOT NULL);
        CREATE TABLE runs (run_id TEXT PRIMARY KEY, workflow TEXT NOT NULL, status TEXT NOT NULL,
            started_at DOUBLE PRECISION NOT NULL, updated_at DOUBLE PRECISION NOT NULL, text_hash TEXT NOT NULL,
            document TEXT NOT NULL, holder TEXT, lease_until DOUBLE PRECISION, audit_count INTEGER NOT NULL,
            audit_head TEXT NOT NULL);
        CREATE TABLE steps (run_id TEXT, step_id TEXT, status TEXT NOT NULL, state TEXT NOT NULL,
            PRIMARY KEY (run_id, step_id));
        CREATE TABLE audit (run_id TEXT, number INTEGER, time DOUBLE PRECISION NOT NULL, kind TEXT NOT NULL,
            details TEXT NOT NULL, hash TEXT NOT NULL, PRIMARY KEY (run_id, number));
        CREATE INDEX runs_by_start ON runs (started_at); CREATE INDEX runs_by_status ON runs (status, started_at);
        CREATE INDEX runs_by_workflow ON runs (workflow, started_at); CREATE INDEX runs_by_text ON runs (text_hash);
        CREATE INDEX runs_by_holder ON runs (holder) WHERE holder IS NOT NULL;
        CREATE INDEX failed_steps ON steps (run_id) WHERE status = 'failed'""",)

    def __init__(self, path: str | os.PathLike[str], busy_timeout_seconds: float = 10.0) -> None:
        super().__init__(path, busy_timeout_seconds)
        self.holder = ":".join(_process_name(os.getpid())) + f".{os.urandom(4).hex()}"
        self._held: dict[str, _HeldRun] = {}
        self._jobs: collections.deque[Any] = collections.deque()  # what `_submit` puts there
        self._wake, self._ending, self._next_heartbeat = threading.Event(), False, 0.0
        self._writer: threading.Thread | None = None

    def begin(self, run: Mapping[str, Any]) -> None:
        """A new run: `run_id`, `workflow` (its name), `workflow_text`, and whatever else is JSON (inputs ...)."""
        run_id, workflow, now, head = run["run_id"], run["workflow"], time.time(), _digest(run["run_id"])
        held, begin = _HeldRun(run_id, "", 0, head, "", {}), (run_id, workflow, run.get("started_at", now), now, head)
        about, rows = held.change(None, {"started_at": now, **run})
        self._take(held, "run_started", {"workflow": workflow, **about}, ("begin", begin), *rows)

    def claim(self, run_id: str) -> dict[str, Any]:
        """The run as `load` gives it, now held by this store; an error if another process, or this one, holds it."""
        with self._transaction(write=False) as execute:
            run = self._find(execute, run_id, free_for=self.holder)
            holder, fields = run["holder"] or "", dict(json.loads(run["document"]))
            held = _HeldRun(run_id, holder, run["audit_count"], run["audit_head"], run["text_hash"], fields)
        self._take(held, "run_claimed", {"from": holder})
        return self.load(run_id)

    def record(self, run_id: str, step_id: str, state: Mapping[str, Any], on_durable: Any = None) -> None:
        """The final state of a step (full id): JSON with a `status`. The writer's thread calls `on_durable`, which must
        not wait for the store, with None once this and all before it is committed, or with the OrchestratorError that
        kept it out. After such an error every write of the run is refused, until it is claimed again: what is stored
        is an unbroken beginning of what was recorded."""
        row = (run_id, step_id, state["status"], _stored_json(state))
        self._submit(self._own(run_id), "steps", None, [("step", row)], on_durable)

    def note(self, run_id: str, kind: str, details: Mapping[str, Any]) -> None:
        """An event for the audit trail, such as `provider_call`: JSON, with texts as their `_digest`."""
        self._submit(self._own(run_id), kind, _stored_json(details), [])

    def update(self, run_id: str, status: str | None = None, fields: Any = None, release: bool = False) -> None:
        """Sets a run's status and fields (a map: outputs, workflow_text ...); `release` gives its lease back."""
        held = self._own(run_id)
        about, rows = held.change(status, fields or {})
        rows += [("release", (run_id,))] if release else []
        self._write_now(held, f"run_{status}" if status else "run_changed", about, rows)
        if release:
            self._held.pop(run_id, None)

    def forget(self, run_id: str, step_ids: Iterable[str]) -> None:
        """Deletes the states of steps (full ids), which are to run again."""
        gone = list(step_ids)
        rows = [("forget", (run_id, step_id)) for step_id in gone]
        self._write_now(self._own(run_id), "steps_forgotten", {"step_ids": gone}, rows)

    def flush(self) -> None:
        """Returns when everything recorded so far is committed or has failed."""
        self._check_open()
        if self._writer is not None:
            self._write_now(None, "", None, [])

    def load(self, run_id: str) -> dict[str, Any]:
        """A run: all that `begin` and `update` were given, status, times, `held_by`, and `steps`: full id -> state."""
        with self._transaction(write=False) as execute:
            run = self._find(execute, run_id)
            end = {name: run[name] for name in ("audit_count", "audit_head")}
            text = json.loads(run["body"]) if run["body"] else None
            states = {step_id: json.loads(state) for step_id, _, state in execute(_STEPS_SQL, (run_id,)).fetchall()}
            return {**json.loads(run["document"]), **_run_entry(run), **end, "workflow_text": text, "steps": states}

    def runs(self, limit: int = 100, status: str | None = None, workflow: str | None = None) -> list[dict[str, Any]]:
        """Runs, newest first: run_id, workflow, status, started_at and updated_at (seconds since 1970), held_by. A run
        whose process ended without a word is shown, and found, as `interrupted`."""
        unsure = status in ("running", "interrupted")  # which of both, the leases tell
        asked = {"workflow = ?": workflow, _MAYBE_RUNNING if unsure else "status = ?": "running" if unsure else status}
        where = {condition: value for condition, value in asked.items() if value is not None}
        order = "ORDER BY started_at DESC, run_id" + ("" if unsure else f" LIMIT {int(limit)}")
        entries = self._list(f"{' AND '.join(where) or '1 = 1'} {order}", *where.values())
        return [entry for entry in entries if status in (None, entry["status"])][:limit]

    def failures(self, run_id: str | None = None, limit: int = 1000) -> list[dict[str, Any]]:
        """Steps that failed for good, newest run first: run_id, workflow, inputs, started_at, step_id and the state. Of
        a container and the children that made it fail, only the children."""
        names, only = ("run_id", "workflow", "started_at", "step_id"), "" if run_id is None else "AND runs.run_id = ?"
        sql = ("SELECT runs.run_id, workflow, started_at, step_id, document, state FROM steps JOIN runs"
               f" ON runs.run_id = steps.run_id WHERE steps.status = 'failed' {only}"
               f" ORDER BY started_at DESC, runs.run_id, step_id LIMIT {int(limit)}")
        with self._transaction(write=False) as execute:
            rows = execute(sql, () if run_id is None else (run_id,)).fetchall()
            outer = {(row[0], row[3][: dot.start()]) for row in rows for dot in re.finditer(r"\.", row[3])}
            return [{**dict(zip(names, row)), "inputs": json.loads(row[4]).get("inputs"), **json.loads(row[5])}
                    for row in rows if (row[0], row[3]) not in outer]

    def audit(self, run_id: str) -> list[dict[str, Any]]:
        """A run's events in order: number (from 1), time, kind, details, hash. Those of kind `steps` tell which steps
        ended: full id -> [status, hash of the state]."""
        names = ("number", "time", "kind", "details", "hash")
        with self._transaction(write=False) as execute:
            rows = execute(_EVENTS_SQL, (run_id,)).fetchall()
            return [{**dict(zip(names, row[1:])), "details": json.loads(row[4])} for row in rows]

    def verify(self, run_id: str) -> list[str]:
        """What does not fit in a run's audit trail, step states and outcome: edits, deletions, insertions, reorderings.
        Not to be seen: that a whole run was removed, or that the whole chain was written anew along with the run's row;
        who keeps the `audit_head` of `load` elsewhere sees the latter too."""
        problems: list[str] = []
        told: dict[str, Any] = {"run's status": "running"}  # by the events
        with self._transaction(write=False) as execute:
            run, chain = self._find(execute, run_id), _HeldRun(run_id, "", 0, _digest(run_id), "", {})
            for row in execute(_EVENTS_SQL, (run_id,)).fetchall():
                _, number, moment, kind, details, link = row
                if chain.event(kind, details, moment) != tuple(row):
                    fault = "was changed or added, or the one before it was changed, removed or moved"
                    problems.append(f"event {number} ({kind}) {fault}")
                chain.count, chain.head = number, link  # so that each fault is told once
                with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # of those, the chain tells
                    _learn(told, kind, json.loads(details))
            if (chain.count, chain.head) != (run["audit_count"], run["audit_head"]):
                problems.append(f"event {chain.count} is not the last one that was written, {run['audit_count']}")
            text = _digest(json.loads(run["body"])) if run["body"] else ""
            run.update(document=_digest(run["document"]), workflow_text=text if text == run["text_hash"] else None)
            now = {f"run's {name}": run[name] for name in ("workflow", "status", "document", "workflow_text")}
            for step_id, status, state in execute(_STEPS_SQL, (run_id,)).fetchall():
                now[f"state of step {step_id}"] = [status, _digest(state)]
        wrong = [what for what in {**told, **now} if told.get(what) != now.get(what)]
        return problems + [f"the {what} is not what was recorded" for what in wrong]

    def export(self, run_id: str) -> dict[str, Any]:
        """All about a run: what `load` gives, and its `audit`."""
        return {**self.load(run_id), "audit": self.audit(run_id)}

    def delete(self, *run_ids: str) -> None:
        """Deletes runs and all that belongs to them; an error, and nothing is deleted, while a process holds one."""
        with self._transaction() as execute:
            for run_id in run_ids:
                self._find(execute, run_id, free_for="")
                for table in ("steps", "audit", "runs"):
                    execute(f"DELETE FROM {table} WHERE run_id = ?", (run_id,))
            execute("DELETE FROM texts WHERE NOT EXISTS (SELECT 1 FROM runs WHERE text_hash = hash)")

    def prune(self, older_than_seconds: float) -> list[str]:
        """Deletes the ended runs that nothing was written to for so long and returns their ids; paused ones stay."""
        entries = self._list("updated_at < ? AND status <> 'paused'", time.time() - older_than_seconds)
        old = [entry["run_id"] for entry in entries if not entry["held_by"]]
        for start in range(0, len(old), 100):  # short transactions: others write meanwhile
            self.delete(*old[start : start + 100])
        return old

    def journal(self, run_id: str, loop: asyncio.AbstractEventLoop) -> _Journal:
        """What a run writes to."""
        return _Journal(self, run_id, loop)

    def difference(self, run: Mapping[str, Any], executor: WorkflowExecutor) -> str:
        """How the workflow that a run (of `load`) was started with differs from an executor's; "" if it does not."""
        return _workflow_diff(run["workflow_text"] or "", _workflow_text(executor))

    def close(self) -> None:
        """Commits what was recorded, gives the leases back and ends the writer; later calls are refused."""
        if self._closed or self._pid != os.getpid():
            return
        self._ending = True
        if self._writer is not None:
            self._wake.set()
            self._writer.join()
        if self._held:
            with contextlib.suppress(OrchestratorError), self._transaction() as execute:
                execute("UPDATE runs SET holder = NULL, lease_until = NULL WHERE holder = ?", (self.holder,))
        super().close()
        self._commit()  # what came too late: who waits is told so

    def _find(self, execute: Callable[..., Any], run_id: str, free_for: str | None = None) -> dict[str, Any]:
        """A run's `_COLUMNS`; an error if there is none or, if it is to be `free_for` a holder, another one has it."""
        row = execute(_RUN_SQL, (run_id,)).fetchone()
        if row is None:
            raise OrchestratorError(f"{self.name} has no run {run_id!r}")
        run = dict(zip(_COLUMNS, row))
        if free_for is not None and run["holder"] != free_for and _is_alive(run["holder"], run["lease_until"]):
            ending = f"its lease ends in {run['lease_until'] - time.time():.0f} s unless renewed"
            raise OrchestratorError(f"run {run_id} is held by a running process, {run['holder']}; {ending}")
        return run

    def _list(self, condition: str, *parameters: Any) -> list[dict[str, Any]]:
        with self._transaction(write=False) as execute:
            rows = execute(f"SELECT {', '.join(_COLUMNS[:7])} FROM runs WHERE {condition}", parameters).fetchall()
            return [_run_entry(dict(zip(_COLUMNS, row))) for row in rows]

    # The writer

    def _own(self, run_id: str) -> _HeldRun:
        self._check_open()
        held = self._held.get(run_id)
        if held is None or held.fault is not None:
            raise (held and held.fault) or OrchestratorError(f"run {run_id} is not held: begin or claim it first")
        return held

    def _take(self, held: _HeldRun, kind: str, about: Mapping[str, Any], *rows: Any) -> None:
        self._check_open()
        with self._lock:
            known = self._held.get(held.run_id)
            if known is not None and known.fault is None:
                raise OrchestratorError(f"run {held.run_id} is held by a running process, this one")
            self._held[held.run_id] = held
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="llm_orchestrator-store", daemon=True)
                self._writer.start()
        user = next((os.environ[name] for name in ("USER", "LOGNAME", "USERNAME") if os.environ.get(name)), "unknown")
        host, pid, _ = _process_name(os.getpid())
        by = f"{user}@{host.partition('/')[0]} (process {pid})"
        self._write_now(held, kind, {"by": by, **about}, rows)

    def _submit(self, held: _HeldRun | None, kind: str, about: Any, rows: Any, on_durable: Any = None) -> None:
        """Queues rows for `_WRITES`, and an event about them, for the next commit."""
        self._jobs.append((held, kind, about, rows, on_durable))
        if not self._wake.is_set():
            self._wake.set()
        if self._closed:  # in this moment
            self._commit()

    def _write_now(self, held: _HeldRun | None, kind: str, about: Any, rows: Any) -> None:
        """Returns when this, and all before it, is durable."""
        outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._submit(held, kind, about and _stored_json(about), rows, outcome.put)
        if (error := outcome.get()) is not None:
            raise error

    def _write(self) -> None:
        """The writer's thread: what gathers while one commit is made goes into the next."""
        is_last = False
        while not is_last:
            self._wake.wait(_HEARTBEAT_SECONDS)
            self._wake.clear()
            is_last = self._ending
            self._commit()

    def _commit(self) -> None:
        """Makes one commit of the jobs that wait, renews all leases when it is time, and tells those who wait."""
        with self._lock:
            jobs = [self._jobs.popleft() for _ in range(len(self._jobs))]
            runs = {held for held, *_ in jobs if held is not None and held.fault is None}
            known = list(self._held.values()) if time.monotonic() >= self._next_heartbeat else []
            beating = {held for held in known if held.fault is None and held.holder == self.holder}
            try:
                if runs or beating:
                    with self._transaction() as execute:
                        self._write_rows(execute, jobs, runs | beating)
                if beating:
                    self._next_heartbeat = time.monotonic() + _HEARTBEAT_SECONDS
            except OrchestratorError as fault:
                for held in runs:
                    held.fault = fault
        for held, _, _, _, on_durable in jobs:
            if on_durable is not None:
                with contextlib.suppress(Exception):  # one listener's fault is not the others'
                    on_durable(held and held.fault)

    def _write_rows(self, execute: Callable[..., Any], jobs: list[Any], runs: Iterable[_HeldRun]) -> None:
        """Renews the leases of runs and writes the rows of jobs, with one event for steps that follow each other."""
        by_run: dict[_HeldRun, dict[str, list[Any]]] = {held: collections.defaultdict(list) for held in runs}
        for held, kind, about, rows, _ in jobs:
            if held not in by_run:
                continue  # no run, or not ours any more
            events = by_run[held]["event"]
            for name, row in rows:
                by_run[held][name].append(row)
            if about is not None:
                events.append((kind, about))
                continue
            if not events or isinstance(events[-1][1], str):
                events.append((kind, {}))
            events[-1][1][row[1]] = [row[2], _digest(row[3])]
        now = time.time()
        for held, writes in by_run.items():
            events = writes["event"] = [held.event(kind, about if isinstance(about, str) else _stored_json(about), now)
                                       for kind, about in writes["event"]]
            lease = (now if events else None, self.holder, now + _LEASE_SECONDS, held.run_id, held.holder)
            writes["renew"], held.holder = [(held.count, held.head, *lease)], self.holder
            for name, sql in _WRITES.items():
                if writes[name] and execute(sql, writes[name], many=True).rowcount != 1 and name == "renew":
                    held.fault = OrchestratorError(f"run {held.run_id} was deleted or taken by another process")
                    break

SQLiteStore = Store

class _Journal:
    """A run's side of its store, for one event loop: what is written down, and how much of it is durable."""
    def __init__(self, store: Any, run_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.store, self.run_id, self.loop = store, run_id, loop
        self.written, self.woken, self.progress = 0, True, asyncio.Event()
        self.landed: list[Any] = []  # for each step that was written, in order, None or what kept it out
        self.error: OrchestratorError | None = None

    def begin(self, workflow: Workflow, executor: WorkflowExecutor) -> None:
        """Writes down what is to be run."""
        text, source = _workflow_text(executor), os.path.abspath(workflow.source) if workflow.folder else None
        run = {"run_id": self.run_id, "workflow": str(workflow.name), "workflow_text": text, "source": source}
        self.store.begin({**run, "inputs": executor.inputs, "launch": executor.launch})

    def step(self, result: StepResult) -> None:
        """Writes down how a step ended."""
        try:
            self.store.record(self.run_id, result.step_id, {**result.to_dict(), "order": list(result.order)}, self.land)
            self.written += 1
        except OrchestratorError as error:
            self.error = self.error or error

    def forget(self, step_ids: list[str]) -> None:
        """Deletes what was written down of steps that run again."""
        try:
            self.store.forget(self.run_id, step_ids)
        except OrchestratorError as error:
            self.error = self.error or error

    def call(self, step_id: str, provider: str, request: Any, answer: Any, texts: bool) -> None:
        """Notes a call of a provider: hashes of what was asked and answered, the texts only if they are wanted."""
        asked, answered = _request_document(provider, request), _answer_document(answer, request.model)
        counted = ((name, answered.get(name)) for name in ("input_tokens", "output_tokens", "tokens", "error"))
        used = {name: value for name, value in counted if value is not None}
        about = {"step_id": step_id, "provider": provider, "model": request.model, **used}
        about.update({"request": asked, "response": answered} if texts else {})
        self.store.note(self.run_id, "provider_call", {**about, "asked": _digest(asked), "answered": _digest(answered)})

    def land(self, error: OrchestratorError | None) -> None:
        """Called in the writer's thread, once for each step, in their order."""
        if error is not None:
            self.error = error
        self.landed.append(error)
        if not self.woken:
            self.woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self.loop.call_soon_threadsafe(self.progress.set)

    async def barrier(self) -> None:
        """Returns when all that was written down until now is durable; raises what kept it out."""
        number, self.woken = self.written, False  # before each look at `landed`: what lands after it wakes the loop
        while self.error is None and len(self.landed) < number:
            self.progress.clear()
            await self.progress.wait()
            self.woken = False
        if self.error is not None:
            raise self.error

    def end(self, result: RunResult) -> None:
        """Writes down the outcome and gives the run back; what keeps it out becomes the result's error."""
        try:
            fields = {name: getattr(result, name) for name in ("outputs", "error", "usage", "duration_ms")}
            fields["waiting"] = [step_id for step_id, step in result.steps.items() if step.reason == "approval"]
            self.store.update(self.run_id, result.status, fields, release=True)
        except OrchestratorError as error:
            result.status, result.exception, result.error = "failed", error, _error_summary(error)

def _workflow_text(executor: WorkflowExecutor) -> str:
    """A workflow and those that it calls, as YAML: what a run depends on besides its inputs. Made once for a plan."""
    kept = vars(executor.workflow._plan())
    if "text" not in kept:
        kept["text"] = "\n# ---- called\n".join(one.to_yaml() for one in executor._workflows(executor.workflow))
    return str(kept["text"])

# ---- Requests by content: the cache, and record and replay -----------------------------------------------------------

_SECRET_NAME = "(?i)" r"api[-_]?key|authori[sz]ation|secret|password|credential|cookie|(^|[-_])token$"

def _without_secrets(value: Any) -> Any:
    """A JSON value without the entries whose names say that they are keys."""
    if isinstance(value, Mapping):
        return {name: _without_secrets(item) for name, item in value.items() if not re.search(_SECRET_NAME, str(name))}
    return [_without_secrets(item) for item in value] if isinstance(value, (list, tuple)) else value

def _request_document(name: str, request: Any, provider: Any = None) -> dict[str, Any]:
    """What an answer depends on, as JSON without keys: the provider (by name, or what it is if given), the request."""
    kind = "completion" if hasattr(request, "messages") else "embedding"
    given = {key: value for key, value in vars(request).items() if value not in (None, {}, [])}
    asked = {key: value for key, value in given.items() if key not in ("on_text", "stream")}
    asked = {key: _without_secrets(value) if key == "params" else value for key, value in asked.items()}
    if provider is None:
        return {"kind": kind, "provider": name, **asked}
    options = {key: value for key, value in getattr(provider, "options", {}).items() if value is not None}
    named = getattr(provider, "TYPE", None) or getattr(provider, "__qualname__", type(provider).__qualname__)
    address = getattr(provider, "base_url", None)
    return {"kind": kind, "provider": named, "base_url": address, "options": _without_secrets(options), **asked}

def _answer_document(answer: Any, model: str = "") -> dict[str, Any]:
    """A response, a text that stands for one, or an error of the ProviderError family, as JSON; {} for others."""
    if isinstance(answer, (CompletionResponse, EmbeddingResponse)):
        return dict(vars(answer))
    if isinstance(answer, ProviderError):
        return {"error": {"type": type(answer).__name__, "message": str(answer), **vars(answer)}}
    return dict(vars(CompletionResponse(answer, model))) if isinstance(answer, str) else {}

def _answer_from(kind: str, document: Mapping[str, Any]) -> Any:
    """The response to a completion or embedding that `_answer_document` wrote down; an error is raised."""
    if "error" not in document:
        answer: Any = CompletionResponse("") if kind == "completion" else EmbeddingResponse([])
        vars(answer).update(document)
        return answer
    known, fault = {error.__name__: error for error in ProviderError.__subclasses__()}, dict(document["error"])
    error = known.get(fault.pop("type"), ProviderError)(fault.pop("message"))
    vars(error).update(fault)
    raise error

class ResponseCache(_Database):
    """Answers by the content of their requests, in one SQLite file that threads and processes share. A request is kept
    as its hash only. An answer older than `max_age_seconds` is not given out. When the answers together exceed
    `max_bytes`, those go that were not asked for the longest. A failing cache only warns in the log."""
    APPLICATION_ID = 0x4C4C4D43
    SCHEMA = ("""
        CREATE TABLE answers (hash TEXT PRIMARY KEY, answer TEXT, size INTEGER, stored_at REAL, used_at REAL);
        CREATE INDEX answers_by_use ON answers (used_at, size)""",)

    def __init__(self, path: str | os.PathLike[str], max_age_seconds: float | None = None,
            max_bytes: int | None = None) -> None:
        super().__init__(path)
        self.max_age_seconds = math.inf if max_age_seconds is None else max_age_seconds
        self.max_bytes = None if max_bytes is None else max(0, max_bytes)
        with self._transaction() as execute:
            execute("DELETE FROM answers WHERE stored_at < ?", (time.time() - self.max_age_seconds,))

    def recall(self, name: str, provider: Any, request: Any) -> Any:
        """The answer that was kept for the request, marked as `cached` in its metadata; None if there is none."""
        document, now, answer = _request_document(name, request, provider), time.time(), None
        with self._forgiving():
            key, sql = _digest(document), "SELECT answer FROM answers WHERE hash = ? AND stored_at >= ?"
            with self._transaction(write=False) as execute:
                row = execute(sql, (key, now - self.max_age_seconds)).fetchone()
                answer = _answer_from(document["kind"], json.loads(row[0])) if row else None
            if answer is not None:
                if document["kind"] == "completion":
                    answer.metadata["cached"] = True
                with self._transaction() as execute:
                    execute("UPDATE answers SET used_at = ? WHERE hash = ?", (now, key))
        return answer

    def keep(self, name: str, provider: Any, request: Any, answer: Any) -> None:
        """Keeps a provider's answer, in place of an older one to the same request; errors are not kept."""
        document, now = _answer_document(answer, request.model), time.time()
        if "error" in document or not document:
            return
        with self._forgiving(), self._transaction() as execute:
            key, text = _digest(_request_document(name, request, provider)), _stored_json(document)
            execute("DELETE FROM answers WHERE hash = ?", (key,))
            execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?)", (key, text, len(text), now, now))
            total = "SELECT COALESCE(SUM(size), 0) FROM answers"
            while self.max_bytes is not None and execute(total).fetchone()[0] > self.max_bytes:
                execute("DELETE FROM answers WHERE hash = (SELECT hash FROM answers ORDER BY used_at LIMIT 1)")

    def forget(self, name: str, provider: Any, request: Any) -> None:
        """Drops what is kept for a request."""
        with self._forgiving(), self._transaction() as execute:
            execute("DELETE FROM answers WHERE hash = ?", (_digest(_request_document(name, request, provider)),))

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OrchestratorError as error:
            _logger().warning("the cache is not used: %s", error)

class Cassette:
    """Requests and their answers as JSON lines {"request", "response"}: written anew, or answered from."""

    def __init__(self, path: str, replay: bool) -> None:
        self.path, self.replays, self.lock = path, replay, threading.Lock()
        self.answers: dict[str, collections.deque[Any]] = {}  # request as JSON -> answers not given yet, in their order
        opener = functools.partial(os.open, mode=0o600)
        try:
            self.file = None if replay else open(path, "w", encoding="ascii", opener=opener)  # noqa: SIM115
        except OSError as error:
            raise OrchestratorError(f"{path}: cannot be written: {error.strerror}") from None
        for number, line in enumerate(_read_file(path).splitlines() if replay else (), 1):
            try:
                entry = json.loads(line)
                key, answer = _stored_json(entry["request"], sort_keys=True), dict(entry["response"])
                self.answers.setdefault(key, collections.deque()).append(answer)
            except (ValueError, KeyError, TypeError) as error:
                raise OrchestratorError(f"{path}:{number}: not a request with its response: {error!r}") from None

    def keep(self, name: str, provider: Any, request: Any, answer: Any) -> None:
        """Records a provider's answer, or its error."""
        response = _answer_document(answer, request.model)
        if "metadata" in response:
            response["metadata"] = _without_secrets(response["metadata"])
        line = _stored_json({"request": _request_document(name, request), "response": response})
        with self.lock:
            if self.file is not None and response:
                try:
                    self.file.write(line + "\n")
                    self.file.flush()
                except (OSError, ValueError) as error:  # a full disk; a file that was closed
                    raise OrchestratorError(f"{self.path}: cannot be written: {error}") from None

    def recall(self, name: str, provider: Any, request: Any) -> Any:
        """The next recorded answer to the same request; None while recording. A recorded error is raised; without an
        answer, an ExecutionError shows the nearest recorded request."""
        if not self.replays:
            return None
        document = _request_document(name, request)
        key = _stored_json(document, sort_keys=True)
        with self.lock:
            if self.answers.get(key):
                return _answer_from(document["kind"], self.answers[key].popleft())
        reason = "it was recorded, but not as often" if key in self.answers else self._nearest(key)
        raise ExecutionError(f"{self.path} has no answer to this request: {reason}")

    def _nearest(self, key: str) -> str:
        """How the request differs from the recorded one that has most words in common with it."""
        words = set(re.findall(r"\w+", key))
        def likeness(recorded: str) -> float:
            others = set(re.findall(r"\w+", recorded))
            return len(words & others) / (len(words | others) or 1)
        if not self.answers:
            return "nothing is recorded"
        nearest = max(self.answers, key=likeness)
        lines = _workflow_diff(*(json.dumps(json.loads(text), indent=1, ensure_ascii=False) for text in (nearest, key)))
        return "\n".join(["the nearest one differs:", *(_shorten(line, 300) for line in lines.split("\n")[2:40])])

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

# ---------------------------------------------------------------------------------------------------------------------
# 15. Events, logging, metrics
# Events are dicts: type, run_id, time, step_id and what belongs to the type. They are made only when someone listens.
# ---------------------------------------------------------------------------------------------------------------------

_EVENT_LEVELS = {
    "step_failed": "error", "step_retry": "warning", "step_fallback": "warning", "circuit": "warning",
    "step_pending": "debug", "step_running": "debug", "provider_call": "debug", "text": "debug",
}

@functools.lru_cache
def _logger() -> logging.Logger:
    """The logger `llm_orchestrator`, silent until the application configures logging."""
    logger = logging.getLogger("llm_orchestrator")
    logger.addHandler(logging.NullHandler())
    return logger

def _enabled_logger() -> logging.Logger | None:
    """The logger if anybody would see its messages."""
    return _logger() if "logging" in sys.modules and _logger().isEnabledFor(40) and _has_handlers(_logger()) else None

def _has_handlers(logger: Any) -> bool:
    while logger is not None:
        if any(not isinstance(handler, logging.NullHandler) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False

def _log_event(logger: logging.Logger, event: Mapping[str, Any]) -> None:
    name = event.get("level") or _EVENT_LEVELS.get(event["type"], "info")
    level = getattr(logging, str(name).upper(), logging.INFO)
    if logger.isEnabledFor(level):
        logger.log(level, "%s", _event_text(event), extra={"event": event})

def _event_text(event: Mapping[str, Any]) -> str:
    """An event as one line: "step greet completed duration_ms=12.3 attempts=1"."""
    kind, _, rest = event["type"].partition("_")
    words = [kind, event.get("step_id", ""), rest] if kind == "step" else [kind, rest, event.get("step_id", "")]
    subject = " ".join(filter(None, words))
    details = []
    for name, value in event.items():
        if name in ("type", "run_id", "time", "step_id", "step_type", "level"):
            continue
        if name == "error":
            value = value["message"] if isinstance(value, Mapping) else value
        if name == "usage":
            name, value = "tokens", value["total_tokens"]
        details.append(str(value) if name == "message" else f"{name}={_shorten(_to_text(value), 300)}")
    return " ".join([subject, *details])

# ---------------------------------------------------------------------------------------------------------------------
# 16. Pictures and reports
# A workflow goes in; Mermaid, Graphviz DOT or a tree in plain text comes out.
# ---------------------------------------------------------------------------------------------------------------------

_MERMAID_SHAPES = {"action": "[/ /]", "approval": "{{ }}", "transform": "([ ])", "workflow": "[[ ]]"}

def _step_kind(node: _Node) -> str:
    return node.type + (" for each" if node.for_each else "")

def _boxes(workflow: Workflow, step: Callable[[_Node, str, int], tuple[str, list[str]]],
        group: Callable[[str, int, str], str], close: str, arrow: Callable[[str, str, str], str]) -> Iterator[str]:
    """The lines of a picture: steps, containers around their children, a branch's branches in between; then edges.

    `step` gives (name, lines) from a step, its path and its number, `group` opens a branch, `arrow` is from, to, if.
    """
    names: dict[int, str] = {}

    def draw(graph: _Graph, prefix: str, indent: str) -> Iterator[str]:
        for node in graph.nodes:
            path = prefix + node.id
            name, lines = step(node, path, len(names))
            names[id(node)] = name
            yield from (indent + line for line in lines)
            for number, (title, inner) in enumerate(node.groups()):
                yield from [f"{indent}    {group(name, number, title)}"] if title else []
                yield from draw(inner, f"{path}.{title}." if title else f"{path}.", indent + "    " * (1 + bool(title)))
                yield from [f"{indent}    {close}"] if title else []
            yield from [indent + close] if node.groups() else []

    top = workflow._plan().graph
    yield from draw(top, "", "    ")
    for siblings in (top, *(inner for node in top.walk() for inner in node.graphs())):
        for node in siblings.nodes:
            condition = _shorten(" ".join(node.condition.source.split()), 60) if node.condition else ""
            for dependency in node.dependencies:
                yield "    " + arrow(names[id(siblings.by_id[dependency])], names[id(node)], condition)

def _graph_mermaid(workflow: Workflow) -> str:
    """The workflow as a Mermaid flowchart; containers are subgraphs, and so are the branches of a branch."""

    def text(source: str) -> str:  # as https://mermaid.js.org/syntax/flowchart.html says, by entity codes
        return re.sub(r"[^\w .,:=+/()\[\]'-]", lambda match: f"#{ord(match[0])};", " ".join(source.split()))

    def step(node: _Node, path: str, number: int) -> tuple[str, list[str]]:
        name, label = re.sub("[^A-Za-z0-9]", "_", node.id), f"{text(node.id)}<br/><i>{_step_kind(node)}</i>"
        name, (left, right) = f"s{number}_{name}", _MERMAID_SHAPES.get(node.type, "[ ]").split()
        return name, [f'subgraph {name}["{label}"]' if node.groups() else f'{name}{left}"{label}"{right}']

    group = lambda name, number, title: f'subgraph {name}_{number}["{text(title)}"]'
    arrow = lambda start, end, given: f'{start} -.->|"{text(given)}"| {end}' if given else f"{start} --> {end}"
    return "\n".join(["flowchart TD", *_boxes(workflow, step, group, "end", arrow)]) + "\n"

def _graph_dot(workflow: Workflow) -> str:
    """The workflow in Graphviz' language; containers are clusters around themselves and their children."""

    def cluster(name: str, title: str) -> str:
        return f"subgraph {_to_json('cluster ' + name)} {{ label={_to_json(title)};"

    def step(node: _Node, path: str, number: int) -> tuple[str, list[str]]:
        label, shape = _to_json(f"{node.id}\n{_step_kind(node)}"), ", shape=diamond" if node.type == "branch" else ""
        opening = [cluster(path, "")] if node.groups() else []
        return path, [*opening, f"{_to_json(path)} [label={label}{shape}];"]

    def arrow(start: str, end: str, given: str) -> str:
        return f"{_to_json(start)} -> {_to_json(end)}{f' [style=dashed, label={_to_json(given)}]' if given else ''};"

    head = [f"digraph {_to_json(str(workflow.name))} {{", "    node [shape=box, style=rounded];"]
    boxes = _boxes(workflow, step, lambda name, number, title: cluster(f"{name}.{title}.", title), "}", arrow)
    return "\n".join([*head, *boxes, "}"]) + "\n"

def _graph_text(workflow: Workflow) -> str:
    """The workflow as a tree in the order of its levels, each step with what it waits for."""

    def draw(graph: _Graph, indent: str) -> Iterator[str]:
        ordered = [node for level in _levels(graph) for node in level]
        for node in ordered:
            last = node is ordered[-1]
            branch, deeper = "└── " if last else "├── ", indent + ("    " if last else "│   ")
            after = f" <- {', '.join(node.dependencies)}" if node.dependencies else ""
            condition = f" if {' '.join(node.condition.source.split())}" if node.condition else ""
            yield f"{indent}{branch}{node.id} ({_step_kind(node)}{condition}){after}"
            for title, inner in node.groups():
                yield from [f"{deeper}[{' '.join(title.split())}]"] if title else []
                yield from draw(inner, deeper)

    return "\n".join([" ".join(str(workflow.name).split()), *draw(workflow._plan().graph, "")]) + "\n"

_PICTURES = {"mermaid": _graph_mermaid, "dot": _graph_dot, "text": _graph_text}

# ---------------------------------------------------------------------------------------------------------------------
# 17. Command line
# Each command parses its arguments, calls the module and prints. stdout carries results only; the rest is stderr's.
# ---------------------------------------------------------------------------------------------------------------------

_EXIT_COMPLETED, _EXIT_FAILED, _EXIT_USAGE, _EXIT_INTERRUPTED = 0, 1, 2, 130

_PROGRAM = "python -m llm_orchestrator"
_FILE = ("file", {"metavar": "FILE", "help": "a workflow in YAML or JSON; - for standard input"})
_COMMON_OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("-v --verbose", {"action": "count", "default": 0, "help": "log every call too, not only how steps end"}),
    ("-q --quiet", {"action": "store_true", "help": "errors only"}),
    ("--log-format", {"choices": ("text", "json"), "default": "text", "help": "how stderr's log lines look"}),
    ("--debug", {"action": "store_true", "help": "show tracebacks"}),
)
_STORE = ("--store", {"metavar": "FILE", "help": "the SQLite file that keeps runs (default: $LLM_ORCHESTRATOR_STORE)"})
_JSON = ("--json", {"action": "store_true", "help": "print JSON"})

def _up_to(kind: Callable[[str], float], most: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not 0 <= value <= most:
            raise argparse.ArgumentTypeError(f"must be from 0 to {most:g}, not {text}")
        return value
    return number

_RUN_STATUSES = ("completed", "failed", "cancelled", "timed_out", "paused", "running", "interrupted")

_RUN_OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("-i --input", {"metavar": "JSON|FILE|-", "help": "inputs: a JSON object, or a JSON or YAML file that holds one"}),
    ("--set", {"action": "append", "default": [], "metavar": "KEY=VALUE",
               "help": "one input; JSON if it parses, else text"}),
    ("--max-concurrency", {"type": int, "metavar": "N", "help": "calls in flight at once (the workflow's own, or 4)"}),
    ("--offline", {"action": "store_true", "help": "answer llm and embed steps from the built-in echo provider"}),
    ("--stream", {"action": "store_true", "help": "show the models' answers on stderr as they arrive"}),
    ("--plugin", {"action": "append", "default": [], "metavar": "FILE.py",
                  "help": "a Python file with dicts named actions, transforms, tools, providers or vector_stores"}),
    ("--print", {"dest": "path", "metavar": "PATH", "help": "print one value, raw: outputs.x, steps.a.text, status"}),
    ("-o --out", {"metavar": "FILE", "help": "write the result there instead of to stdout"}),
    ("--cache", {"metavar": "FILE", "help": "answer repeated calls from this SQLite file, and keep new answers there"}),
    ("--cache-max-age", {"metavar": "AGE", "help": "cache: answers older than this, such as 7d, are asked anew"}),
    ("--cache-max-mb", {"type": _up_to(float, 1e9), "metavar": "N",
                        "help": "cache: the least used answers go beyond this size"}),
    ("--audit-texts", {"action": "store_true", "help": "store: the audit gets prompts and answers, not only hashes"}),
    ("--record", {"metavar": "FILE", "help": "write the calls of providers and their answers to this file"}),
    ("--replay", {"metavar": "FILE", "help": "answer the calls of providers from a file that --record wrote"}),
    ("--batch", {"metavar": "FILE", "help": "run once a line, a JSON object of inputs; --out takes the results"}),
    ("--keep-going", {"action": "store_true", "help": "batch: report lines that are no valid inputs, and go on"}),
    ("--output-dir", {"metavar": "DIR", "help": "where write_file writes (default: output)"}),
)
# command -> (what it does, an example, its arguments)
_COMMAND_LINE: dict[str, tuple[str, str, tuple[tuple[str, dict[str, Any]], ...]]] = {
    "validate": ("check workflows and report every problem", "validate examples/*.yaml", (
        ("files", {"nargs": "+", "metavar": "FILE", "help": "workflows in YAML or JSON; - for standard input"}),
        _JSON,
    )),
    "run": ("run a workflow and print its result as JSON",
            "run wf.yaml --set name=Alice --print outputs.answer", (_FILE, _STORE, *_RUN_OPTIONS)),
    "resume": ("go on with a stored run where it stopped", "resume 5f3c2b6d9a0e4c11 --store runs.db", (
        ("run_id", {"nargs": "?", "metavar": "RUN_ID", "help": "the run's id, as `runs list` shows it"}), _STORE,
        ("--failed", {"action": "store_true", "help": "resume every run that failed or was interrupted"}),
        ("--from", {"dest": "from_step", "metavar": "STEP", "help": "run this step and all that follows it again"}),
        ("--force", {"action": "store_true", "help": "go on although the workflow has changed"}),
        ("--approve", {"action": "append", "default": [], "metavar": "STEP", "help": "approve a step that waits"}),
        ("--reject", {"action": "append", "default": [], "metavar": "STEP", "help": "let a step that waits fail"}),
        *_RUN_OPTIONS[1:],
    )),
    "runs": ("look at stored runs", "runs list --store runs.db", (
        ("action", {"choices": ("list", "show", "failures", "audit", "export", "delete", "prune"),
                    "help": "list runs; show, audit, export or delete one; failures: steps that failed for good"}),
        ("run_id", {"nargs": "?", "metavar": "RUN_ID", "help": "the run, for show, audit, export and delete"}), _STORE,
        ("--status", {"choices": _RUN_STATUSES, "metavar": "STATUS",
                      "help": f"list: only runs of this status: {', '.join(_RUN_STATUSES)}"}),
        ("--limit", {"type": _up_to(int, 10**9), "default": 100, "metavar": "N",
                     "help": "list: at most so many, the newest (100)"}),
        ("--older-than", {"metavar": "AGE", "help": "prune: ended runs older than this, such as 30d or 12h"}),
        ("--verify", {"action": "store_true", "help": "audit: find any edit; exit status 1 if there is one"}), _JSON,
    )),
    "graph": ("draw a workflow", "graph wf.yaml --format text", (
        _FILE, ("--format", {"choices": tuple(_PICTURES), "default": "mermaid", "help": "default: mermaid"}),
    )),
}

def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_PROGRAM,
        description="Runs workflows of language-model calls, written as a YAML graph of steps.",
        epilog="exit status: 0 completed, 1 the run failed, 2 bad usage or an invalid workflow, 130 interrupted")
    parser.add_argument("--version", action="version", version=f"llm_orchestrator {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (what, example, arguments) in _COMMAND_LINE.items():
        command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.",
                                      epilog=f"example: {_PROGRAM} {example}")
        for flags, settings in (*arguments, *_COMMON_OPTIONS):
            command.add_argument(*flags.split(), **settings)
    return parser

def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status. Prints errors and failures, never a traceback without --debug."""
    _use_utf8(sys.stdout, sys.stderr)
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as error:  # argparse has said why
        return error.code if isinstance(error.code, int) else _EXIT_USAGE
    try:
        return _COMMANDS[options.command](options)
    except BrokenPipeError:  # the reader of stdout has gone: nothing is left to say, not even at exit
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_FAILED
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    except OrchestratorError as error:
        if options.debug:
            raise
        _complain(str(error))
        return _EXIT_USAGE
    except Exception as error:
        if options.debug:
            raise
        _complain(f"internal error: {type(error).__name__}: {error} (--debug shows where; please report it)")
        return _EXIT_FAILED

def _use_utf8(*streams: Any) -> None:
    """Text that the terminal's encoding lacks is escaped instead of ending the program."""
    for stream in streams:
        with contextlib.suppress(Exception):
            encoding = (stream.encoding or "").lower().replace("-", "")
            stream.reconfigure(errors="backslashreplace" if encoding != "utf8" else "surrogateescape")

def _complain(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)

def _load_workflow(name: str) -> Workflow:
    if name != "-":
        return Workflow.from_file(name)
    text = sys.stdin.buffer.read()
    load = _load_json if text.lstrip()[:1] == b"{" else load_yaml
    return Workflow._from_text(text, load, "<stdin>", os.getcwd(), {})

def _validate_command(options: argparse.Namespace) -> int:
    status, report = _EXIT_COMPLETED, []
    for name in options.files:
        problems: list[Any] = []
        try:
            workflow = _load_workflow(name)
            problems += workflow.validate()
            summary = f"{name}: valid: {workflow.name}, {len(workflow.steps)} steps"
        except ValidationError as error:
            problems += error.problems
        except OrchestratorError as error:
            problems.append(error)
        failed = any(getattr(problem, "severity", "error") == "error" for problem in problems)
        status = _EXIT_USAGE if failed else status
        for problem in problems if not options.json else ():
            _complain(str(problem))
        if not options.json and not failed and not options.quiet:
            print(summary)
        report.append({"file": name, "valid": not failed, "problems": list(map(_problem_entry, problems))})
    if options.json:
        print(_to_json(report, indent=2))
    return status

def _problem_entry(problem: Any) -> dict[str, Any]:
    names = ("severity", "line", "column", "path", "message")
    entry = {name: getattr(problem, name, None) for name in names}
    entry["severity"] = entry["severity"] or "error"
    entry["message"] = getattr(problem, "reason", None) or entry["message"] or str(problem)
    return entry

def _graph_command(options: argparse.Namespace) -> int:
    workflow = _load_workflow(options.file)
    workflow.validate()
    sys.stdout.write(_PICTURES[options.format](workflow))
    sys.stdout.flush()
    return _EXIT_COMPLETED

def _run_command(options: argparse.Namespace) -> int:
    if options.file == "-" and options.input == "-":
        raise OrchestratorError("the workflow and the inputs cannot both come from standard input")
    workflow = _load_workflow(options.file)
    inputs = _read_inputs(options.input, options.set, workflow.inputs or {})
    with contextlib.ExitStack() as opened:
        store = _open_store(options, opened)
        return (_execute if options.batch is None else _run_batch)(options, workflow, inputs, store, opened)

def _execute(options: argparse.Namespace, workflow: Workflow, inputs: Mapping[str, Any] | None, store: Any,
        opened: contextlib.ExitStack, **resume: Any) -> int:
    """Runs a workflow, or goes on with a stored run, under the options of the command line; the exit status."""
    reporter = _Reporter(options, len(workflow.steps))
    executor = _make_executor(options, workflow, inputs, store, opened, reporter.on_event if reporter.wanted else None)
    with _signals(executor) as received:
        result = executor.resume(**resume) if resume else executor.run()
    reporter.close()
    written = _write_result(result, options)
    if result.error is not None:
        _complain(f"{result.status}: {result.error['type']}: {result.error['message']}")
    for step_id, step in result.items() if result.status == "paused" else ():
        if step.reason == "approval":
            again = f"{_PROGRAM} resume {result.run_id} --store {store.name} --approve {step_id}"
            _complain(f"paused: {step_id} waits for approval: {again}")
    if received or result.status == "cancelled":
        return 128 + received[0] if received else _EXIT_INTERRUPTED
    return _EXIT_COMPLETED if written and result.status in ("completed", "paused") else _EXIT_FAILED

def _make_executor(options: argparse.Namespace, workflow: Workflow, inputs: Any, store: Any,
        opened: contextlib.ExitStack, on_event: Any) -> WorkflowExecutor:
    """An executor under the options of the command line; what it keeps open is closed with `opened`."""
    if options.record and options.replay:
        raise OrchestratorError("--record and --replay exclude each other")
    tape = options.record or options.replay
    cassette = opened.enter_context(contextlib.closing(Cassette(tape, bool(options.replay)))) if tape else None
    cache = None
    if options.cache:
        age = None if options.cache_max_age is None else _parse_age(options.cache_max_age)
        size = None if options.cache_max_mb is None else int(options.cache_max_mb * 1e6)
        cache = opened.enter_context(contextlib.closing(ResponseCache(options.cache, age, size)))
    executor = WorkflowExecutor(workflow, inputs, max_concurrency=options.max_concurrency, offline=options.offline,
        streaming=options.stream, output_folder=options.output_dir or "output", on_event=on_event, store=store,
        cache=cache, cassette=cassette, audit_texts=options.audit_texts, **_load_plugins(options.plugin or []))
    executor.launch = {name: getattr(options, name) for name in _LAUNCH_OPTIONS}
    executor.launch["plugin"] = list(map(os.path.abspath, options.plugin or ()))
    for warning in executor.warnings if not options.quiet else ():
        if warning.custom is None:
            _complain(str(warning))
    return executor

def _run_batch(options: argparse.Namespace, workflow: Workflow, inputs: Any, store: Any,
        opened: contextlib.ExitStack) -> int:
    """Runs a workflow once for each line of a file; --input and --set are what the lines have in common."""
    if options.path is not None:
        raise OrchestratorError("--print shows a value of one result; --batch gives the results of all lines")
    executor = _make_executor(options, workflow, _LATER, store, opened, None)
    batch = _Batch(options, workflow, inputs)
    with _signals(executor) as received, contextlib.closing(batch):
        asyncio.run(batch.run(executor, inputs, received))
    return 128 + received[0] if received else _EXIT_FAILED if batch.failed else _EXIT_COMPLETED

_LAUNCH_OPTIONS = ("plugin", "offline", "max_concurrency", "output_dir", "audit_texts")  # that a resumed run takes over

def _open_store(options: argparse.Namespace, opened: contextlib.ExitStack, needed: bool = False) -> Any:
    """The store of --store or of the environment, closed with `opened`; None if there is none."""
    path = options.store or os.environ.get("LLM_ORCHESTRATOR_STORE")
    if not path and needed:
        raise OrchestratorError("say which store holds the runs: --store FILE, or LLM_ORCHESTRATOR_STORE")
    return opened.enter_context(contextlib.closing(SQLiteStore(path))) if path else None

def _resume_command(options: argparse.Namespace) -> int:
    if bool(options.run_id) == options.failed:
        raise OrchestratorError("give the id of a run, or --failed for all that failed or were interrupted")
    if options.failed and options.out is not None:
        raise OrchestratorError("--failed gives a result for each run: leave --out away, and redirect stdout")
    with contextlib.ExitStack() as opened:
        store = _open_store(options, opened, needed=True)
        run_ids = [options.run_id]
        if options.failed:
            run_ids = [run["run_id"] for run in store.runs(10**9) if run["status"] in ("failed", "interrupted")]
        status = _EXIT_COMPLETED
        for run_id in run_ids:
            try:
                status = max(status, _resume_run(options, store, run_id, opened))
            except OrchestratorError as error:  # one that cannot be resumed does not keep the others from it
                if not options.failed:
                    raise
                status = _EXIT_USAGE
                _complain(f"run {run_id}: {error}")
        return status

def _resume_run(given: argparse.Namespace, store: Any, run_id: str, opened: contextlib.ExitStack) -> int:
    """Goes on with one run: its workflow's file as it is now, or the recorded text if that file is gone."""
    recorded, options = store.load(run_id), type(given)(**vars(given))
    for name in _LAUNCH_OPTIONS:
        setattr(options, name, getattr(options, name) or (recorded.get("launch") or {}).get(name))
    source = recorded.get("source")
    if source and os.path.exists(source):
        workflow = Workflow.from_file(source)
    else:
        workflow = Workflow.from_yaml(recorded["workflow_text"].split("\n# ---- called\n")[0])
        workflow.source, workflow.folder = source or workflow.source, os.path.dirname(source) if source else None
    values = _read_inputs(None, options.set, {})
    decisions: dict[str, tuple[bool, dict[str, Any]]] = dict.fromkeys(options.approve, (True, values))
    decisions.update(dict.fromkeys(options.reject, (False, {})))
    waiting = recorded.get("waiting") or []
    for step_id in decisions:
        if step_id not in waiting:
            near = _suggestion(step_id, waiting)
            raise OrchestratorError(f"run {run_id}: no step {step_id!r} waits for approval{near}")
    again = {"run_id": run_id, "from_step": options.from_step, "force": options.force, "decisions": decisions}
    return _execute(options, workflow, recorded.get("inputs"), store, opened, **again)

def _runs_command(options: argparse.Namespace) -> int:
    if (options.run_id is None) == (options.action in ("show", "audit", "export", "delete")):
        wanted = "the id of a run" if options.run_id is None else "no run"
        raise OrchestratorError(f"runs {options.action} takes {wanted}")
    if (options.action == "prune") != bool(options.older_than):
        raise OrchestratorError("runs prune needs --older-than, such as 30d; other actions take none")
    with contextlib.ExitStack() as opened:
        store = _open_store(options, opened, needed=True)
        status, found = _EXIT_COMPLETED, _RUNS_ACTIONS[options.action](store, options)
        if options.action == "audit" and options.verify:
            found = store.verify(options.run_id)
            status = _EXIT_FAILED if found else _EXIT_COMPLETED
        if options.json or options.action == "export":
            print(_to_json(found, indent=2))
        elif options.action == "show":
            steps = [{"step": step_id, **state} for step_id, state in found.pop("steps").items()]
            facts = {name: value for name, value in found.items() if name not in ("workflow_text", "launch")}
            print(*(f"{name}: {_cell(name, value)}" for name, value in facts.items()), sep="\n")
            _print_table(steps, ("step", "type", "status", "attempts", "duration_ms", "error", "reason"))
        elif found and isinstance(found[0], dict):
            _print_table(found, _RUNS_COLUMNS[options.action])
        else:
            print(*(found or [_NOTHING.get(options.action, "none")]), sep="\n")
    return status

_RUNS_ACTIONS: dict[str, Callable[[Any, argparse.Namespace], Any]] = {
    "list": lambda store, options: store.runs(options.limit, options.status),
    "show": lambda store, options: store.load(options.run_id),
    "failures": lambda store, options: store.failures(),
    "audit": lambda store, options: store.audit(options.run_id),
    "export": lambda store, options: store.export(options.run_id),
    "delete": lambda store, options: [options.run_id][: store.delete(options.run_id) or 1],
    "prune": lambda store, options: store.prune(_parse_age(options.older_than)),
}
_RUNS_COLUMNS = {
    "list": ("run_id", "workflow", "status", "started_at", "updated_at"),
    "failures": ("run_id", "workflow", "step_id", "attempts", "error"),
    "audit": ("number", "time", "kind", "details"),
}
_NOTHING = {
    "list": "no runs", "failures": "no failures", "audit": "the audit trail is whole", "prune": "nothing to delete",
}

def _cell(name: str, value: Any) -> str:
    """A value in a table or a line."""
    if value is not None and (name == "time" or name.endswith("_at")):
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    if name == "error" and isinstance(value, Mapping):
        value = value.get("message")
    return "" if value is None else _shorten(_to_text(value).replace("\n", " "), 100)

def _print_table(rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
    cells = [columns, *([_cell(name, row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())

@contextlib.contextmanager
def _signals(executor: WorkflowExecutor) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM stop the run, so that its partial result is printed; a second one ends the process."""
    received: list[int] = []

    def stop(number: int, frame: Any) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        executor.cancel()

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(number, stop) for number in numbers]
    except ValueError:  # not in the main thread: signals are somebody else's
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)

def _read_inputs(source: str | None, settings: list[str], declared: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of --input and --set; the latter wins."""
    inputs: dict[str, Any] = {}
    if source is not None:
        text: str | bytes = source
        name = "--input"
        if source == "-":
            text, name = sys.stdin.buffer.read(), "<stdin>"
        elif source.lstrip()[:1] not in ("{", "["):
            text, name = _read_file(source), source
        try:
            loaded = (load_yaml if name.lower().endswith((".yaml", ".yml")) else _load_json)(text)
        except ParseError as error:
            error.source = name
            raise
        if not isinstance(loaded, Mapping):
            raise OrchestratorError(f"{name}: inputs must be a JSON object, not {_shown(loaded)}")
        inputs.update(loaded)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise OrchestratorError(f"--set {setting}: must be KEY=VALUE")
        kind = str((declared.get(key) or {}).get("type"))
        inputs[key] = value
        if _INPUT_TYPE_ALIASES.get(kind, kind) != "string":
            with contextlib.suppress(ParseError):
                inputs[key] = _load_json(value)
    return inputs

_PLUGIN_TABLES = ("actions", "transforms", "tools", "providers", "vector_stores")

def _load_plugins(paths: list[str]) -> dict[str, dict[str, Any]]:
    """What plugin files define: the dicts of these names. `import llm_orchestrator` in one gives this very module."""
    import importlib.util

    found: dict[str, dict[str, Any]] = {name: {} for name in _PLUGIN_TABLES}
    sys.modules.setdefault("llm_orchestrator", sys.modules[__name__])
    for index, path in enumerate(paths):
        spec = importlib.util.spec_from_file_location(f"llm_orchestrator_plugin_{index}", path)
        if spec is None or spec.loader is None:
            raise OrchestratorError(f"{path}: is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise OrchestratorError(f"{path}: {type(error).__name__}: {error}") from error
        known = [table for table in found if isinstance(getattr(module, table, None), Mapping)]
        if not known:
            raise OrchestratorError(f"{path}: defines none of the dicts {', '.join(found)}")
        for table in known:
            found[table].update(getattr(module, table))
    return found

def _write_result(result: RunResult, options: argparse.Namespace) -> bool:
    """Writes the result where it is wanted; False if that cannot be."""
    document, written, text = result.to_dict(), True, ""
    if options.path is None:
        text = _escaped_for(sys.stdout if options.out is None else None, _to_json(document, indent=2) + "\n")
    elif (value := _printed(document, options.path)) is not _MISSING:
        text = value if isinstance(value, str) else "" if value is None else _to_json(value, indent=2)
        text += "" if text.endswith("\n") else "\n"
        if re.search("[\ud800-\udfff]", text):  # no characters, but a plugin may have returned them
            text = text.encode("utf-8", "backslashreplace").decode()
    else:
        _complain(f"--print {options.path}: the result of run {result.run_id} has no such value")
        written = False
    if options.out is not None:
        try:
            _replace_file(options.out, text)
            return written
        except (OSError, ValueError) as error:  # the result must not be lost
            reason = getattr(error, "strerror", error)
            _complain(f"{options.out}: cannot be written: {reason}; the result goes to stdout")
            written = False
    sys.stdout.write(text)
    sys.stdout.flush()
    return written

def _escaped_for(stream: Any, text: str) -> str:
    """JSON text for a stream whose encoding may lack some characters: those as JSON's own escapes."""
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return re.sub("[^\x00-\x7f]", lambda match: json.dumps(match[0])[1:-1], text)
    return text

def _printed(document: Mapping[str, Any], path: str) -> Any:
    """A value by its path in the JSON result, or in a step as templates write it (steps.a.text); _MISSING if none."""
    steps, value = document["steps"], document
    named = [step_id for step_id in steps if f"{path}.".startswith(f"steps.{step_id}.")]
    if named:
        step = steps[max(named, key=len)]
        path = path[len(f"steps.{step['step_id']}.") :]
        value = {**step, "output": next(iter(step["outputs"].values()), None), **step["outputs"]}
        path = path or "output"
    for part in path.split("."):
        value = _child(value, part)
    return value

class _Batch:
    """The lines of a file of inputs, and their results in the same order in --out (or on stdout).

    What ends before its turn waits in OUT.partial, so that after a kill no line that had ended runs again.
    """

    WINDOW = 1000  # lines that may have ended before the oldest that has not

    def __init__(self, options: argparse.Namespace, workflow: Workflow, common: Mapping[str, Any]) -> None:
        self.options, self.started, self.shown = options, time.monotonic(), 0.0
        self.next = self.lines = self.done = self.failed = self.total = 0  # the next line to write out; counts of lines
        self.early: dict[int, str] = {}  # results that came before their turn
        self.fault: OrchestratorError | None = None  # the bad line that ends the batch
        plugins = [os.path.abspath(path) for path in options.plugin or ()]
        made_of = [workflow.to_yaml(), common, options.offline, plugins, options.replay]
        digest = hashlib.sha256(_to_json(made_of).encode("utf-8", "surrogatepass"))
        try:
            with open(options.batch, "rb") as lines:
                for line in lines:
                    self.lines += 1
                    self.total += bool(line.strip())
                    digest.update(line)
        except OSError as error:
            raise OrchestratorError(f"{options.batch}: cannot be read: {error.strerror}") from None
        self.identity = digest.hexdigest()
        self.out: Any = sys.stdout
        self.partial: Any = None
        if options.out is not None:
            try:
                self.open(options.out)
            except OSError as error:
                raise OrchestratorError(f"{options.out}: {error.strerror}") from None
        self.resumed = self.next + len(self.early)

    def open(self, path: str) -> None:
        """Opens the results, and takes over what an earlier run of the same batch has done."""
        partial = f"{path}.partial"
        if os.path.exists(partial):
            with open(partial, encoding="utf-8", errors="replace") as lines:
                whole = [line for line in lines if line.endswith("\n")]
            if not whole or whole[0].strip() != _to_json(self.identity):
                raise OrchestratorError(f"{partial} is of another batch: remove it, or choose another --out")
            with open(path, "a+b") as out:
                out.seek(0)
                size = 0
                for written in out:
                    if written.endswith(b"\n"):
                        size += len(written)
                        entry = json.loads(written)
                        self.count(entry)
                        self.next = entry["line"]
                out.truncate(size)
            for line in whole[1:]:
                entry = json.loads(line)
                if entry["line"] > self.next:
                    self.early[entry["line"] - 1] = line
                    self.count(entry)
        elif os.path.exists(path):
            raise OrchestratorError(f"{path} is there, but no unfinished batch: remove it, or choose another --out")
        _replace_file(partial, "".join([_to_json(self.identity) + "\n", *self.early.values()]))
        self.partial = open(partial, "a", encoding="utf-8", newline="")  # noqa: SIM115
        self.out = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115
        self.write_out()

    def inputs(self, common: Mapping[str, Any]) -> Iterator[tuple[int, Any]]:
        """(index, inputs) of the lines that are still to do; bad lines end the batch, or are reported."""
        with open(self.options.batch, "rb") as lines:
            for index, line in enumerate(lines):
                if index < self.next or index in self.early:
                    continue
                if not line.strip():
                    self.put(index, None)
                    continue
                try:
                    values = _load_json(line)
                    if not isinstance(values, dict):
                        raise ValidationError(f"inputs must be a JSON object, not {_shown(values)}")
                    yield index, {**common, **values}
                except (ParseError, ValidationError) as error:
                    self.bad_line(index, error)

    def bad_line(self, index: int, error: OrchestratorError) -> None:
        """Reports a line, or has the batch end when what is running has ended."""
        fault = OrchestratorError(f"{self.options.batch}:{index + 1}: {getattr(error, 'reason', error)}")
        if not self.options.keep_going:
            self.fault = self.fault or OrchestratorError(f"{fault} (--keep-going skips such lines)")
            return
        _complain(str(fault))
        self.put(index, {"status": "invalid", "error": {**_error_summary(error), "message": str(fault)}})

    async def run(self, executor: WorkflowExecutor, common: Mapping[str, Any], received: list[int]) -> None:
        def may_start() -> bool:
            return len(self.early) < self.WINDOW and self.fault is None and not received

        async for index, result in executor.each(self.inputs(common), executor.max_concurrency, may_start):
            if isinstance(result, ValidationError):
                self.bad_line(index, result)
            elif result.status != "cancelled":
                self.put(index, result.to_dict())
            self.report()
        if self.fault is not None:
            raise self.fault

    def put(self, index: int, result: dict[str, Any] | None) -> None:
        """Takes the result of a line (None: an empty one), and writes out all whose turn has come."""
        line = "" if result is None else _to_json({"line": index + 1, **result}) + "\n"
        self.early[index] = line
        if line:
            self.count(json.loads(line))
        if index != self.next and self.partial is not None:
            self.partial.write(line)
            self.partial.flush()
        self.write_out()

    def count(self, entry: Mapping[str, Any]) -> None:
        self.done += 1
        self.failed += entry["status"] not in ("completed", "paused")

    def write_out(self) -> None:
        while self.next in self.early:
            self.out.write(self.early.pop(self.next))
            self.next += 1
        self.out.flush()

    def report(self) -> None:
        """A line on stderr now and then: how far it is, how fast, how long it will take."""
        now = time.monotonic()
        if self.options.quiet or (now - self.shown < 2 and self.done < self.total):
            return
        self.shown, speed = now, max(1, self.done - self.resumed) / max(1e-9, now - self.started)
        left = (self.total - self.done) / speed
        rest = f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min" if left < 7200 else f"{left / 3600:.1f} h"
        _complain(f"batch: {self.done}/{self.total} lines, {self.failed} failed, {speed:.1f} a second, {rest} left")

    def close(self) -> None:
        if self.partial is not None:
            self.partial.close()
            self.out.close()
            if self.next >= self.lines:
                os.unlink(self.partial.name)

class _Reporter:
    """What a run shows on stderr: one live line on a terminal, log lines elsewhere, streamed text if asked for."""

    def __init__(self, options: argparse.Namespace, total: int) -> None:
        setting = os.environ.get("LLM_ORCHESTRATOR_LOG", "").lower()
        verbose = options.verbose > 0 or setting == "debug"
        terminal = False
        with contextlib.suppress(AttributeError, ValueError):
            terminal = sys.stderr.isatty()
        self.as_json, self.streaming = options.log_format == "json", options.stream
        self.live = terminal and not (verbose or options.quiet or self.as_json or self.streaming or setting)
        self.colour = self.live and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self.wanted = not options.quiet or self.streaming
        level = "debug" if verbose else "quiet" if options.quiet else "live" if self.live else "info"
        self.shown = _EVENTS_SHOWN[level]
        self.total, self.done, self.failed, self.tokens = total, 0, 0, 0
        self.running: dict[str, None] = {}
        self.speaking = ""  # the step whose text was shown last
        self.started = self.drawn = time.monotonic()

    def on_event(self, event: dict[str, Any]) -> None:
        kind, step_id = event["type"], event.get("step_id", "")
        if kind == "step_running":
            self.running[step_id] = None
        elif kind in _STEP_ENDS:
            self.running.pop(step_id, None)
            self.done += "." not in step_id
            self.failed += kind == "step_failed"
            self.tokens += (event.get("usage") or {}).get("total_tokens", 0)
        if kind == "text":
            self.speak(step_id, event["text"])
        elif kind in self.shown:
            self.speak("", "")
            self.clear()
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(event["time"]))
            _complain(_to_json({**event, "time": stamp}) if self.as_json else f"{stamp} {_event_text(event)}")
        if self.live:
            self.draw()

    def speak(self, step_id: str, text: str) -> None:
        """Shows a piece of a streamed answer, under the name of its step when that changes."""
        if self.streaming and step_id != self.speaking:
            self.write("\n" * bool(self.speaking) + (f"[{step_id}] " if step_id else ""))
            self.speaking = step_id
        if self.streaming and text:
            self.write(text)

    def draw(self) -> None:
        now = time.monotonic()
        if now - self.drawn < 0.05 and self.done < self.total:
            return
        self.drawn = now
        names = ", ".join(list(self.running)[:3]) + (" ..." if len(self.running) > 3 else "")
        counts = f"{self.done}/{self.total} steps, {len(self.running)} running, {self.tokens} tokens"
        text = f"{counts}, {now - self.started:.1f} s  {names}"[: _terminal_width() - 1]
        paint = "\x1b[31m" if self.failed else "\x1b[36m"
        self.write(f"\r\x1b[K{paint}{text}\x1b[0m" if self.colour else f"\r\x1b[K{text}")

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()

    def clear(self) -> None:
        if self.live:
            self.write("\r\x1b[K")

    def close(self) -> None:
        self.speak("", "")
        self.clear()

_STEP_ENDS = ("step_completed", "step_failed", "step_skipped", "step_cancelled")
_EVENTS_SHOWN: dict[str, tuple[str, ...]] = {
    "quiet": (),
    "live": ("step_failed", "step_retry", "step_fallback", "log"),
    "info": ("run_started", "run_finished", "step_retry", "step_fallback", "circuit", "log", *_STEP_ENDS),
    "debug": ("run_started", "run_finished", "step_pending", "step_running", "step_retry", "step_fallback",
              "provider_call", "circuit", "approval_needed", "log", *_STEP_ENDS),
}

def _terminal_width() -> int:
    try:
        return max(20, os.get_terminal_size(sys.stderr.fileno()).columns)
    except (OSError, ValueError):
        return 80

_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "validate": _validate_command, "run": _run_command, "resume": _resume_command, "runs": _runs_command,
    "graph": _graph_command,
}

def _run_as_program() -> None:
    """`python -m llm_orchestrator`: this module is `__main__`, and must not be loaded a second time by its name."""
    module = sys.modules["__main__"]
    spec = getattr(module, "__spec__", None)
    for name in ("llm_orchestrator", getattr(spec, "name", None)):
        if name and name != "__main__":
            sys.modules.setdefault(name, module)
    status = main()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # interpreter exit would wait for nothing either, but a stuck thread may hold its locks

if __name__ == "__main__":
    _run_as_program()
