"""
The simulated node against a real Ollama: every recording is played, or listed as not covered.

Compared are the status, the headers that matter, how the body ended, which fields there are in
which order and of which type, the kinds of lines in a stream and their order, and errors to the
letter. Text is compared where the recorded model's is not noise.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
import pytest

from hydra_llm.simulation.server import LoopThread
from hydra_llm.testing import Gpu, SimulatedNode, TokenFault
from tests.simulation import recorded, test_scenarios
from tests.simulation.exchange import Seen, exchange
from tests.simulation.recorded import Recording

NOT_COVERED = {
    "*-scenario-latency": "milliseconds of one machine",
    "*-scenario-determinism": "real text differs without a seed; here it never does",
    "*-scenario-hang": "a stopped runner process; `freeze` and `HangFault` stand for it",
}

EXCHANGES = [path for path in recorded.all_paths() if not recorded.is_scenario(path)]

SLOW = {"count-slow", "count-big"}
# Random weights: what they say, and with `format` where they stop, is chance.
NOISE = re.compile(r"rand-|prefill-chat-empty-assistant|prefill-count-fast-jinja")


@pytest.fixture(scope="module")
def thread() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


def node_for(recording: Recording) -> SimulatedNode:
    env = recording.env
    gpus = []
    if "SIMGPU_TOTAL_MIB" in env:
        gpus = [Gpu(total_bytes=int(env["SIMGPU_TOTAL_MIB"]) * 1024**2)]
    settings: dict[str, Any] = {}
    if recording.name in _SLOW_LOAD:
        settings["load_fixed_s"] = 1e6
    elif recording.name in _SLOW_PROMPT:
        settings["prefill_ratio"] = 1e-6
    return SimulatedNode(
        "recorded",
        models=recorded.models(recording.version),
        gpus=gpus,
        ram_gb=24.4,
        version=recording.version,
        num_parallel=int(env.get("OLLAMA_NUM_PARALLEL", 1)),
        max_queue=int(env.get("OLLAMA_MAX_QUEUE", 512)),
        max_loaded_models=int(env["OLLAMA_MAX_LOADED_MODELS"])
        if "OLLAMA_MAX_LOADED_MODELS" in env
        else None,
        go_template=env.get("OLLAMA_GO_TEMPLATE") != "0",
        speed=500.0,
        **settings,
    )


# ---------------------------------------------------------------- the state before, the hand in it

_SLOW_LOAD = {"runner-sigkill-while-loading", "server-sigkill-while-loading"}
_SLOW_PROMPT = {
    "runner-sigkill-before-first-token",
    "runner-sigkill-nonstream",
    "server-sigkill-nonstream",
    "server-sigterm-nonstream",
    "err-queue-full-chat",
    "err-queue-full-embed",
    "err-queue-full-generate",
    "err-queue-full-v1",
}


def preload(*models: tuple[str, int | None, float | None]) -> Callable[[SimulatedNode], None]:
    def load(node: SimulatedNode) -> None:
        for name, num_ctx, keep_alive in models:
            node.preload(name, num_ctx=num_ctx, keep_alive=keep_alive)
            time.sleep(0.002)

    return load


def unloaded(node: SimulatedNode) -> None:
    preload(("rand-mid", 2048, None), ("rand-tiny", None, None))(node)
    httpx.post(f"{node.url}/api/generate", json={"model": "rand-tiny", "keep_alive": 0})


def out_of_memory(node: SimulatedNode) -> None:
    body = {"model": "rand-hugectx", "options": {"num_ctx": 8388608}}
    assert httpx.post(f"{node.url}/api/generate", json=body).status_code == 500


def shut_down(node: SimulatedNode) -> None:
    node.kill()


BEFORE: dict[str, Callable[[SimulatedNode], None]] = {
    "ps-one": preload(("rand-tiny", None, None)),
    "ps-two": preload(("rand-mid", 2048, None), ("rand-tiny", None, 1800.0)),
    "ps-keep-forever": preload(("rand-mid", 2048, None), ("rand-tiny", None, -1.0)),
    "ps-num_ctx-above-train": preload(
        ("count-fast-jinja", None, None), ("rand-embed", None, None), ("rand-tiny", 1000000, None)
    ),
    "ps-after-unload": unloaded,
    "ps-after-memory-error": out_of_memory,
    "simgpu-ps": preload(
        ("count-fast", None, None), ("rand-mid", None, None), ("count-slow", None, None)
    ),
    "generate-load-warm": preload(("rand-tiny", None, None)),
    "err-memory-with-others-loaded": preload(
        ("script-plain", None, None), ("count-fast", None, None)
    ),
    "server-down": shut_down,
    "runner-sigkill-before-first-token": preload(("count-slow", None, None)),
    "runner-sigkill-nonstream": preload(("count-slow", None, None)),
}


def while_waiting(hand: Callable[[SimulatedNode], object]) -> Callable[[SimulatedNode], None]:
    """Do something to the node once it has the request and has not answered."""

    def wait(node: SimulatedNode) -> None:
        deadline = time.monotonic() + 5.0
        while not node.in_flight and time.monotonic() < deadline:
            time.sleep(0.001)
        hand(node)

    return wait


DURING: dict[str, Callable[[SimulatedNode], None]] = {
    "runner-sigkill-before-first-token": while_waiting(lambda node: node.kill_runner("count-slow")),
    "runner-sigkill-nonstream": while_waiting(lambda node: node.kill_runner("count-slow")),
    "runner-sigkill-while-loading": while_waiting(lambda node: node.kill_runner("count-big")),
    "server-sigkill-nonstream": while_waiting(SimulatedNode.kill),
    "server-sigterm-nonstream": while_waiting(SimulatedNode.kill),
    "server-sigkill-while-loading": while_waiting(SimulatedNode.kill),
}


def at_token(recording: Recording) -> TokenFault | None:
    """What happens to the node in mid-stream: after as many lines as were recorded."""
    lines = len(recording.lines)
    if fnmatch(recording.name, "server-sig*midstream"):
        return TokenFault(after=lines, action=SimulatedNode.kill)
    if fnmatch(recording.name, "*runner-sigkill-*midstream"):
        return TokenFault(after=lines - 1, action=lambda node: node.kill_runner("count-slow"))
    return None


def fill_queue(node: SimulatedNode, stack: ExitStack) -> None:
    """One request at work, one waiting for its place, one more in the queue."""
    for position, model in enumerate(("count-slow", "count-fast", "script-plain"), 1):
        client = httpx.Client(timeout=30)

        def ask(client: httpx.Client = client, model: str = model) -> None:
            body = {"model": model, "prompt": "Hello"}
            with pytest.raises(httpx.HTTPError):
                client.post(f"{node.url}/api/generate", json=body)

        worker = threading.Thread(target=ask)
        worker.start()
        stack.callback(worker.join)
        stack.callback(client.close)
        while node.in_flight < position or (position == 1 and not node.loaded):
            time.sleep(0.001)
    stack.callback(node.kill)


# ---------------------------------------------------------------- comparing


def shape(value: Any, where: str = "") -> Any:
    """The fields of a value, in order, and their types; of a list, each kind of element once."""
    if isinstance(value, dict):
        if where in {".model_info", ".details.model_info"}:
            return [(key, shape(part)) for key, part in sorted(value.items())]
        return [(key, shape(part, f"{where}.{key}")) for key, part in value.items()]
    if isinstance(value, list):
        kinds = [shape(part) for part in value]
        return ["list", *([kinds[0]] if kinds and all(k == kinds[0] for k in kinds) else kinds)]
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return type(value).__name__
    return "number"


def without_numbers(text: str) -> str:
    """An error text without the figures that are this machine's or this tokenizer's."""
    text = re.sub(r"(available \()[\d.]+", r"\1#", text)
    return re.sub(r"(request \(|n_prompt_tokens\D+)\d+", r"\1#", text)


def document_of(line: str) -> Any:
    text = line.removeprefix("data: ")
    return text if text == "[DONE]" else json.loads(text)


def text_of(document: Any) -> str:
    """All that a line, or an answer, lets be seen of the model's words."""
    if not isinstance(document, dict):
        return ""
    choice = (document.get("choices") or [{}])[0]
    message = document.get("message") or choice.get("delta") or choice.get("message") or {}
    calls = [call["function"]["arguments"] for call in message.get("tool_calls", ())]
    parts = (
        message.get("thinking"), message.get("reasoning"), message.get("content"),
        document.get("thinking"), document.get("response"), choice.get("text"), *calls,
    )  # fmt: skip
    return "|".join(part if isinstance(part, str) else json.dumps(part) for part in parts if part)


def assert_same_body(recording: Recording, seen: Seen) -> None:
    expected = recording.response.get("body")
    if isinstance(expected, str):
        assert seen.body.decode() == expected
        return
    actual = json.loads(seen.body)
    assert isinstance(expected, dict)
    if "error" in expected:
        expected_text, actual_text = json.dumps(expected), json.dumps(actual)
        assert without_numbers(actual_text) == without_numbers(expected_text)
        return
    for listed in ("embeddings", "embedding", "context", "tensors"):
        for document in (expected, actual):
            if document.get(listed):
                document[listed] = document[listed][:1]
    assert shape(actual) == shape(expected)
    for exact in ("done", "done_reason", "version", "capabilities", "object", "model"):
        if exact not in expected or is_chance(recording, exact):
            continue
        assert actual[exact] == expected[exact]
    if not is_noise(recording):
        assert text_of(actual) == text_of(expected)


def is_noise(recording: Recording) -> bool:
    body = recording.request.get("body")
    model = body.get("model", "") if isinstance(body, dict) else ""
    return NOISE.match(model) is not None or NOISE.search(recording.name) is not None


def is_chance(recording: Recording, field: str) -> bool:
    return field == "done_reason" and "format" in recording.name and is_noise(recording)


def assert_same_stream(recording: Recording, seen: Seen) -> None:
    expected = [document_of(line) for line in recording.lines]
    actual = [document_of(line) for line in seen.lines]
    expected_kinds, actual_kinds = [shape(one) for one in expected], [shape(one) for one in actual]
    if is_noise(recording):
        # One line a token, as many as it happens to be.
        expected_kinds = [kind for kind, _ in groupby(expected_kinds)]
        actual_kinds = [kind for kind, _ in groupby(actual_kinds)]
    else:
        assert [text_of(one) for one in actual] == [text_of(one) for one in expected]
    assert actual_kinds == expected_kinds
    for one, other in zip(actual[-1:], expected[-1:], strict=True):
        if isinstance(other, dict):
            assert one.get("error") == other.get("error")
            assert one.get("done") == other.get("done")
            if not is_chance(recording, "done_reason"):
                assert one.get("done_reason") == other.get("done_reason")
    reasons = [
        [choice["finish_reason"] for choice in one.get("choices", ())]
        for one in expected
        if isinstance(one, dict)
    ]
    assert (
        reasons[-1:]
        == [
            [choice["finish_reason"] for choice in one.get("choices", ())]
            for one in actual
            if isinstance(one, dict)
        ][-1:]
    )


@pytest.mark.parametrize("path", EXCHANGES, ids=lambda path: path.stem)
def test_the_simulated_node_answers_as_the_recorded_server(path: Path, thread: LoopThread) -> None:
    recording = recorded.read(path)
    expected = recording.response
    with ExitStack() as stack:
        node = node_for(recording)
        node.start(thread)
        stack.callback(node.stop)
        BEFORE.get(recording.name, lambda node: None)(node)
        if fault := at_token(recording):
            node.inject(fault)
        if recording.name.startswith("err-queue-full"):
            fill_queue(node, stack)
        if recording.name == "server-down":
            with pytest.raises(ConnectionRefusedError):
                play(recording, node)
            return
        seen = play(recording, node)

    assert seen.status == expected.get("status")
    if recording.request["method"] != "HEAD":
        assert seen.end == expected["body_end"]
    if seen.status is None:
        return
    headers = {name.lower(): value for name, value in expected["headers"].items()}
    for name in ("content-type", "allow", "transfer-encoding"):
        assert seen.headers.get(name) == headers.get(name)
    assert ("content-length" in seen.headers) == ("content-length" in headers)
    if "chunks" in expected:
        assert_same_stream(recording, seen)
    elif recording.request["method"] != "HEAD":
        assert_same_body(recording, seen)


def play(recording: Recording, node: SimulatedNode) -> Seen:
    headers = dict(recording.request["headers"])
    if headers.get("Host", "").startswith("127.0.0.1"):
        headers["Host"] = f"127.0.0.1:{node.port}"
    body = recording.body
    if "Content-Length" in headers:
        headers["Content-Length"] = str(len(body))
    hand = DURING.get(recording.name)
    return exchange(
        node.host,
        node.port,
        recording.request["method"],
        recording.request["path"],
        headers=headers,
        body=body,
        leave_after=5 if recording.name.startswith("client-disconnect") else None,
        sent=(lambda: hand(node)) if hand else lambda: None,
    )


# ---------------------------------------------------------------- ps in figures


@pytest.mark.parametrize(
    "path", [path for path in EXCHANGES if "-ps-" in path.name], ids=lambda path: path.stem
)
def test_ps_shows_the_recorded_contexts_and_about_the_recorded_sizes(
    path: Path, thread: LoopThread
) -> None:
    recording = recorded.read(path)
    node = node_for(recording)
    node.start(thread)
    try:
        BEFORE.get(recording.name, lambda node: None)(node)
        seen = json.loads(play(recording, node).body)["models"]
    finally:
        node.stop()

    expected = recording.response["body"]["models"]
    assert [one["name"] for one in seen] == [one["name"] for one in expected]
    for one, other in zip(seen, expected, strict=True):
        assert one["digest"] == other["digest"]
        assert one["context_length"] == other["context_length"]
        if other["size"] > 100_000_000:  # of tiny models the graph is more than the weights
            assert one["size"] == pytest.approx(other["size"], rel=0.1)
        if other["size_vram"] in {0, other["size"]}:
            assert one["size_vram"] == (one["size"] if other["size_vram"] else 0)


# ---------------------------------------------------------------- all of them


def test_every_recording_is_played_or_listed_as_not_covered() -> None:
    played = {path.stem for path in EXCHANGES}
    played |= {f"v{version}-scenario-{name}" for version, name in test_scenarios.PLAYED}
    for path in recorded.all_paths():
        listed = [pattern for pattern in NOT_COVERED if fnmatch(path.stem, pattern)]
        assert (path.stem in played) != bool(listed), path.stem


def test_nothing_is_listed_as_not_covered_that_was_not_recorded() -> None:
    stems = [path.stem for path in recorded.all_paths()]
    for pattern in NOT_COVERED:
        assert any(fnmatch(stem, pattern) for stem in stems), pattern
