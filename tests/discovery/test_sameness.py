"""When two places are one server, and when they only look like it."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from hydra_llm.discovery.answers import Model, Place, Server
from hydra_llm.discovery.sameness import Evidence, Loaded, Verdict, compare, grouped

SAME, DIFFERENT, UNDECIDED = Verdict.SAME, Verdict.DIFFERENT, Verdict.UNDECIDED

LLAMA = Model("llama3.2:3b", "a80c4f17acd5", "2026-11-01T12:00:00.123456789+01:00")
QWEN = Model("qwen3:8b", "500a1f067a9f", "2026-11-02T08:30:00.987654321+01:00")

LOADED = frozenset({(LLAMA.name, LLAMA.digest, "2026-11-26T19:30:00.5554321Z")})
IDLE: Loaded = frozenset()


def server(
    address: str = "192.168.1.20",
    *models: Model,
    port: int = 11434,
    version: str = "0.32.15",
) -> Server:
    place = Place(ipaddress.ip_address(address), port)
    return Server(place=place, version=version, models=models or (LLAMA, QWEN))


A, B = server(), server("192.168.1.21")


def verdict(
    a: Server = A,
    b: Server = B,
    *,
    about: tuple[Evidence, Evidence] = (Evidence(), Evidence()),
    loaded: Sequence[tuple[Loaded, Loaded]] = ((IDLE, IDLE),),
) -> Verdict:
    evidence = {a.place: about[0], b.place: about[1]}
    rounds = [{a.place: one, b.place: other} for one, other in loaded]
    assert compare(b, a, evidence, rounds) is compare(a, b, evidence, rounds)
    return compare(a, b, evidence, rounds)


def both(**about: Any) -> tuple[Evidence, Evidence]:
    return Evidence(**about), Evidence(**about)


def uuids(*numbers: int) -> Evidence:
    return Evidence(uuids=frozenset(f"uuid-{number}" for number in numbers))


@pytest.mark.parametrize(
    "other",
    [
        server("192.168.1.20", port=11435),
        server("192.168.1.21", port=11435),
        server("192.168.1.21", version="0.32.14"),
        server("192.168.1.21", LLAMA),
        server("192.168.1.21", LLAMA, QWEN._replace(digest="another")),
        server("192.168.1.21", LLAMA, QWEN._replace(modified_at="2026-11-02T08:30:00.9Z")),
    ],
)
def test_who_answers_otherwise_is_another(other: Server) -> None:
    # Even where everything else says that they are one.
    about = both(uuids=frozenset({"uuid-1"}), names=frozenset({"rig"}), socket="7")

    assert verdict(A, other, about=about, loaded=[(LOADED, LOADED)]) is DIFFERENT


def test_equal_models_alone_decide_nothing() -> None:
    assert verdict() is UNDECIDED
    assert verdict(loaded=[]) is UNDECIDED


def test_without_models_there_is_nothing_alike() -> None:
    empty = [Server(place=one.place, version=one.version, models=()) for one in (A, B)]

    assert verdict(*empty) is DIFFERENT


def test_models_without_a_date_are_alike_everywhere() -> None:
    undated = LLAMA._replace(modified_at="")

    assert verdict(server("10.0.0.1", undated), server("10.0.0.2", undated)) is DIFFERENT


def test_the_same_gpus_are_one_machine() -> None:
    assert verdict(about=(uuids(1, 2), uuids(1, 2))) is SAME
    assert verdict(about=(uuids(1, 2), uuids(2))) is SAME


def test_other_gpus_are_another_machine() -> None:
    # With a copied disk, and a name for both.
    mine, its = uuids(1), uuids(2)

    assert verdict(about=(mine, its)) is DIFFERENT
    assert verdict(about=(mine, its), loaded=[(LOADED, LOADED)]) is DIFFERENT


def test_gpus_that_one_side_does_not_tell_are_no_evidence() -> None:
    assert verdict(about=(uuids(1), Evidence())) is UNDECIDED


def test_a_loaded_model_that_goes_at_the_same_moment_is_the_same() -> None:
    assert verdict(loaded=[(LOADED, LOADED)]) is SAME


@pytest.mark.parametrize(
    "until",
    ["", "2026-11-26T19:30:00Z", "2026-11-26T19:30:00.000Z", "2319-03-05T08:39:07.297923185Z"],
)
def test_a_time_that_others_may_tell_too_is_no_evidence(until: str) -> None:
    loaded = frozenset({(LLAMA.name, LLAMA.digest, until)})

    assert verdict(loaded=[(loaded, loaded)]) is UNDECIDED


def test_who_has_loaded_something_else_is_another() -> None:
    assert verdict(loaded=[(LOADED, IDLE)] * 3) is DIFFERENT
    assert verdict(about=(uuids(1), uuids(1)), loaded=[(LOADED, IDLE)] * 3) is DIFFERENT


def test_one_round_in_which_they_agree_is_enough() -> None:
    # A request ended between the two questions of the first.
    assert verdict(loaded=[(LOADED, IDLE), (LOADED, LOADED), (IDLE, LOADED)]) is SAME


def test_one_socket_is_one_server() -> None:
    assert verdict(about=both(is_own=True, socket="7")) is SAME
    # A request may end between any two questions.
    assert verdict(about=both(is_own=True, socket="7"), loaded=[(LOADED, IDLE)] * 3) is SAME


def test_two_sockets_are_two_servers() -> None:
    about = (Evidence(is_own=True, socket="7"), Evidence(is_own=True, socket="8"))

    assert verdict(about=about) is DIFFERENT


def test_a_socket_for_ipv4_and_one_for_ipv6_may_be_one_programs() -> None:
    about = (Evidence(is_own=True, socket="7"), Evidence(is_own=True, socket="8"))

    assert verdict(server("127.0.0.1"), server("::1"), about=about) is UNDECIDED


def test_addresses_of_this_machine_are_one_where_its_sockets_are_not_listed() -> None:
    assert verdict(server("127.0.0.1"), server("::1"), about=both(is_own=True)) is SAME
    own, others = Evidence(is_own=True), Evidence()
    assert verdict(server("127.0.0.1"), B, about=(own, others)) is UNDECIDED


def test_one_name_is_one_node() -> None:
    assert verdict(about=both(names=frozenset({"node http://rig:11434"}))) is SAME


# -------------------------------------------------------------------------- groups


async def groups(
    *servers: Server,
    about: Mapping[Place, Evidence] | None = None,
    loaded: Mapping[Place, Loaded] | None = None,
    known: Sequence[Place] = (),
) -> list[tuple[list[str], list[str]]]:
    async def ask(places: Sequence[Place]) -> Mapping[Place, Loaded]:
        asked.append(len(places))
        return {place: (loaded or {}).get(place, IDLE) for place in places}

    asked: list[int] = []
    found = await grouped(servers, about or {}, ask, known)
    groups.asked = asked  # type: ignore[attr-defined]  # told besides
    return [
        ([str(s.place.address) for s in one.servers], [str(p.address) for p in one.perhaps])
        for one in found
    ]


async def test_a_twin_that_nothing_tells_apart_stays_and_says_of_whom() -> None:
    assert await groups(B, A) == [(["192.168.1.20"], []), (["192.168.1.21"], ["192.168.1.20"])]


async def test_the_address_that_is_best_to_configure_goes_first() -> None:
    places = [server(a) for a in ("fd00::5", "192.168.1.20", "::1", "127.0.0.1")]
    about = {one.place: uuids(1) for one in places}

    [(addresses, _)] = await groups(*places, about=about)

    assert addresses == ["127.0.0.1", "::1", "192.168.1.20", "fd00::5"]


async def test_a_configured_address_goes_before_all_others() -> None:
    assert await groups(A, B, known=[B.place]) == [
        (["192.168.1.21"], []),
        (["192.168.1.20"], ["192.168.1.21"]),
    ]


async def test_nobody_joins_a_group_in_which_one_is_certainly_another() -> None:
    c = server("192.168.1.22")
    name = frozenset({"rig"})
    about = {
        A.place: Evidence(uuids=frozenset({"uuid-1"}), names=name),
        B.place: Evidence(names=name),
        c.place: Evidence(uuids=frozenset({"uuid-2"}), names=name),
    }

    assert [addresses for addresses, _ in await groups(A, B, c, about=about)] == [
        ["192.168.1.20", "192.168.1.21"],
        ["192.168.1.22"],
    ]


async def test_what_is_loaded_is_asked_of_those_alone_that_look_alike() -> None:
    await groups(A, server("192.168.1.9", LLAMA))
    assert groups.asked == []  # type: ignore[attr-defined]

    await groups(A, B, server("192.168.1.9", LLAMA))
    assert groups.asked == [2]  # type: ignore[attr-defined]

    await groups(A, B, loaded={A.place: LOADED})
    assert groups.asked == [2, 2, 2]  # type: ignore[attr-defined]
