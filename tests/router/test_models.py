"""What the router tells of models, and whom it asks about them."""

from __future__ import annotations

import gc

import pytest

from hydra_llm import Client, HydraTransport, Node, NoNodeUpError, Router, RoutingWordError
from hydra_llm.testing import SimulatedCluster, SimulatedModel, SimulatedNode
from tests.router.conftest import MODEL, make_nodes, make_router


def test_what_is_known_of_a_model() -> None:
    # Another file under the same name.
    able = ("completion", "vision")
    big = SimulatedModel(MODEL, capabilities=able, context_length=5000, digest="d" * 64)
    nodes = [*make_nodes("a"), *make_nodes("b", models=(big,)), *make_nodes("c", models=())]
    with SimulatedCluster(nodes) as cluster:
        cluster["a"].preload(MODEL, num_ctx=8192)
        with make_router(cluster) as router:
            told = router.get_model_info("LLAMA3.2:3b")
            longer = router.get_model_info(MODEL, num_ctx=100_000)
            only_a = router.get_model_info(MODEL, node_id="a", pin="require")
            nobody = router.get_model_info("nobody/has:it")
    assert told == {
        "name": MODEL,
        "nodes": ["a", "b"],
        "loaded_on": ["a"],
        "capabilities": ["completion", "tools", "vision"],
        "context_length": 5000,
        "usable_context_length": 5000,
    }
    assert longer is not None
    assert longer["usable_context_length"] == 5000
    assert only_a is not None
    assert (only_a["nodes"], only_a["usable_context_length"]) == (["a"], 8192)
    assert nobody is None


def test_words_leave_nodes_out(cluster: SimulatedCluster) -> None:
    nodes = [node.node(labels=("x",) if node.id == "b" else ()) for node in cluster]
    with make_router(cluster, nodes=nodes) as router:
        by_label = router.get_model_info(MODEL, require_labels=["x"])
        by_exclusion = router.get_model_info(MODEL, exclude_nodes=["a"])
        by_a_wish = router.get_model_info(MODEL, node_id="a")
        assert by_label is not None
        assert by_label["nodes"] == ["b"]
        assert by_exclusion is not None
        assert by_exclusion["nodes"] == ["b", "c"]
        assert by_a_wish is not None
        assert by_a_wish["nodes"] == ["a", "b", "c"]
        with pytest.raises(RoutingWordError):
            router.get_model_info(MODEL, nod_id="a")


def was_asked_to_show(node: SimulatedNode) -> bool:
    """By a client, not by the collector."""
    agents = [r.headers.get("user-agent") for r in node.requests if r.path == "/api/show"]
    return any(agent != "hydra-llm" for agent in agents)


def test_a_catalogue_is_asked_of_nodes_with_the_labels_only(cluster: SimulatedCluster) -> None:
    nodes = [node.node(labels=("x",) if node.id == "b" else ()) for node in cluster]
    with make_router(cluster, nodes=nodes) as router:
        client = Client(router=router)
        client.show(MODEL, require_labels=["x"])
        assert [node.id for node in cluster if was_asked_to_show(node)] == ["b"]
        with pytest.raises(NoNodeUpError):
            client.show(MODEL, require_labels=["y"])


def test_a_shared_router_lives_as_long_as_anybody_who_was_given_it(
    cluster: SimulatedCluster,
) -> None:
    first = Client(cluster.nodes())
    second, third = Client(router=first.router), HydraTransport(router=first.router)
    del first
    gc.collect()
    assert second.chat(MODEL, [{"role": "user", "content": "Hi"}]).message.content
    router = second.router
    second.close()
    third.close()

    assert "closed" in repr(router)


def test_a_router_that_somebody_made_is_theirs_to_close(cluster: SimulatedCluster) -> None:
    with Router(cluster.nodes()) as router:
        Client(router=router).close()
        assert "closed" not in repr(router)


def test_ollamas_key_is_for_a_single_node(
    cluster: SimulatedCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "k3y")

    def sent_to(name: str, nodes: list[Node]) -> str | None:
        with Router(nodes) as router:
            Client(router=router).chat(MODEL, [{"role": "user", "content": "Hi"}], node_id=name)
        [*_, last] = [r for r in cluster[name].requests if r.path == "/api/chat"]
        return {k.lower(): v for k, v in last.headers.items()}.get("authorization")

    assert sent_to("a", [cluster["a"].node()]) == "Bearer k3y"
    assert sent_to("a", cluster.nodes()) is None
    own = cluster["a"].node(headers={"Authorization": "Bearer own"})
    assert sent_to("a", [own]) == "Bearer own"
