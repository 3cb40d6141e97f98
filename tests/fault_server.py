"""A server on a real local socket that answers as scripted, for every test of what a network can do.

    with FaultServer([reply(b'{"ok": 1}'), [reply(status=503)], [b"HTTP/1.1 200 OK\\r\\n", RESET]]) as server:
        ...  # server.url; server.requests

The script has one entry a request, over all connections in the order of arrival; the last entry serves all that
follow. An entry is bytes or a list of what to do: bytes are sent, a number is waited for (seconds), RESET, CLOSE and
STALL do what they say; a function of the Request returns an entry. After an entry the connection waits for its next
request.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import struct
import threading
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple, Union

CERTIFICATES = Path(__file__).resolve().parent / "certificates"
RESET, CLOSE, STALL = "reset", "close", "stall"


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes
    connection: int  # from 1, in the order of acceptance


Script = list[Union[bytes, list[Any], Callable[[Request], Any]]]


def reply(body: bytes = b"{}", status: int = 200, headers: dict[str, str] | None = None) -> bytes:
    """A correct answer with a content length."""
    lines = [
        f"HTTP/1.1 {status} Status",
        f"Content-Length: {len(body)}",
        *(f"{k}: {v}" for k, v in (headers or {}).items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def json_reply(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> bytes:
    return reply(json.dumps(document).encode(), status, {"Content-Type": "application/json", **(headers or {})})


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n", headers: str = "") -> bytes:
    """A correct answer in these chunks, unless `end` says otherwise."""
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n{headers}\r\n".encode() + chunks + end


def sse(*events: Any) -> bytes:
    """A correct stream of server-sent events; a map is sent as JSON."""
    texts = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return chunked(*(f"data: {text}\n\n".encode() for text in texts), headers="Content-Type: text/event-stream\r\n")


class FaultServer:
    """See above. `certificate`: TLS with tests/certificates/NAME.pem. `greeting`: done on each new connection before
    anything is read. `relay` (another FaultServer): a CONNECT that the script answers with 200 leads there, whatever
    host it asks for.
    """

    def __init__(
        self,
        script: Script,
        *,
        certificate: str | None = None,
        greeting: list[Any] | None = None,
        relay: FaultServer | None = None,
    ) -> None:
        self.script, self.greeting, self.relay, self.requests = script, greeting or [], relay, list[Request]()
        self.connections, self.lock, self.stopped = 0, threading.Lock(), threading.Event()
        self.sockets: list[socket.socket] = []
        self.threads: list[threading.Thread] = []
        self.context = None
        if certificate:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(CERTIFICATES / f"{certificate}.pem")

    def __enter__(self) -> FaultServer:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self.listener.getsockname()[1]
        self.url = f"{'https' if self.context else 'http'}://127.0.0.1:{self.port}"
        self.start(self.accept)
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        with self.lock:
            for sock in self.sockets:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)  # an SSLSocket's own is not for other threads
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive(), "a thread of the server is left"

    def start(self, target: Callable[..., Any], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self.threads.append(thread)
        thread.start()

    def accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.start(self.serve, sock)

    def serve(self, sock: socket.socket) -> None:
        with self.lock:
            self.sockets.append(sock)
            self.connections += 1
            number = self.connections
            if self.stopped.is_set():  # accepted at the last moment: nobody would end it
                sock.close()
                return
        try:
            alive = self.act(sock, self.greeting)
            if alive and self.context:
                sock = self.context.wrap_socket(sock, server_side=True)
                with self.lock:
                    self.sockets.append(sock)
            with sock.makefile("rb") as stream:
                while alive and (request := self.read(stream, number)):
                    alive = self.answer(sock, request)
        except (OSError, ValueError):
            pass
        finally:
            with self.lock:
                sock.close()

    def read(self, stream: Any, number: int) -> Request | None:
        first = stream.readline().decode("latin-1").split()
        if len(first) != 3:
            return None
        headers = {}
        while line := stream.readline().decode("latin-1").strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = stream.read(int(headers.get("content-length", 0)))
        return Request(first[0], first[1], headers, body, number)

    def answer(self, sock: socket.socket, request: Request) -> bool:
        with self.lock:
            entry = self.script[min(len(self.requests), len(self.script) - 1)]
            self.requests.append(request)
        entry = entry(request) if callable(entry) else entry
        actions = [entry] if isinstance(entry, bytes) else entry
        alive = self.act(sock, actions)
        if alive and self.relay and request.method == "CONNECT" and b" 200 " in actions[0][:13]:
            self.tunnel(sock)
            return False
        return alive

    def act(self, sock: socket.socket, actions: list[Any]) -> bool:
        """Whether the connection is still there afterwards."""
        for action in actions:
            if isinstance(action, bytes):
                sock.sendall(action)
            elif action == STALL:
                self.stopped.wait()
            elif action in (RESET, CLOSE):
                if action == RESET:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    sock.shutdown(socket.SHUT_RDWR)
                return False
            elif self.stopped.wait(action):
                return False
        return True

    def tunnel(self, sock: socket.socket) -> None:
        assert self.relay is not None
        with socket.create_connection(("127.0.0.1", self.relay.port)) as far:
            with self.lock:
                self.sockets.append(far)
            self.start(self.pump, far, sock)
            self.pump(sock, far)

    @staticmethod
    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                sink.sendall(piece)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


def wait_until(condition: Callable[[], Any], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)
