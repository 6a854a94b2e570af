"""Agents that announce themselves: on the loopback interface, and by hand."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.discovery import Announced, mdns
from hydra_llm.discovery.mdns import MOST_ADDRESSES, SERVICE, announced, listen, understood
from hydra_llm.exceptions import ConfigurationError

zeroconf = pytest.importorskip("zeroconf")

LOOPBACK = ["127.0.0.1"]


def _has_multicast() -> bool:
    async def tried() -> None:
        one = mdns._opened(mdns.require_zeroconf(), LOOPBACK)
        await one.async_close()

    try:
        asyncio.run(tried())
    except ConfigurationError:
        return False
    return True


needs_multicast = pytest.mark.skipif(not _has_multicast(), reason="no multicast on loopback")


async def heard() -> list[Announced]:
    """What is announced on loopback; listened for until somebody is heard."""
    for _ in range(20):
        if found := await listen(seconds=0.3, interfaces=LOOPBACK):
            return found
    return []


@needs_multicast
async def test_who_is_announced_is_heard() -> None:
    async with announced([("127.0.0.1", 9936)], ollama_port=11500, host_name="rig.example"):
        found = await heard()

    [one] = found
    assert one.name.startswith("rig-")
    assert one.addresses == (ip_address("127.0.0.1"),)
    assert (one.port, one.agent_port) == (11500, 9936)


class Told:
    """Takes down what is announced, in the place of zeroconf."""

    def __init__(self) -> None:
        self.infos: list[Any] = []

    async def async_register_service(self, info: Any) -> None:
        self.infos.append(info)

    async def async_unregister_all_services(self) -> None:
        pass

    async def async_close(self) -> None:
        pass


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told()
    monkeypatch.setattr(mdns, "_opened", lambda package, interfaces: told)
    return told


async def test_two_machines_of_one_name_do_not_answer_for_each_other(told: Told) -> None:
    for _ in range(2):
        async with announced([("192.168.1.20", 9936)], ollama_port=11434, host_name="ubuntu"):
            pass

    first, second = told.infos
    assert first.name != second.name
    # Nor for the machine's own services, as SSH.
    assert len({first.server, second.server, "ubuntu.local."}) == 3


async def test_a_long_host_name_makes_a_name_that_can_be(told: Told) -> None:
    async with announced([("192.168.1.20", 9936)], ollama_port=11434, host_name="x" * 63):
        pass

    assert len(told.infos) == 1


async def test_an_agent_on_all_addresses_tells_those_that_others_can_reach(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zeroconf.get_all_addresses", lambda: ["127.0.0.1", "192.168.1.20"])
    async with announced([("0.0.0.0", 9936)], ollama_port=11434):
        pass

    assert told.infos[0].parsed_addresses() == ["192.168.1.20"]


@needs_multicast
async def test_where_nobody_is_nothing_is_heard() -> None:
    async def no_time(seconds: float) -> None:
        await asyncio.sleep(0)

    assert await listen(interfaces=LOOPBACK, sleep=no_time) == []


@needs_multicast
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_agent_announces_itself_where_it_listens() -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-W", "error", "-m", "hydra_llm"),
            *("agent", "--port=0", "--announce", "--ollama-port=11500"),
        ],
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        assert process.stdout is not None
        port = re.search(r":(\d+)/metrics", process.stdout.readline())
        assert port is not None
        found = asyncio.run(heard())
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()

    [one] = found
    assert one.addresses == (ip_address("127.0.0.1"),)
    assert (one.agent_port, one.port) == (int(port[1]), 11500)
    assert process.returncode == 0
    assert "Traceback" not in err


# --------------------------------------------------------------- what they may say


def said(*addresses: str, port: int = 9936, name: str = "rig", **txt: str) -> Announced | None:
    from zeroconf.asyncio import AsyncServiceInfo

    return understood(
        AsyncServiceInfo(
            SERVICE, f"{name}.{SERVICE}", port=port, parsed_addresses=[*addresses], properties=txt
        )
    )


def test_an_announcement_is_understood() -> None:
    assert said("192.168.1.20", "fd00::20", ollama="11500") == Announced(
        name="rig",
        addresses=(ip_address("192.168.1.20"), ip_address("fd00::20")),
        port=11500,
        agent_port=9936,
    )


@pytest.mark.parametrize("text", ["", "many", "0", "-1", "65536", "1" * 200])
def test_a_port_that_makes_no_sense_is_ollamas_own(text: str) -> None:
    one = said("192.168.1.20", ollama=text)

    assert one is not None
    assert one.port == 11434


def test_one_that_leads_nowhere_is_none() -> None:
    assert said() is None
    assert said("fe80::1") is None
    assert said("192.168.1.20", port=0) is None


def test_nobody_can_name_addresses_without_end() -> None:
    one = said(*(f"192.168.1.{number}" for number in range(1, 100)))

    assert one is not None
    assert len(one.addresses) == MOST_ADDRESSES


def test_a_name_that_none_may_have_costs_nobody_else_anything() -> None:
    package = mdns.require_zeroconf()

    assert mdns._info_of(package, f"\x1b[2Jrig.{SERVICE}") is None
    assert mdns._info_of(package, "rig._ssh._tcp.local.") is None
    assert mdns._info_of(package, f"rig.{SERVICE}") is not None


# ------------------------------------------------------------------------- the package


def test_zeroconf_is_imported_by_one_module_and_only_when_it_is_wanted() -> None:
    package = Path(mdns.__file__).parents[1]
    users = [
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if re.search(r"^\s*(from|import) zeroconf", file.read_text(), re.MULTILINE)
    ]
    code = "import sys, hydra_llm.discovery.mdns; sys.exit('zeroconf' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False)

    assert users == ["discovery/mdns.py"]
    assert done.returncode == 0


async def test_a_system_that_does_not_let_us_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr("zeroconf.asyncio.AsyncZeroconf", refuse)

    with pytest.raises(ConfigurationError, match="No such device"):
        await listen()
