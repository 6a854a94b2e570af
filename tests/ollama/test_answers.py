"""An answer passes by: where it ends, whether it failed, what it says of itself."""

from __future__ import annotations

import json
import time
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.ollama import answers
from hydra_llm.ollama.answers import AnswerReader, error_text, is_answer, read_whole, usage_of
from hydra_llm.ollama.calls import Framing
from hydra_llm.types import Usage

RECORDINGS = Path(__file__).parents[1] / "recordings"
VERSIONS = ("0.24.0", "0.32.15")


def compact(document: Any) -> bytes:
    """JSON as Go writes it."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def token(text: str, **more: Any) -> bytes:
    return compact({"message": {"role": "assistant", "content": text, **more}, "done": False})


DONE = compact({"message": {"role": "assistant", "content": ""}, "done": True, "eval_count": 3})


def ndjson(*lines: bytes) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def sse(*payloads: bytes) -> bytes:
    return b"".join(b"data: " + payload + b"\n\n" for payload in payloads)


def fed(framing: Framing, *chunks: bytes, ended: bool = True) -> AnswerReader:
    reader = AnswerReader(framing)
    for chunk in chunks:
        reader.feed(chunk)
    if ended:
        reader.end()
    return reader


def facts(reader: AnswerReader) -> tuple[Any, ...]:
    return (reader.parts, reader.is_complete, reader.error, reader.usage, reader.is_too_long)


# --------------------------------------------------------------------- recordings


def streams() -> list[Path]:
    paths = sorted(RECORDINGS.glob("v*.json"))
    return [path for path in paths if '"chunks"' in path.read_text()]


def recorded_bytes(path: Path) -> tuple[Framing, bytes]:
    response = json.loads(path.read_text())["response"]
    is_sse = "event-stream" in response["headers"]["Content-Type"]
    end = "\n\n" if is_sse else "\n"
    body = "".join(chunk["line"] + end for chunk in response["chunks"]).encode()
    return (Framing.SSE if is_sse else Framing.NDJSON), body


STREAMS = [path for path in streams() if "-scenario-" not in path.name]

BROKEN_STREAMS = {
    "client-disconnect-midstream",
    "runner-sigkill-generate-midstream",
    "runner-sigkill-midstream",
    "runner-sigkill-v1-midstream",
    "native-runner-sigkill-midstream",
    "server-sigkill-midstream",
    "server-sigkill-v1-midstream",
    "server-sigterm-midstream",
    "token-repeat-abort-generate",
    "token-repeat-abort-stream",
    "token-repeat-abort-v1-stream",
}


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.stem)
def test_every_recorded_stream_is_complete_unless_it_was_broken(path: Path) -> None:
    framing, body = recorded_bytes(path)
    name = path.stem.partition("-")[2]

    reader = fed(framing, body)

    assert reader.is_complete is (name not in BROKEN_STREAMS)
    has_error_line = "runner-sigkill" in name and framing is Framing.NDJSON
    assert (reader.error is not None) is has_error_line
    assert reader.parts == len([line for line in body.splitlines() if line.strip()])


@pytest.mark.parametrize("version", VERSIONS)
def test_the_last_part_says_what_the_answer_took(version: str) -> None:
    framing, body = recorded_bytes(RECORDINGS / f"v{version}-chat-stream.json")
    last = json.loads(body.splitlines()[-1])

    usage = fed(framing, body).usage

    assert usage == Usage(
        total_seconds=last["total_duration"] / 1e9,
        load_seconds=last["load_duration"] / 1e9,
        prefill_seconds=last["prompt_eval_duration"] / 1e9,
        decode_seconds=last["eval_duration"] / 1e9,
        prompt_tokens=last["prompt_eval_count"],
        output_tokens=last["eval_count"],
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_an_openai_stream_gives_its_counts_where_asked_for(version: str) -> None:
    asked = fed(*recorded_bytes(RECORDINGS / f"v{version}-v1-chat-stream-usage.json"))
    unasked = fed(*recorded_bytes(RECORDINGS / f"v{version}-v1-chat-stream.json"))

    assert asked.usage is not None
    assert asked.usage.prompt_tokens
    assert asked.usage.output_tokens
    assert asked.usage.total_seconds is None
    assert unasked.usage is None


# -------------------------------------------------------------- cut wherever it is


@st.composite
def splits(draw: st.DrawFn, body: bytes) -> list[bytes]:
    cuts = sorted(draw(st.sets(st.integers(0, len(body)), max_size=12)))
    edges = [0, *cuts, len(body)]
    return [body[start:stop] for start, stop in pairwise(edges)]


PIECES = st.sampled_from(
    [
        token("Hello"),
        token('"done":true'),
        token("grüß \u2028 🦙"),
        token("", tool_calls=[{"function": {"name": "f", "arguments": {"done": True}}}]),
        compact({"error": "an error was encountered"}),
        compact({"status": "pulling manifest"}),
        DONE,
        b"",
        b"no JSON at all",
    ]
)
EVENTS = st.sampled_from(
    [
        b"data: " + compact({"choices": [{"delta": {"content": "data: [DONE]"}}]}),
        b"data: " + compact({"choices": [], "usage": {"prompt_tokens": 3}}),
        b"data: " + compact({"error": {"message": "no"}}),
        b"event: message_stop",
        b": a comment",
        b"data: [DONE]",
        b"",
    ]
)


@given(data=st.data())
@pytest.mark.parametrize("framing", [Framing.NDJSON, Framing.SSE])
def test_bytes_mean_the_same_however_they_are_cut(framing: Framing, data: st.DataObject) -> None:
    lines = data.draw(st.lists(PIECES if framing is Framing.NDJSON else EVENTS, max_size=6))
    newline = data.draw(st.sampled_from([b"\n", b"\r\n"]))
    body = newline.join(lines) + data.draw(st.sampled_from([b"", newline]))

    whole = fed(framing, body)
    cut = fed(framing, *data.draw(splits(body)))

    assert facts(cut) == facts(whole)
    assert cut.rest == b""


@pytest.mark.parametrize(
    "name", ["chat-stream", "v1-chat-stream-usage", "runner-sigkill-midstream"]
)
def test_a_recorded_stream_read_byte_by_byte_is_the_same_stream(name: str) -> None:
    framing, body = recorded_bytes(RECORDINGS / f"v0.32.15-{name}.json")

    whole = fed(framing, body)
    single = fed(framing, *(body[at : at + 1] for at in range(len(body))))

    assert facts(single) == facts(whole)


def test_a_part_counts_once_it_is_whole() -> None:
    reader = AnswerReader(Framing.NDJSON)

    reader.feed(token("a") + b"\n" + token("b")[:10])
    assert reader.parts == 1
    assert reader.rest == token("b")[:10]

    reader.feed(token("b")[10:])
    assert reader.parts == 1
    reader.feed(b"\n")
    assert reader.parts == 2


# --------------------------------------------------------------------- what is done


def test_only_done_true_is_the_end() -> None:
    assert fed(Framing.NDJSON, ndjson(token("a"), DONE)).is_complete
    assert fed(Framing.NDJSON, b'{"done": true, "done_reason": "stop"}').is_complete
    assert not fed(Framing.NDJSON, ndjson(token("a"))).is_complete
    assert not fed(Framing.NDJSON, b"").is_complete


LOOKS_LIKE_THE_END: list[tuple[str, bytes]] = [
    ("text", token('"done":true')),
    ("text with the whole line", token(DONE.decode())),
    (
        "tool arguments",
        token("", tool_calls=[{"function": {"name": "f", "arguments": {"done": True}}}]),
    ),
    (
        "status in tool arguments",
        token("", tool_calls=[{"function": {"name": "f", "arguments": {"status": "success"}}}]),
    ),
    ("status in text", token('{"status":"success"}')),
    ("thinking", token("", thinking='"done":true')),
    ("cut JSON", b'{"message":{},"done":true'),
    ("another type", compact({"done": "true", "x": {"done": True}})),
    ("a list", b'[{"done":true}]'),
    ("nested too deep", b'{"x":' * 100_000 + b'"done":true'),
]


@pytest.mark.parametrize(
    "line", [line for _, line in LOOKS_LIKE_THE_END], ids=[name for name, _ in LOOKS_LIKE_THE_END]
)
def test_what_looks_like_the_end_inside_an_answer_is_not(line: bytes) -> None:
    reader = fed(Framing.NDJSON, line + b"\n")

    assert not reader.is_complete
    assert reader.usage is None
    assert reader.error is None


def test_the_end_of_a_pull_is_its_success() -> None:
    lines = [{"status": "pulling manifest"}, {"status": "success"}]

    assert not fed(Framing.NDJSON, ndjson(compact(lines[0]))).is_complete
    assert fed(Framing.NDJSON, ndjson(*map(compact, lines))).is_complete


ENDS: list[bytes] = [
    b"data: [DONE]\n\n",
    b"data:[DONE]\n\n",
    b"data: [DONE]\r\n\r\n",
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    b'event: response.completed\ndata: {"type":"response.completed","response":{}}\n\n',
    b'data: {"type":"response.incomplete"}\n\n',
]


@pytest.mark.parametrize("end", ENDS)
def test_an_event_stream_ends_with_its_own_mark(end: bytes) -> None:
    assert fed(Framing.SSE, sse(b'{"choices":[]}'), end).is_complete


@pytest.mark.parametrize("text", ["data: [DONE]", "[DONE]", '{"type":"message_stop"}'])
def test_text_about_event_streams_does_not_end_one(text: str) -> None:
    chunk = compact({"choices": [{"index": 0, "delta": {"content": text}}]})

    assert not fed(Framing.SSE, sse(chunk)).is_complete


def test_events_and_comments_are_no_parts() -> None:
    body = b": keep-alive\n\nevent: message_start\ndata: {}\nid: 7\nretry: 3\n\n"

    assert fed(Framing.SSE, body).parts == 1


# -------------------------------------------------------------------------- errors


def test_an_error_line_is_no_answer() -> None:
    reader = fed(Framing.NDJSON, ndjson(token("a"), compact({"error": "unexpected EOF"})))

    assert reader.error == "unexpected EOF"
    assert not reader.is_complete


def test_an_error_event_is_no_answer() -> None:
    openai = fed(Framing.SSE, sse(compact({"error": {"message": "no", "type": "api_error"}})))
    anthropic = fed(
        Framing.SSE, b"event: error\n" + sse(compact({"type": "error", "error": {"message": "no"}}))
    )

    assert openai.error == anthropic.error == "no"


def test_talk_of_errors_is_an_answer() -> None:
    assert fed(Framing.NDJSON, ndjson(token('{"error":"no"}'), DONE)).error is None
    chunk = compact({"choices": [{"delta": {"content": '"error"'}}]})
    assert fed(Framing.SSE, sse(chunk, b"[DONE]")).error is None


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error":"no"}', "no"),
        (b'{"error":{"message":"no","type":"api_error","param":null,"code":null}}', "no"),
        (b'{"error":{"type":"api_error"}}', None),
        (b'{"error":7}', None),
        (b'{"done":true}', None),
        (b"[]", None),
        (b"404 page not found", None),
        (b"", None),
        (b"\xff\xfe\xfd", None),
        (b"[" * 100_000, None),
    ],
)
def test_the_text_of_an_error_body(body: bytes, text: str | None) -> None:
    assert error_text(body) == text


def test_a_line_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_LINE_BYTES", 100)

    within = fed(Framing.NDJSON, b"x" * 100, ended=False)
    beyond = fed(Framing.NDJSON, b"x" * 60, b"x" * 41, ended=False)

    assert not within.is_too_long
    assert beyond.is_too_long
    assert len(beyond.rest) == 101


def test_a_line_that_is_too_long_is_so_in_one_piece_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answers, "MAX_LINE_BYTES", 100)
    body = token("a") + b"\n" + token("b" * 100) + b"\n" + DONE + b"\n"

    whole = fed(Framing.NDJSON, body)
    cut = fed(Framing.NDJSON, *(body[at : at + 1] for at in range(len(body))))

    assert facts(whole) == facts(cut) == (1, False, None, None, True)


@pytest.mark.parametrize(
    ("framing", "nothing"),
    [(Framing.NDJSON, b"\n"), (Framing.SSE, b": still here\n"), (Framing.SSE, b"event: x\n")],
)
def test_lines_that_say_nothing_do_not_go_on_for_ever(
    monkeypatch: pytest.MonkeyPatch, framing: Framing, nothing: bytes
) -> None:
    monkeypatch.setattr(answers, "MOST_BETWEEN_BYTES", 1000)
    part = token("a") if framing is Framing.NDJSON else b"data: {}"

    between = fed(framing, *[nothing * 30 + part + b"\n"] * 20, ended=False)
    without_end = fed(framing, *[nothing * 30] * 40, ended=False)

    assert (between.parts, between.is_bad) == (20, False)
    assert (without_end.parts, without_end.is_too_long) == (0, True)


@pytest.mark.parametrize("line", [b"no JSON at all", b"<html>", b"[1]", b"null", b"\xff"])
def test_a_line_that_is_no_object_is_none_of_ollamas(line: bytes) -> None:
    reader = fed(Framing.NDJSON, ndjson(token("a"), line, DONE))

    assert (reader.parts, reader.is_complete, reader.is_no_json) == (1, False, True)


def test_a_long_line_that_comes_byte_by_byte_takes_no_longer_for_each() -> None:
    reader = AnswerReader(Framing.NDJSON)
    began = time.process_time()

    for _ in range(1_000_000):
        reader.feed(b"x")

    # Put together anew for each byte, it takes a minute.
    assert time.process_time() - began < 5
    assert len(reader.rest) == 1_000_000


# ----------------------------------------------------------------------- one piece


@pytest.mark.parametrize(
    ("document", "is_complete", "counts"),
    [
        ({"done": True, "prompt_eval_count": 3, "eval_count": 2}, True, (3, 2)),
        ({"done": False}, False, (None, None)),
        ({"done": "true"}, False, (None, None)),
        ({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}, True, (3, 2)),
        ({"choices": [], "usage": {"prompt_tokens": "3"}}, True, (None, None)),
        ({"embeddings": [], "total_duration": 5, "prompt_eval_count": 3}, True, (3, None)),
    ],
)
def test_an_answer_in_one_piece_says_whether_it_is_complete(
    document: dict[str, Any], is_complete: bool, counts: tuple[int | None, int | None]
) -> None:
    complete, usage = read_whole(document)

    assert complete is is_complete
    assert usage is not None
    assert (usage.prompt_tokens, usage.output_tokens) == counts


def test_an_old_embedding_says_nothing_of_itself() -> None:
    assert read_whole({"embedding": [0.1]}) == (True, None)


@pytest.mark.parametrize(
    "wrong", ["5", None, [], {}, True, -1, float("nan"), float("inf"), 1e300, 10**400]
)
def test_figures_of_a_wrong_type_are_unknown(wrong: Any) -> None:
    names = "total_duration load_duration prompt_eval_duration eval_duration "
    names += "prompt_eval_count eval_count"

    _, usage = read_whole({"done": True, **dict.fromkeys(names.split(), wrong)})

    assert usage is not None
    assert astuple(usage) == astuple(Usage())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "name",
    "chat-nonstream generate-nonstream embed-single embeddings-legacy v1-chat-nonstream "
    "v1-completions v1-embeddings generate-load-cold generate-unload".split(),
)
def test_every_kind_of_recorded_answer_is_one(version: str, name: str) -> None:
    document = json.loads((RECORDINGS / f"v{version}-{name}.json").read_text())["response"]["body"]

    assert is_answer(document)
    assert read_whole(document)[0]


def test_what_others_send_is_no_answer() -> None:
    assert not is_answer({"message": "It works!"})
    assert not is_answer({"done": True, "message": "It works!"})
    assert not is_answer({"done": True, "response": ["It works!"]})
    assert not is_answer({"embeddings": "It works!"})
    assert not is_answer({})


# ------------------------------------------------------------------------- embeddings


def test_an_embedding_is_reading_and_nothing_else() -> None:
    document = {"embeddings": [[0.1]], "total_duration": 400_000_000, "load_duration": 3_000_000}
    usage = usage_of({**document, "prompt_eval_count": 30})

    assert usage.prefill_seconds == pytest.approx(0.397)
    assert (usage.prompt_tokens, usage.output_tokens, usage.decode_seconds) == (30, None, None)


def test_a_load_that_took_longer_than_all_of_it_leaves_no_time_for_reading() -> None:
    usage = usage_of({"embeddings": [], "total_duration": 1, "load_duration": 2})

    assert usage.prefill_seconds == 0.0


@pytest.mark.parametrize(
    ("line", "is_complete", "error"),
    [
        (b'{"message":{"content":"x"},"done":false}', False, None),
        (b'{"message":{"tool_calls":[{"arguments":{"done":false}}]},"done":true}', True, None),
        (b'{"done":true,"message":{"tool_calls":[{"arguments":{"done":false}}]}}', True, None),
        (b'{"done":true,"arguments":{"done":false}}', True, None),
        (b'{"error":"no","done":false,"x":1}', False, "no"),
    ],
)
def test_the_short_cut_for_parts_that_are_not_the_last_misses_no_end(
    line: bytes, is_complete: bool, error: str | None
) -> None:
    reader = AnswerReader(Framing.NDJSON)
    reader.feed(line + b"\n")

    assert (reader.parts, reader.is_complete, reader.error) == (1, is_complete, error)
