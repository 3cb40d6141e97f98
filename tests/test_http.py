"""Room 9, HTTP: what a network can do to a call, against real local sockets."""

from __future__ import annotations

import contextlib
import gc
import gzip
import http.client
import io
import os
import random
import re
import socket
import ssl
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from fault_server import CERTIFICATES, CLOSE, RESET, STALL, FaultServer, chunked, reply, wait_until

import llm_orchestrator
from llm_orchestrator import (
    BadResponseError,
    ProviderConnectionError,
    ProviderError,
    ProviderTimeoutError,
    Workflow,
    WorkflowExecutor,
    _CancelScope,
    _Connection,
    _HttpClient,
    _proxy_for,
    _Target,
)

KEY = "sk-secret-0123456789"
HEADERS = {"Authorization": f"Bearer {KEY}", "X-Api-Key": KEY}
OK = reply(b"fine")
TRUNCATED, GARBAGE, TOO_MUCH = (ProviderConnectionError, True), (BadResponseError, True), (BadResponseError, False)


def sockets() -> set[str]:
    """The open sockets of this process, by their numbers."""
    found = set()
    for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{number}")
            if target.startswith("socket:"):
                found.add(target)
    return found


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """No test leaves a socket or a thread behind."""
    before, threads = sockets(), set(threading.enumerate())
    yield
    wait_until(lambda: sockets() <= before and set(threading.enumerate()) <= threads)


@pytest.fixture
def client() -> Iterator[_HttpClient]:
    made = _HttpClient("vendor", timeout_seconds=30)
    yield made
    made.close()


def post(client: _HttpClient, url: str, **options: Any) -> Any:
    return client.request("POST", url + "/v1/chat?q=hidden", HEADERS, b'{"prompt": "hi"}', **options)


def failure(client: _HttpClient, url: str, **options: Any) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        post(client, url, **options)
    assert KEY not in repr(caught.value) + str(caught.value) + repr(caught.value.__cause__)
    assert "hidden" not in str(caught.value)
    assert caught.value.provider == "vendor"
    return caught.value


# ---- What is understood


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        pytest.param(OK, 200, b"fine", id="content length"),
        pytest.param(chunked(b"fi", b"ne"), 200, b"fine", id="chunked"),
        pytest.param(
            chunked(b"fine", end=b"0;last=1\r\nX-Trailer: 1\r\nX-More: 2\r\n\r\n"), 200, b"fine", id="trailers"
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n0004 ;a=b\r\nfine\r\n0\r\n\r\n",
            200,
            b"fine",
            id="extension",
        ),
        pytest.param(b"HTTP/1.1 200 OK\nContent-Length: 4\n\nfine", 200, b"fine", id="bare newlines"),
        pytest.param(b"HTTP/1.1 200\r\nContent-Length: 4\r\n\r\nfine", 200, b"fine", id="no reason phrase"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-LENGTH : 4\r\n\r\nfine", 200, b"fine", id="odd case and space"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\nfine",
            200,
            b"fine",
            id="same length twice",
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nX-Fold: a\r\n  : b\r\nContent-Length: 4\r\n\r\nfine", 200, b"fine", id="folded header"
        ),
        pytest.param(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK, 200, b"fine", id="1xx"
        ),
        pytest.param(b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", id="204"),
        pytest.param(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 400\r\n\r\n", 304, b"", id="304"),
        pytest.param(reply(b""), 200, b"", id="empty"),
        pytest.param(reply(b"<html>no</html>", 502), 502, b"<html>no</html>", id="an error page"),
        pytest.param(reply(b"x", 999), 999, b"x", id="an unknown status"),
        pytest.param(reply(gzip.compress(b"fine"), headers={"Content-Encoding": "gzip"}), 200, b"fine", id="gzip"),
        pytest.param(
            reply(gzip.compress(b"fi") + gzip.compress(b"ne"), headers={"Content-Encoding": "gzip"}),
            200,
            b"fine",
            id="gzip twice",
        ),
        pytest.param(
            reply(zlib.compress(b"fine"), headers={"Content-Encoding": "deflate"}), 200, b"fine", id="deflate"
        ),
        pytest.param(reply(b"", headers={"Content-Encoding": "gzip"}), 200, b"", id="an empty body said to be gzip"),
        pytest.param(reply(b"fine", headers={"Content-Encoding": "identity"}), 200, b"fine", id="identity"),
        pytest.param(reply(b"x" * 5_000_000), 200, b"x" * 5_000_000, id="5 MB"),
        pytest.param(reply(b"fine", headers={"X-Long": "x" * 100_000}), 200, b"fine", id="100 kB of headers"),
    ],
)
def test_a_correct_answer_is_read_and_its_connection_kept(
    client: _HttpClient, answer: bytes, status: int, body: bytes
) -> None:
    with FaultServer([answer]) as server:
        for _ in range(2):
            response = post(client, server.url)
            assert (response.status, response.body) == (status, body)
        assert server.connections == 1
        request = server.requests[0]
        assert (request.method, request.path, request.body) == ("POST", "/v1/chat?q=hidden", b'{"prompt": "hi"}')
        assert request.headers["host"] == f"127.0.0.1:{server.port}"
        assert request.headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "answer",
    [
        [b"HTTP/1.1 200 OK\r\n\r\nfine", CLOSE],
        [b"HTTP/1.0 200 OK\r\n\r\nfi", b"ne", CLOSE],
        [b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nfine"],
        [reply(b"fine", headers={"Connection": "Close"})],
        [OK + b"more than was promised"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nfine\r\n0\r\n\r\n"],
    ],
    ids=["until the end", "HTTP/1.0 until the end", "HTTP/1.0", "connection: close", "extra bytes", "two framings"],
)
def test_an_answer_that_leaves_the_connection_unusable_is_read_and_closes_it(
    client: _HttpClient, answer: list[Any]
) -> None:
    with FaultServer([answer]) as server:
        assert [post(client, server.url).body for _ in range(2)] == [b"fine", b"fine"]
        assert server.connections == 2


def test_an_http_1_0_server_may_keep_the_connection(client: _HttpClient) -> None:
    answer = b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 4\r\n\r\nfine"
    with FaultServer([answer]) as server:
        assert [post(client, server.url).body for _ in range(2)] == [b"fine", b"fine"]
        assert server.connections == 1


def test_a_head_request_has_no_body(client: _HttpClient) -> None:
    with FaultServer([b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\nContent-Encoding: br\r\n\r\n"]) as server:
        for _ in range(2):
            assert client.request("HEAD", server.url, {}, None).body == b""
        assert server.connections == 1
        assert "content-length" not in server.requests[0].headers


def test_an_answer_in_single_bytes_is_read(client: _HttpClient) -> None:
    whole = chunked(b"fi", b"ne", end=b"0\r\nA: b\r\n\r\n")
    slow = [step for byte in whole for step in (bytes([byte]), 0.0005)]
    with FaultServer([slow]) as server:
        assert post(client, server.url).body == b"fine"


def test_headers_have_lower_case_names_and_several_of_one_name_are_joined(client: _HttpClient) -> None:
    with FaultServer([b"HTTP/1.1 200 OK\r\nX-A:1\r\nx-a: 2\r\nX-B:  caf\xe9 \r\nContent-Length: 0\r\n\r\n"]) as server:
        assert post(client, server.url).headers == {"x-a": "1, 2", "x-b": "caf\xe9", "content-length": "0"}


def test_the_request_is_framed_by_us_whatever_headers_are_given(client: _HttpClient) -> None:
    with FaultServer([OK]) as server:
        given = {
            "content-length": "999",
            "Transfer-Encoding": "chunked",
            "HOST": "elsewhere.test",
            "accept-Encoding": "br",
        }
        assert client.request("PUT", server.url + "/\u00fc?\u00e4=1", given, b"abc").body == b"fine"
        assert client.request("DELETE", server.url, {}, None).body == b"fine"
        request, second = server.requests
        assert (request.path, request.body, request.headers["content-length"]) == ("/%C3%BC?%C3%A4=1", b"abc", "3")
        assert (request.headers["host"], request.headers["accept-encoding"]) == ("elsewhere.test", "br")
        assert "transfer-encoding" not in request.headers and "content-length" not in second.headers
        assert (second.method, second.path) == ("DELETE", "/")


def test_a_user_in_the_address_is_basic_authentication(client: _HttpClient) -> None:
    with FaultServer([OK]) as server:
        client.request("GET", f"http://me:p%40ss@127.0.0.1:{server.port}", {}, None)
        client.request("GET", f"http://me:p%40ss@127.0.0.1:{server.port}", {"authorization": "Bearer x"}, None)
        assert [request.headers["authorization"] for request in server.requests] == ["Basic bWU6cEBzcw==", "Bearer x"]


# ---- What is refused


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param([RESET], TRUNCATED, id="reset before the headers"),
        pytest.param([CLOSE], TRUNCATED, id="closed before the headers"),
        pytest.param([b"HTTP/1.1 20", RESET], TRUNCATED, id="reset in the status line"),
        pytest.param([b"HTTP/1.1 200 OK\r\nContent-Le", RESET], TRUNCATED, id="reset in the headers"),
        pytest.param([b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n", CLOSE], TRUNCATED, id="closed in the headers"),
        pytest.param(
            [b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\nfine", 0.05, RESET], TRUNCATED, id="reset in the body"
        ),
        pytest.param([reply(b"fine").replace(b": 4", b": 40"), CLOSE], TRUNCATED, id="a body shorter than its length"),
        pytest.param([chunked(b"fine", end=b""), CLOSE], TRUNCATED, id="chunked without an end"),
        pytest.param([chunked(b"fine", end=b"40\r\nfi"), CLOSE], TRUNCATED, id="closed in a chunk"),
        pytest.param([chunked(b"fine", end=b"0\r\n"), CLOSE], TRUNCATED, id="closed in the trailers"),
        pytest.param([chunked(b"fine", end=b"zz\r\n\r\n")], GARBAGE, id="a chunk size that is no number"),
        pytest.param([chunked(b"fine", end=b"-1\r\n\r\n")], GARBAGE, id="a negative chunk size"),
        pytest.param([chunked(b"fine", end=b"0x4\r\nfine\r\n0\r\n\r\n")], GARBAGE, id="a prefixed chunk size"),
        pytest.param([chunked(b"fine", end=b"\r\n0\r\n\r\n")], GARBAGE, id="an empty chunk size"),
        pytest.param([chunked(b"fine", end=b"2\r\nlonger\r\n0\r\n\r\n")], GARBAGE, id="a chunk longer than its size"),
        pytest.param(
            [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nfin\r\n0\r\n\r\n", CLOSE],
            GARBAGE,
            id="a chunk a byte short",
        ),
        pytest.param([chunked(b"fine", end=b"f" * 40 + b"\r\n")], GARBAGE, id="an endless chunk size"),
        pytest.param([b"SSH-2.0-OpenSSH_9.6\r\n", STALL], GARBAGE, id="another protocol"),
        pytest.param([b"\x15\x03\x01\x00\x02\x02\x16", STALL], GARBAGE, id="a TLS alert"),
        pytest.param([b"HTTP/2 200\r\n\r\n"], GARBAGE, id="another version"),
        pytest.param([b"HTTP/1.1 abc OK\r\n\r\n"], GARBAGE, id="a status that is no number"),
        pytest.param([b"HTTP/1.1 099 OK\r\n\r\n"], GARBAGE, id="a status below 100"),
        pytest.param([b"HTTP/1.1 101 Switching Protocols\r\n\r\n"], GARBAGE, id="101"),
        pytest.param([b"<html>hello</html>\r\n\r\n", CLOSE], GARBAGE, id="HTTP/0.9"),
        pytest.param([b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n"], GARBAGE, id="a header without a colon"),
        pytest.param(
            [b"HTTP/1.1 200 OK\r\nX: y\rContent-Length: 4\r\n\r\nfine", CLOSE], GARBAGE, id="a bare carriage return"
        ),
        pytest.param(
            [b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nfine!"], GARBAGE, id="two lengths"
        ),
        pytest.param([b"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\nfine"], GARBAGE, id="a negative length"),
        pytest.param([b"HTTP/1.1 200 OK\r\nContent-Length: 0x4\r\n\r\nfine"], GARBAGE, id="a hexadecimal length"),
        pytest.param(
            ["HTTP/1.1 200 OK\r\nContent-Length: \u00b2\r\n\r\nfine".encode("latin-1")],
            GARBAGE,
            id="a superscript length",
        ),
        pytest.param(
            [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"], GARBAGE, id="an unknown transfer encoding"
        ),
        pytest.param([reply(b"not gzip", headers={"Content-Encoding": "gzip"})], GARBAGE, id="gzip that is none"),
        pytest.param(
            [reply(gzip.compress(b"fine" * 99)[:-9], headers={"Content-Encoding": "gzip"})], TRUNCATED, id="half a gzip"
        ),
        pytest.param(
            [reply(b"fine", headers={"Content-Encoding": "br"})], TOO_MUCH, id="an encoding that nobody asked for"
        ),
        pytest.param([b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000], TOO_MUCH, id="endless headers"),
        pytest.param([b"HTTP/1.1 200 OK\r\nX: " + b"y" * 600_000], TOO_MUCH, id="an endless header"),
        pytest.param([b"HTTP/1.1 100 Continue\r\n\r\n" * 100_000], TOO_MUCH, id="endless interim answers"),
        pytest.param([chunked(b"fine", end=b"4;" + b"x" * 600_000)], TOO_MUCH, id="an endless chunk extension"),
        pytest.param(
            [b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n", STALL], TOO_MUCH, id="100 MB are announced"
        ),
        *(
            pytest.param(
                [reply(b"", status, {"Location": "https://elsewhere.test/v1?q=hidden"})],
                TOO_MUCH,
                id=f"redirect {status}",
            )
            for status in (300, 301, 302, 303, 307, 308)
        ),
    ],
)
def test_a_faulty_answer_has_its_error_and_its_retry_decision(
    client: _HttpClient, answer: list[Any], expected: tuple[type[ProviderError], bool]
) -> None:
    with FaultServer([answer]) as server:
        error = failure(client, server.url)
        assert (type(error), error.retryable) == expected, error
        assert f"127.0.0.1:{server.port}" in str(error)
        assert len(server.requests) == 1, "a request is not sent again by itself"
        assert not any(client.idle.values()), "a connection that failed is not kept"


def test_a_redirect_is_named_without_its_query(client: _HttpClient) -> None:
    with FaultServer([reply(b"", 302, {"Location": "https://elsewhere.test/v1?key=k#f"})]) as server:
        error = failure(client, server.url)
        assert "'https://elsewhere.test/v1'" in str(error)
        assert error.status == 302


def test_a_key_that_comes_back_in_nonsense_is_not_shown(client: _HttpClient) -> None:
    def echo(request: Any) -> list[Any]:
        return [f"{request.headers['authorization']} {request.path}\r\n\r\n".encode(), CLOSE]

    with FaultServer([echo]) as server:
        assert "not HTTP" in str(failure(client, server.url))


def test_a_body_without_an_end_is_refused_at_64_mib(client: _HttpClient) -> None:
    endless = [b"HTTP/1.1 200 OK\r\n\r\n", *[b"x" * (1 << 20)] * 200]
    with FaultServer([endless]) as server:
        assert "more than 64 MiB" in str(failure(client, server.url))


def test_a_zip_bomb_is_refused_without_unpacking_it(client: _HttpClient) -> None:
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    bomb = b"".join([*(packer.compress(b"\0" * (1 << 20)) for _ in range(80)), packer.flush()])
    with FaultServer([reply(bomb, headers={"Content-Encoding": "gzip"})]) as server:
        taken = []
        assert "more than 64 MiB" in str(failure(client, server.url, on_bytes=lambda piece: taken.append(len(piece))))
        assert max(taken) <= 1 << 20
        assert sum(taken) <= 64 << 20


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/x",
        "//host/x",
        "http://",
        "host",
        "http://a b/",
        "http://h/\r\nX: y",
        "http://[::1/",
        "http://h:99999/",
        "http://h:x/",
        "http://" + "\u00fc" * 80 + "/",
        "http://me:pass\ufe55word@h/",
        "",
    ],
)
def test_what_is_no_address_is_refused(client: _HttpClient, url: str) -> None:
    with pytest.raises(ProviderConnectionError) as caught:
        client.request("GET", url, {}, None)
    assert not caught.value.retryable
    assert "word" not in str(caught.value)


@pytest.mark.parametrize(
    "headers",
    [
        {"X": "a\r\nY: b"},
        {"X": "a\nb"},
        {"X\r\nY": "a"},
        {"X Y": "a"},
        {"": "a"},
        {"X": "\u201cquoted\u201d"},
        {"X": "a\0"},
        {"X": f"{KEY}\n"},
    ],
    ids=repr,
)
def test_a_header_that_cannot_be_sent_is_refused_without_its_value(
    client: _HttpClient, headers: dict[str, str]
) -> None:
    with FaultServer([OK]) as server:
        with pytest.raises(ProviderConnectionError) as caught:
            client.request("GET", server.url, headers, None)
        assert not caught.value.retryable
        assert KEY not in str(caught.value)
        assert "quoted" not in str(caught.value)
        assert not server.requests


def test_a_method_that_is_no_word_is_refused(client: _HttpClient) -> None:
    with pytest.raises(ProviderConnectionError, match="method"):
        client.request("GET / HTTP/1.1\r\nX: y\r\n\r\nGET", "http://127.0.0.1:9/", {}, None)


ANSWERS = [
    reply(b"hello world"),
    reply(b""),
    chunked(b"ab", b"cdef", b"x" * 300),
    chunked(b"abc", end=b"0\r\nT: x\r\n\r\n"),
    b"HTTP/1.0 200 OK\r\nA: b\r\n\r\nuntil the end",
    b"HTTP/1.1 100 Continue\r\n\r\n" + reply(b"z", 201),
]
PARTS = [
    b"\r\n",
    b"\n",
    b"\r",
    b":",
    b"Content-Length: 3\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"0\r\n\r\n",
    b"HTTP/1.1 ",
    b"f",
    b"-",
]


class Bytes:
    """What http.client takes for a socket."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def makefile(self, *_: Any) -> Any:
        return io.BytesIO(self.content)


@pytest.mark.slow
def test_a_mutated_answer_is_refused_or_read_as_http_client_reads_it(client: _HttpClient) -> None:
    chance = random.Random(7)

    def mutated(content: bytes) -> bytes:
        for _ in range(chance.choice([1, 1, 1, 2, 3, 6])):
            start = chance.randrange(len(content) + 1)
            removed = chance.choice([0, 0, 1, 2, 8, 10_000])
            content = content[:start] + chance.choice([b"", *PARTS]) + content[start + removed :]
        return content

    answers = [mutated(chance.choice(ANSWERS)) for _ in range(2000)]
    both = 0
    with FaultServer([[answer, CLOSE] for answer in answers]) as server:
        for answer in answers:
            try:
                ours = client.request("GET", server.url, {}, None)
            except (ProviderConnectionError, BadResponseError):
                continue
            if not re.search(rb"\n[ \t]", answer):  # http.client keeps the line break of a folded line
                theirs = http.client.HTTPResponse(Bytes(answer))  # type: ignore[arg-type]
                theirs.begin()
                assert (ours.status, ours.body) == (theirs.status, theirs.read()), answer
                both += 1
    assert both > 200


# ---- Connections


def test_a_host_that_does_not_exist_is_named(client: _HttpClient) -> None:
    error = failure(client, "http://no-such-host.invalid")
    assert (type(error), error.retryable) == (ProviderConnectionError, True)
    assert "no-such-host.invalid" in str(error)


@pytest.mark.parametrize("host", ["a" * 70 + ".test", "a..test"])
def test_a_host_name_that_cannot_be_looked_up_is_refused(client: _HttpClient, host: str) -> None:
    assert type(failure(client, f"http://{host}")) is ProviderConnectionError


def test_a_refused_connection_is_a_connection_error(client: _HttpClient) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    error = failure(client, f"http://127.0.0.1:{port}")
    assert (type(error), error.retryable) == (ProviderConnectionError, True)
    assert "refused" in str(error)


@contextlib.contextmanager
def full_server() -> Iterator[str]:
    """The address of a server whose queue is full: connecting to it takes for ever."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        time.sleep(0.05)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_connecting_has_its_own_limit(client: _HttpClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_orchestrator, "_CONNECT_SECONDS", 0.3)
    with full_server() as url:
        error = failure(client, url)
    assert (type(error), error.retryable) == (ProviderTimeoutError, True)
    assert "cannot connect" in str(error)


def test_an_address_that_does_not_answer_leaves_time_for_the_next_one(
    client: _HttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm_orchestrator, "_CONNECT_SECONDS", 1.0)
    with full_server() as url, FaultServer([OK]) as server:
        ports = [int(url.rpartition(":")[2]), server.port]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
        assert post(client, "http://two-addresses.test").body == b"fine"


@pytest.mark.parametrize("certificate", [None, "good"])
@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("left", [b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", b"x", CLOSE, RESET])
def test_what_comes_unasked_on_a_kept_connection_is_never_taken_for_an_answer(
    client: _HttpClient, left: Any, platform: str, certificate: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATES / "authority.pem"))
    llm_orchestrator._tls_context(os.environ["SSL_CERT_FILE"], os.environ.get("SSL_CERT_DIR"))  # on this platform
    monkeypatch.setattr(sys, "platform", platform)
    if platform == "win32":
        monkeypatch.delattr(socket, "MSG_DONTWAIT", raising=False)
    with FaultServer([[OK, 0.07, left], OK], certificate=certificate) as server:  # TLS may be 0.04 s late with the answer
        assert post(client, server.url).body == b"fine"
        time.sleep(0.12)
        assert post(client, server.url).body == b"fine"
        assert server.connections == 2


def test_a_kept_connection_that_the_server_closed_is_not_used(client: _HttpClient) -> None:
    with FaultServer([[OK, CLOSE]]) as server:
        for count in range(1, 4):
            assert post(client, server.url).body == b"fine"
            time.sleep(0.05)
            assert (len(server.requests), server.connections) == (count, count)


@pytest.mark.parametrize("certificate", [None, "good"])
@pytest.mark.parametrize("end", [RESET, CLOSE])
def test_a_kept_connection_that_dies_before_the_first_byte_is_replaced_once(
    client: _HttpClient, end: str, certificate: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATES / "authority.pem"))
    with FaultServer([OK, [end], OK, [end], [end], OK], certificate=certificate) as server:
        assert [post(client, server.url).body for _ in range(2)] == [b"fine", b"fine"]
        assert (len(server.requests), server.connections) == (3, 2)
        error = failure(client, server.url)  # dies on the kept connection and on the new one
        assert (type(error), error.retryable) == (ProviderConnectionError, True)
        assert (len(server.requests), server.connections) == (5, 3)


@pytest.mark.parametrize(
    "begun", [b"H", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"]
)
def test_a_request_is_never_repeated_once_a_byte_of_the_answer_came(client: _HttpClient, begun: bytes) -> None:
    with FaultServer([OK, [begun, 0.05, RESET], OK]) as server:
        post(client, server.url)
        assert failure(client, server.url).retryable
        assert len(server.requests) == 2


def test_an_idle_connection_is_not_trusted_for_ever(client: _HttpClient, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer([OK]) as server:
        post(client, server.url)
        monkeypatch.setattr(llm_orchestrator, "_IDLE_SECONDS", 0)
        post(client, server.url)
        assert server.connections == 2


def test_connections_that_are_in_use_are_not_shared_and_all_are_kept(client: _HttpClient) -> None:
    with FaultServer([[0.2, OK]]) as server:
        for _ in range(2):
            threads = [threading.Thread(target=post, args=(client, server.url)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert (len(server.requests), server.connections) == (16, 8)


def test_a_client_that_is_dropped_closes_its_connections() -> None:
    with FaultServer([OK]) as server:
        client = _HttpClient("vendor")
        post(client, server.url)
        open_before = len(sockets())
        del client
        assert len(sockets()) < open_before or not os.path.isdir("/proc/self/fd")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_does_not_use_the_connections_of_its_parent(client: _HttpClient) -> None:
    with FaultServer([OK]) as server:
        post(client, server.url)
        child = os.fork()
        if not child:
            try:
                post(client, server.url)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        post(client, server.url)
        assert [request.connection for request in server.requests] == [1, 2, 1]


@pytest.mark.skipif(not hasattr(socket, "AF_INET6"), reason="no IPv6")
def test_an_ipv6_address_is_bracketed_in_the_host_header() -> None:
    target = _Target("http://[::1]:8080/x", "")
    assert (target.host, target.port, target.own["Host"]) == ("::1", 8080, "[::1]:8080")
    assert _Target("https://[::1]/x", "").own["Host"] == "[::1]"


def test_an_international_host_is_looked_up_in_ascii() -> None:
    assert _Target("https://b\u00fccher.test/", "").host == "xn--bcher-kva.test"


def test_an_answer_that_comes_before_the_request_is_read_is_taken(client: _HttpClient) -> None:
    too_large = reply(b"too large", 413, {"Connection": "close"})
    with FaultServer([OK], greeting=[too_large, 0.05, CLOSE]) as server:
        try:
            response = client.request("POST", server.url, {}, b"x" * 5_000_000)
        except ProviderConnectionError as error:  # when the reset overtook the answer
            assert error.retryable
        else:
            assert response.status == 413


# ---- Deadlines and cancellation

STALLS = [
    pytest.param({"greeting": [STALL]}, b"x" * 30_000_000, id="sending"),
    pytest.param({"script": [[STALL]]}, b"", id="waiting"),
    pytest.param({"script": [[b"HTTP/1.1 200 OK\r\nCont", STALL]]}, b"", id="headers"),
    pytest.param({"script": [[b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nfi", STALL]]}, b"", id="body"),
    pytest.param({"script": [[b"HTTP/1.1 200 OK\r\n\r\nfi", STALL]]}, b"", id="body without length"),
    pytest.param({"script": [[chunked(b"fi", end=b""), STALL]]}, b"", id="chunks"),
    pytest.param(
        {"script": [[b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"] + [b"x", 0.02] * 500]}, b"", id="slow drip"
    ),
    pytest.param({"script": [[b"HTTP/1.1 200 OK\r\n"] + [b"X: y\r\n", 0.02] * 500]}, b"", id="slow drip of headers"),
    pytest.param({"greeting": [STALL], "certificate": "good"}, b"", id="TLS handshake"),
    pytest.param({"script": [[STALL]], "certificate": "good"}, b"", id="waiting over TLS"),
    pytest.param({"script": [[b"HTTP/1.1 200 OK\r\n\r\nfi", STALL]], "certificate": "good"}, b"", id="body over TLS"),
]


@pytest.mark.parametrize(("settings", "body"), STALLS)
def test_the_deadline_of_a_call_holds_in_every_phase(
    settings: dict[str, Any], body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATES / "authority.pem"))
    client = _HttpClient("vendor", timeout_seconds=0.2)
    with FaultServer(**{"script": [OK], **settings}) as server:
        started = time.monotonic()
        with pytest.raises(ProviderTimeoutError) as caught:
            client.request("POST", server.url, HEADERS, body)
        assert 0.19 < time.monotonic() - started < 3
        assert caught.value.retryable
        assert "no answer" in str(caught.value) and "0.2 s" in str(caught.value)


def in_scope(scope: _CancelScope, outcome: list[Any], client: _HttpClient, *arguments: Any) -> threading.Thread:
    def work() -> None:
        llm_orchestrator._CALL.scope = scope
        try:
            outcome.append(client.request(*arguments))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize(("settings", "body"), STALLS)
@pytest.mark.parametrize("timeout", [None, 60])
def test_a_call_can_be_cancelled_in_every_phase(
    settings: dict[str, Any], body: bytes, timeout: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATES / "authority.pem"))
    client, scope, outcome = _HttpClient("vendor", timeout_seconds=timeout), _CancelScope(), list[Any]()
    with FaultServer(**{"script": [OK], **settings}) as server:
        thread = in_scope(scope, outcome, client, "POST", server.url, HEADERS, body)
        wait_until(lambda: server.requests or (server.connections and "greeting" in settings))
        time.sleep(0.03)
        assert thread.is_alive()
        scope.cancel()
        thread.join(5)
        assert not thread.is_alive()
        assert (type(outcome[0]), outcome[0].retryable) == (ProviderConnectionError, False)
        assert "cancelled" in str(outcome[0])
        assert not any(client.idle.values())


def test_a_call_can_be_cancelled_while_it_connects() -> None:
    scope, outcome, client = _CancelScope(), list[Any](), _HttpClient("vendor")
    with full_server() as url:
        thread = in_scope(scope, outcome, client, "GET", url, {}, None)
        wait_until(lambda: scope.socket is not None)
        time.sleep(0.05)
        scope.cancel()
        thread.join(5)
        assert not thread.is_alive()
    assert "cancelled" in str(outcome[0])


def test_a_cancelled_scope_starts_nothing(client: _HttpClient) -> None:
    scope, outcome = _CancelScope(), list[Any]()
    scope.cancel()
    with FaultServer([OK]) as server:
        in_scope(scope, outcome, client, "GET", server.url, {}, None).join(5)
        assert "cancelled" in str(outcome[0])
        assert not server.requests


def test_a_lookup_that_hangs_does_not_hold_up_a_run_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def lookup(*_: Any) -> Any:
        released.wait(30)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    step = {"id": "a", "type": "action", "action": "http", "url": "http://slow.test/", "timeout_seconds": 0.2}
    workflow = Workflow.from_dict({"name": "t", "steps": [{**step, "retry": {"max_attempts": 1}}]})
    started = time.monotonic()
    result = WorkflowExecutor(workflow).run()
    assert time.monotonic() - started < 10
    assert result.status == "failed"
    released.set()


@pytest.mark.slow
def test_cancelling_at_any_moment_ends_the_call_and_leaves_nothing(client: _HttpClient) -> None:
    with FaultServer([[0.002, OK]]) as server:
        for number in range(150):
            scope, outcome = _CancelScope(), list[Any]()
            thread = in_scope(scope, outcome, client, "GET", server.url, {}, None)
            time.sleep(number % 50 * 0.0001)
            scope.cancel()
            thread.join(5)
            assert not thread.is_alive()
            assert getattr(outcome[0], "status", None) == 200 or "cancelled" in str(outcome[0])
        assert post(client, server.url).body == b"fine"


def test_a_call_in_a_scope_takes_no_thread(client: _HttpClient) -> None:
    seen: list[int] = []
    with FaultServer([OK]) as server:
        post(client, server.url)
        before = threading.active_count()
        post(client, server.url, on_bytes=lambda _: seen.append(threading.active_count()))
        assert seen == [before]


# ---- Pieces of a body


def test_a_body_is_handed_over_as_it_arrives(client: _HttpClient) -> None:
    begun = threading.Event()
    with FaultServer([[chunked(b"a", b"b", end=b""), 0.3, b"1\r\nc\r\n0\r\n\r\n"]]) as server:
        pieces: list[tuple[bytes, float]] = []
        response = post(
            client, server.url, on_bytes=lambda piece: pieces.append((piece, time.monotonic())) or begun.set()
        )
        assert (response.body, [piece for piece, _ in pieces]) == (b"", [b"a", b"b", b"c"])
        assert pieces[2][1] - pieces[1][1] > 0.2


def test_the_body_of_an_error_is_not_handed_over(client: _HttpClient) -> None:
    with FaultServer([reply(b"no", 500)]) as server:
        assert post(client, server.url, on_bytes=lambda piece: pytest.fail("it was")).body == b"no"


@pytest.mark.parametrize(
    ("rest", "connections"), [([b"0\r\n\r\n"], 1), ([0.05, b"0\r\n\r\n"], 1), ([STALL], 2), ([b"zz\r\n"], 2)], ids=repr
)
def test_a_reader_who_has_had_enough_does_not_wait_for_the_end(
    client: _HttpClient, rest: list[Any], connections: int
) -> None:
    with FaultServer([[chunked(b"data: [DONE]", end=b""), *rest], OK]) as server:
        started = time.monotonic()
        assert post(client, server.url, on_bytes=lambda _: True).status == 200
        assert time.monotonic() - started < 3
        post(client, server.url)
        assert server.connections == connections


@pytest.mark.parametrize(
    "error", [KeyError("x"), ValueError("x"), OSError("x"), KeyboardInterrupt(), BadResponseError("x")], ids=repr
)
def test_an_error_of_the_reader_passes_unchanged(client: _HttpClient, error: BaseException) -> None:
    def reader(_: bytes) -> None:
        raise error

    with FaultServer([chunked(b"fine")]) as server:
        with pytest.raises(type(error)) as caught:
            post(client, server.url, on_bytes=reader)
        assert caught.value is error
        assert not any(client.idle.values())


# ---- TLS


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATES / "authority.pem"))


def test_a_private_authority_is_trusted_through_ssl_cert_file(client: _HttpClient, trusted: None) -> None:
    with FaultServer([OK], certificate="good") as server:
        assert [post(client, server.url).body for _ in range(2)] == [b"fine", b"fine"]
        assert server.connections == 1


def test_a_private_authority_is_trusted_through_ssl_cert_dir(
    client: _HttpClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    authority = (CERTIFICATES / "authority.pem").read_bytes()
    (tmp_path / "f20e0b1e.0").write_bytes(authority)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    with FaultServer([OK], certificate="good") as server:
        assert post(client, server.url).body == b"fine"


@pytest.mark.parametrize("certificate", ["expired", "other_host"])
def test_a_wrong_certificate_is_refused_for_good(client: _HttpClient, certificate: str, trusted: None) -> None:
    with FaultServer([OK], certificate=certificate) as server:
        error = failure(client, server.url)
        assert (type(error), error.retryable) == (ProviderConnectionError, False)
        assert "certificate" in str(error)
        assert not server.requests


def test_an_unknown_authority_is_refused_for_good(client: _HttpClient) -> None:
    with FaultServer([OK], certificate="good") as server:
        error = failure(client, server.url)
        assert (type(error), error.retryable) == (ProviderConnectionError, False)
        assert not server.requests


def test_an_ssl_cert_file_that_is_missing_is_named(client: _HttpClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/file.pem")
    with pytest.raises(ProviderConnectionError, match="SSL_CERT_FILE") as caught:
        post(client, "https://127.0.0.1:9")
    assert not caught.value.retryable


@pytest.mark.parametrize(
    "greeting", [[CLOSE], [RESET], [b"HTTP/1.1 400 Bad Request\r\n\r\n", CLOSE]], ids=["close", "reset", "no TLS"]
)
def test_a_tls_handshake_that_fails_is_a_connection_error(
    client: _HttpClient, greeting: list[Any], trusted: None
) -> None:
    with FaultServer([OK], greeting=greeting) as server:
        error = failure(client, server.url.replace("http:", "https:"))
        assert (type(error), error.retryable) == (ProviderConnectionError, True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # before 3.13 it is freed, not closed
def test_a_connection_that_is_reset_before_tls_begins_leaves_no_socket(
    client: _HttpClient, trusted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrap, before, collecting = ssl.SSLContext.wrap_socket, sockets(), gc.isenabled()

    def is_reset(sock: socket.socket) -> bool:
        try:
            return not sock.getpeername()
        except OSError:
            return True

    def late(context: ssl.SSLContext, sock: socket.socket, **options: Any) -> Any:
        wait_until(lambda: is_reset(sock))
        return wrap(context, sock, **options)

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", late)
    gc.disable()
    try:
        with FaultServer([OK], greeting=[RESET]) as server:
            error = failure(client, server.url.replace("http:", "https:"))
        assert (type(error), error.retryable) == (ProviderConnectionError, True)
        wait_until(lambda: sockets() <= before)
    finally:
        if collecting:
            gc.enable()


@pytest.mark.parametrize(
    "begun", [b"", b"HTTP/1.1 200 OK\r\nContent-Le", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nfi"]
)
def test_a_tls_server_that_closes_early_is_a_connection_error(client: _HttpClient, begun: bytes, trusted: None) -> None:
    with FaultServer([[begun, CLOSE]], certificate="good") as server:
        error = failure(client, server.url)
        assert (type(error), error.retryable) == (ProviderConnectionError, True)


def test_https_without_ssl_says_so_even_when_the_host_does_not_exist(
    client: _HttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm_orchestrator._tls_context.cache_clear()
    monkeypatch.setitem(sys.modules, "ssl", None)
    error = failure(client, "https://no-such-host.invalid")
    assert (type(error), error.retryable) == (ProviderConnectionError, False)
    assert "ssl" in str(error)


# ---- Proxies

ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


def test_http_goes_through_a_proxy_with_the_whole_address(client: _HttpClient, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer([OK]) as proxy:
        monkeypatch.setenv("http_proxy", f"http://me:p%40ss@127.0.0.1:{proxy.port}")
        assert [post(client, "http://far.test:8080").body for _ in range(2)] == [b"fine", b"fine"]
        assert proxy.connections == 1
        request = proxy.requests[0]
        assert (request.path, request.headers["host"]) == ("http://far.test:8080/v1/chat?q=hidden", "far.test:8080")
        assert request.headers["proxy-authorization"] == "Basic bWU6cEBzcw=="


def test_https_goes_through_a_tunnel_that_sees_no_key(
    client: _HttpClient, trusted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultServer([OK], certificate="good") as server, FaultServer([ESTABLISHED], relay=server) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"me:pass@127.0.0.1:{proxy.port}")
        assert [post(client, "https://proxied.test").body for _ in range(2)] == [b"fine", b"fine"]
        (request,) = proxy.requests
        assert (request.method, request.path, request.headers["host"]) == (
            "CONNECT",
            "proxied.test:443",
            "proxied.test:443",
        )
        assert request.headers["proxy-authorization"] == "Basic bWU6cGFzcw=="
        assert "authorization" not in request.headers
        assert "proxy-authorization" not in server.requests[0].headers
        assert (server.requests[0].path, server.requests[0].headers["host"]) == ("/v1/chat?q=hidden", "proxied.test")
        client.close()


@pytest.mark.parametrize(("status", "retryable"), [(407, False), (403, False), (502, True), (503, True), (429, True)])
def test_a_proxy_that_refuses_the_tunnel_is_a_connection_error(
    client: _HttpClient, status: int, retryable: bool
) -> None:
    with FaultServer([[reply(b"no", status, {"Proxy-Authenticate": "Basic"})]]) as proxy:
        client = _HttpClient("vendor", proxy=f"http://me:{KEY}@127.0.0.1:{proxy.port}")
        error = failure(client, "https://far.test")
        assert (type(error), error.retryable) == (ProviderConnectionError, retryable)
        assert str(status) in str(error)
        assert "far.test:443" in str(error)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([CLOSE], TRUNCATED),
        ([RESET], TRUNCATED),
        ([b"garbage\r\n\r\n"], GARBAGE),
        ([ESTABLISHED, CLOSE], TRUNCATED),
        ([ESTABLISHED + b"HTTP/1.1 200 OK\r\n\r\n", CLOSE], TRUNCATED),
    ],
    ids=["close", "reset", "garbage", "closed after the consent", "no TLS"],
)
def test_a_proxy_that_breaks_down_is_told_from_a_good_one(answer: list[Any], expected: tuple[Any, bool]) -> None:
    with FaultServer([answer]) as proxy:
        client = _HttpClient("vendor", proxy=proxy.url)
        error = failure(client, "https://far.test")
        assert (type(error), error.retryable) == expected


def test_a_proxy_that_stalls_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_orchestrator, "_CONNECT_SECONDS", 0.3)
    with FaultServer([[STALL]]) as proxy:
        error = failure(_HttpClient("vendor", proxy=proxy.url), "https://far.test")
        assert (type(error), error.retryable) == (ProviderTimeoutError, True)


@pytest.mark.parametrize(
    "proxy", ["socks5://127.0.0.1:1", "https://127.0.0.1:1", f"http://me:{KEY}:x@h:y", f"http://u:{KEY}/@h"]
)
def test_a_proxy_of_another_kind_is_refused_without_its_password(proxy: str) -> None:
    error = failure(_HttpClient("vendor", proxy=proxy), "https://far.test")
    assert not error.retryable
    assert "proxy" in str(error)


@pytest.mark.parametrize(
    ("environment", "address", "proxy"),
    [
        ({"http_proxy": "http://p:1"}, ("http", "h.test", 80), "http://p:1"),
        ({"HTTP_PROXY": "http://p:1"}, ("http", "h.test", 80), "http://p:1"),
        ({"HTTP_PROXY": "http://p:1"}, ("https", "h.test", 443), None),
        ({"HTTPS_PROXY": "http://p:1"}, ("https", "h.test", 443), "http://p:1"),
        ({"https_proxy": "http://p:1", "HTTPS_PROXY": "http://q:1"}, ("https", "h.test", 443), "http://p:1"),
        ({"https_proxy": "", "HTTPS_PROXY": "http://q:1"}, ("https", "h.test", 443), "http://q:1"),
        ({"all_proxy": "http://p:1"}, ("https", "h.test", 443), "http://p:1"),
        ({"ALL_PROXY": "http://p:1"}, ("http", "h.test", 80), "http://p:1"),
        ({"HTTP_PROXY": "http://p:1", "REQUEST_METHOD": "GET"}, ("http", "h.test", 80), None),
        ({"http_proxy": "http://p:1", "REQUEST_METHOD": "GET"}, ("http", "h.test", 80), "http://p:1"),
        *(
            ({"ALL_PROXY": "http://p:1", name: exceptions}, ("https", host, port), "http://p:1" if through else None)
            for name in ("no_proxy", "NO_PROXY")
            for exceptions, host, port, through in [
                ("*", "h.test", 443, False),
                ("h.test", "h.test", 443, False),
                ("test", "h.test", 443, False),
                (".h.test", "a.h.test", 443, False),
                ("*.h.test", "a.h.test", 443, False),
                ("h.test", "ah.test", 443, True),
                ("a.test, H.TEST", "h.test", 443, False),
                ("a.test h.test", "h.test", 443, False),
                ("h.test:443", "h.test", 443, False),
                ("h.test:80", "h.test", 443, True),
                ("10.0.0.0/8", "10.1.2.3", 443, False),
                ("10.0.0.0/8", "11.1.2.3", 443, True),
                ("10.0.0.0/8", "h.test", 443, True),
                ("nonsense/99", "h.test", 443, True),
                ("::1", "::1", 443, False),
                ("[::1]:443", "::1", 443, False),
                ("[::1]:80", "::1", 443, True),
                ("2001:db8::/32", "2001:db8::5", 443, False),
                ("", "h.test", 443, True),
                (",", "h.test", 443, True),
                (".", "h.test", 443, True),
                ("127.0.0.1", "127.0.0.1", 443, False),
                ("2001:db8:0:0:0:0:0:5", "::5", 443, True),
            ]
        ),
    ],
)
def test_the_environment_names_the_proxy(
    environment: dict[str, str], address: tuple[str, str, int], proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _proxy_for(*address) == proxy


def test_an_empty_proxy_means_none_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with FaultServer([OK]) as server:
        client = _HttpClient("vendor", proxy="")
        assert post(client, server.url).body == b"fine"
        client.close()


def test_connections_to_many_hosts_are_not_all_kept(client: _HttpClient) -> None:
    pairs = [socket.socketpair() for _ in range(200)]
    for number, (near, _) in enumerate(pairs):
        client.keep(("host", number), _Connection(near))
    assert [key[1] for key in client.idle] == list(range(136, 200))  # the latest
    assert [near.fileno() == -1 for near, _ in pairs] == [True] * 136 + [False] * 64
    for _, far in pairs:
        far.close()


def test_a_request_timeout_on_a_kept_connection_is_not_the_answer(client: _HttpClient) -> None:
    late = reply(b"", status=408, headers={"Connection": "close"})
    with FaultServer([OK, [late, CLOSE], OK, [late, CLOSE]]) as server:
        assert [post(client, server.url).body for _ in range(2)] == [b"fine", b"fine"]
        assert (server.connections, len(server.requests)) == (2, 3)
        client.close()
        assert post(client, server.url).status == 408  # of a new connection it is
