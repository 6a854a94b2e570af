"""ChatHydra by itself: how it is made, what it does better than ChatOllama, how it is known."""

from __future__ import annotations

import asyncio
import base64
import copy
import gc
import pickle
import ssl
from collections.abc import Iterator
from typing import Any

import ollama
import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.load import dumpd
from langchain_core.messages import HumanMessage
from langchain_core.runnables import ConfigurableField
from langchain_ollama import ChatOllama
from pydantic import BaseModel, ValidationError

from hydra_llm import (
    AllNodesFailedError,
    ConfigurationError,
    HydraSettings,
    Node,
    NoNodeUpError,
    Router,
)
from hydra_llm.integrations.langchain import ChatHydra, HydraEmbeddings
from hydra_llm.testing import RequestRecord, SimulatedCluster, SimulatedNode, StatusFault
from tests.langchain.conftest import ABLE, CHAT, EMBEDDING, OTHER, make_cluster, make_nodes
from tests.router.conftest import make_router

SECRET = "hunter2-s3cret"


def chats(node: SimulatedNode) -> list[RequestRecord]:
    return [record for record in node.requests if record.path == "/api/chat"]


@pytest.fixture
def node() -> Iterator[SimulatedNode]:
    [node] = make_nodes("a")
    with node:
        node.preload(CHAT)
        node.preload(OTHER)
        yield node


def nobody(port: int = 1) -> str:
    """Where nobody listens."""
    return f"http://127.0.0.1:{port}"


# ------------------------------------------------------------------- whom it asks


def test_a_router_can_be_given_or_nodes_or_a_base_url(node: SimulatedNode) -> None:
    with Router(node.node()) as router:
        for where in (
            {"router": router},
            {"nodes": [node.node()]},
            {"nodes": node.url},
            {"nodes": iter([node.url])},
            {"base_url": node.url},
        ):
            assert ChatHydra(model=CHAT, **where).invoke("Hi").content


def test_ollama_host_still_works(node: SimulatedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{node.port}")

    assert ChatHydra(model=CHAT).invoke("Hi").content


def test_nodes_of_the_settings_are_used(
    node: SimulatedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_LLM_NODES", f"rig={node.url}")
    answer = ChatHydra(model=CHAT).invoke("Hi")

    assert answer.response_metadata["routing_decision"]["selected_node"] == "rig"


@pytest.mark.parametrize("kind", [ChatHydra, HydraEmbeddings])
@pytest.mark.parametrize(
    "given",
    [
        {"nodes": [nobody()], "base_url": nobody()},
        {"router": None, "nodes": [nobody()], "base_url": nobody()},
    ],
)
def test_two_answers_to_the_same_question_are_an_error(kind: Any, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="not both"):
        kind(model=CHAT, **given)


def test_nodes_and_a_router_are_an_error() -> None:
    with Router([nobody()]) as router:
        with pytest.raises(ConfigurationError, match="not both"):
            ChatHydra(model=CHAT, router=router, nodes=[nobody()])
        with pytest.raises(ConfigurationError, match="settings"):
            ChatHydra(model=CHAT, router=router, settings=HydraSettings())


@pytest.mark.parametrize(
    "url", ["http://rig:port", "ftp://rig", "http://", "rig:99999", "http://a b"]
)
def test_a_base_url_that_cannot_be_is_an_error_and_not_localhost(url: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a node URL"):
        ChatHydra(model=CHAT, base_url=url)


def test_a_bare_host_is_that_host() -> None:
    [node] = ChatHydra(model=CHAT, base_url="gpu-box").router.settings.nodes

    assert node.url == "http://gpu-box:11434"


def test_what_is_made_of_one_model_shares_its_router(router: Router) -> None:
    model = ChatHydra(model=CHAT, router=router)

    for other in (
        model.with_routing(priority=2),
        model.model_copy(update={"temperature": 0.5}),
        copy.copy(model),
        ChatHydra(model=OTHER, router=router),
    ):
        assert other.router is router


def test_models_of_the_same_nodes_share_one_router() -> None:
    one, two = (ChatHydra(model=name, nodes=[nobody()]) for name in (CHAT, OTHER))
    embeddings = HydraEmbeddings(model=EMBEDDING, nodes=[nobody()])

    assert one.router is two.router is embeddings.router


def test_a_shared_router_outlives_the_model_that_made_it(node: SimulatedNode) -> None:
    first = ChatHydra(model=CHAT, nodes=[node.node()])
    second = ChatHydra(model=CHAT, router=first.router)
    del first
    gc.collect()

    assert second.invoke("Hi").content


def test_making_a_model_asks_nobody(node: SimulatedNode) -> None:
    ChatHydra(model=CHAT, nodes=[node.node()]).with_routing(node_id="a").bind(priority=1)

    assert not node.requests


def test_configured_models_are_made_for_each_call_and_share_everything(
    node: SimulatedNode,
) -> None:
    model = ChatHydra(model=CHAT, nodes=[node.node()]).configurable_fields(
        temperature=ConfigurableField("heat"), model=ConfigurableField("which")
    )
    for heat in (0.1, 0.2, 0.3):
        model.invoke("Hi", {"configurable": {"heat": heat, "which": OTHER}})

    assert [record.body["options"]["temperature"] for record in chats(node)] == [0.1, 0.2, 0.3]
    assert node.open_connections <= 2  # one of the calls, one of the probes


# --------------------------------------------------------------------- connections


def headers_of(node: SimulatedNode) -> dict[str, str]:
    return {name.lower(): value for name, value in chats(node)[-1].headers.items()}


def test_headers_auth_and_cookies_reach_the_node(node: SimulatedNode) -> None:
    model = ChatHydra(
        model=CHAT,
        base_url=node.url,
        client_kwargs={"headers": {"X-Team": "red"}, "cookies": {"a": "1"}, "auth": ("me", SECRET)},
        sync_client_kwargs={"timeout": 20},
    )
    model.invoke("Hi")

    sent = headers_of(node)
    assert (sent["x-team"], sent["cookie"]) == ("red", "a=1")
    assert sent["authorization"] == f"Basic {base64.b64encode(f'me:{SECRET}'.encode()).decode()}"


async def test_async_arguments_are_for_async_calls(node: SimulatedNode) -> None:
    model = ChatHydra(
        model=CHAT,
        base_url=node.url,
        client_kwargs={"headers": {"X-Team": "red"}},
        async_client_kwargs={"headers": {"X-Team": "blue"}},
    )
    await model.ainvoke("Hi")
    assert headers_of(node)["x-team"] == "blue"

    await asyncio.to_thread(model.invoke, "Hi")
    assert headers_of(node)["x-team"] == "red"
    await model.router.aclose()


def test_an_api_key_is_a_bearer_token(node: SimulatedNode) -> None:
    ChatHydra(model=CHAT, base_url=node.url, api_key=SECRET).invoke("Hi")

    assert headers_of(node)["authorization"] == f"Bearer {SECRET}"


def test_ollamas_own_key_goes_to_a_single_node_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", SECRET)
    with make_cluster("a", "b") as cluster:
        for node in cluster:
            node.preload(CHAT)
        ChatHydra(model=CHAT, nodes=[cluster["a"].url]).invoke("Hi")
        assert headers_of(cluster["a"])["authorization"] == f"Bearer {SECRET}"

        ChatHydra(model=CHAT, nodes=cluster.nodes()).invoke("Hi", node_id="b")
        assert "authorization" not in headers_of(cluster["b"])


def test_nobodys_dictionary_is_written_to() -> None:
    shared: dict[str, Any] = {
        "headers": {"X-Team": "red"},
        "auth": ("a", "b"),
        "cookies": {"c": "d"},
    }
    ChatHydra(model=CHAT, base_url=f"http://me:{SECRET}@127.0.0.1:1", client_kwargs=shared)

    assert shared["headers"] == {"X-Team": "red"}
    assert set(shared) == {"headers", "auth", "cookies"}


def test_credentials_of_one_model_reach_no_other(node: SimulatedNode) -> None:
    shared: dict[str, Any] = {"headers": {}}
    ChatHydra(model=CHAT, base_url=f"http://me:{SECRET}@127.0.0.1:1", client_kwargs=shared)
    ChatHydra(model=CHAT, base_url=node.url, client_kwargs=shared).invoke("Hi")

    assert "authorization" not in headers_of(node)


@pytest.mark.parametrize(
    "name", ["proxy", "transport", "event_hooks", "cert", "mounts", "nonsense"]
)
def test_what_means_nothing_with_several_nodes_is_an_error_with_a_hint(name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"client_kwargs has '{name}': \w+"):
        ChatHydra(model=CHAT, base_url=nobody(), client_kwargs={name: object()})


def test_verify_is_a_setting_of_the_router() -> None:
    context = ssl.create_default_context()
    for verify in (False, context):
        model = ChatHydra(model=CHAT, base_url=nobody(), client_kwargs={"verify": verify})
        assert model.router.settings.verify is verify
        with pytest.raises(ConfigurationError, match="verify"):
            ChatHydra(model=CHAT, router=model.router, client_kwargs={"verify": verify})
    with pytest.raises(ConfigurationError, match="verify should be the same"):
        ChatHydra(model=CHAT, base_url=nobody(), sync_client_kwargs={"verify": False})


def test_silence_is_limited_by_a_timeout(node: SimulatedNode) -> None:
    node.freeze()
    with make_router(None, nodes=[node.node()], health_check_timeout=0.2) as router:  # type: ignore[arg-type]  # nodes are given
        model = ChatHydra(model=CHAT, router=router, timeout=0.2)
        with pytest.raises((NoNodeUpError, AllNodesFailedError)):
            model.invoke("Hi")
    node.thaw()


# --------------------------------------------------------------------- credentials


def test_no_repr_shows_a_credential() -> None:
    for kind in (ChatHydra, HydraEmbeddings):
        model = kind(
            model=CHAT,
            base_url=f"http://me:{SECRET}@127.0.0.1:1",
            client_kwargs={"headers": {"Authorization": SECRET}},
            api_key=SECRET,
        )
        known = repr(model), str(model), str(dumpd(model)), repr(model.router)
        assert not any(SECRET in text for text in known)
        assert "router=<Router [" in repr(model)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"base_url": f"http://me:{SECRET}@127.0.0.1:port"}, "is not a node URL"),
        ({"temperature": "hot"}, "temperature"),
        ({"validate_model_on_init": True}, "Failed to connect"),
        ({"base_url": [SECRET]}, "base_url"),
    ],
)
def test_no_error_shows_a_credential(wrong: dict[str, Any], says: str) -> None:
    text = ""
    try:
        ChatHydra(**{"model": CHAT, "base_url": f"http://me:{SECRET}@127.0.0.1:1", **wrong})
    except (ConfigurationError, ValidationError) as error:
        text = str(error)
    gc.collect()  # the error has held the model that it is about

    assert says in text
    assert SECRET not in text


# ------------------------------------------------------------------ better than theirs


@pytest.fixture
def cache() -> Iterator[None]:
    set_llm_cache(InMemoryCache())
    yield
    set_llm_cache(None)


@pytest.mark.usefixtures("cache")
def test_an_answer_from_the_cache_is_that_models_own(node: SimulatedNode) -> None:
    where = {"base_url": node.url}
    first = ChatHydra(model=CHAT, **where).invoke("Hi")
    asked = len(chats(node))
    for other in (
        ChatHydra(model=OTHER, **where),
        ChatHydra(model=CHAT, temperature=0.5, **where),
        ChatHydra(model=CHAT, stop=["x"], **where),
        ChatHydra(model=CHAT, reasoning=True, **where),
        ChatHydra(model=CHAT, max_tokens=5, **where),
    ):
        other.invoke("Hi")
        asked += 1
        assert len(chats(node)) == asked
    ChatHydra(model=CHAT, **where).invoke("Hi", model=OTHER)  # as the first of the others
    ChatHydra(model=CHAT, **where).invoke("Hi", temperature=0.5)
    assert ChatHydra(model=CHAT, **where).invoke("Hi").content == first.content
    assert len(chats(node)) == asked


@pytest.mark.usefixtures("cache")
def test_where_an_answer_came_from_is_no_part_of_the_caches_key(node: SimulatedNode) -> None:
    model = ChatHydra(model=CHAT, base_url=node.url)
    model.invoke("Hi")
    model.with_routing(priority=9, node_id="a").invoke("Hi")
    model.invoke("Hi", session="s", min_vram_gb=1.0)

    assert len(chats(node)) == 1


def test_two_event_loops_in_a_row_work(node: SimulatedNode) -> None:
    model = ChatHydra(model=CHAT, base_url=node.url)

    for _ in range(3):
        assert asyncio.run(model.ainvoke("Hi")).content


def test_options_by_name_are_options_of_the_call(node: SimulatedNode) -> None:
    model = ChatHydra(model=CHAT, base_url=node.url, num_ctx=4096, temperature=0.9, seed=3)
    model.invoke("Hi", temperature=0.1, min_p=0.05, max_tokens=4, seed=None)
    model.invoke("Hi", options={"top_k": 2}, temperature=0.1)
    model.bind(temperature=0.2).invoke("Hi")

    runners = {"num_ctx": 4096}  # sent where the caller gave none
    assert [record.body["options"] for record in chats(node)] == [
        {"num_ctx": 4096, "temperature": 0.1, "min_p": 0.05, "num_predict": 4},
        {**runners, "top_k": 2, "temperature": 0.1},
        {"num_ctx": 4096, "temperature": 0.2, "seed": 3},
    ]


def test_max_tokens_is_num_predict(node: SimulatedNode) -> None:
    answer = ChatHydra(model=CHAT, base_url=node.url, max_tokens=5).invoke("Hi")
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 5

    ChatHydra(model=CHAT, base_url=node.url, max_tokens=5, num_predict=3).invoke("Hi")
    ChatHydra(model=CHAT, base_url=node.url, max_tokens=5).invoke("Hi", options={"seed": 1})
    asked = [record.body["options"].get("num_predict") for record in chats(node)]
    assert asked == [5, 3, None]


def test_tracing_knows_the_model_of_the_call() -> None:
    model = ChatHydra(model=CHAT, base_url=nobody(), temperature=0.5, max_tokens=7)

    own, called = model._get_ls_params(), model._get_ls_params(model=OTHER, num_predict=3)
    assert (own.get("ls_model_name"), own.get("ls_max_tokens")) == (CHAT, 7)
    assert (called.get("ls_model_name"), called.get("ls_max_tokens")) == (OTHER, 3)
    assert (called.get("ls_provider"), called.get("ls_temperature")) == ("ollama", 0.5)


def test_a_model_can_be_neither_deeply_copied_nor_pickled_like_chat_ollama() -> None:
    for model in (ChatHydra(model=CHAT, base_url=nobody()), ChatOllama(model=CHAT)):
        with pytest.raises(TypeError):
            copy.deepcopy(model)
        with pytest.raises((TypeError, AttributeError)):
            pickle.dumps(model)


def test_isinstance_and_attributes_are_those_of_chat_ollama() -> None:
    model = ChatHydra(model=CHAT, base_url=nobody(), num_ctx=512)

    assert isinstance(model, ChatOllama)
    assert (model.num_ctx, model.base_url, model._llm_type) == (512, nobody(), "chat-ollama")


# -------------------------------------------------------------------------- profile


def test_the_profile_says_what_the_nodes_say(router: Router) -> None:
    assert ChatHydra(model=CHAT, router=router, num_ctx=2048, num_predict=99).profile == {
        "max_input_tokens": 2048,
        "max_output_tokens": 99,
        "text_inputs": True,
        "text_outputs": True,
        "structured_output": True,
        "tool_calling": True,
        "image_inputs": True,
        "reasoning_output": True,
    }
    other = ChatHydra(model=OTHER, router=router).profile
    assert other is not None
    assert (other.get("image_inputs"), other.get("reasoning_output")) == (False, False)


def test_without_num_ctx_the_profile_has_the_smallest_context_that_is_sure() -> None:
    with make_cluster("a", "b") as cluster:
        cluster["a"].preload(CHAT, num_ctx=8192)
        cluster["b"].preload(CHAT, num_ctx=6000)
        with make_router(cluster) as router:
            model = ChatHydra(model=CHAT, router=router)
            both, one = model.profile, model.with_routing(exclude_nodes=["b"]).profile
    assert both is not None
    assert one is not None
    assert (both.get("max_input_tokens"), one.get("max_input_tokens")) == (6000, 8192)


@pytest.mark.parametrize(
    ("limits", "told"),
    [({"max_tokens": 7}, 7), ({"num_predict": 5, "max_tokens": 7}, 5), ({"num_predict": -1}, None)],
)
def test_the_profile_has_the_limit_of_an_answer(
    limits: dict[str, int], told: int | None, router: Router
) -> None:
    profile = ChatHydra(model=CHAT, router=router, **limits).profile

    assert profile is not None
    assert profile.get("max_output_tokens") == told


def test_a_profile_that_was_given_stays(router: Router) -> None:
    profile = ChatHydra(model=CHAT, router=router, profile={"max_input_tokens": 3}).profile

    assert profile == {"max_input_tokens": 3}


def test_nobody_knows_of_a_model_that_nobody_has(router: Router) -> None:
    assert ChatHydra(model="nobody/has:it", router=router).profile is None


def test_an_agent_asks_for_a_schema_and_not_for_a_tool(
    router: Router, cluster: SimulatedCluster
) -> None:
    """LangChain's agents send `format` only to models whose profile says that they may."""
    from langchain.agents import create_agent

    class Answer(BaseModel):
        city: str

    agent = create_agent(ChatHydra(model=CHAT, router=router), [], response_format=Answer)
    answer = agent.invoke({"messages": [("human", "Where is Oslo?")]})

    assert isinstance(answer["structured_response"], Answer)
    [asked] = [record for node in cluster for record in chats(node)]
    assert isinstance(asked.body, dict)
    assert asked.body["format"]["properties"].keys() == {"city"}


# ------------------------------------------------------------------ looking at models


@pytest.mark.parametrize("kind", [ChatHydra, HydraEmbeddings])
def test_validate_model_on_init_means_that_some_node_has_it(kind: Any) -> None:
    with SimulatedCluster(
        [*make_nodes("a", models=(OTHER,)), *make_nodes("b", models=(ABLE,))]
    ) as c:
        kind(model=CHAT, nodes=c.nodes(), validate_model_on_init=True)

        with pytest.raises(ValueError, match="`nobody/has:it` not found in Ollama"):
            kind(model="nobody/has:it", nodes=c.nodes(), validate_model_on_init=True)
        with pytest.raises(ValueError, match=f"`{CHAT}` not found in Ollama"):
            kind(model=CHAT, nodes=c.nodes(), exclude_nodes=["b"], validate_model_on_init=True)
        with pytest.raises(ValueError, match=f"`{CHAT}` not found in Ollama"):
            kind(
                model=CHAT,
                nodes=c.nodes(),
                node_id="a",
                pin="require",
                validate_model_on_init=True,
            )
        kind(model=CHAT, nodes=c.nodes(), node_id="a", validate_model_on_init=True)

    with pytest.raises(ValueError, match="Failed to connect to Ollama"):
        kind(model=CHAT, nodes=[nobody()], validate_model_on_init=True)


# ------------------------------------------------------------------------ the seams


def test_what_we_build_upon_is_there() -> None:
    """Private names of langchain-ollama; docs/langchain.md has the versions that have them."""
    for name in ("_chat_params", "_create_chat_stream", "_acreate_chat_stream", "_set_clients"):
        assert callable(getattr(ChatOllama, name))


def test_an_unknown_keyword_reaches_ollamas_client() -> None:
    """The way that the routing words take: ChatOllama has to pass them on."""
    told: dict[str, Any] = {}

    class Client(ollama.Client):
        def chat(self, **given: Any) -> Any:  # type: ignore[override]  # a fake of its
            told.update(given)
            yield {"message": {"role": "assistant", "content": ""}, "done": True}

    model = ChatOllama(model=CHAT)
    model._client = Client()
    model.invoke([HumanMessage("Hi")], node_id="rig")

    assert told["node_id"] == "rig"


def test_a_node_of_its_own_headers_keeps_them(node: SimulatedNode) -> None:
    own = Node(node.url, headers={"Authorization": "Bearer the-nodes"})
    ChatHydra(model=CHAT, nodes=[own], api_key=SECRET).invoke("Hi")

    assert headers_of(node)["authorization"] == "Bearer the-nodes"


def test_a_busy_only_node_is_an_error_that_says_so(node: SimulatedNode) -> None:
    node.inject(StatusFault(503))

    with Router(node.node()) as router:
        with pytest.raises(AllNodesFailedError, match="1 node tried"):
            ChatHydra(model=CHAT, router=router).invoke("Hi")
