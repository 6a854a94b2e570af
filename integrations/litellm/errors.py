"""Our errors as LiteLLM's: the class says whether it retries, the message is ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from litellm import exceptions as litellm_errors

from hydra_llm import (
    AllNodesFailedError,
    ConfigurationError,
    DeadlineError,
    Dispatch,
    HydraError,
    ModelLoadError,
    ModelNotFoundError,
    Node,
    NodeBusyError,
    NodeConnectError,
    NodeError,
    NodeResponseError,
    NodeTimeoutError,
    NoEligibleNodeError,
)

__all__ = ["AttemptError", "as_litellm_error", "as_litellm_errors", "node_error_of", "refusal"]

PASSING = frozenset({
    "already tried", "busy, asked to wait", "circuit open", "cordoned", "down",
    "failed to load it lately", "load path stuck", "misconfigured", "not seen yet",
    "too slow for the deadline",
})  # fmt: skip
"""Reasons against a node that may be gone in a moment; the others stand for this request."""
MODEL_MISSING = "without the model"


class AttemptError(Exception):
    """
    A failure on one node, as LiteLLM's HTTP layer reads one.

    Attributes:
        status_code: decides what LiteLLM makes of it; all of them are tried again.
        message: names the node.
    """

    def __init__(self, error: NodeError, dispatch: Dispatch) -> None:
        self.status_code = _status_of(error)
        *before, _ = dispatch.decision().attempts or (None,)
        tried = ", ".join(f"{one.node_id} ({one.outcome})" for one in before)
        tried = f"; tried before: {tried}" if tried else ""
        self.message = self.text = f"hydra-llm: {error}{tried}"
        super().__init__(self.message)


def _status_of(error: NodeError) -> int:
    if isinstance(error, NodeTimeoutError):
        return 408
    if isinstance(error, ModelLoadError):
        return 500
    if isinstance(error, NodeResponseError) and error.status_code >= 500:
        return error.status_code
    # Also for "not found" and "unauthorized": what is so on one node is not so on the next.
    return 503


def as_litellm_error(error: HydraError, group: str) -> Exception:
    """
    Give LiteLLM's exception for an error of ours.

    400 for what no retry can change, 404 for a model that no node has, 408 for time that is
    over, 503 with each node's reason otherwise.
    """
    message = f"hydra-llm: {error}"
    if isinstance(error, (NoEligibleNodeError, AllNodesFailedError)):
        message += "".join(
            f"; {one.node_id}: {one.detail or one.reason}"
            for one in error.rejections
            if one.reason != "already tried" and f"{one.node_id}:" not in message
        )
    return _kind_of(error)(message=message, model=group, llm_provider="hydra")


@contextmanager
def as_litellm_errors(model: str) -> Iterator[None]:
    """Raise what is raised of ours as what LiteLLM's callers catch."""
    try:
        yield
    except HydraError as error:
        raise as_litellm_error(error, model) from error


def _kind_of(error: HydraError) -> Any:
    """400 for what no retry can change, 404 for the model, 408 for time, 503 for the rest."""
    if isinstance(error, NoEligibleNodeError):
        return _kind_of_rejections({rejection.reason for rejection in error.rejections})
    if isinstance(error, AllNodesFailedError):
        return _kind_of_failures(error)
    if isinstance(error, (DeadlineError, NodeTimeoutError)):
        return litellm_errors.Timeout
    if isinstance(error, ModelNotFoundError):
        return litellm_errors.NotFoundError
    is_refusal = isinstance(error, NodeResponseError) and 400 <= error.status_code < 500
    if is_refusal or isinstance(error, ConfigurationError):
        return litellm_errors.BadRequestError
    return litellm_errors.ServiceUnavailableError


def _kind_of_rejections(reasons: set[str]) -> Any:
    if reasons == {MODEL_MISSING}:
        return litellm_errors.NotFoundError
    if reasons & PASSING:
        return litellm_errors.ServiceUnavailableError
    return litellm_errors.BadRequestError


def _kind_of_failures(error: AllNodesFailedError) -> Any:
    outcomes = {attempt.outcome for attempt in error.attempts}
    reasons = {rejection.reason for rejection in error.rejections}
    if outcomes == {"timeout"}:
        return litellm_errors.Timeout
    # A node that was left out for another reason may yet have it.
    if outcomes == {"model_not_found"} and reasons <= {MODEL_MISSING, "already tried"}:
        return litellm_errors.NotFoundError
    return litellm_errors.ServiceUnavailableError


def refusal(response: httpx.Response, model: str) -> Any:
    """Make the error for a request that a node read and will not serve, in Ollama's words."""
    try:
        text = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        text = f"status {response.status_code}"
    node = response.headers.get("x-hydra-node-id", "a node")
    is_missing = response.status_code == 404
    kind = litellm_errors.NotFoundError if is_missing else litellm_errors.BadRequestError
    message = f"hydra-llm: {node} refused the request: {text}"
    return kind(message=message, model=model, llm_provider="hydra")


def node_error_of(error: BaseException, node: Node) -> NodeError | None:
    """
    Read LiteLLM's exception for what a node did; None where the node is not to blame.

    For calls whose wire we do not see: embeddings, and providers other than Ollama's own.
    """
    where = {"node_id": node.id, "node_url": node.url}
    status = getattr(error, "status_code", None)
    name = type(error).__name__
    if isinstance(error, litellm_errors.Timeout):
        return NodeTimeoutError(f"{node.id} did not answer in time", **where)
    if isinstance(error, litellm_errors.APIConnectionError):
        return NodeConnectError(f"{node.id} cannot be reached ({name})", **where)
    if status in (429, 503):
        return NodeBusyError(
            f"{node.id} is busy", status_code=status, retry_after_seconds=None, **where
        )
    if status == 404:
        return ModelNotFoundError(f"{node.id} does not have the model", status_code=404, **where)
    if isinstance(status, int) and status >= 500:
        return NodeResponseError(f"{node.id} failed ({name})", status_code=status, **where)
    return None
