"""
The recorded experiments with several requests, played on the pure model with a virtual clock.

What is compared is the order of events and the outcome, never milliseconds.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import httpx
import pytest

from hydra_llm.simulation.api import OllamaApi
from hydra_llm.simulation.catalog import MIB, SimulatedModel
from hydra_llm.simulation.model import OllamaServer
from hydra_llm.simulation.records import Job, Options, Ticket
from hydra_llm.simulation.settings import Gpu, NodeSettings
from hydra_llm.simulation.wire import Reply
from hydra_llm.testing import SimulatedNode, TokenFault
from tests.simulation import recorded

Scenario = Callable[[str, Any], None]

BOTH = ("0.24.0", "0.32.15")
MODERN = ("0.32.15",)
PLAYED: dict[tuple[str, str], Scenario] = {}


def plays(*names: str, on: tuple[str, ...] = BOTH) -> Callable[[Scenario], Scenario]:
    """Enter a function as the player of these recordings."""

    def enter(function: Scenario) -> Scenario:
        PLAYED.update({(version, name): function for version in on for name in names})
        return function

    return enter


@dataclass
class Node:
    """The model of a recorded server, with the models it had."""

    server: OllamaServer
    models: dict[str, SimulatedModel]
    now: float = 0.0

    def ask(
        self,
        model: str,
        tokens: int = 1,
        *,
        prompt: str = "Hello",
        keep_alive: float | None = None,
        **options: Any,
    ) -> Ticket:
        job = Job(
            model=self.models[model],
            prompt=tuple((word, 1) for word in prompt.split()),
            answer_tokens=tokens,
            options=Options(**options),
            keep_alive=keep_alive,
        )
        return self.server.submit(job, self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.server.advance(self.now)

    def finish(self, *tickets: Ticket) -> None:
        """Let time pass until these are over, and no longer."""
        while not all(ticket.is_over for ticket in tickets):
            at = self.server.next_event_at()
            assert at is not None, "nothing will happen any more"
            self.now = at
            self.server.advance(at)

    def done(self, model: str, **how: Any) -> Ticket:
        ticket = self.ask(model, **how)
        self.finish(ticket)
        return ticket

    def ps(self) -> list[str]:
        return [runner.model.parsed.short for runner in self.server.running(self.now)]

    def loads(self) -> int:
        return len(self.server.loads)


def node(version: str, **settings: Any) -> Node:
    models = {model.name: model for model in recorded.models(version)}
    # The recordings ran on two slow cores, where a token of these models took tens of ms.
    base = NodeSettings(version=version, load_fixed_s=0.25, cpu_bandwidth=5e9)
    return Node(OllamaServer(replace(base, **settings)), models)


# ---------------------------------------------------------------- reloads


_OPTIONS: dict[str, dict[str, Any]] = {
    "first request, no num_ctx": {}, "again, no num_ctx": {}, "no num_ctx": {},
    "num_ctx 4096": {"num_ctx": 4096}, "num_ctx 2048": {"num_ctx": 2048},
    "num_ctx 8192": {"num_ctx": 8192}, "num_ctx 100000": {"num_ctx": 100000},
    "num_batch 128": {"num_batch": 128}, "num_thread 1": {"num_thread": 1},
    "num_gpu 0": {"num_gpu": 0}, "num_gpu 99": {"num_gpu": 99}, "main_gpu 0": {"main_gpu": 0},
    "use_mmap false": {"use_mmap": False}, "use_mmap true": {"use_mmap": True},
    "shift false": {"no_shift": True},
}  # fmt: skip


@plays("reload-triggers")
def the_same_options_restart_the_runner(version: str, scenario: Any) -> None:
    here = node(version)
    for step in scenario:
        if "request" not in step or "reloaded" not in step:
            continue
        model, _, what = step["request"].partition(": ")
        options = next((o for start, o in _OPTIONS.items() if what.startswith(start)), {})
        if what.startswith("other model name"):
            model = "count-fast-newturn"
        before = here.loads()
        here.done(model, **options)
        assert (here.loads() > before) == step["reloaded"], step["request"]
        if step["context_length"] is not None:
            assert here.server.running(here.now)[0].context_length == step["context_length"]


@plays("num_ctx-ping-pong")
def two_contexts_make_every_request_a_reload(version: str, scenario: Any) -> None:
    here = node(version)
    here.done("count-slow", num_ctx=scenario[0]["num_ctx"])
    for step in scenario[1:]:
        ticket = here.done("count-slow", num_ctx=step["num_ctx"])
        assert ticket.load_s > 0.25
        assert step["load_duration_ms"] > 250


def _blocked(version: str) -> tuple[Node, Ticket]:
    here = node(version)
    here.done("count-fast")
    here.done("count-slow", num_ctx=2048)
    return here, here.ask("count-slow", 100, num_ctx=2048)


@plays("reload-while-busy")
def a_reload_waits_for_the_busy_runner_and_blocks_other_loads(version: str, scenario: Any) -> None:
    here, a = _blocked(version)
    here.wait(0.1)
    b = here.ask("count-slow", 5, num_ctx=4096)
    here.wait(0.1)
    c = here.ask("script-plain", 5)
    d = here.ask("count-fast", 5)
    here.wait(0.1)
    shown = scenario["ps_while_B_and_C_wait"]["body"]["models"]
    assert sorted(here.ps()) == sorted(one["name"] for one in shown)
    here.finish(a, b, c, d)

    first = {key[0]: step["first_line_at_ms"] for key, step in scenario.items() if key[1] == " "}
    a_end = next(step["end_at_ms"] for key, step in scenario.items() if key[0] == "A")
    assert first["D"] < a_end < min(first["B"], first["C"])
    assert a.ended_at is not None
    assert d.ended_at is not None
    assert b.handed_at is not None
    assert c.handed_at is not None
    assert d.ended_at < a.ended_at < b.handed_at < c.handed_at


@plays("waiting-reload-client-left")
def a_client_that_left_a_waiting_reload_leaves_its_mark(version: str, scenario: Any) -> None:
    here, a = _blocked(version)
    here.wait(0.1)
    b = here.ask("count-slow", 5, num_ctx=4096)
    here.wait(0.1)
    here.server.cancel(b, here.now)
    c = here.ask("script-plain")
    here.finish(a, c)

    assert scenario["C_first_line_ms"] > scenario["A_streams_num_ctx_2048_until_ms"]
    assert a.ended_at is not None
    assert c.handed_at is not None
    assert c.handed_at > a.ended_at
    assert "count-slow:latest" not in here.ps()
    assert ["script-plain:latest", 4096] in scenario["ps_afterwards"]


# ---------------------------------------------------------------- eviction


@plays("evict-max-1", "evict-max-2", "evict-max-default")
def idle_models_go_in_the_recorded_order(version: str, scenario: Any) -> None:
    most = {len(step["ps_after"]) for step in scenario}
    here = node(version, max_loaded_models=max(most))
    # The order between equal keep-alives is that of the file's path: take the recorded one.
    here.models |= _with_paths(here.models, scenario)
    keep = {None: None, -1: -1.0, "5m": 300.0, "10m": 600.0, "30m": 1800.0}
    for step in scenario:
        here.wait(1.0)
        here.done(step["load"], keep_alive=keep[step["keep_alive"]])
        assert set(here.ps()) == {name for name, _ in step["ps_after"]}, step["load"]


def _with_paths(models: dict[str, SimulatedModel], scenario: Any) -> dict[str, SimulatedModel]:
    """Name the files so that the model that was really evicted first comes first."""
    order: list[str] = []
    shown: set[str] = set()
    for step in scenario:
        now = {name.removesuffix(":latest") for name, _ in step["ps_after"]}
        order += sorted(shown - now)
        shown = now
    order += sorted(shown - set(order))
    return {name: replace(models[name], weights=f"{place:064}") for place, name in enumerate(order)}


@plays("evict-busy")
def a_busy_runner_is_never_ended_for_another_model(version: str, scenario: Any) -> None:
    here = node(version, max_loaded_models=1)
    here.done("count-slow")
    a = here.ask("count-slow", 100)
    here.wait(0.1)
    b = here.ask("count-fast")
    here.wait(0.1)
    c = here.ask("count-slow")
    assert here.ps() == ["count-slow:latest"]
    here.finish(a, b, c)

    (_, a_seen), (_, b_seen), (_, c_seen) = list(scenario.items())[:3]
    assert a_seen["end_at_ms"] < c_seen["first_line_at_ms"] < b_seen["first_line_at_ms"]
    assert a.ended_at is not None
    assert c.ended_at is not None
    assert b.handed_at is not None
    assert a.ended_at <= c.ended_at < b.handed_at


@plays("oom-evicts-others")
def a_request_that_can_never_fit_evicts_the_others_first(version: str, scenario: Any) -> None:
    here = node(version, ram_bytes=24_400_000_000)
    here.done("count-fast")
    here.done("script-plain")
    ticket = here.done("rand-hugectx", num_ctx=8388608)
    assert ticket.failure is not None
    assert ticket.failure.status == scenario[1]["status"]
    if version == "0.32.15":
        assert ticket.failure.text == scenario[1]["error"]
    assert here.ps() == scenario[1]["ps"] == []
    assert here.done("rand-hugectx", num_ctx=2048).state == "done"


@plays("two-names-one-weights-file")
def two_names_of_one_file_share_a_runner(version: str, scenario: Any) -> None:
    here = node(version)
    for step in scenario[:2]:
        here.done(step["request_model"])
        assert here.ps() == [name for name, _ in step["ps"]]
    assert here.loads() == 1
    here.server.unload(here.models["count-fast-newturn"], here.now)
    assert here.ps() == scenario[2]["ps"] == []


# ---------------------------------------------------------------- a made-up GPU


@plays("simgpu-450MiB", "simgpu-900MiB", "simgpu-1600MiB", on=MODERN)
def what_fits_on_the_gpu_is_what_fitted(version: str, scenario: Any) -> None:
    total = {2: 900, 3: 450, 5: 1600}[len(scenario["loads"])] * MIB
    here = node(version, gpus=(Gpu(total_bytes=total),))
    here.models |= {
        # By path count-big comes before the others, as its eviction shows.
        "count-big": replace(here.models["count-big"], weights=f"{0:064}"),
    }
    for step in scenario["loads"]:
        here.done(step["load"])
        seen = {r.model.parsed.short: r for r in here.server.running(here.now)}
        assert set(seen) == {one["name"] for one in step["ps_after"]}, step["load"]
        for one in step["ps_after"]:
            runner = seen[one["name"]]
            whole = one["size_vram"] == one["size"]
            assert (runner.size_vram == runner.size) == whole, one["name"]
            if not whole:
                share = one["size_vram"] / one["size"]
                assert runner.size_vram / runner.size == pytest.approx(share, abs=0.08)
        assert here.server.vram_used_bytes <= total


@plays("simgpu-options", on=MODERN)
def options_move_a_model_off_the_gpu_as_recorded(version: str, scenario: Any) -> None:
    here = node(version, gpus=(Gpu(total_bytes=1600 * MIB),))
    for step in scenario:
        here.done("count-slow", **step["options"])
        runner, one = here.server.running(here.now)[0], step["ps"][0]
        assert runner.context_length == one["context_length"]
        share = one["size_vram"] / one["size"]
        assert runner.size_vram / runner.size == pytest.approx(share, abs=0.01)


# ---------------------------------------------------------------- queue and slots


@plays("queue-full")
def only_requests_that_need_a_load_find_the_queue_full(version: str, scenario: Any) -> None:
    here = node(version, max_queue=1, max_loaded_models=1)
    here.done("count-slow")
    same = [here.ask("count-slow", 10) for _ in range(4)]
    others = []
    for step in scenario["other_models_while_the_only_place_is_busy"][:-1]:
        here.wait(0.01)
        others.append(here.ask(step["model"].split()[-1]))
    again = here.ask("count-slow")
    here.finish(*same, *others, again)

    for ticket, step in zip(
        [*others, again], scenario["other_models_while_the_only_place_is_busy"], strict=True
    ):
        status = 200 if ticket.failure is None else ticket.failure.status
        assert status == step["status"], step["model"]
    assert all(step["status"] == 200 for step in scenario["same_loaded_model_4_at_once"])
    assert [ticket.state for ticket in same] == ["done"] * 4


@plays("parallel")
def slots_serve_one_or_two_at_a_time_and_a_herd_makes_one_load(version: str, scenario: Any) -> None:
    sizes = {}
    for slots in (1, 2):
        here = node(version, num_parallel=slots)
        here.done("count-slow")
        first, second = here.ask("count-slow", 15), here.ask("count-slow", 15, prompt="Bye")
        here.finish(first, second)
        seen = scenario[f"OLLAMA_NUM_PARALLEL={slots}"]
        after_the_first = (
            seen["second (sent at 200 ms)"]["first_line_at_ms"] + 200 > (seen["first"]["end_at_ms"])
        )
        assert second.started_at is not None
        assert first.ended_at is not None
        assert (second.started_at >= first.ended_at) == after_the_first
        # Waiting for a slot is in no duration but the total.
        assert second.load_s == pytest.approx(0.0)
        runner = here.server.running(here.now)[0]
        assert runner.context_length == seen["ps_context_length"]
        sizes[slots] = (runner.size, seen["ps_size"])
    assert sizes[2][0] - sizes[1][0] == pytest.approx(50_331_648)  # the KV cache of one slot
    assert sizes[2][1] > sizes[1][1]

    herd = node(version)
    tickets = [herd.ask("script-plain") for _ in range(5)]
    herd.finish(*tickets)
    assert herd.loads() == 1
    # Five loads one after the other would differ by more; 0.24.0 counted a second process.
    loads = [step["load_duration_ms"] for step in scenario["five_first_requests_at_once_one_model"]]
    assert max(loads) < 1.5 * min(loads)
    three = [herd.ask(step["model"]) for step in scenario["three_different_models_at_once"]]
    herd.finish(*three)
    # One after the other: each waits at least a whole load longer than the one before.
    ends = sorted(step["load_duration_ms"] for step in scenario["three_different_models_at_once"])
    assert all(later - earlier > 200 for earlier, later in pairwise(ends))
    assert all(later.load_s - earlier.load_s > 0.2 for earlier, later in pairwise(three))


@plays("client-disconnect")
def a_client_that_leaves_frees_its_slot_or_ends_its_load(version: str, scenario: Any) -> None:
    here = node(version)
    here.done("count-slow")
    running, waiting = here.ask("count-slow", 1000), here.ask("count-slow", 5)
    here.wait(0.5)
    here.server.cancel(running, here.now)
    here.finish(waiting)
    assert waiting.started_at == pytest.approx(0.5, abs=5)

    fresh = node(version)
    loading = fresh.ask("count-big")
    fresh.wait(0.1)
    fresh.server.cancel(loading, fresh.now)
    fresh.wait(5)
    left = scenario["client_left_during_load"]
    assert fresh.ps() == left["ps_after"] == []
    assert fresh.server.in_flight == 0


# ---------------------------------------------------------------- time


@plays("ps-during-load")
def ps_lists_a_model_only_when_it_is_ready(version: str, scenario: Any) -> None:
    here = node(version)
    ticket = here.ask("count-big")
    here.wait(0.2)
    assert here.ps() == [] == scenario[0]["ps_changes"][0]["ps"]
    here.finish(ticket)
    assert here.ps() == [one["name"] for one in scenario[0]["ps_changes"][-1]["ps"]]


@plays("prompt-cache")
def only_what_is_not_cached_costs_time(version: str, scenario: Any) -> None:
    here = node(version)
    here.done("count-slow", prompt="warm up")
    long = " ".join(f"w{n}" for n in range(496))
    prompts = [long, long, f"{long} and more", f"other first {long}",
               f"other first {long} turn two", "short", long]  # fmt: skip
    seen = [here.done("count-slow", prompt=prompt) for prompt in prompts]
    whole = seen[0].prompt_eval_s
    measured = scenario[0]["prompt_eval_duration"]
    for ticket, step in zip(seen[1:], scenario[1:], strict=True):
        was_cheap = step["prompt_eval_duration"] < measured / 4
        if step["prompt_eval_count"] > 100:
            assert (ticket.prompt_eval_s < whole / 4) == was_cheap, step["request"]
        assert ticket.job.prompt_tokens == len(prompts[seen.index(ticket)].split())


@plays("keep-alive")
def keep_alive_is_sticky_and_a_generation_outlives_it(version: str, scenario: Any) -> None:
    here = node(version)

    def left() -> float | None:
        (runner,) = here.server.running(here.now)
        return None if runner.expires_at is None else runner.expires_at - here.now

    here.done("count-fast", keep_alive=2.0)
    assert left() == pytest.approx(2.0)
    here.wait(2.0)
    assert here.ps() == []
    here.done("count-fast", keep_alive=1800.0)
    here.wait(10.0)
    here.done("count-fast")  # sticky: what was set stays
    assert left() == pytest.approx(1800.0)
    here.done("count-fast", keep_alive=-1.0)
    assert left() is None
    assert any(str(step.get("expires_at", "")).startswith("2319") for step in scenario)
    here.done("count-fast", keep_alive=60.0)
    assert left() == pytest.approx(60.0)
    here.done("count-fast", keep_alive=0.0)
    assert here.ps() == []
    here.done("count-slow", keep_alive=1.0)
    busy = here.ask("count-slow", 200)
    here.wait(2.5)
    past = left()
    assert past is not None
    assert past < 0
    assert here.ps() == ["count-slow:latest"]
    here.server.unload(here.models["count-slow"], here.now)
    assert here.ps() == scenario[-1]["ps_right_after"]
    here.finish(busy)
    assert busy.state == "done"
    assert here.ps() == scenario[-1]["ps_after_stream"] == []


@plays("runner-killed")
def a_dead_runner_is_listed_until_the_next_request(version: str, scenario: Any) -> None:
    here = node(version)
    here.done("count-slow")
    here.server.kill_runner(here.models["count-slow"], here.now)
    assert here.ps() == scenario["ps_right_after"]
    again = here.done("count-slow")
    assert again.state == "done"
    assert again.load_s > 0
    assert here.loads() == 2

    loading = here.ask("count-big")
    here.wait(0.1)
    here.server.kill_runner(here.models["count-big"], here.now)
    assert loading.state == "failed"
    assert "count-big:latest" not in here.ps()
    assert scenario["ps_after_load_kill"] == []


# ---------------------------------------------------------------- through the endpoints


def api(version: str) -> OllamaApi:
    models = {model.parsed.key: model for model in recorded.models(version)}
    return OllamaApi(OllamaServer(NodeSettings(version=version)), models, wall_at=lambda at: at)


@plays("model-name-forms")
def all_spellings_of_a_name_are_one_model(version: str, scenario: Any) -> None:
    here = api(version)
    copy = {"source": "count-fast", "destination": "ns/alias:v1"}
    here.handle("POST", "/api/copy", json.dumps(copy).encode(), 0.0)
    now = 0.0
    for step in scenario:
        if "requested" not in step:
            continue
        now += 100.0
        body = {"model": step["requested"]}
        answer = here.handle("POST", "/api/generate", json.dumps(body).encode(), now)
        if not isinstance(answer, Reply):
            here.server.advance(now + 50.0)
            finished = answer.finish()
            assert isinstance(finished, Reply)
            answer = finished
        assert answer.status == step["status"]
        seen = json.loads(answer.body)
        assert seen.get("error") == step["error"]
        assert seen.get("model") == step["model_in_answer"]
        assert [r.model.parsed.short for r in here.server.running(now + 50)] == step["ps"]


@plays("resume-on-second-node")
def a_broken_answer_goes_on_elsewhere_where_the_template_lets_it(
    version: str, scenario: Any
) -> None:
    here = api(version)

    def text(request: dict[str, Any]) -> str:
        body = json.dumps({**request, "stream": False}).encode()
        answer = here.handle("POST", "/api/chat", body, 0.0)
        assert not isinstance(answer, Reply)
        here.server.advance(1e6)
        finished = answer.finish()
        assert isinstance(finished, Reply)
        return str(json.loads(finished.body)["message"]["content"])

    before = scenario["text_received_from_A"]
    rest = text(scenario["request_to_B"])
    assert text(scenario["request_to_A"]) == before + rest


# ---------------------------------------------------------------- over sockets


@plays("client-libraries", on=MODERN)
def clients_see_a_broken_stream_as_they_saw_the_real_one(version: str, scenario: Any) -> None:
    readers = {"httpx 0.28.1": _read_with_httpx, "http.client": _read_with_the_standard_library}
    kill_runner = TokenFault(after=3, action=lambda node: node.kill_runner("count-fast"))
    faults = {"server SIGKILL": TokenFault(after=3), "runner SIGKILL": kill_runner}
    played = 0
    for step in scenario:
        read = readers.get(step["client"])
        if read is None:
            continue
        fault = next(fault for event, fault in faults.items() if step["event"].startswith(event))
        with SimulatedNode(models=recorded.models(version), vram_gb=None, speed=100.0) as node:
            node.preload("count-fast")
            node.inject(fault)
            lines, error = read(node)
        assert lines == step["lines_seen"], step
        result = step["result"]
        expected = "" if isinstance(result, str) else result[0].partition(":")[0]
        assert error == expected, step
        played += 1
    assert played == 4


_COUNT = {"model": "count-fast", "messages": [{"role": "user", "content": "Hello"}]}


def _read_with_httpx(node: SimulatedNode) -> tuple[int, str]:
    lines = 0
    try:
        with httpx.stream("POST", f"{node.url}/api/chat", json=_COUNT) as answer:
            for _ in answer.iter_lines():
                lines += 1
    except httpx.HTTPError as exc:
        return lines, f"httpx.{type(exc).__name__}"
    return lines, ""


def _read_with_the_standard_library(node: SimulatedNode) -> tuple[int, str]:
    connection = http.client.HTTPConnection(node.host, node.port, timeout=10)
    try:
        connection.request("POST", "/api/chat", json.dumps(_COUNT))
        return len(list(iter(connection.getresponse().readline, b""))), ""
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("version", "name"), sorted(PLAYED), ids=lambda part: str(part).replace("0.", "v0.")
)
def test_the_model_does_what_the_recorded_server_did(version: str, name: str) -> None:
    PLAYED[version, name](version, recorded.scenario(version, name))
