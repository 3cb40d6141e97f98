"""Room 1: the one file, copied anywhere and run in every way a file can be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipapp
from pathlib import Path

import pytest
from conftest import ROOT

MODULE = ROOT / "llm_orchestrator.py"
EXAMPLE = ROOT / "examples" / "simple.yaml"
RUN = ["run", str(EXAMPLE), "--offline", "--print", "status"]


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={"PATH": os.environ.get("PATH", ""), **environment}, text=True,
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def package(tmp_path: Path) -> Path:
    vendor = tmp_path / "myapp" / "_vendor"
    vendor.mkdir(parents=True)
    (tmp_path / "myapp" / "__init__.py").touch()
    (vendor / "__init__.py").touch()
    shutil.copy(MODULE, vendor / "llm_orchestrator.py")
    return tmp_path


def test_it_runs_under_a_package_path(package: Path) -> None:
    assert python("-m", "myapp._vendor.llm_orchestrator", *RUN, cwd=package).stdout == "completed\n"


def test_it_runs_under_any_name(tmp_path: Path) -> None:
    shutil.copy(MODULE, tmp_path / "engine.py")
    assert python("-m", "engine", *RUN, cwd=tmp_path).stdout == "completed\n"
    assert python("engine.py", *RUN, cwd=tmp_path).stdout == "completed\n"


@pytest.mark.parametrize("module", ["myapp._vendor.llm_orchestrator", "llm_orchestrator"])
def test_a_plugin_sees_the_running_module_not_a_second_copy(package: Path, module: str) -> None:
    (package / "plugin.py").write_text(
        f"import sys\nimport {module} as engine\n"
        "actions = {'same': lambda: engine.Step is sys.modules['__main__'].Step}\n", "utf-8",
    )  # fmt: skip
    (package / "wf.yaml").write_text("name: t\nsteps:\n  - {id: a, type: action, action: same}\n", "utf-8")
    done = python("-m", "myapp._vendor.llm_orchestrator", "run", "wf.yaml", "--plugin", "plugin.py", "--print", "steps.a", cwd=package)
    assert done.stdout == "true\n", done.stderr


def test_it_runs_from_a_zip(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(MODULE, source)
    zipapp.create_archive(source, tmp_path / "app.pyz", main="llm_orchestrator:main")
    done = python("app.pyz", *RUN, cwd=tmp_path)
    assert done.stdout == "completed\n", done.stderr


@pytest.mark.parametrize("flags", [["-I"], ["-S"], ["-OO"], ["-I", "-S", "-OO"], ["-W", "error"], ["-X", "utf8=0"]], ids=" ".join)
def test_it_runs_under_every_interpreter_flag(flags: list[str]) -> None:
    done = python(*flags, str(MODULE), *RUN, "-q", cwd=ROOT)
    assert (done.stdout, done.stderr) == ("completed\n", ""), done.stderr


@pytest.mark.parametrize("missing", ["_sqlite3", "_ssl", "ssl", "_hashlib", "_ctypes"])
def test_a_missing_extension_module_breaks_only_what_needs_it(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import llm_orchestrator as e; sys.exit(e.main({RUN!r}))"
    done = python("-c", code, cwd=ROOT)
    assert done.stdout == "completed\n", done.stderr


def test_a_missing_ssl_is_named_when_https_is_wanted(tmp_path: Path) -> None:
    code = "import sys; sys.modules['_ssl'] = None; sys.modules['ssl'] = None; import llm_orchestrator as e; sys.exit(e.main({!r}))"
    done = python("-c", code.format(["run", str(EXAMPLE), "-q"]), cwd=ROOT, OPENAI_API_KEY="sk-secret-key-123456")
    assert done.returncode == 1
    assert "ssl" in json.loads(done.stdout)["error"]["message"].lower()
    assert "sk-secret" not in done.stdout + done.stderr


def test_it_runs_without_a_home_and_in_a_read_only_folder(tmp_path: Path) -> None:
    shutil.copy(MODULE, tmp_path / "llm_orchestrator.py")
    tmp_path.chmod(0o555)
    try:
        done = python("-m", "llm_orchestrator", *RUN, cwd=tmp_path)
    finally:
        tmp_path.chmod(0o755)
    assert done.stdout == "completed\n", done.stderr


COSTLY = ["asyncio", "http.client", "ssl", "sqlite3", "urllib.request", "argparse", "logging", "inspect", "typing", "socket", "email",
          "json", "hashlib", "difflib", "graphlib", "random", "queue", "contextvars"]  # fmt: skip


def test_importing_it_imports_nothing_costly() -> None:
    code = f"import sys; before = set(sys.modules); import llm_orchestrator; print([m for m in {COSTLY!r} if m in set(sys.modules) - before])"
    assert python("-S", "-c", code, cwd=ROOT).stdout == "[]\n"


def test_importing_it_changes_no_global_state() -> None:
    code = (
        "import os, signal, sys, warnings, logging, threading\n"
        "def state():\n"
        "    return (dict(os.environ), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],\n"
        "            list(warnings.filters), list(logging.root.handlers), logging.root.level, threading.active_count(),\n"
        "            sys.getrecursionlimit(), sys.excepthook, list(sys.path))\n"
        "before = state()\nimport llm_orchestrator\nprint(before == state())\n"
    )
    assert python("-c", code, cwd=ROOT).stdout == "True\n"


def test_everything_public_is_listed_documented_and_there() -> None:
    import llm_orchestrator

    for name in llm_orchestrator.__all__:
        thing = getattr(llm_orchestrator, name)
        if callable(thing):
            assert thing.__doc__, name
    public = {
        name for name, thing in vars(llm_orchestrator).items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == "llm_orchestrator"
    }  # fmt: skip
    assert public <= {*llm_orchestrator.__all__, "main"}
