"""Everything that changes: snapshots, leases, circuits, what was learned."""

from hydra_llm.cluster.claims import Claim
from hydra_llm.cluster.cluster import Cluster
from hydra_llm.cluster.cordons import CordonsFile
from hydra_llm.cluster.dropped import DroppedRequests
from hydra_llm.cluster.exchange import CORDONS_KEY, name_of
from hydra_llm.cluster.keeping import Keeping
from hydra_llm.cluster.lease import Lease
from hydra_llm.cluster.prompt_cache import PrefixKey
from hydra_llm.cluster.rates_file import RatesFile
from hydra_llm.cluster.record import Rules
from hydra_llm.cluster.redis_store import RedisStore, StoreError
from hydra_llm.cluster.sharing import Sharing
from hydra_llm.cluster.waiting import Waiter

__all__ = [
    "CORDONS_KEY",
    "Claim",
    "Cluster",
    "CordonsFile",
    "DroppedRequests",
    "Keeping",
    "Lease",
    "PrefixKey",
    "RatesFile",
    "RedisStore",
    "Rules",
    "Sharing",
    "StoreError",
    "Waiter",
    "name_of",
]
