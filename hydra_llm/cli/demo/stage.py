"""What the stories play on: a router, a client, and a console that tells what happens.

Every story makes claims and checks each one against what was measured; nothing that the
closing table says is written down beforehand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from hydra_llm.cli.tables import decision_table, in_words, plain_table, reason_line
from hydra_llm.cli.watching import nodes_view
from hydra_llm.client import ChatResponse, Client
from hydra_llm.exceptions import HydraError
from hydra_llm.router import Router
from hydra_llm.scheduling import RoutingDecision

PROMPT = [{"role": "user", "content": "Name a few moons of Jupiter, and say who saw them first."}]
ANSWER_TOKENS = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One thing that a story said would be so, and whether it was."""

    story: str
    says: str
    held: bool
    measured: str

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "story": self.story,
            "claim": self.says,
            "held": self.held,
            "measured": self.measured,
        }


@dataclass(slots=True, kw_only=True)
class Result:
    """What the demo has shown."""

    simulated: bool
    claims: list[Claim] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def held(self) -> bool:
        """Whether something was claimed, and all of it was so."""
        return bool(self.claims) and all(claim.held for claim in self.claims)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "held": self.held,
            "simulated": self.simulated,
            "seconds": round(self.seconds, 1),
            "claims": [claim.to_dict() for claim in self.claims],
        }


class Stage:
    """Where a story is played."""

    def __init__(self, router: Router, client: Client, console: Console, result: Result) -> None:
        self.router = router
        self.client = client
        self.console = console
        self.result = result
        self._story = ""

    # ------------------------------------------------------------------ telling

    def nodes(self) -> None:
        """Show the nodes as they are now."""
        nodes = self.router.get_node_resources()
        self.console.print(nodes_view(nodes, width=self.console.width))

    def say(self, text: str, style: str = "") -> None:
        """A sentence or two."""
        self.console.print(Text(text, style=style))

    def call(self, verb: str, *arguments: str, **words: Any) -> None:
        """The call as one would type it; arguments are shown as they are."""
        said = [*arguments, *(f"{name}={value!r}" for name, value in words.items())]
        self.console.print()
        self.console.print(Text(f"» {verb}({', '.join(said)})", style="bold cyan"))

    def decision(self, decision: RoutingDecision) -> None:
        """Who could have taken it for how many seconds, and why it went where it went."""
        width = self.console.width - 2
        self.console.print(Padding(decision_table(decision, width=width), (0, 0, 0, 2)))
        self.console.print(Padding(reason_line(decision), (0, 0, 0, 2)))

    def error(self, error: HydraError) -> None:
        """An error that was meant to come."""
        name = type(error).__name__.replace("NoNodeHasModelError", "NoEligibleNodeError")
        text = Text.assemble((f"{name}: ", "red"), str(error))
        self.console.print(Padding(text, (0, 0, 0, 2)))

    @contextmanager
    def waiting(self, for_what: str) -> Iterator[None]:
        """Show that something is going on."""
        with self.console.status(Text(for_what, style="dim"), spinner="dots"):
            yield

    def claim(self, says: str, held: bool, measured: str) -> None:
        """Hold a claim against what was measured."""
        self.result.claims.append(Claim(story=self._story, says=says, held=held, measured=measured))
        mark, style = ("✓", "green") if held else ("✗", "bold red")
        text = Text.assemble((f"{mark} {says}", style), (f": {measured}", "dim"))
        self.console.print(Padding(text, (0, 0, 0, 2)))

    # ------------------------------------------------------------------- asking

    def chat(self, model: str, *, tokens: int = ANSWER_TOKENS, **words: Any) -> ChatResponse:
        """One chat, and its decision with what then happened."""
        self.call("client.chat", repr(model), "messages", **words)
        with self.waiting(f"{model} is answering ..."):
            answer: ChatResponse = self.client.chat(
                model, PROMPT, options={"num_predict": tokens}, **words
            )
        self.decision(answer.routing_decision)
        return answer

    def refused(self, model: str, **words: Any) -> HydraError | None:
        """One chat that should fail; None if it does not."""
        self.call("client.chat", repr(model), "messages", **words)
        try:
            self.client.chat(model, PROMPT, options={"num_predict": ANSWER_TOKENS}, **words)
        except HydraError as error:
            self.error(error)
            return error
        return None

    def until(self, is_so: Callable[[], bool], *, seconds: float) -> float | None:
        """How long it took to become so; None if it did not in time."""
        began = time.monotonic()
        while not is_so():
            if time.monotonic() - began > seconds:
                return None
            time.sleep(0.02)
        return time.monotonic() - began

    # ------------------------------------------------------------------ playing

    def play(self, stories: Sequence[Callable[[Any], None]], argument: Any) -> None:
        """
        Play one story after the other.

        A story's docstring is what is told of it: a title, and below it what it is about.
        """
        for number, story in enumerate(stories, 1):
            title, _, about = (story.__doc__ or story.__name__).strip().partition("\n")
            self._story = title.rstrip(".")
            self.console.print()
            head = Text(f"{number}  {self._story}", style="bold")
            self.console.print(Rule(head, align="left", style="dim"))
            if about := " ".join(about.split()):
                self.console.print(Text(about, style="dim"))
            try:
                story(argument)
            except HydraError as error:
                self.claim("the story comes to its end", False, f"{type(error).__name__}: {error}")


def closing_table(result: Result) -> Table:
    """What each story proved."""
    table = plain_table(expand=True)
    table.add_column("", width=1)
    table.add_column("what was claimed", overflow="fold", ratio=5)
    table.add_column("what was measured", overflow="fold", ratio=6)
    story = ""
    for claim in result.claims:
        if claim.story != story:
            story = claim.story
            table.add_row("", Text(story, style="bold"), "")
        mark = Text("✓", style="green") if claim.held else Text("✗", style="bold red")
        table.add_row(mark, Text(claim.says), Text(claim.measured, style="dim"))
    return table


def verdict(result: Result) -> Text:
    """``17 of 17 claims held, in 19 s``."""
    held = sum(1 for claim in result.claims if claim.held)
    text = f"{held} of {len(result.claims)} claims held, in {in_words(result.seconds)}"
    return Text(text, style="bold green" if result.held else "bold red")


def close(stage: Stage) -> None:
    """The end of the demo: what was proved."""
    stage.console.print()
    stage.console.print(Rule(Text("What was proved", style="bold"), align="left", style="dim"))
    stage.console.print(closing_table(stage.result))
    stage.console.print()
    stage.console.print(verdict(stage.result))


def took(decision: RoutingDecision) -> str:
    """``2.1 s predicted, 1.9 s measured``."""
    predicted = (decision.predicted or {}).get("total")
    actual = (decision.actual or {}).get("total")
    parts = [] if predicted is None else [f"{in_words(predicted)} predicted"]
    parts += [] if actual is None else [f"{in_words(actual)} measured"]
    return ", ".join(parts)
