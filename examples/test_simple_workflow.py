"""How to test a workflow with pytest, offline and deterministically: replay what its model calls answered once.

    pip install pytest && python -m pytest examples/test_simple_workflow.py

The cassette was recorded with

    python -m llm_orchestrator run examples/simple.yaml --record examples/cassettes/simple.jsonl

(here with --offline, so that nobody needs a key; recorded with a key it holds the model's own answers). A change of the
workflow that asks the model something else is an error that shows the nearest recorded request: record it anew then.
"""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from llm_orchestrator import Cassette, Workflow, WorkflowExecutor  # noqa: E402


@pytest.fixture
def replayed():
    cassette = Cassette(str(HERE / "cassettes" / "simple.jsonl"), replay=True)
    yield lambda **inputs: WorkflowExecutor(Workflow.from_file(HERE / "simple.yaml"), inputs, cassette=cassette).run()
    cassette.close()


def test_the_greeting_is_analysed(replayed):
    result = replayed(name="World")
    result.raise_for_status()
    assert "World" in result.outputs["greeting"]
    assert result.outputs["greeting"] in result.outputs["analysis"]


def test_another_name_was_never_recorded(replayed):
    result = replayed(name="Nobody")
    assert result.status == "failed"
    assert "Nobody" in result["greet"].error["message"]
