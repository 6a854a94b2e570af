"""Everything that can go wrong, sorted by what the reader can do about it.

::

    HydraError
    ├── ConfigurationError            fix a setting or an argument
    │   └── RoutingWordError          fix a routing word of this call
    ├── RoutingError                  wait, add a node, or ask for less
    │   ├── NoEligibleNodeError       no node may take the request; each one's reason
    │   │   └── NoNodeUpError         because none of them can be reached
    │   ├── DeadlineError             no node can make it in the time given
    │   ├── QueueFullError            too many requests wait, or for too long
    │   └── AllNodesFailedError       every node that was tried failed; each attempt
    └── NodeError                     look at one node
        ├── NodeConnectError          nobody answers there
        ├── NodeAuthError             it wants other credentials (401, 403)
        ├── NodeTimeoutError          it accepted the request and stayed silent
        ├── NodeBusyError             it said "later" (429, 503)
        ├── NodeResponseError         it answered with an error
        │   ├── ModelNotFoundError    it does not have the model (404)
        │   └── ModelLoadError        it could not load the model
        ├── NodeProtocolError         it does not speak Ollama
        └── StreamBrokenError         its answer broke off after it had begun

Messages count, name and fit on one line; the data is on attributes. Neither prompts
nor answers nor credentials are ever part of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydra_llm.types import Attempt, Rejection

__all__ = [
    "AllNodesFailedError",
    "ConfigurationError",
    "DeadlineError",
    "HydraError",
    "ModelLoadError",
    "ModelNotFoundError",
    "NoEligibleNodeError",
    "NoNodeUpError",
    "NodeAuthError",
    "NodeBusyError",
    "NodeConnectError",
    "NodeError",
    "NodeProtocolError",
    "NodeResponseError",
    "NodeTimeoutError",
    "QueueFullError",
    "RoutingError",
    "RoutingWordError",
    "StreamBrokenError",
]


class HydraError(Exception):
    """Base of every error that hydra_llm raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only data would otherwise be lost on the way through a process pool.
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(kind: type[HydraError], args: tuple[Any, ...], data: dict[str, Any]) -> HydraError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(data)
    return error


class ConfigurationError(HydraError, ValueError):
    """A setting or an argument is wrong; the message says which and what would be right."""


class RoutingWordError(ConfigurationError, TypeError):
    """A routing word (``node_id``, ``min_vram_gb`` ...) is misspelt or has a wrong value.

    It is a :class:`TypeError` too, because that is what ``ollama.Client`` raises for an
    unknown keyword.
    """


class RoutingError(HydraError):
    """The request could not be placed; nothing has been sent, or nothing came back."""


class NoEligibleNodeError(RoutingError):
    """No configured node may take the request.

    Attributes:
        model: the model asked for.
        rejections: each node's reason, in the order of the configuration.
    """

    def __init__(self, message: str, *, model: str, rejections: Sequence[Rejection]) -> None:
        super().__init__(message)
        self.model = model
        self.rejections = tuple(rejections)


class NoNodeUpError(NoEligibleNodeError, ConnectionError):
    """Every node is down or has never answered.

    It is a :class:`ConnectionError` too, because that is what ``ollama.Client`` raises when
    its one host cannot be reached.
    """


class DeadlineError(RoutingError):
    """No node is expected to finish within ``deadline_s``.

    Attributes:
        deadline_seconds: what the caller allowed.
        predicted_seconds: the best node's predicted completion; None when time ran out.
    """

    def __init__(
        self, message: str, *, deadline_seconds: float, predicted_seconds: float | None
    ) -> None:
        super().__init__(message)
        self.deadline_seconds = deadline_seconds
        self.predicted_seconds = predicted_seconds


class QueueFullError(RoutingError):
    """No slot was free for too long, or for too many requests at once.

    It has waited for ``queue_timeout``, or ``max_queue`` requests that are as urgent wait already.

    Attributes:
        waiting: how many requests wait.
    """

    def __init__(self, message: str, *, waiting: int) -> None:
        super().__init__(message)
        self.waiting = waiting


class AllNodesFailedError(RoutingError, ConnectionError):
    """Every node that could be tried has failed before it answered.

    It is a :class:`ConnectionError` too, because that is what ``ollama.Client`` raises
    when its one host cannot be reached.

    Attributes:
        model: the model asked for.
        attempts: every attempt, first to last, with the node and what happened.
        rejections: why the remaining nodes were not tried.
    """

    def __init__(
        self,
        message: str,
        *,
        model: str,
        attempts: Sequence[Attempt],
        rejections: Sequence[Rejection] = (),
    ) -> None:
        super().__init__(message)
        self.model = model
        self.attempts = tuple(attempts)
        self.rejections = tuple(rejections)


class NodeError(HydraError):
    """One node misbehaved.

    Attributes:
        node_id: the node.
        node_url: its URL without credentials.
        cause: a short machine-readable word for logs and metrics.
    """

    cause = "node_error"

    def __init__(self, message: str, *, node_id: str, node_url: str) -> None:
        super().__init__(message)
        self.node_id = node_id
        self.node_url = node_url


class NodeConnectError(NodeError, ConnectionError):
    """No connection: refused, unreachable, unknown host name, TLS failure, or reset."""

    cause = "connect"


class NodeAuthError(NodeError):
    """The node wants other credentials (401 or 403)."""

    cause = "auth"


class NodeTimeoutError(NodeError, TimeoutError):
    """The node accepted the request and stayed silent for too long."""

    cause = "timeout"


class NodeBusyError(NodeError):
    """The node asked to come back later (429 or 503).

    Attributes:
        status_code: 429 or 503.
        retry_after_seconds: what its ``Retry-After`` header said; None without one.
    """

    cause = "busy"

    def __init__(
        self,
        message: str,
        *,
        node_id: str,
        node_url: str,
        status_code: int,
        retry_after_seconds: float | None,
    ) -> None:
        super().__init__(message, node_id=node_id, node_url=node_url)
        self.status_code = status_code
        self.retry_after_seconds = retry_after_seconds


class NodeResponseError(NodeError):
    """The node answered with an error.

    Attributes:
        status_code: the HTTP status; -1 for an error line inside a stream, as the
            ``ollama`` package does.
    """

    cause = "error_response"

    def __init__(self, message: str, *, node_id: str, node_url: str, status_code: int) -> None:
        super().__init__(message, node_id=node_id, node_url=node_url)
        self.status_code = status_code


class ModelNotFoundError(NodeResponseError):
    """The node does not have the model (404)."""

    cause = "model_not_found"


class ModelLoadError(NodeResponseError):
    """The node could not load the model, as a rule for want of memory."""

    cause = "load_failed"


class NodeProtocolError(NodeError):
    """What came back is not what an Ollama server sends (HTML, broken JSON, a redirect)."""

    cause = "protocol"


class StreamBrokenError(NodeError):
    """The answer broke off after it had begun; what was handed out so far stands.

    To have the whole answer from another node, give the error back to the same call::

        try:
            answer = "".join(part.message.content for part in client.chat(..., stream=True))
        except StreamBrokenError as broken:
            parts = client.chat(..., stream=True, restart_of=broken)

    Attributes:
        parts: how many parts the caller had received.
        attempts: every attempt of the request, this one included, first to last.
    """

    cause = "stream_broken"

    def __init__(self, message: str, *, node_id: str, node_url: str, parts: int) -> None:
        super().__init__(message, node_id=node_id, node_url=node_url)
        self.parts = parts
        self.attempts: tuple[Attempt, ...] = ()
        self._began: float | None = None  # on the router's clock: deadlines count from there


def count_reasons(rejections: Sequence[Rejection]) -> str:
    """Rejections as ``2 short of VRAM, 1 circuit open``: most frequent first."""
    counts: dict[str, int] = {}
    for rejection in rejections:
        counts[rejection.reason] = counts.get(rejection.reason, 0) + 1
    ordered: Sequence[tuple[str, int]] = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} {reason}" for reason, count in ordered)
