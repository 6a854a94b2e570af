"""The circuit breaker, beside a plain model of it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hydra_llm.cluster.breaker import CircuitBreaker

FAILURES, OPEN_SECONDS, MAX_OPEN_SECONDS = 2, 5, 20


class WholeJitter(random.Random):
    """Draws the ends and the middle, so that circuits open for whole seconds."""

    def uniform(self, a: float, b: float) -> float:
        return self.choice([a, (a + b) / 2, b])


def breaker(rng: random.Random | None = None) -> CircuitBreaker:
    return CircuitBreaker(
        failures=FAILURES,
        open_seconds=OPEN_SECONDS,
        max_open_seconds=MAX_OPEN_SECONDS,
        rng=rng or random.Random(0),
    )


def opened(now: float = 0.0) -> CircuitBreaker:
    circuit = breaker()
    for _ in range(FAILURES):
        circuit.fail(circuit.begin(now), now, "timeout")
    return circuit


@dataclass
class Sent:
    generation: int
    epoch: int


class BreakerMachine(RuleBasedStateMachine):
    """The model counts epochs: every transition starts one, and only its own results count."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = breaker(WholeJitter(0))
        self.now = 0
        self.epoch = 0
        self.is_closed = True
        self.failures = 0
        self.openings = 0
        self.retry_at = 0.0
        self.probe: Sent | None = None
        self.sent: list[Sent] = []

    def passes(self) -> bool:
        return self.is_closed or (self.probe is None and self.now >= self.retry_at)

    def take(self, data: st.DataObject) -> tuple[Sent, bool]:
        """One of those under way, and whether its result counts."""
        sent = self.sent.pop(data.draw(st.integers(0, len(self.sent) - 1)))
        return sent, sent.epoch == self.epoch

    @rule(seconds=st.integers(1, 8))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @precondition(lambda self: self.passes())
    @rule()
    def send(self) -> None:
        generation = self.breaker.begin(self.now)
        if not self.is_closed:
            self.epoch += 1
        sent = Sent(generation, self.epoch)
        self.sent.append(sent)
        if not self.is_closed:
            self.probe = sent

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def succeed(self, data: st.DataObject) -> None:
        sent, counts = self.take(data)

        closed_it = self.breaker.succeed(sent.generation)

        assert closed_it == (counts and not self.is_closed)
        if not counts:
            return
        self.failures = 0
        if self.is_closed:
            self.openings = max(0, self.openings - 1)
        else:
            assert sent is self.probe
            self.close()

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), may_open=st.booleans())
    def fail(self, data: st.DataObject, may_open: bool) -> None:
        sent, counts = self.take(data)

        opened_it = self.breaker.fail(sent.generation, self.now, "timeout", may_open=may_open)

        if not counts:
            assert not opened_it
            return
        self.failures += 1
        if self.is_closed and (self.failures < FAILURES or not may_open):
            assert not opened_it
            return
        assert opened_it
        base = min(OPEN_SECONDS * 2**self.openings, MAX_OPEN_SECONDS)
        assert self.breaker.retry_at is not None
        assert 0.8 * base <= self.breaker.retry_at - self.now <= 1.2 * base
        self.is_closed, self.probe, self.failures = False, None, 0
        self.retry_at = self.breaker.retry_at
        self.openings += 1
        self.epoch += 1

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        sent, counts = self.take(data)

        self.breaker.abandon(sent.generation)

        if counts and sent is self.probe:
            self.probe = None
            self.epoch += 1

    @rule()
    def reset(self) -> None:
        self.breaker.reset()
        if not self.is_closed or self.failures:
            self.close()
        self.openings = 0

    def close(self) -> None:
        self.is_closed, self.probe, self.failures = True, None, 0
        self.epoch += 1

    @invariant()
    def both_agree(self) -> None:
        assert self.breaker.allows(self.now) == self.passes()
        assert self.breaker.is_closed == self.is_closed
        if self.is_closed:
            assert self.breaker.state(self.now) == "closed"
        elif self.probe is None and self.now < self.retry_at:
            assert self.breaker.state(self.now) == "open"
        else:
            assert self.breaker.state(self.now) == "half-open"
        is_out = self.is_closed or self.probe is not None
        assert self.breaker.retry_at == (None if is_out else self.retry_at)


TestBreakerBesideItsModel = BreakerMachine.TestCase
TestBreakerBesideItsModel.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None
)


def test_exactly_one_request_passes_a_half_open_circuit() -> None:
    circuit = opened()
    now = circuit.retry_at or 0.0

    assert circuit.allows(now)
    circuit.begin(now)

    assert not circuit.allows(now)
    assert not circuit.allows(now + 1000)


def test_a_late_success_does_not_close_a_circuit_that_has_opened_since() -> None:
    circuit = breaker()
    slow = circuit.begin(0)
    for _ in range(FAILURES):
        circuit.fail(circuit.begin(0), 0, "timeout")

    assert not circuit.succeed(slow)
    assert not circuit.is_closed


def test_a_late_failure_does_not_spend_the_probe() -> None:
    circuit = breaker()
    slow = circuit.begin(0)
    for _ in range(FAILURES):
        circuit.fail(circuit.begin(0), 0, "timeout")
    probe = circuit.begin(circuit.retry_at or 0.0)

    assert not circuit.fail(slow, 10, "timeout")
    assert circuit.succeed(probe)


def test_a_cancelled_probe_gives_its_place_back() -> None:
    circuit = opened()
    now = circuit.retry_at or 0.0
    circuit.abandon(circuit.begin(now))

    assert circuit.allows(now)


@given(seed=st.integers(0, 1000), openings=st.integers(1, 8))
def test_each_further_failure_doubles_the_time_up_to_the_longest(seed: int, openings: int) -> None:
    circuit, now = breaker(random.Random(seed)), 0.0
    circuit.fail(circuit.begin(now), now, "timeout")

    for opening in range(openings):
        circuit.fail(circuit.begin(now), now, "timeout")
        base = min(OPEN_SECONDS * 2**opening, MAX_OPEN_SECONDS)
        assert circuit.retry_at is not None
        assert 0.8 * base <= circuit.retry_at - now <= 1.2 * base
        now = circuit.retry_at


def test_two_routers_do_not_return_at_the_same_moment() -> None:
    times = set()
    for seed in range(20):
        circuit = breaker(random.Random(seed))
        for _ in range(FAILURES):
            circuit.fail(circuit.begin(0), 0, "timeout")
        times.add(circuit.retry_at)

    assert len(times) > 10


def test_a_node_that_has_worked_for_a_while_starts_with_a_short_time_again() -> None:
    circuit, now = breaker(WholeJitter(0)), 0.0
    for _ in range(6):
        circuit.fail(circuit.begin(now), now, "timeout")
        now = circuit.retry_at or now
    circuit.succeed(circuit.begin(now))
    for _ in range(10):
        circuit.succeed(circuit.begin(now))

    for _ in range(FAILURES):
        circuit.fail(circuit.begin(now), now, "timeout")

    assert (circuit.retry_at or 0.0) - now <= 1.2 * OPEN_SECONDS


def test_a_node_can_be_away_for_weeks() -> None:
    circuit, now = opened(), 0.0
    for _ in range(2000):
        now = circuit.retry_at or now
        circuit.fail(circuit.begin(now), now, "timeout")

    assert (circuit.retry_at or 0.0) - now <= 1.2 * MAX_OPEN_SECONDS


def test_the_repr_says_what_state_it_is_in() -> None:
    assert repr(breaker()) == "<CircuitBreaker closed, 0 failures>"
    circuit = opened()
    assert repr(circuit).startswith("<CircuitBreaker open until")
    circuit.begin(circuit.retry_at or 0.0)
    assert "timeout" in repr(circuit)
