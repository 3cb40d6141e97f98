"""Rooms 7 and 16, Graph and pictures: order, levels, who waits for whom, and how that is drawn."""

from __future__ import annotations

import json
import re

import pytest
from conftest import Program
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_orchestrator
from llm_orchestrator import DagError, Step, ValidationError, Workflow, WorkflowDAG


def log(step_id: str, *depends_on: str, **keys: object) -> Step:
    return Step(id=step_id, type="action", action="log", depends_on=list(depends_on), **keys)


def test_levels_hold_what_may_run_together() -> None:
    dag = WorkflowDAG(Workflow("t", [log("a"), log("b", "a"), log("c", "a"), log("d", "b", "c")]))
    assert dag.levels() == [["a"], ["b", "c"], ["d"]]
    assert dag.execution_order() == ["a", "b", "c", "d"]
    assert dag.dependents("a") == ["b", "c"]


def test_references_are_dependencies() -> None:
    steps = [log("a"), log("b", message="{{steps.a}}"), log("c", condition="outputs.b.output == 'x'")]
    dag = WorkflowDAG(Workflow("t", steps))
    assert dag.dependencies("b") == ["a"]
    assert dag.dependencies("c") == ["b"]


def test_a_cycle_raises_a_dag_error_with_the_cycle() -> None:
    with pytest.raises(DagError) as caught:
        WorkflowDAG(Workflow("t", [log("a", "b"), log("b", "a")]))
    assert caught.value.cycle == ["a", "b", "a"]


def test_an_unknown_dependency_raises_a_validation_error() -> None:
    with pytest.raises(ValidationError, match="no step 'z'"):
        WorkflowDAG(Workflow("t", [log("a", "z")]))


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(20)), st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=50))
def test_every_step_comes_after_its_dependencies(ranks: list[int], edges: list[tuple[int, int]]) -> None:
    size = len(ranks)
    depends: dict[int, set[int]] = {node: set() for node in range(size)}
    for left, right in edges:
        if left != right:
            depends[max(left, right, key=ranks.__getitem__)].add(min(left, right, key=ranks.__getitem__))
    steps = [log(f"s{node}", *(f"s{other}" for other in depends[node])) for node in range(size)]
    dag = WorkflowDAG(Workflow("t", steps))
    order = dag.execution_order()
    assert sorted(order) == sorted(f"s{node}" for node in range(size))
    place = {step_id: index for index, step_id in enumerate(order)}
    assert all(place[f"s{other}"] < place[f"s{node}"] for node in range(size) for other in depends[node])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=14))
def test_a_cycle_is_found_if_and_only_if_there_is_one_and_it_is_one(edges: list[tuple[int, int]]) -> None:
    depends = {str(node): sorted({str(right) for left, right in edges if left == node != right}) for node in range(8)}
    reached = {node: set(depends[node]) for node in depends}
    for _ in depends:
        for node in depends:
            reached[node] |= {far for near in reached[node] for far in reached[near]}
    try:
        WorkflowDAG(Workflow("t", [log(node, *depends[node]) for node in depends]))
        assert not any(node in reached[node] for node in depends)
    except DagError as error:
        assert error.cycle[0] == error.cycle[-1]
        assert len(set(error.cycle)) == len(error.cycle) - 1 >= 2
        assert all(later in depends[earlier] for earlier, later in zip(error.cycle, error.cycle[1:]))


# ---- Pictures --------------------------------------------------------------------------------------------------------

ODD = r"""
name: "odd \"name\" <b> \\N {x} #1; \u00fc\n2"
steps:
  - {id: end, type: action, action: log}
  - {id: graph, type: action, action: log, depends_on: end,
     condition: "inputs.a == \"<b>\" || 'x]}|`;#%%\ny' in inputs.b"}
  - {id: "-", type: transform, function: merge, depends_on: graph}
  - id: subgraph
    type: branch
    condition: inputs.k
    depends_on: [end]
    branches:
      "a \"quoted\" <b>\n}]) end":
        - {id: end, type: action, action: log}
        - {id: x--y, type: action, action: log, depends_on: end}
      "\\": []
      true: [{id: end, type: loop, max_iterations: 1, until: "true", steps: [{id: o, type: action, action: log}]}]
  - {id: style, type: action, action: log, depends_on: subgraph, for_each: [1]}
"""


def pictures(text: str) -> dict[str, str]:
    workflow = Workflow.from_yaml(text)
    return {name: draw(workflow) for name, draw in llm_orchestrator._PICTURES.items()}


def mermaid(text: str) -> tuple[dict[str, str], list[str], list[tuple[str, str, str]]]:
    """The labels by node name, the container paths, and the edges of a flowchart; fails for any line it cannot read."""
    labels: dict[str, str] = {}
    edges, path, paths = [], [], []
    shapes = {"[": "]", "[/": "/]", "([": "])", "{{": "}}", "[[": "]]"}
    lines = text.splitlines()
    assert lines[0] == "flowchart TD"
    for line in map(str.strip, lines[1:]):
        if node := re.fullmatch(r'(subgraph )?(s\w+?)(\[/|\(\[|\{\{|\[\[|\[)"([^"]*)"(.+)', line):
            subgraph, name, left, label, right = node.groups()
            assert right == shapes[left]
            assert name not in labels
            labels[name] = re.sub(r"#(\d+);", lambda code: chr(int(code[1])), label.replace("<br/>", "|"))
            paths.append("/".join([*path, name]))
            path += [name] if subgraph else []
        elif line == "end":
            path.pop()
        else:
            edge = re.fullmatch(r'(s\w+) (?:-->|-\.->\|"([^"]*)"\|) (s\w+)', line)
            assert edge, line
            edges.append((edge[1], edge[3], edge[2] or ""))
    assert not path
    assert all({start, end} <= set(labels) for start, end, _ in edges)
    return labels, paths, edges


def test_mermaid_has_every_step_once_in_its_container_with_its_edges() -> None:
    labels, paths, edges = mermaid(pictures(ODD)["mermaid"])
    assert paths == [
        "s0_end", "s1_graph", "s2__", "s3_subgraph", "s3_subgraph/s3_subgraph_0", "s3_subgraph/s3_subgraph_0/s4_end",
        "s3_subgraph/s3_subgraph_0/s5_x__y", "s3_subgraph/s3_subgraph_1", "s3_subgraph/s3_subgraph_2",
        "s3_subgraph/s3_subgraph_2/s6_end", "s3_subgraph/s3_subgraph_2/s6_end/s7_o", "s8_style",
    ]  # fmt: skip
    assert labels["s3_subgraph_0"] == 'a "quoted" <b> }]) end'
    assert labels["s8_style"] == "style|<i>action for each</i>"
    assert [(start, end) for start, end, _ in edges] == [
        ("s0_end", "s1_graph"), ("s1_graph", "s2__"), ("s0_end", "s3_subgraph"), ("s3_subgraph", "s8_style"),
        ("s4_end", "s5_x__y"),
    ]  # fmt: skip


def test_mermaid_shows_a_condition_on_its_edge_with_everything_escaped() -> None:
    text = pictures(ODD)["mermaid"]
    assert '-.->|"inputs.a == #34;#60;b#62;#34; #124;#124; \'x]#125;#124;#96;#59;#35;#37;#37; y\' in inputs.b"|' in text


def test_dot_is_balanced_and_quotes_whatever_a_document_holds() -> None:
    text = pictures(ODD)["dot"]
    strings = re.findall(r'"(?:[^"\\]|\\.)*"', text)
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "S", text)
    assert json.loads(strings[0]) == 'odd "name" <b> \\N {x} #1; \u00fc\n2'
    assert not re.search(r'["\\<]', bare)
    assert bare.count("{") == bare.count("}") > 3
    line = r"digraph S \{|node \[[a-z=, ]+\];|subgraph S \{ label=S;|\}|S \[label=S(, shape=\w+)?\];"
    line += r"|S -> S( \[style=dashed, label=S\])?;"
    assert all(re.fullmatch(line, part.strip()) for part in bare.splitlines())
    nodes = [json.loads(name) for name in re.findall(r'^ *("(?:[^"\\]|\\.)*") \[', text, re.M)]
    assert len(nodes) == len(set(nodes)) == 9
    assert 'subgraph.a "quoted" <b>\n}]) end.end' in nodes
    assert bare.count("->") == 5


def test_the_text_tree_shows_what_each_step_waits_for() -> None:
    assert pictures(ODD)["text"].splitlines() == [
        'odd "name" <b> \\N {x} #1; ü 2',
        "├── end (action)",
        "├── graph (action if inputs.a == \"<b>\" || 'x]}|`;#%% y' in inputs.b) <- end",
        "├── subgraph (branch) <- end",
        '│   [a "quoted" <b> }]) end]',
        "│   ├── end (action)",
        "│   └── x--y (action) <- end",
        "│   [\\]",
        "│   [true]",
        "│   └── end (loop)",
        "│       └── o (action)",
        "├── - (transform) <- graph",
        "└── style (action for each) <- subgraph",
    ]


@pytest.mark.parametrize("kind", ["mermaid", "dot", "text"])
def test_the_graph_command_prints_the_picture(program: Program, kind: str) -> None:
    program.write("wf.yaml", ODD)
    done = program.run("graph", "wf.yaml", "--format", kind)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == pictures(ODD)[kind]


def test_a_graph_of_ten_thousand_steps_is_drawn_in_linear_time() -> None:
    steps = [log(f"s{index}", *([f"s{index - 1}"] if index else [])) for index in range(10_000)]
    workflow = Workflow("t", steps)
    for draw in llm_orchestrator._PICTURES.values():
        assert draw(workflow).count("\n") >= 10_000
