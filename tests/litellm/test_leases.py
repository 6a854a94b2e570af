"""Every place that is taken is given back, whatever becomes of the call."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import litellm
import pytest

from hydra_llm import Router
from hydra_llm.integrations.litellm import HydraRoutingStrategy
from hydra_llm.testing import (
    CutFault,
    ErrorLineFault,
    ResetFault,
    SimulatedCluster,
    StatusFault,
)
from tests.litellm.conftest import HELLO, LiteRouter, asked, auntil, loaded_cluster, total, until

LONG = {"max_tokens": 4000}
"""Some seconds long: it is under way when something happens to it."""


@pytest.fixture
def cluster() -> Iterator[SimulatedCluster]:
    with loaded_cluster(token_output=4000, speed=30.0) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def seen(hydra: Router) -> None:
    hydra.wait_until_seen()


Ending = Callable[[LiteRouter, SimulatedCluster], Awaitable[None]]


async def under_way(router: LiteRouter, cluster: SimulatedCluster) -> asyncio.Task[Any]:
    """A call that a node has been asked for."""
    task = asyncio.create_task(router.acompletion("chat", HELLO, **LONG))
    await auntil(lambda: total(asked(cluster)) == 1)
    return task


async def _is_cancelled(router: LiteRouter, cluster: SimulatedCluster) -> None:
    task = await under_way(router, cluster)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _is_cancelled_by_a_time_limit(router: LiteRouter, cluster: SimulatedCluster) -> None:
    task = await under_way(router, cluster)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(task, 0.1)


async def _runs_out_of_time(router: LiteRouter, cluster: SimulatedCluster) -> None:
    with pytest.raises(litellm.exceptions.Timeout):
        await router.acompletion("chat", HELLO, **LONG, timeout=0.3, num_retries=0)


async def _is_cancelled_before_it_is_sent(router: LiteRouter, cluster: SimulatedCluster) -> None:
    turns = 0
    # At every step up to the wire, however many a version takes to it.
    while turns < 40 or not total(asked(cluster)):
        turns += 1
        assert turns < 1000
        task = asyncio.create_task(router.acompletion("chat", HELLO, max_tokens=20))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _is_closed_in_the_middle(router: LiteRouter, cluster: SimulatedCluster) -> None:
    stream = await router.acompletion("chat", HELLO, stream=True, **LONG)
    await stream.__anext__()
    await stream.aclose()


async def _is_dropped_in_the_middle(router: LiteRouter, cluster: SimulatedCluster) -> None:
    stream = await router.acompletion("chat", HELLO, stream=True, **LONG)
    await stream.__anext__()
    del stream
    gc.collect()


async def _is_dropped_unread(router: LiteRouter, cluster: SimulatedCluster) -> None:
    stream = await router.acompletion("chat", HELLO, stream=True, **LONG)
    del stream
    gc.collect()


async def _a_stream_is_cancelled_by_its_task(router: LiteRouter, cluster: SimulatedCluster) -> None:
    async def read() -> None:
        stream = await router.acompletion("chat", HELLO, stream=True, **LONG)
        async for _ in stream:
            pass

    task = asyncio.create_task(read())
    await auntil(lambda: total(asked(cluster)) == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    gc.collect()


ENDINGS: dict[str, Ending] = {
    f.__name__.strip("_"): f
    for f in (
        _is_cancelled,
        _is_cancelled_before_it_is_sent,
        _is_cancelled_by_a_time_limit,
        _runs_out_of_time,
        _is_closed_in_the_middle,
        _is_dropped_in_the_middle,
        _is_dropped_unread,
        _a_stream_is_cancelled_by_its_task,
    )
}


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_place_is_given_back_when_a_call(
    routed: LiteRouter, hydra: Router, cluster: SimulatedCluster, ending: str
) -> None:
    await ENDINGS[ending](routed, cluster)

    assert total(asked(cluster)) >= 1
    await auntil(lambda: not hydra.in_flight, 3.0)


def test_a_place_is_given_back_when_a_synchronous_stream_is_dropped(
    routed: LiteRouter, hydra: Router
) -> None:
    stream = routed.completion("chat", HELLO, stream=True, **LONG)
    next(iter(stream))
    assert hydra.in_flight == 1
    del stream
    gc.collect()
    until(lambda: not hydra.in_flight, 3.0)


async def test_a_place_is_given_back_when_an_embedding_is_cancelled(
    routed: LiteRouter, hydra: Router, cluster: SimulatedCluster
) -> None:
    await hydra.await_until_seen()
    for node in cluster:
        node.freeze()
    task = asyncio.create_task(routed.aembedding("embed", input=["Hello"]))
    await auntil(lambda: hydra.in_flight == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    gc.collect()
    await auntil(lambda: not hydra.in_flight, 3.0)
    for node in cluster:
        node.thaw()


async def test_a_choice_without_a_call_holds_no_place(routed: LiteRouter, hydra: Router) -> None:
    request: dict[str, Any] = {"metadata": {}, "litellm_trace_id": "t"}
    strategy: Any = next(c for c in litellm.callbacks if isinstance(c, HydraRoutingStrategy))
    left = await strategy.async_filter_deployments(
        "chat",
        [one for one in routed.model_list if one["model_name"] == "chat"],
        HELLO,
        request_kwargs=request,
    )
    assert [one["model_name"] for one in left] == ["chat"]
    assert hydra.in_flight == 1

    del request, left
    gc.collect()

    await auntil(lambda: not hydra.in_flight, 3.0)


async def test_one_dictionary_of_metadata_may_serve_many_calls(
    routed: LiteRouter, hydra: Router, cluster: SimulatedCluster
) -> None:
    mine: dict[str, Any] = {"team": "x"}
    for _ in range(3):
        await routed.acompletion("chat", HELLO, max_tokens=20, metadata=mine)
    await asyncio.gather(
        *(routed.acompletion("chat", HELLO, max_tokens=20, metadata=mine) for _ in range(9))
    )

    assert total(asked(cluster)) == 12
    mine.clear()
    await auntil(lambda: not hydra.in_flight, 3.0)


async def test_a_trace_id_of_the_callers_may_serve_many_calls(
    routed: LiteRouter, hydra: Router, cluster: SimulatedCluster
) -> None:
    calls = [
        routed.acompletion("chat", HELLO, max_tokens=20, litellm_trace_id="mine") for _ in range(9)
    ]
    answers = await asyncio.gather(*calls)

    assert all(answer.choices[0].message.content for answer in answers)
    await auntil(lambda: not hydra.in_flight, 3.0)


@pytest.mark.timeout(120)
async def test_500_calls_with_every_kind_of_end_leave_nothing(
    routed: LiteRouter, hydra: Router, cluster: SimulatedCluster
) -> None:
    rng = random.Random(4)
    faults = [StatusFault(500), ResetFault(after=2), CutFault(after=1), ErrorLineFault(after=1)]
    for node in cluster:
        for fault in faults:
            node.inject(fault, probability=0.03)
    ends: Counter[str] = Counter()
    loop = asyncio.get_running_loop()
    # Not the loop's own: LiteLLM's asynchronous calls need that once they hold their place, and
    # would wait for synchronous ones there that wait for these very places.
    executor = ThreadPoolExecutor(20)

    async def one(number: int) -> None:
        kind = rng.choice(("whole", "stream", "embed", "text", "cancel", "leave", "sync"))
        try:
            if kind == "whole":
                await routed.acompletion("chat", HELLO, max_tokens=20)
            elif kind == "embed":
                await routed.aembedding("embed", input=["Hello"])
            elif kind == "text":
                await routed.atext_completion("chat", prompt="Hello", max_tokens=20)
            elif kind == "sync":
                await loop.run_in_executor(
                    executor, lambda: routed.completion("chat", HELLO, max_tokens=20)
                )
            elif kind == "cancel":
                call = routed.acompletion("chat", HELLO, **LONG)
                await asyncio.wait_for(call, rng.uniform(0.0, 0.1))
            else:
                stream = await routed.acompletion("chat", HELLO, stream=True, max_tokens=20)
                read = 0
                async for _ in stream:
                    read += 1
                    if kind == "leave" and read == 2:
                        break
                del stream
            ends[kind] += 1
        except asyncio.TimeoutError:
            ends["timed out"] += 1
        except Exception as error:
            ends[type(error).__name__] += 1

    with executor:
        for batch in range(25):
            await asyncio.gather(*(one(20 * batch + number) for number in range(20)))
    gc.collect()

    assert sum(ends.values()) == 500
    assert len(ends) >= 7, ends
    for node in cluster:
        node.clear_faults()
    await auntil(lambda: not hydra.in_flight and not hydra.waiting, 5.0)
    await auntil(lambda: not any(node.in_flight for node in cluster), 5.0)
    assert not [t for t in threading.enumerate() if "errand" in t.name]
