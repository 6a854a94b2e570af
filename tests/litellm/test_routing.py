"""Every kind of call that LiteLLM's router has, sync and async, goes where we say."""

from __future__ import annotations

import asyncio
import inspect
import json
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

import litellm
import pytest
from litellm.types.router import RouterRateLimitError

from hydra_llm import AsyncHydraTransport, ConfigurationError, Router
from hydra_llm.integrations.litellm import (
    HydraRoutingStrategy,
    decision_of,
    install,
    uninstall,
)
from hydra_llm.testing import SimulatedCluster
from tests.litellm.conftest import (
    HELLO,
    LiteRouter,
    asked,
    auntil,
    bodies,
    deployments,
    lite_router,
    total,
    until,
)

AsyncCall = Callable[..., Awaitable[Any]]


async def _chat(router: LiteRouter, **words: Any) -> Any:
    return await router.acompletion("chat", HELLO, **words)


async def _stream(router: LiteRouter, **words: Any) -> Any:
    stream = await router.acompletion("chat", HELLO, stream=True, **words)
    assert [part async for part in stream]
    return stream


async def _text(router: LiteRouter, **words: Any) -> Any:
    return await router.atext_completion("chat", prompt="Hello", **words)


async def _embedding(router: LiteRouter, **words: Any) -> Any:
    return await router.aembedding("embed", input=["Hello"], **words)


async def _responses(router: LiteRouter, **words: Any) -> Any:
    return await router.aresponses(model="chat", input="Hello", **words)


async def _messages(router: LiteRouter, **words: Any) -> Any:
    return await router.aanthropic_messages(model="chat", messages=HELLO, max_tokens=20, **words)


ASYNC = {f.__name__[1:]: f for f in (_chat, _stream, _text, _embedding, _responses, _messages)}


def _sync_stream(router: LiteRouter, **words: Any) -> Any:
    stream = router.completion("chat", HELLO, stream=True, **words)
    assert list(stream)
    return stream


SYNC: dict[str, Callable[..., Any]] = {
    "chat": lambda router, **words: router.completion("chat", HELLO, **words),
    "stream": _sync_stream,
    "embedding": lambda router, **words: router.embedding("embed", input=["Hello"], **words),
    "responses": lambda router, **words: router.responses(model="chat", input="Hello", **words),
}


@pytest.mark.parametrize("kind", ASYNC)
@pytest.mark.parametrize("node", ["a", "b", "c"])
async def test_an_asynchronous_call_goes_to_the_pinned_node(
    routed: LiteRouter, cluster: SimulatedCluster, hydra: Router, kind: str, node: str
) -> None:
    answer = await ASYNC[kind](routed, node_id=node, prefer_local=False)

    assert asked(cluster) == {one.id: int(one.id == node) for one in cluster}
    assert "node_id" not in json.dumps(bodies(cluster))
    assert "prefer_local" not in json.dumps(bodies(cluster))
    decision = decision_of(answer)
    assert decision is not None
    assert decision["selected_node"] == node
    await auntil(lambda: not hydra.in_flight)


@pytest.mark.parametrize("kind", SYNC)
@pytest.mark.parametrize("node", ["a", "b", "c"])
def test_a_synchronous_call_goes_to_the_pinned_node(
    routed: LiteRouter, cluster: SimulatedCluster, hydra: Router, kind: str, node: str
) -> None:
    inside = getattr(routed, "_embedding", None) if kind == "embedding" else None
    if inside is not None and "request_kwargs" not in inspect.getsource(inside):
        pytest.skip("this LiteLLM says nothing of a synchronous embedding's request")

    answer = SYNC[kind](routed, node_id=node, prefer_local=False)

    assert asked(cluster) == {one.id: int(one.id == node) for one in cluster}
    assert "node_id" not in json.dumps(bodies(cluster))
    until(lambda: not hydra.in_flight)
    decision = decision_of(answer)
    assert decision is not None
    assert decision["selected_node"] == node


async def test_what_is_asked_is_spread_over_the_nodes(
    routed: LiteRouter, cluster: SimulatedCluster
) -> None:
    await asyncio.gather(*(routed.acompletion("chat", HELLO, max_tokens=50) for _ in range(12)))

    assert min(asked(cluster).values()) >= 2
    assert total(asked(cluster)) == 12


async def test_a_pin_may_name_the_id_that_litellm_gives_a_deployment(
    routed: LiteRouter, cluster: SimulatedCluster
) -> None:
    await routed.acompletion("chat", HELLO, node_id="chat-b")

    assert asked(cluster) == {"a": 0, "b": 1, "c": 0}


async def test_a_loaded_runner_serves_a_call_that_names_no_context_length(
    routed: LiteRouter, cluster: SimulatedCluster
) -> None:
    cluster["a"].preload("qwen3:8b", num_ctx=8192)
    loads = cluster["a"].load_count

    await routed.acompletion("chat", HELLO, node_id="a")

    assert cluster["a"].load_count == loads


# -------------------------------------------------------------- what is not ours


async def test_a_group_without_ollama_nodes_is_left_alone(
    strategy: HydraRoutingStrategy, cluster: SimulatedCluster
) -> None:
    others = [
        {
            "model_name": "other",
            "litellm_params": {"model": "openai/gpt-4o-mini", "api_key": "x", "mock_response": "x"},
            "model_info": {"id": f"other-{number}"},
        }
        for number in range(3)
    ]
    router = lite_router(model_list=[*deployments(cluster), *others])
    install(router, strategy)

    for _ in range(4):
        answer = await router.acompletion("other", HELLO)
        assert answer.choices[0].message.content == "x"
        assert decision_of(answer) is None
        assert router.completion("other", HELLO).choices[0].message.content == "x"
    assert not total(asked(cluster))


@pytest.mark.parametrize("lost", ["under 'least-busy'", "strategies of groups", "an auto-router"])
async def test_where_litellms_own_routing_would_be_lost_synchronous_calls_are_left_to_it(
    strategy: HydraRoutingStrategy, cluster: SimulatedCluster, lost: str
) -> None:
    rows = [*deployments(cluster), *clouds("x", "y")]
    settings: dict[str, Any] = {}
    if lost == "an auto-router":
        rows.append(auto_router("smart", "chat"))
    elif lost == "strategies of groups":
        group = {"group_name": "some", "models": ["other"], "routing_strategy": "least-busy"}
        settings = {"routing_groups": [group]}
    else:
        settings = {"routing_strategy": "least-busy"}
    router = lite_router(model_list=rows, **settings)
    if not hasattr(router, "register_plugin"):
        pytest.skip("before LiteLLM 1.109 its own strategy can be asked for the other groups")

    with pytest.warns(UserWarning, match=f"synchronous calls are left.* has .*{lost}"):
        install(router, strategy)

    assert router.completion("other", HELLO).choices[0].message.content in "xy"
    assert router.completion("chat", HELLO).choices[0].message.content
    await router.acompletion("chat", HELLO, node_id="b")
    assert asked(cluster)["b"] >= 1


async def test_an_auto_router_chooses_the_group_and_we_the_node(
    strategy: HydraRoutingStrategy, cluster: SimulatedCluster
) -> None:
    router = lite_router(model_list=[*deployments(cluster), auto_router("smart", "chat")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        install(router, strategy)

    for _ in range(3):
        await router.acompletion("smart", HELLO, node_id="c", max_tokens=3)

    assert asked(cluster) == {"a": 0, "b": 0, "c": 3}


async def test_no_routing_plugin_is_passed_by(
    strategy: HydraRoutingStrategy, cluster: SimulatedCluster
) -> None:
    class Nothing:
        async def run(self, context: Any) -> Any:
            context.candidate_models = []
            return context

    router = lite_router(model_list=deployments(cluster), plugins=[Nothing()], num_retries=0)
    with pytest.warns(UserWarning, match="has routing plugins"):
        install(router, strategy)

    with pytest.raises(ValueError, match="No deployments left"):
        await router.acompletion("chat", HELLO)
    with pytest.raises(ValueError, match="never runs the routing-plugin pipeline"):
        router.completion("chat", HELLO)

    assert not total(asked(cluster))


def test_before_109_litellms_own_strategy_chooses_synchronously_for_other_groups(
    strategy: HydraRoutingStrategy, cluster: SimulatedCluster
) -> None:
    router = lite_router(
        model_list=[*deployments(cluster), *clouds("x", "y")],
        routing_strategy="latency-based-routing",
    )
    if hasattr(router, "register_plugin"):
        pytest.skip("from LiteLLM 1.109 on synchronous calls of such a router are left alone")
    install(router, strategy)
    seen = {"x": {"latency": [9.0]}, "y": {"latency": [0.1]}}
    router.cache.set_cache(key="other_map", value=seen)

    chosen = [router.get_available_deployment("other", request_kwargs={}) for _ in range(8)]

    assert {one["model_info"]["id"] for one in chosen} == {"y"}


def test_a_deployment_that_litellm_has_cooled_down_gets_no_synchronous_call(
    routed: LiteRouter, cluster: SimulatedCluster
) -> None:
    cool_down(routed, "chat-a")

    for _ in range(6):
        routed.completion("chat", HELLO, max_tokens=3)

    counts = asked(cluster)
    assert counts["a"] == 0
    assert total(counts) == 6


def test_where_all_are_cooled_down_a_synchronous_call_fails_as_litellms_own(
    routed: LiteRouter, cluster: SimulatedCluster
) -> None:
    for node in "abc":
        cool_down(routed, f"chat-{node}")

    with pytest.raises(RouterRateLimitError):
        routed.completion("chat", HELLO, num_retries=0)

    assert not total(asked(cluster))


def test_cooldowns_of_groups_without_ollama_nodes_hold_for_synchronous_calls(
    strategy: HydraRoutingStrategy, cluster: SimulatedCluster
) -> None:
    router = lite_router(model_list=[*deployments(cluster), *clouds("x", "y")], num_retries=0)
    install(router, strategy)
    cool_down(router, "x")

    answers = [router.completion("other", HELLO) for _ in range(8)]

    assert {answer.choices[0].message.content for answer in answers} == {"y"}


@pytest.mark.parametrize("way", ["async", "sync"])
async def test_of_a_mixed_group_one_ollama_node_and_the_rest_are_litellms_to_choose_from(
    strategy: HydraRoutingStrategy, cluster: SimulatedCluster, hydra: Router, way: str
) -> None:
    cloud = {
        "model_name": "chat",
        "litellm_params": {"model": "openai/gpt-4o-mini", "api_key": "x", "mock_response": "x"},
        "model_info": {"id": "cloud"},
    }
    router = lite_router(model_list=[*deployments(cluster), cloud], num_retries=0)
    install(router, strategy)

    nodes: list[str] = []
    for _ in range(24):
        if way == "async":
            answer = await router.acompletion("chat", HELLO, node_id="b")
        else:
            answer = await asyncio.to_thread(router.completion, "chat", HELLO, node_id="b")
        nodes.append(answer._hidden_params["model_id"])
        if way == "async":  # nothing was held on a node for the other one
            assert (decision_of(answer) is None) == (nodes[-1] == "cloud")
        assert not any(hydra.nodes()[i].running for i in range(3)) or way == "sync"

    assert set(nodes) == {"cloud", "chat-b"}  # by chance once in 8 million runs
    assert asked(cluster) == {"a": 0, "b": nodes.count("chat-b"), "c": 0}


async def test_of_a_mixed_group_the_node_that_litellm_took_is_the_one_that_is_asked(
    strategy: HydraRoutingStrategy, cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place is held there after LiteLLM's choice, though another node may be as good by now."""
    model_list = [*deployments(cluster), {**clouds("x")[0], "model_name": "chat"}]
    router = lite_router(model_list=model_list, num_retries=0)
    install(router, strategy)
    reserve, held = AsyncHydraTransport.reserve, list[Any]()

    async def watched(self: AsyncHydraTransport, *args: Any, **words: Any) -> Any:
        held.append((words.get("node_id"), words.get("pin")))
        return await reserve(self, *args, **words)

    monkeypatch.setattr(AsyncHydraTransport, "reserve", watched)
    taken = 0
    for _ in range(24):
        held.clear()
        answer = await router.acompletion("chat", HELLO)
        node_id = answer._hidden_params["model_id"].removeprefix("chat-")
        if node_id != "x":
            taken += 1
            assert held[-1] == (cluster[node_id].url, "require")

    assert taken


async def test_the_lowest_order_is_taken_while_it_can_be(
    strategy: HydraRoutingStrategy, cluster: SimulatedCluster
) -> None:
    model_list = deployments(cluster)
    for order, one in enumerate(model_list):
        one["litellm_params"]["order"] = 3 - order
    router = lite_router(model_list=model_list)
    install(router, strategy)
    for _ in range(6):
        await router.acompletion("chat", HELLO)
    assert asked(cluster) == {"a": 0, "b": 0, "c": 6}

    cluster["c"].kill()
    await router.acompletion("chat", HELLO)
    await router.acompletion("chat", HELLO)

    assert asked(cluster)["b"] == 2


async def test_tags_are_honoured(strategy: HydraRoutingStrategy, cluster: SimulatedCluster) -> None:
    model_list = deployments(cluster)
    for tag, one in zip(("free", "paid", "default"), model_list, strict=True):
        one["litellm_params"]["tags"] = [tag]
    router = lite_router(model_list=model_list, enable_tag_filtering=True)
    install(router, strategy)

    for _ in range(3):
        await router.acompletion("chat", HELLO, metadata={"tags": ["paid"]})
        await router.acompletion("chat", HELLO)

    assert asked(cluster) == {"a": 0, "b": 3, "c": 3}


async def test_an_alias_and_a_fallback_go_to_the_right_model(
    strategy: HydraRoutingStrategy, cluster: SimulatedCluster
) -> None:
    router = lite_router(
        model_list=[
            *deployments(cluster, "big", "ollama_chat/nobody-has-this:70b"),
            *deployments(cluster, "small", "ollama_chat/llama3.2:3b"),
        ],
        model_group_alias={"mine": "small"},
        fallbacks=[{"big": ["small"]}],
    )
    install(router, strategy)

    first = await router.acompletion("mine", HELLO)
    second = await router.acompletion("big", HELLO)

    assert first.choices[0].message.content
    assert second.choices[0].message.content
    assert {body["model"] for body in bodies(cluster)} == {"llama3.2:3b"}


async def test_a_group_of_several_models_goes_to_the_node_that_is_ready(
    strategy: HydraRoutingStrategy, cluster: SimulatedCluster
) -> None:
    model_list = deployments(cluster)
    model_list[0]["litellm_params"]["model"] = "ollama_chat/llama3.2:3b"
    cluster["b"].remove_model("qwen3:8b")
    router = lite_router(model_list=model_list)
    install(router, strategy)

    for _ in range(6):
        await router.acompletion("chat", HELLO)

    assert asked(cluster)["b"] == 0
    assert asked(cluster)["a"] >= 1


# ------------------------------------------------------------------ routers' lives


async def test_two_routers_share_one_ledger(
    strategy: HydraRoutingStrategy, cluster: SimulatedCluster, hydra: Router
) -> None:
    routers = [lite_router(model_list=deployments(cluster)) for _ in range(2)]
    for router in routers:
        install(router, strategy)
    assert litellm.callbacks.count(strategy) == 1

    calls = [router.acompletion("chat", HELLO, max_tokens=50) for router in routers * 6]
    await asyncio.gather(*calls)

    assert min(asked(cluster).values()) >= 2


async def test_a_router_made_anew_is_routed_without_being_installed_again(
    routed: LiteRouter, cluster: SimulatedCluster
) -> None:
    again = lite_router(model_list=deployments(cluster))

    await again.acompletion("chat", HELLO, node_id="b")

    assert asked(cluster) == {"a": 0, "b": 1, "c": 0}


async def test_a_change_of_settings_leaves_asynchronous_calls_routed(
    routed: LiteRouter, cluster: SimulatedCluster
) -> None:
    routed.update_settings(routing_strategy="least-busy", num_retries=1)

    for _ in range(3):
        await routed.acompletion("chat", HELLO, node_id="c")

    assert asked(cluster) == {"a": 0, "b": 0, "c": 3}


async def test_a_deployment_added_later_brings_its_node(
    cluster: SimulatedCluster, hydra: Router
) -> None:
    from hydra_llm.integrations.litellm import uninstall

    first, *rest = deployments(cluster)
    router = lite_router(model_list=[first])
    strategy = install(router, HydraRoutingStrategy())
    try:
        await router.acompletion("chat", HELLO)
        for one in rest:
            router.add_deployment(litellm.types.router.Deployment(**one))
        await router.acompletion("chat", HELLO, node_id="chat-c")
        assert asked(cluster) == {"a": 1, "b": 0, "c": 1}
        assert strategy.hydra is not None
        assert len(strategy.hydra.configured) == 3
        until(lambda: strategy.hydra is not None and not strategy.hydra.in_flight)
    finally:
        uninstall(strategy)


async def test_what_a_deployment_says_of_its_node_is_believed(cluster: SimulatedCluster) -> None:
    from hydra_llm.integrations.litellm import uninstall

    model_list = deployments(cluster)
    for gb, one in zip((8, 24, 48), model_list, strict=True):
        node_id = one["model_info"]["id"][-1]
        one["model_info"]["hydra"] = {"node_id": node_id, "vram_gb": gb, "labels": [f"gb{gb}"]}
    router = lite_router(model_list=model_list)
    strategy = install(router, HydraRoutingStrategy())
    try:
        await router.acompletion("chat", HELLO, min_vram_gb=40)
        await router.acompletion("chat", HELLO, require_labels=["gb8"])
        assert asked(cluster) == {"a": 1, "b": 0, "c": 1}
        assert strategy.hydra is not None
        assert [n.id for n in strategy.hydra.configured] == ["a", "b", "c"]
    finally:
        uninstall(strategy)


def test_only_a_router_of_litellms_can_be_served() -> None:
    with pytest.raises(ConfigurationError, match=r"takes a litellm\.Router"):
        install("config.yaml")  # pyright: ignore[reportArgumentType]  # the point


def test_a_deployment_that_cannot_be_is_told_when_installing(
    strategy: HydraRoutingStrategy,
) -> None:
    wrong = {
        "model_name": "chat",
        "litellm_params": {"model": "ollama_chat/x", "api_base": "http://localhost:99999"},
    }
    router = lite_router(model_list=[wrong])

    with pytest.raises(ConfigurationError, match="99999"):
        install(router, strategy)


def clouds(*ids: str) -> list[dict[str, Any]]:
    """The group `other`, of another provider; its deployments answer with their ids."""
    return [
        {
            "model_name": "other",
            "litellm_params": {"model": "openai/gpt-4o-mini", "api_key": "x", "mock_response": one},
            "model_info": {"id": one},
        }
        for one in ids
    ]


def auto_router(name: str, group: str) -> dict[str, Any]:
    """A row that stands for LiteLLM's choice among groups, here of one."""
    return {
        "model_name": name,
        "litellm_params": {
            "model": "auto_router/complexity_router",
            "complexity_router_config": {
                "tiers": dict.fromkeys(("SIMPLE", "MEDIUM", "COMPLEX"), group)
            },
            "complexity_router_default_model": group,
        },
    }


def cool_down(router: LiteRouter, deployment: str) -> None:
    """Have LiteLLM put a deployment aside."""
    cooldowns = router.health().cooldowns if hasattr(router, "health") else router.cooldown_cache
    cooldowns.add_deployment_to_cooldown(
        model_id=deployment,
        original_exception=litellm.RateLimitError("busy", llm_provider="x", model="x"),
        exception_status=429,
        cooldown_time=60,
    )


async def test_a_node_that_is_configured_keeps_its_name_where_a_deployment_gives_it_too(
    cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is one node, and nothing to be warned of."""
    nodes = [{"id": node.id, "url": node.url, "local": False} for node in cluster]
    monkeypatch.setenv("HYDRA_LLM_NODES", json.dumps(nodes))
    model_list = deployments(cluster)
    for node, one in zip(cluster, model_list, strict=True):
        one["model_info"] = {"id": node.id, "hydra": {"node_id": node.id}}
    router = lite_router(model_list=model_list)
    strategy = HydraRoutingStrategy()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        install(router, strategy)
        answer = await router.acompletion("chat", HELLO, node_id="b")

    decision = decision_of(answer)
    assert decision is not None
    assert decision["selected_node"] == "b"
    assert strategy.hydra is not None
    assert [node.id for node in strategy.hydra.configured] == ["a", "b", "c"]
    await auntil(lambda: strategy.hydra is not None and not strategy.hydra.in_flight)
    uninstall(strategy)
