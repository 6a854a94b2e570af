"""
LiteLLM's own tests, as they are and with our strategy in place.

    python -m tests.litellm.upstream PATH...

Takes test files of a checkout of LiteLLM's repository, which are no part of ours. They run three
times, each in a process of its own: without us, with our callback as in the proxy, and with
`install()` on every router. Prints how many tests pass each way, and names each test that passes
without us alone, or not even so. Exits 1 if any passes without us alone.

A test may reach nothing but loopback. `LITELLM_LOCAL_MODEL_COST_MAP` is set.
"""

from __future__ import annotations

import argparse
import functools
import ipaddress
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

WITHOUT, CALLBACK, INSTALL = WAYS = ("without", "callback", "install")
NO_NETWORK = "no network but loopback here"

# What the process of a file's tests is told.
_WAY, _RESULTS = "HYDRA_UPSTREAM_WAY", "HYDRA_UPSTREAM_RESULTS"


@dataclass
class Result:
    """What became of one test."""

    outcome: str
    reason: str = ""
    asked: int = 0
    """How often LiteLLM asked our strategy."""


# ------------------------------------------------------------------------- the command


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.litellm.upstream")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    given = parser.parse_args(arguments)
    print(f"litellm {_version()}: passed/failed, and in how many tests we were asked")
    print(f"{'file':<50} {'without us':>12} {'callback':>16} {'install()':>16}", flush=True)
    ways = {way: run(given.paths, way) for way in WAYS}
    otherwise = False
    totals: dict[str, Counter[str]] = {way: Counter() for way in WAYS}
    for file in sorted({file for results in ways.values() for file in results}):
        results = {way: ways[way].get(file, {}) for way in WAYS}
        for way in WAYS:
            totals[way] += counts(results[way])
        print(_line(Path(file).name, {way: counts(results[way]) for way in WAYS}))
        lines = differing(results)
        otherwise = otherwise or bool(lines)
        print("".join(f"    {line}\n" for line in lines + failing(results[WITHOUT])), end="")
    print(_line("all", totals))
    return 1 if otherwise else 0


def run(paths: Sequence[Path], way: str) -> dict[str, dict[str, Result]]:
    """Run the tests of some files; what each test came to, by its file and its name."""
    files = [path.resolve() for path in paths]
    folders = sorted({str(file.parent) for file in files})
    with tempfile.TemporaryDirectory() as folder:
        results, settings = Path(folder, "results.json"), Path(folder, "pytest.ini")
        settings.write_text(
            "[pytest]\nasyncio_mode = auto\npythonpath =\n    " + "\n    ".join(folders) + "\n"
        )
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HYDRA_LLM_")},
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            # This file is the plugin, by a name that a checkout's own `tests` do not hide.
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parent), str(Path.cwd()), os.environ.get("PYTHONPATH", "")]
            ),
            _WAY: way,
            _RESULTS: str(results),
        }
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "-p", "upstream", "-p", "no:cacheprovider"),
                *("-c", str(settings), f"--rootdir={os.path.commonpath(folders)}"),
                *("--import-mode=importlib", "--continue-on-collection-errors"),
                *map(str, files),
            ],
            env=environment,
            cwd=folders[0],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if not results.exists():
            said = done.stdout.decode(errors="replace")
            raise RuntimeError(f"pytest ended with {done.returncode}: {said}")
        read = json.loads(results.read_text())
    return {
        file: {name: Result(**about) for name, about in tests.items()}
        for file, tests in read.items()
    }


def differing(results: Mapping[str, Mapping[str, Result]]) -> list[str]:
    """Tell of each test that passes without us and not with us."""
    lines: list[str] = []
    for way in (CALLBACK, INSTALL):
        for name in sorted(results[WITHOUT].keys() | results[way].keys()):
            before, after = (
                results[one].get(name, Result("missing", "not run")) for one in (WITHOUT, way)
            )
            if before.outcome == "passed" != after.outcome:
                lines.append(f"{way}: {name}: {after.outcome}: {after.reason}")
    return lines


def failing(results: Mapping[str, Result]) -> list[str]:
    """Tell of each test that fails without us, and so says nothing of us."""
    return [
        f"fails without us: {name}: {result.reason}"
        for name, result in sorted(results.items())
        if result.outcome == "failed"
    ]


def counts(results: Mapping[str, Result]) -> Counter[str]:
    counted = Counter(result.outcome for result in results.values())
    counted["asked"] = sum(bool(result.asked) for result in results.values())
    return counted


def _line(name: str, by_way: Mapping[str, Mapping[str, int]]) -> str:
    cells = [f"{by_way[way]['passed']}/{by_way[way]['failed']}" for way in WAYS]
    asked = [f"({by_way[way]['asked']})" for way in WAYS]
    return f"{name:<50} {cells[0]:>12} {cells[1]:>9} {asked[1]:>6} {cells[2]:>9} {asked[2]:>6}"


def _version() -> str:
    from importlib.metadata import version

    return version("litellm")


# ------------------------------------------------------- in the process of a file's tests


class Plugin:
    """Puts our strategy where each test finds it, and writes down what became of the test."""

    def __init__(self, way: str, written_to: Path) -> None:
        self._way = way
        self._written_to = written_to
        self._results: dict[str, dict[str, Result]] = {}
        self._asked = 0

    def prepare(self) -> None:
        """Count the questions to our strategy; have `install()` called for each router."""
        import litellm

        from hydra_llm.integrations.litellm import HydraRoutingStrategy, install

        def counted(asked: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                self._asked += 1
                return asked(*args, **kwargs)

            return wrapped

        for name in ("async_filter_deployments", "choose_sync"):
            setattr(HydraRoutingStrategy, name, counted(getattr(HydraRoutingStrategy, name)))
        if self._way != INSTALL:
            return
        make: Any = litellm.Router.__init__

        @functools.wraps(make)  # some tests look at its signature
        def made(router: Any, *args: Any, **kwargs: Any) -> None:
            make(router, *args, **kwargs)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                install(router)

        setattr(litellm.Router, "__init__", made)  # noqa: B010

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Fixtures of LiteLLM's have emptied the callbacks before, and reloaded the package."""
        self._asked = 0
        if self._way == WITHOUT:
            return (yield)
        import litellm

        from hydra_llm.integrations.litellm import instance, uninstall

        if instance not in litellm.callbacks:
            litellm.logging_callback_manager.add_litellm_callback(instance)
        try:
            return (yield)
        finally:
            uninstall(instance)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._write(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report)

    def _write(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        file, _, name = report.nodeid.partition("::")
        told: Any = report.longrepr
        message = getattr(getattr(told, "reprcrash", None), "message", None) or told or ""
        if isinstance(message, tuple):  # why it was skipped
            message = message[2]
        lines = [line.strip(" E") for line in str(message).splitlines() if line.strip(" E")]
        at_fault = "".join(lines[:1] if name else lines[-1:])
        if NO_NETWORK in str(told):
            at_fault = NO_NETWORK
        reason = re.sub(r"0x[0-9a-f]+", "0x", at_fault)[:160]
        results = self._results.setdefault(file, {})
        results[name or "(the file)"] = Result(str(report.outcome), reason, self._asked)

    def pytest_sessionfinish(self) -> None:
        told = {
            file: {name: asdict(result) for name, result in tests.items()}
            for file, tests in self._results.items()
        }
        self._written_to.write_text(json.dumps(told))


def forbid_network() -> None:
    """Let nothing be looked up or reached but loopback."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def is_loopback(host: Any) -> bool:
        name = host.decode() if isinstance(host, bytes) else host
        if name in (None, "", "localhost"):
            return True
        try:
            return ipaddress.ip_address(str(name)).is_loopback
        except ValueError:
            return False

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and not is_loopback(address[0]):
            raise OSError(NO_NETWORK)
        connect(self, address)

    def guarded_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_loopback(host):
            raise socket.gaierror(socket.EAI_NONAME, NO_NETWORK)
        return look_up(host, *args, **kwargs)

    setattr(socket.socket, "connect", guarded_connect)  # noqa: B010
    socket.getaddrinfo = guarded_look_up


def pytest_configure(config: pytest.Config) -> None:
    """Where pytest is told to take this file for a plugin."""
    if _WAY not in os.environ:
        return
    forbid_network()
    plugin = Plugin(os.environ[_WAY], Path(os.environ[_RESULTS]))
    plugin.prepare()
    config.pluginmanager.register(plugin)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
