"""YAML and JSON: what `load_yaml` and `_load_json` return, what they refuse and where, and what the writers write."""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_orchestrator as engine
from llm_orchestrator import OrchestratorError, ParseError, load_yaml


def same(left: Any, right: Any) -> bool:
    """Equal in type as well, and nan equals nan."""
    if isinstance(left, dict) and isinstance(right, dict):
        return [*map(repr, left)] == [*map(repr, right)] and all(map(same, left.values(), right.values()))
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and (left == right or (left != left and right != right))


def check(text: str | bytes, value: Any) -> None:
    """The text has that value, also when read by the way that keeps positions."""
    assert same(load_yaml(text), value)
    assert same(engine._YamlReader(engine._decoded(text), {}).document(), value)


def refusal(text: Any, load: Any = load_yaml) -> ParseError:
    with pytest.raises(ParseError) as caught:
        load(text)
    return caught.value


# ---- Values ----------------------------------------------------------------------------------------------------------

SCALARS = {
    "null": None, "~": None, "Null": None, "NULL": None, "nULL": "nULL", "true": True, "True": True, "FALSE": False,
    "tRUE": "tRUE", "yes": "yes", "on": "on", "No": "No", "n": "n", "12:30": "12:30", "1_000": "1_000",
    "2001-01-01": "2001-01-01", "0777": 777, "0o777": 511, "0o8": "0o8", "0x1F": 31, "-0x1F": "-0x1F", "0b1": "0b1",
    "12": 12, "+12": 12, "-0": 0, "1.": 1.0, ".5": 0.5, "-.5": -0.5, "1e3": 1000.0, "1.5E-3": 0.0015, ".": ".",
    "1e": "1e", "e3": "e3", "1.2.3": "1.2.3", ".inf": math.inf, "+.INF": math.inf, "-.Inf": -math.inf,
    ".nan": math.nan, "-.nan": "-.nan", "+": "+", "-": None, "a b": "a b", "a#b": "a#b", "a #b": "a", "a:b": "a:b",
    "http://x.y:80/z?a=b&c": "http://x.y:80/z?a=b&c", "-x": "-x", "?x": "?x", ":x": ":x", "a, [b]": "a, [b]",
    "<<x>>": "<<x>>", "é😀": "é😀", "\x85\xa0\u2028": "\x85\xa0\u2028", "''": "", "'it''s'": "it's", "'\\n'": "\\n",
    '""': "", '"null"': "null",
    r'"\0\a\b\t\n\v\f\r\e\"\/\\\N\_\L\P\ "': '\0\a\b\t\n\v\f\r\x1b"/\\\x85\xa0\u2028\u2029 ',
    r'"\x41\u00e9\U0001F600"': "Aé😀", r'"\ud83d\ude00"': "😀", '"\x7f\ufeff"': "\x7f\ufeff", '"#: -"': "#: -",
    "!!str 12": "12", "! 12": "12", "!!str": "", '!!int "12"': 12, "!!float 1": 1.0, "!!null ''": None,
    "!!bool True": True, "&a 1": 1, "[]": [], "{}": {}, "!!map {}": {}, "!!seq []": [],
}  # fmt: skip


@pytest.mark.parametrize("text", SCALARS, ids=[ascii(text) for text in SCALARS])
def test_a_scalar_has_the_value_of_the_core_schema(text: str) -> None:
    value = SCALARS[text]
    if text != "-":
        check(text + "\n", value)
        check(text, value)
        check(f"- {text}\n- # comment\n  {text} # comment\n", [value, value])
        check(f"key: {text}\nother:\n  {text}\nlast: 1\n", {"key": value, "other": value, "last": 1})
    if not set(",[]{}").intersection(text) and not text.startswith("-") and text not in (":x", "?x", "a #b"):
        check(f"[{text} , {{key: {text} }}]", [value, {"key": value}])


DOCUMENTS: dict[str, tuple[str, Any]] = {
    "empty": ("", None),
    "comments only": ("# a\n\n  # b\n", None),
    "markers": ("# c\n%YAML 1.2\n%OTHER x\n---\na: b\n...\n# end\n...\n", {"a": "b"}),
    "content on the marker line": ("--- text\n", "text"),
    "marker with nothing": ("---\n", None),
    "no marker but its beginning": ("---a: b", {"---a": "b"}),
    "byte order mark": ("\ufeffa: b", {"a": "b"}),
    "line ends of DOS and old Mac": ("a: |\r\n  b\r\nc: d\re: 'f\r\n  g'", {"a": "b\n", "c": "d", "e": "f g"}),
    "list at the parent's indentation": ("a:\n- b\n- c\nd:\n  - e", {"a": ["b", "c"], "d": ["e"]}),
    "compact collections": ("- - a\n  - b: c\n    d: e\n- f: g\n", [["a", {"b": "c", "d": "e"}], {"f": "g"}]),
    "empty values": ("a:\nb: # c\nc:\n  - \n  -\nd: \n", {"a": None, "b": None, "c": [None, None], "d": None}),
    "several lines, plain": ("a: b\n  c\n\n  d # e\nf:\n  g\n  h", {"a": "b c\nd", "f": "g h"}),
    "several lines, top": ("a\nb\n\n\nc\n", "a b\n\nc"),
    "several lines, single": ("'a\n b  \n\n\n  c '", "a b\n\nc "),
    "several lines, double": ('"a \\\n   b\\\n\n  c\\ \n \\td\n\n  "', "a b\nc  \td\n"),
    "blanks at the ends of quoted lines": ('" \n  x\t\n y "', " x y "),
    "literal": ("a: |\n  b\n   c\n\n  d\n\ne: f", {"a": "b\n c\n\nd\n", "e": "f"}),
    "literal, strip and keep": ("a: |-\n  b\n\nc: |+\n  d\n\ne: f\n", {"a": "b", "c": "d\n\n", "e": "f"}),
    "literal, indicator": ("a: |2\n   b\n  c\nd: |1-\n  e\n", {"a": " b\nc\n", "d": " e"}),
    "literal, indicator behind chomping": ("a: |+1 # c\n  b\n\n", {"a": " b\n\n"}),
    "literal at the top": ("|\nb\n# c\n", "b\n# c\n"),
    "literal without its last line end": ("a: |\n  b", {"a": "b"}),
    "literal with tabs": ("a: |\n  b\n  \tc\n", {"a": "b\n\tc\n"}),
    "literal of comments": ("a: |\n  # b\n # c\nd: e", {"a": "# b\n", "d": "e"}),
    "empty literal": ("a: |\nb: |+\n\nc: >-\n", {"a": "", "b": "\n", "c": ""}),
    "folded": ("a: >\n  b\n  c\n\n  d\n   e\n  f\n\n\n  g\n", {"a": "b c\nd\n e\nf\n\ng\n"}),
    "folded, leading and trailing breaks": ("a: >+\n\n  b\n\n", {"a": "\nb\n\n"}),
    "flow": ("{a: [b, 'c', \"d\"], \"e\":1, f: , g, h : {}}", {"a": ["b", "c", "d"], "e": 1,
    "f": None, "g": None, "h": {}}),
    "flow on lines": ("a: [b, # c\n  d\n  e,\n ]\nf: {\n  g: h,\n}\n", {"a": ["b", "d e"], "f": {"g": "h"}}),
    "flow pairs": ("[a: b, ? c : d, : e, \"f\":g, h]", [{"a": "b"}, {"c": "d"}, {None: "e"}, {"f": "g"}, "h"]),
    "flow texts with indicators": ("[a:b, -1, -x, http://c, d#e]", ["a:b", -1, "-x", "http://c", "d#e"]),
    "JSON with tabs": ('{\n\t"a": [\n\t\t1,\n\t\t2\n\t]\n}\n', {"a": [1, 2]}),
    "keys of all kinds": ("1: a\n1.5: d\n'e f': g\nh i: j\n: k\nyes: l\n",
                          {1: "a", 1.5: "d", "e f": "g", "h i": "j", None: "k", "yes": "l"}),
    "explicit keys": ("? a\n: b\n? c\n? 'd'\n: - e\n", {"a": "b", "c": None, "d": ["e"]}),
    "anchors and aliases": ("a: &x [1]\nb: *x\nc: &x y\n*x : [*x]\n", {"a": [1], "b": [1], "c": "y", "y": ["y"]}),
    "anchor above its value": ("a: &x\n  b: c\nd: *x\n", {"a": {"b": "c"}, "d": {"b": "c"}}),
    "anchor on a key": ("&a b: *a\n", {"b": "b"}),
    "merge": ("a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc:\n  <<: [*a, *b]\n  z: 5\n  w: 6\n",
              {"a": {"x": 1, "y": 2}, "b": {"y": 3, "z": 4}, "c": {"y": 2, "z": 5, "x": 1, "w": 6}}),
    "merge in flow": ("[&a {x: 1}, {<<: *a, x: 2}, {'<<': *a}]", [{"x": 1}, {"x": 2}, {"<<": {"x": 1}}]),
}  # fmt: skip

@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_has_the_value_that_yaml_defines(name: str) -> None:
    check(*DOCUMENTS[name])


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_bytes_are_read_by_their_byte_order_mark(codec: str) -> None:
    check("a: é😀\n".encode(codec), {"a": "é😀"})


# ---- Refusals --------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, str, int, int]] = {  # text, part of the reason, line, column
    "not text": (12, "expected text, not int", 1, 1),
    "bad UTF-8": (b"a: b\nc: \xff", "not UTF-8 text: byte 0xff", 2, 4),
    "control character": ("a: b\nc: \x01", "U+0001", 2, 4),
    "half a surrogate pair": ("a: \ud800", "U+D800", 1, 4),
    "odd character without quotes": ("a: b\x7f", "needs quotes", 1, 5),
    "second document": ("a: b\n---\nc: d\n", "several documents", 2, 1),
    "text behind the document's end": ("a: b\n...\nc\n", "several documents", 3, 1),
    "directive without a document": ("%YAML 1.2\na: b", "'---'", 2, 1),
    "directive twice": ("%YAML 1.2\n%YAML 1.2\n---\n", "once", 2, 1),
    "tag directive": ("%TAG ! x\n---\n", "only %YAML", 1, 1),
    "foreign tag": ("a: !Ref b", "the tag !Ref is not supported", 1, 4),
    "binary": ("a: !!binary aGk=", "!!binary", 1, 4),
    "value against its tag": ("a: !!int b", "!!int", 1, 10),
    "collection against its tag": ("a: !!map [b]", "!!map", 1, 10),
    "duplicate key": ("a: 1\nb: 2\n'a': 3\n", "duplicate key 'a'", 3, 1),
    "duplicate key in flow": ("{a: 1, b: 2,\n a: 3}", "duplicate key 'a'", 2, 2),
    "duplicate key by value": ("1: a\n0x1: b\n", "duplicate key 1", 2, 1),
    "true and 1 as keys": ("true: a\n1: b\n", "duplicate key", 2, 1),
    "second merge key": ("<<: {}\n<<: {}\n", "duplicate key '<<'", 2, 1),
    "merge of a text": ("<<: a\n", "merge key", 1, 1),
    "list as key": ("[a]: b\n", "list or a mapping", 1, 1),
    "mapping as key in flow": ("[{a: b}: c]", "list or a mapping", 1, 8),
    "list as explicit key": ("? - a\n: b\n", "list or a mapping", 1, 1),
    "tab before a list": ("a:\n\t- b\n", "tab", 2, 2),
    "tab before a key": ("a:\n  b: c\n\td: e\n", "tab", 3, 2),
    "tab behind an indicator": ("-\t- a\n", "'-' cannot start", 1, 3),
    "less indentation": ("a:\n    b: c\n  d: e\n", "more indentation", 3, 3),
    "more indentation": ("a: b\n  c: d\n", "'key: value' cannot stand here", 2, 4),
    "pair in a pair": ("a: b: c\n", "'key: value' cannot stand here", 1, 5),
    "list behind a key": ("a: - b\n", "'-' cannot start", 1, 4),
    "text among keys": ("a: b\nc\n", "expected 'key: value'", 2, 1),
    "text behind quotes": ("a: 'b' c\n", "unexpected text", 1, 8),
    "comment without a blank": ("a: 'b'#c\n", "unexpected text", 1, 7),
    "reserved character": ("a: @b\n", "'@' cannot start a value", 1, 4),
    "open quote": ("a: 'b\n", "not closed", 1, 4),
    "open bracket": ("a: [b\n", "not closed", 1, 6),
    "wrong bracket": ("[a}", "expected ',' or ']'", 1, 3),
    "comma too many": ("[a,,b]", "',' cannot start", 1, 4),
    "flow line outside its parent": ("a: [\nb]\n", "more indentation", 2, 1),
    "quoted line outside its parent": ("a: 'b\nc'\n", "more indentation", 1, 4),
    "unknown escape": ('a: "b\\q"', "\\q", 1, 6),
    "unknown escape, second line": ('a: "b\n  c\\q"', "\\q", 2, 4),
    "escape outside Unicode": ('"\\U00110000"', "not a character", 1, 2),
    "half a surrogate pair, escaped": ('"\\ud800x"', "not a character", 1, 2),
    "alias without anchor": ("a: *b\n", "alias", 1, 4),
    "alias to itself": ("a: &a [*a]\n", "alias", 1, 8),
    "anchor on an alias": ("- &a b\n- &c *a\n", "alias with an anchor", 2, 6),
    "two anchors": ("&a &b c\n", "second anchor", 1, 4),
    "indicator at the top": ("|2\n  a\n", "'|'", 1, 1),
    "text behind a block indicator": ("a: | b\n", "'|'", 1, 4),
    "blank line wider than the text": ("a: |\n    \n  b\n", "blank line", 3, 3),
    "whole number too long": ("a: " + "1" * 5000, "3500 digits", 1, 4),
    "key too long": ("a" * 1100 + ": b", "cannot stand here", 1, 1101),
    "key on two lines": ("['a\n b': c]", "one line", 2, 4),
    "nesting too deep": ("[" * 101 + "]" * 101, "nesting deeper than 100", 1, 101),
    "block nesting too deep": ("- " * 101 + "a", "nesting deeper than 100", 1, 201),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_document_is_refused_at_its_place(name: str) -> None:
    text, reason, line, column = REFUSED[name]
    error = refusal(text)
    assert reason in error.reason
    assert (error.line, error.column) == (line, column)


def test_an_error_shows_the_source_line_with_a_caret_below_the_place() -> None:
    assert str(refusal("a: b\nc: [d,\n \te, @f]\n")).splitlines() == [
        "<text>:3:6: '@' cannot start a value: put text into quotes", "      e, @f]", "         ^",
    ]  # fmt: skip
    assert len(str(refusal("a: [" + "b, " * 100_000 + "@]"))) < 300


def test_nesting_of_100_is_read() -> None:
    value = load_yaml("[" * 100 + "]" * 100)
    for _ in range(99):
        (value,) = value
    assert value == []


LINES = st.lists(st.sampled_from([
    "a: b", "- c", "  d: 1", "  - e", "f:", "'g': \"h\\n", "  i'", "|", "k: |2-", "   text", "\t- x", "[l, {m: n}",
    "]", "}",
    "&o p", "*o", "<<: *o", "? q", ": r", "!!str s", "---", "...", "# t", "", "  ", "u: >+", "- - v", "{w: [x, y: z]}",
    "%",
]), max_size=8)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(LINES.map("\n".join) | st.text(alphabet=" \n\t:-?#,[]{}&*!|>'\"%@`~ab0\\<", max_size=12) | st.text())
def test_any_text_gives_plain_values_or_a_parse_error_and_the_same_with_positions(text: str) -> None:
    try:
        value = load_yaml(text)
    except ParseError as error:
        assert error.line >= 1 and error.column >= 1 and str(error)
        with pytest.raises(ParseError):
            engine._YamlReader(engine._decoded(text), {}).document()
    else:
        check(text, value)
    engine._positions(text)


# ---- Hostile size ----------------------------------------------------------------------------------------------------

SIZE = 300_000
HUGE = {
    "brackets": "[" * SIZE, "braces": "{a: " * SIZE, "dashes": "- " * SIZE, "questions": "? " * SIZE,
    "tags": "!!str " * SIZE,
    "alias bomb": "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)),
    "merge bomb": "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}], k{i}: 1}}\n" for i in range(1, 3000)),
    "text bomb": f"- &a {'x' * SIZE}\n" + "- *a\n" * 3000,
    "escapes": '"' + "\\n" * SIZE + '"', "backslashes": '"' + "\\\\" * SIZE + '"', "open escapes": '"' + '\\"' * SIZE,
    "blanks before a break": '"\n' + " " * SIZE + '"', "escaped blanks": '"\n' + "\\   " * SIZE + '"',
    "open quotes": "'" + "''" * SIZE, "comments": "a: b\n" + "# c\n" * SIZE + "d: e",
    "blank lines": "a:\n" + "\n" * SIZE + " b",
    "directives": "%A\n" * SIZE, "blanks": "a:" + " " * SIZE + "b",
    "plain lines": "word\n" * SIZE, "colons": "x:" * SIZE,
    "hashes": "a" + " x#" * SIZE, "digits": "1" * SIZE, "float digits": "1." + "1" * SIZE,
    "literal": "|\n" + "a\n" * SIZE,
    "folded": "a: >\n" + "  b\n   c\n" * SIZE, "open list": "[" + "a, " * SIZE, "long key": "k " * SIZE + ": v",
    "empty literals": "- |\n" * SIZE, "empty folded": "- >\n\n" * SIZE,
    "odd characters": '"' + "\x7f" * SIZE + '"', "anchors": "- &a b\n" * (SIZE // 4), "documents": "---\n" * SIZE,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", HUGE)
def test_a_huge_construct_is_read_or_refused_in_linear_time(name: str) -> None:
    start = time.perf_counter()
    try:
        load_yaml(HUGE[name])
    except ParseError as error:
        assert len(str(error)) < 500
    assert time.perf_counter() - start < 20  # a quadratic one takes minutes


def test_nesting_is_answered_even_where_the_stack_is_nearly_used_up() -> None:
    def deep(left: int) -> Any:
        return deep(left - 1) if left else load_yaml("[" * 90 + "]" * 90)

    for left in range(0, sys.getrecursionlimit() - 60, 15):
        try:
            deep(left)
        except ParseError as error:
            assert "nested too deeply" in error.reason
            break
        except RecursionError:  # of `deep` itself, before the loader was called
            break


# ---- Positions -------------------------------------------------------------------------------------------------------


def test_positions_of_keys_and_items_in_block_and_flow_style() -> None:
    text = (
        "a:\n  - b: [x, {y: z}]\n    'c d': 1\n  - &n\n    e: |\n      t\n"
        "? f\n: - g\n<<: {h: i}\n!!str j: {'k':1,\n  l}\n"
    )
    assert engine._positions(text) == {
        ("a",): (1, 1), ("a", 0): (2, 3), ("a", 0, "b"): (2, 5), ("a", 0, "b", 0): (2, 9), ("a", 0, "b", 1): (2, 12),
        ("a", 0, "b", 1, "y"): (2, 13), ("a", 0, "c d"): (3, 5), ("a", 1): (4, 3), ("a", 1, "e"): (5, 5),
        ("f",): (7, 3), ("f", 0): (8, 3), ("<<",): (9, 1), ("<<", "h"): (9, 6), ("j",): (10, 1), ("j", "k"): (10, 11),
        ("j", "l"): (11, 3),
    }  # fmt: skip


def test_positions_end_where_the_text_cannot_be_read() -> None:
    assert engine._positions("a: 1\nb: @\n") == {("a",): (1, 1), ("b",): (2, 1)}
    assert engine._positions("\x00") == {}


def test_positions_in_json_text() -> None:
    text = json.dumps({"steps": [{"id": "a"}, {"id": "b", "x": {}}]}, indent=2)
    assert engine._positions(text)[("steps", 1, "x")] == (8, 7)


# ---- JSON ------------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=15,
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=15,
)


@settings(max_examples=150, deadline=None)
@given(JSON_VALUES, st.sampled_from([None, 0, 2, "\t"]), st.booleans())
def test_json_text_is_read_alike_by_both_readers(value: Any, indent: Any, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert same(engine._load_json(text), value)
    check(text, value)
    check(f"key: {json.dumps(value, ensure_ascii=ascii_only)} # comment\n", {"key": value})


JSON_REFUSED = {
    "duplicate key": ('{"a": 1,\n "b": {"c": 1, "c": 2}}', "duplicate key 'c'", 2, 16),
    "single quotes": ("{'a': 1}", "not JSON", 1, 2),
    "nothing": ("", "not JSON", 1, 1),
    "NaN": ('["NaN", NaN]', "not JSON", 1, 9),
    "Infinity": ("[1,\n-Infinity]", "not JSON", 2, 1),
    "text behind": ("{} x", "not JSON", 1, 4),
    "half a surrogate pair": ('["\\ud800"]', "not a character", 1, 3),
    "nesting too deep": ("[" * 101 + "]" * 101, "nesting deeper than 100", 1, 101),
    "nesting far too deep": ("[" * 100_000, "nesting deeper than 100", 1, 101),
    "whole number too long": ("[" + "1" * 5000 + "]", "3500 digits", 1, 2),
    "control character": ('"\x01"', "U+0001", 1, 2),
    "not UTF-8": (b'"\xe9"', "not UTF-8", 1, 2),
}


@pytest.mark.parametrize("name", JSON_REFUSED)
def test_what_is_not_json_is_refused_at_its_place(name: str) -> None:
    text, reason, line, column = JSON_REFUSED[name]
    error = refusal(text, engine._load_json)
    assert reason in error.reason
    assert (error.line, error.column) == (line, column)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet='{}[],:"\\u0dN1eEnaI- \n', max_size=15) | st.text() | st.binary(max_size=8))
def test_any_text_gives_json_values_or_a_parse_error(text: str | bytes) -> None:
    try:
        value = engine._load_json(text)
    except ParseError:
        return
    assert same(json.loads(text.replace(b"\r", b"\n") if isinstance(text, bytes) else text), value)


# ---- Writing ---------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_a_written_document_reads_back_as_the_same_value(value: Any) -> None:
    check(engine._dump_yaml(value), value)


TRAPS = [
    "", "null", "~", "yes", "No", "on", "y", "0777", "1_000", "12:30", "1e3", ".5", "0x1F", "2001-01-01", "<<", "=",
    "-", "- a",
    "a: b", "a #b", "#a", "&a", "*a", "!a", "|", ">", "%a", "@a", "`a", "{{x}}", "[a]", "a:", " a", "a ", "\ta",
    "a\nb", "a\n",
    "\na", "\n", "  a\nb", "a\n\n\n", "a\n b\n", " \n", "\x7f", "\u2028", "\ufeff", "é", "😀", "it's",
    'say "x"', "a\tb", "---",
]  # fmt: skip


@pytest.mark.parametrize("text", TRAPS, ids=ascii)
def test_a_text_that_looks_like_something_else_stays_a_text(text: str) -> None:
    value = {"key": text, "list": [text, {"nested": text}], text: 1}
    check(engine._dump_yaml(value), value)
    check(engine._dump_yaml(text), text)


def test_documents_are_written_in_block_style_with_literal_texts() -> None:
    value = {"name": "x", "steps": [{"id": "a", "prompt": "one\ntwo: #\n", "list": [1, 2.5, None, True]}, []], "e": {}}
    assert engine._dump_yaml(value) == (
        "name: x\nsteps:\n  - id: a\n    prompt: |\n      one\n      two: #\n    list:\n"
        "      - 1\n      - 2.5\n      - null\n      - true\n  - []\ne: {}\n"
    )


def test_a_key_longer_than_yaml_allows_is_written_as_an_explicit_key() -> None:
    check(engine._dump_yaml({"k" * 3000: {"a": 1}}), {"k" * 3000: {"a": 1}})


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize("value", [object(), b"x", {(): 1}, {(1, 2): 3}, "\ud800", 10**5000, CIRCLE], ids=range(7))
def test_what_yaml_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(OrchestratorError):
        engine._dump_yaml({"a": value} if not isinstance(value, dict) else value)


def test_json_is_written_without_numbers_that_json_lacks() -> None:
    assert engine._to_json({"b": [math.nan, math.inf, 1.5], "a": "é"}) == '{"b":[null,null,1.5],"a":"é"}'
    value = {"b": 1, "a": (-math.inf,)}
    assert engine._to_json(value, indent=1, sort_keys=True) == '{\n "a": [\n  null\n ],\n "b": 1\n}'


@pytest.mark.parametrize(
    ("text", "value"), [('"a\n\tb"', "a b"), ('{"a": "x\n\ty"}', {"a": "x y"}), ('"a\\\n\tb\\\tc\n\n\td"', "ab\tc\nd")]
)
def test_a_tab_that_only_indents_a_quoted_line_is_not_text(text: str, value: Any) -> None:
    assert load_yaml(text) == value
