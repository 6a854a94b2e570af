"""The rules of the scheduler and the runners, on a virtual clock."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.simulation.catalog import GB, SimulatedModel, known_models
from hydra_llm.simulation.model import OllamaServer
from hydra_llm.simulation.records import Event, Job, Options, Ticket
from hydra_llm.simulation.settings import Gpu, NodeSettings

MODELS = known_models()
SMALL, MIDDLE, LARGE = MODELS["llama3.2:3b"], MODELS["qwen3:8b"], MODELS["mistral-small:24b"]
EMBED = MODELS["nomic-embed-text"]


def gpu_node(*total_gb: float, others_gb: float = 0.0, **settings: Any) -> OllamaServer:
    gpus = tuple(
        Gpu(total_bytes=round(total * GB), used_by_others_bytes=round(others_gb * GB))
        for total in total_gb
    )
    return OllamaServer(NodeSettings(gpus=gpus, **settings))


def job(model: SimulatedModel = SMALL, tokens: int = 10, *, prompt: int = 100, **more: Any) -> Job:
    return Job(model=model, prompt=((("a prompt", prompt), prompt),), answer_tokens=tokens, **more)


def run(server: OllamaServer, *tickets: Ticket) -> float:
    now = 0.0
    while not all(ticket.is_over for ticket in tickets):
        at = server.next_event_at()
        assert at is not None, "nothing will happen any more"
        assert at >= now, "time goes back"
        now = at
        server.advance(now)
    return now


# ---------------------------------------------------------------- times


def test_a_token_takes_the_time_to_read_the_weights_once() -> None:
    server = gpu_node(24, gpu_bandwidth=400 * GB)
    ticket = server.submit(job(tokens=100), 0.0)
    run(server, ticket)

    assert ticket.eval_s == pytest.approx(100 * SMALL.size_bytes / (400 * GB))


def test_a_prompt_is_read_faster_by_the_stated_ratio() -> None:
    server = gpu_node(24, prefill_ratio=25.0)
    ticket = server.submit(job(tokens=10, prompt=250), 0.0)
    run(server, ticket)

    assert ticket.prompt_eval_s == pytest.approx(ticket.eval_s)


def test_a_load_takes_a_fixed_time_and_the_bytes_over_the_bandwidth() -> None:
    server = gpu_node(24, load_fixed_s=0.5, load_bandwidth=2 * GB)
    ticket = server.submit(job(MIDDLE), 0.0)
    run(server, ticket)

    assert ticket.load_s == pytest.approx(0.5 + 5.2 / 2)
    assert ticket.total_s == pytest.approx(ticket.load_s + ticket.prompt_eval_s + ticket.eval_s)


def test_a_partly_offloaded_model_is_slower_by_its_bytes_in_system_memory() -> None:
    server = gpu_node(8, gpu_bandwidth=400 * GB, cpu_bandwidth=40 * GB)
    ticket = server.submit(job(LARGE, tokens=10), 0.0)
    run(server, ticket)
    (runner,) = server.running(server_now(server))
    share = runner.size_vram / runner.size

    assert 0 < share < 1
    weights = LARGE.size_bytes
    expected = weights * share / (400 * GB) + weights * (1 - share) / (40 * GB)
    assert ticket.eval_s / 10 == pytest.approx(expected)


def test_two_streams_in_one_batch_cost_each_other_less_than_two_models_on_one_gpu() -> None:
    def slowed(second: SimulatedModel) -> float:
        server = gpu_node(24, num_parallel=2)
        server.preload(SMALL, 0.0)
        server.preload(second, 0.0)
        first = server.submit(job(tokens=100, prompt=0), 0.0)
        server.submit(job(second, tokens=10_000, prompt=0), 0.0)
        run(server, first)
        return first.eval_s / (100 * SMALL.size_bytes / (400 * GB))

    assert slowed(SMALL) == pytest.approx(1.3)
    assert slowed(MIDDLE) == pytest.approx(2.0)


def test_models_on_two_gpus_do_not_slow_each_other() -> None:
    server = gpu_node(12, 12)
    server.preload(SMALL, 0.0)
    server.preload(MIDDLE, 0.0)
    first = server.submit(job(tokens=100, prompt=0), 0.0)
    server.submit(job(MIDDLE, tokens=10_000, prompt=0), 0.0)
    run(server, first)

    assert first.eval_s == pytest.approx(100 * SMALL.size_bytes / (400 * GB))


def test_a_slowdown_stretches_what_is_under_way() -> None:
    server = gpu_node(24)
    server.preload(SMALL, 0.0)
    ticket = server.submit(job(tokens=100, prompt=0), 0.0)
    server.slow_down(4.0, 0.25)
    run(server, ticket)

    assert ticket.eval_s == pytest.approx(0.25 + 0.25 * 4)


def server_now(server: OllamaServer) -> float:
    return max([record.ended for record in server.loads], default=0.0)


# ---------------------------------------------------------------- memory


def test_a_forecast_of_more_than_four_fifths_of_free_memory_evicts() -> None:
    tight, roomy = gpu_node(9.0), gpu_node(11.0)
    for server in (tight, roomy):
        server.preload(SMALL, 0.0)
        run(server, server.submit(job(MIDDLE, options=Options(num_ctx=4096)), 0.0))

    assert [record.model for record in tight.evictions] == ["llama3.2:3b"]
    assert roomy.evictions == []


def test_a_model_that_fits_on_one_gpu_is_not_split() -> None:
    server = gpu_node(8, 12)
    server.preload(MIDDLE, 0.0)

    free = server.free_vram()
    assert free[0] == 8 * GB
    assert free[1] < 12 * GB


def test_a_model_too_large_for_one_gpu_takes_two() -> None:
    server = gpu_node(12, 12)
    server.preload(LARGE, 0.0, num_ctx=4096)
    (runner,) = server.running(0.0)

    assert runner.size_vram == runner.size
    assert all(free < 12 * GB for free in server.free_vram())


def test_what_others_hold_of_a_gpu_is_not_free() -> None:
    server = gpu_node(8, others_gb=6.5)
    server.preload(MIDDLE, 0.0)

    assert server.vram_used_bytes <= 1.5 * GB


def test_the_default_context_follows_total_vram() -> None:
    shown = {}
    for total in (8, 24.8, 51):
        server = gpu_node(total)
        server.preload(SMALL, 0.0)
        shown[total] = server.running(0.0)[0].context_length

    assert shown == {8: 4096, 24.8: 32768, 51: 131072}  # capped at the train context


def test_a_cpu_node_shows_no_vram() -> None:
    server = OllamaServer(NodeSettings())
    run(server, server.submit(job(), 0.0))

    assert server.running(100.0)[0].size_vram == 0


def test_a_load_that_dies_for_memory_fails_with_the_versions_text() -> None:
    for version, text in (
        ("0.32.15", "llama-server process has terminated: exit status 1: ggml_aligned_malloc"),
        ("0.24.0", "model requires more system memory"),
    ):
        server = OllamaServer(NodeSettings(ram_bytes=8 * GB, version=version))
        ticket = server.submit(job(LARGE), 0.0)
        run(server, ticket)
        assert ticket.failure is not None
        assert ticket.failure.status == 500
        assert ticket.failure.text.startswith(text)


def test_the_idle_go_first_then_the_shortest_keep_alive_then_the_path() -> None:
    first, second, third, busy = (
        replace(SMALL, name=name, weights=weights)
        for name, weights in (("late", "9"), ("path-2", "2"), ("path-1", "1"), ("busy", "0"))
    )
    server = gpu_node(100, max_loaded_models=4)
    server.preload(first, 0.0, keep_alive=10.0)
    server.preload(second, 0.0, keep_alive=60.0)
    server.preload(third, 0.0, keep_alive=60.0)
    server.preload(busy, 0.0, keep_alive=5.0)
    server.submit(job(busy, tokens=10_000), 0.0)
    for number in range(3):
        run(server, server.submit(job(replace(SMALL, name=f"new-{number}"), keep_alive=-1.0), 0.0))

    gone = [record.model for record in server.evictions if record.reason == "room"]
    assert gone == ["late", "path-1", "path-2"]


# ---------------------------------------------------------------- queue, slots, leaving


def test_the_wedge_a_request_with_a_keep_alive_takes_back_the_mark_of_a_leaving_runner() -> None:
    server = gpu_node(24, max_loaded_models=1)
    server.preload(SMALL, 0.0)
    busy = server.submit(job(tokens=1000), 0.0)
    waiting = server.submit(job(MIDDLE), 0.1)
    server.submit(job(keep_alive=-1.0), 0.2)
    run(server, busy)
    server.advance(10_000.0)

    assert waiting.state == "queued"


def test_a_cancelled_request_in_the_queue_never_loads() -> None:
    server = gpu_node(24)
    first = server.submit(job(), 0.0)
    second = server.submit(job(MIDDLE), 0.0)
    server.cancel(second, 0.1)
    run(server, first)

    assert [record.model for record in server.loads] == ["llama3.2:3b"]


def test_embedding_models_have_one_slot_whatever_is_set() -> None:
    server = gpu_node(24, num_parallel=4)
    server.preload(EMBED, 0.0)
    tickets = [server.submit(job(EMBED, 0, kind="embed"), 0.0) for _ in range(3)]
    run(server, *tickets)

    ends = [ticket.ended_at for ticket in tickets]
    assert len(set(ends)) == 3


def test_a_request_for_a_loading_model_waits_for_that_load() -> None:
    server = gpu_node(24)
    tickets = [server.submit(job(), 0.1 * n) for n in range(5)]
    run(server, *tickets)

    assert len(server.loads) == 1


def test_freed_vram_is_waited_for_before_the_next_load() -> None:
    server = gpu_node(24, max_loaded_models=1, vram_recovery_s=1.5)
    server.preload(MIDDLE, 0.0)
    ticket = server.submit(job(), 0.0)
    run(server, ticket)

    assert ticket.load_s == pytest.approx(1.5 + 0.5 + 1.0)


def test_each_token_is_an_event_only_where_it_was_asked_for() -> None:
    def kinds(*, each_token: bool) -> list[str]:
        server = gpu_node(24)
        server.preload(SMALL, 0.0)
        server.submit(job(tokens=3, each_token=each_token), 0.0)
        return [event.kind for event in server.advance(60.0)]

    assert kinds(each_token=True) == ["token", "token", "token", "done"]
    assert kinds(each_token=False) == ["done"]


def test_the_times_do_not_depend_on_whether_tokens_are_watched() -> None:
    def end(*, each_token: bool) -> float:
        server = gpu_node(24, num_parallel=2)
        one = server.submit(job(tokens=40, each_token=each_token), 0.0)
        two = server.submit(job(tokens=70, each_token=each_token), 0.05)
        return run(server, one, two)

    assert end(each_token=True) == pytest.approx(end(each_token=False))


# ---------------------------------------------------------------- whatever happens

_CHOICES = (SMALL, MIDDLE, LARGE, EMBED)

_STEPS = st.lists(
    st.tuples(
        st.integers(0, 8),  # tenths of a second until the step
        st.sampled_from(["ask", "ask", "ask", "leave", "unload", "kill", "slow"]),
        st.integers(0, 3),  # which model, or which ticket
        st.sampled_from([None, 2048, 8192]),
        st.sampled_from([None, 0.0, 1.0, 300.0]),
        st.integers(0, 30),
    ),
    max_size=40,
)
_GPUS: list[tuple[Gpu, ...]] = [
    (),
    (Gpu(total_bytes=8 * GB),),
    (Gpu(total_bytes=16 * GB, used_by_others_bytes=2 * GB),),
    (Gpu(total_bytes=6 * GB), Gpu(total_bytes=12 * GB)),
]
_NODES = st.builds(
    NodeSettings,
    gpus=st.sampled_from(_GPUS),
    version=st.sampled_from(["0.32.15", "0.24.0"]),
    num_parallel=st.integers(1, 3),
    max_loaded_models=st.sampled_from([None, 1, 2]),
    max_queue=st.sampled_from([1, 3, 512]),
    ram_bytes=st.sampled_from([4 * GB, 64 * GB]),
)


def play(
    settings: NodeSettings, steps: list[Any]
) -> tuple[OllamaServer, list[Ticket], list[Event]]:
    server, now = OllamaServer(settings), 0.0
    tickets: list[Ticket] = []
    events: list[Event] = []
    for wait, what, which, num_ctx, keep_alive, tokens in steps:
        target = now + wait / 10
        while (at := server.next_event_at()) is not None and at <= target:
            events += server.advance(at)
            check(server, tickets)
        now = target
        model = _CHOICES[which]
        if what == "ask":
            kind = "embed" if model.is_embedding else "generate" if tokens else "load"
            asked = job(
                model,
                tokens,
                kind=kind,
                options=Options(num_ctx=num_ctx),
                keep_alive=keep_alive,
                each_token=tokens % 2 == 0,
            )
            tickets.append(server.submit(asked, now))
        elif what == "leave" and tickets:
            server.cancel(tickets[(which + tokens) % len(tickets)], now)
        elif what == "unload":
            server.unload(model, now)
        elif what == "kill":
            server.kill_runner(model, now)
        elif what == "slow":
            server.slow_down(1.0 + which, now)
        events += server.advance(now)
        check(server, tickets)
    while (at := server.next_event_at()) is not None:
        assert at >= now
        now = at
        events += server.advance(at)
        check(server, tickets)
    return server, tickets, events


def check(server: OllamaServer, tickets: list[Ticket]) -> None:
    settings = server.settings
    assert all(free >= 0 for free in server.free_vram()), "more VRAM than there is"
    running = server.running(-1.0)
    assert len(running) <= settings.loaded_limit
    computing: dict[str, int] = {}
    for ticket in tickets:
        if ticket.state in {"prefill", "decode"}:
            key = ticket.job.model.name
            computing[key] = computing.get(key, 0) + 1
    for name, count in computing.items():
        assert count <= (1 if name == EMBED.name else settings.num_parallel), "more than slots"
    assert sum(ticket.state == "loading" for ticket in tickets) <= 1, "two loads at once"
    assert server.in_flight >= sum(not ticket.is_over for ticket in tickets)


@given(_NODES, _STEPS)
def test_memory_slots_and_loads_keep_their_limits_and_everything_ends(
    settings: NodeSettings, steps: list[Any]
) -> None:
    server, tickets, events = play(settings, steps)

    assert all(ticket.is_over for ticket in tickets)
    assert server.in_flight == 0
    assert server.running(1e9) == []  # every keep-alive here is finite
    loads = sorted((record.started, record.ended) for record in server.loads)
    for (_, ended), (started, _) in pairwise(loads):
        assert started >= ended, "loads overlap"
    ended_events = [e.ticket.id for e in events if e.kind in {"done", "failed"} and e.ticket]
    assert len(ended_events) == len(set(ended_events))
    finished = {ticket.id for ticket in tickets if ticket.state in {"done", "failed"}}
    assert finished == set(ended_events)
    for ticket in tickets:
        if ticket.state == "done":
            assert ticket.tokens_out == ticket.job.answer_tokens or ticket.job.kind != "generate"
            assert ticket.total_s >= ticket.load_s >= 0
            assert ticket.prompt_eval_s >= 0
            assert ticket.eval_s >= 0


@given(_NODES, _STEPS)
def test_the_same_requests_give_the_same_run(settings: NodeSettings, steps: list[Any]) -> None:
    def told() -> list[tuple[Any, ...]]:
        _, _, events = play(settings, steps)
        return [(e.at, e.kind, e.model, e.ticket and e.ticket.id, e.index) for e in events]

    assert told() == told()


@given(_STEPS)
def test_a_fast_enough_node_never_refuses(steps: list[Any]) -> None:
    settings = NodeSettings(max_queue=512, ram_bytes=512 * GB)
    _, tickets, _ = play(replace(settings, load_fixed_s=0.0, load_bandwidth=1e15), steps)

    causes = {ticket.failure.cause for ticket in tickets if ticket.failure is not None}
    assert causes <= {"runner killed", "load killed"}
