"""Which faults hit a request, and what they answer in its place."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from hydra_llm.simulation.api import Arranged
from hydra_llm.simulation.calls import RequestRecord
from hydra_llm.simulation.exchange import Exchange
from hydra_llm.simulation.faults import (
    CutFault,
    EndlessFault,
    ErrorBodyFault,
    ErrorLineFault,
    Fault,
    HangFault,
    HtmlFault,
    HugeFault,
    LoadFault,
    LoopFault,
    MissingModelFault,
    OffloadFault,
    PsFault,
    ResetFault,
    SlowLorisFault,
    StallFault,
    StatusFault,
    TokenFault,
)
from hydra_llm.simulation.wire import EVENTS, PLAIN_JSON, Reply, error_body, go_json, json_reply

__all__ = ["Faults", "arranged", "ps_reply", "reply_of", "stands_in", "token_at"]


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
        return self._would_load(record) if _loads_only(fault) else True


def stands_in(fault: Fault) -> bool:
    """Whether a fault takes the place of the whole answer."""
    if isinstance(fault, ResetFault):
        return fault.after is None
    kinds = (StatusFault, ErrorBodyFault, HangFault, HtmlFault, HugeFault, MissingModelFault)
    return isinstance(fault, kinds)


def token_at(fault: Fault) -> int | None:
    """Say at how many tokens a fault strikes a stream."""
    at_token = (
        ErrorLineFault,
        ResetFault,
        CutFault,
        EndlessFault,
        SlowLorisFault,
        StallFault,
        TokenFault,
    )
    return fault.after if isinstance(fault, at_token) else None


def arranged(faults: Sequence[Fault]) -> Arranged:
    """Say what faults change in how a request is served, as far as the server itself can do it."""
    made = Arranged(watch=any(token_at(fault) is not None for fault in faults))
    for fault in faults:
        if isinstance(fault, LoopFault):
            made = replace(made, repeats=fault.text)
        elif isinstance(fault, LoadFault):
            made = replace(made, load=replace(made.load, fails=True, text=fault.text))
        elif isinstance(fault, OffloadFault):
            made = replace(made, load=replace(made.load, gpu_share=fault.gpu_share))
    return made


def _loads_only(fault: Fault) -> bool:
    """Whether a fault strikes only requests that need a load."""
    is_hang = isinstance(fault, HangFault) and fault.loads_only
    return is_hang or isinstance(fault, (LoadFault, OffloadFault))


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


def endless(exchange: Exchange, *, in_one_line: bool) -> Iterator[bytes]:
    """Give chunks of an answer for ever: its tokens again and again, or a text in one line."""
    if exchange.stream and not in_one_line:
        tokens = range(exchange.ticket.job.answer_tokens)
        # Some show nothing: an end-of-turn token, a tag.
        while shown := [chunk for chunk in map(exchange.token, tokens) if chunk]:
            yield from shown
    yield b'data: {"filler":"' if exchange.content_type == EVENTS else b'{"filler":"'
    while True:
        yield b"x" * 4096


def ps_reply(fault: PsFault, truth: Reply, *, stale: Reply | None) -> Reply:
    """Give what ``/api/ps`` says under a fault."""
    if fault.shows == "stale" and stale is not None:
        return stale
    if fault.shows in {"empty", "given"}:
        return Reply(200, go_json({"models": list(fault.entries)}).encode())
    return truth
