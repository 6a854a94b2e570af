"""HydraEmbeddings: OllamaEmbeddings' vectors, from several nodes where that is faster."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import ollama
import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_ollama import OllamaEmbeddings

from hydra_llm import AllNodesFailedError, NoNodeHasModelError, Router
from hydra_llm.integrations.langchain import HydraEmbeddings
from hydra_llm.integrations.langchain.split import MAX_PIECE, Pieces, nodes_worth_using
from hydra_llm.testing import SimulatedCluster, SimulatedNode, StatusFault
from hydra_llm.types import Candidate
from tests.langchain.conftest import EMBEDDING, make_cluster, make_nodes
from tests.router.conftest import make_router

TEXTS = [f"Text {i}: " + "lorem ipsum dolor sit amet " * 40 for i in range(400)]


def embeds(node: SimulatedNode) -> list[Any]:
    return [record for record in node.requests if record.path == "/api/embed"]


def shares(cluster: SimulatedCluster) -> Counter[str]:
    return Counter(
        {node.id: sum(len(record.body["input"]) for record in embeds(node)) for node in cluster}
    )


@pytest.fixture(scope="module")
def expected() -> list[list[float]]:
    """What one node says, asked by OllamaEmbeddings."""
    [node] = make_nodes("a", speed=1e6)
    with node:
        theirs = OllamaEmbeddings(model=EMBEDDING, base_url=node.url)
        assert theirs._client is not None
        vectors = theirs.embed_documents(TEXTS)
        theirs._client._client.close()
    return vectors


def test_a_batch_is_shared_out_and_comes_back_in_order(
    router: Router, cluster: SimulatedCluster, expected: list[list[float]]
) -> None:
    assert HydraEmbeddings(model=EMBEDDING, router=router).embed_documents(TEXTS) == expected

    asked = shares(cluster)
    assert asked.total() == len(TEXTS)
    assert min(asked.values()) >= 50


async def test_a_batch_is_shared_out_from_an_event_loop(
    router: Router, cluster: SimulatedCluster, expected: list[list[float]]
) -> None:
    embeddings = HydraEmbeddings(model=EMBEDDING, router=router)

    assert await embeddings.aembed_documents(TEXTS) == expected
    assert min(shares(cluster).values()) >= 50


def test_a_small_batch_stays_together(router: Router, cluster: SimulatedCluster) -> None:
    embeddings = HydraEmbeddings(model=EMBEDDING, router=router)
    vectors = embeddings.embed_documents(["one", "two", "three"])
    single = embeddings.embed_query("two")

    assert vectors[1] == single
    assert sorted(shares(cluster).values()) in ([0, 0, 4], [0, 1, 3])


@pytest.mark.parametrize("texts", [[], [""], ["one"]], ids=["none", "empty", "one"])
def test_the_smallest_batches_are_what_they_are_upstream(
    texts: list[str], router: Router, cluster: SimulatedCluster
) -> None:
    theirs = OllamaEmbeddings(model=EMBEDDING, base_url=cluster["a"].url)
    assert theirs._client is not None
    expected = theirs.embed_documents(texts)
    theirs._client._client.close()

    assert HydraEmbeddings(model=EMBEDDING, router=router).embed_documents(texts) == expected


def test_a_copy_connects_as_its_model_does(cluster: SimulatedCluster) -> None:
    model = HydraEmbeddings(
        model=EMBEDDING,
        base_url=cluster["a"].url,
        client_kwargs={"headers": {"X-Team": "red"}, "verify": False},
    )
    copy = model.with_routing(priority=9)

    assert copy.embed_query("Hi") == model.embed_query("Hi")
    assert copy.router is model.router
    assert {r.headers["x-team"] for r in embeds(cluster["a"])} == {"red"}


def test_a_pinned_batch_stays_where_it_is_pinned(router: Router, cluster: SimulatedCluster) -> None:
    HydraEmbeddings(model=EMBEDDING, router=router, node_id="b").embed_documents(TEXTS)

    assert shares(cluster) == {"a": 0, "b": len(TEXTS), "c": 0}


def test_an_excluded_node_gets_no_share(router: Router, cluster: SimulatedCluster) -> None:
    embeddings = HydraEmbeddings(model=EMBEDDING, router=router, exclude_nodes=["b"])
    embeddings.embed_documents(TEXTS)

    assert shares(cluster)["b"] == 0
    assert min(shares(cluster)[name] for name in "ac") >= 50


def test_what_every_request_carries(router: Router, cluster: SimulatedCluster) -> None:
    embeddings = HydraEmbeddings(
        model=EMBEDDING, router=router, dimensions=64, temperature=0.5, keep_alive=600, priority=2
    )
    embeddings.embed_documents(TEXTS)

    for node in cluster:
        for record in embeds(node):
            assert set(record.body) == {"model", "input", "dimensions", "options", "keep_alive"}
            assert record.body["options"]["temperature"] == 0.5


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_node_that_dies_amid_a_batch_costs_no_vector(
    is_async: bool, cluster: SimulatedCluster, expected: list[list[float]]
) -> None:
    cluster["b"].inject(StatusFault(500), probability=0.5)
    with make_router(cluster) as router:
        embeddings = HydraEmbeddings(model=EMBEDDING, router=router)
        if is_async:
            vectors = asyncio.run(embeddings.aembed_documents(TEXTS))
        else:
            vectors = embeddings.embed_documents(TEXTS)
        assert router.in_flight == 0
    assert vectors == expected
    assert any(record.status == 500 for record in embeds(cluster["b"]))


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_batch_that_cannot_be_embedded_is_an_error_and_ends_soon(
    is_async: bool, cluster: SimulatedCluster
) -> None:
    for node in cluster:
        node.inject(StatusFault(500))
    with make_router(cluster) as router:
        embeddings = HydraEmbeddings(model=EMBEDDING, router=router)
        with pytest.raises(AllNodesFailedError):
            if is_async:
                asyncio.run(embeddings.aembed_documents(TEXTS))
            else:
                embeddings.embed_documents(TEXTS)
        assert router.in_flight == router.waiting == 0
    assert sum(len(embeds(node)) for node in cluster) <= 9


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_one_piece_that_is_refused_ends_the_batch(is_async: bool) -> None:
    """Twelve pieces; with the first refusal the others' present ones are the last."""
    with make_cluster("a", "b", "c", speed=5.0) as cluster:
        for node in cluster:
            node.preload(EMBEDDING)
        cluster["a"].inject(StatusFault(400))
        with make_router(cluster) as router:
            embeddings = HydraEmbeddings(model=EMBEDDING, router=router)
            with pytest.raises(ollama.ResponseError):
                if is_async:
                    asyncio.run(embeddings.aembed_documents(TEXTS * 5))
                else:
                    embeddings.embed_documents(TEXTS * 5)
        assert sum(len(embeds(node)) for node in cluster) <= 5


async def test_a_cancelled_batch_leaves_nothing(cluster: SimulatedCluster) -> None:
    async with make_router(cluster) as router:
        embeddings = HydraEmbeddings(model=EMBEDDING, router=router)
        task = asyncio.create_task(embeddings.aembed_documents(TEXTS * 20))
        while not router.in_flight:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert router.in_flight == router.waiting == 0


def test_a_node_without_the_model_loaded_joins_if_the_batch_is_long_enough() -> None:
    """A load takes 1.7 s of a machine's time; 2,000 texts keep one machine busy for much longer."""
    with make_cluster("a", "b", speed=20.0) as cluster:
        cluster["a"].preload(EMBEDDING)
        # The simulated machines share a processor: while one reckons, the other is slow.
        with make_router(cluster, health_check_timeout=10.0) as router:
            embeddings = HydraEmbeddings(model=EMBEDDING, router=router)
            embeddings.embed_documents(["short"] * 3)
            assert shares(cluster)["b"] == 0
            embeddings.embed_documents(TEXTS * 10)
        assert shares(cluster)["b"] > 100
        assert cluster["b"].load_count == 1


# -------------------------------------------------------------------- choosing nodes


def candidate(node_id: str, **costs: float) -> Candidate:
    return Candidate(node_id=node_id, costs=costs, total_seconds=sum(costs.values()))


@pytest.mark.parametrize(
    ("candidates", "count", "used"),
    [
        ([], 100, []),
        ([candidate("a", prefill=10)], 100, ["a"]),
        ([candidate("a", prefill=10), candidate("b", prefill=10)], 100, ["a", "b"]),
        ([candidate("a", prefill=10), candidate("b", prefill=10)], 1, ["a"]),
        # A millisecond of work is not worth a second request.
        ([candidate("a", prefill=0.001), candidate("b", prefill=0.001)], 2, ["a"]),
        # Loading takes longer than all of the work; or not.
        ([candidate("a", prefill=3), candidate("b", prefill=3, load=4)], 100, ["a"]),
        ([candidate("a", prefill=30), candidate("b", prefill=30, load=4)], 100, ["a", "b"]),
        # Two are worth it, a third that has to load first is not.
        (
            [
                candidate(name, prefill=10, load=load)
                for name, load in (("a", 0), ("b", 0), ("c", 9))
            ],
            100,
            ["a", "b"],
        ),
        # One that is ten times slower saves too little.
        ([candidate("a", prefill=10), candidate("b", prefill=100)], 100, ["a"]),
        # A slow one can begin at once, a fast one only later: both, or the fast one alone.
        ([candidate("a", prefill=9, wait=1), candidate("b", prefill=20)], 100, ["b", "a"]),
    ],
)
def test_which_nodes_are_worth_using(
    candidates: list[Candidate], count: int, used: list[str]
) -> None:
    assert nodes_worth_using(candidates, count) == used


SECONDS = st.floats(0.0, 1000.0)


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=6), st.integers(1, 1000))
def test_sharing_is_never_expected_to_take_longer(
    costs: list[tuple[float, float]], count: int
) -> None:
    candidates = [
        candidate(str(i), load=load, prefill=prefill) for i, (load, prefill) in enumerate(costs)
    ]
    used = nodes_worth_using(candidates, count)

    alone = min(load + max(prefill, 1e-6) for load, prefill in costs)
    rates = sum(1 / max(costs[int(i)][1], 1e-6) for i in used)
    begun = sum(costs[int(i)][0] / max(costs[int(i)][1], 1e-6) for i in used)
    assert 1 <= len(used) <= min(len(costs), count)
    assert len(used) == 1 or (1 + begun) / rates <= alone


def test_a_single_node_is_the_one_that_is_done_first() -> None:
    fast_but_cold = candidate("a", prefill=1, load=2)
    slow_but_warm = candidate("b", prefill=100)

    assert nodes_worth_using([slow_but_warm, fast_but_cold], 1) == ["a"]


@given(st.integers(0, 3000), st.integers(0, 4))
def test_pieces_hold_every_text_once_and_in_order(count: int, nodes: int) -> None:
    texts = [str(i) for i in range(count)]
    pieces = Pieces(texts, [str(i) for i in range(nodes)])
    handed_out = []
    for piece in pieces:
        piece.vectors = [[float(text)] for text in piece.texts]
        handed_out.append(len(piece.texts))

    assert pieces.vectors() == [[float(text)] for text in texts]
    assert all(size <= MAX_PIECE for size in handed_out)
    assert len(handed_out) >= 1


def test_after_a_stop_no_piece_is_handed_out() -> None:
    pieces = Pieces(["a", "b", "c", "d"], ["x", "y"])
    handed_out = iter(pieces)
    next(handed_out)
    pieces.stop()

    assert list(handed_out) == []


def test_a_model_that_nobody_has_is_the_error_it_always_is(router: Router) -> None:
    with pytest.raises(NoNodeHasModelError):
        HydraEmbeddings(model="nobody/has:it", router=router).embed_query("Hi")
