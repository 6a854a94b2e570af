"""
What the tests put into a LiteLLM proxy's process: limited keys, and a look at its leases.

The proxy loads it from beside its config, as `general_settings.custom_auth`; of several workers
each has its own.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from typing import Any

import litellm
from litellm.proxy._types import UserAPIKeyAuth
from litellm.proxy.proxy_server import app

from hydra_llm.cluster import Cluster, Lease, claims, redis_store, sharing

LIMITS: dict[str, dict[str, Any]] = {
    "sk-key-2": {"metadata": {"hydra": {"max_priority": 2}}},
    "sk-key-9": {"metadata": {"hydra": {"max_priority": 9}}},
    "sk-team-2": {"team_metadata": {"hydra": {"max_priority": 2}}},
}


async def user_api_key_auth(request: Any, api_key: str) -> Any:
    """Every key is good; some are limited."""
    return UserAPIKeyAuth(api_key=api_key, **LIMITS.get(api_key.removeprefix("Bearer "), {}))


# ------------------------------------------------------------------------- the books

counts: Counter[str] = Counter()
_book, _end = Cluster._book, Cluster._end


def book(self: Cluster, *about: Any) -> Lease:
    counts["opened"] += 1
    return _book(self, *about)


def end(self: Cluster, lease: Lease, state: str, now: float) -> bool:
    is_end = _end(self, lease, state, now)
    counts[lease.state] += is_end
    return is_end


Cluster._book, Cluster._end = book, end  # type: ignore[method-assign,assignment]
# A worker that is killed is forgotten soon; one that is slow, as the machine may be, is not.
sharing.LEASE_SECONDS = float(os.environ.get("LEASE_SECONDS", sharing.LEASE_SECONDS))
claims.PATIENCE_SECONDS = redis_store.TIMEOUT_SECONDS = 20.0


@app.get("/books")
async def books() -> dict[str, Any]:
    """The leases of this process: all there were, and those held now."""
    # What LiteLLM drops may lie in a cycle, where it is found when Python comes to look. That is
    # soon in a busy process, and may be minutes in one that has just become idle.
    gc.collect()
    # The proxy has loaded it from a file, so it is not the one that an import would give.
    ours: list[Any] = [c for c in litellm.callbacks if type(c).__name__ == "HydraRoutingStrategy"]
    router = ours[0].hydra
    return {
        "pid": os.getpid(),
        "in_flight": router.in_flight if router else 0,
        "waiting": router.waiting if router else 0,
        **{name: counts[name] for name in ("opened", "released", "expired")},
    }
