"""Requests go where they should, on real sockets."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import ollama
import pytest

from hydra_llm import (
    AsyncClient,
    AsyncHydraTransport,
    Client,
    ConfigurationError,
    DeadlineError,
    HydraTransport,
    Node,
    NoEligibleNodeError,
    NoNodeUpError,
    QueueFullError,
    Router,
    RoutingWordError,
)
from hydra_llm.testing import (
    HangFault,
    RequestRecord,
    SimulatedCluster,
    SimulatedModel,
    SimulatedNode,
)
from hydra_llm.transport import decision_of
from hydra_llm.types import GB
from tests.helpers import BIG, request, snapshot
from tests.router.conftest import MODEL, make_nodes, make_router

MESSAGES = [{"role": "user", "content": "Tell me about lighthouses."}]


def chats(node: SimulatedNode) -> list[RequestRecord]:
    return [record for record in node.requests if record.path == "/api/chat"]


def test_a_pin_holds_twenty_times_of_twenty(router: Router) -> None:
    with Client(router=router) as client:
        answered = [client.chat(MODEL, MESSAGES, node_id="b").node_id for _ in range(20)]

    assert answered == ["b"] * 20


def test_what_a_load_will_put_into_system_memory_is_booked_with_it(router: Router) -> None:
    small = snapshot(models=(BIG,), free_vram_gb=8.0)

    place = router._place(request(BIG), (small,), {}, 0.0, 0)

    assert 0.3 < place.cpu_share < 0.7
    assert place.cpu_share == pytest.approx(1 - place.reserved_bytes / place.size_bytes)


def test_the_decision_comes_with_a_whole_answer(router: Router, cluster: SimulatedCluster) -> None:
    with Client(router=router) as client:
        answer = client.chat(MODEL, MESSAGES, node_id="c")

    decision = answer["routing_decision"]
    assert decision["requested_node"] == "c"
    assert decision["selected_node"] == "c" == answer["node_id"]
    assert answer["node_url"] == cluster["c"].url
    assert decision["reason"].startswith("c: pinned by node_id")
    assert [c["node_id"] for c in decision["candidates"]] == ["c"]
    assert {r["node_id"]: r["reason"] for r in decision["rejections"]} == {
        "a": "not the pinned node",
        "b": "not the pinned node",
    }
    assert decision["predicted"]["total"] > 0
    assert 0 < decision["actual"]["total"] < 60
    assert [a["outcome"] for a in decision["attempts"]] == ["ok"]
    assert json.loads(answer.model_dump_json())["routing_decision"]["selected_node"] == "c"


def test_only_the_last_part_of_a_stream_carries_the_decision(router: Router) -> None:
    with Client(router=router) as client:
        parts = list(client.chat(MODEL, MESSAGES, stream=True))

    assert all(isinstance(part, ollama.ChatResponse) for part in parts)
    assert [part.routing_decision is not None for part in parts] == [False] * (len(parts) - 1) + [
        True
    ]
    assert parts[-1]["routing_decision"]["actual"]["total"] > 0


def test_no_routing_word_reaches_ollama(router: Router, cluster: SimulatedCluster) -> None:
    words: dict[str, Any] = {
        "node_id": "a",
        "min_vram_gb": 1,
        "prefer_local": False,
        "priority": 9,
        "session": "s",
        "exclude_nodes": ["c"],
        "require_labels": [],
        "prefer_labels": ["x"],
        "deadline_s": 60,
        "pin": "require",
        "vram": "prefer",
    }
    with Client(router=router) as client:
        client.chat(MODEL, MESSAGES, **words)

    (record,) = [r for r in cluster["a"].requests if r.path == "/api/chat"]
    assert set(record.body) <= {"model", "messages", "tools", "stream", "options"}
    assert not any(name.startswith("x-hydra") for name in record.headers)


def test_the_loaded_runners_context_is_sent_so_that_nothing_is_reloaded(
    cluster: SimulatedCluster, router: Router
) -> None:
    cluster["a"].preload(MODEL, num_ctx=8192)
    router.refresh()

    with Client(router=router, node_id="a") as client:
        client.chat(MODEL, MESSAGES)
        client.chat(MODEL, MESSAGES, options={"temperature": 0})

    bodies = [r.body for r in cluster["a"].requests if r.path == "/api/chat"]
    assert [body["options"]["num_ctx"] for body in bodies] == [8192, 8192]
    assert bodies[1]["options"]["temperature"] == 0
    assert cluster["a"].load_count == 0


def test_a_callers_own_context_is_left_alone(cluster: SimulatedCluster, router: Router) -> None:
    with Client(router=router, node_id="a") as client:
        client.chat(MODEL, MESSAGES, options={"num_ctx": 2048})

    (record,) = [r for r in cluster["a"].requests if r.path == "/api/chat"]
    assert record.body["options"]["num_ctx"] == 2048


def test_a_different_context_goes_to_the_node_whose_runner_has_it(
    cluster: SimulatedCluster, router: Router
) -> None:
    cluster["b"].preload(MODEL, num_ctx=16384)
    router.refresh()

    with Client(router=router) as client:
        for _ in range(5):
            assert client.chat(MODEL, MESSAGES, options={"num_ctx": 16384}).node_id == "b"

    assert sum(node.load_count for node in cluster) == 0


def test_name_forms_are_one_model(router: Router, cluster: SimulatedCluster) -> None:
    with Client(router=router) as client:
        for name in (
            "LLAMA3.2:3b",
            "library/llama3.2:3b",
            "registry.ollama.ai/library/llama3.2:3b",
        ):
            assert client.chat(name, MESSAGES).model == name

    assert sum(node.load_count for node in cluster) == 0


def test_prefer_local_is_worth_its_seconds_and_no_more(cluster: SimulatedCluster) -> None:
    nodes = [cluster["a"].node(local=True), cluster["b"].node(local=False)]
    with make_router(cluster, nodes=nodes, prefer_local_seconds=3.0) as router:
        local = router.explain(MODEL)
        anywhere = router.explain(MODEL, prefer_local=False)

    costs = {c.node_id: c.costs["preference"] for c in local.candidates}
    assert local.selected_node == "a"
    assert costs == {"a": 0.0, "b": 3.0}
    assert all(c.costs["preference"] == 0.0 for c in anywhere.candidates)


def test_explain_sends_nothing_and_says_when_nobody_can(
    router: Router, cluster: SimulatedCluster
) -> None:
    decision = router.explain("nobody:latest")

    assert decision.selected_node is None
    assert "0/3 nodes can take" in decision.reason
    assert not any(
        r.method == "POST" and r.path == "/api/chat" for n in cluster for r in n.requests
    )


def test_a_returning_node_serves_again_within_two_probe_intervals(
    cluster: SimulatedCluster,
) -> None:
    interval = 0.3
    with (
        make_router(cluster, health_check_interval=interval) as router,
        Client(router=router, pin="require") as client,
    ):
        assert client.chat(MODEL, MESSAGES, node_id="b").node_id == "b"
        cluster["b"].kill()
        with pytest.raises(ConnectionError):
            client.chat(MODEL, MESSAGES, node_id="b")
        cluster["b"].revive()
        back_at = time.monotonic()
        while True:
            try:
                client.chat(MODEL, MESSAGES, node_id="b")
                break
            except (NoEligibleNodeError, ConnectionError):
                assert time.monotonic() - back_at < 2 * interval * 1.1 + 0.5
                time.sleep(0.01)
        assert time.monotonic() - back_at < 2 * interval * 1.1 + 0.5


def kill_and_revive(node: SimulatedNode, stop: threading.Event) -> None:
    """As a flaky machine: dead for a moment, back for a moment, until told to stop."""
    while not stop.wait(0.1):
        node.kill()
        stop.wait(0.15)
        node.revive()
    node.revive()


@pytest.fixture
def flaky(cluster: SimulatedCluster) -> Any:
    stop = threading.Event()
    thread = threading.Thread(target=kill_and_revive, args=(cluster["b"], stop))
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.mark.usefixtures("flaky")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "first byte of a stream"])
def test_two_hundred_sync_requests_survive_a_node_that_dies_and_returns(
    router: Router, stream: bool
) -> None:
    def ask(client: Client) -> str:
        answer = client.chat(MODEL, MESSAGES, stream=stream)
        if not stream:
            return str(answer.node_id)
        with_first = next(answer)
        answer.close()
        return str(with_first.model)

    with Client(router=router) as client, ThreadPoolExecutor(8) as workers:
        answered = list(workers.map(lambda _: ask(client), range(200)))

    assert len(answered) == 200


@pytest.mark.usefixtures("flaky")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "first byte of a stream"])
async def test_two_hundred_async_requests_survive_a_node_that_dies_and_returns(
    router: Router, stream: bool
) -> None:
    gate = asyncio.Semaphore(8)

    async def ask(client: AsyncClient) -> str:
        async with gate:
            answer = await client.chat(MODEL, MESSAGES, stream=stream)
            if not stream:
                return str(answer.node_id)
            with_first = await answer.__anext__()
            await answer.aclose()
            return str(with_first.model)

    async with AsyncClient(router=router) as client:
        answered = await asyncio.gather(*(ask(client) for _ in range(200)))

    assert len(answered) == 200


def test_four_big_models_at_once_are_spread_over_two_idle_nodes() -> None:
    names = ("one", "two", "three", "four")
    models = [SimulatedModel(f"{name}:14b", size_gb=14.0) for name in names]
    nodes = [SimulatedNode(n, models=models, vram_gb=24.0, speed=100.0) for n in ("a", "b")]
    with (
        SimulatedCluster(nodes) as cluster,
        make_router(cluster) as router,
        Client(router=router) as client,
        ThreadPoolExecutor(4) as workers,
    ):
        router.nodes()
        answers = list(workers.map(lambda m: client.chat(m.name, MESSAGES), models))

        assert Counter(answer.node_id for answer in answers) == {"a": 2, "b": 2}
        assert [node.load_count for node in cluster] == [2, 2]
        assert all(node.peak_vram_bytes <= 24e9 for node in cluster)


def test_a_model_only_one_node_has_never_fails() -> None:
    nodes = [*make_nodes("a", models=("qwen3:8b",)), *make_nodes("b", models=("gemma3:12b",))]
    with (
        SimulatedCluster(nodes) as cluster,
        make_router(cluster) as router,
        Client(router=router) as client,
        ThreadPoolExecutor(4) as workers,
    ):
        wanted = ["qwen3:8b", "gemma3:12b"] * 10
        answers = list(workers.map(lambda name: client.chat(name, MESSAGES), wanted))

    assert [answer.node_id for answer in answers] == ["a", "b"] * 10


# --------------------------------------------------------------------- hung & black


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_frozen_node_is_not_waited_for_by_requests_to_others(
    cluster: SimulatedCluster, router: Router, stream: bool
) -> None:
    router.nodes()
    cluster["a"].freeze()
    while next(n for n in router.nodes() if n.id == "a").health == "up":
        time.sleep(0.01)

    with Client(router=router) as client:
        for _ in range(10):
            answer = client.chat(MODEL, MESSAGES, stream=stream)
            assert (list(answer)[-1] if stream else answer).node_id != "a"

    cluster["a"].thaw()


# ------------------------------------------------------------------------- priority


def test_a_high_priority_goes_first_when_nodes_are_busy() -> None:
    order: list[int] = []

    def ask(client: Client, priority: int) -> None:
        client.chat(MODEL, MESSAGES, priority=priority, options={"num_predict": 40})
        order.append(priority)

    with (
        SimulatedCluster(make_nodes("a", speed=20.0)) as cluster,
        make_router(cluster) as router,
        Client(router=router) as client,
        ThreadPoolExecutor(10) as workers,
    ):
        cluster["a"].preload(MODEL)
        router.refresh()
        jobs = [workers.submit(ask, client, 5) for _ in range(2)]
        while router.in_flight < 2:
            time.sleep(0.001)
        for count, priority in enumerate((2, 2, 2, 10), start=1):
            jobs.append(workers.submit(ask, client, priority))
            while router.waiting < count and priority < 10:
                time.sleep(0.001)
        for job in jobs:
            job.result()

    assert order.index(10) < min(order.index(2), 4)
    assert sorted(order) == [2, 2, 2, 5, 5, 10]


def test_a_full_line_is_a_clear_error(cluster: SimulatedCluster) -> None:
    cluster["a"].inject(HangFault())
    nodes = [cluster["a"].node()]
    with (
        make_router(cluster, nodes=nodes, max_queue=1, whole_answer_timeout=1.0) as router,
        Client(router=router) as client,
        ThreadPoolExecutor(3) as workers,
    ):
        jobs = [workers.submit(client.chat, MODEL, MESSAGES) for _ in range(3)]
        while router.in_flight < 2 or router.waiting < 1:
            time.sleep(0.001)
        with pytest.raises(QueueFullError, match="1 requests wait"):
            client.chat(MODEL, MESSAGES)
        for job in jobs:
            assert job.exception() is not None


def test_a_deadline_nobody_can_make_fails_early_with_the_prediction(router: Router) -> None:
    with Client(router=router) as client, pytest.raises(DeadlineError, match="expected"):
        client.chat(MODEL, MESSAGES, deadline_s=0.001)


def test_a_deadline_that_passes_while_waiting_ends_the_wait(cluster: SimulatedCluster) -> None:
    cluster["a"].inject(HangFault())
    with (
        make_router(cluster, nodes=[cluster["a"].node()]) as router,
        Client(router=router) as client,
    ):
        began = time.monotonic()
        with pytest.raises((DeadlineError, ConnectionError)):
            client.chat(MODEL, MESSAGES, deadline_s=1.5, options={"num_predict": 1})
        assert 1.0 < time.monotonic() - began < 3.0
        assert router.in_flight == 0


# ------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"min_vram_gb": -1}, "min_vram_gb=-1"),
        ({"min_vram_gb": float("nan")}, "min_vram_gb=nan"),
        ({"min_vram_gb": float("inf")}, "min_vram_gb=inf"),
        ({"priority": 0}, "priority=0"),
        ({"priority": 11}, "priority=11"),
        ({"pin": "maybe"}, "pin='maybe'"),
        ({"deadline_s": 0}, "deadline_s=0"),
        ({"nod_id": "a"}, "did you mean 'node_id'?"),
        ({"tempreature": 1}, "is no routing word"),
    ],
)
def test_a_wrong_word_is_a_clear_error_and_nothing_is_sent(
    router: Router, cluster: SimulatedCluster, words: dict[str, Any], text: str
) -> None:
    with Client(router=router) as client, pytest.raises(RoutingWordError) as caught:
        client.chat(MODEL, MESSAGES, **words)

    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(r.path == "/api/chat" for n in cluster for r in n.requests)


def test_an_unknown_node_or_a_foreign_url_as_pin_is_routed_and_says_so(router: Router) -> None:
    with Client(router=router) as client:
        for name in ("nobody", "http://u:secret@10.9.8.7:11434"):
            answer = client.chat(MODEL, MESSAGES, node_id=name)
            assert "is no configured node (a, b, c)" in answer.routing_decision.reason
            assert "secret" not in str(answer.routing_decision.to_dict()["reason"])


def test_credentials_of_a_node_go_to_it_alone_and_show_nowhere(
    cluster: SimulatedCluster, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    url = cluster["a"].url.replace("http://", "http://user:hush-hush@")
    with (
        make_router(cluster, nodes=[url, cluster["b"].url]) as router,
        Client(router=router) as client,
    ):
        ids = [node.id for node in router.nodes()]
        for node_id in ids * 2:
            answer = client.chat(MODEL, MESSAGES, node_id=node_id)
            shown = f"{answer!r} {router!r} {router.nodes()!r} {router.settings!r} {client!r}"
            shown += str(answer.routing_decision.to_dict()) + str(router.get_node_resources())
            assert "hush-hush" not in shown

    assert all("authorization" in r.headers for r in cluster["a"].requests)
    assert not any("authorization" in r.headers for r in cluster["b"].requests)
    assert "hush-hush" not in caplog.text
    assert "lighthouses" not in caplog.text


# ----------------------------------------------------------------------- other doors


def test_ollamas_own_client_works_over_the_transport(router: Router) -> None:
    client = ollama.Client(transport=HydraTransport(router=router, node_id="b"))

    assert client.chat(MODEL, MESSAGES).done
    assert [part.done for part in client.generate(MODEL, "Hi", stream=True)][-1] is True
    assert [m.model for m in client.list().models] == [MODEL]
    client.close()


async def test_ollamas_own_async_client_works_over_the_transport(router: Router) -> None:
    client = ollama.AsyncClient(transport=AsyncHydraTransport(router=router))

    assert (await client.chat(MODEL, MESSAGES)).done
    assert [part.done async for part in await client.generate(MODEL, "Hi", stream=True)][-1]
    assert [m.model for m in (await client.list()).models] == [MODEL]
    await client.close()


def test_openai_style_requests_are_routed_and_headers_say_where(
    router: Router, cluster: SimulatedCluster
) -> None:
    with httpx.Client(
        transport=HydraTransport(router=router),
        base_url="http://hydra/v1",
        headers={"Authorization": "Bearer unused"},
    ) as client:
        body = {"model": MODEL, "messages": MESSAGES}
        whole = client.post("chat/completions", json=body, headers={"x-hydra-node-id": "c"})
        with client.stream("POST", "chat/completions", json={**body, "stream": True}) as streamed:
            lines = [line for line in streamed.iter_lines() if line]
        listed = client.get("models").json()
        wrong = client.build_request("POST", "chat/completions", json=body)
        wrong.headers["x-hydra-priority"] = "11"
        with pytest.raises(RoutingWordError):
            client.send(wrong)

    assert whole.json()["choices"][0]["message"]["content"]
    assert whole.headers["x-hydra-node-id"] == "c"
    assert lines[-1] == "data: [DONE]"
    assert [model["id"] for model in listed["data"]] == [MODEL]
    sent = [r for n in cluster for r in n.requests if r.path.startswith("/v1")]
    assert not any("authorization" in r.headers or "x-hydra-node-id" in r.headers for r in sent)


def test_catalogues_are_merged_and_changes_need_a_node() -> None:
    nodes = [
        *make_nodes("a", models=("llama3.2:3b", "qwen3:8b")),
        *make_nodes("b", models=("llama3.2:3b",)),
    ]
    with (
        SimulatedCluster(nodes) as cluster,
        make_router(cluster) as router,
        Client(router=router) as client,
    ):
        cluster["b"].preload("llama3.2:3b")
        assert sorted(str(m.model) for m in client.list().models) == ["llama3.2:3b", "qwen3:8b"]
        assert [m.model for m in client.list(node_id="b").models] == ["llama3.2:3b"]
        assert [m.model for m in client.ps().models] == ["llama3.2:3b"]
        assert "tools" in (client.show("qwen3:8b").capabilities or [])
        with pytest.raises(ConfigurationError, match=r"say which with node_id=.*\(a, b\)"):
            client.delete("llama3.2:3b")
        with pytest.raises(ConfigurationError, match="no configured node is called 'z'"):
            client.list(node_id="z")


# ------------------------------------------------------------------------ life cycle


def test_clients_of_the_same_nodes_share_one_router(cluster: SimulatedCluster) -> None:
    urls = cluster.urls
    first, second = Client(urls), Client(urls)
    other = Client(urls[:1])
    try:
        assert first.router is second.router
        assert first.router is not other.router
        first.close()
        assert second.chat(MODEL, MESSAGES).done
    finally:
        second.close()
        other.close()
    with pytest.raises(RuntimeError, match="closed"):
        second.chat(MODEL, MESSAGES)


def test_two_event_loops_in_a_row_use_one_router(cluster: SimulatedCluster) -> None:
    with make_router(cluster) as router:
        client = AsyncClient(router=router)
        for _ in range(3):
            assert asyncio.run(_ask(client)).done


async def _ask(client: AsyncClient) -> Any:
    return await client.chat(MODEL, MESSAGES)


def test_threads_and_loops_share_one_ledger(cluster: SimulatedCluster) -> None:
    with make_router(cluster) as router, ThreadPoolExecutor(6) as workers:
        sync, aio = Client(router=router), AsyncClient(router=router)
        jobs = [workers.submit(lambda: sync.chat(MODEL, MESSAGES)) for _ in range(12)]
        jobs += [workers.submit(lambda: asyncio.run(_ask(aio))) for _ in range(12)]
        assert all(job.result().done for job in jobs)
        assert router.in_flight == 0


def test_node_resources_name_what_is_unknown(cluster: SimulatedCluster) -> None:
    nodes = [cluster["a"].node(), cluster["b"].node(vram_gb=None, ram_gb=None)]
    with make_router(cluster, nodes=nodes) as router:
        a, b = router.get_node_resources()

    assert a["healthy"] is True
    assert a["vram_total_gb"] == 24.0
    assert 0 < a["vram_available_gb"] < 24.0
    assert "config" in a["vram_source"]
    assert a["vram_age_s"] >= 0.0
    assert [m["name"] for m in a["loaded_models"]] == [MODEL]
    assert a["installed_models"] == [MODEL]
    assert a["in_flight"] == 0
    assert b["vram_total_gb"] is None
    assert b["vram_available_gb"] is None


def test_a_model_nobody_has_is_what_ollamas_client_raises_for_it(router: Router) -> None:
    with Client(router=router) as client, pytest.raises(ollama.ResponseError) as caught:
        client.chat("nobody", MESSAGES)

    assert isinstance(caught.value, NoEligibleNodeError)
    assert caught.value.status_code == 404
    assert str(caught.value) == (
        "0/3 nodes can take 'nobody:latest': 3 without the model; "
        "try 'ollama pull nobody:latest' on one of them"
    )


def test_nobody_reachable_is_a_connection_error_as_from_ollamas_client(
    cluster: SimulatedCluster,
) -> None:
    for node in cluster:
        node.kill()
    with make_router(cluster) as router, Client(router=router) as client:
        with pytest.raises(ConnectionError) as caught:
            client.chat(MODEL, MESSAGES)
        with pytest.raises(ConnectionError, match="0/3 nodes are up"):
            client.show(MODEL)

    assert isinstance(caught.value, NoNodeUpError)


def test_a_response_of_the_transport_can_be_asked_for_its_decision(router: Router) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "stream": False}
    with httpx.Client(transport=HydraTransport(router=router)) as client:
        answer = client.post("http://hydra/api/chat", json=body)
        version = client.get("http://hydra/api/version")

    decision = decision_of(answer)
    assert decision is not None
    assert decision.selected_node == answer.headers["x-hydra-node-id"]
    assert decision_of(version) is None


def test_a_key_given_to_the_client_goes_to_every_node_and_one_of_the_environment_to_none(
    cluster: SimulatedCluster, router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys() -> list[str | None]:
        return [r.headers.get("authorization") for n in cluster for r in chats(n)]

    with Client(router=router, headers={"Authorization": "Bearer for-all"}) as client:
        for node_id in "abc":
            client.chat(MODEL, MESSAGES, node_id=node_id)
    assert keys() == ["Bearer for-all"] * 3

    monkeypatch.setenv("OLLAMA_API_KEY", "for-the-cloud")
    with Client(router=router) as client:
        client.chat(MODEL, MESSAGES, node_id="a")
    assert keys().count(None) == 1


def test_a_model_that_was_unloaded_is_not_thought_warm_any_longer(
    cluster: SimulatedCluster, router: Router
) -> None:
    with Client(router=router) as client:
        client.generate(MODEL, keep_alive=0, node_id="a")

    def loaded_on_a() -> bool:
        return MODEL in next(n for n in router.nodes() if n.id == "a").loaded

    while loaded_on_a():
        time.sleep(0.005)
    assert MODEL not in cluster["a"].loaded


async def test_a_load_has_its_memory_from_the_moment_the_node_is_chosen() -> None:
    """What does not go onto the GPU is not taken from it."""
    with SimulatedCluster(make_nodes("a", vram_gb=4.0, token_output=10_000)) as cluster:
        nodes = [Node(one.url, id=one.id, vram_gb=4.0, local=False) for one in cluster]
        with make_router(cluster, nodes=nodes) as router:
            router.refresh()
            [fit] = router.fit(MODEL, num_ctx=32_768)
            assert fit["verdict"] == "offloads"
            transport = AsyncHydraTransport(router=router)
            call = {"model": MODEL, "messages": [], "options": {"num_ctx": 32_768}}

            held = await transport.reserve("/api/chat", call)

            [node] = router.nodes()
            [running] = node.running
            on_gpu = fit["need_gb"] * (1 - fit["cpu_share"])
            assert running.reserved_bytes / GB == pytest.approx(on_gpu, abs=0.01)
            assert 0 < running.reserved_bytes < 4 * GB

            held.first_byte()

            [node] = router.nodes()
            runner = node.loaded[MODEL]
            assert runner.size_bytes / GB == pytest.approx(fit["need_gb"], abs=0.01)
            assert runner.gpu_share == pytest.approx(1 - fit["cpu_share"], abs=0.01)
            held.cancelled()
            await transport.aclose()
