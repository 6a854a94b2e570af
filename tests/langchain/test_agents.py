"""LangChain's agents and LangGraph: checkpoints, streams and steps with a routed model."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver

from hydra_llm import Router
from hydra_llm.integrations.langchain import ChatHydra
from hydra_llm.testing import CutFault, SimulatedCluster, StatusFault
from tests.langchain.conftest import OTHER

QUESTION: Any = {"messages": [("human", "What is the weather in Oslo?")]}


@tool
def get_weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"rain in {city}"


def decisions(messages: list[Any]) -> list[dict[str, Any]]:
    found = (message.response_metadata.get("routing_decision") for message in messages)
    return [decision for decision in found if decision]


def test_a_checkpoint_keeps_the_decisions(router: Router) -> None:
    agent = create_agent(
        ChatHydra(model=OTHER, router=router), [get_weather], checkpointer=InMemorySaver()
    )
    config: Any = {"configurable": {"thread_id": "1"}}
    agent.invoke(QUESTION, config)
    another: Any = {"messages": [("human", "And tomorrow?")]}
    agent.invoke(another, config)

    kept = decisions(agent.get_state(config).values["messages"])
    assert len(kept) >= 3
    assert json.loads(json.dumps(kept)) == kept


def test_tokens_and_decisions_come_through_a_graphs_stream(router: Router) -> None:
    agent: Any = create_agent(ChatHydra(model=OTHER, router=router), [get_weather])
    chunks = [chunk for chunk, _ in agent.stream(QUESTION, stream_mode="messages")]

    assert len(chunks) > 10
    assert len(decisions(chunks)) == 2  # the call of the tool, and the answer


@pytest.mark.skipif(
    sys.version_info < (3, 11),
    reason="LangGraph: before Python 3.11 tasks do not carry the callbacks of a graph's nodes",
)
async def test_events_of_a_graph_tell_the_decision(router: Router) -> None:
    agent = create_agent(ChatHydra(model=OTHER, router=router), [get_weather])
    ends = [
        event["data"].get("output")
        async for event in agent.astream_events(QUESTION, version="v2")
        if event["event"] == "on_chat_model_end"
    ]
    assert len(decisions(ends)) == 2


@pytest.mark.parametrize("fault", [StatusFault(503), CutFault(after=3)], ids=["503", "cut"])
def test_an_agent_does_not_notice_a_node_that_fails(
    fault: Any, router: Router, cluster: SimulatedCluster
) -> None:
    cluster["a"].inject(fault)
    cluster["b"].inject(fault)
    agent = create_agent(ChatHydra(model=OTHER, router=router), [get_weather])

    for _ in range(3):
        answer = agent.invoke(QUESTION)
        assert answer["messages"][-1].text
        assert {decision["selected_node"] for decision in decisions(answer["messages"])} == {"c"}


def test_a_summary_is_made_when_a_share_of_the_context_is_full(router: Router) -> None:
    """A share of what? LangChain takes the model's profile, which the nodes fill."""
    model = ChatHydra(model=OTHER, router=router, num_ctx=512, num_predict=40)
    agent = create_agent(
        model,
        [],
        middleware=[
            SummarizationMiddleware(model=model, trigger=("fraction", 0.5), keep=("messages", 2))
        ],
    )
    told: Any = [("human", f"This is fact {i}: " + "la " * 60) for i in range(12)]
    answer = agent.invoke({"messages": told})

    assert len(answer["messages"]) < len(told)
