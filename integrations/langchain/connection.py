"""Whom a model speaks to: what ChatOllama's connection arguments mean with several nodes."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import httpx
from pydantic import SecretStr

from hydra_llm import AsyncClient, Client, ConfigurationError, HydraSettings, Node, Router

Nodes: TypeAlias = str | Node | Iterable[str | Node | Mapping[str, Any]]

_OURS = "hydra-llm connects by itself"
_HINTS = {
    "auth": "give (user, password), or a header for each node with Node(headers=...)",
    "cert": "give verify=ssl.SSLContext with the certificate loaded into it",
    "event_hooks": f"{_OURS}; Router(on_event=..., on_decision=...) tells what happens",
    "mounts": f"{_OURS}; name what stands before a node in the node's URL",
    "proxies": f"{_OURS}; name what stands before a node in the node's URL",
    "proxy": f"{_OURS}; name what stands before a node in the node's URL",
    "transport": f"{_OURS}; for tests there is hydra_llm.testing",
}
_OF_NO_EFFECT = frozenset(
    "default_encoding follow_redirects http1 http2 limits max_redirects trust_env".split()
)
"""About connections that the router keeps as it sees fit; answers are the same either way."""


class Connection:
    """
    Arguments of httpx, sorted: what the router is told, and what the clients are.

    Args:
        both: ``client_kwargs``.
        sync: ``sync_client_kwargs``, which go before.
        asynchronous: ``async_client_kwargs``, which go before.
        timeout: where none of them has one.
        api_key: a bearer token for every node, where none of them has credentials.

    Raises:
        ConfigurationError: one of them means nothing with several nodes.
    """

    def __init__(
        self,
        both: Mapping[str, Any] | None,
        sync: Mapping[str, Any] | None,
        asynchronous: Mapping[str, Any] | None,
        *,
        timeout: Any = None,
        api_key: SecretStr | str | None = None,
    ) -> None:
        default = {} if timeout is None else {"timeout": timeout}
        of_sync = {**default, **(both or {}), **(sync or {})}
        of_async = {**default, **(both or {}), **(asynchronous or {})}
        self._verify = of_sync.pop("verify", None)
        if of_async.pop("verify", None) != self._verify:
            raise ConfigurationError(
                "verify should be the same in sync_client_kwargs and async_client_kwargs"
            )
        self._sync = _of_a_client(of_sync, api_key)
        self._async = _of_a_client(of_async, api_key)

    def open(
        self,
        nodes: Nodes | Router | None,
        settings: HydraSettings | None,
        words: Mapping[str, Any],
    ) -> tuple[Client, AsyncClient]:
        """A client for each kind of caller, over one router; ``words`` hold for every call."""
        if isinstance(nodes, Router):
            if settings is not None or self._verify is not None:
                raise ConfigurationError(
                    "settings, and verify, are those of the router that is given: "
                    "Router(settings=HydraSettings(verify=...))"
                )
            return self.over(nodes, words)
        if self._verify is not None:
            of_tls = HydraSettings(nodes, verify=self._verify)
            settings = settings and settings.model_copy(update={"verify": of_tls.verify})
            settings = settings or of_tls
        client = Client(nodes, settings=settings, **self._sync, **words)
        return client, AsyncClient(router=client.router, **self._async, **words)

    def over(self, router: Router, words: Mapping[str, Any]) -> tuple[Client, AsyncClient]:
        """Further clients over a router that is there."""
        client = Client(router=router, **self._sync, **words)
        return client, AsyncClient(router=router, **self._async, **words)


def _of_a_client(given: dict[str, Any], api_key: SecretStr | str | None) -> dict[str, Any]:
    # ChatOllama takes each part apart at once, and takes dictionaries, too.
    arguments: dict[str, Any] = {"timeout": given.pop("timeout", None), "plain_parts": True}
    # A copy: what is added must not end up in somebody else's dictionary.
    headers = httpx.Headers(given.pop("headers", None))
    auth = given.pop("auth", None)
    if isinstance(auth, tuple) and len(auth) == 2:
        pair = f"{auth[0]}:{auth[1]}".encode()
        headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
    elif auth is not None:
        given["auth"] = auth
    elif api_key:
        key = api_key.get_secret_value() if isinstance(api_key, SecretStr) else api_key
        headers.setdefault("Authorization", f"Bearer {key}")
    if cookies := given.pop("cookies", None):
        headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in dict(cookies).items())
    for name in given.keys() - _OF_NO_EFFECT:
        hint = _HINTS.get(name, "known are auth, cookies, headers, timeout and verify")
        raise ConfigurationError(f"client_kwargs has {name!r}: {hint}")
    if headers:
        arguments["headers"] = headers
    return arguments
