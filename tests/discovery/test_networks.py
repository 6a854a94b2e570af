"""Which networks may be searched."""

import pytest

from hydra_llm.discovery import Search
from hydra_llm.exceptions import ConfigurationError
from hydra_llm.networks import MOST_ADDRESSES, Address, addresses_in, is_public, read_network


def addresses(*networks: str, allow_public: bool = False) -> list[Address]:
    return addresses_in(map(read_network, networks), allow_public=allow_public)


def shown(*networks: str) -> list[str]:
    return [str(address) for address in addresses(*networks)]


@pytest.mark.parametrize(
    "own",
    [
        *("10.1.2.0/24", "172.16.0.0/24", "172.31.255.0/24", "192.168.1.0/24", "127.0.0.0/24"),
        *("169.254.7.0/24", "::1", "fd12:3456::/120"),
    ],
)
def test_a_private_network_may_be_searched(own: str) -> None:
    assert not is_public(read_network(own))
    assert addresses(own)


@pytest.mark.parametrize(
    "public",
    [
        *("8.8.8.0/24", "172.32.0.0/24", "172.15.255.0/24", "192.169.0.0/24", "11.0.0.1"),
        *("100.64.0.0/24", "0.0.0.1", "224.0.0.1", "255.255.255.255", "192.168.255.0/15"),
        *("2606:4700::/120", "::", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::/120"),
    ],
)
def test_a_network_that_may_be_somebody_elses_is_refused(public: str) -> None:
    with pytest.raises(ConfigurationError, match=r"not a private network.*--allow-public"):
        addresses(public)
    with pytest.raises(ConfigurationError, match="not a private network"):
        Search(networks=[read_network("10.0.0.0/30"), read_network(public)])


def test_a_public_network_may_be_named_on_purpose() -> None:
    assert len(addresses("203.0.113.0/29", allow_public=True)) == 6


def test_hosts_are_asked_and_not_what_names_the_network() -> None:
    assert shown("192.168.1.0/30") == ["192.168.1.1", "192.168.1.2"]
    assert shown("192.168.1.7") == ["192.168.1.7"]
    assert shown("fd00::10/127") == ["fd00::10", "fd00::11"]


def test_an_address_with_a_prefix_stands_for_its_network() -> None:
    assert shown(" 192.168.1.6/30 ") == ["192.168.1.5", "192.168.1.6"]


def test_what_is_in_two_networks_is_asked_once() -> None:
    assert shown("192.168.1.0/30", "192.168.1.0/29", "192.168.1.3") == shown("192.168.1.0/29")


@pytest.mark.parametrize("fits", ["10.0.0.0/22", "fd00::/118"])
def test_a_search_takes_so_many_addresses(fits: str) -> None:
    assert MOST_ADDRESSES - 2 <= len(addresses(fits)) <= MOST_ADDRESSES


@pytest.mark.parametrize(
    "networks", [["10.0.0.0/21"], ["fd00::/117"], ["fd00::/64"], ["10.0.0.0/22", "10.9.0.1"]]
)
def test_more_addresses_are_refused_with_what_to_do(networks: list[str]) -> None:
    with pytest.raises(ConfigurationError, match=r"too many.*1,024.*/22.*/118"):
        addresses(*networks)


def test_no_permission_lifts_the_bound() -> None:
    with pytest.raises(ConfigurationError, match="too many"):
        addresses("203.0.0.0/16", allow_public=True)


def test_more_ports_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="17 ports are too many"):
        Search(networks=[read_network("127.0.0.1")], ports=range(1, 18))


@pytest.mark.parametrize("text", ["", "rig", "10.0.0.0/33", "10.0.0", "10.0.0.0-10.0.0.9"])
def test_what_is_no_network_is_told_with_how_to_write_one(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"write it like 192\.168\.1\.0/24"):
        read_network(text)


@pytest.mark.parametrize("text", ["fe80::1%eth0", "fe80::/120"])
def test_addresses_that_need_a_zone_are_no_use(text: str) -> None:
    with pytest.raises(ConfigurationError, match="need a zone"):
        read_network(text)
