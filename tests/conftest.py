"""What the tests share: the module from the checkout, folders, and a way to run it as a program."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

KEYS = ("OPENAI_", "ANTHROPIC_", "AZURE_", "GOOGLE_", "GEMINI_", "MISTRAL_", "LLM_ORCHESTRATOR", "HTTP_PROXY", "HTTPS_PROXY")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, proxy or setting of the machine takes part in a test."""
    for name in list(os.environ):
        if name.upper().startswith(KEYS) or name.upper().endswith("_PROXY"):
            monkeypatch.delenv(name)


class Program:
    """`python -m llm_orchestrator` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def environment(self, **extra: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        return {**kept, "PYTHONPATH": str(ROOT), **extra}

    def run(self, *arguments: Any, stdin: bytes = b"", timeout: float = 60, **extra: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "llm_orchestrator", *map(str, arguments)],
            input=stdin, capture_output=True, cwd=self.folder, env=self.environment(**extra), timeout=timeout, check=False,
        )  # fmt: skip
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")
        )


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


def finished(runner: Any, seconds: float = 20) -> Any:
    """The run's result; a failure if it does not end in time."""
    outcome: list[Any] = []

    def target() -> None:
        try:
            outcome.append(runner.run())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, "the run hangs"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
