"""Takes a node out of use, and back: `cordon`, `uncordon` and `drain`."""

from __future__ import annotations

from hydra_llm import Router
from hydra_llm.cli.console import stderr, stdout

__all__ = ["cordon", "drain", "uncordon"]


def cordon(router: Router, name: str) -> None:
    """Have every router leave the node alone."""
    router.cordon(name, for_all=True)
    stdout().print(f"{name} gets no new requests; hydra-llm uncordon {name} ends that")


def uncordon(router: Router, name: str) -> None:
    """Have every router use the node again."""
    router.uncordon(name, for_all=True)
    stdout().print(f"{name} gets requests again")


def drain(router: Router, name: str, *, timeout: float | None) -> bool:
    """Cordon the node, and wait; whether it is idle."""
    if router.settings.redis_url is None:
        cordon(router, name)
        stderr().print(
            "What is under way there ends by itself. It cannot be counted from here: routers tell "
            "one another of their requests through Redis (redis_url)."
        )
        return True
    router.nodes()  # what the others hold is known from now on
    with stderr().status(f"waiting until nothing is under way on {name} ..."):
        is_idle = router.drain(name, timeout=timeout, for_all=True)
    if is_idle:
        stdout().print(f"{name} is idle, and gets no new requests")
    else:
        stdout().print(f"{name} gets no new requests, but is not idle yet")
    return is_idle
