"""Streams of dictionaries, for whoever takes the parts apart at once."""

from __future__ import annotations

from typing import Any

import pytest

from hydra_llm import AsyncClient, Client, Router, RoutingDecision
from tests.router.conftest import MODEL

HELLO = [{"role": "user", "content": "Hi"}]


def check(parts: list[Any], typed: list[Any]) -> None:
    assert all(type(part) is dict for part in parts)
    assert [part["message"]["content"] for part in parts] == [p.message.content for p in typed]
    assert ["routing_decision" in part for part in parts] == [False] * (len(parts) - 1) + [True]
    assert isinstance(parts[-1]["routing_decision"], RoutingDecision)
    assert parts[-1]["node_id"] == parts[-1]["routing_decision"].selected_node


def test_parts_are_what_the_node_sent_and_the_last_has_the_decision(router: Router) -> None:
    parts = list(Client(router=router, plain_parts=True).chat(MODEL, HELLO, stream=True))

    check(parts, list(Client(router=router).chat(MODEL, HELLO, stream=True)))


async def test_they_are_so_in_an_event_loop(router: Router) -> None:
    quick, usual = AsyncClient(router=router, plain_parts=True), AsyncClient(router=router)
    parts = [part async for part in await quick.chat(MODEL, HELLO, stream=True)]

    check(parts, [part async for part in await usual.chat(MODEL, HELLO, stream=True)])


@pytest.mark.parametrize("verb", ["chat", "generate"])
def test_an_answer_in_one_piece_is_of_ollamas_type_all_the_same(router: Router, verb: str) -> None:
    client = Client(router=router, plain_parts=True)
    answer = client.chat(MODEL, HELLO) if verb == "chat" else client.generate(MODEL, "Hi")

    assert answer.routing_decision.selected_node == answer.node_id
