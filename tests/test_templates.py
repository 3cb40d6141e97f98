"""Templates: Handlebars without HTML escaping, in two spellings, strict by default, linear, never rendered twice."""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import time
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_orchestrator import Template, TemplateError


def render(source, context=None, **options):
    options.setdefault("strict", False)
    return Template(source, **options).render(context or {})


PEOPLE = {"people": [{"name": "Ann", "age": 31}, {"name": "Bob", "age": 0}], "title": "List"}

CASES = {
    # values
    "a path": ("{{a.b}}", {"a": {"b": "x"}}, "x"),
    "an index of a list": ("{{a.1}}/{{a.[0]}}/{{a.length}}", {"a": ["x", "y"]}, "y/x/2"),
    "an odd key in brackets": ("{{a.[odd key]}} {{[x.y]}}", {"a": {"odd key": 1}, "x.y": 2}, "1 2"),
    "an escaped bracket in a key": (r"{{[a\]b]}}", {"a]b": 1}, "1"),
    "slashes separate steps too": ("{{a/b}}", {"a": {"b": 1}}, "1"),
    "a number as a key": ("{{a.1}}", {"a": {1: "int"}}, "int"),
    "names of other alphabets": ("{{größe}} {{名前}}", {"größe": 1, "名前": 2}, "1 2"),
    "null is nothing": ("[{{a}}]", {"a": None}, "[]"),
    "true and false as such": ("{{a}} {{b}}", {"a": True, "b": False}, "true false"),
    "numbers as JSON": ("{{a}} {{b}} {{c}}", {"a": 1, "b": 0.5, "c": 10**20}, "1 0.5 100000000000000000000"),
    "lists and maps as compact JSON": ("{{a}} {{b}}", {"a": [1, "é"], "b": {"k": None}}, '[1,"é"] {"k":null}'),
    "tuples are lists": ("{{a}} {{#each a}}{{this}}{{/each}}", {"a": (1, 2)}, "[1,2] 12"),
    "maps of any type": ("{{m.k}} {{m}}", {"m": MappingProxyType({"k": 1})}, '1 {"k":1}'),
    "no HTML escaping": ("{{a}}{{{a}}}{{&a}}", {"a": "<&>"}, "<&><&><&>"),
    "a value with tags is text": ("{{a}}{{{b}}}", {"a": "{{b}}", "b": "<<a>>"}, "{{b}}<<a>>"),
    "literals": ("{{json 'a\\'b'}} {{json 1.5}} {{json true}} {{json null}} {{json -3}}", {},
        '"a\'b" 1.5 true null -3'),
    # blocks
    "if": ("{{#if a}}yes{{/if}}", {"a": "x"}, "yes"),
    "if else": ("{{#if a}}yes{{else}}no{{/if}}", {"a": []}, "no"),
    "if else if": ("{{#if a}}1{{else if b}}2{{else if c}}3{{else}}4{{/if}}", {"c": 1}, "3"),
    "an empty map is true": ("{{#if a}}yes{{else}}no{{/if}}", {"a": {}}, "yes"),
    "zero is false": ("{{#if a}}yes{{else}}no{{/if}}{{#if a includeZero=true}}yes{{/if}}", {"a": 0}, "noyes"),
    "unless": ("{{#unless a}}no{{else}}yes{{/unless}}", {"a": 0}, "no"),
    "each over a list": ("{{#each people}}{{name}},{{/each}}", PEOPLE, "Ann,Bob,"),
    "each over texts": ("{{#each a}}{{this}}{{.}}{{/each}}", {"a": ["x", "y"]}, "xxyy"),
    "each over a map": ("{{#each a}}{{@key}}={{this}};{{/each}}", {"a": {"k": 1, "l": 2}}, "k=1;l=2;"),
    "each else": ("{{#each a}}x{{else}}none{{/each}}", {"a": []}, "none"),
    "index, first and last": ("{{#each a}}{{@index}}{{@first}}{{@last}} {{/each}}", {"a": [7, 8]},
        "0truefalse 1falsetrue "),
    "the index of the loop around": (
        "{{#each a}}{{#each this}}{{@../index}}{{@index}} {{/each}}{{/each}}", {"a": [[1], [2, 3]]}, "00 10 11 "),
    "block parameters": ("{{#each a as |v k|}}{{k}}{{v.x}}{{/each}}", {"a": [{"x": "p"}, {"x": "q"}]}, "0p1q"),
    "block parameters of an outer loop": (
        "{{#each a as |v|}}{{#each v.l as |w i|}}{{v.n}}{{w}}{{i}} {{/each}}{{/each}}",
        {"a": [{"n": "p", "l": [1, 2]}, {"n": "q", "l": [3]}]}, "p10 p21 q30 "),
    "block parameters shadow": ("{{#with a as |x|}}{{#with b as |x|}}{{x}}{{/with}}{{x.y}}{{/with}}",
                                {"a": {"b": 1, "y": 2}}, "12"),
    "the context around": ("{{#each people}}{{../title}}:{{name}} {{/each}}", PEOPLE, "List:Ann List:Bob "),
    "two contexts up": ("{{#with a}}{{#with b}}{{../../t}}{{../c}}{{/with}}{{/with}}",
        {"t": 1, "a": {"c": 2, "b": {}}}, "12"),
    "if does not change the context": ("{{#with a}}{{#if b}}{{../t}}{{/if}}{{/with}}", {"t": 1, "a": {"b": 1}}, "1"),
    "the root": ("{{#each people}}{{@root.title}}{{/each}}", PEOPLE, "ListList"),
    "this names the key": ("{{#with a}}{{this.if}}{{./b}}{{/with}}", {"a": {"if": 1, "b": 2}}, "12"),
    "with else": ("{{#with a}}x{{else}}none{{/with}}", {}, "none"),
    "a section over a list": ("{{#people}}{{name}}{{/people}}", PEOPLE, "AnnBob"),
    "a section over a map": ("{{#a}}{{b}}{{/a}}", {"a": {"b": 1}}, "1"),
    "a section over true": ("{{#a}}{{b}}{{/a}}", {"a": True, "b": 1}, "1"),
    "an inverse section": ("{{^a}}no{{/a}}{{^b}}no{{/b}}", {"a": []}, "nono"),
    "an inverse mark is else": ("{{#if a}}x{{^}}y{{/if}}", {}, "y"),
    "a loop in a loop in a loop": (
        "{{#each a}}{{#each .}}{{#each .}}{{@../../index}}{{@../index}}{{@index}}{{this}} {{/each}}{{/each}}{{/each}}",
        {"a": [[["x"]], [["y", "z"]]]}, "000x 100y 101z "),
    # calls
    "a sub-expression": ("{{#if (eq a 1)}}yes{{/if}}", {"a": "1"}, "yes"),
    "nested sub-expressions": ("{{upper (join (lookup m 'l') '-')}}", {"m": {"l": ["a", "b"]}}, "A-B"),
    "lookup": ("{{lookup a 1}}{{lookup m k}}", {"a": [1, 2], "m": {"x": 3}, "k": "x"}, "23"),
    "json with an indent": ("{{json a 2}}", {"a": [1]}, "[\n  1\n]"),
    "default": ("{{default a 'x'}}{{default b c 'z'}}{{default d 'w'}}", {"b": "", "c": 5, "d": 0}, "x50"),
    "length": ("{{length a}}{{length m}}{{length 'abc'}}{{length none}}", {"a": [1, 2], "m": {"k": 1}}, "2130"),
    "join": ("{{join a}}|{{join a '\\n'}}", {"a": [1, None, "x"]}, "1, , x|1\n\nx"),
    "case and trim": ("{{upper 'é'}}{{lower 'ÀB'}}{{trim '  x '}}", {}, "Éàbx"),
    "truncate": ("{{truncate a 5}}|{{truncate a 20}}|{{truncate a 4 '…'}}", {"a": "hello world"},
        "he...|hello world|hel…"),
    "comparisons": ("{{eq 1 '1'}}{{ne a b}}{{lt 1 2}}{{le 2 2}}{{gt 1 2}}{{ge 1 2}}", {"a": 1, "b": 2},
                    "truetruetruetruefalsefalse"),
    "and, or, not": ("{{and 1 'x'}}{{or 0 'y'}}{{not 0}}{{and 0 1}}", {}, "xytrue0"),
    # partials
    "a partial": ("{{> p}}", {"a": 1}, "(1)"),
    "a partial with a context": ("{{> p m}}", {"m": {"a": 2}}, "(2)"),
    "a partial with named arguments": ("{{> p a=(upper 'x')}}", {"a": 1}, "(X)"),
    "a partial by name in a text": ("{{> 'odd name'}}", {}, "odd"),
    "a partial chosen by a value": ("{{> (lookup . 'which')}}", {"which": "p", "a": 3}, "(3)"),
    "an indented partial": ("x\n  {{> lines}}\ny", {}, "x\n  1\n  2\ny"),
    "an inline partial": ('{{#*inline "i"}}[{{a}}]{{/inline}}{{> i a=1}}{{> i a=2}}', {}, "[1][2]"),
    "a partial block": ("{{#> layout}}body{{/layout}}", {}, "(body)"),
    "a partial block without its partial": ("{{#> nothere}}instead{{/nothere}}", {}, "instead"),
    # comments, white space, escapes
    "comments": ("a{{! x }}b{{!-- }} --}}c", {}, "abc"),
    "tilde": ("a \n {{~a~}} \n b{{#if a~}} x {{~/if}}", {"a": 1}, "a1bx"),
    "stand-alone lines": ("a\n  {{#if t}}\n  b\n{{else}}\nc\n  {{/if}}\nd", {"t": 1}, "a\n  b\nd"),
    "stand-alone lines with CR LF": ("a\r\n{{#if t}}\r\nb\r\n{{/if}}\r\nc", {"t": 1}, "a\r\nb\r\nc"),
    "a stand-alone comment": ("a\n{{! gone }}\nb", {}, "a\nb"),
    "values never stand alone": ("a\n{{n}}\nb", {"n": ""}, "a\n\nb"),
    "an escaped tag": ("\\{{a}} {{a}}", {"a": 1}, "{{a}} 1"),
    "an escaped backslash": ("\\\\{{a}}", {"a": 1}, "\\1"),
    "a raw block": ("{{{{raw}}}}{{a}} <<b>> {{#if{{{{/raw}}}}", {"a": 1}, "{{a}} <<b>> {{#if"),
}  # fmt: skip
PARTIALS = {"p": "({{a}})", "odd name": "odd", "lines": "1\n2\n", "layout": "({{> @partial-block}})"}


@pytest.mark.parametrize(("source", "context", "expected"), CASES.values(), ids=CASES)
def test_it_renders_as_handlebars_does(source, context, expected):
    assert render(source, context, partials=PARTIALS) == expected


ANGLED = {name: case for name, case in CASES.items() if not {"{{{", "\\{{"} & {case[0][i : i + 3] for i in range(200)}}


@pytest.mark.parametrize(("source", "context", "expected"), ANGLED.values(), ids=ANGLED)
def test_angle_brackets_are_another_spelling(source, context, expected):
    if "{{json '" not in source and "{{!--" not in source:
        angled = source.replace("{{", "<<").replace("}}", ">>")
        partials = {key: text.replace("{{", "<<").replace("}}", ">>") for key, text in PARTIALS.items()}
        assert render(angled, context, partials=partials) == expected


@pytest.mark.parametrize(
    "text",
    ["a << b", "cout << x << endl;", "cat <<EOF\nhi\nEOF\n", "<<", "<<<", "<< not a tag", "x <<a\n>>", "1 << 2 >> 3",
        '<<"a">>',
     "<<5>>", "<< a ! >>", "<<>>", "<<#>>", "<<a <<", "a <<= 1; b >>= 2", "{ }", "{a}", "}} >>", "<!-- x -->",
     "vector<vector<int>>",
     "<<! never closed", "<<a/../b>>"],
)  # fmt: skip
def test_what_is_no_tag_is_plain_text(text):
    assert render(text, {"a": "WRONG"}) == text


def test_a_tag_may_follow_a_shift():
    assert render("1 << 2, <<a>> << {{a}} >>", {"a": 7}) == "1 << 2, 7 << 7 >>"


@pytest.mark.parametrize(
    ("source", "words"),
    {
        "never closed": ("x\n{{a", ["line 2, column 4", "never closed"]),
        "an empty tag": ("{{}}", ["empty tag"]),
        "a block never closed": ("{{#if a}}x", ["'#if' is never closed", "line 1, column 1"]),
        "a wrong end": ("{{#if a}}\n{{/each}}", ["'/each' does not close '#if' of line 1", "line 2"]),
        "an end alone": ("a{{/if}}", ["outside of a block", "column 2"]),
        "an else alone": ("{{else}}", ["outside of a block"]),
        "two elses": ("{{#if a}}{{else}}{{else}}{{/if}}", ["second else"]),
        "no argument": ("{{#if}}{{/if}}", ["takes one argument"]),
        "an unknown helper": ("{{uper a}}", ["unknown helper 'uper'", "did you mean 'upper'"]),
        "a path that climbs late": ("{{a/../b}}", ["unexpected 'a/../b'"]),
        "a path with this in it": ("{{a.this}}", ["invalid path"]),
        "a brace too many": ("{{a}}}", ["put a space"]),
        "a name with a sign": ("{{a!b}}", ["unexpected"]),
        "a dot in front": ("{{.a}}", ["unexpected"]),
        "a decorator": ('{{#*x "a"}}{{/x}}', ["inline"]),
        "a raw block never closed": ("{{{{raw}}}} x", ["unexpected"]),
        "five braces": ("{{{{{a}}}}}", ["unexpected"]),
        "a comment never closed": ("{{!-- a }}", ["never closed"]),
        "a text never closed": ("{{f 'a}}", ["unexpected"]),
        "an argument after a named one": ("{{json a=1 b}}", ["unexpected 'b'"]),
        "blocks too deep": ("{{#if a}}" * 10_000, ["nested deeper than 100"]),
        "calls too deep": ("{{" + "(not " * 10_000, ["nested deeper than 100"]),
        "a partial that is not there": ("{{> lins}}", ["unknown partial 'lins'", "did you mean 'lines'"]),
        "not a text": (5, ["a template is text, not a number"]),
        "a helper that fails": ("{{join 5}}", ["helper 'join'", "needs a list, not a number"]),
        "too few arguments": ("{{eq 1}}", ["helper 'eq'", "takes 2 arguments, not 1"]),
        "too many arguments": ("{{json a 2 3}}", ["helper 'json'", "takes 1 to 2 arguments, not 3"]),
        "none at all": ("{{#if (and)}}x{{/if}}", ["helper 'and'", "takes at least 1 argument, not 0"]),
        "misspelt argument": ("{{json a indnt=2}}", ["helper 'json'", "'indnt'", "'indent'"]),
        "a number that JSON does not have": ("{{inf}}", ["cannot write a number"]),
        "a Python object": ("{{object}}", ["cannot write a Python object"]),
        "each over a text": ("{{#each text}}{{/each}}", ["needs a list or a map, not text"]),
    }.values(),
)
def test_what_is_wrong_is_a_template_error_with_its_place(source, words):
    context = {"inf": float("inf"), "object": object(), "text": "x"}
    with pytest.raises(TemplateError) as caught:
        Template(source, partials=PARTIALS).render(context)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.line >= 1
    assert caught.value.column >= 1


@pytest.mark.parametrize(
    ("source", "words"),
    {
        "a key": ("ab{{a.nme}}", ["missing value 'a.nme'", "'a' has name", "did you mean 'name'", "line 1, column 5"]),
        "a root key": ("\n {{x}}", ["missing value 'x'", "the scope has a, l", "line 2, column 4"]),
        "below a text": ("{{a.name.first}}", ["'a.name' is text"]),
        "an index": ("{{l.5}}", ["'l' is a list of 2"]),
        "in an argument": ("{{upper a.x}}", ["missing value 'a.x'"]),
        "a looked up key": ("{{lookup a 'x'}}", ["missing value 'x'", "has name"]),
        "in a loop": ("{{#each l}}{{a}}{{/each}}", ["../a"]),
        "no loop here": ("{{@index}}", ["no such scope or loop"]),
        "a section": ("{{#x}}{{/x}}", ["missing value 'x'"]),
        "each": ("{{#each x}}{{/each}}", ["missing value 'x'"]),
        "above the root": ("{{../x}}", ["missing value '../x'"]),
        "in a partial": ("{{> p m}}", ["missing value 'a'", "in partial 'p'"]),
    }.values(),
)
def test_strict_names_the_missing_path_what_is_there_and_the_position(source, words):
    template = Template(source, partials=PARTIALS)
    with pytest.raises(TemplateError) as caught:
        template.render({"a": {"name": "Ann"}, "l": [1, 2], "m": {}})
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "source",
    ["{{#if x.y}}a{{/if}}", "{{#unless x}}{{/unless}}", "{{default x ''}}", "{{#if (not x)}}{{/if}}", "{{null}}"]
)
def test_strict_lets_the_absence_of_a_value_be_asked_for(source):
    Template(source).render({"null": None})


def test_not_strict_renders_what_is_missing_as_nothing():
    assert render("[{{a.b.c}}{{#each x}}y{{/each}}{{lookup a 'b'}}{{@index}}{{../z}}]") == "[]"


class Secret:
    password = "hunter2"

    def __getitem__(self, key):
        return "leaked"


@pytest.mark.parametrize("path",
    ["o.password", "o.__class__", "t.upper", "l.append", "m.items", "m.__class__.__mro__", "o.k", "t.0"])
def test_a_path_never_reaches_python_attributes(path):
    context = {"o": Secret(), "t": "text", "l": [1], "m": {"k": 1}}
    assert Template("{{" + path + "}}", strict=False).evaluate(context) is None


def test_reading_does_not_change_what_is_read():
    counted = collections.defaultdict(list)
    render("{{m.x}}{{#each m.y}}{{/each}}", {"m": counted})
    assert counted == {}


def test_one_expression_gives_the_value_itself():
    values = [[1], {"k": 1}, None, True, 0, "x"]
    assert [Template("{{a}}").evaluate({"a": value}) for value in values] == values
    assert Template("<<a>>").evaluate({"a": values}) is values
    assert Template("{{ length a }}").evaluate({"a": values}) == 6
    assert Template(" {{a}}").evaluate({"a": values[0]}) == " [1]"
    assert [Template(source).is_expression for source in ("{{a}}", "{{a}} ", "x", "{{! }}",
        "{{#a}}{{/a}}")] == [True] + [False] * 4


def test_a_helper_of_the_caller_comes_first_and_gets_named_arguments():
    helpers = {"shout": lambda text, mark="!": text.upper() + mark, "now": lambda: "noon", "upper": lambda text: "mine"}
    assert render("{{shout 'a'}}{{shout 'a' mark='?'}}{{now}}{{upper 'x'}}", helpers=helpers) == "A!A?noonmine"
    assert render("{{#many 2}}x{{this}}{{/many}}", helpers={"many": lambda count: [1] * count}) == "x1x1"


def test_partials_recurse_over_data_and_endless_recursion_is_an_error():
    partials = {"tree": "({{name}}{{#each children}}{{> tree}}{{/each}})", "loop": "{{> loop}}"}
    tree = {"name": "a", "children": [{"name": "b", "children": []}, {"name": "c", "children": []}]}
    assert render("{{> tree}}", tree, partials=partials) == "(a(b)(c))"
    with pytest.raises(TemplateError, match="recursion"):
        render("{{> loop}}", partials=partials)


def test_references_are_the_paths_read_from_the_root():
    source = "{{a.b}}{{#if c}}{{c.d}}{{/if}}{{#each e}}{{f}}{{@root.g}}{{../h}}{{/each}}{{default i 1}}{{> p}}"
    source += "{{upper j}}"
    found = {".".join(steps): required for steps, required, _ in Template(source, partials={"p": "{{k}}"}).references}
    assert found == {
        "a.b": True, "c": False, "c.d": False, "e": True, "g": True, "h": True, "i": False, "k": True, "j": True
    }  # fmt: skip
    (reference,) = Template("ab {{x}}").references
    assert reference == (("x",), True, 5)


@pytest.mark.parametrize("source", ["{{#f}}{{steps.a.x}}{{/f}}", "{{#f}}{{#if g}}{{outputs.a.x}}{{/if}}{{/f}}",
    "{{#f}}{{> p}}{{/f}}", "{{#*inline 'i'}}{{steps.a.x}}{{/inline}}{{> i}}", "{{^f}}{{else}}{{steps.a.x}}{{/f}}"])
def test_a_step_that_is_read_inside_a_section_is_a_reference(source):
    references = Template(source, partials={"p": "{{steps.a.x}}"}).references
    assert [(steps[1:], required) for steps, required, _ in references if steps[0] in ("steps", "outputs")] == [
        (("a", "x"), False)]


@pytest.mark.parametrize("source", ["{{#f as |steps|}}{{steps.a.x}}{{/f}}", "{{#with f}}{{steps.a.x}}{{/with}}",
    "{{#f}}{{steps}}{{inputs.x}}{{/f}}", "{{#each f}}{{#with .}}{{steps.a.x}}{{/with}}{{/each}}"])
def test_a_name_that_a_block_certainly_hides_is_no_reference(source):
    assert [steps for steps, *_ in Template(source).references] == [("f",)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(JSON, st.text(max_size=10))
def test_a_value_renders_as_its_text_whatever_it_is(value, around):
    around = re.sub(r"[{}<\\\\]", "", around)
    expected = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False,
        separators=(",", ":"))
    assert Template(around + "{{v}}" + around).render({"v": value}) == around + expected + around
    assert Template("{{v}}").evaluate({"v": value}) is value


@settings(max_examples=60, deadline=None)
@given(st.lists(JSON, max_size=4))
def test_a_loop_is_the_join_of_its_bodies(items):
    each = render("{{#each v}}[{{this}}]{{/each}}", {"v": items})
    assert each == "".join(render("[{{v}}]", {"v": item}) for item in items)
    assert each == render("{{#each v}}[{{this}}]{{#if @root.z}}{{/if}}{{/each}}", {"v": items})
    assert each == render("{{#each v as |x|}}[{{x}}]{{/each}}", {"v": items})
    assert json.loads(render("{{json v}}", {"v": items})) == items


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["{{", "}}", "<<", ">>", "#if ", "/if", "a", ".", "../", " ", "\n", "{", "}", "[", "]",
    "'", "(", ")",
                                 "|", "as", "else", "^", "~", "!", "--", "@", "=", ">", "*", "&", "\\", "0", "é"]),
                                 max_size=14))
def test_any_text_renders_or_is_a_template_error(pieces):
    try:
        assert isinstance(render("".join(pieces), {"a": {"a": [1]}}), str)
    except TemplateError as error:
        assert str(error)


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_text_without_openers_is_itself(text):
    if "{{" not in text and "<<" not in text:
        assert Template(text).render({}) == text


@pytest.mark.parametrize(
    "source",
    {
        "10 MB of text": "x" * 10_000_000,
        "10 MB of lines": "\n" * 10_000_000,
        "10 MB of shifts": "<<" * 5_000_000,
        "open angles": "<< a " * 1_000_000,
        "quotes in angles": '<<"a\n' * 500_000,
        "20,000 tags": "{{a}} " * 20_000,
        "10,000 blocks": "{{#if a}}x{{/if}}\n" * 10_000,
        "escapes": "\\{{" * 200_000,
        "braces": "{" * 1_000_000,
        "a long path": "{{" + "a." * 300_000 + "a}}",
        "a high path": "{{" + "../" * 300_000 + "a}}",
        "many arguments": "{{f " + "a " * 1_000_000 + "}}",
        "block parameters that never end": "{{#each a as |" + "a" * 5000 + "!",
        "a long text": "{{json '" + "\\'" * 1_000_000 + "'}}",
        "white space": "{{#if a}}" + " " * 5_000_000 + "{{/if}}",
        "a long chain": "{{#if a}}" + "{{else if b}}x" * 10_000 + "{{/if}}",
    }.values(),
)
def test_huge_templates_end_in_seconds(source):
    start = time.process_time()
    try:
        render(source, {"a": 1})
    except TemplateError:
        pass
    assert time.process_time() - start < 20


def test_values_nested_too_deeply_are_an_error():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(TemplateError, match="nested"):
        Template("{{a}}").render({"a": deep})


@pytest.mark.slow
def test_a_big_template_compiles_and_renders_under_a_small_stack():
    program = (
        "import llm_orchestrator as m, threading\nthreading.stack_size(512 * 1024)\n"
        "def run():\n    source = '{{#if a}}' * 99 + 'x' + '{{/if}}' * 99\n"
        "    print(m.Template(source).render({'a': 1}))\nt = threading.Thread(target=run); t.start(); t.join()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "x", done.stderr


def test_references_through_partials_that_call_each_other_are_found_once():
    partials = {f"p{level}": f"{{{{> p{level + 1}}}}}" * 2 + f"{{{{x{level}}}}}" for level in range(40)}
    template = Template("{{> p0}}{{> q x1=1}}", partials={**partials, "p40": "{{> p0}}", "q": "{{x1}}{{y}}"})
    assert {steps for steps, *_ in template.references} == {(f"x{level}",) for level in range(40)} | {("y",)}
    assert {position for *_, position in template.references} == {0, 8}


@pytest.mark.parametrize("template", ['{{""}}', "{{#''}}{{this}}{{/''}}", "{{#if no}}{{else ''}}{{this}}{{/if}}"])
def test_the_empty_text_is_a_key_like_any_other(template: str) -> None:
    assert Template(template).render({"": "found", "no": False}) == "found"
