"""The watch on leftovers, watched."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LEAKY = """
import asyncio
import socket
import threading

import pytest

kept = []


def test_a_daemon_thread():
    threading.Thread(target=threading.Event().wait, name="lost", daemon=True).start()


def test_a_socket():
    kept.append(socket.socket())


def test_a_file(tmp_path):
    kept.append((tmp_path / "x").open("w"))


async def test_a_task():
    kept.append(asyncio.create_task(asyncio.sleep(60)))


@pytest.mark.leaks
def test_a_mark_without_a_reason():
    pass
"""

CLEAN = """
import asyncio
import socket
import threading

import pytest

kept = []


@pytest.mark.leaks(reason="shows that one may")
def test_what_is_marked():
    kept.append(socket.socket())


def test_a_thread_that_is_about_to_end():
    threading.Timer(0.1, lambda: None).start()


async def test_a_task_that_is_about_to_end():
    kept.append(asyncio.create_task(asyncio.sleep(0.1)))


async def test_a_helper_thread_of_the_loop():
    await asyncio.to_thread(lambda: None)


@pytest.fixture
async def server():
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()


@pytest.fixture
async def ticking():
    task = asyncio.create_task(asyncio.sleep(60))
    yield
    task.cancel()


async def test_what_fixtures_close(server, ticking):
    reader, writer = await asyncio.open_connection(*server)
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


@pytest.fixture(scope="module")
def shared():
    with socket.socket() as sock:
        yield sock


def test_what_a_wider_fixture_holds(shared):
    assert shared.fileno() > 0
"""


def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tests: str) -> pytest.RunResult:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeini(
        "[pytest]\n"
        "asyncio_mode = auto\n"
        "asyncio_default_fixture_loop_scope = function\n"
        "leak_grace_seconds = 0.3\n"
        "addopts = --strict-markers -p tests.leaks\n"
    )
    pytester.makepyfile(tests)
    return pytester.runpytest_subprocess()


def test_whatever_a_test_leaves_behind_fails_it(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(pytester, monkeypatch, LEAKY)

    result.assert_outcomes(passed=4, errors=5)
    result.stdout.fnmatch_lines_random(
        [
            "the test left behind: daemon thread 'lost'",
            "the test left behind: socket:* (fd *)",
            "the test left behind: *test_a_file0/x (fd *)",
            "the test left behind: task 'sleep'",
            "@pytest.mark.leaks needs a reason",
        ]
    )


def test_what_is_closed_in_time_or_marked_passes(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(pytester, monkeypatch, CLEAN)

    result.assert_outcomes(passed=6)
