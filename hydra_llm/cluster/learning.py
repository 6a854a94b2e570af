"""How fast nodes turn out to be.

Rates are averaged as logarithms, so that a rate twice too high and one twice too low weigh
the same; new values count a fifth, and one far off counts only as far as a factor of three.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from hydra_llm.types import UNKNOWN_SPEED, Speed, Usage

WEIGHT = 0.2
OUTLIER_FACTOR = 3.0
SETTLED_SAMPLES = 3
MIN_PREFILL_TOKENS = 64
"""Fewer tell more of fixed costs than of the rate."""
MIN_DECODE_TOKENS = 4
NO_WAIT_SECONDS = 0.05
"""Slot waits shorter than this are overhead."""
TELLING_SECONDS = 10 * NO_WAIT_SECONDS
"""An answer quicker than this would hardly have kept another one waiting in a single slot, so that
nobody waited says nothing of slots."""
MIN_LOAD_SECONDS = 0.5
"""A ``load_duration`` of a warm runner, or of a tiny model, is up to 0.27 s (FACTS section 4)."""


PRIOR_SAMPLES = 3
"""So many answers weigh as much as what was expected before."""
LENGTHS_KEPT = 30
"""A mean over so many answers follows when they change."""

UNSENT_KEPT = 1000
"""Samples kept for the other routers while they cannot be told."""

Kind = Literal["prefill", "decode", "load", "output", "slots", "load_bandwidth", "bandwidth"]

KINDS: dict[Kind, bool] = {
    "prefill": True,
    "decode": True,
    "load": True,
    "output": True,
    "slots": True,
    "load_bandwidth": False,
    "bandwidth": False,
}
"""All of them, and whether each is measured for every model."""

NO_MODEL = ""
"""Stands for the model where something is true of the whole node."""


class Measured(NamedTuple):
    """One sample, for the other routers: a logarithm, except of the slots."""

    model: str
    kind: Kind
    value: float


class Average:
    """A mean that forgets and does not fall for outliers."""

    __slots__ = ("_log", "samples")

    def __init__(self) -> None:
        self._log = 0.0
        self.samples = 0

    @property
    def value(self) -> float | None:
        """The mean; None before the first sample."""
        return math.exp(self._log) if self.samples else None

    @property
    def log(self) -> float:
        """The mean of the logarithms."""
        return self._log

    def set(self, log: float, samples: int) -> None:
        """Go on from another mean."""
        self._log, self.samples = log, samples

    def add(self, sample: float) -> bool:
        """Take in one positive sample; others are ignored."""
        if not (sample > 0.0 and math.isfinite(sample)):
            return False
        self.add_log(math.log(sample))
        return True

    def add_log(self, log: float) -> None:
        """Take in one sample by its logarithm. ``rates.lua`` does the same."""
        if not self.samples:
            self._log = log
        else:
            step = log - self._log
            if self.samples >= SETTLED_SAMPLES:
                limit = math.log(OUTLIER_FACTOR)
                step = max(-limit, min(limit, step))
            self._log += max(WEIGHT, 1.0 / (self.samples + 1)) * step
        self.samples += 1


class AnswerLengths:
    """
    How long the answers of each model are, whichever node gives them: mean tokens.

    What a model has said weighs against what all models say, and that against a guess: each of the
    two counts for :data:`PRIOR_SAMPLES` answers.
    """

    def __init__(self, guess: float) -> None:
        self._all = _Mean(guess, PRIOR_SAMPLES)
        self._models: dict[str, _Mean] = {}

    def add(self, model: str, tokens: int) -> None:
        """Take in one whole answer."""
        self._all.add(tokens)
        self._models.setdefault(model, _Mean(0.0, 0)).add(tokens)

    def expected(self, model: str) -> float:
        """Of the model's next answer."""
        own = self._models.get(model)
        if own is None:
            return self._all.value
        return own.with_prior(self._all.value, PRIOR_SAMPLES)


class _Mean:
    """A mean of the latest :data:`LENGTHS_KEPT` or so."""

    __slots__ = ("count", "value")

    def __init__(self, value: float, count: int) -> None:
        self.value = value
        self.count = count

    def add(self, sample: float) -> None:
        self.count = min(self.count + 1, LENGTHS_KEPT)
        self.value += (sample - self.value) / self.count

    def with_prior(self, prior: float, count: int) -> float:
        return (self.value * self.count + prior * count) / (self.count + count)


@dataclass(slots=True)
class ModelLearner:
    """What one node has shown of one model."""

    prefill: Average = field(default_factory=Average)
    decode: Average = field(default_factory=Average)
    load: Average = field(default_factory=Average)
    output: Average = field(default_factory=Average)
    slots: int | None = None

    def speed(self) -> Speed:
        """As the scheduler sees it."""
        return Speed(
            prefill_seconds_per_token=self.prefill.value,
            decode_seconds_per_token=self.decode.value,
            load_seconds=self.load.value,
            output_tokens=self.output.value,
            slots=self.slots,
            samples=self.decode.samples,
        )


class NodeLearner:
    """What one node has shown; forgets a model when its file changes."""

    def __init__(self) -> None:
        self._models: dict[str, ModelLearner] = {}
        self.unsent: deque[Measured] | None = None
        """What other routers are still to be told; None where there are none to tell."""
        self._load_bandwidth = Average()
        self._bandwidth = Average()
        self.speeds: dict[str, Speed] = {}

    @property
    def load_bytes_per_second(self) -> float | None:
        """Bytes loaded per second, over all models."""
        return self._load_bandwidth.value

    @property
    def bytes_per_second(self) -> float | None:
        """Model bytes per second of decoding, over all models fully on the GPU."""
        return self._bandwidth.value

    def speed(self, model: str) -> Speed:
        """What is known of one model."""
        return self.speeds.get(model, UNKNOWN_SPEED)

    def learn(
        self,
        model: str,
        usage: Usage,
        *,
        caused_load: bool,
        cached_tokens: int | None,
        alone: bool,
        peers: int,
        size_bytes: int,
        on_gpu: bool,
    ) -> None:
        """
        Take in one complete answer.

        Args:
            caused_load: the model was loaded for it.
            cached_tokens: prompt tokens that were in the prompt cache; None if unknown, in
                which case nothing is learned of the prefill rate.
            alone: nothing else of ours ran on the node meanwhile.
            peers: requests for the model already there when it came.
            size_bytes: the model's file size, 0 if unknown.
            on_gpu: all of it lies in GPU memory.
        """
        learner = self._models.setdefault(model, ModelLearner())
        tokens = usage.output_tokens or 0
        if usage.decode_seconds and tokens >= MIN_DECODE_TOKENS and alone:
            per_token = usage.decode_seconds / tokens
            self._add(model, "decode", per_token)
            if size_bytes and on_gpu:
                self._add(NO_MODEL, "bandwidth", size_bytes / per_token)
        if tokens:
            self._add(model, "output", float(tokens))
        if cached_tokens is not None and usage.prefill_seconds and alone:
            fresh = (usage.prompt_tokens or 0) - cached_tokens
            if fresh >= MIN_PREFILL_TOKENS:
                self._add(model, "prefill", usage.prefill_seconds / fresh)
        if caused_load and usage.load_seconds and usage.load_seconds >= MIN_LOAD_SECONDS and alone:
            self._add(model, "load", usage.load_seconds)
            if size_bytes:
                self._add(NO_MODEL, "load_bandwidth", size_bytes / usage.load_seconds)
        if not caused_load:
            slots = learner.slots
            self._learn_slots(learner, usage, peers)
            if self.unsent is not None and learner.slots is not None and learner.slots != slots:
                self.unsent.append(Measured(model, "slots", learner.slots))
        self.speeds = {**self.speeds, model: learner.speed()}

    def _add(self, model: str, kind: Kind, sample: float) -> None:
        if self._average(model, kind).add(sample) and self.unsent is not None:
            self.unsent.append(Measured(model, kind, math.log(sample)))

    def _average(self, model: str, kind: Kind) -> Average:
        if kind == "bandwidth":
            return self._bandwidth
        if kind == "load_bandwidth":
            return self._load_bandwidth
        learner = self._models.setdefault(model, ModelLearner())
        average = getattr(learner, kind)
        assert isinstance(average, Average)
        return average

    @staticmethod
    def _learn_slots(learner: ModelLearner, usage: Usage, peers: int) -> None:
        waited = usage.slot_seconds
        if waited is None or usage.total_seconds is None or usage.decode_seconds is None:
            return
        if not peers:
            return
        if waited <= max(NO_WAIT_SECONDS, 0.02 * usage.total_seconds):
            if usage.decode_seconds + (usage.prefill_seconds or 0.0) >= TELLING_SECONDS:
                learner.slots = max(learner.slots or 1, peers + 1)
        elif learner.slots is None or learner.slots > peers:
            learner.slots = max(1, peers)

    def slots_of(self, model: str) -> int | None:
        """Slots that its runner was seen to have; None where nothing has shown it."""
        learner = self._models.get(model)
        return None if learner is None else learner.slots

    def forget(self, model: str) -> None:
        """The model's file has changed: what was learned is of another model."""
        self._models.pop(model, None)
        self.speeds = {name: speed for name, speed in self.speeds.items() if name != model}
        if self.unsent is not None:
            self.unsent = deque((m for m in self.unsent if m.model != model), UNSENT_KEPT)

    # ---------------------------------------------------------------- with others

    def share(self) -> None:
        """From now on keep what is measured for the other routers as well."""
        self.unsent = deque(maxlen=UNSENT_KEPT)

    def take_unsent(self) -> list[Measured]:
        """What the others are to be told now; each is given once."""
        if self.unsent is None:
            return []
        taken = list(self.unsent)
        self.unsent.clear()
        return taken

    def recall(self, model: str, kind: Kind, value: float, samples: int) -> None:
        """Begin with what an earlier router has measured, unless there is something newer."""
        if kind == "slots":
            learner = self._models.setdefault(model, ModelLearner())
            learner.slots = learner.slots or max(1, round(value))
        elif not (average := self._average(model, kind)).samples:
            average.set(math.log(value), samples)

    def learned(self, model: str) -> Iterator[tuple[Kind, float, int]]:
        """All that was measured of a model, or of the node: kind, value and samples."""
        for kind, is_of_a_model in KINDS.items():
            if is_of_a_model != (model != NO_MODEL) or (
                is_of_a_model and model not in self._models
            ):
                continue
            if kind == "slots":
                if (slots := self._models[model].slots) is not None:
                    yield kind, float(slots), 1
            elif (value := (average := self._average(model, kind)).value) is not None:
                yield kind, value, average.samples

    def known(self, model: str, kind: Kind) -> tuple[float, int] | None:
        """The value, and the samples behind it; None while the others lack some of them."""
        if any(m[:2] == (model, kind) for m in self.unsent or ()):
            return None
        if model != NO_MODEL and model not in self._models:
            return None
        if kind == "slots":
            slots = self._models[model].slots
            return None if slots is None else (float(slots), 1)
        average = self._average(model, kind)
        return (average.log, average.samples) if average.samples else None

    def adopt(self, model: str, kind: Kind, value: float, samples: int) -> None:
        """Go on from what all routers have measured, and add what they have not been told."""
        unsent = [m.value for m in self.unsent or () if m[:2] == (model, kind)]
        if kind == "slots":
            if not unsent and value >= 1:
                self._models.setdefault(model, ModelLearner()).slots = int(value)
        else:
            average = self._average(model, kind)
            average.set(value, samples)
            for log in unsent:
                average.add_log(log)

    def adopted(self, models: Iterable[str]) -> None:
        """Show what was adopted for these models."""
        known = [model for model in models if model in self._models]
        self.speeds = {**self.speeds, **{name: self._models[name].speed() for name in known}}
