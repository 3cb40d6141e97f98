"""The README: every block of code in it is run, in order, in one folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")
BLOCK = re.compile(r"^(?:<!-- (?P<note>[^>]*) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
BLOCKS = [(match["language"], match["note"] or "", match["code"]) for match in BLOCK.finditer(README)]


def blocks(language: str) -> list[tuple[str, str]]:
    return [(note, code) for found, note, code in BLOCKS if found == language]


def ids(pairs: list[tuple[str, str]]) -> list[str]:
    return [f"{index}-{code.split()[0]}" for index, (_, code) in enumerate(pairs)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout's folder as the reader has it, with the README's own files in it."""
    path = tmp_path_factory.mktemp("readme")
    shutil.copy(ROOT / "llm_orchestrator.py", path)
    shutil.copytree(ROOT / "examples", path / "examples")
    for note, code in blocks("yaml") + blocks("python"):
        name = note.partition("file: ")[2].strip()
        if name:
            (path / name).write_text(code, "utf-8")
    return path


def environment() -> dict[str, str]:
    return {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}", "HOME": os.environ.get("HOME", "/tmp")}


def test_every_block_has_a_language_that_is_tested() -> None:
    assert {language for language, _, _ in BLOCKS} <= {"sh", "python", "yaml", "json", "text"}
    assert README.count("```") == 2 * len(BLOCKS)


@pytest.mark.parametrize(("note", "code"), blocks("sh"), ids=ids(blocks("sh")))
def test_shell_blocks_do_what_they_say(folder: Path, note: str, code: str) -> None:
    if "pytest" in code:
        pytest.skip("this is the command that runs these tests")
    expected = int(note.partition("exit: ")[2] or 0)
    done = subprocess.run(
        ["bash", "-euc", code], cwd=folder, env=environment(), capture_output=True, text=True, timeout=120, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == expected, done.stdout + done.stderr


@pytest.mark.parametrize(("note", "code"), blocks("python"), ids=ids(blocks("python")))
def test_python_blocks_run(folder: Path, note: str, code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**environment(), "PYTHONPATH": str(folder)}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("note", "code"), blocks("yaml"), ids=ids(blocks("yaml")))
def test_yaml_blocks_are_workflows_that_validate(folder: Path, note: str, code: str) -> None:
    """A whole workflow, or a list of steps, or some keys of a workflow."""
    from llm_orchestrator import Workflow, load_yaml

    document = load_yaml(code)
    if isinstance(document, list):
        document = {"name": "t", "steps": document}
    document.setdefault("name", "t")
    document.setdefault("steps", [{"id": "only", "type": "action", "action": "log", "message": "x"}])
    workflow = Workflow.from_dict(document)
    workflow.folder = str(folder)
    workflow.validate()


@pytest.mark.parametrize(("note", "code"), blocks("json"), ids=ids(blocks("json")))
def test_json_blocks_are_json(note: str, code: str) -> None:
    json.loads(code)


def test_the_benchmark_of_the_speed_section_runs() -> None:
    command = re.search(r"^`python (tests/benchmarks/bench\.py)`", README, re.M)
    assert command
    done = subprocess.run(
        [sys.executable, command[1], "templates", "memory"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    subjects = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert {"render, 5 references", "memory kept a step, 10,000 steps"} <= set(subjects)
