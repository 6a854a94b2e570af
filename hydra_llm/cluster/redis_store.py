"""Redis, as the routers' common memory. The only user of the redis package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hydra_llm.exceptions import ConfigurationError

if TYPE_CHECKING:
    from redis.commands.core import Script

TIMEOUT_SECONDS = 0.25
"""For a connection and for each answer; who shares one machine or network needs a hundredth."""


class StoreError(Exception):
    """Redis cannot be used now; the message says why, without credentials."""


class RedisStore:
    """
    One connection for one thread; nothing is connected before it is used.

    Args:
        url: as the setting ``redis_url``; options in its query, as ``?socket_timeout=1``, beat
            those given here.

    Raises:
        ConfigurationError: the redis package is missing, or cannot read the URL.
    """

    def __init__(self, url: str) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as exc:
            raise ConfigurationError(
                'redis_url is set, but the redis package is missing: pip install "hydra-llm[redis]"'
            ) from exc
        self._errors = (redis.RedisError, OSError)
        try:
            self._redis = redis.Redis.from_url(
                url,
                socket_timeout=TIMEOUT_SECONDS,
                socket_connect_timeout=TIMEOUT_SECONDS,
                # Nothing is repeated here: an answer that was lost may have been carried out.
                retry=Retry(NoBackoff(), 0),
            )
        except (ValueError, TypeError) as exc:
            raise ConfigurationError(f"redis_url: {shown(url)} cannot be used: {exc}") from None
        self._exchange = self._redis.register_script(_text_of("exchange.lua"))
        self._rates = self._redis.register_script(_text_of("rates.lua"))

    def exchange(self, keys: Sequence[str], message: str) -> Sequence[Any]:
        """One message of :mod:`.exchange`, one answer. Raises StoreError."""
        return self._run(self._exchange, keys, message)

    def rates(self, keys: Sequence[str], message: str) -> Sequence[Any]:
        """One message of :mod:`.rates`, one answer. Raises StoreError."""
        return self._run(self._rates, keys, message)

    def cordoned(self, key: str) -> set[str]:
        """The names of the nodes that are cordoned for all routers. Raises StoreError."""
        try:
            found: Any = self._redis.smembers(key)
        except self._errors as exc:
            raise StoreError(str(exc) or type(exc).__name__) from exc
        return {name.decode("utf-8", "replace") for name in found}

    def cordon(self, key: str, name: str, *, cordoned: bool) -> None:
        """Cordon a node for all routers, or no longer. Raises StoreError."""
        try:
            (self._redis.sadd if cordoned else self._redis.srem)(key, name)
        except self._errors as exc:
            raise StoreError(str(exc) or type(exc).__name__) from exc

    def _run(self, script: Script, keys: Sequence[str], message: str) -> Sequence[Any]:
        try:
            # One round trip, once the server knows the script.
            answer: Sequence[Any] = script(keys=keys, args=[message])
        except self._errors as exc:
            raise StoreError(str(exc) or type(exc).__name__) from exc
        return answer

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()


def _text_of(file: str) -> str:
    from importlib import resources  # slow, and without Redis nobody needs it

    return resources.files("hydra_llm.cluster").joinpath(file).read_text(encoding="utf-8")


def shown(url: str) -> str:
    """Where it is, without credentials."""
    split = urlsplit(url)
    return f"{split.scheme}://{split.netloc.rpartition('@')[2]}{split.path}"
