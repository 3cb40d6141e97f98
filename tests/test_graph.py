"""Room 7, Graph: order, levels and who waits for whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@given(st.integers(1, 30).flatmap(lambda size: st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)), max_size=60).map(lambda edges: (size, edges))))  # fmt: skip
def test_every_step_comes_after_its_dependencies(graph: tuple[int, list[tuple[int, int]]]) -> None:
    size, edges = graph
    depends: dict[int, set[int]] = {node: set() for node in range(size)}
    for left, right in edges:
        if left != right:
            depends[max(left, right)].add(min(left, right))
    dag = WorkflowDAG(Workflow("t", [log(f"s{node}", *(f"s{other}" for other in depends[node])) for node in range(size)]))
    order = dag.execution_order()
    assert sorted(order) == sorted(f"s{node}" for node in range(size))
    place = {step_id: index for index, step_id in enumerate(order)}
    assert all(place[f"s{other}"] < place[f"s{node}"] for node in range(size) for other in depends[node])
