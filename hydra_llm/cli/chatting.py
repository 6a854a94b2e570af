"""``hydra-llm chat``: the answer to stdout as it comes, the routing to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from hydra_llm.cli.console import stderr
from hydra_llm.cli.tables import in_words
from hydra_llm.exceptions import ConfigurationError

if TYPE_CHECKING:
    from hydra_llm import RoutingDecision
    from hydra_llm.router import Router


def messages_of(prompt: str, *, system: str | None) -> list[dict[str, str]]:
    """The conversation; ``-`` stands for what is on stdin."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        where = "stdin" if prompt == "-" else "PROMPT"
        raise ConfigurationError(f"{where} is empty; there is nothing to ask")
    messages = [] if system is None else [{"role": "system", "content": system}]
    return [*messages, {"role": "user", "content": text}]


def chat(
    router: Router,
    model: str,
    messages: Sequence[Mapping[str, str]],
    *,
    options: Mapping[str, Any] | None,
    as_json: bool,
    words: Mapping[str, Any],
) -> None:
    """Stream one answer."""
    from hydra_llm import Client

    decision: RoutingDecision | None = None
    at_line_start = True
    waiting = stderr().status(Text(f"waiting for {model} ...", style="dim"))
    with Client(router=router) as client, waiting:
        try:
            for part in client.chat(model, messages, stream=True, options=options, **words):
                if part.message.thinking:
                    waiting.update(Text(f"{model} is thinking ...", style="dim"))
                if text := part.message.content or "":
                    waiting.stop()
                    sys.stdout.write(text)
                    sys.stdout.flush()
                    at_line_start = text.endswith("\n")
                decision = part.routing_decision or decision
        finally:
            waiting.stop()
            if not at_line_start:
                sys.stdout.write("\n")
                sys.stdout.flush()
    if decision is not None:
        tell_decision(decision, as_json=as_json)


def tell_decision(decision: RoutingDecision, *, as_json: bool) -> None:
    """One line on stderr: a sentence, or JSON."""
    if as_json:
        sys.stderr.write(json.dumps(decision.to_dict(), ensure_ascii=False) + "\n")
        return
    text = decision.reason
    if decision.actual and "total" in decision.actual:
        text += f" (took {in_words(decision.actual['total'])})"
    stderr().print(Text(f"[{text}]", style="dim"), soft_wrap=True)
