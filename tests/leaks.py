"""
Fail every test that leaves something behind.

What counts: threads, asyncio tasks, and, where there is a `/proc`, open sockets and files. Closing
is asynchronous in places, so a test has two seconds of grace. A test that means to leave something
says so: `@pytest.mark.leaks(reason="...")`.

A fixture of a wider scope is set up before a test is watched, so what it opens is its own affair.
"""

import asyncio
import inspect
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

FDS = Path("/proc/self/fd")

ALLOWED_THREADS = {
    "pydevd": "a debugger's own",
    "pytest_timeout": "holds the time limit where there are no signals",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "leak_grace_seconds", "how long a test's leftovers may take to close", default="2"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "leaks(reason): leaves something behind, and may.")


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compare what is open before a test, and before its fixtures, with what is after it."""
    marker = request.node.get_closest_marker("leaks")
    if marker is not None:
        if not marker.kwargs.get("reason"):
            pytest.fail("@pytest.mark.leaks needs a reason", pytrace=False)
        yield
        return

    threads, files = _threads(), _open_files()
    yield

    def leftovers() -> list[str]:
        opened = {f"{target} (fd {fd})" for fd, target in _open_files() - files}
        return [_describe(thread) for thread in _threads() - threads] + sorted(opened)

    if found := _after_grace(leftovers, _grace_seconds(request)):
        pytest.fail(f"the test left behind: {'; '.join(found)}", pytrace=False)


@pytest.fixture(autouse=True)
def no_task_is_left_behind(
    request: pytest.FixtureRequest,
    nothing_is_left_behind: None,
) -> None:
    """Watch the tasks of an async test; the rest is watched around it, event loop included."""
    # A sync test must not be given a loop. Where there is one, what it opens closes before
    # `nothing_is_left_behind` looks, because this fixture stands on that one.
    is_async = inspect.iscoroutinefunction(getattr(request.node, "obj", None))
    if is_async and not request.node.get_closest_marker("leaks"):
        request.getfixturevalue("no_task_of_the_loop_is_left_behind")


@pytest.fixture
async def no_task_of_the_loop_is_left_behind(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """Look for tasks after the test's other fixtures are done, before its loop cancels them."""
    before = asyncio.all_tasks()
    yield
    deadline = time.monotonic() + _grace_seconds(request)
    while found := asyncio.all_tasks() - before - {asyncio.current_task()}:
        if time.monotonic() > deadline:
            names = "; ".join(f"task {_name_of(task)!r}" for task in found)
            pytest.fail(f"the test left behind: {names}", pytrace=False)
        await asyncio.sleep(0.01)


def _after_grace(leftovers: Callable[[], list[str]], grace_seconds: float) -> list[str]:
    deadline = time.monotonic() + grace_seconds
    while (found := leftovers()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def _grace_seconds(request: pytest.FixtureRequest) -> float:
    return float(request.config.getini("leak_grace_seconds"))


def _threads() -> set[threading.Thread]:
    return {
        thread
        for thread in threading.enumerate()
        if not any(thread.name.startswith(prefix) for prefix in ALLOWED_THREADS)
    }


def _describe(thread: threading.Thread) -> str:
    return f"{'daemon thread' if thread.daemon else 'thread'} {thread.name!r}"


def _name_of(task: asyncio.Task[object]) -> str:
    return getattr(task.get_coro(), "__qualname__", task.get_name())


def _open_files() -> set[tuple[int, str]]:
    """Return file descriptors with what they point at, since their numbers are used again."""
    found = set()
    for link in FDS.iterdir() if FDS.is_dir() else ():
        try:
            found.add((int(link.name), os.readlink(link)))  # noqa: PTH115  # "socket:[1]" is no path
        except FileNotFoundError:  # the descriptor that listed this very folder
            continue
    return found
