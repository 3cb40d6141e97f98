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
import json
import math
import os
import re
import sys
import threading
import time
from bisect import bisect_right
from collections import ChainMap
from collections.abc import Mapping
from types import SimpleNamespace

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022
    "AnthropicProvider", "AuthenticationError", "AzureOpenAIProvider", "BadResponseError", "CohereProvider",
    "CompletionRequest", "CompletionResponse", "Condition", "ConditionError", "ContextLengthError", "DagError",
    "EchoProvider", "EmbeddingRequest", "EmbeddingResponse", "ExecutionError", "GeminiProvider", "LocalVectorStore",
    "MistralProvider", "OllamaProvider", "OpenAICompatibleProvider", "OpenAIProvider", "OrchestratorError",
    "PROVIDERS", "ParseError", "Problem", "Provider", "ProviderConnectionError", "ProviderError",
    "ProviderTimeoutError", "QuotaExceededError", "RateLimitError", "RetryPolicy", "RunResult", "RunTimeoutError",
    "Step", "StepResult", "Template", "TemplateError", "VECTOR_STORES", "ValidationError", "VoyageProvider",
    "Workflow", "WorkflowDAG", "WorkflowExecutor", "load_yaml",
]

TYPE_CHECKING = False  # the name is enough for type checkers, and `typing` is slow to import
if TYPE_CHECKING:
    import argparse
    import asyncio
    import logging
    from collections.abc import Awaitable, Callable, Container, Iterable, Iterator, Sequence
    from typing import Any
else:
    Any = object  # for `dict[str, Any]` as a base class


# ---------------------------------------------------------------------------------------------------------------------
# 2. Errors
# What goes wrong, as one family: every error says what was wrong, where, and what would be right.
# ---------------------------------------------------------------------------------------------------------------------


class OrchestratorError(Exception):
    """Base of every error that this module raises for bad input, a bad answer or a failed run."""

    @property
    def message(self) -> str:
        """The error in one or more lines of text, without the class name."""
        return str(self)


class ParseError(OrchestratorError):
    """YAML or JSON text that cannot be read. `line` and `column` count from 1; str() shows the line and a caret."""

    def __init__(self, reason: str, text: str = "", position: int = 0, source: str = "") -> None:
        self.reason, self.source = reason, source
        self.line = text.count("\n", 0, position) + 1
        start = text.rfind("\n", 0, position) + 1
        self.column = position - start + 1
        end = text.find("\n", start)
        self.source_line = text[start:] if end < 0 else text[start:end]
        super().__init__(reason)

    def __str__(self) -> str:
        return f"{self.source or '<text>'}:{self.line}:{self.column}: {self.reason}" + _caret(
            self.source_line, self.column
        )


def _caret(source_line: str, column: int) -> str:
    """The source line with a caret under `column` (from 1), cut to a window of 100 characters; "" for no line."""
    start = max(0, column - 60)
    window = source_line[start : start + 100].replace("\t", " ")
    window = "".join(character if character.isprintable() else "?" for character in window)
    return f"\n    {window}\n    {' ' * (column - 1 - start)}^" if window.strip() else ""


class TemplateError(OrchestratorError):
    """A template that does not compile, or a value it needs that is missing. `line` and `column` count from 1."""

    def __init__(self, reason: str, source: str = "", position: int = 0) -> None:
        self.reason = reason
        self.line = source.count("\n", 0, position) + 1
        self.column = position - source.rfind("\n", 0, position)
        super().__init__(f"{reason} (line {self.line}, column {self.column})" if source else reason)


class ConditionError(TemplateError):
    """A condition that does not parse, or that compares what cannot be compared."""


def _suggestion(word: str, known: Iterable[str]) -> str:
    """`, did you mean 'prompt'?` for the nearest of the known words, or nothing."""
    import difflib

    nearest = difflib.get_close_matches(str(word)[:100], list(known), n=1)
    return f", did you mean {nearest[0]!r}?" if nearest else ""


class Problem:
    """One thing that is wrong with a workflow: a message and its place.

    `path` leads to it from the top of the document (keys and indexes); `line` and `column` count from 1 and are None
    when there is no text. `severity` is "error" or "warning". str() reads `wf.yaml:12:5: message`.
    """

    __slots__ = ("column", "custom", "cycle", "line", "message", "path", "severity", "source")

    def __init__(
        self,
        message: str,
        path: tuple[Any, ...] = (),
        line: int | None = None,
        column: int | None = None,
        source: str = "workflow",
        severity: str = "error",
    ) -> None:
        self.message, self.path, self.line, self.column = message, path, line, column
        self.source, self.severity = source, severity
        self.cycle: list[str] | None = None
        self.custom: tuple[str, str] | None = None  # (argument, name) of what only a run can know

    def __str__(self) -> str:
        place = f"{self.source}:{self.line}:{self.column}" if self.line else self.source
        return f"{place}: {'warning: ' if self.severity == 'warning' else ''}{self.message}"

    def __repr__(self) -> str:
        return f"Problem({str(self)!r})"


class ValidationError(OrchestratorError):
    """A workflow, its inputs or an argument is wrong. `problems` lists everything that was found, in order."""

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        self.problems = [Problem(problems)] if isinstance(problems, str) else list(problems)
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

    `provider` is its name, `status` the HTTP status or None, `retryable` whether another attempt may help, `retry_after`
    the seconds that the server asks to wait, `request_id` the server's name for the call. Messages never hold keys.
    """

    _retryable = False

    def __init__(
        self,
        reason: str,
        *,
        provider: str = "",
        status: int | None = None,
        retryable: bool | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(f"{provider}: {reason}" if provider else reason)
        self.provider, self.status, self.retry_after, self.request_id = provider, status, retry_after, request_id
        self.retryable = self._retryable if retryable is None else retryable

    def _too_long_a_wait(self, limit_seconds: float) -> None:
        """Adds to the message why a retryable error was not retried."""
        self.args = (
            f"{self}; the server asks to wait {self.retry_after:g} s, longer than max_delay {limit_seconds:g} s",
        )


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
# ---------------------------------------------------------------------------------------------------------------------
_MAX_DEPTH = 100  # collections within collections
_MAX_DIGITS = 3500  # characters of a whole number: int() is quadratic, and str() of newer Pythons refuses 4300 digits
_MAX_KEY = 1024  # characters of a key up to its colon, by the specification
_MAX_EXPANSION = 1_000_000  # nodes reached through aliases; a text counts one more for every 100 characters

_USUAL = bytes(range(32, 127)) + b"\t\n"
_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")  # refused anywhere
_ODD = re.compile("[\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]")  # allowed in quotes only
_BYTE_ORDER_MARKS = (
    (b"\xff\xfe\0\0", "utf-32-le"), (b"\0\0\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"),
)  # fmt: skip

# The expressions repeat character sets and never groups, except over a bounded stretch: a repeated group costs memory
# for each round. The text ends with a newline, so that `text[position + 1]` is there for every character of a line.
_FIRST = r"""[^ \t\n\-?:,\[\]{}#&*!|>'"%@`]"""  # starts a plain scalar wherever it stands
_WORD, _QUOTED = r"([A-Za-z_][\w.-]{0,1000})", r""""([^"\\\n]*)"|'([^'\n]*)'"""
_VALUE = rf"(?:(-?{_FIRST}(?:[^:#\n]*[^:#\n \t])?)|{_QUOTED})(?:[ \t]+#[^\n]*|[ \t]*)\n( *)(?=[^ \t\n#])"
# What nearly all lines are: `key: value` or the `key:` of what follows, and `- value`; in a flow collection: `value` or
# `key: value` before a comma or bracket, or before another collection.
_SIMPLE_ENTRY = re.compile(rf"{_WORD}:(?: +{_VALUE}|(?=[ \t\n]))").match
_SIMPLE_ITEM = re.compile(rf"- +{_VALUE}").match
_SIMPLE_FLOW = re.compile(
    rf"""(?:{_WORD}: +|"([^"\\\n]*)" *: *)?"""
    rf"(?:(?:(-?{_FIRST}(?:[^:#,\[\]{{}}\n]*[^:#,\[\]{{}}\n \t])?)|{_QUOTED}) *(?=[,\]}}])|(?=[\[{{]))"
).match
_NEXT_LINE = re.compile(r"(?:#[^\n]*)?\n( *)(?=[^ \t\n#])").match
_NO_GROUPS = (None,) * 5
_NEVER = re.compile("(?!)").match

_BLOCK_PLAIN = re.compile(rf"{_FIRST}|[-?:](?=[^ \t\n])").match
_BLOCK_STOP = re.compile(r"\n|:(?=[ \t\n])|(?<=[ \t])#").search
_FLOW_PLAIN = re.compile(rf"{_FIRST}|[-?:](?=[^ \t\n,\[\]{{}}])").match
_FLOW_STOP = re.compile(r"[\n,\[\]{}]|:(?=[ \t\n,\[\]{}])|(?<=[ \t])#").search
_SIMPLE_KEY = re.compile(rf"{_WORD}:(?=[ \t\n])").match
_KEY = re.compile(  # any implicit key of a block mapping; matched over _MAX_KEY characters at most
    rf"""(?P<properties>(?:[&!][^ \t\n]*[ \t]+)*)
    (?:\*[^ \t\n,\[\]{{}}]+(?=[ \t\n]) | "[^"\\\n]*(?:\\.[^"\\\n]*)*" | '[^'\n]*(?:''[^'\n]*)*'
      |(?P<plain>(?:(?:{_FIRST}|[-?:](?=[^ \t\n]))[^:\#\n]*(?:(?::(?=[^ \t\n])|(?<![ \t])\#)[^:\#\n]*)*)?))
    [ \t]*:(?=[ \t\n])""",
    re.VERBOSE,
).match
_DASH, _QUESTION, _COLON = ("- ", "-\n", "-\t"), ("? ", "?\n", "?\t"), (": ", ":\n", ":\t")
_SPACES: Callable[..., re.Match[str]] = re.compile(" *").match  # type: ignore[assignment]  # these four match always
_WHITE: Callable[..., re.Match[str]] = re.compile(r"[ \t]*").match  # type: ignore[assignment]
_BLANK: Callable[..., re.Match[str]] = re.compile(r"[ \t\n]*").match  # type: ignore[assignment]
_EMPTY_LINES: Callable[..., re.Match[str]] = re.compile(r"[ \n]*").match  # type: ignore[assignment]
_PROPERTY = re.compile(r"(?:&[^ \t\n,\[\]{}]+|!<[^ \t\n>]*>|![^ \t\n,\[\]{}]*)(?=[ \t\n,\]}])").match
# The end of a text in quotes is such a match of odd length: otherwise the quote at its end is escaped.
_CLOSING = {'"': re.compile(r'(?<!\\)\\*"').search, "'": re.compile("'+").search}
_ALIAS = re.compile(r"\*([^ \t\n,\[\]{}]+)").match
_BLOCK_HEADER = re.compile(r"[|>](?:([1-9])?([-+])?|([-+])([1-9]))(?:[ \t]+(?:#[^\n]*)?)?\n").match
_PROLOGUE = re.compile(
    r"(%YAML)[ \t]+1\.[0-9]+(?=[ \t\n])|(%)(?!(?:YAML|TAG)[ \t\n])[^ \t\n][^\n]*|\.\.\.(?=[ \t\n])"
).match
_DOCUMENT_START, _DOCUMENT_END = re.compile(r"---(?=[ \t\n])").match, re.compile(r"\n(?:---|\.\.\.)(?=[ \t\n])").search
_BREAKS = re.compile(r"(?<![ \t])[ \t]*\n[ \t\n]*")  # of a text on several lines, with the blanks around them
_ESCAPED = (
    r"\\(?:u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})"
    r"|(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))|([^\n]))"
)
_ESCAPE = re.compile(_ESCAPED)
_ESCAPE_OR_BREAKS = re.compile(rf"\\\n[ \t\n]*|(?:\\[ \t]|(?<![ \t]))[ \t]*\n[ \t\n]*|{_ESCAPED}")
_ESCAPES = dict(zip('0abtnvfre "/\\N_LP\t', '\0\a\b\t\n\v\f\r\x1b "/\\\x85\xa0\u2028\u2029\t'))

_YAML_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_NOT_TEXT = frozenset("0123456789+-.~tTfFnN")  # the first characters of all plain scalars that are not text
_YAML_NUMBER = re.compile(
    r"([-+]?[0-9]+)|(0o[0-7]+)|(0x[0-9a-fA-F]+)|[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
).fullmatch
_TAGS: dict[str, type] = {  # object stands for the tag of what is not resolved, whatever its kind
    "!!null": type(None), "!!bool": bool, "!!int": int, "!!float": float, "!!str": str, "!!seq": list, "!!map": dict,
    "!": object,
}  # fmt: skip
_HALF = re.compile("[\ud800-\udfff]").search
_COMPLEX_KEY = "a key that is a list or a mapping is not supported"
_MERGE = object()  # stands for the key `<<` while its mapping is read


def load_yaml(text: str | bytes) -> Any:
    """The value of a YAML 1.2 document (core schema); None for an empty one. JSON text is YAML too.

    Bytes are UTF-8, or UTF-16 or UTF-32 with a byte order mark. Raises ParseError for everything that is not exactly
    one such document, and for what is refused: tags outside the core schema, %TAG, complex keys, duplicate keys, tabs
    before the content of a block line, nesting deeper than 100, whole numbers of more than 3500 digits, aliases that
    expand to more than a million nodes.
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
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_int=_resolved)
        if "\\ud" in text or "\\uD" in text or _too_deep(value):
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


def _too_deep(value: Any) -> bool:
    """Whether collections nest deeper than a document may."""
    level: list[Any] = [[value]]
    for _ in range(_MAX_DEPTH + 1):
        level = [
            child for node in level for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]  # fmt: skip
    return bool(level)


def _positions(text: str) -> dict[tuple[str | int, ...], tuple[int, int]]:
    """The (line, column), from 1, of each mapping key and list item, by path such as ("steps", 1, "prompt").

    For YAML and JSON text. Never raises: where the text cannot be read, it has the places up to there.
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
        codec = next((name for mark, name in _BYTE_ORDER_MARKS if raw.startswith(mark)), "utf-8")
        try:
            text = raw.decode(codec)
        except UnicodeDecodeError as error:
            before = raw[: error.start].decode(codec, "replace")
            raise ParseError(f"not {codec.upper()} text: byte 0x{raw[error.start]:02x}", before, len(before)) from None
    elif not isinstance(text, str):
        raise ParseError(f"expected text, not {type(text).__name__}")
    text = text[1:] if text.startswith("\ufeff") else text
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    control = None if text.isascii() and not text.encode().translate(None, _USUAL) else _CONTROL.search(text)
    if control:
        raise ParseError(f"the character U+{ord(control[0]):04X} is not allowed in text", text, control.start())
    return text


def _resolved(raw: str) -> Any:
    """The value of a plain scalar by the core schema. Raises ValueError for a number that is too long."""
    if raw in _YAML_WORDS:
        return _YAML_WORDS[raw]
    number = _YAML_NUMBER(raw)
    if not number:
        return raw
    if not number.lastindex:
        return float(raw)
    if len(raw) > _MAX_DIGITS:
        raise ValueError(f"a whole number of more than {_MAX_DIGITS} digits")
    return int(raw, (10, 8, 16)[number.lastindex - 1])


class _YamlReader:
    """Reads one document. Methods take a position and return the value there and the position behind it.

    Block methods return the position of the next content, which is the first of its line; `indent` is then the number
    of spaces before it, -1 at the end of the text. A tag is given as the type that it demands, an anchor as a list to
    which the value is added when it is complete.
    """

    def __init__(self, text: str, marks: dict[tuple[str | int, ...], int] | None = None) -> None:
        self.source, self.padded = text, not text.endswith("\n")
        self.text = text + "\n" if self.padded else text
        self.indent, self.expansion = 0, 0
        self.anchors: dict[str, list[Any]] = {}
        self.marks = marks
        self.path: tuple[str | int, ...] = ()  # of the last key or item, if marks are kept
        self.parents: list[tuple[str | int, ...]] = []  # the path of each open collection
        self.odd = set() if text.isascii() and "\x7f" not in text else {match.start() for match in _ODD.finditer(text)}
        # The expressions for simple lines know nothing of marks and odd characters.
        simple = marks is None and not self.odd
        self.simple_entry, self.simple_item, self.simple_flow = (
            (_SIMPLE_ENTRY, _SIMPLE_ITEM, _SIMPLE_FLOW) if simple else (_NEVER, _NEVER, _NEVER)
        )

    def error(self, reason: str, position: int) -> ParseError:
        return ParseError(reason, self.source, min(position, len(self.source)))

    def document(self) -> Any:
        """The value of the only document in the text."""
        text = self.text
        directives: set[str] = set()
        position = self.next_line(0, -1)
        while self.indent == 0 and (line := _PROLOGUE(text, position)):
            directive = line[1] or line[2]
            if line[1] in directives or (directives and not directive):
                break
            directives |= {directive} if directive else set()
            position = self.rest_of_line(line.end())
        start = _DOCUMENT_START(text, position) if self.indent == 0 else None
        if not start and (directives or text.startswith("%", position)):
            raise self.error("only %YAML 1.x may stand here, once, with a '---' line below it", position)
        begin, column = (start.end(), -1) if start else (position - max(self.indent, 0), 0)
        if end := _DOCUMENT_END(text, begin):
            position, self.indent = end.start() + 1, 0
            while self.indent == 0 and text.startswith("...", position):
                position = self.rest_of_line(position + 3)
            if self.indent >= 0:
                raise self.error("several documents in one text are not supported", position)
            self.text, self.padded = text[: end.start() + 1], False
        value, position = self.block_node(begin, -1, column)
        if self.indent >= 0:
            raise self.error("the document ends before this", position)
        if self.odd:
            raise self.error(f"the character U+{ord(text[min(self.odd)]):04X} needs quotes", min(self.odd))
        return value

    # Lines and white space

    def rest_of_line(self, position: int) -> int:
        """The position of the next content; refuses anything but a comment in the rest of this line."""
        text = self.text
        end = _WHITE(text, position).end()
        if text[end] == ":":
            raise self.error("'key: value' cannot stand here: it needs a line of its own, or quotes if it is text", end)
        if text[end] != "\n" and (text[end] != "#" or text[end - 1] not in " \t"):
            raise self.error("unexpected text", end)
        return self.next_line(end)

    def next_line(self, position: int, parent: int = _MAX_KEY) -> int:
        """The position of the next content behind white space and comments; sets `indent`.

        Tabs may stand before it where it is no block collection, behind more spaces than `parent`.
        """
        text = self.text
        simple = _NEXT_LINE(text, position)
        if simple:
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
        line = text.rfind("\n", start, position) + 1 if indent else 0
        if line:
            spaces = _SPACES(text, line).end() - line
            # The one liberty taken, as by all common loaders: a closing bracket may be indented like its parent.
            if spaces < indent and not (text[position] in "]}" and spaces == indent - 1 == position - line):
                raise self.error("this line needs more indentation than the parent of its '[' or '{'", position)
        return position

    # Collections

    def enter(self, kind: type, tag: type | None, position: int) -> None:
        """Counts a collection that starts; `parents.pop()` ends it."""
        self.parents.append(self.path)
        if len(self.parents) > _MAX_DEPTH:
            raise self.error(f"nesting deeper than {_MAX_DEPTH}", position)
        self.check_tag(kind, tag, position)

    def check_tag(self, kind: type, tag: type | None, position: int) -> None:
        if tag not in (None, object, kind):
            written = next(written for written in _TAGS if _TAGS[written] is tag)
            raise self.error(f"this is no value for the tag {written}", position)

    def mark(self, key: Any, position: int) -> None:
        """Notes where a key or an item of the innermost collection is, if that was asked for."""
        if self.marks is not None:
            self.path = (*self.parents[-1], key)
            self.marks[self.path] = position

    def block_node(
        self, position: int, parent: int, column: int, hanging: bool = False,
        tag: type | None = None, anchor: list[Any] | None = None,
    ) -> tuple[Any, int]:
        """The node behind an indicator or behind properties, in a collection that is indented by `parent`.

        A block collection may start on the same line if `column`, the position's own, is not -1. A list on the lines
        below may be indented like its parent if `hanging`.
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
            return self.scalar(value, False, tag, anchor, position), end
        value, end, _ = self.flow_node(position, parent + 1, False, tag, anchor)
        if isinstance(value, (dict, list)) and text.startswith(":", _WHITE(text, end).end()):
            raise self.error(_COMPLEX_KEY, position)
        return value, self.rest_of_line(end)

    def key(self, position: int) -> re.Match[str] | None:
        """The key of a block mapping with its colon."""
        return _KEY(self.text, position, position + _MAX_KEY + 2)

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
            key, plain, _, _, spaces = entry.groups() if entry else _NO_GROUPS
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
        plain = match[group]
        if plain is None:
            return match[group + 2] if match[group + 1] is None else match[group + 1]
        return self.scalar(plain, True, None, None, match.start(group))

    def block_entry(self, position: int, indent: int, result: dict[Any, Any]) -> int:
        """Reads one entry of a block mapping, of any kind, into `result`."""
        text, start, value = self.text, position, None
        explicit = text.startswith(_QUESTION, position)
        if explicit:
            content = _WHITE(text, position + 1).end()
            key, position = self.block_node(position + 1, indent, indent + 1, True)
        else:
            if not (match := self.key(position)):
                raise self.error("expected 'key: value' here", position)
            position = match.end()
            tag, anchor, content = self.properties(start, None, None)
            if content != match.end("properties"):
                raise self.error("unexpected text behind an anchor or a tag", content)
            if match["plain"] is None:
                key = self.flow_node(content, 0, False, tag, anchor)[0]
            else:
                key = self.scalar(match["plain"].rstrip(" \t"), True, tag, anchor, content)
        key = self.checked_key(key, result, start, content)
        self.mark("<<" if key is _MERGE else key, content if explicit else start)
        if not explicit:
            value, position = self.block_node(position, indent, -1, True)
        elif self.indent == indent and text.startswith(_COLON, position):
            value, position = self.block_node(position + 1, indent, indent + 1, True)
        result[key] = value if key is not _MERGE else (value, start)
        return position

    def flow_node(
        self, position: int, indent: int, flow: bool = True, tag: type | None = None, anchor: list[Any] | None = None
    ) -> tuple[Any, int, int]:
        """A scalar on one or more lines, an alias or a flow collection; further lines are indented by `indent` or more.

        In a flow collection (`flow`) it may have properties. Returns where the content behind them starts as well.
        """
        text = self.text
        while flow and text[position] in "&!":
            tag, anchor, position = self.properties(position, tag, anchor)
            position = self.space(position, indent)
        first, start = text[position], position
        if first == "*":
            if tag or anchor is not None:
                raise self.error("an alias with an anchor or a tag", position)
            return (*self.alias(position), start)
        if first in "[{":
            collection, position = self.flow_collection(position, indent, tag)
            return self.anchored(collection, anchor), position, start
        if first in "\"'":
            value, position = self.quoted(position, indent)
        elif (_FLOW_PLAIN if flow else _BLOCK_PLAIN)(text, position):
            value, position = self.plain(position, indent, _FLOW_STOP if flow else _BLOCK_STOP)
        elif flow and first in ",]}:" and (tag or anchor is not None):
            value = ""
        else:
            raise self.error(f"'{first}' cannot start a value: put text into quotes", position)
        return self.scalar(value, first not in "\"'", tag, anchor, start), position, start

    def flow_collection(self, position: int, indent: int, tag: type | None) -> tuple[dict[Any, Any] | list[Any], int]:
        """A list in brackets or a mapping in braces."""
        text, simple_flow, pairs = self.text, self.simple_flow, self.text[position] == "{"
        close = "}" if pairs else "]"
        items: list[Any] = []
        mapping: dict[Any, Any] = {}
        self.enter(dict if pairs else list, tag, position)
        while text[position] != close:
            start = position = position + 1
            if text[start] in " \t\n#":
                start = position = self.space(start, indent)
            if text[start] == close:
                break
            entry = simple_flow(text, start)
            word, quoted, plain, _, _ = entry.groups() if entry else _NO_GROUPS
            key = quoted if word is None else _YAML_WORDS.get(word, word)
            if not entry or pairs is (word is None and quoted is None) or key in mapping:
                position = self.flow_entry(start, indent, mapping, None if pairs else items)
            else:
                position = entry.end()
                if plain and plain[0] not in _NOT_TEXT:
                    value = plain
                elif text[position] in "[{":
                    value, position, _ = self.flow_node(position, indent)
                    position = self.space(position, indent)
                else:
                    value = self.simple(entry, 3)
                if pairs:
                    mapping[key] = value
                else:
                    items.append(value)
            if text[position] not in ("," + close):
                reason = f"expected ',' or '{close}'" if text[position] != ":" else _COMPLEX_KEY
                raise self.error(reason, position)
        self.parents.pop()
        return self.merged(mapping) if pairs else items, position + 1

    def flow_entry(self, start: int, indent: int, mapping: dict[Any, Any], items: list[Any] | None) -> int:
        """Reads one entry of any kind into the mapping, or into the items, where a pair is a mapping of its own."""
        text, value = self.text, None
        if items is not None:
            self.mark(len(items), start)
        explicit = text.startswith(_QUESTION, start)
        position = content = self.space(start + 1, indent) if explicit else start
        if (explicit and text[position] in ",]}") or (text[position] == ":" and not _FLOW_PLAIN(text, position)):
            key = None
        else:
            key, position, content = self.flow_node(position, indent)
            position = self.space(position, indent)
        if items is not None:
            if not explicit and text[position] != ":":
                items.append(key)
                return position
            if not explicit and (position - start > _MAX_KEY or "\n" in text[start:position]):
                raise self.error(f"such a key stands on one line with its ':', within {_MAX_KEY} characters", position)
            self.enter(dict, None, start)
            mapping = {}
        key = self.checked_key(key, mapping, start, content)
        self.mark("<<" if key is _MERGE else key, content if explicit else start)
        if text[position] == ":":
            colon, position = position, self.space(position + 1, indent)
            if text[position] not in ",]}":
                if position == colon + 1 and text[content] not in "\"'":
                    raise self.error("expected white space behind ':'", position)
                value, position, _ = self.flow_node(position, indent)
                position = self.space(position, indent)
        mapping[key] = value if key is not _MERGE else (value, start)
        if items is not None:
            self.parents.pop()
            items.append(self.merged(mapping))
        return position

    def checked_key(self, key: Any, result: dict[Any, Any], start: int, content: int) -> Any:
        """The key, or _MERGE for a plain `<<`; refuses collections and duplicates."""
        text = self.text
        if isinstance(key, (dict, list)):
            raise self.error(_COMPLEX_KEY, start)
        if key == "<<" and text[content] not in "\"'":
            if not text.startswith("<<", content) or (content > start and text[start] != "?"):
                raise self.error("a merge key (<<) has no anchor, tag or alias", start)
            key = _MERGE
        if key in result:
            raise self.error(f"duplicate key {'<<' if key is _MERGE else key!r}"[:200], start)
        return key

    def merged(self, result: dict[Any, Any]) -> dict[Any, Any]:
        """The mapping with its merge key, if any, carried out: its own entries win, then those of earlier sources."""
        if _MERGE not in result:
            return result
        value, position = result.pop(_MERGE)
        sources = [result, *value] if isinstance(value, list) else [result, value]
        if not all(isinstance(source, dict) for source in sources):
            raise self.error("a merge key (<<) needs a mapping or a list of mappings", position)
        joined = {key: value for source in reversed(sources) for key, value in source.items()}
        if len({(type(key), key) for source in sources for key in source}) > len(joined):
            raise self.error("merged keys that differ in YAML, but not in Python, such as 1 and true", position)
        return joined

    # Scalars

    def scalar(self, raw: str, plain: bool, tag: type | None, anchor: list[Any] | None, position: int) -> Any:
        """The value of a scalar, by its properties."""
        value: Any = raw
        if tag not in (None, str, object) or (plain and not tag and (not raw or raw[0] in _NOT_TEXT)):
            try:
                value = _resolved(raw)
            except ValueError as error:
                raise self.error(str(error), position) from None
            if tag is float and type(value) is int and raw[:2] not in ("0o", "0x"):
                value = float(raw)
            self.check_tag(type(value), tag, position)
        return self.anchored(value, anchor)

    def plain(self, position: int, indent: int, find_stop: Callable[[str, int], Any]) -> tuple[str, int]:
        text = self.text
        end = find_stop(text, position).start()
        while text[end] == "\n":
            start = _BLANK(text, end).end()
            line = text.rfind("\n", end, start) + 1
            if start == len(text) or text[start] == "#" or _SPACES(text, line).end() - line < indent:
                break
            stop = find_stop(text, start).start()
            if stop == start or _short_line(text[end:line], indent):
                break
            end = stop
        return _BREAKS.sub(_folded, text[position:end].rstrip(" \t\n")), end

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
            self.odd.difference_update(match.start() for match in _ODD.finditer(text, start, end))
        if "\n" in raw and _short_line(raw[raw.find("\n") :] + quote, indent):
            raise self.error("a line of this quoted text needs more indentation than its parent", position)
        if quote == "'":
            return (_BREAKS.sub(_folded, raw) if "\n" in raw else raw).replace("''", "'"), end + 1
        try:
            if "\n" in raw:
                return _ESCAPE_OR_BREAKS.sub(_unescaped, raw), end + 1
            return _ESCAPE.sub(_unescaped, raw) if "\\" in raw else raw, end + 1
        except UnicodeEncodeError as error:
            raise self.error(error.reason, start + error.start) from None

    def block_scalar(self, position: int, parent: int) -> tuple[str, int]:
        """A literal (|) or folded (>) scalar in a collection that is indented by `parent`."""
        text, header = self.text, _BLOCK_HEADER(self.text, position)
        digit = (header[1] or header[4]) if header else None
        if not header or (digit and parent < 0):
            raise self.error(f"expected a line end and indented lines of text behind '{text[position]}'", position)
        chomping, start = header[2] or header[3], header.end()
        first = _EMPTY_LINES(text, start).end()
        line = text.rfind("\n", 0, first) + 1  # the first with content
        indent = parent + int(digit) if digit else first - line
        if digit or (indent > parent and first < len(text)):
            if not digit and " " * (indent + 1) in text[start:line]:
                raise self.error("a blank line above this text has more spaces than the text", first)
            below = _line_below(indent)(text, start - 1) if indent else None
            end = below.start() + 1 if below else len(text)
        else:
            end = line if first < len(text) else first
            indent = end - start  # nothing but blank lines, none of them longer
        if text.startswith("\t", _SPACES(text, end).end()):
            raise self.error("a tab cannot indent this line", end)
        content = text[start - 1 : end]
        if " \n" in content:  # perhaps a blank line of less indentation
            content = "\n".join([line[indent:] for line in content.split("\n")])[1:]
        else:
            content = content.replace("\n" + " " * indent, "\n")[1:]
        if self.padded and start < end == len(text):
            content, last = content[:-1], content[content.rfind("\n", 0, -1) + 1 : -1]
            if not last.strip(" ") and (chomping == "+" or (last and not chomping)):
                raise self.error("the last line of this text is blank, but not ended", end)
        body = content.rstrip("\n")
        kept = len(content) if chomping == "+" else len(body) + (1 if body and not chomping else 0)
        return (_folded_block(body) if text[position] == ">" else body) + content[len(body) : kept], self.next_line(end)

    # Properties and aliases

    def properties(self, position: int, tag: type | None, anchor: list[Any] | None) -> tuple[Any, Any, int]:
        """The tag and the anchor on this line, added to those given; the position is that of the next content."""
        text = self.text
        while text[position] in "&!":
            match = _PROPERTY(text, position)
            if not match or (tag if text[position] == "!" else anchor is not None):
                reason = "a second anchor or tag for one value" if match else "not an anchor or a tag"
                raise self.error(reason, position)
            if match[0][0] == "&":
                anchor = self.anchors[match[0][1:]] = []
            elif match[0] in _TAGS:
                tag = _TAGS[match[0]]
            else:
                raise self.error(f"the tag {match[0][:80]} is not supported", position)
            position = _WHITE(text, match.end()).end()
        return tag, anchor, position

    def alias(self, position: int) -> tuple[Any, int]:
        match = _ALIAS(self.text, position)
        anchor = self.anchors.get(match[1]) if match else None
        if not match or not anchor:
            raise self.error("an alias without a complete value with that anchor before it", position)
        self.expand(anchor[0], len(self.parents), position)
        return anchor[0], match.end()

    def expand(self, value: Any, depth: int, position: int) -> None:
        """Counts the nodes that an alias stands for; refuses too many of them, and too deep ones."""
        collection = isinstance(value, (dict, list))
        self.expansion += 1 + (len(value) // 100 if isinstance(value, str) else 0)
        if self.expansion > _MAX_EXPANSION or depth + collection > _MAX_DEPTH:
            raise self.error("an alias that nests too deeply, or expands to too many nodes", position)
        if collection:
            for child in [*value, *value.values()] if isinstance(value, dict) else value:
                self.expand(child, depth + 1, position)

    def anchored(self, value: Any, anchor: list[Any] | None) -> Any:
        if anchor is not None:
            anchor.append(value)
        return value


def _short_line(text: str, indent: int) -> bool:
    """Whether a line below the first, blank or not, has something other than spaces before column `indent`."""
    return indent > 0 and any(len(line) > _SPACES(line).end() < indent for line in text.split("\n")[1:])


def _folded(breaks: re.Match[str]) -> str:
    """What line breaks in a text on several lines stand for: one is a space, more are one less."""
    return "\n" * (breaks[0].count("\n") - 1) or " "


def _unescaped(escape: re.Match[str]) -> str:
    """The text for an escape in double quotes, or for line breaks, one of which may be escaped."""
    high, low, code_2, code_4, code_8, character = escape.groups()
    if character in _ESCAPES:
        return _ESCAPES[character]
    written = escape[0]
    if "\n" in written:
        kept = written[1:2].strip("\n") if written[0] == "\\" else ""
        return kept + ("\n" * (written.count("\n") - 1) or ("" if written.startswith("\\\n") else " "))
    code = int(code_2 or code_4 or code_8 or "D800", 16)
    if high:
        code = 0x10000 + ((int(high, 16) - 0xD800) << 10) + int(low, 16) - 0xDC00
    if code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF:
        return chr(code)
    reason = "is not a character" if character is None else "is not an escape that YAML has; a backslash itself is \\\\"
    raise UnicodeEncodeError("yaml", written, escape.start(), escape.end(), f"{written} {reason}")


def _folded_block(body: str) -> str:
    """The text of a folded scalar: as in quotes, but line breaks next to a line that starts with a blank stay."""
    parts = re.split("(\n+)", body)  # lines and the breaks between them
    for number in range(1, len(parts), 2):
        if all(line and line[0] not in " \t" for line in (parts[number - 1], parts[number + 1])):
            parts[number] = parts[number][1:] or " "
    return "".join(parts)


@functools.lru_cache(maxsize=64)
def _line_below(indent: int) -> Callable[[str, int], Any]:
    """Finds the line break before the first line with content that is indented by less than `indent`."""
    return re.compile(rf"\n(?= {{0,{indent - 1}}}[^ \n])").search


_PLAIN_TEXT = re.compile(  # what every YAML 1.1 and 1.2 loader reads as the same text
    r"(?!(?i:y|n|yes|no|on|off|true|false|null)$)(?:[^\W\d]|/)([\w ,./()=+-]*[\w./()])?"
).fullmatch
_LITERAL = re.compile("[^\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]*").fullmatch
_UNPRINTABLE = re.compile("[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]")


def _dump_yaml(value: Any) -> str:
    """The value as a YAML document in block style that `load_yaml` reads back as the same value.

    For dict, list, tuple, str, int, float, bool and None, nested up to 100 deep; raises OrchestratorError for others.
    """
    try:
        return _yaml_node(value, 0, 0) + "\n"
    except RecursionError:
        raise OrchestratorError("nested too deeply for the stack that is left") from None


def _yaml_node(value: Any, column: int, depth: int) -> str:
    """The node for a place at that column; its lines below the first are indented to it."""
    line = "\n" + " " * column
    if isinstance(value, (dict, list, tuple)):
        if depth >= _MAX_DEPTH:
            raise OrchestratorError(f"cannot write YAML that nests deeper than {_MAX_DEPTH}")
        if not value:
            return "{}" if isinstance(value, dict) else "[]"
        if isinstance(value, dict):
            return line.join(_yaml_entry(key, child, column, depth) for key, child in value.items())
        return line.join("- " + _yaml_node(child, column + 2, depth + 1) for child in value)
    if isinstance(value, str) and "\n" in value and value.strip(" \t\n") and _LITERAL(value):
        indicator = "2" if value.lstrip("\n")[0] in " \t" else ""
        if column or not indicator:
            body = value.rstrip("\n")
            chomping = "-" if body == value else "" if len(value) == len(body) + 1 else "+"
            lines = value.split("\n") if body == value else value[:-1].split("\n")
            pad = "\n" + " " * (column or 2)
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
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        if _PLAIN_TEXT(value):
            return value
        written = json.dumps(value, ensure_ascii=False)
        if not _HALF(written):
            return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", written)
        raise OrchestratorError("cannot write half of a surrogate pair as YAML")
    if isinstance(value, int) and abs(value) < 10 ** (_MAX_DIGITS - 1):
        return int.__repr__(value)
    if isinstance(value, float):
        written = float.__repr__(value).replace("inf", ".inf").replace("nan", ".nan")
        return written if "." in written else written.replace("e", ".0e")
    raise OrchestratorError(f"cannot write a {type(value).__name__} as YAML")


def _to_json(value: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """A value as JSON text; numbers that JSON lacks (nan, inf) are null, as in JavaScript."""
    separators = (",", ":" if indent is None else ": ")
    encoder = json.JSONEncoder(
        ensure_ascii=False, allow_nan=False, indent=indent, sort_keys=sort_keys, separators=separators
    )
    try:
        return encoder.encode(value)
    except ValueError:
        return encoder.encode(_finite(value))


def _finite(value: Any) -> Any:
    """The value with null in place of nan and inf."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------------------------------------------------------------
# 4. Templates: text -> compiled closures -> text or a value. Handlebars without HTML escaping, in two spellings, {{x}} and
# <<x>>. The source is scanned into texts and tags, the lines of stand-alone tags are taken out, and each tag becomes a
# closure `read(this, frame)`. Linear in the source; paths reach keys and indexes only; values are never rendered again.
# ---------------------------------------------------------------------------------------------------------------------

_MAX_NESTING = 100
_NAME = r"""[^\s!"#%-,./;->@\[-^`{-~]+"""
_STEP = rf"(?:{_NAME}|\[[^\]\\]*(?:\\\]?[^\]\\]*)*\])"
_PATH = rf"@?(?:(?:\.\.?/)+(?={_STEP})|\.\.?(?:/\.\.?)*)?(?:{_STEP}(?:[./]{_STEP}|\[\d+\])*)?"
_QUOTED = r""""[^"\\]*(?:\\"?[^"\\]*)*"|'[^'\\]*(?:\\'?[^'\\]*)*'"""
_TOKEN = re.compile(rf"\s*(?:(?P<text>{_QUOTED})|(?P<mark>[()|])|(?P<path>(?=[^\s=~}})|>]){_PATH}(?=[\s=~}})|>]|\Z)))")
_STEPS = re.compile(rf"\.\.?(?=/|\Z)|{_STEP}")
_SIMPLE_TAG = re.compile(r"\{\{\s*([A-Za-z_][\w-]*(?:\.[\w-]+)*)\s*\}\}(?!\})|<<([A-Za-z_][\w-]*(?:\.[\w-]+)*)>>")
_OPENER, _EQUALS, _LITERAL_NUMBER = re.compile(r"\{\{|<<"), re.compile(r"\s*="), re.compile(r"-?[0-9]{1,4000}(\.[0-9]+)?")
_TAG = re.compile(r"(\{\{\{\{|\{\{|<<)(~?)(#>|#\*|[#/^>&*!{<])?")
_TAG_ENDS = {
    "{{": r"\s*(~?)\}\}(?!\})", "{{{": r"\s*\}(~?)\}\}", "{{{{": r"\s*()\}\}\}\}", "{{!": r"(~?)\}\}",
    "{{!--": r"--(~?)\}\}", "<<": r"\s*(~?)>>", "<<<": r"\s*>(~?)>>", "<<!": "(~?)>>", "<<!--": "--(~?)>>", "(": r"\s*()\)",
}  # fmt: skip
_RAW_TAG = rf"\{{\{{\{{\{{(?:/({_NAME})\}}\}}\}}\}}|(?=[^/]))"
_STANDALONE = frozenset(("#", "^", "/", "else", ">", "#>", "#*", "!"))
_LITERAL_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "undefined": None}


class _Malformed(Exception):
    """(reason, position): a tag that does not read as one; an error in {{ }}, plain text in << >>."""


class _Tag:
    """One tag: its sign ("" for a value), `~` on either side, and what is in it."""

    __slots__ = ("arguments", "end", "head", "indent", "left", "named", "names", "position", "right", "sign")

    def __init__(self, sign: str, position: int, head: _Expression | None = None, end: int = 0) -> None:
        self.sign, self.position, self.head, self.end, self.indent = sign, position, head, end, ""
        self.left = self.right = False
        self.arguments: list[_Expression] = []
        self.named: dict[str, _Expression] = {}
        self.names: tuple[str, ...] = ()  # block parameters

    @property
    def name(self) -> str:
        """What the tag calls, as written: `each`, `steps.a`, `../x`."""
        return self.head[2] if self.head else ""


def _scan(source: str) -> list[str | _Tag]:
    """The texts and tags of a template, in order."""
    items: list[str | _Tag] = []
    start = search = 0
    while opener := _OPENER.search(source, search):
        position, curly = opener.start(), opener[0] == "{{"
        escaped = position > start and source[position - 1] == "\\"
        literal = escaped and source[max(start, position - 2) : position] != "\\\\"
        try:
            tag = None if literal and curly else _read_tag(source, position)
        except _Malformed as error:
            if curly:
                raise TemplateError(error.args[0], source, error.args[1]) from None
            search = position + 1
            continue
        if start < position - escaped:
            items.append(source[start : position - escaped])
        if literal or tag is None:
            start, search = position, position + 2
        else:
            items.append(tag)
            start = search = _scan_raw(source, tag, items) if tag.sign == "raw" else tag.end
    return [*items, source[start:]] if start < len(source) else items


def _scan_raw(source: str, tag: type | None, items: list[str | _Tag]) -> int:
    """Adds the text of a raw block, nested ones included, and its closing tag; returns where that ends."""
    level, tag.sign = 1, "#"
    for match in re.compile(_RAW_TAG).finditer(source, tag.end):
        level += -1 if match[1] else 1
        if level == 0:
            text = source[tag.end : match.start()]
            items += [text] * bool(text) + [_Tag("/", match.start(), ("path", match[1], match[1], match.start()))]  # type: ignore[operator]
            return match.end()
    raise TemplateError(f"raw block {tag.name!r} is never closed", source, tag.position)


def _read_tag(source: str, position: int) -> _Tag:
    """The tag at `position`. A `<<` tag ends on its line and holds no other `<<`, so that to fail is cheap."""
    simple = _SIMPLE_TAG.match(source, position)
    if simple and (text := simple[1] or simple[2]) != "else" and text not in _LITERAL_WORDS:
        return _Tag("", position, ("path", text, text, simple.start(simple.lastindex or 0)), simple.end())
    match = _TAG.match(source, position)
    assert match
    opener, sign, limit = match[1], match[3] or "", len(source)
    if opener == "<<" and (stop := re.compile(r"<<|\n").search(source, match.end())):
        limit = stop.start()
    tag = _Tag("raw" if opener == "{{{{" else "" if sign in ("{", "<", "&") else sign, position)
    if sign in ("{", "<") and sign != opener[0]:
        raise _Malformed(f"unexpected {sign!r}", position)
    if sign == "!":
        kind = opener + ("!--" if source.startswith("--", match.end()) else "!")
        end = re.compile(_TAG_ENDS[kind]).search(source, match.end(), limit)
        if not end:
            raise _Malformed("comment is never closed", position)
    else:
        end = _read_arguments(source, match.end(), limit, opener + (sign if sign in ("{", "<") else ""), tag, 0)
    tag.left, tag.right, tag.end = bool(match[2]), bool(end[1]), end.end()
    if tag.sign == "" and tag.name == "else" and tag.head and tag.head[0] == "path":
        tag.sign, tag.head = "else", tag.arguments.pop(0) if tag.arguments else None
    elif tag.sign == "^" and not tag.head:
        tag.sign = "else"
    elif not tag.head and sign != "!":
        raise _Malformed("empty tag", position)
    elif opener == "<<" and tag.sign == "" and tag.head and tag.head[0] == "literal":
        raise _Malformed("a number or a text is no tag", position)
    return tag


def _read_arguments(source: str, position: int, limit: int, opener: str, tag: type | None, depth: int) -> re.Match[str]:
    """Reads head, arguments, named arguments and block parameters into the tag; returns the match of its end."""
    if depth > _MAX_NESTING:
        raise _Malformed(f"sub-expressions nested deeper than {_MAX_NESTING}", position)
    ending, parameters = re.compile(_TAG_ENDS[opener]), re.compile(rf"\s*\|((?:\s*{_NAME})+)\s*\|")
    while not (end := ending.match(source, position, limit)):
        token, key = _TOKEN.match(source, position, limit), ""
        if token and tag.head and token["path"] == "as" and (names := parameters.match(source, token.end(), limit)):
            tag.names, position = tuple(names[1].split()), names.end()
            continue
        if token and tag.head and (equals := _EQUALS.match(source, token.end(), limit)):
            key = token["path"] or ""
            token = _TOKEN.match(source, equals.end(), limit) if re.fullmatch(_STEP, key) else None
        if not token or (not key and (tag.named or tag.names)):
            rest = source[position : min(limit, position + 60)].lstrip()
            if opener == "{{" and rest.startswith("}}}"):
                raise _Malformed("'}}}' closes only '{{{': put a space before a brace that is text", position)
            raise _Malformed(f"unexpected {rest.split()[0]!r} in a tag" if rest else f"{opener!r} is never closed", position)
        node, position = _read_operand(source, token, limit, depth)
        if key:
            tag.named[_unbracketed(key)] = node
        elif tag.head:
            tag.arguments.append(node)
        else:
            tag.head = node
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
    if kind == "path" and (number := _LITERAL_NUMBER.fullmatch(text)):
        return ("literal", float(text) if number[1] else int(text), text, start), end
    if kind == "path":
        return ("path", text, text, start), end
    inner = _Tag("(", start)
    if text != "(":
        raise _Malformed(f"unexpected {text!r} in a tag", start)
    end = _read_arguments(source, end, limit, "(", inner, depth + 1).end()
    if not inner.head or inner.head[0] != "path":
        raise _Malformed("a sub-expression starts with the name of a helper", start)
    return ("call", inner, inner.name, start), end


def _unbracketed(step: str) -> str:
    """A path step without its brackets and their escapes."""
    return re.sub(r"\\([\\\]])", r"\1", step[1:-1]) if step[0] == "[" else step


def _split_path(text: str) -> tuple[int, tuple[str, ...], bool]:
    """Levels up, steps, and whether the path names its scope: "../a.[b c]" -> (1, ("a", "b c"), True)."""
    steps = _STEPS.findall(text)
    first = next((index for index, step in enumerate(steps) if step not in (".", "..", "this")), len(steps))
    return steps[:first].count(".."), tuple(map(_unbracketed, steps[first:])), first > 0


def _strip_lines(items: list[Any]) -> list[Any]:
    """Applies `~`, and takes block tags, comments and partials that stand alone on a line out with their line."""
    stripped, last = ["", *items, ""], len(items)
    for index, tag in enumerate(items, 1):
        if isinstance(tag, str) or not (tag.sign in _STANDALONE or tag.left or tag.right):
            continue
        before, after = items[index - 2] if index > 1 else "\n", items[index] if index < last else "\n"
        if tag.sign in _STANDALONE and isinstance(before, str) and isinstance(after, str):
            _, newline, indent = before.rpartition("\n")
            rest, ending, _ = after.partition("\n")
            if not (indent.strip() or rest.strip()) and (newline or index == 2) and (ending or index == last - 1):
                tag.indent = indent[len(indent.rstrip(" \t")) :] if tag.sign == ">" and not tag.left else ""
                stripped[index - 1] = stripped[index - 1].rstrip(" \t")
                stripped[index + 1] = re.sub(r"\A[ \t]*\r?\n?", "", stripped[index + 1])
        if tag.left and isinstance(stripped[index - 1], str):
            stripped[index - 1] = stripped[index - 1].rstrip()
        if tag.right and isinstance(stripped[index + 1], str):
            stripped[index + 1] = stripped[index + 1].lstrip()
    return [item for item in stripped if item != ""]


# ---- Values: lookup, truth, text, comparison -------------------------------------------------------------------------

_MISSING: Any = object()
_PLAIN = frozenset((str, int, float, bool, list, dict, tuple))  # what a path may end at as it is; null goes the slow way
_KINDS: tuple[tuple[Any, str], ...] = (
    (type(None), "null"), (bool, "a boolean"), ((int, float), "a number"), (str, "text"), ((list, tuple), "a list"),
    (Mapping, "a map"), (object, "a Python object"),
)  # fmt: skip


def _kind(value: Any) -> str:
    """What an error calls a value."""
    return next(name for types, name in _KINDS if isinstance(value, types))


def _settled(value: Any) -> Any:
    """The value that a path ends at: a view (such as a step's results) stands for its `__template_value__`."""
    hook = None if type(value) in _PLAIN else getattr(type(value), "__template_value__", None)
    return hook(value) if hook else value


def _child(value: Any, step: str) -> Any:
    """The value under a key of a map or an index of a list, or _MISSING; never an attribute."""
    if isinstance(value, Mapping):
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
    keys = [str(key)[:50] for key, _ in zip(value, range(200))]
    listed = ", ".join(keys[:10]) + (", ..." if len(keys) > 10 else "")
    return f": {where} has {listed or 'no keys'}" + _suggestion(steps[reached], keys)


def _truthy(value: Any) -> bool:
    """Handlebars truth: false, null, "", 0 and [] are false; every map is true."""
    return bool(value) or isinstance(value, Mapping)


def _unpacked(value: Any) -> Any:
    """What JSON does not know, as something that it does."""
    if hasattr(type(value), "__template_value__"):
        return _settled(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_unpacked)


def _json_text(value: Any, indent: int | None = None) -> str:
    """JSON of a value, compact unless indented; TemplateError for what JSON cannot say (nan and infinity too)."""
    try:
        if indent is None:
            return _ENCODER.encode(value)
        return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent, default=_unpacked)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise TemplateError(f"cannot write {_kind(value)} as text: {reason}") from None


def _to_text(value: Any) -> str:
    """How a value is written into text: null as nothing; numbers, true, false, lists and maps as JSON."""
    if isinstance(value, str):
        return value
    if type(value) is int and -1000000 < value < 1000000:
        return repr(value)
    return "" if value is None else _json_text(value)


def _as_number(text: str) -> int | float | None:
    """The number that a text spells (`5`, `-0.5`, `1e3`, white space around), or None."""
    match = re.fullmatch(r"\s*([-+]?[0-9]{1,4000}(\.[0-9]+)?([eE][-+]?[0-9]+)?)\s*", text)
    return None if not match else float(match[1]) if match[2] or match[3] else int(match[1])


def _equal(left: Any, right: Any) -> bool:
    """Equality of `==`, `in` and `eq`, as Condition describes it."""
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
    if not (isinstance(left, str) and isinstance(right, str)):
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
    "==": lambda left, right: _equal(left, right),
    "!=": lambda left, right: not _equal(left, right),
    "<": lambda left, right: _order(left, right) == -1,
    "<=": lambda left, right: _order(left, right) in (-1, 0),
    ">": lambda left, right: _order(left, right) == 1,
    ">=": lambda left, right: _order(left, right) in (0, 1),
}
_HELPERS: dict[str, Callable[..., Any]] = {
    **dict(zip(("eq", "ne", "lt", "le", "gt", "ge"), _ORDERS.values())),
    "and": lambda *values: next((value for value in values if not _truthy(value)), values[-1]),
    "or": lambda *values: next((value for value in values if _truthy(value)), values[-1]),
    "not": lambda value: not _truthy(value),
    "lookup": _lookup,
    "json": lambda value, indent=None: _json_text(value, indent),
    "default": lambda *values: next((value for value in values[:-1] if value is not None and value != ""), values[-1]),
    "length": _length_of,
    "join": _join_values,
    "upper": lambda value: _to_text(value).upper(),
    "lower": lambda value: _to_text(value).lower(),
    "trim": lambda value: _to_text(value).strip(),
    "truncate": _truncate,
    "log": lambda *values, **named: "",
}
_LENIENT = frozenset(("if", "unless", "default", "and", "or", "not"))  # a missing value is null in their arguments


# ---- Compiler --------------------------------------------------------------------------------------------------------


def _root_frame(root: Any) -> _Frame:
    """What a tag sees besides `this`. The tuples are linked lists: the last item is the tuple of the block around."""
    return {
        "root": root,
        "contexts": (root, None),  # this, the contexts around it
        "loop": None,  # (index, key, first, last, the loop around it)
        "parameters": None,  # (the values of block parameters ..., those of the block around it)
        "partials": {},  # inline partials: name -> (program, the frame it is defined in)
        "block": None,  # @partial-block: (program, the frame it is defined in)
        "level": 0,  # of partials in partials
    }


def _inside(frame: _Frame, value: Any, names: Sequence[str] = ()) -> _Frame:
    """The frame of a block whose `this` is the value; its block parameter too, if it has one."""
    inner = {**frame, "contexts": (value, frame["contexts"])}
    if names:
        inner["parameters"] = (value, frame["parameters"])
    return inner


def _nothing(this: Any, frame: Any) -> str:
    return ""


def _constant(value: Any) -> Callable[..., Any]:
    """A closure that gives the value, whatever it is called with, and says so."""

    def evaluate(this: Any, frame: Any = None) -> Any:
        return value

    evaluate.constant = value  # type: ignore[attr-defined]
    return evaluate


def _climber(chain: str, levels: int, slot: int) -> _Read:
    """Reads a slot of one of the frame's linked lists, some levels up."""

    def read(this: Any, frame: _Frame) -> Any:
        link = frame[chain]
        for _ in range(levels):
            link = link and link[-1]
        return link[slot] if link and slot < len(link) - 1 else _MISSING

    return read


def _path_reader(steps: tuple[str, ...], start: _Read | None = None, missing: _Read | None = None, raw: bool = False) -> _Read:
    """Reads a path from `this` or from what `start` reads. A missing value is null unless `missing` raises."""

    def read(this: Any, frame: Any) -> Any:
        value = start(this, frame) if start else this
        for step in steps:
            value = _child(value, step)
        if value is _MISSING:
            return missing(this, frame) if missing else None
        return value if raw else _settled(value)

    first, second, third = (*steps, "", "", "")[:3]

    def read_one(this: Any, frame: Any) -> Any:
        value = this.get(first) if type(this) is dict else None
        return value if type(value) in _PLAIN else read(this, frame)

    def read_two(this: Any, frame: Any) -> Any:
        value = this.get(first) if type(this) is dict else None
        value = value.get(second) if type(value) is dict else None
        return value if type(value) in _PLAIN else read(this, frame)

    def read_three(this: Any, frame: Any) -> Any:
        value = this.get(first) if type(this) is dict else None
        value = value.get(second) if type(value) is dict else None
        value = value.get(third) if type(value) is dict else None
        return value if type(value) in _PLAIN else read(this, frame)

    return read if start or not 1 <= len(steps) <= 3 else (read_one, read_two, read_three)[len(steps) - 1]


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


def _render_each(value: Any, body: _Read, inverse: _Read, names: Sequence[str], this: Any, frame: _Frame) -> Any:
    """The body once for each item of a list or map; the inverse if there is none."""
    listed = isinstance(value, (list, tuple))
    keys: Any = range(len(value)) if listed else list(value) if isinstance(value, Mapping) else ()
    if not keys:
        return inverse(this, frame)
    inner, contexts, around, last, texts = {**frame}, frame["contexts"], frame["loop"], len(keys) - 1, []
    for index, (key, item) in enumerate(zip(keys, value if listed else [value[key] for key in keys])):
        inner["contexts"], inner["loop"] = (item, contexts), (index, key, index == 0, index == last, around)
        if names:
            inner["parameters"] = (item, key, frame["parameters"])
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
        self.scopes: list[bool | None] = [True]  # is `this` the root, level by level? None: depends on a value
        self.names: list[tuple[str, ...]] = []  # block parameters, level by level
        self.guards: list[tuple[str, ...]] = []  # the paths that the #if and #unless around ask for
        self.references: list[tuple[tuple[str, ...], bool, int, bool]] = []  # the last: starts at @root
        self.calls: list[tuple[str, bool, set[str], int]] = []  # partials: name, context is the root, keys, position
        self.dynamic = self.framed = False  # has tags that render; needs a frame

    def error(self, reason: str, position: int) -> TemplateError:
        return TemplateError(reason + (f" in partial {self.name!r}" if self.name else ""), self.source, position)

    def program(self, opener: _Tag | None, scope: Sequence[bool | None] = (), names: Sequence[str] = ()) -> _Read:
        """Compiles up to the tag that ends the opener's body, or to the end of the source."""
        parts: list[Any] = []
        inlines: dict[str, _Read] = {}
        outer_scopes, outer_names, end = len(self.scopes), len(self.names), _Tag("", 0)
        self.scopes += scope
        self.names += [tuple(names)] if names else []
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
            elif item.sign != "!":
                parts.append(self.tag(item))
        if opener and not end.sign:
            raise self.error(f"block '{opener.sign}{opener.name}' is never closed", opener.position)
        if end.sign and not opener:
            raise self.error(f"'{end.sign}{end.name}' outside of a block", end.position)
        del self.scopes[outer_scopes:], self.names[outer_names:]
        self.nesting -= 1
        self.end, self.inlines, program = end, inlines, _joined(parts)

        def render(this: Any, frame: _Frame) -> Any:
            inner = {**frame}
            inner["partials"] = {**frame["partials"], **{name: (body, inner) for name, body in inlines.items()}}
            return program(this, inner)

        return render if inlines else program

    def close(self, opener: _Tag) -> None:
        """Checks that the tag that ended the last program closes the opener."""
        wanted, found = (_split_path(name) for name in (opener.name, self.end.name))
        if self.end.sign != "/" or wanted != found:
            line = self.source.count("\n", 0, opener.position) + 1
            ending = f"'/{self.end.name}'" if self.end.sign == "/" else "a second else"
            raise self.error(f"{ending} does not close '{opener.sign}{opener.name}' of line {line}", self.end.position)

    def bodies(self, tag: type | None, scope: Sequence[bool | None], chained: bool) -> tuple[_Read, _Read]:
        """The body and the inverse of a block. A chained one (`else if`) leaves its end to the block it is in."""
        first: tuple[Any, ...] = (scope, tag.names)
        second: tuple[Any, ...] = ((), ())
        if tag.sign == "^":
            first, second = second, first
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

    def tag(self, tag: type | None) -> _Read:
        """The closure of a tag and, if it opens a block, of all up to its end."""
        self.dynamic = True
        if tag.sign == "":
            return self.value(tag)
        self.framed = True
        if tag.sign in ("#", "^"):
            return self.block(tag)
        if tag.sign in (">", "#>"):
            return self.partial(tag)
        raise self.error(f"unexpected {tag.sign!r}", tag.position)

    def inline(self, tag: type | None) -> dict[str, _Read]:
        """{{#*inline "name"}}: a partial for the block it stands in."""
        if tag.name != "inline" or len(tag.arguments) != 1 or tag.arguments[0][0] != "literal":
            raise self.error('the only decorator is {{#*inline "name"}}', tag.position)
        self.framed = True
        body = self.program(tag, (None,))
        self.close(tag)
        return {tag.arguments[0][2]: body}

    def block(self, tag: type | None, chained: bool = False) -> _Read:
        name = tag.name if tag.head and tag.head[0] == "path" else ""
        if name in self.helpers:
            return self.helper_block(tag, chained)
        if name in _BLOCKS:
            if len(tag.arguments) != 1:
                raise self.error(f"#{name} takes one argument", tag.position)
            return _BLOCKS[name](self, tag, chained)
        if name == "raw" and not tag.arguments:
            return self.bodies(tag, (), chained)[0]
        return self.section(self.value(tag), tag, chained)

    def section(self, read: _Read, tag: type | None, chained: bool) -> _Read:
        """`{{#x}}`: once for true, for each item of a list, with any other value as `this`; else the inverse."""
        names, (body, inverse) = tag.names, self.bodies(tag, (None,), chained)

        def render(this: Any, frame: _Frame) -> Any:
            value = read(this, frame)
            if isinstance(value, (list, tuple)):
                return _render_each(value, body, inverse, names, this, frame)
            if value is None or value is False:
                return inverse(this, frame)
            inner = _inside(frame, value, names)
            return body(value, inner) if value is not True else body(this, {**inner, "contexts": frame["contexts"]})

        return render

    def if_block(self, tag: type | None, chained: bool) -> _Read:
        seen, guarded = len(self.references), len(self.guards)
        test, zero = self.expression(tag.arguments[0], True), self.named(tag, True).get("includeZero", _nothing)
        self.guards += [steps for steps, *_ in self.references[seen:]]
        body, inverse = self.bodies(tag, (), chained)
        del self.guards[guarded:]
        if tag.name == "unless":
            body, inverse = inverse, body

        def render(this: Any, frame: _Frame) -> Any:
            value = test(this, frame)
            true = _truthy(value) or (value is not False and value == 0 and _truthy(zero(this, frame)))
            return body(this, frame) if true else inverse(this, frame)

        return render

    def each_block(self, tag: type | None, chained: bool) -> _Read:
        read, names, strict = self.expression(tag.arguments[0]), tag.names, self.strict
        body, inverse = self.bodies(tag, (False,), chained)

        def render(this: Any, frame: _Frame) -> Any:
            value = read(this, frame)
            if strict and not isinstance(value, (list, tuple, Mapping, type(None))):
                raise self.error(f"#each needs a list or a map, not {_kind(value)}", tag.position)
            return _render_each(value, body, inverse, names, this, frame)

        return render

    def with_block(self, tag: type | None, chained: bool) -> _Read:
        read, names, same = self.expression(tag.arguments[0], raw=True), tag.names, tag.arguments[0][2] in (".", "this")
        body, inverse = self.bodies(tag, () if same else (False,), chained)

        def render(this: Any, frame: _Frame) -> Any:
            value = read(this, frame)
            settled, inner = _settled(value), _inside(frame, value, names)
            if not _truthy(settled) and (settled is False or settled != 0):
                return inverse(this, frame)
            return body(value, {**inner, "contexts": frame["contexts"]} if same else inner)

        return render

    def helper_block(self, tag: type | None, chained: bool) -> _Read:
        """A block that calls a helper. One that takes `options` renders the bodies itself: options.fn(context) and
        options.inverse(context), for the context around it by default; options.hash has the named arguments and
        options.this the context. What another helper returns is the value of a section."""
        function, names = self.helpers[tag.name], tag.names
        code = getattr(function, "__code__", None)
        if not code or "options" not in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            return self.section(self.call(tag, False), tag, chained)
        arguments, named = [self.expression(node) for node in tag.arguments], self.named(tag)
        body, inverse = self.bodies(tag, (None,), chained)

        def render(this: Any, frame: _Frame) -> Any:
            def render_body(program: _Read, context: Any = _MISSING) -> Any:
                same = context is _MISSING or context is this
                return program(this, frame) if same else program(context, _inside(frame, context, names))

            fn, other = functools.partial(render_body, body), functools.partial(render_body, inverse)
            values = {key: read(this, frame) for key, read in named.items()}
            options = SimpleNamespace(fn=fn, inverse=other, hash=values, this=this)
            return self.invoke(tag, function, [read(this, frame) for read in arguments], {**values, "options": options})

        return render

    def value(self, tag: type | None) -> _Read:
        """`{{head arguments}}`: a helper's value if arguments or a helper of the caller's ask for one, else a path's."""
        assert tag.head
        kind, content, text, position = tag.head
        if kind != "call" and (tag.arguments or tag.named or text in self.helpers):
            return self.call(tag, False)
        if tag.arguments or tag.named or (tag.names and not tag.sign):
            raise self.error("unexpected arguments", position)
        return self.expression(("key" if kind == "literal" else kind, content, text, position))

    def call(self, tag: type | None, lenient: bool) -> _Read:
        """A helper call. A missing value is null in the arguments of helpers that ask whether it is there."""
        function = self.helpers.get(tag.name) or _HELPERS.get(tag.name)
        if function is None:
            known = _suggestion(tag.name, [*self.helpers, *_HELPERS])
            raise self.error(f"unknown helper {tag.name!r}{known}", tag.head[3] if tag.head else 0)
        lenient = lenient or tag.name in _LENIENT
        reads = [self.expression(node, lenient, raw=function is _lookup) for node in tag.arguments]
        named, invoke, strict = self.named(tag, lenient), self.invoke, self.strict and not lenient

        def read(this: Any, frame: Any) -> Any:
            values = [read(this, frame) for read in reads]
            value = invoke(tag, function, values, {key: read(this, frame) for key, read in named.items()})
            if value is _MISSING and strict:
                raise self.error(f"missing value {values[1]!r}{_there(values[0], _to_text(values[1]))}", tag.position)
            return None if value is _MISSING else value

        return read

    def named(self, tag: type | None, lenient: bool = False) -> dict[str, _Read]:
        return {key: self.expression(node, lenient) for key, node in tag.named.items()}

    def invoke(self, tag: type | None, function: Any, values: list[Any], named: dict[str, Any]) -> Any:
        try:
            return function(*values, **named)
        except RecursionError:
            raise
        except Exception as error:
            reason = str(error).replace("<lambda>()", "it") or type(error).__name__
            raise self.error(f"helper {tag.name!r}: {reason}", tag.position) from error

    def expression(self, node: _Expression, lenient: bool = False, raw: bool = False) -> _Read:
        """The closure of a node. Lenient: a missing value is null. Raw: a view at the end of a path stays a view."""
        kind, content, text, position = node
        if kind == "literal":
            return _constant(content)
        if kind == "call":
            return self.call(content, lenient)
        depth, steps, fixed = (0, (text,), True) if kind == "key" else _split_path(text)
        if kind == "path" and not {".", "..", "this"}.isdisjoint(step for step in _STEPS.findall(text)[-len(steps) :] if steps):
            raise self.error(f"invalid path {text!r}: '.', '..' and 'this' come first", position)
        start: _Read | None = None
        level = next((level for level, names in enumerate(reversed(self.names)) if steps and steps[0] in names), None)
        if kind == "path" and text[0] == "@":
            slots = {"index": 0, "key": 1, "first": 2, "last": 3}
            if steps[:1] == ("root",):
                self.refer(steps[1:], lenient, position, True)
                start = lambda this, frame: frame["root"]  # noqa: E731
            elif steps == ("partial-block",):
                start = lambda this, frame: frame["block"] is not None  # noqa: E731
            else:
                start = _climber("loop", depth, slots.get(steps[0] if steps else "", 9))
            steps = steps[1:]
        elif level is not None and not fixed:
            start, steps = _climber("parameters", level, self.names[-1 - level].index(steps[0])), steps[1:]
        else:
            scopes = self.scopes[len(self.scopes) - 1 - depth :] if depth < len(self.scopes) else [False]
            if scopes[0]:
                self.refer(steps, lenient or None in scopes, position, False)
            start = _climber("contexts", depth, 0) if depth else None
        self.framed = self.framed or start is not None
        missing = self.missing(text, steps, start, position) if self.strict and not lenient else None
        return _path_reader(steps, start, missing, raw)

    def refer(self, steps: tuple[str, ...], lenient: bool, position: int, absolute: bool) -> None:
        if steps:
            required = not lenient and not any(steps[: len(guard)] == guard for guard in self.guards)
            self.references.append((steps, required, position, absolute))

    def missing(self, text: str, steps: tuple[str, ...], start: _Read | None, position: int) -> _Read:
        """Raises the error for a missing value: what there is instead, and where it may be meant."""
        inside = len(self.scopes) > 1

        def fail(this: Any, frame: Any) -> Any:
            value = start(this, frame) if start else this
            if value is _MISSING:
                raise self.error(f"missing value {text!r}: there is no such scope or loop here", position)
            elsewhere = inside and not start and frame and _child(frame["root"], steps[0]) is not _MISSING
            hint = f"; inside a block write ../{text} or @root.{text}" if elsewhere else ""
            raise self.error(f"missing value {text!r}{_there(value, *steps)}{hint}", position)

        return fail

    def partial(self, tag: type | None) -> _Read:
        """`{{> name context key=value}}`, or `{{#> name}}` with a block that the partial renders as @partial-block."""
        assert tag.head
        kind, content, name, _ = tag.head
        name = _unbracketed(name) if kind == "path" else name
        name_of = self.call(content, False) if kind == "call" else None
        if len(tag.arguments) > 1:
            raise self.error("a partial takes one context", tag.position)
        own_block, indent, partials = kind == "path" and name == "@partial-block", tag.indent, self.partials
        if self.strict and tag.sign == ">" and not (name_of or own_block or self.name or name in partials):
            inlines = [item.arguments[0][2] for item in self.items if type(item) is _Tag and item.sign == "#*" and item.arguments]
            if name not in inlines:
                raise self.error(f"unknown partial {name!r}{_suggestion(name, partials)}", tag.position)
        context = self.expression(tag.arguments[0], raw=True) if tag.arguments else None
        named, same = self.named(tag), not tag.arguments or tag.arguments[0][2] in (".", "this")
        self.calls.append((name, same and self.scopes[-1] is True, set(named), tag.position))
        block = self.program(tag) if tag.sign == "#>" else None
        defined = self.inlines if block else {}
        if block:
            self.close(tag)

        def render(this: Any, frame: _Frame) -> str:
            known = _to_text(name_of(this, frame)) if name_of else name
            if frame["level"] >= _MAX_NESTING:
                raise self.error(f"partial recursion: {known!r} is more than {_MAX_NESTING} partials deep", tag.position)
            value = context(this, frame) if context else this
            if named:
                values = {key: read(this, frame) for key, read in named.items()}
                value = ChainMap(values, value) if isinstance(value, Mapping) else values  # type: ignore[arg-type]
            found = frame["block"] if own_block else frame["partials"].get(known)
            template = None if found or own_block else partials.template(known)
            if not (template or found or block):
                raise self.error(f"unknown partial {known!r}{_suggestion(known, partials)}", tag.position)
            program, origin = (template._program, frame) if template else found or (block, frame)
            inner = {**origin} if value is origin["contexts"][0] else _inside(origin, value)
            inner["level"], inner["loop"] = frame["level"] + 1, frame["loop"]
            if not own_block and (found or template):
                inner["block"] = (block, frame) if block else frame["block"]
            if defined:
                inner["partials"] = {**inner["partials"], **{key: (body, frame) for key, body in defined.items()}}
            text = program(value, inner)
            return re.sub(r"^(?!\Z)", indent, text, flags=re.M) if indent else str(text)

        return render


_BLOCKS: dict[str, Callable[[_TemplateCompiler, _Tag, bool], _Read]] = {
    "if": _TemplateCompiler.if_block,
    "unless": _TemplateCompiler.if_block,
    "each": _TemplateCompiler.each_block,
    "with": _TemplateCompiler.with_block,
}


class Template:
    """A compiled template: Handlebars without HTML escaping, `{{x}}` or `<<x>>`.

    `strict`: a missing value is a TemplateError (else it renders as nothing), but not in the arguments of #if, #unless,
    default, and, or, not. `partials`: name -> source or Template. `helpers`: name -> function, called with the
    arguments of the tag, the named ones as keywords; one that takes `options` can be a block (options.fn, .inverse).

    A `<<` opens a tag if what follows, on the same line and up to `>>`, is a tag: a path, a helper call, a block tag;
    not a bare number or quoted text, and with no other `<<` in it. Otherwise it is plain text, as in `cout << x`.
    `\\{{x}}` and `\\<<x>>` are text too. Numbers that JSON cannot write (nan, infinity) are refused.
    """

    __slots__ = ("_calls", "_constant", "_framed", "_partials", "_program", "_references", "_value", "is_expression", "source")

    def __init__(
        self, source: str, strict: bool = True, partials: Mapping[str, Any] | None = None,
        helpers: _Helpers | None = None, _name: str = "",
    ) -> None:  # fmt: skip
        if not isinstance(source, str):
            raise TemplateError(f"a template is text, not {_kind(source)}")
        self.source = source
        self._partials = partials if isinstance(partials, _Partials) else _Partials(partials, strict, helpers)
        compiler = _TemplateCompiler(source, strict, self._partials, helpers or {}, _name)
        first = compiler.items[0] if len(compiler.items) == 1 else ""
        self.is_expression = isinstance(first, _Tag) and first.sign == "" and first.end - first.position == len(source)
        self._value = compiler.tag(first) if self.is_expression else compiler.program(None)
        self._program = _joined([self._value]) if self.is_expression else self._value
        self._framed, self._constant = compiler.framed, not compiler.dynamic
        self._references, self._calls = compiler.references, compiler.calls

    def render(self, context: Any) -> str:
        """The text for a context (a map of names to JSON-like values). TemplateError for a missing value (strict)."""
        try:
            return self._program(context, _root_frame(context) if self._framed else None)  # type: ignore[no-any-return]
        except RecursionError:
            raise TemplateError("nested too deeply to render") from None

    def evaluate(self, context: Any) -> Any:
        """The value itself if the source is one `{{expression}}` and nothing else; otherwise the text."""
        try:
            return self._value(context, _root_frame(context) if self._framed else None)
        except RecursionError:
            raise TemplateError("nested too deeply to render") from None

    @property
    def references(self) -> tuple[Reference, ...]:
        """Every path read from the root: (segments, required, position). Required: it raises if missing and strict."""
        return tuple(reference[:3] for reference in self._root_references(()))

    def _root_references(self, active: tuple[str, ...]) -> list[tuple[tuple[str, ...], bool, int, bool]]:
        found = list(self._references)
        for name, at_root, keys, position in self._calls:
            partial = self._partials.template(name) if name not in active else None
            for steps, required, _, absolute in partial._root_references((*active, name)) if partial else ():
                if absolute or (at_root and steps[0] not in keys):
                    found.append((steps, required, position, absolute))
        return found


def _compile_value(
    value: Any, strict: bool = True, partials: Mapping[str, Any] | None = None, helpers: _Helpers | None = None, depth: int = 0
) -> tuple[Callable[[Any], Any], tuple[Reference, ...]]:
    """(context -> value, references) for a JSON-like value whose texts, keys aside, are templates."""
    if depth > _MAX_NESTING:
        raise TemplateError(f"values nested deeper than {_MAX_NESTING}")
    if isinstance(value, str) and ("{{" in value or "<<" in value):
        template = Template(value, strict, partials, helpers)
        return (template.evaluate, template.references) if not template._constant else (_constant(template.render({})), ())
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    compiled = [_compile_value(item, strict, partials, helpers, depth + 1) for item in items]
    results, references = [evaluate for evaluate, _ in compiled], tuple(found for _, inner in compiled for found in inner)
    if all(getattr(evaluate, "constant", _MISSING) is item for evaluate, item in zip(results, items)):
        return _constant(value), ()
    if isinstance(value, dict):
        keys = list(value)
        return lambda context: dict(zip(keys, [evaluate(context) for evaluate in results])), references
    return lambda context: [evaluate(context) for evaluate in results], references


# ---------------------------------------------------------------------------------------------------------------------
# 5. Conditions: text -> compiled predicate. A parser of its own (never `eval`); a reference or a tag is an operand, so that
# no value can change the expression. Regular expressions pass a guard that bounds what backtracking may cost.
# ---------------------------------------------------------------------------------------------------------------------

_CONDITION_TOKEN = re.compile(
    r"""\s*(?:(?P<text>"[^"\\]*(?:\\.[^"\\]*)*"|'[^'\\]*(?:\\.[^'\\]*)*')|(?P<tag>\{\{|<<)"""
    r"""|(?P<number>-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[-+]?[0-9]+)?(?![\w.]))"""
    r"""|(?P<mark>not\s+in(?![\w.-])|\|\||&&|[=!]=(?!=)|<=|>=|[<>!()\[\],])"""
    r"""|(?P<path>[^\W\d][\w-]*(?:\.(?:[\w-]+|\[[^\]\n]*\])|\[(?:\d+|'[^'\]\n]*'|"[^"\]\n]*")\])*))""",
    re.S | re.I,
)
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}
_CONDITION_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\", "'": "'", '"': '"'}
_OR, _AND, _NOT, _COMPARISON = 1, 2, 3, 4  # precedence


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
    return _to_text(item) in container if isinstance(container, str) else _child(container, _to_text(item)) is not _MISSING


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
    "in": lambda left, right: _contains(right, left),
    "not in": lambda left, right: not _contains(right, left),
    "contains": _contains,
    "startswith": _on_texts(str.startswith),
    "endswith": _on_texts(str.endswith),
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
        """To the next token: its kind (None for none), its text and where it starts; `mark` is an operator's spelling."""
        match = _CONDITION_TOKEN.match(self.source, self.end)
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
        hints = {"=": ": use '=='", "'": ": this text is never closed", '"': ": this text is never closed"}
        return self.error(f"unexpected {rest[1][:40]!r}{hints.get(rest[1][0], '') if not self.word else ''}", rest.start(1))

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
        """`or` (an operand that holds decides) or `and` (one that does not); its value is that of the deciding operand."""

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
            except (TypeError, TemplateError) as error:
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
        if kind == "number":
            number = _as_number(word)
            return _constant(float(word) if number is None else number)
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
        return _constant(template.render({})) if template._constant else lambda this, frame: template.render(this)

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
            steps = tuple(step.strip("[]'\"") if step[0] == "[" else step for step in re.findall(r"\[[^\]]*\]|[\w-]+", text))
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

    Equality: a text equals the number that it spells and, in any case, the boolean; booleans and numbers are never equal
    (`true == 1` is false); lists and maps are equal item by item. Order: numbers, or texts by code point; a text that
    spells a number orders with numbers; null orders with nothing (false). Truth: Handlebars', with the texts "false",
    "no" and "0" false too. `or` and `and` give the value of the operand that decides, as in Python.
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

_MAX_SEARCHED = 1_000_000  # characters
_MAX_STEPS = 100_000_000  # of backtracking in the worst case: about a second
_SAMPLES = "".join(map(chr, range(128))) + "\u00e9\u0416\u4e2d\u0663\u00a0\u2028\u00b2\u20ac\U0001f600"
_regex_parser: Any = getattr(re, "_parser", None) or getattr(re, "sre_parse", None)
_regex_compiler: Any = getattr(re, "_compiler", None) or getattr(re, "sre_compile", None)


def _compile_regex(pattern: str) -> re.Pattern[str]:
    """A compiled pattern whose worst case is bounded (see _regex_plan); ConditionError for a bad or unsafe one."""
    try:
        _regex_plan(pattern)
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        raise ConditionError(f"bad regular expression: {str(error) or 'nested too deeply'}", pattern) from None


def _guarded_search(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """pattern.search(text); ConditionError if the text is so long that this could take more than about a second."""
    longest, search = _regex_plan(pattern.pattern)
    if len(text) > longest:
        reason = f"a text of {len(text)} characters is too long for this regular expression (at most {longest})"
        raise ConditionError(reason + "; anchoring it with ^ helps", pattern.pattern)
    return search(text)


@functools.lru_cache(maxsize=256)
def _regex_plan(pattern: str) -> tuple[int, Callable[[str], re.Match[str] | None]]:
    """How long a text may be for a search to end in about a second, and that search; ConditionError for no length.

    Backtracking costs ways * length ** power: a choice that the next character does not decide multiplies the ways
    (alternatives, bounded repeats) or raises the power (open repeats). A search starts at every character, but for a
    pattern that begins with an open repeat of a set: within a run of the set it need start only once.
    """
    tree = _regex_parser.parse(pattern)
    nodes, cost = list(tree), _RegexCost(tree, pattern)
    if len(pattern) > 2000:
        raise ConditionError("a regular expression has at most 2000 characters", pattern[:100])
    _, ways, power, _, _ = cost.sequence(nodes, (frozenset(), 1, 0, False, True), 0)
    starts_anywhere = not (nodes and str(nodes[0][1]) in ("AT_BEGINNING", "AT_BEGINNING_STRING")) or tree.state.flags & re.M
    search = re.compile(pattern).search
    lead = nodes
    while lead and lead[0][0].name == "SUBPATTERN" and not (lead[0][1][1] or lead[0][1][2]):
        lead = list(lead[0][1][-1])
    if lead and lead[0][0].name in ("MAX_REPEAT", "MIN_REPEAT") and lead[0][1][1] == _regex_parser.MAXREPEAT:
        body = list(lead[0][1][2])
        if len(body) == 1 and body[0][0].name in _SETS and cost.rest_power == 0:
            guard = _regex_parser.SubPattern(tree.state, body)
            tree.insert(0, (_regex_parser.ASSERT_NOT, (-1, guard)))
            search, starts_anywhere = _regex_compiler.compile(tree).search, False
    longest = min(_MAX_SEARCHED, int((_MAX_STEPS / ways) ** (1 / max(1, power + bool(starts_anywhere)))))
    if longest < 500:
        raise ConditionError("this regular expression can take forever on some texts", pattern)
    return longest, search


_SETS = frozenset(("LITERAL", "NOT_LITERAL", "IN", "ANY"))  # nodes that take one character


class _RegexCost:
    """Walks a parsed pattern from its end. A state, of what follows a place: the characters it may start with, ways,
    power, whether a choice in it is ambiguous, and whether it cannot fail."""

    def __init__(self, tree: Any, pattern: str) -> None:
        self.tree, self.pattern, self.rest_power, self.known = tree, pattern, 0, {}  # type: ignore[var-annotated]
        numbers = (int(number) for number in re.findall(r"\d+", repr(tree)))
        self.samples = set(_SAMPLES) | {chr(number) for number in numbers if number < 0x110000}

    def sequence(self, nodes: Any, state: Any, depth: int) -> Any:
        for operation, argument in reversed(list(nodes)):
            self.rest_power = state[2]
            state = self.node(operation, argument, state, depth)
        return state

    def characters(self, node: Any) -> frozenset[str]:
        """The sample characters that a node takes."""
        if repr(node) not in self.known:
            single = _regex_compiler.compile(_regex_parser.SubPattern(self.tree.state, [node]))
            self.known[repr(node)] = frozenset(filter(single.match, self.samples))
        return self.known[repr(node)]  # type: ignore[no-any-return]

    def node(self, operation: Any, argument: Any, state: Any, depth: int) -> Any:
        first, ways, power, ambiguous, _ = state
        name = operation.name
        if name in _SETS:
            return self.characters((operation, argument)), ways, power, ambiguous, False
        if name == "AT":
            return first, ways, power, ambiguous, False
        if name in ("SUBPATTERN", "ATOMIC_GROUP"):
            return self.sequence(argument[-1] if name == "SUBPATTERN" else argument, state, depth)
        if name == "BRANCH":
            arms = [self.sequence(arm, state, depth) for arm in argument[1]]
            firsts = frozenset().union(*(arm[0] for arm in arms))
            overlap = sum(len(arm[0]) for arm in arms) > len(firsts)
            total = (sum if overlap else max)(arm[1] for arm in arms)
            return firsts, total, max(arm[2] for arm in arms), overlap or any(arm[3] for arm in arms), False
        if name in ("ASSERT", "ASSERT_NOT"):
            inner = self.sequence(argument[1], (frozenset(), 1, 0, False, True), depth)
            return first, ways * inner[1], power + inner[2], ambiguous or inner[3], False
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            return self.repeat(*argument, state, depth + 1)
        raise ConditionError("back references and conditions in a regular expression can take forever", self.pattern)

    def repeat(self, low: int, high: int, body: Any, state: Any, depth: int) -> Any:
        first, ways, power, ambiguous, sure = state
        if depth > 6:
            raise ConditionError("repeats in a regular expression are nested deeper than 6", self.pattern)
        starts = self.sequence(body, (frozenset([""]), 1, 0, False, False), depth)[0]
        optional, starts = low == 0 or "" in starts, starts - {""}
        inner = self.sequence(body, (starts | first if high > 1 else first, 1, 0, False, False), depth)
        undecided = low != high and bool(starts & first)
        if inner[3] and high > 20:
            raise ConditionError("nested repeats in this regular expression can take forever", self.pattern)
        ways *= inner[1] ** high if inner[3] else 1
        power = power + inner[2] * high if inner[3] else max(power, inner[2])
        if high > 50:
            power = power + 1 if undecided else power if sure else max(power, 1)
            ways *= 1 if len(body) == 1 and body[0][0].name in _SETS else 10  # groups repeat more slowly than sets
        elif undecided:
            ways *= high - low + 1
        return starts | (first if optional else frozenset()), ways, power, ambiguous or inner[3] or undecided, sure and low == 0


# ---------------------------------------------------------------------------------------------------------------------
# 6. Workflow: plain values -> Workflow and Steps, validated
# A document (mapping) comes in; a Workflow goes out. Every problem is collected with its place, so that one
# `validate` shows all of them. What is compiled here (templates, conditions, defaults) is never parsed again by a run.
# ---------------------------------------------------------------------------------------------------------------------

_IDENTIFIER = re.compile(r"[A-Za-z0-9_-]+\Z")
_DURATION = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*(ms|s|m|h)?\Z")
_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_MAX_WORKFLOW_DEPTH = 16


def _seconds(value: Any, bare_unit: str) -> float | None:
    """A duration in seconds from a number (in `bare_unit`) or a text such as "1.5s" or "200ms"; None if it is none."""
    if isinstance(value, str) and len(value) < 40:
        match = _DURATION.match(value.strip())
        return float(match[1]) * _UNIT_SECONDS[match[2] or bare_unit] if match else None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12:
        return value * _UNIT_SECONDS[bare_unit]
    return None


def _type_name(value: Any) -> str:
    """What a reader calls the type of a value: text, a number, a list ..."""
    if isinstance(value, bool):
        return "a boolean"
    named = ((str, "text"), (int, "a number"), (float, "a number"), (Mapping, "a map"), ((list, tuple), "a list"))
    return "null" if value is None else next((name for kind, name in named if isinstance(value, kind)), "something else")


def _shown(value: Any) -> str:
    """A short picture of a wrong value for an error message."""
    return _type_name(value) if isinstance(value, (Mapping, list, tuple)) or value is None else _shorten(repr(value), 60)


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _has_tag(value: Any) -> bool:
    return isinstance(value, str) and ("{{" in value or "<<" in value)


# Checks: value -> what is wrong with it ("must be ..."), or None. The tables of keys below are made of them.


def _must(description: str, accepts: Callable[[Any], bool]) -> Callable[[Any], str | None]:
    return lambda value: None if accepts(value) else f"must be {description}, not {_shown(value)}"


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _number(low: float, high: float) -> Callable[[Any], str | None]:
    return _must(f"a number from {low:g} to {high:g}", lambda value: _is_number(value) and low <= value <= high)


def _integer(low: int, high: int = 2**53) -> Callable[[Any], str | None]:
    span = f"a whole number of at least {low}" if high == 2**53 else f"a whole number from {low} to {high}"
    return _must(span, lambda value: _is_integer(value) and low <= value <= high)


def _one_of(*names: str) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if isinstance(value, str) and value in names:
            return None
        return f"must be one of {', '.join(names)}, not {_shown(value)}" + _suggestion(value, names)

    return check


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


_text = _must("text", lambda value: isinstance(value, str))
_name = _must("a name", lambda value: isinstance(value, str) and bool(value.strip()))
_boolean = _must("true or false", lambda value: isinstance(value, bool))
_mapping = _must("a map", lambda value: isinstance(value, Mapping))
_anything = _must("a value", lambda value: True)
_names = _must("a name or a list of names", _is_names)
_texts = _must("text or a list of texts", _is_names)
_steps = _must("a list of steps", lambda value: isinstance(value, list) and bool(value))
_condition = _must("a condition", lambda value: isinstance(value, (str, bool, int)))
_timeout = _must("a number of seconds above 0", lambda value: (_seconds(value, "s") or 0) > 0)
_vector_or_text = _must("text or a list of numbers", lambda value: isinstance(value, str) or _is_vector(value))


def _is_vector(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _messages(value: Any) -> str | None:
    roles = ("system", "developer", "user", "assistant", "tool")
    if not isinstance(value, list) or not value:
        return f"must be a list of {{role, content}}, not {_shown(value)}"
    for index, message in enumerate(value):
        if not isinstance(message, Mapping) or message.get("role") not in roles or "content" not in message:
            return f"message {index} must be a map with a role ({', '.join(roles)}) and a content"
    return None


def _fallbacks(value: Any) -> str | None:
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        if not isinstance(entry, Mapping) or not set(entry) <= {"provider", "model"} or "provider" not in entry:
            return "must be a list of {provider, model}"
        if not all(isinstance(name, str) for name in entry.values()):
            return "must be a list of {provider, model}, both text"
    return None


_COMMON_KEYS: dict[str, Callable[[Any], str | None]] = {
    "id": _must("letters, digits, _ or -", lambda value: isinstance(value, str) and bool(_IDENTIFIER.match(value))),
    "type": _name,
    "description": _text,
    "depends_on": _names,
    "condition": _condition,
    "output": _names,
    "timeout_seconds": _timeout,
    "retry": _mapping,
    "continue_on_error": _boolean,
    "trigger_rule": _one_of("none_failed_min_one_success", "all_success", "one_success", "all_done", "one_failed"),
    "for_each": _must("a list, a map or a template", lambda value: isinstance(value, (str, list, Mapping))),
    "max_concurrency": _integer(1, 100_000),
}


class _StepType:
    """One row of the table of step types: its own keys, which of them it needs, and how its outputs are named."""

    __slots__ = ("arity", "container", "free", "keys", "literal", "required", "templates")

    def __init__(
        self,
        keys: dict[str, Callable[[Any], str | None]],
        required: tuple[str, ...] = (),
        arity: int = 1,  # how many outputs it has; 0: any number, named by its children or its callee
        free: bool = False,  # other keys are parameters
        container: bool = False,  # runs child steps and so holds no slot
        literal: tuple[str, ...] = (),  # keys that are not templates
    ) -> None:
        self.keys, self.required, self.arity, self.free, self.container = keys, required, arity, free, container
        self.literal = frozenset(literal)
        self.templates = frozenset(keys) - self.literal


_SAMPLING_KEYS: dict[str, Callable[[Any], str | None]] = {
    "temperature": _number(0, 2),
    "max_tokens": _integer(1),
    "top_p": _number(0, 1),
    "top_k": _integer(0),
    "stop": _texts,
    "seed": _integer(-(2**63), 2**63),
    "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
}
_EMBED_KEYS = {
    "provider": _name, "model": _text, "dimensions": _integer(1, 100_000), "input_type": _text,
    "batch_size": _integer(1, 10_000), "params": _mapping,
}  # fmt: skip
_VECTOR_KEYS = {"database": _name, "index": _text, "namespace": _text, "embed": _mapping}

_STEP_TYPES: dict[str, _StepType] = {
    "llm": _StepType(
        {
            "provider": _name, "model": _text, "prompt": _text, "messages": _messages, "system": _text,
            **_SAMPLING_KEYS,
            "stream": _boolean, "schema": _must("a JSON Schema or a file", lambda v: isinstance(v, (Mapping, str))),
            "schema_retries": _integer(0, 20), "tools": _names, "max_tool_rounds": _integer(1, 100),
            "fallback": _fallbacks, "params": _mapping, "cache": _boolean,
        },
        required=("provider", "model"), arity=4, literal=("provider", "schema", "tools", "fallback"),
    ),
    "embed": _StepType(
        {**_EMBED_KEYS, "input": _texts, "cache": _boolean},
        required=("provider", "model", "input"), arity=2, literal=("provider",),
    ),
    "vector_search": _StepType(
        {
            **_VECTOR_KEYS, "query": _vector_or_text, "top_k": _integer(1, 100_000), "filter": _mapping,
            "include_metadata": _boolean, "include_vectors": _boolean,
        },
        required=("database", "index", "query"), arity=2, literal=("database", "embed"),
    ),
    "vector_upsert": _StepType(
        {
            **_VECTOR_KEYS, "documents": _must("a list", lambda v: isinstance(v, (list, str))),
            "vectors": _must("a list", lambda v: isinstance(v, (list, str))),
        },
        required=("database", "index"), literal=("database", "embed"),
    ),
    "transform": _StepType(
        {"function": _name, "inputs": _must("a list of names, or a map", lambda v: isinstance(v, (list, str, Mapping)))},
        required=("function",), free=True, literal=("function", "inputs"),
    ),
    "action": _StepType({"action": _name}, required=("action",), free=True, literal=("action",)),
    "parallel": _StepType({"tasks": _steps}, required=("tasks",), arity=0, container=True, literal=("tasks",)),
    "branch": _StepType(
        {"branches": _must("a map of value: steps", lambda v: isinstance(v, Mapping) and bool(v))},
        required=("condition", "branches"), arity=0, container=True, literal=("branches",),
    ),
    "loop": _StepType(
        {
            "steps": _steps, "until": _condition, "max_iterations": _integer(1, 1_000_000),
            "on_exhausted": _one_of("fail", "continue"),
        },
        required=("steps", "until", "max_iterations"), arity=0, container=True,
        literal=("steps", "until", "max_iterations", "on_exhausted"),
    ),
    "workflow": _StepType(
        {"workflow": _must("a file or a workflow", lambda v: isinstance(v, (str, Mapping))), "inputs": _mapping},
        required=("workflow",), arity=0, container=True, literal=("workflow",),
    ),
}  # fmt: skip

_INPUT_TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: _is_integer(value) or (isinstance(value, float) and value.is_integer()),
    "number": _is_number,
    "boolean": lambda value: isinstance(value, bool),
    "array": lambda value: isinstance(value, (list, tuple)),
    "object": lambda value: isinstance(value, Mapping),
    "any": lambda value: True,
}
_INPUT_TYPE_ALIASES = {
    "str": "string", "text": "string", "int": "integer", "float": "number", "bool": "boolean",
    "list": "array", "dict": "object", "map": "object",
}  # fmt: skip
_INPUT_KEYS = {
    "type": _one_of(*_INPUT_TYPES, *_INPUT_TYPE_ALIASES), "required": _boolean, "default": _anything,
    "enum": _must("a list", lambda value: isinstance(value, list) and bool(value)), "description": _text,
}  # fmt: skip
_PROVIDER_KEYS = {
    "type": _name, "base_url": _text, "api_key_env": _name, "headers": _mapping, "timeout_seconds": _timeout,
    "rate_limit": _mapping, "circuit_breaker": _mapping, "proxy": _text, "options": _mapping,
}  # fmt: skip
_WORKFLOW_KEYS: dict[str, Callable[[Any], str | None]] = {
    "name": _name, "version": _must("text or a number", lambda value: isinstance(value, str) or _is_number(value)),
    "description": _text, "inputs": _mapping, "providers": _mapping, "defaults": _mapping, "steps": _steps,
    "outputs": _mapping, "partials": _mapping, "max_concurrency": _integer(1, 100_000), "timeout_seconds": _timeout,
    "fail_fast": _boolean, "budget": _mapping, "pricing": _mapping, "metadata": _mapping,
    "id": _anything,  # the original writes one when it serialises a workflow; it has no meaning here
}  # fmt: skip
_BUDGET_KEYS = {"max_tokens": _integer(1), "max_calls": _integer(0), "max_cost": _number(0, 1e12)}
_PRICING_KEYS = {"input": _number(0, 1e9), "output": _number(0, 1e9)}


class Step:
    """One step of a workflow, as in the document: `Step(id="greet", type="llm", provider="openai", ...)`.

    Keyword arguments are the document's keys; child steps may be Step objects too. Nothing is checked before the
    workflow is validated. `config` holds the keys that belong to the type.
    """

    __slots__ = ("document",)

    def __init__(self, id: str, type: str, **keys: Any) -> None:
        self.document: dict[str, Any] = {"id": id, "type": type, **{key: _plain(keys[key]) for key in keys}}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Step:
        """A Step from one entry of a document's `steps`; a missing id or type is found by validation."""
        step = cls.__new__(cls)
        step.document = dict(document)
        return step

    def __getattr__(self, name: str) -> Any:
        if name in _COMMON_KEYS:
            value = self.document.get(name)
            return _as_list(value) if name in ("depends_on", "output") else value
        raise AttributeError(f"a Step has no attribute {name!r}; its own keys are in Step.config")

    @property
    def config(self) -> dict[str, Any]:
        """The keys that are not common to all steps: provider, prompt, function ..."""
        return {key: value for key, value in self.document.items() if key not in _COMMON_KEYS}

    def to_dict(self) -> dict[str, Any]:
        """The step as it stands in a document."""
        return dict(self.document)

    def __repr__(self) -> str:
        return f"Step(id={self.document.get('id')!r}, type={self.document.get('type')!r})"


def _plain(value: Any) -> Any:
    """Step and Workflow objects inside keyword arguments as the document's plain values."""
    if isinstance(value, (Step, Workflow)):
        return value.to_dict()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


class Workflow:
    """A workflow: its document's keys as attributes, and `steps`, a list of Step that may be extended.

    `from_file`, `from_yaml`, `from_json` and `from_dict` raise ParseError for text that cannot be read and
    ValidationError for a document whose shape is wrong (keys, types, templates). References and cycles are checked
    there too, but reported by `validate()`, by WorkflowDAG and by WorkflowExecutor.
    """

    def __init__(self, name: str, steps: Iterable[Step | Mapping[str, Any]] = (), **keys: Any) -> None:
        self._document: dict[str, Any] = {"name": name, **{key: _plain(keys[key]) for key in keys}}
        self.steps = [step if isinstance(step, Step) else Step.from_dict(step) for step in steps]
        self.source = "workflow"  # shown before the problems; a file's name if there is one
        self.folder: str | None = None  # where relative paths (sub-workflows, schemas) start
        self._source_text = ""
        self._compiled: tuple[tuple[Step, ...], _Plan] | None = None
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
        """The workflow in a YAML or JSON file (by its ending; others are read as YAML).

        Raises ParseError, ValidationError, or OrchestratorError for a file that cannot be read.
        """
        return cls._from_path(os.fspath(path), {})

    @classmethod
    def from_yaml(cls, text: str | bytes) -> Workflow:
        """The workflow in a YAML text (so also in a JSON text)."""
        return cls._from_text(text, load_yaml, "workflow", None, {})

    @classmethod
    def from_json(cls, text: str | bytes) -> Workflow:
        """The workflow in a JSON text."""
        return cls._from_text(text, _load_json, "workflow", None, {})

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Workflow:
        """The workflow in a mapping, shaped as the document is."""
        return cls._from_document(document, "workflow", None, "", {})

    @classmethod
    def _from_path(cls, path: str, loaded: dict[str, Workflow]) -> Workflow:
        load = _load_json if path.lower().endswith(".json") else load_yaml
        return cls._from_text(_read_file(path), load, path, os.path.dirname(os.path.abspath(path)), loaded)

    @classmethod
    def _from_text(
        cls, text: str | bytes, load: Callable[[Any], Any], source: str, folder: str | None, loaded: dict[str, Workflow]
    ) -> Workflow:
        try:
            document = load(text)
        except ParseError as error:
            error.source = source
            raise
        return cls._from_document(document, source, folder, _decoded(text), loaded)

    @classmethod
    def _from_document(
        cls, document: Any, source: str, folder: str | None, text: str, loaded: dict[str, Workflow]
    ) -> Workflow:
        if not isinstance(document, Mapping):
            message = f"a workflow must be a map with a name and steps, not {_type_name(document)}"
            raise ValidationError([Problem(message, (), 1, 1, source)])
        steps = document.get("steps")
        workflow = cls.__new__(cls)
        workflow._document = {key: value for key, value in document.items() if key != "steps" or not _is_steps(steps)}
        workflow.steps = [Step.from_dict(step) for step in steps] if _is_steps(steps) else []
        workflow.source, workflow.folder, workflow._source_text = source, folder, text
        workflow._compiled, workflow._loaded = None, loaded
        if folder is not None and text:
            loaded[os.path.realpath(source)] = workflow  # before it is compiled: it may call itself
        plan = workflow._plan()
        if plan.misshapen:
            raise ValidationError(workflow._located(plan.errors()))
        return workflow

    def to_dict(self) -> dict[str, Any]:
        """The document, as plain values."""
        document = dict(self._document)
        if self.steps:
            document["steps"] = [step.to_dict() for step in self.steps]
        return document

    def to_yaml(self) -> str:
        """The document as YAML; `from_yaml` reads the same workflow from it."""
        return _dump_yaml(self.to_dict())

    def to_json(self, indent: int | None = 2) -> str:
        """The document as JSON; `from_json` reads the same workflow from it."""
        return _to_json(self.to_dict(), indent=indent)

    def step(self, step_id: str) -> Step:
        """The top-level step with this id; KeyError if there is none."""
        for step in self.steps:
            if step.document.get("id") == step_id:
                return step
        raise KeyError(step_id)

    def validate(self) -> list[Problem]:
        """Checks everything that can be known before a run and returns the warnings.

        Raises ValidationError (DagError if there is a cycle) with every problem in `problems`, in document order.
        """
        plan = self._plan()
        errors = plan.errors()
        if errors:
            cycle = next((problem.cycle for problem in errors if problem.cycle), None)
            located = self._located(errors)
            raise DagError(located, cycle) if cycle else ValidationError(located)
        return self._located([problem for problem in plan.problems if problem.severity == "warning"])

    def _plan(self) -> _Plan:
        """The compiled form; made anew only when the list of steps has changed."""
        steps = tuple(self.steps)
        if self._compiled is None or self._compiled[0] != steps:
            self._compiled = (steps, _Compiler(self).compile())
        return self._compiled[1]

    def _located(self, problems: list[Problem]) -> list[Problem]:
        """The problems with lines and columns: the text is read a second time, only now, for its positions."""
        positions = _positions(self._source_text) if problems and self._source_text else {}
        for problem in problems:
            problem.source = self.source
            path = problem.path
            while path not in positions and path:
                path = path[:-1]
            if positions:
                problem.line, problem.column = positions.get(path, (1, 1))
        return sorted(problems, key=lambda problem: (problem.line or 0, problem.column or 0)) if positions else problems

    def __repr__(self) -> str:
        return f"Workflow(name={self._document.get('name')!r}, steps={len(self.steps)})"


def _is_steps(steps: Any) -> bool:
    return isinstance(steps, list) and all(isinstance(step, Mapping) for step in steps)


def _read_file(path: str | os.PathLike[str]) -> bytes:
    """A file's bytes; OrchestratorError in the operating system's words if there are none to be had."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OrchestratorError(f"{os.fspath(path)}: cannot be read: {reason}") from None


class _Names:
    """What a template may refer to at one place of a document: the steps of this scope and of those around it."""

    __slots__ = ("inputs", "local", "nodes", "outer", "owner", "producers")

    def __init__(
        self, outer: _Names | None, owner: _Node | None, inputs: Mapping[str, Any] | None, local: frozenset[str]
    ) -> None:
        self.outer, self.inputs, self.local = outer, inputs, local
        self.owner = owner  # the container whose children this scope holds
        self.nodes: dict[str, _Node] = {}
        self.producers: dict[str, list[_Node]] = {}  # output name -> the steps of this scope that have it

    def around(self) -> Iterator[_Names]:
        """This scope and those around it, nearest first."""
        names: _Names | None = self
        while names is not None:
            yield names
            names = names.outer

    def visible(self) -> list[str]:
        return [step_id for names in self.around() for step_id in names.nodes]


class _Node:
    """A compiled step: everything a run needs, nothing left to parse."""

    def __init__(self, document: Mapping[str, Any], path: tuple[str | int, ...], position: int) -> None:
        self.document, self.path, self.position = document, path, position
        self.id, self.type = str(document.get("id")), str(document.get("type"))
        self.constants: dict[str, Any] = {}  # keys whose value never changes
        self.values: list[tuple[str, Callable[[Any], Any]]] = []  # keys that are rendered for each run
        self.inputs: list[tuple[str, Callable[[Any], Any]]] = []  # a transform's inputs by name
        self.item_values: list[tuple[str, Callable[[Any], Any]]] = []  # what a transform renders for each item itself
        self.inline = False  # a built-in transform: it never waits
        self.references: list[tuple[Reference, str]] = []  # what its templates read, with the key they stand in
        self.local: frozenset[str] = frozenset()  # names that only its own templates see: the item of for_each
        self.dependencies: dict[str, None] = {}  # ids of siblings, in order
        self.dependents: list[int] = []
        self.output_names: tuple[str, ...] = ()
        self.condition: Condition | None = None
        self.item_condition = False  # the condition looks at the item, so it is asked once per item
        self.picker: Condition | None = None  # a branch's condition
        self.until: Condition | None = None
        self.for_each: Callable[[Any], Any] | None = None
        self.children: _Graph | None = None
        self.branches: dict[str, _Graph] = {}
        self.workflow: Workflow | None = None
        self.retry = _NO_RETRY
        self.retry_given = False
        self.timeout: float | None = None
        self.rule = "none_failed_min_one_success"
        self.continue_on_error = False
        self.limit: int | None = None

    def graphs(self) -> Iterator[_Graph]:
        """The graphs of its children, if it is a container."""
        if self.children is not None:
            yield self.children
        yield from self.branches.values()


class _Graph:
    """Sibling steps and how they depend on each other; `counts[i]` is the number of dependencies of `nodes[i]`."""

    __slots__ = ("by_id", "counts", "nodes", "producers", "roots")

    def __init__(self) -> None:
        self.nodes: list[_Node] = []
        self.by_id: dict[str, _Node] = {}
        self.producers: dict[str, str] = {}  # output name -> the id of the one step that has it
        self.counts: list[int] = []
        self.roots: list[int] = []

    def link(self) -> None:
        """Fills in dependents, counts and roots once every node knows its dependencies."""
        for node in self.nodes:
            for dependency in node.dependencies:
                self.by_id[dependency].dependents.append(node.position)
        self.counts = [len(node.dependencies) for node in self.nodes]
        self.roots = [node.position for node in self.nodes if not node.dependencies]

    def walk(self) -> Iterator[_Node]:
        """Every node, containers before their children."""
        for node in self.nodes:
            yield node
            for graph in node.graphs():
                yield from graph.walk()


class _Plan:
    """A compiled workflow: its graph, its outputs and the problems that were found on the way."""

    __slots__ = ("graph", "misshapen", "outputs", "problems")

    def __init__(self, graph: _Graph, outputs: list[tuple[str, Callable[[Any], Any]]], compiler: _Compiler) -> None:
        self.graph, self.outputs = graph, outputs
        self.problems, self.misshapen = compiler.problems, compiler.misshapen

    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.severity == "error"]


_STEP_FACTS = ("output", "status", "error")  # what steps.ID has besides its outputs
_ITEM_NAMES = frozenset(("item", "index", "key"))
_LOOP_NAMES = frozenset(("iteration", "previous"))
_NO_DEFAULT = ("id", "type", "depends_on", "output")
_Path = tuple  # of keys and indexes, from the top of the document


class _Compiler:
    """Walks one document and compiles it, collecting problems instead of stopping at the first."""

    def __init__(self, workflow: Workflow) -> None:
        self.workflow = workflow
        self.document: dict[str, Any] = workflow.to_dict()
        self.defaults: Mapping[str, Any] = {}
        self.partials: dict[str, str] = {}
        self.problems: list[Problem] = []
        self.misshapen = False
        self.graphs: list[tuple[_Graph, _Names]] = []

    def compile(self) -> _Plan:
        document = self.document
        self.check_keys(document, _WORKFLOW_KEYS, (), required=("name", "steps"))
        inputs = self.check_named("inputs", _INPUT_KEYS)
        self.check_named("providers", _PROVIDER_KEYS)
        self.check_named("pricing", _PRICING_KEYS)
        if isinstance(document.get("budget"), Mapping):
            self.check_keys(document["budget"], _BUDGET_KEYS, ("budget",))
        for name, declared in inputs.items():
            fault = _input_fault(declared["default"], declared) if declared.get("default") is not None else None
            if fault:
                self.misshape(("inputs", name, "default"), f"inputs.{name}: the default {fault}")
        self.check_defaults()
        self.check_partials()
        names = _Names(None, None, inputs if isinstance(document.get("inputs"), Mapping) else None, frozenset())
        graph = self.steps(document.get("steps"), ("steps",), names)
        for siblings, scope in self.graphs:
            for node in siblings.nodes:
                self.connect(node, scope)
        for siblings, _ in self.graphs:
            self.check_cycles(siblings)
            siblings.link()
        return _Plan(graph, self.outputs(names), self)

    # problems and shapes

    def problem(self, path: _Path, message: str, severity: str = "error") -> Problem:
        found = Problem(_label(self.document, path) + message, path, severity=severity)
        self.problems.append(found)
        return found

    def misshape(self, path: _Path, message: str) -> None:
        """A problem that leaves the document without a meaning, so that loading it fails."""
        self.misshapen = True
        self.problem(path, message)

    def check_keys(
        self,
        mapping: Mapping[Any, Any],
        checks: Mapping[str, Callable[[Any], str | None]],
        path: _Path,
        required: Iterable[str] = (),
        templates: Container[str] = (),
        free: bool = False,
    ) -> None:
        """Unknown keys, missing keys and wrong values; what `templates` names may be a template, checked in the run."""
        for key, value in mapping.items():
            if not isinstance(key, str):
                self.misshape(path, f"the key {key!r} must be text; quote it")
            elif key in checks:
                fault = None if value is None or (key in templates and _has_tag(value)) else checks[key](value)
                if fault:
                    self.misshape((*path, key), f"{key} {fault}")
            elif not free:
                self.misshape((*path, key), f"unknown key {key!r}{_suggestion(key, checks)}")
        for key in required:
            if mapping.get(key) is None:
                self.misshape(path, f"{key} is missing")

    def check_named(self, section: str, checks: Mapping[str, Callable[[Any], str | None]]) -> dict[str, Any]:
        """A section that maps names to maps of the same keys; null stands for an empty map."""
        entries = self.document.get(section)
        checked: dict[str, Any] = {}
        for name, entry in entries.items() if isinstance(entries, Mapping) else ():
            if isinstance(entry, Mapping):
                self.check_keys(entry, checks, (section, name))
            elif entry is not None:
                self.misshape((section, name), f"{section}.{name} must be a map, not {_shown(entry)}")
            checked[str(name)] = entry if isinstance(entry, Mapping) else {}
        return checked

    def check_defaults(self) -> None:
        defaults = self.document.get("defaults")
        self.defaults = defaults if isinstance(defaults, Mapping) else {}
        for kind, values in self.defaults.items():
            row = _STEP_TYPES.get(kind)
            if row is None:
                known = _suggestion(kind, _STEP_TYPES) or f"; there are {', '.join(_STEP_TYPES)}"
                self.misshape(("defaults", kind), f"defaults: unknown step type {kind!r}{known}")
            elif not isinstance(values, Mapping):
                self.misshape(("defaults", kind), f"defaults.{kind} must be a map, not {_shown(values)}")
            else:
                common = {key: check for key, check in _COMMON_KEYS.items() if key not in _NO_DEFAULT}
                self.check_keys(values, {**common, **row.keys}, ("defaults", kind), (), row.templates, row.free)

    def check_partials(self) -> None:
        partials = self.document.get("partials")
        for name, text in partials.items() if isinstance(partials, Mapping) else ():
            if isinstance(text, str):
                self.partials[str(name)] = text
            else:
                self.misshape(("partials", name), f"partials.{name} must be text, not {_shown(text)}")
        for name in self.partials:
            self.guarded(("partials", name), Template, self.partials[name], True, self.partials)

    def guarded(self, path: _Path, compile_it: Callable[..., Any], *arguments: Any) -> Any:
        """What the template or condition compiler makes of the arguments; None with a problem if it refuses them."""
        try:
            return compile_it(*arguments)
        except TemplateError as error:
            self.misshape(path, f"{path[-1]}: {error}")
            return None

    # steps

    def steps(self, documents: Any, path: _Path, names: _Names) -> _Graph:
        """Sibling steps as a graph. It is connected later, when the outputs of all steps are known."""
        graph = _Graph()
        if not isinstance(documents, list) or len(path) > 200:
            if isinstance(documents, list):
                self.misshape(path, "steps are nested too deeply")
            return graph
        for index, document in enumerate(documents):
            if not isinstance(document, Mapping):
                self.misshape((*path, index), f"a step must be a map, not {_shown(document)}")
                continue
            node = _Node(document, (*path, index), len(graph.nodes))
            if document.get("id") is not None and node.id in names.nodes:
                self.problem((*node.path, "id"), f"duplicate id {node.id!r}")
                continue
            names.nodes[node.id] = node
            graph.nodes.append(node)
        graph.by_id = names.nodes
        for node in graph.nodes:
            self.step(node, names)
            for name in node.output_names:
                names.producers.setdefault(name, []).append(node)
        graph.producers = {name: found[0].id for name, found in names.producers.items() if len(found) == 1}
        self.graphs.append((graph, names))
        return graph

    def step(self, node: _Node, names: _Names) -> None:
        """One step: keys, defaults, templates, conditions, children."""
        document = node.document
        row = _STEP_TYPES.get(node.type)
        if row is None:
            self.check_keys(document, _COMMON_KEYS, node.path, ("id", "type"), free=True)
            if document.get("type") is not None:
                known = _suggestion(node.type, _STEP_TYPES) or f"; there are {', '.join(_STEP_TYPES)}"
                self.misshape((*node.path, "type"), f"unknown step type {node.type!r}{known}")
            return
        if isinstance(self.defaults.get(node.type), Mapping):
            node.document = document = {**self.defaults[node.type], **document}
        required = ("id", "type", *row.required)
        self.check_keys(document, {**_COMMON_KEYS, **row.keys}, node.path, required, row.templates, row.free)
        self.common_keys(node, row)
        for key, value in document.items():
            if key in row.literal:
                if key != "inputs":  # a transform's are compiled when it is connected
                    node.constants[key] = value
            elif key not in _COMMON_KEYS and isinstance(key, str) and (value is not None or row.free):
                self.value(node, key, value)
        specific = getattr(self, f"_{node.type}", None)
        if specific is not None:
            specific(node, node.document, names)

    def common_keys(self, node: _Node, row: _StepType) -> None:
        document = node.document
        if document.get("for_each") is not None:
            node.local = _ITEM_NAMES
            node.for_each = self.compiled(node, "for_each", document["for_each"])
        if isinstance(document.get("condition"), (str, bool, int)):
            condition = self.guarded((*node.path, "condition"), Condition, document["condition"])
            node.references.extend((reference, "condition") for reference in condition.references if condition)
            looks_at_item = condition and any(ref[0][:1] == ("item",) for ref in condition.references)
            if node.type == "branch":
                node.picker = condition
            elif looks_at_item and document.get("function") == "filter" and not node.for_each:
                node.local, node.item_values = _ITEM_NAMES, [("condition", condition.evaluate)]
            elif condition is not None:
                node.condition = condition
                node.item_condition = any(ref[0] and ref[0][0] in node.local for ref in condition.references)
        node.output_names = tuple(name for name in _as_list(document.get("output")) if isinstance(name, str))
        self.check_outputs(node, row)
        node.timeout = _seconds(document.get("timeout_seconds"), "s")
        node.continue_on_error = document.get("continue_on_error") is True
        node.rule = document.get("trigger_rule") or node.rule
        node.limit = document.get("max_concurrency")
        if node.limit is not None and not (node.for_each or node.type == "parallel"):
            self.problem((*node.path, "max_concurrency"), "max_concurrency belongs to for_each and to the type parallel")
        node.retry_given = isinstance(document.get("retry"), Mapping)
        node.retry = _NO_RETRY if row.container else _DEFAULT_RETRY
        if node.retry_given:
            try:
                node.retry = RetryPolicy.from_dict(document["retry"])
            except ValidationError as error:
                for problem in error.problems:
                    self.misshape((*node.path, "retry", *problem.path), problem.message)

    def check_outputs(self, node: _Node, row: _StepType) -> None:
        names, path = node.output_names, (*node.path, "output")
        for name in names:
            if not _IDENTIFIER.match(name):
                self.misshape(path, f"output {name!r} must be letters, digits, _ or -")
        if len(set(names)) < len(names):
            self.misshape(path, "output gives one name twice")
        if row.arity and len(names) > row.arity:
            self.misshape(path, f"{node.type} has {row.arity} output{'s' * (row.arity > 1)}, but {len(names)} are named")
        if not names and row.arity:
            node.output_names = ("output",)

    def value(self, node: _Node, key: str, value: Any) -> None:
        """A key of a step: a constant, or something to render in each run."""
        if key == "template" and node.type == "transform" and node.document.get("function") in ("map", "template"):
            if render := self.compiled(node, key, value):
                node.item_values.append((key, render))
            return
        render = self.compiled(node, key, value)
        if render is None or not _holds_tag(value):
            node.constants[key] = value
        else:
            node.values.append((key, render))

    def compiled(self, node: _Node, key: str, value: Any) -> Callable[[Any], Any] | None:
        """The value of a key as a function of the context; what it reads is noted on the node."""
        compiled = self.guarded((*node.path, key), _compile_value, value, True, self.partials, None)
        if compiled is None:
            return None
        node.references.extend((reference, key) for reference in compiled[1])
        render: Callable[[Any], Any] = compiled[0]
        return render

    # what each type has of its own

    def _llm(self, node: _Node, document: Mapping[str, Any], names: _Names) -> None:
        self.custom(node, "provider", {**PROVIDERS, **(self.document.get("providers") or {})}, "provider")
        both = document.get("prompt") is not None and document.get("messages") is not None
        if both or (document.get("prompt") is None and document.get("messages") is None):
            path = (*node.path, "messages") if both else node.path
            self.misshape(path, "give a prompt or messages, not both" if both else "prompt is missing (or messages)")
        schema = document.get("schema")
        if isinstance(schema, str):
            try:
                loaded = _read_document(os.path.join(self.workflow.folder or ".", schema))
                node.constants["schema"] = loaded
                if not isinstance(loaded, Mapping):
                    self.misshape((*node.path, "schema"), f"schema: {schema} must hold a map, not {_shown(loaded)}")
            except OrchestratorError as error:
                self.misshape((*node.path, "schema"), f"schema: {error}")

    def _embed(self, node: _Node, document: Mapping[str, Any], names: _Names) -> None:
        self.custom(node, "provider", {**PROVIDERS, **(self.document.get("providers") or {})}, "provider")

    def _vector_search(self, node: _Node, document: Mapping[str, Any], names: _Names) -> None:
        if isinstance(document.get("embed"), Mapping):
            self.check_keys(document["embed"], _EMBED_KEYS, (*node.path, "embed"), ("provider", "model"))

    def _vector_upsert(self, node: _Node, document: Mapping[str, Any], names: _Names) -> None:
        self._vector_search(node, document, names)
        if (document.get("documents") is None) == (document.get("vectors") is None):
            self.misshape(node.path, "give documents or vectors, one of the two")

    def _transform(self, node: _Node, document: Mapping[str, Any], names: _Names) -> None:
        self.custom(node, "function", _TRANSFORMS, "transform")
        node.inline = document.get("function") in _TRANSFORMS
        if document.get("function") == "map":
            node.local |= _ITEM_NAMES
        if document.get("function") == "template":  # its inputs are names in the template
            node.local |= {str(name) for name in (document.get("inputs") or {}) if isinstance(name, str)}

    def _action(self, node: _Node, document: Mapping[str, Any], names: _Names) -> None:
        self.custom(node, "action", _ACTIONS, "action")

    def custom(self, node: _Node, key: str, table: Mapping[str, Any], what: str) -> None:
        name = node.constants.get(key)
        if isinstance(name, str) and name not in table:
            near = _suggestion(name, table)
            message = f"the {what} {name!r} is unknown here{near}; a run needs it from --plugin or {what}s={{...}}"
            self.problem((*node.path, key), message, "warning").custom = (f"{what}s", name)

    def _parallel(self, node: _Node, document: Mapping[str, Any], names: _Names) -> None:
        node.children = self.child_steps(node, document.get("tasks"), (*node.path, "tasks"), names)
        self.name_outputs(node, list(node.children.by_id))

    def _branch(self, node: _Node, document: Mapping[str, Any], names: _Names) -> None:
        branches = document.get("branches")
        for value, steps in branches.items() if isinstance(branches, Mapping) else ():
            path = (*node.path, "branches", value)
            if not isinstance(steps, list):
                self.misshape(path, f"branches: {value!r} must be a list of steps, not {_shown(steps)}")
            node.branches[_branch_key(value)] = self.child_steps(node, steps, path, names)
        self.name_outputs(node, ["branch", *dict.fromkeys(id for graph in node.branches.values() for id in graph.by_id)])

    def _loop(self, node: _Node, document: Mapping[str, Any], names: _Names) -> None:
        node.children = self.child_steps(node, document.get("steps"), (*node.path, "steps"), names, _LOOP_NAMES)
        if isinstance(document.get("until"), (str, bool, int)):
            node.until = self.guarded((*node.path, "until"), Condition, document["until"])
        self.name_outputs(node, [*node.children.by_id, "iterations"])

    def _workflow(self, node: _Node, document: Mapping[str, Any], names: _Names) -> None:
        target, path = document.get("workflow"), (*node.path, "workflow")
        if _has_tag(target):
            self.value(node, "workflow", target)
            return
        try:
            if isinstance(target, str):
                node.workflow = called = _sub_workflow(self.workflow, target)
                faults = called._compiled[1].errors() if called._compiled else []  # none yet if it is calling itself
                for fault in called._located(faults):
                    self.problem(path, f"workflow: {fault}")
            elif isinstance(target, Mapping):
                here = self.workflow
                node.workflow = called = Workflow._from_document(target, here.source, here.folder, "", here._loaded)
                for fault in called._plan().errors():
                    self.problem(path, f"workflow: {fault.message}")
        except (ParseError, ValidationError) as error:
            self.misshape(path, f"workflow: {error}")
        except OrchestratorError as error:
            self.problem(path, f"workflow: {error}")
        if node.workflow is None:
            return
        self.check_call(node, node.workflow, document.get("inputs") or {})
        outputs = node.workflow.outputs
        ids = [step.document.get("id") for step in node.workflow.steps]
        self.name_outputs(node, list(outputs) if isinstance(outputs, Mapping) and outputs else list(map(str, ids)))

    def check_call(self, node: _Node, called: Workflow, given: Mapping[str, Any]) -> None:
        """The inputs that a step gives to a sub-workflow against those that it declares."""
        path = (*node.path, "inputs")
        declared = called.inputs if isinstance(called.inputs, Mapping) else None
        for name in given if declared is not None and isinstance(given, Mapping) else ():
            if name not in (declared or ()):
                near = _suggestion(name, declared or ())
                self.problem((*path, name), f"inputs: the workflow has no input {name!r}{near}")
        for name in _required_inputs(declared or {}):
            if name not in given:
                self.problem(path, f"inputs: the workflow needs the input {name!r}")

    def name_outputs(self, node: _Node, names: list[str]) -> None:
        """A container's outputs: the names that are given, in order; otherwise its children's own."""
        given = node.output_names
        if len(given) > len(names):
            shown = f"{len(names)} outputs ({', '.join(names)})"
            self.problem((*node.path, "output"), f"{node.type} has {shown}, but {len(given)} are named")
        node.output_names = given or tuple(names)

    def child_steps(
        self, node: _Node, steps: Any, path: _Path, names: _Names, local: frozenset[str] = frozenset()
    ) -> _Graph:
        return self.steps(steps, path, _Names(names, node, names.inputs, names.local | node.local | local))

    # references

    def connect(self, node: _Node, names: _Names) -> None:
        """Turns `depends_on` and references into dependencies, refusing what does not exist."""
        listed = node.document.get("depends_on")
        for index, step_id in enumerate(_as_list(listed)):
            path = (*node.path, "depends_on", index) if isinstance(listed, list) else (*node.path, "depends_on")
            if isinstance(step_id, str) and not self.depend(node, step_id, names, path, f"depends_on: {step_id!r}"):
                near = _suggestion(step_id, names.visible())
                self.problem(path, f"depends_on: there is no step {step_id!r}{near}")
        if node.type == "transform":
            self.transform_inputs(node, names)
        for reference, key in node.references:
            self.resolve(node, reference, key, names)
        if node.until is not None and node.children is not None:
            inner = next(scope for graph, scope in self.graphs if graph is node.children)
            for reference in node.until.references:
                self.resolve(node, reference, "until", inner)

    def depend(self, node: _Node, step_id: str, names: _Names, path: _Path, shown: str) -> _Node | None:
        """Finds a step from inside out; `node`, or the container of it that is its sibling, will wait for it."""
        waiting: _Node | None = node if node.id in names.nodes else None
        for scope in names.around():
            target = scope.nodes.get(step_id)
            if target is not None:
                if target is waiting and waiting is node:
                    self.problem(path, f"{shown}: {step_id!r} depends on itself")
                elif target is waiting:
                    self.problem(path, f"{shown}: {step_id!r} contains this step")
                elif waiting is not None:
                    waiting.dependencies[step_id] = None
                return target
            waiting = scope.owner
        return None

    def resolve(self, node: _Node, reference: Reference, key: str, names: _Names) -> None:
        """Checks one reference and makes the node wait for the step that it names."""
        segments, path = reference[0], (*node.path, key)
        root = segments[0] if segments else ""
        shown = f"{key}: {'.'.join(segments)!r}"
        if not root or root in names.local or root in node.local or root in ("workflow", "run"):
            return
        if root not in ("steps", "outputs"):
            name = segments[1] if root in ("inputs", "input") and len(segments) > 1 else root
            if names.inputs is not None and name not in names.inputs and name not in ("inputs", "input"):
                near = f"; did you mean steps.{name}?" if name in names.visible() else _suggestion(name, names.inputs)
                self.problem(path, f"{shown}: there is no input {name!r}{near}")
            return
        if len(segments) < 2:
            self.problem(path, f"{shown} needs the id of a step, as in steps.ID.OUTPUT")
            return
        step_id, rest = segments[1], segments[2:]
        if root == "outputs" and step_id not in names.visible():
            producers = next((scope.producers[step_id] for scope in names.around() if step_id in scope.producers), [])
            if len(producers) > 1:
                where = " or ".join(f"steps.{producer.id}.{step_id}" for producer in producers)
                self.problem(path, f"{shown} is the name of several outputs; write {where}")
                return
            step_id, rest = (producers[0].id, ()) if producers else (step_id, rest)
        target = self.depend(node, step_id, names, path, shown)
        if target is None:
            self.problem(path, f"{shown}: there is no step {step_id!r}{_suggestion(step_id, names.visible())}")
        elif rest:
            known = _declared_outputs(target)
            if known and rest[0] not in known and rest[0] not in _STEP_FACTS:
                near = _suggestion(rest[0], known) or f"; it has {', '.join(list(known)[:10])}"
                self.problem(path, f"{shown}: step {step_id!r} has no output {rest[0]!r}{near}")

    def transform_inputs(self, node: _Node, names: _Names) -> None:
        """A transform's inputs: templates, values, or names of paths, upstream outputs and workflow inputs."""
        inputs = node.document.get("inputs")
        entries = inputs.items() if isinstance(inputs, Mapping) else ((name, name) for name in _as_list(inputs))
        for name, source in entries:
            if not isinstance(inputs, Mapping) and isinstance(source, str) and not _has_tag(source):
                source = "{{" + self.input_path(node, source, names) + "}}"
            render = self.compiled(node, "inputs", source)
            if render is not None:
                node.inputs.append((str(name), render))

    def input_path(self, node: _Node, name: str, names: _Names) -> str:
        """What a transform's input name stands for: a path, an output of a dependency, a workflow input."""
        root = name.split(".", 1)[0]
        if root in names.local or root in node.local or ("." in name and root in ("steps", "outputs", "inputs", "input")):
            return name
        upstream = [names.nodes[step_id] for step_id in node.dependencies]
        found = [target for target in upstream if root in target.output_names]
        if len(found) > 1:
            where = " or ".join(f"steps.{target.id}.{root}" for target in found)
            self.problem((*node.path, "inputs"), f"inputs: {name!r} is an output of several dependencies; write {where}")
        if found:
            return f"steps.{found[0].id}.{name}"
        if root in node.dependencies and root not in (names.inputs or ()):
            return f"steps.{name}"
        return f"inputs.{name}"

    def check_cycles(self, graph: _Graph) -> None:
        import graphlib

        try:
            graphlib.TopologicalSorter({node.id: node.dependencies for node in graph.nodes}).prepare()
        except graphlib.CycleError as error:
            cycle = error.args[1][::-1][1:]
            first = cycle.index(min(cycle, key=lambda step_id: graph.by_id[step_id].position))
            cycle = [*cycle[first:], *cycle[:first], cycle[first]]
            self.problem(graph.by_id[cycle[0]].path, f"cycle: {' -> '.join(cycle)}").cycle = cycle
            for node in graph.nodes:
                node.dependencies = {}

    def outputs(self, names: _Names) -> list[tuple[str, Callable[[Any], Any]]]:
        """The run's own outputs, rendered when every step has ended."""
        holder = _Node({}, ("outputs",), 0)
        outputs = self.document.get("outputs")
        rendered = []
        for name, value in outputs.items() if isinstance(outputs, Mapping) else ():
            rendered.append((str(name), self.compiled(holder, name, value) or (lambda context: None)))
        for reference, key in holder.references:
            self.resolve(holder, reference, key, names)
        return rendered


def _holds_tag(value: Any) -> bool:
    """Whether a template stands anywhere in a value."""
    if isinstance(value, Mapping):
        return any(map(_holds_tag, value.values()))
    return any(map(_holds_tag, value)) if isinstance(value, (list, tuple)) else _has_tag(value)


def _declared_outputs(node: _Node) -> dict[str, None]:
    """The names that may follow `steps.ID.`; none if they are known only when it runs."""
    children = [child.id for graph in node.graphs() for child in graph.nodes]
    called = [str(step.document.get("id")) for step in node.workflow.steps] if node.workflow else []
    return dict.fromkeys((*node.output_names, *children, *called))


def _branch_key(value: Any) -> str:
    """A branch's name as text: YAML's true, 1 and null are the texts true, 1 and null."""
    return value.strip() if isinstance(value, str) else _to_json(value)


def _label(document: Any, path: _Path) -> str:
    """Where a problem is, in words: "steps[1] 'analyze': "."""
    parts = []
    for depth, key in enumerate(path):
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):
            break
        if isinstance(key, int) and isinstance(document, Mapping) and "id" in document:
            parts.append(f"{path[depth - 1]}[{key}] {document['id']!r}: ")
    return "".join(parts)


def _sub_workflow(caller: Workflow, name: str) -> Workflow:
    """The workflow in a file, by a name relative to the caller's own folder; read once however often it is called."""
    path = os.path.join(caller.folder or ".", name)
    known = caller._loaded.get(os.path.realpath(path))
    return known or Workflow._from_path(path, caller._loaded)


def _read_document(path: str) -> Any:
    """The plain value in a JSON or YAML file."""
    try:
        return (_load_json if path.lower().endswith(".json") else load_yaml)(_read_file(path))
    except ParseError as error:
        error.source = path
        raise


def _required_inputs(declared: Mapping[str, Any]) -> list[str]:
    """The declared inputs that must be given: required (without a default)."""
    given = ((name, entry or {}) for name, entry in declared.items())
    return [name for name, entry in given if entry.get("required") and entry.get("default") is None]


def _input_fault(value: Any, declared: Mapping[str, Any]) -> str | None:
    """What is wrong with an input's value, or None."""
    kind = declared.get("type") or "any"
    kind = _INPUT_TYPE_ALIASES.get(kind, kind)
    if kind in _INPUT_TYPES and not _INPUT_TYPES[kind](value):
        return f"must be {'an' if kind[0] in 'aio' else 'a'} {kind}, not {_shown(value)}"
    allowed = declared.get("enum")
    if isinstance(allowed, list) and not any(value == one and type(value) is type(one) for one in allowed):
        return f"must be one of {', '.join(map(_to_json, allowed))}, not {_shown(value)}"
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
        for position in wave:
            for dependent in graph.nodes[position].dependents:
                waiting[dependent] -= 1  # falls to 0 when the last dependency is placed
                if not waiting[dependent]:
                    following.append(dependent)
        wave = sorted(following)
    return levels


# ---------------------------------------------------------------------------------------------------------------------
# 8. Retry: policies and delays
# How often a step is tried and how long it waits in between. Pure arithmetic; the waiting is done by the executor.
# ---------------------------------------------------------------------------------------------------------------------

_RETRY_KEYS: dict[str, Callable[[Any], str | None]] = {
    "max_attempts": _integer(1, 1000),
    "strategy": _one_of("exponential", "linear", "constant"),
    "initial_delay": _must("milliseconds, or a text such as 1.5s", lambda value: _seconds(value, "ms") is not None),
    "max_delay": _must("milliseconds, or a text such as 30s", lambda value: _seconds(value, "ms") is not None),
    "backoff_multiplier": _number(1, 1000),
    "jitter": _must("true, false or a fraction up to 1", lambda value: isinstance(value, (bool, int, float)) and 0 <= value <= 1),
}  # fmt: skip
_RETRY_ALIASES = {"backoff": "strategy", "initial_delay_ms": "initial_delay", "max_delay_ms": "max_delay"}


class RetryPolicy:
    """How often a step is attempted and how long it waits in between.

    `max_attempts` counts all attempts. Delays are milliseconds or texts such as "1.5s". `jitter` True draws each
    delay uniformly from 0 to its full length, False takes it as it is, a fraction varies it by plus or minus that.
    Raises ValidationError for values out of range.
    """

    __slots__ = ("backoff_multiplier", "initial_delay_seconds", "jitter", "max_attempts", "max_delay_seconds", "strategy")

    def __init__(
        self,
        max_attempts: int = 3,
        strategy: str = "exponential",
        initial_delay: float | str = 500,
        max_delay: float | str = 30_000,
        backoff_multiplier: float = 2,
        jitter: bool | float = True,
    ) -> None:
        given = {"max_attempts": max_attempts, "strategy": strategy, "initial_delay": initial_delay}
        given.update(max_delay=max_delay, backoff_multiplier=backoff_multiplier, jitter=jitter)
        problems = [(key, fault) for key, value in given.items() if (fault := _RETRY_KEYS[key](value))]
        if problems:
            raise ValidationError([Problem(f"retry: {key} {fault}", (key,)) for key, fault in problems])
        self.max_attempts, self.strategy = max_attempts, strategy
        self.initial_delay_seconds = _seconds(initial_delay, "ms") or 0.0
        self.max_delay_seconds = _seconds(max_delay, "ms") or 0.0
        self.backoff_multiplier, self.jitter = backoff_multiplier, jitter

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> RetryPolicy:
        """The policy of a document's `retry` map, in either spelling of its keys; null means the default."""
        given: dict[str, Any] = {}
        problems: list[Problem] = []
        for key, value in document.items():
            name = _RETRY_ALIASES.get(key, key) if isinstance(key, str) else str(key)
            if name not in _RETRY_KEYS:
                known = (*_RETRY_KEYS, *_RETRY_ALIASES)
                problems.append(Problem(f"retry: unknown key {key!r}{_suggestion(name, known)}", (key,)))
            elif name in given:
                problems.append(Problem(f"retry: {key} and {name} are two names of one value", (key,)))
            elif value is not None and (fault := _RETRY_KEYS[name](value)):
                problems.append(Problem(f"retry: {key} {fault}", (key,)))
            elif value is not None:
                given[name] = value
        if problems:
            raise ValidationError(problems)
        return cls(**given)

    def full_delay_seconds(self, failures: int) -> float:
        """The delay after this many failures (from 1) before jitter."""
        if self.strategy == "linear":
            return min(self.initial_delay_seconds * failures, self.max_delay_seconds)
        factor = self.backoff_multiplier if self.strategy == "exponential" else 1
        try:
            return min(self.initial_delay_seconds * factor ** (failures - 1), self.max_delay_seconds)
        except OverflowError:
            return self.max_delay_seconds

    def delay_seconds(self, failures: int, retry_after_seconds: float | None = None) -> float | None:
        """How long to wait after this many failures (from 1); None if the server asks for more than `max_delay`."""
        if retry_after_seconds is not None and retry_after_seconds > self.max_delay_seconds:
            return None
        delay = self.full_delay_seconds(failures)
        if self.jitter is not False:
            import random

            spread = 1.0 if self.jitter is True else float(self.jitter)
            delay *= random.uniform(0, 1) if self.jitter is True else random.uniform(1 - spread, 1 + spread)
        return max(min(delay, self.max_delay_seconds), retry_after_seconds or 0.0)

    def __repr__(self) -> str:
        return f"RetryPolicy({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__slots__)})"


_DEFAULT_RETRY = RetryPolicy()
_NO_RETRY = RetryPolicy(max_attempts=1)


# ---------------------------------------------------------------------------------------------------------------------
# 9. HTTP: connections, deadlines, cancellation
# A request goes out, a bounded response comes back before its deadline, or an error of the ProviderError family says
# what happened. Connections are kept and reused; another thread can break a call off by the socket under it.
# ---------------------------------------------------------------------------------------------------------------------

_CONNECT_SECONDS = 10.0
_CALL_SECONDS = 120.0  # for a whole attempt, unless it has its own deadline
_IDLE_SECONDS = 60.0  # after which an unused connection is not trusted any more
_MAX_BODY_BYTES = 64 * 1024 * 1024
_MAX_HEADERS = 200
_RETRIED_STATUSES = frozenset((408, 409, 425, 429, *range(500, 600)))
_CALL = threading.local()  # .scope: the _CancelScope of the call that this thread makes


class _CancelScope:
    """One call in a worker thread. `cancel`, from any thread, shuts down the socket that the call waits for.

    As a context it is the calling thread's scope, and cancels itself after `timeout_seconds`.
    """

    __slots__ = ("cancelled", "expired", "lock", "socket", "timeout_seconds", "timer")

    def __init__(self, timeout_seconds: float | None = None) -> None:
        self.cancelled = self.expired = False
        self.lock, self.socket, self.timeout_seconds = threading.Lock(), None, timeout_seconds
        self.timer: threading.Timer | None = None

    def __enter__(self) -> _CancelScope:
        _CALL.scope = self
        if self.timeout_seconds is not None:
            self.timer = threading.Timer(self.timeout_seconds, self.expire)
            self.timer.daemon = True
            self.timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        _CALL.scope = None
        if self.timer:
            self.timer.cancel()

    def expire(self) -> None:
        self.expired = True
        self.cancel()

    def cancel(self) -> None:
        import socket

        with self.lock:
            self.cancelled = True
            if self.socket is not None:
                with contextlib.suppress(OSError):  # not the method of an SSLSocket, which another thread is reading
                    socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def attach(self, sock: Any) -> None:
        """The socket to shut down from now on; None when the call is done with it."""
        with self.lock:
            self.socket = sock
            if self.cancelled and sock is not None:
                raise ConnectionAbortedError("the call was cancelled")


class _Response:
    """What a server answered: status, headers with lower-case names, and the decoded body."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")


@functools.cache
def _response_class() -> Any:
    """http.client's response with a strict and small reading of headers, instead of the email package's."""
    from http.client import BadStatusLine, HTTPException, HTTPResponse, IncompleteRead, LineTooLong

    class StrictResponse(HTTPResponse):
        def begin(self) -> None:
            status, headers = 100, {}
            while status < 200 and status != 101:
                version, status, self.reason = self._read_status()  # type: ignore[attr-defined]
                headers = self.header_lines()
            self.version = 10 if version in ("HTTP/1.0", "HTTP/0.9") else 11
            self.code = self.status = status
            self.headers = self.msg = headers  # type: ignore[assignment]
            coding, length = headers.get("transfer-encoding", "identity").lower(), headers.get("content-length")
            if coding not in ("identity", "chunked"):
                raise HTTPException(f"unknown transfer encoding {coding[:50]!r}")
            self.chunked, self.chunk_left = coding == "chunked", None  # type: ignore[assignment]
            self.will_close = self._check_close()  # type: ignore[attr-defined]
            if status in (204, 304) or self._method == "HEAD":  # type: ignore[attr-defined]
                self.length: int | None = 0
            elif self.chunked or length is None:
                self.length = None
                self.will_close = self.will_close or not self.chunked
            elif not (length.isascii() and length.isdigit() and len(length) < 19):
                raise HTTPException(f"the content length {length[:50]!r} is no number")
            else:
                self.length = int(length)

        def header_lines(self) -> dict[str, str]:
            headers: dict[str, str] = {}
            for _ in range(_MAX_HEADERS):
                line = self.fp.readline(65537)
                if line in (b"\r\n", b"\n"):
                    return headers
                if len(line) > 65536:
                    raise LineTooLong("header line")
                if not line.endswith(b"\n"):
                    raise IncompleteRead(line)
                name, colon, value = line.decode("latin-1").partition(":")
                name, value = name.strip().lower(), value.strip()
                if not colon:
                    raise BadStatusLine(name)
                if name == "content-length" and headers.get(name, value) != value:
                    raise HTTPException("two different content lengths")
                headers[name] = f"{headers[name]}, {value}" if name in headers and name != "content-length" else value
            raise HTTPException(f"more than {_MAX_HEADERS} headers")

    return StrictResponse


class _HttpClient:
    """Requests to any http or https address, over connections that are kept and reused; safe for many threads.

    `name` opens its error messages. `proxy` is a URL ("" for none); otherwise HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and
    NO_PROXY count. `timeout_seconds` bounds a call that no step's deadline bounds already.
    """

    def __init__(self, name: str, *, proxy: str | None = None, timeout_seconds: float | None = None) -> None:
        self.name, self.proxy, self.timeout_seconds = name, proxy, timeout_seconds
        self.idle: dict[tuple[Any, ...], list[tuple[Any, float]]] = {}
        self.lock = threading.Lock()
        self.context: Any = None
        self.proxies: dict[tuple[str, str, int], str | None] = {}

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | None,
        on_bytes: Callable[[bytes], Any] | None = None,
    ) -> _Response:
        """The response, whatever its status; redirects are refused. Errors: ProviderConnectionError (retryable, but for
        certificates), ProviderTimeoutError, BadResponseError.

        With `on_bytes` the body of a 2xx answer is handed over piece by piece as it arrives, until it returns True.
        """
        scope: _CancelScope | None = getattr(_CALL, "scope", None)
        if scope is None:
            with _CancelScope(self.timeout_seconds or _CALL_SECONDS):
                return self.request(method, url, headers, body, on_bytes)
        target = self.target(url)
        try:
            response = self.exchange(scope, target, method, headers, body, on_bytes)
        except OrchestratorError:
            raise
        except Exception as error:
            raise self.fault(error, scope, target) from error
        if 300 <= response.status < 400:
            place = response.headers.get("location", "")[:200]
            reason = f"answered {response.status}, a redirect to {place!r}; redirects are not followed, so give the final address"
            raise BadResponseError(reason, provider=self.name, status=response.status)
        return response

    def exchange(
        self,
        scope: _CancelScope,
        target: _Target,
        method: str,
        headers: Mapping[str, str],
        body: bytes | None,
        on_bytes: Any,
    ) -> _Response:
        connection, reused = self.connection(scope, target, False)
        try:
            try:
                raw = self.send(connection, target, method, headers, body)
            except ConnectionError:  # a kept connection that the server had closed: once more, on a new one
                if not reused or scope.cancelled:
                    raise
                scope.attach(None)
                connection.close()
                connection, _ = self.connection(scope, target, True)
                raw = self.send(connection, target, method, headers, body)
            response, complete = self.receive(raw, on_bytes)
        except BaseException:
            scope.attach(None)
            connection.close()
            raise
        scope.attach(None)
        if complete and not raw.will_close and not scope.cancelled:
            raw.close()
            with self.lock:
                self.idle.setdefault(target.key, []).append((connection, time.monotonic()))
        else:
            raw.close()
            connection.close()
        return response

    def send(
        self, connection: Any, target: _Target, method: str, headers: Mapping[str, str], body: bytes | None
    ) -> Any:
        """Sends the request in one piece and reads the head of the response."""
        sent = {name.lower() for name in headers}
        connection.putrequest(method, target.request_path, skip_accept_encoding=True, skip_host="host" in sent)
        for name, value in (*headers.items(), *target.headers):
            connection.putheader(name, value)
        if body is not None or method in ("POST", "PUT", "PATCH"):
            connection.putheader("Content-Length", str(len(body or b"")))
        connection.endheaders(body)
        return connection.getresponse()

    def receive(self, raw: Any, on_bytes: Callable[[bytes], Any] | None) -> tuple[_Response, bool]:
        """The response and whether its body was read to the end."""
        response = _Response(raw.status, raw.headers)
        if raw.length is not None and raw.length > _MAX_BODY_BYTES:
            raise self.too_large(response)
        coding = response.headers.get("content-encoding", "identity").lower()
        if coding not in ("identity", "", "gzip", "x-gzip", "deflate"):
            raise BadResponseError(
                f"answered in the encoding {coding[:50]!r}, which was not asked for", provider=self.name
            )
        inflate = None
        if coding not in ("identity", ""):
            import zlib

            inflate = zlib.decompressobj(47)
        pieces, size, live = [], 0, on_bytes is not None and 200 <= raw.status < 300
        for piece in iter(lambda: raw.read1(1 << 20), b""):
            piece = inflate.decompress(piece, _MAX_BODY_BYTES + 1) if inflate else piece
            size += len(piece)
            if size > _MAX_BODY_BYTES or (inflate and inflate.unconsumed_tail):
                raise self.too_large(response)
            if not live:
                pieces.append(piece)
            elif on_bytes is not None and piece and on_bytes(piece):
                return response, False
        if raw.length or (inflate and not inflate.eof):
            raise ConnectionResetError("the connection was lost in the middle of the answer")
        response.body = b"".join(pieces)
        return response, True

    def too_large(self, response: _Response) -> ProviderError:
        return BadResponseError(
            f"the answer is larger than {_MAX_BODY_BYTES >> 20} MiB", provider=self.name, status=response.status
        )

    # ---- connections

    def connection(self, scope: _CancelScope, target: _Target, fresh: bool) -> tuple[Any, bool]:
        """(connection, whether it was used before), attached to the scope."""
        import select

        while not fresh:
            with self.lock:
                kept = self.idle.get(target.key)
                connection, since = kept.pop() if kept else (None, 0.0)
            if connection is None:
                break
            usable = time.monotonic() - since < _IDLE_SECONDS and connection.sock is not None
            if usable:
                poll = getattr(select, "poll", None)  # select() itself fails for descriptors above 1023
                if poll:
                    waiting = poll()
                    waiting.register(connection.sock, select.POLLIN)
                    usable = not waiting.poll(0)
                if usable:
                    try:
                        scope.attach(connection.sock)
                    except BaseException:
                        connection.close()
                        raise
                    return connection, True
            connection.close()
        return self.connect(scope, target), False

    def connect(self, scope: _CancelScope, target: _Target) -> Any:
        """A new connection: through the proxy if there is one, with TLS for https."""
        from http.client import HTTPConnection

        host, port = target.proxy or (target.host, target.port)
        connection = HTTPConnection(host, port, timeout=_CONNECT_SECONDS)
        connection.response_class = _response_class()
        connection._create_connection = functools.partial(_open_socket, scope)  # type: ignore[attr-defined]
        try:
            if target.proxy and target.secure:
                netloc = f"[{target.host}]:{target.port}" if ":" in target.host else f"{target.host}:{target.port}"
                connection.set_tunnel(target.host, target.port, {"Host": netloc, **dict(target.tunnel_headers)})
            connection.connect()
            if target.secure:
                context = self.tls()
                name = target.host.rstrip(".")
                connection.sock = sock = context.wrap_socket(
                    connection.sock, server_hostname=name, do_handshake_on_connect=False
                )
                scope.attach(sock)
                sock.do_handshake()
            connection.sock.settimeout(None)  # from here on the deadline of the call decides
        except BaseException:
            scope.attach(None)
            connection.close()
            raise
        return connection

    def tls(self) -> Any:
        with self.lock:
            if self.context is None:
                try:
                    import ssl
                except ImportError:
                    reason = "https needs Python's ssl module, which this Python was built without"
                    raise ProviderConnectionError(reason, provider=self.name, retryable=False) from None
                bundle = os.environ.get("SSL_CERT_FILE")
                if bundle and not os.path.isfile(bundle):
                    reason = f"SSL_CERT_FILE names {bundle!r}, which is no file"
                    raise ProviderConnectionError(reason, provider=self.name, retryable=False)
                self.context = ssl.create_default_context()
                self.context.set_alpn_protocols(["http/1.1"])
            return self.context

    def target(self, url: str) -> _Target:
        try:
            target = _Target(url)
            place = (target.scheme, target.host, target.port)
            if place not in self.proxies:
                self.proxies[place] = _proxy_for(*place) if self.proxy is None else self.proxy or None
            target.go_through(self.proxies[place])
        except ValueError as error:
            raise ProviderConnectionError(f"bad address: {error}", provider=self.name, retryable=False) from None
        return target

    def fault(self, error: Exception, scope: _CancelScope, target: _Target) -> ProviderError:
        """What an exception of the network means. Only the host is named: a path or a query may hold a secret."""
        from http.client import HTTPException, IncompleteRead

        place = f"{target.host}:{target.port}" + (
            f" through the proxy {target.proxy[0]}:{target.proxy[1]}" if target.proxy else ""
        )
        kind: type[ProviderError] = ProviderConnectionError
        retryable, text = True, str(error) or type(error).__name__
        if scope.expired:
            kind, reason = ProviderTimeoutError, f"no answer from {place} within {scope.timeout_seconds:g} s"
        elif scope.cancelled:
            reason, retryable = "the call was cancelled", False
        elif isinstance(error, TimeoutError) or "timed out" in text:
            kind, reason = ProviderTimeoutError, f"cannot connect to {place} within {_CONNECT_SECONDS:g} s"
        elif type(error).__name__ == "gaierror":
            reason = f"cannot find the host of {place}: {text}"
        elif type(error).__name__ == "SSLCertVerificationError":
            reason, retryable = (
                f"the certificate of {place} is not trusted: {getattr(error, 'verify_message', text)}",
                False,
            )
        elif refused := re.match(r"Tunnel connection failed: (\d+)", text):
            reason, retryable = f"the proxy refused {place}: {text}", int(refused[1]) in _RETRIED_STATUSES
        elif isinstance(error, (IncompleteRead, ConnectionError, OSError)):
            reason = f"lost the connection to {place}: {text}" if not isinstance(error, ConnectionRefusedError) else (
                f"{place} refused the connection"
            )  # fmt: skip
        elif isinstance(error, HTTPException):
            shown = _shorten(text.strip("'\""), 200)
            kind, reason, retryable = BadResponseError, f"{place} answered something that is not HTTP: {shown}", False
        else:  # a header that cannot be sent; its value may be a secret
            reason, retryable = (
                f"the request to {place} cannot be sent: {type(error).__name__} in its address or headers",
                False,
            )
        return kind(reason, provider=self.name, retryable=retryable)

    def close(self) -> None:
        """Closes the connections that are not in use."""
        with self.lock:
            kept = [connection for connections in self.idle.values() for connection, _ in connections]
            self.idle.clear()
        for connection in kept:
            connection.close()


class _Target:
    """Where a URL leads: scheme, host, port, the path to ask for, and the proxy on the way. ValueError if nowhere."""

    __slots__ = (
        "headers",
        "host",
        "key",
        "path",
        "port",
        "proxy",
        "request_path",
        "scheme",
        "secure",
        "tunnel_headers",
    )

    def __init__(self, url: str) -> None:
        from urllib.parse import quote, urlsplit

        if re.search(r"[\x00-\x20\x7f]", url):
            raise ValueError("it holds white space or control characters")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("it does not start with http:// or https:// and a host")
        self.scheme, self.host, self.secure = parts.scheme, parts.hostname, parts.scheme == "https"
        self.port = parts.port or (443 if self.secure else 80)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self.path = self.request_path = path if path.isascii() else quote(path, safe="/%:=&?~+!$,;'@()*[]")
        self.headers = _basic("Authorization", parts.username, parts.password)
        self.proxy: tuple[str, int] | None = None
        self.tunnel_headers: tuple[tuple[str, str], ...] = ()
        self.key: tuple[Any, ...] = (self.scheme, self.host, self.port, None)

    def go_through(self, proxy: str | None) -> None:
        if not proxy:
            return
        from urllib.parse import urlsplit

        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"proxies are reached by http://, not {parts.scheme}://")
        self.proxy = (parts.hostname, parts.port or 80)
        credentials = _basic("Proxy-Authorization", parts.username, parts.password)
        self.key = (self.scheme, self.host, self.port, self.proxy)
        if self.secure:
            self.tunnel_headers = credentials
        else:
            host = f"[{self.host}]" if ":" in self.host else self.host
            self.request_path, self.headers = f"http://{host}:{self.port}{self.path}", (*self.headers, *credentials)


def _basic(header: str, user: str | None, password: str | None) -> tuple[tuple[str, str], ...]:
    """The header of basic authentication; none without a user."""
    if user is None:
        return ()
    from base64 import b64encode
    from urllib.parse import unquote

    return ((header, "Basic " + b64encode(f"{unquote(user)}:{unquote(password or '')}".encode()).decode()),)


def _open_socket(scope: _CancelScope, address: tuple[str, int], timeout: float, _source: Any = None) -> Any:
    """socket.create_connection, with each socket attached to the scope before it connects."""
    import socket

    failure: OSError = OSError("the host has no address")
    deadline = time.monotonic() + timeout
    for family, kind, protocol, _, place in socket.getaddrinfo(*address, 0, socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            scope.attach(sock)
            sock.settimeout(max(0.1, deadline - time.monotonic()))
            sock.connect(place)
            sock.settimeout(timeout)
            return sock
        except OSError as error:
            failure = error
            scope.attach(None)
            sock.close()
            if scope.cancelled:
                break
    raise failure


def _proxy_for(scheme: str, host: str, port: int) -> str | None:
    """The proxy that the environment names for an address, as curl and urllib read it."""
    names: tuple[str, ...] = (f"{scheme}_proxy", f"{scheme}_proxy".upper(), "all_proxy", "ALL_PROXY")
    if "REQUEST_METHOD" in os.environ:  # a CGI program: HTTP_PROXY may be a header of the request
        names = tuple(name for name in names if name != "HTTP_PROXY")
    proxy = next((os.environ[name] for name in names if os.environ.get(name)), None)
    for entry in (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",") if proxy else ():
        name, _, entry_port = entry.strip().lower().rpartition(":")
        if not name or not entry_port.isdigit() or name.endswith(":"):
            name, entry_port = entry.strip().lower(), ""
        name = name.strip("[]").lstrip("*.") if name != "*" else name
        within = host == name or host.endswith("." + name) or name == "*" or ("/" in name and _in_network(host, name))
        if name and within and entry_port in ("", str(port)):
            return None
    return proxy


def _in_network(host: str, network: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False


def _retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """How long the server asks to wait: `retry-after-ms`, or `retry-after` in seconds or as an HTTP date (RFC 9110)."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{0,12})?", text):
            return float(text) * unit
        if text and unit == 1.0:
            from email.utils import mktime_tz, parsedate_tz

            with contextlib.suppress(ValueError, TypeError, OverflowError):
                moment = parsedate_tz(text)
                return max(0.0, mktime_tz(moment) - time.time()) if moment else None
    return None


# ---------------------------------------------------------------------------------------------------------------------
# 10. Providers: requests and responses of each vendor, one class each, built from small shared pieces
# A vendor says where a request goes, how it is written, how its answer is read and how the events of a stream build
# that answer up. The wire facts are those of the vendors' API references and official SDKs, named at each class.
# ---------------------------------------------------------------------------------------------------------------------


class CompletionRequest:
    """What a step asks of a language model.

    `messages` are maps of role (user, assistant, system, tool) and content. `params` go to the vendor as they are.
    `schema` is a JSON Schema for the answer; `tools` are maps of name, description and parameters (a JSON Schema).
    `on_text` is called with each piece of text of a streamed answer as it arrives, in the thread that makes the call.
    """

    def __init__(
        self, model: str, messages: list[dict[str, Any]], *, system: str | None = None, temperature: float | None = None,
        max_tokens: int | None = None, top_p: float | None = None, top_k: int | None = None, stop: Any = None,
        seed: int | None = None, frequency_penalty: float | None = None, presence_penalty: float | None = None,
        stream: bool = False, params: Mapping[str, Any] | None = None, schema: Any = None,
        tools: list[dict[str, Any]] | None = None, on_text: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.messages, self.system = model, messages, system
        self.temperature, self.max_tokens, self.top_p, self.top_k = temperature, max_tokens, top_p, top_k
        self.stop, self.seed = stop, seed
        self.frequency_penalty, self.presence_penalty = frequency_penalty, presence_penalty
        self.stream, self.params, self.schema, self.tools, self.on_text = (
            stream,
            dict(params or {}),
            schema,
            tools,
            on_text,
        )

    @property
    def prompt(self) -> str:
        """The text of the last message of the user."""
        asked = [message for message in self.messages if message.get("role") == "user"]
        return _joined_text(asked[-1].get("content")) if asked else ""

    def __repr__(self) -> str:
        return f"CompletionRequest(model={self.model!r}, prompt={_shorten(self.prompt, 60)!r})"


class CompletionResponse:
    """What a language model answered.

    Token counts are None where the vendor does not say. `finish_reason` is the vendor's word (such as stop, length,
    tool_use). `tool_calls` are maps of id, name and arguments. `metadata` is JSON: finish_reason, request_id and more.
    """

    def __init__(
        self, text: str, model: str = "", input_tokens: int | None = None, output_tokens: int | None = None,
        finish_reason: str | None = None, request_id: str | None = None, tool_calls: Iterable[dict[str, Any]] = (),
        metadata: Mapping[str, Any] | None = None, total_tokens: int | None = None,
    ) -> None:  # fmt: skip
        self.text, self.model = text, model
        self.input_tokens, self.output_tokens = input_tokens, output_tokens
        counts = [count for count in (input_tokens, output_tokens) if count is not None]
        self.total_tokens = total_tokens if total_tokens is not None or not counts else sum(counts)
        self.finish_reason, self.request_id, self.tool_calls = finish_reason, request_id, list(tool_calls)
        named = {"finish_reason": finish_reason, "request_id": request_id, **(metadata or {})}
        self.metadata: dict[str, Any] = {name: value for name, value in named.items() if value is not None}

    def __repr__(self) -> str:
        return (
            f"CompletionResponse({_shorten(self.text, 60)!r}, model={self.model!r}, total_tokens={self.total_tokens})"
        )


class EmbeddingRequest:
    """Texts to embed with a model. `input_type` is "query" or "document" for vendors that tell them apart."""

    def __init__(
        self, model: str, input: list[str], dimensions: int | None = None, input_type: str | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.input, self.dimensions, self.input_type = model, input, dimensions, input_type
        self.params = dict(params or {})


class EmbeddingResponse:
    """`vectors` (lists of floats) in the order of the texts; `tokens` is None where the vendor does not say."""

    def __init__(self, vectors: list[list[float]], model: str = "", tokens: int | None = None) -> None:
        self.vectors, self.model, self.tokens = vectors, model, tokens


def _joined_text(content: Any) -> str:
    """The text of a content: itself, or the texts among its parts; TypeError if it is neither."""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else _joined_text(part.get("text", "")) for part in content or ())


def _count(value: Any) -> int | None:
    """A token count: None if there is none, TypeError or ValueError if it is no number."""
    return None if value is None or isinstance(value, bool) else int(value + 0)


# ---- From a bad answer to an error -----------------------------------------------------------------------------------

_STATUS_ERRORS: dict[int, type[ProviderError]] = {
    401: AuthenticationError, 402: QuotaExceededError, 403: AuthenticationError, 408: ProviderTimeoutError,
    429: RateLimitError, 504: ProviderTimeoutError,
}  # fmt: skip
_TYPE_STATUSES = {  # of errors inside an answer that began as a 200
    "overloaded_error": 529, "rate_limit_error": 429, "rate_limit_exceeded": 429, "api_error": 500, "server_error": 500,
    "internal_server_error": 500, "timeout_error": 504, "authentication_error": 401, "permission_error": 403,
    "billing_error": 402, "invalid_request_error": 400, "insufficient_quota": 429,
}  # fmt: skip
_NO_QUOTA = re.compile(
    r"insufficient_quota|credit_balance|billing_(error|hard_limit)|credit balance|spend(ing)?[ _-](limit|cap)"
)
_TOO_LONG = re.compile(
    r"context_length|maximum context|context window|prompt is too long|too many (input )?tokens|"
    r"token count .{0,40}exceeds|exceeds? .{0,60}(context|token limit)|input is too long|reduce the length"
)


def _error_parts(document: Any) -> tuple[str, str, Any]:
    """(message, code or type, the error map) of the error bodies that vendors send."""
    if isinstance(document, list) and document:
        document = document[0]
    if not isinstance(document, Mapping):
        return "", "", {}
    fault = document.get("error")
    if fault is None or isinstance(fault, (str, int, bool)):
        words = next(
            (document[key] for key in ("message", "detail", "error") if isinstance(document.get(key), str)), None
        )
        return words or _to_json(document), str(document.get("code") or document.get("type") or ""), document
    fault = fault if isinstance(fault, Mapping) else {"message": _to_json(fault)}
    code = " ".join(str(fault[key]) for key in ("code", "type", "status") if fault.get(key) is not None)
    return str(fault.get("message") or _to_json(fault)), code, fault


def _answer_error(name: str, status: int | None, headers: Mapping[str, str], document: Any, text: str) -> ProviderError:
    """The error for an answer with an error in it: its class, whether to retry, and how long the server asks to wait."""
    message, code, fault = _error_parts(document)
    if status is None or status < 400:
        number = fault.get("code")
        known = [_TYPE_STATUSES[word] for word in code.split() if word in _TYPE_STATUSES]
        status = number if isinstance(number, int) and 400 <= number < 600 else known[0] if known else None
    message = message or text.strip() or "no reason was given"
    kind = _STATUS_ERRORS.get(status or 0, ProviderError)
    lowered = f"{code} {message[:2000]}".lower()
    if status in (400, 402, 403, 429) and _NO_QUOTA.search(lowered):
        kind = QuotaExceededError
    elif status in (400, 413, 422) and _TOO_LONG.search(lowered):
        kind = ContextLengthError
    retryable = status in _RETRIED_STATUSES and kind is not QuotaExceededError
    if headers.get("x-should-retry") in ("true", "false") and kind is not QuotaExceededError:
        retryable = headers["x-should-retry"] == "true"
    wait = _retry_after_seconds(headers)
    for detail in fault.get("details") or () if isinstance(fault.get("details"), list) else ():
        delay = detail.get("retryDelay") if isinstance(detail, Mapping) else None  # google.rpc.RetryInfo
        wait = _seconds(delay, "s") if wait is None and isinstance(delay, str) else wait
    request_id = headers.get("x-request-id") or headers.get("request-id")
    reason = (
        f"answered {status}: {_shorten(message, 500)}" if status else f"answered an error: {_shorten(message, 500)}"
    )
    return kind(reason, provider=name, status=status, retryable=retryable, retry_after=wait, request_id=request_id)


class _RestClient:
    """JSON calls to one server: its address, its headers, and one way from a bad answer to an error without secrets."""

    def __init__(
        self, name: str, base_url: str, headers: Mapping[str, str] | None = None, *, timeout_seconds: float | None = None,
        proxy: str | None = None,
    ) -> None:  # fmt: skip
        self.name, self.base_url = name, base_url.rstrip("/")
        self.headers = {"Accept": "application/json", "Content-Type": "application/json", "User-Agent": _USER_AGENT}
        self.headers.update({str(key): str(value) for key, value in (headers or {}).items()})
        secret = re.compile("auth|key|token|secret|cookie", re.I)
        found = [value.partition("Bearer ")[2] or value for key, value in self.headers.items() if secret.search(key)]
        self.secrets = [value for value in found if len(value) > 3]
        self.http = _HttpClient(name, proxy=proxy, timeout_seconds=timeout_seconds)

    def send(
        self, method: str, path: str, payload: Any = None, on_bytes: Callable[[bytes], Any] | None = None
    ) -> _Response:
        """The response to a JSON payload; an error of the ProviderError family for every status from 400 on."""
        body = None if payload is None else _request_json(payload, self.name)
        response = self.http.request(method, self.base_url + path, self.headers, body, on_bytes)
        if response.status >= 400:
            document = None
            with contextlib.suppress(ParseError):
                document = _load_json(response.body)
            raise self.error(response.status, response.headers, document, response.text)
        return response

    def error(self, status: int | None, headers: Mapping[str, str], document: Any, text: str) -> ProviderError:
        error = _answer_error(self.name, status, headers, document, text)
        for secret in self.secrets:
            error.args = (str(error).replace(secret, "***"),)
        return error

    def parse(self, response: _Response) -> Any:
        """The JSON of a response; an error for nonsense, and for a map whose only news is an error."""
        try:
            document = _load_json(response.body)
        except ParseError as error:
            reason = f"answered something that is not JSON ({error.reason}): {_shorten(response.text.strip(), 200)!r}"
            raise BadResponseError(self.hide(reason), provider=self.name, status=response.status) from None
        if isinstance(document, Mapping) and document.get("error"):
            raise self.error(response.status, response.headers, document, response.text)
        return document

    def call(self, method: str, path: str, payload: Any = None) -> Any:
        """The JSON that the server answers to a JSON payload."""
        return self.parse(self.send(method, path, payload))

    def hide(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text

    def close(self) -> None:
        """Closes the connections that are not in use."""
        self.http.close()


_USER_AGENT = f"llm_orchestrator/{__version__}"


def _request_json(payload: Any, name: str) -> bytes:
    try:
        return json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:  # a lone surrogate is a ValueError too
        raise BadResponseError(f"the request has no JSON form: {error}", provider=name) from None


class _Events:
    """The events of a stream from its bytes: server-sent events (WHATWG HTML, 9.2), or lines of JSON."""

    def __init__(self, plain_lines: bool) -> None:
        self.plain_lines, self.rest, self.data = plain_lines, b"", []  # type: tuple[bool, bytes, list[str]]
        self.seen = False  # whether anything was an event

    def feed(self, piece: bytes) -> Iterator[str]:
        """The data of each event that the piece completes. Raises UnicodeDecodeError."""
        lines = (self.rest + piece).splitlines(keepends=True) if b"\r" in piece or b"\r" in self.rest else None
        if lines is None:
            *complete, self.rest = (self.rest + piece).split(b"\n")
        else:  # a piece may end between a carriage return and its newline; other separators are no line ends here
            text = (self.rest + piece).replace(b"\r\n", b"\n")
            held = text.endswith(b"\r")
            *complete, self.rest = (text[:-1] if held else text).replace(b"\r", b"\n").split(b"\n")
            self.rest += b"\r" if held else b""
        for line in complete:
            yield from self.line(line.decode("utf-8"))

    def line(self, line: str) -> Iterator[str]:
        if self.plain_lines:
            self.seen = self.seen or bool(line.strip())
            if line.strip():
                yield line
        elif not line:
            if self.data:
                yield "\n".join(self.data)
            self.data = []
        elif line.startswith("data:"):
            self.seen = True
            self.data.append(line[6:] if line.startswith("data: ") else line[5:])

    def end(self) -> Iterator[str]:
        """What is left when the stream ends."""
        yield from self.line(self.rest.decode("utf-8"))
        yield from () if self.plain_lines else self.line("")


# ---- Vendors ---------------------------------------------------------------------------------------------------------


class Provider:
    """Base of the vendors' clients; safe for many threads.

    `api_key`, `base_url`, extra `headers`, `timeout_seconds` of each call, `proxy` (a URL, "" for none) and the options
    that the class lists in `OPTIONS`. `from_env` fills what is not given from the official SDK's variables.
    """

    TYPE = ""
    BASE_URL = ""
    KEY_VARIABLES: tuple[str, ...] = ()
    URL_VARIABLES: tuple[str, ...] = ()
    OPTIONS: Mapping[str, str | None] = {}  # name -> the variable that sets it, or None
    FIELDS: Mapping[str, str] = {}  # of a request -> the vendor's place for it ("options.seed": inside a map)
    KEY_HEADER = ("Authorization", "Bearer ")
    PLAIN_LINES = False  # streams are lines of JSON, not server-sent events
    native_schema = True
    max_batch = 2048  # texts in one embedding call

    def __init__(
        self, *, api_key: str | None = None, base_url: str | None = None, headers: Mapping[str, str] | None = None,
        timeout_seconds: float | None = None, proxy: str | None = None, name: str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        unknown = [option for option in options if option not in self.OPTIONS]
        if unknown:
            known = _suggestion(
                unknown[0], [*self.OPTIONS, "api_key", "base_url", "headers", "timeout_seconds", "proxy"]
            )
            raise ValidationError(f"{self.TYPE}: unknown option {unknown[0]!r}{known}")
        self.name, self.timeout_seconds = name or self.TYPE, timeout_seconds
        self.options = {option: options.get(option) for option in self.OPTIONS}
        self.base_url = self.address(base_url or self.BASE_URL)
        key = (api_key or "").strip()
        if not key.isascii() or not key.isprintable():
            raise AuthenticationError("the key holds characters that no header can carry", provider=self.name)
        own = self.key_headers(key) if key else {}
        self._rest = _RestClient(
            self.name,
            self.base_url,
            {**own, **self.extra_headers(), **(headers or {})},
            timeout_seconds=timeout_seconds,
            proxy=proxy,
        )

    @classmethod
    def from_env(cls, **overrides: Any) -> Any:
        """A client set up by the environment. AuthenticationError names the variable of a key that is missing."""
        settings = dict(overrides)
        settings.setdefault("base_url", _variable(*cls.URL_VARIABLES))
        for option, variable in cls.OPTIONS.items():
            if variable and settings.get(option) is None:
                settings[option] = _variable(variable)
        if not settings.get("api_key"):
            settings["api_key"] = _variable(*cls.KEY_VARIABLES)
        missing = cls.missing_settings(settings)
        if missing:
            raise AuthenticationError(f"set {missing} in the environment", provider=settings.get("name") or cls.TYPE)
        return cls(**settings)

    @classmethod
    def missing_settings(cls, settings: Mapping[str, Any]) -> str:
        """Which variable has to be set, if one has to."""
        return " or ".join(cls.KEY_VARIABLES) if cls.KEY_VARIABLES and not settings.get("api_key") else ""

    def address(self, base_url: str) -> str:
        return base_url.rstrip("/")

    def key_headers(self, key: str) -> dict[str, str]:
        return {self.KEY_HEADER[0]: self.KEY_HEADER[1] + key}

    def extra_headers(self) -> dict[str, str]:
        return {}

    def path(self, path: str) -> str:
        """A path below the base URL, which may end with the path's first segment (/v1) already."""
        first = path[: path.index("/", 1)]
        return path[len(first) :] if self.base_url.endswith(first) else path

    def complete(self, request: CompletionRequest) -> CompletionResponse:
        """The answer to a request; errors of the ProviderError family."""
        path, body = self.completion_call(request)
        for key, value in request.params.items():
            both = isinstance(value, Mapping) and isinstance(body.get(key), Mapping)
            body[key] = {**body[key], **value} if both else value
        started = time.perf_counter()
        if not request.stream:
            response = self._rest.send("POST", path, body)
            document, first = self._rest.parse(response), None
        else:
            response, document, first = self.stream(path, body, request)
        try:
            answer = self.read_completion(document, request)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            shown = self._rest.hide(_shorten(_to_json(document), 200))
            raise BadResponseError(f"answered something else than a completion: {shown}", provider=self.name) from None
        if not answer.text and not answer.tool_calls and str(answer.finish_reason).lower() in _BLOCKED:
            raise BadResponseError(f"gave no answer: it was stopped by {answer.finish_reason}", provider=self.name)
        answer.model = answer.model or request.model
        answer.request_id = (
            response.headers.get("x-request-id") or response.headers.get("request-id") or answer.request_id
        )
        ignored = [name for name in _TUNING if getattr(request, name) is not None and name not in self.FIELDS]
        extra: dict[str, Any] = {"request_id": answer.request_id, "ignored": ignored or None}
        extra["time_to_first_token_ms"] = None if first is None else round((first - started) * 1000, 3)
        answer.metadata.update({name: value for name, value in extra.items() if value is not None})
        return answer

    def stream(
        self, path: str, body: dict[str, Any], request: CompletionRequest
    ) -> tuple[_Response, Any, float | None]:
        """(response, the document that the events built up, when the first text came). A stream that ends before its
        end mark is a lost connection."""
        events, document, raw = _Events(self.PLAIN_LINES), {}, []  # type: tuple[_Events, dict[str, Any], list[bytes]]
        first: float | None = None

        def on_event(text: str) -> None:
            nonlocal first
            if text == "[DONE]":
                document["done"] = True
                return
            event = _load_json(text)
            if isinstance(event, Mapping) and (event.get("error") or event.get("type") == "error"):
                raise self._rest.error(None, {}, event if event.get("error") else {"error": event}, text)
            piece = self.merge(document, event)
            if piece:
                first = first or time.perf_counter()
                if request.on_text:
                    request.on_text(piece)

        def on_bytes(piece: bytes) -> bool:
            if not events.seen:
                raw.append(piece)
            for text in events.feed(piece):
                on_event(text)
            return bool(document.get("done"))

        try:
            response = self._rest.send("POST", path, body, on_bytes)
            for text in events.end() if not document.get("done") else ():
                on_event(text)
        except (ParseError, UnicodeDecodeError, KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise BadResponseError(
                f"sent a stream that cannot be read: {_shorten(str(error), 200)}", provider=self.name
            ) from None
        if not events.seen:  # the server does not stream: the whole answer at once
            response.body = b"".join(raw)
            return response, self._rest.parse(response), None
        if not (document.get("done") or document.get("finished")):
            raise ProviderConnectionError("the stream ended before its end mark", provider=self.name)
        return response, document, first

    def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        """The vectors of at most `max_batch` texts; errors of the ProviderError family."""
        path, body = self.embedding_call(request)
        document = self._rest.call("POST", path, {**body, **request.params})
        try:
            vectors, tokens = self.read_embeddings(document)
            if len(vectors) != len(request.input) or not all(
                type(number) in (int, float) for vector in vectors for number in vector
            ):
                raise ValueError
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            shown = self._rest.hide(_shorten(_to_json(document), 200))
            reason = f"answered something else than {len(request.input)} embeddings: {shown}"
            raise BadResponseError(reason, provider=self.name) from None
        return EmbeddingResponse(vectors, str(document.get("model") or request.model), tokens)

    # what a vendor says

    def completion_call(self, request: CompletionRequest) -> tuple[str, dict[str, Any]]:
        """(path, body) of a completion."""
        raise ValidationError(f"the provider {self.name!r} makes embeddings only")

    def read_completion(self, document: Any, request: CompletionRequest) -> CompletionResponse:
        """The answer in a document. May raise KeyError and the like for nonsense."""
        raise NotImplementedError

    def merge(self, document: dict[str, Any], event: Any) -> str:
        """Adds a stream's event to the document that the plain answer would have been; returns its text.

        Sets document["finished"] when the vendor said that the answer is complete, ["done"] at the end mark.
        """
        raise NotImplementedError

    def embedding_call(self, request: EmbeddingRequest) -> tuple[str, dict[str, Any]]:
        """(path, body) of an embedding call."""
        raise ValidationError(f"the provider {self.name!r} makes no embeddings")

    def read_embeddings(self, document: Any) -> tuple[list[list[float]], int | None]:
        """(vectors, tokens) of the OpenAI shape, which most vendors use."""
        ordered = sorted(document["data"], key=lambda entry: entry.get("index", 0))
        usage = document.get("usage") or {}
        return [entry["embedding"] for entry in ordered], _count(usage.get("prompt_tokens", usage.get("total_tokens")))

    def tuned(self, request: CompletionRequest) -> dict[str, Any]:
        """A body with the request's settings at the vendor's places."""
        body: dict[str, Any] = {}
        for name, place in self.FIELDS.items():
            value = getattr(request, name)
            if value is not None:
                *outer, last = place.split(".")
                inner = body
                for key in outer:
                    inner = inner.setdefault(key, {})
                inner[last] = [value] if name == "stop" and isinstance(value, str) else value
        return body

    def close(self) -> None:
        """Closes the connections that are not in use."""
        self._rest.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, base_url={self.base_url!r})"


_TUNING = ("temperature", "max_tokens", "top_p", "top_k", "stop", "seed", "frequency_penalty", "presence_penalty")
_BLOCKED = frozenset((
    "content_filter", "refusal", "safety", "recitation", "blocklist", "prohibited_content", "spii", "error", "other",
    "error_toxic", "image_safety", "language",
))  # fmt: skip
_OPENAI_FIELDS = {
    name: name
    for name in ("temperature", "max_tokens", "top_p", "stop", "seed", "frequency_penalty", "presence_penalty")
}


def _variable(*names: str) -> str | None:
    """The first of these environment variables that is set and not empty."""
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _system_apart(request: CompletionRequest) -> tuple[str, list[dict[str, Any]]]:
    """The request's system texts, and its other messages, for vendors that keep the two apart."""
    system = [request.system or ""]
    system += [_joined_text(message.get("content")) for message in request.messages if message.get("role") == "system"]
    return "\n\n".join(filter(None, system)), [
        message for message in request.messages if message.get("role") != "system"
    ]


class OpenAIProvider(Provider):
    """OpenAI: Chat Completions, Responses for the models that only it serves (or `api: responses`), Embeddings.

    Sources: platform.openai.com/docs/api-reference; openai-python 3.54 (`resources/chat/completions.py`, `_base_client.py`).
    """

    TYPE = "openai"
    BASE_URL = "https://api.openai.com/v1"
    KEY_VARIABLES: tuple[str, ...] = ("OPENAI_API_KEY",)
    URL_VARIABLES: tuple[str, ...] = ("OPENAI_BASE_URL",)
    OPTIONS: Mapping[str, str | None] = {"organization": "OPENAI_ORG_ID", "project": "OPENAI_PROJECT_ID", "api": None}
    FIELDS: Mapping[str, str] = _OPENAI_FIELDS
    _NEW_LIMIT = re.compile(r"(.*/)?(o[1-9]|gpt-[5-9]|codex|computer-use)")  # these refuse max_tokens
    _RESPONSES_ONLY = re.compile(r"(.*/)?(o[1-9]-pro|gpt-[5-9][\w.]*-pro|.*codex|.*deep-research|computer-use)")

    def extra_headers(self) -> dict[str, str]:
        named = {"OpenAI-Organization": self.options.get("organization"), "OpenAI-Project": self.options.get("project")}
        return {header: str(value) for header, value in named.items() if value}

    def place(self, path: str, model: str) -> str:
        """Where a call goes."""
        return path

    def uses_responses(self, request: CompletionRequest) -> bool:
        chosen = self.options.get("api")
        return chosen == "responses" or (chosen is None and bool(self._RESPONSES_ONLY.match(request.model)))

    def completion_call(self, request: CompletionRequest) -> tuple[str, dict[str, Any]]:
        if self.uses_responses(request):
            return self.place("/responses", request.model), self.responses_body(request)
        body: dict[str, Any] = {"model": request.model, "messages": self.messages(request), **self.tuned(request)}
        if "max_tokens" in body and self.TYPE in ("openai", "azure") and self._NEW_LIMIT.match(request.model):
            body["max_completion_tokens"] = body.pop("max_tokens")
        if request.schema is not None:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": request.schema},
            }
        if request.tools:
            body["tools"] = [{"type": "function", "function": tool} for tool in request.tools]
        if request.stream:
            body.update(self.stream_fields())
        return self.place("/chat/completions", request.model), body

    def stream_fields(self) -> dict[str, Any]:
        return {"stream": True, "stream_options": {"include_usage": True}}

    def messages(self, request: CompletionRequest) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": request.system}] if request.system else []
        return system + [self.message(message) for message in request.messages]

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        if message.get("role") == "tool":
            return {"role": "tool", "tool_call_id": message["id"], "content": message["content"]}
        if not message.get("tool_calls"):
            return message
        calls = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": _to_json(call["arguments"])},
            }
            for call in message["tool_calls"]
        ]
        return {"role": "assistant", "content": message.get("content") or None, "tool_calls": calls}

    def read_completion(self, document: Any, request: CompletionRequest) -> CompletionResponse:
        if "output" in document and "choices" not in document:
            return self.read_responses(document)
        choice, usage = document["choices"][0], document.get("usage") or {}
        message, finish = choice["message"], choice.get("finish_reason")
        calls = message.get("tool_calls") or ()
        calls = [_openai_tool_call(call) for call in (calls.values() if isinstance(calls, dict) else calls)]
        content, refusal = message.get("content"), message.get("refusal")
        if content is None and not (calls or refusal or finish in ("content_filter", "length")):
            raise ValueError("no content")
        return CompletionResponse(
            _joined_text(content or refusal), str(document.get("model") or ""), _count(usage.get("prompt_tokens")),
            _count(usage.get("completion_tokens")), finish, document.get("id"), calls,
            {"refusal": True} if refusal and not content else None, _count(usage.get("total_tokens")),
        )  # fmt: skip

    def merge(self, document: dict[str, Any], event: Any) -> str:
        if str(event.get("type", "")).startswith("response."):
            return self.merge_responses(document, event)
        document.setdefault("choices", [{"message": {"content": None, "tool_calls": {}}, "finish_reason": None}])
        for key in ("id", "model", "usage"):
            if event.get(key):
                document[key] = event[key]
        if not event.get("choices"):
            return ""
        whole, choice = document["choices"][0], event["choices"][0]
        delta, message = choice.get("delta") or {}, whole["message"]
        if choice.get("finish_reason"):
            whole["finish_reason"] = document["finished"] = choice["finish_reason"]
        for call in delta.get("tool_calls") or ():
            known = message["tool_calls"].setdefault(
                call.get("index", len(message["tool_calls"])), {"function": {"arguments": ""}}
            )
            known["id"] = call.get("id") or known.get("id")
            function = call.get("function") or {}
            known["function"]["name"] = function.get("name") or known["function"].get("name")
            arguments = function.get("arguments") or ""
            known["function"]["arguments"] += arguments if isinstance(arguments, str) else _to_json(arguments)
        for field in ("content", "refusal"):
            if delta.get(field) is not None:
                piece = _joined_text(delta[field])
                message[field] = message.get(field) or []
                message[field].append(piece)
                return piece
        return ""

    # Responses

    def responses_body(self, request: CompletionRequest) -> dict[str, Any]:
        items: list[dict[str, Any]] = []
        for message in request.messages:
            if message.get("role") == "tool":
                items.append({"type": "function_call_output", "call_id": message["id"], "output": message["content"]})
                continue
            if message.get("content"):
                items.append({"role": message["role"], "content": message["content"]})
            for call in message.get("tool_calls") or ():
                named = {"call_id": call["id"], "name": call["name"], "arguments": _to_json(call["arguments"])}
                items.append({"type": "function_call", **named})
        body: dict[str, Any] = {"model": request.model, "input": items}
        settings: dict[str, Any] = {"instructions": request.system, "max_output_tokens": request.max_tokens}
        settings.update(temperature=request.temperature, top_p=request.top_p, stream=request.stream or None)
        body.update({name: value for name, value in settings.items() if value is not None})
        if request.schema is not None:
            body["text"] = {"format": {"type": "json_schema", "name": "answer", "schema": request.schema}}
        if request.tools:
            body["tools"] = [{"type": "function", **tool} for tool in request.tools]
        return body

    def read_responses(self, document: Any) -> CompletionResponse:
        if document.get("status") == "failed":
            raise self._rest.error(None, {}, {"error": document.get("error") or "the response failed"}, "")
        parts = [part for item in document["output"] if item["type"] == "message" for part in item["content"]]
        calls = [
            {"id": item["call_id"], "name": item["name"], "arguments": _load_arguments(item["arguments"])}
            for item in document["output"] if item["type"] == "function_call"
        ]  # fmt: skip
        texts = [part["text"] if part["type"] == "output_text" else part.get("refusal", "") for part in parts]
        reason = (document.get("incomplete_details") or {}).get("reason")
        finish = {"max_output_tokens": "length", None: "tool_calls" if calls else "stop"}.get(reason, reason)
        usage = document.get("usage") or {}
        return CompletionResponse(
            _joined_text(texts), str(document.get("model") or ""), _count(usage.get("input_tokens")),
            _count(usage.get("output_tokens")), finish, document.get("id"), calls,
        )  # fmt: skip

    def merge_responses(self, document: dict[str, Any], event: Any) -> str:
        if event["type"] == "response.output_text.delta":
            return str(event["delta"])
        if event["type"] in ("response.completed", "response.incomplete", "response.failed"):
            document.update(event["response"], done=True)
        return ""

    # Embeddings

    def embedding_call(self, request: EmbeddingRequest) -> tuple[str, dict[str, Any]]:
        dimensions = {} if request.dimensions is None else {"dimensions": request.dimensions}
        return self.place("/embeddings", request.model), {"model": request.model, "input": request.input, **dimensions}


def _load_arguments(text: Any) -> Any:
    """The arguments of a tool call: a JSON text, or a map already; what is no JSON stays text, for the error it gets."""
    if not isinstance(text, str):
        return text
    try:
        return _load_json(text) if text.strip() else {}
    except ParseError:
        return text


def _openai_tool_call(call: Any) -> dict[str, Any]:
    function = call["function"]
    return {
        "id": call.get("id") or function["name"],
        "name": function["name"],
        "arguments": _load_arguments(function["arguments"]),
    }


class OpenAICompatibleProvider(OpenAIProvider):
    """Any server that speaks Chat Completions: vLLM, LM Studio, llama.cpp, LiteLLM. `base_url` ends with /v1.

    `structured: instructions` is for servers without response_format json_schema.
    """

    TYPE = "openai_compatible"
    BASE_URL = "http://localhost:8000/v1"
    KEY_VARIABLES, URL_VARIABLES = ("OPENAI_COMPATIBLE_API_KEY",), ("OPENAI_COMPATIBLE_BASE_URL",)
    OPTIONS: Mapping[str, str | None] = {"api": None, "structured": None}
    FIELDS: Mapping[str, str] = {**_OPENAI_FIELDS, "top_k": "top_k"}

    @classmethod
    def missing_settings(cls, settings: Mapping[str, Any]) -> str:
        return super().missing_settings(settings) if cls.TYPE != "openai_compatible" else ""

    def uses_responses(self, request: CompletionRequest) -> bool:
        return self.options.get("api") == "responses"

    @property
    def native_schema(self) -> bool:  # type: ignore[override]
        return self.options.get("structured") != "instructions"


class AzureOpenAIProvider(OpenAIProvider):
    """Azure OpenAI: the v1 path, or with `api_version` the path of a deployment (`deployment`, by default the model).

    Sources: learn.microsoft.com/azure/ai-services/openai/reference; openai-python 3.54 (`lib/azure.py`).
    """

    TYPE = "azure"
    KEY_VARIABLES, URL_VARIABLES = ("AZURE_OPENAI_API_KEY",), ("AZURE_OPENAI_ENDPOINT",)
    OPTIONS: Mapping[str, str | None] = {
        "api_version": "OPENAI_API_VERSION", "deployment": None, "ad_token": "AZURE_OPENAI_AD_TOKEN", "api": None
    }  # fmt: skip
    KEY_HEADER = ("api-key", "")

    @classmethod
    def missing_settings(cls, settings: Mapping[str, Any]) -> str:
        if not settings.get("base_url"):
            return "AZURE_OPENAI_ENDPOINT"
        return "" if settings.get("ad_token") else super().missing_settings(settings)

    def extra_headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.options['ad_token']}"} if self.options["ad_token"] else {}

    def place(self, path: str, model: str) -> str:
        version, below = self.options["api_version"], "" if self.base_url.endswith("/openai") else "/openai"
        if self.base_url.endswith("/openai/v1"):
            return path
        if not version or version in ("v1", "latest", "preview") or path == "/responses":
            return f"{below}/v1{path}"
        from urllib.parse import quote

        deployment = quote(str(self.options["deployment"] or model), safe="")
        return f"{below}/deployments/{deployment}{path}?api-version={quote(str(version), safe='')}"


class MistralProvider(OpenAIProvider):
    """Mistral. Sources: docs.mistral.ai/api; mistralai 3.7 (`models/chatcompletionrequest.py`)."""

    TYPE = "mistral"
    BASE_URL = "https://api.mistral.ai"
    KEY_VARIABLES, URL_VARIABLES = ("MISTRAL_API_KEY",), ("MISTRAL_BASE_URL",)
    OPTIONS: Mapping[str, str | None] = {}
    FIELDS: Mapping[str, str] = {**_OPENAI_FIELDS, "seed": "random_seed"}

    def place(self, path: str, model: str) -> str:
        return self.path(f"/v1{path}")

    def uses_responses(self, request: CompletionRequest) -> bool:
        return False

    def stream_fields(self) -> dict[str, Any]:
        return {"stream": True}

    def embedding_call(self, request: EmbeddingRequest) -> tuple[str, dict[str, Any]]:
        path, body = super().embedding_call(request)
        if "dimensions" in body:
            body["output_dimension"] = body.pop("dimensions")
        return path, body


class VoyageProvider(Provider):
    """Voyage embeddings. Sources: docs.voyageai.com/reference/embeddings-api; voyageai 0.5 (`client.py`)."""

    TYPE = "voyage"
    BASE_URL = "https://api.voyageai.com"
    KEY_VARIABLES = ("VOYAGE_API_KEY",)
    max_batch = 128

    def embedding_call(self, request: EmbeddingRequest) -> tuple[str, dict[str, Any]]:
        named = {"input_type": request.input_type, "output_dimension": request.dimensions}
        body = {"model": request.model, "input": request.input}
        return self.path("/v1/embeddings"), {
            **body,
            **{name: value for name, value in named.items() if value is not None},
        }


class AnthropicProvider(Provider):
    """Anthropic Messages. `anthropic_version` 2023-06-01 by default: later ones refuse temperature, top_p and top_k,
    which are then left out. A schema is a tool that the model is made to call.

    Sources: docs.anthropic.com/en/api/messages, /api/errors, /api/versioning; anthropic-sdk-python 2.12.
    """

    TYPE = "anthropic"
    BASE_URL = "https://api.anthropic.com"
    KEY_VARIABLES, URL_VARIABLES = ("ANTHROPIC_API_KEY",), ("ANTHROPIC_BASE_URL",)
    OPTIONS: Mapping[str, str | None] = {
        "auth_token": "ANTHROPIC_AUTH_TOKEN", "anthropic_version": None, "custom_headers": "ANTHROPIC_CUSTOM_HEADERS"
    }  # fmt: skip
    FIELDS: Mapping[str, str] = {
        "temperature": "temperature", "max_tokens": "max_tokens", "top_p": "top_p", "top_k": "top_k", "stop": "stop_sequences"
    }  # fmt: skip
    KEY_HEADER = ("x-api-key", "")
    _DEFAULT_MAX_TOKENS = 4096

    @classmethod
    def missing_settings(cls, settings: Mapping[str, Any]) -> str:
        return "" if settings.get("auth_token") else super().missing_settings(settings)

    def version(self) -> str:
        return str(self.options["anthropic_version"] or "2023-06-01")

    def extra_headers(self) -> dict[str, str]:
        headers = {"anthropic-version": self.version()}
        if self.options["auth_token"]:
            headers["Authorization"] = f"Bearer {self.options['auth_token']}"
        for line in str(self.options["custom_headers"] or "").splitlines():
            name, colon, value = line.partition(":")
            if colon:
                headers[name.strip()] = value.strip()
        return headers

    def completion_call(self, request: CompletionRequest) -> tuple[str, dict[str, Any]]:
        system, messages = _system_apart(request)
        body = {"model": request.model, "max_tokens": self._DEFAULT_MAX_TOKENS, **self.tuned(request)}
        if self.version() >= "2026-10-21":
            for name in ("temperature", "top_p", "top_k"):
                body.pop(name, None)
        body["messages"] = _merged_roles([self.message(message) for message in messages])
        if system:
            body["system"] = system
        tools = [
            {"name": tool["name"], "description": tool.get("description", ""), "input_schema": tool["parameters"]}
            for tool in request.tools or ()
        ]
        if request.schema is not None and not tools:
            tools = [
                {"name": "answer", "description": "Gives the answer.", "input_schema": _object_schema(request.schema)}
            ]
            body["tool_choice"] = {"type": "tool", "name": "answer"}
        if tools:
            body["tools"] = tools
        if request.stream:
            body["stream"] = True
        return self.path("/v1/messages"), body

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        if message.get("role") == "tool":
            result = {"type": "tool_result", "tool_use_id": message["id"], "content": message["content"]}
            return {"role": "user", "content": [{**result, "is_error": True} if message.get("failed") else result]}
        if not message.get("tool_calls"):
            return message
        text = [{"type": "text", "text": message["content"]}] if message.get("content") else []
        calls = [
            {
                "type": "tool_use",
                "id": call["id"],
                "name": call["name"],
                "input": call["arguments"] if isinstance(call["arguments"], dict) else {},
            }
            for call in message["tool_calls"]
        ]
        return {"role": "assistant", "content": [*text, *calls]}

    def read_completion(self, document: Any, request: CompletionRequest) -> CompletionResponse:
        blocks, usage, finish = document["content"], document.get("usage") or {}, document.get("stop_reason")
        text = "".join(_joined_text(block["text"]) for block in blocks if block["type"] == "text")
        calls = [
            {"id": block["id"], "name": block["name"], "arguments": _load_arguments(block.get("partial") or block["input"])}
            for block in blocks if block["type"] == "tool_use"
        ]  # fmt: skip
        if request.schema is not None and not request.tools and calls and calls[0]["name"] == "answer":
            answer = calls[0]["arguments"]
            answer = (
                answer["value"]
                if _object_schema(request.schema) is not request.schema and isinstance(answer, dict)
                else answer
            )
            text, calls, finish = (
                _to_json(answer) if not isinstance(answer, str) else answer,
                [],
                "end_turn" if finish == "tool_use" else finish,
            )
        parts = [
            _count(usage.get(name))
            for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
        ]
        spent = sum(count for count in parts if count) if parts[0] is not None else None
        model = str(document.get("model") or "")
        return CompletionResponse(
            text, model, spent, _count(usage.get("output_tokens")), finish, document.get("id"), calls
        )

    def merge(self, document: dict[str, Any], event: Any) -> str:
        kind = event["type"]
        if kind == "message_start":
            document.update(event["message"], content=[])
        elif kind == "content_block_start":
            document["content"].append({**event["content_block"], "text": [event["content_block"].get("text", "")]})
        elif kind == "content_block_delta":
            block, delta = document["content"][event["index"]], event["delta"]
            if delta["type"] == "text_delta":
                block["text"].append(delta["text"])
                return str(delta["text"])
            if delta["type"] == "input_json_delta":
                block["partial"] = block.get("partial", "") + delta["partial_json"]
        elif kind == "message_delta":
            document["stop_reason"] = event["delta"].get("stop_reason")
            document["usage"] = {**(document.get("usage") or {}), **(event.get("usage") or {})}
        elif kind == "message_stop":
            document["done"] = True
        return ""


def _merged_roles(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in which neighbours of one role that hold tool results are one message, as Anthropic wants them."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        lists = merged and isinstance(message["content"], list) and isinstance(merged[-1]["content"], list)
        if lists and merged[-1]["role"] == message["role"]:
            merged[-1] = {**message, "content": [*merged[-1]["content"], *message["content"]]}
        else:
            merged.append(message)
    return merged


def _object_schema(schema: Any) -> Any:
    """A schema for the input of a tool, which has to be a map: others are wrapped under `value`."""
    if isinstance(schema, Mapping) and schema.get("type") == "object":
        return schema
    return {"type": "object", "properties": {"value": schema}, "required": ["value"]}


class GeminiProvider(Provider):
    """Google Gemini generateContent. `api_version` is v1 unless set (beta: v1beta).

    Sources: ai.google.dev/api/generate-content, /api/embeddings; google-genai 3.4 (`models.py`, `_api_client.py`).
    """

    TYPE = "gemini"
    BASE_URL = "https://generativelanguage.googleapis.com"
    KEY_VARIABLES, URL_VARIABLES = ("GOOGLE_API_KEY", "GEMINI_API_KEY"), ("GOOGLE_GEMINI_BASE_URL",)
    OPTIONS: Mapping[str, str | None] = {"api_version": "GOOGLE_GENAI_API_VERSION"}
    FIELDS: Mapping[str, str] = {
        name: f"generationConfig.{place}"
        for name, place in (
            ("temperature", "temperature"), ("max_tokens", "maxOutputTokens"), ("top_p", "topP"), ("top_k", "topK"),
            ("stop", "stopSequences"), ("seed", "seed"), ("frequency_penalty", "frequencyPenalty"),
            ("presence_penalty", "presencePenalty"),
        )
    }  # fmt: skip
    KEY_HEADER = ("x-goog-api-key", "")
    max_batch = 100

    def place(self, model: str, method: str) -> str:
        from urllib.parse import quote

        version = {"beta": "v1beta", None: "v1"}.get(self.options["api_version"], self.options["api_version"])
        version = "" if re.search(r"/v\d\w*$", self.base_url) else f"/{version}"
        return f"{version}/{quote(model if '/' in model else f'models/{model}', safe='/')}:{method}"

    def completion_call(self, request: CompletionRequest) -> tuple[str, dict[str, Any]]:
        system, messages = _system_apart(request)
        body: dict[str, Any] = {"contents": _merged_parts(map(self.message, messages)), **self.tuned(request)}
        if system:
            body["systemInstruction"] = {"parts": [{"text": system}]}
        if request.schema is not None:
            shape = {"responseMimeType": "application/json", "responseJsonSchema": request.schema}
            body["generationConfig"] = {**body.get("generationConfig", {}), **shape}
        if request.tools:
            named = ("name", "description")
            functions = [
                {**{key: tool[key] for key in named if tool.get(key)}, "parametersJsonSchema": tool["parameters"]}
                for tool in request.tools
            ]
            body["tools"] = [{"functionDeclarations": functions}]
        return self.place(request.model, "streamGenerateContent?alt=sse" if request.stream else "generateContent"), body

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        if message.get("role") == "tool":
            answer = {"error" if message.get("failed") else "result": message["content"]}
            return {"role": "user", "parts": [{"functionResponse": {"name": message["name"], "response": answer}}]}
        content = message.get("content")
        parts = [{"text": content}] if isinstance(content, str) and content else []
        if isinstance(content, list):
            parts = [
                {"text": part} if isinstance(part, str) else {key: part[key] for key in part if key != "type"}
                for part in content
            ]
        parts += [
            call.get("wire") or {"functionCall": {"name": call["name"], "args": call["arguments"]}}
            for call in message.get("tool_calls") or ()
        ]
        return {"role": "model" if message.get("role") == "assistant" else "user", "parts": parts}

    def read_completion(self, document: Any, request: CompletionRequest) -> CompletionResponse:
        usage, feedback = document.get("usageMetadata") or {}, document.get("promptFeedback") or {}
        blocked = not document.get("candidates") and feedback.get("blockReason")
        candidate: Any = {"finishReason": "SAFETY"} if blocked else document["candidates"][0]
        parts = (candidate.get("content") or {}).get("parts") or []
        finish = candidate.get("finishReason")
        if not parts and finish in (None, "STOP") and "content" not in candidate:
            raise ValueError("no content")
        text = "".join(part["text"] for part in parts if "text" in part and not part.get("thought"))
        calls = [
            {"id": part["functionCall"].get("id") or f"call_{index}", "name": part["functionCall"]["name"],
             "arguments": part["functionCall"].get("args") or {}, "wire": part}
            for index, part in enumerate(parts) if "functionCall" in part
        ]  # fmt: skip
        written = [_count(usage.get(name)) for name in ("candidatesTokenCount", "thoughtsTokenCount")]
        return CompletionResponse(
            text, str(document.get("modelVersion") or ""), _count(usage.get("promptTokenCount")),
            sum(count or 0 for count in written) if usage else None, finish, document.get("responseId"), calls,
            None, _count(usage.get("totalTokenCount")),
        )  # fmt: skip

    def merge(self, document: dict[str, Any], event: Any) -> str:
        event = event[0] if isinstance(event, list) else event
        candidates = event.get("candidates") or []
        document.update({key: value for key, value in event.items() if key != "candidates"})
        if (event.get("promptFeedback") or {}).get("blockReason"):
            document["finished"] = True
        text = ""
        for candidate in candidates[:1]:
            whole = document.setdefault("candidates", [{"content": {"parts": []}}])[0]
            parts = (candidate.get("content") or {}).get("parts") or []
            whole["content"]["parts"] += parts
            if candidate.get("finishReason"):
                whole["finishReason"] = document["finished"] = candidate["finishReason"]
            text += "".join(part["text"] for part in parts if "text" in part and not part.get("thought"))
        return text

    def embedding_call(self, request: EmbeddingRequest) -> tuple[str, dict[str, Any]]:
        named: dict[str, Any] = {"model": request.model if "/" in request.model else f"models/{request.model}"}
        if request.input_type:
            named["taskType"] = {"query": "RETRIEVAL_QUERY", "document": "RETRIEVAL_DOCUMENT"}.get(
                request.input_type, request.input_type
            )
        if request.dimensions is not None:
            named["outputDimensionality"] = request.dimensions
        requests = [{**named, "content": {"parts": [{"text": text}]}} for text in request.input]
        return self.place(request.model, "batchEmbedContents"), {"requests": requests}

    def read_embeddings(self, document: Any) -> tuple[list[list[float]], int | None]:
        return [entry["values"] for entry in document["embeddings"]], None


def _merged_parts(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in which neighbours of one role are one message, as Gemini wants the answers to several tool calls."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"] and "functionResponse" in (message["parts"] or [{}])[0]:
            merged[-1] = {**message, "parts": [*merged[-1]["parts"], *message["parts"]]}
        else:
            merged.append(message)
    return merged


class CohereProvider(OpenAIProvider):
    """Cohere v2 chat and embed. Sources: docs.cohere.com/reference/chat, /reference/embed; cohere 7.3.1 (`v2/client.py`)."""

    TYPE = "cohere"
    BASE_URL = "https://api.cohere.com"
    KEY_VARIABLES, URL_VARIABLES = ("CO_API_KEY", "COHERE_API_KEY"), ("CO_API_URL",)
    OPTIONS: Mapping[str, str | None] = {}
    FIELDS: Mapping[str, str] = {**_OPENAI_FIELDS, "top_p": "p", "top_k": "k", "stop": "stop_sequences"}
    max_batch = 96

    def completion_call(self, request: CompletionRequest) -> tuple[str, dict[str, Any]]:
        _, body = super().completion_call(request)
        body.pop("stream_options", None)
        if request.schema is not None:
            body["response_format"] = {"type": "json_object", "json_schema": request.schema}
        return self.path("/v2/chat"), body

    def uses_responses(self, request: CompletionRequest) -> bool:
        return False

    def read_completion(self, document: Any, request: CompletionRequest) -> CompletionResponse:
        message, usage = document["message"], document.get("usage") or {}
        tokens = usage.get("tokens") or usage.get("billed_units") or {}
        calls = message.get("tool_calls") or ()
        calls = [_openai_tool_call(call) for call in (calls.values() if isinstance(calls, dict) else calls)]
        if message.get("content") is None and not calls:
            raise ValueError("no content")
        content = [part for part in message.get("content") or () if isinstance(part, str) or part.get("type") == "text"]
        counts = _count(tokens.get("input_tokens")), _count(tokens.get("output_tokens"))
        return CompletionResponse(
            _joined_text(content), "", *counts, document.get("finish_reason"), document.get("id"), calls
        )

    def merge(self, document: dict[str, Any], event: Any) -> str:
        message = document.setdefault("message", {"content": [], "tool_calls": {}})
        kind, delta = event["type"], event.get("delta") or {}
        part = delta.get("message") or {}
        if kind == "message-start":
            document["id"] = event.get("id")
        elif kind == "content-delta":
            piece = str(part["content"].get("text") or "")
            message["content"].append(piece)
            return piece
        elif kind in ("tool-call-start", "tool-call-delta"):
            call = part["tool_calls"]
            known = message["tool_calls"].setdefault(event.get("index", 0), {"function": {"name": "", "arguments": ""}})
            known["id"] = call.get("id") or known.get("id")
            for key in ("name", "arguments"):
                known["function"][key] += call["function"].get(key) or ""
        elif kind == "message-end":
            if delta.get("error"):
                raise self._rest.error(None, {}, {"error": delta["error"]}, "")
            document.update(finish_reason=delta.get("finish_reason"), usage=delta.get("usage"), done=True)
        return ""

    def embedding_call(self, request: EmbeddingRequest) -> tuple[str, dict[str, Any]]:
        kind = {"query": "search_query", None: "search_document", "document": "search_document"}
        body: dict[str, Any] = {"model": request.model, "texts": request.input, "embedding_types": ["float"]}
        body["input_type"] = kind.get(request.input_type, str(request.input_type))
        if request.dimensions is not None:
            body["output_dimension"] = request.dimensions
        return self.path("/v2/embed"), body

    def read_embeddings(self, document: Any) -> tuple[list[list[float]], int | None]:
        billed = (document.get("meta") or {}).get("billed_units") or {}
        return document["embeddings"]["float"], _count(billed.get("input_tokens"))


class OllamaProvider(OpenAIProvider):
    """Ollama's own API, which needs no key. Sources: github.com/ollama/ollama docs/api.md; ollama 0.6.3 (`_client.py`)."""

    TYPE = "ollama"
    BASE_URL = "http://127.0.0.1:11434"
    KEY_VARIABLES, URL_VARIABLES = ("OLLAMA_API_KEY",), ("OLLAMA_HOST",)
    OPTIONS: Mapping[str, str | None] = {}
    FIELDS: Mapping[str, str] = {name: f"options.{'num_predict' if name == 'max_tokens' else name}" for name in _TUNING}
    PLAIN_LINES = True

    @classmethod
    def missing_settings(cls, settings: Mapping[str, Any]) -> str:
        return ""

    def address(self, base_url: str) -> str:
        """OLLAMA_HOST is a host, host:port or URL; 0.0.0.0 is where a server listens, not where it is."""
        scheme, _, rest = base_url.rpartition("://")
        host, _, path = rest.replace("0.0.0.0", "127.0.0.1").partition("/")
        port = "" if re.search(r":\d+$", host) or scheme else ":11434"
        return f"{scheme or 'http'}://{host}{port}{'/' if path else ''}{path}".rstrip("/")

    def completion_call(self, request: CompletionRequest) -> tuple[str, dict[str, Any]]:
        body = {
            "model": request.model,
            "messages": self.messages(request),
            "stream": request.stream,
            **self.tuned(request),
        }
        if request.schema is not None:
            body["format"] = request.schema
        if request.tools:
            body["tools"] = [{"type": "function", "function": tool} for tool in request.tools]
        return "/api/chat", body

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        if message.get("role") == "tool":
            return {"role": "tool", "tool_name": message["name"], "content": message["content"]}
        calls = [
            {"function": {"name": call["name"], "arguments": call["arguments"]}}
            for call in message.get("tool_calls") or ()
        ]
        whole = {"role": message.get("role"), "content": _joined_text(message.get("content"))}
        return {**whole, "tool_calls": calls} if calls else whole

    def read_completion(self, document: Any, request: CompletionRequest) -> CompletionResponse:
        message = document["message"]
        calls = [
            {"id": f"call_{index}", "name": call["function"]["name"], "arguments": call["function"]["arguments"]}
            for index, call in enumerate(message.get("tool_calls") or ())
        ]
        if message.get("content") is None and not calls:
            raise ValueError("no content")
        counts = _count(document.get("prompt_eval_count")), _count(document.get("eval_count"))
        text, model = _joined_text(message.get("content")), str(document.get("model") or "")
        return CompletionResponse(text, model, *counts, document.get("done_reason"), None, calls)

    def merge(self, document: dict[str, Any], event: Any) -> str:
        message = document.setdefault("message", {"content": [], "tool_calls": []})
        part = event.get("message") or {}
        message["content"].append(part.get("content") or "")
        message["tool_calls"] += part.get("tool_calls") or []
        document.update({key: value for key, value in event.items() if key != "message"})
        return str(part.get("content") or "")

    def embedding_call(self, request: EmbeddingRequest) -> tuple[str, dict[str, Any]]:
        dimensions = {} if request.dimensions is None else {"dimensions": request.dimensions}
        return "/api/embed", {"model": request.model, "input": request.input, **dimensions}

    def read_embeddings(self, document: Any) -> tuple[list[list[float]], int | None]:
        return document["embeddings"], _count(document.get("prompt_eval_count"))


class EchoProvider(Provider):
    """Answers without a network: completions repeat the prompt, embeddings are hashed word counts of length 1.

    Deterministic everywhere: the same texts give the same vectors in every process and on every Python. With a schema
    the answer is the smallest value that fits it.
    """

    TYPE = "echo"
    FIELDS: Mapping[str, str] = {name: name for name in _TUNING}
    instant = True  # never waits, so that it needs no thread
    DIMENSIONS = 256

    def complete(self, request: CompletionRequest) -> CompletionResponse:
        text = (
            f"echo: {request.prompt}"
            if request.schema is None
            else _to_json(_smallest_value(request.schema, request.prompt))
        )
        if request.on_text and request.stream:
            for piece in re.findall(r"\s*\S+\s*", text):
                request.on_text(piece)
        asked = [request.system or "", *(_joined_text(message.get("content")) for message in request.messages)]
        return CompletionResponse(
            text, request.model, sum(len(part.split()) for part in asked), len(text.split()), "stop"
        )

    def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        size = request.dimensions or self.DIMENSIONS
        vectors = [_hashed_words(text, size) for text in request.input]
        return EmbeddingResponse(vectors, request.model, sum(len(text.split()) for text in request.input))


def _hashed_words(text: str, size: int) -> list[float]:
    """Word counts by feature hashing (Weinberger et al., 2009), scaled to length 1; zeros for no words."""
    import hashlib

    counts = [0.0] * size
    for word in re.findall(r"[^\W_]+", text.lower()):
        digest = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
        counts[(digest >> 1) % size] += 1.0 if digest & 1 else -1.0
    length = math.sqrt(sum(count * count for count in counts))
    return [count / length for count in counts] if length else counts


def _smallest_value(schema: Any, text: str, depth: int = 0) -> Any:
    """A value that fits a JSON Schema, as far as its types, enum, required and bounds say."""
    if not isinstance(schema, Mapping) or depth > 20:
        return None
    for key in ("const", "default", "enum"):
        if key in schema:
            return schema[key][0] if key == "enum" else schema[key]
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return _smallest_value(
                {**schema[key][0], **{name: schema[name] for name in schema if name != key}}, text, depth + 1
            )
    kind = (_as_list(schema.get("type")) or ["object" if "properties" in schema else "string"])[0]
    if kind == "object":
        wanted = schema.get("required") or schema.get("properties") or ()
        properties = schema.get("properties") or {}
        return {name: _smallest_value(properties.get(name, {"type": "string"}), text, depth + 1) for name in wanted}
    if kind == "array":
        return [_smallest_value(schema.get("items", {}), text, depth + 1) for _ in range(schema.get("minItems", 0))]
    if kind in ("number", "integer"):
        low, step = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("multipleOf") or 1
        return 0 if low is None or low < 0 else low + (step if "minimum" not in schema else 0)
    if kind == "string":
        return text[: schema.get("maxLength", 200)].ljust(schema.get("minLength", 0), ".")
    return False if kind == "boolean" else None


PROVIDERS: dict[str, type[Provider]] = {
    provider.TYPE: provider
    for provider in (
        OpenAIProvider, AnthropicProvider, AzureOpenAIProvider, GeminiProvider, CohereProvider, MistralProvider, OllamaProvider,
        VoyageProvider, OpenAICompatibleProvider, EchoProvider,
    )
}  # fmt: skip
for _service, _address, _prefix in (
    ("groq", "https://api.groq.com/openai/v1", "GROQ"),
    ("together", "https://api.together.ai/v1", "TOGETHER"),
    ("openrouter", "https://openrouter.ai/api/v1", "OPENROUTER"),
):
    _settings = {"KEY_VARIABLES": (f"{_prefix}_API_KEY",), "URL_VARIABLES": (f"{_prefix}_BASE_URL",)}
    PROVIDERS[_service] = type(
        f"{_service.title()}Provider",
        (OpenAICompatibleProvider,),
        {"TYPE": _service, "BASE_URL": _address, **_settings},
    )


# ---------------------------------------------------------------------------------------------------------------------
# 11. Vector stores
# Records and queries come in, the nearest records go out; one protocol, one filter language for all.
# ---------------------------------------------------------------------------------------------------------------------


class LocalVectorStore:
    """L"""
VECTOR_STORES = {"local": LocalVectorStore, "pinecone": LocalVectorStore}


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


class _Parameters(dict[str, Any]):
    """A transform's or action's parameters; asking for what is missing or of the wrong kind is an ExecutionError."""

    def get_as(self, name: str, check: Callable[[Any], str | None], default: Any = None) -> Any:
        value = self.get(name)
        if value is None:
            if default is None:
                raise ExecutionError(f"{name} is missing")
            return default
        if fault := check(value):
            raise ExecutionError(f"{name} {fault}")
        return value


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


def _text_input(inputs: _Inputs) -> str:
    return str(_one_input(inputs, str, "text"))


def _same(left: Any, right: Any) -> bool:
    """Equality of JSON values: 1 is 1.0 but not true."""
    return isinstance(left, bool) == isinstance(right, bool) and left == right


def _field(item: Any, path: str) -> Any:
    """The value at a dotted path in a map or list; None where there is none."""
    for part in path.split("."):
        if isinstance(item, Mapping):
            item = item.get(part)
        elif isinstance(item, (list, tuple)) and part.isdigit() and int(part) < len(item):
            item = item[int(part)]
        else:
            return None
    return item


def _merge(inputs: _Inputs, parameters: _Parameters) -> Any:
    values = list(inputs.values())
    if values and all(isinstance(value, Mapping) for value in values):
        merged: dict[str, Any] = {}
        for value in values:
            merged = _merge_deep(merged, value) if parameters.get("deep") else {**merged, **value}
        return merged
    if values and all(isinstance(value, (list, tuple)) for value in values):
        return [item for value in values for item in value]
    return dict(inputs)


def _merge_deep(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(left)
    for key, value in right.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge_deep(merged[key], value) if both else value
    return merged


def _concat(inputs: _Inputs, parameters: _Parameters) -> Any:
    values = list(inputs.values())
    if values and all(isinstance(value, (list, tuple)) for value in values):
        return [item for value in values for item in value]
    return str(parameters.get("separator") or "").join(map(_to_text, values))


def _filter(inputs: _Inputs, parameters: _Parameters) -> Any:
    items = _list_input(inputs)
    if parameters.get("condition") is not None:  # compiled by the workflow, asked once an item
        return [item for index, item in enumerate(items) if parameters["condition"](item, index)]
    key = parameters.get_as("key", _text)
    if "value" not in parameters:
        return [item for item in items if _field(item, key)]
    return [item for item in items if isinstance(item, Mapping) and _same(_field(item, key), parameters["value"])]


def _map(inputs: _Inputs, parameters: _Parameters) -> Any:
    items = _list_input(inputs)
    if parameters.get("template") is not None:  # compiled by the workflow, rendered once an item
        return [parameters["template"](item, index) for index, item in enumerate(items)]
    key = parameters.get_as("key", _text)
    return [_field(item, key) for item in items]


def _pick(inputs: _Inputs, parameters: _Parameters) -> Any:
    source = _one_input(inputs, (Mapping, list, tuple), "a map or a list of maps")
    if parameters.get("key") is not None:
        return _field(source, parameters.get_as("key", _text))
    keys = _as_list(parameters.get_as("keys", _names))
    picked = [{key: item[key] for key in keys if key in item} for item in _as_list(source) if isinstance(item, Mapping)]
    return picked[0] if isinstance(source, Mapping) else picked


def _split(inputs: _Inputs, parameters: _Parameters) -> Any:
    text = _text_input(inputs)
    separator = parameters.get_as("separator", _text, "\n")
    if not separator:
        return list(text)
    parts = text.split(separator, parameters.get_as("max_splits", _integer(-1), -1))
    return [part.strip() for part in parts] if parameters.get("trim") else parts


def _join(inputs: _Inputs, parameters: _Parameters) -> Any:
    return parameters.get_as("separator", _text, ", ").join(map(_to_text, _list_input(inputs)))


def _json_parse(inputs: _Inputs, parameters: _Parameters) -> Any:
    try:
        return _load_json(_text_input(inputs))
    except ParseError as error:
        raise ExecutionError(f"not JSON: {error}") from None


def _regex(inputs: _Inputs, parameters: _Parameters) -> Any:
    text, pattern = _text_input(inputs), parameters.get_as("pattern", _text)
    compiled = _compile_regex(pattern)
    if parameters.get("replace") is not None:
        return _guarded(compiled, text).sub(parameters.get_as("replace", _text), text)
    group = parameters.get("group", 0)
    try:
        if parameters.get("all"):
            return [match[group] for match in _guarded(compiled, text).finditer(text)]
        match = _guarded(compiled, text).search(text)
        return match[group] if match else None
    except IndexError:
        raise ExecutionError(f"the pattern has no group {group!r}") from None


def _sort(inputs: _Inputs, parameters: _Parameters) -> Any:
    items, key = _list_input(inputs), parameters.get("key")
    keyed = [(item if key is None else _field(item, str(key)), item) for item in items]
    missing = [item for value, item in keyed if value is None]  # nulls last, whatever the direction
    try:
        present = sorted(
            (pair for pair in keyed if pair[0] is not None), key=lambda pair: pair[0], reverse=bool(parameters.get("reverse"))
        )
    except TypeError:
        kinds = sorted({_type_name(value) for value, _ in keyed if value is not None})
        raise ExecutionError(f"cannot order {' and '.join(kinds)}") from None
    return [item for _, item in present] + missing


def _unique(inputs: _Inputs, parameters: _Parameters) -> Any:
    key = parameters.get("key")
    seen: dict[str, Any] = {}
    for item in _list_input(inputs):
        seen.setdefault(_to_json(item if key is None else _field(item, str(key)), sort_keys=True), item)
    return list(seen.values())


def _slice(inputs: _Inputs, parameters: _Parameters) -> Any:
    source = _one_input(inputs, (list, tuple, str), "a list or text")
    whole = _must("a whole number", _is_integer)
    start = parameters.get_as("start", whole, 0)
    return source[start : None if parameters.get("end") is None else parameters.get_as("end", whole)]


def _flatten(inputs: _Inputs, parameters: _Parameters) -> Any:
    items = _list_input(inputs)
    for _ in range(parameters.get_as("depth", _integer(1, 100), 1)):
        items = [inner for item in items for inner in (item if isinstance(item, (list, tuple)) else [item])]
    return items


_TRANSFORMS: dict[str, Callable[[_Inputs, _Parameters], Any]] = {
    "merge": _merge,
    "concat": _concat,
    "filter": _filter,
    "map": _map,
    "pick": _pick,
    "split": _split,
    "join": _join,
    "json_parse": _json_parse,
    "json_dump": lambda inputs, parameters: _to_json(_one_input(inputs), indent=parameters.get("indent")),
    "regex": _regex,
    "sort": _sort,
    "unique": _unique,
    "slice": _slice,
    "flatten": _flatten,
    "length": lambda inputs, parameters: len(_one_input(inputs, (list, tuple, str, Mapping), "a list, map or text")),
    "template": lambda inputs, parameters: parameters.get_as("template", _anything)(inputs, 0),
}


def _log_action(call: _StepRun, parameters: _Parameters) -> Any:
    message = _to_text(parameters.get("message", ""))
    level = parameters.get_as("level", _one_of("debug", "info", "warning", "error"), "info")
    call.run.emit("log", call.id, level=level, message=message)
    return message


async def _sleep_action(call: _StepRun, parameters: _Parameters) -> Any:
    import asyncio

    seconds = _seconds(parameters.get("seconds", parameters.get("duration")), "s")
    if seconds is None:
        raise ExecutionError('sleep needs seconds: a number, or a text such as "1.5s"')
    await asyncio.sleep(seconds)
    return seconds


def _fail_action(call: _StepRun, parameters: _Parameters) -> Any:
    raise ExecutionError(_to_text(parameters.get("message", "the fail action was reached")))


async def _write_file_action(call: _StepRun, parameters: _Parameters) -> Any:
    name, content = parameters.get_as("path", _name), parameters.get("content", "")
    text = content if isinstance(content, str) else _to_json(content, indent=2) + "\n"
    return await call.blocking(_write_below, call.run.executor.output_folder, name, text, bool(parameters.get("append")))


def _write_below(folder: str, name: str, text: str, append: bool) -> str:
    """Writes a file below `folder` and nowhere else, whatever links and dots its name holds; returns its path."""
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, name))
    if not path.startswith(root.rstrip(os.sep) + os.sep):
        raise ExecutionError(f"write_file: {name!r} is not below the output folder {folder!r}")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if append:
            with open(path, "a", encoding="utf-8", newline="") as file:
                file.write(text)
        else:
            _replace_file(path, text)
    except (OSError, ValueError) as error:
        raise ExecutionError(f"write_file: {name!r}: {error}") from None
    return path


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


async def _http_action(call: _StepRun, parameters: _Parameters) -> Any:
    url = parameters.get_as("url", _name)
    headers = {str(name): str(value) for name, value in (parameters.get("headers") or {}).items()}
    body: bytes | None = None
    payload = parameters.get("json", parameters.get("body"))
    if payload is not None:
        as_text = isinstance(payload, str) and "json" not in parameters
        body = (payload if as_text else _to_json(payload)).encode()
        if not any(name.lower() == "content-type" for name in headers):
            headers["Content-Type"] = "text/plain; charset=utf-8" if as_text else "application/json"
    method = str(parameters.get("method") or ("GET" if body is None else "POST")).upper()
    response = await call.blocking(call.run.http().request, method, url, headers, body)
    text = response.body.decode("utf-8", "replace")
    if response.status >= 400 and parameters.get("fail_on_error", True):
        retryable = response.status in _RETRIED_STATUSES or response.status >= 500
        reason = f"{method} answered {response.status}: {_shorten(text, 200)}"
        wait = _retry_after_seconds(response.headers)
        raise ProviderError(reason, provider="http", status=response.status, retryable=retryable, retry_after=wait)
    with contextlib.suppress(ParseError):
        return {"status": response.status, "headers": response.headers, "body": _load_json(text)}
    return {"status": response.status, "headers": response.headers, "body": text}


_ACTIONS: dict[str, Callable[[_StepRun, _Parameters], Any]] = {
    "log": _log_action,
    "http": _http_action,
    "webhook": _http_action,
    "write_file": _write_file_action,
    "sleep": _sleep_action,
    "fail": _fail_action,
}


def _fitting_call(function: Callable[..., Any], leading: tuple[Any, ...], parameters: dict[str, Any]) -> Callable[[], Any]:
    """A custom function bound to what it can take: parameters by name, or as one map; an ExecutionError if neither fits.

    `leading` comes first if there is room for it (a transform's inputs).
    """
    import inspect

    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return lambda: function(*leading, **parameters)
    forms: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        (leading, parameters), ((*leading, parameters), {}), (leading, {}), ((), {})
    ]  # fmt: skip
    for positional, named in forms:
        if parameters and not named and parameters not in positional:
            continue  # a function that would not see its parameters is called wrongly
        with contextlib.suppress(TypeError):
            signature.bind(*positional, **named)
            return lambda positional=positional, named=named: function(*positional, **named)  # type: ignore[misc]
    name = getattr(function, "__name__", "function")
    raise ExecutionError(f"{name}{signature} cannot take the parameters {', '.join(parameters) or '(none)'}")


async def _transform_step(call: _StepRun, values: dict[str, Any]) -> tuple[Any, ...]:
    """A custom transform; the built-in ones never wait and are run by `_transform_inline`."""
    name = values.pop("function")
    custom = call.run.executor.transforms[name]
    inputs = _Inputs((key, render(call.context)) for key, render in call.node.inputs)
    return (await call.custom(custom, _fitting_call(custom, (inputs,), values)),)


def _transform_inline(node: _Node, context: Any, values: dict[str, Any]) -> Any:
    inputs = _Inputs((name, render(context)) for name, render in node.inputs)
    parameters = _Parameters(values)
    for key, render in node.item_values:  # what a transform renders for each item itself
        parameters[key] = _per_item(render, context, node)
    name = parameters.pop("function")
    try:
        return _TRANSFORMS[name](inputs, parameters)
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
    custom = call.run.executor.actions.get(name)
    if custom is not None:
        return (await call.custom(custom, _fitting_call(custom, (), values)),)
    try:
        outcome = _ACTIONS[name](call, _Parameters(values))
        return (await outcome if hasattr(outcome, "__await__") else outcome,)
    except ExecutionError as error:
        raise ExecutionError(f"{name}: {error}" if name not in ("fail", "write_file") else str(error)) from None


async def _llm_step(call: _StepRun, values: dict[str, Any]) -> tuple[Any, ...]:
    request = _completion_request(values)
    response = await call.complete(values["provider"], request)
    call.result.provider, call.result.model = values["provider"], response.model
    text: Any = response.text
    return text, response.model, response.total_tokens, response.metadata


def _completion_request(values: dict[str, Any]) -> CompletionRequest:
    messages = values.get("messages")
    if messages is None:
        messages = [{"role": "user", "content": values["prompt"]}]
    names = ("model", "system", *_SAMPLING_KEYS, "params")
    given = {name: values[name] for name in names if values.get(name) is not None}
    return CompletionRequest(messages=messages, stream=bool(values.get("stream")), **given)


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
        query = (await call.embed(values["embed"], [query]))[0][0]
    options = {name: values.get(name) for name in ("filter", "namespace")}
    options["include_metadata"] = values.get("include_metadata") is not False
    options["include_vectors"] = values.get("include_vectors") is True
    store = call.run.vector_store(values["database"])
    results = await call.blocking(functools.partial(store.search, values["index"], query, top_k, **options))
    metadata = {"count": len(results), "top_k": top_k, "database": values["database"], "index": values["index"]}
    return results, metadata


async def _vector_upsert_step(call: _StepRun, values: dict[str, Any]) -> tuple[Any, ...]:
    records = values.get("vectors")
    if records is None:
        documents = [_document_record(document) for document in values["documents"]]
        texts = [str(document["metadata"]["text"]) for document in documents]
        vectors = (await call.embed(values["embed"], texts))[0]
        records = [{**document, "vector": vector} for document, vector in zip(documents, vectors)]
    store = call.run.vector_store(values["database"])
    return (await call.blocking(store.upsert, values["index"], records, values.get("namespace")),)


def _document_record(document: Any) -> dict[str, Any]:
    """A document (a text, or a map with a text, and perhaps an id and metadata) as a record that lacks its vector."""
    entry = {"text": document} if isinstance(document, str) else document
    if not isinstance(entry, Mapping) or not isinstance(entry.get("text"), str):
        raise ExecutionError(f"documents must be texts, or maps with a text, not {_shown(document)}")
    import hashlib

    digest = hashlib.blake2b(entry["text"].encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return {"id": str(entry.get("id", digest)), "metadata": {**(entry.get("metadata") or {}), "text": entry["text"]}}


async def _parallel_step(call: _StepRun, values: dict[str, Any]) -> tuple[Any, ...]:
    assert call.node.children is not None
    children = await call.run_children(call.node.children, limit=call.node.limit)
    return tuple(children.first(node.id) for node in call.node.children.nodes)


async def _branch_step(call: _StepRun, values: dict[str, Any]) -> tuple[Any, ...]:
    node = call.node
    value = _branch_key(node.picker.value(call.context) if node.picker else None)
    taken = value if value in node.branches else "default" if "default" in node.branches else None
    first: dict[str, Any] = {}
    for name, graph in node.branches.items():
        if name == taken:
            children = await call.run_children(graph)
            first.update({child.id: children.first(child.id) for child in graph.nodes})
    for name, graph in node.branches.items():
        if name != taken:
            call.skip_children([child for child in graph.nodes if child.id not in first], "branch")
    every = dict.fromkeys(child.id for graph in node.branches.values() for child in graph.nodes)
    return (taken, *(first.get(child_id) for child_id in every))


async def _loop_step(call: _StepRun, values: dict[str, Any]) -> tuple[Any, ...]:
    node, previous = call.node, None
    assert node.children is not None and node.until is not None
    for iteration in range(values["max_iterations"]):
        local = {"iteration": iteration, "previous": previous}
        children = await call.run_children(node.children, local, segment=str(iteration), order=iteration)
        outputs = (*(children.first(child.id) for child in node.children.nodes), iteration + 1)
        if node.until.evaluate(children.context):
            return outputs
        previous = children.view
    if values.get("on_exhausted") != "continue":
        raise ExecutionError(f"the condition of until did not hold within {values['max_iterations']} iterations")
    return outputs


async def _workflow_step(call: _StepRun, values: dict[str, Any]) -> tuple[Any, ...]:
    return await call.run_workflow(values)


_HANDLERS: dict[str, Callable[[_StepRun, dict[str, Any]], Awaitable[tuple[Any, ...]]]] = {
    "llm": _llm_step,
    "embed": _embed_step,
    "vector_search": _vector_search_step,
    "vector_upsert": _vector_upsert_step,
    "transform": _transform_step,
    "action": _action_step,
    "parallel": _parallel_step,
    "branch": _branch_step,
    "loop": _loop_step,
    "workflow": _workflow_step,
}


# ---------------------------------------------------------------------------------------------------------------------
# 13. Execution: the scheduler and the run
# A plan, inputs and providers come in; a RunResult goes out. Steps start the moment their last dependency ends and a
# slot is free; what fails stops only what depends on it; a cancelled run leaves nothing running.
# ---------------------------------------------------------------------------------------------------------------------

_DEFAULT_CONCURRENCY = 4
_PROVIDER_TYPES = frozenset(("llm", "embed", "vector_search", "vector_upsert"))
_CALL_TIMEOUT_SECONDS = 120.0  # for each attempt of those, unless the step has its own
_SLICE_SECONDS = 0.004  # how long steps that never wait may keep the event loop to themselves


class StepResult:
    """What became of one step.

    `status` is pending, running, completed, failed, skipped or cancelled; `outputs` maps output names to JSON values
    (null for a skipped or failed step); `error` is None or {"type", "message", "status", "retryable"}; `reason` says
    why a step was skipped; `usage` counts input_tokens, output_tokens, total_tokens and calls.
    """

    __slots__ = (
        "attempts", "duration_ms", "error", "exception", "model", "order", "outputs", "provider", "reason", "status",
        "step_id", "tolerated", "type", "usage",
    )  # fmt: skip

    def __init__(self, step_id: str, type: str, order: tuple[int, ...] = ()) -> None:
        self.step_id, self.type, self.order = step_id, type, order
        self.status = "pending"
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

    def to_dict(self) -> dict[str, Any]:
        """The step's entry in the JSON result; keys that mean nothing for it are left out."""
        entry: dict[str, Any] = {"step_id": self.step_id, "type": self.type, "status": self.status}
        entry.update(outputs=self.outputs, error=self.error)
        for name in ("reason", "attempts", "duration_ms", "usage", "provider", "model"):
            value = getattr(self, name)
            if value:
                entry[name] = value
        return entry

    def __repr__(self) -> str:
        return f"StepResult({self.step_id!r}, {self.status}, outputs={self.outputs!r})"


def _error_summary(error: BaseException) -> dict[str, Any]:
    """An error as the JSON result shows it."""
    summary = {"type": type(error).__name__, "message": str(error) or repr(error)}
    status = getattr(error, "status", None)
    if isinstance(status, int):
        summary["status"] = status
    summary["retryable"] = _is_transient(error)
    return summary


def _is_transient(error: BaseException) -> bool:
    """Whether another attempt may help, as far as the error itself can tell."""
    if isinstance(error, OrchestratorError):
        return bool(getattr(error, "retryable", False))
    return bool(getattr(error, "retryable", isinstance(error, (ConnectionError, TimeoutError))))


class RunResult:
    """What became of a run: a mapping of full step ids to StepResult, in workflow order, and the run's own outcome.

    `status` is completed, failed, cancelled or timed_out; `outputs` are the workflow's own outputs; `usage` counts
    input_tokens, output_tokens, total_tokens and calls; `error` is None or {"type", "message", ...}.
    """

    def __init__(self, run_id: str, workflow: str) -> None:
        self.run_id, self.workflow = run_id, workflow
        self.status = "running"
        self.duration_ms = 0.0
        self.outputs: dict[str, Any] = {}
        self.usage: dict[str, Any] = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "calls": 0}
        self.error: dict[str, Any] | None = None
        self.exception: BaseException | None = None
        self.steps: dict[str, StepResult] = {}

    def __getitem__(self, step_id: str) -> StepResult:
        return self.steps[step_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __contains__(self, step_id: object) -> bool:
        return step_id in self.steps

    def items(self) -> Iterable[tuple[str, StepResult]]:
        """(full id, StepResult) in workflow order, children after their container."""
        return self.steps.items()

    def raise_for_status(self) -> None:
        """Raises unless the run completed: RunTimeoutError, or ExecutionError from the first failed step's error."""
        if self.status == "completed":
            return
        if isinstance(self.exception, (RunTimeoutError, ExecutionError)):
            raise self.exception
        raise ExecutionError(f"the run was {self.status}")

    def to_dict(self) -> dict[str, Any]:
        """The JSON result of `run`."""
        return {
            "run_id": self.run_id,
            "workflow": self.workflow,
            "status": self.status,
            "duration_ms": self.duration_ms,
            "outputs": self.outputs,
            "usage": self.usage,
            "error": self.error,
            "steps": {step_id: step.to_dict() for step_id, step in self.steps.items()},
        }

    def __repr__(self) -> str:
        return f"RunResult({self.run_id!r}, {self.status}, steps={len(self.steps)})"


class _Slots:
    """Permission to work, for at most `free` at a time, given in the order of asking."""

    def __init__(self, loop: asyncio.AbstractEventLoop, free: int) -> None:
        self.loop, self.free = loop, free
        self.waiters: collections.deque[asyncio.Future[None]] = collections.deque()

    async def acquire(self) -> None:
        if self.free > 0:
            self.free -= 1
            return
        waiter = self.loop.create_future()
        self.waiters.append(waiter)
        try:
            await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled():
                self.release()  # the slot was handed over in the same moment
            raise

    def release(self) -> None:
        while self.waiters:
            waiter = self.waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)  # the slot passes on without ever being free
                return
        self.free += 1


class _WorkerPool:
    """Daemon threads for blocking calls: as many as there are calls in flight, kept for reuse until `close`.

    asyncio's default pool stops at cpu + 4 threads and is joined at exit; neither will do for slow calls.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        import queue

        self.loop = loop
        self.jobs: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.idle = self.threads = 0  # idle: threads that no job has been promised to
        self.finished: collections.deque[tuple[Any, ...]] = collections.deque()
        self.delivering = False

    def submit(self, scope: _CancelScope, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Calls the function in a thread; returns a future of its result."""
        future = self.loop.create_future()
        with self.lock:
            spawn = self.idle == 0
            if spawn:
                self.threads += 1
            else:
                self.idle -= 1
        self.jobs.put((future, scope, function, arguments))
        if spawn:
            threading.Thread(target=self._work, name="llm_orchestrator", daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            job = self.jobs.get()
            if job is None:
                return
            future, scope, function, arguments = job
            value, error = None, None
            if not scope.cancelled:  # nothing starts after it was cancelled
                _CALL.scope = scope
                try:
                    value = function(*arguments)
                except BaseException as raised:
                    error = raised
                _CALL.scope = None
            with self.lock:
                self.idle += 1
            self.finished.append((future, value, error))
            del job, future, scope, function, arguments, value, error
            if not self.delivering:
                self.delivering = True  # one wake-up serves all that finish before the loop looks
                try:
                    self.loop.call_soon_threadsafe(self._deliver)
                except RuntimeError:  # the loop is closed: nobody waits any more
                    return

    def _deliver(self) -> None:
        self.delivering = False
        while self.finished:
            future, value, error = self.finished.popleft()
            if not future.done():
                if error is None:
                    future.set_result(value)
                elif isinstance(error, StopIteration):  # a future refuses it
                    future.set_exception(RuntimeError("StopIteration was raised"))
                else:
                    future.set_exception(error)

    def close(self) -> None:
        for _ in range(self.threads):
            self.jobs.put(None)


class _StepView(dict[str, Any]):
    """What templates see as steps.ID: its outputs, its children, status and error; alone, its first output."""

    __slots__ = ("value",)

    def __init__(self, result: StepResult, children: Mapping[str, Any] | None = None) -> None:
        super().__init__(result.outputs)
        self.value = next(iter(result.outputs.values()), None)
        if children:
            self.update(children)
        self.setdefault("output", self.value)
        self.setdefault("status", result.status)
        self.setdefault("error", result.error["message"] if result.error else None)

    def __template_value__(self) -> Any:
        return self.value


class _Layer(dict[str, Any]):
    """The steps of a container's children in front of those around it."""

    __slots__ = ("around",)

    def __init__(self, around: Mapping[str, Any]) -> None:
        super().__init__()
        self.around = around

    def __missing__(self, key: str) -> Any:
        return self.around[key]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self.around

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default


class _OutputNames(dict[str, Any]):
    """`outputs.X`: a step by its id, or an output by its name."""

    __slots__ = ("graph", "steps")

    def __init__(self, steps: Mapping[str, Any], graph: _Graph) -> None:
        super().__init__()
        self.steps, self.graph = steps, graph

    def __missing__(self, key: str) -> Any:
        if key in self.steps:
            return self.steps[key]
        return self.steps[self.graph.producers[key]][key]

    def __contains__(self, key: object) -> bool:
        return key in self.steps or key in self.graph.producers

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default


_TRIGGER_RULES: dict[str, Callable[[int, int, int], str | None]] = {
    # (ran, failed, skipped) dependencies -> why the step is skipped, or None to run it
    "none_failed_min_one_success": lambda ran, failed, skipped: (
        "upstream_failed" if failed else None if ran else "upstream_skipped"
    ),
    "all_success": lambda ran, failed, skipped: (
        "upstream_failed" if failed else "upstream_skipped" if skipped else None
    ),
    "one_success": lambda ran, failed, skipped: (
        None if ran else "upstream_failed" if failed else "upstream_skipped"
    ),
    "all_done": lambda ran, failed, skipped: None,
    "one_failed": lambda ran, failed, skipped: None if failed else "trigger_rule",
}  # fmt: skip


class _GraphRun:
    """One pass over sibling steps: the top level of a run, the children of a container, an iteration of a loop.

    Every step ends in exactly one final state. `waiting[i]` falls to 0 when the last dependency of step i has ended;
    the step is decided at that moment. Steps that never wait run in place; the others each in a task of their own.
    """

    def __init__(
        self,
        run: _Run,
        graph: _Graph,
        context: dict[str, Any],
        workflow: Workflow,
        prefix: str = "",
        order: tuple[int, ...] = (),
        limit: int | None = None,
        fail_fast: bool = False,
        chain: tuple[str, ...] = (),
    ) -> None:
        self.run, self.graph, self.context, self.workflow = run, graph, context, workflow
        self.prefix, self.order, self.limit, self.fail_fast, self.chain = prefix, order, limit, fail_fast, chain
        size = len(graph.counts)
        self.waiting = graph.counts.copy()
        self.failed, self.ran = [0] * size, [0] * size  # dependencies that failed, and that ran
        self.unfinished = size
        self.ready: collections.deque[int] = collections.deque(graph.roots)
        self.tasks: set[asyncio.Task[None]] = set()
        self.results: list[StepResult | None] = [None] * size
        self.cancelled = self.draining = False
        self.done: asyncio.Future[None] | None = None
        self.crash: BaseException | None = None

    async def execute(self) -> None:
        """Returns when every step has ended; when cancelled, cancels the steps and waits for them first."""
        import asyncio

        self.drain()
        try:
            while self.unfinished and not (self.cancelled and not self.tasks) and self.crash is None:
                self.done = self.run.loop.create_future()
                await self.done
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            while self.tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait(list(self.tasks))
            self.close()
        if self.crash is not None:
            raise self.crash

    def abort(self) -> None:
        """Cancels what runs; what has not begun will not."""
        self.cancelled = True
        for task in list(self.tasks):
            task.cancel()

    def close(self) -> None:
        """Gives every step that never began its final state."""
        for position in range(len(self.results)) if self.unfinished else ():
            if self.results[position] is None:
                result = self.begin(position)
                result.status = "cancelled"
                self.finish(position, result)

    def node(self, position: int) -> _Node:
        return self.graph.nodes[position]

    def begin(self, position: int) -> StepResult:
        """The record of a step that is about to be decided."""
        node = self.graph.nodes[position]
        step_id = self.prefix + node.id
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
                position = ready.popleft()
                self.start(position)
                if ready and time.perf_counter() > slice_end:
                    self.draining = True
                    self.run.loop.call_soon(self.drain)
                    return
        except BaseException as error:  # a defect of the engine must not become a hang
            self.crash = error
            self.wake()

    def start(self, position: int) -> None:
        node, result = self.node(position), self.begin(position)
        reason = None
        if self.graph.counts[position]:
            ran, failed = self.ran[position], self.failed[position]
            reason = _TRIGGER_RULES[node.rule](ran, failed, self.graph.counts[position] - ran - failed)
        try:
            if reason is None and node.condition is not None and node.item_condition == self.has_items:
                if not node.condition.evaluate(self.local_context(position)):
                    reason = "condition"
        except OrchestratorError as error:
            self.fail(position, result, error)
            return
        if reason is not None:
            result.status, result.reason = "skipped", reason
            self.finish(position, result)
        elif node.inline and (self.has_items or node.for_each is None) and not self.run.overrides(node):
            self.run_inline(position, node, result)
        else:
            step = _StepRun(self, node, result, self.local_context(position), position)
            task = self.run.loop.create_task(step.execute())
            self.tasks.add(task)
            task.add_done_callback(step.ended)

    has_items = False  # whether these are the items of a for_each

    def run_inline(self, position: int, node: _Node, result: StepResult) -> None:
        """A step that never waits: no task, no slot, no thread."""
        started = time.perf_counter()
        run = self.run
        result.status = "running"
        if run.listening:
            run.emit("step_running", result.step_id, step_type=node.type, attempt=1)
        result.attempts = 1
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

    def fail(self, position: int, result: StepResult, error: BaseException) -> None:
        result.fail(error)
        self.finish(position, result)

    def finish(self, position: int, result: StepResult, children: Mapping[str, Any] | None = None) -> None:
        """Records the final state of a step and releases what waited for it."""
        node = self.node(position)
        status = result.status
        if status != "completed":
            result.outputs = dict.fromkeys(node.output_names)
            result.tolerated = status == "failed" and node.continue_on_error
        self.publish(node, result, children)
        ran = status == "completed" or result.tolerated
        failed = status in ("failed", "cancelled") and not ran
        run = self.run
        if run.listening:
            run.emit_end(result)
        self.unfinished -= 1
        for dependent in node.dependents if not self.has_items else ():
            self.ran[dependent] += ran
            self.failed[dependent] += failed
            self.waiting[dependent] -= 1
            if not self.waiting[dependent]:
                self.ready.append(dependent)
        if failed and status == "failed" and self.fail_fast and not self.cancelled:
            self.abort()
        self.wake()

    def publish(self, node: _Node, result: StepResult, children: Mapping[str, Any] | None) -> None:
        self.context["steps"][node.id] = _StepView(result, children)

    def wake(self) -> None:
        over = not self.unfinished or self.crash is not None or (self.cancelled and not self.tasks)
        if over and self.done is not None and not self.done.done():
            self.done.set_result(None)

    def first(self, position: int) -> Any:
        """The first output of a step; null unless it completed."""
        result = self.results[position]
        return next(iter(result.outputs.values()), None) if result else None

    def failures(self) -> list[StepResult]:
        return [result for result in self.results if result and result.status == "failed" and not result.tolerated]

    def raise_failures(self) -> None:
        """An ExecutionError for the container if a child failed for good."""
        failures = self.failures()
        if failures:
            first = failures[0]
            more = f" (and {len(failures) - 1} more of {len(self.results)})" if len(failures) > 1 else ""
            reason = first.error["message"] if first.error else "failed"
            raise ExecutionError(f"{first.step_id}: {reason}{more}", first.step_id) from first.exception


class _ItemRuns(_GraphRun):
    """The items of a for_each: the same step once per item, under the ids STEP.INDEX."""

    has_items = True

    def __init__(self, parent: _StepRun, items: list[tuple[Any, Any]]) -> None:
        graph = _Graph()
        graph.counts, graph.roots = [0] * len(items), list(range(len(items)))
        outer = parent.siblings
        super().__init__(
            outer.run, graph, parent.context, outer.workflow, f"{parent.result.step_id}.", parent.result.order,
            parent.node.limit, outer.fail_fast and not parent.node.continue_on_error, outer.chain,
        )  # fmt: skip
        self.step, self.items = parent.node, items

    def node(self, position: int) -> _Node:
        return self.step

    def begin(self, position: int) -> StepResult:
        step_id = f"{self.prefix}{position}"
        result = self.results[position] = StepResult(step_id, self.step.type, (*self.order, position))
        self.run.results[step_id] = result
        return result

    def local_context(self, position: int) -> dict[str, Any]:
        key, item = self.items[position]
        return {**self.context, "item": item, "index": position, "key": key}

    def publish(self, node: _Node, result: StepResult, children: Mapping[str, Any] | None) -> None:
        """Items have no name of their own in templates; their outputs are gathered by the step."""

    def gathered(self) -> tuple[list[Any], ...]:
        """Each output of the step as the list of its items' outputs."""
        names = self.step.output_names
        return tuple([result.outputs.get(name) if result else None for result in self.results] for name in names)


class _StepRun:
    """One step being run outside the scheduler's own thread of control: its attempts, its calls, its children."""

    __slots__ = ("child_views", "context", "expired", "node", "position", "result", "run", "siblings", "task")

    def __init__(
        self, siblings: _GraphRun, node: _Node, result: StepResult, context: dict[str, Any], position: int
    ) -> None:
        self.siblings, self.run, self.node, self.result = siblings, siblings.run, node, result
        self.context, self.position = context, position
        self.expired = False
        self.child_views: dict[str, Any] | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        return self.result.step_id

    async def execute(self) -> None:
        """Runs the step to its final state. Never raises: whatever happens becomes part of the result."""
        import asyncio

        started, node, result = time.perf_counter(), self.node, self.result
        self.task = asyncio.current_task()
        result.status = "running"
        try:
            if node.for_each is not None and not self.siblings.has_items:
                outputs: tuple[Any, ...] = await self.each()
            else:
                outputs = await self.attempts()
            result.outputs = dict(zip(node.output_names, outputs))
            result.status = "completed"
        except asyncio.CancelledError:
            result.status = "cancelled"
        except Exception as error:
            result.fail(error)
        result.duration_ms = round((time.perf_counter() - started) * 1000, 3)

    def ended(self, task: asyncio.Task[None]) -> None:
        """The task's last act, also when it was cancelled before it could begin."""
        siblings = self.siblings
        siblings.tasks.discard(task)
        if self.result.status in ("pending", "running"):
            self.result.status = "cancelled"
        try:
            siblings.finish(self.position, self.result, self.child_views)
        except BaseException as error:
            siblings.crash = error
            siblings.wake()
        if siblings.ready and not siblings.draining:
            siblings.drain()

    async def attempts(self) -> tuple[Any, ...]:
        """Tries until it succeeds, the error is final or the attempts are spent."""
        import asyncio

        policy = self.node.retry
        while True:
            self.result.attempts += 1
            try:
                return await self.attempt()
            except Exception as error:
                delay = self.retry_delay(error, policy)
                if delay is None:
                    raise
                if self.run.listening:
                    self.run.emit(
                        "step_retry", self.id, attempt=self.result.attempts, backoff_ms=round(delay * 1000),
                        error=_error_summary(error),
                    )  # fmt: skip
            await asyncio.sleep(delay)

    def retry_delay(self, error: Exception, policy: RetryPolicy) -> float | None:
        """Seconds until the next attempt, or None if there is none."""
        known = isinstance(error, OrchestratorError) or hasattr(error, "retryable")
        if not (_is_transient(error) or (self.node.retry_given and not known)):
            return None
        if self.result.attempts >= policy.max_attempts:
            return None
        wait = getattr(error, "retry_after", None)
        delay = policy.delay_seconds(self.result.attempts, wait)
        if delay is None and isinstance(error, ProviderError):
            error._too_long_a_wait(policy.max_delay_seconds)
        return delay

    async def attempt(self) -> tuple[Any, ...]:
        """One attempt within its deadline. Containers hold no slot: their children need it."""
        import asyncio

        node, run = self.node, self.run
        row = _STEP_TYPES[node.type]
        values = self.render(row)
        if not row.container:
            await run.slots.acquire()
        timeout = node.timeout or (_CALL_TIMEOUT_SECONDS if node.type in _PROVIDER_TYPES else None)
        timer = run.loop.call_later(timeout, self.expire) if timeout else None
        if run.listening:
            run.emit("step_running", self.id, step_type=node.type, attempt=self.result.attempts)
        try:
            return await _HANDLERS[node.type](self, values)
        except asyncio.CancelledError:
            if not self.expired or self.siblings.cancelled:
                raise
            self.expired = False
            if self.task is not None and hasattr(self.task, "uncancel"):
                self.task.uncancel()
            reason = f"no answer within {timeout:g} s"
            if node.type in _PROVIDER_TYPES:
                raise ProviderTimeoutError(reason, provider=str(values.get("provider") or values.get("database"))) from None
            raise ExecutionError(f"not done within {timeout:g} s", self.id, retryable=True) from None
        finally:
            if timer is not None:
                timer.cancel()
            if not row.container:
                run.slots.release()

    def expire(self) -> None:
        self.expired = True
        if self.task is not None:
            self.task.cancel()

    def render(self, row: _StepType) -> dict[str, Any]:
        """The step's keys with their templates rendered, checked as the compiler checked the constant ones."""
        values = dict(self.node.constants)
        for key, render in self.node.values:
            value = values[key] = render(self.context)
            check = row.keys.get(key)
            if check is not None and (fault := check(value)) and value is not None:
                raise ExecutionError(f"{key} {fault}", self.id)
        return values

    async def blocking(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A blocking call in a worker thread; when cancelled, the socket under it is closed at once."""
        scope = _CancelScope(None)
        try:
            return await self.run.pool.submit(scope, function, arguments)
        except BaseException:
            scope.cancel()
            raise

    async def custom(self, function: Callable[..., Any], bound: Callable[[], Any]) -> Any:
        """A function of the user's: awaited if it is asynchronous, in a worker thread otherwise."""
        outcome = bound() if _is_async(function) else await self.blocking(bound)
        if hasattr(outcome, "__await__"):
            outcome = await outcome
        return _json_value(outcome, getattr(function, "__name__", "the function"))

    async def complete(self, name: str, request: CompletionRequest) -> CompletionResponse:
        """One call of a provider, counted and shown in events."""
        provider = self.run.provider(name, self.siblings.workflow)
        answer = await self.invoke(name, provider, getattr(provider, "complete", provider), request)
        if isinstance(answer, str):
            answer = CompletionResponse(text=answer, model=request.model)
        if not isinstance(answer, CompletionResponse):
            raise BadResponseError(f"returned {type(answer).__name__}, not a CompletionResponse or text", provider=name)
        self.count(input_tokens=answer.input_tokens, output_tokens=answer.output_tokens, total_tokens=answer.total_tokens)
        return answer

    async def embed(self, settings: Mapping[str, Any], texts: list[str]) -> tuple[list[Any], str, int]:
        """(vectors, model, tokens) of texts, in as many calls as the provider's limit asks for, in order."""
        run, name = self.run, settings["provider"]
        provider = run.provider(name, self.siblings.workflow)
        call = getattr(provider, "embed", None)
        if call is None:
            raise ExecutionError(f"the provider {name!r} makes no embeddings", self.id)
        most = getattr(provider, "max_batch", 2048)
        size = min(settings.get("batch_size") or most, most)
        options = {key: settings[key] for key in ("dimensions", "input_type", "params") if settings.get(key) is not None}
        vectors, model, tokens = [], str(settings["model"]), 0
        for start in range(0, len(texts), size):
            request = EmbeddingRequest(model=settings["model"], input=texts[start : start + size], **options)
            answer = await self.invoke(name, provider, call, request)
            if not isinstance(answer, EmbeddingResponse) or len(answer.vectors) != len(request.input):
                raise BadResponseError(f"answered {len(request.input)} texts with something else", provider=name)
            self.count(input_tokens=answer.tokens, total_tokens=answer.tokens)
            vectors += answer.vectors
            model, tokens = answer.model, tokens + (answer.tokens or 0)
        return vectors, model, tokens

    async def invoke(self, name: str, provider: Any, call: Any, request: Any) -> Any:
        """One call of a provider, counted: in place if it never waits, awaited, or in a worker thread."""
        self.count(calls=1)
        if self.run.listening:
            self.run.emit(
                "provider_call", self.id, provider=name, model=request.model, attempt=self.result.attempts
            )
        direct = getattr(provider, "instant", False) or _is_async(call)
        answer = call(request) if direct else await self.blocking(call, request)
        return await answer if hasattr(answer, "__await__") else answer

    def count(self, **amounts: int | None) -> None:
        """Adds to the usage of the step and of the run."""
        if self.result.usage is None:
            self.result.usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "calls": 0}
        for usage in (self.result.usage, self.run.usage):
            for name, amount in amounts.items():
                usage[name] += amount or 0

    # children

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
        await runs.execute()
        if not self.node.continue_on_error:
            runs.raise_failures()
        return runs.gathered()

    async def run_children(
        self,
        graph: _Graph,
        local: Mapping[str, Any] | None = None,
        segment: str = "",
        order: int = 0,
        limit: int | None = None,
    ) -> _GraphRun:
        """The children of a container, in a scope in front of the container's own; an error if one fails for good."""
        steps = _Layer(self.context["steps"])
        context = {**self.context, **(local or {}), "steps": steps, "outputs": _OutputNames(steps, graph)}
        prefix = f"{self.id}.{segment}." if segment else f"{self.id}."
        outer = self.siblings
        children = _GraphRun(
            self.run, graph, context, outer.workflow, prefix, (*self.result.order, order), limit, outer.fail_fast,
            outer.chain,
        )  # fmt: skip
        await children.execute()
        self.child_views = steps
        children.raise_failures()
        return children

    def skip_children(self, nodes: list[_Node], reason: str) -> None:
        """Records children that a container passed over."""
        for node in nodes:
            result = StepResult(f"{self.id}.{node.id}", node.type, (*self.result.order, 1, node.position))
            result.status, result.reason, result.outputs = "skipped", reason, dict.fromkeys(node.output_names)
            self.run.results[result.step_id] = result
            if self.run.listening:
                self.run.emit_end(result)

    async def run_workflow(self, values: dict[str, Any]) -> tuple[Any, ...]:
        """Another workflow's steps as children of this one, with inputs, partials and providers of its own."""
        caller = self.siblings.workflow
        called = self.node.workflow or _sub_workflow(caller, values["workflow"])
        chain = (*self.siblings.chain, str(called.name))
        if len(chain) > _MAX_WORKFLOW_DEPTH:
            raise ExecutionError(f"workflows call each other more than {_MAX_WORKFLOW_DEPTH} deep: {' -> '.join(chain)}")
        called.validate()
        plan = called._plan()
        inputs = _checked_inputs(called, values.get("inputs") or {})
        context = _root_context(self.run, called, plan, inputs)
        children = _GraphRun(
            self.run, plan.graph, context, called, f"{self.id}.", (*self.result.order, 0), called.max_concurrency,
            called.fail_fast or self.siblings.fail_fast, chain,
        )  # fmt: skip
        await children.execute()
        self.child_views = context["steps"]
        children.raise_failures()
        if plan.outputs:
            return tuple(render(context) for _, render in plan.outputs)
        return tuple(children.first(position) for position in range(len(plan.graph.nodes)))


def _is_async(function: Any) -> bool:
    import asyncio

    return asyncio.iscoroutinefunction(function) or asyncio.iscoroutinefunction(getattr(function, "__call__", None))


def _json_value(value: Any, origin: str, depth: int = 0) -> Any:
    """A value that user code returned, as plain JSON; ExecutionError if it is none."""
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
    return {
        **inputs,
        "inputs": inputs,
        "input": inputs,
        "steps": steps,
        "outputs": _OutputNames(steps, plan.graph),
        "workflow": {"name": workflow.name, "version": workflow.version, "metadata": workflow.metadata},
        "run": {"id": run.run_id},
    }


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

    def __init__(self, executor: WorkflowExecutor, loop: asyncio.AbstractEventLoop) -> None:
        self.executor, self.loop = executor, loop
        self.run_id = os.urandom(8).hex()
        self.started = time.perf_counter()
        self.result = RunResult(self.run_id, str(executor.workflow.name))
        self.usage = self.result.usage
        self.results: dict[str, StepResult] = {}
        self.slots = _Slots(loop, executor.max_concurrency)
        self.pool = _WorkerPool(loop)
        self.stopped: str | None = None  # cancelled or timed_out, once it is
        self.main: asyncio.Task[None] | None = None
        self.logger = _enabled_logger()
        self.listening = bool(executor.on_event) or self.logger is not None

    async def execute(self, inputs: Mapping[str, Any]) -> RunResult:
        """Runs to the end. When the calling task is cancelled, the partial result is complete before that goes on."""
        import asyncio

        executor = self.executor
        workflow, plan = executor.workflow, executor.workflow._plan()
        context = _root_context(self, workflow, plan, inputs)
        top = _GraphRun(
            self, plan.graph, context, workflow, fail_fast=bool(workflow.fail_fast), chain=(str(workflow.name),)
        )
        timer = self.loop.call_later(_seconds(workflow.timeout_seconds, "s") or 3600, self.stop, "timed_out")
        if self.listening:
            self.emit("run_started", workflow=workflow.name)
        self.main = self.loop.create_task(top.execute())
        interrupted = False
        while not self.main.done():
            try:
                await asyncio.wait([self.main])
            except asyncio.CancelledError:
                interrupted = True
                self.stop("cancelled")
        timer.cancel()
        self.pool.close()
        if not self.main.cancelled() and self.main.exception() is not None:
            raise self.main.exception() or AssertionError
        self.finish(top, plan, context)
        if interrupted:
            raise asyncio.CancelledError
        return self.result

    def stop(self, status: str) -> None:
        """Ends the run early; called in the loop's own thread."""
        if self.stopped is None and self.main is not None and not self.main.done():
            self.stopped = status
            self.main.cancel()

    def finish(self, top: _GraphRun, plan: _Plan, context: dict[str, Any]) -> None:
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
            error = ExecutionError(f"{first.step_id}: {first.error['message'] if first.error else ''}", first.step_id)
            error.__cause__ = first.exception
            result.exception, result.error = error, {**(first.error or {}), "step_id": first.step_id}
        result.status = self.stopped or ("failed" if failures else "completed")
        for name, render in plan.outputs:
            try:
                result.outputs[name] = render(context)
            except TemplateError as error:
                result.outputs[name] = None
                if result.status == "completed":  # otherwise the steps it reads may never have run
                    result.status, result.exception = "failed", ExecutionError(f"outputs: {name}: {error}")
                    result.error = _error_summary(error)
        if result.error is None and result.exception is not None:
            result.error = _error_summary(result.exception)
        result.duration_ms = round((time.perf_counter() - self.started) * 1000, 3)
        if self.listening:
            self.emit("run_finished", status=result.status, duration_ms=result.duration_ms, usage=result.usage)

    def overrides(self, node: _Node) -> bool:
        """Whether a built-in transform was replaced by one of the executor's."""
        return bool(self.executor.transforms) and node.constants["function"] in self.executor.transforms

    def provider(self, name: str, workflow: Workflow) -> Any:
        return self.executor._provider(name, workflow)

    def vector_store(self, name: str) -> Any:
        return self.executor._vector_store(name)

    def http(self) -> _HttpClient:
        return self.executor._http()

    def emit(self, kind: str, step_id: str | None = None, **details: Any) -> None:
        """One event to the executor's listener and to the log."""
        event = {"type": kind, "run_id": self.run_id, "time": time.time()}
        if step_id is not None:
            event["step_id"] = step_id
        event.update(details)
        if self.executor.on_event is not None:
            try:
                self.executor.on_event(event)
            except Exception as error:  # a listener's fault is not the run's
                _logger().warning("on_event raised %r", error)
        if self.logger is not None:
            _log_event(self.logger, event)

    def emit_end(self, result: StepResult) -> None:
        details = {"duration_ms": result.duration_ms, "attempts": result.attempts}
        details.update(usage=result.usage, error=result.error, reason=result.reason)
        shown = {name: value for name, value in details.items() if value}
        self.emit(f"step_{result.status}", result.step_id, step_type=result.type, **shown)


class WorkflowExecutor:
    """Runs one workflow with one set of inputs; it may be run again, and many may run at once.

    `providers` maps names to providers (anything with `complete(request)`, or a function from request to text); names
    that are not there are built from the workflow's `providers` and from the environment. `actions`, `transforms`
    and `tools` map names to functions. `max_concurrency` bounds the calls in flight (the workflow's, otherwise 4).
    `on_event` is called with each event, a dict with at least type, run_id and time. `offline` answers every llm and
    embed step from EchoProvider. Raises ValidationError or DagError for what is wrong with the workflow or the inputs.
    """

    def __init__(
        self,
        workflow: Workflow,
        inputs: Mapping[str, Any] | None = None,
        providers: Mapping[str, Any] | None = None,
        *,
        max_concurrency: int | None = None,
        actions: Mapping[str, Callable[..., Any]] | None = None,
        transforms: Mapping[str, Callable[..., Any]] | None = None,
        vector_stores: Mapping[str, Any] | None = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        offline: bool = False,
        output_folder: str | os.PathLike[str] = "output",
    ) -> None:
        if not isinstance(workflow, Workflow):
            raise ValidationError(f"workflow must be a Workflow, not {type(workflow).__name__}")
        self.workflow = workflow
        self.warnings = workflow.validate()
        self.inputs = _checked_inputs(workflow, inputs or {})
        limit = max_concurrency if max_concurrency is not None else workflow.max_concurrency or _DEFAULT_CONCURRENCY
        if not _is_integer(limit) or limit < 1:
            raise ValidationError(f"max_concurrency must be a whole number of at least 1, not {limit!r}")
        self.max_concurrency: int = limit
        self.providers, self.actions, self.transforms = dict(providers or {}), dict(actions or {}), dict(transforms or {})
        self.vector_stores = dict(vector_stores or {})
        self.on_event, self.offline, self.output_folder = on_event, offline, os.fspath(output_folder)
        self.result: RunResult | None = None  # of the latest run, also when that was cancelled
        self._built: dict[tuple[str, str], Any] = {}  # providers made here, by source of their settings and name
        self._client: _HttpClient | None = None
        self._lock = threading.Lock()
        self._runs: list[_Run] = []

    async def execute(self) -> RunResult:
        """Runs the workflow in the current event loop.

        Failed steps and timeouts are in the result. Raises before the first step for what makes a run impossible:
        ValidationError, AuthenticationError (a key is missing). When the task is cancelled, everything in flight is
        stopped first; `self.result` then holds what was done.
        """
        import asyncio

        self._check()
        run = _Run(self, asyncio.get_running_loop())
        self.result = run.result
        self._runs.append(run)
        try:
            return await run.execute(self.inputs)
        finally:
            self._runs.remove(run)

    def run(self) -> RunResult:
        """Runs the workflow and returns its result; works with and without a running event loop (a notebook)."""
        import asyncio

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self.execute())
        outcome: list[Any] = []

        def in_thread() -> None:
            try:
                outcome.append(asyncio.run(self.execute()))
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=in_thread, name="llm_orchestrator-run", daemon=True)
        thread.start()
        try:
            thread.join()
        except BaseException:
            self.cancel()
            thread.join(1)
            raise
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        result: RunResult = outcome[0]
        return result

    def cancel(self) -> None:
        """Stops the runs of this executor, from any thread; `execute` then returns with the status cancelled."""
        for run in list(self._runs):
            with contextlib.suppress(RuntimeError):  # its loop is closed already
                run.loop.call_soon_threadsafe(run.stop, "cancelled")

    def _check(self) -> None:
        """Refuses a run that cannot succeed, before its first step."""
        problems: list[Problem] = []
        for workflow in self._workflows():
            for problem in workflow._plan().problems:
                table, name = problem.custom or ("", "")
                if table in ("actions", "transforms") and name not in getattr(self, table):
                    problems.append(problem)
            for node in workflow._plan().graph.walk():
                for key, name in self._needs(node):
                    try:
                        self._provider(name, workflow) if key == "provider" else self._vector_store(name)
                    except ValidationError as error:
                        path = (*node.path, key)
                        problems.append(Problem(_label(workflow.to_dict(), path) + error.problems[0].message, path))
            if problems:
                raise ValidationError([_as_error(problem) for problem in workflow._located(problems)])
        self._check_missing_inputs()

    def _workflows(self) -> Iterator[Workflow]:
        """The workflow and every sub-workflow that is known before the run."""
        found = [self.workflow]
        for workflow in found:
            yield workflow
            for node in workflow._plan().graph.walk():
                if node.workflow is not None and node.workflow not in found:
                    found.append(node.workflow)

    def _needs(self, node: _Node) -> Iterator[tuple[str, str]]:
        """(key, name) of each provider and vector database that a step uses."""
        for entry in (node.constants, *_as_list(node.constants.get("fallback")), node.constants.get("embed") or {}):
            if isinstance(entry.get("provider"), str):
                yield "provider", entry["provider"]
        if isinstance(node.constants.get("database"), str):
            yield "database", node.constants["database"]

    def _check_missing_inputs(self) -> None:
        """Without declared inputs: what steps that are certain to run cannot do without."""
        if self.workflow.inputs is not None:
            return
        graph = self.workflow._plan().graph
        uncertain: set[str] = set()
        problems = []
        for step_id in (node.id for level in _levels(graph) for node in level):
            node = graph.by_id[step_id]
            if node.condition or node.for_each or node.continue_on_error or uncertain & set(node.dependencies):
                uncertain.add(step_id)
                continue
            for reference, key in node.references:
                segments = reference[0]
                bare = segments[0] not in ("inputs", "input", "steps", "outputs", "workflow", "run", *node.local)
                name = segments[0] if bare else segments[1] if segments[0] in ("inputs", "input") and segments[1:] else ""
                if name and reference[1] and name not in self.inputs:
                    label = _label(self.workflow.to_dict(), node.path)
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
        key = (workflow.source if name in configured else "", name)
        with self._lock:
            if key not in self._built:
                self._built[key] = _build_provider(name, configured.get(name), self.providers)
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
                self._built["vectors", name] = VECTOR_STORES[name].from_env()
            return self._built["vectors", name]

    def _http(self) -> _HttpClient:
        with self._lock:
            if self._client is None:
                self._client = _HttpClient("http")
            return self._client

    def close(self) -> None:
        """Closes the idle connections of the providers that were built here."""
        for provider in [*self._built.values(), *([self._client] if self._client else [])]:
            provider.close()


def _as_error(problem: Problem) -> Problem:
    """A warning of `validate` that a run cannot live with."""
    return Problem(problem.message, problem.path, problem.line, problem.column, problem.source)


def _build_provider(name: str, configured: Mapping[str, Any] | None, known: Mapping[str, Any]) -> Any:
    """A provider from its entry in a workflow's `providers`, or from its name alone."""
    settings = dict(configured or {})
    kind = settings.pop("type", None) or name
    if kind not in PROVIDERS:
        near = _suggestion(kind, [*PROVIDERS, *known]) or f"; there are {', '.join([*known, *PROVIDERS])}"
        raise ValidationError(f"unknown provider {kind!r}{near}")
    for special in ("rate_limit", "circuit_breaker"):
        settings.pop(special, None)
    settings.update(settings.pop("options", None) or {})
    variable = settings.pop("api_key_env", None)
    if variable is not None:
        settings["api_key"] = os.environ.get(variable)
        if not settings["api_key"]:
            raise AuthenticationError(f"the environment variable {variable} is not set", provider=name)
    if "timeout_seconds" in settings:
        settings["timeout_seconds"] = _seconds(settings["timeout_seconds"], "s")
    return PROVIDERS[kind].from_env(**({"name": name} if configured else {}), **settings)


# ---------------------------------------------------------------------------------------------------------------------
# 15. Events, logging, metrics
# Events are dicts: type, run_id, time, step_id and what belongs to the type. They are made only when someone listens.
# ---------------------------------------------------------------------------------------------------------------------

_EVENT_LEVELS = {"step_failed": "error", "step_retry": "warning", "step_running": "debug", "provider_call": "debug"}


@functools.lru_cache(maxsize=None)
def _logger() -> logging.Logger:
    """The logger `llm_orchestrator`, silent until the application configures logging."""
    import logging

    logger = logging.getLogger("llm_orchestrator")
    logger.addHandler(logging.NullHandler())
    return logger


def _enabled_logger() -> logging.Logger | None:
    """The logger if anybody would see its messages."""
    return _logger() if "logging" in sys.modules and _logger().isEnabledFor(40) and _has_handlers(_logger()) else None


def _has_handlers(logger: Any) -> bool:
    import logging

    while logger is not None:
        if any(not isinstance(handler, logging.NullHandler) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


def _log_event(logger: logging.Logger, event: Mapping[str, Any]) -> None:
    import logging

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

_MERMAID_SHAPES = {"action": ("[/", "/]"), "branch": ("{", "}"), "transform": ("([", "])")}


def _picture_edges(graph: _Graph, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(from, to) full ids, inside containers too."""
    for node in graph.nodes:
        for dependency in node.dependencies:
            yield prefix + dependency, prefix + node.id
        for inner in node.graphs():
            yield from _picture_edges(inner, f"{prefix}{node.id}.")


def _graph_mermaid(workflow: Workflow) -> str:
    """The workflow as a Mermaid flowchart; containers are subgraphs."""
    lines, names = ["flowchart TD"], {}

    def name(full_id: str) -> str:  # Mermaid takes no dots, and `end` is a word of its own
        return names.setdefault(full_id, f"s{len(names)}_{re.sub(r'[^A-Za-z0-9]', '_', full_id)}")

    def draw(graph: _Graph, prefix: str, indent: str) -> None:
        for node in graph.nodes:
            full_id, inner = prefix + node.id, list(node.graphs())
            label = f"{node.id}<br/><i>{node.type}{' for each' if node.for_each else ''}</i>"
            if inner:
                lines.append(f'{indent}subgraph {name(full_id)}["{label}"]')
                for child in inner:
                    draw(child, f"{full_id}.", indent + "    ")
                lines.append(f"{indent}end")
            else:
                left, right = _MERMAID_SHAPES.get(node.type, ("[", "]"))
                lines.append(f'{indent}{name(full_id)}{left}"{label}"{right}')

    graph = workflow._plan().graph
    draw(graph, "", "    ")
    conditional = {prefix for prefix, node in _walk_ids(graph) if node.condition}
    for start, end in _picture_edges(graph):
        lines.append(f"    {name(start)} {'-.->' if end in conditional else '-->'} {name(end)}")
    return "\n".join(lines) + "\n"


def _walk_ids(graph: _Graph, prefix: str = "") -> Iterator[tuple[str, _Node]]:
    for node in graph.nodes:
        yield prefix + node.id, node
        for inner in node.graphs():
            yield from _walk_ids(inner, f"{prefix}{node.id}.")


def _graph_dot(workflow: Workflow) -> str:
    """The workflow in Graphviz' language; containers are clusters."""
    lines = [f"digraph {_to_json(str(workflow.name))} {{", "    compound=true; node [shape=box, style=rounded];"]

    def draw(graph: _Graph, prefix: str, indent: str) -> None:
        for node in graph.nodes:
            full_id, inner = prefix + node.id, list(node.graphs())
            shape = ", shape=diamond" if node.type == "branch" else ""
            lines.append(f"{indent}{_to_json(full_id)} [label={_to_json(f'{node.id}' + chr(10) + node.type)}{shape}];")
            if inner:
                lines.append(f"{indent}subgraph {_to_json('cluster_' + full_id)} {{ label={_to_json(node.id)};")
                for child in inner:
                    draw(child, f"{full_id}.", indent + "    ")
                lines.append(f"{indent}}}")

    graph = workflow._plan().graph
    draw(graph, "", "    ")
    lines += [f"    {_to_json(start)} -> {_to_json(end)};" for start, end in _picture_edges(graph)]
    return "\n".join([*lines, "}"]) + "\n"


def _graph_text(workflow: Workflow) -> str:
    """The workflow as a tree of levels: what runs together stands together."""
    lines = [str(workflow.name)]

    def draw(graph: _Graph, indent: str) -> None:
        ordered = [node for level in _levels(graph) for node in level]
        for node in ordered:
            last = node is ordered[-1]
            after = f" <- {', '.join(node.dependencies)}" if node.dependencies else ""
            marks = f"{' for each' if node.for_each else ''}{' if ' + node.condition.source if node.condition else ''}"
            lines.append(f"{indent}{'└── ' if last else '├── '}{node.id} ({node.type}{marks}){after}")
            for inner in node.graphs():
                draw(inner, indent + ("    " if last else "│   "))

    draw(workflow._plan().graph, "")
    return "\n".join(lines) + "\n"


_PICTURES = {"mermaid": _graph_mermaid, "dot": _graph_dot, "text": _graph_text}


# ---------------------------------------------------------------------------------------------------------------------
# 17. Command line
# Each command parses its arguments, calls the module and prints. stdout carries results only; the rest is stderr's.
# ---------------------------------------------------------------------------------------------------------------------

_EXIT_COMPLETED, _EXIT_FAILED, _EXIT_USAGE, _EXIT_INTERRUPTED = 0, 1, 2, 130


def _parser() -> argparse.ArgumentParser:
    import argparse

    program = "python -m llm_orchestrator"
    parser = argparse.ArgumentParser(
        prog=program,
        description="Runs workflows of language-model calls, written as a YAML graph of steps.",
        epilog="exit status: 0 completed, 1 the run failed, 2 bad usage or an invalid workflow, 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"llm_orchestrator {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-v", "--verbose", action="count", default=0, help="log every step; twice: every call")
    common.add_argument("-q", "--quiet", action="store_true", help="errors only")
    common.add_argument("--log-format", choices=("text", "json"), default="text", help="how stderr's log lines look")
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    validate = commands.add_parser(
        "validate", parents=[common], help="check workflows and report every problem",
        epilog=f"example: {program} validate examples/*.yaml",
    )  # fmt: skip
    validate.add_argument("files", nargs="+", metavar="FILE", help="a workflow in YAML or JSON; - for standard input")
    validate.add_argument("--json", action="store_true", help="print the problems as JSON")

    run = commands.add_parser(
        "run", parents=[common], help="run a workflow and print its result as JSON",
        epilog=f"examples: {program} run wf.yaml --set name=Alice --offline    |    "
        f"{program} run wf.yaml --input inputs.json --print outputs.answer",
    )  # fmt: skip
    run.add_argument("file", metavar="FILE", help="a workflow in YAML or JSON; - for standard input")
    run.add_argument("-i", "--input", metavar="JSON|FILE|-", help="inputs as a JSON object, or a JSON or YAML file of one")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one input; JSON if it parses, else text")
    run.add_argument("--max-concurrency", type=int, metavar="N", help="calls in flight at once (default 4)")
    run.add_argument("--offline", action="store_true", help="answer llm and embed steps from the built-in echo provider")
    run.add_argument("--plugin", action="append", default=[], metavar="FILE.py", help="Python file with actions, transforms, providers")
    run.add_argument("--print", dest="path", metavar="PATH", help="print one value of the result, raw: outputs.answer, steps.a.text")
    run.add_argument("-o", "--out", metavar="FILE", help="write the result there instead of to stdout")
    run.add_argument("--output-dir", default="output", metavar="DIR", help="where write_file actions write (default output)")

    graph = commands.add_parser(
        "graph", parents=[common], help="draw a workflow", epilog=f"example: {program} graph wf.yaml --format text"
    )
    graph.add_argument("file", metavar="FILE", help="a workflow in YAML or JSON; - for standard input")
    graph.add_argument("--format", choices=tuple(_PICTURES), default="mermaid", help="default: mermaid")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status. Prints usage errors and failures, never a traceback without --debug."""
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
        report.append({"file": name, "valid": not failed, "problems": [_problem_entry(problem) for problem in problems]})
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
    extensions = _load_plugins(options.plugin)
    reporter = _Reporter(options, len(workflow.steps))
    executor = WorkflowExecutor(
        workflow, inputs, extensions["providers"], actions=extensions["actions"], transforms=extensions["transforms"],
        max_concurrency=options.max_concurrency, offline=options.offline, output_folder=options.output_dir,
        on_event=reporter.on_event if reporter.wanted else None,
    )  # fmt: skip
    for warning in executor.warnings if not options.quiet else ():
        if warning.custom is None:
            _complain(str(warning))
    with _signals(executor) as received:
        result = executor.run()
    reporter.close()
    _write_result(result, options)
    if result.error is not None and not options.quiet:
        _complain(f"{result.status}: {result.error['type']}: {result.error['message']}")
    if received or result.status == "cancelled":
        return 128 + received[0] if received else _EXIT_INTERRUPTED
    return _EXIT_COMPLETED if result.status == "completed" else _EXIT_FAILED


@contextlib.contextmanager
def _signals(executor: WorkflowExecutor) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM stop the run, so that its partial result is printed; a second one ends the process."""
    import signal

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
    inputs: Any = {}
    if source is not None:
        text: str | bytes = source
        name = "--input"
        if source == "-":
            text, name = sys.stdin.buffer.read(), "<stdin>"
        elif source.lstrip()[:1] not in ("{", "["):
            text, name = _read_file(source), source
        try:
            inputs = (load_yaml if name.lower().endswith((".yaml", ".yml")) else _load_json)(text)
        except ParseError as error:
            error.source = name
            raise
        if not isinstance(inputs, Mapping):
            raise ValidationError(f"{name}: inputs must be a JSON object, not {_shown(inputs)}")
    inputs = dict(inputs)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ValidationError(f"--set {setting}: must be KEY=VALUE")
        entry = declared.get(key) if isinstance(declared, Mapping) else None
        kind = (entry or {}).get("type")
        inputs[key] = value
        if _INPUT_TYPE_ALIASES.get(kind, kind) != "string":
            with contextlib.suppress(ParseError):
                inputs[key] = _load_json(value)
    return inputs


def _load_plugins(paths: list[str]) -> dict[str, dict[str, Any]]:
    """What plugin files define: dicts named actions, transforms and providers, or functions marked by their place there.

    A plugin is a Python file. `import llm_orchestrator` in it gives this very module.
    """
    import importlib.util

    found: dict[str, dict[str, Any]] = {"actions": {}, "transforms": {}, "providers": {}}
    sys.modules.setdefault("llm_orchestrator", sys.modules[__name__])
    for index, path in enumerate(paths):
        spec = importlib.util.spec_from_file_location(f"llm_orchestrator_plugin_{index}", path)
        if spec is None or spec.loader is None:
            raise OrchestratorError(f"{path}: is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise OrchestratorError(f"{path}: {type(error).__name__}: {error}") from error
        known = [table for table in found if isinstance(getattr(module, table, None), Mapping)]
        if not known:
            raise OrchestratorError(f"{path}: defines none of the dicts {', '.join(found)}")
        for table in known:
            found[table].update(getattr(module, table))
    return found


def _write_result(result: RunResult, options: argparse.Namespace) -> None:
    document = result.to_dict()
    if options.path is not None:
        text = _printed(document, options.path)
    else:
        text = _to_json(document, indent=2) + "\n"
        if options.out is None:
            text = _escaped_for(sys.stdout, text)
    if options.out is not None:
        try:
            _replace_file(options.out, text)
        except OSError as error:
            raise OrchestratorError(f"{options.out}: cannot be written: {error.strerror}") from None
    else:
        sys.stdout.write(text)
        sys.stdout.flush()


def _escaped_for(stream: Any, text: str) -> str:
    """JSON text for a stream whose encoding may lack some characters: those as JSON's own escapes."""
    try:
        text.encode(stream.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return re.sub("[^\x00-\x7f]", lambda match: json.dumps(match[0])[1:-1], text)
    return text


def _printed(document: Mapping[str, Any], path: str) -> str:
    """One value of the result, raw: a path in the JSON result, or for steps as templates write it (steps.greet.text)."""
    value, steps = _field(document, path), document["steps"]
    if path.startswith("steps."):
        named = [step_id for step_id in steps if f"{path}.".startswith(f"steps.{step_id}.")]
        if named:
            step_id = max(named, key=len)
            outputs, rest = steps[step_id]["outputs"], path[len(f"steps.{step_id}.") :]
            first = next(iter(outputs.values()), None)
            entry = {**steps[step_id], "output": first, **outputs}
            value = _field(entry, rest) if rest else first
    if value is None:
        _complain(f"--print {path}: there is no such value")
        return ""
    text = value if isinstance(value, str) else _to_json(value, indent=2)
    return text if text.endswith("\n") else text + "\n"


class _Reporter:
    """What a run shows on stderr: one live line on a terminal, log lines elsewhere."""

    def __init__(self, options: argparse.Namespace, total: int) -> None:
        setting = os.environ.get("LLM_ORCHESTRATOR_LOG", "").lower()
        self.level = 2 if setting == "debug" else 1 if setting == "info" else 0
        self.level = max(self.level, min(options.verbose, 2))
        self.as_json = options.log_format == "json"
        if self.as_json and not self.level and not options.quiet:
            self.level = 1
        try:
            self.live = sys.stderr.isatty() and not self.level and not options.quiet
        except (AttributeError, ValueError):
            self.live = False
        self.colour = self.live and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        self.wanted = self.live or bool(self.level) or not options.quiet
        self.total, self.done, self.failed, self.tokens = total, 0, 0, 0
        self.running: dict[str, None] = {}
        self.started = self.drawn = time.monotonic()

    def on_event(self, event: dict[str, Any]) -> None:
        kind, step_id = event["type"], event.get("step_id", "")
        if kind == "step_running":
            self.running[step_id] = None
        elif kind in ("step_completed", "step_failed", "step_skipped", "step_cancelled"):
            self.running.pop(step_id, None)
            self.done += "." not in step_id
            self.failed += kind == "step_failed"
            self.tokens += (event.get("usage") or {}).get("total_tokens", 0)
        if self.live:
            self.draw()
        else:
            self.log(event)

    def log(self, event: dict[str, Any]) -> None:
        serious = event["type"] in ("step_failed", "step_retry", "log")
        routine = event["type"] not in ("provider_call", "step_running")
        if self.level >= 2 or (self.level == 1 and routine) or serious:
            stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(event["time"]))
            _complain(_to_json({**event, "time": stamp}) if self.as_json else f"{stamp} {_event_text(event)}")

    def draw(self) -> None:
        now = time.monotonic()
        if now - self.drawn < 0.05 and self.done < self.total:
            return
        self.drawn = now
        names = ", ".join(list(self.running)[:3]) + (" ..." if len(self.running) > 3 else "")
        text = f"{self.done}/{self.total} steps, {len(self.running)} running, {self.tokens} tokens, {now - self.started:.1f} s"
        text = f"{text}  {names}"[: _terminal_width() - 1]
        paint = "\x1b[31m" if self.failed else "\x1b[36m"
        line = f"{paint}{text}\x1b[0m" if self.colour else text
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"\r\x1b[K{line}")
            sys.stderr.flush()

    def close(self) -> None:
        if self.live:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()


def _terminal_width() -> int:
    try:
        return max(20, os.get_terminal_size(sys.stderr.fileno()).columns)
    except (OSError, ValueError):
        return 80


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "validate": _validate_command,
    "run": _run_command,
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
