"""Serve three nodes until standard input is closed; prints their URLs."""

import sys

from hydra_llm.testing import SimulatedCluster, SimulatedNode

MODEL = "llama3.2:3b"

if __name__ == "__main__":
    nodes = [
        SimulatedNode(name, models=(MODEL,), speed=100_000.0, token_output=14) for name in "abc"
    ]
    with SimulatedCluster(nodes) as cluster:
        for node in cluster:
            node.preload(MODEL)
        print(" ".join(cluster.urls), flush=True)
        sys.stdin.read()
