"""One process of several: ``python worker.py NODES REDIS ROLE``; see test_processes.py."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hydra_llm import AsyncClient, Client, HydraSettings, Node, Router
from hydra_llm.cluster import claims, redis_store, sharing
from hydra_llm.events import Event, SharingLost

MODEL = "llama3.2:3b"
MESSAGES = [{"role": "user", "content": "Tell me about lighthouses."}]
SHORT: dict[str, Any] = {"num_predict": 10}
ENDLESS: dict[str, Any] = {"num_predict": -1}

REQUESTS = 40
AT_ONCE = 8


def ask_from_threads(router: Router) -> None:
    with Client(router=router) as client, ThreadPoolExecutor(AT_ONCE) as threads:
        asked = [
            threads.submit(client.chat, MODEL, MESSAGES, options=SHORT) for _ in range(REQUESTS)
        ]
        for one in asked:
            one.result()


def ask_from_a_loop(router: Router) -> None:
    async def ask() -> None:
        async with AsyncClient(router=router) as client:
            turns = asyncio.Semaphore(AT_ONCE)

            async def one() -> None:
                async with turns:
                    await client.chat(MODEL, MESSAGES, options=SHORT)

            await asyncio.gather(*(one() for _ in range(REQUESTS)))

    asyncio.run(ask())


def hold(router: Router) -> None:
    """Fill all there is, and be killed."""

    def listen(client: Client) -> None:
        for _ in client.chat(MODEL, MESSAGES, options=ENDLESS, stream=True):
            pass

    with Client(router=router) as client:
        for _ in range(3):
            threading.Thread(target=listen, args=(client,), daemon=True).start()
        while router.in_flight < 3:
            time.sleep(0.01)
        print("holding", flush=True)
        threading.Event().wait()


def fork(router: Router, events: list[Event]) -> None:
    """Parent and child go on with the same client, as a server that forks its workers would."""
    with Client(router=router) as client:
        client.chat(MODEL, MESSAGES, options=SHORT)
        assert router._sharing is not None
        own = router._sharing._exchange.router
        child = os.fork()
        if child == 0:
            code = 1
            try:
                client.chat(MODEL, MESSAGES, options=SHORT)
                is_another = router._sharing._exchange.router != own
                code = 0 if is_another and router._sharing.state == "together" else 2
                router.close()
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        client.chat(MODEL, MESSAGES, options=SHORT)
        assert router._sharing._exchange.router == own
        assert not any(isinstance(event, SharingLost) for event in events)


def main(nodes: str, redis_url: str, role: str) -> None:
    if role == "hold":
        sharing.LEASE_SECONDS = 1.0
    else:  # on a machine as slow as may be nobody loses patience
        claims.PATIENCE_SECONDS = redis_store.TIMEOUT_SECONDS = 20.0
    events: list[Event] = []
    settings = HydraSettings(
        [Node(**about) for about in json.loads(nodes)],
        redis_url=redis_url or None,
        health_check_interval=0.2,
        vram_monitoring=False,
    )
    with Router(settings=settings, on_event=events.append) as router:
        router.nodes()
        if role in ("threads", "loop"):
            print("ready", flush=True)
            sys.stdin.readline()
        if role == "threads":
            ask_from_threads(router)
        elif role == "loop":
            ask_from_a_loop(router)
        elif role == "hold":
            hold(router)
        elif role == "fork":
            fork(router, events)
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
