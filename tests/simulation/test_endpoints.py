"""The endpoints without sockets: translations, versions, and what no recording shows."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest

from hydra_llm.simulation.api import OllamaApi
from hydra_llm.simulation.catalog import SimulatedModel, known_models
from hydra_llm.simulation.model import OllamaServer
from hydra_llm.simulation.settings import NodeSettings
from hydra_llm.simulation.wire import Reply

VISION = SimulatedModel("eyes", capabilities=("completion", "vision"))
MODELS = {**known_models(), "eyes": VISION}
TOOL = {
    "name": "multiply",
    "description": "Multiply two numbers",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
}
PIXEL = base64.b64encode(b"any picture will do").decode()


class Node:
    """One node; every request runs to its end at once."""

    def __init__(self, **settings: Any) -> None:
        installed = {model.parsed.key: model for model in MODELS.values()}
        server = OllamaServer(NodeSettings(**settings))
        self.api = OllamaApi(server, installed, wall_at=lambda at: at)
        self.now = 0.0

    def raw(self, path: str, body: dict[str, Any] | None = None, method: str = "") -> Reply:
        data = b"" if body is None else json.dumps(body).encode()
        method = method or ("GET" if body is None else "POST")
        answer = self.api.handle(method, path, data, self.now)
        if isinstance(answer, Reply):
            return answer
        chunks: list[bytes] = []
        while not answer.ticket.is_over:
            at = self.api.server.next_event_at()
            assert at is not None
            self.now = at
            events = self.api.server.advance(at)
            chunks += [answer.token(event.index) for event in events if event.kind == "token"]
        ending = (
            answer.finish()
            if answer.ticket.failure is None
            else answer.fail(answer.ticket.failure, begun=bool(chunks))
        )
        if isinstance(ending, Reply):
            return ending
        return Reply(200, b"".join([*chunks, *ending]), answer.content_type)

    def json(self, path: str, body: dict[str, Any] | None = None, **more: Any) -> Any:
        return json.loads(self.raw(path, body, **more).body)

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        text = self.raw(path, {**body, "stream": True}).body.decode()
        lines = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


def asked(text: str = "What is 3 times 12?", model: str = "llama3.2:3b") -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}]}


# ---------------------------------------------------------------- /v1/messages and /v1/responses


def test_messages_answers_in_blocks() -> None:
    body = {**asked(model="qwen3:8b"), "max_tokens": 500, "thinking": {"type": "enabled"}}
    answer = Node().json("/v1/messages", body)

    assert [block["type"] for block in answer["content"]] == ["thinking", "text"]
    assert answer["stop_reason"] == "end_turn"
    assert answer["usage"]["output_tokens"] > 0


def test_messages_streams_each_block_from_start_to_stop() -> None:
    body = {**asked(), "max_tokens": 3}
    kinds = [event["type"] for event in Node().events("/v1/messages", body)]

    assert kinds == ["message_start", "content_block_start", *["content_block_delta"] * 3,
                     "content_block_stop", "message_delta", "message_stop"]  # fmt: skip


def test_messages_calls_a_tool_and_takes_its_result() -> None:
    node = Node()
    tools = [{"name": "multiply", "input_schema": TOOL["parameters"]}]
    body = {**asked(), "tools": tools, "max_tokens": 500}
    answer = node.json("/v1/messages", body)
    (block,) = answer["content"]
    assert (block["type"], block["name"], block["input"]) == ("tool_use", "multiply",
                                                              {"a": 3, "b": 12})  # fmt: skip
    assert answer["stop_reason"] == "tool_use"
    assert "tool_use" in [
        event.get("content_block", {}).get("type") for event in node.events("/v1/messages", body)
    ]
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": "36"}
    messages = [*body["messages"], {"role": "assistant", "content": [block]},
                {"role": "user", "content": [result]}]  # fmt: skip
    assert "36" in node.json("/v1/messages", {**body, "messages": messages})["content"][0]["text"]


def test_responses_answers_in_items() -> None:
    body = {"model": "llama3.2:3b", "input": "Hello", "instructions": "Be brief"}
    answer = Node().json("/v1/responses", body)

    assert answer["status"] == "completed"
    assert answer["output"][0]["content"][0]["type"] == "output_text"
    assert answer["usage"]["total_tokens"] > 0


def test_responses_streams_from_created_to_completed() -> None:
    body = {"model": "llama3.2:3b", "input": "Hello", "max_output_tokens": 2}
    events = Node().events("/v1/responses", body)

    assert [event["type"] for event in events] == [
        "response.created", "response.output_text.delta", "response.output_text.delta",
        "response.completed",
    ]  # fmt: skip
    assert [event["sequence_number"] for event in events] == [0, 1, 2, 3]
    assert events[-1]["response"]["status"] == "incomplete"


def test_responses_calls_a_tool_and_takes_its_result() -> None:
    node = Node()
    body = {"model": "llama3.2:3b", "input": "What is 3 times 12?",
            "tools": [{"type": "function", **TOOL}]}  # fmt: skip
    (call,) = node.json("/v1/responses", body)["output"]
    assert (call["type"], json.loads(call["arguments"])) == ("function_call", {"a": 3, "b": 12})

    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "36"}
    follow_up = {**body, "input": [{"role": "user", "content": "3 times 12?"}, call, output]}
    (message,) = node.json("/v1/responses", follow_up)["output"]
    assert "36" in message["content"][0]["text"]


# ---------------------------------------------------------------- chat, more than was recorded


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/v1/chat/completions"])
def test_an_unknown_model_is_not_found_on_every_v1_endpoint(path: str) -> None:
    body = {**asked(model="nope"), "input": "x"}
    assert Node().raw(path, body).status == 404


def test_openai_messages_come_in_parts_and_results_as_text() -> None:
    node = Node()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}
    parts = [{"type": "text", "text": "What is it?"}, image]
    seen = {"model": "eyes", "messages": [{"role": "user", "content": parts}]}
    assert node.raw("/v1/chat/completions", seen).status == 200
    assert node.raw("/v1/chat/completions", {**seen, "model": "llama3.2:3b"}).status == 400

    body = {**asked(), "tools": [{"type": "function", "function": TOOL}]}
    message = node.json("/v1/chat/completions", body)["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "36"}
    follow_up = {**body, "messages": [*body["messages"], message, result]}
    answer = node.json("/v1/chat/completions", follow_up)["choices"][0]
    assert "36" in answer["message"]["content"]
    assert answer["finish_reason"] == "stop"


def test_openai_response_formats_are_obeyed() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for response_format in (form, {"type": "json_object"}):
        body = {**asked(), "response_format": response_format}
        text = Node().json("/v1/chat/completions", body)["choices"][0]["message"]["content"]
        assert isinstance(json.loads(text), dict)


def test_an_image_changes_the_answer() -> None:
    node = Node()
    texts = [
        node.json("/api/chat", {"model": "eyes", "stream": False, "messages": [
            {"role": "user", "content": "What is it?", **images}]})["message"]["content"]
        for images in ({}, {"images": [PIXEL]})
    ]  # fmt: skip
    assert texts[0] != texts[1]


def test_embeddings_as_base64_are_the_same_numbers() -> None:
    node, body = Node(), {"model": "nomic-embed-text", "input": ["hello"]}
    plain = node.json("/v1/embeddings", body)["data"][0]["embedding"]
    coded = node.json("/v1/embeddings", {**body, "encoding_format": "base64"})
    packed = base64.b64decode(coded["data"][0]["embedding"])
    assert list(struct.unpack("<768f", packed)) == pytest.approx(plain, abs=1e-6)


def test_the_counts_and_times_of_the_last_line_agree() -> None:
    answer = Node().json("/api/chat", {**asked(), "stream": False})

    parts = ("load_duration", "prompt_eval_duration", "eval_duration")
    assert answer["total_duration"] >= sum(answer[part] for part in parts)
    assert answer["eval_count"] == 65
    per_token = 2.0 / 40  # GB over GB/s: the node has no GPU
    assert answer["eval_duration"] == pytest.approx(65 * per_token * 1e9, rel=1e-6)


def test_a_repeated_prompt_costs_next_to_nothing_and_counts_the_same() -> None:
    node = Node()
    body = {**asked("word " * 200), "stream": False}
    first, again = node.json("/api/chat", body), node.json("/api/chat", body)

    assert first["prompt_eval_count"] == again["prompt_eval_count"]
    assert again["prompt_eval_duration"] < first["prompt_eval_duration"] / 50


def test_the_next_turn_of_a_conversation_finds_its_past_in_the_cache() -> None:
    node = Node()
    first = asked("word " * 200)
    answer = node.json("/api/chat", {**first, "stream": False})
    turns = [*first["messages"], answer["message"], {"role": "user", "content": "And then?"}]
    second = node.json("/api/chat", {**first, "messages": turns, "stream": False})

    assert second["prompt_eval_count"] > answer["prompt_eval_count"]
    assert second["prompt_eval_duration"] < answer["prompt_eval_duration"] / 5


# ---------------------------------------------------------------- the catalogue


def test_a_copied_model_shares_the_weights_and_a_deleted_one_is_gone() -> None:
    node = Node()
    assert node.raw("/api/copy", {"source": "qwen3:8b", "destination": "mine"}).status == 200
    names = [model["name"] for model in node.json("/api/tags")["models"]]
    assert "mine:latest" in names
    assert node.raw("/api/delete", {"model": "mine"}, method="DELETE").status == 200
    assert node.raw("/api/show", {"model": "mine"}).status == 404


def test_show_has_the_arrays_only_when_asked() -> None:
    node = Node()
    brief = node.json("/api/show", {"model": "qwen3:8b"})["model_info"]
    full = node.json("/api/show", {"model": "qwen3:8b", "verbose": True})["model_info"]

    assert brief["tokenizer.ggml.tokens"] is None
    assert len(full["tokenizer.ggml.tokens"]) == brief["qwen3.vocab_size"]
    assert brief["general.parameter_count"] == 8_200_000_000


def test_nothing_is_ever_pulled() -> None:
    assert Node().raw("/api/pull", {"model": "llama3:70b"}).status == 500


def test_tags_of_older_versions_do_not_say_what_a_model_can() -> None:
    older = Node(version="0.24.0").json("/api/tags")["models"][0]
    assert "capabilities" not in older
    assert "capabilities" in Node().json("/api/tags")["models"][0]


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:1", 200), ("[::1]:1", 200), ("192.168.1.5:11434", 200), ("rig.local", 200),
     ("example.com", 403), ("localhost.example.com", 403)],
)  # fmt: skip
def test_a_foreign_host_header_is_refused(host: str, status: int) -> None:
    answer = Node().api.handle("GET", "/api/tags", b"", 0.0, host=host)
    assert isinstance(answer, Reply)
    assert answer.status == status
