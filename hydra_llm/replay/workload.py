"""
What is asked: requests with their times, models and lengths, from a trace or drawn.

::

    load = read_load("poisson:rate=0.5,requests=200")
    load = read_load("azure2023_conv", rate=0.5, requests=500)
    for asked in load.requests(cluster, seed=1): ...

Traces have no models: each conversation gets one, drawn from a seed by the popularity that the
cluster's models have. Time is stretched to the rate; rows are taken from the beginning and none is
dropped between, as bursts and conversations would go with it.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from hydra_llm.exceptions import ConfigurationError

__all__ = ["TRACES", "Asked", "Load", "PoissonLoad", "Shared", "TraceLoad", "read_load"]

TRACES = ("azure2023_conv", "azure2023_code", "mooncake_conversation", "mooncake_synthetic")
"""Those that are here; ``hydra_llm/replay/traces/README.md`` says whose they are."""

BLOCK_TOKENS = 512
"""What a trace counts common prefixes in."""
SAME_CONVERSATION = 0.25
"""The share of a prompt that an earlier one must have begun with, to be of one conversation."""
USUAL_PRIORITY = 5
LEAST_TOKENS = 2
"""An answer's end is a token too."""


class Shared(NamedTuple):
    """What a prompt has in common with an earlier one."""

    row: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """
    One request.

    Args:
        number: its place in the whole, from 0.
        at: seconds since the beginning.
        output_tokens: what the answer will have; only a policy with perfect knowledge sees it.
        session: its conversation, where it has more than one request.
        shared: the earlier request that its prompt begins like.
    """

    number: int
    at: float
    model: str
    input_tokens: int
    output_tokens: int
    priority: int = USUAL_PRIORITY
    session: str | None = None
    shared: Shared | None = None


class Popularity(NamedTuple):
    """How much each model is asked for, relative to the others, before and after a shift."""

    models: tuple[str, ...]
    first: tuple[float, ...]
    later: tuple[float, ...]

    def draw(self, rng: random.Random, *, is_late: bool) -> str:
        """Draw a model."""
        return rng.choices(self.models, self.later if is_late else self.first)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What both kinds have: how models and priorities are drawn."""

    zipf: float | None = None
    """Popularity falls with the place in the cluster's list by this power; else its shares are."""
    shift: bool = False
    """From half-way on, the models' popularities are turned round."""
    priorities: Mapping[int, float] = field(default_factory=lambda: {USUAL_PRIORITY: 1.0})

    def popularity(self, shares: Mapping[str, float]) -> Popularity:
        """Say how often each model is asked for; ``shares`` are those of the cluster."""
        models = tuple(shares)
        if self.zipf is None:
            first = tuple(shares.values())
        else:
            first = tuple((place + 1.0) ** -self.zipf for place in range(len(models)))
        return Popularity(models, first, first[::-1] if self.shift else first)

    def _priority(self, rng: random.Random) -> int:
        return rng.choices(tuple(self.priorities), tuple(self.priorities.values()))[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoissonLoad(Load):
    """
    Requests that know nothing of one another.

    Args:
        rate: requests in a second.
        count: requests in all.
        input_tokens, output_tokens: their mean lengths; drawn from log-normal distributions.
        spread: how unequal lengths are: the sigma of those.
    """

    rate: float = 0.5
    count: int = 200
    input_tokens: float = 300.0
    output_tokens: float = 150.0
    spread: float = 0.8

    def requests(self, shares: Mapping[str, float], *, seed: int, num_ctx: int) -> list[Asked]:
        """Draw the requests of one run."""
        # One source for each thing: another mix of models leaves the times as they are.
        times, lengths, models, ranks = (
            random.Random(f"{seed} {what}") for what in ("times", "lengths", "models", "priorities")
        )
        popularity = self.popularity(shares)
        now, asked = 0.0, []
        for number in range(self.count):
            now += times.expovariate(self.rate)
            asked.append(
                Asked(
                    number=number,
                    at=now,
                    model=popularity.draw(models, is_late=2 * number >= self.count),
                    input_tokens=_clipped(self._length(lengths, self.input_tokens), num_ctx),
                    output_tokens=max(LEAST_TOKENS, self._length(lengths, self.output_tokens)),
                    priority=self._priority(ranks),
                )
            )
        return asked

    def _length(self, rng: random.Random, mean: float) -> int:
        return round(rng.lognormvariate(math.log(mean) - self.spread**2 / 2, self.spread))

    def __str__(self) -> str:
        return (
            f"Poisson, {self.rate:g} requests/s, {self.count} requests, "
            f"{self.input_tokens:g} tokens in and {self.output_tokens:g} out in the mean"
        )


class Row(NamedTuple):
    """One row of a trace."""

    at: float
    input_tokens: int
    output_tokens: int
    prefix_row: int = -1
    shared_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceLoad(Load):
    """
    The requests of a trace, at another pace.

    Args:
        rate: requests in a second in the mean; ``None`` leaves the times as they are.
        count: how many rows from the beginning; ``None`` is all.
    """

    name: str
    rows: tuple[Row, ...] = field(repr=False)
    rate: float | None = None
    count: int | None = None

    def requests(self, shares: Mapping[str, float], *, seed: int, num_ctx: int) -> list[Asked]:
        """Give the requests of one run: only models and priorities depend on the seed."""
        models, ranks = (random.Random(f"{seed} {what}") for what in ("models", "priorities"))
        rows = self.rows[: self.count]
        begin, span = rows[0].at, rows[-1].at - rows[0].at
        stretch = 1.0 if self.rate is None or span <= 0 else len(rows) / self.rate / span
        popularity = self.popularity(shares)
        sessions, sizes = _sessions(rows)
        model_of: dict[int, str] = {}
        asked = []
        for number, (row, session) in enumerate(zip(rows, sessions, strict=True)):
            if session not in model_of:
                is_late = 2 * number >= len(rows)
                model_of[session] = popularity.draw(models, is_late=is_late)
            shared = min(row.shared_tokens, row.input_tokens)
            asked.append(
                Asked(
                    number=number,
                    at=(row.at - begin) * stretch,
                    model=model_of[session],
                    input_tokens=_clipped(row.input_tokens, num_ctx),
                    output_tokens=max(LEAST_TOKENS, row.output_tokens),
                    priority=self._priority(ranks),
                    session=f"conversation {session}" if sizes[session] > 1 else None,
                    shared=Shared(row.prefix_row, shared) if row.prefix_row >= 0 else None,
                )
            )
        return asked

    def __str__(self) -> str:
        count = len(self.rows[: self.count])
        pace = "its own pace" if self.rate is None else f"{self.rate:g} requests/s"
        return f"{self.name}, {pace}, {count} requests"


def _clipped(tokens: int, num_ctx: int) -> int:
    """As much of a prompt as fits: the answer wants a quarter of the context."""
    return max(1, min(tokens, num_ctx * 3 // 4))


def _sessions(rows: Sequence[Row]) -> tuple[list[int], dict[int, int]]:
    """The conversation of each row, named by its first one; and how many rows each has."""
    sessions: list[int] = []
    sizes: dict[int, int] = {}
    for number, row in enumerate(rows):
        belongs = row.prefix_row >= 0 and row.shared_tokens >= SAME_CONVERSATION * row.input_tokens
        session = sessions[row.prefix_row] if belongs else number
        sessions.append(session)
        sizes[session] = sizes.get(session, 0) + 1
    return sessions, sizes


# ------------------------------------------------------------------------- reading


def read_load(
    text: str,
    *,
    rate: float | None = None,
    requests: int | None = None,
    zipf: float | None = None,
    shift: bool = False,
    priorities: Mapping[int, float] | None = None,
) -> PoissonLoad | TraceLoad:
    """
    Read ``--trace``: ``poisson:key=value,...``, the name of a trace, or the path of a CSV file.

    Raises:
        ConfigurationError: there is none of that name, or it is not as it should be.
    """
    drawn = {} if priorities is None else {"priorities": dict(priorities)}
    if text == "poisson" or text.startswith("poisson:"):
        load = _read_poisson(text.partition(":")[2])
        changed = {"rate": rate, "count": requests}
        given = {name: value for name, value in changed.items() if value is not None}
        return replace(load, zipf=zipf, shift=shift, **given, **drawn)  # type: ignore[arg-type]
    name, rows = _read_trace(text)
    return TraceLoad(
        name=name,
        rows=rows,
        rate=rate,
        count=requests,
        zipf=zipf,
        shift=shift,
        **drawn,
    )


_KEYS = {
    "rate": "requests in a second",
    "requests": "how many",
    "duration": "seconds, instead of requests",
    "input": "tokens of a prompt in the mean",
    "output": "tokens of an answer in the mean",
    "spread": "sigma of the lengths' log-normal distributions",
}


def _read_poisson(text: str) -> PoissonLoad:
    given: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = part.partition("=")
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigurationError(f"poisson: has no {key!r}{hint} It has {', '.join(_KEYS)}")
        given[key] = _positive(value, f"poisson: {key}", or_zero=key == "spread")
    load = PoissonLoad()
    rate = given.get("rate", load.rate)
    if "duration" in given and "requests" in given:
        raise ConfigurationError("poisson: takes requests or duration, not both")
    count = given.get("requests", load.count)
    if "duration" in given:
        count = max(1, round(given["duration"] * rate))
    return replace(
        load,
        rate=rate,
        count=max(1, int(count)),
        input_tokens=given.get("input", load.input_tokens),
        output_tokens=given.get("output", load.output_tokens),
        spread=given.get("spread", load.spread),
    )


def _positive(text: str, what: str, *, or_zero: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and (value > 0 or (or_zero and value == 0))):
        raise ConfigurationError(f"{what} should be a number above 0, not {text!r}")
    return value


def read_priorities(text: str) -> dict[int, float]:
    """
    Read ``--priorities``: ``10=1,5=7,2=2``, a priority and its share.

    Raises:
        ConfigurationError: it is not that.
    """
    found: dict[int, float] = {}
    for part in text.split(","):
        key, _, share = part.strip().partition("=")
        if not (key.isdecimal() and 1 <= int(key) <= 10):
            raise ConfigurationError(f"--priorities should be like 10=1,5=7,2=2, not {text!r}")
        found[int(key)] = _positive(share or "1", f"--priorities: share of {key}")
    return found


def _read_trace(text: str) -> tuple[str, tuple[Row, ...]]:
    if text in TRACES:
        return text, _packaged(text)
    path = Path(text).expanduser()
    try:
        data = path.read_bytes()
    except OSError as exc:
        near = difflib.get_close_matches(text, TRACES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigurationError(
            f"no trace {text!r}: {hint}There are {', '.join(TRACES)}, poisson:..., and files"
        ) from exc
    return path.name, _rows(data, text)


@lru_cache(maxsize=len(TRACES))
def _packaged(name: str) -> tuple[Row, ...]:
    data = (resources.files("hydra_llm.replay") / "traces" / f"{name}.csv.gz").read_bytes()
    return _rows(data, name)


def _rows(data: bytes, name: str) -> tuple[Row, ...]:
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"{name} is no CSV file, nor one packed by gzip") from exc
    reader = csv.DictReader(io.StringIO(text))
    missing = {"arrival_s", "input_tokens", "output_tokens"} - set(reader.fieldnames or ())
    if missing:
        raise ConfigurationError(f"{name} lacks the columns {', '.join(sorted(missing))}")
    rows = tuple(_each(reader, name))
    if not rows:
        raise ConfigurationError(f"{name} has no row")
    return rows


def _each(reader: Iterable[Mapping[str, str]], name: str) -> Iterable[Row]:
    before = -math.inf
    for number, row in enumerate(reader):
        try:
            read = Row(
                float(row["arrival_s"]),
                int(row["input_tokens"]),
                int(row["output_tokens"]),
                int(row.get("prefix_row") or -1),
                BLOCK_TOKENS * int(row.get("shared_blocks") or 0),
            )
        except (TypeError, ValueError):
            raise ConfigurationError(
                f"{name}: row {number + 1} has something else than numbers"
            ) from None
        if not before <= read.at < math.inf or read.prefix_row >= number or min(read[1:3]) < 0:
            raise ConfigurationError(
                f"{name}: row {number + 1} is out of order: times rise, prefix_row is earlier"
            )
        before = read.at
        yield read


# ------------------------------------------------------------------------- prompts

_POOL_WORDS = 100_003
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@lru_cache(maxsize=1)
def _pool() -> str:
    rng = random.Random("words of prompts")
    letters = "".join(rng.choices(_LETTERS, k=3 * _POOL_WORDS))
    return "".join(f" {letters[at : at + 3]}" for at in range(0, len(letters), 3))


class Prompts:
    """
    Writes the prompts: a word of four bytes for each token, the same where they are shared.

    The last word is the number of tokens that the answer shall have, which a simulated model with
    ``Behaviour(kind="length")`` reads and a router does not.
    """

    def __init__(self, asked: Sequence[Asked]) -> None:
        self._asked = asked

    def of(self, one: Asked) -> str:
        """Write a prompt."""
        return f"{self._begin(one.number, one.input_tokens)} {one.output_tokens}"

    def _begin(self, number: int, tokens: int) -> str:
        pieces: list[str] = []
        while True:
            shared = self._asked[number].shared
            common = 0 if shared is None else shared.tokens
            if shared is None or common < tokens:
                pieces.append(self._own(number, common, tokens))
            if shared is None:
                break
            number, tokens = shared.row, min(tokens, common)
        return "".join(reversed(pieces)).lstrip()

    def _own(self, number: int, start: int, stop: int) -> str:
        pool = _pool()
        begin = (7919 * number + start) % _POOL_WORDS * 4
        text = pool[begin : begin + 4 * (stop - start)]
        while len(text) < 4 * (stop - start):
            text += pool[: 4 * (stop - start) - len(text)]
        return text
