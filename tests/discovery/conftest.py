"""Servers on addresses of this machine's loopback network, and a search that is in a hurry."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.discovery import FoundNode, Limits, Search, SearchResult, search
from hydra_llm.networks import read_network

QUICK = Limits(rate=1000.0, connect_seconds=1.0, answer_seconds=2.0)

PAGES = {
    file.stem: file.read_text()
    for file in (Path(__file__).parents[1] / "probes" / "exporters" / "pages").glob("*.prom")
}
"""Of real exporters."""


class _Server6(ThreadingHTTPServer):
    address_family = socket.AF_INET6


class Pages:
    """A server of fixed pages, which keeps what it was asked."""

    def __init__(
        self,
        host: str,
        port: int,
        pages: Mapping[str, tuple[int, str]],
    ) -> None:
        asked: list[tuple[str, dict[str, str]]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
                status, text = pages.get(self.path, (404, ""))
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", text)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.asked = asked
        kind = _Server6 if ":" in host else ThreadingHTTPServer
        self._server = kind((host, port), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> Pages:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def pages(
    pages: Mapping[str, tuple[int, str]],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
) -> Iterator[Pages]:
    with Pages(host, port, pages) as server:
        yield server


def looked(*networks: str, ports: list[int], **about: Any) -> SearchResult:
    """What a search finds, without exporters unless they are named."""
    plan = Search(
        networks=[read_network(one) for one in networks],
        ports=ports,
        **{"exporter_ports": (), "limits": QUICK, **about},
    )
    return asyncio.run(search(plan))


def urls(result: SearchResult) -> list[tuple[str, ...]]:
    return [found.urls for found in result.found]


def only(result: SearchResult) -> FoundNode:
    [found] = result.found
    return found


def free_port(host: str = "127.0.0.1") -> int:
    with closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as one:
        one.bind((host, 0))
        return int(one.getsockname()[1])


def _has_ipv6() -> bool:
    try:
        free_port("::1")
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
needs_socket_list = pytest.mark.skipif(
    not Path("/proc/net/tcp").exists(), reason="the system does not list its sockets"
)
