"""A client that sees all there is to see of an HTTP exchange."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field

import h11


@dataclass
class Seen:
    """What came back, and how it ended in the words of the recordings."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    chunks: list[bytes] = field(default_factory=list)
    end: str | None = None

    @property
    def lines(self) -> list[str]:
        return [line for line in self.body.decode().split("\n") if line]


def exchange(
    host: str,
    port: int,
    method: str,
    path: str,
    *,
    headers: dict[str, str],
    body: bytes,
    leave_after: int | None = None,
    sent: Callable[[], None] = lambda: None,
) -> Seen:
    """Send one request and read the answer to its end; ``leave_after`` so many lines, hang up."""
    seen = Seen()
    http = h11.Connection(h11.CLIENT)
    with socket.create_connection((host, port), timeout=20) as sock:
        sock.sendall(
            http.send(h11.Request(method=method, target=path, headers=list(headers.items()))) or b""
        )
        if body:
            sock.sendall(http.send(h11.Data(data=body)) or b"")
        sock.sendall(http.send(h11.EndOfMessage()) or b"")
        sent()
        while True:
            try:
                event = http.next_event()
            except h11.RemoteProtocolError:
                early = seen.status is None
                seen.end = (
                    "connection closed before any response"
                    if early
                    else "connection closed by the peer without the terminal chunk"
                )
                return seen
            if event is h11.NEED_DATA:
                try:
                    http.receive_data(sock.recv(65536))
                except ConnectionError:
                    http.receive_data(b"")
            elif isinstance(event, h11.Response):
                seen.status = event.status_code
                seen.headers = {k.decode().lower(): v.decode() for k, v in event.headers}
            elif isinstance(event, h11.Data):
                seen.body += event.data
                seen.chunks.append(bytes(event.data))
                if leave_after is not None and len(seen.lines) >= leave_after:
                    seen.end = "closed by the client"
                    return seen
            elif isinstance(event, h11.EndOfMessage):
                chunked = "transfer-encoding" in seen.headers
                seen.end = "terminal chunk received" if chunked else "complete (Content-Length)"
                return seen
            elif isinstance(event, h11.ConnectionClosed):
                seen.end = "connection closed before any response"
                return seen
