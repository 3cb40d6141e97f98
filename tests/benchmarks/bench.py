"""Measures the engine against the floor and against whichever peers are installed: python tests/benchmarks/bench.py [SUBJECT...]

Every row is measured in this one run on this one machine, medians of several repeats, and shown as a ratio. Peers that
are used when they can be imported: PyYAML, Jinja2, LangGraph, the openai SDK.
"""

from __future__ import annotations

import asyncio
import gc
import http.client
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

import llm_orchestrator as engine  # noqa: E402

Row = tuple[str, str, str, str]  # subject, ours, floor or peer, ratio


def peer(name: str) -> Any:
    """A module if it is installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def seconds(function: Callable[[], Any], repeats: int = 7, calls: int = 1) -> float:
    """The median time of one call."""
    times = []
    for _ in range(repeats):
        gc.collect()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def shown(value: float) -> str:
    return next(f"{value * scale:.3g} {unit}" for scale, unit in ((1, "s"), (1e3, "ms"), (1e6, "us"), (1e9, "ns"))
                if value * scale >= 1 or unit == "ns")  # fmt: skip


def row(subject: str, ours: float, name: str, other: float) -> Row:
    return subject, shown(ours), f"{name} {shown(other)}", f"{ours / other:.2f} x its time, {other / ours:.1f} x as fast"


# ---- Loader ----------------------------------------------------------------------------------------------------------


def block_document(steps: int) -> str:
    prompt = "".join(f"      Line {number} of a prompt that says {{{{inputs.topic}}}} and more, as prompts do.\n" for number in range(8))
    return "name: bench\ninputs:\n  topic: {type: string}\nsteps:\n" + "".join(
        f"  - id: step_{number}\n    type: llm\n    provider: openai\n    model: gpt-4o-mini\n    temperature: 0.2\n"
        f"    prompt: |\n{prompt}    output: text\n"
        for number in range(steps)
    )


def load() -> Iterator[Row]:
    yaml = peer("yaml")
    flow = json.dumps([{"id": f"step_{n}", "type": "llm", "tags": ["a", "b", n], "on": True} for n in range(1700)])
    documents = {"10 steps": (block_document(10), 50), "1,000 steps": (block_document(1000), 1), "flow style": (flow, 2)}
    for name, (text, calls) in documents.items():
        ours = seconds(lambda text=text: engine.load_yaml(text), calls=calls)
        size = f"load_yaml, {name} ({len(text) // 1000} kB)"
        if yaml and hasattr(yaml, "CSafeLoader"):
            assert yaml.load(text, yaml.CSafeLoader) == engine.load_yaml(text)
            other = seconds(lambda text=text: yaml.load(text, yaml.CSafeLoader), repeats=5, calls=calls)
            yield row(size, ours, "PyYAML CSafeLoader", other)
        else:
            yield size, shown(ours), "(PyYAML is not installed)", ""


# ---- Templates -------------------------------------------------------------------------------------------------------


def templates() -> Iterator[Row]:
    jinja2 = peer("jinja2")
    context = {
        "inputs": {"name": "Ada", "topic": "engines", "tone": "plain"},
        "steps": {"a": {"text": "the first answer"}, "b": {"text": "the second"}},
        "items": [{"id": number, "title": f"title {number}"} for number in range(100)],
    }
    prompt = "Hello {{inputs.name}}, write about {{inputs.topic}} in a {{inputs.tone}} tone.\n{{steps.a.text}}\n{{steps.b.text}}\n"
    ours = engine.Template(prompt)
    plain = prompt.replace("{{", "{").replace("}}", "}")
    for name in ("inputs.name", "inputs.topic", "inputs.tone", "steps.a.text", "steps.b.text"):
        plain = plain.replace(name, name.replace(".", "_"))

    def formatted() -> str:
        inputs, steps = context["inputs"], context["steps"]
        return plain.format(inputs_name=inputs["name"], inputs_topic=inputs["topic"], inputs_tone=inputs["tone"],
                            steps_a_text=steps["a"]["text"], steps_b_text=steps["b"]["text"])  # fmt: skip

    assert ours.render(context) == formatted()
    own = seconds(lambda: ours.render(context), calls=2000)
    yield row("render, 5 references", own, "str.format", seconds(formatted, calls=2000))
    if not jinja2:
        return
    theirs = jinja2.Environment().from_string(prompt)
    yield row("render, 5 references", own, "jinja2", seconds(lambda: theirs.render(context), calls=2000))
    each = engine.Template("{{#each items}}{{id}}: {{title}}\n{{/each}}")
    loop = jinja2.Environment().from_string("{% for x in items %}{{x.id}}: {{x.title}}\n{% endfor %}")
    assert each.render(context).strip() == loop.render(context).strip()
    yield row("render, #each over 100", seconds(lambda: each.render(context), calls=100), "jinja2",
              seconds(lambda: loop.render(context), calls=100))  # fmt: skip
    compile_theirs = jinja2.Environment(cache_size=0).from_string
    yield row("compile a template", seconds(lambda: engine.Template(prompt), calls=200), "jinja2",
              seconds(lambda: compile_theirs(prompt), calls=20))  # fmt: skip


# ---- Scheduler -------------------------------------------------------------------------------------------------------


def no_op(step_id: str, *depends_on: str) -> dict[str, Any]:
    step = {"id": step_id, "type": "transform", "function": "template", "template": "x"}
    return {**step, "depends_on": list(depends_on)} if depends_on else step


def chain(count: int) -> list[dict[str, Any]]:
    return [no_op(f"s{n}", *([f"s{n - 1}"] if n else [])) for n in range(count)]


def fan_out(count: int) -> list[dict[str, Any]]:
    return [no_op("first"), *(no_op(f"s{n}", "first") for n in range(count)), no_op("last", *(f"s{n}" for n in range(count)))]


def layers(count: int, width: int = 100) -> list[dict[str, Any]]:
    return [
        no_op(f"l{level}_{n}", *([f"l{level - 1}_{n}", f"l{level - 1}_{(n + 1) % width}"] if level else []))
        for level in range(count // width)
        for n in range(width)
    ]


async def counter(steps: list[dict[str, Any]]) -> dict[str, str]:
    """The floor: a hand-written dependency counter, one task a step."""
    waiting = {step["id"]: len(step.get("depends_on", ())) for step in steps}
    dependents: dict[str, list[str]] = {}
    for step in steps:
        for dependency in step.get("depends_on", ()):
            dependents.setdefault(dependency, []).append(step["id"])
    results: dict[str, str] = {}
    done = asyncio.get_running_loop().create_future()
    tasks = set()

    async def work(step_id: str) -> None:
        results[step_id] = "x"
        for dependent in dependents.get(step_id, ()):
            waiting[dependent] -= 1
            if not waiting[dependent]:
                start(dependent)
        if len(results) == len(steps):
            done.set_result(None)

    def start(step_id: str) -> None:
        task = asyncio.ensure_future(work(step_id))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    for step_id in [step_id for step_id, count in waiting.items() if not count]:
        start(step_id)
    await done
    return results


def langgraph_seconds(steps: list[dict[str, Any]]) -> float | None:
    graph_module = peer("langgraph.graph")
    if not graph_module:
        return None
    import operator
    from typing import Annotated, TypedDict

    state = TypedDict("State", {"done": Annotated[list, operator.add]})  # noqa: UP013
    graph = graph_module.StateGraph(state)
    for step in steps:
        graph.add_node(step["id"], lambda values, step_id=step["id"]: {"done": [step_id]})
    followed = {dependency for step in steps for dependency in step.get("depends_on", ())}
    for step in steps:
        before = step.get("depends_on") or [graph_module.START]
        graph.add_edge(before if len(before) > 1 else before[0], step["id"])
        if step["id"] not in followed:
            graph.add_edge(step["id"], graph_module.END)
    compiled = graph.compile()
    return seconds(lambda: compiled.invoke({"done": []}, {"recursion_limit": len(steps) + 10}), repeats=3)


def scheduler() -> Iterator[Row]:
    per_step = {}
    shapes = {"chain of 1,000": chain(1000), "fan-out of 1,000 and join": fan_out(1000), "10,000 in layers": layers(10_000)}
    shapes["50,000 in layers"] = layers(50_000)
    for name, steps in shapes.items():
        executor = engine.WorkflowExecutor(engine.Workflow.from_dict({"name": "bench", "steps": steps}))
        assert executor.run().status == "completed"
        repeats = 3 if len(steps) > 10_000 else 7
        ours = seconds(executor.run, repeats=repeats)
        per_step[name] = ours / len(steps)
        floor = seconds(lambda steps=steps: asyncio.run(counter(steps)), repeats=repeats)
        yield row(f"no-op steps, {name}", ours, "hand-written counter", floor)
        if len(steps) < 5000 and (theirs := langgraph_seconds(steps)):
            yield row(f"no-op steps, {name}", ours, "LangGraph", theirs)
    small, large = per_step["chain of 1,000"], per_step["50,000 in layers"]
    yield row("cost per step at 50,000", large, "cost per step at 1,000", small)


# ---- Calls -----------------------------------------------------------------------------------------------------------

SERVER = """
import asyncio, json, sys
delay = float(sys.argv[1])
answer = json.dumps({"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [{"index": 0, "message":
    {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}}).encode()
reply = b"HTTP/1.1 200 OK\\r\\ncontent-type: application/json\\r\\ncontent-length: %d\\r\\n\\r\\n" % len(answer) + answer
class Server(asyncio.Protocol):
    def connection_made(self, transport): self.transport, self.data = transport, b""
    def data_received(self, data):
        self.data += data
        while (end := self.data.find(b"\\r\\n\\r\\n")) >= 0:
            head = self.data[:end].lower()
            length = int(head.split(b"content-length:")[1].split(b"\\r\\n")[0]) if b"content-length:" in head else 0
            if len(self.data) < end + 4 + length: return
            self.data = self.data[end + 4 + length:]
            asyncio.get_running_loop().call_later(delay, self.transport.write, reply) if delay else self.transport.write(reply)
async def main():
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0, backlog=1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


@contextmanager
def server(delay: float) -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(delay)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hello"}]}).encode()


def bare_seconds(port: int, calls: int, concurrency: int) -> float:
    """The floor: threads that each send requests over one kept http.client connection."""

    def work(count: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for _ in range(count):
            connection.request("POST", "/v1/chat/completions", BODY, {"Content-Type": "application/json", "Authorization": "Bearer k"})
            json.loads(connection.getresponse().read())
        connection.close()

    def run() -> None:
        threads = [threading.Thread(target=work, args=(calls // concurrency,)) for _ in range(concurrency)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return seconds(run, repeats=5)


def sdk_seconds(port: int, calls: int, concurrency: int) -> float | None:
    openai = peer("openai")
    if not openai:
        return None

    async def run() -> None:
        client = openai.AsyncOpenAI(api_key="k", base_url=f"http://127.0.0.1:{port}/v1")
        limit = asyncio.Semaphore(concurrency)

        async def call() -> None:
            async with limit:
                await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hello"}])

        await asyncio.gather(*(call() for _ in range(calls)))
        await client.close()

    return seconds(lambda: asyncio.run(run()), repeats=3)


def call_executor(port: int, calls: int, concurrency: int) -> engine.WorkflowExecutor:
    steps = [{"id": f"s{n}", "type": "llm", "provider": "openai", "model": "m", "prompt": "hello"} for n in range(calls)]
    provider = engine.OpenAIProvider(api_key="k", base_url=f"http://127.0.0.1:{port}/v1")
    workflow = engine.Workflow.from_dict({"name": "bench", "steps": steps})
    return engine.WorkflowExecutor(workflow, providers={"openai": provider}, max_concurrency=concurrency)


def run_completed(executor: engine.WorkflowExecutor) -> None:
    result = executor.run()
    assert result.status == "completed", result.error


def calls() -> Iterator[Row]:
    with server(0) as port:
        for concurrency in (16, 64):
            count = 1024
            executor = call_executor(port, count, concurrency)
            ours = seconds(lambda executor=executor: run_completed(executor), repeats=5)
            yield row(f"{count} llm steps, concurrency {concurrency}", ours, "bare http.client", bare_seconds(port, count, concurrency))
            if theirs := sdk_seconds(port, count, concurrency):
                yield row(f"{count} llm steps, concurrency {concurrency}", ours, "openai SDK", theirs)
    with server(0.05) as port:
        executor = call_executor(port, 2048, 256)
        ours = seconds(lambda: run_completed(executor), repeats=3)
        yield row("2,048 calls of 50 ms, concurrency 256", ours, "the ideal", 2048 / 256 * 0.05)


# ---- Processes and memory --------------------------------------------------------------------------------------------


def process_seconds(*arguments: str) -> float:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # which would have it compiled anew each time
    return seconds(lambda: subprocess.run([sys.executable, *arguments], check=True, env=environment, capture_output=True), repeats=15)


def processes() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "wf.yaml")
        path.write_text(block_document(10), encoding="utf-8")
        ours = process_seconds("-m", "llm_orchestrator", "validate", str(path))
        yield row("validate, whole process", ours, "python -c 'import json, re'", process_seconds("-c", "import json, re"))
    bare = process_seconds("-c", "pass")
    own, floor = process_seconds("-c", "import llm_orchestrator") - bare, process_seconds("-c", "import asyncio") - bare
    yield row("import, beyond bare Python", own, "import asyncio", floor)


def memory() -> Iterator[Row]:
    sizes = {}
    for count in (1000, 10_000):
        executor = engine.WorkflowExecutor(engine.Workflow.from_dict({"name": "bench", "steps": layers(count)}))
        executor.run()
        gc.collect()
        tracemalloc.start()
        result = executor.run()
        gc.collect()
        executor.result = None
        sizes[count] = tracemalloc.get_traced_memory()[0] / len(result.steps)
        tracemalloc.stop()
    yield ("memory kept a step, 10,000 steps", f"{sizes[10_000]:.0f} B", f"1,000 steps {sizes[1000]:.0f} B",
           f"{sizes[10_000] / sizes[1000]:.2f} x")  # fmt: skip


def stores() -> Iterator[Row]:
    if not hasattr(engine, "SQLiteStore"):
        return
    workflow = engine.Workflow.from_dict({"name": "bench", "steps": chain(1000)})
    plain = engine.WorkflowExecutor(workflow)
    with tempfile.TemporaryDirectory() as folder:
        store = engine.SQLiteStore(Path(folder, "runs.db"))
        stored = engine.WorkflowExecutor(workflow, store=store)
        yield row("stored run, chain of 1,000", seconds(stored.run), "unstored", seconds(plain.run))
        store.close()


SUBJECTS = {"load": load, "templates": templates, "scheduler": scheduler, "calls": calls, "processes": processes,
            "memory": memory, "stores": stores}  # fmt: skip


def main(names: list[str]) -> None:
    versions = [f"Python {platform.python_version()}", platform.machine(), f"{os.cpu_count()} cores"]
    for package in ("PyYAML", "Jinja2", "langgraph", "openai"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    print(", ".join(versions))
    for name in names or SUBJECTS:
        print(f"\n{name}\n| subject | ours | floor or peer | ratio |\n|---|---|---|---|")
        for cells in SUBJECTS[name]():
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
