"""Which faults hit a request, and what they answer in its place."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from hydra_llm.simulation.calls import RequestRecord
from hydra_llm.simulation.faults import (
    CutFault,
    ErrorBodyFault,
    ErrorLineFault,
    Fault,
    HangFault,
    HtmlFault,
    HugeFault,
    MissingModelFault,
    PsFault,
    ResetFault,
    StallFault,
    StatusFault,
    TokenFault,
)
from hydra_llm.simulation.wire import PLAIN_JSON, Reply, error_body, go_json, json_reply

__all__ = ["Faults", "ps_reply", "reply_of", "stands_in", "token_at"]


@dataclass(slots=True, eq=False)
class _Armed:
    fault: Fault
    left: int | None
    """How often it may still strike."""


class Faults:
    """The faults a node has now, and how often each has struck."""

    def __init__(self, rng: random.Random, would_load: Callable[[RequestRecord], bool]) -> None:
        self._rng = rng
        self._would_load = would_load
        self._armed: list[_Armed] = []

    def arm(self, fault: Fault) -> None:
        """Have it strike from now on."""
        self._armed.append(_Armed(fault, fault.times))

    def clear(self) -> None:
        """Have none."""
        self._armed.clear()

    def strike(self, record: RequestRecord) -> list[Fault]:
        """Choose those that hit a request, and count them."""
        struck: list[Fault] = []
        for armed in self._armed:
            if armed.left == 0 or not self._hits(armed.fault, record):
                continue
            if armed.fault.probability < 1.0 and self._rng.random() >= armed.fault.probability:
                continue
            if armed.left is not None:
                armed.left -= 1
            struck.append(armed.fault)
        return struck

    def _hits(self, fault: Fault, record: RequestRecord) -> bool:
        if isinstance(fault, PsFault):
            return record.path == "/api/ps"
        if fault.models is not None and record.model not in fault.models:
            return False
        if fault.paths is None:
            if record.method != "POST" or record.path == "/api/show":
                return False
        elif record.path not in fault.paths and "*" not in fault.paths:
            return False
        if isinstance(fault, HangFault) and fault.loads_only:
            return self._would_load(record)
        return True


def stands_in(fault: Fault) -> bool:
    """Whether a fault takes the place of the whole answer."""
    if isinstance(fault, ResetFault):
        return fault.after is None
    kinds = (StatusFault, ErrorBodyFault, HangFault, HtmlFault, HugeFault, MissingModelFault)
    return isinstance(fault, kinds)


def token_at(fault: Fault) -> int | None:
    """Say at how many tokens a fault strikes a stream."""
    at_token = (ErrorLineFault, ResetFault, CutFault, StallFault, TokenFault)
    return fault.after if isinstance(fault, at_token) else None


def reply_of(fault: Fault, record: RequestRecord) -> Reply | None:
    """Give the answer a fault has in place of the real one; ``None`` for silence."""
    is_v1 = record.path.startswith("/v1/")
    if isinstance(fault, StatusFault):
        wait = fault.retry_after
        headers = () if wait is None else (("Retry-After", f"{wait:g}"),)
        body = error_body(fault.status, fault.message, is_v1=is_v1)
        return replace(json_reply(body, fault.status), headers=headers)
    if isinstance(fault, MissingModelFault):
        text = f"model '{record.model}' not found"
        return json_reply(error_body(404, text, is_v1=is_v1), 404)
    if isinstance(fault, HtmlFault):
        page = b"<!DOCTYPE html>\n<html><body><h1>Welcome</h1></body></html>\n"
        return Reply(fault.status, page, "text/html; charset=utf-8")
    if isinstance(fault, HugeFault):
        filler = {"model": record.model, "filler": "x" * fault.size_bytes}
        return json_reply(filler, content_type=PLAIN_JSON)
    if isinstance(fault, ErrorBodyFault):
        return json_reply(error_body(500, fault.text, is_v1=is_v1))
    return None


def ps_reply(fault: PsFault, truth: Reply, *, stale: Reply | None) -> Reply:
    """Give what ``/api/ps`` says under a fault."""
    if fault.shows == "stale" and stale is not None:
        return stale
    if fault.shows in {"empty", "given"}:
        return Reply(200, go_json({"models": list(fault.entries)}).encode())
    return truth
