"""Routers' ledgers that share one redis-server, moved beat by beat."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.sharing.members import Member
from tests.sharing.servers import PROGRAM, RedisServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    if PROGRAM is None:
        pytest.skip("there is no redis-server here (apt install redis-server)")
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def join(server: RedisServer) -> Iterator[Callable[..., Member]]:
    """Makes members of the fleet; no thread runs, each speaks when its test says so."""
    members: list[Member] = []

    def join(*node_ids: str, **about: Any) -> Member:
        members.append(Member(server, *node_ids, **about))
        return members[-1]

    yield join
    for member in members:
        member.sharing._leave()
