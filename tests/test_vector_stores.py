"""Room 11 and its steps: the local store, clients of vector databases against local servers, embed, search, upsert."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import ROOT, Program
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_orchestrator as engine
from llm_orchestrator import (
    ChromaStore,
    ExecutionError,
    LocalVectorStore,
    OrchestratorError,
    PineconeStore,
    QdrantStore,
    ValidationError,
    VectorStore,
    WeaviateStore,
    Workflow,
    WorkflowExecutor,
)  # fmt: skip

Answer = Callable[[str, str, Any], Any]  # method, path, body -> JSON, or (status, JSON)


@pytest.fixture(autouse=True)
def _a_machine_without_databases(monkeypatch: pytest.MonkeyPatch) -> Any:
    """No setting of the machine takes part, and the connections that a test leaves idle are closed after it."""
    for name in list(os.environ):
        if name.startswith(("QDRANT_", "PINECONE_", "CHROMA_", "WEAVIATE_")):
            monkeypatch.delenv(name)
    clients: list[Any] = []
    original = engine._HttpClient.__init__

    def remember(self: Any, *arguments: Any, **options: Any) -> None:
        clients.append(self)
        original(self, *arguments, **options)

    monkeypatch.setattr(engine._HttpClient, "__init__", remember)
    yield
    for client in clients:
        client.close()


class Server:
    """A JSON server on this machine; `requests` is what it was asked: (method, path, body, headers)."""

    def __init__(self, answer: Answer) -> None:
        self.requests: list[tuple[str, str, Any, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.loads(raw) if raw else None
                outer.requests.append((self.command, self.path, body, self.headers))
                found = answer(self.command, self.path, body)
                status, document = found if isinstance(found, tuple) else (200, found)
                data = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_DELETE = answer

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def calls(self) -> list[str]:
        return [f"{method} {path}" for method, path, _, _ in self.requests]


@pytest.fixture
def serve() -> Any:
    servers: list[Server] = []

    def start(answer: Answer) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


def record(key: str, *vector: float, **metadata: Any) -> dict[str, Any]:
    return {"id": key, "vector": list(vector), "metadata": metadata}


def found(store: VectorStore, *arguments: Any, **options: Any) -> list[str]:
    return [match["id"] for match in store.search(*arguments, **options)]


# ---- the local store -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("cosine", {"long": 1.0, "near": 0.8, "across": 0.0, "zero": 0.0, "away": -1.0}),
        ("dot", {"long": 3.0, "near": 0.8, "across": 0.0, "zero": 0.0, "away": -0.5}),
        ("euclidean", {"near": 1 / (1 + math.sqrt(0.4)), "zero": 1 / 2, "across": 1 / (1 + math.sqrt(2)),
                       "away": 1 / 2.5, "long": 1 / 3}),
    ],
)  # fmt: skip
def test_the_nearest_come_first_with_their_score(metric: str, expected: dict[str, float]) -> None:
    store = LocalVectorStore(metric=metric)
    vectors = {"long": (3, 0), "near": (0.8, 0.6), "across": (0, 1), "zero": (0, 0), "away": (-0.5, 0)}
    assert store.upsert("docs", [record(key, *vector) for key, vector in vectors.items()]) == 5
    results = store.search("docs", [1.0, 0.0], 10)
    order = sorted(expected, key=lambda key: (-expected[key], key))
    assert [match["id"] for match in results] == order
    assert [match["score"] for match in results] == pytest.approx([expected[key] for key in order])


KINDS: dict[str, Callable[[random.Random, int], list[float]]] = {
    "plain": lambda rng, size: [rng.gauss(0, 1) for _ in range(size)],
    "scales": lambda rng, size: [rng.gauss(0, 1) * 10 ** rng.uniform(-20, 20)] * size,
    "sparse": lambda rng, size: [rng.choice([0, 0, 0, 0, 1, -0.5]) for _ in range(size)],
    "small integers": lambda rng, size: [rng.randint(-3, 3) for _ in range(size)],
    "one cluster": lambda rng, size: [1 + rng.gauss(0, 1e-6) for _ in range(size)],
    "few distinct": lambda rng, size: [rng.choice([0.1, 0.2])] * size,
    "zeros": lambda rng, size: [0.0] * size,
}


@settings(max_examples=60, deadline=None)
@given(
    metric=st.sampled_from(["cosine", "dot", "euclidean"]), kind=st.sampled_from(sorted(KINDS)),
    size=st.sampled_from([1, 2, 3, 24, 65]), seed=st.integers(0, 2**32), top_k=st.sampled_from([1, 7, 250, 1000]),
    bound=st.one_of(st.none(), st.integers(0, 400)),
)  # fmt: skip
def test_the_search_among_many_is_exact(metric: str, kind: str, size: int, seed: int, top_k: int, bound: Any) -> None:
    rng = random.Random(seed)
    vectors = [KINDS[kind](rng, size) for _ in range(400)]
    query = KINDS[kind](rng, size)
    store = LocalVectorStore(metric=metric)
    store.upsert("docs", [record(str(number), *vector, number=number) for number, vector in enumerate(vectors)])

    def nearness(vector: list[float]) -> float:
        lengths = math.hypot(*vector) * math.hypot(*query)
        dot = math.fsum(a * b for a, b in zip(vector, query))
        cosine, closeness = dot / lengths if lengths else 0.0, 1 / (1 + math.dist(vector, query))
        return {"cosine": cosine, "dot": dot, "euclidean": closeness}[metric]

    within = vectors if bound is None else vectors[:bound]
    best = sorted(map(nearness, within), reverse=True)[:top_k]
    results = store.search("docs", query, top_k, filter=None if bound is None else {"number": {"$lt": bound}})
    largest = max(math.hypot(*vector) for vector in vectors) * math.hypot(*query) if metric == "dot" else 1
    assert [match["score"] for match in results] == pytest.approx(best, rel=1e-9, abs=1e-12 * largest)
    assert results == sorted(results, key=lambda match: (-match["score"], match["id"])) or metric == "euclidean"


def test_among_many_a_tiny_vector_is_as_near_as_its_direction() -> None:
    store = LocalVectorStore()
    store.upsert("docs", [record("tiny", *[9e-101] * 4), *(record(str(number), 1, 0, 0, 0) for number in range(300))])
    assert found(store, "docs", [1, 1, 1, 1], 1) == ["tiny"]


def test_equal_scores_come_in_the_order_of_their_ids() -> None:
    store = LocalVectorStore()
    ids = [f"{number:03}" for number in range(300)]
    store.upsert("docs", [record(key, 1, 2, 3) for key in random.Random(5).sample(ids, 300)])
    assert found(store, "docs", [1, 2, 3], 300) == ids
    assert found(store, "docs", [1, 2, 3], 4) == ids[:4]


def test_upsert_replaces_and_the_last_of_one_id_counts() -> None:
    store = LocalVectorStore()
    assert store.upsert("docs", [record("a", 1, 0, version=1), record("b", 0, 1), record("a", 1, 1, version=2)]) == 2
    assert store.search("docs", [1, 1], 1) == [{"id": "a", "score": pytest.approx(1), "metadata": {"version": 2}}]
    store.upsert("docs", [record("a", 0, 1, version=3)])
    assert store.search("docs", [0, 1], 1)[0]["metadata"] == {"version": 3}
    assert len(store.search("docs", [0, 1], 9)) == 2


def test_nothing_is_found_where_nothing_was_stored() -> None:
    store = LocalVectorStore()
    assert store.upsert("docs", []) == 0
    assert store.search("docs", [1.0], 3) == []


def test_vectors_and_metadata_come_back_as_they_were_and_as_copies() -> None:
    store = LocalVectorStore()
    vector, metadata = [0.1, 1e-7, -3.0], {"nested": {"list": [1, 2.5, None, True]}, "text": "ü \U0001f600 \x00"}
    store.upsert("docs", [{"id": "a", "vector": vector, "metadata": metadata}, record("b", 1, 1, 1)])
    first = store.search("docs", vector, 1, include_vectors=True)[0]
    assert (first["vector"], first["metadata"]) == (vector, metadata)
    first["metadata"]["nested"]["list"].clear()
    assert store.search("docs", vector, 1)[0]["metadata"] == metadata
    assert set(store.search("docs", vector, 1, include_metadata=False)[0]) == {"id", "score"}


def test_namespaces_and_indexes_are_apart() -> None:
    store = LocalVectorStore()
    for index, namespace in (("one", None), ("one", "a"), ("two", "a")):
        store.upsert(index, [record(f"{index}-{namespace}", 1, 0)], namespace)
    assert found(store, "one", [1, 0], 5) == ["one-None"] == found(store, "one", [1, 0], 5, namespace="")
    assert found(store, "one", [1, 0], 5, namespace="a") == ["one-a"]
    assert store.delete("one", namespace="a") == 1
    assert (found(store, "one", [1, 0]), found(store, "two", [1, 0], namespace="a")) == (["one-None"], ["two-a"])


def test_delete_takes_ids_a_filter_or_everything() -> None:
    store = LocalVectorStore()
    store.upsert("docs", [record(str(number), 1, number, number=number) for number in range(10)])
    assert store.delete("docs", ["1", "2", "2", "unknown"]) == 2
    assert store.delete("docs", filter={"number": {"$gte": 8}}) == 2
    assert sorted(found(store, "docs", [1, 0], 20)) == ["0", "3", "4", "5", "6", "7"]
    assert store.delete("docs", []) == 0
    assert store.delete("docs") == 6
    store.upsert("docs", [record("wider", 1, 2, 3)])  # an empty index takes any dimension
    with pytest.raises(ExecutionError, match="ids, or a filter"):
        store.delete("docs", ["a"], filter={"number": 1})


PEOPLE = {
    "ann": {"age": 30, "name": "Ann", "tags": ["a", "b"], "active": True},
    "bob": {"age": 41.5, "name": "bob", "tags": [], "active": False},
    "cem": {"age": "30", "name": "Cem", "tags": ["b", 7], "active": 1},
    "dee": {"age": None, "nested": {"age": 30}, "a.b": 1},
}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"age": 30}, "ann"), ({"age": 30.0}, "ann"), ({"age": "30"}, "cem"), ({"age": {"$eq": 41.5}}, "bob"),
        ({"active": True}, "ann"), ({"active": 1}, "cem"), ({"active": False}, "bob"), ({"missing": 1}, ""),
        ({"age": {"$ne": 30}}, "bob cem dee"), ({"missing": {"$ne": 1}}, "ann bob cem dee"),
        ({"name": {"$in": ["Ann", "Cem", 3]}}, "ann cem"), ({"name": {"$in": []}}, ""),
        ({"name": {"$nin": ["Ann", "Cem"]}}, "bob dee"), ({"name": {"$nin": []}}, "ann bob cem dee"),
        ({"age": {"$gt": 30}}, "bob"), ({"age": {"$gte": 30}}, "ann bob"), ({"age": {"$lt": 41.5}}, "ann"),
        ({"age": {"$lte": 41.5}}, "ann bob"), ({"age": {"$gt": ""}}, "cem"), ({"name": {"$lt": "D"}}, "ann cem"),
        ({"age": {"$gt": 29, "$lt": 31}}, "ann"), ({"age": 30, "active": True}, "ann"),
        ({"age": 30, "active": False}, ""),
        ({"tags": "b"}, "ann cem"), ({"tags": {"$ne": "b"}}, "bob dee"), ({"tags": {"$in": ["a", 7]}}, "ann cem"),
        ({"tags": {"$nin": ["a"]}}, "bob cem dee"), ({"tags": {"$gt": 6}}, "cem"), ({"a.b": 1}, "dee"),
        ({"nested": 1}, ""),
        ({"$and": [{"tags": "b"}, {"age": 30}]}, "ann"), ({"$or": [{"age": 41.5}, {"name": "Cem"}]}, "bob cem"),
        ({"$not": {"age": {"$gt": 30}}}, "ann cem dee"), ({"$not": {"age": 30, "active": True}}, "bob cem dee"),
        ({"$not": {"$or": [{"tags": "b"}, {"age": 41.5}]}}, "dee"), ({"$not": {"$not": {"age": 30}}}, "ann"),
        ({"$or": [{"age": 30}, {"$not": {"active": False}}]}, "ann cem dee"), ({}, "ann bob cem dee"),
    ],
    ids=str,
)  # fmt: skip
def test_filters_look_at_the_metadata(wanted: Any, expected: str) -> None:
    store = LocalVectorStore()
    store.upsert("docs", [record(key, 1, 1, **metadata) for key, metadata in PEOPLE.items()])
    assert sorted(found(store, "docs", [1, 1], 9, filter=wanted)) == expected.split()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"age": {"$gtt": 3}}, r"age: unknown filter operator '\$gtt', did you mean '\$gt'"),
        ({"$an": [{"age": 3}]}, r"unknown filter operator '\$an'.* did you mean '\$and'"),
        ({"age": {"gt": 3}}, r"unknown filter operator 'gt', did you mean '\$gt'"),
        ({"$gt": 3}, r"unknown filter operator '\$gt'"), ({"$not": [{"age": 3}]}, "must be a map"),
        ({"$and": {"age": 3}}, r"\$and takes a list of filters.*not a map"), ({"age": ["a"]}, "not a list"),
        ({"$or": []}, r"\$or takes a list of filters, at least one"),
        ({"age": None}, "not null"), ({"age": {"$in": 3}}, "a list of text"),
        ({"age": {"$in": [[]]}}, "a list of text"),
        ({"age": {"$gt": True}}, "text or a number, not true"), ({"age": {"$eq": float("nan")}}, "text or a number"),
        ({"age": {"$lt": [1]}}, "text or a number"), ({3: 1}, "unknown filter operator 3"), (["age"], "must be a map"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_filter_is_refused_with_what_is_wrong(wanted: Any, message: str) -> None:
    store = LocalVectorStore()
    store.upsert("docs", [record("a", 1, age=3)])
    for use in (lambda: store.search("docs", [1], filter=wanted), lambda: store.delete("docs", filter=wanted)):
        with pytest.raises(ExecutionError, match=message):
            use()
    assert found(store, "docs", [1]) == ["a"]


def test_a_filter_nested_without_end_is_refused() -> None:
    deep: dict[str, Any] = {"age": 1}
    for _ in range(5000):
        deep = {"$not": deep}
    with pytest.raises(ExecutionError, match="50 deep"):
        LocalVectorStore().search("docs", [1.0], filter=deep)


@pytest.mark.parametrize(
    "vector",
    [[], "12", None, [1, "2"], [1, None], [True, 1], [math.nan, 1], [1, math.inf], [-math.inf, math.inf], [1e101, 1],
     [10**400, 1], [1.5, 10**400], [[1], [2]], {"a": 1}, [1] * 70_000],
    ids=lambda vector: str(vector)[:30],
)  # fmt: skip
def test_what_is_no_vector_is_refused(vector: Any) -> None:
    store = LocalVectorStore()
    with pytest.raises(ExecutionError, match="record 0: a vector must"):
        store.upsert("docs", [{"id": "a", "vector": vector}])
    with pytest.raises(ExecutionError, match="a vector must"):
        store.search("docs", vector)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"id": "a"}, "record 0: it must be"), ("ab", "record 0"), ([record("a", 1), 7], "record 1: it must be"),
        ([{"vector": [1]}], "it must be"), ([{"id": "a"}], "it must be"),
        ([{**record("a", 1), "text": "x"}], "it must be"),
        ([{"id": None, "vector": [1]}], "id must be text"), ([{"id": "", "vector": [1]}], "id must be text"),
        ([{"id": 1.5, "vector": [1]}], "id must be text"), ([{"id": True, "vector": [1]}], "id must be text"),
        ([{"id": "\ud800", "vector": [1]}], "id must be text"), ([{"id": "a", "vector": [1], "metadata": 7}], "no map"),
        ([record("a", 1, x=math.nan)], "JSON"), ([record("a", 1, x={1, 2})], "JSON"),
        ([record("a", 1), record("b", 1, 2)], "record 1: it has 2 dimensions"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_is_no_record_is_refused_and_nothing_is_stored(records: Any, message: str) -> None:
    store = LocalVectorStore()
    with pytest.raises(ExecutionError, match=message):
        store.upsert("docs", records)
    assert store.search("docs", [1.0]) == []


def test_another_dimension_is_refused() -> None:
    store = LocalVectorStore()
    store.upsert("docs", [record("a", 1, 2)])
    with pytest.raises(ExecutionError, match="'docs' holds vectors of 2 dimensions, not 3"):
        store.upsert("docs", [record("b", 1, 2, 3)], "other namespace")
    with pytest.raises(ExecutionError, match="2 dimensions, but the query has 1"):
        store.search("docs", [1])
    store.upsert("docs 2", [record("b", 1, 2, 3)])


@pytest.mark.parametrize("top_k", [0, -1, 1.5, "3", None, True])
def test_top_k_is_a_positive_whole_number(top_k: Any) -> None:
    with pytest.raises(ExecutionError, match="top_k"):
        LocalVectorStore().search("docs", [1], top_k)


def test_an_unknown_metric_is_refused() -> None:
    for make in (LocalVectorStore, QdrantStore):
        with pytest.raises(ValidationError, match="unknown metric 'l7'"):
            make(metric="l7")


def test_a_file_keeps_its_records_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "vectors.db"
    store = LocalVectorStore(path)
    store.upsert("docs", [record("a", 1, 0), record("b", 0, 1)])
    store.close()
    assert found(store, "docs", [1, 0]) == ["a", "b"]  # closed is not lost
    assert found(LocalVectorStore(path, metric="dot"), "docs", [0, 1]) == ["b", "a"]
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600


def test_what_another_process_writes_is_found(tmp_path: Path) -> None:
    path = tmp_path / "vectors.db"
    store = LocalVectorStore(path)
    store.upsert("docs", [record("a", 1, 0)])
    assert found(store, "docs", [1, 0]) == ["a"]
    code = (
        f"from llm_orchestrator import LocalVectorStore as S; s = S({str(path)!r}); "
        "s.upsert('docs', [{'id': 'b', 'vector': [1, 0.1]}]); print(len(s.search('docs', [1, 0])))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("2", "")
    assert found(store, "docs", [1, 0]) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"not a database " * 100, "file is not a database"), ("PRAGMA user_version = 7", "schema version 7, not 1")],
    ids=["nonsense", "newer"],
)
def test_a_file_that_is_no_vector_store_is_named(tmp_path: Path, content: Any, message: str) -> None:
    import sqlite3

    path = tmp_path / "vectors.db"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        connection = sqlite3.connect(path)
        connection.execute(content)
        connection.close()
    for broken, expected in ((path, message), (tmp_path / "no" / "folder.db", "No such file")):
        with pytest.raises(ExecutionError, match=f"{broken.name}.*{expected}"):
            LocalVectorStore(broken).search("docs", [1])


def test_many_threads_share_a_store(tmp_path: Path) -> None:
    store = LocalVectorStore(tmp_path / "vectors.db")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(10):
                store.upsert("docs", [record(f"{number}-{step}-{each}", number, step, each + 1) for each in range(30)])
                assert store.search("docs", [number, step, 1], 3)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(store.search("docs", [1, 1, 1], 5000)) == 6 * 10 * 30


def test_without_sqlite3_only_the_local_store_fails_and_says_so(program: Program) -> None:
    program.write("wf.yaml", UPSERT)
    code = (
        "import sys; sys.modules['_sqlite3'] = None; import llm_orchestrator as o; "
        "print(o.WorkflowExecutor(o.Workflow.from_file('wf.yaml'), {'n': 1}, offline=True).run().error['message'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=program.folder, env=program.environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert "needs the module sqlite3, which this Python lacks" in done.stdout, done.stderr


def test_importing_does_not_load_sqlite3() -> None:
    code = "import sys, llm_orchestrator; print({'sqlite3', 'uuid', 'http.client'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()"


# ---- filters in the languages of the databases -----------------------------------------------------------------------

FIELDS = {"n": st.sampled_from([0, 1, 1.5, 2]), "t": st.sampled_from(["", "a", "b"]), "b": st.booleans()}


def field_tests() -> st.SearchStrategy[Any]:
    def of(name: str) -> st.SearchStrategy[Any]:
        lists = st.lists(FIELDS[name], min_size=1, max_size=3)
        listed = [lists.map(lambda values, key=key: {key: values}) for key in ("$in", "$nin")]
        both = st.fixed_dictionaries({}, optional={"$eq": FIELDS[name], "$ne": FIELDS[name]})
        equal = st.one_of(FIELDS[name], both, *listed)
        return equal.filter(lambda value: value != {}).map(lambda value: {name: value})

    order = st.sampled_from(["$gt", "$gte", "$lt", "$lte"])
    compare = st.tuples(order, FIELDS["n"]).map(lambda pair: {"n": {pair[0]: pair[1]}})
    return st.one_of(*map(of, FIELDS), compare)


def filters() -> st.SearchStrategy[Any]:
    def joined(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        lists = st.lists(inner, min_size=1, max_size=3)
        return st.one_of(*(lists.map(lambda parts, key=key: {key: parts}) for key in ("$and", "$or")),
                         inner.map(lambda part: {"$not": part}))  # fmt: skip

    return st.recursive(field_tests(), joined, max_leaves=6)


def mongo(where: Any, metadata: Any) -> bool:
    """What Pinecone and Chroma do with a filter (a missing field is not equal to anything)."""
    ((key, value),) = where.items()
    if key in ("$and", "$or"):
        return (all if key == "$and" else any)(mongo(part, metadata) for part in value)
    ((operator, wanted),) = value.items()
    have = metadata.get(key)
    comparisons = {"$gt": "__gt__", "$gte": "__ge__", "$lt": "__lt__", "$lte": "__le__"}
    if operator in comparisons:
        return have is not None and getattr(float(have), comparisons[operator])(float(wanted))
    assert operator not in ("$in", "$nin") or len(set(map(type, wanted))) == 1, "Chroma refuses mixed lists"
    return (have in wanted if operator in ("$in", "$nin") else have == wanted) == (operator in ("$eq", "$in"))


def qdrant(condition: Any, metadata: Any) -> bool:
    """What Qdrant does with a filter or condition."""
    if "key" in condition:
        have = metadata.get(condition["key"])
        if "match" in condition:
            return type(have) is type(condition["match"]["value"]) and have == condition["match"]["value"]
        names = {"gt": "__gt__", "gte": "__ge__", "lt": "__lt__", "lte": "__le__"}
        return isinstance(have, (int, float)) and not isinstance(have, bool) and all(
            getattr(float(have), names[name])(float(bound)) for name, bound in condition["range"].items())  # fmt: skip
    assert set(condition) <= {"must", "should", "must_not"}
    return (all(qdrant(part, metadata) for part in condition.get("must", []))
            and ("should" not in condition or any(qdrant(part, metadata) for part in condition["should"]))
            and not any(qdrant(part, metadata) for part in condition.get("must_not", [])))  # fmt: skip


def weaviate(where: Any, metadata: Any) -> bool:
    """What Weaviate does with a filter."""
    if where["operator"] in ("And", "Or"):
        return (all if where["operator"] == "And" else any)(weaviate(part, metadata) for part in where["operands"])
    ((kind, wanted),) = [(key, value) for key, value in where.items() if key.startswith("value")]
    assert kind == {str: "valueText", bool: "valueBoolean", int: "valueNumber", float: "valueNumber"}[type(wanted)]
    have = metadata.get(where["path"][0])
    if where["operator"] in ("Equal", "NotEqual"):
        return (have == wanted) == (where["operator"] == "Equal")
    names = {"GreaterThan": "__gt__", "GreaterThanEqual": "__ge__", "LessThan": "__lt__", "LessThanEqual": "__le__"}
    return have is not None and getattr(float(have), names[where["operator"]])(float(wanted))


@settings(max_examples=150, deadline=None)
@given(wanted=filters(), metadata=st.fixed_dictionaries({}, optional=FIELDS))
def test_every_database_is_asked_for_what_the_local_store_finds(wanted: Any, metadata: Any) -> None:
    store = LocalVectorStore()
    store.upsert("docs", [record("a", 1, **metadata)])
    expected = bool(store.search("docs", [1], filter=wanted))
    assert qdrant(QdrantStore().filter(wanted), metadata) == expected or isinstance(metadata.get("n"), float)
    for translate, meaning in ((engine._mongo_filter, mongo), (lambda f: WeaviateStore().filter(f, {}), weaviate)):
        try:
            assert meaning(translate(wanted), metadata) == expected
        except ExecutionError as error:
            assert "cannot negate" in str(error)
            assert "$not" in str(wanted)


# ---- Qdrant ----------------------------------------------------------------------------------------------------------


class FakeQdrant:
    """Collections of points, as far as the tests need them."""

    def __init__(self) -> None:
        self.collections: dict[str, dict[Any, Any]] = {}

    def __call__(self, method: str, path: str, body: Any) -> Any:
        parts = path.partition("?")[0].split("/")[2:]
        if method == "PUT" and len(parts) == 1:
            assert body == {"vectors": {"size": 2, "distance": "Cosine"}}
            self.collections[parts[0]] = {}
            return {"result": True, "status": "ok", "time": 0.1}
        points = self.collections.get(parts[0])
        if points is None:
            return 404, {"status": {"error": f"Not found: Collection `{parts[0]}` doesn't exist!"}, "time": 0.0}
        if method == "PUT":
            assert path.endswith("/points?wait=true")
            for point in body["points"]:
                assert isinstance(point["id"], int) or str(uuid.UUID(point["id"])) == point["id"]
                points[point["id"]] = point
        elif path.endswith("/points/query"):
            kept = [point for point in points.values() if qdrant(body.get("filter", {}), point["payload"])]
            scored = [(sum(a * b for a, b in zip(point["vector"], body["query"])), point) for point in kept]
            best = sorted(scored, key=lambda pair: -pair[0])[: body["limit"]]
            shown = [{"id": point["id"], "version": 3, "score": score, "payload": point["payload"],
                      "vector": point["vector"] if body["with_vector"] else None} for score, point in best]  # fmt: skip
            return {"result": {"points": shown}, "status": "ok", "time": 0.1}
        elif path.endswith("/points/delete?wait=true"):
            for key, point in list(points.items()):
                if key in body["points"] if "points" in body else qdrant(body["filter"], point["payload"]):
                    del points[key]
        return {"result": {"operation_id": 1, "status": "completed"}, "status": "ok", "time": 0.1}


def test_qdrant_keeps_any_id_and_creates_the_collection(serve: Any) -> None:
    server = serve(FakeQdrant())
    store = QdrantStore(base_url=server.url, api_key="qdrant-secret")
    ids = ["doc 1", "42", "007", "18446744073709551616", str(uuid.uuid4()), str(uuid.uuid4()).upper()]
    records = [record(key, 1, number, n=number, text="t") for number, key in enumerate(ids)]
    assert store.upsert("docs", records) == 6
    write = "PUT /collections/docs/points?wait=true"
    assert server.calls() == [write, "PUT /collections/docs", write]
    assert all(headers["api-key"] == "qdrant-secret" for _, _, _, headers in server.requests)
    results = store.search("docs", [0, 1], 9, include_vectors=True)
    assert [(match["id"], match["metadata"], match["vector"]) for match in results] == [
        (each["id"], each["metadata"], each["vector"]) for each in reversed(records)
    ]
    assert found(store, "docs", [0, 1], 2, filter={"n": {"$lt": 3}}) == ["007", "42"]
    assert store.delete("docs", ["doc 1", "42"]) is None
    store.delete("docs", filter={"n": {"$gte": 4}})
    assert sorted(found(store, "docs", [1, 0], 9)) == sorted(ids[2:4])
    store.delete("docs")
    assert found(store, "docs", [1, 0], 9) == []


def test_a_namespace_is_a_collection_of_its_own_and_names_are_quoted(serve: Any) -> None:
    fake = FakeQdrant()
    store = QdrantStore(base_url=serve(fake).url)
    store.upsert("a/b?", [record("1", 1, 0)], "ü")
    assert list(fake.collections) == ["a%2Fb%3F__%C3%BC"]
    assert found(store, "a/b?", [1, 0], namespace="ü") == ["1"]


def test_fields_with_odd_names_are_quoted_for_qdrant() -> None:
    assert QdrantStore().filter({"a.b": 1})["must"] == [{"key": '"a.b"', "match": {"value": 1}}]


# ---- Pinecone --------------------------------------------------------------------------------------------------------


def test_pinecone_is_asked_for_the_host_of_an_index_once(serve: Any) -> None:
    data = serve(lambda method, path, body: {"upsertedCount": 1, "matches": []})
    control = serve(lambda method, path, body: {"name": "docs", "host": data.url, "dimension": 2, "metric": "cosine"})
    store = PineconeStore(api_key="pinecone-secret", controller_host=control.url)
    assert store.upsert("docs", [record("a", 1, 0, year=2024, gone=None)], "ns") == 1
    assert store.search("docs", [1, 0], 3, filter={"year": {"$gte": 2020}, "lang": "en"}) == []
    store.delete("docs", ["a"], namespace="ns")
    store.delete("docs", filter={"year": {"$nin": [1, 2]}})
    store.delete("docs")
    assert control.calls() == ["GET /indexes/docs"]
    where = {"$and": [{"year": {"$gte": 2020}}, {"lang": {"$eq": "en"}}]}
    assert [(path, body) for _, path, body, _ in data.requests] == [
        ("/vectors/upsert",
         {"vectors": [{"id": "a", "values": [1.0, 0.0], "metadata": {"year": 2024}}], "namespace": "ns"}),
        ("/query", {"vector": [1.0, 0.0], "topK": 3, "includeMetadata": True, "includeValues": False, "filter": where,
                    "namespace": ""}),
        ("/vectors/delete", {"ids": ["a"], "namespace": "ns"}),
        ("/vectors/delete", {"filter": {"year": {"$nin": [1, 2]}}, "namespace": ""}),
        ("/vectors/delete", {"deleteAll": True, "namespace": ""}),
    ]  # fmt: skip
    for _, _, _, headers in control.requests + data.requests:
        assert (headers["Api-Key"], headers["X-Pinecone-Api-Version"]) == ("pinecone-secret", "2026-07")


def test_pinecone_matches_become_results(serve: Any) -> None:
    match = {"id": "a", "score": 0.9, "values": [1, 0], "metadata": {"t": "x"}}
    server = serve(lambda *_: {"matches": [match, {"id": "b", "score": 0.1}], "usage": {"readUnits": 1}})
    store = PineconeStore(api_key="key", base_url=server.url)
    assert store.search("docs", [1, 0], include_vectors=True) == [
        {"id": "a", "score": 0.9, "metadata": {"t": "x"}, "vector": [1, 0]},
        {"id": "b", "score": 0.1, "metadata": {}, "vector": None},
    ]
    assert server.calls() == ["POST /query"]


# ---- Chroma ----------------------------------------------------------------------------------------------------------

CHROMA = "/api/v2/tenants/default_tenant/databases/default_database/collections"


@pytest.mark.parametrize(("space", "score"), [("cosine", 0.75), ("ip", 0.75), ("l2", 1 / 1.5)])
def test_chroma_collections_go_by_uuid_and_distances_become_scores(serve: Any, space: str, score: float) -> None:
    def answer(method: str, path: str, body: Any) -> Any:
        if path.endswith("/query"):
            return {"ids": [["a", "b"]], "distances": [[0.25, 4.0]], "documents": [["text of a", None]],
                    "metadatas": [[{"n": 1}, None]], "embeddings": None, "uris": None, "include": []}  # fmt: skip
        settings = {"hnsw": {"space": space}, "spann": None}
        return {"id": "the-uuid", "name": "docs", "configuration_json": settings} if "the-uuid" not in path else {}

    server = serve(answer)
    store = ChromaStore(base_url=server.url, api_key="chroma-secret")
    assert store.upsert("docs", [record("a", 1, 0, n=1, text="text of a", gone=None), record("b", 0, 1)]) == 2
    results = store.search("docs", [1, 0], 2, filter={"n": 1})
    assert results[0] == {"id": "a", "score": score, "metadata": {"text": "text of a", "n": 1}}
    assert results[1]["metadata"] == {}
    creation, upsert, opened, query = server.requests
    assert creation[:2] == ("POST", CHROMA)
    assert creation[2] == {"name": "docs", "get_or_create": True, "configuration": {"hnsw": {"space": "cosine"}}}
    assert upsert[1:3] == (f"{CHROMA}/the-uuid/upsert", {
        "ids": ["a", "b"], "embeddings": [[1.0, 0.0], [0.0, 1.0]], "documents": ["text of a", None],
        "metadatas": [{"n": 1, "text": "text of a"}, {}],
    })  # fmt: skip
    assert opened[:2] == ("GET", f"{CHROMA}/docs")
    assert query[1] == f"{CHROMA}/the-uuid/query"
    assert query[2]["where"] == {"n": {"$eq": 1}}
    assert (query[2]["query_embeddings"], query[2]["n_results"]) == ([[1.0, 0.0]], 2)
    assert all(headers["x-chroma-token"] == "chroma-secret" for _, _, _, headers in server.requests)


def test_chroma_says_how_many_it_deleted(serve: Any) -> None:
    server = serve(lambda method, path, body: {"deleted": 3} if path.endswith("delete") else {"id": "u"})
    store = ChromaStore(base_url=server.url, tenant="t t", database="d")
    counts = store.delete("docs", ["a"]), store.delete("docs", filter={"n": {"$in": [1, "a"]}}), store.delete("docs")
    assert counts == (3, 3, 3)
    bodies = [body for method, _, body, _ in server.requests if method == "POST"]
    mixed = {"$or": [{"n": {"$eq": 1}}, {"n": {"$eq": "a"}}]}
    assert bodies == [{"ids": ["a"]}, {"where": mixed}, {"where": {"_": {"$ne": ""}}}]
    assert server.requests[0][1] == "/api/v2/tenants/t%20t/databases/d/collections/docs"


# ---- Weaviate --------------------------------------------------------------------------------------------------------


def test_weaviate_creates_the_collection_and_its_properties(serve: Any) -> None:
    def answer(method: str, path: str, body: Any) -> Any:
        return (404, {}) if method == "GET" else [{"result": {"status": "SUCCESS"}}] if "batch" in path else {}

    server = serve(answer)
    key = str(uuid.uuid4())
    first_metadata = {"text": "x y", "n": 1, "b": True, "tags": ["p"], "mixed": [1, "a"], "odd": {}}
    first_metadata.update({"id": "reserved", "a b": "no name"})
    records = [record("a", 1, 0, **first_metadata), record(key, 0, 1, n=2.5)]
    assert WeaviateStore(base_url=server.url, api_key="weaviate-secret").upsert("docs", records) == 2
    creation, *properties = [body for _, path, body, _ in server.requests if path.startswith("/v1/schema") and body]
    assert creation == {"class": "Docs", "vectorizer": "none", "vectorIndexConfig": {"distance": "cosine"}}
    assert {entry["name"]: (entry["dataType"], entry.get("tokenization")) for entry in properties} == {
        "record": (["text"], "field"), "text": (["text"], "field"), "n": (["number"], None), "b": (["boolean"], None),
        "tags": (["text[]"], "field"),
    }  # fmt: skip
    first, second = server.requests[-1][2]["objects"]
    assert (first["class"], first["vector"]) == ("Docs", [1.0, 0.0])
    assert (uuid.UUID(first["id"]).version, second["id"]) == (5, key)
    assert json.loads(first["properties"].pop("record")) == {"id": "a", "metadata": records[0]["metadata"]}
    assert first["properties"] == {"text": "x y", "n": 1, "b": True, "tags": ["p"]}
    assert all(headers["Authorization"] == "Bearer weaviate-secret" for _, _, _, headers in server.requests)


def test_weaviate_is_searched_by_graphql_whose_values_cannot_break_out(serve: Any) -> None:
    schema = {"class": "Docs", "vectorIndexConfig": {"distance": "cosine"}, "properties": [
        {"name": "title", "dataType": ["text"]}, {"name": "year", "dataType": ["int"]},
        {"name": "author", "dataType": ["Author"]}, {"name": "record", "dataType": ["text"]}]}  # fmt: skip
    ours = json.dumps({"id": "a", "metadata": {"deep": {"x": None}}})
    rows = [{"title": "T", "year": 7, "record": ours, "_additional": {"id": "u1", "distance": 0.25}},
            {"title": "O", "year": None, "record": None, "_additional": {"id": "u2", "distance": 1.5}}]  # fmt: skip
    server = serve(lambda method, path, body: schema if method == "GET" else {"data": {"Get": {"Docs": rows}}})
    evil = '"}) {id}} \\ \n ü'
    wanted = {"title": evil, "year": {"$in": [1, 2]}}
    assert WeaviateStore(base_url=server.url).search("docs", [1, 0.5], 2, filter=wanted) == [
        {"id": "a", "score": 0.75, "metadata": {"deep": {"x": None}}},
        {"id": "u2", "score": -0.5, "metadata": {"title": "O"}},
    ]
    title = f'{{path:["title"] operator:Equal valueText:{json.dumps(evil, ensure_ascii=False)}}}'
    one, two = (f'{{path:["year"] operator:Equal valueInt:{year}}}' for year in (1, 2))
    where = f"where:{{operator:And operands:[{title} {{operator:Or operands:[{one} {two}]}}]}}"
    near, asked = "nearVector:{vector:[1.0, 0.5]} limit:2", "title year record _additional{id distance}"
    assert server.requests[-1][2]["query"] == f"{{Get{{Docs({near} {where}){{{asked}}}}}}}"


def test_weaviate_errors_inside_a_200_are_errors(serve: Any) -> None:
    def answer(method: str, path: str, body: Any) -> Any:
        if path == "/v1/graphql":
            return {"data": {"Get": {"Docs": None}}, "errors": [{"message": "no such prop", "path": ["Get"]}]}
        failed = [{"result": {"status": "SUCCESS"}}, {"result": {"errors": {"error": [{"message": "bad vector"}]}}}]
        return failed if "batch" in path else {"class": "Docs"}

    store = WeaviateStore(base_url=serve(answer).url)
    with pytest.raises(OrchestratorError, match="no such prop"):
        store.search("docs", [1.0])
    with pytest.raises(OrchestratorError, match="bad vector"):
        store.upsert("docs", [record("a", 1)])
    for name in ("docs){", "1", "a-b", "ü"):
        with pytest.raises(ExecutionError, match="letters, digits"):
            store.search(name, [1.0])


def test_weaviate_deletes_until_nothing_is_left(serve: Any) -> None:
    left = iter([(15000, 10000), (5000, 5000), (1, 1), (1, 1)])

    def answer(method: str, path: str, body: Any) -> Any:
        if method != "DELETE":
            return {"class": "Docs"}
        return {"results": dict(zip(("matches", "successful"), next(left)))}

    server = serve(answer)
    store = WeaviateStore(base_url=server.url)
    assert store.delete("docs") == 15000
    assert store.delete("docs", ["a"]) == 1
    assert store.delete("docs", filter={"n": 1}) == 1
    *_, by_id, by_filter = [body["match"] for method, _, body, _ in server.requests if method == "DELETE"]
    assert (by_id["class"], by_id["where"]["path"], len(by_id["where"]["valueTextArray"])) == ("Docs", ["id"], 1)
    assert by_filter["where"] == {"path": ["n"], "operator": "Equal", "valueNumber": 1}


# ---- all databases ---------------------------------------------------------------------------------------------------

REMOTE = [QdrantStore, PineconeStore, ChromaStore, WeaviateStore]


@pytest.mark.parametrize("kind", REMOTE, ids=lambda kind: kind.TYPE)
@pytest.mark.parametrize(
    "nonsense", [[], {}, 7, None, "x", {"result": 1, "matches": 1, "ids": 1, "data": 1, "id": 1}, [[1]]], ids=str
)
def test_an_answer_that_is_none_is_a_bad_response(serve: Any, kind: Any, nonsense: Any) -> None:
    store = kind(base_url=serve(lambda *_: nonsense).url, api_key="key")
    with pytest.raises(engine.BadResponseError):
        store.search("docs", [1.0])
    try:
        store.upsert("docs", [record("a", 1)])
        store.delete("docs", ["a"])
    except OrchestratorError:
        pass


@pytest.mark.parametrize("kind", REMOTE, ids=lambda kind: kind.TYPE)
def test_a_refusal_carries_the_status_and_never_the_key(serve: Any, kind: Any) -> None:
    server = serve(lambda *_: (429, {"error": "RateLimit", "message": "slow down, secret-key-1"}))
    store = kind(base_url=server.url, api_key="secret-key-1")
    calls = (store.search, ("docs", [1.0])), (store.upsert, ("docs", [record("a", 1)])), (store.delete, ("docs",))
    for use, arguments in calls:
        with pytest.raises(engine.RateLimitError) as caught:
            use(*arguments)
        assert (caught.value.status, caught.value.retryable, caught.value.provider) == (429, True, kind.TYPE)
        assert "secret-key-1" not in str(caught.value) + repr(store)


@pytest.mark.parametrize("kind", REMOTE, ids=lambda kind: kind.TYPE)
def test_large_upserts_go_in_batches(serve: Any, kind: Any) -> None:
    def answer(method: str, path: str, body: Any) -> Any:
        return [] if "batch" in path else {"id": "u", "class": "Docs"}

    server = serve(answer)
    store = kind(base_url=server.url, api_key="key")
    assert store.upsert("docs", [record(f"id-{number}", *[0.5] * 1000) for number in range(200)]) == 200
    sizes = [len(entries) for _, _, body, _ in server.requests for name in ("points", "vectors", "ids", "objects")
             for entries in [(body or {}).get(name)] if entries]  # fmt: skip
    assert sizes == [90, 90, 20]


@pytest.mark.parametrize(
    ("kind", "variables", "url", "key"),
    [
        (QdrantStore, {}, "http://localhost:6333", None),
        (QdrantStore, {"QDRANT_URL": "https://q.org:6333/", "QDRANT_API_KEY": "k"}, "https://q.org:6333", "api-key"),
        (PineconeStore, {"PINECONE_INDEX_HOST": "x.pine.io", "PINECONE_API_KEY": "k"}, "https://x.pine.io", "Api-Key"),
        (WeaviateStore, {"WEAVIATE_URL": "x.cloud", "WEAVIATE_API_KEY": "k"}, "https://x.cloud", "Authorization"),
        (ChromaStore, {"CHROMA_HOST": "localhost"}, "http://localhost:8000", None),
        (ChromaStore, {"CHROMA_HOST": "chroma:9000", "CHROMA_API_KEY": "k"}, "http://chroma:9000", "x-chroma-token"),
    ],
)
def test_the_environment_sets_a_client_up(
    monkeypatch: pytest.MonkeyPatch, kind: Any, variables: dict[str, str], url: str, key: str | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    store = kind.from_env(timeout_seconds=3, headers={"X-Extra": "1"})
    sent = store._rest.headers
    assert (store.base_url, store.timeout_seconds, sent["X-Extra"]) == (url, 3, "1")
    keys = [name for name in ("api-key", "Api-Key", "Authorization", "x-chroma-token") if name in sent]
    assert keys == ([key] if key else [])


def test_pinecone_without_a_key_names_the_variable() -> None:
    with pytest.raises(engine.AuthenticationError, match="PINECONE_API_KEY"):
        PineconeStore.from_env()


# ---- the steps -------------------------------------------------------------------------------------------------------

UPSERT = """
name: upsert
steps:
  - id: store
    type: vector_upsert
    database: local
    index: docs
    documents: [one two, {id: second, text: three four, metadata: {n: 2}}]
    embed: {provider: echo, model: m}
  - id: search
    type: vector_search
    depends_on: store
    database: local
    index: docs
    query: four three
    embed: {provider: echo, model: m}
    filter: {n: "{{inputs.n}}"}
    output: [results, info]
"""


def run(text: str, **options: Any) -> Any:
    result = WorkflowExecutor(Workflow.from_yaml(text), **options).run()
    result.raise_for_status()
    return result


def failure(text: str, **options: Any) -> str:
    error = WorkflowExecutor(Workflow.from_yaml(text), **options).run().error
    assert error is not None
    return str(error["message"])


def test_documents_are_stored_and_found_within_a_run_and_across_runs() -> None:
    executor = WorkflowExecutor(Workflow.from_yaml(UPSERT), inputs={"n": 2})
    for _ in range(2):  # what has no id is stored once
        result = executor.run()
        assert result["store"].outputs == {"output": 2}
        results, info = result["search"].outputs["results"], result["search"].outputs["info"]
        assert [(match["id"], match["metadata"]) for match in results] == [("second", {"n": 2, "text": "three four"})]
        assert results[0]["score"] == pytest.approx(1)
        assert info == {"count": 1, "top_k": 5, "database": "local", "index": "docs"}
    assert len(executor._vector_store("local").search("docs", [1.0] * 256, 10)) == 2


def test_the_environment_names_the_file_of_the_local_store_but_not_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLM_ORCHESTRATOR_VECTORS", str(tmp_path / "vectors.db"))
    run(UPSERT, inputs={"n": 2}, offline=True)
    assert not (tmp_path / "vectors.db").exists()
    run(UPSERT, inputs={"n": 2})
    assert len(LocalVectorStore(tmp_path / "vectors.db").search("docs", [1.0] * 256, 10)) == 2


@pytest.mark.parametrize("database", ["local", "qdrant", "pinecone", "weaviate", "chroma"])
def test_offline_every_database_is_local(database: str) -> None:
    result = run(UPSERT.replace("database: local", f"database: {database}"), inputs={"n": 2}, offline=True)
    assert [match["id"] for match in result["search"].outputs["results"]] == ["second"]


def test_vectors_are_stored_as_they_are() -> None:
    text = """
name: vectors
steps:
  - {id: store, type: vector_upsert, database: local, index: i, namespace: "{{inputs.space}}",
     vectors: "{{inputs.records}}"}
  - {id: search, type: vector_search, depends_on: store, database: local, index: i, namespace: s, query: [1, 0],
     top_k: 1, include_vectors: true, include_metadata: false}
"""
    records = [record("a", 0, 1), record("b", 1, 0, n=1)]
    result = run(text, inputs={"records": records, "space": "s"})
    assert result["search"].outputs["output"] == [{"id": "b", "score": 1.0, "vector": [1.0, 0.0]}]
    empty = [{"id": "a", "vector": []}]
    for wrong, message in ((["x"], "record 0: it must be"), ("x", "record 0"), (empty, "vector must")):
        assert message in failure(text, inputs={"records": wrong, "space": "s"})


@pytest.mark.parametrize(
    ("documents", "message"),
    [([1], "documents must be texts"), ([{"id": "a"}], "documents must be texts"), (7, "must be a list"),
     ([{"text": "a", "title": "t"}], "'title' belongs"), ([{"text": "a", "metadata": [1]}], "must be a map"),
     ([{"text": "a", "id": 1.5}], "id must be text")],
    ids=str,
)  # fmt: skip
def test_what_is_no_document_is_refused(documents: Any, message: str) -> None:
    text = UPSERT.replace("[one two, {id: second, text: three four, metadata: {n: 2}}]", '"{{inputs.documents}}"')
    assert message in failure(text, inputs={"documents": documents, "n": 1})


class Embedder:
    """Counts its calls; the vector of a text is its length."""

    max_batch = 3

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def embed(self, request: Any) -> Any:
        self.requests.append(request)
        vectors = [[float(len(text)), 1.0] for text in request.input]
        return engine.EmbeddingResponse(vectors, "model-7", len(request.input))

    complete = None


EMBED = "name: embed\nsteps: [{id: e, type: embed, provider: own, model: m, input: <<inputs.x>>, output: [v, info]%s}]"


@pytest.mark.parametrize(
    ("value", "extra", "vectors", "batches"),
    [
        ("abc", "", [3.0, 1.0], [1]), (["abc"], "", [[3.0, 1.0]], [1]), ([], "", [], []),
        (["a" * n for n in range(8)], "", [[float(n), 1.0] for n in range(8)], [3, 3, 2]),
        (["a" * n for n in range(5)], ", batch_size: 2", [[float(n), 1.0] for n in range(5)], [2, 2, 1]),
        (["a" * n for n in range(5)], ", batch_size: 9", [[float(n), 1.0] for n in range(5)], [3, 2]),
    ],
    ids=["text", "list of one", "empty", "limit of the provider", "smaller batches", "not larger ones"],
)  # fmt: skip
def test_embed_batches_and_keeps_the_order(value: Any, extra: str, vectors: Any, batches: list[int]) -> None:
    provider = Embedder()
    outputs = run(EMBED % extra, inputs={"x": value}, providers={"own": provider})["e"].outputs
    assert outputs["v"] == vectors
    assert [len(request.input) for request in provider.requests] == batches
    model, dimensions = ("model-7", 2) if batches else ("m", 0)
    assert outputs["info"] == {"model": model, "dimensions": dimensions, "tokens_used": sum(batches)}


def test_embed_hands_dimensions_and_kind_of_input_over() -> None:
    provider = Embedder()
    run(EMBED % ", dimensions: 7, input_type: query", inputs={"x": "a"}, providers={"own": provider})
    assert (provider.requests[0].dimensions, provider.requests[0].input_type) == (7, "query")
    run(UPSERT.replace("provider: echo", "provider: own"), inputs={"n": 2}, providers={"own": provider})
    assert [request.input_type for request in provider.requests[1:]] == ["document", "query"]


def test_embed_with_echo_is_the_same_everywhere_and_has_the_asked_size() -> None:
    step = "{id: e, type: embed, provider: echo, model: m, input: [tea time, time tea, x], dimensions: 16}"
    text = f"name: e\nsteps: [{step}]"
    first, second, other = run(text)["e"].outputs["output"]
    assert (first, len(first)) == (second, 16)
    assert math.hypot(*first) == pytest.approx(1)
    assert first != other


class Asynchronous:
    async def upsert(self, index: str, records: Any, namespace: Any = None) -> int:
        self.records = records
        return len(records)

    async def search(self, index: str, vector: Any, top_k: int, **options: Any) -> Any:
        return [{"id": "x", "score": 1.0, **options}]


def test_a_store_of_ones_own_may_be_asynchronous() -> None:
    store = Asynchronous()
    text = UPSERT.replace("database: local", "database: mine")
    assert any("'mine' is unknown here" in str(problem) for problem in Workflow.from_yaml(text).validate())
    result = run(text, inputs={"n": 1}, vector_stores={"mine": store})
    assert len(store.records) == 2
    options = {"filter": {"n": 1}, "namespace": None, "include_metadata": True, "include_vectors": False}
    assert result["search"].outputs["results"] == [{"id": "x", "score": 1.0, **options}]
    with pytest.raises(ValidationError, match="unknown vector database 'mine'"):
        WorkflowExecutor(Workflow.from_yaml(text), inputs={"n": 1}).run()


def test_a_store_that_answers_nonsense_fails_its_step() -> None:
    class Odd:
        def upsert(self, *_: Any) -> Any:
            return object()

    assert "no JSON value" in failure(UPSERT.replace("local", "odd"), inputs={"n": 1}, vector_stores={"odd": Odd()})


def one_step(step: str) -> str:
    for kind in ("search", "upsert"):
        step = re.sub(f"^{kind}", f"type: vector_{kind}, database: local, index: i", step)
    return f"name: w\nsteps:\n  - {{id: a, {step}}}\n"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("search, query: some text", "query is text and needs embed"),
        ("search, query: 'about {{inputs.x}}'", "query is text and needs embed"),
        ("search", "query is missing"),
        ("search, query: [1, a]", "query must be text or a list of numbers"),
        ("type: vector_search, database: local, query: [1]", "index is missing"),
        ("type: vector_search, index: i, query: [1]", "database is missing"),
        ("search, query: [1], top_k: 0", "top_k must be"),
        ("search, query: [1], filter: {n: {$gtt: 3}}", "did you mean '$gt'"),
        ("search, query: a, embed: {provider: echo}", "model is missing"),
        ("search, query: a, embed: {provider: echo, model: m, sice: 3}", "'sice'"),
        ("upsert, documents: [a]", "documents need embed"),
        ("upsert, documents: '{{inputs.x}}'", "documents need embed"),
        ("upsert", "documents or vectors"),
        ("upsert, documents: [a], vectors: [], embed: {provider: echo, model: m}",
         "documents or vectors"),
        ("type: embed, provider: echo, model: m", "input is missing"),
        ("type: embed, provider: echo, model: m, input: 3", "input must be text or a list of texts"),
        ("type: embed, provider: echo, model: m, input: a, batch_size: 0", "batch_size must be"),
    ],
)  # fmt: skip
def test_validate_names_what_is_wrong(step: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Workflow.from_yaml(one_step(step))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "step",
    [
        "search, query: '{{inputs.x}}'",
        "search, query: <<inputs.x>>, top_k: '{{inputs.k}}'",
        "search, query: [1], filter: {n: {$in: '{{inputs.x}}'}}",
    ],
)
def test_what_only_a_run_can_know_passes_validate(step: str) -> None:
    assert Workflow.from_yaml(one_step(step)).validate() == []


@pytest.mark.parametrize(
    ("question", "best"),
    [("How long is the warranty of the kettle?", "warranty"), ("How do I clean it with vinegar?", "cleaning"),
     ("How many degrees for green tea?", "tea")],
)  # fmt: skip
def test_the_rag_example_finds_the_document_that_answers(program: Program, question: str, best: str) -> None:
    done = program.run("run", ROOT / "examples" / "rag.yaml", "--offline", "--set", f"question={question}")
    outputs = json.loads(done.stdout)["outputs"]
    assert outputs["sources"][0]["id"] == best
    assert f"[{best}]" in outputs["answer"]
    assert outputs["stored"] == 3
