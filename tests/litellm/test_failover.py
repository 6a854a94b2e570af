"""What a caller sees of a node that fails: nothing, as long as another one can serve."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest
from litellm import exceptions as errors

from hydra_llm import Router
from hydra_llm.integrations.litellm import (
    HydraRoutingStrategy,
    decision_of,
    install,
    uninstall,
)
from hydra_llm.testing import (
    Behaviour,
    CutFault,
    ErrorLineFault,
    Fault,
    HangFault,
    MissingModelFault,
    ResetFault,
    SimulatedCluster,
    SimulatedModel,
    StatusFault,
)
from tests.litellm.conftest import (
    CHAT,
    EMBEDDING,
    HELLO,
    OTHER,
    LiteRouter,
    asked,
    auntil,
    deployments,
    lite_router,
    loaded_cluster,
    until,
)
from tests.router.conftest import make_router

# ---------------------------------------------------------------- a node that is dead


@pytest.mark.parametrize("dead", ["a", "b", "c"])
@pytest.mark.parametrize("when", ["before", "in the middle"])
async def test_a_dead_node_costs_no_request(
    routed: LiteRouter, cluster: SimulatedCluster, dead: str, when: str
) -> None:
    if when == "before":
        cluster[dead].kill()
    for number in range(20):
        if when == "in the middle" and number == 7:
            cluster[dead].kill()
        await asyncio.gather(*(routed.acompletion("chat", HELLO) for _ in range(3)))

    assert sum(asked(cluster).values()) >= 60


@pytest.mark.parametrize("dead", ["a", "b", "c"])
def test_a_dead_node_costs_no_synchronous_request(
    routed: LiteRouter, cluster: SimulatedCluster, dead: str
) -> None:
    for number in range(20):
        if number == 7:
            cluster[dead].kill()
        assert routed.completion("chat", HELLO).choices[0].message.content


BEFORE_THE_FIRST_PART: dict[str, Fault] = {
    "busy": StatusFault(503),
    "broken": StatusFault(500),
    "limited": StatusFault(429),
    "without the model": MissingModelFault(),
    "wants a key": StatusFault(401),
    "reset": ResetFault(),
    "error line first": ErrorLineFault(),
}


@pytest.mark.parametrize("fault", BEFORE_THE_FIRST_PART)
@pytest.mark.parametrize("kind", ["whole", "stream", "sync", "sync stream"])
async def test_what_fails_before_the_first_part_is_served_by_another_node(
    routed: LiteRouter, cluster: SimulatedCluster, hydra: Router, fault: str, kind: str
) -> None:
    cluster["a"].inject(BEFORE_THE_FIRST_PART[fault])
    if fault == "error line first" and "stream" not in kind:
        pytest.skip("an answer in one piece has no lines")

    answer = await _ask(routed, kind, node_id="a")

    decision = decision_of(answer)
    assert decision is not None
    tried = [attempt["node_id"] for attempt in decision["attempts"]]
    assert tried[0] == "a"
    assert len(tried) == 2
    assert decision["attempts"][1]["outcome"] == "ok"
    assert decision["selected_node"] == tried[1] != "a"
    await auntil(lambda: not hydra.in_flight)


@pytest.mark.parametrize("kind", ["whole", "sync"])
async def test_so_is_what_goes_to_a_node_by_another_provider(
    strategy: HydraRoutingStrategy, cluster: SimulatedCluster, hydra: Router, kind: str
) -> None:
    """Over LiteLLM's own connections, so its hooks alone tell what became of it."""
    rows = [
        {
            "model_name": "chat",
            "litellm_params": {
                "model": f"openai/{CHAT}",
                "api_base": f"{node.url}/v1",
                "api_key": "x",
            },
            "model_info": {"id": node.id, "hydra": {"node_id": node.id}},
        }
        for node in cluster
    ]
    router = lite_router(model_list=rows, num_retries=2)
    install(router, strategy)
    cluster["a"].inject(StatusFault(500))

    for number in range(4):
        answer = await _ask(router, kind, node_id="a")
        assert answer._hidden_params["model_id"] != "a"
        if kind == "whole" and not number:  # of synchronous calls it is told a moment later
            decision = decision_of(answer)
            assert decision is not None
            told = decision["attempts"][0]
            assert (told["node_id"], told["status_code"]) == ("a", 500)
            assert decision["attempts"][-1]["outcome"] == "ok"
    await auntil(lambda: not hydra.in_flight)


async def _ask(router: LiteRouter, kind: str, **more: Any) -> Any:
    if kind == "whole":
        return await router.acompletion("chat", HELLO, **more)
    if kind == "stream":
        stream = await router.acompletion("chat", HELLO, stream=True, **more)
        assert [part async for part in stream]
        return stream
    if kind == "sync":
        return await asyncio.to_thread(router.completion, "chat", HELLO, **more)

    def read() -> Any:
        stream = router.completion("chat", HELLO, stream=True, **more)
        assert list(stream)
        return stream

    return await asyncio.to_thread(read)


async def test_a_node_that_hangs_is_left_when_the_callers_time_is_over(
    routed: LiteRouter, cluster: SimulatedCluster, hydra: Router
) -> None:
    cluster["a"].inject(HangFault())

    answer = await routed.acompletion("chat", HELLO, node_id="a", timeout=0.5)

    decision = decision_of(answer)
    assert decision is not None
    assert decision["selected_node"] != "a"
    await auntil(lambda: not hydra.in_flight)


async def test_failures_that_we_have_dealt_with_do_not_make_litellm_close_the_group(
    routed: LiteRouter, cluster: SimulatedCluster
) -> None:
    for _ in range(4):
        for node in cluster:
            node.inject(StatusFault(500), times=1)
        # Of three tries two may fail; LiteLLM counts each of them against its deployment.
        with contextlib.suppress(errors.InternalServerError, errors.ServiceUnavailableError):
            await routed.acompletion("chat", HELLO)
        for node in cluster:
            node.clear_faults()

    answer = await routed.acompletion("chat", HELLO)

    assert answer.choices[0].message.content


# ------------------------------------------------------------ what cannot be mended


async def test_all_nodes_down_is_503_and_names_each(
    routed: LiteRouter, cluster: SimulatedCluster, hydra: Router
) -> None:
    hydra.refresh()
    for node in cluster:
        node.kill()

    began = time.monotonic()
    with pytest.raises(errors.ServiceUnavailableError) as first:
        await routed.acompletion("chat", HELLO)
    hydra.refresh()
    with pytest.raises(errors.ServiceUnavailableError) as second:
        await routed.acompletion("chat", HELLO)

    assert time.monotonic() - began < 10
    for caught in (first, second):
        assert caught.value.status_code == 503
        for node in cluster:
            assert f"{node.id} " in str(caught.value) or f"{node.id}:" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "kind", "says"),
    [
        ({"min_vram_gb": 500, "vram": "require"}, errors.BadRequestError, "short of VRAM"),
        ({"require_labels": ["gold"]}, errors.BadRequestError, "label"),
        ({"node_id": "zz", "pin": "require"}, errors.BadRequestError, "not the pinned node"),
        ({"min_vram_gb": "much"}, errors.BadRequestError, "min_vram_gb"),
        ({"deadline_s": 1e-6}, errors.Timeout, "1e-06 s"),
    ],
)
async def test_what_no_retry_can_change_is_told_at_once(
    routed: LiteRouter,
    cluster: SimulatedCluster,
    words: dict[str, Any],
    kind: type[Exception],
    says: str,
) -> None:
    with pytest.raises(kind, match=says):
        await routed.acompletion("chat", HELLO, **words)
    with pytest.raises(kind, match=says):
        await asyncio.to_thread(routed.completion, "chat", HELLO, **words)

    assert not sum(asked(cluster).values())


async def test_a_model_that_no_node_has_is_404_with_what_to_do(
    routed: LiteRouter, cluster: SimulatedCluster, hydra: Router
) -> None:
    for node in cluster:
        node.remove_model("qwen3:8b")
    hydra.refresh()

    with pytest.raises(errors.NotFoundError, match="qwen3:8b"):
        await routed.acompletion("chat", HELLO)


async def test_a_mistake_of_the_callers_blames_no_node_and_is_not_repeated(
    routed: LiteRouter, cluster: SimulatedCluster, hydra: Router
) -> None:
    for node in cluster:
        node.inject(StatusFault(400, text="invalid options"))

    with pytest.raises(errors.BadRequestError, match="invalid options"):
        await routed.acompletion("chat", HELLO)

    assert sum(asked(cluster).values()) == 1
    assert all(node.penalty_seconds == 0 for node in hydra.nodes())


@pytest.mark.parametrize(
    "fault", [ErrorLineFault(after=3), CutFault(after=3), ResetFault(after=3)], ids=str
)
@pytest.mark.parametrize("way", ["async", "sync"])
async def test_a_stream_that_breaks_after_its_first_part_names_the_node(
    routed: LiteRouter, cluster: SimulatedCluster, hydra: Router, fault: Fault, way: str
) -> None:
    cluster["b"].inject(fault)
    parts: list[Any] = []

    async def read() -> None:
        stream = await routed.acompletion("chat", HELLO, stream=True, node_id="b")
        async for part in stream:
            parts.append(part)  # what came before the break is looked at

    def read_sync() -> None:
        parts.extend(routed.completion("chat", HELLO, stream=True, node_id="b"))

    with pytest.raises(Exception, match="the answer of b") as caught:
        await (read() if way == "async" else asyncio.to_thread(read_sync))

    assert parts
    assert "KeyError" not in str(caught.value)
    assert asked(cluster) == {"a": 0, "b": 1, "c": 0}
    until(lambda: not hydra.in_flight)


@pytest.mark.parametrize("way", ["async", "sync"])
async def test_another_node_goes_on_with_a_stream_if_that_is_asked_for(way: str) -> None:
    counting = SimulatedModel(
        CHAT, behaviour=Behaviour("count", go_token="<|go|>"), template="open"
    )
    with (
        loaded_cluster(models=(counting, OTHER, EMBEDDING)) as cluster,
        make_router(cluster) as hydra,
    ):
        strategy = HydraRoutingStrategy(hydra)
        router = lite_router(model_list=deployments(cluster))
        install(router, strategy)
        cluster["b"].inject(ResetFault(after=3))
        asking = {"stream": True, "node_id": "b", "continue_streams": True, "max_tokens": 8}
        try:
            if way == "async":
                answer = await router.acompletion("chat", HELLO, **asking)
                parts = [part async for part in answer]
            else:
                answer = router.completion("chat", HELLO, **asking)
                parts = await asyncio.to_thread(list, answer)
        finally:
            uninstall(strategy)

        text = "".join(part.choices[0].delta.content or "" for part in parts)
        assert text == "".join(f" n{number:04}" for number in range(1, 9))
        decision = decision_of(answer)
        assert decision is not None
        assert decision["continued"] == {"from": "b", "after_parts": 3}
        assert [a["outcome"] for a in decision["attempts"]] == ["reset", "ok"]
        until(lambda: not hydra.in_flight)


async def test_the_prompt_is_in_no_error(routed: LiteRouter, cluster: SimulatedCluster) -> None:
    for node in cluster:
        node.inject(StatusFault(500))

    with pytest.raises(Exception, match="hydra-llm") as caught:
        await routed.acompletion("chat", [{"role": "user", "content": "my secret"}])

    assert "my secret" not in str(caught.value)
