"""Every way that LangChain has of saying something to a model carries the routing words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField
from langchain_core.tools import tool
from pydantic import BaseModel

from hydra_llm import Router, RoutingDecision, RoutingWordError
from hydra_llm.integrations.langchain import ChatHydra, HydraEmbeddings
from hydra_llm.testing import SimulatedCluster
from hydra_llm.words import WORDS
from tests.langchain.conftest import CHAT, EMBEDDING


class Person(BaseModel):
    """A person."""

    name: str


@tool
def get_weather(city: str) -> str:
    """Tell the weather of a city."""
    return f"rain in {city}"


@pytest.fixture
def served(cluster: SimulatedCluster) -> Callable[[], set[str]]:
    """Which nodes were asked to chat or to embed."""

    def served_by() -> set[str]:
        return {
            node.id
            for node in cluster
            for asked in node.requests
            if asked.path in ("/api/chat", "/api/embed")
        }

    return served_by


def chained(model: Any) -> Any:
    return ChatPromptTemplate.from_messages([("human", "{input}")]) | model | StrOutputParser()


@wrap_model_call
def pinned_to_c(request: Any, handler: Any) -> Any:
    return handler(request.override(model_settings={"node_id": "c"}))


WAYS: dict[str, Callable[[ChatHydra], object]] = {
    "constructor": lambda m: ChatHydra(model=CHAT, router=m.router, node_id="c").invoke("Hi"),
    "invoke": lambda m: m.invoke("Hi", node_id="c"),
    "stream": lambda m: list(m.stream("Hi", node_id="c")),
    "batch": lambda m: m.batch(["Hi", "Ho", "Hu"], node_id="c"),
    "generate": lambda m: m.generate([[HumanMessage("Hi")]], node_id="c"),
    "bind": lambda m: m.bind(node_id="c").invoke("Hi"),
    "bind, then tools": lambda m: m.bind(node_id="c").bind_tools([get_weather]).invoke("Hi"),
    "bind, then a schema": lambda m: (
        m.bind(node_id="c").with_structured_output(Person).invoke("Hi")
    ),
    "bind twice": lambda m: m.bind(node_id="a").bind(node_id="c").invoke("Hi"),
    "bind_tools": lambda m: m.bind_tools([get_weather], node_id="c").invoke("Hi"),
    "tools, then bind": lambda m: m.bind_tools([get_weather]).bind(node_id="c").invoke("Hi"),
    "with_structured_output": lambda m: m.with_structured_output(Person, node_id="c").invoke("Hi"),
    "a schema by a tool": lambda m: m.with_structured_output(
        Person, method="function_calling", node_id="c"
    ).invoke("Hi"),
    "the call of a schema": lambda m: m.with_structured_output(Person).invoke("Hi", node_id="c"),
    "a stream of a schema": lambda m: list(
        m.with_structured_output(Person, node_id="c").stream("Hi")
    ),
    "with_routing": lambda m: m.with_routing(node_id="c").invoke("Hi"),
    "with_routing, then tools": lambda m: (
        m.with_routing(node_id="c").bind_tools([get_weather]).invoke("Hi")
    ),
    "with_routing, then a schema": lambda m: (
        m.with_routing(node_id="c").with_structured_output(Person).invoke("Hi")
    ),
    "with_routing twice": lambda m: (
        m.with_routing(node_id="a").with_routing(node_id="c").invoke("x")
    ),
    "the call beats the model": lambda m: m.with_routing(node_id="a").invoke("Hi", node_id="c"),
    "configurable_fields": lambda m: m.configurable_fields(
        node_id=ConfigurableField("node")
    ).invoke("Hi", {"configurable": {"node": "c"}}),
    "configurable alternatives": lambda m: m.configurable_alternatives(
        ConfigurableField("where"), there=m.with_routing(node_id="c")
    ).invoke("Hi", {"configurable": {"where": "there"}}),
    "a chain": lambda m: chained(m.bind(node_id="c")).invoke({"input": "Hi"}),
    "a retry": lambda m: m.with_routing(node_id="c").with_retry().invoke("Hi"),
    "a copy": lambda m: m.model_copy(update={"node_id": "c"}).invoke("Hi"),
    "an agent": lambda m: agent(m.with_routing(node_id="c")),
    "an agent of what is bound": lambda m: agent(m.bind(node_id="c")),
    "an agent's middleware": lambda m: agent(m, [pinned_to_c]),
}


def agent(model: Any, middleware: Any = ()) -> object:
    built = create_agent(model, [get_weather], middleware=middleware)
    answer = built.invoke({"messages": [("human", "What is the weather in Oslo?")]})
    assert any(message.type == "tool" for message in answer["messages"])
    return answer


@pytest.mark.parametrize("way", WAYS)
def test_a_pin_arrives(way: str, router: Router, served: Callable[[], set[str]]) -> None:
    WAYS[way](ChatHydra(model=CHAT, router=router))

    assert served() == {"c"}


ASYNC_WAYS: dict[str, Callable[[ChatHydra], Any]] = {
    "ainvoke": lambda m: m.ainvoke("Hi", node_id="c"),
    "abatch": lambda m: m.abatch(["Hi", "Ho", "Hu"], node_id="c"),
    "bind": lambda m: m.bind(node_id="c").ainvoke("Hi"),
    "with_structured_output": lambda m: m.with_structured_output(Person, node_id="c").ainvoke("Hi"),
    "configurable_fields": lambda m: m.configurable_fields(
        node_id=ConfigurableField("node")
    ).ainvoke("Hi", {"configurable": {"node": "c"}}),
}


@pytest.mark.parametrize("way", ASYNC_WAYS)
async def test_a_pin_arrives_from_an_event_loop(
    way: str, router: Router, served: Callable[[], set[str]]
) -> None:
    await ASYNC_WAYS[way](ChatHydra(model=CHAT, router=router))

    assert served() == {"c"}


async def test_a_pin_arrives_in_streams_of_an_event_loop(
    router: Router, served: Callable[[], set[str]]
) -> None:
    model = ChatHydra(model=CHAT, router=router)
    assert [part async for part in model.astream("Hi", node_id="c")]
    assert [event async for event in model.astream_events("Hi", version="v2", node_id="c")]

    assert served() == {"c"}


VALUES: dict[str, Any] = {
    "node_id": "c", "min_vram_gb": 1.5, "prefer_local": False, "priority": 9, "session": "s",
    "exclude_nodes": ["a"], "require_labels": ["x"], "prefer_labels": ["y"], "deadline_s": 60.0,
    "pin": "require", "vram": "require", "continue_streams": True,
}  # fmt: skip


def test_every_word_is_a_field_and_an_argument() -> None:
    model = ChatHydra(model=CHAT, **VALUES)
    told = model._chat_params([])

    assert set(VALUES) == set(WORDS) <= set(ChatHydra.model_fields)
    assert set(WORDS) <= set(HydraEmbeddings.model_fields)
    assert {name: told[name] for name in WORDS} == VALUES
    assert model._chat_params([], priority=1)["priority"] == 1


def test_no_word_is_sent(router: Router, cluster: SimulatedCluster) -> None:
    words = {**VALUES, "require_labels": None, "exclude_nodes": None, "node_id": "a"}
    ChatHydra(model=CHAT, router=router, **words).invoke("Hi", priority=8)

    [asked] = [record for record in cluster["a"].requests if record.path == "/api/chat"]
    assert isinstance(asked.body, dict)
    assert set(asked.body) == {"model", "messages", "stream", "tools", "options"}


def test_none_takes_a_word_away(router: Router) -> None:
    model = ChatHydra(model=CHAT, router=router, node_id="c")

    for answer in (model.invoke("Hi", node_id=None), model.with_routing(node_id=None).invoke("Hi")):
        assert answer.response_metadata["routing_decision"]["requested_node"] is None


def test_with_routing_leaves_the_model_as_it_was(router: Router) -> None:
    model = ChatHydra(model=CHAT, router=router, priority=3)
    assert "node_id" not in str(model._serialized)  # from now on LangChain remembers it
    copy = model.with_routing(node_id="b")

    assert "node_id='b'" in str(copy._serialized)

    assert (model.node_id, copy.node_id, copy.priority) == (None, "b", 3)
    assert copy.router is model.router
    assert isinstance(copy, BaseChatModel)


UNTYPED: Any = HydraEmbeddings  # for arguments that type checkers refuse


@pytest.mark.parametrize(
    "misspelt",
    [
        lambda m: ChatHydra(model=CHAT, nod_id="c"),
        lambda m: ChatHydra(model=CHAT, min_vram=3),
        lambda m: ChatHydra(model=CHAT, node="c"),
        lambda m: UNTYPED(model=CHAT, priorty=3),
        lambda m: m.invoke("Hi", nod_id="c"),
        lambda m: list(m.stream("Hi", priorty=3)),
        lambda m: m.with_routing(nod_id="c"),
        lambda m: m.bind(nod_id="c").invoke("Hi"),
    ],
)
def test_a_misspelt_word_is_an_error_that_names_the_right_one(
    misspelt: Callable[[ChatHydra], object], router: Router
) -> None:
    with pytest.raises(
        RoutingWordError, match=r"did you mean '(node_id|nodes|priority|min_vram_gb)'"
    ):
        misspelt(ChatHydra(model=CHAT, router=router))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda m: ChatHydra(model=CHAT, priority=11),
        lambda m: UNTYPED(model=CHAT, min_vram_gb="much"),
        lambda m: m.invoke("Hi", priority=0),
        lambda m: m.with_routing(deadline_s=-1),
        lambda m: m.bind(pin="maybe"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_word(
    wrong: Callable[[ChatHydra], object], router: Router
) -> None:
    with pytest.raises(RoutingWordError, match=r"^(priority|min_vram_gb|deadline_s|pin)="):
        wrong(ChatHydra(model=CHAT, router=router))


def test_another_unknown_argument_is_ignored_aloud() -> None:
    with pytest.warns(UserWarning, match="ChatHydra knows no argument 'top_n' and ignores it"):
        ChatHydra(model=CHAT, top_n=3)


# ------------------------------------------------------------------------ decisions


def test_the_decision_is_in_the_answer_as_plain_data(router: Router) -> None:
    told = ChatHydra(model=CHAT, router=router).invoke("Hi", node_id="b").response_metadata

    decision = told["routing_decision"]
    assert type(decision) is dict
    assert (decision["requested_node"], decision["selected_node"]) == ("b", "b")
    assert decision["reason"] == "b: pinned by node_id; loaded"
    assert [attempt["outcome"] for attempt in decision["attempts"]] == ["ok"]
    assert decision["actual"]["total"] >= decision["actual"]["first_token"] > 0
    assert "node_id" not in told
    assert RoutingDecision.from_dict(decision).to_dict() == decision


async def test_exactly_one_chunk_of_a_stream_has_the_decision(router: Router) -> None:
    model = ChatHydra(model=CHAT, router=router)
    sync = list(model.stream("Hi"))
    loop = [chunk async for chunk in model.astream("Hi")]

    for chunks in (sync, loop):
        having = [c for c in chunks if "routing_decision" in c.response_metadata]
        assert len(having) == 1
        whole = chunks[0]
        for chunk in chunks[1:]:
            whole += chunk
        assert (
            whole.response_metadata["routing_decision"]
            == (having[0].response_metadata["routing_decision"])
        )


def test_tracing_sees_what_was_asked_for_and_what_was_decided(router: Router) -> None:
    from langchain_core.callbacks import BaseCallbackHandler

    seen: dict[str, Any] = {}

    class Watcher(BaseCallbackHandler):
        def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
            seen["asked"] = kwargs["invocation_params"]

        def on_llm_end(self, response: Any, **kwargs: Any) -> None:
            seen["told"] = response.generations[0][0].generation_info

    model = ChatHydra(model=CHAT, router=router, min_vram_gb=1.0)
    model.invoke("Hi", {"callbacks": [Watcher()]}, node_id="b")

    assert (seen["asked"]["node_id"], seen["asked"]["min_vram_gb"]) == ("b", 1.0)
    assert seen["told"]["routing_decision"]["selected_node"] == "b"


def test_embeddings_take_words_in_the_constructor_and_by_with_routing(
    router: Router, served: Callable[[], set[str]]
) -> None:
    HydraEmbeddings(model=EMBEDDING, router=router, node_id="c").embed_query("Hi")
    HydraEmbeddings(model=EMBEDDING, router=router).with_routing(node_id="c").embed_query("Hi")

    assert served() == {"c"}
