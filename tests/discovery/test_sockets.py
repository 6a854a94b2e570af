"""Which listening socket is behind an address of this machine."""

import socket
from contextlib import closing
from ipaddress import ip_address
from pathlib import Path

import pytest

from hydra_llm.discovery.sockets import (
    Listening,
    is_of_this_machine,
    listening_sockets,
    socket_behind,
)
from tests.discovery.conftest import needs_ipv6, needs_socket_list

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt uid ...\n"
ROW = "   {n}: {local} 00000000:0000 {state} 00000000:00000000 00:00000000 0     0   0 {inode} 1\n"


def test_what_listens_is_read_and_nothing_else(tmp_path: Path) -> None:
    four, six = tmp_path / "tcp", tmp_path / "tcp6"
    four.write_text(
        HEAD
        + ROW.format(n=0, local="0200007F:2CAA", state="0A", inode=11)
        + ROW.format(n=1, local="0200007F:2CAA", state="01", inode=12)
        + "nonsense\n"
    )
    six.write_text(
        HEAD
        + ROW.format(n=0, local="00000000000000000000000001000000:2CAA", state="0A", inode=13)
        + ROW.format(n=1, local="0" * 32 + ":2CAB", state="0A", inode=14)
    )

    assert listening_sockets([four, six]) == [
        Listening(ip_address("127.0.0.2"), 11434, "11"),
        Listening(ip_address("::1"), 11434, "13"),
        Listening(ip_address("::"), 11435, "14"),
    ]
    assert listening_sockets([tmp_path / "none"]) is None


def behind(address: str, *sockets: tuple[str, str], port: int = 1) -> str | None:
    listening = [Listening(ip_address(where), 1, inode) for where, inode in sockets]
    return socket_behind(ip_address(address), port, listening)


def test_the_address_itself_goes_before_all_addresses() -> None:
    assert behind("127.0.0.2", ("0.0.0.0", "a"), ("127.0.0.2", "b")) == "b"
    assert behind("127.0.0.3", ("0.0.0.0", "a"), ("127.0.0.2", "b")) == "a"
    assert behind("127.0.0.3", ("::", "a"), ("0.0.0.0", "b")) == "b"
    assert behind("::1", ("::", "a"), ("0.0.0.0", "b")) == "a"


def test_all_of_ipv6_takes_ipv4_and_not_the_other_way_round() -> None:
    assert behind("127.0.0.1", ("::", "a")) == "a"
    assert behind("::1", ("0.0.0.0", "a")) is None


def test_a_shared_port_or_none_is_no_evidence() -> None:
    assert behind("127.0.0.1", ("127.0.0.1", "a"), ("127.0.0.1", "b")) is None
    assert behind("127.0.0.1", ("127.0.0.1", "a"), port=2) is None


@needs_socket_list
def test_a_real_socket_is_listed() -> None:
    with closing(socket.create_server(("127.0.0.2", 0))) as one:
        port = one.getsockname()[1]
        sockets = listening_sockets()
        assert sockets is not None
        assert socket_behind(ip_address("127.0.0.2"), port, sockets) is not None
        assert socket_behind(ip_address("127.0.0.3"), port, sockets) is None


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1"])
def test_loopback_is_this_machine(address: str) -> None:
    assert is_of_this_machine(ip_address(address))


@pytest.mark.parametrize("address", ["192.0.2.1", "224.0.0.251", "0.0.0.0", "2001:db8::1"])
def test_others_are_not(address: str) -> None:
    assert not is_of_this_machine(ip_address(address))


@needs_ipv6
def test_one_socket_for_both_is_one() -> None:
    with closing(
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    ) as one:
        port, sockets = one.getsockname()[1], listening_sockets()
        if sockets is None:
            pytest.skip("the system does not list its sockets")
        inodes = {socket_behind(ip_address(a), port, sockets) for a in ("127.0.0.1", "::1")}
    assert len(inodes) == 1
    assert None not in inodes
